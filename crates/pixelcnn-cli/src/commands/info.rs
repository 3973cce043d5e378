//! `pixelcnn info`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pixelcnn::network::Layout;
use pixelcnn::train::run::Run;
use pixelcnn::train::settings::Settings;
use pixelcnn::train::state::TrainState;
use pixelcnn::weights::hub::Origin;
use pixelcnn::{Model, ModelConfig};

use crate::settings::preset_name;
use crate::terminal::{Result, duration, grouped, say};
use crate::trained::{Trained, checkpoints};

/// Show what a run, a checkpoint, the shipped model or a preset is: its settings, size, cost and
/// progress.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Info {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]
    #[arg(value_name = "RUN|FILE")]
    run: Option<PathBuf>,
    /// Show what a preset would be on CIFAR-10 instead
    #[arg(long, value_name = "NAME", value_parser = preset_name(), conflicts_with = "run")]
    preset: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn info
      the shipped model
  pixelcnn info runs/quick-1
  pixelcnn info runs/quick-1/checkpoints/best.safetensors
  pixelcnn info --preset cifar10
      what the original's model costs";

impl Info {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        if let Some(name) = &self.preset {
            let settings = Settings::preset(name)?;
            say(format_args!("preset {name}, on CIFAR-10\n"))?;
            show_model(&settings.model([32, 32, 3, 10]))?;
            show_settings("data", &settings.data)?;
            return show_settings("train", &settings.train).map(|()| ExitCode::SUCCESS);
        }
        match Trained::open(self.run.as_deref(), "info")? {
            Trained::Run(run) => show_run(&run)?,
            Trained::Exported(exported) => show_exported(&exported.model)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn show_run(run: &Run) -> Result {
    say(format_args!("{}\n", run.checkpoint.display()))?;
    show_model(&run.state.config)?;
    if let Some(config) = &run.config {
        show_settings("data", &config.data)?;
        show_settings("train", &config.train)?;
    }
    show_state(&run.state)?;
    let checkpoints = checkpoints(&run.folder);
    let mut found = checkpoints.list()?;
    found.extend(Some(checkpoints.best()).filter(|best| best.exists()));
    if !found.is_empty() {
        say("checkpoints, newest first")?;
    }
    for path in found {
        say(format_args!("  {}", path.display()))?;
    }
    Ok(())
}

fn show_exported(exported: &Model) -> Result {
    let card = &exported.card;
    say(format_args!("{}\n", card.name))?;
    show_model(&exported.config)?;
    say("training")?;
    line("data", &card.data)?;
    line("step", grouped(card.step))?;
    line("images seen", grouped(card.images_seen))?;
    line("time", duration(card.seconds.round()))?;
    show_origin(&card.origin)?;
    line("weights", card.weights())?;
    if let Some(measured) = &card.measured {
        line(exported.config.unit(), measured)?;
    }
    Ok(())
}

fn show_model(model: &ModelConfig) -> Result {
    let layout = Layout::new(model);
    show_settings("model", model)?;
    say("cost")?;
    line("parameters", grouped(layout.size() as u64))?;
    line("multiply-adds per image", grouped(layout.multiply_adds))?;
    say("")
}

fn show_state(state: &TrainState) -> Result {
    say("progress")?;
    line("step", grouped(state.step))?;
    line("epochs done", grouped(state.epoch))?;
    line("images seen", grouped(state.images_seen))?;
    line("base learning rate", state.learning_rate)?;
    line("time", duration(state.seconds.round()))?;
    show_origin(&state.origin)?;
    let unit = state.config.unit();
    let figure = |figure: Option<(u64, f64)>| match figure {
        Some((step, bits)) => format!("{bits:.4} {unit}, step {}", grouped(step)),
        None => "not measured yet".into(),
    };
    line("last test", figure(state.last_evaluation))?;
    line("best test", figure(state.best))?;
    if state.moments.is_none() {
        line(
            "optimizer",
            "none: weights alone, which can't be trained on",
        )?;
    }
    say("")
}

fn show_origin(origin: &Option<Origin>) -> Result {
    match origin {
        Some(origin) => line("begun with", origin),
        None => Ok(()),
    }
}

/// A section of a configuration, a line for each value.
fn show_settings(section: &str, settings: &impl serde::Serialize) -> Result {
    say(section)?;
    for (name, value) in toml::Table::try_from(settings)? {
        line(&name, value)?;
    }
    say("")
}

fn line(name: &str, value: impl std::fmt::Display) -> Result {
    say(format_args!("  {name:24} {value}"))
}
