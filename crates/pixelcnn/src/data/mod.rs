//! Images in: CIFAR-10, downsampled ImageNet, folders and tars of pictures, NumPy arrays.
//!
//! Every source becomes a [`Dataset`]: `u8` images in NHWC order with an optional label each, read
//! by index. Up to 2 GiB of decoded images are kept in memory; larger sets, and `.npy` files, are
//! read from their files as they are needed. What takes long to decode, compressed arrays and
//! pictures that crops are cut out of, is decoded once into a temporary file.
//!
//! ```no_run
//! use pixelcnn::data::{DataConfig, Dataset, Split};
//!
//! let test = Dataset::open(&DataConfig::default(), Split::Test)?;
//! let (mut images, mut labels) = (Vec::new(), Vec::new());
//! test.read(&[0, 17, 4], &mut images, &mut labels)?;
//! assert_eq!(images.len(), 3 * test.height() * test.width() * test.channels());
//! # Ok::<(), pixelcnn::data::DataError>(())
//! ```

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{self, Path, PathBuf};

use pixelcnn_core::config::MAX_SIDE;
use pixelcnn_core::{ModelConfig, Stopped, go_on};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::picture::{DroppedCount, is_picture};
use crate::random::{Purpose, generator};
use crate::{hex, one_line};

mod arrays;
mod cifar10;
mod codes;
mod crops;
mod folder;
mod imagenet;
mod raw;
mod walk;

use crops::Crops;

pub use codes::{Baselines, CodeMaps, baselines};
pub use walk::{LeftOut, Walk, walk};

/// Up to this many bytes of decoded images a data set is kept in memory.
const MEMORY_LIMIT: u64 = 2 << 30;

/// The part of a data set to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// The images to learn from.
    Train,
    /// The images to measure on.
    Test,
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Split::Train => "train",
            Split::Test => "test",
        })
    }
}

/// What to read; part of a run's `config.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// `cifar10`, `imagenet32`, `imagenet64`, or the path of a folder of pictures
    /// ([`FORMATS`](crate::picture::FORMATS)), of a single one, of a `.tar` of them, or of a `.npy` or `.npz` file.
    ///
    /// - A folder or tar has its splits in folders named train or training, and test, testing, val,
    ///   valid, validation or dev (in any case; the first of these that is there), at the top or in
    ///   each class, or it has none. In a split, sub-folders are classes; a single one is not. What
    ///   is hidden or not a picture by its name is left out, which [`Opening::Note`] is told.
    /// - A `.npy` holds `u8` of shape `[N, H, W, C]` or `[N, C, H, W]` with C 1 or 3, `[N, H, W]`, or
    ///   a single image `[H, W, C]`.
    /// - A `.npz` holds such arrays as `x_train` and `x_test` with labels `y_train` and `y_test`, or
    ///   as `x` with labels `y`. The names that others use will do: `images` or `data` for `x`,
    ///   `labels` or `targets` for `y`, `train_images` or `trainx` for `x_train`, `val_images` for
    ///   the test split where there is none. A single array of images may have any name, with
    ///   `arr_1` labels where it is `arr_0`.
    /// - Labels are the numbers of classes, from 0, or one-hot. Those that are something else, or
    ///   that only one of the splits has, are left out, which [`Opening::Note`] hears, as it does of
    ///   arrays that are not used.
    pub data: String,
    /// The folder in which `cifar10`, `imagenet32` or `imagenet64` lies, instead of the cache.
    pub data_dir: Option<PathBuf>,
    /// Cuts the largest centred square out of each picture and resizes it (Lanczos) to this side;
    /// for folders and tars.
    pub size: Option<usize>,
    /// The fraction of the images that are the test split where the source has none of its own.
    /// They are chosen by a hash of their relative path (of their index in an array), so that the
    /// same ones are held out each time, and adding pictures moves few others.
    pub held_out: f64,
    /// Trains on crops of this side at random places of images of this size or larger, instead of on
    /// whole ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<usize>,
    /// Leaves damaged pictures out of folders and tars instead of refusing all, and tells
    /// [`Opening::Note`] so. Every picture is then decoded once to find out.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_damaged: bool,
    /// Maps of codes, such as a VQ-VAE's, that an image is read as ([`ModelConfig::nr_code_maps`]): 0 for
    /// levels; 1 for codes; 2 for codes, and behind each that of a coarser map that lies there. They are
    /// whole numbers of any type, `[N, H, W]`, in a `.npy`, or in a `.npz` as `codes_train` and
    /// `codes_test` or as `codes`; coarser ones, of fewer rows and columns, as `coarse_train` and
    /// `coarse_test` or as `coarse`; with labels as for images.
    #[serde(skip_serializing_if = "is_zero")]
    pub codes: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl DataConfig {
    /// Whether this is the name of a data set, not a path.
    pub fn is_name(data: &Path) -> bool {
        let names = ["cifar10", "imagenet32", "imagenet64"];
        names.map(Path::new).contains(&data)
    }

    /// Makes paths absolute.
    pub fn make_absolute(&mut self) {
        let is_name = DataConfig::is_name(Path::new(&self.data));
        if let (false, Ok(path)) = (is_name, path::absolute(&self.data))
            && let Some(path) = path.to_str()
        {
            self.data = path.to_owned();
        }
        if let Some(Ok(path)) = self.data_dir.as_ref().map(path::absolute) {
            self.data_dir = Some(path);
        }
    }

    /// Whether the images are at a path where there is nothing any more.
    pub fn is_gone(&self) -> bool {
        let path = Path::new(&self.data);
        !DataConfig::is_name(path) && !path.exists()
    }

    /// The data set's name without the folders in which it lies here.
    pub fn short_name(&self) -> String {
        let name = Path::new(&self.data).file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        DataConfig {
            data: "cifar10".into(),
            data_dir: None,
            size: None,
            held_out: 0.1,
            crop: None,
            skip_damaged: false,
            codes: 0,
        }
    }
}

