//! A shop of four services that communicate only through commands, events and the bus. The shop is a library that its
//! command, its tests and the benchmarks share.
//!
//! | module | contents |
//! |---|---|
//! | `order`, `inventory`, `payment`, `notification` | one service each: its aggregates, its books, and the steps it carries out |
//! | `checkout`, `returning` | the sagas of orders and returns |
//! | `supplying`, `counting` | the sagas of supplies and closings, for services that do not share a store |
//! | `card` | test cards, which tell the simulated provider what to do with a payment |
//! | `books` | the totals of one service, folded from its log |
//! | `services` | the services put together |
//! | `ops` | the `annals` command as a subcommand, with the feature `ops` |
//! | `run` | the main job, with all services in this process |
//! | `serve`, `http` | services that run until they are stopped, and their HTTP answers |
//! | `store`, `bus` | opens the store and the bus that the URLs of the command line name |
//! | `command`, `arguments`, `claim`, `stop`, `troubles` | the command line and its arguments; the lock on a SQLite file; signals; problem reports |
//!
//! Customers, invoices and the summary are in `shop-driver`.
// The fields of events and commands need no comments, because their names explain them.
#![allow(missing_docs)]

pub mod arguments;
pub mod books;
pub mod bus;
pub mod card;
pub mod checkout;
pub mod claim;
pub mod command;
pub mod counting;
pub mod http;
pub mod inventory;
pub mod notification;
#[cfg(feature = "ops")]
pub mod ops;
pub mod order;
pub mod payment;
pub mod returning;
pub mod run;
pub mod serve;
pub mod services;
pub mod stop;
pub mod store;
pub mod supplying;
mod troubles;

/// The reason why a command failed.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;
