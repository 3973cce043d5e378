//! Threads that work on one thing together for as long as a run lasts. They wait for each other by
//! looking: between two layers there are microseconds, in which no thread can be put to sleep and
//! woken up again.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Looks before a thread lets others have its processor.
const SPINS: usize = 200;
/// Times that an idle thread does so before it sleeps.
const YIELDS: usize = 1_000;

/// What is said where a thread has panicked.
const PANICKED: &str = "a thread of the incremental evaluator panicked";

/// A team of the calling thread and some workers.
pub(super) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

type Job = *const (dyn Fn(Member) + Sync);

/// One thread of a team at work.
pub(super) struct Member<'a> {
    /// Its number, from 0 for the calling thread.
    pub index: usize,
    shared: &'a Shared,
}

struct Shared {
    size: usize,
    /// What is to be done; written by the caller while no worker is busy.
    job: UnsafeCell<Option<Job>>,
    /// Number of the job.
    number: AtomicUsize,
    /// Workers that have not finished it.
    busy: AtomicUsize,
    /// Threads that have come to the barrier, counted over all times.
    arrived: AtomicUsize,
    /// A thread has panicked: nobody may wait for it.
    broken: AtomicBool,
    stop: AtomicBool,
    /// Workers that sleep.
    asleep: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is the only part that is not shareable by itself; it is written before `number` is
// raised and read after that was seen, and not written again before every worker is done with it.
unsafe impl Sync for Shared {}
// SAFETY: the job is a closure that is `Sync`, called while its owner waits.
unsafe impl Send for Shared {}

impl Team {
    /// A team of `size` threads, the caller among them; fewer where the system gives no more.
    pub fn new(size: usize) -> Team {
        let mut shared = Arc::new(Shared::new(size));
        let mut workers = Vec::new();
        for index in 1..size {
            let worker = Arc::clone(&shared);
            let spawned = thread::Builder::new()
                .name(format!("pixelcnn-{index}"))
                .spawn(move || worker.work(index));
            match spawned {
                Ok(handle) => workers.push(handle),
                Err(_) => {
                    // Nobody may wait for a thread that is not there.
                    drop(Team { shared, workers });
                    shared = Arc::new(Shared::new(1));
                    workers = Vec::new();
                    break;
                }
            }
        }
        Team { shared, workers }
    }

    /// Threads in the team.
    pub fn size(&self) -> usize {
        self.shared.size
    }

    /// Calls `job` on every thread of the team, and returns when all have returned.
    ///
    /// # Panics
    /// If one of them panics, or has panicked before: then the barrier's count is off, and nobody
    /// would be waited for.
    pub fn run(&mut self, job: &(dyn Fn(Member) + Sync)) {
        let shared = &*self.shared;
        assert!(!shared.broken.load(Ordering::Relaxed), "{PANICKED}");
        // SAFETY: the workers are idle, since this function waits for them below; it does not
        // return or unwind before they are done, so that the job outlives its use.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<
                *const (dyn Fn(Member) + Sync + '_),
                *const (dyn Fn(Member) + Sync + 'static),
            >(job));
        }
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.number.fetch_add(1, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            let _guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| job(Member { index: 0, shared })));
        if outcome.is_err() {
            shared.broken.store(true, Ordering::Relaxed);
        }
        let mut wait = Wait::default();
        while shared.busy.load(Ordering::Acquire) > 0 {
            wait.a_little();
        }
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
        assert!(!shared.broken.load(Ordering::Relaxed), "{PANICKED}");
    }
}

impl Member<'_> {
    /// Waits until every thread of the team has come here as often as this one.
    ///
    /// # Panics
    /// If another thread panics instead of coming.
    pub fn barrier(&self) {
        let shared = self.shared;
        if shared.size == 1 {
            return;
        }
        let arrived = shared.arrived.fetch_add(1, Ordering::AcqRel);
        // All arrivals of this round, and of those before it. The count never wraps: 2^63
        // arrivals take centuries.
        let complete = (arrived / shared.size + 1) * shared.size;
        let mut wait = Wait::default();
        while shared.arrived.load(Ordering::Acquire) < complete {
            if wait.a_little() {
                let broken = shared.broken.load(Ordering::Relaxed);
                assert!(!broken, "{PANICKED}");
            }
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.number.fetch_add(1, Ordering::SeqCst);
        {
            let lock = &self.shared.lock;
            let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // Its panics were reported by `run`.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn new(size: usize) -> Shared {
        Shared {
            size,
            job: UnsafeCell::new(None),
            number: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            arrived: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// A worker's life.
    fn work(&self, index: usize) {
        for number in 1.. {
            self.wait_for(number);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let run = || {
                // SAFETY: the number was raised, so the job is written; and it lives until this
                // worker is no longer busy.
                unsafe {
                    if let Some(job) = *self.job.get() {
                        (*job)(Member {
                            index,
                            shared: self,
                        });
                    }
                }
            };
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                self.broken.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    fn wait_for(&self, number: usize) {
        let due = || self.number.load(Ordering::SeqCst) >= number;
        let (mut wait, mut yields) = (Wait::default(), 0);
        while !due() {
            yields += usize::from(wait.a_little());
            if yields == YIELDS {
                let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                // Either the caller sees this worker asleep or the worker sees the job.
                self.asleep.fetch_add(1, Ordering::SeqCst);
                while !due() {
                    guard = self
                        .wake
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                self.asleep.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

/// Waiting by looking.
#[derive(Default)]
struct Wait {
    looks: usize,
}

impl Wait {
    /// Waits a moment; says whether that let others have the processor.
    fn a_little(&mut self) -> bool {
        self.looks += 1;
        if self.looks < SPINS {
            std::hint::spin_loop();
            false
        } else {
            thread::yield_now();
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_thread_works_and_waits_for_the_others() {
        for size in [1, 2, 5] {
            let mut team = Team::new(size);
            let seen: Vec<AtomicUsize> = (0..size).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=50 {
                team.run(&|member| {
                    for step in 1..=3 {
                        seen[member.index].fetch_add(1, Ordering::Relaxed);
                        member.barrier();
                        for seen in &seen {
                            let expected = 3 * (round - 1) + step;
                            assert_eq!(seen.load(Ordering::Relaxed), expected);
                        }
                        member.barrier();
                    }
                });
                if round == 25 {
                    // Long enough that workers fall asleep.
                    thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    #[test]
    fn a_panic_is_passed_on_instead_of_waited_for() {
        for victim in 0..3 {
            let mut team = Team::new(3);
            let run = || {
                team.run(&|member| {
                    assert_ne!(member.index, victim);
                    member.barrier();
                });
            };
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            // Nor can it be used again.
            let again = || team.run(&|member| member.barrier());
            assert!(catch_unwind(AssertUnwindSafe(again)).is_err());
        }
    }
}
