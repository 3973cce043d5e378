//! The program carried out by a GPU, whichever, for drawing images: what differs from one kind of GPU to
//! another is behind [`ProgramOnGpu`] and [`ImagesOnGpu`].
//!
//! Its numbers are those of the GPU's arithmetic, not the evaluator's own to the last bit: what is
//! compressed stays on the CPU.

use std::ops::Range;
use std::sync::Arc;

use super::program::{Phase, Program, Ring, Step, Sum, Tap, When};
use super::weights::PackedWeights;
use super::write_pixel;
use crate::config::{ModelConfig, halved};
use crate::engine::{EngineError, expect_parameters};
use crate::likelihood::EnergyDistance;
use crate::network::Layout;

/// A model's program, and its parameters as the program reads them.
#[derive(Debug)]
pub struct Prepared {
    /// The model's shape.
    pub config: ModelConfig,
    /// Without pairs.
    pub program: Program,
    /// Of the program's sums.
    pub weights: PackedWeights,
    head: Option<EnergyDistance>,
    /// Where the taps of every sum's phases begin among all, when a row begins and at the pixel.
    first_taps: Vec<Vec<[usize; 2]>>,
}

/// A step in numbers.
#[derive(Debug)]
pub struct Work<'a> {
    /// What is summed.
    pub sum: &'a Sum,
    /// Over what.
    pub taps: &'a [Tap],
    /// Columns of the sum's map.
    pub width: usize,
    /// The first column that is summed.
    pub first: usize,
    /// From one to the next; 0 where it is only the column of the pixel.
    pub step: usize,
    /// How many there are.
    pub count: usize,
    /// Whether it goes on with what was summed before, and not with the bias.
    pub begun: bool,
    /// Whether it is complete then.
    pub complete: bool,
}

impl Prepared {
    /// Prepares a model with `parameters`, in the [`Layout`]'s order.
    ///
    /// # Errors
    /// [`EngineError::Config`], [`EngineError::Parameters`], and [`EngineError::Memory`] where no machine
    /// could have as much.
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>]) -> Result<Prepared, EngineError> {
        config.validate()?;
        expect_parameters(&Layout::new(config), parameters)?;
        let program = Program::new(config, false);
        let program = program.ok_or(EngineError::Memory { images: 1, room: 0 })?;
        let mut taps = 0;
        let mut first = |len: usize| {
            taps += len;
            taps - len
        };
        let mut of_phase = |phase: &Phase| [phase.row.len(), phase.pixel.len()].map(&mut first);
        let sums = program.sums.iter();
        let first_taps = sums.map(|sum| sum.phases.iter().map(&mut of_phase).collect());
        let first_taps = first_taps.collect();
        Ok(Prepared {
            first_taps,
            config: config.clone(),
            weights: PackedWeights::pack(&program, parameters),
            program,
            head: EnergyDistance::of_parameters(config, parameters),
        })
    }

    /// The taps of all steps.
    pub fn taps(&self) -> impl Iterator<Item = &Tap> {
        let phases = self.program.sums.iter().flat_map(|sum| &sum.phases);
        phases.flat_map(|phase| phase.row.iter().chain(&phase.pixel))
    }

    /// Where the taps of a step begin among all.
    pub fn first_tap(&self, step: Step) -> usize {
        self.first_taps[step.sum][step.phase][step.when as usize]
    }

    /// What a step is.
    pub fn work(&self, Step { sum, phase, when }: Step) -> Work<'_> {
        let sum = &self.program.sums[sum];
        let width = halved(self.config.width, sum.scale);
        let first = phase % sum.step;
        let (first, step, count) = match when {
            When::Row => (
                first,
                sum.step,
                width.saturating_sub(first).div_ceil(sum.step),
            ),
            When::Pixel => (0, 0, 1),
        };
        let phase = &sum.phases[phase];
        Work {
            sum,
            taps: phase.taps(when),
            width,
            first,
            step,
            count,
            begun: when == When::Pixel && !phase.row.is_empty() || sum.attention.is_some(),
            complete: sum.by_row || when == When::Pixel,
        }
    }
}

/// A GPU with a model's program and weights.
pub trait ProgramOnGpu: Send + Sync {
    /// Images side by side that there is memory for.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn room(&self) -> Result<usize, EngineError>;

    /// Takes memory for images, one for each of `labels`, their classes: that of each image as the program
    /// says times the number of images, with images behind pixels and before channels.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn begin(&self, labels: &[u32]) -> Result<Box<dyn ImagesOnGpu>, EngineError>;
}

