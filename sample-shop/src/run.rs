//! The main job, with all four services in this process: opens the stock, hands in every invoice, and waits until the
//! saga of each invoice has ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use annals::{
    Aggregate, Bus, DeadLetters, EventStore, Health, Repository, Runtime, StoreError, Tail, Transaction, Version,
    health::State,
};
use async_trait::async_trait;
use hdrhistogram::Histogram;
use tokio_util::sync::CancellationToken;

use crate::{
    books::Books,
    card::Chances,
    hand_in::{Customers, End, Kind, Paper, Shop, TakenIn},
    input::{InputError, Invoices},
    inventory::Stock,
    ledger::{Ledger, saga_stream},
    order::{OrderCommand, ReturnCommand},
    payment::{SimulatedProvider, TROUBLE_RATE},
    shop::{self, Counter, request},
    supply::{Supply, SupplyEvent},
};

/// How long the parts may take to finish the work in progress when they stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same limit while something is wrong, such as a full disk. The next start repeats any interrupted work.
const PATIENCE_IN_TROUBLE: Duration = Duration::from_secs(2);
/// How long a problem must last before it is reported.
const TROUBLE_LASTS: Duration = Duration::from_secs(2);
/// Why an invoice of an earlier run does not match the invoice of this run.
const OTHER: &str = "the store has an invoice of this name with other content: run the same file with the same \
                     options, or name another --store";

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The maximum number of invoices in progress.
    pub concurrency: usize,
    /// The share of declined cards.
    pub decline_rate: f64,
    /// The share of customers who cancel while their checkout runs.
    pub cancel_rate: f64,
    /// The seed of all random choices.
    pub seed: u64,
    /// Whether stock may run out. If so, the order of the invoices matters: each invoice waits for the earlier invoices
    /// that share a SKU with it. The result is then the same as handling the invoices one by one, on every machine.
    pub scarce: bool,
    /// The name of this process, if several processes share the store.
    pub shared_as: Option<String>,
    /// The name of this input. Stock is opened once for each name.
    pub input: String,
    /// Ends the run early: no further invoice is handed in, and the work in progress is finished.
    pub stop: CancellationToken,
}

/// The result of a run.
pub struct Outcome {
    /// The books of the whole store.
    pub books: Books,
    /// The number of sagas of this run that ended.
    pub sagas: u64,
    /// The number of invoices that an earlier run had already handed in.
    pub repeated: u64,
    /// The number of sagas that need an operator.
    pub stuck: u64,
    /// The number of orders and returns that were accepted and whose sagas have not ended. Above zero only for a run
    /// that was stopped.
    pub unfinished: u64,
    /// The time from the first invoice to the end of the last saga.
    pub elapsed: Duration,
    /// The time from handing in an invoice to the end of its saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// Invoices that a service rejected, each with its reason.
    pub rejected: Vec<String>,
    /// Messages that stay parked until an operator redrives them, each with its reason.
    pub parked: Vec<String>,
}

/// Why a run stopped early. The work that was done is kept; run the same input again to continue.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Input(#[from] InputError),
    #[error("opening the stock: {0}")]
    Stock(String),
    #[error("{0}")]
    Runtime(String),
}

impl Settings {
    /// The probabilities for choosing the customers' cards.
    pub fn chances(&self) -> Chances {
        Chances { seed: self.seed, decline_rate: self.decline_rate, cancel_rate: self.cancel_rate }
    }
}

/// The shop in this process.
#[derive(Clone)]
struct Here {
    store: Arc<dyn EventStore>,
    counter: Counter,
    stock: Repository<Stock>,
    ledger: Ledger,
}

/// Runs all four services in this process on one store, and hands in the invoices.
pub async fn run(
    store: Arc<dyn EventStore>,
    bus: Arc<dyn Bus>,
    opening_stock: BTreeMap<String, u64>,
    invoices: &mut Invoices,
    settings: Settings,
    on_progress: impl FnMut(u64),
) -> Result<Outcome, RunError> {
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(store).await?);
    let counter = Counter::new(&store);
    let provider = Arc::new(SimulatedProvider::new(settings.seed, TROUBLE_RATE));
    let mut runtime = settings.shared_as.as_deref().map_or_else(Runtime::new, Runtime::shared);
    let services = shop::all(&store, counter.clone(), provider);
    runtime.start(services, bus).await.map_err(|error| RunError::Runtime(error.to_string()))?;
    runtime.spawn("troubles", tell_troubles(runtime.health(), runtime.shutdown()));
    let ledger = Ledger::default();
    runtime.spawn("ledger", ledger.clone().follow(store.clone(), runtime.shutdown()));
    let here = Here { stock: Repository::new(store.clone()), store, counter, ledger: ledger.clone() };
    let customers = Customers::new(here.clone())?;
    let stop = &settings.stop;
    tokio::select! {
        opened = customers.open_stock(opening_stock, &settings.input) => opened?,
        () = stop.cancelled() => {}
    }
    let started = customers.hand_in_all(invoices, &settings, on_progress).await?;
    tokio::select! {
        ended = wait_for_open_sagas(&here) => ended?,
        () = stop.cancelled() => {}
    }
    let elapsed = started.elapsed();
    let health = runtime.health();
    let patience = if health.is_working() { PATIENCE } else { PATIENCE_IN_TROUBLE };
    let drained = runtime.drain(patience).await;
    if !stop.is_cancelled() {
        drained.map_err(RunError::Runtime)?;
    }
    ledger.read_up(&*here.store).await?;
    let parked = parked(&here.store, &health).await?;
    let (open, stuck) = ledger.open();
    let mut tally = customers.tally();
    Ok(Outcome {
        books: ledger.books(),
        sagas: tally.sagas,
        repeated: tally.repeated,
        stuck: stuck as u64,
        unfinished: (open - stuck) as u64,
        elapsed,
        latency_us: tally.latency_us.clone(),
        rejected: std::mem::take(&mut tally.rejected),
        parked,
    })
}

