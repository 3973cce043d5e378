//! Downsampled ImageNet, 32x32 and 64x64, in the two forms in which it is handed out.
//!
//! - Tars of PNG files, or the folders they unpack to (van den Oord et al. 2016, without labels): the
//!   ones that published bits/dim of image models are about.
//! - `.npz` batches with `data` [N, 3*H*W] and `labels` from 1 to 1000 (Chrabaszcz et al. 2017, made
//!   with another resampling, so that their bits/dim do not compare), in the folders that
//!   `Imagenet64_train_part1_npz.zip` and the like unpack to, or all in one.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf, absolute};

use super::arrays::{Npz, Room, Stack};
use super::raw::Raw;
use super::{DataConfig, DataError, Dataset, Images, Listener, Split, folder, tell};
use crate::picture::DroppedCount;

const NR_CLASSES: usize = 1000;
const NR_BATCHES: usize = 10;
const SITE: &str = "https://image-net.org/download-images (needs a login)";

/// Opens a split of the images of `side` x `side` in `data_dir`, or in `imagenet32` or `imagenet64`
/// in the cache. If both forms are there, the pictures win.
pub(super) fn open(
    side: usize,
    config: &DataConfig,
    cache: Option<PathBuf>,
    split: Split,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    let set = format!("imagenet{side}");
    let dir = config
        .data_dir
        .clone()
        .or_else(|| Some(cache?.join(&set)))
        .unwrap_or_default();
    let name = format!("ImageNet {side}x{side} {split}");
    let missing = |what: String| DataError::NoDataDir {
        what,
        help: format!(
            "download train_{side}x{side}.tar and valid_{side}x{side}.tar, or the npz batches, from \
             {SITE} and put them in {} or name their folder as data_dir",
            dir.display()
        ),
    };
    let places = Places::of(side, &dir)?;
    let files = batches(split);
    let found: Vec<PathBuf> = files.iter().filter_map(|file| places.find(file)).collect();
    // What training wants later is told now.
    let lacks = |file: &str, found: bool| match (split, found) {
        (Split::Train, false) => format!("; {file}, for testing, is missing"),
        _ => String::new(),
    };

    // Both splits come from the same form.
    let (train, valid) = (places.pictures("train"), places.pictures("valid"));
    if train.is_some() || valid.is_some() {
        let lacks = lacks(&format!("valid_{side}x{side}.tar"), valid.is_some());
        let (part, path) = match split {
            Split::Train => ("train", train),
            Split::Test => ("valid", valid),
        };
        let path = path.ok_or_else(|| {
            missing(
                dir.join(format!("{part}_{side}x{side}.tar"))
                    .display()
                    .to_string(),
            )
        })?;
        let unused = match found.is_empty() {
            true => "",
            false => "; npz batches are there too and not used",
        };
        let place = path.display();
        tell(
            listener,
            format!("{name}: pictures in {place}{unused}{lacks}"),
        )?;
        // Their size is the set's own, and checked here.
        let all = DataConfig {
            size: None,
            ..config.clone()
        };
        let dataset = folder::open_whole(&path, &all, name, listener)?;
        let other = (0..dataset.len()).map(|index| dataset.size(index));
        let other = other
            .chain([[side, side]])
            .find(|size| *size != [side, side]);
        return match (other, dataset.channels()) {
            (None, 3) => Ok(dataset),
            (size, channels) => {
                let [height, width] = size.unwrap_or([side, side]);
                Err(DataError::Config(format!(
                    "{}: holds images of {width}x{height}x{channels}, not {side}x{side}x3: is it another \
                     data set?",
                    path.display()
                )))
            }
        };
    }

    if found.len() < files.len() {
        return Err(places.incomplete(split).unwrap_or_else(|| missing(set)));
    }
    let what = match &files[..] {
        [file] => file.clone(),
        files => format!("{} batches", files.len()),
    };
    let lacks = lacks("val_data.npz", places.find("val_data.npz").is_some());
    let place = folders_of(&found);
    tell(listener, format!("{name}: {what} in {place}{lacks}"))?;
    open_batches(side, &found, name, Room::default())
}

/// The files of a split in the npz form.
fn batches(split: Split) -> Vec<String> {
    match split {
        Split::Train => (1..=NR_BATCHES)
            .map(|i| format!("train_data_batch_{i}.npz"))
            .collect(),
        Split::Test => vec!["val_data.npz".into()],
    }
}

/// The archive in which the batch at `index` is handed out.
fn archive(side: usize, split: Split, index: usize) -> String {
    match (split, side) {
        (Split::Test, _) => format!("Imagenet{side}_val_npz.zip"),
        (Split::Train, 64) => format!(
            "Imagenet64_train_part{}_npz.zip",
            1 + 2 * index / NR_BATCHES
        ),
        (Split::Train, _) => format!("Imagenet{side}_train_npz.zip"),
    }
}

/// The folders that hold some files, for messages.
fn folders_of(files: &[PathBuf]) -> String {
    let folders = files.iter().filter_map(|file| file.parent());
    let mut folders: Vec<String> = folders.map(|folder| folder.display().to_string()).collect();
    folders.sort();
    folders.dedup();
    folders.join(" and ")
}

/// Where the files of either form are looked for.
struct Places {
    side: usize,
    /// The folder given, and if it is one of the set's own, the one around it.
    roots: Vec<PathBuf>,
    /// These, and those in them to which the archives of batches unpack.
    folders: Vec<PathBuf>,
}

