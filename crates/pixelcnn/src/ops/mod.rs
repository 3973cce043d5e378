//! The layers as differentiable operations, each with two bodies: the core's hand-written kernels
//! on the CPU, and Burn's own operations on any other device. Maps are NHWC.

mod cpu;
pub(crate) mod portable;

use burn::tensor::{Device, Tensor};
use pixelcnn_core::kernels::conv::Conv;
use pixelcnn_core::kernels::gated_resnet::GatedResnet;

/// Which body runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The core's kernels; the tensors must be on the CPU.
    Kernels,
    /// Burn's operations, on any device.
    Portable,
}

impl Engine {
    /// The fastest body for a device.
    pub fn of(device: &Device) -> Engine {
        if device.clone().inner() == Device::flex() {
            Engine::Kernels
        } else {
            Engine::Portable
        }
    }

    /// A (transposed) convolution of `x` \[N, H, W, inputs\] with `w` \[taps * inputs, outputs\].
    pub(crate) fn conv(self, conv: Conv, x: Tensor<4>, w: Tensor<2>, b: Tensor<1>) -> Tensor<4> {
        match self {
            Engine::Kernels => cpu::conv(conv, x, w, b),
            Engine::Portable => portable::conv(conv, x, w, b),
        }
    }

    /// A loss whose gradient at `logits` is `gradient`.
    pub(crate) fn seed_gradient(self, logits: Tensor<4>, gradient: Tensor<4>) -> Tensor<1> {
        match self {
            Engine::Kernels => cpu::seed_gradient(logits, gradient),
            Engine::Portable => (logits * Tensor::from_inner(gradient)).sum(),
        }
    }
}

/// The tensors of one gated resnet block.
pub(crate) struct GatedResnetInputs {
    /// \[N, H, W, filters\].
    pub x: Tensor<4>,
    /// Weight and bias of the first convolution.
    pub conv_1: (Tensor<2>, Tensor<1>),
    /// The auxiliary input with the weight and bias of its projection.
    pub nin: Option<(Tensor<4>, Tensor<2>, Tensor<1>)>,
    /// Weight and bias of the second convolution.
    pub conv_2: (Tensor<2>, Tensor<1>),
    /// `h * hw` \[N, 2 * filters\].
    pub conditional: Option<Tensor<2>>,
}

/// A gated resnet block in one, by the kernels.
pub(crate) fn gated_resnet(block: GatedResnet, inputs: GatedResnetInputs) -> Tensor<4> {
    cpu::gated_resnet(block, inputs)
}
