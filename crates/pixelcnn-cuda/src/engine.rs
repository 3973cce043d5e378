//! The engine: the plan, carried out on a GPU.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pixelcnn_core::ModelConfig;
use pixelcnn_core::cpu::Cpu;
use pixelcnn_core::engine::{Batch, Engine, EngineError, State, expect_parameters};
use pixelcnn_core::kernels::adam::{Adam, Rates};
use pixelcnn_core::kernels::pointwise::{Dropout, Dropped};
use pixelcnn_core::kernels::weight_norm::WeightNorm;
use pixelcnn_core::network::{GatedResnet, Layer, LayerKind, Layout, Parameter};
use pixelcnn_core::plan::{Backward, Gradient, Operation, Plan};

use crate::convolution::{Convolution, Direction};
use crate::driver::Driver;
use crate::gpu::{Gpu, Graph, Memory};
use crate::kernels::{self, Added, Address, Biases, Channels, Geometry, Norm};
use crate::{CudaError, Precision};

/// Bytes of a value.
const VALUE: usize = size_of::<f32>();
/// Arrays begin at multiples of so many values: a cache line of the GPU.
const ALIGNED: usize = 32;
/// Images that are evaluated at a time, at most: enough to fill any GPU.
const SIDE_BY_SIDE: usize = 256;

/// The engine on a GPU.
pub struct Cuda {
    gpu: Arc<dyn Gpu>,
    config: ModelConfig,
    layout: Layout,
    training: Plan,
    evaluation: Plan,
    /// Where each parameter begins among all, in values.
    starts: Vec<usize>,
    /// Values of all parameters together, gaps included.
    values: usize,
    norms: Norms,
    state: Option<Trained>,
    /// Whether the gradients of a batch are in the state's memory.
    has_gradients: bool,
    /// The parameters to evaluate with.
    loaded: Option<Weights>,
    maps: Mutex<Option<Maps>>,
    /// The last step, to be taken again.
    step: Mutex<Step>,
    /// Numbers for maps and states, no two of which are the same.
    next: AtomicU64,
}

/// A step as one graph.
#[derive(Default)]
struct Step {
    /// What it was taken with.
    taken: Option<Taken>,
    graph: Option<Box<dyn Graph>>,
}

/// What a graph of a step hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Taken {
    state: u64,
    maps: u64,
    images: usize,
    dropout: bool,
}

/// The weight-normalised layers, for the kernels.
struct Norms {
    table: Memory,
    layers: u32,
    /// Outputs of all layers.
    outputs: usize,
    /// Outputs of the widest layer.
    widest: i64,
    /// Values of the largest V.
    largest: i64,
}

/// Parameters with the weights that they make.
struct Weights {
    /// All parameters, at their starts.
    parameters: Memory,
    /// The weights, each where its V begins.
    made: Memory,
    /// A factor for each output of each layer.
    scales: Memory,
}

/// The state of training.
struct Trained {
    number: u64,
    weights: Weights,
    average: Memory,
    first: Memory,
    second: Memory,
    /// By the parameters.
    gradients: Memory,
    /// By the weights.
    by_weights: Memory,
    /// For each output of each layer, twice.
    factors: Memory,
    /// What a step is given: the rates of Adam, then each block's dropout.
    step: Memory,
    /// Raised where something is not a number.
    wrong: Memory,
}

/// Memory for the maps of some images.
struct Maps {
    number: u64,
    images: usize,
    training: bool,
    /// Where each slot begins in `memory`, in values.
    slots: Vec<usize>,
    /// Where the memory of one operation begins.
    scratch: usize,
    memory: Memory,
    /// u8 \[images, H, W, C\].
    levels: Memory,
    /// The images' classes.
    labels: Memory,
    /// Nats of every pixel.
    nats: Memory,
    /// Nats of every image, in double precision.
    sums: Memory,
    /// Of parts of a map, for the gradient by a bias, in double precision.
    partial: Memory,
}

impl Maps {
    fn fit(&self, plan: &Plan, images: usize) -> bool {
        self.images >= images && self.training == plan.d_logits.is_some()
    }
}

impl From<CudaError> for EngineError {
    fn from(error: CudaError) -> EngineError {
        EngineError::Device(error.to_string())
    }
}

impl Cuda {
    /// An engine for a model on a device by its number. Compiled kernels are kept in the folder
    /// `cache`.
    ///
    /// # Errors
    /// [`EngineError::Config`], and [`EngineError::Device`] where CUDA is missing or refuses.
    pub fn new(
        config: &ModelConfig,
        device: usize,
        precision: Precision,
        cache: Option<&Path>,
    ) -> Result<Cuda, EngineError> {
        config.validate()?;
        Cuda::on(Arc::new(Driver::open(device, precision, cache)?), config)
    }

    /// An engine on whatever is a GPU.
    pub(crate) fn on(gpu: Arc<dyn Gpu>, config: &ModelConfig) -> Result<Cuda, EngineError> {
        config.validate()?;
        let layout = Layout::new(config);
        let mut values = 0;
        let starts = layout.parameters.iter().map(|parameter| {
            let start = values;
            values += parameter.len().next_multiple_of(ALIGNED);
            start
        });
        let starts: Vec<usize> = starts.collect();
        let evaluation = Plan::evaluation(config);
        let norms = Norms::new(&gpu, &layout, &evaluation, &starts)?;
        Ok(Cuda {
            config: config.clone(),
            training: Plan::training(config),
            evaluation,
            gpu,
            layout,
            starts,
            values,
            norms,
            state: None,
            has_gradients: false,
            loaded: None,
            maps: Mutex::new(None),
            step: Mutex::default(),
            next: AtomicU64::new(0),
        })
    }

