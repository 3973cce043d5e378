//! A channel's mixture as integer frequencies: what a range coder needs.

use std::borrow::Borrow;
use std::num::NonZeroU32;

use constriction::stream::model::{DecoderModel, EncoderModel, EntropyModel};

use crate::kernels::math::exp;
use crate::kernels::vectorized;
use crate::likelihood::{ChannelMixture, LANES, padded};

/// Bits of a frequency.
pub(super) const PRECISION: usize = 24;

/// All frequencies of a channel add up to this.
const TOTAL: u32 = 1 << PRECISION;

/// What the mixture shares out, once each of the 256 levels has its 1.
const SHARED: f64 = (TOTAL - 256) as f64;

/// Where each level's bin begins, as the likelihood has it; those of 0 and 255 are open.
const EDGES: [f64; 257] = {
    let mut edges = [0.0; 257];
    let mut level = 0;
    while level <= 256 {
        edges[level] = (level as f64 - 128.0) / 127.5;
        level += 1;
    }
    edges
};

/// Numbers that are computed together: of levels, or of components.
const TOGETHER: usize = 8;

/// Shares the whole number [`TOTAL`] among the 256 levels of a channel: level v has the interval
/// \[C(v), C(v + 1)) with
///
///   C(v) = floor(F(v) (2^24 - 256)) + v,  F(v) = sum over k of w_k sigmoid((b_v - m_k) / s_k),
///
/// C(0) = 0 and C(256) = 2^24, where b_v is the lower edge of the level's bin. So every level has at
/// least 1 of 2^24, which costs a value 2e-5 bits.
///
/// C increases strictly whatever the mixture, by construction: in `v`, each step of its evaluation
/// is monotone, rounding included. A difference, a product with a number that isn't negative, a
/// reciprocal of a positive number, a sum in one order: all of them are rounded monotonely, as each
/// is a single operation (nothing is fused). 2^t is 2^n p(t - n) with n the integer nearest to
/// t - 1/2 and a polynomial without negative coefficients; where t - n is rounded below 0 it is 0,
/// and p is at most 2, so that where n goes up, 2^n p does not come down. And it is the same on all
/// machines, as nothing else is used.
#[derive(Debug, Clone, Default)]
pub(super) struct Frequencies {
    components: Components,
    inverse_scales: Vec<f32>,
    weights: Vec<f32>,
    /// A level near which the coded one is expected.
    near: Option<usize>,
}

/// Logistics: their weights in one array, their means in another, and so on. These are filled up to whole
/// [`TOGETHER`] by logistics without a weight.
#[derive(Debug, Clone, Default)]
struct Components {
    count: usize,
    /// Not negative; all of them add up to 1.
    weights: Vec<f64>,
    means: Vec<f64>,
    /// 1 / (scale ln 2): turns a distance into an exponent of 2. Not negative.
    rates: Vec<f64>,
}

impl Components {
    fn clear(&mut self) {
        self.count = 0;
        self.weights.clear();
        self.means.clear();
        self.rates.clear();
    }

    fn push(&mut self, weight: f64, mean: f64, rate: f64) {
        let numbers = [&mut self.weights, &mut self.means, &mut self.rates];
        for (numbers, number) in numbers.into_iter().zip([weight, mean, rate]) {
            if self.count == numbers.len() {
                numbers.extend([0.0; TOGETHER]);
            }
            numbers[self.count] = number;
        }
        self.count += 1;
    }

    /// Weight, mean and rate of each.
    fn iter(&self) -> impl Iterator<Item = [f64; 3]> {
        let numbers = self.weights.iter().zip(&self.means).zip(&self.rates);
        let numbers = numbers.map(|((weight, mean), rate)| [*weight, *mean, *rate]);
        numbers.take(self.count)
    }
}

