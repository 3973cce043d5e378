//! `pixelcnn decompress`.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use pixelcnn::archive::{
    ArchiveError, Block, CodingModel, Entry, FileNames, Found, Pipe, Reader, Source,
};
use pixelcnn::atomic;
use pixelcnn::codec::CodecError;

use super::compress::progress;
use crate::output::{Overwrite, cannot_write, is_standard};
use crate::terminal::{INTERRUPTED, Result, catch_interrupts, counted, grouped, note, say};
use crate::trained::Trained;

/// Get the files back that `pixelcnn compress` made an archive of.
///
/// The model that coded the pictures is found where it is part of this program or in the archive; any other
/// is to be named. Pictures that the model coded are written as PNG files, all else as it was. Where the
/// archive is damaged, what is whole is written and the rest named.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(
    override_usage = "pixelcnn decompress [OPTIONS] [RUN|FILE] <FILE.pxc> -o <DIR>\n       \
                            pixelcnn decompress --list <FILE.pxc>"
)]
pub struct Decompress {
    /// Run folder, checkpoint file or exported weights, the same model as in compressing [default:
    /// found by the archive's hash, in the archive or in this program]; then the archive, or - for
    /// standard input
    #[arg(value_name = "FILES", required = true)]
    files: Vec<PathBuf>,
    /// Folder for the files; those that an earlier run has written there are not written again.
    /// - for standard output, of one file
    #[arg(long, short, value_name = "DIR", required_unless_present = "list")]
    output: Option<PathBuf>,
    /// Only the files of these names
    #[arg(long, value_name = "NAME", num_args = 1..)]
    only: Vec<String>,
    /// Show the names and how many bytes each takes; needs no model
    #[arg(long, conflicts_with_all = ["output", "only"])]
    list: bool,
    #[command(flatten)]
    overwrite: Overwrite,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn decompress photos.pxc -o photos
  pixelcnn decompress runs/quick-1 photos.pxc -o some --only cats/1.png cats/7.png
      two of them, without reading the others
  curl https://example.org/photos.pxc | pixelcnn decompress - -o photos
      files are written while the rest is still on its way
  pixelcnn decompress --list photos.pxc
      what is in it";

/// An archive that is being unpacked.
struct Unpacking<'a> {
    command: &'a Decompress,
    /// What is read, in words.
    path: String,
    reader: Reader<Box<dyn Source>>,
    /// Those of a file are all known before anything is written.
    blocks: VecDeque<Block>,
    names: FileNames,
    /// The model, once a picture needs it, or why there is none.
    model: Option<std::result::Result<CodingModel, String>>,
    /// Names that are asked for and were not seen yet.
    missing: Vec<String>,
    done: Done,
}

/// What was done.
#[derive(Default)]
struct Done {
    written: usize,
    there: usize,
    wanted: usize,
    levels: u64,
    /// Pictures for which there is no model, and why.
    without_model: usize,
    reason: String,
}

impl Decompress {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let (named, files) = Trained::named_first(&self.files)?;
        let [path] = files else {
            return Err("give one archive that `pixelcnn compress` made".into());
        };
        let is_pipe = is_standard(path);
        let shown = match is_pipe {
            true => "standard input".to_owned(),
            false => path.display().to_string(),
        };
        let source: Box<dyn Source> = match is_pipe {
            true => Box::new(Pipe::new(io::stdin())),
            false => {
                Box::new(File::open(path).map_err(|error| of(&shown, ArchiveError::Read(error)))?)
            }
        };
        let reader = Reader::new(source).map_err(|error| of(&shown, error))?;
        let mut unpacking = Unpacking {
            command: &self,
            path: shown.clone(),
            reader,
            blocks: VecDeque::new(),
            names: FileNames::default(),
            model: None,
            missing: self.only.clone(),
            done: Done::default(),
        };
        if self.list {
            return unpacking.list();
        }
        // Named by the user it must be there, whatever is in the archive.
        if let Some(named) = named {
            unpacking.model = Some(Ok(coder(&Trained::open(Some(named), "decompress")?)?));
        }
        if is_pipe && unpacking.to_standard() && self.only.len() != 1 {
            return Err("-o -: standard output takes one file: name it with --only".into());
        }
        catch_interrupts("leaving after this row")?;
        unpacking.run(is_pipe)
    }
}

/// An error of an archive.
fn of(path: &str, error: ArchiveError) -> Box<dyn std::error::Error> {
    format!("{path}: {error}").into()
}

fn coder(trained: &Trained) -> Result<CodingModel> {
    trained.expect_likelihood_of_images("decompress")?;
    trained.coder()
}

/// Where the items of a block are written to, and which of those that are wanted are there already.
struct Targets {
    files: Vec<PathBuf>,
    there: HashSet<usize>,
}

