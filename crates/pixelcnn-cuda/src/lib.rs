//! PixelCNN++ on NVIDIA GPUs: the [`Engine`](pixelcnn_core::engine::Engine) that carries the plan of
//! a model out by CUDA.
//!
//! Nothing of CUDA is needed to build it, nor on a machine that has no GPU: its libraries are looked
//! for when a device is first asked for, and what is missing is said in one line. The kernels are
//! compiled for the device at hand, once, and kept in the user's cache folder.

mod compiler;
mod convolution;
mod cudnn;
mod driver;
#[cfg(test)]
mod emulator;
mod engine;
mod gpu;
mod kernels;
mod libraries;
mod nccl;
mod pass;
mod raster;

pub use pixelcnn_core::engine::Precision;
use pixelcnn_core::ranks::RankError;

pub use driver::{Device, devices, exchange_with_itself, expect};
pub use engine::Cuda;
pub use libraries::{expect_cudnn, expect_nccl, look_in};
pub use raster::evaluator;

/// Why a GPU can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library is not to be found.
    #[error("{library} is not found: {help}")]
    Missing {
        /// What it is.
        library: &'static str,
        /// How to get it.
        help: &'static str,
    },
    /// There are fewer devices.
    #[error("there is no GPU number {number}: this machine has {found}")]
    NoDevice {
        /// What was asked for.
        number: usize,
        /// How many there are.
        found: usize,
    },
    /// The kernels don't compile: what the compiler says.
    #[error("the kernels can't be compiled: {0}")]
    Compile(String),
    /// The driver or a library refuses: what it says.
    #[error("CUDA: {0}")]
    Refused(String),
    /// Another rank's GPU can't be reached.
    #[error(transparent)]
    Rank(#[from] RankError),
}

#[cfg(test)]
#[path = "../../pixelcnn-core/tests/suite/mod.rs"]
#[allow(dead_code)]
mod suite;
#[cfg(test)]
mod tests;
