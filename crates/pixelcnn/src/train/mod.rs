//! Training: a loop that one can read in a sitting. Its state is plain numbers, which an engine has
//! while steps are taken.

mod augment;
pub mod checkpoints;
pub mod config;
pub mod folder;
pub mod metrics;
pub mod ranks;
pub mod resume;
mod review;
pub mod run;
mod schedule;
pub mod settings;
mod start;
pub mod state;
mod step;
mod tensorboard;

use std::mem;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use pixelcnn_core::ranks::{Alone, RankError, Ranks, Sharing, SharingError};

use crate::data::{DataError, Dataset};
use crate::device::Device;
use crate::evaluate::{EvaluateError, WrongImages, expect_images};
use crate::network::EngineError;
use crate::picture::PictureError;
use crate::sample::DrawError;
use checkpoints::{CheckpointError, Checkpoints};
use config::{RunConfig, RunConfigError};
use metrics::{Damaged, Metrics, MetricsError, ResumeAt};
use ranks::{Order, common, order};
use review::{Review, remove_samples_after};
use start::class_names;
use state::{OtherModel, TrainState, Unrecorded};
use step::Trainer;

pub use schedule::next_step;

/// Training steps that make one line of metrics.
const STEPS_PER_RECORD: u64 = 20;

/// Why training stopped before its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// Images could not be read, or codes that were drawn not written.
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
    /// The state to go on from is of another model.
    #[error(transparent)]
    OtherModel(#[from] OtherModel),
    /// The metrics could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Samples could not be drawn.
    #[error(transparent)]
    Samples(#[from] DrawError),
    /// A grid of samples could not be written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The run's configuration is out of range or could not be written.
    #[error(transparent)]
    Config(#[from] RunConfigError),
    /// The loss or its gradient is not a number.
    #[error(
        "the loss is not a number at step {step}: resume from the last good checkpoint{} with a lower learning rate",
        last_good.as_ref().map(|path| format!(" {}", path.display())).unwrap_or_default()
    )]
    NotANumber {
        /// The step that was being taken.
        step: u64,
        /// Newest checkpoint.
        last_good: Option<PathBuf>,
    },
    /// The data has fewer images than a batch.
    #[error("{images} training images do not fill a batch of {batch_size}: take smaller ones")]
    TooFewImages {
        /// Images in the training set.
        images: usize,
        /// Asked for in a batch.
        batch_size: usize,
    },
    /// The images are not what the model takes.
    #[error(transparent)]
    Images(#[from] WrongImages),
    /// The batch can't be shared out so.
    #[error(transparent)]
    Sharing(#[from] SharingError),
    /// Another rank can't be reached.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// A rank would not compute what rank 0 computes.
    #[error("this rank has {0} than rank 0: give all ranks the same")]
    Ranks(&'static str),
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
#[non_exhaustive]
pub enum Event {
    /// Everything is set up; the first step follows.
    Started {
        /// Steps already taken.
        step: u64,
        /// The step after which the run ends; none where time decides that.
        last_step: Option<u64>,
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
        /// The step after which the run ends, or is expected to where time decides that.
        last_step: u64,
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

/// The training of a model, and the folder for what comes of it: `config.toml`, `checkpoints/`,
/// `metrics.jsonl`, TensorBoard events, `samples.png` and `samples/`.
///
/// Every step is a function of the state before it and of the configuration alone: a run that is
/// interrupted and resumed ends with the same bits as one that was not, and with the same metrics
/// but for the time that things took.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// The run folder; it is made if need be.
    pub folder: &'a Path,
    /// What is trained, and how.
    pub config: &'a RunConfig,
    /// The training images.
    pub images: &'a Dataset,
    /// The test images, on which the averaged parameters are evaluated.
    pub test: &'a Dataset,
    /// Where the network runs.
    pub device: Device,
    /// The ranks that train together, of which rank 0 begins or resumes and the others
    /// [follow](Training::follow); none for a process alone.
    pub ranks: Option<&'a Arc<dyn Ranks>>,
}

impl<'a> Training<'a> {
    /// Trains from the beginning, in a folder that has no run yet.
    ///
    /// # Errors
    /// See [`TrainError`]; what was saved before stays. Once steps are being taken, an error is
    /// reported when the state after the last of them has been saved: as [`TrainError::Saved`], or
    /// [`TrainError::Lost`] where that failed. A loss that is not a number is no such error, as the
    /// state that led to it is no place to go on from.
    pub fn begin(&self, observer: &mut Observer) -> Result<Outcome, TrainError> {
        self.lead(None, true, observer)
    }

    /// Trains from the beginning with a state in place of drawn parameters, as
    /// [`TrainState::of_model`] gives it.
    ///
    /// # Errors
    /// As [`Training::begin`].
    pub fn begin_with(
        &self,
        first: TrainState,
        observer: &mut Observer,
    ) -> Result<Outcome, TrainError> {
        self.lead(Some(first), true, observer)
    }

    /// Goes on from a saved state, to the same end as if the run had never stopped.
    ///
    /// # Errors
    /// As [`Training::begin`].
    pub fn resume(
        &self,
        state: TrainState,
        observer: &mut Observer,
    ) -> Result<Outcome, TrainError> {
        self.lead(Some(state), false, observer)
    }

    fn ranks(&self) -> Arc<dyn Ranks> {
        let alone = || Arc::new(Alone) as Arc<dyn Ranks>;
        self.ranks.map_or_else(alone, Arc::clone)
    }

    /// How batches are shared out.
    fn sharing(&self) -> Result<Sharing, SharingError> {
        let train = &self.config.train;
        Sharing::new(self.ranks(), train.batch_size, train.shards.unwrap_or(1))
    }

    fn trainer(&self, state: TrainState) -> Result<Trainer<'a>, TrainError> {
        Trainer::new(
            self.config,
            self.images,
            state,
            self.device,
            self.sharing()?,
        )
    }

    fn lead(
        &self,
        start: Option<TrainState>,
        begins: bool,
        observer: &mut Observer,
    ) -> Result<Outcome, TrainError> {
        let (first, start) = match begins {
            true => (start, None),
            false => (None, start),
        };
        let outcome = train(self, first, start, observer);
        // However it ended, unless they can't be reached.
        if !outcome
            .as_ref()
            .is_err_and(|error| error.of_rank().is_some())
        {
            ranks::dismiss(&*self.ranks());
        }
        outcome
    }
}

impl TrainError {
    /// An error of this rank, rank 0, that leaves the others where they can't be reached.
    fn of_rank_0(self) -> TrainError {
        match self.of_rank() {
            Some(_) => self,
            None => TrainError::Rank(RankError::Failed {
                rank: 0,
                reason: self.to_string(),
            }),
        }
    }

    /// Of a rank that can't be reached, so that all must end.
    pub fn of_rank(&self) -> Option<&RankError> {
        match self {
            TrainError::Rank(error) | TrainError::Engine(EngineError::Rank(error)) => Some(error),
            TrainError::Saved { error, .. } | TrainError::Lost { error, .. } => error.of_rank(),
            _ => None,
        }
    }
}

/// Goes on from `start`, or begins: with `first`, or else with drawn parameters.
fn train(
    training: &Training,
    first: Option<TrainState>,
    mut start: Option<TrainState>,
    observer: &mut Observer,
) -> Result<Outcome, TrainError> {
    let &Training {
        folder: run,
        config,
        images,
        test,
        device,
        ..
    } = training;
    let ranks = training.ranks();
    training.sharing()?;
    config.validate()?;
    expect_images(&config.model, images)?;
    expect_images(&config.model, test)?;
    let (size, wanted) = (
        images.one_size()?,
        [config.model.height, config.model.width],
    );
    if size != wanted {
        let model = format!("images of {}x{}", wanted[1], wanted[0]);
        let data = images.describe();
        return Err(WrongImages { data, model }.into());
    }
    let steps_per_epoch = config.train.steps_per_epoch(images.len());
    if steps_per_epoch == 0 {
        return Err(TrainError::TooFewImages {
            images: images.len(),
            batch_size: config.train.batch_size,
        });
    }
    let names = class_names(&config.model, images);
    if let Some(state) = start.as_ref().or(first.as_ref()) {
        state.expect_config(&config.model)?;
        if start::differ(&names, &state.class_names) {
            return Err(TrainError::Start(
                "was trained on classes of other names than these images have",
            ));
        }
        if state.moments.is_none() {
            return Err(TrainError::Start(
                "has weights alone, without the optimizer's state",
            ));
        }
        if state.position as usize + config.train.batch_size > images.len() {
            return Err(TrainError::Start(
                "is further into the training images than there are",
            ));
        }
    }
    let _lock = folder::lock(run)?;
    let checkpoints = Checkpoints::new(run.join(folder::CHECKPOINTS));
    if start.is_none() && !checkpoints.list()?.is_empty() {
        return Err(TrainError::Begun { folder: run.into() });
    }
    // Of a run that goes on in a new folder, the state comes first: a folder without one is taken for a
    // run that has not begun.
    let branches = start.is_some() && checkpoints.list()?.is_empty();
    if !branches {
        config.write(run)?;
    }
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
        let was_named = names.is_empty() || names == state.class_names;
        if !was_named {
            state.class_names = names;
        }
        // The newest checkpoint is the place that the run goes on from, before anything that was
        // written after it is cleared away.
        match newest == Some(checkpoints.of(state.step)) && known == state.run && was_named {
            true => checkpoints.prune(state.step)?,
            false => drop(checkpoints.save(state)?),
        }
    }
    if branches {
        config.write(run)?;
    }
    let (mut metrics, damaged) = Metrics::open(run, resume_at)?;
    if let Some(ResumeAt { step, .. }) = resume_at {
        remove_samples_after(step, run)?;
    }
    let state = match start.or(first) {
        Some(state) => TrainState {
            run: Some(config.clone()),
            ..state
        },
        None => start::drawn(config, images, device)?,
    };
    if ranks.count() > 1 {
        let common = common(config, device, images, test)?;
        order(&*ranks, Order::Compare, common.as_bytes())?;
        order(
            &*ranks,
            Order::Load,
            &state.to_bytes().map_err(CheckpointError::from)?,
        )?;
    }
    let mut trainer = training.trainer(state)?;
    let last_step = trainer.last_step();
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
        let by_time = config.train.last_step_by_time(&trainer.state);
        // What time has decided can't be found again.
        let decided = mem::replace(&mut trainer.state.last_step, by_time) != by_time;
        let last_step = trainer.last_step();
        let last = last_step.is_some_and(|last_step| trainer.state.step >= last_step);
        let boundary = trainer.state.position == 0 || last;
        let minutes = saves.at.elapsed().as_secs_f64() / 60.0;
        if stop || boundary || decided || minutes >= config.train.checkpoint_minutes {
            metrics.sync()?;
            stop |= saves.save(trainer.state()?, observer)?.is_break();
        }
        if !stop && boundary && trainer.state.step > 0 {
            let mut review = Review {
                run,
                device,
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
        order(&*ranks, Order::Step, &trainer.orders())?;
        let step = trainer.step().map_err(|error| match error {
            // The others are in the step, and can't be told.
            error if ranks.count() > 1 && !matches!(error, TrainError::NotANumber { .. }) => {
                error.of_rank_0()
            }
            error => error,
        });
        stop = observer(step?).is_break();
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
type Version = (u64, Option<(u64, f64)>, u64, Option<u64>);

fn version(state: &TrainState) -> Version {
    let unrecorded = state.unrecorded.steps;
    (
        state.step,
        state.last_evaluation,
        unrecorded,
        state.last_step,
    )
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
