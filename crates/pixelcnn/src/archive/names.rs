//! Names of what is in an archive: relative paths, which lead nowhere else, take little room beside one
//! another, and become those of files.

use std::collections::HashSet;
use std::path::{Component, Path};

use super::ArchiveError;
use super::fields::{Fields, varint};
use crate::picture::is_picture;

/// The longest name, in bytes.
pub(super) const MAX_NAME: usize = 255;

/// Checks a name: whoever writes files by these names writes into the folder of his choice and nowhere else.
pub(super) fn check_name(name: &str) -> Result<(), ArchiveError> {
    let mut parts = name.split('/');
    // What this system takes for a path of several parts, a drive or a parent counts as well.
    let mut components = Path::new(name).components();
    let problem = if name.len() > MAX_NAME {
        "a name over 255 bytes: shorten it"
    } else if name.chars().any(char::is_control) {
        "a control character in a name: rename the file"
    } else if parts.any(|part| matches!(part, "" | "." | ".."))
        || components.any(|part| !matches!(part, Component::Normal(_)))
    {
        "not a relative path of a file: rename it"
    } else {
        return Ok(());
    };
    Err(ArchiveError::Name {
        name: name.into(),
        problem,
    })
}

/// Files that items are written to.
#[derive(Debug, Default)]
pub struct FileNames {
    taken: HashSet<String>,
}

impl FileNames {
    /// The names of the files that items are written to, given theirs and whether a PNG file is made of them:
    /// no two the same, and none that was given before. A PNG file has the item's name where that ends so, or
    /// with this ending instead of a picture's, or with it behind its own, or numbered; the others have
    /// the items' names, or those numbered. No part is over 255 bytes.
    pub fn of<'a>(&mut self, items: impl Iterator<Item = (&'a str, bool)> + Clone) -> Vec<String> {
        // Where the system takes them for one, names that differ in case alone meet as well.
        let folded = |name: &str| match cfg!(any(windows, target_os = "macos")) {
            true => name.to_lowercase(),
            false => name.to_owned(),
        };
        let taken = &mut self.taken;
        for (name, _) in items.clone() {
            let folders = name.match_indices('/').map(|(at, _)| folded(&name[..at]));
            taken.extend(folders);
        }
        let is_png = |name: &str| {
            let extension = Path::new(name).extension().unwrap_or_default();
            extension.eq_ignore_ascii_case("png")
        };
        let own = |(name, is_made): (&str, bool)| {
            let keeps = !is_made || is_png(name);
            (keeps && taken.insert(folded(name))).then(|| name.to_owned())
        };
        let mut files: Vec<Option<String>> = items.clone().map(own).collect();
        for ((name, is_made), file) in items.zip(&mut files) {
            if file.is_some() {
                continue;
            }
            let file_start = name.rfind('/').map_or(0, |at| at + 1);
            let dot = name.rfind('.').filter(|&dot| dot > file_start);
            let (stem, own_end) = name.split_at(dot.unwrap_or(name.len()));
            let (short, end) = match is_made {
                false => (stem, own_end),
                true if is_picture(Path::new(name)) => (stem, ".png"),
                true => (name, ".png"),
            };
            let longer = is_made.then(|| cut(name, end));
            let first = std::iter::once(cut(short, end)).chain(longer);
            let mut all = first.chain((2..).map(|n| cut(short, &format!("-{n}{end}"))));
            *file = all.find(|file| taken.insert(folded(file)));
        }
        files.into_iter().flatten().collect()
    }
}

/// A file's name with an end, its last part cut to what systems take.
fn cut(stem: &str, end: &str) -> String {
    let start = stem.rfind('/').map_or(0, |at| at + 1);
    let mut cut = stem.len().min(start + MAX_NAME.saturating_sub(end.len()));
    while !stem.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}{end}", &stem[..cut])
}

/// Names told apart: where two are the same, the later ones get a number before their extension.
pub fn distinct_names(names: Vec<String>) -> Vec<String> {
    let mut taken: HashSet<String> = names.iter().cloned().collect();
    let mut seen = HashSet::new();
    let distinct = names.into_iter().map(|name| {
        if seen.insert(name.clone()) {
            return name;
        }
        let file = name.rfind('/').map_or(0, |at| at + 1);
        let dot = name.rfind('.').filter(|&dot| dot > file);
        let (stem, extension) = name.split_at(dot.unwrap_or(name.len()));
        let mut numbered = (2..).map(|n| format!("{stem}-{n}{extension}"));
        numbered
            .find(|name| taken.insert(name.clone()))
            .unwrap_or(name)
    });
    distinct.collect()
}

/// The name whose last number is one higher, in as many digits.
pub(super) fn successor(name: &str) -> Option<String> {
    let mut bytes = name.as_bytes().to_vec();
    let last = bytes.iter().rposition(u8::is_ascii_digit)?;
    for digit in bytes[..=last].iter_mut().rev() {
        match digit {
            b'9' => *digit = b'0',
            b'0'..=b'8' => {
                *digit += 1;
                return String::from_utf8(bytes).ok();
            }
            _ => return None,
        }
    }
    None
}

pub(super) fn write_name(index: &mut Vec<u8>, before: &str, name: &str) {
    if successor(before).as_deref() == Some(name) {
        return index.push(0);
    }
    let pairs = before.bytes().zip(name.bytes());
    let shared = pairs.take_while(|(a, b)| a == b).count();
    let rest = &name.as_bytes()[shared..];
    varint(index, 1 + shared as u64);
    varint(index, rest.len() as u64);
    index.extend(rest);
}

pub(super) fn read_name(index: &mut Fields, before: &str) -> Option<String> {
    let Some(shared) = index.number()?.checked_sub(1) else {
        return successor(before);
    };
    let len = index.number()?;
    let rest = index.take(usize::try_from(len).ok()?)?;
    let shared = before.as_bytes().get(..usize::try_from(shared).ok()?)?;
    let name = [shared, rest].concat();
    String::from_utf8(name).ok().filter(|n| n.len() <= MAX_NAME)
}
