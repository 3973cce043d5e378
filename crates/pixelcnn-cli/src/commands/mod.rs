//! One file per command.

pub mod classify;
pub mod complete;
pub mod completions;
pub mod compress;
pub mod decompress;
pub mod devices;
pub mod eval;
pub mod export;
pub mod import;
pub mod info;
pub mod plot;
pub mod sample;
pub mod score;
pub mod serve;
pub mod train;
