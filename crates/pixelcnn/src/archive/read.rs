//! Archives being read.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use super::embedded::{self, MAX_MODEL};
use super::exact::Exact;
use super::fields::{Fields, SUM};
use super::frame::{FRONT, Front, Kind, MAGIC, MARKER, MAX_START, Start, VERSION};
use super::index::{self, Part, Picture, Place};
use super::model::{CodingModel, Cutting, ModelHash};
use super::source::Source;
use super::{ArchiveError, v1};
use crate::Model;

/// Bytes that are looked through at a time for the next block.
const WINDOW: u64 = 1 << 16;
/// So much of a pipe is kept of a block, to be looked through if the next one is not behind it.
const KEPT: u64 = 64 << 20;
/// An index has no more bytes: what is deflated in it has no more.
const MAX_INDEX: u64 = 32 << 20;

/// Why one item of an archive is lost; the others are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The file ends too early.
    #[error("lost: the file is cut off before it or in it")]
    Cut,
    /// The bytes are not what was written.
    #[error("lost: its bytes were altered")]
    Altered,
}

/// An item as it comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file that it was; or of a picture that was coded by the model, a PNG file that shows the same.
    pub bytes: Vec<u8>,
    /// Whether it is such a PNG.
    pub is_made: bool,
}

/// An item that was taken out, or why it is lost.
pub type Taken = Result<Found, Damage>;

/// A picture's samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples {
    /// Height, width and channels: grey or red, green and blue, then alpha where there is any.
    pub shape: [usize; 3],
    /// Whether each has 16 bits, not 8.
    pub is_deep: bool,
    /// \[H, W, channels\], of 16 bits the higher byte first.
    pub bytes: Vec<u8>,
}

impl Found {
    /// The samples that it has as a picture; none where it is no picture, or one that a PNG file could not
    /// hold exactly.
    pub fn samples(&self) -> Option<Samples> {
        let exact = Exact::read(&self.bytes)?;
        Some(Samples {
            shape: [exact.height, exact.width, exact.kind.channels()],
            is_deep: exact.kind.deep,
            bytes: exact.samples,
        })
    }

    /// Whether nothing of this file was lost: it is the same, or shows exactly the same.
    pub fn is_of(&self, file: &[u8]) -> bool {
        match self.is_made {
            false => self.bytes == file,
            true => Exact::read(file).is_some_and(|exact| Exact::read(&self.bytes) == Some(exact)),
        }
    }
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
    /// Values of such a picture: pixels times channels.
    pub levels: u64,
    /// Bytes of its streams.
    pub bytes: u64,
}

/// Items that were compressed side by side, as an archive has them.
#[derive(Debug, Clone)]
pub struct Block {
    contents: Contents,
    entries: Vec<Entry>,
    /// Where the streams begin, and how many bytes they have.
    start: u64,
    len: u64,
}

/// What a block says of its items.
#[derive(Debug, Clone)]
enum Contents {
    /// As it lies in the file: it takes more memory when it is read.
    Index(Cutting, Vec<u8>),
    Parts(Cutting, Vec<Part>),
}

impl Block {
    /// A block whose streams begin at a place; none where they would reach too far.
    pub(super) fn of_parts(cutting: Cutting, parts: Vec<Part>, start: u64) -> Option<Block> {
        let lengths = parts.iter().flat_map(|part| &part.lengths);
        let len = lengths.copied().try_fold(0u64, u64::checked_add)?;
        start.checked_add(len)?;
        Some(Block {
            entries: entries(cutting, &parts),
            contents: Contents::Parts(cutting, parts),
            start,
            len,
        })
    }

    /// A block of this index; none where this program makes no such.
    fn of_index(index: &[u8], channels: usize, start: u64) -> Option<Block> {
        let (cutting, parts) = index::read(index, channels)?;
        let block = Block::of_parts(cutting, parts, start)?;
        Some(Block {
            contents: Contents::Index(cutting, index.to_vec()),
            ..block
        })
    }

    fn parts(&self) -> (Cutting, Cow<'_, [Part]>) {
        match &self.contents {
            Contents::Parts(cutting, parts) => (*cutting, parts.into()),
            Contents::Index(cutting, index) => {
                let read = index::read(index, cutting.channels).expect("it was read before");
                (*cutting, read.1.into())
            }
        }
    }

