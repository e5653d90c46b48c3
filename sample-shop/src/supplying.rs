//! The saga of a supply.

use annals::{Aggregate, HandlerError, LogQuery, Message, Saga, SagaState, saga::StepRequest};
use serde::{Deserialize, Serialize};

use crate::{
    inventory::{Change, InventoryStep},
    order::{Supply, SupplyEvent},
};

/// The state of the saga of a supply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Supplying {
    pub supply_id: String,
    /// Whether the supply is a delivery; otherwise it is an adjustment.
    pub delivered: bool,
    pub units: Vec<Change>,
}

impl SagaState for Supplying {}

/// Returns the plan of a supply. The plan has a single step: the inventory service books the supply.
pub fn supplying() -> Saga<Supplying> {
    Saga::<Supplying>::named("supply")
        .retriable("book", |s| {
            let book =
                InventoryStep::Book { supply_id: s.supply_id.clone(), delivered: s.delivered, units: s.units.clone() };
            StepRequest::to("inventory", &book)
        })
        .build()
}

impl Supplying {
    /// Starts a saga for each supply.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let Some(supply) = message.decode::<SupplyEvent>()? else { return Ok(None) };
        let supply_id = supply.id().to_owned();
        let delivered = supply.is_delivered();
        Ok(Some((supply_id.clone(), Self { supply_id, delivered, units: supply.units() })))
    }

    /// The events that may start the saga of a supply.
    pub fn query() -> LogQuery {
        LogQuery::categories([Supply::CATEGORY])
    }
}