    fn zeros(&self, values: usize) -> Result<Memory, CudaError> {
        Memory::zeroed(&self.gpu, values * VALUE)
    }

    /// Copies arrays of all parameters to the GPU.
    fn upload(&self, arrays: &[Vec<f32>]) -> Result<Memory, EngineError> {
        expect_parameters(&self.layout, arrays)?;
        let memory = self.zeros(self.values)?;
        for (array, start) in arrays.iter().zip(&self.starts) {
            memory.write(start * VALUE, array)?;
        }
        Ok(memory)
    }

    /// And back.
    fn download(&self, memory: &Memory) -> Result<Vec<Vec<f32>>, EngineError> {
        let arrays = self.layout.parameters.iter().zip(&self.starts);
        let read = |(parameter, start): (&Parameter, &usize)| {
            let mut array = vec![0.0; parameter.len()];
            memory.read(start * VALUE, &mut array)?;
            Ok(array)
        };
        arrays.map(read).collect()
    }

    fn weights(&self, parameters: &[Vec<f32>]) -> Result<Weights, EngineError> {
        Ok(Weights {
            parameters: self.upload(parameters)?,
            made: self.zeros(self.values)?,
            scales: self.zeros(self.norms.outputs)?,
        })
    }

    /// Makes the weights of the parameters.
    fn make(&self, weights: &Weights) -> Result<(), CudaError> {
        let (parameters, scales) = (weights.parameters.address(), weights.scales.address());
        let Norms {
            ref table,
            layers,
            widest,
            largest,
            ..
        } = self.norms;
        let (gpu, norms) = (&*self.gpu, table.address());
        // SAFETY: the table says where in memory of `values` the layers' arrays are, and there is a
        // scale for each output.
        unsafe {
            kernels::scales(gpu, parameters, scales, norms, layers, widest)?;
            let made = weights.made.address();
            kernels::weights(gpu, parameters, scales, made, norms, layers, largest)
        }
    }

    /// Values of scratch memory that the blocks of a plan need for each image.
    fn scratch(&self, plan: &Plan) -> usize {
        let outputs = |n| self.config.nonlinearity.outputs(n);
        let blocks = plan.forward.iter().map(|operation| match operation {
            Operation::GatedResnet { x, a, .. } => {
                outputs(plan.buffers[*x].values() * a.len().max(1))
            }
            _ => 0,
        });
        blocks.max().unwrap_or(0)
    }

    /// Bytes of the sums of parts of so many pixels, for the layer with most outputs.
    fn partial(&self, pixels: usize) -> usize {
        let outputs = self.layout.layers.iter().map(|layer| layer.outputs);
        let widest = outputs.max().unwrap_or(0);
        kernels::chunks(pixels as i64) as usize * widest * size_of::<f64>()
    }

    /// Bytes for each image.
    fn bytes_per_image(&self, plan: &Plan) -> usize {
        let pixels = self.config.height * self.config.width;
        let values = plan.values() + self.scratch(plan) + pixels;
        let sums = size_of::<u32>() + size_of::<f64>() + self.partial(pixels);
        values * VALUE + self.config.dims() + sums
    }

    /// Memory for the maps of so many images.
    fn maps(
        &self,
        plan: &Plan,
        images: usize,
    ) -> Result<MutexGuard<'_, Option<Maps>>, EngineError> {
        let mut held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let training = plan.d_logits.is_some();
        if held.as_ref().is_some_and(|maps| maps.fit(plan, images)) {
            return Ok(held);
        }
        // Before it is taken anew.
        *held = None;
        let mut values = 0;
        let mut take = |size: usize| {
            let start = values;
            values += (size * images).next_multiple_of(ALIGNED);
            start
        };
        let slots = plan.slots.iter().map(|size| take(*size)).collect();
        let scratch = take(self.scratch(plan));
        let pixels = images * self.config.height * self.config.width;
        *held = Some(Maps {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            images,
            training,
            slots,
            scratch,
            memory: self.zeros(values)?,
            levels: Memory::zeroed(&self.gpu, images * self.config.dims())?,
            labels: Memory::zeroed(&self.gpu, images * size_of::<u32>())?,
            nats: self.zeros(pixels)?,
            sums: Memory::zeroed(&self.gpu, images * size_of::<f64>())?,
            partial: Memory::zeroed(&self.gpu, self.partial(pixels))?,
        });
        Ok(held)
    }

    /// Whether there is memory held for so many images.
    fn has_room(&self, plan: &Plan, images: usize) -> bool {
        let held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().is_some_and(|maps| maps.fit(plan, images))
    }

    /// How many images there is memory for, what is held already counted.
    fn room(&self, plan: &Plan) -> Result<usize, EngineError> {
        let held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let held = held.as_ref().map_or(0, |maps| {
            let plan = if maps.training {
                &self.training
            } else {
                &self.evaluation
            };
            maps.images * self.bytes_per_image(plan)
        });
        // A little is lost between allocations.
        let available = (self.gpu.available()? + held) / 16 * 15;
        // A state that is not there yet takes its part.
        let state = match (plan.d_logits, &self.state) {
            (Some(_), None) => 7 * self.values * VALUE,
            _ => 0,
        };
        let available = available.saturating_sub(state);
        // Kernels number a map's values with 31 bits.
        let buffers = plan.buffers.iter().map(|buffer| buffer.values());
        let largest = buffers.max().unwrap_or(0).max(self.scratch(plan));
        let numbered = i32::MAX as usize / largest.max(1);
        Ok((available / self.bytes_per_image(plan)).min(numbered))
    }

    /// Carries the forward pass of an evaluation out over a few images at a time. `take` is given
    /// each, after every operation, with the images' numbers.
    fn evaluate(
        &self,
        batch: Batch,
        mut take: impl FnMut(&Pass, &Operation, std::ops::Range<usize>) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let count = batch.len(&self.config)?;
        let loaded = self.loaded.as_ref();
        let weights = loaded.ok_or(EngineError::NotLoaded("weights"))?;
        let plan = &self.evaluation;
        if count == 0 {
            return Ok(());
        }
        let most = self.room(plan)?.min(SIDE_BY_SIDE);
        if most == 0 {
            return Err(EngineError::Memory { images: 1, room: 0 });
        }
        for first in (0..count).step_by(most) {
            let images = first..count.min(first + most);
            let held = self.maps(plan, images.len())?;
            let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
            let pass = Pass {
                engine: self,
                plan,
                maps,
                images: images.len(),
                weights,
                dropout: None,
            };
            pass.write(batch, images.start)?;
            for operation in &plan.forward {
                pass.operation(operation)?;
                take(&pass, operation, images.clone())?;
            }
        }
        Ok(())
    }
}

