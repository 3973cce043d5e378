//! Weight normalisation at the network's border (Salimans & Kingma, 2016): the network itself
//! computes with weights, made of the parameters once for all images and parts of a batch, and
//! their gradients are turned into those of the parameters once for all.

use std::mem;

use rayon::prelude::*;

use super::Arrays;
use crate::kernels::weight_norm::WeightNorm;
use crate::network::{Layer, LayerKind};

/// Makes `weights` the parameters of the layers with every `V` replaced by the weight
/// \[taps * inputs, outputs\] that it and `g` make.
pub(super) fn make(layers: &[Layer], parameters: &[Vec<f32>], weights: &mut Arrays) {
    weights.resize(parameters.len(), Vec::new());
    let mut layer_of = vec![None; parameters.len()];
    for layer in layers {
        layer_of[layer.parameter] = Some(layer);
    }
    let weights = weights.par_iter_mut().zip(layer_of).enumerate();
    weights.for_each(|(number, (weight, layer))| {
        let parameter = &parameters[number];
        let Some(layer) = layer else {
            parameter.clone_into(weight);
            return;
        };
        weight.resize(parameter.len(), 0.0);
        WeightNorm::of(layer).weight(parameter, &parameters[number + 1], weight);
        if layer.kind == LayerKind::Deconv {
            *weight = swapped(layer, [layer.outputs, layer.inputs], weight);
        }
    });
}

/// Turns the gradients by what [`make`] makes into those by the parameters.
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
