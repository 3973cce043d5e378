//! A run's folder: who writes in it, and whether it is free.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use super::checkpoints::CheckpointError;
use crate::atomic;
use crate::weights::safetensors::writing;

/// In a run folder.
pub(crate) const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = ".lock";

/// Holds a run folder for this process, until dropped or until the process ends in any way.
#[derive(Debug)]
#[must_use = "the folder is free again when this is dropped"]
pub struct RunLock {
    _file: File,
}

/// Takes a run folder for this process, so that no two write the same run; creates it if need be,
/// and clears away what killed writers left.
///
/// # Errors
/// [`CheckpointError::Locked`] where another process (or another caller in this one) holds it,
/// [`CheckpointError::File`].
pub fn lock(run_folder: &Path) -> Result<RunLock, CheckpointError> {
    fs::create_dir_all(run_folder).map_err(writing(run_folder))?;
    let path = run_folder.join(LOCK);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(writing(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(CheckpointError::Locked {
                folder: run_folder.into(),
            });
        }
        Err(TryLockError::Error(source)) => return Err(writing(&path)(source).into()),
    }
    for folder in ["", CHECKPOINTS, "samples"].map(|name| run_folder.join(name)) {
        atomic::remove_leftovers(&folder).map_err(writing(&folder))?;
    }
    Ok(RunLock { _file: file })
}

/// Whether a new run can begin in a folder: it is not there yet, is empty, or holds only what is
/// left of a run that ended before anything of it was saved.
///
/// # Errors
/// Those of reading the folder.
pub fn is_free(run_folder: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(run_folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let empty = || Ok::<_, io::Error>(entry.file_type()?.is_dir() && is_free(&entry.path())?);
        let nothing = match entry.file_name().to_str() {
            Some(LOCK) => true,
            Some(CHECKPOINTS) => empty()?,
            _ => atomic::is_leftover(&entry)?,
        };
        if !nothing {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The first folder `runs/NAME-N` that is not there yet.
pub fn first_free(name: &str) -> PathBuf {
    let mut runs = (1..).map(|n| PathBuf::from(format!("runs/{name}-{n}")));
    runs.find(|run| !run.exists()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::names;
    use super::*;

    #[test]
    fn a_folder_without_anything_saved_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        assert!(is_free(&run).unwrap());
        drop(lock(&run).unwrap());
        fs::create_dir(run.join("checkpoints")).unwrap();
        for leftover in [".config.toml.x.partial", "checkpoints/.step-0.x.partial"] {
            fs::write(run.join(leftover), b"").unwrap();
        }
        assert!(is_free(&run).unwrap());
        for file in ["config.toml", "checkpoints/step-0.safetensors", ".hidden"] {
            fs::write(run.join(file), b"").unwrap();
            assert!(!is_free(&run).unwrap(), "{file}");
            fs::remove_file(run.join(file)).unwrap();
        }
        // Whoever takes the folder next clears it.
        fs::create_dir(run.join("samples")).unwrap();
        fs::write(run.join("samples/.step-0.png.x.partial"), b"").unwrap();
        drop(lock(&run).unwrap());
        assert_eq!(names(&run), [".lock", "checkpoints", "samples"]);
        for folder in ["checkpoints", "samples"] {
            assert_eq!(names(&run.join(folder)), [""; 0]);
        }
        fs::write(folder.path().join("file"), b"").unwrap();
        assert!(is_free(&folder.path().join("file")).is_err());
    }

    #[test]
    fn a_run_is_locked_once() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let held = lock(&run).unwrap();
        let error = lock(&run).unwrap_err();
        assert!(matches!(&error, CheckpointError::Locked { folder } if *folder == run));
        drop(held);
        let _again = lock(&run).unwrap();
    }
}
