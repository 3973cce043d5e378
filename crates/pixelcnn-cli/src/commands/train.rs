//! `pixelcnn train`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pixelcnn::data::{Baselines, DataConfig, Dataset, baselines};
use pixelcnn::device::{self, Device, Precision};
use pixelcnn::network::Layout;
use pixelcnn::train::checkpoints::CheckpointError;
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::folder;
use pixelcnn::train::metrics::Damaged;
use pixelcnn::train::ranks::{announce, announced, dismiss};
use pixelcnn::train::resume::{ResumeError, Resumed, newest, remedy, resume};
use pixelcnn::train::settings::{ModelSettings, Settings};
use pixelcnn::train::state::TrainState;
use pixelcnn::train::{Event, Outcome, TrainError, Training};

use crate::device::DeviceFlags;
use crate::ranks::{GpuFlags, Team, together};
use crate::settings::{DataFlags, Flags, preset_name};
use crate::terminal::{
    Bar, INTERRUPTED, Result, catch_interrupts, counted, duration, grouped, interrupted, listed,
    note, note_dropped, opening, quoted, say,
};
use crate::trained::{Trained, offer};

/// Train a model, or go on with a run that stopped.
///
/// A run is a folder: config.toml, checkpoints/, metrics.jsonl, TensorBoard events, samples.png (of a
/// model of codes samples.npy). It
/// begins with a preset or a config file; every flag below overrides one value of it. Ctrl-C saves
/// and leaves, and so does an error such as a full disk; under nohup a run outlives its terminal.
/// --resume goes on exactly where the run stopped, after a crash from its last checkpoint, and ends
/// with the same parameters and metrics as a run that never stopped. A run's config.toml is changed
/// by flags: one that was edited or damaged is held against the checkpoint, and refused where it
/// differs.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Train {
    /// Folder for the new run [default: runs/PRESET-N, the first N that is free]
    #[arg(value_name = "RUN", conflicts_with_all = ["save_dir", "resume"])]
    run: Option<PathBuf>,
    /// The same as RUN
    #[arg(long, value_name = "RUN", conflicts_with = "resume")]
    save_dir: Option<PathBuf>,
    /// Settings to begin with
    #[arg(long, value_name = "NAME", value_parser = preset_name(), default_value = "quick")]
    #[arg(conflicts_with = "resume")]
    preset: String,
    /// A file of settings to begin with instead of a preset, such as a run's config.toml; what it
    /// leaves out is as in the original
    #[arg(long, value_name = "FILE", conflicts_with_all = ["preset", "resume"])]
    config: Option<PathBuf>,
    /// Begin with the weights of a trained model: a run folder (its newest checkpoint), a checkpoint file,
    /// exported weights or shipped:cifar10. The run's model is like that one, whatever the preset says of
    /// models; other flags change size, classes and augmentation alone (--class-conditional=false leaves
    /// classes away), and new classes begin as the mean of those that it knows
    #[arg(long, value_name = "RUN|FILE", conflicts_with = "resume")]
    init_from: Option<PathBuf>,
    /// Go on with a run: with its own settings, of which those for learning rates, length, shards,
    /// saving and measuring can be overridden, and the place of images that have moved
    #[arg(long, value_name = "RUN")]
    resume: Option<PathBuf>,
    /// The checkpoint to go on from [default: the newest of the run]
    #[arg(long, value_name = "FILE", requires = "resume")]
    from: Option<PathBuf>,
    /// Train for so many more steps and no longer, with the learning rate falling to nothing; after an
    /// interruption, go on without this flag
    #[arg(long, value_name = "N", requires = "resume")]
    #[arg(conflicts_with_all = ["cooldown", "epochs", "steps", "hours"])]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    cooldown_steps: Option<u64>,
    /// Go on in a new folder: the run that is resumed stays as it is
    #[arg(long, value_name = "NEW", requires = "resume")]
    output: Option<PathBuf>,
    #[command(flatten)]
    ranks: GpuFlags,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    data: DataFlags,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn train
      a small model of CIFAR-10 in a few minutes, in runs/quick-1
  pixelcnn train --preset small --class-conditional --save-dir runs/classes
      a larger one overnight that can be sampled by class
  pixelcnn train --data photos --size 32 --epochs 50 --steps 0
      on a folder of pictures, each cropped and resized to 32x32
  pixelcnn train --data photos --crop 64 --epochs 50 --steps 0
      on parts of them, as large as they are
  pixelcnn train --init-from shipped:cifar10 --data photos --size 32 --learning-rate 0.001
      what the shipped model knows, and then what is in these pictures
  pixelcnn train --resume runs/quick-1 --steps 5000
      further than it was to go at first
  pixelcnn train --resume runs/small-1 --cooldown-steps 4000 --output runs/small-1-cooled
      what the run is worth by now: a branch whose learning rate falls to nothing";

