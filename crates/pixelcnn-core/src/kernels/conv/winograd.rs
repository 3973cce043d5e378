//! The stride-1 convolution by a 2x2 or 2x3 kernel with 15 or 18 multiplications for every 2x4
//! outputs instead of 32 or 48 (Winograd, 1980; Lavin & Gray, 2016, section 4).
//!
//! In each direction, `M` outputs of a kernel with `K` taps come from `M + K - 1` products:
//! `y = A^T ((G g) * (B^T d))` for inputs `d` and taps `g`, nested for two directions. Every point
//! of a tile is then a matrix product over the channels, which the register tiles of the direct
//! convolution compute. The gradient of the weights is the adjoint,
//! `dg = G^T ((B^T d) * (A dy))`.
//!
//! Down, two outputs of two taps:
//!
//! | `B^T d` | `G g` | `A^T m` |
//! |---|---|---|
//! | d0-d1, d1, d2-d1 | g0, g0+g1, g1 | m0+m1, m1+m2 |
//!
//! Across, four outputs (Toom & Cook): the polynomials' values at p, -p, q, -q and infinity, and with
//! three taps at 0 too. Where every product is computed for p and -p, an even and an odd part are
//! shared; p and q are those with which sums over many channels are rounded least, of fractions whose
//! powers are exact: their error is 1.2 (two taps) and 1.7 times (three) that of two outputs at a time.

use rayon::prelude::*;

use super::tile::{self, Tiles, load};
use super::{Conv, InputTiles, PIXELS, Panels, SharedMap, share, with_scratch};
use crate::engine::Precision;
use crate::kernels::simd::Level;
#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::has_bf16;
use crate::kernels::vector::{Operand, Single, Vector};

/// Rows of the kernels: the shift is down, by one.
const ROWS: usize = 2;
/// Rows and columns of a tile's outputs.
const TILE: [usize; 2] = [2, 4];
/// Outputs of a tile.
const OUTPUTS: usize = TILE[0] * TILE[1];
/// Points of a tile down, and across for the most taps.
const POINTS: [usize; 2] = [3, 6];
/// Points of a tile for the most taps.
const MOST: usize = POINTS[0] * POINTS[1];
/// Tiles of a task: so many that a weight that comes from afar is used often, so few that the pixels
/// of one point stay in the second-level cache.
const TASK: usize = 96;
/// Values that the transformed pixels of both maps may take when the weights' gradient is summed,
/// so that they stay in the last-level cache.
const CHUNK: usize = 1 << 20;

/// The transforms of one vector level and kernel width.
struct Transforms {
    /// `B^T d B` of the pixels that a tile reads.
    input: Spread,
    /// The same, as words of what the [`Tiles`] multiply.
    input_words: Spread,
    /// `G g G^T` of the taps.
    weight: Spread,
    /// `A dy A^T` of the pixels that a tile writes.
    output_gradient: Spread,
    /// `A^T m A`.
    output: Collect,
    /// `G^T du G`.
    weight_gradient: WeightGradient,
}

/// Transforms every channel of a tile's pixels or taps, row after row, to as many values as the
/// tile has points, `stride` apart at `out`: vectors of them, zeros beyond `channels`.
type Spread = unsafe fn(pixels: *const *const f32, channels: usize, out: *mut f32, stride: usize);

/// Transforms `columns` products for each point, `stride` apart, to the tile's outputs; adds
/// `bias` and writes at `first` after each of `outs`, where that is not null, or adds to what is
/// there. Products and bias are whole vectors.
type Collect = unsafe fn(
    products: *const f32,
    stride: usize,
    bias: *const f32,
    outs: &[*mut f32; OUTPUTS],
    first: usize,
    columns: usize,
    accumulate: bool,
);

/// Transforms `len` gradients for each point to those for each tap, `stride` apart both.
type WeightGradient = unsafe fn(points: *const f32, stride: usize, len: usize, taps: *mut f32);

/// `B^T d` down.
#[inline(always)]
unsafe fn input_down<V: Vector>([a, b, c]: [V; 3]) -> [V; 3] {
    // SAFETY: the caller has the level's instructions, as for all below.
    unsafe { [a.sub(b), b, c.sub(b)] }
}

/// `A^T m` down.
#[inline(always)]
unsafe fn output_down<V: Vector>([a, b, c]: [V; 3]) -> [V; 2] {
    // SAFETY: as for `input_down`.
    unsafe { [a.add(b), b.add(c)] }
}

/// `A dy` down, and `G g`, which is the same.
#[inline(always)]
unsafe fn outer_down<V: Vector>([a, b]: [V; 2]) -> [V; 3] {
    // SAFETY: as for `input_down`.
    unsafe { [a, a.add(b), b] }
}

/// The points p and q across for `K` taps, their powers, and what the polynomials are divided by.
struct Points {
    p: [f32; 4],
    q: [f32; 4],
    by_p: f32,
    by_q: f32,
    by_0: f32,
}

