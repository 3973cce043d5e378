//! `pixelcnn decompress`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::ModelConfig;
use pixelcnn::codec::CodecError;
use pixelcnn::compress::{Archive, CodingModel, CompressError, Entry, png_names};
use pixelcnn::picture::{grid, read_exactly, write_png};

use super::compress::progress;
use crate::output::Overwrite;
use crate::terminal::{INTERRUPTED, Result, catch_interrupts, counted, grouped, note, say};
use crate::trained::Trained;

/// Get images back that `pixelcnn compress` made a file of.
///
/// It takes the same model. Images are written as PNG files by their names; where the file is
/// damaged, those that are whole are written and the others named.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(
    override_usage = "pixelcnn decompress [OPTIONS] [RUN|FILE] <FILE.pxc> -o <DIR>\n       \
                            pixelcnn decompress --list <FILE.pxc>"
)]
pub struct Decompress {
    /// Run folder, checkpoint file or exported weights, the same model as in compressing [default:
    /// the shipped model]; then the compressed file
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// Folder for the images; those that an earlier run has written there are not written again
    #[arg(long, short, value_name = "DIR", required_unless_present = "list")]
    output: Option<PathBuf>,
    /// Only the images of these names
    #[arg(long, value_name = "NAME", num_args = 1..)]
    only: Vec<String>,
    /// Show the names and how many bytes each takes; needs no model
    #[arg(long, conflicts_with_all = ["output", "only"])]
    list: bool,
    /// Images that are decompressed side by side; fewer where they would take over a gigabyte
    #[arg(long, value_name = "N", default_value = "64")]
    #[arg(value_parser = value_parser!(u16).range(1..=1024))]
    batch_size: u16,
    #[command(flatten)]
    overwrite: Overwrite,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn decompress photos.pxc -o photos
  pixelcnn decompress runs/quick-1 photos.pxc -o some --only cats/1.png cats/7.png
      two of them, without reading the others
  pixelcnn decompress --list photos.pxc
      what is in it";

impl Decompress {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let Some(path) = self.files.last() else {
            return Err("no file: name one that `pixelcnn compress` made".into());
        };
        let named = |error| format!("{}: {error}", path.display());
        if self.list {
            let archive = Archive::open(path).map_err(named)?;
            note_trailing(path, archive.trailing());
            for Entry { name, bytes, .. } in archive.entries() {
                say(format_args!("{bytes:>10}  {name}"))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let (trained, files) = Trained::open_first(&self.files, "decompress")?;
        trained.expect_likelihood_of_images("decompress")?;
        if files.len() != 1 {
            return Err("give one file that `pixelcnn compress` made".into());
        }
        let mut archive = Archive::open(path).map_err(named)?;
        note_trailing(path, archive.trailing());
        let config = trained.model();
        let model = CodingModel::new(config, trained.parameters(false)?)?;
        archive.expect_model(&model).map_err(named)?;
        let images: Vec<usize> = match self.only.is_empty() {
            true => (0..archive.entries().len()).collect(),
            false => {
                let position = |name: &String| {
                    archive.position(name).ok_or_else(|| {
                        format!("--only {name}: not in {}: see --list", path.display())
                    })
                };
                self.only
                    .iter()
                    .map(position)
                    .collect::<std::result::Result<_, _>>()?
            }
        };
        let folder = self.output.unwrap_or_default();
        let names = archive.entries().iter().map(|entry| entry.name.as_str());
        let targets: Vec<PathBuf> = png_names(names)
            .iter()
            .map(|name| folder.join(name))
            .collect();
        // What an earlier run has written is not written again.
        let is_done = |&image: &usize| holds(&targets[image], &archive.entries()[image], config);
        let (there, images): (Vec<usize>, Vec<usize>) = images.into_iter().partition(is_done);
        for &image in &images {
            self.overwrite.expect_free(&targets[image])?;
        }

        catch_interrupts("leaving after this row")?;
        let start = Instant::now();
        let (mut done, mut written) = (0, 0);
        for batch in images.chunks(model.side_by_side(self.batch_size.into())) {
            let mut progress = progress(config, images.len(), done);
            let decompressed = archive.decompress(&model, batch, &mut progress);
            drop(progress);
            let decompressed = match decompressed {
                Err(CompressError::Codec(CodecError::Stopped(_))) => {
                    note(format_args!(
                        "pixelcnn: interrupted: {} written; the same command goes on",
                        counted(written, "image")
                    ));
                    return Ok(ExitCode::from(INTERRUPTED));
                }
                decompressed => decompressed.map_err(named)?,
            };
            for (&image, levels) in batch.iter().zip(decompressed) {
                let name = &archive.entries()[image].name;
                let saved = match levels {
                    Ok(levels) => save(&levels, config, &targets[image], self.overwrite),
                    Err(damage) => Err(format!("{name} is {damage}").into()),
                };
                match saved {
                    Ok(()) => written += 1,
                    Err(error) => note(format_args!("pixelcnn: {}: {error}", path.display())),
                }
            }
            done += batch.len();
        }
        let before = match there.len() {
            0 => String::new(),
            there => format!(", {} there already", grouped(there as u64)),
        };
        say(format_args!(
            "{} of {} written{before}, {:.3} MB/s",
            grouped(written as u64),
            counted(images.len() + there.len(), "image"),
            (images.len() * config.dims()) as f64 / 1e6 / start.elapsed().as_secs_f64()
        ))?;
        Ok(match written == images.len() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

/// Tells that a file goes on behind the archive in it.
fn note_trailing(path: &Path, bytes: u64) {
    if bytes > 0 {
        note(format_args!(
            "{}: {} bytes follow the end of the archive and are not read: if they are another one, \
             give it a file of its own",
            path.display(),
            grouped(bytes)
        ));
    }
}

/// Writes an image to its file.
fn save(levels: &[u8], model: &ModelConfig, target: &Path, overwrite: Overwrite) -> Result {
    let shape = [1, model.height, model.width, model.channels];
    overwrite.prepare(target)?;
    Ok(write_png(target, &grid(levels, shape, 1, 0, 1)?)?)
}

/// Whether a file holds the very pixels of an image.
fn holds(target: &Path, entry: &Entry, model: &ModelConfig) -> bool {
    let shape = [model.height, model.width, model.channels];
    target.is_file() && read_exactly(target, shape).is_ok_and(|picture| entry.is(&picture.levels))
}
