//! How a training run goes, as JSON lines and as TensorBoard events in its folder.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tensorboard::{EventFile, Image, Value};
use crate::atomic;
use crate::picture::{self, Grid, PictureError};

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

impl Record {
    /// Optimizer steps taken.
    pub fn step(&self) -> u64 {
        match *self {
            Record::Train { step, .. } | Record::Test { step, .. } => step,
        }
    }
}

/// Why metrics can't be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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

/// What a run has recorded so far.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Recorded {
    /// In the order of the steps.
    pub records: Vec<Record>,
    /// Lines of `metrics.jsonl`, from 1, that are damaged and left out.
    pub damaged: Vec<usize>,
}

/// Reads what a run has recorded so far. A line that is just being written is left out.
///
/// # Errors
/// [`MetricsError::Read`].
pub fn read(run_folder: &Path) -> Result<Recorded, MetricsError> {
    let path = run_folder.join(LINES);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(MetricsError::Read { path, source }),
    };
    let mut recorded = Recorded::default();
    let mut lines = (1..).zip(text.split(|&byte| byte == b'\n')).peekable();
    while let Some((number, line)) = lines.next() {
        match serde_json::from_slice(line) {
            Ok(record) => recorded.records.push(record),
            Err(_) if line.is_empty() || lines.peek().is_none() => {}
            Err(_) => recorded.damaged.push(number),
        }
    }
    Ok(recorded)
}

/// The records of a run, in its folder.
const LINES: &str = "metrics.jsonl";

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
    /// Whether the record of the training that is due after that step, if one is, is written.
    pub recorded: bool,
    /// Whether the evaluation after that step, if one is due, is done.
    pub evaluated: bool,
}

/// Lines that had to be left out of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Their numbers, from 1.
    pub lines: Vec<usize>,
    /// A copy of the file as it was.
    pub original: PathBuf,
}

