//! Maps of codes, such as a VQ-VAE's, in NumPy's `.npy` and `.npz` files.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;

use pixelcnn_core::ModelConfig;
use pixelcnn_core::config::MAX_CODES;

use super::arrays::{Header, Npz, Part, note_unused};
use super::{DataConfig, DataError, Dataset, Images, Listener, Split, hold_out};
use crate::atomic;
use crate::numpy::npy;

/// What arrays of codes are called, the likeliest first; the last stands for `train` and `test` alone.
const OWN: [&str; 9] = [
    "codes", "code", "indices", "tokens", "bottom", "x", "data", "samples", "",
];
/// What those of the coarser maps are called.
const COARSE: [&str; 2] = ["coarse", "top"];

/// Some maps of codes of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeMaps {
    /// Number of maps, rows and columns of each.
    pub shape: [usize; 3],
    /// \[N, H, W\].
    pub codes: Vec<u16>,
}

impl CodeMaps {
    /// Reads a `.npy` file of whole numbers from 0 to 65,535, of any type: \[N, H, W\], or a single map
    /// \[H, W\].
    ///
    /// # Errors
    /// Where it can't be read or holds something else.
    pub fn read(path: &Path) -> Result<CodeMaps, DataError> {
        let bad = |problem| DataError::Array {
            path: path.to_owned(),
            problem,
        };
        let file = File::open(path).map_err(DataError::io(path))?;
        let size = file.metadata().map_err(DataError::io(path))?.len();
        let mut file = BufReader::new(file);
        let header = Header::read(&mut file).map_err(bad)?;
        header.expect_end(size).map_err(bad)?;
        let mut maps = Reader::new(&header).map_err(bad)?;
        io::copy(&mut file, &mut maps).map_err(DataError::io(path))?;
        maps.finish().map_err(bad)
    }

    /// Writes a `.npy` file, whole or not at all: uint16 \[N, H, W\].
    ///
    /// # Errors
    /// The system's.
    pub fn write(&self, path: &Path) -> Result<(), DataError> {
        let file = npy(&self.shape, &self.codes);
        let written = file.and_then(|file| atomic::write(path, |w| w.write_all(&file)));
        written.map_err(DataError::io(path))
    }

    /// The number of codes that there are at least: the largest and one.
    pub fn nr_codes(&self) -> usize {
        self.codes
            .iter()
            .max()
            .map_or(0, |&most| usize::from(most) + 1)
    }

    /// The codes of images as a model gives them, [`ModelConfig::bytes_per_image`] each.
    pub fn of_images(config: &ModelConfig, images: &[u8]) -> CodeMaps {
        let pixels = images.chunks_exact(config.bytes_per_pixel());
        let codes: Vec<u16> = pixels
            .map(|pixel| ModelConfig::code(pixel, 0) as u16)
            .collect();
        let [height, width] = [config.height, config.width];
        CodeMaps {
            shape: [codes.len() / (height * width), height, width],
            codes,
        }
    }

    /// These maps, and over them the coarser ones where there are some, as a model takes them.
    ///
    /// # Errors
    /// What is wrong with the coarser maps, where they do not lie over these.
    pub fn images(&self, coarse: Option<&CodeMaps>) -> Result<Vec<u8>, String> {
        let Some(coarse) = coarse else {
            return Ok(self
                .codes
                .iter()
                .flat_map(|code| code.to_le_bytes())
                .collect());
        };
        let factor = factor(self.shape, coarse.shape)?;
        let [count, height, width] = self.shape;
        let mut images = Vec::with_capacity(4 * self.codes.len());
        for map in 0..count {
            for y in 0..height {
                let row = (map * height + y) * width;
                for x in 0..width {
                    images.extend(self.codes[row + x].to_le_bytes());
                    images.extend(coarse.at(map, y / factor, x / factor).to_le_bytes());
                }
            }
        }
        Ok(images)
    }

    fn at(&self, map: usize, y: usize, x: usize) -> u16 {
        let [_, height, width] = self.shape;
        self.codes[(map * height + y) * width + x]
    }
}

