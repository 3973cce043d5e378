//! `pixelcnn compress`.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use pixelcnn::archive::{
    Archive, Coded, CodingModel, Group, Grouping, Item, Writer, check_name, distinct_names,
};
use pixelcnn::atomic::{self, is_replaced};
use pixelcnn::data::{Walk, walk};
use pixelcnn::device::Device;
use pixelcnn::ranks::{Ranks, gather};

use super::complete::label;
use crate::output::{Overwrite, cannot_write, is_standard};
use crate::ranks::{RankFlags, Team, common, together};
use crate::terminal::{
    Bar, INTERRUPTED, Result, catch_interrupts, counted, duration, grouped, interrupted, note, say,
};
use crate::trained::Trained;

/// Compress pictures without loss, and whatever lies beside them.
///
/// The likelier the model finds a picture, the fewer bytes it takes. All files go into one archive, of
/// which each can be read without the others by `pixelcnn decompress`. PNG files of up to 16,384 pixels a
/// side are coded by the model, and PNM, BMP, QOI and lossless WebP files that hold pixels and nothing
/// else: their pixels with alpha, 16 bits, profile, gamma, orientation and texts come back, as a PNG file.
/// What the model can't take or can't make smaller (a JPEG, a text) is kept as it is, byte by byte.
///
/// Hidden files, what systems put beside people's files (Thumbs.db), empty folders, times and permissions
/// are not kept.
///
/// Reading takes the same model. The shipped one stays in all later versions of this program; keep one of your
/// own, or let --embed-model put it into the archive.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(override_usage = "pixelcnn compress [OPTIONS] [RUN|FILE] <FILE|DIR>... -o <FILE.pxc>")]
pub struct Compress {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]; then files, folders of them, or - for standard input
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// Archive to write, or - for standard output
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Class of all pictures, by number or by name, of a class-conditional model
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// Read the archive back and compare everything in it with the files before saying done
    #[arg(long)]
    verify: bool,
    /// Put the model into the archive, so that reading it takes nothing else
    #[arg(long)]
    embed_model: bool,
    #[command(flatten)]
    overwrite: Overwrite,
    #[command(flatten)]
    ranks: RankFlags,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn compress photos -o photos.pxc
      all files in the folder and in those in it, pictures by the shipped model
  pixelcnn compress photos -o photos.pxc --verify
      read back and compared before it says done
  pixelcnn compress runs/quick-1/checkpoints/best.safetensors a.png b.png -o two.pxc --embed-model
      by a model of your own, which goes into the archive
  pixelcnn compress runs/classes horses --class horse -o horses.pxc
      as pictures of a class, where the model was trained with --class-conditional";

/// A file that is to be compressed, and its name in the archive.
struct Found {
    name: String,
    /// None for standard input.
    path: Option<PathBuf>,
}

impl Found {
    /// Its name and size, which all ranks find alike.
    fn described(&self) -> String {
        let size = self.path.as_ref().and_then(|path| path.metadata().ok());
        format!("\n{} {:?}", self.name, size.map(|size| size.len()))
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let read = match &self.path {
            Some(path) => fs::read(path).map(|read| bytes = read),
            None => io::stdin().read_to_end(&mut bytes).map(|_| ()),
        };
        read.map_err(|error| format!("cannot read {self}: {error}: check the file"))?;
        Ok(bytes)
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match &self.path {
            Some(path) => write!(f, "`{}`", path.display()),
            None => f.write_str("standard input"),
        }
    }
}

/// What was written.
#[derive(Default)]
struct Summary {
    /// Bytes of the archive, and of the files.
    bytes: u64,
    before: u64,
    /// Files, and those of them that the model coded.
    files: usize,
    pictures: usize,
    /// Values of these, and bytes of the others.
    levels: u64,
    kept: u64,
    /// Bytes of the model in it.
    model: u64,
}

impl Compress {
    /// Runs the command, as one of the ranks that share the pictures.
    pub fn run(&self) -> Result<ExitCode> {
        together(self.ranks, |team| self.compress(team))
    }

