//! Data-dependent initialisation (Salimans & Kingma, 2016, section 3): every layer's output goes on
//! normalised, inside of the blocks too.

use super::execution::{Execution, add, conv_of};
use crate::config::halved;
use crate::kernels::pointwise::{Channels, gate, nonlinearity};
use crate::likelihood::{EnergyDistance, FEATURES, Noise, SAMPLES};
use crate::network::{GatedResnet, Layer, LayerKind};
use crate::plan::Operation;

/// Added to the variance.
const EPSILON: f64 = 1e-10;

/// Runs the forward pass, and sets `g` and `b` of every layer among the parameters from its output.
pub(super) fn initialise(execution: &mut Execution, parameters: &mut [Vec<f32>]) {
    for (number, operation) in execution.plan.forward.iter().enumerate() {
        match operation {
            Operation::Layer { layer, from, to } => {
                let size = execution.size(layer.finer(*from, *to));
                let x = execution.values(*from).to_vec();
                let out = normalised_layer(execution, parameters, layer, size, &x);
                write(execution, *to, out);
            }
            Operation::GatedResnet {
                block, x, a, to, ..
            } => {
                let out = normalised_block(execution, parameters, block, *x, a);
                write(execution, *to, out);
            }
            Operation::Embed { layer, map, to } => {
                let outputs = layer.outputs;
                let mut with_ones = vec![0.0; execution.len(*to)];
                execution.embed(layer, *map, &mut with_ones);
                let pixels = with_ones.chunks_exact(outputs + 1);
                let mut values: Vec<f32> = pixels
                    .flat_map(|pixel| &pixel[..outputs])
                    .copied()
                    .collect();
                normalise(parameters, layer, None, &mut values);
                let pixels = with_ones.chunks_exact_mut(outputs + 1);
                for (pixel, values) in pixels.zip(values.chunks_exact(outputs)) {
                    pixel[..outputs].copy_from_slice(values);
                }
                write(execution, *to, with_ones);
            }
            _ => execution.operation(number),
        }
    }
    if let Some(head) = &execution.plan.head {
        let (noise, features) = (
            Noise::of(execution.dropout),
            execution.values(execution.plan.logits),
        );
        let mut distance = EnergyDistance::of(execution.config, head, execution.weights);
        for (n, layer) in head.iter().enumerate() {
            // Ten samples of all pixels are too many to be held.
            let observed = || distance.outputs(n, noise, features);
            let pixels = features.len() / FEATURES * SAMPLES;
            let statistics = statistics([pixels, layer.outputs], observed);
            let factors = set(parameters, layer, &statistics);
            distance.rescale(n, &statistics[0], &factors);
        }
    }
}

fn write(execution: &mut Execution, to: usize, values: Vec<f32>) {
    let [mut memory] = execution.take([to]);
    memory[..values.len()].copy_from_slice(&values);
    execution.give([to], [memory]);
}

fn normalised_block(
    execution: &Execution,
    parameters: &mut [Vec<f32>],
    block: &GatedResnet,
    x: usize,
    a: &[usize],
) -> Vec<f32> {
    let (f, size, filters) = (
        execution.config.nonlinearity,
        execution.size(x),
        block.conv_1.outputs,
    );
    let bent = |maps: &[&[f32]], dropout| {
        let values: usize = maps.iter().map(|map| map.len()).sum();
        let mut y = vec![0.0; f.outputs(values)];
        for (part, map) in maps.iter().enumerate() {
            let channels = Channels {
                count: filters,
                first: part * filters,
                of: maps.len() * filters,
            };
            nonlinearity(f, channels, dropout, map, &mut y);
        }
        y
    };
    let f_x = bent(&[execution.values(x)], None);
    let mut c1 = normalised_layer(execution, parameters, &block.conv_1, size, &f_x);
    if let Some(nin) = &block.nin {
        let maps: Vec<&[f32]> = a.iter().map(|&a| execution.values(a)).collect();
        let projected = normalised_layer(execution, parameters, nin, size, &bent(&maps, None));
        add(&mut c1, &projected);
    }
    let f_c1 = bent(&[&c1], execution.dropout_of(block, x));
    let c2 = normalised_layer(execution, parameters, &block.conv_2, size, &f_c1);
    let conditional = execution.conditional(block);
    let conditional = Some(&conditional[..]).filter(|h_hw| !h_hw.is_empty());
    let mut out = vec![0.0; c1.len()];
    gate(
        filters,
        size[1] * size[2],
        execution.values(x),
        &c2,
        conditional,
        &mut out,
    );
    out
}

