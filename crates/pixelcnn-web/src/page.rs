//! The page: files that are part of the program.

use axum::Router;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;

use crate::App;
use std::sync::Arc;

/// Path, kind, contents.
const FILES: [(&str, &str, &[u8]); 10] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_bytes!("page/index.html"),
    ),
    (
        "/style.css",
        "text/css; charset=utf-8",
        include_bytes!("page/style.css"),
    ),
    (
        "/icon.svg",
        "image/svg+xml",
        include_bytes!("page/icon.svg"),
    ),
    ("/main.js", JS, include_bytes!("page/main.js")),
    ("/common.js", JS, include_bytes!("page/common.js")),
    ("/draw.js", JS, include_bytes!("page/draw.js")),
    ("/complete.js", JS, include_bytes!("page/complete.js")),
    ("/score.js", JS, include_bytes!("page/score.js")),
    ("/compress.js", JS, include_bytes!("page/compress.js")),
    ("/training.js", JS, include_bytes!("page/training.js")),
];

const JS: &str = "text/javascript; charset=utf-8";

/// A path for each file.
pub fn routes() -> Router<Arc<App>> {
    FILES
        .into_iter()
        .fold(Router::new(), |router, (path, kind, file)| {
            let headers = [
                (header::CONTENT_TYPE, kind),
                (header::CACHE_CONTROL, "no-cache"),
            ];
            router.route(
                path,
                get(move || async move { (headers, file).into_response() }),
            )
        })
}
