//! The lines of orders and returns, and their limits.

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};

use crate::inventory::Units;

/// The currency of every amount in the shop.
pub const CURRENCY: &str = "GBP";

/// A number of units of one SKU at one price.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The stock keeping unit.
    pub sku: String,
    /// The number of units.
    pub quantity: u32,
    /// The price of one unit.
    pub unit_price: Decimal,
}

/// Why an order refuses a command.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OrderRefusal {
    #[error("an order needs at least one line")]
    NoLines,
    #[error("line {line}, {sku}: the quantity is 0")]
    NoQuantity { line: usize, sku: String },
    #[error("line {line}, {sku}: the price {price} {}", wrong_with(price))]
    Price { line: usize, sku: String, price: Decimal },
    #[error("the order is too large: its units or its total are beyond the limits")]
    TooLarge,
    #[error("there is no such order")]
    NotPlaced,
    #[error("the order is cancelled: {0}")]
    Cancelled(String),
    #[error("the order is confirmed; send the goods back instead")]
    Confirmed,
}

/// The maximum number of decimals of a price. Prices in the source data have up to three decimals; more than four
/// decimals are a mistake in the input.
pub const PRICE_DECIMALS_MAX: u32 = 4;

fn wrong_with(price: &Decimal) -> String {
    if price.is_sign_negative() {
        return "is negative".into();
    }
    format!("has more than {PRICE_DECIMALS_MAX} decimals")
}

/// The maximum number of lines of an order or return, from any kind of input. All lines are reserved in one commit.
pub const LINES_MAX: usize = 5_000;

/// Returns the sum of the lines. The error says what is wrong with the lines.
pub fn total(lines: &[Line]) -> Result<Decimal, OrderRefusal> {
    if lines.is_empty() {
        return Err(OrderRefusal::NoLines);
    }
    let mut total = Decimal::ZERO;
    let mut units = 0_u32;
    for (line, Line { sku, quantity, unit_price }) in (1..).zip(lines) {
        if *quantity == 0 {
            return Err(OrderRefusal::NoQuantity { line, sku: sku.clone() });
        }
        units = units.checked_add(*quantity).ok_or(OrderRefusal::TooLarge)?;
        if unit_price.is_sign_negative() || unit_price.scale() > PRICE_DECIMALS_MAX {
            return Err(OrderRefusal::Price { line, sku: sku.clone(), price: *unit_price });
        }
        let amount = unit_price.checked_mul(Decimal::from(*quantity)).and_then(|amount| total.checked_add(amount));
        total = amount.ok_or(OrderRefusal::TooLarge)?;
    }
    Ok(total)
}

/// Adds up the units of each SKU. An order may list a SKU on several lines, but the SKU is reserved once.
pub fn units(lines: &[Line]) -> Vec<Units> {
    let mut units: BTreeMap<&str, u32> = BTreeMap::new();
    for line in lines {
        let quantity = units.entry(&line.sku).or_default();
        *quantity = quantity.saturating_add(line.quantity);
    }
    units.into_iter().map(|(sku, quantity)| Units { sku: sku.to_owned(), quantity }).collect()
}
