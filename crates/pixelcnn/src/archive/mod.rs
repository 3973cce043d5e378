//! Files compressed without loss, many of them in one `.pxc` file of version 2, each readable without the
//! others: pictures of any size by a model, whatever else there is as it is.
//!
//! **A draft** as long as `pixelcnn compress` does not write it: its bytes may change yet, and what was
//! written before is not read then. To keep something, take [`compress`](crate::compress).
//!
//! ```
//! use pixelcnn::archive::{Archive, Item, compress};
//! use pixelcnn::compress::CodingModel;
//! use pixelcnn::{ModelConfig, network};
//! use std::io::Cursor;
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let config = ModelConfig { nr_resnet: 1, nr_filters: 4, ..ModelConfig::default() };
//! let model = CodingModel::new(&config, &network::draw_parameters(&config, 1))?;
//! let notes = Item { name: "notes.txt".into(), class: 0, bytes: b"of no picture".to_vec() };
//! let file = compress(&model, vec![notes.clone()], &mut |_| ControlFlow::Continue(()))?;
//!
//! let mut archive = Archive::new(Cursor::new(file))?;
//! let number = archive.position("notes.txt").ok_or("not there")?;
//! let found = archive.read(&model, &[number], &mut |_| ControlFlow::Continue(()))?;
//! assert_eq!(found[0].as_ref().map(|found| &found.bytes), Ok(&notes.bytes));
//! # Ok(())
//! # }
//! ```
//!
//! # The format, version 2
//! | bytes | what |
//! |---|---|
//! | 4 | `pxc`, then the version |
//! | 16 | the model: see [`ModelHash`] |
//! | n | the model's channels, rows of a tile: varints (LEB128) |
//! | 4 | CRC-32C of everything so far, little-endian, as all such sums |
//!
//! Then blocks of items that were compressed side by side, each:
//!
//! | bytes | what |
//! |---|---|
//! | 4 | `pxcB` |
//! | n | number of items, columns of a strip (0: pictures are coded whole), length of the head: varints |
//! | n | the head, deflated |
//! | 3 each | checksum of the item: the low 24 bits of a CRC-32C of its file, or of a picture's samples |
//! | 4 | CRC-32C of the block so far |
//! | n | the streams |
//!
//! And at the end `pxcE`, the number of all items (a varint) and a CRC-32C of both.
//!
//! The head has of all items the names, as in [version 1](crate::compress); then of all the kinds: 0 for a
//! file as it is, else 1 plus the sum of 1 with colours, 2 with an alpha channel and 4 with 16 bits; then of
//! each picture height, width, class and the length of its PNG chunks (varints), and of all pictures these
//! chunks (length, kind, data); then the streams' lengths: all lowest bytes, then a varint of what is above
//! for each. A file has one stream, itself. A picture has those of its layers, one layer after the other:
//! red, green and blue together (one by one if the model is one of grey), or grey; of 16 bits the higher
//! bytes, then the lower; then alpha likewise; each coded by itself as
//! [`Codec`](pixelcnn_core::codec::Codec) does it, in tiles. The streams of a block lie in the order in which
//! a decoder wants them: files first, then tiles in the order in which they begin, as
//! [`Shape::tiles`](pixelcnn_core::codec::Shape::tiles) tells, of all layers side by side.

mod block;
mod exact;

use std::io::{Read, Seek, SeekFrom};
use std::ops::ControlFlow;

use pixelcnn_core::codec::TILE;

use crate::compress::{
    CodingModel, CompressError, Damage, Fields, MAGIC, ModelHash, check_names, read, varint,
};
pub use block::Item;
use block::{Block, END, MARKER, SUM};

/// A draft of version 2.
const VERSION: u8 = 0xf2;
/// No front is longer.
const MAX_FRONT: u64 = (4 + 16 + 2 * 5 + SUM) as u64;
/// Bytes that are looked through at a time for the next block.
const WINDOW: u64 = 1 << 16;

