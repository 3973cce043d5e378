//! Items that are compressed side by side.

use std::io::{Read, Seek, Write};
use std::iter::Peekable;
use std::ops::ControlFlow;

use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use pixelcnn_core::codec::{Shape, TILE};
use pixelcnn_core::config::MAX_SIDE;
use pixelcnn_core::incremental::LAG;

use super::exact::{Exact, Kind};
use super::{Entry, Found, summed};
use crate::compress::{
    CHECKSUM, CodingModel, CompressError, Damage, Fields, checksum, read, read_name, varint,
    write_name,
};

/// Columns of a strip at most; of narrower pictures it has fewer.
const COLUMNS: usize = 64;
/// And at least.
const LEAST_COLUMNS: usize = LAG;
/// How a block begins, and the end.
pub(super) const MARKER: &[u8; 4] = b"pxcB";
pub(super) const END: &[u8; 4] = b"pxcE";
/// No start of a block, before its head, is longer.
const MAX_START: u64 = 4 + 3 * 5;
/// Bytes of a sum.
pub(super) const SUM: usize = 4;
/// Strips of a block: no more are begun than these, but those of one item.
const STRIPS: usize = 64;
/// Items of a block at most, and bytes of their files if it is not one item.
const ITEMS: usize = 1024;
const BYTES: usize = 64 << 20;
/// Bytes of chunks that a picture has at most, else its file is kept as it is; and all before a block's last.
const CHUNKS: usize = 4 << 20;
/// The most bytes of a head, inflated, and streams of a block: none has as many.
const HEAD: u64 = 16 << 20;
const STREAMS: usize = 1 << 20;

/// A file to compress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its name in the archive: a relative path, its parts separated by `/`.
    pub name: String,
    /// Its class as a picture; any value for an unconditional model.
    pub class: u32,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// What a block has of an item.
#[derive(Debug, Clone)]
struct Part {
    name: String,
    /// Of a file that is kept as it is, none.
    picture: Option<Picture>,
    checksum: [u8; CHECKSUM],
    /// Of each of its streams where it begins and how long it is, in the file; when encoding, the streams.
    streams: Vec<[u64; 2]>,
}

#[derive(Debug, Clone)]
struct Picture {
    height: usize,
    width: usize,
    class: u32,
    kind: Kind,
    chunks: Vec<u8>,
}

impl Picture {
    /// The layers' shapes.
    fn shapes(&self, channels: usize) -> Vec<Shape> {
        let layers = self.kind.layers(channels).into_iter();
        let shape = |places: Vec<usize>| Shape {
            height: self.height,
            width: self.width,
            channels: places.len(),
            class: self.class,
        };
        layers.map(shape).collect()
    }

    /// Streams of all layers.
    fn streams(&self, channels: usize, columns: usize) -> usize {
        let tiles = match columns {
            0 => 1,
            columns => self.width.div_ceil(columns) * self.height.div_ceil(TILE),
        };
        self.kind.layers(channels).len() * tiles
    }
}

/// The tiles of a layer, when each begins: with strips of no columns it is one.
fn tiles(shape: Shape, columns: usize) -> Vec<[usize; 2]> {
    match columns {
        0 => vec![[0, 0]],
        columns => shape.tiles(columns),
    }
}

/// What pictures are cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Columns of a strip; 0 where pictures are coded whole.
    pub columns: usize,
    /// Of the model.
    pub channels: usize,
}

/// A block: of a file that is being read, or that is being written.
#[derive(Debug)]
pub(super) struct Block {
    columns: usize,
    parts: Vec<Part>,
    end: u64,
    /// Of a block to be written, what is in the items.
    contents: Vec<(Item, Option<Exact>)>,
}

impl Block {
    /// Takes as many items as make a block, one at least where there are any.
    pub fn of(model: &CodingModel, items: &mut Peekable<impl Iterator<Item = Item>>) -> Block {
        let (mut contents, mut strips, mut widest) = (Vec::new(), 0, 1);
        let (mut bytes, mut chunks) = (0, 0);
        while let Some(item) = items.next_if(|item| {
            let few = strips < STRIPS && contents.len() < ITEMS && chunks <= CHUNKS;
            contents.is_empty() || few && bytes + item.bytes.len() <= BYTES
        }) {
            let exact = Exact::read(&item.bytes);
            let side = 1..=MAX_SIDE;
            let exact = exact.filter(|exact| {
                let sides = side.contains(&exact.height) && side.contains(&exact.width);
                sides && exact.chunks.len() <= CHUNKS
            });
            bytes += item.bytes.len();
            if let Some(exact) = &exact {
                let layers = exact.kind.layers(model.config().channels).len();
                strips += layers * exact.width.div_ceil(COLUMNS);
                widest = widest.max(exact.width);
                bytes += exact.samples.len();
                chunks += exact.chunks.len();
            }
            contents.push((item, exact));
        }
        let columns = widest.next_power_of_two().clamp(LEAST_COLUMNS, COLUMNS);
        Block {
            columns: if model.config().attends() { 0 } else { columns },
            parts: Vec::new(),
            end: 0,
            contents,
        }
    }

