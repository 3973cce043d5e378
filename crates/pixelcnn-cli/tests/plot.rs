//! `pixelcnn plot`, run as a program.

mod program;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use image::RgbImage;

use program::{contains, fails, misused, succeeds};

/// The metrics of a run of so many records, which falls from 8 to `end` bits/dim; the last line is
/// just being written.
fn run(folder: &Path, name: &str, records: u32, end: f64) {
    let mut lines = String::new();
    for i in 1..=records {
        let bits = end + (8.0 - end) * (-0.1 * f64::from(i)).exp();
        let (step, seconds) = (20 * i, 9 * i);
        writeln!(
            lines,
            "{{\"step\":{step},\"epoch\":0,\"train_bits_per_dim\":{bits},\"learning_rate\":0.002,\
             \"images_per_second\":66.0,\"seconds\":{seconds}.5}}"
        )
        .unwrap();
        if i.is_multiple_of(50) {
            writeln!(
                lines,
                "{{\"step\":{step},\"epoch\":1,\"test_bits_per_dim\":{bits},\
                 \"standard_error\":0.01,\"seconds\":{seconds}.5}}"
            )
            .unwrap();
        }
    }
    lines.push_str("{\"step\":9999,\"ep");
    fs::create_dir_all(folder.join(name)).unwrap();
    fs::write(folder.join(name).join("metrics.jsonl"), lines).unwrap();
}

/// The rows in which a colour occurs, from the top.
fn rows(picture: &RgbImage, colour: [u8; 3]) -> Vec<u32> {
    let (left, right) = (100, picture.width() / 2);
    let rows = 0..picture.height();
    rows.filter(|&y| (left..right).any(|x| picture.get_pixel(x, y).0 == colour))
        .collect()
}

const BLUE: [u8; 3] = [0, 114, 178];
const VERMILION: [u8; 3] = [213, 94, 0];
const GREEN: [u8; 3] = [0, 158, 115];

#[test]
fn curves_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "long", 200, 3.0);
    run(folder, "short", 60, 3.5);
    assert_eq!(succeeds(folder, "plot long"), "curve.png\n");
    let one = image::open(folder.join("curve.png")).unwrap().into_rgb8();
    assert!(one.width() >= 800 && one.height() >= 500);
    // The training curve falls through most of the picture, and the test curve lies at its foot.
    let train = rows(&one, BLUE);
    let test = rows(&one, VERMILION);
    assert!(train.len() > 200, "{train:?}");
    assert!(
        !test.is_empty() && test[0] > train[train.len() / 2],
        "{test:?}"
    );
    assert_eq!(rows(&one, GREEN), [0; 0]);

    assert_eq!(
        succeeds(folder, "plot long short -o both.png"),
        "both.png\n"
    );
    let both = image::open(folder.join("both.png")).unwrap().into_rgb8();
    // The worse run ends above the better one.
    let (better, worse) = (rows(&both, BLUE), rows(&both, GREEN));
    assert!(worse.last() < better.last(), "{worse:?} {better:?}");
}

#[test]
fn only_the_first_fall_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // One run falls, the other one also goes up for a while, which is not to be hidden.
    run(folder, "falling", 100, 3.0);
    run(folder, "spoilt", 100, 3.0);
    let metrics = folder.join("spoilt/metrics.jsonl");
    let spoilt: String = fs::read_to_string(&metrics)
        .unwrap()
        .lines()
        .enumerate()
        .map(|(i, line)| match i {
            60..65 => line.replace("train_bits_per_dim\":3.", "train_bits_per_dim\":9."),
            _ => line.into(),
        } + "\n")
        .collect();
    fs::write(metrics, spoilt).unwrap();
    let height = |name: &str| {
        succeeds(folder, &format!("plot {name} -o {name}.png"));
        let picture = image::open(folder.join(format!("{name}.png")))
            .unwrap()
            .into_rgb8();
        rows(&picture, BLUE).len()
    };
    // The picture's height is 1 bit/dim or 6: the fall takes all of it, or a sixth.
    let (falling, spoilt) = (height("falling"), height("spoilt"));
    assert!(falling > 200 && spoilt < 100, "{falling} and {spoilt}");
}

#[test]
fn what_cannot_be_drawn_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    contains(
        &fails(folder, "plot nowhere"),
        "cannot read `nowhere/metrics.jsonl`",
    );
    run(folder, "new", 0, 3.0);
    contains(&fails(folder, "plot new"), "new: nothing was measured yet");
    run(folder, "run", 3, 3.0);
    contains(
        &fails(folder, "plot run -o run/metrics.jsonl/curve.png"),
        "cannot make the folder `run/metrics.jsonl`",
    );
    contains(&misused(folder, "plot run -o curve.svg"), ".png");
    misused(folder, "plot");
    let help = succeeds(folder, "plot --help");
    contains(&help, "Examples:\n  pixelcnn plot ");
}
