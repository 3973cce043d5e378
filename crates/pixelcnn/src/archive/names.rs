//! Names of what is in an archive: relative paths, which lead nowhere else, take little room beside one
//! another, and become those of files.

use std::collections::{HashMap, HashSet};
use std::path::{Component, Path};

use super::ArchiveError;
use super::fields::{Fields, varint};
use crate::picture::is_picture;

/// The longest name, and the longest part of it between two `/`, in bytes.
const MAX_NAME: usize = 4096;
pub(super) const MAX_PART: usize = 255;
/// A name's end is cut to so many bytes to be told apart by a number.
const STEM: usize = 200;

/// Checks a name, by the same rules everywhere: whoever writes files by these names writes into the folder of his
/// choice and nowhere else.
///
/// # Errors
/// [`ArchiveError::Name`].
pub fn check_name(name: &str) -> Result<(), ArchiveError> {
    let problem = if name.len() > MAX_NAME || name.split('/').any(|part| part.len() > MAX_PART) {
        "a name over 255 bytes, or a path over 4,096: shorten it"
    } else if name.chars().any(char::is_control) {
        "a control character in a name: rename the file"
    } else if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        "not a relative path of a file: rename it"
    } else {
        return Ok(());
    };
    Err(ArchiveError::Name {
        name: name.into(),
        problem,
    })
}

/// Checks a name that is to be none of those `seen`, and adds it to them.
pub(super) fn check_new_name(seen: &mut HashSet<String>, name: &str) -> Result<(), ArchiveError> {
    check_name(name)?;
    match seen.insert(name.into()) {
        true => Ok(()),
        false => Err(ArchiveError::Name {
            name: name.into(),
            problem: "two files of this name: rename one",
        }),
    }
}

/// The name as this system can have it: what it takes for a drive or for several parts becomes `_`.
fn here(name: &str) -> String {
    let mut components = Path::new(name).components();
    let count = name.split('/').count();
    let is_same = components.clone().count() == count
        && components.all(|component| matches!(component, Component::Normal(_)));
    match is_same {
        true => name.to_owned(),
        false => name.replace(|c: char| !c.is_alphanumeric() && !"/-_ ".contains(c), "_"),
    }
}

/// What follows a name's last dot is no end of it if it is longer.
const LONGEST_END: usize = 32;

/// Files that items are written to.
#[derive(Debug, Default)]
pub struct FileNames {
    taken: HashSet<String>,
    /// The last numbers that were given to names that begin and end so.
    numbers: HashMap<String, usize>,
}

impl FileNames {
    /// The names of the files that items are written to, given theirs and whether a PNG file is made of them:
    /// no two the same, and none that was given before. A PNG file has the item's name where that ends so, or
    /// with this ending instead of a picture's, or with it behind its own, or numbered; the others have
    /// the items' names, or those numbered. No part is over 255 bytes.
    pub fn of<'a>(&mut self, items: impl Iterator<Item = (&'a str, bool)>) -> Vec<String> {
        // Where the system takes them for one, names that differ in case alone meet as well.
        let folded = |name: &str| match cfg!(any(windows, target_os = "macos")) {
            true => name.to_lowercase(),
            false => name.to_owned(),
        };
        let items: Vec<(String, bool)> = items.map(|(name, made)| (here(name), made)).collect();
        let FileNames { taken, numbers } = self;
        for (name, _) in &items {
            let folders = name.match_indices('/').map(|(at, _)| folded(&name[..at]));
            taken.extend(folders);
        }
        let is_png = |name: &str| {
            let extension = Path::new(name).extension().unwrap_or_default();
            extension.eq_ignore_ascii_case("png")
        };
        let own = |(name, is_made): &(String, bool)| {
            let keeps = !is_made || is_png(name);
            (keeps && taken.insert(folded(name))).then(|| name.clone())
        };
        let mut files: Vec<Option<String>> = items.iter().map(own).collect();
        for ((name, is_made), file) in items.iter().zip(&mut files) {
            if file.is_some() {
                continue;
            }
            let (stem, own_end) = split_end(name);
            let (short, end) = match is_made {
                false => (stem, own_end),
                true if is_picture(Path::new(name)) => (stem, ".png"),
                true => (&name[..], ".png"),
            };
            let first = [
                Some(cut(short, end, MAX_PART)),
                is_made.then(|| cut(name, end, MAX_PART)),
            ];
            let mut first = first.into_iter().flatten();
            *file = first.find(|file| taken.insert(folded(file)));
            let number = numbers.entry(cut(short, end, STEM)).or_insert(1);
            while file.is_none() {
                *number += 1;
                let numbered = cut(short, &format!("-{number}{end}"), MAX_PART);
                *file = Some(numbered).filter(|file| taken.insert(folded(file)));
            }
        }
        files.into_iter().flatten().collect()
    }
}

/// A name up to the dot before its end, and from there on.
fn split_end(name: &str) -> (&str, &str) {
    let file = name.rfind('/').map_or(0, |at| at + 1);
    let dot = name.rfind('.').filter(|&dot| dot > file);
    let dot = dot.filter(|dot| name.len() - dot <= LONGEST_END);
    name.split_at(dot.unwrap_or(name.len()))
}

/// A file's name with an end, its last part cut to so many bytes.
fn cut(stem: &str, end: &str, most: usize) -> String {
    let start = stem.rfind('/').map_or(0, |at| at + 1);
    let mut cut = stem.len().min(start + most.saturating_sub(end.len()));
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
        let (stem, extension) = split_end(&name);
        let mut numbered = (2..).map(|n| cut(stem, &format!("-{n}{extension}"), MAX_PART));
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
