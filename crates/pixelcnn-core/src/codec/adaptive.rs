//! What a picture teaches while it is coded: beside the network's mixture stands one more logistic, whose mean,
//! scale and share follow from the pixels just before. Its mean is the network's, corrected by
//! [least squares](super::least_squares) from levels and errors around; its scale is the error that was seen where
//! the network was as sure and errors around were as large; its share follows how often it was
//! the likelier of the two. As classical coders adapt (Wu and Memon 1997, Meyer and Tischer 2001), here to a network.
//!
//! As in [`Frequencies`] every number is a single operation in double precision, in one order: what one machine
//! encodes, any other one decodes. All constants here are part of the `.pxc` format: others would make archives that
//! exist unreadable.

use std::ops::Range;

use super::frequencies::Frequencies;
use super::least_squares::{LANES, LeastSquares};
use super::strips::Shape;
use crate::incremental::LAG;

/// Levels that are looked at, of the same channel: rows and columns from the pixel's place.
const NEIGHBOURS: [[isize; 2]; 18] = [
    [0, -1],
    [-1, 0],
    [-1, -1],
    [-1, 1],
    [0, -2],
    [-2, 0],
    [-2, -1],
    [-2, 1],
    [-1, -2],
    [-1, 2],
    [-2, -2],
    [-2, 2],
    [0, -3],
    [-3, 0],
    [-3, -1],
    [-3, 1],
    [-1, -3],
    [-1, 3],
];
/// The nearest of them, whose errors are looked at; of other channels the first [`BESIDE`].
const NEAREST: usize = 4;
const BESIDE: usize = 2;
/// Rows and columns between a pixel and its neighbours at most.
const MARGIN: usize = 3;
/// Rows that are kept: a strip looks back by [`MARGIN`] rows, and the one to its right, [`LAG`] rows behind, still
/// looks at the row that it is at.
const ROWS: usize = 8;
const _: () = assert!(ROWS > LAG && ROWS > MARGIN);
/// How the errors around are weighed.
const AROUND: [([isize; 2], f64); 6] = [
    ([0, -1], 2.0),
    ([-1, 0], 2.0),
    ([-1, 1], 1.0),
    ([-1, -1], 1.0),
    ([0, -2], 1.0),
    ([-2, 0], 1.0),
];
/// And the same pixel's in a channel before.
const BEFORE: f64 = 2.0;

/// The absolute error that a network's standard deviation lets one expect: photographs' tails are longer than a
/// logistic's, where it would be 0.76.
const EXPECTED: f64 = 0.55;
/// Of a logistic, its scale by its mean absolute error: 1 / (2 ln 2).
const SCALE: f64 = 0.721_347_520_444_481_7;
/// No scale is smaller, in levels; none is larger beside the network's.
const LEAST_SCALE: f64 = 0.08;
const LARGEST_RATIO: f64 = 4.0;
/// Levels that the mean is corrected by at most.
const CORRECTION: f64 = 64.0;
/// What the errors around weigh beside what the network lets one expect, where a context has no errors yet.
const AROUND_WEIGHT: f64 = 0.5;
/// Counts of a context's errors: what is left at the next one, and what stands for them before there are any.
const MEMORY: f64 = 0.995;
const BEFORE_ANY: f64 = 4.0;
/// How fast shares follow, and how far they go.
const RATE: f64 = 0.1;
const SHARES: [f64; 2] = [0.002, 0.998];
/// Where they begin: in a picture of so many pixels there is enough to learn from, in others the network is
/// better trusted.
const MANY: usize = 64 * 64;
const FIRST_SHARES: [f64; 2] = [0.1, 0.5];
/// What each side has at the least of a level, as shares are compared.
const LEAST_MASS: f64 = 1e-6;

/// Steps of a context, and where those of the deviation and of the errors around begin, in levels.
const STEPS: usize = 16;
const FIRST_DEVIATION: f64 = 0.25;
const FIRST_ERROR: f64 = 0.125;
/// The last input, so that the prediction can have an offset.
const ONE: f64 = 4.0;

