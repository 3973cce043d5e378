//! `pixelcnn plot`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pixelcnn::train::config::RunConfig;
use pixelcnn::train::metrics::{self, Record};

use crate::chart::{Chart, Series, Shape};
use crate::drawing::png;
use crate::output::Overwrite;
use crate::terminal::{Result, counted, listed, note, say};

/// A training curve has up to so many points, each the mean of at least so many records.
const POINTS: usize = 100;
const RECORDS: usize = 5;
/// Bits that a training curve may begin above where it ends.
const FALL: f64 = 1.0;
/// Energies may be so many times the one at the end.
const FALL_OF_ENERGY: f64 = 2.0;

/// Draw how runs were trained: bits/dim over time.
///
/// Training batches, with dropout where there is any and the parameters of the moment, as means of
/// as many steps as the legend says; and the test set, with the averaged parameters. Time is that
/// of training steps alone, without pauses, evaluations and samples. The first moments, more than 1
/// bit/dim above the end, are left out; of energies those of more than twice the last one.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Plot {
    /// Run folders, also of runs that are going on
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// PNG file for the picture [default: curve.png, or curve-2.png and so on where that is there]
    #[arg(short, long, value_name = "FILE", value_parser = png)]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn plot runs/quick-1
      its training curve, in curve.png
  pixelcnn plot runs/quick-1 runs/quick-2 -o both.png
      two runs in one picture";

/// Seconds and bits/dim.
type Points = Vec<(f64, f64)>;

impl Plot {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let output = self.overwrite.or_free(&self.output, "curve.png");
        self.overwrite.prepare(&output)?;
        let mut series = Vec::new();
        let mut kinds = Vec::new();
        for run in &self.runs {
            // Runs whose settings are lost are of images, as most are.
            let kind = RunConfig::read(run).map_or("bits/dim", |file| file.config.model.unit());
            if kinds.iter().any(|other| *other != kind) {
                return Err(format!(
                    "{}: {kind} do not go into one picture with {}: plot each kind alone",
                    run.display(),
                    kinds[0]
                )
                .into());
            }
            kinds.push(kind);
            let of = match self.runs.len() {
                1 => String::new(),
                _ => format!("{}: ", name(run)),
            };
            series.extend(curves(run, kind, &of)?);
        }
        if series.iter().all(|(_, points)| points.is_empty()) {
            let runs = self.runs.iter().map(|run| run.display().to_string());
            let runs = runs.collect::<Vec<_>>().join(", ");
            return Err(format!("{runs}: nothing was measured yet: train on").into());
        }
        let seconds = series.iter().flat_map(|(_, points)| points.iter());
        let (unit, length) = unit(seconds.map(|(seconds, _)| *seconds).fold(0.0, f64::max));
        let series = series.into_iter().map(|(label, points)| Series {
            label,
            shape: Shape::Line(points.into_iter().map(|(x, y)| (x / length, y)).collect()),
        });
        let chart = Chart {
            title: match &self.runs[..] {
                [run] => name(run),
                _ => "Training".into(),
            },
            x_label: format!("{unit} of training"),
            y_label: kinds[0].into(),
            series: series.collect(),
        };
        chart.write(&output)?;
        say(output.display())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The run folder's name.
fn name(run: &Path) -> String {
    let name = run.file_name().unwrap_or(run.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The curves of a run in some unit, with their labels.
fn curves(run: &Path, kind: &str, of: &str) -> Result<Vec<(String, Points)>> {
    let (mut train, mut test, mut steps) = (Points::new(), Points::new(), Vec::new());
    let recorded = metrics::read(run)?;
    if !recorded.damaged.is_empty() {
        note(format_args!(
            "{}: without {} of metrics.jsonl ({})",
            run.display(),
            counted(recorded.damaged.len(), "damaged line"),
            listed(&recorded.damaged)
        ));
    }
    for record in recorded.records {
        match record {
            Record::Train {
                step,
                train_bits_per_dim,
                seconds,
                ..
            } => {
                train.push((seconds, train_bits_per_dim));
                steps.push(step);
            }
            Record::Test {
                test_bits_per_dim,
                seconds,
                ..
            } => {
                test.push((seconds, test_bits_per_dim));
            }
        }
    }
    let mut curves = Vec::new();
    let records = RECORDS.max(train.len().div_ceil(POINTS)).min(train.len());
    if !train.is_empty() {
        // Those that are too few for a point of their own are at the beginning, where most is cut.
        let chunks = train
            .rchunks(records)
            .filter(|chunk| chunk.len() == records);
        let means: Points = chunks.rev().map(mean).collect();
        let end = means[means.len() - 1].1;
        let most = match kind {
            "energy" => end * FALL_OF_ENERGY,
            _ => end + FALL,
        };
        let fallen = means.iter().skip_while(|(_, bits)| *bits > most);
        let means = fallen.copied().collect();
        // Records lie a fixed number of steps apart, or more where a run stopped in between.
        let apart = steps.windows(2).map(|pair| pair[1].saturating_sub(pair[0]));
        let apart = apart.min().unwrap_or(steps[0]);
        let label = format!("{of}train, means of {} steps", records as u64 * apart);
        curves.push((label, means));
    }
    if let Some((_, end)) = test.last() {
        curves.push((format!("{of}test, {end:.4} at the end"), test));
    }
    Ok(curves)
}

/// The mean point.
fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let sum = points
        .iter()
        .fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    let n = points.len() as f64;
    (sum.0 / n, sum.1 / n)
}

/// The unit in which so many seconds are read easily, and its length in seconds.
fn unit(seconds: f64) -> (&'static str, f64) {
    match seconds {
        ..120.0 => ("seconds", 1.0),
        ..7200.0 => ("minutes", 60.0),
        ..259_200.0 => ("hours", 3600.0),
        _ => ("days", 86_400.0),
    }
}
