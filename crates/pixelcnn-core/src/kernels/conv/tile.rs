//! The register tiles that all the arithmetic of a convolution goes through, once for every vector
//! level: a few rows times one or two vectors of columns, kept in registers while they sum.
//!
//! What they multiply are words, each in the place of a value: a value itself, or two rounded to
//! bfloat16, whose products are summed at once. Two that follow one another among what is summed over
//! share a word: two inputs of a pixel and the weights of the two, or a channel of two pixels.

use crate::engine::Precision;
use crate::kernels::simd::Level;
#[cfg(target_arch = "x86_64")]
use crate::kernels::simd::has_bf16;
use crate::kernels::vector::{Operand, Vector};

/// Sums, for every row `m` of the tile, `inputs` words of channels of every tap `t`: the row's are
/// at `rows[t * M + m]`, their weights at `panel + taps[t] * inputs * width`, where `width` is the
/// tile's number of columns, lanes beyond `columns` included. Adds `bias` and writes `columns`
/// values at `first` after each of `outs`, or adds them to what is there.
pub(super) type GatherTile = unsafe fn(
    taps: &[usize],
    rows: *const *const f32,
    inputs: usize,
    panel: *const f32,
    bias: *const f32,
    outs: *const *mut f32,
    first: usize,
    columns: usize,
    accumulate: bool,
);

/// The product of `M` rows of `inputs` words at `x`, `stride` apart, with a panel of `inputs` rows
/// of the tile's `width` words. Writes `M` rows of `width` values at `out`.
pub(super) type ProductTile =
    unsafe fn(x: *const f32, stride: usize, inputs: usize, panel: *const f32, out: *mut f32);

/// Copies words of `M` channels at `first` after each of the `pixels` to `out`, one pixel, or two in the
/// same words, after the other.
pub(super) type PackTile = unsafe fn(pixels: &[*const f32], first: usize, out: *mut f32);

/// Writes words of `len` channels of a pixel, or of two, at `out`.
pub(super) type JoinRows =
    unsafe fn(first: *const f32, second: *const f32, len: usize, out: *mut f32);

/// Writes `len` values as words: `len` / [`Tiles::numbers`] rounded up, the last one filled with zero.
pub(super) type RoundRow = unsafe fn(values: *const f32, len: usize, out: *mut f32);

/// Sums over `pixels` words the outer products of `M` channels with the `width` ones at `panel`, both of
/// one pixel, or two, after the other. Writes `columns` values to each of the `M` rows at `out`, `stride`
/// apart, or adds them to what is there.
pub(super) type OuterTile = unsafe fn(
    pixels: usize,
    channels: *const f32,
    panel: *const f32,
    out: *mut f32,
    stride: usize,
    columns: usize,
    accumulate: bool,
);

