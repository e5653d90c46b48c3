//! The payments of orders and returns.

use annals::{Aggregate, Event};
use rust_decimal::Decimal;

/// What happens to a payment.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "payment")]
pub enum PaymentEvent {
    /// The card was charged.
    Charged { order_id: String, amount: Decimal, currency: String },
    /// The provider declined the charge.
    Declined { order_id: String, amount: Decimal, currency: String, reason: String },
    /// Money was refunded for an order or a return.
    Refunded {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        order_id: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        return_id: Option<String>,
        amount: Decimal,
        currency: String,
    },
}

/// The payment of an order or a return.
#[derive(Clone, Debug, Default)]
pub struct Payment {
    charged: bool,
    refunded: bool,
}

/// A payment accepts every command, because the saga and the provider decide what may happen.
impl Aggregate for Payment {
    const CATEGORY: &'static str = "payment";
    type Command = PaymentEvent;
    type Event = PaymentEvent;
    type Refusal = std::convert::Infallible;

    fn decide(&self, fact: &PaymentEvent) -> Result<Vec<PaymentEvent>, Self::Refusal> {
        let known = match fact {
            PaymentEvent::Charged { .. } => self.charged,
            // A charge with an unknown outcome was never in the books, so its refund is not booked either.
            PaymentEvent::Refunded { order_id: Some(_), .. } if !self.charged => true,
            PaymentEvent::Refunded { .. } => self.refunded,
            PaymentEvent::Declined { .. } => false,
        };
        Ok(if known { vec![] } else { vec![fact.clone()] })
    }

    fn evolve(&mut self, event: &PaymentEvent) {
        match event {
            PaymentEvent::Charged { .. } => self.charged = true,
            PaymentEvent::Refunded { .. } => self.refunded = true,
            PaymentEvent::Declined { .. } => {}
        }
    }
}
