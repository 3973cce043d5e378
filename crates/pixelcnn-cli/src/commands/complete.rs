//! `pixelcnn complete`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::ModelConfig;
use pixelcnn::complete::{Completion, complete};
use pixelcnn::data::CodeMaps;
use pixelcnn::picture::{DroppedCount, decode, grid, read, read_bytes, size, write_png};
use pixelcnn::sample::Sampler;

use crate::device::DeviceFlags;
use crate::drawing::{Drawing, GAP, coarse_maps, png_or_npy, prepare, progress, write_singles};
use crate::terminal::{Bar, Result, catch_interrupts, counted, note_dropped, say};
use crate::trained::Trained;

/// The level at which missing pixels are shown.
const MISSING: u8 = 127;

/// Fill in what is missing in images.
///
/// Each missing pixel is drawn from its distribution given all pixels before it: those above it,
/// and those to its left in its row. The model cannot look ahead: pixels that are known but come
/// later stay as they are, yet nothing that is drawn before them takes notice. So keep the top
/// (--keep top:16) and let the model go on from there; around a hole in the middle, what is drawn
/// fits what is above and to the left of it, and meets the rest by chance.
///
/// The grid has a row for each image: the image, what is kept of it, and its variants. The images are of
/// one size, whichever that is.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(override_usage = "pixelcnn complete [OPTIONS] [RUN|FILE] <IMAGE>...")]
pub struct Complete {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]; then pictures of one size (PNG, JPEG, WebP, GIF, BMP, TIFF, PNM, QOI), or .npy files
    /// of maps of codes
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// What is kept: top:N, left:N, bottom:N or right:N, so many rows or columns
    #[arg(long, value_name = "SIDE:N", value_parser = keep, required_unless_present = "mask")]
    keep: Option<Keep>,
    /// Picture of the same size whose black pixels are kept and whose white ones are filled in
    #[arg(long, value_name = "FILE", conflicts_with = "keep")]
    mask: Option<PathBuf>,
    /// Times that each image is completed
    #[arg(long, value_name = "N", default_value = "4")]
    #[arg(value_parser = value_parser!(u32).range(1..=1_000))]
    variants: u32,
    /// Class of all images, by number or by name, of a class-conditional model
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    #[command(flatten)]
    drawing: Drawing,
    /// NumPy file of the coarser maps that a model of codes is given, one for each map, [N, H, W]
    #[arg(long, value_name = "FILE")]
    coarse: Option<PathBuf>,
    /// PNG file for the grid, or for codes a .npy file, uint16 [N * variants, H, W] [default:
    /// completed.png or completed.npy, or completed-2.png and so on where that is there]
    #[arg(long, short, value_name = "FILE", value_parser = png_or_npy)]
    output: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn complete horse.png --keep top:16
      four ways of the shipped model to go on below the upper half, in completed.png
  pixelcnn complete runs/quick-1 a.png b.png --mask hole.png --variants 8 --scale 4
      the white part of hole.png filled in in both, enlarged
  pixelcnn complete runs/classes horse.png --keep top:8 --class frog --singles completed
      as another class would go on, each variant in a file of its own
  pixelcnn complete runs/codes codes.npy --keep top:8 -o completed.npy
      maps of codes, which a model of codes goes on with";

/// A side that is kept, and how much of it.
#[derive(Debug, Clone, Copy)]
struct Keep {
    side: Side,
    count: usize,
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Top,
    Left,
    Bottom,
    Right,
}

fn keep(text: &str) -> std::result::Result<Keep, String> {
    let parsed = text.split_once(':').and_then(|(side, count)| {
        let side = match side {
            "top" => Side::Top,
            "left" => Side::Left,
            "bottom" => Side::Bottom,
            "right" => Side::Right,
            _ => return None,
        };
        let count = count.parse().ok().filter(|count| *count > 0)?;
        Some(Keep { side, count })
    });
    parsed.ok_or_else(|| "give a side and a number above 0, such as top:16".into())
}

impl Keep {
    /// Whether each pixel is kept \[H, W\].
    fn known(self, height: usize, width: usize) -> Vec<bool> {
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (y, x)));
        let kept = |(y, x)| match self.side {
            Side::Top => y < self.count,
            Side::Left => x < self.count,
            Side::Bottom => height - y <= self.count,
            Side::Right => width - x <= self.count,
        };
        pixels.map(kept).collect()
    }
}

