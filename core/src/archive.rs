//! A second port to a store, for those who look it over or move it as a whole. Services have no use for it.

use std::{borrow::Cow, sync::Arc};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    commit::{CommitError, Document, DocumentKey},
    event::{Metadata, Position, Recorded, StreamId, Version},
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

/// The collection of the one document by which an import says how far it is. Its field `complete` is true at the end.
pub const IMPORT: &str = "import";

/// The key of that document.
pub fn import_key() -> DocumentKey {
    DocumentKey::new(IMPORT, "progress")
}

/// Whether a store is still to be filled by an import: its checkpoints stand further on than its log.
pub(crate) async fn is_half_imported(store: &dyn EventStore) -> Result<bool, StoreError> {
    #[derive(Deserialize)]
    struct Import {
        #[serde(default)]
        complete: bool,
    }
    let Some(document) = store.document(&import_key()).await? else { return Ok(false) };
    // One that nobody can read was not written by an import.
    Ok(serde_json::from_str::<Import>(&document.body).is_ok_and(|import| !import.complete))
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
    pub events: Vec<Stored<'static>>,
    /// Documents, each once.
    pub documents: Vec<Document>,
}

/// An event byte for byte as a store has it: what is hashed, and moved. A [`Recorded`] of it leaves out what its metadata may
/// say beyond what the framework knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored<'a> {
    /// Its place in the log.
    pub position: Position,
    /// Its stream.
    pub stream: Cow<'a, str>,
    /// Its place in the stream.
    pub version: Version,
    /// Its id.
    pub id: Uuid,
    /// The stored type name.
    pub type_name: Cow<'a, str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The payload.
    pub data: Cow<'a, str>,
    /// Who caused it, as JSON.
    pub metadata: Cow<'a, str>,
    /// When the store took it.
    pub recorded_at: DateTime<Utc>,
}

/// With the metadata that the framework knows.
impl<'a> From<&'a Recorded> for Stored<'a> {
    fn from(event: &'a Recorded) -> Self {
        Self {
            position: event.position,
            stream: event.stream.as_str().into(),
            version: event.version,
            id: event.id,
            type_name: (&*event.type_name).into(),
            schema_version: event.schema_version,
            data: (&*event.data).into(),
            metadata: event.metadata.to_json().into(),
            recorded_at: event.recorded_at,
        }
    }
}

impl Stored<'_> {
    /// As services see it.
    pub fn recorded(&self) -> Recorded {
        Recorded {
            position: self.position,
            stream: StreamId::from_stored(&self.stream),
            version: self.version,
            id: self.id,
            type_name: (&*self.type_name).into(),
            schema_version: self.schema_version,
            data: (&*self.data).into(),
            metadata: Metadata::from_json(&self.metadata),
            recorded_at: self.recorded_at,
        }
    }

    /// With what it borrowed.
    pub fn into_owned(self) -> Stored<'static> {
        Stored {
            stream: self.stream.into_owned().into(),
            type_name: self.type_name.into_owned().into(),
            data: self.data.into_owned().into(),
            metadata: self.metadata.into_owned().into(),
            position: self.position,
            version: self.version,
            id: self.id,
            schema_version: self.schema_version,
            recorded_at: self.recorded_at,
        }
    }
}
