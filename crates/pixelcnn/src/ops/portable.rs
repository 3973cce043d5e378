//! The operations in Burn's own terms, for any device, and the judge of the kernels.

use burn::tensor::activation::{relu, sigmoid};
use burn::tensor::module::{conv_transpose2d, conv2d};
use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{Tensor, TensorData};
use pixelcnn_core::Nonlinearity;
use pixelcnn_core::kernels::conv::Conv;
use pixelcnn_core::kernels::pointwise::Dropout;

/// See [`Engine::conv`](super::Engine::conv).
pub(crate) fn conv(conv: Conv, x: Tensor<4>, w: Tensor<2>, b: Tensor<1>) -> Tensor<4> {
    let [n, height, width, _] = x.dims();
    let Conv {
        window,
        transposed,
        inputs,
        outputs,
    } = conv;
    let ([kh, kw], s, [top, left]) = (window.kernel, window.stride, window.offset);
    let w = w.reshape([kh, kw, inputs, outputs]);
    let x = x.permute([0, 3, 1, 2]);
    let out = if transposed {
        let options = ConvTransposeOptions::new([s, s], [0, 0], [0, 0], [1, 1], 1);
        let out = conv_transpose2d(x, w.permute([2, 3, 0, 1]), Some(b.clone()), options);
        // The taps of the last pixels end `kernel - stride` past the map; the offset crops.
        let [_, _, rows, columns] = out.dims();
        let (bottom, right) = (top + height * s, left + width * s);
        assert!(bottom <= rows && right <= columns);
        out.slice([0..n, 0..outputs, top..bottom, left..right])
    } else {
        let end =
            |n: usize, k: usize, offset: usize| ((n / s - 1) * s + k).saturating_sub(n + offset);
        let options = ConvOptions {
            stride: [s, s],
            padding: [(top, end(height, kh, top)), (left, end(width, kw, left))],
            dilation: [1, 1],
            groups: 1,
        };
        conv2d(x, w.permute([3, 2, 0, 1]), Some(b), options)
    };
    out.permute([0, 2, 3, 1])
}

/// `f` of a gated resnet block, over the channels.
pub(crate) fn nonlinearity(f: Nonlinearity, x: Tensor<4>) -> Tensor<4> {
    match f {
        Nonlinearity::ConcatElu => elu(Tensor::cat(vec![x.clone(), -x], 3)),
        Nonlinearity::Elu => elu(x),
        Nonlinearity::Relu => relu(x),
    }
}

/// The exponential linear unit.
pub(crate) fn elu(x: Tensor<4>) -> Tensor<4> {
    relu(x.clone()) + x.clamp_max(0.0).exp() - 1.0
}

/// `x` with the same values dropped as the kernels drop.
pub(crate) fn dropout(x: Tensor<4>, dropout: Dropout) -> Tensor<4> {
    let mut mask = vec![0.0; x.shape().num_elements()];
    dropout.mask(&mut mask);
    let mask = Tensor::from_data(TensorData::new(mask, x.shape()), &x.device());
    x * mask
}

/// `x + a * sigmoid(b)`, where `c2` is a and b, one after the other.
pub(crate) fn gate(x: Tensor<4>, c2: Tensor<4>) -> Tensor<4> {
    let mut halves = c2.chunk(2, 3).into_iter();
    let (Some(a), Some(b)) = (halves.next(), halves.next()) else {
        unreachable!("two chunks were asked for");
    };
    x + a * sigmoid(b)
}
