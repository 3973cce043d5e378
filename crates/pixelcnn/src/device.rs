//! Where the network runs, chosen at run time among what this build has.

use pixelcnn_core::ModelConfig;
use pixelcnn_core::cpu::Cpu;
use pixelcnn_core::engine::{Engine, EngineError};

/// Where the network runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, by the hand-written kernels.
    Cpu,
}

/// A device that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A name that no device of this build has.
    #[error("device {0}: this build has none of that name: choose auto or cpu")]
    Name(String),
    /// The system gives no threads for the CPU.
    #[error("threads can't be started: {0}")]
    Threads(String),
}

/// The device of a name: `cpu`; or `auto`, the best that this build has.
///
/// # Errors
/// [`DeviceError::Name`] where this build has none of that name.
pub fn parse(name: &str) -> Result<Device, DeviceError> {
    match name {
        "auto" | "cpu" => Ok(Device::Cpu),
        _ => Err(DeviceError::Name(name.into())),
    }
}

impl Device {
    /// An engine on the device.
    ///
    /// # Errors
    /// A configuration that no model can have.
    pub fn engine(&self, config: &ModelConfig) -> Result<Box<dyn Engine>, EngineError> {
        match self {
            Device::Cpu => Ok(Box::new(Cpu::new(config)?)),
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
    keep_freed_memory();
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(16 << 20)
        .build_global()
        .map_err(|error| DeviceError::Threads(error.to_string()))?;
    Ok(rayon::scope(|_| program()))
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
    fn names_are_devices_or_say_what_there_is() {
        assert_eq!(parse("cpu"), Ok(Device::Cpu));
        assert_eq!(parse("auto"), Ok(Device::Cpu));
        for wrong in ["", "gpu", "cpu:1", "cuda", "wgpu:1"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(
                error.contains("auto or cpu") && error.contains(wrong),
                "{error}"
            );
        }
    }
}
