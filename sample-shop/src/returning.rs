//! The saga `return`.

use annals::{HandlerError, LogQuery, Message, Saga, SagaState, saga::StepRequest};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::{
    inventory::{InventoryStep, Units},
    notification::NotificationStep,
    order::{OrderStep, ReturnEvent, units},
    payment::PaymentStep,
};

/// The state of the saga of a return.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Returning {
    pub return_id: String,
    pub customer: Option<String>,
    pub units: Vec<Units>,
    pub total: Decimal,
    pub currency: String,
}

impl SagaState for Returning {}

/// Puts the goods back into stock, refunds the money, and notifies the customer.
pub fn returning() -> Saga<Returning> {
    Saga::<Returning>::named("return")
        .retriable("restock", |r| {
            StepRequest::to(
                "inventory",
                &InventoryStep::Restock { return_id: r.return_id.clone(), units: r.units.clone() },
            )
        })
        .retriable("refund", |r| {
            let return_id = r.return_id.clone();
            let currency = r.currency.clone();
            StepRequest::to("payment", &PaymentStep::RefundReturn { return_id, amount: r.total, currency })
        })
        .retriable("notify customer", |r| {
            let return_id = r.return_id.clone();
            let customer = r.customer.clone();
            StepRequest::to("notification", &NotificationStep::ReturnEnded { return_id, customer })
        })
        .retriable("complete return", |r| {
            StepRequest::to("order", &OrderStep::CompleteReturn { return_id: r.return_id.clone() })
        })
        .build()
}

impl Returning {
    /// Starts a saga for each return that is opened.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let Some(ReturnEvent::Opened { return_id, customer, lines, total, currency }) = message.decode()? else {
            return Ok(None);
        };
        let units = units(&lines);
        Ok(Some((return_id.clone(), Self { return_id, customer, units, total, currency })))
    }

    /// The events that may start the saga of a return.
    pub fn query() -> LogQuery {
        LogQuery::types(["return.opened"])
    }
}