/// Compresses files, pictures among them: the bytes of a `.pxc` file. They are the same for any number of
/// threads and vector instructions. `progress` is told the share of the work that is done, and can stop it.
///
/// # Errors
/// Names that no files can have, a class that the model does not have, or stopped.
pub fn compress(
    model: &CodingModel,
    items: Vec<Item>,
    progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
) -> Result<Vec<u8>, CompressError> {
    check_names(items.iter().map(|item| item.name.as_str()))?;
    let (count, mut done) = (items.len(), 0);
    let mut file = front(model);
    let mut items = items.into_iter().peekable();
    while items.peek().is_some() {
        let block = Block::of(model, &mut items);
        let here = block.len();
        let mut share = |part| progress((done as f64 + part * here as f64) / count as f64);
        file.extend(block.encode(model, &mut share)?);
        done += here;
    }
    file.extend(end(count));
    Ok(file)
}

/// What comes before the blocks.
fn front(model: &CodingModel) -> Vec<u8> {
    let mut front = [&MAGIC[..], &[VERSION], &model.hash().0].concat();
    varint(&mut front, model.config().channels as u64);
    varint(&mut front, TILE as u64);
    summed(front)
}

/// What comes after them.
fn end(count: usize) -> Vec<u8> {
    let mut end = END.to_vec();
    varint(&mut end, count as u64);
    summed(end)
}

/// Some bytes and their sum.
fn summed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// An item as it comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file that it was; or of a picture that was coded by the model, a PNG file that shows the same.
    pub bytes: Vec<u8>,
    /// Whether it is such a PNG.
    pub is_made: bool,
}

/// What an archive has of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name: a relative path, its parts separated by `/`; no two are the same.
    pub name: String,
    /// Its class.
    pub class: u32,
    /// Height and width of a picture that was coded by the model.
    pub size: Option<[usize; 2]>,
    /// Bytes of its streams.
    pub bytes: u64,
    /// Its block, and its place there.
    place: [usize; 2],
}

/// A `.pxc` file being read: the blocks' heads are, streams are when they are asked for.
#[derive(Debug)]
pub struct Archive<R> {
    source: R,
    hash: ModelHash,
    /// Of the model.
    channels: usize,
    blocks: Vec<Block>,
    entries: Vec<Entry>,
    /// Whether the end is there, with as many items as were found.
    whole: bool,
    /// Bytes that are no block of it.
    unknown: u64,
}

