//! The vector instructions of this machine, chosen once at run time, so that one binary is fast
//! everywhere.

use std::sync::OnceLock;

/// A set of vector instructions that the kernels have code for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What every machine of the architecture has (NEON on 64-bit ARM).
    Plain,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, VL, BW and DQ.
    Avx512,
}

/// The widest level that this machine has.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(detect)
}

/// Whether this machine multiplies bfloat16 in pairs (AVX-512 BF16).
pub fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return level() == Level::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// All levels that this machine has, for tests of each.
#[cfg(test)]
pub(crate) fn levels() -> impl Iterator<Item = Level> {
    let all = [Level::Plain, Level::Avx2, Level::Avx512];
    all.into_iter().filter(|found| *found <= level())
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Plain,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Plain
}

/// Compiles a function once for every [`Level`] and calls the one for this machine: the body is
/// plain Rust that the compiler turns into vector instructions. What the body calls must be
/// `#[inline(always)]` to be compiled with it.
macro_rules! vectorized {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                match $crate::kernels::simd::level() {
                    // SAFETY: `level` found these instructions on this machine.
                    $crate::kernels::simd::Level::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    $crate::kernels::simd::Level::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::kernels::simd::Level::Plain => {}
                }
            }
            body($($argument),*)
        }
    };
}

#[cfg(test)]
mod tests {
    vectorized! {
        fn scaled_sum(x: &[f32], scale: f32) -> f32 {
            x.iter().map(|v| v * scale).sum()
        }
    }

    #[test]
    fn a_vectorized_function_is_the_function() {
        assert_eq!(scaled_sum(&[1.0, 2.0, 3.0], 2.0), 12.0);
    }
}
