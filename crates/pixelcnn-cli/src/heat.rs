//! Images beside heat maps of where their bits are spent, as one PNG file.

use std::path::Path;

use pixelcnn::picture::{grid, write_png};
use pixelcnn::score::Map;
use plotters::prelude::*;

use crate::chart::carry_font;
use crate::terminal::Result;

/// Images are enlarged until their longer side is about this long.
const SIDE: usize = 128;
/// Pixels between an image and its map, twice that around them.
const GAP: usize = 6;
/// Height of a line of text, and the text's size in it.
const LINE: usize = 30;
const TEXT: i32 = 18;
const TITLE: i32 = 22;
/// Room for the line above an image.
const CAPTION: usize = 200;
/// The scale's colours.
const SCALE: [usize; 2] = [200, 16];
/// Room for the title and the scale beside it.
const HEADER: usize = 760;
/// A picture's longest side: what [`grid`] can write.
const MOST: usize = 1 << 14;

/// Images with a line above each.
pub struct Group {
    /// Above all of them.
    pub title: String,
    /// A line, and an image with its map.
    pub images: Vec<(String, Map)>,
}

/// The bits per pixel at which the scale ends: a pixel in a hundred has more.
pub fn top(groups: &[Group]) -> f32 {
    let images = groups.iter().flat_map(|group| &group.images);
    let mut bits: Vec<f32> = images
        .flat_map(|(_, map)| map.bits_per_pixel.iter().copied())
        .filter(|bits| bits.is_finite())
        .collect();
    bits.sort_by(f32::total_cmp);
    let index = (bits.len() * 99 / 100).min(bits.len().saturating_sub(1));
    bits.get(index).map_or(1.0, |bits| bits.max(1e-3))
}

/// Sides of things in pixels, and how many images stand side by side.
struct Layout {
    scale: usize,
    image: [usize; 2],
    cell: [usize; 2],
    columns: usize,
    /// Of a picture: height and width.
    size: [usize; 2],
}

impl Layout {
    /// For so many images in each group, none of which has more rows or more columns.
    fn new(largest: [usize; 2], groups: &[usize]) -> Layout {
        let scale = (SIDE / largest[0].max(largest[1])).max(1);
        let [height, width] = largest.map(|side| side * scale);
        let cell = [
            LINE + height + 2 * GAP,
            (2 * width + GAP).max(CAPTION) + 2 * GAP,
        ];
        // About as wide as high.
        let most = groups.iter().copied().max().unwrap_or(0);
        let area = (most * groups.len() * cell[0]) as f64 / cell[1] as f64;
        let columns = (area.sqrt().ceil() as usize).clamp(1, most.max(1));
        let rows: usize = groups.iter().map(|count| count.div_ceil(columns)).sum();
        Layout {
            scale,
            image: [height, width],
            cell,
            columns,
            size: [
                LINE * groups.len() + rows * cell[0] + 2 * GAP,
                (columns * cell[1]).max(HEADER) + 2 * GAP,
            ],
        }
    }
}

/// Checks that a picture of so many images in each group can be made, none of which has more rows or more
/// columns, before the long work.
pub fn fits(largest: [usize; 2], groups: &[usize]) -> Result {
    match Layout::new(largest, groups)
        .size
        .iter()
        .all(|side| *side <= MOST)
    {
        true => Ok(()),
        false => Err(format!(
            "so many heat maps of {}x{} pixels make a picture of over {MOST} pixels a side: ask \
             for fewer",
            largest[1], largest[0]
        )
        .into()),
    }
}

