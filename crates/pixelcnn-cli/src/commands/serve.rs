//! `pixelcnn serve`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
#[cfg(feature = "pretrained")]
use pixelcnn::Shipped;
use pixelcnn::train::run::is_run;
use pixelcnn_web::{Options, Server, Source, runs_in};

use crate::device::DeviceFlags;
use crate::terminal::{Result, catch_interrupts, interrupted, note, say};

/// The folder in which `pixelcnn train` makes runs.
const RUNS: &str = "runs";

/// Show models at work on a page in the browser, and serve them to programs.
///
/// The page draws pictures row by row and shows what the model expects at each pixel, completes pictures,
/// scores them, compresses files, and follows trainings live, also those of other processes. Programs have
/// the same as JSON under /v1, described at /openapi.json; /metrics is for Prometheus, /healthz for whoever
/// watches. It all runs on the CPU.
///
/// Nobody but this machine can reach it, unless --address says so: then clients need a token. Ctrl-C ends it.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Serve {
    /// Run folders, of which always the newest checkpoint is taken; folders of runs; checkpoint files and
    /// exported weights; the shipped model is there, too. The first one is shown at the beginning [default: the
    /// shipped model, and the runs in the folder runs]
    #[arg(value_name = "RUN|FILE")]
    files: Vec<PathBuf>,
    /// The port; 0 for any that is free
    #[arg(long, value_name = "N", default_value = "7860")]
    port: u16,
    /// The address to listen at: 0.0.0.0 for all that this machine has
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    address: IpAddr,
    /// What clients have to send, as `Authorization: Bearer TOKEN` or by the link that is printed [default:
    /// none at a loopback address; at others one that is made up]
    #[arg(long, value_name = "TOKEN", value_parser = token)]
    token: Option<String>,
    /// Open the page in the browser
    #[arg(long)]
    open: bool,
}

const EXAMPLES: &str = "\
Examples:
  pixelcnn serve --open
      the shipped model and the runs in the folder runs, in the browser
  pixelcnn serve runs/quick-1
      a run: while it trains, always its newest checkpoint
  pixelcnn serve --address 0.0.0.0 --port 8080
      for others, too: by the link that is printed, with this machine's name in it
  curl -s localhost:7860/v1/sample -H 'Content-Type: application/json' -d '{\"count\": 4}'
      for programs: four images as PNG files in base64
  pixelcnn serve --log info
      with a line for each request";

fn token(text: &str) -> std::result::Result<String, String> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    match text.len() >= 8 && text.bytes().all(is_fit) {
        true => Ok(text.into()),
        false => Err("give at least 8 letters, digits, or any of - . _ ~".into()),
    }
}

impl Serve {
    /// Runs the command.
    pub fn run(&self, device: &DeviceFlags) -> Result<ExitCode> {
        device.expect_cpu()?;
        let (models, runs) = self.sources()?;
        let address = SocketAddr::new(self.address, self.port);
        let options = Options {
            address,
            token: self.token.clone(),
            models,
            runs,
        };
        let server = Server::new(options)?;
        let mut at = server.address()?;
        if !at.ip().is_loopback() {
            note("others can reach this server: it answers only those who have the token");
        }
        if at.ip().is_unspecified() {
            note("to them it is at this machine's name in place of the address");
            at.set_ip(match at.is_ipv4() {
                true => IpAddr::V4(Ipv4Addr::LOCALHOST),
                false => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
            });
        }
        let token = server.token().map(|token| format!("?token={token}"));
        let link = format!("http://{at}/{}", token.unwrap_or_default());
        catch_interrupts("ending")?;
        say(format_args!("{link}"))?;
        note("Ctrl-C ends it");
        if self.open
            && let Err(error) = open::that_detached(&link)
        {
            note(format_args!(
                "cannot open a browser ({error}): open the link yourself"
            ));
        }
        server.run(|| interrupted().is_break())?;
        Ok(ExitCode::SUCCESS)
    }

    /// The models, and where there may be runs.
    fn sources(&self) -> Result<(Vec<Source>, Vec<PathBuf>)> {
        let (mut models, mut runs) = (Vec::new(), Vec::new());
        for path in &self.files {
            #[cfg(feature = "pretrained")]
            if let Some(shipped) = Shipped::of_path(path)? {
                models.push(Source::Shipped(shipped));
                continue;
            }
            if !path.exists() {
                return Err(format!(
                    "{}: no such file or folder: name a run, a folder of runs or a model",
                    path.display()
                )
                .into());
            }
            let path = absolute(path)?;
            match path.is_dir() {
                true => {
                    let inside = match is_run(&path) {
                        true => vec![path.clone()],
                        false => runs_in(&path),
                    };
                    models.extend(inside.into_iter().map(Source::Run));
                    runs.push(path);
                }
                false => models.push(Source::File(path)),
            }
        }
        if self.files.is_empty() {
            runs.push(absolute(Path::new(RUNS))?);
        }
        #[cfg(feature = "pretrained")]
        models.extend(Shipped::ALL.iter().copied().map(Source::Shipped));
        Ok((models, runs))
    }
}

/// A path that does not hang on the folder that the program is in.
fn absolute(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path);
    Ok(absolute.map_err(|error| format!("{}: {error}", path.display()))?)
}
