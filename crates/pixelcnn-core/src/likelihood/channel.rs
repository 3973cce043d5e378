//! One channel of a pixel at a time, as lossless coding needs it: the same bits on every machine.

use super::{LOG_SCALE_MIN, Mixture, logistic};
use crate::kernels::math::{exp, ln, tanh};

/// The mixture of logistics of one channel of a pixel, given the pixel's lower channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelMixture {
    /// Logarithms of the components' weights, which add up to 1.
    pub log_weights: Vec<f32>,
    /// The components' means, for values scaled to \[-1, 1\].
    pub means: Vec<f32>,
    /// Logarithms of the components' scales, floored at -7.
    pub log_scales: Vec<f32>,
}

impl ChannelMixture {
    /// Log-probability of a value scaled to \[-1, 1\].
    pub fn log_prob(&self, x: f32) -> f32 {
        let components = self
            .log_weights
            .iter()
            .zip(&self.means)
            .zip(&self.log_scales);
        let log_probs =
            components.map(|((w, mean), scale)| w + logistic(x, *mean, *scale).log_prob);
        log_sum_exp(&log_probs.collect::<Vec<_>>())
    }
}

impl Mixture {
    /// The mixture of channel `known.len()` of a pixel, given its `logits` and the values `known` of
    /// its lower channels, scaled to \[-1, 1\]: a component weighs the more, the likelier it made
    /// those. The log-probabilities of all channels add up to minus the pixel's nats. Only the
    /// crate's own elementary functions are used, each in one order.
    ///
    /// # Panics
    /// If the number of logits is not the mixture's or all channels are known.
    pub fn channel(&self, logits: &[f32], known: &[f32]) -> ChannelMixture {
        assert_eq!(logits.len(), self.logits_per_pixel(), "logits of one pixel");
        assert!(known.len() < self.channels, "a channel that is not known");
        let (log_weights, rest) = logits.split_at(self.components);
        let row = |channel: usize, which: usize| {
            &rest[(channel * self.kinds() + which) * self.components..][..self.components]
        };
        let means = |channel: usize| -> Vec<f32> {
            let shift = |k: usize| match channel {
                1 => tanh(row(0, 2)[k]) * known[0],
                2 => tanh(row(1, 2)[k]) * known[0] + tanh(row(2, 2)[k]) * known[1],
                _ => 0.0,
            };
            let means = row(channel, 0).iter().enumerate();
            means.map(|(k, mean)| mean + shift(k)).collect()
        };
        let mut log_weights = log_weights.to_vec();
        for (channel, &x) in known.iter().enumerate() {
            let logistics = means(channel).into_iter().zip(row(channel, 1));
            for (weight, (mean, scale)) in log_weights.iter_mut().zip(logistics) {
                *weight += logistic(x, mean, *scale).log_prob;
            }
        }
        let all = log_sum_exp(&log_weights);
        log_weights.iter_mut().for_each(|weight| *weight -= all);
        let floor = |scale: &f32| scale.max(LOG_SCALE_MIN);
        ChannelMixture {
            log_weights,
            means: means(known.len()),
            log_scales: row(known.len(), 1).iter().map(floor).collect(),
        }
    }
}

fn log_sum_exp(values: &[f32]) -> f32 {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // In order: a sum's bits depend on it.
    let mut sum = 0.0;
    for value in values {
        sum += exp(value - max);
    }
    max + ln(sum)
}
