//! The network written down: a [`Pass`] that turns the walk into a list of operations on numbered
//! buffers, forward and backward, and finds out how long each buffer lives. It knows no device: an
//! [`Engine`](crate::engine::Engine) carries it out.
//!
//! A step of training runs [`Plan::forward`] in order, then the likelihood, which reads
//! [`Plan::logits`] and writes [`Plan::d_logits`], then [`Plan::backward`] in order, which is
//! `forward` read backwards. Those are the plan's steps, numbered from 0; an evaluation ends with
//! the likelihood.
//!
//! In training the two stacks are two branches, which may be carried out side by side: see [`Turn`].
//! An evaluation has one branch, for it would need twice the memory with two.
//!
//! Buffers are maps \[images, rows, columns, channels\], and their sizes are for each image. Two
//! buffers whose lives do not overlap may have the same slot, which is memory that an engine takes
//! once.

use std::mem;
use std::ops::{Range, RangeInclusive};

use crate::config::ModelConfig;
use crate::kernels::pointwise::{Dropout, Dropped};
use crate::network::{GatedResnet, Head, Layer, Layout, Pass, pixelcnn};

/// The operations of a model, and the buffers between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The forward pass.
    pub forward: Vec<Operation>,
    /// Buffer of the mixture's parameters, the last that the forward pass writes.
    pub logits: usize,
    /// Buffer of the gradient by them; none in an evaluation.
    pub d_logits: Option<usize>,
    /// Layers that the likelihood has of its own, and whose gradients it writes: of the energy distance.
    pub head: Option<Head>,
    /// The backward pass; empty in an evaluation.
    pub backward: Vec<Backward>,
    /// All buffers.
    pub buffers: Vec<Buffer>,
    /// Values for each image that the memory of every slot must hold.
    pub slots: Vec<usize>,
    /// Buffers of the feature maps that the original records, in its order.
    pub recorded: Vec<usize>,
    /// When each step's turn comes.
    pub turns: Vec<Turn>,
}

/// When a step may be carried out: after those before it on its branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// 0, or 1 for the steps that only the horizontal stack needs.
    pub branch: usize,
    /// Whether it must also wait for all steps of the other branch that come before it in the plan:
    /// it needs what one of them writes, or memory that one of them uses.
    pub waits: bool,
}

/// A map that an operation writes and others read.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// How often its resolution is halved.
    pub scale: usize,
    /// Rows and columns: those that the model has [at that scale](ModelConfig::size_at).
    pub size: [usize; 2],
    /// Channels of every pixel.
    pub channels: usize,
    /// The step that first writes it to the one that last reads it: outside of them its slot is
    /// another's.
    pub life: RangeInclusive<usize>,
    /// Its memory.
    pub slot: usize,
}

impl Buffer {
    /// Values for each image.
    pub fn values(&self) -> usize {
        self.size[0] * self.size[1] * self.channels
    }
}

