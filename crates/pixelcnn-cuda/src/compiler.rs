//! The kernels, compiled for a device by NVRTC and kept for the next time.

use std::ffi::{CStr, CString};
use std::fs;
use std::path::Path;

use cudarc::nvrtc::result::{
    NvrtcError, compile_program, create_program, destroy_program, get_program_log,
};
use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use crate::kernels::SOURCES;
use crate::{CudaError, Precision};

/// Bytes of a checksum.
const CHECKSUM: usize = 32;

/// All kernels, compiled for devices of a compute capability: from `cache` where they were kept
/// there, else to be kept there.
pub(crate) fn compiled(
    capability: (i32, i32),
    precision: Precision,
    cache: Option<&Path>,
) -> Result<Vec<u8>, CudaError> {
    let defined = match precision {
        Precision::Bf16 => "#define BF16\n",
        _ => "",
    };
    let begin = [defined, include_str!("kernels/device.h")];
    let source = [&begin, &SOURCES[..]].concat().concat();
    let (mut major, mut minor) = (0, 0);
    // SAFETY: they live long enough.
    let version = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    version.result().map_err(refused)?;
    let name = Sha256::digest(format!("{major}.{minor} {capability:?} {source}"));
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = cache.map(|folder| folder.join(format!("kernels-{}.cubin", &name[..32])));
    if let Some(kept) = file.as_deref().and_then(kept) {
        return Ok(kept);
    }
    let image = compile(&source, capability)?;
    if let Some(file) = file {
        // Where it can't be kept, it is compiled again.
        let _ = keep(&file, &image);
    }
    Ok(image)
}

/// What was kept, if it is whole.
fn kept(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (checksum, image) = bytes.split_at_checked(CHECKSUM)?;
    (Sha256::digest(image)[..] == *checksum).then(|| image.to_vec())
}

/// Writes it under another name first, since other processes may be at it too.
fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    let bytes = [&Sha256::digest(image)[..], image].concat();
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, file)
}

fn compile(source: &str, (major, minor): (i32, i32)) -> Result<Vec<u8>, CudaError> {
    let source = CString::new(source).map_err(|_| CudaError::Refused("a zero byte".into()))?;
    let program = create_program(&source, Some(c"pixelcnn")).map_err(refused)?;
    let options = [
        format!("--gpu-architecture=sm_{major}{minor}"),
        "--std=c++17".into(),
    ];
    // SAFETY: the program was just created, and is destroyed after its last use.
    unsafe {
        let image = match compile_program(program, &options) {
            Ok(()) => image(program).map_err(refused),
            Err(error) => Err(CudaError::Compile(
                log(program).unwrap_or_else(|| error.to_string()),
            )),
        };
        destroy_program(program).map_err(refused)?;
        image
    }
}

/// # Safety
/// The program is compiled.
unsafe fn image(program: sys::nvrtcProgram) -> Result<Vec<u8>, NvrtcError> {
    let mut size = 0;
    // SAFETY: the size that it says is the size that it writes.
    unsafe {
        sys::nvrtcGetCUBINSize(program, &mut size).result()?;
        let mut image = vec![0u8; size];
        sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
        Ok(image)
    }
}

/// What the compiler says, on one line.
///
/// # Safety
/// The program was compiled, with or without success.
unsafe fn log(program: sys::nvrtcProgram) -> Option<String> {
    // SAFETY: the caller's.
    let log = unsafe { get_program_log(program) }.ok()?;
    // SAFETY: it ends with a zero.
    let log = unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy();
    Some(log.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn refused(error: NvrtcError) -> CudaError {
    CudaError::Refused(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libraries;

    /// Needs NVRTC, no GPU.
    #[test]
    #[ignore = "needs libnvrtc: `pip install nvidia-cuda-nvrtc` in an active environment"]
    fn the_kernels_compile_for_every_device() {
        libraries::load_compiler().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for capability in [(8, 0), (9, 0), (10, 0)] {
            for precision in [Precision::F32, Precision::Bf16] {
                let compiled = || compiled(capability, precision, Some(folder.path())).unwrap();
                let image = compiled();
                assert!(image.starts_with(b"\x7fELF"), "{capability:?}");
                assert_eq!(compiled(), image);
            }
        }
        let kept: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().collect();
        assert_eq!(kept.len(), 6);
    }

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("new/kernels.cubin");
        keep(&file, b"an image").unwrap();
        assert_eq!(kept(&file), Some(b"an image".to_vec()));
        let whole = fs::read(&file).unwrap();
        for at in 0..whole.len() {
            fs::write(&file, &whole[..at]).unwrap();
            assert_eq!(kept(&file), None);
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            fs::write(&file, flipped).unwrap();
            assert_eq!(kept(&file), None);
        }
    }
}
