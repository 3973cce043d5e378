//! A device, its memory, and lists of kernels to run on it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

use pixelcnn_core::engine::EngineError;
use pollster::block_on;
use wgpu::{
    Backend, Backends, BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer,
    BufferBinding, BufferDescriptor, BufferUsages, CommandEncoderDescriptor, ComputePassDescriptor,
    ComputePipeline, ComputePipelineDescriptor, DeviceDescriptor, DeviceType, ErrorFilter,
    Instance, InstanceDescriptor, Limits, MapMode, ShaderModuleDescriptor, ShaderSource,
};

use crate::kernels::{AT_A_TIME, Kernel, source};

/// Arrays begin at multiples of so many bytes, whatever the adapter.
const ALIGNED: u64 = 256;
/// Bytes of a buffer, where an adapter has larger ones.
const LARGEST: u64 = 1 << 31;
/// Kernels that are submitted together, at most.
const TOGETHER: usize = 128;

/// Why a device can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WgpuError {
    /// There are none.
    #[error(
        "no adapter is found: install the GPU's driver for Vulkan (Debian's mesa-vulkan-drivers for AMD and Intel)"
    )]
    NoneFound,
    /// It is the processor itself that stands in for a GPU.
    #[error("{0} is this machine's processor: the CPU's own kernels are faster")]
    IsCpu(String),
    /// There are fewer adapters.
    #[error("there is no adapter number {number}: this machine has {found}")]
    NoAdapter {
        /// What was asked for.
        number: usize,
        /// How many there are.
        found: usize,
    },
    /// The driver refuses: what it says.
    #[error("wgpu: {0}")]
    Refused(String),
    /// An array is larger than a buffer can be.
    #[error("{0} bytes in one array are more than the adapter has room for")]
    TooLarge(u64),
    /// There is no memory left.
    #[error("the adapter has no memory for {0} bytes more")]
    Memory(u64),
}

impl From<WgpuError> for EngineError {
    fn from(error: WgpuError) -> EngineError {
        EngineError::Device(error.to_string())
    }
}

/// A GPU, or what stands in for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Adapter {
    /// Its number, from 0.
    pub number: usize,
    /// What it is called.
    pub name: String,
    /// By which interface it is reached.
    pub backend: String,
    /// Its own memory in bytes, where it tells.
    pub memory: Option<usize>,
    /// What it is.
    pub kind: Kind,
}

/// What an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A GPU with memory of its own, or one of Apple's.
    Gpu,
    /// A GPU in the processor, or one that does not say what it is.
    Other,
    /// The processor itself.
    Cpu,
}

fn instance() -> Instance {
    Instance::new(InstanceDescriptor::new_without_display_handle())
}

fn found(instance: &Instance) -> Vec<wgpu::Adapter> {
    block_on(instance.enumerate_adapters(Backends::PRIMARY))
}

/// The adapters of this machine, in the order of their numbers: as they were when they were first asked for, which
/// takes a driver its time.
pub fn adapters() -> &'static [Adapter] {
    static ADAPTERS: OnceLock<Vec<Adapter>> = OnceLock::new();
    ADAPTERS.get_or_init(|| {
        let adapters = found(&instance()).into_iter().enumerate();
        adapters
            .map(|(number, adapter)| described(number, &adapter))
            .collect()
    })
}

fn described(number: usize, adapter: &wgpu::Adapter) -> Adapter {
    let info = adapter.get_info();
    let kind = match (info.device_type, info.backend) {
        (DeviceType::Cpu, _) => Kind::Cpu,
        (DeviceType::DiscreteGpu, _) | (_, Backend::Metal) => Kind::Gpu,
        _ => Kind::Other,
    };
    Adapter {
        number,
        name: info.name,
        backend: match info.backend {
            Backend::Vulkan => "Vulkan".into(),
            Backend::Metal => "Metal".into(),
            Backend::Dx12 => "DirectX 12".into(),
            other => other.to_string(),
        },
        memory: memory(adapter).filter(|_| info.device_type == DeviceType::DiscreteGpu),
        kind,
    }
}

/// Checks that an adapter is there, by its number.
///
/// # Errors
/// [`WgpuError::NoneFound`], [`WgpuError::NoAdapter`].
pub fn expect(number: usize) -> Result<(), WgpuError> {
    numbered(adapters(), number).map(drop)
}

fn numbered<T>(
    adapters: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
    number: usize,
) -> Result<T, WgpuError> {
    let mut adapters = adapters.into_iter();
    let found = adapters.len();
    adapters.nth(number).ok_or(match found {
        0 => WgpuError::NoneFound,
        _ => WgpuError::NoAdapter { number, found },
    })
}

