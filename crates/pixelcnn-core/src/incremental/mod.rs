//! The network evaluated pixel by pixel, for all that needs one pixel at a time: sampling,
//! completion, decoding. Nothing is computed twice, so a batch of images costs about as many
//! multiplications as one forward pass over them, instead of one pass for every pixel.
//!
//! The vertical stack advances a row at a time and the horizontal stack a pixel at a time, the
//! lower resolutions only when their turn comes; of every map the few rows are kept that later
//! taps read, with the nonlinearity applied, and of attention's keys and values all rows.
//!
//! Results are the same bits for any number of images side by side, of threads, and for any vector
//! instructions: every output is one chain of fused multiply-adds in a fixed order (the bias, the
//! taps known when the row begins, then those of the pixel, input channels ascending), exponentials
//! are the crate's own polynomials, and weight normalisation is folded into the weights once in
//! double precision.

pub mod gpu;
pub mod program;
mod strips;
mod team;
#[cfg(test)]
pub(crate) mod tests;
mod tile;
pub mod weights;

use std::iter::StepBy;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::{ConfigError, ModelConfig, Nonlinearity, halved};
use crate::kernels::attention;
use crate::kernels::simd::{self, Level};
use crate::likelihood::{EnergyDistance, from_level};
use crate::network::Layout;
use program::{Attention, Program, Ring, Step, Sum, Tap, When};
use strips::Strips;
pub use strips::{LAG, Lane};
use team::{Member, Team};
pub use tile::PANEL;
use tile::TileKernels;
use weights::{Line, PackedWeights};

/// Images that a thread takes through all of a row or pixel at a time, where there are as many for
/// each thread: enough for whole tiles, and so few that a layer's maps stay in the second-level
/// cache. Threads then do not wait for each other; with fewer images, they share out each layer's
/// output channels.
const GROUP: usize = 16;

/// As many are enough where all weights of a pixel stay in every thread's second-level cache:
/// waiting for each other at every small layer would cost more than whole tiles gain.
const SMALL_GROUP: usize = 4;

/// Weights that do.
const SMALL: usize = 1 << 18;

/// Tiles of pixels that are summed before what follows is done with the sums, so that they are in
/// the second-level cache then.
const TILES: usize = 8;