/// The tiles of one vector level.
pub(super) struct Tiles {
    /// Words in a vector; a tile has one or two vectors of columns.
    pub lanes: usize,
    /// Numbers in a word.
    pub numbers: usize,
    /// Tiles by vectors - 1 and rows - 1.
    pub gather: [&'static [GatherTile]; 2],
    /// Tiles by vectors - 1 and rows - 1.
    pub product: [&'static [ProductTile]; 2],
    /// Tiles by rows - 1.
    pub pack: &'static [PackTile],
    pub join: JoinRows,
    pub round: RoundRow,
    /// Tiles by vectors - 1 and rows - 1.
    pub outer: [&'static [OuterTile]; 2],
}

impl Tiles {
    /// The most rows that a tile has.
    pub fn rows(&self) -> usize {
        self.gather[0].len()
    }

    /// Words of so many numbers.
    pub fn words(&self, numbers: usize) -> usize {
        numbers.div_ceil(self.numbers)
    }

    /// Writes rows of `width` values, no more than a tile has columns, as rows of words: two rows share one
    /// where a word has two numbers, the last one with zeros where it is alone.
    ///
    /// # Safety
    /// The machine has the tiles' level, and `out` has room for the words.
    pub unsafe fn join_rows(&self, rows: &[f32], width: usize, out: *mut f32) {
        for (number, rows) in rows.chunks(self.numbers * width).enumerate() {
            let (row, next) = rows.split_at(width);
            let next = if next.is_empty() { &ZEROS } else { next };
            // SAFETY: as the caller says; all are `width` long, which `ZEROS` is at least.
            unsafe {
                let out = out.add(number * width);
                (self.join)(row.as_ptr(), next.as_ptr(), width, out);
            }
        }
    }

    /// The tiles of a level, which the machine must have when they are called. Without instructions for
    /// bfloat16 they are plain code.
    pub fn of(level: Level, precision: Precision) -> &'static Tiles {
        match (precision, level) {
            #[cfg(target_arch = "x86_64")]
            (Precision::Bf16, Level::Avx512) if has_bf16() => &avx512_bf16::TILES,
            (Precision::Bf16, _) => &plain_bf16::TILES,
            #[cfg(target_arch = "x86_64")]
            (_, Level::Avx512) => &avx512::TILES,
            #[cfg(target_arch = "x86_64")]
            (_, Level::Avx2) => &avx2::TILES,
            _ => &plain::TILES,
        }
    }
}

/// Adds to a tile's sums the product of word `k` of every row, `step` apart, with that row of a panel.
#[inline(always)]
unsafe fn add_product<V: Vector, O: Operand<V>, const M: usize, const N: usize>(
    sums: &mut [[V; N]; M],
    rows: [*const f32; M],
    step: usize,
    panel: *const f32,
    k: usize,
) {
    // SAFETY: the caller has the level's instructions and the memory.
    unsafe {
        let w: [V; N] = std::array::from_fn(|n| V::load(panel.add((k * N + n) * V::LANES)));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let x = V::splat(*row.add(k * step));
            for (sum, w) in sums.iter_mut().zip(w) {
                *sum = O::multiply_add(x, w, *sum);
            }
        }
    }
}

/// Adds to a tile's sums the product of `inputs` words of every row, `step` apart, with a panel.
#[inline(always)]
unsafe fn add_products<V: Vector, O: Operand<V>, const M: usize, const N: usize>(
    sums: &mut [[V; N]; M],
    rows: [*const f32; M],
    step: usize,
    inputs: usize,
    panel: *const f32,
) {
    /// Inputs to a turn of the loop, so that counting and addresses cost little.
    const TURN: usize = 4;
    let turns = inputs / TURN;
    // SAFETY: the caller has the level's instructions, `inputs` words in every row and as many
    // rows of `N` vectors in the panel.
    unsafe {
        for turn in 0..turns {
            for k in 0..TURN {
                add_product::<V, O, M, N>(sums, rows, step, panel, turn * TURN + k);
            }
        }
        for k in turns * TURN..inputs {
            add_product::<V, O, M, N>(sums, rows, step, panel, k);
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn gather<V: Vector, O: Operand<V>, const M: usize, const N: usize>(
    taps: &[usize],
    rows: *const *const f32,
    inputs: usize,
    panel: *const f32,
    bias: *const f32,
    outs: *const *mut f32,
    first: usize,
    columns: usize,
    accumulate: bool,
) {
    // SAFETY: the caller has the level's instructions, and memory as `GatherTile` says.
    unsafe {
        let mut sums: [[V; N]; M] = [std::array::from_fn(|n| V::load(bias.add(n * V::LANES))); M];
        for (t, tap) in taps.iter().enumerate() {
            let row: [*const f32; M] = std::array::from_fn(|m| *rows.add(t * M + m));
            add_products::<V, O, M, N>(
                &mut sums,
                row,
                1,
                inputs,
                panel.add(tap * inputs * N * V::LANES),
            );
        }
        if columns == N * V::LANES && !accumulate {
            for (m, sums) in sums.iter().enumerate() {
                let out = (*outs.add(m)).add(first);
                for (n, sum) in sums.iter().enumerate() {
                    sum.store(out.add(n * V::LANES));
                }
            }
            return;
        }
        for (m, sums) in sums.into_iter().enumerate() {
            write(sums, (*outs.add(m)).add(first), columns, accumulate);
        }
    }
}

#[inline(always)]
unsafe fn product<V: Vector, O: Operand<V>, const M: usize, const N: usize>(
    x: *const f32,
    stride: usize,
    inputs: usize,
    panel: *const f32,
    out: *mut f32,
) {
    // SAFETY: the caller has the level's instructions, and memory as `ProductTile` says.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        let rows = std::array::from_fn(|m| x.add(m * stride));
        add_products::<V, O, M, N>(&mut sums, rows, 1, inputs, panel);
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(out.add((m * N + n) * V::LANES));
            }
        }
    }
}

#[inline(always)]
unsafe fn pack<V: Vector, O: Operand<V>, const M: usize>(
    pixels: &[*const f32],
    first: usize,
    out: *mut f32,
) {
    for (p, pixels) in pixels.chunks(O::NUMBERS).enumerate() {
        // SAFETY: the caller has the level's instructions, and memory as `PackTile` says.
        unsafe {
            let out = out.add(p * M);
            match pixels {
                [pixel] if O::NUMBERS == 1 => out.copy_from_nonoverlapping(pixel.add(first), M),
                [pixel] => join::<V, O>(pixel.add(first), ZEROS.as_ptr(), M, out),
                [pixel, next, ..] => join::<V, O>(pixel.add(first), next.add(first), M, out),
                [] => {}
            }
        }
    }
}

/// For the second pixel of words where there is none: as many as a tile has columns.
pub(super) static ZEROS: [f32; 32] = [0.0; 32];

#[inline(always)]
unsafe fn join<V: Vector, O: Operand<V>>(
    first: *const f32,
    second: *const f32,
    len: usize,
    out: *mut f32,
) {
    for c in (0..len).step_by(V::LANES) {
        // SAFETY: the caller has the level's instructions, and memory as `JoinRows` says.
        unsafe {
            let words = O::join(load(first, c, len), load(second, c, len));
            write([words], out.add(c), len - c, false);
        }
    }
}

#[inline(always)]
unsafe fn round<V: Vector, O: Operand<V>>(values: *const f32, len: usize, out: *mut f32) {
    for c in (0..len).step_by(V::LANES) {
        // SAFETY: the caller has the level's instructions, and memory as `RoundRow` says.
        unsafe {
            let values = load(values, c, len);
            let out = out.add(c / O::NUMBERS);
            if c + V::LANES <= len {
                O::store(values, out);
            } else {
                let mut words = [0.0; 16];
                O::store(values, words.as_mut_ptr());
                out.copy_from_nonoverlapping(words.as_ptr(), (len - c).div_ceil(O::NUMBERS));
            }
        }
    }
}

/// The vector at `from + c`, zeros beyond `len`.
#[inline(always)]
pub(super) unsafe fn load<V: Vector>(from: *const f32, c: usize, len: usize) -> V {
    // SAFETY: the caller has the level's instructions and `len` values at `from`.
    unsafe {
        if c + V::LANES <= len {
            V::load(from.add(c))
        } else {
            V::load_first(from.add(c), len - c)
        }
    }
}

#[inline(always)]
unsafe fn outer<V: Vector, O: Operand<V>, const M: usize, const N: usize>(
    pixels: usize,
    channels: *const f32,
    panel: *const f32,
    out: *mut f32,
    stride: usize,
    columns: usize,
    accumulate: bool,
) {
    for m in 0..M {
        prefetch::<1>(out.wrapping_add(m * stride));
    }
    // SAFETY: the caller has the level's instructions, and memory as `OuterTile` says.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        // Beyond the memory where there are no pixels.
        let rows = std::array::from_fn(|m| channels.wrapping_add(m));
        add_products::<V, O, M, N>(&mut sums, rows, M, pixels, panel);
        for (m, sums) in sums.into_iter().enumerate() {
            write(sums, out.add(m * stride), columns, accumulate);
        }
    }
}

