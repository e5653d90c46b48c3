use serde::Serialize;

use super::{error::RowError, invoice::Invoice};

/// The maximum number of messages about malformed rows that are kept.
pub const MESSAGES_MAX: usize = 10;

/// Counts invoices and their rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// The number of invoices.
    pub invoices: u64,
    /// The number of rows of these invoices.
    pub rows: u64,
}

impl Tally {
    pub(super) fn add(&mut self, rows: u64) {
        self.invoices += 1;
        self.rows += rows;
    }
}

/// The outcome of the rows that have been read so far. At the end, `read` is the sum of all other row counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// The number of rows that were read, without the header.
    pub read: u64,
    /// Invoices that became orders.
    pub orders: Tally,
    /// Invoices that became returns.
    pub returns: Tally,
    /// Invoices that became adjustments.
    pub adjustments: Tally,
    /// Invoices that were left out: an invoice with a malformed row, an invoice next to a row whose invoice number
    /// cannot be read, or an invoice whose rows are not contiguous. Counts only the well-formed rows.
    pub left_out: Tally,
    /// Rows that are not UTF-8 and were read as Windows-1252.
    pub recoded: u64,
    /// Malformed rows, each reported as a [`RowError`].
    pub malformed: u64,
    /// The first [`MESSAGES_MAX`] reports.
    pub messages: Vec<String>,
}

impl Rows {
    /// The number of all invoices that were left out, and the number of all rows that were left out.
    pub fn all_left_out(&self) -> Tally {
        Tally { rows: self.left_out.rows + self.malformed, ..self.left_out }
    }

    /// The number of invoices that were made from the rows.
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
