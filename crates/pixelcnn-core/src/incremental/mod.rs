//! The network evaluated pixel by pixel, for all that needs one pixel at a time: sampling,
//! completion, decoding. Nothing is computed twice, so a batch of images costs about as many
//! multiplications as one forward pass over them, instead of one pass for every pixel.
//!
//! The vertical stack advances a row at a time and the horizontal stack a pixel at a time, the
//! lower resolutions only when their turn comes; of every map the few rows are kept that later
//! taps read, with the nonlinearity applied.
//!
//! Results are the same bits for any number of images side by side, of threads, and for any vector
//! instructions: every output is one chain of fused multiply-adds in a fixed order (the bias, the
//! taps known when the row begins, then those of the pixel, input channels ascending), exponentials
//! are the crate's own polynomials, and weight normalisation is folded into the weights once in
//! double precision.

mod program;
mod team;
#[cfg(test)]
mod tests;
mod tile;
mod weights;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{ConfigError, ModelConfig, Nonlinearity};
use crate::kernels::simd::{self, Level};
use crate::likelihood::from_level;
use crate::network::Layout;
use program::{Program, Ring, Step, Sum, Tap, When};
use team::{Member, Team};
use tile::{Kernels, PANEL};
use weights::{Lanes, Weights};

/// Images for each thread from which on the images are shared out among the threads, who then do
/// not wait for each other; with fewer, each layer's output channels are.
const IMAGES_PER_THREAD: usize = 16;

/// Tiles of pixels that are summed before what follows is done with the sums, so that they are in
/// the second-level cache then.
const TILES: usize = 8;

/// Why nothing can be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvaluatorError {
    /// A configuration that no model can have.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Parameters that are not those of the configuration.
    #[error("{name} has {found} values where the model has {expected}: use its own parameters")]
    Parameters {
        /// The first one that is wrong.
        name: String,
        /// Its number of values in the layout.
        expected: usize,
        /// And in what was given.
        found: usize,
    },
    /// A class beyond the model's.
    #[error("class {class}: the model has {nr_classes}: choose one from 0 on")]
    Class {
        /// What was asked for.
        class: u32,
        /// How many there are.
        nr_classes: usize,
    },
    /// The system gives no memory for so many images.
    #[error("no memory for {images} images side by side ({bytes} bytes): take fewer at a time")]
    Memory {
        /// Images asked for.
        images: usize,
        /// What they need.
        bytes: usize,
    },
}

/// A model ready to be evaluated pixel by pixel. Clones share its weights.
#[derive(Debug, Clone)]
pub struct Evaluator {
    model: Arc<Model>,
}

#[derive(Debug)]
struct Model {
    config: ModelConfig,
    program: Program,
    weights: Weights,
}

