use serde::Serialize;

use super::{Invoice, RowError};

/// How many messages about malformed rows are kept.
pub const MESSAGES_MAX: usize = 10;

/// Invoices, and the rows they came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// How many invoices.
    pub invoices: u64,
    /// How many rows they have.
    pub rows: u64,
}

impl Tally {
    pub(super) fn add(&mut self, rows: u64) {
        self.invoices += 1;
        self.rows += rows;
    }
}

/// What became of the rows read so far: at the end `read` is the sum of the rows of all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// How many rows were read; the header is none.
    pub read: u64,
    /// Became orders.
    pub orders: Tally,
    /// Became returns.
    pub returns: Tally,
    /// Became adjustments.
    pub adjustments: Tally,
    /// Left out: the invoices with a malformed row, or beside a row whose invoice number cannot be read, or whose rows do
    /// not stand together; and of their rows those that are sound.
    pub left_out: Tally,
    /// Rows that are not UTF-8, and were read as Windows-1252.
    pub recoded: u64,
    /// Malformed rows, each reported as a [`RowError`].
    pub malformed: u64,
    /// The first [`MESSAGES_MAX`] reports.
    pub messages: Vec<String>,
}

impl Rows {
    /// Everything that nothing was made of: invoices, and all their rows.
    pub fn all_left_out(&self) -> Tally {
        Tally { rows: self.left_out.rows + self.malformed, ..self.left_out }
    }

    /// How many invoices came of them.
    pub fn invoices(&self) -> u64 {
        self.orders.invoices + self.returns.invoices + self.adjustments.invoices
    }

    pub(super) fn became(&mut self, invoice: &Invoice) {
        let tally = match invoice {
            Invoice::Order { .. } => &mut self.orders,
            Invoice::Return { .. } => &mut self.returns,
            Invoice::Adjustment { .. } => &mut self.adjustments,
        };
        tally.add(invoice.rows());
    }

    pub(super) fn malformed(&mut self, error: &RowError) {
        self.malformed += 1;
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(error.to_string());
        }
    }
}
