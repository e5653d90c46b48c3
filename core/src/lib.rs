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
//! # Where to look
//!
//! Each of these types has an example on its own page.
//!
//! | to | use |
//! |---|---|
//! | decide | [`Aggregate`], with events that derive [`Event`](macro@Event), and a [`Repository`] that executes commands |
//! | follow the log | [`Handler`] reacts to messages, and a [`Subscription`] calls it for each event |
//! | read | [`ReadModel`] keeps views up to date; its example also reads the views through [`Views`] |
//! | connect services | [`Service`] publishes and consumes over a bus, and a [`Runtime`] starts and stops services |
//! | work across services | [`Saga`] plans steps, a [`Runner`](saga::Runner) runs them, and a [`Participant`] carries them out |
//! | test | `annals::testing`, with the feature `testing`: given/when/then, and a model checker for sagas |
//!
//! [`MemoryStore`] and [`LocalBus`] need no other software. `annals-sqlite` and `annals-postgres` are stores that
//! survive a crash, and `annals-kafka` is a bus between processes. Handlers, aggregates and services are the same for
//! every store and bus.

#![warn(missing_debug_implementations)]

extern crate self as annals;

#[macro_use]
mod base;

pub mod archive;
pub mod bus;
pub mod commit;
mod decide;
pub mod event;
mod follow;
pub mod handler;
pub mod health;
pub mod operator;
mod project;
pub mod relay;
pub mod saga;
pub mod service;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use annals_macros::Event;
#[doc(hidden)]
pub use {serde, serde_json};

pub use self::{
    archive::Archive,
    base::{
        config, json,
        name::{NAME_BYTES_MAX, NameError},
        secret,
    },
    bus::{
        Bus, BusError, Consumer, Message, Publisher,
        local::{self as local_bus, LocalBus},
    },
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Expected, Put},
    decide::{
        aggregate::{self, Aggregate, Snapshot},
        repository::{self, ExecuteError, Repository, Request},
        transaction::{self, Transaction},
        work::{self, Work, WorkError},
    },
    event::{
        Event, EventError, EventType, Metadata, NewEvent, Position, Recorded, StreamId, StreamIdError, Version,
        trace_context::{self, TraceContext},
    },
    follow::{
        checkpoint,
        consumer::{self, Group},
        parking::{self, DeadLetters},
        subscription::{self, Start, Subscription},
        worker,
    },
    handler::{Handler, HandlerError, Terminal},
    health::Health,
    operator::Operator,
    project::read_model::{self, Projection, ReadModel, Views},
    saga::{Answer, Participant, Saga, SagaState, StepError},
    service::{DrainError, Runtime, Service, StartError, recovery},
    store::{
        EventStore, LogPage, LogQuery, LostEnd, OpenWriter, Scan, StoreError, StoreStatus, WaitError,
        clock::{self, Clock},
        memory::{self, MemoryStore},
        pages,
        tail::{self, Tail},
    },
};
