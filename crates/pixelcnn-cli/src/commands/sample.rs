//! `pixelcnn sample`.

use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::ModelConfig;
use pixelcnn::atomic;
use pixelcnn::data::CodeMaps;
use pixelcnn::device::Device;
use pixelcnn::numpy::{Npz, Number};
use pixelcnn::picture::{grid, write_animation, write_png};
use pixelcnn::ranks::{gather, share};
use pixelcnn::sample::{Drawn, Sampler, Sampling, sample};

use crate::device::DeviceFlags;
use crate::drawing::{
    Drawing, GAP, coarse_maps, png, png_or_npy, prepare, progress, write_singles,
};
use crate::ranks::{GpuFlags, Team, common, together};
use crate::terminal::{Bar, Result, catch_interrupts, counted, say};
use crate::trained::Trained;

/// Frames of an animation.
const FRAMES: usize = 64;
/// The level of pixels that have not appeared.
const BLANK: u8 = 127;

/// Draw images from a model.
///
/// Pixel by pixel, each from its distribution given the ones before it. An image depends on the
/// seed and on its number only: ask for more images, and the first ones stay the same. Up to 64 are
/// drawn side by side, on a GPU up to 1,024.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Sample {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]
    #[arg(value_name = "RUN|FILE")]
    run: Option<PathBuf>,
    /// Images to draw
    #[arg(long, value_name = "N", default_value = "16", alias = "num-samples")]
    #[arg(value_parser = value_parser!(u32).range(1..=10_000))]
    num: u32,
    /// Class of all images, by number or by name, of a class-conditional model [default: every class
    /// in turn, a column for each]
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// NumPy file of the coarser maps that a model of codes is given, [N, H, W]: one map is drawn for each
    #[arg(long, value_name = "FILE", conflicts_with = "num")]
    coarse: Option<PathBuf>,
    /// Width and height of the images [default: those that the model was trained on]
    #[arg(long, value_name = "WxH", value_parser = size, conflicts_with = "coarse")]
    size: Option<[usize; 2]>,
    #[command(flatten)]
    drawing: Drawing,
    /// PNG file for the grid of all images, or for codes a .npy file, uint16 [N, H, W] [default:
    /// samples.png or samples.npy, or samples-2.png and so on where that is there]
    #[arg(long, short, value_name = "FILE", value_parser = png_or_npy)]
    output: Option<PathBuf>,
    /// Animated PNG file in which the grid appears row by row [default: none]
    #[arg(long, value_name = "FILE", value_parser = png)]
    animate: Option<PathBuf>,
    /// NumPy file for the levels, images [N, H, W, C], or codes [N, H, W], and of a class-conditional
    /// model the classes, labels [N]; --data takes it [default: none]
    #[arg(long, value_name = "FILE", value_parser = npz)]
    npz: Option<PathBuf>,
    #[command(flatten)]
    ranks: GpuFlags,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn sample
      16 images of the shipped model in samples.png
  pixelcnn sample runs/quick-1
      of one that you trained
  pixelcnn sample runs/quick-1 --num 64 --temperature 0.9 --seed 7 --scale 4
      more, of likelier images, enlarged
  pixelcnn sample runs/quick-1 --scale 4 --animate appearing.png
      and a film of their appearing
  pixelcnn sample runs/quick-1 --size 96x32 -o wide.png
      of another size than the one that it was trained on
  pixelcnn sample runs/classes --class horse -o horses.png
      of one class, where the model was trained with --class-conditional
  pixelcnn sample runs/codes --num 1000 -o codes.npy
      of a model of codes: as codes, for the decoder that they are of
  pixelcnn sample runs/quick-1/checkpoints/best.safetensors --singles drawn --npz drawn.npz
      from the best checkpoint, each image in a file of its own, and all as an array";

/// Parses a width and a height; gives height and width.
fn size(text: &str) -> std::result::Result<[usize; 2], String> {
    let sides = text.split_once('x');
    let sides = sides.and_then(|(w, h)| Some([h.parse().ok()?, w.parse().ok()?]));
    sides.ok_or_else(|| "give width and height, such as 48x32".into())
}

fn npz(path: &str) -> std::result::Result<PathBuf, String> {
    match path.ends_with(".npz") {
        true => Ok(path.into()),
        false => Err("give a name that ends in .npz".into()),
    }
}

