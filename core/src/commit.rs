//! The commit as a value: what a store applies whole or not at all.

use std::{fmt, sync::Arc};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::event::{CATEGORY_BYTES_MAX, EVENT_BYTES_MAX, NewEvent, Position, StreamId, Version};

/// The most events and documents that one commit may carry: what a store writes in well under a second.
pub const COMMIT_ROWS_MAX: usize = 10_000;
/// The longest document id, in bytes: it is an index key in every store.
pub const DOCUMENT_ID_BYTES_MAX: usize = 1_024;
/// The deepest nesting of a payload or body: what serde_json reads, and so what every reader of ours can.
pub const NESTING_MAX: usize = 127;
/// The earliest time at which a document may be due, in seconds since 1970: 4714-11-24 BC, where PostgreSQL's calendar begins.
pub const DUE_SECONDS_MIN: i64 = -210_866_803_200;
/// The largest document body, in bytes of JSON.
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
    /// The stream.
    pub stream: StreamId,
    /// Where the stream must stand for the commit to hold.
    pub expected: Expected,
    /// The events, in order. May be empty: then only `expected` is checked.
    pub events: Vec<NewEvent>,
}

/// Where a stream must stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// At exactly this version; [`Version::START`] for a stream that must not exist yet.
    Version(Version),
    /// At exactly this event: a version alone may be another event's by now, where the log has lost its end and grown again.
    Event {
        /// The version of the last event of the stream,
        version: Version,
        /// and its id.
        id: Uuid,
    },
    /// Anywhere: for streams where order among writers means nothing.
    Any,
}

impl Expected {
    /// The version, unless any will do.
    pub fn version(self) -> Option<Version> {
        match self {
            Self::Version(version) | Self::Event { version, .. } => Some(version),
            Self::Any => None,
        }
    }

    /// The id of the event, where it matters.
    pub fn event(self) -> Option<Uuid> {
        match self {
            Self::Event { id, .. } => Some(id),
            Self::Version(_) | Self::Any => None,
        }
    }

    /// Whether a stream that stands at `actual`, with `last` as the id of its last event, is where it must be: with
    /// [`Put::check`], all that decides if a commit holds, in every store.
    pub fn check(self, stream: &StreamId, actual: Version, last: Option<Uuid>) -> Result<(), CommitError> {
        let is_there = self.version().is_none_or(|expected| expected == actual);
        if is_there && self.event().is_none_or(|id| last == Some(id)) {
            return Ok(());
        }
        let expected = self.version().unwrap_or(actual);
        Err(CommitError::Conflict { stream: stream.clone(), expected, actual })
    }
}

/// The name of a document: a collection and an id in it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DocumentKey {
    /// Such as `checkpoint` or `read.orders@1`.
    pub collection: Arc<str>,
    /// Unique in the collection; collections are scanned in byte order of it.
    pub id: Arc<str>,
}

impl DocumentKey {
    /// A key.
    pub fn new(collection: impl Into<Arc<str>>, id: impl Into<Arc<str>>) -> Self {
        Self { collection: collection.into(), id: id.into() }
    }

    /// Whether a store can hold a document of this name; there never is one of another.
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
    /// Which.
    pub key: DocumentKey,
    /// The version it must have now: 0 for one that must not exist, `None` for whichever. A writer that was fenced off
    /// fails here.
    pub expected: Option<i64>,
    /// The JSON text to store; `None` removes the document. A removed document counts as version 0 again.
    pub body: Option<Arc<str>>,
    /// When it wants attention; [`Scan::Due`](crate::store::Scan) finds it by this. Kept to the microsecond, rounded down.
    pub due: Option<DateTime<Utc>>,
}

impl Put {
    /// Whether a document of version `actual` (0: there is none) has the version it must have. As [`Expected::check`].
    pub fn check(&self, actual: i64) -> Result<(), CommitError> {
        match self.expected {
            Some(expected) if expected != actual => {
                Err(CommitError::DocumentConflict { key: self.key.clone(), expected, actual })
            }
            _ => Ok(()),
        }
    }
}

/// A document as the store holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// Which.
    pub key: DocumentKey,
    /// From 1, one more with each put.
    pub version: i64,
    /// Its JSON text.
    pub body: Arc<str>,
    /// When it wants attention.
    pub due: Option<DateTime<Utc>>,
}

/// What a commit came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    /// The position of its last event; [`Position::START`] if it had none.
    pub position: Position,
    /// The version that each of its appends left its stream at, in the order of the appends.
    pub versions: Vec<Version>,
    /// When its events were recorded, from a store that gave them one run of positions, in the order of the appends, that
    /// ends at `position`: then nobody in this process needs to read them back. `None` from others.
    pub recorded_at: Option<DateTime<Utc>>,
}

