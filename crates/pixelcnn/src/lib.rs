//! PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, 2017): image models with an exact
//! likelihood. Train them, evaluate them in bits/dim, sample from them.
//!
//! ```
//! use pixelcnn::data::{DataConfig, Dataset, Split};
//! use pixelcnn::sample::Sampling;
//! use pixelcnn::{Model, device, evaluate};
//! use std::ops::ControlFlow;
//!
//! # #[cfg(feature = "pretrained")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
//! // A trained model: the shipped one, or Model::open a run, a checkpoint or weights of elsewhere.
//! let model = Model::pretrained()?;
//!
//! // Two images drawn from it, u8 [2, height, width, channels], and how likely it finds them.
//! let drawn = model.sample(&Sampling::of(2, 1))?;
//! println!("{:.2?} bits/dim", model.bits_per_dim(&drawn, &[])?);
//!
//! // Images, from CIFAR-10, a folder of pictures or an array file, and how likely it finds those.
//! let data = DataConfig { data: path.into(), ..DataConfig::default() };
//! let images = Dataset::open(&data, Split::Test)?;
//! let mut network = model.network(&device::parse("auto")?)?;
//! let go_on = &mut |_: &evaluate::Evaluation| ControlFlow::Continue(());
//! let figures = evaluate::evaluate(&mut network, &images, 0..8, 8, go_on)?;
//! println!("{}: {:.2} ± {:.2}", images.describe(), figures.mean(), figures.standard_error());
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "pretrained"))]
//! # fn main() {}
//! ```
//!
//! A program that trains calls [`train::Training::begin`] and is told of everything as [`train::Event`]s.
//! The trained models that come with the library ([`Shipped`]) are under the cargo feature `pretrained`,
//! which is on by default.

pub mod archive;
pub mod atomic;
pub mod classify;
pub mod complete;
pub mod data;
pub mod device;
pub mod evaluate;
#[cfg(feature = "cuda")]
pub mod local;
pub mod model;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod network;
pub mod numpy;
mod open;
pub mod picture;
#[cfg(feature = "pretrained")]
mod pretrained;
mod random;
pub mod sample;
pub mod score;
pub mod train;
pub mod weights;

pub use model::Model;
pub use open::OpenError;
pub use pixelcnn_core::{
    Augmentation, ConfigError, ModelConfig, Nonlinearity, Stopped, codec, config, cpu, engine,
    incremental, kernels, likelihood, plan, ranks, reference,
};
#[cfg(feature = "pretrained")]
pub use pretrained::{NoSuchModel, Shipped};

/// Bytes in hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What comes from a file or another crate may span lines; messages don't.
fn one_line(text: impl std::fmt::Display) -> String {
    let text = text.to_string();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
