//! The engine: the plan, carried out through wgpu.

use std::iter;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pixelcnn_core::ModelConfig;
use pixelcnn_core::cpu::Cpu;
use pixelcnn_core::engine::{
    Batch, Engine, EngineError, State, Update, expect_parameters, own_shards,
};
use pixelcnn_core::kernels::adam::Rates;
use pixelcnn_core::kernels::muon::{COEFFICIENTS, ITERATIONS, LEAST_NORM, drawn_length};
use pixelcnn_core::kernels::pointwise::{Dropout, Dropped};
use pixelcnn_core::kernels::weight_norm::WeightNorm;
use pixelcnn_core::network::{LayerKind, Layout};
use pixelcnn_core::plan::{Operation, Plan};
use pixelcnn_core::ranks::{Sharing, Tree};

use crate::gpu::{Array, Arrays, Gpu, List, Ready, WgpuError};
use crate::kernels::{self, Geometry, Matrix, Norm, SUMMED};
use crate::pass::Pass;

/// `NONE` of `kernels/common.wgsl`.
const NO_CONDITION: u32 = u32::MAX;
/// Images that are evaluated at a time, at most.
const SIDE_BY_SIDE: usize = 64;

/// The engine on an adapter.
pub struct Wgpu {
    pub(crate) gpu: Gpu,
    config: ModelConfig,
    layout: Layout,
    training: Plan,
    evaluation: Plan,
    /// Of the layers, with the number of each one's V.
    norms: Vec<(usize, Norm)>,
    /// Parameters of no layer.
    others: Vec<usize>,
    matrices: Vec<Matrix>,
    /// How batches to train on are shared out.
    sharing: Option<Sharing>,
    state: Option<Trained>,
    /// Whether the gradients of a batch are in the state's memory.
    has_gradients: bool,
    /// The parameters to evaluate with.
    loaded: Option<Weights>,
    maps: Mutex<Option<Maps>>,
    /// How many maps were made.
    made: AtomicUsize,
}

/// Parameters with the weights that they make.
pub(crate) struct Weights {
    pub parameters: Arrays,
    /// The weights, each in the place of its V.
    pub made: Arrays,
    /// Of each layer, a factor for each output.
    scales: Arrays,
}

/// The state of training.
struct Trained {
    weights: Weights,
    average: Arrays,
    first: Arrays,
    second: Arrays,
    /// By the parameters.
    gradients: Arrays,
    /// By the weights, and by all else but `g`: of shards and sums of them, as their tree has them.
    sums: Vec<Arrays>,
    /// Of each layer, two for each output.
    factors: Arrays,
    /// Of Adam, and behind them Muon's learning rate.
    rates: Array,
    /// Raised where something is not a number.
    wrong: Array,
    squares: Array,
    /// The step that was taken last, to be taken again.
    step: Option<(Taken, Vec<Ready>)>,
    /// What moves the parameters, without Muon and with it.
    moves: [Option<Ready>; 2],
}

/// What a step's lists hang on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Taken {
    shards: Vec<usize>,
    dropout: bool,
    /// The number of the maps.
    maps: usize,
}

/// Memory for the maps of some images.
pub(crate) struct Maps {
    number: usize,
    images: usize,
    training: bool,
    pub slots: Vec<Array>,
    /// Of an operation.
    pub scratch: Array,
    /// Sums of parts of gradients by weights and biases.
    pub partial: Array,
    /// A level or code in each value, \[images, pixels, channels\].
    pub levels: Array,
    /// Rows of the conditional weights, two for each image.
    pub conditions: Array,
    /// Four numbers for each block.
    pub drops: Array,
    /// Of every pixel.
    pub nats: Array,
}

impl Maps {
    /// Whether they are there for so many images.
    fn fit(&self, training: bool, images: usize) -> bool {
        self.images >= images && self.training == training
    }
}

impl Wgpu {
    /// An engine for a model on an adapter by its number.
    ///
    /// # Errors
    /// [`EngineError::Config`], and [`EngineError::Device`] where the driver refuses, or the model is of a kind that
    /// is trained on CPUs alone.
    pub fn new(config: &ModelConfig, number: usize) -> Result<Wgpu, EngineError> {
        Wgpu::on(Gpu::open(number)?, config)
    }

