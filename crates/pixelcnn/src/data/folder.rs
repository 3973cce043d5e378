//! Pictures in a folder or in a tar: the same names in the same order, in either.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use pixelcnn_core::Stopped;
use rayon::prelude::*;

use super::arrays::Room;
use super::raw::{read_at, write_at};
use super::walk::{LeftOut, is_hidden, is_litter, walk};
use super::{
    Damaged, DataConfig, DataError, Dataset, Images, Listener, MEMORY_LIMIT, Split, hold_out, tell,
};
use crate::one_line;
use crate::picture::file::{self, Fit, MAX_FILE, Unread};
use crate::picture::{DroppedCount, FORMATS, is_picture};

/// Most headers end within this many bytes.
const HEADER_BYTES: u64 = 64 << 10;
/// The marks at the ends of files are no longer than this.
const END_BYTES: usize = 16;
/// Links that lead to links are followed so far.
const MAX_LINKS: usize = 16;

/// The names of the folders of splits, in any case; what comes first goes first.
const TRAIN: [&str; 2] = ["train", "training"];
const TEST: [&str; 6] = ["test", "testing", "val", "valid", "validation", "dev"];

/// Opens a split of a folder or tar, with its classes.
pub(super) fn open(
    path: &Path,
    config: &DataConfig,
    split: Split,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    let listing = Listing::of(path)?;
    listing.tell(listener)?;
    let layout = Layout::of(&listing);
    if let Some(note) = layout.note(&listing, config.held_out) {
        tell(listener, note)?;
    }
    let files = layout.files(&listing, split)?;
    let (classes, no_labels) = match layout.classes(&listing) {
        Ok(classes) => (classes, None),
        Err(problem) => (Vec::new(), Some(problem)),
    };
    let mut chosen: Vec<Chosen> = files
        .into_iter()
        .map(|file| Chosen {
            file,
            label: layout
                .class(&listing.files[file])
                .and_then(|class| {
                    classes
                        .binary_search_by(|known| known.as_str().cmp(class))
                        .ok()
                })
                .map(|label| label as u32),
            kept: true,
        })
        .collect();
    if layout.test.is_none() {
        chosen.iter_mut().for_each(|chosen| chosen.kept = false);
        let names = chosen
            .iter()
            .map(|chosen| &listing.files[chosen.file].name[layout.prefix.len()..]);
        for i in hold_out(names.collect::<Vec<_>>().iter(), config.held_out, split) {
            chosen[i].kept = true;
        }
    }
    let name = format!("{} {split}", path.display());
    Ok(Dataset {
        nr_classes: classes.len(),
        class_names: classes,
        no_labels,
        ..Pictures::open(listing, chosen, config, name, listener)?
    })
}

/// Opens all pictures of a folder or tar, without labels.
pub(super) fn open_whole(
    path: &Path,
    config: &DataConfig,
    name: String,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    let listing = Listing::of(path)?;
    listing.tell(listener)?;
    let files = (0..listing.files.len())
        .map(|file| Chosen {
            file,
            label: None,
            kept: true,
        })
        .collect();
    Pictures::open(listing, files, config, name, listener)
}

/// A picture's relative name, with `/` between its parts, and where its bytes are.
struct Entry {
    name: String,
    place: Place,
}

impl Entry {
    /// The folders that it is in, below a prefix of its name.
    fn folders(&self, prefix: &str) -> Vec<&str> {
        let mut parts: Vec<&str> = self.name[prefix.len()..].split('/').collect();
        parts.pop();
        parts
    }
}

#[derive(Clone)]
enum Place {
    File(PathBuf),
    Tar { offset: u64, len: u64 },
}

/// The pictures in a folder or tar, and its folders.
struct Listing {
    path: PathBuf,
    /// The tar, if it is one.
    tar: Option<File>,
    files: Vec<Entry>,
    folders: Vec<String>,
    left_out: LeftOut,
}

/// A picture of the part of a listing that was asked for.
struct Chosen {
    /// Its index in the listing.
    file: usize,
    label: Option<u32>,
    /// Whether it is in this split; if not, it still has a say in whether all are grey.
    kept: bool,
}

