//! Archives being written.

use std::collections::HashSet;
use std::io::Write;
use std::ops::ControlFlow;

use pixelcnn_core::Stopped;
use pixelcnn_core::codec::{CodecError, Shape};
use serde::{Deserialize, Serialize};

use super::exact::Exact;
use super::fields::varint;
use super::frame::{Front, Kind};
use super::index::{self, BYTES, COLUMNS, ITEMS, Part, Picture, Sum, columns_for};
use super::model::{CodingModel, Cutting, ModelHash};
use super::names::check_new_name;
use super::{ArchiveError, embedded};
use crate::Model;

/// Strips of a block: no more are begun than these, but those of one item.
const STRIPS: usize = 64;
/// Bytes of chunks that a picture has at most, else its file is kept as it is; and all before a block's last.
const CHUNKS: usize = 4 << 20;

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

impl Item {
    /// A picture of these levels, u8 \[height, width, channels\] with 1 or 3 channels, as a file of the PNM
    /// format.
    ///
    /// # Panics
    /// If they are more or fewer than the shape says.
    pub fn of_levels(name: &str, class: u32, shape: [usize; 3], levels: &[u8]) -> Item {
        let [height, width, channels] = shape;
        assert_eq!(
            levels.len(),
            shape.iter().product::<usize>(),
            "levels of a picture"
        );
        let kind = if channels == 1 { 5 } else { 6 };
        let head = format!("P{kind}\n{width} {height}\n255\n");
        Item {
            name: name.into(),
            class,
            bytes: [head.as_bytes(), levels].concat(),
        }
    }
}

/// Puts items together that become a block, whatever there is of memory and threads: the archive has the same
/// bytes everywhere.
#[derive(Debug)]
pub struct Grouping {
    attends: bool,
    /// Of the model.
    channels: usize,
    so_far: SoFar,
}

/// What is put together already.
#[derive(Debug, Default)]
struct SoFar {
    items: Vec<(Item, Option<Exact>)>,
    strips: usize,
    widest: usize,
    bytes: usize,
    chunks: usize,
}

impl Grouping {
    /// For a model.
    pub fn new(model: &CodingModel) -> Grouping {
        Grouping {
            attends: model.config().attends(),
            channels: model.config().channels,
            so_far: SoFar::default(),
        }
    }

    fn cutting(&self, widest: usize) -> Cutting {
        Cutting {
            columns: (!self.attends).then(|| columns_for(widest)),
            channels: self.channels,
            adapts: true,
        }
    }

    /// Takes the next item; gives those before it if they make a block without it.
    pub fn push(&mut self, item: Item) -> Option<Group> {
        let SoFar {
            ref items,
            strips,
            bytes,
            chunks,
            ..
        } = self.so_far;
        let few = strips < STRIPS && items.len() < ITEMS && chunks <= CHUNKS;
        let full = !few || bytes + item.bytes.len() > BYTES;
        let group = if full { self.finish() } else { None };
        let exact = Exact::read(&item.bytes).filter(|exact| {
            let cutting = self.cutting(exact.width);
            exact.chunks.len() <= CHUNKS && Picture::of(exact, item.class).fits(cutting)
        });
        let so_far = &mut self.so_far;
        so_far.bytes += item.bytes.len();
        if let Some(exact) = &exact {
            let layers = exact.kind.layers(self.channels).len();
            so_far.strips += layers * exact.width.div_ceil(COLUMNS);
            so_far.widest = so_far.widest.max(exact.width);
            so_far.bytes += exact.samples.len();
            so_far.chunks += exact.chunks.len();
        }
        so_far.items.push((item, exact));
        group
    }

    /// What is left.
    pub fn finish(&mut self) -> Option<Group> {
        let SoFar { items, widest, .. } = std::mem::take(&mut self.so_far);
        let cutting = self.cutting(widest);
        (!items.is_empty()).then_some(Group { cutting, items })
    }
}

/// Items that become a block.
#[derive(Debug)]
pub struct Group {
    cutting: Cutting,
    items: Vec<(Item, Option<Exact>)>,
}

/// A block that was coded: as bytes once [`Writer::write`] has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coded {
    /// Of each item the name, whether it is a picture coded by the model, and the CRC-32C of its file.
    items: Vec<(String, bool, u32)>,
    index: Vec<u8>,
    streams: Vec<u8>,
    /// Levels of the pictures.
    levels: u64,
    /// Bytes of the other items.
    kept: u64,
}

