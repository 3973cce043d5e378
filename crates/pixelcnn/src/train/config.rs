//! What a run is: model, data and training, as `config.toml` in its folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use pixelcnn_core::{Augmentation, ConfigError, ModelConfig};
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
    /// From the initialised parameters, looking back over no more than about the last tenth of the
    /// run so far: the decay after `t` steps is at most (1 + t) / (10 + t), as that of TensorFlow's
    /// averages that are told `num_updates`.
    Growing,
}

/// How the parameters move along their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// Adam, as in the original.
    #[default]
    Adam,
    /// [Muon](pixelcnn_core::kernels::muon) for the weights between feature maps, at
    /// [`MUON_FACTOR`] times the learning rate, and Adam for the rest.
    Muon,
}

/// The learning rate of Muon in those of Adam: it is a share of a weight's length, of which 0.02 is common
/// where Adam has 0.001.
pub const MUON_FACTOR: f64 = 20.0;

/// How the learning rate falls in the cool-down at a run's end: a function of the share `s` of it
/// that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CooldownShape {
    /// 1 - s.
    #[default]
    #[serde(rename = "linear")]
    Linear,
    /// 1 - sqrt(s) (Hägele et al., 2024, section 3).
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// How a model is trained. The defaults are the original's, but for `polyak_start`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Images in a step (the original's 16 on each of 8 GPUs make 128).
    pub batch_size: usize,
    /// Shards of a batch, a power of two, whose gradients are summed in the same order however many
    /// ranks there are; none for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<usize>,
    /// Images for data-dependent initialisation.
    pub init_batch_size: usize,
    /// How the parameters move.
    pub optimizer: Optimizer,
    /// Of the first step, before its decay.
    pub learning_rate: f64,
    /// The learning rate is multiplied by this before every step.
    pub learning_rate_decay: f64,
    /// Steps in which the learning rate first rises, from nothing; 0 for none.
    pub warmup_steps: u64,
    /// Share of the run, at its end, in which the learning rate falls to nothing; 0 for none.
    pub cooldown: f64,
    /// How it falls there.
    pub cooldown_shape: CooldownShape,
    /// Share of the features that dropout drops in each gated resnet block, from 0 up to 1.
    pub dropout: f32,
    /// Passes over the training images.
    pub epochs: u64,
    /// Steps after which to stop even within an epoch; 0 for no such limit.
    pub steps: u64,
    /// Hours of training, evaluations not counted, that take the place of `epochs` and `steps`; 0 for
    /// none.
    pub hours: f64,
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
            shards: None,
            init_batch_size: 16,
            optimizer: Optimizer::Adam,
            learning_rate: 1e-3,
            learning_rate_decay: 0.999_995,
            warmup_steps: 0,
            cooldown: 0.0,
            cooldown_shape: CooldownShape::Linear,
            dropout: 0.5,
            epochs: 5000,
            steps: 0,
            hours: 0.0,
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
        let shards = self.shards.unwrap_or(1);
        check(
            "shards",
            &shards,
            shards.is_power_of_two() && shards <= self.batch_size,
            "must be a power of two, and at most the batch's images",
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
            "cooldown",
            &self.cooldown,
            (0.0..1.0).contains(&self.cooldown) || self.cooldown == 1.0 && self.hours == 0.0,
            "must be at least 0 and at most 1, and below 1 where hours set the length",
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
        check(
            "hours",
            &self.hours,
            self.hours.is_finite() && self.hours >= 0.0,
            "must be at least 0",
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
#[non_exhaustive]
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
    /// Images that are not squares can't be turned.
    #[error(
        "image size {width}x{height}: only square images have all eight symmetries: take flips or square \
         images"
    )]
    NotSquare {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// No training can be so.
    #[error(transparent)]
    Train(#[from] TrainConfigError),
}

impl RunConfigError {
    /// Whether there is no such file.
    pub fn is_missing(&self) -> bool {
        use io::ErrorKind::{NotADirectory, NotFound};
        matches!(self, RunConfigError::Read { source, .. }
            if matches!(source.kind(), NotFound | NotADirectory))
    }
}

impl RunConfig {
    /// Checks every field's range.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), RunConfigError> {
        self.model.validate()?;
        let ModelConfig {
            height,
            width,
            augmentation,
            ..
        } = self.model;
        if augmentation == Augmentation::Symmetries && height != width {
            return Err(RunConfigError::NotSquare { height, width });
        }
        Ok(self.train.validate()?)
    }

    /// Writes `config.toml` in the folder of a run, atomically, with a checksum.
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
        let header = format!("{HEADER}{}\n", checksum(&text));
        atomic::write(&path, |w| {
            w.write_all(header.as_bytes())?;
            w.write_all(text.as_bytes())
        })
        .map_err(failed)
    }

    /// Reads `config.toml` in the folder of a run.
    ///
    /// # Errors
    /// [`RunConfigError`] where it can't be read, is cut off or is out of range.
    pub fn read(run: &Path) -> Result<ConfigFile, RunConfigError> {
        let path = run.join("config.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(source) => return Err(RunConfigError::Read { path, source }),
        };
        let as_written = text.split_once('\n').and_then(|(header, settings)| {
            let found = header.strip_prefix(HEADER)?;
            Some(found == checksum(settings))
        });
        let whole = match as_written {
            Some(true) => Ok(()),
            _ => expect_whole(&text),
        };
        let parsed = whole.and_then(|()| toml::from_str(&text).map_err(|e| place(&text, &e)));
        let config: RunConfig = match parsed {
            Ok(config) => config,
            Err(reason) => return Err(RunConfigError::Syntax { path, reason }),
        };
        config.validate()?;
        Ok(ConfigFile { config, as_written })
    }

    /// The settings that `other` has differently.
    pub fn differences(&self, other: &RunConfig) -> Vec<Difference> {
        let (here, there) = (self.values(), other.values());
        let names: BTreeSet<_> = here.keys().chain(there.keys()).collect();
        let value = |values: &BTreeMap<String, String>, name: &String| {
            values.get(name).cloned().unwrap_or_else(|| "none".into())
        };
        names
            .into_iter()
            .filter(|&name| here.get(name) != there.get(name))
            .map(|name| Difference {
                name: name.clone(),
                here: value(&here, name),
                there: value(&there, name),
            })
            .collect()
    }

    /// Every setting by its name, as in `config.toml`.
    fn values(&self) -> BTreeMap<String, String> {
        // Through text, which gives a number in single precision no more digits than it has.
        let text = toml::to_string(self).unwrap_or_default();
        let sections: toml::Table = text.parse().unwrap_or_default();
        let settings = sections
            .into_iter()
            .filter_map(|(_, section)| match section {
                toml::Value::Table(settings) => Some(settings),
                _ => None,
            });
        let settings = settings.flatten();
        settings
            .map(|(name, value)| (name, value.to_string()))
            .collect()
    }
}

