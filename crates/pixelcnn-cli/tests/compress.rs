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
        "light/11.png` is there already: choose another name, or --force",
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
            "wide.png: 16x8 pixels where 12x8 are wanted: crop or resize",
        ),
        ("deep.png", "deep.png: it has more than 8 bits"),
        (
            "clear.png",
            "clear.png: its transparency would be lost: remove it",
        ),
        ("text.png", "cannot read `text.png`"),
        ("none.png", "cannot read `none.png`"),
        ("empty", "empty: no pictures in it"),
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

/// Standard error of a run that succeeds.
fn told(folder: &std::path::Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{arguments}: {errors}");
    errors
}

#[test]
fn every_format_is_taken_and_the_rest_counted() {
    let folder = trained();
    let folder = folder.path();
    let names = [
        "a.png", "b.jfif", "c.webp", "d.bmp", "e.tif", "f.qoi", "g.ppm", "h.jpe", "i.gif",
    ];
    fs::create_dir(folder.join("mixed")).unwrap();
    for (i, name) in names.iter().enumerate() {
        let format = match name.rsplit_once('.').unwrap().1 {
            "jfif" | "jpe" => image::ImageFormat::Jpeg,
            extension => image::ImageFormat::from_extension(extension).unwrap(),
        };
        let path = folder.join("mixed").join(name);
        picture(i as u32).save_with_format(path, format).unwrap();
    }
    for name in ["a.heic", "b.heic", "notes.txt"] {
        fs::write(folder.join("mixed").join(name), "").unwrap();
    }
    let errors = told(folder, "compress run mixed -o mixed.pxc");
    contains(&errors, "mixed: 3 files are left out: 2 .heic, 1 .txt");
    contains(
        &succeeds(folder, "decompress run mixed.pxc -o back"),
        "9 of 9 images written",
    );
    for name in names {
        let there = image::load_from_memory(&fs::read(folder.join("mixed").join(name)).unwrap());
        let back = folder.join("back").join(name).with_extension("png");
        assert_eq!(open(&back), there.unwrap().into_rgb8(), "{name}");
    }
}

#[test]
fn what_is_lost_is_refused_or_told() {
    let folder = trained();
    let folder = folder.path();
    // Beside the pixels there is a text.
    let mut encoded = Vec::new();
    let mut encoder = png::Encoder::new(&mut encoded, 12, 8);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_source_gamma(png::ScaledFloat::new(1.0));
    encoder
        .add_text_chunk("Author".into(), "me".into())
        .unwrap();
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&picture(1))
        .unwrap();
    fs::write(folder.join("said.png"), encoded).unwrap();
    let errors = told(folder, "compress run photos/dark said.png -o said.pxc");
    contains(
        &errors,
        "1 of 13 pictures has a colour profile or gamma, 1 has metadata (EXIF, XMP, text): only \
         pixels are kept",
    );

    let mut encoded = Vec::new();
    let mut encoder = png::Encoder::new(&mut encoded, 12, 8);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_animated(2, 0).unwrap();
    let mut writer = encoder.write_header().unwrap();
    for i in 0..2 {
        writer.write_image_data(&picture(i)).unwrap();
    }
    drop(writer);
    fs::write(folder.join("moving.png"), encoded).unwrap();
    let error = fails(folder, "compress run moving.png -o moving.pxc");
    contains(&error, "moving.png");
    contains(&error, "it is an animation");
    assert!(!folder.join("moving.pxc").exists());
    // The size is looked at first.
    RgbImage::new(40, 8).save(folder.join("wide.png")).unwrap();
    let error = fails(folder, "compress run wide.png -o wide.pxc");
    contains(&error, "wide.png: 40x8 pixels where 12x8 are wanted");

    // Files that lose pixels anyhow are smaller than all of them.
    picture(1).save(folder.join("small.jpg")).unwrap();
    let output = pixelcnn(folder, "compress run small.jpg -o small.pxc");
    let size = |name: &str| fs::metadata(folder.join(name)).unwrap().len();
    contains(
        &text(&output.stdout),
        &format!(
            "{} bytes of {} in the pictures' files",
            size("small.pxc"),
            size("small.jpg")
        ),
    );
    let larger = size("small.pxc") > size("small.jpg");
    assert_eq!(
        text(&output.stderr).contains("own files are smaller"),
        larger
    );
}

