//! Elementary functions in single precision that vectorise, since the standard library's do not.
//! They are within 4e-7 of the exact value, relatively, pass NaN on, and give the same bits on
//! every machine: polynomials without fused multiply-adds (coefficients from Cephes).

/// Adding it to a small float rounds that to the nearest integer, found in the lowest bits.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// ln 2 in two parts, the first so short that its products with small integers are exact.
const LN_2_HIGH: f32 = 355.0 / 512.0;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Splits `x` = n ln 2 + r with an integer n and |r| <= ln 2 / 2; gives n and exp(r) - 1.
#[inline(always)]
fn reduced_exp_m1(x: f32) -> (i32, f32) {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let p = ((((1.987_569_2e-4 * r + 1.398_2e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r
        + 1.666_666_5e-1)
        * r
        + 0.5;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    (exponent, r * r * p + r)
}

/// 2 to the `n`, for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The exponential.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // The comparisons let NaN through.
    let x = if -105.0 > x { -105.0 } else { x };
    let x = if 90.0 < x { 90.0 } else { x };
    let (n, p) = reduced_exp_m1(x);
    // In two steps: 2^n alone may be too large or too small for a float.
    let half = n >> 1;
    (1.0 + p) * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `exp(x) - 1` for x <= 0.
#[inline(always)]
pub fn exp_m1_negative(x: f32) -> f32 {
    let x = if -30.0 > x { -30.0 } else { x };
    let (n, p) = reduced_exp_m1(x);
    let scale = power_of_two(n);
    scale * p + (scale - 1.0)
}

/// The natural logarithm.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let subnormal = x < f32::MIN_POSITIVE;
    let normal = if subnormal { x * 8_388_608.0 } else { x };
    let offset = if subnormal { -23.0 } else { 0.0 };
    // x = m 2^k with m between sqrt(1/2) and sqrt(2).
    let bits = normal.to_bits() as i32;
    let k = bits.wrapping_sub(0x3f35_04f3) >> 23;
    let f = f32::from_bits(bits.wrapping_sub(k << 23) as u32) - 1.0;
    let k = k as f32 + offset;
    let p = (((7.037_684e-2 * f - 1.151_461e-1) * f + 1.167_699_9e-1) * f - 1.242_014e-1) * f
        + 1.424_932_3e-1;
    let p =
        (((p * f - 1.666_805_8e-1) * f + 2.000_071_5e-1) * f - 2.499_999_4e-1) * f + 3.333_333e-1;
    let square = f * f;
    let y = (f * square * p + k * LN_2_LOW) - 0.5 * square;
    let y = (f + y) + k * LN_2_HIGH;
    let y = if x < f32::INFINITY { y } else { x };
    let y = if x > 0.0 { y } else { f32::NAN };
    if x == 0.0 { f32::NEG_INFINITY } else { y }
}

/// The hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let t = exp_m1_negative(-2.0 * x.abs());
    (-t / (t + 2.0)).copysign(x)
}

/// The logistic function, `1 / (1 + exp(-x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 997th float between two bit patterns, of both signs.
    fn floats(range: std::ops::RangeInclusive<f32>) -> impl Iterator<Item = f32> {
        (0..=f32::INFINITY.to_bits())
            .step_by(997)
            .chain([f32::INFINITY.to_bits(), f32::MAX.to_bits(), 1])
            .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
            .filter(move |x| range.contains(x))
    }

    fn check(
        range: std::ops::RangeInclusive<f32>,
        ours: fn(f32) -> f32,
        exact: fn(f64) -> f64,
        tolerance: f64,
        // What underflow may take away.
        absolute: f64,
    ) {
        let mut worst = (0.0f64, 0.0f32);
        for x in floats(range) {
            let (got, want) = (ours(x), exact(f64::from(x)));
            if got.is_infinite() || (want as f32).is_infinite() {
                assert_eq!(got, want as f32, "at {x}");
            } else {
                let error = (f64::from(got) - want).abs() - absolute;
                assert!(error <= tolerance * want.abs(), "{got} for {want} at {x:e}");
                if error / want.abs() > worst.0 {
                    worst = (error / want.abs(), x);
                }
            }
        }
        println!("worst relative error {:.2e} at {:e}", worst.0, worst.1);
        assert!(ours(f32::NAN).is_nan());
    }

    const EVERYWHERE: std::ops::RangeInclusive<f32> = f32::NEG_INFINITY..=f32::INFINITY;

    #[test]
    fn exp_is_the_exponential() {
        check(EVERYWHERE, exp, f64::exp, 2e-7, 1.5e-45);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn exp_m1_is_the_exponential_less_one() {
        let range = f32::NEG_INFINITY..=0.0;
        check(range, exp_m1_negative, f64::exp_m1, 2e-7, 0.0);
    }

    #[test]
    fn ln_is_the_logarithm() {
        check(0.0..=f32::INFINITY, ln, f64::ln, 2e-7, 0.0);
        assert!(ln(-1.0).is_nan() && ln(f32::NEG_INFINITY).is_nan());
    }

    #[test]
    fn tanh_is_the_hyperbolic_tangent() {
        check(EVERYWHERE, tanh, f64::tanh, 4e-7, 1.5e-45);
    }

    #[test]
    fn sigmoid_is_the_logistic_function() {
        let exact = |x: f64| 1.0 / (1.0 + (-x).exp());
        check(EVERYWHERE, sigmoid, exact, 4e-7, 1.2e-38);
    }
}
