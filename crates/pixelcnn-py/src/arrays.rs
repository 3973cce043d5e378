//! NumPy's arrays as the images that a model takes, and back.

use numpy::{
    Element, PyArray1, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pixelcnn::data::CodeMaps;
use pixelcnn::{Model, ModelConfig};
use pyo3::prelude::*;

use crate::errors::{of_type, value};

/// An array of this shape.
///
/// # Errors
/// Python's, where there is no memory.
pub fn array<'py, T: Element>(
    py: Python<'py>,
    values: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    PyArray1::from_vec(py, values).reshape(shape.to_vec())
}

/// `numpy.asarray`.
///
/// # Errors
/// Where it is none, or some of it is masked.
pub fn as_array<'py>(x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    let numpy = x.py().import("numpy")?;
    let masks = numpy.getattr("ma")?;
    if x.is_instance(&masks.getattr("MaskedArray")?)?
        && masks.call_method1("is_masked", (x,))?.is_truthy()?
    {
        return Err(value(
            "some of the array is masked, which would be taken for what lies beneath: give x.filled(...)",
        ));
    }
    if let Ok(array) = x.cast::<PyUntypedArray>() {
        return Ok(array.clone());
    }
    Ok(numpy.call_method1("asarray", (x,))?.cast_into()?)
}

/// The values in the order of their indices, however they lie.
pub fn in_order<T: Element + Copy>(array: &PyReadonlyArrayDyn<T>) -> Vec<T> {
    match array.as_slice() {
        Ok(values) if array.is_c_contiguous() => values.to_vec(),
        _ => array.as_array().iter().copied().collect(),
    }
}

/// How to make levels of an array of another type.
fn cast_of(x: &Bound<'_, PyUntypedArray>) -> PyResult<&'static str> {
    let within = || -> PyResult<bool> {
        let [least, most] = ["min", "max"].map(|name| x.call_method0(name));
        Ok(least?.ge(0)? && most?.le(255)?)
    };
    Ok(match x.dtype().kind() {
        b'f' => {
            "floats in [0, 1] are made such by numpy.rint(numpy.asarray(x) * 255).astype('uint8')"
        }
        b'b' => "numpy.asarray(x).astype('uint8') * 255 is black and white",
        b'i' | b'u' if x.len() == 0 || within()? => {
            "they are made such by numpy.asarray(x).astype('uint8')"
        }
        b'i' | b'u' => "these reach beyond that: scale them first",
        _ => "give such an array",
    })
}

/// Images that a model takes, where they are or copied.
pub struct Images<'py> {
    bytes: Bytes<'py>,
    /// How many.
    pub count: usize,
    /// Their height and width.
    pub size: [usize; 2],
}

enum Bytes<'py> {
    Shared(PyReadonlyArrayDyn<'py, u8>),
    Own(Vec<u8>),
}

