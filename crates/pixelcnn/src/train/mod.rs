//! Training: a loop that one can read in a sitting, whose state is plain numbers on the host.

pub mod checkpoint;
pub mod config;
pub mod metrics;
mod tensorboard;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::tensor::Device;
use pixelcnn_core::kernels::adam::Adam;
use pixelcnn_core::kernels::pointwise::Dropout;
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::data::{DataError, Dataset};
use crate::evaluate::evaluate;
use crate::model::{Batch, Gradients, Network, draw_parameters, initialise};
use crate::picture::{self, PictureError};
use crate::random::{Purpose, generator};
use crate::sample::{Sampling, sample};
use checkpoint::{CheckpointError, Checkpoints, Moments, TrainState};
use config::{PolyakStart, RunConfig, RunConfigError, TrainConfig};
use metrics::{Metrics, MetricsError, Record};

/// Training steps that make one line of metrics.
const STEPS_PER_RECORD: usize = 20;
/// Images evaluated side by side, at least.
const EVALUATION_BATCH: usize = 64;

/// Why training stopped before its end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Images could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The metrics could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A grid of samples could not be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The run's configuration could not be written.
    #[error(transparent)]
    Config(#[from] RunConfigError),
    /// The loss or its gradient is not a number.
    #[error(
        "the loss is not a number at step {step}: resume from the last good checkpoint{} with a lower --learning-rate",
        last_good.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default()
    )]
    NotANumber {
        /// The step that was being taken.
        step: u64,
        /// Newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// The data has fewer images than a batch.
    #[error("{images} training images do not fill a batch of {batch_size}: lower --batch-size")]
    TooFewImages {
        /// Images in the training set.
        images: usize,
        /// Asked for in a batch.
        batch_size: usize,
    },
    /// The images are not what the model takes.
    #[error(
        "{what}: the images are {}x{}x{} with {} classes, the model takes {}x{}x{} with {}",
        images[0], images[1], images[2], images[3], model[0], model[1], model[2], model[3]
    )]
    Shape {
        /// Which data.
        what: String,
        /// Width, height, channels, classes.
        images: [usize; 4],
        /// The same.
        model: [usize; 4],
    },
}

/// What is going on, told as it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Everything is set up; the first step follows.
    Started {
        /// Steps already taken.
        step: u64,
        /// The step after which the run ends.
        last_step: u64,
        /// Steps in an epoch.
        steps_per_epoch: u64,
    },
    /// A step was taken.
    Step {
        /// Its number, from 1.
        step: u64,
        /// Whole epochs done.
        epoch: u64,
        /// Of the step's batch, with dropout, before the update.
        bits_per_dim: f64,
        /// Of the step.
        learning_rate: f64,
        /// Wall-clock time of the step.
        seconds: f64,
    },
    /// Images of the test set evaluated so far.
    Evaluating {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// The whole test set is evaluated, with the averaged parameters.
    Evaluated {
        /// Steps taken.
        step: u64,
        /// Whole epochs done.
        epoch: u64,
        /// Mean over the test set.
        bits_per_dim: f64,
        /// Of that mean.
        standard_error: f64,
        /// Whether it is the lowest so far.
        best: bool,
    },
    /// Pixels of a grid of samples drawn so far.
    Sampling {
        /// So far.
        done: usize,
        /// In all.
        total: usize,
    },
    /// A grid of samples was written.
    Sampled {
        /// The file.
        path: PathBuf,
    },
    /// The state was saved.
    Saved {
        /// Steps taken.
        step: u64,
        /// The file.
        path: PathBuf,
    },
}

/// How training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs or steps are done.
    Finished,
    /// The observer stopped it; the state is saved.
    Stopped,
}

/// Told of every event; breaking stops the run after saving its state.
pub type Observer<'a> = dyn FnMut(Event) -> ControlFlow<()> + 'a;

