//! PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, 2017), the mathematics alone: the model's
//! shape, the network's topology, the likelihood, the plan of the network's operations, and the
//! engine that carries it out on the CPU by hand-written kernels.
//!
//! The crate `pixelcnn` re-exports all of it and adds data, files and training.

pub mod codec;
pub mod config;
pub mod cpu;
pub mod engine;
pub mod incremental;
pub mod kernels;
pub mod likelihood;
pub mod network;
pub mod plan;
mod progress;
pub mod ranks;
pub mod reference;

pub use config::{Augmentation, ConfigError, ModelConfig, Nonlinearity};
pub use progress::{Stopped, go_on};

// The tests of all engines are also those of this crate's, and know it by its name.
#[cfg(test)]
extern crate self as pixelcnn_core;
#[cfg(test)]
#[path = "../tests/suite/mod.rs"]
mod suite;