/// An operation of the forward pass; numbers are those of buffers.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// The images, scaled to \[-1, 1\]: their first channels, or all and behind them a plane of ones,
    /// as many as the buffer has.
    Images {
        /// Written.
        to: usize,
    },
    /// The rows that a dense layer has for the images' codes, and its bias; behind them a plane of ones.
    Embed {
        /// What it is.
        layer: Layer,
        /// Which of a pixel's codes: its own (0), or that of the coarser map (1).
        map: usize,
        /// Written.
        to: usize,
    },
    /// A weight-normalised layer. Its parameters are `layer.parameter` and the next two.
    Layer {
        /// What it is.
        layer: Layer,
        /// Read, and kept for the weight's gradient.
        from: usize,
        /// Written.
        to: usize,
    },
    /// A gated resnet block as one.
    ///
    /// Dropout of a step with some seed is that of `seed + block.number`. A value's number in it is
    /// its place in the map f(c1) \[images, rows, columns, `block.conv_2.inputs`\], where the images
    /// are counted from the first one of the whole batch.
    GatedResnet {
        /// What it is.
        block: Box<GatedResnet>,
        /// Read, and kept.
        x: usize,
        /// The auxiliary input, none to two maps whose channels follow one another; read, and kept.
        a: Vec<usize>,
        /// What comes before the second nonlinearity; written, and kept.
        c1: usize,
        /// What the second convolution gives, without `h * hw`; written, and kept. The backward
        /// pass may overwrite it.
        c2: usize,
        /// Written.
        to: usize,
    },
    /// Moves every pixel down and right, zeros coming in.
    Shift {
        /// Rows and columns.
        by: [usize; 2],
        /// Read.
        from: usize,
        /// Written.
        to: usize,
    },
    /// Adds a map to another one, in place.
    Add {
        /// Read.
        from: usize,
        /// Added to.
        to: usize,
    },
    /// The exponential linear unit.
    Elu {
        /// Read, and kept.
        from: usize,
        /// Written.
        to: usize,
    },
    /// The channels of some maps, one after the other.
    Concat {
        /// Read.
        from: Vec<usize>,
        /// Written.
        to: usize,
    },
    /// Causal self-attention.
    Attention {
        /// Among which the channels are shared out.
        heads: usize,
        /// Read, and kept.
        queries: usize,
        /// The keys' channels, then the values'; read, and kept.
        keys_values: usize,
        /// Written.
        to: usize,
    },
}

/// An operation's backward pass. An addition has none: the gradient of the sum is that of its terms.
#[derive(Debug, Clone, PartialEq)]
pub struct Backward {
    /// The operation's number in [`Plan::forward`].
    pub operation: usize,
    /// Buffer of the gradient by its output.
    pub output: usize,
    /// The gradients by its inputs: of an embedding none; of a layer, a shift or an elu by `from`, if
    /// that is not the image; of a block by `x`, then by each of `a`; of a concatenation by each of its maps; of
    /// attention by its queries, then by its keys and values.
    ///
    /// A block's gradient by `x` holds that by its output as it is, plus what comes through the
    /// block. Where its buffer is `output` itself, that is done in place. Where it is not, that is
    /// added to what is there, and `output` may be overwritten.
    pub inputs: Vec<Gradient>,
}

/// A gradient by a map, as an operation makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gradient {
    /// Where it goes.
    pub buffer: usize,
    /// Whether it is added to what other operations have written there.
    pub accumulate: bool,
}

impl Plan {
    /// The dropout of every block, by the block's number, for images from one of the whole batch on.
    pub fn drops(&self, dropout: Dropout, image: usize) -> Vec<Dropped> {
        let mut drops = vec![dropout.factors(); self.forward.len()];
        for operation in &self.forward {
            if let Operation::GatedResnet { block, c1, .. } = operation {
                let [h, w] = self.buffers[*c1].size;
                let drop = Dropout {
                    rate: dropout.rate,
                    seed: dropout.seed.wrapping_add(block.number as u64),
                    first: image * h * w * block.conv_2.inputs,
                };
                drops[block.number] = drop.factors();
            }
        }
        drops
    }

    /// The plan of a forward pass alone.
    pub fn evaluation(config: &ModelConfig) -> Plan {
        Planner::forward(config).finish()
    }

    /// The plan of a forward and a backward pass.
    pub fn training(config: &ModelConfig) -> Plan {
        let mut planner = Planner::forward(config);
        planner.find_branches();
        planner.backward();
        planner.finish()
    }

    /// Whether a buffer holds images, which need no gradient.
    fn is_of_images(&self, buffer: usize) -> bool {
        let images = Operation::Images { to: buffer };
        self.forward.contains(&images)
    }

    /// Which channels of a concatenation each of its maps is.
    pub fn concatenated(&self, maps: &[usize]) -> impl Iterator<Item = Range<usize>> {
        let channels = maps.iter().map(|&map| self.buffers[map].channels);
        channels.scan(0, |end, channels| {
            *end += channels;
            Some(*end - channels..*end)
        })
    }

    /// Values of memory for each image, all slots together.
    pub fn values(&self) -> usize {
        self.slots.iter().sum()
    }