    /// Whether its pictures are coded whole.
    pub fn is_whole(&self) -> bool {
        self.columns == 0
    }

    /// Items in it.
    pub fn len(&self) -> usize {
        self.contents.len().max(self.parts.len())
    }

    /// Where it ends in the file.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Its bytes.
    pub fn encode(
        self,
        model: &CodingModel,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<u8>, CompressError> {
        let channels = model.config().channels;
        let mut layers: Vec<(Shape, Vec<u8>)> = Vec::new();
        let mut of_item: Vec<usize> = Vec::new();
        for (number, (item, exact)) in self.contents.iter().enumerate() {
            for places in exact.iter().flat_map(|exact| exact.kind.layers(channels)) {
                let exact = exact.as_ref().expect("whose layers these are");
                let shape = Shape {
                    height: exact.height,
                    width: exact.width,
                    channels: places.len(),
                    class: item.class,
                };
                layers.push((shape, exact.layer(&places)));
                of_item.push(number);
            }
        }
        let streams = model.encode_layers(self.columns, &layers, progress)?;
        let mut streams = streams.into_iter();
        // What each comes to: as the model has it, or as it is where that is smaller.
        let (mut parts, mut kept, mut of_layers) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (item, exact)) in self.contents.into_iter().enumerate() {
            let own = of_item.iter().filter(|of| **of == number).count();
            let own: Vec<Vec<Vec<u8>>> = streams.by_ref().take(own).collect();
            let coded = own
                .iter()
                .flatten()
                .map(|stream| stream.len() + 1)
                .sum::<usize>();
            let exact = exact.filter(|exact| coded + exact.chunks.len() < item.bytes.len());
            let lengths = |bytes: &[u8]| [0, bytes.len() as u64];
            parts.push(Part {
                name: item.name,
                checksum: match &exact {
                    None => checksum(&item.bytes),
                    Some(exact) => checksum(&exact.samples),
                },
                streams: match &exact {
                    None => vec![lengths(&item.bytes)],
                    Some(_) => own.iter().flatten().map(|stream| lengths(stream)).collect(),
                },
                picture: exact.as_ref().map(|exact| Picture {
                    height: exact.height,
                    width: exact.width,
                    class: item.class,
                    kind: exact.kind,
                    chunks: exact.chunks.clone(),
                }),
            });
            match exact {
                None => kept.push(item.bytes),
                Some(_) => of_layers.extend(own),
            }
        }
        let mut block = MARKER.to_vec();
        let head = head(&parts);
        for number in [parts.len(), self.columns, head.len()] {
            varint(&mut block, number as u64);
        }
        block.extend(head);
        parts.iter().for_each(|part| block.extend(part.checksum));
        let mut block = summed(block);
        kept.iter().for_each(|bytes| block.extend(bytes));
        let shapes = parts.iter().filter_map(|part| part.picture.as_ref());
        let shapes: Vec<Shape> = shapes
            .flat_map(|picture| picture.shapes(channels))
            .collect();
        for [layer, tile] in order(&shapes, self.columns) {
            block.extend(&of_layers[layer][tile]);
        }
        Ok(block)
    }

    /// Reads the head of a block that begins at a place; none where it is damaged.
    pub fn read(
        source: &mut (impl Read + Seek),
        start: u64,
        size: u64,
        channels: usize,
    ) -> Result<Option<Block>, CompressError> {
        let front = read(source, start, (size - start).min(MAX_START))?;
        let mut fields = Fields(&front[MARKER.len()..]);
        let [Some(count), Some(columns), Some(len)] = [(); 3].map(|()| fields.number()) else {
            return Ok(None);
        };
        let columns = columns as usize;
        let known = columns == 0
            || columns.is_power_of_two() && (LEAST_COLUMNS..=COLUMNS).contains(&columns);
        if !known {
            return Ok(None);
        }
        let layout = Layout { columns, channels };
        let begin = (front.len() - fields.0.len()) as u64;
        let checked = begin + len + count * CHECKSUM as u64;
        if checked + SUM as u64 > size - start {
            return Ok(None);
        }
        let front = read(source, start, checked + SUM as u64)?;
        let (front, sum) = front.split_at(checked as usize);
        if sum != crc32c::crc32c(front).to_le_bytes() {
            return Ok(None);
        }
        let (deflated, checksums) = front[begin as usize..].split_at(len as usize);
        let mut head = Vec::new();
        let inflated = DeflateDecoder::new(deflated)
            .take(HEAD)
            .read_to_end(&mut head);
        if inflated.is_err() || head.len() as u64 == HEAD {
            return Ok(None);
        }
        let start = start + checked + SUM as u64;
        Ok(parse(&head, checksums, start, layout))
    }