impl Evaluator {
    /// Packs `parameters`, in the [`Layout`]'s order.
    ///
    /// # Errors
    /// [`EvaluatorError::Config`] and [`EvaluatorError::Parameters`].
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>]) -> Result<Evaluator, EvaluatorError> {
        config.validate()?;
        let layout = Layout::new(config).parameters;
        for (i, parameter) in layout.iter().enumerate() {
            let found = parameters.get(i).map_or(0, Vec::len);
            if found != parameter.len() {
                return Err(EvaluatorError::Parameters {
                    name: parameter.name.clone(),
                    expected: parameter.len(),
                    found,
                });
            }
        }
        let program = Program::new(config);
        let weights = Weights::pack(&program, parameters);
        Ok(Evaluator {
            model: Arc::new(Model {
                config: config.clone(),
                program,
                weights,
            }),
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Bytes of memory that a run takes for each of its images; all of them are taken when it
    /// begins.
    pub fn bytes_per_image(&self) -> usize {
        self.model.program.floats * size_of::<f32>()
    }

    /// Bytes of the packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.model.weights.bytes()
    }

    /// The packed weights that the mixture at a row and column takes, part by part: what must be
    /// read for it at the least.
    pub fn weights_of(&self, [y, x]: [usize; 2]) -> impl Iterator<Item = &[f32]> {
        let Model {
            program, weights, ..
        } = &*self.model;
        program.steps([y, x]).flat_map(move |step| {
            let sum = &program.sums[step.sum];
            let inputs: usize = sum.phases[step.phase]
                .taps(step.when)
                .iter()
                .map(Tap::channels)
                .sum();
            let len = inputs * sum.columns();
            (len > 0).then(|| &weights.taps(step.sum, step.phase, step.when)[..len])
        })
    }

    /// Begins images, one for each of `labels`, on so many `threads`, the calling one among them.
    /// Labels are the images' classes; any value for an unconditional model.
    ///
    /// # Errors
    /// [`EvaluatorError::Class`] and [`EvaluatorError::Memory`].
    pub fn run(&self, labels: &[u32], threads: usize) -> Result<Run, EvaluatorError> {
        self.run_at(simd::level(), labels, threads)
    }

    /// As [`Evaluator::run`], with the vector instructions chosen; the bits are the same.
    ///
    /// # Errors
    /// As [`Evaluator::run`].
    ///
    /// # Panics
    /// If the machine does not have these instructions.
    pub fn run_at(
        &self,
        level: Level,
        labels: &[u32],
        threads: usize,
    ) -> Result<Run, EvaluatorError> {
        assert!(level <= simd::level(), "this machine has no {level:?}");
        let nr_classes = self.model.config.nr_classes;
        let wrong = |&class: &u32| nr_classes > 0 && class as usize >= nr_classes;
        if let Some(class) = labels.iter().copied().find(|class| wrong(class)) {
            return Err(EvaluatorError::Class { class, nr_classes });
        }
        let team = Team::new(threads.max(1));
        let threads = team.size();
        let by_image = labels.len() >= IMAGES_PER_THREAD * threads;
        let groups = if by_image { threads } else { 1 };
        let groups = (0..groups)
            .map(|group| Group::new(&self.model, labels, share(labels.len(), group, groups)))
            .collect::<Result<_, _>>()?;
        let output = self.model.config.output_channels();
        Ok(Run {
            model: Arc::clone(&self.model),
            kernels: Kernels::of(level),
            team,
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            groups,
            images: labels.len(),
            done: 0,
            logits: vec![0.0; labels.len() * output],
            computed: false,
        })
    }
}

/// Images on their way, all at the same pixel, in raster order.
///
/// [`Run::logits`] gives the mixtures' parameters of the pixel; [`Run::push`] says what it is, and
/// turns to the next. So a caller can sample, force what it knows, or read the likelihood.
pub struct Run {
    model: Arc<Model>,
    kernels: &'static Kernels,
    team: Team,
    scratch: Vec<Mutex<Scratch>>,
    /// One, whose output channels the threads share, or one for each thread.
    groups: Vec<Group>,
    images: usize,
    /// Pixels of each image that are known.
    done: usize,
    logits: Vec<f32>,
    /// Whether `logits` are those of the pixel.
    computed: bool,
}

impl Run {
    /// Row and column of the pixel whose turn it is; none when the images are complete.
    pub fn position(&self) -> Option<[usize; 2]> {
        let ModelConfig { height, width, .. } = self.model.config;
        (self.done < height * width).then(|| [self.done / width, self.done % width])
    }

    /// Images side by side.
    pub fn images(&self) -> usize {
        self.images
    }

    /// The parameters of the pixel's mixture \[images, [`ModelConfig::output_channels`]\], given
    /// all pixels before it. Of complete images they are those of the last pixel.
    pub fn logits(&mut self) -> &[f32] {
        if let (false, Some(pixel)) = (self.computed, self.position()) {
            self.compute(pixel);
            self.computed = true;
        }
        &self.logits
    }

    /// Says what the pixel is: `levels` \[images, channels\]; and turns to the next.
    ///
    /// # Panics
    /// If the number of levels is another, or the images are complete.
    pub fn push(&mut self, levels: &[u8]) {
        let Some(pixel) = self.position() else {
            panic!("the images are complete");
        };
        let channels = self.model.config.channels;
        assert_eq!(levels.len(), self.images * channels, "levels of each image");
        // Also where nobody asked for the mixture, later pixels need what it is computed from.
        self.logits();
        let [y, x] = pixel;
        let input = &self.model.program.rings[0];
        for group in &mut self.groups {
            let first = group.memory().pixel(input, y as isize, x as isize);
            let levels = levels[group.images.start * channels..].chunks_exact(channels);
            let floats = &mut Lanes::floats_mut(&mut group.lanes)[first..];
            let pixels = floats.chunks_exact_mut(channels + 1).zip(levels);
            for (pixel, levels) in pixels.take(group.images.len()) {
                for (value, level) in pixel.iter_mut().zip(levels) {
                    *value = from_level(*level);
                }
                pixel[channels] = 1.0;
            }
        }
        self.done += 1;
        self.computed = false;
    }

    fn compute(&mut self, pixel: [usize; 2]) {
        let Run {
            model,
            kernels,
            team,
            scratch,
            groups,
            ..
        } = self;
        let by_image = groups.len() > 1;
        let threads = team.size();
        let shared: Vec<Memory> = groups.iter_mut().map(Group::memory).collect();
        team.run(&|member| {
            let (group, share) = match by_image {
                true => (member.index, [0, 1]),
                false => (0, [member.index, threads]),
            };
            let mut scratch = scratch[member.index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let mut worker = Worker {
                model,
                kernels,
                memory: shared[group],
                share,
                member: (!by_image).then_some(member),
                scratch: &mut scratch,
            };
            worker.advance(pixel);
        });

        let output = model.config.output_channels();
        let ring = &model.program.rings[model.program.logits()];
        let [y, x] = pixel.map(|n| n as isize);
        for group in groups {
            let first = group.memory().pixel(ring, y, x);
            let values = Lanes::floats(&group.lanes)[first..].chunks_exact(ring.channels);
            let logits = &mut self.logits[group.images.start * output..];
            let pixels = logits.chunks_exact_mut(output).zip(values);
            for (logits, values) in pixels.take(group.images.len()) {
                logits.copy_from_slice(&values[..output]);
            }
        }
    }
}

/// Some of the images, with the memory of their maps.
struct Group {
    images: Range<usize>,
    lanes: Vec<Lanes>,
}

impl Group {
    /// Zeros, but for the biases of the images' classes.
    fn new(model: &Model, labels: &[u32], images: Range<usize>) -> Result<Group, EvaluatorError> {
        let n = images.len();
        let refused = EvaluatorError::Memory {
            images: labels.len(),
            bytes: labels
                .len()
                .saturating_mul(model.program.floats * size_of::<f32>()),
        };
        let size = n.checked_mul(model.program.floats / PANEL);
        let size = size.ok_or_else(|| refused.clone())?;
        let mut lanes = Vec::new();
        lanes.try_reserve_exact(size).map_err(|_| refused)?;
        lanes.resize(size, Lanes::ZERO);
        let mut group = Group { images, lanes };
        for (number, sum) in model.program.sums.iter().enumerate() {
            if sum.conditional.is_some() {
                let labels = &labels[group.images.clone()];
                let biases = &mut Lanes::floats_mut(&mut group.lanes)[sum.bias_start * n..];
                for (bias, &class) in biases.chunks_exact_mut(sum.columns()).zip(labels) {
                    bias.copy_from_slice(model.weights.bias(number, sum, class as usize));
                }
            }
        }
        Ok(group)
    }

    fn memory(&mut self) -> Memory {
        Memory {
            floats: Lanes::floats_mut(&mut self.lanes).as_mut_ptr(),
            images: self.images.len(),
        }
    }
}

/// The memory of a group, as its threads see it: each writes what no other one reads or writes
/// before the next barrier.
#[derive(Clone, Copy)]
struct Memory {
    floats: *mut f32,
    images: usize,
}

// SAFETY: a pointer that is used as said above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Index of the first image's channels at a row and column of a ring's map, on which there is
    /// also one column on each side and the row above.
    fn pixel(&self, ring: &Ring, y: isize, x: isize) -> usize {
        let row = y.rem_euclid(ring.rows as isize) as usize;
        let column = (x + 1) as usize;
        (ring.start + (row * (ring.width + 2) + column) * ring.channels) * self.images
    }

    /// Some values that are only read until the next barrier, or also written by this thread.
    ///
    /// # Safety
    /// They must be that, and lie in the group's memory.
    unsafe fn read(&self, start: usize, len: usize) -> &[f32] {
        // SAFETY: the same as the caller's.
        unsafe { std::slice::from_raw_parts(self.floats.add(start), len) }
    }

    /// Some values that are this thread's alone until the next barrier.
    ///
    /// # Safety
    /// They must be that, lie in the group's memory, and not be borrowed already.
    #[allow(clippy::mut_from_ref)]
    unsafe fn write(&self, start: usize, len: usize) -> &mut [f32] {
        // SAFETY: the same as the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.floats.add(start), len) }
    }
}

/// Pointers for the tiles, and which pixels they are.
#[derive(Default)]
struct Scratch {
    /// Index of the pixel's column, and of its image.
    pixels: Vec<[usize; 2]>,
    inputs: Vec<usize>,
    taps: Vec<*const f32>,
    from: Vec<*const f32>,
    to: Vec<*mut f32>,
}

// SAFETY: the pointers mean nothing between two uses, which both write them first.
unsafe impl Send for Scratch {}

/// What one thread does for a pixel.
struct Worker<'a> {
    model: &'a Model,
    kernels: &'static Kernels,
    memory: Memory,
    /// This thread's number among those who share the output channels, and their number.
    share: [usize; 2],
    /// Whom to wait for.
    member: Option<Member<'a>>,
    scratch: &'a mut Scratch,
}

