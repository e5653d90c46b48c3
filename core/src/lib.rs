//! Event sourcing and sagas: aggregates decide, one log holds their events, and handlers, read models and sagas follow
//! that log.
//!
//! ```
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! use std::{convert::Infallible, sync::Arc};
//!
//! use annals::{Aggregate, Event, MemoryStore, Repository};
//! use uuid::Uuid;
//!
//! /// What happens. The names are stored: `account.opened`, `account.credited`.
//! #[derive(Event, Clone, Debug)]
//! #[event(prefix = "account")]
//! enum AccountEvent {
//!     Opened,
//!     Credited { pence: u64 },
//! }
//!
//! #[derive(Clone, Default)]
//! struct Account {
//!     open: bool,
//!     pence: u64,
//! }
//!
//! impl Aggregate for Account {
//!     const CATEGORY: &'static str = "account";
//!     type Command = u64;
//!     type Event = AccountEvent;
//!     type Refusal = Infallible;
//!
//!     fn decide(&self, pence: &u64) -> Result<Vec<AccountEvent>, Infallible> {
//!         let credited = AccountEvent::Credited { pence: *pence };
//!         Ok(if self.open { vec![credited] } else { vec![AccountEvent::Opened, credited] })
//!     }
//!
//!     fn evolve(&mut self, event: &AccountEvent) {
//!         match event {
//!             AccountEvent::Opened => self.open = true,
//!             AccountEvent::Credited { pence } => self.pence += pence,
//!         }
//!     }
//! }
//!
//! let accounts = Repository::<Account>::new(Arc::new(MemoryStore::new()));
//! let request = Uuid::new_v4();
//! accounts.execute("alice", 250, request).await?;
//! // The same request once more finds what it did.
//! assert!(accounts.execute("alice", 250, request).await?.repeated);
//! assert_eq!(accounts.state("alice").await?.pence, 250);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Next: [`Handler`] and [`Subscription`] react to the log. [`Service`] and [`Runtime`] run services that communicate
//! over a bus. A [`Saga`] plans steps across several services, and a [`Participant`] executes those steps. Stores live
//! in other crates: `annals-sqlite` and `annals-postgres`.

extern crate self as annals;

pub mod aggregate;
pub mod archive;
mod backoff;
pub mod bus;
mod categories;
pub mod checkpoint;
mod claim;
pub mod clock;
pub mod commit;
pub mod config;
pub mod consumer;
pub mod event;
mod generation;
pub mod handler;
pub mod health;
mod instance;
pub mod json;
mod lanes;
mod line;
pub mod local_bus;
mod log_names;
mod marks;
pub mod memory;
mod name;
mod notice;
pub mod operator;
mod panic;
pub mod parking;
pub mod read_model;
mod reason;
mod rebuild;
pub mod recovery;
mod redrive;
pub mod relay;
mod relayed;
mod remembered;
pub mod repository;
mod routes;
pub mod saga;
pub mod secret;
pub mod service;
mod stale;
pub mod store;
pub mod subscription;
pub mod tail;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trace_context;
pub mod transaction;
mod unsettled;
pub mod work;
pub mod worker;

pub use annals_macros::Event;
#[doc(hidden)]
pub use {serde, serde_json};

pub use self::{
    aggregate::{Aggregate, Snapshot},
    archive::Archive,
    bus::{Bus, BusError, Consumer, Message, Publisher},
    clock::Clock,
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Expected, Put},
    consumer::Group,
    event::{Event, EventError, EventType, Metadata, NewEvent, Position, Recorded, StreamId, StreamIdError, Version},
    handler::{Handler, HandlerError, Terminal},
    health::Health,
    local_bus::LocalBus,
    memory::MemoryStore,
    name::{NAME_BYTES_MAX, NameError},
    operator::Operator,
    parking::DeadLetters,
    read_model::{Projection, ReadModel, Views},
    repository::{ExecuteError, Repository, Request},
    saga::{Answer, Participant, Saga, SagaState, StepError},
    service::{Runtime, Service, StartError},
    store::{EventStore, LogPage, LogQuery, LostEnd, OpenWriter, Scan, StoreError, StoreStatus},
    subscription::{Start, Subscription},
    tail::Tail,
    trace_context::TraceContext,
    transaction::Transaction,
    work::{Work, WorkError},
};
