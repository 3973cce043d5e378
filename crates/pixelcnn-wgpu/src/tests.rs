//! The engine on whatever adapter is the first, Mesa's software Vulkan for one (Debian's mesa-vulkan-drivers): the
//! same tests as every engine's.

use pixelcnn_core::ModelConfig;
use pixelcnn_core::engine::{Engine, EngineError, Update};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::engine::Wgpu;
use crate::gpu::Gpu;
use crate::raster::evaluator_on;
use crate::suite;

fn make(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(Wgpu::new(config, 0)?))
}

/// Whose buffers are small.
fn with_little_memory(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    let mut gpu = Gpu::open(0)?;
    gpu.largest = 1 << 16;
    Ok(Box::new(Wgpu::on(gpu, config)?))
}

fn kinds() -> Vec<ModelConfig> {
    [suite::configs(), suite::configs_of_codes()].concat()
}

macro_rules! suite {
    ($($name:ident: $test:expr;)*) => {
        $(
            #[test]
            fn $name() {
                $test
            }
        )*
    };
}

suite! {
    every_kind_of_model_is_the_reference: suite::every_kind_is_the_reference(make, &kinds());
    every_shape_of_model_is_the_reference: suite::every_shape_is_the_reference(make);
    steps_are_the_optimizers: suite::steps_move_the_state_by_the_gradients(make);
    a_step_is_its_parts: suite::a_step_is_its_parts(make);
    little_memory_is_enough_or_said_to_be_too_little:
        suite::gpus::little_memory_is_enough_or_said_to_be_too_little(make, with_little_memory);
    shards_are_one_batch: suite::gpus::shards_are_one_batch(make);
    what_was_done_before_does_not_matter: suite::gpus::what_was_done_before_does_not_matter(make);
    no_number_goes_through: suite::gpus::no_number_goes_through(make);
    initialised_again_nothing_changes: suite::initialisation_is_done_once(make, &kinds());
    resized_it_is_one_of_that_size: suite::resized_it_is_one_of_that_size(make);
    pixel_by_pixel_it_is_the_reference: suite::gpus::pixel_by_pixel_it_is_the_reference(
        |prepared| evaluator_on(0, prepared),
        &kinds()
    );
    what_is_not_the_models_is_refused: suite::what_does_not_fit_is_refused(make);
}

#[test]
fn what_it_cannot_do_is_said() {
    for config in suite::configs_of_energy() {
        let Err(EngineError::Device(reason)) = make(&config) else {
            panic!("{config:?}");
        };
        assert!(reason.contains("energy distance"), "{reason}");
    }
}

/// A device that is lost says so in one line, whatever it is asked for.
#[test]
fn a_lost_device_is_said() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let config = &suite::configs()[0];
    let parameters = suite::parameters(config, &mut random);
    let images = suite::Images::random(config, 2, &mut random);
    let mut engine = Wgpu::new(config, 0).unwrap();
    engine.load(suite::state(&parameters)).unwrap();
    let step = |engine: &mut Wgpu| engine.step(suite::batch(&images), None, &Update::default());
    step(&mut engine).unwrap();
    engine.gpu.lose();
    for error in [step(&mut engine).map(drop), engine.unload().map(drop)] {
        let Err(EngineError::Device(reason)) = error else {
            panic!("{error:?}");
        };
        assert!(
            reason.contains("lost") && !reason.contains('\n'),
            "{reason}"
        );
    }
}
