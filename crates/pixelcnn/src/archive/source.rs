//! Where archives come from.

use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};

/// Bytes that can be had by their place: of a file, or of a pipe as long as nobody has asked for later ones to
/// begin with.
pub trait Source {
    /// The bytes from a place on: as many, or those that there are.
    ///
    /// # Errors
    /// Whatever the system reports.
    fn bytes(&mut self, at: u64, len: u64) -> io::Result<Vec<u8>>;

    /// Nothing before this place will be asked for any more.
    ///
    /// # Errors
    /// Whatever the system reports.
    fn forget(&mut self, before: u64) -> io::Result<()>;

    /// Bytes in all, where that is known.
    ///
    /// # Errors
    /// Whatever the system reports.
    fn size(&mut self) -> io::Result<Option<u64>>;
}

fn seek_and_read(source: &mut (impl Read + Seek), at: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // No file is that long.
    if at > i64::MAX as u64 {
        return Ok(bytes);
    }
    source.seek(SeekFrom::Start(at))?;
    // Grows with what is there, whatever is asked for.
    source.take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

macro_rules! seekable {
    ($($source:ty),*) => {$(
        impl Source for $source {
            fn bytes(&mut self, at: u64, len: u64) -> io::Result<Vec<u8>> {
                seek_and_read(self, at, len)
            }

            fn forget(&mut self, _: u64) -> io::Result<()> {
                Ok(())
            }

            fn size(&mut self) -> io::Result<Option<u64>> {
                self.seek(SeekFrom::End(0)).map(Some)
            }
        }
    )*};
}

seekable!(File, Cursor<Vec<u8>>, Cursor<&[u8]>);

impl<S: Source + ?Sized> Source for Box<S> {
    fn bytes(&mut self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        (**self).bytes(at, len)
    }

    fn forget(&mut self, before: u64) -> io::Result<()> {
        (**self).forget(before)
    }

    fn size(&mut self) -> io::Result<Option<u64>> {
        (**self).size()
    }
}

/// What comes only once, one byte after the other: read no further than what is asked for.
#[derive(Debug)]
pub struct Pipe<R> {
    source: R,
    /// The place of the first byte that is kept.
    start: u64,
    kept: Vec<u8>,
}

impl<R: Read> Pipe<R> {
    /// What comes from `source`.
    pub fn new(source: R) -> Pipe<R> {
        Pipe {
            source,
            start: 0,
            kept: Vec::new(),
        }
    }
}

impl<R: Read> Source for Pipe<R> {
    fn bytes(&mut self, at: u64, len: u64) -> io::Result<Vec<u8>> {
        let from = at
            .checked_sub(self.start)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let end = from.saturating_add(len);
        let missing = end.saturating_sub(self.kept.len() as u64);
        self.source
            .by_ref()
            .take(missing)
            .read_to_end(&mut self.kept)?;
        let there = |place: u64| place.min(self.kept.len() as u64) as usize;
        Ok(self.kept[there(from)..there(end)].to_vec())
    }

    fn forget(&mut self, before: u64) -> io::Result<()> {
        let gone = before.saturating_sub(self.start);
        let forgotten = self.kept.len().min(gone as usize);
        // What is left is moved, so not each time.
        if 2 * forgotten >= self.kept.len() {
            self.kept.drain(..forgotten);
            self.start += forgotten as u64;
        }
        if self.kept.is_empty() {
            let skipped = before.saturating_sub(self.start);
            let skipped = io::copy(&mut self.source.by_ref().take(skipped), &mut io::sink())?;
            self.start += skipped;
        }
        Ok(())
    }

    fn size(&mut self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}