/// Why nothing can be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
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
    /// A model of codes, where one of images is needed.
    #[error("the model is one of codes, not of images: take one that was trained on images")]
    NotImages,
    /// A model that draws samples alone, where a likelihood is needed.
    #[error(
        "the model was trained by the energy distance, and has no likelihood: take one that was trained \
         without it"
    )]
    NoLikelihood,
    /// A code beyond the model's.
    #[error("code {code} in a coarser map: the model has {codes}, from 0 on")]
    Code {
        /// The first one that is.
        code: usize,
        /// How many there are.
        codes: usize,
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

impl EvaluatorError {
    /// Checks that a model gives images a likelihood.
    ///
    /// # Errors
    /// [`EvaluatorError::NotImages`] and [`EvaluatorError::NoLikelihood`].
    pub fn unless_likelihood_of_images(config: &ModelConfig) -> Result<(), EvaluatorError> {
        match config.nr_codes {
            0 => EvaluatorError::unless_likelihood(config),
            _ => Err(EvaluatorError::NotImages),
        }
    }

    /// Checks that a model has a likelihood.
    ///
    /// # Errors
    /// [`EvaluatorError::NoLikelihood`].
    pub fn unless_likelihood(config: &ModelConfig) -> Result<(), EvaluatorError> {
        match config.energy_distance {
            false => Ok(()),
            true => Err(EvaluatorError::NoLikelihood),
        }
    }
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
    weights: PackedWeights,
    head: Option<EnergyDistance>,
}

impl Evaluator {
    /// Packs `parameters`, in the [`Layout`]'s order.
    ///
    /// # Errors
    /// [`EvaluatorError::Config`], [`EvaluatorError::Parameters`], and [`EvaluatorError::Memory`]
    /// where no machine of this kind could have as much.
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>]) -> Result<Evaluator, EvaluatorError> {
        config.validate()?;
        if let Some((parameter, found)) = Layout::new(config).misfit(parameters) {
            return Err(EvaluatorError::Parameters {
                name: parameter.name.clone(),
                expected: parameter.len(),
                found,
            });
        }
        let program = Program::new(config, true).ok_or(EvaluatorError::Memory {
            images: 1,
            bytes: usize::MAX,
        })?;
        let weights = PackedWeights::pack(&program, parameters);
        Ok(Evaluator {
            model: Arc::new(Model {
                config: config.clone(),
                program,
                weights,
                head: EnergyDistance::of_parameters(config, parameters),
            }),
        })
    }

    /// What makes samples of the output, of a model that is trained by the energy distance.
    pub fn head(&self) -> Option<&EnergyDistance> {
        self.model.head.as_ref()
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Bytes of memory that a raster takes for each of its images; all of them are taken when it
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
            config,
            program,
            weights,
            ..
        } = &*self.model;
        let turns = (0..config.channels).step_by(config.channels_together());
        let steps = turns.flat_map(move |known| program.steps([y, x], known));
        steps.flat_map(move |step| {
            let sum = &program.sums[step.sum];
            let len = |taps: &[Tap]| taps.iter().map(Tap::channels).sum::<usize>() * sum.columns();
            let taps = len(sum.phases[step.phase].taps(step.when));
            let pairs = match step.when {
                When::Row => 4 * len(&sum.pairs),
                When::Pixel => 0,
            };
            [
                &weights.taps(step.sum, step.phase, step.when)[..taps],
                &weights.pairs(step.sum)[..pairs],
            ]
        })
    }

    /// Begins images, one for each of `labels`, on so many `threads`, the calling one among them.
    /// Labels are the images' classes; any value for an unconditional model.
    ///
    /// # Errors
    /// [`EvaluatorError::Class`] and [`EvaluatorError::Memory`].
    pub fn begin(&self, labels: &[u32], threads: usize) -> Result<Raster, EvaluatorError> {
        self.begin_at(simd::level(), labels, threads)
    }

    /// As [`Evaluator::begin`], with the vector instructions chosen; the bits are the same.
    ///
    /// # Errors
    /// As [`Evaluator::begin`].
    ///
    /// # Panics
    /// If the machine does not have these instructions.
    pub fn begin_at(
        &self,
        level: Level,
        labels: &[u32],
        threads: usize,
    ) -> Result<Raster, EvaluatorError> {
        self.begin_rows(level, labels, threads, self.model.config.height)
    }

    /// Begins strips of pictures, one for each of `lanes`, of the model's width and any heights: `rows` in
    /// all, counted from the first one that begins. See [`Lane`]; the rest is as for
    /// [`Evaluator::begin_at`].
    ///
    /// # Errors
    /// As [`Evaluator::begin`].
    ///
    /// # Panics
    /// As [`Evaluator::begin_at`]; or if the model has attention or codes, its width is no multiple of
    /// [`LAG`], or the lanes don't fit.
    pub fn begin_strips(
        &self,
        level: Level,
        lanes: &[Lane],
        threads: usize,
        rows: usize,
    ) -> Result<Raster, EvaluatorError> {
        let config = &self.model.config;
        assert!(!config.attends() && config.nr_codes == 0, "rows of images");
        assert!(config.width.is_multiple_of(LAG), "whole coarse columns");
        for lane in lanes {
            assert!(lane.start.is_multiple_of(LAG), "whole coarse rows");
            let left = lane
                .left
                .map(|left| (lanes[left].start + LAG, lanes[left].rows));
            assert!(
                left.is_none_or(|left| left == (lane.start, lane.rows)),
                "behind its left one, and as long"
            );
        }
        let labels: Vec<u32> = lanes.iter().map(|lane| lane.class).collect();
        let mut raster = self.begin_rows(level, &labels, threads, rows)?;
        raster.strips = Some(Strips::new(lanes, &self.model.program));
        Ok(raster)
    }

    fn begin_rows(
        &self,
        level: Level,
        labels: &[u32],
        threads: usize,
        rows: usize,
    ) -> Result<Raster, EvaluatorError> {
        assert!(level <= simd::level(), "this machine has no {level:?}");
        let nr_classes = self.model.config.nr_classes;
        let wrong = |&class: &u32| nr_classes > 0 && class as usize >= nr_classes;
        if let Some(class) = labels.iter().copied().find(|class| wrong(class)) {
            return Err(EvaluatorError::Class { class, nr_classes });
        }
        let team = Team::new(threads.max(1));
        let threads = team.size();
        // An odd pixel, at full resolution alone, as most are.
        let weights: usize = self.weights_of([1, 1]).map(<[f32]>::len).sum();
        let group = if weights <= SMALL { SMALL_GROUP } else { GROUP };
        let by_image = labels.len() >= group * threads;
        let groups = match by_image {
            true => (labels.len() / threads).div_ceil(GROUP) * threads,
            false => 1,
        };
        let groups = (0..groups)
            .map(|group| Group::new(&self.model, labels, share(labels.len(), group, groups)))
            .collect::<Result<_, _>>()?;
        let output = self.model.config.output_channels();
        Ok(Raster {
            model: Arc::clone(&self.model),
            kernels: TileKernels::of(level),
            team,
            scratch: (0..threads).map(|_| Mutex::default()).collect(),
            groups,
            by_image,
            images: labels.len(),
            rows,
            done: 0,
            known: 0,
            logits: vec![0.0; labels.len() * output],
            computed: false,
            strips: None,
        })
    }
}

