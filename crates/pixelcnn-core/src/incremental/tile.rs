//! All arithmetic of the incremental evaluator, once for every vector level and with the same bits
//! on each: every output is one chain of fused multiply-adds in a fixed order, a lane each, and
//! what happens between the sums is not fused at all.

use crate::config::Nonlinearity;
use crate::kernels::math::{exp_m1_negative, sigmoid};
use crate::kernels::simd::Level;
use crate::kernels::vector::Vector;

/// Output channels that lie side by side in a packed weight: whole vectors on every level.
pub(super) const PANEL: usize = 16;

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
pub(super) struct Kernels {
    /// Tiles by panels - 1 and pixels - 1.
    tiles: [&'static [Tile]; 5],
    /// See [`gate`].
    pub gate: unsafe fn(x: &[f32], a: &[f32], b: &[f32], y: &mut [f32]),
    /// See [`concat_elu`].
    pub concat_elu: unsafe fn(x: &[f32], plus: &mut [f32], minus: &mut [f32]),
    /// See [`elementwise`].
    pub elementwise: unsafe fn(f: Nonlinearity, x: &[f32], y: &mut [f32]),
    /// For kernels of two columns.
    pub pairing_2: Pairing<3>,
    /// For kernels of three columns.
    pub pairing_3: Pairing<4>,
}

/// Winograd's transforms for two neighbouring outputs of a kernel of `N` - 1 columns.
#[allow(clippy::type_complexity)]
pub(super) struct Pairing<const N: usize> {
    /// See [`differences`].
    pub differences: unsafe fn(x: [&[f32]; N], y: [&mut [f32]; N]),
    /// See [`combine`].
    pub combine: unsafe fn(products: [&[f32]; N], left: &mut [f32], right: &mut [f32]),
}

impl Kernels {
    /// The code of a level, which the machine must have when it is called.
    pub fn of(level: Level) -> &'static Kernels {
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

