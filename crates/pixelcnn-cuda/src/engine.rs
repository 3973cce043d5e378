//! The engine: the plan, carried out on a GPU.

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pixelcnn_core::ModelConfig;
use pixelcnn_core::cpu::Cpu;
use pixelcnn_core::engine::{
    Batch, Engine, EngineError, State, Update, expect_parameters, own_shards,
};
use pixelcnn_core::kernels::adam::Rates;
use pixelcnn_core::kernels::muon::{COEFFICIENTS, ITERATIONS, LEAST_NORM, Muon, drawn_length};
use pixelcnn_core::kernels::pointwise::{Dropout, Dropped};
use pixelcnn_core::kernels::weight_norm::WeightNorm;
use pixelcnn_core::network::{LayerKind, Layout, Parameter};
use pixelcnn_core::plan::{self, Operation, Plan};
use pixelcnn_core::ranks::{self, Sharing, Tree};

use crate::driver::Driver;
use crate::gpu::{Gpu, Graph, Memory, Plain, usable};
use crate::kernels::{self, Address, Matrix, Norm, SUMMED, Span};
use crate::pass::Pass;
use crate::{CudaError, Precision};

/// Bytes of a value.
pub(crate) const VALUE: usize = size_of::<f32>();
/// Bytes of an image's conditions: two numbers of rows.
pub(crate) const CONDITIONS: usize = 2 * size_of::<u32>();
/// Arrays begin at multiples of so many values: a cache line of the GPU.
const ALIGNED: usize = 32;
/// Images that are evaluated at a time, at most: enough to fill any GPU.
const SIDE_BY_SIDE: usize = 256;
/// Values of a bucket of gradients, at least: so many that a message is not waited for, or an eighth of
/// all, so that most are on their way before the backward pass ends.
const BUCKET: usize = 1 << 22;

