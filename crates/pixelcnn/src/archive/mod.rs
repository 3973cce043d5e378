//! Files compressed without loss, many of them in one `.pxc` file, each readable without the others: pictures
//! of any size by a model, whatever else there is as it is.
//!
//! ```
//! use pixelcnn::archive::{Archive, CodingModel, Item, compress};
//! use pixelcnn::{ModelConfig, network};
//! use std::io::Cursor;
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let config = ModelConfig { nr_resnet: 1, nr_filters: 4, ..ModelConfig::default() };
//! let model = CodingModel::new(&config, &network::draw_parameters(&config, 1))?;
//! let notes = Item { name: "notes.txt".into(), class: 0, bytes: b"of no picture".to_vec() };
//! let sky = Item::of_levels("sky.png", 0, [8, 50, 3], &[200; 8 * 50 * 3]);
//! let mut go_on = |_| ControlFlow::Continue(());
//! let file = compress(&model, vec![notes, sky.clone()], &mut go_on)?;
//!
//! let mut archive = Archive::new(Cursor::new(file))?; // or of a File
//! let number = archive.position("sky.png").ok_or("not there")?;
//! let found = archive.read(&model, &[number], &mut go_on)?;
//! assert!(found[0].as_ref().is_ok_and(|found| found.is_of(&sky.bytes)));
//! # Ok(())
//! # }
//! ```
//!
//! [`Grouping`], [`Group::encode`] and [`Writer`] do the same block by block, and so does [`Reader`], also of a
//! [`Pipe`].
//!
//! # The format, version 2
//! Numbers are varints (LEB128) of up to 32 bits, or little-endian. It begins with its front:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `pxc`, then the version |
//! | 16 | the model: see [`ModelHash::of_any_size`] |
//! | 4 | the archive's number: the CRC-32C of the index of its first block of items, or 0 |
//! | 1 | the model's channels, 1 or 3 |
//! | 4 | CRC-32C of everything so far |
//!
//! Then blocks, of which each begins so. Their sums are CRC-32C too, but go on from the archive's number, so that
//! an archive that is in another one is not taken for a part of it, unless both begin with the same items:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `pxcB` |
//! | 1 | the kind: 0 the end, 1 items, 2 the model; others are left to newer programs, of which those from 128 on may be passed over without loss |
//! | n | bytes of what follows: a varint of up to 63 bits |
//! | 4 | sum of the block so far |
//!
//! The end has model, number and channels once more, as the front, then the number of all items and the sum of
//! these. What follows it is not read. A model is a `model.safetensors` as `pixelcnn export` makes it, and its
//! sum; it comes before all items. A block of items, which were compressed side by side, has:
//!
//! | bytes | what |
//! |---|---|
//! | n | length of the index: a varint |
//! | n | the index: number of items (1,024 at most), columns of a strip (256 more where [what a picture has taught so far](pixelcnn_core::codec::Coding) counts), of each item the CRC-32C of its file, or of a picture's samples, 4 bytes; then the head, deflated |
//! | 4 | sum of these |
//! | n | the streams, to the block's end |
//!
//! The head, of less than 16 MiB, has of all items the names. A name is 0 if it is the one before with its last
//! number one higher and as long; else it is 1 plus the number of bytes that it begins with as the one before
//! does, the number of the others, and these. Then of all the kinds, a byte each: 0 for a file as it is, else 1
//! plus the sum of 1 with colours, 2 with an alpha channel and 4 with 16 bits; then of each picture height and
//! width (16,384 at most), class and the length of its PNG chunks, and of all pictures these chunks, as they are in
//! a PNG but without their sums; then the streams' lengths: all lowest bytes, then of each what is above (2^20 streams at most).
//!
//! A name is a path of parts between `/`, each of 1 to 255 bytes of UTF-8 without control characters and neither
//! `.` nor `..`; it has 4,096 bytes at most. No two of an archive are the same.
//!
//! A picture's samples are \[height, width, channels\], alpha last, of 16 bits the higher byte first. A file has
//! one stream, itself. A picture has those of its layers, one layer after the other: red, green and
//! blue together (one by one if the model is one of grey), or grey; of 16 bits the higher bytes, then the lower;
//! then alpha likewise. A layer of one channel is coded by a model of three as its first one, while all three are
//! the same. Each layer is coded by itself as [`Codec`](pixelcnn_core::codec::Codec) does it: in strips of so many
//! columns, 64, or a power of two from 4 on that is no less than the widest picture of the block has, each
//! [4 rows](pixelcnn_core::incremental::LAG) behind the one to its left, and these in tiles of
//! [64 rows](pixelcnn_core::codec::TILE), a stream each. A model with attention has 0 columns (or 256) and codes a layer in
//! one stream, of 2^18 pixels at most. All pictures of a block but the last have together 64 MiB of samples at most.
//!
//! The streams of a block lie in the order in which a decoder wants them: files first, then tiles in the order in
//! which they [begin](pixelcnn_core::codec::Tile::begins), of all layers side by side.
//!
//! # The format, version 1
//! Pictures of the model's size; it is read and no longer written.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `pxc`, then the version |
//! | 16 | the model: see [`ModelHash::of`] |
//! | n | height, width, channels, number of images, length of the index: varints |
//! | n | the index, deflated: of all images the names, then the classes, then the streams' lengths |
//! | 3 each | checksum of the image's pixels: the low 24 bits of a CRC-32C, little-endian |
//! | 4 | CRC-32C of everything so far, little-endian |
//! | n each | the images' streams, one after the other |

mod embedded;
mod exact;
mod fields;
mod frame;
mod index;
mod model;
mod names;
mod read;
mod source;
mod v1;
mod write;

use std::io;

use pixelcnn_core::codec::CodecError;
use pixelcnn_core::incremental::EvaluatorError;

pub use model::{CodingModel, ModelHash};
pub use names::{FileNames, check_name, distinct_names};
pub use read::{Archive, Block, Damage, Entry, Found, Reader, Samples, Taken};
pub use source::{Pipe, Source};
pub use write::{Coded, Group, Grouping, Item, Writer, compress};

/// Why files cannot be compressed, or not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The weights are not the model's.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// A class that the model does not have, no memory, or stopped by `progress`.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A name that no file can have, or that two have.
    #[error("{name:?}: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it, and what to do.
        problem: &'static str,
    },
    /// Not a `.pxc` file.
    #[error("not a .pxc file: choose one that `compress` made")]
    NotPxc,
    /// A newer format.
    #[error(
        "version {0} of the .pxc format, this program knows up to {newest}: take a newer program",
        newest = frame::VERSION
    )]
    Version(u8),
    /// What comes before the streams is cut off, altered or makes no sense.
    #[error("{0}: get the file once more from where it is whole")]
    Damaged(&'static str),
    /// Compressed with another model.
    #[error("made with the model {wanted}, not with {given}: give the model that made it")]
    WrongModel {
        /// The model that the file names.
        wanted: ModelHash,
        /// The one that was given.
        given: ModelHash,
    },
    /// A model cannot be put into an archive, or be taken out.
    #[error("the model in the archive: {0}")]
    Embedded(String),
    /// The file cannot be read.
    #[error("cannot be read: {0}: check the file and its disk")]
    Read(#[source] io::Error),
    /// The archive cannot be written.
    #[error("cannot be written: {0}: make room or choose another folder")]
    Output(#[source] io::Error),
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod v1_tests;
