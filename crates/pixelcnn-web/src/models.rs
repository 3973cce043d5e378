//! The models that are served: the shipped one, files, and runs, of which always the newest checkpoint.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use pixelcnn::archive::CodingModel;
use pixelcnn::data::{DataConfig, Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::incremental::EvaluatorError;
use pixelcnn::network::Network;
use pixelcnn::sample::Sampler;
use pixelcnn::score::{Reference, ScoreError, Scores, score};
use pixelcnn::train::run::Run;
use pixelcnn::{Model, ModelConfig};

use crate::problem::{Problem, Result};
use crate::room::Flag;

/// Images of a test set that others are seen beside.
const REFERENCE: usize = 500;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is part of the program.
    #[cfg(feature = "pretrained")]
    Shipped,
    /// A file of weights, or a run's checkpoint.
    File(PathBuf),
    /// The newest checkpoint of a run's folder.
    Run(PathBuf),
}

impl Source {
    /// The name that clients call it by.
    pub fn name(&self) -> String {
        let (Source::File(path) | Source::Run(path)) = self else {
            return "shipped".into();
        };
        let own = path.file_name().unwrap_or(path.as_os_str());
        own.to_string_lossy().into_owned()
    }

    /// Changes where the model does.
    fn stamp(&self) -> Option<SystemTime> {
        match self {
            Source::Run(path) => path.join("checkpoints").metadata().ok()?.modified().ok(),
            _ => None,
        }
    }
}

/// A model in memory.
pub struct Loaded {
    /// The name that clients call it by.
    pub name: String,
    /// No other one has it.
    pub number: u64,
    /// Its shape, weights and card.
    pub model: Model,
    /// The names of its classes; none where they have none.
    pub classes: Vec<String>,
    /// The data that it was trained on, where that is known.
    data: Option<DataConfig>,
    reference: OnceLock<Option<Reference>>,
    sampler: OnceLock<Sampler>,
    coder: OnceLock<Arc<CodingModel>>,
    network: Mutex<Option<Network>>,
}

