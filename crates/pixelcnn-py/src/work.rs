//! Long work, while which Python goes on: its other threads run, and Ctrl-C is heeded.
//!
//! The work is done on a thread of a pool, where the library's kernels are fastest; the thread that asked for
//! it waits, for it alone may look after Python's signals and call Python's functions.

use std::mem;
use std::ops::ControlFlow;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// How often signals are looked after.
const TICK: Duration = Duration::from_millis(50);

/// The threads of this process.
fn pool() -> PyResult<Arc<ThreadPool>> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let mut held = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let own = process::id();
    if let Some((process, pool)) = &*held
        && *process == own
    {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new().stack_size(16 << 20).build();
    let pool = pool.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    let pool = Arc::new(pool);
    // The threads of a process that was forked into this one are not here: they can't be ended.
    mem::forget(held.replace((own, Arc::clone(&pool))));
    Ok(pool)
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

/// Told of something by the work, from which it hears whether to go on.
pub type Tell<'a, M> = dyn FnMut(M) -> ControlFlow<()> + Send + 'a;

enum Said<M, T> {
    Something(M, Sender<ControlFlow<()>>),
    Done(T),
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
    let pool = pool()?;
    let stop = Stop::default();
    let (sender, receiver) = mpsc::channel();
    let receiver = Mutex::new(receiver);
    let mut raised = None;
    let done = pool.in_place_scope(|scope| {
        let stop = &stop;
        scope.spawn(move |_| {
            let mut tell = |message| {
                let (answer, answered) = mpsc::channel();
                if sender.send(Said::Something(message, answer)).is_err() {
                    return ControlFlow::Break(());
                }
                // What hears of it may want work done too, by this very thread if there is no other one.
                loop {
                    match answered.try_recv() {
                        Ok(flow) => return flow,
                        Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
                        Err(TryRecvError::Empty) => {
                            if rayon::yield_now() != Some(rayon::Yield::Executed) {
                                thread::sleep(Duration::from_micros(50));
                            }
                        }
                    }
                }
            };
            let done = f(stop, &mut tell);
            // Whoever asked for it waits for it.
            let _ = sender.send(Said::Done(done));
        });
        loop {
            let said = py.detach(|| {
                let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner);
                receiver.recv_timeout(TICK)
            });
            let heard = match said {
                Ok(Said::Done(done)) => return Some(done),
                // It panicked, which the scope passes on.
                Err(RecvTimeoutError::Disconnected) => return None,
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
        (None, Some(done)) => Ok(done),
        (Some(error), _) => Err(error),
        (None, None) => Err(PyRuntimeError::new_err("the work was lost")),
    }
}

/// Waits for something that another of Python's threads works with. It must be held while work that uses it
/// is asked for, not by that work: two of those could wait for each other on one thread.
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
