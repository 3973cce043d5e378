//! The program with `--gpus`, as several processes of this machine, which need have none: they then
//! compute on the CPU.
#![cfg(all(feature = "cuda", target_os = "linux"))]

mod program;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use program::{
    begun, contains, ended, fails, last_state, output, photos, succeeds, text, wait_until,
};

const TRAIN: &str = "train --data photos --nr-filters 4 --nr-resnet 1 --nr-logistic-mix 2 \
     --batch-size 4 --shards 4 --init-batch-size 4 --epochs 1000 --cooldown 0 --eval-interval 3 \
     --save-interval 6 --samples 3 --held-out 0.2 --checkpoint-minutes 0.0001 --device cpu";

/// The processes that a process has started.
fn children(of: u32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    // Those that it started from another thread.
    let threads = fs::read_dir(format!("/proc/{of}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let all = lists.fold(list, |all, list| all + " " + &list);
    let mut pids: Vec<i32> = all
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    pids.sort();
    pids.dedup();
    pids
}

fn is_there(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !status.is_empty() && !status.contains(") Z ")
}

#[test]
fn any_number_of_processes_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    succeeds(folder, &format!("{TRAIN} --steps 30 --save-dir alone"));
    for count in [2, 4] {
        let run = format!("run-{count}");
        let said = succeeds(
            folder,
            &format!("{TRAIN} --steps 20 --save-dir {run} --gpus {count}"),
        );
        assert_eq!(said.matches("model   ").count(), 1, "{said}");
        succeeds(
            folder,
            &format!("train --resume {run} --steps 30 --device cpu --nr-gpu 2"),
        );
        assert_eq!(
            last_state(&folder.join(&run)),
            last_state(&folder.join("alone"))
        );
    }
    let alone = succeeds(folder, "eval alone --device cpu -o alone.csv");
    let together = succeeds(folder, "eval alone --device cpu --gpus 3 -o together.csv");
    assert_eq!(alone, together);
    let table = |name: &str| fs::read(folder.join(name)).unwrap();
    assert_eq!(table("alone.csv"), table("together.csv"));
}

/// Those that have done their part may leave before the others.
#[test]
fn images_are_drawn_by_some_processes_as_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let draw = "sample --num 15 --device cpu --threads 1 -o";
    succeeds_on_one_thread(folder, &format!("{draw} alone.png"));
    succeeds_on_one_thread(folder, &format!("{draw} together.png --gpus 4"));
    let drawn = |name: &str| fs::read(folder.join(name)).unwrap();
    assert_eq!(drawn("alone.png"), drawn("together.png"));
}

/// The number of threads is among the arguments.
fn succeeds_on_one_thread(folder: &Path, arguments: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    let command = command
        .args(arguments.split_whitespace())
        .current_dir(folder);
    let output = output(command);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn processes_end_whose_first_one_is_killed_at_work() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    let arguments = "sample --num 10000 --device cpu --threads 1 --gpus 2";
    let command = command
        .args(arguments.split_whitespace())
        .current_dir(folder.path());
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = command.stdin(Stdio::null()).spawn().unwrap();
    wait_until(|| !children(process.id()).is_empty());
    thread::sleep(Duration::from_secs(1));
    let others = children(process.id());
    process.kill().unwrap();
    process.wait().unwrap();
    // And not when their images are drawn, in minutes.
    let killed = Instant::now();
    wait_until(|| !others.iter().any(|&pid| is_there(pid)));
    assert!(killed.elapsed() < Duration::from_secs(60));
}

#[test]
fn without_gpus_there_is_nothing_to_share() {
    let found = pixelcnn::device::devices().unwrap();
    if found.len() > 1 {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    contains(
        &fails(folder, "train --data photos --gpus 2"),
        "--gpus: this machine has none",
    );
}

/// Whichever of them is killed, all end, and nothing is lost.
#[test]
fn a_process_that_is_killed_ends_all() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    for (run, victim) in [("first", None), ("second", Some(0)), ("last", Some(2))] {
        let arguments = format!("{TRAIN} --steps 1000000 --gpus 4 --save-dir {run} --threads 1");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
        command
            .args(arguments.split_whitespace())
            .current_dir(folder);
        let process = begun(&mut command);
        wait_until(|| folder.join(run).join("checkpoints").exists());
        thread::sleep(Duration::from_millis(200));
        let own = process.id();
        let others = children(own);
        assert_eq!(others.len(), 3);
        let killed = victim.map_or(own as i32, |victim| others[victim]);
        // SAFETY: a signal to a process of ours.
        unsafe { libc::kill(killed, libc::SIGKILL) };
        let output = ended(process);
        wait_until(|| !others.iter().any(|&pid| is_there(pid)));
        if let Some(victim) = victim {
            let errors = text(&output.stderr);
            let errors: Vec<&str> = errors
                .lines()
                .filter(|l| l.starts_with("pixelcnn: r"))
                .collect();
            contains(errors[0], &format!("rank {} is gone", victim + 1));
            contains(errors[0], "to go on: pixelcnn train --resume");
        }
        let last = last_state(&folder.join(run)).step + 3;
        succeeds(
            folder,
            &format!("train --resume {run} --steps {last} --device cpu"),
        );
        succeeds(
            folder,
            &format!("{TRAIN} --steps {last} --save-dir whole-{run}"),
        );
        let (state, whole) = (folder.join(run), folder.join(format!("whole-{run}")));
        assert_eq!(last_state(&state).parameters, last_state(&whole).parameters);
    }
}

#[test]
fn told_to_stop_all_do() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let arguments = format!("{TRAIN} --steps 1000000 --gpus 2 --save-dir run --threads 1");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pixelcnn"));
    command
        .args(arguments.split_whitespace())
        .current_dir(folder);
    let process = begun(&mut command);
    wait_until(|| folder.join("run/checkpoints").exists());
    let others = children(process.id());
    // As a terminal does, to all of them.
    for pid in [&others[..], &[process.id() as i32]].concat() {
        // SAFETY: a signal to a process of ours.
        unsafe { libc::kill(pid, libc::SIGINT) };
    }
    contains(&text(&ended(process).stdout), "and saved; to go on");
    wait_until(|| !others.iter().any(|&pid| is_there(pid)));
}