/// Images on their way, all at the same pixel, in raster order.
///
/// [`Raster::logits`] gives the mixture's parameters of the pixel, as far as they are due;
/// [`Raster::push`] says what its channels are, and turns to the next. So a caller can sample, force what
/// it knows, or read the likelihood.
pub struct Raster {
    model: Arc<Model>,
    kernels: &'static TileKernels,
    team: Team,
    scratch: Vec<Mutex<Scratch>>,
    /// One, whose output channels the threads share, or as many for each thread.
    groups: Vec<Group>,
    by_image: bool,
    images: usize,
    /// Of each image.
    rows: usize,
    /// Pixels of each image that are known.
    done: usize,
    /// Channels of the next one that are.
    known: usize,
    logits: Vec<f32>,
    /// Whether `logits` are those whose turn it is.
    computed: bool,
    /// Where the images are strips of pictures.
    strips: Option<Strips>,
}

impl Raster {
    /// Row and column of the pixel whose turn it is; none when the images are complete.
    pub fn position(&self) -> Option<[usize; 2]> {
        let ModelConfig { width, .. } = self.model.config;
        (self.done < self.rows * width).then(|| [self.done / width, self.done % width])
    }

    /// The channels of that pixel whose turn it is: all of them, or one where they are predicted one
    /// after another.
    pub fn channels(&self) -> Range<usize> {
        self.known..self.known + self.model.config.channels_together()
    }

    /// Images side by side.
    pub fn images(&self) -> usize {
        self.images
    }

    /// Rows that each of them is taken through.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The parameters of the pixel's mixture, or whatever the model's output is \[images, [`ModelConfig::output_channels`]\], given all
    /// pixels before it: those [of the channels](ModelConfig::outputs_of) whose turn it is, given the channels
    /// before, and of those. Of complete images they are those of the last pixel.
    pub fn logits(&mut self) -> &[f32] {
        if let (false, Some(pixel)) = (self.computed, self.position()) {
            self.compute(pixel);
            self.computed = true;
        }
        &self.logits
    }

    /// Gives a model the coarser maps that it wants, before the first pixel: their codes are looked at in
    /// `images` \[images, [`ModelConfig::bytes_per_image`]\], and nothing else.
    ///
    /// # Errors
    /// [`EvaluatorError::Code`].
    ///
    /// # Panics
    /// If there are not as many images, or pixels are known already.
    pub fn give_coarse(&mut self, images: &[u8]) -> Result<(), EvaluatorError> {
        let Model {
            config,
            program,
            weights,
            ..
        } = &*self.model;
        let Some(ring) = program.coarse.map(|ring| &program.rings[ring]) else {
            return Ok(());
        };
        let size = config.bytes_per_image();
        assert_eq!(images.len(), self.images * size, "a map for each image");
        assert!(self.done == 0 && !self.computed, "before the first pixel");
        for group in &mut self.groups {
            let memory = group.memory();
            let images = images.chunks_exact(size).skip(group.images.start);
            for (image, pixels) in images.take(group.images.len()).enumerate() {
                let rows = weights.embedded_coarse(config, pixels);
                for (pixel, row) in rows.enumerate() {
                    let codes = config.nr_coarse_codes;
                    let row = row.map_err(|code| EvaluatorError::Code { code, codes })?;
                    let [y, x] = [pixel / config.width, pixel % config.width].map(|n| n as isize);
                    let at = memory.pixel(ring, y, x) + image * ring.channels;
                    let to = &mut Line::floats_mut(&mut group.lines)[at..][..ring.channels];
                    to[..row.len()].copy_from_slice(row);
                    to[row.len()] = 1.0;
                }
            }
        }
        Ok(())
    }

    /// Says what the pixel's [`Raster::channels`] are: `levels` \[images, channels\], or what its code is,
    /// two bytes for each image; and turns to the next.
    ///
    /// # Panics
    /// If the number of levels is another, a code is beyond the model's, or the images are complete.
    pub fn push(&mut self, levels: &[u8]) {
        self.push_inside(levels, |_| true);
    }

