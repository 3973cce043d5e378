//! What a block says of its items before their streams.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use pixelcnn_core::codec::Shape;
use pixelcnn_core::config::MAX_SIDE;
use pixelcnn_core::incremental::LAG;

use super::exact::{Exact, Kind};
use super::fields::{Fields, SUM, varint};
use super::model::Cutting;
use super::names::{check_name, read_name, write_name};

/// Columns of a strip at most; where all pictures of a block are narrower it has fewer.
pub(super) const COLUMNS: usize = 64;
/// And at least.
const LEAST_COLUMNS: usize = LAG;
/// Added to a block's columns where its pictures adapt.
const ADAPTS: usize = 256;
/// The most pixels of a picture that is one stream: attention sees all before each.
pub(super) const WHOLE: usize = 1 << 18;
/// Items of a block at most, and bytes of all but the last: their files and samples.
pub(super) const ITEMS: usize = 1024;
pub(super) const BYTES: usize = 64 << 20;
/// The most bytes of a head, inflated, and streams of a block: none has as many.
const HEAD: u64 = 16 << 20;
const STREAMS: usize = 1 << 20;

/// A sum of an item's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sum {
    pub crc: u32,
    /// The bits of it that were kept.
    pub mask: u32,
}

impl Sum {
    pub fn of(bytes: &[u8]) -> Sum {
        Sum {
            crc: crc32c::crc32c(bytes),
            mask: u32::MAX,
        }
    }

    pub fn is_of(self, bytes: &[u8]) -> bool {
        (crc32c::crc32c(bytes) ^ self.crc) & self.mask == 0
    }
}

/// An item.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub name: String,
    /// Of a file that is kept as it is, none.
    pub picture: Option<Picture>,
    /// Of its file, or of the picture's samples.
    pub sum: Sum,
    /// Bytes of its streams.
    pub lengths: Vec<u64>,
}

/// A picture that the model codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Picture {
    pub height: usize,
    pub width: usize,
    pub class: u32,
    pub kind: Kind,
    pub chunks: Vec<u8>,
}

impl Picture {
    pub fn of(exact: &Exact, class: u32) -> Picture {
        Picture {
            height: exact.height,
            width: exact.width,
            class,
            kind: exact.kind,
            chunks: exact.chunks.clone(),
        }
    }

    /// The layers' shapes.
    pub fn shapes(&self, channels: usize) -> Vec<Shape> {
        let layers = self.kind.layers(channels).into_iter();
        let shape = |places: Vec<usize>| Shape {
            height: self.height,
            width: self.width,
            channels: places.len(),
            class: self.class,
        };
        layers.map(shape).collect()
    }

    /// Whether it can be coded when it is cut so.
    pub fn fits(&self, cutting: Cutting) -> bool {
        let side = 1..=MAX_SIDE;
        side.contains(&self.height)
            && side.contains(&self.width)
            && (cutting.columns.is_some() || self.height * self.width <= WHOLE)
    }

    /// Streams of all layers.
    fn streams(&self, cutting: Cutting) -> usize {
        let shapes = self.shapes(cutting.channels);
        shapes.iter().map(|shape| cutting.streams(shape)).sum()
    }

    /// Bytes of its samples.
    fn bytes(&self) -> usize {
        self.height * self.width * self.kind.bytes_per_pixel()
    }
}

/// Columns of the strips for pictures of which the widest has this width.
pub(super) fn columns_for(widest: usize) -> usize {
    widest.next_power_of_two().clamp(LEAST_COLUMNS, COLUMNS)
}

/// Rows that go by before each stream of a layer begins.
fn begins(cutting: Cutting, shape: Shape) -> Vec<usize> {
    match cutting.columns {
        None => vec![0],
        Some(columns) => shape
            .tiles(columns)
            .iter()
            .map(|tile| tile.begins())
            .collect(),
    }
}

/// The streams of layers in the order in which a decoder wants them: the layer and the number of each.
pub(super) fn order(cutting: Cutting, shapes: &[Shape]) -> Vec<[usize; 2]> {
    let mut order: Vec<[usize; 3]> = Vec::new();
    for (layer, &shape) in shapes.iter().enumerate() {
        let begins = begins(cutting, shape).into_iter().enumerate();
        order.extend(begins.map(|(number, row)| [row, layer, number]));
    }
    order.sort_unstable();
    order
        .into_iter()
        .map(|[_, layer, number]| [layer, number])
        .collect()
}

/// Bytes to be read: where they begin, and how many they are.
pub(super) type Place = [u64; 2];

/// Where all parts' streams are, the first of which begins at 0.
pub(super) fn places(cutting: Cutting, parts: &[Part]) -> Option<Vec<Vec<Place>>> {
    let mut places: Vec<Vec<Place>> = parts
        .iter()
        .map(|part| part.lengths.iter().map(|len| [0, *len]).collect())
        .collect();
    let mut end = 0u64;
    let mut put = |place: &mut Place| {
        place[0] = end;
        end = end.checked_add(place[1])?;
        Some(())
    };
    let (mut shapes, mut firsts) = (Vec::new(), Vec::new());
    for (number, part) in parts.iter().enumerate() {
        let Some(picture) = &part.picture else {
            put(&mut places[number][0])?;
            continue;
        };
        let mut first = 0;
        for shape in picture.shapes(cutting.channels) {
            shapes.push(shape);
            firsts.push([number, first]);
            first += cutting.streams(&shape);
        }
    }
    for [layer, tile] in order(cutting, &shapes) {
        let [number, first] = firsts[layer];
        put(&mut places[number][first + tile])?;
    }
    Some(places)
}

