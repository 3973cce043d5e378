//! What happens between the convolutions, value by value: the nonlinearity with its dropout (paper,
//! section 2.5), and the gate of a gated resnet block. Nothing is saved for a backward pass: it
//! computes again what it needs.

use super::math::{exp, exp_m1_negative, sigmoid};
use crate::config::Nonlinearity;
use rayon::prelude::*;

/// Values that one task computes.
const TASK: usize = 1 << 14;

/// Pixels of `channels` values that one task computes.
fn task_pixels(channels: usize) -> usize {
    (TASK / channels).max(1)
}

/// Pixels whose exponentials a task takes at once: enough values for long runs of whole vectors,
/// whatever the number of channels, and few enough for the first-level cache.
fn block_pixels(channels: usize) -> usize {
    (512 / channels).max(1)
}

/// Drops values at random: each becomes zero with probability `rate`, else 1 / (1 - `rate`) times
/// itself. Which are dropped is a pure function of the seed and of a value's place in the map, so
/// that no mask need be kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of being dropped, at least 0 and less than 1.
    pub rate: f32,
    /// A different one for every layer and step.
    pub seed: u64,
    /// Place of the first value, where the map is the continuation of another one.
    pub first: usize,
}

impl Dropout {
    /// The factors (0 or 1 / (1 - `rate`)) for the first values of a map.
    pub fn mask(self, mask: &mut [f32]) {
        let factors = self.factors();
        mask.par_chunks_mut(TASK)
            .enumerate()
            .for_each(|(task, mask)| mask_task(factors, (task * TASK) as u32, mask));
    }

    /// What the values' places are hashed with.
    pub fn factors(self) -> Dropped {
        let [first, second] = keys(self.seed);
        Dropped {
            keys: [first.wrapping_add(self.first as u32), second],
            threshold: (self.rate * 2f32.powi(24)) as u32,
            scale: 1.0 / (1.0 - self.rate),
        }
    }
}

/// What [`hash`] takes of a seed.
pub fn keys(seed: u64) -> [u32; 2] {
    [mix(seed) as u32, (mix(seed) >> 32) as u32]
}

/// A hash of 24 bits of an index (Wellons' "lowbias32" with a key before each round).
#[inline(always)]
pub fn hash(keys: [u32; 2], index: u32) -> u32 {
    let h = index.wrapping_add(keys[0]);
    let h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
    let h = h ^ (h >> 15) ^ keys[1];
    let h = h.wrapping_mul(0x846c_a68b);
    (h ^ (h >> 16)) >> 8
}

/// A bijection in which every bit of the result hangs on every bit of the seed (SplitMix64).
fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What each value of a map is multiplied by: 0 where its place's hash of 24 bits is below a
/// threshold.
#[derive(Debug, Clone, Copy)]
// As GPUs take it.
#[repr(C)]
pub struct Dropped {
    /// What the hash takes besides the place.
    pub keys: [u32; 2],
    /// `rate` of all hashes are below it.
    pub threshold: u32,
    /// 1 / (1 - `rate`).
    pub scale: f32,
}

impl Dropped {
    /// The factor of a value in some place.
    #[inline(always)]
    pub fn at(self, index: u32) -> f32 {
        match hash(self.keys, index) < self.threshold {
            true => 0.0,
            false => self.scale,
        }
    }
}

vectorized! {
    fn mask_task(factors: Dropped, start: u32, mask: &mut [f32]) {
        for (i, mask) in mask.iter_mut().enumerate() {
            *mask = factors.at(start.wrapping_add(i as u32));
        }
    }
}

/// The channels of a map that is all of its pixels, or a part of a concatenation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    /// How many they are.
    pub count: usize,
    /// Channels of the concatenation before them.
    pub first: usize,
    /// Channels of the whole concatenation.
    pub of: usize,
}

impl From<usize> for Channels {
    /// All of them.
    fn from(count: usize) -> Channels {
        Channels {
            count,
            first: 0,
            of: count,
        }
    }
}

