//! The original's `--energy_distance`, in place of a likelihood: the network's output is features, of
//! which a head of three dense layers and noise make samples of the pixel, and what is trained is how far
//! they are from the pixel and from one another (Székely & Rizzo, 2013).

use super::{CHUNK, from_level};
use crate::config::{ModelConfig, Nonlinearity};
use crate::engine::Precision;
use crate::kernels::conv::Conv;
use crate::kernels::math::tanh;
use crate::kernels::pointwise::{Dropout, hash, keys, nonlinearity, nonlinearity_backward};
use crate::kernels::weight_norm::WeightNorm;
use crate::network::{Head, Layer, Layout, Window};

/// Samples of each pixel that are compared.
pub const SAMPLES: usize = 10;
/// Channels of the features, and of the head's hidden layers.
pub const FEATURES: usize = 64;
/// Numbers between -1 and 1 that a sample is made of.
pub const NOISE: usize = 4;

/// Added to squared distances, so that their root has a slope at 0.
const EPSILON: f32 = 1e-10;
/// From the scale of the network to levels.
const LEVELS: f32 = 127.5;

/// The noise of samples, a function of a seed and the sample's place. In an evaluation that is the same for
/// all images, so that no image's distance hangs on others; in training each has its own.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    keys: [u32; 2],
    whole_batch: bool,
}

impl Noise {
    /// Of a step, or of an evaluation, which has no dropout.
    pub fn of(dropout: Option<Dropout>) -> Noise {
        // No block's dropout has this seed.
        let seed = dropout.map_or(0, |dropout| dropout.seed.wrapping_sub(1));
        Noise {
            keys: keys(seed),
            whole_batch: dropout.is_some(),
        }
    }

