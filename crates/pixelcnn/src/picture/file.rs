//! One picture file: its size and kind from the header, its pixels as `u8`, and what these leave
//! out.
//!
//! Sixteen bits become eight, palettes become colours, an alpha channel is dropped (not
//! composited), and a photo is turned upright as its EXIF orientation says. Sizes are looked at
//! before anything is decoded, and what would take more than [`MAX_DECODED`] is refused.

use std::fmt;
use std::io::Cursor;
use std::ops::AddAssign;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use image::imageops::{FilterType, crop_imm, resize};
use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ImageBuffer, ImageDecoder, ImageFormat, ImageReader, Limits, Pixel,
};

use crate::one_line;

/// The formats that are read, for messages.
pub const FORMATS: &str = "PNG, JPEG, WebP, GIF, BMP, TIFF, PNM or QOI";

/// The ends of the names of picture files.
const EXTENSIONS: [&str; 19] = [
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "jif", "webp", "gif", "bmp", "dib", "tif", "tiff",
    "pbm", "pgm", "ppm", "pnm", "pam", "qoi",
];

/// The most bytes that a picture takes when it is decoded: a photo of 178 million pixels.
const MAX_DECODED: u64 = 512 << 20;
/// The most bytes of a file.
pub(crate) const MAX_FILE: u64 = 512 << 20;

/// Pictures of more bytes than this are decoded one at a time, whatever the number of threads.
const LARGE: u64 = 64 << 20;
static ONE_LARGE: Mutex<()> = Mutex::new(());

/// Whether a file's name is a picture's.
pub fn is_picture(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    EXTENSIONS
        .iter()
        .any(|known| extension.eq_ignore_ascii_case(known))
}

/// What a picture's file holds that is not in the `u8` pixels read from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// Transparency: an alpha channel.
    pub alpha: bool,
    /// More than 8 bits a channel.
    pub depth: bool,
    /// What the colours mean where that is not sRGB: an ICC profile, gamma, primaries.
    pub profile: bool,
    /// EXIF, XMP or IPTC data, or text.
    pub metadata: bool,
}

impl Dropped {
    /// What of the pixels themselves is dropped: alpha and depth.
    pub fn of_pixels(self) -> Dropped {
        Dropped {
            alpha: self.alpha,
            depth: self.depth,
            ..Dropped::default()
        }
    }

    /// What is dropped beside the pixels: profile and metadata.
    pub fn beside_pixels(self) -> Dropped {
        Dropped {
            profile: self.profile,
            metadata: self.metadata,
            ..Dropped::default()
        }
    }
}

/// How many pictures of a set hold something that is dropped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DroppedCount {
    pictures: usize,
    alpha: usize,
    depth: usize,
    profile: usize,
    metadata: usize,
}

impl AddAssign<Dropped> for DroppedCount {
    fn add_assign(&mut self, one: Dropped) {
        self.pictures += 1;
        self.alpha += usize::from(one.alpha);
        self.depth += usize::from(one.depth);
        self.profile += usize::from(one.profile);
        self.metadata += usize::from(one.metadata);
    }
}

impl AddAssign for DroppedCount {
    fn add_assign(&mut self, more: DroppedCount) {
        self.pictures += more.pictures;
        self.alpha += more.alpha;
        self.depth += more.depth;
        self.profile += more.profile;
        self.metadata += more.metadata;
    }
}

impl DroppedCount {
    /// Whether nothing is dropped.
    pub fn is_empty(&self) -> bool {
        self.alpha + self.depth + self.profile + self.metadata == 0
    }
}

