//! A plan written down as a list of kernels, for some images.

use pixelcnn_core::ModelConfig;
use pixelcnn_core::likelihood::{Categorical, Likelihood, Mixture};
use pixelcnn_core::network::{GatedResnet, Layer, LayerKind};
use pixelcnn_core::plan::{Backward, Gradient, Operation, Plan};

use crate::engine::{Maps, Weights};
use crate::gpu::{Array, Arrays, List};
use crate::kernels::{self, Bend, Channels, Geometry};

/// A plan, and what it is carried out on.
pub(crate) struct Pass<'a> {
    pub config: &'a ModelConfig,
    pub plan: &'a Plan,
    pub maps: &'a Maps,
    /// As many images as there are maps for, or fewer.
    pub images: usize,
    pub weights: &'a Weights,
    /// Whether there is dropout: what it drops is with the maps.
    pub dropout: bool,
    /// Where the gradients by weights, biases and all else but `g` go.
    pub sums: Option<&'a Arrays>,
}

/// Which way a layer is gone through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Forward,
    /// From the gradient by its output to that by its input.
    Backward,
}

impl<'a> Pass<'a> {
    fn at(&self, buffer: usize) -> &'a Array {
        &self.maps.slots[self.plan.buffers[buffer].slot]
    }

    /// Values of a buffer.
    pub fn values(&self, buffer: usize) -> usize {
        self.images * self.plan.buffers[buffer].values()
    }

    /// \[images, rows, columns\] of a buffer.
    fn size(&self, buffer: usize) -> [usize; 3] {
        let [h, w] = self.plan.buffers[buffer].size;
        [self.images, h, w]
    }

    fn pixels_per_image(&self, buffer: usize) -> usize {
        self.plan.buffers[buffer].size.iter().product()
    }

    fn channels(&self, buffer: usize) -> usize {
        self.plan.buffers[buffer].channels
    }

    fn parameter(&self, number: usize) -> &'a Array {
        &self.weights.parameters.each[number]
    }

    fn bias(&self, layer: &Layer) -> &'a Array {
        self.parameter(layer.parameter + 2)
    }

    fn sum(&self, number: usize) -> &'a Array {
        &self
            .sums
            .expect("a plan with a backward pass has gradients")
            .each[number]
    }

    /// What the layers before a block's second nonlinearity add to it.
    fn biases(&self, block: &GatedResnet) -> Vec<&'a Array> {
        let layers = [Some(&block.conv_1), block.nin.as_ref()];
        layers
            .into_iter()
            .flatten()
            .map(|layer| self.bias(layer))
            .collect()
    }

    fn part(&self, block: &GatedResnet, part: usize, parts: usize) -> Channels {
        let count = block.conv_1.outputs;
        Channels {
            count,
            first: part * count,
            of: parts * count,
        }
    }

    /// Which channels of a concatenation each of its maps is.
    fn concatenated(&self, maps: &'a [usize], whole: usize) -> impl Iterator<Item = Channels> {
        let of = self.channels(whole);
        let ranges = self.plan.concatenated(maps);
        ranges.map(move |range| Channels {
            count: range.len(),
            first: range.start,
            of,
        })
    }

    /// f, of a map of the residual stream or a part of a concatenation of those.
    fn bent(&self, channels: Channels) -> Bend<'static> {
        Bend {
            f: kernels::number(self.config.nonlinearity),
            channels,
            biases: &[],
            dropout: None,
        }
    }

    /// Writes f of some maps of the residual stream, as one, to the scratch memory.
    fn bend(&self, list: &mut List, block: &GatedResnet, maps: &[usize]) -> &'a Array {
        let y = &self.maps.scratch;
        for (part, &map) in maps.iter().enumerate() {
            let bend = self.bent(self.part(block, part, maps.len()));
            bend.forward(list, self.at(map), y, self.values(map));
        }
        y
    }

    /// The dropout of a block.
    fn dropout_of(&self, block: &GatedResnet) -> Option<(&'a Array, usize)> {
        self.dropout.then_some((&self.maps.drops, block.number))
    }

    /// Carries a layer out, without its bias.
    fn layer(
        &self,
        list: &mut List,
        layer: &Layer,
        way: Way,
        size: [usize; 3],
        [input, output]: [&Array; 2],
        accumulate: bool,
    ) {
        let geometry = Geometry::of(layer, size);
        let [fine, coarse] = fine_and_coarse(layer, input, output);
        let weight = &self.weights.made.each[layer.parameter];
        let operands = [fine, weight, coarse];
        match (layer.kind == LayerKind::Deconv) == (way == Way::Backward) {
            true => geometry.convolve(list, operands, accumulate),
            false => geometry.transposed(list, operands, accumulate),
        }
    }

    /// The gradients by a layer's weight and bias, given that by its output.
    fn layer_gradients(
        &self,
        list: &mut List,
        layer: &Layer,
        size: [usize; 3],
        [from, d_to]: [&Array; 2],
    ) {
        let geometry = Geometry::of(layer, size);
        let [fine, coarse] = fine_and_coarse(layer, from, d_to);
        let (d_weight, d_bias) = (self.sum(layer.parameter), self.sum(layer.parameter + 2));
        let partial = &self.maps.partial;
        geometry.by_weight(list, [fine, d_weight, coarse], partial);
        let [images, h, w] = size;
        // The output of a transposed convolution is the finer map.
        let stride = match layer.kind {
            LayerKind::Deconv => 1,
            LayerKind::Conv | LayerKind::Dense => layer.window.stride,
        };
        let pixels = images * h.div_ceil(stride) * w.div_ceil(stride);
        kernels::by_bias(list, d_to, d_bias, partial, [pixels, layer.outputs]);
    }

    /// One operation of the forward pass.
    pub fn operation(&self, list: &mut List, operation: &'a Operation) {
        let to = operation.to();
        let (out, values) = (self.at(to), self.values(to));
        match operation {
            Operation::Images { .. } => {
                let channels = self.config.channels;
                kernels::images(
                    list,
                    &self.maps.levels,
                    out,
                    values,
                    channels,
                    self.channels(to),
                );
            }
            Operation::Embed { layer, map, .. } => {
                let weight = &self.weights.made.each[layer.parameter];
                let maps = self.config.nr_code_maps();
                kernels::embed(
                    list,
                    &self.maps.levels,
                    weight,
                    self.bias(layer),
                    out,
                    values,
                    maps,
                    *map,
                    layer.inputs,
                    layer.outputs,
                );
            }
            Operation::Layer { layer, from, .. } => {
                let size = self.size(layer.finer(*from, to));
                let ends = [self.at(*from), out];
                self.layer(list, layer, Way::Forward, size, ends, false);
                kernels::add_bias(list, self.bias(layer), out, values, layer.outputs);
            }
            Operation::GatedResnet {
                block,
                x,
                a,
                c1,
                c2,
                ..
            } => {
                let (size, way) = (self.size(*x), Way::Forward);
                let (before, after) = (self.at(*c1), self.at(*c2));
                let f_x = self.bend(list, block, &[*x]);
                self.layer(list, &block.conv_1, way, size, [f_x, before], false);
                if let Some(nin) = &block.nin {
                    let f_a = self.bend(list, block, a);
                    self.layer(list, nin, way, size, [f_a, before], true);
                }
                let f_c1 = &self.maps.scratch;
                self.inner(block, &self.biases(block)).forward(
                    list,
                    before,
                    f_c1,
                    self.values(*c1),
                );
                self.layer(list, &block.conv_2, way, size, [f_c1, after], false);
                let [bias, hw] = self.added(block);
                kernels::gate(
                    list,
                    self.at(*x),
                    after,
                    bias,
                    hw,
                    &self.maps.conditions,
                    out,
                    values,
                    block.conv_1.outputs,
                    self.pixels_per_image(to),
                    block.conditional.is_some(),
                );
            }
            &Operation::Shift { by, from, .. } => {
                let [_, h, w] = self.size(to);
                let channels = self.channels(to);
                kernels::shift(
                    list,
                    self.at(from),
                    out,
                    values,
                    h,
                    w,
                    channels,
                    by[0],
                    by[1],
                );
            }
            Operation::Add { from, .. } => kernels::add(list, self.at(*from), out, values),
            Operation::Elu { from, .. } => kernels::elu(list, self.at(*from), out, values),
            Operation::Concat { from, .. } => {
                for (&map, channels) in from.iter().zip(self.concatenated(from, to)) {
                    kernels::concat(list, self.at(map), out, self.values(map), channels);
                }
            }
            &Operation::Attention {
                heads,
                queries,
                keys_values,
                ..
            } => {
                let (q, kv) = (self.at(queries), self.at(keys_values));
                let pixels = self.pixels_per_image(to);
                let (count, channels) = (self.images * pixels * heads, self.channels(to));
                kernels::attend(list, q, kv, out, count, pixels, channels, heads);
            }
        }
    }

    /// f of what comes before a block's second nonlinearity, with dropout.
    fn inner<'b>(&'b self, block: &GatedResnet, biases: &'b [&'b Array]) -> Bend<'b> {
        Bend {
            biases,
            dropout: self.dropout_of(block),
            ..self.bent(self.part(block, 0, 1))
        }
    }

    /// What a block adds to its second convolution's output: its bias, and the conditional weights or, where it has
    /// none, something in their place.
    fn added(&self, block: &GatedResnet) -> [&'a Array; 2] {
        let bias = self.bias(&block.conv_2);
        [
            bias,
            block.conditional.map_or(bias, |hw| self.parameter(hw)),
        ]
    }

    /// Nats of every pixel, and the gradient by the logits where the plan has one.
    pub fn likelihood(&self, list: &mut List) {
        let logits = self.plan.logits;
        let pixels = self.images * self.pixels_per_image(logits);
        let by_logits = self.plan.d_logits.is_some();
        // In the place of a gradient that is not wanted.
        let gradient = self
            .plan
            .d_logits
            .map_or(&self.maps.partial, |buffer| self.at(buffer));
        let (levels, nats) = (&self.maps.levels, &self.maps.nats);
        let logits = self.at(logits);
        match Likelihood::of(self.config) {
            Likelihood::Mixture(Mixture {
                channels,
                components,
            }) => kernels::likelihood(
                list, levels, logits, nats, gradient, pixels, channels, components, by_logits,
            ),
            Likelihood::Categorical(Categorical { codes, .. }) => {
                let maps = self.config.nr_code_maps();
                kernels::likelihood_of_codes(
                    list, levels, logits, nats, gradient, pixels, maps, codes, by_logits,
                );
            }
        }
    }

    /// A whole step but for what follows from the gradients by the weights.
    pub fn gradients(&self, list: &mut List) {
        for operation in &self.plan.forward {
            self.operation(list, operation);
        }
        self.likelihood(list);
        for step in &self.plan.backward {
            self.backward(list, step);
        }
    }

    /// One operation of the backward pass.
    fn backward(&self, list: &mut List, step: &'a Backward) {
        let dy = self.at(step.output);
        match &self.plan.forward[step.operation] {
            Operation::Embed { layer, map, to } => {
                let pixels = self.images * self.pixels_per_image(*to);
                let (d_weight, d_bias) = (self.sum(layer.parameter), self.sum(layer.parameter + 2));
                let (codes, outputs) = (layer.inputs, layer.outputs);
                kernels::embed_by_weight(
                    list,
                    &self.maps.levels,
                    dy,
                    d_weight,
                    codes * outputs,
                    pixels,
                    self.config.nr_code_maps(),
                    *map,
                    codes,
                    outputs,
                );
                kernels::embed_by_bias(list, d_weight, d_bias, outputs, codes);
            }
            Operation::Layer { layer, from, .. } => {
                let size = self.size(layer.finer(*from, step.output));
                self.layer_gradients(list, layer, size, [self.at(*from), dy]);
                for &Gradient { buffer, accumulate } in &step.inputs {
                    let ends = [self.at(buffer), dy];
                    self.layer(list, layer, Way::Backward, size, ends, accumulate);
                }
            }
            Operation::GatedResnet { .. } => self.backward_block(list, step),
            &Operation::Shift { by, .. } => {
                for &Gradient { buffer, accumulate } in &step.inputs {
                    let [_, h, w] = self.size(buffer);
                    let (dx, values) = (self.at(buffer), self.values(buffer));
                    let channels = self.channels(buffer);
                    kernels::shift_backward(
                        list, dy, dx, values, h, w, channels, by[0], by[1], accumulate,
                    );
                }
            }
            Operation::Elu { from, .. } => {
                for &Gradient { buffer, accumulate } in &step.inputs {
                    let (x, dx) = (self.at(*from), self.at(buffer));
                    kernels::elu_backward(list, x, dy, dx, self.values(buffer), accumulate);
                }
            }
            Operation::Concat { from, .. } => {
                let parts = self.concatenated(from, step.output);
                for (&Gradient { buffer, accumulate }, channels) in step.inputs.iter().zip(parts) {
                    let maps = [dy, self.at(buffer)];
                    kernels::concat_backward(list, maps, self.values(buffer), channels, accumulate);
                }
            }
            &Operation::Attention {
                heads,
                queries,
                keys_values,
                ..
            } => {
                let [by_queries, by_keys_values] = step.inputs[..] else {
                    unreachable!("attention has two inputs");
                };
                let (q, kv, totals) = (self.at(queries), self.at(keys_values), &self.maps.scratch);
                let pixels = self.pixels_per_image(queries);
                let (count, channels) = (self.images * pixels * heads, self.channels(queries));
                let Gradient { buffer, accumulate } = by_queries;
                kernels::attend_by_queries(
                    list,
                    q,
                    kv,
                    dy,
                    self.at(buffer),
                    totals,
                    count,
                    pixels,
                    channels,
                    heads,
                    accumulate,
                );
                let Gradient { buffer, accumulate } = by_keys_values;
                kernels::attend_by_keys_values(
                    list,
                    q,
                    kv,
                    dy,
                    totals,
                    self.at(buffer),
                    count,
                    pixels,
                    channels,
                    heads,
                    accumulate,
                );
            }
            Operation::Images { .. } | Operation::Add { .. } => {}
        }
    }

    fn backward_block(&self, list: &mut List, step: &'a Backward) {
        let &Operation::GatedResnet {
            ref block,
            x,
            ref a,
            c1,
            c2,
            ..
        } = &self.plan.forward[step.operation]
        else {
            unreachable!("the caller looked");
        };
        let [by_x, ref by_a @ ..] = step.inputs[..] else {
            unreachable!("a block has a gradient by x");
        };
        let (size, d_out) = (self.size(x), self.at(step.output));
        let (pixels, values) = (self.pixels_per_image(x), self.values(x));
        // In the same memory as c2, and then as the gradient by c1: what was there is not needed.
        let d_c2 = self.at(c2);
        let d_c1 = d_c2;
        let [bias, hw] = self.added(block);
        let conditions = &self.maps.conditions;
        let conditional = block.conditional.is_some();
        let filters = block.conv_1.outputs;
        kernels::gate_backward(
            list,
            d_out,
            bias,
            hw,
            conditions,
            d_c2,
            values,
            filters,
            pixels,
            conditional,
        );
        if let Some(hw) = block.conditional {
            let (rows, channels) = (self.config.nr_conditions(), block.conv_2.outputs);
            let d_hw = self.sum(hw);
            kernels::hw_backward(
                list,
                d_c2,
                conditions,
                d_hw,
                rows * channels,
                channels,
                self.images,
                pixels,
            );
        }
        // Each f(x) and then the gradient by it, one after the other in the same memory.
        let scratch = &self.maps.scratch;
        let biases = self.biases(block);
        let inner = self.inner(block, &biases);
        inner.forward(list, self.at(c1), scratch, self.values(c1));
        self.layer_gradients(list, &block.conv_2, size, [scratch, d_c2]);
        self.layer(
            list,
            &block.conv_2,
            Way::Backward,
            size,
            [scratch, d_c2],
            false,
        );
        inner.backward(list, [self.at(c1), scratch, d_c1], self.values(c1), false);
        if let Some(nin) = &block.nin {
            self.bend(list, block, a);
            self.layer_gradients(list, nin, size, [scratch, d_c1]);
            self.layer(list, nin, Way::Backward, size, [scratch, d_c1], false);
            for (part, (&map, gradient)) in a.iter().zip(by_a).enumerate() {
                let bend = self.bent(self.part(block, part, a.len()));
                let maps = [self.at(map), scratch, self.at(gradient.buffer)];
                bend.backward(list, maps, self.values(map), gradient.accumulate);
            }
        }
        self.bend(list, block, &[x]);
        self.layer_gradients(list, &block.conv_1, size, [scratch, d_c1]);
        self.layer(
            list,
            &block.conv_1,
            Way::Backward,
            size,
            [scratch, d_c1],
            false,
        );
        // The residual connection hands the output's gradient on as it is.
        let bend = self.bent(self.part(block, 0, 1));
        bend.backward(list, [self.at(x), scratch, d_out], values, true);
        if by_x.buffer != step.output {
            kernels::add(list, d_out, self.at(by_x.buffer), values);
        }
    }
}

/// Which of a layer's input and output is the finer map, and which the coarser one.
fn fine_and_coarse<'a>(layer: &Layer, input: &'a Array, output: &'a Array) -> [&'a Array; 2] {
    [layer.finer(input, output), layer.finer(output, input)]
}
