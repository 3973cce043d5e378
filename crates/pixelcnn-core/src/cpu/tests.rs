//! The engine against the reference on random shapes; and against itself, bit for bit.

use super::*;
use crate::config::Nonlinearity;
use crate::incremental::tests::{Images, configs, parameters};
use crate::network::ParameterKind;
use crate::reference;
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

fn batch(images: &Images) -> Batch<'_> {
    Batch {
        images: &images.levels,
        labels: &images.labels,
    }
}

fn state(parameters: &[Vec<f32>]) -> State {
    let zeros: Arrays = parameters.iter().map(|p| vec![0.0; p.len()]).collect();
    State {
        parameters: parameters.to_vec(),
        average: parameters.to_vec(),
        first: zeros.clone(),
        second: zeros,
    }
}

fn engine(config: &ModelConfig, parameters: &[Vec<f32>]) -> Cpu {
    let mut engine = Cpu::new(config).unwrap();
    engine.load(state(parameters)).unwrap();
    engine.load_weights(parameters).unwrap();
    engine
}

fn widened(arrays: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let widened = |values: &Vec<f32>| values.iter().copied().map(f64::from).collect();
    arrays.iter().map(widened).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Asserts that values differ by less than a share of the length of what they should be.
fn assert_close(what: &str, got: &[f32], want: &[f64], share: f64, length: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let difference = norm(got.iter().zip(want).map(|(a, b)| f64::from(*a) - b));
    assert!(
        difference <= share * length,
        "{what}: {difference} of {length}"
    );
}

fn check(config: &ModelConfig, images: usize, dropout: Option<Dropout>, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, images, &mut random);
    let batch = batch(&images);
    let mut engine = engine(config, &parameters);
    let plain = reference::run(config, &widened(&parameters), batch, None).unwrap();
    let length = |values: &[f64]| norm(values.iter().copied());
    let logits = engine.logits(batch).unwrap();
    assert_close(
        "logits",
        &logits,
        &plain.logits,
        2e-6,
        length(&plain.logits),
    );
    let maps = engine.feature_maps(batch).unwrap();
    assert_eq!(maps.len(), plain.feature_maps.len());
    for (got, want) in maps.iter().zip(&plain.feature_maps) {
        assert_close("feature map", got, want, 2e-6, length(want));
    }
    let nats = engine.nats_per_image(batch).unwrap();
    assert_eq!(nats.len(), plain.nats.len());
    for (got, want) in nats.iter().zip(&plain.nats) {
        assert!((got / want - 1.0).abs() < 1e-5, "{got}, {want}");
    }
    let pixels = engine.nats_per_pixel(batch).unwrap();
    let pixels = pixels.chunks(config.height * config.width);
    for (pixels, nats) in pixels.zip(&nats) {
        assert!((pixels.iter().copied().map(f64::from).sum::<f64>() / nats - 1.0).abs() < 1e-9);
    }

    let dropped = reference::run(config, &widened(&parameters), batch, dropout).unwrap();
    let nats = engine.backward(batch, dropout).unwrap();
    let want: f64 = dropped.nats.iter().sum();
    assert!((nats / want - 1.0).abs() < 1e-5, "{nats}, {want}");
    let gradients = engine.gradients().unwrap();
    // The whole gradient's length is the scale: single ones can be tiny.
    let length = norm(dropped.gradients.iter().flatten().copied());
    for (number, (got, want)) in gradients.iter().zip(&dropped.gradients).enumerate() {
        assert_close(&format!("gradient {number}"), got, want, 1e-4, length);
    }
}

const DROPOUT: Dropout = Dropout {
    rate: 0.4,
    seed: 9,
    first: 0,
};

#[test]
fn every_kind_of_model_is_the_reference() {
    for (seed, config) in configs().into_iter().enumerate() {
        check(&config, 3, Some(DROPOUT), seed as u64);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn every_shape_is_the_reference(
        size in [1..4usize, 1..4usize],
        rgb in any::<bool>(),
        nr_resnet in 1..3usize,
        nr_filters in 1..20usize,
        nr_logistic_mix in 1..4usize,
        nonlinearity in 0..3usize,
        nr_classes in 0..3usize,
        images in 1..4usize,
        seed in any::<u32>(),
    ) {
        let nonlinearities =
            [Nonlinearity::ConcatElu, Nonlinearity::Elu, Nonlinearity::Relu];
        let config = ModelConfig {
            height: 4 * size[0],
            width: 4 * size[1],
            channels: if rgb { 3 } else { 1 },
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity: nonlinearities[nonlinearity],
            nr_classes,
        };
        let dropout = (seed % 2 == 0).then_some(DROPOUT);
        check(&config, images, dropout, seed.into());
    }
}

/// A batch of this many images is taken in several parts: neither the threads that compute them nor
/// the split itself can be told from the results.
#[test]
fn parts_and_threads_do_not_change_the_results() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    for config in &configs()[..2] {
        let pixels = config.height * config.width;
        let images = Images::random(config, 4 * PIXELS / pixels + 7, &mut random);
        let parameters = parameters(config, &mut random);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut engine = engine(config, &parameters);
                let evaluated = (
                    engine.nats_per_image(batch(&images)).unwrap(),
                    engine.logits(batch(&images)).unwrap(),
                );
                let adam = Adam::default();
                let mut nats = Vec::new();
                // Over memory that the step before has left.
                for _ in 0..2 {
                    nats.push(engine.step(batch(&images), Some(DROPOUT), &adam).unwrap());
                }
                engine.backward(batch(&images), Some(DROPOUT)).unwrap();
                let gradients = engine.gradients().unwrap();
                (evaluated, nats, gradients, engine.unload().unwrap())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(3) && one == run(7));

        let mut engine = engine(config, &parameters);
        engine.backward(batch(&images), Some(DROPOUT)).unwrap();
        let got = engine.gradients().unwrap();
        let parameters = widened(&parameters);
        let want = reference::run(config, &parameters, batch(&images), Some(DROPOUT)).unwrap();
        let length = norm(want.gradients.iter().flatten().copied());
        for (got, want) in got.iter().zip(&want.gradients) {
            assert_close("gradient", got, want, 1e-4, length);
        }
        let (nats, logits) = &one.0;
        let want = reference::run(config, &parameters, batch(&images), None).unwrap();
        for (got, want) in nats.iter().zip(&want.nats) {
            assert!((got / want - 1.0).abs() < 1e-5, "{got}, {want}");
        }
        let length = norm(want.logits.iter().copied());
        assert_close("logits", logits, &want.logits, 2e-6, length);
    }
}

