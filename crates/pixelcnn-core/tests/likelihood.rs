//! The likelihood against the original's numbers and against its plain double-precision twin.

use pixelcnn_core::likelihood::{ChannelMixture, Mixture, from_level, reference, to_level};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::SafeTensors;

const GOLDEN: [(&str, usize, &[u8]); 3] = [
    (
        "mix10_scale1",
        10,
        include_bytes!("golden/likelihood/mix10_scale1.safetensors"),
    ),
    (
        "mix10_scale10",
        10,
        include_bytes!("golden/likelihood/mix10_scale10.safetensors"),
    ),
    (
        "mix5_scale3",
        5,
        include_bytes!("golden/likelihood/mix5_scale3.safetensors"),
    ),
];

struct Golden<'a>(SafeTensors<'a>);

impl Golden<'_> {
    fn values<const BYTES: usize, T>(&self, name: &str, value: fn([u8; BYTES]) -> T) -> Vec<T> {
        let (chunks, rest) = self.0.tensor(name).unwrap().data().as_chunks();
        assert!(rest.is_empty());
        chunks.iter().map(|bytes| value(*bytes)).collect()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.values(name, f32::from_le_bytes)
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.values(name, f64::from_le_bytes)
    }
}

fn each_golden(test: impl Fn(&str, Mixture, Golden)) {
    for (name, components, bytes) in GOLDEN {
        let mixture = Mixture {
            channels: 3,
            components,
        };
        let golden = Golden(SafeTensors::deserialize(bytes).unwrap());
        test(name, mixture, golden);
    }
}

/// Uniform draws between -1 and 1.
fn uniform(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() as i32) as f32 / 2f32.powi(31)
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

#[test]
fn nats_are_the_originals() {
    each_golden(|name, mixture, golden| {
        let (x, logits) = (golden.f32("x_f32"), golden.f32("logits"));
        let want = golden.f64("nats_per_image_f64");
        let pixels = 64;
        for (got, want) in mixture
            .nats_per_image(pixels, &x, &logits)
            .iter()
            .zip(&want)
        {
            assert!((got - want).abs() <= 2e-7 * want, "{name}: {got}, {want}");
        }
        // The twin agrees with it far more closely.
        let width = mixture.logits_per_pixel();
        for (image, want) in want.iter().enumerate() {
            let got: f64 = (image * pixels..(image + 1) * pixels)
                .map(|pixel| {
                    let x = widen(&x[3 * pixel..3 * (pixel + 1)]);
                    let logits = widen(&logits[width * pixel..width * (pixel + 1)]);
                    reference::nats(mixture, &x, &logits)
                })
                .sum();
            assert!((got - want).abs() <= 1e-8 * want, "{name}: {got}, {want}");
        }
    });
}

