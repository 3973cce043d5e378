//! Work that takes long calls a function with how far it has come, which can stop it.

use std::ops::ControlFlow;

/// The function that was told of the progress stopped the work. What is written by then stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped before the end")]
pub struct Stopped;

/// Whether work goes on after it has told how far it is.
///
/// # Errors
/// Where it was told to stop.
pub fn go_on(told: ControlFlow<()>) -> Result<(), Stopped> {
    match told {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Stopped),
    }
}