impl Train {
    /// Runs the command, as one of the ranks that train together.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        together(self.ranks, |team| match team.leads() {
            true => self.lead(device, team),
            false => follow(device, team),
        })
    }

    /// Trains, and says how it goes.
    fn lead(&self, device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
        let prepared = self.prepare(device, team);
        let (device, (run, config, start, train, test), baselines) =
            prepared.inspect_err(|_| dismiss(&*team.ranks))?;
        let mut display = Display::new(&config, device.precision(), baselines);
        let mut observer = |event| {
            display.show(event);
            interrupted()
        };
        let training = Training {
            folder: &run,
            config: &config,
            images: &train,
            test: &test,
            device,
            ranks: Some(&team.ranks),
        };
        let outcome = match start {
            None => training.begin(&mut observer),
            Some(state) if self.init_from.is_some() => training.begin_with(state, &mut observer),
            Some(state) => training.resume(state, &mut observer),
        };
        let unreachable = outcome
            .as_ref()
            .is_err_and(|error| error.of_rank().is_some());
        let outcome = outcome.map_err(|error| match error {
            TrainError::Saved { .. } | TrainError::Lost { .. } => {
                format!("{error}: to go on: {}", going_on(&run, device.precision())).into()
            }
            error => Box::<dyn Error>::from(error),
        });
        if let (true, Err(error)) = (unreachable, &outcome) {
            drop(display);
            note(format_args!("pixelcnn: {error}"));
            team.abort(1);
        }
        let outcome = outcome?;
        let summary = display.summary(&run, outcome);
        drop(display);
        // The results are safe in the run's folder, whoever reads them here.
        let _ = say(summary);
        Ok(match outcome {
            Outcome::Finished => ExitCode::SUCCESS,
            Outcome::Stopped => ExitCode::from(INTERRUPTED),
        })
    }

    /// Opens all that a training needs, says what it is, and tells the other ranks.
    fn prepare(&self, device: &DeviceFlags, team: &Team) -> Result<(Device, Start, Baseline)> {
        let found = device.find_for(team)?;
        let (run, mut config, start, train, test) = match &self.resume {
            Some(run) => self.resume(run)?,
            None => self.begin()?,
        };
        let device = device.for_loss_of(&config.model, found)?;
        let ranks = team.ranks.count();
        if self.resume.is_none() {
            let free = device.free_shards(&config.model, config.train.batch_size);
            config.train.shards.get_or_insert(free.max(ranks));
        }

        let layout = Layout::new(&config.model);
        let name = device::devices()?
            .into_iter()
            .find(|found| found.device.to_string() == device.to_string());
        let name = name
            .map(|found| format!(", {}", found.name))
            .unwrap_or_default();
        let precision = match device.precision() {
            Precision::F32 => String::new(),
            precision => format!(", in {precision}"),
        };
        say(format_args!("device  {device}{name}{precision}"))?;
        say(format_args!("data    {}", train.describe()))?;
        say(format_args!("        {}", test.describe()))?;
        say(format_args!(
            "model   {} parameters, {} multiply-adds per image",
            grouped(layout.size() as u64),
            grouped(layout.multiply_adds)
        ))?;
        let baselines = baselines(&train, &test)?.map(|Baselines { histogram, bigram }| {
            format!("a histogram {histogram:.3}, a table of pairs {bigram:.3}")
        });
        if let Some(baselines) = &baselines {
            say(format_args!(
                "codes   {}: {baselines} bits/code on the test codes",
                grouped(config.model.nr_codes as u64)
            ))?;
        }
        let from = match (&start, &self.init_from) {
            (_, Some(model)) => format!(", with the weights of {}", model.display()),
            (Some(state), None) => format!(", on from step {}", grouped(state.step)),
            (None, None) => String::new(),
        };
        say(format_args!("run     {}{from}", run.display()))?;

        if ranks > 1 {
            say(format_args!("ranks   {ranks}"))?;
        }
        let shards = config.train.shards.unwrap_or(1);
        let free = ranks * device.free_shards(&config.model, config.train.batch_size / ranks);
        if shards > free.max(ranks) {
            note(format_args!(
                "a batch is cut into {shards} shards, which takes longer here than {free}: with \
                 --shards {free} sums are rounded otherwise"
            ));
        }
        catch_interrupts("finishing this step, then saving")?;
        announce(&*team.ranks, &run, &config)?;
        Ok((device, (run, config, start, train, test), baselines))
    }

    /// A new run in a folder of its own.
    fn begin(&self) -> Result<Start> {
        let mut settings = match &self.config {
            Some(path) => Settings::read(path)?,
            None => Settings::preset(&self.preset)?,
        };
        let model = match &self.init_from {
            Some(path) => Some(Trained::open(Some(path), "train --init-from")?.into_model()),
            None => None,
        };
        // A config file may say nothing of the model.
        let is_said = self.config.is_some() && settings.model != ModelSettings::default();
        if let (Some(model), false) = (&model, is_said) {
            settings.model = ModelSettings::of(&model.config);
        }
        self.flags.apply(&mut settings);
        self.data.apply(&mut settings.data);
        settings.validate()?;
        settings.data.codes = settings.model([4, 4, 1, 0]).nr_code_maps();
        let chosen = self.run.as_ref().or(self.save_dir.as_ref());
        if let Some(run) = chosen {
            expect_new(run)?;
        }

        let (train, test) = open_splits(&settings.data)?;
        let config = settings.run(&train)?;
        let start = match (model, &self.init_from) {
            (Some(model), Some(path)) => {
                let start = TrainState::of_model(model, &config, &train);
                Some(start.map_err(|error| format!("--init-from {}: {error}", path.display()))?)
            }
            _ => None,
        };
        let run = match (chosen, &self.config) {
            (Some(run), _) => run.clone(),
            (None, Some(file)) => {
                folder::first_free(&file.file_stem().unwrap_or_default().to_string_lossy())
            }
            (None, None) => folder::first_free(&self.preset),
        };
        Ok((run, config, start, train, test))
    }

    /// A run that goes on.
    fn resume(&self, run: &Path) -> Result<Start> {
        let mut start = match &self.from {
            Some(file) => Some(TrainState::read(file)?),
            None => newest(run).map_err(|error| {
                offer(error, run, |whole| {
                    let (run, whole) = (quoted(run), quoted(whole));
                    format!("pixelcnn train --resume {run} --from {whole}")
                })
            })?,
        };
        let branches = self.output.is_some() || self.cooldown_steps.is_some();
        if start.is_none() && branches {
            let checkpoint = CheckpointError::Empty { folder: run.into() };
            return Err(format!("{checkpoint}: there is no run to go on from").into());
        }
        let mut config = self.settings(run, start.as_mut())?;
        if let (Some(new), Some(state)) = (&self.output, &mut start) {
            expect_new(new)?;
            // The best of the other folder is not in this one.
            state.best = None;
        }
        let (train, test) = open_splits(&config.data)?;
        if let (Some(steps), Some(state)) = (self.cooldown_steps, &start) {
            let steps_per_epoch = config.train.steps_per_epoch(train.len());
            config.train.cool_down(steps, steps_per_epoch, state);
        }
        let run = self.output.as_deref().unwrap_or(run);
        Ok((run.to_owned(), config, start, train, test))
    }

    /// The settings with which a run goes on from `start`.
    fn settings(&self, run: &Path, start: Option<&mut TrainState>) -> Result<RunConfig> {
        let change = |config: &mut RunConfig| self.flags.change(&self.data, config);
        let resumed = resume(run, start, &change, self.flags.learning_rate());
        let Resumed { config, missing } = resumed.map_err(in_flags)?;
        self.flags.expect_classes(&config)?;
        if let Some(path) = missing {
            note(format_args!(
                "`{}` is missing: it is written again from the checkpoint",
                path.display()
            ));
        }
        Ok(config)
    }
}

