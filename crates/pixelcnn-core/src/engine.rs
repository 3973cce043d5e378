//! Who carries a [plan](crate::plan) out, and owns the state of training.

use std::fmt;
use std::ops::Range;

use crate::config::{ConfigError, ModelConfig};
use crate::kernels::adam::Adam;
use crate::kernels::muon::Muon;
use crate::kernels::pointwise::Dropout;
use crate::network::Layout;
use crate::ranks::{RankError, Sharing};

/// The numbers that an engine computes with. Parameters, moments, averages, the residual stream, the
/// first layers, the logits and the loss are in single precision in any case, as are all sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Precision {
    /// Single precision everywhere.
    #[default]
    F32,
    /// On NVIDIA GPUs: convolutions, but the first layers' and the last one's, round what they multiply to
    /// 10 bits behind the binary point.
    Tf32,
    /// The blocks' convolutions round what they multiply to bfloat16, with 7 bits. On NVIDIA GPUs their
    /// results are rounded so as well, and the other convolutions are as with [`Precision::Tf32`].
    Bf16,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Tf32, Precision::Bf16];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        })
    }
}

/// A batch of images, with a class each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Batch<'a> {
    /// u8 \[N, H, W, C\]; codes in the place of levels as [`ModelConfig::bytes_per_pixel`] says.
    pub images: &'a [u8],
    /// \[N\]; not read by an unconditional model.
    pub labels: &'a [u32],
    /// How each image was transformed, \[N\]: a number up to
    /// [`Augmentation::count`](crate::Augmentation::count), 0 where it is as it was; empty where all are.
    pub augmentations: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Number of images, once they are found to be what a model takes.
    ///
    /// # Errors
    /// [`EngineError::Images`], [`EngineError::Code`], [`EngineError::Labels`] and
    /// [`EngineError::Class`].
    pub fn len(&self, config: &ModelConfig) -> Result<usize, EngineError> {
        let dims = config.bytes_per_image();
        if !self.images.len().is_multiple_of(dims) {
            let values = self.images.len();
            return Err(EngineError::Images { values, dims });
        }
        let images = self.images.len() / dims;
        if config.nr_codes > 0 {
            for (map, codes) in [config.nr_codes, config.nr_coarse_codes]
                .into_iter()
                .enumerate()
            {
                let pixels = self.images.chunks_exact(config.bytes_per_pixel());
                let mut found = pixels
                    .filter(|_| codes > 0)
                    .map(|pixel| ModelConfig::code(pixel, map));
                if let Some(code) = found.find(|code| *code >= codes) {
                    return Err(EngineError::Code { code, codes });
                }
            }
        }
        let nr_classes = config.nr_classes;
        if nr_classes > 0 {
            if self.labels.len() != images {
                let labels = self.labels.len();
                return Err(EngineError::Labels { labels, images });
            }
            let mut labels = self.labels.iter().copied();
            if let Some(class) = labels.find(|&class| class as usize >= nr_classes) {
                return Err(EngineError::Class { class, nr_classes });
            }
        }
        let known = config.augmentation.count();
        let mut augmentations = self.augmentations.iter().copied();
        let beyond = augmentations.find(|&number| usize::from(number) > known);
        if beyond.is_some() || ![0, images].contains(&self.augmentations.len()) {
            return Err(EngineError::Augmentations { known });
        }
        Ok(images)
    }

    /// Some of the images, with what is told of them.
    ///
    /// # Panics
    /// If there are no such images.
    pub fn part(&self, config: &ModelConfig, images: Range<usize>) -> Batch<'a> {
        let dims = config.bytes_per_image();
        Batch {
            images: &self.images[images.start * dims..images.end * dims],
            labels: self.labels.get(images.clone()).unwrap_or_default(),
            augmentations: self.augmentations.get(images).unwrap_or_default(),
        }
    }

    /// The rows of the conditional weights `hw` that are added up for an image: that of its class, and
    /// that of its augmentation.
    pub fn conditions(
        &self,
        config: &ModelConfig,
        image: usize,
    ) -> impl Iterator<Item = usize> + use<> {
        let nr_classes = config.nr_classes;
        let class = self.labels.get(image).filter(|_| nr_classes > 0);
        let augmentation = self.augmentations.get(image).copied().unwrap_or(0);
        let augmentation = usize::from(augmentation).checked_sub(1);
        let class = class.map(|&class| class as usize);
        class
            .into_iter()
            .chain(augmentation.map(|number| nr_classes + number))
    }
}

