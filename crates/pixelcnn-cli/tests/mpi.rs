//! The program under `mpirun`, as several processes of this machine.
#![cfg(all(feature = "mpi", target_os = "linux"))]

mod program;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use program::{begun, contains, ended, last_state, output, photos, succeeds, text, wait_until};

const TRAIN: &str = "train --data photos --nr-filters 4 --nr-resnet 1 --nr-logistic-mix 2 \
     --batch-size 4 --shards 4 --init-batch-size 4 --epochs 1000 --cooldown 0 --eval-interval 3 \
     --save-interval 6 --samples 2 --held-out 0.2 --checkpoint-minutes 0.0001";
const STEPS: u64 = 60;

/// `mpirun -n COUNT pixelcnn ARGUMENTS` in `folder`; every process writes its number to a file
/// `pid-RANK`.
fn mpirun(folder: &Path, count: usize, arguments: &str) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n"]);
    command.arg(count.to_string());
    let script = "echo $$ > new-$OMPI_COMM_WORLD_RANK; \
                  mv new-$OMPI_COMM_WORLD_RANK pid-$OMPI_COMM_WORLD_RANK; exec \"$@\"";
    command.args(["sh", "-c", script, "sh", env!("CARGO_BIN_EXE_pixelcnn")]);
    command.args(arguments.split_whitespace());
    command.args(["--threads", "1"]).current_dir(folder);
    command.stdin(Stdio::null());
    command
}

fn pid(folder: &Path, rank: usize) -> i32 {
    let file = folder.join(format!("pid-{rank}"));
    wait_until(|| file.exists());
    fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

/// Whether a process is gone, or waits to be buried.
fn has_ended(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status.is_empty() || status.contains(") Z ")
}

/// What our own program said, and not the launcher.
fn own_errors(output: &Output) -> Vec<String> {
    let errors = text(&output.stderr);
    let own = errors.lines().filter(|line| line.starts_with("pixelcnn: "));
    own.map(str::to_owned).collect()
}

#[test]
fn any_number_of_processes_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    succeeds(folder, &format!("{TRAIN} --steps {STEPS} --save-dir alone"));
    for count in [1, 2, 4] {
        let arguments = format!("{TRAIN} --steps {STEPS} --save-dir run-{count}");
        let output = output(&mut mpirun(folder, count, &arguments));
        assert!(output.status.success(), "{}", text(&output.stderr));
        // It is said once.
        let said = text(&output.stdout);
        assert_eq!(said.matches("model   ").count(), 1, "{said}");
        let run = folder.join(format!("run-{count}"));
        assert_eq!(last_state(&run), last_state(&folder.join("alone")));
        let samples = |run: &Path| fs::read(run.join("samples.png")).unwrap();
        assert_eq!(samples(&run), samples(&folder.join("alone")));
    }
}

#[test]
fn what_many_processes_can_not_do_is_said_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    for (arguments, said) in [
        (
            "complete photos/0.png --keep top:16",
            "2 processes were started: this command is the work of one",
        ),
        ("eval --data nowhere", "nowhere"),
        ("sample nowhere", "nowhere: no such file"),
        (
            "train photos --data photos",
            "already there and not an empty folder",
        ),
        ("train --resume nowhere", "nowhere: not the folder of a run"),
        (
            "train run --data photos --batch-size 4 --shards 1",
            "1 shards can't be shared by 2 ranks: there must be at least one for each (--shards)",
        ),
    ] {
        let output = output(&mut mpirun(folder, 2, arguments));
        assert!(!output.status.success());
        let errors = own_errors(&output);
        assert_eq!(errors.len(), 1, "{errors:?}");
        contains(&errors[0], said);
    }
}

/// As one process would.
#[test]
fn images_are_shared_out_and_the_results_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    succeeds(folder, &format!("{TRAIN} --steps 3 --save-dir run"));
    for (arguments, results) in [
        (
            "eval run --raw --limit 7 -o OUT/figures.csv",
            vec!["figures.csv"],
        ),
        (
            "eval run --split train -o OUT/figures.npz",
            vec!["figures.npz"],
        ),
        (
            "score run photos --against photos --maps 1 -o OUT/scores",
            vec![
                "scores/scores.csv",
                "scores/against.csv",
                "scores/histogram.png",
                "scores/maps.png",
            ],
        ),
        // Fewer images than processes, and more.
        ("sample run --num 2 -o OUT/two.png", vec!["two.png"]),
        (
            "sample run --num 7 -o OUT/seven.png --npz OUT/seven.npz --singles singles --force",
            vec!["seven.png", "seven.npz"],
        ),
        ("compress run singles -o OUT/all.pxc", vec!["all.pxc"]),
    ] {
        let alone = arguments.replace("OUT", "alone");
        let alone = succeeds(folder, &alone);
        let mut together = mpirun(folder, 3, &arguments.replace("OUT", "together"));
        let together = output(&mut together);
        assert!(together.status.success(), "{}", text(&together.stderr));
        for name in results {
            let file = |folder_: &str| fs::read(folder.join(folder_).join(name)).unwrap();
            assert_eq!(file("alone"), file("together"), "{arguments}: {name}");
        }
        // What is said, once, but for the speed.
        let said = |said: String| {
            let said = said.replace("together", "alone");
            said.split(", ").next().unwrap_or_default().to_owned()
        };
        assert_eq!(said(text(&together.stdout)), said(alone), "{arguments}");
    }
}

