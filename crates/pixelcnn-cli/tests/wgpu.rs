//! The program on an adapter of wgpu's, for one Mesa's software Vulkan (Debian's mesa-vulkan-drivers): what it does
//! there is what it does on the CPU.
#![cfg(feature = "wgpu")]

mod program;

use std::fs;
use std::path::Path;

use program::{command, contains, fails, last_state, open, output, photos, succeeds, text};

const TRAIN: &str = "train --data photos --nr-filters 4 --nr-resnet 1 --nr-logistic-mix 2 --batch-size 4 \
     --init-batch-size 4 --epochs 1000 --cooldown 0 --eval-interval 3 --samples 3 --held-out 0.2 --optimizer muon";

/// The bits/dim of a table.
fn numbers(table: &Path) -> Vec<f64> {
    let text = fs::read_to_string(table).unwrap();
    let mut lines = text.lines();
    let mut names = lines.next().unwrap().split(',');
    let column = names.position(|name| name == "bits_per_dim").unwrap();
    let numbers = lines.map(|line| line.split(',').nth(column).unwrap());
    numbers.map(|number| number.parse().unwrap()).collect()
}

#[test]
fn what_it_does_is_what_the_cpu_does() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let devices = succeeds(folder, "devices");
    contains(&devices, "wgpu:0");
    contains(&devices, "through");

    let said = succeeds(
        folder,
        &format!("{TRAIN} --steps 12 --save-dir whole --device wgpu"),
    );
    contains(&said, "device  wgpu:0");
    succeeds(
        folder,
        &format!("{TRAIN} --steps 5 --save-dir parts --device wgpu:0"),
    );
    succeeds(folder, "train --resume parts --steps 12 --device wgpu");
    let (whole, parts) = (folder.join("whole"), folder.join("parts"));
    assert_eq!(last_state(&whole), last_state(&parts));

    // One that was begun there goes on anywhere, and comes to about the same.
    succeeds(
        folder,
        &format!("{TRAIN} --steps 5 --save-dir mixed --device wgpu"),
    );
    succeeds(folder, "train --resume mixed --steps 12 --device cpu");
    let mixed = last_state(&folder.join("mixed"));
    let pairs = mixed.parameters.iter().zip(last_state(&whole).parameters);
    for (mixed, whole) in pairs {
        for (mixed, whole) in mixed.iter().zip(whole) {
            assert!(
                (mixed - whole).abs() < 1e-3 * (1.0 + whole.abs()),
                "{mixed}, {whole}"
            );
        }
    }

    for (device, table) in [("cpu", "cpu.csv"), ("wgpu", "wgpu.csv")] {
        succeeds(folder, &format!("eval whole --device {device} -o {table}"));
    }
    let (cpu, wgpu) = (
        numbers(&folder.join("cpu.csv")),
        numbers(&folder.join("wgpu.csv")),
    );
    assert!(!cpu.is_empty() && cpu.len() == wgpu.len());
    for (cpu, wgpu) in cpu.iter().zip(&wgpu) {
        assert!((cpu - wgpu).abs() < 1e-4 * cpu.abs(), "{cpu}, {wgpu}");
    }

    // Pixel by pixel, their sums are the same.
    succeeds(folder, "score whole photos --device wgpu -o scores");
    let scored = numbers(&folder.join("scores/scores.csv"));
    assert_eq!(scored.len(), wgpu.len());
    for (scored, wgpu) in scored.iter().zip(&wgpu) {
        assert!(
            (scored - wgpu).abs() < 1e-4 * wgpu.abs(),
            "{scored}, {wgpu}"
        );
    }

    for (device, to) in [
        ("cpu", "cpu.png"),
        ("wgpu", "wgpu.png"),
        ("wgpu", "again.png"),
    ] {
        succeeds(
            folder,
            &format!("sample whole --num 6 --seed 3 --device {device} -o {to}"),
        );
    }
    let [cpu, wgpu, again] = ["cpu.png", "wgpu.png", "again.png"].map(|to| open(&folder.join(to)));
    assert_eq!(wgpu, again);
    // A level that falls between two is rounded otherwise, and all that comes after it is another image's.
    let same = cpu.pixels().zip(wgpu.pixels()).filter(|(a, b)| a == b);
    assert!(same.count() * 2 > cpu.pixels().len());

    // What is given is kept.
    let complete = "complete whole photos/dark/03.png --keep top:5 --variants 2 --device wgpu";
    succeeds(folder, &format!("{complete} --singles completed"));
    let photo = open(&folder.join("photos/dark/03.png"));
    let completed: Vec<_> = fs::read_dir(folder.join("completed")).unwrap().collect();
    assert!(!completed.is_empty());
    for entry in completed {
        let completed = open(&entry.unwrap().path());
        for (x, y, pixel) in completed.enumerate_pixels().filter(|(_, y, _)| *y < 5) {
            assert_eq!(pixel, photo.get_pixel(x, y));
        }
    }
}

#[test]
fn what_it_cannot_do_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    contains(
        &fails(folder, "sample --num 1 --device wgpu:1000"),
        "there is no adapter number 1000",
    );
    contains(&fails(folder, "sample --num 1 --device wgpu:x"), "wgpu:N");
    // Where there is no driver at all, the CPU does the work.
    let nowhere = |arguments: &str| {
        let mut command = command(folder, arguments);
        output(
            command
                .env("VK_DRIVER_FILES", "/nowhere")
                .env("VK_ICD_FILENAMES", "/nowhere"),
        )
    };
    let devices = nowhere("devices");
    assert!(devices.status.success());
    assert!(!text(&devices.stdout).contains("wgpu"));
    contains(&text(&devices.stderr), "no adapter is found: install");
    let sample = nowhere("sample --num 1 --device wgpu");
    assert!(!sample.status.success());
    let said = text(&sample.stderr);
    contains(&said, "no adapter is found: install");
    assert_eq!(said.lines().count(), 1, "{said}");
}
