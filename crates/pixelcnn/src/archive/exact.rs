//! A picture taken out of its file so that a PNG can be made of it that shows exactly the same: all samples,
//! transparency, and what says how they are to be shown.

use image::DynamicImage;
use png::chunk::{self, ChunkType};

use crate::picture::file;

/// The signature of a PNG file.
const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// Chunks of a PNG that say what its pixels are made of, and are made anew; and one of places in the file.
const MADE: [&[u8; 4]; 5] = [b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"iDOT"];
/// Those that hang on the kind of the pixels.
const OF_KIND: [&[u8; 4]; 4] = [b"bKGD", b"hIST", b"sBIT", b"sPLT"];
/// Those that say how all pixels are to be shown, whatever their kind.
const OF_PIXELS: [&[u8; 4]; 8] = [
    b"cHRM", b"cICP", b"cLLI", b"gAMA", b"iCCP", b"mDCV", b"sRGB", b"tIME",
];

/// A picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Exact {
    pub height: usize,
    pub width: usize,
    pub kind: Kind,
    /// \[H, W, channels\], of 16 bits the higher byte first.
    pub samples: Vec<u8>,
    /// PNG chunks that say more of it, each as in a PNG but without its sum: length, kind, data.
    pub chunks: Vec<u8>,
}

/// What a pixel is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Kind {
    /// Red, green and blue, or one level of grey.
    pub colour: bool,
    pub alpha: bool,
    /// 16 bits, not 8.
    pub deep: bool,
}

impl Kind {
    /// As a number, and back.
    pub fn number(self) -> u8 {
        u8::from(self.colour) | u8::from(self.alpha) << 1 | u8::from(self.deep) << 2
    }

    pub fn of(number: u8) -> Option<Kind> {
        let bit = |place: u8| number >> place & 1 == 1;
        (number < 8).then(|| Kind {
            colour: bit(0),
            alpha: bit(1),
            deep: bit(2),
        })
    }

    fn colours(self) -> usize {
        if self.colour { 3 } else { 1 }
    }

    /// Bytes of a sample.
    fn depth(self) -> usize {
        1 + usize::from(self.deep)
    }

    /// Colours, and alpha where there is any.
    pub fn channels(self) -> usize {
        self.colours() + usize::from(self.alpha)
    }

    pub fn bytes_per_pixel(self) -> usize {
        self.channels() * self.depth()
    }

    /// The layers that a model of so many channels codes one after the other: for each the places of its
    /// channels among a pixel's bytes.
    pub fn layers(self, channels: usize) -> Vec<Vec<usize>> {
        let depth = self.depth();
        let mut layers = Vec::new();
        for byte in 0..depth {
            let colours = (0..self.colours()).map(|colour| colour * depth + byte);
            match self.colours() == channels {
                true => layers.push(colours.collect()),
                false => layers.extend(colours.map(|place| vec![place])),
            }
        }
        let alpha = self.colours() * depth;
        layers.extend(
            (0..depth)
                .filter(|_| self.alpha)
                .map(|byte| vec![alpha + byte]),
        );
        layers
    }
}

impl Exact {
    /// The picture of a file; none where the file is to be kept as it is: for it is no still picture, or
    /// was made with losses, or a PNG could not show all of it.
    pub fn read(bytes: &[u8]) -> Option<Exact> {
        let whole = file::whole(bytes).ok()?;
        let chunks = match whole.is_png {
            true => kept_chunks(bytes)?,
            false => Vec::new(),
        };
        let [height, width] = [whole.image.height() as usize, whole.image.width() as usize];
        let kind = |colour, alpha, deep| Kind {
            colour,
            alpha,
            deep,
        };
        let deep = |samples: Vec<u16>| samples.into_iter().flat_map(u16::to_be_bytes).collect();
        let (kind, samples): (Kind, Vec<u8>) = match whole.image {
            DynamicImage::ImageLuma8(image) => (kind(false, false, false), image.into_raw()),
            DynamicImage::ImageLumaA8(image) => (kind(false, true, false), image.into_raw()),
            DynamicImage::ImageRgb8(image) => (kind(true, false, false), image.into_raw()),
            DynamicImage::ImageRgba8(image) => (kind(true, true, false), image.into_raw()),
            DynamicImage::ImageLuma16(image) => (kind(false, false, true), deep(image.into_raw())),
            DynamicImage::ImageLumaA16(image) => (kind(false, true, true), deep(image.into_raw())),
            DynamicImage::ImageRgb16(image) => (kind(true, false, true), deep(image.into_raw())),
            DynamicImage::ImageRgba16(image) => (kind(true, true, true), deep(image.into_raw())),
            _ => return None,
        };
        Some(Exact {
            height,
            width,
            kind,
            samples,
            chunks,
        })
    }

