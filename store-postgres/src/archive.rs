//! Operations on the whole store: lists its contents, and restores the contents of another store.

use std::sync::Arc;

use annals::{
    CommitError, Document, Position, StoreError, StreamId, Version,
    archive::{Archive, Contents, Stored, StreamSummary},
};
use async_trait::async_trait;
use sqlx::{Connection, PgConnection, Row, postgres::PgRow};

use crate::{
    PostgresStore, copied,
    error::{end_error, read_error, write_error},
    open::Purpose,
    read::{bound, read, storable, time},
};

/// The number of bytes of rows that are sent to the server at a time.
const COPIED_BYTES: usize = 256 << 10;

#[async_trait]
impl Archive for PostgresStore {
    async fn streams(&self, after: &str, limit: usize) -> Result<Vec<StreamSummary>, StoreError> {
        let (readers, statements) = self.reading();
        let rows = read!(readers, |reader| statements
            .streams
            .query()
            .bind(after)
            .bind(bound(limit))
            .fetch_all(reader.connection()?))?;
        rows.iter().map(summary).collect::<Result<_, _>>().map_err(read_error)
    }

    async fn collections(&self) -> Result<Vec<Arc<str>>, StoreError> {
        let (readers, statements) = self.reading();
        let names: Vec<String> =
            read!(readers, |reader| statements.collections.scalar().fetch_all(reader.connection()?))?;
        Ok(names.into_iter().map(Arc::from).collect())
    }

    async fn restore(&self, contents: Contents) -> Result<(), CommitError> {
        let failed = |error: sqlx::Error| match &error {
            sqlx::Error::Database(error) if error.is_unique_violation() => CommitError::Invalid(error.to_string()),
            _ => write_error(&error),
        };
        let (_, mut connection) = self.shared.database.connect(Purpose::Write).await.map_err(failed)?;
        // The connection is used for nothing else, so closing the connection ends the transaction in any case.
        self.shared.database.begin(&mut connection, Purpose::Write).await.map_err(failed)?;
        self.copy_in(&mut connection, &contents.events).await.map_err(failed)?;
        self.put_in(&mut connection, &contents.documents).await.map_err(failed)?;
        // The sequence is advanced in the same transaction, because readers ignore positions that were not drawn from
        // the sequence.
        self.shared.database.statements.advance.query().execute(&mut connection).await.map_err(failed)?;
        sqlx::raw_sql("COMMIT").execute(&mut connection).await.map_err(|error| end_error(&error))?;
        connection.close().await.ok();
        Ok(())
    }
}

impl PostgresStore {
    async fn copy_in(&self, connection: &mut PgConnection, events: &[Stored<'static>]) -> Result<(), sqlx::Error> {
        if events.is_empty() {
            return Ok(());
        }
        let statement = self.shared.database.statements.restore_events.as_str();
        let mut copy = connection.copy_in_raw(statement).await?;
        let mut rows = Vec::with_capacity(COPIED_BYTES * 2);
        copied::begin(&mut rows);
        for event in events {
            copied::put(event, &mut rows)?;
            if rows.len() >= COPIED_BYTES {
                copy.send(&*rows).await?;
                rows.clear();
            }
        }
        copied::end(&mut rows);
        copy.send(&*rows).await?;
        copy.finish().await.map(drop)
    }

    async fn put_in(&self, connection: &mut PgConnection, documents: &[Document]) -> Result<(), sqlx::Error> {
        if documents.is_empty() {
            return Ok(());
        }
        self.shared
            .database
            .statements
            .restore_documents
            .query()
            .bind(documents.iter().map(|document| &*document.key.collection).collect::<Vec<_>>())
            .bind(documents.iter().map(|document| &*document.key.id).collect::<Vec<_>>())
            .bind(documents.iter().map(|document| document.version).collect::<Vec<_>>())
            .bind(documents.iter().map(|document| &*document.body).collect::<Vec<_>>())
            .bind(documents.iter().map(|document| document.due.map(storable)).collect::<Vec<_>>())
            .execute(connection)
            .await
            .map(drop)
    }
}

fn summary(row: &PgRow) -> Result<StreamSummary, sqlx::Error> {
    Ok(StreamSummary {
        stream: StreamId::from_stored(row.try_get(0)?),
        version: Version(row.try_get(1)?),
        position: Position(row.try_get(2)?),
        first_at: time(row, 3)?.unwrap_or_default(),
        last_at: time(row, 4)?.unwrap_or_default(),
    })
}
