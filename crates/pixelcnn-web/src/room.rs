//! Where the work is done: a queue, and threads that take from its front. Requests that can be done side by
//! side, whoever they are of, are done so.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crate::limits;
use crate::problem::{Problem, Result};

/// Work for one request.
pub trait Work: Send + Sized + 'static {
    /// What it has in common with all work that can be done beside it.
    fn group(&self) -> Option<Group>;

    /// The share that it takes of what can be done side by side.
    fn share(&self) -> f64;

    /// What nobody else can have meanwhile, by its number.
    fn needs(&self) -> Option<u64>;

    /// Does work of one group: each gives its result to whoever waits for it.
    fn run(together: Vec<(Self, Arc<Flag>)>);
}

/// Names work that can be done side by side: its kind, the model's number, height and width.
pub type Group = (&'static str, u64, [usize; 2]);

/// Whether work is still wanted.
#[derive(Debug, Default)]
pub struct Flag {
    gone: AtomicBool,
    began: Mutex<Option<Instant>>,
}

impl Flag {
    /// Stops work that nobody waits for, or that takes too long.
    pub fn go_on(&self) -> ControlFlow<()> {
        let began = *self.began.lock().unwrap_or_else(PoisonError::into_inner);
        let is_late = began.is_some_and(|began| began.elapsed() > limits::DONE_IN);
        match self.gone.load(Ordering::Relaxed) || is_late {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// What to say of work that was stopped.
    pub fn stopped() -> Problem {
        let minutes = limits::DONE_IN.as_secs() / 60;
        Problem::busy(format!(
            "stopped: the server ends, or it took more than {minutes} minutes: ask for less at a time"
        ))
    }

    fn begin(&self) {
        *self.began.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn drop_it(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

struct Waiting<W> {
    number: u64,
    flag: Arc<Flag>,
    work: W,
}

struct State<W> {
    waiting: VecDeque<Waiting<W>>,
    /// Flags of what is being done, and what it needs for itself.
    running: Vec<(Arc<Flag>, Option<u64>)>,
    closed: bool,
}

/// The queue.
pub struct Room<W> {
    state: Mutex<State<W>>,
    ready: Condvar,
    next: AtomicU64,
}

/// A place in the queue; dropped, the work is no longer wanted.
pub struct Ticket<W> {
    room: Arc<Room<W>>,
    number: u64,
    flag: Arc<Flag>,
}

impl<W> Ticket<W> {
    /// Requests that come before it; none once it is being done.
    pub fn ahead(&self) -> usize {
        let state = self.room.lock();
        let mut waiting = state.waiting.iter();
        let ahead = waiting.position(|job| job.number == self.number);
        ahead.unwrap_or(0)
    }

    /// Whether no more work is done.
    pub fn is_closed(&self) -> bool {
        self.room.lock().closed
    }
}

impl<W> Drop for Ticket<W> {
    fn drop(&mut self) {
        self.flag.drop_it();
        self.room
            .lock()
            .waiting
            .retain(|job| job.number != self.number);
    }
}

impl<W> Room<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: Work> Room<W> {
    /// A room with threads at work.
    pub fn open() -> std::io::Result<Arc<Room<W>>> {
        let room = Arc::new(Room {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                running: Vec::new(),
                closed: false,
            }),
            ready: Condvar::new(),
            next: AtomicU64::new(0),
        });
        for number in 0..limits::AT_ONCE {
            let room = Arc::clone(&room);
            thread::Builder::new()
                .name(format!("room-{number}"))
                .stack_size(16 << 20)
                .spawn(move || room.work())?;
        }
        Ok(room)
    }

    /// Puts work at the end of the queue.
    ///
    /// # Errors
    /// Where too many wait, or nothing more is done.
    pub fn submit(self: &Arc<Room<W>>, work: W) -> Result<Ticket<W>> {
        let mut state = self.lock();
        if state.closed {
            return Err(Flag::stopped());
        }
        if state.waiting.len() >= limits::WAITING {
            return Err(Problem::busy(format!(
                "{} requests wait already: try again later",
                state.waiting.len()
            )));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let flag = Arc::new(Flag::default());
        state.waiting.push_back(Waiting {
            number,
            flag: Arc::clone(&flag),
            work,
        });
        drop(state);
        self.ready.notify_one();
        Ok(Ticket {
            room: Arc::clone(self),
            number,
            flag,
        })
    }

    /// Ends all work, done or not.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.waiting.clear();
        state.running.iter().for_each(|(flag, _)| flag.drop_it());
        drop(state);
        self.ready.notify_all();
    }

    /// Requests that wait, and those that are being done.
    pub fn counts(&self) -> [usize; 2] {
        let state = self.lock();
        [state.waiting.len(), state.running.len()]
    }

    fn work(&self) {
        while let Some(jobs) = self.next() {
            let flags: Vec<Arc<Flag>> = jobs.iter().map(|job| Arc::clone(&job.flag)).collect();
            flags.iter().for_each(|flag| flag.begin());
            let jobs = jobs.into_iter().map(|job| (job.work, job.flag)).collect();
            if catch_unwind(AssertUnwindSafe(|| W::run(jobs))).is_err() {
                // Who waited for it finds its end closed, and says so.
                tracing::error!("a request's work panicked");
            }
            let is_done = |flag: &Arc<Flag>| flags.iter().any(|done| Arc::ptr_eq(done, flag));
            self.lock().running.retain(|(flag, _)| !is_done(flag));
            // What it needed may be what others wait for.
            self.ready.notify_all();
        }
    }

    /// The first of the queue and all that can be done beside it; none once the room is closed.
    fn next(&self) -> Option<Vec<Waiting<W>>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let next = state
                .waiting
                .iter()
                .position(|job| state.has(job.work.needs()));
            if let Some(first) = next.and_then(|at| state.waiting.remove(at)) {
                let jobs = state.with_others(first);
                let running = jobs
                    .iter()
                    .map(|job| (Arc::clone(&job.flag), job.work.needs()));
                let running: Vec<_> = running.collect();
                state.running.extend(running);
                return Some(jobs);
            }
            state = self
                .ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl<W: Work> State<W> {
    /// Whether nobody has what some work needs for itself.
    fn has(&self, needed: Option<u64>) -> bool {
        let mut running = self.running.iter();
        needed.is_none() || running.all(|(_, taken)| *taken != needed)
    }

    fn with_others(&mut self, first: Waiting<W>) -> Vec<Waiting<W>> {
        let group = first.work.group();
        let mut share = first.work.share();
        let mut jobs = vec![first];
        if group.is_none() {
            return jobs;
        }
        let mut left = VecDeque::new();
        for job in self.waiting.drain(..) {
            let fits = share + job.work.share() <= 1.0;
            match fits && job.work.group() == group {
                true => {
                    share += job.work.share();
                    jobs.push(job);
                }
                false => left.push_back(job),
            }
        }
        self.waiting = left;
        jobs
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    type Run = dyn FnOnce(usize, &Flag) + Send;

    struct Test {
        group: Option<Group>,
        needs: Option<u64>,
        run: Box<Run>,
    }

    impl Work for Test {
        fn group(&self) -> Option<Group> {
            self.group
        }

        fn share(&self) -> f64 {
            0.25
        }

        fn needs(&self) -> Option<u64> {
            self.needs
        }

        fn run(together: Vec<(Self, Arc<Flag>)>) {
            let count = together.len();
            let (first, flag) = together.into_iter().next().unwrap();
            (first.run)(count, &flag);
        }
    }

    fn until_idle(room: &Room<Test>) {
        while room.counts() != [0, 0] {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_can_be_done_side_by_side_is() {
        let room = Room::open().unwrap();
        let (held, (done, told)) = (Arc::new(Mutex::new(())), mpsc::channel());
        let guard = held.lock().unwrap();
        let work = |of: u64| {
            let (held, done) = (Arc::clone(&held), done.clone());
            Test {
                group: Some(("test", of, [4, 4])),
                needs: None,
                run: Box::new(move |count, _| {
                    let _held = held.lock();
                    done.send((of, count)).unwrap();
                }),
            }
        };
        // All threads are held, then the others wait.
        let mut tickets = Vec::new();
        for busy in 1..=limits::AT_ONCE {
            tickets.push(room.submit(work(0)).unwrap());
            while room.counts() != [0, busy] {
                thread::yield_now();
            }
        }
        for of in [1, 1, 2, 1, 1, 1, 1] {
            tickets.push(room.submit(work(of)).unwrap());
        }
        assert_eq!(tickets.last().unwrap().ahead(), 6);
        // Nobody waits for the second any more.
        tickets.remove(limits::AT_ONCE + 1);
        assert_eq!(tickets.last().unwrap().ahead(), 5);
        drop(guard);
        let mut all: Vec<_> = (0..limits::AT_ONCE + 3)
            .map(|_| told.recv().unwrap())
            .collect();
        all.sort();
        assert_eq!(all, [(0, 1), (0, 1), (1, 1), (1, 4), (2, 1)]);
        room.close();
        assert!(room.submit(work(1)).is_err());
    }

    #[test]
    fn the_queue_is_bounded_and_survives_panics() {
        let room = Room::open().unwrap();
        let alone = |run| Test {
            group: None,
            needs: None,
            run,
        };
        for _ in 0..2 * limits::AT_ONCE {
            let panics = Box::new(|_: usize, _: &Flag| panic!("on purpose"));
            let ticket = room.submit(alone(panics)).unwrap();
            until_idle(&room);
            drop(ticket);
        }
        let (go_on, wait) = mpsc::channel::<()>();
        let wait = Arc::new(Mutex::new(wait));
        let mut tickets = Vec::new();
        let refused = loop {
            let wait = Arc::clone(&wait);
            let work = move |count, flag: &Flag| {
                let _ = wait.lock().map(|wait| wait.recv());
                assert!(count == 1 && flag.go_on().is_continue());
            };
            match room.submit(alone(Box::new(work))) {
                Ok(ticket) => tickets.push(ticket),
                Err(problem) => break problem,
            }
        };
        assert_eq!(refused.status, 503);
        assert!((limits::WAITING..=limits::WAITING + limits::AT_ONCE).contains(&tickets.len()));
        drop(go_on);
        while room.counts()[0] > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        drop(tickets);
        until_idle(&room);
    }

    /// Who needs what another one has is passed over, and nobody is kept waiting behind it.
    #[test]
    fn what_can_be_had_once_is() {
        let room = Room::open().unwrap();
        let (held, (done, told)) = (Arc::new(Mutex::new(())), mpsc::channel());
        let guard = held.lock().unwrap();
        let work = |name: u64, needs, waits: bool| {
            let (held, done) = (Arc::clone(&held), done.clone());
            let run = Box::new(move |_: usize, _: &Flag| {
                let _held = waits.then(|| held.lock());
                done.send(name).unwrap();
            });
            Test {
                group: None,
                needs,
                run,
            }
        };
        let mut tickets = Vec::new();
        for (name, needs, waits) in [
            (1, Some(7), true),
            (2, Some(7), false),
            (3, None, false),
            (4, Some(8), false),
        ] {
            tickets.push(room.submit(work(name, needs, waits)).unwrap());
        }
        assert_eq!([told.recv().unwrap(), told.recv().unwrap()], [3, 4]);
        drop(guard);
        assert_eq!([told.recv().unwrap(), told.recv().unwrap()], [1, 2]);
    }
}
