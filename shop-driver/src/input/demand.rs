use std::{collections::BTreeMap, str::FromStr};

use rust_decimal::Decimal;

use super::invoice::Invoice;

/// The number of units of each SKU that an input takes out of stock. A SKU is absent if the input takes no units of it.
pub type Demand = BTreeMap<String, u64>;

/// Adds up the units that orders and write-offs take. Units that are returned or found do not count, because they may
/// arrive too late for an order.
pub fn demand(invoices: impl IntoIterator<Item = Invoice>) -> Demand {
    let mut demand = Demand::new();
    for invoice in invoices {
        add(&mut demand, &invoice);
    }
    demand
}

pub(super) fn add(demand: &mut Demand, invoice: &Invoice) {
    let mut take = |sku: &String, units: u64| match demand.get_mut(sku) {
        Some(sum) => *sum += units,
        None => {
            demand.insert(sku.clone(), units);
        }
    };
    match invoice {
        Invoice::Order { lines, .. } => lines.iter().for_each(|line| take(&line.sku, line.quantity.into())),
        Invoice::Return { .. } => {}
        Invoice::Adjustment { lines, .. } => {
            lines.iter().filter(|(_, units)| *units < 0).for_each(|(sku, units)| take(sku, units.unsigned_abs()));
        }
    }
}

/// The ratio of the opening stock of each SKU to its demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StockFactor(Decimal);

/// What is wrong with a stock factor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StockFactorError {
    /// The string is not a decimal number.
    #[error("not a decimal number such as 0.9")]
    NotANumber,
    /// The factor is zero or below, or above [`StockFactor::MAX`].
    #[error("must be above 0 and at most {}", StockFactor::MAX)]
    OutOfRange,
    /// The factor has more than [`StockFactor::DECIMALS_MAX`] decimals.
    #[error("must have at most {} decimals", StockFactor::DECIMALS_MAX)]
    TooFine,
}

impl StockFactor {
    /// The factor for an opening stock of exactly the units that the input takes.
    pub const ONE: Self = Self(Decimal::ONE);
    /// The highest factor, which gives more than enough stock of every SKU.
    pub const MAX: u32 = 1_000_000;
    /// The maximum number of decimals. A factor up to [`StockFactor::MAX`] then has at most 50 bits, so its product
    /// with a number of 64 bits is exact.
    pub const DECIMALS_MAX: u32 = 9;

    /// Returns `units` times the factor, exactly and rounded up, but at most `u64::MAX`.
    pub fn of(self, units: u64) -> u64 {
        let parts = self.0.mantissa().unsigned_abs() * u128::from(units);
        u64::try_from(parts.div_ceil(10_u128.pow(self.0.scale()))).unwrap_or(u64::MAX)
    }

    /// Returns the opening stock of a shop with this demand.
    pub fn stock(self, demand: &Demand) -> BTreeMap<String, u64> {
        demand.iter().map(|(sku, units)| (sku.clone(), self.of(*units))).collect()
    }
}

impl FromStr for StockFactor {
    type Err = StockFactorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let factor: Decimal = Decimal::from_str_exact(text).map_err(|_| StockFactorError::NotANumber)?.normalize();
        if factor <= Decimal::ZERO || factor > Decimal::from(Self::MAX) {
            return Err(StockFactorError::OutOfRange);
        }
        if factor.scale() > Self::DECIMALS_MAX {
            return Err(StockFactorError::TooFine);
        }
        Ok(Self(factor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::invoice::Line;

    fn line(sku: &str, quantity: u32) -> Line {
        Line { sku: sku.to_owned(), quantity, unit_price: Decimal::ONE }
    }

    #[test]
    fn demand_is_the_sum_of_orders_and_write_offs() {
        let invoices = [
            Invoice::Order { id: "1".into(), customer: None, lines: vec![line("a", 2), line("b", 1), line("a", 3)] },
            Invoice::Return { id: "C2".into(), customer: None, lines: vec![line("a", 4), line("c", 1)] },
            Invoice::Adjustment { id: "3".into(), lines: vec![("b".into(), -6), ("b".into(), 100), ("d".into(), 7)] },
        ];
        assert_eq!(demand(invoices), Demand::from([("a".into(), 5), ("b".into(), 7)]));
    }

    #[test]
    fn a_factor_is_exact_and_rounds_up() {
        let of = |factor: &str, units| factor.parse::<StockFactor>().map(|factor| factor.of(units));
        assert_eq!(of("1", 7), Ok(7));
        assert_eq!(of("1.0", 7), Ok(7));
        assert_eq!(of("0.9", 10), Ok(9));
        assert_eq!(of("0.9", 11), Ok(10));
        assert_eq!(of("0.000000001", 1), Ok(1));
        // In binary floating point, 1.1 * 10 is 11.000000000000002, which would round up to 12.
        assert_eq!(of("1.1", 10), Ok(11));
        assert_eq!(of("0.07", 100), Ok(7));
        // The number exceeds the 53 bits of a double.
        assert_eq!(of("1.000000001", 9_007_199_254_740_993), Ok(9_007_199_263_748_193));
        assert_eq!(of("1000000", u64::MAX), Ok(u64::MAX));
        assert_eq!(of("2", 0), Ok(0));
    }

    #[test]
    fn a_factor_has_bounds() {
        let error = |text: &str| text.parse::<StockFactor>().expect_err("a fault");
        for text in ["0", "-1", "0.0", "1000000.1"] {
            assert_eq!(error(text), StockFactorError::OutOfRange, "{text}");
        }
        for text in ["", "x", "1e3", "NaN", "1,5"] {
            assert_eq!(error(text), StockFactorError::NotANumber, "{text}");
        }
        assert_eq!(error("0.0000000001"), StockFactorError::TooFine);
        assert_eq!("0.5000000000000".parse::<StockFactor>().map(|factor| factor.of(3)), Ok(2));
    }

    #[test]
    fn stock_covers_every_sku_of_the_demand() {
        let demand = Demand::from([("a".into(), 5), ("b".into(), 7)]);
        let half: StockFactor = "0.5".parse().expect("a factor");
        assert_eq!(half.stock(&demand), BTreeMap::from([("a".into(), 3), ("b".into(), 4)]));
    }
}
