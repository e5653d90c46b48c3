//! The HTTP server of a service, which runs next to the runtime of the service.

use std::{fmt, sync::Arc, time::Duration};

use annals::{EventStore, Health, Runtime};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    api::Api,
    app::app,
    events::events,
    follower::Follower,
    limits::Limits,
    listener::{Stopping, serve},
    metrics::Metrics,
    probes::Probes,
    sagas::Sagas,
};

/// The default of [`Server::grace`].
pub const GRACE: Duration = Duration::from_secs(5);

/// The HTTP server of a service: puts the routes of the service behind [`Limits`], adds [`Probes`] and [`Metrics`], and
/// stops without a failed request.
///
/// When `stop` is cancelled, the server announces its stop (see [`Stopping`]), keeps accepting requests for the grace
/// period, and then answers the requests in progress. Only then does [`serve`](Self::serve) return, so that the caller
/// drains the runtime after the last answer. If the runtime ends by itself, the server stops too.
///
/// ```
/// # use std::{sync::Arc, time::Duration};
/// # use annals::{EventStore, MemoryStore, Runtime};
/// # use annals_http::Server;
/// # use axum::{Router, routing::get};
/// # use tokio::net::TcpListener;
/// # use tokio_util::sync::CancellationToken;
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
/// let runtime = Runtime::new();
/// let stop = CancellationToken::new();
/// let server = Server::new(&runtime, store, stop.clone())?;
/// let greeting = Router::new().route("/greeting", get(|| async { "hello" }));
/// let api = server.events().merge(greeting).titled("greeter", "1.0");
/// # stop.cancel();
/// server.serve(TcpListener::bind("127.0.0.1:0").await?, api).await;
/// runtime.drain(Duration::from_secs(20)).await?;
/// # Ok(())
/// # }
/// ```
pub struct Server {
    store: Arc<dyn EventStore>,
    health: Health,
    metrics: Arc<Metrics>,
    limits: Limits,
    stopping: Stopping,
    /// Cancelled when the runtime stops.
    ended: CancellationToken,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("limits", &self.limits).field("stopping", &self.stopping).finish_non_exhaustive()
    }
}

impl Server {
    /// Creates a server for the services of a runtime, on the store of these services. The server stops when `stop` is
    /// cancelled or the runtime ends.
    ///
    /// # Errors
    /// Fails if the metrics cannot be registered, which is a programming error.
    pub fn new(
        runtime: &Runtime,
        store: Arc<dyn EventStore>,
        stop: CancellationToken,
    ) -> Result<Self, prometheus::Error> {
        let stopping = Stopping::new(stop.child_token(), GRACE);
        let metrics = Metrics::new()?;
        let limits = Limits::default();
        Ok(Self { store, health: runtime.health(), metrics, limits, stopping, ended: runtime.shutdown() })
    }

    /// Sets the limits of requests.
    #[must_use]
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// Sets how long the server keeps accepting requests after it has announced its stop; [`GRACE`] by default.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.stopping.grace = grace;
        self
    }

    /// The metrics of the process, to which a service can add its own.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Returns the routes that send the events of the store live; see [`events`].
    pub fn events(&self) -> Api {
        events(self.store.clone(), self.stopping.announced.clone())
    }

    /// Lets requests wait for sagas. `categories` are the categories of the sagas (`saga.<name>`) and of the aggregates
    /// that the sagas are about.
    pub fn sagas(&self, runtime: &mut Runtime, categories: Vec<&'static str>) -> Sagas {
        let follower = Follower::default();
        let reads = follower.clone().read(self.store.clone(), categories, self.metrics.clone(), runtime.shutdown());
        runtime.spawn("follower", async { reads.await.map_err(Into::into) });
        Sagas { store: self.store.clone(), follower, over: self.stopping.over.clone() }
    }

    /// Waits until the server is asked to stop, or until the runtime stops. This method is for a process that does not
    /// serve HTTP.
    pub async fn stopped(&self) {
        tokio::select! {
            () = self.stopping.announced.cancelled() => {}
            () = self.ended.cancelled() => {}
        }
    }

    /// Serves until the server is asked to stop, and answers the requests in progress.
    pub async fn serve(self, listener: TcpListener, api: impl Into<Api>) {
        let Self { store, health, metrics, limits, stopping, ended } = self;
        let announced = stopping.announced.clone();
        let probes = Probes { store, health, metrics, announced: announced.clone() };
        let serving = serve(listener, app(api, limits, probes), stopping);
        let announce = async {
            ended.cancelled().await;
            announced.cancel();
            std::future::pending().await
        };
        tokio::select! {
            () = serving => {}
            () = announce => {}
        }
    }
}
