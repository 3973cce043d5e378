//! The kernels without a GPU: compiled as C++ and run on the CPU.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_void;
use std::fs;
use std::mem;
use std::process::Command;
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libloading::{Library, Symbol};

use pixelcnn_core::ranks::Ranks;

use crate::convolution::{Convolution, Direction};
use crate::gpu::{Argument, BRANCHES, Branch, Gpu, Graph};
use crate::kernels::SOURCES;
use crate::{CudaError, Precision};

/// A kernel as the emulator exports it: blocks, threads, arguments.
type Kernel = unsafe extern "C" fn(*const u32, u32, *const *mut c_void);

/// Behind all memory.
const GUARD: [u8; 64] = [0xa5; 64];

/// Pretends to be a GPU with so many bytes.
pub(crate) struct Emulator {
    bytes: usize,
    allocated: Mutex<BTreeMap<u64, Layout>>,
    /// While kernels are recorded they don't run, and nothing else may be asked for.
    recording: Arc<AtomicBool>,
    branches: [Queue; BRANCHES],
    /// The ranks that have joined.
    ranks: Arc<OnceLock<Arc<dyn Ranks>>>,
}

/// A branch of the emulator.
struct Queue {
    precision: Precision,
    recording: Arc<AtomicBool>,
    /// What has not run yet: all, on a branch that is late, until another one waits for it.
    late: Option<Arc<Mutex<VecDeque<Asked>>>>,
    /// Another branch's, and its number.
    other: Option<(usize, Arc<Mutex<VecDeque<Asked>>>)>,
    /// How many of those run before each of this branch.
    pace: usize,
    ranks: Arc<OnceLock<Arc<dyn Ranks>>>,
}

/// What was asked for.
enum Asked {
    /// A kernel, its arguments in words of eight bytes.
    Kernel {
        name: &'static str,
        blocks: [u32; 3],
        threads: u32,
        arguments: Vec<Vec<u64>>,
    },
    /// An exchange with another rank.
    Exchange {
        with: usize,
        sent: (u64, usize),
        received: (u64, usize),
    },
}

impl Emulator {
    pub fn new(bytes: usize, precision: Precision) -> Arc<Emulator> {
        Emulator::with_late_branch(bytes, precision, None, 0)
    }

    /// One of whose branches is late: so many of its kernels run before each of the other one's, and
    /// all when that must wait for them.
    pub fn with_late_branch(
        bytes: usize,
        precision: Precision,
        late: Option<usize>,
        pace: usize,
    ) -> Arc<Emulator> {
        let recording = Arc::new(AtomicBool::new(false));
        let asked: Arc<Mutex<VecDeque<Asked>>> = Arc::default();
        let ranks: Arc<OnceLock<Arc<dyn Ranks>>> = Arc::default();
        let queue = |branch: usize| {
            let is_late = late == Some(branch);
            let other = late.filter(|_| !is_late);
            Queue {
                precision,
                recording: Arc::clone(&recording),
                late: is_late.then(|| Arc::clone(&asked)),
                other: other.map(|other| (other, Arc::clone(&asked))),
                pace,
                ranks: Arc::clone(&ranks),
            }
        };
        Arc::new(Emulator {
            bytes,
            branches: [queue(0), queue(1), queue(2)],
            ranks: Arc::clone(&ranks),
            allocated: Mutex::default(),
            recording,
        })
    }

    /// What is done to memory is done on branch 0.
    fn catch_up(&self) {
        self.expect_not_recording();
        self.branches[0].run_late(&self.branches[0].late);
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
        for branch in &self.branches {
            branch.run_late(&branch.late);
        }
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
        self.catch_up();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.catch_up();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.catch_up();
        // SAFETY: the caller knows that it is allocated.
        unsafe { ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn branch(&self, number: usize) -> &dyn Branch {
        &self.branches[number]
    }

    fn join(&self, ranks: &Arc<dyn Ranks>) -> Result<(), CudaError> {
        let joined = self.ranks.set(Arc::clone(ranks));
        joined.map_err(|_| CudaError::Refused("joined already".into()))
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
}

impl Queue {
    fn run_late(&self, asked: &Option<Arc<Mutex<VecDeque<Asked>>>>) {
        let Some(asked) = asked else { return };
        let asked = mem::take(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner));
        asked.iter().for_each(|asked| self.run(asked));
    }

    /// Runs what was asked for now, or when another branch waits for it.
    fn ask(&self, asked: Asked) {
        if self.recording.load(Ordering::Relaxed) {
            return;
        }
        let lock = PoisonError::into_inner;
        match &self.late {
            Some(late) => late.lock().unwrap_or_else(lock).push_back(asked),
            None => {
                if let Some((_, other)) = &self.other {
                    let mut other = other.lock().unwrap_or_else(lock);
                    let first = self.pace.min(other.len());
                    let first: Vec<Asked> = other.drain(..first).collect();
                    drop(other);
                    first.iter().for_each(|asked| self.run(asked));
                }
                self.run(&asked);
            }
        }
    }

    fn run(&self, asked: &Asked) {
        let (name, blocks, threads, arguments) = match asked {
            Asked::Kernel {
                name,
                blocks,
                threads,
                arguments,
            } => (name, blocks, *threads, arguments),
            &Asked::Exchange {
                with,
                sent,
                received,
            } => {
                let ranks = self.ranks.get().expect("they have joined");
                // SAFETY: who asked knows that it is allocated; what is received is no part of what
                // is sent.
                unsafe {
                    let sent = slice::from_raw_parts(sent.0 as *const u8, 4 * sent.1);
                    let received = slice::from_raw_parts_mut(received.0 as *mut u8, 4 * received.1);
                    ranks.exchange(with, sent, received).unwrap();
                }
                return;
            }
        };
        let library = library(self.precision)
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let arguments = arguments.iter();
        let arguments: Vec<*mut c_void> = arguments.map(|a| a.as_ptr() as *mut c_void).collect();
        // SAFETY: all that it exports are such functions; who asked knows the arguments.
        unsafe {
            let name = format!("emulated_{name}");
            let kernel: Symbol<Kernel> = library.get(name).unwrap();
            kernel(blocks.as_ptr(), threads, arguments.as_ptr());
        }
    }
}

impl Branch for Queue {
    fn wait(&self, other: usize) -> Result<(), CudaError> {
        match &self.other {
            Some((late, asked)) if *late == other => self.run_late(&Some(Arc::clone(asked))),
            _ => {}
        }
        Ok(())
    }

    unsafe fn exchange(
        &self,
        with: usize,
        sent: (u64, usize),
        received: (u64, usize),
    ) -> Result<(), CudaError> {
        self.ask(Asked::Exchange {
            with,
            sent,
            received,
        });
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<(), CudaError> {
        let copied = |argument: &Argument| {
            let mut words = vec![0u64; argument.bytes.div_ceil(8)];
            // SAFETY: the argument has so many bytes, and the words have as many at the least.
            unsafe {
                ptr::copy_nonoverlapping(
                    argument.at.cast::<u8>(),
                    words.as_mut_ptr().cast(),
                    argument.bytes,
                );
            }
            words
        };
        self.ask(Asked::Kernel {
            name: kernel,
            blocks,
            threads,
            arguments: arguments.iter().map(copied).collect(),
        });
        Ok(())
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
