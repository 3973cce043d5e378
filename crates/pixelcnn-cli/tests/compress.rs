//! `pixelcnn compress` and `pixelcnn decompress`, run as a program.

mod program;

use std::fs;
use std::io::Write;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use image::{DynamicImage, GrayImage, RgbImage, Rgba, RgbaImage};
use tempfile::TempDir;

use program::{contains, fails, misused, open, photos, picture, pixelcnn, succeeds, text};

const TRAIN: &str = "--held-out 0.2 --nr-filters 2 --nr-logistic-mix 2 --batch-size 8 \
                     --init-batch-size 8 --steps 2 --samples 0";

/// A folder with `run`, a model of 12x8 pictures, and `photos` of them in two folders.
fn trained() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    photos(folder.path());
    succeeds(folder.path(), &format!("train run --data photos {TRAIN}"));
    folder
}

#[test]
fn pictures_come_back() {
    let folder = trained();
    let folder = folder.path();
    picture(99).save(folder.join("one.jpg")).unwrap();
    GrayImage::new(12, 8).save(folder.join("grey.png")).unwrap();
    // What macOS leaves beside a picture is none.
    fs::write(folder.join("photos/._00.png"), "no picture").unwrap();
    let said = succeeds(
        folder,
        "compress run photos one.jpg grey.png -o out/all.pxc",
    );
    let bytes = fs::metadata(folder.join("out/all.pxc")).unwrap().len();
    contains(&said, "26 images in out/all.pxc: ");
    contains(&said, "MB/s");
    // The file's own bits, everything included.
    let bits = 8.0 * bytes as f64 / (26.0 * 288.0);
    contains(&said, &format!("{bits:.4} bits/dim"));

    contains(
        &succeeds(folder, "decompress run out/all.pxc -o back/it"),
        "26 of 26 images written",
    );
    let back = |name: &str| open(&folder.join("back/it").join(name));
    for class in ["dark", "light"] {
        for i in 0..12 {
            let name = format!("{class}/{i:02}.png");
            assert_eq!(
                back(&name),
                open(&folder.join("photos").join(&name)),
                "{name}"
            );
        }
    }
    assert_eq!(back("one.png"), open(&folder.join("one.jpg")));
    assert_eq!(back("grey.png"), RgbImage::new(12, 8));

    // In any batches and on any number of threads it is the same file.
    succeeds(
        folder,
        "compress run photos one.jpg grey.png -o again.pxc --batch-size 5",
    );
    let [first, again] = ["out/all.pxc", "again.pxc"].map(|f| fs::read(folder.join(f)).unwrap());
    assert!(first == again);

    let list = succeeds(folder, "decompress --list again.pxc");
    let names: Vec<_> = list
        .lines()
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!(names.len(), 26);
    assert_eq!(
        (names[0], names[24], names[25]),
        ("dark/00.png", "one.jpg", "grey.png")
    );

    let some = "decompress run again.pxc -o some --only one.jpg light/03.png";
    contains(&succeeds(folder, some), "2 of 2");
    assert_eq!(open(&folder.join("some/one.png")), back("one.png"));
    assert_eq!(
        open(&folder.join("some/light/03.png")),
        back("light/03.png")
    );
    assert!(!folder.join("some/dark").exists());
    let error = fails(folder, "decompress run again.pxc -o some --only none.png");
    contains(&error, "--only none.png: not in again.pxc: see --list");

    // Nothing is overwritten, nor begun where something is there.
    fs::create_dir_all(folder.join("new/light")).unwrap();
    fs::write(folder.join("new/light/11.png"), "mine").unwrap();
    let error = fails(folder, "decompress run again.pxc -o new");
    contains(
        &error,
        "light/11.png` is there already: choose another folder",
    );
    assert_eq!(fs::read(folder.join("new/light/11.png")).unwrap(), b"mine");
    assert!(!folder.join("new/dark").exists());
}

