//! The main job: opens the stock, hands in every invoice, and waits until each has come to its end.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use annals::{
    DeadLetters, EventStore, ExecuteError, Health, LocalBus, Runtime, StoreError, Tail, Transaction, event::named_id,
    health::State,
};
use async_trait::async_trait;
use futures::StreamExt;
use hdrhistogram::Histogram;
use rust_decimal::Decimal;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    input::{InputError, Invoice, Invoices, ReadError},
    inventory::{OfSku, Stock, StockCommand, StockEvent},
    ledger::{Books, Ledger, saga_stream},
    order::{Line, OrderCommand, ReturnCommand},
    payment::{Provider, ProviderError, SimulatedProvider, draw},
    shop::{self, Counter},
};

/// How long the parts may take to finish what they have in hand.
const PATIENCE: Duration = Duration::from_secs(20);
/// Share of the simulated provider's requests that go wrong the first time.
const TROUBLE_RATE: f64 = 0.002;
/// The same while something is wrong, such as a full disk: what is cut off is done again at the next start.
const PATIENCE_IN_TROUBLE: Duration = Duration::from_secs(2);
/// A trouble is told when it lasts this long.
const TROUBLE_LASTS: Duration = Duration::from_secs(2);
/// Latencies are kept from a microsecond to ten minutes.
const LATENCY_MAX_US: u64 = 600_000_000;

/// How a run goes about it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Invoices under way at the same time.
    pub concurrency: usize,
    /// Share of cards that are declined.
    pub decline_rate: f64,
    /// Share of customers who cancel while their checkout runs.
    pub cancel_rate: f64,
    /// All chance comes from it.
    pub seed: u64,
    /// Whether stock may run out. Then who comes first matters: an invoice waits for the earlier ones that share a SKU
    /// with it, so that the result is that of handling them one by one, whatever the machine does.
    pub scarce: bool,
    /// The name of this process, where several share the store.
    pub shared_as: Option<String>,
    /// Names this input: stock is opened once for each.
    pub input: String,
    /// Ends the run early: nothing more is handed in, and what is in hand is finished.
    pub stop: CancellationToken,
}

/// What a run came to.
pub struct Outcome {
    /// The books of the whole store.
    pub books: Books,
    /// Sagas of this run that ended.
    pub sagas: u64,
    /// Invoices that an earlier run had already handed in.
    pub repeated: u64,
    /// Sagas an operator has to look at.
    pub stuck: u64,
    /// Orders and returns that were taken in and have not ended; only a run that was stopped leaves any.
    pub unfinished: u64,
    /// From the first invoice to the last end.
    pub elapsed: Duration,
    /// From handing in an invoice to the end of its saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// Invoices that a service turned away, each with why.
    pub rejected: Vec<String>,
    /// Messages that were set aside until somebody redrives them, each with why.
    pub parked: Vec<String>,
}

/// Why a run stopped. What it did stays done: run it again, and it goes on.
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

/// Customers, some of whom cancel while their card is being charged: in the middle of the checkout, on every run.
struct ImpatientCustomers {
    provider: SimulatedProvider,
    counter: Counter,
    cancel_rate: f64,
}

#[async_trait]
impl Provider for ImpatientCustomers {
    async fn charge(&self, key: Uuid, order_id: &str, amount: Decimal) -> Result<(), ProviderError> {
        if self.cancel_rate > 0.0 && draw(self.provider.seed, "cancel", order_id) < self.cancel_rate {
            let cancel = OrderCommand::Cancel { reason: "by_customer".into() };
            let command_id = named_id(key, "cancel");
            if let Err(ExecuteError::Unavailable(_)) = self.counter.orders.execute(order_id, cancel, command_id).await {
                return Err(ProviderError::Busy);
            }
        }
        self.provider.charge(key, order_id, amount).await
    }

    async fn refund(&self, key: Uuid, id: &str, amount: Decimal) -> Result<(), ProviderError> {
        self.provider.refund(key, id, amount).await
    }
}

/// A run under way.
#[derive(Clone)]
struct Shop {
    store: Arc<dyn EventStore>,
    counter: Counter,
    stock: annals::Repository<Stock>,
    ledger: Ledger,
    tally: Arc<Mutex<Tally>>,
}

struct Tally {
    latency_us: Histogram<u64>,
    sagas: u64,
    repeated: u64,
    rejected: Vec<String>,
}

