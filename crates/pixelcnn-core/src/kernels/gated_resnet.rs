//! The gated resnet block (the original's `gated_resnet`) as one operation, forward and backward:
//! between its convolutions nothing is kept for the backward pass that is cheap to compute again.

use super::conv::Conv;
use super::pointwise::{
    Channels, Dropout, gate, gate_backward, image_sums, nonlinearity, nonlinearity_backward,
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
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// \[n, h, w, filters\], with the rows above where there are any.
    pub x: &'a [f32],
    /// Weight and bias of the first convolution.
    pub conv_1: [&'a [f32]; 2],
    /// The auxiliary input: maps \[n, h, w, filters\] whose channels follow one another.
    pub a: Vec<&'a [f32]>,
    /// Weight and bias of its projection.
    pub nin: [&'a [f32]; 2],
    /// Weight and bias of the second convolution.
    pub conv_2: [&'a [f32]; 2],
    /// `h * hw` \[n, 2 * filters\].
    pub conditional: &'a [f32],
}

/// The gradients by the parameters, shaped as in [`Inputs`]; empty where those are.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// By weight and bias of the first convolution.
    pub conv_1: [Vec<f32>; 2],
    /// By weight and bias of the projection.
    pub nin: [Vec<f32>; 2],
    /// By weight and bias of the second convolution.
    pub conv_2: [Vec<f32>; 2],
    /// By `h * hw`.
    pub conditional: Vec<f32>,
}

/// The gradient by a map.
#[derive(Debug)]
pub struct MapGradient<'a> {
    /// Shaped as the map.
    pub values: &'a mut [f32],
    /// Whether it is added to what is there.
    pub accumulate: bool,
}

/// Lends the first `len` values of `scratch`, made longer where it must be; whatever they hold.
fn lend(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        // Not resized, which would copy what nobody needs.
        *scratch = vec![0.0; len];
    }
    &mut scratch[..len]
}

impl GatedResnet {
    fn filters(&self) -> usize {
        self.conv_1.outputs
    }

    /// `f` of a map or of a concatenation of maps, in the same memory one after the other, which is
    /// in the cache by then.
    fn f<'s>(
        &self,
        dropout: Option<Dropout>,
        maps: &[&[f32]],
        scratch: &'s mut Vec<f32>,
    ) -> &'s mut [f32] {
        let values = maps.iter().map(|map| map.len()).sum();
        let y = lend(scratch, self.nonlinearity.outputs(values));
        for (part, map) in maps.iter().enumerate() {
            let channels = self.channels(part, maps.len());
            nonlinearity(self.nonlinearity, channels, dropout, map, y);
        }
        y
    }

    /// Which channels of a concatenation one of its maps is.
    fn channels(&self, part: usize, parts: usize) -> Channels {
        let count = self.filters();
        Channels {
            count,
            first: part * count,
            of: parts * count,
        }
    }

    /// Writes the block's output `out` \[n, h, w, filters\] for inputs of `size` \[n, h, w\], and
    /// what the backward pass needs: the input `c1` of the second nonlinearity, \[n, h, w, filters\],
    /// and the output `c2` of the second convolution, twice as large. `scratch` is memory that may
    /// be used for the next block as well.
    ///
    /// `x` and `c1` have `above` rows more of every image, those above: with them an image can be
    /// computed band by band. Those of `c1` are read.
    ///
    /// # Panics
    /// If the slices' lengths disagree.
    pub fn forward(
        &self,
        size: [usize; 3],
        above: usize,
        inputs: &Inputs,
        [c1, c2, out]: [&mut [f32]; 3],
        scratch: &mut Vec<f32>,
    ) {
        assert!(above == 0 || size[0] == 1, "bands are of one image");
        let first = above * size[2] * self.filters();
        let [weight, bias] = inputs.conv_1;
        let f_x = self.f(None, &[inputs.x], scratch);
        let c1_below = &mut c1[first..];
        self.conv_1
            .forward_below(above, size, f_x, weight, bias, false, c1_below);
        if let Some(nin) = self.nin {
            let [weight, bias] = inputs.nin;
            let f_a = self.f(None, &inputs.a, scratch);
            nin.forward(size, f_a, weight, bias, true, c1_below);
        }
        let [weight, bias] = inputs.conv_2;
        let f_c1 = self.f(self.dropout, &[c1], scratch);
        self.conv_2
            .forward_below(above, size, f_c1, weight, bias, false, c2);
        let conditional = Some(inputs.conditional).filter(|h_hw| !h_hw.is_empty());
        let (filters, pixels_per_image) = (self.filters(), size[1] * size[2]);
        let x = &inputs.x[first..];
        gate(filters, pixels_per_image, x, c2, conditional, out);
    }

    /// The gradients, given `c1` and `c2` of the forward pass, the second of which it overwrites,
    /// and `d_out` \[n, h, w, filters\], the gradient by the output, which becomes that by `x`. `d_a`
    /// are those by the maps of the auxiliary input. `size` and the shapes are [`Self::forward`]'s.
    ///
    /// # Panics
    /// If the slices' lengths disagree.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        size: [usize; 3],
        inputs: &Inputs,
        c1: &[f32],
        c2: &mut [f32],
        d_out: &mut [f32],
        d_a: &mut [MapGradient],
        gradients: &mut Gradients,
        scratch: &mut Vec<f32>,
    ) {
        let filters = self.filters();
        let pixels_per_image = size[1] * size[2];
        let conditional = Some(inputs.conditional).filter(|h_hw| !h_hw.is_empty());
        gate_backward(filters, pixels_per_image, d_out, conditional, c2);
        let d_c2 = c2;
        if conditional.is_some() {
            let sums = &mut gradients.conditional;
            image_sums(2 * filters, pixels_per_image, d_c2, sums);
        }

        // Each f(x) and then the gradient by it, one after the other in the same memory.
        let f_c1 = self.f(self.dropout, &[c1], scratch);
        let [weight, bias] = &mut gradients.conv_2;
        self.conv_2.backward_weight(size, f_c1, d_c2, weight, bias);
        let weight = inputs.conv_2[0];
        self.conv_2.backward_input(size, d_c2, weight, false, f_c1);
        // What d_c2 was is not needed any more.
        let d_c1 = &mut d_c2[..c1.len()];
        let (f, dropout) = (self.nonlinearity, self.dropout);
        nonlinearity_backward(f, filters, dropout, c1, f_c1, d_c1, false);

        if let Some(nin) = self.nin {
            let f_a = self.f(None, &inputs.a, scratch);
            let [weight, bias] = &mut gradients.nin;
            nin.backward_weight(size, f_a, d_c1, weight, bias);
            nin.backward_input(size, d_c1, inputs.nin[0], false, f_a);
            for (part, (a, d_a)) in inputs.a.iter().zip(d_a).enumerate() {
                let channels = self.channels(part, inputs.a.len());
                let MapGradient { values, accumulate } = d_a;
                nonlinearity_backward(f, channels, None, a, f_a, values, *accumulate);
            }
        }
        let f_x = self.f(None, &[inputs.x], scratch);
        let [weight, bias] = &mut gradients.conv_1;
        self.conv_1.backward_weight(size, f_x, d_c1, weight, bias);
        let weight = inputs.conv_1[0];
        self.conv_1.backward_input(size, d_c1, weight, false, f_x);
        // The residual connection hands the output's gradient on as it is.
        nonlinearity_backward(f, filters, None, inputs.x, f_x, d_out, true);
    }
}
