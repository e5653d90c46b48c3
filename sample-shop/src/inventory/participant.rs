//! The steps that sagas ask the inventory service to carry out. One commit over several streams reserves all lines of an
//! order.

use std::sync::Arc;

use annals::{Aggregate, Answer, Event, EventStore, Participant, Repository, StepError, Work};
use async_trait::async_trait;

use super::{
    books::StockBooks,
    stock::{Change, OfSku, Stock, StockCommand, Units, bookings},
};
use crate::books::Bookkeeper;

/// A step of a saga, as a command to the inventory service.
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
pub struct InventoryParticipant {
    stock: Repository<Stock>,
    bookkeeper: Bookkeeper<StockBooks>,
}

impl InventoryParticipant {
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
impl Participant for InventoryParticipant {
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
                self.all(work, bookings(&supply_id, delivered, units)).await
            }
            InventoryStep::Count => self.bookkeeper.count(work).await,
        }
    }
}
