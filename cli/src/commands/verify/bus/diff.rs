//! Compares the messages that are expected in topics with the messages found there.

use std::{collections::BTreeMap, sync::Arc};

use annals::{Archive, Message, Position, relay::LogNames};
use serde::Serialize;

use super::topics::Topics;
use crate::{
    commands::verify::{
        event::place_at,
        faults::Faults,
        sorter::{KeyedRecord, Sorter},
    },
    failure::Failure,
    output::{Output, grouped},
};

const EXPECTED: i64 = 0;
const FOUND: i64 = 1;
/// How many numbers a record holds; see [`ComparedMessage`].
const NUMBERS: usize = 11;

/// The result of comparing the topics.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(crate) struct TopicCounts {
    pub topics: usize,
    /// The number of messages from this log.
    pub messages: u64,
    /// The number of these messages that were sent again, as relays do after a crash.
    pub repeated: u64,
    /// The number of messages that were sent and later removed by retention.
    pub removed: u64,
    /// The number of messages whose events the log lost when its database was restored.
    pub lost: u64,
    /// The number of messages from other logs and other senders, which were not checked.
    pub others: u64,
}

impl TopicCounts {
    /// Prints the result for people.
    pub fn print(&self, output: &mut Output) -> Result<(), Failure> {
        let Self { topics, messages, repeated, removed, lost, others } = self;
        let number = |count: &u64| grouped(count.cast_signed());
        output.line(&format!(
            "{} messages in {topics} topics compared with the log; {} sent again, {} removed by retention, {} from other senders",
            number(messages),
            number(repeated),
            number(removed),
            number(others),
        ))?;
        if *lost == 0 {
            return Ok(());
        }
        output.line(&format!(
            "{} messages belong to events that the log lost when its database was restored",
            number(lost)
        ))
    }
}

/// Where a message is expected, and whether it must be there.
pub(super) struct ExpectedMessage {
    pub topic: usize,
    pub partition: u32,
    /// The index of the message among the messages of its event.
    pub index: i64,
    /// Whether the message must have arrived by now.
    pub required: bool,
}

/// A message on either side: expected or found.
#[derive(Clone, Copy)]
struct ComparedMessage {
    side: i64,
    topic: usize,
    partition: i64,
    /// The offset of a found message.
    offset: i64,
    position: i64,
    /// The index of an expected message among the messages of its event.
    index: i64,
    /// The hash of the payload, and the hash of everything else.
    hashes: [i64; 2],
    /// The hash of topic, stream and key. Messages with the same hash must be in order.
    group: i64,
    required: bool,
    /// The index of the service and lane.
    sender: i64,
}

/// The expected messages and the messages found.
pub(super) struct TopicDiff {
    messages: Sorter<NUMBERS>,
    /// The services and lanes of the expected messages.
    senders: Vec<(Arc<str>, Arc<str>)>,
}

impl TopicDiff {
    pub fn new() -> Result<Self, Failure> {
        Ok(Self { messages: Sorter::new()?, senders: Vec::new() })
    }

    pub fn expect(&mut self, message: &Message, lane: &Arc<str>, expected: ExpectedMessage) -> Result<(), Failure> {
        let sender = (message.source.clone(), lane.clone());
        let known = self.senders.iter().position(|known| *known == sender);
        let sender = known.unwrap_or_else(|| {
            self.senders.push(sender);
            self.senders.len() - 1
        });
        let compared = ComparedMessage {
            side: EXPECTED,
            partition: i64::from(expected.partition),
            index: expected.index,
            required: expected.required,
            sender: sender as i64,
            ..ComparedMessage::of(message, expected.topic)?
        };
        self.messages.push(compared.record(message))
    }

    pub fn found(&mut self, message: &Message, topic: usize, partition: u32, offset: i64) -> Result<(), Failure> {
        let partition = i64::from(partition);
        let compared = ComparedMessage { side: FOUND, partition, offset, ..ComparedMessage::of(message, topic)? };
        self.messages.push(compared.record(message))
    }

