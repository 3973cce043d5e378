//! Images in NumPy's `.npy` and `.npz` files.
//!
//! The `.npy` header is read here rather than by `npyz`, which trusts its lengths and nesting.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use npyz::npz::NpzArchive;

use super::rows::{Bytes, Rows, read_at};
use super::{DataError, Dataset, Images, MEMORY_LIMIT, Split, cache_dir, hold_out};
use crate::picture::DroppedCount;

/// NumPy itself writes 64 to 256 bytes.
const MAX_HEADER_BYTES: usize = 10_000;
/// Deflate cannot shrink anything further than 1032 to 1.
const MAX_DEFLATE_RATIO: u64 = 1032;
const MAX_LABEL_BYTES: u64 = 1 << 28;
/// Labels beyond this are surely not classes.
const MAX_CLASSES: u64 = 1 << 16;

/// Opens a `.npy` file of images, read as they are needed.
pub(super) fn open_npy(path: &Path, held_out: f64, split: Split) -> Result<Dataset, DataError> {
    let bad = |problem| DataError::Array {
        path: path.to_owned(),
        problem,
    };
    let file = File::open(path).map_err(DataError::io(path))?;
    let size = file.metadata().map_err(DataError::io(path))?.len();
    let header = Header::read(&mut BufReader::new(&file)).map_err(bad)?;
    let (images, shape) = header.images().map_err(bad)?;
    if header.end() != size {
        return Err(bad(format!(
            "is {size} bytes long, its header says {}: the file is cut off or damaged",
            header.end()
        )));
    }
    let part = Bytes::File {
        path: path.to_owned(),
        file,
        offset: header.bytes,
    };
    let pick = hold_out((0..images as u64).map(u64::to_le_bytes), held_out, split);
    let images = Images::Rows(Rows {
        parts: vec![(part, images)],
        shape,
        planar: false,
        pick: Some(pick),
    });
    let name = format!("{} {split}", path.display());
    Ok(Dataset {
        name,
        shape,
        images,
        labels: Vec::new(),
        nr_classes: 0,
        class_names: Vec::new(),
        no_labels: None,
        dropped: DroppedCount::default(),
    })
}

/// The names under which `.npz` files hold a training and a test split.
const SPLIT_NAMES: [[(&str, &str); 2]; 2] = [
    [("trainx", "trainy"), ("testx", "testy")],
    [("x_train", "y_train"), ("x_test", "y_test")],
];

/// Opens a `.npz` file of images and labels. The images go where there is `room`.
pub(super) fn open_npz(
    path: &Path,
    held_out: f64,
    split: Split,
    mut room: Room,
) -> Result<Dataset, DataError> {
    let mut npz = Npz::open(path)?;
    let [train, test] = match SPLIT_NAMES.into_iter().find(|[train, _]| npz.has(train.0)) {
        Some([train, test]) => [train, test],
        None if npz.has("x") => [("x", "y"), ("", "")],
        None => {
            return Err(npz.bad(format!(
                "holds {}: name the images trainx and testx (labels trainy and testy), or x (labels y)",
                npz.contents()
            )));
        }
    };
    let splits = if npz.has(test.0) {
        vec![train, test]
    } else {
        vec![train]
    };
    let (x, y) = if split == Split::Test && splits.len() == 2 {
        test
    } else {
        train
    };
    let (part, images, shape) = npz.images(x, Header::images, &mut room)?;

    // The classes are those of both splits.
    let mut labels = Vec::new();
    let mut nr_classes = 0;
    let mut labelled = false;
    for (split_x, split_y) in splits.iter().copied() {
        if npz.has(split_y) {
            let all = npz.labels(split_y)?;
            labelled = true;
            nr_classes = all
                .iter()
                .fold(nr_classes, |n, &label| n.max(label as usize + 1));
            if split_x == x {
                labels = all;
            }
        }
    }
    if labelled && labels.len() != images {
        return Err(npz.bad(format!(
            "{images} images in {x}, {} labels in {y}: both need as many",
            labels.len()
        )));
    }

    let pick = (splits.len() == 1)
        .then(|| hold_out((0..images as u64).map(u64::to_le_bytes), held_out, split));
    if let (Some(pick), false) = (&pick, labels.is_empty()) {
        labels = pick.iter().map(|&i| labels[i]).collect();
    }
    let images = Images::Rows(Rows {
        parts: vec![(part, images)],
        shape,
        planar: false,
        pick,
    });
    let name = format!("{} {split}", path.display());
    Ok(Dataset {
        name,
        shape,
        images,
        labels,
        nr_classes,
        class_names: Vec::new(),
        no_labels: None,
        dropped: DroppedCount::default(),
    })
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
    zip: NpzArchive<BufReader<File>>,
    size: u64,
}

