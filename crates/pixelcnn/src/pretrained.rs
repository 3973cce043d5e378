//! The trained model that comes with the library: feature `pretrained`, on by default.
//!
//! ```
//! use pixelcnn::incremental::Evaluator;
//! use pixelcnn::{pretrained, sample};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = pretrained::cifar10()?;
//! let evaluator = Evaluator::new(&model.config, &model.parameters)?;
//! // Two images, u8 [2, 32, 32, 3].
//! let sampling = sample::Sampling { labels: vec![0; 2], temperature: 1.0, seed: 1 };
//! let drawn = sample::sample(&evaluator, &sampling, &mut |_| ControlFlow::Continue(()))?;
//! # assert_eq!(drawn.ok_or("stopped")?.len(), 2 * 32 * 32 * 3);
//! # Ok(())
//! # }
//! ```

use crate::train::checkpoint::CheckpointError;
use crate::weights::hub::Weights;

/// A model of 32x32 images in RGB, trained on CIFAR-10's 50,000 training images. Its card says how
/// it was trained and how good it is.
///
/// # Errors
/// Where the file that it was built with was damaged.
pub fn cifar10() -> Result<Weights, CheckpointError> {
    let file = include_bytes!("../pretrained/cifar10.safetensors");
    Weights::parse(file, "cifar10.safetensors")
}
