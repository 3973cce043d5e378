//! The network's topology (paper, figure 2, sections 2.3 and 2.4), written once: [`pixelcnn`] walks
//! it in the original's order and hands every layer to a [`Pass`], which gives it a meaning: shapes
//! only ([`Layout`]), operations ([`Plan`](crate::plan::Plan)), or plain arithmetic
//! ([`reference`](crate::reference)).

use crate::config::{ModelConfig, Nonlinearity};
use crate::likelihood::{FEATURES, Mixture, NOISE, SAMPLES};

/// How a convolution's two maps lie over each other: tap `k` joins pixel `c` of the coarser map
/// with pixel `c * stride + k - offset` of the finer one, in each direction.
///
/// A convolution reads the finer map and writes the coarser one; a transposed convolution the
/// reverse. Shifted convolutions get their causality from the offset alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Rows and columns of the kernel.
    pub kernel: [usize; 2],
    /// 1, or 2 for down- and upsampling.
    pub stride: usize,
    /// Rows and columns by which the kernel reaches up and left.
    pub offset: [usize; 2],
}

impl Window {
    /// A 1x1 convolution: a dense layer at every pixel.
    pub const POINT: Window = Window {
        kernel: [1, 1],
        stride: 1,
        offset: [0, 0],
    };

    /// Sees the pixel and its neighbours on all sides: of what is given as a whole.
    pub const CENTRED: Window = Window {
        kernel: [3, 3],
        stride: 1,
        offset: [1, 1],
    };

    /// Sees the rows above and the pixel's own row to both sides: the vertical stack.
    pub const fn down_shifted(kernel: [usize; 2], stride: usize) -> Window {
        Window {
            kernel,
            stride,
            offset: [kernel[0] - 1, (kernel[1] - 1) / 2],
        }
    }

    /// Sees the rows above and the pixel's own row to the left: the horizontal stack.
    pub const fn down_right_shifted(kernel: [usize; 2], stride: usize) -> Window {
        Window {
            kernel,
            stride,
            offset: [kernel[0] - 1, kernel[1] - 1],
        }
    }

    /// The vertical stack's transposed convolution (2x3, stride 2).
    pub const DOWN_SHIFTED_DECONV: Window = Window {
        kernel: [2, 3],
        stride: 2,
        offset: [0, 1],
    };

    /// The horizontal stack's transposed convolution (2x2, stride 2).
    pub const DOWN_RIGHT_SHIFTED_DECONV: Window = Window {
        kernel: [2, 2],
        stride: 2,
        offset: [0, 0],
    };

    /// Number of taps.
    pub const fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }
}

/// What a layer's weight is, and so how it is stored: `V` has the original's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// `V` is \[rows, columns, in, out\].
    Conv,
    /// A transposed convolution; `V` is \[rows, columns, out, in\].
    Deconv,
    /// A network-in-network layer, 1x1; `V` is \[in, out\].
    Dense,
}

/// One weight-normalised layer: parameters `V`, `g`, `b` (Salimans & Kingma, 2016).
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Convolution, transposed convolution or dense.
    pub kind: LayerKind,
    /// Number among the layers of its kind, in creation order: `conv2d_3` is the fourth `Conv`.
    pub number: usize,
    /// Index of `V` among all parameters; `g` and `b` follow it.
    pub parameter: usize,
    /// How it slides.
    pub window: Window,
    /// Channels in.
    pub inputs: usize,
    /// Channels out.
    pub outputs: usize,
    /// Scale of the outputs after data-dependent initialisation: 0.1 for the second convolution of
    /// a gated resnet block, else 1.
    pub init_scale: f32,
    /// Whether it lies between others: it reads feature maps, and writes some.
    pub hidden: bool,
}

impl Layer {
    /// The finer one of what it reads and what it writes, which may be of one size.
    pub fn finer<T>(&self, from: T, to: T) -> T {
        match self.kind {
            LayerKind::Deconv => to,
            LayerKind::Conv | LayerKind::Dense => from,
        }
    }

    /// How often the resolution of its output is halved, if that of its input is `scale` times.
    pub fn scale_of_output(&self, scale: usize) -> usize {
        let halvings = self.window.stride - 1;
        match self.kind {
            LayerKind::Deconv => scale - halvings,
            LayerKind::Conv | LayerKind::Dense => scale + halvings,
        }
    }
}

