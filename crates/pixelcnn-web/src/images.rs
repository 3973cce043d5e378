//! Images in JSON: as a picture file, or as levels.

use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pixelcnn::picture::{self, grid};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::limits;
use crate::problem::{AtMost, Problem, Result};

/// Rows of an image, at most.
const ROWS: usize = 1 << 16;

/// An image: one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// A picture file in base64: PNG, JPEG, WebP, GIF, BMP, TIFF, PNM or QOI; those that come back are PNG.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(content_encoding = "base64", example = "iVBORw0KGgo…")]
    pub picture: Option<String>,
    /// Levels from 0 to 255, row by row, of each pixel its channels: [H][W][C].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    #[schema(value_type = Option<Vec<Vec<Vec<u8>>>>, example = json!([[[255, 0, 0], [0, 255, 0]]]))]
    pub levels: Option<AtMost<ROWS, Vec<Pixel>>>,
}

/// A pixel's channels, 1 to 4 of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pixel {
    channels: u8,
    levels: [u8; 4],
}

impl Pixel {
    fn of(channels: &[u8]) -> Pixel {
        let mut pixel = Pixel {
            channels: channels.len() as u8,
            levels: [0; 4],
        };
        pixel.levels[..channels.len()].copy_from_slice(channels);
        pixel
    }

    fn channels(&self) -> &[u8] {
        &self.levels[..usize::from(self.channels)]
    }
}

impl Serialize for Pixel {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        self.channels().serialize(serializer)
    }
}

/// Where it lies, without memory of its own for each: there may be millions.
impl<'de> Deserialize<'de> for Pixel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Pixel, D::Error> {
        struct Channels;
        impl<'de> Visitor<'de> for Channels {
            type Value = Pixel;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("1 to 4 levels from 0 to 255")
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut channels: A,
            ) -> std::result::Result<Pixel, A::Error> {
                let mut pixel = Pixel::default();
                while let Some(level) = channels.next_element()? {
                    let place = pixel.levels.get_mut(usize::from(pixel.channels));
                    *place.ok_or_else(|| A::Error::invalid_length(5, &self))? = level;
                    pixel.channels += 1;
                }
                Ok(pixel)
            }
        }
        deserializer.deserialize_seq(Channels)
    }
}

/// How images come back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// As PNG files, in `picture`.
    #[default]
    Picture,
    /// As arrays, in `levels`.
    Levels,
}

/// An image's levels, u8 [H, W, C].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Levels {
    /// Height and width.
    pub size: [usize; 2],
    /// Its channels.
    pub channels: usize,
    /// \[H, W, C\].
    pub levels: Vec<u8>,
}

impl Image {
    /// Its levels in as many channels as a model has.
    ///
    /// # Errors
    /// Where it is no image, or one of too many pixels.
    pub fn levels(&self, channels: usize) -> Result<Levels> {
        match (&self.picture, &self.levels) {
            (Some(picture), None) => decoded(picture, channels),
            (None, Some(rows)) => flattened(&rows.0, channels),
            _ => Err(Problem::unfit(
                "an image has either `picture`, a file in base64, or `levels`, an array [H][W][C]",
            )),
        }
    }

    /// An image as it is asked for.
    ///
    /// # Errors
    /// Where it cannot be encoded.
    pub fn of(image: &Levels, format: Format) -> Result<Image> {
        let Levels {
            size: [height, width],
            channels,
            ref levels,
        } = *image;
        Ok(match format {
            Format::Levels => Image {
                levels: Some(AtMost(nested(levels, width, channels))),
                picture: None,
            },
            Format::Picture => {
                let shape = [1, height, width, channels];
                let picture = grid(levels, shape, 1, 0, 1);
                let file = picture.and_then(|picture| picture::encode_png(&picture));
                let file = file.map_err(|error| Problem::ours(error.to_string()))?;
                Image {
                    picture: Some(BASE64.encode(file)),
                    levels: None,
                }
            }
        })
    }
}

