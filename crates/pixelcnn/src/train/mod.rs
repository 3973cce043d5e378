//! Training: a loop that one can read in a sitting. Its state is plain numbers, which an engine has
//! while steps are taken.

pub mod checkpoint;
pub mod config;
pub mod metrics;
mod tensorboard;

use std::mem;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pixelcnn_core::engine::State;
use pixelcnn_core::incremental::{Evaluator, EvaluatorError};
use pixelcnn_core::kernels::adam::Adam;
use pixelcnn_core::kernels::pointwise::Dropout;
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::data::{DataError, Dataset};
use crate::device::Device;
use crate::evaluate::{EvaluateError, Evaluation, WrongImages, evaluate, expect_images};
use crate::model::{Batch, EngineError, Network, draw_parameters, initialise};
use crate::picture::{self, PictureError};
use crate::random::{Purpose, generator};
use crate::sample::{Progress, Sampling, sample};
use checkpoint::{CheckpointError, Checkpoints, Moments, TrainState, Unrecorded};
use config::{PolyakStart, RunConfig, RunConfigError, TrainConfig};
use metrics::{Damaged, Metrics, MetricsError, Record, ResumeAt};

/// Training steps that make one line of metrics.
const STEPS_PER_RECORD: u64 = 20;
/// Images evaluated side by side.
const EVALUATION_BATCH: usize = 16;

