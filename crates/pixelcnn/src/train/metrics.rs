//! How a training run goes, as JSON lines and as TensorBoard events in its folder.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use image::DynamicImage;
use serde::{Deserialize, Serialize};

use super::tensorboard::{EventFile, Image, Value};
use crate::atomic;
use crate::picture::{self, PictureError};

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Record {
    /// Of the training itself, averaged since the last such record.
    Train {
        /// Optimizer steps taken.
        step: u64,
        /// Whole passes over the data done.
        epoch: u64,
        /// Loss on the training data, with dropout and the parameters of the moment.
        train_bits_per_dim: f64,
        /// Learning rate of the last step.
        learning_rate: f64,
        /// Training images a second.
        images_per_second: f64,
        /// Seconds of training since the run began.
        seconds: f64,
    },
    /// Of an evaluation on the whole test set with the averaged parameters.
    Test {
        /// Optimizer steps taken.
        step: u64,
        /// Whole passes over the data done.
        epoch: u64,
        /// Mean over the test set.
        test_bits_per_dim: f64,
        /// Of that mean.
        standard_error: f64,
        /// Seconds of training since the run began.
        seconds: f64,
    },
}

/// Why metrics can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refuses.
    #[error("cannot write `{path}`: {source}: make room or choose another folder, then resume")]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// The file system refuses to read.
    #[error("cannot read `{path}`: {source}: name the folder of a run")]
    Read {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// A picture can't be encoded.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

/// What a run has recorded so far, in the order of its steps. A line that is just being written is
/// left out.
///
/// # Errors
/// [`MetricsError::Read`].
pub fn read(run_folder: &Path) -> Result<Vec<Record>, MetricsError> {
    let path = run_folder.join("metrics.jsonl");
    match fs::read(&path) {
        Ok(lines) => Ok(lines
            .split(|&byte| byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect()),
        Err(source) => Err(MetricsError::Read { path, source }),
    }
}

/// The metrics of one run: `metrics.jsonl` and `events.out.tfevents.*` in its folder.
pub struct Metrics {
    lines: File,
    path: PathBuf,
    events: EventFile,
}

/// Where a run goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeAt {
    /// Optimizer steps taken.
    pub step: u64,
    /// Whether the evaluation after that step, if one is due, is done.
    pub evaluated: bool,
}

impl Metrics {
    /// Begins the metrics of a run that starts anew (none) or goes on: then what was recorded up to
    /// there stays, and the rest, which the run is about to record again, is dropped. A last line
    /// that was cut off is dropped too.
    ///
    /// # Errors
    /// [`MetricsError::Write`], after which the earlier lines are still there.
    pub fn open(run_folder: &Path, resume_at: Option<ResumeAt>) -> Result<Metrics, MetricsError> {
        let path = run_folder.join("metrics.jsonl");
        fs::create_dir_all(run_folder).map_err(writing(run_folder))?;
        atomic::remove_leftovers(run_folder).map_err(writing(run_folder))?;
        atomic::write(&path, |w| match resume_at {
            Some(resume_at) => copy_until(resume_at, &path, w),
            None => Ok(()),
        })
        .map_err(writing(&path))?;
        let lines = File::options().append(true).open(&path);
        let first_step = resume_at.map_or(0, |at| at.step.saturating_add(1));
        Ok(Metrics {
            lines: lines.map_err(writing(&path))?,
            path,
            events: EventFile::create(run_folder, first_step).map_err(writing(run_folder))?,
        })
    }

    /// Writes a record; it is in both files when this returns.
    ///
    /// # Errors
    /// [`MetricsError::Write`].
    pub fn record(&mut self, record: &Record) -> Result<(), MetricsError> {
        let mut line = serde_json::to_vec(record)
            .map_err(io::Error::from)
            .map_err(writing(&self.path))?;
        line.push(b'\n');
        self.lines.write_all(&line).map_err(writing(&self.path))?;

        let scalar = |tag, value: f64| (tag, Value::SimpleValue(value as f32));
        let (step, values) = match *record {
            Record::Train {
                step,
                train_bits_per_dim,
                learning_rate,
                images_per_second,
                ..
            } => {
                let values = vec![
                    scalar("bits_per_dim/train", train_bits_per_dim),
                    scalar("learning_rate", learning_rate),
                    scalar("images_per_second", images_per_second),
                ];
                (step, values)
            }
            Record::Test {
                step,
                test_bits_per_dim,
                ..
            } => (step, vec![scalar("bits_per_dim/test", test_bits_per_dim)]),
        };
        self.summary(step, values)
    }

    /// Shows a picture of samples in TensorBoard.
    ///
    /// # Errors
    /// [`MetricsError::Picture`], [`MetricsError::Write`].
    pub fn samples(&mut self, step: u64, picture: &DynamicImage) -> Result<(), MetricsError> {
        let image = Image {
            height: picture.height().try_into().unwrap_or(i32::MAX),
            width: picture.width().try_into().unwrap_or(i32::MAX),
            colorspace: picture.color().channel_count().into(),
            encoded_image_string: picture::encode_png(picture)?,
        };
        self.summary(step, vec![("samples", Value::Image(image))])
    }

    fn summary(
        &mut self,
        step: u64,
        values: Vec<(&'static str, Value)>,
    ) -> Result<(), MetricsError> {
        let written = self.events.summary(step, values);
        written.map_err(writing(&self.events.path))
    }
}

/// Copies the lines at `path` that are not about to be recorded again.
fn copy_until(resume_at: ResumeAt, path: &Path, w: &mut dyn Write) -> io::Result<()> {
    /// What every line has.
    #[derive(Deserialize)]
    struct Line {
        step: u64,
        test_bits_per_dim: Option<serde::de::IgnoredAny>,
    }
    let stays = |line: Line| {
        let again = line.test_bits_per_dim.is_some() && !resume_at.evaluated;
        line.step < resume_at.step || line.step == resume_at.step && !again
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        let parsed = serde_json::from_slice(&line);
        if parsed.is_ok_and(stays) {
            w.write_all(&line)?;
            w.write_all(b"\n")?;
        }
    }
    Ok(())
}

fn writing(path: &Path) -> impl Fn(io::Error) -> MetricsError {
    let path = path.to_owned();
    move |source| MetricsError::Write {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tensorboard::tests::events;
    use super::super::tensorboard::{SessionLog, What};
    use super::*;

    fn at(step: u64, evaluated: bool) -> Option<ResumeAt> {
        Some(ResumeAt { step, evaluated })
    }

    fn train(step: u64) -> Record {
        Record::Train {
            step,
            epoch: 0,
            train_bits_per_dim: 1.0 / 3.0,
            learning_rate: 1e-3,
            images_per_second: 12.5,
            seconds: step as f64,
        }
    }

    fn test(step: u64) -> Record {
        Record::Test {
            step,
            epoch: 1,
            test_bits_per_dim: 2.92,
            standard_error: 0.01,
            seconds: 1e9,
        }
    }

    fn records(folder: &Path) -> Vec<Record> {
        let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        let lines = text.lines();
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn event_files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.to_string_lossy().contains("tfevents"));
        paths.sort();
        paths
    }

    #[test]
    fn a_resumed_run_records_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let mut metrics = Metrics::open(&run, None).unwrap();
        for record in [train(1), train(2), test(2), train(3)] {
            metrics.record(&record).unwrap();
        }
        // Killed while it wrote the next line.
        metrics.lines.write_all(br#"{"step":1,"epo"#).unwrap();
        assert_eq!(read(&run).unwrap(), [train(1), train(2), test(2), train(3)]);
        drop(metrics);

        // Killed between the evaluation's record and the checkpoint that knows of it.
        drop(Metrics::open(&run, at(3, false)).unwrap());
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);
        drop(Metrics::open(&run, at(2, true)).unwrap());
        assert_eq!(records(&run), [train(1), train(2), test(2)]);
        let mut metrics = Metrics::open(&run, at(2, false)).unwrap();
        assert_eq!(records(&run), [train(1), train(2)]);
        metrics.record(&test(2)).unwrap();
        metrics.record(&train(3)).unwrap();
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);
        drop(metrics);

        // Cut off just before the end of the line: the record is whole.
        let path = run.join("metrics.jsonl");
        let mut text = fs::read(&path).unwrap();
        text.pop();
        text.splice(0..0, *b"\xff\n\n");
        fs::write(&path, text).unwrap();
        let metrics = Metrics::open(&run, at(u64::MAX, true)).unwrap();
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);
        drop(metrics);

        Metrics::open(&run, None).unwrap();
        assert_eq!(records(&run), []);
        let starts: Vec<_> = event_files(&run)
            .iter()
            .map(|path| events(&fs::read(path).unwrap()).swap_remove(1).step)
            .collect();
        assert_eq!(starts, [0, 4, 3, 3, i64::MAX, 0]);
    }

    #[test]
    fn events_say_what_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::open(folder.path(), at(6, true)).unwrap();
        let pixels: Vec<u8> = (0..48).collect();
        let picture = picture::grid(&pixels, [2, 4, 2, 3], 2, 1, 1).unwrap();
        metrics.record(&train(7)).unwrap();
        metrics.record(&test(7)).unwrap();
        metrics.samples(8, &picture).unwrap();

        let events = events(&fs::read(&event_files(folder.path())[0]).unwrap());
        let start = SessionLog { status: 1 };
        assert_eq!(events.len(), 5);
        assert_eq!(
            events[0].what,
            Some(What::FileVersion("brain.Event:2".into()))
        );
        assert_eq!(events[1].what, Some(What::SessionLog(start)));
        let steps: Vec<_> = events.iter().map(|event| event.step).collect();
        assert_eq!(steps, [0, 7, 7, 7, 8]);
        assert!(events.iter().all(|event| event.wall_time > 1.6e9));

        let values = |event: usize| match &events[event].what {
            Some(What::Summary(summary)) => summary
                .value
                .iter()
                .map(|value| (value.tag.as_str(), value.value.clone().unwrap()))
                .collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            values(2),
            [
                ("bits_per_dim/train", Value::SimpleValue(1.0 / 3.0)),
                ("learning_rate", Value::SimpleValue(1e-3)),
                ("images_per_second", Value::SimpleValue(12.5)),
            ]
        );
        assert_eq!(values(3), [("bits_per_dim/test", Value::SimpleValue(2.92))]);
        let image = Image {
            height: 4,
            width: 5,
            colorspace: 3,
            encoded_image_string: picture::encode_png(&picture).unwrap(),
        };
        assert_eq!(values(4), [("samples", Value::Image(image))]);
    }
}
