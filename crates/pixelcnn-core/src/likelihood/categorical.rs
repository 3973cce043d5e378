//! A code's probability by the softmax of its pixel's logits, its gradient, and samples.

use rayon::prelude::*;

use super::{CHUNK, LANES};
use crate::config::ModelConfig;
use crate::kernels::math::{exp, ln};
use crate::kernels::vectorized;

/// The distribution of a pixel's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Categorical {
    /// Number of codes.
    pub codes: usize,
    /// Bytes in which a pixel is given, its code first.
    stride: usize,
}

impl Categorical {
    /// At the network's output.
    pub fn of(config: &ModelConfig) -> Categorical {
        Categorical {
            codes: config.nr_codes,
            stride: config.bytes_per_pixel(),
        }
    }

    /// Nats of every pixel, and the gradient of their sum by the logits where it is asked for.
    pub(super) fn nats_per_pixel(
        &self,
        images: &[u8],
        logits: &[f32],
        gradient: Option<&mut [f32]>,
    ) -> Vec<f32> {
        let pixels = images.len() / self.stride;
        assert_eq!(images.len(), pixels * self.stride, "whole pixels");
        assert_eq!(logits.len(), pixels * self.codes, "logits of each pixel");
        let mut nats = vec![0.0; pixels];
        let codes = images.par_chunks(CHUNK * self.stride);
        let chunks = nats.par_chunks_mut(CHUNK).zip(codes);
        let chunks = chunks.zip(logits.par_chunks(CHUNK * self.codes));
        match gradient {
            None => chunks.for_each(|((nats, images), logits)| {
                self.chunk(images, logits, nats, None);
            }),
            Some(gradient) => {
                assert_eq!(gradient.len(), logits.len(), "a gradient for every logit");
                let gradient = gradient.par_chunks_mut(CHUNK * self.codes);
                let chunks = chunks.zip(gradient);
                chunks.for_each(|(((nats, images), logits), gradient)| {
                    self.chunk(images, logits, nats, Some(gradient));
                });
            }
        }
        nats
    }

    fn chunk(
        &self,
        images: &[u8],
        logits: &[f32],
        nats: &mut [f32],
        mut gradient: Option<&mut [f32]>,
    ) {
        let mut shares = vec![0.0; self.codes];
        let pixels = images.chunks_exact(self.stride);
        let pixels = pixels.zip(logits.chunks_exact(self.codes));
        for (pixel, (bytes, logits)) in pixels.enumerate() {
            let code = ModelConfig::code(bytes, 0);
            nats[pixel] = softmax(logits, &mut shares) - logits[code];
            if let Some(gradient) = &mut gradient {
                shares[code] -= 1.0;
                gradient[pixel * self.codes..][..self.codes].copy_from_slice(&shares);
            }
        }
    }

    /// Draws a code, given its `logits` and a uniform draw from 0 up to 1. `temperature` divides the
    /// logits: 1 samples the model, 0 takes the likeliest code.
    ///
    /// # Panics
    /// If there are fewer logits than codes.
    pub fn draw(&self, logits: &[f32], uniform: f64, temperature: f32) -> u16 {
        let logits = &logits[..self.codes];
        let mut likeliest = 0;
        for (k, logit) in logits.iter().enumerate() {
            if *logit > logits[likeliest] {
                likeliest = k;
            }
        }
        if temperature > 0.0 {
            let above = |logit: f32| f64::from(logit - logits[likeliest]) / f64::from(temperature);
            let sum: f64 = logits.iter().map(|&logit| above(logit).exp()).sum();
            let mut left = uniform * sum;
            for (k, &logit) in logits.iter().enumerate() {
                left -= above(logit).exp();
                if left < 0.0 {
                    return k as u16;
                }
            }
        }
        likeliest as u16
    }
}

vectorized! {
    /// The softmax of some logits; gives the logarithm of its denominator. Sums are taken in one order.
    fn softmax(logits: &[f32], shares: &mut [f32]) -> f32 {
        let mut most = f32::NEG_INFINITY;
        for &logit in logits {
            most = if most > logit { most } else { logit };
        }
        let mut sums = [0.0; LANES];
        for (shares, logits) in shares.chunks_mut(LANES).zip(logits.chunks(LANES)) {
            for ((share, &logit), sum) in shares.iter_mut().zip(logits).zip(&mut sums) {
                *share = exp(logit - most);
                *sum += *share;
            }
        }
        let mut sum = 0.0;
        for part in sums {
            sum += part;
        }
        let scale = 1.0 / sum;
        for share in shares {
            *share *= scale;
        }
        most + ln(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::likelihood::reference;
    use proptest::prelude::*;

    proptest! {
        /// Against the reference, on numbers of codes on both sides of a vector's width.
        #[test]
        fn nats_and_gradients_are_the_references(
            codes in 2..70usize,
            coarse in any::<bool>(),
            seed in any::<u32>(),
        ) {
            let config = ModelConfig {
                channels: 1,
                nr_codes: codes,
                nr_coarse_codes: 3 * usize::from(coarse),
                ..ModelConfig::default()
            };
            let categorical = Categorical::of(&config);
            let pixels = 300;
            let number = |i: usize| (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8;
            let logits: Vec<f32> = (0..pixels * codes)
                .map(|i| (number(i) % 4001) as f32 / 100.0 - 20.0)
                .collect();
            let code = |pixel: usize| number(pixel + 7) as usize % codes;
            let images: Vec<u8> = (0..pixels)
                .flat_map(|pixel| {
                    let mut bytes = (code(pixel) as u16).to_le_bytes().to_vec();
                    bytes.resize(config.bytes_per_pixel(), 0);
                    bytes
                })
                .collect();
            let mut gradient = vec![0.0; logits.len()];
            let nats = categorical.nats_per_pixel(&images, &logits, Some(&mut gradient));
            prop_assert_eq!(&nats, &categorical.nats_per_pixel(&images, &logits, None));
            for (pixel, nats) in nats.into_iter().enumerate() {
                let here = pixel * codes..(pixel + 1) * codes;
                let wide: Vec<f64> = logits[here.clone()].iter().map(|&l| l.into()).collect();
                let want = reference::nats_of_code(code(pixel), &wide);
                prop_assert!((f64::from(nats) - want).abs() < 1e-4 * (1.0 + want));
                for (k, &got) in gradient[here].iter().enumerate() {
                    let share = (-reference::nats_of_code(k, &wide)).exp();
                    let want = share - f64::from(u8::from(k == code(pixel)));
                    prop_assert!((f64::from(got) - want).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn codes_are_drawn_as_often_as_they_are_likely() {
        let config = ModelConfig {
            channels: 1,
            nr_codes: 4,
            ..ModelConfig::default()
        };
        let categorical = Categorical::of(&config);
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
        let mut counts = [0; 4];
        for i in 0..10_000 {
            let uniform = f64::from(i) / 10_000.0;
            counts[usize::from(categorical.draw(&logits, uniform, 1.0))] += 1;
            assert_eq!(categorical.draw(&logits, uniform, 0.0), 3);
        }
        for (count, share) in counts.into_iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!(
                (f64::from(count) / 10_000.0 - share).abs() < 0.001,
                "{counts:?}"
            );
        }
    }
}