/// A step is Adam's on the gradients, and one that cannot be taken leaves the state as it was.
#[test]
fn steps_move_the_state_by_the_gradients() {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let config = &configs()[1];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 5, &mut random);
    let mut engine = engine(config, &parameters);
    let adam = Adam::default();
    assert_eq!(
        engine.update(&adam),
        Err(EngineError::NotLoaded("gradients"))
    );
    let nats = engine.backward(batch(&images), None).unwrap();
    let gradients = engine.gradients().unwrap();
    assert_eq!(engine.step(batch(&images), None, &adam).unwrap(), nats);
    let forgotten = engine.logits(batch(&images));
    assert_eq!(forgotten, Err(EngineError::NotLoaded("weights")));
    let stepped = engine.unload().unwrap();
    assert_eq!(engine.unload(), Err(EngineError::NotLoaded("state")));
    let mut want = state(&parameters);
    for (i, gradient) in gradients.iter().enumerate() {
        let (first, second) = (&mut want.first[i], &mut want.second[i]);
        adam.update(
            &mut want.parameters[i],
            gradient,
            first,
            second,
            &mut want.average[i],
        );
    }
    assert_eq!(stepped, want);

    let mut broken = stepped.clone();
    broken.parameters[2][0] = f32::NAN;
    engine.load(broken.clone()).unwrap();
    let error = engine.step(batch(&images), None, &adam);
    assert_eq!(error, Err(EngineError::NotANumber));
    let after = engine.unload().unwrap();
    assert_eq!(after.average, broken.average);
    assert_eq!(after.first, broken.first);
    engine.load(stepped).unwrap();
    assert!(engine.step(batch(&images), None, &adam).is_ok());
}

/// After it, every layer's output has mean 0 and deviation `init_scale`: initialised again, nothing
/// changes.
#[test]
fn initialisation_is_done_once() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    for config in configs() {
        let images = Images::random(&config, 24, &mut random);
        let layout = Layout::new(&config);
        let mut drawn = parameters(&config, &mut random);
        for (values, parameter) in drawn.iter_mut().zip(&layout.parameters) {
            match parameter.kind {
                ParameterKind::G => values.fill(1.0),
                ParameterKind::B => values.fill(0.0),
                ParameterKind::V | ParameterKind::Hw => {}
            }
        }
        let mut engine = Cpu::new(&config).unwrap();
        let out = engine.initialise(&mut drawn, batch(&images), None).unwrap();
        engine.load_weights(&drawn).unwrap();
        let length = norm(out.iter().copied().map(f64::from));
        let wide: Vec<f64> = out.iter().copied().map(f64::from).collect();
        assert_close(
            "output",
            &engine.logits(batch(&images)).unwrap(),
            &wide,
            1e-4,
            length,
        );
        let once = drawn.clone();
        engine.initialise(&mut drawn, batch(&images), None).unwrap();
        for (parameter, (once, twice)) in layout.parameters.iter().zip(once.iter().zip(&drawn)) {
            for (once, twice) in once.iter().zip(twice) {
                assert!(
                    (once - twice).abs() < 1e-3 * (1.0 + once.abs()),
                    "{}",
                    parameter.name
                );
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let config = &configs()[1];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 2, &mut random);
    let mut engine = Cpu::new(config).unwrap();
    let nothing = EngineError::NotLoaded("weights");
    assert_eq!(engine.logits(batch(&images)), Err(nothing));
    let missing = engine.load_weights(&parameters[..3]);
    assert!(matches!(
        missing,
        Err(EngineError::Parameters { found: 0, .. })
    ));
    engine.load_weights(&parameters).unwrap();
    let refused = |images: &[u8], labels: &[u32]| engine.nats_per_image(Batch { images, labels });
    let (values, dims) = (images.levels.len() - 1, config.dims());
    assert_eq!(
        refused(&images.levels[1..], &images.labels),
        Err(EngineError::Images { values, dims })
    );
    let (labels, found) = (1, 2);
    assert_eq!(
        refused(&images.levels, &images.labels[..1]),
        Err(EngineError::Labels {
            labels,
            images: found
        })
    );
    let (class, nr_classes) = (3, 3);
    assert_eq!(
        refused(&images.levels, &[0, 3]),
        Err(EngineError::Class { class, nr_classes })
    );
    assert_eq!(refused(&[], &[]), Ok(vec![]));
    let odd = ModelConfig {
        height: 6,
        ..config.clone()
    };
    assert!(Cpu::new(&odd).is_err());
}
