//! `pixelcnn score`, run as a program.

mod program;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use image::{Rgb, RgbImage};
use tempfile::TempDir;

use program::{contains, fails, misused, succeeds};

/// A noisy picture of 12x8 pixels, no two alike.
fn picture(seed: u32) -> RgbImage {
    RgbImage::from_fn(12, 8, |x, y| {
        let noise = (seed + 97 * x + 1009 * y).wrapping_mul(2_654_435_761);
        let level = |shift: u32| (40 + 5 * x + 3 * y + (noise >> shift) % 32) as u8;
        Rgb([level(7), level(13), level(19)])
    })
}

/// A folder with `run`, a model of the 12x8 pictures in `photos`, which are in two classes, and
/// other pictures in `flat`.
fn trained() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for class in ["a", "b"] {
        let photos = folder.path().join("photos").join(class);
        fs::create_dir_all(&photos).unwrap();
        for i in 0..20 {
            let picture = picture(1000 * i + u32::from(class == "b"));
            picture.save(photos.join(format!("{i}.png"))).unwrap();
        }
    }
    let flat = folder.path().join("flat");
    fs::create_dir_all(&flat).unwrap();
    for i in 0..9u8 {
        let picture = RgbImage::from_pixel(12, 8, Rgb([20 * i, 200, 255 - 20 * i]));
        picture.save(flat.join(format!("{i}.png"))).unwrap();
    }
    succeeds(
        folder.path(),
        "train run --data photos --held-out 0.3 --nr-filters 2 --nr-logistic-mix 2 \
         --batch-size 8 --init-batch-size 8 --steps 4 --samples 0",
    );
    folder
}

/// The columns of a table, by their names.
type Table = HashMap<String, Vec<String>>;

fn table(path: &Path) -> Table {
    let mut table = csv::Reader::from_path(path).unwrap();
    let names = table.headers().unwrap().clone();
    let rows: Vec<_> = table.records().map(|row| row.unwrap()).collect();
    let column = |i: usize| rows.iter().map(|row| row[i].to_owned()).collect();
    names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.to_owned(), column(i)))
        .collect()
}

fn numbers(column: &[String]) -> Vec<f64> {
    column.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn images_get_scores_and_maps() {
    let folder = trained();
    let folder = folder.path();
    let said = succeeds(folder, "score run photos --maps 3 -o out");
    contains(&said, "photos test: 12 images");
    contains(&said, "most unusual: ");
    contains(&said, "heat maps from 0 to ");
    contains(&said, "averaged weights, step 4");
    assert!(!said.contains("AUROC"));

    // The run's own data: what it was not trained on, with the figures of `eval`.
    let scores = table(&folder.join("out/scores.csv"));
    succeeds(folder, "eval run --output figures.csv");
    let figures = table(&folder.join("figures.csv"));
    for column in ["index", "label", "bits_per_dim"] {
        assert_eq!(scores[column], figures[column], "{column}");
    }
    let [bits, png, jpeg_xl, corrected] = [
        "bits_per_dim",
        "png_bits_per_dim",
        "jpeg_xl_bits_per_dim",
        "corrected",
    ]
    .map(|name| numbers(&scores[name]));
    for i in 0..bits.len() {
        assert!((corrected[i] - (bits[i] - png[i].min(jpeg_xl[i]))).abs() < 1e-9);
        let name = &scores["name"][i];
        assert!(folder.join("photos").join(name).exists(), "{name}");
        assert_eq!(name.starts_with("b/"), scores["label"][i] == "1");
    }
    for chart in ["histogram.png", "corrected.png"] {
        assert_eq!(
            image::open(folder.join("out").join(chart)).unwrap().width(),
            960
        );
    }
    assert!(!folder.join("out/against.csv").exists());

    // The most unusual image is the first in the picture, enlarged, with its map at its right.
    let most = (0..12)
        .max_by(|&a, &b| corrected[a].total_cmp(&corrected[b]))
        .unwrap();
    let name = &scores["name"][most];
    contains(&said, &format!("most unusual: {most} {name} ("));
    let original = image::open(folder.join("photos").join(name))
        .unwrap()
        .into_rgb8();
    let maps = image::open(folder.join("out/maps.png"))
        .unwrap()
        .into_rgb8();
    let (scale, left, top) = (10, 12, 6 + 30 + 30);
    for (x, y, pixel) in original.enumerate_pixels() {
        let place = |corner| (left + x * scale + corner, top + y * scale + corner);
        for (x, y) in [place(0), place(scale - 1)] {
            assert_eq!(maps.get_pixel(x, y), pixel);
        }
    }
    let map: Vec<_> = (0..96)
        .map(|i| maps.get_pixel(left + (12 + i % 12) * scale + 6, top + i / 12 * scale))
        .collect();
    assert!(map.iter().any(|colour| *colour != map[0]));

    let said = succeeds(folder, "score run photos --split train --limit 4 --raw");
    contains(&said, "photos train: 4 images");
    contains(&said, "raw weights");
    assert!(folder.join("scores/scores.csv").exists());
    assert!(!folder.join("scores/maps.png").exists());
}

#[test]
fn two_sets_are_compared() {
    let folder = trained();
    let folder = folder.path();
    let said = succeeds(folder, "score run photos --against flat --maps 2");
    // All pictures of a folder that the run does not know.
    contains(&said, "flat: 9 images");
    let of = |name: &str| table(&folder.join("scores").join(name));
    let (usual, unusual) = (of("scores.csv"), of("against.csv"));
    assert_eq!(unusual["name"][2], "2.png");
    assert_eq!(unusual["label"][2], "-1");
    let auroc = |score: &dyn Fn(&Table) -> Vec<f64>| {
        let (usual, unusual) = (score(&usual), score(&unusual));
        let pairs = unusual
            .iter()
            .flat_map(|a| usual.iter().map(move |b| (a, b)));
        let wins = pairs.map(|(a, b)| {
            if a > b {
                1.0
            } else if a < b {
                0.0
            } else {
                0.5
            }
        });
        format!(
            "{:.3}",
            wins.sum::<f64>() / (usual.len() * unusual.len()) as f64
        )
    };
    let less = |name: &'static str| {
        auroc(&move |set| {
            let pairs = numbers(&set["bits_per_dim"])
                .into_iter()
                .zip(numbers(&set[name]));
            pairs.map(|(bits, file)| bits - file).collect()
        })
    };
    for (name, expected) in [
        (
            "likelihood alone",
            auroc(&|set| numbers(&set["bits_per_dim"])),
        ),
        ("corrected by PNG", less("png_bits_per_dim")),
        ("corrected by JPEG XL", less("jpeg_xl_bits_per_dim")),
        (
            "corrected by the smaller",
            auroc(&|set| numbers(&set["corrected"])),
        ),
    ] {
        contains(&said, &format!("  {name:24} {expected}"));
    }
    contains(
        &said,
        "an image of flat scores as more unusual than one of photos test",
    );
    assert!(folder.join("scores/maps-against.png").exists());
}

