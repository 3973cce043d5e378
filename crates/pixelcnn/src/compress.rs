//! Images compressed without loss: many of them in one `.pxc` file, each readable without the
//! others.
//!
//! ```
//! use pixelcnn::compress::{Archive, CodingModel, Picture, compress};
//! use pixelcnn::{ModelConfig, network};
//! use std::io::Cursor;
//! use std::ops::ControlFlow;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (nr_resnet, nr_filters, height, width) = (1, 4, 8, 8);
//! let config = ModelConfig { nr_resnet, nr_filters, height, width, ..ModelConfig::default() };
//! let model = CodingModel::new(&config, &network::draw_parameters(&config, 1))?;
//! let picture = Picture { name: "sky.png".into(), class: 0, levels: vec![200; config.dims()] };
//! let mut go_on = |_| ControlFlow::Continue(());
//! let file = compress(&model, &[picture.clone()], 64, &mut go_on)?;
//!
//! let mut archive = Archive::new(Cursor::new(file))?; // or Archive::open(path)
//! let sky = archive.position("sky.png").ok_or("not there")?;
//! let images = archive.decompress(&model, &[sky], &mut go_on)?;
//! assert_eq!(images[0].as_ref(), Ok(&picture.levels));
//! # Ok(())
//! # }
//! ```
//!
//! # The format, version 1
//! | bytes | what |
//! |---|---|
//! | 4 | `pxc`, then the version |
//! | 16 | the model: the first bytes of a SHA-256, see [`ModelHash`] |
//! | n | height, width, channels, number of images, length of the index: varints (LEB128) |
//! | n | the index, deflated: of all images the names, then the classes, then the streams' lengths |
//! | 3 each | checksum of the image's pixels: the low 24 bits of a CRC-32C, little-endian |
//! | 4 | CRC-32C of everything so far, little-endian |
//! | n each | the images' streams, as [`Codec`] makes them, one after the other |
//!
//! In the index a name is 0 if it is the one before with its last number one higher and as long;
//! else it is 1 plus the number of bytes that it begins with as the one before does, the number of
//! the others, and these. Classes are varints; lengths are all lowest bytes, then a varint of what
//! is above for each. What follows the last stream is not looked at, but [`Archive::trailing`] tells
//! of it.

use std::collections::{HashMap, HashSet, hash_map};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crc32c::crc32c;
use flate2::Compression;
use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use pixelcnn_core::codec::{Codec, CodecError, Shape};
use pixelcnn_core::incremental::{Evaluator, EvaluatorError};
use pixelcnn_core::kernels::simd::{self, Level};
use pixelcnn_core::{ModelConfig, Nonlinearity};
use sha2::{Digest, Sha256};

use crate::atomic;
use crate::hex;
use crate::picture::is_picture;
use crate::sample::{side_by_side, useful_threads};

pub(crate) const MAGIC: &[u8; 3] = b"pxc";
const VERSION: u8 = 1;
/// No header is longer: five varints of 32 bits after magic, version and hash.
const MAX_HEADER: u64 = 4 + 16 + 5 * 5;
/// The longest name, in bytes.
const MAX_NAME: usize = 255;
/// The most that an image takes in the index: a name after two varints, a class, a length.
const MAX_ENTRY: u64 = (2 + 2 + MAX_NAME + 5 + 1 + 5) as u64;
/// Bytes of an image's checksum.
pub(crate) const CHECKSUM: usize = 3;

