//! The settings and the outcome of a run.

use std::time::Duration;

use hdrhistogram::Histogram;
use tokio_util::sync::CancellationToken;

use crate::{card::Chances, input::InputError, totals::Totals};

/// The settings of a run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The maximum number of invoices in progress.
    pub concurrency: usize,
    /// The probabilities for choosing the customers' cards.
    pub chances: Chances,
    /// Whether stock may run out. If so, the order of the invoices matters: each invoice waits for the earlier invoices
    /// that share a SKU with it. The result is then the same on every machine, as if the invoices were handled one by
    /// one.
    pub scarce: bool,
    /// The name of this input. Stock is opened once for each name.
    pub input: String,
    /// Ends the run early: no further invoice is submitted, and the work in progress is finished.
    pub stop: CancellationToken,
}

/// The result of a run.
pub struct Outcome {
    /// The totals of the whole store.
    pub totals: Totals,
    /// The number of sagas of this run that ended.
    pub sagas: u64,
    /// The number of invoices that an earlier run had already submitted.
    pub repeated: u64,
    /// The number of sagas that need an operator.
    pub stuck: u64,
    /// The number of orders and returns that were accepted and whose sagas have not ended. Above zero only for a run
    /// that was stopped.
    pub unfinished: u64,
    /// The time from the first invoice to the end of the last saga.
    pub elapsed: Duration,
    /// The time from submitting an invoice to the end of its saga, in microseconds.
    pub latency_us: Histogram<u64>,
    /// Invoices that a service rejected, each with its reason.
    pub rejected: Vec<String>,
    /// Messages that stay parked until an operator redrives them, each with its reason.
    pub parked: Vec<String>,
}

/// Why a run stopped early. Completed work is kept; run the same input again to continue.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The input cannot be read.
    #[error("{0}")]
    Input(#[from] InputError),
    /// The stock cannot be opened.
    #[error("opening the stock: {0}")]
    Stock(String),
    /// The shop, its store or its bus failed.
    #[error("{0}")]
    Shop(String),
}