/// What opening a data set is doing; the library prints nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Opening {
    /// `done` bytes of `what` have arrived, of `total` where that is known.
    Downloading {
        /// The data set.
        what: &'static str,
        /// So far.
        done: u64,
        /// In all.
        total: Option<u64>,
    },
    /// Something that the user may want to know, in one line.
    Note(String),
}

/// Told of it as it happens; breaking stops it, with [`DataError::Stopped`].
pub type Listener<'a> = dyn FnMut(Opening) -> ControlFlow<()> + 'a;

/// Tells something in one line.
fn tell(listener: &mut Listener, text: String) -> Result<(), Stopped> {
    go_on(listener(Opening::Note(text)))
}

/// Nobody is told.
fn unheard(_: Opening) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Why images could not be read; each in one line that says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The configuration does not fit the data.
    #[error("{0}")]
    Config(String),
    /// There is nothing at the place given.
    #[error("{what} not found: {help}")]
    NotFound {
        /// The file or data set looked for.
        what: String,
        /// What to do.
        help: String,
    },
    /// A data set known by its name is not in its folder.
    #[error("{what} not found: {help}")]
    NoDataDir {
        /// The data set, or a file of it.
        what: String,
        /// What to do.
        help: String,
    },
    /// The system could not read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A picture cannot be decoded.
    #[error("{name}: {problem}: replace or remove it")]
    Picture {
        /// The file, or the tar and the file in it.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Pictures cannot be read.
    #[error("{0}: replace or remove them, or skip them")]
    Damaged(Damaged),
    /// Pictures of different sizes.
    #[error("{first} is {}x{}, {second} is {}x{}: choose a size to crop and resize all to, or a crop to \
        train on parts of them",
        first_size[1], first_size[0], second_size[1], second_size[0])]
    MixedSizes {
        /// A picture.
        first: String,
        /// Its height and width.
        first_size: [usize; 2],
        /// A picture of another size.
        second: String,
        /// Its height and width.
        second_size: [usize; 2],
    },
    /// Images that are too large for a model.
    #[error(
        "{name}: images are {width}x{height}, a model takes sides of at most {MAX_SIDE}: choose a size to \
         crop and resize pictures to"
    )]
    Sides {
        /// The data set.
        name: String,
        /// Rows of an image.
        height: usize,
        /// Columns of an image.
        width: usize,
    },
    /// A split without images.
    #[error("{name}: {problem}")]
    Empty {
        /// The data set.
        name: String,
        /// What was looked for, and what to do.
        problem: String,
    },
    /// A NumPy file that is damaged or holds something else than images.
    #[error("{}: {problem}", path.display())]
    Array {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file is not the one published.
    #[error("{}: {problem}: delete it and fetch it again", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// How it differs.
        problem: String,
    },
    /// CIFAR-10 could not be fetched from anywhere.
    #[error("CIFAR-10 could not be fetched ({problem}): download {url} and unpack it in {}, or name \
        its folder as data_dir", target.display())]
    Fetch {
        /// What each attempt ran into.
        problem: String,
        /// The official archive.
        url: String,
        /// Where the data set is looked for.
        target: PathBuf,
    },
    /// The listener said so.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// An index beyond the last image.
    #[error("image {index} of {len} was asked for")]
    Index {
        /// The index.
        index: usize,
        /// The number of images.
        len: usize,
    },
}