    /// The parameters in the order in which the backward pass has their gradients, cut into buckets of
    /// at least so many values, but for the last one. Those by `g` are in none: they follow from those
    /// by the weight.
    pub fn buckets(&self, layout: &Layout, values: usize) -> Vec<Bucket> {
        let (mut buckets, mut bucket, mut held) = (Vec::new(), Bucket::default(), 0);
        // The likelihood's are there before the first step.
        let head = self.head.iter().flatten().flat_map(parameters_of);
        let mut head: Vec<usize> = head.collect();
        for (step, backward) in self.backward.iter().enumerate() {
            let mut parameters = mem::take(&mut head);
            parameters.extend(self.forward[backward.operation].parameters());
            let sizes = parameters.iter();
            held += sizes
                .map(|&parameter| layout.parameters[parameter].len())
                .sum::<usize>();
            bucket.parameters.extend(parameters);
            bucket.step = step;
            if held >= values {
                buckets.push(mem::take(&mut bucket));
                held = 0;
            }
        }
        if !bucket.parameters.is_empty() {
            buckets.push(bucket);
        }
        buckets
    }
}

/// Parameters whose gradients can be summed together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bucket {
    /// The step of [`Plan::backward`] with which the gradients by all of them are there.
    pub step: usize,
    /// Their numbers in the layout.
    pub parameters: Vec<usize>,
}

struct Planner<'a> {
    config: &'a ModelConfig,
    plan: Plan,
    /// The branch of every operation.
    branches: Vec<usize>,
}

/// One map, or some whose channels follow one another.
type Maps = Vec<usize>;

