//! A layer's convolution in the directions in which it is needed: a finer map, a coarser map and the
//! weight, each made of the other two.

use crate::CudaError;
use crate::gpu::Gpu;
use crate::kernels::{self, Address, Geometry};

/// A convolution of some maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Convolution {
    pub geometry: Geometry,
    /// Whether maps and weight are of the residual stream's numbers, and not of the maps'.
    pub wide: bool,
}

impl Convolution {
    /// `coarse` = the convolution of `fine`, or `coarse` += it.
    ///
    /// # Safety
    /// The memory is as large as the geometry says.
    pub unsafe fn down(
        self,
        gpu: &dyn Gpu,
        fine: Address,
        weight: Address,
        coarse: Address,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let kernel = match self.wide {
            true => kernels::convolve_wide,
            false => kernels::convolve_map,
        };
        // SAFETY: the caller's.
        unsafe { kernel(gpu, fine, weight, coarse, self.geometry, accumulate.into()) }
    }

    /// `fine` = the transposed convolution of `coarse`, or `fine` += it.
    ///
    /// # Safety
    /// The memory is as large as the geometry says.
    pub unsafe fn up(
        self,
        gpu: &dyn Gpu,
        coarse: Address,
        weight: Address,
        fine: Address,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let kernel = match self.wide {
            true => kernels::transposed_wide,
            false => kernels::transposed_map,
        };
        // SAFETY: the caller's.
        unsafe { kernel(gpu, coarse, weight, fine, self.geometry, accumulate.into()) }
    }

    /// The gradient by the weight, in single precision, given the maps, one of which is a gradient.
    ///
    /// # Safety
    /// The memory is as large as the geometry says.
    pub unsafe fn by_weight(
        self,
        gpu: &dyn Gpu,
        fine: Address,
        coarse: Address,
        d_weight: Address,
    ) -> Result<(), CudaError> {
        let kernel = match self.wide {
            true => kernels::by_weight_wide,
            false => kernels::by_weight_map,
        };
        // SAFETY: the caller's.
        unsafe { kernel(gpu, fine, coarse, d_weight, self.geometry) }
    }
}
