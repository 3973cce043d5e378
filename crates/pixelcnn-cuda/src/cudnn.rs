//! Convolutions by cuDNN, through its backend descriptors: those take what a window reaches beyond a
//! map on each side by itself, so that no map is padded or cropped.
//!
//! Of the engines that cuDNN offers, in its own order, the first one is taken that gives the same
//! bits every time and does not round more than it was asked to, so that runs on cards of one kind
//! are the same. Where there is none, the plain kernels do the work.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cudnn::sys::{
    self, cudnnBackendAttributeName_t as Attribute, cudnnBackendAttributeType_t as Type,
    cudnnBackendDescriptorType_t as Kind, cudnnBackendHeurMode_t as Heuristic,
    cudnnBackendNumericalNote_t as Note, cudnnConvolutionMode_t as Mode, cudnnDataType_t as Data,
    cudnnStatus_t as Status,
};

use crate::convolution::{Convolution, Direction};
use crate::kernels::{Address, Geometry};
use crate::{CudaError, Precision};

/// Bytes to which maps and weights are aligned at the least.
const ALIGNMENT: i64 = 16;
/// Bytes of memory that an engine may ask for.
const MAX_WORKSPACE: usize = 1 << 30;
/// Engines that cuDNN is asked for.
const MOST_ENGINES: usize = 64;

/// The numbers of the three tensors.
const FINE: i64 = 1;
const WEIGHT: i64 = 2;
const COARSE: i64 = 3;

/// cuDNN on a device.
pub(crate) struct Cudnn {
    handle: sys::cudnnHandle_t,
    precision: Precision,
    /// None where cuDNN has nothing suitable.
    plans: Mutex<HashMap<Work, Option<Plan>>>,
}

// SAFETY: the handle may be used by any thread that has bound its context, one at a time: all that
// use it hold `plans`.
unsafe impl Send for Cudnn {}
// SAFETY: as above.
unsafe impl Sync for Cudnn {}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Work {
    pub convolution: Convolution,
    pub direction: Direction,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
}

/// How it is done.
struct Plan {
    plan: Descriptor,
    workspace: usize,
}

