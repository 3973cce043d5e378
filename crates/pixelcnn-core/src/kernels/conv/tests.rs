use super::*;
use crate::kernels::simd::levels;
use proptest::prelude::*;

/// Every pair of pixels that a tap joins, found by trying all.
fn joined(conv: &Conv, [n, h, w]: [usize; 3]) -> Vec<(usize, usize, usize)> {
    let fine = [h, w];
    let Window {
        kernel,
        stride,
        offset,
    } = conv.window;
    let coarse = fine.map(|n| n.div_ceil(stride));
    let mut joined = Vec::new();
    for image in 0..n {
        for (ci, cj) in (0..coarse[0]).flat_map(|i| (0..coarse[1]).map(move |j| (i, j))) {
            for (fi, fj) in (0..fine[0]).flat_map(|i| (0..fine[1]).map(move |j| (i, j))) {
                for (ki, kj) in (0..kernel[0]).flat_map(|i| (0..kernel[1]).map(move |j| (i, j))) {
                    if ci * stride + ki == fi + offset[0] && cj * stride + kj == fj + offset[1] {
                        let coarse = (image * coarse[0] + ci) * coarse[1] + cj;
                        let fine = (image * fine[0] + fi) * fine[1] + fj;
                        let tap = ki * kernel[1] + kj;
                        joined.push(if conv.transposed {
                            (tap, coarse, fine)
                        } else {
                            (tap, fine, coarse)
                        });
                    }
                }
            }
        }
    }
    joined
}

/// Values in f64 beside the sums of their terms' sizes, and of their squares, which scale the error
/// allowed.
#[derive(Clone)]
struct Sums(Vec<[f64; 3]>);

impl Sums {
    fn of(start: impl IntoIterator<Item = f32>) -> Sums {
        let start = start.into_iter().map(f64::from);
        Sums(start.map(|x| [x, x.abs(), x * x]).collect())
    }

    fn add(&mut self, index: usize, x: f32, y: f32) {
        let term = f64::from(x) * f64::from(y);
        let [sum, size, squares] = &mut self.0[index];
        *sum += term;
        *size += term.abs();
        *squares += term * term;
    }

    fn check(&self, what: &str, precision: Precision, values: &[f32]) {
        assert_eq!(self.0.len(), values.len());
        if precision == Precision::Bf16 {
            // Every term is off by a share of itself that is as good as random.
            let errors = self
                .0
                .iter()
                .zip(values)
                .map(|([sum, ..], value)| sum - f64::from(*value));
            let error = errors.map(|error| error * error).sum::<f64>().sqrt();
            let length = self
                .0
                .iter()
                .map(|[.., squares]| squares)
                .sum::<f64>()
                .sqrt();
            assert!(error <= 0.02 * length, "{what}: {error} of {length}");
        }
        let share = match precision {
            Precision::Bf16 => 0.02,
            _ => 1e-6,
        };
        // Winograd's transforms mix a sum with its neighbours' terms, which then cancel.
        let largest = self
            .0
            .iter()
            .fold(0.0, |most: f64, [_, size, _]| most.max(*size));
        for (i, ([sum, size, _], value)) in self.0.iter().zip(values).enumerate() {
            let error = (sum - f64::from(*value)).abs();
            assert!(
                error <= share * (size + largest),
                "{what}[{i}]: {value} is not {sum}"
            );
        }
    }
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len)
        .map(|_| rng.next_u32() as f32 / u32::MAX as f32 - 0.5)
        .collect()
}

struct Case {
    conv: Conv,
    size: [usize; 3],
    x: Vec<f32>,
    dy: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    /// A convolution of random values in both precisions.
    fn both(conv: Conv, size: [usize; 3], seed: u64) -> [Case; 2] {
        [Precision::F32, Precision::Bf16]
            .map(|precision| Case::new(Conv { precision, ..conv }, size, seed))
    }

    fn new(conv: Conv, size: [usize; 3], seed: u64) -> Case {
        let [n, h, w] = size;
        let [from, to] = conv.sizes([h, w]).map(|[h, w]| n * h * w);
        let taps = conv.window.taps();
        Case {
            conv,
            size,
            x: random(seed, from * conv.inputs),
            dy: random(seed + 1, to * conv.outputs),
            weight: random(seed + 2, taps * conv.inputs * conv.outputs),
            bias: random(seed + 3, conv.outputs),
        }
    }

    fn forward(&self, level: Level, accumulate: bool, start: &[f32]) -> Vec<f32> {
        let mut out = start.to_vec();
        let Case {
            conv,
            size,
            x,
            weight,
            bias,
            ..
        } = self;
        conv.forward_at(level, *size, 0, x, weight, bias, accumulate, &mut out);
        out
    }

