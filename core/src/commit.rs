//! A commit as a plain value, which a store applies either completely or not at all.

use std::{fmt, sync::Arc};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::{CATEGORY_BYTES_MAX, EVENT_BYTES_MAX, NewEvent, Position, StreamId, Version};

/// The maximum number of events and documents in one commit. A store writes this many rows in well under a second.
pub const COMMIT_ROWS_MAX: usize = 10_000;
/// The maximum length of a document id in bytes. The length is limited because a document id is an index key in every
/// store.
pub const DOCUMENT_ID_BYTES_MAX: usize = 1_024;
/// The maximum nesting depth of a payload or document body. This is the limit of serde_json, which every reader in this
/// project uses.
pub const NESTING_MAX: usize = 127;
/// The earliest time at which a document may be due, in seconds since 1970: 4714-11-24 BC, the start of PostgreSQL's
/// calendar.
pub const DUE_SECONDS_MIN: i64 = -210_866_803_200;
/// The maximum size of a document body in bytes of JSON.
pub const DOCUMENT_BYTES_MAX: usize = 4_000_000;

/// Appends and documents that become durable together, or not at all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Commit {
    /// Events to append, at most one entry per stream.
    pub appends: Vec<Append>,
    /// Documents to put, at most one entry per key.
    pub puts: Vec<Put>,
}

/// Events to append to one stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Append {
    /// The stream to append to.
    pub stream: StreamId,
    /// The version, or the last event, that the stream must have for the commit to succeed.
    pub expected: Expected,
    /// The events, in order. If empty, the append only checks `expected`.
    pub events: Vec<NewEvent>,
}

/// The state that a stream must have for an append to succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The stream is at exactly this version. [`Version::START`] means that the stream must not exist yet.
    Version(Version),
    /// The last event of the stream is exactly this event. A version alone is not enough after the log has lost its
    /// most recent events and has grown again, because the same version may then belong to a different event.
    Event {
        /// The version of the stream's last event.
        version: Version,
        /// The id of the stream's last event.
        id: Uuid,
    },
    /// The stream may be at any version. This suits streams in which the order of concurrent writers does not matter.
    Any,
}

impl Expected {
    /// Returns the expected version, or `None` if any version is accepted.
    pub fn version(self) -> Option<Version> {
        match self {
            Self::Version(version) | Self::Event { version, .. } => Some(version),
            Self::Any => None,
        }
    }

    /// Returns the id of the expected event, if an event is expected.
    pub fn event(self) -> Option<Uuid> {
        match self {
            Self::Event { id, .. } => Some(id),
            Self::Version(_) | Self::Any => None,
        }
    }

    /// Checks the expectation against a stream at version `actual` whose last event has the id `last`. In every store,
    /// this check and [`Put::check`] alone decide whether a commit conflicts with another writer.
    pub fn check(self, stream: &StreamId, actual: Version, last: Option<Uuid>) -> Result<(), CommitError> {
        let is_there = self.version().is_none_or(|expected| expected == actual);
        if is_there && self.event().is_none_or(|id| last == Some(id)) {
            return Ok(());
        }
        let expected = self.version().unwrap_or(actual);
        Err(CommitError::Conflict { stream: stream.clone(), expected, actual })
    }
}

/// The name of a document: a collection and an id in the collection.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DocumentKey {
    /// The collection, such as `checkpoint` or `read.orders@1`.
    pub collection: Arc<str>,
    /// The id, unique in its collection. Scans of a collection return documents in byte order of the id.
    pub id: Arc<str>,
}

impl DocumentKey {
    /// Joins a collection and an id into a key.
    pub fn new(collection: impl Into<Arc<str>>, id: impl Into<Arc<str>>) -> Self {
        Self { collection: collection.into(), id: id.into() }
    }

    /// Returns whether a store can hold a document with this key. If not, the document cannot exist.
    pub(crate) fn is_storable(&self) -> bool {
        let has_nul = self.id.contains('\0') || self.collection.contains('\0');
        self.id.len() <= DOCUMENT_ID_BYTES_MAX && self.collection.len() <= CATEGORY_BYTES_MAX * 2 && !has_nul
    }
}
impl fmt::Debug for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.collection, self.id)
    }
}
impl fmt::Display for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.collection, self.id)
    }
}

/// A document to write or remove.
#[derive(Clone, Debug, PartialEq)]
pub struct Put {
    /// The name of the document.
    pub key: DocumentKey,
    /// The version that the document must have now: 0 if the document must not exist, `None` if any version is
    /// accepted. A writer is fenced when another writer has taken over its document: the commits of the fenced writer
    /// then fail this check.
    pub expected: Option<i64>,
    /// The JSON text to store; `None` removes the document. The version of a removed document counts as 0 again.
    pub body: Option<Arc<str>>,
    /// When the document is due. [`Scan::Due`](crate::store::Scan) finds the document by this time. The time is rounded
    /// down to microseconds.
    pub due: Option<DateTime<Utc>>,
}

