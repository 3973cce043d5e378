//! The trained model that a command is given: a run folder, of which the newest checkpoint is
//! taken, or a checkpoint file.

use std::error::Error;
use std::path::{self, Path, PathBuf};

use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::incremental::Evaluator;
use pixelcnn::model::Network;
use pixelcnn::train::checkpoint::{CheckpointError, Checkpoints, TrainState};
use pixelcnn::train::config::RunConfig;

use crate::terminal::{Result, quoted};

/// A model with what its run folder says about it.
pub struct Trained {
    /// The run's `config.toml`, unless the file lies outside a run folder.
    pub config: Option<RunConfig>,
    /// The run folder: where a checkpoint file lies, two folders up.
    pub run: PathBuf,
    /// The file.
    pub checkpoint: PathBuf,
    /// What is in it.
    pub state: TrainState,
}

impl Trained {
    /// Opens the model off the front of the files given to `pixelcnn COMMAND`, and gives the rest.
    pub fn open_first<'a>(files: &'a [PathBuf], command: &str) -> Result<(Trained, &'a [PathBuf])> {
        match split_model(files) {
            (Some(model), rest) => Ok((Trained::open(model, command)?, rest)),
            (None, _) => Err(format!(
                "{}: no such run folder or checkpoint file: name one first: \
                 `pixelcnn train` makes it",
                files
                    .first()
                    .map_or(Path::new(""), PathBuf::as_path)
                    .display()
            )
            .into()),
        }
    }

    /// Opens a run folder or a checkpoint file for `pixelcnn COMMAND`.
    pub fn open(path: &Path, command: &str) -> Result<Trained> {
        let (run, checkpoint, state) = if path.is_dir() {
            let (state, checkpoint) = checkpoints(path).latest().map_err(|error| {
                offer(error, path, |whole| {
                    format!("pixelcnn {command} {}", quoted(whole))
                })
            })?;
            (path.to_owned(), checkpoint, state)
        } else if path.exists() {
            let state = TrainState::read(path)?;
            let absolute = path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let run = absolute.parent().and_then(Path::parent);
            (run.unwrap_or(&absolute).to_owned(), path.to_owned(), state)
        } else {
            return Err(format!(
                "{}: no such run folder or checkpoint file: `pixelcnn train` makes one",
                path.display()
            )
            .into());
        };
        let config = match run.join("config.toml").exists() {
            true => Some(RunConfig::read(&run)?),
            false => None,
        };
        Ok(Trained {
            config,
            run,
            checkpoint,
            state,
        })
    }

    /// The averaged parameters, or the raw ones.
    pub fn parameters(&self, raw: bool) -> &[Vec<f32>] {
        match raw {
            true => &self.state.parameters,
            false => &self.state.average,
        }
    }

    /// The model with its averaged parameters, or with the raw ones.
    pub fn network(&self, raw: bool, device: &Device) -> Network<'_> {
        Network::new(&self.state.config, self.parameters(raw), device)
    }

    /// The same model, to be evaluated pixel by pixel.
    pub fn evaluator(&self, raw: bool) -> Result<Evaluator> {
        Ok(Evaluator::new(&self.state.config, self.parameters(raw))?)
    }

    /// The data that the run was trained on.
    pub fn data(&self) -> Option<&DataConfig> {
        self.config.as_ref().map(|config| &config.data)
    }

    /// A class given by its number or by its name in the run's data.
    pub fn class(&self, class: &str) -> Result<u32> {
        let nr_classes = self.state.config.nr_classes;
        if nr_classes == 0 {
            return Err("--class: the model is not class-conditional: leave it out".into());
        }
        if let Ok(number) = class.parse::<u32>() {
            return match (number as usize) < nr_classes {
                true => Ok(number),
                false => Err(format!(
                    "--class {number}: the model has {nr_classes} classes: choose 0 to {}",
                    nr_classes - 1
                )
                .into()),
            };
        }
        let names = match self.data() {
            Some(data) => Dataset::open(data, Split::Test, &())?
                .class_names()
                .to_vec(),
            None => Vec::new(),
        };
        let number = names.iter().position(|name| name == class);
        number.map(|number| number as u32).ok_or_else(|| {
            let choice = match names.is_empty() {
                true => format!("a number from 0 to {}", nr_classes - 1),
                false => names.join(", "),
            };
            format!("--class {class}: there is no such class: choose {choice}").into()
        })
    }
}

/// Takes the model off the front of a command's files: a run folder or a checkpoint file, where the
/// first one is such.
fn split_model(paths: &[PathBuf]) -> (Option<&Path>, &[PathBuf]) {
    match paths {
        [first, rest @ ..]
            if first.join("checkpoints").is_dir()
                || first.extension().is_some_and(|ext| ext == "safetensors") =>
        {
            (Some(first), rest)
        }
        _ => (None, paths),
    }
}

/// The checkpoints of a run.
pub fn checkpoints(run: &Path) -> Checkpoints {
    Checkpoints::new(run.join("checkpoints"))
}

/// Where the newest checkpoint is damaged, offers a whole one with the command that takes it.
pub fn offer(
    error: CheckpointError,
    run: &Path,
    command: impl Fn(&Path) -> String,
) -> Box<dyn Error> {
    let CheckpointError::Damaged {
        reason, previous, ..
    } = error
    else {
        return error.into();
    };
    let best = || Some(checkpoints(run).best()).filter(|best| TrainState::read(best).is_ok());
    match previous.or_else(best) {
        Some(whole) => format!("{reason}: take one that is whole: {}", command(&whole)).into(),
        None => format!("{reason}, and no other one is whole: begin a new run").into(),
    }
}
