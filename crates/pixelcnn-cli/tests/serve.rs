//! `pixelcnn serve` as clients have it: good ones and bad ones. The page has a test of its own.
#![cfg(all(unix, feature = "pretrained"))]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pixelcnn::Model;
use pixelcnn::complete::Completion;
use pixelcnn::sample::Sampling;
use serde_json::{Value, json};

/// A server that runs until it is dropped.
struct Server {
    child: Child,
    output: BufReader<ChildStdout>,
    address: String,
    link: String,
}

impl Server {
    fn start(flags: &[&str]) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_pixelcnn"))
            .args(["serve", "--port", "0"])
            .args(flags)
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut link = String::new();
        output.read_line(&mut link).unwrap();
        let link = link.trim().to_owned();
        let address = link.strip_prefix("http://").unwrap();
        let address = address.split('/').next().unwrap().to_owned();
        Server {
            child,
            output,
            address,
            link,
        }
    }

    /// Sends bytes and gives the connection.
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        // A server that refuses early may have closed its side.
        let _ = stream.write_all(bytes);
        stream
    }

    /// The status, head and body of the answer to a request.
    fn exchange(&self, request: &[u8]) -> (u16, String, String) {
        let mut answer = Vec::new();
        self.send(request).read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        (
            status.unwrap_or(0),
            head.to_lowercase(),
            unchunked(head, body),
        )
    }

    fn get(&self, path: &str, headers: &str) -> (u16, String, String) {
        let host = &self.address;
        self.exchange(
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n")
                .as_bytes(),
        )
    }

    fn post_bytes(&self, path: &str, headers: &str, body: &[u8]) -> (u16, String, String) {
        let (host, length) = (&self.address, body.len());
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: \
             {length}\r\n{headers}\r\n"
        );
        self.exchange(&[head.as_bytes(), body].concat())
    }

    /// The answer to JSON.
    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let headers = "Content-Type: application/json\r\n";
        let (status, _, body) = self.post_bytes(path, headers, body.to_string().as_bytes());
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, _, text) = self.get("/metrics", "");
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }

    /// Waits until nothing is worked on.
    fn until_idle(&self) {
        let start = Instant::now();
        while self.metric("pixelcnn_requests_running") + self.metric("pixelcnn_requests_waiting")
            > 0.0
        {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "it is still at work"
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop(&self) {
        // SAFETY: `kill` takes two numbers; the child is not waited for yet.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) };
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A body that came in chunks, as one.
fn unchunked(head: &str, body: &str) -> String {
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return body.to_owned();
    }
    let (mut rest, mut whole) = (body, String::new());
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap_or(0);
        if size == 0 || size > after.len() {
            break;
        }
        whole += &after[..size];
        rest = &after[size + 2..];
    }
    whole
}

/// The events of an answer: names and data.
fn events(body: &str) -> Vec<(String, Value)> {
    let events = body.split("\n\n").filter_map(|event| {
        let name = event
            .lines()
            .find_map(|line| line.strip_prefix("event: "))?;
        let data = event.lines().find_map(|line| line.strip_prefix("data: "))?;
        Some((name.to_owned(), serde_json::from_str(data).unwrap()))
    });
    events.collect()
}

fn levels(image: &Value) -> Vec<u8> {
    let rows = image["levels"].as_array().unwrap().iter();
    let pixels = rows.flat_map(|row| row.as_array().unwrap());
    let levels = pixels.flat_map(|pixel| pixel.as_array().unwrap());
    levels.map(|level| level.as_u64().unwrap() as u8).collect()
}

fn nested(image: &[u8], width: usize) -> Value {
    let rows = image.chunks_exact(width * 3);
    let rows = rows.map(|row| row.chunks_exact(3).collect::<Vec<_>>());
    json!({ "levels": rows.collect::<Vec<_>>() })
}

/// What several clients ask for at a time is drawn together, and to each as if it were alone.
#[test]
fn clients_get_what_the_model_gives() {
    let server = Server::start(&[]);
    let model = Model::pretrained().unwrap();
    let samples: Vec<Vec<u8>> = (0..3)
        .map(|seed| model.sample(&Sampling::of(2, seed)).unwrap())
        .collect();
    let known: Vec<bool> = (0..1024).map(|pixel| pixel < 20 * 32 + 7).collect();
    let completion = Completion {
        images: samples[0][..3072].to_vec(),
        known,
        labels: vec![0],
        variants: 2,
        temperature: 0.8,
        seed: 4,
    };
    let completed = model.complete(&completion).unwrap();
    let expected = |images: &[u8], answer: &Value| {
        let found = answer["images"].as_array().unwrap().iter();
        let found: Vec<u8> = found.flat_map(levels).collect();
        assert!(found == images, "{}", answer["seed"]);
    };
    thread::scope(|scope| {
        for (seed, images) in samples.iter().enumerate() {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || {
                let request = json!({ "count": 2, "seed": seed, "format": "levels" });
                let (status, answer) = server.post("/v1/sample", &request);
                assert_eq!(status, 200, "{answer}");
                expected(images, &answer);
            });
        }
        scope.spawn(|| {
            let request = json!({
                "image": nested(&completion.images, 32), "keep": { "row": 20, "column": 7 },
                "variants": 2, "temperature": 0.8, "seed": 4, "format": "levels",
            });
            let (status, answer) = server.post("/v1/complete", &request);
            assert_eq!(status, 200, "{answer}");
            expected(&completed, &answer);
        });
        scope.spawn(|| {
            let images: Vec<Value> = samples
                .iter()
                .map(|image| nested(&image[..3072], 32))
                .collect();
            let (status, answer) =
                server.post("/v1/score", &json!({ "images": images, "maps": true }));
            assert_eq!(status, 200, "{answer}");
            for (score, image) in answer["scores"].as_array().unwrap().iter().zip(&samples) {
                let bits = model.bits_per_dim(&image[..3072], &[]).unwrap()[0];
                assert!((score["bits_per_dim"].as_f64().unwrap() - bits).abs() < 1e-4 * bits);
                let map = score["bits_per_pixel"].as_array().unwrap().iter();
                let sum: f64 = map
                    .flat_map(|row| row.as_array().unwrap())
                    .map(|bits| bits.as_f64().unwrap())
                    .sum();
                assert!((sum / 3072.0 - bits).abs() < 1e-4 * bits);
            }
        });
    });

    // The same as events, and a size that is not the model's.
    let request = json!({ "size": [6, 11], "seed": 1, "format": "levels", "stream": true });
    let headers = "Content-Type: application/json\r\n";
    let body = request.to_string();
    let (status, head, body) = server.post_bytes("/v1/sample", headers, body.as_bytes());
    assert!(
        status == 200 && head.contains("text/event-stream"),
        "{head}"
    );
    let told = events(&body);
    let rows = told.iter().filter(|(name, _)| name == "rows");
    let rows: Vec<u64> = rows.map(|(_, row)| row["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [0, 1, 2, 3, 4, 5]);
    let (name, done) = told.last().unwrap();
    assert_eq!(name, "done");
    assert_eq!(levels(&done["images"][0]).len(), 6 * 11 * 3);
}

/// Whoever waits for requests is not one of the threads that do the work.
#[test]
fn one_thread_is_enough() {
    let server = Server::start(&["--threads", "1"]);
    let image = json!({ "levels": [[[1, 2, 3], [4, 5, 6]]] });
    for _ in 0..3 {
        assert_eq!(
            server.post("/v1/score", &json!({ "images": [image] })).0,
            200
        );
        let pixel = json!({ "image": image, "pixel": [0, 1] });
        assert_eq!(server.post("/v1/distribution", &pixel).0, 200);
    }
    assert_eq!(server.post("/v1/sample", &json!({ "count": 2 })).0, 200);
}

#[test]
fn what_cannot_be_done_is_said() {
    let server = Server::start(&[]);
    let image = json!({ "levels": [[[1, 2, 3], [4, 5, 6]]] });
    for (path, request, expected, said) in [
        ("/v1/sample", json!({ "count": 65 }), 422, "1 to 64"),
        (
            "/v1/score",
            json!({ "images": vec![image.clone(); 65] }),
            422,
            "at most 64",
        ),
        ("/v1/sample", json!({ "count": -1 }), 422, "count"),
        ("/v1/sample", json!({ "counts": 1 }), 422, "counts"),
        (
            "/v1/sample",
            json!({ "temperature": 0 }),
            422,
            "temperature",
        ),
        ("/v1/sample", json!({ "size": [513, 1] }), 422, "512"),
        (
            "/v1/sample",
            json!({ "size": [512, 512], "count": 2 }),
            422,
            "pixels together",
        ),
        ("/v1/sample", json!({ "model": "other" }), 404, "other"),
        (
            "/v1/sample",
            json!({ "class": 1 }),
            422,
            "class-conditional",
        ),
        (
            "/v1/complete",
            json!({ "image": image }),
            422,
            "`keep` or `mask`",
        ),
        (
            "/v1/complete",
            json!({ "image": image, "keep": { "row": 1 } }),
            422,
            "no pixel",
        ),
        (
            "/v1/complete",
            json!({ "image": image, "mask": { "levels": [[[0], [0]]] } }),
            422,
            "nothing",
        ),
        (
            "/v1/complete",
            json!({ "image": image, "mask": { "levels": [[[255]]] } }),
            422,
            "alike",
        ),
        ("/v1/score", json!({ "images": [] }), 422, "1 to 64"),
        (
            "/v1/score",
            json!({ "images": [{ "picture": "AAAA" }] }),
            422,
            "picture",
        ),
        (
            "/v1/distribution",
            json!({ "image": image, "pixel": [0, 2] }),
            422,
            "no pixel",
        ),
        ("/v1/compress", json!({ "files": [] }), 422, "files"),
        (
            "/v1/compress",
            json!({ "files": [{ "name": "../x", "data": "" }] }),
            422,
            "../x",
        ),
        ("/v1/decompress", json!({ "archive": "AAAA" }), 422, "pxc"),
        ("/v1/nothing", json!({}), 404, "openapi"),
    ] {
        let (status, problem) = server.post(path, &request);
        let detail = problem["detail"].as_str().unwrap_or_default();
        assert_eq!(status, expected, "{path} {request}: {problem}");
        assert!(detail.contains(said), "{path} {request}: {problem}");
        assert_eq!(problem["status"], status);
    }
    // Not JSON, not said to be, not whole.
    let json = "Content-Type: application/json\r\n";
    for (headers, body, expected) in [
        (json, &b"{\"count\": "[..], 400),
        (json, b"\xff\xfe", 400),
        ("Content-Type: text/plain\r\n", b"{}", 415),
        ("", b"{}", 415),
    ] {
        let (status, head, body) = server.post_bytes("/v1/sample", headers, body);
        assert_eq!(status, expected, "{head}\n{body}");
        assert!(head.contains("application/problem+json"), "{head}");
    }
    let (status, _, _) = server.get("/v1/sample", "");
    assert_eq!(status, 405);
    for path in [
        "/v1/runs/none",
        "/v1/runs/..%2f..%2fetc/samples/passwd",
        "/v1/models/none/reference",
    ] {
        assert_eq!(server.get(path, "").0, 404, "{path}");
    }
    let (_, _, text) = server.get("/openapi.json", "");
    let description: Value = serde_json::from_str(&text).unwrap();
    assert!(description["paths"]["/v1/sample"]["post"].is_object());
    assert!(description["components"]["schemas"]["Problem"].is_object());
}

/// An archive of a shipped model is taken apart without naming it, and the model can be named.
#[test]
fn archives_find_their_model() {
    let server = Server::start(&["shipped:cifar10"]);
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../pixelcnn/tests/data/vector-2-cifar10.pxc"
    );
    let file = std::fs::read(path).unwrap();
    let request = json!({ "archive": BASE64.encode(file) });
    let (status, answer) = server.post("/v1/decompress", &request);
    assert_eq!(status, 200, "{answer}");
    let files = answer["files"].as_array().unwrap();
    assert_eq!(files.len(), 5);
    assert!(files.iter().all(|file| file["data"].is_string()));
    let (_, _, models) = server.get("/v1/models", "");
    let models: Value = serde_json::from_str(&models).unwrap();
    let names: Vec<&str> = models
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["shipped:cifar10"]);
}

