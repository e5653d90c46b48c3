//! A shop of four services that talk only through commands, events and the bus.
#![allow(missing_docs)]

pub mod checkout;
pub mod input;
pub mod inventory;
pub mod notification;
pub mod order;
pub mod payment;
pub mod run;
pub mod shop;
pub mod ledger;
