//! A trained model in one hand: its shape, its weights and what is known of them.
//!
//! ```
//! use pixelcnn::Model;
//! use pixelcnn::sample::Sampling;
//!
//! # #[cfg(feature = "pretrained")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let model = Model::pretrained()?; // or Model::open a run, a checkpoint or weights of elsewhere
//! // Two images, u8 [2, 32, 32, 3], and how unlikely the model finds them.
//! let images = model.sample(&Sampling::of(2, 1))?;
//! for bits in model.bits_per_dim(&images, &[])? {
//!     println!("{bits:.2} bits/dim");
//! }
//! # assert_eq!(images.len(), 2 * 32 * 32 * 3);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "pretrained"))]
//! # fn main() {}
//! ```
//!
//! These methods run on the CPU and don't tell how far they are. Where that matters, or for another
//! device, take what they are made of: [`Model::sampler`] for [`sample`](crate::sample::sample()) and
//! [`complete`](crate::complete::complete()), [`compress`](crate::archive::compress()) on the CPU alone,
//! [`Model::network`] for [`evaluate`](crate::evaluate::evaluate()) and
//! [`score`](crate::score::score()).

use std::io::Cursor;
use std::ops::ControlFlow;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::incremental::{Evaluator, EvaluatorError};

use crate::archive::{self, Archive, ArchiveError, CodingModel, Item, Taken};
use crate::complete::{self, Completion};
use crate::device::Device;
use crate::network::{Batch, EngineError, Network};
use crate::sample::{self, DrawError, Sampler, Sampling};
use crate::weights::hub::Card;

/// Images evaluated or compressed side by side.
const SIDE_BY_SIDE: usize = 16;

/// A trained model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its shape.
    pub config: ModelConfig,
    /// Its parameters, in the order of [`Layout`](pixelcnn_core::network::Layout).
    pub weights: Vec<Vec<f32>>,
    /// How they came about, and how good they are.
    pub card: Card,
}

impl Model {
    /// The network with the model's weights, for likelihoods of many images at a time.
    ///
    /// # Errors
    /// Where the weights are not those of the shape, or the device refuses.
    pub fn network(&self, device: &Device) -> Result<Network, EngineError> {
        Network::new(&self.config, &self.weights, device)
    }

    /// The network pixel by pixel, for drawing and coding images.
    ///
    /// # Errors
    /// Where the weights are not those of the shape.
    pub fn evaluator(&self) -> Result<Evaluator, EvaluatorError> {
        Evaluator::new(&self.config, &self.weights)
    }

    /// The model ready to draw images on a device.
    ///
    /// # Errors
    /// Where the weights are not those of the shape, or the device refuses.
    pub fn sampler(&self, device: &Device) -> Result<Sampler, DrawError> {
        Sampler::new(&self.config, &self.weights, device)
    }

    /// Draws images: u8 \[N, H, W, C\].
    ///
    /// # Errors
    /// A class that the model does not have, or no memory.
    pub fn sample(&self, sampling: &Sampling) -> Result<Vec<u8>, DrawError> {
        let sampler = self.evaluator()?.into();
        let images = 0..sampling.labels.len();
        sample::sample(&sampler, sampling, images, &mut |_| unheard())
    }

    /// Completes images of which a part is known: u8 \[N, variants, H, W, C\].
    ///
    /// # Errors
    /// A class that the model does not have, or no memory.
    ///
    /// # Panics
    /// If the completion's lengths disagree.
    pub fn complete(&self, completion: &Completion) -> Result<Vec<u8>, DrawError> {
        complete::complete(&self.evaluator()?.into(), completion, &mut |_| unheard())
    }

    /// Minus the log-likelihood of each image in nats (paper, section 2.1), or its energy distance of a model
    /// that is trained by that. `images` are u8 \[N, H, W, C\]; `labels` the class of each, or empty for an
    /// unconditional model.
    ///
    /// # Errors
    /// Where they are not what the model takes.
    pub fn nats(&self, images: &[u8], labels: &[u32]) -> Result<Vec<f64>, EngineError> {
        let network = self.network(&Device::CPU)?;
        let mut nats = Vec::new();
        for (n, images) in images
            .chunks(SIDE_BY_SIDE * self.config.bytes_per_image())
            .enumerate()
        {
            let rest = labels.get(n * SIDE_BY_SIDE..).unwrap_or_default();
            let labels = &rest[..rest.len().min(SIDE_BY_SIDE)];
            nats.extend(network.nats_per_image(Batch {
                images,
                labels,
                ..Batch::default()
            })?);
        }
        Ok(nats)
    }

    /// The same in bits per dimension: nats / (ln 2 · H · W · C).
    ///
    /// # Errors
    /// As [`Model::nats`].
    pub fn bits_per_dim(&self, images: &[u8], labels: &[u32]) -> Result<Vec<f64>, EngineError> {
        let nats = self.nats(images, labels)?;
        let bits = nats.iter().map(|&nats| self.config.bits_per_dim(nats));
        Ok(bits.collect())
    }

    /// The model ready to code pictures without loss.
    ///
    /// # Errors
    /// Where the weights are not those of the shape, or it gives images no likelihood.
    pub fn coder(&self) -> Result<CodingModel, EvaluatorError> {
        CodingModel::new(&self.config, &self.weights)
    }

    /// Compresses files, pictures of any size among them: the bytes of a `.pxc` file.
    ///
    /// # Errors
    /// Where a name is none that a file can have, or a class is none that the model has.
    pub fn compress(&self, files: Vec<Item>) -> Result<Vec<u8>, ArchiveError> {
        archive::compress(&self.coder()?, files, &mut |_| unheard())
    }

    /// Decompresses all that is in a `.pxc` file that was made with this model: names, and files or why they
    /// are lost. Of others [`find_model`](archive::Reader::find_model) may know the model.
    ///
    /// # Errors
    /// As [`Archive::new`](archive::Archive::new) and [`Archive::read`](archive::Archive::read).
    pub fn decompress(&self, file: &[u8]) -> Result<Vec<(String, Taken)>, ArchiveError> {
        let mut archive = Archive::new(Cursor::new(file))?;
        let all: Vec<usize> = (0..archive.entries().len()).collect();
        let found = archive.read(&self.coder()?, &all, &mut |_| unheard())?;
        let names = archive.entries().iter().map(|entry| entry.name.clone());
        Ok(names.zip(found).collect())
    }
}

/// Nobody is told how far work is.
fn unheard() -> ControlFlow<()> {
    ControlFlow::Continue(())
}
