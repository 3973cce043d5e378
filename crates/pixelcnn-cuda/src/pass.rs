//! A plan carried out on a GPU: every operation, on some images.

use std::ops::Range;

use pixelcnn_core::engine::Batch;
use pixelcnn_core::kernels::pointwise::Dropped;
use pixelcnn_core::likelihood::{Categorical, Likelihood, Mixture};
use pixelcnn_core::network::{GatedResnet, Layer, LayerKind};
use pixelcnn_core::plan::{Backward, Gradient, Operation, Plan};
use pixelcnn_core::ranks::{Level, levels};

use crate::CudaError;
use crate::convolution::{Convolution, Direction};
use crate::engine::{Bucket, CONDITIONS, Cuda, Maps, Trained, VALUE, Weights, branches};
use crate::gpu::{Branch, Memory, SUMS};
use crate::kernels::{self, Added, Address, Biases, Channels, Geometry, Heads};

/// `NONE` of `kernels/pointwise.cu`.
const NO_CONDITION: u32 = u32::MAX;

/// How a layer is carried out.
#[derive(Clone, Copy, Default)]
struct Way {
    /// On maps of the residual stream.
    wide: bool,
    /// From the gradient by its output to that by its input.
    backward: bool,
    /// Adding to what is there.
    accumulate: bool,
}

/// A plan being carried out on some images.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    pub engine: &'a Cuda,
    pub plan: &'a Plan,
    pub maps: &'a Maps,
    pub images: usize,
    pub weights: &'a Weights,
    /// The first of them among those whose levels and nats are held.
    pub first: usize,
    /// Which of this rank's shards they are.
    pub shard: usize,
    /// Where the blocks' dropout is.
    pub dropout: Option<Address>,
    /// The branch on which it is.
    pub branch: usize,
}

