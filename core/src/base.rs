//! Utilities that do not depend on events.

#[macro_use]
mod debug;

pub(crate) mod backoff;
pub mod config;
pub mod json;
pub(crate) mod name;
pub(crate) mod panic;
pub(crate) mod reason;
pub mod secret;