/// Trains a model in the folder `run`: from the beginning where `start` is `None`, or on from a
/// saved state. The folder then holds `config.toml`, `checkpoints/`, `metrics.jsonl`, TensorBoard
/// events, `samples.png` and `samples/`.
///
/// Every step is a function of the state before it and of the configuration alone: a run that is
/// interrupted and resumed ends with the same bits as one that was not.
///
/// # Errors
/// See [`TrainError`]; what was saved before stays.
pub fn train(
    run: &Path,
    config: &RunConfig,
    start: Option<TrainState>,
    data: &Dataset,
    test: &Dataset,
    device: &Device,
    observer: &mut Observer,
) -> Result<Outcome, TrainError> {
    fits(config, data)?;
    fits(config, test)?;
    let steps_per_epoch = (data.len() / config.train.batch_size) as u64;
    if steps_per_epoch == 0 {
        return Err(TrainError::TooFewImages {
            images: data.len(),
            batch_size: config.train.batch_size,
        });
    }
    let _lock = checkpoint::lock(run)?;
    config.write(run)?;
    let checkpoints = Checkpoints::new(run.join("checkpoints"));
    let mut metrics = Metrics::open(run, start.as_ref().map(|state| state.step))?;
    let mut recent = Vec::new();
    let resumed = start
        .as_ref()
        .map(|state| (state.step, state.last_evaluation));
    let state = match start {
        Some(state) => {
            state.expect_config(&config.model)?;
            state
        }
        None => new_state(config, data, device)?,
    };
    let mut trainer = Trainer {
        config,
        data,
        device,
        order: None,
        images: Vec::new(),
        labels: Vec::new(),
        state,
    };
    let last_step = last_step(&config.train, steps_per_epoch);
    let started = Event::Started {
        step: trainer.state.step,
        last_step,
        steps_per_epoch,
    };
    let mut stop = observer(started).is_break();
    let mut saved = resumed;
    let mut saved_at = Instant::now();
    loop {
        let boundary = trainer.state.position == 0 || trainer.state.step >= last_step;
        if !stop && boundary && trainer.state.step > 0 {
            let last = trainer.state.step >= last_step;
            let mut review = Review {
                run,
                test,
                last,
                checkpoints: &checkpoints,
                metrics: &mut metrics,
            };
            stop = review.of(&mut trainer, observer)?.is_break();
        }

        let state = &trainer.state;
        let minutes = saved_at.elapsed().as_secs_f64() / 60.0;
        let due = stop || boundary || minutes >= config.train.checkpoint_minutes;
        if due && saved != Some((state.step, state.last_evaluation)) {
            let path = checkpoints.save(state)?;
            saved = Some((state.step, state.last_evaluation));
            saved_at = Instant::now();
            let step = state.step;
            stop |= observer(Event::Saved { step, path }).is_break();
        }
        if stop {
            return Ok(Outcome::Stopped);
        }
        if state.step >= last_step {
            return Ok(Outcome::Finished);
        }

        let report = trainer.step().map_err(|error| match error {
            TrainError::NotANumber { step, .. } => TrainError::NotANumber {
                step,
                last_good: checkpoints
                    .list()
                    .ok()
                    .and_then(|paths| paths.into_iter().next()),
            },
            error => error,
        })?;
        recent.push(report.clone());
        if recent.len() == STEPS_PER_RECORD {
            metrics.record(&trainer.record(&recent))?;
            recent.clear();
        }
        stop = observer(report).is_break();
    }
}

fn last_step(config: &TrainConfig, steps_per_epoch: u64) -> u64 {
    let by_epochs = config.epochs.saturating_mul(steps_per_epoch);
    match config.steps {
        0 => by_epochs,
        steps => steps.min(by_epochs),
    }
}

/// The state before the first step.
fn new_state(
    config: &RunConfig,
    data: &Dataset,
    device: &Device,
) -> Result<TrainState, TrainError> {
    let (model, train) = (&config.model, &config.train);
    let drawn = draw_parameters(model, train.seed);
    let mut indices: Vec<usize> = (0..data.len()).collect();
    let mut random = generator(train.seed, Purpose::InitBatch, 0);
    let (indices, _) = indices.partial_shuffle(&mut random, train.init_batch_size);
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    data.read(indices, &mut images, &mut labels)?;
    let batch = Batch {
        images: &images,
        labels: &labels,
    };
    let mut parameters = drawn.clone();
    let dropout = dropout(train, 0);
    initialise(model, &mut parameters, batch, dropout, device);
    let zeros: Vec<Vec<f32>> = drawn.iter().map(|values| vec![0.0; values.len()]).collect();
    Ok(TrainState {
        config: model.clone(),
        step: 0,
        epoch: 0,
        position: 0,
        learning_rate: train.learning_rate,
        seed: train.seed,
        images_seen: 0,
        seconds: 0.0,
        last_evaluation: None,
        best: None,
        average: match train.polyak_start {
            PolyakStart::Initialised => parameters.clone(),
            PolyakStart::Drawn => drawn,
        },
        parameters,
        moments: Some(Moments {
            first: zeros.clone(),
            second: zeros,
        }),
    })
}

