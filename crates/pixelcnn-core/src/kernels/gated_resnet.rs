//! The gated resnet block (paper, section 2.5) as one operation, forward and backward: between its
//! convolutions nothing is kept for the backward pass that is cheap to compute again.

use super::conv::Conv;
use super::pointwise::{
    Dropout, gate, gate_backward, image_sums, nonlinearity, nonlinearity_backward,
};
use crate::config::Nonlinearity;

/// What is fixed about a block: `x + gate(conv_2(dropout(f(conv_1(f(x)) + nin(f(a))))) + h * hw)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedResnet {
    /// First convolution, to `filters` channels.
    pub conv_1: Conv,
    /// 1x1 projection of the auxiliary input, where there is one.
    pub nin: Option<Conv>,
    /// Second convolution, to `2 * filters` channels.
    pub conv_2: Conv,
    /// `f`.
    pub nonlinearity: Nonlinearity,
    /// After the second nonlinearity.
    pub dropout: Option<Dropout>,
}

/// The tensors that go in. Those that a block does not have are empty.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// \[n, h, w, filters\].
    pub x: &'a [f32],
    /// Weight and bias of the first convolution.
    pub conv_1: [&'a [f32]; 2],
    /// Auxiliary input \[n, h, w, channels\].
    pub a: &'a [f32],
    /// Weight and bias of its projection.
    pub nin: [&'a [f32]; 2],
    /// Weight and bias of the second convolution.
    pub conv_2: [&'a [f32]; 2],
    /// `h * hw` \[n, 2 * filters\].
    pub conditional: &'a [f32],
}

/// What the backward pass needs of the forward pass.
#[derive(Debug, Clone)]
pub struct Saved {
    /// Input of the second nonlinearity.
    c1: Vec<f32>,
    /// Output of the second convolution.
    c2: Vec<f32>,
}

/// The gradients, shaped as [`Inputs`]; empty where the input is.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// For the input.
    pub x: Vec<f32>,
    /// For weight and bias of the first convolution.
    pub conv_1: [Vec<f32>; 2],
    /// For the auxiliary input.
    pub a: Vec<f32>,
    /// For weight and bias of its projection.
    pub nin: [Vec<f32>; 2],
    /// For weight and bias of the second convolution.
    pub conv_2: [Vec<f32>; 2],
    /// For `h * hw`.
    pub conditional: Vec<f32>,
}

impl GatedResnet {
    fn filters(&self) -> usize {
        self.conv_1.outputs
    }

    /// Channels of the auxiliary input.
    fn auxiliary(&self, nin: Conv) -> usize {
        nin.inputs / self.nonlinearity.outputs(1)
    }

    /// `y = f(x)`, with dropout where asked for.
    fn f(&self, channels: usize, dropout: Option<Dropout>, x: &[f32], y: &mut Vec<f32>) {
        y.resize(self.nonlinearity.outputs(x.len()), 0.0);
        nonlinearity(self.nonlinearity, channels, dropout, x, y);
    }

    /// The block's output \[n, h, w, filters\] for inputs of `size` \[n, h, w\].
    pub fn forward(&self, size: [usize; 3], inputs: Inputs) -> (Vec<f32>, Saved) {
        let filters = self.filters();
        let pixels = size.iter().product::<usize>();
        let [weight, bias] = inputs.conv_1;
        let mut c1 = vec![0.0; pixels * filters];
        // One after the other in the same memory, which is in the cache by then.
        let mut f_x = Vec::new();
        self.f(filters, None, inputs.x, &mut f_x);
        self.conv_1
            .forward(size, &f_x, weight, bias, false, &mut c1);
        if let Some(nin) = self.nin {
            let [weight, bias] = inputs.nin;
            self.f(self.auxiliary(nin), None, inputs.a, &mut f_x);
            nin.forward(size, &f_x, weight, bias, true, &mut c1);
        }
        let [weight, bias] = inputs.conv_2;
        let mut c2 = vec![0.0; pixels * 2 * filters];
        self.f(filters, self.dropout, &c1, &mut f_x);
        self.conv_2
            .forward(size, &f_x, weight, bias, false, &mut c2);
        drop(f_x);
        let mut out = vec![0.0; pixels * filters];
        let conditional = Some(inputs.conditional).filter(|h_hw| !h_hw.is_empty());
        gate(
            filters,
            size[1] * size[2],
            inputs.x,
            &c2,
            conditional,
            &mut out,
        );
        (out, Saved { c1, c2 })
    }

    /// The gradients, given `d_out`, the one for the output.
    pub fn backward(
        &self,
        size: [usize; 3],
        inputs: Inputs,
        saved: Saved,
        d_out: Vec<f32>,
    ) -> Gradients {
        let filters = self.filters();
        let pixels_per_image = size[1] * size[2];
        let mut gradients = Gradients::default();

        let Saved { c1, c2: mut d_c2 } = saved;
        let conditional = Some(inputs.conditional).filter(|h_hw| !h_hw.is_empty());
        gate_backward(filters, pixels_per_image, &d_out, conditional, &mut d_c2);
        if conditional.is_some() {
            gradients.conditional = vec![0.0; inputs.conditional.len()];
            image_sums(
                2 * filters,
                pixels_per_image,
                &d_c2,
                &mut gradients.conditional,
            );
        }

        // Each `f(x)` and then its gradient, one after the other in the same memory.
        let mut f_x = Vec::new();
        self.f(filters, self.dropout, &c1, &mut f_x);
        gradients.conv_2 = weight_gradients(&self.conv_2, size, &f_x, &d_c2);
        self.conv_2
            .backward_input(size, &d_c2, inputs.conv_2[0], false, &mut f_x);
        drop(d_c2);
        let mut d_c1 = vec![0.0; c1.len()];
        nonlinearity_backward(
            self.nonlinearity,
            filters,
            self.dropout,
            &c1,
            &f_x,
            &mut d_c1,
            false,
        );
        drop(c1);

        let mut through = |conv: &Conv, channels, x: &[f32], weight: &[f32], dx: &mut [f32]| {
            self.f(channels, None, x, &mut f_x);
            let parameters = weight_gradients(conv, size, &f_x, &d_c1);
            conv.backward_input(size, &d_c1, weight, false, &mut f_x);
            nonlinearity_backward(self.nonlinearity, channels, None, x, &f_x, dx, true);
            parameters
        };
        if let Some(nin) = self.nin {
            gradients.a = vec![0.0; inputs.a.len()];
            let channels = self.auxiliary(nin);
            gradients.nin = through(&nin, channels, inputs.a, inputs.nin[0], &mut gradients.a);
        }
        // The residual connection hands the output's gradient on as it is.
        gradients.x = d_out;
        let weight = inputs.conv_1[0];
        gradients.conv_1 = through(&self.conv_1, filters, inputs.x, weight, &mut gradients.x);
        gradients
    }
}

fn weight_gradients(conv: &Conv, size: [usize; 3], x: &[f32], dy: &[f32]) -> [Vec<f32>; 2] {
    let mut weight = vec![0.0; conv.window.taps() * conv.inputs * conv.outputs];
    let mut bias = vec![0.0; conv.outputs];
    conv.backward_weight(size, x, dy, &mut weight, &mut bias);
    [weight, bias]
}