impl<'py> Images<'py> {
    /// An array of images, u8 \[N, H, W, C\] or of one channel \[N, H, W\]; or of maps of codes, whole numbers
    /// \[N, H, W\], with coarser ones for a model that is given those.
    ///
    /// # Errors
    /// Where it is another one: how to make it one of these.
    pub fn of(
        x: &Bound<'py, PyAny>,
        coarse: Option<&Bound<'py, PyAny>>,
        config: &ModelConfig,
    ) -> PyResult<Images<'py>> {
        if config.nr_codes > 0 {
            return Images::of_codes(x, coarse, config);
        }
        if coarse.is_some() {
            return Err(value(
                "the model is given no coarser maps: leave coarse out",
            ));
        }
        Images::of_levels(x, &[config.channels])
    }

    /// Images of one of these numbers of channels.
    ///
    /// # Errors
    /// As [`Images::of`].
    pub fn of_levels(x: &Bound<'py, PyAny>, channels: &[usize]) -> PyResult<Images<'py>> {
        let x = as_array(x)?;
        let shape = x.shape().to_vec();
        let given = format!("an array {shape:?} of {}", x.dtype());
        let wanted = match channels {
            [1] => "[N, H, W] or [N, H, W, 1]",
            [3] => "[N, H, W, 3]",
            _ => "[N, H, W, 3], [N, H, W, 1] or [N, H, W]",
        };
        let is_one = |last: usize| channels.contains(&last);
        let size = match shape[..] {
            [_, height, width, last] if is_one(last) => [height, width],
            [_, first, _, _] if is_one(first) => {
                return Err(value(format!(
                    "{given}: images are {wanted}: give x.transpose(0, 2, 3, 1), of a tensor \
                     x.permute(0, 2, 3, 1)"
                )));
            }
            [_, _, last] if is_one(last) => {
                return Err(value(format!(
                    "{given}: images are {wanted}: of a single one give x[None]"
                )));
            }
            [_, height, width] if is_one(1) => [height, width],
            _ => return Err(value(format!("{given}: images are {wanted}"))),
        };
        let Ok(levels) = x.extract::<PyReadonlyArrayDyn<u8>>() else {
            return Err(of_type(format!(
                "{given}: images are uint8, levels from 0 to 255: {}",
                cast_of(&x)?
            )));
        };
        if size.contains(&0) {
            return Err(value(format!("{given}: there is nothing in such images")));
        }
        Ok(Images {
            count: shape[0],
            size,
            bytes: match levels.is_c_contiguous() {
                true => Bytes::Shared(levels),
                false => Bytes::Own(in_order(&levels)),
            },
        })
    }

    fn of_codes(
        x: &Bound<'py, PyAny>,
        coarse: Option<&Bound<'py, PyAny>>,
        config: &ModelConfig,
    ) -> PyResult<Images<'py>> {
        let maps = code_maps(x)?;
        let [count, height, width] = maps.shape;
        Ok(Images {
            bytes: Bytes::Own(over_coarse(&maps, coarse, config)?),
            count,
            size: [height, width],
        })
    }

    /// As the model takes them.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Shared(levels) => levels.as_slice().expect("it was contiguous"),
            Bytes::Own(bytes) => bytes,
        }
    }
}

/// Maps of codes as a model takes them, with the coarser ones that it is given.
///
/// # Errors
/// Where there are such and should not be, or should be and are not, or do not fit.
pub fn over_coarse(
    maps: &CodeMaps,
    coarse: Option<&Bound<'_, PyAny>>,
    config: &ModelConfig,
) -> PyResult<Vec<u8>> {
    let coarse = match (coarse, config.nr_coarse_codes) {
        (None, 0) => None,
        (Some(_), 0) => {
            return Err(value(
                "the model is given no coarser maps: leave coarse out",
            ));
        }
        (None, _) => {
            return Err(value(
                "the model is given coarser maps: give coarse, one for each map",
            ));
        }
        (Some(coarse), _) => Some(code_maps(coarse)?),
    };
    maps.images(coarse.as_ref()).map_err(value)
}

/// Whole numbers \[N, H, W\].
///
/// # Errors
/// Where they are others.
pub fn code_maps(x: &Bound<'_, PyAny>) -> PyResult<CodeMaps> {
    let x = as_array(x)?;
    let shape = shape_of_maps(&x)?;
    let numbers = x.call_method1("astype", ("int64",))?;
    let numbers: PyReadonlyArrayDyn<i64> = numbers.extract()?;
    let numbers = numbers.as_array();
    let codes = numbers.iter().map(|&code| u16::try_from(code));
    let codes: Result<Vec<u16>, _> = codes.collect();
    Ok(CodeMaps {
        shape,
        codes: codes.map_err(|_| value("codes are from 0 to 65535"))?,
    })
}

/// The shape of an array of maps of codes.
fn shape_of_maps(x: &Bound<'_, PyUntypedArray>) -> PyResult<[usize; 3]> {
    let given = format!("an array {:?} of {}", x.shape(), x.dtype());
    let &[count, height, width] = x.shape() else {
        return Err(value(format!("{given}: maps of codes are [N, H, W]")));
    };
    match b"iu".contains(&x.dtype().kind()) {
        true => Ok([count, height, width]),
        false => Err(of_type(format!(
            "{given}: codes are whole numbers, such as uint16"
        ))),
    }
}

