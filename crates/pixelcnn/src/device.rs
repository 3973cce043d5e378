//! Where the network runs, chosen at run time among what this build has.

pub use pixelcnn_core::cpu::has_bf16;
pub use pixelcnn_core::engine::Precision;

use std::fmt;
#[cfg(feature = "cuda")]
use std::path::{Path, PathBuf};

use pixelcnn_core::ModelConfig;
use pixelcnn_core::cpu::{Cpu, free_shards};
use pixelcnn_core::engine::{Engine, EngineError};

/// Where the network runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, by the hand-written kernels.
    Cpu {
        /// What it is to compute with: bfloat16 where it [has the instructions](has_bf16), else single
        /// precision.
        precision: Precision,
    },
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda {
        /// Its number, from 0.
        number: usize,
        /// What it computes with.
        precision: Precision,
    },
    /// Any GPU, through Vulkan, Metal or DirectX 12.
    #[cfg(feature = "wgpu")]
    Wgpu {
        /// The adapter's number, from 0.
        number: usize,
    },
}

impl fmt::Display for Device {
    /// The name that [`parse`] takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu { .. } => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Device::Cuda { number, .. } => write!(f, "cuda:{number}"),
            #[cfg(feature = "wgpu")]
            Device::Wgpu { number } => write!(f, "wgpu:{number}"),
        }
    }
}

/// A device that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A name that no device of this build has.
    #[error("device {0}: this build has none of that name: choose {NAMES}")]
    Name(String),
    /// The system gives no threads for the CPU.
    #[error("threads can't be started: {0}")]
    Threads(String),
    /// The GPUs can't be told.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] pixelcnn_cuda::CudaError),
    /// An adapter can't be used.
    #[cfg(feature = "wgpu")]
    #[error(transparent)]
    Wgpu(#[from] pixelcnn_wgpu::WgpuError),
}

const NAMES: &str = match (cfg!(feature = "cuda"), cfg!(feature = "wgpu")) {
    (true, true) => "auto, cpu, cuda:N or wgpu:N",
    (true, false) => "auto, cpu or cuda:N",
    (false, true) => "auto, cpu or wgpu:N",
    (false, false) => "auto or cpu (GPUs need the cargo feature cuda or wgpu)",
};

/// The device of a name: `cpu`; `cuda:N` for an NVIDIA GPU, where the build has the feature `cuda`; `wgpu:N` for
/// any adapter, where it has the feature `wgpu`; or `auto`: the first GPU of NVIDIA's, or else the first one that
/// has memory of its own or is Apple's, or else the CPU.
///
/// # Errors
/// [`DeviceError::Name`] where this build has none of that name, `DeviceError::Cuda` and `DeviceError::Wgpu` where
/// there is no such GPU or not what it needs.
pub fn parse(name: &str) -> Result<Device, DeviceError> {
    let (kind, number) = match name.split_once(':') {
        Some((kind, number)) => (kind, number.parse().ok()),
        None => (name, Some(0)),
    };
    match (kind, number) {
        _ if name == "auto" => Ok(best()),
        _ if name == "cpu" => Ok(Device::CPU),
        #[cfg(feature = "cuda")]
        ("cuda", Some(number)) => {
            pixelcnn_cuda::expect(number)?;
            Ok(cuda(number))
        }
        #[cfg(feature = "wgpu")]
        ("wgpu", Some(number)) => {
            pixelcnn_wgpu::expect(number)?;
            Ok(Device::Wgpu { number })
        }
        _ => Err(DeviceError::Name(name.into())),
    }
}

fn best() -> Device {
    // Where the driver can't tell, it can't be used either.
    #[cfg(feature = "cuda")]
    if pixelcnn_cuda::devices().is_ok_and(|found| !found.is_empty()) {
        return cuda(0);
    }
    #[cfg(feature = "wgpu")]
    if let Some(gpu) = pixelcnn_wgpu::adapters()
        .iter()
        .find(|adapter| adapter.kind == pixelcnn_wgpu::Kind::Gpu)
    {
        return Device::Wgpu { number: gpu.number };
    }
    Device::CPU
}

