//! Hands in the invoices of an input to a local or remote shop, and waits until each has been handled.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use hdrhistogram::Histogram;
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};

use crate::{
    card::Card,
    input::{self, Invoice, Invoices, ReadError},
    order::Line,
    run::{RunError, Settings},
    supply::{self, Change, SupplyEvent},
};

/// The largest latency that the histogram records: ten minutes, in microseconds.
const LATENCY_MAX_US: u64 = 600_000_000;
/// The maximum number of deliveries of the opening stock in flight.
const DELIVERIES_MAX: usize = 8;

/// A shop that accepts invoices: the shop in this process, or a shop behind HTTP. A caller may hand in the same invoice
/// any number of times; the shop accepts it once.
#[async_trait]
pub trait Shop: Clone + Send + Sync + 'static {
    /// Accepts an order, a return or a supply. The error is the reason for a rejection.
    async fn take_in(&self, paper: Paper) -> Result<TakenIn, String>;
    /// Waits until the saga of an accepted paper ends. Called only if the saga had not ended when the paper was
    /// accepted.
    async fn ended(&self, kind: Kind, id: &str) -> Result<End, String>;
}

/// A paper that a customer hands in: an order, a return, or a supply (a delivery or a stock count).
#[derive(Clone, Debug)]
pub enum Paper {
    Order { id: String, customer: Option<String>, lines: Vec<Line>, card: Card },
    Return { id: String, customer: Option<String>, lines: Vec<Line> },
    Supply(SupplyEvent),
}

/// The kind of a paper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Order,
    Return,
    Supply,
}

/// The state of a paper that was accepted.
#[derive(Clone, Debug, Default)]
pub struct TakenIn {
    /// Whether an earlier run handed in the same paper.
    pub repeated: bool,
    /// The changes in a supply as they were first accepted.
    pub units: Vec<Change>,
    /// How the saga of the paper ended, if it has ended.
    pub end: Option<End>,
}

/// How the saga of a paper ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Ended,
    /// The saga is waiting for an operator.
    Stuck,
}

/// The result of handing in papers.
pub struct Tally {
    /// The time from handing in an invoice to the end of its saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// The number of sagas of this run that ended.
    pub sagas: u64,
    /// The number of invoices that an earlier run had already handed in.
    pub repeated: u64,
    /// The number of orders and returns that are waiting for an operator.
    pub stuck: u64,
    /// The number of orders and returns that were handed in, and whose end this run did not see.
    pub unfinished: u64,
    /// Invoices that were rejected, each with its reason.
    pub rejected: Vec<String>,
}

/// Hands in opening stocks and invoices.
#[derive(Clone)]
pub struct Customers<S> {
    shop: S,
    tally: Arc<Mutex<Tally>>,
}

impl<S: Shop> Customers<S> {
    /// Returns customers for this shop.
    pub fn new(shop: S) -> Result<Self, RunError> {
        let latency_us =
            Histogram::new_with_max(LATENCY_MAX_US, 3).map_err(|error| RunError::Runtime(error.to_string()))?;
        let tally = Tally { latency_us, sagas: 0, repeated: 0, stuck: 0, unfinished: 0, rejected: Vec::new() };
        Ok(Self { shop, tally: Arc::new(Mutex::new(tally)) })
    }

    /// The result so far.
    pub fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the stock if it is not open yet, and waits until all of it is booked.
    pub async fn open_stock(&self, stock: BTreeMap<String, u64>, input: &str) -> Result<(), RunError> {
        let slots = Arc::new(Semaphore::new(DELIVERIES_MAX));
        let mut deliveries = JoinSet::new();
        for delivery in supply::opening(input, stock) {
            let (shop, slots, input) = (self.shop.clone(), slots.clone(), input.to_owned());
            deliveries.spawn(async move {
                let _slot = slots.acquire_owned().await;
                let SupplyEvent::Delivered { supply_id, units } = &delivery else { return Ok(()) };
                let taken_in = shop.take_in(Paper::Supply(delivery.clone())).await;
                let taken_in = taken_in.map_err(|error| format!("{supply_id}: {error}"))?;
                differs(&input, &taken_in.units, units)?;
                match end(&shop, Kind::Supply, supply_id, &taken_in).await {
                    Ok(End::Ended) => Ok(()),
                    Ok(End::Stuck) => Err(format!("{supply_id} could not be booked and waits for an operator")),
                    Err(error) => Err(format!("{supply_id}: {error}")),
                }
            });
        }
        let ended: Vec<Result<(), String>> = deliveries.join_all().await;
        let refused = ended.into_iter().filter_map(Result::err);
        refused.min().map_or(Ok(()), |reason| Err(RunError::Stock(reason)))
    }

