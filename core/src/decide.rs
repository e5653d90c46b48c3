//! The write side: aggregates turn commands into events, and each unit of work becomes one commit.

pub mod aggregate;
pub(crate) mod categories;
mod command_queue;
mod fold;
mod remembered;
pub mod repository;
pub mod transaction;
mod unsettled;
pub mod work;
