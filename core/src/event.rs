//! The contents of the log, which are events in streams. Each event has a version in its stream and a position in the
//! log.

pub mod metadata;
pub mod party;
pub mod trace_context;

use std::{borrow::Cow, fmt, sync::Arc};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::{
    metadata::{Metadata, UnknownFields},
    party::{PARTY_BYTES_MAX, Party, PartyError},
};

/// The maximum length of a stream id in bytes. The length is limited because a stream id is an index key in every store
/// and a message key on every bus.
pub const STREAM_ID_BYTES_MAX: usize = 512;
/// The maximum length of a category in bytes.
pub const CATEGORY_BYTES_MAX: usize = 100;
/// The maximum size of one event's payload in bytes of JSON. The limit is below the default limits of PostgreSQL and
/// Kafka.
pub const EVENT_BYTES_MAX: usize = 900_000;

/// The name of a stream: `<category>-<id>`, such as `order-536365`.
///
/// The category consists of lower-case letters, digits, `.` and `_`, starts with a letter, and ends at the first `-`.
/// The id is any text without control characters. The whole name has at most [`STREAM_ID_BYTES_MAX`] bytes.
///
/// ```
/// use annals::StreamId;
/// let id = StreamId::new("order", "536365")?;
/// assert_eq!((id.as_str(), id.category(), id.id()), ("order-536365", "order", "536365"));
/// assert!(StreamId::new("order", "two\nlines").is_err());
/// # Ok::<(), annals::StreamIdError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StreamId(Arc<str>);

/// Why a string is not a valid stream id. Nothing was stored. Use another id for the aggregate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamIdError {
    /// The `-` between category and id is missing, or one of the two parts is empty.
    #[error("stream id {0:?} is not `<category>-<id>` with both parts given")]
    Shape(String),
    /// The category is too long, or contains a character that is not allowed in categories.
    #[error(
        "category {0:?} must be lower-case letters, digits, `.` or `_`, start with a letter, and have at most {CATEGORY_BYTES_MAX} bytes"
    )]
    Category(String),
    /// The id contains a control character, such as a newline.
    #[error("the id {id:?} has the control character U+{:04X} at byte {at}; ids are printable text", *.character as u32)]
    ControlCharacter {
        /// The id, shortened.
        id: String,
        /// The offending character.
        character: char,
        /// The byte offset of the character in the id.
        at: usize,
    },
    /// The stream id is longer than [`STREAM_ID_BYTES_MAX`].
    #[error("the stream id starting with {start:?} has {bytes} bytes; the limit is {STREAM_ID_BYTES_MAX}")]
    TooLong {
        /// The first characters of the stream id.
        start: String,
        /// The length of the whole stream id.
        bytes: usize,
    },
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}

impl StreamId {
    /// Joins a category and an id into a stream id.
    pub fn new(category: &str, id: &str) -> Result<Self, StreamIdError> {
        if category.contains('-') {
            return Err(StreamIdError::Category(shortened(category)));
        }
        Self::parse(&[category, "-", id].concat())
    }

    /// Parses `<category>-<id>`.
    pub fn parse(text: &str) -> Result<Self, StreamIdError> {
        Self::check(text)?;
        Ok(Self(text.into()))
    }

    /// Checks that the string is a valid stream id.
    pub(crate) fn check(text: &str) -> Result<(), StreamIdError> {
        if text.len() > STREAM_ID_BYTES_MAX {
            return Err(StreamIdError::TooLong { start: shortened(text), bytes: text.len() });
        }
        let Some((category, id)) = text.split_once('-') else {
            return Err(StreamIdError::Shape(shortened(text)));
        };
        if category.is_empty() || id.is_empty() {
            return Err(StreamIdError::Shape(shortened(text)));
        }
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'_';
        if category.len() > CATEGORY_BYTES_MAX
            || !category.as_bytes()[0].is_ascii_lowercase()
            || !category.bytes().all(plain)
        {
            return Err(StreamIdError::Category(shortened(category)));
        }
        if let Some((at, character)) = id.char_indices().find(|(_, c)| c.is_control()) {
            return Err(StreamIdError::ControlCharacter { id: shortened(id), character, at });
        }
        Ok(())
    }

