//! `pixelcnn compress` and `pixelcnn decompress`, run as a program.

mod program;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use image::{DynamicImage, GrayImage, RgbImage, Rgba, RgbaImage};
use tempfile::TempDir;

use program::{
    command, contains, ended, fails, in_letters, misused, open, photos, picture, pixelcnn,
    succeeds, text,
};

const TRAIN: &str = "--held-out 0.2 --nr-filters 2 --nr-logistic-mix 2 --batch-size 8 \
                     --init-batch-size 8 --steps 2 --samples 0";

/// A folder with `run`, a model of 12x8 pictures, and `photos` of them in two folders.
fn trained() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    photos(folder.path());
    succeeds(folder.path(), &format!("train run --data photos {TRAIN}"));
    folder
}

/// A folder with twelve files that any model makes smaller: `letters/00.ppm` and so on.
fn letters(folder: &Path) {
    fs::create_dir(folder.join("letters")).unwrap();
    for i in 0..12 {
        let file = folder.join(format!("letters/{i:02}.ppm"));
        fs::write(file, in_letters(&picture(7 * i))).unwrap();
    }
}

/// Files at any depth, by their paths from the folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match path.is_dir() {
            true => found.extend(
                files(&path)
                    .into_iter()
                    .map(|(n, f)| (format!("{name}/{n}"), f)),
            ),
            false => drop(found.insert(name, fs::read(path).unwrap())),
        }
    }
    found
}

#[test]
fn pictures_come_back() {
    let folder = trained();
    let folder = folder.path();
    letters(folder);
    picture(99).save(folder.join("one.jpg")).unwrap();
    GrayImage::new(12, 8).save(folder.join("grey.png")).unwrap();
    // What macOS leaves beside a picture is none of its owner's.
    fs::write(folder.join("photos/._00.png"), "no picture").unwrap();
    let said = succeeds(
        folder,
        "compress run photos letters one.jpg grey.png -o out/all.pxc --verify",
    );
    let bytes = fs::metadata(folder.join("out/all.pxc")).unwrap().len();
    contains(&said, "38 files in out/all.pxc: ");
    let digits: String = said
        .split(": ")
        .nth(1)
        .unwrap()
        .split(" bytes")
        .next()
        .unwrap()
        .replace(',', "");
    assert_eq!(digits, bytes.to_string());
    contains(&said, " pictures coded in ");
    contains(&said, "MB/s; ");
    contains(&said, "; all read back and the same");

    contains(
        &succeeds(folder, "decompress run out/all.pxc -o back/it"),
        "38 of 38 files written",
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
    for i in 0..12 {
        assert_eq!(back(&format!("{i:02}.png")), picture(7 * i));
    }
    let here = |name: &str| fs::read(folder.join(name)).unwrap();
    assert_eq!(here("back/it/one.jpg"), here("one.jpg"));
    assert_eq!(back("grey.png"), RgbImage::new(12, 8));

    // On any number of threads it is the same file.
    succeeds(
        folder,
        "compress run photos letters one.jpg grey.png -o again.pxc --threads 1",
    );
    assert!(here("out/all.pxc") == here("again.pxc"));

    let list = succeeds(folder, "decompress --list again.pxc");
    let names: Vec<_> = list
        .lines()
        .map(|line| line.split_whitespace().nth(1).unwrap())
        .collect();
    assert_eq!(names.len(), 38);
    assert_eq!(
        (names[0], names[24], names[36], names[37]),
        ("dark/00.png", "00.ppm", "one.jpg", "grey.png")
    );

    let some = "decompress run again.pxc -o some --only one.jpg light/03.png 07.ppm";
    contains(&succeeds(folder, some), "3 of 3");
    assert_eq!(files(&folder.join("some")).len(), 3);
    for name in ["one.jpg", "light/03.png", "07.png"] {
        assert_eq!(
            here(&format!("some/{name}")),
            here(&format!("back/it/{name}"))
        );
    }
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

/// Pictures of all kinds and sizes, and files of other kinds.
fn everything(folder: &Path) {
    fs::create_dir_all(folder.join("in/deep/er")).unwrap();
    let at = |name: &str| folder.join("in").join(name);
    let noise = |x: u32, y: u32| (x * x / 9 + 3 * y + (x * 7 + y * 13) % 11) as u8;
    for [width, height] in [[1, 1], [3, 1000], [1000, 3], [300, 200], [64, 65]] {
        let image = RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([noise(x, y), noise(x + 2, y), noise(x, y + 1)])
        });
        image.save(at(&format!("{width}x{height}.png"))).unwrap();
        image.save(at(&format!("{width}x{height}.ppm"))).unwrap();
        let grey = image::imageops::grayscale(&image);
        grey.save(at(&format!("deep/{width}x{height}.pgm")))
            .unwrap();
        grey.save(at(&format!("deep/{width}x{height}.png")))
            .unwrap();
    }
    let image = RgbaImage::from_fn(90, 70, |x, y| {
        Rgba([noise(x, y), noise(y, x), noise(x, x), noise(y, y) | 128])
    });
    let image = DynamicImage::from(image);
    image.save(at("alpha.png")).unwrap();
    image.to_luma_alpha8().save(at("grey alpha.png")).unwrap();
    image.to_rgb16().save(at("deep/er/16 bits.png")).unwrap();
    image
        .to_rgba16()
        .save(at("deep/er/16 bits alpha.png"))
        .unwrap();
    image
        .to_luma16()
        .save(at("deep/er/16 bits grey.png"))
        .unwrap();
    let rgb = image.to_rgb8();
    for name in ["a.jpg", "b.webp", "c.bmp", "d.tif", "e.qoi", "f.gif"] {
        rgb.save(at(name)).unwrap();
    }
    let pixels: Vec<u8> = (0..40 * 30).map(|i| (i % 7) as u8).collect();
    let palette: Vec<u8> = (0..21).map(|i| (i * 11) as u8).collect();
    png_of(
        &at("palette.png"),
        40,
        30,
        |encoder| {
            encoder.set_color(png::ColorType::Indexed);
            encoder.set_palette(palette);
            encoder.set_trns(vec![0, 255, 128]);
        },
        &[&pixels],
    );
    png_of(
        &at("animation.png"),
        12,
        8,
        |encoder| {
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_animated(2, 0).unwrap();
        },
        &[&picture(1), &picture(2)],
    );
    png_of(
        &at("said.png"),
        12,
        8,
        |encoder| {
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_source_gamma(png::ScaledFloat::new(1.0));
            encoder
                .add_text_chunk("Author".into(), "me".into())
                .unwrap();
        },
        &[&picture(1)],
    );
    let file = fs::File::create(at("cmyk.jpg")).unwrap();
    let encoder = jpeg_encoder::Encoder::new(file, 90);
    let cmyk: Vec<u8> = (0..4 * 16 * 16).map(|i| (i * 3) as u8).collect();
    encoder
        .encode(&cmyk, 16, 16, jpeg_encoder::ColorType::Cmyk)
        .unwrap();
    fs::write(at("notes.txt"), "of no picture").unwrap();
    fs::write(at("nothing"), "").unwrap();
    fs::write(at("photo.heic"), "none that is known").unwrap();
    fs::write(at("broken.png"), &fs::read(at("alpha.png")).unwrap()[..99]).unwrap();
}

