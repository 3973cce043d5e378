//! The models that are served: the shipped one, files, and runs, of which always the newest checkpoint.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

#[cfg(feature = "pretrained")]
use pixelcnn::Shipped;
use pixelcnn::archive::CodingModel;
use pixelcnn::data::{DataConfig, Dataset, Split, cache_dir};
use pixelcnn::device::Device;
use pixelcnn::incremental::EvaluatorError;
use pixelcnn::network::{Layout, Network};
use pixelcnn::sample::Sampler;
use pixelcnn::score::{Reference, ScoreError, Scores, score};
use pixelcnn::train::checkpoints::Checkpoints;
use pixelcnn::train::run::Run;
use pixelcnn::{Model, ModelConfig};

use crate::limits;
use crate::problem::{Problem, Result};
use crate::room::Flag;

/// Images of a test set that others are seen beside.
const REFERENCE: usize = 500;

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// It is part of the program.
    #[cfg(feature = "pretrained")]
    Shipped(Shipped),
    /// A file of weights, or a run's checkpoint.
    File(PathBuf),
    /// The newest checkpoint of a run's folder.
    Run(PathBuf),
}

/// What changes where a model does.
type Stamp = Option<(PathBuf, SystemTime)>;

impl Source {
    fn stamp(&self) -> Stamp {
        let Source::Run(path) = self else {
            return None;
        };
        let checkpoints = Checkpoints::new(path.join("checkpoints")).list();
        let newest = checkpoints.ok()?.into_iter().next()?;
        let written = newest.metadata().ok()?.modified().ok()?;
        Some((newest, written))
    }
}