/// The damaged pictures of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged {
    /// How many pictures were looked at.
    pub pictures: usize,
    /// How many of them are damaged.
    pub count: usize,
    /// The first ones, with what is wrong with each.
    pub first: Vec<String>,
}

impl Damaged {
    /// So many are named.
    const NAMED: usize = 10;

    fn of(pictures: usize, mut damaged: Vec<String>) -> Damaged {
        let count = damaged.len();
        damaged.truncate(Self::NAMED);
        Damaged {
            pictures,
            count,
            first: damaged,
        }
    }

    /// Of two data sets together.
    fn and(mut self, other: Damaged) -> Damaged {
        self.pictures += other.pictures;
        self.count += other.count;
        self.first.extend(other.first);
        self.first.truncate(Self::NAMED);
        self
    }
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Damaged {
            pictures,
            count,
            first,
        } = self;
        let first = first.join(", ");
        write!(f, "{count} of {pictures} pictures can't be read: {first}")?;
        match count - self.first.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl DataError {
    fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> DataError {
        move |source| DataError::Io {
            path: path.as_ref().to_owned(),
            source,
        }
    }
}

/// One split of a data set: images read by index.
pub struct Dataset {
    /// What it is called in messages, with its split.
    name: String,
    /// Height, width, channels, of the first image where they differ.
    shape: [usize; 3],
    images: Images,
    /// What is cut out of them, where they are not read whole.
    crops: Option<Crops>,
    /// One per image, or none.
    labels: Vec<u32>,
    nr_classes: usize,
    class_names: Vec<String>,
    /// Why there are no labels, where folders seem to tell classes and don't.
    no_labels: Option<String>,
    /// What the files hold and the images don't.
    dropped: DroppedCount,
}

enum Images {
    Raw(raw::Raw),
    Codes(codes::Codes),
    Pictures(folder::Pictures),
}

impl fmt::Debug for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dataset({})", self.describe())
    }
}

impl Dataset {
    /// Opens a split, fetching CIFAR-10 if need be. Pictures are looked at (their headers), not yet
    /// decoded.
    ///
    /// # Errors
    /// Whatever is wrong with the configuration, the files or their contents, or the download.
    pub fn open(config: &DataConfig, split: Split) -> Result<Self, DataError> {
        Self::open_with(config, split, &mut unheard)
    }

    /// Opens a split and tells what that is doing.
    ///
    /// # Errors
    /// As [`Dataset::open`], or stopped.
    pub fn open_with(
        config: &DataConfig,
        split: Split,
        listener: &mut Listener,
    ) -> Result<Self, DataError> {
        if !(0.0..1.0).contains(&config.held_out) {
            return Err(DataError::Config(format!(
                "held-out fraction {}: must be at least 0 and below 1",
                config.held_out
            )));
        }
        for (name, side) in [("size", config.size), ("crop", config.crop)] {
            if let Some(side) = side.filter(|side| !(1..=MAX_SIDE).contains(side)) {
                return Err(DataError::Config(format!(
                    "{name} {side}: must be from 1 to {MAX_SIDE}"
                )));
            }
        }
        let data_dir = config.data_dir.as_deref();
        let dataset = match config.data.as_str() {
            name @ ("cifar10" | "imagenet32" | "imagenet64") if config.codes > 0 => {
                return Err(DataError::Config(format!(
                    "{name}: images, not codes: give the .npy or .npz file that holds their codes"
                )));
            }
            "cifar10" => cifar10::open(data_dir, cache_dir(), split, listener)?,
            "imagenet32" => imagenet::open(32, config, cache_dir(), split, listener)?,
            "imagenet64" => imagenet::open(64, config, cache_dir(), split, listener)?,
            path => Self::open_path(Path::new(path), config, split, listener)?,
        };
        let dataset = dataset.checked(config)?;
        tracing::info!(%split, "{}", dataset.describe());
        Ok(dataset)
    }

