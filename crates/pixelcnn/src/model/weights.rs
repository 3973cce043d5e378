//! Weight normalisation at the network's border (Salimans & Kingma, 2016): the network itself
//! computes with weights, made of the parameters once for all images and parts of a batch, and
//! their gradients are turned into those of the parameters once for all.

use std::mem;

use pixelcnn_core::kernels::weight_norm::WeightNorm;
use pixelcnn_core::network::{Layer, LayerKind};
use rayon::prelude::*;

/// The parameters of the layers with every `V` replaced by the weight \[taps * inputs, outputs\]
/// that it and `g` make.
pub(super) fn weights(layers: &[Layer], parameters: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let made = layers.par_iter().map(|layer| {
        let [v, g] = [0, 1].map(|k| &parameters[layer.parameter + k]);
        let mut weight = vec![0.0; v.len()];
        WeightNorm::of(layer).weight(v, g, &mut weight);
        match layer.kind {
            LayerKind::Deconv => swapped(layer, [layer.outputs, layer.inputs], &weight),
            LayerKind::Conv | LayerKind::Dense => weight,
        }
    });
    let made: Vec<Vec<f32>> = made.collect();
    let mut weights: Vec<Option<Vec<f32>>> = vec![None; parameters.len()];
    for (layer, weight) in layers.iter().zip(made) {
        weights[layer.parameter] = Some(weight);
    }
    let rest = weights.into_iter().zip(parameters);
    rest.map(|(weight, parameter)| weight.unwrap_or_else(|| parameter.clone()))
        .collect()
}

/// Turns the gradients for [`weights`] into those for the parameters.
pub(super) fn parameter_gradients(
    layers: &[Layer],
    parameters: &[Vec<f32>],
    gradients: &mut [Vec<f32>],
) {
    let by_weights: Vec<Vec<f32>> = layers
        .iter()
        .map(|layer| mem::take(&mut gradients[layer.parameter]))
        .collect();
    let by_v_and_g = layers.par_iter().zip(by_weights).map(|(layer, d_weight)| {
        let [v, g] = [0, 1].map(|k| &parameters[layer.parameter + k]);
        let d_weight = match layer.kind {
            LayerKind::Deconv => swapped(layer, [layer.inputs, layer.outputs], &d_weight),
            LayerKind::Conv | LayerKind::Dense => d_weight,
        };
        let (mut d_v, mut d_g) = (vec![0.0; v.len()], vec![0.0; g.len()]);
        WeightNorm::of(layer).backward(v, g, &d_weight, &mut d_v, &mut d_g);
        [d_v, d_g]
    });
    let by_v_and_g: Vec<_> = by_v_and_g.collect();
    for (layer, [d_v, d_g]) in layers.iter().zip(by_v_and_g) {
        gradients[layer.parameter] = d_v;
        gradients[layer.parameter + 1] = d_g;
    }
}

/// \[taps, rows, columns\] with rows and columns swapped.
fn swapped(layer: &Layer, [rows, columns]: [usize; 2], values: &[f32]) -> Vec<f32> {
    let taps = 0..layer.window.taps();
    let tap = |tap: usize| {
        let values = &values[tap * rows * columns..][..rows * columns];
        (0..columns).flat_map(move |column| values[column..].iter().step_by(columns))
    };
    taps.flat_map(tap).copied().collect()
}