fn png_of(
    path: &Path,
    width: u32,
    height: u32,
    set: impl FnOnce(&mut png::Encoder<fs::File>),
    pictures: &[&[u8]],
) {
    let mut encoder = png::Encoder::new(fs::File::create(path).unwrap(), width, height);
    set(&mut encoder);
    let mut writer = encoder.write_header().unwrap();
    pictures
        .iter()
        .for_each(|picture| writer.write_image_data(picture).unwrap());
}

#[test]
fn every_file_comes_back() {
    let folder = trained();
    let folder = folder.path();
    everything(folder);
    let told = told(folder, "compress run in -o in.pxc --verify");
    assert_eq!(told, "");
    succeeds(folder, "compress run in -o again.pxc --threads 1");
    let archive = fs::read(folder.join("in.pxc")).unwrap();
    assert!(archive == fs::read(folder.join("again.pxc")).unwrap());
    let before = files(&folder.join("in"));
    // Never larger but for a few bytes each.
    let size: usize = before
        .iter()
        .map(|(name, file)| name.len() + 12 + file.len())
        .sum();
    assert!(archive.len() < size + 64, "{} of {size}", archive.len());
    succeeds(folder, "decompress run in.pxc -o out");
    let mut after = files(&folder.join("out"));
    let mut made = 0;
    for (name, file) in before {
        if let Some(same) = after.get(&name).filter(|after| **after == file) {
            assert_eq!(same.len(), file.len());
            after.remove(&name);
            continue;
        }
        // Else a PNG file that shows the same.
        let stem = name.rsplit_once('.').unwrap().0;
        let of = [format!("{stem}.png"), format!("{name}.png"), name.clone()];
        let shown = image::load_from_memory(&file).unwrap();
        let found = of.into_iter().find(|of| {
            let image = after
                .get(of)
                .map(|file| image::load_from_memory(file).unwrap());
            image.is_some_and(|image| image == shown)
        });
        after.remove(&found.unwrap_or_else(|| panic!("{name} is lost")));
        made += 1;
    }
    assert!(after.is_empty() && made > 0);
}

