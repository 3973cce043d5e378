//! Run folders, as they are written, by this process or by others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::metrics::{self, Record};
use pixelcnn::train::run::is_run;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::models::name_of;
use crate::problem::{Problem, Result};

/// Records of a training that are given at a time: neighbouring ones are put together beyond that.
const POINTS: usize = 1000;

/// Where runs are.
pub struct Runs {
    /// Run folders, and folders of such.
    places: Vec<PathBuf>,
}

/// A run at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Overview {
    /// The run's name.
    name: String,
    /// What is measured: bits/dim, bits/code or energy.
    unit: String,
    /// Optimizer steps taken.
    step: u64,
    /// Whole passes over the data done.
    epoch: u64,
    /// Of the last steps, on training data.
    #[serde(skip_serializing_if = "Option::is_none")]
    train_bits_per_dim: Option<f64>,
    /// Of the last evaluation, on the test set.
    #[serde(skip_serializing_if = "Option::is_none")]
    test_bits_per_dim: Option<f64>,
    /// Training images a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    images_per_second: Option<f64>,
    /// Seconds of training.
    seconds: f64,
    /// Seconds of training that are left, as far as they can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_left: Option<f64>,
    /// Seconds since something was recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_ago: Option<u64>,
    /// Pictures of samples, in their order.
    samples: Vec<String>,
}

/// What a run has recorded.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Records {
    /// The run's name.
    name: String,
    /// Its settings.
    #[schema(value_type = Object)]
    settings: Value,
    /// Of training batches: step, seconds of training, bits/dim, learning rate.
    train: Vec<[f64; 4]>,
    /// Of the test set: step, seconds of training, bits/dim, its standard error.
    test: Vec<[f64; 4]>,
    /// Lines of its records that are damaged and left out.
    damaged: usize,
}

impl Runs {
    /// Runs that are here, or in a folder that is here.
    pub fn new(places: Vec<PathBuf>) -> Runs {
        Runs { places }
    }

    /// Their folders, by name.
    pub fn folders(&self) -> BTreeMap<String, PathBuf> {
        let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
        let mut add = |path: PathBuf| {
            if found.values().all(|other| *other != path) {
                let name = name_of(&path, |name| found.contains_key(name));
                found.insert(name, path);
            }
        };
        for place in &self.places {
            if is_run(place) {
                add(place.clone());
            } else {
                runs_in(place).into_iter().for_each(&mut add);
            }
        }
        found
    }

    /// The folder of a run.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(&self, name: &str) -> Result<PathBuf> {
        let folder = self.folders().remove(name);
        folder.ok_or_else(|| {
            Problem::missing(format!(
                "there is no run `{name}`: /v1/runs tells which there are"
            ))
        })
    }

    /// All runs, those that went on last first.
    pub fn overviews(&self) -> Vec<Overview> {
        let mut all: Vec<Overview> = self
            .folders()
            .into_iter()
            .map(|(name, path)| overview(name, &path))
            .collect();
        all.sort_by_key(|run| run.seconds_ago.unwrap_or(u64::MAX));
        all
    }

    /// What changes of each run when it goes on.
    pub fn stamps(&self) -> BTreeMap<String, Stamp> {
        let stamp = |path: &Path| {
            let metadata = path.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        let folders = self.folders().into_iter();
        let stamps = folders.map(|(name, path)| {
            let files = ["metrics.jsonl", "config.toml", "samples"];
            (name, files.map(|file| stamp(&path.join(file))))
        });
        stamps.collect()
    }
}

/// The runs in a folder; none where it is not there.
pub fn runs_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut inside: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    inside.retain(|path| is_run(path));
    inside.sort();
    inside
}

/// When files of a run were written, and how long they are.
pub type Stamp = [Option<(SystemTime, u64)>; 3];

/// The names of those that are not alike.
pub fn differing<'a>(
    before: &'a BTreeMap<String, Stamp>,
    now: &'a BTreeMap<String, Stamp>,
) -> Vec<&'a String> {
    let gone = before.keys().filter(|name| !now.contains_key(*name));
    let changed = now
        .iter()
        .filter(|(name, stamp)| before.get(*name) != Some(*stamp));
    changed.map(|(name, _)| name).chain(gone).collect()
}

fn overview(name: String, path: &Path) -> Overview {
    let config = RunConfig::read(path).ok().map(|file| file.config);
    // What was never recorded is not there.
    let records = metrics::read(path).unwrap_or_default().records;
    let train = records.iter().rev().find_map(|record| match record {
        Record::Train {
            train_bits_per_dim,
            images_per_second,
            ..
        } => Some((*train_bits_per_dim, *images_per_second)),
        Record::Test { .. } => None,
    });
    let test = records.iter().rev().find_map(|record| match record {
        Record::Test {
            test_bits_per_dim, ..
        } => Some(*test_bits_per_dim),
        Record::Train { .. } => None,
    });
    let (step, epoch, seconds) = records.last().map_or((0, 0, 0.0), |record| match *record {
        Record::Train {
            step,
            epoch,
            seconds,
            ..
        }
        | Record::Test {
            step,
            epoch,
            seconds,
            ..
        } => (step, epoch, seconds),
    });
    let written = path
        .join("metrics.jsonl")
        .metadata()
        .and_then(|file| file.modified());
    let ago = written
        .ok()
        .map(|written| written.elapsed().unwrap_or_default().as_secs());
    let left = config.as_ref().and_then(|config| {
        let speed = train?.1 / config.train.batch_size as f64;
        seconds_left(&config.train, [step, epoch], seconds, speed)
    });
    Overview {
        name,
        unit: config
            .as_ref()
            .map_or("bits/dim", |config| config.model.unit())
            .into(),
        step,
        epoch,
        train_bits_per_dim: train.map(|(bits, _)| bits),
        test_bits_per_dim: test,
        images_per_second: train.map(|(_, speed)| speed),
        seconds,
        seconds_left: left,
        seconds_ago: ago,
        samples: pictures(path),
    }
}

