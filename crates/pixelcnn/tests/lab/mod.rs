//! Pictures to learn, settings to learn them with, and what a run has come to.

use std::path::Path;

use image::{Rgb, RgbImage};
use pixelcnn::data::DataConfig;
use pixelcnn::train::checkpoints::Checkpoints;
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::metrics::{self, Record};
use pixelcnn::train::state::TrainState;
use pixelcnn::{Augmentation, ModelConfig};

/// Makes 30 pictures in a folder; those of another seed are others.
pub fn write_pictures(folder: &Path, seed: u8) {
    for i in 0..30u32 {
        let picture = RgbImage::from_fn(8, 8, |x, y| {
            let level = |factor| (factor * (x + 8 * y) + 7 * i) as u8;
            Rgb([level(3), level(2), level(1) ^ seed])
        });
        picture.save(folder.join(format!("{i:02}.png"))).unwrap();
    }
}

/// A run that learns the pictures of a folder, so small that a step takes no time.
pub fn config(pictures: &Path, train: TrainConfig) -> RunConfig {
    RunConfig {
        model: ModelConfig {
            height: 8,
            width: 8,
            nr_resnet: 1,
            nr_filters: 2,
            nr_logistic_mix: 1,
            nr_channel_resnet: 1,
            augmentation: Augmentation::Symmetries,
            attention: [1, 2, 1],
            ..ModelConfig::default()
        },
        data: DataConfig {
            data: pictures.to_str().unwrap().into(),
            ..DataConfig::default()
        },
        train: TrainConfig {
            init_batch_size: 4,
            save_interval: 2,
            samples: 1,
            ..train
        },
    }
}

/// The last state of a run, but for the time that it took.
pub fn last_state(run: &Path) -> TrainState {
    let (mut state, _) = Checkpoints::new(run.join("checkpoints")).latest().unwrap();
    state.seconds = 0.0;
    state.unrecorded.seconds = 0.0;
    state
}

/// The metrics of a run, but for the time that things took.
pub fn records(run: &Path) -> Vec<Record> {
    let mut recorded = metrics::read(run).unwrap();
    assert_eq!(recorded.damaged, [0; 0]);
    for record in &mut recorded.records {
        match record {
            Record::Train {
                images_per_second,
                seconds,
                ..
            } => (*images_per_second, *seconds) = (0.0, 0.0),
            Record::Test { seconds, .. } => *seconds = 0.0,
        }
    }
    recorded.records
}