/// One gated resnet block (the original's `gated_resnet`; its dropout: paper, section 2.5):
/// `x + split(conv_2(dropout(f(conv_1(f(x)) + nin(f(a))))) + h * hw)` gated.
#[derive(Debug, Clone, PartialEq)]
pub struct GatedResnet {
    /// First convolution.
    pub conv_1: Layer,
    /// Projection of the auxiliary input, where there is one.
    pub nin: Option<Layer>,
    /// Second convolution, to twice the channels.
    pub conv_2: Layer,
    /// Index of the conditional weights `hw` \[[`ModelConfig::nr_conditions`], 2 * filters\] among all
    /// parameters: a projection of classes and augmentations.
    pub conditional: Option<usize>,
    /// Number of the block in creation order: names `hw`, seeds dropout.
    pub number: usize,
}

/// What makes samples of the features of a pixel where a model is trained by the
/// [energy distance](crate::likelihood::EnergyDistance): the layers on the noise, on that and the features
/// together, and on what comes of it.
pub type Head = [Layer; 3];

/// A meaning for the network's layers.
pub trait Pass {
    /// A feature map \[N, H, W, C\].
    type Map: Clone;

    /// The input with a plane of ones appended, so that the network sees where the image ends.
    fn append_ones(&mut self, x: &Self::Map) -> Self::Map;
    /// What a dense layer makes of the input's codes as one-hot vectors, with a plane of ones appended: of
    /// those of the map itself (0), or of the coarser one (1).
    fn embed(&mut self, layer: &Layer, x: &Self::Map, map: usize) -> Self::Map;
    /// The first channels of the input alone.
    fn first_channels(&mut self, x: &Self::Map, channels: usize) -> Self::Map;
    /// A weight-normalised layer.
    fn layer(&mut self, layer: &Layer, x: &Self::Map) -> Self::Map;
    /// A gated resnet block.
    fn gated_resnet(
        &mut self,
        block: &GatedResnet,
        x: &Self::Map,
        a: Option<&Self::Map>,
    ) -> Self::Map;
    /// Moves every row down by one, zeros coming in.
    fn down_shift(&mut self, x: Self::Map) -> Self::Map;
    /// Moves every column right by one, zeros coming in.
    fn right_shift(&mut self, x: Self::Map) -> Self::Map;
    /// The sum of two maps.
    fn add(&mut self, x: Self::Map, y: Self::Map) -> Self::Map;
    /// The channels of two maps, one after the other.
    fn concat(&mut self, x: &Self::Map, y: &Self::Map) -> Self::Map;
    /// The exponential linear unit.
    fn elu(&mut self, x: Self::Map) -> Self::Map;
    /// Causal self-attention: what each pixel sees of those up to it in raster order. See
    /// [`Attention`](crate::kernels::attention::Attention).
    fn attention(
        &mut self,
        heads: usize,
        queries: &Self::Map,
        keys_values: &Self::Map,
    ) -> Self::Map;
    /// Told of the layers that the energy distance has behind the network's output.
    fn head(&mut self, _head: &Head) {}
    /// Told of every feature map of the two stacks that the original records, in its order.
    fn record(&mut self, _map: &Self::Map) {}
}

/// Numbers layers and parameters in creation order.
struct Builder<'a> {
    config: &'a ModelConfig,
    counts: [usize; 3],
    blocks: usize,
    parameters: usize,
}

