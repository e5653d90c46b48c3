//! The following side: handlers receive the messages of a log or a bus, and checkpoints record how far.

pub mod checkpoint;
pub mod consumer;
mod deduplication;
pub(crate) mod lanes;
pub(crate) mod lease;
pub mod parking;
pub(crate) mod peer;
mod redrive;
pub mod subscription;
pub mod worker;
