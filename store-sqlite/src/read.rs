//! Reads the file, and converts rows to values. A row inserted by hand must never stop a reader, so a malformed value
//! is read as the nearest valid value.

use std::{borrow::Cow, sync::Arc};

use annals::{
    Document, DocumentKey, LogQuery, Position, Recorded, Scan, StoreError, StreamId, Version, archive::Stored,
    event::named_id,
};
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use sqlx::{
    Row, Sqlite,
    query::Query,
    sqlite::{SqliteArguments, SqlitePool, SqliteRow},
};
use uuid::Uuid;

use crate::{error::read_error, writer::keys_json};

/// The maximum number of events that one page examines if a query leaves most events out. This takes some tens of
/// milliseconds.
const PAGE_EVENTS_MAX: usize = 10_000;
/// A page of the log ends after this many bytes of payload, regardless of the limit on events.
const PAGE_BYTES_MAX: usize = 16 << 20;

pub(crate) async fn head(readers: &SqlitePool) -> Result<Position, StoreError> {
    let head: i64 = sqlx::query_scalar(include_str!("sql/head.sql")).fetch_one(readers).await.map_err(read_error)?;
    Ok(Position(head))
}

pub(crate) async fn stream(
    readers: &SqlitePool,
    stream: &StreamId,
    after: Version,
    limit: usize,
) -> Result<Vec<Recorded>, StoreError> {
    let query = sqlx::query(include_str!("sql/read_stream.sql")).bind(stream.as_str()).bind(after.0).bind(bound(limit));
    let rows = query.fetch(readers);
    rows.and_then(async |row| stored(&row).map(|stored| stored.recorded())).try_collect().await.map_err(read_error)
}

/// Passes each event of a page to `take`. Returns the position after which the next page begins, and whether there may
/// be more events.
pub(crate) async fn log(
    readers: &SqlitePool,
    query: &LogQuery,
    after: Position,
    limit: usize,
    take: impl FnMut(Stored<'_>) + Send,
) -> Result<(Position, bool), StoreError> {
    if limit == 0 {
        return Ok((after, false));
    }
    if *query == LogQuery::all() {
        let query = sqlx::query(include_str!("sql/read_log.sql")).bind(after.0).bind(bound(limit));
        return page(readers, query, after, limit, after, take).await;
    }
    // The end of the page is read by a separate statement, before the events. This is safe, because the log only grows:
    // the events up to this position stay the same.
    let looks_at = bound(limit.max(PAGE_EVENTS_MAX));
    let until: Option<i64> = sqlx::query_scalar(include_str!("sql/read_log_until.sql"))
        .bind(after.0)
        .bind(looks_at)
        .fetch_one(readers)
        .await
        .map_err(read_error)?;
    let Some(until) = until else {
        return Ok((after, false));
    };
    let names = |names: &[Arc<str>]| (!names.is_empty()).then(|| serde_json::json!(names).to_string());
    let query = sqlx::query(include_str!("sql/read_log_where.sql"))
        .bind(after.0)
        .bind(until)
        .bind(names(&query.categories))
        .bind(names(&query.types))
        .bind(bound(limit));
    let (next, more) = page(readers, query, after, limit, Position(until), take).await?;
    // Positions are dense, except where rows were inserted by hand, so the difference between the two positions is the
    // number of events that were examined.
    Ok((next, more || until.saturating_sub(after.0.max(0)) >= looks_at))
}

/// Reads a page. A full page ends at its last event; any other page ends at `until`.
async fn page(
    readers: &SqlitePool,
    query: Query<'_, Sqlite, SqliteArguments>,
    after: Position,
    limit: usize,
    until: Position,
    mut take: impl FnMut(Stored<'_>) + Send,
) -> Result<(Position, bool), StoreError> {
    let mut events = 0;
    let mut bytes = 0;
    let mut next = after;
    let mut rows = query.fetch(readers);
    while let Some(row) = rows.try_next().await.map_err(read_error)? {
        let event = stored(&row).map_err(read_error)?;
        bytes += event.data.len();
        events += 1;
        next = event.position;
        take(event);
        if events == limit || bytes >= PAGE_BYTES_MAX {
            return Ok((next, true));
        }
    }
    Ok((next.max(until), false))
}

pub(crate) async fn documents(readers: &SqlitePool, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
    let mut found = vec![None; keys.len()];
    if keys.is_empty() {
        return Ok(found);
    }
    let query = sqlx::query(include_str!("sql/documents.sql")).bind(keys_json(keys.iter()));
    for row in query.fetch_all(readers).await.map_err(read_error)? {
        let index: i64 = row.try_get_unchecked(0).map_err(read_error)?;
        let place = usize::try_from(index).ok().and_then(|index| found.get_mut(index));
        if let Some(place) = place {
            *place = Some(document(&row).map_err(read_error)?);
        }
    }
    Ok(found)
}

pub(crate) async fn scan(
    readers: &SqlitePool,
    collection: &str,
    scan: &Scan,
    limit: usize,
) -> Result<Vec<Document>, StoreError> {
    let query = match scan {
        Scan::After(id) => sqlx::query(include_str!("sql/scan_after.sql")).bind(collection).bind(id.clone()),
        Scan::Due(by) => sqlx::query(include_str!("sql/scan_due.sql")).bind(collection).bind(by.timestamp_micros()),
    };
    let rows = query.bind(bound(limit)).fetch(readers);
    rows.and_then(async |row| document(&row)).try_collect().await.map_err(read_error)
}

/// Converts a limit for a statement. SQLite treats a negative limit as no limit, so a limit that is too large for 64
/// bits must not wrap around.
pub(crate) fn bound(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn stored(row: &SqliteRow) -> Result<Stored<'_>, sqlx::Error> {
    Ok(Stored {
        position: Position(row.try_get_unchecked(0)?),
        stream: text(row, 1)?,
        version: Version(row.try_get_unchecked(2)?),
        id: event_id(&text(row, 3)?),
        type_name: text(row, 4)?,
        schema_version: schema_version(row.try_get_unchecked(5)?),
        data: text(row, 6)?,
        metadata: text(row, 7)?,
        recorded_at: time(row.try_get_unchecked(8)?),
    })
}

fn document(row: &SqliteRow) -> Result<Document, sqlx::Error> {
    let due: Option<i64> = row.try_get_unchecked(5)?;
    Ok(Document {
        key: DocumentKey::new(text(row, 1)?, text(row, 2)?),
        version: row.try_get_unchecked(3)?,
        body: text(row, 4)?.into(),
        due: due.map(time),
    })
}

/// Reads a text column. The text need not be UTF-8, because SQLite accepts any bytes as text.
pub(crate) fn text(row: &SqliteRow, column: usize) -> Result<Cow<'_, str>, sqlx::Error> {
    Ok(String::from_utf8_lossy(row.try_get_unchecked(column)?))
}

/// Converts the id of an event. An id that is not a UUID is mapped to a UUID. Equal ids give equal UUIDs, and different
/// ids give different UUIDs.
fn event_id(text: &str) -> Uuid {
    Uuid::try_parse(text).unwrap_or_else(|_| named_id(Uuid::nil(), text))
}

/// Converts a schema version. A number that is too large becomes the largest version, because no build knows such a
/// version anyway.
fn schema_version(stored: i64) -> i32 {
    i32::try_from(stored).unwrap_or(i32::MAX)
}

pub(crate) fn time(microseconds: i64) -> DateTime<Utc> {
    let bound = if microseconds < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    DateTime::from_timestamp_micros(microseconds).unwrap_or(bound)
}
