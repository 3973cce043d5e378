//! A plan carried out: every operation, on some images of a batch.

use std::array;
use std::mem;
use std::ops::Range;

use rayon::prelude::*;

use super::{Arrays, Part};
use crate::config::{ModelConfig, halved};
use crate::engine::Precision;
use crate::kernels::attention::Attention;
use crate::kernels::conv::Conv;
use crate::kernels::gated_resnet::{self, GatedResnet, Gradients, MapGradient};
use crate::kernels::pointwise::{Dropout, elu, elu_backward};
use crate::likelihood::{EnergyDistance, Likelihood, Noise, from_level, per_image};
use crate::network::{self, Layer, LayerKind};
use crate::plan::{Backward, Buffer, Gradient, Operation, Plan};

/// The memory of an execution, used by the next one.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// By slot.
    slots: Vec<Vec<f32>>,
    /// Of one operation.
    scratch: Vec<f32>,
    /// The last row of the band before of what each operation writes: of its output, and of `c1`.
    last_rows: Vec<[Vec<f32>; 2]>,
}

/// A plan being carried out on some images of a batch.
pub(super) struct Execution<'a> {
    pub plan: &'a Plan,
    pub config: &'a ModelConfig,
    /// As [`super::weights::make`] makes them of the parameters.
    pub weights: &'a [Vec<f32>],
    pub part: Part<'a>,
    /// Rows above a part that its maps hold as well: none, or one where the part is a band of an
    /// image, for no kernel reaches further up.
    pub above: usize,
    pub dropout: Option<Dropout>,
    /// What the blocks' convolutions multiply.
    pub precision: Precision,
    pub memory: Memory,
}

/// The kernels' geometry of a layer.
pub(super) fn conv_of(layer: &Layer) -> Conv {
    Conv {
        window: layer.window,
        transposed: layer.kind == LayerKind::Deconv,
        inputs: layer.inputs,
        outputs: layer.outputs,
        precision: Precision::F32,
    }
}

impl<'a> Execution<'a> {
    /// The whole forward pass.
    pub fn forward(&mut self) {
        for number in 0..self.plan.forward.len() {
            self.operation(number);
        }
    }

