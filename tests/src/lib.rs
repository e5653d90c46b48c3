//! What several tests share: stores that fail, brokers, terminals, and small aggregates and sagas.

// This is test code: an unexpected error fails the test by panicking.
#![allow(clippy::unwrap_used)]

pub mod distance;
pub mod faulty;
pub mod kafka;
pub mod tally;
#[cfg(unix)]
pub mod terminal;
pub mod trip;