    /// What is in it, as block of a number.
    pub fn entries(&self, number: usize) -> impl Iterator<Item = Entry> {
        let parts = self.parts.iter().enumerate();
        parts.map(move |(place, part)| {
            let picture = part.picture.as_ref();
            Entry {
                name: part.name.clone(),
                class: picture.map_or(0, |picture| picture.class),
                size: picture.map(|picture| [picture.height, picture.width]),
                bytes: part.streams.iter().map(|[_, len]| len).sum(),
                place: [number, place],
            }
        })
    }

    /// Takes some of its items out.
    pub fn decode(
        &self,
        model: &CodingModel,
        items: &[usize],
        source: &mut (impl Read + Seek),
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Result<Found, Damage>>, CompressError> {
        let (channels, nr_classes) = (model.config().channels, model.config().nr_classes);
        let size = source
            .seek(std::io::SeekFrom::End(0))
            .map_err(CompressError::Read)?;
        let mut found = vec![Err(Damage::Cut); items.len()];
        let (mut shapes, mut streams, mut of_item) = (Vec::new(), Vec::new(), Vec::new());
        for (place, &item) in items.iter().enumerate() {
            let part = &self.parts[item];
            let whole = part.streams.iter().all(|[start, len]| start + len <= size);
            match &part.picture {
                _ if !whole => {}
                None => {
                    let [start, len] = part.streams[0];
                    let bytes = read(source, start, len)?;
                    found[place] = match checksum(&bytes) == part.checksum {
                        true => Ok(Found {
                            bytes,
                            is_made: false,
                        }),
                        false => Err(Damage::Altered),
                    };
                }
                Some(picture) if nr_classes > 0 && picture.class as usize >= nr_classes => {
                    found[place] = Err(Damage::Altered);
                }
                Some(picture) => {
                    let mut own = part.streams.iter();
                    for shape in picture.shapes(channels) {
                        let tiles = tiles(shape, self.columns).len();
                        streams.push(own.by_ref().take(tiles).copied().collect::<Vec<_>>());
                        shapes.push(shape);
                    }
                    of_item.push(place);
                }
            }
        }
        let mut failed = None;
        let mut stream = |layer: usize, tile: usize| {
            let [start, len] = streams[layer][tile];
            match read(source, start, len) {
                Ok(bytes) => Some(bytes),
                Err(error) => {
                    failed = Some(error);
                    None
                }
            }
        };
        let layers = model.decode_layers(self.columns, &shapes, &mut stream, progress)?;
        if let Some(error) = failed {
            return Err(error);
        }
        let mut layers = layers.into_iter();
        for place in of_item {
            let part = &self.parts[items[place]];
            let picture = part.picture.as_ref().expect("of which these are layers");
            let places = picture.kind.layers(channels);
            let own: Vec<Option<Vec<u8>>> = layers.by_ref().take(places.len()).collect();
            let made = made(picture, &places, own, part.checksum);
            found[place] = made.ok_or(Damage::Altered);
        }
        Ok(found)
    }
}

/// The PNG file of a picture, if these are its layers.
fn made(
    picture: &Picture,
    places: &[Vec<usize>],
    layers: Vec<Option<Vec<u8>>>,
    sum: [u8; CHECKSUM],
) -> Option<Found> {
    let Picture {
        height,
        width,
        kind,
        ref chunks,
        ..
    } = *picture;
    let mut exact = Exact {
        height,
        width,
        kind,
        samples: vec![0; height * width * kind.bytes_per_pixel()],
        chunks: chunks.clone(),
    };
    for (places, layer) in places.iter().zip(layers) {
        exact.put(places, &layer?);
    }
    let bytes = (checksum(&exact.samples) == sum).then(|| exact.png())??;
    Some(Found {
        bytes,
        is_made: true,
    })
}

/// The layers' tiles in the order in which they begin: the layer and the number of each.
fn order(shapes: &[Shape], columns: usize) -> Vec<[usize; 2]> {
    let mut order: Vec<([usize; 2], [usize; 2])> = Vec::new();
    for (layer, &shape) in shapes.iter().enumerate() {
        for (number, [band, strip]) in tiles(shape, columns).into_iter().enumerate() {
            let row = band * TILE + strip * LAG;
            order.push(([row, layer], [layer, number]));
        }
    }
    order.sort_by_key(|(key, _)| *key);
    order.into_iter().map(|(_, tile)| tile).collect()
}

/// The head of a block, deflated.
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
    let lengths = || {
        parts
            .iter()
            .flat_map(|part| &part.streams)
            .map(|[_, len]| *len)
    };
    head.extend(lengths().map(|len| len as u8));
    lengths().for_each(|len| varint(&mut head, len >> 8));
    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::best());
    let deflated = deflated.write_all(&head).and_then(|()| deflated.finish());
    deflated.expect("a vector takes all bytes")
}

