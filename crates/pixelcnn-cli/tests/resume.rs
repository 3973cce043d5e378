//! Real runs are interrupted at many moments, by kill -9, by Ctrl-C and by a terminal that closes,
//! and resumed: they end with the same bits as a run that never was.

mod program;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::yield_now;
use std::time::Instant;

use npyz::WriterBuilder;
use pixelcnn::device::has_bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use serde_json::Value;

use program::{PATIENCE, ended, output, wait_until};

const STEPS: u64 = 120;

/// 8x8 images with some structure.
fn write_images(path: &Path) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let shape = [50, 8, 8, 3];
    let mut file = File::create(path).unwrap();
    let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
    let mut writer = options.writer(&mut file).begin_nd().unwrap();
    let mut level = 0u8;
    for _ in 0..shape.iter().product::<u64>() {
        level = level.wrapping_add(random.random_range(0..9));
        writer.push(&level).unwrap();
    }
    writer.finish().unwrap();
}

/// The program with a model so small that a step takes milliseconds, saved after every step or only
/// after every epoch of 11 steps.
fn train(folder: &Path, run: &str, threads: usize, minutes: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    command.args(["--threads", &threads.to_string(), "train", "--data"]);
    command.arg(folder.join("images.npy"));
    command.args([
        "--nr-filters",
        "4",
        "--nr-resnet",
        "1",
        "--nr-logistic-mix",
        "2",
    ]);
    command.args([
        "--batch-size",
        "4",
        "--dropout",
        "0.5",
        "--steps",
        &STEPS.to_string(),
    ]);
    command.args([
        "--epochs",
        "1000",
        "--eval-interval",
        "3",
        "--save-interval",
        "5",
    ]);
    command.args(["--samples", "1", "--checkpoint-minutes", minutes]);
    command.args(["--cooldown", "0.3", "--polyak-start", "growing"]);
    command.args(["--nr-channel-resnet", "1", "--augmentation", "flips"]);
    command.arg(folder.join(run));
    command
}

/// The same in another precision, where the processor has it.
const BF16: [&str; 2] = ["--precision", "bf16"];

fn resume(folder: &Path, run: &str, threads: usize) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    command.args(["--threads", &threads.to_string(), "train", "--resume"]);
    command.arg(folder.join(run));
    command
}

const EVERY_STEP: &str = "0.0000001";
const EVERY_EPOCH: &str = "1000";

fn quietly(command: &mut Command) -> Child {
    let quiet = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    quiet.spawn().unwrap()
}

fn finish(command: &mut Command) {
    succeeded(&output(command));
}

#[track_caller]
fn succeeded(output: &Output) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {errors}", output.status);
}

/// The tensors of a run's last checkpoint, by name.
fn last_tensors(run: &Path) -> Vec<(String, Vec<u8>)> {
    let path = run.join(format!("checkpoints/step-{STEPS:08}.safetensors"));
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = tensors
        .tensors()
        .into_iter()
        .map(|(name, tensor)| (name, tensor.data().to_vec()))
        .collect();
    tensors.sort();
    tensors
}

/// A run's metrics, but for the time that things took.
fn metrics(run: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parsed = lines.lines().map(|line| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let values = line.as_object_mut().unwrap();
        values.retain(|name, _| name != "seconds" && name != "images_per_second");
        line
    });
    parsed.collect()
}

/// Names and sizes of all that is in a run's folder.
fn listing(run: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    for folder in ["", "checkpoints", "samples"] {
        let entries = fs::read_dir(run.join(folder))
            .into_iter()
            .flatten()
            .flatten();
        files.extend(entries.map(|entry| {
            let size = entry.metadata().map_or(0, |metadata| metadata.len());
            (Path::new(folder).join(entry.file_name()), size)
        }));
    }
    files.sort();
    files
}

/// The names of a run's files, but for TensorBoard's, of which every start makes one.
fn names(run: &Path) -> Vec<PathBuf> {
    let names = listing(run).into_iter().map(|(name, _)| name);
    names
        .filter(|name| !name.to_string_lossy().contains("tfevents"))
        .collect()
}

/// Makes the images and the run that is never interrupted.
fn reference(folder: &Path, minutes: &str, flags: &[&str]) -> PathBuf {
    write_images(&folder.join("images.npy"));
    finish(train(folder, "whole", 2, minutes).args(flags));
    let whole = folder.join("whole");
    let trained = last_tensors(&whole);
    assert!(
        trained
            .iter()
            .any(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))
    );
    whole
}

