//! Weights in and out: what the original's TensorFlow code, its PyTorch port and model hubs store,
//! read into one form, [`Imported`], and written again for use elsewhere.
//!
//! | module | what |
//! |---|---|
//! | [`original`] | the original's names: the model that they tell of, all of a training in them |
//! | [`tensorflow`] | TensorFlow's checkpoints, read in both forms, written in the current one |
//! | `table` | the sorted table that both forms are made of |
//! | [`pytorch`] | state dicts as `torch.save` writes them |
//! | `pickle` | the part of Python's pickles that they need |
//! | [`port`] | which of their tensors are a PyTorch model's, and the names of its layers |
//! | [`safetensors`] | parameters in a file with a checksum |
//! | [`hub`] | safetensors with a `config.json` and a model card |
//! | [`npz`] | NumPy's archives |
//!
//! Files are taken to be hostile: every length is held against the file's own size before memory is
//! taken for it, every checksum that a format has is checked, and nothing of a pickle is run.

pub mod hub;
pub mod npz;
pub mod original;
mod pickle;
pub mod port;
pub mod pytorch;
pub mod safetensors;
mod table;
pub mod tensorflow;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use pixelcnn_core::engine::State;
use pixelcnn_core::{ConfigError, ModelConfig, Nonlinearity};

use crate::atomic;
use hub::Origin;
use safetensors::FileError;

/// An array of numbers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tensor {
    /// Its extents; none for a scalar.
    pub shape: Vec<usize>,
    /// Its values, the last axis fastest.
    pub values: Vec<f32>,
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// How a file stores floating-point numbers, in little-endian order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Float {
    F16,
    BF16,
    F32,
    F64,
}

impl Float {
    /// Bytes of a number.
    fn size(self) -> usize {
        match self {
            Float::F16 | Float::BF16 => 2,
            Float::F32 => 4,
            Float::F64 => 8,
        }
    }

    /// Reads `count` numbers, rounded to single precision.
    fn read(self, file: &mut impl Read, count: usize) -> io::Result<Vec<f32>> {
        match self {
            Float::F16 => numbers(file, count, |b| f16::from_le_bytes(b).to_f32()),
            Float::BF16 => numbers(file, count, |b| bf16::from_le_bytes(b).to_f32()),
            Float::F32 => numbers(file, count, f32::from_le_bytes),
            Float::F64 => numbers(file, count, |b| f64::from_le_bytes(b) as f32),
        }
    }
}

fn numbers<const N: usize>(
    file: &mut impl Read,
    count: usize,
    value: impl Fn([u8; N]) -> f32,
) -> io::Result<Vec<f32>> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(io::Error::other)?;
    let mut buffer = [0; 1 << 14];
    while values.len() < count {
        let bytes = &mut buffer[..(N * (count - values.len())).min(1 << 14)];
        file.read_exact(bytes)?;
        let (words, _) = bytes.as_chunks();
        values.extend(words.iter().map(|&word| value(word)));
    }
    Ok(values)
}

/// Why the contents of a file can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file system refuses to read.
    #[error("cannot be read: {0}")]
    Io(#[source] io::Error),
    /// The file ends too early.
    #[error("is truncated: fetch or copy it again")]
    Truncated,
    /// A checksum doesn't hold, or the file's parts contradict each other.
    #[error("is damaged ({0}): fetch or copy it again")]
    Damaged(String),
    /// A sound file of something that is not read here.
    #[error("can't be imported: {0}")]
    Refused(String),
    /// A tensor is not what the model needs.
    #[error(
        "is not the PixelCNN++ that its layers' names and shapes tell of: tensor {tensor:?} {reason}"
    )]
    Tensor {
        /// The first tensor that doesn't fit.
        tensor: String,
        /// How it doesn't.
        reason: String,
    },
    /// Two nonlinearities have the same shapes.
    #[error("has weights that both elu and relu fit: say which nonlinearity it has")]
    Nonlinearity,
    /// What was said of the model is not so.
    #[error("is of a model with {field} {found}, not {said}")]
    Contradiction {
        /// What was said.
        field: &'static str,
        /// As it was said.
        said: String,
        /// As the file has it.
        found: String,
    },
    /// No model can be so.
    #[error("is not of a possible model: {0}")]
    Config(#[from] ConfigError),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Fault::Truncated,
            _ => Fault::Io(error),
        }
    }
}

/// Why weights can't be imported or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file can't be used.
    #[error("`{path}` {fault}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        fault: Fault,
    },
    /// A safetensors file can't be used.
    #[error(transparent)]
    Safetensors(#[from] FileError),
    /// The file system refuses to write; what was there before still is.
    #[error("cannot write `{path}`: {source}: make room or choose another folder")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// TensorFlow's checkpoints hold the optimizer's state.
    #[error(
        "the checkpoint has weights alone, without the optimizer's state: export it as safetensors or npz"
    )]
    NoMoments,
    /// The original code has no such models.
    #[error(
        "the model has {setting} = {value}, which the original code does not have: export it as safetensors or npz"
    )]
    BeyondTheOriginal {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
    },
    /// The port has no such models.
    #[error(
        "the model has {setting} = {value}, which the PyTorch port does not have: take the original's names"
    )]
    BeyondThePort {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
    },
    /// Half precision ends at 65504.
    #[error(
        "tensor {tensor:?} has the value {value}, which half precision can't hold: export it in single precision"
    )]
    BeyondHalf {
        /// The first such tensor.
        tensor: String,
        /// Its value.
        value: f32,
    },
    /// A batch is not a whole number of images for each GPU.
    #[error(
        "{batch_size} images in a batch can't be shared by {nr_gpu} GPUs: choose another number of GPUs"
    )]
    Gpus {
        /// Images in a batch.
        batch_size: usize,
        /// GPUs to share them.
        nr_gpu: usize,
    },
}