impl Channels {
    /// Pixels of `x` \[pixels, channels\] and `y`, which has `f` of the whole concatenation.
    fn expect_pixels(self, f: Nonlinearity, x: &[f32], y: &[f32]) {
        let Channels { count, first, of } = self;
        assert!(first <= of && count <= of - first, "channels of a pixel");
        assert!(x.len().is_multiple_of(count), "whole pixels");
        let pixels = x.len() / count;
        assert_eq!(pixels * f.outputs(of), y.len(), "as many pixels");
    }
}

/// The nonlinearity of `x` \[pixels, channels\], followed by dropout: `y` is
/// \[pixels, [`f.outputs(channels)`](Nonlinearity::outputs)\]. Concatenated ELU gives the channels
/// of elu(x), then those of elu(-x). Of a concatenation, only what comes from `x` is written.
///
/// # Panics
/// If the slices' lengths disagree, or with dropout on a part of a concatenation.
pub fn nonlinearity(
    f: Nonlinearity,
    channels: impl Into<Channels>,
    dropout: Option<Dropout>,
    x: &[f32],
    y: &mut [f32],
) {
    let channels = channels.into();
    channels.expect_pixels(f, x, y);
    assert!(dropout.is_none() || channels.count == channels.of);
    let (count, outputs) = (channels.count, f.outputs(channels.of));
    let (factors, pixels) = (dropout.map(Dropout::factors), task_pixels(count));
    x.par_chunks(pixels * count)
        .zip(y.par_chunks_mut(pixels * outputs))
        .enumerate()
        .for_each(|(task, (x, y))| {
            let start = (task * pixels * outputs) as u32;
            nonlinearity_task(f, channels, factors, start, x, y);
        });
}

vectorized! {
    fn nonlinearity_task(
        f: Nonlinearity,
        channels: Channels,
        factors: Option<Dropped>,
        start: u32,
        x: &[f32],
        y: &mut [f32],
    ) {
        let Channels { count: channels, first, of } = channels;
        let (outputs, pixels) = (f.outputs(of), block_pixels(channels));
        let mut bent = vec![0.0; pixels * channels];
        let mut index = start;
        let blocks = x.chunks(pixels * channels).zip(y.chunks_mut(pixels * outputs));
        for (x, y) in blocks {
            if f != Nonlinearity::Relu {
                for (bent, x) in bent.iter_mut().zip(x) {
                    *bent = exp_m1_negative(-x.abs());
                }
            }
            match f {
                Nonlinearity::ConcatElu => {
                    let pixels = x.chunks_exact(channels).zip(bent.chunks_exact(channels));
                    for ((x, bent), y) in pixels.zip(y.chunks_exact_mut(outputs)) {
                        let (plus, minus) = y.split_at_mut(of);
                        let (plus, minus) = (&mut plus[first..], &mut minus[first..]);
                        for (((x, bent), plus), minus) in x.iter().zip(bent).zip(plus).zip(minus) {
                            // Of x and -x one stays itself, the other is bent.
                            let positive = *x > 0.0;
                            *plus = if positive { x.abs() } else { *bent };
                            *minus = if positive { *bent } else { x.abs() };
                        }
                    }
                }
                Nonlinearity::Elu => {
                    let pixels = x.chunks_exact(channels).zip(bent.chunks_exact(channels));
                    for ((x, bent), y) in pixels.zip(y.chunks_exact_mut(outputs)) {
                        for ((x, bent), y) in x.iter().zip(bent).zip(&mut y[first..]) {
                            *y = if *x > 0.0 { *x } else { *bent };
                        }
                    }
                }
                Nonlinearity::Relu => {
                    let pixels = x.chunks_exact(channels);
                    for (x, y) in pixels.zip(y.chunks_exact_mut(outputs)) {
                        for (x, y) in x.iter().zip(&mut y[first..]) {
                            // The comparison lets NaN through.
                            *y = if 0.0 > *x { 0.0 } else { *x };
                        }
                    }
                }
            }
            if let Some(factors) = factors {
                for (i, y) in y.iter_mut().enumerate() {
                    *y *= factors.at(index.wrapping_add(i as u32));
                }
            }
            index = index.wrapping_add(y.len() as u32);
        }
    }
}

