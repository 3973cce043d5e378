//! Long work that does not hold Python up: its other threads run meanwhile, and Ctrl-C is heeded.
//!
//! The work is done by a pool of threads, where the library's kernels are fastest; the thread that asked for it
//! waits, for it alone may look after Python's signals and call Python's functions. Each work has a pool of its
//! own for as long as it takes: two on one pool could wait for one another.

use std::any::Any;
use std::mem;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// How often signals are looked after.
const TICK: Duration = Duration::from_millis(50);

/// Pools without work, and the process that has made them.
static IDLE: Mutex<(u32, Vec<ThreadPool>)> = Mutex::new((0, Vec::new()));

/// A pool that is this work's alone.
struct Threads(Option<ThreadPool>);

impl Threads {
    fn take() -> PyResult<Threads> {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        let own = process::id();
        if idle.0 != own {
            // The threads of a process that was forked into this one are not here: they can't be ended.
            mem::forget(mem::replace(&mut *idle, (own, Vec::new())));
        }
        if let Some(pool) = idle.1.pop() {
            return Ok(Threads(Some(pool)));
        }
        drop(idle);
        let pool = ThreadPoolBuilder::new().stack_size(16 << 20).build();
        let pool = pool.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        Ok(Threads(Some(pool)))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
        idle.1.extend(self.0.take());
    }
}

/// Whether work is to stop.
#[derive(Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Breaks once it is.
    pub fn flow(&self) -> ControlFlow<()> {
        match self.0.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// Does some work; Ctrl-C stops it.
///
/// # Errors
/// What Ctrl-C raised, whatever the work came to.
pub fn work<T: Send>(py: Python<'_>, f: impl FnOnce(&Stop) -> T + Send) -> PyResult<T> {
    let hear = |_: Python, ()| Ok(ControlFlow::Continue(()));
    work_and_tell(py, |stop, _| f(stop), hear)
}

/// Told of something by the work, which then hears whether to go on.
pub type Tell<'a, M> = dyn FnMut(M) -> ControlFlow<()> + Send + 'a;

enum Said<M, T> {
    Something(M, Sender<ControlFlow<()>>),
    Done(thread::Result<T>),
}

/// Does some work that tells the thread that asked for it how it goes; Ctrl-C and whatever `hear` raises
/// stop it.
///
/// # Errors
/// What was raised, whatever the work came to.
pub fn work_and_tell<M: Send, T: Send>(
    py: Python<'_>,
    f: impl FnOnce(&Stop, &mut Tell<M>) -> T + Send,
    mut hear: impl FnMut(Python<'_>, M) -> PyResult<ControlFlow<()>>,
) -> PyResult<T> {
    let threads = Threads::take()?;
    let pool = threads.0.as_ref().expect("it is given back at the end");
    let stop = Stop::default();
    let (sender, receiver) = mpsc::channel();
    let receiver = Mutex::new(receiver);
    let mut raised = None;
    let done = pool.in_place_scope(|scope| {
        let stop = &stop;
        scope.spawn(move |_| {
            let mut tell = |message| {
                let (answer, answered) = mpsc::channel();
                match sender.send(Said::Something(message, answer)) {
                    Ok(()) => answered.recv().unwrap_or(ControlFlow::Break(())),
                    Err(_) => ControlFlow::Break(()),
                }
            };
            let done = catch_unwind(AssertUnwindSafe(|| f(stop, &mut tell)));
            // Whoever asked for it waits for it.
            let _ = sender.send(Said::Done(done));
        });
        loop {
            let said = py.detach(|| {
                let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner);
                receiver.recv_timeout(TICK)
            });
            let heard = match said {
                Ok(Said::Done(done)) => return done,
                Err(RecvTimeoutError::Disconnected) => return Err(Box::new("it is lost")),
                Err(RecvTimeoutError::Timeout) => py.check_signals(),
                Ok(Said::Something(message, answer)) => {
                    let heard = py.check_signals().and_then(|()| hear(py, message));
                    let flow = heard.as_ref().ok().copied();
                    // A worker that is gone needs no answer.
                    let _ = answer.send(flow.unwrap_or(ControlFlow::Break(())));
                    heard.map(|_| ())
                }
            };
            if let Err(error) = heard {
                raised.get_or_insert(error);
                stop.0.store(true, Ordering::Relaxed);
            }
        }
    });
    match (raised, done) {
        (Some(error), _) => Err(error),
        (None, Ok(done)) => Ok(done),
        (None, Err(panic)) => Err(PyRuntimeError::new_err(format!(
            "a fault of pixelcnn's: {}",
            said_by(&*panic)
        ))),
    }
}

/// What a panic says.
fn said_by(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("the work ended without a result")
}

/// Waits for something that another of Python's threads works with. It must be held while work that uses it
/// is asked for, not by that work, so that Ctrl-C is heeded here too.
///
/// # Errors
/// What Ctrl-C raised.
pub fn hold<'a, T: Send>(py: Python<'_>, mutex: &'a Mutex<T>) -> PyResult<MutexGuard<'a, T>> {
    loop {
        match mutex.try_lock() {
            Ok(held) => return Ok(held),
            Err(TryLockError::Poisoned(held)) => return Ok(held.into_inner()),
            Err(TryLockError::WouldBlock) => {
                py.detach(|| thread::sleep(Duration::from_millis(1)));
                py.check_signals()?;
            }
        }
    }
}
