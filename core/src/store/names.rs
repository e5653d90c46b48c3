//! The names of a log. With these names, consumers distinguish the messages of one log from the messages of another.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    commit::{Commit, CommitError, Document, DocumentKey, Put},
    event::Position,
    store::{EventStore, StoreError},
};

/// The maximum number of names of a log. Each restore of the database adds one name. A log that reaches this maximum
/// has a fault, because something adds names in a loop.
const SEGMENTS_MAX: usize = 1_000;

/// A part of the log with its own name. The messages of this part carry the name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The name, unique among all logs.
    pub name: Arc<str>,
    /// The first position of the segment. The segment ends before the first position of the next segment.
    pub first: Position,
    /// The last position of the restored log, if a restore of the database was the reason to start the segment. Between
    /// `restored_to` and `first`, the log contains only events that were recovered from topics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_to: Option<Position>,
    /// The names of other logs whose messages were in the topics when a service started without the history that the
    /// topics hold (`annals recover --anew`). The service does not treat messages of these logs as its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passes_over: Vec<Arc<str>>,
}

impl Segment {
    /// Creates a segment with this name that starts at this position.
    pub fn new(name: Arc<str>, first: Position) -> Self {
        Self { name, first, restored_to: None, passes_over: Vec::new() }
    }
}

/// The names of a log, in the order of the segments. Each restore of the database adds a name. After a restore,
/// positions are assigned again, and without a new name consumers would mistake new messages for messages that they
/// have already seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogNames(Vec<Segment>);

/// The body of the document that holds the names. If there is only one segment, the body is just the name of the
/// segment.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredNames {
    Name(Arc<str>),
    Segments(Vec<Segment>),
}

/// Why a segment was not added to the names of a log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// The segment does not begin after the last segment.
    #[error(
        "log {} begins at position {}, and log {} at {}: one must begin after the other",
        last.name, last.first, next.name, next.first
    )]
    NotAfter {
        /// The last segment of the log.
        last: Box<Segment>,
        /// The segment that was not added.
        next: Box<Segment>,
    },
    /// The log already has the maximum number of names.
    #[error("the log has {SEGMENTS_MAX} names already")]
    TooMany,
}

impl LogNames {
    /// Returns the names of a log. A log has no name before its first relay has run.
    pub async fn of(store: &dyn EventStore) -> Result<Self, StoreError> {
        Ok(Self::with_version(store).await?.0)
    }

    /// Returns the names of a log, with the version of the document that holds them.
    pub async fn with_version(store: &dyn EventStore) -> Result<(Self, i64), StoreError> {
        let key = Self::key();
        let Some(found) = store.document(&key).await? else { return Ok((Self::default(), 0)) };
        let stored = serde_json::from_str(&found.body)
            .map_err(|error| StoreError::Corrupt(format!("document {key}: {error}")))?;
        let segments = match stored {
            StoredNames::Name(name) => vec![Segment::new(name, Position::START)],
            StoredNames::Segments(segments) => segments,
        };
        Ok((Self(segments), found.version))
    }

    /// Returns the names of a log. If the log has no name yet, generates and stores the first name.
    pub(crate) async fn drawn(store: &dyn EventStore) -> Result<Self, StoreError> {
        loop {
            let names = Self::of(store).await?;
            if !names.0.is_empty() {
                return Ok(names);
            }
            let body = serde_json::to_string(&StoredNames::Name(Self::draw())).unwrap_or_default();
            let put = Put { key: Self::key(), expected: Some(0), body: Some(body.into()), due: None };
            match store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await {
                // Another relay may have stored a name first.
                Ok(_) | Err(CommitError::DocumentConflict { .. }) => {}
                Err(error) => return Err(StoreError::Unavailable(error.to_string())),
            }
        }
    }

    /// Returns a new random name that no log has.
    pub fn draw() -> Arc<str> {
        format!("{:016x}", uuid::Uuid::new_v4().as_u64_pair().0).into()
    }

    fn key() -> DocumentKey {
        DocumentKey::new("log", "name")
    }

