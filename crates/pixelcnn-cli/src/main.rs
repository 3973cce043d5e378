//! The program `pixelcnn`: train, evaluate and sample PixelCNN++ models.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use pixelcnn::Stopped;
use pixelcnn::archive::ArchiveError;
use pixelcnn::codec::CodecError;
use pixelcnn::data::DataError;
use pixelcnn::device::{make_threads, on_threads};
use pixelcnn::evaluate::EvaluateError;
use pixelcnn::sample::DrawError;
use pixelcnn::score::ScoreError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

mod advice;
mod chart;
mod commands;
mod confusion;
mod device;
mod drawing;
mod heat;
mod measuring;
mod output;
mod ranks;
mod settings;
mod terminal;
mod trained;

use advice::advice;
use commands::{
    classify, complete, completions, compress, decompress, devices, eval, export, import, info,
    plot, sample, score, serve, train,
};
use device::DeviceFlags;
use terminal::{INTERRUPTED, Result, colours, note};

/// PixelCNN++: image models with exact likelihoods.
///
/// Train one, measure it in bits per dimension, draw images from it. `pixelcnn COMMAND --help`
/// explains each command with examples.
#[derive(Debug, Parser)]
#[command(name = "pixelcnn", version, after_long_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// CPU threads [default: one for each core]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    device: DeviceFlags,
    /// Messages to show on standard error: error, warn, info, debug or trace, or of one part only,
    /// such as pixelcnn=debug
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        help_heading = "Global options"
    )]
    #[arg(default_value = "warn")]
    log: String,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn sample                       images drawn from the shipped model, in samples.png
  pixelcnn train                        a small model of CIFAR-10 in a few minutes
  pixelcnn train --data photos --size 32
  pixelcnn eval runs/quick-1            its bits/dim on the test images
  pixelcnn sample runs/quick-1          images drawn from it, in samples.png
  pixelcnn complete horse.png --keep top:16
  pixelcnn compress photos -o photos.pxc
  pixelcnn score photos                 how unusual each picture is, in scores
  pixelcnn classify runs/classes        the classes of test images, by a class-conditional model
  pixelcnn serve --open                 all of it on a page in the browser";

#[derive(Debug, Subcommand)]
enum Command {
    Train(Box<train::Train>),
    Eval(eval::Eval),
    Sample(sample::Sample),
    Complete(complete::Complete),
    Compress(compress::Compress),
    Decompress(decompress::Decompress),
    Score(score::Score),
    Classify(classify::Classify),
    Info(info::Info),
    Plot(plot::Plot),
    Serve(serve::Serve),
    Import(import::Import),
    Export(export::Export),
    Devices(devices::Devices),
    Completions(completions::Completions),
}

impl Command {
    /// Whether the processes of a launcher can do it together.
    fn is_shared(&self) -> bool {
        use Command::{Classify, Compress, Eval, Sample, Score, Train};
        matches!(
            self,
            Train(_) | Eval(_) | Sample(_) | Score(_) | Classify(_) | Compress(_)
        )
    }
}

/// The whole command line, for its help and for completions.
fn command_line() -> clap::Command {
    settings::with_presets_in_help(Cli::command())
}

fn main() -> ExitCode {
    let matches = command_line().try_get_matches();
    let cli = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = cli.unwrap_or_else(|error| ranks::say_once(|| error.exit()));
    let threads = cli.threads.map_or(0, usize::from);
    let waits = matches!(cli.command, Command::Serve(_));
    let program = || {
        run(cli).unwrap_or_else(|error| match error.downcast_ref::<io::Error>() {
            None if is_stop(&*error) => {
                note("pixelcnn: interrupted: nothing was written");
                ExitCode::from(INTERRUPTED)
            }
            // Whoever read the results has read enough.
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            Some(error) => {
                note(format_args!(
                    "pixelcnn: cannot write to standard output: {error}"
                ));
                ExitCode::FAILURE
            }
            None => {
                note(format_args!("pixelcnn: {error}{}", advice(&*error)));
                ExitCode::FAILURE
            }
        })
    };
    let done = match waits {
        true => make_threads(threads).map(|()| program()),
        false => on_threads(threads, program),
    };
    done.unwrap_or_else(|error| {
        note(format_args!("pixelcnn: --threads {threads}: {error}"));
        ExitCode::FAILURE
    })
}

/// Whether Ctrl-C stopped a command that has no state to save.
fn is_stop(error: &(dyn Error + 'static)) -> bool {
    error.is::<Stopped>()
        || matches!(error.downcast_ref(), Some(DataError::Stopped(_)))
        || matches!(error.downcast_ref(), Some(DrawError::Stopped(_)))
        || matches!(error.downcast_ref(), Some(EvaluateError::Stopped(_)))
        || matches!(error.downcast_ref(), Some(ScoreError::Stopped(_)))
        || matches!(
            error.downcast_ref(),
            Some(ArchiveError::Codec(CodecError::Stopped(_)))
        )
}

fn run(cli: Cli) -> Result<ExitCode> {
    let shown = cli.log.parse::<Targets>();
    let shown = shown.map_err(|error| format!("--log {}: {error}", cli.log))?;
    let messages = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(colours())
        // It would panic where standard error is gone.
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(messages.with_filter(shown))
        .init();
    if !cli.command.is_shared() {
        ranks::expect_alone("this command is the work of one; run it without mpirun")?;
    }
    match cli.command {
        Command::Train(train) => train.run(&cli.device),
        Command::Eval(eval) => eval.run(&cli.device),
        Command::Sample(sample) => sample.run(&cli.device),
        Command::Complete(complete) => complete.run(&cli.device),
        Command::Compress(compress) => compress.run(),
        Command::Decompress(decompress) => decompress.run(),
        Command::Score(score) => score.run(&cli.device),
        Command::Classify(classify) => classify.run(&cli.device),
        Command::Info(info) => info.run(),
        Command::Plot(plot) => plot.run(),
        Command::Serve(serve) => serve.run(&cli.device),
        Command::Import(import) => import.run(),
        Command::Export(export) => export.run(&cli.device),
        Command::Devices(devices) => {
            cli.device.look();
            devices.run()
        }
        Command::Completions(completions) => completions.run(),
    }
}