impl Sample {
    /// Runs the command, as one of the ranks that share the images.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        together(self.ranks, |team| self.draw(device, team))
    }

    fn draw(&self, device: &DeviceFlags, team: &Team) -> Result<ExitCode> {
        let raw = self.drawing.raw;
        let Prepared {
            trained,
            sampler,
            sampling,
            columns,
            output,
            ..
        } = team.prepare(
            || self.prepare(device, team),
            |Prepared {
                 trained,
                 device,
                 sampling,
                 ..
             }| {
                // Each has read them from a file of its own.
                let mut coarse = DefaultHasher::new();
                coarse.write(&sampling.coarse);
                let common = common(self, trained, raw, *device, &[])?;
                Ok(format!("{common}\n{:x}", coarse.finish()))
            },
        )?;
        let model = trained.model();
        let n = sampling.labels.len();
        let (ranks, start) = (&*team.ranks, Instant::now());
        let own = share(n, ranks.rank(), ranks.count());
        let mut bar = Bar::new();
        let mut shown = progress(&mut bar, model, n);
        let parts = gather(ranks, |beat| {
            let mut progress = |drawn: Drawn| {
                beat()?;
                shown(drawn)
            };
            Result::Ok(sample(&sampler, &sampling, own, &mut progress)?)
        });
        drop(shown);
        drop(bar);
        let drawn = parts?.concat();
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }
        let speed = n as f64 / start.elapsed().as_secs_f64();
        if model.nr_codes > 0 {
            return self.write_codes(&trained, &sampling, &output, &drawn, speed);
        }
        let shape = [n, model.height, model.width, model.channels];
        let scale = self.drawing.scale.into();

        write_png(&output, &grid(&drawn, shape, columns, GAP, scale)?)?;
        if let Some(folder) = &self.drawing.singles {
            write_singles(folder, &drawn, scale, model)?;
        }
        if let Some(path) = &self.npz {
            let labels = (model.nr_classes > 0).then_some(&sampling.labels[..]);
            write_npz(path, "images", &shape, &drawn, labels)
                .map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        }
        if let Some(path) = &self.animate {
            let frames = model.height.min(FRAMES);
            write_animation(path, frames as u32 + 1, |frame| {
                let rows = frame as usize * model.height / frames;
                let mut drawn = drawn.clone();
                for image in drawn.chunks_exact_mut(model.dims()) {
                    image[rows * model.width * model.channels..].fill(BLANK);
                }
                grid(&drawn, shape, columns, GAP, scale)
            })?;
        }
        say(format_args!(
            "{} in {} {}",
            counted(n, "image"),
            output.display(),
            self.drawing.summary(&trained, speed)
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Writes codes that were drawn, and says so.
    fn write_codes(
        &self,
        trained: &Trained,
        sampling: &Sampling,
        output: &Path,
        drawn: &[u8],
        speed: f64,
    ) -> Result<ExitCode> {
        let model = trained.model();
        let maps = CodeMaps::of_images(model, drawn);
        maps.write(output)?;
        if let Some(path) = &self.npz {
            let labels = (model.nr_classes > 0).then_some(&sampling.labels[..]);
            write_npz(path, "codes", &maps.shape, &maps.codes, labels)
                .map_err(|error| format!("cannot write `{}`: {error}", path.display()))?;
        }
        say(format_args!(
            "{} in {} {}",
            counted(maps.shape[0], "map"),
            output.display(),
            self.drawing.summary(trained, speed)
        ))?;
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, device: &DeviceFlags, team: &Team) -> Result<Prepared> {
        if team.leads() {
            device.note_drawing();
        }
        let device = device.find_for(team)?;
        let mut trained = Trained::open(self.run.as_deref(), "sample")?;
        if let Some(size) = self.size {
            trained.resize(size, team.leads())?;
        }
        let model = trained.model();
        let coarse = coarse_maps(model, self.coarse.as_deref())?;
        let num = coarse
            .as_ref()
            .map_or(self.num as usize, |maps| maps.shape[0]);
        let (labels, columns) = self.labels(&trained, num)?;
        let n = labels.len();
        let animate = self.animate.is_some();
        let output = self
            .drawing
            .output(model, &self.output, "samples", animate)?;
        if team.leads() {
            let files = [Some(&output), self.animate.as_ref(), self.npz.as_ref()];
            prepare(n, columns, &self.drawing, model, &files, n)?;
            catch_interrupts("leaving after this row")?;
        }
        let sampler = Sampler::new(model, trained.parameters(self.drawing.raw)?, &device)?;
        let sampling = Sampling {
            coarse: coarse.map_or(Ok(Vec::new()), |maps| over(model, &maps))?,
            labels,
            temperature: self.drawing.temperature,
            seed: self.drawing.seed,
        };
        Ok(Prepared {
            device,
            trained,
            sampler,
            sampling,
            columns,
            output,
        })
    }

    /// The class of every image, and the columns of the grid.
    fn labels(&self, trained: &Trained, num: usize) -> Result<(Vec<u32>, usize)> {
        let square = num.isqrt() + usize::from(num.isqrt().pow(2) < num);
        let classes = trained.model().nr_classes;
        Ok(match &self.class {
            Some(class) => (vec![trained.class(class)?; num], square),
            None if classes == 0 => (vec![0; num], square),
            None => {
                let label = |image| (image % classes) as u32;
                ((0..num).map(label).collect(), classes.min(num))
            }
        })
    }
}

/// What drawing needs.
struct Prepared {
    device: Device,
    trained: Trained,
    sampler: Sampler,
    sampling: Sampling,
    /// Of the grid.
    columns: usize,
    output: PathBuf,
}

/// Coarser maps as a model of codes takes them, over codes of 0.
fn over(model: &ModelConfig, coarse: &CodeMaps) -> Result<Vec<u8>> {
    let shape = [coarse.shape[0], model.height, model.width];
    let own = CodeMaps {
        codes: vec![0; shape.iter().product()],
        shape,
    };
    own.images(Some(coarse))
        .map_err(|problem| format!("--coarse: {problem}").into())
}

fn write_npz<T: Number>(
    path: &Path,
    name: &str,
    shape: &[usize],
    images: &[T],
    labels: Option<&[u32]>,
) -> io::Result<()> {
    let mut npz = Npz::new();
    npz.add(name, shape, images)?;
    if let Some(labels) = labels {
        let labels: Vec<i64> = labels.iter().map(|&label| label.into()).collect();
        npz.add("labels", &[labels.len()], &labels)?;
    }
    let file = npz.finish()?;
    atomic::write(path, |w| w.write_all(&file))
}
