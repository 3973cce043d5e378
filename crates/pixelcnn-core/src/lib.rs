//! PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, 2017) without an engine: the model's
//! shape, the network's topology, the likelihood and the hand-written CPU kernels.
//!
//! The crate `pixelcnn` re-exports all of it and adds data, training and devices.

pub mod codec;
pub mod config;
pub mod incremental;
pub mod kernels;
pub mod likelihood;
pub mod network;

pub use config::{ConfigError, ModelConfig, Nonlinearity};