/// The gradient by the input `x` of [`nonlinearity`], given that by its output, `dy`: written to
/// `dx`, or added to what it holds.
///
/// # Panics
/// If the slices' lengths disagree.
pub fn nonlinearity_backward(
    f: Nonlinearity,
    channels: impl Into<Channels>,
    dropout: Option<Dropout>,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    let channels = channels.into();
    channels.expect_pixels(f, x, dy);
    assert!(dropout.is_none() || channels.count == channels.of);
    assert_eq!(x.len(), dx.len(), "as many pixels");
    let (count, outputs) = (channels.count, f.outputs(channels.of));
    let (factors, pixels) = (dropout.map(Dropout::factors), task_pixels(count));
    x.par_chunks(pixels * count)
        .zip(dy.par_chunks(pixels * outputs))
        .zip(dx.par_chunks_mut(pixels * count))
        .enumerate()
        .for_each(|(task, ((x, dy), dx))| {
            let start = (task * pixels * outputs) as u32;
            backward_task(f, channels, factors, start, x, dy, dx, accumulate);
        });
}

vectorized! {
    fn backward_task(
        f: Nonlinearity,
        channels: Channels,
        factors: Option<Dropped>,
        start: u32,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        accumulate: bool,
    ) {
        let Channels { count: channels, first, of } = channels;
        let (outputs, pixels) = (f.outputs(of), block_pixels(channels));
        let mut slopes = vec![0.0; pixels * channels];
        let mut kept = vec![0.0; pixels * outputs];
        let mut index = start;
        let blocks = x.chunks(pixels * channels).zip(dx.chunks_mut(pixels * channels));
        for ((x, dx), dy) in blocks.zip(dy.chunks(pixels * outputs)) {
            if f != Nonlinearity::Relu {
                for (slope, x) in slopes.iter_mut().zip(x) {
                    *slope = exp(-x.abs());
                }
            }
            let end = index.wrapping_add(dy.len() as u32);
            let dy = match factors {
                Some(factors) => {
                    for (i, (kept, dy)) in kept.iter_mut().zip(dy).enumerate() {
                        *kept = dy * factors.at(index.wrapping_add(i as u32));
                    }
                    &kept[..dy.len()]
                }
                None => dy,
            };
            if !accumulate {
                dx.fill(0.0);
            }
            match f {
                Nonlinearity::ConcatElu => {
                    let pixels = x.chunks_exact(channels).zip(slopes.chunks_exact(channels));
                    let pixels = pixels.zip(dx.chunks_exact_mut(channels));
                    for (((x, slopes), dx), dy) in pixels.zip(dy.chunks_exact(outputs)) {
                        let (plus, minus) = dy.split_at(of);
                        let (plus, minus) = (&plus[first..], &minus[first..]);
                        let values = x.iter().zip(slopes).zip(plus.iter().zip(minus)).zip(dx);
                        for (((x, slope), (plus, minus)), dx) in values {
                            let positive = *x > 0.0;
                            let plus = if positive { *plus } else { plus * slope };
                            let minus = if positive { minus * slope } else { *minus };
                            *dx += plus - minus;
                        }
                    }
                }
                Nonlinearity::Elu => {
                    let pixels = x.chunks_exact(channels).zip(slopes.chunks_exact(channels));
                    let pixels = pixels.zip(dx.chunks_exact_mut(channels));
                    for (((x, slopes), dx), dy) in pixels.zip(dy.chunks_exact(outputs)) {
                        let values = x.iter().zip(slopes).zip(&dy[first..]).zip(dx);
                        for (((x, slope), dy), dx) in values {
                            *dx += if *x > 0.0 { *dy } else { dy * slope };
                        }
                    }
                }
                Nonlinearity::Relu => {
                    let pixels = x.chunks_exact(channels).zip(dx.chunks_exact_mut(channels));
                    for ((x, dx), dy) in pixels.zip(dy.chunks_exact(outputs)) {
                        for ((x, dy), dx) in x.iter().zip(&dy[first..]).zip(dx) {
                            *dx += if *x > 0.0 { *dy } else { 0.0 };
                        }
                    }
                }
            }
            index = end;
        }
    }
}

