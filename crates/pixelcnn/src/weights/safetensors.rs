//! Parameters in a safetensors file, with a checksum.
//!
//! The tensors have the names of the original's checkpoints (`model/conv2d_0/V`); what else there is
//! to say is in the header's metadata, with a SHA-256 over everything. Nothing of a file is believed
//! before that checksum holds, and no length in it is trusted beyond the file's own size.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::f16;
use pixelcnn_core::config::ModelConfig;
use pixelcnn_core::network::Layout;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::Float;
use crate::atomic;
use crate::hex;

/// Why a file of weights or of a training state can't be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The file system refuses to read.
    #[error("cannot read `{path}`: {source}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// The file system refuses to write; what was there before still is.
    #[error("cannot write `{path}`: {source}: make room or choose another folder, then resume")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// Shorter than it says.
    #[error("`{path}` is truncated")]
    Truncated {
        /// The file.
        path: PathBuf,
    },
    /// The checksum doesn't hold.
    #[error("`{path}` has been altered (its checksum does not hold)")]
    Altered {
        /// The file.
        path: PathBuf,
    },
    /// Something else.
    #[error("`{path}` is not a pixelcnn checkpoint: {reason}")]
    NotACheckpoint {
        /// The file.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// From another version of this program.
    #[error(
        "`{path}` has format version {version}, this program reads {known}: update the program"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
        /// The newest version that is read here.
        known: u64,
    },
    /// The model's configuration is not one.
    #[error("`{path}` has an invalid model configuration: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tensors are not those of the model's configuration.
    #[error("`{path}` does not fit its model configuration: tensor {tensor:?} {reason}")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The first tensor that doesn't fit.
        tensor: String,
        /// How it doesn't.
        reason: String,
    },
}

/// Values of `format` in the metadata: of a training state, whose checksum must hold, and of
/// weights alone, which others may have written without any metadata.
pub(crate) const FORMAT: &str = "pixelcnn";
const WEIGHTS_FORMAT: &str = "pixelcnn-weights";

/// What follows a parameter's name in the name of its tensor: nothing.
pub(crate) const PARAMETER: &str = "";

/// The longest header that is read: several times that of the largest model.
pub(crate) const MAX_HEADER: u64 = 32 << 20;

/// How exactly the tensors of a file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Precision {
    /// As they are: F32.
    #[default]
    Single,
    /// Rounded to F16, half as large.
    Half,
}

impl Precision {
    fn dtype(self) -> Dtype {
        match self {
            Precision::Single => Dtype::F32,
            Precision::Half => Dtype::F16,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Precision::Single => 4,
            Precision::Half => 2,
        }
    }
}

/// Shape and values of tensors by name.
pub(crate) type Named<'a> = BTreeMap<String, (Vec<usize>, &'a [f32])>;

/// Adds an array of parameters to the tensors of a file.
pub(crate) fn name<'a>(
    path: &Path,
    layout: &Layout,
    suffix: &str,
    values: &'a [Vec<f32>],
    tensors: &mut Named<'a>,
) -> Result<(), FileError> {
    for (index, parameter) in layout.parameters.iter().enumerate() {
        let tensor = format!("{}{suffix}", parameter.name);
        let found = values.get(index).map(Vec::as_slice).unwrap_or_default();
        if found.len() != parameter.len() || values.len() != layout.parameters.len() {
            return Err(FileError::Mismatch {
                path: path.into(),
                tensor,
                reason: format!("has {} of {} values", found.len(), parameter.len()),
            });
        }
        tensors.insert(tensor, (parameter.shape.clone(), found));
    }
    Ok(())
}

/// Writes weights alone, for use elsewhere, to the safetensors file at `path`, atomically. Their
/// model and `description` are among the metadata.
///
/// # Errors
/// [`FileError::Write`], or [`FileError::Mismatch`] where an array has not the length that the
/// configuration asks for.
pub(crate) fn write_weights(
    path: &Path,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    precision: Precision,
    description: String,
) -> Result<(), FileError> {
    let encoded = encoded_weights(path, config, parameters, precision, description)?;
    atomic::write(path, |w| encoded.write_to(w)).map_err(writing(path))
}

