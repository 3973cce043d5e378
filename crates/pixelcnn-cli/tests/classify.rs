//! `pixelcnn classify`, run as a program.

mod program;

use std::fs;
use std::path::Path;

use image::{Rgb, RgbImage};

use program::{contains, fails, open, succeeds};

/// Noise around a level of its own.
fn picture(level: u8, seed: u32) -> RgbImage {
    RgbImage::from_fn(8, 8, |x, y| {
        let noise = (seed + 97 * x + 1009 * y).wrapping_mul(2_654_435_761);
        let level = |shift: u32| level + (noise >> shift) as u8 % 32;
        Rgb([level(7), level(13), level(19)])
    })
}

fn write_pictures(folder: &Path, level: u8, first: u32) {
    fs::create_dir_all(folder).unwrap();
    for i in 0..20 {
        let picture = picture(level, first + 1000 * i);
        picture.save(folder.join(format!("{i:02}.png"))).unwrap();
    }
}

fn lines(path: &Path) -> Vec<Vec<String>> {
    let mut table = csv::ReaderBuilder::new();
    let table = table.has_headers(false).from_path(path).unwrap();
    let rows = table.into_records().map(|row| row.unwrap());
    rows.map(|row| row.iter().map(str::to_owned).collect())
        .collect()
}

/// A model that has seen dark and light pictures tells which others are which.
#[test]
fn the_model_tells_dark_from_light() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_pictures(&folder.join("photos/dark"), 20, 0);
    write_pictures(&folder.join("photos/light"), 200, 1);
    let train = "--data photos --held-out 0.2 --nr-filters 6 --nr-resnet 1 --nr-logistic-mix 1 \
                 --batch-size 8 --init-batch-size 32 --samples 0 --learning-rate 0.01";
    succeeds(
        folder,
        &format!("train classes {train} --steps 300 --class-conditional"),
    );
    let said = succeeds(folder, "classify classes -o out");
    contains(&said, "8 images: 100.00 ± 0.00 % are of the class found");
    let counts = lines(&folder.join("out/confusion.csv"));
    let dark: usize = counts[1][1].parse().unwrap();
    let expected = [
        vec!["class".into(), "dark".into(), "light".into()],
        vec!["dark".into(), dark.to_string(), "0".into()],
        vec!["light".into(), "0".into(), (8 - dark).to_string()],
    ];
    assert_eq!(counts, expected);
    assert!(open(&folder.join("out/confusion.png")).width() > 200);
    let table = lines(&folder.join("out/probabilities.csv"));
    let columns = ["index", "label", "name", "class", "dark", "light"];
    assert_eq!(table[0], columns);
    for row in &table[1..] {
        assert_eq!(row[2].split('/').next().unwrap(), row[3]);
        let [dark, light] = [4, 5].map(|column| row[column].parse::<f64>().unwrap());
        assert!((dark + light - 1.0).abs() < 1e-9);
        assert_eq!(dark > light, row[3] == "dark");
    }

    // Pictures of no class: nothing to hold it against.
    write_pictures(&folder.join("found"), 200, 7);
    let said = succeeds(folder, "classify classes --data found --limit 6");
    contains(&said, "6 images classified");
    contains(&said, "00.png: light, 01.png: light");
    assert_eq!(lines(&folder.join("classes-2/probabilities.csv")).len(), 7);
    assert!(!folder.join("classes-2/confusion.csv").exists());
    // Nor for pictures of other classes.
    write_pictures(&folder.join("others/indoors"), 20, 3);
    let said = succeeds(folder, "classify classes --data others -o others-found");
    contains(&said, "20 images classified");
    contains(&said, "indoors/00.png: dark");
    for (name, level, first) in [("night", 20, 3), ("noon", 200, 4)] {
        write_pictures(&folder.join("as-many").join(name), level, first);
    }
    let said = succeeds(
        folder,
        "classify classes --data as-many -o others-found --force",
    );
    contains(&said, "40 images classified");
    contains(&said, "night/00.png: dark");

    // The names go with the model, wherever its data are.
    succeeds(folder, "export classes -o exported");
    let card = std::fs::read_to_string(folder.join("exported/README.md")).unwrap();
    contains(&card, "| classes | 2: dark, light |");
    std::fs::rename(folder.join("photos"), folder.join("elsewhere")).unwrap();
    let drawn = |name: &str, model: &str, class: &str| {
        succeeds(
            folder,
            &format!("sample {model} --class {class} --num 1 --singles {name}"),
        );
        std::fs::read(folder.join(name).join("0000.png")).unwrap()
    };
    let by_number = drawn("one", "classes", "1");
    assert_eq!(drawn("two", "classes", "light"), by_number);
    let exported = "exported/model.safetensors";
    assert_eq!(drawn("three", exported, "light"), by_number);
    let error = fails(folder, &format!("sample {exported} --class grey"));
    contains(&error, "choose dark, light");
    succeeds(folder, &format!("import {exported} --out imported"));
    assert_eq!(drawn("four", "imported", "light"), by_number);
    // Pictures of other classes are not taken for them.
    let (light, noon) = (
        folder.join("elsewhere/light"),
        folder.join("elsewhere/noon"),
    );
    std::fs::rename(&light, &noon).unwrap();
    std::fs::rename(folder.join("elsewhere"), folder.join("photos")).unwrap();
    let said = succeeds(folder, "classify classes -o renamed");
    contains(&said, "8 images classified");
    let error = fails(folder, "train --resume classes --steps 301");
    contains(&error, "classes of other names");
    std::fs::rename(folder.join("photos/noon"), folder.join("photos/light")).unwrap();
    succeeds(folder, "train --resume classes --steps 301");

    contains(&fails(folder, "classify classes -o out"), "there already");
    succeeds(folder, &format!("train plain {train} --steps 1"));
    let error = fails(folder, "classify plain -o plain-out");
    contains(&error, "train one with --class-conditional");
}
