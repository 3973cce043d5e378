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
    let take = |layer: &Layer| [0, 1].map(|k| mem::take(&mut gradients[layer.parameter + k]));
    let mut by_layer: Vec<[Vec<f32>; 2]> = layers.iter().map(take).collect();
    let each = layers.par_iter().zip(&mut by_layer);
    each.for_each(|(layer, [d, d_g])| {
        let [v, g] = [0, 1].map(|k| &parameters[layer.parameter + k]);
        if layer.kind == LayerKind::Deconv {
            *d = swapped(layer, [layer.inputs, layer.outputs], d);
        }
        WeightNorm::of(layer).backward(v, g, d, d_g);
    });
    for (layer, [d_v, d_g]) in layers.iter().zip(by_layer) {
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