impl Planner<'_> {
    fn forward(config: &ModelConfig) -> Planner<'_> {
        let mut planner = Planner {
            config,
            plan: Plan {
                forward: Vec::new(),
                logits: 0,
                d_logits: None,
                head: None,
                backward: Vec::new(),
                buffers: Vec::new(),
                slots: Vec::new(),
                recorded: Vec::new(),
                turns: Vec::new(),
            },
            branches: Vec::new(),
        };
        let logits = pixelcnn(config, &mut planner, Vec::new());
        planner.plan.logits = planner.whole(logits);
        planner.branches = vec![0; planner.plan.forward.len()];
        planner
    }

    /// The buffer of a map, made where it is a concatenation.
    fn whole(&mut self, maps: Maps) -> usize {
        if let [map] = maps[..] {
            return map;
        }
        let channels = maps.iter().map(|&map| self.plan.buffers[map].channels);
        let to = self.buffer(self.plan.buffers[maps[0]].scale, channels.sum());
        self.plan.forward.push(Operation::Concat { from: maps, to });
        to
    }

    fn buffer(&mut self, scale: usize, channels: usize) -> usize {
        self.plan.buffers.push(Buffer {
            scale,
            size: self.config.size_at(scale),
            channels,
            life: 0..=0,
            slot: 0,
        });
        self.plan.buffers.len() - 1
    }

    /// A new buffer shaped as another one.
    fn like(&mut self, buffer: usize) -> usize {
        let Buffer {
            scale, channels, ..
        } = self.plan.buffers[buffer];
        self.buffer(scale, channels)
    }

    /// The first operation on a map goes on on the map's branch. Others begin the horizontal stack,
    /// to which the walk comes second.
    fn find_branches(&mut self) {
        let mut of_maps = vec![0; self.plan.buffers.len()];
        let mut gone_on = vec![false; self.plan.buffers.len()];
        let operations = self.branches.iter_mut().zip(&self.plan.forward);
        for (number, (branch, operation)) in operations.enumerate() {
            *branch = match *operation {
                // Again for the channels before one, where the horizontal stack has ended.
                Operation::Images { .. } => usize::from(number > 0),
                Operation::Embed { .. } => 0,
                Operation::Add { to, .. } => of_maps[to],
                Operation::Concat { ref from, .. } => of_maps[from[0]],
                Operation::Layer { from, .. }
                | Operation::Shift { from, .. }
                | Operation::Elu { from, .. }
                | Operation::Attention { queries: from, .. }
                | Operation::GatedResnet { x: from, .. } => {
                    match std::mem::replace(&mut gone_on[from], true) {
                        true => 1,
                        false => of_maps[from],
                    }
                }
            };
            of_maps[operation.to()] = *branch;
        }
    }

    /// Reads the forward pass backwards.
    fn backward(&mut self) {
        // For each map of the forward pass the buffer of the gradient by it, once it has begun.
        let mut gradients = vec![None; self.plan.buffers.len()];
        let d_logits = self.like(self.plan.logits);
        self.plan.d_logits = Some(d_logits);
        gradients[self.plan.logits] = Some(d_logits);
        for number in self.backward_order() {
            let operation = self.plan.forward[number].clone();
            let Some(output) = gradients[operation.to()] else {
                continue;
            };
            let mut inputs = Vec::new();
            match operation {
                Operation::Images { .. } => continue,
                // Nothing is read but the codes.
                Operation::Embed { .. } => {}
                Operation::Add { from, .. } => {
                    gradients[from] = Some(output);
                    continue;
                }
                Operation::Layer { from, .. } => {
                    if !self.plan.is_of_images(from) {
                        inputs.push(self.contribution(from, &mut gradients));
                    }
                }
                Operation::Shift { from, .. } | Operation::Elu { from, .. } => {
                    inputs.push(self.contribution(from, &mut gradients));
                }
                Operation::GatedResnet { x, a, .. } => {
                    inputs.push(Gradient {
                        buffer: *gradients[x].get_or_insert(output),
                        accumulate: gradients[x] != Some(output),
                    });
                    inputs.extend(a.iter().map(|&a| self.contribution(a, &mut gradients)));
                }
                Operation::Attention {
                    queries,
                    keys_values,
                    ..
                } => {
                    let maps = [queries, keys_values];
                    inputs.extend(maps.map(|map| self.contribution(map, &mut gradients)));
                }
                Operation::Concat { from, .. } => {
                    let from = from.iter();
                    inputs.extend(from.map(|&map| self.contribution(map, &mut gradients)));
                }
            }
            self.plan.backward.push(Backward {
                operation: number,
                output,
                inputs,
            });
        }
    }

    /// The operations in the order of the backward pass: the forward pass read backwards, but that
    /// the vertical stack stays one operation behind. What the horizontal stack adds to the gradient
    /// by a map of the vertical one is then there before that comes to it, and neither waits for the
    /// other to add.
    fn backward_order(&self) -> Vec<usize> {
        let (mut order, mut behind) = (Vec::new(), None);
        for number in (0..self.plan.forward.len()).rev() {
            match self.branches[number] {
                0 => order.extend(behind.replace(number)),
                _ => {
                    order.push(number);
                    order.extend(behind.take());
                }
            }
        }
        order.extend(behind);
        order
    }

    /// Where the gradient by a map goes.
    fn contribution(&mut self, map: usize, gradients: &mut [Option<usize>]) -> Gradient {
        let begun = gradients[map];
        let buffer = begun.unwrap_or_else(|| self.like(map));
        gradients[map] = Some(buffer);
        Gradient {
            buffer,
            accumulate: begun.is_some(),
        }
    }

    fn finish(mut self) -> Plan {
        let uses = self.uses();
        self.find_lives(&uses);
        self.take_turns(&uses);
        self.assign_slots(&uses);
        self.plan
    }

    /// What every step reads and writes.
    fn uses(&self) -> Vec<Uses> {
        let Plan {
            forward, backward, ..
        } = &self.plan;
        let mut uses: Vec<Uses> = forward.iter().map(Operation::uses).collect();
        uses.push(Uses {
            reads: vec![self.plan.logits],
            writes: self.plan.d_logits.into_iter().collect(),
        });
        uses.extend(backward.iter().map(|step| {
            let mut reads = forward[step.operation].kept();
            reads.push(step.output);
            let gradients = step.inputs.iter().map(|gradient| gradient.buffer);
            let mut writes: Vec<usize> = gradients.collect();
            if let Operation::GatedResnet { c2, .. } = forward[step.operation] {
                writes.extend([c2, step.output]);
            }
            Uses { reads, writes }
        }));
        uses
    }

    fn find_lives(&mut self, uses: &[Uses]) {
        let mut seen = vec![false; self.plan.buffers.len()];
        for (step, uses) in uses.iter().enumerate() {
            for &buffer in uses.reads.iter().chain(&uses.writes) {
                let life = &mut self.plan.buffers[buffer].life;
                let first = if seen[buffer] { *life.start() } else { step };
                *life = first..=step;
                seen[buffer] = true;
            }
        }
    }

    /// Finds out which steps must wait for the other branch.
    fn take_turns(&mut self, uses: &[Uses]) {
        let number_of_last = self.plan.forward.len() - 1;
        let backward = self.plan.backward.iter().map(|step| step.operation);
        // The likelihood goes on where the forward pass ends.
        let operations = (0..=number_of_last).chain([number_of_last]).chain(backward);
        let branches: Vec<usize> = operations.map(|number| self.branches[number]).collect();
        let meet = |a: &[usize], b: &[usize]| a.iter().any(|buffer| b.contains(buffer));
        // Up to where a branch has waited for the other one.
        let mut waited = [0; 2];
        for (step, Uses { reads, writes }) in uses.iter().enumerate() {
            let branch = branches[step];
            let waits = (waited[branch]..step).any(|before| {
                let other = &uses[before];
                let needed = meet(&other.writes, reads)
                    || meet(&other.writes, writes)
                    || meet(&other.reads, writes);
                branches[before] != branch && needed
            });
            if waits {
                waited[branch] = step;
            }
            self.plan.turns.push(Turn { branch, waits });
        }
    }

    /// Gives every buffer a slot, the largest first, so that no slot must grow for a later one. Of
    /// the slots that are free in its life, however the branches' turns come, it takes the one left
    /// last before: what that held is the likeliest to be in a cache still.
    fn assign_slots(&mut self, uses: &[Uses]) {
        let Plan {
            buffers,
            slots,
            turns,
            ..
        } = &mut self.plan;
        // For each buffer, on each branch, the step after its last use.
        let mut left = vec![[0; 2]; buffers.len()];
        for (step, (uses, turn)) in uses.iter().zip(&*turns).enumerate() {
            for &buffer in uses.reads.iter().chain(&uses.writes) {
                left[buffer][turn.branch] = step + 1;
            }
        }
        // For each step, up to where each branch is done when it begins.
        let mut waited = [0; 2];
        let done = turns.iter().enumerate().map(|(step, turn)| {
            if turn.waits {
                waited[turn.branch] = step;
            }
            let mut done = [waited[turn.branch]; 2];
            done[turn.branch] = step;
            done
        });
        let done: Vec<[usize; 2]> = done.collect();
        let before = |a: usize, b: usize| {
            let done = done[*buffers[b].life.start()];
            left[a].iter().zip(done).all(|(left, done)| *left <= done)
        };
        let mut by_size: Vec<usize> = (0..buffers.len()).collect();
        by_size.sort_by_key(|&buffer| {
            let Buffer { ref life, .. } = buffers[buffer];
            (usize::MAX - buffers[buffer].values(), *life.start())
        });
        let mut held: Vec<Vec<usize>> = Vec::new();
        let mut of_buffers = vec![0; buffers.len()];
        for buffer in by_size {
            let apart = |other: &usize| before(*other, buffer) || before(buffer, *other);
            let left = |slot: &usize| {
                let others = held[*slot].iter().filter(|other| before(**other, buffer));
                others.map(|other| *buffers[*other].life.end()).max()
            };
            let free = (0..held.len()).filter(|&slot| held[slot].iter().all(apart));
            let slot = free.max_by_key(left).unwrap_or_else(|| {
                slots.push(buffers[buffer].values());
                held.push(Vec::new());
                slots.len() - 1
            });
            held[slot].push(buffer);
            of_buffers[buffer] = slot;
        }
        for (buffer, slot) in buffers.iter_mut().zip(of_buffers) {
            buffer.slot = slot;
        }
    }
}

