//! The core's kernels as Burn operations on the CPU, with their hand-written backward passes.

use std::fmt::Debug;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, Dispatch, ExtensionType, Flex, TensorMetadata, backend_extension,
};
use burn::tensor::{Tensor, TensorData};
use pixelcnn_core::kernels::conv::Conv;
use pixelcnn_core::kernels::gated_resnet::{GatedResnet, Inputs, Saved};

/// A tensor on the CPU, and the same where its gradient is tracked.
type Host = FloatTensor<Flex>;
type Tracked<C> = FloatTensor<Autodiff<Flex, C>>;

/// The tensors of a gated resnet block, as [`Inputs`].
#[derive(ExtensionType)]
pub struct Block<B: Backend> {
    x: FloatTensor<B>,
    weight_1: FloatTensor<B>,
    bias_1: FloatTensor<B>,
    a: FloatTensor<B>,
    weight_nin: FloatTensor<B>,
    bias_nin: FloatTensor<B>,
    weight_2: FloatTensor<B>,
    bias_2: FloatTensor<B>,
    conditional: FloatTensor<B>,
}

impl<B: Backend> Block<B> {
    fn into_array(self) -> [FloatTensor<B>; 9] {
        [
            self.x,
            self.weight_1,
            self.bias_1,
            self.a,
            self.weight_nin,
            self.bias_nin,
            self.weight_2,
            self.bias_2,
            self.conditional,
        ]
    }
}

/// The operations that have kernels.
#[backend_extension(Flex, Autodiff)]
pub trait Kernels: Backend {
    /// See [`Engine::conv`](super::Engine::conv).
    fn conv(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        conv: Conv,
    ) -> FloatTensor<Self>;
    /// A whole gated resnet block.
    fn gated_resnet(
        #[extension_type] tensors: Block<Self>,
        block: GatedResnet,
    ) -> FloatTensor<Self>;
    /// See [`Engine::seed_gradient`](super::Engine::seed_gradient).
    fn seed_gradient(logits: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

pub(super) fn conv(conv: Conv, x: Tensor<4>, weight: Tensor<2>, bias: Tensor<1>) -> Tensor<4> {
    Tensor::from_dispatch(Dispatch::conv(
        x.into_dispatch(),
        weight.into_dispatch(),
        bias.into_dispatch(),
        conv,
    ))
}

pub(super) fn gated_resnet(block: GatedResnet, inputs: super::GatedResnetInputs) -> Tensor<4> {
    let device = inputs.x.device().inner();
    let (a, weight_nin, bias_nin) = inputs.nin.unwrap_or_else(|| {
        (
            Tensor::empty([0; 4], &device),
            Tensor::empty([0; 2], &device),
            Tensor::empty([0; 1], &device),
        )
    });
    let conditional = inputs
        .conditional
        .unwrap_or_else(|| Tensor::empty([0; 2], &device));
    let tensors = Block {
        x: inputs.x.into_dispatch(),
        weight_1: inputs.conv_1.0.into_dispatch(),
        bias_1: inputs.conv_1.1.into_dispatch(),
        a: a.into_dispatch(),
        weight_nin: weight_nin.into_dispatch(),
        bias_nin: bias_nin.into_dispatch(),
        weight_2: inputs.conv_2.0.into_dispatch(),
        bias_2: inputs.conv_2.1.into_dispatch(),
        conditional: conditional.into_dispatch(),
    };
    Tensor::from_dispatch(Dispatch::gated_resnet(tensors, block))
}

pub(super) fn seed_gradient(logits: Tensor<4>, gradient: Tensor<4>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::seed_gradient(
        logits.into_dispatch(),
        gradient.into_dispatch(),
    ))
}

impl Kernels for Flex {
    fn conv(x: Host, weight: Host, bias: Host, conv: Conv) -> Host {
        conv_forward(&[x, weight, bias].map(contiguous), conv)
    }

    fn gated_resnet(tensors: Block<Self>, block: GatedResnet) -> Host {
        gated_resnet_forward(&tensors.into_array().map(contiguous), block).0
    }

    fn seed_gradient(_logits: Host, _gradient: Host) -> Host {
        host(vec![0.0], &[1])
    }
}

impl<C: CheckpointStrategy> Kernels for Autodiff<Flex, C> {
    fn conv(x: Tracked<C>, weight: Tracked<C>, bias: Tracked<C>, conv: Conv) -> Tracked<C> {
        track::<C, _, _>(
            [x, weight, bias],
            |inputs| (conv_forward(&inputs, conv), (inputs, conv)),
            |(inputs, conv), d_out, wanted| {
                let [x, weight, bias] = &inputs;
                let d_out = contiguous(d_out);
                let size = size(x);
                let mut d_weight = vec![0.0; values(weight).len()];
                let mut d_bias = vec![0.0; values(bias).len()];
                conv.backward_weight(size, values(x), values(&d_out), &mut d_weight, &mut d_bias);
                // The image itself needs no gradient.
                let d_x = wanted[0].then(|| {
                    let mut d_x = vec![0.0; values(x).len()];
                    conv.backward_input(size, values(&d_out), values(weight), false, &mut d_x);
                    d_x
                });
                like(&inputs, [d_x, Some(d_weight), Some(d_bias)])
            },
        )
    }

