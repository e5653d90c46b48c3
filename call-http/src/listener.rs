//! Accepts connections, applies limits to each of them, and closes them when the service stops.

use std::{
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::Router;
use hyper::{
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;

/// The maximum number of open connections. Further connections wait in the queue of the operating system.
pub const CONNECTIONS_MAX: usize = 16_384;
/// How long the head of a request may take to arrive, including the time during which the connection was idle before
/// the request.
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a client may take to accept a part of an answer.
pub const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
/// The maximum number of bytes that a connection buffers in each direction. The head of a request must fit.
const BUFFER_BYTES_MAX: usize = 32 * 1024;
/// How long requests in progress may take to end once the grace is over.
pub const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// How long a newly connected client may take to send its first request once the grace is over.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// The delay before the next attempt after the system failed to accept a connection, for example because the process
/// ran out of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// How the service stops.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// Cancelled when the service is asked to stop. From then on, `/readyz` reports the stop, and each answer asks its
    /// client to close the connection.
    pub announced: CancellationToken,
    /// The grace: how long the service keeps accepting connections and requests after `announced` is cancelled.
    pub grace: Duration,
    /// Cancelled when the grace is over. From then on, no connection is accepted, and no request waits any longer.
    pub over: CancellationToken,
}

impl Stopping {
    /// Plans a stop that begins when `announced` is cancelled. From then on, [`serve`] still accepts requests for the
    /// duration `grace`, and then cancels `over`.
    pub fn new(announced: CancellationToken, grace: Duration) -> Self {
        Self { announced, grace, over: CancellationToken::new() }
    }

    async fn grace_is_over(&self) {
        self.announced.cancelled().await;
        sleep(self.grace).await;
    }
}

/// Serves until the grace of `stopping` is over. Then answers the requests in progress and closes the connections. A
/// connection that fails is logged.
pub async fn serve(listener: TcpListener, app: Router, stopping: Stopping) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut take = |stream: TcpStream, place: Option<OwnedSemaphorePermit>| {
        while connections.try_join_next().is_some() {}
        connections.spawn(converse(stream, app.clone(), stopping.over.clone(), place));
    };
    let mut grace_is_over = pin!(stopping.grace_is_over());
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            listener.accept().await.map(|(stream, _)| (stream, place))
        };
        tokio::select! {
            accepted = accepted => match accepted {
                Ok((stream, place)) => take(stream, Some(place)),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    sleep(ACCEPT_AGAIN).await;
                }
            },
            () = &mut grace_is_over => break,
        }
    }
    // Closing the listener would reset the connections that are waiting in its queue.
    if let Ok(queue) = listener.into_std() {
        while let Ok(stream) = queue.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            TcpStream::from_std(stream)
        }) {
            take(stream, None);
        }
    }
    stopping.over.cancel();
    if timeout(LAST_ANSWERS, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        let left = connections.len();
        tracing::warn!("{left} requests were not answered within {LAST_ANSWERS:?} and were aborted");
        connections.shutdown().await;
    }
}

/// Answers the requests of one connection until the client disconnects, or until the grace is `over` and the connection
/// is idle.
async fn converse(stream: TcpStream, app: Router, over: CancellationToken, _place: Option<OwnedSemaphorePermit>) {
    // Sends each answer at once instead of waiting for more data to fill a packet.
    _ = stream.set_nodelay(true);
    let app = TowerToHyperService::new(app);
    let was_asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        was_asked.store(true, Ordering::Relaxed);
        app.call(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX).max_buf_size(BUFFER_BYTES_MAX);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIME_MAX));
    let connection = http.serve_connection(TokioIo::new(Box::pin(stream)), service);
    let mut connection = pin!(connection.with_upgrades());
    let grace = async {
        over.cancelled().await;
        // A newly connected client is about to send a request, and the answer to that request will close the
        // connection.
        if !was_asked.load(Ordering::Relaxed) {
            sleep(FIRST_REQUEST).await;
        }
    };
    let ended = tokio::select! {
        // If a request has already arrived, reads that request before it closes the idle connection.
        biased;
        ended = connection.as_mut() => ended,
        () = grace => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended");
    }
}