/// Why images cannot be compressed, or not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompressError {
    /// The weights are not the model's.
    #[error(transparent)]
    Evaluator(#[from] EvaluatorError),
    /// A class that the model does not have, no memory, or stopped by `progress`.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A picture that is not of the model's size.
    #[error("{name}: {found} values where the model takes {expected}: crop or resize it first")]
    Levels {
        /// The picture's name.
        name: String,
        /// Its number of levels.
        found: usize,
        /// What the model takes.
        expected: usize,
    },
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
        "version {0} of the .pxc format, this program knows up to {VERSION}: take a newer program"
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
    /// The file cannot be read.
    #[error("cannot be read: {0}: check the file and its disk")]
    Read(#[source] io::Error),
    /// The file cannot be written.
    #[error("cannot write `{path}`: {source}: make room or choose another folder")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Why one image of a file cannot be decompressed; the others can be nevertheless.
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

/// Names a model: the first 16 bytes of a SHA-256 over its configuration and parameters.
///
/// Hashed are as 64-bit numbers height, width, channels, `nr_resnet`, `nr_filters`,
/// `nr_logistic_mix`, the nonlinearity (0 `concat_elu`, 1 `elu`, 2 `relu`) and `nr_classes`, then
/// the [later settings](ModelConfig::later_settings), each name and number, then all
/// parameters in the layout's order as 32-bit floats; all of them little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelHash(pub [u8; 16]);

impl ModelHash {
    /// The hash of a model.
    pub fn of(config: &ModelConfig, parameters: &[Vec<f32>]) -> ModelHash {
        let ModelConfig {
            height,
            width,
            channels,
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity,
            nr_classes,
            ..
        } = *config;
        let nonlinearity = match nonlinearity {
            Nonlinearity::ConcatElu => 0,
            Nonlinearity::Elu => 1,
            Nonlinearity::Relu => 2,
        };
        let mut hash = Sha256::new();
        for number in [
            height,
            width,
            channels,
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nonlinearity,
            nr_classes,
        ] {
            hash.update((number as u64).to_le_bytes());
        }
        for (name, _, number) in config.later_settings() {
            hash.update(name);
            hash.update((number as u64).to_le_bytes());
        }
        for values in parameters.iter().flat_map(|values| values.chunks(4096)) {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            hash.update(bytes);
        }
        let mut first = [0; 16];
        first.copy_from_slice(&hash.finalize()[..16]);
        ModelHash(first)
    }
}

impl fmt::Display for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// A model to compress with, and its hash.
#[derive(Debug, Clone)]
pub struct CodingModel {
    evaluator: Evaluator,
    parameters: Arc<Vec<Vec<f32>>>,
    /// For strips of pictures of any size, by their columns.
    strips: Arc<Mutex<HashMap<usize, Evaluator>>>,
    level: Level,
    hash: ModelHash,
}

impl CodingModel {
    /// The model with these `parameters`, in the layout's order.
    ///
    /// # Errors
    /// If they are not those of the configuration.
    pub fn new(config: &ModelConfig, parameters: &[Vec<f32>]) -> Result<Self, EvaluatorError> {
        Ok(CodingModel {
            evaluator: Evaluator::new(config, parameters)?,
            parameters: Arc::new(parameters.to_vec()),
            strips: Arc::default(),
            level: simd::level(),
            hash: ModelHash::of(config, parameters),
        })
    }

    /// The same with the vector instructions chosen, which does not change a byte.
    pub fn at(self, level: Level) -> Self {
        CodingModel { level, ..self }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        self.evaluator.config()
    }

    /// The model's hash.
    pub fn hash(&self) -> ModelHash {
        self.hash
    }

    /// How many images to code side by side where up to `wanted` are: as many, or those that fit
    /// into a gigabyte, or one.
    pub fn side_by_side(&self, wanted: usize) -> usize {
        side_by_side(&self.evaluator, wanted)
    }

    /// The model of images of another size.
    fn resized(&self, size: [usize; 2]) -> Result<Evaluator, EvaluatorError> {
        Evaluator::new(&self.config().resized(size), &self.parameters)
    }

    /// For strips of so many columns.
    fn for_strips(&self, columns: usize) -> Result<Codec, EvaluatorError> {
        let mut strips = self.strips.lock().unwrap_or_else(PoisonError::into_inner);
        let evaluator = match strips.entry(columns) {
            hash_map::Entry::Occupied(entry) => entry.into_mut(),
            hash_map::Entry::Vacant(entry) => entry.insert(self.resized([1, columns])?),
        };
        Ok(Codec {
            evaluator: evaluator.clone(),
            level: self.level,
            threads: rayon::current_num_threads(),
        })
    }

    /// Encodes layers of pictures, all side by side in strips of so many columns, or each whole where these
    /// are 0, as attention wants it: of each the streams of its tiles.
    pub(crate) fn encode_layers(
        &self,
        columns: usize,
        layers: &[(Shape, Vec<u8>)],
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Vec<u8>>>, CompressError> {
        let given: Vec<(Shape, &[u8])> = layers.iter().map(|(s, l)| (*s, &l[..])).collect();
        let share = |done: usize, rows: usize| done as f64 / rows as f64;
        if columns > 0 {
            let mut rows = |done, rows| progress(share(done, rows));
            return Ok(self
                .for_strips(columns)?
                .encode_pictures(&given, &mut rows)?);
        }
        let mut streams = Vec::new();
        for (number, one) in given.iter().enumerate() {
            let mut rows =
                |done, rows| progress((number as f64 + share(done, rows)) / given.len() as f64);
            let codec = self.whole(one.0)?;
            streams.extend(codec.encode_pictures(&[*one], &mut rows)?);
        }
        Ok(streams)
    }

    /// Decodes layers of pictures, as [`Codec::decode_pictures`] does.
    pub(crate) fn decode_layers(
        &self,
        columns: usize,
        shapes: &[Shape],
        stream: &mut dyn FnMut(usize, usize) -> Option<Vec<u8>>,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Vec<Option<Vec<u8>>>, CompressError> {
        let share = |done: usize, rows: usize| done as f64 / rows as f64;
        if columns > 0 {
            let mut rows = |done, rows| progress(share(done, rows));
            return Ok(self
                .for_strips(columns)?
                .decode_pictures(shapes, stream, &mut rows)?);
        }
        let mut layers = Vec::new();
        for (number, &shape) in shapes.iter().enumerate() {
            let mut rows =
                |done, rows| progress((number as f64 + share(done, rows)) / shapes.len() as f64);
            let mut stream = |_, tile| stream(number, tile);
            let codec = self.whole(shape)?;
            layers.extend(codec.decode_pictures(&[shape], &mut stream, &mut rows)?);
        }
        Ok(layers)
    }

    /// For one picture as a whole.
    fn whole(&self, shape: Shape) -> Result<Codec, EvaluatorError> {
        let evaluator = self.resized([shape.height, shape.width])?;
        Ok(Codec {
            threads: useful_threads(&evaluator, 1),
            evaluator,
            level: self.level,
        })
    }

    fn codec(&self, images: usize) -> Codec {
        Codec {
            evaluator: self.evaluator.clone(),
            level: self.level,
            threads: useful_threads(&self.evaluator, images),
        }
    }
}

/// A picture to compress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Its name in the file: a relative path, its parts separated by `/`.
    pub name: String,
    /// Its class; 0 for an unconditional model.
    pub class: u32,
    /// Its pixels, u8 \[H, W, C\].
    pub levels: Vec<u8>,
}

/// Compresses pictures, up to `batch_size` side by side: the bytes of a `.pxc` file. They are the
/// same for any `batch_size`, number of threads (those of rayon) and vector instructions.
/// `progress` is told how many pixels of all pictures are done and can stop it.
///
/// # Errors
/// [`CompressError::Name`], [`CompressError::Levels`] and [`CompressError::Codec`].
pub fn compress(
    model: &CodingModel,
    pictures: &[Picture],
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<u8>, CompressError> {
    let streams = streams(model, pictures, batch_size, progress)?;
    assemble(model, pictures, &streams)
}

/// The streams of some of a file's pictures, as [`compress`] makes them: [`assemble`] makes a file of
/// all.
///
/// # Errors
/// [`CompressError::Name`], [`CompressError::Levels`] and [`CompressError::Codec`].
pub fn streams(
    model: &CodingModel,
    pictures: &[Picture],
    batch_size: usize,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<Vec<u8>>, CompressError> {
    let config = model.config();
    check_names(pictures.iter().map(|picture| picture.name.as_str()))?;
    for Picture { name, levels, .. } in pictures {
        if levels.len() != config.dims() {
            return Err(CompressError::Levels {
                name: name.clone(),
                found: levels.len(),
                expected: config.dims(),
            });
        }
    }
    let (mut streams, mut done) = (Vec::new(), 0);
    for batch in pictures.chunks(model.side_by_side(batch_size)) {
        let labels: Vec<u32> = batch.iter().map(|picture| picture.class).collect();
        let levels: Vec<u8> = batch.iter().flat_map(|p| &p.levels).copied().collect();
        let mut rows = |rows| progress(done + rows * config.width * batch.len());
        let coded = model
            .codec(batch.len())
            .encode(&labels, &levels, &mut rows)?;
        streams.extend(coded);
        done += config.height * config.width * batch.len();
    }
    Ok(streams)
}

/// The bytes of a `.pxc` file of pictures and their [`streams`].
///
/// # Errors
/// [`CompressError::Name`].
pub fn assemble(
    model: &CodingModel,
    pictures: &[Picture],
    streams: &[Vec<u8>],
) -> Result<Vec<u8>, CompressError> {
    check_names(pictures.iter().map(|picture| picture.name.as_str()))?;
    let mut file = front(model, pictures, streams);
    streams.iter().for_each(|stream| file.extend(stream));
    Ok(file)
}

/// Writes the bytes of a `.pxc` file to `path`, atomically.
///
/// # Errors
/// [`CompressError::Write`]; what was at `path` before still is.
pub fn write(path: &Path, file: &[u8]) -> Result<(), CompressError> {
    atomic::write(path, |w| w.write_all(file)).map_err(|source| CompressError::Write {
        path: path.into(),
        source,
    })
}

/// All that comes before the streams.
fn front(model: &CodingModel, pictures: &[Picture], streams: &[Vec<u8>]) -> Vec<u8> {
    let mut index = Vec::new();
    let mut before = "";
    for Picture { name, .. } in pictures {
        write_name(&mut index, before, name);
        before = name;
    }
    for picture in pictures {
        varint(&mut index, picture.class.into());
    }
    index.extend(streams.iter().map(|stream| stream.len() as u8));
    for stream in streams {
        varint(&mut index, stream.len() as u64 >> 8);
    }
    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::best());
    let deflated = deflated.write_all(&index).and_then(|()| deflated.finish());
    let deflated = deflated.expect("a vector takes all bytes");

    let mut front = [&MAGIC[..], &[VERSION], &model.hash.0].concat();
    let config = model.config();
    for number in [
        config.height,
        config.width,
        config.channels,
        pictures.len(),
        deflated.len(),
    ] {
        varint(&mut front, number as u64);
    }
    front.extend(deflated);
    for picture in pictures {
        front.extend(checksum(&picture.levels));
    }
    front.extend(crc32c(&front).to_le_bytes());
    front
}

pub(crate) fn checksum(levels: &[u8]) -> [u8; CHECKSUM] {
    let [a, b, c, _] = crc32c(levels).to_le_bytes();
    [a, b, c]
}

/// Checks that names are relative paths of files, and all different: whoever writes files by these
/// names writes into the folder of his choice and nowhere else.
pub(crate) fn check_names<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), CompressError> {
    let mut seen = HashSet::new();
    for name in names {
        let mut parts = name.split('/');
        // What this system takes for a path of several parts, a drive or a parent counts as well.
        let mut components = Path::new(name).components();
        let problem = if name.len() > MAX_NAME {
            "a name over 255 bytes: shorten it"
        } else if name.chars().any(char::is_control) {
            "a control character in a name: rename the file"
        } else if parts.any(|part| matches!(part, "" | "." | ".."))
            || components.any(|part| !matches!(part, Component::Normal(_)))
        {
            "not a relative path of a file: rename it"
        } else if !seen.insert(name) {
            "two files of this name: rename one"
        } else {
            continue;
        };
        return Err(CompressError::Name {
            name: name.into(),
            problem,
        });
    }
    Ok(())
}

/// The PNG files that images of these names become, no two the same: a name with this extension, or
/// with it behind its own, or numbered, where another image has the name; no part over 255 bytes.
pub fn png_names<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
    // Where the system takes them for one, names that differ in case alone meet as well.
    let folded = |name: &str| match cfg!(any(windows, target_os = "macos")) {
        true => name.to_lowercase(),
        false => name.to_owned(),
    };
    let mut taken: HashSet<String> = HashSet::new();
    for name in names.clone() {
        let folders = name.match_indices('/').map(|(at, _)| folded(&name[..at]));
        taken.extend(folders);
    }
    let is_png = |name: &str| {
        let extension = Path::new(name).extension().unwrap_or_default();
        extension.eq_ignore_ascii_case("png")
    };
    let mut targets: Vec<Option<String>> = names
        .clone()
        .map(|name| (is_png(name) && taken.insert(folded(name))).then(|| name.to_owned()))
        .collect();
    for (name, target) in names.zip(&mut targets) {
        if target.is_some() {
            continue;
        }
        let short = match is_picture(Path::new(name)) {
            true => name.rsplit_once('.').map_or(name, |(stem, _)| stem),
            false => name,
        };
        let first = [numbered(short, ""), numbered(name, "")].into_iter();
        let mut all = first.chain((2..).map(|n| numbered(short, &format!("-{n}"))));
        *target = all.find(|target| taken.insert(folded(target)));
    }
    targets.into_iter().flatten().collect()
}

/// A PNG file's name, its last part cut to what systems take.
fn numbered(stem: &str, number: &str) -> String {
    let start = stem.rfind('/').map_or(0, |at| at + 1);
    let end = format!("{number}.png");
    let mut cut = stem.len().min(start + MAX_NAME - end.len());
    while !stem.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}{end}", &stem[..cut])
}

/// Names told apart: where two are the same, the later ones get a number before their extension.
pub fn distinct_names(names: Vec<String>) -> Vec<String> {
    let mut taken: HashSet<String> = names.iter().cloned().collect();
    let mut seen = HashSet::new();
    let distinct = names.into_iter().map(|name| {
        if seen.insert(name.clone()) {
            return name;
        }
        let file = name.rfind('/').map_or(0, |at| at + 1);
        let dot = name.rfind('.').filter(|&dot| dot > file);
        let (stem, extension) = name.split_at(dot.unwrap_or(name.len()));
        let mut numbered = (2..).map(|n| format!("{stem}-{n}{extension}"));
        numbered
            .find(|name| taken.insert(name.clone()))
            .unwrap_or(name)
    });
    distinct.collect()
}

/// The name whose last number is one higher, in as many digits.
fn successor(name: &str) -> Option<String> {
    let mut bytes = name.as_bytes().to_vec();
    let last = bytes.iter().rposition(u8::is_ascii_digit)?;
    for digit in bytes[..=last].iter_mut().rev() {
        match digit {
            b'9' => *digit = b'0',
            b'0'..=b'8' => {
                *digit += 1;
                return String::from_utf8(bytes).ok();
            }
            _ => return None,
        }
    }
    None
}

pub(crate) fn write_name(index: &mut Vec<u8>, before: &str, name: &str) {
    if successor(before).as_deref() == Some(name) {
        return index.push(0);
    }
    let pairs = before.bytes().zip(name.bytes());
    let shared = pairs.take_while(|(a, b)| a == b).count();
    let rest = &name.as_bytes()[shared..];
    varint(index, 1 + shared as u64);
    varint(index, rest.len() as u64);
    index.extend(rest);
}

pub(crate) fn read_name(index: &mut Fields, before: &str) -> Option<String> {
    let Some(shared) = index.number()?.checked_sub(1) else {
        return successor(before);
    };
    let len = index.number()?;
    let rest = index.take(usize::try_from(len).ok()?)?;
    let shared = before.as_bytes().get(..usize::try_from(shared).ok()?)?;
    let name = [shared, rest].concat();
    String::from_utf8(name).ok().filter(|n| n.len() <= MAX_NAME)
}

pub(crate) fn varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// What is left of some bytes.
pub(crate) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    /// A varint of up to 32 bits.
    pub fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..35).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number).filter(|number| *number <= u32::MAX.into());
            }
        }
        None
    }
}

