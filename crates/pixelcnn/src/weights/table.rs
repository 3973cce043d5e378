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

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    pub type Entries = Vec<(Vec<u8>, Vec<u8>)>;

    pub fn written(entries: &Entries) -> Vec<u8> {
        let mut file = Vec::new();
        let entries = entries.iter().map(|(key, value)| (&key[..], value.clone()));
        write(&mut file, entries).unwrap();
        file
    }

    pub fn entries_of(file: &[u8]) -> Result<Entries, Fault> {
        let mut entries = Entries::new();
        read(Cursor::new(file), |key, value| {
            entries.push((key.to_vec(), value.to_vec()));
            Ok(())
        })?;
        Ok(entries)
    }

    /// A table of one block that `compress` has made of type `kind`, with checksums that hold.
    pub fn of_one_block(
        entries: &Entries,
        kind: u8,
        compress: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Vec<u8> {
        let mut block = Block::new(RESTART_INTERVAL);
        entries
            .iter()
            .for_each(|(key, value)| block.push(key, value));
        let key = block.last.clone();
        let mut file = Vec::new();
        let mut put = |mut bytes: Vec<u8>, kind: u8| {
            let handle = Handle {
                offset: file.len() as u64,
                size: bytes.len() as u64,
            };
            bytes.push(kind);
            bytes.extend(masked_crc(crc32c::crc32c(&bytes)).to_le_bytes());
            file.extend(bytes);
            let mut written = Vec::new();
            handle.write(&mut written);
            written
        };
        let data = put(compress(&block.finish()), kind);
        let meta = put(Block::new(1).finish(), 0);
        let mut index = Block::new(1);
        index.push(&key, &data);
        let index = put(index.finish(), 0);
        let mut footer = [meta, index].concat();
        footer.resize(40, 0);
        footer.extend(MAGIC.to_le_bytes());
        [file, footer].concat()
    }

    pub fn snappy(bytes: &[u8]) -> Vec<u8> {
        snap::raw::Encoder::new().compress_vec(bytes).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn tables_come_back(
            entries: BTreeMap<Vec<u8>, Vec<u8>>,
            long in 0usize..600_000,
        ) {
            let mut entries: Entries = entries.into_iter().collect();
            // More than one block.
            entries.push((vec![0xff; 300], vec![7; long]));
            entries.push((vec![0xff; 301], vec![8; 3]));
            prop_assert_eq!(entries_of(&written(&entries)).unwrap(), entries.clone());
            let compressed = of_one_block(&entries, 1, snappy);
            prop_assert_eq!(entries_of(&compressed).unwrap(), entries);
        }

        #[test]
        fn garbage_never_panics(garbage: Vec<u8>, handles: [u8; 40]) {
            let _ = entries_of(&garbage);
            let end = MAGIC.to_le_bytes();
            let _ = entries_of(&[&garbage[..], &handles, &end].concat());
            // Nonsense whose checksum holds.
            let entry = (b"key".to_vec(), b"value".to_vec());
            for kind in 0..2 {
                let _ = entries_of(&of_one_block(&vec![entry.clone()], kind, |_| garbage.clone()));
            }
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        let entry = |n: u8| (vec![n / 10, n], vec![n; 9]);
        let entries: Entries = (0..40).map(entry).collect();
        for file in [written(&entries), of_one_block(&entries, 1, snappy)] {
            for at in 0..file.len() {
                for bit in 0..8 {
                    let mut flipped = file.clone();
                    flipped[at] ^= 1 << bit;
                    match entries_of(&flipped) {
                        Ok(found) => assert_eq!(found, entries, "bit {bit} of byte {at}"),
                        Err(Fault::Damaged(_) | Fault::Truncated) => {}
                        Err(other) => panic!("bit {bit} of byte {at}: {other}"),
                    }
                }
                assert!(entries_of(&file[..at]).is_err(), "cut after {at}");
            }
        }
    }

    #[test]
    fn what_claims_to_be_large_takes_no_memory() {
        let entries = vec![(b"key".to_vec(), b"value".to_vec())];
        let bomb = |_: &[u8]| vec![0xff, 0xff, 0xff, 0xff, 0x0f];
        let error = entries_of(&of_one_block(&entries, 1, bomb)).unwrap_err();
        assert!(matches!(error, Fault::Damaged(_)), "{error}");
        let error = entries_of(&of_one_block(&entries, 2, bomb)).unwrap_err();
        assert!(matches!(error, Fault::Refused(_)), "{error}");
        // Two index entries for the same block.
        let mut block = Block::new(1);
        block.push(b"a", b"");
        let block = block.finish();
        let mut index = Block::new(1);
        index.push(b"a", &[0, block.len() as u8]);
        index.push(b"b", &[0, block.len() as u8]);
        let mut file = Vec::new();
        let mut footer = Vec::new();
        for (n, mut bytes) in [block, Block::new(1).finish(), index.finish()]
            .into_iter()
            .enumerate()
        {
            if n > 0 {
                let (offset, size) = (file.len() as u64, bytes.len() as u64);
                Handle { offset, size }.write(&mut footer);
            }
            bytes.push(0);
            bytes.extend(masked_crc(crc32c::crc32c(&bytes)).to_le_bytes());
            file.extend(bytes);
        }
        footer.resize(40, 0);
        footer.extend(MAGIC.to_le_bytes());
        file.extend(footer);
        let error = entries_of(&file).unwrap_err().to_string();
        assert!(
            error.contains("a block is not where it should be"),
            "{error}"
        );
    }
}