impl Builder<'_> {
    fn layer(&mut self, kind: LayerKind, window: Window, inputs: usize, outputs: usize) -> Layer {
        let count = &mut self.counts[kind as usize];
        let layer = Layer {
            kind,
            number: *count,
            parameter: self.parameters,
            window,
            inputs,
            outputs,
            init_scale: 1.0,
            hidden: true,
        };
        *count += 1;
        self.parameters += 3;
        layer
    }

    /// A dense layer at every pixel.
    fn dense(&mut self, inputs: usize, outputs: usize) -> Layer {
        self.layer(LayerKind::Dense, Window::POINT, inputs, outputs)
    }

    /// One that reads the image or writes the output.
    fn outer(&mut self, kind: LayerKind, window: Window, inputs: usize, outputs: usize) -> Layer {
        Layer {
            hidden: false,
            ..self.layer(kind, window, inputs, outputs)
        }
    }

    /// A dense layer that does.
    fn outer_dense(&mut self, inputs: usize, outputs: usize) -> Layer {
        self.outer(LayerKind::Dense, Window::POINT, inputs, outputs)
    }

    /// `auxiliary` is the number of channels of `a` before the nonlinearity, 0 without one.
    fn gated_resnet(&mut self, window: Window, auxiliary: usize) -> GatedResnet {
        let kind = match window {
            Window::POINT => LayerKind::Dense,
            _ => LayerKind::Conv,
        };
        let filters = self.config.nr_filters;
        let f = |channels| self.config.nonlinearity.outputs(channels);
        let (wide, projected) = (f(filters), f(auxiliary));
        let conv_1 = self.layer(kind, window, wide, filters);
        let nin = (auxiliary > 0).then(|| self.dense(projected, filters));
        let mut conv_2 = self.layer(kind, window, wide, 2 * filters);
        conv_2.init_scale = 0.1;
        let conditional = (self.config.nr_conditions() > 0).then(|| {
            self.parameters += 1;
            self.parameters - 1
        });
        self.blocks += 1;
        GatedResnet {
            conv_1,
            nin,
            conv_2,
            conditional,
            number: self.blocks - 1,
        }
    }
}

/// Runs the network on an `image` \[N, H, W, channels\], scaled to \[-1, 1\], or on codes; gives the
/// mixture's parameters, the codes' logits or the features that samples are made of, \[N, H, W, [`ModelConfig::output_channels`]\].
pub fn pixelcnn<P: Pass>(config: &ModelConfig, pass: &mut P, image: P::Map) -> P::Map {
    let mut build = Builder {
        config,
        counts: [0; 3],
        blocks: 0,
        parameters: 0,
    };
    let filters = config.nr_filters;
    let vertical = Window::down_shifted([2, 3], 1);
    let horizontal = Window::down_right_shifted([2, 2], 1);

    // The first layers see nothing of the pixel itself: the vertical stack (u) only rows above,
    // the horizontal stack (ul) rows above and what is to the left.
    let (x, inputs) = match config.nr_codes {
        0 => (pass.append_ones(&image), config.channels + 1),
        codes => {
            let layer = build.outer_dense(codes, filters);
            (pass.embed(&layer, &image, 0), filters + 1)
        }
    };
    let mut first = |pass: &mut P, window| {
        let layer = build.outer(LayerKind::Conv, window, inputs, filters);
        pass.layer(&layer, &x)
    };
    let u = first(pass, Window::down_shifted([2, 3], 1));
    let u = pass.down_shift(u);
    let above = first(pass, Window::down_shifted([1, 3], 1));
    let above = pass.down_shift(above);
    let left = first(pass, Window::down_right_shifted([2, 1], 1));
    let left = pass.right_shift(left);
    let ul = pass.add(above, left);
    let [u, ul] = match config.nr_coarse_codes {
        0 => [u, ul],
        codes => {
            // All of the coarser map is given: both stacks see what lies around the pixel.
            let layer = build.outer_dense(codes, filters);
            let coarse = pass.embed(&layer, &image, 1);
            [u, ul].map(|map| {
                let layer = build.outer(LayerKind::Conv, Window::CENTRED, filters + 1, filters);
                let seen = pass.layer(&layer, &coarse);
                pass.add(map, seen)
            })
        }
    };

    // Up pass: three resolutions, every map kept for the shortcuts.
    let (mut us, mut uls) = (vec![u], vec![ul]);
    for scale in 0..3 {
        if scale > 0 {
            let window = Window::down_shifted([2, 3], 2);
            let layer = build.layer(LayerKind::Conv, window, filters, filters);
            us.push(pass.layer(&layer, &us[us.len() - 1]));
            let window = Window::down_right_shifted([2, 2], 2);
            let layer = build.layer(LayerKind::Conv, window, filters, filters);
            uls.push(pass.layer(&layer, &uls[uls.len() - 1]));
        }
        for _ in 0..config.nr_resnet {
            let block = build.gated_resnet(vertical, 0);
            let u = pass.gated_resnet(&block, &us[us.len() - 1], None);
            let block = build.gated_resnet(horizontal, filters);
            let ul = pass.gated_resnet(&block, &uls[uls.len() - 1], Some(&u));
            us.push(u);
            uls.push(ul);
        }
    }
    us.iter().chain(&uls).for_each(|map| pass.record(map));

    // Down pass: back to full resolution, each block fed by its mirror image of the up pass.
    let (Some(mut u), Some(mut ul)) = (us.pop(), uls.pop()) else {
        unreachable!("the up pass pushed maps");
    };
    for scale in 0..3 {
        if scale > 0 {
            let window = Window::DOWN_SHIFTED_DECONV;
            let layer = build.layer(LayerKind::Deconv, window, filters, filters);
            u = pass.layer(&layer, &u);
            let window = Window::DOWN_RIGHT_SHIFTED_DECONV;
            let layer = build.layer(LayerKind::Deconv, window, filters, filters);
            ul = pass.layer(&layer, &ul);
        }
        for _ in 0..config.nr_resnet + usize::from(scale > 0) {
            let (Some(u_short), Some(ul_short)) = (us.pop(), uls.pop()) else {
                unreachable!("the down pass takes as many maps as the up pass left");
            };
            let block = build.gated_resnet(vertical, filters);
            u = pass.gated_resnet(&block, &u, Some(&u_short));
            let block = build.gated_resnet(horizontal, 2 * filters);
            let both = pass.concat(&u, &ul_short);
            ul = pass.gated_resnet(&block, &ul, Some(&both));
            pass.record(&u);
            pass.record(&ul);
        }
        let heads = config.attention[2 - scale];
        if heads > 0 {
            ul = attend(&mut build, pass, heads, ul);
        }
    }

    if config.nr_channel_resnet > 0 {
        return channel_by_channel(&mut build, pass, &image, &ul);
    }
    let ul = pass.elu(ul);
    if config.energy_distance {
        let layer = build.dense(filters, FEATURES);
        let features = pass.layer(&layer, &ul);
        let head = [
            build.outer_dense(NOISE, FEATURES),
            build.dense(2 * FEATURES, FEATURES),
            Layer {
                init_scale: 0.1,
                ..build.outer_dense(2 * FEATURES, config.channels)
            },
        ];
        pass.head(&head);
        return features;
    }
    let layer = build.outer_dense(filters, config.output_channels());
    pass.layer(&layer, &ul)
}