impl Listing {
    fn of(path: &Path) -> Result<Listing, DataError> {
        let mut listing = match path.is_dir() {
            true => Self::of_folder(path)?,
            false if is_picture(path) => Self::of_picture(path),
            false => Self::of_tar(path)?,
        };
        listing.files.sort_by(|a, b| a.name.cmp(&b.name));
        match listing.files.is_empty() {
            true => Err(no_pictures(path, &listing.left_out)),
            false => Ok(listing),
        }
    }

    fn of_folder(path: &Path) -> Result<Listing, DataError> {
        let walk = walk(path, is_picture)?;
        let name = |inside: &Path| relative_name(inside.strip_prefix(path).unwrap_or(inside));
        let files = walk.files.into_iter().filter_map(|picture| {
            Some(Entry {
                name: name(&picture)?,
                place: Place::File(picture),
            })
        });
        Ok(Listing {
            path: path.to_owned(),
            tar: None,
            files: files.collect(),
            folders: walk
                .folders
                .iter()
                .filter_map(|folder| name(folder))
                .collect(),
            left_out: walk.left_out,
        })
    }

    fn of_picture(path: &Path) -> Listing {
        let name = path.file_name().unwrap_or_default();
        let picture = Entry {
            name: name.to_string_lossy().into_owned(),
            place: Place::File(path.to_owned()),
        };
        Listing {
            path: path.parent().unwrap_or(Path::new("")).to_owned(),
            tar: None,
            files: vec![picture],
            folders: Vec::new(),
            left_out: LeftOut::default(),
        }
    }

