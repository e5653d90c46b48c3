//! Submits the invoices of an input to a shop, and waits until the shop has handled each invoice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    card::Card,
    input::{Change, Invoice, Invoices, ReadError},
    queues::{QueuePlace, Queues},
    run::{RunError, Settings},
    shop::{Accepted, SagaEnd, Shop, Submission, SubmissionKind},
};

/// The largest latency that the histogram records: ten minutes, in microseconds.
const LATENCY_MAX_US: u64 = 600_000_000;
/// The maximum number of concurrent deliveries of the opening stock.
const DELIVERIES_MAX: usize = 8;
/// The number of SKUs per delivery of the opening stock.
const DELIVERY_SKUS: usize = 1_000;

/// The results of the submissions.
pub struct Results {
    /// The time from submitting an invoice to the end of its saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// The number of sagas of this run that ended.
    pub sagas: u64,
    /// The number of invoices that an earlier run had already submitted.
    pub repeated: u64,
    /// The number of orders and returns that are waiting for an operator.
    pub stuck: u64,
    /// The number of submitted orders and returns whose end this run did not see.
    pub unfinished: u64,
    /// Invoices that were rejected, each with its reason.
    pub rejected: Vec<String>,
}

/// Submits opening stocks and invoices.
#[derive(Clone)]
pub struct Customers<S> {
    shop: S,
    results: Arc<Mutex<Results>>,
}

impl<S: Shop> Customers<S> {
    /// Returns customers for this shop.
    pub fn new(shop: S) -> Result<Self, RunError> {
        let latency_us =
            Histogram::new_with_max(LATENCY_MAX_US, 3).map_err(|error| RunError::Shop(error.to_string()))?;
        let results = Results { latency_us, sagas: 0, repeated: 0, stuck: 0, unfinished: 0, rejected: Vec::new() };
        Ok(Self { shop, results: Arc::new(Mutex::new(results)) })
    }

