//! The network beyond the original's one golden configuration: the engine against the reference for
//! every kind of model, gradients against differences, and causality.

use pixelcnn::device::Device;
use pixelcnn::engine::{Engine, State};
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::likelihood::Mixture;
use pixelcnn::network::{Batch, Network, draw_parameters, initialise};
use pixelcnn::{ModelConfig, Nonlinearity, reference};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Small models of every kind.
fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig {
        height: 8,
        width: 12,
        channels: 3,
        nr_resnet: 1,
        nr_filters: 5,
        nr_logistic_mix: 3,
        nonlinearity: Nonlinearity::ConcatElu,
        nr_classes: 0,
        ..ModelConfig::default()
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
            nr_filters: 8,
            nr_classes: 2,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Relu,
            channels: 1,
            ..base
        },
    ]
}

struct Images {
    images: Vec<u8>,
    labels: Vec<u32>,
}

impl Images {
    fn random(config: &ModelConfig, n: usize, random: &mut impl Rng) -> Images {
        let classes = config.nr_classes.max(1) as u32;
        Images {
            images: (0..n * config.dims()).map(|_| random.random()).collect(),
            labels: (0..n).map(|_| random.random_range(0..classes)).collect(),
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            images: &self.images,
            labels: &self.labels,
            ..Batch::default()
        }
    }
}

/// Parameters as they are after data-dependent initialisation; on enough images that no variance
/// is near 0 by chance, which would make the network steep.
fn parameters(config: &ModelConfig, random: &mut impl Rng) -> Vec<Vec<f32>> {
    let images = Images::random(config, 32, random);
    let mut parameters = draw_parameters(config, 7);
    let batch = images.batch();
    initialise(config, &mut parameters, batch, None, &Device::CPU).unwrap();
    parameters
}

/// An engine that trains on these parameters.
fn engine(config: &ModelConfig, parameters: &[Vec<f32>]) -> Box<dyn Engine> {
    let mut engine = Device::CPU.engine(config).unwrap();
    let zeros: Vec<Vec<f32>> = parameters.iter().map(|p| vec![0.0; p.len()]).collect();
    let state = State {
        parameters: parameters.to_vec(),
        average: parameters.to_vec(),
        first: zeros.clone(),
        second: zeros,
    };
    engine.load(state).unwrap();
    engine
}

/// Nats and gradients of a batch.
fn gradients(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    batch: Batch,
    dropout: Option<Dropout>,
) -> (f64, Vec<Vec<f32>>) {
    let mut engine = engine(config, parameters);
    let nats = engine.backward(batch, dropout).unwrap();
    (nats, engine.gradients().unwrap())
}

/// The same and more, in double precision.
fn plainly(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    batch: Batch,
    dropout: Option<Dropout>,
) -> reference::Outcome {
    let widen = |values: &Vec<f32>| values.iter().copied().map(f64::from).collect();
    let parameters: Vec<Vec<f64>> = parameters.iter().map(widen).collect();
    reference::run(config, &parameters, batch, dropout).unwrap()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|v| v.powi(2)).sum::<f64>().sqrt()
}

/// The length of the difference of two lists.
fn distance(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    norm(a.iter().zip(b).map(|(a, b)| f64::from(*a) - b))
}

#[test]
fn the_engine_equals_the_reference() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for config in configs() {
        let images = Images::random(&config, 3, &mut random);
        let parameters = parameters(&config, &mut random);
        for dropout in [
            None,
            Some(Dropout {
                rate: 0.4,
                seed: 9,
                first: 0,
            }),
        ] {
            let (nats, ours) = gradients(&config, &parameters, images.batch(), dropout);
            let plain = plainly(&config, &parameters, images.batch(), dropout);
            let want: f64 = plain.nats.iter().sum();
            assert!((nats / want - 1.0).abs() < 1e-5, "{config:?}");
            // The whole gradient's norm is the scale: single tensors can be tiny.
            let scale = norm(plain.gradients.iter().flatten().copied());
            for (i, (a, b)) in ours.iter().zip(&plain.gradients).enumerate() {
                let difference = distance(a, b);
                assert!(
                    difference < 1e-4 * scale,
                    "parameter {i}: {difference} of {scale}"
                );
            }
        }
    }
}