/// A channel of a pixel, as those after it see it.
#[derive(Debug, Clone, Copy)]
struct Seen {
    level: f64,
    /// By how much it is above the network's mean.
    residual: f64,
    /// How far the corrected mean was off.
    error: f64,
}

/// What a channel has learned.
#[derive(Debug, Clone)]
struct Learned {
    correction: LeastSquares,
    /// Sums of errors, each divided by what the network let one expect, and their count: by the step of its
    /// deviation and that of the errors around.
    errors: [[[f64; 2]; STEPS]; STEPS],
    /// The logistic's, by the deviation's step.
    shares: [f64; STEPS],
}

/// What is to be learned from, once the level is known.
#[derive(Debug, Clone, Default)]
struct Pending {
    inputs: Vec<f64>,
    network: f64,
    corrected: f64,
    deviation: f64,
    context: [usize; 2],
}

/// A strip's.
#[derive(Debug, Clone)]
pub(super) struct Adaptation {
    columns: usize,
    channels: usize,
    /// The latest rows \[row modulo [`ROWS`], [`MARGIN`] + columns + [`MARGIN`], channels\].
    seen: Vec<Option<Seen>>,
    row: usize,
    learned: Vec<Learned>,
    pending: Pending,
}

/// In which step a number is: two to an octave, from `first` on.
fn step(value: f64, first: f64) -> usize {
    let value = (value / first).clamp(1.0, 1024.0) as f32;
    let steps = (value.to_bits() >> 22) - (1f32.to_bits() >> 22);
    (steps as usize).min(STEPS - 1)
}

impl Adaptation {
    /// Of a strip of a picture that has so many columns, before its first row.
    pub fn new(columns: usize, shape: &Shape) -> Adaptation {
        let channels = shape.channels;
        let first_share = FIRST_SHARES[usize::from(shape.height * shape.width >= MANY)];
        let learned = |channel: usize| Learned {
            correction: LeastSquares::new(count_inputs(channels, channel)),
            errors: [[[0.0; 2]; STEPS]; STEPS],
            shares: [first_share; STEPS],
        };
        Adaptation {
            columns,
            channels,
            seen: vec![None; ROWS * (MARGIN + columns + MARGIN) * channels],
            row: 0,
            learned: (0..channels).map(learned).collect(),
            pending: Pending::default(),
        }
    }

    /// Where the part of a row is that is kept: both margins, and the columns between them.
    fn kept(&self, row: usize) -> Range<usize> {
        let len = self.seen.len() / ROWS;
        row % ROWS * len..(row % ROWS + 1) * len
    }

    /// Where a channel is in it, at a column counted from the left margin.
    fn place(&self, row: usize, column: usize, channel: usize) -> usize {
        self.kept(row).start + column * self.channels + channel
    }

    /// Turns to a row, of which the strip to the left has coded its part.
    pub fn begin_row(&mut self, row: usize, left: Option<&Adaptation>) {
        self.row = row;
        let kept = self.kept(row);
        self.seen[kept.clone()].fill(None);
        if let Some(left) = left {
            let margin = MARGIN * self.channels;
            let last = left.place(row, left.columns, 0);
            self.seen[kept][..margin].copy_from_slice(&left.seen[last..][..margin]);
        }
    }

    fn at(&self, [dy, dx]: [isize; 2], column: usize, channel: usize) -> Option<Seen> {
        let row = self.row.checked_add_signed(dy)?;
        let column = (MARGIN + column).checked_add_signed(dx)?;
        self.seen[self.place(row, column, channel)]
    }

