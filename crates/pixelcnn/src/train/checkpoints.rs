//! The folder of checkpoints that a run keeps.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::state::TrainState;
use crate::atomic;
use crate::weights::safetensors::{FileError, writing};

/// Why a run's checkpoints can't be saved or loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file can't be written or read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The newest checkpoint of a run can't be loaded.
    #[error("{reason}{}", advice(path, previous))]
    Damaged {
        /// The newest checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        reason: FileError,
        /// The newest one before it that is whole.
        previous: Option<PathBuf>,
    },
    /// A run without checkpoints.
    #[error("no checkpoint in `{folder}`: nothing was saved there yet")]
    Empty {
        /// The folder.
        folder: PathBuf,
    },
    /// Another process trains this run.
    #[error("another process is training in `{folder}`: wait for it or choose another run folder")]
    Locked {
        /// The run folder.
        folder: PathBuf,
    },
}

fn advice(path: &Path, previous: &Option<PathBuf>) -> String {
    match previous {
        Some(previous) => format!(
            "; the previous checkpoint `{}` is whole: to go on from it, move `{}` away",
            previous.display(),
            path.display()
        ),
        None => "; no older checkpoint is whole".into(),
    }
}

/// The checkpoints of one run: the last few, `step-00001234.safetensors`, and the best,
/// `best.safetensors`.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints in `folder`, of which the last three are kept.
    pub fn new(folder: impl Into<PathBuf>) -> Checkpoints {
        Checkpoints {
            folder: folder.into(),
            keep: 3,
        }
    }

    /// Keeps the last `keep` (at least one) instead.
    pub fn keep(self, keep: usize) -> Checkpoints {
        let keep = keep.max(1);
        Checkpoints { keep, ..self }
    }

    /// Saves a state and gives the path of its file; then deletes all but the last few. Files of
    /// later steps go too: the run has gone back behind them.
    ///
    /// # Errors
    /// [`FileError::Write`], after which every earlier checkpoint is still there.
    pub fn save(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        let path = self.of(state.step);
        self.write(state, &path)?;
        for (_, later) in self
            .numbered()?
            .iter()
            .filter(|(step, _)| *step > state.step)
        {
            fs::remove_file(later).map_err(writing(later))?;
        }
        self.prune(state.step)?;
        Ok(path)
    }

    /// Saves a state as [`Checkpoints::save`] does. Where the disk is full, earlier ones make room
    /// for it, the oldest first, the newest never.
    ///
    /// # Errors
    /// [`FileError::Write`], after which the newest earlier checkpoint is still there.
    pub(super) fn rescue(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        self.make_room(|| self.save(state))
    }

    fn make_room(
        &self,
        mut save: impl FnMut() -> Result<PathBuf, CheckpointError>,
    ) -> Result<PathBuf, CheckpointError> {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        loop {
            let saved = save();
            let Err(CheckpointError::File(FileError::Write { source, .. })) = &saved else {
                return saved;
            };
            match &self.numbered()?[..] {
                [_newest, .., (_, oldest)]
                    if matches!(source.kind(), StorageFull | QuotaExceeded) =>
                {
                    fs::remove_file(oldest).map_err(writing(oldest))?;
                }
                _ => return saved,
            }
        }
    }

    /// Deletes all but the last few of the checkpoints up to a step: a save that was killed may have
    /// left one more.
    ///
    /// # Errors
    /// [`FileError::Read`], [`FileError::Write`].
    pub(super) fn prune(&self, step: u64) -> Result<(), CheckpointError> {
        let earlier = self.numbered()?.into_iter().filter(|(at, _)| *at <= step);
        for (_, old) in earlier.skip(self.keep) {
            fs::remove_file(&old).map_err(writing(&old))?;
        }
        Ok(())
    }

    /// Saves a state as the best one, which no later [`Checkpoints::save`] deletes.
    ///
    /// # Errors
    /// [`FileError::Write`], after which the best one before it is still there.
    pub fn save_best(&self, state: &TrainState) -> Result<PathBuf, CheckpointError> {
        let path = self.best();
        self.write(state, &path)?;
        Ok(path)
    }

    /// Where [`Checkpoints::save`] writes the state after a step.
    pub(super) fn of(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step:08}.safetensors"))
    }

    /// Where [`Checkpoints::save_best`] writes.
    pub fn best(&self) -> PathBuf {
        self.folder.join("best.safetensors")
    }

    /// The checkpoints of the last steps, newest first.
    ///
    /// # Errors
    /// [`FileError::Read`] where the folder can't be listed.
    pub fn list(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        Ok(self.numbered()?.into_iter().map(|(_, path)| path).collect())
    }

    /// Loads the newest checkpoint and gives the path of its file.
    ///
    /// # Errors
    /// [`CheckpointError::Empty`], or [`CheckpointError::Damaged`] with the newest one that is
    /// whole: going back is for the user to decide.
    pub fn latest(&self) -> Result<(TrainState, PathBuf), CheckpointError> {
        let mut paths = self.list()?.into_iter();
        let Some(path) = paths.next() else {
            return Err(CheckpointError::Empty {
                folder: self.folder.clone(),
            });
        };
        match TrainState::read(&path) {
            Ok(state) => Ok((state, path)),
            Err(reason) => Err(CheckpointError::Damaged {
                path,
                reason,
                previous: paths.find(|path| TrainState::read(path).is_ok()),
            }),
        }
    }

    fn write(&self, state: &TrainState, path: &Path) -> Result<(), CheckpointError> {
        fs::create_dir_all(&self.folder).map_err(writing(&self.folder))?;
        atomic::remove_leftovers(&self.folder).map_err(writing(&self.folder))?;
        Ok(state.write(path)?)
    }

    /// Step and path of the numbered checkpoints, newest first.
    fn numbered(&self) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
        let failed = |source| FileError::Read {
            path: self.folder.clone(),
            source,
        };
        let mut numbered = Vec::new();
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbered),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let step = name
                .strip_prefix("step-")
                .and_then(|name| name.strip_suffix(".safetensors"))
                .and_then(|step| step.parse().ok());
            if let Some(step) = step {
                numbered.push((step, path));
            }
        }
        numbered.sort_by(|a, b| b.cmp(a));
        Ok(numbered)
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{bits, config, names, state};
    use super::*;

    #[test]
    fn the_last_three_and_the_best_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let checkpoints = Checkpoints::new(&run);
        assert!(matches!(
            checkpoints.latest(),
            Err(CheckpointError::Empty { .. })
        ));
        for step in 1..=5 {
            let state = state(config(), step, true);
            let path = checkpoints.save(&state).unwrap();
            if step == 1 {
                checkpoints.save_best(&state).unwrap();
            }
            let (latest, latest_path) = checkpoints.latest().unwrap();
            assert_eq!(latest_path, path);
            assert_eq!(bits(&latest), bits(&state));
            // What a save that was killed leaves behind.
            fs::write(run.join(".step-00000009.safetensors.x.partial"), b"x").unwrap();
        }
        assert_eq!(TrainState::read(&checkpoints.best()).unwrap().step, 1);
        checkpoints.save(&state(config(), 6, true)).unwrap();
        let numbered = [4, 5, 6].map(|step| format!("step-0000000{step}.safetensors"));
        let expected = [&["best.safetensors".to_string()][..], &numbered].concat();
        assert_eq!(names(&run), expected);
        let listed = checkpoints.list().unwrap();
        assert_eq!(listed, [6, 5, 4].map(|n| run.join(&numbered[n - 4])));

        // Gone back to step 4: the files of steps that are no longer part of the run go.
        checkpoints.save(&state(config(), 5, true)).unwrap();
        assert_eq!(names(&run), expected[..3]);
        checkpoints.keep(0).save(&state(config(), 7, true)).unwrap();
        assert_eq!(
            names(&run),
            ["best.safetensors", "step-00000007.safetensors"]
        );
    }

    #[test]
    fn a_damaged_newest_checkpoint_offers_the_newest_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        let paths: Vec<_> = (1..=3)
            .map(|step| checkpoints.save(&state(config(), step, true)).unwrap())
            .collect();
        let damage = |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        };
        let offered = || match checkpoints.latest() {
            Err(CheckpointError::Damaged { path, previous, .. }) => {
                assert_eq!(path, paths[2]);
                previous
            }
            other => panic!("{other:?}"),
        };
        damage(&paths[2]);
        assert_eq!(offered().as_ref(), Some(&paths[1]));
        let text = checkpoints.latest().unwrap_err().to_string();
        let name = |n: usize| paths[n].display();
        assert_eq!(
            text,
            format!(
                "`{}` has been altered (its checksum does not hold); the previous checkpoint \
                 `{}` is whole: to go on from it, move `{}` away",
                name(2),
                name(1),
                name(2)
            )
        );
        fs::write(&paths[1], b"").unwrap();
        assert_eq!(offered().as_ref(), Some(&paths[0]));
        damage(&paths[0]);
        assert_eq!(offered(), None);
    }

    #[test]
    fn on_a_full_disk_old_checkpoints_make_room_for_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(folder.path());
        for step in [1, 2, 3] {
            checkpoints.save(&state(config(), step, true)).unwrap();
        }
        let path = folder.path().join("step-00000004.safetensors");
        let save = |kind: io::ErrorKind, files: usize| {
            checkpoints.make_room(|| match names(folder.path()).len() > files {
                true => Err(writing(&path)(kind.into()).into()),
                false => checkpoints.save(&state(config(), 4, true)),
            })
        };
        save(io::ErrorKind::PermissionDenied, 0).unwrap_err();
        assert_eq!(names(folder.path()).len(), 3);
        assert_eq!(save(io::ErrorKind::StorageFull, 2).unwrap(), path);
        let left = [2, 3, 4].map(|step| format!("step-0000000{step}.safetensors"));
        assert_eq!(names(folder.path()), left);
        save(io::ErrorKind::StorageFull, 0).unwrap_err();
        assert_eq!(names(folder.path()), left[2..]);
    }
}
