//! An HTTP client for one server. The client keeps connections alive and limits their number.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header::{HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

/// The maximum time to wait for an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// The largest answer in bytes, enough for a large order with its timeline.
const ANSWER_BYTES_MAX: usize = 16_000_000;
/// The time after which an idle connection is not reused: less than the time after which the shop closes it.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// The maximum number of connections being opened concurrently. After a restart of the server, opening all connections
/// at once would fill its queue.
const CONNECTING_MAX: usize = 32;

/// A client of the server at one address.
pub struct HttpClient {
    /// `host:port`.
    address: String,
    host: HeaderValue,
    /// One permit per connection, idle or not.
    places: Semaphore,
    connecting: Semaphore,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: SendRequest<Full<Bytes>>,
    since: Instant,
}

/// Why a request got no answer.
#[derive(Debug)]
pub struct NoAnswer {
    pub reason: String,
    /// Whether the server may have received the request.
    pub may_be_heard: bool,
}

impl NoAnswer {
    fn unsent(reason: impl ToString) -> Self {
        Self { reason: reason.to_string(), may_be_heard: false }
    }

    fn sent(reason: impl ToString) -> Self {
        Self { reason: reason.to_string(), may_be_heard: true }
    }
}

impl HttpClient {
    /// Creates a client with at most `places` connections to `address`, which is `host:port`.
    pub fn new(address: &str, places: usize) -> Result<Self, String> {
        Ok(Self {
            host: address.parse().map_err(|_| format!("{address} is not host:port"))?,
            address: address.to_owned(),
            places: Semaphore::new(places),
            connecting: Semaphore::new(CONNECTING_MAX),
            idle: Mutex::default(),
        })
    }

    /// Waits for a permit, sends a request whose URI is a path, and reads the answer.
    pub async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Bytes>, NoAnswer> {
        request.headers_mut().insert(HOST, self.host.clone());
        let _place = self.places.acquire().await.map_err(NoAnswer::unsent)?;
        let late = |_| NoAnswer::sent(format!("no answer within {} s", ANSWER_TIME_MAX.as_secs()));
        timeout(ANSWER_TIME_MAX, self.send_now(request)).await.map_err(late)?
    }

    async fn send_now(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Bytes>, NoAnswer> {
        loop {
            let kept = self.kept();
            let is_kept = kept.is_some();
            let mut connection = match kept {
                Some(kept) => kept,
                None => self.connect().await?,
            };
            let mut failed = match connection.try_send_request(request).await {
                Ok(response) => return self.read(response, connection).await,
                Err(failed) => failed,
            };
            match failed.take_message() {
                // The server had already closed this idle connection.
                Some(unsent) if is_kept => request = unsent,
                Some(_) => return Err(NoAnswer::unsent(chain(failed.error()))),
                None => return Err(NoAnswer::sent(chain(failed.error()))),
            }
        }
    }

    async fn read(
        &self,
        response: Response<Incoming>,
        mut connection: SendRequest<Full<Bytes>>,
    ) -> Result<Response<Bytes>, NoAnswer> {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(NoAnswer::sent)?;
        // Keeps the connection open unless the server asked to close it.
        if connection.ready().await.is_ok() {
            self.idle().push(Idle { connection, since: Instant::now() });
        }
        Ok(Response::from_parts(head, body.to_bytes()))
    }

    /// Returns the most recently used connection, so that the extra connections of a burst stay idle and expire.
    fn kept(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle();
        let is_usable = |idle: &Idle| !idle.connection.is_closed() && idle.since.elapsed() < IDLE_MAX;
        std::iter::from_fn(|| idle.pop()).find(is_usable).map(|idle| idle.connection)
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, NoAnswer> {
        let _turn = self.connecting.acquire().await.map_err(NoAnswer::unsent)?;
        let stream = TcpStream::connect(&self.address).await.map_err(NoAnswer::unsent)?;
        stream.set_nodelay(true).map_err(NoAnswer::unsent)?;
        let (connection, driver) =
            handshake(TokioIo::new(stream)).await.map_err(|error| NoAnswer::unsent(chain(&error)))?;
        // The task ends together with the connection. The request reports any error.
        tokio::spawn(driver);
        Ok(connection)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the innermost cause of an error, because the outer message of the HTTP library says little.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.last().map(ToString::to_string).unwrap_or_default()
}
