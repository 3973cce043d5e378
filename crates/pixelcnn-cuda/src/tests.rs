//! The engine on the emulator: the same tests as every engine's.

use std::sync::Arc;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::engine::{Batch, Engine, EngineError, Update};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::Precision;
use crate::emulator::{self, Emulator};
use crate::engine::Cuda;
use crate::gpu::SUMS;
use crate::raster::evaluator_on;
use crate::suite;

fn on(bytes: usize, precision: Precision, config: &ModelConfig) -> Result<Cuda, EngineError> {
    let emulator: Arc<Emulator> = Emulator::new(bytes, precision);
    Cuda::on(emulator, config)
}

fn make(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(on(1 << 30, Precision::F32, config)?))
}

fn kinds() -> Vec<ModelConfig> {
    [suite::configs(), suite::configs_of_codes()].concat()
}

/// The engine has no energy distance.
#[test]
fn what_it_cannot_do_is_said() {
    for config in suite::configs_of_energy() {
        let Err(EngineError::Device(reason)) = make(&config) else {
            panic!("{config:?}");
        };
        assert!(reason.contains("energy distance"), "{reason}");
    }
}

#[test]
fn every_kind_of_model_is_the_reference() {
    if !emulator::can_run() {
        return;
    }
    suite::every_kind_is_the_reference(make, &kinds());
}

#[test]
fn every_shape_of_model_is_the_reference() {
    if !emulator::can_run() {
        return;
    }
    suite::every_shape_is_the_reference(make);
}

#[test]
fn steps_are_the_optimizers() {
    if !emulator::can_run() {
        return;
    }
    suite::steps_move_the_state_by_the_gradients(make);
}

/// Whichever branch is the faster one.
#[test]
fn steps_on_two_branches_give_the_same_bits() {
    if !emulator::can_run() {
        return;
    }
    let mut random = ChaCha8Rng::seed_from_u64(19);
    for (number, config) in kinds().into_iter().enumerate() {
        // What Muon borrows, the branches are done with.
        let update = match number {
            1 => suite::muon(),
            _ => Update::default(),
        };
        let parameters = suite::parameters(&config, &mut random);
        let images = suite::Images::random(&config, 3, &mut random);
        let batch = suite::batch(&images);
        let stepped = |late, pace| {
            let emulator = Emulator::with_late_branch(1 << 30, Precision::F32, late, pace);
            let mut engine = Cuda::on(emulator, &config).unwrap();
            engine.load(suite::state(&parameters)).unwrap();
            let step = |_| engine.step(batch, Some(suite::DROPOUT), &update).unwrap();
            let nats: Vec<f64> = (0..2).map(step).collect();
            (nats, engine.unload().unwrap())
        };
        let want = stepped(None, 0);
        for (late, pace) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            assert_eq!(stepped(Some(late), pace), want);
        }
    }
}

#[test]
fn ranks_do_not_change_the_results() {
    if !emulator::can_run() {
        return;
    }
    suite::results_are_the_same_for_any_number(with_late_sums, &suite::configs()[..3]);
}

/// Whose sums come as late as can be.
fn with_late_sums(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    let emulator = Emulator::with_late_branch(1 << 30, Precision::F32, Some(SUMS), 0);
    Ok(Box::new(Cuda::on(emulator, config)?))
}

#[test]
fn no_number_is_found_by_all() {
    if !emulator::can_run() {
        return;
    }
    suite::no_number_is_found_by_all_ranks(make);
}

#[test]
fn initialised_again_nothing_changes() {
    if !emulator::can_run() {
        return;
    }
    suite::initialisation_is_done_once(make, &kinds());
}

#[test]
fn resized_it_is_one_of_that_size() {
    if !emulator::can_run() {
        return;
    }
    suite::resized_it_is_one_of_that_size(make);
}

#[test]
fn what_is_not_the_models_is_refused() {
    if !emulator::can_run() {
        return;
    }
    suite::what_does_not_fit_is_refused(make);
}

#[test]
fn bf16_is_near_the_reference() {
    if !emulator::can_run() {
        return;
    }
    let rounded = |config: &ModelConfig| -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(on(1 << 30, Precision::Bf16, config)?))
    };
    suite::bf16_is_near_the_reference(rounded, make, &kinds());
}

#[test]
fn little_memory_is_enough_or_said_to_be_too_little() {
    if !emulator::can_run() {
        return;
    }
    let little = |config: &ModelConfig| -> Result<Box<dyn Engine>, EngineError> {
        Ok(Box::new(on(3 << 20, Precision::F32, config)?))
    };
    suite::gpus::little_memory_is_enough_or_said_to_be_too_little(make, little);
}

#[test]
fn shards_are_one_batch() {
    if emulator::can_run() {
        suite::gpus::shards_are_one_batch(make);
    }
}

#[test]
fn what_was_done_before_does_not_matter() {
    if emulator::can_run() {
        suite::gpus::what_was_done_before_does_not_matter(make);
    }
}

#[test]
fn no_number_goes_through() {
    if emulator::can_run() {
        suite::gpus::no_number_goes_through(make);
    }
}

#[test]
fn a_step_is_its_parts() {
    if !emulator::can_run() {
        return;
    }
    suite::a_step_is_its_parts(make);
}

/// What bf16 costs the shipped model in bits/dim on real images, of which there are few.
#[test]
#[ignore = "takes minutes: the emulator is slow"]
fn bf16_costs_the_shipped_model_little() {
    if !emulator::can_run() {
        return;
    }
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../pixelcnn/tests/data/cifar10-sample.npz"
    );
    let data = pixelcnn::data::DataConfig {
        data: path.into(),
        ..Default::default()
    };
    let data = pixelcnn::data::Dataset::open(&data, pixelcnn::data::Split::Test).unwrap();
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    let indices: Vec<usize> = (0..data.len()).collect();
    data.read(&indices, &mut images, &mut labels).unwrap();
    let batch = Batch {
        images: &images,
        labels: &labels,
        ..Batch::default()
    };
    let model = pixelcnn::Model::pretrained().unwrap();
    let bits = |engine: &mut dyn Engine| {
        engine.load_weights(&model.weights).unwrap();
        let nats = engine.nats_per_image(batch).unwrap();
        let bits = nats.iter().map(|&nats| model.config.bits_per_dim(nats));
        bits.collect::<Vec<f64>>()
    };
    let cpu = bits(&mut pixelcnn_core::cpu::Cpu::new(&model.config).unwrap());
    let mean = |bits: &[f64]| bits.iter().sum::<f64>() / bits.len() as f64;
    for (precision, most) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.01)] {
        let bits = bits(&mut on(4 << 30, precision, &model.config).unwrap());
        let differences: Vec<f64> = bits.iter().zip(&cpu).map(|(a, b)| a - b).collect();
        let worst = differences
            .iter()
            .fold(0.0, |worst: f64, d| worst.max(d.abs()));
        println!(
            "{precision}: {:.5} bits/dim of {} images, {:+.6} beside the CPU's, one at most {worst:.6}",
            mean(&bits),
            bits.len(),
            mean(&differences)
        );
        assert!(mean(&differences).abs() < most);
    }
}

/// Drawn there, pixel by pixel.
#[test]
fn pixel_by_pixel_it_is_the_reference() {
    if !emulator::can_run() {
        return;
    }
    suite::gpus::pixel_by_pixel_it_is_the_reference(
        |prepared| {
            let emulator: Arc<Emulator> = Emulator::new(1 << 30, Precision::F32);
            evaluator_on(emulator, prepared)
        },
        &kinds(),
    );
}
