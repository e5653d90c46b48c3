//! The port to a store: the log, the streams in it, and the documents beside it.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    clock::Clock,
    commit::{Commit, CommitError, Committed, Document, DocumentKey},
    event::{Position, Recorded, StreamId, Version},
};

/// A durable log with documents beside it. `annals_tests::store` is the suite that says whether an implementation is one.
///
/// Every method may be called from many tasks at once, and every future may be dropped at any point: a dropped
/// [`commit`](EventStore::commit) still happens whole or not at all.
#[async_trait]
pub trait EventStore: Send + Sync + 'static {
    /// Applies a commit whole or not at all, and returns once it is durable. Concurrent commits may share a round trip;
    /// a failing one takes no other with it.
    ///
    /// Crash before it returns: it holds or it does not. Crash after: it holds.
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError>;

    /// Up to `limit` events of a stream with versions above `after`, in order.
    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError>;

    /// Events in log order after `after`. Never passes an event that a slower writer may still commit.
    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError>;

    /// Documents by key, in the order of the keys, as of one moment.
    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError>;

    /// Documents of a collection, in order, up to `limit`.
    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError>;

    /// Resolves when there may be events after `after`; may resolve early, never stays asleep past one.
    async fn wait(&self, after: Position) -> Result<(), StoreError>;

    /// Where the log stands, and what its readers wait for.
    async fn status(&self) -> Result<StoreStatus, StoreError>;

    /// The number of the history that this handle reads. It changes when events that the handle has shown may be gone: at a
    /// failover, after a restore, and whenever the last event shown is missing. [`StoreStatus::lost_end`] is set only in the
    /// last case. After a change, everything in memory that was read before (states, checkpoints, positions) must be read
    /// again; [`wait`](EventStore::wait) wakes up, and commits that were handed over before fail as unavailable.
    ///
    /// Never blocks. The default is for stores that cannot lose events while they are open.
    fn history(&self) -> u64 {
        0
    }

    /// The clock that everything on this store waits by. A store that several machines share keeps it at its own time; a store
    /// around another one gives that one's clock. The default is the clock of the machine.
    fn clock(&self) -> Clock {
        Clock::machine()
    }
}

impl dyn EventStore + '_ {
    /// One document by key.
    pub(crate) async fn document(&self, key: &DocumentKey) -> Result<Option<Document>, StoreError> {
        Ok(self.documents(std::slice::from_ref(key)).await?.into_iter().next().flatten())
    }
}

/// Which documents of a collection to give.
#[derive(Clone, Debug, PartialEq)]
pub enum Scan {
    /// Ids above this one, in byte order; start with `""`.
    After(Arc<str>),
    /// Those due by then, earliest first.
    Due(DateTime<Utc>),
}

/// Which events of the log to give. Empty lists give all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Categories, such as `order`.
    pub categories: Vec<Arc<str>>,
    /// Type names, such as `order.placed`.
    pub types: Vec<Arc<str>>,
}

impl LogQuery {
    /// Every event.
    pub fn all() -> Self {
        Self::default()
    }

    /// Events of these categories.
    pub fn categories<S: Into<Arc<str>>>(categories: impl IntoIterator<Item = S>) -> Self {
        Self { categories: categories.into_iter().map(Into::into).collect(), types: Vec::new() }
    }

    /// Events of these types.
    pub fn types<S: Into<Arc<str>>>(types: impl IntoIterator<Item = S>) -> Self {
        Self { types: types.into_iter().map(Into::into).collect(), categories: Vec::new() }
    }

    /// Whether it gives this event.
    pub fn matches(&self, event: &Recorded) -> bool {
        (self.categories.is_empty() || self.categories.iter().any(|category| event.stream.is_of(category)))
            && (self.types.is_empty() || self.types.contains(&event.type_name))
    }
}

/// One page of the log.
#[derive(Clone, Debug, Default)]
pub struct LogPage {
    /// The events that the query gives, in log order.
    pub events: Vec<Arc<Recorded>>,
    /// Read on from here: past everything this page looked at, also what the query left out. Equal to the position asked
    /// for when the reader has caught up.
    pub next: Position,
    /// Whether it ended although there may be more to read: it is full, or has looked at as much of the log as one page may.
    pub more: bool,
}

/// Where a log stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStatus {
    /// The position of the last event that a reader can see.
    pub head: Position,
    /// What readers wait for before they go on; `None` when they wait for nothing.
    pub waits_for: Option<OpenWriter>,
    /// Set once the log has lost its end under this handle, until the process restarts.
    pub lost_end: Option<LostEnd>,
}

/// A log that lacks events which this process has read or written: a failover to a standby that lagged, or a restore to an
/// earlier moment. Everything recorded after the event is gone too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostEnd {
    /// The last event that was known: its position,
    pub position: Position,
    /// and its id.
    pub event_id: Uuid,
    /// When its absence was noticed.
    pub noticed_at: DateTime<Utc>,
}

impl fmt::Display for LostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { position, event_id, noticed_at } = self;
        write!(
            f,
            "the log has lost its end: event {event_id} at position {position} was there, and was missing at {noticed_at} \
             (failover to a standby that lagged, or a restore); caches and checkpoints were read again and the service goes on; \
             run `annals verify`, and compare what other systems received since with the log; restart this process to clear this"
        )
    }
}

/// A transaction that may still write events before those that readers have not come to yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenWriter {
    /// Its process on the server, for who asks there; `None` for a prepared transaction, which has none.
    pub pid: Option<i32>,
    /// How long ago it began. Of several, this is the oldest.
    pub age: Duration,
    /// All of them in words.
    pub description: String,
}

impl fmt::Display for OpenWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.description)
    }
}

/// Why a read gave nothing. Reading again is always safe.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached or is overloaded; retry later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The question is at fault, such as a name that the store can never hold; retrying does not help.
    #[error("the store cannot be asked for that: {0}")]
    Refused(String),
    /// What was read is not what a store of ours holds; retrying does not help.
    #[error("the store holds something that cannot be read: {0}")]
    Corrupt(String),
}
