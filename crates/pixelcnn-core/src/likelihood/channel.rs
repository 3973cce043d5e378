//! One channel of a pixel at a time, as lossless coding needs it: the same bits on every machine.

use super::{LANES, LOG_SCALE_MIN, Mixture, logistic};
use crate::kernels::math::{exp, ln, tanh};
use crate::kernels::vectorized;

/// The mixture of logistics of one channel of a pixel, given the pixel's lower channels.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChannelMixture {
    /// Logarithms of the components' weights, up to what they have in common: the largest is 0.
    pub log_weights: Vec<f32>,
    /// The components' means, for values scaled to \[-1, 1\].
    pub means: Vec<f32>,
    /// Logarithms of the components' scales, floored at -7.
    pub log_scales: Vec<f32>,
}

impl ChannelMixture {
    /// Log-probability of a value scaled to \[-1, 1\].
    pub fn log_prob(&self, x: f32) -> f32 {
        let mut log_probs = self.log_weights.clone();
        weigh(x, &self.means, &self.log_scales, &mut log_probs);
        log_sum_exp(&log_probs) - log_sum_exp(&self.log_weights)
    }
}

impl Mixture {
    /// The mixture of channel `known.len()` of a pixel, given its `logits`, of which only those up to the
    /// channel's [own](Mixture::logits_of) are read, and the values `known` of
    /// its lower channels, scaled to \[-1, 1\]: a component weighs the more, the likelier it made
    /// those. The log-probabilities of all channels add up to minus the pixel's nats. Only the
    /// crate's own elementary functions are used, each in one order.
    ///
    /// `one` is the mixture of the channel before, as this function left it; for the first channel
    /// any will do.
    ///
    /// # Panics
    /// If there are fewer logits or all channels are known.
    pub fn next_channel(&self, logits: &[f32], known: &[f32], one: &mut ChannelMixture) {
        let channel = known.len();
        assert!(channel < self.channels, "a channel that is not known");
        let ChannelMixture {
            log_weights,
            means,
            log_scales,
        } = one;
        let (prior, rest) = logits.split_at(self.components);
        let row = |channel: usize, which: usize| {
            &rest[(channel * self.kinds() + which) * self.components..][..self.components]
        };
        match known.last() {
            None => prior.clone_into(log_weights),
            Some(&x) => weigh(x, means, log_scales, log_weights),
        }
        let max = max(log_weights);
        log_weights.iter_mut().for_each(|weight| *weight -= max);
        row(channel, 0).clone_into(means);
        if channel == 1 {
            shift(means, row(0, 2), known[0]);
        } else if channel == 2 {
            shift(means, row(1, 2), known[0]);
            shift(means, row(2, 2), known[1]);
        }
        log_scales.clear();
        log_scales.extend(row(channel, 1).iter().map(|s| s.max(LOG_SCALE_MIN)));
    }
}

vectorized! {
    /// Adds to each component's log-weight its log-probability of a value.
    fn weigh(x: f32, means: &[f32], log_scales: &[f32], log_weights: &mut [f32]) {
        let components = means.chunks(LANES).zip(log_scales.chunks(LANES));
        for (weights, (means, log_scales)) in log_weights.chunks_mut(LANES).zip(components) {
            let mut log_probs = padded(means);
            for (mean, log_scale) in log_probs.iter_mut().zip(padded(log_scales)) {
                *mean = logistic(x, *mean, log_scale).log_prob;
            }
            for (weight, log_prob) in weights.iter_mut().zip(log_probs) {
                *weight += log_prob;
            }
        }
    }
}

vectorized! {
    /// Moves each component's mean by what a lower channel's value makes of it.
    fn shift(means: &mut [f32], coefficients: &[f32], x: f32) {
        for (means, coefficients) in means.chunks_mut(LANES).zip(coefficients.chunks(LANES)) {
            let mut shifts = padded(coefficients);
            for shift in &mut shifts {
                *shift = tanh(*shift) * x;
            }
            for (mean, shift) in means.iter_mut().zip(shifts) {
                *mean += shift;
            }
        }
    }
}

fn max(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn log_sum_exp(values: &[f32]) -> f32 {
    let max = max(values);
    // In order: a sum's bits depend on it.
    let mut sum = 0.0;
    for value in values {
        sum += exp(value - max);
    }
    max + ln(sum)
}

/// A whole vector of values, zeros where there are fewer.
#[inline(always)]
pub(crate) fn padded(values: &[f32]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compiled without this machine's vectors, mixtures are the same bits.
    #[test]
    fn vectors_do_not_change_a_bit() {
        // Up and down, of all signs and sizes, in more than one vector.
        let number = |i: usize, scale: f32| scale * ((i * 7919 % 101) as f32 / 50.0 - 1.0);
        for (count, x) in [(1, -1.0), (10, 0.2), (16, 1.0), (35, -0.7)] {
            let row = |seed: usize, scale| -> Vec<f32> {
                (0..count).map(|i| number(seed + i, scale)).collect()
            };
            let [means, log_scales, coefficients] = [row(3, 1.2), row(5, 8.0), row(11, 4.0)];
            let (mut weighed, mut shifted) = (row(17, 3.0), means.clone());
            weigh(x, &means, &log_scales, &mut weighed);
            shift(&mut shifted, &coefficients, x);
            for (k, mean) in means.iter().enumerate() {
                let weight = row(17, 3.0)[k] + logistic(x, *mean, log_scales[k]).log_prob;
                assert_eq!(weighed[k].to_bits(), weight.to_bits());
                let mean = mean + tanh(coefficients[k]) * x;
                assert_eq!(shifted[k].to_bits(), mean.to_bits());
            }
        }
    }
}
