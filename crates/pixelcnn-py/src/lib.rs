//! The part of the Python package `pixelcnn` that is written in Rust: its module `_pixelcnn`. What is said here
//! in comments of three slashes of classes and functions is what `help()` shows.

mod archive;
mod arrays;
mod distribution;
mod errors;
mod model;
mod training;
mod work;

use pyo3::prelude::*;

#[pymodule]
mod _pixelcnn {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::arrays::expect_images;
    #[pymodule_export]
    use crate::distribution::Distribution;
    #[pymodule_export]
    use crate::model::{Model, load};
    #[pymodule_export]
    use crate::training::{expect_new, expect_settings, first_free, resume, train};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
