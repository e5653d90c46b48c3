//! Conformance suites that every store and bus must pass, also those of others.

pub mod bus;
pub mod faulty;
pub mod store;
pub mod tally;
pub mod trip;