#[test]
fn damage_is_named_and_the_rest_written() {
    let folder = trained();
    let folder = folder.path();
    succeeds(folder, "compress run photos/dark -o dark.pxc");
    let file = fs::read(folder.join("dark.pxc")).unwrap();
    let list = succeeds(folder, "decompress --list dark.pxc");
    let bytes = |line: &str| -> usize { line.split_whitespace().next().unwrap().parse().unwrap() };
    let sizes: Vec<usize> = list.lines().map(bytes).collect();
    let start = file.len() - sizes.iter().sum::<usize>();

    let mut flipped = file.clone();
    flipped[start + sizes[..3].iter().sum::<usize>() + sizes[3] / 2] ^= 4;
    let cut = &flipped[..file.len() - sizes[11] - 1];
    fs::write(folder.join("bad.pxc"), cut).unwrap();
    let output = pixelcnn(folder, "decompress run bad.pxc -o whole");
    assert_eq!(output.status.code(), Some(1));
    contains(&text(&output.stdout), "9 of 12 images written");
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 3, "{errors}");
    contains(&errors, "bad.pxc: 03.png is lost: its bytes were altered");
    contains(&errors, "10.png is lost: the file is cut off");
    contains(&errors, "11.png is lost: the file is cut off");
    for i in 0..12 {
        let written = folder.join(format!("whole/{i:02}.png"));
        match [3, 10, 11].contains(&i) {
            true => assert!(!written.exists()),
            false => assert_eq!(open(&written), picture(7 * i)),
        }
    }
    // What is whole can be had without an error.
    succeeds(folder, "decompress run bad.pxc -o two --only 00.png 09.png");

    for (bytes, part) in [
        (
            &file[..start - 1],
            "cut off in its index: get the file once more",
        ),
        (
            &[&file[..9], &[!file[9]], &file[10..]].concat(),
            "index was altered",
        ),
        (b"\x89PNG", "not a .pxc file"),
        (&[b"pxc\x07", &file[4..]].concat(), "version 7"),
    ] {
        fs::write(folder.join("bad.pxc"), bytes).unwrap();
        for command in [
            "decompress run bad.pxc -o none",
            "decompress --list bad.pxc",
        ] {
            let error = fails(folder, command);
            contains(&error, "bad.pxc: ");
            contains(&error, part);
        }
    }
    assert!(!folder.join("none").exists());

    let seed = format!("train other --data photos --seed 2 {TRAIN}");
    succeeds(folder, &seed);
    let error = fails(folder, "decompress other dark.pxc -o none");
    contains(&error, "dark.pxc: made with the model");
    contains(&error, "give the model that made it");
}

#[test]
fn a_name_leads_nowhere_else() {
    let folder = trained();
    let folder = folder.path();
    fs::create_dir(folder.join("inner")).unwrap();
    for name in [
        "../evil.png",
        "/tmp/evil.png",
        "a/../../evil.png",
        "a\u{1b}[2J.png",
    ] {
        let mut index = DeflateEncoder::new(Vec::new(), Compression::best());
        index.write_all(&[1, name.len() as u8]).unwrap();
        index.write_all(name.as_bytes()).unwrap();
        index.write_all(&[0; 3]).unwrap();
        let index = index.finish().unwrap();
        let numbers = [8, 12, 3, 1, index.len() as u8];
        let mut file = [b"pxc\x01", &[0; 16][..], &numbers, &index, &[0; 3]].concat();
        file.extend(crc32c::crc32c(&file).to_le_bytes());
        fs::write(folder.join("evil.pxc"), file).unwrap();
        for command in [
            "decompress run evil.pxc -o inner",
            "decompress --list evil.pxc",
        ] {
            let error = fails(folder, command);
            contains(&error, &format!("{name:?}: "));
            contains(&error, "rename");
        }
    }
    assert!(!folder.join("evil.png").exists());
}

#[test]
fn what_cannot_be_compressed_is_one_line() {
    let folder = trained();
    let folder = folder.path();
    let at = |name: &str| folder.join(name);
    picture(1).save(at("a.png")).unwrap();
    RgbImage::new(16, 8).save(at("wide.png")).unwrap();
    DynamicImage::new_rgb16(12, 8).save(at("deep.png")).unwrap();
    RgbaImage::from_pixel(12, 8, Rgba([9; 4]))
        .save(at("clear.png"))
        .unwrap();
    fs::write(at("text.png"), "not a picture").unwrap();
    fs::create_dir_all(at("empty/b")).unwrap();
    fs::create_dir_all(at("b")).unwrap();
    picture(2).save(at("b/a.png")).unwrap();
    for (files, part) in [
        (
            "wide.png",
            "wide.png: 16x8 pixels where the model takes 12x8: crop or resize",
        ),
        ("deep.png", "deep.png: it has more than 8 bits"),
        (
            "clear.png",
            "clear.png: its transparency would be lost: remove it",
        ),
        ("text.png", "cannot read `text.png`"),
        ("none.png", "cannot read `none.png`"),
        ("empty", "empty: no PNG or JPEG files in it"),
        (
            "a.png b/a.png",
            "\"a.png\": two files of this name: rename one",
        ),
        ("", "no images"),
        ("a.png --class 1", "not class-conditional"),
    ] {
        contains(
            &fails(folder, &format!("compress run {files} -o out.pxc")),
            part,
        );
        assert!(!at("out.pxc").exists());
    }
    contains(&misused(folder, "compress run a.png"), "--output");
    contains(&misused(folder, "decompress run a.pxc"), "--output");
    contains(
        &misused(folder, "decompress a.pxc --list -o b"),
        "cannot be used with",
    );
    contains(
        &fails(folder, "decompress run none.pxc -o b"),
        "none.pxc: cannot be read",
    );
    contains(
        &fails(folder, "decompress run a.pxc b.pxc -o b"),
        "one file",
    );

    succeeds(
        folder,
        &format!("train classes --data photos --class-conditional {TRAIN}"),
    );
    let error = fails(folder, "compress classes a.png -o out.pxc");
    contains(&error, "give --class");
    succeeds(folder, "compress classes a.png -o out.pxc --class light");
    succeeds(folder, "decompress classes out.pxc -o back");
    assert_eq!(open(&at("back/a.png")), picture(1));

    let help = succeeds(folder, "compress --help");
    contains(&help, "Examples:\n  pixelcnn compress");
}