impl<R: Read + Seek> Archive<R> {
    /// Reads the heads of all blocks. Where one is damaged, goes on with the next that is not: see
    /// [`Archive::is_whole`].
    ///
    /// # Errors
    /// [`CompressError::Read`], [`CompressError::NotPxc`], [`CompressError::Version`] of another version,
    /// [`CompressError::Damaged`] where the front is, and [`CompressError::Name`] for a name that could make
    /// trouble.
    pub fn new(mut source: R) -> Result<Archive<R>, CompressError> {
        const CUT: CompressError = CompressError::Damaged("the file is cut off in its front");
        const ALTERED: CompressError = CompressError::Damaged("the file's front was altered");

        let size = source.seek(SeekFrom::End(0)).map_err(CompressError::Read)?;
        let front = read(&mut source, 0, size.min(MAX_FRONT))?;
        let mut fields = Fields(&front);
        if fields.take(MAGIC.len()) != Some(MAGIC) {
            return Err(CompressError::NotPxc);
        }
        match fields.take(1).ok_or(CUT)? {
            [VERSION] => {}
            version => return Err(CompressError::Version(version[0])),
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(fields.take(16).ok_or(CUT)?);
        let mut number = || fields.number().ok_or(CUT);
        let [channels, rows] = [number()?, number()?].map(|n| n as usize);
        let checked = front.len() - fields.0.len();
        let sum = fields.take(SUM).ok_or(CUT)?;
        let known = [1, 3].contains(&channels) && rows == TILE;
        if sum != crc32c::crc32c(&front[..checked]).to_le_bytes() || !known {
            return Err(ALTERED);
        }
        let mut archive = Archive {
            source,
            hash: ModelHash(hash),
            channels,
            blocks: Vec::new(),
            entries: Vec::new(),
            whole: false,
            unknown: 0,
        };
        archive.find_blocks(checked + SUM, size, channels)?;
        check_names(archive.entries.iter().map(|entry| entry.name.as_str()))?;
        Ok(archive)
    }

    /// Finds all blocks from a place on.
    fn find_blocks(
        &mut self,
        from: usize,
        size: u64,
        channels: usize,
    ) -> Result<(), CompressError> {
        let mut at = from as u64;
        while at < size {
            let start = read(&mut self.source, at, (size - at).min(64))?;
            if let Some(count) = end_of(&start) {
                self.whole = self.unknown == 0 && count == self.entries.len();
                self.unknown += size - at - end(count).len() as u64;
                return Ok(());
            }
            let block = match start.starts_with(MARKER) {
                true => Block::read(&mut self.source, at, size, channels)?,
                false => None,
            };
            match block {
                Some(block) => {
                    at = block.end().min(size);
                    let number = self.blocks.len();
                    self.entries.extend(block.entries(number));
                    self.blocks.push(block);
                }
                None => {
                    let next = self.next_marker(at + 1, size)?;
                    self.unknown += next - at;
                    at = next;
                }
            }
        }
        Ok(())
    }

    /// Where the next marker is, or the end of the file.
    fn next_marker(&mut self, from: u64, size: u64) -> Result<u64, CompressError> {
        let mut at = from;
        while at < size {
            let here = read(&mut self.source, at, (size - at).min(WINDOW))?;
            let found = here.windows(MARKER.len());
            let mut found = found.enumerate();
            if let Some((place, _)) = found.find(|(_, bytes)| *bytes == MARKER || *bytes == END) {
                return Ok(at + place as u64);
            }
            // A marker may lie across the border.
            at += here.len().saturating_sub(MARKER.len() - 1).max(1) as u64;
        }
        Ok(size)
    }

    /// The model that made the file.
    pub fn model(&self) -> ModelHash {
        self.hash
    }

    /// What is in the file, in its order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether all of its blocks were found, up to its end; their streams may be damaged yet.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Bytes of the file that are not of the archive, or that were damaged.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// The number of the item with this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Takes the items with these numbers out, or says why one is lost. Only their bytes are read.
    /// `progress` is told the share of the work that is done, and can stop it.
    ///
    /// # Errors
    /// [`CompressError::WrongModel`], [`CompressError::Read`], and [`CompressError::Codec`] where stopped or
    /// without memory.
    ///
    /// # Panics
    /// If there is no item with one of the numbers.
    pub fn read(
        &mut self,
        model: &CodingModel,
        numbers: &[usize],
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Result<Found, Damage>>, CompressError> {
        if model.hash() != self.hash {
            return Err(CompressError::WrongModel {
                wanted: self.hash,
                given: model.hash(),
            });
        }
        let config = model.config();
        let fits = |block: &Block| block.is_whole() == config.attends();
        if self.channels != config.channels || !self.blocks.iter().all(fits) {
            return Err(CompressError::Damaged(
                "the file's pictures are not its model's",
            ));
        }
        let mut found = vec![Err(Damage::Cut); numbers.len()];
        let mut places: Vec<usize> = (0..numbers.len()).collect();
        places.sort_by_key(|&place| self.entries[numbers[place]].place);
        let block_of = |place: &usize| self.entries[numbers[*place]].place[0];
        let mut done = 0;
        for places in places.chunk_by(|a, b| block_of(a) == block_of(b)) {
            let items = places
                .iter()
                .map(|&place| self.entries[numbers[place]].place[1]);
            let items: Vec<usize> = items.collect();
            let mut share = |part: f64| {
                progress((done as f64 + part * items.len() as f64) / numbers.len() as f64)
            };
            let block = &self.blocks[block_of(&places[0])];
            let read = block.decode(model, &items, &mut self.source, &mut share)?;
            for (&place, item) in places.iter().zip(read) {
                found[place] = item;
            }
            done += items.len();
        }
        Ok(found)
    }
}

/// The number of items that the end of an archive tells of.
fn end_of(bytes: &[u8]) -> Option<usize> {
    let mut fields = Fields(bytes.strip_prefix(END)?);
    let count = fields.number()? as usize;
    bytes.starts_with(&end(count)).then_some(count)
}

#[cfg(test)]
mod tests;