/// Checks that an array is what one can train on: images, or maps of codes.
#[pyfunction]
pub fn expect_images(x: &Bound<'_, PyAny>, codes: bool) -> PyResult<()> {
    match codes {
        true => shape_of_maps(&as_array(x)?).map(|_| ()),
        false => Images::of_levels(x, &[1, 3]).map(|_| ()),
    }
}

/// Images of a model as an array: u8 \[…, H, W, C\], or of codes uint16 \[…, H, W\].
///
/// # Errors
/// As [`array`].
pub fn drawn<'py>(
    py: Python<'py>,
    config: &ModelConfig,
    before: &[usize],
    images: Vec<u8>,
) -> PyResult<Bound<'py, PyAny>> {
    let size = [config.height, config.width];
    Ok(match config.nr_codes {
        0 => {
            let shape = [before, &size, &[config.channels]].concat();
            array(py, images, &shape)?.into_any()
        }
        _ => {
            let maps = CodeMaps::of_images(config, &images);
            array(py, maps.codes, &[before, &size].concat())?.into_any()
        }
    })
}

/// The class of each of some images, from one number or name for all or a number for each; 0 where the model
/// knows none.
///
/// # Errors
/// Where there are not as many, or no such classes.
pub fn classes(
    given: Option<&Bound<'_, PyAny>>,
    count: usize,
    model: &Model,
) -> PyResult<Option<Vec<u32>>> {
    let nr_classes = model.config.nr_classes;
    let Some(given) = given else {
        return Ok((nr_classes == 0).then(|| vec![0; count]));
    };
    if nr_classes == 0 {
        return Err(value("the model knows no classes: leave classes out"));
    }
    let wrong = |class: i64| {
        value(format!(
            "class {class}: the model has {nr_classes}: choose 0 to {}",
            nr_classes - 1
        ))
    };
    let class = |class: i64| match u32::try_from(class) {
        Ok(found) if (found as usize) < nr_classes => Ok(found),
        _ => Err(wrong(class)),
    };
    if let Ok(one) = given.extract::<i64>() {
        return Ok(Some(vec![class(one)?; count]));
    }
    if let Ok(name) = given.extract::<String>() {
        let names = &model.card.class_names;
        let found = names.iter().position(|known| *known == name);
        let found = found.ok_or_else(|| {
            value(format!(
                "class {name:?}: there is no such class: choose {}",
                match names.is_empty() {
                    true => format!("a number from 0 to {}", nr_classes - 1),
                    false => names.join(", "),
                }
            ))
        })?;
        return Ok(Some(vec![class(found as i64)?; count]));
    }
    let array = as_array(given)?;
    if array.ndim() != 1 || !b"iu".contains(&array.dtype().kind()) {
        return Err(of_type(
            "classes is a whole number or a name, or an array of a number for each image",
        ));
    }
    if array.shape() != [count] {
        return Err(value(format!(
            "{} classes for {count} images: give one for each, or a single number",
            array.shape()[0]
        )));
    }
    let numbers = array.call_method1("astype", ("int64",))?;
    let numbers: PyReadonlyArrayDyn<i64> = numbers.extract()?;
    let found: PyResult<Vec<u32>> = numbers.as_array().iter().map(|&n| class(n)).collect();
    found.map(Some)
}

/// Which pixels of images of a size are known: bool \[H, W\].
///
/// # Errors
/// Where it is another array.
pub fn known(mask: &Bound<'_, PyAny>, size: [usize; 2]) -> PyResult<Vec<bool>> {
    let mask = as_array(mask)?;
    let given = format!("a mask {:?} of {}", mask.shape(), mask.dtype());
    let Ok(pixels) = mask.extract::<PyReadonlyArrayDyn<bool>>() else {
        return Err(of_type(format!(
            "{given}: it is bool, True where a pixel is known"
        )));
    };
    if mask.shape() != size {
        return Err(value(format!(
            "{given}: it is [H, W], the images' {size:?}"
        )));
    }
    Ok(in_order(&pixels))
}
