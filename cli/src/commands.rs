//! The commands. Each file holds the arguments of one command and the code that runs it.

pub(crate) mod archive;
pub(crate) mod check_history;
pub(crate) mod completions;
pub(crate) mod dead_letters;
pub(crate) mod export;
pub(crate) mod import;
pub(crate) mod migrate;
pub(crate) mod read;
pub(crate) mod read_model;
pub(crate) mod recover;
pub(crate) mod replay;
pub(crate) mod saga;
pub(crate) mod sagas;
pub(crate) mod streams;
pub(crate) mod subscription;
pub(crate) mod subscriptions;
pub(crate) mod tail;
pub(crate) mod trace;
pub(crate) mod verify;
