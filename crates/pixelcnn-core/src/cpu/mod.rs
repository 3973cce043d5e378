//! The engine on the CPU: the plan, carried out by the [kernels](crate::kernels).
//!
//! A batch is split into parts that run side by side, each through all of the plan, so that their
//! maps stay in the cache and the cores seldom wait for one another. The parts, and so the order in
//! which their gradients are summed, follow from the shapes alone: results are the same bits for
//! any number of threads.

mod execution;
mod init;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::BTreeMap;
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use crate::config::{ConfigError, ModelConfig};
use crate::engine::{Batch, Engine, EngineError, State, expect_parameters};
use crate::kernels::adam::Adam;
use crate::kernels::pointwise::Dropout;
use crate::likelihood::{Mixture, from_level};
use crate::network::Layout;
use crate::plan::Plan;
use crate::ranks::{self, Sharing, Tree, share};
use execution::{Execution, Memory};

/// Pixels of a batch that are computed together, at least: few enough that their maps stay in the
/// cache and the cores seldom wait for one another, enough to be worth reading the weights for.
const PIXELS: usize = 4096;
/// Weights for every pixel of such a part, at most, where their gradients are added up as well.
const WEIGHTS_PER_PIXEL: usize = 8192;

/// Pixels of a part of a batch to train on, at least.
fn least_pixels(layout: &Layout) -> usize {
    PIXELS.max(layout.size() / WEIGHTS_PER_PIXEL)
}

/// The number of parts of so many images.
fn parts(config: &ModelConfig, images: usize, least_pixels: usize) -> usize {
    (images * config.height * config.width / least_pixels).max(1)
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
    gradient_memories: Pool<Arrays>,
}

impl Cpu {
    /// An engine for a model.
    ///
    /// # Errors
    /// A configuration that no model can have.
    pub fn new(config: &ModelConfig) -> Result<Cpu, ConfigError> {
        config.validate()?;
        Ok(Cpu {
            config: config.clone(),
            layout: Layout::new(config),
            training: Plan::training(config),
            evaluation: Plan::evaluation(config),
            sharing: None,
            state: None,
            gradients: None,
            weights: Vec::new(),
            weights_loaded: false,
            memories: Pool::default(),
            gradient_memories: Pool::default(),
        })
    }

    fn mixture(&self) -> Mixture {
        Mixture::of(&self.config)
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
            dropout: None,
            memory: self.memories.take(),
        }
    }

    fn loaded_weights(&self) -> Result<&[Vec<f32>], EngineError> {
        match self.weights_loaded {
            true => Ok(&self.weights),
            false => Err(EngineError::NotLoaded("weights")),
        }
    }

    /// Runs `f` on the logits of parts of a batch, and gives the results in the images' order.
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
            execution.forward();
            *lock(&results[number]) = f(part, execution.values(self.evaluation.logits));
            self.memories.give(execution.memory);
        });
        let results = results.into_iter();
        let results = results.map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner));
        Ok(results.flatten().collect())
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
            batch: Batch {
                images: &batch.images[range.start * config.dims()..range.end * config.dims()],
                labels: match config.nr_classes {
                    0 => &[],
                    _ => &batch.labels[range],
                },
            },
        };
        let of = |number| share(images.len(), number, parts);
        let places = (0..parts).map(of);
        places
            .map(|place| part(images.start + place.start..images.start + place.end))
            .collect()
    }

    /// The parts of a batch to train on, shard by shard, and whether each is the last of its shard.
    fn parts_of_shards<'b>(
        &self,
        batch: Batch<'b>,
    ) -> Result<(Vec<Part<'b>>, Vec<bool>), EngineError> {
        let images = batch.len(&self.config)?;
        let least_pixels = least_pixels(&self.layout);
        let Some(sharing) = &self.sharing else {
            let parts = self.parts(batch, 0..images, least_pixels);
            let last = (1..=parts.len()).map(|number| number == parts.len());
            let last = last.collect();
            return Ok((parts, last));
        };
        let own = sharing.images();
        if own.len() != images {
            let share = own.len();
            return Err(EngineError::Share { images, share });
        }
        let (mut parts, mut last) = (Vec::new(), Vec::new());
        for shard in sharing.shards() {
            let here = shard.start - own.start..shard.end - own.start;
            parts.extend(self.parts(batch, here, least_pixels));
            last.resize(parts.len(), false);
            last[parts.len() - 1] = true;
        }
        // Dropout counts in the whole batch.
        parts.iter_mut().for_each(|part| part.first += own.start);
        Ok((parts, last))
    }

    /// Nats and gradients by the weights of a part.
    fn gradients_of(
        &self,
        weights: &[Vec<f32>],
        part: Part,
        dropout: Option<Dropout>,
    ) -> (f64, Arrays) {
        let mut gradients = self.gradient_memories.take();
        if gradients.is_empty() {
            let parameters = self.layout.parameters.iter();
            gradients = parameters
                .map(|parameter| vec![0.0; parameter.len()])
                .collect();
        }
        let mut execution = self.execution(&self.training, weights, part);
        execution.dropout = dropout;
        execution.forward();
        let nats = execution.likelihood();
        execution.backward(&mut gradients);
        self.memories.give(execution.memory);
        (nats, gradients)
    }
}

