//! `pixelcnn compress`.

use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::ModelConfig;
use pixelcnn::compress::{CodingModel, Picture, assemble, distinct_names, streams, write};
use pixelcnn::data::{Walk, walk};
use pixelcnn::device::Device;
use pixelcnn::picture::{DroppedCount, FORMATS, read_exactly};
use pixelcnn::ranks::{gather, share};

use super::complete::label;
use crate::output::Overwrite;
use crate::ranks::{RankFlags, Team, common, together};
use crate::terminal::{
    Bar, Result, catch_interrupts, counted, duration, grouped, interrupted, note, say,
};
use crate::trained::Trained;

/// Compress images without loss.
///
/// The likelier the model finds an image, the fewer bytes it takes. All images go into one file, of
/// which each can be read without the others, by `pixelcnn decompress` with the same model: keep
/// it. Later versions of this program may come with another shipped model; `pixelcnn export -o
/// DIR` keeps this one, as a file that takes its place. Images are still pictures of the model's size
/// with 8 bits and no transparency; their pixels are kept and nothing else of their files.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(override_usage = "pixelcnn compress [OPTIONS] [RUN|FILE] <IMAGE|DIR>... -o <FILE>")]
pub struct Compress {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]; then pictures (PNG, JPEG, WebP, GIF, BMP, TIFF, PNM, QOI) or folders of them
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// File to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Class of all images, by number or by name, of a class-conditional model
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// Images that are compressed side by side; fewer where they would take over a gigabyte
    #[arg(long, value_name = "N", default_value = "64")]
    #[arg(value_parser = value_parser!(u16).range(1..=1024))]
    batch_size: u16,
    #[command(flatten)]
    overwrite: Overwrite,
    #[command(flatten)]
    ranks: RankFlags,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn compress photos -o photos.pxc
      all pictures in the folder and in those in it, by the shipped model
  pixelcnn compress runs/quick-1/checkpoints/best.safetensors a.png b.jpg -o two.pxc
  pixelcnn compress runs/classes horses --class horse -o horses.pxc
      as pictures of a class, where the model was trained with --class-conditional";

impl Compress {
    /// Runs the command, as one of the ranks that share the images.
    pub fn run(&self) -> Result<ExitCode> {
        together(self.ranks, |team| self.compress(team))
    }

