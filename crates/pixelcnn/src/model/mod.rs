//! The network with its parameters on a device: likelihoods, logits and gradients of batches.

mod init;
mod pass;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pixelcnn_core::ModelConfig;
use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::likelihood::{Mixture, from_level};
use pixelcnn_core::network::pixelcnn;

pub use init::{draw_parameters, initialise};

use crate::ops::Engine;
use pass::{TensorPass, to_device, to_host};

/// A batch of images: u8 NHWC, with a class each.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// \[N, H, W, C\].
    pub images: &'a [u8],
    /// \[N\]; not read by an unconditional model.
    pub labels: &'a [u32],
}

impl Batch<'_> {
    fn len(&self, config: &ModelConfig) -> usize {
        assert_eq!(self.images.len() % config.dims(), 0, "whole images");
        self.images.len() / config.dims()
    }
}

/// What a training step needs of the network.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Nats of the whole batch.
    pub nats: f64,
    /// Of the summed nats, in the layout's order.
    pub gradients: Vec<Vec<f32>>,
}

/// PixelCNN++ with its parameters on a device.
#[derive(Debug)]
pub struct Network {
    config: ModelConfig,
    device: Device,
    engine: Engine,
    parameters: Vec<Tensor<1>>,
}

impl Network {
    /// Moves `parameters`, in the layout's order, to the device.
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>], device: &Device) -> Network {
        Network::with_engine(config, parameters, device, Engine::of(device))
    }

    /// As [`Network::new`], with the body of the operations chosen.
    pub fn with_engine(
        config: &ModelConfig,
        parameters: &[Vec<f32>],
        device: &Device,
        engine: Engine,
    ) -> Network {
        let parameters = parameters
            .iter()
            .map(|values| to_device(values.clone(), [values.len()], device))
            .collect();
        Network {
            config: config.clone(),
            device: device.clone(),
            engine,
            parameters,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The same parameters for images of another height: no pixel depends on those below it.
    pub(crate) fn with_height(&self, height: usize) -> Network {
        let mut config = self.config.clone();
        config.height = height;
        Network {
            config,
            device: self.device.clone(),
            engine: self.engine,
            parameters: self.parameters.clone(),
        }
    }

    /// The mixture's parameters \[N, H, W, output channels\], without dropout.
    pub fn logits(&self, batch: Batch) -> Vec<f32> {
        to_host(self.forward(
            batch,
            &mut self.parameters.clone(),
            &self.device,
            None,
            None,
        ))
    }

    /// The feature maps of the two stacks in the order in which the original records them.
    pub fn feature_maps(&self, batch: Batch) -> Vec<Vec<f32>> {
        let mut maps = Vec::new();
        let mut parameters = self.parameters.clone();
        self.forward(batch, &mut parameters, &self.device, None, Some(&mut maps));
        maps.into_iter().map(to_host).collect()
    }

    /// Nats of each image (paper, equation 2), without dropout.
    pub fn nats_per_image(&self, batch: Batch) -> Vec<f64> {
        let logits = self.logits(batch);
        let pixels = self.config.height * self.config.width;
        Mixture::of(&self.config).nats_per_image(pixels, &scaled(batch.images), &logits)
    }

    /// The summed nats of a batch and their gradient.
    pub fn gradients(&self, batch: Batch, dropout: Option<Dropout>) -> Gradients {
        let device = self.device.clone().autodiff();
        let parameters: Vec<Tensor<1>> = self
            .parameters
            .iter()
            .map(|tensor| tensor.clone().autodiff().require_grad())
            .collect();
        let mut leaves = parameters.clone();
        let logits = self.forward(batch, &mut leaves, &device, dropout, None);

        // The likelihood is the core's on every device: its gradient is what backpropagation
        // starts from.
        let pixels = self.config.height * self.config.width;
        let values = to_host(logits.clone().inner());
        let mut gradient = vec![0.0; values.len()];
        let nats = Mixture::of(&self.config).nats_and_gradient(
            pixels,
            &scaled(batch.images),
            &values,
            1.0,
            &mut gradient,
        );
        let gradient = to_device(gradient, logits.dims(), &self.device);
        let loss = self.engine.seed_gradient(logits, gradient);
        let gradients = loss.backward();
        let gradients = parameters
            .iter()
            .map(|leaf| match leaf.grad(&gradients) {
                Some(gradient) => to_host(gradient),
                None => vec![0.0; leaf.dims()[0]],
            })
            .collect();
        Gradients {
            nats: nats.iter().sum(),
            gradients,
        }
    }

    fn forward(
        &self,
        batch: Batch,
        parameters: &mut [Tensor<1>],
        device: &Device,
        dropout: Option<Dropout>,
        record: Option<&mut Vec<Tensor<4>>>,
    ) -> Tensor<4> {
        let n = batch.len(&self.config);
        let config = &self.config;
        let shape = [n, config.height, config.width, config.channels];
        let x = to_device(scaled(batch.images), shape, device);
        let mut pass = TensorPass {
            config,
            device,
            engine: self.engine,
            parameters,
            labels: labels(config, batch, device),
            dropout,
            initialise: false,
            record,
        };
        pixelcnn(config, &mut pass, x)
    }
}

/// Images scaled to \[-1, 1\].
fn scaled(images: &[u8]) -> Vec<f32> {
    images.iter().map(|&level| from_level(level)).collect()
}

fn labels(config: &ModelConfig, batch: Batch, device: &Device) -> Option<Tensor<1, Int>> {
    (config.nr_classes > 0).then(|| {
        assert_eq!(batch.labels.len(), batch.len(config), "a class per image");
        let labels: Vec<i32> = batch.labels.iter().map(|&label| label as i32).collect();
        Tensor::from_data(TensorData::new(labels, [batch.labels.len()]), device)
    })
}
