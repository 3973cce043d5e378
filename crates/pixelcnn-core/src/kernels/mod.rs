//! The hand-written CPU kernels: channels-last (NHWC) maps, forward and backward.

#[macro_use]
pub mod simd;

pub mod adam;
pub mod attention;
pub mod conv;
pub mod gated_resnet;
pub mod math;
pub mod muon;
pub mod pointwise;
pub(crate) mod vector;
pub mod weight_norm;

pub(crate) use vectorized;
