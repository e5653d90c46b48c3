//! Follows the log and keeps the books: what was ordered, sold and paid, and which sagas have ended.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use annals::{
    EventStore, LogQuery, Position, Recorded, StoreError,
    saga::{Progress, Status},
};
use rust_decimal::Decimal;
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    inventory::StockEvent,
    notification::NotificationEvent,
    order::{OrderEvent, ReturnEvent},
    payment::PaymentEvent,
    report::Units,
};

/// The books of the whole shop, as of one position in the log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Books {
    pub orders: u64,
    pub confirmed: u64,
    /// By reason.
    pub cancelled: BTreeMap<String, u64>,
    pub returns: u64,
    pub adjustments: HashSet<String>,
    pub charged: Decimal,
    pub refunded: Decimal,
    pub units: Units,
}

impl Books {
    /// Books one event; those of other kinds leave them as they are.
    pub fn book(&mut self, event: &Recorded) -> Result<(), annals::event::DecodeError> {
        match event.stream.category() {
            "order" => match event.decode()? {
                Some(OrderEvent::Placed { .. }) => self.orders += 1,
                Some(OrderEvent::Confirmed { .. }) => self.confirmed += 1,
                Some(OrderEvent::Cancelled { reason, .. }) => *self.cancelled.entry(reason).or_default() += 1,
                None => {}
            },
            "return" => self.returns += u64::from(matches!(event.decode()?, Some(ReturnEvent::Completed { .. }))),
            "payment" => match event.decode()? {
                Some(PaymentEvent::Charged { amount, .. }) => self.charged += amount,
                Some(PaymentEvent::Refunded { amount, .. }) => self.refunded += amount,
                Some(PaymentEvent::Declined { .. }) | None => {}
            },
            "stock" => {
                if let Some(event) = event.decode()? {
                    self.book_stock(event);
                }
            }
            // Nothing to book, but what cannot be read must not go unnoticed in this category either.
            "notification" => _ = event.decode::<NotificationEvent>()?,
            _ => {}
        }
        Ok(())
    }

    fn book_stock(&mut self, event: StockEvent) {
        let units = &mut self.units;
        match event {
            StockEvent::Received { quantity, .. } => {
                units.initial += quantity as i64;
                units.remaining += quantity as i64;
            }
            StockEvent::Reserved { quantity, .. } => units.reserved += i64::from(quantity),
            StockEvent::Released { quantity, .. } => units.reserved -= i64::from(quantity),
            StockEvent::Shipped { quantity, .. } => {
                units.reserved -= i64::from(quantity);
                units.remaining -= i64::from(quantity);
                units.sold += i64::from(quantity);
            }
            StockEvent::Returned { quantity, .. } => {
                units.remaining += i64::from(quantity);
                units.returned += i64::from(quantity);
            }
            StockEvent::Adjusted { quantity, adjustment_id, .. } => {
                units.remaining += quantity;
                units.adjusted += quantity;
                self.adjustments.insert(adjustment_id);
            }
        }
    }
}

/// The books, and who waits for which saga. Clones share them.
#[derive(Clone, Default)]
pub struct Ledger {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    books: Books,
    /// Sagas that are under way, or about to start.
    open: HashMap<Arc<str>, Status>,
    ended: HashSet<Arc<str>>,
    waiting: HashMap<Arc<str>, Vec<oneshot::Sender<()>>>,
    failed: Option<String>,
    /// Everything up to here is booked.
    position: Position,
}

/// The part of a saga's event that tells whether it has ended.
#[derive(Deserialize)]
struct Glimpse {
    progress: Progress,
}

impl Ledger {
    /// Follows the log from its beginning until `shutdown`.
    pub async fn follow(self, store: Arc<dyn EventStore>, shutdown: CancellationToken) -> Result<(), String> {
        let followed = self.read_on(&*store, shutdown).await.map_err(|error| error.to_string());
        if let Err(reason) = &followed {
            // Nobody may wait for an end that cannot be read any more.
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.failed = Some(reason.clone());
            state.waiting.clear();
        }
        followed
    }

    async fn read_on(&self, store: &dyn EventStore, shutdown: CancellationToken) -> Result<(), StoreError> {
        let mut position = Position::START;
        while !shutdown.is_cancelled() {
            let next = self.read(store, position).await?;
            if next == position {
                tokio::select! {
                    woken = store.wait(position) => woken?,
                    () = shutdown.cancelled() => {}
                }
            }
            position = next;
        }
        Ok(())
    }

    /// Books what came after the follower was told to stop.
    pub async fn read_up(&self, store: &dyn EventStore) -> Result<(), StoreError> {
        loop {
            let position = self.position();
            if self.read(store, position).await? == position {
                return Ok(());
            }
        }
    }

    /// Why the books cannot be kept any more.
    pub fn failed(&self) -> Option<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failed.clone()
    }

    async fn read(&self, store: &dyn EventStore, after: Position) -> Result<Position, StoreError> {
        let page = store.read_log(&LogQuery::all(), after, 2_000).await?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &page.events {
            if event.stream.category().starts_with("saga.") {
                state.note(event)?;
                continue;
            }
            state.books.book(event).map_err(|error| StoreError::Corrupt(error.to_string()))?;
            match &*event.type_name {
                "order.placed" => state.expect_saga("checkout", event.stream.id()),
                "return.opened" => state.expect_saga("return", event.stream.id()),
                _ => {}
            }
        }
        state.position = page.next;
        Ok(page.next)
    }

    /// How far the books are.
    pub fn position(&self) -> Position {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).position
    }

    /// Resolves once the saga with this stream id has ended.
    pub async fn ended(&self, saga: &str) {
        let (ended, waiting) = oneshot::channel();
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.ended.contains(saga) || state.failed.is_some() {
                return;
            }
            state.waiting.entry(saga.into()).or_default().push(ended);
        }
        _ = waiting.await;
    }

    /// The books as they stand.
    pub fn books(&self) -> Books {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).books.clone()
    }

    /// How many sagas are under way or about to start, and how many of them are stuck.
    pub fn open(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.open.len(), state.open.values().filter(|status| **status == Status::Stuck).count())
    }
}

impl State {
    fn expect_saga(&mut self, saga: &str, id: &str) {
        let saga: Arc<str> = saga_stream(saga, id).into();
        if !self.ended.contains(&saga) {
            self.open.entry(saga).or_insert(Status::Running);
        }
    }

    fn note(&mut self, event: &Recorded) -> Result<(), StoreError> {
        let Glimpse { progress } = serde_json::from_str(&event.data).map_err(|error| {
            let Recorded { version, stream, position, type_name, .. } = event;
            StoreError::Corrupt(format!(
                "event {version} of stream {stream} (position {position}): {type_name} cannot be read: {error}"
            ))
        })?;
        let saga = event.stream.shared();
        if progress.ended.is_none() {
            self.open.insert(saga, progress.status);
            return Ok(());
        }
        match progress.status {
            // Abandoned: it stays among those an operator has to know of.
            Status::Stuck => _ = self.open.insert(saga.clone(), Status::Stuck),
            _ => _ = self.open.remove(&saga),
        }
        for waiting in self.waiting.remove(&saga).into_iter().flatten() {
            _ = waiting.send(());
        }
        self.ended.insert(saga);
        Ok(())
    }
}

/// The name under which a saga's end is waited for.
pub fn saga_stream(saga: &str, id: &str) -> String {
    format!("saga.{saga}-{id}")
}