impl WeightsError {
    fn file(path: &Path) -> impl Fn(Fault) -> WeightsError + '_ {
        |fault| WeightsError::File {
            path: path.to_owned(),
            fault,
        }
    }

    fn write(path: &Path) -> impl Fn(io::Error) -> WeightsError + '_ {
        |source| WeightsError::Write {
            path: path.to_owned(),
            source,
        }
    }
}

/// What files of weights don't say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Unsaid {
    /// Height and width of the images; by default the original's, 32x32.
    pub size: Option<[usize; 2]>,
    /// The nonlinearity; by default the only one that fits the shapes.
    pub nonlinearity: Option<Nonlinearity>,
}

/// What a file of weights gives. Arrays are in the order of [`Layout`](pixelcnn_core::network::Layout).
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// The model.
    pub config: ModelConfig,
    /// Optimizer steps taken.
    pub step: u64,
    /// The parameters, their averages and the optimizer's moments.
    pub arrays: State,
    /// The names of the classes that the model knows; none where the file tells none.
    pub class_names: Vec<String>,
    /// What they were trained on, where the file tells.
    pub origin: Option<Origin>,
    /// What else there is in the file, by name: an epoch, another optimizer's state, settings.
    pub unused: Vec<String>,
}

/// Reads weights from a file, whose format is told from its contents:
///
/// - a checkpoint of the original code: one of the two files of TensorFlow's current form or their
///   common prefix, or the file of the older form; with scopes such as `tower_0/` before the names,
///   and in any floating-point type;
/// - a PyTorch state dict of the port or of this project's own benchmark model, alone or with other
///   things beside it; of a compiled, parallel or averaged model; a second one whose name says that
///   it has averages (`ema`, `average`, `avg`, `polyak`, `shadow`, `swa`) gives these;
/// - a safetensors file with a `config.json` beside it.
///
/// What a file lacks begins anew: averages with the parameters, the optimizer at step 0. Averages
/// alone are also the parameters. Epochs count from the import. Takes as much memory as the state
/// and one tensor more.
///
/// # Errors
/// [`WeightsError::File`] or [`WeightsError::Safetensors`]: never weights other than those stored,
/// as far as the format's checksums go (PyTorch's older form has none). A tensor that doesn't
/// belong to the model is an error, and so are two models of which none has averages.
pub fn read(path: &Path, unsaid: &Unsaid) -> Result<Imported, WeightsError> {
    let failed = WeightsError::file(path);
    let mut unused = Vec::new();
    let tensors = match tensorflow::prefix(path) {
        Some(prefix) => tensorflow::read_v2(&prefix, &mut unused),
        None => {
            let mut file = open(path).map_err(&failed)?;
            match format(&mut file).map_err(&failed)? {
                Format::Safetensors => {
                    return hub::import(path, unsaid);
                }
                Format::Table => tensorflow::v1(file, &mut unused),
                Format::PyTorch => pytorch::read(file, &mut unused).and_then(port::to_original),
            }
        }
    };
    let imported = tensors.and_then(|tensors| original::state(tensors, unsaid));
    let imported = imported.map_err(failed)?;
    Ok(Imported { unused, ..imported })
}

fn open(path: &Path) -> Result<BufReader<File>, Fault> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(Fault::Refused(
            "it is a folder: name the file of weights in it".into(),
        ));
    }
    Ok(BufReader::with_capacity(1 << 16, file))
}

/// Writes a file in a folder, which is made where there is none.
fn write(
    folder: &Path,
    name: &str,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), WeightsError> {
    fs::create_dir_all(folder).map_err(WeightsError::write(folder))?;
    let path = folder.join(name);
    atomic::write(&path, contents).map_err(WeightsError::write(&path))
}

enum Format {
    Table,
    PyTorch,
    Safetensors,
}

fn format(file: &mut (impl Read + Seek)) -> Result<Format, Fault> {
    let mut start = Vec::new();
    file.by_ref().take(9).read_to_end(&mut start)?;
    let mut end = Vec::new();
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(size.saturating_sub(8)))?;
    file.by_ref().take(8).read_to_end(&mut end)?;
    file.rewind()?;
    // A safetensors file begins with its header's length, which may look like a mark of PyTorch's.
    let header = start
        .first_chunk()
        .map(|&length| u64::from_le_bytes(length));
    match (&start[..], &end[..]) {
        (_, end) if end == table::MAGIC.to_le_bytes() => Ok(Format::Table),
        ([.., b'{'], _) if start.len() == 9 && header <= Some(size) => Ok(Format::Safetensors),
        ([b'P', b'K', ..] | [0x80, ..], _) => Ok(Format::PyTorch),
        _ => Err(Fault::Refused(
            "it is no TensorFlow checkpoint, PyTorch state dict or safetensors file".into(),
        )),
    }
}

/// The product of extents that a file names, where it can be counted.
fn numel(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, &extent| n.checked_mul(extent))
}
