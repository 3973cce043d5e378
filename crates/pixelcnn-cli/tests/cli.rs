//! The program, run as a program.

mod program;

use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::process::Stdio;

use assert_cmd::cargo::cargo_bin;
use npyz::WriterBuilder;
use tempfile::TempDir;

use program::{contains, fails, misused, pixelcnn, succeeds, text};

/// A folder with `tiny.npy`: 40 images of 8x8x3, no two alike.
fn tiny() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut random = 1u32;
    let values = (0..40 * 8 * 8 * 3).map(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 24) as u8
    });
    let mut file = Cursor::new(Vec::new());
    let mut array = npyz::WriteOptions::new()
        .default_dtype()
        .shape(&[40, 8, 8, 3])
        .writer(&mut file)
        .begin_nd()
        .unwrap();
    array.extend(values).unwrap();
    array.finish().unwrap();
    fs::write(folder.path().join("tiny.npy"), file.into_inner()).unwrap();
    folder
}

/// Trains on `tiny.npy` for six steps; `run` is the run folder.
const TRAIN: &str = "train run --data tiny.npy --nr-filters 2 --nr-logistic-mix 2 \
    --batch-size 8 --init-batch-size 8 --steps 6 --samples 4";

#[test]
fn help_teaches() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["", "train ", "eval ", "sample ", "info ", "completions "] {
        let help = succeeds(folder.path(), &format!("{command}--help"));
        contains(&help, "Examples:\n  ");
        assert!(help.matches("pixelcnn ").count() >= 3, "{help}");
    }
    let help = succeeds(folder.path(), "train --help");
    for flag in "data-dir data save-dir save-interval nr-resnet nr-filters nr-logistic-mix \
        nonlinearity class-conditional learning-rate learning-rate-decay batch-size \
        init-batch-size dropout epochs steps polyak-decay polyak-start samples seed size held-out \
        eval-interval checkpoint-minutes preset config resume from threads device log"
        .split_whitespace()
    {
        contains(&help, &format!("--{flag}"));
    }
    // What a setting is in each preset is taken from the presets.
    contains(&help, "cifar10 0.999995");
}

#[test]
fn the_original_costs_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let info = succeeds(folder.path(), "info --preset cifar10");
    contains(&info, "53,659,080");
    contains(&info, "24,370,216,960");
    contains(&succeeds(folder.path(), "info --preset small"), "974,856");
}

#[test]
fn shells_get_completions() {
    let folder = tempfile::tempdir().unwrap();
    let script = succeeds(folder.path(), "completions bash");
    contains(&script, "_pixelcnn()");
    contains(&script, "--class-conditional");
    misused(folder.path(), "completions tcsh");
}

#[test]
fn devices_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let listed = succeeds(folder.path(), "devices");
    assert_eq!(listed.lines().next(), Some("cpu     2 threads"));
}

/// What is missing is said before any data are looked for. The tests run where no GPU has this
/// number.
#[test]
fn a_gpu_that_can_not_be_used_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let error = fails(folder.path(), "eval --device cuda:1000 --data nowhere");
    #[cfg(not(feature = "cuda"))]
    contains(&error, "this build has none of that name: choose auto");
    #[cfg(not(any(feature = "cuda", feature = "wgpu")))]
    contains(&error, "(GPUs need the cargo feature cuda or wgpu)");
    #[cfg(feature = "cuda")]
    assert!(
        error.contains("the NVIDIA driver (libcuda) is not found: install the driver")
            || error.contains("is not found: install the CUDA toolkit, or `pip install")
            || error.contains("there is no GPU number 1000: this machine has"),
        "{error}"
    );
}

