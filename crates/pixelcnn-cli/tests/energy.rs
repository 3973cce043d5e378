//! Models trained by the energy distance, run as a program.

mod program;

use std::fs;
use std::path::Path;

use image::{Rgb, RgbImage};
use program::{contains, fails, succeeds};

const COLOURS: [[u8; 3]; 2] = [[40, 90, 200], [220, 60, 30]];

/// Pictures 8x8 of one of two colours each, not quite even, sorted by colour.
fn pictures(folder: &Path) {
    let mut random = program::random();
    for (split, count) in [("train", 60), ("test", 10)] {
        for n in 0..count {
            let colour = n % 2;
            let here = folder.join(format!("pictures/{split}/{colour}"));
            fs::create_dir_all(&here).unwrap();
            let picture = RgbImage::from_fn(8, 8, |_, _| {
                let uneven = |level: u8| level + (random() % 5) as u8;
                Rgb(COLOURS[colour].map(uneven))
            });
            picture.save(here.join(format!("{n}.png"))).unwrap();
        }
    }
}

const TRAIN: &str = "--data pictures --energy-distance --nr-filters 12 --batch-size 10 --init-batch-size 20 \
                     --learning-rate 0.003 --warmup-steps 0 --cooldown 0 --epochs 1000";

#[test]
fn samples_look_like_the_images() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let trained = succeeds(
        folder,
        &format!(
            "train run {TRAIN} --optimizer adam --learning-rate-decay 0.999 --steps 300 --samples 4"
        ),
    );
    contains(&trained, "energy");
    let measured = succeeds(folder, "eval run");
    contains(&measured, "energy (averaged weights");

    // Every picture that is drawn is of one of the colours, and both are drawn.
    succeeds(folder, "sample run --num 20 --singles drawn");
    let mut counts = [0; 2];
    let drawn = fs::read_dir(folder.join("drawn")).unwrap();
    for picture in drawn.map(|entry| image::open(entry.unwrap().path()).unwrap()) {
        let pixels: Vec<[u8; 3]> = picture.to_rgb8().pixels().map(|pixel| pixel.0).collect();
        let distance = |of: &[u8; 3], to: &[u8; 3]| -> u32 {
            of.iter()
                .zip(to)
                .map(|(of, to)| u32::from(of.abs_diff(*to)))
                .sum()
        };
        let near = COLOURS.map(|colour| {
            let near = |pixel: &&[u8; 3]| distance(pixel, &colour) < 60;
            pixels.iter().filter(near).count()
        });
        assert!(near[0].max(near[1]) > 50, "{near:?}: {pixels:?}");
        counts[usize::from(near[1] > near[0])] += 1;
    }
    assert!(counts[0] > 2 && counts[1] > 2, "{counts:?}");

    // What is given is kept, and gone on with.
    succeeds(
        folder,
        "complete run pictures/test/1/1.png --keep top:4 -o completed.png",
    );
    let completed = image::open(folder.join("completed.png")).unwrap().to_rgb8();
    let last = completed.width() - 8;
    let given = image::open(folder.join("pictures/test/1/1.png"))
        .unwrap()
        .to_rgb8();
    for y in 0..8 {
        for x in 0..8 {
            let pixel = completed.get_pixel(last + x, y).0;
            match y < 4 {
                true => assert_eq!(pixel, given.get_pixel(x, y).0),
                false => assert!(pixel[0].abs_diff(COLOURS[1][0]) < 60, "{pixel:?}"),
            }
        }
    }
}

#[test]
fn runs_go_on_where_they_stopped_and_move() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let train = format!("{TRAIN} --dropout 0 --optimizer muon --samples 2");
    succeeds(folder, &format!("train whole {train} --steps 20"));
    succeeds(folder, &format!("train parts {train} --steps 9"));
    succeeds(folder, "train --resume parts --steps 20");
    let saved = |run: &str| fs::read(folder.join(run).join("samples.png")).unwrap();
    assert_eq!(saved("whole"), saved("parts"));
    let eval = |run: &str| succeeds(folder, &format!("eval {run}"));
    assert_eq!(eval("whole"), eval("parts"));

    let flags = "--image-size 8 --data pictures --batch-size 10";
    succeeds(folder, "export whole --out model");
    let card = fs::read_to_string(folder.join("model/README.md")).unwrap();
    contains(&card, "without a likelihood");
    succeeds(
        folder,
        &format!("train adam {TRAIN} --optimizer adam --steps 5 --samples 0"),
    );
    succeeds(folder, "export adam --format tensorflow --out original");
    let index = "original/params_cifar.ckpt.index";
    succeeds(folder, &format!("import {index} --out again {flags}"));
    assert_eq!(eval("again"), eval("adam"));
}

#[test]
fn what_needs_a_likelihood_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    pictures(folder);
    let refused = |arguments: &str, because: &str| {
        contains(&fails(folder, arguments), because);
    };
    refused(
        "train run --data pictures --energy-distance --nr-channel-resnet 1",
        "predicted together",
    );
    assert!(!folder.join("run").exists());
    succeeds(folder, &format!("train run {TRAIN} --steps 2 --samples 0"));
    refused("compress run pictures -o out.pxc", "has no likelihood");
    refused("score run pictures", "has no likelihood");
    let train = format!("train classes {TRAIN} --class-conditional --steps 2 --samples 0");
    succeeds(folder, &train);
    refused("classify classes", "has no likelihood");

    // Energies have a picture of their own.
    let train = TRAIN.replace("--energy-distance", "");
    succeeds(folder, &format!("train bits {train} --steps 2 --samples 0"));
    refused(
        "plot run bits",
        "bits/dim do not go into one picture with energy",
    );
    assert_eq!(succeeds(folder, "plot run classes"), "curve.png\n");
    assert!(!folder.join("out.pxc").exists());
    refused(
        "train --resume run --energy-distance=false",
        "--energy-distance: the run was begun",
    );
}
