//! Images as so many bytes each, in memory or in files: what CIFAR-10 and NumPy arrays are.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::DataError;

/// The bytes of some images, one after another.
pub(super) enum Bytes {
    Memory(Vec<u8>),
    /// From `offset` on in `file`.
    File {
        path: PathBuf,
        file: File,
        offset: u64,
    },
}

/// Images of one shape, in parts that lie in different places.
pub(super) struct Raw {
    /// Each part and its number of images.
    pub parts: Vec<(Bytes, usize)>,
    /// Height, width, channels.
    pub shape: [usize; 3],
    /// Whether the bytes are ordered [C, H, W] instead of [H, W, C].
    pub planar: bool,
    /// The images of this split, where the parts hold more.
    pub pick: Option<Vec<usize>>,
}

impl Raw {
    pub fn len(&self) -> usize {
        match &self.pick {
            Some(pick) => pick.len(),
            None => self.parts.iter().map(|(_, images)| images).sum(),
        }
    }

    /// Reads image `index`, which is below `len()`, as [H, W, C].
    pub fn read(&self, index: usize, image: &mut [u8]) -> Result<(), DataError> {
        let mut index = self.pick.as_ref().map_or(index, |pick| pick[index]);
        for (bytes, images) in &self.parts {
            if index < *images {
                return match self.planar {
                    false => read_row(bytes, index, image),
                    true => {
                        let mut planes = vec![0; image.len()];
                        read_row(bytes, index, &mut planes)?;
                        interleave(&planes, self.shape[2], image);
                        Ok(())
                    }
                };
            }
            index -= images;
        }
        Err(DataError::Index {
            index,
            len: self.len(),
        })
    }
}

fn read_row(bytes: &Bytes, index: usize, row: &mut [u8]) -> Result<(), DataError> {
    match bytes {
        Bytes::Memory(bytes) => row.copy_from_slice(&bytes[index * row.len()..][..row.len()]),
        Bytes::File { path, file, offset } => {
            read_at(file, row, offset + index as u64 * row.len() as u64)
                .map_err(DataError::io(path))?;
        }
    }
    Ok(())
}

/// [C, H, W] to [H, W, C].
fn interleave(planes: &[u8], channels: usize, image: &mut [u8]) {
    let pixels = planes.len() / channels;
    for (i, pixel) in image.chunks_exact_mut(channels).enumerate() {
        for (c, value) in pixel.iter_mut().enumerate() {
            *value = planes[c * pixels + i];
        }
    }
}

/// Fills `buffer` from `offset` on, without a file position that threads would share.
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < buffer.len() {
            match std::os::windows::fs::FileExt::seek_read(
                file,
                &mut buffer[done..],
                offset + done as u64,
            )? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}

/// Writes all of `buffer` from `offset` on, likewise.
pub(super) fn write_at(file: &File, buffer: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, buffer, offset);
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < buffer.len() {
            match std::os::windows::fs::FileExt::seek_write(
                file,
                &buffer[done..],
                offset + done as u64,
            )? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => done += n,
            }
        }
        Ok(())
    }
}
