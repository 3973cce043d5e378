//! The state of a training run in a file, and the folder of such files that a run keeps.
//!
//! A checkpoint is one safetensors file. Its tensors have the names of the original's checkpoints
//! (`model/conv2d_0/V`, `model/conv2d_0/V/ExponentialMovingAverage`) and Adam's moments names after
//! the same pattern (`model/conv2d_0/V/adam_first`, `.../adam_second`); the rest of the state is
//! in the header's metadata, with a SHA-256 over everything. Nothing of a file is believed before
//! that checksum holds, and no length in it is trusted beyond the file's own size.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, TryLockError};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use half::{bf16, f16};
use pixelcnn_core::config::ModelConfig;
use pixelcnn_core::network::Layout;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::config::{RunConfig, TrainConfig};
use crate::atomic;

/// Everything that the next training step depends on.
///
/// Arrays of parameters are in the order of [`Layout`]. All random numbers of a run are functions
/// of the seed and of the step or epoch that draws them, so `seed`, `step` and `epoch` are the
/// whole random state.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainState {
    /// The model.
    pub config: ModelConfig,
    /// Optimizer steps taken.
    pub step: u64,
    /// Whole passes over the data done.
    pub epoch: u64,
    /// Images of this epoch's shuffled order already used.
    pub position: u64,
    /// Learning rate of the last step taken; it is multiplied by the decay before each step.
    pub learning_rate: f64,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Images trained on so far, repeated ones counted again.
    pub images_seen: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// Step and test bits/dim of the last evaluation.
    pub last_evaluation: Option<(u64, f64)>,
    /// Step and test bits/dim of the best evaluation so far.
    pub best: Option<(u64, f64)>,
    /// What the steps since the last line of metrics add to the next one.
    pub unrecorded: Unrecorded,
    /// All settings of the run that saved it; none in a file of an earlier version.
    pub run: Option<RunConfig>,
    /// The parameters.
    pub parameters: Vec<Vec<f32>>,
    /// Their Polyak average.
    pub average: Vec<Vec<f32>>,
    /// Adam's moments; none in a file of weights alone, which can be used but not trained on.
    pub moments: Option<Moments>,
}

/// Sums over training steps that are in no line of metrics yet.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Unrecorded {
    /// How many.
    pub steps: u64,
    /// Of their losses in bits/dim.
    pub bits_per_dim: f64,
    /// Of the time they took.
    pub seconds: f64,
}

/// Adam's running means of the gradient and of its square.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Of the gradient.
    pub first: Vec<Vec<f32>>,
    /// Of its square.
    pub second: Vec<Vec<f32>>,
}

impl Moments {
    /// Before the first step.
    pub fn zeros(layout: &Layout) -> Moments {
        let zeros = layout.parameters.iter().map(|p| vec![0.0; p.len()]);
        let zeros: Vec<_> = zeros.collect();
        Moments {
            first: zeros.clone(),
            second: zeros,
        }
    }
}

/// Why a checkpoint can't be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
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
        "`{path}` has format version {version}, this program reads {VERSION}: update the program"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
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
    /// The checkpoint is of another model than the one asked for.
    #[error(
        "the configuration does not fit the checkpoint: {field} is {wanted}, in the checkpoint {saved}"
    )]
    OtherModel {
        /// The first differing field of [`ModelConfig`].
        field: String,
        /// Its value in the configuration asked for.
        wanted: String,
        /// Its value in the checkpoint.
        saved: String,
    },
    /// The newest checkpoint of a run can't be loaded.
    #[error("{reason}{}", advice(path, previous))]
    Damaged {
        /// The newest checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        reason: Box<CheckpointError>,
        /// The newest one before it that is whole.
        previous: Option<PathBuf>,
    },
    /// A run without checkpoints.
    #[error("no checkpoint in `{folder}`: nothing was saved there yet")]
    Empty {
        /// The folder.
        folder: PathBuf,
    },
    /// Another process trains this run.
    #[error("another process is training in `{folder}`: wait for it or choose another run folder")]
    Locked {
        /// The run folder.
        folder: PathBuf,
    },
}

fn advice(path: &Path, previous: &Option<PathBuf>) -> String {
    match previous {
        Some(previous) => format!(
            "; the previous checkpoint `{}` is whole: to go on from it, move `{}` away",
            previous.display(),
            path.display()
        ),
        None => "; no older checkpoint is whole".into(),
    }
}

/// Version of the format; every version keeps its checksum as it is here.
const VERSION: u64 = 1;

/// Values of `format` in the metadata: of a training state, whose checksum must hold, and of
/// weights alone, which others may have written without any metadata.
const FORMAT: &str = "pixelcnn";
const WEIGHTS_FORMAT: &str = "pixelcnn-weights";

/// What follows a parameter's name in the names of its tensors.
const PARAMETER: &str = "";
const AVERAGE: &str = "/ExponentialMovingAverage";
const FIRST: &str = "/adam_first";
const SECOND: &str = "/adam_second";

/// The longest header that is read: several times that of the largest model.
const MAX_HEADER: u64 = 32 << 20;

impl TrainState {
    /// A training before its first step, as `train` begins it; it belongs to no run yet.
    pub fn new(
        config: &ModelConfig,
        train: &TrainConfig,
        parameters: Vec<Vec<f32>>,
        average: Vec<Vec<f32>>,
    ) -> TrainState {
        TrainState {
            config: config.clone(),
            step: 0,
            epoch: 0,
            position: 0,
            learning_rate: train.learning_rate,
            seed: train.seed,
            images_seen: 0,
            seconds: 0.0,
            last_evaluation: None,
            best: None,
            unrecorded: Unrecorded::default(),
            run: None,
            parameters,
            average,
            moments: Some(Moments::zeros(&Layout::new(config))),
        }
    }