impl Cudnn {
    /// cuDNN for work in the order of a stream.
    ///
    /// # Safety
    /// The stream's context is bound, and outlives this. cuDNN is loaded.
    pub unsafe fn new(
        stream: cudarc::driver::sys::CUstream,
        precision: Precision,
    ) -> Result<Cudnn, CudaError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is written before it is used.
        unsafe {
            expect(sys::cudnnCreate(&mut handle))?;
            expect(sys::cudnnSetStream(handle, stream.cast()))?;
        }
        Ok(Cudnn {
            handle,
            precision,
            plans: Mutex::default(),
        })
    }

    /// Bytes of memory that the work takes; none where cuDNN can't do it.
    pub fn prepare(&self, work: Work) -> Option<usize> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plans
            .entry(work)
            .or_insert_with(|| self.plan(work).ok().flatten());
        plan.as_ref().map(|plan| plan.workspace)
    }

    /// Does the work, for which [`Self::prepare`] was asked.
    ///
    /// # Safety
    /// The memory is as large as the geometry says and as `prepare` has said.
    pub unsafe fn run(
        &self,
        work: Work,
        [fine, weight, coarse]: [Address; 3],
        workspace: Address,
    ) -> Result<(), CudaError> {
        let plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(plan)) = plans.get(&work) else {
            return Err(CudaError::Refused("cuDNN was not asked before".into()));
        };
        let mut pack = Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        let pointers = [fine, weight, coarse].map(|address| address as *mut c_void);
        pack.set(
            Attribute::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS,
            Type::CUDNN_TYPE_VOID_PTR,
            &pointers,
        )?;
        pack.set(
            Attribute::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS,
            Type::CUDNN_TYPE_INT64,
            &[FINE, WEIGHT, COARSE],
        )?;
        pack.set(
            Attribute::CUDNN_ATTR_VARIANT_PACK_WORKSPACE,
            Type::CUDNN_TYPE_VOID_PTR,
            &[workspace as *mut c_void],
        )?;
        pack.finalize()?;
        // SAFETY: the plan and the pack are final; the caller knows the memory.
        expect(unsafe { sys::cudnnBackendExecute(self.handle, plan.plan.0, pack.0) })
    }

    /// The first suitable way.
    fn plan(&self, work: Work) -> Result<Option<Plan>, CudaError> {
        let operation = operation(work, self.precision)?;
        let mut graph = Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        graph.set(
            Attribute::CUDNN_ATTR_OPERATIONGRAPH_OPS,
            Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
            &[operation.0],
        )?;
        graph.set(
            Attribute::CUDNN_ATTR_OPERATIONGRAPH_HANDLE,
            Type::CUDNN_TYPE_HANDLE,
            &[self.handle],
        )?;
        graph.finalize()?;
        for mode in [
            Heuristic::CUDNN_HEUR_MODE_A,
            Heuristic::CUDNN_HEUR_MODE_FALLBACK,
        ] {
            let Ok(configurations) = configurations(&graph, mode) else {
                continue;
            };
            for configuration in &configurations {
                if let Some(plan) = self.suitable(work, configuration) {
                    return Ok(Some(plan));
                }
            }
        }
        Ok(None)
    }

    /// The plan of an engine's configuration, if it does what is wanted.
    fn suitable(&self, work: Work, configuration: &Descriptor) -> Option<Plan> {
        // Of the residual stream's layers, the first ones and the last must not be rounded: 11 bits
        // can't tell the images' levels, nor the logits' digits. The others halve or double maps.
        let Convolution { geometry, wide } = work.convolution;
        let exact = self.precision == Precision::F32 || (wide && geometry.stride == 1);
        let notes = notes(configuration).ok()?;
        let has = |note: Note| notes.contains(&(note as i32));
        let rounds = has(Note::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS)
            || has(Note::CUDNN_NUMERICAL_NOTE_TENSOR_CORE);
        if has(Note::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC)
            || has(Note::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION)
            || has(Note::CUDNN_NUMERICAL_NOTE_FFT)
            || has(Note::CUDNN_NUMERICAL_NOTE_WINOGRAD)
            || (exact && rounds)
        {
            return None;
        }
        let mut plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR).ok()?;
        plan.set(
            Attribute::CUDNN_ATTR_EXECUTION_PLAN_HANDLE,
            Type::CUDNN_TYPE_HANDLE,
            &[self.handle],
        )
        .ok()?;
        plan.set(
            Attribute::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG,
            Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
            &[configuration.0],
        )
        .ok()?;
        plan.finalize().ok()?;
        let mut workspace = [0i64];
        plan.get(
            Attribute::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
            Type::CUDNN_TYPE_INT64,
            &mut workspace,
        )
        .ok()?;
        let workspace = usize::try_from(workspace[0]).ok()?;
        (workspace <= MAX_WORKSPACE).then_some(Plan { plan, workspace })
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        self.plans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        // SAFETY: nobody uses it any more.
        unsafe { sys::cudnnDestroy(self.handle) };
    }
}

/// A descriptor of the backend.
struct Descriptor(sys::cudnnBackendDescriptor_t);

impl Descriptor {
    fn new(kind: Kind) -> Result<Descriptor, CudaError> {
        let mut descriptor = std::ptr::null_mut();
        // SAFETY: it is written where it succeeds.
        expect(unsafe { sys::cudnnBackendCreateDescriptor(kind, &mut descriptor) })?;
        Ok(Descriptor(descriptor))
    }

    fn set<T>(&mut self, attribute: Attribute, kind: Type, values: &[T]) -> Result<(), CudaError> {
        let (count, values) = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: the values are so many, and cuDNN checks that the type is the attribute's.
        expect(unsafe { sys::cudnnBackendSetAttribute(self.0, attribute, kind, count, values) })
    }

    fn finalize(&mut self) -> Result<(), CudaError> {
        // SAFETY: the descriptor is one.
        expect(unsafe { sys::cudnnBackendFinalize(self.0) })
    }

    /// Reads as many values as there is room for; gives how many.
    fn get<T>(
        &self,
        attribute: Attribute,
        kind: Type,
        values: &mut [T],
    ) -> Result<usize, CudaError> {
        let mut found = 0;
        let (room, values) = (values.len() as i64, values.as_mut_ptr().cast());
        // SAFETY: there is room for so many values.
        let status = unsafe {
            sys::cudnnBackendGetAttribute(self.0, attribute, kind, room, &mut found, values)
        };
        expect(status)?;
        Ok(usize::try_from(found).unwrap_or(0).min(room as usize))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: it was created, and is not used any more.
        unsafe { sys::cudnnBackendDestroyDescriptor(self.0) };
    }
}

