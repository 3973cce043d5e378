//! A GPU, by way of its driver.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use crate::convolution::{Convolution, Direction};
use crate::cudnn::{Cudnn, Work};
use crate::gpu::{Gpu, Graph};
use crate::kernels::NAMES;
use crate::{CudaError, Precision, compiler, libraries};

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its number, from 0.
    pub number: usize,
    /// What it is called.
    pub name: String,
    /// Its memory in bytes.
    pub memory: usize,
    /// Its compute capability, major and minor.
    pub capability: (i32, i32),
}

/// The GPUs of this machine, none where there is no driver.
///
/// # Errors
/// Where the driver refuses.
pub fn devices() -> Result<Vec<Device>, CudaError> {
    if libraries::load_driver().is_err() {
        return Ok(Vec::new());
    }
    // Without a context on any of them, which takes time and its memory.
    let device = |number: usize| {
        let handle = result::device::get(number as i32)?;
        // SAFETY: the driver has just given the handle.
        unsafe {
            Ok(Device {
                number,
                name: result::device::get_name(handle)?,
                memory: result::device::total_mem(handle)?,
                capability: (
                    result::device::get_attribute(handle, MAJOR)?,
                    result::device::get_attribute(handle, MINOR)?,
                ),
            })
        }
    };
    let devices = (0..count()?).map(device);
    devices.collect::<Result<_, _>>().map_err(refused)
}

const MAJOR: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
const MINOR: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;

/// How many GPUs the driver, which is loaded, has.
fn count() -> Result<usize, CudaError> {
    match CudaContext::device_count() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        count => Ok(count.map_err(refused)?.unsigned_abs() as usize),
    }
}

/// Checks that a GPU is there, and all that it needs.
///
/// # Errors
/// [`CudaError::Missing`] and [`CudaError::NoDevice`].
pub fn expect(number: usize) -> Result<(), CudaError> {
    libraries::load()?;
    let found = count()?;
    match number < found {
        true => Ok(()),
        false => Err(CudaError::NoDevice { number, found }),
    }
}

/// A GPU with the kernels.
pub(crate) struct Driver {
    context: Arc<CudaContext>,
    /// All is done in its order.
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: HashMap<&'static str, sys::CUfunction>,
    precision: Precision,
    /// Begun with the first convolution, for it is large and drawing images needs none; none where it
    /// is not to be found: the plain kernels take its place.
    cudnn: OnceLock<Result<Option<Cudnn>, CudaError>>,
    /// Memory for cuDNN: where, and how many bytes.
    workspace: Mutex<(u64, usize)>,
}

// SAFETY: the driver's handles may be used by any thread that has bound the context.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Driver {}

impl Driver {
    /// A device by its number. Compiled kernels are kept in the folder `cache`.
    pub fn open(
        number: usize,
        precision: Precision,
        cache: Option<&Path>,
    ) -> Result<Driver, CudaError> {
        expect(number)?;
        let context = CudaContext::new(number).map_err(refused)?;
        let capability = context.compute_capability().map_err(refused)?;
        let image = compiler::compiled(capability, precision, cache)?;
        // SAFETY: the image is what NVRTC made, or was checked to be so.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = module.map_err(refused)?;
        let function = |&name: &&'static str| {
            let c_name = CString::new(name).unwrap_or_default();
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(module, c_name) };
            Ok((name, function.map_err(refused)?))
        };
        let functions = NAMES
            .iter()
            .map(function)
            .collect::<Result<_, CudaError>>()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
        let stream = stream.map_err(refused)?;
        Ok(Driver {
            context,
            stream,
            module,
            functions,
            precision,
            cudnn: OnceLock::new(),
            workspace: Mutex::default(),
        })
    }

    /// Every thread that calls the driver must know the context.
    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(refused)
    }

    fn cudnn(&self) -> Result<Option<&Cudnn>, CudaError> {
        let begin = || match libraries::load_cudnn() {
            // SAFETY: the context is bound, and dropped after it.
            Ok(()) => unsafe { Cudnn::new(self.stream, self.precision) }.map(Some),
            Err(_) => Ok(None),
        };
        let cudnn = self.cudnn.get_or_init(begin).as_ref();
        cudnn.map(Option::as_ref).map_err(CudaError::clone)
    }

    /// Memory for cuDNN, of so many bytes at least.
    fn workspace(&self, bytes: usize) -> Result<u64, CudaError> {
        let mut held = self
            .workspace
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if held.1 < bytes {
            let (old, _) = *held;
            *held = (0, 0);
            if old != 0 {
                // SAFETY: it was allocated here, and `free` waits for those that use it.
                unsafe { self.free(old) };
            }
            *held = (self.allocate(bytes)?, bytes);
        }
        Ok(held.0)
    }

    fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives as long as this.
        unsafe { result::stream::synchronize(self.stream) }.map_err(refused)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().and_then(|()| self.wait()).is_err() {
            // The driver has failed before, and that was said.
            return;
        }
        self.cudnn.take();
        let (workspace, _) = *self
            .workspace
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody uses them any more.
        unsafe {
            if workspace != 0 {
                self.free(workspace);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::module::unload(self.module);
        }
    }
}