/// What a head tells of a block whose streams begin at a place.
fn parse(head: &[u8], checksums: &[u8], start: u64, layout: Layout) -> Option<Block> {
    let mut head = Fields(head);
    let mut parts: Vec<Part> = Vec::new();
    for sum in checksums.chunks_exact(CHECKSUM) {
        let before = parts.last().map_or("", |part| &part.name);
        parts.push(Part {
            name: read_name(&mut head, before)?,
            picture: None,
            checksum: sum.try_into().ok()?,
            streams: Vec::new(),
        });
    }
    let kinds = head.take(parts.len())?.to_vec();
    let mut lengths = Vec::new();
    for (part, kind) in parts.iter_mut().zip(kinds) {
        let Some(kind) = kind.checked_sub(1) else {
            continue;
        };
        let kind = Kind::of(kind)?;
        let [height, width, class, len] = [(); 4].map(|()| head.number());
        let (height, width) = (height?, width?);
        let side = 1..=MAX_SIDE as u64;
        if !side.contains(&height) || !side.contains(&width) {
            return None;
        }
        part.picture = Some(Picture {
            height: height as usize,
            width: width as usize,
            class: class? as u32,
            kind,
            chunks: Vec::new(),
        });
        lengths.push(len? as usize);
    }
    let pictures = parts.iter_mut().filter_map(|part| part.picture.as_mut());
    for (picture, len) in pictures.zip(lengths) {
        picture.chunks = head.take(len)?.to_vec();
    }
    let end = place_streams(&mut parts, head, start, layout)?;
    Some(Block {
        columns: layout.columns,
        end,
        parts,
        contents: Vec::new(),
    })
}

/// Tells where the streams of all parts lie, from a place on, whose lengths are what is left of a head; gives
/// where they end.
fn place_streams(parts: &mut [Part], mut head: Fields, start: u64, layout: Layout) -> Option<u64> {
    let Layout { columns, channels } = layout;
    let count = |part: &Part| match &part.picture {
        None => 1,
        Some(picture) => picture.streams(channels, columns),
    };
    let counts: Vec<usize> = parts.iter().map(count).collect();
    let total: usize = counts.iter().sum();
    let lowest = head
        .take(Some(total).filter(|total| *total <= STREAMS)?)?
        .iter();
    let mut lengths = Vec::new();
    for low in lowest {
        lengths.push(head.number()? << 8 | u64::from(*low));
    }
    if !head.0.is_empty() {
        return None;
    }
    let mut lengths = lengths.into_iter();
    for (part, count) in parts.iter_mut().zip(counts) {
        part.streams = lengths.by_ref().take(count).map(|len| [0, len]).collect();
    }
    let mut end = start;
    let mut place = |stream: &mut [u64; 2]| {
        stream[0] = end;
        end = end.checked_add(stream[1])?;
        Some(())
    };
    let files = parts.iter_mut().filter(|part| part.picture.is_none());
    files
        .flat_map(|part| &mut part.streams)
        .try_for_each(&mut place)?;
    let pictures = parts.iter().enumerate();
    let pictures = pictures.filter_map(|(number, part)| Some((number, part.picture.as_ref()?)));
    let mut layers: Vec<(Shape, [usize; 2])> = Vec::new();
    for (number, picture) in pictures {
        let mut first = 0;
        for shape in picture.shapes(channels) {
            layers.push((shape, [number, first]));
            first += tiles(shape, columns).len();
        }
    }
    let shapes: Vec<Shape> = layers.iter().map(|(shape, _)| *shape).collect();
    for [layer, tile] in order(&shapes, columns) {
        let (_, [part, first]) = layers[layer];
        place(&mut parts[part].streams[first + tile])?;
    }
    Some(end)
}
