//! Models from files and into files.

use std::path::Path;

use crate::model::Model;
use crate::train::checkpoints::{CheckpointError, Checkpoints};
use crate::train::folder::CHECKPOINTS;
use crate::train::state::TrainState;
use crate::weights::hub::{self, Card, Measured};
use crate::weights::safetensors::{FileError, Precision};
use crate::weights::{self, Unsaid, WeightsError};

/// Why a file is no model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A run has no checkpoint, or its newest one is damaged.
    #[error(transparent)]
    Run(#[from] CheckpointError),
    /// A file can't be read as what it is.
    #[error(transparent)]
    File(#[from] FileError),
    /// Weights of elsewhere are not a PixelCNN++'s.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

impl Model {
    /// Opens a model with its averaged weights: a run folder, of which the newest checkpoint is
    /// taken; a checkpoint; what [`Model::save`] wrote; or weights of elsewhere, as
    /// [`weights::read`] takes them.
    ///
    /// # Errors
    /// [`OpenError`]: never weights other than those stored.
    pub fn open(path: &Path) -> Result<Model, OpenError> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            let (state, _) = Checkpoints::new(path.join(CHECKPOINTS)).latest()?;
            return Ok(trained(state, &name));
        }
        // A TensorFlow checkpoint is named by what its files' names begin with. Else the header alone
        // tells what a file is: nothing large is read twice.
        if path.is_file() {
            match TrainState::read(path) {
                Err(FileError::NotACheckpoint { .. }) => {}
                state => return Ok(trained(state?, &name)),
            }
            match hub::read(path) {
                Err(FileError::NotACheckpoint { .. }) => {}
                model => return Ok(model?),
            }
        }
        let imported = weights::read(path, &Unsaid::default())?;
        Ok(Model {
            config: imported.config,
            weights: imported.arrays.average,
            card: Card {
                name: name.into(),
                averaged: true,
                precision: Precision::Single,
                step: imported.step,
                images_seen: 0,
                seconds: 0.0,
                data: "unknown".into(),
                measured: None,
            },
        })
    }

    /// Writes `model.safetensors`, `config.json` and the model card `README.md` to a folder, in the
    /// precision that the card says.
    ///
    /// # Errors
    /// [`WeightsError`], where the file system refuses or half precision can't hold a weight.
    pub fn save(&self, folder: &Path) -> Result<(), WeightsError> {
        hub::export(folder, &self.config, &self.weights, &self.card)
    }
}

/// The model of a training's averages.
fn trained(state: TrainState, name: &str) -> Model {
    let measured = state.last_evaluation.filter(|_| state.is_evaluated());
    let data = state.run.map(|run| run.data.data);
    Model {
        config: state.config,
        weights: state.average,
        card: Card {
            name: name.into(),
            averaged: true,
            precision: Precision::Single,
            step: state.step,
            images_seen: state.images_seen,
            seconds: state.seconds,
            measured: measured.map(|(_, bits_per_dim)| Measured {
                bits_per_dim,
                standard_error: None,
                images: "its run's test images".into(),
            }),
            data: data.unwrap_or_else(|| "unknown".into()),
        },
    }
}
