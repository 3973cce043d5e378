//! Images side by side in one picture, written as PNG files and animated.

use std::io::{self, Write};
use std::path::Path;

use super::PictureError;
use crate::atomic;

/// The longest side of a grid, in pixels: some 800 MB of RGB if it is square.
pub(super) const MAX_GRID_SIDE: usize = 1 << 14;

/// A picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 1 or 3.
    pub channels: usize,
    /// u8 \[height, width, channels\].
    pub levels: Vec<u8>,
}

/// Lays N `images` of `shape` \[N, H, W, channels\] out row by row in a grid of `columns`, with a
/// white `gap` of so many pixels between them; every pixel becomes a square of `scale` x `scale`.
///
/// # Errors
/// [`PictureError::Shape`] and [`PictureError::Grid`].
pub fn grid(
    images: &[u8],
    shape: [usize; 4],
    columns: usize,
    gap: usize,
    scale: usize,
) -> Result<Grid, PictureError> {
    let wrong = PictureError::Grid { columns, scale };
    let [n, h, w, channels] = shape;
    let size = shape.into_iter().try_fold(1, usize::checked_mul);
    if size != Some(images.len()) || images.is_empty() || !matches!(channels, 1 | 3) {
        let bytes = images.len();
        return Err(PictureError::Shape { bytes, shape });
    }
    if columns == 0 || scale == 0 {
        return Err(wrong);
    }
    let columns = columns.min(n);
    let side = |count: usize, side: usize| {
        let gaps = gap.checked_mul(count - 1)?;
        let side = side.checked_mul(count)?.checked_add(gaps)?;
        let scaled = side.checked_mul(scale)?;
        Some(scaled).filter(|&side| side <= MAX_GRID_SIDE)
    };
    let sides = [side(n.div_ceil(columns), h), side(columns, w)];
    let [Some(height), Some(width)] = sides else {
        return Err(wrong);
    };

    let row = width * channels;
    let mut levels = vec![255; height * row];
    for (i, image) in images.chunks_exact(h * w * channels).enumerate() {
        let (top, left) = (i / columns * (h + gap), i % columns * (w + gap));
        for (y, pixels) in image.chunks_exact(w * channels).enumerate() {
            let at = (top + y) * scale * row + left * scale * channels;
            let squares = levels[at..].chunks_exact_mut(scale * channels);
            for (square, pixel) in squares.zip(pixels.chunks_exact(channels)) {
                for target in square.chunks_exact_mut(channels) {
                    target.copy_from_slice(pixel);
                }
            }
            let first = at..at + w * scale * channels;
            for below in 1..scale {
                levels.copy_within(first.clone(), at + below * row);
            }
        }
    }
    Ok(Grid {
        height,
        width,
        channels,
        levels,
    })
}

/// The picture as a PNG file's bytes.
///
/// # Errors
/// [`PictureError::Encode`].
pub fn encode_png(picture: &Grid) -> Result<Vec<u8>, PictureError> {
    let mut file = Vec::new();
    let written = encoder(&mut file, picture)
        .write_header()
        .and_then(|mut writer| {
            writer.write_image_data(&picture.levels)?;
            writer.finish()
        });
    match written {
        Ok(()) => Ok(file),
        Err(error) => Err(PictureError::Encode(error.to_string())),
    }
}

/// A PNG file of a picture's size and colours.
fn encoder<'a, W: Write>(w: W, picture: &Grid) -> png::Encoder<'a, W> {
    let mut encoder = png::Encoder::new(w, picture.width as u32, picture.height as u32);
    encoder.set_color(match picture.channels {
        1 => png::ColorType::Grayscale,
        _ => png::ColorType::Rgb,
    });
    encoder
}

/// Writes the picture to the PNG file at `path`, atomically.
///
/// # Errors
/// [`PictureError::Encode`] and [`PictureError::Write`]; what was at `path` before still is.
pub fn write_png(path: &Path, picture: &Grid) -> Result<(), PictureError> {
    let png = encode_png(picture)?;
    atomic::write(path, |w| w.write_all(&png)).map_err(|source| PictureError::Write {
        path: path.into(),
        source,
    })
}

/// How long a frame of an animation is seen, in milliseconds.
const FRAME: u16 = 80;
/// And the last one, before it begins again.
const LAST_FRAME: u16 = 3000;

