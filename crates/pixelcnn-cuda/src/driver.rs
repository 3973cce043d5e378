//! A GPU, by way of its driver.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

use pixelcnn_core::ranks::{Alone, Ranks};

use crate::convolution::{Convolution, Direction};
use crate::cudnn::{Cudnn, Work};
use crate::gpu::{Argument, BRANCHES, Branch, Gpu, Graph, Memory, SUMS};
use crate::kernels::NAMES;
use crate::nccl::Nccl;
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

/// Lets a GPU send bytes to itself by NCCL, as a rank alone: how many a second, in a graph. To check
/// NCCL where there is one GPU.
///
/// # Errors
/// Where CUDA or NCCL is missing or refuses, or other bytes come than were sent.
pub fn exchange_with_itself(number: usize, cache: Option<&Path>) -> Result<f64, CudaError> {
    const VALUES: usize = 1 << 24;
    const TIMES: u32 = 20;
    let gpu: Arc<dyn Gpu> = Arc::new(Driver::open(number, Precision::F32, cache)?);
    let ranks: Arc<dyn Ranks> = Arc::new(Alone);
    gpu.join(&ranks)?;
    let bytes = VALUES * size_of::<f32>();
    let (from, to) = (Memory::zeroed(&gpu, bytes)?, Memory::zeroed(&gpu, bytes)?);
    let sent: Vec<f32> = (0..VALUES).map(|n| (n % 1021) as f32).collect();
    from.write(0, &sent)?;
    let branch = gpu.branch(SUMS);
    let mut work = || {
        branch.wait(0)?;
        // SAFETY: both have so many values.
        unsafe { branch.exchange(0, (from.address(), VALUES), (to.address(), VALUES))? };
        gpu.branch(0).wait(SUMS)
    };
    let mut received = vec![0.0f32; VALUES];
    work()?;
    to.read(0, &mut received)?;
    let eagerly = received == sent;
    to.write(0, &vec![0.0f32; VALUES])?;
    let graph = gpu.record(&mut work)?;
    let graph = graph.ok_or_else(|| CudaError::Refused("nothing was recorded".into()))?;
    let begin = Instant::now();
    for _ in 0..TIMES {
        // SAFETY: the memory is there.
        unsafe { graph.launch()? };
    }
    // All of them are done once this is read.
    to.read(0, &mut received[..1])?;
    let seconds = begin.elapsed().as_secs_f64() / f64::from(TIMES);
    to.read(0, &mut received)?;
    match eagerly && received == sent {
        true => Ok(bytes as f64 / seconds),
        false => Err(CudaError::Refused(
            "NCCL: other bytes came than were sent".into(),
        )),
    }
}

/// A GPU with the kernels.
pub(crate) struct Driver {
    /// Of the device and the kernels.
    module: Arc<Module>,
    branches: [Lane; BRANCHES],
}

/// The kernels on a device.
struct Module {
    context: Arc<CudaContext>,
    module: sys::CUmodule,
    functions: HashMap<&'static str, sys::CUfunction>,
    precision: Precision,
    /// The GPUs of other ranks, where it trains with them.
    others: OnceLock<Nccl>,
}

/// A branch.
struct Lane {
    module: Arc<Module>,
    stream: sys::CUstream,
    /// Those of all branches, this one's too.
    streams: [sys::CUstream; BRANCHES],
    /// How far another branch has come, whenever this one waits for it.
    reached: sys::CUevent,
    /// Begun with the first convolution, for it is large and drawing images needs none; none where it
    /// is not to be found: the plain kernels take its place.
    cudnn: OnceLock<Result<Option<Cudnn>, CudaError>>,
    /// Memory for cuDNN: where, and how many bytes.
    workspace: Mutex<(u64, usize)>,
}

// SAFETY: the driver's handles may be used by any thread that has bound the context.
unsafe impl Send for Module {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Lane {}
// SAFETY: as above.
unsafe impl Sync for Lane {}

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
        let module = Arc::new(Module {
            context,
            module,
            functions,
            precision,
            others: OnceLock::new(),
        });
        let mut streams = [ptr::null_mut(); BRANCHES];
        for stream in &mut streams {
            let kind = result::stream::StreamKind::NonBlocking;
            *stream = result::stream::create(kind).map_err(refused)?;
        }
        let lane = |stream: sys::CUstream| {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            Ok::<_, CudaError>(Lane {
                module: Arc::clone(&module),
                stream,
                streams,
                reached: result::event::create(flags).map_err(refused)?,
                cudnn: OnceLock::new(),
                workspace: Mutex::default(),
            })
        };
        let [first, second, sums] = streams;
        let branches = [lane(first)?, lane(second)?, lane(sums)?];
        Ok(Driver { module, branches })
    }

    /// Every thread that calls the driver must know the context.
    fn bind(&self) -> Result<(), CudaError> {
        self.module.bind()
    }

    /// Of the branch on which memory is written and read.
    fn stream(&self) -> sys::CUstream {
        self.branches[0].stream
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.branches.iter().try_for_each(Lane::finish)
    }
}

