//! The saga `checkout`.

use annals::{
    HandlerError, LogQuery, Message, Saga, SagaState,
    saga::{Outcome, StepRequest},
};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::{
    card::Card,
    inventory::{InventoryStep, Units},
    notification::NotificationStep,
    order::{BY_CUSTOMER, OrderEvent, OrderStep, units},
    payment::PaymentStep,
};

const RESERVE: &str = "reserve stock";
const CHARGE: &str = "charge card";
const CONFIRM: &str = "confirm order";

/// The state of a checkout saga.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkout {
    pub order_id: String,
    pub customer: Option<String>,
    pub units: Vec<Units>,
    pub total: Decimal,
    pub currency: String,
    #[serde(default, skip_serializing_if = "Card::is_good")]
    pub card: Card,
    /// The reason for the cancellation, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancelled: Option<String>,
}

impl SagaState for Checkout {
    fn learn(&mut self, step: &str, outcome: &Outcome) {
        let reason = match (step, outcome) {
            (_, Outcome::Done(_)) => return,
            (RESERVE, Outcome::Refused(_)) => "out_of_stock",
            (CHARGE, Outcome::Refused(_)) => "declined",
            (CONFIRM, Outcome::Refused(_)) => BY_CUSTOMER,
            (_, Outcome::Refused(_) | Outcome::Failed(_) | Outcome::Unknown(_)) => "unavailable",
        };
        self.cancelled = Some(reason.to_owned());
    }
}

/// Reserves the goods, charges the card and confirms the order; then ships the goods and notifies the customer. If a
/// step is refused before the confirmation, the saga compensates the completed steps.
///
/// ```
/// println!("{}", sample_shop::checkout::checkout().mermaid());
/// ```
// README: from here
pub fn checkout() -> Saga<Checkout> {
    Saga::<Checkout>::named("checkout")
        .compensatable(RESERVE, |c| inventory(InventoryStep::Reserve { order_id: c.id(), units: c.units.clone() }))
        .undo(|c| inventory(InventoryStep::Release { order_id: c.id(), units: c.units.clone() }))
        .compensatable(CHARGE, |c| {
            let currency = c.currency.clone();
            payment(PaymentStep::Charge { order_id: c.id(), amount: c.total, currency, card: c.card })
        })
        .undo(|c| payment(PaymentStep::Refund { order_id: c.id(), amount: c.total, currency: c.currency.clone() }))
        .pivot(CONFIRM, |c| {
            order(match c.card {
                Card::Withdrawn => OrderStep::Withdraw { order_id: c.id() },
                Card::Good | Card::Declined => OrderStep::Confirm { order_id: c.id() },
            })
        })
        .retriable("ship", |c| inventory(InventoryStep::Ship { order_id: c.id(), units: c.units.clone() }))
        .retriable("notify customer", |c| c.notify("order confirmed"))
        .when_compensated("cancel order", |c| {
            order(OrderStep::Cancel { order_id: c.id(), reason: c.cancelled.clone().unwrap_or_default() })
        })
        .when_compensated("notify of cancellation", |c| c.notify("order cancelled"))
        .build()
}
// README: up to here

fn inventory(step: InventoryStep) -> StepRequest {
    StepRequest::to("inventory", &step)
}
fn payment(step: PaymentStep) -> StepRequest {
    StepRequest::to("payment", &step)
}
fn order(step: OrderStep) -> StepRequest {
    StepRequest::to("order", &step)
}

impl Checkout {
    fn id(&self) -> String {
        self.order_id.clone()
    }

    fn notify(&self, subject: &str) -> StepRequest {
        let customer = self.customer.clone();
        let subject = subject.to_owned();
        StepRequest::to("notification", &NotificationStep::OrderEnded { order_id: self.id(), customer, subject })
    }

    /// Starts a checkout for each order that is placed.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let Some(OrderEvent::Placed { order_id, customer, lines, total, currency, card }) = message.decode()? else {
            return Ok(None);
        };
        let units = units(&lines);
        Ok(Some((order_id.clone(), Self { order_id, customer, units, total, currency, card, cancelled: None })))
    }

    /// The events that may start a checkout.
    pub fn query() -> LogQuery {
        LogQuery::types(["order.placed"])
    }
}
