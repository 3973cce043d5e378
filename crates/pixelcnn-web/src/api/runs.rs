//! `/v1/runs`: how trainings go, also those of other processes.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use utoipa::IntoParams;

use super::{ServerEvent, as_event, events};
use crate::App;
use crate::problem::{Problem, Result, waiting};
use crate::runs::{self, Overview, Records};

/// List the runs, those that went on last first.
#[utoipa::path(
    get,
    path = "/v1/runs",
    responses((status = 200, description = "The runs", body = Vec<Overview>))
)]
pub async fn runs(State(app): State<Arc<App>>) -> Result<Json<Vec<Overview>>> {
    let all = waiting(move || Ok(app.runs.overviews()));
    all.await.map(Json)
}

/// Which records are wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Wanted {
    /// Those after this step alone.
    #[serde(default)]
    #[param(format = "uint64", maximum = 18446744073709551615_u64)]
    after: u64,
}

/// What a run has recorded.
#[utoipa::path(
    get,
    path = "/v1/runs/{name}",
    params(("name" = String, Path, description = "The run's name"), Wanted),
    responses(
        (status = 200, description = "Its settings and records", body = Records),
        (status = "4XX", description = "No such run", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn records(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    query: std::result::Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Records>> {
    let Query(wanted) =
        query.map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))?;
    let records = waiting(move || {
        let run = app.runs.find(&name)?;
        Records::read(&name, &run, wanted.after)
    });
    records.await.map(Json)
}

/// A picture of samples that a run has drawn.
#[utoipa::path(
    get,
    path = "/v1/runs/{name}/samples/{file}",
    params(
        ("name" = String, Path, description = "The run's name"),
        ("file" = String, Path, description = "One of its `samples`"),
    ),
    responses(
        (status = 200, description = "A PNG file", content_type = "image/png"),
        (status = "4XX", description = "No such picture", body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn samples(
    State(app): State<Arc<App>>,
    Path((name, file)): Path<(String, String)>,
) -> Result<Response> {
    let picture = waiting(move || runs::samples(&app.runs.find(&name)?, &file));
    let headers = [(header::CONTENT_TYPE, "image/png")];
    Ok((headers, picture.await?).into_response())
}

/// Events `changed`, each with the list of runs that went on, began or ended: what to ask for again.
#[utoipa::path(
    get,
    path = "/v1/run-changes",
    responses((status = 200, description = "Events", body = ServerEvent, content_type = "text/event-stream"))
)]
pub async fn changes(State(app): State<Arc<App>>) -> Response {
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut look = interval(Duration::from_secs(1));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = None;
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = app.ends() => return,
                _ = look.tick() => {}
            }
            let app = Arc::clone(&app);
            let Ok(now) = waiting(move || Ok(app.runs.stamps())).await else {
                return;
            };
            let changed: Vec<&String> = match &before {
                None => now.keys().collect(),
                Some(before) => runs::differing(before, &now),
            };
            if before.is_none() || !changed.is_empty() {
                let _ = sender.send(as_event("changed", &changed)).await;
            }
            before = Some(now);
        }
    });
    events(receiver)
}
