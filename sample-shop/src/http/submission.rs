//! The parts of a request other than its path, read strictly: the key, the body, and how long to wait.

use std::time::Duration;

use annals::{Metadata, Request, TraceContext};
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

use super::{
    bodies::IDEMPOTENCY_KEY,
    json::{self, Object},
    limits::WAIT_MAX,
    problem::Problem,
};
use crate::order::{LINES_MAX, Line, request};

/// The maximum length of an id, SKU or customer, in bytes. A stream id has room for a category and an id of this
/// length.
pub const ID_BYTES_MAX: usize = 200;

/// An id from a path.
pub type Id = Result<Path<String>, PathRejection>;
/// `?wait=10s`.
pub type Wait = Result<Query<WaitParameters>, QueryRejection>;

/// The time to wait for the end of the requested saga.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitParameters {
    wait: Option<String>,
}

/// A request that submits an order, a return, a supply or a closing.
pub struct Submission {
    /// The key, which becomes the id of the submission.
    pub id: String,
    /// The time to wait for the end of the submission's saga.
    pub wait: Duration,
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
    /// Reads the body as JSON. Rejects unknown fields.
    pub fn body<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        body(&self.headers, &self.sent)
    }
}

fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, detail)
}

fn unprocessable(detail: impl Into<String>) -> Problem {
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
}

/// Returns the id if it is valid.
pub fn id(id: Id) -> Result<String, Problem> {
    let Path(id) = id.map_err(|error| bad(error.body_text()))?;
    named("the id", &id).map_err(bad)?;
    Ok(id)
}

/// Reads a number of seconds, with or without an `s`; at most [`WAIT_MAX`].
pub fn wait(wait: Wait) -> Result<Duration, Problem> {
    let Query(WaitParameters { wait }) = wait.map_err(|error| bad(error.body_text()))?;
    let Some(text) = wait else { return Ok(Duration::ZERO) };
    let seconds = text.strip_suffix('s').unwrap_or(&text).parse::<u32>();
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
    named("the Idempotency-Key", text).map_err(bad)?;
    Ok(text.to_owned())
}

/// Returns the request for the submission with this id. A repeated request has the same command id.
pub fn asked(category: &str, id: &str, headers: &HeaderMap) -> Request {
    let command_id = request(category, id);
    Request { command_id, metadata: Metadata { trace: trace(headers), ..Metadata::of_request(command_id) } }
}

/// Returns the W3C trace context of a request, if it is valid.
fn trace(headers: &HeaderMap) -> Option<TraceContext> {
    // A header with bytes outside ASCII counts as invalid, not as absent.
    let all = |name| headers.get_all(name).into_iter().map(|value| value.to_str().unwrap_or("\0"));
    TraceContext::parse(all("traceparent"), all("tracestate"))
}

fn body<T: DeserializeOwned>(headers: &HeaderMap, body: &Bytes) -> Result<T, Problem> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if !kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        let detail = format!("the Content-Type is {:?}; it must be application/json", start(kind));
        return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail));
    }
    json::read::<Object<T>>(body).map(|Object(body)| body)
}

/// Checks that the customer and the lines can be stored. The order itself checks the sum of the lines.
pub fn order_lines(customer: Option<&str>, lines: &[Line]) -> Result<(), Problem> {
    if let Some(customer) = customer {
        named("the customer", customer).map_err(unprocessable)?;
    }
    if lines.len() > LINES_MAX {
        return Err(unprocessable(format!("there are {} lines; the limit is {LINES_MAX}", lines.len())));
    }
    lines.iter().try_for_each(|line| sku(&line.sku))
}

/// Checks that the string can be a SKU.
pub fn sku(sku: &str) -> Result<(), Problem> {
    named("the SKU", sku).map_err(unprocessable)
}

fn named(what: &str, text: &str) -> Result<(), String> {
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
