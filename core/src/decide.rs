//! The deciding side: commands become events, and one unit of work becomes one commit.

pub mod aggregate;
pub(crate) mod categories;
mod command_queue;
mod fold;
mod remembered;
pub mod repository;
pub mod transaction;
mod unsettled;
pub mod work;
