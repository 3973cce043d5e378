//! The network's layers as tensors on a device, plain or with data-dependent initialisation.

use burn::tensor::{Device, Int, Tensor, TensorData};
use pixelcnn_core::kernels::conv::Conv;
use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::network::{GatedResnet, Layer, LayerKind, Pass, pixelcnn};
use pixelcnn_core::{ModelConfig, kernels};

use super::{Batch, scaled};
use crate::ops::{self, Engine, GatedResnetInputs, portable};

/// Added to the variance in data-dependent initialisation.
const INIT_EPSILON: f64 = 1e-10;

/// One run through the network.
pub(super) struct TensorPass<'a> {
    pub config: &'a ModelConfig,
    pub device: &'a Device,
    pub engine: Engine,
    /// All parameters, flat, in the layout's order, every `V` replaced by the weight that it and
    /// `g` make.
    pub weights: &'a [Tensor<1>],
    /// Class of every image, for a class-conditional model.
    pub labels: Option<Tensor<1, Int>>,
    /// Dropout's rate and the seed of this run.
    pub dropout: Option<Dropout>,
    /// Place of the first image in its batch.
    pub first_image: usize,
    /// The parameters whose `g` and `b` are set from each layer's own output on the way.
    pub initialise: Option<&'a mut [Vec<f32>]>,
    /// The feature maps of the two stacks, where they are asked for.
    pub record: Option<&'a mut Vec<Tensor<4>>>,
}

/// The kernels' geometry of a layer.
fn conv_of(layer: &Layer) -> Conv {
    Conv {
        window: layer.window,
        transposed: layer.kind == LayerKind::Deconv,
        inputs: layer.inputs,
        outputs: layer.outputs,
    }
}

impl TensorPass<'_> {
    /// The mixture's parameters \[N, H, W, output channels\] for the images of a batch.
    pub fn run(mut self, batch: Batch) -> Tensor<4> {
        let config = self.config;
        let n = batch.len(config);
        let shape = [n, config.height, config.width, config.channels];
        let x = to_device(scaled(batch.images), shape, self.device);
        pixelcnn(config, &mut self, x)
    }

    /// The layer's weight \[taps * inputs, outputs\] and bias.
    fn weight(&self, layer: &Layer) -> (Tensor<2>, Tensor<1>) {
        let [weight, bias] = [0, 2].map(|k| self.weights[layer.parameter + k].clone());
        let rows = layer.window.taps() * layer.inputs;
        (weight.reshape([rows, layer.outputs]), bias)
    }

    /// A transposed convolution's output before the original crops it: `kernel - 1` rows and
    /// columns more than twice the input's, empty margins included.
    fn uncropped(&self, layer: &Layer, x: &Tensor<4>) -> Tensor<4> {
        let (weight, bias) = self.weight(layer);
        let ([kh, kw], [top, left]) = (layer.window.kernel, layer.window.offset);
        let [n, h, w, _] = x.dims();
        let padded = x.clone().pad([(0, 0), (1, 1), (1, 1), (0, 0)], 0.0);
        let out = self.engine.conv(conv_of(layer), padded, weight, bias);
        let (rows, columns) = (
            2 - top..2 * h + 1 + kh - top,
            2 - left..2 * w + 1 + kw - left,
        );
        out.slice([0..n, rows, columns])
    }

    /// Sets `g` and `b` so that `out`, which the layer gave, has mean 0 and deviation `init_scale`
    /// per channel; gives the output so changed (Salimans & Kingma, 2016, section 3).
    fn data_dependent_initialisation(
        &self,
        parameters: &mut [Vec<f32>],
        layer: &Layer,
        x: &Tensor<4>,
        out: Tensor<4>,
    ) -> Tensor<4> {
        let dims = out.dims();
        let channels = layer.outputs;
        let observed = to_host(match layer.kind {
            LayerKind::Deconv => self.uncropped(layer, x),
            LayerKind::Conv | LayerKind::Dense => out.clone(),
        });
        let count = (observed.len() / channels) as f64;
        let mut mean = vec![0.0; channels];
        let mut square = vec![0.0; channels];
        for pixel in observed.chunks_exact(channels) {
            for (sum, &value) in mean.iter_mut().zip(pixel) {
                *sum += f64::from(value) / count;
            }
        }
        for pixel in observed.chunks_exact(channels) {
            for ((sum, &value), mean) in square.iter_mut().zip(pixel).zip(&mean) {
                *sum += (f64::from(value) - mean).powi(2) / count;
            }
        }
        let scale: Vec<f64> = square
            .iter()
            .map(|variance| f64::from(layer.init_scale) / (variance + INIT_EPSILON).sqrt())
            .collect();
        let mut values = to_host(out);
        for pixel in values.chunks_exact_mut(channels) {
            for ((value, mean), scale) in pixel.iter_mut().zip(&mean).zip(&scale) {
                *value = ((f64::from(*value) - mean) * scale) as f32;
            }
        }
        let changes = mean.iter().zip(&scale);
        for (g, scale) in parameters[layer.parameter + 1].iter_mut().zip(&scale) {
            *g = (f64::from(*g) * scale) as f32;
        }
        for (b, (mean, scale)) in parameters[layer.parameter + 2].iter_mut().zip(changes) {
            *b = (f64::from(*b) - mean * scale) as f32;
        }
        to_device(values, dims, self.device)
    }
}