    /// Images without labels.
    fn unlabelled(name: String, shape: [usize; 3], images: Images) -> Dataset {
        Dataset {
            name,
            shape,
            images,
            crops: None,
            labels: Vec::new(),
            nr_classes: 0,
            class_names: Vec::new(),
            no_labels: None,
            dropped: DroppedCount::default(),
        }
    }

    /// Opens both splits, the training images and the test images. Damaged pictures of both are
    /// named together. With [`DataConfig::crop`] the training images are crops, the test images whole
    /// pictures.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn open_splits(config: &DataConfig) -> Result<(Self, Self), DataError> {
        Self::open_splits_with(config, &mut unheard)
    }

    /// Opens both splits and tells what that is doing.
    ///
    /// # Errors
    /// As [`Dataset::open_with`].
    pub fn open_splits_with(
        config: &DataConfig,
        listener: &mut Listener,
    ) -> Result<(Self, Self), DataError> {
        let mut open = |split| Self::open_with(config, split, listener);
        match (open(Split::Train), open(Split::Test)) {
            // Where a part is held out, both are the same pictures.
            (Err(DataError::Damaged(train)), Err(DataError::Damaged(test))) if train != test => {
                Err(DataError::Damaged(train.and(test)))
            }
            (train, test) => {
                let (train, test) = (train?, test?);
                let train = match config.crop {
                    None => train,
                    Some(side) => train.cropped(side, arrays::Room::default(), listener)?,
                };
                Ok((train, test))
            }
        }
    }

    fn open_path(
        path: &Path,
        config: &DataConfig,
        split: Split,
        listener: &mut Listener,
    ) -> Result<Self, DataError> {
        let extension = path
            .extension()
            .unwrap_or_default()
            .to_string_lossy()
            .to_lowercase();
        match extension.as_str() {
            _ if !path.exists() => Err(DataError::NotFound {
                what: path.display().to_string(),
                help: "give cifar10, imagenet32, imagenet64, or the path of a folder, .tar, .npy or .npz".into(),
            }),
            "npy" if config.codes == 1 => codes::open_npy(path, config.held_out, split),
            "npz" if config.codes > 0 => codes::open_npz(path, config, split, listener),
            _ if config.codes > 0 => Err(DataError::Config(format!(
                "{}: maps of codes are in a .npy file, or in a .npz where there are coarser ones: save \
                 them with numpy.savez",
                path.display()
            ))),
            _ if path.is_dir() || is_picture(path) => folder::open(path, config, split, listener),
            "tar" => folder::open(path, config, split, listener),
            "npy" => arrays::open_npy(path, config.held_out, split),
            "npz" => arrays::open_npz(
                path,
                config.held_out,
                split,
                arrays::Room::default(),
                listener,
            ),
            _ => Err(DataError::Config(format!(
                "{}: neither a folder, a picture nor a .tar, .npy or .npz file: unpack or convert it first",
                path.display()
            ))),
        }
    }

    /// What holds for every source: there are images, their sides suit the model, `size` was obeyed.
    fn checked(self, config: &DataConfig) -> Result<Self, DataError> {
        let [height, width] = self.largest();
        if self.is_empty() {
            return Err(DataError::Empty {
                name: self.name,
                problem: format!(
                    "no images are left for this split: add images or change the held-out fraction ({})",
                    config.held_out
                ),
            });
        }
        match config.size {
            Some(size) if [height, width] != [size, size] => Err(DataError::Config(format!(
                "{} has images of {width}x{height}: size {size} works with folders and tars of pictures only",
                self.name
            ))),
            _ if height.max(width) > MAX_SIDE => Err(DataError::Sides {
                name: self.name,
                height,
                width,
            }),
            _ => Ok(self),
        }
    }

    /// The number of images, or of crops of them.
    pub fn len(&self) -> usize {
        match (&self.crops, &self.images) {
            (Some(crops), _) => crops.len(),
            (None, Images::Raw(images)) => images.len(),
            (None, Images::Codes(codes)) => codes.len(),
            (None, Images::Pictures(pictures)) => pictures.len(),
        }
    }

    /// Images that are read whole or in crops.
    fn pictures(&self) -> usize {
        match &self.images {
            Images::Raw(images) => images.len(),
            Images::Codes(codes) => codes.len(),
            Images::Pictures(pictures) => pictures.len(),
        }
    }

    /// Whether there is no image; never so for an opened data set.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The original's model for images of this shape, without classes.
    pub fn model_config(&self) -> ModelConfig {
        let [height, width, channels] = self.shape;
        ModelConfig {
            height,
            width,
            channels,
            ..ModelConfig::default()
        }
    }

    /// The order in which an epoch (from 0) of a training with this seed uses the images, by their
    /// indices: batch after batch, but for those at the end that do not fill one.
    pub fn epoch_order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..self.len()).collect();
        indices.shuffle(&mut generator(seed, Purpose::Shuffle, epoch));
        indices
    }

    /// Rows of each image, of the first one where [they differ](Dataset::one_size).
    pub fn height(&self) -> usize {
        self.shape[0]
    }

    /// Columns of each image, of the first one where [they differ](Dataset::one_size).
    pub fn width(&self) -> usize {
        self.shape[1]
    }

    /// Height and width of an image, or of a crop.
    pub fn size(&self, index: usize) -> [usize; 2] {
        match (&self.crops, &self.images) {
            (None, Images::Pictures(pictures)) => pictures.sizes().get(index).copied(),
            _ => None,
        }
        .unwrap_or([self.shape[0], self.shape[1]])
    }

    /// The height and the width of all images.
    ///
    /// # Errors
    /// [`DataError::MixedSizes`].
    pub fn one_size(&self) -> Result<[usize; 2], DataError> {
        let first_size = self.size(0);
        let Some(other) = (0..self.len()).find(|&other| self.size(other) != first_size) else {
            return Ok(first_size);
        };
        let name = |index: usize| self.image_name(index).unwrap_or_default().to_owned();
        Err(DataError::MixedSizes {
            first: name(0),
            first_size,
            second: name(other),
            second_size: self.size(other),
        })
    }

    /// The most rows and the most columns that any image has.
    pub fn largest(&self) -> [usize; 2] {
        let sizes = (0..self.len()).map(|index| self.size(index));
        let largest = sizes.reduce(|a, b| [a[0].max(b[0]), a[1].max(b[1])]);
        largest.unwrap_or_default()
    }

    /// Channels of each image: 1 or 3.
    pub fn channels(&self) -> usize {
        self.shape[2]
    }

    /// Of codes, how many there are at least, and how many of a coarser map (0 without one): the largest of
    /// the array and one, what is held out included. Nothing where these are images.
    pub fn codes(&self) -> Option<[usize; 2]> {
        match &self.images {
            Images::Codes(codes) => Some(codes.counts()),
            _ => None,
        }
    }

    /// Bytes in which a pixel is read, as [`ModelConfig::bytes_per_pixel`] says.
    pub fn bytes_per_pixel(&self) -> usize {
        match &self.images {
            Images::Codes(codes) => codes.bytes_per_pixel(),
            _ => self.shape[2],
        }
    }

    /// The number of classes, in all splits; 0 where there are no labels.
    pub fn nr_classes(&self) -> usize {
        self.nr_classes
    }

    /// The classes' names in the labels' order, or nothing where they have none.
    pub fn class_names(&self) -> &[String] {
        &self.class_names
    }

    /// Why the images have no labels though they lie in folders, where that is so.
    pub fn no_labels(&self) -> Option<&str> {
        self.no_labels.as_deref()
    }

    /// How many of the images have an alpha channel or more than 8 bits, which are dropped.
    pub fn dropped(&self) -> DroppedCount {
        self.dropped
    }

    /// What the image at `index` is called: its path in the folder or tar, with `/` between its
    /// parts. Nothing where images have no names, or there is no such image.
    pub fn image_name(&self, index: usize) -> Option<&str> {
        let index = match &self.crops {
            None => index,
            Some(crops) => crops.picture(index),
        };
        match &self.images {
            Images::Raw(_) | Images::Codes(_) => None,
            Images::Pictures(pictures) => pictures.name(index),
        }
    }

    /// Tells these images from others: what they are, and a checksum of a few.
    ///
    /// # Errors
    /// Where they can't be read.
    pub fn fingerprint(&self) -> Result<String, DataError> {
        let few = self.len().min(16);
        let spread: Vec<usize> = (0..few).map(|n| n * self.len() / few).collect();
        let (mut images, mut labels) = (Vec::new(), Vec::new());
        let mut sum = Sha256::new();
        // They need not be of one size.
        for index in spread {
            self.read(&[index], &mut images, &mut labels)?;
            sum.update(&images);
            labels
                .iter()
                .for_each(|label| sum.update(label.to_le_bytes()));
        }
        Ok(format!("{} {}", self.describe(), hex(&sum.finalize())))
    }

    /// For example `CIFAR-10 test: 10000 images 32x32x3, 10 classes`.
    pub fn describe(&self) -> String {
        let [height, width, channels] = self.shape;
        let size = match self.one_size() {
            Ok(_) => format!("{width}x{height}x{channels}"),
            Err(_) => {
                let [height, width] = self.largest();
                format!("of many sizes up to {width}x{height}x{channels}")
            }
        };
        let what = match self.crops {
            None => "images",
            Some(_) => "crops",
        };
        let classes = match self.nr_classes {
            0 => "no labels".to_owned(),
            n => format!("{n} classes"),
        };
        let (name, count) = (&self.name, self.len());
        match self.codes() {
            None => format!("{name}: {count} {what} {size}, {classes}"),
            Some([codes, 0]) => {
                format!("{name}: {count} maps {width}x{height} of {codes} codes, {classes}")
            }
            Some([codes, coarse]) => format!(
                "{name}: {count} maps {width}x{height} of {codes} codes with coarser ones of {coarse}, \
                 {classes}"
            ),
        }
    }

    /// Replaces `images` by the images at `indices`, `[indices.len(), height, width, channels]`, or by codes
    /// in the bytes that a model takes, and `labels` by their labels, `[indices.len()]`, or nothing where there are none.
    ///
    /// # Errors
    /// An index out of range; images of different sizes; a file that cannot be read or decoded (named).
    pub fn read(
        &self,
        indices: &[usize],
        images: &mut Vec<u8>,
        labels: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        self.read_in_epoch(0, 0, indices, images, labels)
    }

    /// As [`Dataset::read`], in an epoch of a training with this seed: where crops lie depends on it.
    ///
    /// # Errors
    /// As [`Dataset::read`].
    pub fn read_in_epoch(
        &self,
        seed: u64,
        epoch: u64,
        indices: &[usize],
        images: &mut Vec<u8>,
        labels: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        if let Some(&index) = indices.iter().find(|&&i| i >= self.len()) {
            return Err(DataError::Index {
                index,
                len: self.len(),
            });
        }
        let size = indices.first().map_or([1, 1], |&first| self.size(first));
        if indices.iter().any(|&index| self.size(index) != size) {
            self.one_size()?;
        }
        let bytes = size[0] * size[1] * self.bytes_per_pixel();
        images.resize(indices.len() * bytes, 0);
        images
            .par_chunks_exact_mut(bytes)
            .zip(indices)
            .try_for_each(|(image, &i)| match &self.crops {
                Some(crops) => {
                    let read = |picture, rows| self.read_rows(picture, rows);
                    crops.cut(seed, epoch, i, read, image)
                }
                None => self.read_into(i, image),
            })?;
        labels.clear();
        if !self.labels.is_empty() {
            let of = |&i: &usize| self.crops.as_ref().map_or(i, |crops| crops.picture(i));
            labels.extend(indices.iter().map(|i| self.labels[of(i)]));
        }
        Ok(())
    }

    /// Reads a whole image.
    fn read_into(&self, index: usize, image: &mut [u8]) -> Result<(), DataError> {
        match &self.images {
            Images::Raw(images) => images.read(index, image)?,
            Images::Codes(codes) => codes.read(index, image),
            Images::Pictures(pictures) => image.copy_from_slice(&pictures.read(index)?),
        }
        Ok(())
    }

    /// Some rows of a whole image, though crops are cut out of it.
    fn read_rows(&self, index: usize, rows: Range<usize>) -> Result<Cow<'_, [u8]>, DataError> {
        let raw = match &self.images {
            Images::Pictures(pictures) => return pictures.rows(index, rows),
            Images::Codes(_) => unreachable!("crops are not cut out of codes"),
            Images::Raw(raw) => raw,
        };
        let [height, width, channels] = raw.shape;
        let mut image = vec![0; height * width * channels];
        raw.read(index, &mut image)?;
        let row = width * channels;
        Ok(image[rows.start * row..rows.end * row].to_vec().into())
    }

    /// Crops of this side instead of whole images: of each image as many in an epoch as would cover it, at
    /// places that are drawn anew in every one. Smaller images are left out, and the listener is told so. Decoded
    /// pictures stay where there is room.
    fn cropped(
        mut self,
        side: usize,
        room: arrays::Room,
        listener: &mut Listener,
    ) -> Result<Dataset, DataError> {
        if self.codes().is_some() {
            return Err(DataError::Config(format!(
                "{}: crops are cut out of pictures, not of maps of codes: leave the crop out",
                self.describe()
            )));
        }
        let sizes = (0..self.pictures()).map(|picture| self.size(picture));
        let (crops, smaller) = Crops::of(side, self.shape[2], sizes);
        if crops.len() == 0 {
            return Err(DataError::Config(format!(
                "{}: no {side}x{side} crops can be cut out of it: choose a smaller crop, or larger pictures",
                self.describe()
            )));
        }
        if smaller > 0 {
            let all = self.pictures();
            let text = format!(
                "{}: {smaller} of {all} pictures are smaller than crops of {side}x{side}, \
                and are left out",
                self.name
            );
            tell(listener, text)?;
        }
        if let Images::Pictures(pictures) = &mut self.images {
            pictures.keep(&room, &self.name, listener)?;
        }
        self.shape = [side, side, self.shape[2]];
        self.crops = Some(crops);
        Ok(self)
    }
}

