//! Runs one service, or all of them, until the process is asked to stop.

use std::{
    io::{ErrorKind, Write},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{EventStore, Runtime, Service, Tail};
use annals_http::Server;
use axum::Router;
use futures::TryFutureExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    Failure,
    arguments::{BusUrl, Role, Serve},
    bus,
    claim::Claim,
    http::{self, OrderApi},
    order::Repositories,
    payment::{SimulatedProvider, TROUBLE_RATE},
    services,
    store::Store,
    troubles::report_troubles,
};

/// How long the parts may take to finish the work in progress.
const PATIENCE: Duration = Duration::from_secs(20);
/// If the address is in use, a starting process retries for the length of the grace plus this time, because a stopping
/// instance keeps the address during its grace.
const NEXT_INSTANCE: Duration = Duration::from_secs(2);
/// The interval between two attempts to bind the address.
const BIND_AGAIN: Duration = Duration::from_millis(50);
/// The seed that decides which requests to the simulated provider fail at the first attempt. The outcome of an order
/// does not depend on this seed.
const PROVIDER_SEED: u64 = 7;
/// The categories that requests wait for: the sagas of the order service, and the aggregates that those sagas are
/// about.
const FOLLOWED: [&str; 8] =
    ["saga.checkout", "saga.return", "saga.supply", "saga.closing", "order", "return", "supply", "closing"];

/// Why services ended without being asked to stop.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Ended(String);

/// Serves until `stop` is cancelled.
///
/// # Errors
/// Returns an error if the store, the bus or the address is not available, or if a part ended with an error.
pub async fn serve(arguments: Serve, stop: CancellationToken) -> Result<(), Failure> {
    if arguments.bus == BusUrl::Local && arguments.role != Role::All {
        return Err(
            "bus local: reaches only this process, and the other services run elsewhere: use `serve all`, or name \
                    a --bus kafka://host:port"
                .into(),
        );
    }
    // Binds the address first, so that a start with an address in use has no side effects.
    let listener = match arguments.http {
        Some(address) => {
            let patience = arguments.grace + NEXT_INSTANCE;
            tokio::select! {
                listener = bind(address, patience) => Some(listener?),
                () = stop.cancelled() => return Ok(()),
            }
        }
        None => None,
    };
    let store = Store::open(&arguments.store).await?;
    let claim = Claim::on(&arguments.store)?;
    let served = serve_on(&store, &arguments, listener, stop).await;
    let closed = store.close().await;
    drop(claim);
    served.and(closed)
}

/// Binds the address. If another instance still uses the address, retries until that instance closes it, or until
/// `patience` is over.
async fn bind(address: SocketAddr, patience: Duration) -> Result<TcpListener, Failure> {
    let started = Instant::now();
    let mut waits = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse && started.elapsed() < patience => {
                if !std::mem::replace(&mut waits, true) {
                    let seconds = patience.as_secs();
                    eprintln!("--http {address}: {error}; waiting up to {seconds} s for an instance that stops");
                }
                tokio::time::sleep(BIND_AGAIN).await;
            }
            Err(error) => return Err(format!("--http {address}: {error}").into()),
        }
    }
}

async fn serve_on(
    store: &Store,
    arguments: &Serve,
    listener: Option<TcpListener>,
    stop: CancellationToken,
) -> Result<(), Failure> {
    let bus = bus::open(&arguments.bus).await?;
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(store.port()).await?);
    let repositories = Repositories::new(&store);
    let mut runtime = arguments.shared_as().as_deref().map_or_else(Runtime::new, Runtime::shared);
    runtime.start(services_of(arguments.role, &store, &repositories), bus).await?;
    runtime.spawn("troubles", report_troubles(runtime.health(), runtime.shutdown()).err_into());
    // Services may end without being asked, for example if the database is restored while they run. The server and the
    // process then end too.
    let server = Server::new(&runtime, store.clone(), stop.clone())?.grace(arguments.grace);
    let accepted = http::accepted(server.metrics())?;
    let api = matches!(arguments.role, Role::All | Role::Order).then(|| OrderApi {
        store: store.clone(),
        repositories,
        sagas: server.sagas(&mut runtime, FOLLOWED.to_vec()),
        accepted,
        store_url: arguments.store.to_string(),
        bus_url: arguments.bus.to_string(),
    });
    say_where(arguments, listener.as_ref())?;
    match listener {
        // The services keep working until the last request is answered.
        Some(listener) => {
            let routes = api.map_or_else(Router::new, http::routes);
            let api = server.events().merge(routes).titled("Annals sample shop", env!("CARGO_PKG_VERSION"));
            server.serve(listener, api).await;
        }
        None => server.stopped().await,
    }
    let by_itself = !stop.is_cancelled();
    let drained = runtime.drain(PATIENCE).await;
    drained.map_err(|error| if by_itself { Failure::from(Ended(error.to_string())) } else { error.into() })
}

/// Prints the line from which scripts read the address.
fn say_where(arguments: &Serve, listener: Option<&TcpListener>) -> Result<(), Failure> {
    let at = match listener {
        Some(listener) => format!("http://{}", listener.local_addr()?),
        None => "no --http".to_owned(),
    };
    let Serve { role, store, bus, .. } = arguments;
    let mut out = std::io::stdout().lock();
    writeln!(out, "serving {role} at {at}, store {store}, bus {bus}")?;
    Ok(out.flush()?)
}

fn services_of(role: Role, store: &Arc<dyn EventStore>, repositories: &Repositories) -> Vec<Service> {
    let order = || services::order_service_with_office(store.clone(), repositories.clone());
    let inventory = || services::inventory_service_with_shelf(store.clone());
    let payment =
        || services::payment_service(store.clone(), Arc::new(SimulatedProvider::new(PROVIDER_SEED, TROUBLE_RATE)));
    let notification = || services::notification_service(store.clone());
    match role {
        Role::All => vec![order(), inventory(), payment(), notification()],
        Role::Order => vec![order()],
        Role::Inventory => vec![inventory()],
        Role::Payment => vec![payment()],
        Role::Notification => vec![notification()],
    }
}
