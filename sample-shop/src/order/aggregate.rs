//! Orders. A customer places an order, which is later confirmed or cancelled.

use annals::{Aggregate, Event};
use rust_decimal::Decimal;

use super::line::{CURRENCY, Line, OrderRefusal, total};
use crate::card::Card;

/// What happens to an order.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "order")]
pub enum OrderEvent {
    /// A customer ordered.
    Placed {
        order_id: String,
        customer: Option<String>,
        lines: Vec<Line>,
        total: Decimal,
        currency: String,
        #[serde(default, skip_serializing_if = "Card::is_good")]
        card: Card,
    },
    /// The order will be delivered.
    Confirmed { order_id: String },
    /// The order will not be delivered.
    Cancelled { order_id: String, reason: String },
}

/// The commands for an order.
#[derive(Clone, Debug)]
pub enum OrderCommand {
    Place { order_id: String, customer: Option<String>, lines: Vec<Line>, card: Card },
    Confirm,
    Cancel { reason: String },
}

/// An order.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Order {
    #[default]
    Unknown,
    Placed {
        order_id: String,
    },
    Confirmed,
    Cancelled(String),
}

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = OrderCommand;
    type Event = OrderEvent;
    type Refusal = OrderRefusal;

    fn decide(&self, command: &OrderCommand) -> Result<Vec<OrderEvent>, OrderRefusal> {
        use {Order as Is, OrderCommand as Do};
        match (self, command) {
            (Is::Unknown, Do::Place { order_id, customer, lines, card }) => {
                let total = total(lines)?;
                Ok(vec![OrderEvent::Placed {
                    order_id: order_id.clone(),
                    customer: customer.clone(),
                    lines: lines.clone(),
                    total,
                    currency: CURRENCY.into(),
                    card: *card,
                }])
            }
            (Is::Unknown, _) => Err(OrderRefusal::NotPlaced),
            (_, Do::Place { .. }) | (Is::Confirmed, Do::Confirm) | (Is::Cancelled(_), Do::Cancel { .. }) => Ok(vec![]),
            (Is::Placed { order_id }, Do::Confirm) => Ok(vec![OrderEvent::Confirmed { order_id: order_id.clone() }]),
            (Is::Placed { order_id }, Do::Cancel { reason }) => {
                Ok(vec![OrderEvent::Cancelled { order_id: order_id.clone(), reason: reason.clone() }])
            }
            (Is::Cancelled(reason), Do::Confirm) => Err(OrderRefusal::Cancelled(reason.clone())),
            (Is::Confirmed, Do::Cancel { .. }) => Err(OrderRefusal::Confirmed),
        }
    }

    fn evolve(&mut self, event: &OrderEvent) {
        *self = match event {
            OrderEvent::Placed { order_id, .. } => Self::Placed { order_id: order_id.clone() },
            OrderEvent::Confirmed { .. } => Self::Confirmed,
            OrderEvent::Cancelled { reason, .. } => Self::Cancelled(reason.clone()),
        };
    }
}
