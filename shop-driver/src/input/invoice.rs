//! Invoices: the orders, returns and stock adjustments of an input.

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

/// The maximum number of lines of an invoice. The shop accepts no more lines, because it reserves all lines of an order
/// in one commit.
pub const LINES_MAX: usize = 5_000;

/// A number of units of one SKU that is added to the stock or removed from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The SKU.
    pub sku: String,
    /// The number of units: above zero if units were delivered or found, below zero if units are missing.
    pub quantity: i64,
}

/// A line of an order or of a return. Several lines of one invoice may have the same SKU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// The SKU: opaque, case-sensitive text (`85123A` and `85123a` are two SKUs).
    pub sku: String,
    /// The number of units, above zero.
    pub quantity: u32,
    /// The price of one unit: zero for goods given away with an order, and never negative.
    pub unit_price: Decimal,
}

/// What an invoice means to the shop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invoice {
    /// A sale. At least one line has a price; the other lines may be free, and are shipped like any other line.
    Order {
        /// The invoice number, as in the file.
        id: String,
        /// The customer; `None` is a guest.
        customer: Option<String>,
        /// All lines, in the order of the file.
        lines: Vec<Line>,
    },
    /// A customer returns goods, and their total is refunded. The total may be zero, because customers also return free
    /// goods.
    Return {
        /// The invoice number, as in the file, with its `C`.
        id: String,
        /// The customer; `None` is a guest.
        customer: Option<String>,
        /// All lines, with the quantities made positive.
        lines: Vec<Line>,
    },
    /// A correction of the stock: goods were found, lost, damaged or thrown away. No money moves.
    Adjustment {
        /// The invoice number, as in the file.
        id: String,
        /// Each SKU with its change: above zero if units were found, below zero if units were written off, never zero.
        lines: Vec<(String, i64)>,
    },
}

impl Invoice {
    /// The invoice number.
    pub fn id(&self) -> &str {
        match self {
            Self::Order { id, .. } | Self::Return { id, .. } | Self::Adjustment { id, .. } => id,
        }
    }

    /// The exact sum of quantity times price: the amount that an order charges or a return refunds. Zero for an
    /// adjustment.
    ///
    /// The readers limit prices, quantities and the number of lines so that the sum never overflows or loses digits.
    pub fn total(&self) -> Decimal {
        match self {
            Self::Order { lines, .. } | Self::Return { lines, .. } => {
                lines.iter().map(|line| Decimal::from(line.quantity) * line.unit_price).sum()
            }
            Self::Adjustment { .. } => Decimal::ZERO,
        }
    }

    /// The number of units that leave the stock for an order, or that come back for a return; for an adjustment, the
    /// net change.
    pub fn units(&self) -> i64 {
        match self {
            Self::Order { lines, .. } | Self::Return { lines, .. } => {
                lines.iter().map(|line| i64::from(line.quantity)).sum()
            }
            Self::Adjustment { lines, .. } => lines.iter().map(|(_, quantity)| quantity).sum(),
        }
    }

    /// The SKUs of the invoice, one per line.
    pub fn skus(&self) -> impl Iterator<Item = &str> {
        let (sold, counted): (&[Line], &[(String, i64)]) = match self {
            Self::Order { lines, .. } | Self::Return { lines, .. } => (lines, &[]),
            Self::Adjustment { lines, .. } => (&[], lines),
        };
        sold.iter().map(|line| line.sku.as_str()).chain(counted.iter().map(|(sku, _)| sku.as_str()))
    }

    /// The number of lines, which is the number of rows in the file.
    pub fn rows(&self) -> u64 {
        let rows = match self {
            Self::Order { lines, .. } | Self::Return { lines, .. } => lines.len(),
            Self::Adjustment { lines, .. } => lines.len(),
        };
        rows as u64
    }
}