    /// The results so far.
    pub fn results(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Submits the deliveries of the opening stock, and waits until all of them are booked. A delivery that an earlier
    /// run submitted is not booked again.
    pub async fn open_stock(&self, stock: BTreeMap<String, u64>, input: &str) -> Result<(), RunError> {
        let slots = Arc::new(Semaphore::new(DELIVERIES_MAX));
        let mut deliveries = JoinSet::new();
        for (id, units) in deliveries_of(input, stock) {
            let shop = self.shop.clone();
            let slots = slots.clone();
            let input = input.to_owned();
            deliveries.spawn(async move {
                let _slot = slots.acquire_owned().await;
                let delivery = Submission::Delivery { id: id.clone(), units: units.clone() };
                let accepted = shop.submit(delivery).await.map_err(|error| format!("{id}: {error}"))?;
                differs(&input, &accepted.units, &units)?;
                match end(&shop, SubmissionKind::Supply, &id, &accepted).await {
                    Ok(SagaEnd::Ended) => Ok(()),
                    Ok(SagaEnd::Stuck) => Err(format!("{id} could not be booked and waits for an operator")),
                    Err(error) => Err(format!("{id}: {error}")),
                }
            });
        }
        let ended: Vec<Result<(), String>> = deliveries.join_all().await;
        let refused = ended.into_iter().filter_map(Result::err);
        refused.min().map_or(Ok(()), |reason| Err(RunError::Stock(reason)))
    }

    /// Submits all invoices, and waits until their sagas end or the run is stopped. Returns the time at which the
    /// first invoice was submitted.
    pub async fn submit_all(
        &self,
        invoices: &mut Invoices,
        settings: &Settings,
        mut on_progress: impl FnMut(u64),
    ) -> Result<Instant, RunError> {
        let started = Instant::now();
        let stop = &settings.stop;
        let slots = Arc::new(Semaphore::new(settings.concurrency));
        let mut queues = Queues::default();
        let mut under_way = JoinSet::new();
        let mut submitted = 0;
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
            submitted += 1;
            on_progress(submitted);
            let place = if settings.scarce { queues.join(&invoice) } else { QueuePlace::default() };
            let customers = self.clone();
            let card = settings.chances.card(invoice.id());
            under_way.spawn(async move {
                place.is_first().await;
                customers.submit(invoice, card).await;
                drop((place, slot));
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

    /// Submits one invoice, and waits for the end of its saga.
    async fn submit(&self, invoice: Invoice, card: Card) {
        let started = Instant::now();
        let id = invoice.id().to_owned();
        let kind = match invoice {
            Invoice::Order { .. } => SubmissionKind::Order,
            Invoice::Return { .. } => SubmissionKind::Return,
            Invoice::Adjustment { .. } => SubmissionKind::Supply,
        };
        let rejected = |reason: String| self.results().rejected.push(format!("{} {id:.60}: {reason}", kind.name()));
        let of_orders = u64::from(kind != SubmissionKind::Supply);
        self.results().unfinished += of_orders;
        let accepted = match self.shop.submit(submission(invoice, card)).await {
            Ok(accepted) => accepted,
            Err(reason) => {
                self.results().unfinished -= of_orders;
                return rejected(reason);
            }
        };
        let end = match end(&self.shop, kind, &id, &accepted).await {
            Ok(end) => end,
            Err(reason) => return rejected(reason),
        };
        let mut results = self.results();
        if end == SagaEnd::Stuck {
            results.stuck += 1;
        }
        if kind == SubmissionKind::Supply {
            return;
        }
        results.unfinished -= of_orders;
        if accepted.repeated {
            results.repeated += 1;
        } else if end == SagaEnd::Ended {
            results.sagas += 1;
            results.latency_us.saturating_record(micros(started.elapsed()));
        }
    }
}

fn submission(invoice: Invoice, card: Card) -> Submission {
    match invoice {
        Invoice::Order { id, customer, lines } => Submission::Order { id, customer, lines, card },
        Invoice::Return { id, customer, lines } => Submission::Return { id, customer, lines },
        Invoice::Adjustment { id, lines } => Submission::Adjustment { id, units: summed(lines) },
    }
}

/// Sums the lines of the same SKU.
fn summed(lines: Vec<(String, i64)>) -> Vec<Change> {
    let mut of_sku: BTreeMap<String, i64> = BTreeMap::new();
    for (sku, quantity) in lines {
        *of_sku.entry(sku).or_default() += quantity;
    }
    of_sku.into_iter().map(|(sku, quantity)| Change { sku, quantity }).collect()
}

/// Returns the deliveries that open a stock, each with its name. The names contain the name of the input, so that the
/// stock is opened only once per input.
fn deliveries_of(input: &str, stock: BTreeMap<String, u64>) -> Vec<(String, Vec<Change>)> {
    let change = |(sku, quantity)| Change { sku, quantity: i64::try_from(quantity).unwrap_or(i64::MAX) };
    let units: Vec<Change> = stock.into_iter().filter(|(_, quantity)| *quantity > 0).map(change).collect();
    let parts = units.chunks(DELIVERY_SKUS);
    (1..).zip(parts).map(|(number, part)| (format!("opening of {input}, part {number}"), part.to_vec())).collect()
}

/// Returns how the saga of the submission ended. Waits for the end if the saga is still running.
async fn end<S: Shop>(shop: &S, kind: SubmissionKind, id: &str, accepted: &Accepted) -> Result<SagaEnd, String> {
    match accepted.end {
        Some(end) => Ok(end),
        None => shop.wait_for_end(kind, id).await,
    }
}

fn micros(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(LATENCY_MAX_US)
}

/// Returns an error that names a SKU if the stock that an earlier run opened differs from the stock of this run.
fn differs(input: &str, before: &[Change], now: &[Change]) -> Result<(), String> {
    let quantity =
        |units: &[Change], sku: &str| units.iter().find(|change| change.sku == sku).map_or(0, |change| change.quantity);
    let skus: BTreeSet<&str> = before.iter().chain(now).map(|change| change.sku.as_str()).collect();
    for sku in skus {
        let before = quantity(before, sku);
        let now = quantity(now, sku);
        if before != now {
            return Err(format!(
                "{input:?} was run on this store before, with {before} units of {sku} where there would be {now} now: run the \
                 same file with the same --stock-factor, or name another --store"
            ));
        }
    }
    Ok(())
}