    /// Builds a stream id from a stored string without checking the string. A row that this build would have refused to
    /// write must not stop a reader.
    pub fn from_stored(text: &str) -> Self {
        Self(text.into())
    }

    /// The full stream id, `<category>-<id>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part before the first `-`.
    pub fn category(&self) -> &str {
        self.0.split_once('-').map_or("", |(category, _)| category)
    }

    /// Returns whether the stream belongs to this category. Every reader calls this method for every event. The method
    /// therefore compares a prefix, which is faster than a search for the `-`.
    pub(crate) fn is_of(&self, category: &str) -> bool {
        self.0.strip_prefix(category).is_some_and(|rest| rest.starts_with('-')) && !category.contains('-')
    }

    /// The part after the first `-`.
    pub fn id(&self) -> &str {
        self.0.split_once('-').map_or(&*self.0, |(_, id)| id)
    }

    /// The text of the stream id as a shared pointer, for keys that outlive the borrow.
    pub fn shared(&self) -> Arc<str> {
        self.0.clone()
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}
impl TryFrom<String> for StreamId {
    type Error = StreamIdError;
    fn try_from(text: String) -> Result<Self, StreamIdError> {
        Self::parse(&text)
    }
}
impl From<StreamId> for String {
    fn from(id: StreamId) -> Self {
        id.0.to_string()
    }
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl $name {
            /// The value before the first event.
            pub const START: Self = Self(0);
            /// Returns the next value.
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}
counter!(
    /// The number of an event within its stream: 1, 2, 3, … without gaps. A stream at version 0 does not exist.
    Version
);
counter!(
    /// The number of an event within the whole log. Positions rise in log order and may have gaps.
    Position
);

/// Derives an id from its cause and an index. The same cause and index always produce the same id, so a retry finds the
/// result of the first attempt.
///
/// ```
/// let cause = uuid::Uuid::nil();
/// assert_eq!(annals::event::derived_id(cause, 1), annals::event::derived_id(cause, 1));
/// assert_ne!(annals::event::derived_id(cause, 1), annals::event::derived_id(cause, 2));
/// ```
pub fn derived_id(cause: Uuid, index: u64) -> Uuid {
    Uuid::new_v5(&cause, &index.to_be_bytes())
}

/// Derives an id from its cause and a name. The same cause and name always produce the same id.
pub fn named_id(cause: Uuid, name: &str) -> Uuid {
    Uuid::new_v5(&cause, name.as_bytes())
}

/// An event to append to a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// The id of the event, derived from its cause with [`derived_id`]. The derivation makes the id unique, so no store
    /// needs an index to enforce uniqueness.
    pub id: Uuid,
    /// The stored type name, such as `order.placed`.
    pub type_name: Cow<'static, str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The payload as JSON text, stored and returned byte for byte.
    pub data: String,
    /// What caused the event.
    pub metadata: Metadata,
}

/// An event as stored in the log.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// The position of the event in the log.
    pub position: Position,
    /// The stream of the event.
    pub stream: StreamId,
    /// The version of the event in its stream.
    pub version: Version,
    /// The id of the event.
    pub id: Uuid,
    /// The stored type name.
    pub type_name: Arc<str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The payload as JSON text, byte for byte as it was appended.
    pub data: Arc<str>,
    /// What caused the event.
    pub metadata: Metadata,
    /// When the store recorded the event, by the store's clock.
    pub recorded_at: DateTime<Utc>,
}