impl Gpu for Driver {
    fn allocate(&self, bytes: usize) -> Result<u64, CudaError> {
        self.bind()?;
        // SAFETY: memory may hold anything.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(refused)
    }

    unsafe fn free(&self, address: u64) {
        if self.bind().and_then(|()| self.wait()).is_ok() {
            // SAFETY: it was allocated, and nothing that uses it is under way.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn available(&self) -> Result<usize, CudaError> {
        self.bind()?;
        let (free, _) = result::mem_get_info().map_err(refused)?;
        Ok(free)
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller knows the memory. The bytes are not page-locked, so that the driver has
        // copied them when it returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(refused)
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller knows the memory; the bytes are there until it is done.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }.map_err(refused)?;
        self.wait()
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller knows the memory.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }.map_err(refused)
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        [x, y, z]: [u32; 3],
        threads: u32,
        arguments: &[*mut c_void],
    ) -> Result<(), CudaError> {
        self.bind()?;
        let function = self.functions[kernel];
        let mut arguments = arguments.to_vec();
        // SAFETY: the caller knows the arguments.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (threads, 1, 1),
                0,
                self.stream,
                &mut arguments,
            )
        }
        .map_err(|error| CudaError::Refused(format!("{kernel}: {}", describe(error))))
    }

    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) -> Result<Option<Box<dyn Graph>>, CudaError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; what is captured is ended in any case.
        unsafe {
            result::stream::begin_capture(self.stream, mode).map_err(refused)?;
            let worked = work();
            let graph = result::stream::end_capture(self.stream).map_err(refused);
            worked?;
            let graph = graph?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            result::graph::destroy(graph).map_err(refused)?;
            made.map_err(refused)?;
            Ok(Some(Box::new(Recorded {
                context: Arc::clone(&self.context),
                stream: self.stream,
                executable,
            })))
        }
    }

    unsafe fn convolve(
        &self,
        convolution: Convolution,
        direction: Direction,
        operands: [u64; 3],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        self.bind()?;
        let work = Work {
            convolution,
            direction,
            accumulate,
        };
        let cudnn = self.cudnn()?;
        let workspace = cudnn.and_then(|cudnn| Some((cudnn, cudnn.prepare(work)?)));
        let Some((cudnn, bytes)) = workspace else {
            // SAFETY: the caller's.
            return unsafe { convolution.run(self, direction, operands, accumulate) };
        };
        let workspace = self.workspace(bytes)?;
        // SAFETY: the caller's, and the workspace is as large.
        unsafe { cudnn.run(work, operands, workspace) }
    }
}

/// A graph that was captured.
struct Recorded {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    executable: sys::CUgraphExec,
}

// SAFETY: as for the driver.
unsafe impl Send for Recorded {}
// SAFETY: as above.
unsafe impl Sync for Recorded {}

impl Graph for Recorded {
    unsafe fn launch(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(refused)?;
        // SAFETY: the caller knows the memory.
        unsafe { result::graph::launch(self.executable, self.stream) }.map_err(refused)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nobody uses it any more; what runs goes on.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

fn refused(error: DriverError) -> CudaError {
    CudaError::Refused(describe(error))
}

fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("error {}", error.0 as u32),
    }
}