    /// As [`Raster::push`], where the pixel lies outside of some images: those that are not `inside`, whose
    /// levels are not looked at.
    ///
    /// # Panics
    /// As [`Raster::push`].
    pub fn push_inside(&mut self, levels: &[u8], inside: impl Fn(usize) -> bool) {
        let Some(pixel) = self.position() else {
            panic!("the images are complete");
        };
        let (here, channels) = (self.channels(), self.model.config.channels);
        let bytes = self.model.config.bytes_of(here.clone()).len();
        assert_eq!(levels.len(), self.images * bytes, "levels of each image");
        // Also where nobody asked for the mixture, later pixels need what it is computed from.
        self.logits();
        let [y, x] = pixel;
        let input = &self.model.program.rings[0];
        let (ones, codes) = (input.channels - 1, self.model.config.nr_codes > 0);
        let embedding = self.model.weights.embedding(0);
        for group in &mut self.groups {
            let first = group.memory().pixel(input, y as isize, x as isize);
            let levels = levels[group.images.start * bytes..].chunks_exact(bytes);
            let floats = &mut Line::floats_mut(&mut group.lines)[first..];
            let pixels = floats.chunks_exact_mut(input.channels).zip(levels);
            for (image, (pixel, levels)) in group.images.clone().zip(pixels) {
                if codes {
                    let row = &embedding[ModelConfig::code(levels, 0) * ones..][..ones];
                    pixel[..ones].copy_from_slice(row);
                    pixel[ones] = 1.0;
                } else {
                    write_pixel(pixel, here.clone(), inside(image).then_some(levels));
                }
            }
        }
        self.known = here.end % channels;
        self.done += usize::from(self.known == 0);
        self.computed = false;
        if self.known == 0 && x + 1 == self.model.config.width {
            self.end_row(y);
        }
    }

    /// Takes the images through the row whose turn it is, which no pixel of is known yet. Threads don't
    /// wait for each other at every pixel, where they have images of their own: so `code` is asked on any of
    /// them what the channels of an image's pixel are, pixel by pixel of each image.
    ///
    /// # Panics
    /// If the model is one of codes, the images are complete, or within a row.
    pub fn code_row(&mut self, code: &(dyn Fn(&mut Turn) + Sync)) {
        let (config, position) = (self.model.config.clone(), self.position());
        let Some([y, 0]) = position.filter(|_| self.known == 0 && config.nr_codes == 0) else {
            panic!("no row begins at {position:?}, channel {}", self.known);
        };
        self.begin_row(y);
        self.on_groups(&|worker, images| {
            let mut logits = vec![0.0; images.len() * config.output_channels()];
            for x in 0..config.width {
                for known in (0..config.channels).step_by(config.channels_together()) {
                    worker.advance([y, x], known);
                    // SAFETY: the pixel's logits are there since the last barrier, and until the next one
                    // this thread alone reads and writes the pixel of its share of the images.
                    unsafe { worker.code([y, x], known, images, &mut logits, code) };
                    worker.wait();
                }
            }
        });
        self.done += config.width;
        self.computed = false;
        self.end_row(y);
    }

    fn begin_row(&mut self, y: usize) {
        if let Some(strips) = &mut self.strips {
            strips.begin_row(&self.model.program, y, &mut self.groups);
        }
    }

    fn end_row(&mut self, y: usize) {
        if let Some(strips) = &mut self.strips {
            strips.end_row(&self.model.program, y, &self.groups);
        }
    }

    /// Calls `f` on the threads with the groups that are theirs and the images of each, or on all of them
    /// with the one whose channels they share.
    fn on_groups(&mut self, f: &(dyn Fn(&mut Worker, &Range<usize>) + Sync)) {
        let Raster {
            model,
            kernels,
            team,
            scratch,
            groups,
            by_image,
            ..
        } = self;
        let (by_image, threads) = (*by_image, team.size());
        let shared = groups.iter_mut().map(|group| {
            let memory = group.memory();
            (memory, &group.images, &group.active[..])
        });
        let shared: Vec<(Memory, &Range<usize>, &[usize])> = shared.collect();
        team.run(&|member| {
            let mut scratch = scratch[member.index]
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let (groups, share) = match by_image {
                true => (share(shared.len(), member.index, threads), [0, 1]),
                false => (0..1, [member.index, threads]),
            };
            let member = (!by_image).then_some(member);
            for &(memory, images, active) in &shared[groups] {
                let mut worker = Worker {
                    model,
                    kernels,
                    memory,
                    active,
                    share,
                    member: member.as_ref(),
                    scratch: &mut scratch,
                };
                f(&mut worker, images);
            }
        });
    }

    fn compute(&mut self, pixel: [usize; 2]) {
        let here = self.channels();
        if let ([y, 0], 0) = (pixel, here.start) {
            self.begin_row(y);
        }
        self.on_groups(&|worker, _| worker.advance(pixel, here.start));

        let Raster { model, groups, .. } = self;
        let output = model.config.output_channels();
        let ring = &model.program.rings[model.program.logits[here.start / here.len()]];
        let own = model.config.outputs_of(here);
        let [y, x] = pixel.map(|n| n as isize);
        for group in groups {
            let first = group.memory().pixel(ring, y, x);
            let values = Line::floats(&group.lines)[first..].chunks_exact(ring.channels);
            let logits = &mut self.logits[group.images.start * output..];
            let pixels = logits.chunks_exact_mut(output).zip(values);
            for (logits, values) in pixels.take(group.images.len()) {
                logits[own.clone()].copy_from_slice(&values[..own.len()]);
            }
        }
    }
}