/// A run's `config.toml` as it was found.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// What it says.
    pub config: RunConfig,
    /// Whether it is as [`RunConfig::write`] left it; none where it has no checksum, as files of
    /// earlier versions.
    pub as_written: Option<bool>,
}

/// A setting that is not the same in two configurations; values are as in `config.toml`, or `none`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name there.
    pub name: String,
    /// Its value in the one.
    pub here: String,
    /// Its value in the other.
    pub there: String,
}

impl fmt::Display for Difference {
    /// As that of a file and a checkpoint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { name, here, there } = self;
        write!(f, "{name} is {here}, in the checkpoint {there}")
    }
}

/// The first line of a `config.toml`, but for the checksum: eight digits.
const HEADER: &str =
    "# Kept by pixelcnn: change it with the flags of `pixelcnn train --resume`. Checksum ";

/// CRC-32C of what follows the first line.
fn checksum(settings: &str) -> String {
    format!("{:08x}", crc32c::crc32c(settings.as_bytes()))
}

/// An error of a file with its line, on one line.
pub(super) fn place(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let line = 1 + text.bytes().take(start).filter(|&b| b == b'\n').count();
    // It may quote what was damaged.
    let message = error.message().replace(char::is_control, " ");
    format!("line {line}: {message}")
}

/// Checks that nothing was cut off a file whose checksum does not say so: what every version has
/// written is there. Were something missing, its default would take its place.
fn expect_whole(text: &str) -> Result<(), String> {
    const SETTINGS: [(&str, &[&str]); 2] = [
        ("data", &["data", "held_out"]),
        (
            "train",
            &[
                "batch_size",
                "init_batch_size",
                "learning_rate",
                "learning_rate_decay",
                "dropout",
                "epochs",
                "steps",
                "polyak_decay",
                "polyak_start",
                "eval_interval",
                "save_interval",
                "checkpoint_minutes",
                "samples",
                "seed",
            ],
        ),
    ];
    let sections: toml::Table = text.parse().map_err(|error| place(text, &error))?;
    for (section, settings) in SETTINGS {
        for name in settings {
            if sections
                .get(section)
                .and_then(|values| values.get(name))
                .is_none()
            {
                return Err(format!("[{section}] lacks `{name}`: the file is not whole"));
            }
        }
    }
    // A number at the end may have lost digits.
    match text.ends_with('\n') {
        true => Ok(()),
        false => Err("the last line has no end: the file is not whole".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RunConfig {
        RunConfig {
            model: ModelConfig::default(),
            data: DataConfig {
                data: "/photos of \"me\"".into(),
                data_dir: Some("/data".into()),
                size: Some(32),
                ..DataConfig::default()
            },
            train: TrainConfig {
                batch_size: 24,
                dropout: 0.1,
                ..TrainConfig::default()
            },
        }
    }

    fn text(config: &RunConfig) -> String {
        let folder = tempfile::tempdir().unwrap();
        config.write(folder.path()).unwrap();
        std::fs::read_to_string(folder.path().join("config.toml")).unwrap()
    }

    fn read(text: &[u8]) -> Result<ConfigFile, RunConfigError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.toml"), text).unwrap();
        RunConfig::read(folder.path())
    }

    fn names(differences: &[Difference]) -> Vec<&str> {
        differences.iter().map(|found| &found.name[..]).collect()
    }

    #[test]
    fn settings_come_back_and_older_files_are_read() {
        let whole = text(&config());
        let (header, settings) = whole.split_once('\n').unwrap();
        assert!(header.starts_with(HEADER));
        let found = |text: &str| {
            let file = read(text.as_bytes()).unwrap();
            assert_eq!(file.config, config());
            file.as_written
        };
        assert_eq!(found(&whole), Some(true));
        // As earlier versions wrote it, and with another line.
        assert_eq!(found(settings), None);
        assert_eq!(found(&format!("{whole}# mine\n")), Some(false));
        // What earlier versions can't know may be missing: there, the checksum tells.
        let fewer = settings.replace("seed = 1\n", "");
        let fewer = format!("{HEADER}{}\n{fewer}", checksum(&fewer));
        assert_eq!(found(&fewer), Some(true));
    }

    #[test]
    fn whatever_is_cut_off_is_missed() {
        let whole = text(&config());
        for cut in 0..whole.len() {
            assert!(read(&whole.as_bytes()[..cut]).is_err(), "{cut}");
        }
        let (_, older) = whole.split_once('\n').unwrap();
        for cut in 0..older.len() {
            assert!(read(&older.as_bytes()[..cut]).is_err(), "{cut}");
        }
        let error = read(b"[model]\n\n[tr\x1d\n").unwrap_err().to_string();
        assert!(error.contains("config.toml`: line 3: "), "{error}");
        assert!(!error.contains(char::is_control), "{error:?}");
        let error = read(b"[model]\n").unwrap_err().to_string();
        assert!(
            error.contains("[data] lacks `data`: the file is not whole"),
            "{error}"
        );
    }

    #[test]
    fn a_flipped_bit_is_missed() {
        let whole = text(&config()).into_bytes();
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut flipped = whole.clone();
                flipped[at] ^= 1 << bit;
                if let Ok(file) = read(&flipped) {
                    assert_ne!(file.as_written, Some(true), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn differences_are_told_as_they_are_written() {
        let mut other = config();
        assert_eq!(config().differences(&other), []);
        other.train.dropout = 0.3;
        other.train.learning_rate_decay = 1.0;
        other.data.size = None;
        other.model.nonlinearity = pixelcnn_core::Nonlinearity::Elu;
        let differences = config().differences(&other);
        assert_eq!(
            names(&differences),
            ["dropout", "learning_rate_decay", "nonlinearity", "size"]
        );
        let value = |n: usize| (&differences[n].here[..], &differences[n].there[..]);
        assert_eq!(value(0), ("0.1", "0.3"));
        assert_eq!(value(2), ("\"concat_elu\"", "\"elu\""));
        assert_eq!(value(3), ("32", "none"));
    }

    #[test]
    fn no_two_settings_have_the_same_name() {
        let settings = text(&config());
        let settings = settings.lines().filter(|line| line.contains(" = "));
        assert_eq!(settings.count(), config().values().len());
    }
}