/// Reports why nothing moves forward, once for each reason that persists. Meanwhile the parts keep retrying.
pub(crate) async fn tell_troubles(health: Health, shutdown: CancellationToken) -> Result<(), String> {
    let (mut told, mut before) = (BTreeSet::new(), BTreeSet::new());
    loop {
        tokio::select! {
            () = tokio::time::sleep(TROUBLE_LASTS) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let reasons = health.parts().into_values().filter_map(|state| match state {
            State::Trouble(reason) => Some(reason),
            _ => None,
        });
        let now: BTreeSet<String> = reasons.collect();
        for reason in now.intersection(&before) {
            if told.insert(reason.clone()) {
                tracing::error!("waiting, and trying again: {reason}");
            }
        }
        told.retain(|reason| now.contains(reason));
        before = now;
    }
}

/// Lists the messages that no part will retry automatically, from this run and from earlier ones.
async fn parked(store: &Arc<dyn EventStore>, health: &Health) -> Result<Vec<String>, StoreError> {
    // A part handles one lane of a subscription, or is a member of a group.
    let parts = health.parts();
    let subscriptions: BTreeSet<&str> = parts.keys().filter_map(|part| part.split(['/', '#']).next()).collect();
    let (letters, mut parked) = (DeadLetters::new(store.clone()), Vec::new());
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
async fn wait_for_open_sagas(here: &Here) -> Result<(), RunError> {
    let head = here.store.status().await?.head;
    loop {
        if let Some(reason) = here.ledger.failed() {
            return Err(RunError::Runtime(reason));
        }
        let (open, stuck) = here.ledger.open();
        if here.ledger.position() >= head && open == stuck {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[async_trait]
impl Shop for Here {
    async fn take_in(&self, paper: Paper) -> Result<TakenIn, String> {
        match paper {
            Paper::Order { id, customer, lines, card } => {
                let place = OrderCommand::Place { order_id: id.clone(), customer, lines, card };
                self.papers(&self.counter.orders, &id, place).await
            }
            Paper::Return { id, customer, lines } => {
                let open = ReturnCommand::Open { return_id: id.clone(), customer, lines };
                self.papers(&self.counter.returns, &id, open).await
            }
            Paper::Supply(supply) => self.book(supply).await,
        }
    }

    async fn ended(&self, kind: Kind, id: &str) -> Result<End, String> {
        let saga = match kind {
            Kind::Order => "checkout",
            Kind::Return => "return",
            // A supply is booked in the same commit that accepts it, so there is nothing to wait for.
            Kind::Supply => return Ok(End::Ended),
        };
        self.ledger.ended(&saga_stream(saga, id)).await;
        Ok(End::Ended)
    }
}

impl Here {
    /// Accepts an order or a return once, even if it is handed in several times.
    async fn papers<A>(&self, papers: &Repository<A>, id: &str, command: A::Command) -> Result<TakenIn, String>
    where
        A: Aggregate<Command: Clone, Event: PartialEq>,
    {
        let decided = papers.create(id, command.clone(), request(A::CATEGORY, id)).await;
        let decided = decided.map_err(|error| error.to_string())?;
        let repeated = decided.repeated || decided.events.is_empty();
        if repeated {
            let stream = papers.stream(id).map_err(|error| error.to_string())?;
            let recorded =
                self.store.read_stream(&stream, Version::START, 1).await.map_err(|error| error.to_string())?;
            let first = recorded.first().map(|event| event.decode::<A::Event>()).transpose();
            let first = first.map_err(|error| error.to_string())?.flatten();
            let now = A::default().decide(&command).map_err(|error| error.to_string())?;
            if first != now.into_iter().next() {
                return Err(OTHER.into());
            }
        }
        Ok(TakenIn { repeated, ..TakenIn::default() })
    }

    /// Accepts a supply and books it in one commit, which is possible because the order and inventory services share a
    /// store here.
    async fn book(&self, supply: SupplyEvent) -> Result<TakenIn, String> {
        let mut transaction = Transaction::new(self.store.clone(), request(Supply::CATEGORY, supply.id()));
        loop {
            let mut work = transaction.begin();
            let decided = work.execute(&self.counter.supplies, supply.id(), &supply).await;
            let decided = decided.map_err(|error| error.to_string())?;
            let repeated = decided.repeated || decided.events.is_empty();
            if !repeated {
                for of_sku in supply.commands() {
                    let booked = work.execute(&self.stock, &of_sku.sku, &of_sku).await;
                    booked.map_err(|error| format!("{}: {error}", of_sku.sku))?;
                }
            }
            if transaction.commit(work).await.map_err(|error| error.to_string())?.is_some() {
                return Ok(TakenIn {
                    repeated,
                    units: decided.events.into_iter().flat_map(SupplyEvent::units).collect(),
                    end: None,
                });
            }
        }
    }
}
