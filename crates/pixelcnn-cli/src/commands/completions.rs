//! `pixelcnn completions`.

use std::process::ExitCode;

use clap::Args;
use clap_complete::Shell;

use crate::terminal::{Result, say};

/// Print the completions for a shell.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

const EXAMPLES: &str = "\
Examples:
  source <(pixelcnn completions bash)
  pixelcnn completions zsh > ~/.zfunc/_pixelcnn
  pixelcnn completions fish > ~/.config/fish/completions/pixelcnn.fish";

impl Completions {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(
            self.shell,
            &mut crate::command_line(),
            "pixelcnn",
            &mut script,
        );
        say(String::from_utf8_lossy(&script).trim_end())?;
        Ok(ExitCode::SUCCESS)
    }
}