impl Npz {
    pub fn open(path: &Path) -> Result<Npz, DataError> {
        let file = File::open(path).map_err(DataError::io(path))?;
        let size = file.metadata().map_err(DataError::io(path))?.len();
        let zip = NpzArchive::new(BufReader::new(file)).map_err(|error| DataError::Array {
            path: path.to_owned(),
            problem: format!("not a whole .npz file ({error}): it is cut off or damaged"),
        })?;
        Ok(Npz {
            path: path.to_owned(),
            zip,
            size,
        })
    }

    fn bad(&self, problem: String) -> DataError {
        DataError::Array {
            path: self.path.clone(),
            problem,
        }
    }

    fn has(&self, name: &str) -> bool {
        self.zip.array_names().any(|array| array == name)
    }

    /// The arrays' names, for messages.
    fn contents(&self) -> String {
        let mut names: Vec<&str> = self.zip.array_names().take(8).collect();
        names.sort_unstable();
        match names.is_empty() {
            true => "no arrays".to_owned(),
            false => format!("the arrays {}", names.join(", ").escape_debug()),
        }
    }

    /// The array `name`, its header read.
    fn member(&mut self, name: &str) -> Result<Member<'_>, DataError> {
        let bad = |problem| DataError::Array {
            path: self.path.clone(),
            problem,
        };
        let mut zipped = self
            .zip
            .zip_archive()
            .by_name(&npyz::npz::file_name_from_array_name(name))
            .map_err(|error| bad(format!("{name}: {error}: save it again with numpy.savez")))?;
        let header =
            Header::read(&mut zipped).map_err(|problem| bad(format!("{name}: {problem}")))?;
        Ok(Member {
            path: &self.path,
            name: name.to_owned(),
            header,
            size: zipped.size(),
            compressed: zipped.compressed_size(),
            start: zipped.data_start(),
            file_size: self.size,
            data: Box::new(zipped),
        })
    }

    /// The images in the array `name`, whose header `interpret` checks; returns their bytes, number
    /// and shape. They go where there is `room`, which shrinks.
    pub fn images(
        &mut self,
        name: &str,
        interpret: impl FnOnce(&Header) -> Result<(usize, [usize; 3]), String>,
        room: &mut Room,
    ) -> Result<(Bytes, usize, [usize; 3]), DataError> {
        let member = self.member(name)?;
        let (images, shape) = interpret(&member.header).map_err(|problem| member.bad(problem))?;
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
        Ok((bytes, images, shape))
    }

    /// The labels in the integer array `name`, `[N]` or `[N, 1]`.
    pub fn labels(&mut self, name: &str) -> Result<Vec<u32>, DataError> {
        let member = self.member(name)?;
        let width = member
            .header
            .label_bytes()
            .map_err(|problem| member.bad(problem))?;
        member.check_length()?;
        let descr = member.header.descr.clone();
        let beyond = member.bad(format!(
            "a label is negative or above {}: number the classes from 0",
            MAX_CLASSES - 1
        ));
        let bytes = member.into_memory()?;
        let label = |number: &[u8]| {
            let mut little = [0; 8];
            little[..width].copy_from_slice(number);
            if descr.starts_with('>') {
                little[..width].reverse();
            }
            let negative = descr.contains('i') && little[width - 1] >= 0x80;
            let label = u64::from_le_bytes(little);
            (!negative && label < MAX_CLASSES).then_some(label as u32)
        };
        bytes
            .chunks_exact(width)
            .map(label)
            .collect::<Option<_>>()
            .ok_or(beyond)
    }
}

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
            problem: format!("{}: {problem}", self.name),
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
#[derive(Debug, PartialEq, Eq)]
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
    fn read(reader: &mut impl Read) -> Result<Header, String> {
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
        let (descr, fortran, shape) =
            parse(&text).ok_or("its header is not that of a plain array: the file is damaged")?;
        if fortran && shape.len() > 1 {
            return Err("is in Fortran order: save it through numpy.ascontiguousarray".into());
        }
        let item = descr
            .trim_start_matches(['<', '>', '|', '='])
            .get(1..)
            .and_then(|digits| digits.parse::<u64>().ok());
        let data = shape
            .iter()
            .try_fold(item.unwrap_or(1), |data, &n| data.checked_mul(n as u64));
        match data.filter(|data| data >> 60 == 0) {
            Some(data) => Ok(Header {
                descr: descr.to_owned(),
                shape,
                bytes: before + length as u64,
                data,
            }),
            None => Err(format!(
                "its shape {shape:?} is impossible: the file is damaged"
            )),
        }
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

    /// Whether the items are bytes, as images' must be.
    pub fn check_u8(&self) -> Result<(), String> {
        match self.descr.trim_start_matches(['<', '>', '|', '=']) {
            "u1" => Ok(()),
            kind => Err(format!(
                "holds {} values, not 8-bit ones: scale them to 0..255 and save them with .astype(numpy.uint8)",
                kind.escape_debug()
            )),
        }
    }

    /// The number of images and their height, width and channels.
    fn images(&self) -> Result<(usize, [usize; 3]), String> {
        self.check_u8()?;
        match self.shape[..] {
            [n, h, w] if h > 0 && w > 0 => Ok((n, [h, w, 1])),
            [n, h, w, c @ (1 | 3)] if h > 0 && w > 0 => Ok((n, [h, w, c])),
            _ => Err(format!(
                "has shape {:?}: images are [N, H, W, 1 or 3] or [N, H, W]",
                self.shape
            )),
        }
    }

    /// The length of each label.
    fn label_bytes(&self) -> Result<usize, String> {
        if self.data > MAX_LABEL_BYTES {
            return Err(format!("has shape {:?}: too many labels", self.shape));
        }
        let width = match self.descr.trim_start_matches(['<', '>', '|', '=']) {
            "u1" | "i1" => 1,
            "u2" | "i2" => 2,
            "u4" | "i4" => 4,
            "u8" | "i8" => 8,
            kind => {
                return Err(format!(
                    "holds {} values: labels are integers",
                    kind.escape_debug()
                ));
            }
        };
        match self.shape[..] {
            [_] | [_, 1] => Ok(width),
            _ => Err(format!("has shape {:?}: labels are [N]", self.shape)),
        }
    }
}

/// Type, whether in Fortran order, and shape, of `{'descr': '|u1', 'fortran_order': False, 'shape':
/// (2, 32, 32, 3), }`.
fn parse(header: &str) -> Option<(&str, bool, Vec<usize>)> {
    let after = |key: &str| {
        Some(
            header
                .split_once(key)?
                .1
                .trim_start()
                .strip_prefix(':')?
                .trim_start(),
        )
    };
    let descr = after("'descr'")?.strip_prefix('\'')?.split_once('\'')?.0;
    let order = after("'fortran_order'")?;
    let fortran = order.starts_with("True");
    if !fortran && !order.starts_with("False") {
        return None;
    }
    let sides = after("'shape'")?.strip_prefix('(')?.split_once(')')?.0;
    let sides = sides
        .split(',')
        .map(str::trim)
        .filter(|side| !side.is_empty());
    Some((
        descr,
        fortran,
        sides.map(|side| side.parse().ok()).collect::<Option<_>>()?,
    ))
}