    /// On a device that is open.
    pub(crate) fn on(gpu: Gpu, config: &ModelConfig) -> Result<Wgpu, EngineError> {
        config.validate()?;
        if config.energy_distance {
            let reason = "the energy distance is computed on CPUs alone: choose the CPU";
            return Err(EngineError::Device(reason.into()));
        }
        let layout = Layout::new(config);
        let norms = layout.layers.iter().map(|layer| {
            let norm = WeightNorm::of(layer);
            let norm = Norm {
                rows: norm.rows,
                outputs: norm.outputs,
                inner: norm.inner,
                transposed: layer.kind == LayerKind::Deconv,
                floor: norm.floor as f32,
            };
            (layer.parameter, norm)
        });
        let norms: Vec<(usize, Norm)> = norms.collect();
        let in_layers = |number: &usize| norms.iter().any(|(v, _)| (*v..v + 3).contains(number));
        let others = (0..layout.parameters.len()).filter(|number| !in_layers(number));
        let matrices = layout.matrices().map(|(parameter, shape)| Matrix {
            parameter,
            rows: shape[0],
            columns: shape[1],
            length: drawn_length(shape) as f32,
        });
        Ok(Wgpu {
            gpu,
            config: config.clone(),
            training: Plan::training(config),
            evaluation: Plan::evaluation(config),
            others: others.collect(),
            matrices: matrices.collect(),
            norms,
            layout,
            sharing: None,
            state: None,
            has_gradients: false,
            loaded: None,
            maps: Mutex::new(None),
            made: AtomicUsize::new(0),
        })
    }

    /// Arrays shaped as the parameters.
    fn like_parameters(&self) -> Result<Arrays, WgpuError> {
        self.gpu.arrays(
            self.layout
                .parameters
                .iter()
                .map(|parameter| parameter.len()),
        )
    }

    fn upload(&self, values: &[Vec<f32>]) -> Result<Arrays, EngineError> {
        expect_parameters(&self.layout, values)?;
        let arrays = self.like_parameters()?;
        for (array, values) in arrays.each.iter().zip(values) {
            self.gpu.write(array, values);
        }
        self.gpu.flush()?;
        Ok(arrays)
    }

    fn download(&self, arrays: &Arrays) -> Result<Vec<Vec<f32>>, EngineError> {
        let each = arrays.each.iter();
        each.map(|array| Ok(self.gpu.read(array, array.values)?))
            .collect()
    }

    fn weights(&self, parameters: &[Vec<f32>]) -> Result<Weights, EngineError> {
        let outputs = self.norms.iter().map(|(_, norm)| norm.outputs);
        Ok(Weights {
            parameters: self.upload(parameters)?,
            made: self.like_parameters()?,
            scales: self.gpu.arrays(outputs)?,
        })
    }

    /// Makes the weights of the parameters.
    fn make(&self, list: &mut List, weights: &Weights) {
        for ((v, norm), scale) in self.norms.iter().zip(&weights.scales.each) {
            let [direction, g] = [*v, v + 1].map(|number| &weights.parameters.each[number]);
            norm.make(list, [direction, g, scale, &weights.made.each[*v]]);
        }
    }

    /// Values of scratch memory that the operations of a plan need for each image.
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

    /// Values of the sums of parts for so many images.
    fn partial(&self, plan: &Plan, images: usize) -> usize {
        let size = |buffer: usize| {
            let [h, w] = plan.buffers[buffer].size;
            [images, h, w]
        };
        let operations = plan.forward.iter();
        let of_layers = operations.flat_map(|operation| match operation {
            Operation::Layer { layer, from, to } => vec![(layer, layer.finer(*from, *to))],
            Operation::GatedResnet { block, x, .. } => {
                let layers = [Some(&block.conv_1), block.nin.as_ref(), Some(&block.conv_2)];
                layers
                    .into_iter()
                    .flatten()
                    .map(|layer| (layer, *x))
                    .collect()
            }
            _ => Vec::new(),
        });
        let of_layers = of_layers.map(|(layer, map)| Geometry::of(layer, size(map)).partial(layer));
        of_layers.max().unwrap_or(0)
    }

    /// Images at a time whose maps are no larger than an array may be.
    fn most(&self, plan: &Plan) -> usize {
        let buffers = plan.buffers.iter().map(|buffer| buffer.values());
        let largest = buffers.max().unwrap_or(0).max(self.scratch(plan)).max(1);
        self.gpu.largest / 4 / largest
    }

