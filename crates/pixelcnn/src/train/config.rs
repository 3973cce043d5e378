//! What a run is: model, data and training, as `config.toml` in its folder.

use std::io;
use std::path::{Path, PathBuf};

use pixelcnn_core::{ConfigError, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::atomic;
use crate::data::DataConfig;

/// Where the Polyak average starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolyakStart {
    /// From the parameters after data-dependent initialisation.
    #[default]
    Initialised,
    /// From the drawn parameters, before it, as the original does.
    Drawn,
}

/// How a model is trained. The defaults are the original's, but for `polyak_start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Images in a step (the original's 16 on each of 8 GPUs make 128).
    pub batch_size: usize,
    /// Images for data-dependent initialisation.
    pub init_batch_size: usize,
    /// Of the first step, before its decay.
    pub learning_rate: f64,
    /// The learning rate is multiplied by this before every step.
    pub learning_rate_decay: f64,
    /// Share of the features that dropout drops in each gated resnet block, from 0 up to 1.
    pub dropout: f32,
    /// Passes over the training images.
    pub epochs: u64,
    /// Steps after which to stop even within an epoch; 0 for no such limit.
    pub steps: u64,
    /// Decay of the Polyak average of the parameters, which evaluation and sampling use.
    pub polyak_decay: f64,
    /// Where that average starts.
    pub polyak_start: PolyakStart,
    /// Epochs between two evaluations on the test set.
    pub eval_interval: u64,
    /// Epochs between two grids of samples (and a checkpoint of their own).
    pub save_interval: u64,
    /// Minutes between two checkpoints within an epoch.
    pub checkpoint_minutes: f64,
    /// Images in a grid of samples; 0 for none.
    pub samples: usize,
    /// Of all random numbers of the run.
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            batch_size: 128,
            init_batch_size: 16,
            learning_rate: 1e-3,
            learning_rate_decay: 0.999_995,
            dropout: 0.5,
            epochs: 5000,
            steps: 0,
            polyak_decay: 0.9995,
            polyak_start: PolyakStart::Initialised,
            eval_interval: 1,
            save_interval: 20,
            checkpoint_minutes: 10.0,
            samples: 100,
            seed: 1,
        }
    }
}

/// A training configuration that can't be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} = {value}: {range}")]
pub struct TrainConfigError {
    /// The field's name.
    pub name: &'static str,
    /// What it was.
    pub value: String,
    /// What it may be.
    pub range: &'static str,
}

impl TrainConfig {
    /// Checks every field's range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), TrainConfigError> {
        let check = |name, value: &dyn ToString, fine: bool, range| match fine {
            true => Ok(()),
            false => Err(TrainConfigError {
                name,
                value: value.to_string(),
                range,
            }),
        };
        let positive = |n: f64| n.is_finite() && n > 0.0;
        let count = |n: usize| (1..=65_536).contains(&n);
        let within = "must be between 1 and 65536";
        check(
            "batch_size",
            &self.batch_size,
            count(self.batch_size),
            within,
        )?;
        check(
            "init_batch_size",
            &self.init_batch_size,
            count(self.init_batch_size),
            within,
        )?;
        check(
            "learning_rate",
            &self.learning_rate,
            positive(self.learning_rate),
            "must be above 0",
        )?;
        let decay = self.learning_rate_decay;
        check(
            "learning_rate_decay",
            &decay,
            positive(decay) && decay <= 1.0,
            "must be above 0 and at most 1",
        )?;
        check(
            "dropout",
            &self.dropout,
            (0.0..1.0).contains(&self.dropout),
            "must be at least 0 and below 1",
        )?;
        check(
            "epochs",
            &self.epochs,
            self.epochs > 0,
            "must be at least 1",
        )?;
        let decay = self.polyak_decay;
        check(
            "polyak_decay",
            &decay,
            (0.0..1.0).contains(&decay),
            "must be at least 0 and below 1",
        )?;
        check(
            "eval_interval",
            &self.eval_interval,
            self.eval_interval > 0,
            "must be at least 1",
        )?;
        check(
            "save_interval",
            &self.save_interval,
            self.save_interval > 0,
            "must be at least 1",
        )?;
        let minutes = self.checkpoint_minutes;
        check(
            "checkpoint_minutes",
            &minutes,
            positive(minutes),
            "must be above 0",
        )?;
        check(
            "samples",
            &self.samples,
            self.samples <= 10_000,
            "must be at most 10000",
        )
    }
}

/// A run's `config.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The network.
    pub model: ModelConfig,
    /// The images.
    pub data: DataConfig,
    /// The training.
    pub train: TrainConfig,
}

/// A `config.toml` that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RunConfigError {
    /// Not read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not written; what was there before still is.
    #[error("cannot write `{path}`: {source}: make room or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not the toml of a run.
    #[error("`{path}`: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why, on one line.
        reason: String,
    },
    /// No model can be so.
    #[error(transparent)]
    Model(#[from] ConfigError),
    /// No training can be so.
    #[error(transparent)]
    Train(#[from] TrainConfigError),
}

impl RunConfig {
    /// Checks every field's range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), RunConfigError> {
        self.model.validate()?;
        Ok(self.train.validate()?)
    }

    /// Writes `config.toml` in the folder of a run, atomically.
    ///
    /// # Errors
    /// [`RunConfigError::Write`].
    pub fn write(&self, run: &Path) -> Result<(), RunConfigError> {
        let path = run.join("config.toml");
        let failed = |source| RunConfigError::Write {
            path: path.clone(),
            source,
        };
        let text = toml::to_string(self).map_err(|error| failed(io::Error::other(error)))?;
        atomic::write(&path, |w| w.write_all(text.as_bytes())).map_err(failed)
    }

    /// Reads `config.toml` in the folder of a run.
    ///
    /// # Errors
    /// [`RunConfigError`] where it can't be read or is out of range.
    pub fn read(run: &Path) -> Result<RunConfig, RunConfigError> {
        let path = run.join("config.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(RunConfigError::Read { path, source }),
        };
        let config: RunConfig = match toml::from_str(&text) {
            Ok(config) => config,
            Err(error) => {
                let reason = error.to_string().trim().replace('\n', " ");
                return Err(RunConfigError::Syntax { path, reason });
            }
        };
        config.validate()?;
        Ok(config)
    }
}