/// Channels of an image's pixel that are due in [`Raster::code_row`].
#[derive(Debug)]
pub struct Turn<'a> {
    /// The image's number.
    pub image: usize,
    /// The pixel's row and column.
    pub pixel: [usize; 2],
    /// The channels.
    pub channels: Range<usize>,
    /// As [`Raster::logits`] gives them of one image.
    pub logits: &'a [f32],
    /// To be written: what the channels are.
    pub levels: &'a mut [u8],
    /// To be set where the pixel is outside of the image: then levels are not looked at.
    pub outside: bool,
}

/// Some of the images, with the memory of their maps.
struct Group {
    images: Range<usize>,
    /// Places among them of those for which something is to be computed.
    active: Vec<usize>,
    lines: Vec<Line>,
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
        let mut lines = Vec::new();
        lines.try_reserve_exact(size).map_err(|_| refused)?;
        lines.resize(size, Line::ZERO);
        let mut group = Group {
            active: (0..n).collect(),
            images,
            lines,
        };
        for (number, sum) in model.program.sums.iter().enumerate() {
            if sum.conditional.is_some() {
                let labels = &labels[group.images.clone()];
                let biases = &mut Line::floats_mut(&mut group.lines)[sum.bias_start * n..];
                for (bias, &class) in biases.chunks_exact_mut(sum.columns()).zip(labels) {
                    bias.copy_from_slice(model.weights.bias(number, sum, class as usize));
                }
            }
        }
        Ok(group)
    }

    fn memory(&mut self) -> Memory {
        Memory {
            floats: Line::floats_mut(&mut self.lines).as_mut_ptr(),
            images: self.images.len(),
        }
    }

    /// Where the channels of one of its images are, at a row and column of a ring's map.
    fn place(&self, ring: &Ring, image: usize, [y, x]: [isize; 2]) -> Range<usize> {
        let first = pixel(ring, self.images.len(), y, x);
        let start = first + (image - self.images.start) * ring.channels;
        start..start + ring.channels
    }
}

/// Index of the first image's channels at a row and column of a ring's map, on which there is also one
/// column on each side and the row above.
fn pixel(ring: &Ring, images: usize, y: isize, x: isize) -> usize {
    let row = y.rem_euclid(ring.rows as isize) as usize;
    let column = (x + 1) as usize;
    (ring.start + (row * (ring.width + 2) + column) * ring.channels) * images
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
    fn pixel(&self, ring: &Ring, y: isize, x: isize) -> usize {
        pixel(ring, self.images, y, x)
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
    /// Of the pairs \[4, pairs, columns\].
    products: Vec<Line>,
    zeros: Vec<Line>,
    /// In which a pixel sees others.
    shares: Vec<f32>,
}

// SAFETY: the pointers mean nothing between two uses, which both write them first.
unsafe impl Send for Scratch {}

/// What one thread does for a pixel.
struct Worker<'a> {
    model: &'a Model,
    kernels: &'static TileKernels,
    memory: Memory,
    /// Places of the images for which something is to be computed.
    active: &'a [usize],
    /// This thread's number among those who share the output channels, and their number.
    share: [usize; 2],
    /// Whom to wait for.
    member: Option<&'a Member<'a>>,
    scratch: &'a mut Scratch,
}

