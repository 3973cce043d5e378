//! `pixelcnn export`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use pixelcnn::data::Split;
use pixelcnn::evaluate::expect_images;
use pixelcnn::network::{Layout, Network};
use pixelcnn::ranks::Alone;
use pixelcnn::train::config::{Optimizer, TrainConfig};
use pixelcnn::train::state::Moments;
use pixelcnn::weights::hub::{Card, Measured};
use pixelcnn::weights::original::Optimized;
use pixelcnn::weights::safetensors::Precision;
use pixelcnn::weights::{WeightsError, hub, npz, original, tensorflow};

use crate::device::DeviceFlags;
use crate::measuring::measure;
use crate::output::Overwrite;
use crate::settings::DataFlags;
use crate::terminal::{Result, catch_interrupts, note, opening, say};
use crate::trained::Trained;

/// Write a model's weights for use elsewhere.
///
/// safetensors and npz hold one set of weights, the averaged parameters or with --raw those trained
/// last, under the names and in the layouts of the original code. tensorflow holds the whole state
/// of the training, both sets and the optimizer's, as the original code restores it.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Export {
    /// Run folder (its newest checkpoint), checkpoint file or exported weights [default: the
    /// shipped model]
    #[arg(value_name = "RUN|FILE")]
    run: Option<PathBuf>,
    /// What to write
    #[arg(long, value_name = "FORMAT", default_value = "safetensors")]
    format: Format,
    /// Folder to write to [default: RUN/export/FORMAT]
    #[arg(long, short, value_name = "DIR", alias = "out")]
    output: Option<PathBuf>,
    #[command(flatten)]
    overwrite: Overwrite,
    /// The parameters as trained last, not their Polyak average
    #[arg(long)]
    raw: bool,
    /// Half precision: half the size of safetensors, and next to no worse
    #[arg(long)]
    half: bool,
    /// Measure the bits/dim on all test images for the model card of safetensors [default: what
    /// training measured, where it did]
    #[arg(long)]
    measure: bool,
    /// GPUs of the original code that is to restore a class-conditional model (its --nr_gpu): its
    /// checkpoints depend on it
    #[arg(long, value_name = "N", default_value = "8")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    nr_gpu: u16,
    #[command(flatten)]
    data: DataFlags,
}

const EXAMPLES: &str = "\
--measure takes the run's own data where the data flags leave them out; they are for it alone.

Examples:
  pixelcnn export runs/quick-1
      model.safetensors, config.json and a model card (README.md), as model hubs have them
  pixelcnn export runs/quick-1/checkpoints/best.safetensors --measure -o best
      the best checkpoint, with its bits/dim on the test images in the card
  pixelcnn export runs/quick-1 --half --measure
      in half precision, with the bits/dim of the rounded weights
  pixelcnn export runs/quick-1 --format npz
      weights.npz for NumPy
  pixelcnn export runs/quick-1 --format tensorflow -o save
      a checkpoint that the original code goes on from with --load_params --save_dir save";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// model.safetensors, config.json and a model card
    Safetensors,
    /// weights.npz
    Npz,
    /// params_cifar.ckpt (params_imagenet.ckpt of ImageNet) in TensorFlow's current form
    Tensorflow,
}