/// The index of a block.
pub(super) fn write(cutting: Cutting, parts: &[Part]) -> Vec<u8> {
    let mut index = Vec::new();
    varint(&mut index, parts.len() as u64);
    let adapts = if cutting.adapts { ADAPTS } else { 0 };
    varint(&mut index, (cutting.columns.unwrap_or(0) + adapts) as u64);
    index.extend(parts.iter().flat_map(|part| part.sum.crc.to_le_bytes()));
    let mut deflated = DeflateEncoder::new(index, Compression::best());
    let deflated = deflated
        .write_all(&head(parts))
        .and_then(|()| deflated.finish());
    deflated.expect("a vector takes all bytes")
}

fn head(parts: &[Part]) -> Vec<u8> {
    let mut head = Vec::new();
    let mut before = "";
    for part in parts {
        write_name(&mut head, before, &part.name);
        before = &part.name;
    }
    let kind = |part: &Part| {
        let picture = part.picture.as_ref();
        picture.map_or(0, |picture| 1 + picture.kind.number())
    };
    head.extend(parts.iter().map(kind));
    let pictures = || parts.iter().filter_map(|part| part.picture.as_ref());
    for picture in pictures() {
        for number in [
            picture.height as u64,
            picture.width as u64,
            picture.class.into(),
            picture.chunks.len() as u64,
        ] {
            varint(&mut head, number);
        }
    }
    pictures().for_each(|picture| head.extend(&picture.chunks));
    let lengths = || parts.iter().flat_map(|part| &part.lengths);
    head.extend(lengths().map(|len| *len as u8));
    lengths().for_each(|len| varint(&mut head, len >> 8));
    head
}

/// Reads an index of a model of so many channels; none where this program makes no such.
pub(super) fn read(index: &[u8], channels: usize) -> Option<(Cutting, Vec<Part>)> {
    let mut fields = Fields(index);
    let count = fields.number().filter(|count| *count <= ITEMS as u64)?;
    let columns = fields.number()? as usize;
    let (adapts, columns) = match columns.checked_sub(ADAPTS) {
        Some(columns) => (true, columns),
        None => (false, columns),
    };
    let columns = match columns {
        0 => None,
        n if n.is_power_of_two() && (LEAST_COLUMNS..=COLUMNS).contains(&n) => Some(n),
        _ => return None,
    };
    let cutting = Cutting {
        columns,
        channels,
        adapts,
    };
    let sums = fields.take(count as usize * SUM)?;
    let mut head = Vec::new();
    let inflated = DeflateDecoder::new(fields.0)
        .take(HEAD)
        .read_to_end(&mut head);
    if inflated.ok()? as u64 == HEAD {
        return None;
    }
    Some((cutting, parse(&head, sums, cutting)?))
}

fn parse(head: &[u8], sums: &[u8], cutting: Cutting) -> Option<Vec<Part>> {
    let mut head = Fields(head);
    let mut parts: Vec<Part> = Vec::new();
    for sum in sums.chunks_exact(SUM) {
        let before = parts.last().map_or("", |part| &part.name);
        let name = read_name(&mut head, before)?;
        check_name(&name).ok()?;
        parts.push(Part {
            name,
            picture: None,
            sum: Sum {
                crc: u32::from_le_bytes(sum.try_into().ok()?),
                mask: u32::MAX,
            },
            lengths: Vec::new(),
        });
    }
    let kinds = head.take(parts.len())?;
    let mut chunks = Vec::new();
    let (mut streams, mut widest, mut bytes, mut last) = (0, 1, 0, 0);
    for (part, kind) in parts.iter_mut().zip(kinds) {
        let Some(kind) = kind.checked_sub(1) else {
            streams += 1;
            continue;
        };
        let kind = Kind::of(kind)?;
        let [height, width] = [head.number()? as usize, head.number()? as usize];
        let picture = Picture {
            height,
            width,
            class: head.number()? as u32,
            kind,
            chunks: Vec::new(),
        };
        chunks.push(head.number()? as usize);
        if !picture.fits(cutting) {
            return None;
        }
        streams += picture.streams(cutting);
        widest = widest.max(width);
        last = picture.bytes();
        bytes += last;
        part.picture = Some(picture);
    }
    let is_narrow = cutting
        .columns
        .is_some_and(|columns| columns < columns_for(widest));
    if is_narrow || streams > STREAMS || bytes - last > BYTES {
        return None;
    }
    let pictures = parts.iter_mut().filter_map(|part| part.picture.as_mut());
    for (picture, len) in pictures.zip(chunks) {
        picture.chunks = head.take(len)?.to_vec();
    }
    let mut lowest = head.take(streams)?.iter();
    for part in &mut parts {
        let streams = part
            .picture
            .as_ref()
            .map_or(1, |picture| picture.streams(cutting));
        for low in lowest.by_ref().take(streams) {
            part.lengths.push(head.number()? << 8 | u64::from(*low));
        }
    }
    head.0.is_empty().then_some(parts)
}