impl Places {
    fn of(side: usize, dir: &Path) -> Result<Places, DataError> {
        let unpacked = ["train", "val"].map(|part| format!("imagenet{side}_{part}"));
        let pictures = ["train", "valid"].map(|part| format!("{part}_{side}x{side}"));
        let named = |path: &Path, names: &[String]| {
            let name = path.file_name().unwrap_or_default();
            let name = name.to_string_lossy().to_lowercase();
            names.iter().any(|own| name.starts_with(own))
        };
        let mut roots = vec![dir.to_owned()];
        if (named(dir, &unpacked) || named(dir, &pictures))
            && let Some(around) = absolute(dir).ok().as_deref().and_then(Path::parent)
            && fs::read_dir(around).is_ok()
        {
            roots.push(around.to_owned());
        }

        let mut folders = roots.clone();
        let mut outer = roots.clone();
        // Some programs unpack an archive into one more folder of its name.
        for _ in 0..2 {
            let mut inner = Vec::new();
            for folder in &outer {
                let entries = match fs::read_dir(folder) {
                    Err(error)
                        if [ErrorKind::NotFound, ErrorKind::NotADirectory]
                            .contains(&error.kind()) =>
                    {
                        continue;
                    }
                    entries => entries.map_err(DataError::io(folder))?,
                };
                let paths = entries.flatten().map(|entry| entry.path());
                inner.extend(paths.filter(|path| named(path, &unpacked) && path.is_dir()));
            }
            inner.sort();
            folders.extend_from_slice(&inner);
            outer = inner;
        }
        Ok(Places {
            side,
            roots,
            folders,
        })
    }

    /// The tar or folder of the pictures of a part.
    fn pictures(&self, part: &str) -> Option<PathBuf> {
        let name = format!("{part}_{0}x{0}", self.side);
        self.roots.iter().find_map(|root| {
            let folder = root.join(&name);
            let mut forms = [folder.with_extension("tar"), folder].into_iter();
            forms.find(|path| path.exists())
        })
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        let mut places = self.folders.iter().map(|folder| folder.join(file));
        places.find(|path| path.is_file())
    }

    /// What is there of a split's batches, what is missing, and where to get it; nothing where
    /// nothing is there.
    fn incomplete(&self, split: Split) -> Option<DataError> {
        let (mut found, mut missing, mut pickled) = (Vec::new(), Vec::new(), Vec::new());
        let (mut packed, mut absent) = (Vec::new(), Vec::new());
        let files = batches(split);
        for (i, file) in files.iter().enumerate() {
            if let Some(path) = self.find(file) {
                found.push(path);
                continue;
            }
            missing.push(file.as_str());
            let archive = archive(self.side, split, i);
            pickled.extend(self.find(file.trim_end_matches(".npz")));
            pickled.extend(self.find(&archive.replace("_npz.zip", ".zip")));
            match self.find(&archive) {
                Some(path) => packed.push(path.display().to_string()),
                None => absent.push(archive),
            }
        }
        let mut help = Vec::new();
        if !found.is_empty() {
            let (n, all) = (found.len(), files.len());
            help.push(format!(
                "{n} of {all} batches are in {}",
                folders_of(&found)
            ));
        }
        if let Some(first) = pickled.first() {
            let first = first.display();
            help.push(format!("{first} is pickled for Python, which is not read"));
        }
        packed.dedup();
        absent.dedup();
        if !packed.is_empty() {
            help.push(format!("unpack {}", packed.join(" and ")));
        }
        if help.is_empty() {
            return None;
        }
        if !absent.is_empty() {
            let root = self.roots.last().map(|root| root.display().to_string());
            help.push(format!(
                "download {} from {SITE} and unpack to {}",
                absent.join(" and "),
                root.unwrap_or_default()
            ));
        }
        Some(DataError::NotFound {
            what: missing.join(", "),
            help: help.join("; "),
        })
    }
}

/// Opens all the `files`.
fn open_batches(
    side: usize,
    files: &[PathBuf],
    name: String,
    mut room: Room,
) -> Result<Dataset, DataError> {
    let mut parts = Vec::new();
    let mut labels = Vec::new();
    for path in files {
        let mut npz = Npz::open(path)?;
        let (bytes, Stack { images, .. }) = npz.images(
            "data",
            |header| {
                header.check_u8()?;
                match header.shape[..] {
                    [images, values] if values == 3 * side * side => Ok(Stack {
                        images,
                        shape: [side, side, 3],
                        planar: true,
                    }),
                    _ => Err(format!(
                        "has shape {:?}, not [N, {}]",
                        header.shape,
                        3 * side * side
                    )),
                }
            },
            &mut room,
        )?;
        let bad = |problem| DataError::Array {
            path: path.clone(),
            problem,
        };
        let from_one = npz.labels("labels")?.map_err(bad)?;
        if from_one.len() != images
            || from_one
                .iter()
                .any(|label| !(1..=NR_CLASSES as u32).contains(label))
        {
            return Err(bad(format!(
                "labels: are not one of 1 to {NR_CLASSES} for each of {images} images"
            )));
        }
        labels.extend(from_one.iter().map(|label| label - 1));
        parts.push((bytes, images));
    }
    let shape = [side, side, 3];
    let images = Images::Raw(Raw {
        parts,
        shape,
        planar: true,
        pick: None,
    });
    Ok(Dataset {
        crops: None,
        name,
        shape,
        images,
        labels,
        nr_classes: NR_CLASSES,
        class_names: Vec::new(),
        no_labels: None,
        dropped: DroppedCount::default(),
    })
}
