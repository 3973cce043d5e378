//! Training, told to Python as it goes.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pixelcnn::data::{DataConfig, Dataset};
use pixelcnn::device::{self, Device};
use pixelcnn::train::checkpoints::{CheckpointError, Checkpoints};
use pixelcnn::train::config::{Difference, RunConfig};
use pixelcnn::train::run::Run;
use pixelcnn::train::settings::Settings;
use pixelcnn::train::state::TrainState;
use pixelcnn::train::{Event, Outcome, TrainError, Training, folder};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors;
use crate::model::{Model, of_run};
use crate::work::work_and_tell;

/// The first folder ``runs/NAME-N`` that is not there yet.
#[pyfunction]
pub fn first_free(name: &str) -> PathBuf {
    folder::first_free(name)
}

/// Checks that a new run can begin in a folder.
#[pyfunction]
pub fn expect_new(run: PathBuf) -> PyResult<()> {
    match folder::is_free(&run) {
        Ok(true) => Ok(()),
        Ok(false) => Err(pyo3::exceptions::PyFileExistsError::new_err(format!(
            "{}: already there and not an empty folder: choose another, or go on with its run: \
             pixelcnn.resume",
            run.display()
        ))),
        Err(error) => Err(errors::of(error)),
    }
}

/// Trains a model in a new folder; `settings` are JSON.
#[pyfunction]
pub fn train(
    py: Python<'_>,
    run: PathBuf,
    data: &str,
    preset: &str,
    settings: &str,
    device: &str,
    hear: &Bound<'_, PyAny>,
) -> PyResult<Model> {
    let device = device::parse(device).map_err(errors::value)?;
    let mut chosen = Settings::preset(preset).map_err(errors::of)?;
    data.clone_into(&mut chosen.data.data);
    for (name, value) in parsed(settings)? {
        chosen.set(&name, value).map_err(errors::of)?;
    }
    chosen.data.make_absolute();
    chosen.validate().map_err(errors::of)?;
    chosen.data.codes = chosen.model([4, 4, 1, 0]).nr_code_maps();
    let (train, test) = open(py, &chosen.data)?;
    let mut config = chosen.run(&train).map_err(errors::of)?;
    let free = device.free_shards(&config.model, config.train.batch_size);
    config.train.shards.get_or_insert(free);
    go(py, run, config, None, (train, test), device, hear)
}

/// Goes on with a run; `settings` are JSON.
#[pyfunction]
pub fn resume(
    py: Python<'_>,
    run: PathBuf,
    settings: &str,
    device: &str,
    hear: &Bound<'_, PyAny>,
) -> PyResult<Model> {
    let device = device::parse(device).map_err(errors::value)?;
    let (begun, mut start) = match Checkpoints::new(run.join("checkpoints")).list() {
        // Stopped before anything was saved: from the beginning is where it was.
        Ok(none) if none.is_empty() => (RunConfig::read(&run).map_err(errors::of)?.config, None),
        _ => {
            let opened = Run::open(&run).map_err(errors::of)?;
            let config = opened.config.ok_or_else(|| {
                errors::value(format!("{}: not the folder of a run", run.display()))
            })?;
            (config, Some(opened.state))
        }
    };
    let mut config = begun.clone();
    for (name, value) in parsed(settings)? {
        config.set(&name, value).map_err(errors::of)?;
    }
    config.data.make_absolute();
    for Difference { name, there, .. } in config.differences(&begun) {
        if !begun.can_change(&name) {
            return Err(errors::value(format!(
                "{name}: the run was begun with {there}, which cannot be changed: leave {name} out or begin \
                 a new run"
            )));
        }
        if let Some(state) = &mut start {
            match &name[..] {
                "learning_rate" => state.learning_rate = config.train.learning_rate,
                "hours" => state.last_step = None,
                _ => {}
            }
        }
    }
    config.validate().map_err(errors::of)?;
    if config.data.is_gone() {
        return Err(errors::value(format!(
            "{}: the run's images are not there: give data, the place where they are now",
            config.data.data
        )));
    }
    let data = open(py, &config.data)?;
    go(py, run, config, start, data, device, hear)
}

