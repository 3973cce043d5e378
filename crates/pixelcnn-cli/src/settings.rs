//! Flags for the settings of a run, and for its data.

use std::path::PathBuf;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Command};
use pixelcnn::data::{DataConfig, Split};
use pixelcnn::train::config::{CooldownShape, Optimizer, PolyakStart, RunConfig, TrainConfig};
use pixelcnn::train::settings::{PRESETS, Settings};
use pixelcnn::{Augmentation, Nonlinearity};
use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, IntoDeserializer};

use crate::terminal::Result;

/// The name of a preset; a preset's first line says what it is for.
pub fn preset_name() -> PossibleValuesParser {
    let about = |text: &'static str| text.lines().next().unwrap_or_default();
    PossibleValuesParser::new(
        PRESETS.map(|(name, text)| {
            PossibleValue::new(name).help(about(text).trim_start_matches("# "))
        }),
    )
}

/// Which images.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub struct DataFlags {
    /// The images: cifar10, imagenet32, imagenet64, or the path of a folder or .tar of pictures (PNG,
    /// JPEG, WebP, GIF, BMP, TIFF, PNM, QOI; folders named train and test, in any case, are splits,
    /// others classes), or of a .npy or .npz file
    #[arg(long, value_name = "NAME|PATH")]
    data: Option<String>,
    /// Folder in which cifar10, imagenet32 or imagenet64 lies [default: the user's cache, into
    /// which cifar10 is fetched]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Cut the largest centred square out of each picture and resize it to this side [default: pictures
    /// as they are]
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Fraction of the images kept for testing where the data come without a test split [default:
    /// 0.1]
    #[arg(long, value_name = "FRACTION")]
    held_out: Option<f64>,
    /// Leave damaged pictures out instead of refusing all; each is decoded once to find out
    #[arg(long)]
    skip_damaged: bool,
}

impl DataFlags {
    /// Whether they say which data.
    pub fn name_data(&self) -> bool {
        self.data.is_some()
    }

    /// Whether they say what fraction is held out.
    pub fn hold_out(&self) -> bool {
        self.held_out.is_some()
    }

    /// Overrides a configuration. Paths become absolute: the run can be resumed from anywhere.
    pub fn apply(&self, data: &mut DataConfig) {
        set(&mut data.data, &self.data);
        if self.data_dir.is_some() {
            data.data_dir.clone_from(&self.data_dir);
        }
        if self.size.is_some() {
            data.size = self.size;
        }
        set(&mut data.held_out, &self.held_out);
        data.skip_damaged |= self.skip_damaged;
        data.make_absolute();
    }
}

