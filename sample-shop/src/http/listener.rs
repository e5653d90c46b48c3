//! Accepts connections, each with its limits, and closes them when the shop stops.

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
use tokio_util::sync::CancellationToken;

/// Connections open at the same time. Further ones wait in the queue of the operating system.
pub const CONNECTIONS_MAX: usize = 4_096;
/// How long the head of a request may take to arrive, including the time for which the connection is idle before it.
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long requests in hand may take to end once the grace is over.
pub const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// How long a client that has just connected may take to send its first request once the grace is over.
const FIRST_REQUEST: Duration = Duration::from_secs(1);
/// The delay after the system could not accept a connection, for example for want of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// How the shop stops.
#[derive(Clone, Debug)]
pub struct Stopping {
    /// The shop was asked to stop: `/readyz` says so, and each answer asks its client to close the connection.
    pub announced: CancellationToken,
    /// How long the shop still accepts connections and requests after that.
    pub grace: Duration,
    /// The grace is over: no further connection is accepted, and no request waits any more.
    pub over: CancellationToken,
}

impl Stopping {
    /// Stops the shop when `announced` is cancelled, after `grace`.
    pub fn new(announced: CancellationToken, grace: Duration) -> Self {
        Self { announced, grace, over: CancellationToken::new() }
    }

    async fn grace_is_over(&self) {
        self.announced.cancelled().await;
        sleep(self.grace).await;
    }
}

/// Serves until the grace of `stopping` is over, then answers the requests in hand and closes the connections.
pub async fn serve(listener: TcpListener, app: Router, stopping: Stopping) -> Result<(), String> {
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
                    tracing::warn!(%error, "no connection could be taken");
                    sleep(ACCEPT_AGAIN).await;
                }
            },
            () = &mut grace_is_over => break,
        }
    }
    // Closing the listener would reset the connections that wait in its queue.
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
        tracing::warn!("{left} requests were not answered within {LAST_ANSWERS:?}, and were cut off");
        connections.shutdown().await;
    }
    Ok(())
}

/// Answers the requests of one connection until its client leaves, or until the grace is `over` and it is idle.
async fn converse(stream: TcpStream, app: Router, over: CancellationToken, _place: Option<OwnedSemaphorePermit>) {
    // An answer must not wait for the next one to fill a packet.
    _ = stream.set_nodelay(true);
    let app = TowerToHyperService::new(app);
    let was_asked = AtomicBool::new(false);
    let service = service_fn(|request| {
        was_asked.store(true, Ordering::Relaxed);
        app.call(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let grace = async {
        over.cancelled().await;
        // A client that has just connected is about to send a request, whose answer ends the connection.
        if !was_asked.load(Ordering::Relaxed) {
            sleep(FIRST_REQUEST).await;
        }
    };
    let ended = tokio::select! {
        // Reads what has arrived before closing an idle connection.
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