/// Checks that a run has all that one which never stopped has.
#[track_caller]
fn expect_same(run: &Path, whole: &Path) {
    assert!(last_tensors(run) == last_tensors(whole));
    assert_eq!(metrics(run), metrics(whole));
    assert_eq!(names(run), names(whole));
    let events = listing(run).into_iter().map(|(name, _)| name);
    let events = events.filter(|name| name.to_string_lossy().contains("tfevents"));
    let events: Vec<_> = events
        .map(|name| fs::read(run.join(name)).unwrap())
        .collect();
    for name in names(whole) {
        if name.extension().is_some_and(|extension| extension == "png") {
            let picture = fs::read(whole.join(&name)).unwrap();
            assert!(fs::read(run.join(&name)).unwrap() == picture, "{name:?}");
            let shows =
                |events: &Vec<u8>| events.windows(picture.len()).any(|part| part == picture);
            assert!(events.iter().any(shows), "{name:?} is not in TensorBoard");
        }
    }
}

/// Waits until the files of a run have changed so many times, or the process ends.
fn wait_for_changes(child: &mut Child, run: &Path, mut changes: usize) {
    let mut before = listing(run);
    let deadline = Instant::now() + PATIENCE;
    while changes > 0 && child.try_wait().unwrap().is_none() {
        let now = listing(run);
        if now != before {
            changes -= 1;
            before = now;
        }
        assert!(Instant::now() < deadline, "waited in vain");
        yield_now();
    }
}

/// Whether a run has saved a step or a later one.
fn has_saved(run: &Path, step: u64) -> bool {
    let steps = listing(run).into_iter().filter_map(|(name, _)| {
        let name = name.file_stem()?.to_str()?.strip_prefix("step-")?;
        name.parse::<u64>().ok()
    });
    steps.max().is_some_and(|last| last >= step)
}

#[test]
fn a_run_killed_at_any_moment_ends_as_if_it_never_was() {
    let mut single = Vec::new();
    for (threads, minutes, flags) in [
        (1, EVERY_EPOCH, &[][..]),
        (2, EVERY_STEP, &[]),
        (1, EVERY_EPOCH, &BF16),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let whole = reference(folder, minutes, flags);
        let trained = last_tensors(&whole);
        match flags {
            [] => single = trained,
            _ => assert_eq!(trained != single, has_bf16(), "another precision"),
        }
        let run = folder.join("killed");
        let mut kills = 0;
        loop {
            // The first file that appears, the second one, and so on: early moments again and again
            // at first, then also those of steps, evaluations and samples.
            let mut command = match run.join("config.toml").exists() {
                true => resume(folder, "killed", threads),
                false => train(folder, "killed", threads, minutes),
            };
            let mut child = quietly(command.args(flags));
            wait_for_changes(&mut child, &run, kills + 1);
            child.kill().unwrap();
            let output = ended(child);
            if output.status.code().is_some() {
                succeeded(&output);
                break;
            }
            kills += 1;
            assert!(kills < 1000, "the run makes no progress");
        }
        assert!(kills >= 3, "only {kills} kills: the run is too short");
        expect_same(&run, &whole);
    }
}

#[cfg(unix)]
fn signal(child: &Child, signal: i32) {
    // By no program of its own: on a busy machine the run would end before it has begun.
    // SAFETY: a signal to a process of ours that is not waited for yet.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[cfg(unix)]
#[test]
fn a_run_that_is_told_to_stop_saves_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let whole = reference(folder, EVERY_EPOCH, &[]);
    let run = folder.join("stopped");
    let mut command = train(folder, "stopped", 2, EVERY_EPOCH);
    // A terminal that closes may say so twice.
    for (step, signals) in [
        (1, &[libc::SIGINT][..]),
        (23, &[libc::SIGHUP, libc::SIGHUP]),
        (45, &[libc::SIGTERM]),
    ] {
        let child = quietly(&mut command);
        wait_until(|| has_saved(&run, step));
        signals.iter().for_each(|&number| signal(&child, number));
        let output = ended(child);
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(130), "{signals:?}");
        assert!(told.contains("and saved; to go on:"), "{told}");
        command = resume(folder, "stopped", 2);
    }
    finish(&mut command);
    expect_same(&run, &whole);
}