/// Where fetched data lie: `$PIXELCNN_CACHE`, or `pixelcnn` in the user's cache folder.
pub fn cache_dir() -> Option<PathBuf> {
    match std::env::var_os("PIXELCNN_CACHE") {
        Some(root) if !root.is_empty() => Some(root.into()),
        _ => dirs::cache_dir().map(|cache| cache.join("pixelcnn")),
    }
}

/// The indices that a split gets of a source without splits: those whose keys have the smallest
/// hashes are held out. Ascending; the two splits are disjoint and together complete. One image at
/// least is on either side where there are two and `fraction` is not 0.
fn hold_out<K: AsRef<[u8]>>(
    keys: impl Iterator<Item = K>,
    fraction: f64,
    split: Split,
) -> Vec<usize> {
    let mut order: Vec<([u8; 32], usize)> = keys
        .enumerate()
        .map(|(i, key)| (Sha256::digest(key).into(), i))
        .collect();
    order.sort_unstable();
    let count = match fraction {
        0.0 => 0,
        _ => ((order.len() as f64 * fraction).round() as usize)
            .max(1)
            .min(order.len().saturating_sub(1)),
    };
    let (test, train) = order.split_at(count);
    let mut indices: Vec<usize> = match split {
        Split::Train => train,
        Split::Test => test,
    }
    .iter()
    .map(|&(_, i)| i)
    .collect();
    indices.sort_unstable();
    indices
}

#[cfg(test)]
mod tests;