/// Runs all four services in this process on one store and the local bus, and hands in the invoices.
pub async fn run(
    store: Arc<dyn EventStore>,
    opening_stock: BTreeMap<String, u64>,
    invoices: &mut Invoices,
    settings: Settings,
    mut on_progress: impl FnMut(u64),
) -> Result<Outcome, RunError> {
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(store).await?);
    let counter = Counter::new(&store);
    let provider = SimulatedProvider::new(settings.seed, settings.decline_rate, TROUBLE_RATE);
    let customers = ImpatientCustomers { provider, counter: counter.clone(), cancel_rate: settings.cancel_rate };
    let mut runtime = settings.shared_as.as_deref().map_or_else(Runtime::new, Runtime::shared);
    let services = shop::all(&store, counter.clone(), Arc::new(customers));
    runtime.start(services, Arc::new(LocalBus::new(4))).await.map_err(|error| RunError::Runtime(error.to_string()))?;
    runtime.spawn("troubles", tell_troubles(runtime.health(), runtime.shutdown()));
    let ledger = Ledger::default();
    runtime.spawn("ledger", ledger.clone().follow(store.clone(), runtime.shutdown()));
    let latency_us =
        Histogram::new_with_max(LATENCY_MAX_US, 3).map_err(|error| RunError::Runtime(error.to_string()))?;
    let tally = Tally { latency_us, sagas: 0, repeated: 0, rejected: Vec::new() };
    let stock = annals::Repository::new(store.clone());
    let shop = Shop { store, counter, stock, ledger: ledger.clone(), tally: Arc::new(Mutex::new(tally)) };
    let stop = settings.stop;
    tokio::select! {
        opened = shop.open_stock(opening_stock, &settings.input) => opened?,
        () = stop.cancelled() => {}
    }

    let started = Instant::now();
    let slots = Arc::new(Semaphore::new(settings.concurrency));
    let mut queues = Queues::default();
    let mut under_way = JoinSet::new();
    let mut handed_in = 0;
    for invoice in invoices {
        let invoice = match invoice {
            Ok(invoice) => invoice,
            // The reader counts and reports it; the run goes on.
            Err(ReadError::Row(_)) => continue,
            Err(ReadError::Input(error)) => return Err(error.into()),
        };
        let slot = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            slot = slots.clone().acquire_owned() => slot,
        };
        let Ok(slot) = slot else { break };
        handed_in += 1;
        on_progress(handed_in);
        let turn = if settings.scarce { queues.join(&invoice) } else { Turn::default() };
        let shop = shop.clone();
        under_way.spawn(async move {
            turn.come().await;
            shop.hand_in(invoice).await;
            drop((turn, slot));
        });
        while under_way.try_join_next().is_some() {}
    }
    let all_end = async {
        while under_way.join_next().await.is_some() {}
        wait_for_open_sagas(&shop).await
    };
    tokio::select! {
        ended = all_end => ended?,
        () = stop.cancelled() => {}
    }
    let elapsed = started.elapsed();
    // Those who still wait for the end of their sagas.
    under_way.shutdown().await;
    let health = runtime.health();
    let patience = if health.is_fine() { PATIENCE } else { PATIENCE_IN_TROUBLE };
    let drained = runtime.drain(patience).await;
    if !stop.is_cancelled() {
        drained.map_err(RunError::Runtime)?;
    }
    ledger.read_up(&*shop.store).await?;
    let parked = parked(&shop.store, &health).await?;
    let (open, stuck) = ledger.open();
    let mut tally = shop.tally();
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