/// Starts a program that ignores a signal, as under `nohup` or in the background of a script.
#[cfg(unix)]
fn ignoring(signals: &'static [i32], command: &mut Command) -> Child {
    use std::os::unix::process::CommandExt;
    let ignore = move || {
        for &signal in signals {
            // SAFETY: no handler is set.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        Ok(())
    };
    // SAFETY: the closure calls nothing but `signal`, which may be called after a fork.
    unsafe { command.pre_exec(ignore) }.spawn().unwrap()
}

#[cfg(unix)]
#[test]
fn signals_ignored_at_the_start_stay_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let whole = reference(folder, EVERY_EPOCH, &[]);
    let mut train = train(folder, "protected", 2, EVERY_EPOCH);
    train.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = ignoring(&[libc::SIGHUP, libc::SIGINT], &mut train);
    wait_until(|| has_saved(&folder.join("protected"), 0));
    for name in [libc::SIGHUP, libc::SIGINT, libc::SIGHUP, libc::SIGINT] {
        signal(&child, name);
    }
    succeeded(&ended(child));
    expect_same(&folder.join("protected"), &whole);

    // Not only trainings, and at every moment.
    let mut sample = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    sample.args(["sample", "--num", "100", "--output"]);
    sample.arg(folder.join("grid.png")).arg(&whole);
    sample.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ignoring(&[libc::SIGHUP], &mut sample);
    wait_until(|| {
        signal(&child, libc::SIGHUP);
        child.try_wait().unwrap().is_some()
    });
    succeeded(&ended(child));
}

#[cfg(target_os = "linux")]
#[test]
fn a_protected_run_outlives_its_terminal() {
    use std::os::fd::{AsRawFd, FromRawFd};
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let whole = reference(folder, EVERY_EPOCH, &[]);
    let (mut terminal, mut end) = (0, 0);
    let null = std::ptr::null_mut();
    // SAFETY: both numbers are written to; no name, settings or size are asked for.
    let opened = unsafe { libc::openpty(&mut terminal, &mut end, null, null as _, null as _) };
    assert_eq!(opened, 0);
    // SAFETY: both are open, and nobody else's.
    let [ours, end] = [terminal, end].map(|fd| unsafe { File::from_raw_fd(fd) });
    // The program would inherit the original, not this copy.
    let mut terminal = ours.try_clone().unwrap();
    drop(ours);

    let mut train = train(folder, "protected", 2, EVERY_EPOCH);
    train.args(["--log", "info"]);
    train.stdout(end.try_clone().unwrap()).stderr(end);
    let child = ignoring(&[libc::SIGHUP], &mut train);
    drop(train);
    let mut told = String::new();
    while !told.contains("saved a checkpoint") {
        let mut ready = libc::pollfd {
            fd: terminal.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: it is one, and open.
        let count = unsafe { libc::poll(&mut ready, 1, PATIENCE.as_millis() as _) };
        assert_eq!(count, 1, "waited in vain: {told}");
        let mut part = [0; 100];
        let length = terminal.read(&mut part).unwrap();
        told.push_str(&String::from_utf8_lossy(&part[..length]));
    }
    assert!(told.contains("\x1b["), "a terminal gets colours: {told}");
    drop(terminal);
    succeeded(&ended(child));
    expect_same(&folder.join("protected"), &whole);
}

/// A branch cools down in a folder of its own and leaves the run as it was.
#[test]
fn a_cool_down_branches_off() {
    let folder = tempfile::tempdir().unwrap();
    write_images(&folder.path().join("images.npy"));
    finish(&mut train(folder.path(), "run", 2, EVERY_EPOCH));
    let before = last_tensors(&folder.path().join("run"));
    let mut branch = resume(folder.path(), "run", 2);
    branch.args(["--cooldown-steps", "60", "--output"]);
    let new = folder.path().join("new");
    finish(branch.arg(&new));
    assert_eq!(last_tensors(&folder.path().join("run")), before);

    let last = format!("checkpoints/step-{:08}.safetensors", STEPS + 60);
    assert!(new.join(last).exists());
    let lines = fs::read_to_string(new.join("metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    let rates = lines.filter_map(|line: Value| line["learning_rate"].as_f64());
    let rates: Vec<f64> = rates.collect();
    // Of the preset's, after 20, 40 and 60 of 60 steps.
    let expected = [20, 40, 60].map(|taken| 3e-3 * f64::from(61 - taken) / 61.0);
    assert_eq!(rates.len(), 3);
    for (rate, expected) in rates.iter().zip(expected) {
        assert!((rate / expected - 1.0).abs() < 1e-9, "{rates:?}");
    }
    // It would be another run's.
    let refused = output(resume(folder.path(), "run", 2).args(["--output"]).arg(&new));
    assert!(!refused.status.success());
    let error = String::from_utf8_lossy(&refused.stderr);
    assert!(
        error.contains("already there and not an empty folder"),
        "{error}"
    );
}