#[cfg(feature = "cuda")]
fn cuda(number: usize) -> Device {
    Device::Cuda {
        number,
        precision: Precision::default(),
    }
}

/// Looks for CUDA's libraries in a folder too, before all other places.
#[cfg(feature = "cuda")]
pub fn look_for_cuda_in(folder: &Path) {
    pixelcnn_cuda::look_in(folder);
}

/// Where compiled kernels are kept.
#[cfg(feature = "cuda")]
pub(crate) fn cuda_cache() -> Option<PathBuf> {
    crate::data::cache_dir().map(|cache| cache.join("cuda"))
}

/// A device of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// It.
    pub device: Device,
    /// What it is called.
    pub name: String,
    /// Its memory in bytes, where that is its own.
    pub memory: Option<usize>,
}

/// The devices of this machine that this build can use, the CPU first.
///
/// # Errors
/// `DeviceError::Cuda` where the driver refuses.
pub fn devices() -> Result<Vec<Found>, DeviceError> {
    let threads = match rayon::current_num_threads() {
        1 => "1 thread".into(),
        threads => format!("{threads} threads"),
    };
    let cpu = Found {
        device: Device::CPU,
        name: threads,
        memory: None,
    };
    #[allow(unused_mut)]
    let mut found = vec![cpu];
    #[cfg(feature = "cuda")]
    found.extend(pixelcnn_cuda::devices()?.into_iter().map(|gpu| Found {
        device: cuda(gpu.number),
        name: gpu.name,
        memory: Some(gpu.memory),
    }));
    #[cfg(feature = "wgpu")]
    found.extend(pixelcnn_wgpu::adapters().iter().map(|adapter| Found {
        device: Device::Wgpu {
            number: adapter.number,
        },
        name: format!("{} through {}", adapter.name, adapter.backend),
        memory: adapter.memory,
    }));
    Ok(found)
}

/// Why a build with the feature `wgpu` finds no adapter, where it finds none.
pub fn without_adapters() -> Option<DeviceError> {
    #[cfg(feature = "wgpu")]
    return Some(pixelcnn_wgpu::expect(0).err()?.into());
    #[cfg(not(feature = "wgpu"))]
    None
}

impl Device {
    /// The processor in single precision.
    pub const CPU: Device = Device::Cpu {
        precision: Precision::F32,
    };

    /// Images to evaluate at a time, so that the device is busy.
    pub fn images_at_a_time(&self) -> usize {
        match self {
            Device::Cpu { .. } => 16,
            #[cfg(feature = "cuda")]
            Device::Cuda { .. } => 256,
            #[cfg(feature = "wgpu")]
            Device::Wgpu { .. } => 64,
        }
    }

    /// What networks are trained and evaluated with.
    pub fn precision(&self) -> Precision {
        match self {
            Device::Cpu {
                precision: Precision::Bf16,
            } if has_bf16() => Precision::Bf16,
            Device::Cpu { .. } => Precision::F32,
            #[cfg(feature = "cuda")]
            Device::Cuda { precision, .. } => *precision,
            #[cfg(feature = "wgpu")]
            Device::Wgpu { .. } => Precision::F32,
        }
    }

    /// What it is, whichever of its kind: ranks need the same.
    pub fn kind(&self) -> String {
        match self {
            Device::Cpu { .. } => match self.precision() {
                Precision::F32 => "cpu".into(),
                precision => format!("cpu {precision}"),
            },
            #[cfg(feature = "cuda")]
            Device::Cuda { precision, .. } => format!("cuda {precision}"),
            #[cfg(feature = "wgpu")]
            Device::Wgpu { .. } => "wgpu".into(),
        }
    }

