//! Suites that say whether a store or a bus is one.
//!
//! A suite is a list of properties. Whoever writes a store implements [`store::StoreUnderTest`] and names it in
//! [`store::suite!`]; each property is then a test of its own.

#![allow(clippy::unwrap_used)]

pub mod store;
