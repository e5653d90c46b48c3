//! Shows the outcome of a run.

use std::io::{self, Write};

use rust_decimal::Decimal;

use super::{
    number::grouped,
    remarks::repeated,
    rows::rows,
    summary::{Cancelled, Summary},
};
use crate::{
    input::{Invoices, Tally},
    run::Outcome,
    totals::Totals,
};

/// The maximum number of rejected invoices, and of parked messages, that are listed one by one.
const SHOWN_MAX: usize = 10;

/// Writes remarks to standard error and the summary to standard output, as JSON or for people. Returns whether every
/// invoice was read and accepted, and whether the books are in order. `store` and `bus` are the names of the shop's
/// store and bus.
///
/// # Errors
/// Returns an error if the summary cannot be written.
pub fn show(outcome: Outcome, invoices: &Invoices, store: String, bus: String, json: bool) -> io::Result<bool> {
    let read = invoices.rows();
    if read.malformed > 0 || matches!(invoices, Invoices::File(_)) {
        eprintln!("{}", rows(read));
    }
    if outcome.repeated > 0 {
        eprintln!("{}", repeated(outcome.repeated));
    }
    list("rejected", &outcome.rejected);
    list("parked", &outcome.parked);
    if read.malformed > 0 && read.invoices() == 0 {
        eprintln!("sample-shop: no order, return or adjustment could be made of any row");
    }
    let totals = &outcome.totals;
    let summary = Summary {
        orders: totals.orders,
        confirmed: totals.confirmed,
        cancelled: cancelled(totals),
        returns: totals.returns,
        adjustments: totals.adjustments,
        stuck: outcome.stuck,
        parked: outcome.parked.len() as u64,
        charged: totals.charged,
        refunded: totals.refunded,
        units: totals.units,
        elapsed: outcome.elapsed,
        sagas: outcome.sagas,
        latency_us: outcome.latency_us,
        store,
        bus,
        left_out: read.all_left_out(),
        rejected: outcome.rejected.len() as u64,
    };
    let text = if json { summary.json() } else { summary.human() };
    writeln!(io::stdout(), "{text}")?;
    Ok(summary.left_out == Tally::default()
        && summary.rejected == 0
        && summary.stuck == 0
        && summary.parked == 0
        && summary.units.conserved()
        && summary.charged >= Decimal::ZERO)
}

/// Sorts the cancelled orders by reason.
fn cancelled(totals: &Totals) -> Cancelled {
    let mut cancelled = Cancelled::default();
    for (reason, count) in &totals.cancelled {
        let field = match reason.as_str() {
            "out_of_stock" => &mut cancelled.out_of_stock,
            "declined" => &mut cancelled.declined,
            "by_customer" => &mut cancelled.by_customer,
            _ => &mut cancelled.other,
        };
        *field += count;
    }
    cancelled
}

fn list(what: &str, reasons: &[String]) {
    for reason in reasons.iter().take(SHOWN_MAX) {
        eprintln!("{what}: {reason}");
    }
    if reasons.len() > SHOWN_MAX {
        eprintln!("and {} more {what}", grouped((reasons.len() - SHOWN_MAX) as u64));
    }
}