/// What the horizontal stack sees of all pixels before (PixelSNAIL's attention block; Chen et al., 2018,
/// section 2). The keys and values of a pixel are of the features there and one pixel to the left, which
/// hold the pixel that they lead up to: so they may be seen from the pixel itself on, and no mask must
/// keep a pixel from its own.
fn attend<P: Pass>(build: &mut Builder, pass: &mut P, heads: usize, ul: P::Map) -> P::Map {
    let filters = build.config.nr_filters;
    let bent = pass.elu(ul.clone());
    let layer = build.dense(filters, filters);
    let queries = pass.layer(&layer, &bent);
    let window = Window::down_right_shifted([1, 2], 1);
    let layer = build.layer(LayerKind::Conv, window, filters, 2 * filters);
    let keys_values = pass.layer(&layer, &bent);
    let seen = pass.attention(heads, &queries, &keys_values);
    let block = build.gated_resnet(Window::POINT, filters);
    pass.gated_resnet(&block, &ul, Some(&seen))
}

/// The mixture's parameters, each channel's from the features and the channels before it.
fn channel_by_channel<P: Pass>(
    build: &mut Builder,
    pass: &mut P,
    image: &P::Map,
    features: &P::Map,
) -> P::Map {
    let ModelConfig {
        channels,
        nr_filters: filters,
        nr_channel_resnet,
        ..
    } = *build.config;
    let mixture = Mixture::of(build.config);
    let mut all = None;
    for channel in 0..channels {
        let known = (channel > 0).then(|| {
            let layer = build.outer_dense(channel, filters);
            let known = pass.first_channels(image, channel);
            pass.layer(&layer, &known)
        });
        let mut x = features.clone();
        for _ in 0..nr_channel_resnet {
            let auxiliary = if channel > 0 { filters } else { 0 };
            let block = build.gated_resnet(Window::POINT, auxiliary);
            x = pass.gated_resnet(&block, &x, known.as_ref());
        }
        let x = pass.elu(x);
        let layer = build.outer_dense(filters, mixture.logits_of(channel..channel + 1).len());
        let own = pass.layer(&layer, &x);
        all = Some(match all {
            None => own,
            Some(before) => pass.concat(&before, &own),
        });
    }
    all.expect("a channel at least")
}

