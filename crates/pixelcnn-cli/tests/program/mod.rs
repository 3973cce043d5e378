//! The program, run as a program, for the tests of its commands.

#![allow(dead_code)] // Not every test needs all of it.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use assert_cmd::cargo::cargo_bin;
use image::{Rgb, RgbImage};
use pixelcnn::train::checkpoints::Checkpoints;
use pixelcnn::train::state::TrainState;

/// More than anything here takes on a slow machine: a test that hangs shall fail.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Waits until something is so.
#[track_caller]
pub fn wait_until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline, "waited in vain");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Begins a program, to be [`ended`] later.
pub fn begun(command: &mut Command) -> Child {
    let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    piped.stdin(Stdio::null()).spawn().unwrap()
}

/// All that a program says on the pipes that it was given, when it has ended.
#[track_caller]
pub fn ended(mut child: Child) -> Output {
    fn read(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut bytes).unwrap();
            }
            bytes
        })
    }
    let (stdout, stderr) = (read(child.stdout.take()), read(child.stderr.take()));
    let deadline = Instant::now() + PATIENCE;
    let mut status = None;
    while status.is_none() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
        status = child.try_wait().unwrap();
    }
    if status.is_none() {
        child.kill().unwrap();
    }
    let output = Output {
        status: child.wait().unwrap(),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    };
    let errors = text(&output.stderr);
    assert!(status.is_some(), "waited in vain: {errors}");
    output
}

/// Runs a program until it ends.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    ended(begun(command))
}

/// `pixelcnn ARGUMENTS`, to be run in `folder`.
pub fn command(folder: &Path, arguments: &str) -> Command {
    let mut command = Command::new(cargo_bin!("pixelcnn"));
    command.args(arguments.split_whitespace());
    if !arguments.contains("--threads") {
        command.args(["--threads", "2"]);
    }
    // Where there is none, drivers of Mesa's complain.
    command.env("XDG_RUNTIME_DIR", folder);
    command.current_dir(folder);
    command
}

/// Runs `pixelcnn ARGUMENTS` in `folder`.
pub fn pixelcnn(folder: &Path, arguments: &str) -> Output {
    output(&mut command(folder, arguments))
}

/// The same numbers of 16 bits every time, as if drawn.
pub fn random() -> impl FnMut() -> u32 {
    let mut state = 1u32;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 16
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a run that succeeds.
pub fn succeeds(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert!(output.status.success(), "{arguments}: {errors}");
    text(&output.stdout)
}

/// The one line on standard error of a run that fails with status 1.
pub fn fails(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments}: {errors}");
    assert_eq!(errors.lines().count(), 1, "{arguments}: {errors}");
    assert!(errors.starts_with("pixelcnn: "), "{arguments}: {errors}");
    errors
}

/// Standard error of a run that is refused as wrong usage.
pub fn misused(folder: &Path, arguments: &str) -> String {
    let output = pixelcnn(folder, arguments);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments}: {errors}");
    errors
}

#[track_caller]
pub fn contains(text: &str, part: &str) {
    assert!(text.contains(part), "{part:?} is not in {text:?}");
}

/// A picture of 12x8 pixels, no two alike.
pub fn picture(seed: u32) -> RgbImage {
    RgbImage::from_fn(12, 8, |x, y| {
        let level = |factor| (factor * (x + 12 * y) + seed) as u8;
        Rgb([level(2), level(1), level(2) / 2])
    })
}

/// A file of a picture of 12x8 pixels that has its levels in letters: any model's is smaller.
pub fn in_letters(picture: &RgbImage) -> String {
    let mut file = format!("P3\n{} {}\n255\n", picture.width(), picture.height());
    picture
        .iter()
        .for_each(|level| file += &format!("{level} "));
    file
}

/// Makes `photos` in `folder`: a folder of twelve such pictures for each of two classes.
pub fn photos(folder: &Path) {
    for class in ["dark", "light"] {
        let photos = folder.join("photos").join(class);
        fs::create_dir_all(&photos).unwrap();
        for i in 0..12 {
            picture(7 * i + 50 * u32::from(class == "light"))
                .save(photos.join(format!("{i:02}.png")))
                .unwrap();
        }
    }
}

pub fn open(path: &Path) -> RgbImage {
    image::open(path).unwrap().into_rgb8()
}

/// The last state of a run, but for the time that it took.
pub fn last_state(run: &Path) -> TrainState {
    let (mut state, _) = Checkpoints::new(run.join("checkpoints")).latest().unwrap();
    state.seconds = 0.0;
    state.unrecorded.seconds = 0.0;
    state
}
