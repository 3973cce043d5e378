//! The network pixel by pixel on a GPU, for drawing images: the program of pixelcnn-core's
//! incremental evaluator, carried out by kernels that several images share.
//!
//! Its numbers are those of the GPU's arithmetic, not the evaluator's own to the last bit: what is
//! compressed stays on the CPU.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::config::halved;
use pixelcnn_core::engine::{EngineError, expect_parameters};
use pixelcnn_core::incremental::program::{Program, Ring, Step, Tap, When};
use pixelcnn_core::incremental::weights::PackedWeights;
use pixelcnn_core::likelihood::EnergyDistance;
use pixelcnn_core::network::Layout;

use crate::driver::Driver;
use crate::engine::VALUE;
use crate::gpu::{Gpu, Graph, Memory, usable};
use crate::kernels::{self, Address};
use crate::{CudaError, Precision};

/// A model ready to be evaluated pixel by pixel on a GPU. Clones share its weights.
#[derive(Clone)]
pub struct CudaEvaluator {
    gpu: Arc<dyn Gpu>,
    model: Arc<Model>,
}

struct Model {
    config: ModelConfig,
    program: Program,
    packed: PackedWeights,
    /// The packed weights.
    weights: Memory,
    /// What is made of each code; nothing for images.
    embedding: Memory,
    /// The taps of every sum's phases, when the row begins and at the pixel, one after the other.
    taps: Memory,
    /// Where those of a sum's phase begin.
    starts: HashMap<(usize, usize, bool), usize>,
    head: Option<EnergyDistance>,
}

impl CudaEvaluator {
    /// Takes `parameters`, in the [`Layout`]'s order, to a device by its number. Compiled kernels
    /// are kept in the folder `cache`.
    ///
    /// # Errors
    /// [`EngineError::Config`], [`EngineError::Parameters`], and [`EngineError::Device`] where CUDA is
    /// missing or refuses.
    pub fn new(
        config: &ModelConfig,
        parameters: &[Vec<f32>],
        device: usize,
        cache: Option<&Path>,
    ) -> Result<CudaEvaluator, EngineError> {
        config.validate()?;
        let driver = Driver::open(device, Precision::F32, cache)?;
        CudaEvaluator::on(Arc::new(driver), config, parameters)
    }