/// For example `2 of 9 pictures have an alpha channel, 1 has more than 8 bits a channel`.
impl fmt::Display for DroppedCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            (self.alpha, "an alpha channel"),
            (self.depth, "more than 8 bits a channel"),
            (self.profile, "a colour profile or gamma"),
            (self.metadata, "metadata (EXIF, XMP, text)"),
        ];
        let said = parts.iter().filter(|(count, _)| *count > 0);
        let said = said.enumerate().map(|(i, (count, what))| {
            let of = match (i, self.pictures) {
                (0, 1) => " of 1 picture".into(),
                (0, pictures) => format!(" of {pictures} pictures"),
                _ => String::new(),
            };
            let verb = if *count == 1 { "has" } else { "have" };
            format!("{count}{of} {verb} {what}")
        });
        f.write_str(&said.collect::<Vec<_>>().join(", "))
    }
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub height: usize,
    pub width: usize,
    pub grey: bool,
    /// Of the pixels alone: alpha and depth.
    pub dropped: Dropped,
}

/// Reads the header from the first bytes of a file, or from the `whole` of it: of some formats
/// nothing less will do.
pub(crate) fn header(bytes: &[u8], whole: bool) -> Result<Header, String> {
    let format = format(bytes)?;
    if !whole && !matches!(format, ImageFormat::Png | ImageFormat::Jpeg) {
        return Err("the file is cut off: get it again where it is whole".into());
    }
    let alpha = still(bytes, format)?;
    let mut decoder = decoder(bytes, format)?;
    decoded_bytes(&decoder)?;
    let [height, width] = upright(&mut decoder).1;
    if height * width == 0 {
        return Err("it has no pixels".into());
    }
    let colour = decoder.color_type();
    Ok(Header {
        height,
        width,
        grey: !colour.has_color(),
        dropped: of_pixels(alpha, colour),
    })
}

/// What of pixels is dropped; `alpha` knows better than the decoder where it is given.
fn of_pixels(alpha: Option<bool>, colour: ColorType) -> Dropped {
    Dropped {
        alpha: alpha.unwrap_or(colour.has_alpha()),
        depth: is_deep(colour),
        ..Dropped::default()
    }
}

/// Whether a file of these first and last bytes, `len` in all, surely ends where its format says. If
/// not, decoding it tells whether it is cut off.
pub(crate) fn is_surely_whole(first: &[u8], last: &[u8], len: u64) -> bool {
    match format(first) {
        Ok(ImageFormat::Png) => last.ends_with(b"\0\0\0\0IEND\xaeB`\x82"),
        Ok(ImageFormat::Jpeg) => last.ends_with(&END_OF_IMAGE),
        _ => {
            let riff = first.get(4..8).and_then(|size| size.try_into().ok());
            first.starts_with(b"RIFF")
                && riff.is_some_and(|size| 8 + u64::from(u32::from_le_bytes(size)) == len)
        }
    }
}

/// What becomes of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fit {
    /// It has this height and width.
    Exact([usize; 2]),
    /// The largest centred square is cut out and resized to this side.
    Square(usize),
}

/// Why a file does not become a picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unread {
    /// It has another height and width.
    Size([usize; 2]),
    /// Anything else.
    Because(String),
}

impl From<String> for Unread {
    fn from(reason: String) -> Unread {
        Unread::Because(reason)
    }
}

/// A file's pixels [H, W, channels].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub levels: Vec<u8>,
    /// What of the pixels they leave out: alpha and depth.
    pub dropped: Dropped,
}

/// Decodes a file to [H, W, channels].
pub(crate) fn decode(bytes: &[u8], channels: usize, fit: Fit) -> Result<Decoded, Unread> {
    let format = format(bytes)?;
    let alpha = still(bytes, format)?;
    let mut decoder = decoder(bytes, format)?;
    let dropped = of_pixels(alpha, decoder.color_type());
    let (orientation, size) = upright(&mut decoder);
    if let Fit::Exact(wanted) = fit
        && wanted != size
    {
        return Err(Unread::Size(size));
    }
    let total = decoded_bytes(&decoder)?;
    if is_cut_jpeg(bytes) {
        return Err(Unread::Because(
            "the file is cut off: get it again where it is whole".into(),
        ));
    }
    let one = (total > LARGE).then(|| ONE_LARGE.lock().unwrap_or_else(PoisonError::into_inner));
    let mut image = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    image.apply_orientation(orientation);
    let levels = match channels {
        1 => fitted(image.into_luma8(), fit),
        _ => fitted(image.into_rgb8(), fit),
    };
    drop(one);
    Ok(Decoded { levels, dropped })
}