/// Nothing of earlier scores is taken for a part of the new ones.
#[test]
fn earlier_scores_make_room() {
    let folder = trained();
    let folder = folder.path();
    let files = |of: &str| -> Vec<String> {
        let entries = fs::read_dir(folder.join(of)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name != "notes.txt").collect();
        names.sort();
        names
    };
    let removed = |arguments: &str| -> String {
        let output = program::pixelcnn(folder, &format!("score run {arguments} --force"));
        assert!(output.status.success(), "{arguments}");
        program::text(&output.stderr)
    };
    succeeds(folder, "score run photos --against flat --maps 1");
    fs::write(folder.join("scores/notes.txt"), "mine").unwrap();
    let all = [
        "against.csv",
        "corrected.png",
        "histogram.png",
        "maps-against.png",
        "maps.png",
        "scores.csv",
    ];
    assert_eq!(files("scores"), all);
    assert!(!removed("photos --against flat --maps 1").contains("removed"));
    assert_eq!(files("scores"), all);
    contains(
        &removed("photos --maps 1"),
        "scores: removed against.csv, maps-against.png of earlier scores",
    );
    assert_eq!(
        files("scores"),
        ["corrected.png", "histogram.png", "maps.png", "scores.csv"]
    );
    contains(
        &removed("photos"),
        "scores: removed maps.png of earlier scores",
    );
    assert_eq!(
        files("scores"),
        ["corrected.png", "histogram.png", "scores.csv"]
    );
    assert!(folder.join("scores/notes.txt").exists());

    // What only has the name is somebody's.
    fs::create_dir(folder.join("mine")).unwrap();
    for name in ["against.csv", "maps.png"] {
        fs::write(folder.join("mine").join(name), "mine").unwrap();
    }
    assert_eq!(removed("photos -o mine"), "");
    assert_eq!(fs::read(folder.join("mine/maps.png")).unwrap(), b"mine");
    assert_eq!(fs::read(folder.join("mine/against.csv")).unwrap(), b"mine");
}

#[test]
fn what_cannot_be_scored_is_one_line() {
    let folder = trained();
    let folder = folder.path();
    fs::write(folder.join("file"), "").unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    for (arguments, part) in [
        ("run", "0 data sets beside the model: give one"),
        ("run photos flat", "--against"),
        ("run nowhere", "nowhere not found: give cifar10"),
        ("run empty", "no pictures in it"),
        ("run photos -o file", "cannot make the folder `file`"),
        ("nowhere photos", "nowhere: no such file"),
    ] {
        contains(&fails(folder, &format!("score {arguments}")), part);
        assert!(!folder.join("scores").exists(), "{arguments}");
    }
    misused(folder, "score");
    misused(folder, "score run photos --limit 0");
    misused(folder, "score run photos --maps 0");
    misused(folder, "score run photos --split all");
    let help = succeeds(folder, "score --help");
    contains(&help, "Examples:\n  pixelcnn score");
    contains(&help, "Serrà et al., 2020");
}

/// Ctrl-C leaves without half of the files.
#[cfg(unix)]
#[test]
fn interrupted_scores_are_not_written() {
    use std::process::{Command, Stdio};

    let folder = trained();
    let folder = folder.path();
    // Enough of them that they take minutes.
    let images = 100_000usize;
    let header =
        format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({images}, 8, 12, 3), }}");
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    file.extend(format!("{header:<117}\n").bytes());
    file.resize(file.len() + images * 8 * 12 * 3, 77);
    fs::write(folder.join("many.npy"), file).unwrap();
    let child = Command::new(assert_cmd::cargo::cargo_bin!("pixelcnn"))
        .args(["score", "run", "many.npy", "--threads", "2"])
        .current_dir(folder)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    program::wait_until(|| folder.join("scores").exists());
    let pid = child.id().to_string();
    Command::new("kill").args(["-INT", &pid]).status().unwrap();
    let output = program::ended(child);
    assert_eq!(output.status.code(), Some(130));
    contains(&program::text(&output.stderr), "nothing was written");
    assert_eq!(fs::read_dir(folder.join("scores")).unwrap().count(), 0);
}