#[test]
fn wrong_usage_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let misused = |arguments: &str| misused(folder.path(), arguments);
    contains(
        &misused("train --preset huge"),
        "[possible values: quick, small, cifar10, cifar10-best]",
    );
    contains(
        &misused("train --nonlinearity tanh"),
        "[possible values: concat_elu, elu, relu]",
    );
    contains(
        &misused("train --resume run --preset small"),
        "cannot be used with",
    );
    contains(&misused("train run --resume run"), "cannot be used with");
    contains(&misused("train --from file"), "--resume");
    contains(&misused("train --precision f16"), "f32, tf32 or bf16");
    for temperature in ["0", "-1", "nan", "inf", "warm"] {
        let error = misused(&format!("sample run --temperature {temperature}"));
        contains(&error, "must be a number above 0");
    }
    contains(&misused("sample run --output picture.gif"), ".png");
    contains(&misused("eval run --output figures.txt"), ".csv or .npz");
    misused("eval run --batch-size 0");
    misused("eval run --limit 0");
    misused("sample run --num 0");
    misused("info run --threads 0");
}

#[test]
fn settings_out_of_range_are_one_line() {
    let folder = tiny();
    for (flags, part) in [
        ("--batch-size 0", "batch_size = 0: must be"),
        ("--dropout 1", "dropout = 1: must be"),
        ("--learning-rate -1", "learning_rate = -1: must be"),
        ("--learning-rate nan", "learning_rate = NaN: must be"),
        ("--nr-filters 0", "nr_filters = 0: must be"),
        ("--epochs 0", "epochs = 0: must be"),
        ("--size 0", "size 0: must be from 1 to 16384"),
        ("--held-out 1.5", "held-out fraction 1.5"),
        ("--data nowhere", "nowhere not found"),
        ("--class-conditional", "needs labels"),
        (
            "--batch-size 64",
            "36 training images do not fill a batch of 64",
        ),
        ("--device abacus", "device abacus"),
        (
            "--device cpu --precision tf32",
            "--precision tf32: the CPU computes in f32 or bf16: leave it out",
        ),
        ("--log pixelcnn=loud", "--log pixelcnn=loud"),
    ] {
        let data = if flags.starts_with("--data") {
            ""
        } else {
            "--data tiny.npy"
        };
        contains(
            &fails(folder.path(), &format!("train run {data} {flags}")),
            part,
        );
        assert!(!folder.path().join("run").exists(), "{flags}");
    }
}

#[test]
fn config_files_are_checked() {
    let folder = tiny();
    let config = |text: &str| {
        fs::write(folder.path().join("my.toml"), text).unwrap();
        fails(folder.path(), "train run --data tiny.npy --config my.toml")
    };
    let error = config("[model]\nnr_filters = 8\nnr_filter = 9\n");
    contains(&error, "`my.toml`: line 3: unknown field `nr_filter`");
    contains(
        &config("[train]\n\nseed = \"one\"\n"),
        "`my.toml`: line 3: invalid type",
    );
    contains(&config("[train\n"), "`my.toml`: line 1: ");
    contains(&config("[train]\nbatch_size = 0\n"), "batch_size = 0");
    contains(&config("[model]\nheight = 32\n"), "another height");
    contains(
        &fails(folder.path(), "train run --config none.toml"),
        "none.toml",
    );
}

#[test]
fn what_is_not_a_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["eval", "sample", "info"] {
        contains(
            &fails(folder.path(), &format!("{command} nowhere")),
            "nowhere: no such file, run folder or checkpoint",
        );
    }
    contains(
        &fails(folder.path(), "train --resume nowhere"),
        "not the folder of a run",
    );
    fs::create_dir(folder.path().join("empty")).unwrap();
    contains(&fails(folder.path(), "info empty"), "no checkpoint in");
    fs::write(folder.path().join("file"), "not a checkpoint").unwrap();
    fails(folder.path(), "eval file");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = std::process::Command::new(cargo_bin!("pixelcnn"))
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = program::ended(child);
    assert!(output.status.success());
    assert_eq!(text(&output.stderr), "");
}

