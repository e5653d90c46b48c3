//! The books of the payment service.

use annals::{Recorded, event::DecodeError};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use super::aggregate::PaymentEvent;
use crate::books::Books;

/// The money that was moved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoneyBooks {
    pub charged: Decimal,
    pub refunded: Decimal,
}

impl Books for MoneyBooks {
    fn book(&mut self, event: &Recorded) -> Result<(), DecodeError> {
        if event.stream.category() != "payment" {
            return Ok(());
        }
        match event.decode()? {
            Some(PaymentEvent::Charged { amount, .. }) => self.charged += amount,
            Some(PaymentEvent::Refunded { amount, .. }) => self.refunded += amount,
            Some(PaymentEvent::Declined { .. }) | None => {}
        }
        Ok(())
    }
}