    fn cutting(&self) -> Cutting {
        match &self.contents {
            Contents::Parts(cutting, _) | Contents::Index(cutting, _) => *cutting,
        }
    }

    /// What is in it.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Those of some items that are in files already, given the place of each of the block's.
    pub fn those_there(&self, files: &[PathBuf], items: &[usize]) -> HashSet<usize> {
        let (_, parts) = self.parts();
        let is_there = |&item: &usize| {
            let path = &files[item];
            // A device or a pipe has nothing.
            path.is_file() && fs::read(path).is_ok_and(|file| parts[item].is(&file))
        };
        items.iter().copied().filter(is_there).collect()
    }

    fn decode(
        &self,
        model: Option<&CodingModel>,
        items: &[usize],
        source: &mut impl Source,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Taken>, ArchiveError> {
        let (cutting, parts) = self.parts();
        let places = index::places(cutting, &parts).expect("they lie in the block");
        let channels = cutting.channels;
        let nr_classes = model.map_or(0, |model| model.config().nr_classes);
        let mut found = vec![Err(Damage::Cut); items.len()];
        let (mut shapes, mut streams, mut of_item) = (Vec::new(), Vec::new(), Vec::new());
        for (place, &item) in items.iter().enumerate() {
            let Part { picture, sum, .. } = &parts[item];
            let mut of_part = places[item].iter().copied();
            match picture {
                None => {
                    let [at, len] = places[item][0];
                    let bytes = source
                        .bytes(self.start + at, len)
                        .map_err(ArchiveError::Read)?;
                    found[place] = match sum.is_of(&bytes) {
                        _ if (bytes.len() as u64) < len => Err(Damage::Cut),
                        false => Err(Damage::Altered),
                        true => Ok(Found {
                            bytes,
                            is_made: false,
                        }),
                    };
                }
                Some(picture) if nr_classes > 0 && picture.class as usize >= nr_classes => {
                    found[place] = Err(Damage::Altered);
                }
                Some(picture) => {
                    for shape in picture.shapes(channels) {
                        let own = of_part.by_ref().take(cutting.streams(&shape));
                        streams.push(own.collect::<Vec<Place>>());
                        shapes.push(shape);
                        of_item.push(place);
                    }
                }
            }
        }
        if shapes.is_empty() {
            return Ok(found);
        }
        let model = model.expect("a model for pictures");
        let mut failed = None;
        let mut is_cut = vec![false; items.len()];
        let mut stream = |layer: usize, tile: usize| {
            let [at, len] = streams[layer][tile];
            match source.bytes(self.start + at, len) {
                Ok(bytes) if bytes.len() as u64 == len => Some(bytes),
                Ok(_) => {
                    is_cut[of_item[layer]] = true;
                    None
                }
                Err(error) => {
                    failed = Some(error);
                    None
                }
            }
        };
        let layers = model.decode(cutting, &shapes, &mut stream, progress)?;
        if let Some(error) = failed {
            return Err(ArchiveError::Read(error));
        }
        let mut layers = of_item.iter().zip(shapes).zip(layers).peekable();
        while let Some(&((&place, _), _)) = layers.peek() {
            let mut own = Vec::new();
            while let Some((_, layer)) = layers.next_if(|((of, _), _)| **of == place) {
                own.push(layer);
            }
            let part = &parts[items[place]];
            found[place] = made(part, channels, own).ok_or(match is_cut[place] {
                true => Damage::Cut,
                false => Damage::Altered,
            });
        }
        Ok(found)
    }
}

fn entries(cutting: Cutting, parts: &[Part]) -> Vec<Entry> {
    let entry = |part: &Part| {
        let picture = part.picture.as_ref();
        let shapes = picture.map(|picture| picture.shapes(cutting.channels));
        let levels = shapes.iter().flatten().map(|shape| shape.dims() as u64);
        Entry {
            name: part.name.clone(),
            class: picture.map_or(0, |picture| picture.class),
            size: picture.map(|picture| [picture.height, picture.width]),
            levels: levels.sum(),
            bytes: part.lengths.iter().sum(),
        }
    };
    parts.iter().map(entry).collect()
}

impl Part {
    /// Whether a file has what it is.
    fn is(&self, file: &[u8]) -> bool {
        match &self.picture {
            None => self.sum.is_of(file),
            Some(picture) => Exact::read(file).is_some_and(|exact| {
                Picture::of(&exact, picture.class) == *picture && self.sum.is_of(&exact.samples)
            }),
        }
    }
}

/// The PNG file of a picture, if these are its layers.
fn made(part: &Part, channels: usize, layers: Vec<Option<Vec<u8>>>) -> Option<Found> {
    let Picture {
        height,
        width,
        kind,
        ref chunks,
        ..
    } = *part.picture.as_ref()?;
    let mut exact = Exact {
        height,
        width,
        kind,
        samples: vec![0; height * width * kind.bytes_per_pixel()],
        chunks: chunks.clone(),
    };
    for (places, layer) in kind.layers(channels).iter().zip(layers) {
        exact.put(places, &layer?);
    }
    let bytes = part.sum.is_of(&exact.samples).then(|| exact.png())??;
    Some(Found {
        bytes,
        is_made: true,
    })
}

/// What a block of items is.
enum Items {
    Found(Block),
    /// It is as it was written, by a program that knows more.
    Newer,
    Damaged,
}

/// What the end of a file says of its front.
fn front_of_end(source: &mut impl Source, size: Option<u64>) -> io::Result<Option<Front>> {
    let Some(size) = size else {
        return Ok(None);
    };
    let bytes = source.bytes(size.saturating_sub(WINDOW), WINDOW)?;
    Ok(Front::of_end(&bytes))
}

/// An archive's version, and what it says of itself.
#[derive(Debug)]
enum Version {
    /// Its blocks are known from the start.
    One(v1::Front, VecDeque<Block>),
    Two(Front),
}

/// A `.pxc` file being read block by block.
#[derive(Debug)]
pub struct Reader<S> {
    source: S,
    /// Of a pipe, none.
    size: Option<u64>,
    version: Version,
    /// Where the next block begins.
    at: u64,
    names: HashSet<String>,
    /// The bytes of the model in it, with their sum.
    embedded: Option<Vec<u8>>,
    /// Where the next block is looked for if it is not there: behind the index of the one before, of which
    /// bytes may be missing.
    behind: u64,
    has_ended: bool,
    is_damaged: bool,
    unknown: u64,
    newer: usize,
}

impl<S: Source> Reader<S> {
    /// Reads the front.
    ///
    /// # Errors
    /// [`ArchiveError::Read`], [`ArchiveError::NotPxc`], [`ArchiveError::Version`] of a newer version, and
    /// [`ArchiveError::Damaged`] where the front is, and the end does not tell it either. Of version 1, whose
    /// front has all names, also [`ArchiveError::Name`] where one could make trouble.
    pub fn new(mut source: S) -> Result<Reader<S>, ArchiveError> {
        let size = source.size().map_err(ArchiveError::Read)?;
        let front = source.bytes(0, FRONT as u64).map_err(ArchiveError::Read)?;
        if !front.starts_with(MAGIC) {
            return Err(ArchiveError::NotPxc);
        }
        const CUT: ArchiveError = ArchiveError::Damaged("the file is cut off in its front");
        let mut is_damaged = false;
        let (version, at) = match front.get(MAGIC.len()).ok_or(CUT)? {
            1 => {
                let (front, blocks, end) = v1::read(&mut source)?;
                (Version::One(front, blocks.into()), end)
            }
            &VERSION => {
                let front: [u8; FRONT] = front.try_into().map_err(|_| CUT)?;
                let read = match Front::read(&front) {
                    Some(front) => Some(front),
                    None => {
                        is_damaged = true;
                        front_of_end(&mut source, size).map_err(ArchiveError::Read)?
                    }
                };
                let altered = ArchiveError::Damaged("the file's front was altered");
                (Version::Two(read.ok_or(altered)?), FRONT as u64)
            }
            version => return Err(ArchiveError::Version(*version)),
        };
        let mut reader = Reader {
            source,
            size,
            version,
            at,
            names: HashSet::new(),
            embedded: None,
            behind: at,
            has_ended: false,
            is_damaged,
            unknown: 0,
            newer: 0,
        };
        if let Version::One(..) = reader.version {
            reader.end_at(at);
        }
        Ok(reader)
    }