/// All that a file shows.
pub(crate) struct Whole {
    /// As it lies in the file, not turned.
    pub image: DynamicImage,
    pub is_png: bool,
}

/// Decodes all of a file that holds one still picture, and nothing that a PNG could not: of formats that hold
/// more, or were made with losses, none.
pub(crate) fn whole(bytes: &[u8]) -> Result<Whole, String> {
    let format = format(bytes)?;
    let is_plain = match format {
        ImageFormat::Png => true,
        ImageFormat::Pnm => is_plain_pnm(bytes),
        ImageFormat::WebP => is_plain_webp(bytes),
        // Levels as in sRGB, up to the end.
        ImageFormat::Qoi => bytes.get(13) == Some(&0) && bytes.ends_with(&[0, 0, 0, 0, 0, 0, 0, 1]),
        ImageFormat::Bmp => is_plain_bmp(bytes),
        _ => false,
    };
    if !is_plain {
        return Err("its file may hold more than its pixels".into());
    }
    still(bytes, format)?;
    let decoder = decoder(bytes, format)?;
    decoded_bytes(&decoder)?;
    Ok(Whole {
        is_png: format == ImageFormat::Png,
        image: DynamicImage::from_decoder(decoder).map_err(one_line)?,
    })
}

/// Whether a WebP file is one picture without losses, and no chunk beside it.
fn is_plain_webp(bytes: &[u8]) -> bool {
    let chunk = bytes.get(16..20).and_then(|len| len.try_into().ok());
    let len = chunk.map_or(0, |len| u64::from(u32::from_le_bytes(len)));
    bytes.get(8..16) == Some(b"WEBPVP8L") && 20 + len + len % 2 == bytes.len() as u64
}

/// Whether a BMP file has three bytes a pixel, nothing behind them and the plainest header, which knows of no
/// profile.
fn is_plain_bmp(bytes: &[u8]) -> bool {
    let number = |at: usize, len: usize| {
        let bytes = bytes.get(at..at + len).unwrap_or_default();
        let bytes = bytes.iter().rev();
        bytes.fold(0u64, |number, &byte| number << 8 | u64::from(byte))
    };
    let [width, height] = [18, 22].map(|at| u64::from((number(at, 4) as i32).unsigned_abs()));
    let pixels = (3 * width).next_multiple_of(4).saturating_mul(height);
    let [start, header, depth, packing] =
        [[10, 4], [14, 4], [28, 2], [30, 4]].map(|[at, len]| number(at, len));
    [start, header, depth, packing] == [54, 40, 24, 0] && 54 + pixels == bytes.len() as u64
}

