//! `pixelcnn train --init-from`, run as a program: runs that begin with a trained model's weights.

mod program;

use std::fs;
use std::path::Path;

use pixelcnn::Model;
use pixelcnn::network::{Layout, ParameterKind};
use pixelcnn::train::state::TrainState;

use program::{contains, fails, last_state, misused, photos, succeeds};

const TRAIN: &str =
    "--data photos --held-out 0.25 --size 8 --batch-size 4 --init-batch-size 8 --samples 0";
const SHAPE: &str = "--nr-filters 4 --nr-resnet 1 --nr-logistic-mix 2 --learning-rate 0.01";
/// So small a step that the weights stay what they are.
const STILL: &str = "--steps 1 --learning-rate 1e-12";

/// Begins a run, and gives its state.
#[track_caller]
fn train(folder: &Path, run: &str, arguments: &str) -> TrainState {
    succeeds(folder, &format!("train {run} {TRAIN} {arguments}"));
    last_state(&folder.join(run))
}

/// The nats of some images under the averaged weights of a run.
fn nats(folder: &Path, run: &str, labels: &[u32]) -> Vec<f64> {
    let model = Model::open(&folder.join(run)).unwrap();
    let model = Model {
        config: model.config.resized([8, 8]),
        ..model
    };
    let values = 0..labels.len() as u32 * 8 * 8 * 3;
    let images: Vec<u8> = values.map(|n| (n * n / 7) as u8).collect();
    let labels = match model.config.nr_classes {
        0 => &[],
        _ => labels,
    };
    model.nats(&images, labels).unwrap()
}

#[track_caller]
fn expect_close(got: &[f64], wanted: &[f64]) {
    assert_eq!(got.len(), wanted.len());
    for (got, wanted) in got.iter().zip(wanted) {
        assert!(
            (got - wanted).abs() < 4e-3 * wanted,
            "{got} is not {wanted}"
        );
    }
}

/// What the blocks add for each condition, without those of classes or without those of augmentations.
fn conditions(state: &TrainState, of_classes: bool) -> Vec<&[f32]> {
    let layout = Layout::new(&state.config);
    let found = layout.parameters.iter().zip(&state.average);
    let found = found.filter(|(parameter, _)| parameter.kind == ParameterKind::Hw);
    found
        .map(|(parameter, values)| {
            let (classes, augmentations) =
                values.split_at(state.config.nr_classes * parameter.shape[1]);
            if of_classes { classes } else { augmentations }
        })
        .collect()
}

#[test]
fn a_run_begins_as_the_model_that_it_was_given() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let model = train(folder, "model", &format!("{SHAPE} --steps 30"));
    let told = succeeds(
        folder,
        &format!("train more {TRAIN} --init-from model {STILL}"),
    );
    contains(&told, "run     more, with the weights of model\n");
    let more = last_state(&folder.join("more"));
    assert_eq!((more.step, more.images_seen), (1, 4));
    assert_eq!(more.config, model.config);
    let own = nats(folder, "model", &[0; 5]);
    expect_close(&nats(folder, "more", &[0; 5]), &own);

    // It learns, from where the model was.
    let longer = train(
        folder,
        "longer",
        "--init-from model --steps 60 --learning-rate 0.01",
    );
    let bits = |state: &TrainState| state.best.unwrap().1;
    assert!(
        bits(&longer) < bits(&model),
        "{} after {}",
        bits(&longer),
        bits(&model)
    );

    // As exported, in half precision, and for images of another size.
    succeeds(folder, "export model --half -o out");
    let other = TRAIN.replace("--size 8", "--size 12");
    let told = succeeds(
        folder,
        &format!("train larger {other} --init-from out/model.safetensors {STILL}"),
    );
    contains(&told, "with the weights of out/model.safetensors");
    let larger = last_state(&folder.join("larger"));
    assert_eq!((larger.config.height, larger.config.width), (12, 12));
    expect_close(&nats(folder, "larger", &[0; 5]), &own);
}

#[test]
fn classes_can_be_learned_later() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    let flips = "--augmentation flips";
    let model = train(folder, "model", &format!("{SHAPE} {flips} --steps 30"));
    let told = format!("--init-from model --class-conditional {STILL}");
    let classes = train(folder, "classes", &told);
    assert_eq!(classes.class_names, ["dark", "light"]);
    // Every class begins as the model without, and augmentations are known.
    expect_close(
        &nats(folder, "classes", &[0, 1, 0, 1]),
        &nats(folder, "model", &[0; 4]),
    );
    let flipped = |state| conditions(state, false).concat();
    assert!(flipped(&model).iter().any(|value| *value != 0.0));
    for (got, wanted) in flipped(&classes).iter().zip(flipped(&model)) {
        assert!((got - wanted).abs() < 1e-6);
    }

    // Classes that it has learned are kept, also where it goes on without an augmentation.
    train(
        folder,
        "learned",
        "--init-from model --class-conditional --steps 60 --learning-rate 0.02",
    );
    train(
        folder,
        "kept",
        &format!("--init-from learned --augmentation none {STILL}"),
    );
    let labels = [0, 1, 0, 1];
    let known = nats(folder, "learned", &labels);
    expect_close(&nats(folder, "kept", &labels), &known);
    let swapped = nats(folder, "kept", &[1, 0, 1, 0]);
    assert!(
        known
            .iter()
            .zip(&swapped)
            .all(|(a, b)| (a - b).abs() > 1e-3)
    );

    // Others begin as their mean, which is what a model without them is.
    for class in ["dark", "light"] {
        let photos = folder.join("photos");
        fs::rename(photos.join(class), photos.join(format!("very {class}"))).unwrap();
    }
    let others = train(folder, "others", &format!("--init-from kept {STILL}"));
    assert_eq!(others.class_names, ["very dark", "very light"]);
    let without = format!("--init-from kept --class-conditional=false {STILL}");
    let without = train(folder, "without", &without);
    assert_eq!(without.config.nr_classes, 0);
    let mean = nats(folder, "without", &[0; 4]);
    expect_close(&nats(folder, "others", &[0, 1, 0, 1]), &mean);
    let between = mean.iter().zip(&known).zip(&swapped);
    let between = between.filter(|((mean, a), b)| **mean < a.max(**b) + 1.0);
    assert_eq!(
        between.count(),
        4,
        "{mean:?} is the mean of {known:?} and {swapped:?}"
    );
    assert!(conditions(&without, true).is_empty());
}

#[test]
fn what_a_run_cannot_begin_with_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    photos(folder);
    train(folder, "model", &format!("{SHAPE} --steps 1"));
    let refused = |arguments: &str| fails(folder, &format!("train new {TRAIN} {arguments}"));
    contains(
        &refused("--init-from model --nr-filters 6"),
        "--init-from model: nr_filters is 6 in the settings and 4 in the model: they must be the same",
    );
    contains(
        &refused("--init-from nothing"),
        "nothing: no such file, run folder",
    );
    let file = folder.join("model/checkpoints/best.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(folder.join("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    contains(&refused("--init-from cut.safetensors"), "cut.safetensors");
    // A config file has a shape of its own.
    fs::write(
        folder.join("six.toml"),
        "[model]\nnr_resnet = 1\nnr_filters = 6\n",
    )
    .unwrap();
    contains(
        &refused("--init-from model --config six.toml"),
        "nr_filters is 6 in the settings and 4 in the model",
    );
    assert!(!folder.join("new").exists());
    misused(folder, "train --resume model --init-from model");
}
