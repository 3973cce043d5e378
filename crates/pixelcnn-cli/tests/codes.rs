//! Models of codes, run as a program: trained, measured, drawn from, completed with.

mod program;

use std::fs;
use std::path::Path;

use pixelcnn::data::CodeMaps;
use pixelcnn::numpy::Npz;
use program::{contains, fails, misused, succeeds};

/// Between one code and the next that occurs: they are more than a byte holds.
const APART: i64 = 43;

/// A code of 7 that follows from the one above it and the coarser one: what a table of pairs can't know,
/// and a model can. Those of the first row are drawn.
fn code(above: Option<i64>, coarse: i64, noise: u32) -> i64 {
    match above {
        Some(above) => (above + coarse) % 7,
        None => i64::from(noise % 7),
    }
}

/// Writes `codes.npz`: maps 8x8 of 259 codes under maps 4x4 of 3, with labels, as int64.
fn codes(folder: &Path) {
    let mut random = program::random();
    let mut npz = Npz::new();
    for (split, count) in [("train", 400), ("test", 40)] {
        let (mut own, mut coarse, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for map in 0..count {
            let over: Vec<i64> = (0..16).map(|_| i64::from(random() % 3)).collect();
            let mut here: Vec<i64> = Vec::new();
            for i in 0..64 {
                let (y, x) = (i / 8, i % 8);
                let above = (y > 0).then(|| here[i - 8]);
                here.push(code(above, over[y / 2 * 4 + x / 2], random()));
            }
            own.extend(here);
            coarse.extend(over);
            labels.push(i64::from(map % 2));
        }
        let own: Vec<i64> = own.into_iter().map(|code| code * APART).collect();
        npz.add(&format!("codes_{split}"), &[count as usize, 8, 8], &own)
            .unwrap();
        npz.add(&format!("coarse_{split}"), &[count as usize, 4, 4], &coarse)
            .unwrap();
        npz.add(&format!("labels_{split}"), &[count as usize], &labels)
            .unwrap();
    }
    fs::write(folder.join("codes.npz"), npz.finish().unwrap()).unwrap();
}

const TRAIN: &str = "--data codes.npz --nr-codes 259 --nr-coarse-codes 3 --nr-filters 12 --batch-size 20 \
                     --init-batch-size 20 --optimizer adam --learning-rate 0.01 --cooldown 0";

/// The number after some words.
fn after(text: &str, words: &str) -> f64 {
    let found = text.split(words).nth(1).unwrap();
    let found = found.split_whitespace().next().unwrap();
    found.trim_end_matches(',').parse().unwrap()
}

#[test]
fn a_prior_over_codes_learns_what_tables_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    codes(folder);
    let trained = succeeds(
        folder,
        &format!("train run {TRAIN} --steps 300 --epochs 100 --samples 3"),
    );
    contains(&trained, "8x8 of 259 codes with coarser ones of 3");
    let (histogram, pairs) = (
        after(&trained, "a histogram"),
        after(&trained, "table of pairs"),
    );
    assert!((2.7..3.0).contains(&histogram), "{trained}");
    assert!(pairs < histogram && pairs > 1.2, "{trained}");

    let measured = succeeds(folder, "eval run --output figures.csv");
    contains(&measured, "40 images");
    let bits = after(&measured, "images");
    assert!(bits < 0.6 * pairs, "{bits} of {pairs}");
    assert_eq!(
        fs::read_to_string(folder.join("figures.csv"))
            .unwrap()
            .lines()
            .count(),
        41
    );

    // What is drawn follows the rule more often than chance would.
    let given = CodeMaps {
        shape: [30, 4, 4],
        codes: (0..480).map(|i| (i * 7 % 13 % 3) as u16).collect(),
    };
    given.write(&folder.join("given.npy")).unwrap();
    let drawn = succeeds(
        folder,
        "sample run --coarse given.npy -o drawn.npy --npz drawn.npz",
    );
    contains(&drawn, "30 maps in drawn.npy");
    let maps = CodeMaps::read(&folder.join("drawn.npy")).unwrap();
    assert_eq!(maps.shape, [30, 8, 8]);
    let (mut kept, mut all) = (0, 0);
    for (map, codes) in maps.codes.chunks_exact(64).enumerate() {
        for y in 1..8 {
            for x in 0..8 {
                let at = |y: usize, x: usize| i64::from(codes[y * 8 + x]) / APART;
                let over = given.codes[map * 16 + y / 2 * 4 + x / 2].into();
                let want = code(Some(at(y - 1, x)), over, 0);
                kept += usize::from(at(y, x) == want);
                all += 1;
            }
        }
    }
    assert!(kept * 2 > all, "{kept} of {all}");
    succeeds(folder, "sample run --coarse given.npy -o again.npy");
    assert_eq!(CodeMaps::read(&folder.join("again.npy")).unwrap(), maps);

    // The run drew some too.
    let samples = CodeMaps::read(&folder.join("run/samples.npy")).unwrap();
    assert_eq!(samples.shape, [3, 8, 8]);

    // What is kept is kept, and what follows is the model's.
    let completed = succeeds(
        folder,
        "complete run drawn.npy --coarse given.npy --keep left:3 --variants 2 -o completed.npy",
    );
    contains(&completed, "30 maps completed 2 times");
    let completed = CodeMaps::read(&folder.join("completed.npy")).unwrap();
    assert_eq!(completed.shape, [60, 8, 8]);
    for (map, codes) in completed.codes.chunks_exact(64).enumerate() {
        let before = maps.codes[map / 2 * 64..][..64].chunks(8);
        assert!(
            codes
                .chunks(8)
                .zip(before)
                .all(|(row, before)| row[..3] == before[..3])
        );
    }
    assert_ne!(completed.codes[..64], completed.codes[64..128]);
}

