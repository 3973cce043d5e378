//! The network beyond the original's one golden configuration: the kernels against Burn's own
//! operations for every kind of model, gradients against differences, and causality.

use burn::tensor::Device;
use pixelcnn::kernels::pointwise::Dropout;
use pixelcnn::model::{Batch, Network, draw_parameters, initialise};
use pixelcnn::ops::Engine;
use pixelcnn::{ModelConfig, Nonlinearity};
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
        }
    }
}

/// Parameters as they are after data-dependent initialisation; on enough images that no variance
/// is near 0 by chance, which would make the network steep.
fn parameters(config: &ModelConfig, random: &mut impl Rng) -> Vec<Vec<f32>> {
    let images = Images::random(config, 32, random);
    let mut parameters = draw_parameters(config, 7);
    initialise(
        config,
        &mut parameters,
        images.batch(),
        None,
        &Device::flex(),
    );
    parameters
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn kernels_equal_burns_operations() {
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
            let [kernels, portable] = [Engine::Kernels, Engine::Portable].map(|engine| {
                let network = Network::with_engine(&config, &parameters, &Device::flex(), engine);
                network.gradients(images.batch(), dropout)
            });
            assert!(
                (kernels.nats / portable.nats - 1.0).abs() < 1e-5,
                "{config:?}"
            );
            // The whole gradient's norm is the scale: single tensors can be tiny.
            let scale = norm(portable.gradients.iter().flatten().copied());
            for (i, (a, b)) in kernels
                .gradients
                .iter()
                .zip(&portable.gradients)
                .enumerate()
            {
                let difference = norm(a.iter().zip(b).map(|(a, b)| a - b));
                assert!(
                    difference < 1e-4 * scale,
                    "parameter {i}: {difference} of {scale}"
                );
            }
        }
    }
}

/// The kernels take a batch of this many images in two parts: neither the threads that compute them
/// nor the split itself (Burn's own operations have none) can be told from the results.
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
    let run = |threads, engine| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let network = Network::with_engine(config, &parameters, &Device::flex(), engine);
            (
                network.gradients(images.batch(), dropout).gradients,
                network.nats_per_image(images.batch()),
                network.logits(images.batch()),
            )
        })
    };
    let kernels = run(1, Engine::Kernels);
    assert_eq!(kernels, run(3, Engine::Kernels));

    let portable = run(2, Engine::Portable);
    let flat = |gradients: &[Vec<f32>]| gradients.concat();
    let (ours, theirs) = (flat(&kernels.0), flat(&portable.0));
    let difference = norm(ours.iter().zip(&theirs).map(|(a, b)| a - b));
    assert!(difference < 1e-4 * norm(theirs.into_iter()));
    for (a, b) in kernels.1.iter().zip(&portable.1) {
        assert!((a / b - 1.0).abs() < 1e-5);
    }
    assert_eq!(kernels.2.len(), portable.2.len());
}

/// The loss along random directions, which touch every parameter, changes as the gradient says.
#[test]
fn gradients_are_the_slope_of_the_loss() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for config in configs() {
        let images = Images::random(&config, 2, &mut random);
        let mut parameters = parameters(&config, &mut random);
        let nats = |parameters: &[Vec<f32>]| {
            let network = Network::new(&config, parameters, &Device::flex());
            network.nats_per_image(images.batch()).iter().sum::<f64>()
        };
        let network = Network::new(&config, &parameters, &Device::flex());
        let gradients = network.gradients(images.batch(), None).gradients;
        let whole = norm(gradients.iter().flatten().copied());
        for (i, gradient) in gradients.iter().enumerate() {
            // Along the gradient itself the slope is its norm: the largest there is.
            let length = norm(gradient.iter().copied());
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
    for engine in [Engine::Kernels, Engine::Portable] {
        let network = Network::with_engine(&config, &parameters, &Device::flex(), engine);
        let before = network.logits(images.batch());
        let maps = network.feature_maps(images.batch());
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
                };
                let after = network.logits(batch);
                let depend = changed(&before, &after, [8, 8]);
                let later: Vec<(usize, usize)> = (0..8)
                    .flat_map(|r| (0..8).map(move |c| (r, c)))
                    .filter(|&(r, c)| (r, c) > (y, x))
                    .collect();
                assert_eq!(
                    depend, later,
                    "{engine:?}: what depends on pixel ({y}, {x})"
                );

                for (i, (a, b)) in maps.iter().zip(network.feature_maps(batch)).enumerate() {
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
                        assert!(before, "{engine:?}, map {i}: ({r}, {c}) knows ({y}, {x})");
                    }
                }
            }
        }
    }
}