/// Checks that an image of a height and width has a pixel.
///
/// # Errors
/// Where it has not.
pub fn expect_pixel([row, column]: [usize; 2], [height, width]: [usize; 2]) -> Result<()> {
    match row < height && column < width {
        true => Ok(()),
        false => Err(Problem::unfit(format!(
            "row {row}, column {column} is no pixel of an image of {width}x{height}"
        ))),
    }
}

/// \[H\]\[W\]\[C\].
fn nested(levels: &[u8], width: usize, channels: usize) -> Vec<Vec<Pixel>> {
    let rows = levels.chunks_exact(width * channels);
    rows.map(|row| row.chunks_exact(channels).map(Pixel::of).collect())
        .collect()
}

/// Bytes in base64.
///
/// # Errors
/// Where they are none; `what` names them.
pub fn bytes(text: &str, what: &str) -> Result<Vec<u8>> {
    let bytes = BASE64.decode(text);
    bytes.map_err(|error| Problem::unfit(format!("{what} is not base64: {error}")))
}

/// In base64.
pub fn text(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

fn decoded(picture: &str, channels: usize) -> Result<Levels> {
    let file = bytes(picture, "`picture`")?;
    let path = Path::new("the picture");
    let unfit = |error: picture::PictureError| Problem::unfit(error.to_string());
    let size = picture::size(&file, path).map_err(unfit)?;
    expect_few(size)?;
    let picture = picture::decode(&file, path, [size[0], size[1], channels]).map_err(unfit)?;
    Ok(Levels {
        size,
        channels,
        levels: picture.levels,
    })
}

fn flattened(rows: &[Vec<Pixel>], channels: usize) -> Result<Levels> {
    let (height, width) = (rows.len(), rows.first().map_or(0, Vec::len));
    let pixels = rows.iter().flatten();
    let fits = width > 0
        && rows.iter().all(|row| row.len() == width)
        && pixels
            .clone()
            .all(|pixel| usize::from(pixel.channels) == channels);
    if !fits {
        return Err(Problem::unfit(format!(
            "`levels` is an array [H][W][{channels}]: rows of equal length, of each pixel \
             {channels} levels"
        )));
    }
    expect_few([height, width])?;
    Ok(Levels {
        size: [height, width],
        channels,
        levels: pixels.flat_map(Pixel::channels).copied().collect(),
    })
}

fn expect_few([height, width]: [usize; 2]) -> Result<()> {
    match height.checked_mul(width) {
        Some(1..=limits::MEASURED) => Ok(()),
        _ => Err(Problem::unfit(format!(
            "an image of {width}x{height} pixels: at most {} are taken",
            limits::MEASURED
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_go_both_ways() {
        for channels in [1, 3] {
            let levels = Levels {
                size: [2, 5],
                channels,
                levels: (0..10 * channels as u8)
                    .map(|i| i.wrapping_mul(37))
                    .collect(),
            };
            for format in [Format::Picture, Format::Levels] {
                let image = Image::of(&levels, format).unwrap();
                let json = serde_json::to_string(&image).unwrap();
                let image: Image = serde_json::from_str(&json).unwrap();
                assert_eq!(image.levels(channels).unwrap(), levels);
            }
        }
    }

    #[test]
    fn a_pixel_has_one_to_four_levels() {
        for json in [
            "[[[1, 2, 3, 4, 5]]]",
            "[[[256]]]",
            "[[[-1]]]",
            "[[[0.5]]]",
            "[[1]]",
            "[[[\"1\"]]]",
        ] {
            let json = format!(r#"{{"levels": {json}}}"#);
            assert!(serde_json::from_str::<Image>(&json).is_err(), "{json}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused() {
        for json in [
            "{}",
            r#"{"picture": "!"}"#,
            r#"{"picture": "AAAA"}"#,
            r#"{"picture": "AAAA", "levels": [[[1, 2, 3]]]}"#,
            r#"{"levels": []}"#,
            r#"{"levels": [[]]}"#,
            r#"{"levels": [[[1, 2]]]}"#,
            r#"{"levels": [[[1, 2, 3]], []]}"#,
        ] {
            let image: Image = serde_json::from_str(json).unwrap();
            let problem = image.levels(3).unwrap_err();
            assert_eq!(problem.status, 422, "{json}");
        }
    }
}
