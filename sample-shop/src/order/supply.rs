//! Supplies: deliveries of goods, and stock counts that found more or fewer units. The order service accepts a supply,
//! and a saga asks the inventory service to book it.

use std::collections::HashSet;

use annals::{Aggregate, Event};

use crate::inventory::Change;

/// The maximum number of SKUs in one supply. All SKUs of a supply are booked in one commit.
pub const CHANGES_MAX: usize = 5_000;
/// The maximum number of units in one change. A stock cannot overflow with fewer than nine thousand such changes.
pub const UNITS_MAX: i64 = 1_000_000_000_000_000;

/// What happens to a supply. The same type serves as the command.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "supply")]
pub enum SupplyEvent {
    /// Goods were delivered.
    Delivered { supply_id: String, units: Vec<Change> },
    /// The stock was counted.
    Adjusted { supply_id: String, units: Vec<Change> },
}

impl SupplyEvent {
    /// Returns a delivery or an adjustment.
    pub fn new(supply_id: String, delivered: bool, units: Vec<Change>) -> Self {
        match delivered {
            true => Self::Delivered { supply_id, units },
            false => Self::Adjusted { supply_id, units },
        }
    }

    /// The id of the supply.
    pub fn id(&self) -> &str {
        let (Self::Delivered { supply_id, .. } | Self::Adjusted { supply_id, .. }) = self;
        supply_id
    }

    /// Returns whether the supply is a delivery; otherwise it is an adjustment.
    pub fn is_delivered(&self) -> bool {
        matches!(self, Self::Delivered { .. })
    }

    /// The changes of the supply.
    pub fn units(self) -> Vec<Change> {
        let (Self::Delivered { units, .. } | Self::Adjusted { units, .. }) = self;
        units
    }
}

/// Why a supply is rejected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SupplyRefusal {
    #[error("the supply has {0} SKUs; it must have from 1 to {CHANGES_MAX}")]
    Changes(usize),
    #[error("{sku} is listed twice")]
    Twice { sku: String },
    #[error("{sku}: {quantity} units; the quantity must be from {least} to {UNITS_MAX}")]
    Units { sku: String, quantity: i64, least: i64 },
}

/// A delivery or an adjustment.
#[derive(Clone, Debug, Default)]
pub struct Supply {
    known: bool,
}

impl Aggregate for Supply {
    const CATEGORY: &'static str = "supply";
    type Command = SupplyEvent;
    type Event = SupplyEvent;
    type Refusal = SupplyRefusal;

    fn decide(&self, fact: &SupplyEvent) -> Result<Vec<SupplyEvent>, SupplyRefusal> {
        if self.known {
            return Ok(vec![]);
        }
        let (SupplyEvent::Delivered { units, .. } | SupplyEvent::Adjusted { units, .. }) = fact;
        let least = if fact.is_delivered() { 1 } else { -UNITS_MAX };
        if units.is_empty() || units.len() > CHANGES_MAX {
            return Err(SupplyRefusal::Changes(units.len()));
        }
        let mut seen = HashSet::new();
        for Change { sku, quantity } in units {
            if !seen.insert(sku) {
                return Err(SupplyRefusal::Twice { sku: sku.clone() });
            }
            if !(least..=UNITS_MAX).contains(quantity) {
                return Err(SupplyRefusal::Units { sku: sku.clone(), quantity: *quantity, least });
            }
        }
        Ok(vec![fact.clone()])
    }

    fn evolve(&mut self, _: &SupplyEvent) {
        self.known = true;
    }
}
