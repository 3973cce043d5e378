//! One PNG or JPEG file: its size and kind from the header, its pixels as `u8`.
//!
//! Sixteen bits become eight, palettes become colours, transparency is dropped (not composited), and
//! a photo is turned upright as its EXIF orientation says.

use std::io::Cursor;

use image::imageops::FilterType;
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::one_line;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub height: usize,
    pub width: usize,
    pub grey: bool,
}

/// Reads the header from the first bytes of a file.
pub(super) fn header(bytes: &[u8]) -> Result<Header, String> {
    let mut decoder = decoder(bytes)?;
    let (mut width, mut height) = decoder.dimensions();
    if turns(orientation(&mut decoder)) {
        (width, height) = (height, width);
    }
    let grey = decoder.color_type().channel_count() < 3;
    Ok(Header {
        height: height as usize,
        width: width as usize,
        grey,
    })
}

/// Decodes a file to [H, W, channels], cropped and resized if `size` is given. Returns the height
/// and width beside the pixels.
pub(crate) fn decode(
    bytes: &[u8],
    channels: usize,
    size: Option<usize>,
) -> Result<([usize; 2], Vec<u8>), String> {
    let mut decoder = decoder(bytes)?;
    if is_cut_jpeg(bytes) {
        return Err("the file is cut off".into());
    }
    let orientation = orientation(&mut decoder);
    let mut image = DynamicImage::from_decoder(decoder).map_err(one_line)?;
    image.apply_orientation(orientation);
    image = match channels {
        1 => image.into_luma8().into(),
        _ => image.into_rgb8().into(),
    };
    if let Some(size) = size {
        image = crop_and_resize(&image, size as u32);
    }
    Ok((
        [image.height() as usize, image.width() as usize],
        image.into_bytes(),
    ))
}

/// What of a file [`decode`] would lose, and what to do about it.
pub(crate) fn loss(bytes: &[u8], channels: usize) -> Result<Option<&'static str>, String> {
    Ok(match decoder(bytes)?.color_type() {
        ColorType::L8 => None,
        ColorType::Rgb8 if channels == 3 => None,
        ColorType::Rgb8 => Some("it has colours, the model knows grey only: convert it first"),
        ColorType::La8 | ColorType::Rgba8 => {
            Some("its transparency would be lost: remove it first")
        }
        _ => Some("it has more than 8 bits, of which some would be lost: convert it first"),
    })
}

/// The largest centred square, resized to `size` x `size`. Lanczos, widened to the scale, so that
/// shrinking does not alias.
fn crop_and_resize(image: &DynamicImage, size: u32) -> DynamicImage {
    let side = image.width().min(image.height());
    let square = image.crop_imm(
        (image.width() - side) / 2,
        (image.height() - side) / 2,
        side,
        side,
    );
    match side == size {
        true => square,
        false => square.resize_exact(size, size, FilterType::Lanczos3),
    }
}

fn decoder(bytes: &[u8]) -> Result<impl ImageDecoder + '_, String> {
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(one_line)?;
    reader.limits(image::Limits::default());
    match reader.format() {
        Some(ImageFormat::Png | ImageFormat::Jpeg) => reader.into_decoder().map_err(one_line),
        _ => Err("not a PNG or JPEG file".into()),
    }
}

fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

/// Whether an orientation swaps the sides.
fn turns(orientation: Orientation) -> bool {
    use Orientation::*;
    matches!(
        orientation,
        Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH
    )
}

/// Whether a JPEG file ends before its end-of-image marker: the decoder would fill in the rest. In
/// the compressed data after the headers, 0xFF is never followed by the marker's code by chance.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xDA;
    const END_OF_IMAGE: [u8; 2] = [0xFF, 0xD9];
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
