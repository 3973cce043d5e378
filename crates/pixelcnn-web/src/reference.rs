//! How images that a model should find usual score: what others are seen beside.

use pixelcnn::score::Reference as Known;
use serde::Serialize;
use utoipa::ToSchema;

use crate::models::Loaded;

/// Quantiles of the scores of a test set.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Reference {
    /// The images.
    images: String,
    /// How many there are.
    count: usize,
    /// Of the model's bits/dim the quantiles from 0 to 1, at equal distances.
    bits_per_dim: Vec<f64>,
    /// The same of the corrected scores.
    corrected: Vec<f64>,
}

impl Reference {
    /// That of a model, where it is known.
    pub fn of(model: &Loaded) -> Option<Reference> {
        let known: Known = model.reference.clone()?;
        Some(Reference {
            images: known.images,
            count: known.count,
            bits_per_dim: known.bits_per_dim,
            corrected: known.corrected,
        })
    }
}