#[test]
fn a_model_is_trained_measured_sampled_and_explained() {
    let folder = tiny();
    let folder = folder.path();
    let output = succeeds(folder, TRAIN);
    contains(&output, "tiny.npy train: 36 images 8x8x3, no labels");
    contains(&output, "epoch 1  step 4  test ");
    contains(&output, "bits/dim  (best)");
    contains(&output, "samples run/samples.png");
    contains(&output, "pixelcnn train --resume run --steps 12");
    for file in [
        "config.toml",
        "metrics.jsonl",
        "samples.png",
        "checkpoints/best.safetensors",
    ] {
        assert!(folder.join("run").join(file).exists(), "{file}");
    }
    let printed = output
        .lines()
        .rev()
        .find(|line| line.starts_with("test    "))
        .unwrap();
    let printed = printed
        .trim_start_matches("test    ")
        .split(" (")
        .next()
        .unwrap();

    // The figure is the same from the checkpoint, and the mean of the images' figures.
    let output = succeeds(folder, "eval run --batch-size 3 --output figures.csv");
    assert_eq!(
        output,
        format!("test: 4 images  {printed} (averaged weights, step 6)\n")
    );
    let table = fs::read_to_string(folder.join("figures.csv")).unwrap();
    let mut lines = table.lines();
    assert_eq!(lines.next(), Some("index,label,bits_per_dim,name"));
    let bits: Vec<f64> = lines
        .enumerate()
        .map(|(index, line)| {
            let figure = line.strip_prefix(&format!("{index},-1,")).unwrap();
            // Arrays have no names.
            figure.strip_suffix(',').unwrap().parse().unwrap()
        })
        .collect();
    let mean = bits.iter().sum::<f64>() / 4.0;
    assert_eq!(bits.len(), 4);
    assert!(
        printed.starts_with(&format!("{mean:.4}")),
        "{mean} {printed}"
    );

    let output = succeeds(
        folder,
        "eval run --split train --limit 5 --raw --output figures.npz",
    );
    contains(&output, "train: 5 images");
    contains(&output, "raw weights");
    let mut npz = npyz::npz::NpzArchive::open(folder.join("figures.npz")).unwrap();
    let labels = npz.by_name("label").unwrap().unwrap();
    assert_eq!(labels.into_vec::<i64>().unwrap(), [-1; 5]);
    let bits = npz.by_name("bits_per_dim").unwrap().unwrap();
    assert_eq!(bits.into_vec::<f64>().unwrap().len(), 5);

    let output = succeeds(
        folder,
        "sample run/checkpoints/best.safetensors --num 3 --scale 2 --output out/a.png --singles out",
    );
    contains(&output, "3 images in out/a.png");
    let grid = image::open(folder.join("out/a.png")).unwrap();
    assert_eq!((grid.width(), grid.height()), (2 * 17, 2 * 17));
    let singles: Vec<_> = ["0000", "0001", "0002"]
        .map(|name| image::open(folder.join(format!("out/{name}.png"))).unwrap())
        .into();
    assert!(
        singles
            .iter()
            .all(|single| (single.width(), single.height()) == (16, 16))
    );
    assert_ne!(singles[0], singles[1]);
    assert_eq!(grid.crop_imm(0, 0, 16, 16).to_rgb8(), singles[0].to_rgb8());
    contains(
        &fails(folder, "sample run --class 0"),
        "not class-conditional",
    );

    let output = succeeds(folder, "info run");
    contains(&output, "  nr_filters               2\n");
    contains(&output, "  step                     6\n");
    contains(&output, "best.safetensors");
}

