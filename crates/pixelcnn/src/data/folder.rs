//! Pictures in a folder or in a tar: the same names in the same order, in either.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use rayon::prelude::*;

use super::{
    DataConfig, DataError, Dataset, Images, MEMORY_LIMIT, Split, hold_out, one_line, picture,
    rows::read_at,
};
use crate::picture::{is_hidden, is_picture, walk};

/// Most headers end within this many bytes.
const HEADER_BYTES: u64 = 64 << 10;
/// No picture file that decodes within the decoders' limits is larger.
const MAX_FILE_BYTES: u64 = 1 << 30;

/// Opens a split of a folder or tar, with its classes.
pub(super) fn open(path: &Path, config: &DataConfig, split: Split) -> Result<Dataset, DataError> {
    let listing = Listing::of(path)?;
    let (files, class_names) = listing.split(split, config.held_out)?;
    let dataset = Pictures::open(
        listing,
        files,
        config.size,
        format!("{} {split}", path.display()),
    )?;
    Ok(Dataset {
        nr_classes: class_names.len(),
        class_names,
        ..dataset
    })
}

/// Opens all pictures of a folder or tar, without labels.
pub(super) fn open_whole(
    path: &Path,
    size: Option<usize>,
    name: String,
) -> Result<Dataset, DataError> {
    let listing = Listing::of(path)?;
    let files = (0..listing.files.len())
        .map(|file| Chosen {
            file,
            label: None,
            kept: true,
        })
        .collect();
    Pictures::open(listing, files, size, name)
}