    /// Memory for the maps of so many images at a time.
    fn maps(
        &self,
        plan: &Plan,
        images: usize,
    ) -> Result<MutexGuard<'_, Option<Maps>>, EngineError> {
        let training = plan.d_logits.is_some();
        let mut held = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if held.as_ref().is_some_and(|maps| maps.fit(training, images)) {
            return Ok(held);
        }
        // Before it is taken anew.
        *held = None;
        let room = self.most(plan);
        if images > room {
            return Err(EngineError::Memory { images, room });
        }
        let take = |images: usize| -> Result<Maps, WgpuError> {
            let array = |values: usize| self.gpu.array(values);
            let pixels = images * self.config.height * self.config.width;
            let slots = plan.slots.iter().map(|size| array(size * images));
            let partial = match training {
                true => self.partial(plan, images),
                false => 0,
            };
            Ok(Maps {
                number: self.made.fetch_add(1, Ordering::Relaxed),
                images,
                training,
                slots: slots.collect::<Result<_, _>>()?,
                scratch: array(self.scratch(plan) * images)?,
                partial: array(partial)?,
                levels: array(pixels * self.levels_per_pixel())?,
                conditions: array(2 * images)?,
                drops: array(4 * plan.forward.len())?,
                nats: array(pixels)?,
            })
        };
        let maps = match take(images) {
            Err(WgpuError::Memory(_) | WgpuError::TooLarge(_)) => {
                let mut room = images / 2;
                while room > 0 && take(room).is_err() {
                    room /= 2;
                }
                return Err(EngineError::Memory { images, room });
            }
            taken => taken?,
        };
        *held = Some(maps);
        Ok(held)
    }

    /// Values in which a pixel is given.
    fn levels_per_pixel(&self) -> usize {
        match self.config.nr_codes {
            0 => self.config.channels,
            _ => self.config.nr_code_maps(),
        }
    }

    /// Writes images and their conditions.
    fn write(&self, maps: &Maps, batch: Batch, images: usize) {
        let levels: Vec<u32> = match self.config.nr_codes {
            0 => batch.images.iter().map(|&level| level.into()).collect(),
            _ => {
                let (codes, _) = batch.images.as_chunks::<2>();
                codes
                    .iter()
                    .map(|&code| u16::from_le_bytes(code).into())
                    .collect()
            }
        };
        self.gpu.write(&maps.levels, &levels);
        if self.config.nr_conditions() > 0 {
            let of_image = |image| {
                let rows = batch.conditions(&self.config, image).map(|row| row as u32);
                rows.chain([NO_CONDITION; 2]).take(2)
            };
            let conditions: Vec<u32> = (0..images).flat_map(of_image).collect();
            self.gpu.write(&maps.conditions, &conditions);
        }
    }

    /// The dropout of every block, for images from one of the whole batch on.
    fn drops(&self, dropout: Dropout, image: usize) -> Vec<u32> {
        let words = |drop: &Dropped| {
            let Dropped {
                keys,
                threshold,
                scale,
            } = *drop;
            [keys[0], keys[1], threshold, scale.to_bits()]
        };
        let drops = self.training.drops(dropout, image);
        drops.iter().flat_map(words).collect()
    }

    /// Carries the forward pass of an evaluation out over a few images at a time. `take` is given each, with the
    /// number of images; a list ends after the operations that `ends` names.
    fn evaluate(
        &self,
        batch: Batch,
        ends: impl Fn(&Operation) -> bool,
        mut take: impl FnMut(&Pass, &Operation, Range<usize>) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let count = batch.len(&self.config)?;
        let loaded = self.loaded.as_ref();
        let weights = loaded.ok_or(EngineError::NotLoaded("weights"))?;
        let plan = &self.evaluation;
        let mut most = self.most(plan).min(SIDE_BY_SIDE);
        if most == 0 {
            return Err(EngineError::Memory { images: 1, room: 0 });
        }
        let mut first = 0;
        while first < count {
            let images = first..count.min(first + most);
            let held = match self.maps(plan, images.len()) {
                Err(EngineError::Memory { room, .. }) if room > 0 => {
                    most = room;
                    continue;
                }
                held => held?,
            };
            first = images.end;
            let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
            let pass = Pass {
                config: &self.config,
                plan,
                maps,
                images: images.len(),
                weights,
                dropout: false,
                sums: None,
            };
            self.write(maps, batch.part(&self.config, images.clone()), images.len());
            let mut list = List::default();
            for operation in &plan.forward {
                pass.operation(&mut list, operation);
                if operation.to() == plan.logits {
                    pass.likelihood(&mut list);
                }
                if ends(operation) {
                    self.gpu.run(&self.gpu.ready(&std::mem::take(&mut list)));
                    take(&pass, operation, images.clone())?;
                }
            }
        }
        Ok(())
    }

    /// What a buffer of a pass holds.
    fn held(&self, pass: &Pass, buffer: usize) -> Result<Vec<f32>, EngineError> {
        let slot = &pass.maps.slots[pass.plan.buffers[buffer].slot];
        Ok(self.gpu.read(slot, pass.values(buffer))?)
    }

    /// Nats of each pixel of an evaluation.
    fn pixels(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        let mut nats = Vec::new();
        let is_last = |operation: &Operation| operation.to() == self.evaluation.logits;
        self.evaluate(batch, is_last, |pass, _, images| {
            let pixels = images.len() * self.config.height * self.config.width;
            nats.extend(self.gpu.read::<f32>(&pass.maps.nats, pixels)?);
            Ok(())
        })?;
        Ok(nats)
    }

    /// As many sums of shards are there at a time.
    fn depth(&self) -> usize {
        let shards = self.sharing.as_ref().map_or(1, |s| s.shards().count());
        1 + shards.trailing_zeros() as usize
    }

    /// Turns the gradients by the weights into those by the parameters.
    fn by_parameters(&self, list: &mut List, state: &Trained) {
        let sums = &state.sums[0].each;
        let (parameters, gradients) = (&state.weights.parameters.each, &state.gradients.each);
        for ((v, norm), factors) in self.norms.iter().zip(&state.factors.each) {
            let (g, bias) = (v + 1, v + 2);
            let given = [&parameters[*v], &parameters[g], &sums[*v]];
            norm.backward(list, given, factors, [&gradients[*v], &gradients[g]]);
            kernels::copy(list, &sums[bias], &gradients[bias], sums[bias].values);
        }
        for &other in &self.others {
            kernels::copy(list, &sums[other], &gradients[other], sums[other].values);
        }
    }

    /// The lists of a step: of each shard, and what comes after all.
    fn step_lists(&self, state: &Trained, maps: &Maps, taken: &Taken) -> Vec<Ready> {
        let mut lists = Vec::new();
        for (shard, &images) in taken.shards.iter().enumerate() {
            let mut list = List::default();
            if shard == 0 {
                self.make(&mut list, &state.weights);
            }
            let top = shard.count_ones() as usize;
            let pass = Pass {
                config: &self.config,
                plan: &self.training,
                maps,
                images,
                weights: &state.weights,
                dropout: taken.dropout,
                sums: Some(&state.sums[top]),
            };
            pass.gradients(&mut list);
            // Summed as far as their tree goes.
            for below in (top - shard.trailing_ones() as usize..top).rev() {
                let (from, to) = (&state.sums[below + 1].whole, &state.sums[below].whole);
                for (from, to) in from.iter().zip(to) {
                    kernels::add(&mut list, from, to, to.values);
                }
            }
            if shard + 1 == taken.shards.len() {
                self.by_parameters(&mut list, state);
            }
            lists.push(self.gpu.ready(&list));
        }
        lists
    }

    /// What moves parameters, moments and average by the gradients, unless one of those is not a number.
    fn move_lists(&self, state: &Trained, muon: bool) -> Ready {
        let mut list = List::default();
        for gradients in &state.gradients.whole {
            kernels::find_wrong(&mut list, gradients, &state.wrong, gradients.values);
        }
        let arrays = |arrays: &Arrays, number: usize| arrays.each[number].clone();
        let Trained {
            weights,
            average,
            first,
            second,
            gradients,
            wrong,
            rates,
            squares,
            ..
        } = state;
        let by_muon = |number: &usize| {
            muon && self
                .matrices
                .iter()
                .any(|matrix| matrix.parameter == *number)
        };
        let mut by_adam = |all: [&Array; 5]| {
            let [gradient, parameter, first, second, average] = all;
            let values = gradient.values;
            kernels::adam(
                &mut list, wrong, rates, gradient, parameter, first, second, average, values,
            );
        };
        match muon {
            false => {
                for number in 0..gradients.whole.len() {
                    let whole = |arrays: &'_ Arrays| arrays.whole[number].clone();
                    by_adam([
                        &whole(gradients),
                        &whole(&weights.parameters),
                        &whole(first),
                        &whole(second),
                        &whole(average),
                    ]);
                }
            }
            true => {
                let rest = (0..self.layout.parameters.len()).filter(|number| !by_muon(number));
                for number in rest {
                    by_adam([
                        &arrays(gradients, number),
                        &arrays(&weights.parameters, number),
                        &arrays(first, number),
                        &arrays(second, number),
                        &arrays(average, number),
                    ]);
                }
                for matrix in &self.matrices {
                    let number = matrix.parameter;
                    let [longer, shorter] = matrix.sides();
                    let values = matrix.values();
                    // Muon's own arrays lie where the gradients by the weights do, and the weights themselves: the
                    // next step makes them anew.
                    let factor = &weights.made.each[number];
                    let [mut y, mut other] = [&state.sums[0].each[number], &gradients.each[number]];
                    let given = [wrong, rates, &gradients.each[number]];
                    matrix.momentum(&mut list, given, [&first.each[number], y, squares]);
                    kernels::muon_scale(&mut list, squares, y, values, SUMMED, LEAST_NORM as f32);
                    let [a, b, c] = COEFFICIENTS;
                    for _ in 0..ITERATIONS {
                        let gram = other;
                        matrix.gram(&mut list, y, gram);
                        matrix.product(&mut list, [gram, gram, factor], shorter, [b, c]);
                        matrix.product(&mut list, [y, factor, other], longer, [a, 1.0]);
                        (y, other) = (other, y);
                    }
                    kernels::muon(
                        &mut list,
                        wrong,
                        rates,
                        y,
                        &weights.parameters.each[number],
                        &average.each[number],
                        values,
                        matrix.rows,
                        matrix.columns,
                        matrix.length,
                    );
                }
            }
        }
        self.gpu.ready(&list)
    }
}

