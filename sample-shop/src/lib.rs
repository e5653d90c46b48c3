//! A shop of four services that communicate only through commands, events and the bus. The shop is a library that its
//! binary, its tests and the benchmarks share.
//!
//! | file | contents |
//! |---|---|
//! | `order`, `inventory`, `payment`, `notification` | one service each: its aggregates, and the steps it carries out |
//! | `checkout` | the sagas `checkout` and `return` |
//! | `card` | test cards, which tell the simulated provider what to do with a payment |
//! | `supply`, `closing` | incoming goods and stock counts; the closing of the books; one saga each |
//! | `shelf` | the stock on the shelf, as a read model |
//! | `shop` | the services put together |
//! | `input` | orders from a file, or generated from a seed |
//! | `run` | the main job, with all services in this process |
//! | `serve`, `http`, `api` | services that run until they are stopped, and their HTTP answers |
//! | `remote` | the main job as a customer of a shop elsewhere |
//! | `hand_in` | hands in every invoice, and waits for its end |
//! | `books`, `ledger`, `report` | the books, folded from the log, and how they are shown |
//! | `store`, `bus` | opens the store and the bus that the URLs of the command line name |
//! | `claim`, `stop` | allows one shop at a time on a file; ends a shop early |
// The fields of events and commands explain themselves by their names.
#![allow(missing_docs)]

pub mod api;
pub mod arguments;
pub mod books;
pub mod bus;
pub mod card;
pub mod checkout;
pub mod claim;
pub mod closing;
pub mod hand_in;
pub mod http;
mod http_client;
pub mod input;
pub mod inventory;
pub mod ledger;
pub mod notification;
pub mod order;
pub mod payment;
pub mod remote;
pub mod report;
pub mod run;
pub mod serve;
pub mod shelf;
pub mod shop;
pub mod stop;
pub mod store;
pub mod supply;

/// The reason why a command failed.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
