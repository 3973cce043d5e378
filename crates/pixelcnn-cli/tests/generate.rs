//! `pixelcnn sample` and `pixelcnn complete`, run as a program.

mod program;

use std::fs;

use image::{GrayImage, Luma, RgbImage};
use tempfile::TempDir;

use program::{contains, fails, misused, open, photos, picture, succeeds};

/// A folder with `run`, a class-conditional model of 12x8 pictures, and the pictures `a.png` and
/// `b.png`.
fn trained() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    photos(folder.path());
    picture(3).save(folder.path().join("a.png")).unwrap();
    picture(90).save(folder.path().join("b.png")).unwrap();
    succeeds(
        folder.path(),
        "train run --data photos --class-conditional --held-out 0.2 --nr-filters 2 \
         --nr-logistic-mix 2 --batch-size 8 --init-batch-size 8 --steps 2 --samples 4",
    );
    folder
}

/// The image at a place of a grid of 12x8 images.
fn cell(grid: &RgbImage, row: u32, column: u32) -> RgbImage {
    image::imageops::crop_imm(grid, column * 13, row * 9, 12, 8).to_image()
}

#[test]
fn samples_are_written_in_every_form() {
    let folder = trained();
    let folder = folder.path();
    let drawn = succeeds(
        folder,
        "sample run --num 4 --seed 5 --temperature 0.8 --output out/grid.png --singles out/single \
         --npz out/all.npz --animate out/film.png",
    );
    contains(&drawn, "4 images in out/grid.png");
    contains(&drawn, "seed 5");
    contains(&drawn, "images/s");
    let grid = open(&folder.join("out/grid.png"));
    assert_eq!(grid.dimensions(), (2 * 13 - 1, 2 * 9 - 1));
    let single = |i: u32| open(&folder.join(format!("out/single/{i:04}.png")));
    for i in 0..4 {
        assert_eq!(cell(&grid, i / 2, i % 2), single(i));
    }
    assert_ne!(single(0), single(1));

    let mut npz = npyz::npz::NpzArchive::open(folder.join("out/all.npz")).unwrap();
    let images = npz.by_name("images").unwrap().unwrap();
    assert_eq!(images.shape(), [4, 8, 12, 3]);
    let images: Vec<u8> = images.into_vec().unwrap();
    assert_eq!(images[..288], single(0).into_raw());
    let labels = npz.by_name("labels").unwrap().unwrap();
    assert_eq!(labels.into_vec::<i64>().unwrap(), [0, 1, 0, 1]);

    // A frame for each row, and one before.
    let film = fs::read(folder.join("out/film.png")).unwrap();
    let frames = film.windows(4).filter(|window| window == b"fcTL").count();
    assert_eq!(frames, 9);
    // It begins with nothing.
    let first = open(&folder.join("out/film.png"));
    assert!(cell(&first, 1, 1).pixels().all(|pixel| pixel.0 == [127; 3]));

    // The same seed draws the same, whatever the threads; another one others.
    succeeds(
        folder,
        "sample run --num 4 --seed 5 --temperature 0.8 --output again.png",
    );
    assert_eq!(open(&folder.join("again.png")), grid);
    succeeds(
        folder,
        "sample run --num 4 --seed 6 --temperature 0.8 --output other.png",
    );
    assert_ne!(open(&folder.join("other.png")), grid);
}

/// What is drawn is data for the other commands.
#[test]
fn samples_are_read_as_data() {
    let folder = trained();
    let folder = folder.path();
    let labels = |scores: &str| -> Vec<String> {
        let mut table = csv::Reader::from_path(folder.join(scores).join("scores.csv")).unwrap();
        table
            .records()
            .map(|row| row.unwrap()[1].to_owned())
            .collect()
    };
    let train = "train --nr-filters 2 --nr-logistic-mix 2 --batch-size 4 --init-batch-size 4 \
                 --steps 1 --samples 0";
    succeeds(folder, "sample run --num 7 --npz drawn.npz");
    contains(
        &succeeds(folder, "score run drawn.npz"),
        "drawn.npz: 7 images",
    );
    assert_eq!(labels("scores"), ["0", "1", "0", "1", "0", "1", "0"]);
    contains(&succeeds(folder, "eval run --data drawn.npz"), " bits/dim");
    succeeds(
        folder,
        &format!("{train} again --data drawn.npz --class-conditional"),
    );
    // Not all classes need be drawn.
    succeeds(folder, "sample run --num 3 --class dark --npz dark.npz");
    succeeds(folder, "score run dark.npz -o dark");
    assert_eq!(labels("dark"), ["0", "0", "0"]);

    // Where there are no classes, there are no labels.
    succeeds(folder, &format!("{train} plain --data drawn.npz"));
    succeeds(folder, "sample plain --num 5 --npz plain.npz");
    let npz = npyz::npz::NpzArchive::open(folder.join("plain.npz")).unwrap();
    assert_eq!(npz.array_names().collect::<Vec<_>>(), ["images"]);
    contains(
        &succeeds(folder, "score plain plain.npz -o plainly"),
        "plain.npz: 5 images",
    );
    assert_eq!(labels("plainly"), ["-1"; 5]);
    succeeds(folder, "eval plain --data plain.npz");
    succeeds(folder, &format!("{train} more --data plain.npz"));
    contains(
        &fails(folder, "eval run --data plain.npz"),
        "no labels: the model takes",
    );
    contains(
        &fails(
            folder,
            &format!("{train} classes --data plain.npz --class-conditional"),
        ),
        "needs labels",
    );
}