/// Pages of other sites get nothing out of a server on their visitor's machine.
#[test]
fn other_sites_are_refused() {
    let server = Server::start(&[]);
    let body = json!({ "count": 1 }).to_string();
    let json = "Content-Type: application/json\r\n";
    for (headers, expected) in [
        ("Origin: http://evil.example\r\n", 403),
        ("Origin: null\r\n", 403),
        (
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n",
            403,
        ),
    ] {
        let all = format!("{json}{headers}");
        let (status, head, _) = server.post_bytes("/v1/sample", &all, body.as_bytes());
        assert_eq!(status, expected, "{headers}");
        assert!(!head.contains("access-control-allow"), "{head}");
    }
    let host = "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    assert_eq!(server.exchange(host.as_bytes()).0, 421);
    let ask = "OPTIONS /v1/sample HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n\
               Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n";
    let (status, head, _) = server.exchange(ask.as_bytes());
    assert!(
        status == 403 && !head.contains("access-control-allow"),
        "{head}"
    );
    // A link to the page is fine.
    let link =
        "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n";
    let (status, head, _) = server.get("/", link);
    assert!(
        status == 200 && head.contains("content-security-policy"),
        "{head}"
    );
}

#[test]
fn strangers_need_the_token() {
    let server = Server::start(&["--address", "0.0.0.0"]);
    let (_, token) = server.link.split_once("?token=").unwrap();
    assert_eq!(server.get("/v1/models", "").0, 401);
    assert_eq!(server.get("/", "").0, 401);
    assert_eq!(
        server.get("/?token=0123456789abcdef0123456789abcdef", "").0,
        401
    );
    assert_eq!(server.get("/healthz", "").0, 200);
    let bearer = format!("Authorization: Bearer {token}\r\n");
    assert_eq!(server.get("/v1/models", &bearer).0, 200);
    let (status, head, _) = server.get(&format!("/?token={token}"), "");
    assert!(
        status == 303 && head.contains("httponly; samesite=lax"),
        "{head}"
    );
    let port = server.address.rsplit(':').next().unwrap();
    let cookie = format!("Cookie: pixelcnn-{port}={token}\r\n");
    assert_eq!(server.get("/", &cookie).0, 200);
    let own = Server::start(&["--token", "my-own-token"]);
    assert_eq!(own.get("/", "").0, 401);
    assert_eq!(
        own.get("/", "Authorization: Bearer my-own-token\r\n").0,
        200
    );
}