    /// Returns the segments of the log, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.0
    }

    /// Adds a segment.
    ///
    /// # Errors
    /// Fails if the segment does not start after all other segments, or if there are too many segments.
    pub fn push(&mut self, segment: Segment) -> Result<(), SegmentError> {
        if let Some(last) = self.0.last().filter(|last| segment.first <= last.first) {
            return Err(SegmentError::NotAfter { last: Box::new(last.clone()), next: Box::new(segment) });
        }
        if self.0.len() >= SEGMENTS_MAX {
            return Err(SegmentError::TooMany);
        }
        self.0.push(segment);
        Ok(())
    }

    /// Returns the document that holds the names.
    pub fn document(&self, version: i64) -> Document {
        let stored = match &self.0[..] {
            [only] if *only == Segment::new(only.name.clone(), Position::START) => StoredNames::Name(only.name.clone()),
            segments => StoredNames::Segments(segments.to_vec()),
        };
        let body = serde_json::to_string(&stored).unwrap_or_default().into();
        Document { key: Self::key(), version, body, due: None }
    }

    /// Returns whether this is one of the log's names.
    pub fn knows(&self, name: &str) -> bool {
        self.0.iter().any(|segment| *segment.name == *name)
    }

    /// Returns whether this is the name of another log whose messages are ignored, because a service of this log
    /// started without the history that the topics hold.
    pub fn passes_over(&self, name: &str) -> bool {
        self.0.iter().flat_map(|segment| &segment.passes_over).any(|passed| **passed == *name)
    }

    /// Returns whether the event at a position may have been lost when a database was restored.
    pub fn may_have_lost(&self, position: Position) -> bool {
        let lost =
            |segment: &Segment| segment.restored_to.is_some_and(|end| end < position && position < segment.first);
        self.0.iter().any(lost)
    }

    /// Returns the labels that the messages of a lane carry.
    pub(crate) fn labels(&self, lane: u32) -> Labels {
        Labels(self.0.iter().map(|segment| (segment.first, label(lane, &segment.name))).collect())
    }

    pub(crate) fn label(&self, lane: u32, position: Position) -> Arc<str> {
        let segment = self.0.iter().rfind(|segment| segment.first <= position).or(self.0.first());
        segment.map_or_else(|| label(lane, ""), |segment| label(lane, &segment.name))
    }
}

/// The labels of a lane. Each label is valid from its position on.
pub(crate) struct Labels(Vec<(Position, Arc<str>)>);

impl Labels {
    /// Returns the label for the event at this position, which usually is the last label.
    pub fn of(&self, position: Position) -> Option<&Arc<str>> {
        let found = self.0.iter().rfind(|(first, _)| *first <= position).or(self.0.first());
        found.map(|(_, label)| label)
    }
}

fn label(lane: u32, log: &str) -> Arc<str> {
    format!("{lane}@{log}").into()
}

/// Returns the name of the log from which a message comes, if a relay has sent the message.
pub fn log_of(lane: &str) -> Option<&str> {
    let (number, log) = lane.split_once('@')?;
    (number.parse::<u32>().is_ok() && !log.is_empty()).then_some(log)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn segment(name: &str, first: i64, restored_to: Option<i64>) -> Segment {
        Segment { restored_to: restored_to.map(Position), ..Segment::new(name.into(), Position(first)) }
    }

    #[test]
    fn position_has_the_name_of_its_segment() {
        let names = LogNames(vec![segment("a", 0, None), segment("b", 100, Some(40))]);
        let labels = names.labels(3);
        for (position, name) in [(1, "3@a"), (99, "3@a"), (100, "3@b"), (5_000, "3@b")] {
            assert_eq!(&**labels.of(Position(position)).unwrap(), name);
            assert_eq!(&*names.label(3, Position(position)), name);
        }
        assert_eq!([40, 41, 99, 100].map(|at| names.may_have_lost(Position(at))), [false, true, true, false]);
        assert!(names.knows("a") && names.knows("b") && !names.knows("c"));
    }

    #[test]
    fn single_name_is_stored_in_the_format_of_earlier_builds() {
        let mut names = LogNames(vec![segment("a", 0, None)]);
        assert_eq!(&*names.document(1).body, "\"a\"");
        names.push(segment("b", 9, Some(4))).unwrap();
        let stored: StoredNames = serde_json::from_str(&names.document(2).body).unwrap();
        assert!(matches!(stored, StoredNames::Segments(segments) if segments == names.0));
        assert!(names.push(segment("c", 9, None)).is_err(), "the segment begins where another segment begins");
    }

    #[test]
    fn only_log_attributes_of_a_relay_name_a_log() {
        assert_eq!(log_of("0@5b1c0e"), Some("5b1c0e"));
        assert_eq!(["", "0", "fast@lane", "0@", "@a"].map(log_of), [None; 5]);
    }
}
