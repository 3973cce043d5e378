//! The model's shape, saved beside every set of weights.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::likelihood::{FEATURES, Mixture};

/// The nonlinearity between the layers of a gated resnet block (paper, section 2; the original's
/// `--resnet_nonlinearity`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// `elu([x, -x])`: doubles the channels. The original's default.
    #[default]
    ConcatElu,
    /// `x` where positive, `exp(x) - 1` elsewhere.
    Elu,
    /// `max(x, 0)`.
    Relu,
}

impl Nonlinearity {
    /// Channels out for `channels` in.
    pub fn outputs(self, channels: usize) -> usize {
        match self {
            Nonlinearity::ConcatElu => 2 * channels,
            Nonlinearity::Elu | Nonlinearity::Relu => channels,
        }
    }
}

/// Transformations of training images, each told to the model as a class is (Jun et al., 2020): it
/// learns from them without taking them for images as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Augmentation {
    /// Images as they are.
    #[default]
    None,
    /// Mirrored left to right, half of them.
    Flips,
    /// All eight rotations and reflections of a square, as often each.
    Symmetries,
}

impl Augmentation {
    /// Transformations beside leaving an image as it is.
    pub fn count(self) -> usize {
        match self {
            Augmentation::None => 0,
            Augmentation::Flips => 1,
            Augmentation::Symmetries => 7,
        }
    }

    /// Its name, as in files.
    pub fn name(self) -> &'static str {
        match self {
            Augmentation::None => "none",
            Augmentation::Flips => "flips",
            Augmentation::Symmetries => "symmetries",
        }
    }

    fn is_none(&self) -> bool {
        *self == Augmentation::None
    }
}

/// Everything that fixes the network's parameters and what they mean.
///
/// Files name every field that they know. One that is added later has a default, which means the
/// models before it, and is left out of hashes and of files where it has that value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of an image.
    pub height: usize,
    /// Columns of an image.
    pub width: usize,
    /// 3 (red, green, blue) or 1; 1 for codes.
    pub channels: usize,
    /// Gated resnet blocks per stack and resolution (the original's `--nr_resnet`, 5).
    pub nr_resnet: usize,
    /// Channels of every feature map (the original's `--nr_filters`, 160).
    pub nr_filters: usize,
    /// Components of the discretized mixture of logistics (the original's `--nr_logistic_mix`, 10).
    pub nr_logistic_mix: usize,
    /// Nonlinearity of the gated resnet blocks.
    pub nonlinearity: Nonlinearity,
    /// Classes that the model is conditioned on; 0 for an unconditional model.
    pub nr_classes: usize,
    /// Gated resnet blocks, 1x1, that predict each channel's means, scales and coefficients in the
    /// mixture from the features and the channels before it; 0 where all are predicted together, and
    /// only the means depend on those, linearly (paper, section 2.2).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nr_channel_resnet: usize,
    /// Transformations of training images that the model is told.
    #[serde(default, skip_serializing_if = "Augmentation::is_none")]
    pub augmentation: Augmentation,
    /// Heads of causal self-attention (Chen et al., 2018) after the down pass's blocks at full, half and
    /// quarter resolution, where the horizontal stack then sees all that came before; 0 for none.
    #[serde(default, skip_serializing_if = "has_none")]
    pub attention: [usize; 3],
    /// Codes, such as those of a VQ-VAE, of which each pixel is one; 0 for images of levels from 0 to 255.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nr_codes: usize,
    /// Codes of a second, coarser map that is given; 0 without one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nr_coarse_codes: usize,
    /// Whether the model is trained by the [energy distance](crate::likelihood::EnergyDistance) in place of
    /// its likelihood (the original's `--energy_distance`): it draws samples, and has no likelihood.
    #[serde(default, skip_serializing_if = "is_false")]
    pub energy_distance: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn has_none(heads: &[usize; 3]) -> bool {
    *heads == [0; 3]
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Default for ModelConfig {
    /// The original's settings on CIFAR-10: 53,659,080 parameters.
    fn default() -> Self {
        ModelConfig {
            height: 32,
            width: 32,
            channels: 3,
            nr_resnet: 5,
            nr_filters: 160,
            nr_logistic_mix: 10,
            nonlinearity: Nonlinearity::ConcatElu,
            nr_classes: 0,
            nr_channel_resnet: 0,
            augmentation: Augmentation::None,
            attention: [0; 3],
            nr_codes: 0,
            nr_coarse_codes: 0,
            energy_distance: false,
        }
    }
}

/// A configuration that no PixelCNN++ can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Height or width is zero or too large.
    #[error("image size {width}x{height}: width and height must be between 1 and {MAX_SIDE}")]
    Size {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// Neither 1 nor 3 channels.
    #[error("{0} channels: images have 1 (grey) or 3 (RGB)")]
    Channels(usize),
    /// Codes have no channels, and a coarser map is one of codes.
    #[error(
        "{codes} codes, {coarse} coarser ones, {channels} channels, {blocks} blocks for channels: codes are \
        one number for each pixel, at least two of them, and only they can have a coarser map"
    )]
    Codes {
        /// Number of codes.
        codes: usize,
        /// Of those of the coarser map.
        coarse: usize,
        /// Channels of a pixel.
        channels: usize,
        /// Blocks that predict channels one after another.
        blocks: usize,
    },
    /// What makes samples by the energy distance predicts all channels of an image together.
    #[error(
        "energy_distance with {codes} codes and {blocks} blocks for channels: it is for images, whose channels \
         are predicted together"
    )]
    Energy {
        /// Number of codes.
        codes: usize,
        /// Blocks that predict channels one after another.
        blocks: usize,
    },
    /// Heads that can't share the channels, or too many.
    #[error(
        "attention with {heads} heads and {filters} filters: up to {MAX_HEADS} heads, among which the filters can be shared out evenly"
    )]
    Heads {
        /// Heads at a resolution.
        heads: usize,
        /// Channels of a feature map.
        filters: usize,
    },
    /// A count outside its range.
    #[error("{name} = {value}: must be between {min} and {max}")]
    Count {
        /// The field's name.
        name: &'static str,
        /// What it was.
        value: usize,
        /// The least allowed.
        min: usize,
        /// The most allowed.
        max: usize,
    },
}