#[test]
fn processes_that_have_not_the_same_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    succeeds(folder, &format!("{TRAIN} --steps 1 --save-dir run-0"));
    succeeds(folder, &format!("{TRAIN} --steps 2 --save-dir run-1"));
    // Each finds its own under the same name.
    let with_own = |arguments: &str| {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "-n", "2"]);
        let script = "mkdir here-$OMPI_COMM_WORLD_RANK; cd here-$OMPI_COMM_WORLD_RANK; \
                      ln -s ../run-$OMPI_COMM_WORLD_RANK run; ln -s ../photos .; exec \"$@\"";
        command.args(["sh", "-c", script, "sh", env!("CARGO_BIN_EXE_pixelcnn")]);
        command.args(arguments.split_whitespace());
        command.args(["--threads", "1"]).current_dir(folder);
        own_errors(&output(&mut command))
    };
    let errors = with_own("eval run --data photos");
    assert_eq!(errors.len(), 1, "{errors:?}");
    contains(&errors[0], "rank 1 has another model");
}

/// A process that hangs while others wait for its images is named.
#[test]
fn images_of_a_process_that_hangs_are_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let arguments = "sample --num 400 -o drawn.png --patience 2";
    let child = begun(&mut mpirun(folder, 2, arguments));
    let hung = pid(folder, 1);
    thread::sleep(Duration::from_secs(2));
    // SAFETY: a signal to a process of ours.
    unsafe { libc::kill(hung, libc::SIGSTOP) };
    let errors = own_errors(&ended(child));
    contains(&errors[0], "rank 1 has not answered for 2 s");
    assert!(!folder.join("drawn.png").exists());
}

/// Whichever process is killed and whenever, all end, and the run goes on to the same end.
#[test]
fn a_process_that_is_killed_ends_all_and_nothing_is_lost() {
    let times = std::env::var("KILLS").map_or(4, |times| times.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let begin = Instant::now();
    let whole = output(&mut mpirun(
        folder,
        2,
        &format!("{TRAIN} --steps {STEPS} --save-dir whole"),
    ));
    assert!(whole.status.success(), "{}", text(&whole.stderr));
    let whole_time = begin.elapsed().as_millis() as u64;
    let whole = last_state(&folder.join("whole"));
    let mut random = ChaCha8Rng::seed_from_u64(times);
    for number in 0..times {
        let (count, victim) = match random.random_range(0..3) {
            0 => (2, random.random_range(0..2)),
            _ => (4, random.random_range(0..4)),
        };
        for rank in 0..4 {
            let _ = fs::remove_file(folder.join(format!("pid-{rank}")));
        }
        let run = format!("run-{number}");
        let mut command = mpirun(
            folder,
            count,
            &format!("{TRAIN} --steps {STEPS} --save-dir {run}"),
        );
        let command = command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let pids: Vec<i32> = (0..count).map(|rank| pid(folder, rank)).collect();
        thread::sleep(Duration::from_millis(random.random_range(0..whole_time)));
        // SAFETY: a signal to a process of ours, or to none where it has ended.
        unsafe { libc::kill(pids[victim], libc::SIGKILL) };
        let killed = Instant::now();
        wait_until(|| pids.iter().all(|&pid| has_ended(pid)));
        assert!(killed.elapsed() < Duration::from_secs(30), "all end soon");
        // Open MPI's launcher itself may hang now (4.1.4, where a process dies early).
        child.kill().unwrap();
        child.wait().unwrap();
        // Killed before there was a run, it is begun again.
        let arguments = match folder.join(&run).join("config.toml").exists() {
            true => format!("train --resume {run}"),
            false => format!("{TRAIN} --steps {STEPS} --save-dir {run}"),
        };
        let again = output(&mut mpirun(folder, 2, &arguments));
        assert!(again.status.success(), "{}", text(&again.stderr));
        assert_eq!(last_state(&folder.join(&run)), whole, "{run}");
    }
}

#[test]
fn a_process_that_hangs_is_named_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let arguments = format!("{TRAIN} --steps 1000000 --save-dir run --patience 2");
    let child = begun(&mut mpirun(folder, 2, &arguments));
    let hung = pid(folder, 1);
    wait_until(|| folder.join("run/checkpoints").exists());
    // SAFETY: a signal to a process of ours.
    unsafe { libc::kill(hung, libc::SIGSTOP) };
    let errors = own_errors(&ended(child));
    contains(&errors[0], "rank 1 has not answered for 2 s");
    contains(&errors[0], "to go on: pixelcnn train --resume run");
}

#[test]
fn stopped_by_the_launcher_a_run_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let arguments = format!("{TRAIN} --steps 1000000 --save-dir run");
    let child = begun(&mut mpirun(folder, 2, &arguments));
    wait_until(|| folder.join("run/checkpoints").exists());
    thread::sleep(Duration::from_millis(300));
    // SAFETY: a signal to a process of ours.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    let said = text(&ended(child).stdout);
    contains(&said, "and saved; to go on");
    // By one process alone, and it ends as any other.
    let mut last = last_state(&folder.join("run")).step;
    last += 5;
    succeeds(folder, &format!("train --resume run --steps {last}"));
    succeeds(folder, &format!("{TRAIN} --steps {last} --save-dir whole"));
    let (stopped, whole) = (
        last_state(&folder.join("run")),
        last_state(&folder.join("whole")),
    );
    assert_eq!(stopped.parameters, whole.parameters);
    assert_eq!(stopped.average, whole.average);
}
