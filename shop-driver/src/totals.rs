//! The totals that a shop has counted, as its closings report them.

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

/// The totals of orders, sales and payments.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Orders placed.
    pub orders: u64,
    /// Orders confirmed.
    pub confirmed: u64,
    /// The number of cancelled orders by reason.
    pub cancelled: BTreeMap<String, u64>,
    /// Returns completed.
    pub returns: u64,
    /// Stock counts.
    pub adjustments: u64,
    /// The sum of all charges.
    pub charged: Decimal,
    /// The sum of all refunds.
    pub refunded: Decimal,
    /// What happened to the stock.
    pub units: Units,
}

/// The number of units of all SKUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Units {
    /// The units in stock at the start.
    pub initial: i64,
    /// The units shipped.
    pub sold: i64,
    /// The units that customers sent back.
    pub returned: i64,
    /// The units found minus the units written off.
    pub adjusted: i64,
    /// The units in stock at the end, reserved or not.
    pub remaining: i64,
    /// The units reserved for checkouts that have not ended.
    pub reserved: i64,
}

impl Units {
    /// Returns whether every unit is accounted for, and no unit is still reserved.
    pub fn conserved(&self) -> bool {
        self.reserved == 0 && self.unexplained() == 0
    }

    /// The units at the end that the other fields do not explain.
    pub(crate) fn unexplained(&self) -> i128 {
        let [initial, sold, returned, adjusted, remaining] =
            [self.initial, self.sold, self.returned, self.adjusted, self.remaining].map(i128::from);
        remaining - (initial - sold + returned + adjusted)
    }
}