/// Every setting of a run but its data, as a flag.
#[derive(Debug, Args)]
pub struct Flags {
    /// Train on squares of this side, cut out of the pictures at random places, and measure whole
    /// pictures; those may be of any sizes [default: whole pictures, all of one size]
    #[arg(long, value_name = "PIXELS", help_heading = "Data")]
    crop: Option<usize>,
    /// Gated resnet blocks in each stack at each of the three resolutions
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_resnet: Option<usize>,
    /// Channels of every feature map; time and parameters grow with its square
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_filters: Option<usize>,
    /// Components of the mixture of logistics that each pixel is drawn from
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_logistic_mix: Option<usize>,
    /// Nonlinearity of the gated resnet blocks
    #[arg(
        long,
        value_name = "NAME",
        help_heading = "Model",
        alias = "resnet-nonlinearity"
    )]
    #[arg(value_parser = nonlinearity())]
    nonlinearity: Option<Nonlinearity>,
    /// Tell the model each image's class, so that it can be sampled by class
    #[arg(long, value_name = "BOOL", help_heading = "Model")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    class_conditional: Option<bool>,
    /// 1x1 gated resnet blocks that predict each channel of a pixel from the features and the
    /// channels before it; 0 to predict them together, as the original does
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_channel_resnet: Option<usize>,
    /// Transform training images at random and tell the model how: mirror half of them, or turn and
    /// mirror them in all eight ways; images are drawn and measured as they are
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    #[arg(value_parser = named::<Augmentation>(["none", "flips", "symmetries"]))]
    augmentation: Option<Augmentation>,
    /// Heads of causal self-attention at full, half and quarter resolution, such as 0,4,4; 0 for none
    #[arg(long, value_name = "N,N,N", help_heading = "Model", value_parser = heads)]
    attention: Option<[usize; 3]>,
    /// Train by the energy distance between samples and images in place of the likelihood, as the original
    /// does with its flag of this name, on CPUs: the model draws samples, and has no likelihood
    #[arg(long, value_name = "BOOL", help_heading = "Model")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    energy_distance: Option<bool>,

    /// The data are maps of so many codes, such as a VQ-VAE's, in a .npy or .npz file (codes_train and
    /// codes_test, or codes: whole numbers [N, H, W]); 0 for images
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_codes: Option<usize>,
    /// Codes of the coarser maps (coarse_train and coarse_test, or coarse, in the same .npz) that the model
    /// is given of each map of codes; 0 for none
    #[arg(long, value_name = "N", help_heading = "Model")]
    nr_coarse_codes: Option<usize>,

    /// Images in a step
    #[arg(long, value_name = "N", help_heading = "Training")]
    batch_size: Option<usize>,
    /// Shards of a batch, a power of two: so many ranks, half as many or a quarter can share it, with the
    /// same bits [default: 1 on a GPU, on CPUs as many up to 8 as cost no time; at least the ranks]
    #[arg(long, value_name = "N", help_heading = "Training")]
    shards: Option<usize>,
    /// Images from which the scale of every layer is initialised
    #[arg(long, value_name = "N", help_heading = "Training")]
    init_batch_size: Option<usize>,
    /// How the parameters move: all by Adam, as in the original, or the weights between feature maps by
    /// Muon and the rest by Adam
    #[arg(long, value_name = "NAME", help_heading = "Training")]
    #[arg(value_parser = named::<Optimizer>(["adam", "muon"]))]
    optimizer: Option<Optimizer>,
    /// Learning rate of the first step; with --resume, of the next one; both before warm-up and
    /// cool-down
    #[arg(
        long,
        value_name = "RATE",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    learning_rate: Option<f64>,
    /// Factor on the learning rate at every step
    #[arg(
        long,
        value_name = "FACTOR",
        help_heading = "Training",
        alias = "lr-decay"
    )]
    #[arg(allow_negative_numbers = true)]
    learning_rate_decay: Option<f64>,
    /// Steps in which the learning rate first rises, from nothing
    #[arg(long, value_name = "N", help_heading = "Training")]
    warmup_steps: Option<u64>,
    /// Share of the run, at its end, in which the learning rate falls to nothing
    #[arg(
        long,
        value_name = "SHARE",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    cooldown: Option<f64>,
    /// How it falls there: by the share of the cool-down that is gone, or by that share's root
    #[arg(long, value_name = "SHAPE", help_heading = "Training")]
    #[arg(value_parser = named::<CooldownShape>(["linear", "1-sqrt"]))]
    cooldown_shape: Option<CooldownShape>,
    /// Share of the features that dropout drops, from 0 up to 1
    #[arg(
        long,
        value_name = "SHARE",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    dropout: Option<f32>,
    /// Passes over the training images after which to stop
    #[arg(
        long,
        value_name = "N",
        help_heading = "Training",
        alias = "max-epochs"
    )]
    epochs: Option<u64>,
    /// Steps after which to stop even within an epoch; 0 for no such limit
    #[arg(long, value_name = "N", help_heading = "Training")]
    steps: Option<u64>,
    /// Hours of training instead of epochs or steps, evaluations not counted; 0 for none
    #[arg(long, value_name = "HOURS", help_heading = "Training")]
    #[arg(allow_negative_numbers = true, conflicts_with_all = ["epochs", "steps"])]
    hours: Option<f64>,
    /// Decay of the Polyak average of the parameters, which evaluation and sampling use
    #[arg(
        long,
        value_name = "DECAY",
        help_heading = "Training",
        allow_negative_numbers = true
    )]
    polyak_decay: Option<f64>,
    /// Where that average starts: from the parameters after data-dependent initialisation; as the
    /// original does, from the drawn ones before it; or growing, over no more than the last tenth
    /// of the run so far
    #[arg(long, value_name = "WHERE", help_heading = "Training")]
    #[arg(value_parser = named::<PolyakStart>(["initialised", "drawn", "growing"]))]
    polyak_start: Option<PolyakStart>,
    /// Seed of all random numbers: the same seed gives the same run
    #[arg(long, value_name = "N", help_heading = "Training")]
    seed: Option<u64>,

    /// Epochs between two evaluations on the test set
    #[arg(long, value_name = "EPOCHS", help_heading = "Saving and measuring")]
    eval_interval: Option<u64>,
    /// Epochs between two grids of samples
    #[arg(long, value_name = "EPOCHS", help_heading = "Saving and measuring")]
    save_interval: Option<u64>,
    /// Minutes between two checkpoints within an epoch; every epoch ends with one
    #[arg(long, value_name = "MINUTES", help_heading = "Saving and measuring")]
    #[arg(allow_negative_numbers = true)]
    checkpoint_minutes: Option<f64>,
    /// Images in a grid of samples; 0 for none
    #[arg(
        long,
        value_name = "N",
        help_heading = "Saving and measuring",
        alias = "num-samples"
    )]
    samples: Option<usize>,
}

