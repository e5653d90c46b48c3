//! Follows the log and keeps the books: the totals of orders, sales and payments, and the sagas that have ended.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use annals::{
    Aggregate, EventStore, LogPage, LogQuery, Position, Recorded, StoreError,
    event::DecodeError,
    saga::{Glimpse, Progress, Status},
};
use shop_driver::totals::{Totals, Units};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::{
    books::Books,
    inventory::StockBooks,
    notification::{NotificationEvent, Notifications},
    order::OrderBooks,
    payment::MoneyBooks,
};

/// The number of events per read.
const PAGE: usize = 2_000;

/// The books, and the tasks that are waiting for the end of a saga. Clones share both.
#[derive(Clone, Default)]
pub struct Ledger {
    state: Arc<Mutex<LedgerState>>,
}

/// The number of sagas that have not ended.
pub struct OpenSagas {
    /// The number of sagas that are running, about to start, or stuck.
    pub sagas: u64,
    /// The number of these sagas that are waiting for an operator.
    pub stuck: u64,
}

#[derive(Default)]
struct LedgerState {
    orders: OrderBooks,
    stock: StockBooks,
    money: MoneyBooks,
    /// The sagas that are running, about to start, or stuck.
    open: HashMap<Arc<str>, Status>,
    ended: HashSet<Arc<str>>,
    waiting: HashMap<Arc<str>, Vec<oneshot::Sender<()>>>,
    failed: Option<String>,
    /// The position up to which every event is in the books.
    position: Position,
}

impl Ledger {
    /// Follows the log from its beginning until `shutdown` is cancelled.
    pub async fn follow(self, store: Arc<dyn EventStore>, shutdown: CancellationToken) -> Result<(), String> {
        let followed = self.read_on(&*store, shutdown).await.map_err(|error| error.to_string());
        if let Err(reason) = &followed {
            // Wakes all waiting tasks, because the ends of their sagas can no longer be read.
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.failed = Some(reason.clone());
            state.waiting.clear();
        }
        followed
    }

    async fn read_on(&self, store: &dyn EventStore, shutdown: CancellationToken) -> Result<(), StoreError> {
        while !shutdown.is_cancelled() {
            // If the log has grown since this read, the next wait returns at once.
            if !self.read(store).await?.more {
                tokio::select! {
                    woken = store.wait(self.position()) => woken?,
                    () = shutdown.cancelled() => {}
                }
            }
        }
        Ok(())
    }

    /// Adds the events that were committed after the follower had stopped.
    pub async fn read_up(&self, store: &dyn EventStore) -> Result<(), StoreError> {
        while !self.read(store).await?.events.is_empty() {}
        Ok(())
    }

    /// Returns the error that stopped the follower, if there is one. The books are not updated after such an error.
    pub fn failed(&self) -> Option<String> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failed.clone()
    }

    /// Reads the next page and adds its events to the books.
    async fn read(&self, store: &dyn EventStore) -> Result<LogPage, StoreError> {
        let page = store.read_log(&LogQuery::all(), self.position(), PAGE).await?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for event in &page.events {
            if event.stream.category().starts_with("saga.") {
                state.note(event)?;
                continue;
            }
            state.book(event).map_err(|error| StoreError::Corrupt(error.to_string()))?;
            match &*event.type_name {
                "order.placed" => state.expect_saga("checkout", event.stream.id()),
                "return.opened" => state.expect_saga("return", event.stream.id()),
                _ => {}
            }
        }
        state.position = page.next;
        Ok(page)
    }

    /// The position up to which events are in the books.
    pub fn position(&self) -> Position {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).position
    }

    /// Resolves once the saga whose stream has this name has ended.
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

    /// Returns the current totals.
    pub fn totals(&self) -> Totals {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let OrderBooks { orders, confirmed, cancelled, returns, adjustments } = state.orders.clone();
        let MoneyBooks { charged, refunded } = state.money;
        let units = state.stock.units;
        let units = Units {
            initial: units.initial,
            sold: units.sold,
            returned: units.returned,
            adjusted: units.adjusted,
            remaining: units.remaining,
            reserved: units.reserved,
        };
        Totals { orders, confirmed, cancelled, returns, adjustments, charged, refunded, units }
    }

    /// Returns the number of sagas that have not ended, and how many of them are stuck.
    pub fn open(&self) -> OpenSagas {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck = state.open.values().filter(|status| **status == Status::Stuck).count();
        OpenSagas { sagas: state.open.len() as u64, stuck: stuck as u64 }
    }
}

impl LedgerState {
    fn book(&mut self, event: &Recorded) -> Result<(), DecodeError> {
        self.orders.book(event)?;
        self.stock.book(event)?;
        self.money.book(event)?;
        // Notifications do not count in the books, but they are still decoded, so that an unreadable event is reported.
        if event.stream.category() == Notifications::CATEGORY {
            event.decode::<NotificationEvent>()?;
        }
        Ok(())
    }

    fn expect_saga(&mut self, saga: &str, id: &str) {
        let saga: Arc<str> = saga_stream(saga, id).into();
        if !self.ended.contains(&saga) {
            self.open.entry(saga).or_insert(Status::Running);
        }
    }

    fn note(&mut self, event: &Recorded) -> Result<(), StoreError> {
        let Glimpse { progress, .. } = Glimpse::<Progress>::of(&event.data).map_err(|error| {
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
            // An abandoned saga stays in the list, so that the report mentions it to an operator.
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

/// Returns the name of a saga's stream.
pub fn saga_stream(saga: &str, id: &str) -> String {
    format!("saga.{saga}-{id}")
}
