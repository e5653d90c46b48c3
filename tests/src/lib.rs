//! Conformance suites for stores and buses, including stores and buses from other crates.

// A suite is test code: if a store returns an error, the suite fails by panicking.
#![allow(clippy::unwrap_used)]

pub mod bus;
pub mod distance;
pub mod faulty;
pub mod kafka;
pub mod store;
pub mod tally;
#[cfg(unix)]
pub mod terminal;
pub mod trip;
