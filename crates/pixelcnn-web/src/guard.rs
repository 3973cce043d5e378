//! Who may ask: no page of another site, and where others could reach the server only who has its token.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use crate::App;
use crate::problem::{Problem, Result};

/// What is checked of a request.
#[derive(Debug, Clone)]
pub struct Guard {
    /// Whether only this machine can reach the server.
    pub loopback: bool,
    /// What a client has to know, if anything.
    pub token: Option<String>,
    /// The cookie in which a browser keeps it; servers of one machine have one each.
    pub cookie: String,
}

/// Lets requests through that may be; puts on every response what browsers are to keep to.
pub async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let checked = app.guard.check(&request);
    let mut response = match checked {
        Ok(Passed::Yes) => next.run(request).await,
        Ok(Passed::WithToken(token)) => enter(&app.guard.cookie, &token),
        Err(problem) => problem.into_response(),
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    let cache = HeaderValue::from_static("no-store");
    headers.entry(header::CACHE_CONTROL).or_insert(cache);
    response
}

enum Passed {
    Yes,
    /// By a link that has the token in it.
    WithToken(String),
}

impl Guard {
    fn check(&self, request: &Request) -> Result<Passed> {
        let headers = request.headers();
        let host = host(headers, request.uri());
        if self.loopback && !host.is_some_and(is_own_name) {
            // A name of elsewhere that was made to point here (DNS rebinding).
            return Err(Problem::new(
                StatusCode::MISDIRECTED_REQUEST,
                "this server is for its own machine: call it localhost",
            ));
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or_default();
            let own = origin.split_once("://").map(|(_, host)| host);
            if own.is_none() || own != host {
                return Err(foreign());
            }
        }
        let says = |name: &str, value: &str| {
            headers
                .get(name)
                .is_some_and(|found| found.as_bytes() == value.as_bytes())
        };
        let is_own = !headers.contains_key("sec-fetch-site")
            || says("sec-fetch-site", "same-origin")
            || says("sec-fetch-site", "none");
        // A link to the page may be anywhere.
        let is_link = request.method() == Method::GET
            && request.uri().path() == "/"
            && says("sec-fetch-mode", "navigate")
            && says("sec-fetch-dest", "document");
        if !is_own && !is_link {
            return Err(foreign());
        }
        let Some(token) = &self.token else {
            return Ok(Passed::Yes);
        };
        let is_token = |given: &str| bool::from(given.as_bytes().ct_eq(token.as_bytes()));
        if request.uri().path() == "/healthz" || self.given(headers).into_iter().any(is_token) {
            return Ok(Passed::Yes);
        }
        let query = request.uri().query().unwrap_or_default();
        let asked = query
            .split('&')
            .find_map(|part| part.strip_prefix("token="));
        match asked {
            Some(asked) if request.uri().path() == "/" && is_token(asked) => {
                Ok(Passed::WithToken(token.clone()))
            }
            _ => Err(Problem::new(
                StatusCode::UNAUTHORIZED,
                "send the token that the server printed: `Authorization: Bearer TOKEN`, or open \
                 the page by the link that it printed",
            )),
        }
    }

    /// The tokens that a request has with it.
    fn given<'a>(&self, headers: &'a HeaderMap) -> Vec<&'a str> {
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim());
        let cookies = headers.get_all(header::COOKIE).iter();
        let cookies = cookies.filter_map(|value| value.to_str().ok());
        let cookies = cookies.flat_map(|value| value.split(';'));
        let own = |cookie: &'a str| cookie.trim().strip_prefix(&self.cookie)?.strip_prefix('=');
        cookies.filter_map(own).chain(bearer).collect()
    }
}

fn foreign() -> Problem {
    Problem::new(
        StatusCode::FORBIDDEN,
        "the request comes from a page of another site",
    )
}

/// The name by which the server was called, with its port.
fn host<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> Option<&'a str> {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    host.or_else(|| uri.authority().map(|authority| authority.as_str()))
}

