//! `pixelcnn train --init-from`, run as a program: runs that begin with a trained model's weights.

mod program;

use std::fs;
use std::path::Path;

use pixelcnn::Model;
use pixelcnn::network::{Layout, Parameter, ParameterKind};
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

/// Of each block the bias that conditions are added to, and what it adds for each of them.
fn blocks(state: &TrainState) -> Vec<[&[f32]; 2]> {
    let layout = Layout::new(&state.config);
    let conditional = |(number, _): &(usize, _)| {
        let parameter: &Parameter = &layout.parameters[*number];
        parameter.kind == ParameterKind::Hw
    };
    let found = state.average.iter().enumerate().filter(conditional);
    let found = found.map(|(number, hw)| [&state.average[number - 1][..], hw]);
    found.collect()
}

#[track_caller]
fn expect_same(got: &[f32], wanted: impl Iterator<Item = f32>) {
    let wanted: Vec<f32> = wanted.collect();
    assert_eq!(got.len(), wanted.len());
    for (got, wanted) in got.iter().zip(wanted) {
        assert!((got - wanted).abs() < 1e-5, "{got} is not {wanted}");
    }
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

    // What went into the weights before is known.
    let before = "PixelCNN++ model, after 120 images and 0.0 hours\n";
    contains(&succeeds(folder, "info more"), before);
    succeeds(folder, "export larger -o larger-out");
    contains(
        &succeeds(folder, "info larger-out/model.safetensors"),
        before,
    );
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
    for ([_, own], [_, hw]) in blocks(&model).into_iter().zip(blocks(&classes)) {
        let channels = own.len();
        assert!(own.iter().any(|value| value.abs() > 1e-3));
        expect_same(&hw[..2 * channels], vec![0.0; 2 * channels].into_iter());
        expect_same(&hw[2 * channels..], own.iter().copied());
    }

    // What it has learned of them is kept, also where it goes on with more augmentations.
    let learning = "--class-conditional --steps 60 --learning-rate 0.02";
    let learned = train(folder, "learned", &format!("--init-from model {learning}"));
    let more = format!("--init-from learned --augmentation symmetries {STILL}");
    let more = train(folder, "more", &more);
    let begun = blocks(&learned);
    assert_eq!(begun.len(), blocks(&more).len());
    for ([bias, hw], [own_bias, own]) in blocks(&more).into_iter().zip(&begun) {
        let channels = bias.len();
        let (dark, light) = own.split_at(channels);
        let differ = |(dark, light): (&f32, &f32)| (dark - light).abs() > 1e-3;
        assert!(dark.iter().zip(light).any(differ));
        expect_same(bias, own_bias.iter().copied());
        let new = vec![0.0; 6 * channels];
        expect_same(hw, own.iter().copied().chain(new));
    }

    // New ones begin as the mean of those, which is what a model without them begins with.
    let photos = folder.join("photos");
    fs::rename(photos.join("dark"), photos.join("very dark")).unwrap();
    let others = train(folder, "others", &format!("--init-from learned {STILL}"));
    assert_eq!(others.class_names, ["light", "very dark"]);
    let without = "--init-from learned --class-conditional=false";
    let without = train(folder, "without", &format!("{without} {STILL}"));
    assert_eq!(without.config.nr_classes, 0);
    let both = blocks(&others).into_iter().zip(blocks(&without));
    for (([bias, hw], [bias_without, hw_without]), [own_bias, own]) in both.zip(&begun) {
        let channels = bias.len();
        let mean = |i: usize| 0.5 * (own[i] + own[channels + i]);
        let as_mean = || (0..channels).map(|i| own_bias[i] + mean(i));
        expect_same(bias, as_mean());
        expect_same(bias_without, as_mean());
        let light = (0..channels).map(|i| own[channels + i] - mean(i));
        let new = vec![0.0; channels];
        let flips = &own[2 * channels..];
        expect_same(hw, light.chain(new).chain(flips.iter().copied()));
        expect_same(hw_without, flips.iter().copied());
    }
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
        "--init-from model: nr_filters is 6 in the run and 4 in the model: they must be the same",
    );
    contains(
        &refused("--init-from nothing"),
        "nothing: no such file, run folder",
    );
    let file = folder.join("model/checkpoints/best.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(folder.join("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    contains(&refused("--init-from cut.safetensors"), "cut.safetensors");
    // A config file can have a shape of its own, or none.
    fs::write(
        folder.join("six.toml"),
        "[model]\nnr_resnet = 1\nnr_filters = 6\n",
    )
    .unwrap();
    contains(
        &refused("--init-from model --config six.toml"),
        "nr_filters is 6 in the run and 4 in the model",
    );
    assert!(!folder.join("new").exists());
    fs::write(
        folder.join("still.toml"),
        "[train]\nsteps = 1\nlearning_rate = 1e-12\n",
    )
    .unwrap();
    let new = train(folder, "new", "--init-from model --config still.toml");
    assert_eq!(new.config.nr_filters, 4);
    misused(folder, "train --resume model --init-from model");
}
