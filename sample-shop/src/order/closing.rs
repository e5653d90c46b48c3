//! Closings: a closing asks every service for its books (its totals), and adds up these books.

use std::collections::BTreeMap;

use annals::{Aggregate, Event};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use super::books::OrderBooks;
use crate::inventory::UnitTotals;

/// What happens to a closing: one request for the books of the whole shop.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "closing")]
pub enum ClosingEvent {
    /// A client has asked for the books.
    Opened { closing_id: String },
    /// The books are complete. The books include all sagas that had ended when the closing was opened, and part of the
    /// work then in progress.
    Closed { closing_id: String, books: ShopBooks },
}

/// The commands for a closing.
#[derive(Clone, Debug)]
pub enum ClosingCommand {
    Open { closing_id: String },
    Close(ShopBooks),
}

/// Why a closing refuses a command.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("there is no such closing")]
pub struct NotOpened;

/// A closing of the books.
#[derive(Clone, Debug, Default)]
pub struct Closing {
    opened: Option<String>,
    closed: bool,
}

impl Aggregate for Closing {
    const CATEGORY: &'static str = "closing";
    type Command = ClosingCommand;
    type Event = ClosingEvent;
    type Refusal = NotOpened;

    fn decide(&self, command: &ClosingCommand) -> Result<Vec<ClosingEvent>, NotOpened> {
        match (command, &self.opened) {
            (ClosingCommand::Open { closing_id }, None) => {
                Ok(vec![ClosingEvent::Opened { closing_id: closing_id.clone() }])
            }
            (ClosingCommand::Close(books), Some(id)) if !self.closed => {
                Ok(vec![ClosingEvent::Closed { closing_id: id.clone(), books: books.clone() }])
            }
            (_, Some(_)) => Ok(vec![]),
            (ClosingCommand::Close(_), None) => Err(NotOpened),
        }
    }

    fn evolve(&mut self, event: &ClosingEvent) {
        match event {
            ClosingEvent::Opened { closing_id } => self.opened = Some(closing_id.clone()),
            ClosingEvent::Closed { .. } => self.closed = true,
        }
    }
}

/// The books of the whole shop.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShopBooks {
    pub orders: u64,
    pub confirmed: u64,
    /// The number of cancelled orders by reason.
    pub cancelled: BTreeMap<String, u64>,
    pub returns: u64,
    pub adjustments: u64,
    pub charged: Decimal,
    pub refunded: Decimal,
    pub units: UnitTotals,
}

impl ShopBooks {
    /// Adds the books that another service reported. Those books have the same fields, except the fields that the other
    /// service does not count.
    pub fn add(&mut self, other: Self) {
        let Self { orders, confirmed, cancelled, returns, adjustments, charged, refunded, units } = other;
        self.add_orders(&OrderBooks { orders, confirmed, cancelled, returns, adjustments });
        self.charged += charged;
        self.refunded += refunded;
        self.units.add(&units);
    }

    /// Adds the books of the order service.
    pub fn add_orders(&mut self, books: &OrderBooks) {
        self.orders += books.orders;
        self.confirmed += books.confirmed;
        for (reason, count) in &books.cancelled {
            *self.cancelled.entry(reason.clone()).or_default() += count;
        }
        self.returns += books.returns;
        self.adjustments += books.adjustments;
    }
}
