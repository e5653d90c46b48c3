//! The parts of a request other than its path, read strictly: the key, the body, and how long to wait.

use std::time::Duration;

use annals::{Metadata, TraceContext};
use axum::{
    body::Bytes,
    extract::{
        FromRequest, FromRequestParts, Path, Query,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderMap, StatusCode, header},
};
use serde::{Deserialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    json::{self, Object},
    limits::WAIT_MAX,
    problem::Problem,
};

/// The header with the idempotency key of a request. The key becomes the id of the new resource, so a repeated request
/// with the same key creates nothing new.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The header that marks the answer to a repeated request.
pub const REPLAYED: &str = "idempotency-replayed";
/// The maximum length of an id, in bytes. A stream id has room for a category and an id of this length.
pub const ID_BYTES_MAX: usize = 200;

/// An id from a path; see [`id`].
pub type Id = Result<Path<String>, PathRejection>;
/// The parameter `?wait=10s` of a request; see [`wait`].
pub type Wait = Result<Query<WaitParameters>, QueryRejection>;

/// The time to wait for the end of the requested saga.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitParameters {
    wait: Option<String>,
}

/// A request that creates a resource. The idempotency key of the request is the id of the resource.
#[derive(Debug)]
pub struct Submission {
    /// The key, which becomes the id of the resource. A request without a key gets a new id.
    pub id: String,
    /// The time to wait for the end of the submission's saga.
    pub wait: Duration,
    /// The headers.
    pub headers: HeaderMap,
    sent: Bytes,
}

impl<S: Send + Sync> FromRequest<S> for Submission {
    type Rejection = Problem;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Problem> {
        let (mut head, body) = request.into_parts();
        let id = key(&head.headers)?;
        let headers = head.headers.clone();
        let wait = wait(Query::from_request_parts(&mut head, state).await)?;
        let request = axum::extract::Request::from_parts(head, body);
        let sent = Bytes::from_request(request, state).await.map_err(|error| bad(error.body_text()))?;
        Ok(Self { id, wait, headers, sent })
    }
}

impl Submission {
    /// Reads the body as JSON.
    ///
    /// # Errors
    /// A 415 if the content type is not JSON, a 400 if the body is not JSON, and a 422 if the JSON does not have the
    /// expected shape.
    pub fn body<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        self.json::<Object<T>>().map(|Object(body)| body)
    }

    /// Like [`body`](Self::body), for JSON that need not be an object.
    ///
    /// # Errors
    /// See [`body`](Self::body).
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
            let detail = format!("the Content-Type is {:?}; it must be application/json", start(kind));
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
        }
        json::read(&self.sent)
    }
}

pub(crate) fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

/// Returns the id of a path.
///
/// # Errors
/// A 400 if the id is empty, too long, or has a control character.
pub fn id(id: Id) -> Result<String, Problem> {
    let Path(id) = id.map_err(|error| bad(error.body_text()))?;
    check_name("the id", &id).map_err(bad)?;
    Ok(id)
}

/// Returns the time to wait: a number of seconds, with or without an `s`; at most [`WAIT_MAX`].
///
/// # Errors
/// A 400 if the parameter is not a number of seconds, or if the request has another parameter.
pub fn wait(wait: Wait) -> Result<Duration, Problem> {
    let Query(WaitParameters { wait }) = wait.map_err(|error| bad(error.body_text()))?;
    wait.map_or(Ok(Duration::ZERO), |text| seconds(&text))
}

/// Returns the time that a parameter `wait` names, at most [`WAIT_MAX`].
pub(crate) fn seconds(text: &str) -> Result<Duration, Problem> {
    let seconds = text.strip_suffix('s').unwrap_or(text).parse::<u32>();
    let seconds = seconds.map_err(|_| bad(format!("wait={text:.20} is not a number of seconds, such as wait=10s")))?;
    Ok(Duration::from_secs(seconds.into()).min(WAIT_MAX))
}

/// Returns the idempotency key, or a new id if the request has none.
fn key(headers: &HeaderMap) -> Result<String, Problem> {
    let mut keys = headers.get_all(IDEMPOTENCY_KEY).into_iter();
    let Some(value) = keys.next() else { return Ok(Uuid::now_v7().to_string()) };
    if keys.next().is_some() {
        return Err(bad("there must be one Idempotency-Key"));
    }
    let text = std::str::from_utf8(value.as_bytes()).map_err(|_| bad("the Idempotency-Key is not UTF-8"))?;
    // The draft of the standard puts the key in quotes, but hardly any client does.
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    check_name("the Idempotency-Key", text).map_err(bad)?;
    Ok(text.to_owned())
}

/// Returns the request with this command id, in the trace of the HTTP request.
pub fn asked(command_id: Uuid, headers: &HeaderMap) -> annals::Request {
    let metadata = Metadata { trace: trace(headers), ..Metadata::of_request(command_id) };
    annals::Request::new(command_id, metadata)
}

/// Returns the W3C trace context of a request, if it is valid.
fn trace(headers: &HeaderMap) -> Option<TraceContext> {
    // A header with bytes outside ASCII counts as invalid, not as absent.
    let all = |name| headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("\0"));
    TraceContext::parse(all("traceparent"), all("tracestate"))
}

/// Checks that a text can be an id or a name. `what` begins the error, such as `the customer`.
///
/// # Errors
/// Says why the text is no name: it is empty, longer than [`ID_BYTES_MAX`], or has a control character.
pub fn check_name(what: &str, text: &str) -> Result<(), String> {
    match text {
        text if text.trim().is_empty() => Err(format!("{what} is empty")),
        text if text.len() > ID_BYTES_MAX => {
            Err(format!("{what} {:?}… has more than {ID_BYTES_MAX} bytes", start(text)))
        }
        text if text.chars().any(char::is_control) => Err(format!("{what} {:?} has a control character", start(text))),
        _ => Ok(()),
    }
}

/// Returns the start of a string, long enough to recognise the string.
fn start(text: &str) -> String {
    text.chars().take(40).collect()
}
