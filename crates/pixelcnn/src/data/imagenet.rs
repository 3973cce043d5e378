//! Downsampled ImageNet, 32x32 and 64x64, in the two forms in which it is handed out.
//!
//! - Tars of PNG files, or the folders they unpack to (van den Oord et al. 2016, without labels): the
//!   ones that published bits/dim of image models are about.
//! - `.npz` batches with `data` [N, 3*H*W] and `labels` from 1 to 1000 (Chrabaszcz et al. 2017, made
//!   with another resampling, so that their bits/dim do not compare).

use std::path::{Path, PathBuf};

use super::arrays::{Npz, Room};
use super::rows::Rows;
use super::{DataConfig, DataError, Dataset, Images, Progress, Split, folder};
use crate::picture::DroppedCount;

const NR_CLASSES: usize = 1000;

/// Opens a split of the images of `side` x `side` in `data_dir`, or in `imagenet32` or `imagenet64`
/// in the cache. If both forms are there, the pictures win.
pub(super) fn open(
    side: usize,
    config: &DataConfig,
    cache: Option<PathBuf>,
    split: Split,
    progress: &dyn Progress,
) -> Result<Dataset, DataError> {
    let set = format!("imagenet{side}");
    let dir = config
        .data_dir
        .clone()
        .or_else(|| Some(cache?.join(&set)))
        .unwrap_or_default();
    let name = format!("ImageNet {side}x{side} {split}");
    let missing = |what: String| DataError::NotFound {
        what,
        help: format!(
            "download train_{side}x{side}.tar and valid_{side}x{side}.tar, or the npz batches, from \
             https://image-net.org/download-images (needs a login) and put them in {} or give their folder as --data-dir",
            dir.display()
        ),
    };

    // Both splits come from the same form.
    let pictures = |part: &str| {
        let folder = dir.join(format!("{part}_{side}x{side}"));
        [folder.with_extension("tar"), folder]
            .into_iter()
            .find(|path| path.exists())
    };
    let (train, valid) = (pictures("train"), pictures("valid"));
    if train.is_some() || valid.is_some() {
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
        // Their size is the set's own, and checked here.
        let all = DataConfig {
            size: None,
            ..config.clone()
        };
        return folder::open_whole(&path, &all, name, progress).and_then(|dataset| match dataset.shape {
            [height, width, 3] if [height, width] == [side, side] => Ok(dataset),
            [height, width, channels] => Err(DataError::Config(format!(
                "{}: holds images of {width}x{height}x{channels}, not {side}x{side}x3: is it another data set?",
                path.display()
            ))),
        });
    }

    let files: Vec<String> = match split {
        Split::Train => (1..=10)
            .map(|i| format!("train_data_batch_{i}.npz"))
            .collect(),
        Split::Test => vec!["val_data.npz".into()],
    };
    let part = if split == Split::Train {
        "train"
    } else {
        "val"
    };
    let dirs = [
        dir.clone(),
        dir.join(format!("Imagenet{side}_{part}_npz")),
        dir.join(format!("Imagenet{side}_{part}")),
    ];
    let found = dirs
        .iter()
        .find(|dir| files.iter().any(|file| dir.join(file).exists()));
    let batches = found.ok_or_else(|| missing(set))?;
    open_batches(side, batches, &files, name, Room::default(), missing)
}

/// Opens all the `files` in `dir`.
fn open_batches(
    side: usize,
    dir: &Path,
    files: &[String],
    name: String,
    mut room: Room,
    missing: impl Fn(String) -> DataError,
) -> Result<Dataset, DataError> {
    let mut parts = Vec::new();
    let mut labels = Vec::new();
    for path in files.iter().map(|file| dir.join(file)) {
        if !path.exists() {
            return Err(missing(path.display().to_string()));
        }
        let mut npz = Npz::open(&path)?;
        let (bytes, images, _) = npz.images(
            "data",
            |header| {
                header.check_u8()?;
                match header.shape[..] {
                    [n, values] if values == 3 * side * side => Ok((n, [side, side, 3])),
                    _ => Err(format!(
                        "has shape {:?}, not [N, {}]",
                        header.shape,
                        3 * side * side
                    )),
                }
            },
            &mut room,
        )?;
        let from_one = npz.labels("labels")?;
        if from_one.len() != images
            || from_one
                .iter()
                .any(|label| !(1..=NR_CLASSES as u32).contains(label))
        {
            return Err(DataError::Array {
                path,
                problem: format!(
                    "labels: are not one of 1 to {NR_CLASSES} for each of {images} images"
                ),
            });
        }
        labels.extend(from_one.iter().map(|label| label - 1));
        parts.push((bytes, images));
    }
    let shape = [side, side, 3];
    let images = Images::Rows(Rows {
        parts,
        shape,
        planar: true,
        pick: None,
    });
    Ok(Dataset {
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