/// How many pixels one of a coarser map lies over, in each direction.
fn factor(own: [usize; 3], coarse: [usize; 3]) -> Result<usize, String> {
    let factor = own[1].checked_div(coarse[1]).unwrap_or_default();
    let fits = factor > 0 && [coarse[0], factor * coarse[1], factor * coarse[2]] == own;
    fits.then_some(factor).ok_or_else(|| {
        let [n, h, w] = coarse;
        let [count, height, width] = own;
        format!(
            "{n} coarser maps {w}x{h} do not lie over {count} maps {width}x{height}: both need as many, \
             and the sides of one to be the same multiple of the other's"
        )
    })
}

/// The maps of a split.
pub(super) struct Codes {
    own: CodeMaps,
    coarse: Option<CodeMaps>,
    factor: usize,
    /// The maps of this split, where there are more.
    pick: Option<Vec<usize>>,
}

impl Codes {
    pub fn len(&self) -> usize {
        self.pick.as_ref().map_or(self.own.shape[0], Vec::len)
    }

    /// Codes that there are at least, and coarser ones.
    pub fn counts(&self) -> [usize; 2] {
        let coarse = self.coarse.as_ref().map_or(0, CodeMaps::nr_codes);
        [self.own.nr_codes(), coarse]
    }

    pub fn bytes_per_pixel(&self) -> usize {
        2 + 2 * usize::from(self.coarse.is_some())
    }

    /// Reads map `index`, which is below `len()`, as a model takes it.
    pub fn read(&self, index: usize, image: &mut [u8]) {
        let map = self.pick.as_ref().map_or(index, |pick| pick[index]);
        let [_, _, width] = self.own.shape;
        let pixels = image.chunks_exact_mut(self.bytes_per_pixel());
        for (i, pixel) in pixels.enumerate() {
            let [y, x] = [i / width, i % width];
            pixel[..2].copy_from_slice(&self.own.at(map, y, x).to_le_bytes());
            if let Some(coarse) = &self.coarse {
                let code = coarse.at(map, y / self.factor, x / self.factor);
                pixel[2..].copy_from_slice(&code.to_le_bytes());
            }
        }
    }

    fn dataset(
        own: CodeMaps,
        coarse: Option<CodeMaps>,
        held_out: Option<f64>,
        split: Split,
        path: &Path,
    ) -> Result<Dataset, String> {
        let [count, height, width] = own.shape;
        let factor = match &coarse {
            Some(coarse) => factor(own.shape, coarse.shape)?,
            None => 1,
        };
        let indices = (0..count as u64).map(u64::to_le_bytes);
        let pick = held_out.map(|held_out| hold_out(indices, held_out, split));
        let images = Images::Codes(Codes {
            own,
            coarse,
            factor,
            pick,
        });
        let name = format!("{} {split}", path.display());
        Ok(Dataset::unlabelled(name, [height, width, 1], images))
    }
}

/// Opens a `.npy` file of codes.
pub(super) fn open_npy(path: &Path, held_out: f64, split: Split) -> Result<Dataset, DataError> {
    let own = CodeMaps::read(path)?;
    let dataset = Codes::dataset(own, None, Some(held_out), split, path);
    dataset.map_err(|problem| DataError::Array {
        path: path.to_owned(),
        problem,
    })
}

