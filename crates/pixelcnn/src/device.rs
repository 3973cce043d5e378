//! Where the network runs, chosen at run time among what this build has.

pub use burn::tensor::Device;

/// A device that this program can't use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not the name of a device.
    #[error("device {0}: choose auto, cpu, cuda, rocm, metal or wgpu, with :N for the N-th GPU")]
    Unknown(String),
    /// Left out of this build.
    #[error(
        "device {0} is not in this build: build it with `cargo build --release --features {0}`"
    )]
    NotBuilt(&'static str),
}

/// The device of a name: `cpu`; `cuda`, `rocm`, `metal` or `wgpu`, the first two with `:N` for the
/// N-th GPU where there are several; or `auto`, the GPU that the build is for, else the CPU.
///
/// # Errors
/// [`DeviceError`] where there is no such device or this build leaves it out.
pub fn parse(name: &str) -> Result<Device, DeviceError> {
    let unknown = || DeviceError::Unknown(name.into());
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse().map_err(|_| unknown())?),
        None => (name, 0),
    };
    match (kind, index) {
        ("cpu", 0) => Ok(Device::flex()),
        ("auto", 0) => Ok(gpu("cuda", 0)
            .or_else(|_| gpu("rocm", 0))
            .or_else(|_| gpu("metal", 0))
            .or_else(|_| gpu("wgpu", 0))
            .unwrap_or_else(|_| Device::flex())),
        ("cuda" | "rocm", _) | ("metal" | "wgpu", 0) => gpu(kind, index),
        _ => Err(unknown()),
    }
}

#[cfg_attr(
    not(any(feature = "cuda", feature = "rocm")),
    expect(unused_variables, reason = "only these can have several")
)]
fn gpu(kind: &str, index: usize) -> Result<Device, DeviceError> {
    match kind {
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(index)),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(index)),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        "cuda" => Err(DeviceError::NotBuilt("cuda")),
        "rocm" => Err(DeviceError::NotBuilt("rocm")),
        "metal" => Err(DeviceError::NotBuilt("metal")),
        _ => Err(DeviceError::NotBuilt("wgpu")),
    }
}

/// Runs a program where the CPU's kernels are fastest: on a thread of a pool of `threads` (0: one
/// for each core), so that none of them waits to be handed over to one, and with freed memory kept.
/// To be called once, at the start of `main`.
///
/// # Errors
/// Where the threads can't be started.
pub fn on_threads<R: Send>(
    threads: usize,
    program: impl FnOnce() -> R + Send,
) -> Result<R, rayon::ThreadPoolBuildError> {
    keep_freed_memory();
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(16 << 20)
        .build_global()?;
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
    fn names_are_devices_or_say_how_to_build_them() {
        assert_eq!(parse("cpu").unwrap(), Device::flex());
        assert!(parse("auto").is_ok());
        for wrong in ["", "gpu", "cpu:1", "cuda:x", "wgpu:1"] {
            assert_eq!(parse(wrong), Err(DeviceError::Unknown(wrong.into())));
        }
        #[cfg(not(feature = "cuda"))]
        assert!(
            parse("cuda:1")
                .unwrap_err()
                .to_string()
                .contains("--features cuda")
        );
    }
}
