//! The port to a bus: messages with CloudEvents attributes, published and consumed in order per key.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::event::{DecodeError, Event, EventError, Metadata, Position, Recorded, StreamId, Version, named_id};

/// The input of a [`Handler`](crate::Handler): an event of the log, or an event or command from the bus. The attributes
/// are those of CloudEvents 1.0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// The id of the message, unique and the same on each delivery.
    pub id: Uuid,
    /// The type name, such as `order.placed`.
    pub type_name: Arc<str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The service that the message comes from.
    pub source: Arc<str>,
    /// The stream that the message is about.
    pub subject: Arc<str>,
    /// The ordering key: messages with the same key are handled in order. The stream id of an event, or the saga's
    /// stream id of a command.
    pub key: Arc<str>,
    /// JSON text, byte for byte as it was appended.
    pub data: Arc<str>,
    /// What caused the message.
    pub metadata: Metadata,
    /// When the event was recorded.
    pub time: DateTime<Utc>,
    /// The position in the log that the message comes from.
    pub position: Position,
    /// The version in the stream; [`Version::START`] for a command.
    pub version: Version,
    /// The lane of the relay that sent the message, together with the log that the relay read. Messages of one source
    /// and lane arrive in the order of their positions, so a consumer that has seen a higher position has seen this
    /// message. `None` where that does not hold: the message was not sent by a relay, or was redriven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<Arc<str>>,
    /// Further attributes, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extensions: BTreeMap<String, String>,
}

impl Message {
    /// The message that carries an event of the log.
    pub fn of(event: &Recorded, source: &Arc<str>) -> Self {
        Self {
            id: event.id,
            type_name: event.type_name.clone(),
            schema_version: event.schema_version,
            source: source.clone(),
            subject: event.stream.shared(),
            key: event.stream.shared(),
            data: event.data.clone(),
            metadata: event.metadata.clone(),
            time: event.recorded_at,
            position: event.position,
            version: event.version,
            lane: None,
            extensions: BTreeMap::new(),
        }
    }

    /// Decodes the payload as an event of type `E`. Returns `None` for a type that `E` is declared to skip.
    pub fn decode<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        E::decode(&self.type_name, self.schema_version, &self.data).map_err(|source| self.undecodable(source))
    }

    /// Returns an error that names this message as undecodable.
    pub fn undecodable(&self, source: EventError) -> DecodeError {
        DecodeError {
            stream: StreamId::from_stored(&self.subject),
            version: self.version,
            position: self.position,
            source,
        }
    }

    /// The metadata for the effects of this message.
    pub fn effects(&self) -> Metadata {
        self.metadata.caused_by(self.id)
    }
}

/// One partition of a topic, in one incarnation of the topic: a topic that was deleted and created again starts over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Partition {
    /// The topic, such as `inventory.commands`.
    pub topic: Arc<str>,
    /// The number of the partition, from 0.
    pub number: u32,
    /// Changes when the topic is wiped or the local bus restarts: offsets of another incarnation are meaningless.
    pub incarnation: Arc<str>,
}

/// A message as delivered to a consumer.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The partition of the message.
    pub partition: Partition,
    /// The offset in the partition. Rises with each message of a partition; the next offset to ask for is one more.
    pub offset: i64,
    /// The message, or the undecodable payload in its place.
    pub message: Result<Message, Undecodable>,
}

impl Delivery {
    /// The id of the message, the same on each delivery.
    pub fn id(&self) -> Uuid {
        self.message.as_ref().map_or_else(Undecodable::id, |message| message.id)
    }
}

/// The place from which a consumer continues in a partition, read from the consumer's own commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// The offset to continue from.
    pub next: i64,
    /// The [id](Delivery::id) of the message before `next`, if known. A different id at that offset means that the
    /// topic was wiped.
    pub last: Option<Uuid>,
}

/// Offsets by topic and partition, each one past the last message included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ends(BTreeMap<Arc<str>, BTreeMap<u32, i64>>);

impl Ends {
    /// Returns whether there are no topics.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The topics.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }

    /// Returns the offset of a partition, if it is known.
    pub fn of(&self, topic: &str, partition: u32) -> Option<i64> {
        self.0.get(topic)?.get(&partition).copied()
    }

    /// Returns the known offsets of a topic by partition.
    pub fn partitions(&self, topic: &str) -> impl Iterator<Item = (u32, i64)> {
        self.0.get(topic).into_iter().flatten().map(|(partition, next)| (*partition, *next))
    }

    /// Adds a topic without any known offset.
    pub fn name(&mut self, topic: &str) {
        if !self.0.contains_key(topic) {
            self.0.insert(topic.into(), BTreeMap::new());
        }
    }

    /// Sets the offset of a partition.
    pub fn set(&mut self, topic: &str, partition: u32, next: i64) {
        match self.0.get_mut(topic) {
            Some(partitions) => _ = partitions.insert(partition, next),
            None => _ = self.0.insert(topic.into(), BTreeMap::from([(partition, next)])),
        }
    }

    /// Removes the offsets of a topic.
    pub fn forget(&mut self, topic: &str) {
        self.0.remove(topic);
    }

