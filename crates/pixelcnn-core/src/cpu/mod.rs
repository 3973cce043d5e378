//! The engine on the CPU: the plan, carried out by the [kernels](crate::kernels).
//!
//! A batch is split into parts that run side by side, each through all of the plan, so that their
//! maps stay in the cache and the cores seldom wait for one another. The parts, and so the order in
//! which their gradients are summed, follow from the shapes alone: results are the same bits for
//! any number of threads. A large image is evaluated band by band.

mod execution;
mod init;
mod sums;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rayon::prelude::*;

use crate::config::{ConfigError, ModelConfig};
use crate::engine::{
    Batch, Engine, EngineError, Precision, State, Update, expect_parameters, own_shards,
};
use crate::kernels::pointwise::Dropout;
pub use crate::kernels::simd::has_bf16;
use crate::likelihood::{EnergyDistance, Likelihood, Noise, per_image};
use crate::network::Layout;
use crate::plan::Plan;
use crate::ranks::{self, Sharing, Tree, share};
use execution::{Execution, Memory};
use sums::{Bucket, Sums, sum_over};

/// Pixels of a batch, or of a band of one image, that are computed together, at least: few enough that
/// their maps stay in the cache and the cores seldom wait for one another, enough to be worth reading
/// the weights for.
const PIXELS: usize = 4096;
/// Weights for every pixel of such a part, at most, where their gradients are added up as well.
const WEIGHTS_PER_PIXEL: usize = 8192;
/// Rows of a band are a multiple of this: two rows at the coarsest resolution, as many as the
/// convolutions compute together.
const BAND_ROWS: usize = 8;

/// Pixels of a part of a batch to train on, at least.
fn least_pixels(layout: &Layout) -> usize {
    PIXELS.max(layout.size() / WEIGHTS_PER_PIXEL)
}

/// The number of parts of so many images.
fn parts(config: &ModelConfig, images: usize, least_pixels: usize) -> usize {
    let parts = images * config.height * config.width / least_pixels;
    parts.min(images).max(1)
}

/// Shards of a batch of so many images that cost nothing on the CPU: each is of whole parts, such as
/// the batch would be split into in any case.
pub fn free_shards(config: &ModelConfig, images: usize) -> usize {
    let parts = parts(config, images, least_pixels(&Layout::new(config)));
    // The largest power of two that divides the parts, up to 8.
    1 << parts.trailing_zeros().min(3)
}

/// Arrays shaped as the parameters.
type Arrays = Vec<Vec<f32>>;

/// The engine on the CPU.
#[derive(Debug)]
pub struct Cpu {
    config: ModelConfig,
    precision: Precision,
    layout: Layout,
    training: Plan,
    evaluation: Plan,
    /// How batches to train on are shared out.
    sharing: Option<Sharing>,
    /// The state of training.
    state: Option<State>,
    /// The gradients of the last batch.
    gradients: Option<Arrays>,
    /// The weights that the parameters make: of the state in a step, else those to evaluate with.
    weights: Arrays,
    /// Whether they are those to evaluate with.
    weights_loaded: bool,
    /// Memory that nobody uses at the moment.
    memories: Pool<Memory>,
    /// The gradients, as they are summed.
    buckets: Vec<Bucket>,
}

impl Cpu {
    /// An engine for a model, in single precision.
    ///
    /// # Errors
    /// A configuration that no model can have.
    pub fn new(config: &ModelConfig) -> Result<Cpu, ConfigError> {
        Cpu::in_precision(config, Precision::F32)
    }

    /// An engine whose blocks' convolutions multiply in [`Precision::Bf16`], or else in single precision.
    /// On a machine without [the instructions](has_bf16) plain code does what they do, many times slower.
    ///
    /// # Errors
    /// A configuration that no model can have.
    pub fn in_precision(config: &ModelConfig, precision: Precision) -> Result<Cpu, ConfigError> {
        config.validate()?;
        let (layout, training) = (Layout::new(config), Plan::training(config));
        Ok(Cpu {
            config: config.clone(),
            precision,
            buckets: Bucket::all(&training, &layout),
            layout,
            training,
            evaluation: Plan::evaluation(config),
            sharing: None,
            state: None,
            gradients: None,
            weights: Vec::new(),
            weights_loaded: false,
            memories: Pool::default(),
        })
    }