impl Coded {
    /// Items in it.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// Those that are pictures coded by the model: the others are files as they were.
    pub fn pictures(&self) -> usize {
        self.items
            .iter()
            .filter(|(_, is_picture, _)| *is_picture)
            .count()
    }

    /// Values of these pictures: pixels times channels.
    pub fn levels(&self) -> u64 {
        self.levels
    }

    /// Bytes of the files that are as they were.
    pub fn kept(&self) -> u64 {
        self.kept
    }
}

impl Group {
    /// Bytes of the items' files.
    pub fn bytes(&self) -> u64 {
        self.items
            .iter()
            .map(|(item, _)| item.bytes.len() as u64)
            .sum()
    }

    /// Whether a block is of files with the very names and contents of its items, whoever coded them.
    pub fn is_in(&self, block: &Coded) -> bool {
        let names = self.items.iter().zip(&block.items);
        let is = |((item, _), (name, _, crc)): (&(Item, _), &(String, bool, u32))| {
            item.name == *name && crc32c::crc32c(&item.bytes) == *crc
        };
        self.items.len() == block.items.len() && { names }.all(is)
    }

    /// Codes the pictures, where that takes fewer bytes than their files have. `progress` is told the share of
    /// the work that is done, and can stop it.
    ///
    /// # Errors
    /// A class that the model does not have, no memory, or stopped.
    pub fn encode(
        self,
        model: &CodingModel,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Coded, ArchiveError> {
        let cutting = self.cutting;
        let mut layers: Vec<(Shape, Vec<u8>)> = Vec::new();
        for (item, exact) in &self.items {
            let Some(exact) = exact else {
                continue;
            };
            let shapes = Picture::of(exact, item.class)
                .shapes(cutting.channels)
                .into_iter();
            let places = exact.kind.layers(cutting.channels);
            layers.extend(
                shapes
                    .zip(places)
                    .map(|(shape, places)| (shape, exact.layer(&places))),
            );
        }
        let streams = model.encode(cutting, &layers, progress)?;
        let mut streams = layers.iter().map(|(shape, _)| *shape).zip(streams);
        let mut coded = Coded {
            items: Vec::new(),
            index: Vec::new(),
            streams: Vec::new(),
            levels: 0,
            kept: 0,
        };
        let (mut parts, mut shapes, mut tiles) = (Vec::new(), Vec::new(), Vec::new());
        for (item, exact) in self.items {
            let own = exact
                .as_ref()
                .map_or(0, |exact| exact.kind.layers(cutting.channels).len());
            let own: Vec<(Shape, Vec<Vec<u8>>)> = streams.by_ref().take(own).collect();
            let lengths = own.iter().flat_map(|(_, tiles)| tiles);
            let mut lengths: Vec<u64> = lengths.map(|stream| stream.len() as u64).collect();
            let exact = exact.filter(|exact| {
                // A stream's length takes a byte or two.
                let streams = lengths.iter().map(|len| len + 1).sum::<u64>();
                streams + (exact.chunks.len() as u64) < item.bytes.len() as u64
            });
            let of_file = Sum::of(&item.bytes);
            coded
                .items
                .push((item.name.clone(), exact.is_some(), of_file.crc));
            let sum = match &exact {
                None => {
                    lengths = vec![item.bytes.len() as u64];
                    coded.kept += item.bytes.len() as u64;
                    coded.streams.extend(&item.bytes);
                    of_file
                }
                Some(exact) => {
                    coded.levels += own
                        .iter()
                        .map(|(shape, _)| shape.dims() as u64)
                        .sum::<u64>();
                    for (shape, streams) in own {
                        shapes.push(shape);
                        tiles.push(streams);
                    }
                    Sum::of(&exact.samples)
                }
            };
            parts.push(Part {
                name: item.name,
                picture: exact.map(|exact| Picture::of(&exact, item.class)),
                sum,
                lengths,
            });
        }
        for [layer, tile] in index::order(cutting, &shapes) {
            coded.streams.extend(&tiles[layer][tile]);
        }
        coded.index = index::write(cutting, &parts);
        match progress(1.0) {
            ControlFlow::Continue(()) => Ok(coded),
            ControlFlow::Break(()) => Err(CodecError::from(Stopped).into()),
        }
    }
}

/// Writes an archive block by block.
#[derive(Debug)]
pub struct Writer<'a, W> {
    out: W,
    model: &'a CodingModel,
    /// To be written with the first block.
    embedded: Option<Vec<u8>>,
    front: Option<Front>,
    names: HashSet<String>,
    written: u64,
}

