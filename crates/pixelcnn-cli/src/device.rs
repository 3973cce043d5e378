//! The flags that say where the network runs.

use std::error::Error;
#[cfg(feature = "cuda")]
use std::path::PathBuf;

use clap::Args;
use pixelcnn::ModelConfig;
use pixelcnn::device::{self, Device, Precision};

use crate::ranks::Team;
#[cfg(feature = "cuda")]
use crate::terminal::counted;
use crate::terminal::{Result, note};

/// Where the network runs, of all commands but those that code images.
#[derive(Debug, Args)]
pub struct DeviceFlags {
    /// Where networks are trained, evaluated and drawn from: cpu, cuda:N or wgpu:N in builds for GPUs,
    /// or auto, the best that there is
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        help_heading = "Global options"
    )]
    #[arg(default_value = "auto")]
    device: String,
    /// What networks are trained and evaluated with: f32; bf16 on CPUs that have its instructions and on
    /// NVIDIA GPUs; tf32 on these
    #[arg(
        long,
        global = true,
        value_name = "TYPE",
        help_heading = "Global options"
    )]
    #[arg(default_value = "f32", value_parser = precision)]
    precision: Precision,
    /// Folder with CUDA's libraries, where they are neither the system's nor in the active Python
    /// environment
    #[cfg(feature = "cuda")]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    cuda_libs: Option<PathBuf>,
}

fn precision(name: &str) -> std::result::Result<Precision, String> {
    let mut all = Precision::ALL.into_iter();
    let found = all.find(|precision| precision.to_string() == name);
    found.ok_or_else(|| "choose f32, tf32 or bf16".into())
}

impl DeviceFlags {
    /// Checks that nothing but the CPU in f32 is asked for.
    pub fn expect_cpu(&self) -> Result {
        match (self.device.as_str(), self.precision) {
            ("auto" | "cpu", Precision::F32) => Ok(()),
            ("auto" | "cpu", _) => Err(self.refused("this is computed in f32")),
            (device, _) => {
                Err(format!("--device {device}: this runs on the CPU: leave it out").into())
            }
        }
    }

    /// The device of a process alone, which is there.
    pub fn find(&self) -> Result<Device> {
        Self::there(self.chosen()?)
    }

    /// The device of one of some ranks, which is there: each on this machine has a GPU of its own, where they
    /// are NVIDIA's; on others ranks can't train together.
    #[cfg_attr(not(any(feature = "cuda", feature = "wgpu")), expect(unused_variables))]
    pub fn find_for(&self, team: &Team) -> Result<Device> {
        let device = self.chosen()?;
        #[cfg(feature = "wgpu")]
        let device = match device {
            Device::Wgpu { .. } if team.ranks.count() > 1 && self.device == "auto" => self.cpu()?,
            device => device,
        };
        #[cfg(feature = "cuda")]
        let device = match (device, team.here) {
            (Device::Cuda { precision, .. }, [number, count]) if count > 1 => {
                self.expect_one_for_each(count)?;
                Device::Cuda { number, precision }
            }
            (Device::Cpu { .. }, _) if team.is_on_gpus && self.device != "cpu" => {
                return Err(
                    "--gpus: this machine has none that can be used (see `pixelcnn \
                            devices`): leave it out"
                        .into(),
                );
            }
            _ => device,
        };
        Self::there(device)
    }

    /// The device on which a model's loss is computed: a GPU that was not asked for gives way to the CPU
    /// where it can't.
    pub fn for_loss_of(&self, model: &ModelConfig, device: Device) -> Result<Device> {
        if matches!(device, Device::Cpu { .. }) || !model.energy_distance {
            return Ok(device);
        }
        match &*self.device {
            "auto" => {
                note("the energy distance is computed on the CPU");
                self.cpu()
            }
            _ => Err(format!(
                "{device}: the energy distance is computed on CPUs alone: give --device cpu"
            )
            .into()),
        }
    }

    /// Says what a device lacks.
    fn there(device: Device) -> Result<Device> {
        if let Some(lack) = device.lacks() {
            note(format_args!(
                "training and evaluating on {device} will be many times slower than it could be: {lack}"
            ));
        }
        Ok(device)
    }

    fn chosen(&self) -> Result<Device> {
        self.look();
        match device::parse(&self.device)? {
            #[cfg(feature = "cuda")]
            Device::Cuda { number, .. } => Ok(Device::Cuda {
                number,
                precision: self.precision,
            }),
            Device::Cpu { .. } => self.cpu(),
            device if self.precision == Precision::F32 => Ok(device),
            #[cfg(feature = "wgpu")]
            Device::Wgpu { .. } if self.device == "auto" => self.cpu(),
            device => Err(self.refused(&format!("{device} computes in f32"))),
        }
    }

    /// The processor, with what it can of what is asked for.
    fn cpu(&self) -> Result<Device> {
        match self.precision {
            Precision::Tf32 => Err(self.refused("the CPU computes in f32 or bf16")),
            Precision::Bf16 if !device::has_bf16() => {
                note(
                    "this processor has no instructions for bf16 (AVX-512 BF16): it computes in f32",
                );
                Ok(Device::CPU)
            }
            precision => Ok(Device::Cpu { precision }),
        }
    }

    fn refused(&self, why: &str) -> Box<dyn Error> {
        format!("--precision {}: {why}: leave it out", self.precision).into()
    }

    /// Says what is not done as asked where images are drawn.
    pub fn note_drawing(&self) {
        if self.precision != Precision::F32 {
            note(format_args!(
                "images are drawn in f32, not in {}",
                self.precision
            ));
        }
    }

    /// Checks that there is a GPU for each of so many processes.
    #[cfg(feature = "cuda")]
    fn expect_one_for_each(&self, processes: usize) -> Result {
        if self.device.contains(':') {
            return Err(format!(
                "--device {}: {processes} processes of this machine would have the same GPU: leave it \
                 out",
                self.device
            )
            .into());
        }
        let found = device::devices()?.into_iter();
        let gpus = found.filter(|found| matches!(found.device, Device::Cuda { .. }));
        match gpus.count() {
            gpus if gpus < processes => Err(format!(
                "{processes} processes on this machine, which has {}: start one for each",
                counted(gpus, "GPU")
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// Looks for CUDA's libraries where the user says that they are.
    pub fn look(&self) {
        #[cfg(feature = "cuda")]
        if let Some(folder) = &self.cuda_libs {
            device::look_for_cuda_in(folder);
        }
    }
}