#[test]
fn a_run_goes_on_only_as_it_began() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    contains(&fails(folder, TRAIN), "pixelcnn train --resume run");
    let config = fs::read(folder.join("run/config.toml")).unwrap();
    for flags in [
        "--nr-filters 4",
        "--nonlinearity elu",
        "--class-conditional",
        "--batch-size 4",
        "--seed 2",
        "--dropout 0.5",
        "--data cifar10",
        "--size 8",
    ] {
        let error = fails(folder, &format!("train --resume run {flags}"));
        let flag = flags.split(' ').next().unwrap();
        contains(&error, &format!("{flag}: the run was begun with"));
    }
    assert_eq!(fs::read(folder.join("run/config.toml")).unwrap(), config);
    // What is as it was may be repeated.
    let output = succeeds(
        folder,
        "train --resume run --nr-filters 2 --data tiny.npy --steps 9",
    );
    contains(&output, "on from step 6");
    contains(
        &succeeds(folder, "info run"),
        "  step                     9\n",
    );
}

#[test]
fn after_damage_a_whole_checkpoint_is_offered() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    let newest = folder.join("run/checkpoints/step-00000006.safetensors");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();
    let offered = "run/checkpoints/step-00000004.safetensors";
    contains(
        &fails(folder, "eval run"),
        &format!("pixelcnn eval {offered}"),
    );
    let command = format!("train --resume run --from {offered}");
    contains(
        &fails(folder, "train --resume run"),
        &format!("pixelcnn {command}"),
    );
    contains(&succeeds(folder, &command), "on from step 4");
    contains(
        &succeeds(folder, "info run"),
        "  step                     6\n",
    );
}

#[test]
fn a_loss_that_is_not_a_number_stops_with_the_step_and_the_last_checkpoint() {
    let folder = tiny();
    let folder = folder.path();
    let error = fails(folder, &format!("{TRAIN} --learning-rate 1e12"));
    contains(&error, "not a number at step 2");
    contains(&error, "run/checkpoints/step-00000000.safetensors");
    contains(&error, "--learning-rate");
    // That advice can be taken.
    succeeds(folder, "train --resume run --learning-rate 1e-3");
}

#[test]
fn a_config_that_does_not_fit_the_checkpoint_is_named() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    let path = folder.join("run/config.toml");
    let config = fs::read_to_string(&path).unwrap();
    fs::write(&path, config.replace("nr_filters = 2", "nr_filters = 3")).unwrap();
    let error = fails(folder, "train --resume run --steps 9");
    contains(&error, "nr_filters is 3, in the checkpoint 2");
}

#[test]
fn a_config_that_was_edited_or_damaged_changes_nothing() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    let path = folder.join("run/config.toml");
    let whole = fs::read_to_string(&path).unwrap();
    let refused = |text: &str, flags: &str| {
        fs::write(&path, text).unwrap();
        let error = fails(folder, &format!("train --resume run {flags}"));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        error
    };
    let edited = whole
        .replace("batch_size = 8", "batch_size = 9")
        .replace("epochs = 1000", "epochs = 5000");
    contains(
        &refused(&edited, ""),
        "batch_size is 9, in the checkpoint 8; epochs is",
    );
    let edited = whole.replace("steps = 6", "steps = 9");
    contains(
        &refused(&edited, ""),
        "`run/config.toml`: steps is 9, in the checkpoint 6 (to change it: --steps 9): remove",
    );
    // So do files of earlier versions and those that are cut off.
    let (_, older) = edited.split_once('\n').unwrap();
    contains(&refused(older, ""), "steps is 9, in the checkpoint 6");
    for end in [0, 70, whole.len() / 2, whole.len() - 2] {
        contains(
            &refused(&whole[..end], ""),
            "remove the file to go on with the settings in the checkpoint",
        );
    }
    // Commands that take it as it is take what the checkpoint knows.
    let held_out = whole.replace("held_out = 0.1", "held_out = 0.5");
    fs::write(&path, held_out).unwrap();
    contains(&succeeds(folder, "eval run"), "test: 4 images");

    // A flag makes the change, whatever the file says of it; the rest may be as it was.
    fs::write(&path, edited.replace("[train]", "# mine\n[train]")).unwrap();
    contains(
        &succeeds(folder, "train --resume run --steps 9"),
        "on from step 6",
    );
    let changed = fs::read_to_string(&path).unwrap();
    assert_eq!(settings(&changed), settings(&edited));
    // Without the file, the checkpoint's.
    fs::remove_file(&path).unwrap();
    let output = program::pixelcnn(folder, "train --resume run");
    assert!(output.status.success());
    contains(
        &text(&output.stderr),
        "`run/config.toml` is missing: it is written again from the checkpoint",
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), changed);
    // Files of earlier versions go on.
    let (_, older) = changed.split_once('\n').unwrap();
    fs::write(&path, older).unwrap();
    succeeds(folder, "train --resume run");
    assert_eq!(fs::read_to_string(&path).unwrap(), changed);

    // Where a run was stopped before its first checkpoint, nothing else knows the settings.
    fs::remove_dir_all(folder.join("run/checkpoints")).unwrap();
    contains(
        &fails(folder, "train --resume run"),
        "its checkpoints are gone",
    );
    fs::remove_file(folder.join("run/metrics.jsonl")).unwrap();
    contains(&refused(&edited, ""), "no checkpoint knows what it was");
    fs::write(&path, changed).unwrap();
    contains(&succeeds(folder, "train --resume run"), "epoch 1  step 4");
}