/// The exponential linear unit before the last layer. It is a sum less one, rounded twice, as it
/// always was here: runs go on with the bits that they began with.
///
/// # Panics
/// If the slices' lengths disagree.
pub fn elu(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "as many values");
    let chunks = x.par_chunks(TASK).zip(y.par_chunks_mut(TASK));
    chunks.for_each(|(x, y)| {
        for (x, y) in x.iter().zip(y) {
            // The comparison lets NaN through.
            let (positive, negative) = if *x > 0.0 { (*x, 0.0) } else { (0.0, *x) };
            *y = (positive + negative.exp()) - 1.0;
        }
    });
}

/// The gradient by the input `x` of [`elu`], given that by its output, `dy`: written to `dx`, or
/// added to what it holds.
///
/// # Panics
/// If the slices' lengths disagree.
pub fn elu_backward(x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    assert_eq!([dy.len(), dx.len()], [x.len(); 2], "as many values");
    let chunks = x.par_chunks(TASK).zip(dy.par_chunks(TASK));
    chunks
        .zip(dx.par_chunks_mut(TASK))
        .for_each(|((x, dy), dx)| {
            for ((x, dy), dx) in x.iter().zip(dy).zip(dx) {
                let through = if *x > 0.0 { *dy } else { dy * x.exp() };
                *dx = if accumulate { *dx + through } else { through };
            }
        });
}

/// The end of a gated resnet block: `y = x + a * sigmoid(b)`, where `x` and `y` are
/// \[pixels, channels\] and the second convolution's output `c2` \[pixels, 2 * channels\] holds a
/// in its first half, b in its second. Class conditioning adds `bias` \[images, 2 * channels\] to
/// `c2` first.
///
/// # Panics
/// If the slices' lengths disagree.
pub fn gate(
    channels: usize,
    pixels_per_image: usize,
    x: &[f32],
    c2: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    assert_eq!(x.len(), y.len(), "as many pixels");
    assert_eq!(c2.len(), 2 * y.len(), "as many pixels");
    let bias = ImageBias::new(channels, pixels_per_image, bias);
    let pixels = task_pixels(channels);
    x.par_chunks(pixels * channels)
        .zip(c2.par_chunks(pixels * 2 * channels))
        .zip(y.par_chunks_mut(pixels * channels))
        .enumerate()
        .for_each(|(task, ((x, c2), y))| gate_task(&bias, task * pixels, x, c2, y));
}

/// The gradient of [`gate`] by `c2`, which it overwrites, given that by its output, `dy`; the
/// gradient by `x` is `dy` itself, and that by the bias is [`image_sums`] of the result.
///
/// # Panics
/// If the slices' lengths disagree.
pub fn gate_backward(
    channels: usize,
    pixels_per_image: usize,
    dy: &[f32],
    bias: Option<&[f32]>,
    c2: &mut [f32],
) {
    assert_eq!(c2.len(), 2 * dy.len(), "as many pixels");
    let bias = ImageBias::new(channels, pixels_per_image, bias);
    let pixels = task_pixels(channels);
    dy.par_chunks(pixels * channels)
        .zip(c2.par_chunks_mut(pixels * 2 * channels))
        .enumerate()
        .for_each(|(task, (dy, c2))| gate_backward_task(&bias, task * pixels, dy, c2));
}

/// The sum over every image's pixels: `x` \[images, pixels, channels\] to \[images, channels\].
///
/// # Panics
/// If the slices' lengths disagree.
pub fn image_sums(channels: usize, pixels_per_image: usize, x: &[f32], sums: &mut [f32]) {
    assert_eq!(
        x.len(),
        sums.len() * pixels_per_image,
        "as many images and channels"
    );
    sums.par_chunks_mut(channels)
        .zip(x.par_chunks(channels * pixels_per_image))
        .for_each(|(sums, x)| {
            sums.fill(0.0);
            // In two stages, so that a long sum loses nothing.
            let mut partial = vec![0.0; channels];
            for x in x.chunks(64 * channels) {
                partial.fill(0.0);
                add_pixels(x, &mut partial);
                add_pixels(&partial, sums);
            }
        });
}

vectorized! {
    fn add_pixels(x: &[f32], sums: &mut [f32]) {
        for x in x.chunks_exact(sums.len()) {
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += x;
            }
        }
    }
}

/// A bias for every image.
struct ImageBias<'a> {
    channels: usize,
    pixels_per_image: usize,
    /// None is zero for every image.
    values: Option<&'a [f32]>,
    zeros: Vec<f32>,
}

