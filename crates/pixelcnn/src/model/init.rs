//! The parameters before the first step: drawn, then set by the data.

use burn::tensor::Device;
use pixelcnn_core::ModelConfig;
use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::network::{Layout, ParameterKind};
use rand_distr::{Distribution, Normal};

use super::pass::{TensorPass, to_host};
use super::{Batch, Network};
use crate::random::{Purpose, generator};

/// Deviation of the random directions `V` and class projections `hw`.
const DEVIATION: f32 = 0.05;

/// Draws every parameter as the original does: `V` and `hw` from N(0, 0.05), `g` 1, `b` 0. They are
/// drawn on the host, so that a seed means the same on every device.
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

/// Data-dependent initialisation (Salimans & Kingma, 2016, section 3): one pass over a batch that
/// sets each layer's `g` and `b` from its own output, which goes on normalised. Gives the output
/// of that pass.
pub fn initialise(
    config: &ModelConfig,
    parameters: &mut [Vec<f32>],
    batch: Batch,
    dropout: Option<Dropout>,
    device: &Device,
) -> Vec<f32> {
    let drawn = parameters.to_vec();
    let network = Network::new(config, &drawn, device);
    let pass = TensorPass {
        dropout,
        initialise: Some(parameters),
        ..network.pass(batch)
    };
    to_host(pass.run(batch))
}
