//! The program, run as a program, for the tests of its commands.

#![allow(dead_code)] // Not every test needs all of it.

use std::fs;
use std::path::Path;
use std::process::Output;

use assert_cmd::cargo::cargo_bin;
use image::{Rgb, RgbImage};

/// Runs `pixelcnn ARGUMENTS` in `folder`.
pub fn pixelcnn(folder: &Path, arguments: &str) -> Output {
    std::process::Command::new(cargo_bin!("pixelcnn"))
        .args(arguments.split_whitespace())
        .args(["--threads", "2"])
        .current_dir(folder)
        .output()
        .unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a run that succeeds.
pub fn succeeds(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{arguments}: {errors}");
    text(&output.stdout)
}

/// The one line on standard error of a run that fails with status 1.
pub fn fails(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments}: {errors}");
    assert_eq!(errors.lines().count(), 1, "{arguments}: {errors}");
    assert!(errors.starts_with("pixelcnn: "), "{arguments}: {errors}");
    errors
}

/// Standard error of a run that is refused as wrong usage.
pub fn misused(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}: {errors}");
    errors
}

#[track_caller]
pub fn contains(text: &str, part: &str) {
    assert!(text.contains(part), "{part:?} is not in {text:?}");
}

/// A picture of 12x8 pixels, no two alike.
pub fn picture(seed: u32) -> RgbImage {
    RgbImage::from_fn(12, 8, |x, y| {
        let level = |factor| (factor * (x + 12 * y) + seed) as u8;
        Rgb([level(2), level(1), level(2) / 2])
    })
}

/// Makes `photos` in `folder`: a folder of twelve such pictures for each of two classes.
pub fn photos(folder: &Path) {
    for class in ["dark", "light"] {
        let photos = folder.join("photos").join(class);
        fs::create_dir_all(&photos).unwrap();
        for i in 0..12 {
            picture(7 * i + 50 * u32::from(class == "light"))
                .save(photos.join(format!("{i:02}.png")))
                .unwrap();
        }
    }
}

pub fn open(path: &Path) -> RgbImage {
    image::open(path).unwrap().into_rgb8()
}
