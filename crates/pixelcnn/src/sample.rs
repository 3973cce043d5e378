//! Images drawn from a model, pixel by pixel (paper, section 2.1).

use std::ops::ControlFlow;

use pixelcnn_core::likelihood::{Mixture, to_level};
use rand::RngExt;

use crate::model::{Batch, Network};
use crate::random::{Purpose, generator};

/// The original keeps its uniforms this far from 0 and 1, where the logistic is infinite.
const MARGIN: f32 = 1e-5;

/// What is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Class of every image; any value for an unconditional model. Their number is the number of
    /// images.
    pub labels: Vec<u32>,
    /// 1 draws from the model; less than 1 draws likelier, more uniform images.
    pub temperature: f32,
    /// Image `i` is a function of the seed and `i`, whatever is drawn beside it.
    pub seed: u64,
}

/// Draws images, u8 \[N, H, W, C\]: one pass of the network for every pixel, over the rows so far.
/// `progress` is told the number of pixels done and can stop, which gives `None`.
pub fn sample(
    network: &Network,
    sampling: &Sampling,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Option<Vec<u8>> {
    let config = network.config();
    let (height, width, channels) = (config.height, config.width, config.channels);
    let mixture = Mixture::of(config);
    let n = sampling.labels.len();
    let mut generators: Vec<_> = (0..n as u64)
        .map(|image| generator(sampling.seed, Purpose::Sample, image))
        .collect();
    let mut images = vec![0; n * config.dims()];
    let (mut u_mix, mut u_logistic) = (vec![0.0; config.nr_logistic_mix], vec![0.0; channels]);
    for y in 0..height {
        // No pixel depends on the rows below it: they need not be computed.
        let rows = (y + 1).next_multiple_of(4);
        let top = network.with_height(rows);
        for x in 0..width {
            let seen: Vec<u8> = images
                .chunks_exact(config.dims())
                .flat_map(|image| &image[..rows * width * channels])
                .copied()
                .collect();
            let logits = top.logits(Batch {
                images: &seen,
                labels: &sampling.labels,
            });
            for (image, random) in generators.iter_mut().enumerate() {
                let mut uniforms = || random.random_range(MARGIN..1.0 - MARGIN);
                u_mix.fill_with(&mut uniforms);
                u_logistic.fill_with(&mut uniforms);
                let pixel = (image * rows + y) * width + x;
                let size = mixture.logits_per_pixel();
                let values = mixture.sample(
                    &logits[pixel * size..][..size],
                    &u_mix,
                    &u_logistic,
                    sampling.temperature,
                );
                let target = ((image * height + y) * width + x) * channels;
                for (level, value) in images[target..][..channels].iter_mut().zip(values) {
                    *level = to_level(value);
                }
            }
            if progress(y * width + x + 1).is_break() {
                return None;
            }
        }
    }
    Some(images)
}