    /// Ends the archive at a place, behind which there may be more.
    fn end_at(&mut self, end: u64) {
        self.has_ended = self.size.is_none_or(|size| end <= size);
        self.add_unknown(self.size.map_or(0, |size| size.saturating_sub(end)));
    }

    fn add_unknown(&mut self, bytes: u64) {
        self.unknown = self.unknown.saturating_add(bytes);
    }

    /// Finds the next block that is whole as far as it tells of itself. Of a [`Pipe`](super::Pipe), those
    /// before are gone by then.
    ///
    /// # Errors
    /// [`ArchiveError::Read`].
    pub fn next_block(&mut self) -> Result<Option<Block>, ArchiveError> {
        let found = match &mut self.version {
            Version::One(_, blocks) => match blocks.pop_front() {
                Some(block) => self.source.forget(block.start).map(|()| Some(block)),
                // Of a pipe it shows no earlier whether all of the last one is there.
                None => {
                    let last = self.at.saturating_sub(1);
                    let last = self
                        .source
                        .forget(last)
                        .and_then(|()| self.source.bytes(last, 1));
                    last.map(|last| {
                        self.is_damaged |= last.is_empty();
                        None
                    })
                }
            },
            Version::Two(front) => {
                let front = *front;
                self.find_block(front)
            }
        };
        found.map_err(ArchiveError::Read)
    }

