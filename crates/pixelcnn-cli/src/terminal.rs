//! What the commands share in talking to the terminal: results go to standard output, progress to
//! standard error.

use std::collections::BTreeSet;
use std::env;
use std::error::Error;
use std::fmt::Display;
#[cfg(unix)]
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(unix)]
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, HumanBytes, ProgressBar, ProgressStyle};
use pixelcnn::data::Opening;
use pixelcnn::picture::DroppedCount;

/// The error is one line: what went wrong: what to do.
pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on this process [says](say) and [notes](note) nothing: another one does it for both.
pub fn be_silent() {
    SILENT.store(true, Ordering::Relaxed);
}

fn is_silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// Prints a line of results. A bare [`io::Error`] is an error of standard output, and of nothing
/// else in this program.
pub fn say(line: impl Display) -> Result {
    if is_silent() {
        return Ok(());
    }
    match writeln!(io::stdout(), "{line}") {
        // Whoever could read it is gone, and the program was told to outlive that.
        Err(error) if terminal_is_gone(&error) => Ok(()),
        written => Ok(written?),
    }
}

/// Whether an error of standard output is that of a terminal which was closed.
#[cfg(unix)]
fn terminal_is_gone(error: &io::Error) -> bool {
    use std::os::{fd::AsFd, unix::fs::FileTypeExt};
    let device = || {
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        let metadata = File::from(output).metadata()?;
        Ok::<_, io::Error>(metadata.file_type().is_char_device())
    };
    // A closed terminal is no terminal any more, but still a device.
    error.raw_os_error() == Some(libc::EIO) && device().unwrap_or(false)
}

#[cfg(not(unix))]
fn terminal_is_gone(_: &io::Error) -> bool {
    false
}

/// Whether what is written to standard error may be coloured.
pub fn colours() -> bool {
    let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal() && !refused
}

/// Tells the user something that is not a result.
pub fn note(line: impl Display) {
    if !is_silent() {
        complain(line);
    }
}

/// Tells the user what ends this process, even if it is silent otherwise.
pub fn complain(line: impl Display) {
    // In one piece: a launcher and its other processes may write to the same place. Where standard
    // error is gone, there is nobody to tell.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Tells how many pictures hold something that is not used.
pub fn note_dropped(dropped: DroppedCount) {
    if !dropped.is_empty() {
        note(format_args!("{dropped}: dropped"));
    }
}

/// How often progress is told where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(10);

/// Progress of something long: a bar on a terminal, a plain line now and then elsewhere.
pub struct Bar {
    bar: ProgressBar,
    spoke: Instant,
}

impl Bar {
    /// A bar that appears with the first progress.
    pub fn new() -> Bar {
        let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}");
        let bar = match is_silent() {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(0),
        };
        Bar {
            bar: bar.with_style(style.expect("the template is one")),
            spoke: Instant::now(),
        }
    }

    /// Shows that `done` of `total` is done, in the words of `text`.
    pub fn show(&mut self, done: u64, total: u64, text: impl FnOnce() -> String) {
        if !self.bar.is_hidden() {
            self.bar.set_length(total);
            self.bar.set_position(done);
            self.bar.set_message(text());
        } else if self.spoke.elapsed() >= INTERVAL {
            self.spoke = Instant::now();
            note(text());
        }
    }

    /// Prints a line of results above the bar.
    pub fn say(&self, line: impl Display) {
        // Long work goes on where nobody reads its results any more.
        let _ = self.bar.suspend(|| say(line));
    }

    /// Tells the user something that is not a result, above the bar.
    pub fn note(&self, line: impl Display) {
        self.bar.suspend(|| note(line));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Progress of opening data: of a download. Nothing is shown until something takes time.
pub fn opening() -> impl FnMut(Opening) -> ControlFlow<()> {
    let mut bar = Bar::new();
    // Both splits of a data set may have the same to tell.
    let mut told = BTreeSet::new();
    move |opening| {
        match opening {
            Opening::Downloading { what, done, total } => {
                bar.show(done, total.unwrap_or(0), || match total {
                    Some(total) => format!("{what}: {} of {}", HumanBytes(done), HumanBytes(total)),
                    None => format!("{what}: {}", HumanBytes(done)),
                });
            }
            Opening::Note(text) if !told.contains(&text) => {
                bar.note(&text);
                told.insert(text);
            }
            _ => {}
        }
        interrupted()
    }
}

/// Exit status of a program that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

static INTERRUPT: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C, termination or closing of the terminal says `what_follows`, if that
/// is anything, and makes [`interrupted`] break; Ctrl-C after that leaves at once. Signals that were ignored when the
/// program began (by `nohup`, or in the background of a script) stay ignored.
#[cfg(unix)]
pub fn catch_interrupts(what_follows: &'static str) -> Result {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let heeded = [SIGINT, SIGTERM, SIGHUP].into_iter();
    let heeded = heeded.filter(|&signal| !is_ignored(signal));
    let mut signals = signal_hook::iterator::Signals::new(heeded)
        .map_err(|error| format!("cannot watch for Ctrl-C: {error}"))?;
    // A terminal that is closed may send its signal more than once.
    thread::spawn(move || {
        for signal in signals.forever() {
            interrupt(what_follows, signal == SIGINT);
        }
    });
    Ok(())
}

/// Whether this process ignores a signal.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros are a valid `sigaction`; without a new action, the call only fills it in.
    unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0
            && action.sa_sigaction == libc::SIG_IGN
    }
}

/// From now on the first Ctrl-C says `what_follows` and makes [`interrupted`] break; the second one
/// leaves at once.
#[cfg(not(unix))]
pub fn catch_interrupts(what_follows: &'static str) -> Result {
    ctrlc::set_handler(move || interrupt(what_follows, true))
        .map_err(|error| format!("cannot watch for Ctrl-C: {error}").into())
}

fn interrupt(what_follows: &str, ctrl_c: bool) {
    match INTERRUPT.swap(true, Ordering::Relaxed) {
        false if what_follows.is_empty() => {}
        false => note(format_args!(
            "\n{what_follows}; Ctrl-C again leaves at once"
        )),
        true if ctrl_c => process::exit(INTERRUPTED.into()),
        true => {}
    }
}

/// Breaks once the program is to stop.
pub fn interrupted() -> ControlFlow<()> {
    match INTERRUPT.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// A number with separators: `53,659,080`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// So many of something: `1 image`, `10,000 images`.
pub fn counted(count: usize, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", grouped(count as u64))
}

/// The first few of some numbers: `3, 17`.
pub fn listed(numbers: &[usize]) -> String {
    const MOST: usize = 10;
    let mut list = numbers
        .iter()
        .take(MOST)
        .map(usize::to_string)
        .collect::<Vec<_>>();
    if numbers.len() > MOST {
        list.push("…".into());
    }
    list.join(", ")
}

/// Hours, minutes and seconds.
pub fn duration(seconds: f64) -> impl Display {
    FormattedDuration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// A path as one word of a command that can be pasted into a shell.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (974_856, "974,856"),
            (53_659_080, "53,659,080"),
        ] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(counted(1, "image"), "1 image");
        assert_eq!(counted(10_000, "image"), "10,000 images");
        assert_eq!(listed(&[3, 17]), "3, 17");
        assert_eq!(listed(&[7; 11]), format!("{}…", "7, ".repeat(10)));
    }

    #[test]
    fn paths_stay_one_word() {
        assert_eq!(quoted(Path::new("runs/quick-1")), "runs/quick-1");
        assert_eq!(quoted(Path::new("my run's")), r"'my run'\''s'");
    }
}