impl Worker<'_> {
    /// Computes all that a pixel's mixture needs beyond what is there.
    fn advance(&mut self, [y, x]: [usize; 2], known: usize) {
        let Program { sums, .. } = &self.model.program;
        for Step {
            sum: number,
            phase,
            when,
        } in self.model.program.steps([y, x], known)
        {
            let sum = &sums[number];
            let width = halved(self.model.config.width, sum.scale);
            let columns = match when {
                When::Row => (phase % sum.step..width).step_by(sum.step),
                When::Pixel => (x >> sum.scale..(x >> sum.scale) + 1).step_by(1),
            };
            self.sum(number, phase, when, y >> sum.scale, columns);
            // Where values were made, others read them next.
            if when == When::Pixel {
                self.wait();
            } else if sum.by_row && phase % sum.step + 1 == sum.step {
                self.pair_activations(sum, y >> sum.scale);
                self.wait();
            }
        }
    }

    /// Asks what the channels of the images' pixel are that are due, of those that are this thread's to share
    /// out, and writes them.
    ///
    /// # Safety
    /// The logits are there, and nobody else uses them or the pixel.
    unsafe fn code(
        &self,
        [y, x]: [usize; 2],
        known: usize,
        images: &Range<usize>,
        logits: &mut [f32],
        code: &(dyn Fn(&mut Turn) + Sync),
    ) {
        let Model {
            config, program, ..
        } = self.model;
        let channels = known..known + config.channels_together();
        let own = config.outputs_of(channels.clone());
        let outputs = &program.rings[program.logits[known / channels.len()]];
        let input = &program.rings[0];
        let [first_output, first_input] =
            [outputs, input].map(|ring| self.memory.pixel(ring, y as isize, x as isize));
        let [index, of] = self.share;
        let own_images = share(self.active.len(), index, of);
        let of_images = logits.chunks_exact_mut(config.output_channels());
        let mut of_images = of_images.skip(own_images.start);
        for &place in &self.active[own_images] {
            let logits = of_images.next().expect("one for each image");
            let mut levels = [0; 3];
            let levels = &mut levels[..channels.len()];
            // SAFETY: both places lie in the group's memory, in rows of rings; the rest is the caller's.
            let (found, pixel) = unsafe {
                let found = first_output + place * outputs.channels;
                let pixel = first_input + place * input.channels;
                (
                    self.memory.read(found, own.len()),
                    self.memory.write(pixel, input.channels),
                )
            };
            logits[own.clone()].copy_from_slice(found);
            let mut turn = Turn {
                image: images.start + place,
                pixel: [y, x],
                channels: channels.clone(),
                logits,
                levels,
                outside: false,
            };
            code(&mut turn);
            write_pixel(
                pixel,
                channels.clone(),
                (!turn.outside).then_some(&*turn.levels),
            );
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
        phase: usize,
        when: When,
        row: usize,
        columns: StepBy<Range<usize>>,
    ) {
        let sum = &self.model.program.sums[number];
        let [index, of] = self.share;
        let panels = share(sum.panels(), index, of);
        let complete = sum.by_row || when == When::Pixel;
        // What the row taps gave is gone on with.
        let begun = when == When::Pixel && !sum.phases[phase].row.is_empty();
        let (active, paired) = (self.active, !sum.pairs.is_empty());
        let at_once = if paired { 2 } else { 1 };
        let [_, tile] = self.kernels.shape(columns.len() / at_once * active.len());
        let mut pixels = columns
            .step_by(at_once)
            .flat_map(|x| active.iter().map(move |&image| [x, image]));
        loop {
            let scratch = &mut *self.scratch;
            scratch.pixels.clear();
            let chunk = pixels.by_ref().take(TILES / at_once * tile);
            scratch.pixels.extend(chunk);
            if scratch.pixels.is_empty() || panels.is_empty() {
                break;
            }
            if let Some(attention) = sum.attention {
                self.attend(sum, attention, row, panels.clone());
                self.values(sum, row, panels.clone());
                continue;
            }
            if paired {
                self.sum_pairs(number, row, panels.clone());
                let rights = self.scratch.pixels.len();
                self.scratch.pixels.extend_from_within(..);
                let rights = &mut self.scratch.pixels[rights..];
                rights.iter_mut().for_each(|[x, _]| *x += 1);
            }
            if !sum.phases[phase].taps(when).is_empty() || !paired {
                self.sum_taps(number, phase, when, begun || paired, row, panels.clone());
            }
            if complete {
                self.values(sum, row, panels.clone());
            }
        }
    }

    /// What the pixels in `scratch` see of those up to them, for some panels.
    fn attend(&mut self, sum: &Sum, attention: Attention, row: usize, panels: Range<usize>) {
        let (memory, n) = (self.memory, self.memory.images);
        let rings = &self.model.program.rings;
        let [queries, keys_values] = [attention.queries, attention.keys_values].map(|i| &rings[i]);
        let width = sum.channels / attention.heads;
        let own = panels.start * PANEL..(panels.end * PANEL).min(sum.channels);
        let Scratch { pixels, shares, .. } = &mut *self.scratch;
        for &[x, image] in &*pixels {
            let at = |ring: &Ring, y: usize, x: usize, channel: usize| {
                let first = memory.pixel(ring, y as isize, x as isize);
                first + image * ring.channels + channel
            };
            let up_to = |y: usize| if y < row { keys_values.width } else { x + 1 };
            let before = (0..=row).flat_map(|y| (0..up_to(y)).map(move |x| (y, x)));
            let before = before.map(|(y, x)| at(keys_values, y, x, 0));
            let sums = sum.start * n + (x * n + image) * sum.columns();
            for head in own.start / width..own.end.div_ceil(width) {
                let channel = head * width;
                let own = own.start.max(channel)..own.end.min(channel + width);
                // SAFETY: queries, keys and values up to this pixel were made before the last barrier,
                // and their rings have so many channels; these channels of the sum are this thread's
                // alone.
                unsafe {
                    let query = memory.read(at(queries, row, x, channel), width);
                    let seen = memory.write(sums + own.start, own.len());
                    shares.clear();
                    shares.extend(before.clone().map(|pixel| {
                        let key = memory.read(pixel + channel, width);
                        attention::scale(width) * attention::dot(query, key)
                    }));
                    attention::softmax(shares);
                    seen.fill(0.0);
                    for (share, pixel) in shares.iter().zip(before.clone()) {
                        let values = memory.read(pixel + sum.channels + own.start, own.len());
                        attention::add_scaled(seen, *share, values);
                    }
                }
            }
        }
    }

    /// Sums the taps at the pixels in `scratch`, for some panels of each half; from the bias on, or
    /// going on with what has `begun`.
    fn sum_taps(
        &mut self,
        number: usize,
        phase: usize,
        when: When,
        begun: bool,
        row: usize,
        panels: Range<usize>,
    ) {
        let Model {
            program, weights, ..
        } = self.model;
        let sum = &program.sums[number];
        let taps = sum.phases[phase].taps(when);
        self.point_at_taps(taps, sum.scale, sum.scale, row);
        self.point_at_sums(number);
        let Scratch { from, to, .. } = &mut *self.scratch;
        if begun {
            from.clear();
            from.extend(to.iter().map(|to| to.cast_const()));
        }
        self.multiply(sum, weights.taps(number, phase, when), panels);
    }

    /// Sums the taps into pairs at the pairs of pixels whose left ones are in `scratch`.
    fn sum_pairs(&mut self, number: usize, row: usize, panels: Range<usize>) {
        let Model {
            program, weights, ..
        } = self.model;
        let sum = &program.sums[number];
        let columns = sum.columns();
        let pairs = self.scratch.pixels.len();
        self.point_at_taps(&sum.pairs, sum.scale, sum.scale + 1, row);
        self.point_at_sums(number);
        let Scratch {
            inputs,
            from,
            to,
            products,
            zeros,
            ..
        } = &mut *self.scratch;
        products.resize(4 * pairs * columns / PANEL, Line::ZERO);
        zeros.resize(columns / PANEL, Line::ZERO);
        let (zeros, biases) = (Line::floats(zeros).as_ptr(), from.clone());
        let lefts = to.clone();
        let products = Line::floats_mut(products).as_mut_ptr();
        let at =
            |product: usize, pair: usize| products.wrapping_add((product * pairs + pair) * columns);
        let size = inputs.iter().sum::<usize>() * columns;
        let channels = inputs[0];
        for product in 0..4 {
            let Scratch { from, to, .. } = &mut *self.scratch;
            to.clear();
            to.extend((0..pairs).map(|pair| at(product, pair)));
            from.clear();
            // The second product goes into both sums: so does the bias.
            match product {
                1 => from.extend(&biases),
                _ => from.resize(pairs, zeros),
            }
            let weights = &weights.pairs(number)[product * size..][..size];
            self.multiply(sum, weights, panels.clone());
            for tap in &mut self.scratch.taps {
                *tap = tap.wrapping_add(channels);
            }
        }

        let len = panels.len() * PANEL;
        for (pair, left) in lefts.into_iter().enumerate() {
            for half in 0..sum.halves() {
                let first = (half * sum.panels() + panels.start) * PANEL;
                let left = left.wrapping_add(first);
                let right = left.wrapping_add(self.memory.images * columns);
                // SAFETY: the products were just made, here; these columns of the sums of the two
                // pixels are this thread's alone and do not overlap. The raster's level is one that
                // the machine has.
                unsafe {
                    let products = std::array::from_fn(|product| {
                        std::slice::from_raw_parts(at(product, pair).add(first), len)
                    });
                    (self.kernels.combine)(
                        products,
                        std::slice::from_raw_parts_mut(left, len),
                        std::slice::from_raw_parts_mut(right, len),
                    );
                }
            }
        }
    }

    /// Points `scratch` at what taps read for its pixels, whose columns have the scale
    /// `column_scale` if they are numbered by that of the map.
    fn point_at_taps(&mut self, taps: &[Tap], scale: usize, tap_scale: usize, row: usize) {
        let memory = self.memory;
        let Scratch {
            pixels,
            inputs,
            taps: pointers,
            ..
        } = &mut *self.scratch;
        inputs.clear();
        pointers.clear();
        for tap in taps {
            inputs.push(tap.channels());
            let ring = &self.model.program.rings[tap.ring];
            // A pair has half as many columns.
            let ring_scale = ring.scale + (tap_scale - scale);
            let y = ((row << scale) >> ring.scale) as isize + tap.dy;
            let base = memory.pixel(ring, y, tap.dx);
            let base = memory.floats.wrapping_add(base).cast_const();
            pointers.extend(pixels.iter().map(|&[x, image]| {
                let x = (x << scale) >> ring_scale;
                base.wrapping_add((x * memory.images + image) * ring.channels)
            }));
        }
    }

    /// Points `scratch` at the sums of its pixels, and at the biases that they begin with.
    fn point_at_sums(&mut self, number: usize) {
        let (memory, n) = (self.memory, self.memory.images);
        let sum = &self.model.program.sums[number];
        let columns = sum.columns();
        let bias = self.model.weights.bias(number, sum, 0).as_ptr();
        let Scratch {
            pixels, from, to, ..
        } = &mut *self.scratch;
        from.clear();
        to.clear();
        for &[x, image] in &*pixels {
            let at = sum.start * n + (x * n + image) * columns;
            to.push(memory.floats.wrapping_add(at));
            from.push(match sum.conditional {
                None => bias,
                Some(_) => {
                    let bias = sum.bias_start * n + image * columns;
                    memory.floats.wrapping_add(bias)
                }
            });
        }
    }

    /// Runs the tiles for what `scratch` points at, for some panels of each half.
    fn multiply(&self, sum: &Sum, weights: &[f32], panels: Range<usize>) {
        let Scratch {
            inputs,
            taps,
            from,
            to,
            ..
        } = &*self.scratch;
        let pixels = to.len();
        let stride = inputs.iter().sum::<usize>() * PANEL;
        let [most, tile] = self.kernels.shape(pixels);
        let (groups, tiles) = (panels.len().div_ceil(most), pixels.div_ceil(tile));
        for half in 0..sum.halves() {
            for group in 0..groups {
                let group = share(panels.len(), group, groups);
                let panel = half * sum.panels() + panels.start + group.start;
                let weights = &weights[panel * stride..][..group.len() * stride];
                for tile in 0..tiles {
                    let tile = share(pixels, tile, tiles);
                    // SAFETY: the raster's level is one that the machine has. The taps' rings have
                    // their pixels and channels in the group's memory, complete since the last
                    // barrier; the sums' columns of these panels are this thread's alone.
                    unsafe {
                        self.kernels.tile(group.len(), tile.len())(
                            inputs,
                            taps.as_ptr().wrapping_add(tile.start),
                            pixels,
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
        let start = |ring: usize| memory.pixel(&rings[ring], row as isize, 0);
        let (residual, value) = (start(sum.residual), sum.value.map(start));
        let value_channels = sum.value.map_or(0, |value| rings[value].channels);
        for &[x, image] in &self.scratch.pixels {
            let pixel = x * n + image;
            let sums = sum.start * n + pixel * sum.columns() + first;
            let at_value = pixel * value_channels + first;
            // SAFETY: these channels of the sum, of its value and of its activations are this
            // thread's alone, and those of the residual, a value of as many channels, were made by
            // this thread too. No two of the slices overlap, and the raster's level is one that the
            // machine has.
            unsafe {
                let a = memory.read(sums, len);
                let value = match value {
                    Some(value) => {
                        let value = memory.write(value + at_value, len);
                        if sum.gated {
                            let b = memory.read(sums + sum.panels() * PANEL, len);
                            let x = memory.read(residual + at_value, len);
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
                    let to = start(ring) + pixel * rings[ring].channels + first;
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

    /// Transforms the pairs of a complete row's activations, where sums want them.
    fn pair_activations(&self, sum: &Sum, row: usize) {
        let [index, of] = self.share;
        let panels = share(sum.panels(), index, of);
        let (memory, n) = (self.memory, self.memory.images);
        let rings = &self.model.program.rings;
        let first = panels.start * PANEL;
        let len = (panels.len() * PANEL).min(sum.channels.saturating_sub(first));
        for &(f, ring) in &sum.activations {
            let ring = &rings[ring];
            let Some(pairs) = ring.pairs.map(|pairs| &rings[pairs]) else {
                continue;
            };
            for half in 0..f.outputs(1) {
                let first = half * sum.channels + first;
                for x in (0..ring.width).step_by(2) {
                    let from = memory.pixel(ring, row as isize, x as isize - 1);
                    let to = memory.pixel(pairs, row as isize, x as isize / 2);
                    for &image in self.active {
                        // SAFETY: this thread made these channels of the row, and those of the
                        // pairs, which are elsewhere, are its alone. The raster's level is one that
                        // the machine has.
                        unsafe {
                            let x = std::array::from_fn(|i| {
                                let pixel = from + (i * n + image) * ring.channels;
                                memory.read(pixel + first, len)
                            });
                            let y = std::array::from_fn(|i| {
                                let pixel = to + image * pairs.channels;
                                memory.write(pixel + i * ring.channels + first, len)
                            });
                            (self.kernels.differences)(x, y);
                        }
                    }
                }
            }
        }
    }
}

/// Writes channels of a pixel, and the plane of ones behind them all; or zeros where it is outside.
fn write_pixel(pixel: &mut [f32], channels: Range<usize>, levels: Option<&[u8]>) {
    let Some(levels) = levels else {
        return pixel.fill(0.0);
    };
    for (value, level) in pixel[channels].iter_mut().zip(levels) {
        *value = from_level(*level);
    }
    if let Some(ones) = pixel.last_mut() {
        *ones = 1.0;
    }
}

/// Part `index` of `count` things shared out evenly.
fn share(count: usize, index: usize, parts: usize) -> Range<usize> {
    count * index / parts..count * (index + 1) / parts
}
