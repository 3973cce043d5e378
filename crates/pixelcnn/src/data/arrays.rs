//! Images in NumPy's `.npy` and `.npz` files.
//!
//! The `.npy` header is read here rather than by `npyz`, which trusts its lengths and nesting.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use zip::ZipArchive;
use zip::result::ZipError;

use super::codes::{self, CodeMaps};
use super::raw::{Bytes, Raw, read_at};
use super::{DataError, Dataset, Images, Listener, MEMORY_LIMIT, Split, cache_dir, hold_out, tell};
use crate::one_line;

/// NumPy itself writes 64 to 256 bytes.
const MAX_HEADER_BYTES: usize = 10_000;
/// Deflate cannot shrink anything further than 1032 to 1.
const MAX_DEFLATE_RATIO: u64 = 1032;
const MAX_LABEL_BYTES: u64 = 1 << 28;
/// Labels beyond this are surely not classes.
const MAX_CLASSES: u64 = 1 << 16;
/// How arrays hold images, for messages.
const FORMS: &str = "[N, H, W, C] or [N, C, H, W] with C 1 or 3, [N, H, W], or a single [H, W, C]";

/// Opens a `.npy` file of images, read as they are needed.
pub(super) fn open_npy(path: &Path, held_out: f64, split: Split) -> Result<Dataset, DataError> {
    let bad = |problem| DataError::Array {
        path: path.to_owned(),
        problem,
    };
    let file = File::open(path).map_err(DataError::io(path))?;
    let size = file.metadata().map_err(DataError::io(path))?.len();
    let header = Header::read(&mut BufReader::new(&file)).map_err(bad)?;
    let stack = header.images().map_err(bad)?;
    header.expect_end(size).map_err(bad)?;
    let bytes = Bytes::File {
        path: path.to_owned(),
        file,
        offset: header.bytes,
    };
    let pick = stack.pick(held_out, split);
    Ok(stack.dataset(bytes, Some(pick), format!("{} {split}", path.display())))
}

/// Opens a `.npz` file of images and labels. The images go where there is `room`.
pub(super) fn open_npz(
    path: &Path,
    held_out: f64,
    split: Split,
    mut room: Room,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    let mut npz = Npz::open(path)?;
    let sources = npz.sources()?;
    let place = match split {
        Split::Train => 0,
        Split::Test => sources.len() - 1,
    };
    let source = &sources[place];
    let (bytes, stack) = npz.images(&source.images, Header::images, &mut room)?;
    let pairs = sources
        .iter()
        .map(|source| (source.images.clone(), source.labels.clone()));
    let (labels, nr_classes) = npz.labels_of(&pairs.collect::<Vec<_>>(), listener)?;
    let mut labels = labels.into_iter().nth(place).flatten();
    if let (Some(labels), Some(y)) = (&labels, &source.labels)
        && labels.len() != stack.images
    {
        return Err(npz.bad(format!(
            "{} images in {}, {} labels in {y}: both need as many",
            stack.images,
            source.images,
            labels.len()
        )));
    }
    let mut unused = npz.names();
    unused.retain(|name| sources.iter().all(|source| !source.uses(name)));
    note_unused(path, &unused, listener)?;

    let pick = (sources.len() == 1).then(|| stack.pick(held_out, split));
    if let (Some(pick), Some(labels)) = (&pick, &mut labels) {
        *labels = pick.iter().map(|&i| labels[i]).collect();
    }
    let name = format!("{} {split}", path.display());
    Ok(Dataset {
        labels: labels.unwrap_or_default(),
        nr_classes,
        ..stack.dataset(bytes, pick, name)
    })
}

/// How an array holds images.
pub(super) struct Stack {
    pub images: usize,
    /// Height, width, channels of each.
    pub shape: [usize; 3],
    /// Whether each is ordered [C, H, W] instead of [H, W, C].
    pub planar: bool,
}

impl Stack {
    /// The images of a split, where the array has all.
    fn pick(&self, held_out: f64, split: Split) -> Vec<usize> {
        let indices = (0..self.images as u64).map(u64::to_le_bytes);
        hold_out(indices, held_out, split)
    }

    /// A data set without labels.
    fn dataset(self, bytes: Bytes, pick: Option<Vec<usize>>, name: String) -> Dataset {
        let images = Images::Raw(Raw {
            parts: vec![(bytes, self.images)],
            shape: self.shape,
            planar: self.planar,
            pick,
        });
        Dataset::unlabelled(name, self.shape, images)
    }
}

