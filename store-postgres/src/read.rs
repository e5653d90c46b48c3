//! Reads documents, and converts rows to values. A row inserted by hand must never stop a reader, so a malformed value
//! is read as the nearest valid value.

use std::sync::Arc;

use annals::{Document, DocumentKey, Metadata, Position, Recorded, Scan, StoreError, StreamId, Version};
use chrono::{DateTime, Utc};
use sqlx::{Row, postgres::PgRow};

use crate::{error::read_error, readers::Readers, statements::Statements};

/// The maximum number of attempts at a read. A read fails on a connection that died while it was idle, and all idle
/// connections may have died.
pub(crate) const READS_MAX: u32 = 10;
const MICROSECONDS_TO_2000: i64 = 946_684_800_000_000;
/// The range of a `timestamptz`, in seconds since 1970: from 4714-11-24 BC to the end of 294276 AD.
const TIME_SECONDS: std::ops::RangeInclusive<i64> = -210_866_803_200..=9_224_318_015_999;

/// Reads on one of the sessions. If the session has died, the read is repeated, which is always safe. The read is not
/// repeated for longer than a read waits for a session, because the caller must learn that the server is unreachable.
macro_rules! read {
    ($readers:expr, |$reader:ident| $read:expr) => {{
        let mut reads = 1;
        let started = tokio::time::Instant::now();
        loop {
            let outcome = async {
                let mut $reader = $readers.get().await?;
                let outcome = async { $read.await }.await;
                if outcome.as_ref().is_err_and($crate::error::is_lost) {
                    $reader.give_up();
                }
                outcome
            };
            match outcome.await {
                Err(error)
                    if reads < $crate::read::READS_MAX
                        && started.elapsed().as_secs() < $crate::readers::WAIT_SECONDS_MAX
                        && $crate::error::is_lost(&error) =>
                {
                    reads += 1;
                }
                outcome => break outcome.map_err($crate::error::read_error),
            }
        }
    }};
}
pub(crate) use read;

pub(crate) async fn documents(
    (readers, statements): (&Readers, &Statements),
    keys: &[DocumentKey],
) -> Result<Vec<Option<Document>>, StoreError> {
    let mut found = vec![None; keys.len()];
    // Other keys can be neither stored nor looked up.
    let asked: Vec<usize> =
        (0..keys.len()).filter(|index| is_text(&keys[*index].collection) && is_text(&keys[*index].id)).collect();
    if asked.is_empty() {
        return Ok(found);
    }
    let rows = read!(readers, |reader| statements
        .documents
        .query()
        .bind(asked.iter().map(|index| &*keys[*index].collection).collect::<Vec<_>>())
        .bind(asked.iter().map(|index| &*keys[*index].id).collect::<Vec<_>>())
        .fetch_all(reader.connection()?))?;
    for row in rows {
        let number: i64 = row.try_get(0).map_err(read_error)?;
        let asked = usize::try_from(number - 1).ok().and_then(|number| asked.get(number));
        let place = asked.and_then(|index| found.get_mut(*index));
        if let Some(place) = place {
            *place = Some(document(&row).map_err(read_error)?);
        }
    }
    Ok(found)
}

pub(crate) async fn scan(
    (readers, statements): (&Readers, &Statements),
    collection: &str,
    scan: &Scan,
    limit: usize,
) -> Result<Vec<Document>, StoreError> {
    if !is_text(collection) {
        return Ok(Vec::new());
    }
    let rows = match scan {
        // No id contains a NUL, so the ids after `a` followed by a NUL are the same as the ids after `a`.
        Scan::After(id) => read!(readers, |reader| statements
            .scan_after
            .query()
            .bind(collection)
            .bind(id.split('\0').next())
            .bind(bound(limit))
            .fetch_all(reader.connection()?))?,
        Scan::Due(by) => read!(readers, |reader| statements
            .scan_due
            .query()
            .bind(collection)
            .bind(storable(*by))
            .bind(bound(limit))
            .fetch_all(reader.connection()?))?,
    };
    rows.iter().map(document).collect::<Result<_, _>>().map_err(read_error)
}

/// Returns whether PostgreSQL accepts the value as text. No row contains a value that PostgreSQL does not accept, so no
/// query is needed for such a value.
pub(crate) fn is_text(text: &str) -> bool {
    !text.contains('\0')
}

/// Converts a limit for a statement. PostgreSQL refuses a negative limit, so a limit that is too large for `bigint`
/// must not wrap around.
pub(crate) fn bound(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// Returns the time in a form that a `timestamptz` can hold: within the range of that type, and rounded down to the
/// microsecond. sqlx would round towards the year 2000.
pub(crate) fn storable(time: DateTime<Utc>) -> DateTime<Utc> {
    let time = DateTime::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time);
    let seconds = time.timestamp();
    let within = seconds.clamp(*TIME_SECONDS.start(), *TIME_SECONDS.end());
    if within == seconds { time } else { DateTime::from_timestamp(within, 0).unwrap_or(time) }
}

pub(crate) fn recorded(row: &PgRow) -> Result<Recorded, sqlx::Error> {
    Ok(Recorded {
        position: Position(row.try_get(0)?),
        stream: StreamId::from_stored(row.try_get(1)?),
        version: Version(row.try_get(2)?),
        id: row.try_get(3)?,
        type_name: row.try_get::<&str, _>(4)?.into(),
        schema_version: row.try_get(5)?,
        // The server transfers `json` as text.
        data: row.try_get_unchecked::<&str, _>(6)?.into(),
        metadata: Metadata::from_json(row.try_get_unchecked(7)?),
        recorded_at: time(row, 8)?.unwrap_or_default(),
    })
}

fn document(row: &PgRow) -> Result<Document, sqlx::Error> {
    let text = |column: usize| row.try_get::<&str, _>(column).map(Arc::from);
    Ok(Document {
        key: DocumentKey::new(text(1)?, text(2)?),
        version: row.try_get(3)?,
        body: row.try_get_unchecked::<&str, _>(4)?.into(),
        due: time(row, 5)?,
    })
}

pub(crate) fn time(row: &PgRow, column: usize) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    Ok(row.try_get_unchecked::<Option<i64>, _>(column)?.map(instant))
}

/// Converts microseconds since 2000 to a time. The conversion is not left to sqlx, because `infinity`, and years
/// outside chrono's range, must not stop a reader.
pub(crate) fn instant(since_2000: i64) -> DateTime<Utc> {
    let since_1970 = since_2000.saturating_add(MICROSECONDS_TO_2000);
    let bound = if since_1970 < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    DateTime::from_timestamp_micros(since_1970).unwrap_or(bound)
}

/// Converts a time to microseconds since 2000. This is the inverse of [`instant`]: the two times that stand for the
/// infinities become infinities again.
pub(crate) fn since_2000(time: DateTime<Utc>) -> i64 {
    if time == DateTime::<Utc>::MIN_UTC {
        return i64::MIN;
    }
    if time == DateTime::<Utc>::MAX_UTC {
        return i64::MAX;
    }
    storable(time).timestamp_micros() - MICROSECONDS_TO_2000
}
