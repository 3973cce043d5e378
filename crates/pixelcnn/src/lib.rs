//! PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, 2017): image models with an exact
//! likelihood. Train them, evaluate them in bits/dim, sample from them.
//!
//! ```
//! use pixelcnn::data::{DataConfig, Dataset, Split};
//! use pixelcnn::incremental::Evaluator;
//! use pixelcnn::{ModelConfig, device, model, sample};
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
//! # let (nr_filters, height, width) = (4, 8, 8);
//! // Images, from CIFAR-10, a folder of pictures or an array file.
//! let data = DataConfig { data: path.into(), ..DataConfig::default() };
//! let images = Dataset::open(&data, Split::Test, &())?;
//! println!("{}", images.describe());
//!
//! // A model: here an untrained one. `train::checkpoint::TrainState::read` loads a trained one.
//! let config = ModelConfig { nr_resnet: 1, nr_filters, height, width, ..ModelConfig::default() };
//! let parameters = model::draw_parameters(&config, 1);
//! let network = model::Network::new(&config, &parameters, &device::parse("auto")?)?;
//!
//! // Two images drawn from it, u8 [2, height, width, channels], and how likely it finds them.
//! let evaluator = Evaluator::new(&config, &parameters)?;
//! let sampling = sample::Sampling { labels: vec![0; 2], temperature: 1.0, seed: 1 };
//! let drawn = sample::sample(&evaluator, &sampling, &mut |_| ControlFlow::Continue(()))?;
//! let drawn = drawn.ok_or("stopped")?;
//! let batch = model::Batch { images: &drawn, labels: &[0; 2] };
//! for nats in network.nats_per_image(batch)? {
//!     println!("{:.2} bits/dim", config.bits_per_dim(nats));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A program that trains calls [`train::train`] and is told of everything as [`train::Event`]s.
//! A trained model comes with the library: `pretrained::cifar10`, under the cargo feature
//! `pretrained`, which is on by default.

pub mod atomic;
pub mod complete;
pub mod compress;
pub mod data;
pub mod device;
pub mod evaluate;
pub mod model;
pub mod numpy;
pub mod picture;
#[cfg(feature = "pretrained")]
pub mod pretrained;
mod random;
pub mod sample;
pub mod score;
pub mod train;
pub mod weights;

pub use pixelcnn_core::{
    ConfigError, ModelConfig, Nonlinearity, codec, config, cpu, engine, incremental, kernels,
    likelihood, network, plan, reference,
};

/// What comes from a file or another crate may span lines; messages don't.
fn one_line(text: impl std::fmt::Display) -> String {
    let text = text.to_string();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