    /// A forward pass over some images of a batch.
    fn execution<'a>(
        &'a self,
        plan: &'a Plan,
        weights: &'a [Vec<f32>],
        part: Part<'a>,
    ) -> Execution<'a> {
        Execution {
            plan,
            config: &self.config,
            weights,
            part,
            above: 0,
            dropout: None,
            precision: self.precision,
            memory: self.memories.take(),
        }
    }

    fn loaded_weights(&self) -> Result<&[Vec<f32>], EngineError> {
        match self.weights_loaded {
            true => Ok(&self.weights),
            false => Err(EngineError::NotLoaded("weights")),
        }
    }

    /// Runs `f` on the logits of parts of a batch, or of bands of them, and gives the results in the
    /// images' order.
    fn evaluate<R: Send>(
        &self,
        batch: Batch,
        f: impl Fn(Part, &[f32]) -> Vec<R> + Sync,
    ) -> Result<Vec<R>, EngineError> {
        let images = 0..batch.len(&self.config)?;
        let parts = self.parts(batch, images, PIXELS);
        let weights = self.loaded_weights()?;
        let results: Vec<Mutex<Vec<R>>> = parts.iter().map(|_| Mutex::default()).collect();
        in_order(parts.len(), |number| {
            let part = parts[number];
            let mut execution = self.execution(&self.evaluation, weights, part);
            execution.forward_in_bands(&self.bands(part), |band, logits| {
                let found = f(band, logits);
                lock(&results[number]).extend(found);
            });
            self.memories.give(execution.memory);
        });
        let results = results.into_iter();
        let results = results.map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(results.flatten().collect())
    }

    /// Keeps the memory of gradients for the next ones.
    fn take_back(&self, mut gradients: Arrays) {
        for bucket in &self.buckets {
            bucket.memories.give(bucket.take(&mut gradients));
        }
    }

    /// The parts of some images of a batch, of `least_pixels` and more.
    fn parts<'b>(
        &self,
        batch: Batch<'b>,
        images: Range<usize>,
        least_pixels: usize,
    ) -> Vec<Part<'b>> {
        let config = &self.config;
        let parts = parts(config, images.len(), least_pixels);
        let part = |range: Range<usize>| Part {
            first: range.start,
            images: range.len(),
            rows: config.height,
            batch: batch.part(config, range),
        };
        let of = |number| share(images.len(), number, parts);
        let places = (0..parts).map(of);
        places
            .map(|place| part(images.start + place.start..images.start + place.end))
            .collect()
    }

    /// The bands that a part is evaluated in: where it is one large image some rows at a time, so that
    /// the maps do not grow with its height. The bits are those of the whole part.
    fn bands<'b>(&self, part: Part<'b>) -> Vec<Part<'b>> {
        let ModelConfig { height, width, .. } = self.config;
        let rows = PIXELS.div_ceil(width).next_multiple_of(BAND_ROWS);
        // Attention sees all of the image above, the coarser map is seen below, and noise is that of a place.
        let whole =
            self.config.attends() || self.config.nr_coarse_codes > 0 || self.config.energy_distance;
        if part.images != 1 || rows >= height || whole {
            return vec![part];
        }
        let values_per_row = self.config.bytes_per_image() / height;
        let bands = part.batch.images.chunks(rows * values_per_row);
        let band = |images: &'b [u8]| Part {
            rows: images.len() / values_per_row,
            batch: Batch {
                images,
                ..part.batch
            },
            ..part
        };
        bands.map(band).collect()
    }

    /// The parts of a batch to train on, shard by shard, and whether each is the last of its shard.
    fn parts_of_shards<'b>(
        &self,
        batch: Batch<'b>,
    ) -> Result<(Vec<Part<'b>>, Vec<bool>), EngineError> {
        let images = batch.len(&self.config)?;
        let least_pixels = least_pixels(&self.layout);
        if self.sharing.is_none() {
            let parts = self.parts(batch, 0..images, least_pixels);
            let last = (1..=parts.len()).map(|number| number == parts.len());
            let last = last.collect();
            return Ok((parts, last));
        }
        let (own, shards) = own_shards(self.sharing.as_ref(), images)?;
        let (mut parts, mut last) = (Vec::new(), Vec::new());
        for shard in shards {
            let here = shard.start - own.start..shard.end - own.start;
            parts.extend(self.parts(batch, here, least_pixels));
            last.resize(parts.len(), false);
            last[parts.len() - 1] = true;
        }
        // Dropout counts in the whole batch.
        parts.iter_mut().for_each(|part| part.first += own.start);
        Ok((parts, last))
    }
}

