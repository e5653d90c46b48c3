//! A shop of four services that talk only through commands, events and the bus; as a library that its binary, its tests
//! and the benches share.
//!
//! | file | what is there |
//! |---|---|
//! | `order`, `inventory`, `payment`, `notification` | a service each: its aggregates, and the steps it carries out |
//! | `checkout` | the sagas `checkout` and `return` |
//! | `shop` | the services put together |
//! | `input` | orders from a file, or seeded ones |
//! | `run` | the main job: hands in every invoice and waits for its end |
//! | `ledger`, `report` | the books, folded from the log, and how they are shown |
//! | `claim`, `stop` | one shop at a time on a file; what ends it early |
// Fields of events and commands say what they are by their names.
#![allow(missing_docs)]

pub mod arguments;
pub mod checkout;
pub mod claim;
pub mod input;
pub mod inventory;
pub mod ledger;
pub mod notification;
pub mod order;
pub mod payment;
pub mod report;
pub mod run;
pub mod shop;
pub mod stop;
