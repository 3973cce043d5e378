//! What is done at the end of an epoch: the evaluation and the samples.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::checkpoints::Checkpoints;
use super::metrics::{Metrics, Record};
use super::ranks::{evaluate_together, sample_together};
use super::step::Trainer;
use super::{Event, Observer, TrainError};
use crate::data::{CodeMaps, Dataset};
use crate::device::Device;
use crate::picture::{self, PictureError};

/// What is done at the end of an epoch, with the averaged parameters.
pub(super) struct Review<'a> {
    pub run: &'a Path,
    pub device: Device,
    pub test: &'a Dataset,
    pub last: bool,
    pub checkpoints: &'a Checkpoints,
    pub metrics: &'a mut Metrics,
}

impl Review<'_> {
    pub fn of(
        &mut self,
        trainer: &mut Trainer,
        observer: &mut Observer,
    ) -> Result<ControlFlow<()>, TrainError> {
        let config = trainer.config;
        trainer.state()?;
        let epoch = trainer.state.epoch;
        let due = |interval| self.last || epoch.is_multiple_of(interval);

        if due(config.train.eval_interval) && !trainer.state.is_evaluated() {
            let total = self.test.len();
            let mut progress = |done: usize| {
                let done = done.min(total);
                observer(Event::Evaluating { done, total })
            };
            let size = self.device.images_at_a_time();
            let evaluation = evaluate_together(trainer, self.test, size, &mut progress);
            let evaluation = match evaluation {
                // Another rank may have been told to stop before.
                Err(_) if progress(0).is_break() => return Ok(ControlFlow::Break(())),
                evaluation => evaluation?,
            };
            let state = &mut trainer.state;
            let bits_per_dim = evaluation.mean();
            let best = state.best.is_none_or(|(_, best)| bits_per_dim < best);
            let before = (state.last_evaluation, state.best);
            state.last_evaluation = Some((state.step, bits_per_dim));
            if best {
                state.best = state.last_evaluation;
            }
            let event = Event::Evaluated {
                step: state.step,
                epoch: state.epoch,
                bits_per_dim,
                standard_error: evaluation.standard_error(),
                best,
            };
            let record = Record::Test {
                step: state.step,
                epoch: state.epoch,
                test_bits_per_dim: bits_per_dim,
                standard_error: evaluation.standard_error(),
                seconds: state.seconds,
            };
            let recorded = self.metrics.record(&record).map_err(TrainError::from);
            let kept = recorded.and_then(|()| match best {
                true => Ok(self.checkpoints.save_best(state).map(drop)?),
                false => Ok(()),
            });
            if let Err(error) = kept {
                // The run goes on with the evaluation once more.
                (state.last_evaluation, state.best) = before;
                return Err(error);
            }
            if observer(event).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }

        let step = trainer.state.step;
        let kind = match config.model.nr_codes {
            0 => "png",
            _ => "npy",
        };
        let path = samples_of(step, self.run).with_extension(kind);
        let newest = self.run.join("samples").with_extension(kind);
        let done = || {
            let contents = std::fs::read(&path).ok();
            contents.is_some() && contents == std::fs::read(&newest).ok()
        };
        if due(config.train.save_interval) && config.train.samples > 0 && !done() {
            let images = config.train.samples;
            let model = &config.model;
            let shape = [images, model.height, model.width, model.channels];
            let columns = images.isqrt().max(1);
            let total = images * model.height * model.width;
            let count = trainer.ranks.count();
            let mut progress = |done: usize| {
                let done = (done * count).min(total);
                observer(Event::Sampling { done, total })
            };
            let drawn = sample_together(trainer, &self.device, self.test, &mut progress);
            let images = match drawn {
                Err(_) if progress(0).is_break() => return Ok(ControlFlow::Break(())),
                images => images?,
            };
            let folder = self.run.join("samples");
            std::fs::create_dir_all(&folder).map_err(|source| PictureError::Write {
                path: folder,
                source,
            })?;
            // The numbered one last: once it is there, all of it is done.
            if config.model.nr_codes > 0 {
                let maps = CodeMaps::of_images(&config.model, &images);
                maps.write(&newest)?;
                maps.write(&path)?;
            } else {
                let picture = picture::grid(&images, shape, columns, 1, 1)?;
                picture::write_png(&newest, &picture)?;
                self.metrics.samples(step, &picture)?;
                picture::write_png(&path, &picture)?;
            }
            return Ok(observer(Event::Sampled { path: newest }));
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// The file of samples drawn after a step, without its extension.
fn samples_of(step: u64, run: &Path) -> PathBuf {
    run.join(format!("samples/step-{step:08}"))
}

/// Removes the grids of steps that are taken again.
pub(super) fn remove_samples_after(last: u64, run: &Path) -> Result<(), PictureError> {
    let Ok(entries) = std::fs::read_dir(run.join("samples")) else {
        return Ok(());
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let step = name
            .strip_prefix("step-")
            .and_then(|step| step.parse().ok());
        if step.is_some_and(|step: u64| step > last) {
            let failed = |source| PictureError::Write {
                path: path.clone(),
                source,
            };
            std::fs::remove_file(&path).map_err(failed)?;
        }
    }
    Ok(())
}
