//! What a new run is made of: a preset or a config file, each setting of which can be overridden.

use std::path::Path;

use pixelcnn_core::{Augmentation, ModelConfig, Nonlinearity};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::config::{RunConfig, RunConfigError, TrainConfig, place};
use crate::data::{DataConfig, DataError, Dataset};
use crate::one_line;

/// Name and text of every preset; each gives all values.
pub const PRESETS: [(&str, &str); 4] = [
    ("quick", include_str!("../../presets/quick.toml")),
    ("small", include_str!("../../presets/small.toml")),
    ("cifar10", include_str!("../../presets/cifar10.toml")),
    (
        "cifar10-best",
        include_str!("../../presets/cifar10-best.toml"),
    ),
];

/// Settings that no run can be made of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// A name that no preset has.
    #[error("no preset {0}: choose {names}", names = PRESETS.map(|(name, _)| name).join(", "))]
    Preset(String),
    /// A name that no setting has.
    #[error("no setting {name}: there are {}", names.join(", "))]
    Name {
        /// The name.
        name: String,
        /// Those that there are.
        names: Vec<String>,
    },
    /// A value that a setting can't have.
    #[error("{name}: {reason}")]
    Value {
        /// The setting.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that can't be read, or a value that is out of range.
    #[error(transparent)]
    Config(#[from] RunConfigError),
    /// The images are of many sizes.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A model that is to know classes, of images that have none.
    #[error(
        "{data}{}: a class-conditional model needs labels: sort the images into a folder per class, or \
         train one without classes",
        why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default()
    )]
    NoLabels {
        /// The images.
        data: String,
        /// Why they have none.
        why: Option<String>,
    },
    /// More codes than the model is to know.
    #[error("{data}: there are {what} up to {}: {setting} must be {found} or more", found - 1)]
    FewCodes {
        /// The maps.
        data: String,
        /// Which codes.
        what: &'static str,
        /// The setting that says how many there are.
        setting: &'static str,
        /// How many there are at least.
        found: usize,
    },
    /// Settings that are for other images.
    #[error(
        "{data}: the config file asks for another {setting}: remove it there, or take the data that it \
         is for"
    )]
    OtherImages {
        /// The images.
        data: String,
        /// What they have otherwise.
        setting: &'static str,
    },
}

/// A preset or a config file. What it leaves out has the original's value.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The network.
    pub model: ModelSettings,
    /// The images.
    pub data: DataConfig,
    /// The training.
    pub train: TrainConfig,
}

/// A model for whatever images the data have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSettings {
    /// See [`ModelConfig::nr_resnet`], and so on.
    pub nr_resnet: usize,
    /// Channels of every feature map.
    pub nr_filters: usize,
    /// Components of the mixture of logistics.
    pub nr_logistic_mix: usize,
    /// Of the gated resnet blocks.
    pub nonlinearity: Nonlinearity,
    /// Whether the model is told each image's class.
    pub class_conditional: bool,
    /// Blocks that predict each channel from the ones before it.
    pub nr_channel_resnet: usize,
    /// Transformations of training images that the model is told.
    pub augmentation: Augmentation,
    /// Heads of causal self-attention at full, half and quarter resolution.
    pub attention: [usize; 3],
    /// Whether samples are trained by the energy distance.
    pub energy_distance: bool,
    /// How many codes the data are maps of; 0 for images.
    pub nr_codes: usize,
    /// Codes of the coarser maps that are given.
    pub nr_coarse_codes: usize,
    /// The `config.toml` of a run can be given too. It has this and those below, and the data must have the
    /// same.
    pub height: Option<usize>,
    /// Of the images.
    pub width: Option<usize>,
    /// Of the images.
    pub channels: Option<usize>,
    /// Of the images, where the model knows them.
    pub nr_classes: Option<usize>,
}

impl Default for ModelSettings {
    /// The original's.
    fn default() -> Self {
        ModelSettings::of(&ModelConfig::default())
    }
}

impl Settings {
    /// The preset of a name.
    ///
    /// # Errors
    /// [`SettingsError::Preset`].
    pub fn preset(name: &str) -> Result<Settings, SettingsError> {
        let preset = PRESETS.iter().find(|(preset, _)| *preset == name);
        let (_, text) = preset.ok_or_else(|| SettingsError::Preset(name.into()))?;
        Settings::parse(Path::new(name), text)
    }

