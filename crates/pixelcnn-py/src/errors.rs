//! The library's errors as Python's.

use std::error::Error;
use std::io;

use pixelcnn::Stopped;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// What the caller gave is not what it should be.
pub fn value(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// What the caller gave is of another type.
pub fn of_type(error: impl std::fmt::Display) -> PyErr {
    PyTypeError::new_err(error.to_string())
}

/// An error of the library: `OSError` where the system refuses (`FileNotFoundError` and so on),
/// `KeyboardInterrupt` where work was stopped, else `ValueError`.
pub fn of(error: impl Error + 'static) -> PyErr {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(found) = cause {
        if found.is::<Stopped>() {
            return PyKeyboardInterrupt::new_err(());
        }
        if let Some(refused) = found.downcast_ref::<io::Error>() {
            return match refused.raw_os_error() {
                Some(number) => PyOSError::new_err((number, error.to_string())),
                None => PyOSError::new_err(error.to_string()),
            };
        }
        cause = found.source();
    }
    value(error)
}

/// A number that counts something.
///
/// # Errors
/// Where it is negative.
pub fn count(name: &str, number: i64) -> PyResult<usize> {
    usize::try_from(number).map_err(|_| value(format!("{name}={number}: it must not be negative")))
}

/// Bytes of so many things of a size, once there is found to be memory for them.
///
/// # Errors
/// `MemoryError` where there is none.
pub fn bytes_of(factors: &[usize]) -> PyResult<usize> {
    let product = factors
        .iter()
        .try_fold(1usize, |n, &factor| n.checked_mul(factor));
    let room = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
    match product {
        Some(bytes) if room(bytes) => Ok(bytes),
        _ => Err(PyMemoryError::new_err(format!(
            "there is no memory for {factors:?} bytes: take fewer at a time"
        ))),
    }
}