/// Settings and their values.
fn parsed(settings: &str) -> PyResult<serde_json::Map<String, serde_json::Value>> {
    serde_json::from_str(settings).map_err(errors::value)
}

fn open(py: Python<'_>, data: &DataConfig) -> PyResult<(Dataset, Dataset)> {
    crate::work::work(py, |stop| {
        let mut listener = |_| stop.flow();
        Dataset::open_splits_with(data, &mut listener).map_err(errors::of)
    })?
}

fn go(
    py: Python<'_>,
    run: PathBuf,
    config: RunConfig,
    start: Option<TrainState>,
    (train, test): (Dataset, Dataset),
    device: Device,
    hear: &Bound<'_, PyAny>,
) -> PyResult<Model> {
    let mut outcome = None;
    let raised = work_and_tell(
        py,
        |stop, tell| {
            let training = Training {
                folder: &run,
                config: &config,
                images: &train,
                test: &test,
                device,
                ranks: None,
            };
            let mut observer = |event| match stop.flow() {
                ControlFlow::Continue(()) => tell(event),
                stopped => stopped,
            };
            outcome = Some(match start {
                None => training.begin(&mut observer),
                Some(state) => training.resume(state, &mut observer),
            });
        },
        |py, event| {
            let Some(event) = told(py, event)? else {
                return Ok(ControlFlow::Continue(()));
            };
            Ok(match hear.call1((event,))?.is_truthy()? {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        },
    );
    match outcome {
        // What could not be saved is more than what was raised.
        Some(Err(error)) => Err(failed(error, &run)),
        Some(Ok(Outcome::Finished | Outcome::Stopped)) => {
            raised?;
            of_run(run, device)
        }
        None => Err(raised
            .err()
            .unwrap_or_else(|| errors::value("the training was lost"))),
    }
}

fn failed(error: TrainError, run: &Path) -> PyErr {
    match error {
        TrainError::Saved { .. } | TrainError::Lost { .. } => errors::value(format!(
            "{error}: to go on: pixelcnn.resume({:?})",
            run.display().to_string()
        )),
        TrainError::Checkpoint(CheckpointError::Locked { .. }) => errors::value(error),
        error => errors::of(error),
    }
}

/// An event as Python is told of it; nothing of those that no one waits for.
fn told(py: Python<'_>, event: Event) -> PyResult<Option<Bound<'_, PyDict>>> {
    let dict = PyDict::new(py);
    let name = match event {
        Event::Started {
            step,
            last_step,
            steps_per_epoch,
        } => {
            dict.set_item("step", step)?;
            dict.set_item("last_step", last_step)?;
            dict.set_item("steps_per_epoch", steps_per_epoch)?;
            "started"
        }
        Event::Step {
            step,
            epoch,
            bits_per_dim,
            learning_rate,
            seconds,
            last_step,
        } => {
            dict.set_item("step", step)?;
            dict.set_item("epoch", epoch)?;
            dict.set_item("bits_per_dim", bits_per_dim)?;
            dict.set_item("learning_rate", learning_rate)?;
            dict.set_item("seconds", seconds)?;
            dict.set_item("last_step", last_step)?;
            "step"
        }
        Event::Evaluated {
            step,
            epoch,
            bits_per_dim,
            standard_error,
            best,
        } => {
            dict.set_item("step", step)?;
            dict.set_item("epoch", epoch)?;
            dict.set_item("bits_per_dim", bits_per_dim)?;
            dict.set_item("standard_error", standard_error)?;
            dict.set_item("best", best)?;
            "evaluated"
        }
        Event::Sampled { path } => {
            dict.set_item("path", path)?;
            "sampled"
        }
        Event::Saved { step, path } => {
            dict.set_item("step", step)?;
            dict.set_item("path", path)?;
            "saved"
        }
        Event::MetricsDamaged(damaged) => {
            dict.set_item("lines", damaged.lines)?;
            dict.set_item("path", damaged.original)?;
            "metrics_damaged"
        }
        // Of images evaluated and pixels drawn so far.
        _ => return Ok(None),
    };
    dict.set_item("event", name)?;
    Ok(Some(dict))
}
