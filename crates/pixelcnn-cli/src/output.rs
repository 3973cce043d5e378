//! Where commands write: never over what is there, unless they are told to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use pixelcnn::atomic::is_replaced;

use crate::terminal::Result;

/// The flag of every command that writes files.
#[derive(Debug, Clone, Copy, Args)]
pub struct Overwrite {
    /// Write over files that are there already
    #[arg(long)]
    pub force: bool,
}

impl Overwrite {
    /// Checks before the long work that a file can be written, and makes its folder. Devices and
    /// pipes are written into.
    pub fn prepare(self, file: &Path) -> Result {
        self.expect_free(file)?;
        make_folder_of(file)
    }

    /// Checks that nothing is overwritten.
    pub fn expect_free(self, file: &Path) -> Result {
        if file.is_dir() {
            return Err(format!("`{}` is a folder: name a file", file.display()).into());
        }
        match !self.force && file.exists() && is_replaced(file) {
            true => Err(format!(
                "`{}` is there already: choose another name, or --force to write over it",
                file.display()
            )
            .into()),
            false => Ok(()),
        }
    }

    /// The name that was given, or the default one, which steps aside where it is taken: NAME-2.png
    /// and so on.
    pub fn or_free(self, given: &Option<PathBuf>, default: &str) -> PathBuf {
        if let Some(given) = given {
            return given.clone();
        }
        let (stem, end) = match default.rfind('.') {
            Some(dot) => default.split_at(dot),
            None => (default, ""),
        };
        let numbered = (2..).map(|n| PathBuf::from(format!("{stem}-{n}{end}")));
        let mut names = std::iter::once(PathBuf::from(default)).chain(numbered);
        names
            .find(|name| self.force || !is_there(name))
            .unwrap_or_default()
    }
}

/// What the system said when a file was to be written, and what to do.
pub fn cannot_write(file: &Path, error: &io::Error) -> String {
    let file = file.display();
    format!("cannot write `{file}`: {error}: make room or choose another folder")
}

/// Whether a file's name, `-`, stands for standard input or output.
pub fn is_standard(file: &Path) -> bool {
    file == Path::new("-")
}

/// Whether there is anything of this name, even a link that leads nowhere.
pub fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Makes the folder in which a file is to be, unless it is there.
pub fn make_folder_of(file: &Path) -> Result {
    make_folder(file.parent().unwrap_or(Path::new("")))
}

/// Makes a folder and those it is in, unless they are there.
pub fn make_folder(folder: &Path) -> Result {
    fs::create_dir_all(folder)
        .map_err(|error| format!("cannot make the folder `{}`: {error}", folder.display()).into())
}