impl<'a, W: Write> Writer<'a, W> {
    /// An archive of what a model codes.
    pub fn new(model: &'a CodingModel, out: W) -> Writer<'a, W> {
        Writer {
            out,
            model,
            embedded: None,
            front: None,
            names: HashSet::new(),
            written: 0,
        }
    }

    /// The same with that model in it: whoever reads the archive needs nothing else.
    ///
    /// # Errors
    /// [`ArchiveError::WrongModel`] where it is another one, and [`ArchiveError::Embedded`].
    pub fn embed(self, model: &Model) -> Result<Writer<'a, W>, ArchiveError> {
        let given = ModelHash::of_any_size(&model.config, &model.weights);
        let wanted = self.model.hash();
        if given != wanted {
            return Err(ArchiveError::WrongModel { wanted, given });
        }
        Ok(Writer {
            embedded: Some(embedded::bytes(model)?),
            ..self
        })
    }

    /// Bytes of the model that is still to be written.
    pub fn embedded_bytes(&self) -> u64 {
        self.embedded.as_ref().map_or(0, |model| model.len() as u64)
    }

    /// Writes a block.
    ///
    /// # Errors
    /// Names that no files can have or that were written before, and [`ArchiveError::Output`].
    pub fn write(&mut self, block: &Coded) -> Result<(), ArchiveError> {
        for (name, ..) in &block.items {
            check_new_name(&mut self.names, name)?;
        }
        let front = self.begin(crc32c::crc32c(&block.index))?;
        let mut index = Vec::new();
        varint(&mut index, block.index.len() as u64);
        index.extend(&block.index);
        let index = front.summed(index);
        let start = front.start(Kind::Items, index.len() + block.streams.len());
        self.put(&[&start, &index, &block.streams])
    }

    /// Writes the end; gives what was written to, and the number of bytes.
    ///
    /// # Errors
    /// [`ArchiveError::Output`].
    pub fn finish(mut self) -> Result<(W, u64), ArchiveError> {
        let front = self.begin(0)?;
        self.put(&[&front.end(self.names.len())])?;
        self.out.flush().map_err(ArchiveError::Output)?;
        Ok((self.out, self.written))
    }

    /// Writes the front and the model where they are not yet.
    fn begin(&mut self, id: u32) -> Result<Front, ArchiveError> {
        if let Some(front) = self.front {
            return Ok(front);
        }
        let front = Front {
            hash: self.model.hash(),
            id,
            channels: self.model.config().channels,
        };
        self.front = Some(front);
        self.put(&[&front.write()])?;
        if let Some(model) = self.embedded.take() {
            let model = front.summed(model);
            self.put(&[&front.start(Kind::Model, model.len()), &model])?;
        }
        Ok(front)
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<(), ArchiveError> {
        for part in parts {
            self.out.write_all(part).map_err(ArchiveError::Output)?;
            self.written += part.len() as u64;
        }
        Ok(())
    }
}

/// Compresses files, pictures among them: the bytes of a `.pxc` file. They are the same for any number of
/// threads and vector instructions. `progress` is told the share of the work that is done, and can stop it.
///
/// # Errors
/// Names that no files can have, a class that the model does not have, or stopped.
pub fn compress(
    model: &CodingModel,
    items: Vec<Item>,
    progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
) -> Result<Vec<u8>, ArchiveError> {
    let total = items
        .iter()
        .map(|item| item.bytes.len())
        .sum::<usize>()
        .max(1) as f64;
    let mut writer = Writer::new(model, Vec::new());
    let mut done = 0.0;
    let mut code = |group: Option<Group>| -> Result<(), ArchiveError> {
        let Some(group) = group else {
            return Ok(());
        };
        let here = group.bytes() as f64;
        let mut share = |part| progress((done + part * here) / total);
        writer.write(&group.encode(model, &mut share)?)?;
        done += here;
        Ok(())
    };
    let mut grouping = Grouping::new(model);
    for item in items {
        code(grouping.push(item))?;
    }
    code(grouping.finish())?;
    Ok(writer.finish()?.0)
}