/// What a config.toml says, without its first line.
fn settings(config: &str) -> &str {
    config.split_once('\n').unwrap().1
}

#[test]
fn a_change_that_flags_made_lasts() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    // Written, and then killed before the checkpoint that has it.
    let checkpoints = folder.join("run/checkpoints");
    let saved = folder.join("saved");
    fs::rename(&checkpoints, &saved).unwrap();
    fs::create_dir(&checkpoints).unwrap();
    for file in fs::read_dir(&saved).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, checkpoints.join(file.file_name().unwrap())).unwrap();
    }
    succeeds(
        folder,
        "train --resume run --learning-rate 0.01 --learning-rate-decay 1 --steps 7",
    );
    fs::remove_dir_all(&checkpoints).unwrap();
    fs::rename(&saved, &checkpoints).unwrap();
    contains(&succeeds(folder, "train --resume run"), "on from step 6");
    contains(
        &succeeds(folder, "info run"),
        "  base learning rate       0.01\n",
    );
}

#[test]
fn images_can_move() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    fs::create_dir(folder.join("moved")).unwrap();
    fs::rename(folder.join("tiny.npy"), folder.join("moved/tiny.npy")).unwrap();
    contains(&fails(folder, "train --resume run --steps 8"), "--data");
    succeeds(folder, "train --resume run --steps 8 --data moved/tiny.npy");
    contains(&succeeds(folder, "eval run"), "step 8");
    fs::copy(folder.join("moved/tiny.npy"), folder.join("tiny.npy")).unwrap();
    let error = fails(folder, "train --resume run --data tiny.npy");
    contains(&error, "--data: the run was begun with");
}

#[test]
fn a_folder_of_a_run_that_never_was_is_used_again() {
    let folder = tiny();
    let folder = folder.path();
    let leave = |run: &str| {
        let run = folder.join(run);
        fs::create_dir_all(run.join("checkpoints")).unwrap();
        for file in [
            ".lock",
            ".config.toml.x.partial",
            "checkpoints/.s.x.partial",
        ] {
            fs::write(run.join(file), b"").unwrap();
        }
    };
    leave("run");
    contains(
        &fails(folder, "train --resume run"),
        "not the folder of a run",
    );
    succeeds(folder, TRAIN);
    succeeds(folder, "export run --out exported");
    leave("imported");
    let import = "import exported/model.safetensors --out imported --data tiny.npy --batch-size 8";
    succeeds(folder, import);
    contains(&fails(folder, import), "not an empty folder");
    // Killed between the checkpoint and the settings, which the checkpoint knows.
    fs::remove_file(folder.join("imported/config.toml")).unwrap();
    contains(&fails(folder, import), "train --resume imported");
    contains(&succeeds(folder, "eval imported"), "test: 4 images");
    succeeds(folder, "train --resume imported --steps 1 --samples 0");
}