/// The engine on a GPU.
pub struct Cuda {
    pub(crate) gpu: Arc<dyn Gpu>,
    pub(crate) config: ModelConfig,
    layout: Layout,
    training: Plan,
    evaluation: Plan,
    /// Where each parameter begins among all, in values: bucket after bucket, then those by `g`.
    pub(crate) starts: Vec<usize>,
    pub(crate) buckets: Vec<Bucket>,
    /// How batches to train on are shared out.
    pub(crate) sharing: Option<Sharing>,
    /// Values of all parameters together, gaps included.
    pub(crate) values: usize,
    norms: Norms,
    moved: Moved,
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

/// Parameters whose gradients are summed together.
pub(crate) struct Bucket {
    /// The step of the plan's backward pass with which they are there.
    pub step: usize,
    /// Where they are among all, in values.
    pub values: Range<usize>,
}

/// The gradients of a step as one graph.
#[derive(Default)]
struct Step {
    /// What they were computed with.
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

/// What the optimizer moves, for the kernels.
struct Moved {
    /// Spans of the parameters that Adam moves: of all, and of all that Muon doesn't.
    all: Table,
    rest: Table,
    /// The matrices that Muon moves, of so many values, and of [longer, shorter] sides at most.
    matrices: Table,
    longest: i64,
    widest: i64,
    /// Sums of squares.
    squares: Memory,
}

/// Entries in memory, and the values of the largest one.
struct Table {
    entries: Memory,
    number: u32,
    largest: i64,
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
    /// Where parameters of no layer begin, which have no norm, and their values.
    others: Vec<(usize, usize)>,
}

/// Parameters with the weights that they make.
pub(crate) struct Weights {
    /// All parameters, at their starts.
    pub parameters: Memory,
    /// The weights, each where its V begins.
    pub made: Memory,
    /// A factor for each output of each layer.
    pub scales: Memory,
}

/// The state of training.
pub(crate) struct Trained {
    pub number: u64,
    pub weights: Weights,
    pub average: Memory,
    pub first: Memory,
    pub second: Memory,
    /// By the parameters.
    pub gradients: Memory,
    /// By the weights, and by all else but `g`: of shards and sums of them, as their tree has them.
    pub sums: Vec<Memory>,
    /// What another rank has sent of a bucket.
    pub received: Memory,
    /// For each output of each layer, twice.
    pub factors: Memory,
    /// What a step is given: the rates of Adam, then each block's dropout.
    pub step: Memory,
    /// Raised where something is not a number.
    pub wrong: Memory,
}

/// Memory for the maps of some images.
pub(crate) struct Maps {
    pub number: u64,
    pub images: usize,
    pub training: bool,
    /// Where each slot begins in `memory`, in values.
    pub slots: Vec<usize>,
    /// For each branch, where the memory of one operation begins.
    pub scratch: [usize; 2],
    pub memory: Memory,
    /// How many images there is memory for in what follows.
    pub all: usize,
    /// u8 \[all, H, W, C\].
    pub levels: Memory,
    /// Rows of the conditional weights, two for each image.
    pub conditions: Memory,
    /// Nats of every pixel.
    pub nats: Memory,
    /// Nats of every image, in double precision.
    pub sums: Memory,
    /// For each branch, sums of parts of a map, for the gradient by a bias, in double precision.
    pub partial: [Memory; 2],
}

impl Maps {
    fn fit(&self, plan: &Plan, images: usize, all: usize) -> bool {
        let training = plan.d_logits.is_some();
        self.images >= images && self.all >= all && self.training == training
    }
}

impl From<CudaError> for EngineError {
    fn from(error: CudaError) -> EngineError {
        match error {
            CudaError::Rank(error) => EngineError::Rank(error),
            error => EngineError::Device(error.to_string()),
        }
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
        if config.energy_distance {
            let reason = "the energy distance is computed on CPUs alone: choose the CPU";
            return Err(EngineError::Device(reason.into()));
        }
        let layout = Layout::new(config);
        let (training, evaluation) = (Plan::training(config), Plan::evaluation(config));
        let mut starts = vec![usize::MAX; layout.parameters.len()];
        let mut values = 0;
        let mut place = |starts: &mut Vec<usize>, parameter: usize| {
            starts[parameter] = values;
            values += layout.parameters[parameter].len().next_multiple_of(ALIGNED);
            values
        };
        let (mut buckets, mut first) = (Vec::new(), 0);
        for plan::Bucket { step, parameters } in
            training.buckets(&layout, BUCKET.min(layout.size() / 8))
        {
            let ends = parameters.iter().map(|&n| place(&mut starts, n));
            let end = ends.last().unwrap_or(first);
            buckets.push(Bucket {
                step,
                values: first..end,
            });
            first = end;
        }
        for parameter in 0..starts.len() {
            if starts[parameter] == usize::MAX {
                place(&mut starts, parameter);
            }
        }
        let norms = Norms::new(&gpu, &layout, &evaluation, &starts)?;
        let moved = Moved::new(&gpu, &layout, &starts, values)?;
        Ok(Cuda {
            config: config.clone(),
            training,
            evaluation,
            gpu,
            layout,
            starts,
            buckets,
            sharing: None,
            values,
            norms,
            moved,
            state: None,
            has_gradients: false,
            loaded: None,
            maps: Mutex::new(None),
            step: Mutex::default(),
            next: AtomicU64::new(0),
        })
    }