/// Says why nothing moves, once for each reason that lasts. The parts go on trying.
async fn tell_troubles(health: Health, shutdown: CancellationToken) -> Result<(), String> {
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

/// What no part will try again by itself, whichever run it was set aside in.
async fn parked(store: &Arc<dyn EventStore>, health: &Health) -> Result<Vec<String>, StoreError> {
    // A part is a lane of a subscription, or a member of a group.
    let parts = health.parts();
    let subscriptions: BTreeSet<&str> = parts.keys().filter_map(|part| part.split(['/', '#']).next()).collect();
    let (letters, mut parked) = (DeadLetters::new(store.clone()), Vec::new());
    for subscription in subscriptions {
        for letter in letters.list(subscription).await?.into_iter().filter(|letter| letter.retries_at.is_none()) {
            let behind = match letter.behind {
                0 => String::new(),
                behind => format!(" ({behind} wait behind it)"),
            };
            parked.push(format!("{subscription}, {}: {}{behind}", letter.parked.key, letter.parked.reason));
        }
    }
    Ok(parked)
}

/// Sagas that an earlier run left under way end too; those that are stuck wait for an operator.
async fn wait_for_open_sagas(shop: &Shop) -> Result<(), RunError> {
    let head = shop.store.status().await?.head;
    loop {
        if let Some(reason) = shop.ledger.failed() {
            return Err(RunError::Runtime(reason));
        }
        let (open, stuck) = shop.ledger.open();
        if shop.ledger.position() >= head && open == stuck {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Shop {
    fn tally(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open_stock(&self, opening_stock: BTreeMap<String, u64>, input: &str) -> Result<(), RunError> {
        let receive = |(sku, quantity): (String, u64)| {
            let delivery_id = format!("opening of {input}");
            let id = named_id(named_id(Uuid::NAMESPACE_OID, &delivery_id), &sku);
            let command = OfSku { sku: sku.clone(), command: StockCommand::Receive { quantity, delivery_id } };
            let stock = &self.stock;
            async move {
                let decided = stock.execute(&sku, command, id).await.map_err(|error| format!("{sku}: {error}"))?;
                match decided.events.first() {
                    Some(StockEvent::Received { quantity: before, .. }) if *before != quantity => Err(format!(
                        "{input:?} was run on this store before, with {before} units of {sku} where there would be {quantity} \
                         now: run the same file with the same --stock-factor, or name another --store"
                    )),
                    _ => Ok(()),
                }
            }
        };
        let received = futures::stream::iter(opening_stock).map(receive).buffer_unordered(512);
        let refused = received.filter_map(async |outcome| outcome.err()).collect::<Vec<_>>().await;
        refused.into_iter().min().map_or(Ok(()), |reason| Err(RunError::Stock(reason)))
    }

    /// Hands in one invoice and waits for its end.
    async fn hand_in(&self, invoice: Invoice) {
        let started = Instant::now();
        let command_id = named_id(named_id(Uuid::NAMESPACE_OID, "sample-shop invoice"), invoice.id());
        let rejected = |reason: String| self.tally().rejected.push(reason);
        let (saga, id, repeated) = match invoice {
            Invoice::Adjustment { id, lines } => {
                if let Err(error) = self.adjust(&id, lines, command_id).await {
                    rejected(format!("adjustment {id}: {error}"));
                }
                return;
            }
            Invoice::Order { id, customer, lines } => {
                let place = OrderCommand::Place { order_id: id.clone(), customer, lines: order_lines(lines) };
                match self.counter.orders.create(&id, place, command_id).await {
                    Ok(decided) => ("checkout", id, decided.repeated || decided.events.is_empty()),
                    Err(error) => return rejected(format!("order {id:.60}: {error}")),
                }
            }
            Invoice::Return { id, customer, lines } => {
                let open = ReturnCommand::Open { return_id: id.clone(), customer, lines: order_lines(lines) };
                match self.counter.returns.create(&id, open, command_id).await {
                    Ok(decided) => ("return", id, decided.repeated || decided.events.is_empty()),
                    Err(error) => return rejected(format!("return {id:.60}: {error}")),
                }
            }
        };
        self.ledger.ended(&saga_stream(saga, &id)).await;
        let mut tally = self.tally();
        if repeated {
            tally.repeated += 1;
        } else {
            tally.sagas += 1;
            let elapsed = u64::try_from(started.elapsed().as_micros()).unwrap_or(LATENCY_MAX_US);
            tally.latency_us.saturating_record(elapsed);
        }
    }

    /// All lines of an adjustment in one commit.
    async fn adjust(&self, id: &str, lines: Vec<(String, i64)>, command_id: Uuid) -> Result<(), String> {
        let mut of_sku: BTreeMap<String, i64> = BTreeMap::new();
        for (sku, quantity) in lines {
            *of_sku.entry(sku).or_default() += quantity;
        }
        let mut transaction = Transaction::new(self.store.clone(), command_id);
        loop {
            let mut work = transaction.begin();
            for (sku, quantity) in &of_sku {
                let command = StockCommand::Adjust { adjustment_id: id.to_owned(), quantity: *quantity };
                let of_sku = OfSku { sku: sku.clone(), command };
                work.execute(&self.stock, sku, &of_sku).await.map_err(|error| error.to_string())?;
            }
            if transaction.commit(work).await.map_err(|error| error.to_string())?.is_some() {
                return Ok(());
            }
        }
    }
}

fn order_lines(lines: Vec<crate::input::Line>) -> Vec<Line> {
    lines.into_iter().map(|line| Line { sku: line.sku, quantity: line.quantity, unit_price: line.unit_price }).collect()
}

/// Who came last for each SKU.
#[derive(Default)]
struct Queues {
    last: HashMap<String, watch::Receiver<()>>,
}

/// A place in the queues of an invoice's SKUs; dropping it lets the next ones come.
#[derive(Default)]
struct Turn {
    earlier: Vec<watch::Receiver<()>>,
    _mine: Option<watch::Sender<()>>,
}

impl Queues {
    fn join(&mut self, invoice: &Invoice) -> Turn {
        let (mine, served) = watch::channel(());
        let skus: BTreeSet<&str> = invoice.skus().collect();
        let earlier = skus.into_iter().filter_map(|sku| self.last.insert(sku.to_owned(), served.clone())).collect();
        Turn { earlier, _mine: Some(mine) }
    }
}

impl Turn {
    async fn come(&self) {
        for earlier in &self.earlier {
            // Ends with an error when the earlier invoice's sender is gone, which is what is waited for.
            while earlier.clone().changed().await.is_ok() {}
        }
    }
}