#[test]
fn damaged_metrics_are_told() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    let path = folder.join("run/metrics.jsonl");
    let mut lines = fs::read_to_string(&path).unwrap();
    lines.insert_str(0, "{\"step\":3,\"ep\n");
    fs::write(&path, &lines).unwrap();
    let output = program::pixelcnn(folder, "plot run");
    contains(
        &text(&output.stderr),
        "run: without 1 damaged line of metrics.jsonl (1)",
    );
    let output = program::pixelcnn(folder, "train --resume run");
    assert!(output.status.success());
    contains(
        &text(&output.stderr),
        "metrics.jsonl: 1 damaged line left out (1); as it was, it is in run/metrics.jsonl.damaged",
    );
    let kept = fs::read_to_string(folder.join("run/metrics.jsonl.damaged")).unwrap();
    assert_eq!(kept, lines);
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        lines.split_once('\n').unwrap().1
    );
}

#[test]
fn only_a_terminal_gets_colours() {
    let folder = tiny();
    let output = program::pixelcnn(folder.path(), &format!("--log info {TRAIN}"));
    let told = text(&output.stderr);
    contains(&told, "INFO");
    assert!(!told.contains('\x1b'), "{told}");
}

#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing() {
    let folder = tiny();
    let folder = folder.path();
    succeeds(folder, TRAIN);
    let checkpoint = "run/checkpoints/step-00000006.safetensors";
    let saved = fs::read(folder.join(checkpoint)).unwrap();
    // The shell lets no file grow beyond 4 blocks: writes fail as on a full disk.
    let program = cargo_bin!("pixelcnn").display();
    let script = format!("trap '' XFSZ; ulimit -f 4; exec {program} train --resume run --steps 9");
    let mut shell = std::process::Command::new("sh");
    let output = program::output(shell.args(["-c", &script]).current_dir(folder));
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 1, "{errors}");
    contains(&errors, "cannot write `run/checkpoints/step-0000000");
    contains(&errors, "make room");
    assert_eq!(fs::read(folder.join(checkpoint)).unwrap(), saved);
    succeeds(folder, "train --resume run --steps 9");
    contains(
        &succeeds(folder, "info run"),
        "  step                     9\n",
    );
}

/// A picture of one colour.
fn picture(path: &Path, side: u32, level: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let picture = image::RgbImage::from_pixel(side, side, image::Rgb([level; 3]));
    picture.save(path).unwrap();
}

#[test]
fn a_folder_of_pictures_makes_a_class_conditional_model() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for i in 0..12 {
        picture(&folder.join(format!("photos/dark/{i}.png")), 8, 3 * i);
        picture(
            &folder.join(format!("photos/light/{i}.png")),
            8,
            255 - 3 * i,
        );
    }
    let train = TRAIN.replace("tiny.npy", "photos --class-conditional --held-out 0.2");
    contains(&succeeds(folder, &train), "2 classes");
    succeeds(
        folder,
        "sample run --class light --num 2 --output light.png",
    );
    contains(&fails(folder, "sample run --class green"), "dark, light");
    contains(&fails(folder, "sample run --class 2"), "choose 0 to 1");

    // Broken in the ways that folders break.
    let error = |train: &str| fails(folder, &train.replace("train run", "train other"));
    picture(&folder.join("photos/dark/odd.png"), 12, 0);
    contains(&error(&train), "--size");
    fs::remove_file(folder.join("photos/dark/odd.png")).unwrap();
    fs::create_dir(folder.join("photos/empty")).unwrap();
    contains(&error(&train), "empty");
    fs::remove_dir(folder.join("photos/empty")).unwrap();
    let whole = fs::read(folder.join("photos/dark/3.png")).unwrap();
    fs::write(folder.join("photos/dark/3.png"), &whole[..whole.len() / 2]).unwrap();
    contains(&error(&train), "3.png");
}