/// Opens a `.npz` file of codes, perhaps with coarser maps and labels.
pub(super) fn open_npz(
    path: &Path,
    config: &DataConfig,
    split: Split,
    listener: &mut Listener,
) -> Result<Dataset, DataError> {
    let mut npz = Npz::open(path)?;
    let find = |npz: &mut Npz, part: Part, words: &[&str]| -> Option<String> {
        let found = npz.find(part, words, |npz, name| npz.holds_codes(name))?;
        Some(found.0)
    };
    let mut of_part = |part| Some((part, find(&mut npz, part, &OWN)?));
    let [whole, train, validation, test] =
        [Part::Whole, Part::Train, Part::Validation, Part::Test].map(&mut of_part);
    let mut parts: Vec<(Part, String)> = [train.or(whole), test.or(validation)]
        .into_iter()
        .flatten()
        .collect();
    if parts.is_empty() {
        // A single array may be called anything.
        let mut all = npz.names();
        all.retain(|name| npz.holds_codes(name));
        let [only] = &all[..] else {
            let contents = npz.contents();
            return Err(npz.bad(format!(
                "holds {contents}: name the codes codes_train and codes_test, or codes, whole numbers \
                 [N, H, W]"
            )));
        };
        parts.push((Part::Whole, only.clone()));
    }
    let place = match split {
        Split::Train => 0,
        Split::Test => parts.len() - 1,
    };
    let sources = parts
        .iter()
        .map(|(part, own)| (own.clone(), npz.find_labels(*part)));
    let sources: Vec<(String, Option<String>)> = sources.collect();
    let (labels, nr_classes) = npz.labels_of(&sources, listener)?;
    // Of each part, where they are wanted.
    let coarse: Vec<Option<String>> = parts
        .iter()
        .map(|(part, _)| find(&mut npz, *part, &COARSE).filter(|_| config.codes > 1))
        .collect();
    let (_, name) = &parts[place];
    let own = npz.codes(name)?;
    let over = match &coarse[place] {
        Some(coarse) => Some(npz.codes(coarse)?),
        None if config.codes > 1 => {
            let contents = npz.contents();
            return Err(npz.bad(format!(
                "holds {contents}: no coarser maps for {name}: name them coarse_train and coarse_test, or \
                 coarse"
            )));
        }
        None => None,
    };
    let used = sources
        .iter()
        .flat_map(|(own, labels)| [Some(own), labels.as_ref()]);
    let used: Vec<&String> = used.flatten().chain(coarse.iter().flatten()).collect();
    let mut unused = npz.names();
    unused.retain(|name| !used.contains(&name));
    note_unused(path, &unused, listener)?;
    let count = own.shape[0];
    let held_out = (parts.len() == 1).then_some(config.held_out);
    let dataset = Codes::dataset(own, over, held_out, split, path);
    let mut dataset = dataset.map_err(|problem| npz.bad(problem))?;
    if let Some(labels) = labels.into_iter().nth(place).flatten() {
        if labels.len() != count {
            return Err(npz.bad(format!(
                "{count} maps in {name}, {} labels: both need as many",
                labels.len()
            )));
        }
        let Images::Codes(codes) = &dataset.images else {
            unreachable!("just made");
        };
        dataset.labels = match &codes.pick {
            Some(pick) => pick.iter().map(|&map| labels[map]).collect(),
            None => labels,
        };
        dataset.nr_classes = nr_classes;
    }
    Ok(dataset)
}

/// Takes the bytes of an array in, as they come.
pub(super) struct Reader<'a> {
    header: &'a Header,
    shape: [usize; 3],
    codes: Vec<u16>,
    /// The beginning of an item whose end has not come.
    rest: Vec<u8>,
    /// Whether all were codes so far.
    sound: bool,
}

impl Reader<'_> {
    pub fn new(header: &Header) -> Result<Reader<'_>, String> {
        let shape = header.codes()?;
        let mut codes = Vec::new();
        let count = shape
            .iter()
            .try_fold(1, |n: usize, &side| n.checked_mul(side));
        let reserved = count.map(|count| codes.try_reserve_exact(count));
        match reserved {
            Some(Ok(())) => Ok(Reader {
                header,
                shape,
                codes,
                rest: Vec::new(),
                sound: true,
            }),
            _ => Err(format!(
                "has shape {:?}: no memory for as many",
                header.shape
            )),
        }
    }

    pub fn finish(self) -> Result<CodeMaps, String> {
        if !self.sound {
            return Err(format!(
                "holds other numbers than codes, which are whole and from 0 to {}",
                MAX_CODES - 1
            ));
        }
        Ok(CodeMaps {
            shape: self.shape,
            codes: self.codes,
        })
    }
}