    fn of_tar(path: &Path) -> Result<Listing, DataError> {
        let mut file = File::open(path).map_err(DataError::io(path))?;
        let size = file.metadata().map_err(DataError::io(path))?.len();
        expect_tar(path, &mut file)?;
        let damaged =
            |error: io::Error| DataError::io(path)(io::Error::new(error.kind(), one_line(error)));
        // As unpacking does it, a later entry of the same name takes the place of an earlier one.
        let mut files: BTreeMap<String, Place> = BTreeMap::new();
        let mut links: BTreeMap<String, Option<String>> = BTreeMap::new();
        let (mut folders, mut left_out) = (BTreeSet::new(), LeftOut::default());
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek().map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            let name = entry.path().map_err(damaged)?;
            let Some(name) = relative_name(&name) else {
                continue;
            };
            if name.split('/').any(is_litter) {
                continue;
            }
            if name.split('/').any(is_hidden) {
                left_out.add("hidden");
                continue;
            }
            let (offset, len) = (entry.raw_file_position(), entry.size());
            let kind = entry.header().entry_type();
            match kind {
                tar::EntryType::Directory => {
                    folders.insert(name);
                }
                tar::EntryType::Regular | tar::EntryType::Continuous => {
                    if is_picture(Path::new(&name))
                        && offset.checked_add(len).is_none_or(|end| end > size)
                    {
                        return Err(DataError::Picture {
                            name: one_line(format!("{}: {name}", path.display())),
                            problem: "the tar is cut off in it".into(),
                        });
                    }
                    links.remove(&name);
                    files.insert(name, Place::Tar { offset, len });
                }
                tar::EntryType::Link | tar::EntryType::Symlink => {
                    let target = entry.link_name().map_err(damaged)?;
                    let from = match kind {
                        tar::EntryType::Symlink => Path::new(&name).parent(),
                        _ => None,
                    };
                    let target = target.and_then(|target| inside(from, &target));
                    files.remove(&name);
                    links.insert(name, target);
                }
                tar::EntryType::XGlobalHeader => {}
                tar::EntryType::Fifo | tar::EntryType::Char | tar::EntryType::Block => {
                    left_out.add("pipe, socket or device");
                }
                _ => left_out.add("entry of an unknown kind"),
            }
        }
        follow(&links, &mut files, &mut left_out);
        let mut pictures = Vec::new();
        for (name, place) in files {
            match is_picture(Path::new(&name)) {
                true => pictures.push(Entry { name, place }),
                false => left_out.add_file(Path::new(&name)),
            }
        }
        Ok(Listing {
            path: path.to_owned(),
            tar: Some(file),
            files: pictures,
            folders: folders.into_iter().collect(),
            left_out,
        })
    }

    /// Tells what is left out.
    fn tell(&self, listener: &mut Listener) -> Result<(), Stopped> {
        match self.left_out.is_empty() {
            true => Ok(()),
            false => tell(listener, format!("{}: {}", self.name(""), self.left_out)),
        }
    }

    /// The names of the folders directly under a prefix (which ends in `/` or is empty).
    fn children(&self, prefix: &str) -> BTreeSet<&str> {
        let of_files = self.files.iter().filter_map(|file| {
            let (child, _) = file.name.strip_prefix(prefix)?.split_once('/')?;
            Some(child)
        });
        let of_folders = self.folders.iter().filter_map(|name| {
            let rest = name.strip_prefix(prefix)?;
            rest.split('/').next().filter(|child| !child.is_empty())
        });
        of_files.chain(of_folders).collect()
    }

    /// What a file or folder in it is called in messages.
    fn name(&self, inside: &str) -> String {
        let inside = inside.trim_end_matches('/');
        one_line(match &self.tar {
            _ if inside.is_empty() => self.path.display().to_string(),
            None => self.path.join(inside).display().to_string(),
            Some(_) => format!("{}: {inside}", self.path.display()),
        })
    }

    fn failed(&self, entry: &Entry, problem: String) -> DataError {
        DataError::Picture {
            name: self.name(&entry.name),
            problem,
        }
    }

    /// Up to `limit` bytes of a picture's file from `from` on, and the length of all of it.
    fn bytes(&self, entry: &Entry, from: u64, limit: u64) -> Result<(Vec<u8>, u64), DataError> {
        let mut bytes = Vec::new();
        let len = match (&entry.place, &self.tar) {
            (Place::Tar { offset, len }, Some(tar)) => {
                expect_size(*len).map_err(|problem| self.failed(entry, problem))?;
                bytes.resize(limit.min(len.saturating_sub(from)) as usize, 0);
                read_at(tar, &mut bytes, offset + from).map_err(DataError::io(&self.path))?;
                *len
            }
            (Place::File(path), _) => {
                let mut file = File::open(path).map_err(DataError::io(path))?;
                let len = file.metadata().map_err(DataError::io(path))?.len();
                expect_size(len).map_err(|problem| self.failed(entry, problem))?;
                file.seek(SeekFrom::Start(from))
                    .and_then(|_| file.take(limit).read_to_end(&mut bytes))
                    .map_err(DataError::io(path))?;
                len
            }
            (Place::Tar { .. }, None) => 0,
        };
        Ok((bytes, len))
    }

    /// Reads a picture's header, and makes sure that the rest of the file is there: by its end where
    /// that is enough and not all of it is asked for, else by decoding it.
    fn check(&self, entry: &Entry, all: bool) -> Result<file::Header, String> {
        let read = |from, limit| self.bytes(entry, from, limit).map_err(one_line);
        let (mut bytes, len) = read(0, HEADER_BYTES)?;
        let header = match file::header(&bytes, len <= HEADER_BYTES) {
            // Perhaps a long profile or thumbnail comes before the size.
            Err(_) if len > HEADER_BYTES => {
                bytes = read(0, len)?.0;
                file::header(&bytes, true)
            }
            header => header,
        }?;
        if !all {
            let last = match bytes.len() as u64 == len {
                true => bytes[bytes.len().saturating_sub(END_BYTES)..].to_vec(),
                false => read(len.saturating_sub(END_BYTES as u64), END_BYTES as u64)?.0,
            };
            if file::is_surely_whole(&bytes, &last, len) {
                return Ok(header);
            }
        }
        if (bytes.len() as u64) < len {
            bytes = read(0, len)?.0;
        }
        let size = [header.height, header.width];
        file::decode(&bytes, 3, Fit::Exact(size))
            .map(|_| header)
            .map_err(changed)
    }
}

/// Why a picture whose header was read before is not read.
fn changed(unread: Unread) -> String {
    match unread {
        Unread::Because(problem) => problem,
        _ => "its size has changed since it was opened".into(),
    }
}

fn expect_size(len: u64) -> Result<(), String> {
    match len > MAX_FILE {
        true => Err(format!("larger than {} MiB", MAX_FILE >> 20)),
        false => Ok(()),
    }
}