impl Export {
    /// Runs the command.
    pub fn run(self, device: &DeviceFlags) -> Result<ExitCode> {
        if self.raw && self.format == Format::Tensorflow {
            return Err(
                "--raw: tensorflow's checkpoints hold both sets of weights: \
                        leave it out"
                    .into(),
            );
        }
        if self.format != Format::Safetensors {
            for (given, flag, why) in [
                (self.measure, "--measure", "has a model card"),
                (self.half, "--half", "has half precision"),
            ] {
                if given {
                    return Err(format!("{flag}: only safetensors {why}: leave it out").into());
                }
            }
        }
        let trained = Trained::open(self.run.as_deref(), "export")?;
        let format = match self.format {
            Format::Safetensors => "safetensors",
            Format::Npz => "npz",
            Format::Tensorflow => "tensorflow",
        };
        let folder = match (&self.output, &trained) {
            (Some(folder), _) => folder.clone(),
            (None, Trained::Run(run)) if run.folder.join("config.toml").exists() => {
                run.folder.join("export").join(format)
            }
            (None, Trained::Run(run)) => {
                return Err(format!(
                    "{}: not in a run folder: say where to write with --output",
                    run.checkpoint.display()
                )
                .into());
            }
            (None, Trained::Exported(_)) => {
                return Err("not of a run folder: say where to write with --output".into());
            }
        };
        let model = trained.model();
        let parameters = trained.parameters(self.raw)?;
        let data = trained.data().cloned().unwrap_or_default();
        // As the original calls them, which knows two data sets.
        let checkpoint = match data.data.starts_with("imagenet") {
            true => "params_imagenet.ckpt",
            false => "params_cifar.ckpt",
        };
        let files = match self.format {
            Format::Safetensors => ["model.safetensors", "config.json", "README.md"]
                .map(str::to_owned)
                .to_vec(),
            Format::Npz => vec!["weights.npz".into()],
            Format::Tensorflow => vec![
                format!("{checkpoint}.index"),
                format!("{checkpoint}.data-00000-of-00001"),
                "checkpoint".into(),
            ],
        };
        files
            .iter()
            .try_for_each(|file| self.overwrite.expect_free(&folder.join(file)))?;
        let mut begins_anew = false;
        let file = match self.format {
            Format::Safetensors => {
                let precision = match self.half {
                    true => Precision::Half,
                    false => Precision::Single,
                };
                let mut card = card(&trained, self.raw, precision);
                if self.measure {
                    let data = trained.data_or(&self.data)?;
                    let split = self.data.hold_out().then_some(Split::Test);
                    let (split, images) = trained.open_measured(&data, split, &mut opening())?;
                    expect_images(model, &images)?;
                    catch_interrupts("leaving after this batch")?;
                    let rounded;
                    let written = match self.half {
                        true => {
                            rounded = hub::rounded_to_half(model, parameters)?;
                            &rounded
                        }
                        false => parameters,
                    };
                    let device = device.for_loss_of(model, device.find()?)?;
                    let mut network = Network::new(model, written, &device)?;
                    let figures = measure(
                        &Alone,
                        &mut network,
                        &images,
                        images.len(),
                        device.images_at_a_time(),
                    )?;
                    card.measured = Some(Measured {
                        bits_per_dim: figures.mean(),
                        standard_error: Some(figures.standard_error()),
                        images: match split {
                            Some(split) => {
                                format!("{} {split} images of {}", images.len(), data.short_name())
                            }
                            None => format!("all {} images of {}", images.len(), data.short_name()),
                        },
                    });
                }
                hub::export(&folder, model, parameters, &card)?;
                "model.safetensors"
            }
            Format::Npz => {
                npz::export(&folder, "weights.npz", model, parameters)?;
                "weights.npz"
            }
            Format::Tensorflow => {
                let Trained::Run(run) = &trained else {
                    return Err(WeightsError::NoMoments.into());
                };
                let train = run.config.as_ref().map(|config| &config.train);
                let default = TrainConfig::default();
                let train = train.unwrap_or(&default);
                let anew;
                begins_anew = train.optimizer == Optimizer::Muon;
                let state = if begins_anew {
                    note(format_args!(
                        "the run was trained with Muon, which the original does not have: in what is \
                         written Adam begins anew, at step 0"
                    ));
                    anew = Moments::zeros(&Layout::new(model));
                    Optimized {
                        config: model,
                        step: 0,
                        parameters: &run.state.parameters,
                        average: &run.state.average,
                        first: &anew.first,
                        second: &anew.second,
                    }
                } else {
                    run.state.optimized()?
                };
                let variables = original::variables(state, train.batch_size, self.nr_gpu.into())?;
                tensorflow::write_v2(&folder, checkpoint, variables)?;
                checkpoint
            }
        };
        let weights = match self.format {
            Format::Tensorflow if begins_anew => "all but the optimizer's state".into(),
            Format::Tensorflow => "whole state".into(),
            _ => format!("{} weights", trained.kind(self.raw)),
        };
        let weights = match self.half {
            true => format!("{weights} in half precision"),
            false => weights,
        };
        say(format_args!(
            "{} ({weights}, step {})",
            folder.join(file).display(),
            trained.step()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The card of weights that are written so.
fn card(trained: &Trained, raw: bool, precision: Precision) -> Card {
    let card = match trained {
        Trained::Run(run) => run.card(raw),
        Trained::Exported(exported) => exported.model.card.clone(),
    };
    card.in_precision(precision)
}