    /// The forward pass over one image band by band: `each` is called after each band with what is
    /// in it and the logits.
    pub fn forward_in_bands(&mut self, bands: &[Part<'a>], mut each: impl FnMut(Part, &[f32])) {
        self.above = usize::from(bands.len() > 1);
        self.memory.last_rows.clear();
        let rows = || [Vec::new(), Vec::new()];
        self.memory
            .last_rows
            .resize_with(self.plan.forward.len(), rows);
        for &band in bands {
            self.part = band;
            self.forward();
            each(band, self.values(self.plan.logits));
        }
    }

    /// The nats of all images; writes the gradient by the logits, and among `gradients` those by the layers
    /// that the likelihood has of its own.
    pub fn likelihood(&mut self, gradients: &mut Arrays) -> f64 {
        let pixels = self.config.height * self.config.width;
        let (logits, d_logits) = (self.plan.logits, self.plan.d_logits);
        let d_logits = d_logits.expect("a plan of training has it");
        let [mut memory] = self.take([d_logits]);
        let (logits, gradient) = (self.values(logits), &mut memory[..self.len(d_logits)]);
        let images = self.part.batch.images;
        let nats = match &self.plan.head {
            None => {
                let likelihood = Likelihood::of(self.config);
                likelihood.nats_and_gradient(pixels, images, logits, gradient)
            }
            Some(head) => {
                let mut by_layers = head
                    .each_ref()
                    .map(|layer| take_gradients(gradients, layer));
                let distances = EnergyDistance::of(self.config, head, self.weights).with_gradients(
                    Noise::of(self.dropout),
                    self.part.first,
                    images,
                    logits,
                    gradient,
                    &mut by_layers,
                );
                for (layer, found) in head.iter().zip(by_layers) {
                    give_gradients(gradients, layer, found);
                }
                per_image(pixels, &distances)
            }
        };
        self.give([d_logits], [memory]);
        nats.iter().sum()
    }

    /// The whole backward pass: `gradients` become those by the weights. `done` is called after every
    /// step with its number.
    pub fn backward(&mut self, gradients: &mut Arrays, mut done: impl FnMut(usize, &mut Arrays)) {
        for (number, step) in self.plan.backward.iter().enumerate() {
            self.backward_step(step, gradients);
            done(number, gradients);
        }
    }

    /// Values of a buffer.
    pub fn len(&self, buffer: usize) -> usize {
        let [n, h, w] = self.size(buffer);
        n * h * w * self.plan.buffers[buffer].channels
    }

    /// Values of a row of a buffer.
    fn len_of_row(&self, buffer: usize) -> usize {
        let Buffer { size, channels, .. } = self.plan.buffers[buffer];
        size[1] * channels
    }

    /// Values of the rows above a buffer.
    fn len_above(&self, buffer: usize) -> usize {
        self.above * self.len_of_row(buffer)
    }

    /// Rows above that a convolution reads.
    fn above_for(&self, conv: &Conv) -> usize {
        match conv.reaches_up() {
            true => self.above,
            false => 0,
        }
    }

    /// What a convolution reads of a buffer.
    fn read_by(&self, conv: &Conv, buffer: usize) -> &[f32] {
        match conv.reaches_up() {
            true => self.values_and_above(buffer),
            false => self.values(buffer),
        }
    }

    /// What a buffer holds, without the rows above.
    pub fn values(&self, buffer: usize) -> &[f32] {
        &self.values_and_above(buffer)[self.len_above(buffer)..]
    }

    /// What a buffer holds, and before it the rows above.
    fn values_and_above(&self, buffer: usize) -> &[f32] {
        let len = self.len_above(buffer) + self.len(buffer);
        &self.memory.slots[self.plan.buffers[buffer].slot][..len]
    }

    /// Takes the memory of some buffers out, to be written: at least as long as they are with the
    /// rows above.
    pub fn take<const N: usize>(&mut self, buffers: [usize; N]) -> [Vec<f32>; N] {
        let plan = self.plan;
        if self.memory.slots.len() < plan.slots.len() {
            self.memory.slots.resize(plan.slots.len(), Vec::new());
        }
        buffers.map(|buffer| {
            let slot = plan.buffers[buffer].slot;
            // What the largest buffer of the slot takes, or with the row above this one.
            let largest = self.part.images * plan.slots[slot] * self.part.rows / self.config.height;
            let size = largest.max(self.len_above(buffer) + self.len(buffer));
            let memory = &mut self.memory.slots[slot];
            if memory.len() < size {
                *memory = vec![0.0; size];
            }
            mem::take(memory)
        })
    }

    /// Puts the memory of some buffers back.
    pub fn give<const N: usize>(&mut self, buffers: [usize; N], memories: [Vec<f32>; N]) {
        for (buffer, memory) in buffers.into_iter().zip(memories) {
            self.memory.slots[self.plan.buffers[buffer].slot] = memory;
        }
    }

    /// Takes the memory of one operation out.
    pub fn take_scratch(&mut self) -> Vec<f32> {
        mem::take(&mut self.memory.scratch)
    }

    pub fn give_scratch(&mut self, scratch: Vec<f32>) {
        self.memory.scratch = scratch;
    }

    /// Writes into the memory of a buffer, as `which` of an operation's outputs, the rows above.
    fn restore(&self, operation: usize, which: usize, buffer: usize, memory: &mut [f32]) {
        let above = &mut memory[..self.len_above(buffer)];
        if !above.is_empty() {
            match &self.memory.last_rows[operation][which][..] {
                [] => above.fill(0.0),
                row => above.copy_from_slice(row),
            }
        }
    }

    /// Keeps the last row of that memory for the next band.
    fn keep(&mut self, operation: usize, which: usize, buffer: usize, memory: &[f32]) {
        let (above, len) = (self.len_above(buffer), self.len(buffer));
        if above > 0 {
            let row = &mut self.memory.last_rows[operation][which];
            row.clear();
            row.extend(&memory[len..len + above]);
        }
    }

    /// \[images, rows, columns\] of a buffer, without the rows above.
    pub fn size(&self, buffer: usize) -> [usize; 3] {
        let Buffer { scale, size, .. } = self.plan.buffers[buffer];
        [self.part.images, halved(self.part.rows, scale), size[1]]
    }

    /// A layer's weight and bias.
    pub fn weight(&self, layer: &Layer) -> [&'a [f32]; 2] {
        let weights = self.weights;
        [0, 2].map(|k| &weights[layer.parameter + k][..])
    }

    /// Dropout of a block whose maps have the size of a buffer: every block draws its own numbers.
    pub fn dropout_of(&self, block: &network::GatedResnet, buffer: usize) -> Option<Dropout> {
        let [_, h, w] = self.size(buffer);
        self.dropout.map(|Dropout { rate, seed, .. }| Dropout {
            rate,
            seed: seed.wrapping_add(block.number as u64),
            first: self.part.first * h * w * block.conv_2.inputs,
        })
    }

    /// `h * hw` of a block \[images, 2 * filters\]: the rows of each image's conditions, added up; empty
    /// without.
    pub fn conditional(&self, block: &network::GatedResnet) -> Vec<f32> {
        let Some(hw) = block.conditional else {
            return Vec::new();
        };
        let channels = block.conv_2.outputs;
        let mut sums = vec![0.0; self.part.images * channels];
        for (image, sum) in sums.chunks_exact_mut(channels).enumerate() {
            for row in self.part.batch.conditions(self.config, image) {
                add(sum, &self.weights[hw][row * channels..][..channels]);
            }
        }
        sums
    }

    /// One operation of the forward pass.
    pub fn operation(&mut self, number: usize) {
        let operation = &self.plan.forward[number];
        if let &Operation::GatedResnet {
            ref block,
            x,
            ref a,
            c1,
            c2,
            to,
        } = operation
        {
            let mut scratch = self.take_scratch();
            let [mut c1_, mut c2_, mut to_] = self.take([c1, c2, to]);
            self.restore(number, 0, to, &mut to_);
            self.restore(number, 1, c1, &mut c1_);
            let kernel = self.kernel(block, x);
            let above = self.above_for(&kernel.conv_1);
            let c1_first = self.len_above(c1) - above * self.len_of_row(c1);
            let (c1_len, to_first) = (self.len_above(c1) + self.len(c1), self.len_above(to));
            let conditional = self.conditional(block);
            kernel.forward(
                self.size(x),
                above,
                &self.inputs(block, x, a, &conditional),
                [
                    &mut c1_[c1_first..c1_len],
                    &mut c2_[..self.len(c2)],
                    &mut to_[to_first..][..self.len(to)],
                ],
                &mut scratch,
            );
            self.keep(number, 0, to, &to_);
            self.keep(number, 1, c1, &c1_);
            self.give([c1, c2, to], [c1_, c2_, to_]);
            self.give_scratch(scratch);
            return;
        }
        let to = operation.to();
        let [mut memory] = self.take([to]);
        self.restore(number, 0, to, &mut memory);
        let out = &mut memory[self.len_above(to)..][..self.len(to)];
        match operation {
            Operation::Images { .. } => self.images(self.plan.buffers[to].channels, out),
            Operation::Embed { layer, map, .. } => self.embed(layer, *map, out),
            Operation::Layer { layer, from, .. } => {
                let [weight, bias] = self.weight(layer);
                let (conv, size) = (conv_of(layer), self.size(layer.finer(*from, to)));
                let (above, x) = (self.above_for(&conv), self.read_by(&conv, *from));
                conv.forward_below(above, size, x, weight, bias, false, out);
            }
            Operation::Shift { by, from, .. } => {
                out.fill(0.0);
                let from = self.values_and_above(*from);
                self.shift(*by, to, |inner, outer| {
                    out[outer].copy_from_slice(&from[inner]);
                });
            }
            Operation::Add { from, .. } => add(out, self.values(*from)),
            Operation::Elu { from, .. } => elu(self.values(*from), out),
            Operation::Concat { from, .. } => {
                for (channels, map) in self.plan.concatenated(from).zip(from) {
                    let map = self.values(*map).chunks_exact(channels.len());
                    let out = out.chunks_exact_mut(self.plan.buffers[to].channels);
                    for (out, map) in out.zip(map) {
                        out[channels.clone()].copy_from_slice(map);
                    }
                }
            }
            Operation::Attention {
                heads,
                queries,
                keys_values,
                ..
            } => {
                let kernel = self.attention(*heads, to);
                kernel.forward(self.values(*queries), self.values(*keys_values), out);
            }
            Operation::GatedResnet { .. } => unreachable!("done above"),
        }
        self.keep(number, 0, to, &memory);
        self.give([to], [memory]);
    }

    /// Writes the images, scaled: the first of their channels, or all and a plane of ones.
    fn images(&self, channels: usize, out: &mut [f32]) {
        let pixels = self.part.batch.images.chunks_exact(self.config.channels);
        for (out, levels) in out.chunks_exact_mut(channels).zip(pixels) {
            for (value, &level) in out.iter_mut().zip(levels) {
                *value = from_level(level);
            }
            if let Some(one) = out.get_mut(self.config.channels) {
                *one = 1.0;
            }
        }
    }

    /// The codes of the pixels: their own, or those of the coarser map.
    fn codes(&self, map: usize) -> impl Iterator<Item = usize> + use<'a> {
        let bytes = self.config.bytes_per_pixel();
        let pixels = self.part.batch.images.chunks_exact(bytes);
        pixels.map(move |pixel| ModelConfig::code(pixel, map))
    }

