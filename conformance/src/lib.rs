//! Conformance suites for stores and buses, including stores and buses from other crates.
//!
//! [`store`] tests an [`EventStore`](annals::EventStore), and [`bus`] tests a [`Bus`](annals::Bus). Each module starts
//! with a complete example. A suite generates one test for each property, so a failed test names the broken promise. A
//! backend declares its capabilities with a trait or a constant, so no test is skipped silently.

#![warn(missing_debug_implementations)]
// A suite is test code: if a store returns an error, the suite fails by panicking.
#![allow(clippy::unwrap_used)]

pub mod bus;
pub mod store;