/// Why training stopped before its end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Images could not be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The test set could not be evaluated.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The metrics could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Samples could not be drawn.
    #[error(transparent)]
    Samples(#[from] EvaluatorError),
    /// A grid of samples could not be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The run's configuration is out of range or could not be written.
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
    #[error(transparent)]
    Images(#[from] WrongImages),
    /// The state to go on from does not belong to this run.
    #[error("the checkpoint {0}: it can't be trained on here")]
    Start(&'static str),
    /// The folder of a new run has checkpoints.
    #[error("`{folder}` has a run already: go on from its checkpoint or choose another folder")]
    Begun {
        /// The run folder.
        folder: PathBuf,
    },
    /// An error stopped the run; no step is lost.
    #[error("{error}; all {step} steps taken are saved")]
    Saved {
        /// Why it stopped.
        error: Box<TrainError>,
        /// Steps taken.
        step: u64,
    },
    /// An error stopped the run, and the last steps could not be saved.
    #[error("{error}; steps {} to {step} could not be saved{}", saved + 1, because(reason))]
    Lost {
        /// Why it stopped.
        error: Box<TrainError>,
        /// Steps taken.
        step: u64,
        /// Steps that the last checkpoint knows.
        saved: u64,
        /// Why they could not be saved, where that is not why it stopped.
        reason: Option<Box<TrainError>>,
    },
}

fn because(reason: &Option<Box<TrainError>>) -> String {
    let reason = reason.as_ref().map(|reason| format!(" ({reason})"));
    reason.unwrap_or_default()
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
    /// Lines of the metrics could not be read any more.
    MetricsDamaged(Damaged),
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
/// interrupted and resumed ends with the same bits as one that was not, and with the same metrics
/// but for the time that things took.
///
/// # Errors
/// See [`TrainError`]; what was saved before stays. Once steps are being taken, an error is reported
/// when the state after the last of them has been saved: as [`TrainError::Saved`], or
/// [`TrainError::Lost`] where that failed. A loss that is not a number is no such error, as the
/// state that led to it is no place to go on from.
pub fn train(
    run: &Path,
    config: &RunConfig,
    mut start: Option<TrainState>,
    data: &Dataset,
    test: &Dataset,
    device: &Device,
    observer: &mut Observer,
) -> Result<Outcome, TrainError> {
    config.validate()?;
    expect_images(&config.model, data)?;
    expect_images(&config.model, test)?;
    let steps_per_epoch = (data.len() / config.train.batch_size) as u64;
    if steps_per_epoch == 0 {
        return Err(TrainError::TooFewImages {
            images: data.len(),
            batch_size: config.train.batch_size,
        });
    }
    if let Some(state) = &start {
        state.expect_config(&config.model)?;
        if state.moments.is_none() {
            return Err(TrainError::Start(
                "has weights alone, without the optimizer's state",
            ));
        }
        if state.position as usize + config.train.batch_size > data.len() {
            return Err(TrainError::Start(
                "is further into the training images than there are",
            ));
        }
    }
    let _lock = checkpoint::lock(run)?;
    let checkpoints = Checkpoints::new(run.join(checkpoint::CHECKPOINTS));
    if start.is_none() && !checkpoints.list()?.is_empty() {
        return Err(TrainError::Begun { folder: run.into() });
    }
    config.write(run)?;
    let resume_at = start.as_ref().map(|state| ResumeAt {
        step: state.step,
        recorded: state.unrecorded.steps < STEPS_PER_RECORD,
        evaluated: state.is_evaluated(),
    });
    let mut saves = Saves {
        checkpoints: &checkpoints,
        last: start.as_ref().map(version),
        at: Instant::now(),
    };
    if let Some(state) = &mut start {
        let newest = checkpoints.list()?.into_iter().next();
        let known = state.run.replace(config.clone());
        // The newest checkpoint is the place that the run goes on from, before anything that was
        // written after it is cleared away.
        match newest == Some(checkpoints.of(state.step)) && known == state.run {
            true => checkpoints.prune(state.step)?,
            false => drop(checkpoints.save(state)?),
        }
    }
    let (mut metrics, damaged) = Metrics::open(run, resume_at)?;
    if let Some(ResumeAt { step, .. }) = resume_at {
        remove_samples_after(step, run)?;
    }
    let state = match start {
        Some(state) => state,
        None => new_state(config, data, device)?,
    };
    let mut trainer = Trainer {
        config,
        data,
        network: Network::of(device.engine(&config.model)?),
        lent: false,
        order: None,
        images: Vec::new(),
        labels: Vec::new(),
        state,
    };
    let last_step = last_step(&config.train, steps_per_epoch);
    tracing::info!(
        step = trainer.state.step,
        last_step,
        steps_per_epoch,
        "training"
    );
    let started = Event::Started {
        step: trainer.state.step,
        last_step,
        steps_per_epoch,
    };
    let mut stop = observer(started).is_break();
    if let Some(damaged) = damaged {
        stop |= observer(Event::MetricsDamaged(damaged)).is_break();
    }
    let mut take_steps = || loop {
        if trainer.state.unrecorded.steps >= STEPS_PER_RECORD {
            metrics.record(&trainer.record())?;
            trainer.state.unrecorded = Unrecorded::default();
        }
        let last = trainer.state.step >= last_step;
        let boundary = trainer.state.position == 0 || last;
        let minutes = saves.at.elapsed().as_secs_f64() / 60.0;
        if stop || boundary || minutes >= config.train.checkpoint_minutes {
            metrics.sync()?;
            stop |= saves.save(trainer.state()?, observer)?.is_break();
        }
        if !stop && boundary && trainer.state.step > 0 {
            let mut review = Review {
                run,
                test,
                last,
                checkpoints: &checkpoints,
                metrics: &mut metrics,
            };
            stop = review.of(&mut trainer, observer)?.is_break();
            // The evaluation is part of the state.
            metrics.sync()?;
            stop |= saves.save(trainer.state()?, observer)?.is_break();
        }
        if stop {
            return Ok(Outcome::Stopped);
        }
        if last {
            return Ok(Outcome::Finished);
        }
        stop = observer(trainer.step()?).is_break();
    };
    let outcome: Result<Outcome, TrainError> = take_steps();
    outcome.map_err(|error| match error {
        TrainError::NotANumber { step, .. } => TrainError::NotANumber {
            step,
            last_good: checkpoints
                .list()
                .ok()
                .and_then(|paths| paths.into_iter().next()),
        },
        error => saves.before(error, &mut trainer),
    })
}

/// Which of a run's states one is.
type Version = (u64, Option<(u64, f64)>, u64);

fn version(state: &TrainState) -> Version {
    let unrecorded = state.unrecorded.steps;
    (state.step, state.last_evaluation, unrecorded)
}

/// What of a run is saved.
struct Saves<'a> {
    checkpoints: &'a Checkpoints,
    /// The state that was saved last.
    last: Option<Version>,
    /// When.
    at: Instant,
}

impl Saves<'_> {
    /// Saves a state, unless it is saved already.
    fn save(
        &mut self,
        state: &TrainState,
        observer: &mut Observer,
    ) -> Result<ControlFlow<()>, TrainError> {
        if self.last == Some(version(state)) {
            return Ok(ControlFlow::Continue(()));
        }
        let (path, step) = (self.checkpoints.save(state)?, state.step);
        self.last = Some(version(state));
        self.at = Instant::now();
        tracing::info!(step, path = %path.display(), "saved a checkpoint");
        Ok(observer(Event::Saved { step, path }))
    }

    /// Saves the last state of a run before the error that stops it is reported.
    fn before(&self, error: TrainError, trainer: &mut Trainer) -> TrainError {
        let Some((saved, ..)) = self.last else {
            return error;
        };
        let step = trainer.state.step;
        let reason = match self.last == Some(version(&trainer.state)) {
            true => None,
            false => match trainer.state() {
                Ok(state) => self.checkpoints.rescue(state).err().map(TrainError::from),
                Err(error) => Some(error.into()),
            },
        };
        let stopped_saving = matches!(error, TrainError::Checkpoint(_));
        let error = Box::new(error);
        match reason {
            Some(reason) if saved < step => TrainError::Lost {
                error,
                step,
                saved,
                reason: Some(reason.into()).filter(|_| !stopped_saving),
            },
            _ => TrainError::Saved { error, step },
        }
    }
}

/// The grid of samples drawn after a step.
fn samples_of(step: u64, run: &Path) -> PathBuf {
    run.join(format!("samples/step-{step:08}.png"))
}

/// Removes the grids of steps that are taken again.
fn remove_samples_after(last: u64, run: &Path) -> Result<(), PictureError> {
    let Ok(entries) = std::fs::read_dir(run.join("samples")) else {
        return Ok(());
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let step = name
            .strip_prefix("step-")
            .and_then(|step| step.parse().ok());
        if step.is_some_and(|step: u64| step > last) {
            let failed = |source| PictureError::Write {
                path: path.clone(),
                source,
            };
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
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
    initialise(model, &mut parameters, batch, dropout, device)?;
    let average = match train.polyak_start {
        PolyakStart::Initialised => parameters.clone(),
        PolyakStart::Drawn => drawn,
    };
    Ok(TrainState {
        run: Some(config.clone()),
        ..TrainState::new(model, train, parameters, average)
    })
}

/// Dropout of a step: the initialisation pass is step 0.
fn dropout(config: &TrainConfig, step: u64) -> Option<Dropout> {
    let mut random = generator(config.seed, Purpose::Dropout, step);
    (config.dropout > 0.0).then(|| Dropout {
        rate: config.dropout,
        seed: random.random(),
        first: 0,
    })
}

impl TrainState {
    /// Takes the arrays out, for an engine to train on.
    ///
    /// # Panics
    /// If the state has no moments.
    pub fn lend_arrays(&mut self) -> State {
        let moments = self.moments.take();
        let Moments { first, second } = moments.expect("a state that is trained on");
        State {
            parameters: mem::take(&mut self.parameters),
            average: mem::take(&mut self.average),
            first,
            second,
        }
    }

    /// Puts them back as the engine gives them.
    pub fn take_arrays(&mut self, arrays: State) {
        let (first, second) = (arrays.first, arrays.second);
        (self.parameters, self.average) = (arrays.parameters, arrays.average);
        self.moments = Some(Moments { first, second });
    }
}

/// The next step of a state: the learning rate decays before it (the original's order).
pub fn next_step(state: &TrainState, config: &TrainConfig) -> Adam {
    Adam {
        learning_rate: state.learning_rate * config.learning_rate_decay,
        step: state.step + 1,
        polyak_decay: config.polyak_decay,
        ..Adam::default()
    }
}

/// The order in which an epoch of a run uses its `images` training images: batch after batch, but
/// for those at the end that do not fill one.
pub fn epoch_order(seed: u64, epoch: u64, images: usize) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..images).collect();
    indices.shuffle(&mut generator(seed, Purpose::Shuffle, epoch));
    indices
}

/// The images of an epoch in the order in which they are used.
struct Order {
    epoch: u64,
    indices: Vec<usize>,
}

struct Trainer<'a> {
    config: &'a RunConfig,
    data: &'a Dataset,
    network: Network,
    /// Whether the network's engine has the state's arrays.
    lent: bool,
    order: Option<Order>,
    images: Vec<u8>,
    labels: Vec<u32>,
    state: TrainState,
}

