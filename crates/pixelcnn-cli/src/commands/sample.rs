//! `pixelcnn sample`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::device;
use pixelcnn::picture::{grid, write_png};
use pixelcnn::sample::{Sampling, sample};

use crate::terminal::{Bar, Result, catch_interrupts, duration, interrupted, left_off, say};
use crate::trained::Trained;

/// White pixels between the images of a grid, before they are enlarged.
const GAP: usize = 1;

/// Draw images from a model.
///
/// Pixel by pixel, each from its distribution given the ones before it. An image depends on the
/// seed and on its number only: ask for more images, and the first ones stay the same.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Sample {
    /// Run folder, of which the newest checkpoint is taken, or a checkpoint file
    #[arg(value_name = "RUN|FILE")]
    run: PathBuf,
    /// Images to draw
    #[arg(long, value_name = "N", default_value = "16", alias = "num-samples")]
    #[arg(value_parser = value_parser!(u32).range(1..=10_000))]
    num: u32,
    /// Class of all images, by number or by name, of a class-conditional model [default: a row for
    /// each class, with equal shares of the images]
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// 1 draws from the model; less draws likelier, smoother images
    #[arg(long, value_name = "T", default_value = "1", value_parser = temperature)]
    #[arg(allow_negative_numbers = true)]
    temperature: f32,
    /// Another seed draws other images
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,
    /// PNG file for the grid of all images
    #[arg(long, value_name = "FILE", default_value = "samples.png", value_parser = png)]
    output: PathBuf,
    /// Folder for each image as a PNG file of its own as well: 0000.png, ... [default: none]
    #[arg(long, value_name = "DIR")]
    singles: Option<PathBuf>,
    /// Enlarge every pixel to K x K
    #[arg(long, value_name = "K", default_value = "1")]
    #[arg(value_parser = value_parser!(u8).range(1..=64))]
    scale: u8,
    /// Use the parameters as trained last, not their Polyak average
    #[arg(long)]
    raw: bool,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn sample runs/quick-1
      16 images in samples.png
  pixelcnn sample runs/quick-1 --num 64 --temperature 0.9 --seed 7 --scale 4
      more, of likelier images, enlarged
  pixelcnn sample runs/classes --class horse --output horses.png
      of one class, where the model was trained with --class-conditional
  pixelcnn sample runs/quick-1/checkpoints/best.safetensors --singles drawn
      from the best checkpoint, each image in a file of its own";

fn temperature(text: &str) -> std::result::Result<f32, String> {
    match text.parse::<f32>() {
        Ok(temperature) if temperature.is_finite() && temperature > 0.0 => Ok(temperature),
        _ => Err("must be a number above 0".into()),
    }
}

fn png(path: &str) -> std::result::Result<PathBuf, String> {
    match path.ends_with(".png") {
        true => Ok(path.into()),
        false => Err("give a name that ends in .png".into()),
    }
}

impl Sample {
    /// Runs the command.
    pub fn run(self, device: &str) -> Result<ExitCode> {
        let device = device::parse(device)?;
        let trained = Trained::open(&self.run, "sample")?;
        let model = &trained.state.config;
        let (labels, columns) = self.labels(&trained)?;
        let shape = [labels.len(), model.height, model.width, model.channels];
        let scale = self.scale.into();
        // What can't be written is found out before the long work.
        grid(
            &vec![0; labels.len() * model.dims()],
            shape,
            columns,
            GAP,
            scale,
        )?;
        if let Some(folder) = self.output.parent() {
            make_folder(folder)?;
        }
        if let Some(folder) = &self.singles {
            make_folder(folder)?;
        }

        catch_interrupts("leaving after this pixel")?;
        let network = trained.network(self.raw, &device);
        let sampling = Sampling {
            labels,
            temperature: self.temperature,
            seed: self.seed,
        };
        let n = sampling.labels.len();
        let (mut bar, start) = (Bar::new(), Instant::now());
        let pixels = model.height * model.width;
        let images = sample(&network, &sampling, &mut |done| {
            bar.show(done as u64, pixels as u64, || {
                let seconds = start.elapsed().as_secs_f64();
                let share = done as f64 / pixels as f64;
                format!(
                    "{done} of {pixels} pixels  {:.2} images/s  {} left",
                    n as f64 * share / seconds,
                    duration((seconds / share - seconds).round())
                )
            });
            interrupted()
        });
        drop(bar);
        let Some(images) = images else {
            return Ok(left_off());
        };

        write_png(&self.output, &grid(&images, shape, columns, GAP, scale)?)?;
        if let Some(folder) = &self.singles {
            let one = [1, model.height, model.width, model.channels];
            for (i, image) in images.chunks_exact(model.dims()).enumerate() {
                let path = folder.join(format!("{i:04}.png"));
                write_png(&path, &grid(image, one, 1, 0, scale)?)?;
            }
        }
        say(format_args!(
            "{n} images in {} ({} weights, step {}, temperature {}, seed {})",
            self.output.display(),
            if self.raw { "raw" } else { "averaged" },
            trained.state.step,
            self.temperature,
            self.seed
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    /// The class of every image, and the columns of the grid.
    fn labels(&self, trained: &Trained) -> Result<(Vec<u32>, usize)> {
        let num = self.num as usize;
        let square = num.isqrt() + usize::from(num.isqrt().pow(2) < num);
        let classes = trained.state.config.nr_classes.min(num);
        Ok(match &self.class {
            Some(class) => (vec![trained.class(class)?; num], square),
            None if classes == 0 => (vec![0; num], square),
            None => {
                let columns = num / classes;
                let label = |image| (image / columns) as u32;
                ((0..classes * columns).map(label).collect(), columns)
            }
        })
    }
}

fn make_folder(folder: &Path) -> Result {
    if folder == Path::new("") {
        return Ok(());
    }
    fs::create_dir_all(folder)
        .map_err(|error| format!("cannot make the folder `{}`: {error}", folder.display()).into())
}
