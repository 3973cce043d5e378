//! All arithmetic of the incremental evaluator, once for every vector level and with the same bits
//! on each: every output is one chain of fused multiply-adds in a fixed order, a lane each, and
//! what happens between the sums is not fused at all.

use crate::config::Nonlinearity;
use crate::kernels::math::{exp_m1_negative, sigmoid};
use crate::kernels::simd::Level;
use crate::kernels::vector::Vector;

/// Output channels that lie side by side in a packed weight: whole vectors on every level.
pub const PANEL: usize = 16;

/// Continues the sums of `M` pixels and a few panels of output channels: for every tap `t` and
/// input channel `k`, in this order, it adds the product of the channel at
/// `pixels[t * pitch + m]` and the weight. `inputs` are the channels of each tap. The weights of a
/// panel are \[taps, inputs, [`PANEL`]\]; panels are `stride` apart. Pixel `m`'s sums start from the
/// values at `from[m] + column` and go to `to[m] + column`, [`PANEL`] for each panel.
pub(super) type Tile = unsafe fn(
    inputs: &[usize],
    pixels: *const *const f32,
    pitch: usize,
    weights: *const f32,
    stride: usize,
    from: *const *const f32,
    to: *const *mut f32,
    column: usize,
);

/// The code of one vector level.
#[allow(clippy::type_complexity)]
pub(super) struct TileKernels {
    /// Tiles by panels - 1 and pixels - 1.
    tiles: [&'static [Tile]; 5],
    /// See [`gate`].
    pub gate: unsafe fn(x: &[f32], a: &[f32], b: &[f32], y: &mut [f32]),
    /// See [`concat_elu`].
    pub concat_elu: unsafe fn(x: &[f32], plus: &mut [f32], minus: &mut [f32]),
    /// See [`elementwise`].
    pub elementwise: unsafe fn(f: Nonlinearity, x: &[f32], y: &mut [f32]),
    /// See [`differences`].
    pub differences: unsafe fn(x: [&[f32]; 4], y: [&mut [f32]; 4]),
    /// See [`combine`].
    pub combine: unsafe fn(products: [&[f32]; 4], left: &mut [f32], right: &mut [f32]),
}

impl TileKernels {
    /// The code of a level, which the machine must have when it is called.
    pub fn of(level: Level) -> &'static TileKernels {
        match level {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => &avx2::KERNELS,
            _ => &plain::KERNELS,
        }
    }

    /// Panels and pixels of the tiles for a matrix of so many `pixels`: few pixels leave registers
    /// for more panels, whose weights then stream in together.
    pub fn shape(&self, pixels: usize) -> [usize; 2] {
        let wanted = pixels.min(self.tiles[0].len());
        let fits = |tiles: &&[Tile]| tiles.len() >= wanted;
        let panels = self.tiles.iter().take_while(|tiles| fits(tiles)).count();
        [panels, self.tiles[panels - 1].len()]
    }