impl Points {
    const fn of(taps: usize) -> Points {
        let (p, q) = match taps {
            2 => (1.0 / 2.0, 5.0 / 4.0),
            _ => (11.0 / 16.0, 3.0 / 2.0),
        };
        let (p2, q2): (f64, f64) = (p * p, q * q);
        let [scale_p, scale_q] = match taps {
            2 => [2.0 * p, 2.0 * q],
            _ => [2.0 * p2, 2.0 * q2],
        };
        Points {
            p: [1.0, p as f32, p2 as f32, (p * p2) as f32],
            q: [1.0, q as f32, q2 as f32, (q * q2) as f32],
            by_p: (1.0 / (scale_p * (p2 - q2))) as f32,
            by_q: (1.0 / (scale_q * (q2 - p2))) as f32,
            by_0: (1.0 / (p2 * q2)) as f32,
        }
    }
}

/// The points across by taps - 2.
const ACROSS: [Points; 2] = [Points::of(2), Points::of(3)];

/// `B^T d` across for `K` taps: `K + 3` values of as many.
#[inline(always)]
unsafe fn input<V: Vector, const K: usize>(d: [V; POINTS[1]]) -> [V; POINTS[1]] {
    let Points { p, q, .. } = ACROSS[K - 2];
    // SAFETY: as for `input_down`.
    unsafe {
        let zero = V::splat(0.0);
        let both = |even: V, odd: V, factor: f32| {
            let odd = odd.mul_add(V::splat(factor), zero);
            [even.add(odd), even.sub(odd)]
        };
        let less = |a: V, b: V, factor: f32| b.mul_add(V::splat(-factor), a);
        // The values at 0 and at infinity: a - (p^2 + q^2) b + p^2 q^2 c.
        let end = |a: V, b: V, c: V| c.mul_add(V::splat(p[2] * q[2]), less(a, b, p[2] + q[2]));
        // With three taps all that is between the ends is one further.
        let at = |i: usize| d[i + K - 2];
        let (d0, d1, d2, d3) = (at(0), at(1), at(2), at(3));
        let [plus_p, minus_p] = both(less(d3, d1, q[2]), less(d2, d0, q[2]), p[1]);
        let [plus_q, minus_q] = both(less(d3, d1, p[2]), less(d2, d0, p[2]), q[1]);
        let last = end(d[K + 2], d[K], d[K - 2]);
        if K == 2 {
            [plus_p, minus_p, plus_q, minus_q, last, zero]
        } else {
            let first = end(d[4], d[2], d[0]);
            [first, plus_p, minus_p, plus_q, minus_q, last]
        }
    }
}

/// `A^T m` across, of `K + 3` values.
#[inline(always)]
unsafe fn output<V: Vector, const K: usize>(m: [V; POINTS[1]]) -> [V; TILE[1]] {
    let Points { p, q, .. } = ACROSS[K - 2];
    let [plus_p, minus_p, plus_q, minus_q, last] = [0, 1, 2, 3, 4].map(|i| m[i + K - 2]);
    // SAFETY: as for `input_down`.
    unsafe {
        let zero = V::splat(0.0);
        let (even_p, odd_p) = (plus_p.add(minus_p), plus_p.sub(minus_p));
        let (even_q, odd_q) = (plus_q.add(minus_q), plus_q.sub(minus_q));
        let sum = |a: V, b: V, power: usize, rest: V| {
            b.mul_add(V::splat(q[power]), a.mul_add(V::splat(p[power]), rest))
        };
        let even = even_p.add(even_q);
        [
            if K == 2 { even } else { even.add(m[0]) },
            sum(odd_p, odd_q, 1, zero),
            sum(even_p, even_q, 2, zero),
            sum(odd_p, odd_q, 3, last),
        ]
    }
}

/// `A dy` across: `K + 3` values.
#[inline(always)]
unsafe fn output_gradient<V: Vector, const K: usize>(y: [V; TILE[1]]) -> [V; POINTS[1]] {
    let Points { p, q, .. } = ACROSS[K - 2];
    let [a, b, c, d] = y;
    // SAFETY: as for `input_down`.
    unsafe {
        let zero = V::splat(0.0);
        let both = |x: [f32; 4]| {
            let even = c.mul_add(V::splat(x[2]), a);
            let odd = d.mul_add(V::splat(x[3]), b.mul_add(V::splat(x[1]), zero));
            [even.add(odd), even.sub(odd)]
        };
        let ([plus_p, minus_p], [plus_q, minus_q]) = (both(p), both(q));
        if K == 2 {
            [plus_p, minus_p, plus_q, minus_q, d, zero]
        } else {
            [a, plus_p, minus_p, plus_q, minus_q, d]
        }
    }
}