/// Images side by side in the memory of a GPU.
pub trait ImagesOnGpu: Send {
    /// Writes values from a place in the memory on.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn write(&mut self, place: usize, values: &[f32]) -> Result<(), EngineError>;

    /// Reads values from a place on.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn read(&mut self, place: usize, values: &mut [f32]) -> Result<(), EngineError>;

    /// Takes the program's [steps](Program::steps) for a row and column, once so many channels are known.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    fn take_steps(&mut self, pixel: [usize; 2], known: usize) -> Result<(), EngineError>;
}

/// Pixels whose row, column and known channels have this in common have the same steps.
pub fn kind_of_steps([y, x]: [usize; 2], known: usize) -> [usize; 4] {
    [y % 4, x % 4, usize::from(x == 0), known]
}

/// A model ready to be evaluated pixel by pixel on a GPU. Clones share its weights.
#[derive(Clone)]
pub struct GpuEvaluator {
    prepared: Arc<Prepared>,
    gpu: Arc<dyn ProgramOnGpu>,
}

impl GpuEvaluator {
    /// Of a model and the GPU that has it.
    pub fn new(prepared: Arc<Prepared>, gpu: Arc<dyn ProgramOnGpu>) -> GpuEvaluator {
        GpuEvaluator { prepared, gpu }
    }

    /// What makes samples of the output, of a model that is trained by the energy distance.
    pub fn head(&self) -> Option<&EnergyDistance> {
        self.prepared.head.as_ref()
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.prepared.config
    }

    /// Images side by side that there is memory for.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn room(&self) -> Result<usize, EngineError> {
        self.gpu.room()
    }

    /// Begins images, one for each of `labels`, their classes; any value for an unconditional model.
    ///
    /// # Errors
    /// [`EngineError::Class`], [`EngineError::Memory`] and [`EngineError::Device`].
    ///
    /// # Panics
    /// If there are none.
    pub fn begin(&self, labels: &[u32]) -> Result<GpuRaster, EngineError> {
        assert!(!labels.is_empty(), "one image at least");
        let config = self.config();
        let nr_classes = config.nr_classes;
        let wrong = |&class: &u32| nr_classes > 0 && class as usize >= nr_classes;
        if let Some(class) = labels.iter().copied().find(|class| wrong(class)) {
            return Err(EngineError::Class { class, nr_classes });
        }
        let (images, room) = (labels.len(), self.room()?);
        if images > room {
            return Err(EngineError::Memory { images, room });
        }
        Ok(GpuRaster {
            memory: self.gpu.begin(labels)?,
            images,
            done: 0,
            known: 0,
            pixel: vec![0.0; images * self.prepared.program.rings[0].channels],
            padded: Vec::new(),
            logits: vec![0.0; images * config.output_channels()],
            computed: false,
            prepared: Arc::clone(&self.prepared),
        })
    }
}

/// Images on their way on a GPU, all at the same pixel, in raster order.
pub struct GpuRaster {
    prepared: Arc<Prepared>,
    memory: Box<dyn ImagesOnGpu>,
    images: usize,
    /// Pixels of each image that are known.
    done: usize,
    /// Channels of the next one that are.
    known: usize,
    /// What the pixel whose turn it is has in ring 0, as far as it is known.
    pixel: Vec<f32>,
    /// Logits as they lie in their ring.
    padded: Vec<f32>,
    logits: Vec<f32>,
    /// Whether `logits` are those whose turn it is.
    computed: bool,
}

impl GpuRaster {
    /// Row and column of the pixel whose turn it is; none when the images are complete.
    pub fn position(&self) -> Option<[usize; 2]> {
        let ModelConfig { height, width, .. } = self.prepared.config;
        (self.done < height * width).then(|| [self.done / width, self.done % width])
    }

    /// The channels of that pixel whose turn it is: all of them, or one where they are predicted one
    /// after another.
    pub fn channels(&self) -> Range<usize> {
        self.known..self.known + self.prepared.config.channels_together()
    }

    /// Images side by side.
    pub fn images(&self) -> usize {
        self.images
    }