/// Seconds that a training still takes, at so many steps a second.
fn seconds_left(
    train: &TrainConfig,
    [step, epoch]: [u64; 2],
    seconds: f64,
    speed: f64,
) -> Option<f64> {
    if train.hours > 0.0 {
        return Some((train.hours * 3600.0 - seconds).max(0.0));
    }
    let by_steps = (train.steps > 0).then_some(train.steps);
    // An epoch's steps are known once one is done.
    let by_epochs = (epoch > 0).then(|| (step as f64 / epoch as f64 * train.epochs as f64) as u64);
    let last = [by_steps, by_epochs].into_iter().flatten().min()?;
    (speed > 0.0).then(|| last.saturating_sub(step) as f64 / speed)
}

/// The pictures of samples in a run's folder, in the order of their steps.
fn pictures(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path.join("samples"))
        .into_iter()
        .flatten()
        .flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| is_picture(name)).collect();
    let step = |name: &String| {
        let digits: String = name.chars().filter(char::is_ascii_digit).collect();
        digits.parse::<u64>().unwrap_or(u64::MAX)
    };
    names.sort_by_key(|name| (step(name), name.clone()));
    names
}

fn is_picture(name: &str) -> bool {
    name.ends_with(".png") && !name.starts_with('.')
}

/// The bytes of a picture of samples.
///
/// # Errors
/// Where there is none of this name.
pub fn samples(run: &Path, name: &str) -> Result<Vec<u8>> {
    let missing = || Problem::missing(format!("the run has no picture `{name}`"));
    let mut parts = Path::new(name).components();
    let is_name = matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    );
    if !is_name || !is_picture(name) {
        return Err(missing());
    }
    fs::read(run.join("samples").join(name)).map_err(|_| missing())
}

impl Records {
    /// What a run has recorded after a step.
    ///
    /// # Errors
    /// Where its files can't be read.
    pub fn read(name: &str, run: &Path, after: u64) -> Result<Records> {
        let settings = match RunConfig::read(run) {
            Ok(file) => serde_json::to_value(&file.config).unwrap_or_default(),
            Err(_) => Value::Null,
        };
        let (mut train, mut test) = (Vec::new(), Vec::new());
        let recorded = metrics::read(run).unwrap_or_default();
        for record in recorded.records {
            match record {
                Record::Train { step, .. } | Record::Test { step, .. } if step <= after => {}
                Record::Train {
                    step,
                    train_bits_per_dim,
                    learning_rate,
                    seconds,
                    ..
                } => train.push([step as f64, seconds, train_bits_per_dim, learning_rate]),
                Record::Test {
                    step,
                    test_bits_per_dim,
                    standard_error,
                    seconds,
                    ..
                } => test.push([step as f64, seconds, test_bits_per_dim, standard_error]),
            }
        }
        Ok(Records {
            name: name.into(),
            settings,
            train: fewer(&train),
            test,
            damaged: recorded.damaged.len(),
        })
    }
}

/// Means of neighbours, at the last one's step and seconds, where there are very many.
fn fewer(records: &[[f64; 4]]) -> Vec<[f64; 4]> {
    let together = records.len().div_ceil(POINTS).max(1);
    let means = records.chunks(together).map(|chunk| {
        let last = chunk[chunk.len() - 1];
        let sum: f64 = chunk.iter().map(|record| record[2]).sum();
        [last[0], last[1], sum / chunk.len() as f64, last[3]]
    });
    means.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_out_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        fs::create_dir_all(run.join("samples")).unwrap();
        fs::write(folder.path().join("secret.png"), b"secret").unwrap();
        fs::write(run.join("samples/step-1.png"), b"picture").unwrap();
        fs::write(run.join("samples/note.txt"), b"text").unwrap();
        assert_eq!(samples(&run, "step-1.png").unwrap(), b"picture");
        for name in [
            "../../secret.png",
            "note.txt",
            "",
            ".",
            "/etc/x.png",
            "a/../step-1.png",
        ] {
            assert_eq!(samples(&run, name).unwrap_err().status, 404, "{name}");
        }
        assert_eq!(pictures(&run), ["step-1.png"]);
    }

    #[test]
    fn time_left_follows_the_nearest_end() {
        let train = TrainConfig {
            steps: 1000,
            epochs: 4,
            ..TrainConfig::default()
        };
        let left = |epoch| seconds_left(&train, [200, epoch], 50.0, 10.0);
        assert_eq!(
            [left(0), left(1), left(2)],
            [Some(80.0), Some(60.0), Some(20.0)]
        );
        let hours = TrainConfig {
            hours: 0.5,
            ..train.clone()
        };
        assert_eq!(seconds_left(&hours, [1, 0], 60.0, 1.0), Some(1740.0));
        assert_eq!(seconds_left(&train, [200, 0], 1.0, 0.0), None);
    }

    #[test]
    fn many_records_become_few() {
        let records: Vec<[f64; 4]> = (0..2500).map(|i| [f64::from(i), 0.0, 1.0, 2.0]).collect();
        let few = fewer(&records);
        assert!(few.len() <= POINTS && few.last().unwrap()[0] == 2499.0);
        assert_eq!(fewer(&records[..3]), &records[..3]);
        assert_eq!(fewer(&[]), [[0.0; 4]; 0]);
    }
}