    /// Takes over all offsets of `other`.
    pub fn update(&mut self, other: &Self) {
        for (topic, partitions) in &other.0 {
            match self.0.get_mut(topic) {
                Some(known) => known.extend(partitions),
                None => _ = self.0.insert(topic.clone(), partitions.clone()),
            }
        }
    }

    /// Raises offsets to those of `other` where `other` is further.
    pub fn reach(&mut self, other: &Self) {
        for (topic, partitions) in &other.0 {
            let known = self.0.entry(topic.clone()).or_default();
            for (partition, next) in partitions {
                let reached = known.entry(*partition).or_insert(*next);
                *reached = (*reached).max(*next);
            }
        }
    }
}

/// A payload that is not a message of any known kind. The payload is parked, so that nothing is lost.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not a message: {reason}")]
pub struct Undecodable {
    /// Why the payload is not a message.
    pub reason: String,
    /// The key of the payload, made readable.
    pub key: Arc<str>,
    /// The original payload, in hexadecimal.
    pub raw: String,
}

impl Undecodable {
    /// Returns an id that is the same for the same bytes.
    pub fn id(&self) -> Uuid {
        named_id(Uuid::NAMESPACE_OID, &self.raw)
    }
}

/// The result of polling a consumer.
#[derive(Debug)]
pub enum Polled {
    /// Messages, in order per partition.
    Messages(Vec<Delivery>),
    /// The bus assigned these partitions to this consumer. A partition delivers nothing before [`Consumer::seek`].
    Assigned(Vec<Partition>),
    /// The bus took these partitions away: work on them must end or be abandoned before the next poll.
    Revoked(Vec<Partition>),
    /// These partitions do not match their bookmarks: the topic was wiped. They wait for another [`Consumer::seek`].
    Wiped(Vec<Partition>),
    /// Messages were removed before they were read, for example by the topic's retention. The partition waits for
    /// another [`Consumer::seek`].
    Lost {
        /// The partition that lost messages.
        partition: Partition,
        /// The offsets of the lost messages.
        offsets: Range<i64>,
    },
}

/// Sends messages. Order is kept per key. A message may arrive more than once, and is never lost.
#[async_trait]
pub trait Publisher: Send + Sync + 'static {
    /// Hands messages to the bus, in order, and returns a receipt at once. Waits only while the publisher's own buffer
    /// is full.
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError>;

    /// The offsets up to which the bus has taken this publisher's messages; empty for a bus that ends with its process.
    fn taken(&self) -> Ends {
        Ends::default()
    }
}

/// A message and its topic.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The topic, such as `inventory.commands`.
    pub topic: Arc<str>,
    /// The message.
    pub message: Message,
}

/// Resolves once the bus has durably taken every message of one [`Publisher::publish`]. On an error, publish all of
/// them again: consumers find the results of messages that they have already handled.
pub type Receipt = std::pin::Pin<Box<dyn Future<Output = Result<(), BusError>> + Send>>;

/// Creates consumers. The members of a group share the partitions of its topics.
#[async_trait]
pub trait Bus: Publisher {
    /// Joins a group. Once this returns, the group misses no message published to the topics.
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError>;

    /// Like [`join`](Self::join), under the name of an instance, which no other member of the group has at the same
    /// time. A bus that outlives processes gives such a member the partitions of the previous member of that name: a
    /// restarted process continues at once after a crash.
    async fn join_as(&self, group: &str, topics: &[&str], _instance: &str) -> Result<Box<dyn Consumer>, BusError> {
        self.join(group, topics).await
    }

    /// Returns a service's messages that the bus holds after these ends, in the topics that `ends` names, in order per
    /// partition. From them, a service checks at its start that its log contains everything that it has sent. May leave
    /// out most messages if there are many, but never the last ones. A bus that ends with its process holds none.
    async fn sent_since(&self, _service: &str, _ends: &Ends) -> Result<Vec<Delivery>, BusError> {
        Ok(Vec::new())
    }

    /// Returns whether the bus exists only inside this process. If so, each of several processes on a store must run
    /// all services.
    fn is_local(&self) -> bool {
        false
    }
}

/// One member of a consumer group. Dropping the consumer leaves the group.
#[async_trait]
pub trait Consumer: Send + 'static {
    /// Waits for the next event or batch, with at most `max` messages. Dropping the future loses nothing. After
    /// [`BusError::Misconfigured`], nothing more comes.
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError>;

    /// Starts delivery of an assigned partition at this bookmark, which comes from the consumer's own commit, or at the
    /// beginning of the partition with `None`.
    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError>;

    /// Informs the bus that everything below `next` is committed. The bus uses this only for its own book-keeping: the
    /// offset in the consumer's commit is authoritative.
    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError>;
}

/// Why a call to the bus failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    /// The bus cannot be reached, or did not acknowledge: retry.
    #[error("the bus is unavailable: {0}")]
    Unavailable(String),
    /// The bus will never accept this message, because it is too large or refused by policy. Its place among the
    /// published messages is `index`, counted from 0.
    #[error("the bus refused message {index}: {reason}")]
    Refused {
        /// The index of the message, from 0.
        index: usize,
        /// Why the bus refused the message.
        reason: String,
    },
    /// The settings are wrong: do not retry.
    #[error("the bus cannot be used: {0}")]
    Misconfigured(String),
}