/// The engines' configurations for a graph, the best first.
fn configurations(graph: &Descriptor, mode: Heuristic) -> Result<Vec<Descriptor>, CudaError> {
    let mut heuristic = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
    heuristic.set(
        Attribute::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH,
        Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
        &[graph.0],
    )?;
    heuristic.set(
        Attribute::CUDNN_ATTR_ENGINEHEUR_MODE,
        Type::CUDNN_TYPE_HEUR_MODE,
        &[mode],
    )?;
    heuristic.finalize()?;
    let one = |_| Descriptor::new(Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    let mut found = (0..MOST_ENGINES).map(one).collect::<Result<Vec<_>, _>>()?;
    let mut raw: Vec<_> = found.iter().map(|configuration| configuration.0).collect();
    let count = heuristic.get(
        Attribute::CUDNN_ATTR_ENGINEHEUR_RESULTS,
        Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
        &mut raw,
    )?;
    found.truncate(count);
    Ok(found)
}

/// What cuDNN says of the numbers of a configuration's engine.
fn notes(configuration: &Descriptor) -> Result<Vec<i32>, CudaError> {
    let engine = Descriptor::new(Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
    configuration.get(
        Attribute::CUDNN_ATTR_ENGINECFG_ENGINE,
        Type::CUDNN_TYPE_BACKEND_DESCRIPTOR,
        &mut [engine.0],
    )?;
    // As numbers, since later versions may have more than are known here.
    let mut notes = vec![0i32; 32];
    let count = engine.get(
        Attribute::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
        Type::CUDNN_TYPE_NUMERICAL_NOTE,
        &mut notes,
    )?;
    notes.truncate(count);
    Ok(notes)
}

/// The descriptor of the work, which needs no device.
fn operation(work: Work, precision: Precision) -> Result<Descriptor, CudaError> {
    let Work {
        convolution: Convolution { geometry, wide },
        direction,
        accumulate,
    } = work;
    let map = match (wide, precision) {
        (false, Precision::Bf16) => Data::CUDNN_DATA_BFLOAT16,
        _ => Data::CUDNN_DATA_FLOAT,
    };
    // The gradient by the weight is in single precision.
    let weight = match direction {
        Direction::ByWeight => Data::CUDNN_DATA_FLOAT,
        Direction::Down | Direction::Up => map,
    };
    let Geometry {
        images,
        coarse,
        fine,
        kernel,
        ..
    } = geometry;
    let fine_map = tensor(FINE, map, images, fine)?;
    let coarse_map = tensor(COARSE, map, images, coarse)?;
    let weight = tensor(WEIGHT, weight, coarse[2], [kernel[0], kernel[1], fine[2]])?;
    let window = window(geometry)?;

    use Attribute as A;
    let (kind, attributes) = match direction {
        Direction::Down => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            [
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            ],
        ),
        Direction::Up => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            [
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
            ],
        ),
        Direction::ByWeight => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            [
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                A::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            ],
        ),
    };
    let mut operation = Descriptor::new(kind)?;
    let parts = [&window, &fine_map, &weight, &coarse_map];
    for (attribute, part) in attributes.into_iter().zip(parts) {
        operation.set(attribute, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &[part.0])?;
    }
    let [.., alpha, beta] = attributes;
    let added = if accumulate { 1f32 } else { 0.0 };
    operation.set(alpha, Type::CUDNN_TYPE_FLOAT, &[1f32])?;
    operation.set(beta, Type::CUDNN_TYPE_FLOAT, &[added])?;
    operation.finalize()?;
    Ok(operation)
}

/// A map \[n, h, w, channels\], or a weight, whose maps are the coarse channels.
fn tensor(
    number: i64,
    data: Data,
    n: i32,
    [h, w, channels]: [i32; 3],
) -> Result<Descriptor, CudaError> {
    let [n, h, w, channels] = [n, h, w, channels].map(i64::from);
    let mut tensor = Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
    tensor.set(
        Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE,
        Type::CUDNN_TYPE_DATA_TYPE,
        &[data],
    )?;
    tensor.set(
        Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS,
        Type::CUDNN_TYPE_INT64,
        &[n, channels, h, w],
    )?;
    tensor.set(
        Attribute::CUDNN_ATTR_TENSOR_STRIDES,
        Type::CUDNN_TYPE_INT64,
        &[h * w * channels, 1, w * channels, channels],
    )?;
    tensor.set(
        Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID,
        Type::CUDNN_TYPE_INT64,
        &[number],
    )?;
    tensor.set(
        Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT,
        Type::CUDNN_TYPE_INT64,
        &[ALIGNMENT],
    )?;
    tensor.finalize()?;
    Ok(tensor)
}

