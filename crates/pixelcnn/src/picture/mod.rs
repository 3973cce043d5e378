//! Pictures: files read as pixels, and images side by side in one picture, written or animated.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub(crate) mod file;
mod grid;

pub use file::{Dropped, DroppedCount, FORMATS, is_picture};
pub use grid::{Grid, encode_png, grid, write_animation, write_png};

use file::{Fit, MAX_FILE, Unread};

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// Not the images that the shape says.
    #[error(
        "{bytes} bytes are not images of shape {shape:?} (N, H, W, 1 or 3): none of it may be 0"
    )]
    Shape {
        /// How many bytes there are.
        bytes: usize,
        /// What they should be.
        shape: [usize; 4],
    },
    /// No columns, no scale, or more pixels than is reasonable.
    #[error(
        "a grid of {columns} columns at scale {scale} is empty or over {} pixels wide or high: \
         choose others",
        grid::MAX_GRID_SIDE
    )]
    Grid {
        /// Images side by side.
        columns: usize,
        /// Pixels per pixel.
        scale: usize,
    },
    /// The encoder fails.
    #[error("cannot encode a picture as PNG: {0}")]
    Encode(String),
    /// A file that is not there or not a picture.
    #[error("cannot read `{path}`: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A picture of another size than the one wanted.
    #[error("{path}: {}x{} pixels where {}x{} are wanted: crop or resize it first",
        found[1], found[0], wanted[1], wanted[0])]
    Size {
        /// The file.
        path: PathBuf,
        /// Its height and width.
        found: [usize; 2],
        /// The height and width wanted.
        wanted: [usize; 2],
    },
    /// The file system refuses.
    #[error("cannot write `{path}`: {source}: make room or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
}

/// A picture read from a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Its pixels, u8 \[H, W, C\].
    pub levels: Vec<u8>,
    /// What else the file holds.
    pub dropped: Dropped,
}

/// Height and width of a picture file in memory; `path` stands for it in errors.
///
/// # Errors
/// [`PictureError::Read`].
pub fn size(bytes: &[u8], path: &Path) -> Result<[usize; 2], PictureError> {
    let unreadable = |reason| PictureError::Read {
        path: path.into(),
        reason,
    };
    let header = file::header(bytes, true).map_err(unreadable)?;
    Ok([header.height, header.width])
}

/// Reads a picture file of the height, width and channels (1 or 3) of `shape`. What is not of this
/// size is not decoded.
///
/// # Errors
/// [`PictureError::Read`] and [`PictureError::Size`].
pub fn read(path: &Path, shape: [usize; 3]) -> Result<Picture, PictureError> {
    decode(&read_bytes(path)?, path, shape)
}

/// A picture file's bytes, if they are not too many.
///
/// # Errors
/// [`PictureError::Read`].
pub fn read_bytes(path: &Path) -> Result<Vec<u8>, PictureError> {
    let unreadable = |reason| PictureError::Read {
        path: path.into(),
        reason,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    // Of a pipe nobody knows the length before its end.
    let read = file.take(MAX_FILE + 1).read_to_end(&mut bytes);
    let read = read.map_err(|error| unreadable(error.to_string()))? as u64;
    if read > MAX_FILE {
        return Err(unreadable(format!("over {} MiB", MAX_FILE >> 20)));
    }
    Ok(bytes)
}

/// Decodes a picture file in memory as [`read`] does; `path` stands for it in errors.
///
/// # Errors
/// As there.
pub fn decode(bytes: &[u8], path: &Path, shape: [usize; 3]) -> Result<Picture, PictureError> {
    let unreadable = |reason| PictureError::Read {
        path: path.into(),
        reason,
    };
    let [height, width, channels] = shape;
    let wanted = [height, width];
    let decoded = file::decode(bytes, channels, Fit::Exact(wanted));
    let decoded = decoded.map_err(|unread| match unread {
        Unread::Size(found) => PictureError::Size {
            path: path.into(),
            found,
            wanted,
        },
        Unread::Because(reason) => unreadable(reason),
    })?;
    let beside = file::beside_pixels(bytes).map_err(unreadable)?;
    Ok(Picture {
        levels: decoded.levels,
        dropped: Dropped {
            profile: beside.profile,
            metadata: beside.metadata,
            ..decoded.dropped
        },
    })
}

#[cfg(test)]
mod tests;
