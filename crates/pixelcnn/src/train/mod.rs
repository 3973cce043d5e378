//! Training, and what a run folder holds.

pub mod checkpoint;
pub mod metrics;
mod tensorboard;