#[test]
fn archives_come_from_a_pipe_and_go_into_one() {
    let folder = trained();
    let folder = folder.path();
    letters(folder);
    fs::write(folder.join("notes.txt"), "of no picture").unwrap();
    let through = |arguments: &str, input: &[u8]| {
        let mut command = command(folder, arguments);
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = piped.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = ended(child);
        writer.join().unwrap();
        output
    };
    let output = through("compress run letters notes.txt - -o -", b"from elsewhere");
    assert!(output.status.success());
    contains(&text(&output.stderr), "14 files in standard output: ");
    let archive = output.stdout;
    let output = through("decompress run - -o out", &archive);
    assert!(output.status.success(), "{}", text(&output.stderr));
    contains(&text(&output.stdout), "14 of 14 files written");
    assert_eq!(
        fs::read(folder.join("out/stdin")).unwrap(),
        b"from elsewhere"
    );
    for i in 0..12 {
        assert_eq!(
            open(&folder.join(format!("out/{i:02}.png"))),
            picture(7 * i)
        );
    }
    // What is there is not written again; one file into another program.
    let output = through("decompress run - -o out", &archive);
    contains(
        &text(&output.stdout),
        "0 of 14 files written, 14 there already",
    );
    let output = through("decompress run - -o - --only notes.txt", &archive);
    assert_eq!(text(&output.stdout), "of no picture");
    contains(&text(&output.stderr), "1 of 1 file written");
    let output = through("decompress run - -o - --only 03.ppm", &archive);
    let shown = image::load_from_memory(&output.stdout).unwrap();
    assert_eq!(shown.into_rgb8(), picture(21));
    fs::write(folder.join("all.pxc"), &archive).unwrap();
    let error = fails(folder, "decompress run all.pxc -o -");
    contains(
        &error,
        "standard output takes one file, and there are 14: name it with --only",
    );
    // Cut off, what was there by then is.
    let output = through("decompress run - -o cut", &archive[..archive.len() * 3 / 4]);
    assert_eq!(output.status.code(), Some(1));
    contains(&text(&output.stderr), "standard input: damaged or cut off");
    let written = files(&folder.join("cut")).len();
    assert!((3..14).contains(&written), "{written}");
    let output = through("decompress run - -o none --only nobody", &archive);
    assert_eq!(output.status.code(), Some(1));
    contains(
        &text(&output.stderr),
        "--only nobody: not in standard input",
    );
    let output = through("decompress run - -o -", &archive);
    contains(
        &text(&output.stderr),
        "standard output takes one file: name it with --only",
    );
    let output = through("compress run letters - -o x.pxc --verify", b"");
    contains(
        &text(&output.stderr),
        "--verify reads files twice, and standard input is none",
    );
    let output = through("compress run - - -o x.pxc", b"");
    contains(
        &text(&output.stderr),
        "standard input is one file: name it once",
    );
    let output = through("compress run letters -o - --verify", b"");
    contains(
        &text(&output.stderr),
        "--verify reads a file: name one with --output",
    );
}

#[test]
fn a_model_can_travel_with_the_pictures() {
    let folder = trained();
    let folder = folder.path();
    letters(folder);
    let said = succeeds(
        folder,
        "compress run letters -o with.pxc --embed-model --verify",
    );
    contains(&said, " bytes of the archive; all read back and the same");
    fs::rename(folder.join("run"), folder.join("gone")).unwrap();
    // No word of the shipped model.
    assert_eq!(told(folder, "decompress with.pxc -o back"), "");
    for i in 0..12 {
        assert_eq!(
            open(&folder.join(format!("back/{i:02}.png"))),
            picture(7 * i)
        );
    }
    let archive = fs::read(folder.join("with.pxc")).unwrap();
    let mut damaged = archive.clone();
    damaged[archive.len() / 2] ^= 1;
    fs::write(folder.join("damaged.pxc"), damaged).unwrap();
    let output = pixelcnn(folder, "decompress damaged.pxc -o none");
    assert_eq!(output.status.code(), Some(1));
    contains(
        &text(&output.stderr),
        "damaged.pxc: the model in the file was altered or cut off: get the file once more",
    );
    // Files that need no model come out all the same.
    fs::write(folder.join("notes.txt"), "of no picture").unwrap();
    succeeds(folder, "compress gone letters notes.txt -o mixed.pxc");
    let output = pixelcnn(folder, "decompress mixed.pxc -o mixed");
    assert_eq!(output.status.code(), Some(1));
    contains(&text(&output.stdout), "1 of 13 files written");
    contains(
        &text(&output.stderr),
        "12 pictures not written: mixed.pxc: made with the model",
    );
    let notes = fs::read(folder.join("mixed/notes.txt")).unwrap();
    assert_eq!(notes, b"of no picture");
    succeeds(folder, "decompress gone damaged.pxc -o none");
    // Another one than the archive's is refused even where that is in it.
    succeeds(
        folder,
        &format!("train other --data photos --seed 2 {TRAIN}"),
    );
    contains(
        &fails(folder, "decompress other with.pxc -o no"),
        "made with the model",
    );
}