/// The longest side of an image.
pub const MAX_SIDE: usize = 1 << 14;

/// The most heads of attention.
pub const MAX_HEADS: usize = 8;

/// The most codes: a code is two bytes.
pub const MAX_CODES: usize = 1 << 16;

/// So many rows or columns, halved `scale` times and rounded up.
pub fn halved(side: usize, scale: usize) -> usize {
    side.div_ceil(1 << scale)
}

impl ModelConfig {
    /// Checks every field's range, so that sizes computed from it can be trusted.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let side = |n: usize| (1..=MAX_SIDE).contains(&n);
        if !side(self.height) || !side(self.width) {
            return Err(ConfigError::Size {
                height: self.height,
                width: self.width,
            });
        }
        if self.channels != 1 && self.channels != 3 {
            return Err(ConfigError::Channels(self.channels));
        }
        for (name, value, min, max) in [
            ("nr_resnet", self.nr_resnet, 1, 64),
            ("nr_filters", self.nr_filters, 1, 4096),
            ("nr_logistic_mix", self.nr_logistic_mix, 1, 256),
            ("nr_classes", self.nr_classes, 0, 100_000),
            ("nr_channel_resnet", self.nr_channel_resnet, 0, 64),
            ("nr_codes", self.nr_codes, 0, MAX_CODES),
            ("nr_coarse_codes", self.nr_coarse_codes, 0, MAX_CODES),
        ] {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::Count {
                    name,
                    value,
                    min,
                    max,
                });
            }
        }
        let (codes, coarse) = (self.nr_codes, self.nr_coarse_codes);
        let sound = match codes {
            0 => coarse == 0,
            _ => codes > 1 && self.channels == 1 && self.nr_channel_resnet == 0,
        };
        if !sound {
            return Err(ConfigError::Codes {
                codes,
                coarse,
                channels: self.channels,
                blocks: self.nr_channel_resnet,
            });
        }
        if self.energy_distance && (codes > 0 || self.nr_channel_resnet > 0) {
            let blocks = self.nr_channel_resnet;
            return Err(ConfigError::Energy { codes, blocks });
        }
        let filters = self.nr_filters;
        let fits = |heads: &usize| *heads <= MAX_HEADS && filters.is_multiple_of((*heads).max(1));
        match self.attention.into_iter().find(|heads| !fits(heads)) {
            None => Ok(()),
            Some(heads) => Err(ConfigError::Heads { heads, filters }),
        }
    }

    /// The settings that came after the first models, where they are not off: the name of each, its value,
    /// and a number that stands for it in hashes. The original has none of them but `energy_distance`.
    pub fn later_settings(&self) -> impl Iterator<Item = (&'static str, String, usize)> + use<> {
        let (channels, augmentation) = (self.nr_channel_resnet, self.augmentation);
        let later = [
            ("nr_channel_resnet", channels.to_string(), channels),
            (
                "augmentation",
                augmentation.name().to_owned(),
                augmentation.count(),
            ),
            (
                "attention",
                self.attention.map(|heads| heads.to_string()).join(","),
                self.attention
                    .iter()
                    .fold(0, |number, heads| number * (MAX_HEADS + 1) + heads),
            ),
            ("nr_codes", self.nr_codes.to_string(), self.nr_codes),
            (
                "nr_coarse_codes",
                self.nr_coarse_codes.to_string(),
                self.nr_coarse_codes,
            ),
            (
                "energy_distance",
                self.energy_distance.to_string(),
                self.energy_distance.into(),
            ),
        ];
        later.into_iter().filter(|(.., number)| *number > 0)
    }

    /// Rows of the blocks' conditional weights: for each class, then for each augmentation.
    pub fn nr_conditions(&self) -> usize {
        self.nr_classes + self.augmentation.count()
    }

    /// Channels of the network's output: per component one weight, a mean and a log-scale for each
    /// channel, and with three channels three coefficients (paper, equation 3); or a logit for each code; or
    /// the features that samples are made of.
    pub fn output_channels(&self) -> usize {
        match self.nr_codes {
            _ if self.energy_distance => FEATURES,
            0 => Mixture::of(self).logits_per_pixel(),
            codes => codes,
        }
    }

    /// Which of a pixel's outputs are needed for some channels and for none before them.
    pub fn outputs_of(&self, channels: Range<usize>) -> Range<usize> {
        match self.nr_codes {
            0 if !self.energy_distance => Mixture::of(self).logits_of(channels),
            _ => 0..self.output_channels(),
        }
    }

    /// Whether there is attention anywhere.
    pub fn attends(&self) -> bool {
        !has_none(&self.attention)
    }

    /// Channels of a pixel that are predicted together: all of them, or one after another.
    pub fn channels_together(&self) -> usize {
        match self.nr_channel_resnet {
            0 => self.channels,
            _ => 1,
        }
    }

    /// The model with other images' height and width: no parameter depends on them.
    pub fn resized(&self, [height, width]: [usize; 2]) -> ModelConfig {
        ModelConfig {
            height,
            width,
            ..self.clone()
        }
    }

    /// Rows and columns of a map at the image's resolution divided by 2 to the `scale` (paper, section 2.3),
    /// rounded up: of a last row or column that has no other, the coarser map has one still.
    pub fn size_at(&self, scale: usize) -> [usize; 2] {
        [self.height, self.width].map(|side| halved(side, scale))
    }

    /// Values in one image: levels or codes.
    pub fn dims(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Maps of codes that are given of each image: none of levels; its own; or that and a coarser one.
    pub fn nr_code_maps(&self) -> usize {
        match self.nr_codes {
            0 => 0,
            _ => 1 + usize::from(self.nr_coarse_codes > 0),
        }
    }

    /// Bytes in which a pixel is given: a level for each channel; or its code as u16, little-endian, and
    /// behind it the code of the coarser map that lies there.
    pub fn bytes_per_pixel(&self) -> usize {
        match self.nr_codes {
            0 => self.channels,
            _ => 2 * self.nr_code_maps(),
        }
    }

    /// Bytes in which an image is given, pixel by pixel.
    pub fn bytes_per_image(&self) -> usize {
        self.height * self.width * self.bytes_per_pixel()
    }

    /// Which of a pixel's bytes say what some of its channels are; of codes, what its own code is.
    pub fn bytes_of(&self, channels: Range<usize>) -> Range<usize> {
        match self.nr_codes {
            0 => channels,
            _ => 0..2,
        }
    }

    /// A code of the bytes of a pixel: its own (0), or that of the coarser map (1).
    pub fn code(pixel: &[u8], map: usize) -> usize {
        usize::from(u16::from_le_bytes([pixel[2 * map], pixel[2 * map + 1]]))
    }

    /// What [`Self::bits_per_dim`] gives: bits/dim; of codes, which are one for each pixel, bits/code; or an
    /// energy, by the same formula as the original prints it.
    pub fn unit(&self) -> &'static str {
        match self.nr_codes {
            _ if self.energy_distance => "energy",
            0 => "bits/dim",
            _ => "bits/code",
        }
    }

    /// Nats of one image turned into bits per dimension.
    pub fn bits_per_dim(&self, nats_per_image: f64) -> f64 {
        nats_per_image / (std::f64::consts::LN_2 * self.dims() as f64)
    }
}