/// A name for a path that no other one has: its last part, or more of them.
pub fn name_of(path: &Path, is_taken: impl Fn(&str) -> bool) -> String {
    let parts: Vec<String> = path
        .components()
        .map(|part| part.as_os_str().to_string_lossy().into_owned())
        .collect();
    let names = (1..=parts.len()).map(|count| parts[parts.len() - count..].join("/"));
    let mut names = names.filter(|name| !is_taken(name));
    names.next().unwrap_or_else(|| path.display().to_string())
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
    /// Multiply-adds of a pixel.
    cost: u64,
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
    fn open(name: String, source: &Source) -> Result<Loaded> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let unfit = |error: &dyn std::fmt::Display| Problem::unfit(format!("{name}: {error}"));
        let (model, data) = match source {
            #[cfg(feature = "pretrained")]
            Source::Shipped(shipped) => (shipped.model().map_err(|error| unfit(&error))?, None),
            Source::File(path) => (Model::open(path).map_err(|error| unfit(&error))?, None),
            Source::Run(path) => {
                let run = Run::open(path).map_err(|error| unfit(&error))?;
                let data = run.config.as_ref().map(|config| config.data.clone());
                (run.into_model(), data)
            }
        };
        let config = &model.config;
        if config.nr_codes > 0 {
            return Err(unfit(
                &"the model is one of codes: it has no pictures to show",
            ));
        }
        let data = data.filter(is_here);
        Ok(Loaded {
            classes: class_names(&model, data.as_ref()),
            cost: Layout::new(config).multiply_adds / (config.height * config.width) as u64,
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

    /// Pixels of an image that it takes, so that none takes it too long: of one with attention fewer, as each
    /// looks at all before it.
    pub fn most_pixels(&self) -> usize {
        let by_cost = limits::MULTIPLY_ADDS / self.cost.max(1);
        let most = match self.config().attends() {
            true => limits::ATTENDED,
            false => limits::MEASURED,
        };
        most.min(usize::try_from(by_cost).unwrap_or(usize::MAX))
    }

    /// Checks that images are not more than it takes.
    ///
    /// # Errors
    /// Where they are.
    pub fn expect_few(&self, pixels: usize) -> Result<()> {
        match self.most_pixels() {
            most if pixels > most => Err(Problem::unfit(format!(
                "{pixels} pixels: this model takes at most {most} at a time here"
            ))),
            _ => Ok(()),
        }
    }

    /// It, ready to draw images of a size.
    ///
    /// # Errors
    /// Where it cannot.
    pub fn sampler(&self, size: [usize; 2]) -> Result<Sampler> {
        let resized = self.config().resized(size);
        let new = || {
            Sampler::new(&resized, &self.model.weights, &Device::CPU)
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

    /// Does something with it as a network for images of a size. The room sees to it that nobody else wants it
    /// meanwhile.
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
                .network(&Device::CPU)
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
        progress: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Reference>> {
        if let Some(known) = self.reference.get() {
            return Ok(known.clone());
        }
        let Some(data) = &self.data else {
            return Ok(None);
        };
        let ours = |error: &dyn std::fmt::Display| Problem::ours(error.to_string());
        let images = Dataset::open(data, Split::Test).map_err(|error| ours(&error))?;
        let Ok(size) = images.one_size() else {
            return Ok(None);
        };
        self.expect_few(size[0] * size[1])?;
        let count = images.len().min(REFERENCE);
        let scores = self.with_network(size, |network| {
            let mut progress = |_: &Scores| progress();
            let scores = score(network, &images, 0..count, 4, &mut progress);
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
        Source::Shipped(shipped) => OnceLock::from(shipped.reference().ok()),
        Source::File(_) => OnceLock::from(None),
        Source::Run(_) => OnceLock::new(),
    }
}

/// Whether data are on this machine: no request is to fetch any.
fn is_here(data: &DataConfig) -> bool {
    let named = |folder: PathBuf| folder.join(&data.data).exists();
    let cached = data.data_dir.clone().or_else(cache_dir);
    Path::new(&data.data).exists() || cached.is_some_and(named)
}

/// The names of a model's classes, as it knows them or its data.
fn class_names(model: &Model, data: Option<&DataConfig>) -> Vec<String> {
    let (known, count) = (&model.card.class_names, model.config.nr_classes);
    if known.len() == count {
        return known.clone();
    }
    let data = data.and_then(|data| Dataset::open(data, Split::Test).ok());
    let names = data.map_or(Vec::new(), |data| data.class_names().to_vec());
    match names.len() == count {
        true => names,
        false => Vec::new(),
    }
}

struct Entry {
    name: String,
    source: Source,
    /// With what its source was then, and when it was last wanted.
    loaded: Option<(Stamp, Arc<Loaded>, Instant)>,
}

/// All models, by their names.
pub struct Models {
    entries: Mutex<Vec<Entry>>,
    /// Held while one is read: several are not to be at a time.
    reading: Mutex<()>,
}

impl Models {
    /// Models of these sources.
    pub fn new(sources: Vec<Source>) -> Models {
        let models = Models {
            entries: Mutex::default(),
            reading: Mutex::default(),
        };
        models.add(sources);
        models
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds those that are new, and forgets runs that are gone.
    pub fn add(&self, sources: impl IntoIterator<Item = Source>) {
        let mut entries = self.lock();
        let is_gone = |source: &Source| matches!(source, Source::Run(path) if !path.exists());
        entries.retain(|entry| !is_gone(&entry.source));
        for source in sources {
            if entries.iter().any(|entry| entry.source == source) {
                continue;
            }
            let is_taken = |name: &str| entries.iter().any(|entry| entry.name == name);
            let name = match &source {
                #[cfg(feature = "pretrained")]
                Source::Shipped(shipped) => shipped.to_string(),
                Source::File(path) | Source::Run(path) => name_of(path, is_taken),
            };
            entries.push(Entry {
                name,
                source,
                loaded: None,
            });
        }
    }

    /// Their names and sources.
    pub fn list(&self) -> Vec<(String, Source)> {
        let entries = self.lock();
        let entries = entries.iter();
        entries
            .map(|entry| (entry.name.clone(), entry.source.clone()))
            .collect()
    }

    /// The model of a name, the first one without; reads it where it is not in memory or has changed.
    ///
    /// # Errors
    /// Where there is none, or it can't be read.
    pub fn get(&self, name: Option<&str>) -> Result<Arc<Loaded>> {
        let (name, source) = {
            let entries = self.lock();
            let entry = match name {
                None => entries.first(),
                Some(name) => entries.iter().find(|entry| entry.name == name),
            };
            let Some(entry) = entry else {
                return Err(match name {
                    None => Problem::missing("there is no model yet: `pixelcnn train` makes one"),
                    Some(name) => Problem::missing(format!(
                        "there is no model `{name}`: /v1/models tells which there are"
                    )),
                });
            };
            (entry.name.clone(), entry.source.clone())
        };
        let stamp = source.stamp();
        if let Some(loaded) = self.loaded(&name, &stamp) {
            return Ok(loaded);
        }
        // Those that are in memory are had meanwhile.
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded(&name, &stamp) {
            return Ok(loaded);
        }
        let loaded = Arc::new(Loaded::open(name, &source)?);
        let mut entries = self.lock();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.source == source) {
            entry.loaded = Some((stamp, Arc::clone(&loaded), Instant::now()));
        }
        // The one that was not wanted for longest makes room.
        let in_memory = entries.iter_mut().filter(|entry| entry.loaded.is_some());
        let mut in_memory: Vec<&mut Entry> = in_memory.collect();
        in_memory.sort_by_key(|entry| entry.loaded.as_ref().map(|(_, _, wanted)| *wanted));
        let too_many = in_memory.len().saturating_sub(limits::MODELS);
        for entry in in_memory.into_iter().take(too_many) {
            entry.loaded = None;
        }
        Ok(loaded)
    }

    /// One that is in memory and has not changed.
    fn loaded(&self, name: &str, now: &Stamp) -> Option<Arc<Loaded>> {
        let mut entries = self.lock();
        let entry = entries.iter_mut().find(|entry| entry.name == name)?;
        let (stamp, loaded, wanted) = entry.loaded.as_mut()?;
        if stamp != now {
            return None;
        }
        *wanted = Instant::now();
        Some(Arc::clone(loaded))
    }

    /// Those that are in memory, changed or not.
    pub fn in_memory(&self) -> Vec<Arc<Loaded>> {
        let entries = self.lock();
        let loaded = entries.iter().filter_map(|entry| entry.loaded.as_ref());
        loaded.map(|(_, loaded, _)| Arc::clone(loaded)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_name_are_told_apart() {
        let path = |text: &str| Source::File(text.into());
        let models = Models::new(vec![
            path("a/best"),
            path("b/best"),
            path("c/b/best"),
            path("a/best"),
        ]);
        let names: Vec<String> = models.list().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["best", "b/best", "c/b/best"]);
        assert_eq!(models.get(Some("other")).err().unwrap().status, 404);
    }
}
