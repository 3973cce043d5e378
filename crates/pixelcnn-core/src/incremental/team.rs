//! Threads that work on one thing together for as long as a raster lasts. They wait for each other by
//! looking: between two layers there are microseconds, in which no thread can be put to sleep and
//! woken up again.

// A test tries the orders in which the threads can run, on a model of what they share.
#[cfg(all(test, loom))]
use loom as sys;
#[cfg(not(all(test, loom)))]
use std as sys;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;

#[cfg(all(test, loom))]
use loom::cell::UnsafeCell;
use sys::hint::spin_loop;
use sys::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use sys::sync::{Arc, Condvar, Mutex};
use sys::thread::{self, JoinHandle};

/// Looks before a thread lets others have its processor. Those of the model need not look twice.
const SPINS: usize = if cfg!(all(test, loom)) { 1 } else { 200 };
/// Times that an idle thread does so before it sleeps.
const YIELDS: usize = if cfg!(all(test, loom)) { 1 } else { 1_000 };

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
    /// What is to be done, or nothing any more; written by the caller while no worker is busy.
    job: UnsafeCell<Option<Job>>,
    /// Number of the job.
    number: AtomicUsize,
    /// Workers that have not finished it.
    busy: AtomicUsize,
    /// Threads that have come to the barrier, counted over all times.
    arrived: AtomicUsize,
    /// A thread has panicked: nobody may wait for it.
    broken: AtomicBool,
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
            shared.start(Some(std::mem::transmute::<
                *const (dyn Fn(Member) + Sync + '_),
                *const (dyn Fn(Member) + Sync + 'static),
            >(job)));
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
        // SAFETY: the workers are idle, since `run` has waited for them.
        unsafe { self.shared.start(None) };
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
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Tells the workers what to do; where that is nothing, they end.
    ///
    /// # Safety
    /// They are idle, and the job lives until none is busy with it.
    unsafe fn start(&self, job: Option<Job>) {
        // SAFETY: no worker reads it before the number is raised.
        self.job.with_mut(|place| unsafe { *place = job });
        self.busy.store(self.size - 1, Ordering::Relaxed);
        // Nobody else writes the number.
        let number = self.number.load(Ordering::Relaxed) + 1;
        self.number.store(number, Ordering::Release);
        // Either this thread sees a worker asleep or that worker sees the job.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) > 0 {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// A worker's life.
    fn work(&self, index: usize) {
        for number in 1.. {
            self.wait_for(number);
            // SAFETY: the number was raised, so the job is written, and is not written again while
            // this worker is busy.
            let Some(job) = self.job.with(|job| unsafe { *job }) else {
                return;
            };
            let member = Member {
                index,
                shared: self,
            };
            // SAFETY: the job lives until this worker is no longer busy.
            let run = || unsafe { (*job)(member) };
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                self.broken.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    fn wait_for(&self, number: usize) {
        let due = || self.number.load(Ordering::Acquire) >= number;
        let (mut wait, mut yields) = (Wait::default(), 0);
        while !due() {
            yields += usize::from(wait.a_little());
            if yields == YIELDS {
                let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.asleep.fetch_add(1, Ordering::Relaxed);
                // Pairs with the fence of `start`.
                fence(Ordering::SeqCst);
                while !due() {
                    guard = self
                        .wake
                        .wait(guard)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                self.asleep.fetch_sub(1, Ordering::Relaxed);
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
            spin_loop();
            false
        } else {
            thread::yield_now();
            true
        }
    }
}

/// As the model's cell, which sees when two threads use it at once.
#[cfg(not(all(test, loom)))]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(all(test, loom)))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> UnsafeCell<T> {
        UnsafeCell(std::cell::UnsafeCell::new(value))
    }

    fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

#[cfg(all(test, not(loom)))]
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

/// The model's runs: `RUSTFLAGS="--cfg loom" cargo test --release -p pixelcnn-core --lib loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    /// A count without a lock: the model fails where it is not one thread's at a time.
    struct Count(UnsafeCell<usize>);

    // SAFETY: the model checks it.
    unsafe impl Sync for Count {}

    impl Count {
        fn several(number: usize) -> Vec<Count> {
            (0..number).map(|_| Count(UnsafeCell::new(0))).collect()
        }

        fn add(&self) {
            // SAFETY: the model checks it.
            self.0.with_mut(|count| unsafe { *count += 1 });
        }

        fn get(&self) -> usize {
            // SAFETY: the model checks it.
            self.0.with(|count| unsafe { *count })
        }
    }

    /// Tries all orders in which a thread is interrupted at most so many times.
    fn check(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(preemptions);
        model.check(test);
    }

    fn fails(run: impl FnOnce()) -> bool {
        catch_unwind(AssertUnwindSafe(run)).is_err()
    }

    /// Jobs are done once by each, barriers and ends of jobs show what was done, and a team that
    /// is dropped ends: the model would say that a thread waits for ever.
    fn all_work(size: usize, with_barrier: &'static [bool], preemptions: usize) {
        check(preemptions, move || {
            let mut team = Team::new(size);
            let counts = Count::several(size);
            for (job, &with_barrier) in (1..).zip(with_barrier) {
                team.run(&|member| {
                    counts[member.index].add();
                    if with_barrier {
                        member.barrier();
                        assert!(counts.iter().all(|count| count.get() == job));
                    }
                });
                assert!(counts.iter().all(|count| count.get() == job));
            }
        });
    }

    #[test]
    fn two_work() {
        all_work(2, &[true, false, true], 3);
    }

    #[test]
    fn three_work() {
        // At barriers three wait for each other in too many ways for more.
        all_work(3, &[true, false], 0);
        all_work(3, &[false], 1);
    }

    /// Whoever panics, `run` does too, then and later, and waits for nobody who does not come.
    fn a_panic_is_seen(size: usize, preemptions: usize) {
        for victim in 0..size {
            check(preemptions, move || {
                let mut team = Team::new(size);
                let counts = Count::several(size);
                team.run(&|member| counts[member.index].add());
                assert!(fails(|| team.run(&|member| {
                    counts[member.index].add();
                    assert_ne!(member.index, victim);
                    member.barrier();
                })));
                assert!(counts.iter().all(|count| count.get() == 2));
                assert!(fails(|| team.run(&|_| ())));
            });
        }
    }

    #[test]
    fn two_see_a_panic() {
        a_panic_is_seen(2, 3);
    }

    #[test]
    fn three_see_a_panic() {
        a_panic_is_seen(3, 0);
    }
}