/// Why a commit does not hold. In every case but [`Unknown`](CommitError::Unknown), nothing of it was stored.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// Another writer was first. Read the stream again and decide again.
    #[error(
        "stream {stream} stands at version {actual}, not at {}",
        if .actual == .expected { "the event known here".to_owned() } else { .expected.to_string() }
    )]
    Conflict {
        /// The stream.
        stream: StreamId,
        /// Where the commit wanted it. The same as `actual`, if another event than the one known has this version.
        expected: Version,
        /// Where it is.
        actual: Version,
    },
    /// Another writer put the document first. Read it again; a worker that meets this on its checkpoint was fenced off.
    #[error("document {key} stands at version {actual}, not at {expected}")]
    DocumentConflict {
        /// The document.
        key: DocumentKey,
        /// The version the commit wanted.
        expected: i64,
        /// The version it has.
        actual: i64,
    },
    /// The commit can never hold: too large, a name that is not one, a payload the store refuses. Do not retry.
    #[error("the commit was refused: {0}")]
    Invalid(String),
    /// The connection was lost while the commit was under way: it holds, or it does not. Retry with the same ids; the
    /// version check tells which.
    #[error("it is not known whether the commit holds: {0}")]
    Unknown(String),
    /// The store cannot be reached or is overloaded. Nothing was stored; retry later.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
}

impl Commit {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.appends.is_empty() && self.puts.is_empty()
    }

    /// How many rows a store writes for it.
    pub fn rows(&self) -> usize {
        self.appends.iter().map(|append| append.events.len()).sum::<usize>() + self.puts.len()
    }

    /// Checks what no store needs to look up: sizes, names, one entry per stream and per key, JSON that every store takes.
    pub fn validate(&self) -> Result<(), CommitError> {
        let invalid = |reason: String| Err(CommitError::Invalid(reason));
        if self.rows() > COMMIT_ROWS_MAX {
            return invalid(format!("it has {} rows; the limit is {COMMIT_ROWS_MAX}: split it", self.rows()));
        }
        if has_twins(self.appends.iter().map(|append| append.stream.as_str())) {
            return invalid("a stream stands in it twice: put its events into one append".into());
        }
        if has_twins(self.puts.iter().map(|put| (&*put.key.collection, &*put.key.id))) {
            return invalid("a document stands in it twice".into());
        }
        for append in &self.appends {
            if let Err(error) = StreamId::check(append.stream.as_str()) {
                return invalid(error.to_string());
            }
            for event in &append.events {
                let at = || format!("{:.100} for stream {}", event.type_name, append.stream);
                if event.type_name.contains('\0') {
                    return invalid(format!("{:?}: a type name has a NUL, which not every store takes", at()));
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
            let (key, id_bytes) = (&put.key, put.key.id.len());
            if !key.is_storable() {
                return invalid(format!(
                    "the name of document {:.80?} is too long ({id_bytes} bytes) or has a NUL",
                    key
                ));
            }
            if let Some(due) = put.due.filter(|due| due.timestamp() < DUE_SECONDS_MIN) {
                return invalid(format!(
                    "document {key} is due at {due}, before the year 4714 BC: no store holds that"
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

/// Whether the text is JSON that every store and every reader takes: nesting within [`NESTING_MAX`], and neither
/// `\u0000` nor half a surrogate pair, which PostgreSQL stores as `json` but can never give back as text.
pub(crate) fn check_json(text: &str) -> Result<(), String> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|error| format!("not JSON: {error}"))?;
    check_json_within(text, NESTING_MAX)
}

/// As [`check_json`], of a text that is known to be JSON and becomes a part of another: so its nesting has a limit of its own.
pub(crate) fn check_json_within(text: &str, nesting_max: usize) -> Result<(), String> {
    // Skipping over a value, as above, takes any depth; reading it does not. Few texts have brackets enough to look closer.
    let brackets = text.bytes().filter(|byte| matches!(byte, b'[' | b'{')).count();
    if brackets > nesting_max && nesting(text) > nesting_max {
        return Err(format!("it is nested more than {nesting_max} deep"));
    }
    // Skipping does not look at these either.
    check_escapes(text)
}

/// How deep the brackets of a valid JSON text go.
fn nesting(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
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

/// Whether each `\u` escape of a valid JSON text, alone or with the one that follows, is a character, and none is NUL.
fn check_escapes(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        // A backslash that is itself escaped is skipped with its escape.
        let Some(unit) = utf16_unit(&rest[at..]) else {
            rest = rest.get(at + 2..).unwrap_or("");
            continue;
        };
        rest = &rest[at + UNIT_BYTES..];
        match unit {
            0 => return Err("a string has \\u0000, which not every store can give back".into()),
            0xd800..=0xdbff if matches!(utf16_unit(rest), Some(0xdc00..=0xdfff)) => rest = &rest[UNIT_BYTES..],
            0xd800..=0xdfff => return Err(format!("a string has \\u{unit:04x}, which is half a character")),
            _ => {}
        }
    }
    Ok(())
}

/// How long `\u0000` is.
const UNIT_BYTES: usize = 6;

/// The number of the `\u` escape that a text starts with.
fn utf16_unit(text: &str) -> Option<u16> {
    u16::from_str_radix(text.strip_prefix("\\u")?.get(..4)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_told_from_escaped_backslashes() {
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
    fn nesting_beyond_what_serde_json_reads_is_refused() {
        let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        for depth in [1, NESTING_MAX, NESTING_MAX + 1, 6_000] {
            let readable = serde_json::from_str::<serde_json::Value>(&deep(depth)).is_ok();
            assert_eq!(check_json(&deep(depth)).is_ok(), readable, "{depth}");
        }
        assert!(check_json(&format!(r#"{{"a":"\"{}"}}"#, "[".repeat(200))).is_ok());
    }
}
