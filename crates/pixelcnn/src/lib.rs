//! PixelCNN++.

mod atomic;
pub mod data;
pub mod device;
pub mod evaluate;
pub mod model;
pub mod ops;
pub mod picture;
mod random;
pub mod sample;
pub mod train;

pub use pixelcnn_core::{
    ConfigError, ModelConfig, Nonlinearity, config, kernels, likelihood, network,
};