#[test]
fn gradients_are_the_originals() {
    each_golden(|name, mixture, golden| {
        let (x, logits) = (golden.f32("x_f32"), golden.f32("logits"));
        let (theirs, exact) = (golden.f32("grad_logits_f32"), golden.f64("grad_logits_f64"));
        let mut ours = vec![f32::NAN; logits.len()];
        let nats = mixture.nats_and_gradient(64, &x, &logits, &mut ours);
        assert_eq!(nats, mixture.nats_per_image(64, &x, &logits));
        let distance = |from: &[f32]| -> f64 {
            let squares = from
                .iter()
                .zip(&exact)
                .map(|(a, b)| (f64::from(*a) - b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let norm = exact.iter().map(|x| x * x).sum::<f64>().sqrt();
        // What is left comes from rounding x - mean, which narrow logistics magnify.
        assert!(distance(&ours) <= 5e-6 * norm, "{name}");
        assert!(distance(&ours) <= distance(&theirs), "{name}");
    });
}

#[test]
fn samples_are_the_originals() {
    each_golden(|name, mixture, golden| {
        let logits = golden.f32("logits");
        let (u_mix, u_logistic) = (golden.f32("u_mix"), golden.f32("u_logistic"));
        let component = golden.values("sample_component", i32::from_le_bytes);
        let (theirs, exact) = (golden.f32("sample_f32"), golden.f64("sample_f64"));
        let (width, nr_mix) = (mixture.logits_per_pixel(), mixture.components);
        for pixel in 0..component.len() {
            let mut logits = logits[pixel * width..(pixel + 1) * width].to_vec();
            let u_mix = &u_mix[pixel * nr_mix..(pixel + 1) * nr_mix];
            let u_logistic = &u_logistic[3 * pixel..3 * (pixel + 1)];
            let sample = sampled(mixture, &logits, u_mix, u_logistic, 1.0);
            for channel in 0..3 {
                let (got, want) = (sample[channel] as f32, exact[3 * pixel + channel]);
                let error = (f64::from(got) - want).abs();
                let their_error = (f64::from(theirs[3 * pixel + channel]) - want).abs();
                assert!(error <= their_error.max(1e-7), "{name}: {got}, {want}");
            }
            // The chosen component shows when every other's means are moved far away.
            for (i, value) in logits[nr_mix..].iter_mut().enumerate() {
                if (i / nr_mix) % 3 == 0 && i % nr_mix != component[pixel] as usize {
                    *value = f32::NAN;
                }
            }
            assert_eq!(sampled(mixture, &logits, u_mix, u_logistic, 1.0), sample);
        }
    });
}

/// Draws the channels of a pixel.
fn sampled(
    mixture: Mixture,
    logits: &[f32],
    u_mix: &[f32],
    u_logistic: &[f32],
    temperature: f32,
) -> Vec<f64> {
    let component = mixture.component(logits, u_mix, temperature);
    let mut x = Vec::new();
    for &u in u_logistic {
        let value = mixture.draw(logits, component, &x, u, temperature);
        x.push(value);
    }
    x
}

/// Random pixels and logits around which the branches meet: values at both ends, log-scales below
/// the floor, bins with hardly any mass.
fn random_case(mixture: Mixture, pixels: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let x = (0..pixels * mixture.channels)
        .map(|_| from_level(to_level((1.3 * uniform(&mut random)).clamp(-1.0, 1.0))))
        .collect();
    let scale = [0.5, 2.0, 8.0][seed as usize % 3];
    let logits = (0..pixels * mixture.logits_per_pixel())
        .map(|_| scale * uniform(&mut random))
        .collect();
    (x, logits)
}

#[test]
fn every_shape_agrees_with_the_twin() {
    for (seed, (channels, components, pixels)) in [
        (1, 1, 1),
        (1, 10, 40),
        (1, 5, 17),
        (3, 1, 16),
        (3, 4, 300),
        (3, 10, 33),
        (3, 3, 7),
    ]
    .into_iter()
    .enumerate()
    {
        let mixture = Mixture {
            channels,
            components,
        };
        let (x, logits) = random_case(mixture, pixels, seed as u64);
        let width = mixture.logits_per_pixel();
        let mut gradient = vec![f32::NAN; logits.len()];
        mixture.nats_and_gradient(1, &x, &logits, &mut gradient);
        let nats = mixture.nats_per_pixel(&x, &logits);
        for pixel in 0..pixels {
            let x = widen(&x[channels * pixel..channels * (pixel + 1)]);
            let mut logits = widen(&logits[width * pixel..width * (pixel + 1)]);
            let want = reference::nats(mixture, &x, &logits);
            let got = f64::from(nats[pixel]);
            let error = (got - want).abs();
            assert!(error <= 4e-6 * want.abs().max(1.0), "{got}, {want}");
            let mut largest = 1.0f64;
            for i in 0..width {
                let step = 1e-5;
                let at = logits[i];
                let mut nats_at = |value| {
                    logits[i] = value;
                    reference::nats(mixture, &x, &logits)
                };
                let (below, above) = (nats_at(at - step), nats_at(at + step));
                logits[i] = at;
                let want = (above - below) / (2.0 * step);
                let got = f64::from(gradient[pixel * width + i]);
                largest = largest.max(want.abs());
                let error = (got - want).abs();
                assert!(
                    error <= 2e-5 * largest,
                    "logit {i} of {width}: {got} for {want}, largest {largest}"
                );
            }
        }
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_threads() {
    let mixture = Mixture {
        channels: 3,
        components: 5,
    };
    let (x, logits) = random_case(mixture, 1500, 1);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let mut gradient = vec![0.0; logits.len()];
            let nats = mixture.nats_and_gradient(500, &x, &logits, &mut gradient);
            (nats, gradient)
        })
    };
    assert_eq!(run(1), run(3));
}

/// The probabilities of one channel's 256 values, where the other channels are certain to be 255:
/// their means lie far beyond it.
#[test]
fn probabilities_sum_to_one() {
    for (channels, summed) in [(1, 0), (3, 0), (3, 1), (3, 2)] {
        let mixture = Mixture {
            channels,
            components: 4,
        };
        for seed in 0..6 {
            let (_, mut logits) = random_case(mixture, 1, seed);
            for channel in (0..channels).filter(|channel| *channel != summed) {
                let mean = 4 + channel * 3 * 4;
                logits[mean..mean + 4].fill(100.0);
                logits[mean + 4..mean + 8].fill(0.0);
            }
            let x: Vec<f32> = (0..=255u8)
                .flat_map(|level| {
                    let mut x = vec![1.0; channels];
                    x[summed] = from_level(level);
                    x
                })
                .collect();
            let nats = mixture.nats_per_pixel(&x, &logits.repeat(256));
            let sum: f64 = nats.iter().map(|nats| f64::from(-nats).exp()).sum();
            assert!((sum - 1.0).abs() < 1e-4, "sum {sum}, seed {seed}");
        }
    }
}

#[test]
fn nan_is_not_hidden() {
    let mixture = Mixture {
        channels: 3,
        components: 2,
    };
    let (x, logits) = random_case(mixture, 1, 0);
    for i in 0..logits.len() {
        let mut logits = logits.clone();
        logits[i] = f32::NAN;
        let nats = mixture.nats_per_pixel(&x, &logits)[0];
        assert!(nats.is_nan(), "logit {i}: {nats}");
    }
}

#[test]
fn temperature_zero_takes_the_likeliest_mean() {
    let mixture = Mixture {
        channels: 1,
        components: 2,
    };
    let logits = [0.0, 1.0, 0.5, -0.25, 1.0, 1.0];
    let sample = sampled(mixture, &logits, &[0.999, 0.001], &[0.9], 0.0);
    assert_eq!(sample[0], -0.25);
}

#[test]
fn channels_one_by_one_are_the_whole_pixel() {
    for (seed, (channels, components)) in [(3, 10), (3, 1), (1, 5)].into_iter().enumerate() {
        let mixture = Mixture {
            channels,
            components,
        };
        let (x, logits) = random_case(mixture, 60, seed as u64);
        let nats = mixture.nats_per_pixel(&x, &logits);
        let pixels = x.chunks_exact(channels);
        let pixels = pixels.zip(logits.chunks_exact(mixture.logits_per_pixel()));
        for ((x, logits), nats) in pixels.zip(nats) {
            let (mut sum, mut one) = (0.0, ChannelMixture::default());
            for channel in 0..channels {
                mixture.next_channel(logits, &x[..channel], &mut one);
                let largest = one.log_weights.iter().copied().fold(f32::MIN, f32::max);
                assert_eq!(largest, 0.0);
                sum += one.log_prob(x[channel]);
            }
            assert!(
                (sum + nats).abs() < 1e-4 * (1.0 + nats.abs()),
                "{sum}, {nats}"
            );
        }
    }
}

#[test]
fn levels_round_trip() {
    for level in 0..=255 {
        assert_eq!(to_level(from_level(level)), level);
    }
    assert_eq!(
        [to_level(-1.0), to_level(1.0), to_level(9.0)],
        [0, 255, 255]
    );
    assert_eq!(to_level(from_level(7) + 0.49 / 127.5), 7);
    assert_eq!(to_level(from_level(7) + 0.51 / 127.5), 8);
}
