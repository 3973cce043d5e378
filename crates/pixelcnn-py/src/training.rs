//! Training, told to Python as it goes.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use pixelcnn::ModelConfig;
use pixelcnn::data::{DataConfig, Dataset, Opening};
use pixelcnn::device::{self, Device};
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::resume::{self as going_on, Resumed};
use pixelcnn::train::settings::{ModelSettings, Settings};
use pixelcnn::train::state::TrainState;
use pixelcnn::train::{Event, Outcome, TrainError, Training, folder};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors;
use crate::model::Model;
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

/// Settings of a new run, as far as they don't hang on its images; with the shape of the model that it begins with.
fn chosen(preset: &str, settings: &str, model: Option<&Model>) -> PyResult<Settings> {
    let mut chosen = Settings::preset(preset).map_err(errors::of)?;
    if let Some(model) = model {
        chosen.model = ModelSettings::of(&model.model.config);
    }
    for (name, value) in parsed(settings)? {
        chosen.set(&name, value).map_err(errors::of)?;
    }
    chosen.validate().map_err(errors::of)?;
    Ok(chosen)
}

/// Checks settings before anything is written.
#[pyfunction]
pub fn expect_settings(
    preset: &str,
    settings: &str,
    init_from: Option<PyRef<'_, Model>>,
    device: &str,
) -> PyResult<()> {
    device::parse(device).map_err(errors::value)?;
    chosen(preset, settings, init_from.as_deref()).map(|_| ())
}

/// Trains a model in a new folder; `settings` are JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn train(
    py: Python<'_>,
    run: PathBuf,
    data: &str,
    preset: &str,
    settings: &str,
    init_from: Option<PyRef<'_, Model>>,
    device: &str,
    hear: &Bound<'_, PyAny>,
) -> PyResult<Model> {
    let device = device::parse(device).map_err(errors::value)?;
    let mut chosen = chosen(preset, settings, init_from.as_deref())?;
    data.clone_into(&mut chosen.data.data);
    chosen.data.make_absolute();
    chosen.data.codes = chosen.model([4, 4, 1, 0]).nr_code_maps();
    let (train, test) = open(py, &chosen.data, hear)?;
    let mut config = chosen.run(&train).map_err(errors::of)?;
    let free = device.free_shards(&config.model, config.train.batch_size);
    config.train.shards.get_or_insert(free);
    let model = init_from.as_deref().map(|model| &model.model);
    let first = py.detach(|| {
        let first = model.map(|model| TrainState::of_model(model.clone(), &config, &train));
        first.transpose()
    });
    let first = first.map_err(|error| errors::value(format!("init_from: {error}")))?;
    go(py, run, config, (first, None), (train, test), device, hear)
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
    let settings = parsed(settings)?;
    let mut start = going_on::newest(&run).map_err(errors::of)?;
    // What can't be set at all is found before what can't be changed.
    let default = RunConfig {
        model: ModelConfig::default(),
        data: DataConfig::default(),
        train: TrainConfig::default(),
    };
    let mut asked = default;
    for (name, value) in &settings {
        asked.set(name, value).map_err(errors::of)?;
    }
    let change = |config: &mut RunConfig| {
        if settings.contains_key("epochs") || settings.contains_key("steps") {
            config.train.hours = 0.0;
        }
        for (name, value) in &settings {
            // It was set already, in another one.
            let _ = config.set(name, value);
        }
        config.data.make_absolute();
    };
    let rate = settings.contains_key("learning_rate");
    let rate = rate.then_some(asked.train.learning_rate);
    let resumed = going_on::resume(&run, start.as_mut(), &change, rate);
    let Resumed { config, missing } = resumed.map_err(errors::of)?;
    if let Some(path) = missing {
        let note = format!("{} is missing: it is written again", path.display());
        let _ = noted(hear, note)?;
    }
    let data = open(py, &config.data, hear)?;
    go(py, run, config, (None, start), data, device, hear)
}

/// Settings and their values.
fn parsed(settings: &str) -> PyResult<serde_json::Map<String, serde_json::Value>> {
    serde_json::from_str(settings).map_err(errors::value)
}

/// Tells something in one line.
fn noted(hear: &Bound<'_, PyAny>, text: String) -> PyResult<ControlFlow<()>> {
    let event = PyDict::new(hear.py());
    event.set_item("event", "note")?;
    event.set_item("text", text)?;
    call(hear, event)
}

/// Calls what listens, which may stop it all.
fn call(hear: &Bound<'_, PyAny>, event: Bound<'_, PyDict>) -> PyResult<ControlFlow<()>> {
    Ok(match hear.call1((event,))?.is_truthy()? {
        true => ControlFlow::Continue(()),
        false => ControlFlow::Break(()),
    })
}

/// Opens training and test images, and tells what that is doing.
fn open(
    py: Python<'_>,
    data: &DataConfig,
    hear: &Bound<'_, PyAny>,
) -> PyResult<(Dataset, Dataset)> {
    // Both splits may have the same to tell.
    let mut told = HashSet::new();
    work_and_tell(
        py,
        |stop, tell| {
            let mut listener = |opening| match stop.flow() {
                ControlFlow::Continue(()) => tell(opening),
                stopped => stopped,
            };
            Dataset::open_splits_with(data, &mut listener).map_err(errors::of)
        },
        |py, opening| match opening {
            Opening::Note(text) if told.insert(text.clone()) => noted(hear, text),
            Opening::Downloading { what, done, total } => {
                let event = PyDict::new(py);
                event.set_item("event", "downloading")?;
                event.set_item("what", what)?;
                event.set_item("done", done)?;
                event.set_item("total", total)?;
                call(hear, event)
            }
            _ => Ok(ControlFlow::Continue(())),
        },
    )?
}

/// Trains: with a first state where a run begins with one, or from the one where it stopped.
#[allow(clippy::too_many_arguments)]
fn go(
    py: Python<'_>,
    run: PathBuf,
    config: RunConfig,
    start: (Option<TrainState>, Option<TrainState>),
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
                (_, Some(state)) => training.resume(state, &mut observer),
                (Some(first), None) => training.begin_with(first, &mut observer),
                (None, None) => training.begin(&mut observer),
            });
        },
        |py, event| match told(py, event)? {
            Some(event) => call(hear, event),
            None => Ok(ControlFlow::Continue(())),
        },
    );
    match outcome {
        // What could not be saved is more than what was raised.
        Some(Err(error)) => Err(failed(error, &run)),
        Some(Ok(Outcome::Finished | Outcome::Stopped)) => {
            raised?;
            let model = pixelcnn::Model::open(&run).map_err(errors::of)?;
            Ok(Model::new(model, device, Some(run)))
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
