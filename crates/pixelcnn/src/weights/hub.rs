//! The layout of model hubs: a folder with `model.safetensors`, `config.json` and the model card
//! `README.md`. The tensors are one set of weights under the original's names, in single or half
//! precision. Among the metadata are the model and the card, with which the file can stand alone
//! ([`read`]), and a checksum, which is checked where a file has it.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::Path;

use half::f16;
use pixelcnn_core::network::Layout;
use pixelcnn_core::{ModelConfig, Nonlinearity};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::safetensors::{
    Described, FileError, Precision, open_weights, parse_weights, read_weights, weights_bytes,
    write_weights,
};
use super::{Fault, Imported, Unsaid, WeightsError, original, write};
use crate::model::Model;

/// What `model_type` is in `config.json`.
const MODEL_TYPE: &str = "pixelcnn++";

/// The longest `config.json` that is read.
const MAX_CONFIG: u64 = 1 << 16;

/// How good a set of weights is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean over the images.
    pub bits_per_dim: f64,
    /// Of that mean, where it is known.
    pub standard_error: Option<f64>,
    /// The images.
    pub images: String,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4}", self.bits_per_dim)?;
        if let Some(error) = self.standard_error {
            write!(f, " ± {error:.4}")?;
        }
        write!(f, " on {}", self.images)
    }
}

/// The weights that a training began with in place of drawn ones, and what had gone into them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// The name of their model.
    pub name: String,
    /// Images that they had been trained on, those of their own origin among them.
    pub images_seen: u64,
    /// Seconds of training, likewise.
    pub seconds: f64,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.seconds / 3600.0;
        let Origin {
            name, images_seen, ..
        } = self;
        write!(f, "{name}, after {images_seen} images and {hours:.1} hours")
    }
}

/// What a model card says of a set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// The model's name.
    pub name: String,
    /// Whether they are the Polyak average or the parameters as trained last.
    pub averaged: bool,
    /// How exactly they are stored.
    pub precision: Precision,
    /// Optimizer steps taken.
    pub step: u64,
    /// Images trained on, repeated ones counted again.
    pub images_seen: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// The weights that its training began with, whose images and seconds are not counted above; none where they
    /// were drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The data that its run is for.
    pub data: String,
    /// The names of its classes; none where it is unconditional or they have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// How good it is.
    pub measured: Option<Measured>,
}

/// Writes weights, their configuration and their card to a folder.
///
/// # Errors
/// [`WeightsError::Write`], [`WeightsError::Safetensors`] where `parameters` are not the model's, or
/// [`WeightsError::BeyondHalf`].
pub fn export(
    folder: &Path,
    config: &ModelConfig,
    parameters: &[Vec<f32>],
    card: &Card,
) -> Result<(), WeightsError> {
    if card.precision == Precision::Half {
        rounded_to_half(config, parameters)?;
    }
    fs::create_dir_all(folder).map_err(WeightsError::write(folder))?;
    write_weights(
        &folder.join("model.safetensors"),
        config,
        parameters,
        card.precision,
        json!(card).to_string(),
    )?;
    let mut json = json!(config);
    json["model_type"] = MODEL_TYPE.into();
    write(folder, "config.json", |w| writeln!(w, "{json:#}"))?;
    write(folder, "README.md", |w| {
        w.write_all(card.text(config).as_bytes())
    })
}

/// The bytes of such a `model.safetensors`; `name` stands for it in errors.
///
/// # Errors
/// [`FileError::Mismatch`] where the weights are not the model's.
pub(crate) fn bytes(model: &Model, precision: Precision, name: &str) -> Result<Vec<u8>, FileError> {
    let card = json!(model.card).to_string();
    weights_bytes(name, &model.config, &model.weights, precision, card)
}

/// The parameters that are read again from a file in half precision.
///
/// # Errors
/// [`WeightsError::BeyondHalf`] where one would become infinite, or is not a number.
pub fn rounded_to_half(
    config: &ModelConfig,
    parameters: &[Vec<f32>],
) -> Result<Vec<Vec<f32>>, WeightsError> {
    let layout = Layout::new(config);
    let named = layout.parameters.iter().zip(parameters);
    named
        .map(|(parameter, values)| {
            let round = |&value: &f32| match f16::from_f32(value) {
                half if half.is_finite() => Ok(half.to_f32()),
                _ => Err(WeightsError::BeyondHalf {
                    tensor: parameter.name.clone(),
                    value,
                }),
            };
            values.iter().map(round).collect()
        })
        .collect()
}

