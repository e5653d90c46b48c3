//! The HTTP interface of the order service.

mod bodies;
mod checks;
mod orders;

use annals_http::Metrics;
use prometheus::{IntCounterVec, Opts};

pub use self::orders::{OrderApi, routes};

/// Returns the counter of accepted submissions, which `/metrics` then shows.
pub fn accepted(metrics: &Metrics) -> Result<IntCounterVec, prometheus::Error> {
    let help = "Orders and other submissions that this process accepted, without repeats.";
    let accepted = IntCounterVec::new(Opts::new("shop_taken_in_total", help), &["kind"])?;
    metrics.registry().register(Box::new(accepted.clone()))?;
    Ok(accepted)
}
