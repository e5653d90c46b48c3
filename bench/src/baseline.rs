//! The baseline: writes the same rows to the same tables with plain sqlx, in batches, without decisions or checks.

use std::{path::Path, time::Instant};

use sqlx::{
    Connection, QueryBuilder, Sqlite, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use crate::{Failure, Figure};

/// The number of rows per statement and per transaction.
const BATCH: usize = 500;

type StoredEvent = (i64, String, i64, String, String, i64, String, String, i64);
type DocumentRow = (String, String, i64, String, Option<i64>);

/// Reads the rows of the database at `path`, and writes them to a new database in the same folder.
pub async fn rewrite(path: &Path, workload: &str) -> Result<Figure, Failure> {
    let mut source = SqliteConnection::connect_with(&options(path)).await?;
    let events: Vec<StoredEvent> =
        sqlx::query_as("SELECT * FROM events ORDER BY position").fetch_all(&mut source).await?;
    let documents: Vec<DocumentRow> = sqlx::query_as("SELECT * FROM documents").fetch_all(&mut source).await?;
    let schema: Vec<(String,)> =
        sqlx::query_as("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND type IN ('table', 'index')")
            .fetch_all(&mut source)
            .await?;
    let mut target =
        SqliteConnection::connect_with(&options(&path.with_extension("plain.db")).create_if_missing(true)).await?;
    for (sql,) in schema {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut target).await?;
    }
    let rows = events.len() + documents.len();
    let started = Instant::now();
    for batch in events.chunks(BATCH) {
        let mut insert = QueryBuilder::<Sqlite>::new("INSERT INTO events ");
        insert.push_values(batch, |mut row, event| {
            let (position, stream, version, id, kind, schema, data, metadata, at) = event;
            row.push_bind(position).push_bind(stream).push_bind(version).push_bind(id).push_bind(kind);
            row.push_bind(schema).push_bind(data).push_bind(metadata).push_bind(at);
        });
        insert.build().execute(&mut target).await?;
    }
    for batch in documents.chunks(BATCH) {
        let mut insert = QueryBuilder::<Sqlite>::new("INSERT INTO documents ");
        insert.push_values(batch, |mut row, (collection, id, version, body, due)| {
            row.push_bind(collection).push_bind(id).push_bind(version).push_bind(body).push_bind(due);
        });
        insert.build().execute(&mut target).await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    target.close().await?;
    let rows_per_second = rows as f64 / seconds;
    Ok(Figure {
        workload: workload.to_owned(),
        store: "plain sqlx",
        per_second: rows_per_second,
        rows_per_second,
        p50_ms: None,
        p99_ms: None,
        commits_per_op: None,
        rows_per_op: None,
    })
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "10000")
}