/// A picture's relative name, with `/` between its parts, and where its bytes are.
struct Entry {
    name: String,
    place: Place,
}

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
            false => Self::of_tar(path)?,
        };
        listing.files.sort_by(|a, b| a.name.cmp(&b.name));
        match listing.files.is_empty() {
            true => Err(DataError::Empty {
                name: path.display().to_string(),
                problem: "no PNG or JPEG files in it: give the folder that holds the pictures"
                    .into(),
            }),
            false => Ok(listing),
        }
    }

    fn of_folder(path: &Path) -> Result<Listing, DataError> {
        let mut listing = Listing {
            path: path.to_owned(),
            tar: None,
            files: Vec::new(),
            folders: Vec::new(),
        };
        for entry in walk(path) {
            let entry = entry.map_err(|error| DataError::Io {
                path: error.path().unwrap_or(path).to_owned(),
                source: error.into(),
            })?;
            let Some(name) = relative_name(entry.path().strip_prefix(path).unwrap_or(entry.path()))
            else {
                continue;
            };
            if entry.file_type().is_dir() {
                listing.folders.push(name);
            } else if entry.file_type().is_file() && is_picture(Path::new(&name)) {
                listing.files.push(Entry {
                    name,
                    place: Place::File(entry.into_path()),
                });
            }
        }
        Ok(listing)
    }

    fn of_tar(path: &Path) -> Result<Listing, DataError> {
        let file = File::open(path).map_err(DataError::io(path))?;
        let size = file.metadata().map_err(DataError::io(path))?.len();
        let damaged =
            |error: io::Error| DataError::io(path)(io::Error::new(error.kind(), one_line(error)));
        let mut listing = Listing {
            path: path.to_owned(),
            tar: None,
            files: Vec::new(),
            folders: Vec::new(),
        };
        let mut archive = tar::Archive::new(&file);
        for entry in archive.entries_with_seek().map_err(damaged)? {
            let entry = entry.map_err(damaged)?;
            let name = entry.path().map_err(damaged)?;
            let Some(name) = relative_name(&name) else {
                continue;
            };
            if name.split('/').any(is_hidden) {
                continue;
            }
            let (offset, len) = (entry.raw_file_position(), entry.size());
            match entry.header().entry_type() {
                tar::EntryType::Directory => listing.folders.push(name),
                tar::EntryType::Regular if is_picture(Path::new(&name)) => {
                    if offset.checked_add(len).is_none_or(|end| end > size) {
                        return Err(DataError::Picture {
                            name: one_line(format!("{}: {name}", path.display())),
                            problem: "the tar is cut off in it".into(),
                        });
                    }
                    listing.files.push(Entry {
                        name,
                        place: Place::Tar { offset, len },
                    });
                }
                _ => {}
            }
        }
        listing.tar = Some(file);
        Ok(listing)
    }

    /// The pictures of a split, and the names of the classes.
    fn split(&self, split: Split, held_out: f64) -> Result<(Vec<Chosen>, Vec<String>), DataError> {
        // A single folder around everything, as tars have it, means nothing.
        let mut prefix = String::new();
        while let [only] = self.children(&prefix).iter().collect::<Vec<_>>()[..]
            && self
                .files
                .iter()
                .all(|file| file.name[prefix.len()..].contains('/'))
        {
            prefix = format!("{prefix}{only}/");
        }

        let top = self.children(&prefix);
        let folder = |name: &str| top.contains(name).then(|| format!("{prefix}{name}/"));
        let train = folder("train");
        let test = ["test", "val", "valid"]
            .iter()
            .find_map(|name| folder(name))
            .filter(|_| train.is_some());
        let train = train.unwrap_or(prefix.clone());
        let classes = self.classes(&train)?;
        let (part, part_classes) = match (&test, split) {
            (Some(test), Split::Test) => (test, self.classes(test)?),
            _ => (&train, classes.clone()),
        };
        if let Some(class) = part_classes.iter().find(|class| !classes.contains(class)) {
            return Err(DataError::Classes {
                path: self.name(part),
                problem: format!(
                    "class {} is not in {}: both need the same classes",
                    one_line(class),
                    self.name(&train)
                ),
            });
        }

        let mut chosen = Vec::new();
        for (file, entry) in self.files.iter().enumerate() {
            let Some(name) = entry.name.strip_prefix(part.as_str()) else {
                continue;
            };
            let class = name.split_once('/').map_or("", |(class, _)| class);
            let label = classes
                .binary_search_by(|name| name.as_str().cmp(class))
                .ok()
                .map(|label| label as u32);
            chosen.push(Chosen {
                file,
                label,
                kept: true,
            });
        }
        if !classes.is_empty() && chosen.iter().any(|chosen| chosen.label.is_none()) {
            return Err(DataError::Classes {
                path: self.name(part),
                problem: format!(
                    "has pictures without a class, {} has classes: sort them",
                    self.name(&train)
                ),
            });
        }
        if test.is_none() {
            chosen.iter_mut().for_each(|chosen| chosen.kept = false);
            let names = chosen
                .iter()
                .map(|chosen| self.files[chosen.file].name[prefix.len()..].to_owned());
            for i in hold_out(names.collect::<Vec<_>>().iter(), held_out, split) {
                chosen[i].kept = true;
            }
        }
        Ok((chosen, classes))
    }

    /// The names of the folders directly under a prefix (which ends in `/` or is empty).
    fn children(&self, prefix: &str) -> BTreeSet<&str> {
        let in_folder = |name: &str| name.split_once('/').map(|(child, _)| child.len());
        let of_files = self
            .files
            .iter()
            .map(|file| file.name.as_str())
            .filter_map(|name| {
                let rest = name.strip_prefix(prefix)?;
                Some(&rest[..in_folder(rest)?])
            });
        let of_folders = self.folders.iter().filter_map(|name| {
            let rest = name.strip_prefix(prefix)?;
            Some(&rest[..in_folder(rest).unwrap_or(rest.len())])
        });
        of_files
            .chain(of_folders)
            .filter(|child| !child.is_empty())
            .collect()
    }

    /// The classes under a prefix, sorted: its sub-folders, where the pictures are in two or more.
    fn classes(&self, prefix: &str) -> Result<Vec<String>, DataError> {
        let inside = self
            .files
            .iter()
            .filter_map(|file| file.name.strip_prefix(prefix));
        let (deep, loose): (Vec<&str>, Vec<&str>) = inside.partition(|name| name.contains('/'));
        let filled: BTreeSet<&str> = deep
            .iter()
            .filter_map(|name| Some(name.split_once('/')?.0))
            .collect();
        if !deep.is_empty() && !loose.is_empty() {
            return Err(DataError::Classes {
                path: self.name(prefix),
                problem: "has pictures both in sub-folders (classes) and beside them: move them to one place".into(),
            });
        }
        let children = self.children(prefix);
        if deep.is_empty() || children.len() < 2 {
            return Ok(Vec::new());
        }
        match children.iter().find(|child| !filled.contains(*child)) {
            Some(empty) => Err(DataError::EmptyClass {
                class: self.name(&format!("{prefix}{empty}")),
            }),
            None => Ok(children.iter().map(|&child| child.to_owned()).collect()),
        }
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

    /// The first `limit` bytes of a picture's file, and whether that is all of it.
    fn bytes(&self, entry: &Entry, limit: u64) -> Result<(Vec<u8>, bool), DataError> {
        let mut bytes = Vec::new();
        let len = match (&entry.place, &self.tar) {
            (Place::Tar { offset, len }, Some(tar)) => {
                bytes.resize(limit.min(*len) as usize, 0);
                read_at(tar, &mut bytes, *offset).map_err(DataError::io(&self.path))?;
                *len
            }
            (Place::File(path), _) => {
                let file = File::open(path).map_err(DataError::io(path))?;
                let len = file.metadata().map_err(DataError::io(path))?.len();
                file.take(limit)
                    .read_to_end(&mut bytes)
                    .map_err(DataError::io(path))?;
                len
            }
            (Place::Tar { .. }, None) => 0,
        };
        match len > MAX_FILE_BYTES {
            true => Err(self.failed(entry, "larger than 1 GiB".into())),
            false => Ok((bytes, len <= limit)),
        }
    }

    fn header(&self, entry: &Entry) -> Result<picture::Header, DataError> {
        let (bytes, whole) = self.bytes(entry, HEADER_BYTES)?;
        match picture::header(&bytes) {
            // Perhaps a long profile or thumbnail comes before the size.
            Err(_) if !whole => picture::header(&self.bytes(entry, MAX_FILE_BYTES)?.0),
            result => result,
        }
        .map_err(|problem| self.failed(entry, problem))
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
    /// Height, width, channels of each decoded picture.
    shape: [usize; 3],
    size: Option<usize>,
    /// A place for each decoded picture; none where all together would not fit in memory.
    decoded: Vec<OnceLock<Vec<u8>>>,
}

impl Pictures {
    /// The kept ones of the chosen pictures. Looks at every header: the sizes must agree unless
    /// `size` makes them, and there is one channel only if all are grey.
    fn open(
        listing: Listing,
        chosen: Vec<Chosen>,
        size: Option<usize>,
        name: String,
    ) -> Result<Dataset, DataError> {
        let headers: Vec<_> = chosen
            .par_iter()
            .map(|chosen| listing.header(&listing.files[chosen.file]))
            .collect();
        let headers = headers.into_iter().collect::<Result<Vec<_>, _>>()?;
        let sides = |header: &picture::Header| {
            size.map_or([header.height, header.width], |size| [size, size])
        };
        let first = headers.first().map_or([0, 0], sides);
        if let Some(other) = headers.iter().position(|header| sides(header) != first) {
            return Err(DataError::MixedSizes {
                first: listing.name(&listing.files[chosen[0].file].name),
                first_size: first,
                second: listing.name(&listing.files[chosen[other].file].name),
                second_size: sides(&headers[other]),
            });
        }
        let channels = if headers.iter().all(|header| header.grey) {
            1
        } else {
            3
        };
        let shape = [first[0], first[1], channels];

        let kept = || chosen.iter().filter(|chosen| chosen.kept);
        let files: Vec<usize> = kept().map(|chosen| chosen.file).collect();
        let labels = kept().filter_map(|chosen| chosen.label).collect();
        let total = shape.iter().fold(files.len() as u64, |total, &side| {
            total.saturating_mul(side as u64)
        });
        let decoded = match total <= MEMORY_LIMIT {
            true => files.iter().map(|_| OnceLock::new()).collect(),
            false => Vec::new(),
        };
        let images = Images::Pictures(Pictures {
            listing,
            files,
            shape,
            size,
            decoded,
        });
        Ok(Dataset {
            name,
            shape,
            images,
            labels,
            nr_classes: 0,
            class_names: Vec::new(),
        })
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// The relative name of picture `index`.
    pub fn name(&self, index: usize) -> Option<&str> {
        let file = *self.files.get(index)?;
        Some(&self.listing.files[file].name)
    }

    /// Reads picture `index`, which is below `len()`, as [H, W, C].
    pub fn read(&self, index: usize, image: &mut [u8]) -> Result<(), DataError> {
        match self.decoded.get(index) {
            Some(place) => match place.get() {
                Some(pixels) => image.copy_from_slice(pixels),
                // Of two threads with the same picture, both decode it and one keeps it.
                None => {
                    let pixels = self.decode(index)?;
                    image.copy_from_slice(place.get_or_init(|| pixels));
                }
            },
            None => image.copy_from_slice(&self.decode(index)?),
        }
        Ok(())
    }

    fn decode(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let entry = &self.listing.files[self.files[index]];
        let [height, width, channels] = self.shape;
        let (bytes, _) = self.listing.bytes(entry, MAX_FILE_BYTES)?;
        match picture::decode(&bytes, channels, self.size) {
            Ok((sides, pixels)) if sides == [height, width] => Ok(pixels),
            Ok(_) => Err(self
                .listing
                .failed(entry, "its size has changed since it was opened".into())),
            Err(problem) => Err(self.listing.failed(entry, problem)),
        }
    }
}
