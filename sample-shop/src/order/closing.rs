//! Closes the books: each service computes the totals of its own log, and the order service adds them up.

use annals::{
    Aggregate, Event, HandlerError, LogQuery, Message, Saga, SagaState,
    saga::{Outcome, Request},
};
use serde::{Deserialize, Serialize};

use crate::{books::Books, inventory::InventoryStep, order::OrderStep, payment::PaymentStep};

/// What happens to a closing: one request for the books of the whole shop.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "closing")]
pub enum ClosingEvent {
    /// A client has asked for the books.
    Opened { closing_id: String },
    /// The books are complete. They include all sagas that had ended when the closing was opened, and part of the work
    /// then in progress.
    Closed { closing_id: String, books: Books },
}

/// The commands to a closing.
#[derive(Clone, Debug)]
pub enum ClosingCommand {
    Open { closing_id: String },
    Close(Books),
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

/// The state of the saga of a closing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counting {
    pub closing_id: String,
    /// The books counted so far.
    #[serde(default)]
    pub books: Books,
}

impl SagaState for Counting {
    fn learn(&mut self, _step: &str, outcome: &Outcome) {
        // The last step reports no books.
        if let Outcome::Done(counted @ serde_json::Value::Object(_)) = outcome
            && let Ok(books) = serde_json::from_value(counted.clone())
        {
            self.books.add(&books);
        }
    }
}

/// Collects the books of the inventory and payment services; then the order service adds its own and closes.
pub fn counting() -> Saga<Counting> {
    Saga::<Counting>::named("closing")
        .retriable("count stock", |_| Request::to("inventory", &InventoryStep::Count))
        .retriable("count money", |_| Request::to("payment", &PaymentStep::Count))
        .retriable("close", |c| {
            let (closing_id, books) = (c.closing_id.clone(), c.books.clone());
            Request::to("order", &OrderStep::Close { closing_id, books })
        })
        .build()
}

impl Counting {
    /// Starts a saga for each closing that is opened.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let Some(ClosingEvent::Opened { closing_id }) = message.decode()? else { return Ok(None) };
        Ok(Some((closing_id.clone(), Self { closing_id, books: Books::default() })))
    }

    /// The events that may start the saga of a closing.
    pub fn query() -> LogQuery {
        LogQuery::types(["closing.opened"])
    }
}