/// Whoever sends too much, too slowly or half, or goes away, holds nothing up and leaves nothing behind.
#[test]
fn bad_clients_do_no_harm() {
    let server = Server::start(&[]);
    let host = &server.address;
    let head = |rest: &str| format!("POST /v1/sample HTTP/1.1\r\nHost: {host}\r\n{rest}\r\n");
    // 100 MB, announced and not.
    let json = "Content-Type: application/json\r\nConnection: close\r\n";
    let (status, _, _) =
        server.exchange(head(&format!("{json}Content-Length: 100000000\r\n")).as_bytes());
    assert_eq!(status, 413);
    let mut stream = server.send(head(&format!("{json}Transfer-Encoding: chunked\r\n")).as_bytes());
    let chunk = [b"100000\r\n".as_slice(), &vec![b' '; 1 << 20], b"\r\n"].concat();
    // The server may hang up before all is sent.
    let sent = (0..100)
        .take_while(|_| stream.write_all(&chunk).is_ok())
        .count();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.contains(" 413 ") || sent < 100, "{sent}: {answer}");

    // Half requests stay open, as many as there are.
    let halves: Vec<TcpStream> = (0..100)
        .map(|i| match i % 3 {
            0 => server.send(b"POST /v1/sam"),
            1 => server.send(head(&format!("{json}Content-Length: 1000\r\n")).as_bytes()),
            _ => server.send(
                format!("{}{{\"co", head(&format!("{json}Content-Length: 1000\r\n"))).as_bytes(),
            ),
        })
        .collect();
    let start = Instant::now();
    assert_eq!(server.post("/v1/sample", &json!({ "count": 1 })).0, 200);
    assert!(start.elapsed() < Duration::from_secs(30));

    // Readers that do not read, and clients that go away while they wait or are served.
    let request = json!({ "count": 64, "stream": true, "format": "levels" }).to_string();
    let request = format!(
        "{}{request}",
        head(&format!("{json}Content-Length: {}\r\n", request.len()))
    );
    let gone: Vec<TcpStream> = (0..8).map(|_| server.send(request.as_bytes())).collect();
    thread::sleep(Duration::from_millis(300));
    assert!(server.metric("pixelcnn_requests_running") > 0.0);
    drop(gone);
    server.until_idle();
    let images = server.metric("pixelcnn_images_total");
    assert!(images < 8.0 * 64.0, "{images} images were drawn for nobody");
    assert_eq!(server.post("/v1/sample", &json!({ "count": 1 })).0, 200);
    drop(halves);
}

#[test]
fn it_ends_cleanly_when_told() {
    let mut server = Server::start(&[]);
    // While it draws, and somebody listens.
    let request = json!({ "count": 64, "stream": true }).to_string();
    let head = format!(
        "POST /v1/sample HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: \
         {}\r\n\r\n{request}",
        server.address,
        request.len()
    );
    let mut client = server.send(head.as_bytes());
    let idle = server.send(b"");
    let mut first = [0; 4096];
    assert!(client.read(&mut first).unwrap() > 0);
    server.stop();
    let start = Instant::now();
    let status = server.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let mut rest = String::new();
    server.output.read_to_string(&mut rest).unwrap();
    drop(idle);
}

#[test]
fn what_is_named_must_be_there() {
    let run = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pixelcnn"))
            .arg("serve")
            .args(flags)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(run(&["no-such-run"]).contains("no-such-run: no such file or folder"));
    assert!(run(&[concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]).contains("Cargo.toml"));
    assert!(run(&["--token", "short"]).contains("at least 8"));
    let server = Server::start(&[]);
    let port = server.address.rsplit(':').next().unwrap();
    let taken = run(&["--port", port]);
    assert!(
        taken.contains("cannot listen") && taken.contains("--port"),
        "{taken}"
    );
}