#[test]
fn nothing_is_overwritten_unless_it_is_forced() {
    let folder = trained();
    let folder = folder.path();
    let here = |name: &str| fs::read(folder.join(name)).unwrap();
    picture(5).save(folder.join("a.png")).unwrap();
    let before = here("a.png");
    for force in ["", "--force"] {
        let error = fails(folder, &format!("compress run a.png -o a.png {force}"));
        contains(&error, "one of the pictures");
        assert_eq!(here("a.png"), before);
    }
    fs::write(folder.join("mine"), "mine").unwrap();
    let error = fails(folder, "compress run a.png -o mine");
    contains(
        &error,
        "`mine` is there already: choose another name, or --force",
    );
    assert_eq!(here("mine"), b"mine");
    succeeds(folder, "compress run a.png -o mine --force");
    contains(&succeeds(folder, "decompress --list mine"), "a.png");
    // A device is written into.
    succeeds(folder, "compress run a.png -o /dev/null");
    use std::os::unix::fs::FileTypeExt;
    let null = fs::metadata("/dev/null").unwrap();
    assert!(null.file_type().is_char_device());
    // Of a link the file that it leads to.
    std::os::unix::fs::symlink("far.pxc", folder.join("link")).unwrap();
    succeeds(folder, "compress run a.png -o link");
    assert!(folder.join("link").is_symlink());
    assert_eq!(here("far.pxc"), here("mine"));
    contains(
        &fails(folder, "compress run a.png -o link"),
        "there already",
    );

    for (command, name) in [
        ("sample run --num 1 -o out.png", "out.png"),
        ("sample run --num 1 -o new.png --npz out.npz", "out.npz"),
        (
            "sample run --num 1 -o new.png --singles out",
            "out/0000.png",
        ),
        ("complete run a.png --keep top:4 -o out.png", "out.png"),
        ("eval run --output out.csv", "out.csv"),
        ("plot run -o out.png", "out.png"),
        ("export run --out exported", "exported/model.safetensors"),
        ("score run photos -o scored", "scored/scores.csv"),
    ] {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "mine").unwrap();
        let error = fails(folder, command);
        contains(&error, "is there already");
        contains(&error, "--force");
        assert_eq!(here(name), b"mine", "{command}");
        if !command.starts_with("plot") {
            succeeds(folder, &format!("{command} --force"));
            assert_ne!(here(name), b"mine", "{command}");
        }
        let _ = fs::remove_file(folder.join("new.png"));
    }
    // A name that nobody chose steps aside.
    for name in ["samples.png", "samples-2.png", "samples-3.png"] {
        contains(&succeeds(folder, "sample run --num 1"), name);
    }
    succeeds(folder, "sample run --num 1 --seed 2 --force");
    assert!(!folder.join("samples-4.png").exists());
    assert_ne!(here("samples.png"), here("samples-2.png"));
}

#[test]
fn every_image_is_taken_out_whatever_its_name() {
    let folder = trained();
    let folder = folder.path();
    let long = "x".repeat(251);
    fs::create_dir_all(folder.join("in/d")).unwrap();
    let names = [
        "a.jpg",
        "a.png",
        "a.jpg.png",
        &format!("{long}.png"),
        "d/a.png",
    ];
    for (i, name) in names.iter().enumerate() {
        picture(i as u32)
            .save_with_format(folder.join("in").join(name), image::ImageFormat::Png)
            .unwrap();
    }
    // Two of one name are told apart.
    let errors = told(folder, "compress run in in/d/a.png in/a.jpg -o in.pxc");
    contains(
        &errors,
        "in/d/a.png is stored as a-2.png, for there is another a.png",
    );
    contains(
        &succeeds(folder, "decompress run in.pxc -o out"),
        "7 of 7 images written",
    );
    for (name, i) in [
        ("a.png", 1),
        ("a.jpg.png", 2),
        ("d/a.png", 4),
        ("a-2.png", 4),
        (&format!("{long}.png"), 3),
    ] {
        assert_eq!(open(&folder.join("out").join(name)), picture(i), "{name}");
    }

    // Whatever happens to one, the others are written; and what is there is not written again.
    fs::remove_dir_all(folder.join("out")).unwrap();
    fs::create_dir(folder.join("out")).unwrap();
    fs::write(folder.join("out/d"), "a file in the way").unwrap();
    let output = pixelcnn(folder, "decompress run in.pxc -o out");
    assert_eq!(output.status.code(), Some(1));
    contains(&text(&output.stdout), "6 of 7 images written");
    fs::remove_file(folder.join("out/d")).unwrap();
    let written = fs::metadata(folder.join("out/a.png"))
        .unwrap()
        .modified()
        .unwrap();
    contains(
        &succeeds(folder, "decompress run in.pxc -o out"),
        "1 of 7 images written, 6 there already",
    );
    let now = fs::metadata(folder.join("out/a.png"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(now, written);
    picture(9).save(folder.join("out/a.png")).unwrap();
    let error = fails(folder, "decompress run in.pxc -o out");
    contains(&error, "out/a.png` is there already");
    succeeds(folder, "decompress run in.pxc -o out --force");
    assert_eq!(open(&folder.join("out/a.png")), picture(1));

    let archive = fs::read(folder.join("in.pxc")).unwrap();
    fs::write(folder.join("two.pxc"), archive.repeat(2)).unwrap();
    let errors = told(folder, "decompress run two.pxc -o two");
    contains(&errors, "bytes follow the end of the archive");
}