/// What is said of a folder or tar without pictures.
fn no_pictures(path: &Path, left_out: &LeftOut) -> DataError {
    let left_out = match left_out.is_empty() {
        true => String::new(),
        false => format!(" ({left_out})"),
    };
    DataError::Empty {
        name: path.display().to_string(),
        problem: format!("no pictures in it{left_out}: give a folder that holds {FORMATS} files"),
    }
}

/// Names a compressed or other file that is only called a tar.
fn expect_tar(path: &Path, file: &mut File) -> Result<(), DataError> {
    let mut start = Vec::new();
    file.take(6)
        .read_to_end(&mut start)
        .and_then(|_| file.rewind())
        .map_err(DataError::io(path))?;
    let (what, how) = match start[..] {
        [0x1F, 0x8B, ..] => ("compressed with gzip", "unpack it with gunzip or tar -xzf"),
        [b'B', b'Z', b'h', ..] => ("compressed with bzip2", "unpack it with tar -xjf"),
        [0xFD, b'7', b'z', b'X', b'Z', ..] => ("compressed with xz", "unpack it with tar -xJf"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => ("compressed with zstd", "unpack it with tar --zstd -xf"),
        [b'P', b'K', 3, 4, ..] => ("a zip archive, not a tar", "unpack it with unzip"),
        _ => return Ok(()),
    };
    Err(DataError::Config(format!(
        "{}: it is {what}: {how} and give the folder",
        path.display()
    )))
}

/// The name inside an archive that a link leads to: from the folder that it is in, or from the top.
fn inside(from: Option<&Path>, target: &Path) -> Option<String> {
    let mut parts: Vec<String> = Vec::new();
    for part in from.unwrap_or(Path::new("")).join(target).components() {
        match part {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::CurDir => {}
            Component::ParentDir => {
                parts.pop()?;
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(parts.join("/"))
}

/// Adds the files that links lead to under the links' names, and all files of a folder that one
/// leads to; counts the links that lead nowhere.
fn follow(
    links: &BTreeMap<String, Option<String>>,
    files: &mut BTreeMap<String, Place>,
    left_out: &mut LeftOut,
) {
    for (link, target) in links {
        let mut end = target.as_ref();
        for _ in 0..MAX_LINKS {
            match end.and_then(|name| links.get(name)) {
                Some(next) => end = next.as_ref(),
                None => break,
            }
        }
        let mut found = Vec::new();
        if let Some(end) = end {
            if let Some(place) = files.get(end) {
                found.push((link.clone(), place.clone()));
            } else if !format!("{link}/").starts_with(&format!("{end}/")) && !end.is_empty() {
                let under = format!("{end}/");
                let inside = files.range(under.clone()..);
                let inside = inside.take_while(|(name, _)| name.starts_with(&under));
                found.extend(
                    inside.map(|(name, place)| {
                        (format!("{link}{}", &name[end.len()..]), place.clone())
                    }),
                );
            }
        }
        match found.is_empty() {
            true => left_out.add("link that leads nowhere in it"),
            false => files.extend(found),
        }
    }
}

/// Where in the pictures' names their splits and classes are.
struct Layout {
    /// The folders around everything, which mean nothing; as tars have them.
    prefix: String,
    /// How many folders further down the splits' folders are.
    depth: usize,
    /// The folders' names, where there are such.
    train: Option<String>,
    test: Option<String>,
}

impl Layout {
    fn of(listing: &Listing) -> Layout {
        let mut layout = Layout {
            prefix: String::new(),
            depth: 0,
            train: None,
            test: None,
        };
        let at = |layout: &Layout, depth: usize| -> BTreeSet<Option<&str>> {
            let files = listing.files.iter();
            files
                .map(|file| file.folders(&layout.prefix).get(depth).copied())
                .collect()
        };
        let of_kind = |names: &BTreeSet<Option<&str>>, kind: &[&str]| {
            let mut kind = kind.iter();
            kind.find_map(|kind| {
                let mut names = names.iter().flatten();
                let name = names.find(|name| name.eq_ignore_ascii_case(kind))?;
                Some((*name).to_owned())
            })
        };
        while let [Some(only)] = at(&layout, 0).iter().collect::<Vec<_>>()[..]
            && of_kind(&[Some(*only)].into(), &[&TRAIN[..], &TEST].concat()).is_none()
        {
            layout.prefix = format!("{}{only}/", layout.prefix);
        }
        for depth in 0..2 {
            let names = at(&layout, depth);
            let train = of_kind(&names, &TRAIN);
            if train.is_some() {
                let test = of_kind(&names, &TEST);
                return Layout {
                    depth,
                    train,
                    test,
                    ..layout
                };
            }
        }
        layout.test = of_kind(&at(&layout, 0), &TEST);
        layout
    }

    /// The split that a picture is in: its folder's name, or nothing where it is in none of them.
    fn split<'a>(&self, entry: &'a Entry) -> Option<&'a str> {
        entry.folders(&self.prefix).get(self.depth).copied()
    }

    /// The folder of a picture that can be its class.
    fn class<'a>(&self, entry: &'a Entry) -> Option<&'a str> {
        let mut folders = entry.folders(&self.prefix);
        if self.train.is_some() || self.test.is_some() {
            folders.remove(self.depth);
        }
        folders.first().copied()
    }

    /// The pictures of a split, or all of those of which a part is held out.
    fn files(&self, listing: &Listing, split: Split) -> Result<Vec<usize>, DataError> {
        let folder = match (&self.train, &self.test, split) {
            (None, None, _) => return Ok((0..listing.files.len()).collect()),
            (None, Some(test), Split::Train) => {
                return Err(DataError::Empty {
                    name: listing.name(&self.prefix),
                    problem: format!(
                        "{test}/ is for testing and there is no folder train/ beside it: \
                         put the training images there, or give another name to {test}/"
                    ),
                });
            }
            (_, Some(test), Split::Test) => test,
            (Some(train), _, _) => train,
        };
        let is_in = |&file: &usize| self.split(&listing.files[file]) == Some(folder);
        Ok((0..listing.files.len()).filter(is_in).collect())
    }

    /// Which folder is which split, how many images each has, and what is unused, in one line.
    fn note(&self, listing: &Listing, held_out: f64) -> Option<String> {
        let mut counts: BTreeMap<Option<&str>, usize> = BTreeMap::new();
        for file in &listing.files {
            *counts.entry(self.split(file)).or_default() += 1;
        }
        let above = "*/".repeat(self.depth);
        let mut said = Vec::new();
        for (split, name) in [("training", &self.train), ("test", &self.test)] {
            if let Some(name) = name {
                let count = counts.remove(&Some(name.as_str())).unwrap_or_default();
                said.push(format!("{split} images in {above}{name}/ ({count})"));
            }
        }
        if said.is_empty() {
            return None;
        }
        if self.test.is_none() && held_out > 0.0 {
            said.push(format!("of which {held_out} are held out as test images"));
        }
        let mut unused: Vec<_> = counts.into_iter().collect();
        // Those beside the folders last.
        unused.reverse();
        let unused = unused.into_iter().map(|(name, count)| match name {
            Some(name) => format!("{above}{name}/ ({count})"),
            None => format!("{count} beside them"),
        });
        let unused: Vec<_> = unused.collect();
        let unused = match unused.is_empty() {
            true => String::new(),
            false => format!("; unused: {}", unused.join(", ")),
        };
        let name = listing.name(&self.prefix);
        Some(one_line(format!("{name}: {}{unused}", said.join(", "))))
    }

    /// The classes, sorted: the folders in the training split's, where there are two or more. Or why
    /// they can't be told.
    fn classes(&self, listing: &Listing) -> Result<Vec<String>, String> {
        let of = |split| {
            let files = self.files(listing, split).unwrap_or_default();
            files
                .into_iter()
                .map(|file| self.class(&listing.files[file]))
        };
        let found: BTreeSet<Option<&str>> = of(Split::Train).collect();
        let folder = match &self.train {
            Some(train) if self.depth == 0 => format!("{}{train}/", self.prefix),
            _ => self.prefix.clone(),
        };
        let name = listing.name(&folder);
        let mut classes: BTreeSet<&str> = found.iter().copied().flatten().collect();
        if classes.is_empty() {
            return Ok(Vec::new());
        }
        if found.contains(&None) {
            return Err(format!(
                "{name} has pictures both in sub-folders (classes) and beside them"
            ));
        }
        let children = match self.depth {
            0 => listing.children(&folder),
            _ => BTreeSet::new(),
        };
        if let (true, Some(empty)) = (
            children.len() > 1,
            children.iter().find(|child| !classes.contains(*child)),
        ) {
            return Err(format!(
                "{} has no pictures of its class",
                listing.name(&format!("{folder}{empty}"))
            ));
        }
        if classes.len() < 2 {
            classes.clear();
        }
        if let Some(test) = &self.test
            && !classes.is_empty()
        {
            for class in of(Split::Test) {
                match class {
                    None => return Err(format!("the pictures in {test}/ have no classes")),
                    Some(class) if !classes.contains(class) => {
                        return Err(format!(
                            "class {} of {test}/ is not in {name}",
                            one_line(class)
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(classes.into_iter().map(str::to_owned).collect())
    }
}

/// A picture's relative name, or nothing for the folder itself.
fn relative_name(path: &Path) -> Option<String> {
    let parts: Vec<_> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(part) => Some(part.to_string_lossy()),
            _ => None,
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Pictures of a listing, decoded when they are first read.
pub(super) struct Pictures {
    listing: Listing,
    /// Each picture's index in the listing.
    files: Vec<usize>,
    /// Height and width of each decoded picture.
    sizes: Vec<[usize; 2]>,
    channels: usize,
    size: Option<usize>,
    decoded: Decoded,
}

/// Where pictures stay once they are decoded.
enum Decoded {
    /// A place for each.
    Memory(Vec<OnceLock<Vec<u8>>>),
    /// A temporary file in a folder, and of each picture where it begins and whether it is there.
    File {
        folder: PathBuf,
        file: File,
        places: Vec<(u64, AtomicBool)>,
    },
    /// All together would be too large for memory.
    Nowhere,
}

impl Pictures {
    /// The kept ones of the chosen pictures. Looks at all of them: damaged ones are refused or
    /// skipped, and there is one channel only if all are grey.
    fn open(
        listing: Listing,
        mut chosen: Vec<Chosen>,
        config: &DataConfig,
        name: String,
        listener: &mut Listener,
    ) -> Result<Dataset, DataError> {
        let size = config.size;
        let checked: Vec<_> = chosen
            .par_iter()
            .map(|chosen| listing.check(&listing.files[chosen.file], config.skip_damaged))
            .collect();
        let damaged = chosen.iter().zip(&checked).filter_map(|(chosen, checked)| {
            let problem = checked.as_ref().err()?;
            let name = listing.name(&listing.files[chosen.file].name);
            Some(format!("{name} ({problem})"))
        });
        let damaged: Vec<String> = damaged.collect();
        if !damaged.is_empty() {
            let damaged = Damaged::of(chosen.len(), damaged);
            if !config.skip_damaged {
                return Err(DataError::Damaged(damaged));
            }
            tell(listener, format!("skipped: {damaged}"))?;
            let mut whole = checked.iter().map(Result::is_ok);
            chosen.retain(|_| whole.next().unwrap_or_default());
        }
        let headers: Vec<file::Header> = checked.into_iter().flatten().collect();
        let sides =
            |header: &file::Header| size.map_or([header.height, header.width], |size| [size, size]);
        let channels = if headers.iter().all(|header| header.grey) {
            1
        } else {
            3
        };

        let mut dropped = DroppedCount::default();
        for (_, header) in chosen
            .iter()
            .zip(&headers)
            .filter(|(chosen, _)| chosen.kept)
        {
            dropped += header.dropped;
        }
        let kept = || chosen.iter().filter(|chosen| chosen.kept);
        let files: Vec<usize> = kept().map(|chosen| chosen.file).collect();
        let labels = kept().filter_map(|chosen| chosen.label).collect();
        let all = chosen.iter().zip(&headers);
        let sizes = all.filter(|(chosen, _)| chosen.kept);
        let sizes: Vec<[usize; 2]> = sizes.map(|(_, header)| sides(header)).collect();
        let first = sizes.first().copied().unwrap_or([0, 0]);
        let mut pictures = Pictures {
            listing,
            files,
            sizes,
            channels,
            size,
            decoded: Decoded::Nowhere,
        };
        if pictures.bytes() <= MEMORY_LIMIT {
            let places = pictures.files.iter().map(|_| OnceLock::new());
            pictures.decoded = Decoded::Memory(places.collect());
        }
        let images = Images::Pictures(pictures);
        Ok(Dataset {
            name,
            shape: [first[0], first[1], channels],
            images,
            crops: None,
            labels,
            nr_classes: 0,
            class_names: Vec::new(),
            no_labels: None,
            dropped,
        })
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Height and width of each picture.
    pub fn sizes(&self) -> &[[usize; 2]] {
        &self.sizes
    }

    /// The relative name of picture `index`.
    pub fn name(&self, index: usize) -> Option<&str> {
        let file = *self.files.get(index)?;
        Some(&self.listing.files[file].name)
    }

    /// Bytes of a decoded picture.
    fn bytes_of(&self, [height, width]: [usize; 2]) -> u64 {
        let sides = [width, self.channels].into_iter();
        sides.fold(height as u64, |n, side| n.saturating_mul(side as u64))
    }

    /// Bytes of all decoded pictures.
    fn bytes(&self) -> u64 {
        let each = self.sizes.iter().map(|&size| self.bytes_of(size));
        each.fold(0, u64::saturating_add)
    }

    /// Makes sure that no picture is decoded twice: what is too large for memory goes to a temporary file,
    /// and the listener is told so.
    pub fn keep(
        &mut self,
        room: &Room,
        name: &str,
        listener: &mut Listener,
    ) -> Result<(), DataError> {
        let bytes = self.bytes();
        if bytes <= room.memory {
            return Ok(());
        }
        let folder = room.spill.clone();
        std::fs::create_dir_all(&folder).map_err(DataError::io(&folder))?;
        let file = tempfile::tempfile_in(&folder).map_err(DataError::io(&folder))?;
        let text = format_args!(
            "{name}: its pictures are {:.1} GB of pixels, which go to a temporary file in {} as they are read",
            bytes as f64 / 1e9,
            folder.display()
        );
        tell(listener, one_line(text))?;
        let mut end = 0;
        let places = self.sizes.iter().map(|&size| {
            let start = end;
            end += self.bytes_of(size);
            (start, AtomicBool::new(false))
        });
        self.decoded = Decoded::File {
            places: places.collect(),
            folder,
            file,
        };
        Ok(())
    }

    /// Picture `index`, which is below `len()`, as [H, W, C].
    pub fn read(&self, index: usize) -> Result<Cow<'_, [u8]>, DataError> {
        self.rows(index, 0..self.sizes[index][0])
    }

    /// Some of its rows.
    pub fn rows(&self, index: usize, rows: Range<usize>) -> Result<Cow<'_, [u8]>, DataError> {
        let row = self.sizes[index][1] * self.channels;
        let range = rows.start * row..rows.end * row;
        // Of two threads with the same picture, both decode it, and keep the same.
        match &self.decoded {
            Decoded::Memory(places) => {
                let pixels = match places[index].get() {
                    Some(pixels) => pixels,
                    None => {
                        let pixels = self.decode(index)?;
                        places[index].get_or_init(|| pixels)
                    }
                };
                Ok(pixels[range].into())
            }
            Decoded::File {
                folder,
                file,
                places,
            } => {
                let (start, is_there) = &places[index];
                if !is_there.load(Ordering::Acquire) {
                    let pixels = self.decode(index)?;
                    write_at(file, &pixels, *start).map_err(DataError::io(folder))?;
                    is_there.store(true, Ordering::Release);
                }
                let mut pixels = vec![0; range.len()];
                read_at(file, &mut pixels, start + range.start as u64)
                    .map_err(DataError::io(folder))?;
                Ok(pixels.into())
            }
            Decoded::Nowhere => {
                let mut pixels = self.decode(index)?;
                pixels.truncate(range.end);
                pixels.drain(..range.start);
                Ok(pixels.into())
            }
        }
    }

    fn decode(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let entry = &self.listing.files[self.files[index]];
        let (bytes, _) = self.listing.bytes(entry, 0, MAX_FILE)?;
        let fit = self.size.map_or(Fit::Exact(self.sizes[index]), Fit::Square);
        file::decode(&bytes, self.channels, fit)
            .map(|decoded| decoded.levels)
            .map_err(|unread| self.listing.failed(entry, changed(unread)))
    }
}
