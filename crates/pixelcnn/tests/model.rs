//! A model in one hand: from any file that holds one, the same answers as its parts give.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use pixelcnn::archive::{Item, ModelHash};
use pixelcnn::complete::Completion;
use pixelcnn::data::DataConfig;
use pixelcnn::device::Device;
use pixelcnn::network::{Batch, Network, draw_parameters};
use pixelcnn::sample::{Sampling, sample};
use pixelcnn::train::checkpoints::{CheckpointError, Checkpoints};
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::run::RunError;
use pixelcnn::train::state::{Moments, TrainState, Unrecorded};
use pixelcnn::weights::{npz, original, tensorflow};
use pixelcnn::{Model, ModelConfig, OpenError};

fn state() -> TrainState {
    let config = ModelConfig {
        height: 8,
        width: 8,
        nr_resnet: 1,
        nr_filters: 3,
        nr_logistic_mix: 2,
        ..ModelConfig::default()
    };
    let [parameters, average] = [1, 2].map(|seed| draw_parameters(&config, seed));
    TrainState {
        step: 7,
        images_seen: 56,
        last_evaluation: Some((7, 4.5)),
        ..TrainState::new(&config, &TrainConfig::default(), parameters, average)
    }
}

#[test]
fn a_model_opens_from_whatever_holds_one() {
    let folder = tempfile::tempdir().unwrap();
    let state = state();
    let run = folder.path().join("run");
    let checkpoint = Checkpoints::new(run.join("checkpoints"))
        .save(&state)
        .unwrap();
    for path in [&run, &checkpoint] {
        let model = Model::open(path).unwrap();
        assert_eq!(
            (&model.config, &model.weights),
            (&state.config, &state.average)
        );
        assert_eq!((model.card.step, model.card.images_seen), (7, 56));
        assert_eq!(model.card.measured.unwrap().bits_per_dim, 4.5);
    }

    let model = Model::open(&run).unwrap();
    let saved = folder.path().join("saved");
    model.save(&saved).unwrap();
    assert_eq!(
        Model::open(&saved.join("model.safetensors")).unwrap(),
        model
    );

    // What the original's code would read has 32x32 images where nothing else is said.
    let original = folder.path().join("original");
    let variables = original::variables(state.optimized().unwrap(), 8, 1).unwrap();
    tensorflow::write_v2(&original, "params_cifar.ckpt", variables).unwrap();
    let model = Model::open(&original.join("params_cifar.ckpt")).unwrap();
    assert_eq!((model.config.height, model.card.step), (32, 7));
    assert_eq!(model.weights, state.average);
}

#[test]
fn what_holds_no_model_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let error = Model::open(folder.path()).unwrap_err();
    assert!(
        matches!(
            error,
            OpenError::Run(RunError::Checkpoint(CheckpointError::Empty { .. }))
        ),
        "{error}"
    );
    let config = state().config;
    npz::export(folder.path(), "weights.npz", &config, &state().average).unwrap();
    let text = folder.path().join("text");
    fs::write(&text, "no model").unwrap();
    for path in [
        folder.path().join("weights.npz"),
        text,
        folder.path().join("missing"),
    ] {
        let error = Model::open(&path).unwrap_err().to_string();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name), "{error}");
    }
    let checkpoint = Checkpoints::new(folder.path()).save(&state()).unwrap();
    let bytes = fs::read(&checkpoint).unwrap();
    fs::write(&checkpoint, &bytes[..bytes.len() - 1]).unwrap();
    let error = Model::open(&checkpoint).unwrap_err();
    assert!(
        matches!(
            error,
            OpenError::Run(RunError::Checkpoint(CheckpointError::File(_)))
        ),
        "{error}"
    );
}

