//! What every engine must do, against the reference: a function for each, to be called by a test.

pub mod gpus;
mod models;
pub mod ranks;

use pixelcnn_core::config::MAX_HEADS;
use pixelcnn_core::engine::{Batch, Engine, EngineError, State, Update};
use pixelcnn_core::kernels::adam::Adam;
use pixelcnn_core::kernels::muon::Muon;
use pixelcnn_core::kernels::pointwise::Dropout;
use pixelcnn_core::network::{Layout, Parameter, ParameterKind};
use pixelcnn_core::ranks::Sharing;
use pixelcnn_core::{Augmentation, ModelConfig, Nonlinearity, reference};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

pub use models::{Images, configs, configs_of_codes, configs_of_energy, parameters};

pub fn batch(images: &Images) -> Batch<'_> {
    Batch {
        images: &images.levels,
        labels: &images.labels,
        augmentations: &images.augmentations,
    }
}

/// As images that were not transformed.
pub fn as_they_are(images: &Images) -> Batch<'_> {
    Batch {
        augmentations: &[],
        ..batch(images)
    }
}

pub fn state(parameters: &[Vec<f32>]) -> State {
    let zeros: Vec<Vec<f32>> = parameters.iter().map(|p| vec![0.0; p.len()]).collect();
    State {
        parameters: parameters.to_vec(),
        average: parameters.to_vec(),
        first: zeros.clone(),
        second: zeros,
    }
}

/// A step by Muon and Adam, that moves the averages too.
pub fn muon() -> Update {
    Update {
        adam: Adam {
            polyak_decay: 0.5,
            ..Adam::default()
        },
        muon: Some(Muon {
            learning_rate: 0.02,
        }),
    }
}

/// Makes an engine for a model.
pub type Make = fn(&ModelConfig) -> Result<Box<dyn Engine>, EngineError>;

/// An engine that can be trained and evaluated.
pub fn loaded(make: Make, config: &ModelConfig, parameters: &[Vec<f32>]) -> Box<dyn Engine> {
    let mut engine = make(config).unwrap();
    engine.load(state(parameters)).unwrap();
    engine.load_weights(parameters).unwrap();
    engine
}

pub fn widened(arrays: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let widened = |values: &Vec<f32>| values.iter().copied().map(f64::from).collect();
    arrays.iter().map(widened).collect()
}

pub fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// Asserts that values differ by less than a share of the length of what they should be.
pub fn assert_close(what: &str, got: &[f32], want: &[f64], share: f64, length: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let difference = norm(got.iter().zip(want).map(|(a, b)| f64::from(*a) - b));
    assert!(
        difference <= share * length,
        "{what}: {difference} of {length}"
    );
}

/// An engine's forward and backward pass are the reference's.
fn check(make: Make, config: &ModelConfig, images: usize, dropout: Option<Dropout>, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, images, &mut random);
    let batch = batch(&images);
    let mut engine = loaded(make, config, &parameters);
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
        // A map of few values can be what is left of larger ones.
        let least = 0.1 * (want.len() as f64).sqrt();
        assert_close("feature map", got, want, 2e-6, length(want).max(least));
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

pub const DROPOUT: Dropout = Dropout {
    rate: 0.4,
    seed: 9,
    first: 0,
};

/// Small models of some kinds.
pub fn every_kind_is_the_reference(make: Make, configs: &[ModelConfig]) {
    for (seed, config) in configs.iter().enumerate() {
        check(make, config, 3, Some(DROPOUT), seed as u64);
    }
}

/// With blocks whose convolutions multiply numbers of 7 bits behind the point, everything is within a few
/// percent, and not what it is without.
pub fn bf16_is_near_the_reference(rounded: Make, exact: Make, configs: &[ModelConfig]) {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    for config in configs {
        let parameters = parameters(config, &mut random);
        let images = Images::random(config, 4, &mut random);
        let batch = batch(&images);
        let mut engine = loaded(rounded, config, &parameters);
        let wide = widened(&parameters);
        let want = reference::run(config, &wide, batch, None).unwrap();
        let logits = engine.logits(batch).unwrap();
        let length = norm(want.logits.iter().copied());
        assert_close("logits", &logits, &want.logits, 1e-2, length);
        let exact = loaded(exact, config, &parameters);
        assert_ne!(exact.logits(batch).unwrap(), logits);

        let nats = engine.backward(batch, Some(DROPOUT)).unwrap();
        let gradients = engine.gradients().unwrap();
        let want = reference::run(config, &wide, batch, Some(DROPOUT)).unwrap();
        let wanted: f64 = want.nats.iter().sum();
        assert!((nats / wanted - 1.0).abs() < 3e-3, "{nats}, {wanted}");
        let length = norm(want.gradients.iter().flatten().copied());
        for (got, want) in gradients.iter().zip(&want.gradients) {
            assert_close("gradient", got, want, 2e-2, length);
        }
    }
}

