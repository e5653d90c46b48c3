//! The stock of each SKU, with one stream per SKU.

use std::collections::{BTreeMap, BTreeSet};

use annals::{Aggregate, Event};
use serde::{Deserialize, Serialize};

/// A number of units of one SKU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Units {
    pub sku: String,
    pub quantity: u32,
}

/// A number of units of one SKU that is added or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The stock keeping unit.
    pub sku: String,
    /// The number of units: positive if units were delivered or found, negative if units are missing, and zero if a
    /// count confirmed the stock.
    pub quantity: i64,
}

/// What happens to the stock of a SKU.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "stock")]
pub enum StockEvent {
    /// Goods were delivered.
    Received { sku: String, quantity: u64, delivery_id: String },
    /// Units are held for an order.
    Reserved { order_id: String, sku: String, quantity: u32 },
    /// The reservation was released.
    Released { order_id: String, sku: String, quantity: u32 },
    /// The units left the warehouse.
    Shipped { order_id: String, sku: String, quantity: u32 },
    /// A customer sent units back.
    Returned { return_id: String, sku: String, quantity: u32 },
    /// A stock count found more or fewer units. The stock never falls below the number of reserved units.
    Adjusted { adjustment_id: String, sku: String, quantity: i64, counted: i64 },
}

/// The commands for the stock of a SKU.
#[derive(Clone, Debug)]
pub enum StockCommand {
    Receive { quantity: u64, delivery_id: String },
    Reserve { order_id: String, quantity: u32 },
    Release { order_id: String },
    Ship { order_id: String },
    TakeBack { return_id: String, quantity: u32 },
    Adjust { adjustment_id: String, quantity: i64 },
}

/// A command, and the SKU to whose stock the command applies.
#[derive(Clone, Debug)]
pub struct OfSku {
    pub sku: String,
    pub command: StockCommand,
}

/// Why the stock refuses a command.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StockRefusal {
    #[error("{sku}: {wanted} wanted, {available} available")]
    OutOfStock { sku: String, wanted: u32, available: i64 },
    #[error("{sku}: nothing is reserved for order {order_id}")]
    NotReserved { sku: String, order_id: String },
}

/// The stock of a SKU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stock {
    on_hand: i64,
    held: i64,
    reservations: BTreeMap<String, u32>,
    /// Deliveries and adjustments that are already booked. Every SKU has only a few deliveries and adjustments, and
    /// every run with the same input submits them again.
    booked: BTreeSet<String>,
}

impl Stock {
    /// The number of units that are not reserved.
    pub fn available(&self) -> i64 {
        self.on_hand - self.held
    }
}

impl Aggregate for Stock {
    const CATEGORY: &'static str = "stock";
    type Command = OfSku;
    type Event = StockEvent;
    type Refusal = StockRefusal;

    fn decide(&self, OfSku { sku, command }: &OfSku) -> Result<Vec<StockEvent>, StockRefusal> {
        let sku = sku.clone();
        let event = match command {
            StockCommand::Receive { delivery_id: id, .. } | StockCommand::Adjust { adjustment_id: id, .. }
                if self.booked.contains(id) =>
            {
                return Ok(vec![]);
            }
            StockCommand::Receive { quantity, delivery_id } => {
                StockEvent::Received { sku, quantity: *quantity, delivery_id: delivery_id.clone() }
            }
            StockCommand::Reserve { order_id, quantity } => {
                if self.available() < i64::from(*quantity) {
                    return Err(StockRefusal::OutOfStock { sku, wanted: *quantity, available: self.available() });
                }
                StockEvent::Reserved { order_id: order_id.clone(), sku, quantity: *quantity }
            }
            StockCommand::Release { order_id } => match self.reservations.get(order_id) {
                Some(quantity) => StockEvent::Released { order_id: order_id.clone(), sku, quantity: *quantity },
                None => return Ok(vec![]),
            },
            StockCommand::Ship { order_id } => match self.reservations.get(order_id) {
                Some(quantity) => StockEvent::Shipped { order_id: order_id.clone(), sku, quantity: *quantity },
                None => return Err(StockRefusal::NotReserved { sku, order_id: order_id.clone() }),
            },
            StockCommand::TakeBack { return_id, quantity } => {
                StockEvent::Returned { return_id: return_id.clone(), sku, quantity: *quantity }
            }
            StockCommand::Adjust { adjustment_id, quantity } => {
                // Units that are missing from the warehouse, or that are reserved for an order, cannot be written off.
                let booked = (*quantity).max(-self.available().max(0));
                StockEvent::Adjusted { adjustment_id: adjustment_id.clone(), sku, quantity: booked, counted: *quantity }
            }
        };
        Ok(vec![event])
    }

    fn evolve(&mut self, event: &StockEvent) {
        match event {
            StockEvent::Received { quantity, delivery_id, .. } => {
                self.on_hand += *quantity as i64;
                self.booked.insert(delivery_id.clone());
            }
            StockEvent::Reserved { order_id, quantity, .. } => {
                self.held += i64::from(*quantity);
                *self.reservations.entry(order_id.clone()).or_default() += quantity;
            }
            StockEvent::Released { order_id, quantity, .. } => {
                self.held -= i64::from(*quantity);
                self.reservations.remove(order_id);
            }
            StockEvent::Shipped { order_id, quantity, .. } => {
                self.held -= i64::from(*quantity);
                self.on_hand -= i64::from(*quantity);
                self.reservations.remove(order_id);
            }
            StockEvent::Returned { quantity, .. } => self.on_hand += i64::from(*quantity),
            StockEvent::Adjusted { adjustment_id, quantity, .. } => {
                self.on_hand += quantity;
                self.booked.insert(adjustment_id.clone());
            }
        }
    }
}

/// Returns the commands that book a delivery or a stock count.
pub fn bookings(supply_id: &str, delivered: bool, units: Vec<Change>) -> impl Iterator<Item = OfSku> + Send {
    units.into_iter().map(move |Change { sku, quantity }| {
        let id = supply_id.to_owned();
        let command = match delivered {
            true => StockCommand::Receive { delivery_id: id, quantity: quantity.unsigned_abs() },
            false => StockCommand::Adjust { adjustment_id: id, quantity },
        };
        OfSku { sku, command }
    })
}