/// What training changes: arrays of parameters are in the [`Layout`]'s order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct State {
    /// The parameters.
    pub parameters: Vec<Vec<f32>>,
    /// Their Polyak average.
    pub average: Vec<Vec<f32>>,
    /// The running mean of the gradient.
    pub first: Vec<Vec<f32>>,
    /// And of its square, which Muon leaves as it is.
    pub second: Vec<Vec<f32>>,
}

/// How one step moves the parameters along their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Update {
    /// Moves all that Muon does not.
    pub adam: Adam,
    /// Moves the [matrices](Layout::matrices) of the layers, where it is used.
    pub muon: Option<Muon>,
}

impl From<Adam> for Update {
    fn from(adam: Adam) -> Update {
        Update { adam, muon: None }
    }
}

/// Why an engine refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A configuration that no model can have.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Parameters that are not those of the configuration.
    #[error("{name} has {found} values where the model has {expected}: use its own parameters")]
    Parameters {
        /// The first one that is wrong.
        name: String,
        /// Its number of values in the layout.
        expected: usize,
        /// And in what was given.
        found: usize,
    },
    /// Not whole images.
    #[error("{values} bytes are not whole images of {dims}: give images of the model's size")]
    Images {
        /// Bytes in the batch.
        values: usize,
        /// Bytes in an image.
        dims: usize,
    },
    /// A code beyond the model's.
    #[error("code {code}: the model has {codes}, from 0 on")]
    Code {
        /// The first one that is.
        code: usize,
        /// How many there are.
        codes: usize,
    },
    /// Not a class for each image.
    #[error("{labels} labels for {images} images: the model wants the class of each")]
    Labels {
        /// Labels in the batch.
        labels: usize,
        /// Images in it.
        images: usize,
    },
    /// A class beyond the model's.
    #[error("class {class}: the model has {nr_classes}: choose one from 0 on")]
    Class {
        /// What was asked for.
        class: u32,
        /// How many there are.
        nr_classes: usize,
    },
    /// Not a transformation for each image, or one that the model is not told of.
    #[error("augmentations: give a number from 0 to {known} for each image, or none at all")]
    Augmentations {
        /// The highest number that the model knows.
        known: usize,
    },
    /// The loss or its gradient is not a number; the state is as it was before the step.
    #[error("the loss or its gradient is not a number")]
    NotANumber,
    /// More images at a time than the device has memory for.
    #[error(
        "{images} images at a time need more memory than the device has: it has room for {room}"
    )]
    Memory {
        /// Images in the batch.
        images: usize,
        /// As many would fit.
        room: usize,
    },
    /// The device fails.
    #[error("{0}")]
    Device(String),
    /// Another rank can't be reached.
    #[error(transparent)]
    Rank(#[from] RankError),
    /// Other images than this rank's share of a batch.
    #[error("{images} images: this rank's share of a batch is {share}")]
    Share {
        /// Images in the batch.
        images: usize,
        /// As many they should be.
        share: usize,
    },
    /// There is nothing loaded to work with.
    #[error("the engine has no {0}: load it first")]
    NotLoaded(&'static str),
}

/// Carries the plan of a model out, on some device.
///
/// To train, [`load`](Engine::load) a state and take [`step`](Engine::step)s; to evaluate,
/// [`load_weights`](Engine::load_weights). Both use the same memory, so a step forgets the weights.
pub trait Engine: Send + Sync {
    /// The model's shape.
    fn config(&self) -> &ModelConfig;

    /// Takes images of another height and width from now on, with the same state and weights.
    ///
    /// # Errors
    /// [`EngineError::Config`] where no image has them.
    fn resize(&mut self, size: [usize; 2]) -> Result<(), EngineError>;

    /// Data-dependent initialisation (Salimans & Kingma, 2016, section 3): one pass over a batch
    /// that sets each layer's `g` and `b` among the drawn `parameters` from its own output, which
    /// goes on normalised. Gives the output of that pass.
    ///
    /// # Errors
    /// Where parameters or images are not the model's.
    fn initialise(
        &self,
        parameters: &mut [Vec<f32>],
        batch: Batch,
        dropout: Option<Dropout>,
    ) -> Result<Vec<f32>, EngineError>;

    /// Checks that there is memory to train on so many images at a time.
    ///
    /// # Errors
    /// [`EngineError::Memory`].
    fn expect_room(&self, _images: usize) -> Result<(), EngineError> {
        // The system has more than anyone waits for.
        Ok(())
    }

    /// Takes a state over.
    ///
    /// # Errors
    /// [`EngineError::Parameters`].
    fn load(&mut self, state: State) -> Result<(), EngineError>;

    /// Gives the state back; the engine has none until it is given one again.
    ///
    /// # Errors
    /// [`EngineError::NotLoaded`].
    fn unload(&mut self) -> Result<State, EngineError>;

    /// Shares batches out: from now on those to train on are this rank's images of whole ones. Before
    /// that, and with none, a batch is whole, and one shard.
    ///
    /// # Errors
    /// [`EngineError::Device`] where the engine can't share batches so.
    fn share(&mut self, sharing: Option<Sharing>) -> Result<(), EngineError>;

    /// Computes the gradients of the summed nats of a whole batch by the parameters, and keeps them;
    /// gives the nats. Forgets the weights to evaluate with. A model of the energy distance has its noise by
    /// the seed of the dropout, of whatever rate; without one it is the same at every step.
    ///
    /// # Errors
    /// Where images are not the model's or not this rank's share, there is no state, or another rank
    /// can't be reached.
    fn backward(&mut self, batch: Batch, dropout: Option<Dropout>) -> Result<f64, EngineError>;

    /// A copy of the gradients that are kept, in the layout's order.
    ///
    /// # Errors
    /// [`EngineError::NotLoaded`] where there are none.
    fn gradients(&self) -> Result<Vec<Vec<f32>>, EngineError>;

    /// Moves parameters, moments and average by the gradients that are kept, which are then gone.
    ///
    /// # Errors
    /// [`EngineError::NotANumber`], after which the state is as it was.
    fn update(&mut self, update: &Update) -> Result<(), EngineError>;

    /// Takes a step; gives the nats of the batch before it.
    ///
    /// # Errors
    /// Those of its parts; the state is then as it was.
    fn step(
        &mut self,
        batch: Batch,
        dropout: Option<Dropout>,
        update: &Update,
    ) -> Result<f64, EngineError> {
        let nats = self.backward(batch, dropout)?;
        if !nats.is_finite() {
            return Err(EngineError::NotANumber);
        }
        self.update(update)?;
        Ok(nats)
    }

    /// Takes parameters to evaluate with, up to the next step.
    ///
    /// # Errors
    /// [`EngineError::Parameters`].
    fn load_weights(&mut self, parameters: &[Vec<f32>]) -> Result<(), EngineError>;

    /// The mixture's parameters, or whatever the model's output is \[N, H, W, [`ModelConfig::output_channels`]\], without dropout.
    ///
    /// # Errors
    /// Where images are not the model's, or there are no weights; as for all below.
    fn logits(&self, batch: Batch) -> Result<Vec<f32>, EngineError>;

    /// Nats of each image (paper, section 2.1), without dropout.
    ///
    /// # Errors
    /// As [`Engine::logits`].
    fn nats_per_image(&self, batch: Batch) -> Result<Vec<f64>, EngineError>;

    /// Nats of every pixel \[N, H, W\], all its channels together, given those before it: where in
    /// an image its nats are spent. Without dropout.
    ///
    /// # Errors
    /// As [`Engine::logits`].
    fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError>;

    /// The feature maps of the two stacks in the order in which the original records them, each
    /// \[N, rows, columns, filters\].
    ///
    /// # Errors
    /// As [`Engine::logits`].
    fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError>;
}

/// Checks that arrays are shaped as a model's parameters.
///
/// # Errors
/// [`EngineError::Parameters`] with the first one that is not.
pub fn expect_parameters(layout: &Layout, values: &[Vec<f32>]) -> Result<(), EngineError> {
    match layout.misfit(values) {
        None => Ok(()),
        Some((parameter, found)) => Err(EngineError::Parameters {
            name: parameter.name.clone(),
            expected: parameter.len(),
            found,
        }),
    }
}

/// The images of a batch that are this rank's, and the shards that they are cut into; a batch that is not shared out
/// is one shard. There are so many images at hand.
///
/// # Errors
/// [`EngineError::Share`] where those are not this rank's.
pub fn own_shards(
    sharing: Option<&Sharing>,
    images: usize,
) -> Result<(Range<usize>, Vec<Range<usize>>), EngineError> {
    let all = 0..images;
    let Some(sharing) = sharing else {
        return Ok((all.clone(), vec![all]));
    };
    let own = sharing.images();
    match own.len() == images {
        true => Ok((own, sharing.shards().collect())),
        false => Err(EngineError::Share {
            images,
            share: own.len(),
        }),
    }
}