/// The arrays of a `.npz` file that hold images and their labels.
struct Source {
    images: String,
    labels: Option<String>,
}

impl Source {
    fn uses(&self, name: &String) -> bool {
        self.images == *name || self.labels.as_ref() == Some(name)
    }
}

/// The part of a data set that the name of an array speaks of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    Train,
    Validation,
    Test,
}

/// The words for parts at the beginning or the end of arrays' names; the longer ones come first.
const PARTS: [(&str, Part); 8] = [
    ("training", Part::Train),
    ("train", Part::Train),
    ("validation", Part::Validation),
    ("valid", Part::Validation),
    ("val", Part::Validation),
    ("dev", Part::Validation),
    ("testing", Part::Test),
    ("test", Part::Test),
];
/// What images are called, the likeliest first; the last stands for `train` and `test` alone.
const IMAGES: [&str; 9] = [
    "x", "images", "image", "imgs", "img", "pictures", "data", "samples", "",
];
const LABELS: [&str; 7] = [
    "y", "labels", "label", "targets", "target", "classes", "class",
];

/// Takes `x_train`, `trainX` and `train_images` apart: the part, and what the array holds of it.
fn parse_name(name: &str) -> (Part, String) {
    let name = name.to_lowercase();
    let found = PARTS.iter().find_map(|&(word, part)| {
        let rest = name.strip_prefix(word).or(name.strip_suffix(word))?;
        Some((
            part,
            rest.trim_matches(['_', '-', '.', '/', ' ']).to_owned(),
        ))
    });
    found.unwrap_or((Part::Whole, name))
}

/// Tells which arrays are not used.
pub(super) fn note_unused(
    path: &Path,
    unused: &[String],
    listener: &mut Listener,
) -> Result<(), DataError> {
    if !unused.is_empty() {
        let text = format_args!("{}: not used: {}", path.display(), listed(unused));
        tell(listener, one_line(text))?;
    }
    Ok(())
}

/// Names in a message, eight of them at most.
fn listed(names: &[String]) -> String {
    let (first, more) = names.split_at(names.len().min(8));
    let mut text = first.join(", ").escape_debug().to_string();
    if !more.is_empty() {
        text += &format!(" and {} more", more.len());
    }
    text
}

/// Where decoded images go.
pub(super) struct Room {
    /// How many more bytes may be kept in memory.
    pub memory: u64,
    /// The folder in which an unnamed temporary file takes what is larger.
    pub spill: PathBuf,
}

impl Default for Room {
    fn default() -> Self {
        Room {
            memory: MEMORY_LIMIT,
            spill: cache_dir().unwrap_or_else(std::env::temp_dir),
        }
    }
}

/// An open `.npz` file.
pub(super) struct Npz {
    path: PathBuf,
    zip: ZipArchive<BufReader<File>>,
    /// The arrays', sorted.
    names: Vec<String>,
    size: u64,
}

impl Npz {
    pub fn open(path: &Path) -> Result<Npz, DataError> {
        let file = File::open(path).map_err(DataError::io(path))?;
        let size = file.metadata().map_err(DataError::io(path))?.len();
        let damaged = |error: ZipError| DataError::Array {
            path: path.to_owned(),
            problem: format!("not a whole .npz file ({error}): it is cut off or damaged"),
        };
        let zip = ZipArchive::new(BufReader::new(file)).map_err(damaged)?;
        let names: Vec<_> = zip
            .file_names()
            .collect::<Result<_, _>>()
            .map_err(damaged)?;
        let names = names.iter().filter_map(|name| name.strip_suffix(".npy"));
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort_unstable();
        Ok(Npz {
            path: path.to_owned(),
            zip,
            names,
            size,
        })
    }

    pub fn bad(&self, problem: String) -> DataError {
        DataError::Array {
            path: self.path.clone(),
            problem: one_line(problem),
        }
    }

    /// The arrays' names, sorted.
    pub fn names(&self) -> Vec<String> {
        self.names.clone()
    }

