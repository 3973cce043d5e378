//! The library's errors as Python's.

use std::error::Error;

use pixelcnn::Stopped;
use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// What the caller gave is not what it should be.
pub fn value(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// What the caller gave is of another type.
pub fn of_type(error: impl std::fmt::Display) -> PyErr {
    PyTypeError::new_err(error.to_string())
}

/// An error of the library: `OSError` where the system refuses, `KeyboardInterrupt` where work was stopped, else
/// `ValueError`.
pub fn of(error: impl Error + 'static) -> PyErr {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(found) = cause {
        if found.is::<Stopped>() {
            return PyKeyboardInterrupt::new_err(());
        }
        if found.is::<std::io::Error>() {
            return PyOSError::new_err(error.to_string());
        }
        cause = found.source();
    }
    value(error)
}
