use std::{fmt::Write, time::Duration};

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use hdrhistogram::Histogram;
use rust_decimal::Decimal;
use serde::{Serialize, Serializer, ser::Error};
use serde_json::value::RawValue;

use crate::{input::Tally, totals::Units};

use super::{
    histogram,
    number::{grouped, grouped_decimal, grouped_money, money},
    terminal::Terminal,
};

/// The summary of a run.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Orders placed.
    pub orders: u64,
    /// Orders whose checkout completed.
    pub confirmed: u64,
    /// Orders whose checkout was compensated.
    pub cancelled: Cancelled,
    /// Returns completed.
    pub returns: u64,
    /// Stock adjustments made.
    pub adjustments: u64,
    /// Sagas that need an operator.
    pub stuck: u64,
    /// Messages that stay parked until an operator redrives them.
    pub parked: u64,
    /// The sum of all charges, including those refunded later.
    pub charged: Decimal,
    /// The sum of all refunds.
    pub refunded: Decimal,
    /// What happened to the stock.
    pub units: Units,
    /// The time from the submission of the first invoice to the end of the last saga.
    pub elapsed: Duration,
    /// The number of sagas that ended within `elapsed`.
    pub sagas: u64,
    /// The time from the start to the end of each saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// The store of the events, without its password.
    pub store: String,
    /// The bus between the services.
    pub bus: String,
    /// The numbers of invoices and of rows of the input that were left out.
    pub left_out: Tally,
    /// Invoices that the shop rejected.
    pub rejected: u64,
}

/// The cancelled orders by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cancelled {
    /// There was too little stock.
    pub out_of_stock: u64,
    /// The card was declined.
    pub declined: u64,
    /// The customer changed their mind.
    pub by_customer: u64,
    /// A service refused a step for another reason, or could not be reached. JSON leaves this field out if it is zero.
    #[serde(skip_serializing_if = "none")]
    pub other: u64,
}

fn none(count: &u64) -> bool {
    *count == 0
}

impl Cancelled {
    /// The number of cancellations for any reason.
    pub fn all(&self) -> u64 {
        self.out_of_stock + self.declined + self.by_customer + self.other
    }
}