/// A batch of this many images is taken in two parts: neither the threads that compute them nor the
/// split itself (the reference has none) can be told from the results.
#[test]
fn parts_of_a_batch_are_the_batch() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let config = &configs()[0];
    let images = Images::random(config, 100, &mut random);
    let parameters = parameters(config, &mut random);
    let dropout = Some(Dropout {
        rate: 0.4,
        seed: 9,
        first: 0,
    });
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let network = Network::new(config, &parameters, &Device::CPU).unwrap();
            (
                gradients(config, &parameters, images.batch(), dropout).1,
                network.nats_per_image(images.batch()).unwrap(),
                network.logits(images.batch()).unwrap(),
            )
        })
    };
    let ours = run(1);
    assert_eq!(ours, run(3));

    let theirs = plainly(config, &parameters, images.batch(), dropout).gradients;
    let theirs = theirs.concat();
    let scale = norm(theirs.iter().copied());
    assert!(distance(&ours.0.concat(), &theirs) < 1e-4 * scale);
    let plain = plainly(config, &parameters, images.batch(), None);
    assert_eq!(ours.1.len(), plain.nats.len());
    for (a, b) in ours.1.iter().zip(&plain.nats) {
        assert!((a / b - 1.0).abs() < 1e-5);
    }
    // Every image has its own logits, in its own place.
    let size = config.height * config.width * config.output_channels();
    assert_eq!(ours.2.len(), plain.logits.len());
    for (a, b) in ours.2.chunks(size).zip(plain.logits.chunks(size)) {
        assert!(distance(a, b) < 1e-5 * norm(b.iter().copied()));
    }
}

/// The loss along random directions, which touch every parameter, changes as the gradient says.
#[test]
fn gradients_are_the_slope_of_the_loss() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for config in configs() {
        let images = Images::random(&config, 2, &mut random);
        let mut parameters = parameters(&config, &mut random);
        let nats = |parameters: &[Vec<f32>]| {
            let network = Network::new(&config, parameters, &Device::CPU).unwrap();
            let nats = network.nats_per_image(images.batch()).unwrap();
            nats.iter().sum::<f64>()
        };
        let (_, gradients) = gradients(&config, &parameters, images.batch(), None);
        let whole = norm(gradients.iter().flatten().copied().map(f64::from));
        for (i, gradient) in gradients.iter().enumerate() {
            // Along the gradient itself the slope is its norm: the largest there is.
            let length = norm(gradient.iter().copied().map(f64::from));
            if length < 1e-2 * whole {
                continue;
            }
            let kept = parameters[i].clone();
            // A tenth of a nat: above rounding, and the loss is still straight.
            let step = 0.05 / length;
            let mut at = |step: f64| {
                let moved = kept.iter().zip(gradient);
                parameters[i] = moved
                    .map(|(p, g)| (f64::from(*p) + step / length * f64::from(*g)) as f32)
                    .collect();
                nats(&parameters)
            };
            let slope = (at(step) - at(-step)) / (2.0 * step);
            parameters[i] = kept;
            assert!(
                (slope / length - 1.0).abs() < 0.03,
                "parameter {i}: {slope}, not {length}"
            );
        }
    }
}

/// Row and column of the pixels of `map` \[h, w, c\] in which `a` and `b` differ.
fn changed(a: &[f32], b: &[f32], [h, w]: [usize; 2]) -> Vec<(usize, usize)> {
    let c = a.len() / (h * w);
    let pixels = (0..h).flat_map(|y| (0..w).map(move |x| (y, x)));
    pixels
        .filter(|&(y, x)| {
            let pixel = (y * w + x) * c..(y * w + x + 1) * c;
            a[pixel.clone()] != b[pixel]
        })
        .collect()
}

/// No output at or before a pixel, in raster order, depends on it, and every later one does; nor
/// does a feature map of either stack know what it must not.
#[test]
fn the_network_is_causal_and_sees_what_it_should() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let config = ModelConfig {
        height: 8,
        width: 8,
        nr_resnet: 2,
        ..configs()[0].clone()
    };
    let images = Images::random(&config, 1, &mut random);
    // As drawn: data-dependent initialisation makes the blocks add so little that what they carry
    // from afar is rounded away.
    let parameters = draw_parameters(&config, 7);
    let network = Network::new(&config, &parameters, &Device::CPU).unwrap();
    let before = network.logits(images.batch()).unwrap();
    let maps = network.feature_maps(images.batch()).unwrap();
    for y in 0..8 {
        for x in 0..8 {
            let mut other = images.images.clone();
            for channel in 0..3 {
                let level = &mut other[(y * 8 + x) * 3 + channel];
                *level = level.wrapping_add(101);
            }
            let batch = Batch {
                images: &other,
                labels: &[],
                ..Batch::default()
            };
            let after = network.logits(batch).unwrap();
            let depend = changed(&before, &after, [8, 8]);
            let later: Vec<(usize, usize)> = (0..8)
                .flat_map(|r| (0..8).map(move |c| (r, c)))
                .filter(|&(r, c)| (r, c) > (y, x))
                .collect();
            assert_eq!(depend, later, "what depends on pixel ({y}, {x})");

            for (i, (a, b)) in maps
                .iter()
                .zip(network.feature_maps(batch).unwrap())
                .enumerate()
            {
                let side = (a.len() / config.nr_filters).isqrt();
                let scale = 8 / side;
                // The up pass gives the whole vertical stack, then the horizontal one; the
                // down pass alternates.
                let up = 3 * (config.nr_resnet + 1);
                let vertical = if i < 2 * up {
                    i < up
                } else {
                    (i - 2 * up).is_multiple_of(2)
                };
                for (r, c) in changed(a, &b, [side, side]) {
                    // A coarse pixel stands for the finer ones that it covers: it may know
                    // what is before the first of them.
                    let (r, c) = (r * scale, c * scale);
                    let before = if vertical { y < r } else { (y, x) < (r, c) };
                    assert!(before, "map {i}: ({r}, {c}) knows ({y}, {x})");
                }
            }
        }
    }
}

