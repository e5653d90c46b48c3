//! Drives load into the sample shop: reads or generates invoices, submits each of them, waits until its saga has ended,
//! and reports the outcome.
//!
//! The driver does not depend on the shop's code. The driver reaches a shop through the trait [`Shop`](shop::Shop),
//! which has two implementations: [`over_http`] for a shop in another process, and one in `sample-shop` for a shop in
//! this process.
//!
//! | module | contents |
//! |---|---|
//! | `input` | invoices from a CSV file, or generated from a seed |
//! | `shop` | the requests of a customer to a shop |
//! | `card` | the card with which each order is paid, chosen by the seed |
//! | `customers`, `queues` | submit every invoice and wait for its saga; keep the order of invoices that share a SKU |
//! | `over_http` | a shop in another process |
//! | `run`, `totals` | the settings and the outcome of a run; the totals that a shop has counted |
//! | `report` | progress during a run, and the summary at its end |

pub mod card;
pub mod customers;
pub mod input;
pub mod over_http;
mod queues;
pub mod report;
pub mod run;
pub mod shop;
pub mod totals;