/// The bytes of such a file; `name` stands for it in errors.
///
/// # Errors
/// [`FileError::Mismatch`].
pub(crate) fn weights_bytes(
    name: &str,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    precision: Precision,
    description: String,
) -> Result<Vec<u8>, FileError> {
    let path = Path::new(name);
    let encoded = encoded_weights(path, config, parameters, precision, description)?;
    let mut bytes = Vec::new();
    encoded.write_to(&mut bytes).map_err(writing(path))?;
    Ok(bytes)
}

fn encoded_weights<'a>(
    path: &Path,
    config: &ModelConfig,
    parameters: &'a [Vec<f32>],
    precision: Precision,
    description: String,
) -> Result<Encoded<'a>, FileError> {
    let mut tensors = Named::new();
    name(
        path,
        &Layout::new(config),
        PARAMETER,
        parameters,
        &mut tensors,
    )?;
    let metadata = [
        ("format", WEIGHTS_FORMAT.into()),
        ("config", json!(config).to_string()),
        ("description", description),
    ]
    .map(|(key, value)| (key.into(), value));
    Encoded::new(path, metadata.into(), tensors, precision)
}

/// Reads weights alone of a model from the safetensors file at `path`, whoever wrote it.
///
/// # Errors
/// Every [`FileError`] that concerns one file.
pub(crate) fn read_weights(path: &Path, config: &ModelConfig) -> Result<Vec<Vec<f32>>, FileError> {
    SafetensorsFile::open(path, WEIGHTS_FORMAT)?.weights(config)
}

/// Model, weights and description.
pub(crate) type Described = (ModelConfig, Vec<Vec<f32>>, String);

/// Opens a file that [`write_weights`] has written.
///
/// # Errors
/// Every [`FileError`] that concerns one file.
pub(crate) fn open_weights(path: &Path) -> Result<Described, FileError> {
    SafetensorsFile::open(path, WEIGHTS_FORMAT)?.described()
}

/// Parses such a file in memory; `name` stands for it in errors.
///
/// # Errors
/// Every [`FileError`] that concerns one file.
pub(crate) fn parse_weights(file: &[u8], name: &str) -> Result<Described, FileError> {
    SafetensorsFile::read(file, file.len() as u64, Path::new(name), WEIGHTS_FORMAT)?.described()
}

/// A checkpoint that is ready to be written.
pub(crate) struct Encoded<'a> {
    header: Vec<u8>,
    tensors: Vec<&'a [f32]>,
    precision: Precision,
}

impl<'a> Encoded<'a> {
    pub(crate) fn new(
        path: &Path,
        mut metadata: BTreeMap<String, String>,
        tensors: Named<'a>,
        precision: Precision,
    ) -> Result<Encoded<'a>, FileError> {
        let mut checksum = Checksum::new(&metadata);
        for (name, (shape, values)) in &tensors {
            let mut bytes = Sha256::new();
            in_bytes(values, precision, |chunk| {
                bytes.update(chunk);
                Ok(())
            })
            .map_err(writing(path))?;
            checksum.tensor(name, precision.dtype(), shape, bytes);
        }
        metadata.insert("sha256".into(), checksum.finish());