/// The memory of an adapter, which wgpu itself does not tell, and Vulkan does.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<usize> {
    // SAFETY: the adapter that is given out is only asked for what it has.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = adapter.shared_instance().raw_instance();
    let device = adapter.raw_physical_device();
    // SAFETY: the instance and its device are there as long as the adapter.
    let properties = unsafe { instance.get_physical_device_memory_properties(device) };
    let heaps = properties.memory_heaps_as_slice().iter();
    // VK_MEMORY_HEAP_DEVICE_LOCAL_BIT.
    let own = heaps.filter(|heap| heap.flags.as_raw() & 1 > 0);
    usize::try_from(own.map(|heap| heap.size).max()?).ok()
}

#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<usize> {
    None
}

/// A device.
pub(crate) struct Gpu {
    instance: Instance,
    device: wgpu::Device,
    queue: wgpu::Queue,
    pipelines: Vec<OnceLock<ComputePipeline>>,
    /// Bytes that a buffer may have.
    pub largest: usize,
    /// What went wrong, outside of any call.
    failed: Arc<Mutex<Option<String>>>,
}

/// An array on the device, of values of four bytes.
#[derive(Debug, Clone)]
pub(crate) struct Array {
    buffer: Buffer,
    /// In bytes.
    at: u64,
    pub values: usize,
}

impl Array {
    /// So many values from one on.
    ///
    /// # Panics
    /// If it has not as many.
    pub fn part(&self, first: usize, values: usize) -> Array {
        assert!(first + values <= self.values, "they are in it");
        Array {
            buffer: self.buffer.clone(),
            at: self.at + 4 * first as u64,
            values,
        }
    }
}

/// Arrays that are filled and moved together.
pub(crate) struct Arrays {
    pub each: Vec<Array>,
    /// All of them, with the gaps between them, in as few arrays as there are buffers.
    pub whole: Vec<Array>,
}