impl Recorded {
    /// Decodes the payload as an event of type `E`. Returns `None` for an event type that `E` skips.
    pub fn decode<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        E::decode(&self.type_name, self.schema_version, &self.data).map_err(|source| DecodeError {
            stream: self.stream.clone(),
            version: self.version,
            position: self.position,
            source,
        })
    }
}

/// An event in the log that this build cannot read, with the location of the event and the reason.
#[derive(Debug, Clone, thiserror::Error)]
#[error("event {version} of stream {stream} (position {position}): {source}")]
pub struct DecodeError {
    /// The stream of the event.
    pub stream: StreamId,
    /// The version of the event in its stream.
    pub version: Version,
    /// The position of the event in the log.
    pub position: Position,
    /// Why the event cannot be read.
    pub source: EventError,
}

/// A stored type name and its current schema version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventType {
    /// The name, such as `order.placed`. The name is stored, so never change it.
    pub name: &'static str,
    /// The schema version, which starts at 1. When the shape of the payload changes, raise the version and add an
    /// upcaster.
    pub version: i32,
}

/// A type whose values are stored or sent under a type name: events, and commands that cross a bus.
///
/// Implement this trait with `#[derive(Event)]` on an enum; see [the macro](macro@crate::Event).
pub trait Event: Sized + Send + Sync + 'static {
    /// The type names of all variants of this enum, with their current schema versions.
    const TYPES: &'static [EventType];
    /// The stored type name of this value.
    fn type_name(&self) -> &'static str;
    /// The schema version in which this value is written.
    fn schema_version(&self) -> i32;
    /// Returns the JSON text to store.
    fn encode(&self) -> Result<String, EventError>;
    /// Decodes a stored payload, after applying upcasters to older schema versions. Returns `Ok(None)` for a type that
    /// this enum skips.
    fn decode(type_name: &str, schema_version: i32, data: &str) -> Result<Option<Self>, EventError>;
}

/// Why a payload could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// The enum has no variant for this type. Add the variant, or declare `#[event(unknown = "skip")]`.
    #[error("unknown event type {type_name:?}; this build knows {}", names(.expected))]
    UnknownType {
        /// The type name that was found.
        type_name: String,
        /// The types that the enum can decode.
        expected: &'static [EventType],
    },
    /// The event was written by a newer build. Deploy that build, or wait until it is deployed.
    #[error("{type_name} has schema version {version}; this build reads versions 1 to {known}")]
    FutureVersion {
        /// The type.
        type_name: String,
        /// The schema version that was found.
        version: i32,
        /// The newest schema version that this build can read.
        known: i32,
    },
    /// The JSON does not match the type, even after the upcasters. Add an upcaster, or fix an existing one.
    #[error("{type_name} version {version} cannot be read: {reason}")]
    Undecodable {
        /// The type.
        type_name: String,
        /// The schema version that was found.
        version: i32,
        /// The part of the JSON that did not match, and its location.
        reason: String,
    },
    /// The value has no JSON form, for example because it contains a NaN, or a map whose keys are not text.
    #[error("{type_name} cannot be written as JSON: {reason}")]
    Unencodable {
        /// The type.
        type_name: String,
        /// The part of the value that has no JSON form.
        reason: String,
    },
}

fn names(types: &[EventType]) -> String {
    types.iter().map(|t| t.name).collect::<Vec<_>>().join(", ")
}

/// Encodes the events that one command produced. The ids of the events are derived from the id of the command.
pub fn encode_all<E: Event>(
    events: &[E],
    command_id: Uuid,
    first: u64,
    metadata: &Metadata,
) -> Result<Vec<NewEvent>, EventError> {
    events
        .iter()
        .zip(first..)
        .map(|(event, index)| {
            Ok(NewEvent {
                id: derived_id(command_id, index),
                type_name: Cow::Borrowed(event.type_name()),
                schema_version: event.schema_version(),
                data: event.encode()?,
                metadata: metadata.clone(),
            })
        })
        .collect()
}
