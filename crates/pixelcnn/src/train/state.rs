//! The state of a training run, and the file that holds it.
//!
//! A checkpoint is one safetensors file. Its tensors have the names of the original's checkpoints
//! (`model/conv2d_0/V`, `model/conv2d_0/V/ExponentialMovingAverage`) and Adam's moments names after
//! the same pattern (`model/conv2d_0/V/adam_first`, `.../adam_second`); the rest of the state is
//! in the header's metadata.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::path::Path;

use pixelcnn_core::config::ModelConfig;
use pixelcnn_core::engine::State;
use pixelcnn_core::network::Layout;
use serde_json::{Map, Value, json};

use super::config::{RunConfig, TrainConfig};
use crate::atomic;
use crate::weights::original::{AVERAGE, Optimized};
use crate::weights::safetensors::{
    Encoded, FORMAT, FileError, Named, PARAMETER, Precision, SafetensorsFile, name, writing,
};
use crate::weights::{Imported, WeightsError, hub};
use hub::Origin;

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
    /// Learning rate of the last step taken, before warm-up and cool-down; it is multiplied by the decay
    /// before each step.
    pub learning_rate: f64,
    /// Seed of all random numbers.
    pub seed: u64,
    /// Images trained on so far, repeated ones counted again.
    pub images_seen: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// The step after which the run ends, once time has decided that.
    pub last_step: Option<u64>,
    /// Step and test bits/dim of the last evaluation.
    pub last_evaluation: Option<(u64, f64)>,
    /// Step and test bits/dim of the best evaluation so far.
    pub best: Option<(u64, f64)>,
    /// What the steps since the last line of metrics add to the next one.
    pub unrecorded: Unrecorded,
    /// All settings of the run that saved it; none in a file of an earlier version.
    pub run: Option<RunConfig>,
    /// The names of the classes of a class-conditional model; none where the data have none, or in a file of
    /// an earlier version.
    pub class_names: Vec<String>,
    /// The weights that the training began with; none where they were drawn.
    pub origin: Option<Origin>,
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

/// A model is another one than a run is of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {wanted} in the run and {saved} in the model: they must be the same")]
pub struct OtherModel {
    /// The first differing field of [`ModelConfig`].
    pub field: String,
    /// Its value in the run's settings.
    pub wanted: String,
    /// Its value in the model.
    pub saved: String,
}

/// Checks that two models are the same.
pub(super) fn expect_same(saved: &ModelConfig, wanted: &ModelConfig) -> Result<(), OtherModel> {
    let fields = |config: &ModelConfig| json!(config).as_object().cloned().unwrap_or_default();
    let (saved, wanted) = (fields(saved), fields(wanted));
    // Settings that a model does not use are left out.
    for field in saved.keys().chain(wanted.keys()) {
        let value = |fields: &Map<String, Value>| {
            let value = fields.get(field).map(Value::to_string);
            value.unwrap_or_else(|| "not set".into())
        };
        if saved.get(field) != wanted.get(field) {
            return Err(OtherModel {
                wanted: value(&wanted),
                saved: value(&saved),
                field: field.clone(),
            });
        }
    }
    Ok(())
}

/// Newest version of the format. Every version keeps its checksum as it is here, and every one that
/// was ever written is read.
const VERSION: u64 = 1;

