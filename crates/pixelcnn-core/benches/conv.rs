//! GFLOP/s of the convolutions beside the peak of this machine and a matrix product of the same
//! size by the `gemm` crate, which reads its operands ready made; and, where the machine multiplies
//! bfloat16, the same convolutions with it.
//!
//! Arguments choose the lines that contain one of them. Every figure is the best of several runs, the others being disturbed by whatever else runs.

use std::hint::black_box;
use std::time::Instant;

use pixelcnn_core::cpu::has_bf16;
use pixelcnn_core::engine::Precision;
use pixelcnn_core::kernels::conv::Conv;
use pixelcnn_core::network::Window;
use rayon::prelude::*;

/// GFLOP/s of `multiply_adds` multiply-adds done by `f`.
fn rate(multiply_adds: usize, mut f: impl FnMut()) -> f64 {
    f();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    for runs in 0.. {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed().as_secs_f64());
        if runs >= 5 && start.elapsed().as_secs_f64() > 0.4 {
            break;
        }
    }
    2.0 * multiply_adds as f64 / best / 1e9
}

/// Multiply-adds on registers alone, in as many independent chains as the instructions need.
macro_rules! chains {
    ($name:ident, $features:literal, $set:ident, $fma:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        fn $name(steps: usize) {
            use std::arch::x86_64::*;
            let (a, b) = ($set(black_box(0.5)), $set(black_box(0.25)));
            let mut sums = [$set(0.0); 12];
            for _ in 0..steps {
                for sum in &mut sums {
                    *sum = $fma(a, *sum, b);
                }
            }
            black_box(sums);
        }
    };
}
chains!(chains_512, "avx512f", _mm512_set1_ps, _mm512_fmadd_ps);
chains!(chains_256, "avx2,fma", _mm256_set1_ps, _mm256_fmadd_ps);

/// The machine's peak on all threads in GFLOP/s, where it can be measured.
fn peak() -> Option<f64> {
    let steps = 2_000_000;
    let threads = rayon::current_num_threads();
    let measure = |lanes: usize, chains: &(dyn Fn() + Sync)| {
        Some(rate(threads * steps * 12 * lanes, || {
            rayon::broadcast(|_| chains());
        }))
    };
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has AVX-512.
        return measure(16, &|| unsafe { chains_512(steps) });
    } else if is_x86_feature_detected!("fma") {
        // SAFETY: the machine has AVX2 and FMA.
        return measure(8, &|| unsafe { chains_256(steps) });
    }
    let _ = measure;
    None
}

fn random(len: usize) -> Vec<f32> {
    let value = |i: usize| (i * 7919 % 1024) as f32 / 1024.0 - 0.5;
    (0..len).into_par_iter().map(value).collect()
}

/// GFLOP/s of `gemm` for an m x k by k x n product; `left` and `right` say which is transposed.
fn product([m, n, k]: [usize; 3], left: bool, right: bool) -> f64 {
    let (a, b, mut c) = (random(m * k), random(k * n), vec![0.0f32; m * n]);
    let strides = |transposed, rows: usize, columns: usize| {
        if transposed {
            (rows as isize, 1)
        } else {
            (1, columns as isize)
        }
    };
    let ((a_column, a_row), (b_column, b_row)) = (strides(left, m, k), strides(right, k, n));
    rate(m * n * k, || {
        // SAFETY: the strides stay inside the three matrices.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    })
}

fn main() {
    let chosen: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let peak = peak();
    match peak {
        Some(peak) => println!(
            "peak {peak:.0} GFLOP/s, {} threads",
            rayon::current_num_threads()
        ),
        None => println!("peak unknown"),
    }
    println!(
        "{:34}{:>22}{:>22}{:>22}",
        "GFLOP/s (of the peak) [gemm]", "forward", "backward input", "backward weight"
    );
    let vertical = Window::down_shifted([2, 3], 1);
    let horizontal = Window::down_right_shifted([2, 2], 1);
    let down = Window::down_shifted([2, 3], 2);
    for (size, inputs, outputs, window) in [
        ([8, 32, 32], 320, 160, vertical),
        ([8, 32, 32], 320, 320, vertical),
        ([8, 32, 32], 320, 320, horizontal),
        ([8, 32, 32], 160, 160, down),
        ([8, 8, 8], 320, 160, vertical),
        ([16, 32, 32], 64, 32, vertical),
        ([16, 32, 32], 64, 64, vertical),
        ([16, 32, 32], 64, 64, Window::POINT),
        ([16, 8, 8], 64, 32, vertical),
        ([16, 32, 32], 4, 32, vertical),
    ] {
        let conv = Conv {
            window,
            transposed: false,
            inputs,
            outputs,
            precision: Precision::F32,
        };
        let [kh, kw] = window.kernel;
        let name = format!("{size:?} {inputs}->{outputs} {kh}x{kw}/{}", window.stride);
        if !chosen.is_empty() && !chosen.iter().any(|part| name.contains(part)) {
            continue;
        }
        let [n, h, w] = size;
        let [_, [oh, ow]] = conv.sizes([h, w]);
        let (pixels, taps) = (n * oh * ow, window.taps());
        let work = pixels * taps * inputs * outputs;
        let (x, y) = (random(n * h * w * inputs), random(pixels * outputs));
        let (weight, bias) = (random(taps * inputs * outputs), random(outputs));
        let (mut out, mut dx) = (y.clone(), x.clone());
        let (mut dweight, mut dbias) = (weight.clone(), bias.clone());
        let mut ours = |conv: Conv| {
            [
                rate(work, || {
                    conv.forward(size, &x, &weight, &bias, false, &mut out)
                }),
                rate(work, || {
                    conv.backward_input(size, &y, &weight, false, &mut dx)
                }),
                rate(work, || {
                    conv.backward_weight(size, &x, &y, &mut dweight, &mut dbias)
                }),
            ]
        };
        let single = ours(conv);
        let gemm = [
            product([pixels, outputs, taps * inputs], false, false),
            product([pixels, taps * inputs, outputs], false, true),
            product([taps * inputs, outputs, pixels], true, false),
        ];
        let share = |rate: f64| {
            let share = peak.map(|peak| format!(" ({:.0} %)", 100.0 * rate / peak));
            format!("{rate:.0}{}", share.unwrap_or_default())
        };
        print!("{name:34}");
        for (ours, gemm) in single.into_iter().zip(gemm) {
            print!("{:>22}", format!("{} [{gemm:.0}]", share(ours)));
        }
        println!();
        if has_bf16() {
            print!("{:>34}", "bf16");
            let precision = Precision::Bf16;
            for (rate, single) in ours(Conv { precision, ..conv }).into_iter().zip(single) {
                print!("{:>22}", format!("{}, x{:.2}", share(rate), rate / single));
            }
            println!();
        }
    }
}
