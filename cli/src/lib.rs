//! The `annals` command inspects, replays, verifies, moves and repairs any store of Annals.
//!
//! A service can offer this command as a subcommand of its own. [`Ops::run`] takes the arguments after the subcommand:
//!
//! ```no_run
//! # async fn main_of_a_service() -> std::process::ExitCode {
//! // my-service ops streams --store sqlite:my.db
//! annals_cli::Ops::named("my-service ops").run(std::env::args_os().skip(2)).await
//! # }
//! ```
//!
//! [`Ops::events`] and [`Ops::saga`] register the service's events and sagas, which `check-history` needs.
//! [`Ops::read_model`] registers how the service builds its views, which `read-model` needs.
//!
//! Without the feature `command`, which is on by default, the crate contains only the module [`quoted`].

#![warn(missing_debug_implementations)]

#[cfg(feature = "command")]
mod arguments;
#[cfg(feature = "command")]
mod commands;
#[cfg(feature = "command")]
mod common;
#[cfg(feature = "command")]
mod confirm;
#[cfg(feature = "command")]
mod domain;
#[cfg(feature = "command")]
mod event_filter;
#[cfg(feature = "command")]
mod event_lines;
#[cfg(feature = "command")]
mod exported;
#[cfg(feature = "command")]
mod failure;
#[cfg(feature = "command")]
mod model;
#[cfg(feature = "command")]
mod moment;
#[cfg(feature = "command")]
mod ops;
#[cfg(feature = "command")]
mod output;
#[cfg(feature = "command")]
mod place;
#[cfg(feature = "command")]
mod progress;
pub mod quoted;
#[cfg(feature = "command")]
mod resume_command;
#[cfg(feature = "command")]
mod stop;
#[cfg(feature = "command")]
mod store;
#[cfg(feature = "command")]
mod stream_key;

#[cfg(feature = "command")]
pub use self::ops::Ops;