    /// The arrays' names, types and shapes, for messages.
    pub fn contents(&mut self) -> String {
        let arrays = self.names().into_iter().map(|name| {
            let Ok(Member { header, .. }) = self.member(&name) else {
                return name;
            };
            format!("{name} ({} {:?})", header.dtype(), header.shape)
        });
        match arrays.collect::<Vec<_>>() {
            arrays if arrays.is_empty() => "no arrays".to_owned(),
            arrays => listed(&arrays),
        }
    }

    /// Whether the array `name` holds images.
    fn holds_images(&mut self, name: &str) -> bool {
        self.member(name)
            .is_ok_and(|member| member.header.images().is_ok())
    }

    /// Whether the array `name` may hold codes.
    pub fn holds_codes(&mut self, name: &str) -> bool {
        self.member(name)
            .is_ok_and(|member| member.header.codes().is_ok())
    }

    /// The codes in the array `name`.
    pub fn codes(&mut self, name: &str) -> Result<CodeMaps, DataError> {
        let member = self.member(name)?;
        member.check_length()?;
        let header = member.header.clone();
        let mut maps = codes::Reader::new(&header).map_err(|problem| member.bad(problem))?;
        member.copy(&mut maps, Path::new("memory"))?;
        let maps = maps.finish();
        maps.map_err(|problem| self.bad(format!("{name}: {problem}")))
    }

    /// The array of `part` that one of `words` names, and whether it `fits`: the first one that does,
    /// or else the first.
    pub fn find(
        &mut self,
        part: Part,
        words: &[&str],
        fits: impl Fn(&mut Self, &str) -> bool,
    ) -> Option<(String, bool)> {
        let mut found = Vec::new();
        for name in self.names() {
            let (of, word) = parse_name(&name);
            let rank = words.iter().position(|&known| known == word);
            if let (true, Some(rank)) = (of == part, rank) {
                found.push((rank, name));
            }
        }
        found.sort_unstable();
        if let Some((_, name)) = found.iter().find(|(_, name)| fits(self, name)) {
            return Some((name.clone(), true));
        }
        // `test` alone may be anything.
        found.retain(|&(rank, _)| !words[rank].is_empty());
        let (_, name) = found.into_iter().next()?;
        Some((name, false))
    }

    /// The labels of `part`: those that are classes, where there are several.
    pub fn find_labels(&mut self, part: Part) -> Option<String> {
        let fits = |npz: &mut Self, name: &str| {
            let member = npz.member(name);
            member.is_ok_and(|member| member.header.label_columns().is_ok())
        };
        Some(self.find(part, &LABELS, fits)?.0)
    }

    /// Where the images of the training and of the test split are, or all of them.
    fn sources(&mut self) -> Result<Vec<Source>, DataError> {
        let [whole, train, validation, test] =
            [Part::Whole, Part::Train, Part::Validation, Part::Test].map(|part| {
                let (name, fits) = self.find(part, &IMAGES, Self::holds_images)?;
                Some((part, name, fits))
            });
        let named: Vec<(Part, String, bool)> = [train.or(whole), test.or(validation)]
            .into_iter()
            .flatten()
            .collect();
        if named.iter().any(|(.., fits)| *fits) {
            let sources = named.into_iter().map(|(part, images, _)| Source {
                images,
                labels: self.find_labels(part),
            });
            return Ok(sources.collect());
        }

        // Images may be called anything where nothing else can be meant.
        let (images, others): (Vec<String>, Vec<String>) = self
            .names()
            .into_iter()
            .partition(|name| self.holds_images(name));
        let (images, labels) = match (&images[..], &others[..], named.first()) {
            // `numpy.savez` calls arrays so when it is given no names.
            ([images], [labels], _) if images.starts_with("arr_") && labels.starts_with("arr_") => {
                (images, Some(labels.clone()))
            }
            ([images], ..) => (images, self.find_labels(Part::Whole)),
            // What is wrong with it comes out when it is read.
            ([], _, Some((_, images, _))) | ([], [images], None) => (images, None),
            ([], ..) => {
                let contents = self.contents();
                return Err(self.bad(format!(
                    "holds {contents}: no images, which are uint8 {FORMS}; to read codes, say how many there are (nr_codes)"
                )));
            }
            _ => {
                let contents = self.contents();
                return Err(self.bad(format!(
                    "holds {contents}: name the images x_train and x_test (labels y_train and y_test), or x (labels y)"
                )));
            }
        };
        Ok(vec![Source {
            images: images.clone(),
            labels,
        }])
    }