    fn backward_input(&self, level: Level, accumulate: bool, start: &[f32]) -> Vec<f32> {
        let mut dx = start.to_vec();
        let Case {
            conv,
            size,
            dy,
            weight,
            ..
        } = self;
        conv.backward_input_at(level, *size, dy, weight, accumulate, &mut dx);
        dx
    }

    fn backward_weight(&self, level: Level) -> [Vec<f32>; 2] {
        // Not zero: the gradients must be overwritten.
        let mut dweight = vec![7.0; self.weight.len()];
        let mut dbias = vec![7.0; self.bias.len()];
        let Case {
            conv, size, x, dy, ..
        } = self;
        conv.backward_weight_at(level, *size, x, dy, &mut dweight, &mut dbias);
        [dweight, dbias]
    }

    /// Compares every level with sums over all joined pixels.
    fn check(&self) {
        let Conv {
            inputs, outputs, ..
        } = self.conv;
        let bias = self.bias.iter().cycle().take(self.dy.len()).copied();
        let mut out = Sums::of(bias);
        let mut dx = Sums::of(self.x.iter().map(|_| 0.0));
        let mut dweight = Sums::of(self.weight.iter().map(|_| 0.0));
        let mut dbias = Sums::of(self.bias.iter().map(|_| 0.0));
        for (i, dy) in self.dy.iter().enumerate() {
            dbias.add(i % outputs, *dy, 1.0);
        }
        for (tap, from, to) in joined(&self.conv, self.size) {
            for i in 0..inputs {
                for o in 0..outputs {
                    let (x, y, w) = (
                        from * inputs + i,
                        to * outputs + o,
                        (tap * inputs + i) * outputs + o,
                    );
                    out.add(y, self.x[x], self.weight[w]);
                    dx.add(x, self.dy[y], self.weight[w]);
                    dweight.add(w, self.x[x], self.dy[y]);
                }
            }
        }
        let onto = |mut sums: Sums, start: &[f32]| {
            for (i, start) in start.iter().enumerate() {
                sums.add(i, *start, 1.0);
            }
            sums
        };
        let (start_out, start_dx) = (random(5, self.dy.len()), random(6, self.x.len()));
        let precision = self.conv.precision;
        for level in levels() {
            let at = |name| format!("{level:?} {:?} {:?} {name}", self.conv, self.size);
            out.check(
                &at("out"),
                precision,
                &self.forward(level, false, &start_out),
            );
            dx.check(
                &at("dx"),
                precision,
                &self.backward_input(level, false, &start_dx),
            );
            onto(out.clone(), &start_out).check(
                &at("out +="),
                precision,
                &self.forward(level, true, &start_out),
            );
            onto(dx.clone(), &start_dx).check(
                &at("dx +="),
                precision,
                &self.backward_input(level, true, &start_dx),
            );
            let [weight, bias] = self.backward_weight(level);
            dweight.check(&at("dweight"), precision, &weight);
            dbias.check(&at("dbias"), Precision::F32, &bias);
        }
    }
}