    /// One number of a sample of a pixel, of an image by its place in the whole batch.
    pub fn at(self, image: usize, pixels_per_image: usize, row: usize, number: usize) -> f32 {
        let image = if self.whole_batch { image } else { 0 };
        let place = (image * pixels_per_image * SAMPLES + row) * NOISE + number;
        hash(self.keys, place as u32) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A head with its weights \[inputs, outputs\] and biases, layer by layer.
#[derive(Debug, Clone)]
pub struct EnergyDistance {
    /// Of a pixel.
    channels: usize,
    /// Of an image.
    pixels: usize,
    weights: [[Vec<f32>; 2]; 3],
}

/// What a few pixels' samples are computed from, \[pixels, samples, channels\].
struct Steps {
    noise: Vec<f32>,
    /// Before each nonlinearity, and behind it.
    sums: [Vec<f32>; 2],
    bent: [Vec<f32>; 2],
    samples: Vec<f32>,
}

impl EnergyDistance {
    /// The head of a model, whose `weights` are in the places of the layers' V and biases.
    pub(crate) fn of(config: &ModelConfig, head: &Head, weights: &[Vec<f32>]) -> EnergyDistance {
        let of = |layer: &Layer| [0, 2].map(|k| weights[layer.parameter + k].clone());
        EnergyDistance {
            channels: config.channels,
            pixels: config.height * config.width,
            weights: head.each_ref().map(of),
        }
    }

    /// The head of a model of `parameters`, in the layout's order; none where the model has a likelihood.
    ///
    /// # Panics
    /// If the parameters are not the model's.
    pub fn of_parameters(config: &ModelConfig, parameters: &[Vec<f32>]) -> Option<EnergyDistance> {
        let head = Layout::new(config).head?;
        let mut distance = EnergyDistance::of(config, &head, parameters);
        for (layer, [weight, _]) in head.iter().zip(&mut distance.weights) {
            let [v, g] = [0, 1].map(|k| &parameters[layer.parameter + k]);
            WeightNorm::of(layer).weight(v, g, weight);
        }
        Some(distance)
    }

    /// The layers, as kernels.
    fn layers(&self) -> [Conv; 3] {
        let shapes = [
            [NOISE, FEATURES],
            [2 * FEATURES, FEATURES],
            [2 * FEATURES, self.channels],
        ];
        shapes.map(|[inputs, outputs]| Conv {
            window: Window::POINT,
            transposed: false,
            inputs,
            outputs,
            precision: Precision::F32,
        })
    }

    /// Distances of every pixel: `images` as levels, `features` \[pixels, [`FEATURES`]\]; the first image has
    /// this place in the whole batch.
    pub fn per_pixel(
        &self,
        noise: Noise,
        first: usize,
        images: &[u8],
        features: &[f32],
    ) -> Vec<f32> {
        let chunks = images
            .chunks(CHUNK * self.channels)
            .zip(features.chunks(CHUNK * FEATURES));
        let mut distances = Vec::new();
        for (chunk, (levels, features)) in chunks.enumerate() {
            let noise = self.noise(noise, first, chunk * CHUNK, features.len() / FEATURES);
            let steps = self.steps(SAMPLES, noise, features);
            self.distances(levels, &steps.samples, None, &mut distances);
        }
        distances
    }

    /// As [`Self::per_pixel`]; writes the gradients of their sum by the features, and by each layer's weight
    /// and bias.
    pub fn with_gradients(
        &self,
        noise: Noise,
        first: usize,
        images: &[u8],
        features: &[f32],
        by_features: &mut [f32],
        by_layers: &mut [[Vec<f32>; 2]; 3],
    ) -> Vec<f32> {
        let layers = self.layers();
        let mut found = by_layers.clone();
        by_layers.iter_mut().flatten().for_each(|sum| sum.fill(0.0));
        let mut distances = Vec::new();
        let chunks = images
            .chunks(CHUNK * self.channels)
            .zip(features.chunks(CHUNK * FEATURES));
        let chunks = chunks.zip(by_features.chunks_mut(CHUNK * FEATURES));
        for (chunk, ((levels, features), by_features)) in chunks.enumerate() {
            let pixels = features.len() / FEATURES;
            let rows = pixels * SAMPLES;
            let noise = self.noise(noise, first, chunk * CHUNK, pixels);
            let steps = self.steps(SAMPLES, noise, features);
            let mut by_sums = vec![0.0; rows * self.channels];
            self.distances(levels, &steps.samples, Some(&mut by_sums), &mut distances);
            for (gradient, sample) in by_sums.iter_mut().zip(&steps.samples) {
                *gradient *= 1.0 - sample * sample;
            }
            let inputs = [&steps.noise, &steps.bent[0], &steps.bent[1]];
            for n in (0..3).rev() {
                let size = [1, 1, rows];
                let [by_weight, by_bias] = &mut found[n];
                layers[n].backward_weight(size, inputs[n], &by_sums, by_weight, by_bias);
                for (sum, found) in by_layers[n].iter_mut().zip(&found[n]) {
                    add(sum, found);
                }
                let Some(before) = n.checked_sub(1) else {
                    continue;
                };
                let mut by_bent = vec![0.0; rows * 2 * FEATURES];
                layers[n].backward_input(size, &by_sums, &self.weights[n][0], false, &mut by_bent);
                by_sums = vec![0.0; rows * FEATURES];
                let sums = &steps.sums[before];
                nonlinearity_backward(
                    Nonlinearity::ConcatElu,
                    FEATURES,
                    None,
                    sums,
                    &by_bent,
                    &mut by_sums,
                    false,
                );
            }
            by_features.fill(0.0);
            let samples = by_sums.chunks_exact(SAMPLES * FEATURES);
            for (by_features, samples) in by_features.chunks_exact_mut(FEATURES).zip(samples) {
                for sample in samples.chunks_exact(FEATURES) {
                    add(by_features, sample);
                }
            }
        }
        distances
    }

    /// Draws pixels, \[pixels, channels\] between -1 and 1, of their features and the noise of a sample for
    /// each, \[pixels, [`NOISE`]\].
    pub fn draw(&self, features: &[f32], noise: Vec<f32>) -> Vec<f32> {
        self.steps(1, noise, features).samples
    }

    /// What a layer of the head gives, for the samples of some pixels of a batch at a time.
    pub(crate) fn outputs(
        &self,
        layer: usize,
        noise: Noise,
        features: &[f32],
    ) -> impl Iterator<Item = Vec<f32>> {
        let chunks = features.chunks(CHUNK * FEATURES).enumerate();
        chunks.map(move |(chunk, features)| {
            let noise = self.noise(noise, 0, chunk * CHUNK, features.len() / FEATURES);
            let mut out = self.dense(0, &noise);
            if layer > 0 {
                add_features(SAMPLES, features, &mut out);
            }
            for n in 1..=layer {
                out = self.dense(n, &bent(&out));
            }
            out
        })
    }

    /// Changes a layer so that what it gives is less by a mean and then multiplied by a factor, each of
    /// every channel.
    pub(crate) fn rescale(&mut self, layer: usize, mean: &[f64], factor: &[f64]) {
        let [weight, bias] = &mut self.weights[layer];
        for row in weight.chunks_exact_mut(bias.len()) {
            for (value, factor) in row.iter_mut().zip(factor) {
                *value = (f64::from(*value) * factor) as f32;
            }
        }
        for ((value, mean), factor) in bias.iter_mut().zip(mean).zip(factor) {
            *value = ((f64::from(*value) - mean) * factor) as f32;
        }
    }

    /// The noise of the samples of pixels from one on.
    fn noise(&self, noise: Noise, first: usize, pixel: usize, pixels: usize) -> Vec<f32> {
        let rows = (pixel * SAMPLES..(pixel + pixels) * SAMPLES).flat_map(|row| {
            let of_image = self.pixels * SAMPLES;
            let (image, row) = (first + row / of_image, row % of_image);
            (0..NOISE).map(move |number| noise.at(image, self.pixels, row, number))
        });
        rows.collect()
    }

    /// A layer of the head.
    fn dense(&self, layer: usize, x: &[f32]) -> Vec<f32> {
        let (conv, [weight, bias]) = (self.layers()[layer], &self.weights[layer]);
        let rows = x.len() / conv.inputs;
        let mut out = vec![0.0; rows * conv.outputs];
        conv.forward([1, 1, rows], x, weight, bias, false, &mut out);
        out
    }

    /// So many samples of each pixel.
    fn steps(&self, samples: usize, noise: Vec<f32>, features: &[f32]) -> Steps {
        let mut sum_1 = self.dense(0, &noise);
        add_features(samples, features, &mut sum_1);
        let bent_1 = bent(&sum_1);
        let sum_2 = self.dense(1, &bent_1);
        let bent_2 = bent(&sum_2);
        let samples = self.dense(2, &bent_2).into_iter().map(tanh).collect();
        Steps {
            noise,
            sums: [sum_1, sum_2],
            bent: [bent_1, bent_2],
            samples,
        }
    }

    /// The energy distance of each pixel from its samples (the original's `energy_distance`): twice the mean
    /// distance to the pixel less that between two samples, where the distance is the length to the power
    /// 1.5; and its gradient by the samples.
    fn distances(
        &self,
        levels: &[u8],
        samples: &[f32],
        mut gradient: Option<&mut [f32]>,
        distances: &mut Vec<f32>,
    ) {
        const PAIRS: usize = SAMPLES * (SAMPLES - 1) / 2;
        let channels = self.channels;
        let size = SAMPLES * channels;
        for (pixel, levels) in levels.chunks_exact(channels).enumerate() {
            let samples = &samples[pixel * size..][..size];
            let sample = |n: usize| &samples[n * channels..][..channels];
            let mut x = [0.0; 4];
            let x = &mut x[..channels];
            x.iter_mut()
                .zip(levels)
                .for_each(|(x, &level)| *x = from_level(level));
            let mut sum = 0.0;
            // Adds a distance so often, and its slope to one or two of the samples.
            let mut add = |a: &[f32], b: &[f32], times: f32, of: [Option<usize>; 2]| {
                let square = a.iter().zip(b).map(|(a, b)| (LEVELS * (a - b)).powi(2));
                let square = EPSILON + square.sum::<f32>();
                let root = square.sqrt().sqrt();
                sum += f64::from(times * root * root * root);
                let Some(gradient) = &mut gradient else {
                    return;
                };
                let gradient = &mut gradient[pixel * size..][..size];
                let slope = times * 1.5 * LEVELS * LEVELS / root;
                for (of, sign) in of.into_iter().zip([1.0, -1.0]) {
                    let Some(n) = of else {
                        continue;
                    };
                    let own = gradient[n * channels..][..channels].iter_mut();
                    for (gradient, (a, b)) in own.zip(a.iter().zip(b)) {
                        *gradient += sign * slope * (a - b);
                    }
                }
            };
            for n in 0..SAMPLES {
                add(sample(n), x, 2.0 / SAMPLES as f32, [Some(n), None]);
                for other in n + 1..SAMPLES {
                    let pair = [Some(n), Some(other)];
                    add(sample(n), sample(other), -1.0 / PAIRS as f32, pair);
                }
            }
            distances.push(sum as f32);
        }
    }
}

/// Adds the features of each pixel to those of each of its samples.
fn add_features(samples: usize, features: &[f32], sums: &mut [f32]) {
    let pixels = sums.chunks_exact_mut(samples * FEATURES);
    for (sums, features) in pixels.zip(features.chunks_exact(FEATURES)) {
        for sample in sums.chunks_exact_mut(FEATURES) {
            add(sample, features);
        }
    }
}

/// `sum += values`.
fn add(sum: &mut [f32], values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}

/// The head's nonlinearity.
fn bent(x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; 2 * x.len()];
    nonlinearity(Nonlinearity::ConcatElu, FEATURES, None, x, &mut out);
    out
}