/// The buffers that a step reads, and those that it writes.
struct Uses {
    reads: Vec<usize>,
    writes: Vec<usize>,
}

impl Operation {
    /// The buffer of its result.
    pub fn to(&self) -> usize {
        match *self {
            Operation::Images { to }
            | Operation::Embed { to, .. }
            | Operation::Layer { to, .. }
            | Operation::GatedResnet { to, .. }
            | Operation::Shift { to, .. }
            | Operation::Add { to, .. }
            | Operation::Elu { to, .. }
            | Operation::Attention { to, .. }
            | Operation::Concat { to, .. } => to,
        }
    }

    fn uses(&self) -> Uses {
        let (reads, inner) = match self {
            Operation::Images { .. } | Operation::Embed { .. } => (vec![], vec![]),
            Operation::Layer { from, .. }
            | Operation::Shift { from, .. }
            | Operation::Elu { from, .. } => (vec![*from], vec![]),
            Operation::Add { from, to } => (vec![*from, *to], vec![]),
            Operation::Concat { from, .. } => (from.clone(), vec![]),
            Operation::Attention {
                queries,
                keys_values,
                ..
            } => (vec![*queries, *keys_values], vec![]),
            Operation::GatedResnet { x, a, c1, c2, .. } => {
                ([&[*x], &a[..]].concat(), vec![*c1, *c2])
            }
        };
        let writes = [&inner[..], &[self.to()]].concat();
        Uses { reads, writes }
    }

