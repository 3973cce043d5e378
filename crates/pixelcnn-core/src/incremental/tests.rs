//! The evaluator against the network written plainly, in double precision and whole maps; and
//! against itself, bit for bit.

use super::*;
use crate::network::{GatedResnet, Layer, LayerKind, ParameterKind, Pass, pixelcnn};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The network on one image: maps are \[h, w, channels\].
struct Plain<'a> {
    nonlinearity: Nonlinearity,
    class: usize,
    parameters: &'a [Vec<f32>],
}

#[derive(Clone)]
struct Map {
    size: [usize; 2],
    channels: usize,
    values: Vec<f64>,
}

impl Map {
    fn zeros(size: [usize; 2], channels: usize) -> Map {
        let values = vec![0.0; size[0] * size[1] * channels];
        Map {
            size,
            channels,
            values,
        }
    }

    /// The channels of a pixel, if there is one.
    fn get(&self, y: isize, x: isize) -> Option<&[f64]> {
        let [h, w] = self.size.map(|n| n as isize);
        let inside = (0..h).contains(&y) && (0..w).contains(&x);
        let at = (y * w + x) as usize * self.channels;
        inside.then(|| &self.values[at..at + self.channels])
    }

    /// A map whose pixels are a function of this one's; outside, pixels are `None`.
    fn map(&self, channels: usize, f: impl Fn(isize, isize) -> Vec<f64>) -> Map {
        let mut map = Map::zeros(self.size, channels);
        for (i, pixel) in map.values.chunks_exact_mut(channels).enumerate() {
            let [y, x] = [i / self.size[1], i % self.size[1]].map(|n| n as isize);
            pixel.copy_from_slice(&f(y, x));
        }
        map
    }

    fn shifted(&self, dy: isize, dx: isize) -> Map {
        self.map(self.channels, |y, x| {
            let pixel = self.get(y - dy, x - dx);
            pixel.map_or(vec![0.0; self.channels], <[f64]>::to_vec)
        })
    }
}

fn elu(x: f64) -> f64 {
    if x > 0.0 { x } else { x.exp_m1() }
}

impl Plain<'_> {
    fn f(&self, x: &Map) -> Map {
        x.map(self.nonlinearity.outputs(x.channels), |y, column| {
            let pixel = x.get(y, column).unwrap().iter().copied();
            match self.nonlinearity {
                Nonlinearity::ConcatElu => pixel
                    .clone()
                    .map(elu)
                    .chain(pixel.map(|x| elu(-x)))
                    .collect(),
                Nonlinearity::Elu => pixel.map(elu).collect(),
                Nonlinearity::Relu => pixel.map(|x| x.max(0.0)).collect(),
            }
        })
    }
}