    /// The labels of each source, an array with one of labels or without, and the number of classes in
    /// all; none where they are no classes, which is told.
    pub fn labels_of(
        &mut self,
        sources: &[(String, Option<String>)],
        listener: &mut Listener,
    ) -> Result<Labels, DataError> {
        match self.classes(sources)? {
            Ok(classes) => Ok(classes),
            Err(problem) => {
                let path = self.path.display();
                let text = format_args!("{path}: {problem}: read without labels");
                tell(listener, one_line(text))?;
                Ok((Vec::new(), 0))
            }
        }
    }

    /// The labels of each source, and the number of classes in all; or what makes them no classes.
    fn classes(&mut self, sources: &[(String, Option<String>)]) -> Result<Classes, DataError> {
        let labelled = sources.iter().any(|(_, labels)| labels.is_some());
        let mut labels = Vec::new();
        let mut nr_classes = 0;
        for (images, y) in sources {
            let Some(y) = y else {
                if labelled {
                    return Ok(Err(format!("{images} has no labels")));
                }
                labels.push(None);
                continue;
            };
            match self.labels(y)? {
                Ok(all) => {
                    let last = all.iter().max();
                    nr_classes = nr_classes.max(last.map_or(0, |&label| label as usize + 1));
                    labels.push(Some(all));
                }
                Err(problem) => return Ok(Err(problem)),
            }
        }
        Ok(Ok((labels, nr_classes)))
    }

    /// The array `name`, its header read.
    fn member(&mut self, name: &str) -> Result<Member<'_>, DataError> {
        let bad = |problem: String| DataError::Array {
            path: self.path.clone(),
            problem: one_line(problem),
        };
        let mut zipped = self
            .zip
            .by_name(&format!("{name}.npy"))
            .map_err(|error| bad(format!("{name}: {error}: save it again with numpy.savez")))?;
        let header =
            Header::read(&mut zipped).map_err(|problem| bad(format!("{name}: {problem}")))?;
        Ok(Member {
            path: &self.path,
            name: name.to_owned(),
            header,
            size: zipped.size(),
            compressed: zipped.compressed_size(),
            start: zipped.data_start().unwrap_or(u64::MAX),
            file_size: self.size,
            data: Box::new(zipped),
        })
    }

    /// The images in the array `name`, whose header `interpret` reads. They go where there is
    /// `room`, which shrinks.
    pub fn images(
        &mut self,
        name: &str,
        interpret: impl FnOnce(&Header) -> Result<Stack, String>,
        room: &mut Room,
    ) -> Result<(Bytes, Stack), DataError> {
        let member = self.member(name)?;
        let stack = interpret(&member.header).map_err(|problem| member.bad(problem))?;
        member.check_length()?;
        let len = member.header.data;
        let bytes = if len <= room.memory {
            room.memory -= len;
            Bytes::Memory(member.into_memory()?)
        } else if let Some(stored) = member.in_place()? {
            stored
        } else {
            let folder = &room.spill;
            std::fs::create_dir_all(folder).map_err(DataError::io(folder))?;
            let mut file = tempfile::tempfile_in(folder).map_err(DataError::io(folder))?;
            member.copy(&mut file, folder)?;
            Bytes::File {
                path: folder.clone(),
                file,
                offset: 0,
            }
        };
        Ok((bytes, stack))
    }

    /// The labels in the array `name`, numbers or one-hot; or what makes them no classes.
    pub fn labels(&mut self, name: &str) -> Result<Result<Vec<u32>, String>, DataError> {
        let member = self.member(name)?;
        let columns = match member.header.label_columns() {
            Ok(columns) => columns,
            Err(problem) => return Ok(Err(format!("{name}: {problem}"))),
        };
        member.check_length()?;
        let header = member.header.clone();
        let bytes = member.into_memory()?;
        let row = columns * header.item_bytes() as usize;
        let labels = bytes
            .chunks_exact(row)
            .map(|row| header.label(row, columns));
        Ok(labels.collect::<Option<_>>().ok_or_else(|| match columns {
            1 => format!(
                "{name}: not classes, which are numbered from 0 to at most {}",
                MAX_CLASSES - 1
            ),
            _ => format!("{name}: not one-hot"),
        }))
    }
}

