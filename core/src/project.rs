//! Read models: views that follow the log.

pub(crate) mod generation;
pub mod read_model;
mod rebuild;