impl<'a> ImageBias<'a> {
    fn new(channels: usize, pixels_per_image: usize, values: Option<&'a [f32]>) -> Self {
        ImageBias {
            channels,
            pixels_per_image,
            values,
            zeros: vec![0.0; 2 * channels],
        }
    }

    /// The halves for a and b at a pixel.
    #[inline(always)]
    fn at(&self, pixel: usize) -> (&[f32], &[f32]) {
        let bias = self.values.map_or(&self.zeros[..], |values| {
            let start = pixel / self.pixels_per_image * 2 * self.channels;
            &values[start..start + 2 * self.channels]
        });
        bias.split_at(self.channels)
    }

    /// The gates that the second halves of `c2` open, from pixel `first` on.
    #[inline(always)]
    fn gates(&self, first: usize, c2: &[f32], gates: &mut [f32]) {
        let channels = self.channels;
        let pixels = c2
            .chunks_exact(2 * channels)
            .zip(gates.chunks_exact_mut(channels));
        for (i, (c2, gates)) in pixels.enumerate() {
            let (_, bias) = self.at(first + i);
            for ((gate, b), bias) in gates.iter_mut().zip(&c2[channels..]).zip(bias) {
                *gate = b + bias;
            }
        }
        for gate in gates {
            *gate = sigmoid(*gate);
        }
    }
}

vectorized! {
    fn gate_task(bias: &ImageBias<'_>, first: usize, x: &[f32], c2: &[f32], y: &mut [f32]) {
        let (channels, pixels) = (bias.channels, block_pixels(bias.channels));
        let mut gates = vec![0.0; pixels * channels];
        let blocks = x.chunks(pixels * channels).zip(y.chunks_mut(pixels * channels));
        for (block, ((x, y), c2)) in blocks.zip(c2.chunks(pixels * 2 * channels)).enumerate() {
            let first = first + block * pixels;
            bias.gates(first, c2, &mut gates);
            let pixels = x.chunks_exact(channels).zip(gates.chunks_exact(channels));
            let pixels = pixels.zip(c2.chunks_exact(2 * channels)).zip(y.chunks_exact_mut(channels));
            for (i, (((x, gates), c2), y)) in pixels.enumerate() {
                let (bias, _) = bias.at(first + i);
                let values = x.iter().zip(gates).zip(c2.iter().zip(bias)).zip(y);
                for (((x, gate), (a, bias)), y) in values {
                    *y = x + (a + bias) * gate;
                }
            }
        }
    }
}

