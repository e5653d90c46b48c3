//! The books of the inventory service.

use annals::{Recorded, event::DecodeError};
use serde::{Deserialize, Serialize};

use super::stock::StockEvent;
use crate::books::Books;

/// What happened to the stock of all SKUs together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StockBooks {
    pub units: UnitTotals,
}

/// The number of units of all SKUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnitTotals {
    /// The units delivered.
    pub initial: i64,
    /// The units shipped.
    pub sold: i64,
    /// The units that customers sent back.
    pub returned: i64,
    /// The units found minus the units written off.
    pub adjusted: i64,
    /// The units in stock, reserved or not.
    pub remaining: i64,
    /// The units reserved for checkouts that have not ended.
    pub reserved: i64,
}

impl UnitTotals {
    /// Adds other totals.
    pub fn add(&mut self, other: &Self) {
        self.initial += other.initial;
        self.sold += other.sold;
        self.returned += other.returned;
        self.adjusted += other.adjusted;
        self.remaining += other.remaining;
        self.reserved += other.reserved;
    }
}

impl Books for StockBooks {
    fn book(&mut self, event: &Recorded) -> Result<(), DecodeError> {
        if event.stream.category() != "stock" {
            return Ok(());
        }
        let Some(event) = event.decode()? else { return Ok(()) };
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
        Ok(())
    }
}
