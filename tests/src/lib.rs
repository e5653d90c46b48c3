//! Conformance suites that every store and every bus must pass, including those of other crates.

// A suite is a test: a store that returns an error has failed it.
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
