//! The parts of an event that are verified, and how faults name an event.

use annals::{Archive, LogQuery, Position, Recorded, archive::Stored};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{failure::Failure, stream_key::stream_key};

/// The hash of everything that a store keeps about an event.
pub(super) type Digest = [u8; 32];

/// Hashes an event. The length of each string is hashed before the string, so that two different events never hash the
/// same bytes.
fn digest(event: &Stored<'_>) -> Digest {
    let mut bytes = Vec::with_capacity(256 + event.data.len());
    for number in
        [event.position.0, event.version.0, i64::from(event.schema_version), event.recorded_at.timestamp_micros()]
    {
        bytes.extend_from_slice(&number.to_be_bytes());
    }
    bytes.extend_from_slice(event.id.as_bytes());
    for text in [&event.stream, &event.type_name, &event.data, &event.metadata] {
        bytes.extend_from_slice(&(text.len() as u64).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    *blake3::hash(&bytes).as_bytes()
}

/// The parts of an event that are verified, prepared in parallel with the pass over the log.
pub(super) struct CheckedEvent {
    pub position: i64,
    pub stream: Box<str>,
    pub version: i64,
    pub id: Uuid,
    /// See [`stream_key`].
    pub key: u128,
    /// The hash of the event; zero if there are no seals.
    pub digest: Digest,
    pub unreadable: Option<String>,
    /// The whole event, if it belongs to a saga's stream.
    pub of_saga: Option<Box<Recorded>>,
}

impl CheckedEvent {
    pub fn of(event: &Stored<'_>, sealed: bool) -> Self {
        let is_of_saga = event.stream.starts_with("saga.");
        Self {
            position: event.position.0,
            stream: event.stream.as_ref().into(),
            version: event.version.0,
            id: event.id,
            key: stream_key(&event.stream),
            digest: if sealed { digest(event) } else { Digest::default() },
            unreadable: serde_json::from_str::<&RawValue>(&event.data).err().map(|error| error.to_string()),
            of_saga: is_of_saga.then(|| Box::new(event.recorded())),
        }
    }

    pub fn place(&self) -> String {
        at(self.position, &self.stream, self.version)
    }
}

/// Describes where an event is.
pub(super) fn place(event: &Recorded) -> String {
    at(event.position.0, event.stream.as_str(), event.version.0)
}

pub(super) fn at(position: i64, stream: &str, version: i64) -> String {
    format!("position {position} ({stream} v{version})")
}

/// Describes the event at a position.
pub(super) async fn place_at(archive: &dyn Archive, position: i64) -> Result<String, Failure> {
    let page = archive.read_log(&LogQuery::all(), Position(position - 1), 1).await?;
    let found = page.events.first().filter(|event| event.position.0 == position);
    Ok(found.map_or_else(|| format!("position {position}"), |event| place(event)))
}