    /// Writes the embedding of each code, and a one behind it.
    pub fn embed(&self, layer: &Layer, map: usize, out: &mut [f32]) {
        let ([weight, bias], outputs) = (self.weight(layer), layer.outputs);
        for (out, code) in out.chunks_exact_mut(outputs + 1).zip(self.codes(map)) {
            let row = &weight[code * outputs..][..outputs];
            for ((out, weight), bias) in out.iter_mut().zip(row).zip(bias) {
                *out = weight + bias;
            }
            out[outputs] = 1.0;
        }
    }

    /// The gradients of an embedding's weight and bias: that by each pixel goes to the row of its code.
    fn backward_embed(
        &self,
        layer: &Layer,
        map: usize,
        dy: &[f32],
        [weight, bias]: [&mut [f32]; 2],
    ) {
        weight.fill(0.0);
        bias.fill(0.0);
        let outputs = layer.outputs;
        for (dy, code) in dy.chunks_exact(outputs + 1).zip(self.codes(map)) {
            let row = &mut weight[code * outputs..][..outputs];
            for ((dy, weight), bias) in dy.iter().zip(row).zip(&mut *bias) {
                *weight += dy;
                *bias += dy;
            }
        }
    }

    /// Tells `f` row by row which values of a map of a buffer's shape come to lie where when it is
    /// moved down and right, each a run of values in a row: first from where, the rows above counted,
    /// then to where.
    fn shift(
        &self,
        [down, right]: [usize; 2],
        buffer: usize,
        mut f: impl FnMut(Range<usize>, Range<usize>),
    ) {
        let [n, h, w] = self.size(buffer);
        let channels = self.plan.buffers[buffer].channels;
        let len = w.saturating_sub(right) * channels;
        for image in 0..n {
            for y in down.saturating_sub(self.above)..h {
                let from = (image * h + self.above + y - down) * w * channels;
                let to = ((image * h + y) * w + right) * channels;
                f(from..from + len, to..to + len);
            }
        }
    }