/// The name of a nonlinearity.
pub fn nonlinearity() -> impl TypedValueParser<Value = Nonlinearity> {
    named(["concat_elu", "elu", "relu"])
}

/// A setting by the name that each of its values has in files.
fn named<T>(names: impl IntoIterator<Item = &'static str>) -> impl TypedValueParser<Value = T>
where
    T: DeserializeOwned + Clone + Send + Sync + 'static,
{
    let parse = |name: String| -> std::result::Result<T, ValueError> {
        T::deserialize(name.into_deserializer())
    };
    PossibleValuesParser::new(names).try_map(parse)
}

impl Flags {
    /// Overrides the settings of a new run.
    pub fn apply(&self, settings: &mut Settings) {
        let model = &mut settings.model;
        set(&mut model.nr_resnet, &self.nr_resnet);
        set(&mut model.nr_filters, &self.nr_filters);
        set(&mut model.nr_logistic_mix, &self.nr_logistic_mix);
        set(&mut model.nonlinearity, &self.nonlinearity);
        set(&mut model.nr_channel_resnet, &self.nr_channel_resnet);
        set(&mut model.augmentation, &self.augmentation);
        set(&mut model.attention, &self.attention);
        set(&mut model.energy_distance, &self.energy_distance);
        set(&mut model.nr_codes, &self.nr_codes);
        set(&mut model.nr_coarse_codes, &self.nr_coarse_codes);
        if let Some(conditional) = self.class_conditional {
            model.class_conditional = conditional;
            model.nr_classes = None;
        }
        self.apply_training(&mut settings.train);
        self.apply_crop(&mut settings.data);
    }

    fn apply_crop(&self, data: &mut DataConfig) {
        data.crop = self.crop.or(data.crop);
    }

    fn apply_training(&self, train: &mut TrainConfig) {
        set(&mut train.batch_size, &self.batch_size);
        train.shards = self.shards.or(train.shards);
        set(&mut train.init_batch_size, &self.init_batch_size);
        set(&mut train.optimizer, &self.optimizer);
        set(&mut train.learning_rate, &self.learning_rate);
        set(&mut train.learning_rate_decay, &self.learning_rate_decay);
        set(&mut train.warmup_steps, &self.warmup_steps);
        set(&mut train.cooldown, &self.cooldown);
        set(&mut train.cooldown_shape, &self.cooldown_shape);
        set(&mut train.dropout, &self.dropout);
        set(&mut train.epochs, &self.epochs);
        set(&mut train.steps, &self.steps);
        if self.epochs.is_some() || self.steps.is_some() {
            train.hours = 0.0;
        }
        set(&mut train.hours, &self.hours);
        set(&mut train.polyak_decay, &self.polyak_decay);
        set(&mut train.polyak_start, &self.polyak_start);
        set(&mut train.seed, &self.seed);
        set(&mut train.eval_interval, &self.eval_interval);
        set(&mut train.save_interval, &self.save_interval);
        set(&mut train.checkpoint_minutes, &self.checkpoint_minutes);
        set(&mut train.samples, &self.samples);
    }

    /// The learning rate that a run is to go on with.
    pub fn learning_rate(&self) -> Option<f64> {
        self.learning_rate
    }

    /// Checks that a run was begun as the flag for classes says.
    pub fn expect_classes(&self, begun: &RunConfig) -> Result {
        let conditional = begun.model.nr_classes > 0;
        match self.class_conditional {
            Some(asked) if asked != conditional => Err(format!(
                "--class-conditional: the run was begun with {conditional}, which --resume cannot change: \
                 leave --class-conditional out or begin a new run"
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// Overrides the configuration of a run, whatever its state depends on.
    pub fn change(&self, data: &DataFlags, config: &mut RunConfig) {
        let model = &mut config.model;
        set(&mut model.nr_resnet, &self.nr_resnet);
        set(&mut model.nr_filters, &self.nr_filters);
        set(&mut model.nr_logistic_mix, &self.nr_logistic_mix);
        set(&mut model.nonlinearity, &self.nonlinearity);
        set(&mut model.nr_channel_resnet, &self.nr_channel_resnet);
        set(&mut model.augmentation, &self.augmentation);
        set(&mut model.attention, &self.attention);
        set(&mut model.energy_distance, &self.energy_distance);
        set(&mut model.nr_codes, &self.nr_codes);
        set(&mut model.nr_coarse_codes, &self.nr_coarse_codes);
        self.apply_training(&mut config.train);
        self.apply_crop(&mut config.data);
        data.apply(&mut config.data);
    }
}

/// Heads at each resolution.
fn heads(text: &str) -> std::result::Result<[usize; 3], String> {
    let heads: Option<Vec<usize>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
    let heads = heads.and_then(|heads| heads.try_into().ok());
    heads.ok_or_else(|| "three numbers, such as 0,4,4".into())
}

/// Overrides a value where a flag is given.
pub fn set<T: Clone>(value: &mut T, flag: &Option<T>) {
    if let Some(flag) = flag {
        value.clone_from(flag);
    }
}

/// A value of a preset as its flag takes it.
fn as_flag(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Array(values) => values.iter().map(as_flag).collect::<Vec<_>>().join(","),
        value => value.to_string(),
    }
}

/// Adds to the help of every setting what it is in each preset.
pub fn with_presets_in_help(command: Command) -> Command {
    let presets = PRESETS.map(|(name, text)| (name, text.parse().unwrap_or_default()));
    command.mut_subcommand("train", |train| {
        train.mut_args(|arg| {
            let of = |preset: &toml::Table| {
                let sections = preset.values().filter_map(|section| section.as_table());
                let mut values = sections.filter_map(|values| values.get(arg.get_id().as_str()));
                let value = values.next()?;
                Some(as_flag(value))
            };
            let values: Vec<String> = presets
                .iter()
                .filter_map(|(name, preset)| Some(format!("{name} {}", of(preset)?)))
                .collect();
            match arg.get_help() {
                Some(help) if !values.is_empty() => {
                    let help = format!("{help} [{}]", values.join(", "));
                    arg.help(help)
                }
                _ => arg,
            }
        })
    })
}

/// The name of a split.
pub fn split() -> impl TypedValueParser<Value = Split> {
    PossibleValuesParser::new(["train", "test"]).map(|name| match name.as_str() {
        "train" => Split::Train,
        _ => Split::Test,
    })
}