/// Whether a PNM file has levels of whole bytes, no comments, and nothing but one picture.
fn is_plain_pnm(bytes: &[u8]) -> bool {
    let (channels, letters) = match bytes {
        [b'P', b'2', ..] => (1, true),
        [b'P', b'3', ..] => (3, true),
        [b'P', b'5', ..] => (1, false),
        [b'P', b'6', ..] => (3, false),
        _ => return false,
    };
    let mut rest = &bytes[2..];
    let mut number = || -> Option<usize> {
        let start = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        let digits = rest[start..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        let number = std::str::from_utf8(&rest[start..start + digits])
            .ok()?
            .parse()
            .ok();
        rest = &rest[start + digits..];
        number
    };
    let [Some(width), Some(height), Some(most)] = [number(), number(), number()] else {
        return false;
    };
    let depth = match most {
        255 => 1,
        65_535 => 2,
        _ => return false,
    };
    let Some(levels) = width
        .checked_mul(height)
        .and_then(|n| n.checked_mul(channels))
    else {
        return false;
    };
    if !letters {
        // A single white space comes before them.
        return levels.checked_mul(depth).and_then(|n| n.checked_add(1)) == Some(rest.len());
    }
    (0..levels).all(|_| number().is_some()) && rest.iter().all(u8::is_ascii_whitespace)
}

/// Whether a file holds a colour profile, and whether metadata.
pub(crate) fn beside_pixels(bytes: &[u8]) -> Result<Dropped, String> {
    let format = format(bytes)?;
    let mut decoder = decoder(bytes, format)?;
    let (mut profile, mut text) = (false, false);
    if format == ImageFormat::Png {
        let png = png_reader(bytes)?;
        let info = png.info();
        // What sRGB says as well says nothing.
        let gamma = info.gama_chunk.map(|gamma| gamma.into_scaled());
        let unusual = |n: u32, usual: u32| n.abs_diff(usual) > 100;
        let primaries = info.chrm_chunk.map(|of| {
            [of.white, of.red, of.green, of.blue].map(|(x, y)| [x, y].map(|n| n.into_scaled()))
        });
        profile = info.coding_independent_code_points.is_some()
            || info.srgb.is_none()
                && (gamma.is_some_and(|gamma| unusual(gamma, 45_455))
                    || primaries.is_some_and(|found| {
                        let pairs = found.as_flattened().iter().zip(SRGB_PRIMARIES);
                        { pairs }.any(|(&n, usual)| unusual(n, usual))
                    }));
        text = !info.uncompressed_latin1_text.is_empty()
            || !info.compressed_latin1_text.is_empty()
            || !info.utf8_text.is_empty();
    }
    let has = |found: image::ImageResult<Option<Vec<u8>>>| found.is_ok_and(|data| data.is_some());
    Ok(Dropped {
        profile: profile || has(decoder.icc_profile()),
        metadata: text
            || has(decoder.exif_metadata())
            || has(decoder.xmp_metadata())
            || has(decoder.iptc_metadata()),
        ..Dropped::default()
    })
}

/// White, red, green, blue of sRGB, x and y of each in 100,000ths.
const SRGB_PRIMARIES: [u32; 8] = [
    31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000,
];

/// The pixels [H, W, C]; resized by Lanczos, widened to the scale, so that shrinking does not alias.
fn fitted<P>(image: ImageBuffer<P, Vec<u8>>, fit: Fit) -> Vec<u8>
where
    P: Pixel<Subpixel = u8> + 'static,
{
    let Fit::Square(size) = fit else {
        return image.into_raw();
    };
    let (size, (width, height)) = (size as u32, image.dimensions());
    let side = width.min(height);
    let (left, top) = ((width - side) / 2, (height - side) / 2);
    let square = crop_imm(&image, left, top, side, side);
    match side == size {
        true => square.to_image().into_raw(),
        false => resize(&*square, size, size, FilterType::Lanczos3).into_raw(),
    }
}

/// The format that a file's first bytes tell.
fn format(bytes: &[u8]) -> Result<ImageFormat, String> {
    use ImageFormat::*;
    match image::guess_format(bytes) {
        Ok(format @ (Png | Jpeg | WebP | Gif | Bmp | Tiff | Pnm | Qoi)) => Ok(format),
        _ => Err(format!("it is not a {FORMATS} file")),
    }
}

fn decoder(bytes: &[u8], format: ImageFormat) -> Result<impl ImageDecoder + '_, String> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED);
    reader.limits(limits);
    reader.into_decoder().map_err(|error| match error {
        image::ImageError::Limits(_) => too_large(),
        error => one_line(error),
    })
}

/// How many bytes a picture takes when it is decoded.
fn decoded_bytes(decoder: &impl ImageDecoder) -> Result<u64, String> {
    let total = decoder.total_bytes();
    (total <= MAX_DECODED)
        .then_some(total)
        .ok_or_else(too_large)
}

fn too_large() -> String {
    format!(
        "decoded it takes more than {} MiB: shrink it first",
        MAX_DECODED >> 20
    )
}

