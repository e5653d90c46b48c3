//! Event sourcing and sagas.

extern crate self as annals;

pub mod aggregate;
pub mod bus;
pub mod commit;
pub mod event;
pub mod memory;
pub mod store;

// pub use annals_macros::Event;
#[doc(hidden)]
pub use {serde, serde_json};

pub use self::{
    aggregate::{Aggregate, Snapshot},
    bus::{Bus, BusError, Consumer, Message, Publisher},
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Expected, Put},
    event::{Event, EventError, EventType, Metadata, NewEvent, Position, Recorded, StreamId, StreamIdError, Version},
    memory::MemoryStore,
    store::{EventStore, LogPage, LogQuery, Scan, StoreError, StoreStatus},
};
