//! A GPU as the engine sees it: memory, and kernels on a few branches. Tests have another one, which
//! runs the same kernels on the CPU.

use std::ffi::c_void;
use std::sync::Arc;

use pixelcnn_core::ranks::Ranks;

use crate::CudaError;
use crate::convolution::{Convolution, Direction};

/// What an engine asks of a GPU.
///
/// # Safety
/// Addresses are those of memory that [`Gpu::allocate`] gave and [`Gpu::free`] has not taken back.
pub(crate) trait Gpu: Send + Sync {
    /// Takes memory; what it holds is not said.
    fn allocate(&self, bytes: usize) -> Result<u64, CudaError>;

    /// Gives memory back, once the kernels that were asked for are done with it.
    ///
    /// # Safety
    /// Nobody uses it afterwards.
    unsafe fn free(&self, address: u64);

    /// Bytes that can still be allocated.
    fn available(&self) -> Result<usize, CudaError>;

    /// Writes bytes to memory.
    ///
    /// # Safety
    /// So many bytes were allocated there.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError>;

    /// Reads bytes from memory, once all kernels are done.
    ///
    /// # Safety
    /// So many bytes were allocated there.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError>;

    /// Writes zeros to memory.
    ///
    /// # Safety
    /// So many bytes were allocated there.
    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError>;

    /// A branch by its number, below [`BRANCHES`]. What is done to memory is done on branch 0.
    fn branch(&self, number: usize) -> &dyn Branch;

    /// Brings this GPU together with those of other ranks: they all do so.
    fn join(&self, ranks: &Arc<dyn Ranks>) -> Result<(), CudaError>;

    /// Records the kernels and exchanges that `work` asks for, without running them; none where the
    /// GPU can't. It must ask for nothing else, and not for the first time. If it uses other branches
    /// than 0, they begin with waiting for branch 0, which at last waits for them.
    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) -> Result<Option<Box<dyn Graph>>, CudaError>;
}

/// The two of the plan, and [`SUMS`].
pub(crate) const BRANCHES: usize = 3;
/// The branch on which gradients are summed.
pub(crate) const SUMS: usize = 2;

/// An order in which kernels run. Those of different branches may run at the same time.
pub(crate) trait Branch {
    /// Lets what comes next on this branch wait for what was asked for on another one.
    fn wait(&self, other: usize) -> Result<(), CudaError>;

    /// Sends values of four bytes to another rank and receives others from it, each at an address; once
    /// all have joined.
    ///
    /// # Safety
    /// So many values were allocated there.
    unsafe fn exchange(
        &self,
        with: usize,
        sent: (u64, usize),
        received: (u64, usize),
    ) -> Result<(), CudaError>;

    /// Runs a kernel in so many blocks of so many threads.
    ///
    /// # Safety
    /// The arguments are those that the kernel takes, and it stays within the memory at their
    /// addresses.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<(), CudaError>;

    /// Makes one of a convolution's finer map, weight and coarser map of the others, or adds it to
    /// what is there.
    ///
    /// # Safety
    /// The memory is as large as the geometry says.
    unsafe fn convolve(
        &self,
        convolution: Convolution,
        direction: Direction,
        operands: [u64; 3],
        accumulate: bool,
    ) -> Result<(), CudaError>;
}

/// An argument of a kernel: where it is, and how many bytes it has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument {
    pub at: *mut c_void,
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "the driver knows its kernels' arguments")
    )]
    pub bytes: usize,
}

/// Bytes of those available that large allocations can have: a little is lost between them.
pub(crate) fn usable(available: usize) -> usize {
    available / 16 * 15
}

/// Kernels with their arguments, to be run again as one.
pub(crate) trait Graph: Send + Sync {
    /// Runs them.
    ///
    /// # Safety
    /// The memory that they were recorded with is there.
    unsafe fn launch(&self) -> Result<(), CudaError>;
}

/// Memory of a GPU, given back when dropped.
pub(crate) struct Memory {
    gpu: Arc<dyn Gpu>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// So many bytes, all zero.
    pub fn zeroed(gpu: &Arc<dyn Gpu>, bytes: usize) -> Result<Memory, CudaError> {
        let address = gpu.allocate(bytes)?;
        let gpu = Arc::clone(gpu);
        let memory = Memory {
            gpu,
            address,
            bytes,
        };
        // SAFETY: it is as long.
        unsafe { memory.gpu.clear(address, bytes)? };
        Ok(memory)
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Writes values from a byte on.
    ///
    /// # Panics
    /// Where they don't fit.
    pub fn write<T: Plain>(&self, at: usize, values: &[T]) -> Result<(), CudaError> {
        let bytes = size_of_val(values);
        assert!(
            at <= self.bytes && bytes <= self.bytes - at,
            "within the memory"
        );
        // SAFETY: values of such types are so many bytes, and the memory has them.
        unsafe {
            let values = std::slice::from_raw_parts(values.as_ptr().cast(), bytes);
            self.gpu.upload(self.address + at as u64, values)
        }
    }

    /// Reads values from a byte on.
    ///
    /// # Panics
    /// Where there are not as many.
    pub fn read<T: Plain>(&self, at: usize, values: &mut [T]) -> Result<(), CudaError> {
        let bytes = size_of_val(values);
        assert!(
            at <= self.bytes && bytes <= self.bytes - at,
            "within the memory"
        );
        // SAFETY: any bytes are values of such types, and the memory has so many.
        unsafe {
            let values = std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), bytes);
            self.gpu.download(self.address + at as u64, values)
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more.
        unsafe { self.gpu.free(self.address) };
    }
}

/// Types without padding, of which any bytes are values.
///
/// # Safety
/// The type is one.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: numbers are.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