    /// The tile of so many panels and pixels, at most those of [`Kernels::shape`].
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

/// Winograd's transform of `N` neighbours, for two outputs of a kernel of `N` - 1. All slices are as
/// long.
#[inline(always)]
unsafe fn differences<V: Vector, const N: usize>(x: [&[f32]; N], mut y: [&mut [f32]; N]) {
    let len = x[0].len();
    debug_assert!(x.iter().all(|x| x.len() == len) && y.iter().all(|y| y.len() == len));
    let whole = len - len % V::LANES;
    // SAFETY: the caller has the level's instructions; all indices are below the slices' length, and
    // the rest fills no panel.
    unsafe {
        for i in (0..whole).step_by(V::LANES) {
            let values = transform(x.map(|x| V::load(x.as_ptr().add(i))));
            for (y, value) in y.iter_mut().zip(values) {
                value.store(y.as_mut_ptr().add(i));
            }
        }
        if whole < len {
            let mut rest = [[0.0; PANEL]; N];
            for (rest, x) in rest.iter_mut().zip(x) {
                rest[..len - whole].copy_from_slice(&x[whole..]);
            }
            let values = transform(rest.map(|rest| V::load(rest.as_ptr())));
            for ((rest, y), value) in rest.iter_mut().zip(y).zip(values) {
                value.store(rest.as_mut_ptr());
                y[whole..].copy_from_slice(&rest[..len - whole]);
            }
        }
    }
}

/// # Safety
/// The machine must have the vector's instructions.
#[inline(always)]
unsafe fn transform<V: Vector, const N: usize>(x: [V; N]) -> [V; N] {
    let mut y = x;
    // SAFETY: the same as the caller's.
    unsafe {
        match x[..] {
            [x0, x1, x2] => (y[0], y[2]) = (x0.sub(x1), x2.sub(x1)),
            [x0, x1, x2, x3] => {
                (y[0], y[1]) = (x0.sub(x2), x1.add(x2));
                (y[2], y[3]) = (x2.sub(x1), x1.sub(x3));
            }
            _ => unreachable!("kernels have two or three columns"),
        }
    }
    y
}

/// The two outputs of the products with the transformed kernel. All slices are whole panels, as
/// many.
#[inline(always)]
unsafe fn combine<V: Vector, const N: usize>(
    products: [&[f32]; N],
    left: &mut [f32],
    right: &mut [f32],
) {
    let len = left.len();
    debug_assert!(len.is_multiple_of(PANEL) && right.len() == len);
    debug_assert!(products.iter().all(|products| products.len() == len));
    for i in (0..len).step_by(V::LANES) {
        // SAFETY: the caller has the level's instructions; all indices are below the slices'
        // length.
        unsafe {
            let m = products.map(|m| V::load(m.as_ptr().add(i)));
            let (y0, y1) = match m[..] {
                [m0, m1, m2] => (m0.add(m1), m1.add(m2)),
                [m0, m1, m2, m3] => (m0.add(m1).add(m2), m1.sub(m2).sub(m3)),
                _ => unreachable!("kernels have two or three columns"),
            };
            y0.store(left.as_mut_ptr().add(i));
            y1.store(right.as_mut_ptr().add(i));
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
        unsafe fn differences<const N: usize>(x: [&[f32]; N], y: [&mut [f32]; N]) {
            // SAFETY: the same as the caller's.
            unsafe { super::differences::<$vector, N>(x, y) }
        }

        $(#[$features])?
        unsafe fn combine<const N: usize>(
            products: [&[f32]; N],
            left: &mut [f32],
            right: &mut [f32],
        ) {
            // SAFETY: the same as the caller's.
            unsafe { super::combine::<$vector, N>(products, left, right) }
        }

        pub(super) static KERNELS: Kernels = Kernels {
            tiles: [$(&[$(tile::<$pixels, { $panels * PANEL / <$vector>::LANES }>),*]),*],
            gate,
            concat_elu,
            elementwise,
            pairing_2: Pairing {
                differences,
                combine,
            },
            pairing_3: Pairing {
                differences,
                combine,
            },
        };
    };
}

/// Up to 28 of the 32 registers hold sums.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Kernels, Nonlinearity, PANEL, Pairing, Vector};
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
    use super::{Kernels, Nonlinearity, PANEL, Pairing, Vector};
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
    use super::{Kernels, Nonlinearity, PANEL, Pairing, Vector};
    use crate::kernels::vector::Lanes;

    kernels!(
        Lanes<true>,
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

    /// The two outputs of a transformed kernel of one channel.
    ///
    /// # Safety
    /// The machine must have the pairing's level.
    unsafe fn paired<const N: usize>(
        pairing: &Pairing<N>,
        x: [&[f32]; N],
        kernel: [f32; N],
    ) -> [Vec<f32>; 2] {
        let (n, panels) = (x[0].len(), x[0].len().next_multiple_of(PANEL));
        let mut transformed = [(); N].map(|()| vec![f32::NAN; n]);
        let [mut left, mut right] = [(); 2].map(|()| vec![f32::NAN; panels]);
        // SAFETY: the same as the caller's.
        unsafe {
            (pairing.differences)(x, transformed.each_mut().map(Vec::as_mut_slice));
            for (values, factor) in transformed.iter_mut().zip(kernel) {
                values.iter_mut().for_each(|value| *value *= factor);
                values.resize(panels, 0.0);
            }
            let products = transformed.each_ref().map(Vec::as_slice);
            (pairing.combine)(products, &mut left, &mut right);
        }
        [left, right].map(|sums| sums[..n].to_vec())
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
                let tiles = Kernels::of(level).tiles[panels - 1];
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
            let all = |kernels: &Kernels| {
                let [mut y, mut plus, mut minus, mut elu, mut relu] =
                    [(); 5].map(|()| vec![f32::NAN; n]);
                // SAFETY: `levels` gives those that the machine has.
                let [[left_2, right_2], [left_3, right_3]] = unsafe {
                    (kernels.gate)(&x, &a, &b, &mut y);
                    (kernels.concat_elu)(&x, &mut plus, &mut minus);
                    (kernels.elementwise)(Nonlinearity::Elu, &x, &mut elu);
                    (kernels.elementwise)(Nonlinearity::Relu, &x, &mut relu);
                    // Kernels of 1, 2 and of 1, 2, 4, transformed.
                    [
                        paired(&kernels.pairing_2, [&x, &a, &b], [1.0, 3.0, 2.0]),
                        paired(&kernels.pairing_3, [&x, &a, &b, &y], [1.0, 3.5, 1.5, 4.0]),
                    ]
                };
                [y, plus, minus, elu, relu, left_2, right_2, left_3, right_3]
            };
            let plain = all(Kernels::of(Level::Plain));
            let exact = |i: usize| {
                let [x, a, b] = [x[i], a[i], b[i]].map(f64::from);
                let elu = |x: f64| if x > 0.0 { x } else { x.exp_m1() };
                let y = x + a / (1.0 + (-b).exp());
                let [left_2, right_2] = [x + 2.0 * a, a + 2.0 * b];
                let [left_3, right_3] = [left_2 + 4.0 * b, right_2 + 4.0 * y];
                let relu = x.max(0.0);
                [y, elu(x), elu(-x), elu(x), relu, left_2, right_2, left_3, right_3]
            };
            for i in 0..n {
                for (got, want) in plain.iter().zip(exact(i)) {
                    prop_assert!((f64::from(got[i]) - want).abs() <= 4e-6 * (1.0 + f64::from(scale)));
                }
            }
            for level in levels() {
                for (got, want) in all(Kernels::of(level)).iter().zip(&plain) {
                    prop_assert_eq!(bits(got), bits(want), "{:?}", level);
                }
            }
        }
    }
}
