//! The interface to a store. A store holds documents, and a log that contains the events of all streams.

pub mod clock;
pub mod memory;
pub(crate) mod names;
pub mod pages;
pub mod tail;

use std::{any::Any, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    commit::{Commit, CommitError, Committed, Document, DocumentKey},
    event::{DecodeError, Position, Recorded, StreamId, StreamIdError, Version},
    store::clock::Clock,
};

/// A durable log and a set of documents. The test suite `annals_conformance::store` defines what an implementation must
/// do.
///
/// Every method may be called from many tasks at once, and every future may be dropped at any point: a
/// [`commit`](EventStore::commit) whose future is dropped still happens as a whole or not at all.
#[async_trait]
pub trait EventStore: Any + Send + Sync {
    /// Applies a commit either completely or not at all, and returns once the commit is durable. Concurrent commits may
    /// share a round trip. If one of them fails, the others are not affected.
    ///
    /// If the process crashes before this method returns, the commit may or may not be stored. If the process crashes
    /// afterwards, the commit is stored.
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError>;

    /// Returns up to `limit` events of a stream with versions above `after`, in order.
    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError>;

    /// Returns events after position `after` in log order. Never skips past a position at which a slower writer may
    /// still commit an event.
    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError>;

    /// Returns documents by key, in the order of the keys. All documents are read from one snapshot.
    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError>;

    /// Returns up to `limit` documents of a collection, in the order that the scan defines.
    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError>;

    /// Resolves when there may be events after position `after`. The future may resolve too early, but never fails to
    /// resolve once such an event exists.
    async fn wait(&self, after: Position) -> Result<(), StoreError>;

    /// Returns the head of the log and the open transaction that readers wait for, if any.
    async fn status(&self) -> Result<StoreStatus, StoreError>;

    /// The number of the log history that this handle reads. The number changes when events that the handle has
    /// returned may be gone: at a failover, after a restore, and whenever the last event that the handle has returned
    /// is missing. Only a missing event sets [`StoreStatus::lost_end`]. After a change, everything in memory that was
    /// read before (states, checkpoints, positions) must be read again. The change makes [`wait`](EventStore::wait)
    /// resolve, and commits that were submitted before the change fail as unavailable.
    ///
    /// This method never blocks. The default suits stores that cannot lose events while they are open.
    fn history(&self) -> u64 {
        0
    }

    /// Accepts the histories up to this number on behalf of the service `by`. After the first call for a service, every
    /// commit fails as unavailable while [`history`](EventStore::history) is above the number that the service has
    /// accepted. Without this rule, a decision could be stored that is based on a log with lost events and must be
    /// undone later. A service on a bus accepts a history once the log holds everything that the service has sent, and
    /// accepts `u64::MAX` when the service stops.
    ///
    /// A store that wraps another store forwards the call. The default suits stores that cannot lose events while they
    /// are open.
    fn accept_history(&self, by: &str, history: u64) {
        _ = (by, history);
    }

    /// The clock for all times and delays in code that is built on this store. A store shared by several machines sets
    /// the clock to its own time. A store that wraps another store returns the clock of the inner store. The default is
    /// the clock of the machine.
    fn clock(&self) -> Clock {
        Clock::machine()
    }
}

impl dyn EventStore + '_ {
    /// Returns one document by key.
    pub(crate) async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, StoreError> {
        Ok(self.documents(std::slice::from_ref(key)).await?.into_iter().next().flatten())
    }
}

/// Which documents of a collection to return.
#[derive(Clone, Debug, PartialEq)]
pub enum Scan {
    /// Documents whose ids follow this id, in byte order. The first page starts after `""`.
    After(Arc<str>),
    /// Documents due by this time, earliest first.
    Due(DateTime<Utc>),
}

/// Which events of the log to return. An empty list does not filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Categories, such as `order`.
    pub categories: Vec<Arc<str>>,
    /// Type names, such as `order.placed`.
    pub types: Vec<Arc<str>>,
}

impl LogQuery {
    /// Returns a query for all events.
    pub fn all() -> Self {
        Self::default()
    }

    /// Returns a query for the events of these categories.
    pub fn categories<S: Into<Arc<str>>>(categories: impl IntoIterator<Item = S>) -> Self {
        Self { categories: categories.into_iter().map(Into::into).collect(), types: Vec::new() }
    }

