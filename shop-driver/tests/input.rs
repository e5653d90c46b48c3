//! Reads the whole file of real orders.

use std::path::{Path, PathBuf};

use rust_decimal::Decimal;
use shop_driver::input::{Invoice, Rows, Source, StockFactor, Tally};

/// The path of the file of real orders. The file is in a folder next to the repository, in CI as well. Without the
/// file, these tests fail.
fn real_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv")
}

fn real() -> Source {
    Source::file(real_file())
        .unwrap_or_else(|error| panic!("the real orders must be in a folder next to the repository: {error}"))
}

#[derive(Debug, Default, PartialEq)]
struct Sums {
    invoices: u64,
    total: Decimal,
    units: i64,
    guests: u64,
    free_lines: u64,
}

#[test]
fn real_orders_add_up_to_the_penny() {
    let mut orders = Sums::default();
    let mut returns = Sums::default();
    let mut adjustments = Sums::default();
    let mut invoices = real().invoices().expect("the file is still there");
    for invoice in &mut invoices {
        let invoice = invoice.expect("no row of it is malformed");
        let (sums, guest, lines) = match &invoice {
            Invoice::Order { customer, lines, .. } => {
                assert!(invoice.total() > Decimal::ZERO, "{invoice:?}");
                (&mut orders, customer.is_none(), &lines[..])
            }
            Invoice::Return { customer, lines, .. } => (&mut returns, customer.is_none(), &lines[..]),
            Invoice::Adjustment { .. } => (&mut adjustments, false, &[][..]),
        };
        sums.invoices += 1;
        sums.total += invoice.total();
        sums.units += invoice.units();
        sums.guests += u64::from(guest);
        sums.free_lines += lines.iter().filter(|line| line.unit_price.is_zero()).count() as u64;
    }
    let money = |pennies| Decimal::new(pennies, 2);
    assert_eq!(
        orders,
        Sums { invoices: 1_595, total: money(83_977_222), units: 368_150, guests: 160, free_lines: 133 }
    );
    assert_eq!(returns, Sums { invoices: 333, total: money(7_586_472), units: 16_274, guests: 18, free_lines: 0 });
    assert_eq!(adjustments, Sums { invoices: 154, units: -1_709, ..Sums::default() });
    let rows = Rows {
        read: 43_665,
        orders: Tally { invoices: 1_595, rows: 42_769 },
        returns: Tally { invoices: 333, rows: 742 },
        adjustments: Tally { invoices: 154, rows: 154 },
        ..Rows::default()
    };
    assert_eq!(invoices.rows(), &rows);
}

#[test]
fn real_demand_is_the_sum_of_orders_and_write_offs() {
    let source = real();
    assert_eq!(source.len(), 2_082);
    let demand = source.demand().expect("readable");
    assert_eq!(demand.len(), 2_802);
    assert_eq!(demand.values().sum::<u64>(), 372_703);
    assert_eq!((demand["84077"], demand["85123A"], demand["85123a"]), (5_196, 3_820, 118));
    assert_eq!(source.stock(StockFactor::ONE).expect("readable"), demand);
}