impl Module {
    fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(refused)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: nobody uses it any more.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

impl Lane {
    fn cudnn(&self) -> Result<Option<&Cudnn>, CudaError> {
        let begin = || match libraries::expect_cudnn() {
            // SAFETY: the context is bound, and dropped after it.
            Ok(()) => unsafe { Cudnn::new(self.stream, self.module.precision) }.map(Some),
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
                self.finish()?;
                // SAFETY: it was allocated here, and nothing that uses it is under way.
                unsafe { result::free_sync(old) }.map_err(refused)?;
            }
            // SAFETY: memory may hold anything.
            *held = (
                unsafe { result::malloc_sync(bytes) }.map_err(refused)?,
                bytes,
            );
        }
        Ok(held.0)
    }

    /// Waits until all is done.
    fn finish(&self) -> Result<(), CudaError> {
        let others = self.module.others.get();
        let Some(others) = others.filter(|others| others.comm().is_ok()) else {
            // SAFETY: the stream lives as long as this.
            return unsafe { result::stream::synchronize(self.stream) }.map_err(refused);
        };
        // It may wait for other ranks.
        others.wait(|| {
            // SAFETY: as above.
            match unsafe { sys::cuStreamQuery(self.stream) } {
                sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
                done => done.result().map(|()| true).map_err(refused),
            }
        })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if self.module.bind().and_then(|()| self.finish()).is_err() {
            // The driver has failed before, and that was said.
            return;
        }
        self.cudnn.take();
        let held = self.workspace.get_mut();
        let (workspace, _) = *held.unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody uses them any more.
        unsafe {
            if workspace != 0 {
                let _ = result::free_sync(workspace);
            }
            let _ = result::event::destroy(self.reached);
            let _ = result::stream::destroy(self.stream);
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
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller knows the memory. The bytes are not page-locked, so that the driver has
        // copied them when it returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream()) }.map_err(refused)
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        if self.module.others.get().is_some() {
            // The copy itself would wait for them without an end.
            self.wait()?;
        }
        // SAFETY: the caller knows the memory; the bytes are there until it is done.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream()) }.map_err(refused)?;
        self.wait()
    }

    unsafe fn clear(&self, at: u64, bytes: usize) -> Result<(), CudaError> {
        self.bind()?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller knows the memory.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream()) }.map_err(refused)
    }

    fn branch(&self, number: usize) -> &dyn Branch {
        &self.branches[number]
    }

    fn join(&self, ranks: &Arc<dyn Ranks>) -> Result<(), CudaError> {
        self.bind()?;
        let others = Nccl::join(ranks)?;
        let joined = self.module.others.set(others);
        joined.map_err(|_| CudaError::Refused("it trains with other ranks already".into()))
    }

    fn record(
        &self,
        work: &mut dyn FnMut() -> Result<(), CudaError>,
    ) -> Result<Option<Box<dyn Graph>>, CudaError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; what is captured is ended in any case.
        unsafe {
            result::stream::begin_capture(self.stream(), mode).map_err(refused)?;
            let worked = work();
            let graph = result::stream::end_capture(self.stream()).map_err(refused);
            worked?;
            let graph = graph?;
            let mut executable = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
            result::graph::destroy(graph).map_err(refused)?;
            made.map_err(refused)?;
            Ok(Some(Box::new(Recorded {
                module: Arc::clone(&self.module),
                stream: self.stream(),
                executable,
            })))
        }
    }
}

impl Branch for Lane {
    fn wait(&self, other: usize) -> Result<(), CudaError> {
        self.module.bind()?;
        // SAFETY: the event and the streams live as long as the driver.
        unsafe {
            result::event::record(self.reached, self.streams[other]).map_err(refused)?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            result::stream::wait_event(self.stream, self.reached, flags).map_err(refused)
        }
    }

    unsafe fn exchange(
        &self,
        with: usize,
        sent: (u64, usize),
        received: (u64, usize),
    ) -> Result<(), CudaError> {
        self.module.bind()?;
        let others = self.module.others.get();
        let others = others.ok_or(CudaError::Refused("no other ranks have joined".into()))?;
        // SAFETY: the caller knows the memory.
        unsafe { others.exchange(self.stream, with, sent, received) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        [x, y, z]: [u32; 3],
        threads: u32,
        arguments: &[Argument],
    ) -> Result<(), CudaError> {
        self.module.bind()?;
        let function = self.module.functions[kernel];
        let mut arguments: Vec<_> = arguments.iter().map(|argument| argument.at).collect();
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

    unsafe fn convolve(
        &self,
        convolution: Convolution,
        direction: Direction,
        operands: [u64; 3],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        self.module.bind()?;
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
    module: Arc<Module>,
    stream: sys::CUstream,
    executable: sys::CUgraphExec,
}

// SAFETY: as for the driver.
unsafe impl Send for Recorded {}
// SAFETY: as above.
unsafe impl Sync for Recorded {}

impl Graph for Recorded {
    unsafe fn launch(&self) -> Result<(), CudaError> {
        self.module.bind()?;
        // SAFETY: the caller knows the memory.
        unsafe { result::graph::launch(self.executable, self.stream) }.map_err(refused)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if self.module.bind().is_ok() {
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
