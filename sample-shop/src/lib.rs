//! A shop of four services that talk only through commands, events and the bus; as a library that its binary, its tests
//! and the benches share.
//!
//! | file | what is there |
//! |---|---|
//! | `order`, `inventory`, `payment`, `notification` | a service each: its aggregates, and the steps it carries out |
//! | `checkout` | the sagas `checkout` and `return` |
//! | `card` | test cards: what the simulated provider does with a payment |
//! | `supply`, `closing` | goods that come in or are counted; how the books stand; a saga each |
//! | `shelf` | what is on the shelf, as a read model |
//! | `shop` | the services put together |
//! | `input` | orders from a file, or seeded ones |
//! | `run` | the main job, with all services in this process |
//! | `serve`, `http`, `api` | services that run until told to stop, and what they answer |
//! | `remote` | the main job as a customer of a shop elsewhere |
//! | `hand_in` | hands in every invoice, and waits for its end |
//! | `books`, `ledger`, `report` | the books, folded from the log, and how they are shown |
//! | `store`, `bus` | what the URLs of the command line name |
//! | `claim`, `stop` | one shop at a time on a file; what ends it early |
// Fields of events and commands say what they are by their names.
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

/// What keeps the command from what it was asked for, in words.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