impl Put {
    /// Checks the expected version against `actual`, which is 0 if the document does not exist. See
    /// [`Expected::check`].
    pub fn check(&self, actual: i64) -> Result<(), CommitError> {
        match self.expected {
            Some(expected) if expected != actual => {
                Err(CommitError::DocumentConflict { key: self.key.clone(), expected, actual })
            }
            _ => Ok(()),
        }
    }
}

/// A document as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The name of the document.
    pub key: DocumentKey,
    /// The version of the document: 1 after the first put. Each further put increases the version by one.
    pub version: i64,
    /// The body as JSON text.
    pub body: Arc<str>,
    /// When the document is due.
    pub due: Option<DateTime<Utc>>,
}

/// The result of a commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// The position of the commit's last event; [`Position::START`] if the commit has no events.
    pub position: Position,
    /// The version of each appended stream after the commit, in the order of the appends.
    pub versions: Vec<Version>,
    /// When the events were recorded. A store sets this time only if it assigned consecutive positions to the events,
    /// in the order of the appends and ending at `position`. With this time, the process that committed the events need
    /// not read them back. Other stores leave the field `None`.
    pub recorded_at: Option<DateTime<Utc>>,
}

/// Why a commit failed. For every variant except [`Unknown`](CommitError::Unknown), nothing was stored.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Another writer committed to the stream first. Read the stream again and decide again.
    #[error(
        "stream {stream} is at version {actual}, not at {}",
        if .actual == .expected { "the event known here".to_owned() } else { .expected.to_string() }
    )]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// The version that the commit expected. If this version equals `actual`, the event at this version is not the
        /// expected event.
        expected: Version,
        /// The current version of the stream.
        actual: Version,
    },
    /// Another writer changed the document first. Read the document again. A worker that gets this error for its
    /// checkpoint is fenced, which means that another worker has taken over.
    #[error("document {key} is at version {actual}, not at {expected}")]
    DocumentConflict {
        /// The name of the document.
        key: DocumentKey,
        /// The version that the commit expected.
        expected: i64,
        /// The current version of the document.
        actual: i64,
    },
    /// The commit can never succeed: it is too large, has an invalid name, or has a payload that the store refuses. Do
    /// not retry.
    #[error("the commit was refused: {0}")]
    Invalid(String),
    /// The connection was lost during the commit, so the outcome is unknown. Retry with the same ids; the version check
    /// shows whether the first attempt was stored.
    #[error("the outcome of the commit is unknown: {0}")]
    Unknown(String),
    /// The store cannot be reached or is overloaded. Nothing was stored; retry later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
}

impl Commit {
    /// Returns whether the commit has neither appends nor puts.
    pub fn is_empty(&self) -> bool {
        self.appends.is_empty() && self.puts.is_empty()
    }

    /// The number of rows that a store writes for this commit.
    pub fn rows(&self) -> usize {
        self.appends.iter().map(|append| append.events.len()).sum::<usize>() + self.puts.len()
    }

    /// Checks everything that can be checked without reading a store: sizes, names, at most one entry per stream and
    /// per key, and JSON that every store accepts.
    pub fn validate(&self) -> Result<(), CommitError> {
        let invalid = |reason: String| Err(CommitError::Invalid(reason));
        if self.rows() > COMMIT_ROWS_MAX {
            return invalid(format!(
                "the commit has {} rows; the limit is {COMMIT_ROWS_MAX}: split the commit",
                self.rows()
            ));
        }
        if has_twins(self.appends.iter().map(|append| append.stream.as_str())) {
            return invalid("the commit appends to one stream twice: put the events into one append".into());
        }
        if has_twins(self.puts.iter().map(|put| (&*put.key.collection, &*put.key.id))) {
            return invalid("the commit writes one document twice: write each document once".into());
        }
        for append in &self.appends {
            if let Err(error) = StreamId::check(append.stream.as_str()) {
                return invalid(error.to_string());
            }
            for event in &append.events {
                let at = || format!("{:.100} for stream {}", event.type_name, append.stream);
                if event.type_name.contains('\0') {
                    return invalid(format!("{:?}: the type name contains NUL, which not every store accepts", at()));
                }
                if event.data.len() > EVENT_BYTES_MAX {
                    let bytes = event.data.len();
                    return invalid(format!("{} has {bytes} bytes; the limit is {EVENT_BYTES_MAX}", at()));
                }
                if let Err(reason) = check_json(&event.data) {
                    return invalid(format!("{}: {reason}", at()));
                }
            }
        }
        for put in &self.puts {
            let key = &put.key;
            let id_bytes = key.id.len();
            if !key.is_storable() {
                return invalid(format!(
                    "the name of document {:.80?} is too long ({id_bytes} bytes) or contains NUL",
                    key
                ));
            }
            if let Some(due) = put.due.filter(|due| due.timestamp() < DUE_SECONDS_MIN) {
                return invalid(format!(
                    "document {key} is due at {due}, before the year 4714 BC, which no store can hold"
                ));
            }
            if let Some(body) = &put.body {
                if body.len() > DOCUMENT_BYTES_MAX {
                    return invalid(format!(
                        "document {key} has {} bytes; the limit is {DOCUMENT_BYTES_MAX}",
                        body.len()
                    ));
                }
                if let Err(reason) = check_json(body) {
                    return invalid(format!("document {key}: {reason}"));
                }
            }
        }
        Ok(())
    }
}

