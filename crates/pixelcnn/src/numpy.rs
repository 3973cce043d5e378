//! NumPy's files, written: `.npy`, and `.npz`, a zip archive with an `.npy` file for each array.

use std::io::{self, Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// What an `.npy` file of version 1.0 begins with.
const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";

/// A number that an array can hold.
pub trait Number: Copy {
    /// NumPy's name of the type.
    const DTYPE: &str;
    /// Adds the number's bytes to `bytes`.
    fn put(self, bytes: &mut Vec<u8>);
}

macro_rules! number {
    ($($t:ty, $dtype:literal;)*) => {$(
        impl Number for $t {
            const DTYPE: &str = $dtype;
            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
        }
    )*};
}

number! {
    u8, "|u1";
    u16, "<u2";
    i64, "<i8";
    u64, "<u8";
    f32, "<f4";
    f64, "<f8";
}

/// The bytes of a `.npy` file: `values` in row-major order.
///
/// # Errors
/// Where the values are not as many as `shape` says.
pub fn npy<T: Number>(shape: &[usize], values: &[T]) -> io::Result<Vec<u8>> {
    let mut bytes = header("array", T::DTYPE, shape, values.len())?;
    values.iter().for_each(|value| value.put(&mut bytes));
    Ok(bytes)
}

/// What comes before the values of an array.
fn header(name: &str, dtype: &str, shape: &[usize], len: usize) -> io::Result<Vec<u8>> {
    let product = shape.iter().try_fold(1, |n: usize, &d| n.checked_mul(d));
    if product != Some(len) {
        let problem = format!("{name}: {len} values do not fill {shape:?}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let axes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if axes.len() == 1 { "," } else { "" };
    let axes = axes.join(", ");
    let mut header =
        format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({axes}{comma}), }}");
    // The values begin at a multiple of 64, after a line's end.
    let before = MAGIC.len() + 2;
    let end = (before + header.len() + 1).next_multiple_of(64);
    header.extend(std::iter::repeat_n(' ', end - before - header.len() - 1));
    header.push('\n');
    let len = (header.len() as u16).to_le_bytes();
    Ok([MAGIC, &len, header.as_bytes()].concat())
}

/// A `.npz` file in the making, in memory and compressed as `numpy.savez_compressed` does it.
pub struct Npz {
    zip: ZipWriter<Cursor<Vec<u8>>>,
}

impl Npz {
    /// A file without arrays.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Npz {
        Npz {
            zip: ZipWriter::new(Cursor::new(Vec::new())),
        }
    }

    /// Adds the array `name`: `values` in row-major order.
    ///
    /// # Errors
    /// Where the name is there already, or where the values are not as many as `shape` says.
    pub fn add<T: Number>(&mut self, name: &str, shape: &[usize], values: &[T]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(size_of_val(values));
        values.iter().for_each(|value| value.put(&mut bytes));
        self.array(name, T::DTYPE, shape, values.len(), &bytes)
    }

    /// Adds the array `name` of texts, with room for the longest in each place.
    ///
    /// # Errors
    /// As [`add`](Npz::add).
    pub fn add_texts(&mut self, name: &str, texts: &[&str]) -> io::Result<()> {
        let longest = texts.iter().map(|text| text.chars().count()).max();
        let longest = longest.unwrap_or(0).max(1);
        let mut bytes = Vec::with_capacity(texts.len() * longest * 4);
        for text in texts {
            let chars = text.chars().chain(std::iter::repeat('\0'));
            let chars = chars.take(longest).map(u32::from);
            bytes.extend(chars.flat_map(u32::to_le_bytes));
        }
        self.array(
            name,
            &format!("<U{longest}"),
            &[texts.len()],
            texts.len(),
            &bytes,
        )
    }

    fn array(
        &mut self,
        name: &str,
        dtype: &str,
        shape: &[usize],
        len: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let header = header(name, dtype, shape, len)?;
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .large_file(bytes.len() >> 31 > 0);
        self.zip.start_file(format!("{name}.npy"), options)?;
        self.zip.write_all(&header)?;
        self.zip.write_all(bytes)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// Where the archive has more entries than the format can name.
    pub fn finish(self) -> io::Result<Vec<u8>> {
        Ok(self.zip.finish()?.into_inner())
    }
}
