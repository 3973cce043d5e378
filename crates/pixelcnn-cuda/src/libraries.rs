//! Where CUDA's libraries are: in the system, in the active Python environment, or in a folder that
//! the user names.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cudarc::{cudnn, driver, nvrtc};
use libloading::Library;

use crate::{CudaError, nccl};

/// A library as it is called, and how to get it.
struct Wanted {
    name: &'static str,
    present: unsafe fn() -> bool,
    /// What its files' names begin with.
    file: &'static str,
    help: &'static str,
}

const DRIVER: Wanted = Wanted {
    name: "the NVIDIA driver (libcuda)",
    present: driver::sys::is_culib_present,
    file: "libcuda.so",
    help: "install the driver of your GPU",
};

const COMPILER: Wanted = Wanted {
    name: "CUDA's run-time compiler (libnvrtc)",
    present: nvrtc::sys::is_culib_present,
    file: "libnvrtc.so",
    help: "install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc` in the Python environment \
           that is active, or name the folder in which it is",
};

const CUDNN: Wanted = Wanted {
    name: "cuDNN (libcudnn)",
    present: cudnn::sys::is_culib_present,
    file: "libcudnn.so",
    help: "install cuDNN 9, or `pip install nvidia-cudnn-cu13` in the Python environment that is \
           active, or name the folder in which it is",
};

const NCCL: Wanted = Wanted {
    name: "NCCL (libnccl)",
    present: nccl::is_present,
    file: "libnccl.so",
    help: "install NCCL 2, or `pip install nvidia-nccl-cu13` in the Python environment that is \
           active, or name the folder in which it is",
};

/// Folders that the user named.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Looks for CUDA's libraries in a folder too, before all others.
pub fn look_in(folder: &Path) {
    let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    folders.insert(0, folder.to_owned());
}

/// Loads what a device needs.
///
/// # Errors
/// [`CudaError::Missing`] with the first library that is not found.
pub(crate) fn load() -> Result<(), CudaError> {
    DRIVER.load()?;
    COMPILER.load()
}

/// Loads the driver alone.
pub(crate) fn load_driver() -> Result<(), CudaError> {
    DRIVER.load()
}

/// Checks that cuDNN is there, without which training and evaluation are many times slower.
///
/// # Errors
/// [`CudaError::Missing`].
pub fn expect_cudnn() -> Result<(), CudaError> {
    CUDNN.load()
}

/// Checks that NCCL is there, without which GPUs can't train together.
///
/// # Errors
/// [`CudaError::Missing`].
pub fn expect_nccl() -> Result<(), CudaError> {
    NCCL.load()
}

/// Loads the compiler alone, which needs no GPU.
#[cfg(test)]
pub(crate) fn load_compiler() -> Result<(), CudaError> {
    COMPILER.load()
}

impl Wanted {
    fn load(&self) -> Result<(), CudaError> {
        let folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        // What is loaded from a folder is found by its name from then on.
        // SAFETY: CUDA's libraries are made to be loaded; so for all below.
        let present = || unsafe { (self.present)() };
        let load_from = |folders: &[PathBuf]| folders.iter().any(|folder| self.load_from(folder));
        load_from(&folders);
        match present() || (load_from(&python_folders()) && present()) {
            true => Ok(()),
            false => Err(CudaError::Missing {
                library: self.name,
                help: self.help,
            }),
        }
    }

    /// Loads the library's file in a folder, for as long as the program runs.
    fn load_from(&self, folder: &Path) -> bool {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let is_it = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(self.file)
        };
        let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_it).collect();
        files.sort();
        files.iter().any(|file| {
            // SAFETY: as in `load`.
            let library = unsafe { Library::new(file) };
            library.map(std::mem::forget).is_ok()
        })
    }
}

/// The folders in which Python's packages of the active environment keep CUDA's libraries.
fn python_folders() -> Vec<PathBuf> {
    let environments = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter();
    let environments = environments.filter_map(env::var_os).map(PathBuf::from);
    let inside = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    let packages = environments
        .flat_map(move |environment| inside(environment.join("lib")))
        .map(|python| python.join("site-packages").join("nvidia"));
    packages
        .flat_map(inside)
        .map(|package| package.join("lib"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        unsafe fn absent() -> bool {
            false
        }
        let wanted = Wanted {
            name: "the library",
            present: absent,
            file: "libnone.so",
            help: "get it",
        };
        let error = wanted.load().unwrap_err().to_string();
        assert_eq!(error, "the library is not found: get it");
    }
}