    /// A config file.
    ///
    /// # Errors
    /// Where it can't be read, or is none.
    pub fn read(path: &Path) -> Result<Settings, SettingsError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Settings::parse(path, &text),
            Err(source) => Err(RunConfigError::Read {
                path: path.into(),
                source,
            }
            .into()),
        }
    }

    fn parse(path: &Path, text: &str) -> Result<Settings, SettingsError> {
        toml::from_str(text).map_err(|error| {
            let reason = format!("{}: correct or remove it", place(text, &error));
            let path = path.into();
            RunConfigError::Syntax { path, reason }.into()
        })
    }

    /// Overrides the setting of a name.
    ///
    /// # Errors
    /// [`SettingsError::Name`] or [`SettingsError::Value`].
    pub fn set(&mut self, name: &str, value: impl Serialize) -> Result<(), SettingsError> {
        *self = with(self, name, value)?;
        Ok(())
    }

    /// The model for images of these height, width, channels and number of classes.
    pub fn model(&self, images: [usize; 4]) -> ModelConfig {
        let [height, width, channels, nr_classes] = images;
        let model = &self.model;
        ModelConfig {
            height,
            width,
            channels,
            nr_resnet: model.nr_resnet,
            nr_filters: model.nr_filters,
            nr_logistic_mix: model.nr_logistic_mix,
            nonlinearity: model.nonlinearity,
            nr_classes: if model.conditional() { nr_classes } else { 0 },
            nr_channel_resnet: model.nr_channel_resnet,
            augmentation: model.augmentation,
            attention: model.attention,
            nr_codes: model.nr_codes,
            nr_coarse_codes: model.nr_coarse_codes,
            energy_distance: model.energy_distance,
        }
    }

    /// Checks all that does not hang on the data, before those are fetched for nothing.
    ///
    /// # Errors
    /// The first setting that is out of range.
    pub fn validate(&self) -> Result<(), SettingsError> {
        let channels = if self.model.nr_codes > 0 { 1 } else { 3 };
        let model = self.model([4, 4, channels, 1]).validate();
        model.map_err(RunConfigError::from)?;
        Ok(self.train.validate().map_err(RunConfigError::from)?)
    }

    /// The run on the data that it is to learn.
    ///
    /// # Errors
    /// Where the settings are not for such data.
    pub fn run(self, data: &Dataset) -> Result<RunConfig, SettingsError> {
        let [height, width] = data.one_size()?;
        let images = [height, width, data.channels(), data.nr_classes()];
        let model = self.model(images);
        if self.model.conditional() && data.nr_classes() == 0 {
            return Err(SettingsError::NoLabels {
                data: data.describe(),
                why: data.no_labels().map(str::to_owned),
            });
        }
        let [own, coarse] = data.codes().unwrap_or_default();
        for (what, setting, asked, found) in [
            ("codes", "nr_codes", self.model.nr_codes, own),
            (
                "coarser maps",
                "nr_coarse_codes",
                self.model.nr_coarse_codes,
                coarse,
            ),
        ] {
            if found > asked {
                return Err(SettingsError::FewCodes {
                    data: data.describe(),
                    what,
                    setting,
                    found,
                });
            }
        }
        for (setting, asked, found) in [
            ("height", self.model.height, model.height),
            ("width", self.model.width, model.width),
            ("channels", self.model.channels, model.channels),
            ("nr_classes", self.model.nr_classes, model.nr_classes),
        ] {
            if asked.is_some_and(|asked| asked != found) {
                let data = data.describe();
                return Err(SettingsError::OtherImages { data, setting });
            }
        }
        let config = RunConfig {
            model,
            data: self.data,
            train: self.train,
        };
        config.validate()?;
        Ok(config)
    }
}

impl ModelSettings {
    /// Those of a model, whatever its images are.
    pub fn of(model: &ModelConfig) -> ModelSettings {
        ModelSettings {
            nr_resnet: model.nr_resnet,
            nr_filters: model.nr_filters,
            nr_logistic_mix: model.nr_logistic_mix,
            nonlinearity: model.nonlinearity,
            class_conditional: model.nr_classes > 0,
            nr_channel_resnet: model.nr_channel_resnet,
            augmentation: model.augmentation,
            attention: model.attention,
            energy_distance: model.energy_distance,
            nr_codes: model.nr_codes,
            nr_coarse_codes: model.nr_coarse_codes,
            height: None,
            width: None,
            channels: None,
            nr_classes: None,
        }
    }

    fn conditional(&self) -> bool {
        self.class_conditional || self.nr_classes.is_some_and(|n| n > 0)
    }
}

impl RunConfig {
    /// Overrides the setting of a name.
    ///
    /// # Errors
    /// [`SettingsError::Name`] or [`SettingsError::Value`].
    pub fn set(&mut self, name: &str, value: impl Serialize) -> Result<(), SettingsError> {
        *self = with(self, name, value)?;
        Ok(())
    }

    /// Whether a run that was begun so can go on with another value of a setting: its state doesn't depend on
    /// it.
    pub fn can_change(&self, name: &str) -> bool {
        const FREE: [&str; 15] = [
            "shards",
            "data_dir",
            "skip_damaged",
            "learning_rate",
            "learning_rate_decay",
            "warmup_steps",
            "cooldown",
            "cooldown_shape",
            "epochs",
            "steps",
            "hours",
            "eval_interval",
            "save_interval",
            "checkpoint_minutes",
            "samples",
        ];
        // Images can move.
        FREE.contains(&name) || name == "data" && self.data.is_gone()
    }
}