impl Engine for Cpu {
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
        }
        Ok(())
    }

    fn initialise(
        &self,
        parameters: &mut [Vec<f32>],
        batch: Batch,
        dropout: Option<Dropout>,
    ) -> Result<Vec<f32>, EngineError> {
        expect_parameters(&self.layout, parameters)?;
        // One part: every layer's mean is over the whole batch.
        let part = Part {
            first: 0,
            images: batch.len(&self.config)?,
            rows: self.config.height,
            batch,
        };
        let mut weights = Vec::new();
        weights::make(&self.layout.layers, parameters, &mut weights);
        let mut execution = self.execution(&self.evaluation, &weights, part);
        execution.dropout = dropout;
        init::initialise(&mut execution, parameters);
        let logits = execution.values(self.evaluation.logits).to_vec();
        self.memories.give(execution.memory);
        Ok(logits)
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
        self.state = Some(state);
        self.gradients = None;
        Ok(())
    }

    fn share(&mut self, sharing: Option<Sharing>) -> Result<(), EngineError> {
        self.sharing = sharing;
        Ok(())
    }

    fn unload(&mut self) -> Result<State, EngineError> {
        self.state.take().ok_or(EngineError::NotLoaded("state"))
    }

    fn backward(&mut self, batch: Batch, dropout: Option<Dropout>) -> Result<f64, EngineError> {
        let (parts, last) = self.parts_of_shards(batch)?;
        let state = self.state.as_ref();
        let parameters = &state.ok_or(EngineError::NotLoaded("state"))?.parameters;
        let mut weights = mem::take(&mut self.weights);
        self.weights_loaded = false;
        weights::make(&self.layout.layers, parameters, &mut weights);
        if let Some(gradients) = self.gradients.take() {
            self.take_back(gradients);
        }

        let ranks = self.sharing.as_ref().map(|sharing| &*sharing.ranks);
        let ranks = ranks.filter(|ranks| ranks.count() > 1);
        let nats: Vec<Mutex<f64>> = parts.iter().map(|_| Mutex::default()).collect();
        let (summed, receiver) = channel();
        let sums = Sums::new(&self.buckets, &last, summed);
        let compute = || {
            in_order(parts.len(), |number| {
                let mut gradients = vec![Vec::new(); self.layout.parameters.len()];
                for bucket in &self.buckets {
                    bucket.lend(&self.layout, &mut gradients);
                }
                let mut execution = self.execution(&self.training, &weights, parts[number]);
                execution.dropout = dropout;
                execution.forward();
                *lock(&nats[number]) = execution.likelihood(&mut gradients);
                execution.backward(&mut gradients, |step, gradients| {
                    sums.add(number, step, gradients);
                });
                self.memories.give(execution.memory);
            });
            drop(sums);
        };
        let buckets = match ranks {
            None => {
                compute();
                Ok(receiver.into_iter().collect())
            }
            // What is summed here goes on to be summed over all while the rest is computed.
            Some(ranks) => thread::scope(|scope| {
                let others = scope.spawn(|| sum_over(ranks, receiver));
                compute();
                let buckets = others.join();
                buckets.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }),
        };
        self.weights = weights;
        let buckets: Vec<(usize, Arrays)> = buckets?;

        let mut gradients = vec![Vec::new(); parameters.len()];
        for (number, arrays) in buckets {
            for (&parameter, array) in self.buckets[number].parameters.iter().zip(arrays) {
                gradients[parameter] = array;
            }
        }
        // Those by `g` are made of the others below.
        for (gradient, parameter) in gradients.iter_mut().zip(parameters) {
            gradient.resize(parameter.len(), 0.0);
        }
        let mut total = [sum_of_shards(&nats, &last)];
        if let Some(ranks) = ranks {
            ranks::sum(ranks, &mut total)?;
        }
        let [nats] = total;
        let layers = &self.layout.layers;
        weights::parameter_gradients(layers, parameters, &mut gradients);
        self.gradients = Some(gradients);
        Ok(nats)
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>, EngineError> {
        let gradients = self.gradients.clone();
        gradients.ok_or(EngineError::NotLoaded("gradients"))
    }

    fn update(&mut self, update: &Update) -> Result<(), EngineError> {
        let state = self.state.as_mut();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        let gradients = self.gradients.take();
        let mut gradients = gradients.ok_or(EngineError::NotLoaded("gradients"))?;
        let finite = |values: &Vec<f32>| values.iter().all(|value| value.is_finite());
        let finite = gradients.par_iter().all(finite);
        if finite {
            let matrices = update.muon.iter().flat_map(|_| self.layout.matrices());
            let matrices: HashMap<usize, [usize; 2]> = matrices.collect();
            let moments = state.first.par_iter_mut().zip(&mut state.second);
            let of_each = state.parameters.par_iter_mut().zip(&mut gradients);
            let of_each = of_each.zip(moments).zip(&mut state.average).enumerate();
            of_each.for_each(|(i, (((parameter, gradient), (first, second)), average))| {
                match (update.muon, matrices.get(&i)) {
                    (Some(muon), Some(&shape)) => {
                        let rates = update.adam.rates();
                        muon.update(rates, shape, parameter, gradient, first, average);
                    }
                    _ => update
                        .adam
                        .update(parameter, gradient, first, second, average),
                }
            });
        }
        self.take_back(gradients);
        match finite {
            true => Ok(()),
            false => Err(EngineError::NotANumber),
        }
    }

    fn load_weights(&mut self, parameters: &[Vec<f32>]) -> Result<(), EngineError> {
        expect_parameters(&self.layout, parameters)?;
        weights::make(&self.layout.layers, parameters, &mut self.weights);
        self.weights_loaded = true;
        Ok(())
    }

    fn logits(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        self.evaluate(batch, |_, logits| logits.to_vec())
    }

    fn nats_per_image(&self, batch: Batch) -> Result<Vec<f64>, EngineError> {
        let pixels = self.config.height * self.config.width;
        Ok(per_image(pixels, &self.nats_per_pixel(batch)?))
    }

    fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        let likelihood = Likelihood::of(&self.config);
        let weights = self.loaded_weights()?;
        let distance = |head| EnergyDistance::of(&self.config, head, weights);
        let distance = self.evaluation.head.as_ref().map(distance);
        self.evaluate(batch, |part, logits| match &distance {
            None => likelihood.nats_per_pixel(part.batch.images, logits),
            Some(distance) => {
                let images = part.batch.images;
                distance.per_pixel(Noise::of(None), part.first, images, logits)
            }
        })
    }

    fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        let images = batch.len(&self.config)?;
        let weights = self.loaded_weights()?;
        let part = Part {
            first: 0,
            images,
            rows: self.config.height,
            batch,
        };
        let mut execution = self.execution(&self.evaluation, weights, part);
        let mut maps = BTreeMap::new();
        for (number, operation) in self.evaluation.forward.iter().enumerate() {
            execution.operation(number);
            // Before its memory is another's.
            if self.evaluation.recorded.contains(&operation.to()) {
                maps.insert(operation.to(), execution.values(operation.to()).to_vec());
            }
        }
        self.memories.give(execution.memory);
        let recorded = self.evaluation.recorded.iter();
        Ok(recorded.filter_map(|buffer| maps.remove(buffer)).collect())
    }
}

