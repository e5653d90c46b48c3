//! The interface to a message bus, which carries messages with CloudEvents attributes. Messages with the same key are
//! published and consumed in order.

pub mod local;

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
    /// The unique id of the message, which is the same on each delivery.
    pub id: Uuid,
    /// The type name, such as `order.placed`.
    pub type_name: Arc<str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The service that the message comes from.
    pub source: Arc<str>,
    /// The stream that the message is about.
    pub subject: Arc<str>,
    /// The ordering key: messages with the same key are handled in order. The key of an event is its stream id. The key
    /// of a command is the stream id of the saga that sent the command.
    pub key: Arc<str>,
    /// The payload as JSON text, byte for byte as it was appended.
    pub data: Arc<str>,
    /// What caused the message.
    pub metadata: Metadata,
    /// When the event was recorded.
    pub time: DateTime<Utc>,
    /// The position of the event that the message was made from. The position refers to the log of the source.
    pub position: Position,
    /// The version of the event in its stream; [`Version::START`] for a command.
    pub version: Version,
    /// The lane of the relay that sent the message, combined with the name of the log that the relay read. A relay
    /// divides the log into lanes by key, and sends each lane in order. Messages with the same source and lane
    /// therefore arrive in the order of their positions, and a consumer that has seen a higher position has also seen
    /// this message. `None` if this order does not apply, because the message was redriven or was not sent by a relay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<Arc<str>>,
    /// Further attributes, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extensions: BTreeMap<String, String>,
}

impl Message {
    /// Creates the message that carries an event of the log.
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

    /// Decodes the payload as an event of type `E`. Returns `None` for an event type that `E` skips.
    pub fn decode<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        E::decode(&self.type_name, self.schema_version, &self.data).map_err(|source| self.undecodable(source))
    }

    /// Returns an error which says that this message cannot be decoded.
    pub fn undecodable(&self, source: EventError) -> DecodeError {
        DecodeError {
            stream: StreamId::from_stored(&self.subject),
            version: self.version,
            position: self.position,
            source,
        }
    }

    /// Returns the metadata for everything that this message causes.
    pub fn effects(&self) -> Metadata {
        self.metadata.caused_by(self.id)
    }
}

/// One partition of one incarnation of a topic. If a topic is deleted and created again, the new topic has a new
/// incarnation, and its offsets start over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Partition {
    /// The topic, such as `inventory.commands`.
    pub topic: Arc<str>,
    /// The number of the partition, counted from 0.
    pub number: u32,
    /// The incarnation of the topic. The incarnation changes when the topic is deleted and created again, or when the
    /// local bus restarts. Offsets of another incarnation are meaningless.
    pub incarnation: Arc<str>,
}

/// A message as delivered to a consumer.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The partition of the message.
    pub partition: Partition,
    /// The offset in the partition. The offsets of a partition rise from message to message. After this message, the
    /// consumer continues at this offset plus one.
    pub offset: i64,
    /// The message, or the payload if it cannot be decoded as a message.
    pub message: Result<Message, Undecodable>,
}

impl Delivery {
    /// The id of the message, the same on each delivery.
    pub fn id(&self) -> Uuid {
        self.message.as_ref().map_or_else(Undecodable::id, |message| message.id)
    }
}

/// The point from which a consumer continues in a partition. The consumer reads this point from its own last commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// The offset to continue from.
    pub next: i64,
    /// The [id](Delivery::id) of the message before `next`, if known. If the message at that offset has another id, the
    /// topic was wiped.
    pub last: Option<Uuid>,
}

/// A set of topics, with the end of each of their partitions. The end of a partition is the offset after its last
/// message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ends(BTreeMap<Arc<str>, BTreeMap<u32, i64>>);

impl Ends {
    /// Returns whether there is no topic.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The topics.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }

    /// Returns the end of a partition, if the end is known.
    pub fn of(&self, topic: &str, partition: u32) -> Option<i64> {
        self.0.get(topic)?.get(&partition).copied()
    }

    /// Returns each partition of a topic whose end is known, together with that end.
    pub fn partitions(&self, topic: &str) -> impl Iterator<Item = (u32, i64)> {
        self.0.get(topic).into_iter().flatten().map(|(partition, next)| (*partition, *next))
    }

    /// Adds a topic without any known ends.
    pub fn name(&mut self, topic: &str) {
        if !self.0.contains_key(topic) {
            self.0.insert(topic.into(), BTreeMap::new());
        }
    }

    /// Sets the end of a partition.
    pub fn set(&mut self, topic: &str, partition: u32, next: i64) {
        match self.0.get_mut(topic) {
            Some(partitions) => _ = partitions.insert(partition, next),
            None => _ = self.0.insert(topic.into(), BTreeMap::from([(partition, next)])),
        }
    }

    /// Removes a topic and its ends.
    pub fn forget(&mut self, topic: &str) {
        self.0.remove(topic);
    }