/// What a parameter is, which fixes how it is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// Direction of a weight, drawn from N(0, 0.05).
    V,
    /// Length of a weight, 1.
    G,
    /// Bias, 0.
    B,
    /// Conditional weights, drawn from N(0, 0.05).
    Hw,
}

/// One parameter: its name in the original's code and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// As in the original's checkpoints: `model/conv2d_0/V`.
    pub name: String,
    /// As in the original's checkpoints.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
}

impl Parameter {
    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parameters of a model in creation order, and what one image costs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Layout {
    /// All parameters in the original's creation order.
    pub parameters: Vec<Parameter>,
    /// All layers, those inside of gated resnet blocks included, in the same order.
    pub layers: Vec<Layer>,
    /// Those of them behind the network's output.
    pub head: Option<Head>,
    /// Multiply-adds of one forward pass over one image.
    pub multiply_adds: u64,
}

impl Layout {
    /// The layout of a model.
    pub fn new(config: &ModelConfig) -> Layout {
        let mut pass = LayoutPass {
            layout: Layout::default(),
            nonlinearity: config.nonlinearity,
            conditions: config.nr_conditions(),
            filters: config.nr_filters,
            size: [config.height, config.width],
        };
        pixelcnn(config, &mut pass, [config.height, config.width]);
        pass.layout
    }

    /// The first parameter of which `values`, arrays in its order, have not the right number, and how
    /// many they have.
    pub fn misfit(&self, values: &[Vec<f32>]) -> Option<(&Parameter, usize)> {
        let found = |i: usize| values.get(i).map_or(0, Vec::len);
        let parameters = self.parameters.iter().enumerate();
        let mut found = parameters.map(|(i, parameter)| (parameter, found(i)));
        found.find(|(parameter, found)| parameter.len() != *found)
    }

    /// The `V` of all hidden layers as matrices of \[rows, columns\]: the number of each parameter, and its
    /// shape with all dimensions but the last one together.
    pub fn matrices(&self) -> impl Iterator<Item = (usize, [usize; 2])> {
        let hidden = self.layers.iter().filter(|layer| layer.hidden);
        hidden.map(|layer| {
            let parameter = &self.parameters[layer.parameter];
            let columns = parameter.shape[parameter.shape.len() - 1];
            (layer.parameter, [parameter.len() / columns, columns])
        })
    }

    /// Number of parameters.
    pub fn size(&self) -> usize {
        self.parameters.iter().map(Parameter::len).sum()
    }
}

struct LayoutPass {
    layout: Layout,
    nonlinearity: Nonlinearity,
    conditions: usize,
    filters: usize,
    /// Of an image.
    size: [usize; 2],
}

impl LayoutPass {
    fn parameter(&mut self, name: String, kind: ParameterKind, shape: Vec<usize>) {
        let name = format!("model/{name}");
        self.layout.parameters.push(Parameter { name, shape, kind });
    }
}

impl Pass for LayoutPass {
    /// Rows and columns.
    type Map = [usize; 2];

    fn append_ones(&mut self, x: &Self::Map) -> Self::Map {
        *x
    }

    fn embed(&mut self, layer: &Layer, x: &Self::Map, _map: usize) -> Self::Map {
        // Looked up, not multiplied.
        let before = self.layout.multiply_adds;
        let map = self.layer(layer, x);
        self.layout.multiply_adds = before;
        map
    }

    fn first_channels(&mut self, x: &Self::Map, _channels: usize) -> Self::Map {
        *x
    }

    fn layer(&mut self, layer: &Layer, x: &Self::Map) -> Self::Map {
        let ([kh, kw], [i, o], s) = (
            layer.window.kernel,
            [layer.inputs, layer.outputs],
            layer.window.stride,
        );
        let (name, shape, out) = match layer.kind {
            LayerKind::Conv => ("conv2d", vec![kh, kw, i, o], x.map(|n| n / s)),
            LayerKind::Deconv => ("deconv2d", vec![kh, kw, o, i], x.map(|n| n * s)),
            LayerKind::Dense => ("dense", vec![i, o], *x),
        };
        let coarse = if layer.kind == LayerKind::Deconv {
            *x
        } else {
            out
        };
        let name = format!("{name}_{}", layer.number);
        self.layout.layers.push(layer.clone());
        self.layout.multiply_adds +=
            (coarse[0] * coarse[1]) as u64 * shape.iter().product::<usize>() as u64;
        self.parameter(format!("{name}/V"), ParameterKind::V, shape);
        self.parameter(format!("{name}/g"), ParameterKind::G, vec![o]);
        self.parameter(format!("{name}/b"), ParameterKind::B, vec![o]);
        out
    }

