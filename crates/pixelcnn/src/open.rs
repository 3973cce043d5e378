//! Models from files and into files.

use std::path::Path;

use crate::model::Model;
use crate::train::run::{Run, RunError, is_run};
use crate::weights::hub::{self, Card};
use crate::weights::safetensors::{FileError, Precision};
use crate::weights::{self, Unsaid, WeightsError};

/// Why a file is no model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A run has no checkpoint, or its newest one is damaged.
    #[error(transparent)]
    Run(#[from] RunError),
    /// A file can't be read as what it is.
    #[error(transparent)]
    File(#[from] FileError),
    /// Weights of elsewhere are not a PixelCNN++'s.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

impl Model {
    /// Opens a model with its averaged weights: a run folder, of which the newest checkpoint is
    /// taken; a checkpoint; a folder or file that [`Model::save`] wrote; or weights of elsewhere, as
    /// [`weights::read`] takes them.
    ///
    /// # Errors
    /// [`OpenError`]: never weights other than those stored.
    pub fn open(path: &Path) -> Result<Model, OpenError> {
        // A TensorFlow checkpoint is named by what its files' names begin with. Else the header alone
        // tells what a file is: nothing large is read twice.
        let saved = path.join("model.safetensors");
        if path.is_dir() && !is_run(path) && saved.is_file() {
            return Ok(hub::read(&saved)?);
        }
        if path.exists() {
            match Run::open(path) {
                Err(error) if error.is_other_file() => {}
                run => return Ok(run?.into_model()),
            }
            match hub::read(path) {
                Err(FileError::NotACheckpoint { .. }) => {}
                model => return Ok(model?),
            }
        }
        let imported = weights::read(path, &Unsaid::default())?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
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
                origin: None,
                data: "unknown".into(),
                class_names: Vec::new(),
                measured: None,
            },
        })
    }

    /// The bytes of a `model.safetensors` that stands alone.
    ///
    /// # Errors
    /// [`FileError::Mismatch`] where the weights are not the model's.
    pub fn to_bytes(&self) -> Result<Vec<u8>, FileError> {
        hub::bytes(self, self.card.precision, "model.safetensors")
    }

    /// A model from such bytes.
    ///
    /// # Errors
    /// Every [`FileError`] that concerns one file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Model, FileError> {
        hub::parse(bytes, "model.safetensors")
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
