//! Event sourcing and sagas.

extern crate self as annals;

pub mod aggregate;
mod backoff;
pub mod bus;
mod claim;
pub mod commit;
pub mod consumer;
pub mod event;
pub mod handler;
pub mod health;
mod instance;
pub mod local_bus;
pub mod memory;
mod panic;
pub mod parking;
pub mod read_model;
mod redrive;
pub mod relay;
pub mod repository;
pub mod saga;
pub mod service;
mod stale;
pub mod store;
pub mod subscription;
pub mod tail;
#[cfg(feature = "testing")]
pub mod testing;
pub mod transaction;
pub mod work;
pub mod worker;

pub use annals_macros::Event;
#[doc(hidden)]
pub use {serde, serde_json};

pub use self::{
    aggregate::{Aggregate, Snapshot},
    bus::{Bus, BusError, Consumer, Message, Publisher},
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Expected, Put},
    consumer::Group,
    event::{Event, EventError, EventType, Metadata, NewEvent, Position, Recorded, StreamId, StreamIdError, Version},
    handler::{Handler, HandlerError, Terminal},
    health::Health,
    local_bus::LocalBus,
    memory::MemoryStore,
    parking::DeadLetters,
    read_model::{Projection, ReadModel, Views},
    repository::{ExecuteError, Repository, Request},
    saga::{Answer, Participant, Saga, SagaState, StepError},
    service::{Runtime, Service},
    store::{EventStore, LogPage, LogQuery, Scan, StoreError, StoreStatus},
    subscription::{Start, Subscription},
    tail::Tail,
    transaction::Transaction,
    work::{Work, WorkError},
};