    /// The kernel of attention whose output has the shape of a buffer.
    fn attention(&self, heads: usize, buffer: usize) -> Attention {
        let Buffer { size, channels, .. } = self.plan.buffers[buffer];
        Attention {
            heads,
            channels,
            pixels: size[0] * size[1],
        }
    }

    /// The kernel of a block that reads a buffer.
    fn kernel(&self, block: &network::GatedResnet, x: usize) -> GatedResnet {
        let conv_of = |layer: &Layer| Conv {
            precision: self.precision,
            ..conv_of(layer)
        };
        GatedResnet {
            conv_1: conv_of(&block.conv_1),
            nin: block.nin.as_ref().map(conv_of),
            conv_2: conv_of(&block.conv_2),
            nonlinearity: self.config.nonlinearity,
            dropout: self.dropout_of(block, x),
        }
    }

    fn inputs<'s>(
        &'s self,
        block: &network::GatedResnet,
        x: usize,
        a: &[usize],
        conditional: &'s [f32],
    ) -> gated_resnet::Inputs<'s> {
        gated_resnet::Inputs {
            x: self.read_by(&conv_of(&block.conv_1), x),
            conv_1: self.weight(&block.conv_1),
            a: a.iter().map(|&a| self.values(a)).collect(),
            nin: block.nin.as_ref().map_or([&[]; 2], |nin| self.weight(nin)),
            conv_2: self.weight(&block.conv_2),
            conditional,
        }
    }

    /// One operation of the backward pass.
    fn backward_step(&mut self, step: &Backward, gradients: &mut Arrays) {
        let operation = &self.plan.forward[step.operation];
        match operation {
            Operation::GatedResnet { .. } => return self.backward_block(step, gradients),
            Operation::Concat { from, .. } => return self.backward_concat(step, from),
            &Operation::Attention {
                heads,
                queries,
                keys_values,
                ..
            } => return self.backward_attention(step, heads, [queries, keys_values]),
            _ => {}
        }
        if let Operation::Embed { layer, map, .. } = operation {
            let [mut weight, mut bias] = take_gradients(gradients, layer);
            let dy = self.values(step.output);
            self.backward_embed(layer, *map, dy, [&mut weight, &mut bias]);
            give_gradients(gradients, layer, [weight, bias]);
        }
        if let Operation::Layer { layer, from, .. } = operation {
            let [mut weight, mut bias] = take_gradients(gradients, layer);
            conv_of(layer).backward_weight(
                self.size(layer.finer(*from, step.output)),
                self.values(*from),
                self.values(step.output),
                &mut weight,
                &mut bias,
            );
            give_gradients(gradients, layer, [weight, bias]);
        }
        let [Gradient { buffer, accumulate }] = step.inputs[..] else {
            return;
        };
        let [mut memory] = self.take([buffer]);
        let (dx, dy) = (&mut memory[..self.len(buffer)], self.values(step.output));
        match operation {
            Operation::Layer { layer, .. } => {
                let [weight, _] = self.weight(layer);
                let size = self.size(layer.finer(buffer, step.output));
                conv_of(layer).backward_input(size, dy, weight, accumulate, dx);
            }
            Operation::Shift { by, .. } => {
                if !accumulate {
                    dx.fill(0.0);
                }
                self.shift(*by, buffer, |inner, outer| add(&mut dx[inner], &dy[outer]));
            }
            Operation::Elu { from, .. } => elu_backward(self.values(*from), dy, dx, accumulate),
            _ => unreachable!("no other operation has a backward pass of one input"),
        }
        self.give([buffer], [memory]);
    }

    fn backward_concat(&mut self, step: &Backward, from: &[usize]) {
        let plan = self.plan;
        let all = plan.buffers[step.output].channels;
        for (channels, gradient) in plan.concatenated(from).zip(&step.inputs) {
            let Gradient { buffer, accumulate } = *gradient;
            let [mut memory] = self.take([buffer]);
            let pixels = memory[..self.len(buffer)].chunks_exact_mut(channels.len());
            for (dx, dy) in pixels.zip(self.values(step.output).chunks_exact(all)) {
                if !accumulate {
                    dx.fill(0.0);
                }
                for (dx, dy) in dx.iter_mut().zip(&dy[channels.clone()]) {
                    *dx += dy;
                }
            }
            self.give([buffer], [memory]);
        }
    }

    fn backward_attention(
        &mut self,
        step: &Backward,
        heads: usize,
        [queries, keys_values]: [usize; 2],
    ) {
        let [by_queries, by_keys_values] = step.inputs[..] else {
            unreachable!("attention has two inputs");
        };
        let buffers = [by_queries.buffer, by_keys_values.buffer];
        let [mut d_q, mut d_kv] = self.take(buffers);
        let gradients = [(&mut d_q, by_queries), (&mut d_kv, by_keys_values)];
        let gradients = gradients.map(|(memory, Gradient { buffer, accumulate })| MapGradient {
            values: &mut memory[..self.len(buffer)],
            accumulate,
        });
        self.attention(heads, queries).backward(
            self.values(queries),
            self.values(keys_values),
            self.values(step.output),
            gradients,
        );
        self.give(buffers, [d_q, d_kv]);
    }

    fn backward_block(&mut self, step: &Backward, gradients: &mut Arrays) {
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
        // At most two, the first of which may not be there.
        let mut d_a = [Vec::new(), Vec::new()];
        for (memory, gradient) in d_a.iter_mut().zip(by_a) {
            [*memory] = self.take([gradient.buffer]);
        }
        let mut scratch = self.take_scratch();
        let [mut c2_, mut d_out] = self.take([c2, step.output]);
        let conditional = self.conditional(block);
        let mut found = Gradients {
            conv_1: take_gradients(gradients, &block.conv_1),
            nin: block
                .nin
                .as_ref()
                .map_or_else(Default::default, |nin| take_gradients(gradients, nin)),
            conv_2: take_gradients(gradients, &block.conv_2),
            conditional: vec![0.0; conditional.len()],
        };
        let mut by_maps: Vec<MapGradient> = d_a
            .iter_mut()
            .zip(by_a)
            .map(|(memory, gradient)| MapGradient {
                values: &mut memory[..self.len(gradient.buffer)],
                accumulate: gradient.accumulate,
            })
            .collect();
        let d_x = &mut d_out[..self.len(step.output)];
        self.kernel(block, x).backward(
            self.size(x),
            &self.inputs(block, x, a, &conditional),
            self.values(c1),
            &mut c2_[..self.len(c2)],
            d_x,
            &mut by_maps,
            &mut found,
            &mut scratch,
        );
        if by_x.buffer != step.output {
            let [mut sum] = self.take([by_x.buffer]);
            add(&mut sum[..self.len(by_x.buffer)], d_x);
            self.give([by_x.buffer], [sum]);
        }

        for (memory, gradient) in d_a.into_iter().zip(by_a) {
            self.give([gradient.buffer], [memory]);
        }
        self.give([c2, step.output], [c2_, d_out]);
        self.give_scratch(scratch);
        give_gradients(gradients, &block.conv_1, found.conv_1);
        if let Some(nin) = &block.nin {
            give_gradients(gradients, nin, found.nin);
        }
        give_gradients(gradients, &block.conv_2, found.conv_2);
        if let Some(hw) = block.conditional {
            let channels = block.conv_2.outputs;
            gradients[hw].fill(0.0);
            let images = found.conditional.chunks_exact(channels);
            for (image, by_image) in images.enumerate() {
                for row in self.part.batch.conditions(self.config, image) {
                    add(&mut gradients[hw][row * channels..][..channels], by_image);
                }
            }
        }
    }
}

/// Takes the gradients by a layer's weight and bias out, to be written.
fn take_gradients(gradients: &mut Arrays, layer: &Layer) -> [Vec<f32>; 2] {
    array::from_fn(|k| mem::take(&mut gradients[layer.parameter + 2 * k]))
}

/// Puts them back.
fn give_gradients(gradients: &mut Arrays, layer: &Layer, [weight, bias]: [Vec<f32>; 2]) {
    gradients[layer.parameter] = weight;
    gradients[layer.parameter + 2] = bias;
}

/// `sum += values`.
pub(super) fn add(sum: &mut [f32], values: &[f32]) {
    /// Values that one task adds.
    const TASK: usize = 1 << 14;
    let chunks = sum.par_chunks_mut(TASK).zip(values.par_chunks(TASK));
    chunks.for_each(|(sum, values)| {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += value;
        }
    });
}