impl Write for Reader<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let item = self.header.item_bytes() as usize;
        let mut all = bytes;
        if !self.rest.is_empty() {
            let missing = (item - self.rest.len()).min(all.len());
            self.rest.extend(&all[..missing]);
            all = &all[missing..];
        }
        let (whole, rest) = all.split_at(all.len() - all.len() % item);
        let begun = std::mem::take(&mut self.rest);
        let begun_is_whole = begun.len() == item;
        let items = begun.chunks_exact(item).chain(whole.chunks_exact(item));
        for item in items {
            let code = self
                .header
                .number(item)
                .and_then(|code| u16::try_from(code).ok());
            self.sound &= code.is_some();
            self.codes.push(code.unwrap_or_default());
        }
        if !begun_is_whole {
            self.rest = begun;
        }
        self.rest.extend(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What tables of training codes make of others: a model is worth something where it needs clearly less.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Baselines {
    /// Bits per code by how often each occurs.
    pub histogram: f64,
    /// Bits per code by how often each follows the one to its left, or above at a row's beginning.
    pub bigram: f64,
}

/// Codes that tables are made of, and measured on, at most.
const MOST: usize = 1 << 24;

/// Makes tables of the codes of one data set and measures them on those of another, of up to 16 million
/// each; nothing where these are images.
///
/// Each code counts once more than it occurs in the histogram. The table of pairs is mixed with that as
/// Witten and Bell (1991) do: after a code that `t` different ones have been seen to follow, the histogram
/// has the weight of `t` occurrences.
///
/// # Errors
/// Where the codes can't be read.
pub fn baselines(train: &Dataset, test: &Dataset) -> Result<Option<Baselines>, DataError> {
    let [Some(own), Some(others)] = [train, test].map(Dataset::codes) else {
        return Ok(None);
    };
    let mut histogram = vec![1u64; own[0].max(others[0])];
    let mut pairs: HashMap<(u16, u16), u64> = HashMap::new();
    let mut followed = vec![[0u64; 2]; histogram.len()];
    each_code(train, |before, code| {
        histogram[usize::from(code)] += 1;
        if let Some(before) = before {
            let count = pairs.entry((before, code)).or_default();
            let [times, different] = &mut followed[usize::from(before)];
            *times += 1;
            *different += u64::from(*count == 0);
            *count += 1;
        }
    })?;
    let total: u64 = histogram.iter().sum();
    let [mut codes, mut alone, mut paired] = [0.0; 3];
    each_code(test, |before, code| {
        let by_histogram = histogram[usize::from(code)] as f64 / total as f64;
        let by_pair = before.map_or(by_histogram, |before| {
            let [times, different] = followed[usize::from(before)].map(|n| n as f64);
            let count = pairs
                .get(&(before, code))
                .map_or(0.0, |&count| count as f64);
            match times + different {
                0.0 => by_histogram,
                all => (count + different * by_histogram) / all,
            }
        });
        codes += 1.0;
        alone -= by_histogram.log2();
        paired -= by_pair.log2();
    })?;
    Ok(Some(Baselines {
        histogram: alone / codes,
        bigram: paired / codes,
    }))
}

/// Calls `f` with every code, and the one before it: to its left, or above at a row's beginning.
fn each_code(data: &Dataset, mut f: impl FnMut(Option<u16>, u16)) -> Result<(), DataError> {
    let (mut image, mut labels) = (Vec::new(), Vec::new());
    let width = data.width();
    let bytes = data.bytes_per_pixel();
    let most = MOST / (width * data.height());
    for map in 0..data.len().min(most.max(1)) {
        data.read(&[map], &mut image, &mut labels)?;
        let code = |pixel: usize| ModelConfig::code(&image[pixel * bytes..], 0) as u16;
        for pixel in 0..image.len() / bytes {
            let before = match pixel % width {
                0 => pixel.checked_sub(width),
                _ => Some(pixel - 1),
            };
            f(before.map(code), code(pixel));
        }
    }
    Ok(())
}