impl Pass for Plain<'_> {
    type Map = Map;

    fn append_ones(&mut self, x: Map) -> Map {
        x.map(x.channels + 1, |y, column| {
            [x.get(y, column).unwrap(), &[1.0]].concat()
        })
    }

    fn layer(&mut self, layer: &Layer, x: &Map) -> Map {
        let [v, g, b] = [0, 1, 2].map(|k| &self.parameters[layer.parameter + k]);
        let (inputs, outputs) = (layer.inputs, layer.outputs);
        let weight = |tap: usize, input: usize, output: usize| {
            f64::from(
                v[match layer.kind {
                    LayerKind::Deconv => (tap * outputs + output) * inputs + input,
                    _ => (tap * inputs + input) * outputs + output,
                }],
            )
        };
        let taps = layer.window.taps();
        let scales: Vec<f64> = (0..outputs)
            .map(|o| {
                let all = (0..taps).flat_map(|t| (0..inputs).map(move |i| (t, i)));
                let square: f64 = all.map(|(t, i)| weight(t, i, o).powi(2)).sum();
                f64::from(g[o]) / square.sqrt()
            })
            .collect();
        let stride = layer.window.stride;
        let size = match layer.kind {
            LayerKind::Deconv => x.size.map(|n| n * stride),
            _ => x.size.map(|n| n / stride),
        };
        let mut out = Map::zeros(size, outputs);
        for pixel in out.values.chunks_exact_mut(outputs) {
            for (value, b) in pixel.iter_mut().zip(b) {
                *value = f64::from(*b);
            }
        }
        // Tap (i, j) joins pixel (y, x) of the coarser map with that of the finer one below.
        let coarse = if layer.kind == LayerKind::Deconv {
            x.size
        } else {
            size
        };
        for y in 0..coarse[0] {
            for column in 0..coarse[1] {
                for tap in 0..taps {
                    let [_, kw] = layer.window.kernel;
                    let [up, left] = layer.window.offset.map(|n| n as isize);
                    let fine_y = (y * stride + tap / kw) as isize - up;
                    let fine_x = (column * stride + tap % kw) as isize - left;
                    let (from, to) = match layer.kind {
                        LayerKind::Deconv => ([y as isize, column as isize], [fine_y, fine_x]),
                        _ => ([fine_y, fine_x], [y as isize, column as isize]),
                    };
                    let (Some(pixel), Some(_)) = (x.get(from[0], from[1]), out.get(to[0], to[1]))
                    else {
                        continue;
                    };
                    let at = (to[0] as usize * size[1] + to[1] as usize) * outputs;
                    for (o, value) in out.values[at..at + outputs].iter_mut().enumerate() {
                        for (i, input) in pixel.iter().enumerate() {
                            *value += input * weight(tap, i, o) * scales[o];
                        }
                    }
                }
            }
        }
        out
    }

    fn gated_resnet(&mut self, block: &GatedResnet, x: &Map, a: Option<&Map>) -> Map {
        let mut c1 = self.layer(&block.conv_1, &self.f(x));
        if let (Some(nin), Some(a)) = (&block.nin, a) {
            let projected = self.layer(nin, &self.f(a));
            c1 = self.add(c1, projected);
        }
        let c2 = self.layer(&block.conv_2, &self.f(&c1));
        let channels = x.channels;
        let hw = block
            .conditional
            .map(|hw| &self.parameters[hw][self.class * 2 * channels..]);
        x.map(channels, |y, column| {
            let (x, c2) = (x.get(y, column).unwrap(), c2.get(y, column).unwrap());
            let c2 = |i: usize| c2[i] + hw.map_or(0.0, |hw| f64::from(hw[i]));
            let gate = |i: usize| c2(i) / (1.0 + (-c2(channels + i)).exp());
            (0..channels).map(|i| x[i] + gate(i)).collect()
        })
    }

    fn down_shift(&mut self, x: Map) -> Map {
        x.shifted(1, 0)
    }

    fn right_shift(&mut self, x: Map) -> Map {
        x.shifted(0, 1)
    }

    fn add(&mut self, mut x: Map, y: Map) -> Map {
        x.values.iter_mut().zip(y.values).for_each(|(x, y)| *x += y);
        x
    }

    fn concat(&mut self, a: &Map, b: &Map) -> Map {
        a.map(a.channels + b.channels, |y, x| {
            [a.get(y, x).unwrap(), b.get(y, x).unwrap()].concat()
        })
    }

    fn elu(&mut self, x: Map) -> Map {
        x.map(x.channels, |y, column| {
            x.get(y, column).unwrap().iter().copied().map(elu).collect()
        })
    }
}

/// Small models of every kind; with filters on both sides of a panel's width.
pub(crate) fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig {
        height: 8,
        width: 12,
        channels: 3,
        nr_resnet: 1,
        nr_filters: 5,
        nr_logistic_mix: 2,
        nonlinearity: Nonlinearity::ConcatElu,
        nr_classes: 0,
    };
    vec![
        base.clone(),
        ModelConfig {
            height: 4,
            width: 4,
            channels: 1,
            nr_resnet: 2,
            nr_classes: 3,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_filters: 16,
            nr_classes: 2,
            width: 8,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Relu,
            channels: 1,
            nr_filters: 37,
            height: 4,
            width: 8,
            ..base.clone()
        },
        // Wide enough for pairs of columns, in one and in two resolutions.
        ModelConfig {
            height: 4,
            width: 20,
            nr_filters: 18,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_classes: 2,
            width: 32,
            ..base
        },
    ]
}