impl Metrics {
    /// Begins the metrics of a run that starts anew (none) or goes on: then what was recorded up to
    /// there stays, and the rest, which the run is about to record again, is dropped. Damaged lines
    /// are left out, after the file has been copied.
    ///
    /// # Errors
    /// [`MetricsError::Write`], after which the earlier lines are still there.
    pub fn open(
        run_folder: &Path,
        resume_at: Option<ResumeAt>,
    ) -> Result<(Metrics, Option<Damaged>), MetricsError> {
        let path = run_folder.join(LINES);
        fs::create_dir_all(run_folder).map_err(writing(run_folder))?;
        let text = match (resume_at, fs::read(&path)) {
            (None, _) => Vec::new(),
            (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            (_, text) => text.map_err(|source| MetricsError::Read {
                path: path.clone(),
                source,
            })?,
        };
        let (kept, lines) = match resume_at {
            Some(resume_at) => resume_at.keep(&text),
            None => Default::default(),
        };
        let damaged = match lines.is_empty() {
            true => None,
            false => Some(Damaged {
                lines,
                original: keep_beside(&path, &text).map_err(writing(&path))?,
            }),
        };
        atomic::write(&path, |w| {
            for line in kept {
                w.write_all(line)?;
                w.write_all(b"\n")?;
            }
            Ok(())
        })
        .map_err(writing(&path))?;
        let lines = File::options().append(true).open(&path);
        let first_step = resume_at.map_or(0, |at| at.step.saturating_add(1));
        let metrics = Metrics {
            lines: lines.map_err(writing(&path))?,
            path,
            events: EventFile::create(run_folder, first_step).map_err(writing(run_folder))?,
        };
        Ok((metrics, damaged))
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
    pub fn samples(&mut self, step: u64, picture: &Grid) -> Result<(), MetricsError> {
        let image = Image {
            height: picture.height as i32,
            width: picture.width as i32,
            colorspace: picture.channels as i32,
            encoded_image_string: picture::encode_png(picture)?,
        };
        self.summary(step, vec![("samples", Value::Image(image))])
    }

    /// Makes all that was written so far outlive a power cut.
    ///
    /// # Errors
    /// [`MetricsError::Write`].
    pub fn sync(&self) -> Result<(), MetricsError> {
        self.lines.sync_data().map_err(writing(&self.path))?;
        self.events.sync().map_err(writing(&self.events.path))
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

impl ResumeAt {
    /// The lines that stay, and the numbers of those that are lost: neither readable nor about to be
    /// recorded again.
    fn keep<'a>(&self, text: &'a [u8]) -> (Vec<&'a [u8]>, Vec<usize>) {
        let (mut kept, mut damaged, mut again) = (Vec::new(), Vec::new(), Vec::new());
        for (number, line) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let record = serde_json::from_slice::<Record>(line).ok();
            let step = record.map_or_else(|| step_of(line), |record| Some(record.step()));
            if let Some(step) = step {
                // Lines are in the order of their steps: a later one above this has a false one.
                let false_steps = again.extract_if(.., |(_, later)| *later > step);
                damaged.extend(false_steps.map(|(number, _)| number));
            }
            match (record, step) {
                _ if line.is_empty() => {}
                (Some(record), _) if self.has(&record) => kept.push(line),
                (Some(record), _) => again.push((number, record.step())),
                // Cut off while it was written.
                (None, Some(step)) if self.comes_again(step) => again.push((number, step)),
                (None, _) => damaged.push(number),
            }
        }
        damaged.sort_unstable();
        (kept, damaged)
    }

    /// Whether a record is one of those up to here.
    fn has(&self, record: &Record) -> bool {
        let (step, done) = match *record {
            Record::Train { step, .. } => (step, self.recorded),
            Record::Test { step, .. } => (step, self.evaluated),
        };
        step < self.step || step == self.step && done
    }

    /// Whether a record of this step, of either kind, may be about to be made again.
    fn comes_again(&self, step: u64) -> bool {
        step > self.step || step == self.step && !(self.recorded && self.evaluated)
    }
}

/// The step of a line that is not whole, as far as it is there.
fn step_of(line: &[u8]) -> Option<u64> {
    let rest = line.strip_prefix(br#"{"step":"#)?;
    let digits = rest.iter().position(|&byte| byte == b',')?;
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// Copies a file, whose contents are `text`, to the first name of its kind that is free.
fn keep_beside(path: &Path, text: &[u8]) -> io::Result<PathBuf> {
    let mut number = 1;
    loop {
        let copy = match number {
            1 => path.with_extension("jsonl.damaged"),
            _ => path.with_extension(format!("jsonl.damaged-{number}")),
        };
        match fs::read(&copy) {
            Ok(same) if same == text => return Ok(copy),
            Ok(_) => number += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                atomic::write(&copy, |w| w.write_all(text))?;
                return Ok(copy);
            }
            Err(error) => return Err(error),
        }
    }
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
        Some(ResumeAt {
            step,
            recorded: true,
            evaluated,
        })
    }

    /// Opens the metrics of a run of which no line is damaged.
    fn open(run: &Path, resume_at: Option<ResumeAt>) -> Metrics {
        let (metrics, damaged) = Metrics::open(run, resume_at).unwrap();
        assert_eq!(damaged, None);
        metrics
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
        let mut metrics = open(&run, None);
        for record in [train(1), train(2), test(2), train(3)] {
            metrics.record(&record).unwrap();
        }
        // Killed while it wrote the next line.
        metrics.lines.write_all(br#"{"step":4,"epo"#).unwrap();
        let recorded = read(&run).unwrap();
        assert_eq!(recorded.records, [train(1), train(2), test(2), train(3)]);
        assert_eq!(recorded.damaged, [0; 0]);
        drop(metrics);

        // Killed between the evaluation's record and the checkpoint that knows of it.
        drop(open(&run, at(3, false)));
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);
        drop(open(&run, at(2, true)));
        assert_eq!(records(&run), [train(1), train(2), test(2)]);
        let mut metrics = open(&run, at(2, false));
        assert_eq!(records(&run), [train(1), train(2)]);
        metrics.record(&test(2)).unwrap();
        metrics.record(&train(3)).unwrap();
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);
        drop(metrics);

        // The disk was full when the training of step 3 was to be recorded.
        let unrecorded = Some(ResumeAt {
            step: 3,
            recorded: false,
            evaluated: false,
        });
        drop(open(&run, unrecorded));
        let mut metrics = open(&run, unrecorded);
        assert_eq!(records(&run), [train(1), train(2), test(2)]);
        metrics.record(&train(3)).unwrap();
        drop(metrics);

        // Cut off just before the end of the line: the record is whole.
        let path = run.join("metrics.jsonl");
        let mut text = fs::read(&path).unwrap();
        text.pop();
        text.splice(0..0, *b"\n\n");
        fs::write(&path, text).unwrap();
        drop(open(&run, at(u64::MAX, true)));
        assert_eq!(records(&run), [train(1), train(2), test(2), train(3)]);

        drop(open(&run, None));
        assert_eq!(records(&run), []);
        let starts: Vec<_> = event_files(&run)
            .iter()
            .map(|path| events(&fs::read(path).unwrap()).swap_remove(1).step)
            .collect();
        assert_eq!(starts, [0, 4, 3, 3, 4, 4, i64::MAX, 0]);
    }

    #[test]
    fn damaged_lines_are_named_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path();
        let mut metrics = open(run, None);
        for step in 1..=6 {
            metrics.record(&train(step)).unwrap();
        }
        drop(metrics);
        let path = run.join("metrics.jsonl");
        let whole = fs::read(&path).unwrap();
        let ends: Vec<_> = (0..whole.len()).filter(|&at| whole[at] == b'\n').collect();
        // The run goes on from step 5. What is lost is told, whatever bit of whatever line is not
        // as it was, unless the line is still one of an earlier step.
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut text = whole.clone();
                text[at] ^= 1 << bit;
                let (kept, damaged) = ResumeAt {
                    step: 5,
                    recorded: true,
                    evaluated: true,
                }
                .keep(&text);
                let line = 1 + ends.iter().filter(|&&end| end < at).count();
                let lost = kept.len() < 5;
                assert!(!lost || damaged.contains(&line), "{at}: {damaged:?}");
            }
        }

        let mut text = whole.clone();
        text[ends[0] + 1] = b'?';
        text.truncate(ends[4] - 3);
        fs::write(&path, &text).unwrap();
        let recorded = read(run).unwrap();
        assert_eq!(recorded.records, [train(1), train(3), train(4)]);
        assert_eq!(recorded.damaged, [2]);
        for _ in 0..2 {
            // The second time as after a kill between the copy and the new file.
            fs::write(&path, &text).unwrap();
            let (_, damaged) = Metrics::open(run, at(5, true)).unwrap();
            let original = run.join("metrics.jsonl.damaged");
            assert_eq!(fs::read(&original).unwrap(), text);
            let lines = vec![2, 5];
            assert_eq!(damaged, Some(Damaged { lines, original }));
            assert_eq!(records(run), [train(1), train(3), train(4)]);
        }
        fs::write(&path, b"other").unwrap();
        let (_, damaged) = Metrics::open(run, at(5, true)).unwrap();
        let original = run.join("metrics.jsonl.damaged-2");
        assert_eq!(fs::read(&original).unwrap(), b"other");
        assert_eq!(damaged.unwrap().original, original);
    }

    #[test]
    fn events_say_what_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let mut metrics = open(folder.path(), at(6, true));
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