    /// Adds to the network's mixture what is known of it, before a level is coded.
    pub fn expect(&mut self, column: usize, channel: usize, frequencies: &mut Frequencies) {
        let [network, deviation] = frequencies.moments();
        let mut inputs = std::mem::take(&mut self.pending.inputs);
        self.look(column, channel, network, &mut inputs);
        let learned = &self.learned[channel];
        let correction = learned
            .correction
            .predict(&inputs)
            .clamp(-CORRECTION, CORRECTION);
        let corrected = network + correction;
        let expected = EXPECTED * deviation;
        let around = self.around(column, channel).unwrap_or(expected);
        let context = [step(deviation, FIRST_DEVIATION), step(around, FIRST_ERROR)];
        let first = (expected + AROUND_WEIGHT * around) / ((1.0 + AROUND_WEIGHT) * expected);
        let [sum, count] = learned.errors[context[0]][context[1]];
        let ratio = (sum + BEFORE_ANY * first) / (count + BEFORE_ANY);
        let scale = ratio.min(LARGEST_RATIO) * expected * SCALE;
        let share = learned.shares[context[0]];
        frequencies.add(share, corrected, scale.max(LEAST_SCALE));
        self.pending = Pending {
            inputs,
            network,
            corrected,
            deviation,
            context,
        };
    }

    /// Learns from the level, which the frequencies were used for.
    pub fn learn(&mut self, column: usize, channel: usize, level: u8, frequencies: &Frequencies) {
        let Pending {
            ref inputs,
            network,
            corrected,
            deviation,
            context: [by_deviation, by_errors],
        } = self.pending;
        let learned = &mut self.learned[channel];
        let masses = frequencies.masses(level);
        let share = &mut learned.shares[by_deviation];
        let network_mass = masses[0] + (1.0 - *share) * LEAST_MASS;
        let own_mass = masses[1] + *share * LEAST_MASS;
        let wanted = own_mass / (network_mass + own_mass);
        *share = (*share + RATE * (wanted - *share)).clamp(SHARES[0], SHARES[1]);

        let level = f64::from(level);
        let (residual, error) = (level - network, (level - corrected).abs());
        for (sum, new) in learned.errors[by_deviation][by_errors]
            .iter_mut()
            .zip([error / (EXPECTED * deviation), 1.0])
        {
            *sum = *sum * MEMORY + new;
        }
        let weight = 1.0 / (deviation * deviation + 1.0);
        learned.correction.learn(inputs, residual, weight);
        let place = self.place(self.row, MARGIN + column, channel);
        self.seen[place] = Some(Seen {
            level,
            residual,
            error,
        });
    }

    /// What the correction is predicted from.
    fn look(&self, column: usize, channel: usize, network: f64, inputs: &mut Vec<f64>) {
        inputs.clear();
        let seen = |offset, channel| self.at(offset, column, channel);
        let level = |offset, channel| seen(offset, channel).map(|seen: Seen| seen.level);
        let residual = |offset, channel| seen(offset, channel).map_or(0.0, |seen| seen.residual);
        // What isn't known is as expected.
        let from = |base: f64, level: Option<f64>| level.map_or(0.0, |level| level - base);
        inputs.extend(NEIGHBOURS.map(|offset| from(network, level(offset, channel))));
        for other in 0..self.channels {
            if other < channel {
                inputs.push(residual([0, 0], other));
            }
            let near = if other == channel { NEAREST } else { BESIDE };
            inputs.extend(
                NEIGHBOURS[..near]
                    .iter()
                    .map(|offset| residual(*offset, other)),
            );
        }
        for before in 0..channel {
            let here = level([0, 0], before).unwrap_or_default();
            let near = NEIGHBOURS[..NEAREST].iter();
            inputs.extend(near.map(|offset| from(here, level(*offset, before))));
        }
        inputs.push(ONE);
        inputs.resize(inputs.len().next_multiple_of(LANES), 0.0);
    }

    /// The mean of the errors around.
    fn around(&self, column: usize, channel: usize) -> Option<f64> {
        let (mut sum, mut weights) = (0.0, 0.0);
        let mut take = |seen: Option<Seen>, weight: f64| {
            if let Some(seen) = seen {
                sum += weight * seen.error;
                weights += weight;
            }
        };
        for (offset, weight) in AROUND {
            take(self.at(offset, column, channel), weight);
        }
        for before in 0..channel {
            take(self.at([0, 0], column, before), BEFORE);
        }
        (weights > 0.0).then(|| sum / weights)
    }
}