    pub async fn compare(
        self,
        topics: &Topics,
        names: &LogNames,
        archive: &dyn Archive,
        faults: &mut Faults<'_>,
    ) -> Result<TopicCounts, Failure> {
        let counts = TopicCounts { topics: topics.count(), others: topics.others, ..TopicCounts::default() };
        let Self { messages, senders } = self;
        let gone = BTreeMap::new();
        let mut comparison = Comparison { topics, names, archive, senders, counts, order: Sorter::new()?, gone };
        for records in messages.sorted() {
            for copies in records?.chunk_by(|one, other| one.0 == other.0) {
                let copies: Vec<ComparedMessage> = copies.iter().map(ComparedMessage::read).collect();
                let (expected, found) = copies.split_at(copies.partition_point(|copy| copy.side == EXPECTED));
                match (expected.first(), found.first()) {
                    (None, _) => comparison.unexpected(found, faults)?,
                    (Some(expected), None) => comparison.missing(expected, faults).await?,
                    (Some(expected), Some(first)) => comparison.arrived(expected, first, found, faults).await?,
                }
            }
        }
        comparison.end(faults).await
    }
}

/// Compares one message after the other, and collects the results.
struct Comparison<'a> {
    topics: &'a Topics,
    names: &'a LogNames,
    archive: &'a dyn Archive,
    senders: Vec<(Arc<str>, Arc<str>)>,
    counts: TopicCounts,
    /// One record per message, by group: the position of its event and its index, then the partition, offset and topic
    /// of the first copy that was found.
    order: Sorter<5>,
    /// By topic: the number of messages that are missing because the topic does not exist or is compacted.
    gone: BTreeMap<usize, i64>,
}

impl Comparison<'_> {
    fn unexpected(&mut self, found: &[ComparedMessage], faults: &mut Faults<'_>) -> Result<(), Failure> {
        for message in found {
            if self.names.may_have_lost(Position(message.position)) {
                self.counts.lost += 1;
                continue;
            }
            let what = format!(
                "the message claims to come from this log, which has no such message at position {}",
                message.position
            );
            faults.add(message.place(self.topics), what)?;
        }
        Ok(())
    }

    async fn missing(&mut self, expected: &ComparedMessage, faults: &mut Faults<'_>) -> Result<(), Failure> {
        if !expected.required {
            return Ok(());
        }
        let topic = expected.topic;
        if self.topics.exists(topic) && self.is_removed(expected, expected.partition) {
            self.counts.removed += 1;
            return Ok(());
        }
        if !self.topics.exists(topic) || self.topics.is_compacted(topic) {
            *self.gone.entry(topic).or_default() += 1;
            return Ok(());
        }
        let what = format!("the message is missing in topic {}", self.topics.name(topic));
        faults.add(place_at(self.archive, expected.position).await?, what)
    }

    async fn arrived(
        &mut self,
        expected: &ComparedMessage,
        first: &ComparedMessage,
        found: &[ComparedMessage],
        faults: &mut Faults<'_>,
    ) -> Result<(), Failure> {
        self.counts.messages += 1;
        self.counts.repeated += found.len() as u64 - 1;
        for message in found {
            let what = match (message.hashes[0] == expected.hashes[0], message.hashes[1] == expected.hashes[1]) {
                (true, true) => continue,
                (false, true) => "the payload differs",
                (true, false) => "an attribute or the key differs",
                (false, false) => "the payload and an attribute or the key differ",
            };
            let event = place_at(self.archive, expected.position).await?;
            faults.add(message.place(self.topics), format!("{what} from the log at {event}"))?;
        }
        // If retention may have removed the first copy of a message, the found copy may be a late resend that is out of
        // order, so its order is not checked.
        if self.is_removed(expected, first.partition) {
            return Ok(());
        }
        let group = u128::from(expected.group.cast_unsigned());
        let topic = expected.topic as i64;
        self.order.push((group, [expected.position, expected.index, first.partition, first.offset, topic]))
    }

    /// Returns whether retention may have removed the first copy of a message from a partition.
    fn is_removed(&self, expected: &ComparedMessage, partition: i64) -> bool {
        let (service, lane) = &self.senders[expected.sender as usize];
        self.topics.removed(expected.topic, partition as u32, service, lane, expected.position)
    }

    async fn end(self, faults: &mut Faults<'_>) -> Result<TopicCounts, Failure> {
        for (topic, messages) in self.gone {
            let messages = grouped(messages);
            let what = match self.topics.exists(topic) {
                false => format!("the topic does not exist, and {messages} messages should be there"),
                true => format!(
                    "the topic is compacted, so brokers remove all but the last message of each key: {messages} sent \
                     messages are gone, and lost messages cannot be distinguished from compacted messages; set \
                     cleanup.policy=delete"
                ),
            };
            faults.add(format!("topic {}", self.topics.name(topic)), what)?;
        }
        in_order(self.order, self.topics, self.archive, faults).await?;
        Ok(self.counts)
    }
}