/// All windows that the network has, and whether they are transposed.
fn windows() -> [(Window, bool); 9] {
    [
        (Window::down_shifted([2, 3], 1), false),
        (Window::down_shifted([1, 3], 1), false),
        (Window::down_right_shifted([2, 2], 1), false),
        (Window::down_right_shifted([2, 1], 1), false),
        (Window::down_shifted([2, 3], 2), false),
        (Window::down_right_shifted([2, 2], 2), false),
        (Window::DOWN_SHIFTED_DECONV, true),
        (Window::DOWN_RIGHT_SHIFTED_DECONV, true),
        (Window::POINT, false),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_level_is_the_sum_over_joined_pixels(
        window in 0..9usize,
        flip in any::<bool>(),
        size in [1..4usize, 1..8, 1..8],
        inputs in 1..40usize,
        outputs in 1..40usize,
        seed in any::<u32>(),
    ) {
        let (window, transposed) = windows()[window];
        let precision = Precision::F32;
        let conv = Conv { window, transposed: transposed ^ flip, inputs, outputs, precision };
        Case::both(conv, size, seed.into()).iter().for_each(Case::check);
    }
}

#[test]
fn every_window_at_the_networks_channels() {
    for (window, transposed) in windows() {
        for (inputs, outputs) in [(4, 16), (64, 32), (32, 100), (36, 65)] {
            let conv = Conv {
                window,
                transposed,
                inputs,
                outputs,
                precision: Precision::F32,
            };
            Case::both(conv, [2, 8, 8], 0).iter().for_each(Case::check);
        }
    }
}

#[test]
fn many_pixels_are_summed_in_blocks() {
    // Blocks of pixels, chunks of tiles, and both for the kernels that have no transforms.
    for (stride, channels, size) in [
        (1, [20, 9], [3, 16, 32]),
        (1, [128, 128], [2, 16, 40]),
        (2, [20, 9], [3, 24, 24]),
    ] {
        let conv = Conv {
            window: Window::down_shifted([2, 3], stride),
            transposed: false,
            inputs: channels[0],
            outputs: channels[1],
            precision: Precision::F32,
        };
        Case::both(conv, size, 0).iter().for_each(Case::check);
    }
}

#[test]
fn empty_maps_and_channels() {
    for (size, inputs, outputs) in [
        ([0, 4, 4], 3, 2),
        ([2, 0, 4], 20, 9),
        ([1, 1, 1], 20, 9),
        ([1, 1, 1], 3, 2),
        ([1, 4, 4], 0, 2),
        ([1, 4, 4], 3, 0),
    ] {
        for (window, transposed) in windows() {
            let conv = Conv {
                window,
                transposed,
                inputs,
                outputs,
                precision: Precision::F32,
            };
            Case::both(conv, size, 0).iter().for_each(Case::check);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let conv = |(window, transposed)| Conv {
        window,
        transposed,
        inputs: 40,
        outputs: 70,
        precision: Precision::F32,
    };
    for case in windows()
        .into_iter()
        .flat_map(|kind| Case::both(conv(kind), [5, 16, 16], 0))
    {
        for level in levels() {
            let results = [1, 2, 3].map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                pool.build().unwrap().install(|| {
                    let [dweight, dbias] = case.backward_weight(level);
                    let out = case.forward(level, true, &case.dy);
                    let dx = case.backward_input(level, false, &case.x);
                    [out, dx, dweight, dbias].map(|v| v.into_iter().map(f32::to_bits).collect())
                })
            });
            let [one, two, three]: [[Vec<u32>; 4]; 3] = results;
            assert!(one == two && one == three, "{level:?} {:?}", case.conv);
        }
    }
}

#[test]
fn bands_are_rows_of_the_whole_image() {
    for (window, transposed) in windows() {
        for (inputs, outputs) in [(3, 9), (20, 16)] {
            let conv = Conv {
                window,
                transposed,
                inputs,
                outputs,
                precision: Precision::F32,
            };
            if !conv.reaches_up() {
                continue;
            }
            let (rows, columns) = (23, 9);
            let cases = Case::both(conv, [1, rows, columns], 0);
            for (case, level) in cases
                .iter()
                .flat_map(|case| levels().map(move |level| (case, level)))
            {
                let conv = case.conv;
                let whole = case.forward(level, false, &case.dy);
                let [_, [_, width]] = conv.sizes([rows, columns]);
                let mut bands = Vec::new();
                // Nothing is above the first one.
                let mut x = vec![0.0; columns * inputs];
                x.extend(&case.x);
                for (first, band) in [(0, 8), (8, 12), (20, 3)] {
                    let x = &x[first * columns * inputs..][..(band + 1) * columns * inputs];
                    let mut out = vec![7.0; band.div_ceil(window.stride) * width * outputs];
                    let Case { weight, bias, .. } = case;
                    let size = [1, band, columns];
                    conv.forward_at(level, size, 1, x, weight, bias, false, &mut out);
                    bands.extend(out);
                }
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(&bands) == bits(&whole), "{level:?} {window:?}");
            }
        }
    }
}

/// A shape whose product wraps round has no slices, not those of the length that is left over.
#[test]
fn sizes_that_wrap_round_are_refused() {
    use std::panic::catch_unwind;
    let conv = |window: Window, inputs, outputs| Conv {
        window,
        transposed: false,
        inputs,
        outputs,
        precision: Precision::F32,
    };
    let huge = conv(Window::POINT, 1 << 62, 4);
    let (mut dweight, mut dbias) = ([0.0f32; 0], [0.0f32; 4]);
    let backward = move || huge.backward_weight([0, 1, 1], &[], &[], &mut dweight, &mut dbias);
    assert!(catch_unwind(backward).is_err());

    let many_taps = Window {
        kernel: [1 << 32, 1 << 32],
        ..Window::POINT
    };
    let forward = move || {
        conv(many_taps, 1, 4).forward([1, 1, 1], &[1.0], &[], &[0.0; 4], false, &mut [0.0; 4]);
    };
    assert!(catch_unwind(forward).is_err());

    let pixels = conv(Window::down_shifted([2, 3], 1), 16, 8);
    let backward = move || {
        let (size, weight) = ([1 << 40, 1 << 20, 1], [0.0; 6 * 16 * 8]);
        pixels.backward_input(size, &[], &weight, false, &mut []);
    };
    assert!(catch_unwind(backward).is_err());
}