/// Where channels are predicted one after another, the parameters of a channel depend on the values
/// before it, pixel by pixel and channel by channel, and on all of them.
#[test]
fn channels_see_those_before_them() {
    for attention in [[0; 3], [1, 5, 1]] {
        channels_see_those_before(&ModelConfig {
            height: 8,
            width: 8,
            nr_resnet: 2,
            nr_channel_resnet: 1,
            attention,
            ..configs()[0].clone()
        });
    }
}

fn channels_see_those_before(config: &ModelConfig) {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let mixture = Mixture::of(config);
    let images = Images::random(config, 1, &mut random);
    let parameters = draw_parameters(config, 7);
    let network = Network::new(config, &parameters, &Device::CPU).unwrap();
    let before = network.logits(images.batch()).unwrap();
    for value in 0..config.dims() {
        let mut other = images.images.clone();
        other[value] = other[value].wrapping_add(101);
        let batch = Batch {
            images: &other,
            ..Batch::default()
        };
        let after = network.logits(batch).unwrap();
        let pixels = before.chunks_exact(config.output_channels());
        let pixels = pixels.zip(after.chunks_exact(config.output_channels()));
        for (pixel, (before, after)) in pixels.enumerate() {
            for channel in 0..3 {
                let own = mixture.logits_of(channel..channel + 1);
                let depends = before[own.clone()] != after[own];
                let is_later = 3 * pixel + channel > value;
                assert_eq!(depends, is_later, "{channel} of {pixel} on value {value}");
            }
        }
    }
}

/// The logits of a code depend on all codes before it and on none from it on; and on the coarser map also
/// below and to the right, as far as a convolution reaches and no earlier.
#[test]
fn codes_see_those_before_them_and_all_of_the_coarser_map() {
    for attention in [[0; 3], [1, 5, 1]] {
        let config = ModelConfig {
            height: 8,
            width: 8,
            channels: 1,
            nr_resnet: 2,
            attention,
            nr_codes: 9,
            nr_coarse_codes: 5,
            ..configs()[0].clone()
        };
        let network = Network::new(&config, &draw_parameters(&config, 7), &Device::CPU).unwrap();
        let images: Vec<u8> = (0..64)
            .flat_map(|i| [i % 9 * 7 % 9, 0, i % 8 / 2 % 5, 0])
            .collect();
        let logits = |images: &[u8]| {
            let batch = Batch {
                images,
                ..Batch::default()
            };
            network.logits(batch).unwrap()
        };
        let before = logits(&images);
        let changed = |byte: usize, codes: u8| -> Vec<bool> {
            let mut other = images.clone();
            other[byte] = (other[byte] + 1) % codes;
            let after = logits(&other);
            let pixels = before.chunks_exact(9).zip(after.chunks_exact(9));
            pixels.map(|(before, after)| before != after).collect()
        };
        for pixel in 0..64 {
            for (at, depends) in changed(4 * pixel, 9).into_iter().enumerate() {
                assert_eq!(depends, at > pixel, "{at} on the code of {pixel}");
            }
            // In raster order, no earlier than the pixel up and left of it.
            for (at, depends) in changed(4 * pixel + 2, 5).into_iter().enumerate() {
                let [y, x, row, column] = [at / 8, at % 8, pixel / 8, pixel % 8];
                let near = y.abs_diff(row) <= 1 && x.abs_diff(column) <= 1;
                assert!(depends || !near, "{at} on the coarser code of {pixel}");
                assert!(
                    !depends || y + 1 >= row,
                    "{at} on the coarser code of {pixel}"
                );
            }
        }
    }
}
