use rust_decimal::Decimal;

use super::{
    invoice::{Invoice, LINES_MAX, Line},
    row::Row,
};

/// Contiguous rows with the same invoice number. The draft is complete when the last of these rows is read.
#[derive(Debug)]
pub(super) struct Draft {
    pub number: String,
    /// The line of the first row.
    pub first_line: u64,
    /// Whether the draft has a fault, such as a malformed row. A flawed draft does not become an invoice.
    pub flawed: bool,
    /// The number of well-formed rows.
    pub sound: u64,
    customer: Option<String>,
    lines: Vec<DraftLine>,
}

#[derive(Debug)]
struct DraftLine {
    at: u64,
    sku: String,
    quantity: i64,
    price: Decimal,
}

/// Lines of the file, each with its fault.
pub(super) type Faults = Vec<(u64, String)>;

impl Draft {
    pub fn new(number: &str, first_line: u64) -> Self {
        Self { number: number.to_owned(), first_line, flawed: false, sound: 0, customer: None, lines: Vec::new() }
    }

    /// Marks the draft as flawed and drops its rows.
    pub fn spoil(&mut self) {
        self.flawed = true;
        self.lines = Vec::new();
    }

    /// Adds a row. The error says what is wrong with the row.
    pub fn take(&mut self, at: u64, row: Row<'_>) -> Result<(), String> {
        if !self.flawed {
            if self.lines.is_empty() {
                self.customer = row.customer.map(str::to_owned);
            } else if self.customer.as_deref() != row.customer {
                return Err(format!(
                    "customer {:?}, where the rows of {} above have {:?}",
                    row.customer.unwrap_or_default(),
                    self.number,
                    self.customer.as_deref().unwrap_or_default()
                ));
            } else if self.lines.len() == LINES_MAX {
                return Err(format!("{} has more than {LINES_MAX} lines", self.number));
            }
            let Row { sku, quantity, price, .. } = row;
            self.lines.push(DraftLine { at, sku: sku.to_owned(), quantity, price });
        }
        self.sound += 1;
        Ok(())
    }

    /// Returns the invoice. The caller must have added all rows, and each row must be well formed.
    pub fn finish(self) -> Result<Invoice, Faults> {
        let faults = |wrong: fn(&&DraftLine) -> bool, reason: &str| -> Faults {
            self.lines.iter().filter(wrong).map(|line| (line.at, reason.to_owned())).collect()
        };
        if self.number.starts_with('C') {
            let faults = faults(|line| line.quantity > 0, "the quantity of a return must be below zero");
            if !faults.is_empty() {
                return Err(faults);
            }
            return Ok(Invoice::Return { id: self.number, customer: self.customer, lines: priced(self.lines) });
        }
        let total: Decimal = self.lines.iter().map(|line| Decimal::from(line.quantity) * line.price).sum();
        if total.is_zero() {
            let lines = self.lines.into_iter().map(|line| (line.sku, line.quantity)).collect();
            return Ok(Invoice::Adjustment { id: self.number, lines });
        }
        // No price is negative, so a negative total implies a line with a negative quantity as well.
        let faults = faults(|line| line.quantity < 0, "the quantity of an order must be above zero");
        if !faults.is_empty() {
            return Err(faults);
        }
        Ok(Invoice::Order { id: self.number, customer: self.customer, lines: priced(self.lines) })
    }
}

fn priced(lines: Vec<DraftLine>) -> Vec<Line> {
    let line = |DraftLine { sku, quantity, price, .. }| {
        // The absolute quantity of a row fits into 32 bits, so the fallback value is never used.
        let quantity = u32::try_from(i64::unsigned_abs(quantity)).unwrap_or(u32::MAX);
        Line { sku, quantity, unit_price: price }
    };
    lines.into_iter().map(line).collect()
}