impl Norms {
    fn new(
        gpu: &Arc<dyn Gpu>,
        layout: &Layout,
        plan: &Plan,
        starts: &[usize],
    ) -> Result<Norms, CudaError> {
        let long = |n: usize| n as i64;
        // Only the blocks' convolutions take maps.
        let in_blocks: HashSet<usize> = plan
            .forward
            .iter()
            .filter_map(|operation| match operation {
                Operation::GatedResnet { block, .. } => Some(block),
                _ => None,
            })
            .flat_map(|block| {
                let nin = block.nin.as_ref();
                [&block.conv_1, &block.conv_2].into_iter().chain(nin)
            })
            .map(|layer| layer.parameter)
            .collect();
        let mut outputs = 0;
        let norms = layout.layers.iter().map(|layer| {
            let norm = WeightNorm::of(layer);
            let in_block = in_blocks.contains(&layer.parameter);
            let first = outputs;
            outputs += norm.outputs;
            Norm {
                v: long(starts[layer.parameter]),
                g: long(starts[layer.parameter + 1]),
                first: long(first),
                wide: (!in_block).into(),
                transposed: (layer.kind == LayerKind::Deconv).into(),
                rows: long(norm.rows),
                outputs: long(norm.outputs),
                inner: long(norm.inner),
                floor: norm.floor,
            }
        });
        let norms: Vec<Norm> = norms.collect();
        let table = Memory::zeroed(gpu, norms.len() * size_of::<Norm>())?;
        table.write(0, &norms)?;
        let largest = norms
            .iter()
            .map(|norm| norm.rows * norm.outputs * norm.inner);
        Ok(Norms {
            table,
            layers: norms.len() as u32,
            outputs,
            widest: norms.iter().map(|norm| norm.outputs).max().unwrap_or(0),
            largest: largest.max().unwrap_or(0),
        })
    }
}

/// A plan being carried out on some images.
struct Pass<'a> {
    engine: &'a Cuda,
    plan: &'a Plan,
    maps: &'a Maps,
    images: usize,
    weights: &'a Weights,
    /// Where the blocks' dropout is.
    dropout: Option<Address>,
}

