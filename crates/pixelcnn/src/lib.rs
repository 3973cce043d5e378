//! PixelCNN++.

pub mod model;
pub mod ops;
mod random;

pub use pixelcnn_core::{ModelConfig, Nonlinearity, config, kernels, likelihood, network};
