//! A confusion matrix as a PNG file.

use std::path::Path;

use pixelcnn::picture::{grid, write_png};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::chart::carry_font;
use crate::terminal::{Result, note};

/// Of the whole picture.
const MARGIN: usize = 24;
/// Room for the names at the left, and above.
const NAMES: usize = 150;
/// Of all classes together, about.
const SIDE: usize = 720;
/// The smallest cell that has its number written into it, and the smallest that has a name.
const NUMBERED: usize = 40;
const NAMED: usize = 16;
/// More classes make no picture that a screen can show.
const MOST: usize = 4096;

/// Writes how many of each class were found to be of each, \[own, found\], each row coloured by its
/// shares.
pub fn write(path: &Path, counts: &[usize], names: &[String]) -> Result {
    let undrawn =
        |error: &dyn std::fmt::Display| format!("cannot draw `{}`: {error}", path.display());
    let classes = names.len();
    if classes > MOST {
        note(format_args!(
            "`{}`: no picture of {classes} classes",
            path.display()
        ));
        return Ok(());
    }
    let cell = (SIDE / classes).clamp(1, 100);
    let first = MARGIN + NAMES;
    let side = first + cell * classes + MARGIN;
    let mut pixels = vec![255; side * side * 3];
    carry_font()?;
    let area = BitMapBackend::with_buffer(&mut pixels, (side as u32, side as u32));
    let area = area.into_drawing_area();
    let at = |number: usize| (first + number * cell) as i32;
    let middle = |number: usize| at(number) + cell as i32 / 2;
    let style = |size: usize, colour: &RGBColor, horizontal, vertical| {
        let style = ("sans-serif", size as u32).into_font().color(colour);
        style.pos(Pos::new(horizontal, vertical))
    };
    for (own, row) in counts.chunks_exact(classes).enumerate() {
        let all = row.iter().sum::<usize>().max(1);
        for (found, &count) in row.iter().enumerate() {
            let share = count as f64 / all as f64;
            let colour = ViridisRGB.get_color_normalized(share, 0.0, 1.0);
            let corners = [(at(found), at(own)), (at(found + 1), at(own + 1))];
            let filled = Rectangle::new(corners, colour.filled());
            area.draw(&filled).map_err(|error| undrawn(&error))?;
            if cell >= NUMBERED {
                let colour = if share > 0.6 { &BLACK } else { &WHITE };
                let style = style(cell / 3, colour, HPos::Center, VPos::Center);
                let text = Text::new(count.to_string(), (middle(found), middle(own)), style);
                area.draw(&text).map_err(|error| undrawn(&error))?;
            }
        }
    }
    if cell >= NAMED {
        let size = (cell / 3).clamp(13, 20);
        for (class, name) in names.iter().enumerate() {
            let left = style(size, &BLACK, HPos::Right, VPos::Center);
            let above =
                style(size, &BLACK, HPos::Left, VPos::Center).transform(FontTransform::Rotate270);
            let places = [
                (left, (first as i32 - 8, middle(class))),
                (above, (middle(class), first as i32 - 8)),
            ];
            for (style, place) in places {
                let text = Text::new(name.as_str(), place, style);
                area.draw(&text).map_err(|error| undrawn(&error))?;
            }
        }
    }
    let titles = [
        ((MARGIN as i32, MARGIN as i32), "class by row,"),
        ((MARGIN as i32, MARGIN as i32 + 24), "found by column"),
    ];
    for (place, title) in titles {
        let text = Text::new(title, place, style(18, &BLACK, HPos::Left, VPos::Top));
        area.draw(&text).map_err(|error| undrawn(&error))?;
    }
    area.present().map_err(|error| undrawn(&error))?;
    drop(area);
    Ok(write_png(
        path,
        &grid(&pixels, [1, side, side, 3], 1, 0, 1)?,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_classes_has_its_picture() {
        let folder = tempfile::tempdir().unwrap();
        for classes in [1, 2, 10, 100, 1000] {
            let names: Vec<String> = (0..classes).map(|class| format!("class {class}")).collect();
            let path = folder.path().join(format!("{classes}.png"));
            write(&path, &vec![3; classes * classes], &names).unwrap();
        }
        let (names, path) = (vec![String::new(); MOST + 1], folder.path().join("x.png"));
        write(&path, &[], &names).unwrap();
        assert!(!path.exists());
    }
}