/// Dropout of a step: the initialisation pass is step 0.
fn dropout(config: &TrainConfig, step: u64) -> Option<Dropout> {
    let mut random = generator(config.seed, Purpose::Dropout, step);
    (config.dropout > 0.0).then(|| Dropout {
        rate: config.dropout,
        seed: random.random(),
    })
}

/// Checks that images are what the model takes.
fn fits(config: &RunConfig, data: &Dataset) -> Result<(), TrainError> {
    let model = &config.model;
    let conditional = model.nr_classes > 0;
    let of_data = [
        data.width(),
        data.height(),
        data.channels(),
        data.nr_classes(),
    ];
    let of_model = [model.width, model.height, model.channels, model.nr_classes];
    let compared = if conditional { 4 } else { 3 };
    if of_data[..compared] == of_model[..compared] {
        return Ok(());
    }
    Err(TrainError::Shape {
        what: data.describe(),
        images: of_data,
        model: of_model,
    })
}

/// One optimizer step on a state: the learning rate's decay, Adam and the Polyak average
/// (the original's order).
///
/// # Panics
/// If the state has no moments, or the gradients are not shaped as its parameters.
pub fn update(state: &mut TrainState, config: &TrainConfig, gradients: &[Vec<f32>]) {
    state.step += 1;
    state.learning_rate *= config.learning_rate_decay;
    let adam = Adam {
        learning_rate: state.learning_rate,
        step: state.step,
        polyak_decay: config.polyak_decay,
        ..Adam::default()
    };
    let moments = state.moments.as_mut().expect("a state that is trained on");
    assert_eq!(gradients.len(), state.parameters.len());
    for (i, gradient) in gradients.iter().enumerate() {
        adam.update(
            &mut state.parameters[i],
            gradient,
            &mut moments.first[i],
            &mut moments.second[i],
            &mut state.average[i],
        );
    }
}

/// The images of an epoch in the order in which they are used.
struct Order {
    epoch: u64,
    indices: Vec<usize>,
}

struct Trainer<'a> {
    config: &'a RunConfig,
    data: &'a Dataset,
    device: &'a Device,
    order: Option<Order>,
    images: Vec<u8>,
    labels: Vec<u32>,
    state: TrainState,
}

impl Trainer<'_> {
    /// Reads the next batch of the epoch's order.
    fn read_batch(&mut self) -> Result<(), TrainError> {
        let epoch = self.state.epoch;
        if self.order.as_ref().is_none_or(|order| order.epoch != epoch) {
            let mut indices: Vec<usize> = (0..self.data.len()).collect();
            indices.shuffle(&mut generator(self.state.seed, Purpose::Shuffle, epoch));
            self.order = Some(Order { epoch, indices });
        }
        let order = &self.order.as_ref().expect("just made").indices;
        let start = self.state.position as usize;
        let batch = &order[start..start + self.config.train.batch_size];
        self.data.read(batch, &mut self.images, &mut self.labels)?;
        Ok(())
    }

    /// The mean of some steps, the last of which was just taken.
    fn record(&self, steps: &[Event]) -> Record {
        let (mut bits, mut time) = (0.0, 0.0);
        for step in steps {
            if let Event::Step {
                bits_per_dim,
                seconds,
                ..
            } = step
            {
                bits += bits_per_dim;
                time += seconds;
            }
        }
        Record::Train {
            step: self.state.step,
            epoch: self.state.epoch,
            train_bits_per_dim: bits / steps.len() as f64,
            learning_rate: self.state.learning_rate,
            images_per_second: (steps.len() * self.config.train.batch_size) as f64 / time,
            seconds: self.state.seconds,
        }
    }

    /// Takes one step.
    fn step(&mut self) -> Result<Event, TrainError> {
        let start = Instant::now();
        let train = &self.config.train;
        self.read_batch()?;
        let dropout = dropout(train, self.state.step + 1);
        let network = Network::new(&self.config.model, &self.state.parameters, self.device);
        let batch = Batch {
            images: &self.images,
            labels: &self.labels,
        };
        let Gradients { nats, gradients } = network.gradients(batch, dropout);
        drop(network);
        let finite = |values: &Vec<f32>| values.iter().all(|value| value.is_finite());
        if !nats.is_finite() || !gradients.iter().all(finite) {
            return Err(TrainError::NotANumber {
                step: self.state.step + 1,
                last_good: None,
            });
        }
        let state = &mut self.state;
        update(state, train, &gradients);
        state.images_seen += train.batch_size as u64;
        state.position += train.batch_size as u64;
        // The original drops the images that do not fill a batch.
        if state.position as usize + train.batch_size > self.data.len() {
            state.epoch += 1;
            state.position = 0;
        }
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        Ok(Event::Step {
            step: state.step,
            epoch: state.epoch,
            bits_per_dim: self
                .config
                .model
                .bits_per_dim(nats / train.batch_size as f64),
            learning_rate: state.learning_rate,
            seconds,
        })
    }
}