impl Pass<'_> {
    fn gpu(&self) -> &dyn Gpu {
        &*self.engine.gpu
    }

    /// Writes images of a batch, from one on, and their classes.
    fn write(&self, batch: Batch, first: usize) -> Result<(), CudaError> {
        let dims = self.engine.config.dims();
        let levels = &batch.images[first * dims..(first + self.images) * dims];
        self.maps.levels.write(0, levels)?;
        if self.engine.config.nr_classes > 0 {
            let labels = &batch.labels[first..first + self.images];
            self.maps.labels.write(0, labels)?;
        }
        Ok(())
    }

    /// Where a buffer is.
    fn at(&self, buffer: usize) -> Address {
        let start = self.maps.slots[self.plan.buffers[buffer].slot];
        self.maps.memory.address() + (start * VALUE) as u64
    }

    fn scratch(&self) -> Address {
        self.maps.memory.address() + (self.maps.scratch * VALUE) as u64
    }

    /// Values of a buffer.
    fn len(&self, buffer: usize) -> usize {
        self.images * self.plan.buffers[buffer].values()
    }

    fn values(&self, buffer: usize) -> i64 {
        self.len(buffer) as i64
    }

    /// What a buffer holds.
    fn read(&self, buffer: usize) -> Result<Vec<f32>, CudaError> {
        let mut values = vec![0.0; self.len(buffer)];
        let start = self.maps.slots[self.plan.buffers[buffer].slot];
        self.maps.memory.read(start * VALUE, &mut values)?;
        Ok(values)
    }

    /// \[images, rows, columns\] of a buffer.
    fn size(&self, buffer: usize) -> [usize; 3] {
        let [h, w] = self.plan.buffers[buffer].size;
        [self.images, h, w]
    }

    fn pixels_per_image(&self, buffer: usize) -> i64 {
        let [h, w] = self.plan.buffers[buffer].size;
        (h * w) as i64
    }

    /// Where a parameter is in some memory of all.
    fn parameter(&self, memory: &Memory, number: usize) -> Address {
        memory.address() + (self.engine.starts[number] * VALUE) as u64
    }

    fn bias(&self, layer: &Layer) -> Address {
        self.parameter(&self.weights.parameters, layer.parameter + 2)
    }

    /// What the layers before a block's second nonlinearity add to it.
    fn biases(&self, block: &GatedResnet) -> Biases {
        let nin = block.nin.as_ref();
        Biases {
            first: self.bias(&block.conv_1),
            second: nin.map_or(0, |nin| self.bias(nin)),
        }
    }

    /// What a block adds to its second convolution's output.
    fn added(&self, block: &GatedResnet) -> Added {
        let hw = block.conditional;
        Added {
            bias: self.bias(&block.conv_2),
            hw: hw.map_or(0, |hw| self.parameter(&self.weights.parameters, hw)),
            labels: self.maps.labels.address(),
        }
    }

    fn dropout_of(&self, block: &GatedResnet) -> Address {
        let at = |first: Address| first + (block.number * size_of::<kernels::Drop>()) as u64;
        self.dropout.map_or(0, at)
    }

    /// Of a map with a block's filters, which is part of a concatenation.
    fn channels(&self, block: &GatedResnet, part: usize, parts: usize) -> Channels {
        let count = block.conv_1.outputs;
        Channels {
            count: count as i32,
            first: (part * count) as i32,
            of: (parts * count) as i32,
        }
    }

    /// Writes f of some maps of the residual stream, as one, to the scratch memory.
    fn bend(&self, block: &GatedResnet, maps: &[usize]) -> Result<Address, CudaError> {
        let f = kernels::number(self.engine.config.nonlinearity);
        let (y, none) = (self.scratch(), Biases::default());
        for (part, &map) in maps.iter().enumerate() {
            let channels = self.channels(block, part, maps.len());
            let (x, values) = (self.at(map), self.values(map));
            // SAFETY: the maps have the block's filters; the scratch memory has room for f of the
            // widest concatenation.
            unsafe { kernels::bend_wide(self.gpu(), x, none, 0, y, values, channels, f)? };
        }
        Ok(y)
    }

    /// Writes f of what comes before a block's second nonlinearity, with dropout.
    fn bend_inner(&self, block: &GatedResnet, c1: usize) -> Result<Address, CudaError> {
        let f = kernels::number(self.engine.config.nonlinearity);
        let (x, y, values) = (self.at(c1), self.scratch(), self.values(c1));
        let (biases, drop) = (self.biases(block), self.dropout_of(block));
        let channels = self.channels(block, 0, 1);
        // SAFETY: as above.
        unsafe { kernels::bend_map(self.gpu(), x, biases, drop, y, values, channels, f)? };
        Ok(y)
    }

    /// A layer's weight.
    fn weight(&self, layer: &Layer) -> Address {
        self.parameter(&self.weights.made, layer.parameter)
    }

    /// `to` = a layer of `from` without its bias, or `to` += it. `wide` is whether they are of the
    /// residual stream.
    ///
    /// # Safety
    /// `from` and `to` are maps of the layer's sizes.
    unsafe fn layer(
        &self,
        layer: &Layer,
        wide: bool,
        size: [usize; 3],
        [from, to]: [Address; 2],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let convolution = Convolution {
            geometry: Geometry::of(layer, size),
            wide,
        };
        let weight = self.weight(layer);
        let (direction, operands) = match layer.kind {
            LayerKind::Deconv => (Direction::Up, [to, weight, from]),
            LayerKind::Conv | LayerKind::Dense => (Direction::Down, [from, weight, to]),
        };
        // SAFETY: the weight is the layer's; the caller knows the maps.
        unsafe {
            self.gpu()
                .convolve(convolution, direction, operands, accumulate)
        }
    }

    /// The gradient by a layer's input, given that by its output.
    ///
    /// # Safety
    /// `d_to` and `d_from` are maps of the layer's sizes.
    unsafe fn layer_backward(
        &self,
        layer: &Layer,
        wide: bool,
        size: [usize; 3],
        [d_to, d_from]: [Address; 2],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let convolution = Convolution {
            geometry: Geometry::of(layer, size),
            wide,
        };
        let weight = self.weight(layer);
        let (direction, operands) = match layer.kind {
            LayerKind::Deconv => (Direction::Down, [d_to, weight, d_from]),
            LayerKind::Conv | LayerKind::Dense => (Direction::Up, [d_from, weight, d_to]),
        };
        // SAFETY: the weight is the layer's; the caller knows the maps.
        unsafe {
            self.gpu()
                .convolve(convolution, direction, operands, accumulate)
        }
    }

    /// The gradients by a layer's weight and bias, given that by its output.
    ///
    /// # Safety
    /// `from` and `d_to` are maps of the layer's sizes.
    unsafe fn layer_gradients(
        &self,
        state: &Trained,
        layer: &Layer,
        wide: bool,
        size: [usize; 3],
        [from, d_to]: [Address; 2],
    ) -> Result<(), CudaError> {
        let geometry = Geometry::of(layer, size);
        let convolution = Convolution { geometry, wide };
        let d_weight = self.parameter(&state.by_weights, layer.parameter);
        let d_bias = self.parameter(&state.gradients, layer.parameter + 2);
        let (fine, coarse, [h, w, channels]) = match layer.kind {
            LayerKind::Deconv => (d_to, from, geometry.fine),
            LayerKind::Conv | LayerKind::Dense => (from, d_to, geometry.coarse),
        };
        let pixels = i64::from(geometry.images) * i64::from(h) * i64::from(w);
        let sum = match wide {
            true => kernels::sum_pixels_wide,
            false => kernels::sum_pixels_map,
        };
        let (gpu, partial) = (self.gpu(), self.maps.partial.address());
        let chunks = kernels::chunks(pixels) as i32;
        // SAFETY: the gradients are the layer's, and there are sums for the chunks of the largest and
        // widest map; the caller knows the maps.
        unsafe {
            let operands = [fine, d_weight, coarse];
            gpu.convolve(convolution, Direction::ByWeight, operands, false)?;
            sum(gpu, d_to, partial, pixels, channels)?;
            kernels::sum_chunks(gpu, partial, d_bias, chunks, channels)
        }
    }

    /// One operation of the forward pass.
    fn operation(&self, operation: &Operation) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let to = operation.to();
        // SAFETY: the plan's buffers have memory for their values, and the operations are on buffers
        // of the sizes that their layers take.
        unsafe {
            match operation {
                Operation::Images { .. } => {
                    let pixels = self.images as i64 * self.pixels_per_image(to);
                    let (levels, channels) = (
                        self.maps.levels.address(),
                        self.engine.config.channels as i32,
                    );
                    kernels::images(gpu, levels, self.at(to), pixels, channels)
                }
                Operation::Layer { layer, from, .. } => {
                    let (size, ends) = (self.size(*from), [self.at(*from), self.at(to)]);
                    self.layer(layer, true, size, ends, false)?;
                    let (values, channels) = (self.values(to), layer.outputs as i32);
                    kernels::add_bias(gpu, self.bias(layer), self.at(to), values, channels)
                }
                Operation::GatedResnet {
                    block,
                    x,
                    a,
                    c1,
                    c2,
                    ..
                } => {
                    let size = self.size(*x);
                    let f_x = self.bend(block, &[*x])?;
                    self.layer(&block.conv_1, false, size, [f_x, self.at(*c1)], false)?;
                    if let Some(nin) = &block.nin {
                        let f_a = self.bend(block, a)?;
                        self.layer(nin, false, size, [f_a, self.at(*c1)], true)?;
                    }
                    let f_c1 = self.bend_inner(block, *c1)?;
                    self.layer(&block.conv_2, false, size, [f_c1, self.at(*c2)], false)?;
                    kernels::gate(
                        gpu,
                        self.at(*x),
                        self.at(*c2),
                        self.added(block),
                        self.at(to),
                        self.values(to),
                        block.conv_1.outputs as i32,
                        self.pixels_per_image(to) as i32,
                    )
                }
                &Operation::Shift { by, from, .. } => {
                    let [_, h, w] = self.size(to).map(|n| n as i32);
                    let [down, right] = by.map(|n| n as i32);
                    let channels = self.plan.buffers[to].channels as i32;
                    let (from, to, values) = (self.at(from), self.at(to), self.values(to));
                    kernels::shift(gpu, from, to, values, h, w, channels, down, right)
                }
                Operation::Add { from, .. } => {
                    kernels::add(gpu, self.at(*from), self.at(to), self.values(to))
                }
                Operation::Elu { from, .. } => {
                    kernels::elu(gpu, self.at(*from), self.at(to), self.values(to))
                }
            }
        }
    }

    /// Nats of every pixel, and the gradient by the logits where the plan has one.
    fn likelihood(&self) -> Result<(), CudaError> {
        let pixels = self.pixels_per_image(self.plan.logits);
        let config = &self.engine.config;
        let gradient = self.plan.d_logits.map_or(0, |buffer| self.at(buffer));
        // SAFETY: the maps' memory is that of so many images.
        unsafe {
            kernels::likelihood(
                self.gpu(),
                self.maps.levels.address(),
                self.at(self.plan.logits),
                self.maps.nats.address(),
                gradient,
                self.images as i64 * pixels,
                config.channels as i32,
                config.nr_logistic_mix as i32,
            )?;
            let (nats, sums) = (self.maps.nats.address(), self.maps.sums.address());
            kernels::sum_images(self.gpu(), nats, sums, pixels, self.images as i32)
        }
    }

    /// All of a step but the update: the gradients by the parameters.
    fn gradients(&self, state: &Trained) -> Result<(), CudaError> {
        self.engine.make(&state.weights)?;
        for operation in &self.plan.forward {
            self.operation(operation)?;
        }
        self.likelihood()?;
        for step in &self.plan.backward {
            self.backward_step(state, step)?;
        }
        self.engine.by_parameters(state)
    }

    /// Raises the flag where the loss or its gradient is not a number.
    fn find_wrong(&self, state: &Trained) -> Result<(), CudaError> {
        let (gpu, wrong) = (self.gpu(), state.wrong.address());
        let pixels = self.images as i64 * self.pixels_per_image(self.plan.logits);
        let (nats, gradients) = (self.maps.nats.address(), state.gradients.address());
        // SAFETY: there are nats for each pixel, and the gradients are an array of all parameters.
        unsafe {
            kernels::find_wrong(gpu, nats, pixels, wrong)?;
            kernels::find_wrong(gpu, gradients, self.engine.values as i64, wrong)
        }
    }

    /// Nats of every image.
    fn nats(&self) -> Result<Vec<f64>, CudaError> {
        let mut nats = vec![0.0; self.images];
        self.maps.sums.read(0, &mut nats)?;
        Ok(nats)
    }

    /// One operation of the backward pass.
    fn backward_step(&self, state: &Trained, step: &Backward) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let dy = self.at(step.output);
        let operation = &self.plan.forward[step.operation];
        // SAFETY: as in the forward pass; gradients are shaped as what they are by.
        unsafe {
            match operation {
                Operation::Layer { layer, from, .. } => {
                    let size = self.size(*from);
                    self.layer_gradients(state, layer, true, size, [self.at(*from), dy])?;
                    for Gradient { buffer, accumulate } in &step.inputs {
                        let ends = [dy, self.at(*buffer)];
                        self.layer_backward(layer, true, size, ends, *accumulate)?;
                    }
                }
                Operation::GatedResnet { .. } => self.backward_block(state, step)?,
                &Operation::Shift { by, .. } => {
                    for &Gradient { buffer, accumulate } in &step.inputs {
                        let [_, h, w] = self.size(buffer).map(|n| n as i32);
                        let [down, right] = by.map(|n| n as i32);
                        let channels = self.plan.buffers[buffer].channels as i32;
                        let (dx, values) = (self.at(buffer), self.values(buffer));
                        let accumulate = accumulate.into();
                        kernels::shift_backward(
                            gpu, dy, dx, values, h, w, channels, down, right, accumulate,
                        )?;
                    }
                }
                Operation::Elu { from, .. } => {
                    for &Gradient { buffer, accumulate } in &step.inputs {
                        let (x, dx, values) =
                            (self.at(*from), self.at(buffer), self.values(buffer));
                        kernels::elu_backward(gpu, x, dy, dx, values, accumulate.into())?;
                    }
                }
                Operation::Images { .. } | Operation::Add { .. } => {}
            }
        }
        Ok(())
    }

    /// # Safety
    /// The step is a block's.
    unsafe fn backward_block(&self, state: &Trained, step: &Backward) -> Result<(), CudaError> {
        let &Operation::GatedResnet {
            ref block,
            x,
            ref a,
            c1,
            c2,
            ..
        } = &self.plan.forward[step.operation]
        else {
            unreachable!("the caller looked");
        };
        let [by_x, ref by_a @ ..] = step.inputs[..] else {
            unreachable!("a block has a gradient by x");
        };
        let gpu = self.gpu();
        let f = kernels::number(self.engine.config.nonlinearity);
        let (size, d_out) = (self.size(x), self.at(step.output));
        let pixels = self.pixels_per_image(x);
        // In the same memory as c2, and then as the gradient by c1: what was there is not needed.
        let (d_c2, d_c1) = (self.at(c2), self.at(c2));
        // SAFETY: the block's maps are of `size`, with its channels.
        unsafe {
            let (values, filters) = (self.values(x), block.conv_1.outputs as i32);
            let added = self.added(block);
            kernels::gate_backward(gpu, d_out, added, d_c2, values, filters, pixels as i32)?;
            if let Some(hw) = block.conditional {
                let d_hw = self.parameter(&state.gradients, hw);
                let (classes, images) = (self.engine.config.nr_classes as i32, self.images as i32);
                let (labels, channels) = (added.labels, block.conv_2.outputs as i32);
                kernels::class_backward(
                    gpu, d_c2, labels, d_hw, classes, channels, images, pixels,
                )?;
            }
            // Each f(x) and then the gradient by it, one after the other in the same memory.
            let f_c1 = self.bend_inner(block, c1)?;
            self.layer_gradients(state, &block.conv_2, false, size, [f_c1, d_c2])?;
            self.layer_backward(&block.conv_2, false, size, [d_c2, f_c1], false)?;
            let whole = self.channels(block, 0, 1);
            let (biases, drop, values) =
                (self.biases(block), self.dropout_of(block), self.values(c1));
            let c1 = self.at(c1);
            kernels::bend_map_backward(gpu, c1, biases, drop, f_c1, d_c1, values, whole, f, 0)?;

            let none = Biases::default();
            if let Some(nin) = &block.nin {
                let f_a = self.bend(block, a)?;
                self.layer_gradients(state, nin, false, size, [f_a, d_c1])?;
                self.layer_backward(nin, false, size, [d_c1, f_a], false)?;
                for (part, (&a_, gradient)) in a.iter().zip(by_a).enumerate() {
                    let channels = self.channels(block, part, a.len());
                    let (from, to) = (self.at(a_), self.at(gradient.buffer));
                    let (values, accumulate) = (self.values(a_), gradient.accumulate.into());
                    kernels::bend_wide_backward(
                        gpu, from, none, 0, f_a, to, values, channels, f, accumulate,
                    )?;
                }
            }
            let f_x = self.bend(block, &[x])?;
            self.layer_gradients(state, &block.conv_1, false, size, [f_x, d_c1])?;
            self.layer_backward(&block.conv_1, false, size, [d_c1, f_x], false)?;
            // The residual connection hands the output's gradient on as it is.
            let (x_, values) = (self.at(x), self.values(x));
            kernels::bend_wide_backward(gpu, x_, none, 0, f_x, d_out, values, whole, f, 1)?;
            if by_x.buffer != step.output {
                kernels::add(gpu, d_out, self.at(by_x.buffer), self.values(x))?;
            }
        }
        Ok(())
    }
}