    /// Takes steps on one branch from now on: to measure what the second one is worth.
    pub fn on_one_branch(mut self) -> Cuda {
        for turn in &mut self.training.turns {
            turn.branch = 0;
            turn.waits = false;
        }
        self
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
    pub(crate) fn make(&self, weights: &Weights) -> Result<(), CudaError> {
        let (parameters, scales) = (weights.parameters.address(), weights.scales.address());
        let Norms {
            ref table,
            layers,
            widest,
            largest,
            ..
        } = self.norms;
        let (branch, norms) = (self.gpu.branch(0), table.address());
        // SAFETY: the table says where in memory of `values` the layers' arrays are, and there is a
        // scale for each output.
        unsafe {
            kernels::scales(branch, parameters, scales, norms, layers, widest)?;
            let made = weights.made.address();
            kernels::weights(branch, parameters, scales, made, norms, layers, largest)
        }
    }

    /// Values of scratch memory that the blocks of a plan need for each image.
    fn scratch(&self, plan: &Plan) -> usize {
        let outputs = |n| self.config.nonlinearity.outputs(n);
        let blocks = plan.forward.iter().map(|operation| match operation {
            Operation::GatedResnet { x, a, .. } => {
                outputs(plan.buffers[*x].values() * a.len().max(1))
            }
            Operation::Attention { heads, to, .. } => {
                let [h, w] = plan.buffers[*to].size;
                2 * heads * h * w
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
        let values = plan.values() + branches(plan) * self.scratch(plan) + pixels;
        let sums = CONDITIONS + size_of::<f64>() + branches(plan) * self.partial(pixels);
        values * VALUE + self.config.bytes_per_image() + sums
    }

    /// Memory for the maps of so many images at a time, of `all`.
    fn maps(
        &self,
        plan: &Plan,
        images: usize,
        all: usize,
    ) -> Result<MutexGuard<'_, Option<Maps>>, EngineError> {
        let mut held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let training = plan.d_logits.is_some();
        if held
            .as_ref()
            .is_some_and(|maps| maps.fit(plan, images, all))
        {
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
        let mut scratch = [take(self.scratch(plan)); 2];
        if branches(plan) == 2 {
            scratch[1] = take(self.scratch(plan));
        }
        let pixels = |images: usize| images * self.config.height * self.config.width;
        let partial = |wanted: bool| {
            let bytes = self.partial(pixels(images));
            Memory::zeroed(&self.gpu, usize::from(wanted) * bytes)
        };
        *held = Some(Maps {
            number: self.next.fetch_add(1, Ordering::Relaxed),
            images,
            training,
            slots,
            scratch,
            memory: self.zeros(values)?,
            all,
            levels: Memory::zeroed(&self.gpu, all * self.config.bytes_per_image())?,
            conditions: Memory::zeroed(&self.gpu, all * CONDITIONS)?,
            nats: self.zeros(pixels(all))?,
            sums: Memory::zeroed(&self.gpu, all * size_of::<f64>())?,
            partial: [partial(training)?, partial(branches(plan) == 2)?],
        });
        Ok(held)
    }

    /// Whether there is memory held for so many images at a time, of `all`.
    fn has_room(&self, plan: &Plan, images: usize, all: usize) -> bool {
        let held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref()
            .is_some_and(|maps| maps.fit(plan, images, all))
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
        let available = usable(self.gpu.available()? + held);
        // A state that is not there yet takes its part.
        let state = match (plan.d_logits, &self.state) {
            (Some(_), None) => (6 + self.depth()) * self.values * VALUE,
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
            let held = self.maps(plan, images.len(), images.len())?;
            let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
            let pass = Pass {
                engine: self,
                plan,
                maps,
                images: images.len(),
                weights,
                first: 0,
                shard: 0,
                dropout: None,
                branch: 0,
            };
            pass.write(batch, images.clone())?;
            for operation in &plan.forward {
                pass.operation(operation)?;
                take(&pass, operation, images.clone())?;
            }
        }
        Ok(())
    }
}

/// How many branches a plan has.
pub(crate) fn branches(plan: &Plan) -> usize {
    let branches = plan.turns.iter().map(|turn| turn.branch + 1);
    branches.max().unwrap_or(0)
}

impl Table {
    fn new<T: Plain>(
        gpu: &Arc<dyn Gpu>,
        entries: &[T],
        values: impl Fn(&T) -> i64,
    ) -> Result<Table, CudaError> {
        // Not none at all.
        let memory = Memory::zeroed(gpu, entries.len().max(1) * size_of::<T>())?;
        memory.write(0, entries)?;
        Ok(Table {
            entries: memory,
            number: entries.len() as u32,
            largest: entries.iter().map(values).max().unwrap_or(0),
        })
    }
}

impl Moved {
    /// Of parameters that begin at `starts` and are so many `values`.
    fn new(
        gpu: &Arc<dyn Gpu>,
        layout: &Layout,
        starts: &[usize],
        values: usize,
    ) -> Result<Moved, CudaError> {
        let long = |n: usize| n as i64;
        let matrix = |(parameter, shape): (usize, [usize; 2])| Matrix {
            at: long(starts[parameter]),
            rows: long(shape[0]),
            columns: long(shape[1]),
            length: drawn_length(shape),
        };
        let mut matrices: Vec<Matrix> = layout.matrices().map(matrix).collect();
        matrices.sort_by_key(|matrix| matrix.at);
        let (mut rest, mut start) = (Vec::new(), 0);
        let span = |start: i64, end: i64| Span {
            start,
            count: end - start,
        };
        for matrix in &matrices {
            rest.push(span(start, matrix.at));
            start = matrix.at + matrix.rows * matrix.columns;
        }
        rest.push(span(start, long(values)));
        let longest = matrices.iter().map(|m| m.rows.max(m.columns));
        let widest = matrices.iter().map(|m| m.rows.min(m.columns));
        let squares = matrices.len().max(1) * SUMMED * size_of::<f64>();
        Ok(Moved {
            all: Table::new(gpu, &[span(0, long(values))], |span| span.count)?,
            rest: Table::new(gpu, &rest, |span| span.count)?,
            longest: longest.max().unwrap_or(0),
            widest: widest.max().unwrap_or(0),
            squares: Memory::zeroed(gpu, squares)?,
            matrices: Table::new(gpu, &matrices, |m| m.rows * m.columns)?,
        })
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
        // Layers outside of the blocks are the residual stream's.
        let wide = plan.forward.iter().filter_map(|operation| match operation {
            Operation::Layer { layer, .. } | Operation::Embed { layer, .. } => {
                Some(layer.parameter)
            }
            _ => None,
        });
        let wide: HashSet<usize> = wide.collect();
        let mut outputs = 0;
        let norms = layout.layers.iter().map(|layer| {
            let norm = WeightNorm::of(layer);
            let first = outputs;
            outputs += norm.outputs;
            Norm {
                v: long(starts[layer.parameter]),
                g: long(starts[layer.parameter + 1]),
                bias: long(starts[layer.parameter + 2]),
                first: long(first),
                wide: wide.contains(&layer.parameter).into(),
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
        let in_layers = layout.layers.iter().flat_map(|layer| {
            let first = layer.parameter;
            first..first + 3
        });
        let in_layers: HashSet<usize> = in_layers.collect();
        let others = layout.parameters.iter().enumerate();
        let others = others.filter(|(number, _)| !in_layers.contains(number));
        let others = others.map(|(number, parameter)| (starts[number], parameter.len()));
        let others = others.collect();
        Ok(Norms {
            table,
            layers: norms.len() as u32,
            outputs,
            widest: norms.iter().map(|norm| norm.outputs).max().unwrap_or(0),
            largest: largest.max().unwrap_or(0),
            others,
        })
    }
}

impl Engine for Cuda {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn resize(&mut self, size: [usize; 2]) -> Result<(), EngineError> {
        let config = self.config.resized(size);
        if config != self.config {
            config.validate()?;
            self.training = Plan::training(&config);
            self.evaluation = Plan::evaluation(&config);
            self.config = config;
            // What was recorded and the maps are of the size before.
            *self.step.get_mut().unwrap_or_else(PoisonError::into_inner) = Step::default();
            *self.maps.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
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
        let all = images;
        // A shard is computed at a time.
        let images = self.sharing.as_ref().map_or(all, Sharing::largest);
        if self.has_room(&self.training, images, all) {
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
        let drops = self.shards() * self.training.forward.len() * size_of::<Dropped>();
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
            sums: (0..self.depth())
                .map(|_| self.zeros(self.values))
                .collect::<Result<_, _>>()?,
            received: self.zeros(self.largest_received())?,
            factors: self.zeros(2 * self.norms.outputs)?,
            step: Memory::zeroed(&self.gpu, size_of::<Rates>() + drops)?,
            wrong: Memory::zeroed(&self.gpu, size_of::<u32>())?,
        });
        Ok(())
    }

    fn share(&mut self, sharing: Option<Sharing>) -> Result<(), EngineError> {
        if let Some(sharing) = sharing.as_ref().filter(|new| new.ranks.count() > 1) {
            self.gpu.join(&sharing.ranks)?;
        }
        // Its memory is for as many sums as there are shards.
        let state = self.state.is_some().then(|| self.unload()).transpose()?;
        self.sharing = sharing;
        state.map_or(Ok(()), |state| self.load(state))
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
        let nats = self.train(batch, dropout, |nats, _| nats())?;
        self.has_gradients = true;
        Ok(nats)
    }

    fn step(
        &mut self,
        batch: Batch,
        dropout: Option<Dropout>,
        update: &Update,
    ) -> Result<f64, EngineError> {
        (self.loaded, self.has_gradients) = (None, false);
        self.train(batch, dropout, |nats, state| {
            // With others, the gradients are known to be there before the state is touched.
            let known = match &self.sharing {
                Some(sharing) if sharing.ranks.count() > 1 => Some(nats()?),
                _ => None,
            };
            self.find_wrong(state)?;
            self.move_parameters(state, update)?;
            let nats = known.map_or_else(nats, Ok)?;
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

    fn update(&mut self, update: &Update) -> Result<(), EngineError> {
        let state = self.state.as_ref();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        if !std::mem::take(&mut self.has_gradients) {
            return Err(EngineError::NotLoaded("gradients"));
        }
        self.find_wrong(state)?;
        self.move_parameters(state, update)?;
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
    /// Shards of this rank.
    pub(crate) fn shards(&self) -> usize {
        self.sharing.as_ref().map_or(1, |s| s.shards().count())
    }

    /// As many sums of shards are there at a time.
    fn depth(&self) -> usize {
        1 + self.shards().trailing_zeros() as usize
    }

    /// Values that another rank sends at a time, at most.
    fn largest_received(&self) -> usize {
        let alone = self.sharing.as_ref().is_none_or(|s| s.ranks.count() == 1);
        let buckets = self.buckets.iter().map(|bucket| bucket.values.len());
        match alone {
            true => 0,
            false => buckets.max().unwrap_or(0).div_ceil(2),
        }
    }

    /// Computes the gradients of a batch, summed over all shards and ranks, and calls `f` with what
    /// then gives its nats.
    fn train<R>(
        &self,
        batch: Batch,
        dropout: Option<Dropout>,
        f: impl FnOnce(&dyn Fn() -> Result<f64, EngineError>, &Trained) -> Result<R, EngineError>,
    ) -> Result<R, EngineError> {
        let images = batch.len(&self.config)?;
        let state = self.state.as_ref();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        let (own, shards) = own_shards(self.sharing.as_ref(), images)?;
        self.expect_room(images)?;
        let largest = shards.iter().map(Range::len).max().unwrap_or(0);
        let held = self.maps(&self.training, largest, images)?;
        let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
        let blocks = self.training.forward.len() * size_of::<Dropped>();
        let passes = shards.iter().enumerate().map(|(shard, range)| Pass {
            engine: self,
            plan: &self.training,
            maps,
            images: range.len(),
            weights: &state.weights,
            first: range.start - own.start,
            shard,
            dropout: dropout.map(|_| {
                let place = size_of::<Rates>() + shard * blocks;
                state.step.address() + place as u64
            }),
            branch: 0,
        });
        let passes: Vec<Pass> = passes.collect();
        if let Some(dropout) = dropout {
            let drops = shards
                .iter()
                .flat_map(|s| self.training.drops(dropout, s.start));
            let drops: Vec<Dropped> = drops.collect();
            state.step.write(size_of::<Rates>(), &drops)?;
        }
        passes[0].write(batch, 0..images)?;

        let mut work = || {
            self.make(&state.weights)?;
            passes.iter().try_for_each(|pass| pass.gradients(state))?;
            self.by_parameters(state)
        };
        let taken = Taken {
            state: state.number,
            maps: maps.number,
            images,
            dropout: dropout.is_some(),
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
        let nats = || {
            let mut sums = vec![0.0f64; images];
            maps.sums.read(0, &mut sums)?;
            let mut tree = Tree::default();
            for pass in &passes {
                let shard = &sums[pass.first..pass.first + pass.images];
                tree.push(shard.iter().sum::<f64>(), |sum, shard| *sum += shard);
            }
            let mut total = [tree.sum().unwrap_or(0.0)];
            if let Some(sharing) = &self.sharing {
                ranks::sum(&*sharing.ranks, &mut total)?;
            }
            Ok(total[0])
        };
        f(&nats, state)
    }

    /// Raises the flag where a gradient is not a number, and takes it down where all are.
    fn find_wrong(&self, state: &Trained) -> Result<(), CudaError> {
        state.wrong.write(0, &[0u32])?;
        let (gradients, wrong) = (state.gradients.address(), state.wrong.address());
        // SAFETY: the gradients are an array of all parameters.
        unsafe { kernels::find_wrong(self.gpu.branch(0), gradients, self.values as i64, wrong) }
    }

    /// Moves parameters, moments and average by the gradients, unless the flag is up. What they were
    /// computed from is lost.
    fn move_parameters(&self, state: &Trained, update: &Update) -> Result<(), CudaError> {
        state.step.write(0, &[update.adam.rates()])?;
        let by_adam = match update.muon {
            None => &self.moved.all,
            Some(_) => &self.moved.rest,
        };
        // SAFETY: all are arrays of all parameters, of which the spans are some.
        unsafe {
            kernels::adam(
                self.gpu.branch(0),
                state.step.address(),
                state.wrong.address(),
                state.weights.parameters.address(),
                state.gradients.address(),
                state.first.address(),
                state.second.address(),
                state.average.address(),
                by_adam.entries.address(),
                by_adam.number,
                by_adam.largest,
            )?;
        }
        update
            .muon
            .map_or(Ok(()), |muon| self.move_matrices(state, muon))
    }

    /// Moves the matrices as Muon does, in memory that the step has no more use for.
    fn move_matrices(&self, state: &Trained, muon: Muon) -> Result<(), CudaError> {
        let Moved {
            matrices: ref table,
            longest,
            widest,
            ref squares,
            ..
        } = self.moved;
        let Table {
            ref entries,
            number,
            largest,
        } = *table;
        let (branch, matrices) = (self.gpu.branch(0), entries.address());
        let (rates, flag) = (state.step.address(), state.wrong.address());
        let (parameters, average) = (state.weights.parameters.address(), state.average.address());
        let (gradients, first) = (state.gradients.address(), state.first.address());
        let squares = squares.address();
        // Those by the weights, and the weights themselves, which the next step makes again.
        let factor = state.weights.made.address();
        let [mut y, mut other] = [state.sums[0].address(), gradients];
        let [a, b, c] = COEFFICIENTS;
        // SAFETY: all are arrays of all parameters, in which each matrix has room for all that is as large
        // or smaller, but the squares, of which there are as many as blocks.
        unsafe {
            kernels::muon_momentum(
                branch, rates, flag, gradients, first, squares, matrices, number,
            )?;
            kernels::muon_scale(
                branch, gradients, squares, y, LEAST_NORM, matrices, number, largest,
            )?;
            for _ in 0..ITERATIONS {
                let gram = other;
                kernels::muon_gram(branch, y, gram, matrices, number, widest)?;
                kernels::muon_product(
                    branch, gram, gram, factor, b, c, 1, matrices, number, widest, widest,
                )?;
                kernels::muon_product(
                    branch, y, factor, other, a, 1.0, 0, matrices, number, longest, widest,
                )?;
                (y, other) = (other, y);
            }
            let learning_rate = muon.learning_rate as f32;
            kernels::muon(
                branch,
                rates,
                flag,
                learning_rate,
                y,
                parameters,
                average,
                matrices,
                number,
                largest,
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

    /// Turns the gradients by the weights into those by the parameters.
    pub(crate) fn by_parameters(&self, state: &Trained) -> Result<(), CudaError> {
        let Norms {
            ref table,
            layers,
            outputs,
            widest,
            largest,
            ..
        } = self.norms;
        let (branch, norms) = (self.gpu.branch(0), table.address());
        let (parameters, by_weights, gradients) = (
            state.weights.parameters.address(),
            state.sums[0].address(),
            state.gradients.address(),
        );
        let by_weight = state.factors.address();
        let by_v = by_weight + (outputs * VALUE) as u64;
        // SAFETY: as in `make`; there are two factors for each output.
        unsafe {
            kernels::scales_backward(
                branch, parameters, by_weights, gradients, by_weight, by_v, norms, layers, widest,
            )?;
            kernels::weights_backward(
                branch, parameters, by_weights, by_weight, by_v, gradients, norms, layers, largest,
            )?;
        }
        // Those of no layer.
        for &(start, values) in &self.norms.others {
            let at = |memory: Address| memory + (start * VALUE) as u64;
            // SAFETY: both are arrays of all parameters.
            unsafe { kernels::copy(branch, at(by_weights), at(gradients), values as i64)? };
        }
        Ok(())
    }
}