    /// Returns a query for the events of these types.
    pub fn types<S: Into<Arc<str>>>(types: impl IntoIterator<Item = S>) -> Self {
        Self { types: types.into_iter().map(Into::into).collect(), categories: Vec::new() }
    }

    /// Returns whether the query includes this event.
    pub fn matches(&self, event: &Recorded) -> bool {
        (self.categories.is_empty() || self.categories.iter().any(|category| event.stream.is_of(category)))
            && (self.types.is_empty() || self.types.contains(&event.type_name))
    }
}

/// One page of the log.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// The events that match the query, in log order.
    pub events: Vec<Arc<Recorded>>,
    /// The position after which the next page begins: the position of the last event that this page examined, even if
    /// that event does not match the query. If the reader has caught up, the position equals the requested
    /// position.
    pub next: Position,
    /// Whether there may be more events to read. This is the case if the page is full, or if the page has examined as
    /// much of the log as one page may examine.
    pub more: bool,
}

/// Returns the position of the last event if the log does not reach to `position`. A position that readers cannot reach
/// yet, because an open transaction may still add events before that position, is part of the log. `status` is a status
/// of this store.
pub async fn end_before(
    store: &dyn EventStore,
    status: &StoreStatus,
    position: Position,
) -> Result<Option<Position>, StoreError> {
    let is_beyond = |status: &StoreStatus| status.head < position && status.waits_for.is_none();
    if !is_beyond(status) {
        return Ok(None);
    }
    // The open transaction may have ended while the status was read.
    let status = store.status().await?;
    Ok(is_beyond(&status).then_some(status.head))
}

/// The state of a log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// The position of the last event that a reader can see.
    pub head: Position,
    /// The open transaction that must end before readers can continue; `None` if readers do not wait.
    pub waits_for: Option<OpenWriter>,
    /// Set once this handle finds that the log has lost its most recent events. The value stays set until the process
    /// restarts.
    pub lost_end: Option<LostEnd>,
}

/// Describes the loss of events that this process has read or written. Events are lost in a failover to a lagging
/// standby, or when a database is restored to an earlier moment. Everything recorded after the missing event is gone
/// too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostEnd {
    /// The position of the missing event, which is the last event that this process knew.
    pub position: Position,
    /// The id of the missing event.
    pub event_id: Uuid,
    /// When the event was found missing.
    pub noticed_at: DateTime<Utc>,
}

impl fmt::Display for LostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { position, event_id, noticed_at } = self;
        write!(
            f,
            "the log has lost its end: event {event_id} at position {position} existed, and was found missing at \
             {noticed_at} (failover to a standby that lagged, or a restore); caches and checkpoints were read again \
             and the service goes on; \
             run `annals verify`, and compare what other systems received since with the log; restart this process to clear this"
        )
    }
}

/// An open transaction that may still add events before other events that are already committed. Readers wait for this
/// transaction, so that they skip no event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenWriter {
    /// The id of the server process that runs the transaction, so that an operator can find the transaction on the
    /// server; `None` for a prepared transaction, which has no process.
    pub pid: Option<i32>,
    /// How long ago the transaction began. If several transactions are open, this is the age of the oldest one.
    pub age: Duration,
    /// A description of all open transactions.
    pub description: String,
}

impl fmt::Display for OpenWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.description)
    }
}

/// Why a read failed. Reading again is always safe.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store cannot be reached or is overloaded; retry later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The request is invalid, for example because it contains a name that the store can never hold; retrying does not
    /// help.
    #[error("the store cannot serve this request: {0}")]
    Refused(String),
    /// The stored data is not in the format of this project's stores; retrying does not help.
    #[error("the store holds data that cannot be read: {0}")]
    Corrupt(String),
}

/// Why a wait ended without the awaited result. Waiting again is always safe.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The time limit was reached first.
    #[error("waited {limit:?} for {awaited}: {state}")]
    TimedOut {
        /// The awaited result.
        awaited: String,
        /// The time limit.
        limit: Duration,
        /// The state when the time limit was reached.
        state: String,
    },
    /// The log does not reach to the position. The position belongs to another log, or to events that the log has lost.
    #[error("position {position} is beyond the end of the log, which is at {head}")]
    BeyondEnd {
        /// The position.
        position: Position,
        /// The position of the last event in the log.
        head: Position,
    },
    /// The log holds an event that this build cannot read.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    /// The id is not valid as a part of a stream id.
    #[error(transparent)]
    Id(#[from] StreamIdError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}