    /// Writes the state to the file at `path`, atomically; takes no memory to speak of.
    ///
    /// # Errors
    /// [`CheckpointError::Write`], or [`CheckpointError::Mismatch`] where an array has not the
    /// length that the configuration asks for.
    pub fn write(&self, path: &Path) -> Result<(), CheckpointError> {
        let encoded = self.encode(path)?;
        atomic::write(path, |w| encoded.write_to(w)).map_err(writing(path))
    }

    /// Reads the state from the file at `path`; takes as much memory as the state.
    ///
    /// # Errors
    /// Every [`CheckpointError`] that concerns one file: never a state other than what was saved.
    pub fn read(path: &Path) -> Result<TrainState, CheckpointError> {
        TrainState::decode(CheckpointFile::open(path, FORMAT)?)
    }

    fn decode(mut file: CheckpointFile) -> Result<TrainState, CheckpointError> {
        let path = file.path.clone();
        let malformed = |reason: String| CheckpointError::NotACheckpoint {
            path: path.clone(),
            reason,
        };
        let version = file.scalar("version").map_err(malformed)?;
        if version != VERSION {
            return Err(CheckpointError::Version { path, version });
        }
        let config = file.config()?;
        let layout = Layout::new(&config);
        let parameters = file.take(&layout, PARAMETER)?;
        let average = file.take(&layout, AVERAGE)?;
        let moments = if file.tensors.is_empty() {
            None
        } else {
            let (first, second) = (file.take(&layout, FIRST)?, file.take(&layout, SECOND)?);
            Some(Moments { first, second })
        };
        file.expect_empty()?;
        let evaluation = |name: &str| {
            let [step, bits] = [format!("{name}_step"), format!("{name}_bits_per_dim")];
            if !file.metadata.contains_key(&step) {
                return Ok(None);
            }
            Ok(Some((file.scalar(&step)?, file.scalar(&bits)?)))
        };
        let unrecorded = || {
            if !file.metadata.contains_key("unrecorded_steps") {
                return Ok(Unrecorded::default());
            }
            Ok(Unrecorded {
                steps: file.scalar("unrecorded_steps")?,
                bits_per_dim: file.scalar("unrecorded_bits_per_dim")?,
                seconds: file.scalar("unrecorded_seconds")?,
            })
        };
        let run = match file.metadata.get("run") {
            Some(run) => Some(toml::from_str(run).map_err(|error| {
                malformed(format!("its settings: {}", error.message().escape_debug()))
            })?),
            None => None,
        };
        Ok(TrainState {
            config,
            step: file.scalar("step").map_err(malformed)?,
            epoch: file.scalar("epoch").map_err(malformed)?,
            position: file.scalar("position").map_err(malformed)?,
            learning_rate: file.scalar("learning_rate").map_err(malformed)?,
            seed: file.scalar("seed").map_err(malformed)?,
            images_seen: file.scalar("images_seen").map_err(malformed)?,
            seconds: file.scalar("seconds").map_err(malformed)?,
            last_evaluation: evaluation("last_evaluation").map_err(malformed)?,
            best: evaluation("best").map_err(malformed)?,
            unrecorded: unrecorded().map_err(malformed)?,
            run,
            parameters,
            average,
            moments,
        })
    }

    /// Whether this very state has been evaluated.
    pub fn is_evaluated(&self) -> bool {
        self.last_evaluation
            .is_some_and(|(step, _)| step == self.step)
    }

    /// All settings of the run that saved it. What a file of an earlier version does not tell is as
    /// in `config`.
    pub fn settings(&self, config: &RunConfig) -> RunConfig {
        self.run.clone().unwrap_or_else(|| RunConfig {
            model: self.config.clone(),
            data: config.data.clone(),
            train: TrainConfig {
                seed: self.seed,
                ..config.train.clone()
            },
        })
    }

    /// Checks that this is a state of the model `wanted`.
    ///
    /// # Errors
    /// [`CheckpointError::OtherModel`] with the first field that differs.
    pub fn expect_config(&self, wanted: &ModelConfig) -> Result<(), CheckpointError> {
        let fields = |config: &ModelConfig| json!(config).as_object().cloned().unwrap_or_default();
        let saved = fields(&self.config);
        for (field, wanted) in fields(wanted) {
            if saved.get(&field) != Some(&wanted) {
                return Err(CheckpointError::OtherModel {
                    wanted: wanted.to_string(),
                    saved: saved.get(&field).unwrap_or(&Value::Null).to_string(),
                    field,
                });
            }
        }
        Ok(())
    }

    /// What a file of this state holds, everything but the tensors' bytes ready to be written.
    fn encode(&self, path: &Path) -> Result<Encoded<'_>, CheckpointError> {
        let mut metadata: BTreeMap<String, String> = [
            ("format", FORMAT.into()),
            ("version", VERSION.to_string()),
            ("config", json!(self.config).to_string()),
            ("step", self.step.to_string()),
            ("epoch", self.epoch.to_string()),
            ("position", self.position.to_string()),
            // `{:?}` gives the shortest decimal that is read back as the same number.
            ("learning_rate", format!("{:?}", self.learning_rate)),
            ("seed", self.seed.to_string()),
            ("images_seen", self.images_seen.to_string()),
            ("seconds", format!("{:?}", self.seconds)),
        ]
        .map(|(key, value)| (key.into(), value))
        .into();
        for (name, evaluation) in [
            ("last_evaluation", self.last_evaluation),
            ("best", self.best),
        ] {
            if let Some((step, bits_per_dim)) = evaluation {
                metadata.insert(format!("{name}_step"), step.to_string());
                metadata.insert(format!("{name}_bits_per_dim"), format!("{bits_per_dim:?}"));
            }
        }

        let Unrecorded {
            steps,
            bits_per_dim,
            seconds,
        } = self.unrecorded;
        if steps > 0 {
            metadata.insert("unrecorded_steps".into(), steps.to_string());
            metadata.insert(
                "unrecorded_bits_per_dim".into(),
                format!("{bits_per_dim:?}"),
            );
            metadata.insert("unrecorded_seconds".into(), format!("{seconds:?}"));
        }
        if let Some(run) = &self.run {
            let run = toml::to_string(run).map_err(|error| writing(path)(io::Error::other(error)));
            metadata.insert("run".into(), run?);
        }

