//! wip

pub mod bus;