impl Frequencies {
    /// Those of another mixture. Parameters that are not numbers or out of all proportion are
    /// replaced by some that are not.
    #[allow(clippy::manual_clamp)] // It would leave NaN as it is.
    pub fn set(&mut self, mixture: &ChannelMixture) {
        let Frequencies {
            components,
            inverse_scales,
            weights,
            near,
        } = self;
        *near = None;
        let count = mixture.means.len();
        inverse_scales.resize(count, 0.0);
        weights.resize(count, 0.0);
        exponentials(
            &mixture.log_weights,
            &mixture.log_scales,
            weights,
            inverse_scales,
        );
        let mut sum = 0.0;
        for weight in &mut *weights {
            if !(*weight >= 0.0 && weight.is_finite()) {
                *weight = 0.0;
            }
            sum += f64::from(*weight);
        }
        if sum == 0.0 {
            weights.fill(1.0);
            sum = count as f64;
        }
        components.clear();
        let parameters = mixture.means.iter().zip(&*inverse_scales).zip(&*weights);
        for ((&mean, &inverse), &weight) in parameters {
            components.push(
                f64::from(weight) / sum,
                f64::from(mean).max(-1e6).min(1e6),
                f64::from(inverse).max(0.0).min(1e6) * std::f64::consts::LOG2_E,
            );
        }
    }

    /// Mean and standard deviation, in levels and within bounds: what lies far beyond all levels counts little.
    pub fn moments(&self) -> [f64; 2] {
        let components = || {
            self.components.iter().map(|[weight, mean, rate]| {
                let mean = (mean * 127.5 + 127.5).clamp(-64.0, 320.0);
                let scale = (127.5 * std::f64::consts::LOG2_E / rate).min(512.0);
                (weight, mean, scale)
            })
        };
        // A logistic's variance is this by its scale's square.
        const VARIANCE: f64 = std::f64::consts::PI * std::f64::consts::PI / 3.0;
        let mean: f64 = components().map(|(weight, mean, _)| weight * mean).sum();
        let variance: f64 = components()
            .map(|(weight, own, scale)| {
                let off = own - mean;
                weight * (scale * scale * VARIANCE + off * off)
            })
            .sum();
        [mean, variance.sqrt().clamp(0.01, 128.0)]
    }

    /// Adds a logistic that has a share of the whole, of this mean and scale in levels.
    pub fn add(&mut self, share: f64, mean: f64, scale: f64) {
        for weight in &mut self.components.weights {
            *weight *= 1.0 - share;
        }
        let rate = 127.5 * std::f64::consts::LOG2_E / scale;
        self.components.push(share, (mean - 127.5) / 127.5, rate);
        self.near = Some(mean as usize);
    }

    /// What the last component gives a level, and before that all others.
    pub fn masses(&self, level: u8) -> [f64; 2] {
        let [lower, upper] = self.masses_below(level);
        [upper[0] - lower[0], upper[1] - lower[1]]
    }

    /// The mass below a level and the one below the next level: each of all components but the last one, and of
    /// the last one.
    fn masses_below(&self, level: u8) -> [[f64; 2]; 2] {
        let level = usize::from(level);
        let lower = if level == 0 { f64::MIN } else { EDGES[level] };
        let upper = if level == 255 {
            f64::MAX
        } else {
            EDGES[level + 1]
        };
        let mut sums = [[0.0; 2]; 2];
        below(&self.components, &[lower, upper], &mut sums);
        sums
    }

    /// C at a level, given the mixture's mass below it.
    fn cumulative_of(level: usize, mass: f64) -> u32 {
        match level {
            0 => 0,
            256 => TOTAL,
            // Rounding may take a sum beyond 1.
            level => (mass.min(1.0) * SHARED) as u32 + level as u32,
        }
    }

    /// C at a level and at the ones that follow it in steps of `step`; those beyond 256 are C(256).
    fn cumulative(&self, first: usize, step: usize) -> [u32; TOGETHER] {
        let levels: [usize; TOGETHER] = std::array::from_fn(|i| (first + i * step).min(256));
        let mut sums = [0.0; TOGETHER];
        sum(
            &self.components,
            &levels.map(|level| EDGES[level]),
            &mut sums,
        );
        std::array::from_fn(|i| Frequencies::cumulative_of(levels[i], sums[i]))
    }
}

