//! The main job, with all four services in this process: opens the stock, submits every invoice, and waits until the saga
//! of each invoice has ended.

mod in_process;
mod ledger;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use annals::{Bus, DeadLetters, EventStore, Health, Runtime, StoreError, Tail};
use futures::TryFutureExt;
use shop_driver::{
    customers::Customers,
    input::Invoices,
    run::{Outcome, RunError, Settings},
};

use self::{in_process::InProcess, ledger::Ledger};
use crate::{
    order::Repositories,
    payment::{SimulatedProvider, TROUBLE_RATE},
    services,
    troubles::report_troubles,
};

/// How long the parts may take to finish the work in progress when they stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the parts may take while something is wrong, such as a full disk. The next start repeats any interrupted
/// work.
const PATIENCE_IN_TROUBLE: Duration = Duration::from_secs(2);

/// The store and the bus of the shop.
pub struct Places {
    pub store: Arc<dyn EventStore>,
    pub bus: Arc<dyn Bus>,
    /// The name of this process, if several processes share the store.
    pub shared_as: Option<String>,
}

/// Runs all four services in this process on one store, and submits the invoices.
pub async fn run(
    places: Places,
    opening_stock: BTreeMap<String, u64>,
    invoices: &mut Invoices,
    settings: Settings,
    on_progress: impl FnMut(u64),
) -> Result<Outcome, RunError> {
    let Places { store, bus, shared_as } = places;
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(store).await.map_err(failed)?);
    let repositories = Repositories::new(&store);
    let provider = Arc::new(SimulatedProvider::new(settings.chances.seed, TROUBLE_RATE));
    let mut runtime = shared_as.as_deref().map_or_else(Runtime::new, Runtime::shared);
    let services = services::all(&store, repositories.clone(), provider);
    runtime.start(services, bus).await.map_err(|error| RunError::Shop(error.to_string()))?;
    runtime.spawn("troubles", report_troubles(runtime.health(), runtime.shutdown()).err_into());
    let ledger = Ledger::default();
    runtime.spawn("ledger", ledger.clone().follow(store.clone(), runtime.shutdown()).err_into());
    let shop = InProcess::new(store, repositories, ledger.clone());
    let customers = Customers::new(shop.clone())?;
    let stop = &settings.stop;
    tokio::select! {
        opened = customers.open_stock(opening_stock, &settings.input) => opened?,
        () = stop.cancelled() => {}
    }
    let started = customers.submit_all(invoices, &settings, on_progress).await?;
    tokio::select! {
        ended = wait_for_open_sagas(&shop) => ended?,
        () = stop.cancelled() => {}
    }
    let elapsed = started.elapsed();
    let health = runtime.health();
    let patience = if health.is_working() { PATIENCE } else { PATIENCE_IN_TROUBLE };
    let drained = runtime.drain(patience).await;
    if !stop.is_cancelled() {
        drained.map_err(|error| RunError::Shop(error.to_string()))?;
    }
    ledger.read_up(&*shop.store).await.map_err(failed)?;
    let parked = parked(&shop.store, &health).await.map_err(failed)?;
    let open = ledger.open();
    let mut results = customers.results();
    Ok(Outcome {
        totals: ledger.totals(),
        sagas: results.sagas,
        repeated: results.repeated,
        stuck: open.stuck,
        unfinished: open.sagas - open.stuck,
        elapsed,
        latency_us: results.latency_us.clone(),
        rejected: std::mem::take(&mut results.rejected),
        parked,
    })
}

fn failed(error: StoreError) -> RunError {
    RunError::Shop(error.to_string())
}

/// Lists the messages that no part will retry automatically, from this run and from earlier runs.
async fn parked(store: &Arc<dyn EventStore>, health: &Health) -> Result<Vec<String>, StoreError> {
    // A part handles one lane of a subscription, or is a member of a group.
    let parts = health.parts();
    let subscriptions: BTreeSet<&str> = parts.keys().filter_map(|part| part.split(['/', '#']).next()).collect();
    let letters = DeadLetters::new(store.clone());
    let mut parked = Vec::new();
    for subscription in subscriptions {
        for letter in letters.list(subscription).await?.into_iter().filter(|letter| letter.retries_at.is_none()) {
            let behind = match letter.behind {
                0 => String::new(),
                behind => format!(" ({behind} messages wait behind it)"),
            };
            parked.push(format!("{subscription}, {}: {}{behind}", letter.parked.key, letter.parked.reason));
        }
    }
    Ok(parked)
}

/// Waits for the sagas that an earlier run left unfinished. Does not wait for stuck sagas, which need an operator.
async fn wait_for_open_sagas(shop: &InProcess) -> Result<(), RunError> {
    let head = shop.store.status().await.map_err(failed)?.head;
    loop {
        if let Some(reason) = shop.ledger.failed() {
            return Err(RunError::Shop(reason));
        }
        let open = shop.ledger.open();
        if shop.ledger.position() >= head && open.sagas == open.stuck {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