    /// Hands in all invoices, and waits until their sagas end or the run is stopped. Returns the time at which the
    /// first invoice was handed in.
    pub async fn hand_in_all(
        &self,
        invoices: &mut Invoices,
        settings: &Settings,
        mut on_progress: impl FnMut(u64),
    ) -> Result<Instant, RunError> {
        let (started, stop) = (Instant::now(), &settings.stop);
        let slots = Arc::new(Semaphore::new(settings.concurrency));
        let mut queues = Queues::default();
        let mut under_way = JoinSet::new();
        let mut handed_in = 0;
        for invoice in invoices {
            let invoice = match invoice {
                Ok(invoice) => invoice,
                // The reader counts and reports the bad row, and the run continues.
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
            let customers = self.clone();
            let card = settings.chances().card(invoice.id());
            under_way.spawn(async move {
                turn.come().await;
                customers.hand_in(invoice, card).await;
                drop((turn, slot));
            });
            while under_way.try_join_next().is_some() {}
        }
        let all_end = async { while under_way.join_next().await.is_some() {} };
        tokio::select! {
            () = all_end => {}
            () = stop.cancelled() => {}
        }
        // Aborts the tasks that are still waiting for the end of a saga.
        under_way.shutdown().await;
        Ok(started)
    }

    /// Hands in one invoice, and waits for the end of its saga.
    async fn hand_in(&self, invoice: Invoice, card: Card) {
        let started = Instant::now();
        let (kind, id, paper) = match invoice {
            Invoice::Adjustment { id, lines } => {
                (Kind::Supply, id.clone(), Paper::Supply(supply::adjustment(id, lines)))
            }
            Invoice::Order { id, customer, lines } => {
                (Kind::Order, id.clone(), Paper::Order { id, customer, lines: order_lines(lines), card })
            }
            Invoice::Return { id, customer, lines } => {
                (Kind::Return, id.clone(), Paper::Return { id, customer, lines: order_lines(lines) })
            }
        };
        let rejected = |reason: String| self.tally().rejected.push(format!("{} {id:.60}: {reason}", kind.name()));
        let of_orders = u64::from(kind != Kind::Supply);
        self.tally().unfinished += of_orders;
        let taken_in = match self.shop.take_in(paper).await {
            Ok(taken_in) => taken_in,
            Err(reason) => {
                self.tally().unfinished -= of_orders;
                return rejected(reason);
            }
        };
        let end = match end(&self.shop, kind, &id, &taken_in).await {
            Ok(end) => end,
            Err(reason) => return rejected(reason),
        };
        let mut tally = self.tally();
        if end == End::Stuck {
            tally.stuck += 1;
        }
        if kind == Kind::Supply {
            return;
        }
        tally.unfinished -= of_orders;
        if taken_in.repeated {
            tally.repeated += 1;
        } else if end == End::Ended {
            tally.sagas += 1;
            tally.latency_us.saturating_record(micros(started.elapsed()));
        }
    }
}

/// Returns how the saga of the paper ended. Waits for the end if the saga is still running.
async fn end<S: Shop>(shop: &S, kind: Kind, id: &str, taken_in: &TakenIn) -> Result<End, String> {
    match taken_in.end {
        Some(end) => Ok(end),
        None => shop.ended(kind, id).await,
    }
}

fn micros(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(LATENCY_MAX_US)
}

/// Fails if the stock that an earlier run opened differs from this one, and names the SKU that differs.
fn differs(input: &str, before: &[Change], now: &[Change]) -> Result<(), String> {
    let quantity =
        |units: &[Change], sku: &str| units.iter().find(|change| change.sku == sku).map_or(0, |change| change.quantity);
    let skus: BTreeSet<&str> = before.iter().chain(now).map(|change| change.sku.as_str()).collect();
    for sku in skus {
        let (before, now) = (quantity(before, sku), quantity(now, sku));
        if before != now {
            return Err(format!(
                "{input:?} was run on this store before, with {before} units of {sku} where there would be {now} now: run the \
                 same file with the same --stock-factor, or name another --store"
            ));
        }
    }
    Ok(())
}

impl Kind {
    /// The word that people use for this kind of paper.
    pub fn name(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Return => "return",
            Self::Supply => "adjustment",
        }
    }
}

fn order_lines(lines: Vec<input::Line>) -> Vec<Line> {
    lines.into_iter().map(|line| Line { sku: line.sku, quantity: line.quantity, unit_price: line.unit_price }).collect()
}

/// For each SKU, the last invoice in its queue.
#[derive(Default)]
struct Queues {
    last: HashMap<String, watch::Receiver<()>>,
}

/// An invoice's place in the queues of all its SKUs. Dropping the place lets the next invoices proceed.
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
            // `changed` fails once the earlier invoice drops its sender, and this is the signal to proceed.
            while earlier.clone().changed().await.is_ok() {}
        }
    }
}