/// Reads a `model.safetensors` of [`export`]; nothing beside it is needed.
///
/// # Errors
/// Every [`FileError`] that concerns one file.
pub fn read(path: &Path) -> Result<Model, FileError> {
    model(open_weights(path)?, path)
}

/// Parses such a file in memory; `name` stands for it in errors.
///
/// # Errors
/// Every [`FileError`] that concerns one file.
pub fn parse(file: &[u8], name: &str) -> Result<Model, FileError> {
    model(parse_weights(file, name)?, Path::new(name))
}

fn model((config, weights, card): Described, path: &Path) -> Result<Model, FileError> {
    let mut card: Card = serde_json::from_str(&card).map_err(|_| FileError::NotACheckpoint {
        path: path.into(),
        reason: "its metadata lack a valid `description`".into(),
    })?;
    card.class_names = class_names(card.class_names, &config);
    Ok(Model {
        config,
        weights,
        card,
    })
}

impl Card {
    /// That of the weights stored so.
    pub fn in_precision(mut self, precision: Precision) -> Card {
        if let (Precision::Single, Precision::Half, Some(measured)) =
            (self.precision, precision, &mut self.measured)
        {
            measured.images += ", before they were rounded";
        }
        self.precision = precision;
        self
    }

    /// What a training has that begins with these weights.
    pub fn as_origin(&self) -> Origin {
        let before = self.origin.as_ref();
        let images_before = before.map_or(0, |origin| origin.images_seen);
        Origin {
            name: self.name.clone(),
            images_seen: self.images_seen.saturating_add(images_before),
            seconds: self.seconds + before.map_or(0.0, |origin| origin.seconds),
        }
    }

    /// Which weights they are, and how exactly they are stored.
    pub fn weights(&self) -> String {
        let weights = match self.averaged {
            true => "Polyak average of the parameters",
            false => "parameters as trained last",
        };
        let precision = match self.precision {
            Precision::Single => "",
            Precision::Half => ", in half precision",
        };
        format!("{weights}{precision}")
    }

