//! The server: an address, connections, and what is common to all requests.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http_body_util::BodyExt;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, watch};
use tokio::time::{interval, timeout};
use tokio_io_timeout::TimeoutStream;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;

use crate::counters::{self, Counters};
use crate::guard::{self, Guard};
use crate::models::{Models, Source};
use crate::problem::Problem;
use crate::room::Room;
use crate::runs::Runs;
use crate::{App, api, limits, memory, page};

/// What is served, and to whom.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to listen.
    pub address: SocketAddr,
    /// What clients have to know. Without one, a server that others can reach makes one.
    pub token: Option<String>,
    /// The models; the first one is meant by requests that name none.
    pub models: Vec<Source>,
    /// Run folders and folders of such.
    pub runs: Vec<PathBuf>,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address can't be had.
    #[error("cannot listen at {address}: {source}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// A model can't be read.
    #[error("{0}")]
    Model(String),
    /// The system refuses.
    #[error("cannot serve: {0}")]
    System(#[from] io::Error),
}

/// A server that listens, and does not answer yet.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
}

#[derive(OpenApi)]
#[openapi(info(
    title = "pixelcnn",
    description = "PixelCNN++ models: draw, complete, score and compress images, and see trainings go. \
                   Images are picture files in base64 or arrays; errors are problem details (RFC 9457)."
))]
struct Description;

impl Server {
    /// Takes the address, and reads the models that are named as files.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn new(options: Options) -> Result<Server, ServeError> {
        let address = options.address;
        let listen = || {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|source| ServeError::Address { address, source })?;
        let loopback = address.ip().is_loopback();
        let token = match options.token {
            None if !loopback => Some(guard::new_token()?),
            token => token,
        };
        let models = Models::new(options.models);
        for (name, source) in models.list() {
            // Better to hear it now. Runs change, and may have nothing yet.
            if matches!(source, Source::File(_)) {
                let opened = models.get(Some(&name));
                opened.map_err(|problem| ServeError::Model(problem.detail))?;
            }
        }
        let app = Arc::new(App {
            models,
            runs: Runs::new(options.runs),
            room: Room::open()?,
            guard: Guard {
                loopback,
                token,
                cookie: format!("pixelcnn-{}", listener.local_addr()?.port()),
            },
            counters: Counters::new(),
            bodies: Arc::new(Semaphore::new(limits::BODIES >> 10)),
            made: Arc::new(Semaphore::new(limits::BODIES >> 10)),
            ends: watch::Sender::new(false),
        });
        app.look();
        Ok(Server { listener, app })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of the system.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What clients have to know.
    pub fn token(&self) -> Option<&str> {
        self.app.guard.token.as_deref()
    }

    /// Answers until `stop` says so; then gives what is being sent a few seconds to be taken.
    ///
    /// # Errors
    /// [`ServeError::System`].
    pub fn run(self, stop: impl Fn() -> bool) -> Result<(), ServeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(8)
            .enable_io()
            .enable_time()
            .build()?;
        let done = runtime.block_on(serve(self.listener, Arc::clone(&self.app), stop));
        self.app.room.close();
        // Work that looks up at its next row need not be waited for.
        runtime.shutdown_timeout(Duration::from_secs(1));
        Ok(done?)
    }
}

async fn serve(listener: TcpListener, app: Arc<App>, stop: impl Fn() -> bool) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = router(Arc::clone(&app));
    let connections = Arc::new(Semaphore::new(limits::CONNECTIONS));
    let open = GracefulShutdown::new();
    let mut look = interval(Duration::from_millis(50));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits::HEADERS_IN)
        .max_buf_size(64 << 10);
    while !stop() {
        let taken = tokio::select! {
            _ = look.tick() => continue,
            // Whoever comes when all are taken waits in the system's queue.
            taken = take(&listener, &connections) => taken,
        };
        let (stream, permit) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                // Such as too many open files: others may close some.
                tracing::warn!(%error, "cannot take a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits::TAKEN_IN));
        let service = TowerToHyperService::new(router.clone());
        let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // Clients that vanish are no trouble of ours.
            let _ = connection.await;
            drop(permit);
        });
    }
    app.ends.send_replace(true);
    app.room.close();
    let _ = timeout(Duration::from_secs(3), open.shutdown()).await;
    Ok(())
}

async fn take(
    listener: &tokio::net::TcpListener,
    connections: &Arc<Semaphore>,
) -> io::Result<(tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(connections).acquire_owned().await;
    let permit = permit.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Rows are small, and wanted at once.
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

fn router(app: Arc<App>) -> Router {
    let (api, description) = OpenApiRouter::with_openapi(Description::openapi())
        .merge(api::routes())
        .split_for_parts();
    let description = Arc::new(description);
    let api = api
        // Its own limit is smaller.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(&app), body));
    Router::new()
        .merge(api)
        .merge(page::routes())
        .route(
            "/openapi.json",
            get(move || async move { axum::Json(description.as_ref().clone()) }),
        )
        .route("/healthz", get(async || "ok\n"))
        .route("/metrics", get(counters::metrics))
        .fallback(async || Problem::missing("there is nothing here: see /openapi.json"))
        .method_not_allowed_fallback(async || {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "not by this method: see /openapi.json",
            )
        })
        .layer(CatchPanicLayer::custom(|_| {
            Problem::ours("something went wrong here").into_response()
        }))
        .layer(from_fn_with_state(Arc::clone(&app), guard::guard))
        .layer(from_fn_with_state(Arc::clone(&app), counters::count))
        .with_state(app)
}

/// Takes a request's body in: it must come in time, and all together are no more than memory has room for.
async fn body(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let size = match length(request.headers()) {
        Some(size) if size > limits::BODY => {
            return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, limits::too_large())
                .into_response();
        }
        Some(size) => size,
        None if request.headers().contains_key(header::TRANSFER_ENCODING) => limits::BODY,
        None => 0,
    };
    let room = match memory(&app.bodies, size).await {
        Ok(room) => room,
        Err(problem) => return problem.into_response(),
    };
    let (parts, body) = request.into_parts();
    let body = match timeout(limits::BODY_IN, axum::body::to_bytes(body, limits::BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) => {
            return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, limits::too_large())
                .into_response();
        }
        Err(_) => {
            return Problem::new(StatusCode::REQUEST_TIMEOUT, "the request came too slowly")
                .into_response();
        }
    };
    let response = next.run(Request::from_parts(parts, body.into())).await;
    // What was sent may be held until all is answered.
    response.map(|body| {
        Body::new(body.map_frame(move |frame| {
            let _held = &room;
            frame
        }))
    })
}

fn length(headers: &HeaderMap) -> Option<usize> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}