/// The labels of some sources, and the number of classes.
type Labels = (Vec<Option<Vec<u32>>>, usize);

/// Them, or what makes them no classes.
type Classes = Result<Labels, String>;

/// One array of a `.npz` file, its header read.
struct Member<'a> {
    path: &'a Path,
    name: String,
    header: Header,
    /// What follows the header.
    data: Box<dyn Read + 'a>,
    /// The array's length with its header, unpacked and packed.
    size: u64,
    compressed: u64,
    /// Where it begins in the file.
    start: u64,
    file_size: u64,
}

impl Member<'_> {
    fn bad(&self, problem: impl std::fmt::Display) -> DataError {
        DataError::Array {
            path: self.path.to_owned(),
            problem: one_line(format_args!("{}: {problem}", self.name)),
        }
    }

    /// Whether so much can be packed into this file, before room is made for it.
    fn check_length(&self) -> Result<(), DataError> {
        let most = self
            .compressed
            .min(self.file_size)
            .saturating_mul(MAX_DEFLATE_RATIO);
        match self.header.end() == self.size && self.header.data <= most {
            true => Ok(()),
            false => Err(self.bad(format!(
                "its header says {} bytes, which it does not hold: the file is cut off or damaged",
                self.header.data
            ))),
        }
    }

    /// Its data, where they lie in the file as they are, saved without compression.
    fn in_place(&self) -> Result<Option<Bytes>, DataError> {
        let path = self.path.to_owned();
        let file = File::open(&path).map_err(DataError::io(&path))?;
        let stored = self.compressed == self.size
            && self
                .start
                .checked_add(self.size)
                .is_some_and(|end| end <= self.file_size)
            && Header::read_from(&file, self.start, self.size).as_ref() == Ok(&self.header);
        Ok(stored.then(|| Bytes::File {
            path,
            file,
            offset: self.start + self.header.bytes,
        }))
    }

    fn into_memory(self) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(self.header.data as usize)
            .map_err(|error| self.bad(error))?;
        self.copy(&mut bytes, Path::new("memory"))?;
        Ok(bytes)
    }

    /// Writes the data to `sink`, a file in `folder`, and on to their end, where their checksum is
    /// compared.
    fn copy(mut self, sink: &mut impl Write, folder: &Path) -> Result<(), DataError> {
        let mut chunk = vec![0; 1 << 16];
        let mut done = 0;
        loop {
            let n = match self.data.read(&mut chunk) {
                Ok(n) => n,
                Err(error) => {
                    return Err(self.bad(format!("{error}: the file is cut off or damaged")));
                }
            };
            done += n as u64;
            if done > self.header.data || n == 0 && done < self.header.data {
                return Err(self.bad("not as long as its header says: the file is damaged"));
            }
            if n == 0 {
                return Ok(());
            }
            sink.write_all(&chunk[..n]).map_err(DataError::io(folder))?;
        }
    }
}

/// The header of a `.npy` array in C order, of lengths that do not overflow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The type of its items, as NumPy spells it: `|u1`, `<i8`.
    descr: String,
    pub shape: Vec<usize>,
    /// The header's own length.
    bytes: u64,
    /// The length of the data after it; less than 2^60.
    data: u64,
}

impl Header {
    pub fn read(reader: &mut impl Read) -> Result<Header, String> {
        let mut start = [0; 10];
        reader
            .read_exact(&mut start)
            .map_err(|error| format!("not a NumPy array ({error})"))?;
        let (length, before) = match start {
            [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b] => {
                (u32::from_le_bytes([a, b, 0, 0]), 10)
            }
            [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b] => {
                let mut high = [0; 2];
                reader
                    .read_exact(&mut high)
                    .map_err(|error| format!("not a NumPy array ({error})"))?;
                (u32::from_le_bytes([a, b, high[0], high[1]]), 12)
            }
            [0x80, 2..=5, ..] => {
                return Err("a Python pickle, which is not read: save it with numpy.save".into());
            }
            _ => return Err("not a NumPy array: save it with numpy.save or numpy.savez".into()),
        };
        let length = length as usize;
        if length > MAX_HEADER_BYTES {
            return Err(format!(
                "its header is {length} bytes long: the file is damaged"
            ));
        }
        let mut text = vec![0; length];
        reader
            .read_exact(&mut text)
            .map_err(|error| format!("its header is cut off ({error})"))?;
        let text = String::from_utf8_lossy(&text);
        let (descr, fortran, shape) = parse(&text)
            .ok_or("its header is not that of a plain array: it holds records, or is damaged")?;
        if fortran && shape.len() > 1 {
            return Err("is in Fortran order: save it through numpy.ascontiguousarray".into());
        }
        let mut header = Header {
            descr,
            shape,
            bytes: before + length as u64,
            data: 0,
        };
        let data = header
            .shape
            .iter()
            .try_fold(header.item_bytes(), |data, &n| data.checked_mul(n as u64));
        header.data = data.filter(|data| data >> 60 == 0).ok_or_else(|| {
            format!(
                "its shape {:?} is impossible: the file is damaged",
                header.shape
            )
        })?;
        Ok(header)
    }