    fn gated_resnet(tensors: Block<Self>, block: GatedResnet) -> Tracked<C> {
        track::<C, _, _>(
            tensors.into_array(),
            |inputs| {
                let (out, saved) = gated_resnet_forward(&inputs, block);
                (out, (inputs, block, saved))
            },
            |(inputs, block, saved), d_out, _| {
                let d_out = vec_of(d_out);
                let gradients =
                    block.backward(size(&inputs[0]), block_inputs(&inputs), saved, d_out);
                let [weight_1, bias_1] = gradients.conv_1;
                let [weight_nin, bias_nin] = gradients.nin;
                let [weight_2, bias_2] = gradients.conv_2;
                let gradients = [
                    gradients.x,
                    weight_1,
                    bias_1,
                    gradients.a,
                    weight_nin,
                    bias_nin,
                    weight_2,
                    bias_2,
                    gradients.conditional,
                ];
                like(&inputs, gradients.map(Some))
            },
        )
    }

    fn seed_gradient(logits: Tracked<C>, gradient: Tracked<C>) -> Tracked<C> {
        track::<C, _, _>(
            [logits, gradient],
            |[_, gradient]| (host(vec![0.0], &[1]), gradient),
            |gradient, _, _| [Some(gradient), None],
        )
    }
}

fn conv_forward([x, weight, bias]: &[Host; 3], conv: Conv) -> Host {
    let [n, h, w] = size(x);
    let [rows, columns] = conv.output_size([h, w]);
    let mut out = vec![0.0; n * rows * columns * conv.outputs];
    let (x, weight, bias) = (values(x), values(weight), values(bias));
    conv.forward([n, h, w], x, weight, bias, false, &mut out);
    host(out, &[n, rows, columns, conv.outputs])
}

fn gated_resnet_forward(inputs: &[Host; 9], block: GatedResnet) -> (Host, Saved) {
    let size = size(&inputs[0]);
    let (out, saved) = block.forward(size, block_inputs(inputs));
    let [n, h, w] = size;
    (host(out, &[n, h, w, block.conv_1.outputs]), saved)
}

fn block_inputs(inputs: &[Host; 9]) -> Inputs<'_> {
    let [
        x,
        weight_1,
        bias_1,
        a,
        weight_nin,
        bias_nin,
        weight_2,
        bias_2,
        conditional,
    ] = inputs.each_ref().map(values);
    Inputs {
        x,
        conv_1: [weight_1, bias_1],
        a,
        nin: [weight_nin, bias_nin],
        conv_2: [weight_2, bias_2],
        conditional,
    }
}

/// An operation's backward pass: the state that the forward pass left, the gradient of the output
/// and which of the inputs want one, to the gradients of the inputs.
type Gradient<S, const N: usize> = fn(S, Host, [bool; N]) -> [Option<Host>; N];

#[derive(Debug)]
struct Step<S, const N: usize> {
    gradient: Gradient<S, N>,
}

impl<S: Clone + Send + Debug + 'static, const N: usize> Backward<Flex, N> for Step<S, N> {
    type State = S;

    fn backward(self, ops: Ops<S, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let d_out = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let found = (self.gradient)(ops.state, d_out, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(found) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Runs `forward` on contiguous inputs and, where one of them is tracked, records `gradient`.
fn track<C: CheckpointStrategy, S: Clone + Send + Debug + 'static, const N: usize>(
    inputs: [Tracked<C>; N],
    forward: impl FnOnce([Host; N]) -> (Host, S),
    gradient: Gradient<S, N>,
) -> Tracked<C> {
    let nodes = inputs.each_ref().map(|input| input.node());
    let inputs = inputs.map(|input| contiguous(input.into_primitive()));
    match (Step { gradient })
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let (out, state) = forward(inputs);
            prepared.finish(state, out)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(forward(inputs).0),
    }
}

fn contiguous(tensor: Host) -> Host {
    tensor.to_contiguous()
}

/// The values of a contiguous tensor.
fn values(tensor: &Host) -> &[f32] {
    tensor
        .as_slice()
        .expect("the tensor was made contiguous and the model is f32")
}

/// The values of a tensor, taken out of it where nothing else holds them.
fn vec_of(tensor: Host) -> Vec<f32> {
    tensor
        .into_data()
        .try_into_vec()
        .expect("every tensor of the model is f32")
}

/// \[n, h, w\] of a map.
fn size(map: &Host) -> [usize; 3] {
    let shape = map.shape();
    [shape[0], shape[1], shape[2]]
}

fn host(values: Vec<f32>, shape: &[usize]) -> Host {
    Host::from_data(TensorData::new(values, shape.to_vec()))
}

/// Gradients with the shapes of what they are for.
fn like<const N: usize>(inputs: &[Host; N], gradients: [Option<Vec<f32>>; N]) -> [Option<Host>; N] {
    let mut shapes = inputs.iter().map(|input| input.shape());
    gradients.map(|gradient| {
        let shape = shapes.next()?;
        gradient.map(|values| host(values, &shape))
    })
}