fn png_reader(bytes: &[u8]) -> Result<png::Reader<Cursor<&[u8]>>, String> {
    let limits = png::Limits {
        bytes: MAX_DECODED as usize,
    };
    let decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.read_info().map_err(|error| match error {
        png::DecodingError::LimitsExceeded => too_large(),
        error => one_line(error),
    })
}

/// Refuses what is more than one picture: of an animation only a frame would be read, of a document
/// a page. Tells whether there is transparency, where the decoder does not.
fn still(bytes: &[u8], format: ImageFormat) -> Result<Option<bool>, String> {
    let animation =
        || "it is an animation, only still pictures are read: save its frames as such".into();
    match format {
        ImageFormat::Png => {
            let reader = png_reader(bytes)?;
            let info = reader.info();
            // Without a frame's control before it the first picture is not even part of it.
            match info.animation_control {
                Some(control) if control.num_frames > 1 || info.frame_control.is_none() => {
                    Err(animation())
                }
                _ => Ok(None),
            }
        }
        ImageFormat::WebP => {
            let decoder = image_webp::WebPDecoder::new(Cursor::new(bytes)).map_err(one_line)?;
            match decoder.is_animated() {
                true => Err(animation()),
                false => Ok(None),
            }
        }
        ImageFormat::Gif => {
            let mut options = gif::DecodeOptions::new();
            options.skip_frame_decoding(true);
            let mut decoder = options.read_info(bytes).map_err(one_line)?;
            let screen = (decoder.width(), decoder.height());
            let first = decoder.next_frame_info().map_err(one_line)?;
            let alpha = first.is_some_and(|frame| {
                frame.transparent.is_some()
                    || (frame.left, frame.top) != (0, 0)
                    || frame.width < screen.0
                    || frame.height < screen.1
            });
            match decoder.next_frame_info() {
                Ok(Some(_)) => Err(animation()),
                Ok(None) => Ok(Some(alpha)),
                Err(error) => Err(one_line(error)),
            }
        }
        ImageFormat::Tiff => {
            let mut decoder = tiff::decoder::Decoder::new(Cursor::new(bytes)).map_err(one_line)?;
            let mut pages = 1;
            while decoder.more_images() {
                decoder.next_image().map_err(one_line)?;
                // A smaller one is a preview of the page.
                let kind = decoder.find_tag_unsigned::<u32>(tiff::tags::Tag::NewSubfileType);
                pages += u32::from(kind.ok().flatten().unwrap_or(0) & 1 == 0);
                if pages > 1 {
                    return Err("it has several pages: save each as a picture".into());
                }
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}

fn is_deep(colour: ColorType) -> bool {
    colour.bytes_per_pixel() > colour.channel_count()
}

/// How a picture is turned, and its height and width once it is.
fn upright(decoder: &mut impl ImageDecoder) -> (Orientation, [usize; 2]) {
    use Orientation::*;
    let orientation = decoder.orientation().unwrap_or(NoTransforms);
    let (width, height) = decoder.dimensions();
    let size = match orientation {
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => [width, height],
        _ => [height, width],
    };
    (orientation, size.map(|side| side as usize))
}

/// The marker at the end of a JPEG file.
const END_OF_IMAGE: [u8; 2] = [0xFF, 0xD9];

/// Whether a JPEG file ends before its end-of-image marker: the decoder would fill in the rest. In
/// the compressed data after the headers, 0xFF is never followed by the marker's code by chance.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xDA;
    let mut rest = match bytes {
        [0xFF, 0xD8, rest @ ..] => rest,
        _ => return false,
    };
    // Over the headers, since an embedded thumbnail has an end of its own.
    while let [0xFF, marker, high, low, ..] = *rest {
        // A 0xFF before a marker is padding.
        let length = if marker == 0xFF {
            1
        } else {
            2 + usize::from(u16::from_be_bytes([high, low]))
        };
        if marker == START_OF_SCAN {
            return !rest.windows(2).any(|pair| pair == END_OF_IMAGE);
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    true
}