/// Values in a cache line.
const LINE: usize = 16;

/// Asks for a cache line that is needed soon, if that is memory at all, in the cache of a level: the
/// first or the second.
#[inline(always)]
fn prefetch<const LEVEL: usize>(line: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is on every such machine, and a prefetch does nothing at a wrong address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        match LEVEL {
            1 => _mm_prefetch::<_MM_HINT_T0>(line.cast()),
            _ => _mm_prefetch::<_MM_HINT_T1>(line.cast()),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Asks for `len` values.
#[inline(always)]
pub(super) fn prefetch_all<const LEVEL: usize>(from: *const f32, len: usize) {
    for line in 0..len.div_ceil(LINE) {
        prefetch::<LEVEL>(from.wrapping_add(line * LINE));
    }
}

/// Writes or adds the first `columns` of a tile's row.
#[inline(always)]
pub(super) unsafe fn write<V: Vector, const N: usize>(
    sums: [V; N],
    out: *mut f32,
    columns: usize,
    accumulate: bool,
) {
    for (n, sum) in sums.into_iter().enumerate() {
        let lanes = columns.saturating_sub(n * V::LANES);
        // SAFETY: the caller has the level's instructions, and `columns` values at `out`; the
        // lanes written are among them.
        unsafe {
            let out = out.add(n * V::LANES);
            if lanes >= V::LANES {
                let sum = if accumulate {
                    V::load(out).add(sum)
                } else {
                    sum
                };
                sum.store(out);
            } else {
                let sum = if accumulate {
                    V::load_first(out, lanes).add(sum)
                } else {
                    sum
                };
                sum.store_first(out, lanes);
            }
        }
    }
}

/// Compiles the tiles of `$rows` rows for a vector and what it multiplies, with their target features.
macro_rules! tiles {
    ($vector:ty, $operand:ty, [$($features:meta)?], [$($rows:literal)*]) => {
        $(#[$features])?
        #[allow(clippy::too_many_arguments)]
        unsafe fn gather<const M: usize, const N: usize>(
            taps: &[usize],
            rows: *const *const f32,
            inputs: usize,
            panel: *const f32,
            bias: *const f32,
            outs: *const *mut f32,
            first: usize,
            columns: usize,
            accumulate: bool,
        ) {
            // SAFETY: the same as the caller's.
            unsafe {
                super::gather::<$vector, $operand, M, N>(
                    taps, rows, inputs, panel, bias, outs, first, columns, accumulate,
                )
            }
        }

        $(#[$features])?
        unsafe fn product<const M: usize, const N: usize>(
            x: *const f32,
            stride: usize,
            inputs: usize,
            panel: *const f32,
            out: *mut f32,
        ) {
            // SAFETY: the same as the caller's.
            unsafe { super::product::<$vector, $operand, M, N>(x, stride, inputs, panel, out) }
        }

        $(#[$features])?
        unsafe fn outer<const M: usize, const N: usize>(
            pixels: usize,
            channels: *const f32,
            panel: *const f32,
            out: *mut f32,
            stride: usize,
            columns: usize,
            accumulate: bool,
        ) {
            // SAFETY: the same as the caller's.
            unsafe {
                super::outer::<$vector, $operand, M, N>(
                    pixels, channels, panel, out, stride, columns, accumulate,
                )
            }
        }

        $(#[$features])?
        unsafe fn pack<const M: usize>(pixels: &[*const f32], first: usize, out: *mut f32) {
            // SAFETY: the same as the caller's.
            unsafe { super::pack::<$vector, $operand, M>(pixels, first, out) }
        }

        $(#[$features])?
        unsafe fn join(first: *const f32, second: *const f32, len: usize, out: *mut f32) {
            // SAFETY: the same as the caller's.
            unsafe { super::join::<$vector, $operand>(first, second, len, out) }
        }

        $(#[$features])?
        unsafe fn round(values: *const f32, len: usize, out: *mut f32) {
            // SAFETY: the same as the caller's.
            unsafe { super::round::<$vector, $operand>(values, len, out) }
        }

        pub(super) static TILES: Tiles = Tiles {
            lanes: <$vector>::LANES,
            numbers: <$operand as Operand<$vector>>::NUMBERS,
            gather: [&[$(gather::<$rows, 1>),*], &[$(gather::<$rows, 2>),*]],
            product: [&[$(product::<$rows, 1>),*], &[$(product::<$rows, 2>),*]],
            pack: &[$(pack::<$rows>),*],
            join,
            round,
            outer: [&[$(outer::<$rows, 1>),*], &[$(outer::<$rows, 2>),*]],
        };
    };
}

/// 14 x 2 of the 32 registers hold sums.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{Operand, Tiles, Vector};
    use crate::kernels::vector::Single;
    use std::arch::x86_64::__m512;

    tiles!(
        __m512,
        Single,
        [target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")],
        [1 2 3 4 5 6 7 8 9 10 11 12 13 14]
    );
}

/// The same.
#[cfg(target_arch = "x86_64")]
mod avx512_bf16 {
    use super::{Operand, Tiles, Vector};
    use crate::kernels::vector::Bf16;
    use std::arch::x86_64::__m512;

    tiles!(
        __m512,
        Bf16,
        [target_feature(
            enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma"
        )],
        [1 2 3 4 5 6 7 8 9 10 11 12 13 14]
    );
}

/// 6 x 2 of the 16 registers hold sums.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{Operand, Tiles, Vector};
    use crate::kernels::vector::Single;
    use std::arch::x86_64::__m256;

    tiles!(__m256, Single, [target_feature(enable = "avx2,fma")], [1 2 3 4 5 6]);
}

/// Four lanes: a register of SSE2 or NEON, where the compiler finds them.
mod plain {
    use super::{Operand, Tiles, Vector};
    use crate::kernels::vector::{FourLanes, Single};

    tiles!(FourLanes<false>, Single, [], [1 2 3 4 5 6]);
}

/// What the instructions for bfloat16 do, on machines without.
mod plain_bf16 {
    use super::{Operand, Tiles, Vector};
    use crate::kernels::vector::{Bf16, FourLanes};

    tiles!(FourLanes<false>, Bf16, [], [1 2 3 4 5 6]);
}