    fn compress(&self, team: &Team) -> Result<ExitCode> {
        let (trained, class, found) = team.prepare(
            || self.prepare(team),
            |(trained, _, found)| {
                let files = found.iter().map(Found::described).collect::<String>();
                Ok(common(self, trained, false, Device::CPU, &[])? + &files)
            },
        )?;
        let model = trained.coder()?;
        let start = Instant::now();
        let embedded = self.embed_model.then(|| trained.averaged());
        let work = |out: Option<&mut dyn Write>| {
            let writer = out.map(|out| Writer::new(&model, out));
            let writer = match (writer, &embedded) {
                (Some(writer), Some(embedded)) => Some(writer.embed(embedded)?),
                (writer, _) => writer,
            };
            write(&model, &*team.ranks, &found, class, writer)
        };
        let summary = match team.leads() {
            false => {
                work(None)?;
                return Ok(ExitCode::SUCCESS);
            }
            true if is_standard(&self.output) => match work(Some(&mut io::stdout().lock())) {
                Err(_) if interrupted().is_break() && team.ranks.count() == 1 => {
                    note("pixelcnn: interrupted: the archive is not complete");
                    return Ok(ExitCode::from(INTERRUPTED));
                }
                done => done?,
            },
            true => {
                let mut done = Ok(Summary::default());
                let written = atomic::write(&self.output, |out| {
                    done = work(Some(out));
                    match done {
                        Ok(_) => Ok(()),
                        Err(_) => Err(io::Error::other("it is not complete")),
                    }
                });
                let summary = done?;
                written.map_err(|error| cannot_write(&self.output, &error))?;
                summary
            }
        };
        let took = start.elapsed().as_secs_f64();
        if self.verify {
            match verify(&self.output, self.embed_model, &model, &found) {
                Err(error) if interrupted().is_break() => {
                    note(format_args!(
                        "pixelcnn: interrupted: `{}` is written, and not read back: {error}",
                        self.output.display()
                    ));
                    return Ok(ExitCode::from(INTERRUPTED));
                }
                verified => verified?,
            }
        }
        let said = summary.said(&self.output, took, self.verify);
        match is_standard(&self.output) {
            true => note(said),
            false => say(said)?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn prepare(&self, team: &Team) -> Result<(Trained, u32, Vec<Found>)> {
        let (trained, files) = Trained::open_first(&self.files, "compress")?;
        trained.expect_likelihood_of_images("compress")?;
        let class = label(&trained, self.class.as_deref())?;
        match files.iter().filter(|file| is_standard(file)).count() {
            0 => {}
            1 if team.ranks.count() == 1 => {}
            1 => return Err("-: many ranks can't read standard input: name files".into()),
            _ => return Err("-: standard input is one file: name it once".into()),
        }
        let found = find(files)?;
        if team.leads() {
            self.prepare_output(&found)?;
            catch_interrupts("leaving after this row")?;
        }
        Ok((trained, class, found))
    }

    fn prepare_output(&self, found: &[Found]) -> Result {
        if is_standard(&self.output) {
            return match (self.verify, io::stdout().is_terminal()) {
                (true, _) => Err("--verify reads a file: name one with --output".into()),
                (_, true) => Err("-o -: standard output is a terminal: name a file, or let \
                                  another program read it"
                    .into()),
                _ => Ok(()),
            };
        }
        // Not even by force over what is about to be read.
        let output = self.output.canonicalize().ok();
        let mut paths = found.iter().filter_map(|found| found.path.as_ref());
        if output.is_some() && paths.any(|path| path.canonicalize().ok() == output) {
            return Err(format!(
                "`{}` is one of the files: choose another name",
                self.output.display()
            )
            .into());
        }
        let is_file = |found: &Found| found.path.as_ref().is_some_and(|path| path.is_file());
        if let Some(found) = found.iter().find(|found| self.verify && !is_file(found)) {
            return Err(
                format!("--verify reads files twice, and {found} is none: leave it out").into(),
            );
        }
        if self.verify && !is_replaced(&self.output) {
            return Err(format!(
                "--verify can't read `{}` back: name a file",
                self.output.display()
            )
            .into());
        }
        self.overwrite.prepare(&self.output)
    }
}

/// Where ranks have not the same to code.
const OTHER_FILES: &str = "the ranks read other files: give all the same, which nobody changes";

/// Writes the archive, the blocks of which are coded by the ranks in turn; `writer` is rank 0's alone.
fn write(
    model: &CodingModel,
    ranks: &dyn Ranks,
    found: &[Found],
    class: u32,
    mut writer: Option<Writer<&mut dyn Write>>,
) -> Result<Summary> {
    let size = |found: &Found| Some(found.path.as_ref()?.metadata().ok()?.len());
    let total = found.iter().filter_map(size).sum::<u64>();
    let mut shown = progress(counted(found.len(), "file"), total);
    let mut summary = Summary {
        model: writer.as_ref().map_or(0, Writer::embedded_bytes),
        ..Summary::default()
    };
    let mut grouping = Grouping::new(model);
    let mut round: Vec<Group> = Vec::new();
    let mut code = |round: &mut Vec<Group>| -> Result {
        let here: u64 = round.iter().map(Group::bytes).sum();
        let before = summary.before;
        // Rank 0 holds what the others have coded against its own.
        let mut others: Vec<Option<Group>> = round.drain(..).map(Some).collect();
        let own = others.get_mut(ranks.rank()).and_then(Option::take);
        let parts = gather(ranks, |beat| {
            let Some(own) = own else {
                return Ok(None);
            };
            let mut progress = |share: f64| {
                beat()?;
                // The others are as far.
                shown(before + (share * here as f64) as u64)
            };
            Result::Ok(Some(own.encode(model, &mut progress)?))
        })?;
        for (rank, block) in parts.iter().enumerate() {
            let own = others.get(rank).and_then(Option::as_ref);
            let is_same = match (block, own) {
                // Its own is with it.
                (Some(_), None) => rank == 0,
                (Some(block), Some(own)) => own.is_in(block),
                (None, own) => own.is_none(),
            };
            if !is_same {
                return Err(OTHER_FILES.into());
            }
            let Some(block) = block else {
                continue;
            };
            if let Some(writer) = &mut writer {
                writer.write(block)?;
            }
            summary.add(block);
        }
        summary.before += here;
        Ok(())
    };
    for found in found {
        let item = Item {
            name: found.name.clone(),
            class,
            bytes: found.read()?,
        };
        round.extend(grouping.push(item));
        if round.len() == ranks.count() {
            code(&mut round)?;
        }
    }
    round.extend(grouping.finish());
    if !round.is_empty() {
        code(&mut round)?;
    }
    if let Some(writer) = writer {
        if summary.files != found.len() {
            return Err(OTHER_FILES.into());
        }
        (_, summary.bytes) = writer.finish()?;
    }
    Ok(summary)
}

impl Summary {
    fn add(&mut self, block: &Coded) {
        self.files += block.items();
        self.pictures += block.pictures();
        self.levels += block.levels();
        self.kept += block.kept();
    }

    fn said(&self, path: &Path, seconds: f64, verified: bool) -> String {
        let place = match is_standard(path) {
            true => "standard output".into(),
            false => path.display().to_string(),
        };
        let mut said = format!(
            "{} in {place}: {} bytes of {}",
            counted(self.files, "file"),
            grouped(self.bytes),
            grouped(self.before),
        );
        if self.pictures > 0 {
            said += &format!(
                "; {} coded in {:.4} bits/dim, {:.3} MB/s",
                counted(self.pictures, "picture"),
                8.0 * (self.bytes - self.kept - self.model) as f64 / self.levels as f64,
                self.levels as f64 / 1e6 / seconds,
            );
        }
        if self.pictures < self.files {
            let kept = self.files - self.pictures;
            said += &format!(
                "; {} kept as {}",
                counted(kept, "file"),
                if kept == 1 { "it is" } else { "they are" }
            );
        }
        if self.model > 0 {
            said += &format!(
                "; the model takes {} bytes of the archive",
                grouped(self.model)
            );
        }
        if verified {
            said += "; all read back and the same";
        }
        said
    }
}

/// Reads an archive back and compares what is in it with the files; by the model that is in it, if there is one.
fn verify(path: &Path, is_embedded: bool, model: &CodingModel, found: &[Found]) -> Result {
    let failed = |what: String| {
        format!(
            "--verify: {what}: keep the files, and remove `{}`",
            path.display()
        )
    };
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    let archive = Archive::new(file);
    let mut archive = archive.map_err(|error| failed(error.to_string()))?;
    let is_whole = archive.reader().is_whole() && archive.entries().len() == found.len();
    if !is_whole {
        return Err(failed("what was written is not what is read".into()).into());
    }
    let embedded = match is_embedded {
        true => archive
            .reader()
            .embedded()
            .map_err(|error| failed(error.to_string()))?,
        false => None,
    };
    if is_embedded && embedded.is_none() {
        return Err(failed("the model is not in it".into()).into());
    }
    let embedded = embedded.map(|model| model.coder()).transpose()?;
    let model = embedded.as_ref().unwrap_or(model);
    let total = archive
        .entries()
        .iter()
        .map(|entry| entry.bytes + entry.levels)
        .sum::<u64>();
    let mut shown = progress("reading back".into(), total);
    let mut done = 0;
    let numbers: Vec<usize> = (0..found.len()).collect();
    for numbers in numbers.chunks(VERIFIED_AT_ONCE) {
        let here = numbers.iter().map(|&number| {
            let entry = &archive.entries()[number];
            entry.bytes + entry.levels
        });
        let here = here.sum::<u64>();
        let mut progress = |share: f64| shown(done + (share * here as f64) as u64);
        for (&number, back) in numbers
            .iter()
            .zip(archive.read(model, numbers, &mut progress)?)
        {
            let file = found[number].read()?;
            if !back.is_ok_and(|back| back.is_of(&file)) {
                return Err(failed(format!("{} comes back as another one", found[number])).into());
            }
        }
        done += here;
    }
    Ok(())
}

/// Files that are read back side by side.
const VERIFIED_AT_ONCE: usize = 16;

/// Shows how many bytes of some files are done, until Ctrl-C is pressed.
pub fn progress(what: String, total: u64) -> impl FnMut(u64) -> ControlFlow<()> {
    let (mut bar, start) = (Bar::new(), Instant::now());
    move |done| {
        // Files may grow meanwhile, and standard input has any size.
        let total = total.max(done);
        bar.show(done, total, || {
            let seconds = start.elapsed().as_secs_f64();
            format!(
                "{what}: {:.1} of {:.1} MB, {} left",
                done as f64 / 1e6,
                total as f64 / 1e6,
                duration((seconds * (total - done) as f64 / done.max(1) as f64).round())
            )
        });
        interrupted()
    }
}

/// The files, and those in the folders, hidden ones left out, with their names: a file's own, and of those in
/// a folder the path from there, in the order of their bytes.
fn find(files: &[PathBuf]) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for file in files {
        if is_standard(file) {
            found.push(Found {
                name: "stdin".into(),
                path: None,
            });
            continue;
        }
        let named = |path: PathBuf, folder: &Path| -> Result<Found> {
            Ok(Found {
                name: name(&path, folder)?,
                path: Some(path),
            })
        };
        if !file.is_dir() {
            if !file.exists() {
                return Err(format!("cannot read `{}`: no such file", file.display()).into());
            }
            found.push(named(file.clone(), file.parent().unwrap_or(Path::new("")))?);
            continue;
        }
        let Walk {
            files, left_out, ..
        } = walk(file, |_| true)?;
        if !left_out.is_empty() {
            note(format_args!("{}: {left_out}", file.display()));
        }
        if files.is_empty() {
            return Err(format!("{}: no files in it: name another folder", file.display()).into());
        }
        let inside = files.into_iter().map(|path| named(path, file));
        let mut inside = inside.collect::<Result<Vec<Found>>>()?;
        inside.sort_by(|a, b| a.name.cmp(&b.name));
        found.append(&mut inside);
    }
    if found.is_empty() {
        return Err("no files: name some, or folders of them".into());
    }
    let names = found.iter().map(|found| found.name.clone());
    let distinct = distinct_names(names.collect());
    for (found, stored) in found.iter_mut().zip(distinct) {
        if found.name != stored {
            note(format_args!(
                "{} is stored as {stored}, for there is another {}",
                found.path.as_deref().unwrap_or(Path::new("-")).display(),
                found.name
            ));
            check_name(&stored)?;
            found.name = stored;
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
    let name = parts.join("/");
    check_name(&name)?;
    Ok(name)
}
