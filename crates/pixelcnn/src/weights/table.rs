//! The sorted table of keys and values that TensorFlow took from LevelDB: blocks of entries whose
//! keys share prefixes, an index block, a footer; each block with a masked CRC-32C.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use super::Fault;

/// The last eight bytes of a table.
pub const MAGIC: u64 = 0xdb47_7524_8b80_fb57;

/// Two block handles of at most two 10-byte varints each, padded, and the magic number.
const FOOTER: u64 = 48;

/// A block's type and checksum.
const TRAILER: u64 = 5;

/// Entries after which a key is written in full.
const RESTART_INTERVAL: usize = 16;

/// Bytes after which a block is closed.
const BLOCK_SIZE: usize = 256 << 10;

/// Snappy copies at most 64 bytes for every 3.
const MAX_SNAPPY_RATIO: usize = 22;

/// TensorFlow's CRC-32C of some bytes: rotated, so that a checksum of checksums stays one.
pub fn masked_crc(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

fn damaged(what: &str) -> Fault {
    Fault::Damaged(what.into())
}

/// Shows `visit` every key and value of the table, in the keys' order. Takes the memory of the
/// largest block.
///
/// # Errors
/// Where the table is damaged, or what `visit` finds.
pub fn read<R: Read + Seek>(
    mut file: R,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let size = file.seek(SeekFrom::End(0))?;
    let end = size.checked_sub(FOOTER).ok_or(Fault::Truncated)?;
    file.seek(SeekFrom::Start(end))?;
    let mut footer = [0; FOOTER as usize];
    file.read_exact(&mut footer)?;
    if footer[40..] != MAGIC.to_le_bytes() {
        return Err(damaged("it does not end as a table does"));
    }
    let handles = &mut &footer[..40];
    let meta = Handle::read(handles)?;
    let index = Handle::read(handles)?;
    // LevelDB's order: data, meta index, index. No two blocks share bytes, so that all of them
    // together are no larger than the file.
    let index_block = block(&mut file, index, 0..end)?;
    let mut from = 0;
    let mut last = None;
    entries(&index_block, &mut None, |_, handle| {
        let handle = Handle::read(&mut &handle[..])?;
        let data = block(&mut file, handle, from..meta.offset)?;
        from = handle.offset + handle.size + TRAILER;
        entries(&data, &mut last, &mut visit)
    })?;
    let meta = block(&mut file, meta, from..index.offset)?;
    entries(&meta, &mut None, |_, _| Ok(()))
}

/// Where a block lies, without its trailer.
#[derive(Clone, Copy)]
struct Handle {
    offset: u64,
    size: u64,
}

impl Handle {
    fn read(bytes: &mut &[u8]) -> Result<Handle, Fault> {
        let (offset, size) = (varint(bytes)?, varint(bytes)?);
        Ok(Handle { offset, size })
    }

    fn write(self, bytes: &mut Vec<u8>) {
        put_varint(bytes, self.offset);
        put_varint(bytes, self.size);
    }
}

/// Reads the contents of a block that lies within some bytes of the file.
fn block(
    file: &mut (impl Read + Seek),
    Handle { offset, size }: Handle,
    within: Range<u64>,
) -> Result<Vec<u8>, Fault> {
    let end = offset.checked_add(size);
    let end = end.and_then(|end| end.checked_add(TRAILER));
    if offset < within.start || end.is_none_or(|end| end > within.end) {
        return Err(damaged("a block is not where it should be"));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    let length = size + TRAILER;
    bytes
        .try_reserve_exact(length as usize)
        .map_err(io::Error::other)?;
    file.take(length).read_to_end(&mut bytes)?;
    let (checked, &crc) = bytes.split_last_chunk().ok_or(Fault::Truncated)?;
    if masked_crc(crc32c::crc32c(checked)) != u32::from_le_bytes(crc) {
        return Err(damaged("a block's checksum does not hold"));
    }
    let (&compression, contents) = checked.split_last().ok_or(Fault::Truncated)?;
    match compression {
        0 => {
            bytes.truncate(size as usize);
            Ok(bytes)
        }
        1 => {
            let broken = |_| damaged("a block's compression is broken");
            let length = snap::raw::decompress_len(contents).map_err(broken)?;
            if length / MAX_SNAPPY_RATIO > contents.len() {
                return Err(damaged("a block's compression is broken"));
            }
            let mut decoder = snap::raw::Decoder::new();
            decoder.decompress_vec(contents).map_err(broken)
        }
        other => Err(Fault::Refused(format!(
            "its blocks are compressed in way {other}, which is not known"
        ))),
    }
}

/// Shows `visit` the entries of a block, whose keys follow on `last`.
fn entries(
    block: &[u8],
    last: &mut Option<Vec<u8>>,
    mut visit: impl FnMut(&[u8], &[u8]) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let broken = || damaged("a block is not made of entries");
    let (rest, &restarts) = block.split_last_chunk().ok_or_else(broken)?;
    let restarts = u32::from_le_bytes(restarts) as usize;
    let length = restarts
        .checked_mul(4)
        .and_then(|bytes| rest.len().checked_sub(bytes));
    let mut rest = &rest[..length.ok_or_else(broken)?];
    let mut key = Vec::new();
    while !rest.is_empty() {
        let mut length = || Some(varint(&mut rest).ok()? as usize);
        let (shared, own, value) = (length(), length(), length());
        let (Some(shared), Some(own), Some(value)) = (shared, own, value) else {
            return Err(broken());
        };
        if shared > key.len() || own > rest.len() || value > rest.len() - own {
            return Err(broken());
        }
        key.truncate(shared);
        key.extend_from_slice(&rest[..own]);
        if last.as_ref().is_some_and(|last| *last >= key) {
            return Err(damaged("its keys are out of order"));
        }
        visit(&key, &rest[own..own + value])?;
        rest = &rest[own + value..];
        last.get_or_insert_default().clone_from(&key);
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Fault> {
    prost::encoding::decode_varint(bytes).map_err(|_| damaged("a length is not one"))
}

fn put_varint(bytes: &mut Vec<u8>, value: u64) {
    prost::encoding::encode_varint(value, bytes);
}

/// Writes a table of `entries`, whose keys rise.
///
/// # Errors
/// Those of `w`.
pub fn write<'a>(
    w: &mut dyn Write,
    entries: impl IntoIterator<Item = (&'a [u8], Vec<u8>)>,
) -> io::Result<()> {
    let mut table = Writer {
        w,
        offset: 0,
        index: Block::new(1),
    };
    let mut block = Block::new(RESTART_INTERVAL);
    for (key, value) in entries {
        block.push(key, &value);
        if block.bytes.len() >= BLOCK_SIZE {
            table.data(block)?;
            block = Block::new(RESTART_INTERVAL);
        }
    }
    if block.entries > 0 {
        table.data(block)?;
    }
    let meta = table.block(Block::new(1))?;
    let index = std::mem::replace(&mut table.index, Block::new(1));
    let index = table.block(index)?;
    let mut footer = Vec::new();
    meta.write(&mut footer);
    index.write(&mut footer);
    footer.resize(40, 0);
    footer.extend(MAGIC.to_le_bytes());
    table.w.write_all(&footer)
}

struct Writer<'a> {
    w: &'a mut dyn Write,
    offset: u64,
    index: Block,
}

impl Writer<'_> {
    fn data(&mut self, block: Block) -> io::Result<()> {
        let key = block.last.clone();
        let mut handle = Vec::new();
        self.block(block)?.write(&mut handle);
        self.index.push(&key, &handle);
        Ok(())
    }

    fn block(&mut self, block: Block) -> io::Result<Handle> {
        let mut bytes = block.finish();
        let handle = Handle {
            offset: self.offset,
            size: bytes.len() as u64,
        };
        bytes.push(0);
        bytes.extend(masked_crc(crc32c::crc32c(&bytes)).to_le_bytes());
        self.offset += bytes.len() as u64;
        self.w.write_all(&bytes)?;
        Ok(handle)
    }
}

/// A block that is being written.
struct Block {
    bytes: Vec<u8>,
    restarts: Vec<u32>,
    interval: usize,
    entries: usize,
    last: Vec<u8>,
}

impl Block {
    fn new(interval: usize) -> Block {
        Block {
            bytes: Vec::new(),
            restarts: vec![0],
            interval,
            entries: 0,
            last: Vec::new(),
        }
    }

    fn push(&mut self, key: &[u8], value: &[u8]) {
        let both = key.iter().zip(&self.last);
        let mut shared = both.take_while(|(a, b)| a == b).count();
        if self.entries > 0 && self.entries.is_multiple_of(self.interval) {
            self.restarts.push(self.bytes.len() as u32);
            shared = 0;
        }
        for length in [shared, key.len() - shared, value.len()] {
            put_varint(&mut self.bytes, length as u64);
        }
        self.bytes.extend_from_slice(&key[shared..]);
        self.bytes.extend_from_slice(value);
        self.last = key.to_vec();
        self.entries += 1;
    }

    fn finish(mut self) -> Vec<u8> {
        for restart in &self.restarts {
            self.bytes.extend(restart.to_le_bytes());
        }
        self.bytes
            .extend((self.restarts.len() as u32).to_le_bytes());
        self.bytes
    }
}
