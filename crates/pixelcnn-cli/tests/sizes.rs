//! Pictures of any sizes, through every command that takes some.

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use image::{Rgb, RgbImage};
use program::{contains, fails, last_state, open, pixelcnn, succeeds, text};

const TRAIN: &str = "--nr-filters 6 --nr-resnet 1 --batch-size 4 --init-batch-size 8 --epochs 1000 \
                     --samples 4 --cooldown 0";

/// Draws a picture of some width and height.
fn draw(path: &Path, width: u32, height: u32, seed: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let level = |x, y, factor| (factor * (5 * x + 3 * y) + 29 * seed) as u8;
    let picture = RgbImage::from_fn(width, height, |x, y| Rgb([1, 2, 3].map(|f| level(x, y, f))));
    picture.save(path).unwrap();
}

/// Pictures of many sizes, whose names don't follow them.
fn mixed(folder: &Path) {
    for (i, (width, height)) in [
        (33, 47),
        (1, 1),
        (12, 8),
        (33, 47),
        (3, 100),
        (2, 1),
        (12, 8),
    ]
    .into_iter()
    .enumerate()
    {
        draw(&folder.join(format!("{i}.png")), width, height, i as u32);
    }
}

/// A column of a table, by the images' names.
fn column(table: &Path, name: &str) -> BTreeMap<String, f64> {
    let table = fs::read_to_string(table).unwrap();
    let mut lines = table
        .lines()
        .map(|line| line.split(',').collect::<Vec<_>>());
    let titles = lines.next().unwrap();
    let place = |wanted| titles.iter().position(|title| *title == wanted).unwrap();
    let (names, values) = (place("name"), place(name));
    lines
        .map(|line| (line[names].to_owned(), line[values].parse().unwrap()))
        .collect()
}

#[test]
fn a_model_of_odd_pictures_does_all() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for i in 0..20 {
        draw(&folder.join(format!("odd/{i:02}.png")), 33, 47, i);
    }
    let trained = succeeds(folder, &format!("train run --data odd {TRAIN} --steps 6"));
    contains(&trained, "bits/dim");
    contains(&succeeds(folder, "eval run"), "2 images");
    succeeds(folder, "sample run --num 2 --singles drawn -o drawn.png");
    assert_eq!(open(&folder.join("drawn/0001.png")).dimensions(), (33, 47));

    // What is kept stays; of another size too, with a line that says so.
    draw(&folder.join("wide.png"), 45, 9, 7);
    let arguments = "complete run wide.png --keep left:20 --variants 2 --singles done -o done.png";
    let done = pixelcnn(folder, arguments);
    assert!(done.status.success(), "{}", text(&done.stderr));
    contains(&text(&done.stderr), "trained on images of 33x47");
    let (given, done) = (
        open(&folder.join("wide.png")),
        open(&folder.join("done/0001.png")),
    );
    assert_eq!(done.dimensions(), (45, 9));
    let kept = |(x, _, _): &(u32, u32, &Rgb<u8>)| *x < 20;
    let left = |picture: &RgbImage| -> Vec<Rgb<u8>> {
        let pixels = picture.enumerate_pixels().filter(kept);
        pixels.map(|(_, _, pixel)| *pixel).collect()
    };
    assert_eq!(left(&done), left(&given));
    assert_ne!(done, given);
    let refused = pixelcnn(folder, "complete run wide.png odd/00.png --keep top:1");
    assert_eq!(refused.status.code(), Some(1));
    contains(&text(&refused.stderr), "33x47 pixels where 45x9 are wanted");

    succeeds(
        folder,
        "sample run --num 1 --size 5x3 -o small.png --npz small.npz",
    );
    assert_eq!(open(&folder.join("small.png")).dimensions(), (5, 3));
    contains(&succeeds(folder, "eval run --data small.npz"), "1 image ");
    contains(&fails(folder, "sample run --size 0x3"), "image size 0x3");
}

/// Pictures of different sizes are measured as each would be alone, and in their own order.
#[test]
fn mixed_pictures_are_measured_each_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    program::photos(folder);
    succeeds(
        folder,
        &format!("train run --data photos {TRAIN} --steps 4"),
    );
    mixed(&folder.join("mixed"));
    contains(
        &succeeds(folder, "eval run --data mixed -o all.csv"),
        "7 images",
    );
    let all = column(&folder.join("all.csv"), "bits_per_dim");
    assert_eq!(all.len(), 7);
    for (name, bits) in &all {
        let one = format!("eval run --data mixed/{name} -o one.csv --force");
        succeeds(folder, &one);
        let one = column(&folder.join("one.csv"), "bits_per_dim");
        assert_eq!(one[name], *bits, "{name}");
    }

    succeeds(folder, "score run mixed -o scores --maps 7");
    let scores = folder.join("scores/scores.csv");
    assert_eq!(column(&scores, "bits_per_dim"), all);
    let png = column(&scores, "png_bits_per_dim");
    assert!(png["1.png"] > 100.0 && png["0.png"] < 10.0, "{png:?}");
    assert!(open(&folder.join("scores/maps.png")).width() > 200);

    let refused = fails(folder, "train other --data mixed");
    contains(&refused, "0.png is 33x47");
    contains(&refused, "--crop");
}

/// A run on crops of pictures of many sizes, stopped and resumed, is one that was not.
#[test]
fn training_on_crops_can_stop_and_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for i in 0..6 {
        let (width, height) = (20 + 3 * i, 41 - 4 * i);
        draw(
            &folder.join(format!("photos/train/{i}.png")),
            width,
            height,
            i,
        );
    }
    draw(&folder.join("photos/train/small.png"), 15, 60, 9);
    mixed(&folder.join("photos/test"));
    let train = |run: &str, steps| {
        format!("train {run} --data photos --crop 16 {TRAIN} --augmentation flips --steps {steps}")
    };
    let begun = pixelcnn(folder, &train("whole", 12));
    let said = text(&begun.stderr);
    assert!(begun.status.success(), "{said}");
    contains(&said, "1 of 7 pictures are smaller than crops of 16x16");
    succeeds(folder, &train("parted", 5));
    succeeds(folder, "train --resume parted --steps 12");
    let [whole, parted] = ["whole", "parted"].map(|run| last_state(&folder.join(run)));
    assert_eq!((whole.config.height, whole.config.width), (16, 16));
    // Crops of 16x16 that cover the six: 3 + 3 + 3 + 3 + 3 + 2 and more.
    assert!(whole.epoch > 1, "{}", whole.epoch);
    assert_eq!(whole.parameters, parted.parameters);
    assert_eq!(whole.average, parted.average);

    // Whole pictures are measured, and samples are as large as the crops.
    contains(&succeeds(folder, "eval whole"), "7 images");
    contains(&succeeds(folder, "eval whole --split train"), "7 images");
    assert_eq!(
        open(&folder.join("whole/samples.png")).dimensions(),
        (33, 33)
    );
    let arguments = format!("train other --data photos --crop 100 {TRAIN}");
    let refused = pixelcnn(folder, &arguments);
    assert_eq!(refused.status.code(), Some(1));
    contains(
        &text(&refused.stderr),
        "no 100x100 crops can be cut out of it",
    );
    contains(&fails(folder, "train --resume whole --crop 8"), "crop");
    let refused = format!("train other --data photos --crop 0 {TRAIN}");
    contains(&fails(folder, &refused), "crop 0: must be from 1 to");
}
