//! Decides the outcomes of a group of commits in memory, one commit after another, from the versions before the group.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use annals::{Append, Commit, CommitError, Committed, DocumentKey, Expected, Position, Put, StreamId, Version};
use uuid::Uuid;

/// A commit in the form in which the writer receives it. The caller prepares as much of the commit as possible, because
/// callers run in parallel, and the writer does not.
pub(crate) struct Prepared {
    appends: Vec<PreparedAppend>,
    puts: Vec<Put>,
    /// The number of rows that the commit adds to a group.
    pub(crate) rows: usize,
    /// The number of payload bytes that the commit adds to a group.
    pub(crate) bytes: usize,
}

struct PreparedAppend {
    stream: StreamId,
    expected: Expected,
    events: Vec<EventText>,
}

/// The columns of an event that do not depend on its place in the log.
pub(crate) struct EventText {
    pub(crate) id: String,
    pub(crate) type_name: Cow<'static, str>,
    pub(crate) schema_version: i32,
    pub(crate) data: String,
    pub(crate) metadata: String,
}

impl From<Commit> for Prepared {
    fn from(commit: Commit) -> Self {
        let rows = commit.rows();
        let appended = commit.appends.iter().flat_map(|append| &append.events).map(|event| event.data.len());
        let put = commit.puts.iter().filter_map(|put| put.body.as_ref()).map(|body| body.len());
        let bytes = appended.chain(put).sum();
        Self { appends: commit.appends.into_iter().map(PreparedAppend::from).collect(), puts: commit.puts, rows, bytes }
    }
}

impl From<Append> for PreparedAppend {
    fn from(append: Append) -> Self {
        let text = |event: annals::NewEvent| EventText {
            id: event.id.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()).to_owned(),
            type_name: event.type_name,
            schema_version: event.schema_version,
            data: event.data,
            metadata: event.metadata.to_json(),
        };
        Self { stream: append.stream, expected: append.expected, events: append.events.into_iter().map(text).collect() }
    }
}

/// An event with its position and version.
pub(crate) struct EventRow {
    pub(crate) position: i64,
    pub(crate) stream: Arc<str>,
    pub(crate) version: i64,
    pub(crate) text: EventText,
}

/// The state of a document after the group is written. A document without a body is removed.
pub(crate) struct DocumentRow {
    pub(crate) version: i64,
    pub(crate) body: Option<Arc<str>>,
    pub(crate) due: Option<i64>,
}

/// The versions of the streams and documents that a group touches. Each commit that succeeds advances these versions.
#[derive(Default)]
pub(crate) struct Ledger {
    pub(crate) head: i64,
    /// The version of each stream, and the id of its last event.
    pub(crate) streams: HashMap<StreamId, (i64, Option<Uuid>)>,
    pub(crate) documents: HashMap<DocumentKey, i64>,
    /// The events to write, in log order.
    pub(crate) events: Vec<EventRow>,
    /// The documents to write, in the order of the table. Only the last state of each document is written.
    pub(crate) rows: BTreeMap<DocumentKey, DocumentRow>,
}

/// Returns the streams that a group touches, each of them once.
pub(crate) fn streams_of(group: &[Prepared]) -> Vec<StreamId> {
    unique(group.iter().flat_map(|commit| &commit.appends).map(|append| &append.stream))
}

/// Returns the documents that a group touches, each of them once.
pub(crate) fn documents_of(group: &[Prepared]) -> Vec<DocumentKey> {
    unique(group.iter().flat_map(|commit| &commit.puts).map(|put| &put.key))
}

fn unique<'a, T: Clone + Eq + std::hash::Hash + 'a>(items: impl Iterator<Item = &'a T>) -> Vec<T> {
    let mut seen = std::collections::HashSet::new();
    items.filter(|item| seen.insert(*item)).cloned().collect()
}

impl Ledger {
    /// Adds the whole commit to the group, or nothing of it.
    pub(crate) fn decide(&mut self, commit: Prepared) -> Result<Committed, CommitError> {
        self.check(&commit)?;
        let mut committed = Committed::default();
        for append in commit.appends {
            let (standing, last) = self.streams.entry(append.stream.clone()).or_default();
            if let Some(text) = append.events.last() {
                *last = text.id.parse().ok();
            }
            for text in append.events {
                self.head += 1;
                *standing += 1;
                committed.position = Position(self.head);
                let position = self.head;
                let version = *standing;
                self.events.push(EventRow { position, stream: append.stream.shared(), version, text });
            }
            committed.versions.push(Version(*standing));
        }
        for Put { key, body, due, .. } in commit.puts {
            let standing = self.documents.entry(key.clone()).or_default();
            *standing = if body.is_some() { *standing + 1 } else { 0 };
            let due = due.map(|due| due.timestamp_micros());
            self.rows.insert(key, DocumentRow { version: *standing, body, due });
        }
        Ok(committed)
    }

    fn check(&self, commit: &Prepared) -> Result<(), CommitError> {
        // Only a row that was written by hand can have the highest possible number.
        let full = |what: String| CommitError::Unavailable(format!("{what} has reached the largest possible number"));
        let appended = commit.appends.iter().map(|append| append.events.len()).sum::<usize>() as i64;
        if self.head.checked_add(appended).is_none() {
            return Err(full("the log".into()));
        }
        for PreparedAppend { stream, expected, events } in &commit.appends {
            let (actual, last) = self.streams.get(stream).copied().unwrap_or_default();
            expected.check(stream, Version(actual), last)?;
            if actual.checked_add(events.len() as i64).is_none() {
                return Err(full(format!("stream {stream}")));
            }
        }
        for put in &commit.puts {
            let actual = self.documents.get(&put.key).copied().unwrap_or(0);
            put.check(actual)?;
            if actual == i64::MAX {
                return Err(full(format!("document {}", put.key)));
            }
        }
        Ok(())
    }
}
