//! The network: its layout, its parameters at work (likelihoods and logits of batches), and the
//! parameters before the first step.

use pixelcnn_core::ModelConfig;
use pixelcnn_core::kernels::pointwise::Dropout;
use rand_distr::{Distribution, Normal};

use crate::device::Device;
use crate::random::{Purpose, generator};

pub use pixelcnn_core::engine::{Batch, Engine, EngineError};
pub use pixelcnn_core::network::*;

/// Deviation of the random directions `V` and conditional weights `hw`.
const DEVIATION: f32 = 0.05;

/// PixelCNN++ with its weights on a device.
pub struct Network {
    engine: Box<dyn Engine>,
}

impl Network {
    /// The network of `parameters`, in the layout's order, on the device.
    ///
    /// # Errors
    /// Where the configuration or the parameters are not a model's.
    pub fn new(
        config: &ModelConfig,
        parameters: &[Vec<f32>],
        device: &Device,
    ) -> Result<Network, EngineError> {
        let mut engine = device.engine(config)?;
        engine.load_weights(parameters)?;
        Ok(Network { engine })
    }

    /// The network of whatever weights an engine has.
    pub(crate) fn of(engine: Box<dyn Engine>) -> Network {
        Network { engine }
    }

    /// Who computes.
    pub(crate) fn engine(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.engine.config()
    }

    /// See [`Engine::resize`].
    ///
    /// # Errors
    /// [`EngineError::Config`].
    pub fn resize(&mut self, size: [usize; 2]) -> Result<(), EngineError> {
        self.engine.resize(size)
    }

    /// See [`Engine::logits`].
    ///
    /// # Errors
    /// Where the batch is not the model's, as for all below.
    pub fn logits(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        self.engine.logits(batch)
    }

    /// See [`Engine::feature_maps`].
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn feature_maps(&self, batch: Batch) -> Result<Vec<Vec<f32>>, EngineError> {
        self.engine.feature_maps(batch)
    }

    /// See [`Engine::nats_per_image`].
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn nats_per_image(&self, batch: Batch) -> Result<Vec<f64>, EngineError> {
        self.engine.nats_per_image(batch)
    }

    /// See [`Engine::nats_per_pixel`].
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn nats_per_pixel(&self, batch: Batch) -> Result<Vec<f32>, EngineError> {
        self.engine.nats_per_pixel(batch)
    }
}

/// Draws every parameter, in the order of [`Layout`], as the original does: `V` and `hw` from
/// N(0, 0.05), `g` 1, `b` 0. They are drawn on the host, so that a seed means the same on every
/// device.
pub fn draw_parameters(config: &ModelConfig, seed: u64) -> Vec<Vec<f32>> {
    let mut random = generator(seed, Purpose::Parameters, 0);
    let normal = Normal::new(0.0, DEVIATION).expect("the deviation is finite");
    Layout::new(config)
        .parameters
        .iter()
        .map(|parameter| match parameter.kind {
            ParameterKind::V | ParameterKind::Hw => {
                let draws = normal.sample_iter(&mut random);
                draws.take(parameter.len()).collect()
            }
            ParameterKind::G => vec![1.0; parameter.len()],
            ParameterKind::B => vec![0.0; parameter.len()],
        })
        .collect()
}

/// Data-dependent initialisation: see [`Engine::initialise`].
///
/// # Errors
/// Where the configuration, the parameters or the batch are not a model's.
pub fn initialise(
    config: &ModelConfig,
    parameters: &mut [Vec<f32>],
    batch: Batch,
    dropout: Option<Dropout>,
    device: &Device,
) -> Result<Vec<f32>, EngineError> {
    device
        .engine(config)?
        .initialise(parameters, batch, dropout)
}
