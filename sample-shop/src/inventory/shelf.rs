//! The stock on the shelf: one view per SKU for people, built from the events of the stock.

use std::time::Duration;

use annals::{LogQuery, Message, Projection, ReadModel};
use serde::{Deserialize, Serialize};

use super::stock::StockEvent;

/// The read model `shelf`, with one view per SKU.
pub struct Shelf;

/// The units of a SKU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Level {
    /// The units in the warehouse.
    pub on_hand: i64,
    /// The units of `on_hand` that are reserved for orders.
    pub reserved: i64,
}

impl ReadModel for Shelf {
    const NAME: &'static str = "shelf";
    type Event = StockEvent;
    type View = Level;

    fn keys(&self, event: &StockEvent, _: &Message) -> Vec<String> {
        let (StockEvent::Received { sku, .. }
        | StockEvent::Reserved { sku, .. }
        | StockEvent::Released { sku, .. }
        | StockEvent::Shipped { sku, .. }
        | StockEvent::Returned { sku, .. }
        | StockEvent::Adjusted { sku, .. }) = event;
        vec![sku.clone()]
    }

    fn apply(&self, _: &str, level: &mut Level, event: &StockEvent, _: &Message) {
        let (on_hand, reserved) = match *event {
            StockEvent::Received { quantity, .. } => (quantity.cast_signed(), 0),
            StockEvent::Reserved { quantity, .. } => (0, i64::from(quantity)),
            StockEvent::Released { quantity, .. } => (0, -i64::from(quantity)),
            StockEvent::Shipped { quantity, .. } => (-i64::from(quantity), -i64::from(quantity)),
            StockEvent::Returned { quantity, .. } => (i64::from(quantity), 0),
            StockEvent::Adjusted { quantity, .. } => (quantity, 0),
        };
        level.on_hand += on_hand;
        level.reserved += reserved;
    }
}

/// The maximum age of the views. Under load, the views may be four times as old.
const AGE: Duration = Duration::from_millis(200);

/// Returns the projection of the shelf, built from the events of the stock.
pub fn shelf() -> Projection<Shelf> {
    Projection::new(Shelf, LogQuery::categories(["stock"])).linger(AGE)
}