    /// The tile of so many panels and pixels, at most those of [`TileKernels::shape`].
    pub fn tile(&self, panels: usize, pixels: usize) -> Tile {
        self.tiles[panels - 1][pixels - 1]
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn tile<V: Vector, const M: usize, const N: usize>(
    inputs: &[usize],
    pixels: *const *const f32,
    pitch: usize,
    mut weights: *const f32,
    stride: usize,
    from: *const *const f32,
    to: *const *mut f32,
    column: usize,
) {
    // Where vector `n` lies in the first panel's row and which panel it belongs to.
    let offset = |n: usize| n * V::LANES / PANEL * stride + n * V::LANES % PANEL;
    // SAFETY: the caller has the level's instructions, and memory as `Tile` says.
    unsafe {
        let mut sums: [[V; N]; M] = std::array::from_fn(|m| {
            let from = (*from.add(m)).add(column);
            std::array::from_fn(|n| V::load(from.add(n * V::LANES)))
        });
        for (t, &inputs) in inputs.iter().enumerate() {
            let pixel: [*const f32; M] = std::array::from_fn(|m| *pixels.add(t * pitch + m));
            for k in 0..inputs {
                let w: [V; N] = std::array::from_fn(|n| V::load(weights.add(offset(n))));
                weights = weights.add(PANEL);
                for (sums, pixel) in sums.iter_mut().zip(pixel) {
                    let x = V::splat(*pixel.add(k));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = x.mul_add(w, *sum);
                    }
                }
            }
        }
        // By index: an iterator would take the sums over the stack.
        #[allow(clippy::needless_range_loop)]
        for m in 0..M {
            let to = (*to.add(m)).add(column);
            for n in 0..N {
                sums[m][n].store(to.add(n * V::LANES));
            }
        }
    }
}

/// The end of a gated resnet block: `y = x + a * sigmoid(b)`.
#[inline(always)]
fn gate(x: &[f32], a: &[f32], b: &[f32], y: &mut [f32]) {
    for (((y, x), a), b) in y.iter_mut().zip(x).zip(a).zip(b) {
        *y = x + a * sigmoid(*b);
    }
}

/// `plus` = elu(x), `minus` = elu(-x).
#[inline(always)]
fn concat_elu(x: &[f32], plus: &mut [f32], minus: &mut [f32]) {
    for ((&x, plus), minus) in x.iter().zip(plus).zip(minus) {
        // Of x and -x one stays itself, the other has its exponential taken.
        let (size, bent) = (x.abs(), exp_m1_negative(-x.abs()));
        let positive = x > 0.0;
        *plus = if positive { size } else { bent };
        *minus = if positive { bent } else { size };
    }
}

/// `y` = f(x) for a nonlinearity that keeps the number of channels.
#[inline(always)]
fn elementwise(f: Nonlinearity, x: &[f32], y: &mut [f32]) {
    let values = x.iter().zip(y);
    match f {
        Nonlinearity::Relu => values.for_each(|(&x, y)| *y = if 0.0 > x { 0.0 } else { x }),
        Nonlinearity::Elu | Nonlinearity::ConcatElu => values.for_each(|(&x, y)| {
            let bent = exp_m1_negative(-x.abs());
            *y = if x > 0.0 { x } else { bent };
        }),
    }
}

/// Winograd's transform of four neighbours, for two outputs of a kernel of three. All slices are as
/// long.
#[inline(always)]
unsafe fn differences<V: Vector>(x: [&[f32]; 4], y: [&mut [f32]; 4]) {
    let len = x[0].len();
    debug_assert!(x.iter().all(|x| x.len() == len) && y.iter().all(|y| y.len() == len));
    let (x, y) = (x.map(<[f32]>::as_ptr), y.map(<[f32]>::as_mut_ptr));
    let whole = len - len % V::LANES;
    // SAFETY: the caller has the level's instructions; all indices are below the slices' length.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            let [x0, x1, x2, x3] = x.map(|x| V::load(x.add(i)));
            x0.sub(x2).store(y[0].add(i));
            x1.add(x2).store(y[1].add(i));
            x2.sub(x1).store(y[2].add(i));
            x1.sub(x3).store(y[3].add(i));
        }
        for i in whole..len {
            let [x0, x1, x2, x3] = x.map(|x| *x.add(i));
            *y[0].add(i) = x0 - x2;
            *y[1].add(i) = x1 + x2;
            *y[2].add(i) = x2 - x1;
            *y[3].add(i) = x1 - x3;
        }
    }
}

/// The two outputs of the products with the transformed kernel. All slices are whole panels, as
/// many.
#[inline(always)]
unsafe fn combine<V: Vector>(products: [&[f32]; 4], left: &mut [f32], right: &mut [f32]) {
    let len = left.len();
    debug_assert!(len.is_multiple_of(PANEL) && right.len() == len);
    debug_assert!(products.iter().all(|products| products.len() == len));
    for i in (0..len).step_by(V::LANES) {
        // SAFETY: the caller has the level's instructions; all indices are below the slices'
        // length.
        unsafe {
            let [m0, m1, m2, m3] = products.map(|m| V::load(m.as_ptr().add(i)));
            m0.add(m1).add(m2).store(left.as_mut_ptr().add(i));
            m1.sub(m2).sub(m3).store(right.as_mut_ptr().add(i));
        }
    }
}