vectorized! {
    /// Of each weight its exponential, of each scale's logarithm that of minus it.
    fn exponentials(
        log_weights: &[f32],
        log_scales: &[f32],
        weights: &mut [f32],
        inverse_scales: &mut [f32],
    ) {
        let logs = log_weights.chunks(LANES).zip(log_scales.chunks(LANES));
        let results = weights.chunks_mut(LANES).zip(inverse_scales.chunks_mut(LANES));
        for ((log_weights, log_scales), (weights, inverse_scales)) in logs.zip(results) {
            let [mut a, mut b] = [padded(log_weights), padded(log_scales)];
            for (a, b) in a.iter_mut().zip(&mut b) {
                *a = exp(*a);
                *b = exp(-*b);
            }
            weights.copy_from_slice(&a[..weights.len()]);
            inverse_scales.copy_from_slice(&b[..inverse_scales.len()]);
        }
    }
}

vectorized! {
    /// The mixture's mass below each edge.
    fn sum(components: &Components, edges: &[f64; TOGETHER], sums: &mut [f64; TOGETHER]) {
        for [weight, mean, rate] in components.iter() {
            for (sum, edge) in sums.iter_mut().zip(edges) {
                *sum += weight * (1.0 / (1.0 + exp2((mean - edge) * rate)));
            }
        }
    }
}

vectorized! {
    /// Of each edge the mass below it of all components but the last one, and of the last one: the sum of the two
    /// is the mixture's, to the bit.
    fn below(components: &Components, edges: &[f64; 2], sums: &mut [[f64; 2]; 2]) {
        let Components { count, weights, means, rates } = components;
        let (weights, means) = (weights.as_chunks::<TOGETHER>().0, means.as_chunks::<TOGETHER>().0);
        let rates = rates.as_chunks::<TOGETHER>().0;
        let mut left = *count;
        for ((weights, means), rates) in weights.iter().zip(means).zip(rates) {
            for (edge, sums) in edges.iter().zip(&mut *sums) {
                let mut masses = [0.0; TOGETHER];
                for (i, mass) in masses.iter_mut().enumerate() {
                    *mass = weights[i] * (1.0 / (1.0 + exp2((means[i] - edge) * rates[i])));
                }
                let others = (left - 1).min(TOGETHER);
                for mass in &masses[..others] {
                    sums[0] += mass;
                }
                if left <= TOGETHER {
                    sums[1] = masses[left - 1];
                }
            }
            left -= TOGETHER.min(left);
        }
    }
}

/// 2 to the `t`, monotone and within 1.2e-10 of it, relatively; beyond 2^1000 and 2^-1000 it is
/// these.
#[inline(always)]
fn exp2(t: f64) -> f64 {
    /// Adding it rounds to the nearest integer, found in the lowest bits.
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    let t = if -1000.0 > t { -1000.0 } else { t };
    let t = if 1000.0 < t { 1000.0 } else { t };
    let shifted = (t - 0.5) + ROUND;
    let r = t - (shifted - ROUND);
    let r = if 0.0 > r { 0.0 } else { r };
    // (2^r - 1) / r, interpolated at the seven Chebyshev points of 0 to 1.
    let p = 2.073_186_461_761_889e-5;
    let p = p * r + 1.460_963_217_043_144e-4;
    let p = p * r + 1.338_905_281_913_439e-3;
    let p = p * r + 9.616_159_879_565_808e-3;
    let p = p * r + 5.550_443_944_747_713e-2;
    let p = p * r + 2.402_264_862_038_437e-1;
    let p = p * r + 6.931_471_807_718_957e-1;
    let p = p * r + 1.0;
    let p = if 2.0 < p { 2.0 } else { p };
    p * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
}

impl EntropyModel<PRECISION> for Frequencies {
    type Symbol = u8;
    type Probability = u32;
}