fn has_twins<T: std::hash::Hash + Eq>(mut items: impl ExactSizeIterator<Item = T>) -> bool {
    let mut seen = std::collections::HashSet::new();
    items.len() > 1 && !items.all(|item| seen.insert(item))
}

/// Checks that the text is JSON that every store and every reader accepts: the nesting is within [`NESTING_MAX`], and
/// no string contains `\u0000` or half a surrogate pair. PostgreSQL accepts both escapes in a `json` value, but can
/// never return such a string as text.
pub(crate) fn check_json(text: &str) -> Result<(), String> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|error| format!("not JSON: {error}"))?;
    check_json_within(text, NESTING_MAX)
}

/// Like [`check_json`], for a string that is known to be valid JSON. The string becomes part of a larger JSON value, so
/// the caller passes a limit for its nesting.
pub(crate) fn check_json_within(text: &str, nesting_max: usize) -> Result<(), String> {
    // The parser in `check_json` skips values at any depth, but readers have a nesting limit. Only a string with more
    // brackets than the limit needs the exact computation.
    let brackets = text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    if brackets > nesting_max && nesting(text) > nesting_max {
        return Err(format!("the JSON is nested more than {nesting_max} levels deep"));
    }
    // A parser that skips a value does not check the escapes in the value either.
    check_escapes(text)
}

/// Returns the nesting depth of a valid JSON string.
fn nesting(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut deepest = 0;
    let mut in_string = false;
    let mut escaped = false;
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Checks a valid JSON string: each `\u` escape, alone or together with the next escape, must stand for a character,
/// and no escape may stand for NUL.
fn check_escapes(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        // An escape other than `\u`, such as an escaped backslash, is skipped as a whole.
        let Some(unit) = utf16_unit(&rest[at..]) else {
            rest = rest.get(at + 2..).unwrap_or("");
            continue;
        };
        rest = &rest[at + UNIT_BYTES..];
        match unit {
            0 => return Err("a string contains \\u0000, which not every store can return".into()),
            0xd800..=0xdbff if matches!(utf16_unit(rest), Some(0xdc00..=0xdfff)) => rest = &rest[UNIT_BYTES..],
            0xd800..=0xdfff => {
                return Err(format!("a string contains \\u{unit:04x}, which is half of a surrogate pair"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The length in bytes of one escape such as `\u0000`.
const UNIT_BYTES: usize = 6;

/// Parses the `\u` escape at the start of the text, if there is one.
fn utf16_unit(text: &str) -> Option<u16> {
    u16::from_str_radix(text.strip_prefix("\\u")?.get(..4)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_distinguished_from_escaped_backslashes() {
        for text in [
            r#""x\\u0000""#,
            r#""\\ud800""#,
            r#""\ud83e\udd80 \u00fc \n""#,
            r#""\\\\u0000""#,
            r#""\ufffe\uffff""#,
            "\"\u{1f980}\"",
        ] {
            assert_eq!(check_json(text), Ok(()), "{text}");
        }
        for text in [
            r#""x\u0000""#,
            r#""x\\\u0000""#,
            r#""\ud800""#,
            r#""\uDC00 ""#,
            r#""\ud800\u0041""#,
            r#""\ud800\ud800\udc00""#,
            r#""\ud800\\udc00""#,
            r#"{"\udbff":1}"#,
        ] {
            assert!(check_json(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nesting_beyond_the_limit_of_serde_json_is_refused() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for depth in [1, NESTING_MAX, NESTING_MAX + 1, 6_000] {
            let readable = serde_json::from_str::<serde_json::Value>(&deep(depth)).is_ok();
            assert_eq!(check_json(&deep(depth)).is_ok(), readable, "{depth}");
        }
        assert!(check_json(&format!(r#"{{"a":"\"{}"}}"#, "[".repeat(200))).is_ok());
    }
}