/// Checks that within a group, a message that is later in the log is also later in the topic.
async fn in_order(
    order: Sorter<5>,
    topics: &Topics,
    archive: &dyn Archive,
    faults: &mut Faults<'_>,
) -> Result<(), Failure> {
    for records in order.sorted() {
        for pair in records?.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            let [(_, [before, _, of, at_offset, topic]), (_, [position, _, partition, offset, _])] = pair else {
                continue;
            };
            let name = topics.name(*topic as usize);
            let what = if of != partition {
                format!(
                    "the message is in another partition than position {before} of its stream, {name}[{of}]: the \
                     order of the two is not kept"
                )
            } else if at_offset > offset {
                format!("the message came before position {before} of its stream, which is at offset {at_offset}")
            } else {
                continue;
            };
            let place = format!("{name}[{partition}] offset {offset}, {}", place_at(archive, *position).await?);
            faults.add(place, what)?;
        }
    }
    Ok(())
}

impl ComparedMessage {
    fn of(message: &Message, topic: usize) -> Result<Self, Failure> {
        let attributes = Message { data: "".into(), lane: None, ..message.clone() };
        let attributes = serde_json::to_vec(&attributes)?;
        let group = format!("{topic} {} {}", message.subject.len(), message.subject.to_string() + &message.key);
        Ok(Self {
            side: EXPECTED,
            topic,
            partition: 0,
            offset: 0,
            position: message.position.0,
            index: 0,
            hashes: [hash(message.data.as_bytes()), hash(&attributes)],
            group: hash(group.as_bytes()),
            required: false,
            sender: 0,
        })
    }

    /// Builds a record. Sorting places all records of one message next to each other: first the expected ones, then the
    /// found ones by offset.
    fn record(self, message: &Message) -> KeyedRecord<NUMBERS> {
        let Self { side, topic, partition, offset, position, index, hashes: [payload, rest], group, required, sender } =
            self;
        let id = format!("{topic} {} {position}", message.id);
        let key = blake3::hash(id.as_bytes()).as_bytes()[..16].iter().fold(0, |key, byte| key << 8 | u128::from(*byte));
        let topic = topic as i64;
        let required = i64::from(required);
        (key, [side, offset, partition, topic, position, index, payload, rest, group, required, sender])
    }

    fn read((_, numbers): &KeyedRecord<NUMBERS>) -> Self {
        let [side, offset, partition, topic, position, index, payload, rest, group, required, sender] = *numbers;
        let hashes = [payload, rest];
        let topic = topic as usize;
        Self { side, topic, partition, offset, position, index, hashes, group, required: required == 1, sender }
    }

    fn place(&self, topics: &Topics) -> String {
        format!("{}[{}] offset {}", topics.name(self.topic), self.partition, self.offset)
    }
}

fn hash(bytes: &[u8]) -> i64 {
    blake3::hash(bytes).as_bytes()[..8].iter().fold(0_u64, |hash, byte| hash << 8 | u64::from(*byte)).cast_signed()
}
