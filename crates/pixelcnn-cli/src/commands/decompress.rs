//! `pixelcnn decompress`.

use std::collections::VecDeque;
use std::fs::{self, File};
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
use crate::output::{Overwrite, is_standard};
use crate::terminal::{INTERRUPTED, Result, catch_interrupts, counted, grouped, note, say};
use crate::trained::Trained;

/// Get the files back that `pixelcnn compress` made an archive of.
///
/// It takes the same model, unless that is in the archive. Pictures that the model coded are written as
/// PNG files, all else as it was. Where the archive is damaged, what is whole is written and the rest
/// named.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
#[command(
    override_usage = "pixelcnn decompress [OPTIONS] [RUN|FILE] <FILE.pxc> -o <DIR>\n       \
                            pixelcnn decompress --list <FILE.pxc>"
)]
pub struct Decompress {
    /// Run folder, checkpoint file or exported weights, the same model as in compressing [default:
    /// the one in the archive, or the shipped model]; then the archive, or - for standard input
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
      each as soon as it is there
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
    /// The model, once a picture needs it.
    model: Option<CodingModel>,
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
            unpacking.model = Some(coder(&Trained::open(Some(named), "decompress")?)?);
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
    Ok(CodingModel::new(
        trained.model(),
        trained.parameters(false)?,
    )?)
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
        // Each entry's name, whether a PNG file is made of it, and how many of a block.
        let mut files: VecDeque<Vec<PathBuf>> = VecDeque::new();
        if !is_pipe {
            let mut blocks = VecDeque::new();
            while let Some(block) = self.next()? {
                blocks.push_back(block);
            }
            let entries: Vec<Entry> = blocks.iter().flat_map(Block::entries).collect();
            let mut targets = self.targets(&entries).into_iter();
            for block in &blocks {
                files.push_back(targets.by_ref().take(block.entries().len()).collect());
            }
            self.blocks = blocks;
            self.check(&files)?;
        }
        let total = self.blocks.iter().flat_map(Block::entries);
        let total = total
            .filter(|entry| self.wants(&entry.name))
            .map(|entry| work(&entry));
        let mut shown = progress("decompressing".into(), total.sum());
        let mut before = 0;
        while let Some(block) = self.next()? {
            let entries: Vec<Entry> = block.entries().collect();
            let targets = match files.pop_front() {
                Some(targets) => targets,
                None => self.targets(&entries),
            };
            self.missing
                .retain(|name| entries.iter().all(|entry| entry.name != *name));
            let mut items = Vec::new();
            for (item, entry) in entries.iter().enumerate() {
                if !self.wants(&entry.name) {
                    continue;
                }
                self.done.wanted += 1;
                // What an earlier run has written is not written again.
                match fs::read(&targets[item]).is_ok_and(|file| block.is(item, &file)) {
                    true => self.done.there += 1,
                    false => items.push(item),
                }
            }
            let here: u64 = items.iter().map(|&item| work(&entries[item])).sum();
            let is_picture = |&item: &usize| entries[item].size.is_some();
            if items.iter().any(is_picture) {
                self.find_model()?;
            }
            let mut progress = |share: f64| shown(before + (share * here as f64) as u64);
            let found = match self
                .reader
                .decode(&block, &items, self.model.as_ref(), &mut progress)
            {
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
                    Ok(found) => self.save(&found, &targets[item]),
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

    /// The files that entries are written to.
    fn targets(&mut self, entries: &[Entry]) -> Vec<PathBuf> {
        let folder = self.command.output.clone().unwrap_or_default();
        let items = entries
            .iter()
            .map(|entry| (&entry.name[..], entry.size.is_some()));
        let names = self.names.of(items).into_iter();
        names.map(|name| folder.join(name)).collect()
    }

    /// Checks before anything is written that all that is asked for can be.
    fn check(&mut self, files: &VecDeque<Vec<PathBuf>>) -> Result {
        let (mut wanted, mut has_pictures) = (Vec::new(), false);
        for (block, targets) in self.blocks.iter().zip(files) {
            for (item, entry) in block.entries().enumerate() {
                self.missing.retain(|name| *name != entry.name);
                if self.wants(&entry.name) {
                    has_pictures |= entry.size.is_some();
                    wanted.push((block, item, targets[item].clone()));
                }
            }
        }
        if let Some(name) = self.missing.first() {
            return Err(format!("--only {name}: not in {}: see --list", self.path).into());
        }
        if self.to_standard() {
            return match wanted.len() {
                1 => Ok(()),
                count => Err(format!(
                    "-o -: standard output takes one file, and there are {count}: name it with --only"
                )
                .into()),
            };
        }
        for (block, item, target) in &wanted {
            if self.command.overwrite.expect_free(target).is_err()
                && !fs::read(target).is_ok_and(|file| block.is(*item, &file))
            {
                self.command.overwrite.expect_free(target)?;
            }
        }
        match has_pictures {
            true => self.find_model(),
            false => Ok(()),
        }
    }

    /// The model that was named, or is in the archive, or the shipped one.
    fn find_model(&mut self) -> Result {
        let model = match self.model.take() {
            Some(model) => model,
            None => match self
                .reader
                .embedded()
                .map_err(|error| of(&self.path, error))?
            {
                Some(model) => coder(&Trained::exported(model))?,
                None => coder(&Trained::open(None, "decompress")?)?,
            },
        };
        self.reader
            .expect_model(&model)
            .map_err(|error| of(&self.path, error))?;
        self.model = Some(model);
        Ok(())
    }

    fn save(&self, found: &Found, target: &Path) -> Result {
        if self.to_standard() {
            let mut out = io::stdout().lock();
            out.write_all(&found.bytes)?;
            return Ok(out.flush()?);
        }
        self.command.overwrite.prepare(target)?;
        atomic::write(target, |file| file.write_all(&found.bytes)).map_err(|error| {
            let target = target.display();
            format!("cannot write `{target}`: {error}: make room or choose another folder").into()
        })
    }

    /// Whether nothing of the archive was lost; says so if not.
    fn is_all(&self) -> bool {
        let [path, unknown] = [self.path.to_string(), grouped(self.reader.unknown())];
        if !self.reader.is_whole() {
            note(format_args!(
                "pixelcnn: {path}: damaged or cut off ({unknown} bytes are lost or not its own): files may be \
                 missing: get it once more from where it is whole"
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
        let is_all = self.is_all();
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
        } = self.done;
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
        match self.to_standard() {
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
