//! The network pixel by pixel, for drawing images: the program of pixelcnn-core's incremental evaluator,
//! carried out by kernels that several images share.

use std::collections::HashMap;
use std::sync::Arc;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::engine::EngineError;
use pixelcnn_core::incremental::gpu::{
    GpuEvaluator, ImagesOnGpu, Prepared, ProgramOnGpu, kind_of_steps,
};
use pixelcnn_core::incremental::program::{Sum, Tap};

use crate::gpu::{Array, Arrays, Gpu, List, Ready};
use crate::kernels::{self, TapsOf};

/// Takes a model's `parameters`, in the layout's order, to an adapter by its number, to draw images there.
///
/// # Errors
/// [`EngineError::Config`], [`EngineError::Parameters`], and [`EngineError::Device`] where the adapter is
/// missing or refuses.
pub fn evaluator(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    adapter: usize,
) -> Result<GpuEvaluator, EngineError> {
    evaluator_on(adapter, Prepared::new(config, parameters)?)
}

/// Of a model that is prepared.
pub(crate) fn evaluator_on(
    adapter: usize,
    prepared: Prepared,
) -> Result<GpuEvaluator, EngineError> {
    let gpu = Gpu::open(adapter)?;
    let program = &prepared.program;
    let values = prepared.weights.values();
    let sums = program.sums.iter().enumerate();
    let begins = sums.map(|(number, sum)| prepared.weights.bias_at(number, sum, 0));
    let begins: Vec<usize> = begins.chain([values.len()]).collect();
    let own = begins.windows(2).map(|ends| ends[1] - ends[0]);
    let weights = gpu.arrays(own)?;
    for (array, ends) in weights.each.iter().zip(begins.windows(2)) {
        gpu.write(array, &values[ends[0]..ends[1]]);
    }
    let rings = program
        .rings
        .iter()
        .flat_map(|ring| [ring.start, ring.scale, ring.channels, ring.rows, ring.width]);
    let rings: Vec<u32> = rings.map(|number| number as u32).collect();
    let taps: Vec<u32> = prepared.taps().flat_map(described).collect();
    let numbers = gpu.arrays([rings.len(), taps.len()])?;
    gpu.write(&numbers.each[0], &rings);
    gpu.write(&numbers.each[1], &taps);
    let prepared = Arc::new(prepared);
    let model = Model {
        gpu,
        prepared: Arc::clone(&prepared),
        weights,
        numbers,
    };
    Ok(GpuEvaluator::new(
        prepared,
        Arc::new(OnWgpu(Arc::new(model))),
    ))
}

/// Numbers of a tap.
const TAP: usize = 4;

fn described(tap: &Tap) -> [u32; TAP] {
    [
        tap.ring as u32,
        tap.dy as i32 as u32,
        tap.dx as i32 as u32,
        tap.channels() as u32,
    ]
}

struct OnWgpu(Arc<Model>);

struct Model {
    gpu: Gpu,
    prepared: Arc<Prepared>,
    /// Of each sum, biases first.
    weights: Arrays,
    /// The rings, and the taps of all steps.
    numbers: Arrays,
}

impl ProgramOnGpu for OnWgpu {
    /// As many as one buffer has: what memory there is, the adapter does not tell.
    fn room(&self) -> Result<usize, EngineError> {
        Ok(self.0.gpu.largest / (4 * self.0.prepared.program.floats))
    }

    fn begin(&self, labels: &[u32]) -> Result<Box<dyn ImagesOnGpu>, EngineError> {
        let Model { gpu, prepared, .. } = &*self.0;
        let held = gpu.array(labels.len())?;
        gpu.write(&held, labels);
        Ok(Box::new(Images {
            memory: gpu.array(labels.len() * prepared.program.floats)?,
            labels: held,
            due: gpu.array(2)?,
            images: labels.len(),
            lists: HashMap::new(),
            model: Arc::clone(&self.0),
        }))
    }
}

struct Images {
    model: Arc<Model>,
    memory: Array,
    labels: Array,
    /// Row and column of the pixel.
    due: Array,
    images: usize,
    /// The kernels of pixels that have the same steps.
    lists: HashMap<[usize; 4], Ready>,
}

impl ImagesOnGpu for Images {
    fn write(&mut self, place: usize, values: &[f32]) -> Result<(), EngineError> {
        let array = self.memory.part(place, values.len());
        self.model.gpu.write(&array, values);
        Ok(())
    }

    fn read(&mut self, place: usize, values: &mut [f32]) -> Result<(), EngineError> {
        let array = self.memory.part(place, values.len());
        values.copy_from_slice(&self.model.gpu.read(&array, values.len())?);
        Ok(())
    }

    fn take_steps(&mut self, pixel: [usize; 2], known: usize) -> Result<(), EngineError> {
        let gpu = &self.model.gpu;
        gpu.write(&self.due, &pixel.map(|n| n as u32));
        let kind = kind_of_steps(pixel, known);
        if !self.lists.contains_key(&kind) {
            let list = self.steps(pixel, known);
            self.lists.insert(kind, gpu.ready(&list));
        }
        gpu.run(&self.lists[&kind]);
        Ok(())
    }
}

impl Images {
    /// The kernels for all that a pixel's mixture needs beyond what is there.
    fn steps(&self, pixel: [usize; 2], known: usize) -> List {
        let mut list = List::default();
        let Model {
            prepared,
            weights,
            numbers,
            ..
        } = &*self.model;
        let [rings, taps] = [0, 1].map(|number| &numbers.each[number]);
        for step in prepared.program.steps(pixel, known) {
            let work = prepared.work(step);
            let sum = work.sum;
            if let Some(attention) = sum.attention {
                kernels::see(
                    &mut list,
                    &self.memory,
                    rings,
                    &self.due,
                    self.images * attention.heads,
                    self.images,
                    sum.start,
                    sum.scale,
                    sum.columns(),
                    sum.channels,
                    attention.heads,
                    attention.queries,
                    attention.keys_values,
                );
            }
            let first = prepared.first_tap(step);
            let begin = prepared.weights.bias_at(step.sum, sum, 0);
            let bent = |number: usize| bent(sum, number);
            kernels::sum_taps(
                &mut list,
                &self.memory,
                &weights.each[step.sum],
                rings,
                taps,
                &self.labels,
                &self.due,
                TapsOf {
                    images: self.images,
                    taps: first..first + work.taps.len(),
                    weights: prepared.weights.taps_at(step.sum, step.phase, step.when) - begin,
                    bent: [bent(0), bent(1)],
                    work,
                },
            );
        }
        list
    }
}

/// The ring of a function of a sum's value, and the function's number.
fn bent(sum: &Sum, number: usize) -> Option<(usize, usize)> {
    let (f, ring) = sum.activations.get(number)?;
    Some((*ring, kernels::number(*f)))
}