/// Whether a name with a port is one of this machine alone.
fn is_own_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        // An IPv6 address has colons of its own.
        Some((name, port)) if !port.ends_with(']') => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Has a browser keep the token, and go on without it in the address.
/// Also where the link was on another site: what such a site can send has no effect here.
fn enter(cookie: &str, token: &str) -> Response {
    let cookie = format!("{cookie}={token}; Path=/; HttpOnly; SameSite=Lax");
    let headers = [(header::SET_COOKIE, cookie), (header::LOCATION, "/".into())];
    (StatusCode::SEE_OTHER, headers).into_response()
}

/// A token that nobody guesses: 128 random bits.
///
/// # Errors
/// Where the system has no random numbers.
pub fn new_token() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(headers: &[(&str, &str)], uri: &str) -> Request {
        let mut request = Request::builder().uri(uri).method("POST");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(Body::empty()).unwrap()
    }

    fn status(guard: &Guard, headers: &[(&str, &str)], uri: &str) -> u16 {
        match guard.check(&request(headers, uri)) {
            Ok(Passed::Yes) => 200,
            Ok(Passed::WithToken(_)) => 303,
            Err(problem) => problem.status,
        }
    }

    #[test]
    fn pages_of_other_sites_get_nothing() {
        let own = Guard {
            loopback: true,
            token: None,
            cookie: "pixelcnn-7860".into(),
        };
        for (headers, expected) in [
            (&[("host", "localhost:7860")][..], 200),
            (&[("host", "127.0.0.1:7860")], 200),
            (&[("host", "[::1]:7860")], 200),
            (&[("host", "[::1]")], 200),
            (&[("host", "evil.example:7860")], 421),
            (&[("host", "localhost.evil.example")], 421),
            (&[("host", "192.168.1.7:7860")], 421),
            (&[], 421),
            (
                &[
                    ("host", "localhost:7860"),
                    ("origin", "http://localhost:7860"),
                ],
                200,
            ),
            (
                &[
                    ("host", "localhost:7860"),
                    ("origin", "http://localhost:8000"),
                ],
                403,
            ),
            (
                &[
                    ("host", "localhost:7860"),
                    ("origin", "http://evil.example"),
                ],
                403,
            ),
            (&[("host", "localhost:7860"), ("origin", "null")], 403),
            (
                &[
                    ("host", "localhost:7860"),
                    ("sec-fetch-site", "same-origin"),
                ],
                200,
            ),
            (
                &[("host", "localhost:7860"), ("sec-fetch-site", "cross-site")],
                403,
            ),
            (
                &[("host", "localhost:7860"), ("sec-fetch-site", "same-site")],
                403,
            ),
        ] {
            assert_eq!(status(&own, headers, "/v1/sample"), expected, "{headers:?}");
        }
    }

    #[test]
    fn a_token_is_asked_for_and_kept() {
        let open = Guard {
            loopback: false,
            token: Some("secret".into()),
            cookie: "pixelcnn-7860".into(),
        };
        let host = ("host", "192.168.1.7:7860");
        for (header, uri, expected) in [
            (("accept", "*/*"), "/v1/models", 401),
            (("authorization", "Bearer secret"), "/v1/models", 200),
            (("authorization", "bearer secret"), "/v1/models", 200),
            (("authorization", "Bearer secre"), "/v1/models", 401),
            (("authorization", "Basic secret"), "/v1/models", 401),
            (("cookie", "a=b; pixelcnn-7860=secret"), "/v1/models", 200),
            (("cookie", "pixelcnn-7860=other"), "/v1/models", 401),
            (("accept", "*/*"), "/?token=secret", 303),
            (("accept", "*/*"), "/?token=other", 401),
            (("accept", "*/*"), "/v1/models?token=secret", 401),
            (("accept", "*/*"), "/healthz", 200),
        ] {
            assert_eq!(
                status(&open, &[host, header], uri),
                expected,
                "{header:?} {uri}"
            );
        }
        assert!(new_token().unwrap().len() == 32 && new_token().unwrap() != new_token().unwrap());
    }
}
