//! The shipped model, where a command is given none or its name.
#![cfg(feature = "pretrained")]

mod program;

use std::fs;
use std::path::Path;

use program::{contains, fails, pixelcnn, succeeds, text};

/// 256 images of CIFAR-10 to train on, 64 to test on.
const DATA: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../pixelcnn/tests/data/cifar10-sample.npz"
);
const NOTE: &str = "using the shipped CIFAR-10 model (name a run to use another)\n";

/// Standard output of a run that succeeds with the shipped model, and says so.
fn ships(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{arguments}: {errors}");
    assert_eq!(errors.matches(NOTE).count(), 1, "{errors}");
    text(&output.stdout)
}

/// The error of a run that fails with the shipped model, which it names first.
fn fails_with_it(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments}");
    let errors = text(&output.stderr);
    let error = errors
        .strip_prefix(NOTE)
        .unwrap_or_else(|| panic!("{errors}"));
    assert_eq!(error.lines().count(), 1, "{errors}");
    error.to_owned()
}

#[test]
fn images_are_drawn_and_completed() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    contains(
        &ships(folder, "sample --num 2 --singles out"),
        "2 images in samples.png",
    );
    let [first, second] =
        ["out/0000.png", "out/0001.png"].map(|name| image::open(folder.join(name)).unwrap());
    assert_eq!((first.width(), first.height()), (32, 32));
    assert_ne!(first, second);

    // The picture is no model, and the first one of the files.
    let completed = ships(
        folder,
        "complete out/0000.png --keep top:30 --variants 1 --singles done",
    );
    contains(&completed, "1 image completed once in");
    let done = image::open(folder.join("done/0000.png")).unwrap();
    assert_eq!(done.crop_imm(0, 0, 32, 30), first.crop_imm(0, 0, 32, 30));
}

#[test]
fn it_is_measured_explained_and_exported() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let measured = ships(folder, &format!("eval --data {DATA}"));
    let figure = measured.strip_prefix("test: 64 images  ").unwrap();
    let bits: f64 = figure.split(' ').next().unwrap().parse().unwrap();

    // What it says of itself is what it measures, as far as 64 images tell.
    let info = ships(folder, "info");
    let (_, said) = info.split_once("  bits/dim ").unwrap();
    let (said, _) = said.trim_start().split_once(' ').unwrap();
    let said: f64 = said.parse().unwrap();
    assert!((bits - said).abs() < 0.3, "{bits} and {said} bits/dim");
    contains(&info, "in half precision");

    // What it says goes with it, and it is the same model, used as it is or imported.
    ships(folder, "export --half --out exported");
    let card = fs::read_to_string(folder.join("exported/README.md")).unwrap();
    contains(&card, "| data | cifar10 |");
    fs::rename(
        folder.join("exported/model.safetensors"),
        folder.join("alone.safetensors"),
    )
    .unwrap();
    succeeds(
        folder,
        &format!("import alone.safetensors --out run --data {DATA}"),
    );
    let (figures, _) = figure.split_once(" (").unwrap();
    for command in [
        "eval run".into(),
        format!("eval alone.safetensors --data {DATA}"),
    ] {
        contains(&succeeds(folder, &command), figures);
    }
    // Files of another kind are not written over.
    contains(
        &fails_with_it(folder, "export --out exported"),
        "is there already: choose another name, or --force",
    );
}

#[test]
fn images_are_compressed_and_scored() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    ships(folder, "sample --num 2 --singles images");
    let told = ships(folder, "compress images -o images.pxc");
    contains(&told, "2 files in images.pxc: ");
    let told = succeeds(
        folder,
        "compress shipped:cifar10 images -o small.pxc --verify",
    );
    contains(&told, "2 files in small.pxc: ");
    // Named or not it is the same, and is found without a name.
    let [unnamed, named] =
        ["images", "small"].map(|name| fs::read(folder.join(format!("{name}.pxc"))).unwrap());
    assert_eq!(unnamed.len(), named.len());
    for archive in ["images", "small"] {
        succeeds(
            folder,
            &format!("decompress {archive}.pxc -o {archive}-back"),
        );
        for name in ["0000.png", "0001.png"] {
            let [before, after] = ["images", &format!("{archive}-back")]
                .map(|of| image::open(folder.join(of).join(name)).unwrap());
            assert_eq!(before, after, "{archive} {name}");
        }
    }
    // A copy of the model takes its place.
    ships(folder, "export --out kept");
    succeeds(
        folder,
        "decompress kept/model.safetensors small.pxc -o again",
    );
    for name in ["0000.png", "0001.png"] {
        let [before, after] =
            ["images", "again"].map(|of| image::open(folder.join(of).join(name)).unwrap());
        assert_eq!(before, after, "{name}");
    }
    contains(&ships(folder, "score images -o scores"), "2 images");
    let scores = fs::read_to_string(folder.join("scores/scores.csv")).unwrap();
    assert_eq!(scores.lines().count(), 3, "{scores}");
}

#[test]
fn what_it_cannot_do_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    image::RgbImage::new(16, 8)
        .save(folder.join("wide.png"))
        .unwrap();
    fs::create_dir_all(folder.join("run/checkpoints")).unwrap();
    for (arguments, part) in [
        ("sample --raw", "--raw: the model has one set of weights"),
        ("eval --raw --data wide", "--raw: "),
        ("score --raw cifar10", "--raw: "),
        ("sample --class horse", "not class-conditional"),
        (
            "export",
            "not of a run folder: say where to write with --out",
        ),
        (
            "export --format tensorflow --out x",
            "without the optimizer's state",
        ),
    ] {
        contains(&fails_with_it(folder, arguments), part);
    }
    // A model that was meant is not passed over.
    for (arguments, part) in [
        (
            "complete rnu wide.png --keep top:4",
            "rnu: no such file, run folder",
        ),
        (
            "complete none.safetensors wide.png --keep top:4",
            "none.safetensors: no such file",
        ),
        (
            "complete run wide.png --keep top:4",
            "no checkpoint in `run/checkpoints`",
        ),
        ("sample rnu", "rnu: no such file, run folder"),
        (
            "info shipped:photo",
            "shipped:photo: there is no such model: choose shipped:cifar10",
        ),
    ] {
        contains(&fails(folder, arguments), part);
    }
}
