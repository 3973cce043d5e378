//! Pictures into archives and out of them.

use std::io::Cursor;

use numpy::{PyArrayDescrMethods, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods};
use pixelcnn::archive::{Archive, ArchiveError, Item, Samples};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyMemoryView, PyString};

use crate::arrays::{array, as_array, in_order};
use crate::errors::{self, of_type, value};
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
    if file(images)?.is_some() {
        return Err(of_type(
            "a single file: give a list, [data], or a dict, {name: data}",
        ));
    }
    if let Ok(array) = images.cast::<PyUntypedArray>()
        && matches!(*array.shape(), [_, _] | [_, _, 1 | 3])
    {
        return Err(value("a single picture: give a list, [image]"));
    }
    let images: Vec<Bound<PyAny>> = images.try_iter()?.collect::<PyResult<_>>()?;
    let digits = images.len().saturating_sub(1).to_string().len().max(4);
    let numbered = images.iter().enumerate().map(|(number, image)| {
        let kind = match file(image)? {
            Some(_) => "",
            None => ".png",
        };
        item(format!("{number:0digits$}{kind}"), image)
    });
    numbered.collect()
}

/// What is in `bytes`, a `bytearray` or a `memoryview`; none of anything else.
pub fn file(given: &Bound<'_, PyAny>) -> PyResult<Option<Vec<u8>>> {
    if let Ok(bytes) = given.cast::<PyBytes>() {
        return Ok(Some(bytes.as_bytes().to_vec()));
    }
    if !given.is_instance_of::<PyByteArray>() && !given.is_instance_of::<PyMemoryView>() {
        return Ok(None);
    }
    let bytes = given.py().get_type::<PyBytes>().call1((given,))?;
    Ok(Some(bytes.cast::<PyBytes>()?.as_bytes().to_vec()))
}

fn item(name: String, image: &Bound<'_, PyAny>) -> PyResult<Item> {
    if let Some(bytes) = file(image)? {
        return Ok(Item {
            name,
            class: 0,
            bytes,
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
    if array.dtype().kind() == b'U' {
        return Err(of_type(format!(
            "{name}: a name: give the file's bytes, open(name, 'rb').read()"
        )));
    }
    let (Ok(levels), false) = (levels, shape.contains(&0)) else {
        return Err(of_type(format!(
            "{given}: pictures are uint8 [H, W, 3], [H, W, 1] or [H, W]; of others give a PNG file's bytes"
        )));
    };
    let levels = in_order(&levels);
    Ok(Item::of_levels(&name, 0, shape, &levels))
}

/// What is in an archive.
enum Thing {
    Picture(Samples),
    File(Vec<u8>),
}

/// All that is in an archive, in its order.
///
/// # Errors
/// Where it is of another model that is neither in it nor in the library, or damaged anywhere.
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
        let has_pictures = archive.entries().iter().any(|entry| entry.size.is_some());
        let own = match archive.reader().expect_model(coder) {
            Err(ArchiveError::WrongModel { .. }) if has_pictures => archive.reader().find_model(),
            _ => Ok(None),
        };
        let own = own.map_err(errors::of)?.map(|own| own.coder());
        let own = own.transpose().map_err(errors::of)?;
        let coder = own.as_ref().unwrap_or(coder);
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
