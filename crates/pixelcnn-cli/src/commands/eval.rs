//! `pixelcnn eval`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, value_parser};
use pixelcnn::atomic;
use pixelcnn::data::{Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::evaluate::{Evaluation, expect_images};
use pixelcnn::network::Network;
use pixelcnn::numpy::Npz;

use crate::device::DeviceFlags;
use crate::measuring::measure;
use crate::output::Overwrite;
use crate::ranks::{GpuFlags, Team, common, together};
use crate::settings::{DataFlags, split};
use crate::terminal::{Result, catch_interrupts, counted, note_dropped, opening, say};
use crate::trained::Trained;

/// Measure a model in bits per dimension.
///
/// The mean over all images of a data set and its standard error; with --output, the figure of each
/// image: how unusual the model finds it.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Eval {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]
    #[arg(value_name = "RUN|FILE")]
    run: Option<PathBuf>,
    /// Which images of the data [default: the test images, or all where there is no such split; of
    /// the run's own data those that it was not trained on]
    #[arg(long, value_name = "SPLIT", value_parser = split())]
    split: Option<Split>,
    /// Use the parameters as trained last, not their Polyak average
    #[arg(long)]
    raw: bool,
    /// Images evaluated side by side; changes the time and memory taken, not the result
    /// [default: 16, on a GPU 256]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = value_parser!(u32).range(1..=65_536))]
    batch_size: Option<u32>,
    /// Evaluate the first N images only [default: all]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write index, label (-1 without), bits/dim and name of each image to a .csv or .npz file
    /// [default: none]
    #[arg(long, short, value_name = "FILE", value_parser = table)]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
    #[command(flatten)]
    ranks: GpuFlags,
    #[command(flatten)]
    data: DataFlags,
}

const EXAMPLES: &str = "\
The data are the run's own where the data flags leave them out, CIFAR-10 for the shipped model.

Examples:
  pixelcnn eval
      bits/dim of the shipped model on all test images of CIFAR-10
  pixelcnn eval runs/quick-1
      bits/dim on all test images
  pixelcnn eval runs/quick-1 --split train --limit 1000
      on training images: much lower than on test images means overfitting
  pixelcnn eval runs/quick-1/checkpoints/best.safetensors --output figures.csv
      the best checkpoint, each image's figure in a table
  pixelcnn eval runs/quick-1 --data photos --size 32
      how unusual other pictures are under the model";

fn table(path: &str) -> std::result::Result<PathBuf, String> {
    match path.ends_with(".csv") || path.ends_with(".npz") {
        true => Ok(path.into()),
        false => Err("give a name that ends in .csv or .npz".into()),
    }
}

impl Eval {
    /// Runs the command, as one of the ranks that share the images.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        together(self.ranks, |team| self.measure(device, team))
    }

    fn measure(&self, device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
        let Prepared {
            trained,
            network,
            split,
            data,
            batch_size,
            ..
        } = team.prepare(
            || self.prepare(device, team),
            |Prepared {
                 trained,
                 device,
                 data,
                 ..
             }| { common(self, trained, self.raw, *device, &[data]) },
        )?;
        let count = self
            .limit
            .map_or(data.len(), |limit| data.len().min(limit as usize));
        let figures = measure(&*team.ranks, &network, &data, count, batch_size)?;
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }

        let told = say(format_args!(
            "{}: {}  {:.4} ± {:.4} bits/dim ({} weights, step {})",
            split.map_or_else(|| "all".into(), |split| split.to_string()),
            counted(count, "image"),
            figures.mean(),
            figures.standard_error(),
            trained.kind(self.raw),
            trained.step()
        ));
        if let Some(path) = &self.output {
            write_table(path, &figures, &data)
                .map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        }
        told?;
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, device: &DeviceFlags, team: &Team) -> Result<Prepared> {
        let device = device.find_for(team)?;
        let trained = Trained::open(self.run.as_deref(), "eval")?;
        let network = trained.network(self.raw, &device)?;
        let config = trained.data_or(&self.data)?;
        if let Some(path) = self.output.as_ref().filter(|_| team.leads()) {
            self.overwrite.prepare(path)?;
        }
        // A fraction that is asked for is the test split, of any data.
        let split = self.split.or(self.data.hold_out().then_some(Split::Test));
        let (split, data) = trained.open_measured(&config, split, &mut opening())?;
        expect_images(trained.model(), &data)?;
        note_dropped(data.dropped());

        if team.leads() {
            catch_interrupts("leaving after this batch")?;
        }
        let batch_size = self.batch_size.map(|n| n as usize);
        Ok(Prepared {
            device,
            trained,
            network,
            split,
            data,
            batch_size: batch_size.unwrap_or(device.images_at_a_time()),
        })
    }
}

/// What an evaluation needs.
struct Prepared {
    device: Device,
    trained: Trained,
    network: Network,
    split: Option<Split>,
    data: Dataset,
    batch_size: usize,
}

/// Writes the figures of every image as a table.
fn write_table(path: &Path, figures: &Evaluation, data: &Dataset) -> io::Result<()> {
    let bits_per_dim = &figures.bits_per_dim;
    let index: Vec<u64> = (0..bits_per_dim.len() as u64).collect();
    let label: Vec<i64> = match &figures.labels[..] {
        [] => vec![-1; bits_per_dim.len()],
        labels => labels.iter().map(|&label| label.into()).collect(),
    };
    let name: Vec<&str> = (0..bits_per_dim.len())
        .map(|image| data.image_name(image).unwrap_or_default())
        .collect();
    let file = if path.extension().is_some_and(|extension| extension == "csv") {
        let mut table = csv::Writer::from_writer(Vec::new());
        table.write_record(["index", "label", "bits_per_dim", "name"])?;
        for (((index, label), bits), name) in index.iter().zip(&label).zip(bits_per_dim).zip(&name)
        {
            table.serialize((index, label, bits, name))?;
        }
        table.into_inner().map_err(|error| error.into_error())?
    } else {
        let mut npz = Npz::new();
        let shape = [index.len()];
        npz.add("index", &shape, &index)?;
        npz.add("label", &shape, &label)?;
        npz.add("bits_per_dim", &shape, bits_per_dim)?;
        npz.add_texts("name", &name)?;
        npz.finish()?
    };
    atomic::write(path, |w| w.write_all(&file))
}