#[test]
fn damage_is_named_and_the_rest_written() {
    let folder = trained();
    let folder = folder.path();
    letters(folder);
    succeeds(folder, "compress run letters -o dark.pxc");
    let file = fs::read(folder.join("dark.pxc")).unwrap();
    let list = succeeds(folder, "decompress --list dark.pxc");
    let bytes = |line: &str| -> usize { line.split_whitespace().next().unwrap().parse().unwrap() };
    let sizes: Vec<usize> = list.lines().map(bytes).collect();
    let end = file.len() - 36;
    let start = end - sizes.iter().sum::<usize>();

    let mut flipped = file.clone();
    flipped[start + sizes[..3].iter().sum::<usize>() + sizes[3] / 2] ^= 4;
    let cut = &flipped[..end - sizes[11] - 1];
    fs::write(folder.join("bad.pxc"), cut).unwrap();
    let output = pixelcnn(folder, "decompress run bad.pxc -o whole");
    assert_eq!(output.status.code(), Some(1));
    contains(&text(&output.stdout), "9 of 12 files written");
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 4, "{errors}");
    contains(&errors, "bad.pxc: 03.ppm is lost: its bytes were altered");
    contains(&errors, "10.ppm is lost: the file is cut off");
    contains(&errors, "11.ppm is lost: the file is cut off");
    contains(&errors, "bad.pxc: damaged or cut off: files may be missing");
    for i in 0..12 {
        let written = folder.join(format!("whole/{i:02}.png"));
        match [3, 10, 11].contains(&i) {
            true => assert!(!written.exists()),
            false => assert_eq!(open(&written), picture(7 * i)),
        }
    }
    // What is whole can be had with nothing else.
    let some = pixelcnn(folder, "decompress run bad.pxc -o two --only 00.ppm 09.ppm");
    assert_eq!(some.status.code(), Some(0));

    for (bytes, part) in [
        (&file[..20], "cut off in its front: get the file once more"),
        (
            &[&file[..9], &[!file[9]], &file[10..99]].concat(),
            "front was altered",
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
    fs::write(at("a.ppm"), in_letters(&picture(1))).unwrap();
    fs::create_dir_all(at("empty/b")).unwrap();
    for (files, part) in [
        ("none.png", "cannot read `none.png`: no such file"),
        ("empty", "empty: no files in it: name another folder"),
        ("", "no files: name some"),
        ("a.ppm --class 1", "not class-conditional"),
    ] {
        contains(
            &fails(folder, &format!("compress run {files} -o out.pxc")),
            part,
        );
        assert!(!at("out.pxc").exists());
    }
    contains(&misused(folder, "compress run a.ppm"), "--output");
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
        "give one archive",
    );

    succeeds(
        folder,
        &format!("train classes --data photos --class-conditional {TRAIN}"),
    );
    let error = fails(folder, "compress classes a.ppm -o out.pxc");
    contains(&error, "give --class");
    succeeds(folder, "compress classes a.ppm -o out.pxc --class light");
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
fn nothing_is_overwritten_unless_it_is_forced() {
    let folder = trained();
    let folder = folder.path();
    let here = |name: &str| fs::read(folder.join(name)).unwrap();
    picture(5).save(folder.join("a.png")).unwrap();
    let before = here("a.png");
    for force in ["", "--force"] {
        let error = fails(folder, &format!("compress run a.png -o a.png {force}"));
        contains(&error, "one of the files");
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
        fs::write(folder.join("in").join(name), in_letters(&picture(i as u32))).unwrap();
    }
    // Two of one name are told apart.
    let errors = told(folder, "compress run in in/d/a.png in/a.jpg -o in.pxc");
    contains(
        &errors,
        "in/d/a.png is stored as a-2.png, for there is another a.png",
    );
    contains(
        &succeeds(folder, "decompress run in.pxc -o out"),
        "7 of 7 files written",
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
    contains(&text(&output.stdout), "6 of 7 files written");
    fs::remove_file(folder.join("out/d")).unwrap();
    let written = fs::metadata(folder.join("out/a.png"))
        .unwrap()
        .modified()
        .unwrap();
    contains(
        &succeeds(folder, "decompress run in.pxc -o out"),
        "1 of 7 files written, 6 there already",
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
