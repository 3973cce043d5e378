//! The files in a folder, and what else is there.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use walkdir::{DirEntry, WalkDir};

use super::DataError;

/// What is in a folder, at any depth.
#[derive(Debug, Default)]
pub struct Walk {
    /// The paths of the files that are wanted, in the order of their names' bytes.
    pub files: Vec<PathBuf>,
    /// The folders' paths.
    pub folders: Vec<PathBuf>,
    /// What is left out.
    pub left_out: LeftOut,
}

/// What is in a folder or archive beside what is wanted, and therefore left out: how many files of
/// each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LeftOut(BTreeMap<String, usize>);

/// So many kinds are told of one by one.
const KINDS: usize = 8;

impl LeftOut {
    /// Counts one of a kind.
    pub(crate) fn add(&mut self, kind: &str) {
        *self.0.entry(kind.into()).or_default() += 1;
    }

    /// Counts a file that is not wanted by its name.
    pub(crate) fn add_file(&mut self, name: &Path) {
        match name.extension() {
            Some(extension) => {
                let extension = extension.to_string_lossy().to_lowercase();
                self.add(&crate::one_line(format!(".{extension}")));
            }
            None => self.add("without an extension"),
        }
    }

    /// Whether nothing was left out.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many were left out.
    pub fn count(&self) -> usize {
        self.0.values().sum()
    }
}

/// For example `5 files are left out: 3 .txt, 1 .heic, 1 hidden`.
impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, verb) = match self.count() {
            1 => ("1 file".to_owned(), "is"),
            count => (format!("{count} files"), "are"),
        };
        let mut kinds: Vec<(&String, usize)> = self.0.iter().map(|(k, &n)| (k, n)).collect();
        kinds.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
        let others: usize = kinds.iter().skip(KINDS).map(|(_, count)| count).sum();
        let said = kinds.iter().take(KINDS);
        let mut said: Vec<_> = said
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        if others > 0 {
            said.push(format!("{others} of other kinds"));
        }
        write!(f, "{count} {verb} left out: {}", said.join(", "))
    }
}

/// Whether a name is a hidden file's or folder's.
pub(crate) fn is_hidden(name: &str) -> bool {
    name.starts_with('.')
}

/// Whether a name is of what systems put beside people's files: nobody misses it.
pub(crate) fn is_litter(name: &str) -> bool {
    name == "__MACOSX"
        || name == ".DS_Store"
        || name.starts_with("._")
        || name.eq_ignore_ascii_case("thumbs.db")
        || name.eq_ignore_ascii_case("desktop.ini")
}

/// Looks through a folder for files that are `wanted` by their names: links are followed, what is hidden is left
/// out.
///
/// # Errors
/// [`DataError::Io`] where a folder cannot be read.
pub fn walk(folder: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Walk, DataError> {
    let mut found = Walk::default();
    let mut hidden = LeftOut::default();
    let walk = WalkDir::new(folder).min_depth(1).follow_links(true);
    let seen = |entry: &DirEntry| {
        let name = entry.file_name().to_string_lossy();
        if is_hidden(&name) && !is_litter(&name) {
            hidden.add("hidden");
        }
        !is_hidden(&name) && !is_litter(&name)
    };
    for entry in walk.into_iter().filter_entry(seen) {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) if error.loop_ancestor().is_some() => {
                found.left_out.add("link to a folder around it");
                continue;
            }
            Err(error) if error.path().is_some_and(Path::is_symlink) => {
                found.left_out.add("broken link");
                continue;
            }
            Err(error) => {
                let path = error.path().unwrap_or(folder).to_owned();
                return Err(DataError::Io {
                    path,
                    source: error.into(),
                });
            }
        };
        let kind = entry.file_type();
        if kind.is_dir() {
            found.folders.push(entry.into_path());
        } else if !kind.is_file() {
            found.left_out.add("pipe, socket or device");
        } else if wanted(entry.path()) {
            found.files.push(entry.into_path());
        } else {
            found.left_out.add_file(entry.path());
        }
    }
    for (kind, count) in hidden.0 {
        *found.left_out.0.entry(kind).or_default() += count;
    }
    found.files.sort();
    Ok(found)
}
