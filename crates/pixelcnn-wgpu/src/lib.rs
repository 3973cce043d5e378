//! PixelCNN++ on any GPU: an [`Engine`](pixelcnn_core::engine::Engine) that carries the
//! [plan](pixelcnn_core::plan) out through wgpu, on Vulkan, Metal or DirectX 12. State and maps stay on the GPU, in
//! single precision.
//!
//! | module | what |
//! |---|---|
//! | [`engine`] | the engine: state, weights and maps |
//! | `pass` | the plan's operations, one after the other |
//! | `kernels` | how each kernel of `kernels/` is called |
//! | `raster` | the incremental program, for drawing images |
//! | `gpu` | a device, its memory, and lists of kernels to run |

pub mod engine;
mod gpu;
mod kernels;
mod pass;
mod raster;

pub use engine::Wgpu;
pub use gpu::{Adapter, Kind, WgpuError, adapters, expect};
pub use raster::evaluator;

#[cfg(test)]
#[path = "../../pixelcnn-core/tests/suite/mod.rs"]
#[allow(dead_code)]
mod suite;
#[cfg(test)]
mod tests;
