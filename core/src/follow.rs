//! The read side: handlers receive the messages of a log or a bus, and checkpoints record how far each reader has come.

pub mod checkpoint;
pub mod consumer;
mod deduplication;
mod deliver;
pub(crate) mod lanes;
pub(crate) mod lease;
pub(crate) mod log_wait;
pub mod parking;
pub(crate) mod peer;
mod redrive;
pub(crate) mod relay_progress;
pub mod subscription;
pub mod worker;
