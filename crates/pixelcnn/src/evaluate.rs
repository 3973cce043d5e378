//! Exact likelihoods of whole data sets, in bits/dim.

use std::ops::ControlFlow;

use crate::data::{DataError, Dataset};
use crate::model::{Batch, Network};

/// The likelihood of a set of images under a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Bits per dimension of every image, in the data's order.
    pub bits_per_dim: Vec<f64>,
}

impl Evaluation {
    /// Mean bits/dim over the images.
    pub fn mean(&self) -> f64 {
        self.bits_per_dim.iter().sum::<f64>() / self.bits_per_dim.len() as f64
    }

    /// Standard error of that mean: the images' sample deviation over the root of their number.
    pub fn standard_error(&self) -> f64 {
        let n = self.bits_per_dim.len() as f64;
        let mean = self.mean();
        let squares = self.bits_per_dim.iter().map(|bits| (bits - mean).powi(2));
        (squares.sum::<f64>() / (n - 1.0).max(1.0) / n).sqrt()
    }
}

/// Evaluates every image of a data set, `batch_size` at a time, the last batch smaller where the
/// number does not divide. `progress` is told the number of images done after every batch and can
/// stop the evaluation, which then gives `None`.
///
/// # Errors
/// Where images can't be read.
pub fn evaluate(
    network: &Network,
    data: &Dataset,
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Evaluation>, DataError> {
    let config = network.config();
    let mut bits_per_dim = Vec::with_capacity(data.len());
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    while bits_per_dim.len() < data.len() {
        let start = bits_per_dim.len();
        let indices: Vec<usize> = (start..data.len().min(start + batch_size)).collect();
        data.read(&indices, &mut images, &mut labels)?;
        let nats = network.nats_per_image(Batch {
            images: &images,
            labels: &labels,
        });
        bits_per_dim.extend(nats.iter().map(|&nats| config.bits_per_dim(nats)));
        if progress(bits_per_dim.len()).is_break() {
            return Ok(None);
        }
    }
    Ok(Some(Evaluation { bits_per_dim }))
}