        let mut header = Map::new();
        header.insert("__metadata__".into(), json!(metadata));
        let mut offset = 0;
        for (name, (shape, values)) in &tensors {
            let end = offset + precision.bytes() * values.len();
            header.insert(
                name.clone(),
                json!({"dtype": precision.dtype(), "shape": shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        let mut header = Value::from(header).to_string().into_bytes();
        // The format asks for tensors that begin at a multiple of 8.
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(Encoded {
            header,
            tensors: tensors.into_values().map(|(_, values)| values).collect(),
            precision,
        })
    }

    pub(crate) fn write_to(&self, w: &mut dyn Write) -> io::Result<()> {
        w.write_all(&(self.header.len() as u64).to_le_bytes())?;
        w.write_all(&self.header)?;
        for values in &self.tensors {
            in_bytes(values, self.precision, |chunk| w.write_all(chunk))?;
        }
        Ok(())
    }
}

/// Hands `values` to `each` as little-endian bytes, a small piece at a time.
fn in_bytes(
    values: &[f32],
    precision: Precision,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = [0; 1 << 14];
    let size = precision.bytes();
    for chunk in values.chunks(buffer.len() / size) {
        for (bytes, &value) in buffer.chunks_exact_mut(size).zip(chunk) {
            match precision {
                Precision::Single => bytes.copy_from_slice(&value.to_le_bytes()),
                Precision::Half => bytes.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            }
        }
        each(&buffer[..size * chunk.len()])?;
    }
    Ok(())
}

/// SHA-256 over all of a file but the order in which it is stored: the metadata sorted by
/// key, then each tensor sorted by name, every part preceded by its length.
pub(crate) struct Checksum(Sha256);

impl Checksum {
    pub(crate) fn new(metadata: &BTreeMap<String, String>) -> Checksum {
        let mut checksum = Checksum(Sha256::new());
        checksum.number(metadata.len());
        for (key, value) in metadata {
            checksum.text(key);
            checksum.text(value);
        }
        checksum
    }

    pub(crate) fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Sha256) {
        self.text(name);
        self.text(&dtype.to_string());
        self.number(shape.len());
        shape.iter().for_each(|&n| self.number(n));
        self.0.update(bytes.finalize());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len());
        self.0.update(text);
    }

    fn number(&mut self, n: usize) {
        self.0.update((n as u64).to_le_bytes());
    }

    pub(crate) fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

/// A file whose checksum holds.
pub(crate) struct SafetensorsFile {
    pub path: PathBuf,
    pub metadata: BTreeMap<String, String>,
    /// Shape and values by name.
    pub tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl SafetensorsFile {
    pub(crate) fn open(path: &Path, format: &str) -> Result<SafetensorsFile, FileError> {
        let failed = |source| FileError::Read {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        SafetensorsFile::read(BufReader::with_capacity(1 << 20, file), size, path, format)
    }

    /// `size` is the length of all that `file` gives.
    pub(crate) fn read(
        mut file: impl Read,
        size: u64,
        path: &Path,
        format: &str,
    ) -> Result<SafetensorsFile, FileError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => FileError::Truncated { path: path.into() },
            _ => FileError::Read {
                path: path.into(),
                source,
            },
        };
        let malformed = |reason: String| FileError::NotACheckpoint {
            path: path.into(),
            reason,
        };
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(failed)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER {
            return Err(malformed("it does not begin with a header".into()));
        }
        if 8 + length > size {
            return Err(FileError::Truncated { path: path.into() });
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(failed)?;
        // Checks that the tensors lie one after the other and are as long as their shapes say.
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|_| malformed("its header is broken".into()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let mut metadata: BTreeMap<String, String> = metadata.into_iter().collect();
        let ours = metadata.get("format").is_some_and(|found| found == format);
        let expected = metadata.remove("sha256").filter(|_| ours);
        if format == FORMAT && !ours {
            return Err(malformed("its metadata do not say so".into()));
        }
        if format == FORMAT && expected.is_none() {
            return Err(malformed("it has no checksum".into()));
        }
        match (8 + length + header.data_len() as u64).cmp(&size) {
            std::cmp::Ordering::Less => return Err(FileError::Altered { path: path.into() }),
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => {
                return Err(FileError::Truncated { path: path.into() });
            }
        }

        let mut tensors = HashMap::new();
        let mut hashes = BTreeMap::new();
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else {
                return Err(malformed(format!("tensor `{name}` is missing")));
            };
            let count = info.shape.iter().product();
            let float = match info.dtype {
                Dtype::F32 => Float::F32,
                Dtype::F16 => Float::F16,
                Dtype::BF16 => Float::BF16,
                other => {
                    let reason = format!("tensor `{name}` is {other}, not F32, F16 or BF16");
                    return Err(malformed(reason));
                }
            };
            let mut hashed = Hashed {
                file: &mut file,
                hash: Sha256::new(),
            };
            let values = float.read(&mut hashed, count).map_err(failed)?;
            hashes.insert(name.clone(), (info.dtype, hashed.hash));
            tensors.insert(name, (info.shape.clone(), values));
        }
        let mut checksum = Checksum::new(&metadata);
        for (name, (dtype, hash)) in hashes {
            checksum.tensor(&name, dtype, &tensors[&name].0, hash);
        }
        if expected.is_some_and(|expected| checksum.finish() != expected) {
            return Err(FileError::Altered { path: path.into() });
        }
        Ok(SafetensorsFile {
            path: path.into(),
            metadata,
            tensors,
        })
    }

    pub(crate) fn malformed(&self, reason: String) -> FileError {
        FileError::NotACheckpoint {
            path: self.path.clone(),
            reason,
        }
    }

    /// The model that the metadata tell of.
    pub(crate) fn config(&self) -> Result<ModelConfig, FileError> {
        let invalid = |reason: String| FileError::Config {
            path: self.path.clone(),
            reason,
        };
        let config: String = self.scalar("config").map_err(|r| self.malformed(r))?;
        let config: ModelConfig = serde_json::from_str(&config)
            .map_err(|error| invalid(error.to_string().escape_debug().to_string()))?;
        config.validate().map_err(|e| invalid(e.to_string()))?;
        Ok(config)
    }

    /// The parameters of a file that holds nothing else.
    fn weights(mut self, config: &ModelConfig) -> Result<Vec<Vec<f32>>, FileError> {
        let parameters = self.take(&Layout::new(config), PARAMETER)?;
        self.expect_empty()?;
        Ok(parameters)
    }

    /// A file of weights alone that says what they are.
    fn described(self) -> Result<Described, FileError> {
        let description = self.scalar("description");
        let description = description.map_err(|reason| self.malformed(reason))?;
        let config = self.config()?;
        let parameters = self.weights(&config)?;
        Ok((config, parameters, description))
    }

    /// A number or text of the metadata.
    pub(crate) fn scalar<T: FromStr>(&self, key: &str) -> Result<T, String> {
        let value = self.metadata.get(key).and_then(|text| text.parse().ok());
        value.ok_or_else(|| format!("its metadata lack a valid `{key}`"))
    }

    /// What is in the metadata as JSON, if it is there.
    pub(crate) fn json<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, String> {
        let value = self.metadata.get(key);
        let value = value.map(|text| serde_json::from_str(text)).transpose();
        value.map_err(|_| format!("its metadata lack a valid `{key}`"))
    }

    /// Checks that everything has been taken out.
    pub(crate) fn expect_empty(&self) -> Result<(), FileError> {
        match self.tensors.keys().min() {
            None => Ok(()),
            Some(tensor) => Err(FileError::Mismatch {
                path: self.path.clone(),
                tensor: tensor.clone(),
                reason: "is not part of the model".into(),
            }),
        }
    }

    /// Takes one array of parameters out.
    pub(crate) fn take(
        &mut self,
        layout: &Layout,
        suffix: &str,
    ) -> Result<Vec<Vec<f32>>, FileError> {
        let parameters = layout.parameters.iter();
        parameters
            .map(|parameter| {
                let tensor = format!("{}{suffix}", parameter.name);
                let reason = match self.tensors.remove(&tensor) {
                    Some((shape, values)) if shape == parameter.shape => return Ok(values),
                    Some((shape, _)) => {
                        format!("has shape {shape:?}, not {:?}", parameter.shape)
                    }
                    None => "is missing".into(),
                };
                Err(FileError::Mismatch {
                    path: self.path.clone(),
                    tensor,
                    reason,
                })
            })
            .collect()
    }
}

/// A file of which all that is read is hashed.
struct Hashed<R> {
    file: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hash.update(&buffer[..n]);
        Ok(n)
    }
}

pub(crate) fn writing(path: &Path) -> impl Fn(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Write {
        path: path.clone(),
        source,
    }
}
