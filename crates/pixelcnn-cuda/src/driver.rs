//! A GPU, by way of its driver.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use crate::gpu::Gpu;
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
    let count = match CudaContext::device_count() {
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        count => count.map_err(refused)?,
    };
    let device = |number: usize| {
        let context = CudaContext::new(number)?;
        Ok(Device {
            number,
            name: context.name()?,
            memory: context.total_mem()?,
            capability: context.compute_capability()?,
        })
    };
    let devices = (0..count.unsigned_abs() as usize).map(device);
    devices.collect::<Result<_, _>>().map_err(refused)
}

/// Checks that a GPU is there, and all that it needs.
///
/// # Errors
/// [`CudaError::Missing`] and [`CudaError::NoDevice`].
pub fn expect(number: usize) -> Result<(), CudaError> {
    libraries::load()?;
    let found = devices()?.len();
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
        Ok(Driver {
            context,
            stream: stream.map_err(refused)?,
            module,
            functions,
        })
    }

    /// Every thread that calls the driver must know the context.
    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(refused)
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
        // SAFETY: nobody uses them any more.
        unsafe {
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