impl Engine for Wgpu {
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
            *self.maps.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
            if let Some(state) = &mut self.state {
                state.step = None;
            }
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
        // A shard is computed at a time.
        let images = self.sharing.as_ref().map_or(images, Sharing::largest);
        self.maps(&self.training, images).map(|_| ())
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
        // Before memory for the new one is taken.
        (self.state, self.loaded, self.has_gradients) = (None, None, false);
        let factors = self.norms.iter().map(|(_, norm)| 2 * norm.outputs);
        self.state = Some(Trained {
            weights: self.weights(&state.parameters)?,
            average: self.upload(&state.average)?,
            first: self.upload(&state.first)?,
            second: self.upload(&state.second)?,
            gradients: self.like_parameters()?,
            sums: iter::repeat_with(|| self.like_parameters())
                .take(self.depth())
                .collect::<Result<_, _>>()?,
            factors: self.gpu.arrays(factors)?,
            rates: self.gpu.array(7)?,
            wrong: self.gpu.array(1)?,
            squares: self.gpu.array(SUMMED)?,
            step: None,
            moves: [None, None],
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

    fn share(&mut self, sharing: Option<Sharing>) -> Result<(), EngineError> {
        if sharing.as_ref().is_some_and(|new| new.ranks.count() > 1) {
            let reason = "several processes can't train on it together: train with one, or on CPUs";
            return Err(EngineError::Device(reason.into()));
        }
        // Its memory is for as many sums as there are shards.
        let state = self.state.is_some().then(|| self.unload()).transpose()?;
        self.sharing = sharing;
        state.map_or(Ok(()), |state| self.load(state))
    }

    fn backward(&mut self, batch: Batch, dropout: Option<Dropout>) -> Result<f64, EngineError> {
        (self.loaded, self.has_gradients) = (None, false);
        let images = batch.len(&self.config)?;
        if self.state.is_none() {
            return Err(EngineError::NotLoaded("state"));
        }
        let (own, shards) = own_shards(self.sharing.as_ref(), images)?;
        let images: Vec<usize> = shards.iter().map(Range::len).collect();
        let largest = images.iter().copied().max().unwrap_or(0);
        let mut state = self.state.take().ok_or(EngineError::NotLoaded("state"))?;
        let maps = self.maps.get_mut().unwrap_or_else(PoisonError::into_inner);
        if !maps.as_ref().is_some_and(|maps| maps.fit(true, largest)) {
            // It holds the memory of those before.
            state.step = None;
        }
        let work = || -> Result<f64, EngineError> {
            let held = self.maps(&self.training, largest)?;
            let maps = held.as_ref().ok_or(EngineError::NotLoaded("memory"))?;
            let taken = Taken {
                shards: images,
                dropout: dropout.is_some(),
                maps: maps.number,
            };
            if state.step.as_ref().is_none_or(|(last, _)| *last != taken) {
                let lists = self.step_lists(&state, maps, &taken);
                state.step = Some((taken, lists));
            }
            let (_, lists) = state.step.as_ref().expect("it is there now");
            let mut tree = Tree::default();
            for (range, list) in shards.iter().zip(lists) {
                if let Some(dropout) = dropout {
                    self.gpu
                        .write(&maps.drops, &self.drops(dropout, range.start));
                }
                let part = range.start - own.start..range.end - own.start;
                self.write(maps, batch.part(&self.config, part), range.len());
                self.gpu.run(list);
                let pixels = range.len() * self.config.height * self.config.width;
                let nats: Vec<f32> = self.gpu.read(&maps.nats, pixels)?;
                let sum: f64 = nats.iter().map(|&nats| f64::from(nats)).sum();
                tree.push(sum, |sum, shard| *sum += shard);
            }
            Ok(tree.sum().unwrap_or(0.0))
        };
        let nats = work();
        self.state = Some(state);
        let nats = nats?;
        self.has_gradients = true;
        Ok(nats)
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>, EngineError> {
        match &self.state {
            Some(state) if self.has_gradients => self.download(&state.gradients),
            _ => Err(EngineError::NotLoaded("gradients")),
        }
    }

    fn update(&mut self, update: &Update) -> Result<(), EngineError> {
        let mut state = self.state.take().ok_or(EngineError::NotLoaded("state"))?;
        if !std::mem::take(&mut self.has_gradients) {
            self.state = Some(state);
            return Err(EngineError::NotLoaded("gradients"));
        }
        let by_muon = usize::from(update.muon.is_some());
        if state.moves[by_muon].is_none() {
            state.moves[by_muon] = Some(self.move_lists(&state, by_muon == 1));
        }
        let Rates {
            take_1,
            take_2,
            rate,
            correction_2,
            epsilon,
            take_average,
        } = update.adam.rates();
        let rate_of_muon = update.muon.map_or(0.0, |muon| muon.learning_rate as f32);
        let rates = [
            take_1,
            take_2,
            rate,
            correction_2,
            epsilon,
            take_average,
            rate_of_muon,
        ];
        self.gpu.write(&state.rates, &rates);
        self.gpu.write(&state.wrong, &[0u32]);
        if let Some(list) = &state.moves[by_muon] {
            self.gpu.run(list);
        }
        let found = self.gpu.read::<u32>(&state.wrong, 1);
        self.state = Some(state);
        match found?[..] {
            [0] => Ok(()),
            _ => Err(EngineError::NotANumber),
        }
    }

    fn load_weights(&mut self, parameters: &[Vec<f32>]) -> Result<(), EngineError> {
        expect_parameters(&self.layout, parameters)?;
        self.loaded = None;
        let weights = self.weights(parameters)?;
        let mut list = List::default();
        self.make(&mut list, &weights);
        self.gpu.run(&self.gpu.ready(&list));
        self.loaded = Some(weights);
        Ok(())
    }

    fn logits(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        let mut logits = Vec::new();
        let wanted = self.evaluation.logits;
        self.evaluate(
            batch,
            |operation| operation.to() == wanted,
            |pass, _, _| {
                logits.extend(self.held(pass, wanted)?);
                Ok(())
            },
        )?;
        Ok(logits)
    }

    fn nats_per_image(&self, batch: Batch) -> Result<Vec<f64>, EngineError> {
        let nats = self.pixels(batch)?;
        let images = nats.chunks_exact(self.config.height * self.config.width);
        Ok(images
            .map(|nats| nats.iter().map(|&nats| f64::from(nats)).sum())
            .collect())
    }

    fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        self.pixels(batch)
    }

    fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        let recorded = &self.evaluation.recorded;
        let mut maps = vec![Vec::new(); recorded.len()];
        let is_recorded = |operation: &Operation| recorded.contains(&operation.to());
        self.evaluate(batch, is_recorded, |pass, operation, images| {
            // Before its memory is another's; and again, where another one is added to it.
            for (map, &buffer) in maps.iter_mut().zip(recorded) {
                if buffer == operation.to() {
                    map.truncate(images.start * self.evaluation.buffers[buffer].values());
                    map.extend(self.held(pass, buffer)?);
                }
            }
            Ok(())
        })?;
        Ok(maps)
    }
}