impl Engine for Cuda {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// On the CPU, so that a seed means the same on every device: it is one forward pass.
    fn initialise(
        &self,
        parameters: &mut [Vec<f32>],
        batch: Batch,
        dropout: Option<Dropout>,
    ) -> Result<Vec<f32>, EngineError> {
        Cpu::new(&self.config)?.initialise(parameters, batch, dropout)
    }

    fn expect_room(&self, images: usize) -> Result<(), EngineError> {
        if self.has_room(&self.training, images) {
            return Ok(());
        }
        let room = self.room(&self.training)?;
        match images <= room {
            true => Ok(()),
            false => Err(EngineError::Memory { images, room }),
        }
    }

    fn load(&mut self, state: State) -> Result<(), EngineError> {
        for arrays in [
            &state.parameters,
            &state.average,
            &state.first,
            &state.second,
        ] {
            expect_parameters(&self.layout, arrays)?;
        }
        let drops = self.training.forward.len() * size_of::<kernels::Drop>();
        self.has_gradients = false;
        // Before memory for the new one is taken.
        (self.state, self.loaded) = (None, None);
        self.state = Some(Trained {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            weights: self.weights(&state.parameters)?,
            average: self.upload(&state.average)?,
            first: self.upload(&state.first)?,
            second: self.upload(&state.second)?,
            gradients: self.zeros(self.values)?,
            by_weights: self.zeros(self.values)?,
            factors: self.zeros(2 * self.norms.outputs)?,
            step: Memory::zeroed(&self.gpu, size_of::<kernels::Rates>() + drops)?,
            wrong: Memory::zeroed(&self.gpu, size_of::<u32>())?,
        });
        Ok(())
    }

