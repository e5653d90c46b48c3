//! The port to a bus: messages with CloudEvents attributes, published and consumed by key.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::event::{DecodeError, Event, EventError, Metadata, Position, Recorded, StreamId, Version, named_id};

/// What a [`Handler`](crate::Handler) is given: an event of the log, or an event or command from the bus. The attributes
/// are those of CloudEvents 1.0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Unique, and the same on each delivery.
    pub id: Uuid,
    /// The type name, such as `order.placed`.
    pub type_name: Arc<str>,
    /// The schema version of `data`.
    pub schema_version: i32,
    /// The service it comes from.
    pub source: Arc<str>,
    /// The stream it is about.
    pub subject: Arc<str>,
    /// Messages with one key are handled in order: the stream id of an event, the saga's stream id of a command.
    pub key: Arc<str>,
    /// JSON text, byte for byte as it was appended.
    pub data: Arc<str>,
    /// Who caused it.
    pub metadata: Metadata,
    /// When it was recorded.
    pub time: DateTime<Utc>,
    /// Its place in the log it comes from.
    pub position: Position,
    /// Its place in its stream; [`Version::START`] for a command.
    pub version: Version,
    /// The lane of the relay that sent it, and the log that it read: those of one source and lane come in the order of their
    /// positions, and whoever has seen a higher one has seen this. `None` where that does not hold: sent by no relay, or
    /// redriven.
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

    /// Decodes the payload as one of `E`; `None` where `E` skips types it does not know.
    pub fn decode<E: Event>(&self) -> Result<Option<E>, DecodeError> {
        E::decode(&self.type_name, self.schema_version, &self.data).map_err(|source| self.undecodable(source))
    }

    /// Says of this message that it cannot be read.
    pub fn undecodable(&self, source: EventError) -> DecodeError {
        DecodeError {
            stream: StreamId::from_stored(&self.subject),
            version: self.version,
            position: self.position,
            source,
        }
    }

    /// The metadata of what handling this message causes.
    pub fn effects(&self) -> Metadata {
        self.metadata.caused_by(self.id)
    }
}

/// One partition of a topic, in one incarnation of it: a topic that was deleted and made again starts over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Partition {
    /// Such as `inventory.commands`.
    pub topic: Arc<str>,
    /// From 0.
    pub number: u32,
    /// Differs after the topic was wiped or the local bus restarted: offsets of another incarnation mean nothing.
    pub incarnation: Arc<str>,
}

/// A message as a consumer gets it.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Where it came from.
    pub partition: Partition,
    /// Its place there. Rises with each message of a partition; the next to ask for is one more.
    pub offset: i64,
    /// The message, or what came in place of one.
    pub message: Result<Message, Undecodable>,
}

impl Delivery {
    /// The id of the message, the same on each delivery.
    pub fn id(&self) -> Uuid {
        self.message.as_ref().map_or_else(Undecodable::id, |message| message.id)
    }
}

/// Where a consumer goes on in a partition, out of its own commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bookmark {
    /// The offset to go on from.
    pub next: i64,
    /// The [id](Delivery::id) of the message before it, where it is known: another one there means that the topic was wiped.
    pub last: Option<Uuid>,
}

/// Offsets by topic and partition, each the one after the last message that is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ends(BTreeMap<Arc<str>, BTreeMap<u32, i64>>);

impl Ends {
    /// Whether there is no offset in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The topics.
    pub fn topics(&self) -> impl Iterator<Item = &Arc<str>> {
        self.0.keys()
    }

    /// The offset of a partition, if it is known.
    pub fn of(&self, topic: &str, partition: u32) -> Option<i64> {
        self.0.get(topic)?.get(&partition).copied()
    }

    /// The offsets of a topic.
    pub fn partitions(&self, topic: &str) -> impl Iterator<Item = (u32, i64)> {
        self.0.get(topic).into_iter().flatten().map(|(partition, next)| (*partition, *next))
    }

    /// Names a topic of which no offset is known.
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

    /// Takes over what `other` knows.
    pub fn update(&mut self, other: &Self) {
        for (topic, partitions) in &other.0 {
            match self.0.get_mut(topic) {
                Some(known) => known.extend(partitions),
                None => _ = self.0.insert(topic.clone(), partitions.clone()),
            }
        }
    }

