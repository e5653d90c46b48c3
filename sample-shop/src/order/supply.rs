//! Supplies: deliveries of goods, and stock counts that found more or fewer units. The order service accepts a supply,
//! and a saga asks the inventory service to book it.

use std::collections::{BTreeMap, HashSet};

use annals::{Aggregate, Event, HandlerError, LogQuery, Message, Saga, SagaState, saga::Request};
use serde::{Deserialize, Serialize};

use crate::inventory::{InventoryStep, OfSku, StockCommand};

/// The maximum number of SKUs in one supply. All of them are booked in one commit.
pub const CHANGES_MAX: usize = 5_000;
/// The number of SKUs per delivery of an opening stock.
const OPENING_PART: usize = 1_000;
/// The maximum number of units in one change. A stock cannot overflow with fewer than nine thousand such changes.
pub const UNITS_MAX: i64 = 1_000_000_000_000_000;

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

    /// The commands to the stock.
    pub fn commands(&self) -> impl Iterator<Item = OfSku> + Send {
        let (Self::Delivered { units, .. } | Self::Adjusted { units, .. }) = self;
        units.iter().map(|Change { sku, quantity }| {
            let (id, quantity) = (self.id().to_owned(), *quantity);
            let command = match self {
                Self::Delivered { .. } => StockCommand::Receive { delivery_id: id, quantity: quantity.unsigned_abs() },
                Self::Adjusted { .. } => StockCommand::Adjust { adjustment_id: id, quantity },
            };
            OfSku { sku: sku.clone(), command }
        })
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
        let least = if matches!(fact, SupplyEvent::Delivered { .. }) { 1 } else { -UNITS_MAX };
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

/// Returns the deliveries that open a stock. A stock is opened once for each name.
pub fn opening(name: &str, stock: BTreeMap<String, u64>) -> Vec<SupplyEvent> {
    let change = |(sku, quantity)| Change { sku, quantity: i64::try_from(quantity).unwrap_or(i64::MAX) };
    let units: Vec<Change> = stock.into_iter().filter(|(_, quantity)| *quantity > 0).map(change).collect();
    let part = |(number, units): (usize, &[Change])| SupplyEvent::Delivered {
        supply_id: format!("opening of {name}, part {}", number + 1),
        units: units.to_vec(),
    };
    units.chunks(OPENING_PART).enumerate().map(part).collect()
}

/// Returns an adjustment. Lines of the same SKU are summed.
pub fn adjustment(supply_id: String, lines: Vec<(String, i64)>) -> SupplyEvent {
    let mut of_sku: BTreeMap<String, i64> = BTreeMap::new();
    for (sku, quantity) in lines {
        *of_sku.entry(sku).or_default() += quantity;
    }
    let units = of_sku.into_iter().map(|(sku, quantity)| Change { sku, quantity }).collect();
    SupplyEvent::Adjusted { supply_id, units }
}

/// The state of the saga of a supply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Supplying {
    pub supply_id: String,
    /// Whether the supply is a delivery; otherwise it is an adjustment.
    pub delivered: bool,
    pub units: Vec<Change>,
}

impl SagaState for Supplying {}

/// Has a single step: the inventory service books the supply.
pub fn supplying() -> Saga<Supplying> {
    Saga::<Supplying>::named("supply")
        .retriable("book", |s| {
            let (supply_id, delivered, units) = (s.supply_id.clone(), s.delivered, s.units.clone());
            Request::to("inventory", &InventoryStep::Book { supply_id, delivered, units })
        })
        .build()
}

impl Supplying {
    /// Starts a saga for each supply.
    pub fn starts(message: &Message) -> Result<Option<(String, Self)>, HandlerError> {
        let (supply_id, delivered, units) = match message.decode()? {
            Some(SupplyEvent::Delivered { supply_id, units }) => (supply_id, true, units),
            Some(SupplyEvent::Adjusted { supply_id, units }) => (supply_id, false, units),
            None => return Ok(None),
        };
        Ok(Some((supply_id.clone(), Self { supply_id, delivered, units })))
    }

    /// The events that may start the saga of a supply.
    pub fn query() -> LogQuery {
        LogQuery::categories([Supply::CATEGORY])
    }
}
