//! Real runs are interrupted at many moments, by kill -9 and by Ctrl-C, and resumed: they end with
//! the same bits as a run that never was.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use npyz::WriterBuilder;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

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

/// The program with a model so small that a step takes milliseconds, saved after every step.
fn train(folder: &Path, run: &str, threads: usize) -> Command {
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
    command.args(["--samples", "1", "--checkpoint-minutes", "0.0000001"]);
    command.arg(folder.join(run));
    command
}

fn resume(folder: &Path, run: &str, threads: usize) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    command.args(["--threads", &threads.to_string(), "train", "--resume"]);
    command.arg(folder.join(run));
    command
}

fn quietly(command: &mut Command) -> Child {
    let quiet = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    quiet.spawn().unwrap()
}

fn finish(command: &mut Command) {
    let output = quietly(command).wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
}

/// The tensors of the run's last checkpoint, by name.
fn last_tensors(folder: &Path, run: &str) -> Vec<(String, Vec<u8>)> {
    let path = folder
        .join(run)
        .join(format!("checkpoints/step-{STEPS:08}.safetensors"));
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

/// Lines of metrics, each of which a run must have once.
fn evaluated_steps(folder: &Path, run: &str) -> Vec<u64> {
    let lines = fs::read_to_string(folder.join(run).join("metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines
        .filter(|line| line.get("test_bits_per_dim").is_some())
        .map(|line| line["step"].as_u64().unwrap())
        .collect()
}

/// Makes the images and the run that is never interrupted: its last tensors and how long it took.
fn reference(folder: &Path) -> (Vec<(String, Vec<u8>)>, Duration) {
    write_images(&folder.join("images.npy"));
    let start = Instant::now();
    finish(&mut train(folder, "whole", 2));
    (last_tensors(folder, "whole"), start.elapsed())
}

/// Lets a run that has begun go on for a while, at most a fifth of the time that a whole one takes.
fn wait(
    child: &mut Child,
    run: &Path,
    whole: Duration,
    random: &mut impl Rng,
) -> Option<ExitStatus> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !run.join("config.toml").exists() && Instant::now() < deadline {
        sleep(Duration::from_millis(1));
    }
    sleep((whole / 5).mul_f64(random.random()));
    child.try_wait().unwrap()
}

#[test]
fn a_run_killed_at_any_moment_ends_as_if_it_never_was() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (whole, time) = reference(folder);
    assert!(
        whole
            .iter()
            .any(|(_, bytes)| bytes.iter().any(|&byte| byte != 0))
    );

    let mut random = ChaCha8Rng::seed_from_u64(2);
    for threads in [1, 2] {
        let run = format!("killed-{threads}");
        let path = folder.join(&run);
        let mut child = quietly(&mut train(folder, &run, threads));
        let mut kills = 0;
        loop {
            if let Some(status) = wait(&mut child, &path, time, &mut random) {
                let output = child.wait_with_output().unwrap();
                assert!(
                    status.success(),
                    "{}",
                    String::from_utf8_lossy(&output.stderr)
                );
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            assert!(kills < 1000, "the run makes no progress");
            child = quietly(&mut resume(folder, &run, threads));
        }
        assert!(
            kills >= 3,
            "only {kills} kills at {threads} threads: the run is too short"
        );
        assert!(
            last_tensors(folder, &run) == whole,
            "{threads} threads, {kills} kills"
        );
        assert_eq!(
            evaluated_steps(folder, &run),
            evaluated_steps(folder, "whole")
        );
        for file in ["samples.png", "samples/step-00000120.png"] {
            assert_eq!(
                fs::read(path.join(file)).unwrap(),
                fs::read(folder.join("whole").join(file)).unwrap(),
                "{file}"
            );
        }
        assert_eq!(leftovers(&path), Vec::<PathBuf>::new());
    }
}

/// Half-written files; the last save clears those of killed ones.
fn leftovers(run: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|end| end == "partial"))
        .collect()
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_leaves_and_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (whole, time) = reference(folder);
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut child = quietly(&mut train(folder, "stopped", 2));
    let mut stops = 0;
    loop {
        let ended = wait(&mut child, &folder.join("stopped"), time, &mut random);
        if ended.is_none() {
            let pid = child.id().to_string();
            Command::new("kill").args(["-INT", &pid]).status().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            break;
        }
        // Very early, before the program listens, the signal itself ends it.
        let code = output.status.code();
        assert!(
            code == Some(130) || code.is_none(),
            "{:?}: {errors}",
            output.status
        );
        if code == Some(130) {
            stops += 1;
            let told = String::from_utf8_lossy(&output.stdout);
            assert!(told.contains("--resume"), "it says how to go on: {told}");
        }
        child = quietly(&mut resume(folder, "stopped", 2));
    }
    assert!(stops >= 2, "only {stops} stops: the run is too short");
    assert!(last_tensors(folder, "stopped") == whole);
}