    /// Copies all ends of `other`, and replaces existing ends of the same partitions.
    pub fn update(&mut self, other: &Self) {
        for (topic, partitions) in &other.0 {
            match self.0.get_mut(topic) {
                Some(known) => known.extend(partitions),
                None => _ = self.0.insert(topic.clone(), partitions.clone()),
            }
        }
    }

    /// Raises each end to the end in `other` if the end in `other` is higher.
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

/// A payload that cannot be decoded as a message. The payload is parked, so that nothing is lost.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not a message: {reason}")]
pub struct Undecodable {
    /// Why the payload is not a message.
    pub reason: String,
    /// The key under which the payload was sent, converted to readable text.
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
    /// The bus assigned these partitions to this consumer. A partition delivers nothing until the consumer calls
    /// [`Consumer::seek`].
    Assigned(Vec<Partition>),
    /// The bus revoked these partitions. The consumer must finish or abandon its work on them before the next poll.
    Revoked(Vec<Partition>),
    /// These partitions do not match their bookmarks, because the topic was wiped (deleted and created again). The
    /// partitions deliver nothing until the consumer calls [`Consumer::seek`] again.
    Wiped(Vec<Partition>),
    /// Messages were removed before they were read, for example because the topic's retention time had passed. The
    /// partition delivers nothing until the consumer calls [`Consumer::seek`] again.
    Lost {
        /// The partition that lost messages.
        partition: Partition,
        /// The offsets of the lost messages.
        offsets: Range<i64>,
    },
}

/// Sends messages. Messages with the same key stay in order. A message may arrive more than once, but is never lost.
#[async_trait]
pub trait Publisher: Send + Sync + 'static {
    /// Hands messages to the bus, in order, and returns a receipt at once. Waits only while the publisher's own buffer
    /// is full.
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError>;

    /// Returns the ends up to which the bus has accepted this publisher's messages. The result is empty for a bus that
    /// exists only inside one process.
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

/// Resolves once the bus has durably accepted every message of one [`Publisher::publish`] call. On an error, publish
/// all of these messages again. Consumers recognise messages that they have already handled.
pub type Receipt = std::pin::Pin<Box<dyn Future<Output = Result<(), BusError>> + Send>>;

/// Creates consumers. The members of a consumer group share the partitions of the group's topics.
#[async_trait]
pub trait Bus: Publisher {
    /// Joins a group. The group receives every message that is published to the topics after this method returns.
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError>;

    /// Like [`join`](Self::join), but the member joins under the name of an instance. No other member of the group may
    /// have the same name at the same time. A bus that outlives processes gives such a member the partitions that the
    /// previous member with the same name had. A process that restarts after a crash can therefore continue
    /// immediately.
    async fn join_as(&self, group: &str, topics: &[&str], _instance: &str) -> Result<Box<dyn Consumer>, BusError> {
        self.join(group, topics).await
    }

    /// Returns the messages that a service has sent to the topics in `ends`, starting at the known end of each
    /// partition. The messages of each partition are in order. When a service starts, it uses these messages to check
    /// that its log contains everything that it has sent. If there are many messages, the result may omit some of them,
    /// but never the most recent ones. A bus that exists only inside one process returns no messages.
    async fn sent_since(&self, _service: &str, _ends: &Ends) -> Result<Vec<Delivery>, BusError> {
        Ok(Vec::new())
    }

    /// Returns whether the bus exists only inside this process. If so, and if several processes share a store, each
    /// process must run all services.
    fn is_local(&self) -> bool {
        false
    }
}

/// One member of a consumer group. The member leaves the group when the consumer is dropped.
#[async_trait]
pub trait Consumer: Send + 'static {
    /// Waits for the next batch of at most `max` messages, or for a change of the assigned partitions. No message is
    /// lost if the future is dropped. After [`BusError::Misconfigured`], the consumer delivers nothing more.
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError>;

    /// Starts delivery of an assigned partition at this bookmark, which comes from the consumer's own commit. With
    /// `None`, delivery starts at the beginning of the partition.
    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError>;

    /// Informs the bus that the consumer has committed all messages below the offset `next`. The bus uses this only for
    /// its own book-keeping: the offset in the consumer's commit is authoritative.
    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError>;
}

/// Why a call to the bus failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The bus cannot be reached, or did not acknowledge the call. Retry.
    #[error("the bus is unavailable: {0}")]
    Unavailable(String),
    /// The bus will never accept this message, because the message is too large or a policy forbids it. `index` is the
    /// index of the message among the published messages.
    #[error("the bus refused message {index}: {reason}")]
    Refused {
        /// The index of the message, counted from 0.
        index: usize,
        /// Why the bus refused the message.
        reason: String,
    },
    /// The settings of the bus are wrong. Do not retry.
    #[error("the bus cannot be used: {0}")]
    Misconfigured(String),
}
