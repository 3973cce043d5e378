//! The likelihood as the original's `discretized_mix_logistic_loss` writes it, in double precision
//! and one pixel at a time: what the fast one is judged by.

use super::Mixture;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

/// Log-probability of the value `x` under one discretized logistic.
fn log_prob(x: f64, mean: f64, log_scale: f64) -> f64 {
    let centered = x - mean;
    let inv_stdv = (-log_scale).exp();
    let plus_in = inv_stdv * (centered + 1.0 / 255.0);
    let min_in = inv_stdv * (centered - 1.0 / 255.0);
    let mid_in = inv_stdv * centered;
    let cdf_delta = sigmoid(plus_in) - sigmoid(min_in);
    if x < -0.999 {
        plus_in - softplus(plus_in)
    } else if x > 0.999 {
        -softplus(min_in)
    } else if cdf_delta > 1e-5 {
        cdf_delta.max(1e-12).ln()
    } else {
        mid_in - log_scale - 2.0 * softplus(mid_in) - 127.5f64.ln()
    }
}

/// Nats of one code, given the `logits` of all.
pub fn nats_of_code(code: usize, logits: &[f64]) -> f64 {
    log_sum_exp(logits) - logits[code]
}

/// The original's `energy_distance` of one pixel: `x` \[channels\], `samples` \[samples, channels\] before their
/// tanh.
pub fn energy(x: &[f64], samples: &[f64]) -> f64 {
    let samples: Vec<f64> = samples.iter().map(|sample| sample.tanh()).collect();
    let samples: Vec<&[f64]> = samples.chunks(x.len()).collect();
    let distance = |a: &[f64], b: &[f64]| {
        let squares = a.iter().zip(b).map(|(a, b)| (127.5 * (a - b)).powi(2));
        (1e-10 + squares.sum::<f64>()).powf(0.75)
    };
    let count = samples.len() as f64;
    let to_x: f64 = samples.iter().map(|sample| distance(x, sample)).sum();
    let pairs = samples.iter().enumerate();
    let pairs = pairs.flat_map(|(n, a)| samples[n + 1..].iter().map(|b| distance(a, b)));
    2.0 * to_x / count - pairs.sum::<f64>() / (count * (count - 1.0) / 2.0)
}

/// Nats of one pixel: `x` \[channels\], `logits` \[[`Mixture::logits_per_pixel`]\].
pub fn nats(mixture: Mixture, x: &[f64], logits: &[f64]) -> f64 {
    let nr_mix = mixture.components;
    let (logit_probs, rest) = logits.split_at(nr_mix);
    let parameter = |channel: usize, which: usize, component: usize| {
        let kinds = if mixture.channels == 3 { 3 } else { 2 };
        rest[(channel * kinds + which) * nr_mix + component]
    };
    let log_probs: Vec<f64> = (0..nr_mix)
        .map(|k| {
            let coeff = |channel| f64::tanh(parameter(channel, 2, k));
            let channels = (0..mixture.channels).map(|channel| {
                let mean = parameter(channel, 0, k)
                    + match channel {
                        1 => coeff(0) * x[0],
                        2 => coeff(1) * x[0] + coeff(2) * x[1],
                        _ => 0.0,
                    };
                log_prob(x[channel], mean, parameter(channel, 1, k).max(-7.0))
            });
            logit_probs[k] + channels.sum::<f64>()
        })
        .collect();
    log_sum_exp(logit_probs) - log_sum_exp(&log_probs)
}
