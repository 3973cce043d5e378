//! `pixelcnn import`.

use std::mem;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pixelcnn::Nonlinearity;
use pixelcnn::data::DataConfig;
use pixelcnn::network::Layout;
use pixelcnn::train::config::{RunConfig, TrainConfig};
use pixelcnn::train::folder;
use pixelcnn::train::state::TrainState;
use pixelcnn::weights::{self, Unsaid};

use super::train::expect_new;
use crate::settings::{DataFlags, nonlinearity, set};
use crate::terminal::{Result, grouped, note, quoted, say};
use crate::trained::checkpoints;

/// Make a run of weights from elsewhere.
///
/// Of checkpoints of the original TensorFlow code, in the current form (.index and .data files) and
/// the older one; of state dicts (.pth) of its PyTorch port, alone or with other things beside them;
/// of safetensors with a config.json beside it, as export writes them. The new run folder is like
/// one of train: eval, sample, info, export and train --resume take it. The model is told from the
/// layers' names and shapes. The original's checkpoints go on exactly where they were, with their
/// averages and the optimizer's state; where a file has weights or averages alone, these are both,
/// and training begins with a new optimizer. Of two state dicts in a PyTorch file the averages are
/// the one that ema, average, avg, polyak, shadow or swa is part of the name of, or that an
/// AveragedModel wrote. What else is in a file is named and left out. Epochs count from the import.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Import {
    /// The file; of a TensorFlow checkpoint in several files any one, or what their names begin
    /// with
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder for the new run
    #[arg(long, short, value_name = "RUN", alias = "out")]
    output: PathBuf,
    /// Size of the images: a side or WIDTHxHEIGHT [default: --size, else 32 or that of
    /// config.json]
    #[arg(long, value_name = "SIZE", value_parser = image_size)]
    image_size: Option<[usize; 2]>,
    /// Nonlinearity of the gated resnet blocks [default: concat_elu where the shapes fit it;
    /// otherwise it has to be said]
    #[arg(long, value_name = "NAME", value_parser = nonlinearity())]
    nonlinearity: Option<Nonlinearity>,
    /// Images in a step [default: 128]
    #[arg(long, value_name = "N", help_heading = "How it was trained")]
    batch_size: Option<usize>,
    /// Learning rate of the first step; that of the next one follows from it [default: 0.001]
    #[arg(long, value_name = "RATE", help_heading = "How it was trained")]
    learning_rate: Option<f64>,
    /// Factor on the learning rate at every step [default: 0.999995]
    #[arg(long, value_name = "FACTOR", help_heading = "How it was trained")]
    #[arg(alias = "lr-decay")]
    learning_rate_decay: Option<f64>,
    /// Share of the features that dropout drops [default: 0.5]
    #[arg(long, value_name = "SHARE", help_heading = "How it was trained")]
    dropout: Option<f32>,
    /// Decay of the Polyak average of the parameters [default: 0.9995]
    #[arg(long, value_name = "DECAY", help_heading = "How it was trained")]
    polyak_decay: Option<f64>,
    /// Seed of the random numbers to come
    #[arg(long, value_name = "N", help_heading = "How it was trained")]
    #[arg(default_value = "1")]
    seed: u64,
    #[command(flatten)]
    data: DataFlags,
}

const EXAMPLES: &str = "\
The defaults are the original's. The data flags say what eval measures on and train --resume goes on
with: CIFAR-10 where they are left out.

Examples:
  pixelcnn import save/params_cifar.ckpt -o runs/original
      a checkpoint of the original code
  pixelcnn import pcnn.pth -o runs/port --data photos --size 64
      one of its PyTorch port, of pictures of 64x64
  pixelcnn import exported/model.safetensors -o runs/again
      one that export wrote";

fn image_size(text: &str) -> std::result::Result<[usize; 2], String> {
    let side = |text: &str| text.parse::<usize>().ok();
    let (width, height) = text.split_once('x').unwrap_or((text, text));
    match (side(height), side(width)) {
        (Some(height), Some(width)) => Ok([height, width]),
        _ => Err("give a side such as 32, or WIDTHxHEIGHT such as 64x48".into()),
    }
}

impl Import {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let mut train = TrainConfig {
            seed: self.seed,
            ..TrainConfig::default()
        };
        set(&mut train.batch_size, &self.batch_size);
        set(&mut train.learning_rate, &self.learning_rate);
        set(&mut train.learning_rate_decay, &self.learning_rate_decay);
        set(&mut train.dropout, &self.dropout);
        set(&mut train.polyak_decay, &self.polyak_decay);
        train.validate()?;
        let mut data = DataConfig::default();
        self.data.apply(&mut data);
        expect_new(&self.output)?;

        let unsaid = Unsaid {
            // Pictures resized to a side are for a model of that size.
            size: self.image_size.or(data.size.map(|side| [side; 2])),
            nonlinearity: self.nonlinearity,
        };
        let mut imported = weights::read(&self.file, &unsaid)?;
        let unused = mem::take(&mut imported.unused);
        data.codes = imported.config.nr_code_maps();
        let config = RunConfig {
            model: imported.config.clone(),
            data,
            train,
        };
        let mut state = TrainState::of(imported, &config.train);
        state.run = Some(config.clone());
        let _lock = folder::lock(&self.output)?;
        // Nobody has begun a run there in the meantime.
        expect_new(&self.output)?;
        checkpoints(&self.output).save(&state)?;
        config.write(&self.output)?;

        if !unused.is_empty() {
            let named: Vec<String> = unused.iter().take(10).map(|u| format!("{u:?}")).collect();
            let more = match unused.len() - named.len() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            note(format_args!("left out: {}{more}", named.join(", ")));
        }
        let model = &state.config;
        say(format_args!(
            "model   {} parameters, {}x{}x{} images",
            grouped(Layout::new(model).size() as u64),
            model.width,
            model.height,
            model.channels
        ))?;
        match state.step {
            0 => say("step    0: without the optimizer's state, training begins with a new one")?,
            step => say(format_args!(
                "step    {}, learning rate {:.6}",
                grouped(step),
                state.learning_rate
            ))?,
        }
        let run = quoted(&self.output);
        say(format_args!(
            "run     {}\nnext:\n  pixelcnn eval {run}\n  pixelcnn sample {run}\n  \
             pixelcnn train --resume {run}",
            self.output.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
