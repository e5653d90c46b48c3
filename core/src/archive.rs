//! A second interface to a store, for tools that verify an entire store or move its contents. Services do not use this
//! interface.

pub mod line;

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

/// A store that lists its contents, and accepts the contents of another store.
#[async_trait]
pub trait Archive: EventStore {
    /// Returns the streams whose names follow `after` in byte order, at most `limit` of them. The first page starts
    /// after `""`. An event is hidden from readers of the log while an older transaction may still commit events before
    /// it. The result also includes streams with such events.
    async fn streams(&self, after: &str, limit: usize) -> Result<Vec<StreamSummary>, StoreError>;

    /// Returns the names of all collections of documents, in byte order.
    async fn collections(&self) -> Result<Vec<Arc<str>>, StoreError>;

    /// Writes the contents of another store unchanged: events with their positions, ids and times, and documents with
    /// their versions. Either everything is written or nothing. Nothing is written if a position, or a version in a
    /// stream, is already in use. A document replaces the document with the same key.
    ///
    /// This method checks no expected versions. The caller must ensure that no other process writes to the store.
    async fn restore(&self, contents: Contents) -> Result<(), CommitError>;
}

/// The collection of the single document that records an import's progress. The field `complete` of this document
/// becomes true at the end of the import.
pub const IMPORT: &str = "import";

/// Returns the key of the document that records an import's progress.
pub fn import_key() -> DocumentKey {
    DocumentKey::new(IMPORT, "progress")
}

/// Returns whether an import into the store is incomplete. While an import runs, checkpoints may refer to events that
/// are not imported yet.
pub(crate) async fn is_half_imported(store: &dyn EventStore) -> Result<bool, StoreError> {
    #[derive(Deserialize)]
    struct Import {
        #[serde(default)]
        complete: bool,
    }
    let Some(document) = store.document(&import_key()).await? else { return Ok(false) };
    // A document that does not parse was not written by an import.
    Ok(serde_json::from_str::<Import>(&document.body).is_ok_and(|import| !import.complete))
}

/// The state of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct StreamSummary {
    /// The id of the stream.
    pub stream: StreamId,
    /// The version of the stream, which is the number of its events.
    pub version: Version,
    /// The position of the stream's last event.
    pub position: Position,
    /// When the stream's first event was recorded.
    pub first_at: DateTime<Utc>,
    /// When the stream's last event was recorded.
    pub last_at: DateTime<Utc>,
}

/// A part of a store's contents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Events, in log order.
    pub events: Vec<Stored<'static>>,
    /// Documents, each at most once.
    pub documents: Vec<Document>,
}

/// An event exactly as stored, byte for byte. Tools hash and move events in this form, because a [`Recorded`] drops all
/// metadata that the framework does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored<'a> {
    /// The position of the event in the log.
    pub position: Position,
    /// The stream of the event.
    pub stream: Cow<'a, str>,
    /// The version of the event in its stream.
    pub version: Version,
    /// The id of the event.
    pub id: Uuid,
    /// The stored type name.
    pub type_name: Cow<'a, str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The payload.
    pub data: Cow<'a, str>,
    /// The metadata, as JSON.
    pub metadata: Cow<'a, str>,
    /// When the store recorded the event.
    pub recorded_at: DateTime<Utc>,
}

/// Converts a recorded event. The result contains only the metadata that the framework knows.
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
    /// Returns the event in the form that services read.
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

    /// Returns the event with owned copies of borrowed text.
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
