//! `/metrics`: what Prometheus collects.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::App;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    path: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Path {
    path: String,
}

/// What is counted.
pub struct Counters {
    registry: Registry,
    requests: Family<Answered, Counter>,
    seconds: Family<Path, Histogram>,
    waiting: Gauge,
    running: Gauge,
    /// Images that were drawn or measured.
    pub images: Counter,
}

impl Counters {
    /// Nothing was counted yet.
    pub fn new() -> Counters {
        let mut counters = Counters {
            registry: Registry::default(),
            requests: Family::default(),
            seconds: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.001, 4.0, 10))
            }),
            waiting: Gauge::default(),
            running: Gauge::default(),
            images: Counter::default(),
        };
        let registry = &mut counters.registry;
        for (name, help, metric) in [
            (
                "pixelcnn_requests_waiting",
                "Requests in the queue",
                &counters.waiting,
            ),
            (
                "pixelcnn_requests_running",
                "Requests that are being worked on",
                &counters.running,
            ),
        ] {
            registry.register(name, help, metric.clone());
        }
        registry.register(
            "pixelcnn_images",
            "Images drawn or measured",
            counters.images.clone(),
        );
        registry.register(
            "pixelcnn_http_requests",
            "Requests answered",
            counters.requests.clone(),
        );
        registry.register(
            "pixelcnn_http_request_seconds",
            "Seconds until the answer began",
            counters.seconds.clone(),
        );
        counters
    }
}

/// Counts requests, and logs them.
pub async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (method, uri) = (request.method().clone(), request.uri().path().to_owned());
    // As the routes have it: what clients make up would be counted without end.
    let path = request.extensions().get::<MatchedPath>();
    let path = path.map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let (status, seconds) = (response.status().as_u16(), start.elapsed().as_secs_f64());
    tracing::info!(%method, uri, status, seconds, "request");
    let counters = &app.counters;
    counters
        .seconds
        .get_or_create(&Path { path: path.clone() })
        .observe(seconds);
    counters
        .requests
        .get_or_create(&Answered { path, status })
        .inc();
    response
}

/// `/metrics`.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    let counters = &app.counters;
    let [waiting, running] = app.room.counts();
    counters.waiting.set(waiting as i64);
    counters.running.set(running as i64);
    let mut text = String::new();
    match encode(&mut text, &counters.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