    fn unload(&mut self) -> Result<State, EngineError> {
        let state = self.state.take();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        self.has_gradients = false;
        Ok(State {
            parameters: self.download(&state.weights.parameters)?,
            average: self.download(&state.average)?,
            first: self.download(&state.first)?,
            second: self.download(&state.second)?,
        })
    }

    fn backward(&mut self, batch: Batch, dropout: Option<Dropout>) -> Result<f64, EngineError> {
        (self.loaded, self.has_gradients) = (None, false);
        let nats = self.train(batch, dropout, |pass, state| {
            pass.gradients(state)?;
            Ok(pass.nats()?.iter().sum())
        })?;
        self.has_gradients = true;
        Ok(nats)
    }

    fn step(
        &mut self,
        batch: Batch,
        dropout: Option<Dropout>,
        adam: &Adam,
    ) -> Result<f64, EngineError> {
        (self.loaded, self.has_gradients) = (None, false);
        self.train(batch, dropout, |pass, state| {
            self.write_rates(state, adam)?;
            let mut work = || {
                pass.gradients(state)?;
                pass.find_wrong(state)?;
                self.move_parameters(state)
            };
            let taken = Taken {
                state: state.number,
                maps: pass.maps.number,
                images: pass.images,
                dropout: pass.dropout.is_some(),
            };
            let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
            if step.taken != Some(taken) {
                // The first time everything is chosen and allocated.
                *step = Step {
                    taken: Some(taken),
                    graph: None,
                };
                work()?;
            } else {
                if step.graph.is_none() {
                    step.graph = self.gpu.record(&mut work)?;
                }
                match &step.graph {
                    // SAFETY: state and maps are those that it was recorded with.
                    Some(graph) => unsafe { graph.launch()? },
                    None => work()?,
                }
            }
            let nats = pass.nats()?.iter().sum();
            self.expect_numbers(state)?;
            Ok(nats)
        })
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>, EngineError> {
        match &self.state {
            Some(state) if self.has_gradients => self.download(&state.gradients),
            _ => Err(EngineError::NotLoaded("gradients")),
        }
    }

    fn update(&mut self, adam: &Adam) -> Result<(), EngineError> {
        let state = self.state.as_ref();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        if !std::mem::take(&mut self.has_gradients) {
            return Err(EngineError::NotLoaded("gradients"));
        }
        self.write_rates(state, adam)?;
        let (count, wrong) = (self.values as i64, state.wrong.address());
        // SAFETY: the gradients are an array of all parameters.
        unsafe { kernels::find_wrong(&*self.gpu, state.gradients.address(), count, wrong)? };
        self.move_parameters(state)?;
        self.expect_numbers(state)
    }

    fn load_weights(&mut self, parameters: &[Vec<f32>]) -> Result<(), EngineError> {
        expect_parameters(&self.layout, parameters)?;
        self.loaded = None;
        let weights = self.weights(parameters)?;
        self.make(&weights)?;
        self.loaded = Some(weights);
        Ok(())
    }

    fn logits(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        let mut logits = Vec::new();
        self.evaluate(batch, |pass, operation, _| {
            if operation.to() == self.evaluation.logits {
                logits.extend(pass.read(self.evaluation.logits)?);
            }
            Ok(())
        })?;
        Ok(logits)
    }

    fn nats_per_image(&self, batch: Batch) -> Result<Vec<f64>, EngineError> {
        let mut nats = Vec::new();
        self.evaluate(batch, |pass, operation, _| {
            if operation.to() == self.evaluation.logits {
                pass.likelihood()?;
                nats.extend(pass.nats()?);
            }
            Ok(())
        })?;
        Ok(nats)
    }

    fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        let mut nats = Vec::new();
        self.evaluate(batch, |pass, operation, images| {
            if operation.to() == self.evaluation.logits {
                pass.likelihood()?;
                let pixels = self.config.height * self.config.width;
                let mut own = vec![0.0; images.len() * pixels];
                pass.maps.nats.read(0, &mut own)?;
                nats.extend(own);
            }
            Ok(())
        })?;
        Ok(nats)
    }

    fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        let recorded = &self.evaluation.recorded;
        let mut maps = vec![Vec::new(); recorded.len()];
        self.evaluate(batch, |pass, operation, images| {
            // Before its memory is another's; and again, where another one is added to it.
            for (map, &buffer) in maps.iter_mut().zip(recorded) {
                if buffer == operation.to() {
                    map.truncate(images.start * self.evaluation.buffers[buffer].values());
                    map.extend(pass.read(buffer)?);
                }
            }
            Ok(())
        })?;
        Ok(maps)
    }
}

impl Cuda {
    /// Writes a batch where the plan of training reads it, and calls `f`.
    fn train<R>(
        &self,
        batch: Batch,
        dropout: Option<Dropout>,
        f: impl FnOnce(&Pass, &Trained) -> Result<R, EngineError>,
    ) -> Result<R, EngineError> {
        let images = batch.len(&self.config)?;
        let state = self.state.as_ref();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        self.expect_room(images)?;
        let held = self.maps(&self.training, images)?;
        let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
        let drops = size_of::<kernels::Rates>();
        if let Some(dropout) = dropout {
            state.step.write(drops, &self.drops(dropout))?;
        }
        let pass = Pass {
            engine: self,
            plan: &self.training,
            maps,
            images,
            weights: &state.weights,
            dropout: dropout.map(|_| state.step.address() + drops as u64),
        };
        pass.write(batch, 0)?;
        f(&pass, state)
    }