/// `G g` across: `K + 3` values of `K`.
#[inline(always)]
unsafe fn weight<V: Vector, const K: usize>([a, b, c]: [V; 3]) -> [V; POINTS[1]] {
    let points = &ACROSS[K - 2];
    // SAFETY: as for `input_down`.
    unsafe {
        let zero = V::splat(0.0);
        let both = |x: [f32; 4], by: f32| {
            let even = match K {
                2 => a,
                _ => c.mul_add(V::splat(x[2]), a),
            };
            let even = even.mul_add(V::splat(by), zero);
            let odd = b.mul_add(V::splat(by * x[1]), zero);
            // With two taps the values at -p and -q are divided by the negative.
            match K {
                2 => [even.add(odd), odd.sub(even)],
                _ => [even.add(odd), even.sub(odd)],
            }
        };
        let [plus_p, minus_p] = both(points.p, points.by_p);
        let [plus_q, minus_q] = both(points.q, points.by_q);
        if K == 2 {
            [plus_p, minus_p, plus_q, minus_q, b, zero]
        } else {
            let first = a.mul_add(V::splat(points.by_0), zero);
            [first, plus_p, minus_p, plus_q, minus_q, c]
        }
    }
}

/// `G^T u` across: `K` values of `K + 3`.
#[inline(always)]
unsafe fn weight_gradient<V: Vector, const K: usize>(u: [V; POINTS[1]]) -> [V; 3] {
    let points = &ACROSS[K - 2];
    let [plus_p, minus_p, plus_q, minus_q, last] = [0, 1, 2, 3, 4].map(|i| u[i + K - 2]);
    // SAFETY: as for `input_down`.
    unsafe {
        let zero = V::splat(0.0);
        let (sum_p, sum_q) = (plus_p.add(minus_p), plus_q.add(minus_q));
        let (difference_p, difference_q) = (plus_p.sub(minus_p), plus_q.sub(minus_q));
        let both = |a: V, b: V, power: usize, rest: V| {
            let by_p = V::splat(points.by_p * points.p[power]);
            let by_q = V::splat(points.by_q * points.q[power]);
            b.mul_add(by_q, a.mul_add(by_p, rest))
        };
        if K == 2 {
            let second = both(sum_p, sum_q, 1, last);
            [both(difference_p, difference_q, 0, zero), second, zero]
        } else {
            let first = u[0].mul_add(V::splat(points.by_0), zero);
            [
                both(sum_p, sum_q, 0, first),
                both(difference_p, difference_q, 1, zero),
                both(sum_p, sum_q, 2, last),
            ]
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Columns of one map, places in rows of another.
unsafe fn spread_input<V: Vector, O: Operand<V>, const K: usize>(
    pixels: *const *const f32,
    channels: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller has the level's instructions and memory as `Spread` says.
    unsafe {
        for c in (0..channels).step_by(V::LANES) {
            let mut points = [[V::splat(0.0); POINTS[1]]; POINTS[0]];
            for j in 0..K + 3 {
                let at = |i: usize| load(*pixels.add(i * (K + 3) + j), c, channels);
                let column = input_down::<V>([at(0), at(1), at(2)]);
                for (point, value) in points.iter_mut().zip(column) {
                    point[j] = value;
                }
            }
            for (i, point) in points.into_iter().enumerate() {
                for (j, value) in input::<V, K>(point).into_iter().take(K + 3).enumerate() {
                    let out = out.add((i * (K + 3) + j) * stride + c / O::NUMBERS);
                    O::store(value, out);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn spread_output_gradient<V: Vector, const K: usize>(
    pixels: *const *const f32,
    channels: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller has the level's instructions and memory as `Spread` says.
    unsafe {
        for c in (0..channels).step_by(V::LANES) {
            let mut rows = [[V::splat(0.0); TILE[1]]; POINTS[0]];
            for j in 0..TILE[1] {
                let at = |i: usize| load(*pixels.add(i * TILE[1] + j), c, channels);
                for (row, value) in rows.iter_mut().zip(outer_down::<V>([at(0), at(1)])) {
                    row[j] = value;
                }
            }
            for (i, row) in rows.into_iter().enumerate() {
                let row = output_gradient::<V, K>(row);
                for (j, value) in row.into_iter().take(K + 3).enumerate() {
                    value.store(out.add((i * (K + 3) + j) * stride + c));
                }
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Columns of one map, places in rows of another.
unsafe fn collect_output<V: Vector, const K: usize>(
    products: *const f32,
    stride: usize,
    bias: *const f32,
    outs: &[*mut f32; OUTPUTS],
    first: usize,
    columns: usize,
    accumulate: bool,
) {
    // SAFETY: the caller has the level's instructions and memory as `Collect` says.
    unsafe {
        for c in (0..columns).step_by(V::LANES) {
            let mut rows = [[V::splat(0.0); POINTS[1]]; TILE[0]];
            for j in 0..K + 3 {
                let at = |i: usize| V::load(products.add((i * (K + 3) + j) * stride + c));
                let [upper, lower] = output_down::<V>([at(0), at(1), at(2)]);
                (rows[0][j], rows[1][j]) = (upper, lower);
            }
            let bias = V::load(bias.add(c));
            for (row, outs) in rows.into_iter().zip(outs.chunks_exact(TILE[1])) {
                for (value, out) in output::<V, K>(row).into_iter().zip(outs) {
                    if !out.is_null() {
                        let value = [value.add(bias)];
                        tile::write(value, out.add(first + c), columns - c, accumulate);
                    }
                }
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Columns of one map, places in rows of another.
unsafe fn spread_weight<V: Vector, const K: usize>(
    taps: *const *const f32,
    columns: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller has the level's instructions and memory as `Spread` says.
    unsafe {
        let zero = V::splat(0.0);
        for c in (0..columns).step_by(V::LANES) {
            let mut rows = [[zero; POINTS[1]]; ROWS];
            for (i, row) in rows.iter_mut().enumerate() {
                let mut g = [zero; 3];
                for (j, value) in g.iter_mut().take(K).enumerate() {
                    *value = load(*taps.add(i * K + j), c, columns);
                }
                *row = weight::<V, K>(g);
            }
            for j in 0..K + 3 {
                let column = outer_down::<V>([rows[0][j], rows[1][j]]);
                for (i, value) in column.into_iter().enumerate() {
                    value.store(out.add((i * (K + 3) + j) * stride + c));
                }
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // Columns of one map, places in rows of another.
unsafe fn collect_weight_gradient<V: Vector, const K: usize>(
    points: *const f32,
    stride: usize,
    len: usize,
    taps: *mut f32,
) {
    // SAFETY: the caller has the level's instructions and memory as `WeightGradient` says.
    unsafe {
        let zero = V::splat(0.0);
        for c in (0..len).step_by(V::LANES) {
            let mut rows = [[zero; POINTS[1]]; ROWS];
            for j in 0..K + 3 {
                let at = |i: usize| load(points.add((i * (K + 3) + j) * stride), c, len);
                // `G^T` down is `A^T`.
                let [upper, lower] = output_down::<V>([at(0), at(1), at(2)]);
                (rows[0][j], rows[1][j]) = (upper, lower);
            }
            for (i, row) in rows.into_iter().enumerate() {
                for (j, value) in weight_gradient::<V, K>(row).into_iter().take(K).enumerate() {
                    let out = taps.add((i * K + j) * stride + c);
                    tile::write([value], out, len - c, false);
                }
            }
        }
    }
}

/// Compiles the transforms for a vector with its target features.
macro_rules! transforms {
    ($vector:ty, $operand:ty, [$($features:meta)?]) => {
        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn input<O: Operand<$vector>, const K: usize>(from: *const *const f32, channels: usize, out: *mut f32, stride: usize) {
            // SAFETY: the same as the caller's.
            unsafe { super::spread_input::<$vector, O, K>(from, channels, out, stride) }
        }

        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn weight<const K: usize>(from: *const *const f32, channels: usize, out: *mut f32, stride: usize) {
            // SAFETY: the same as the caller's.
            unsafe { super::spread_weight::<$vector, K>(from, channels, out, stride) }
        }

        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn output_gradient<const K: usize>(from: *const *const f32, channels: usize, out: *mut f32, stride: usize) {
            // SAFETY: the same as the caller's.
            unsafe { super::spread_output_gradient::<$vector, K>(from, channels, out, stride) }
        }

        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn output<const K: usize>(products: *const f32, stride: usize, bias: *const f32, outs: &[*mut f32; super::OUTPUTS], first: usize, columns: usize, accumulate: bool) {
            // SAFETY: the same as the caller's.
            unsafe { super::collect_output::<$vector, K>(products, stride, bias, outs, first, columns, accumulate) }
        }

        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn weight_gradient<const K: usize>(points: *const f32, stride: usize, len: usize, taps: *mut f32) {
            // SAFETY: the same as the caller's.
            unsafe { super::collect_weight_gradient::<$vector, K>(points, stride, len, taps) }
        }

        const fn transforms<const K: usize>() -> Transforms {
            Transforms {
                input: input::<Single, K>,
                input_words: input::<$operand, K>,
                weight: weight::<K>,
                output_gradient: output_gradient::<K>,
                output: output::<K>,
                weight_gradient: weight_gradient::<K>,
            }
        }

        /// By columns of the kernel - 2.
        pub(super) static TRANSFORMS: [Transforms; 2] = [transforms::<2>(), transforms::<3>()];
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Operand, Single, Transforms};
    use std::arch::x86_64::__m512;

    transforms!(
        __m512,
        Single,
        [target_feature(
            enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"
        )]
    );
}

#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use super::{Operand, Single, Transforms};
    use crate::kernels::vector::Bf16;
    use std::arch::x86_64::__m512;

    transforms!(
        __m512,
        Bf16,
        [target_feature(
            enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"
        )]
    );
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Operand, Single, Transforms};
    use std::arch::x86_64::__m256;

    transforms!(__m256, Single, [target_feature(enable = "avx2,fma")]);
}

mod plain {
    use super::{Operand, Single, Transforms};
    use crate::kernels::vector::FourLanes;

    transforms!(FourLanes<false>, Single, []);
}

mod plain_bf16 {
    use super::{Operand, Single, Transforms};
    use crate::kernels::vector::{Bf16, FourLanes};

    transforms!(FourLanes<false>, Bf16, []);
}

impl Transforms {
    /// The transforms to go with [`Tiles::of`].
    fn of(level: Level, precision: Precision, taps: usize) -> &'static Transforms {
        let transforms = match (precision, level) {
            #[cfg(target_arch = "x86_64")]
            (Precision::Bf16, Level::Avx512) if has_bf16() => &avx512_bf16::TRANSFORMS,
            (Precision::Bf16, _) => &plain_bf16::TRANSFORMS,
            #[cfg(target_arch = "x86_64")]
            (_, Level::Avx512) => &avx512::TRANSFORMS,
            #[cfg(target_arch = "x86_64")]
            (_, Level::Avx2) => &avx2::TRANSFORMS,
            _ => &plain::TRANSFORMS,
        };
        &transforms[taps - 2]
    }
}

/// A convolution that this method has transforms for, forward or, with the taps and channels the
/// other way round, for the input's gradient. The slices' lengths are checked before.
pub(super) struct Winograd {
    /// Images, rows and columns of the map written.
    size: [usize; 3],
    /// Rows that the map read has more than that, above.
    above: usize,
    /// Columns of the kernel: 2 or 3.
    taps: usize,
    /// Rows and columns by which the kernel reaches up and left.
    offset: [usize; 2],
    inputs: usize,
    outputs: usize,
    /// The weight is that of the forward pass: \[taps, outputs, inputs\], taps in reverse.
    flipped: bool,
    precision: Precision,
}

impl Winograd {
    /// The method for a convolution, where it has transforms for it and the channels are so many
    /// that they cost little.
    pub(super) fn forward(conv: &Conv, size: [usize; 3]) -> Option<Winograd> {
        let [rows, taps] = conv.window.kernel;
        let suits = rows == ROWS
            && (taps == 2 || taps == 3)
            && conv.window.stride == 1
            && !conv.transposed
            && conv.inputs >= 16
            && conv.outputs >= 8;
        suits.then_some(Winograd {
            size,
            above: 0,
            taps,
            offset: conv.window.offset,
            inputs: conv.inputs,
            outputs: conv.outputs,
            flipped: false,
            precision: conv.precision,
        })
    }

    /// The same where the map read has so many rows above.
    pub(super) fn below(self, above: usize) -> Winograd {
        Winograd { above, ..self }
    }

    /// The method for the gradient of a convolution's input.
    pub(super) fn backward_input(conv: &Conv, size: [usize; 3]) -> Option<Winograd> {
        let forward = Winograd::forward(conv, size)?;
        let [up, left] = forward.offset;
        Some(Winograd {
            offset: [ROWS - 1 - up, forward.taps - 1 - left],
            inputs: forward.outputs,
            outputs: forward.inputs,
            flipped: true,
            ..forward
        })
    }

    /// Points of a tile.
    fn points(&self) -> usize {
        POINTS[0] * self.across()
    }

    /// Points of a tile's row, and the pixels that it reads in one.
    fn across(&self) -> usize {
        self.taps + TILE[1] - 1
    }

    /// Rows and columns of tiles in an image.
    fn grid(&self) -> [usize; 2] {
        [
            self.size[1].div_ceil(TILE[0]),
            self.size[2].div_ceil(TILE[1]),
        ]
    }

    fn tiles(&self) -> usize {
        let [rows, columns] = self.grid();
        self.size[0] * rows * columns
    }

    /// Image, top row and left column of a tile's outputs.
    fn place(&self, tile: usize) -> [usize; 3] {
        let [rows, columns] = self.grid();
        [
            tile / columns / rows,
            tile / columns % rows * TILE[0],
            tile % columns * TILE[1],
        ]
    }

    /// The pixel of an image of `h` rows, `None` outside of it or beyond the last image.
    fn pixel(&self, h: usize, [image, y, x]: [usize; 3]) -> Option<usize> {
        let [n, _, w] = self.size;
        (image < n && y < h && x < w).then(|| (image * h + y) * w + x)
    }

    /// Where the pixels that a tile reads are in `x`, row after row; `zeros` for those outside.
    fn read(&self, tile: usize, x: &[f32], zeros: &[f32]) -> [*const f32; MOST] {
        let [_, h, w] = self.size;
        let h = h + self.above;
        let [image, top, left] = self.place(tile);
        let [up, to_left] = self.offset;
        // What lies above or to the left wraps round to outside.
        let (top, left) = (top.wrapping_sub(up), left.wrapping_sub(to_left));
        let mut pixels = [zeros.as_ptr(); MOST];
        let across = self.across();
        let mut rows = pixels.chunks_exact_mut(across).take(POINTS[0]);
        let inside = |first: usize, read: usize, of: usize| first < of && read <= of - first;
        if inside(top, POINTS[0], h) && inside(left, across, w) && image < self.size[0] {
            let tile = &x[((image * h + top) * w + left) * self.inputs..];
            let last = ((POINTS[0] - 1) * w + across - 1) * self.inputs;
            assert!(tile.len() >= last + self.inputs, "a tile inside the map");
            for (i, row) in rows.by_ref().enumerate() {
                for (j, pixel) in row.iter_mut().enumerate() {
                    *pixel = tile.as_ptr().wrapping_add((i * w + j) * self.inputs);
                }
            }
            return pixels;
        }
        for (i, row) in rows.enumerate() {
            for (j, to) in row.iter_mut().enumerate() {
                let place = [image, top.wrapping_add(i), left.wrapping_add(j)];
                if let Some(pixel) = self.pixel(h, place) {
                    *to = x[pixel * self.inputs..][..self.inputs].as_ptr();
                }
            }
        }
        pixels
    }

    /// The pixels that a tile writes, row after row.
    fn written(&self, tile: usize) -> [Option<usize>; OUTPUTS] {
        let [image, top, left] = self.place(tile);
        let mut pixels = [None; OUTPUTS];
        for (number, pixel) in pixels.iter_mut().enumerate() {
            let (i, j) = (number / TILE[1], number % TILE[1]);
            *pixel = self.pixel(self.size[1], [image, top + i, left + j]);
        }
        pixels
    }

    /// `out` = the convolution of `x`, or `out` += it.
    pub(super) fn run(
        &self,
        level: Level,
        x: &[f32],
        weight: &[f32],
        bias: &[f32],
        accumulate: bool,
        out: &mut [f32],
    ) {
        let (inputs, outputs, points) = (self.inputs, self.outputs, self.points());
        let tiles = Tiles::of(level, self.precision);
        let panels = Panels::new(tiles, outputs);
        let padded_bias = panels.padded(bias);
        let zeros = vec![0.0; inputs];
        let transforms = Transforms::of(level, self.precision, self.taps);

        // As many tasks as take `TASK` tiles, and as many for every thread, if each has a register tile.
        let lanes = tiles.words(inputs.next_multiple_of(tiles.lanes));
        let words = tiles.words(inputs);
        let parts = self.tiles().div_ceil(TASK);
        let parts = parts.next_multiple_of(rayon::current_num_threads());
        let parts = parts.min(self.tiles().div_ceil(tiles.rows()));
        let out = SharedMap(out.as_mut_ptr());
        let task = |packed: &[f32], part: usize| {
            let range = share(self.tiles(), part, parts);
            let (first, count) = (range.start, range.len());
            let spread = points * count * lanes;
            with_scratch(spread + points * count * panels.lanes(), |scratch| {
                let (spread, products) = scratch.split_at_mut(spread);
                let mut ahead = self.read(first, x, &zeros);
                for tile in range.clone() {
                    let pixels = std::mem::replace(&mut ahead, self.read(tile + 1, x, &zeros));
                    // What no tile before has read.
                    for row in ahead[..points].chunks_exact(self.across()).skip(1) {
                        for pixel in &row[self.taps - 1..] {
                            tile::prefetch_all::<1>(*pixel, inputs);
                        }
                    }
                    let to = &mut spread[(tile - first) * lanes..];
                    // SAFETY: the machine has the level. Each pointer is to `inputs` values, and
                    // the last point's words end with the `count` tiles of `lanes` words.
                    unsafe {
                        (transforms.input_words)(
                            pixels.as_ptr(),
                            inputs,
                            to.as_mut_ptr(),
                            count * lanes,
                        )
                    };
                }
                let written: Vec<[*mut f32; OUTPUTS]> = range
                    .map(|tile| {
                        self.written(tile).map(|pixel| {
                            pixel.map_or(std::ptr::null_mut(), |pixel| out.at(pixel * outputs))
                        })
                    })
                    .collect();
                let row_tiles = count.div_ceil(tiles.rows());
                for point in 0..points {
                    for panel in 0..panels.count() {
                        let (_, vectors) = panels.get(panel);
                        let width = vectors * tiles.lanes;
                        let first = point * panels.lanes() + panel * panels.width;
                        let products = &mut products[first * count..];
                        let weights = &packed[first * words..];
                        // What follows is the next panel, of this point or the next one.
                        let next = weights[words * width..].as_ptr();
                        for number in 0..row_tiles {
                            let tile = share(count, number, row_tiles);
                            let row = point * count + tile.start;
                            let ahead = share(words * width, number, row_tiles);
                            tile::prefetch_all::<2>(next.wrapping_add(ahead.start), ahead.len());
                            // SAFETY: the machine has the level. From `row` on there are as many
                            // rows as the tile has, of `lanes` words each and of `width`
                            // products; `weights` has `width` words for every word of a row.
                            unsafe {
                                tiles.product[vectors - 1][tile.len() - 1](
                                    spread[row * lanes..].as_ptr(),
                                    lanes,
                                    words,
                                    weights.as_ptr(),
                                    products[tile.start * width..].as_mut_ptr(),
                                );
                            }
                        }
                    }
                }
                for (tile, outs) in written.iter().enumerate() {
                    for panel in 0..panels.count() {
                        let (columns, vectors) = panels.get(panel);
                        let width = vectors * tiles.lanes;
                        let first = panel * panels.width;
                        // SAFETY: the machine has the level. Each point has the `width` products
                        // of `count` tiles; `columns` lie inside a pixel, which no other task
                        // writes.
                        unsafe {
                            (transforms.output)(
                                products[first * count + tile * width..].as_ptr(),
                                count * panels.lanes(),
                                padded_bias[first..].as_ptr(),
                                outs,
                                columns.start,
                                columns.len(),
                                accumulate,
                            );
                        }
                    }
                }
            });
        };
        with_scratch(points * words * panels.lanes(), |packed| {
            self.pack(transforms, tiles, &panels, weight, packed);
            let packed = &*packed;
            (0..parts)
                .into_par_iter()
                .for_each(|part| task(packed, part));
        });
    }

    /// Packs the transformed weight as words: \[point, panel, input, column\], zeros beyond the last
    /// column.
    fn pack(
        &self,
        transforms: &Transforms,
        tiles: &Tiles,
        panels: &Panels,
        weight: &[f32],
        packed: &mut [f32],
    ) {
        /// Inputs that are transposed together.
        const INPUTS: usize = 16;
        let (inputs, outputs) = (self.inputs, self.outputs);
        let taps = ROWS * self.taps;
        let words = tiles.words(inputs);
        let stride = words * panels.lanes();
        assert_eq!(packed.len(), self.points() * stride, "packed weights");
        let packed = SharedMap(packed.as_mut_ptr());
        let blocks = inputs.div_ceil(INPUTS);
        (0..panels.count() * blocks)
            .into_par_iter()
            .for_each(|task| {
                let (columns, vectors) = panels.get(task / blocks);
                let width = vectors * tiles.lanes;
                let first = task % blocks * INPUTS;
                let block = first..inputs.min(first + INPUTS);
                // In the forward pass's order: [tap, input, column].
                let mut turned = Vec::new();
                if self.flipped {
                    turned.resize(taps * INPUTS * width, 0.0);
                    for (tap, turned) in turned.chunks_exact_mut(INPUTS * width).enumerate() {
                        let weight = &weight[(taps - 1 - tap) * inputs * outputs..];
                        for (lane, column) in columns.clone().enumerate() {
                            let row = &weight[column * inputs..][block.clone()];
                            for (to, from) in turned[lane..].iter_mut().step_by(width).zip(row) {
                                *to = *from;
                            }
                        }
                    }
                }
                let place = |word: usize| packed.at(words * columns.start + word * width);
                // Where two inputs make a word, before they do: \[point, input, column\].
                let mut exact = match tiles.numbers {
                    1 => Vec::new(),
                    _ => vec![0.0; self.points() * INPUTS * width],
                };
                for input in block.clone() {
                    let mut at = [std::ptr::null(); ROWS * 3];
                    for (tap, at) in at.iter_mut().take(taps).enumerate() {
                        *at = if self.flipped {
                            turned[(tap * INPUTS + input - first) * width..].as_ptr()
                        } else {
                            weight[(tap * inputs + input) * outputs + columns.start..].as_ptr()
                        };
                    }
                    let (to, stride) = match tiles.numbers {
                        1 => (place(input), stride),
                        _ => (
                            exact[(input - first) * width..].as_mut_ptr(),
                            INPUTS * width,
                        ),
                    };
                    // SAFETY: the machine has the level. Every tap has `columns` values. For every
                    // point the panel has `vectors` vectors for each input, which no other task writes.
                    unsafe { (transforms.weight)(at.as_ptr(), columns.len(), to, stride) };
                }
                for (point, exact) in exact.chunks_exact(INPUTS * width).enumerate() {
                    let rows = &exact[..block.len() * width];
                    let to = place(first / 2).wrapping_add(point * stride);
                    // SAFETY: the machine has the level. The panel has words for the block's inputs,
                    // which no other task writes.
                    unsafe { tiles.join_rows(rows, width, to) };
                }
            });
    }

    /// `dweight` = the gradient for the weight of a forward pass.
    pub(super) fn backward_weight(&self, level: Level, x: &[f32], dy: &[f32], dweight: &mut [f32]) {
        let (inputs, outputs, points) = (self.inputs, self.outputs, self.points());
        if x.is_empty() {
            dweight.fill(0.0);
            return;
        }
        let tiles = Tiles::of(level, self.precision);
        let panels = Panels::new(tiles, outputs);
        let transforms = Transforms::of(level, self.precision, self.taps);
        let zeros = vec![0.0; inputs.max(outputs)];

        // Tiles are taken in chunks: all their pixels are transformed, then summed up to the
        // gradient for the points. The chunks, and so the order of the sum, depend on the shapes
        // alone.
        let lanes = inputs.next_multiple_of(tiles.lanes);
        let chunk = CHUNK / (points * (lanes + panels.lanes()));
        let chunk = (chunk / PIXELS).max(1) * PIXELS;
        let chunk = chunk.min(self.tiles());
        let rows = InputTiles::new(inputs, tiles);
        let threads = rayon::current_num_threads();
        let parts = (4 * threads).div_ceil(points).min(rows.count);
        let sizes = [inputs * outputs, chunk * lanes, chunk * panels.lanes()].map(|n| n * points);
        with_scratch(sizes.iter().sum(), |scratch| {
            let (d_points, scratch) = scratch.split_at_mut(sizes[0]);
            let (spread_x, spread_dy) = scratch.split_at_mut(sizes[1]);
            for start in (0..self.tiles()).step_by(chunk) {
                let count = chunk.min(self.tiles() - start);
                let (to_x, to_dy) = (
                    SharedMap(spread_x.as_mut_ptr()),
                    SharedMap(spread_dy.as_mut_ptr()),
                );
                let groups = count.div_ceil(PIXELS / 8);
                (0..groups).into_par_iter().for_each(|group| {
                    for i in share(count, group, groups) {
                        let tile = start + i;
                        let read = self.read(tile, x, &zeros);
                        let written = self.written(tile).map(|pixel| match pixel {
                            Some(pixel) => dy[pixel * outputs..][..outputs].as_ptr(),
                            None => zeros.as_ptr(),
                        });
                        // SAFETY: the machine has the level. Each pointer is to all channels of
                        // a pixel. Vectors of this tile alone are written: \[point, tile\] of
                        // `lanes` values, and \[point, panel, tile\] of the panel's vectors.
                        unsafe {
                            let to = to_x.at(i * lanes);
                            (transforms.input)(read.as_ptr(), inputs, to, count * lanes);
                            for panel in 0..panels.count() {
                                let (columns, vectors) = panels.get(panel);
                                let from = written.map(|pixel| pixel.wrapping_add(columns.start));
                                let first = count * panel * panels.width;
                                let to = to_dy.at(first + i * vectors * tiles.lanes);
                                let stride = count * panels.lanes();
                                let transform = transforms.output_gradient;
                                transform(from.as_ptr(), columns.len(), to, stride);
                            }
                        }
                    }
                });

                let (spread_x, spread_dy) = (&*spread_x, &*spread_dy);
                let d_points = SharedMap(d_points.as_mut_ptr());
                (0..points * parts).into_par_iter().for_each(|task| {
                    let (point, part) = (task / parts, task % parts);
                    let xs = spread_x[point * count * lanes..].chunks_exact(lanes);
                    let xs: Vec<*const f32> = xs.take(count).map(<[_]>::as_ptr).collect();
                    let dy = &spread_dy[point * count * panels.lanes()..];
                    let own = rows.part(part, parts);
                    // Where two tiles make a word: a panel of them.
                    let mut joined = match tiles.numbers {
                        1 => Vec::new(),
                        _ => vec![0.0; tiles.words(PIXELS) * panels.width],
                    };
                    for (block, xs) in xs.chunks(PIXELS).enumerate() {
                        let panel = |panel| {
                            let (_, vectors) = panels.get(panel);
                            let width = vectors * tiles.lanes;
                            let first = count * panel * panels.width + block * PIXELS * width;
                            if tiles.numbers == 1 {
                                return dy[first..].as_ptr();
                            }
                            let rows = &dy[first..][..xs.len() * width];
                            // SAFETY: the machine has the level, and there is room for a block's words.
                            unsafe { tiles.join_rows(rows, width, joined.as_mut_ptr()) };
                            joined.as_ptr()
                        };
                        // SAFETY: the machine has the level. `xs` point to `inputs` channels
                        // each, and the panels have a row for each of them, or for two. This
                        // task alone has its rows of this point's gradient.
                        unsafe {
                            let first = d_points.at(point * inputs * outputs);
                            let accumulate = start > 0 || block > 0;
                            own.add_outer_products(xs, &panels, panel, first, accumulate);
                        }
                    }
                });
            }

            let size = inputs * outputs;
            let dweight = SharedMap(dweight.as_mut_ptr());
            let parts = size.div_ceil(1 << 12);
            (0..parts).into_par_iter().for_each(|part| {
                let range = share(size, part, parts);
                // SAFETY: the machine has the level. The range lies inside the gradient for each
                // point and each tap, and is of this task alone.
                unsafe {
                    (transforms.weight_gradient)(
                        d_points[range.start..].as_ptr(),
                        size,
                        range.len(),
                        dweight.at(range.start),
                    );
                }
            });
        });
    }
}