        let mut arrays = vec![(PARAMETER, &self.parameters), (AVERAGE, &self.average)];
        if let Some(Moments { first, second }) = &self.moments {
            arrays.extend([(FIRST, first), (SECOND, second)]);
        }
        let layout = Layout::new(&self.config);
        let mut tensors = Named::new();
        for (suffix, values) in arrays {
            name(path, &layout, suffix, values, &mut tensors)?;
        }
        Encoded::new(path, metadata, tensors, Precision::Single)
    }
}

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
type Named<'a> = BTreeMap<String, (Vec<usize>, &'a [f32])>;

/// Adds an array of parameters to the tensors of a file.
fn name<'a>(
    path: &Path,
    layout: &Layout,
    suffix: &str,
    values: &'a [Vec<f32>],
    tensors: &mut Named<'a>,
) -> Result<(), CheckpointError> {
    for (index, parameter) in layout.parameters.iter().enumerate() {
        let tensor = format!("{}{suffix}", parameter.name);
        let found = values.get(index).map(Vec::as_slice).unwrap_or_default();
        if found.len() != parameter.len() || values.len() != layout.parameters.len() {
            return Err(CheckpointError::Mismatch {
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
/// As [`TrainState::write`].
pub(crate) fn write_weights(
    path: &Path,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    precision: Precision,
    description: String,
) -> Result<(), CheckpointError> {
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
    let encoded = Encoded::new(path, metadata.into(), tensors, precision)?;
    atomic::write(path, |w| encoded.write_to(w)).map_err(writing(path))
}

/// Reads weights alone of a model from the safetensors file at `path`, whoever wrote it.
///
/// # Errors
/// Every [`CheckpointError`] that concerns one file.
pub(crate) fn read_weights(
    path: &Path,
    config: &ModelConfig,
) -> Result<Vec<Vec<f32>>, CheckpointError> {
    CheckpointFile::open(path, WEIGHTS_FORMAT)?.weights(config)
}

/// Model, weights and description.
pub(crate) type Described = (ModelConfig, Vec<Vec<f32>>, String);

/// Opens a file that [`write_weights`] has written.
///
/// # Errors
/// Every [`CheckpointError`] that concerns one file.
pub(crate) fn open_weights(path: &Path) -> Result<Described, CheckpointError> {
    CheckpointFile::open(path, WEIGHTS_FORMAT)?.described()
}

/// Parses such a file in memory; `name` stands for it in errors.
///
/// # Errors
/// Every [`CheckpointError`] that concerns one file.
pub(crate) fn parse_weights(file: &[u8], name: &str) -> Result<Described, CheckpointError> {
    CheckpointFile::read(file, file.len() as u64, Path::new(name), WEIGHTS_FORMAT)?.described()
}

/// A checkpoint that is ready to be written.
struct Encoded<'a> {
    header: Vec<u8>,
    tensors: Vec<&'a [f32]>,
    precision: Precision,
}

impl<'a> Encoded<'a> {
    fn new(
        path: &Path,
        mut metadata: BTreeMap<String, String>,
        tensors: Named<'a>,
        precision: Precision,
    ) -> Result<Encoded<'a>, CheckpointError> {
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

    fn write_to(&self, w: &mut dyn Write) -> io::Result<()> {
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

/// SHA-256 over all of a checkpoint but the order in which it is stored: the metadata sorted by
/// key, then each tensor sorted by name, every part preceded by its length.
struct Checksum(Sha256);

impl Checksum {
    fn new(metadata: &BTreeMap<String, String>) -> Checksum {
        let mut checksum = Checksum(Sha256::new());
        checksum.number(metadata.len());
        for (key, value) in metadata {
            checksum.text(key);
            checksum.text(value);
        }
        checksum
    }

    fn tensor(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Sha256) {
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

    fn finish(self) -> String {
        let bytes = self.0.finalize();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A file whose checksum holds.
struct CheckpointFile {
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    /// Shape and values by name.
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

impl CheckpointFile {
    fn open(path: &Path, format: &str) -> Result<CheckpointFile, CheckpointError> {
        let failed = |source| CheckpointError::Read {
            path: path.into(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        CheckpointFile::read(BufReader::with_capacity(1 << 20, file), size, path, format)
    }

    /// `size` is the length of all that `file` gives.
    fn read(
        mut file: impl Read,
        size: u64,
        path: &Path,
        format: &str,
    ) -> Result<CheckpointFile, CheckpointError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => CheckpointError::Truncated { path: path.into() },
            _ => CheckpointError::Read {
                path: path.into(),
                source,
            },
        };
        let malformed = |reason: String| CheckpointError::NotACheckpoint {
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
            return Err(CheckpointError::Truncated { path: path.into() });
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
            std::cmp::Ordering::Less => return Err(CheckpointError::Altered { path: path.into() }),
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => {
                return Err(CheckpointError::Truncated { path: path.into() });
            }
        }

        let mut tensors = HashMap::new();
        let mut hashes = BTreeMap::new();
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else {
                return Err(malformed(format!("tensor `{name}` is missing")));
            };
            let count = info.shape.iter().product();
            let read = match info.dtype {
                Dtype::F32 => read_tensor(&mut file, count, f32::from_le_bytes),
                Dtype::F16 => read_tensor(&mut file, count, |b| f16::from_le_bytes(b).to_f32()),
                Dtype::BF16 => read_tensor(&mut file, count, |b| bf16::from_le_bytes(b).to_f32()),
                other => {
                    let reason = format!("tensor `{name}` is {other}, not F32, F16 or BF16");
                    return Err(malformed(reason));
                }
            };
            let (values, hash) = read.map_err(failed)?;
            hashes.insert(name.clone(), (info.dtype, hash));
            tensors.insert(name, (info.shape.clone(), values));
        }
        let mut checksum = Checksum::new(&metadata);
        for (name, (dtype, hash)) in hashes {
            checksum.tensor(&name, dtype, &tensors[&name].0, hash);
        }
        if expected.is_some_and(|expected| checksum.finish() != expected) {
            return Err(CheckpointError::Altered { path: path.into() });
        }
        Ok(CheckpointFile {
            path: path.into(),
            metadata,
            tensors,
        })
    }

    fn malformed(&self, reason: String) -> CheckpointError {
        CheckpointError::NotACheckpoint {
            path: self.path.clone(),
            reason,
        }
    }

    /// The model that the metadata tell of.
    fn config(&self) -> Result<ModelConfig, CheckpointError> {
        let invalid = |reason: String| CheckpointError::Config {
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
    fn weights(mut self, config: &ModelConfig) -> Result<Vec<Vec<f32>>, CheckpointError> {
        let parameters = self.take(&Layout::new(config), PARAMETER)?;
        self.expect_empty()?;
        Ok(parameters)
    }

    /// A file of weights alone that says what they are.
    fn described(self) -> Result<Described, CheckpointError> {
        let description = self.scalar("description");
        let description = description.map_err(|reason| self.malformed(reason))?;
        let config = self.config()?;
        let parameters = self.weights(&config)?;
        Ok((config, parameters, description))
    }

    /// A number or text of the metadata.
    fn scalar<T: FromStr>(&self, key: &str) -> Result<T, String> {
        let value = self.metadata.get(key).and_then(|text| text.parse().ok());
        value.ok_or_else(|| format!("its metadata lack a valid `{key}`"))
    }

    /// Checks that everything has been taken out.
    fn expect_empty(&self) -> Result<(), CheckpointError> {
        match self.tensors.keys().min() {
            None => Ok(()),
            Some(tensor) => Err(CheckpointError::Mismatch {
                path: self.path.clone(),
                tensor: tensor.clone(),
                reason: "is not part of the model".into(),
            }),
        }
    }

    /// Takes one array of parameters out.
    fn take(&mut self, layout: &Layout, suffix: &str) -> Result<Vec<Vec<f32>>, CheckpointError> {
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
                Err(CheckpointError::Mismatch {
                    path: self.path.clone(),
                    tensor,
                    reason,
                })
            })
            .collect()
    }
}

/// Reads `count` values of `SIZE` bytes and hashes their bytes.
fn read_tensor<const SIZE: usize>(
    file: &mut impl Read,
    count: usize,
    value: impl Fn([u8; SIZE]) -> f32,
) -> io::Result<(Vec<f32>, Sha256)> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(io::Error::other)?;
    let mut hash = Sha256::new();
    let mut buffer = [0; 1 << 14];
    while values.len() < count {
        let bytes = &mut buffer[..(SIZE * (count - values.len())).min(1 << 14)];
        file.read_exact(bytes)?;
        hash.update(&bytes);
        let (words, _) = bytes.as_chunks();
        values.extend(words.iter().map(|&word| value(word)));
    }
    Ok((values, hash))
}

/// The checkpoints of one run: the last few, `step-00001234.safetensors`, and the best,
/// `best.safetensors`.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints in `folder`, of which the last three are kept.
    pub fn new(folder: impl Into<PathBuf>) -> Checkpoints {
        Checkpoints {
            folder: folder.into(),
            keep: 3,
        }
    }

    /// Keeps the last `keep` (at least one) instead.
    pub fn keep(self, keep: usize) -> Checkpoints {
        let keep = keep.max(1);
        Checkpoints { keep, ..self }
    }

    /// Saves a state and gives the path of its file; then deletes all but the last few. Files of
    /// later steps go too: the run has gone back behind them.
    ///
    /// # Errors
    /// [`CheckpointError::Write`], after which every earlier checkpoint is still there.
    pub fn save(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        let path = self.of(state.step);
        self.write(state, &path)?;
        for (_, later) in self
            .numbered()?
            .iter()
            .filter(|(step, _)| *step > state.step)
        {
            fs::remove_file(later).map_err(writing(later))?;
        }
        self.prune(state.step)?;
        Ok(path)
    }

    /// Saves a state as [`Checkpoints::save`] does. Where the disk is full, earlier ones make room
    /// for it, the oldest first, the newest never.
    ///
    /// # Errors
    /// [`CheckpointError::Write`], after which the newest earlier checkpoint is still there.
    pub(super) fn rescue(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        self.make_room(|| self.save(state))
    }

    fn make_room(
        &self,
        mut save: impl FnMut() -> Result<PathBuf, CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        loop {
            let saved = save();
            let Err(CheckpointError::Write { source, .. }) = &saved else {
                return saved;
            };
            match &self.numbered()?[..] {
                [_newest, .., (_, oldest)]
                    if matches!(source.kind(), StorageFull | QuotaExceeded) =>
                {
                    fs::remove_file(oldest).map_err(writing(oldest))?;
                }
                _ => return saved,
            }
        }
    }

    /// Deletes all but the last few of the checkpoints up to a step: a save that was killed may have
    /// left one more.
    ///
    /// # Errors
    /// [`CheckpointError::Read`], [`CheckpointError::Write`].
    pub(super) fn prune(&self, step: u64) -> Result<(), CheckpointError> {
        let earlier = self.numbered()?.into_iter().filter(|(at, _)| *at <= step);
        for (_, old) in earlier.skip(self.keep) {
            fs::remove_file(&old).map_err(writing(&old))?;
        }
        Ok(())
    }

    /// Saves a state as the best one, which no later [`Checkpoints::save`] deletes.
    ///
    /// # Errors
    /// [`CheckpointError::Write`], after which the best one before it is still there.
    pub fn save_best(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        let path = self.best();
        self.write(state, &path)?;
        Ok(path)
    }

    /// Where [`Checkpoints::save`] writes the state after a step.
    pub(super) fn of(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}.safetensors"))
    }

    /// Where [`Checkpoints::save_best`] writes.
    pub fn best(&self) -> PathBuf {
        self.folder.join("best.safetensors")
    }

    /// The checkpoints of the last steps, newest first.
    ///
    /// # Errors
    /// [`CheckpointError::Read`] where the folder can't be listed.
    pub fn list(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        Ok(self.numbered()?.into_iter().map(|(_, path)| path).collect())
    }

    /// Loads the newest checkpoint and gives the path of its file.
    ///
    /// # Errors
    /// [`CheckpointError::Empty`], or [`CheckpointError::Damaged`] with the newest one that is
    /// whole: going back is for the user to decide.
    pub fn latest(&self) -> Result<(TrainState, PathBuf), CheckpointError> {
        let mut paths = self.list()?.into_iter();
        let Some(path) = paths.next() else {
            return Err(CheckpointError::Empty {
                folder: self.folder.clone(),
            });
        };
        match TrainState::read(&path) {
            Ok(state) => Ok((state, path)),
            Err(reason) => Err(CheckpointError::Damaged {
                path,
                reason: Box::new(reason),
                previous: paths.find(|path| TrainState::read(path).is_ok()),
            }),
        }
    }

    fn write(&self, state: &TrainState, path: &Path) -> Result<(), CheckpointError> {
        fs::create_dir_all(&self.folder).map_err(writing(&self.folder))?;
        atomic::remove_leftovers(&self.folder).map_err(writing(&self.folder))?;
        state.write(path)
    }

    /// Step and path of the numbered checkpoints, newest first.
    fn numbered(&self) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
        let failed = |source| CheckpointError::Read {
            path: self.folder.clone(),
            source,
        };
        let mut numbered = Vec::new();
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbered),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let step = name
                .strip_prefix("step-")
                .and_then(|name| name.strip_suffix(".safetensors"))
                .and_then(|step| step.parse().ok());
            if let Some(step) = step {
                numbered.push((step, path));
            }
        }
        numbered.sort_by(|a, b| b.cmp(a));
        Ok(numbered)
    }
}

fn writing(path: &Path) -> impl Fn(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Write {
        path: path.clone(),
        source,
    }
}

/// In a run folder.
pub(super) const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = ".lock";

/// Holds a run folder for this process, until dropped or until the process ends in any way.
#[derive(Debug)]
#[must_use = "the folder is free again when this is dropped"]
pub struct RunLock {
    _file: File,
}

/// Takes a run folder for this process, so that no two write the same run; creates it if need be,
/// and clears away what killed writers left.
///
/// # Errors
/// [`CheckpointError::Locked`] where another process (or another caller in this one) holds it,
/// [`CheckpointError::Write`].
pub fn lock(run_folder: &Path) -> Result<RunLock, CheckpointError> {
    fs::create_dir_all(run_folder).map_err(writing(run_folder))?;
    let path = run_folder.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(writing(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(CheckpointError::Locked {
                folder: run_folder.into(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(writing(&path)(source)),
    }
    for folder in ["", CHECKPOINTS, "samples"].map(|name| run_folder.join(name)) {
        atomic::remove_leftovers(&folder).map_err(writing(&folder))?;
    }
    Ok(RunLock { _file: file })
}

/// Whether a new run can begin in a folder: it is not there yet, is empty, or holds only what is
/// left of a run that ended before anything of it was saved.
///
/// # Errors
/// Those of reading the folder.
pub fn is_free(run_folder: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(run_folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let empty = || Ok::<_, io::Error>(entry.file_type()?.is_dir() && is_free(&entry.path())?);
        let nothing = match entry.file_name().to_str() {
            Some(LOCK) => true,
            Some(CHECKPOINTS) => empty()?,
            _ => atomic::is_leftover(&entry)?,
        };
        if !nothing {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::DataConfig;
    use proptest::prelude::*;

    fn config() -> ModelConfig {
        ModelConfig {
            height: 4,
            width: 4,
            channels: 1,
            nr_resnet: 1,
            nr_filters: 1,
            nr_logistic_mix: 1,
            nr_classes: 0,
            ..ModelConfig::default()
        }
    }

    /// A state of random bit patterns.
    fn state(config: ModelConfig, seed: u64, training: bool) -> TrainState {
        let layout = Layout::new(&config);
        let mut bits = seed;
        let mut arrays = || {
            let mut next = || {
                bits = bits
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                f32::from_bits((bits >> 32) as u32)
            };
            let parameters = layout.parameters.iter();
            parameters
                .map(|p| (0..p.len()).map(|_| next()).collect())
                .collect()
        };
        let (mut parameters, average): (Vec<Vec<f32>>, _) = (arrays(), arrays());
        let moments = training.then(|| Moments {
            first: arrays(),
            second: arrays(),
        });
        // Quiet and signalling NaNs with payloads, denormals, infinities, negative zero.
        let special = [
            0x7fc0_0001,
            0x7f80_0001,
            0xffff_ffff,
            1,
            0x807f_ffff,
            0xff80_0000,
            1 << 31,
        ];
        for (value, bits) in parameters.iter_mut().flatten().zip(special) {
            *value = f32::from_bits(bits);
        }
        TrainState {
            step: seed,
            epoch: 3,
            position: u64::MAX,
            learning_rate: 1e-3 * 0.999995f64.powi(7),
            seed: 0x8000_0000_0000_0001,
            images_seen: 1 << 60,
            seconds: 0.1 + 0.2,
            last_evaluation: seed.is_multiple_of(3).then_some((seed, f64::MIN_POSITIVE)),
            best: seed.is_multiple_of(2).then_some((seed, 3.0 - 1e-15)),
            unrecorded: match seed {
                0 => Unrecorded::default(),
                steps => Unrecorded {
                    steps,
                    bits_per_dim: 0.1 + 0.2,
                    seconds: 1.0 / 3.0,
                },
            },
            run: seed.is_multiple_of(2).then(|| run(config.clone())),
            parameters,
            average,
            moments,
            config,
        }
    }

    /// Settings that no preset has.
    fn run(model: ModelConfig) -> RunConfig {
        RunConfig {
            model,
            data: DataConfig {
                data: "photos of \"me\"\n".into(),
                held_out: 0.1 + 0.2,
                ..DataConfig::default()
            },
            train: TrainConfig {
                dropout: 0.1,
                learning_rate_decay: 1.0 - f64::EPSILON,
                ..TrainConfig::default()
            },
        }
    }

    /// Everything of a state, its numbers as integers, so that NaNs compare.
    type Bits = (
        ModelConfig,
        Option<RunConfig>,
        [u64; 14],
        Vec<Vec<Vec<u32>>>,
    );

    fn bits(state: &TrainState) -> Bits {
        let mut arrays = vec![&state.parameters, &state.average];
        if let Some(moments) = &state.moments {
            arrays.extend([&moments.first, &moments.second]);
        }
        let array = |array: &Vec<Vec<f32>>| {
            let tensor = |tensor: &Vec<f32>| tensor.iter().map(|x| x.to_bits()).collect();
            array.iter().map(tensor).collect()
        };
        let (last_step, last) = state.last_evaluation.unwrap_or((u64::MAX, f64::MAX));
        let (best_step, best) = state.best.unwrap_or((u64::MAX, f64::MAX));
        let numbers = [
            state.step,
            state.epoch,
            state.position,
            state.learning_rate.to_bits(),
            state.seed,
            state.images_seen,
            state.seconds.to_bits(),
            last_step,
            last.to_bits(),
            best_step,
            best.to_bits(),
            state.unrecorded.steps,
            state.unrecorded.bits_per_dim.to_bits(),
            state.unrecorded.seconds.to_bits(),
        ];
        let arrays = arrays.into_iter().map(array).collect();
        (state.config.clone(), state.run.clone(), numbers, arrays)
    }

    fn file(state: &TrainState) -> Vec<u8> {
        let mut file = Vec::new();
        let encoded = state.encode(Path::new("")).unwrap();
        encoded.write_to(&mut file).unwrap();
        file
    }

    fn parse(file: &[u8]) -> Result<TrainState, CheckpointError> {
        let file = CheckpointFile::read(file, file.len() as u64, Path::new("file"), FORMAT)?;
        TrainState::decode(file)
    }

    type Contents = (
        BTreeMap<String, String>,
        HashMap<String, (Vec<usize>, Vec<f32>)>,
    );

    /// A file with a valid checksum whose contents were changed, written by the safetensors crate.
    fn forge(state: &TrainState, change: impl FnOnce(&mut Contents)) -> Vec<u8> {
        let file = file(state);
        let read =
            CheckpointFile::read(&file[..], file.len() as u64, Path::new(""), FORMAT).unwrap();
        let mut contents = (read.metadata, read.tensors);
        change(&mut contents);
        let (metadata, tensors) = contents;
        let mut checksum = Checksum::new(&metadata);
        let mut bytes = BTreeMap::new();
        for (name, (shape, values)) in tensors {
            let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            bytes.insert(name, (shape, raw));
        }
        for (name, (shape, raw)) in &bytes {
            checksum.tensor(name, Dtype::F32, shape, Sha256::new_with_prefix(raw));
        }
        let mut metadata: HashMap<_, _> = metadata.into_iter().collect();
        metadata.insert("sha256".into(), checksum.finish());
        let views = bytes.iter().map(|(name, (shape, raw))| {
            let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.clone(), raw);
            (name, view.unwrap())
        });
        safetensors::serialize(views, Some(metadata)).unwrap()
    }

    #[test]
    fn states_come_back_bit_for_bit() {
        let conditional = ModelConfig {
            channels: 3,
            nr_filters: 3,
            nr_classes: 2,
            nonlinearity: pixelcnn_core::Nonlinearity::Elu,
            ..config()
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (n, config) in [config(), conditional].into_iter().enumerate() {
            for training in [false, true] {
                let state = state(config.clone(), n as u64, training);
                state.write(&path).unwrap();
                let read = TrainState::read(&path).unwrap();
                assert_eq!(bits(&read), bits(&state));
                assert_eq!(fs::read(&path).unwrap(), file(&state));
            }
        }
    }

    #[test]
    fn any_safetensors_reader_opens_them() {
        let state = state(config(), 1, true);
        let file = file(&state);
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        let layout = Layout::new(&state.config);
        assert_eq!(read.len(), 4 * layout.parameters.len());
        let Some(moments) = &state.moments else {
            unreachable!()
        };
        for (suffix, array) in [
            ("", &state.parameters),
            ("/ExponentialMovingAverage", &state.average),
            ("/adam_first", &moments.first),
            ("/adam_second", &moments.second),
        ] {
            for (parameter, values) in layout.parameters.iter().zip(array) {
                let tensor = read.tensor(&format!("{}{suffix}", parameter.name)).unwrap();
                assert_eq!(tensor.shape(), parameter.shape);
                let raw: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                assert_eq!(tensor.data(), raw);
            }
        }
        let forged = forge(&state, |_| ());
        assert_eq!(bits(&parse(&forged).unwrap()), bits(&state));
    }

    #[test]
    fn truncated_files_are_refused() {
        let file = file(&state(config(), 1, true));
        let lengths = (0..file.len()).step_by(401);
        for length in lengths.chain([1, 7, 8, 9, file.len() - 1]) {
            let error = parse(&file[..length]).unwrap_err();
            assert!(
                matches!(error, CheckpointError::Truncated { .. }),
                "{length}: {error}"
            );
        }
        let longer = [&file[..], b"x"].concat();
        assert!(matches!(
            parse(&longer),
            Err(CheckpointError::Altered { .. })
        ));
    }

    #[test]
    fn a_flipped_bit_never_changes_a_number() {
        let state = state(config(), 2, false);
        let file = file(&state);
        let before = bits(&state);
        for at in (0..64).chain((64..file.len()).step_by(23)) {
            let mut flipped = file.clone();
            flipped[at] ^= 1 << (at / 23 % 8);
            // Some bits of the header mean nothing: the state is the same then.
            if let Ok(read) = parse(&flipped) {
                assert_eq!(bits(&read), before, "byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(mut garbage: Vec<u8>, header in 0u64..200) {
            let _ = parse(&garbage);
            garbage.splice(0..0, header.to_le_bytes());
            let _ = parse(&garbage);
        }
    }

    #[test]
    fn hostile_headers_take_no_memory() {
        let file = |header: &str, length: u64| [&length.to_le_bytes(), header.as_bytes()].concat();
        let meta = r#""__metadata__":{"format":"pixelcnn","version":"1","sha256":""}"#;
        let shape = format!(
            r#"{{{meta},"a":{{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}}}"#
        );
        let overflow = format!(
            r#"{{{meta},"a":{{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}}}"#
        );
        let overlap = format!(
            r#"{{{meta},"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},"b":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#
        );
        let deep = "[".repeat(1 << 16);
        for (header, length) in [
            ("{}", u64::MAX),
            ("{}", u64::MAX - 7),
            ("{}", 1 << 40),
            ("{}", MAX_HEADER),
            ("{}", 2),
            (&shape, shape.len() as u64),
            (&overflow, overflow.len() as u64),
            (&overlap, overlap.len() as u64),
            (&deep, deep.len() as u64),
        ] {
            let error = parse(&file(header, length)).unwrap_err();
            assert!(
                matches!(
                    error,
                    CheckpointError::Truncated { .. } | CheckpointError::NotACheckpoint { .. }
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn a_configuration_that_does_not_fit_is_named() {
        let state = state(config(), 1, true);
        let with_config = |change: fn(&mut ModelConfig)| {
            let mut config = config();
            change(&mut config);
            parse(&forge(&state, |(metadata, _)| {
                metadata.insert("config".into(), json!(config).to_string());
            }))
        };
        let error = with_config(|config| config.nr_filters = 2).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`file` does not fit its model configuration: \
             tensor \"model/conv2d_0/V\" has shape [2, 3, 2, 1], not [2, 3, 2, 2]"
        );
        // The largest model there is: nothing of its size is taken.
        let error = with_config(|config| {
            config.nr_filters = 4096;
            config.nr_resnet = 64;
        });
        assert!(matches!(error, Err(CheckpointError::Mismatch { .. })));
        let error = with_config(|config| config.height = 6);
        assert!(matches!(error, Err(CheckpointError::Config { .. })));
        let error = with_config(|config| config.nr_filters = usize::MAX);
        assert!(matches!(error, Err(CheckpointError::Config { .. })));

        let mismatch = |change: fn(&mut Contents)| match parse(&forge(&state, change)) {
            Err(CheckpointError::Mismatch { tensor, reason, .. }) => format!("{tensor} {reason}"),
            other => panic!("{other:?}"),
        };
        let missing = |contents: &mut Contents| {
            contents.1.remove("model/dense_0/b/adam_second").unwrap();
        };
        assert_eq!(mismatch(missing), "model/dense_0/b/adam_second is missing");
        let extra = |contents: &mut Contents| {
            contents.1.insert("extra".into(), (vec![1], vec![0.0]));
        };
        assert_eq!(mismatch(extra), "extra is not part of the model");

        let newer = forge(&state, |(metadata, _)| {
            metadata.insert("version".into(), "2".into());
        });
        let error = parse(&newer).unwrap_err();
        assert!(matches!(error, CheckpointError::Version { version: 2, .. }));
        for key in [
            "step",
            "seconds",
            "config",
            "best_bits_per_dim",
            "unrecorded_seconds",
            "run",
        ] {
            let lacking = forge(&state, |(metadata, _)| {
                metadata.insert("best_step".into(), "1".into());
                metadata.insert(key.into(), "nonsense".into());
            });
            assert!(parse(&lacking).is_err(), "{key}");
        }
        let foreign = forge(&state, |(metadata, _)| {
            metadata.remove("format");
        });
        let error = parse(&foreign).unwrap_err();
        assert!(matches!(error, CheckpointError::NotACheckpoint { .. }));

        let other = ModelConfig {
            nr_filters: 160,
            ..config()
        };
        state.expect_config(&config()).unwrap();
        assert_eq!(
            state.expect_config(&other).unwrap_err().to_string(),
            "the configuration does not fit the checkpoint: \
             nr_filters is 160, in the checkpoint 1"
        );
    }

    #[test]
    fn states_of_wrong_lengths_are_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let whole = state(config(), 1, true);
        let mut short = whole.clone();
        short.average[3].pop();
        let mut fewer = whole.clone();
        fewer.parameters.pop();
        let mut more = whole;
        more.parameters.push(vec![]);
        for state in [short, fewer, more] {
            let error = state.write(&path).unwrap_err();
            assert!(matches!(error, CheckpointError::Mismatch { .. }));
        }
        assert!(!path.exists());
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_last_three_and_the_best_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let checkpoints = Checkpoints::new(&run);
        assert!(matches!(
            checkpoints.latest(),
            Err(CheckpointError::Empty { .. })
        ));
        for step in 1..=5 {
            let state = state(config(), step, true);
            let path = checkpoints.save(&state).unwrap();
            if step == 1 {
                checkpoints.save_best(&state).unwrap();
            }
            let (latest, latest_path) = checkpoints.latest().unwrap();
            assert_eq!(latest_path, path);
            assert_eq!(bits(&latest), bits(&state));
            // What a save that was killed leaves behind.
            fs::write(run.join(".step-00000009.safetensors.x.partial"), b"x").unwrap();
        }
        assert_eq!(TrainState::read(&checkpoints.best()).unwrap().step, 1);
        checkpoints.save(&state(config(), 6, true)).unwrap();
        let numbered = [4, 5, 6].map(|step| format!("step-0000000{step}.safetensors"));
        let expected = [&["best.safetensors".to_string()][..], &numbered].concat();
        assert_eq!(names(&run), expected);
        let listed = checkpoints.list().unwrap();
        assert_eq!(listed, [6, 5, 4].map(|n| run.join(&numbered[n - 4])));

        // Gone back to step 4: the files of steps that are no longer part of the run go.
        checkpoints.save(&state(config(), 5, true)).unwrap();
        assert_eq!(names(&run), expected[..3]);
        checkpoints.keep(0).save(&state(config(), 7, true)).unwrap();
        assert_eq!(
            names(&run),
            ["best.safetensors", "step-00000007.safetensors"]
        );
    }

    #[test]
    fn a_damaged_newest_checkpoint_offers_the_newest_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        let paths: Vec<_> = (1..=3)
            .map(|step| checkpoints.save(&state(config(), step, true)).unwrap())
            .collect();
        let damage = |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        };
        let offered = || match checkpoints.latest() {
            Err(CheckpointError::Damaged { path, previous, .. }) => {
                assert_eq!(path, paths[2]);
                previous
            }
            other => panic!("{other:?}"),
        };
        damage(&paths[2]);
        assert_eq!(offered().as_ref(), Some(&paths[1]));
        let text = checkpoints.latest().unwrap_err().to_string();
        let name = |n: usize| paths[n].display();
        assert_eq!(
            text,
            format!(
                "`{}` has been altered (its checksum does not hold); the previous checkpoint \
                 `{}` is whole: to go on from it, move `{}` away",
                name(2),
                name(1),
                name(2)
            )
        );
        fs::write(&paths[1], b"").unwrap();
        assert_eq!(offered().as_ref(), Some(&paths[0]));
        damage(&paths[0]);
        assert_eq!(offered(), None);
    }

    /// A disk with `left` bytes of space.
    struct SmallDisk<'a> {
        disk: &'a mut dyn Write,
        left: usize,
    }

    impl Write for SmallDisk<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.left == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let n = self.disk.write(&bytes[..bytes.len().min(self.left)])?;
            self.left -= n;
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.disk.flush()
        }
    }

    #[test]
    fn a_full_disk_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (old, new) = (state(config(), 1, true), state(config(), 2, true));
        old.write(&path).unwrap();
        let encoded = new.encode(&path).unwrap();
        for left in (0..file(&new).len()).step_by(5003) {
            let full = atomic::write(&path, |disk| {
                encoded.write_to(&mut SmallDisk { disk, left })
            });
            assert_eq!(full.unwrap_err().kind(), io::ErrorKind::StorageFull);
            assert_eq!(names(folder.path()), ["file"]);
        }
        if let Ok(mut full) = File::options().write(true).open("/dev/full") {
            let error = atomic::write(&path, |_| encoded.write_to(&mut full)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        }
        assert_eq!(bits(&TrainState::read(&path).unwrap()), bits(&old));
    }

    #[test]
    fn earlier_versions_knew_less() {
        let state = state(config(), 2, true);
        let earlier = forge(&state, |(metadata, _)| {
            metadata.retain(|key, _| !key.starts_with("unrecorded") && key != "run");
        });
        let read = parse(&earlier).unwrap();
        assert_eq!((read.unrecorded, &read.run), (Unrecorded::default(), &None));
        // Of the settings it has the model and the seed.
        let mut settings = run(config());
        settings.model.nr_filters = 7;
        let known = read.settings(&settings);
        assert_eq!(known.model, config());
        assert_eq!(known.train.seed, read.seed);
        assert_eq!(known.data, settings.data);
        assert_eq!(state.settings(&settings), run(config()));
    }

    #[test]
    fn on_a_full_disk_old_checkpoints_make_room_for_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        for step in [1, 2, 3] {
            checkpoints.save(&state(config(), step, true)).unwrap();
        }
        let path = folder.path().join("step-00000004.safetensors");
        let save = |kind: io::ErrorKind, files: usize| {
            checkpoints.make_room(|| match names(folder.path()).len() > files {
                true => Err(writing(&path)(kind.into())),
                false => checkpoints.save(&state(config(), 4, true)),
            })
        };
        save(io::ErrorKind::PermissionDenied, 0).unwrap_err();
        assert_eq!(names(folder.path()).len(), 3);
        assert_eq!(save(io::ErrorKind::StorageFull, 2).unwrap(), path);
        let left = [2, 3, 4].map(|step| format!("step-0000000{step}.safetensors"));
        assert_eq!(names(folder.path()), left);
        save(io::ErrorKind::StorageFull, 0).unwrap_err();
        assert_eq!(names(folder.path()), left[2..]);
    }

    #[test]
    fn a_folder_without_anything_saved_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        assert!(is_free(&run).unwrap());
        drop(lock(&run).unwrap());
        fs::create_dir(run.join("checkpoints")).unwrap();
        for leftover in [".config.toml.x.partial", "checkpoints/.step-0.x.partial"] {
            fs::write(run.join(leftover), b"").unwrap();
        }
        assert!(is_free(&run).unwrap());
        for file in ["config.toml", "checkpoints/step-0.safetensors", ".hidden"] {
            fs::write(run.join(file), b"").unwrap();
            assert!(!is_free(&run).unwrap(), "{file}");
            fs::remove_file(run.join(file)).unwrap();
        }
        // Whoever takes the folder next clears it.
        fs::create_dir(run.join("samples")).unwrap();
        fs::write(run.join("samples/.step-0.png.x.partial"), b"").unwrap();
        drop(lock(&run).unwrap());
        assert_eq!(names(&run), [".lock", "checkpoints", "samples"]);
        for folder in ["checkpoints", "samples"] {
            assert_eq!(names(&run.join(folder)), [""; 0]);
        }
        fs::write(folder.path().join("file"), b"").unwrap();
        assert!(is_free(&folder.path().join("file")).is_err());
    }

    #[test]
    fn a_run_is_locked_once() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let held = lock(&run).unwrap();
        let error = lock(&run).unwrap_err();
        assert!(matches!(&error, CheckpointError::Locked { folder } if *folder == run));
        drop(held);
        let _again = lock(&run).unwrap();
    }
}