/// Compiles the code of a level with its target features. After each number of panels come the
/// numbers of pixels of its tiles.
macro_rules! kernels {
    ($vector:ty, [$($features:meta)?], $([$panels:literal: $($pixels:literal)*])*) => {
        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn tile<const M: usize, const N: usize>(
            inputs: &[usize],
            pixels: *const *const f32,
            pitch: usize,
            weights: *const f32,
            stride: usize,
            from: *const *const f32,
            to: *const *mut f32,
            column: usize,
        ) {
            // SAFETY: the same as the caller's.
            unsafe {
                super::tile::<$vector, M, N>(
                    inputs, pixels, pitch, weights, stride, from, to, column,
                )
            }
        }

        $(#[$features])?
        unsafe fn gate(x: &[f32], a: &[f32], b: &[f32], y: &mut [f32]) {
            super::gate(x, a, b, y);
        }

        $(#[$features])?
        unsafe fn concat_elu(x: &[f32], plus: &mut [f32], minus: &mut [f32]) {
            super::concat_elu(x, plus, minus);
        }

        $(#[$features])?
        unsafe fn elementwise(f: Nonlinearity, x: &[f32], y: &mut [f32]) {
            super::elementwise(f, x, y);
        }

        $(#[$features])?
        unsafe fn differences(x: [&[f32]; 4], y: [&mut [f32]; 4]) {
            // SAFETY: the same as the caller's.
            unsafe { super::differences::<$vector>(x, y) }
        }

        $(#[$features])?
        unsafe fn combine(products: [&[f32]; 4], left: &mut [f32], right: &mut [f32]) {
            // SAFETY: the same as the caller's.
            unsafe { super::combine::<$vector>(products, left, right) }
        }

        pub(super) static KERNELS: TileKernels = TileKernels {
            tiles: [$(&[$(tile::<$pixels, { $panels * PANEL / <$vector>::LANES }>),*]),*],
            gate,
            concat_elu,
            elementwise,
            differences,
            combine,
        };
    };
}

/// Up to 28 of the 32 registers hold sums.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Nonlinearity, PANEL, TileKernels, Vector};
    use std::arch::x86_64::__m512;

    kernels!(
        __m512,
        [target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")],
        [1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14]
        [2: 1 2 3 4 5 6 7 8 9 10 11 12 13 14]
        [3: 1 2 3 4 5 6 7 8 9]
        [4: 1 2 3 4 5 6]
        [5: 1 2 3 4 5]
    );
}

/// Up to 12 of the 16 registers hold sums.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Nonlinearity, PANEL, TileKernels, Vector};
    use std::arch::x86_64::__m256;

    kernels!(
        __m256,
        [target_feature(enable = "avx2,fma")],
        [1: 1 2 3 4 5 6]
        [2: 1 2 3]
        [3: 1 2]
        [4: 1]
        [5: 1]
    );
}

/// Four lanes: a register of NEON. Without an instruction for it, a fused multiply-add is a call:
/// slow, but the same bits.
mod plain {
    use super::{Nonlinearity, PANEL, TileKernels, Vector};
    use crate::kernels::vector::FourLanes;

    kernels!(
        FourLanes<true>,
        [],
        [1: 1 2 3 4 5 6]
        [2: 1 2 3]
        [3: 1 2]
        [4: 1]
        [5: 1]
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::simd::levels;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    fn random(n: usize, random: &mut ChaCha8Rng) -> Vec<f32> {
        (0..n)
            .map(|_| (random.next_u32() as i32) as f32 / 2f32.powi(30))
            .collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Every tile that a level has, against the chain of additions that `Tile` promises.
        #[test]
        fn tiles_sum_in_the_promised_order(
            inputs in prop::collection::vec(0usize..9, 1..4),
            panels in 1usize..=5,
            pixels in 1usize..=14,
            column in 0usize..3,
            seed in any::<u32>(),
        ) {
            let mut source = ChaCha8Rng::seed_from_u64(seed.into());
            let all: usize = inputs.iter().sum();
            let (stride, width) = (all * PANEL + 5, column + panels * PANEL);
            let x: Vec<Vec<f32>> = inputs
                .iter()
                .flat_map(|&k| (0..pixels).map(move |_| k))
                .map(|k| random(k, &mut source))
                .collect();
            let weights = random(panels * stride, &mut source);
            let from = random(pixels * width, &mut source);

            let mut want = from.clone();
            for m in 0..pixels {
                for c in 0..panels * PANEL {
                    let sum = &mut want[m * width + column + c];
                    let mut row = 0;
                    for (t, &k) in inputs.iter().enumerate() {
                        for x in &x[t * pixels + m][..k] {
                            let at = c / PANEL * stride + row * PANEL + c % PANEL;
                            *sum = x.mul_add(weights[at], *sum);
                            row += 1;
                        }
                    }
                }
            }

            for level in levels() {
                let tiles = TileKernels::of(level).tiles[panels - 1];
                let mut got = from.clone();
                for first in (0..pixels).step_by(tiles.len()) {
                    let count = tiles.len().min(pixels - first);
                    let rows = |m: usize| (first + m) * width;
                    let pointers: Vec<_> = x.iter().map(|x| x.as_ptr()).collect();
                    let starts: Vec<_> = (0..count).map(|m| from[rows(m)..].as_ptr()).collect();
                    let base = got.as_mut_ptr();
                    let ends: Vec<_> = (0..count).map(|m| base.wrapping_add(rows(m))).collect();
                    // SAFETY: the machine has the level, and all pointers have what `Tile` asks
                    // for.
                    unsafe {
                        tiles[count - 1](
                            &inputs,
                            pointers.as_ptr().add(first),
                            pixels,
                            weights.as_ptr(),
                            stride,
                            starts.as_ptr(),
                            ends.as_ptr(),
                            column,
                        );
                    }
                }
                prop_assert_eq!(bits(&got), bits(&want), "{:?}", level);
            }
        }

        #[test]
        fn what_is_between_the_sums_has_the_same_bits_on_every_level(
            n in 1usize..50,
            scale in prop_oneof![Just(0.1f32), Just(1.0), Just(60.0)],
            seed in any::<u32>(),
        ) {
            let mut source = ChaCha8Rng::seed_from_u64(seed.into());
            let [x, a, b] = [0, 1, 2].map(|_| -> Vec<f32> {
                random(n, &mut source).iter().map(|v| v * scale).collect()
            });
            let all = |kernels: &TileKernels| {
                let [mut y, mut plus, mut minus, mut elu, mut relu, mut left, mut right] =
                    [(); 7].map(|()| vec![f32::NAN; n]);
                let mut transformed = [(); 4].map(|()| vec![f32::NAN; n]);
                // SAFETY: `levels` gives those that the machine has.
                unsafe {
                    (kernels.gate)(&x, &a, &b, &mut y);
                    (kernels.concat_elu)(&x, &mut plus, &mut minus);
                    (kernels.elementwise)(Nonlinearity::Elu, &x, &mut elu);
                    (kernels.elementwise)(Nonlinearity::Relu, &x, &mut relu);
                    let [t0, t1, t2, t3] = &mut transformed;
                    (kernels.differences)([&x, &a, &b, &y], [t0, t1, t2, t3]);
                    // A kernel of three, transformed: 1, 2, 4.
                    for (values, factor) in transformed.iter_mut().zip([1.0, 3.5, 1.5, 4.0]) {
                        values.iter_mut().for_each(|value| *value *= factor);
                    }
                    let panels = n.next_multiple_of(PANEL);
                    transformed.iter_mut().for_each(|values| values.resize(panels, 0.0));
                    left.resize(panels, f32::NAN);
                    right.resize(panels, f32::NAN);
                    let products = transformed.each_ref().map(Vec::as_slice);
                    (kernels.combine)(products, &mut left, &mut right);
                }
                left.truncate(n);
                right.truncate(n);
                [y, plus, minus, elu, relu, left, right]
            };
            let plain = all(TileKernels::of(Level::Plain));
            let exact = |i: usize| {
                let [x, a, b] = [x[i], a[i], b[i]].map(f64::from);
                let elu = |x: f64| if x > 0.0 { x } else { x.exp_m1() };
                let y = x + a / (1.0 + (-b).exp());
                let [left, right] = [x + 2.0 * a + 4.0 * b, a + 2.0 * b + 4.0 * y];
                [y, elu(x), elu(-x), elu(x), x.max(0.0), left, right]
            };
            for i in 0..n {
                for (got, want) in plain.iter().zip(exact(i)) {
                    prop_assert!((f64::from(got[i]) - want).abs() <= 4e-6 * (1.0 + f64::from(scale)));
                }
            }
            for level in levels() {
                for (got, want) in all(TileKernels::of(level)).iter().zip(&plain) {
                    prop_assert_eq!(bits(got), bits(want), "{:?}", level);
                }
            }
        }
    }
}