    /// What makes training and evaluation many times slower by not being there, and how to get it.
    pub fn lacks(&self) -> Option<DeviceError> {
        match self {
            Device::Cpu { .. } => None,
            #[cfg(feature = "cuda")]
            Device::Cuda { .. } => Some(pixelcnn_cuda::expect_cudnn().err()?.into()),
            #[cfg(feature = "wgpu")]
            Device::Wgpu { number } => {
                let adapter = pixelcnn_wgpu::adapters().get(*number)?;
                let is_cpu = adapter.kind == pixelcnn_wgpu::Kind::Cpu;
                is_cpu.then(|| pixelcnn_wgpu::WgpuError::IsCpu(adapter.name.clone()).into())
            }
        }
    }

    /// Shards into which a batch of so many images can be cut without training taking longer.
    pub fn free_shards(&self, config: &ModelConfig, images: usize) -> usize {
        match self {
            Device::Cpu { .. } => free_shards(config, images),
            #[cfg(feature = "cuda")]
            Device::Cuda { .. } => 1,
            #[cfg(feature = "wgpu")]
            Device::Wgpu { .. } => 1,
        }
    }

    /// An engine on the device.
    ///
    /// # Errors
    /// A configuration that no model can have, or a device that can't be used.
    pub fn engine(&self, config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
        match self {
            Device::Cpu { .. } => Ok(Box::new(Cpu::in_precision(config, self.precision())?)),
            #[cfg(feature = "cuda")]
            Device::Cuda { number, precision } => {
                let cache = cuda_cache();
                let cuda = pixelcnn_cuda::Cuda::new(config, *number, *precision, cache.as_deref())?;
                Ok(Box::new(cuda))
            }
            #[cfg(feature = "wgpu")]
            Device::Wgpu { number } => Ok(Box::new(pixelcnn_wgpu::Wgpu::new(config, *number)?)),
        }
    }
}

/// Runs a program where the CPU's kernels are fastest: on a thread of a pool of `threads` (0: one
/// for each core), so that none of them waits to be handed over to one, and with freed memory kept.
/// To be called once, at the start of `main`.
///
/// # Errors
/// [`DeviceError::Threads`].
pub fn on_threads<R: Send>(
    threads: usize,
    program: impl FnOnce() -> R + Send,
) -> Result<R, DeviceError> {
    make_threads(threads)?;
    Ok(rayon::scope(|_| program()))
}

/// Makes the pool of [`on_threads`] for a program whose own thread waits, as a server's does: one that belonged
/// to the pool would be missing there.
///
/// # Errors
/// [`DeviceError::Threads`].
pub fn make_threads(threads: usize) -> Result<(), DeviceError> {
    keep_freed_memory();
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(16 << 20)
        .build_global()
        .map_err(|error| DeviceError::Threads(error.to_string()))
}

/// Lets glibc's allocator keep what is freed: every step needs the same large maps again, and
/// handing them back to the system costs a page fault for each 4 KB of them.
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two integers, sets the allocator's own parameters alone, and locks.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_computes_in_what_it_can() {
        let found = [Precision::F32, Precision::Tf32, Precision::Bf16]
            .map(|precision| Device::Cpu { precision }.kind());
        let bf16 = if has_bf16() { "cpu bf16" } else { "cpu" };
        assert_eq!(found, ["cpu", "cpu", bf16]);
    }

    #[test]
    fn names_are_devices_or_say_what_there_is() {
        assert_eq!(parse("cpu"), Ok(Device::CPU));
        for found in devices().unwrap() {
            assert_eq!(parse(&found.device.to_string()), Ok(found.device));
        }
        assert!(parse("auto").is_ok());
        for wrong in ["", "gpu", "cpu:1", "cuda:", "cuda:-1", "cuda1", "wgpu:"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("cpu") && error.contains(wrong), "{error}");
        }
        #[cfg(feature = "cuda")]
        assert!(matches!(parse("cuda:1000"), Err(DeviceError::Cuda(_))));
        #[cfg(feature = "wgpu")]
        assert!(matches!(parse("wgpu:1000"), Err(DeviceError::Wgpu(_))));
    }
}