impl Complete {
    /// Runs the command.
    pub fn run(self, device: &DeviceFlags) -> Result<ExitCode> {
        device.note_drawing();
        let device = device.find()?;
        let (mut trained, files) = Trained::open_first(&self.files, "complete")?;
        let [first, ..] = files else {
            return Err("no image is named: name the pictures to complete".into());
        };
        // Once, for it may be a pipe.
        let pictures: Vec<(&PathBuf, Vec<u8>)> = match trained.model().nr_codes {
            0 => files
                .iter()
                .map(|path| Ok((path, read_bytes(path)?)))
                .collect::<Result<_>>()?,
            _ => Vec::new(),
        };
        let size = match &pictures[..] {
            [(path, bytes), ..] => size(bytes, path)?,
            [] => {
                let [_, height, width] = CodeMaps::read(first)?.shape;
                [height, width]
            }
        };
        trained.resize(size, true)?;
        let model = trained.model();
        let parameters = trained.parameters(self.drawing.raw)?;
        let known = self.known(model)?;
        let coarse = coarse_maps(model, self.coarse.as_deref())?;
        let codes = model.nr_codes > 0;
        let originals = match codes {
            true => codes_in(model, files, coarse.as_ref())?,
            false => levels_of(model, &pictures)?,
        };
        let class = label(&trained, self.class.as_deref())?;
        let n = originals.len() / model.bytes_per_image();
        let variants = self.variants as usize;
        let columns = 2 + variants;
        let scale = self.drawing.scale.into();
        let output = self
            .drawing
            .output(model, &self.output, "completed", false)?;
        let outputs = [Some(&output)];
        prepare(
            n * columns,
            columns,
            &self.drawing,
            model,
            &outputs,
            n * variants,
        )?;

        catch_interrupts("leaving after this row")?;
        let completion = Completion {
            images: originals,
            known,
            labels: vec![class; n],
            variants,
            temperature: self.drawing.temperature,
            seed: self.drawing.seed,
        };
        let sampler = Sampler::new(model, parameters, &device)?;
        let (mut bar, start) = (Bar::new(), Instant::now());
        let completed = complete(
            &sampler,
            &completion,
            &mut progress(&mut bar, model, n * variants),
        );
        drop(bar);
        let completed = completed?;
        let speed = (n * variants) as f64 / start.elapsed().as_secs_f64();

        let times = match variants {
            1 => "once".into(),
            variants => format!("{variants} times"),
        };
        let said = |what: &str| {
            say(format_args!(
                "{} completed {times} in {} {}",
                counted(n, what),
                output.display(),
                self.drawing.summary(&trained, speed)
            ))
        };
        if codes {
            CodeMaps::of_images(model, &completed).write(&output)?;
            said("map")?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut rows = Vec::new();
        let dims = model.dims();
        let originals = completion.images.chunks_exact(dims);
        for (original, completed) in originals.zip(completed.chunks_exact(variants * dims)) {
            rows.extend(original);
            let pixels = original.chunks_exact(model.channels);
            for (pixel, known) in pixels.zip(&completion.known) {
                rows.extend(
                    pixel
                        .iter()
                        .map(|level| if *known { *level } else { MISSING }),
                );
            }
            rows.extend(completed);
        }
        let shape = [n * columns, model.height, model.width, model.channels];
        write_png(&output, &grid(&rows, shape, columns, GAP, scale)?)?;
        if let Some(folder) = &self.drawing.singles {
            write_singles(folder, &completed, scale, model)?;
        }
        said("image")?;
        Ok(ExitCode::SUCCESS)
    }

    /// Which pixels are kept \[H, W\].
    fn known(&self, model: &ModelConfig) -> Result<Vec<bool>> {
        let (known, flag) = match (&self.mask, self.keep) {
            (Some(mask), _) => {
                let mask = read(mask, [model.height, model.width, 1])?;
                (
                    mask.levels.iter().map(|level| *level < 128).collect(),
                    "--mask",
                )
            }
            (None, Some(keep)) => (keep.known(model.height, model.width), "--keep"),
            (None, None) => (Vec::new(), "--keep"),
        };
        if known.iter().all(|known| *known) {
            let advice = match flag {
                "--mask" => "make what is to be filled in white",
                _ => "keep less",
            };
            return Err(format!("{flag}: nothing is left to fill in: {advice}").into());
        }
        Ok(known)
    }
}

/// The maps of codes in some .npy files, one file's after another's, as the model takes them.
fn codes_in(model: &ModelConfig, files: &[PathBuf], coarse: Option<&CodeMaps>) -> Result<Vec<u8>> {
    let mut all = CodeMaps {
        shape: [0, model.height, model.width],
        codes: Vec::new(),
    };
    for path in files {
        let maps = CodeMaps::read(path)?;
        let ([count, height, width], most) = (maps.shape, maps.nr_codes());
        if [height, width] != all.shape[1..] || most > model.nr_codes {
            return Err(format!(
                "{}: maps {width}x{height} of codes up to {}: the model takes {}x{} of {} codes",
                path.display(),
                most - 1,
                model.width,
                model.height,
                model.nr_codes
            )
            .into());
        }
        all.shape[0] += count;
        all.codes.extend(maps.codes);
    }
    let images = all.images(coarse);
    images.map_err(|problem| format!("--coarse: {problem}").into())
}

/// The levels of some pictures.
fn levels_of(model: &ModelConfig, pictures: &[(&PathBuf, Vec<u8>)]) -> Result<Vec<u8>> {
    let (mut levels, mut dropped) = (Vec::new(), DroppedCount::default());
    let shape = [model.height, model.width, model.channels];
    for (path, bytes) in pictures {
        let picture = decode(bytes, path, shape)?;
        levels.extend(picture.levels);
        dropped += picture.dropped.of_pixels();
    }
    note_dropped(dropped);
    Ok(levels)
}

/// The label of all images, given a class or none.
pub fn label(trained: &Trained, class: Option<&str>) -> Result<u32> {
    match (class, trained.model().nr_classes) {
        (Some(class), _) => trained.class(class),
        (None, 0) => Ok(0),
        (None, classes) => Err(format!(
            "the model is class-conditional: give --class, a name or a number from 0 to {}",
            classes - 1
        )
        .into()),
    }
}
