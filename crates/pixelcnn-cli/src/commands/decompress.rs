//! `pixelcnn decompress`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, value_parser};
use pixelcnn::compress::{Archive, CodingModel, Entry};
use pixelcnn::picture::{grid, is_picture, write_png};

use super::compress::progress;
use crate::drawing::make_folder_of;
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
    /// Folder for the images, in which none of them may be yet
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
            for Entry { name, bytes, .. } in archive.entries() {
                say(format_args!("{bytes:>10}  {name}"))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        let (trained, files) = Trained::open_first(&self.files, "decompress")?;
        if files.len() != 1 {
            return Err("give one file that `pixelcnn compress` made".into());
        }
        let mut archive = Archive::open(path).map_err(named)?;
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
        let targets = targets(archive.entries(), &self.output.unwrap_or_default());
        images
            .iter()
            .try_for_each(|image| expect_none(&targets[*image]))?;

        catch_interrupts("leaving after this row")?;
        let start = Instant::now();
        let (mut done, mut written) = (0, 0);
        for batch in images.chunks(model.side_by_side(self.batch_size.into())) {
            let mut progress = progress(config, images.len(), done);
            let decompressed = archive
                .decompress(&model, batch, &mut progress)
                .map_err(named)?;
            drop(progress);
            let Some(decompressed) = decompressed else {
                note(format_args!(
                    "pixelcnn: interrupted: {} written",
                    counted(written, "image")
                ));
                return Ok(ExitCode::from(INTERRUPTED));
            };
            for (&image, levels) in batch.iter().zip(decompressed) {
                match levels {
                    Ok(levels) => {
                        let shape = [1, config.height, config.width, config.channels];
                        let picture = grid(&levels, shape, 1, 0, 1)?;
                        let target = &targets[image];
                        make_folder_of(target)?;
                        expect_none(target)?;
                        write_png(target, &picture)?;
                        written += 1;
                    }
                    Err(damage) => {
                        let name = &archive.entries()[image].name;
                        note(format_args!(
                            "pixelcnn: {}: {name} is {damage}",
                            path.display()
                        ));
                    }
                }
            }
            done += batch.len();
        }
        say(format_args!(
            "{} of {} written, {:.3} MB/s",
            grouped(written as u64),
            counted(images.len(), "image"),
            (images.len() * config.dims()) as f64 / 1e6 / start.elapsed().as_secs_f64()
        ))?;
        Ok(match written == images.len() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

/// The PNG file of each image: its name with this extension, or after its own where another image
/// has that name.
fn targets(entries: &[Entry], folder: &Path) -> Vec<PathBuf> {
    let is_png = |path: &Path| {
        let extension = path.extension().unwrap_or_default();
        extension.eq_ignore_ascii_case("png")
    };
    let names = entries.iter().map(|entry| Path::new(&entry.name));
    let mut taken: HashSet<PathBuf> = names
        .clone()
        .filter(|n| is_png(n))
        .map(PathBuf::from)
        .collect();
    let target = |name: &Path| {
        if is_png(name) {
            return folder.join(name);
        }
        let short = name.with_extension("png");
        let target = match is_picture(name) && taken.insert(short.clone()) {
            true => short,
            false => PathBuf::from(format!("{}.png", name.display())),
        };
        folder.join(target)
    };
    names.map(target).collect()
}

/// Checks that nothing is overwritten.
fn expect_none(target: &Path) -> Result {
    match target.symlink_metadata().is_ok() {
        true => Err(format!(
            "`{}` is there already: choose another folder",
            target.display()
        )
        .into()),
        false => Ok(()),
    }
}
