//! The books: what was ordered, sold and paid, folded from the log.

use std::{collections::BTreeMap, sync::Arc};

use annals::{Answer, DocumentKey, EventStore, LogQuery, Position, Recorded, StepError, Work};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::{
    inventory::StockEvent,
    notification::NotificationEvent,
    order::{OrderEvent, ReturnEvent},
    payment::PaymentEvent,
    report::Units,
    supply::SupplyEvent,
};

/// Events that are booked per read.
const PAGE: usize = 2_000;

/// The books of the shop, or one service's part of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Books {
    pub orders: u64,
    pub confirmed: u64,
    /// By reason of the cancellation.
    pub cancelled: BTreeMap<String, u64>,
    pub returns: u64,
    pub adjustments: u64,
    pub charged: Decimal,
    pub refunded: Decimal,
    pub units: Units,
}

impl Books {
    /// Books one event. Events of other kinds change nothing.
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
            "supply" => self.adjustments += u64::from(matches!(event.decode()?, Some(SupplyEvent::Adjusted { .. }))),
            // There is nothing to book, but an unreadable event must not go unnoticed in this category either.
            "notification" => _ = event.decode::<NotificationEvent>()?,
            _ => {}
        }
        Ok(())
    }

    /// Adds the books of another service.
    pub fn add(&mut self, other: &Self) {
        self.orders += other.orders;
        self.confirmed += other.confirmed;
        for (reason, count) in &other.cancelled {
            *self.cancelled.entry(reason.clone()).or_default() += count;
        }
        self.returns += other.returns;
        self.adjustments += other.adjustments;
        self.charged += other.charged;
        self.refunded += other.refunded;
        self.units.add(&other.units);
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
            StockEvent::Adjusted { quantity, .. } => {
                units.remaining += quantity;
                units.adjusted += quantity;
            }
        }
    }
}

/// Keeps the books of one service, from its own log. They are brought up to date on request only.
pub struct Bookkeeper {
    store: Arc<dyn EventStore>,
    key: DocumentKey,
    query: LogQuery,
}

/// The books as of a position, as stored.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    position: i64,
    books: Books,
}

impl Bookkeeper {
    /// Returns the bookkeeper of the service of this name, whose events are in these categories.
    pub fn new(service: &str, categories: &[&str], store: Arc<dyn EventStore>) -> Self {
        let query = LogQuery::categories(categories.iter().copied());
        Self { store, key: DocumentKey::new("books", service), query }
    }

    /// Returns the books with every event that was committed before the call.
    pub async fn books(&self, work: &mut Work) -> Result<Books, StepError> {
        let mut kept: Kept = work.document(&self.key).await?.unwrap_or_default();
        loop {
            let page =
                self.store.read_log(&self.query, Position(kept.position), PAGE).await.map_err(StepError::Store)?;
            for event in &page.events {
                kept.books.book(event).map_err(|error| StepError::Failed(error.to_string()))?;
            }
            if page.next.0 > kept.position {
                kept.position = page.next.0;
                continue;
            }
            // Events committed behind a position that another writer still holds are not visible yet.
            let status = self.store.status().await.map_err(StepError::Store)?;
            if let Some(reason) = status.waits_for {
                return Err(StepError::Failed(format!("the log cannot be read to its end: {reason}")));
            }
            if status.head.0 <= kept.position {
                break;
            }
        }
        work.put(&self.key, &kept)?;
        Ok(kept.books)
    }

    /// Returns the same books as the answer to a saga.
    pub async fn count(&self, work: &mut Work) -> Result<Answer, StepError> {
        let books = self.books(work).await?;
        let counted = serde_json::to_value(books).map_err(|error| StepError::Failed(error.to_string()))?;
        Ok(Answer::Done(counted))
    }
}