/// Writes an animated PNG to `path`, atomically. `frame` gives its `count` frames, which must be
/// of one size and colour type.
///
/// # Errors
/// Those of `frame`, and [`PictureError::Write`]; what was at `path` before still is.
pub fn write_animation(
    path: &Path,
    count: u32,
    mut frame: impl FnMut(u32) -> Result<Grid, PictureError>,
) -> Result<(), PictureError> {
    let first = frame(0)?;
    let mut failed = None;
    let written = atomic::write(path, |w| {
        let mut encoder = encoder(w, &first);
        encoder.set_animated(count, 0)?;
        encoder.set_frame_delay(if count == 1 { LAST_FRAME } else { FRAME }, 1000)?;
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&first.levels)?;
        for number in 1..count {
            if number + 1 == count {
                writer.set_frame_delay(LAST_FRAME, 1000)?;
            }
            match frame(number) {
                Ok(frame) => writer.write_image_data(&frame.levels)?,
                Err(error) => {
                    failed = Some(error);
                    return Err(io::ErrorKind::Other.into());
                }
            }
        }
        writer.finish()?;
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => written.map_err(|source| PictureError::Write {
            path: path.into(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_pixel_is_where_it_belongs(
            n in 1usize..8,
            h in 1usize..5,
            w in 1usize..5,
            channels in prop_oneof![Just(1), Just(3)],
            columns in 1usize..10,
            gap in 0usize..3,
            scale in 1usize..4,
            seed: u8,
        ) {
            // Never white, so that the gap is told apart.
            let images: Vec<u8> = (0..n * h * w * channels)
                .map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed) % 255)
                .collect();
            let picture = grid(&images, [n, h, w, channels], columns, gap, scale).unwrap();
            let decoded = image::load_from_memory(&encode_png(&picture).unwrap()).unwrap();
            prop_assert_eq!(decoded.color().channel_count() as usize, channels);
            let decoded = decoded.into_rgb8();
            let columns = columns.min(n);
            let rows = n.div_ceil(columns);
            let (wide, high) = (columns * (w + gap) - gap, rows * (h + gap) - gap);
            let expected = ((wide * scale) as u32, (high * scale) as u32);
            prop_assert_eq!(decoded.dimensions(), expected);
            for (x, y, pixel) in decoded.enumerate_pixels() {
                let (x, y) = (x as usize / scale, y as usize / scale);
                let (column, row) = (x / (w + gap), y / (h + gap));
                let (x, y, i) = (x % (w + gap), y % (h + gap), row * columns + column);
                for (c, &found) in pixel.0.iter().enumerate() {
                    let expected = if x < w && y < h && i < n {
                        images[((i * h + y) * w + x) * channels + c.min(channels - 1)]
                    } else {
                        255
                    };
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn wrong_grids_are_refused() {
        let images = [0; 2 * 4 * 4 * 3];
        let shape = [2, 4, 4, 3];
        let max = usize::MAX;
        for (shape, columns, gap, scale) in [
            (shape, 0, 0, 1),
            (shape, 1, 0, 0),
            (shape, 1, max, 1),
            (shape, 1, 0, max),
            (shape, 1, MAX_GRID_SIDE, 1),
            (shape, 1, 0, MAX_GRID_SIDE),
        ] {
            let refused = grid(&images, shape, columns, gap, scale);
            assert!(matches!(refused, Err(PictureError::Grid { .. })));
        }
        grid(&images, shape, max, MAX_GRID_SIDE - 8, 1).unwrap();
        for shape in [[2, 4, 4, 1], [2, 4, 6, 2], [max, max, 2, 3], [0, 4, 4, 3]] {
            let refused = grid(&images, shape, 1, 0, 1);
            assert!(matches!(refused, Err(PictureError::Shape { .. })));
        }
        assert!(grid(&[], [0, 4, 4, 3], 1, 0, 1).is_err());
    }

    #[test]
    fn animations_have_their_frames() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("appearing.png");
        for channels in [1, 3] {
            let shape = [2, 3, 4, channels];
            let frame = |number: u32| grid(&vec![40 * number as u8; 24 * channels], shape, 2, 1, 2);
            write_animation(&path, 5, frame).unwrap();
            let file = std::fs::read(&path).unwrap();
            let mut decoder = png::Decoder::new(Cursor::new(&file)).read_info().unwrap();
            assert_eq!(decoder.info().animation_control().unwrap().num_frames, 5);
            for number in 0..5 {
                let mut pixels = vec![0; decoder.output_buffer_size().unwrap()];
                decoder.next_frame(&mut pixels).unwrap();
                assert_eq!(pixels, frame(number).unwrap().levels);
            }
            // Whoever knows no animations sees the first frame.
            let shown = image::load_from_memory(&file).unwrap();
            assert_eq!(shown.into_bytes(), frame(0).unwrap().levels);
        }
        let refused = write_animation(&path, 2, |number| {
            grid(&[0; 4], [1, 2, 2, 1], 1, 0, 1 - number as usize)
        });
        assert!(matches!(refused, Err(PictureError::Grid { .. })));
        let missing = folder.path().join("missing/a.png");
        let refused = write_animation(&missing, 1, |_| grid(&[0; 4], [1, 2, 2, 1], 1, 0, 1));
        assert!(matches!(refused, Err(PictureError::Write { .. })));
    }

    #[test]
    fn pictures_are_written_as_encoded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.png");
        let picture = grid(&[1, 2, 3, 4], [1, 2, 2, 1], 1, 0, 1).unwrap();
        write_png(&path, &picture).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), encode_png(&picture).unwrap());
        let missing = write_png(&folder.path().join("missing/samples.png"), &picture);
        assert!(matches!(missing, Err(PictureError::Write { .. })));
    }
}
