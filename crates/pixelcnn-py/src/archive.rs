//! Pictures into archives and out of them.

use std::io::Cursor;

use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pixelcnn::archive::{Archive, Item, Samples};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString};

use crate::arrays::{array, as_array};
use crate::errors;
use crate::model::Model;

/// What is to be compressed: arrays and bytes, with names or numbers.
///
/// # Errors
/// Where something else is among it.
pub fn items(images: &Bound<'_, PyAny>) -> PyResult<Vec<Item>> {
    if let Ok(named) = images.cast::<PyDict>() {
        let named = named.iter().map(|(name, image)| {
            let name = name.cast::<PyString>().map_err(PyErr::from)?;
            item(name.to_string(), &image)
        });
        return named.collect();
    }
    if images.is_instance_of::<PyBytes>() {
        return Err(errors::of_type(
            "a single file: give a list, [data], or a dict, {name: data}",
        ));
    }
    let images: Vec<Bound<PyAny>> = images.try_iter()?.collect::<PyResult<_>>()?;
    let digits = images.len().saturating_sub(1).to_string().len().max(4);
    let numbered = images.iter().enumerate().map(|(number, image)| {
        let kind = match image.is_instance_of::<PyBytes>() {
            true => "",
            false => ".png",
        };
        item(format!("{number:0digits$}{kind}"), image)
    });
    numbered.collect()
}

fn item(name: String, image: &Bound<'_, PyAny>) -> PyResult<Item> {
    if let Ok(bytes) = image.cast::<PyBytes>() {
        return Ok(Item {
            name,
            class: 0,
            bytes: bytes.as_bytes().to_vec(),
        });
    }
    let array = as_array(image)?;
    let given = format!("{name}: an array {:?} of {}", array.shape(), array.dtype());
    let shape = match *array.shape() {
        [height, width] => [height, width, 1],
        [height, width, channels @ (1 | 3)] => [height, width, channels],
        _ => [0; 3],
    };
    let levels = array.extract::<PyReadonlyArrayDyn<u8>>();
    let (Ok(levels), false) = (levels, shape.contains(&0)) else {
        return Err(errors::of_type(format!(
            "{given}: pictures are uint8 [H, W, 3], [H, W, 1] or [H, W]; of others give a PNG file's bytes"
        )));
    };
    let own;
    let levels = match levels.as_slice() {
        Ok(levels) => levels,
        Err(_) => {
            own = levels.as_array().iter().copied().collect::<Vec<u8>>();
            &own
        }
    };
    Ok(Item::of_levels(&name, 0, shape, levels))
}

/// What is in an archive.
enum Thing {
    Picture(Samples),
    File(Vec<u8>),
}

/// All that is in an archive, in its order.
///
/// # Errors
/// Where it is of another model, or damaged anywhere.
pub fn decompress<'py>(
    model: &Model,
    py: Python<'py>,
    data: &[u8],
    names: bool,
) -> PyResult<Bound<'py, PyAny>> {
    let found = model.with_coder(py, |coder, stop| {
        let mut archive = Archive::new(Cursor::new(data)).map_err(errors::of)?;
        if !archive.reader().is_whole() {
            return Err(errors::value(
                "the archive is cut off or damaged: get it once more from where it is whole, or save what \
                 can be with `pixelcnn decompress`",
            ));
        }
        let names: Vec<String> = archive
            .entries()
            .iter()
            .map(|entry| entry.name.clone())
            .collect();
        let all: Vec<usize> = (0..names.len()).collect();
        let taken = archive.read(coder, &all, &mut |_| stop.flow());
        let things = names.into_iter().zip(taken.map_err(errors::of)?);
        let things = things.map(|(name, found)| match found {
            Ok(found) => Ok(match found.samples() {
                Some(samples) => (name, Thing::Picture(samples)),
                None => (name, Thing::File(found.bytes)),
            }),
            Err(damage) => Err(errors::value(format!("{name}: {damage}"))),
        });
        things.collect::<PyResult<Vec<_>>>()
    })?;
    let (dict, list) = (PyDict::new(py), PyList::empty(py));
    for (name, thing) in found {
        let thing = match thing {
            Thing::File(bytes) => PyBytes::new(py, &bytes).into_any(),
            Thing::Picture(Samples {
                shape,
                is_deep: false,
                bytes,
            }) => array(py, bytes, &shape)?.into_any(),
            Thing::Picture(Samples { shape, bytes, .. }) => {
                let (pairs, _) = bytes.as_chunks::<2>();
                let samples: Vec<u16> =
                    pairs.iter().map(|&pair| u16::from_be_bytes(pair)).collect();
                array(py, samples, &shape)?.into_any()
            }
        };
        match names {
            true => dict.set_item(name, thing)?,
            false => list.append(thing)?,
        }
    }
    Ok(match names {
        true => dict.into_any(),
        false => list.into_any(),
    })
}
