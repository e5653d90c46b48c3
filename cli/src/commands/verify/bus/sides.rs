//! Compares the messages that are expected in topics with the messages found there.

use std::{collections::HashMap, sync::Arc};

use annals::{Archive, Message, Position, relay::LogNames};

use super::{OfTopics, topics::Topics};
use crate::{
    commands::verify::{
        Faults,
        order::at,
        sorter::{Record, Sorter},
    },
    failure::Failure,
    output::grouped,
};

const EXPECTED: i64 = 0;
const FOUND: i64 = 1;
/// How many numbers a record holds; see [`Line`].
const NUMBERS: usize = 11;

/// Where a message is expected, and whether it must be there.
pub(super) struct Expected {
    pub topic: usize,
    pub partition: u32,
    /// The index of the message among the messages of its event.
    pub index: i64,
    /// Whether the message must have arrived by now.
    pub required: bool,
}

/// A message on either side: expected or found.
#[derive(Clone, Copy)]
struct Line {
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

pub(super) struct Sides {
    lines: Sorter<NUMBERS>,
    senders: Vec<(Arc<str>, Arc<str>)>,
}

impl Sides {
    pub fn new() -> Result<Self, Failure> {
        Ok(Self { lines: Sorter::new()?, senders: Vec::new() })
    }

    pub fn expect(&mut self, message: &Message, lane: &Arc<str>, expected: Expected) -> Result<(), Failure> {
        let sender = (message.source.clone(), lane.clone());
        let known = self.senders.iter().position(|known| *known == sender);
        let sender = known.unwrap_or_else(|| {
            self.senders.push(sender);
            self.senders.len() - 1
        });
        let Expected { topic, partition, index, required } = expected;
        let (sender, partition) = (sender as i64, i64::from(partition));
        let line = Line { side: EXPECTED, partition, index, required, sender, ..Line::of(message, topic)? };
        self.lines.push(line.record(message))
    }

    pub fn found(&mut self, message: &Message, topic: usize, partition: u32, offset: i64) -> Result<(), Failure> {
        let line = Line { side: FOUND, partition: i64::from(partition), offset, ..Line::of(message, topic)? };
        self.lines.push(line.record(message))
    }

    pub async fn compare(
        self,
        topics: &Topics,
        names: &LogNames,
        archive: &dyn Archive,
        faults: &mut Faults<'_>,
    ) -> Result<OfTopics, Failure> {
        let mut told = OfTopics { topics: topics.count(), others: topics.others, ..OfTopics::default() };
        // For each group: position and index, then partition, offset and topic of the first copy that was found.
        let mut order: Sorter<5> = Sorter::new()?;
        let (mut without_topic, mut compacted): (HashMap<usize, i64>, HashMap<usize, i64>) = Default::default();
        for records in self.lines.sorted() {
            let records = records?;
            for records in records.chunk_by(|one, other| one.0 == other.0) {
                let lines: Vec<Line> = records.iter().map(Line::read).collect();
                let (expected, found) = lines.split_at(lines.partition_point(|line| line.side == EXPECTED));
                let Some(expected) = expected.first() else {
                    let lost = |line: &&Line| names.may_have_lost(Position(line.position));
                    told.lost += found.iter().filter(lost).count() as u64;
                    for line in found.iter().filter(|line| !lost(line)) {
                        faults.add(line.place(topics), extra(line))?;
                    }
                    continue;
                };
                let Some(first) = found.first() else {
                    let (service, lane) = &self.senders[expected.sender as usize];
                    let partition = expected.partition as u32;
                    let removed = topics.removed(expected.topic, partition, service, lane, expected.position);
                    match (expected.required, topics.exists(expected.topic), removed) {
                        (false, ..) => {}
                        (true, false, _) => *without_topic.entry(expected.topic).or_default() += 1,
                        (true, true, true) => told.removed += 1,
                        (true, true, false) if topics.is_compacted(expected.topic) => {
                            *compacted.entry(expected.topic).or_default() += 1;
                        }
                        (true, true, false) => {
                            let what = format!("its message is missing in topic {}", topics.name(expected.topic));
                            faults.add(at(archive, expected.position).await?, what)?;
                        }
                    }
                    continue;
                };
                told.messages += 1;
                told.repeated += found.len() as u64 - 1;
                for line in found {
                    let what = match (line.hashes[0] == expected.hashes[0], line.hashes[1] == expected.hashes[1]) {
                        (true, true) => continue,
                        (false, true) => "the payload",
                        (true, false) => "an attribute or the key",
                        (false, false) => "the payload, and an attribute or the key,",
                    };
                    let event = at(archive, expected.position).await?;
                    faults.add(line.place(topics), format!("{what} is not what the log says at {event}"))?;
                }
                // If retention may have removed the first copy of a message, the found copy may be a late resend that
                // is out of order, so its order is not checked.
                let (service, lane) = &self.senders[expected.sender as usize];
                if !topics.removed(expected.topic, first.partition as u32, service, lane, expected.position) {
                    let group = u128::from(expected.group.cast_unsigned());
                    let (partition, offset, topic) = (first.partition, first.offset, expected.topic as i64);
                    order.push((group, [expected.position, expected.index, partition, offset, topic]))?;
                }
            }
        }
        let mut gone: Vec<_> = without_topic.into_iter().chain(compacted).collect();
        gone.sort_unstable();
        for (topic, messages) in gone {
            let messages = grouped(messages);
            let what = match topics.exists(topic) {
                false => format!("there is no such topic, and {messages} messages should be in it"),
                true => format!(
                    "it is compacted, so brokers remove all but the last message of each key: {messages} messages \
                     that were sent are gone, and whether any was lost cannot be told; set cleanup.policy=delete"
                ),
            };
            faults.add(format!("topic {}", topics.name(topic)), what)?;
        }
        in_order(order, topics, archive, faults).await?;
        Ok(told)
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
                    "it is in another partition than position {before} of its stream, {name}[{of}]: nothing keeps their order"
                )
            } else if at_offset > offset {
                format!("it came before position {before} of its stream, which is at offset {at_offset}")
            } else {
                continue;
            };
            let place = format!("{name}[{partition}] offset {offset}, {}", at(archive, *position).await?);
            faults.add(place, what)?;
        }
    }
    Ok(())
}

fn extra(line: &Line) -> String {
    format!("it says that it comes from this log, which has no such message at position {}", line.position)
}

impl Line {
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
    fn record(self, message: &Message) -> Record<NUMBERS> {
        let Self { side, topic, partition, offset, position, index, hashes: [payload, rest], group, required, sender } =
            self;
        let id = format!("{topic} {} {position}", message.id);
        let key = blake3::hash(id.as_bytes()).as_bytes()[..16].iter().fold(0, |key, byte| key << 8 | u128::from(*byte));
        let (topic, required) = (topic as i64, i64::from(required));
        (key, [side, offset, partition, topic, position, index, payload, rest, group, required, sender])
    }

    fn read((_, numbers): &Record<NUMBERS>) -> Self {
        let [side, offset, partition, topic, position, index, payload, rest, group, required, sender] = *numbers;
        let (topic, hashes, required) = (topic as usize, [payload, rest], required == 1);
        Self { side, topic, partition, offset, position, index, hashes, group, required, sender }
    }

    fn place(&self, topics: &Topics) -> String {
        format!("{}[{}] offset {}", topics.name(self.topic), self.partition, self.offset)
    }
}

fn hash(bytes: &[u8]) -> i64 {
    blake3::hash(bytes).as_bytes()[..8].iter().fold(0_u64, |hash, byte| hash << 8 | u64::from(*byte)).cast_signed()
}