    /// On whatever is a GPU.
    pub(crate) fn on(
        gpu: Arc<dyn Gpu>,
        config: &ModelConfig,
        parameters: &[Vec<f32>],
    ) -> Result<CudaEvaluator, EngineError> {
        config.validate()?;
        expect_parameters(&Layout::new(config), parameters)?;
        let program = Program::new(config, false);
        let program = program.ok_or(EngineError::Memory { images: 1, room: 0 })?;
        let packed = PackedWeights::pack(&program, parameters);
        let weights = Memory::zeroed(&gpu, size_of_val(packed.values()))?;
        weights.write(0, packed.values())?;
        let embedding = Memory::zeroed(&gpu, size_of_val(packed.embedding(0)))?;
        embedding.write(0, packed.embedding(0))?;
        let (mut all, mut starts) = (Vec::new(), HashMap::new());
        for (number, sum) in program.sums.iter().enumerate() {
            for (phase, taps) in sum.phases.iter().enumerate() {
                for when in [When::Row, When::Pixel] {
                    starts.insert((number, phase, when == When::Row), all.len());
                    all.extend(taps.taps(when).iter().map(|tap| described(&program, tap)));
                }
            }
        }
        let taps = Memory::zeroed(&gpu, size_of_val(&all[..]))?;
        taps.write(0, &all)?;
        Ok(CudaEvaluator {
            gpu,
            model: Arc::new(Model {
                config: config.clone(),
                program,
                packed,
                weights,
                embedding,
                taps,
                starts,
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

    /// Images side by side that there is memory for.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn room(&self) -> Result<usize, EngineError> {
        let available = usable(self.gpu.available()?);
        let config = &self.model.config;
        let small = config.bytes_per_pixel() + size_of::<u32>();
        Ok(available / (self.model.program.floats * VALUE + small))
    }

    /// Begins images, one for each of `labels`, their classes; any value for an unconditional model.
    ///
    /// # Errors
    /// [`EngineError::Class`], [`EngineError::Memory`] and [`EngineError::Device`].
    pub fn begin(&self, labels: &[u32]) -> Result<CudaRaster, EngineError> {
        let Model {
            config, program, ..
        } = &*self.model;
        let nr_classes = config.nr_classes;
        let wrong = |&class: &u32| nr_classes > 0 && class as usize >= nr_classes;
        if let Some(class) = labels.iter().copied().find(|class| wrong(class)) {
            return Err(EngineError::Class { class, nr_classes });
        }
        let images = labels.len();
        let room = self.room()?;
        if images > room {
            return Err(EngineError::Memory { images, room });
        }
        let held = Memory::zeroed(&self.gpu, size_of_val(labels))?;
        held.write(0, labels)?;
        Ok(CudaRaster {
            memory: Memory::zeroed(&self.gpu, images * program.floats * VALUE)?,
            labels: held,
            levels: Memory::zeroed(&self.gpu, images * config.bytes_per_pixel())?,
            at: Memory::zeroed(&self.gpu, 2 * size_of::<u32>())?,
            gpu: Arc::clone(&self.gpu),
            model: Arc::clone(&self.model),
            images,
            done: 0,
            known: 0,
            padded: Vec::new(),
            logits: vec![0.0; images * config.output_channels()],
            computed: false,
            graphs: HashMap::new(),
        })
    }
}

/// Images on their way on a GPU, all at the same pixel, in raster order.
pub struct CudaRaster {
    gpu: Arc<dyn Gpu>,
    model: Arc<Model>,
    memory: Memory,
    labels: Memory,
    levels: Memory,
    /// Row and column of the pixel.
    at: Memory,
    images: usize,
    /// Pixels of each image that are known.
    done: usize,
    /// Channels of the next one that are.
    known: usize,
    /// Logits as they lie in their ring.
    padded: Vec<f32>,
    logits: Vec<f32>,
    /// Whether `logits` are those whose turn it is.
    computed: bool,
    /// The kernels of pixels that have the same steps: by the remainders of row and column, whether a
    /// row begins, and the channels that are known.
    graphs: HashMap<[usize; 4], Box<dyn Graph>>,
}

impl CudaRaster {
    /// Row and column of the pixel whose turn it is; none when the images are complete.
    pub fn position(&self) -> Option<[usize; 2]> {
        let ModelConfig { height, width, .. } = self.model.config;
        (self.done < height * width).then(|| [self.done / width, self.done % width])
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

    /// The parameters of the pixel's mixture, or whatever the model's output is \[images, [`ModelConfig::output_channels`]\], given all
    /// pixels before it: those [of the channels](ModelConfig::outputs_of) whose turn it is, given the channels
    /// before, and of those. Of complete images they are those of the last pixel.
    ///
    /// # Errors
    /// [`EngineError::Device`].
    pub fn logits(&mut self) -> Result<&[f32], EngineError> {
        if let (false, Some(pixel), true) = (self.computed, self.position(), self.images > 0) {
            self.compute(pixel)?;
            self.computed = true;
        }
        Ok(&self.logits)
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
        let Model {
            config,
            program,
            packed,
            ..
        } = &*self.model;
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
                for (x, embedded) in packed.embedded_coarse(config, pixels).enumerate() {
                    let codes = config.nr_coarse_codes;
                    let embedded = embedded.map_err(|code| EngineError::Code { code, codes })?;
                    let at = ((x + 1) * self.images + image) * ring.channels;
                    values[at..at + embedded.len()].copy_from_slice(embedded);
                    values[at + embedded.len()] = 1.0;
                }
            }
            let start = ring.start * self.images + y * row;
            self.memory.write(start * VALUE, &values)?;
        }
        Ok(())
    }

    /// Says what the pixel's [`CudaRaster::channels`] are: `levels` \[images, channels\], or what its code
    /// is, two bytes for each image; and turns to the next.
    ///
    /// # Errors
    /// [`EngineError::Code`] and [`EngineError::Device`].
    ///
    /// # Panics
    /// If the number of levels is another, or the images are complete.
    pub fn push(&mut self, levels: &[u8]) -> Result<(), EngineError> {
        assert!(self.position().is_some(), "the images are not complete");
        let config = &self.model.config;
        let (here, channels, codes) = (self.channels(), config.channels, config.nr_codes);
        let bytes = config.bytes_of(here.clone()).len();
        assert_eq!(levels.len(), self.images * bytes, "levels of each image");
        let found = levels.chunks_exact(bytes).filter(|_| codes > 0);
        let mut found = found.map(|code| ModelConfig::code(code, 0));
        if let Some(code) = found.find(|code| *code >= codes) {
            return Err(EngineError::Code { code, codes });
        }
        // Also where nobody asked for the mixture, later pixels need what it is computed from.
        self.logits()?;
        if self.images > 0 {
            self.levels.write(0, levels)?;
            let ring = described_ring(&self.model.program.rings[0]);
            let (memory, levels, at) = (
                self.memory.address(),
                self.levels.address(),
                self.at.address(),
            );
            let embedding = self.model.embedding.address();
            let (branch, images) = (self.gpu.branch(0), self.images as i32);
            // SAFETY: the memory has the ring for so many images, and there is a level for each
            // of the channels that are due, which the ring has, or a code, of which the table has a row.
            unsafe {
                if codes > 0 {
                    kernels::place_codes(branch, memory, levels, embedding, at, ring, images)?;
                } else {
                    kernels::place_levels(
                        branch,
                        memory,
                        levels,
                        at,
                        ring,
                        images,
                        here.start as i32,
                        here.len() as i32,
                    )?;
                }
            }
        }
        self.known = here.end % channels;
        self.done += usize::from(self.known == 0);
        self.computed = false;
        Ok(())
    }

    fn compute(&mut self, [y, x]: [usize; 2]) -> Result<(), EngineError> {
        self.at.write(0, &[y as u32, x as u32])?;
        let key = [y % 4, x % 4, usize::from(x == 0), self.known];
        if !self.graphs.contains_key(&key) {
            let recorded = self.gpu.record(&mut || self.steps([y, x]))?;
            if let Some(graph) = recorded {
                self.graphs.insert(key, graph);
            }
        }
        match self.graphs.get(&key) {
            // SAFETY: all memory that it was recorded with is held here.
            Some(graph) => unsafe { graph.launch()? },
            None => self.steps([y, x])?,
        }
        let Model {
            config, program, ..
        } = &*self.model;
        let here = self.channels();
        let ring = &program.rings[program.logits[here.start / here.len()]];
        let start = ring.start + (y % ring.rows * (ring.width + 2) + x + 1) * ring.channels;
        self.padded.resize(self.images * ring.channels, 0.0);
        self.memory
            .read(start * self.images * VALUE, &mut self.padded)?;
        let own = config.outputs_of(here);
        let images = self.padded.chunks_exact(ring.channels);
        let logits = self.logits.chunks_exact_mut(config.output_channels());
        for (logits, padded) in logits.zip(images) {
            logits[own.clone()].copy_from_slice(&padded[..own.len()]);
        }
        Ok(())
    }

    /// Asks for all that a pixel's mixture needs beyond what is there.
    fn steps(&self, pixel: [usize; 2]) -> Result<(), CudaError> {
        let model = &*self.model;
        for step in model.program.steps(pixel, self.known) {
            self.step(step)?;
        }
        Ok(())
    }

    fn step(
        &self,
        Step {
            sum: number,
            phase,
            when,
        }: Step,
    ) -> Result<(), CudaError> {
        let model = &*self.model;
        let Program { sums, rings, .. } = &model.program;
        let sum = &sums[number];
        let taps = sum.phases[phase].taps(when);
        let width = halved(model.config.width, sum.scale);
        let (first, step, count) = match when {
            When::Row => {
                let first = phase % sum.step;
                let count = width.saturating_sub(first).div_ceil(sum.step);
                (first, sum.step, count)
            }
            When::Pixel => (0, 0, 1),
        };
        if count == 0 {
            return Ok(());
        }
        let none = kernels::Ring::default();
        let mut bent = [none; 2];
        let mut f = [0; 2];
        for (i, &(function, ring)) in sum.activations.iter().enumerate() {
            bent[i] = described_ring(&rings[ring]);
            f[i] = kernels::number(function);
        }
        let begun = when == When::Pixel && !sum.phases[phase].row.is_empty();
        let begun = begun || sum.attention.is_some();
        if let Some(attention) = sum.attention {
            // SAFETY: as below.
            unsafe {
                kernels::see(
                    self.gpu.branch(0),
                    self.memory.address(),
                    self.at.address(),
                    sum.start as i64,
                    sum.scale as i32,
                    sum.columns() as i32,
                    sum.channels as i32,
                    attention.heads as i32,
                    described_ring(&rings[attention.queries]),
                    described_ring(&rings[attention.keys_values]),
                    self.images as i32,
                )?;
            }
        }
        let start = model.starts[&(number, phase, when == When::Row)];
        let conditional = sum.conditional.is_some();
        let arguments = kernels::Sum {
            start: sum.start as i64,
            bias: model.packed.bias_at(number, sum, 0) as i64,
            class_bias: if conditional { sum.columns() as i32 } else { 0 },
            scale: sum.scale as i32,
            width: width as i32,
            channels: sum.channels as i32,
            panels: sum.panels() as i32,
            gated: sum.gated.into(),
            first: first as i32,
            step: step as i32,
            count: count as i32,
            begun: begun.into(),
            complete: (sum.by_row || when == When::Pixel).into(),
            weights: model.packed.taps_at(number, phase, when) as i64,
            taps: taps.len() as i32,
            inputs: taps.iter().map(Tap::channels).sum::<usize>() as i32,
            residual: if sum.gated {
                described_ring(&rings[sum.residual])
            } else {
                none
            },
            value: sum
                .value
                .map_or(none, |value| described_ring(&rings[value])),
            bent,
            f,
        };
        let taps = model.taps.address() + (start * size_of::<kernels::Tap>()) as Address;
        let labels = if conditional {
            self.labels.address()
        } else {
            0
        };
        // SAFETY: the program's sums and rings lie in the memory of so many images, and its weights
        // are packed as the sum says.
        unsafe {
            kernels::sum_taps(
                self.gpu.branch(0),
                self.memory.address(),
                model.weights.address(),
                taps,
                labels,
                self.at.address(),
                arguments,
                self.images as i32,
            )
        }
    }
}

fn described(program: &Program, tap: &Tap) -> kernels::Tap {
    kernels::Tap {
        ring: described_ring(&program.rings[tap.ring]),
        dy: tap.dy as i32,
        dx: tap.dx as i32,
        channels: tap.channels() as i32,
        unused: 0,
    }
}

fn described_ring(ring: &Ring) -> kernels::Ring {
    kernels::Ring {
        start: ring.start as i64,
        scale: ring.scale as i32,
        channels: ring.channels as i32,
        rows: ring.rows as i32,
        width: ring.width as i32,
    }
}