/// Models of random shapes.
pub fn every_shape_is_the_reference(make: Make) {
    let nonlinearities = [
        Nonlinearity::ConcatElu,
        Nonlinearity::Elu,
        Nonlinearity::Relu,
    ];
    let shapes = (
        [1..13usize, 1..13usize],
        any::<bool>(),
        1..3usize,
        1..20usize,
        1..4usize,
    );
    let kind = ([0..3usize, 0..3usize, 0..3usize], any::<bool>());
    let rest = (kind, 1..4usize, any::<u32>());
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 12,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let ran = runner.run(&(shapes, rest), |(shape, (kind, images, seed))| {
        let ([f, nr_classes, nr_channel_resnet], flips) = kind;
        let (size, rgb, nr_resnet, nr_filters, nr_logistic_mix) = shape;
        // At random resolutions, as many heads as the filters allow.
        let heads = (1..=MAX_HEADS).rfind(|heads| nr_filters.is_multiple_of(*heads));
        let attention = [1, 2, 4].map(|bit| heads.filter(|_| seed & bit > 0).unwrap_or(0));
        let config = ModelConfig {
            height: size[0],
            width: size[1],
            channels: if rgb { 3 } else { 1 },
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity: nonlinearities[f],
            nr_classes,
            nr_channel_resnet,
            augmentation: if flips {
                Augmentation::Flips
            } else {
                Augmentation::None
            },
            attention,
            nr_codes: 0,
            nr_coarse_codes: 0,
            energy_distance: false,
        };
        let dropout = (seed % 2 == 0).then_some(DROPOUT);
        check(make, &config, images, dropout, seed.into());
        Ok(())
    });
    ran.unwrap_or_else(|failure| panic!("{failure}"));
}

/// A step is the optimizer's on the gradients, and one that cannot be taken leaves the state as it was.
pub fn steps_move_the_state_by_the_gradients(make: Make) {
    let configs = configs();
    a_step_moves_the_state_by_the_gradients(make, &configs[1], &Update::default());
    // Matrices that are wide, that are outside of blocks, and that are not moved.
    for config in [&configs[2], &configs[11], &configs_of_codes()[1]] {
        a_step_moves_the_state_by_the_gradients(make, config, &muon());
    }
}

fn a_step_moves_the_state_by_the_gradients(make: Make, config: &ModelConfig, update: &Update) {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 5, &mut random);
    let mut engine = loaded(make, config, &parameters);
    assert_eq!(
        engine.update(update),
        Err(EngineError::NotLoaded("gradients"))
    );
    let nats = engine.backward(batch(&images), None).unwrap();
    let gradients = engine.gradients().unwrap();
    assert_eq!(engine.step(batch(&images), None, update).unwrap(), nats);
    let forgotten = engine.logits(batch(&images));
    assert_eq!(forgotten, Err(EngineError::NotLoaded("weights")));
    let stepped = engine.unload().unwrap();
    assert_eq!(engine.unload(), Err(EngineError::NotLoaded("state")));
    let want = updated(config, &parameters, gradients, update);
    let pairs = |a: &State, b: &State| {
        let arrays = |state: &State| {
            let State {
                parameters,
                average,
                first,
                second,
            } = state.clone();
            [parameters, average, first, second].concat().concat()
        };
        arrays(a).into_iter().zip(arrays(b)).collect::<Vec<_>>()
    };
    // Muon magnifies the rounding of its sums.
    let tolerance = if update.muon.is_some() { 1e-3 } else { 1e-6 };
    for (got, want) in pairs(&stepped, &want) {
        assert!(
            (got - want).abs() <= tolerance * (1e-3 + want.abs()),
            "{got}, {want}"
        );
    }

    let mut broken = stepped.clone();
    broken.parameters[2][0] = f32::NAN;
    engine.load(broken.clone()).unwrap();
    let error = engine.step(batch(&images), None, update);
    assert_eq!(error, Err(EngineError::NotANumber));
    let after = engine.unload().unwrap();
    assert_eq!(after.average, broken.average);
    assert_eq!(after.first, broken.first);
    engine.load(stepped).unwrap();
    assert!(engine.step(batch(&images), None, update).is_ok());
}