/// What a layer gives for `x`, where the finer of the two has the `size` \[images, rows, columns\], changed to mean 0 and deviation
/// `init_scale` per channel; its `g` and `b` are set so that it gives that.
fn normalised_layer(
    execution: &Execution,
    parameters: &mut [Vec<f32>],
    layer: &Layer,
    size: [usize; 3],
    x: &[f32],
) -> Vec<f32> {
    let mut values = output(execution, layer, size, x);
    let uncropped = match layer.kind {
        LayerKind::Deconv => Some(uncropped(execution, layer, size, x)),
        LayerKind::Conv | LayerKind::Dense => None,
    };
    normalise(parameters, layer, uncropped.as_deref(), &mut values);
    values
}

/// Changes a layer's output to mean 0 and deviation `init_scale` per channel, as they are in what is
/// observed instead of it where that is given, and sets the layer's `g` and `b` so that it gives that.
fn normalise(
    parameters: &mut [Vec<f32>],
    layer: &Layer,
    observed: Option<&[f32]>,
    values: &mut [f32],
) {
    let statistics = {
        let observed = observed.unwrap_or(values);
        let pixels = observed.len() / layer.outputs;
        statistics([pixels, layer.outputs], || std::iter::once(observed))
    };
    let factors = set(parameters, layer, &statistics);
    for pixel in values.chunks_exact_mut(layer.outputs) {
        for ((value, mean), factor) in pixel.iter_mut().zip(&statistics[0]).zip(&factors) {
            *value = ((f64::from(*value) - mean) * factor) as f32;
        }
    }
}

/// The mean and the variance of every channel of what a layer gives, \[pixels, channels\] in parts that are
/// gone through twice.
fn statistics<V: AsRef<[f32]>, I: Iterator<Item = V>>(
    [pixels, channels]: [usize; 2],
    outputs: impl Fn() -> I,
) -> [Vec<f64>; 2] {
    let mean_of = |f: &dyn Fn(usize, f64) -> f64| {
        let mut mean = vec![0.0; channels];
        for part in outputs() {
            for pixel in part.as_ref().chunks_exact(channels) {
                for (channel, (mean, &value)) in mean.iter_mut().zip(pixel).enumerate() {
                    *mean += f(channel, f64::from(value)) / pixels as f64;
                }
            }
        }
        mean
    };
    let mean = mean_of(&|_, value| value);
    let variance = mean_of(&|channel, value| (value - mean[channel]).powi(2));
    [mean, variance]
}

/// Sets a layer's `g` and `b` so that what it gives, of this mean and variance, has mean 0 and deviation
/// `init_scale` per channel; gives the factors of the change.
fn set(parameters: &mut [Vec<f32>], layer: &Layer, [mean, variance]: &[Vec<f64>; 2]) -> Vec<f64> {
    let scale = |variance: &f64| f64::from(layer.init_scale) / (variance + EPSILON).sqrt();
    let scale: Vec<f64> = variance.iter().map(scale).collect();
    for (g, scale) in parameters[layer.parameter + 1].iter_mut().zip(&scale) {
        *g = (f64::from(*g) * scale) as f32;
    }
    let changes = mean.iter().zip(&scale);
    for (b, (mean, scale)) in parameters[layer.parameter + 2].iter_mut().zip(changes) {
        *b = (f64::from(*b) - mean * scale) as f32;
    }
    scale
}

fn output(execution: &Execution, layer: &Layer, size: [usize; 3], x: &[f32]) -> Vec<f32> {
    let conv = conv_of(layer);
    let [_, [h, w]] = conv.sizes([size[1], size[2]]);
    let mut out = vec![0.0; size[0] * h * w * layer.outputs];
    let [weight, bias] = execution.weight(layer);
    conv.forward(size, x, weight, bias, false, &mut out);
    out
}

/// A transposed convolution's output before the original crops it: `kernel - 1` rows and columns
/// more than twice the input's, empty margins included.
fn uncropped(execution: &Execution, layer: &Layer, [n, h, w]: [usize; 3], x: &[f32]) -> Vec<f32> {
    let ([kh, kw], [top, left]) = (layer.window.kernel, layer.window.offset);
    let [h, w] = [h, w].map(|n| halved(n, 1));
    let (rows, columns) = (h + 2, w + 2);
    let mut padded = vec![0.0; n * rows * columns * layer.inputs];
    for (row, x) in x.chunks_exact(w * layer.inputs).enumerate() {
        let (image, y) = (row / h, row % h);
        let at = ((image * rows + y + 1) * columns + 1) * layer.inputs;
        padded[at..at + x.len()].copy_from_slice(x);
    }
    let out = output(execution, layer, [n, 2 * rows, 2 * columns], &padded);
    let kept = (2 - left..2 * w + 1 + kw - left).len() * layer.outputs;
    let row = |image: usize, y: usize| {
        let at = ((image * 2 * rows + y) * 2 * columns + 2 - left) * layer.outputs;
        &out[at..at + kept]
    };
    let rows = |image: usize| (2 - top..2 * h + 1 + kh - top).map(move |y| (image, y));
    (0..n)
        .flat_map(rows)
        .flat_map(|(image, y)| row(image, y))
        .copied()
        .collect()
}