impl Unpacking<'_> {
    fn next(&mut self) -> Result<Option<Block>> {
        if let Some(block) = self.blocks.pop_front() {
            return Ok(Some(block));
        }
        self.reader
            .next_block()
            .map_err(|error| of(&self.path, error))
    }

    fn list(mut self) -> Result<ExitCode> {
        while let Some(block) = self.next()? {
            for Entry { name, bytes, .. } in block.entries() {
                say(format_args!("{bytes:>10}  {name}"))?;
            }
        }
        Ok(match self.is_all() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    fn run(mut self, is_pipe: bool) -> Result<ExitCode> {
        let start = Instant::now();
        let mut targets = VecDeque::new();
        if !is_pipe {
            let mut known = VecDeque::new();
            while let Some(block) = self.next()? {
                known.push_back(block);
            }
            self.blocks = known;
            targets = self.check()?;
        }
        let wanted = self.blocks.iter().flat_map(Block::entries);
        let wanted = wanted.filter(|entry| self.wants(&entry.name));
        let total = wanted.map(work).fold(0, u64::saturating_add);
        let mut shown = progress("decompressing".into(), total);
        let mut before = 0;
        while let Some(block) = self.next()? {
            let entries = block.entries();
            self.missing
                .retain(|name| entries.iter().all(|entry| entry.name != *name));
            let mut items = self.wanted(&block);
            let Targets { files, there } = match targets.pop_front() {
                Some(targets) => targets,
                None => {
                    let files = self.files(entries.iter());
                    self.targets(&block, files, &items)
                }
            };
            self.done.wanted += items.len();
            // What an earlier run has written is not written again.
            self.done.there += there.len();
            items.retain(|item| !there.contains(item));
            let pictures = items.iter().filter(|&&item| entries[item].size.is_some());
            let pictures = pictures.count();
            if pictures > 0
                && let Err(reason) = self.find_model()
            {
                self.done.without_model += pictures;
                self.done.reason = reason;
                items.retain(|&item| entries[item].size.is_none());
            }
            let here: u64 = items.iter().map(|&item| work(&entries[item])).sum();
            let model = self.model.as_ref().and_then(|model| model.as_ref().ok());
            let mut progress = |share: f64| shown(before + (share * here as f64) as u64);
            let found = match self.reader.decode(&block, &items, model, &mut progress) {
                Err(ArchiveError::Codec(CodecError::Stopped(_))) => {
                    note(format_args!(
                        "pixelcnn: interrupted: {} written; the same command goes on",
                        counted(self.done.written, "file")
                    ));
                    return Ok(ExitCode::from(INTERRUPTED));
                }
                found => found.map_err(|error| of(&self.path, error))?,
            };
            for (&item, found) in items.iter().zip(found) {
                let saved = match found {
                    Ok(found) => self.save(&found, &files[item]),
                    Err(damage) => Err(format!("{} is {damage}", entries[item].name).into()),
                };
                match saved {
                    Ok(()) => {
                        self.done.written += 1;
                        self.done.levels += entries[item].levels;
                    }
                    Err(error) => note(format_args!("pixelcnn: {}: {error}", self.path)),
                }
            }
            before += here;
        }
        drop(shown);
        self.finish(start.elapsed().as_secs_f64())
    }

    fn wants(&self, name: &str) -> bool {
        self.command.only.is_empty() || self.command.only.iter().any(|only| only == name)
    }

    fn to_standard(&self) -> bool {
        self.command.output.as_deref().is_some_and(is_standard)
    }

    /// The items of a block that are wanted.
    fn wanted(&self, block: &Block) -> Vec<usize> {
        let entries = block.entries().iter().enumerate();
        let wanted = entries.filter(|(_, entry)| self.wants(&entry.name));
        wanted.map(|(item, _)| item).collect()
    }

    /// Finds which of the items that are wanted are in their files already.
    fn targets(&self, block: &Block, files: Vec<PathBuf>, items: &[usize]) -> Targets {
        let there = match self.to_standard() {
            true => HashSet::new(),
            false => block.those_there(&files, items),
        };
        Targets { files, there }
    }

    /// The files that entries are written to.
    fn files<'b>(&mut self, entries: impl Iterator<Item = &'b Entry>) -> Vec<PathBuf> {
        let folder = self.command.output.clone().unwrap_or_default();
        let entries: Vec<&Entry> = entries.collect();
        let items = entries
            .iter()
            .map(|entry| (&entry.name[..], entry.size.is_some()));
        let names = self.names.of(items);
        for (entry, name) in entries.iter().zip(&names) {
            if entry.size.is_none() && entry.name != *name && self.wants(&entry.name) {
                note(format_args!(
                    "{} is written as {name}: there is another file of its name, or there can be none here",
                    entry.name
                ));
            }
        }
        names.into_iter().map(|name| folder.join(name)).collect()
    }

    /// Checks before anything is written that all that is asked for can be; gives the blocks' targets.
    fn check(&mut self) -> Result<VecDeque<Targets>> {
        let blocks = std::mem::take(&mut self.blocks);
        let mut files = self
            .files(blocks.iter().flat_map(Block::entries))
            .into_iter();
        let (mut all, mut wanted, mut pictures) = (VecDeque::new(), 0, 0);
        for block in &blocks {
            let entries = block.entries();
            self.missing
                .retain(|name| entries.iter().all(|entry| entry.name != *name));
            let items = self.wanted(block);
            wanted += items.len();
            let is_picture = |item: &&usize| entries[**item].size.is_some();
            pictures += items.iter().filter(is_picture).count();
            let files = files.by_ref().take(entries.len()).collect();
            let targets = self.targets(block, files, &items);
            if !self.to_standard() {
                for item in items.iter().filter(|item| !targets.there.contains(item)) {
                    self.command.overwrite.expect_free(&targets.files[*item])?;
                }
            }
            all.push_back(targets);
        }
        self.blocks = blocks;
        if let Some(name) = self.missing.first() {
            return Err(format!("--only {name}: not in {}: see --list", self.path).into());
        }
        if self.to_standard() && wanted != 1 {
            return Err(format!(
                "-o -: standard output takes one file, and there are {wanted}: name it with --only"
            )
            .into());
        }
        // Files that are kept as they were come out without one.
        if pictures == wanted && pictures > 0 {
            self.find_model()?;
        }
        Ok(all)
    }

    /// The model that was named, or is in the archive or in this program.
    fn find_model(&mut self) -> std::result::Result<(), String> {
        if self.model.is_none() {
            self.model = Some(self.unnamed_model());
        }
        let checked = match &self.model {
            Some(Ok(model)) => self.reader.expect_model(model).map_err(|e| e.to_string()),
            Some(Err(reason)) => return Err(reason.clone()),
            None => Ok(()),
        };
        checked.map_err(|reason| format!("{}: {reason}", self.path))
    }

    fn unnamed_model(&self) -> std::result::Result<CodingModel, String> {
        let found = self.reader.find_model();
        let found = found.map_err(|error| format!("{}: {error}", self.path))?;
        let model = found.ok_or_else(|| {
            format!(
                "{}: made with the model {}, which is neither in it nor in this program: name that model first",
                self.path,
                self.reader.model()
            )
        })?;
        coder(&Trained::exported(model)).map_err(|error| error.to_string())
    }

    fn save(&self, found: &Found, target: &Path) -> Result {
        if self.to_standard() {
            let mut out = io::stdout().lock();
            out.write_all(&found.bytes)?;
            return Ok(out.flush()?);
        }
        self.command.overwrite.prepare(target)?;
        let written = atomic::write(target, |file| file.write_all(&found.bytes));
        Ok(written.map_err(|error| cannot_write(target, &error))?)
    }

    /// Whether nothing of the archive was lost; says so if not.
    fn is_all(&self) -> bool {
        let (path, unknown) = (&self.path, grouped(self.reader.unknown()));
        if !self.reader.is_whole() {
            let lost = match self.reader.unknown() {
                0 => String::new(),
                _ => format!(" ({unknown} bytes are lost or not its own)"),
            };
            note(format_args!(
                "pixelcnn: {path}: damaged or cut off{lost}: files may be missing: get it once more from \
                 where it is whole"
            ));
        } else if self.reader.unknown() > 0 {
            note(format_args!(
                "{path}: {unknown} bytes follow the end of the archive and are not read: if they are another \
                 one, give it a file of its own"
            ));
        }
        if self.reader.newer() > 0 {
            note(format_args!(
                "pixelcnn: {path}: {} in it can be read by a newer program alone: take one",
                counted(self.reader.newer(), "block")
            ));
        }
        self.reader.is_whole() && self.reader.newer() == 0
    }

    fn finish(self, seconds: f64) -> Result<ExitCode> {
        let (is_all, to_standard) = (self.is_all(), self.to_standard());
        for name in &self.missing {
            note(format_args!(
                "pixelcnn: --only {name}: not in {}",
                self.path
            ));
        }
        let Done {
            written,
            there,
            wanted,
            levels,
            without_model,
            reason,
        } = self.done;
        if without_model > 0 {
            note(format_args!(
                "pixelcnn: {} not written: {reason}",
                counted(without_model, "picture")
            ));
        }
        let before = match there {
            0 => String::new(),
            there => format!(", {} there already", grouped(there as u64)),
        };
        let speed = match levels {
            0 => String::new(),
            levels => format!(", {:.3} MB/s", levels as f64 / 1e6 / seconds),
        };
        let said = format!(
            "{} of {} written{before}{speed}",
            grouped(written as u64),
            counted(wanted, "file"),
        );
        match to_standard {
            true => note(said),
            false => say(said)?,
        }
        // Of what is named, nothing else matters.
        let found = written + there == wanted && self.missing.is_empty();
        Ok(match found && (is_all || !self.command.only.is_empty()) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

/// How much an entry is to read and to compute.
fn work(entry: &Entry) -> u64 {
    entry.bytes + entry.levels
}
