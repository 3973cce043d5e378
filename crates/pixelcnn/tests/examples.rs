//! The examples do what they say.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// An example's program: built beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let target: PathBuf = test.ancestors().nth(2).unwrap().into();
    Command::new(target.join("examples").join(name))
}

#[test]
fn the_example_trains_measures_and_samples() {
    let images = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut example = example("train");
    example.stdout(Stdio::piped()).stderr(Stdio::piped());
    let started = example.arg(images).arg(&run).spawn();
    let mut child = started.expect("`cargo test` builds the examples; `--test` alone does not");
    // What it says fits into the pipes.
    let deadline = Instant::now() + Duration::from_secs(600);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
        }
        sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(told.contains("step 32:"), "{told}");
    let test = told
        .lines()
        .find_map(|line| line.strip_prefix("test: "))
        .unwrap();
    let bits: f64 = test.split(' ').next().unwrap().parse().unwrap();
    assert!(
        (1.0..8.0).contains(&bits),
        "it learns something: {bits} bits/dim"
    );
    assert!(run.join("samples.png").exists());
}

#[test]
#[cfg(feature = "pretrained")]
fn the_examples_sample_and_score() {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("samples.png");
    let drawn = example("sample").arg(&picture).status();
    assert!(drawn.unwrap().success());
    let size = image::image_dimensions(&picture).unwrap();
    assert_eq!(size, (4 * 32 + 3, 4 * 32 + 3));

    let images = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/cifar10-sample.npz");
    let scored = example("score").arg(images).output().unwrap();
    assert!(scored.status.success());
    let told = String::from_utf8(scored.stdout).unwrap();
    let bits = told.lines().map(|line| line.split(' ').nth(1).unwrap());
    let bits: Vec<f64> = bits.map(|bits| bits.parse().unwrap()).collect();
    let mean = bits.iter().sum::<f64>() / bits.len() as f64;
    // As the shipped model's card says of the whole test set.
    assert!((mean - 3.216).abs() < 0.2, "{mean}");
}