#[test]
fn its_answers_are_those_of_its_parts() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoints::new(folder.path()).save(&state()).unwrap();
    let model = Model::open(Path::new(&checkpoint)).unwrap();
    let dims = model.config.dims();

    let sampling = Sampling::of(20, 5);
    let images = model.sample(&sampling).unwrap();
    let sampler = model.sampler(&Device::CPU).unwrap();
    let drawn = sample(&sampler, &sampling, 0..20, &mut |_| {
        ControlFlow::Continue(())
    });
    assert_eq!(images, drawn.unwrap());

    // More images than are evaluated at a time, in an order that is kept.
    let network = Network::new(&model.config, &model.weights, &Device::CPU).unwrap();
    let alone = |image| {
        let batch = Batch {
            images: image,
            labels: &[],
            ..Batch::default()
        };
        network.nats_per_image(batch).unwrap()[0]
    };
    let nats: Vec<f64> = images.chunks(dims).map(alone).collect();
    assert_eq!(model.nats(&images, &[]).unwrap(), nats);
    let bits: Vec<f64> = nats
        .iter()
        .map(|&nats| model.config.bits_per_dim(nats))
        .collect();
    assert_eq!(model.bits_per_dim(&images, &[]).unwrap(), bits);
    assert!(model.nats(&images[1..], &[]).is_err());

    let completion = Completion {
        images: images[..dims].to_vec(),
        known: (0..64).map(|pixel| pixel < 32).collect(),
        labels: vec![0],
        variants: 2,
        temperature: 1.0,
        seed: 1,
    };
    let completed = model.complete(&completion).unwrap();
    assert_eq!(completed.len(), 2 * dims);
    for variant in completed.chunks(dims) {
        assert_eq!(variant[..dims / 2], images[..dims / 2]);
        assert_ne!(variant, &images[..dims]);
    }

    let shape = [
        model.config.height,
        model.config.width,
        model.config.channels,
    ];
    let items: Vec<Item> = (images.chunks(dims).enumerate())
        .map(|(i, levels)| Item::of_levels(&i.to_string(), 0, shape, levels))
        .collect();
    let file = model.compress(items.clone()).unwrap();
    let found = model.decompress(&file).unwrap();
    assert_eq!(found.len(), items.len());
    for ((name, found), item) in found.into_iter().zip(&items) {
        assert_eq!(name, item.name);
        assert!(found.unwrap().is_of(&item.bytes));
    }
}

/// What was written once is read for ever: `tests/data/checkpoint-1.safetensors`, made anew by this
/// test where `PIXELCNN_MAKE_VECTOR` is set.
#[test]
fn a_checkpoint_of_version_1_stays_readable() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint-1.safetensors");
    let config = ModelConfig {
        height: 4,
        width: 8,
        nr_resnet: 1,
        nr_filters: 1,
        nr_logistic_mix: 1,
        nr_classes: 2,
        ..ModelConfig::default()
    };
    let [parameters, average, first, second] =
        [1, 2, 3, 4].map(|seed| draw_parameters(&config, seed));
    let train = TrainConfig {
        seed: 9,
        learning_rate: 0.125,
        ..TrainConfig::default()
    };
    let written = TrainState {
        step: 7,
        epoch: 2,
        position: 3,
        images_seen: 56,
        seconds: 0.5,
        last_evaluation: Some((6, 4.5)),
        best: Some((4, 4.25)),
        unrecorded: Unrecorded {
            steps: 1,
            bits_per_dim: 5.5,
            seconds: 0.0625,
        },
        run: Some(RunConfig {
            model: config.clone(),
            data: DataConfig::default(),
            train: train.clone(),
        }),
        moments: Some(Moments { first, second }),
        ..TrainState::new(&config, &train, parameters, average)
    };
    if std::env::var_os("PIXELCNN_MAKE_VECTOR").is_some() {
        written.write(&path).unwrap();
    }
    let read = TrainState::read(&path).unwrap();
    assert_eq!(read, written);
    // Archives name their model by this.
    let hash = ModelHash::of(&read.config, &read.average).to_string();
    assert_eq!(hash, "64521a34ce6b283dd9ae6d4313d8bcb5");
}