    /// Moves on to where `other` is further.
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

/// Bytes that are no message of any kind known. They are parked, so that nothing is lost.
#[derive(Clone, Debug, thiserror::Error)]
#[error("not a message: {reason}")]
pub struct Undecodable {
    /// What is wrong.
    pub reason: String,
    /// The key it came with, made readable.
    pub key: Arc<str>,
    /// The payload as it came, in hexadecimal.
    pub raw: String,
}

impl Undecodable {
    /// The same for the same bytes.
    pub fn id(&self) -> Uuid {
        named_id(Uuid::NAMESPACE_OID, &self.raw)
    }
}

/// What a consumer reports.
#[derive(Debug)]
pub enum Polled {
    /// Messages, in order per partition.
    Messages(Vec<Delivery>),
    /// These partitions are this consumer's now. It delivers nothing of them before [`Consumer::seek`].
    Assigned(Vec<Partition>),
    /// These are not any more: what is under way must end or be given up before the next poll.
    Revoked(Vec<Partition>),
    /// These are not what they were at their bookmark: the topic was wiped. They wait for [`Consumer::seek`] again.
    Wiped(Vec<Partition>),
    /// Messages were removed before they were read, as a topic's retention does. The partition waits for [`Consumer::seek`] again.
    Lost {
        /// Where.
        partition: Partition,
        /// Their offsets.
        offsets: Range<i64>,
    },
}

/// Sends messages. Order is kept per key; a message may arrive more than once, never not at all.
#[async_trait]
pub trait Publisher: Send + Sync + 'static {
    /// Hands over messages, in order, and returns a receipt at once; waits only while the publisher's own buffer is full.
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError>;

    /// Up to where the bus has taken what this publisher sent; empty for a bus that ends with its process.
    fn taken(&self) -> Ends {
        Ends::default()
    }
}

/// A message and where it goes.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// Such as `inventory.commands`.
    pub topic: Arc<str>,
    /// The message.
    pub message: Message,
}

/// Resolves once the bus has taken every message of one [`Publisher::publish`] for good. On an error, publish all of them
/// again: consumers find their results already there.
pub type Receipt = std::pin::Pin<Box<dyn Future<Output = Result<(), BusError>> + Send>>;

/// Makes consumers: members of a group share the partitions of its topics.
#[async_trait]
pub trait Bus: Publisher {
    /// Joins a group. From the moment this returns, no message published to the topics is missed by the group.
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError>;

    /// The same under the name of an instance, which no other member of the group has at the same time. A bus that outlives
    /// processes gives such a member the share of the one that had this name before: a process that crashed goes on at once
    /// when it is started again.
    async fn join_as(&self, group: &str, topics: &[&str], _instance: &str) -> Result<Box<dyn Consumer>, BusError> {
        self.join(group, topics).await
    }

    /// Messages of a service that the bus holds behind these ends, in the topics that they name, in order per partition: so
    /// that a service sees at its start whether its log holds all that it has sent. May leave out most of many, but never the
    /// last ones. A bus that ends with its process holds none.
    async fn sent_since(&self, _service: &str, _ends: &Ends) -> Result<Vec<Delivery>, BusError> {
        Ok(Vec::new())
    }

    /// Whether it ends at the border of this process. Then each of several processes on a store must run all services.
    fn is_local(&self) -> bool {
        false
    }
}

/// One member of a consumer group. Dropping it leaves the group.
#[async_trait]
pub trait Consumer: Send + 'static {
    /// Waits for what comes next, at most `max` messages at once. Dropping the future loses nothing. After
    /// [`BusError::Misconfigured`] nothing more comes.
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError>;

    /// Starts delivery of an assigned partition at this bookmark out of our own commit, or with `None` at its beginning.
    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError>;

    /// Tells the bus that everything below `next` is committed on our side. For the bus's own book-keeping: what counts
    /// is the offset in the commit.
    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError>;
}

/// Why the bus did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BusError {
    /// It cannot be reached, or gave no acknowledgement: retry.
    #[error("the bus is unavailable: {0}")]
    Unavailable(String),
    /// It will never take this message, which is the `index`th of those published: too large, or refused by policy.
    #[error("the bus refused message {index}: {reason}")]
    Refused {
        /// Which message.
        index: usize,
        /// Why.
        reason: String,
    },
    /// The settings are wrong: do not retry.
    #[error("the bus cannot be used: {0}")]
    Misconfigured(String),
}
