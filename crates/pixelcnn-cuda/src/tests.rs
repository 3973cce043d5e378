//! The engine on the emulator: the same tests as every engine's.

use std::sync::Arc;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::engine::{Engine, EngineError};

use crate::emulator::Emulator;
use crate::engine::Cuda;
use crate::suite;

fn make(config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
    let emulator: Arc<Emulator> = Emulator::new(1 << 30);
    Ok(Box::new(Cuda::on(emulator, config)?))
}

#[test]
fn every_kind_of_model_is_the_reference() {
    suite::every_kind_is_the_reference(make);
}

#[test]
fn every_shape_of_model_is_the_reference() {
    suite::every_shape_is_the_reference(make);
}

#[test]
fn steps_are_adams() {
    suite::steps_move_the_state_by_the_gradients(make);
}

#[test]
fn initialised_again_nothing_changes() {
    suite::initialisation_is_done_once(make);
}

#[test]
fn what_is_not_the_models_is_refused() {
    suite::what_does_not_fit_is_refused(make);
}