/// An image in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name: a relative path, its parts separated by `/`; no two are the same.
    pub name: String,
    /// Its class.
    pub class: u32,
    /// Bytes of its stream.
    pub bytes: u64,
    /// Where the stream begins.
    start: u64,
    checksum: [u8; CHECKSUM],
}

impl Entry {
    /// Whether these are the image's pixels, as its checksum has them.
    pub fn is(&self, levels: &[u8]) -> bool {
        checksum(levels) == self.checksum
    }
}

/// A `.pxc` file being read: its header and index are, streams are when they are asked for.
#[derive(Debug)]
pub struct Archive<R> {
    source: R,
    size: u64,
    hash: ModelHash,
    shape: [usize; 3],
    entries: Vec<Entry>,
    /// Where the streams begin.
    streams: u64,
}

impl Archive<BufReader<File>> {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// As [`Archive::new`].
    pub fn open(path: &Path) -> Result<Self, CompressError> {
        Archive::new(BufReader::new(
            File::open(path).map_err(CompressError::Read)?,
        ))
    }
}

impl<R: Read + Seek> Archive<R> {
    /// Reads what comes before the streams: memory is taken in proportion to the file's size, not to
    /// what it says about itself.
    ///
    /// # Errors
    /// [`CompressError::Read`], [`CompressError::NotPxc`], [`CompressError::Version`],
    /// [`CompressError::Damaged`] and, where a name could make trouble, [`CompressError::Name`].
    pub fn new(mut source: R) -> Result<Archive<R>, CompressError> {
        const CUT: CompressError = CompressError::Damaged("the file is cut off in its index");
        const ALTERED: CompressError = CompressError::Damaged("the file's index was altered");

        let size = source.seek(SeekFrom::End(0)).map_err(CompressError::Read)?;
        let header = read(&mut source, 0, size.min(MAX_HEADER))?;
        let mut fields = Fields(&header);
        if fields.take(MAGIC.len()) != Some(MAGIC) {
            return Err(CompressError::NotPxc);
        }
        match fields.take(1).ok_or(CUT)? {
            [VERSION] => {}
            version => return Err(CompressError::Version(version[0])),
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(fields.take(16).ok_or(CUT)?);
        let mut numbers = [0; 5];
        for number in &mut numbers {
            *number = fields.number().ok_or(CUT)?;
        }
        let [height, width, channels, count, deflated] = numbers;
        let begin = header.len() - fields.0.len();
        let checked = begin as u64 + deflated + count * CHECKSUM as u64;
        if checked + 4 > size {
            return Err(CUT);
        }

        let front = read(&mut source, 0, checked + 4)?;
        let (front, crc) = front.split_at(checked as usize);
        if crc != crc32c(front).to_le_bytes() {
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
        let entries = entries(&index, count as usize, checksums, checked + 4).ok_or(ALTERED)?;
        check_names(entries.iter().map(|entry| entry.name.as_str()))?;
        Ok(Archive {
            source,
            size,
            hash: ModelHash(hash),
            shape: [height, width, channels].map(|n| n as usize),
            entries,
            streams: checked + 4,
        })
    }

    /// The model that made the file.
    pub fn model(&self) -> ModelHash {
        self.hash
    }

    /// Height, width and channels of each image.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// What is in the file, in its order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// How many bytes follow the last image's, which are not read: another archive's, say.
    pub fn trailing(&self) -> u64 {
        let end = self.entries.last().map(|last| last.start + last.bytes);
        self.size.saturating_sub(end.unwrap_or(self.streams))
    }

    /// The number of the image with this name.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Decompresses the images with these numbers, all of them side by side (see
    /// [`CodingModel::side_by_side`]): u8 \[H, W, C\] of each, or why it is lost. Only their bytes
    /// are read. `progress` is told how many of their pixels are done and can stop, which gives
    /// `None`.
    ///
    /// # Errors
    /// [`CompressError::WrongModel`], [`CompressError::Read`], [`CompressError::Damaged`] where the
    /// model cannot have made images of the file's shape, and [`CompressError::Codec`].
    ///
    /// # Panics
    /// If there is no image with one of the numbers.
    #[allow(clippy::type_complexity)]
    pub fn decompress(
        &mut self,
        model: &CodingModel,
        images: &[usize],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Result<Vec<u8>, Damage>>, CompressError> {
        self.expect_model(model)?;
        let config = model.config();
        let mut whole = Vec::new();
        let mut results = vec![Err(Damage::Cut); images.len()];
        for (place, &image) in images.iter().enumerate() {
            let entry = &self.entries[image];
            if config.nr_classes > 0 && entry.class as usize >= config.nr_classes {
                results[place] = Err(Damage::Altered);
            } else if entry.start + entry.bytes <= self.size {
                let stream = read(&mut self.source, entry.start, entry.bytes)?;
                whole.push((place, entry, stream));
            }
        }
        let labels: Vec<u32> = whole.iter().map(|(_, entry, _)| entry.class).collect();
        let streams: Vec<&[u8]> = whole.iter().map(|(.., stream)| &stream[..]).collect();
        let mut rows = |rows| progress(rows * config.width * images.len());
        let codec = model.codec(streams.len());
        let decoded = codec.decode(&labels, &streams, &mut rows)?;
        for ((place, entry, _), levels) in whole.iter().zip(decoded) {
            let levels = levels.filter(|levels| entry.is(levels));
            results[*place] = levels.ok_or(Damage::Altered);
        }
        Ok(results)
    }

    /// Checks that a model is the one that made the file.
    ///
    /// # Errors
    /// [`CompressError::WrongModel`], and [`CompressError::Damaged`] where it cannot have made images
    /// of the file's shape.
    pub fn expect_model(&self, model: &CodingModel) -> Result<(), CompressError> {
        if model.hash != self.hash {
            return Err(CompressError::WrongModel {
                wanted: self.hash,
                given: model.hash,
            });
        }
        let config = model.config();
        match self.shape == [config.height, config.width, config.channels] {
            true => Ok(()),
            false => Err(CompressError::Damaged(
                "the file's images are not of its model's size",
            )),
        }
    }
}

/// `len` bytes from `start` on; the caller knows that the source has them.
pub(crate) fn read(
    source: &mut (impl Read + Seek),
    start: u64,
    len: u64,
) -> Result<Vec<u8>, CompressError> {
    let mut bytes = Vec::new();
    let sought = source.seek(SeekFrom::Start(start));
    let read = sought.and_then(|_| source.take(len).read_to_end(&mut bytes));
    match read.map_err(CompressError::Read)? as u64 == len {
        true => Ok(bytes),
        false => Err(CompressError::Read(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// The images of an index, whose streams begin at `start`.
fn entries(index: &[u8], count: usize, checksums: &[u8], start: u64) -> Option<Vec<Entry>> {
    let mut index = Fields(index);
    let mut entries: Vec<Entry> = Vec::new();
    for checksum in checksums.chunks_exact(CHECKSUM) {
        let before = entries.last().map_or("", |entry| &entry.name);
        entries.push(Entry {
            name: read_name(&mut index, before)?,
            class: 0,
            bytes: 0,
            start: 0,
            checksum: checksum.try_into().ok()?,
        });
    }
    for entry in &mut entries {
        entry.class = index.number()? as u32;
    }
    let lowest = index.take(count)?;
    let mut start = start;
    for (entry, lowest) in entries.iter_mut().zip(lowest) {
        entry.bytes = index.number()? << 8 | u64::from(*lowest);
        entry.start = start;
        start = start.checked_add(entry.bytes)?;
    }
    index.0.is_empty().then_some(entries)
}

#[cfg(test)]
mod tests;