/// How the maps lie over each other.
fn window(geometry: Geometry) -> Result<Descriptor, CudaError> {
    let Geometry {
        coarse,
        fine,
        kernel,
        offset,
        stride,
        ..
    } = geometry;
    // What the kernel reaches beyond the finer map's end; it may also end before, which cuDNN is
    // not told.
    let after = |axis: usize| {
        let reach = (coarse[axis] - 1) * stride + kernel[axis] - offset[axis];
        i64::from((reach - fine[axis]).max(0))
    };
    let mut window = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?;
    window.set(
        Attribute::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS,
        Type::CUDNN_TYPE_INT64,
        &[2i64],
    )?;
    window.set(
        Attribute::CUDNN_ATTR_CONVOLUTION_COMP_TYPE,
        Type::CUDNN_TYPE_DATA_TYPE,
        &[Data::CUDNN_DATA_FLOAT],
    )?;
    window.set(
        Attribute::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
        Type::CUDNN_TYPE_CONVOLUTION_MODE,
        &[Mode::CUDNN_CROSS_CORRELATION],
    )?;
    for (attribute, values) in [
        (Attribute::CUDNN_ATTR_CONVOLUTION_DILATIONS, [1, 1]),
        (
            Attribute::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES,
            [stride.into(); 2],
        ),
        (
            Attribute::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS,
            offset.map(i64::from),
        ),
        (
            Attribute::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS,
            [after(0), after(1)],
        ),
    ] {
        window.set(attribute, Type::CUDNN_TYPE_INT64, &values)?;
    }
    window.finalize()?;
    Ok(window)
}

fn expect(status: Status) -> Result<(), CudaError> {
    match status {
        Status::CUDNN_STATUS_SUCCESS => Ok(()),
        status => Err(CudaError::Refused(format!("cuDNN: {status:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::libraries;
    use pixelcnn_core::ModelConfig;
    use pixelcnn_core::network::Layer;
    use pixelcnn_core::plan::{Operation, Plan};

    /// Every convolution of a model, in every direction.
    fn works(config: &ModelConfig) -> HashSet<Work> {
        let plan = Plan::training(config);
        let mut works = HashSet::new();
        for operation in &plan.forward {
            let (finer, layers): (usize, Vec<(&Layer, bool)>) = match operation {
                Operation::Layer { layer, from, to } => {
                    (layer.finer(*from, *to), vec![(layer, true)])
                }
                Operation::GatedResnet { block, x, .. } => {
                    let layers = [&block.conv_1, &block.conv_2].into_iter().chain(&block.nin);
                    (*x, layers.map(|layer| (layer, false)).collect())
                }
                _ => continue,
            };
            let [h, w] = plan.buffers[finer].size;
            for (layer, wide) in layers {
                let geometry = Geometry::of(layer, [64, h, w]);
                let convolution = Convolution { geometry, wide };
                for direction in [Direction::Down, Direction::Up, Direction::ByWeight] {
                    works.insert(Work {
                        convolution,
                        direction,
                        accumulate: layer.window.taps() == 1 && direction == Direction::Down,
                    });
                }
            }
        }
        works
    }

    /// The shapes that cuDNN infers are ours: its descriptors are refused where they are not.
    #[test]
    #[ignore = "needs libcudnn: `pip install nvidia-cudnn-cu13` in an active environment"]
    fn every_convolution_of_every_preset_is_one_of_cudnns() {
        libraries::expect_cudnn().unwrap();
        let presets = [
            [24, 1, 5],
            [32, 2, 10],
            [48, 2, 5],
            [64, 2, 10],
            [160, 5, 10],
        ];
        for [nr_filters, nr_resnet, nr_logistic_mix] in presets {
            let config = ModelConfig {
                nr_filters,
                nr_resnet,
                nr_logistic_mix,
                ..ModelConfig::default()
            };
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                for work in works(&config) {
                    let made = operation(work, precision).map(|_| ());
                    assert_eq!(made, Ok(()), "{work:?}");
                }
            }
        }
        for mut wrong in works(&ModelConfig::default()) {
            wrong.convolution.geometry.fine[0] += 4;
            assert!(operation(wrong, Precision::F32).is_err(), "{wrong:?}");
        }
    }
}