/// What a step makes of the parameters, the first one of a training.
fn updated(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    mut gradients: Vec<Vec<f32>>,
    update: &Update,
) -> State {
    let mut state = state(parameters);
    let layout = Layout::new(config);
    let shape = |i: usize| layout.matrices().find(|(number, _)| *number == i);
    for (i, gradient) in gradients.iter_mut().enumerate() {
        let (parameter, average) = (&mut state.parameters[i], &mut state.average[i]);
        let (first, second) = (&mut state.first[i], &mut state.second[i]);
        match (update.muon, shape(i)) {
            (Some(muon), Some((_, shape))) => {
                let rates = update.adam.rates();
                muon.update(rates, shape, parameter, gradient, first, average);
            }
            _ => {
                let adam = update.adam;
                adam.update(parameter, gradient, first, second, average);
            }
        }
    }
    state
}

/// After it, every layer's output has mean 0 and deviation `init_scale`: initialised again, nothing
/// changes.
pub fn initialisation_is_done_once(make: Make, configs: &[ModelConfig]) {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    // At the coarsest resolution nothing varies in images of a few pixels.
    for config in configs.iter().filter(|config| config.height >= 4) {
        let images = Images::random(config, 24, &mut random);
        let layout = Layout::new(config);
        let mut drawn = parameters(config, &mut random);
        for (values, parameter) in drawn.iter_mut().zip(&layout.parameters) {
            match parameter.kind {
                ParameterKind::G => values.fill(1.0),
                ParameterKind::B => values.fill(0.0),
                ParameterKind::V | ParameterKind::Hw => {}
            }
        }
        let mut engine = make(config).unwrap();
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

/// What is not the model's is refused, and whoever has nothing says so.
pub fn what_does_not_fit_is_refused(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let config = &configs()[1];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 2, &mut random);
    let mut engine = make(config).unwrap();
    let nothing = EngineError::NotLoaded("weights");
    assert_eq!(engine.logits(batch(&images)), Err(nothing));
    let missing = engine.load_weights(&parameters[..3]);
    assert!(matches!(
        missing,
        Err(EngineError::Parameters { found: 0, .. })
    ));
    engine.load_weights(&parameters).unwrap();
    let refused = |images: &[u8], labels: &[u32]| {
        engine.nats_per_image(Batch {
            images,
            labels,
            ..Batch::default()
        })
    };
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
    let of_codes = &configs_of_codes()[1];
    let mut codes = Images::random(of_codes, 2, &mut random);
    let mut engine = make(of_codes).unwrap();
    let parameters = models::parameters(of_codes, &mut random);
    engine.load_weights(&parameters).unwrap();
    assert!(engine.nats_per_image(batch(&codes)).is_ok());
    // Its own code, that of the coarser map, and more than a byte.
    for (byte, value, code, count) in [(0, 11, 11, 11), (2, 7, 7, 7), (1, 1, 256, 11)] {
        codes.levels[..4].fill(0);
        codes.levels[byte] = value;
        let refused = engine.nats_per_image(batch(&codes));
        assert_eq!(refused, Err(EngineError::Code { code, codes: count }));
    }
    let empty = ModelConfig {
        height: 0,
        ..config.clone()
    };
    assert!(make(&empty).is_err());
}

/// Resized, an engine is the one of that size, with the same weights and state.
pub fn resized_it_is_one_of_that_size(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let config = &configs()[0];
    let parameters = parameters(config, &mut random);
    let mut engine = loaded(make, config, &parameters);
    for size in [[7, 5], [16, 3], [1, 1], [config.height, config.width]] {
        let resized = config.resized(size);
        let images = Images::random(&resized, 3, &mut random);
        engine.resize(size).unwrap();
        assert_eq!(*engine.config(), resized);
        let mut made = loaded(make, &resized, &parameters);
        let want = made.logits(batch(&images)).unwrap();
        assert_eq!(engine.logits(batch(&images)).unwrap(), want);
        let step = |engine: &mut dyn Engine| {
            let nats = engine.step(batch(&images), None, &Update::default());
            let after = engine.unload().unwrap();
            engine.load(state(&parameters)).unwrap();
            engine.load_weights(&parameters).unwrap();
            (nats.unwrap(), after)
        };
        assert_eq!(step(&mut *engine), step(&mut *made));
    }
    for size in [[0, 4], [4, 1 << 20]] {
        assert!(matches!(engine.resize(size), Err(EngineError::Config(_))));
    }
}

/// The same shards give the same bits on any number of ranks, and one shard those of a batch that is
/// not shared; more of them differ in rounding alone.
pub fn results_are_the_same_for_any_number(make: Make, configs: &[ModelConfig]) {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    for (number, config) in configs.iter().enumerate() {
        let update = &match number {
            1 => muon(),
            _ => Update::default(),
        };
        let images = &Images::random(config, 11, &mut random);
        let parameters = parameters(config, &mut random);
        let stepped = |count: usize, shards: usize| {
            let outcomes = ranks::side_by_side(count, |ranks| {
                let mut engine = loaded(make, config, &parameters);
                let sharing = Sharing::new(ranks, 11, shards).unwrap();
                let own = sharing.images();
                engine.share(Some(sharing)).unwrap();
                let batch = batch(images).part(config, own);
                let step = |_| engine.step(batch, Some(DROPOUT), update).unwrap();
                let nats: Vec<f64> = (0..2).map(step).collect();
                (nats, engine.unload().unwrap())
            });
            assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]));
            outcomes[0].clone()
        };
        let want = stepped(1, 8);
        for count in [2, 4, 8] {
            assert_eq!(stepped(count, 8), want, "{count} ranks");
        }
        let mut engine = loaded(make, config, &parameters);
        let mut step = || engine.step(batch(images), Some(DROPOUT), update).unwrap();
        let nats = [step(), step()];
        let whole = stepped(1, 1);
        assert_eq!(whole.0, nats);
        assert_eq!(whole.1, engine.unload().unwrap());
        assert!((whole.0[1] / want.0[1] - 1.0).abs() < 1e-5);
    }
}