    /// The card in Markdown, with the metadata that hubs read.
    pub fn text(&self, config: &ModelConfig) -> String {
        let ModelConfig {
            height,
            width,
            channels,
            nr_resnet,
            nr_filters,
            nr_logistic_mix,
            nr_classes,
            ..
        } = config;
        let nonlinearity = match config.nonlinearity {
            Nonlinearity::ConcatElu => "concat_elu",
            Nonlinearity::Elu => "elu",
            Nonlinearity::Relu => "relu",
        };
        let classes = match nr_classes {
            0 => "none: unconditional".into(),
            n if self.class_names.is_empty() => n.to_string(),
            n => format!("{n}: {}", in_a_cell(&self.class_names.join(", "))),
        };
        let origin = match &self.origin {
            Some(origin) => format!("| begun with | {} |\n", in_a_cell(&origin.to_string())),
            None => String::new(),
        };
        let data = match self.data.as_str() {
            "cifar10" | "imagenet32" | "imagenet64" => "",
            _ => " --data DATA",
        };
        let beyond = config.later_settings();
        let beyond: String = beyond
            .map(|(name, value, _)| format!("| {name} | {value} |\n"))
            .collect();
        let measured = match &self.measured {
            None => "not measured".into(),
            Some(measured) => measured.to_string(),
        };
        let (tag, trained) = match config.energy_distance {
            false => (", likelihood", "with an exact likelihood"),
            true => ("", "trained by the energy distance, without a likelihood"),
        };
        let (kind, what) = match config.nr_codes {
            0 => (
                "images",
                format!("images | {width}x{height}, {channels} channels, 8 bits"),
            ),
            codes => (
                "maps of codes",
                format!("maps | {width}x{height} of {codes} codes"),
            ),
        };
        let unit = config.unit();
        // Others have no mixture.
        let (shape, values) = match unit {
            "bits/dim" => (", mixture components", format!(", {nr_logistic_mix}")),
            _ => ("", String::new()),
        };
        format!(
            "\
---
library_name: pixelcnn
pipeline_tag: unconditional-image-generation
tags: [pixelcnn, pixelcnn++, image-generation{tag}]
---
# {name}

A PixelCNN++ (Salimans, Karpathy, Chen, Kingma, Bulatov, [2017](https://arxiv.org/abs/1701.05517)):
a model of {kind} {trained}.

| | |
|---|---|
| {unit} | {measured} |
| {what} |
| data | {name_of_data} |
| steps, images seen, hours of training | {step}, {images_seen}, {hours:.1} |
{origin}\
| weights | {weights} |
| parameters | {parameters} |
| blocks, filters{shape} | {nr_resnet}, {nr_filters}{values} |
| nonlinearity | {nonlinearity} |
| classes | {classes} |
{beyond}
`model.safetensors` has the weights under the names and in the layouts of the original code,
`config.json` the model's shape. With [pixelcnn](https://crates.io/crates/pixelcnn):

```sh
pixelcnn sample model.safetensors
pixelcnn eval model.safetensors{data}
pixelcnn import model.safetensors -o run{data}    # to train it on
```
",
            name = self.name,
            name_of_data = self.data,
            weights = self.weights(),
            step = self.step,
            images_seen = self.images_seen,
            hours = self.seconds / 3600.0,
            parameters = Layout::new(config).size(),
        )
    }
}

/// The names of a model's classes; none where they are not as many, or can't be shown in a line.
pub(crate) fn class_names(names: Vec<String>, config: &ModelConfig) -> Vec<String> {
    let shows = |name: &String| !name.contains(|c: char| c.is_control());
    match names.len() == config.nr_classes && names.iter().all(shows) {
        true => names,
        false => Vec::new(),
    }
}

/// Text in Markdown, in a cell of a table.
fn in_a_cell(text: &str) -> String {
    let mut cell = String::new();
    for c in text.chars() {
        if r"\|<>[]*`&".contains(c) {
            cell.push('\\');
        }
        cell.push(if c.is_control() { ' ' } else { c });
    }
    cell
}

/// Reads weights and the `config.json` beside them, or where there is none what a file of [`export`]
/// says itself. Training on begins with the optimizer's step 0.
///
/// # Errors
/// [`WeightsError`] where one of the files can't be used, or they don't fit each other or `unsaid`.
pub fn import(path: &Path, unsaid: &Unsaid) -> Result<Imported, WeightsError> {
    let beside = path.with_file_name("config.json");
    let is_described = beside.exists();
    let own = match read(path) {
        // Someone else's: its config.json says all, or is missing.
        Err(FileError::NotACheckpoint { .. }) => None,
        Err(_) if is_described => None,
        own => Some(own?),
    };
    let config = match &own {
        Some(own) if !is_described => own.config.clone(),
        _ => read_config(&beside).map_err(WeightsError::file(&beside))?,
    };
    let (parameters, card) = match own {
        Some(own) if own.config == config => (own.weights, Some(own.card)),
        _ => (read_weights(path, &config)?, None),
    };
    expect(&config, unsaid).map_err(WeightsError::file(&beside))?;
    Ok(Imported {
        origin: card.as_ref().map(Card::as_origin),
        class_names: card.map_or(Vec::new(), |card| card.class_names),
        ..original::assemble(config, parameters, None, None)
    })
}

fn read_config(path: &Path) -> Result<ModelConfig, Fault> {
    let not_ours = |reason: String| Fault::Refused(format!("it is no PixelCNN++'s: {reason}"));
    let mut text = String::new();
    let file = fs::File::open(path)?;
    file.take(MAX_CONFIG)
        .read_to_string(&mut text)
        .map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => not_ours("it is no text".into()),
            _ => error.into(),
        })?;
    let mut json: Value =
        serde_json::from_str(&text).map_err(|error| not_ours(error.to_string()))?;
    let kind = json
        .as_object_mut()
        .and_then(|json| json.remove("model_type"));
    if kind.as_ref().and_then(Value::as_str) != Some(MODEL_TYPE) {
        return Err(not_ours(format!("its model_type is not {MODEL_TYPE:?}")));
    }
    let config: ModelConfig = serde_json::from_value(json)
        .map_err(|error| not_ours(error.to_string().escape_debug().to_string()))?;
    config.validate()?;
    Ok(config)
}

/// Checks that a model is what it was said to be.
fn expect(config: &ModelConfig, unsaid: &Unsaid) -> Result<(), Fault> {
    let size = [config.height, config.width];
    if let Some(said) = unsaid.size
        && said != size
    {
        let text = |[height, width]: [usize; 2]| format!("{width}x{height}");
        return Err(Fault::Contradiction {
            field: "image size",
            said: text(said),
            found: text(size),
        });
    }
    if let Some(said) = unsaid.nonlinearity
        && said != config.nonlinearity
    {
        return Err(Fault::Contradiction {
            field: "nonlinearity",
            said: format!("{said:?}"),
            found: format!("{:?}", config.nonlinearity),
        });
    }
    Ok(())
}