/// Some images of a batch that follow one another, or a band of one.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    /// Place of the first one in the batch.
    first: usize,
    images: usize,
    /// Rows of each: all, or those of a band of one image.
    rows: usize,
    batch: Batch<'a>,
}

/// Of the parts of a batch, in the order in which gradients are summed.
fn sum_of_shards(parts: &[Mutex<f64>], last: &[bool]) -> f64 {
    let (mut shards, mut shard) = (Tree::default(), None);
    for (part, last) in parts.iter().zip(last) {
        let part = *lock(part);
        let sum = shard.map_or(part, |sum: f64| sum + part);
        shard = Some(sum).filter(|_| !last);
        if *last {
            shards.push(sum, |sum, other| *sum += other);
        }
    }
    shards.sum().unwrap_or(0.0)
}

/// Calls `f` with the numbers up to `count` side by side, begun in order, by no more threads at a
/// time than there are.
fn in_order(count: usize, f: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let workers = count.min(rayon::current_num_threads());
    (0..workers).into_par_iter().with_max_len(1).for_each(|_| {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            f(number);
        }
    });
}

/// Memory that is used again.
#[derive(Debug)]
struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Mutex::new(Vec::new()))
    }
}

impl<T: Default> Pool<T> {
    fn take(&self) -> T {
        lock(&self.0).pop().unwrap_or_default()
    }

    fn give(&self, memory: T) {
        lock(&self.0).push(memory);
    }
}

/// What a lock holds is whole whenever it can be had.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
