//! The interface for programs, under `/v1`: JSON in, JSON or events out.

mod compress;
mod distribution;
mod draw;
mod models;
mod runs;
mod score;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::App;
use crate::models::Loaded;
use crate::problem::{Problem, Result, waiting};
use crate::room::{Flag, Ticket};
use crate::tasks::{Alone, Task};

/// All paths.
pub fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(models::models))
        .routes(routes!(models::reference))
        .routes(routes!(draw::sample))
        .routes(routes!(draw::complete))
        .routes(routes!(score::score))
        .routes(routes!(distribution::distribution))
        .routes(routes!(compress::compress))
        .routes(routes!(compress::decompress))
        .routes(routes!(runs::runs))
        .routes(routes!(runs::records))
        .routes(routes!(runs::samples))
        .routes(routes!(runs::changes))
}

/// A server-sent event.
#[derive(Debug, ToSchema)]
#[allow(dead_code)] // It is written by `Event`.
struct ServerEvent {
    /// Its kind.
    event: String,
    /// What it tells, as JSON.
    data: String,
}

/// Requests that come before this one.
#[derive(Debug, Serialize, ToSchema)]
struct Queue {
    ahead: usize,
}

/// The share of the work that is done.
#[derive(Debug, Serialize, ToSchema)]
struct Progress {
    share: f64,
}

/// Tells a client that wants to hear it how its request gets on.
struct Teller(Option<mpsc::Sender<Event>>);

impl Teller {
    async fn tell(&self, event: &str, data: &impl Serialize) {
        if let Some(sender) = &self.0 {
            // Who is gone is noticed elsewhere.
            let _ = sender.send(as_event(event, data)).await;
        }
    }
}

fn as_event(name: &str, data: &impl Serialize) -> Event {
    let event = Event::default().event(name);
    event.json_data(data).unwrap_or_else(|error| {
        let event = Event::default().event("problem");
        event.data(error.to_string())
    })
}

/// The outcome of some work: as JSON, or with `stream` as server-sent events: what the work tells, and then
/// `done` with the same JSON, or `problem`. Work that nobody waits for any more is dropped.
async fn answer<T, F>(stream: bool, work: impl FnOnce(Teller) -> F) -> Response
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    if !stream {
        // It may be large.
        let written = match work(Teller(None)).await {
            Ok(outcome) => waiting(move || {
                serde_json::to_vec(&outcome).map_err(|error| Problem::ours(error.to_string()))
            }),
            Err(problem) => return problem.into_response(),
        };
        let headers = [(header::CONTENT_TYPE, "application/json")];
        return match written.await {
            Ok(json) => (headers, json).into_response(),
            Err(problem) => problem.into_response(),
        };
    }
    let (sender, receiver) = mpsc::channel(4);
    let work = work(Teller(Some(sender.clone())));
    tokio::spawn(async move {
        let outcome = tokio::select! {
            () = sender.closed() => return,
            outcome = work => outcome,
        };
        let last = match outcome {
            Ok(outcome) => as_event("done", &outcome),
            Err(problem) => as_event("problem", &problem),
        };
        let _ = sender.send(last).await;
    });
    events(receiver)
}

/// A response of events as they come.
fn events(receiver: mpsc::Receiver<Event>) -> Response {
    let events = stream::unfold(receiver, async |mut receiver| {
        let event = receiver.recv().await?;
        Some((Ok::<_, Infallible>(event), receiver))
    });
    let alive = axum::response::sse::KeepAlive::default();
    Sse::new(events).keep_alive(alive).into_response()
}

/// Work in the queue, and who is told where it is there.
struct Turn<'a> {
    ticket: Ticket<Task>,
    teller: &'a Teller,
}

impl Turn<'_> {
    /// What `next` gives; tells the place in the queue meanwhile.
    async fn wait<T>(&self, next: impl Future<Output = Option<T>>) -> Result<T> {
        tokio::pin!(next);
        let mut look = interval(Duration::from_millis(200));
        look.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut told = 0;
        loop {
            tokio::select! {
                biased;
                result = &mut next => {
                    return result.ok_or_else(|| match self.ticket.is_closed() {
                        true => Flag::stopped(),
                        false => Problem::ours("the work broke off"),
                    });
                }
                _ = look.tick() => {
                    let ahead = self.ticket.ahead();
                    if ahead != told {
                        self.teller.tell("queue", &Queue { ahead }).await;
                        told = ahead;
                    }
                }
            }
        }
    }
}

/// Does something in the queue, by itself, perhaps with a model's network; it may tell the share that is done.
async fn alone<T: Send + 'static>(
    app: &App,
    teller: &Teller,
    network: Option<&Loaded>,
    work: impl FnOnce(&Flag, &mut dyn FnMut(f64)) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, mut result) = oneshot::channel();
    let (share, mut shares) = tokio::sync::watch::channel(0.0);
    let work = move |flag: &Flag| {
        let outcome = work(flag, &mut |done| {
            share.send_replace(done);
        });
        let _ = done.send(outcome);
    };
    let ticket = app.room.submit(Task::Alone(Alone {
        work: Box::new(work),
        network: network.map(|model| model.number),
    }))?;
    let turn = Turn { ticket, teller };
    loop {
        tokio::select! {
            biased;
            outcome = turn.wait(async { (&mut result).await.ok() }) => return outcome?,
            Ok(()) = shares.changed() => {
                let share = *shares.borrow_and_update();
                teller.tell("progress", &Progress { share }).await;
            }
        }
    }
}

/// The model that a request names, read on a thread that may wait.
async fn model(app: &Arc<App>, name: Option<String>) -> Result<Arc<Loaded>> {
    let app = Arc::clone(app);
    waiting(move || app.models.get(name.as_deref())).await
}