/// What was found, with the flags that help.
fn in_flags(error: ResumeError) -> Box<dyn Error> {
    let flag = |name: &str| format!("--{}", name.replace('_', "-"));
    match error {
        ResumeError::Fixed { name, value } => {
            let flag = flag(&name);
            format!(
                "{flag}: the run was begun with {value}, which --resume cannot change: leave {flag} out or \
                 begin a new run"
            )
            .into()
        }
        ResumeError::Edited {
            path,
            differing,
            known,
        } => {
            let differing = differing.iter().map(|(setting, free)| {
                let change = match free {
                    true => {
                        let flag = format!("{} {}", flag(&setting.name), setting.here);
                        // A flag that is a switch has no value.
                        format!(" (to change it: {})", flag.trim_end_matches(" true"))
                    }
                    false => String::new(),
                };
                format!("{setting}{change}")
            });
            let differing = differing.collect::<Vec<_>>().join("; ");
            format!("`{}`: {differing}: {}", path.display(), remedy(known)).into()
        }
        error => error.into(),
    }
}

/// Takes part in what rank 0 trains.
fn follow(device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
    if let Some((folder, config)) = announced(&*team.ranks)? {
        let device = device.for_loss_of(&config.model, device.find_for(team)?)?;
        let (images, test) = Dataset::open_splits(&config.data)?;
        let training = Training {
            folder: &folder,
            config: &config,
            images: &images,
            test: &test,
            device,
            ranks: Some(&team.ranks),
        };
        training.follow(&mut interrupted)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Run folder, configuration, state to start from, training and test images.
type Start = (PathBuf, RunConfig, Option<TrainState>, Dataset, Dataset);

/// What tables of codes need, told beside what a model of codes does.
type Baseline = Option<String>;

/// Opens training and test images, and tells what of them is dropped.
fn open_splits(data: &DataConfig) -> Result<(Dataset, Dataset)> {
    let (train, test) = Dataset::open_splits_with(data, &mut opening())?;
    let mut dropped = train.dropped();
    dropped += test.dropped();
    note_dropped(dropped);
    Ok((train, test))
}

/// Checks that a folder is not there yet or has nothing of use.
pub fn expect_new(run: &Path) -> Result {
    match folder::is_free(run) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!(
            "{}: already there and not an empty folder: choose another, \
             or go on with its run: pixelcnn train --resume {}",
            run.display(),
            quoted(run)
        )
        .into()),
        Err(error) => Err(format!("{}: {error}: choose another folder", run.display()).into()),
    }
}