impl Worker<'_> {
    /// Computes all that a pixel's mixture needs beyond what is there.
    fn advance(&mut self, [y, x]: [usize; 2]) {
        let Program { sums, .. } = &self.model.program;
        for Step {
            sum: number,
            phase,
            when,
        } in self.model.program.steps([y, x])
        {
            let sum = &sums[number];
            let width = self.model.config.width >> sum.scale;
            let columns = match when {
                When::Row => (phase % sum.step..width).step_by(sum.step),
                When::Pixel => (x >> sum.scale..(x >> sum.scale) + 1).step_by(1),
            };
            self.sum(number, sum, phase, when, y >> sum.scale, columns);
            // Where values were made, others read them next.
            if sum.by_row || when == When::Pixel {
                self.wait();
            }
        }
    }

    fn wait(&self) {
        if let Some(member) = &self.member {
            member.barrier();
        }
    }

    /// Sums the taps of a phase at some columns of a row, and makes the values of complete sums.
    fn sum(
        &mut self,
        number: usize,
        sum: &Sum,
        phase: usize,
        when: When,
        row: usize,
        columns: impl ExactSizeIterator<Item = usize>,
    ) {
        let [index, of] = self.share;
        let panels = share(sum.panels(), index, of);
        if panels.is_empty() {
            return;
        }
        let n = self.memory.images;
        let [_, tile] = self.kernels.shape(columns.len() * n);
        let mut pixels = columns.flat_map(|x| (0..n).map(move |image| [x, image]));
        loop {
            self.scratch.pixels.clear();
            self.scratch
                .pixels
                .extend(pixels.by_ref().take(TILES * tile));
            if self.scratch.pixels.is_empty() {
                return;
            }
            self.sum_pixels(number, sum, phase, when, row, panels.clone());
            if sum.by_row || when == When::Pixel {
                self.values(sum, row, panels.clone());
            }
        }
    }

    /// Sums the taps at the pixels in `scratch`, for some panels of each half.
    fn sum_pixels(
        &mut self,
        number: usize,
        sum: &Sum,
        phase: usize,
        when: When,
        row: usize,
        panels: Range<usize>,
    ) {
        let (memory, n) = (self.memory, self.memory.images);
        let Model {
            program, weights, ..
        } = self.model;
        let Scratch {
            pixels,
            inputs,
            taps: pointers,
            from,
            to,
        } = &mut *self.scratch;
        let taps = sum.phases[phase].taps(when);
        inputs.clear();
        pointers.clear();
        for tap in taps {
            inputs.push(tap.channels());
            let ring = &program.rings[tap.ring];
            let y = ((row << sum.scale) >> ring.scale) as isize + tap.dy;
            for &[x, image] in &*pixels {
                let x = ((x << sum.scale) >> ring.scale) as isize + tap.dx;
                let pixel = memory.pixel(ring, y, x) + image * ring.channels;
                pointers.push(memory.floats.wrapping_add(pixel));
            }
        }
        let columns = sum.columns();
        let bias = weights.bias(number, sum, 0);
        // What the row taps gave is gone on with; else the bias begins.
        let begun = when == When::Pixel && !sum.phases[phase].row.is_empty();
        from.clear();
        to.clear();
        for &[x, image] in &*pixels {
            let at = sum.start * n + (x * n + image) * columns;
            to.push(memory.floats.wrapping_add(at));
            from.push(match (begun, sum.conditional) {
                (true, _) => memory.floats.wrapping_add(at),
                (false, None) => bias.as_ptr(),
                (false, Some(_)) => {
                    let bias = sum.bias_start * n + image * columns;
                    memory.floats.wrapping_add(bias)
                }
            });
        }

        let weights = weights.taps(number, phase, when);
        let stride = inputs.iter().sum::<usize>() * PANEL;
        let [most, tile] = self.kernels.shape(pixels.len());
        let (groups, tiles) = (panels.len().div_ceil(most), pixels.len().div_ceil(tile));
        for half in 0..sum.halves() {
            for group in 0..groups {
                let group = share(panels.len(), group, groups);
                let panel = half * sum.panels() + panels.start + group.start;
                let weights = &weights[panel * stride..][..group.len() * stride];
                for tile in 0..tiles {
                    let tile = share(pixels.len(), tile, tiles);
                    // SAFETY: the run's level is one that the machine has. The taps' rings have
                    // their pixels and channels in the group's memory, complete since the last
                    // barrier; the sums' columns of these panels are this thread's alone.
                    unsafe {
                        self.kernels.tile(group.len(), tile.len())(
                            inputs,
                            pointers.as_ptr().wrapping_add(tile.start),
                            pixels.len(),
                            weights.as_ptr(),
                            stride,
                            from[tile.clone()].as_ptr(),
                            to[tile].as_ptr(),
                            panel * PANEL,
                        );
                    }
                }
            }
        }
    }

    /// Makes the values of complete sums at the pixels in `scratch`, for some panels.
    fn values(&mut self, sum: &Sum, row: usize, panels: Range<usize>) {
        let (memory, n) = (self.memory, self.memory.images);
        let rings = &self.model.program.rings;
        let (first, len) = (panels.start * PANEL, panels.len() * PANEL);
        let channels = len.min(sum.channels - first);
        let y = row as isize;
        for &[x, image] in &self.scratch.pixels {
            let at = |ring: usize| {
                let ring = &rings[ring];
                memory.pixel(ring, y, x as isize) + image * ring.channels
            };
            let sums = sum.start * n + (x * n + image) * sum.columns() + first;
            // SAFETY: these channels of the sum, of its value and of its activations are this
            // thread's alone, and those of the residual were made by this thread too. No two of
            // the slices overlap, and the run's level is one that the machine has.
            unsafe {
                let a = memory.read(sums, len);
                let value = match sum.value {
                    Some(value) => {
                        let value = memory.write(at(value) + first, len);
                        if sum.gated {
                            let b = memory.read(sums + sum.panels() * PANEL, len);
                            let x = memory.read(at(sum.residual) + first, len);
                            (self.kernels.gate)(x, a, b, value);
                        } else {
                            value.copy_from_slice(a);
                        }
                        value
                    }
                    None => a,
                };
                let value = &value[..channels];
                for &(f, ring) in &sum.activations {
                    let to = at(ring) + first;
                    if f == Nonlinearity::ConcatElu {
                        let plus = memory.write(to, channels);
                        let minus = memory.write(to + sum.channels, channels);
                        (self.kernels.concat_elu)(value, plus, minus);
                    } else {
                        (self.kernels.elementwise)(f, value, memory.write(to, channels));
                    }
                }
            }
        }
    }
}

/// Part `index` of `count` things shared out evenly.
fn share(count: usize, index: usize, parts: usize) -> Range<usize> {
    count * index / parts..count * (index + 1) / parts
}
