//! Takes connections, each with its limits, and lets go of them when the shop stops.

use std::{io, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

/// Connections open at the same time; further ones wait in the queue of the system.
pub const CONNECTIONS_MAX: usize = 4_096;
/// How long the head of a request may take to arrive, and how long a connection may be idle before it.
pub const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// How long requests in hand may take to their end once the shop stops.
pub const LAST_ANSWERS: Duration = Duration::from_secs(10);
/// After the system had no connection to give, such as for want of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Serves until `stopping`; then takes no connection and no request any more, and answers those in hand.
pub async fn serve(listener: TcpListener, app: Router, stopping: CancellationToken) -> Result<(), String> {
    let (places, graceful) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), GracefulShutdown::new());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME_MAX);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
            listener.accept().await.map(|(stream, _)| (stream, place))
        };
        let (stream, place) = tokio::select! {
            accepted = accepted => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "no connection could be taken");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                    continue;
                }
            },
            () = stopping.cancelled() => break,
        };
        // An answer is not to wait for the next one to fill a packet.
        _ = stream.set_nodelay(true);
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(LAST_ANSWERS, graceful.shutdown()).await.is_err() {
        tracing::warn!("some requests were not answered within {LAST_ANSWERS:?}, and were cut off");
    }
    Ok(())
}