/// A class that only one rank's images have is enough, and no state is touched.
pub fn no_number_is_found_by_all_ranks(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let config = &configs()[1];
    let mut parameters = parameters(config, &mut random);
    let images = Images::random(config, 4, &mut random);
    let layout = Layout::new(config);
    let hw = |parameter: &Parameter| parameter.kind == ParameterKind::Hw;
    let hw = layout.parameters.iter().position(hw).unwrap();
    let of_class_1 = parameters[hw].len() / config.nr_classes;
    parameters[hw][of_class_1] = f32::NAN;
    let (parameters, images) = (&parameters, &images);
    let states = ranks::side_by_side(2, |ranks| {
        let mut engine = make(config).unwrap();
        engine.load(state(parameters)).unwrap();
        let rank = ranks.rank();
        let sharing = Sharing::new(ranks, 4, 2).unwrap();
        let own = sharing.images();
        engine.share(Some(sharing)).unwrap();
        let batch = Batch {
            labels: &[rank as u32; 2],
            ..batch(images).part(config, own)
        };
        let stepped = engine.step(batch, None, &Update::default());
        assert_eq!(stepped, Err(EngineError::NotANumber), "rank {rank}");
        engine.unload().unwrap()
    });
    for state in states {
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!((state.parameters.iter().zip(parameters)).all(|(a, b)| same(a, b)));
    }
}

/// A step is its parts, taken for the first time, for the second and after another state; and the
/// same bits again.
pub fn a_step_is_its_parts(make: Make) {
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let config = &configs()[1];
    let parameters = parameters(config, &mut random);
    let images = Images::random(config, 5, &mut random);
    let batch = batch(&images);
    let run = |whole: bool| {
        let mut engine = make(config).unwrap();
        engine.load(state(&parameters)).unwrap();
        let mut nats = Vec::new();
        for step in 1..6 {
            let dropout = (step != 4).then_some(Dropout {
                seed: step,
                ..DROPOUT
            });
            let mut update = muon();
            update.adam.step = step;
            nats.push(match whole {
                true => engine.step(batch, dropout, &update).unwrap(),
                false => {
                    let nats = engine.backward(batch, dropout).unwrap();
                    engine.update(&update).unwrap();
                    nats
                }
            });
            if step == 3 {
                let state = engine.unload().unwrap();
                engine.load(state).unwrap();
            }
        }
        (nats, engine.unload().unwrap())
    };
    let whole = run(true);
    assert!(whole == run(false) && whole == run(true));
    assert!(whole.0.windows(2).all(|nats| nats[0] != nats[1]));
}