impl EncoderModel<PRECISION> for Frequencies {
    fn left_cumulative_and_probability(&self, level: impl Borrow<u8>) -> Option<(u32, NonZeroU32)> {
        let level = *level.borrow();
        let [lower, upper] = self.masses_below(level).map(|[others, last]| others + last);
        let from = Frequencies::cumulative_of(usize::from(level), lower);
        let to = Frequencies::cumulative_of(usize::from(level) + 1, upper);
        Some((from, NonZeroU32::new(to - from)?))
    }
}

impl DecoderModel<PRECISION> for Frequencies {
    /// The level in whose interval a number below 2^24 lies: in which eighth of the levels, in which
    /// eighth of that, and so on; but first it is looked for near where it is expected.
    fn quantile_function(&self, quantile: u32) -> (u8, u32, NonZeroU32) {
        let (mut level, mut from, mut to) = (0, 0, TOTAL);
        let mut steps = &[32, 4, 1][..];
        if let Some(near) = self.near {
            let first = near.saturating_sub(16);
            let borders = self.cumulative(first, 4);
            let passed = borders.iter().filter(|c| **c <= quantile).count();
            if (1..TOGETHER).contains(&passed) {
                level = first + 4 * (passed - 1);
                (from, to) = (borders[passed - 1], borders[passed]);
                steps = &[1];
            }
        }
        for &step in steps {
            let [borders @ .., _] = self.cumulative(level + step, step);
            let passed = borders.iter().filter(|c| **c <= quantile).count();
            level += step * passed;
            if let Some(border) = borders[..passed].last() {
                from = *border;
            }
            if let Some(border) = borders.get(passed) {
                to = *border;
            }
        }
        let frequency = NonZeroU32::new(to - from).expect("C increases strictly");
        (level as u8, from, frequency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    /// Between -1 and 1.
    fn uniform(random: &mut ChaCha8Rng) -> f32 {
        random.next_u32() as i32 as f32 / 2f32.powi(31)
    }

    fn mixture(count: usize, mut parameters: impl FnMut() -> [f32; 3]) -> ChannelMixture {
        let mut mixture = ChannelMixture::default();
        for [log_weight, mean, log_scale] in std::iter::repeat_with(&mut parameters).take(count) {
            mixture.log_weights.push(log_weight);
            mixture.means.push(mean);
            mixture.log_scales.push(log_scale);
        }
        mixture
    }

    /// All of C, as the encoder finds it; once the decoder was found to agree.
    fn checked(mixture: &ChannelMixture) -> Vec<u32> {
        let mut frequencies = Frequencies::default();
        frequencies.set(mixture);
        let mut all = vec![0];
        for level in 0..=255u8 {
            let interval = frequencies.left_cumulative_and_probability(level);
            let (from, frequency) = interval.unwrap_or_else(|| panic!("{level} of {mixture:?}"));
            assert_eq!(from, all[usize::from(level)], "{mixture:?}");
            let to = from + frequency.get();
            for quantile in [from, from + frequency.get() / 2, to - 1] {
                let found = frequencies.quantile_function(quantile);
                assert_eq!(found, (level, from, frequency), "{mixture:?}");
            }
            all.push(to);
        }
        assert_eq!(all[256], TOTAL, "{mixture:?}");
        all
    }

    /// The same in plain words and with the standard library's functions.
    fn plain(mixture: &ChannelMixture) -> Vec<f64> {
        let weights = mixture.log_weights.iter().map(|w| f64::from(*w).exp());
        let sum: f64 = weights.clone().sum();
        let inner = (1..256).map(|level| {
            let edge = (f64::from(level) - 0.5 - 127.5) / 127.5;
            let logistics = mixture.means.iter().zip(&mixture.log_scales);
            let masses = weights.clone().zip(logistics).map(|(w, (m, s))| {
                let z = (edge - f64::from(*m)) / f64::from(*s).exp();
                w / sum / (1.0 + (-z).exp())
            });
            masses.sum::<f64>() * SHARED + f64::from(level)
        });
        let inner: Vec<f64> = inner.collect();
        [&[0.0], &inner[..], &[f64::from(TOTAL)]].concat()
    }

    #[test]
    fn frequencies_are_the_mixtures() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for count in [1, 2, 5, 10, 16, 17] {
            for _ in 0..30 {
                let mixture = mixture(count, || {
                    let [w, m, s] = [(); 3].map(|()| uniform(&mut random));
                    [3.0 * w, 1.5 * m, 4.0 * s - 3.0]
                });
                for (got, want) in checked(&mixture).into_iter().zip(plain(&mixture)) {
                    // Single precision of weights and scales: 3e-7 of a distribution at the most.
                    let error = (f64::from(got) - want).abs();
                    assert!(error < 12.0, "{got} for {want} of {mixture:?}");
                }
            }
        }
    }

    #[test]
    fn every_level_has_a_frequency_whatever_the_mixture() {
        let hostile = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e30,
            -1e30,
            1e-45,
            0.0,
            -1.0,
            -7.0,
            -90.0,
            90.0,
        ];
        for a in hostile {
            for b in hostile {
                for c in hostile {
                    checked(&mixture(3, || [a, b, c]));
                    let mut turn = 0;
                    checked(&mixture(3, || {
                        turn += 1;
                        [[a, b, c], [b, c, a], [0.0, 0.1, -3.0]][turn - 1]
                    }));
                }
            }
        }
        // Means on and beside edges, scales down to where a bin holds everything.
        let mut random = ChaCha8Rng::seed_from_u64(2);
        for log_scale in (-10..5).map(|s| s as f32 * 2.0) {
            for level in [0, 1, 2, 127, 128, 254, 255, 256] {
                for offset in [-1e-7, 0.0, 1e-7] {
                    let mean = EDGES[level] as f32 + offset;
                    checked(&mixture(1, || [0.0, mean, log_scale]));
                    checked(&mixture(10, || [uniform(&mut random), mean, log_scale]));
                }
            }
        }
    }