/// A tensor's values.
pub(super) fn to_host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec()
        .expect("every tensor of the model is f32")
}

/// Values as a tensor.
pub(super) fn to_device<const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

impl Pass for TensorPass<'_> {
    type Map = Tensor<4>;

    fn append_ones(&mut self, x: Tensor<4>) -> Tensor<4> {
        let [n, h, w, _] = x.dims();
        Tensor::cat(vec![x, Tensor::ones([n, h, w, 1], self.device)], 3)
    }

    fn layer(&mut self, layer: &Layer, x: &Tensor<4>) -> Tensor<4> {
        let (weight, bias) = self.weight(layer);
        let out = self.engine.conv(conv_of(layer), x.clone(), weight, bias);
        match self.initialise.take() {
            Some(parameters) => {
                let out = self.data_dependent_initialisation(parameters, layer, x, out);
                self.initialise = Some(parameters);
                out
            }
            None => out,
        }
    }

    fn gated_resnet(
        &mut self,
        block: &GatedResnet,
        x: &Tensor<4>,
        a: Option<&Tensor<4>>,
    ) -> Tensor<4> {
        // Every block draws its own numbers.
        let [_, h, w, _] = x.dims();
        let dropout = self.dropout.map(|Dropout { rate, seed, .. }| Dropout {
            rate,
            seed: seed.wrapping_add(block.number as u64),
            first: self.first_image * h * w * block.conv_2.inputs,
        });
        let conditional = block
            .conditional
            .zip(self.labels.clone())
            .map(|(hw, labels)| {
                let shape = [self.config.nr_classes, block.conv_2.outputs];
                self.weights[hw].clone().reshape(shape).select(0, labels)
            });
        if self.engine == Engine::Kernels && self.initialise.is_none() {
            let nin = block.nin.as_ref().zip(a);
            return ops::gated_resnet(
                kernels::gated_resnet::GatedResnet {
                    conv_1: conv_of(&block.conv_1),
                    nin: block.nin.as_ref().map(conv_of),
                    conv_2: conv_of(&block.conv_2),
                    nonlinearity: self.config.nonlinearity,
                    dropout,
                },
                GatedResnetInputs {
                    x: x.clone(),
                    conv_1: self.weight(&block.conv_1),
                    nin: nin.map(|(nin, a)| {
                        let (weight, bias) = self.weight(nin);
                        (a.clone(), weight, bias)
                    }),
                    conv_2: self.weight(&block.conv_2),
                    conditional,
                },
            );
        }
        let f = |x: Tensor<4>| portable::nonlinearity(self.config.nonlinearity, x);

        let (f_x, f_a) = (f(x.clone()), a.cloned().map(f));
        let mut c1 = self.layer(&block.conv_1, &f_x);
        if let Some((nin, f_a)) = block.nin.as_ref().zip(f_a) {
            c1 = c1 + self.layer(nin, &f_a);
        }
        let mut c1 = portable::nonlinearity(self.config.nonlinearity, c1);
        if let Some(dropout) = dropout {
            c1 = portable::dropout(c1, dropout);
        }
        let mut c2 = self.layer(&block.conv_2, &c1);
        if let Some(h_hw) = conditional {
            let [n, channels] = h_hw.dims();
            c2 = c2 + h_hw.reshape([n, 1, 1, channels]);
        }
        portable::gate(x.clone(), c2)
    }

    fn down_shift(&mut self, x: Tensor<4>) -> Tensor<4> {
        let [n, h, w, c] = x.dims();
        let zeros = Tensor::zeros([n, 1, w, c], self.device);
        Tensor::cat(vec![zeros, x.slice([0..n, 0..h - 1])], 1)
    }

    fn right_shift(&mut self, x: Tensor<4>) -> Tensor<4> {
        let [n, h, w, c] = x.dims();
        let zeros = Tensor::zeros([n, h, 1, c], self.device);
        Tensor::cat(vec![zeros, x.slice([0..n, 0..h, 0..w - 1])], 2)
    }

    fn add(&mut self, x: Tensor<4>, y: Tensor<4>) -> Tensor<4> {
        x + y
    }

    fn concat(&mut self, x: &Tensor<4>, y: &Tensor<4>) -> Tensor<4> {
        Tensor::cat(vec![x.clone(), y.clone()], 3)
    }

    fn elu(&mut self, x: Tensor<4>) -> Tensor<4> {
        portable::elu(x)
    }

    fn record(&mut self, map: &Tensor<4>) {
        if let Some(record) = &mut self.record {
            record.push(map.clone());
        }
    }
}
