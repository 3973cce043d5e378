//! A layer's convolution in the directions in which it is needed: a finer map, a coarser map and the
//! weight, each made of the other two.

use crate::CudaError;
use crate::gpu::Branch;
use crate::kernels::{self, Address, Geometry};

/// A convolution of some maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Convolution {
    pub geometry: Geometry,
    /// Whether maps and weight are of the residual stream's numbers, and not of the maps'.
    pub wide: bool,
}

/// What is made of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    /// The coarser map of the finer one: a convolution, or the gradient by a transposed one's input.
    Down,
    /// The finer map of the coarser one: a transposed convolution, or the gradient by a convolution's
    /// input.
    Up,
    /// The gradient by the weight, in single precision, of both maps.
    ByWeight,
}

impl Convolution {
    /// Makes one of the finer map, the weight and the coarser map of the others, by the plain
    /// kernels; or adds it to what is there, which the gradient by the weight never is.
    ///
    /// # Safety
    /// The memory is as large as the geometry says.
    pub unsafe fn run(
        self,
        branch: &dyn Branch,
        direction: Direction,
        [fine, weight, coarse]: [Address; 3],
        accumulate: bool,
    ) -> Result<(), CudaError> {
        let (geometry, add) = (self.geometry, accumulate.into());
        // SAFETY: the caller's.
        unsafe {
            match (direction, self.wide) {
                (Direction::Down, true) => {
                    kernels::convolve_wide(branch, fine, weight, coarse, geometry, add)
                }
                (Direction::Down, false) => {
                    kernels::convolve_map(branch, fine, weight, coarse, geometry, add)
                }
                (Direction::Up, true) => {
                    kernels::transposed_wide(branch, coarse, weight, fine, geometry, add)
                }
                (Direction::Up, false) => {
                    kernels::transposed_map(branch, coarse, weight, fine, geometry, add)
                }
                (Direction::ByWeight, true) => {
                    kernels::by_weight_wide(branch, fine, coarse, weight, geometry)
                }
                (Direction::ByWeight, false) => {
                    kernels::by_weight_map(branch, fine, coarse, weight, geometry)
                }
            }
        }
    }
}