/// What is done at the end of an epoch, with the averaged parameters.
struct Review<'a> {
    run: &'a Path,
    test: &'a Dataset,
    last: bool,
    checkpoints: &'a Checkpoints,
    metrics: &'a mut Metrics,
}

impl Review<'_> {
    fn of(
        &mut self,
        trainer: &mut Trainer,
        observer: &mut Observer,
    ) -> Result<ControlFlow<()>, TrainError> {
        let Trainer { config, device, .. } = *trainer;
        let state = &mut trainer.state;
        let due = |interval| self.last || state.epoch.is_multiple_of(interval);
        let network = Network::new(&config.model, &state.average, device);

        let evaluated = state.last_evaluation.map(|(step, _)| step) == Some(state.step);
        if due(config.train.eval_interval) && !evaluated {
            let total = self.test.len();
            let batch_size = config.train.batch_size.max(EVALUATION_BATCH);
            let mut progress = |done| observer(Event::Evaluating { done, total });
            let Some(evaluation) = evaluate(&network, self.test, batch_size, &mut progress)? else {
                return Ok(ControlFlow::Break(()));
            };
            let bits_per_dim = evaluation.mean();
            let best = state.best.is_none_or(|(_, best)| bits_per_dim < best);
            state.last_evaluation = Some((state.step, bits_per_dim));
            if best {
                state.best = state.last_evaluation;
                self.checkpoints.save_best(state)?;
            }
            let event = Event::Evaluated {
                step: state.step,
                epoch: state.epoch,
                bits_per_dim,
                standard_error: evaluation.standard_error(),
                best,
            };
            self.metrics.record(&Record::Test {
                step: state.step,
                epoch: state.epoch,
                test_bits_per_dim: bits_per_dim,
                standard_error: evaluation.standard_error(),
                seconds: state.seconds,
            })?;
            if observer(event).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }

        let path = self.run.join(format!("samples/step-{:08}.png", state.step));
        if due(config.train.save_interval) && config.train.samples > 0 && !path.exists() {
            let images = config.train.samples;
            let model = &config.model;
            let shape = [images, model.height, model.width, model.channels];
            let columns = images.isqrt().max(1);
            let classes = config.model.nr_classes.max(1);
            let sampling = Sampling {
                labels: (0..images).map(|image| (image % classes) as u32).collect(),
                temperature: 1.0,
                seed: state.seed,
            };
            let total = config.model.height * config.model.width;
            let mut progress = |done| observer(Event::Sampling { done, total });
            let Some(images) = sample(&network, &sampling, &mut progress) else {
                return Ok(ControlFlow::Break(()));
            };
            let picture = picture::grid(&images, shape, columns, 1, 1)?;
            picture::write_png(&path, &picture)?;
            let newest = self.run.join("samples.png");
            picture::write_png(&newest, &picture)?;
            self.metrics.samples(state.step, &picture)?;
            return Ok(observer(Event::Sampled { path: newest }));
        }
        Ok(ControlFlow::Continue(()))
    }
}