/// What is seen of a training.
struct Display<'a> {
    config: &'a TrainConfig,
    precision: Precision,
    unit: &'static str,
    baseline: Baseline,
    bar: Bar,
    first_step: u64,
    step: u64,
    last_step: u64,
    steps_per_epoch: u64,
    /// Of the training batches, in bits/dim.
    loss: Smoothed,
    /// Of a step.
    seconds: Smoothed,
    /// Mean and standard error of the last evaluation.
    test: Option<(f64, f64)>,
    samples: Option<PathBuf>,
}

impl Display<'_> {
    fn new(config: &RunConfig, precision: Precision, baseline: Baseline) -> Display<'_> {
        Display {
            config: &config.train,
            precision,
            unit: config.model.unit(),
            baseline,
            bar: Bar::new(),
            first_step: 0,
            step: 0,
            last_step: 0,
            steps_per_epoch: 0,
            loss: Smoothed::default(),
            seconds: Smoothed::default(),
            test: None,
            samples: None,
        }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Started {
                step,
                last_step,
                steps_per_epoch,
            } => {
                (self.first_step, self.step) = (step, step);
                self.steps_per_epoch = steps_per_epoch;
                self.last_step = last_step.unwrap_or_default();
            }
            Event::MetricsDamaged(Damaged { lines, original }) => self.bar.note(format_args!(
                "metrics.jsonl: {} left out ({}); as it was, it is in {}",
                counted(lines.len(), "damaged line"),
                listed(&lines),
                original.display()
            )),
            Event::Step {
                step,
                epoch,
                bits_per_dim,
                seconds,
                last_step,
                ..
            } => {
                (self.step, self.last_step) = (step, last_step);
                self.loss.add(bits_per_dim);
                self.seconds.add(seconds);
                let left = self.last_step.saturating_sub(step) as f64 * self.seconds.mean();
                self.bar.show(step, self.last_step, || {
                    format!(
                        "epoch {}  step {step}/{}  {:.3} {}  {:.1} images/s  {} left",
                        epoch + 1,
                        self.last_step,
                        self.loss.mean(),
                        self.unit,
                        self.config.batch_size as f64 / self.seconds.mean(),
                        duration(left.round()),
                    )
                });
            }
            Event::Evaluating { done, total } => {
                self.bar.show(self.step, self.last_step, || {
                    format!("evaluating: {done} of {total} test images")
                });
            }
            Event::Evaluated {
                step,
                epoch,
                bits_per_dim,
                standard_error,
                best,
            } => {
                self.test = Some((bits_per_dim, standard_error));
                let (unit, best) = (self.unit, if best { "  (best)" } else { "" });
                self.bar.say(format_args!(
                    "epoch {epoch}  step {step}  \
                     test {bits_per_dim:.4} ± {standard_error:.4} {unit}{best}"
                ));
            }
            Event::Sampling { done, total } => {
                self.bar.show(self.step, self.last_step, || {
                    format!("sampling: {done} of {total} pixels")
                });
            }
            Event::Sampled { path } => self.samples = Some(path),
            _ => {}
        }
    }

    /// How it ended, and what can be done next.
    fn summary(&self, run: &Path, outcome: Outcome) -> String {
        let (folder, going_on) = (quoted(run), going_on(run, self.precision));
        if outcome == Outcome::Stopped {
            return format!(
                "stopped after step {} and saved; to go on:\n  {going_on}",
                self.step
            );
        }
        let mut lines = Vec::new();
        if self.step == self.first_step {
            lines.push(format!(
                "complete at step {}: nothing was left to do",
                self.step
            ));
        }
        if let Some((bits_per_dim, standard_error)) = self.test {
            lines.push(format!(
                "test    {bits_per_dim:.4} ± {standard_error:.4} {} (averaged weights)",
                self.unit
            ));
            if let Some(baseline) = &self.baseline {
                lines.push(format!("        {baseline}"));
            }
        }
        if let Some(samples) = &self.samples {
            lines.push(format!("samples {}", samples.display()));
        }
        lines.push(format!("run     {}", run.display()));
        let longer = match self.config {
            config if config.hours > 0.0 => format!("--hours {}", 2.0 * config.hours),
            config if config.steps == self.last_step => {
                let steps = self.last_step.saturating_mul(2);
                let epochs = steps.div_ceil(self.steps_per_epoch.max(1));
                match epochs > config.epochs {
                    true => format!("--epochs {epochs} --steps {steps}"),
                    false => format!("--steps {steps}"),
                }
            }
            config => format!("--epochs {}", config.epochs.saturating_mul(2)),
        };
        lines.push(format!(
            "next:\n  pixelcnn eval {folder}\n  pixelcnn sample {folder}\n  \
             {going_on} {longer}"
        ));
        lines.join("\n")
    }
}

/// The command that goes on with a run as it was trained so far.
fn going_on(run: &Path, precision: Precision) -> String {
    let flag = match precision {
        Precision::F32 => String::new(),
        precision => format!(" --precision {precision}"),
    };
    format!("pixelcnn train --resume {}{flag}", quoted(run))
}

/// An exponential average over some 20 values, fair from the first one on.
#[derive(Default)]
struct Smoothed {
    sum: f64,
    weight: f64,
}

impl Smoothed {
    fn add(&mut self, value: f64) {
        self.sum = 0.95 * self.sum + value;
        self.weight = 0.95 * self.weight + 1.0;
    }

    fn mean(&self) -> f64 {
        self.sum / self.weight
    }
}
