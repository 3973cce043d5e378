//! Vector registers as one trait, for what is written once and compiled for every vector level.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
use std::mem::transmute;

/// A vector register of f32 lanes. All its functions need the instructions of its level.
pub(crate) trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    /// Reads `LANES` values.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes `LANES` values.
    unsafe fn store(self, to: *mut f32);
    /// Reads `lanes` values, fewer than `LANES`, and sets the others to zero.
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self;
    /// Writes the first `lanes` values, fewer than `LANES`.
    unsafe fn store_first(self, to: *mut f32, lanes: usize);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    /// `self * factor + term`.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
impl Vector for __m512 {
    const LANES: usize = 16;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller has AVX-512, as for all below.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller may read 16 values.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller may write 16 values.
        unsafe { _mm512_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
        // SAFETY: the caller may read `lanes` values.
        unsafe { _mm512_maskz_loadu_ps((1 << lanes) - 1, from) }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, lanes: usize) {
        // SAFETY: the caller may write `lanes` values.
        unsafe { _mm512_mask_storeu_ps(to, (1 << lanes) - 1, self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm512_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm512_sub_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm512_fmadd_ps(self, factor, term) }
    }
}

#[cfg(target_arch = "x86_64")]
impl Vector for __m256 {
    const LANES: usize = 8;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller has AVX2 and FMA, as for all below.
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller may read 8 values.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller may write 8 values.
        unsafe { _mm256_storeu_ps(to, self) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
        // SAFETY: the caller may read `lanes` values.
        unsafe { _mm256_maskload_ps(from, mask(lanes)) }
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, lanes: usize) {
        // SAFETY: the caller may write `lanes` values.
        unsafe { _mm256_maskstore_ps(to, mask(lanes), self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm256_add_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm256_sub_ps(self, other) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: as for `splat`.
        unsafe { _mm256_fmadd_ps(self, factor, term) }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn mask(lanes: usize) -> __m256i {
    // SAFETY: as for `splat`.
    unsafe {
        let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes as i32), numbers)
    }
}

/// Four lanes: a register of SSE2 or NEON, where the compiler finds them. `FUSED` rounds
/// [`Vector::mul_add`] once also where that is slow.
#[derive(Clone, Copy)]
pub(crate) struct FourLanes<const FUSED: bool>([f32; 4]);

impl<const FUSED: bool> Vector for FourLanes<FUSED> {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        FourLanes([value; 4])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller may read 4 values.
        FourLanes(unsafe { from.cast::<[f32; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller may write 4 values.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self {
        // SAFETY: the caller may read `lanes` values.
        FourLanes(std::array::from_fn(|i| unsafe {
            if i < lanes { *from.add(i) } else { 0.0 }
        }))
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, lanes: usize) {
        for (i, value) in self.0.into_iter().enumerate().take(lanes) {
            // SAFETY: the caller may write `lanes` values.
            unsafe { *to.add(i) = value }
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        FourLanes(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        FourLanes(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        FourLanes(std::array::from_fn(|i| {
            // Without the instruction, a fused multiply-add is a function call.
            if FUSED || cfg!(target_arch = "aarch64") {
                self.0[i].mul_add(factor.0[i], term.0[i])
            } else {
                self.0[i] * factor.0[i] + term.0[i]
            }
        }))
    }
}

/// What is multiplied: words of 32 bits, in the place of f32 values, of one or two numbers each. All its
/// functions need the instructions of its vector's level.
pub(crate) trait Operand<V: Vector> {
    /// Numbers in a word.
    const NUMBERS: usize;
    /// `sum` and the products of the numbers in two words, lane by lane.
    unsafe fn multiply_add(x: V, w: V, sum: V) -> V;
    /// Writes `LANES` values that follow one another, as `LANES / NUMBERS` words.
    unsafe fn store(values: V, to: *mut f32);
    /// Words of a number each of two rows; of the first row where words have one.
    unsafe fn join(first: V, second: V) -> V;
}

/// Values as they are.
pub(crate) struct Single;

impl<V: Vector> Operand<V> for Single {
    const NUMBERS: usize = 1;
    #[inline(always)]
    unsafe fn multiply_add(x: V, w: V, sum: V) -> V {
        // SAFETY: the caller has the level's instructions, as for all below.
        unsafe { x.mul_add(w, sum) }
    }
    #[inline(always)]
    unsafe fn store(values: V, to: *mut f32) {
        // SAFETY: the caller may write as many.
        unsafe { values.store(to) }
    }
    #[inline(always)]
    unsafe fn join(first: V, _: V) -> V {
        first
    }
}

/// Values rounded to bfloat16, the nearest or else the even one, two in a word.
pub(crate) struct Bf16;

#[cfg(target_arch = "x86_64")]
impl Operand<__m512> for Bf16 {
    const NUMBERS: usize = 2;
    #[inline(always)]
    unsafe fn multiply_add(x: __m512, w: __m512, sum: __m512) -> __m512 {
        // SAFETY: the caller has AVX-512 BF16, as for all below; the types have the same bits.
        unsafe {
            let [x, w] = [x, w].map(|words| transmute::<__m512, __m512bh>(words));
            _mm512_dpbf16_ps(sum, x, w)
        }
    }
    #[inline(always)]
    unsafe fn store(values: __m512, to: *mut f32) {
        // SAFETY: the caller may write 8 words.
        unsafe {
            let rounded = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values));
            _mm256_storeu_si256(to.cast(), rounded);
        }
    }
    #[inline(always)]
    unsafe fn join(first: __m512, second: __m512) -> __m512 {
        // SAFETY: the types have the same bits.
        unsafe {
            let both = transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
            // From first, second, ... of 16 each to pairs.
            let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            let seconds = _mm512_slli_epi32::<16>(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)));
            let order = _mm512_or_si512(lanes, seconds);
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))
        }
    }
}

/// What the instructions do, for machines without.
impl<const FUSED: bool> Operand<FourLanes<FUSED>> for Bf16 {
    const NUMBERS: usize = 2;
    #[inline(always)]
    unsafe fn multiply_add(
        x: FourLanes<FUSED>,
        w: FourLanes<FUSED>,
        sum: FourLanes<FUSED>,
    ) -> FourLanes<FUSED> {
        let numbers = |word: f32| {
            let bits = word.to_bits();
            [bits << 16, bits & 0xffff_0000].map(f32::from_bits)
        };
        FourLanes(std::array::from_fn(|i| {
            let ([a, b], [c, d]) = (numbers(x.0[i]), numbers(w.0[i]));
            sum.0[i] + a * c + b * d
        }))
    }
    #[inline(always)]
    unsafe fn store(values: FourLanes<FUSED>, to: *mut f32) {
        let [a, b, c, d] = values.0;
        // SAFETY: the caller may write 2 words.
        unsafe {
            *to = word(a, b);
            *to.add(1) = word(c, d);
        }
    }
    #[inline(always)]
    unsafe fn join(first: FourLanes<FUSED>, second: FourLanes<FUSED>) -> FourLanes<FUSED> {
        FourLanes(std::array::from_fn(|i| word(first.0[i], second.0[i])))
    }
}

/// Two values as bfloat16 in a word, the first in its lower half.
#[inline(always)]
fn word(first: f32, second: f32) -> f32 {
    let [first, second] = [first, second].map(|value| {
        let bits = value.to_bits();
        match value.is_nan() {
            true => bits >> 16 | 0x40,
            false => (bits + 0x7fff + (bits >> 16 & 1)) >> 16,
        }
    });
    f32::from_bits(second << 16 | first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_becomes_the_nearest_bfloat16_or_the_even_one() {
        let rounded = |value: f32| f32::from_bits(word(0.0, value).to_bits() & 0xffff_0000);
        for (value, nearest) in [
            (1.0, 1.0),
            (1.0 + 1.0 / 256.0, 1.0),
            (1.0 + 3.0 / 256.0, 1.0 + 4.0 / 256.0),
            (-1.0 - 1.1 / 256.0, -1.0 - 2.0 / 256.0),
            (f32::MAX, f32::INFINITY),
            (f32::NEG_INFINITY, f32::NEG_INFINITY),
        ] {
            assert_eq!(rounded(value), nearest, "{value}");
        }
        assert!(rounded(f32::from_bits(0x7f80_0001)).is_nan());
    }

    #[cfg(target_arch = "x86_64")]
    proptest::proptest! {
        /// But for denormal values, which they take for zero.
        #[test]
        fn the_instructions_do_what_plain_code_does(
            a in proptest::array::uniform16(proptest::num::f32::NORMAL | proptest::num::f32::ZERO),
            b in proptest::array::uniform16(-1e9f32..1e9),
        ) {
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
            fn by_instructions(a: [f32; 16], b: [f32; 16], words: [f32; 16]) -> [[f32; 16]; 3] {
                let mut out = [[0.0; 16]; 3];
                // SAFETY: arrays of 16 values.
                unsafe {
                    let [x, y] = [&a, &b].map(|values| __m512::load(values.as_ptr()));
                    <Bf16 as Operand<__m512>>::join(x, y).store(out[0].as_mut_ptr());
                    Bf16::store(x, out[1].as_mut_ptr());
                    let words = __m512::load(words.as_ptr());
                    let sums = Bf16::multiply_add(words, __m512::splat(word(1.0, 0.5)), y);
                    sums.store(out[2].as_mut_ptr());
                }
                out
            }
            if crate::kernels::simd::has_bf16() {
                let words = std::array::from_fn(|i| word(b[i], b[15 - i]));
                // SAFETY: the machine has the instructions.
                let [joined, along, sums] = unsafe { by_instructions(a, b, words) };
                for i in 0..16 {
                    proptest::prop_assert_eq!(joined[i].to_bits(), word(a[i], b[i]).to_bits());
                    let [x, w, sum] = [words[i], word(1.0, 0.5), b[i]].map(|v| FourLanes::<false>([v; 4]));
                    // SAFETY: plain code.
                    let plain = unsafe { Bf16::multiply_add(x, w, sum) }.0[0];
                    let size = b[i].abs() + b[15 - i].abs() + 1e-30;
                    proptest::prop_assert!((sums[i] - plain).abs() <= 1e-6 * size, "{} {plain}", sums[i]);
                }
                for i in 0..8 {
                    proptest::prop_assert_eq!(along[i].to_bits(), word(a[2 * i], a[2 * i + 1]).to_bits());
                }
            }
        }
    }
}
