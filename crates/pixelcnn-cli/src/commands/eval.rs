//! `pixelcnn eval`.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pixelcnn::atomic;
use pixelcnn::data::{Dataset, Split};
use pixelcnn::device::Device;
use pixelcnn::evaluate::{Evaluation, expect_images};
use pixelcnn::network::Network;
use pixelcnn::numpy::Npz;

use crate::device::DeviceFlags;
use crate::measuring::{ImageFlags, measure};
use crate::output::Overwrite;
use crate::ranks::{GpuFlags, Team, common, together};
use crate::settings::DataFlags;
use crate::terminal::{Result, catch_interrupts, counted, note_dropped, say};
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
    #[command(flatten)]
    images: ImageFlags,
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
            mut network,
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
             }| { common(self, trained, self.images.raw, *device, &[data]) },
        )?;
        let count = self.images.count(&data);
        let figures = measure(&*team.ranks, &mut network, &data, count, batch_size)?;
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }

        let told = say(format_args!(
            "{}: {}  {:.4} ± {:.4} {} ({} weights, step {})",
            split.map_or_else(|| "all".into(), |split| split.to_string()),
            counted(count, "image"),
            figures.mean(),
            figures.standard_error(),
            trained.model().unit(),
            trained.kind(self.images.raw),
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
        let found = device.find_for(team)?;
        let trained = Trained::open(self.run.as_deref(), "eval")?;
        let device = device.for_loss_of(trained.model(), found)?;
        let network = trained.network(self.images.raw, &device)?;
        if let Some(path) = self.output.as_ref().filter(|_| team.leads()) {
            self.overwrite.prepare(path)?;
        }
        let (_, split, data) = self.images.open(&trained, &self.data)?;
        expect_images(trained.model(), &data)?;
        note_dropped(data.dropped());
        if team.leads() {
            trained.note_sizes(&data);
        }

        if team.leads() {
            catch_interrupts("leaving after this batch")?;
        }
        Ok(Prepared {
            batch_size: self.images.batch_size(&device),
            device,
            trained,
            network,
            split,
            data,
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