/// Settings in sections, with another value of the one that has a name.
fn with<T>(settings: &T, name: &str, value: impl Serialize) -> Result<T, SettingsError>
where
    T: Serialize + DeserializeOwned,
{
    let bad = |reason: &dyn std::fmt::Display| SettingsError::Value {
        name: name.into(),
        reason: one_line(reason),
    };
    let mut sections = toml::Table::try_from(settings).map_err(|error| bad(&error))?;
    let every = every();
    let section = every.iter().find(|(_, names)| names.contains_key(name));
    let Some((section, _)) = section else {
        let names = every.values().flat_map(toml::Table::keys);
        return Err(SettingsError::Name {
            name: name.into(),
            names: names.cloned().collect(),
        });
    };
    let value = toml::Value::try_from(value).map_err(|error| bad(&error))?;
    if let Some(toml::Value::Table(section)) = sections.get_mut(section) {
        section.insert(name.into(), value);
    }
    let whole = toml::Value::Table(sections).try_into();
    whole.map_err(|error: toml::de::Error| match error.message() {
        // Others have it.
        text if text.starts_with("unknown field") => SettingsError::Value {
            name: name.into(),
            reason: "a run that was begun has no such setting: leave it out".into(),
        },
        text => bad(&text),
    })
}

/// Every setting in its section.
fn every() -> std::collections::BTreeMap<String, toml::Table> {
    let some = Some(1);
    let settings = Settings {
        model: ModelSettings::default(),
        data: DataConfig {
            data_dir: Some("".into()),
            size: some,
            crop: some,
            skip_damaged: true,
            codes: 1,
            ..DataConfig::default()
        },
        train: TrainConfig {
            shards: some,
            ..TrainConfig::default()
        },
    };
    let text = toml::to_string(&settings).expect("settings are toml");
    toml::from_str(&text).expect("each section is a table")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_give_every_value() {
        for (name, text) in PRESETS {
            Settings::preset(name).unwrap();
            let preset: toml::Table = text.parse().unwrap();
            let keys = |section: &toml::Value| -> Vec<String> {
                section.as_table().unwrap().keys().cloned().collect()
            };
            let every = toml::Value::try_from(TrainConfig::default()).unwrap();
            assert_eq!(keys(&preset["train"]), keys(&every), "{name}");
            assert_eq!(preset["model"].as_table().unwrap().len(), 9, "{name}");
        }
        let error = Settings::preset("large").unwrap_err().to_string();
        assert_eq!(
            error,
            "no preset large: choose quick, small, cifar10, cifar10-best"
        );
    }

    #[test]
    fn the_original_preset_is_the_original() {
        let settings = Settings::preset("cifar10").unwrap();
        assert_eq!(settings.model([32, 32, 3, 10]), ModelConfig::default());
        let train = settings.train;
        assert_eq!((train.batch_size, train.init_batch_size), (128, 16));
        assert_eq!(
            (train.learning_rate, train.learning_rate_decay),
            (1e-3, 0.999_995)
        );
        assert_eq!((train.dropout, train.polyak_decay), (0.5, 0.9995));
        assert_eq!(
            (train.epochs, train.steps, train.save_interval),
            (5000, 0, 20)
        );
    }

    #[test]
    fn unknown_keys_are_named_with_their_line() {
        let text = "[train]\nseed = 1\nspeed = 2\n";
        let error = Settings::parse(Path::new("my.toml"), text).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("`my.toml`: line 3: unknown field `speed`"),
            "{error}"
        );
        assert!(!error.contains('\n'));
    }

    #[test]
    fn settings_are_overridden_by_name() {
        let mut settings = Settings::preset("quick").unwrap();
        settings.set("nr_filters", 7).unwrap();
        settings.set("attention", [0, 0, 2]).unwrap();
        settings.set("learning_rate", 1).unwrap();
        settings.set("optimizer", "muon").unwrap();
        settings.set("shards", 2).unwrap();
        settings.set("held_out", 0.2).unwrap();
        let Settings { model, data, train } = &settings;
        assert_eq!((model.nr_filters, model.attention), (7, [0, 0, 2]));
        assert_eq!((train.learning_rate, train.shards), (1.0, Some(2)));
        assert_eq!(train.optimizer, super::super::config::Optimizer::Muon);
        assert_eq!(data.held_out, 0.2);
        let before = settings.clone();
        for (name, value) in [("nr_filters", "many"), ("seed", "0x1"), ("dropout", "")] {
            let error = settings.set(name, value).unwrap_err().to_string();
            assert!(error.starts_with(name) && !error.contains('\n'), "{error}");
        }
        let error = settings.set("filters", 1).unwrap_err().to_string();
        assert!(
            error.contains("nr_filters, ") && error.contains("crop"),
            "{error}"
        );
        assert_eq!(settings, before);
    }

    #[test]
    fn every_setting_of_a_run_has_a_name() {
        let all = RunConfig {
            model: ModelConfig::default(),
            data: DataConfig::default(),
            train: TrainConfig::default(),
        };
        let every = every();
        let sections: toml::Table = toml::Table::try_from(&all).unwrap();
        for (section, settings) in sections {
            for name in settings.as_table().unwrap().keys() {
                let of_images = ["height", "width", "channels", "nr_classes"];
                let known = every[&section].contains_key(name);
                assert!(
                    known || of_images.contains(&name.as_str()),
                    "{section} {name}"
                );
            }
        }
    }
}