pub(crate) fn parameters(config: &ModelConfig, random: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
    let layout = Layout::new(config).parameters;
    let mut value = |scale: f32| scale * (random.next_u32() as i32) as f32 / 2f32.powi(31);
    let drawn = layout.iter().map(|parameter| {
        let draw = |_| match parameter.kind {
            ParameterKind::V => value(0.1),
            ParameterKind::G => 0.7 + value(0.3),
            ParameterKind::B | ParameterKind::Hw => value(0.5),
        };
        (0..parameter.len()).map(draw).collect()
    });
    drawn.collect()
}

pub(crate) struct Images {
    pub levels: Vec<u8>,
    pub labels: Vec<u32>,
}

impl Images {
    pub fn random(config: &ModelConfig, n: usize, random: &mut ChaCha8Rng) -> Images {
        let classes = config.nr_classes.max(1) as u32;
        Images {
            levels: (0..n * config.dims())
                .map(|_| random.next_u32() as u8)
                .collect(),
            labels: (0..n).map(|_| random.next_u32() % classes).collect(),
        }
    }

    /// The images' pixels with one number, \[images, channels\].
    fn pixels(&self, config: &ModelConfig, images: Range<usize>, pixel: usize) -> Vec<u8> {
        images
            .flat_map(|image| {
                let at = image * config.dims() + pixel * config.channels;
                self.levels[at..at + config.channels].iter().copied()
            })
            .collect()
    }
}

/// Forces some of the images through an evaluator: their logits \[pixels, images, output\].
fn forced(
    evaluator: &Evaluator,
    level: Level,
    threads: usize,
    images: &Images,
    range: Range<usize>,
) -> Vec<Vec<f32>> {
    let config = evaluator.config();
    let labels = &images.labels[range.clone()];
    let mut run = evaluator.run_at(level, labels, threads).unwrap();
    let mut all = Vec::new();
    while let Some([y, x]) = run.position() {
        all.push(run.logits().to_vec());
        run.push(&images.pixels(config, range.clone(), y * config.width + x));
    }
    assert_eq!(all.len(), config.height * config.width);
    all
}

