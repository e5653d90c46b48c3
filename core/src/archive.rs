//! A second port to a store, for those who look it over or move it as a whole. Services have no use for it.

use std::sync::Arc;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use crate::{
    commit::{CommitError, Document},
    event::{Position, Recorded, StreamId, Version},
    store::{EventStore, StoreError},
};

/// A store that tells what is in it, and takes in what another one held.
#[async_trait]
pub trait Archive: EventStore {
    /// Streams in byte order of their names, those after `after`; start with `""`. As of now: also streams whose events a
    /// reader of the log does not see yet, because an older transaction may still come before them.
    async fn streams(&self, after: &str, limit: usize) -> Result<Vec<StreamSummary>, StoreError>;

    /// The names of all collections of documents, in byte order.
    async fn collections(&self) -> Result<Vec<Arc<str>>, StoreError>;

    /// Writes what another store held, as it was: events with their positions, ids and times, documents with their
    /// versions. All of it or nothing, and nothing where a position or a place in a stream is taken already. A document
    /// replaces the one that has its key.
    ///
    /// Checks no version, and is for a store that nobody else writes to.
    async fn restore(&self, contents: Contents) -> Result<(), CommitError>;
}

/// Where a stream stands.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamSummary {
    /// Which.
    pub stream: StreamId,
    /// How many events it has.
    pub version: Version,
    /// Where its last event stands in the log.
    pub position: Position,
    /// When its first event was recorded.
    pub first_at: DateTime<Utc>,
    /// When its last event was recorded.
    pub last_at: DateTime<Utc>,
}

/// A part of what a store held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Events, in log order.
    pub events: Vec<Arc<Recorded>>,
    /// Documents, each once.
    pub documents: Vec<Document>,
}