    fn find_block(&mut self, front: Front) -> io::Result<Option<Block>> {
        // What follows the end is not read.
        while !self.has_ended {
            if self.size.is_none() {
                self.behind = self.behind.max(self.at.saturating_sub(KEPT));
            }
            self.source.forget(self.behind.min(self.at))?;
            let start = self.source.bytes(self.at, MAX_START as u64)?;
            let Some(Start { kind, len, body }) = front.read_start(&start) else {
                if start.is_empty() && self.behind >= self.at {
                    break;
                }
                self.is_damaged = true;
                let from = self.behind.min(self.at + 1);
                let next = self.next_start(front, from)?;
                self.add_unknown(next.saturating_sub(self.at));
                (self.at, self.behind) = (next, next);
                continue;
            };
            self.source.forget(self.at)?;
            let begin = self.at + len as u64;
            let end = begin.saturating_add(body);
            (self.behind, self.at) = (begin, end);
            match kind {
                Kind::Items => match self.read_items(front, begin, body)? {
                    Items::Found(block) => {
                        self.behind = block.start;
                        return Ok(Some(block));
                    }
                    Items::Newer => self.newer += 1,
                    Items::Damaged => self.lose(begin - len as u64),
                },
                Kind::Model => {
                    self.embedded = Some(self.source.bytes(begin, body.min(MAX_MODEL))?);
                }
                Kind::Newer => self.newer += 1,
                Kind::Aside => {}
                Kind::End => {
                    let count = front.read_end(&self.source.bytes(begin, body.min(64))?);
                    let found = Some(self.names.len() as u64);
                    // Items of newer blocks count too.
                    let is_all = count == found || self.newer > 0 && count > found;
                    match is_all && !self.is_damaged {
                        true => self.end_at(end),
                        // It may be that of an archive in this one, or of a copy.
                        false => {
                            self.is_damaged = true;
                            self.behind = end;
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// Counts a block that began at a place as damaged.
    fn lose(&mut self, start: u64) {
        self.is_damaged = true;
        let end = self.at.min(self.size.unwrap_or(u64::MAX));
        self.add_unknown(end.saturating_sub(start));
    }

    /// What the index of a block tells.
    fn read_items(&mut self, front: Front, begin: u64, body: u64) -> io::Result<Items> {
        let bytes = self.source.bytes(begin, body.min(5))?;
        let mut fields = Fields(&bytes);
        let Some(len) = fields.number().filter(|len| *len <= MAX_INDEX) else {
            return Ok(Items::Damaged);
        };
        let checked = (bytes.len() - fields.0.len()) as u64 + len;
        if checked + SUM as u64 > body {
            return Ok(Items::Damaged);
        }
        let bytes = self.source.bytes(begin, checked + SUM as u64)?;
        let is_there = bytes.len() as u64 == checked + SUM as u64;
        let Some(checked) = front.unsummed(&bytes).filter(|_| is_there) else {
            return Ok(Items::Damaged);
        };
        let index = &checked[checked.len() - len as usize..];
        let start = begin + bytes.len() as u64;
        let block = Block::of_index(index, front.channels, start);
        let Some(block) = block.filter(|block| block.start + block.len == begin + body) else {
            return Ok(Items::Newer);
        };
        // A block that is there twice is one.
        let names: HashSet<&String> = block.entries.iter().map(|entry| &entry.name).collect();
        let are_new = !names.iter().any(|name| self.names.contains(*name));
        if !are_new || names.len() < block.entries.len() {
            return Ok(Items::Damaged);
        }
        self.names.extend(names.into_iter().cloned());
        Ok(Items::Found(block))
    }

    /// Where the next block begins, or the file ends, from a place on.
    fn next_start(&mut self, front: Front, from: u64) -> io::Result<u64> {
        let mut at = from;
        loop {
            self.source.forget(at)?;
            let bytes = self.source.bytes(at, WINDOW)?;
            let starts = bytes.windows(MARKER.len()).enumerate();
            for (place, _) in starts.filter(|(_, bytes)| bytes == MARKER) {
                let start = self.source.bytes(at + place as u64, MAX_START as u64)?;
                if front.read_start(&start).is_some() {
                    return Ok(at + place as u64);
                }
            }
            if (bytes.len() as u64) < WINDOW {
                return Ok(at + bytes.len() as u64);
            }
            // A marker may lie across the border.
            at += WINDOW - MARKER.len() as u64 + 1;
        }
    }

    /// The model that coded the pictures.
    pub fn model(&self) -> ModelHash {
        match &self.version {
            Version::One(front, _) => front.hash,
            Version::Two(front) => front.hash,
        }
    }

    /// The model that is in the archive itself, where there is one: once the first block was found.
    ///
    /// # Errors
    /// [`ArchiveError::Damaged`] and [`ArchiveError::Embedded`] where it was damaged.
    pub fn embedded(&self) -> Result<Option<Model>, ArchiveError> {
        let (Some(bytes), Version::Two(front)) = (&self.embedded, &self.version) else {
            return Ok(None);
        };
        let damaged = ArchiveError::Damaged("the model in the file was altered or cut off");
        Ok(Some(embedded::model(
            front.unsummed(bytes).ok_or(damaged)?,
        )?))
    }

    /// The model that coded the pictures, where it is in the archive or is part of the library
    /// ([`Shipped`](crate::Shipped)): once the first block was found. None where it is neither.
    ///
    /// # Errors
    /// Those of [`Reader::embedded`], where the model is not part of the library.
    pub fn find_model(&self) -> Result<Option<Model>, ArchiveError> {
        let fits = |model: &Model| {
            let hash = match &self.version {
                Version::One(..) => ModelHash::of(&model.config, &model.weights),
                Version::Two(_) => ModelHash::of_any_size(&model.config, &model.weights),
            };
            hash == self.model()
        };
        let embedded = self.embedded().map(|model| model.filter(fits));
        if let Ok(Some(_)) = embedded {
            return embedded;
        }
        #[cfg(feature = "pretrained")]
        for shipped in crate::Shipped::ALL {
            if let Some(model) = shipped.model().ok().filter(fits) {
                return Ok(Some(model));
            }
        }
        embedded
    }

    /// Whether all of the blocks were found, once there is no next one: their streams may still be damaged, and
    /// those of newer programs are counted apart.
    pub fn is_whole(&self) -> bool {
        self.has_ended && !self.is_damaged
    }

    /// Bytes so far that are not of the archive, or that were damaged.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// Blocks so far that only a newer program can read.
    pub fn newer(&self) -> usize {
        self.newer
    }

    /// Checks that a model is the one that coded the pictures.
    ///
    /// # Errors
    /// [`ArchiveError::WrongModel`], or [`ArchiveError::Damaged`] where the pictures can't be its.
    pub fn expect_model(&self, model: &CodingModel) -> Result<(), ArchiveError> {
        let config = model.config();
        let own = match &self.version {
            Version::One(..) => model.hash_with_size(),
            Version::Two(_) => model.hash(),
        };
        let (wanted, channels) = match &self.version {
            Version::One(front, _) => (front.hash, front.shape[2]),
            Version::Two(front) => (front.hash, front.channels),
        };
        if own != wanted {
            return Err(ArchiveError::WrongModel { wanted, given: own });
        }
        let shape = [config.height, config.width, config.channels];
        let fits = match &self.version {
            Version::One(front, _) => front.shape == shape,
            Version::Two(_) => channels == config.channels,
        };
        match fits {
            true => Ok(()),
            false => Err(ArchiveError::Damaged(
                "the file's pictures are not its model's",
            )),
        }
    }

    /// Takes items of a block out by their numbers, or says why one is lost. Only their bytes are read. Files
    /// that were kept as they were need no model. `progress` is told the share of the work that is done, and can
    /// stop it.
    ///
    /// # Errors
    /// Those of [`Reader::expect_model`], [`ArchiveError::Read`], and [`ArchiveError::Codec`] where stopped or
    /// without memory.
    ///
    /// # Panics
    /// If there is no item with one of the numbers, or a picture and no model.
    pub fn decode(
        &mut self,
        block: &Block,
        items: &[usize],
        model: Option<&CodingModel>,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Taken>, ArchiveError> {
        let has_pictures = items.iter().any(|&item| block.entries[item].size.is_some());
        if let Some(model) = model.filter(|_| has_pictures) {
            self.expect_model(model)?;
            let has_strips = block.cutting().columns.is_some();
            let fits = match self.version {
                Version::One(..) => !has_strips,
                Version::Two(_) => has_strips != model.config().attends(),
            };
            if !fits {
                return Ok(vec![Err(Damage::Altered); items.len()]);
            }
        }
        block.decode(model, items, &mut self.source, progress)
    }
}

/// A `.pxc` file all of whose blocks are known.
#[derive(Debug)]
pub struct Archive<S> {
    reader: Reader<S>,
    blocks: Vec<Block>,
    entries: Vec<Entry>,
    /// The block of each, and its place there.
    places: Vec<[usize; 2]>,
}

impl<S: Source> Archive<S> {
    /// Reads what all blocks tell of themselves. Where one is damaged, goes on with the next that is not: see
    /// [`Reader::is_whole`].
    ///
    /// # Errors
    /// As [`Reader::new`].
    pub fn new(source: S) -> Result<Archive<S>, ArchiveError> {
        let mut reader = Reader::new(source)?;
        let (mut blocks, mut entries, mut places) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(block) = reader.next_block()? {
            let of_block = block.entries().to_vec();
            places.extend((0..of_block.len()).map(|place| [blocks.len(), place]));
            entries.extend(of_block);
            blocks.push(block);
        }
        Ok(Archive {
            reader,
            blocks,
            entries,
            places,
        })
    }

    /// What it is read with.
    pub fn reader(&mut self) -> &mut Reader<S> {
        &mut self.reader
    }

    /// What is in the file, in its order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The number of the item with this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Takes the items with these numbers out, as [`Reader::decode`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn read(
        &mut self,
        model: &CodingModel,
        numbers: &[usize],
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Taken>, ArchiveError> {
        let mut found = vec![Err(Damage::Cut); numbers.len()];
        let mut order: Vec<usize> = (0..numbers.len()).collect();
        order.sort_by_key(|&place| self.places[numbers[place]]);
        let block_of = |place: &usize| self.places[numbers[*place]][0];
        let mut done = 0;
        for places in order.chunk_by(|a, b| block_of(a) == block_of(b)) {
            let items = places.iter().map(|&place| self.places[numbers[place]][1]);
            let items: Vec<usize> = items.collect();
            let mut share = |part: f64| {
                progress((done as f64 + part * items.len() as f64) / numbers.len() as f64)
            };
            let block = &self.blocks[block_of(&places[0])];
            let read = self.reader.decode(block, &items, Some(model), &mut share)?;
            for (&place, item) in places.iter().zip(read) {
                found[place] = item;
            }
            done += items.len();
        }
        Ok(found)
    }
}
