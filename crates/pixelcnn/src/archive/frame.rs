//! The front of an archive, and how its blocks begin.

use super::fields::{Fields, SUM, varint};
use super::model::ModelHash;

/// How an archive begins, before its version.
pub(super) const MAGIC: &[u8; 3] = b"pxc";
/// The version that is written.
pub(super) const VERSION: u8 = 2;
/// Bytes of the front.
pub(super) const FRONT: usize = MAGIC.len() + 1 + 16 + 4 + 1 + SUM;
/// How a block begins.
pub(super) const MARKER: &[u8; 4] = b"pxcB";
/// A block's start is no longer.
pub(super) const MAX_START: usize = MARKER.len() + 1 + 10 + SUM;

/// What is known of an archive from its front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Front {
    pub hash: ModelHash,
    /// Tells its blocks from those of archives in it: all sums go on from it.
    pub id: u32,
    /// Of the model.
    pub channels: usize,
}

/// What a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The last one: the number of all items.
    End,
    /// Items.
    Items,
    /// The model.
    Model,
    /// What newer programs write, and others can't do without.
    Newer,
    /// And what others can.
    Aside,
}

/// The start of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Start {
    pub kind: Kind,
    /// Bytes of the start, and of what follows.
    pub len: usize,
    pub body: u64,
}

/// CRC-32C of bytes of an archive, little-endian.
pub(super) fn sum(id: u32, bytes: &[u8]) -> [u8; SUM] {
    crc32c::crc32c_append(id, bytes).to_le_bytes()
}

impl Front {
    pub fn write(&self) -> Vec<u8> {
        let mut front = [&MAGIC[..], &[VERSION], &self.fields()].concat();
        front.extend(sum(0, &front));
        front
    }

    fn fields(&self) -> Vec<u8> {
        let mut fields = [&self.hash.0[..], &self.id.to_le_bytes()].concat();
        fields.push(self.channels as u8);
        fields
    }

    fn of_fields(fields: &mut Fields) -> Option<Front> {
        let front = Front {
            hash: ModelHash(fields.take(16)?.try_into().ok()?),
            id: u32::from_le_bytes(fields.take(4)?.try_into().ok()?),
            channels: fields.take(1)?[0].into(),
        };
        [1, 3].contains(&front.channels).then_some(front)
    }

    /// Reads the front; none where it was altered.
    pub fn read(front: &[u8; FRONT]) -> Option<Front> {
        let (checked, crc) = front.split_at(FRONT - SUM);
        let front = Front::of_fields(&mut Fields(&checked[MAGIC.len() + 1..]));
        front.filter(|_| crc == sum(0, checked))
    }

    /// The last block, of an archive of so many items.
    pub fn end(&self, items: usize) -> Vec<u8> {
        let mut body = self.fields();
        varint(&mut body, items as u64);
        let body = self.summed(body);
        [self.start(Kind::End, body.len()), body].concat()
    }

    /// The number of items that the body of the last block tells of; none where it was altered.
    pub fn read_end(&self, body: &[u8]) -> Option<u64> {
        let mut fields = Fields(self.unsummed(body)?);
        let front = Front::of_fields(&mut fields)?;
        fields.number().filter(|_| front == *self)
    }

    /// What the last block says of the front, if that lies in some of the file's last bytes.
    pub fn of_end(bytes: &[u8]) -> Option<Front> {
        let starts = bytes.windows(MARKER.len()).enumerate().rev();
        let mut starts = starts.filter(|(_, bytes)| bytes == MARKER);
        starts.find_map(|(at, _)| {
            let block = &bytes[at..];
            // The length is a byte.
            let mut fields = Fields(block.get(MARKER.len() + 2 + SUM..)?);
            let front = Front::of_fields(&mut fields)?;
            let start = front.read_start(block)?;
            if start.kind != Kind::End {
                return None;
            }
            let body = block.get(start.len..)?.get(..start.body as usize)?;
            front.read_end(body).map(|_| front)
        })
    }

    /// The start of a block with so many bytes.
    pub fn start(&self, kind: Kind, body: usize) -> Vec<u8> {
        let kind = match kind {
            Kind::End => 0,
            Kind::Items => 1,
            Kind::Model => 2,
            Kind::Newer | Kind::Aside => unreachable!("nobody writes such"),
        };
        let mut start = [&MARKER[..], &[kind]].concat();
        varint(&mut start, body as u64);
        start.extend(sum(self.id, &start));
        start
    }

    /// Reads the start of a block; none where there is none.
    pub fn read_start(&self, bytes: &[u8]) -> Option<Start> {
        let mut fields = Fields(bytes.strip_prefix(MARKER)?);
        let kind = match fields.take(1)?[0] {
            0 => Kind::End,
            1 => Kind::Items,
            2 => Kind::Model,
            3..128 => Kind::Newer,
            128.. => Kind::Aside,
        };
        let body = fields.bits(63)?;
        let checked = bytes.len() - fields.0.len();
        let start = Start {
            kind,
            len: checked + SUM,
            body,
        };
        (fields.take(SUM)? == sum(self.id, &bytes[..checked])).then_some(start)
    }

    /// Bytes with their sum.
    pub fn summed(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend(sum(self.id, &bytes));
        bytes
    }

    /// Bytes without their sum; none where it is another.
    pub fn unsummed<'a>(&self, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (bytes, crc) = bytes.split_at(bytes.len().checked_sub(SUM)?);
        (crc == sum(self.id, bytes)).then_some(bytes)
    }
}