#[test]
fn images_are_completed() {
    let folder = trained();
    let folder = folder.path();
    let completed = succeeds(
        folder,
        "complete run a.png b.png --keep top:5 --variants 3 --class light --singles out",
    );
    contains(&completed, "2 images completed 3 times in completed.png");
    let grid = open(&folder.join("completed.png"));
    assert_eq!(grid.dimensions(), (5 * 13 - 1, 2 * 9 - 1));
    for (row, name) in [(0, "a.png"), (1, "b.png")] {
        let original = open(&folder.join(name));
        assert_eq!(cell(&grid, row, 0), original);
        let kept = cell(&grid, row, 1);
        let variants: Vec<_> = (2..5).map(|column| cell(&grid, row, column)).collect();
        for (x, y, pixel) in original.enumerate_pixels() {
            let kept = kept.get_pixel(x, y);
            if y < 5 {
                assert_eq!(kept, pixel);
                assert!(
                    variants
                        .iter()
                        .all(|variant| variant.get_pixel(x, y) == pixel)
                );
            } else {
                assert_eq!(kept.0, [127; 3]);
            }
        }
        assert_ne!(variants[0], variants[1]);
        assert_ne!(variants[0], original);
        let single = open(&folder.join(format!("out/{:04}.png", 3 * row)));
        assert_eq!(single, variants[0]);
    }

    // A mask: white is filled in.
    let mask = GrayImage::from_fn(12, 8, |x, y| {
        Luma([if (4..8).contains(&x) && y > 2 { 255 } else { 0 }])
    });
    mask.save(folder.join("mask.png")).unwrap();
    succeeds(
        folder,
        "complete run a.png --mask mask.png --variants 1 --class 0 --scale 2 --output hole.png",
    );
    let grid = open(&folder.join("hole.png"));
    assert_eq!(grid.dimensions(), (2 * (3 * 13 - 1), 2 * 8));
    let original = open(&folder.join("a.png"));
    let mut changed = 0;
    for (x, y, pixel) in original.enumerate_pixels() {
        let filled = grid.get_pixel(2 * (26 + x), 2 * y);
        if mask.get_pixel(x, y).0 == [0] {
            assert_eq!(filled, pixel);
        } else {
            changed += usize::from(filled != pixel);
        }
    }
    assert!(changed > 10, "{changed} of 20 pixels are drawn");
}

#[test]
fn what_cannot_be_completed_is_one_line() {
    let folder = trained();
    let folder = folder.path();
    RgbImage::new(16, 8).save(folder.join("wide.png")).unwrap();
    GrayImage::new(12, 8)
        .save(folder.join("black.png"))
        .unwrap();
    fs::write(folder.join("text.png"), "not a picture").unwrap();
    for (arguments, parts) in [
        (
            "none.png --keep top:4 --class 0",
            ["cannot read `none.png`", "No such file"],
        ),
        (
            "text.png --keep top:4 --class 0",
            ["cannot read `text.png`", "not a PNG, JPEG"],
        ),
        (
            "a.png --keep top:8 --class 0",
            ["--keep: nothing is left", "keep less"],
        ),
        (
            "a.png --keep right:99 --class 0",
            ["--keep: nothing is left", "keep less"],
        ),
        (
            "a.png --mask wide.png --class 0",
            ["wide.png: 16x8 pixels", "12x8 are wanted: crop or resize"],
        ),
        (
            "a.png --mask black.png --class 0",
            ["--mask: nothing is left", "white"],
        ),
        (
            "a.png --mask none.png --class 0",
            ["cannot read `none.png`", ""],
        ),
        (
            "a.png --keep top:4",
            ["class-conditional: give --class", "from 0 to 1"],
        ),
        (
            "a.png --keep top:4 --class 2",
            ["--class 2", "choose 0 to 1"],
        ),
        (
            "a.png --keep top:4 --class green",
            ["--class green", "dark, light"],
        ),
        (
            "a.png --keep top:4 --class 0 --variants 1000 --scale 64",
            ["a grid of", "choose others"],
        ),
    ] {
        let error = fails(folder, &format!("complete run {arguments}"));
        parts.iter().for_each(|part| contains(&error, part));
        assert!(!folder.join("completed.png").exists(), "{arguments}");
    }
    contains(
        &fails(folder, "complete nowhere a.png --keep top:4"),
        "nowhere: no such file, run folder or checkpoint",
    );
    contains(
        &fails(folder, "complete run --keep top:4"),
        "no image is named",
    );
    for (arguments, part) in [
        ("a.png", "--keep"),
        ("a.png --keep top", "top:16"),
        ("a.png --keep top:0", "top:16"),
        ("a.png --keep middle:3", "top:16"),
        ("a.png --keep top:4 --mask black.png", "cannot be used with"),
        ("a.png --keep top:4 --variants 0", "--variants"),
        (
            "a.png --keep top:4 --temperature 0",
            "must be a number above 0",
        ),
        ("a.png --keep top:4 --output a.gif", ".png"),
    ] {
        contains(&misused(folder, &format!("complete run {arguments}")), part);
    }
    contains(&misused(folder, "sample run --animate film.gif"), ".png");
    contains(&misused(folder, "sample run --npz all.npy"), ".npz");
    contains(&fails(folder, "sample run --class 2"), "choose 0 to 1");

    let help = succeeds(folder, "complete --help");
    contains(&help, "The model cannot look ahead");
    contains(&help, "Examples:\n  pixelcnn complete");
}
