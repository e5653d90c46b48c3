//! The books of the order service.

use std::collections::BTreeMap;

use annals::{Recorded, event::DecodeError};
use serde::{Deserialize, Serialize};

use super::{aggregate::OrderEvent, returns::ReturnEvent, supply::SupplyEvent};
use crate::books::Books;

/// The number of orders, returns and stock counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OrderBooks {
    pub orders: u64,
    pub confirmed: u64,
    /// The number of cancelled orders by reason.
    pub cancelled: BTreeMap<String, u64>,
    pub returns: u64,
    pub adjustments: u64,
}

impl Books for OrderBooks {
    fn book(&mut self, event: &Recorded) -> Result<(), DecodeError> {
        match event.stream.category() {
            "order" => match event.decode()? {
                Some(OrderEvent::Placed { .. }) => self.orders += 1,
                Some(OrderEvent::Confirmed { .. }) => self.confirmed += 1,
                Some(OrderEvent::Cancelled { reason, .. }) => *self.cancelled.entry(reason).or_default() += 1,
                None => {}
            },
            "return" => self.returns += u64::from(matches!(event.decode()?, Some(ReturnEvent::Completed { .. }))),
            "supply" => self.adjustments += u64::from(matches!(event.decode()?, Some(SupplyEvent::Adjusted { .. }))),
            _ => {}
        }
        Ok(())
    }
}