vectorized! {
    fn gate_backward_task(bias: &ImageBias<'_>, first: usize, dy: &[f32], c2: &mut [f32]) {
        let (channels, pixels) = (bias.channels, block_pixels(bias.channels));
        let mut gates = vec![0.0; pixels * channels];
        let blocks = dy.chunks(pixels * channels).zip(c2.chunks_mut(pixels * 2 * channels));
        for (block, (dy, c2)) in blocks.enumerate() {
            let first = first + block * pixels;
            bias.gates(first, c2, &mut gates);
            let pixels = dy.chunks_exact(channels).zip(gates.chunks_exact(channels));
            for (i, ((dy, gates), c2)) in pixels.zip(c2.chunks_exact_mut(2 * channels)).enumerate() {
                let (a, b) = c2.split_at_mut(channels);
                let (bias, _) = bias.at(first + i);
                let values = dy.iter().zip(gates).zip(a.iter_mut().zip(b)).zip(bias);
                for (((dy, gate), (a, b)), bias) in values {
                    *b = dy * (*a + bias) * (gate * (1.0 - gate));
                    *a = dy * gate;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    const ALL: [Nonlinearity; 3] = [
        Nonlinearity::ConcatElu,
        Nonlinearity::Elu,
        Nonlinearity::Relu,
    ];

    /// Shapes on both sides of a vector's and of a task's size: images, pixels of each, channels.
    const SHAPES: [(usize, usize, usize); 5] =
        [(1, 1, 1), (2, 3, 5), (3, 16, 8), (2, 64, 33), (2, 400, 160)];

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..n)
            .map(|_| (random.next_u32() as i32) as f32 / 2f32.powi(29))
            .collect()
    }

    fn assert_close(got: &[f32], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(got) - want).abs();
            assert!(error <= 3e-6 * want.abs().max(1.0), "{got}, {want} at {i}");
        }
    }

    fn plain_elu(x: f64) -> f64 {
        if x > 0.0 { x } else { x.exp_m1() }
    }

    /// One pixel's outputs.
    fn plain(f: Nonlinearity, x: &[f64]) -> Vec<f64> {
        let minus = x.iter().map(|x| -x);
        match f {
            Nonlinearity::ConcatElu => x.iter().copied().chain(minus).map(plain_elu).collect(),
            Nonlinearity::Elu => x.iter().copied().map(plain_elu).collect(),
            Nonlinearity::Relu => x.iter().map(|x| x.max(0.0)).collect(),
        }
    }

    fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().copied().map(f64::from).collect()
    }

    /// The central difference of a function that the argument `x[i]` enters.
    fn difference(x: &mut [f64], i: usize, mut f: impl FnMut(&[f64]) -> f64) -> f64 {
        let (at, step) = (x[i], 1e-5);
        x[i] = at - step;
        let below = f(x);
        x[i] = at + step;
        let above = f(x);
        x[i] = at;
        (above - below) / (2.0 * step)
    }

    #[test]
    fn nonlinearities_and_their_gradients() {
        for (seed, (images, pixels, channels)) in SHAPES.into_iter().enumerate() {
            for (f, rate) in ALL.into_iter().flat_map(|f| [(f, 0.0), (f, 0.5), (f, 0.1)]) {
                let n = images * pixels;
                let dropout = (rate > 0.0).then_some(Dropout {
                    rate,
                    seed: 7,
                    first: 0,
                });
                let outputs = f.outputs(channels);
                let x = random(n * channels, seed as u64);
                let mut mask = vec![1.0; n * outputs];
                if let Some(dropout) = dropout {
                    dropout.mask(&mut mask);
                }
                let mut y = vec![f32::NAN; n * outputs];
                nonlinearity(f, channels, dropout, &x, &mut y);
                let want: Vec<f64> = x
                    .chunks(channels)
                    .flat_map(|x| plain(f, &widen(x)))
                    .zip(&mask)
                    .map(|(y, mask)| y * f64::from(*mask))
                    .collect();
                assert_close(&y, &want);

                let dy = random(n * outputs, 99);
                let mut dx = vec![f32::NAN; n * channels];
                nonlinearity_backward(f, channels, dropout, &x, &dy, &mut dx, false);
                let masked: Vec<f64> = dy
                    .iter()
                    .zip(&mask)
                    .map(|(dy, mask)| f64::from(*dy) * f64::from(*mask))
                    .collect();
                let pixels = x.chunks(channels).zip(masked.chunks(outputs));
                let want: Vec<f64> = pixels
                    .flat_map(|(x, dy)| {
                        let x = widen(x);
                        (0..channels)
                            .map(|i| {
                                let value = x[i];
                                difference(&mut [value], 0, |value| {
                                    let y = plain(f, value);
                                    y.iter()
                                        .enumerate()
                                        .map(|(half, y)| y * dy[half * channels + i])
                                        .sum()
                                })
                            })
                            .collect::<Vec<_>>()
                    })
                    .collect();
                assert_close(&dx, &want);

                let before = random(n * channels, 5);
                let mut sum = before.clone();
                nonlinearity_backward(f, channels, dropout, &x, &dy, &mut sum, true);
                let want: Vec<f32> = before.iter().zip(&dx).map(|(a, b)| a + b).collect();
                assert_eq!(sum, want);
            }
        }
    }

    #[test]
    fn nonlinearities_at_the_extremes() {
        let x = [0.0, 1e-30, -1e-30, 1000.0, -1000.0];
        let mut y = [f32::NAN; 10];
        nonlinearity(Nonlinearity::ConcatElu, 5, None, &x, &mut y);
        let want = [
            0.0, 1e-30, -1e-30, 1000.0, -1.0, 0.0, -1e-30, 1e-30, -1.0, 1000.0,
        ];
        assert_eq!(y, want);
        let mut dx = [f32::NAN; 5];
        nonlinearity_backward(
            Nonlinearity::ConcatElu,
            5,
            None,
            &x,
            &[1.0; 10],
            &mut dx,
            false,
        );
        assert_eq!(dx, [0.0, 0.0, 0.0, 1.0, -1.0]);
        for f in ALL {
            let mut y = vec![0.0; f.outputs(1)];
            nonlinearity(f, 1, None, &[f32::NAN], &mut y);
            assert!(y.iter().all(|y| y.is_nan()));
        }
    }

    /// Of a concatenation as of its parts, forward and backward.
    #[test]
    fn parts_of_a_concatenation_are_the_whole() {
        let (pixels, counts, of) = (70, [5, 33, 2], 40);
        for f in ALL {
            let whole = random(pixels * of, 1);
            let mut want = vec![f32::NAN; pixels * f.outputs(of)];
            nonlinearity(f, of, None, &whole, &mut want);
            let dy = random(want.len(), 2);
            let mut want_dx = vec![f32::NAN; whole.len()];
            nonlinearity_backward(f, of, None, &whole, &dy, &mut want_dx, false);

            let mut got = vec![f32::NAN; want.len()];
            let mut first = 0;
            for count in counts {
                let channels = Channels { count, first, of };
                let part = |map: &[f32]| -> Vec<f32> {
                    let pixels = map.chunks(of);
                    pixels
                        .flat_map(|pixel| pixel[first..first + count].to_vec())
                        .collect()
                };
                let x = part(&whole);
                nonlinearity(f, channels, None, &x, &mut got);
                let mut dx = vec![f32::NAN; x.len()];
                nonlinearity_backward(f, channels, None, &x, &dy, &mut dx, false);
                assert_eq!(dx, part(&want_dx));
                first += count;
            }
            assert_eq!(got, want);
        }
    }

    #[test]
    fn the_last_elu_and_its_gradient() {
        let (x, dy) = (random(TASK + 9, 1), random(TASK + 9, 2));
        let mut y = vec![f32::NAN; x.len()];
        elu(&x, &mut y);
        assert_close(
            &y,
            &widen(&x).into_iter().map(plain_elu).collect::<Vec<_>>(),
        );
        let mut dx = vec![f32::NAN; x.len()];
        elu_backward(&x, &dy, &mut dx, false);
        let slopes = x.iter().map(|x| f64::from(*x).min(0.0).exp());
        let want: Vec<f64> = slopes
            .zip(&dy)
            .map(|(slope, dy)| slope * f64::from(*dy))
            .collect();
        assert_close(&dx, &want);
        elu(&[f32::NAN], &mut y[..1]);
        assert!(y[0].is_nan());
        let mut sum = dy.clone();
        elu_backward(&x, &dy, &mut sum, true);
        let want: Vec<f32> = dy.iter().zip(&dx).map(|(a, b)| a + b).collect();
        assert_eq!(sum, want);
    }

    #[test]
    #[should_panic(expected = "whole pixels")]
    fn a_part_of_a_pixel_is_refused() {
        nonlinearity(Nonlinearity::ConcatElu, 2, None, &[1.0; 5], &mut [0.0; 8]);
    }

    #[test]
    fn dropout_looks_random() {
        let n = 1 << 20;
        let mut masks = Vec::new();
        for seed in [0, 1, 2, 1 << 32, u64::MAX] {
            for rate in [0.1, 0.5] {
                let mut mask = vec![f32::NAN; n];
                Dropout {
                    rate,
                    seed,
                    first: 0,
                }
                .mask(&mut mask);
                let scale = 1.0 / (1.0 - rate);
                assert!(mask.iter().all(|m| *m == 0.0 || *m == scale));
                masks.push((rate, mask.iter().map(|m| *m > 0.0).collect::<Vec<_>>()));
            }
        }
        // The sample correlation of independent draws is within 5 / sqrt(n), all but surely.
        let limit = 5.0 / (n as f64).sqrt();
        let correlation = |(rate, a): &(f32, Vec<bool>), b: &[bool]| {
            let keep = 1.0 - f64::from(*rate);
            let both = a.iter().zip(b).filter(|(a, b)| **a && **b).count();
            let expected = keep * keep * a.len().min(b.len()) as f64;
            (both as f64 - expected) / (n as f64 * keep * (1.0 - keep))
        };
        for (i, mask) in masks.iter().enumerate() {
            let kept = mask.1.iter().filter(|kept| **kept).count() as f64 / n as f64;
            assert!(
                (kept + f64::from(mask.0) - 1.0).abs() < limit,
                "keeps {kept}"
            );
            for lag in [1, 2, 3, 8, 16, 32, 64, 160, 320, 1024, 65536] {
                let found = correlation(mask, &mask.1[lag..]);
                // The two rates' own sampling errors add to it.
                assert!(found.abs() < 4.0 * limit, "lag {lag}: {found}");
            }
            for other in masks[..i].iter().filter(|other| other.0 == mask.0) {
                let found = correlation(mask, &other.1);
                assert!(found.abs() < 4.0 * limit, "seeds: {found}");
            }
        }
    }

    #[test]
    fn dropout_goes_on_where_a_map_does() {
        let dropout = |first| Dropout {
            rate: 0.5,
            seed: 3,
            first,
        };
        let mut whole = vec![f32::NAN; 1000];
        dropout(0).mask(&mut whole);
        let mut rest = vec![f32::NAN; 700];
        dropout(300).mask(&mut rest);
        assert_eq!(whole[300..], rest);
    }

    #[test]
    fn gate_and_its_gradient() {
        for (seed, (images, pixels, channels)) in SHAPES.into_iter().enumerate() {
            let n = images * pixels * channels;
            let (x, c2) = (random(n, seed as u64), random(2 * n, 50 + seed as u64));
            let values = random(images * 2 * channels, 60);
            for bias in [None, Some(&values[..])] {
                let at = |i: usize| {
                    let (pixel, channel) = (i / channels, i % channels);
                    let image = pixel / pixels;
                    [channel, channels + channel].map(|half| {
                        let bias = bias.map_or(0.0, |bias| bias[image * 2 * channels + half]);
                        f64::from(c2[pixel * 2 * channels + half]) + f64::from(bias)
                    })
                };
                let plain = |ab: &[f64]| ab[0] / (1.0 + (-ab[1]).exp());
                let mut y = vec![f32::NAN; n];
                gate(channels, pixels, &x, &c2, bias, &mut y);
                let want: Vec<f64> = (0..n).map(|i| f64::from(x[i]) + plain(&at(i))).collect();
                assert_close(&y, &want);

                let dy = random(n, 70);
                let mut dc2 = c2.clone();
                gate_backward(channels, pixels, &dy, bias, &mut dc2);
                let mut want = vec![0.0; 2 * n];
                let mut want_bias = vec![0.0; images * 2 * channels];
                for (i, &dy) in dy.iter().enumerate() {
                    let (pixel, channel) = (i / channels, i % channels);
                    for half in 0..2 {
                        let d = difference(&mut at(i), half, plain) * f64::from(dy);
                        want[(2 * pixel + half) * channels + channel] = d;
                        want_bias[(2 * (pixel / pixels) + half) * channels + channel] += d;
                    }
                }
                assert_close(&dc2, &want);
                let mut sums = vec![f32::NAN; want_bias.len()];
                image_sums(2 * channels, pixels, &dc2, &mut sums);
                for (got, want) in sums.iter().zip(&want_bias) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error < 1e-6 * pixels as f64, "{got}, {want}");
                }
            }
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_the_threads() {
        let (channels, pixels) = (40, 1500);
        let (x, c2) = (
            random(channels * pixels, 1),
            random(2 * channels * pixels, 2),
        );
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let dropout = Some(Dropout {
                    rate: 0.5,
                    seed: 3,
                    first: 0,
                });
                let mut y = vec![0.0; 2 * x.len()];
                nonlinearity(Nonlinearity::ConcatElu, channels, dropout, &x, &mut y);
                let mut sums = vec![0.0; 3 * channels];
                image_sums(channels, 500, &x, &mut sums);
                let mut dc2 = c2.clone();
                gate_backward(channels, 500, &x, None, &mut dc2);
                (y, sums, dc2)
            })
        };
        assert_eq!(run(1), run(3));
    }
}