impl Trainer<'_> {
    /// The state, with the arrays that the engine has while steps are taken.
    fn state(&mut self) -> Result<&mut TrainState, EngineError> {
        if mem::take(&mut self.lent) {
            self.state.take_arrays(self.network.engine().unload()?);
        }
        Ok(&mut self.state)
    }

    /// Reads the next batch of the epoch's order.
    fn read_batch(&mut self) -> Result<(), TrainError> {
        let epoch = self.state.epoch;
        if self.order.as_ref().is_none_or(|order| order.epoch != epoch) {
            let indices = epoch_order(self.state.seed, epoch, self.data.len());
            self.order = Some(Order { epoch, indices });
        }
        let order = &self.order.as_ref().expect("just made").indices;
        let start = self.state.position as usize;
        let batch = &order[start..start + self.config.train.batch_size];
        self.data.read(batch, &mut self.images, &mut self.labels)?;
        Ok(())
    }

    /// The mean of the steps since the last record.
    fn record(&self) -> Record {
        let state = &self.state;
        let Unrecorded {
            steps,
            bits_per_dim,
            seconds,
        } = state.unrecorded;
        let images = steps as f64 * self.config.train.batch_size as f64;
        Record::Train {
            step: state.step,
            epoch: state.epoch,
            train_bits_per_dim: bits_per_dim / steps as f64,
            learning_rate: state.learning_rate,
            images_per_second: images / seconds,
            seconds: state.seconds,
        }
    }

    /// Takes one step.
    fn step(&mut self) -> Result<Event, TrainError> {
        let start = Instant::now();
        let train = &self.config.train;
        self.read_batch()?;
        if !mem::replace(&mut self.lent, true) {
            self.network.engine().load(self.state.lend_arrays())?;
        }
        let dropout = dropout(train, self.state.step + 1);
        let adam = next_step(&self.state, train);
        let batch = Batch {
            images: &self.images,
            labels: &self.labels,
        };
        let nats = match self.network.engine().step(batch, dropout, &adam) {
            Err(EngineError::NotANumber) => {
                return Err(TrainError::NotANumber {
                    step: adam.step,
                    last_good: None,
                });
            }
            nats => nats?,
        };
        let state = &mut self.state;
        (state.step, state.learning_rate) = (adam.step, adam.learning_rate);
        state.images_seen += train.batch_size as u64;
        state.position += train.batch_size as u64;
        // The original drops the images that do not fill a batch.
        if state.position as usize + train.batch_size > self.data.len() {
            state.epoch += 1;
            state.position = 0;
        }
        let bits_per_dim = self
            .config
            .model
            .bits_per_dim(nats / train.batch_size as f64);
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        state.unrecorded.steps += 1;
        state.unrecorded.bits_per_dim += bits_per_dim;
        state.unrecorded.seconds += seconds;
        Ok(Event::Step {
            step: state.step,
            epoch: state.epoch,
            bits_per_dim,
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
        let config = trainer.config;
        trainer.state()?;
        let Trainer { network, state, .. } = trainer;
        let due = |interval| self.last || state.epoch.is_multiple_of(interval);

        if due(config.train.eval_interval) && !state.is_evaluated() {
            network.engine().load_weights(&state.average)?;
            let total = self.test.len();
            let mut progress = |so_far: &Evaluation| {
                let done = so_far.bits_per_dim.len();
                observer(Event::Evaluating { done, total })
            };
            let evaluation = evaluate(network, self.test, total, EVALUATION_BATCH, &mut progress)?;
            let Some(evaluation) = evaluation else {
                return Ok(ControlFlow::Break(()));
            };
            let bits_per_dim = evaluation.mean();
            let best = state.best.is_none_or(|(_, best)| bits_per_dim < best);
            let before = (state.last_evaluation, state.best);
            state.last_evaluation = Some((state.step, bits_per_dim));
            if best {
                state.best = state.last_evaluation;
            }
            let event = Event::Evaluated {
                step: state.step,
                epoch: state.epoch,
                bits_per_dim,
                standard_error: evaluation.standard_error(),
                best,
            };
            let record = Record::Test {
                step: state.step,
                epoch: state.epoch,
                test_bits_per_dim: bits_per_dim,
                standard_error: evaluation.standard_error(),
                seconds: state.seconds,
            };
            let recorded = self.metrics.record(&record).map_err(TrainError::from);
            let kept = recorded.and_then(|()| match best {
                true => Ok(self.checkpoints.save_best(state).map(drop)?),
                false => Ok(()),
            });
            if let Err(error) = kept {
                // The run goes on with the evaluation once more.
                (state.last_evaluation, state.best) = before;
                return Err(error);
            }
            if observer(event).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }

        let path = samples_of(state.step, self.run);
        let newest = self.run.join("samples.png");
        let done = || {
            let contents = std::fs::read(&path).ok();
            contents.is_some() && contents == std::fs::read(&newest).ok()
        };
        if due(config.train.save_interval) && config.train.samples > 0 && !done() {
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
            let evaluator = Evaluator::new(model, &state.average)?;
            let mut progress =
                |Progress { done, total, .. }: Progress| observer(Event::Sampling { done, total });
            let Some(images) = sample(&evaluator, &sampling, &mut progress)? else {
                return Ok(ControlFlow::Break(()));
            };
            let picture = picture::grid(&images, shape, columns, 1, 1)?;
            let folder = self.run.join("samples");
            std::fs::create_dir_all(&folder).map_err(|source| PictureError::Write {
                path: folder,
                source,
            })?;
            picture::write_png(&newest, &picture)?;
            self.metrics.samples(state.step, &picture)?;
            // Last: once it is there, all of it is done.
            picture::write_png(&path, &picture)?;
            return Ok(observer(Event::Sampled { path: newest }));
        }
        Ok(ControlFlow::Continue(()))
    }
}