impl Summary {
    /// The number of sagas that ended per second; 0 if no time passed.
    pub fn sagas_per_second(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.sagas as f64 / seconds } else { 0.0 }
    }

    /// Returns one line of JSON for other programs, with its fields in a fixed order.
    pub fn json(&self) -> String {
        let line = Json {
            orders: self.orders,
            confirmed: self.confirmed,
            cancelled: self.cancelled,
            returns: self.returns,
            adjustments: self.adjustments,
            stuck: self.stuck,
            charged: money(self.charged),
            refunded: money(self.refunded),
            units: self.units,
            seconds: Fixed(3, self.elapsed.as_secs_f64()),
            sagas_per_second: Fixed(1, self.sagas_per_second()),
            latency_ms: LatencyMs { p50: self.millis(0.50), p95: self.millis(0.95), p99: self.millis(0.99) },
            store: &self.store,
            bus: &self.bus,
            left_out: self.left_out,
            rejected: self.rejected,
        };
        // Numbers and text can always be serialized, so the error never occurs.
        serde_json::to_string(&line).unwrap_or_else(|error| format!("{{\"error\":{:?}}}", error.to_string()))
    }

    /// Formats the summary for people on standard output, fitted to the terminal. Uses no colours if standard output is
    /// not a terminal.
    pub fn human(&self) -> String {
        self.human_on(Terminal::stdout())
    }

    /// Formats the summary for people at this terminal.
    pub fn human_on(&self, terminal: Terminal) -> String {
        let mut text = self.table(terminal).trim_fmt();
        text.push('\n');
        let verdict = if self.units.conserved() {
            terminal.good("✓ units conserved")
        } else {
            let Units { reserved, .. } = self.units;
            let fault = format!(
                "✗ units not conserved:\n  {} unexplained, {} still reserved",
                grouped(self.units.unexplained()),
                grouped(reserved)
            );
            terminal.bad(&fault)
        };
        let _ = writeln!(text, "{verdict}");
        if self.stuck > 0 {
            let _ = writeln!(text, "{}", terminal.bad(&format!("✗ {} stuck", grouped(self.stuck))));
        }
        if self.parked > 0 {
            let _ = writeln!(text, "{}", terminal.bad(&format!("✗ {} parked", grouped(self.parked))));
        }
        let _ = writeln!(
            text,
            "\n{} sagas in {} s, {} a second",
            grouped(self.sagas),
            grouped_decimal(self.elapsed.as_secs_f64(), 3),
            // At 10 or more sagas per second, decimals mean nothing.
            if self.sagas_per_second() < 10.0 {
                format!("{:.1}", self.sagas_per_second())
            } else {
                grouped(self.sagas_per_second().round() as u64)
            }
        );
        let _ = writeln!(text, "store {}, bus {}", self.store, self.bus);
        if !self.latency_us.is_empty() {
            let [p50, p95, p99] = [0.50, 0.95, 0.99].map(|quantile| grouped_decimal(self.millis(quantile).1, 1));
            let latency = format!("latency: p50 {p50} ms, p95 {p95} ms, p99 {p99} ms");
            let fits = latency.chars().count() <= usize::from(terminal.width);
            let _ = writeln!(text, "\n{}", if fits { latency } else { latency.replace(", ", "\n         ") });
            text.push_str(&histogram::draw(&self.latency_us, terminal));
        }
        text
    }

    fn table(&self, terminal: Terminal) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(terminal.width).force_no_tty();
        let mut row = |name: &str, value: String| {
            table.add_row([Cell::new(name), Cell::new(value).set_alignment(CellAlignment::Right)]);
        };
        row("orders", grouped(self.orders));
        row("  confirmed", grouped(self.confirmed));
        row("  cancelled", grouped(self.cancelled.all()));
        row("    out of stock", grouped(self.cancelled.out_of_stock));
        row("    card declined", grouped(self.cancelled.declined));
        row("    by the customer", grouped(self.cancelled.by_customer));
        if self.cancelled.other > 0 {
            row("    for another reason", grouped(self.cancelled.other));
        }
        row("returns", grouped(self.returns));
        row("adjustments", grouped(self.adjustments));
        row("stuck", grouped(self.stuck));
        row("charged", grouped_money(self.charged));
        row("refunded", grouped_money(self.refunded));
        row("units at the start", grouped(self.units.initial));
        row("  sold", grouped(-i128::from(self.units.sold)));
        row("  returned", signed(self.units.returned));
        row("  adjusted", signed(self.units.adjusted));
        row("units at the end", grouped(self.units.remaining));
        row("  of these reserved", grouped(self.units.reserved));
        table
    }

    fn millis(&self, quantile: f64) -> Fixed {
        Fixed(2, self.latency_us.value_at_quantile(quantile) as f64 / 1_000.0)
    }
}

fn signed(units: i64) -> String {
    format!("{}{}", if units > 0 { "+" } else { "" }, grouped(units))
}

#[derive(Serialize)]
struct Json<'a> {
    orders: u64,
    confirmed: u64,
    cancelled: Cancelled,
    returns: u64,
    adjustments: u64,
    stuck: u64,
    charged: String,
    refunded: String,
    units: Units,
    seconds: Fixed,
    sagas_per_second: Fixed,
    latency_ms: LatencyMs,
    store: &'a str,
    bus: &'a str,
    left_out: Tally,
    rejected: u64,
}

#[derive(Serialize)]
struct LatencyMs {
    p50: Fixed,
    p95: Fixed,
    p99: Fixed,
}

/// A JSON number with a fixed number of decimals. Trailing zeros are kept, so that columns of such numbers line up in
/// log output.
struct Fixed(usize, f64);

impl Serialize for Fixed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(decimals, value) = self;
        RawValue::from_string(format!("{value:.decimals$}")).map_err(S::Error::custom)?.serialize(serializer)
    }
}

#[cfg(test)]
mod tests;
