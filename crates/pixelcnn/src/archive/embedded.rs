//! A model that is in an archive.

use super::ArchiveError;
use super::fields::SUM;
use crate::Model;
use crate::weights::hub;
use crate::weights::safetensors::Precision;

/// The most bytes of one.
pub(super) const MAX_MODEL: u64 = 1 << 30;

/// How it is called in errors.
const NAME: &str = "model.safetensors";

/// The bytes of a model: in half precision where that loses nothing.
pub(super) fn bytes(model: &Model) -> Result<Vec<u8>, ArchiveError> {
    let halves = hub::rounded_to_half(&model.config, &model.weights);
    let precision = match halves.is_ok_and(|halves| halves == model.weights) {
        true => Precision::Half,
        false => Precision::Single,
    };
    let bytes = hub::bytes(model, precision, NAME);
    let bytes = bytes.map_err(|error| ArchiveError::Embedded(error.to_string()))?;
    match bytes.len() as u64 + SUM as u64 <= MAX_MODEL {
        true => Ok(bytes),
        false => Err(ArchiveError::Embedded(
            "it has over 1 GiB: leave it out".into(),
        )),
    }
}

/// And back.
pub(super) fn model(bytes: &[u8]) -> Result<Model, ArchiveError> {
    hub::parse(bytes, NAME).map_err(|error| ArchiveError::Embedded(error.to_string()))
}