/// Inputs of a channel's correction.
fn count_inputs(channels: usize, channel: usize) -> usize {
    let residuals = NEAREST + BESIDE * (channels - 1) + channel;
    NEIGHBOURS.len() + residuals + NEAREST * channel + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::likelihood::ChannelMixture;
    use constriction::stream::model::{DecoderModel, EncoderModel};

    fn mixture(log_weight: f32, mean: f32, log_scale: f32) -> ChannelMixture {
        ChannelMixture {
            log_weights: vec![log_weight, -1.0],
            means: vec![mean, 0.1],
            log_scales: vec![log_scale, -2.0],
        }
    }

    fn shape(channels: usize) -> Shape {
        Shape {
            height: 100,
            width: 70,
            channels,
            class: 0,
        }
    }

    /// A number like a random one, of three others.
    fn hash(y: usize, x: usize, channel: usize) -> u32 {
        let n = (y as u32 * 1009 + x as u32) * 3 + channel as u32 + 1;
        let n = (n ^ n >> 15).wrapping_mul(0x2c1b_3c6d);
        let n = (n ^ n >> 12).wrapping_mul(0x297a_2d39);
        n ^ n >> 15
    }

    const COLUMNS: [usize; 2] = [64, 6];

    /// Goes through a picture of 70 columns in two strips, of which the right one is some rows behind: gives them,
    /// and the bits of a level in the lower half of each.
    fn run(
        channels: usize,
        level: impl Fn(usize, usize, usize) -> u8,
        mixture: impl Fn(usize, usize, usize) -> ChannelMixture,
    ) -> ([Adaptation; 2], [f64; 2]) {
        let shape = shape(channels);
        let mut strips = COLUMNS.map(|columns| Adaptation::new(columns, &shape));
        let mut frequencies = Frequencies::default();
        let mut bits = [0.0; 2];
        for y in 0..shape.height + LAG {
            for strip in 0..2 {
                let row = y.checked_sub(LAG * strip);
                let Some(row) = row.filter(|row| *row < shape.height) else {
                    continue;
                };
                let (before, rest) = strips.split_at_mut(strip);
                let own = &mut rest[0];
                own.begin_row(row, before.last());
                for (column, channel) in
                    (0..COLUMNS[strip]).flat_map(|x| (0..channels).map(move |c| (x, c)))
                {
                    let x = 64 * strip + column;
                    frequencies.set(&mixture(row, x, channel));
                    own.expect(column, channel, &mut frequencies);
                    let level = level(row, x, channel);
                    let coded = frequencies.left_cumulative_and_probability(level);
                    let (from, frequency) = coded.unwrap();
                    for quantile in [from, from + frequency.get() - 1] {
                        let found = frequencies.quantile_function(quantile);
                        assert_eq!(found, (level, from, frequency));
                    }
                    if row >= shape.height / 2 {
                        bits[strip] += 24.0 - f64::from(frequency.get()).log2();
                    }
                    own.learn(column, channel, level, &frequencies);
                }
            }
        }
        let levels = COLUMNS.map(|columns| (columns * channels * shape.height / 2) as f64);
        (strips, [bits[0] / levels[0], bits[1] / levels[1]])
    }

    /// A network that knows nothing, and a picture that is easy once it was looked at.
    #[test]
    fn what_is_around_teaches() {
        let level = |y: usize, x: usize, channel: usize| {
            let wave = 60.0 * (0.11 * x as f64 + 0.07 * y as f64).sin();
            (128.0 + wave * (1.0 - 0.2 * channel as f64)) as u8 + (hash(y, x, channel) % 3) as u8
        };
        for channels in [1, 3] {
            let (_, bits) = run(channels, level, |_, _, _| mixture(0.0, 0.0, -0.5));
            // The network alone needs more than 7 bits. Three levels of noise take 1.6, and blur what is
            // predicted from them.
            assert!(bits[0] < 3.2 && bits[1] < 5.0, "{bits:?}");
        }
    }

    /// Where the network is right, nothing is to be gained, and little is lost.
    #[test]
    fn a_network_that_is_right_is_left_alone() {
        let known = |y, x, channel| {
            let mean = hash(y, x, channel + 7) as i32 as f32 / 2f32.powi(31);
            mixture(1.0, mean, -3.0)
        };
        let drawn = |y, x, channel| {
            let mut frequencies = Frequencies::default();
            frequencies.set(&known(y, x, channel));
            let (level, _, frequency) = frequencies.quantile_function(hash(y, x, channel) >> 8);
            (level, 24.0 - f64::from(frequency.get()).log2())
        };
        let (_, [bits, _]) = run(3, |y, x, channel| drawn(y, x, channel).0, known);
        let places =
            (50..100).flat_map(|y| (0..64).flat_map(move |x| (0..3).map(move |c| (y, x, c))));
        let alone: f64 = places.map(|(y, x, c)| drawn(y, x, c).1).sum();
        let alone = alone / (50.0 * 64.0 * 3.0);
        assert!(alone > 5.0, "{alone}");
        assert!(
            (0.995 * alone..1.01 * alone).contains(&bits),
            "{bits} beside {alone}"
        );
    }

    #[test]
    fn a_strip_sees_the_one_to_its_left() {
        let level = |y: usize, x: usize, channel: usize| hash(y, x, channel) as u8;
        let ([left, right], _) = run(3, level, |_, _, _| mixture(0.0, 0.0, -0.5));
        for channel in 0..3 {
            let seen = |strip: &Adaptation, offset, column| {
                strip.at(offset, column, channel).map(|seen| seen.level)
            };
            for [dy, dx] in NEIGHBOURS {
                let [y, x] = [99 + dy, 64 + dx].map(|n| n as usize);
                let want = Some(f64::from(level(y, x, channel)));
                assert_eq!(seen(&right, [dy, dx], 0), want.filter(|_| x < 70));
                // Beyond its right edge it sees nothing, nor left of the picture.
                let at_edge = Some(f64::from(level(y, (63 + dx) as usize, channel)));
                assert_eq!(seen(&left, [dy, dx], 63), at_edge.filter(|_| dx <= 0));
                let first = (dx >= 0).then(|| f64::from(level(y, dx as usize, channel)));
                assert_eq!(seen(&left, [dy, dx], 0), first);
            }
        }
    }

    /// Whatever a network says, every level has a frequency, and the decoder finds it.
    #[test]
    fn no_mixture_leads_astray() {
        let hostile = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e30,
            -1e30,
            0.0,
            -7.0,
            90.0,
        ];
        let of = |n: usize| hostile[n % hostile.len()];
        let level = |y: usize, x: usize, channel: usize| (x * y * 17 + channel * 99) as u8;
        let (_, bits) = run(3, level, |y, x, channel| {
            mixture(of(x), of(x / 8 + y), of(y / 8 + channel))
        });
        assert!(bits.iter().all(|bits| bits.is_finite()));
    }

    #[test]
    fn inputs_are_counted() {
        for channels in [1, 3] {
            let adaptation = Adaptation::new(64, &shape(channels));
            for channel in 0..channels {
                let mut looked = Vec::new();
                adaptation.look(5, channel, 100.0, &mut looked);
                let count = count_inputs(channels, channel);
                assert_eq!(looked.len(), count.next_multiple_of(LANES));
                assert_eq!(looked[count - 1], ONE);
            }
        }
    }

    #[test]
    fn steps_are_two_to_an_octave() {
        let steps = [0.0, 0.25, 0.3, 0.375, 0.5, 0.75, 1.0, 1e9];
        let steps = steps.map(|value| step(value, 0.25));
        assert_eq!(steps, [0, 0, 0, 1, 2, 3, 4, STEPS - 1]);
    }
}