    #[test]
    fn one_more_logistic_has_its_share() {
        let mut random = ChaCha8Rng::seed_from_u64(4);
        for _ in 0..100 {
            let mixture = mixture(5, || {
                let [w, m, s] = [(); 3].map(|()| uniform(&mut random));
                [w, m, 2.0 * s - 3.0]
            });
            let mut frequencies = Frequencies::default();
            frequencies.set(&mixture);
            let alone = frequencies.clone();
            let share = 0.5 + 0.5 * f64::from(uniform(&mut random));
            let [mean, scale] = [130.0 + 90.0 * f64::from(uniform(&mut random)), 7.0];
            frequencies.add(share, mean, scale);
            let logistic = |edge: f64| 1.0 / (1.0 + ((mean - edge) / scale).exp());
            for level in 0..=255u8 {
                let masses = frequencies.masses(level);
                let [lower, upper] = [0.0, 1.0].map(|up| logistic(f64::from(level) + up - 0.5));
                let lower = if level == 0 { 0.0 } else { lower };
                let upper = if level == 255 { 1.0 } else { upper };
                assert!((masses[1] - share * (upper - lower)).abs() < 1e-9);
                let [others, last] = alone.masses(level);
                let others = (1.0 - share) * (others + last);
                assert!((masses[0] - others).abs() < 1e-9, "{level}");
                let coded = frequencies.left_cumulative_and_probability(level);
                let (_, frequency) = coded.unwrap();
                let wanted = (masses[0] + masses[1]) * SHARED + 1.0;
                assert!((f64::from(frequency.get()) - wanted).abs() < 1.1);
            }
        }
    }

