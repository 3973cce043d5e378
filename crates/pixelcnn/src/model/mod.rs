//! The network with its parameters on a device: likelihoods, logits and gradients of batches.

mod init;
mod pass;
mod weights;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pixelcnn_core::ModelConfig;
use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::likelihood::{Mixture, from_level};
use pixelcnn_core::network::Layout;
use rayon::prelude::*;

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

/// Pixels of a batch that are computed together, at least: few enough that their maps stay in the
/// cache and the cores seldom wait for one another, enough to be worth reading the weights for.
const PIXELS: usize = 4096;
/// Weights for every pixel of such a part, at most, where their gradients are added up as well.
const WEIGHTS_PER_PIXEL: usize = 8192;

/// PixelCNN++ with its weights on a device.
#[derive(Debug)]
pub struct Network<'a> {
    config: ModelConfig,
    device: Device,
    engine: Engine,
    layout: Layout,
    parameters: &'a [Vec<f32>],
    /// As [`weights::weights`] makes them of the parameters.
    weights: Vec<Tensor<1>>,
}

impl<'a> Network<'a> {
    /// The network of `parameters`, in the layout's order, on the device.
    pub fn new(config: &ModelConfig, parameters: &'a [Vec<f32>], device: &Device) -> Network<'a> {
        Network::with_engine(config, parameters, device, Engine::of(device))
    }

    /// As [`Network::new`], with the body of the operations chosen.
    pub fn with_engine(
        config: &ModelConfig,
        parameters: &'a [Vec<f32>],
        device: &Device,
        engine: Engine,
    ) -> Network<'a> {
        let layout = Layout::new(config);
        let weights = weights::weights(&layout.layers, parameters)
            .into_iter()
            .map(|values| {
                let shape = [values.len()];
                to_device(values, shape, device)
            })
            .collect();
        Network {
            config: config.clone(),
            device: device.clone(),
            engine,
            layout,
            parameters,
            weights,
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The same parameters for images of another height: no pixel depends on those below it.
    pub(crate) fn with_height(&self, height: usize) -> Network<'a> {
        let mut config = self.config.clone();
        config.height = height;
        Network {
            layout: Layout::new(&config),
            config,
            device: self.device.clone(),
            engine: self.engine,
            parameters: self.parameters,
            weights: self.weights.clone(),
        }
    }

    /// The mixture's parameters \[N, H, W, output channels\], without dropout.
    pub fn logits(&self, batch: Batch) -> Vec<f32> {
        self.in_parts(batch, PIXELS, |part| self.logits_of_part(part))
            .concat()
    }

    /// The feature maps of the two stacks in the order in which the original records them.
    pub fn feature_maps(&self, batch: Batch) -> Vec<Vec<f32>> {
        let mut maps = Vec::new();
        let record = Some(&mut maps);
        TensorPass {
            record,
            ..self.pass(batch)
        }
        .run(batch);
        maps.into_iter().map(to_host).collect()
    }

    /// Nats of each image (paper, equation 2), without dropout.
    pub fn nats_per_image(&self, batch: Batch) -> Vec<f64> {
        let pixels = self.config.height * self.config.width;
        let nats = |part: Part| {
            let logits = self.logits_of_part(part);
            Mixture::of(&self.config).nats_per_image(pixels, &scaled(part.batch.images), &logits)
        };
        self.in_parts(batch, PIXELS, nats).concat()
    }

    /// Nats of every pixel \[N, H, W\], all its channels together, given those before it: where in an
    /// image its nats are spent. Without dropout.
    pub fn nats_per_pixel(&self, batch: Batch) -> Vec<f32> {
        let nats = |part: Part| {
            let logits = self.logits_of_part(part);
            Mixture::of(&self.config).nats_per_pixel(&scaled(part.batch.images), &logits)
        };
        self.in_parts(batch, PIXELS, nats).concat()
    }

    /// The summed nats of a batch and their gradient.
    pub fn gradients(&self, batch: Batch, dropout: Option<Dropout>) -> Gradients {
        let least_pixels = PIXELS.max(self.layout.size() / WEIGHTS_PER_PIXEL);
        let mut parts = self
            .in_parts(batch, least_pixels, |part| {
                self.gradients_of_part(part, dropout)
            })
            .into_iter();
        let mut sum = parts.next().expect("there is always a part");
        // In the order of the images, so that the sum is the same whoever computed them.
        for part in parts {
            sum.nats += part.nats;
            let gradients = sum.gradients.par_iter_mut().zip(part.gradients);
            gradients.for_each(|(sum, part)| add(sum, &part));
        }
        weights::parameter_gradients(&self.layout.layers, self.parameters, &mut sum.gradients);
        sum
    }

    /// Runs `f` on parts of a batch, side by side; gives the results in the images' order. The parts
    /// follow from the shapes alone: the order in which gradients are summed hangs on them.
    fn in_parts<R: Send>(
        &self,
        batch: Batch,
        least_pixels: usize,
        f: impl Fn(Part) -> R + Sync,
    ) -> Vec<R> {
        let images = batch.len(&self.config);
        let pixels = images * self.config.height * self.config.width;
        let parts = match self.engine {
            Engine::Kernels => (pixels / least_pixels).max(1),
            Engine::Portable => 1,
        };
        let part = |part: usize| {
            let images = images * part / parts..images * (part + 1) / parts;
            let [start, end] = [images.start, images.end].map(|image| image * self.config.dims());
            let first = images.start;
            let batch = Batch {
                images: &batch.images[start..end],
                labels: match self.config.nr_classes {
                    0 => &[],
                    _ => &batch.labels[images],
                },
            };
            f(Part { first, batch })
        };
        (0..parts).into_par_iter().map(part).collect()
    }

    fn logits_of_part(&self, part: Part) -> Vec<f32> {
        to_host(self.pass(part.batch).run(part.batch))
    }

    /// The gradients for the weights.
    fn gradients_of_part(&self, part: Part, dropout: Option<Dropout>) -> Gradients {
        let leaves: Vec<Tensor<1>> = self
            .weights
            .iter()
            .map(|weight| weight.clone().autodiff().require_grad())
            .collect();
        let logits = TensorPass {
            device: &self.device.clone().autodiff(),
            weights: &leaves,
            dropout,
            first_image: part.first,
            ..self.pass(part.batch)
        }
        .run(part.batch);

        // The likelihood is the core's on every device: its gradient is what backpropagation
        // starts from.
        let pixels = self.config.height * self.config.width;
        let values = to_host(logits.clone().inner());
        let mut gradient = vec![0.0; values.len()];
        let nats = Mixture::of(&self.config).nats_and_gradient(
            pixels,
            &scaled(part.batch.images),
            &values,
            &mut gradient,
        );
        let gradient = to_device(gradient, logits.dims(), &self.device);
        let gradients = self.engine.seed_gradient(logits, gradient).backward();
        let gradients = leaves
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

    /// A plain pass over a batch.
    fn pass(&self, batch: Batch) -> TensorPass<'_> {
        TensorPass {
            config: &self.config,
            device: &self.device,
            engine: self.engine,
            weights: &self.weights,
            labels: labels(&self.config, batch, &self.device),
            dropout: None,
            first_image: 0,
            initialise: None,
            record: None,
        }
    }
}

/// Some images of a batch that follow one another.
#[derive(Clone, Copy)]
struct Part<'a> {
    /// Place of the first one in the batch.
    first: usize,
    batch: Batch<'a>,
}

fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
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