#[test]
fn logits_are_those_of_the_network_written_plainly() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for config in configs() {
        let parameters = parameters(&config, &mut random);
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let images = Images::random(&config, 3, &mut random);
        let got = forced(&evaluator, simd::level(), 2, &images, 0..3);
        let output = config.output_channels();
        for image in 0..3 {
            let levels = &images.levels[image * config.dims()..][..config.dims()];
            let x = Map {
                size: [config.height, config.width],
                channels: config.channels,
                values: levels
                    .iter()
                    .map(|&level| from_level(level).into())
                    .collect(),
            };
            let mut plain = Plain {
                nonlinearity: config.nonlinearity,
                class: images.labels[image] as usize,
                parameters: &parameters,
            };
            let want = pixelcnn(&config, &mut plain, x);
            let scale = want.values.iter().fold(0.0f64, |max, v| max.max(v.abs()));
            assert!(scale > 0.1, "{scale}");
            for (pixel, want) in want.values.chunks_exact(output).enumerate() {
                let got = &got[pixel][image * output..][..output];
                for (got, want) in got.iter().zip(want) {
                    let difference = (f64::from(*got) - want).abs();
                    assert!(
                        difference < 3e-6 * scale,
                        "{config:?}, pixel {pixel}: {got}, {want}"
                    );
                }
            }
        }
    }
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn neighbours_threads_and_vectors_do_not_change_a_bit() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for config in configs() {
        let parameters = parameters(&config, &mut random);
        let evaluator = Evaluator::new(&config, &parameters).unwrap();
        let images = Images::random(&config, 64, &mut random);
        let output = config.output_channels();
        let want = forced(&evaluator, simd::level(), 1, &images, 0..64);
        let ways = [
            (Level::Avx512, 0..64, 2),
            (Level::Avx512, 3..10, 2),
            (Level::Avx512, 0..50, 3),
            (Level::Avx2, 3..10, 1),
            (Level::Avx2, 5..6, 2),
            (Level::Plain, 3..10, 1),
            (Level::Plain, 5..6, 2),
        ];
        for (level, range, threads) in ways {
            if level <= simd::level() {
                let got = forced(&evaluator, level, threads, &images, range.clone());
                for (got, want) in got.iter().zip(&want) {
                    let want = &want[range.start * output..range.end * output];
                    assert_eq!(
                        bits(got),
                        bits(want),
                        "{level:?}, {threads} threads, {range:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_not_asked_for_is_computed_all_the_same() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let config = &configs()[0];
    let evaluator = Evaluator::new(config, &parameters(config, &mut random)).unwrap();
    let images = Images::random(config, 2, &mut random);
    let want = forced(&evaluator, simd::level(), 1, &images, 0..2);
    let mut run = evaluator.run(&images.labels, 1).unwrap();
    for pixel in 0..config.height * config.width - 1 {
        run.push(&images.pixels(config, 0..2, pixel));
    }
    assert_eq!(run.position(), Some([config.height - 1, config.width - 1]));
    assert_eq!(run.logits(), &want[want.len() - 1]);
    assert_eq!(run.logits(), &want[want.len() - 1]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let config = configs()[1].clone();
    let mut parameters = parameters(&config, &mut random);
    let evaluator = Evaluator::new(&config, &parameters).unwrap();
    let refused = |labels: &[u32]| evaluator.run(labels, 1).err().unwrap();
    assert_eq!(
        refused(&[0, 3]),
        EvaluatorError::Class {
            class: 3,
            nr_classes: 3
        }
    );
    assert_eq!(evaluator.run(&[], 2).unwrap().logits(), &[] as &[f32]);

    let odd = ModelConfig {
        height: 5,
        ..config.clone()
    };
    assert!(matches!(
        Evaluator::new(&odd, &parameters),
        Err(EvaluatorError::Config(_))
    ));
    parameters[4].pop();
    let name = Layout::new(&config).parameters[4].name.clone();
    let wrong = Evaluator::new(&config, &parameters).unwrap_err();
    assert!(matches!(wrong, EvaluatorError::Parameters { name: n, .. } if n == name));
    let missing = Evaluator::new(&config, &parameters[..3]).unwrap_err();
    assert!(matches!(
        missing,
        EvaluatorError::Parameters { found: 0, .. }
    ));
}

/// The vertical stack advances by rows and half of the horizontal stack's sums with it.
#[test]
fn only_the_horizontal_stack_is_left_to_the_pixels() {
    let program = Program::new(&ModelConfig::default()).unwrap();
    let sums = program.sums.iter();
    let by_row = sums.clone().filter(|sum| sum.by_row).count();
    // Of the vertical stack: the first layer, 4 layers between resolutions, and two sums for each
    // of 15 + 17 blocks.
    assert_eq!(by_row, 1 + 4 + 2 * 32);
    assert_eq!(sums.len(), 2 * by_row + 1);
    let work = |by: fn(&Sum) -> &[program::Tap]| -> usize {
        let taps = |sum: &Sum| by(sum).iter().map(program::Tap::channels).sum::<usize>();
        let blocks = program.sums.iter().filter(|sum| !sum.by_row && sum.gated);
        blocks.map(taps).sum()
    };
    assert_eq!(
        work(|sum| &sum.phases[0].row),
        work(|sum| &sum.phases[0].pixel)
    );
}