    /// Reads the header of an array that takes the `len` bytes from `offset` on.
    fn read_from(file: &File, offset: u64, len: u64) -> Result<Header, String> {
        let mut start = vec![0; len.min(MAX_HEADER_BYTES as u64 + 12) as usize];
        read_at(file, &mut start, offset).map_err(|error| error.to_string())?;
        Self::read(&mut &start[..])
    }

    /// The length of the header and the data together.
    fn end(&self) -> u64 {
        self.bytes + self.data
    }

    /// Whether a file of this size is all of the array.
    pub fn expect_end(&self, size: u64) -> Result<(), String> {
        match self.end() == size {
            true => Ok(()),
            false => Err(format!(
                "is {size} bytes long, its header says {}: the file is cut off or damaged",
                self.end()
            )),
        }
    }

    /// The type without its byte order.
    fn kind(&self) -> &str {
        self.descr.trim_start_matches(['<', '>', '|', '='])
    }

    pub fn item_bytes(&self) -> u64 {
        let digits = self.kind().get(1..);
        digits.and_then(|digits| digits.parse().ok()).unwrap_or(1)
    }

    /// What NumPy calls the type, for messages.
    fn dtype(&self) -> String {
        let kind = self.kind();
        let bits = self.item_bytes().saturating_mul(8);
        match kind.as_bytes() {
            [b'f', ..] => format!("float{bits}"),
            [b'i', ..] => format!("int{bits}"),
            [b'u', ..] => format!("uint{bits}"),
            [b'b', ..] => "bool".into(),
            [b'O', ..] => "object".into(),
            [b'U' | b'S', ..] => "text".into(),
            _ => kind.escape_debug().to_string(),
        }
    }

    /// Whether the items are bytes, as images' must be.
    pub fn check_u8(&self) -> Result<(), String> {
        match self.kind() {
            "u1" => Ok(()),
            "O" => Err(
                "holds pickled Python objects, which are not read: make one uint8 array of them with numpy.stack"
                    .into(),
            ),
            _ => Err(format!(
                "holds {} values, not 8-bit ones: scale them to 0..255 and save them with .astype(numpy.uint8), or, if they are codes, say how many there are (nr_codes)",
                self.dtype()
            )),
        }
    }

    /// The images of an array that is nothing else.
    fn images(&self) -> Result<Stack, String> {
        self.check_u8()?;
        let (images, shape, planar) = match self.shape[..] {
            [n, h, w, c @ (1 | 3)] => (n, [h, w, c], false),
            [n, c @ (1 | 3), h, w] => (n, [h, w, c], true),
            // A single image: no picture is only 1 or 3 wide.
            [h, w, c @ (1 | 3)] => (1, [h, w, c], false),
            [n, h, w] => (n, [h, w, 1], false),
            _ => {
                let help = match self.shape[..] {
                    [_, _, _, 4] => "keep the colours alone, x[..., :3]",
                    [_, 3072 | 12288] => {
                        "use numpy.reshape, or read batches of downsampled ImageNet as imagenet32 or imagenet64"
                    }
                    [_, _] => "use numpy.reshape, to [1, H, W] for a single grey image",
                    _ => "use numpy.reshape or numpy.transpose",
                };
                return Err(format!(
                    "has shape {:?}: images are {FORMS}: {help}",
                    self.shape
                ));
            }
        };
        match shape[..2].contains(&0) {
            true => Err(format!("has shape {:?}: its images are empty", self.shape)),
            false => Ok(Stack {
                images,
                shape,
                planar,
            }),
        }
    }

