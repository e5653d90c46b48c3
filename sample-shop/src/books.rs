//! The totals of orders, sales and payments, computed by folding the log. The shop calls them its books.

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

/// The number of events per read.
const PAGE: usize = 2_000;

/// The books of the whole shop, or of one service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Books {
    pub orders: u64,
    pub confirmed: u64,
    /// The number of cancelled orders by reason.
    pub cancelled: BTreeMap<String, u64>,
    pub returns: u64,
    pub adjustments: u64,
    pub charged: Decimal,
    pub refunded: Decimal,
    pub units: Units,
}

impl Books {
    /// Adds one event to the books. Events of other kinds change nothing.
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
            // Notifications do not count in the books, but they are still decoded, so that an unreadable event is
            // reported.
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

/// Keeps the books of one service, from that service's own log. The books are updated only on request.
pub struct Bookkeeper {
    store: Arc<dyn EventStore>,
    key: DocumentKey,
    query: LogQuery,
}

/// The books up to a position, as they are stored.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    position: i64,
    books: Books,
}

impl Bookkeeper {
    /// Returns the bookkeeper of the service with this name, whose events belong to these categories.
    pub fn new(service: &str, categories: &[&str], store: Arc<dyn EventStore>) -> Self {
        let query = LogQuery::categories(categories.iter().copied());
        Self { store, key: DocumentKey::new("books", service), query }
    }

    /// Returns the books, including every event that was committed before the call.
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
            // A committed event stays invisible while another writer still holds an earlier position.
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

    /// Returns the same books as a saga's answer.
    pub async fn count(&self, work: &mut Work) -> Result<Answer, StepError> {
        let books = self.books(work).await?;
        let counted = serde_json::to_value(books).map_err(|error| StepError::Failed(error.to_string()))?;
        Ok(Answer::Done(counted))
    }
}