impl Engine for Cpu {
    fn config(&self) -> &ModelConfig {
        &self.config
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
        self.gradient_memories.give_all(self.gradients.take());

        let sum = Mutex::new(Sum::default());
        in_order(parts.len(), |number| {
            let found = self.gradients_of(&weights, parts[number], dropout);
            let mut sum = lock(&sum);
            sum.waiting.insert(number, found);
            sum.add(&last, &self.gradient_memories);
        });
        let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.weights = weights;
        let sum = sum.shards.sum();
        let (mut nats, mut gradients) = sum.ok_or(EngineError::NotLoaded("gradients"))?;
        if let Some(Sharing { ranks, .. }) = &self.sharing {
            let mut total = [nats];
            ranks::sum(&**ranks, &mut total)?;
            [nats] = total;
            ranks::sum_arrays(&**ranks, &mut gradients)?;
        }
        let layers = &self.layout.layers;
        weights::parameter_gradients(layers, parameters, &mut gradients);
        self.gradients = Some(gradients);
        Ok(nats)
    }

    fn gradients(&self) -> Result<Vec<Vec<f32>>, EngineError> {
        let gradients = self.gradients.clone();
        gradients.ok_or(EngineError::NotLoaded("gradients"))
    }

    fn update(&mut self, adam: &Adam) -> Result<(), EngineError> {
        let state = self.state.as_mut();
        let state = state.ok_or(EngineError::NotLoaded("state"))?;
        let gradients = self.gradients.take();
        let gradients = gradients.ok_or(EngineError::NotLoaded("gradients"))?;
        let finite = |values: &Vec<f32>| values.iter().all(|value| value.is_finite());
        let finite = gradients.par_iter().all(finite);
        if finite {
            for (i, gradient) in gradients.iter().enumerate() {
                adam.update(
                    &mut state.parameters[i],
                    gradient,
                    &mut state.first[i],
                    &mut state.second[i],
                    &mut state.average[i],
                );
            }
        }
        self.gradient_memories.give(gradients);
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
        self.evaluate(batch, |part, logits| {
            self.mixture()
                .nats_per_image(pixels, &part.scaled(), logits)
        })
    }

    fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        self.evaluate(batch, |part, logits| {
            self.mixture().nats_per_pixel(&part.scaled(), logits)
        })
    }

    fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        let images = batch.len(&self.config)?;
        let weights = self.loaded_weights()?;
        let part = Part {
            first: 0,
            images,
            batch,
        };
        let mut execution = self.execution(&self.evaluation, weights, part);
        let mut maps = BTreeMap::new();
        for operation in &self.evaluation.forward {
            execution.operation(operation);
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

/// Some images of a batch that follow one another.
#[derive(Debug, Clone, Copy)]
struct Part<'a> {
    /// Place of the first one in the batch.
    first: usize,
    images: usize,
    batch: Batch<'a>,
}

impl Part<'_> {
    /// Its values scaled to \[-1, 1\].
    fn scaled(&self) -> Vec<f32> {
        let images = self.batch.images.iter();
        images.map(|&level| from_level(level)).collect()
    }
}

/// Nats and gradients of the parts so far, in the order of the images, so that the sum is the same
/// whoever computed them.
#[derive(Default)]
struct Sum {
    /// Of the whole shards.
    shards: Tree<(f64, Arrays)>,
    /// Of the shard that is being summed.
    shard: Option<(f64, Arrays)>,
    /// Number of the part that comes next.
    next: usize,
    /// Those that came before their turn.
    waiting: BTreeMap<usize, (f64, Arrays)>,
}

impl Sum {
    /// Adds all whose turn it is; `last` says of each part whether a shard ends with it.
    fn add(&mut self, last: &[bool], memories: &Pool<Arrays>) {
        let add = |sum: &mut (f64, Arrays), (nats, gradients): (f64, Arrays)| {
            sum.0 += nats;
            // By this thread alone: one that waits for others can be given a part by them, and would
            // then wait for itself here.
            for (sum, gradient) in sum.1.iter_mut().zip(&gradients) {
                for (sum, value) in sum.iter_mut().zip(gradient) {
                    *sum += value;
                }
            }
            memories.give(gradients);
        };
        while let Some(part) = self.waiting.remove(&self.next) {
            match &mut self.shard {
                None => self.shard = Some(part),
                Some(sum) => add(sum, part),
            }
            if last[self.next] {
                let shard = self.shard.take();
                shard
                    .into_iter()
                    .for_each(|shard| self.shards.push(shard, add));
            }
            self.next += 1;
        }
    }
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

    fn give_all(&self, memories: impl IntoIterator<Item = T>) {
        lock(&self.0).extend(memories);
    }
}

/// What a lock holds is whole whenever it can be had.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
