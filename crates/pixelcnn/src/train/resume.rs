//! What a run that goes on goes on with.

use std::path::{Path, PathBuf};

use super::checkpoints::{CheckpointError, Checkpoints};
use super::config::{ConfigFile, Difference, RunConfig, RunConfigError};
use super::folder::CHECKPOINTS;
use super::metrics::{self, Recorded};
use super::state::TrainState;

/// Why a run can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// No folder of a run.
    #[error("{folder}: not the folder of a run (it has no config.toml): check its name")]
    NotARun {
        /// The folder.
        folder: PathBuf,
    },
    /// Its settings can't be read.
    #[error("{error}: {}", remedy(*known))]
    Config {
        /// Why.
        error: RunConfigError,
        /// Whether a checkpoint knows what they were.
        known: bool,
    },
    /// Its settings were edited, and no checkpoint knows what they were.
    #[error(
        "`{path}` is not as it was written, and no checkpoint knows what it was: put it back, or remove its \
         first line if you have changed it"
    )]
    NotAsWritten {
        /// The file.
        path: PathBuf,
    },
    /// Its settings were edited, and are not those of the checkpoint.
    #[error(
        "`{path}`: {}: {}",
        differing.iter().map(|(setting, _)| setting.to_string()).collect::<Vec<_>>().join("; "),
        remedy(*known)
    )]
    Edited {
        /// The file.
        path: PathBuf,
        /// The settings that differ, there and in the checkpoint, and whether a run can go on with another value
        /// of each.
        differing: Vec<(Difference, bool)>,
        /// Whether a checkpoint knows what they were.
        known: bool,
    },
    /// A setting that the state depends on.
    #[error(
        "{name}: the run was begun with {value}, which cannot be changed: leave {name} out or begin a new run"
    )]
    Fixed {
        /// The setting.
        name: String,
        /// What the run was begun with.
        value: String,
    },
    /// A new value is out of range.
    #[error(transparent)]
    Invalid(#[from] RunConfigError),
    /// There is nothing to train on with.
    #[error(
        "the checkpoint has weights alone, without the optimizer's state: it can be used but not trained on"
    )]
    WeightsAlone,
    /// What it would go on from is not there any more.
    #[error(
        "{folder}: its checkpoints are gone, its metrics.jsonl is there: put one back, name another one or begin \
         a new run"
    )]
    CheckpointsGone {
        /// The folder.
        folder: PathBuf,
    },
    /// Nor are its images.
    #[error("{data}: the run's images are not there: give the place where they are now")]
    ImagesGone {
        /// Where they were.
        data: String,
    },
}

/// What helps where settings are not what they should be.
pub fn remedy(known: bool) -> &'static str {
    match known {
        true => "remove the file to go on with the settings in the checkpoint",
        false => "correct the file",
    }
}

/// What a run goes on with.
#[derive(Debug)]
pub struct Resumed {
    /// Its settings.
    pub config: RunConfig,
    /// Its `config.toml`, where that was missing: it is written again from the checkpoint.
    pub missing: Option<PathBuf>,
}

/// The settings with which a run goes on from `start`, or from its beginning: its config.toml, held against
/// what the checkpoint knows, and what `change` makes of it. `learning_rate`, that of the next step before
/// warm-up and cool-down, becomes the state's, and so does a changed one.
///
/// # Errors
/// [`ResumeError`]: nothing was changed.
pub fn resume(
    run: &Path,
    start: Option<&mut TrainState>,
    change: &dyn Fn(&mut RunConfig),
    learning_rate: Option<f64>,
) -> Result<Resumed, ResumeError> {
    let path = run.join("config.toml");
    let (has_start, moments) = match &start {
        Some(state) => (true, state.moments.is_some()),
        None => (false, true),
    };
    let known = start.as_ref().and_then(|state| state.run.as_ref());
    let is_known = known.is_some();
    let mut missing = None;
    let file = match (RunConfig::read(run), known) {
        (Ok(file), _) => file,
        (Err(error), Some(known)) if error.is_missing() => {
            missing = Some(path.clone());
            ConfigFile {
                config: known.clone(),
                as_written: Some(true),
            }
        }
        (Err(error), None) if error.is_missing() => {
            let folder = run.into();
            return Err(ResumeError::NotARun { folder });
        }
        (Err(error), _) => {
            let known = is_known;
            return Err(ResumeError::Config { error, known });
        }
    };
    if known.is_none() && file.as_written == Some(false) {
        return Err(ResumeError::NotAsWritten { path });
    }

    // A file that is as it was written may be ahead of the checkpoint in what can be changed; any other
    // says nothing new.
    let as_written = file.as_written == Some(true);
    let known = start.as_ref().map(|state| state.settings(&file.config));
    let known = known.unwrap_or_else(|| file.config.clone());
    let (mut found, mut expected) = (file.config.clone(), known.clone());
    if !as_written {
        change(&mut found);
        change(&mut expected);
    }
    let differing = found.differences(&expected).into_iter();
    let differing = differing.map(|setting| {
        let free = known.can_change(&setting.name);
        (setting, free)
    });
    let differing: Vec<_> = differing
        .filter(|(_, free)| !(as_written && *free))
        .collect();
    if !differing.is_empty() {
        return Err(ResumeError::Edited {
            path,
            differing,
            known: is_known,
        });
    }

    let begun = match as_written {
        true => file.config,
        false => known.clone(),
    };
    let mut config = begun.clone();
    change(&mut config);
    for Difference { name, there, .. } in config.differences(&begun) {
        if !begun.can_change(&name) {
            return Err(ResumeError::Fixed { name, value: there });
        }
    }
    config.validate()?;
    if !moments {
        return Err(ResumeError::WeightsAlone);
    }
    if !has_start && metrics::read(run).is_ok_and(|found| found != Recorded::default()) {
        let folder = run.into();
        return Err(ResumeError::CheckpointsGone { folder });
    }
    if config.data.is_gone() {
        let data = config.data.data;
        return Err(ResumeError::ImagesGone { data });
    }
    let (old, new) = (known.train.learning_rate, config.train.learning_rate);
    let rate = learning_rate.or((new != old).then_some(new));
    let other_hours = known.train.hours != config.train.hours;
    if let Some(state) = start {
        // What was saved has other values.
        if let Some(rate) = rate {
            (state.learning_rate, state.run) = (rate, None);
        }
        if other_hours {
            (state.last_step, state.run) = (None, None);
        }
    }
    Ok(Resumed { config, missing })
}

/// The state that a run goes on from: its newest checkpoint; none where it stopped before anything was saved, and
/// begins from the beginning.
///
/// # Errors
/// Where the newest checkpoint is damaged.
pub fn newest(run: &Path) -> Result<Option<TrainState>, CheckpointError> {
    match Checkpoints::new(run.join(CHECKPOINTS)).latest() {
        Ok((state, _)) => Ok(Some(state)),
        Err(CheckpointError::Empty { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