impl Gpu {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`WgpuError::NoneFound`], [`WgpuError::NoAdapter`], [`WgpuError::Refused`].
    pub fn open(number: usize) -> Result<Gpu, WgpuError> {
        let instance = instance();
        let adapter = numbered(found(&instance), number)?;
        let has = adapter.limits();
        let largest = has.max_buffer_size.min(has.max_storage_buffer_binding_size);
        let descriptor = DeviceDescriptor {
            label: Some("pixelcnn"),
            // WebGPU's own, which an adapter below them refuses, but for the size of buffers.
            required_limits: Limits {
                max_buffer_size: has.max_buffer_size,
                max_storage_buffer_binding_size: has.max_storage_buffer_binding_size,
                ..Limits::default()
            },
            ..DeviceDescriptor::default()
        };
        let opened = block_on(adapter.request_device(&descriptor));
        let (device, queue) = opened.map_err(|error| WgpuError::Refused(error.to_string()))?;
        let failed: Arc<Mutex<Option<String>>> = Arc::default();
        let note = Arc::clone(&failed);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            let mut first = note.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error.to_string());
        }));
        let note = Arc::clone(&failed);
        device.set_device_lost_callback(move |_, text| {
            // All other errors only follow from it.
            let mut first = note.lock().unwrap_or_else(PoisonError::into_inner);
            *first = Some(format!("the GPU is lost: {text}"));
        });
        Ok(Gpu {
            instance,
            device,
            queue,
            largest: largest.min(LARGEST) as usize,
            pipelines: Kernel::ALL.iter().map(|_| OnceLock::new()).collect(),
            failed,
        })
    }

    fn pipeline(&self, kernel: &'static Kernel) -> &ComputePipeline {
        self.pipelines[kernel.number].get_or_init(|| {
            let module = self.device.create_shader_module(ShaderModuleDescriptor {
                label: Some(kernel.name),
                source: ShaderSource::Wgsl(source(kernel).into()),
            });
            self.device
                .create_compute_pipeline(&ComputePipelineDescriptor {
                    label: Some(kernel.name),
                    layout: None,
                    module: &module,
                    entry_point: Some("main"),
                    compilation_options: Default::default(),
                    cache: None,
                })
        })
    }

    /// Takes memory of zeros.
    fn buffer(&self, bytes: u64, usage: BufferUsages) -> Result<Buffer, WgpuError> {
        let scope = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        });
        match block_on(scope.pop()) {
            None => Ok(buffer),
            Some(_) => Err(WgpuError::Memory(bytes)),
        }
    }

    /// Arrays of so many values each.
    ///
    /// # Errors
    /// [`WgpuError::TooLarge`], [`WgpuError::Memory`].
    pub fn arrays(&self, values: impl IntoIterator<Item = usize>) -> Result<Arrays, WgpuError> {
        let largest = self.largest as u64;
        let mut places = Vec::new();
        // Of the buffer being filled, and of those before it.
        let (mut bytes, mut sizes) = (0, Vec::new());
        for values in values {
            let size = (4 * values.max(1) as u64).next_multiple_of(ALIGNED);
            if size > largest {
                return Err(WgpuError::TooLarge(size));
            }
            if bytes + size > largest {
                sizes.push(std::mem::take(&mut bytes));
            }
            places.push((sizes.len(), bytes, values));
            bytes += size;
        }
        sizes.extend((bytes > 0).then_some(bytes));
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
        let buffers = sizes.iter().map(|&bytes| self.buffer(bytes, usage));
        let buffers: Vec<Buffer> = buffers.collect::<Result<_, _>>()?;
        let whole = buffers.iter().zip(&sizes).map(|(buffer, &bytes)| Array {
            buffer: buffer.clone(),
            at: 0,
            values: (bytes / 4) as usize,
        });
        let each = places.into_iter().map(|(number, at, values)| Array {
            buffer: buffers[number].clone(),
            at,
            values,
        });
        Ok(Arrays {
            each: each.collect(),
            whole: whole.collect(),
        })
    }

    /// An array of so many values, in a buffer of its own.
    ///
    /// # Errors
    /// As [`Gpu::arrays`].
    pub fn array(&self, values: usize) -> Result<Array, WgpuError> {
        let array = self.arrays([values])?.each.pop();
        Ok(array.expect("one was asked for"))
    }

    /// Writes values of four bytes to the beginning of an array.
    pub fn write<T: Word>(&self, array: &Array, values: &[T]) {
        assert!(values.len() <= array.values, "it has room for them");
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.word().to_le_bytes())
            .collect();
        self.queue.write_buffer(&array.buffer, array.at, &bytes);
    }

    /// Reads the first values of an array, once all that was run is done.
    ///
    /// # Errors
    /// [`WgpuError::Refused`], also where something went wrong before.
    pub fn read<T: Word>(&self, array: &Array, values: usize) -> Result<Vec<T>, WgpuError> {
        assert!(values <= array.values, "it has so many");
        if values == 0 {
            return Ok(Vec::new());
        }
        let bytes = 4 * values as u64;
        let staging = self.buffer(bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        let mut encoder = self
            .device
            .create_command_encoder(&CommandEncoderDescriptor::default());
        encoder.copy_buffer_to_buffer(&array.buffer, array.at, &staging, 0, bytes);
        self.queue.submit([encoder.finish()]);
        let (sender, receiver) = mpsc::channel();
        staging.map_async(MapMode::Read, .., move |mapped| {
            // Whoever asked waits for it.
            let _ = sender.send(mapped);
        });
        self.wait()?;
        let refused = |error: String| WgpuError::Refused(error);
        // It has come, or never will.
        let mapped = receiver
            .try_recv()
            .map_err(|error| refused(error.to_string()))?;
        mapped.map_err(|error| refused(error.to_string()))?;
        let view = staging.get_mapped_range(..);
        let view = view.map_err(|error| refused(error.to_string()))?;
        let (words, _) = view.as_chunks::<4>();
        Ok(words
            .iter()
            .map(|word| T::of(u32::from_le_bytes(*word)))
            .collect())
    }

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// [`WgpuError::Refused`] where something went wrong.
    fn wait(&self) -> Result<(), WgpuError> {
        // The device's own `poll` panics where it is lost.
        self.instance.poll_all(true);
        self.expect_sound()
    }

    /// Waits until all that was written is there, so that it need not lie beside what comes next.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn flush(&self) -> Result<(), WgpuError> {
        self.queue.submit([]);
        self.wait()
    }

    /// As if it were unplugged.
    #[cfg(test)]
    pub fn lose(&self) {
        self.device.destroy();
    }

    /// Checks that nothing went wrong so far.
    fn expect_sound(&self) -> Result<(), WgpuError> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        match &*failed {
            None => Ok(()),
            Some(text) => Err(WgpuError::Refused(
                text.split_whitespace().collect::<Vec<_>>().join(" "),
            )),
        }
    }
}