    /// The maps \[N, H, W\] of an array of codes.
    pub fn codes(&self) -> Result<[usize; 3], String> {
        self.expect_numbers()?;
        let shape = match self.shape[..] {
            [n, h, w] => [n, h, w],
            [h, w] => [1, h, w],
            _ => {
                return Err(format!(
                    "has shape {:?}: maps of codes are [N, H, W], or a single [H, W]: use numpy.reshape",
                    self.shape
                ));
            }
        };
        match shape.contains(&0) {
            true => Err(format!("has shape {:?}: it is empty", self.shape)),
            false => Ok(shape),
        }
    }

    /// Checks that the items are numbers of up to 8 bytes.
    fn expect_numbers(&self) -> Result<(), String> {
        match self.kind() {
            "b1" | "u1" | "i1" | "u2" | "i2" | "u4" | "i4" | "u8" | "i8" | "f4" | "f8" => Ok(()),
            _ => Err(format!("holds {} values, not numbers", self.dtype())),
        }
    }

    /// The number of items for each label: 1, or one for each class where labels are one-hot.
    fn label_columns(&self) -> Result<usize, String> {
        let shape = &self.shape;
        if self.data > MAX_LABEL_BYTES {
            return Err(format!("has shape {shape:?}, too large for labels"));
        }
        self.expect_numbers()?;
        match shape[..] {
            [_] => Ok(1),
            [_, columns] if (1..=MAX_CLASSES as usize).contains(&columns) => Ok(columns),
            _ => Err(format!(
                "has shape {shape:?}, where labels are [N] or one-hot [N, classes]"
            )),
        }
    }

    /// The class that some items stand for.
    fn label(&self, items: &[u8], columns: usize) -> Option<u32> {
        let mut numbers = items
            .chunks_exact(items.len() / columns)
            .map(|item| self.number(item));
        if columns == 1 {
            return numbers.next()?;
        }
        let mut class = None;
        for (column, number) in numbers.enumerate() {
            match (number?, class) {
                (0, _) => {}
                (1, None) => class = Some(column as u32),
                _ => return None,
            }
        }
        class
    }

    /// An item of up to 8 bytes as the number of a class, or as a code.
    pub fn number(&self, item: &[u8]) -> Option<u32> {
        let mut bytes = [0; 8];
        let little = &mut bytes[..item.len()];
        little.copy_from_slice(item);
        if self.descr.starts_with('>') {
            little.reverse();
        }
        let negative = little.last().is_some_and(|&byte| byte >= 0x80);
        let bits = u64::from_le_bytes(bytes);
        let number = match self.kind() {
            "f4" | "f8" => {
                let number = match item.len() {
                    4 => f32::from_bits(bits as u32).into(),
                    _ => f64::from_bits(bits),
                };
                let whole = (0.0..MAX_CLASSES as f64).contains(&number) && number.fract() == 0.0;
                whole.then_some(number as u64)
            }
            kind => (!(negative && kind.starts_with('i'))).then_some(bits),
        };
        number
            .filter(|&number| number < MAX_CLASSES)
            .map(|number| number as u32)
    }
}

/// Type, whether in Fortran order, and shape, of `{'descr': '|u1', 'fortran_order': False, 'shape':
/// (2, 32, 32, 3), }`, which Python 2 writes as `(2L, 32L, 32L, 3L)`, perhaps with `u'descr'`.
fn parse(header: &str) -> Option<(String, bool, Vec<usize>)> {
    let header = header.replace('"', "'");
    let after = |key: &str| {
        let (_, value) = header.split_once(&format!("'{key}'"))?;
        Some(value.trim_start().strip_prefix(':')?.trim_start())
    };
    let descr = after("descr")?.trim_start_matches(['u', 'b']);
    let (descr, _) = descr.strip_prefix('\'')?.split_once('\'')?;
    let order = after("fortran_order")?;
    let fortran = order.starts_with("True");
    if !fortran && !order.starts_with("False") {
        return None;
    }
    let (sides, _) = after("shape")?.strip_prefix('(')?.split_once(')')?;
    let sides = sides
        .split(',')
        .map(str::trim)
        .filter(|side| !side.is_empty())
        .map(|side| side.strip_suffix('L').unwrap_or(side).parse().ok());
    Some((descr.to_owned(), fortran, sides.collect::<Option<_>>()?))
}
