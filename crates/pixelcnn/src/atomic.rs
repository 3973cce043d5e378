//! Files that are either wholly there or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

/// Ends the names of files that are still being written.
const PARTIAL: &str = ".partial";

/// Writes the file at `path` with `contents`: under a temporary name in the same folder, synced to
/// the disk, then renamed, so that whoever opens `path` finds the old file or the whole new one.
///
/// # Errors
/// Whatever `contents` or the file system reports (a full disk, say). The temporary file is then
/// gone and `path` is what it was; only where the last act fails, syncing the folder, is the new
/// file in place already.
pub fn write(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let temporary = create(folder, &format!(".{}.", name.to_string_lossy()))?;
    let mut buffered = BufWriter::with_capacity(1 << 20, temporary.as_file());
    contents(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    sync_folder(folder)
}

/// Removes what killed writers left in `folder`; nobody may be writing there now.
///
/// # Errors
/// Those of listing the folder and removing files.
pub(crate) fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(PARTIAL) && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A temporary file that removes itself, with the permissions of any new file.
fn create(folder: &Path, prefix: &str) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(prefix).suffix(PARTIAL);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

/// Makes a rename in `folder` outlive a power cut. Windows neither needs nor allows it.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for text in ["old", "a longer new one", ""] {
            write(&path, |w| w.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert_eq!(names(folder.path()), ["file"]);
        }
    }

    #[test]
    fn failed_writes_change_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, |w| w.write_all(b"old")).unwrap();
        // The buffer hides the first error until the second write or the flush.
        for written in [0, 1, 100, 3 << 20] {
            let error = write(&path, |w| {
                w.write_all(&vec![7; written])?;
                Err(io::ErrorKind::StorageFull.into())
            })
            .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            assert_eq!(fs::read(&path).unwrap(), b"old");
            assert_eq!(names(folder.path()), ["file"]);
        }
        // A folder in the way: the rename itself fails.
        let taken = folder.path().join("taken");
        fs::create_dir_all(taken.join("inside")).unwrap();
        assert!(write(&taken, |w| w.write_all(b"new")).is_err());
        assert_eq!(names(folder.path()), ["file", "taken"]);
        assert!(write(&folder.path().join("missing/file"), |_| Ok(())).is_err());
    }

    #[test]
    fn only_leftovers_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, |w| w.write_all(b"old")).unwrap();
        create(folder.path(), ".file.").unwrap().keep().unwrap();
        fs::write(folder.path().join(".hidden"), b"").unwrap();
        fs::write(folder.path().join("my.partial"), b"").unwrap();
        assert_eq!(names(folder.path()).len(), 4);
        remove_leftovers(folder.path()).unwrap();
        assert_eq!(names(folder.path()), [".hidden", "file", "my.partial"]);
    }

    #[cfg(unix)]
    #[test]
    fn files_have_the_permissions_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let metadata = fs::metadata(folder.path().join(name)).unwrap();
            metadata.permissions().mode()
        };
        write(&folder.path().join("ours"), |_| Ok(())).unwrap();
        fs::write(folder.path().join("usual"), b"").unwrap();
        assert_eq!(mode("ours"), mode("usual"));
    }
}
