//! Version 1 of the format: pictures of the model's size, which old archives hold. Nobody writes it any more.

use std::collections::HashSet;
use std::io::Read;

use flate2::read::DeflateDecoder;
use pixelcnn_core::config::MAX_SIDE;

use super::ArchiveError;
use super::exact::Kind;
use super::fields::Fields;
use super::frame::MAGIC;
use super::index::{Part, Picture, Sum};
use super::model::{Cutting, ModelHash};
use super::names::{check_new_name, read_name};
use super::read::Block;
use super::source::Source;

/// No header is longer: five varints of 32 bits after magic, version and hash.
const MAX_HEADER: u64 = 4 + 16 + 5 * 5;
/// The longest name, in bytes.
const MAX_NAME: usize = 255;
/// The most that an image takes in the index: a name after two varints, a class, a length.
const MAX_ENTRY: u64 = (2 + 2 + MAX_NAME + 5 + 1 + 5) as u64;
/// Bytes of an image's checksum.
const CHECKSUM: usize = 3;
/// Images of a block.
const BLOCK: usize = 64;

/// What the file is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Front {
    pub hash: ModelHash,
    /// Height, width and channels of its images.
    pub shape: [usize; 3],
}

/// Reads what comes before the streams; gives also where the last one ends. Memory is taken in proportion to the
/// file's size, not to what it says about itself.
pub(super) fn read(source: &mut impl Source) -> Result<(Front, Vec<Block>, u64), ArchiveError> {
    const CUT: ArchiveError = ArchiveError::Damaged("the file is cut off in its index");
    const ALTERED: ArchiveError = ArchiveError::Damaged("the file's index was altered");

    let mut bytes = |len| source.bytes(0, len).map_err(ArchiveError::Read);
    let header = bytes(MAX_HEADER)?;
    let mut fields = Fields(&header);
    fields.take(MAGIC.len() + 1).ok_or(CUT)?;
    let mut hash = [0; 16];
    hash.copy_from_slice(fields.take(16).ok_or(CUT)?);
    let mut numbers = [0; 5];
    for number in &mut numbers {
        *number = fields.number().ok_or(CUT)?;
    }
    let [height, width, channels, count, deflated] = numbers;
    let begin = header.len() - fields.0.len();
    let checked = begin as u64 + deflated + count * CHECKSUM as u64;
    let front = bytes(checked + 4)?;
    if (front.len() as u64) < checked + 4 {
        return Err(CUT);
    }
    let (front, crc) = front.split_at(checked as usize);
    if crc != crc32c::crc32c(front).to_le_bytes() {
        return Err(ALTERED);
    }
    let (deflated, checksums) = front[begin..].split_at(deflated as usize);
    let mut index = Vec::new();
    let limit = count * MAX_ENTRY;
    let inflated = DeflateDecoder::new(deflated).take(limit + 1);
    let inflated = { inflated }.read_to_end(&mut index).map_err(|_| ALTERED)?;
    if inflated as u64 > limit {
        return Err(ALTERED);
    }
    let front = Front {
        hash: ModelHash(hash),
        shape: [height, width, channels].map(|n| n as usize),
    };
    if front.shape[..2]
        .iter()
        .any(|side| !(1..=MAX_SIDE).contains(side))
        || ![1, 3].contains(&front.shape[2])
    {
        return Err(ALTERED);
    }
    let parts = parts(&index, checksums, front.shape).ok_or(ALTERED)?;
    let mut seen = HashSet::new();
    for Part { name, .. } in &parts {
        check_new_name(&mut seen, name)?;
    }
    let cutting = Cutting {
        columns: None,
        channels: front.shape[2],
        adapts: false,
    };
    let (mut blocks, mut start) = (Vec::new(), checked + 4);
    for parts in parts.chunks(BLOCK) {
        blocks.push(Block::of_parts(cutting, parts.to_vec(), start).ok_or(ALTERED)?);
        let lengths = parts.iter().flat_map(|part| &part.lengths);
        start = lengths.fold(start, |end, len| end + len);
    }
    Ok((front, blocks, start))
}

fn parts(index: &[u8], checksums: &[u8], shape: [usize; 3]) -> Option<Vec<Part>> {
    let [height, width, channels] = shape;
    let mut index = Fields(index);
    let mut parts: Vec<Part> = Vec::new();
    for sum in checksums.chunks_exact(CHECKSUM) {
        let before = parts.last().map_or("", |part| &part.name);
        parts.push(Part {
            name: read_name(&mut index, before).filter(|name| name.len() <= MAX_NAME)?,
            picture: None,
            sum: Sum {
                crc: u32::from_le_bytes([sum[0], sum[1], sum[2], 0]),
                mask: 0x00ff_ffff,
            },
            lengths: Vec::new(),
        });
    }
    for part in &mut parts {
        part.picture = Some(Picture {
            height,
            width,
            class: index.number()? as u32,
            kind: Kind {
                colour: channels == 3,
                alpha: false,
                deep: false,
            },
            chunks: Vec::new(),
        });
    }
    let lowest = index.take(parts.len())?;
    for (part, low) in parts.iter_mut().zip(lowest) {
        part.lengths = vec![index.number()? << 8 | u64::from(*low)];
    }
    index.0.is_empty().then_some(parts)
}