/// Writes groups of images, each beside the map of its bits per pixel from 0 to `top`.
pub fn write(path: &Path, groups: &[Group], top: f32) -> Result {
    let counts: Vec<usize> = groups.iter().map(|group| group.images.len()).collect();
    let sizes = groups
        .iter()
        .flat_map(|group| &group.images)
        .map(|(_, map)| map.size);
    let largest = sizes.reduce(|a, b| [a[0].max(b[0]), a[1].max(b[1])]);
    let layout = Layout::new(largest.unwrap_or([1, 1]), &counts);
    let [height, width] = layout.size;
    let mut picture = Picture {
        pixels: vec![255; height * width * 3],
        width,
    };
    let mut texts = Vec::new();
    let mut y = GAP;
    for group in groups {
        texts.push(([y + 4, 2 * GAP], TITLE, group.title.clone()));
        y += LINE;
        for (i, (line, map)) in group.images.iter().enumerate() {
            let x = 2 * GAP + i % layout.columns * layout.cell[1];
            let y = y + i / layout.columns * layout.cell[0];
            texts.push(([y + 10, x], TEXT, line.clone()));
            let (y, [_, wide]) = (y + LINE, layout.image);
            let [height, width] = map.size;
            let levels = map.image.chunks_exact(map.image.len() / (height * width));
            let colours = levels.map(|levels| match levels {
                [red, green, blue] => [*red, *green, *blue],
                levels => [levels[0]; 3],
            });
            picture.fill([y, x], width, layout.scale, colours);
            let colours = map.bits_per_pixel.iter().map(|bits| colour(*bits, top));
            picture.fill([y, x + wide + GAP], width, layout.scale, colours);
        }
        y += group.images.len().div_ceil(layout.columns) * layout.cell[0];
    }

    // The scale, at the right of the first title.
    let [long, high] = SCALE;
    let end = format!("{top:.1} bits/pixel");
    let x = width - long - 160;
    texts.push(([GAP + 5, x - 20], TEXT, "0".into()));
    texts.push(([GAP + 5, x + long + 8], TEXT, end));
    let steps = (0..long * high).map(|i| colour((i % long) as f32, (long - 1) as f32));
    picture.fill([GAP + 3, x], long, 1, steps);

    carry_font()?;
    let undrawn =
        |error: &dyn std::fmt::Display| format!("cannot draw `{}`: {error}", path.display());
    let size = (width as u32, height as u32);
    let area = BitMapBackend::with_buffer(&mut picture.pixels, size).into_drawing_area();
    for ([y, x], size, text) in texts {
        let text = Text::new(text, (x as i32, y as i32), ("sans-serif", size).into_font());
        area.draw(&text).map_err(|error| undrawn(&error))?;
    }
    area.present().map_err(|error| undrawn(&error))?;
    drop(area);
    let shape = [1, height, width, 3];
    Ok(write_png(path, &grid(&picture.pixels, shape, 1, 0, 1)?)?)
}

/// From dark to bright in steps that look alike, and for those who see no colours, too: viridis.
fn colour(bits: f32, top: f32) -> [u8; 3] {
    let bits = if bits.is_nan() {
        top
    } else {
        bits.clamp(0.0, top)
    };
    let RGBColor(red, green, blue) = ViridisRGB.get_color_normalized(bits, 0.0, top);
    [red, green, blue]
}

struct Picture {
    /// RGB.
    pixels: Vec<u8>,
    width: usize,
}

impl Picture {
    /// Sets squares of `scale` x `scale` pixels, `columns` of them side by side.
    fn fill(
        &mut self,
        [top, left]: [usize; 2],
        columns: usize,
        scale: usize,
        colours: impl Iterator<Item = [u8; 3]>,
    ) {
        for (i, colour) in colours.enumerate() {
            let [y, x] = [top + i / columns * scale, left + i % columns * scale];
            for y in y..y + scale {
                let start = 3 * (y * self.width + x);
                for pixel in self.pixels[start..start + 3 * scale].chunks_exact_mut(3) {
                    pixel.copy_from_slice(&colour);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go_from_dark_to_bright() {
        assert_eq!(colour(0.0, 20.0), [68, 1, 84]);
        assert_eq!(colour(20.0, 20.0), [254, 232, 37]);
        assert_eq!(colour(f32::INFINITY, 20.0), colour(20.0, 20.0));
        assert_eq!(colour(f32::NAN, 20.0), colour(20.0, 20.0));
        let brightness = |bits| {
            let [red, green, blue] = colour(bits, 20.0).map(f32::from);
            0.3 * red + 0.6 * green + 0.1 * blue
        };
        for bits in 0..20u8 {
            assert!(brightness(f32::from(bits)) < brightness(f32::from(bits) + 1.0));
        }
    }

    #[test]
    fn any_model_has_its_picture() {
        let folder = tempfile::tempdir().unwrap();
        for (height, width, channels) in [(3, 5, 1), (4, 1024, 3), (1024, 4, 3), (32, 32, 3)] {
            let map = Map {
                size: [height, width],
                image: vec![9; height * width * channels],
                bits_per_pixel: (0..height * width).map(|i| i as f32).collect(),
            };
            let group = |count| Group {
                title: "The most unusual".into(),
                images: vec![("#12345  3.141 (-0.123)".into(), map.clone()); count],
            };
            let groups = [group(5), group(1)];
            assert_eq!(top(&groups), (height * width * 99 / 100) as f32);
            fits([height, width], &[5, 1]).unwrap();
            write(&folder.path().join("maps.png"), &groups, top(&groups)).unwrap();
        }
        fits([1024, 1024], &[100, 100]).unwrap_err();
    }
}