    fn gated_resnet(
        &mut self,
        block: &GatedResnet,
        x: &Self::Map,
        _a: Option<&Self::Map>,
    ) -> Self::Map {
        self.layer(&block.conv_1, x);
        if let Some(nin) = &block.nin {
            self.layer(nin, x);
        }
        self.layer(&block.conv_2, x);
        if block.conditional.is_some() {
            let shape = vec![self.conditions, block.conv_2.outputs];
            self.layout.multiply_adds += block.conv_2.outputs as u64;
            let name = format!("conditional_weights_{}/hw", block.number);
            self.parameter(name, ParameterKind::Hw, shape);
        }
        debug_assert_eq!(
            block.conv_2.inputs,
            self.nonlinearity.outputs(block.conv_1.outputs)
        );
        *x
    }

    fn down_shift(&mut self, x: Self::Map) -> Self::Map {
        x
    }

    fn right_shift(&mut self, x: Self::Map) -> Self::Map {
        x
    }

    fn add(&mut self, x: Self::Map, _y: Self::Map) -> Self::Map {
        x
    }

    fn concat(&mut self, x: &Self::Map, _y: &Self::Map) -> Self::Map {
        *x
    }

    fn elu(&mut self, x: Self::Map) -> Self::Map {
        x
    }

    fn head(&mut self, head: &Head) {
        let before = self.layout.multiply_adds;
        for layer in head {
            self.layer(layer, &self.size.clone());
        }
        let of_a_sample = self.layout.multiply_adds - before;
        self.layout.multiply_adds = before + SAMPLES as u64 * of_a_sample;
        self.layout.head = Some(head.clone());
    }

    fn attention(&mut self, _heads: usize, queries: &Self::Map, _: &Self::Map) -> Self::Map {
        // Every pixel's products with half of all pixels, in the mean, and their sums.
        let pixels = (queries[0] * queries[1]) as u64;
        self.layout.multiply_adds += pixels * (pixels + 1) * self.filters as u64;
        *queries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_originals() {
        assert_eq!(Layout::new(&ModelConfig::default()).size(), 53_659_080);
        let small = ModelConfig {
            nr_filters: 32,
            nr_resnet: 2,
            ..ModelConfig::default()
        };
        assert_eq!(Layout::new(&small).size(), 974_856);
    }
    /// Muon moves all but what reads the image, its codes or noise, and what writes the output.
    #[test]
    fn outer_layers_are_no_matrices() {
        let outer = |config: ModelConfig| {
            let layout = Layout::new(&config);
            let moved: Vec<usize> = layout.matrices().map(|(number, _)| number).collect();
            let layers = layout.layers.iter();
            let outer = layers.filter(|layer| !moved.contains(&layer.parameter));
            let name = |layer: &Layer| match layer.kind {
                LayerKind::Conv => format!("conv {}", layer.number),
                LayerKind::Deconv => format!("deconv {}", layer.number),
                LayerKind::Dense => format!("dense {}", layer.number),
            };
            outer.map(name).collect::<Vec<_>>().join(", ")
        };
        let base = ModelConfig {
            nr_resnet: 1,
            attention: [0, 4, 0],
            ..ModelConfig::default()
        };
        assert_eq!(outer(base.clone()), "conv 0, conv 1, conv 2, dense 17");
        let by_channel = ModelConfig {
            nr_channel_resnet: 1,
            ..base.clone()
        };
        assert_eq!(
            outer(by_channel),
            "conv 0, conv 1, conv 2, dense 19, dense 20, dense 24, dense 25, dense 29"
        );
        let codes = ModelConfig {
            channels: 1,
            nr_codes: 160,
            nr_coarse_codes: 160,
            ..base.clone()
        };
        assert_eq!(
            outer(codes),
            "dense 0, conv 0, conv 1, conv 2, dense 1, conv 3, conv 4, dense 19"
        );
        let energy = ModelConfig {
            energy_distance: true,
            ..base
        };
        assert_eq!(outer(energy), "conv 0, conv 1, conv 2, dense 18, dense 20");
    }
}
