//! The network pixel by pixel on a GPU, for drawing images: the program of pixelcnn-core's
//! incremental evaluator, carried out by kernels that several images share.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::engine::EngineError;
use pixelcnn_core::incremental::gpu::{
    GpuEvaluator, ImagesOnGpu, Prepared, ProgramOnGpu, kind_of_steps,
};
use pixelcnn_core::incremental::program::{Program, Ring, Step, Tap};

use crate::driver::Driver;
use crate::engine::VALUE;
use crate::gpu::{Gpu, Graph, Memory, usable};
use crate::kernels::{self, Address};
use crate::{CudaError, Precision};

/// Takes a model's `parameters`, in the layout's order, to a device by its number, to draw images
/// there. Compiled kernels are kept in the folder `cache`.
///
/// # Errors
/// [`EngineError::Config`], [`EngineError::Parameters`], and [`EngineError::Device`] where CUDA is
/// missing or refuses.
pub fn evaluator(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    device: usize,
    cache: Option<&Path>,
) -> Result<GpuEvaluator, EngineError> {
    let prepared = Prepared::new(config, parameters)?;
    let driver = Driver::open(device, Precision::F32, cache)?;
    evaluator_on(Arc::new(driver), prepared)
}

/// On whatever is a GPU.
pub(crate) fn evaluator_on(
    gpu: Arc<dyn Gpu>,
    prepared: Prepared,
) -> Result<GpuEvaluator, EngineError> {
    let program = &prepared.program;
    let packed = prepared.weights.values();
    let weights = Memory::zeroed(&gpu, size_of_val(packed))?;
    weights.write(0, packed)?;
    let all: Vec<kernels::Tap> = prepared.taps().map(|tap| described(program, tap)).collect();
    let taps = Memory::zeroed(&gpu, size_of_val(&all[..]))?;
    taps.write(0, &all)?;
    let prepared = Arc::new(prepared);
    let model = Model {
        gpu,
        prepared: Arc::clone(&prepared),
        weights,
        taps,
    };
    Ok(GpuEvaluator::new(
        prepared,
        Arc::new(OnCuda(Arc::new(model))),
    ))
}

struct OnCuda(Arc<Model>);

struct Model {
    gpu: Arc<dyn Gpu>,
    prepared: Arc<Prepared>,
    /// The packed weights.
    weights: Memory,
    /// The taps of all steps.
    taps: Memory,
}

impl ProgramOnGpu for OnCuda {
    fn room(&self) -> Result<usize, EngineError> {
        let available = usable(self.0.gpu.available()?);
        let image = self.0.prepared.program.floats * VALUE + size_of::<u32>();
        Ok(available / image)
    }

    fn begin(&self, labels: &[u32]) -> Result<Box<dyn ImagesOnGpu>, EngineError> {
        let gpu = &self.0.gpu;
        let floats = self.0.prepared.program.floats;
        let held = Memory::zeroed(gpu, size_of_val(labels))?;
        held.write(0, labels)?;
        Ok(Box::new(Images {
            memory: Memory::zeroed(gpu, labels.len() * floats * VALUE)?,
            labels: held,
            at: Memory::zeroed(gpu, 2 * size_of::<u32>())?,
            images: labels.len(),
            graphs: HashMap::new(),
            model: Arc::clone(&self.0),
        }))
    }
}

struct Images {
    model: Arc<Model>,
    memory: Memory,
    labels: Memory,
    /// Row and column of the pixel.
    at: Memory,
    images: usize,
    /// The kernels of pixels that have the same steps.
    graphs: HashMap<[usize; 4], Box<dyn Graph>>,
}

impl ImagesOnGpu for Images {
    fn write(&mut self, place: usize, values: &[f32]) -> Result<(), EngineError> {
        Ok(self.memory.write(place * VALUE, values)?)
    }

    fn read(&mut self, place: usize, values: &mut [f32]) -> Result<(), EngineError> {
        Ok(self.memory.read(place * VALUE, values)?)
    }

    fn take_steps(&mut self, [y, x]: [usize; 2], known: usize) -> Result<(), EngineError> {
        self.at.write(0, &[y as u32, x as u32])?;
        let kind = kind_of_steps([y, x], known);
        if !self.graphs.contains_key(&kind) {
            let recorded = self.model.gpu.record(&mut || self.steps([y, x], known))?;
            if let Some(graph) = recorded {
                self.graphs.insert(kind, graph);
            }
        }
        match self.graphs.get(&kind) {
            // SAFETY: all memory that it was recorded with is held here.
            Some(graph) => unsafe { graph.launch()? },
            None => self.steps([y, x], known)?,
        }
        Ok(())
    }
}

impl Images {
    /// Asks for all that a pixel's mixture needs beyond what is there.
    fn steps(&self, pixel: [usize; 2], known: usize) -> Result<(), CudaError> {
        for step in self.model.prepared.program.steps(pixel, known) {
            self.step(step)?;
        }
        Ok(())
    }

    fn step(&self, step: Step) -> Result<(), CudaError> {
        let (model, gpu) = (&*self.model, &self.model.gpu);
        let Prepared {
            program: Program { rings, .. },
            weights,
            ..
        } = &*model.prepared;
        let work = model.prepared.work(step);
        if work.count == 0 {
            return Ok(());
        }
        let Step {
            sum: number,
            phase,
            when,
        } = step;
        let sum = work.sum;
        let none = kernels::Ring::default();
        let mut bent = [none; 2];
        let mut f = [0; 2];
        for (i, &(function, ring)) in sum.activations.iter().enumerate() {
            bent[i] = described_ring(&rings[ring]);
            f[i] = kernels::number(function);
        }
        if let Some(attention) = sum.attention {
            // SAFETY: as below.
            unsafe {
                kernels::see(
                    gpu.branch(0),
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
        let start = model.prepared.first_tap(step);
        let conditional = sum.conditional.is_some();
        let arguments = kernels::Sum {
            start: sum.start as i64,
            bias: weights.bias_at(number, sum, 0) as i64,
            class_bias: if conditional { sum.columns() as i32 } else { 0 },
            scale: sum.scale as i32,
            width: work.width as i32,
            channels: sum.channels as i32,
            panels: sum.panels() as i32,
            gated: sum.gated.into(),
            first: work.first as i32,
            step: work.step as i32,
            count: work.count as i32,
            begun: work.begun.into(),
            complete: work.complete.into(),
            weights: weights.taps_at(number, phase, when) as i64,
            taps: work.taps.len() as i32,
            inputs: work.taps.iter().map(Tap::channels).sum::<usize>() as i32,
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
                gpu.branch(0),
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