/// What follows a parameter's name in the names of Adam's moments.
const FIRST: &str = "/adam_first";
const SECOND: &str = "/adam_second";

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
            last_step: None,
            last_evaluation: None,
            best: None,
            unrecorded: Unrecorded::default(),
            run: None,
            class_names: Vec::new(),
            origin: None,
            parameters,
            average,
            moments: Some(Moments::zeros(&Layout::new(config))),
        }
    }

    /// The state in which a training goes on from weights of elsewhere: epochs count from here, and
    /// the settings tell the learning rate after the steps taken and how many images they saw.
    pub fn of(imported: Imported, train: &TrainConfig) -> TrainState {
        let Imported {
            config,
            step,
            arrays,
            class_names,
            origin,
            ..
        } = imported;
        // As the original computes it, a product at a time.
        let learning_rate = (0..step).fold(train.learning_rate, |rate, _| {
            rate * train.learning_rate_decay
        });
        TrainState {
            step,
            learning_rate,
            images_seen: step * train.batch_size as u64,
            moments: Some(Moments {
                first: arrays.first,
                second: arrays.second,
            }),
            class_names,
            origin,
            ..TrainState::new(&config, train, arrays.parameters, arrays.average)
        }
    }

    /// The state as the original's checkpoints hold it.
    ///
    /// # Errors
    /// [`WeightsError::NoMoments`].
    pub fn optimized(&self) -> Result<Optimized<'_>, WeightsError> {
        let moments = self.moments.as_ref().ok_or(WeightsError::NoMoments)?;
        Ok(Optimized {
            config: &self.config,
            step: self.step,
            parameters: &self.parameters,
            average: &self.average,
            first: &moments.first,
            second: &moments.second,
        })
    }

    /// Writes the state to the file at `path`, atomically; takes no memory to speak of.
    ///
    /// # Errors
    /// [`FileError::Write`], or [`FileError::Mismatch`] where an array has not the
    /// length that the configuration asks for.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        let encoded = self.encode(path)?;
        atomic::write(path, |w| encoded.write_to(w)).map_err(writing(path))
    }

    /// Reads the state from the file at `path`; takes as much memory as the state.
    ///
    /// # Errors
    /// Every [`FileError`] that concerns one file: never a state other than what was saved.
    pub fn read(path: &Path) -> Result<TrainState, FileError> {
        TrainState::decode(SafetensorsFile::open(path, FORMAT)?)
    }

    /// The file's bytes, in memory.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, FileError> {
        let (path, mut bytes) = (Path::new("memory"), Vec::new());
        let encoded = self.encode(path)?;
        encoded.write_to(&mut bytes).map_err(writing(path))?;
        Ok(bytes)
    }

    /// And back; `name` stands for them in errors.
    pub(super) fn of_bytes(bytes: &[u8], name: &Path) -> Result<TrainState, FileError> {
        let file = SafetensorsFile::read(bytes, bytes.len() as u64, name, FORMAT)?;
        TrainState::decode(file)
    }

    fn decode(mut file: SafetensorsFile) -> Result<TrainState, FileError> {
        let path = file.path.clone();
        let malformed = |reason: String| FileError::NotACheckpoint {
            path: path.clone(),
            reason,
        };
        let version = file.scalar("version").map_err(malformed)?;
        if !(1..=VERSION).contains(&version) {
            return Err(FileError::Version {
                path,
                version,
                known: VERSION,
            });
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
        let last_step = match file.metadata.contains_key("last_step") {
            true => Some(file.scalar("last_step").map_err(malformed)?),
            false => None,
        };
        let run = match file.metadata.get("run") {
            Some(run) => Some(toml::from_str(run).map_err(|error| {
                malformed(format!("its settings: {}", error.message().escape_debug()))
            })?),
            None => None,
        };
        let class_names = file.json("class_names").map_err(malformed)?;
        let class_names = hub::class_names(class_names.unwrap_or_default(), &config);
        let origin = file.json("origin").map_err(malformed)?;
        Ok(TrainState {
            config,
            step: file.scalar("step").map_err(malformed)?,
            epoch: file.scalar("epoch").map_err(malformed)?,
            position: file.scalar("position").map_err(malformed)?,
            learning_rate: file.scalar("learning_rate").map_err(malformed)?,
            seed: file.scalar("seed").map_err(malformed)?,
            images_seen: file.scalar("images_seen").map_err(malformed)?,
            seconds: file.scalar("seconds").map_err(malformed)?,
            last_step,
            last_evaluation: evaluation("last_evaluation").map_err(malformed)?,
            best: evaluation("best").map_err(malformed)?,
            unrecorded: unrecorded().map_err(malformed)?,
            run,
            class_names,
            origin,
            parameters,
            average,
            moments,
        })
    }

    /// Takes the arrays out, for an engine to train on.
    ///
    /// # Panics
    /// If the state has no moments.
    pub fn lend_arrays(&mut self) -> State {
        let moments = self.moments.take();
        let Moments { first, second } = moments.expect("a state that is trained on");
        State {
            parameters: mem::take(&mut self.parameters),
            average: mem::take(&mut self.average),
            first,
            second,
        }
    }

    /// Puts them back as the engine gives them.
    pub fn take_arrays(&mut self, arrays: State) {
        let (first, second) = (arrays.first, arrays.second);
        (self.parameters, self.average) = (arrays.parameters, arrays.average);
        self.moments = Some(Moments { first, second });
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
    /// [`OtherModel`] with the first field that differs.
    pub fn expect_config(&self, wanted: &ModelConfig) -> Result<(), OtherModel> {
        expect_same(&self.config, wanted)
    }

    /// What a file of this state holds, everything but the tensors' bytes ready to be written.
    fn encode(&self, path: &Path) -> Result<Encoded<'_>, FileError> {
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
        if let Some(last_step) = self.last_step {
            metadata.insert("last_step".into(), last_step.to_string());
        }
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
        if !self.class_names.is_empty() {
            metadata.insert("class_names".into(), json!(self.class_names).to_string());
        }
        if let Some(origin) = &self.origin {
            metadata.insert("origin".into(), json!(origin).to_string());
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

#[cfg(test)]
pub(super) mod tests;
