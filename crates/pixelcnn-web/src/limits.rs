//! What one client, and all together, can ask for.

use std::time::Duration;

/// Bytes of a request.
pub const BODY: usize = 64 << 20;
/// Bytes of all requests that are being read or worked on.
pub const BODIES: usize = 4 * BODY;
/// For a request's headers to come.
pub const HEADERS_IN: Duration = Duration::from_secs(10);
/// For the whole of a request's body to come.
pub const BODY_IN: Duration = Duration::from_secs(60);
/// For a client to take what is sent to it.
pub const TAKEN_IN: Duration = Duration::from_secs(30);
/// For the work of a request, once its turn has come.
pub const DONE_IN: Duration = Duration::from_secs(600);
/// Connections that are open at a time; more wait to be taken.
pub const CONNECTIONS: usize = 512;
/// Requests that wait for their turn.
pub const WAITING: usize = 128;
/// Groups of requests that are worked on at a time.
pub const AT_ONCE: usize = 2;
/// Images of a request, variants of them included.
pub const IMAGES: usize = 64;
/// Images that are drawn or measured side by side.
pub const SIDE_BY_SIDE: usize = 64;
/// The longer side of an image that is drawn.
pub const SIDE: usize = 512;
/// Pixels that a request has drawn.
pub const DRAWN: usize = 1 << 18;
/// Pixels of the images that a request has measured.
pub const MEASURED: usize = 1 << 22;

/// The same where the model has attention: each pixel looks at all before it.
pub const ATTENDED: usize = 1 << 14;
/// Multiply-adds of what is measured in one go: nobody can stop it there.
pub const MULTIPLY_ADDS: u64 = 4_000_000_000_000;
/// Files of a request, and of an archive.
pub const FILES: usize = 1024;
/// Models in memory; others are read again when they are wanted.
pub const MODELS: usize = 4;

/// Pixels of the pictures that a request has compressed or decompressed.
pub const CODED: u64 = 1 << 24;

/// What is said of a body that is too large.
pub fn too_large() -> String {
    format!(
        "a request has at most {} MiB: send less at a time",
        BODY >> 20
    )
}