impl Pass<'_> {
    fn branch(&self) -> &dyn Branch {
        self.engine.gpu.branch(self.branch)
    }

    /// Writes images of a batch, which are to be held, and their conditions.
    pub fn write(&self, batch: Batch, images: Range<usize>) -> Result<(), CudaError> {
        let config = &self.engine.config;
        let batch = batch.part(config, images.clone());
        self.maps.levels.write(0, batch.images)?;
        if config.nr_conditions() > 0 {
            let of_image = |image| {
                let rows = batch.conditions(config, image).map(|row| row as u32);
                rows.chain([NO_CONDITION; 2]).take(2)
            };
            let conditions: Vec<u32> = (0..images.len()).flat_map(of_image).collect();
            self.maps.conditions.write(0, &conditions)?;
        }
        Ok(())
    }

    /// Where something of these images is that is held of all, of so many bytes each.
    fn held(&self, memory: &Memory, bytes: usize) -> Address {
        memory.address() + (self.first * bytes) as u64
    }

    fn conditions(&self) -> Address {
        self.held(&self.maps.conditions, CONDITIONS)
    }

    fn levels(&self) -> Address {
        self.held(&self.maps.levels, self.engine.config.bytes_per_image())
    }

    /// Nats of each pixel.
    fn nats_per_pixel(&self) -> Address {
        let config = &self.engine.config;
        self.held(&self.maps.nats, config.height * config.width * VALUE)
    }

    /// Where the gradients of this shard are summed with others.
    fn sums<'s>(&self, state: &'s Trained) -> &'s Memory {
        &state.sums[self.shard.count_ones() as usize]
    }

    /// Where a buffer is.
    fn at(&self, buffer: usize) -> Address {
        let start = self.maps.slots[self.plan.buffers[buffer].slot];
        self.maps.memory.address() + (start * VALUE) as u64
    }

    fn scratch(&self) -> Address {
        self.maps.memory.address() + (self.maps.scratch[self.branch] * VALUE) as u64
    }

    /// Values of a buffer.
    fn len(&self, buffer: usize) -> usize {
        self.images * self.plan.buffers[buffer].values()
    }

    fn values(&self, buffer: usize) -> i64 {
        self.len(buffer) as i64
    }

    /// What a buffer holds.
    pub fn read(&self, buffer: usize) -> Result<Vec<f32>, CudaError> {
        let mut values = vec![0.0; self.len(buffer)];
        let start = self.maps.slots[self.plan.buffers[buffer].slot];
        self.maps.memory.read(start * VALUE, &mut values)?;
        Ok(values)
    }

    /// \[images, rows, columns\] of a buffer.
    fn size(&self, buffer: usize) -> [usize; 3] {
        let [h, w] = self.plan.buffers[buffer].size;
        [self.images, h, w]
    }

    fn pixels_per_image(&self, buffer: usize) -> i64 {
        let [h, w] = self.plan.buffers[buffer].size;
        (h * w) as i64
    }

    /// Where a parameter is in some memory of all.
    fn parameter(&self, memory: &Memory, number: usize) -> Address {
        memory.address() + (self.engine.starts[number] * VALUE) as u64
    }

    fn bias(&self, layer: &Layer) -> Address {
        self.parameter(&self.weights.parameters, layer.parameter + 2)
    }

    /// What the layers before a block's second nonlinearity add to it.
    fn biases(&self, block: &GatedResnet) -> Biases {
        let nin = block.nin.as_ref();
        Biases {
            first: self.bias(&block.conv_1),
            second: nin.map_or(0, |nin| self.bias(nin)),
        }
    }

    /// What a block adds to its second convolution's output.
    fn added(&self, block: &GatedResnet) -> Added {
        let hw = block.conditional;
        Added {
            bias: self.bias(&block.conv_2),
            hw: hw.map_or(0, |hw| self.parameter(&self.weights.parameters, hw)),
            conditions: self.conditions(),
        }
    }

    fn dropout_of(&self, block: &GatedResnet) -> Address {
        let at = |first: Address| first + (block.number * size_of::<Dropped>()) as u64;
        self.dropout.map_or(0, at)
    }

    /// Of a map with a block's filters, which is part of a concatenation.
    fn channels(&self, block: &GatedResnet, part: usize, parts: usize) -> Channels {
        let count = block.conv_1.outputs;
        Channels {
            count: count as i32,
            first: (part * count) as i32,
            of: (parts * count) as i32,
        }
    }

    /// Which channels of a concatenation each of its maps is.
    fn concatenated(&self, maps: &[usize], whole: usize) -> impl Iterator<Item = Channels> {
        let of = self.plan.buffers[whole].channels as i32;
        let ranges = self.plan.concatenated(maps);
        ranges.map(move |range| Channels {
            count: range.len() as i32,
            first: range.start as i32,
            of,
        })
    }

    /// Writes f of some maps of the residual stream, as one, to the scratch memory.
    fn bend(&self, block: &GatedResnet, maps: &[usize]) -> Result<Address, CudaError> {
        let f = kernels::number(self.engine.config.nonlinearity);
        let (y, none) = (self.scratch(), Biases::default());
        for (part, &map) in maps.iter().enumerate() {
            let channels = self.channels(block, part, maps.len());
            let (x, values) = (self.at(map), self.values(map));
            // SAFETY: the maps have the block's filters; the scratch memory has room for f of the
            // widest concatenation.
            unsafe { kernels::bend_wide(self.branch(), x, none, 0, y, values, channels, f)? };
        }
        Ok(y)
    }

    /// Writes f of what comes before a block's second nonlinearity, with dropout.
    fn bend_inner(&self, block: &GatedResnet, c1: usize) -> Result<Address, CudaError> {
        let f = kernels::number(self.engine.config.nonlinearity);
        let (x, y, values) = (self.at(c1), self.scratch(), self.values(c1));
        let (biases, drop) = (self.biases(block), self.dropout_of(block));
        let channels = self.channels(block, 0, 1);
        // SAFETY: as above.
        unsafe { kernels::bend_map(self.branch(), x, biases, drop, y, values, channels, f)? };
        Ok(y)
    }

    /// A layer's weight.
    fn weight(&self, layer: &Layer) -> Address {
        self.parameter(&self.weights.made, layer.parameter)
    }

    /// Carries a layer out, without its bias.
    ///
    /// # Safety
    /// `input` and `output` are maps of the layer's sizes.
    unsafe fn layer(
        &self,
        layer: &Layer,
        way: Way,
        size: [usize; 3],
        [input, output]: [Address; 2],
    ) -> Result<(), CudaError> {
        let Way {
            wide,
            backward,
            accumulate,
        } = way;
        let convolution = Convolution {
            geometry: Geometry::of(layer, size),
            wide,
        };
        let [fine, coarse] = fine_and_coarse(layer, input, output);
        let direction = match (layer.kind == LayerKind::Deconv) == backward {
            true => Direction::Down,
            false => Direction::Up,
        };
        let operands = [fine, self.weight(layer), coarse];
        // SAFETY: the weight is the layer's; the caller knows the maps.
        unsafe {
            self.branch()
                .convolve(convolution, direction, operands, accumulate)
        }
    }

    /// The gradients by a layer's weight and bias, given that by its output.
    ///
    /// # Safety
    /// `from` and `d_to` are maps of the layer's sizes.
    unsafe fn layer_gradients(
        &self,
        state: &Trained,
        layer: &Layer,
        wide: bool,
        size: [usize; 3],
        [from, d_to]: [Address; 2],
    ) -> Result<(), CudaError> {
        let geometry = Geometry::of(layer, size);
        let convolution = Convolution { geometry, wide };
        let d_weight = self.parameter(self.sums(state), layer.parameter);
        let d_bias = self.parameter(self.sums(state), layer.parameter + 2);
        let [fine, coarse] = fine_and_coarse(layer, from, d_to);
        let [h, w, channels] = layer.finer(geometry.coarse, geometry.fine);
        let pixels = i64::from(geometry.images) * i64::from(h) * i64::from(w);
        let sum = match wide {
            true => kernels::sum_pixels_wide,
            false => kernels::sum_pixels_map,
        };
        let (branch, partial) = (self.branch(), self.maps.partial[self.branch].address());
        let chunks = kernels::chunks(pixels) as i32;
        // SAFETY: the gradients are the layer's, and there are sums for the chunks of the largest and
        // widest map; the caller knows the maps.
        unsafe {
            let operands = [fine, d_weight, coarse];
            branch.convolve(convolution, Direction::ByWeight, operands, false)?;
            sum(branch, d_to, partial, pixels, channels)?;
            kernels::sum_chunks(branch, partial, d_bias, chunks, channels)
        }
    }

    /// One operation of the forward pass.
    pub fn operation(&self, operation: &Operation) -> Result<(), CudaError> {
        let branch = self.branch();
        let to = operation.to();
        // SAFETY: the plan's buffers have memory for their values, and the operations are on buffers
        // of the sizes that their layers take.
        unsafe {
            match operation {
                Operation::Images { .. } => {
                    let pixels = self.images as i64 * self.pixels_per_image(to);
                    let (levels, channels) = (self.levels(), self.engine.config.channels as i32);
                    let taken = self.plan.buffers[to].channels as i32;
                    kernels::images(branch, levels, self.at(to), pixels, channels, taken)
                }
                Operation::Embed { layer, map, .. } => {
                    let pixels = self.images as i64 * self.pixels_per_image(to);
                    let (images, weight) = (self.levels(), self.weight(layer));
                    let bytes = self.engine.config.bytes_per_pixel() as i32;
                    let (bias, out) = (self.bias(layer), self.at(to));
                    let [codes, outputs] = [layer.inputs, layer.outputs].map(|n| n as i32);
                    let which = *map as i32;
                    kernels::embed(
                        branch, images, weight, bias, out, pixels, bytes, which, codes, outputs,
                    )
                }
                Operation::Layer { layer, from, .. } => {
                    let size = self.size(layer.finer(*from, to));
                    let ends = [self.at(*from), self.at(to)];
                    self.layer(
                        layer,
                        Way {
                            wide: true,
                            ..Way::default()
                        },
                        size,
                        ends,
                    )?;
                    let (values, channels) = (self.values(to), layer.outputs as i32);
                    kernels::add_bias(branch, self.bias(layer), self.at(to), values, channels)
                }
                Operation::GatedResnet {
                    block,
                    x,
                    a,
                    c1,
                    c2,
                    ..
                } => {
                    let size = self.size(*x);
                    let f_x = self.bend(block, &[*x])?;
                    self.layer(&block.conv_1, Way::default(), size, [f_x, self.at(*c1)])?;
                    if let Some(nin) = &block.nin {
                        let f_a = self.bend(block, a)?;
                        let added = Way {
                            accumulate: true,
                            ..Way::default()
                        };
                        self.layer(nin, added, size, [f_a, self.at(*c1)])?;
                    }
                    let f_c1 = self.bend_inner(block, *c1)?;
                    self.layer(&block.conv_2, Way::default(), size, [f_c1, self.at(*c2)])?;
                    kernels::gate(
                        branch,
                        self.at(*x),
                        self.at(*c2),
                        self.added(block),
                        self.at(to),
                        self.values(to),
                        block.conv_1.outputs as i32,
                        self.pixels_per_image(to) as i32,
                    )
                }
                &Operation::Shift { by, from, .. } => {
                    let [_, h, w] = self.size(to).map(|n| n as i32);
                    let [down, right] = by.map(|n| n as i32);
                    let channels = self.plan.buffers[to].channels as i32;
                    let (from, to, values) = (self.at(from), self.at(to), self.values(to));
                    kernels::shift(branch, from, to, values, h, w, channels, down, right)
                }
                Operation::Add { from, .. } => {
                    kernels::add(branch, self.at(*from), self.at(to), self.values(to))
                }
                Operation::Elu { from, .. } => {
                    kernels::elu(branch, self.at(*from), self.at(to), self.values(to))
                }
                Operation::Concat { from, .. } => {
                    for (&map, channels) in from.iter().zip(self.concatenated(from, to)) {
                        let (from, to, values) = (self.at(map), self.at(to), self.values(map));
                        kernels::concat(branch, from, to, values, channels)?;
                    }
                    Ok(())
                }
                &Operation::Attention {
                    heads,
                    queries,
                    keys_values,
                    ..
                } => {
                    let (q, kv) = (self.at(queries), self.at(keys_values));
                    kernels::attend(branch, q, kv, self.at(to), self.heads(heads, to))
                }
            }
        }
    }

    /// Of attention whose output has the shape of a buffer.
    fn heads(&self, heads: usize, buffer: usize) -> Heads {
        let pixels = self.pixels_per_image(buffer);
        Heads {
            count: self.images as i64 * pixels * heads as i64,
            pixels: pixels as i32,
            channels: self.plan.buffers[buffer].channels as i32,
            heads: heads as i32,
        }
    }

    /// Nats of every pixel, and the gradient by the logits where the plan has one.
    pub fn likelihood(&self) -> Result<(), CudaError> {
        let pixels = self.pixels_per_image(self.plan.logits);
        let config = &self.engine.config;
        let gradient = self.plan.d_logits.map_or(0, |buffer| self.at(buffer));
        // SAFETY: the maps' memory is that of so many images.
        unsafe {
            let (branch, images, logits) =
                (self.branch(), self.levels(), self.at(self.plan.logits));
            let (nats, all) = (self.nats_per_pixel(), self.images as i64 * pixels);
            match Likelihood::of(config) {
                Likelihood::Mixture(Mixture {
                    channels,
                    components,
                }) => {
                    let [channels, components] = [channels, components].map(|n| n as i32);
                    kernels::likelihood(
                        branch, images, logits, nats, gradient, all, channels, components,
                    )?;
                }
                Likelihood::Categorical(Categorical { codes, .. }) => {
                    let (bytes, codes) = (config.bytes_per_pixel() as i32, codes as i32);
                    kernels::likelihood_of_codes(
                        branch, images, logits, nats, gradient, all, bytes, codes,
                    )?;
                }
            }
            let nats = self.nats_per_pixel();
            let sums = self.held(&self.maps.sums, size_of::<f64>());
            kernels::sum_images(self.branch(), nats, sums, pixels, self.images as i32)
        }
    }

    /// The gradients of these images, summed with those of the shards before them and, with the last
    /// one, with those of other ranks.
    pub fn gradients(&self, state: &Trained) -> Result<(), CudaError> {
        let engine = self.engine;
        let sharing = engine.sharing.as_ref();
        let is_shared = sharing.is_some_and(|sharing| sharing.shards > 1);
        let mut buckets = engine.buckets.iter().peekable();
        for (step, turn) in self.plan.turns.iter().enumerate() {
            let branch = turn.branch;
            let pass = Pass { branch, ..*self };
            if turn.waits {
                pass.branch().wait(1 - branch)?;
            }
            let Some(after) = step.checked_sub(self.plan.forward.len()) else {
                pass.operation(&self.plan.forward[step])?;
                continue;
            };
            let Some(number) = after.checked_sub(1) else {
                pass.likelihood()?;
                continue;
            };
            pass.backward_step(state, &self.plan.backward[number])?;
            if is_shared && let Some(bucket) = buckets.next_if(|bucket| bucket.step == number) {
                self.sum(state, bucket)?;
            }
        }
        // All of the step, on whatever branch.
        if branches(self.plan) > 1 {
            self.branch().wait(1)?;
        }
        match is_shared {
            true => self.branch().wait(SUMS),
            false => self.mark_wrong(state, self.branch()),
        }
    }

    /// Sums a bucket, while the rest of the backward pass goes on: as far as the tree of shards goes
    /// here, and with the last shard over all ranks.
    fn sum(&self, state: &Trained, bucket: &Bucket) -> Result<(), CudaError> {
        let engine = self.engine;
        let branch = engine.gpu.branch(SUMS);
        for other in 0..branches(self.plan) {
            branch.wait(other)?;
        }
        if bucket.values.start == 0 {
            self.mark_wrong(state, branch)?;
        }
        let at = |memory: &Memory, value: usize| memory.address() + (value * VALUE) as u64;
        let Range { start, end } = bucket.values;
        let top = self.shard.count_ones() as usize;
        for below in (top - self.shard.trailing_ones() as usize..top).rev() {
            let (from, to) = (
                at(&state.sums[below + 1], start),
                at(&state.sums[below], start),
            );
            // SAFETY: the sums are arrays of all parameters.
            unsafe { kernels::add(branch, from, to, (end - start) as i64)? };
        }
        let is_last = self.shard + 1 == engine.shards();
        let Some(sharing) = engine.sharing.as_ref().filter(|_| is_last) else {
            return Ok(());
        };
        let levels = levels(bucket.values.clone(), &*sharing.ranks);
        let place = |values: &Range<usize>| (at(&state.sums[0], values.start), values.len());
        for Level { with, keeps, gives } in &levels {
            let received = (state.received.address(), keeps.len());
            let (to, values) = place(keeps);
            // SAFETY: there is room for half a bucket.
            unsafe {
                branch.exchange(*with, place(gives), received)?;
                kernels::add(branch, received.0, to, values as i64)?;
            }
        }
        for Level { with, keeps, gives } in levels.iter().rev() {
            // SAFETY: both are parts of the bucket.
            unsafe { branch.exchange(*with, place(keeps), place(gives))? };
        }
        Ok(())
    }

    /// Makes a gradient no number where the loss is none, so that all ranks find it in the sum. To be
    /// asked once the gradients of the first bucket are there.
    fn mark_wrong(&self, state: &Trained, branch: &dyn Branch) -> Result<(), CudaError> {
        let pixels = self.images as i64 * self.pixels_per_image(self.plan.logits);
        let (nats, first) = (self.nats_per_pixel(), self.sums(state).address());
        // SAFETY: there are nats for each pixel.
        unsafe { kernels::find_wrong(branch, nats, pixels, first) }
    }

    /// Nats of every image.
    pub fn nats(&self) -> Result<Vec<f64>, CudaError> {
        let mut nats = vec![0.0; self.images];
        self.maps.sums.read(0, &mut nats)?;
        Ok(nats)
    }

    /// One operation of the backward pass.
    fn backward_step(&self, state: &Trained, step: &Backward) -> Result<(), CudaError> {
        let branch = self.branch();
        let dy = self.at(step.output);
        let operation = &self.plan.forward[step.operation];
        // SAFETY: as in the forward pass; gradients are shaped as what they are by.
        unsafe {
            match operation {
                Operation::Embed { layer, map, to } => {
                    let pixels = self.images as i64 * self.pixels_per_image(*to);
                    let bytes = self.engine.config.bytes_per_pixel() as i32;
                    let d_weight = self.parameter(self.sums(state), layer.parameter);
                    let d_bias = self.parameter(self.sums(state), layer.parameter + 2);
                    let [codes, outputs] = [layer.inputs, layer.outputs].map(|n| n as i32);
                    let (images, which) = (self.levels(), *map as i32);
                    kernels::embed_by_weight(
                        branch, images, dy, d_weight, pixels, bytes, which, codes, outputs,
                    )?;
                    kernels::embed_by_bias(branch, d_weight, d_bias, codes, outputs)?;
                }
                Operation::Layer { layer, from, .. } => {
                    let size = self.size(layer.finer(*from, step.output));
                    self.layer_gradients(state, layer, true, size, [self.at(*from), dy])?;
                    for Gradient { buffer, accumulate } in &step.inputs {
                        let way = Way {
                            wide: true,
                            backward: true,
                            accumulate: *accumulate,
                        };
                        self.layer(layer, way, size, [self.at(*buffer), dy])?;
                    }
                }
                Operation::GatedResnet { .. } => self.backward_block(state, step)?,
                &Operation::Shift { by, .. } => {
                    for &Gradient { buffer, accumulate } in &step.inputs {
                        let [_, h, w] = self.size(buffer).map(|n| n as i32);
                        let [down, right] = by.map(|n| n as i32);
                        let channels = self.plan.buffers[buffer].channels as i32;
                        let (dx, values) = (self.at(buffer), self.values(buffer));
                        let accumulate = accumulate.into();
                        kernels::shift_backward(
                            branch, dy, dx, values, h, w, channels, down, right, accumulate,
                        )?;
                    }
                }
                Operation::Elu { from, .. } => {
                    for &Gradient { buffer, accumulate } in &step.inputs {
                        let (x, dx, values) =
                            (self.at(*from), self.at(buffer), self.values(buffer));
                        kernels::elu_backward(branch, x, dy, dx, values, accumulate.into())?;
                    }
                }
                Operation::Concat { from, .. } => {
                    let parts = self.concatenated(from, step.output);
                    for (&Gradient { buffer, accumulate }, channels) in
                        step.inputs.iter().zip(parts)
                    {
                        let (dx, values) = (self.at(buffer), self.values(buffer));
                        let accumulate = accumulate.into();
                        kernels::concat_backward(branch, dy, dx, values, channels, accumulate)?;
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
                    let (q, kv, totals) = (self.at(queries), self.at(keys_values), self.scratch());
                    let heads = self.heads(heads, queries);
                    let Gradient { buffer, accumulate } = by_queries;
                    let (to, accumulate) = (self.at(buffer), accumulate.into());
                    kernels::attend_backward_queries(
                        branch, q, kv, dy, to, totals, heads, accumulate,
                    )?;
                    let Gradient { buffer, accumulate } = by_keys_values;
                    let (to, accumulate) = (self.at(buffer), accumulate.into());
                    kernels::attend_backward_keys_values(
                        branch, q, kv, dy, totals, to, heads, accumulate,
                    )?;
                }
                Operation::Images { .. } | Operation::Add { .. } => {}
            }
        }
        Ok(())
    }

    /// # Safety
    /// The step is a block's.
    unsafe fn backward_block(&self, state: &Trained, step: &Backward) -> Result<(), CudaError> {
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
        let branch = self.branch();
        let f = kernels::number(self.engine.config.nonlinearity);
        let (size, d_out) = (self.size(x), self.at(step.output));
        let pixels = self.pixels_per_image(x);
        // In the same memory as c2, and then as the gradient by c1: what was there is not needed.
        let (d_c2, d_c1) = (self.at(c2), self.at(c2));
        // SAFETY: the block's maps are of `size`, with its channels.
        unsafe {
            let (values, filters) = (self.values(x), block.conv_1.outputs as i32);
            let added = self.added(block);
            kernels::gate_backward(branch, d_out, added, d_c2, values, filters, pixels as i32)?;
            if let Some(hw) = block.conditional {
                let d_hw = self.parameter(self.sums(state), hw);
                let rows = self.engine.config.nr_conditions() as i32;
                let (channels, images) = (block.conv_2.outputs as i32, self.images as i32);
                kernels::hw_backward(
                    branch,
                    d_c2,
                    added.conditions,
                    d_hw,
                    rows,
                    channels,
                    images,
                    pixels,
                )?;
            }
            // Each f(x) and then the gradient by it, one after the other in the same memory.
            let f_c1 = self.bend_inner(block, c1)?;
            self.layer_gradients(state, &block.conv_2, false, size, [f_c1, d_c2])?;
            let backward = Way {
                backward: true,
                ..Way::default()
            };
            self.layer(&block.conv_2, backward, size, [f_c1, d_c2])?;
            let whole = self.channels(block, 0, 1);
            let (biases, drop, values) =
                (self.biases(block), self.dropout_of(block), self.values(c1));
            let c1 = self.at(c1);
            kernels::bend_map_backward(branch, c1, biases, drop, f_c1, d_c1, values, whole, f, 0)?;

            let none = Biases::default();
            if let Some(nin) = &block.nin {
                let f_a = self.bend(block, a)?;
                self.layer_gradients(state, nin, false, size, [f_a, d_c1])?;
                self.layer(nin, backward, size, [f_a, d_c1])?;
                for (part, (&a_, gradient)) in a.iter().zip(by_a).enumerate() {
                    let channels = self.channels(block, part, a.len());
                    let (from, to) = (self.at(a_), self.at(gradient.buffer));
                    let (values, accumulate) = (self.values(a_), gradient.accumulate.into());
                    kernels::bend_wide_backward(
                        branch, from, none, 0, f_a, to, values, channels, f, accumulate,
                    )?;
                }
            }
            let f_x = self.bend(block, &[x])?;
            self.layer_gradients(state, &block.conv_1, false, size, [f_x, d_c1])?;
            self.layer(&block.conv_1, backward, size, [f_x, d_c1])?;
            // The residual connection hands the output's gradient on as it is.
            let (x_, values) = (self.at(x), self.values(x));
            kernels::bend_wide_backward(branch, x_, none, 0, f_x, d_out, values, whole, f, 1)?;
            if by_x.buffer != step.output {
                kernels::add(branch, d_out, self.at(by_x.buffer), self.values(x))?;
            }
        }
        Ok(())
    }
}

/// Which of a layer's input and output is the finer map, and which the coarser one.
fn fine_and_coarse(layer: &Layer, input: Address, output: Address) -> [Address; 2] {
    [layer.finer(input, output), layer.finer(output, input)]
}
