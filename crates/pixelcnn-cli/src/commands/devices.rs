//! `pixelcnn devices`.

use std::process::ExitCode;

use clap::Args;
use indicatif::BinaryBytes;
use pixelcnn::device;

use crate::terminal::{Result, note, say};

/// List the devices on which this program can train, evaluate and sample.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Devices {}

const EXAMPLES: &str = "\
Example:
  pixelcnn devices
      their names for --device, and what they are";

impl Devices {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        for found in device::devices()? {
            let name = found.device.to_string();
            match found.memory {
                Some(bytes) => {
                    let memory = BinaryBytes(bytes as u64);
                    say(format_args!("{name:<8}{}, {memory}", found.name))?;
                }
                None => say(format_args!("{name:<8}{}", found.name))?,
            }
        }
        if let Some(error) = device::without_adapters() {
            note(error);
        }
        Ok(ExitCode::SUCCESS)
    }
}
