//! The engine against the reference, and against itself, bit for bit.

use std::sync::Arc;

use super::*;
use crate::Augmentation;
use crate::ranks::Alone;
use crate::reference;
use crate::suite::{self, *};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

fn make(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(Cpu::new(config)?))
}

fn rounded(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(Cpu::in_precision(config, Precision::Bf16)?))
}

fn all() -> Vec<ModelConfig> {
    [configs(), configs_of_codes(), configs_of_energy()].concat()
}

#[test]
fn every_kind_of_model_is_the_reference() {
    every_kind_is_the_reference(make, &all());
}

#[test]
fn every_shape_of_model_is_the_reference() {
    every_shape_is_the_reference(make);
}

#[test]
fn bf16_is_near_the_reference() {
    let configs = [configs(), configs_of_codes()].concat();
    suite::bf16_is_near_the_reference(rounded, make, &configs);
}

#[test]
fn steps_are_the_optimizers() {
    steps_move_the_state_by_the_gradients(make);
    steps_move_the_state_by_the_gradients(rounded);
}

#[test]
fn a_step_is_its_parts() {
    suite::a_step_is_its_parts(make);
}

#[test]
fn initialised_again_nothing_changes() {
    initialisation_is_done_once(make, &all());
}

#[test]
fn what_is_not_the_models_is_refused() {
    what_does_not_fit_is_refused(make);
}

#[test]
fn resized_it_is_one_of_that_size() {
    suite::resized_it_is_one_of_that_size(make);
}

#[test]
fn ranks_do_not_change_the_results() {
    let configs = [&configs()[..3], &configs_of_energy()[..1]].concat();
    results_are_the_same_for_any_number(make, &configs);
}

#[test]
fn no_number_is_found_by_all() {
    no_number_is_found_by_all_ranks(make);
}

#[test]
fn a_share_of_another_size_is_refused() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let config = &configs()[0];
    let images = Images::random(config, 3, &mut random);
    let mut engine = loaded(make, config, &parameters(config, &mut random));
    let sharing = Sharing::new(Arc::new(Alone), 4, 2).unwrap();
    engine.share(Some(sharing)).unwrap();
    assert_eq!(
        engine.backward(batch(&images), None),
        Err(EngineError::Share {
            images: 3,
            share: 4
        })
    );
}

/// A batch of this many images is taken in several parts: neither the threads that compute them nor
/// the split itself can be told from the results.
#[test]
fn parts_and_threads_do_not_change_the_results() {
    let mut random = ChaCha8Rng::seed_from_u64(4);
    let configs = [
        &configs()[..2],
        &configs_of_codes()[1..2],
        &configs_of_energy()[1..],
    ]
    .concat();
    for config in &configs {
        let pixels = config.height * config.width;
        let images = Images::random(config, 4 * PIXELS / pixels + 7, &mut random);
        let parameters = parameters(config, &mut random);
        let run = |make: Make, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut engine = loaded(make, config, &parameters);
                let evaluated = (
                    engine.nats_per_image(batch(&images)).unwrap(),
                    engine.logits(batch(&images)).unwrap(),
                );
                let update = muon();
                let mut nats = Vec::new();
                // Over memory that the step before has left.
                for _ in 0..2 {
                    nats.push(engine.step(batch(&images), Some(DROPOUT), &update).unwrap());
                }
                engine.backward(batch(&images), Some(DROPOUT)).unwrap();
                let gradients = engine.gradients().unwrap();
                (evaluated, nats, gradients, engine.unload().unwrap())
            })
        };
        let one = run(make, 1);
        assert!([2, 3, 7].iter().all(|threads| one == run(make, *threads)));
        let of_bf16 = run(rounded, 1);
        assert!(one != of_bf16 && of_bf16 == run(rounded, 3));

        let mut engine = loaded(make, config, &parameters);
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

/// One large image is evaluated band by band: the bits are those of the whole, the memory is not.
#[test]
fn bands_do_not_change_the_results() {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    for config in &[configs(), configs_of_codes()].concat() {
        if config.augmentation == Augmentation::Symmetries {
            continue;
        }
        // The last band is shorter than the others, and no multiple of `BAND_ROWS`.
        let config = ModelConfig {
            height: 84,
            width: 132,
            ..config.clone()
        };
        let images = Images::random(&config, 2, &mut random);
        let mut engine = Cpu::new(&config).unwrap();
        let parameters = parameters(&config, &mut random);
        engine.load_weights(&parameters).unwrap();

        let parts = engine.parts(batch(&images), 0..2, PIXELS);
        let bands: Vec<usize> = parts.iter().map(|part| engine.bands(*part).len()).collect();
        // Attention sees all of the image above.
        let whole = config.attends() || config.nr_coarse_codes > 0;
        assert_eq!(bands, if whole { [1, 1] } else { [3, 3] });
        let whole = |part: &Part| {
            let mut execution = engine.execution(&engine.evaluation, &engine.weights, *part);
            execution.memory = Memory::default();
            execution.forward();
            execution.values(engine.evaluation.logits).to_vec()
        };
        let whole: Vec<f32> = parts.iter().flat_map(whole).collect();
        // Also over memory that is left from before.
        for _ in 0..2 {
            assert!(engine.logits(batch(&images)).unwrap() == whole);
        }

        let nats = engine.nats_per_image(batch(&images)).unwrap();
        let want = Likelihood::of(&config).nats_per_pixel(&images.levels, &whole);
        assert_eq!(nats, per_image(84 * 132, &want));
    }
}
