//! `pixelcnn serve`: models over HTTP, and a page that shows them at work.
//!
//! - [`Server`] binds an address and serves until it is told to stop;
//! - `room` is where the work is done: a queue whose front is taken together with all that can be drawn or
//!   measured beside it, whoever asked for it;
//! - `api` is the interface for programs, described at `/openapi.json`; `page` is the page, which uses nothing
//!   else;
//! - `guard` keeps pages of other sites out, and strangers; `limits` says how much one can ask for.

mod api;
mod counters;
mod guard;
mod images;
mod limits;
mod models;
mod page;
mod problem;
mod room;
mod runs;
mod server;
mod tasks;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;

use counters::Counters;
use guard::Guard;
use models::Models;
pub use models::Source;
use problem::{Problem, Result};
use room::Room;
use runs::Runs;
pub use runs::runs_in;
pub use server::{Options, ServeError, Server};
use tasks::Task;

/// What all requests share.
struct App {
    models: Models,
    runs: Runs,
    room: Arc<Room<Task>>,
    guard: Guard,
    counters: Counters,
    /// KiB that requests may take, all together.
    bodies: Arc<Semaphore>,
    /// KiB that what is made of them may take: who has a request in memory waits for it, not for other requests.
    made: Arc<Semaphore>,
    /// Whether the server ends.
    ends: watch::Sender<bool>,
}

impl App {
    /// Looks for runs that are new: they are models, too.
    fn look(&self) {
        let runs: Vec<PathBuf> = self.runs.folders().into_values().collect();
        self.models.add(runs.into_iter().map(Source::Run));
    }

    /// Returns when the server ends.
    async fn ends(&self) {
        let mut ends = self.ends.subscribe();
        // The sender lives as long as the server.
        let _ = ends.wait_for(|ends| *ends).await;
    }
}

/// Holds so many bytes of the memory that all requests together may take, once they are free.
async fn memory(of: &Arc<Semaphore>, bytes: usize) -> Result<OwnedSemaphorePermit> {
    let kib = u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
    match timeout(limits::BODY_IN, Arc::clone(of).acquire_many_owned(kib)).await {
        Ok(Ok(memory)) => Ok(memory),
        _ => Err(Problem::busy("too much is being sent: try again later")),
    }
}