    /// The samples of a layer \[H, W, channels\], given the places of its channels.
    pub fn layer(&self, places: &[usize]) -> Vec<u8> {
        let pixels = self.samples.chunks_exact(self.kind.bytes_per_pixel());
        let layer = pixels.flat_map(|pixel| places.iter().map(|&place| pixel[place]));
        layer.collect()
    }

    /// Puts a layer where it belongs.
    pub fn put(&mut self, places: &[usize], layer: &[u8]) {
        let pixels = self.samples.chunks_exact_mut(self.kind.bytes_per_pixel());
        for (pixel, levels) in pixels.zip(layer.chunks_exact(places.len())) {
            for (&place, &level) in places.iter().zip(levels) {
                pixel[place] = level;
            }
        }
    }

    /// A PNG file of it.
    pub fn png(&self) -> Option<Vec<u8>> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(match (self.kind.colour, self.kind.alpha) {
            (false, false) => png::ColorType::Grayscale,
            (false, true) => png::ColorType::GrayscaleAlpha,
            (true, false) => png::ColorType::Rgb,
            (true, true) => png::ColorType::Rgba,
        });
        encoder.set_depth(match self.kind.deep {
            false => png::BitDepth::Eight,
            true => png::BitDepth::Sixteen,
        });
        let mut writer = encoder.write_header().ok()?;
        for (kind, data) in chunks(&self.chunks)? {
            writer.write_chunk(ChunkType(*kind), data).ok()?;
        }
        writer.write_image_data(&self.samples).ok()?;
        writer.finish().ok()?;
        Some(file)
    }
}

/// The kinds and the data of chunks, one after the other; none where they are not whole.
fn chunks(mut bytes: &[u8]) -> Option<Vec<(&[u8; 4], &[u8])>> {
    let mut chunks = Vec::new();
    while !bytes.is_empty() {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        let (data, rest) = rest.split_at_checked(len)?;
        if MADE.contains(&kind) || chunk::is_critical(ChunkType(*kind)) {
            return None;
        }
        chunks.push((kind, data));
        bytes = rest;
    }
    Some(chunks)
}

/// The chunks of a PNG file that are kept; none where some would be lost, or mean something else.
fn kept_chunks(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut rest = bytes.strip_prefix(SIGNATURE)?;
    let (mut kept, mut same_kind, mut of_kind) = (Vec::new(), true, false);
    loop {
        let (len, after) = rest.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_be_bytes(*len)).ok()?;
        let (summed, after) = after.split_at_checked(len.checked_add(4)?)?;
        let (sum, after) = after.split_first_chunk::<4>()?;
        let (kind, data) = summed.split_first_chunk::<4>()?;
        let mut crc = flate2::Crc::new();
        crc.update(summed);
        if crc.sum() != u32::from_be_bytes(*sum) {
            return None;
        }
        rest = after;
        match kind {
            // What follows would be lost.
            b"IEND" => return (rest.is_empty() && (same_kind || !of_kind)).then_some(kept),
            b"IHDR" => same_kind &= data.get(8)? >= &8 && data.get(9)? != &3,
            b"tRNS" => same_kind = false,
            _ => {}
        }
        of_kind |= OF_KIND.contains(&kind);
        if MADE.contains(&kind) {
            continue;
        }
        let chunk = ChunkType(*kind);
        let known = OF_KIND.contains(&kind) || OF_PIXELS.contains(&kind);
        if chunk::is_critical(chunk) || !known && !chunk::safe_to_copy(chunk) {
            return None;
        }
        kept.extend(u32::try_from(len).ok()?.to_be_bytes());
        kept.extend(summed);
    }
}