    /// The parameters of the pixel's mixture, or whatever the model's output is \[images,
    /// [`ModelConfig::output_channels`]\], given all
    /// pixels before it: those [of the channels](ModelConfig::outputs_of) whose turn it is, given the channels
    /// before, and of those. Of complete images they are those of the last pixel.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn logits(&mut self) -> Result<&[f32], EngineError> {
        if let (false, Some(pixel)) = (self.computed, self.position()) {
            self.compute(pixel)?;
            self.computed = true;
        }
        Ok(&self.logits)
    }

    fn compute(&mut self, pixel: [usize; 2]) -> Result<(), EngineError> {
        self.memory.take_steps(pixel, self.known)?;
        let Prepared {
            config, program, ..
        } = &*self.prepared;
        let here = self.channels();
        let ring = &program.rings[program.logits[here.start / here.len()]];
        self.padded.resize(self.images * ring.channels, 0.0);
        let place = place(ring, pixel) * self.images;
        self.memory.read(place, &mut self.padded)?;
        let own = config.outputs_of(here);
        let images = self.padded.chunks_exact(ring.channels);
        let logits = self.logits.chunks_exact_mut(config.output_channels());
        for (logits, padded) in logits.zip(images) {
            logits[own.clone()].copy_from_slice(&padded[..own.len()]);
        }
        Ok(())
    }

    /// Gives a model the coarser maps that it wants, before the first pixel: their codes are looked at in
    /// `images` \[images, [`ModelConfig::bytes_per_image`]\], and nothing else.
    ///
    /// # Errors
    /// [`EngineError::Code`] and [`EngineError::Device`].
    ///
    /// # Panics
    /// If there are not as many images, or pixels are known already.
    pub fn give_coarse(&mut self, images: &[u8]) -> Result<(), EngineError> {
        let Prepared {
            config,
            program,
            weights,
            ..
        } = &*self.prepared;
        let Some(ring) = program.coarse.map(|ring| &program.rings[ring]) else {
            return Ok(());
        };
        let size = config.bytes_per_image();
        assert_eq!(images.len(), self.images * size, "a map for each image");
        assert!(self.done == 0 && !self.computed, "before the first pixel");
        let row = (ring.width + 2) * self.images * ring.channels;
        for y in 0..config.height {
            let mut values = vec![0.0; row];
            for (image, pixels) in images.chunks_exact(size).enumerate() {
                let here = size / config.height;
                let pixels = &pixels[y * here..][..here];
                for (x, embedded) in weights.embedded_coarse(config, pixels).enumerate() {
                    let codes = config.nr_coarse_codes;
                    let embedded = embedded.map_err(|code| EngineError::Code { code, codes })?;
                    let at = ((x + 1) * self.images + image) * ring.channels;
                    values[at..at + embedded.len()].copy_from_slice(embedded);
                    values[at + embedded.len()] = 1.0;
                }
            }
            let place = ring.start * self.images + y * row;
            self.memory.write(place, &values)?;
        }
        Ok(())
    }

    /// Says what the pixel's [`GpuRaster::channels`] are: `levels` \[images, channels\], or what its code
    /// is, two bytes for each image; and turns to the next.
    ///
    /// # Errors
    /// [`EngineError::Code`] and [`EngineError::Device`].
    ///
    /// # Panics
    /// If the number of levels is another, or the images are complete.
    pub fn push(&mut self, levels: &[u8]) -> Result<(), EngineError> {
        let Some(pixel) = self.position() else {
            panic!("the images are complete");
        };
        // Also where nobody asked for the mixture, later pixels need what it is computed from.
        self.logits()?;
        let here = self.channels();
        let Prepared {
            config,
            program,
            weights,
            ..
        } = &*self.prepared;
        let bytes = config.bytes_of(here.clone()).len();
        assert_eq!(levels.len(), self.images * bytes, "levels of each image");
        let (input, codes) = (&program.rings[0], config.nr_codes);
        let ones = input.channels - 1;
        let pixels = self.pixel.chunks_exact_mut(input.channels);
        for (values, levels) in pixels.zip(levels.chunks_exact(bytes)) {
            if codes == 0 {
                write_pixel(values, here.clone(), Some(levels));
                continue;
            }
            let code = ModelConfig::code(levels, 0);
            let row = weights
                .embedding(0)
                .get(code * ones..(code + 1) * ones)
                .ok_or(EngineError::Code { code, codes })?;
            values[..ones].copy_from_slice(row);
            values[ones] = 1.0;
        }
        let place = place(input, pixel) * self.images;
        self.memory.write(place, &self.pixel)?;
        self.known = here.end % config.channels;
        if self.known == 0 {
            self.done += 1;
            self.pixel.fill(0.0);
        }
        self.computed = false;
        Ok(())
    }
}

/// Where a pixel of a ring at full resolution is, in the memory of one image.
fn place(ring: &Ring, [y, x]: [usize; 2]) -> usize {
    ring.start + (y % ring.rows * (ring.width + 2) + x + 1) * ring.channels
}