    #[test]
    fn moments_are_the_mixtures() {
        let mut frequencies = Frequencies::default();
        let scale = 5.0 / 127.5;
        let at = |level: f32| (level - 127.5) / 127.5;
        frequencies.set(&ChannelMixture {
            log_weights: vec![0.0, 0.0],
            means: vec![at(100.0), at(140.0)],
            log_scales: vec![f32::ln(scale); 2],
        });
        let [mean, deviation] = frequencies.moments();
        let variance: f64 = 400.0 + 25.0 * std::f64::consts::PI.powi(2) / 3.0;
        assert!((mean - 120.0).abs() < 1e-4, "{mean}");
        assert!((deviation - variance.sqrt()).abs() < 1e-4, "{deviation}");
    }

    /// Compiled without this machine's vectors, the sums are the same bits.
    #[test]
    fn vectors_do_not_change_a_bit() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for i in 0..500 {
            let mixture = mixture(13, || [(); 3].map(|()| 3.0 * uniform(&mut random)));
            let mut frequencies = Frequencies::default();
            frequencies.set(&mixture);
            let edges: [f64; TOGETHER] = std::array::from_fn(|i| EDGES[1 + 31 * i]);
            let (mut sums, mut plain) = ([0.0; TOGETHER], [0.0; TOGETHER]);
            sum(&frequencies.components, &edges, &mut sums);
            for [weight, mean, rate] in frequencies.components.iter() {
                for (sum, edge) in plain.iter_mut().zip(edges) {
                    *sum += weight * (1.0 / (1.0 + exp2((mean - edge) * rate)));
                }
            }
            assert_eq!(sums.map(f64::to_bits), plain.map(f64::to_bits));
            // At some level, those of all components but the last one, and the last one's.
            let level = 1 + 30 * i % 254;
            let mut plain = [[0.0; 2]; 2];
            for (k, [weight, mean, rate]) in frequencies.components.iter().enumerate() {
                for (sums, edge) in plain.iter_mut().zip([EDGES[level], EDGES[level + 1]]) {
                    sums[k / 12] += weight * (1.0 / (1.0 + exp2((mean - edge) * rate)));
                }
            }
            let below = frequencies.masses_below(level as u8);
            let bits = |sums: [[f64; 2]; 2]| sums.map(|sums| sums.map(f64::to_bits));
            assert_eq!(bits(below), bits(plain));
            for (k, log) in mixture.log_scales.iter().enumerate() {
                assert_eq!(frequencies.inverse_scales[k].to_bits(), exp(-log).to_bits());
                let weight = exp(mixture.log_weights[k]);
                assert_eq!(frequencies.weights[k].to_bits(), weight.to_bits());
            }
        }
    }

    #[test]
    fn exp2_is_monotone_and_the_exponential() {
        let mut previous = 0.0;
        let mut check = |t: f64| {
            let got = exp2(t);
            assert!(
                got >= previous && got > 0.0,
                "{got} after {previous} at {t}"
            );
            previous = got;
            let want = t.clamp(-1000.0, 1000.0).exp2();
            assert!(
                (got / want - 1.0).abs() < 1.2e-10,
                "{got} for {want} at {t}"
            );
        };
        check(f64::NEG_INFINITY);
        for n in -1001..1002 {
            // Around the borders of segments and of their halves float by float, between in steps.
            let n = f64::from(n);
            for [from, to] in [[n, n + 0.5], [n + 0.5, n + 1.0]] {
                let mut t = from;
                for _ in 0..40 {
                    check(t);
                    t = t.next_up();
                }
                (1..40).for_each(|step| check(from + f64::from(step) / 80.0));
                t = to;
                for _ in 0..40 {
                    t = t.next_down();
                }
                while t < to {
                    check(t);
                    t = t.next_up();
                }
            }
        }
        check(f64::INFINITY);
        // Around 0, where all floats are tiny.
        let mut previous = 0.0;
        for exponent in (-1074..0).rev() {
            let got = exp2(-2f64.powi(exponent));
            assert!(got >= previous);
            previous = got;
        }
        for exponent in -1074..0 {
            let got = exp2(2f64.powi(exponent));
            assert!(got >= previous);
            previous = got;
        }
        assert_eq!(exp2(0.0), 1.0);
    }
}
