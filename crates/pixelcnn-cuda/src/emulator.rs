//! The kernels without a GPU: compiled as C++ and run on the CPU.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::{Library, Symbol};

use crate::convolution::{Convolution, Direction};
use crate::gpu::{Gpu, Graph};
use crate::kernels::SOURCES;
use crate::{CudaError, Precision};

/// A kernel as the emulator exports it: blocks, threads, arguments.
type Kernel = unsafe extern "C" fn(*const u32, u32, *const *mut c_void);

/// Behind all memory.
const GUARD: [u8; 64] = [0xa5; 64];

/// Pretends to be a GPU with so many bytes.
pub(crate) struct Emulator {
    bytes: usize,
    precision: Precision,
    allocated: Mutex<BTreeMap<u64, Layout>>,
    /// While kernels are recorded they don't run, and nothing else may be asked for.
    recording: AtomicBool,
}

impl Emulator {
    pub fn new(bytes: usize, precision: Precision) -> Arc<Emulator> {
        Arc::new(Emulator {
            bytes,
            precision,
            allocated: Mutex::default(),
            recording: AtomicBool::new(false),
        })
    }

    fn expect_not_recording(&self) {
        let recording = self.recording.load(Ordering::Relaxed);
        assert!(!recording, "a graph has kernels alone");
    }

    fn allocated(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Layout>> {
        self.allocated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this machine has the C++ compiler that the emulator needs; says so where it has not.
pub(crate) fn can_run() -> bool {
    let there = Command::new("c++").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: there is no C++ compiler (c++)");
    }
    there
}

/// The kernels, one at a time: they keep their threads' numbers in one place.
fn library(precision: Precision) -> &'static Mutex<Library> {
    static LIBRARIES: [OnceLock<Mutex<Library>>; 2] = [const { OnceLock::new() }; 2];
    let half = precision == Precision::Bf16;
    LIBRARIES[usize::from(half)].get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("all.cpp"), folder.path().join("all.so"));
        let begin = include_str!("kernels/emulator.h");
        fs::write(&source, [&[begin], &SOURCES[..]].concat().concat()).unwrap();
        let compiler = Command::new("c++")
            .args([
                "-std=c++17",
                "-O2",
                "-Wall",
                "-Wno-unused-function",
                "-Werror",
                "-shared",
                "-fPIC",
                "-o",
            ])
            .args([&library, &source])
            .args(half.then_some("-DBF16"))
            .output()
            .expect("the tests need a C++ compiler");
        let said = String::from_utf8_lossy(&compiler.stderr);
        assert!(compiler.status.success(), "{said}");
        // SAFETY: it has no code that runs when it is loaded.
        Mutex::new(unsafe { Library::new(&library) }.unwrap())
    })
}

impl Gpu for Emulator {
    fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        self.expect_not_recording();
        let layout = Layout::from_size_align(bytes + GUARD.len(), 256).unwrap();
        assert!(
            bytes <= self.available()?,
            "the engine looks before it allocates"
        );
        // SAFETY: the size is not 0.
        let address = unsafe { alloc(layout) };
        // What memory holds at first is not to be relied on.
        // SAFETY: it is as long.
        unsafe {
            ptr::write_bytes(address, 0xff, bytes);
            ptr::copy_nonoverlapping(GUARD.as_ptr(), address.add(bytes), GUARD.len());
        }
        self.allocated().insert(address as u64, layout);
        Ok(address as u64)
    }

    unsafe fn free(&self, address: u64) {
        let layout = self.allocated().remove(&address).unwrap();
        // SAFETY: it was allocated so.
        unsafe {
            let behind = (address as *const u8).add(layout.size() - GUARD.len());
            let behind = std::slice::from_raw_parts(behind, GUARD.len());
            assert_eq!(behind, GUARD, "a kernel wrote beyond its memory");
            dealloc(address as *mut u8, layout);
        }
    }

    fn available(&self) -> Result<usize, CudaError> {
        let taken: usize = self.allocated().values().map(Layout::size).sum();
        Ok(self.bytes.saturating_sub(taken))
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.expect_not_recording();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.expect_not_recording();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.expect_not_recording();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[*mut c_void],
    ) -> Result<(), CudaError> {
        if self.recording.load(Ordering::Relaxed) {
            return Ok(());
        }
        let library = library(self.precision)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: all that it exports are such functions; the caller knows the arguments.
        unsafe {
            let kernel: Symbol<Kernel> = library.get(format!("emulated_{kernel}")).unwrap();
            kernel(blocks.as_ptr(), threads, arguments.as_ptr());
        }
        Ok(())
    }

    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) -> Result<Option<Box<dyn Graph>>, CudaError> {
        self.recording.store(true, Ordering::Relaxed);
        let worked = work();
        self.recording.store(false, Ordering::Relaxed);
        worked.map(|()| None)
    }

    unsafe fn convolve(
        &self,
        convolution: Convolution,
        direction: Direction,
        operands: [u64; 3],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { convolution.run(self, direction, operands, accumulate) }
    }
}