/// A value of four bytes.
pub(crate) trait Word: Copy {
    fn word(self) -> u32;
    fn of(word: u32) -> Self;
}

impl Word for u32 {
    fn word(self) -> u32 {
        self
    }

    fn of(word: u32) -> u32 {
        word
    }
}

impl Word for f32 {
    fn word(self) -> u32 {
        self.to_bits()
    }

    fn of(word: u32) -> f32 {
        f32::from_bits(word)
    }
}

/// A kernel to run on some arrays.
struct Call {
    kernel: &'static Kernel,
    arrays: Vec<Array>,
    /// Where its arguments begin, in bytes.
    at: u64,
    groups: [u32; 3],
    /// Multiply-adds.
    cost: u64,
}

/// Kernels to run, one after the other.
#[derive(Default)]
pub(crate) struct List {
    calls: Vec<Call>,
    arguments: Vec<u8>,
}

impl List {
    /// Adds a kernel.
    pub fn push(
        &mut self,
        kernel: &'static Kernel,
        groups: [u32; 3],
        cost: u64,
        arrays: &[&Array],
        arguments: &[u32],
    ) {
        if groups.contains(&0) {
            return;
        }
        let at = self.arguments.len() as u64;
        let bytes = arguments.iter().flat_map(|argument| argument.to_le_bytes());
        self.arguments.extend(bytes);
        let end = self.arguments.len().next_multiple_of(ALIGNED as usize);
        self.arguments.resize(end, 0);
        self.calls.push(Call {
            kernel,
            arrays: arrays.iter().map(|&array| array.clone()).collect(),
            at,
            groups,
            cost,
        });
    }
}

/// A list made ready, to be run again and again.
pub(crate) struct Ready {
    calls: Vec<(ComputePipeline, BindGroup, [u32; 3])>,
    /// Where those begin that are submitted together.
    begins: Vec<usize>,
}

impl Gpu {
    /// Makes a list ready.
    pub fn ready(&self, list: &List) -> Ready {
        if list.calls.is_empty() {
            return Ready {
                calls: Vec::new(),
                begins: Vec::new(),
            };
        }
        let arguments = self.device.create_buffer(&BufferDescriptor {
            label: None,
            size: list.arguments.len() as u64,
            usage: BufferUsages::UNIFORM | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.queue.write_buffer(&arguments, 0, &list.arguments);
        let bound = |buffer, offset, bytes: u64| {
            BindingResource::Buffer(BufferBinding {
                buffer,
                offset,
                size: bytes.try_into().ok(),
            })
        };
        let mut layouts = HashMap::new();
        let calls = list.calls.iter().map(|call| {
            let pipeline = self.pipeline(call.kernel);
            let layout = layouts
                .entry(call.kernel.number)
                .or_insert_with(|| pipeline.get_bind_group_layout(0));
            let arrays = call.arrays.iter().enumerate();
            let entries = arrays.map(|(number, array)| BindGroupEntry {
                binding: number as u32 + 1,
                resource: bound(&array.buffer, array.at, 4 * array.values.max(1) as u64),
            });
            let own = BindGroupEntry {
                binding: 0,
                resource: bound(&arguments, call.at, ALIGNED),
            };
            let entries: Vec<BindGroupEntry> = [own].into_iter().chain(entries).collect();
            let group = self.device.create_bind_group(&BindGroupDescriptor {
                label: Some(call.kernel.name),
                layout,
                entries: &entries,
            });
            (pipeline.clone(), group, call.groups)
        });
        let (mut begins, mut together) = (vec![0], 0);
        for (number, call) in list.calls.iter().enumerate() {
            let begun = number - begins.last().unwrap_or(&0);
            if begun == TOGETHER || begun > 0 && together + call.cost > AT_A_TIME {
                begins.push(number);
                together = 0;
            }
            together += call.cost;
        }
        Ready {
            calls: calls.collect(),
            begins,
        }
    }

    /// Runs a list.
    pub fn run(&self, ready: &Ready) {
        let ends = ready
            .begins
            .iter()
            .skip(1)
            .copied()
            .chain([ready.calls.len()]);
        for (begin, end) in ready.begins.iter().zip(ends) {
            let mut encoder = self
                .device
                .create_command_encoder(&CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&ComputePassDescriptor::default());
            for (pipeline, group, [x, y, z]) in &ready.calls[*begin..end] {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, group, &[]);
                pass.dispatch_workgroups(*x, *y, *z);
            }
            drop(pass);
            self.queue.submit([encoder.finish()]);
        }
    }
}
