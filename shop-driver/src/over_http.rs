//! A shop in another process, reached over HTTP: submits every invoice, and waits until each saga has ended. If the
//! saga ends within ten seconds, a single request both submits the invoice and waits.

mod client;
mod url;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Bytes,
    header::{CONTENT_TYPE, HeaderMap, HeaderValue},
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::client::{HttpClient, NoAnswer};
pub use self::url::{HttpUrl, HttpUrlError};
use crate::{
    card::Card,
    customers::Customers,
    input::{Change, Invoices, Line},
    run::{Outcome, RunError, Settings},
    shop::{Accepted, SagaEnd, Shop, Submission, SubmissionKind},
    totals::Totals,
};

/// The header with the key of a request. A repeated request with the same key is accepted once.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The header that marks the answer to a repeated request.
const REPLAYED: &str = "idempotency-replayed";
/// The status of a saga that is waiting for an operator.
const STUCK: &str = "stuck";
/// How long a request waits for the end of a saga before the client asks again.
const WAIT: Duration = Duration::from_secs(10);
/// How long the shop may leave all requests unanswered before the run fails. Completed work is kept.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long the shop may leave all requests unanswered before the run reports the silence.
const SILENCE_REPORTED: Duration = Duration::from_secs(2);
/// The delay before the second try. The delay doubles with each further try.
const RETRY_MIN: Duration = Duration::from_millis(50);
/// The longest delay between two tries.
const RETRY_MAX: Duration = Duration::from_secs(2);

/// A shop in another process, reached over HTTP.
#[derive(Clone)]
struct OverHttp {
    url: HttpUrl,
    client: Arc<HttpClient>,
    silence: Arc<Mutex<Silence>>,
    stop: CancellationToken,
}

/// The time since the shop's last answer.
struct Silence {
    heard: Instant,
    reported: bool,
}

struct Answered {
    path: String,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    /// Whether an earlier try may have reached the shop.
    tried_before: bool,
}

/// The body of `POST /orders`.
#[derive(Serialize)]
struct OrderBody<'a> {
    customer: &'a Option<String>,
    lines: &'a [Line],
    card: Card,
}

/// The body of `POST /returns`.
#[derive(Serialize)]
struct ReturnBody<'a> {
    customer: &'a Option<String>,
    lines: &'a [Line],
}