#[test]
fn codes_know_classes_and_go_on_where_they_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    codes(folder);
    let train = format!("{TRAIN} --class-conditional --attention 0,2,0 --augmentation flips");
    succeeds(
        folder,
        &format!("train whole {train} --steps 30 --epochs 100 --samples 2"),
    );
    succeeds(
        folder,
        &format!("train parts {train} --steps 11 --epochs 100 --samples 2"),
    );
    succeeds(folder, "train --resume parts --steps 30");
    let saved = |run: &str| fs::read(folder.join(run).join("samples.npy")).unwrap();
    assert_eq!(saved("whole"), saved("parts"));
    let eval = |run: &str| succeeds(folder, &format!("eval {run}"));
    assert_eq!(eval("whole"), eval("parts"));

    let classified = succeeds(folder, "classify whole");
    contains(&classified, "40 images");
    succeeds(folder, "export whole --out model");
    // Imported, it is trained on as it was.
    succeeds(
        folder,
        "import model/model.safetensors -o again --data codes.npz --batch-size 20",
    );
    let resumed = succeeds(folder, "train --resume again --steps 33 --epochs 100");
    contains(&resumed, "bits/code");
    let exported = succeeds(
        folder,
        "eval model/model.safetensors --data codes.npz --split test",
    );
    assert_eq!(exported, eval("whole"));
}

#[test]
fn what_does_not_go_with_codes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    codes(folder);
    let refused = |arguments: &str, because: &str| {
        let error = fails(folder, arguments);
        contains(&error, because);
    };
    refused(
        "train run --data codes.npz",
        "say how many there are (nr_codes)",
    );
    refused(
        "train run --data codes.npz --nr-codes 258 --nr-coarse-codes 3",
        "nr_codes must be 259 or more (--nr-codes)",
    );
    refused(
        "train run --data codes.npz --nr-codes 259 --nr-coarse-codes 2",
        "nr_coarse_codes must be 3 or more (--nr-coarse-codes)",
    );
    refused("train run --nr-codes 7", "images, not codes");
    refused("train run --data codes.npz --nr-codes 1", "at least two");
    refused(
        "train run --data codes.npz --nr-coarse-codes 3",
        "only they can have",
    );
    refused(
        "train run --data codes.npz --nr-codes 259 --nr-coarse-codes 3 --nr-channel-resnet 1",
        "one number for each pixel",
    );
    assert!(!folder.join("run").exists());

    succeeds(folder, &format!("train run {TRAIN} --steps 2 --samples 0"));
    refused("sample run", "--coarse");
    let maps = CodeMaps {
        shape: [2, 4, 4],
        codes: vec![2; 32],
    };
    maps.write(&folder.join("two.npy")).unwrap();
    refused("sample run --coarse two.npy -o two.png", ".npy");
    refused("sample run --coarse two.npy --scale 2", "--scale");
    refused("sample run --coarse two.npy --animate a.png", "--animate");
    misused(folder, "sample run --coarse two.npy --num 3");
    let beyond = CodeMaps {
        codes: vec![3; 32],
        ..maps.clone()
    };
    beyond.write(&folder.join("beyond.npy")).unwrap();
    refused("sample run --coarse beyond.npy", "code 3");
    let narrow = CodeMaps {
        shape: [2, 4, 3],
        codes: vec![2; 24],
    };
    narrow.write(&folder.join("narrow.npy")).unwrap();
    refused("sample run --coarse narrow.npy", "do not lie over");
    let many = CodeMaps {
        shape: [2, 8, 8],
        codes: vec![300; 128],
    };
    many.write(&folder.join("many.npy")).unwrap();
    refused(
        "complete run many.npy --coarse two.npy --keep top:2",
        "8x8 of 259 codes",
    );
    refused("compress run two.npy -o two.pxc", "models of images");
    refused("score run", "models of images");
    refused("export run --format tensorflow --out weights", "nr_codes");
}
