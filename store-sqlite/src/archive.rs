//! Operations on the whole store: lists its contents, and restores the contents of another store.

use std::sync::Arc;

use annals::{
    CommitError, Document, LogQuery, Position, StoreError, StreamId, Version,
    archive::{Archive, Contents, Stored, StreamSummary},
};
use async_trait::async_trait;
use sqlx::{Connection, Row, sqlite::SqliteRow};

use crate::{
    SqliteStore,
    error::{commit_error, read_error, write_error},
    group::{DocumentRow, EventRow, EventText},
    read::{self, bound, text, time},
    rows,
};

#[async_trait]
impl Archive for SqliteStore {
    async fn streams(&self, after: &str, limit: usize) -> Result<Vec<StreamSummary>, StoreError> {
        let query = sqlx::query(include_str!("sql/streams.sql")).bind(after).bind(bound(limit));
        let rows = query.fetch_all(&self.shared.readers).await.map_err(read_error)?;
        rows.iter().map(summary).collect::<Result<_, _>>().map_err(read_error)
    }

    async fn collections(&self) -> Result<Vec<Arc<str>>, StoreError> {
        let query = sqlx::query(include_str!("sql/collections.sql"));
        let rows = query.fetch_all(&self.shared.readers).await.map_err(read_error)?;
        rows.iter().map(|row| text(row, 0).map(Arc::from)).collect::<Result<_, _>>().map_err(read_error)
    }

    async fn restore(&self, contents: Contents) -> Result<(), CommitError> {
        let failed = |error: sqlx::Error| match &error {
            sqlx::Error::Database(error) if error.is_unique_violation() => CommitError::Invalid(error.to_string()),
            _ => write_error(&error),
        };
        let mut connection = self.shared.database.writer().await.map_err(failed)?;
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let events = contents.events.into_iter().map(event_row).collect();
        rows::append_events(&mut transaction, events).await.map_err(failed)?;
        let documents = contents.documents.into_iter().map(document_row).collect();
        rows::put_documents(&mut transaction, documents).await.map_err(failed)?;
        transaction.commit().await.map_err(|error| commit_error(&error))?;
        // An error does not matter: the writes are committed, and SQLite recovers a file that was not closed.
        connection.close().await.ok();
        Ok(())
    }
}

impl SqliteStore {
    /// Reads the log like [`read_log`](annals::EventStore::read_log), but returns each event byte for byte as in the
    /// file. Returns the position after which the next page begins.
    pub async fn read_stored(
        &self,
        query: &LogQuery,
        after: Position,
        limit: usize,
        take: impl FnMut(Stored<'_>) + Send,
    ) -> Result<Position, StoreError> {
        read::log(&self.shared.readers, query, after, limit, take).await.map(|(next, _)| next)
    }
}

fn summary(row: &SqliteRow) -> Result<StreamSummary, sqlx::Error> {
    Ok(StreamSummary {
        stream: StreamId::from_stored(&text(row, 0)?),
        version: Version(row.try_get_unchecked(1)?),
        position: Position(row.try_get_unchecked(2)?),
        first_at: time(row.try_get_unchecked(3)?),
        last_at: time(row.try_get_unchecked(4)?),
    })
}

fn event_row(event: Stored<'static>) -> (EventRow, i64) {
    let text = EventText {
        id: event.id.hyphenated().to_string(),
        type_name: event.type_name,
        schema_version: event.schema_version,
        data: event.data.into_owned(),
        metadata: event.metadata.into_owned(),
    };
    let row = EventRow { position: event.position.0, stream: event.stream.into(), version: event.version.0, text };
    (row, event.recorded_at.timestamp_micros())
}

fn document_row(document: Document) -> (annals::DocumentKey, DocumentRow) {
    let due = document.due.map(|due| due.timestamp_micros());
    (document.key, DocumentRow { version: document.version, body: Some(document.body), due })
}
