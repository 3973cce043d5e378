//! Models, parameters and images to test with.

use pixelcnn_core::network::{Layout, ParameterKind};
use pixelcnn_core::{Augmentation, ModelConfig, Nonlinearity};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// Small models of every kind; with filters on both sides of a panel's width.
pub fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig {
        height: 8,
        width: 12,
        channels: 3,
        nr_resnet: 1,
        nr_filters: 5,
        nr_logistic_mix: 2,
        nonlinearity: Nonlinearity::ConcatElu,
        nr_classes: 0,
        nr_channel_resnet: 0,
        augmentation: Augmentation::None,
        attention: [0; 3],
        nr_codes: 0,
        nr_coarse_codes: 0,
        energy_distance: false,
    };
    vec![
        base.clone(),
        ModelConfig {
            height: 4,
            width: 4,
            channels: 1,
            nr_resnet: 2,
            nr_classes: 3,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_filters: 16,
            nr_classes: 2,
            width: 8,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Relu,
            channels: 1,
            nr_filters: 37,
            height: 4,
            width: 8,
            ..base.clone()
        },
        // Wide enough for pairs of columns, in one and in two resolutions.
        ModelConfig {
            height: 4,
            width: 20,
            nr_filters: 18,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_classes: 2,
            width: 32,
            ..base.clone()
        },
        // Channels one after another.
        ModelConfig {
            nr_classes: 2,
            nr_channel_resnet: 2,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            channels: 1,
            nr_filters: 17,
            nr_channel_resnet: 1,
            ..base.clone()
        },
        // Conditioned augmentation, with classes and without.
        ModelConfig {
            nr_classes: 2,
            augmentation: Augmentation::Flips,
            ..base.clone()
        },
        ModelConfig {
            height: 8,
            width: 8,
            augmentation: Augmentation::Symmetries,
            ..base.clone()
        },
        // Attention at single resolutions and at all.
        ModelConfig {
            nr_classes: 2,
            nr_filters: 20,
            attention: [0, 5, 1],
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_filters: 18,
            nr_channel_resnet: 1,
            attention: [2, 3, 6],
            ..base.clone()
        },
        // Sides that are not halved evenly, down to a single pixel.
        ModelConfig {
            height: 7,
            width: 9,
            nr_classes: 2,
            attention: [0, 0, 5],
            ..base.clone()
        },
        ModelConfig {
            height: 10,
            width: 35,
            nr_channel_resnet: 1,
            ..base.clone()
        },
        ModelConfig {
            height: 2,
            width: 3,
            channels: 1,
            attention: [5, 5, 5],
            ..base.clone()
        },
        ModelConfig {
            height: 1,
            width: 1,
            ..base
        },
    ]
}

/// Small models that are trained by the energy distance.
pub fn configs_of_energy() -> Vec<ModelConfig> {
    let base = ModelConfig {
        energy_distance: true,
        ..configs()[0].clone()
    };
    vec![
        ModelConfig {
            nr_classes: 2,
            attention: [0, 0, 5],
            augmentation: Augmentation::Flips,
            ..base.clone()
        },
        // More pixels than are taken at a time.
        ModelConfig {
            channels: 1,
            nonlinearity: Nonlinearity::Relu,
            height: 17,
            width: 19,
            ..base
        },
    ]
}

/// Small models of codes, alone and given a coarser map.
pub fn configs_of_codes() -> Vec<ModelConfig> {
    let base = ModelConfig {
        channels: 1,
        nr_codes: 11,
        ..configs()[0].clone()
    };
    vec![
        ModelConfig {
            nr_codes: 300,
            width: 8,
            ..base.clone()
        },
        ModelConfig {
            nr_filters: 17,
            nr_coarse_codes: 7,
            height: 7,
            width: 14,
            ..base.clone()
        },
        ModelConfig {
            nonlinearity: Nonlinearity::Elu,
            nr_filters: 18,
            width: 32,
            nr_classes: 2,
            nr_coarse_codes: 20,
            attention: [0, 2, 3],
            augmentation: Augmentation::Flips,
            ..base
        },
    ]
}

pub fn parameters(config: &ModelConfig, random: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
    let layout = Layout::new(config).parameters;
    let mut value = |scale: f32| scale * (random.next_u32() as i32) as f32 / 2f32.powi(31);
    let drawn = layout.iter().map(|parameter| {
        let draw = |_| match parameter.kind {
            ParameterKind::V => value(0.1),
            ParameterKind::G => 0.7 + value(0.3),
            ParameterKind::B | ParameterKind::Hw => value(0.5),
        };
        (0..parameter.len()).map(draw).collect()
    });
    drawn.collect()
}

pub struct Images {
    pub levels: Vec<u8>,
    pub labels: Vec<u32>,
    pub augmentations: Vec<u8>,
}

impl Images {
    pub fn random(config: &ModelConfig, n: usize, random: &mut ChaCha8Rng) -> Images {
        let classes = config.nr_classes.max(1) as u32;
        let pixels = n * config.height * config.width;
        let pixel = |_| -> Vec<u8> {
            match config.nr_codes {
                0 => (0..config.channels)
                    .map(|_| random.next_u32() as u8)
                    .collect(),
                codes => [codes, config.nr_coarse_codes]
                    .into_iter()
                    .filter(|&codes| codes > 0)
                    .flat_map(|codes| ((random.next_u32() as usize % codes) as u16).to_le_bytes())
                    .collect(),
            }
        };
        Images {
            levels: (0..pixels).flat_map(pixel).collect(),
            labels: (0..n).map(|_| random.next_u32() % classes).collect(),
            augmentations: match config.augmentation.count() as u32 {
                0 => Vec::new(),
                count => (0..n)
                    .map(|_| (random.next_u32() % (count + 1)) as u8)
                    .collect(),
            },
        }
    }
}
