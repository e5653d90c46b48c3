//! Reads and writes rows in the format of `COPY … (FORMAT binary)`:
//! <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4>

use std::{collections::HashSet, sync::Arc};

use annals::{Metadata, Position, Recorded, StoreError, StreamId, Version, archive::Stored};
use uuid::Uuid;

use crate::read::{instant, since_2000};

/// <https://www.postgresql.org/docs/current/sql-copy.html#id-1.9.55.9.4.5>
const SIGNATURE: &[u8; 11] = b"PGCOPY\n\xff\r\n\0";

/// The length of the header before the first row: a signature of 11 bytes, the flags, and the length of the extension,
/// which is empty.
pub(crate) const HEADER_BYTES: usize = 19;

/// The columns of [`Row::recorded`].
pub(crate) const COLUMNS: &str =
    "position, stream_id, version, type, schema_version, data, recorded_at, event_id, metadata";
/// The columns that a typed replay needs.
pub(crate) const COLUMNS_TYPED: &str = "position, stream_id, version, type, schema_version, data, recorded_at";

/// Returns the position of a row, which is its first column; `None` for the trailer after the last row.
pub(crate) fn position(row: &[u8]) -> Option<i64> {
    Some(i64::from_be_bytes(row.get(6..14)?.try_into().ok()?))
}

/// Consecutive rows, without the header.
pub(crate) struct Rows<'b> {
    rest: &'b [u8],
    /// The names of event types. Events with the same type share one name, because many events have the same type.
    names: HashSet<Arc<str>>,
}

pub(crate) struct Row<'b> {
    pub(crate) position: Position,
    pub(crate) stream: &'b str,
    pub(crate) version: Version,
    pub(crate) type_name: &'b str,
    pub(crate) schema_version: i32,
    pub(crate) data: &'b str,
    since_2000: i64,
    /// The event id and the metadata, if requested.
    more: Option<(Uuid, &'b str)>,
}

impl<'b> Rows<'b> {
    pub(crate) fn new(rows: &'b [u8]) -> Self {
        Self { rest: rows, names: HashSet::new() }
    }

    pub(crate) fn next(&mut self) -> Result<Option<Row<'b>>, StoreError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        self.row().map(Some).ok_or_else(|| StoreError::Corrupt("a row of a replay has an unexpected format".into()))
    }

    fn row(&mut self) -> Option<Row<'b>> {
        let columns = i16::from_be_bytes(self.take()?);
        Some(Row {
            position: Position(i64::from_be_bytes(self.field()?.try_into().ok()?)),
            stream: self.text()?,
            version: Version(i64::from_be_bytes(self.field()?.try_into().ok()?)),
            type_name: self.text()?,
            schema_version: i32::from_be_bytes(self.field()?.try_into().ok()?),
            data: self.text()?,
            since_2000: i64::from_be_bytes(self.field()?.try_into().ok()?),
            more: if columns > 7 { Some((Uuid::from_slice(self.field()?).ok()?, self.text()?)) } else { None },
        })
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(*taken)
    }

    /// Removes and returns the bytes of the next column. A NULL column has the length -1, and no column may be NULL.
    fn field(&mut self) -> Option<&'b [u8]> {
        let length = usize::try_from(i32::from_be_bytes(self.take()?)).ok()?;
        let (field, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(field)
    }

    fn text(&mut self) -> Option<&'b str> {
        std::str::from_utf8(self.field()?).ok()
    }

    pub(crate) fn recorded(&mut self, row: &Row<'_>) -> Recorded {
        let (id, metadata) = row.more.unwrap_or_default();
        Recorded {
            position: row.position,
            stream: row.stream(),
            version: row.version,
            id,
            type_name: self.name(row.type_name),
            schema_version: row.schema_version,
            data: row.data.into(),
            metadata: Metadata::from_json(metadata),
            recorded_at: row.recorded_at(),
        }
    }

    fn name(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        let shared: Arc<str> = name.into();
        self.names.insert(shared.clone());
        shared
    }
}

impl<'b> Row<'b> {
    pub(crate) fn stored(&self) -> Stored<'b> {
        let (id, metadata) = self.more.unwrap_or_default();
        Stored {
            position: self.position,
            stream: self.stream.into(),
            version: self.version,
            id,
            type_name: self.type_name.into(),
            schema_version: self.schema_version,
            data: self.data.into(),
            metadata: metadata.into(),
            recorded_at: self.recorded_at(),
        }
    }

    pub(crate) fn stream(&self) -> StreamId {
        StreamId::from_stored(self.stream)
    }

    pub(crate) fn recorded_at(&self) -> chrono::DateTime<chrono::Utc> {
        instant(self.since_2000)
    }
}

/// Writes the header before the first row: the signature, without flags and without an extension.
pub(crate) fn begin(rows: &mut Vec<u8>) {
    rows.extend_from_slice(SIGNATURE);
    rows.extend_from_slice(&[0; HEADER_BYTES - SIGNATURE.len()]);
}

/// Writes the row of an event, with its columns in the order of `restore_events.sql`.
pub(crate) fn put(event: &Stored<'_>, rows: &mut Vec<u8>) -> Result<(), sqlx::Error> {
    const COLUMNS: i16 = 9;
    rows.extend_from_slice(&COLUMNS.to_be_bytes());
    let mut field = |bytes: &[u8]| {
        let length = i32::try_from(bytes.len()).map_err(|error| sqlx::Error::Encode(error.into()))?;
        rows.extend_from_slice(&length.to_be_bytes());
        rows.extend_from_slice(bytes);
        Ok::<_, sqlx::Error>(())
    };
    field(&event.position.0.to_be_bytes())?;
    field(event.stream.as_bytes())?;
    field(&event.version.0.to_be_bytes())?;
    field(event.id.as_bytes())?;
    field(event.type_name.as_bytes())?;
    field(&event.schema_version.to_be_bytes())?;
    field(event.data.as_bytes())?;
    field(event.metadata.as_bytes())?;
    field(&since_2000(event.recorded_at).to_be_bytes())
}

/// Writes the trailer after the last row.
pub(crate) fn end(rows: &mut Vec<u8>) {
    rows.extend_from_slice(&(-1_i16).to_be_bytes());
}