    fn compress(&self, team: &Team) -> Result<ExitCode> {
        let ranks = &*team.ranks;
        let Prepared {
            trained,
            own,
            pictures,
            before,
        } = team.prepare(
            || self.prepare(team),
            |Prepared { trained, .. }| common(self, trained, false, Device::Cpu, &[]),
        )?;
        let config = trained.model();
        let model = CodingModel::new(config, trained.parameters(false)?)?;
        let (start, size) = (Instant::now(), self.batch_size.into());
        let pixels = config.height * config.width;
        let mut shown = progress(config, pictures.len(), 0);
        let parts = gather(ranks, |beat| {
            let mut progress = |done: usize| {
                beat()?;
                // The others are as far.
                shown((done * ranks.count()).min(pictures.len() * pixels))
            };
            Result::Ok(streams(&model, &pictures[own], size, &mut progress)?)
        });
        drop(shown);
        let streams = parts?.concat();
        if !team.leads() {
            return Ok(ExitCode::SUCCESS);
        }
        let file = assemble(&model, &pictures, &streams)?;
        write(&self.output, &file)?;
        let raw = (pictures.len() * config.dims()) as f64;
        say(format_args!(
            "{} in {}: {} bytes of {} in the pictures' files, {:.4} bits/dim, 1/{:.2} of the raw \
             pixels, {:.3} MB/s",
            counted(pictures.len(), "image"),
            self.output.display(),
            grouped(file.len() as u64),
            grouped(before),
            8.0 * file.len() as f64 / raw,
            raw / file.len() as f64,
            raw / 1e6 / start.elapsed().as_secs_f64()
        ))?;
        if file.len() as u64 > before {
            note(format_args!(
                "the pictures' own files are smaller by {} bytes: lossy ones such as JPEG hold less \
                 than their pixels, all of which are kept here",
                grouped(file.len() as u64 - before)
            ));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, team: &Team) -> Result<Prepared> {
        let (trained, files) = Trained::open_first(&self.files, "compress")?;
        trained.expect_likelihood_of_images("compress")?;
        let config = trained.model();
        let class = label(&trained, self.class.as_deref())?;
        let found = find(files)?;
        if team.leads() {
            // Not even by force over what is about to be read.
            let output = self.output.canonicalize().ok();
            if output.is_some()
                && found
                    .iter()
                    .any(|(_, path)| path.canonicalize().ok() == output)
            {
                return Err(format!(
                    "`{}` is one of the pictures: choose another name",
                    self.output.display()
                )
                .into());
            }
            self.overwrite.prepare(&self.output)?;
        }
        let shape = [config.height, config.width, config.channels];
        let own = share(found.len(), team.ranks.rank(), team.ranks.count());
        let (mut pictures, mut dropped, mut before) = (Vec::new(), DroppedCount::default(), 0);
        for (number, (name, path)) in found.into_iter().enumerate() {
            let mut levels = Vec::new();
            // Rank 0 writes the checksums of all.
            if team.leads() || own.contains(&number) {
                let picture = read_exactly(&path, shape)?;
                before += picture.file_bytes;
                // What is exact has nothing in its alpha channel.
                dropped += picture.dropped.beside_pixels();
                levels = picture.levels;
            }
            pictures.push(Picture {
                name,
                class,
                levels,
            });
        }
        if !dropped.is_empty() {
            note(format_args!("{dropped}: only pixels are kept"));
        }
        if team.leads() {
            catch_interrupts("leaving after this row")?;
        }
        Ok(Prepared {
            trained,
            own,
            pictures,
            before,
        })
    }
}

/// What compressing needs.
struct Prepared {
    trained: Trained,
    /// The numbers of this rank's pictures.
    own: Range<usize>,
    pictures: Vec<Picture>,
    /// Bytes of their files.
    before: u64,
}

/// Shows how far so many images are, of which the first `before` are done already, until Ctrl-C is
/// pressed: told the number of the others' pixels that are done.
pub fn progress(
    model: &ModelConfig,
    images: usize,
    before: usize,
) -> impl FnMut(usize) -> ControlFlow<()> + use<> {
    let pixels = model.height * model.width;
    let channels = model.channels;
    let (mut bar, start) = (Bar::new(), Instant::now());
    move |done| {
        let (all, total) = (before * pixels + done, images * pixels);
        bar.show(all as u64, total as u64, || {
            let seconds = start.elapsed().as_secs_f64();
            format!(
                "{:.1} of {images} images  {:.3} MB/s  {} left",
                all as f64 / pixels as f64,
                (done * channels) as f64 / 1e6 / seconds,
                duration((seconds * (total - all) as f64 / done as f64).round())
            )
        });
        interrupted()
    }
}

/// The pictures among the files and in the folders, hidden ones left out, with their names: a file's
/// own, and of those in a folder the path from there, in the order of their bytes.
fn find(files: &[PathBuf]) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for file in files {
        if !file.is_dir() {
            let folder = file.parent().unwrap_or(Path::new(""));
            found.push((name(file, folder)?, file.clone()));
            continue;
        }
        let Walk {
            pictures, left_out, ..
        } = walk(file)?;
        if !left_out.is_empty() {
            note(format_args!("{}: {left_out}", file.display()));
        }
        if pictures.is_empty() {
            return Err(format!(
                "{}: no pictures in it: give a folder that holds {FORMATS} files",
                file.display()
            )
            .into());
        }
        let mut inside = Vec::new();
        for path in pictures {
            inside.push((name(&path, file)?, path));
        }
        inside.sort();
        found.append(&mut inside);
    }
    if found.is_empty() {
        return Err(format!("no images: name {FORMATS} files, or folders of them").into());
    }
    let names = found.iter().map(|(name, _)| name.clone());
    let distinct = distinct_names(names.collect());
    for ((name, path), stored) in found.iter_mut().zip(distinct) {
        if *name != stored {
            note(format_args!(
                "{} is stored as {stored}, for there is another {name}",
                path.display()
            ));
            *name = stored;
        }
    }
    Ok(found)
}

/// A file's path from a folder, with `/` between its parts.
fn name(path: &Path, folder: &Path) -> Result<String> {
    let relative = path.strip_prefix(folder).unwrap_or(path);
    let parts: Option<Vec<_>> = relative.iter().map(|part| part.to_str()).collect();
    let parts = parts.ok_or_else(|| {
        format!(
            "{}: the name is not Unicode: rename the file",
            path.display()
        )
    })?;
    Ok(parts.join("/"))
}
