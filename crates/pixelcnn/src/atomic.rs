//! Files that are either wholly there or not at all.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

/// Links that lead to links are followed so far.
const MAX_LINKS: usize = 40;

/// Ends the names of files that are still being written.
const PARTIAL: &str = ".partial";

/// Writes the file at `path` with `contents`: under a temporary name in the same folder, synced to
/// the disk, then renamed, so that whoever opens `path` finds the old file or the whole new one. The
/// file that a link leads to is written, and the link stays; a device or pipe is written into.
///
/// # Errors
/// Whatever `contents` or the file system reports (a full disk, say). The temporary file is then
/// gone and `path` is what it was; only where the last act fails, syncing the folder, is the new
/// file in place already.
pub fn write(
    path: &Path,
    contents: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    if !is_replaced(path) {
        let mut buffered =
            BufWriter::with_capacity(1 << 20, File::options().write(true).open(path)?);
        contents(&mut buffered)?;
        return buffered.flush();
    }
    let path = &end_of_links(path)?;
    if path.file_name().is_none() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let temporary = create(folder)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, temporary.as_file());
    contents(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    sync_folder(folder)
}

/// Whether [`write()`] would put a new file at `path`, in the place of what is there: not where that is
/// a device, pipe or socket, or an open file of the process under its name in `/dev` or `/proc`.
pub fn is_replaced(path: &Path) -> bool {
    // `/dev` has folders of usual files too, such as `/dev/shm`.
    let open = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc"];
    let special = |place: &Path| open.iter().any(|top| place.starts_with(top));
    match fs::metadata(path) {
        Ok(found) => found.is_dir() || found.is_file() && !special(path),
        Err(_) => true,
    }
}

/// Where a chain of links ends, whether or not something is there.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut end = path.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&end) {
            Ok(target) => end = end.parent().unwrap_or(Path::new("")).join(target),
            Err(_) => return Ok(end),
        }
    }
    Err(io::Error::other("too many links"))
}

/// Removes what killed writers left in `folder`, if it is there; nobody may be writing there now.
///
/// # Errors
/// Those of listing the folder and removing files.
pub(crate) fn remove_leftovers(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if is_leftover(&entry)? {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a killed writer left this, or one that is still at work.
///
/// # Errors
/// That of asking what it is.
pub(crate) fn is_leftover(entry: &fs::DirEntry) -> io::Result<bool> {
    let name = entry.file_name();
    let name = name.to_string_lossy();
    Ok(name.starts_with('.') && name.ends_with(PARTIAL) && entry.file_type()?.is_file())
}

/// A temporary file that removes itself, with the permissions of any new file. Its name says nothing
/// of the file's, which may be as long as a name can be.
fn create(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(".").suffix(PARTIAL);
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
        create(folder.path()).unwrap().keep().unwrap();
        fs::write(folder.path().join(".hidden"), b"").unwrap();
        fs::write(folder.path().join("my.partial"), b"").unwrap();
        assert_eq!(names(folder.path()).len(), 4);
        remove_leftovers(folder.path()).unwrap();
        assert_eq!(names(folder.path()), [".hidden", "file", "my.partial"]);
        remove_leftovers(&folder.path().join("missing")).unwrap();
    }

    #[test]
    fn names_may_be_as_long_as_the_system_takes_them() {
        let folder = tempfile::tempdir().unwrap();
        for len in [1, 240, 255] {
            let path = folder.path().join("n".repeat(len));
            write(&path, |w| w.write_all(b"new")).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_and_devices_stay() {
        use std::os::unix::fs::{FileTypeExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("far")).unwrap();
        symlink("far/file", at("dangling")).unwrap();
        symlink("dangling", at("link")).unwrap();
        for text in ["new", "newer"] {
            write(&at("link"), |w| w.write_all(text.as_bytes())).unwrap();
            assert_eq!(fs::read_to_string(at("far/file")).unwrap(), text);
            assert!(at("link").is_symlink() && at("dangling").is_symlink());
        }
        assert_eq!(names(&at("far")), ["file"]);
        symlink("round", at("round")).unwrap();
        assert!(write(&at("round"), |_| Ok(())).is_err());

        // Root may replace a device: it is written into nevertheless.
        symlink("/dev/null", at("null")).unwrap();
        for null in [at("null"), "/dev/null".into()] {
            assert!(!is_replaced(&null));
            write(&null, |w| w.write_all(b"nothing")).unwrap();
        }
        if let Ok(folder) = tempfile::tempdir_in("/dev/shm") {
            let path = folder.path().join("file");
            for text in ["a longer one", "short"] {
                write(&path, |w| w.write_all(text.as_bytes())).unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), text);
            }
        }
        let null = fs::metadata("/dev/null").unwrap();
        assert!(null.file_type().is_char_device());

        let pipe = at("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let (sender, read) = std::sync::mpsc::channel();
        std::thread::spawn({
            let pipe = pipe.clone();
            move || sender.send(fs::read(pipe).unwrap())
        });
        assert!(!is_replaced(&pipe));
        write(&pipe, |w| w.write_all(b"through")).unwrap();
        // Not for ever: nobody would write to a pipe that was replaced.
        let patience = std::time::Duration::from_secs(600);
        assert_eq!(read.recv_timeout(patience).unwrap(), b"through");
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
