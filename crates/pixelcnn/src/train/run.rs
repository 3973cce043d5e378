//! A checkpoint with what its run folder says about it.

use std::path::{self, Path, PathBuf};

use super::checkpoints::{CheckpointError, Checkpoints};
use super::config::{RunConfig, RunConfigError};
use super::folder::CHECKPOINTS;
use super::metrics::{self, Record};
use super::state::TrainState;
use crate::model::Model;
use crate::weights::hub::{Card, Measured};
use crate::weights::safetensors::{FileError, Precision};

/// A run, as it is in a file: a checkpoint and what is known of it.
#[derive(Debug, Clone)]
pub struct Run {
    /// The run's settings: its `config.toml` or what the checkpoint knows of it; none where the file
    /// lies outside a run folder and is of an earlier version.
    pub config: Option<RunConfig>,
    /// The run folder: where a checkpoint lies, two folders up.
    pub folder: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// What is in it.
    pub state: TrainState,
}

/// Why a run can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// There is no checkpoint, or it is damaged.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint knows no settings, and those in the folder can't be read.
    #[error(transparent)]
    Config(#[from] RunConfigError),
}

impl RunError {
    /// Whether a file is something else than a checkpoint.
    pub fn is_other_file(&self) -> bool {
        matches!(
            self,
            RunError::Checkpoint(CheckpointError::File(FileError::NotACheckpoint { .. }))
        )
    }
}

/// Whether a folder is a run's.
pub fn is_run(folder: &Path) -> bool {
    folder.join(CHECKPOINTS).is_dir() || folder.join("config.toml").is_file()
}

impl Run {
    /// Reads a run folder, of which the newest checkpoint is taken, or a checkpoint.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn open(path: &Path) -> Result<Run, RunError> {
        let (folder, checkpoint, state) = if path.is_dir() {
            let (state, checkpoint) = Checkpoints::new(path.join(CHECKPOINTS)).latest()?;
            (path.to_owned(), checkpoint, state)
        } else {
            let state = TrainState::read(path).map_err(CheckpointError::from)?;
            let absolute = path::absolute(path).unwrap_or_else(|_| path.to_owned());
            let folder = absolute.parent().and_then(Path::parent);
            (
                folder.unwrap_or(&absolute).to_owned(),
                path.to_owned(),
                state,
            )
        };
        let config = match (RunConfig::read(&folder), &state.run) {
            (Ok(file), None) => Some(file.config),
            (Ok(file), _) if file.as_written == Some(true) => Some(file.config),
            // It may be damaged; the checkpoint is not.
            (_, Some(known)) => Some(known.clone()),
            (Err(error), None) if error.is_missing() => None,
            (Err(error), None) => return Err(error.into()),
        };
        Ok(Run {
            config,
            folder,
            checkpoint,
            state,
        })
    }

    /// The model card of its averaged weights, with what training measured, or of the raw ones.
    pub fn card(&self, raw: bool) -> Card {
        let state = &self.state;
        let data = self.config.as_ref().map(|config| config.data.short_name());
        let folder = self.folder.file_name().unwrap_or_default();
        Card {
            name: format!("PixelCNN++ {}", folder.to_string_lossy())
                .trim_end()
                .into(),
            averaged: !raw,
            precision: Precision::Single,
            step: state.step,
            images_seen: state.images_seen,
            seconds: state.seconds,
            origin: state.origin.clone(),
            measured: self.measured(data.as_deref()).filter(|_| !raw),
            data: data.unwrap_or_else(|| "unknown".into()),
            class_names: state.class_names.clone(),
        }
    }

    /// Its model, with the averaged weights.
    pub fn into_model(self) -> Model {
        Model {
            card: self.card(false),
            config: self.state.config,
            weights: self.state.average,
        }
    }

    /// What training measured after the very step that was saved, with the averaged weights.
    fn measured(&self, data: Option<&str>) -> Option<Measured> {
        let (evaluated, bits_per_dim) = self.state.last_evaluation?;
        if evaluated != self.state.step {
            return None;
        }
        // The state has no standard error; the metrics beside it do.
        let records = metrics::read(&self.folder).unwrap_or_default();
        let standard_error = records.records.into_iter().find_map(|record| match record {
            Record::Test {
                step,
                test_bits_per_dim,
                standard_error,
                ..
            } if (step, test_bits_per_dim) == (evaluated, bits_per_dim) => Some(standard_error),
            _ => None,
        });
        Some(Measured {
            bits_per_dim,
            standard_error,
            images: match data {
                Some(data) => format!("all test images of {data}"),
                None => "all test images".into(),
            },
        })
    }
}