impl Loaded {
    /// Opens a model.
    ///
    /// # Errors
    /// Where it can't be read, or is one of codes.
    pub fn open(source: &Source) -> Result<Loaded> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = source.name();
        let unfit = |error: &dyn std::fmt::Display| Problem::unfit(format!("{name}: {error}"));
        let (model, data) = match source {
            #[cfg(feature = "pretrained")]
            Source::Shipped => (Model::pretrained().map_err(|error| unfit(&error))?, None),
            Source::File(path) => (Model::open(path).map_err(|error| unfit(&error))?, None),
            Source::Run(path) => {
                let run = Run::open(path).map_err(|error| unfit(&error))?;
                let model = Model {
                    card: run.card(false),
                    config: run.state.config,
                    weights: run.state.average,
                };
                (model, run.config.map(|config| config.data))
            }
        };
        if model.config.nr_codes > 0 {
            return Err(unfit(
                &"the model is one of codes: it has no pictures to show",
            ));
        }
        Ok(Loaded {
            classes: class_names(&model.config, data.as_ref()),
            reference: reference(source),
            data,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            name,
            model,
            sampler: OnceLock::new(),
            coder: OnceLock::new(),
            network: Mutex::new(None),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// It, ready to draw images of a size.
    ///
    /// # Errors
    /// Where it cannot, as those with attention of other sizes than their own may.
    pub fn sampler(&self, size: [usize; 2]) -> Result<Sampler> {
        let resized = self.config().resized(size);
        let new = || {
            Sampler::new(&resized, &self.model.weights, &Device::Cpu)
                .map_err(|error| Problem::unfit(error.to_string()))
        };
        if resized != *self.config() {
            return new();
        }
        match self.sampler.get() {
            Some(sampler) => Ok(sampler.clone()),
            None => {
                let sampler = new()?;
                Ok(self.sampler.get_or_init(|| sampler).clone())
            }
        }
    }

    /// It, ready to code pictures.
    ///
    /// # Errors
    /// Where it gives images no likelihood.
    pub fn coder(&self) -> Result<Arc<CodingModel>> {
        if let Some(coder) = self.coder.get() {
            return Ok(Arc::clone(coder));
        }
        let coder = self.model.coder();
        let coder = coder.map_err(|error| Problem::unfit(error.to_string()))?;
        Ok(Arc::clone(self.coder.get_or_init(|| Arc::new(coder))))
    }

    /// Does something with it as a network for images of a size. Others wait that long.
    ///
    /// # Errors
    /// Where it cannot take such images.
    pub fn with_network<T>(
        &self,
        size: [usize; 2],
        f: impl FnOnce(&mut Network) -> Result<T>,
    ) -> Result<T> {
        let unfit = |error: &dyn std::fmt::Display| Problem::unfit(error.to_string());
        let mut held = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out: what is left after a panic is made anew.
        let mut network = match held.take() {
            Some(network) => network,
            None => self
                .model
                .network(&Device::Cpu)
                .map_err(|error| unfit(&error))?,
        };
        let own = [network.config().height, network.config().width];
        let resized = match own == size {
            true => Ok(()),
            false => network.resize(size).map_err(|error| unfit(&error)),
        };
        let done = resized.and_then(|()| f(&mut network));
        *held = Some(network);
        done
    }

    /// How images that it should find usual score: those of the test set that it was trained for, of which
    /// some are measured the first time. None where that is not known.
    ///
    /// # Errors
    /// Where the images can't be read or measured, or `progress` stops it.
    pub fn reference(
        &self,
        progress: &mut dyn FnMut(f64) -> ControlFlow<()>,
    ) -> Result<Option<Reference>> {
        if let Some(known) = self.reference.get() {
            return Ok(known.clone());
        }
        let Some(data) = &self.data else {
            return Ok(None);
        };
        let ours = |error: &dyn std::fmt::Display| Problem::ours(error.to_string());
        let images = Dataset::open(data, Split::Test).map_err(|error| ours(&error))?;
        let count = images.len().min(REFERENCE);
        let Ok(size) = images.one_size() else {
            return Ok(None);
        };
        let scores = self.with_network(size, |network| {
            let mut progress = |scores: &Scores| {
                progress(scores.likelihood.bits_per_dim.len() as f64 / count as f64)
            };
            let scores = score(network, &images, 0..count, 16, &mut progress);
            scores.map_err(|error| match error {
                ScoreError::Stopped(_) => Flag::stopped(),
                error => ours(&error),
            })
        })?;
        let name = format!("test images of {}", data.short_name());
        let reference = Reference::new(name, &scores);
        Ok(self.reference.get_or_init(|| reference).clone())
    }

    /// Checks that it gives images a likelihood.
    ///
    /// # Errors
    /// Where it was trained by the energy distance.
    pub fn expect_likelihood(&self) -> Result<()> {
        EvaluatorError::unless_likelihood(self.config())
            .map_err(|error| Problem::unfit(error.to_string()))
    }

    /// The class that a request names, 0 where the model has none.
    ///
    /// # Errors
    /// Where there is no such class.
    pub fn class(&self, class: Option<u32>) -> Result<u32> {
        match (class, self.config().nr_classes) {
            (None | Some(0), 0) => Ok(0),
            (Some(_), 0) => Err(Problem::unfit(
                "the model is not class-conditional: leave `class` out",
            )),
            (None, _) => Err(Problem::unfit(
                "the model is class-conditional: give `class`",
            )),
            (Some(class), classes) if (class as usize) < classes => Ok(class),
            (Some(class), classes) => Err(Problem::unfit(format!(
                "class {class}: the model has {classes}: choose 0 to {}",
                classes - 1
            ))),
        }
    }
}

/// What is known of the scores of images without measuring any.
fn reference(source: &Source) -> OnceLock<Option<Reference>> {
    match source {
        #[cfg(feature = "pretrained")]
        Source::Shipped => OnceLock::from(Reference::pretrained().ok()),
        Source::File(_) => OnceLock::from(None),
        Source::Run(_) => OnceLock::new(),
    }
}

fn class_names(config: &ModelConfig, data: Option<&DataConfig>) -> Vec<String> {
    let data = data.filter(|_| config.nr_classes > 0);
    let data = data.and_then(|data| Dataset::open(data, Split::Test).ok());
    data.map_or(Vec::new(), |data| data.class_names().to_vec())
}

struct Entry {
    source: Source,
    /// With what its source was then.
    loaded: Option<(Option<SystemTime>, Arc<Loaded>)>,
}

/// All models, by their names.
pub struct Models {
    entries: Mutex<Vec<Entry>>,
}

impl Models {
    /// Models of these sources.
    pub fn new(sources: Vec<Source>) -> Models {
        let models = Models {
            entries: Mutex::default(),
        };
        models.add(sources);
        models
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds those that are new; of two of one name the first is had.
    pub fn add(&self, sources: impl IntoIterator<Item = Source>) {
        let mut entries = self.lock();
        for source in sources {
            let name = source.name();
            if entries.iter().all(|entry| entry.source.name() != name) {
                entries.push(Entry {
                    source,
                    loaded: None,
                });
            }
        }
    }

    /// Their sources.
    pub fn sources(&self) -> Vec<Source> {
        self.lock()
            .iter()
            .map(|entry| entry.source.clone())
            .collect()
    }

    /// The model of a name, the first one without; reads it where it is not in memory or has changed.
    ///
    /// # Errors
    /// Where there is none, or it can't be read.
    pub fn get(&self, name: Option<&str>) -> Result<Arc<Loaded>> {
        let source = {
            let entries = self.lock();
            let entry = match name {
                None => entries.first(),
                Some(name) => entries.iter().find(|entry| entry.source.name() == name),
            };
            let Some(entry) = entry else {
                return Err(match name {
                    None => Problem::missing("there is no model yet: `pixelcnn train` makes one"),
                    Some(name) => Problem::missing(format!(
                        "there is no model `{name}`: /v1/models tells which there are"
                    )),
                });
            };
            match &entry.loaded {
                Some((stamp, loaded)) if *stamp == entry.source.stamp() => {
                    return Ok(Arc::clone(loaded));
                }
                _ => entry.source.clone(),
            }
        };
        // Others are not kept waiting while it is read.
        let stamp = source.stamp();
        let loaded = Arc::new(Loaded::open(&source)?);
        let mut entries = self.lock();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.source == source) {
            entry.loaded = Some((stamp, Arc::clone(&loaded)));
        }
        Ok(loaded)
    }

    /// One that is in memory.
    pub fn in_memory(&self, name: &str) -> Option<Arc<Loaded>> {
        let entries = self.lock();
        let entry = entries.iter().find(|entry| entry.source.name() == name)?;
        entry.loaded.as_ref().map(|(_, loaded)| Arc::clone(loaded))
    }
}

/// Whether a folder is a run's.
pub fn is_run(path: &Path) -> bool {
    path.join("config.toml").is_file() || path.join("checkpoints").is_dir()
}