    /// The parameters that its backward pass writes gradients of, but for `g`.
    fn parameters(&self) -> Vec<usize> {
        match self {
            Operation::Layer { layer, .. } | Operation::Embed { layer, .. } => {
                parameters_of(layer).to_vec()
            }
            Operation::GatedResnet { block, .. } => {
                let layers = [Some(&block.conv_1), block.nin.as_ref(), Some(&block.conv_2)];
                let layers = layers.into_iter().flatten().flat_map(parameters_of);
                layers.chain(block.conditional).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The buffers of the forward pass that its backward pass uses.
    pub fn kept(&self) -> Vec<usize> {
        match self {
            Operation::Layer { from, .. } | Operation::Elu { from, .. } => vec![*from],
            Operation::GatedResnet { x, a, c1, c2, .. } => [&[*x, *c1, *c2], &a[..]].concat(),
            Operation::Attention {
                queries,
                keys_values,
                ..
            } => vec![*queries, *keys_values],
            Operation::Images { .. }
            | Operation::Embed { .. }
            | Operation::Shift { .. }
            | Operation::Add { .. }
            | Operation::Concat { .. } => vec![],
        }
    }
}

/// The weight and the bias of a layer.
fn parameters_of(layer: &Layer) -> [usize; 2] {
    [layer.parameter, layer.parameter + 2]
}

/// The buffer of a map that is not a concatenation.
fn one(maps: &[usize]) -> usize {
    let [map] = *maps else {
        unreachable!("only a block's auxiliary input and the output are concatenations");
    };
    map
}

impl Pass for Planner<'_> {
    type Map = Maps;

    fn append_ones(&mut self, images: &Maps) -> Maps {
        self.first_channels(images, self.config.channels + 1)
    }

    fn embed(&mut self, layer: &Layer, _images: &Maps, map: usize) -> Maps {
        let to = self.buffer(0, layer.outputs + 1);
        let layer = layer.clone();
        let operation = Operation::Embed { layer, map, to };
        self.plan.forward.push(operation);
        vec![to]
    }

    fn first_channels(&mut self, _images: &Maps, channels: usize) -> Maps {
        let to = self.buffer(0, channels);
        self.plan.forward.push(Operation::Images { to });
        vec![to]
    }

    fn layer(&mut self, layer: &Layer, x: &Maps) -> Maps {
        let from = one(x);
        let scale = layer.scale_of_output(self.plan.buffers[from].scale);
        let to = self.buffer(scale, layer.outputs);
        let layer = layer.clone();
        let operation = Operation::Layer { layer, from, to };
        self.plan.forward.push(operation);
        vec![to]
    }

    fn gated_resnet(&mut self, block: &GatedResnet, x: &Maps, a: Option<&Maps>) -> Maps {
        let x = one(x);
        let scale = self.plan.buffers[x].scale;
        let [c1, c2] =
            [&block.conv_1, &block.conv_2].map(|layer| self.buffer(scale, layer.outputs));
        let to = self.like(x);
        self.plan.forward.push(Operation::GatedResnet {
            block: Box::new(block.clone()),
            x,
            a: a.cloned().unwrap_or_default(),
            c1,
            c2,
            to,
        });
        vec![to]
    }

    fn down_shift(&mut self, x: Maps) -> Maps {
        self.shift([1, 0], &x)
    }

    fn right_shift(&mut self, x: Maps) -> Maps {
        self.shift([0, 1], &x)
    }

    fn add(&mut self, x: Maps, y: Maps) -> Maps {
        let (from, to) = (one(&y), one(&x));
        self.plan.forward.push(Operation::Add { from, to });
        x
    }

    fn concat(&mut self, x: &Maps, y: &Maps) -> Maps {
        [&x[..], y].concat()
    }

    fn elu(&mut self, x: Maps) -> Maps {
        let from = one(&x);
        let to = self.like(from);
        self.plan.forward.push(Operation::Elu { from, to });
        vec![to]
    }

    fn attention(&mut self, heads: usize, queries: &Maps, keys_values: &Maps) -> Maps {
        let [queries, keys_values] = [queries, keys_values].map(|maps| one(maps));
        let to = self.like(queries);
        self.plan.forward.push(Operation::Attention {
            heads,
            queries,
            keys_values,
            to,
        });
        vec![to]
    }

    fn head(&mut self, head: &Head) {
        self.plan.head = Some(head.clone());
    }

    fn record(&mut self, map: &Maps) {
        self.plan.recorded.push(one(map));
    }
}

impl Planner<'_> {
    fn shift(&mut self, by: [usize; 2], x: &[usize]) -> Maps {
        let from = one(x);
        let to = self.like(from);
        self.plan.forward.push(Operation::Shift { by, from, to });
        vec![to]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::{configs, configs_of_codes};

    fn plans() -> impl Iterator<Item = Plan> {
        let plans = |config: &ModelConfig| [Plan::evaluation(config), Plan::training(config)];
        let mut configs = [configs(), configs_of_codes()].concat();
        configs.push(ModelConfig::default());
        configs.push(ModelConfig {
            nr_channel_resnet: 1,
            attention: [4, 5, 8],
            ..ModelConfig::default()
        });
        configs.push(ModelConfig {
            energy_distance: true,
            ..ModelConfig::default()
        });
        configs.into_iter().flat_map(move |config| plans(&config))
    }

    /// Every step of a plan: what it reads, and what it writes or begins.
    fn steps(plan: &Plan) -> Vec<(Vec<usize>, Vec<usize>)> {
        let forward = plan.forward.iter().map(|operation| match operation {
            Operation::Images { to } | Operation::Embed { to, .. } => (vec![], vec![*to]),
            Operation::Layer { from, to, .. }
            | Operation::Shift { from, to, .. }
            | Operation::Elu { from, to } => (vec![*from], vec![*to]),
            Operation::Add { from, to } => (vec![*from, *to], vec![]),
            Operation::Concat { from, to } => (from.clone(), vec![*to]),
            Operation::Attention {
                queries,
                keys_values,
                to,
                ..
            } => (vec![*queries, *keys_values], vec![*to]),
            Operation::GatedResnet {
                x, a, c1, c2, to, ..
            } => ([&[*x], &a[..]].concat(), vec![*c1, *c2, *to]),
        });
        let mut steps: Vec<_> = forward.collect();
        steps.push((vec![plan.logits], plan.d_logits.into_iter().collect()));
        steps.extend(plan.backward.iter().map(|step| {
            let gradients = step.inputs.iter().filter(|g| g.buffer != step.output);
            let (added, begun): (Vec<_>, Vec<_>) = gradients.partition(|g| g.accumulate);
            let buffers = |gradients: Vec<&Gradient>| gradients.iter().map(|g| g.buffer).collect();
            let mut reads: Vec<usize> = buffers(added);
            reads.push(step.output);
            reads.extend(plan.forward[step.operation].kept());
            (reads, buffers(begun))
        }));
        steps
    }

    /// Carried out with names instead of numbers: whatever is read was written and is there still.
    #[test]
    fn what_is_read_was_written_and_not_overwritten() {
        for plan in plans() {
            let mut holds = vec![None; plan.slots.len()];
            for (step, (reads, writes)) in steps(&plan).into_iter().enumerate() {
                for buffer in reads {
                    let Buffer { slot, ref life, .. } = plan.buffers[buffer];
                    assert_eq!(holds[slot], Some(buffer), "step {step}");
                    assert!(life.contains(&step));
                }
                for buffer in writes {
                    let Buffer { slot, ref life, .. } = plan.buffers[buffer];
                    assert_eq!(*life.start(), step);
                    assert!(plan.buffers[buffer].values() <= plan.slots[slot]);
                    holds[slot] = Some(buffer);
                }
            }
        }
    }

    #[test]
    fn no_two_living_buffers_share_memory() {
        for plan in plans() {
            for (i, a) in plan.buffers.iter().enumerate() {
                for b in &plan.buffers[..i] {
                    let apart = a.life.end() < b.life.start() || b.life.end() < a.life.start();
                    assert!(a.slot != b.slot || apart, "{a:?}, {b:?}");
                }
            }
        }
    }

    /// Memory is little more than what lives at the step where that is most.
    #[test]
    fn slots_are_reused() {
        for plan in plans() {
            let alive = |step: usize| -> usize {
                let alive = plan.buffers.iter().filter(|b| b.life.contains(&step));
                alive.map(Buffer::values).sum()
            };
            let most = (0..steps(&plan).len()).map(alive).max().unwrap_or_default();
            assert!(plan.values() >= most);
            assert!(plan.values() * 2 <= most * 3, "{}, {most}", plan.values());
        }
    }

    /// Every map but the images has its gradient, and every operation its backward pass.
    #[test]
    fn the_backward_pass_is_the_forward_pass_read_backwards() {
        for plan in plans().filter(|plan| plan.d_logits.is_some()) {
            let has_one = |operation: &Operation| {
                !matches!(operation, Operation::Images { .. } | Operation::Add { .. })
            };
            let turns = plan.turns.iter().take(plan.forward.len());
            for branch in 0..2 {
                let here = |number: &usize| plan.turns[*number].branch == branch;
                let expected = plan.forward.iter().zip(turns.clone()).enumerate().rev();
                let expected = expected
                    .filter(|(_, (operation, turn))| turn.branch == branch && has_one(operation));
                let expected: Vec<usize> = expected.map(|(number, _)| number).collect();
                let found = plan.backward.iter().map(|step| step.operation);
                let found: Vec<usize> = found.filter(here).collect();
                assert_eq!(found, expected);
            }
            for step in &plan.backward {
                let (inputs, from_images) = match &plan.forward[step.operation] {
                    Operation::GatedResnet { a, .. } => (1 + a.len(), false),
                    Operation::Concat { from, .. } => (from.len(), false),
                    Operation::Attention { .. } => (2, false),
                    Operation::Embed { .. } => (0, false),
                    Operation::Layer { from, .. } => (1, plan.is_of_images(*from)),
                    _ => (1, false),
                };
                assert_eq!(step.inputs.len(), if from_images { 0 } else { inputs });
            }
        }
    }
}
