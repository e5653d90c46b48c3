//! The inventory service, with one stream per SKU. One commit over several streams reserves all lines of an order.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    books::Bookkeeper,
    supply::{Change, SupplyEvent},
};

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

/// The commands to the stock of a SKU.
#[derive(Clone, Debug)]
pub enum StockCommand {
    Receive { quantity: u64, delivery_id: String },
    Reserve { order_id: String, quantity: u32 },
    Release { order_id: String },
    Ship { order_id: String },
    TakeBack { return_id: String, quantity: u32 },
    Adjust { adjustment_id: String, quantity: i64 },
}

/// A command to the stock of one SKU, with the SKU.
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
    /// Deliveries and adjustments that are already booked. They are few per SKU, and every run on the same input asks
    /// for the same ones again.
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

/// A number of units of one SKU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Units {
    pub sku: String,
    pub quantity: u32,
}

/// The steps that sagas ask the inventory service to carry out.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "inventory")]
pub enum InventoryStep {
    Reserve {
        order_id: String,
        units: Vec<Units>,
    },
    Release {
        order_id: String,
        units: Vec<Units>,
    },
    Ship {
        order_id: String,
        units: Vec<Units>,
    },
    Restock {
        return_id: String,
        units: Vec<Units>,
    },
    /// Books the units that were delivered, or the differences that a stock count found.
    Book {
        supply_id: String,
        delivered: bool,
        units: Vec<Change>,
    },
    /// Returns the books of the stock.
    Count,
}

/// Carries out the steps of the inventory service. A step applies to all lines or to none.
pub struct InventoryDesk {
    stock: Repository<Stock>,
    bookkeeper: Bookkeeper,
}

impl InventoryDesk {
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        let bookkeeper = Bookkeeper::new("inventory", &[Stock::CATEGORY], store.clone());
        Self { stock: Repository::new(store), bookkeeper }
    }

    async fn each(
        &self,
        work: &mut Work,
        units: Vec<Units>,
        command: impl Fn(u32) -> StockCommand + Sync,
    ) -> Result<Answer, StepError> {
        self.all(work, units.into_iter().map(|Units { sku, quantity }| OfSku { sku, command: command(quantity) })).await
    }

    async fn all(&self, work: &mut Work, commands: impl Iterator<Item = OfSku> + Send) -> Result<Answer, StepError> {
        for of_sku in commands {
            work.execute(&self.stock, &of_sku.sku, &of_sku).await?;
        }
        Ok(Answer::DONE)
    }
}

#[async_trait]
impl Participant for InventoryDesk {
    type Command = InventoryStep;

    async fn perform(&self, step: InventoryStep, work: &mut Work) -> Result<Answer, StepError> {
        match step {
            InventoryStep::Reserve { order_id, units } => {
                self.each(work, units, |quantity| StockCommand::Reserve { order_id: order_id.clone(), quantity }).await
            }
            InventoryStep::Release { order_id, units } => {
                self.each(work, units, |_| StockCommand::Release { order_id: order_id.clone() }).await
            }
            InventoryStep::Ship { order_id, units } => {
                self.each(work, units, |_| StockCommand::Ship { order_id: order_id.clone() }).await
            }
            InventoryStep::Restock { return_id, units } => {
                let take_back = |quantity| StockCommand::TakeBack { return_id: return_id.clone(), quantity };
                self.each(work, units, take_back).await
            }
            InventoryStep::Book { supply_id, delivered, units } => {
                self.all(work, SupplyEvent::new(supply_id, delivered, units).commands()).await
            }
            InventoryStep::Count => self.bookkeeper.count(work).await,
        }
    }
}