/// The body of `POST /supplies`.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum SupplyBody<'a> {
    Delivered(&'a [Change]),
    Adjusted(&'a [Change]),
}

/// The one field that all answers about a submission have in common.
#[derive(Deserialize)]
struct Watched {
    saga: Option<SagaSeen>,
}

/// The part of a saga in an answer that shows whether the saga has ended.
#[derive(Deserialize)]
struct SagaSeen {
    status: String,
    ended_at: Option<String>,
    last_error: Option<String>,
}

/// The units in the shop's answer about a supply, which show what the shop has accepted.
#[derive(Deserialize)]
struct SupplySeen {
    #[serde(rename = "delivered", alias = "adjusted")]
    units: Vec<Change>,
}

/// The answer to `GET /closings/{id}`.
#[derive(Deserialize)]
struct ClosingSeen {
    books: Option<Totals>,
    store: String,
    bus: String,
    saga: Option<SagaSeen>,
}

/// An error answer according to RFC 9457.
#[derive(Deserialize)]
struct Problem {
    detail: String,
}

/// The result of a run over HTTP, with the names of the shop's store and bus.
pub struct RemoteOutcome {
    /// The outcome of the run.
    pub outcome: Outcome,
    /// The name of the shop's store.
    pub store: String,
    /// The name of the shop's bus.
    pub bus: String,
}

/// Submits the invoices. If the run was stopped, the inner error is the number of unfinished orders and returns.
pub async fn run(
    url: &HttpUrl,
    opening_stock: BTreeMap<String, u64>,
    invoices: &mut Invoices,
    settings: Settings,
    on_progress: impl FnMut(u64),
) -> Result<Result<RemoteOutcome, u64>, RunError> {
    let client = HttpClient::new(&url.address(), settings.concurrency).map_err(RunError::Shop)?;
    let silence = Arc::new(Mutex::new(Silence { heard: Instant::now(), reported: false }));
    let shop = OverHttp { url: url.clone(), client: Arc::new(client), silence, stop: settings.stop.clone() };
    let customers = Customers::new(shop.clone())?;
    let stop = &settings.stop;
    tokio::select! {
        opened = customers.open_stock(opening_stock, &settings.input) => opened?,
        () = stop.cancelled() => return shop.stopped(0),
    }
    let started = customers.submit_all(invoices, &settings, on_progress).await?;
    let elapsed = started.elapsed();
    if stop.is_cancelled() {
        return shop.stopped(customers.results().unfinished);
    }
    let closing = tokio::select! {
        closed = shop.close() => closed.map_err(RunError::Shop)?,
        () = stop.cancelled() => return shop.stopped(0),
    };
    let mut results = customers.results();
    let outcome = Outcome {
        totals: closing.books.unwrap_or_default(),
        sagas: results.sagas,
        repeated: results.repeated,
        stuck: results.stuck,
        unfinished: results.unfinished,
        elapsed,
        latency_us: results.latency_us.clone(),
        rejected: std::mem::take(&mut results.rejected),
        parked: Vec::new(),
    };
    Ok(Ok(RemoteOutcome { outcome, store: closing.store, bus: closing.bus }))
}

impl Watched {
    fn end(&self) -> Option<SagaEnd> {
        match &self.saga {
            Some(saga) if saga.status == STUCK => Some(SagaEnd::Stuck),
            Some(saga) if saga.ended_at.is_some() => Some(SagaEnd::Ended),
            _ => None,
        }
    }
}

impl OverHttp {
    /// Repeats the request as long as the answer says that the shop cannot answer now.
    async fn ask(&self, method: Method, path: &str, key: Option<&str>, body: Bytes) -> Result<Answered, String> {
        let mut delay = RETRY_MIN;
        let mut tried_before = false;
        loop {
            let answered = self.client.send(request(&method, path, key, body.clone())?).await;
            let trouble = match answered.map(Response::into_parts) {
                Ok((head, body)) if !is_passing(head.status) => {
                    self.heard();
                    let path = path.to_owned();
                    return Ok(Answered { path, status: head.status, headers: head.headers, body, tried_before });
                }
                Ok((head, body)) => {
                    // A 503 rejects the request before any work is done. With another transient status, the shop may
                    // already have done the work or a part of it.
                    tried_before |= head.status != StatusCode::SERVICE_UNAVAILABLE;
                    detail(head.status, &body)
                }
                Err(NoAnswer { reason, may_be_heard }) => {
                    tried_before |= may_be_heard;
                    reason
                }
            };
            self.unheard(&trouble)?;
            // Waits a random time between half of the delay and the whole delay, so that clients do not all retry at
            // once.
            tokio::time::sleep(delay.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            delay = (delay * 2).min(RETRY_MAX);
        }
    }

    fn silence(&self) -> MutexGuard<'_, Silence> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self) {
        *self.silence() = Silence { heard: Instant::now(), reported: false };
    }

    /// Returns an error if no request was answered for `SILENCE_MAX`.
    fn unheard(&self, trouble: &str) -> Result<(), String> {
        let mut silence = self.silence();
        if silence.heard.elapsed() > SILENCE_MAX {
            // Stops the whole run, so that the other requests do not have to time out one by one.
            self.stop.cancel();
            return Err(format!("{}: {trouble}, for {} s", self.url, SILENCE_MAX.as_secs()));
        }
        if silence.heard.elapsed() > SILENCE_REPORTED && !std::mem::replace(&mut silence.reported, true) {
            tracing::error!("waiting, and trying again: {}: {trouble}", self.url);
        }
        Ok(())
    }

    /// Returns the reason why the run was stopped: a request to stop, or a shop that does not answer.
    fn stopped(&self, unfinished: u64) -> Result<Result<RemoteOutcome, u64>, RunError> {
        if self.silence().heard.elapsed() <= SILENCE_MAX {
            return Ok(Err(unfinished));
        }
        let url = &self.url;
        let seconds = SILENCE_MAX.as_secs();
        let reason = format!("{url} has not answered for {seconds} s; run the same command again to continue");
        Err(RunError::Shop(reason))
    }

    async fn post<T: Serialize>(&self, resource: &str, key: &str, body: &T) -> Result<Answered, String> {
        let body = serde_json::to_vec(body).map_err(|error| error.to_string())?;
        let path = format!("/{resource}?wait={}s", WAIT.as_secs());
        self.ask(Method::POST, &path, Some(key), body.into()).await
    }

    async fn get<T: DeserializeOwned>(&self, resource: &str, id: &str) -> Result<T, String> {
        let id = utf8_percent_encode(id, NON_ALPHANUMERIC);
        let path = format!("/{resource}/{id}?wait={}s", WAIT.as_secs());
        let answered = self.ask(Method::GET, &path, None, Bytes::new()).await?;
        if !answered.status.is_success() {
            return Err(detail(answered.status, &answered.body));
        }
        self.read(&answered)
    }

    fn read<T: DeserializeOwned>(&self, answered: &Answered) -> Result<T, String> {
        serde_json::from_slice(&answered.body).map_err(|error| format!("{}{}: {error}", self.url, answered.path))
    }

    /// Closes the books, after all sagas have ended.
    async fn close(&self) -> Result<ClosingSeen, String> {
        let id = Uuid::now_v7().to_string();
        let opened = self.post("closings", &id, &()).await?;
        if !opened.status.is_success() {
            return Err(format!("closing the books: {}", detail(opened.status, &opened.body)));
        }
        loop {
            let closing: ClosingSeen = self.get("closings", &id).await?;
            match &closing.saga {
                _ if closing.books.is_some() => return Ok(closing),
                Some(saga) if saga.status == STUCK => {
                    let reason = saga.last_error.clone().unwrap_or_default();
                    return Err(format!("closing the books: {reason}; run the same command again"));
                }
                _ => {}
            }
        }
    }
}

#[async_trait]
impl Shop for OverHttp {
    async fn submit(&self, submission: Submission) -> Result<Accepted, String> {
        let answered = match &submission {
            Submission::Order { id, customer, lines, card } => {
                self.post("orders", id, &OrderBody { customer, lines, card: *card }).await?
            }
            Submission::Return { id, customer, lines } => {
                self.post("returns", id, &ReturnBody { customer, lines }).await?
            }
            Submission::Delivery { id, units } => self.post("supplies", id, &SupplyBody::Delivered(units)).await?,
            Submission::Adjustment { id, units } => self.post("supplies", id, &SupplyBody::Adjusted(units)).await?,
        };
        // The rejection may mean that an earlier run submitted this supply with different units.
        if answered.status == StatusCode::UNPROCESSABLE_ENTITY
            && let Submission::Delivery { id, units } | Submission::Adjustment { id, units } = &submission
            && let Ok(before) = self.get::<SupplySeen>("supplies", id).await
            && before.units != *units
        {
            return Ok(Accepted { repeated: true, units: before.units, end: None });
        }
        if !answered.status.is_success() {
            return Err(detail(answered.status, &answered.body));
        }
        let units = match submission {
            Submission::Delivery { units, .. } | Submission::Adjustment { units, .. } => units,
            Submission::Order { .. } | Submission::Return { .. } => Vec::new(),
        };
        // A replayed answer counts as a repetition only if no earlier try of this run can have caused it.
        let repeated = answered.headers.contains_key(REPLAYED) && !answered.tried_before;
        let watched = self.read::<Watched>(&answered)?;
        Ok(Accepted { repeated, units, end: watched.end() })
    }

    async fn wait_for_end(&self, kind: SubmissionKind, id: &str) -> Result<SagaEnd, String> {
        let resource = match kind {
            SubmissionKind::Order => "orders",
            SubmissionKind::Return => "returns",
            SubmissionKind::Supply => "supplies",
        };
        loop {
            if let Some(end) = self.get::<Watched>(resource, id).await?.end() {
                return Ok(end);
            }
        }
    }
}

/// Returns whether the same request may succeed later.
fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::BAD_GATEWAY
            | StatusCode::GATEWAY_TIMEOUT
            | StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS
    )
}

fn detail(status: StatusCode, body: &[u8]) -> String {
    match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => problem.detail,
        Err(_) => status.to_string(),
    }
}

fn request(method: &Method, path: &str, key: Option<&str>, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
    let mut request = Request::builder().method(method.clone()).uri(path);
    if let Some(key) = key {
        let key = HeaderValue::from_bytes(key.as_bytes()).map_err(|error| error.to_string())?;
        request = request.header(IDEMPOTENCY_KEY, key).header(CONTENT_TYPE, "application/json");
    }
    request.body(Full::new(body)).map_err(|error| error.to_string())
}