    /// Writes what Adam takes, and takes the flag down.
    fn write_rates(&self, state: &Trained, adam: &Adam) -> Result<(), CudaError> {
        let Rates {
            take_1,
            take_2,
            rate,
            correction_2,
            epsilon,
            take_average,
        } = adam.rates();
        let rates = kernels::Rates {
            take_1,
            take_2,
            rate,
            correction_2,
            epsilon,
            take_average,
        };
        state.step.write(0, &[rates])?;
        state.wrong.write(0, &[0u32])
    }

    /// Moves parameters, moments and average by the gradients, unless the flag is up.
    fn move_parameters(&self, state: &Trained) -> Result<(), CudaError> {
        // SAFETY: all are arrays of all parameters.
        unsafe {
            kernels::adam(
                &*self.gpu,
                state.step.address(),
                state.wrong.address(),
                state.weights.parameters.address(),
                state.gradients.address(),
                state.first.address(),
                state.second.address(),
                state.average.address(),
                self.values as i64,
            )
        }
    }

    /// Looks whether the flag is up.
    fn expect_numbers(&self, state: &Trained) -> Result<(), EngineError> {
        let mut found = [0u32];
        state.wrong.read(0, &mut found)?;
        match found {
            [0] => Ok(()),
            _ => Err(EngineError::NotANumber),
        }
    }

    /// The dropout of every block.
    fn drops(&self, dropout: Dropout) -> Vec<kernels::Drop> {
        let drop = |block: usize| {
            let seed = dropout.seed.wrapping_add(block as u64);
            let Dropped {
                keys,
                threshold,
                scale,
            } = Dropout { seed, ..dropout }.factors();
            kernels::Drop {
                keys,
                threshold,
                scale,
            }
        };
        (0..self.training.forward.len()).map(drop).collect()
    }

    /// Turns the gradients by the weights into those by the parameters.
    fn by_parameters(&self, state: &Trained) -> Result<(), CudaError> {
        let Norms {
            ref table,
            layers,
            outputs,
            widest,
            largest,
        } = self.norms;
        let (gpu, norms) = (&*self.gpu, table.address());
        let (parameters, by_weights, gradients) = (
            state.weights.parameters.address(),
            state.by_weights.address(),
            state.gradients.address(),
        );
        let by_weight = state.factors.address();
        let by_v = by_weight + (outputs * VALUE) as u64;
        // SAFETY: as in `make`; there are two factors for each output.
        unsafe {
            kernels::scales_backward(
                gpu, parameters, by_weights, gradients, by_weight, by_v, norms, layers, widest,
            )?;
            kernels::weights_backward(
                gpu, parameters, by_weights, by_weight, by_v, gradients, norms, layers, largest,
            )
        }
    }
}
