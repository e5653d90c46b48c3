//! The saga of a closing: each service counts its own books, and the order service adds them up.

use annals::{
    HandlerError, LogQuery, Message, Saga, SagaState,
    saga::{Outcome, StepRequest},
};
use serde::{Deserialize, Serialize};

use crate::{
    inventory::InventoryStep,
    order::{ClosingEvent, OrderStep, ShopBooks},
    payment::PaymentStep,
};

/// The state of the saga of a closing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counting {
    pub closing_id: String,
    /// The books counted so far.
    #[serde(default)]
    pub books: ShopBooks,
}

impl SagaState for Counting {
    fn learn(&mut self, _step: &str, outcome: &Outcome) {
        // The last step reports no books.
        if let Outcome::Done(counted @ serde_json::Value::Object(_)) = outcome
            && let Ok(books) = serde_json::from_value::<ShopBooks>(counted.clone())
        {
            self.books.add(books);
        }
    }
}

/// Collects the books of the inventory and payment services; then the order service adds its own books and completes
/// the closing.
pub fn counting() -> Saga<Counting> {
    Saga::<Counting>::named("closing")
        .retriable("count stock", |_| StepRequest::to("inventory", &InventoryStep::Count))
        .retriable("count money", |_| StepRequest::to("payment", &PaymentStep::Count))
        .retriable("close", |c| {
            StepRequest::to("order", &OrderStep::Close { closing_id: c.closing_id.clone(), books: c.books.clone() })
        })
        .build()
}

impl Counting {
    /// Starts a saga for each closing that is opened.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let Some(ClosingEvent::Opened { closing_id }) = message.decode()? else { return Ok(None) };
        Ok(Some((closing_id.clone(), Self { closing_id, books: ShopBooks::default() })))
    }

    /// The events that may start the saga of a closing.
    pub fn query() -> LogQuery {
        LogQuery::types(["closing.opened"])
    }
}