#[cfg(not(feature = "pretrained"))]
#[test]
fn without_the_shipped_model_a_run_is_to_be_named() {
    let folder = tempfile::tempdir().unwrap();
    for command in ["sample", "eval", "info", "export"] {
        contains(
            &fails(folder.path(), command),
            "built without a model: name a run",
        );
    }
}

#[test]
fn data_are_measured_whole_and_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    program::photos(folder);
    let run = "train own --data photos --held-out 0.25 --nr-filters 2 --nr-logistic-mix 2 \
               --batch-size 4 --init-batch-size 4 --steps 1 --samples 0";
    succeeds(folder, run);
    fs::create_dir(folder.join("others")).unwrap();
    for i in 0..5 {
        program::picture(i)
            .save(folder.join(format!("others/{i}.png")))
            .unwrap();
    }
    // Of its own data a part is held out, whatever they are called; others are measured whole.
    contains(&succeeds(folder, "eval own"), "test: 6 images");
    contains(
        &succeeds(folder, "eval own --data ./photos/../photos"),
        "test: 6 images",
    );
    contains(
        &succeeds(folder, "eval own --split train"),
        "train: 18 images",
    );
    let said = succeeds(folder, "eval own --data others -o table.csv");
    contains(&said, "all: 5 images");
    let table = fs::read_to_string(folder.join("table.csv")).unwrap();
    let names = table
        .lines()
        .skip(1)
        .map(|line| line.rsplit_once(',').unwrap().1);
    assert!(names.eq(["0.png", "1.png", "2.png", "3.png", "4.png"]));
    contains(
        &succeeds(folder, "eval own --data others --held-out 0.2"),
        "test: 1 image ",
    );
    // As for a model card.
    succeeds(folder, "export own --measure --data others -o card");
    let card = fs::read_to_string(folder.join("card/README.md")).unwrap();
    contains(&card, " on all 5 images of others |");
    succeeds(folder, "eval own --data others -o table.npz");
    let npz = npyz::npz::NpzArchive::open(folder.join("table.npz"));
    let mut npz = npz.unwrap();
    let name = npz.by_name("name").unwrap().unwrap();
    assert_eq!(name.dtype().descr(), "'<U5'");
    // Splits that folders tell are kept apart.
    fs::create_dir(folder.join("kaggle")).unwrap();
    fs::rename(folder.join("photos"), folder.join("kaggle/Train")).unwrap();
    fs::rename(folder.join("others"), folder.join("kaggle/Test")).unwrap();
    let output = pixelcnn(folder, "eval own --data kaggle");
    contains(&text(&output.stdout), "test: 5 images");
    contains(
        &text(&output.stderr),
        "training images in Train/ (24), test images in Test/ (5)",
    );
}

#[test]
fn damaged_pictures_are_named_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    program::photos(folder);
    let whole = fs::read(folder.join("photos/dark/01.png")).unwrap();
    for name in ["dark/01.png", "light/02.png"] {
        fs::write(folder.join("photos").join(name), &whole[..whole.len() / 2]).unwrap();
    }
    let train = "--data photos --nr-filters 2 --nr-logistic-mix 2 --batch-size 4 \
                 --init-batch-size 4 --steps 1 --samples 0";
    let error = fails(folder, &format!("train new {train}"));
    contains(&error, "2 of 24 pictures can't be read: ");
    contains(&error, "dark/01.png");
    contains(&error, "light/02.png");
    contains(&error, "--skip-damaged");
    assert!(!folder.join("new").exists());
    let output = pixelcnn(folder, &format!("train new {train} --skip-damaged"));
    assert!(output.status.success());
    contains(&text(&output.stderr), "skipped: 2 of 24 pictures");
    contains(&text(&output.stdout), "20 images");
    // The run knows.
    succeeds(folder, "train --resume new --steps 2");
}
