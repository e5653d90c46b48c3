//! Finds the messages that the services of a store have sent to topics.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use annals::{
    Message, Recorded, StreamId,
    bus::{Delivery, Ends},
    relay::{LogNames, RelayProgress, WINDOW, log_of},
};
use annals_kafka::{Contents, KafkaBus};

use super::sorter::{MessageSorter, SentMessage};
use crate::{failure::Failure, progress};

/// The messages and offsets that were found in the topics.
#[derive(Default)]
pub(super) struct Found {
    pub sent: MessageSorter,
    /// The logs from which the services sent messages, each with its first and last position found.
    pub logs: BTreeMap<String, (i64, i64)>,
    /// The positions of all messages, in order.
    positions: Vec<i64>,
    /// The first and the last position of the events that were recorded at the same time, by that time. All events of a
    /// commit have the same time.
    together: HashMap<i64, (i64, i64)>,
    /// The last positions that were sent, by service and lane. The relay may not have known yet that the brokers had
    /// accepted these messages.
    windows: BTreeMap<(String, u32), BTreeSet<i64>>,
    /// The ends of the topics to which the services have sent messages.
    pub ends: Ends,
    /// The ends of the topics that the services consume.
    pub inboxes: Ends,
    /// Partitions from which retention removed messages after the last end that a checkpoint recorded.
    pub removed: Vec<String>,
    pub topics: usize,
}

/// The services whose messages to find, with the progress of their relays.
pub(super) struct Search<'a> {
    pub services: &'a BTreeSet<String>,
    pub relayed: &'a BTreeMap<String, RelayProgress>,
    pub names: &'a LogNames,
}

impl Search<'_> {
    /// Reads each topic from the end that the relays last recorded.
    pub async fn run(&self, bus: &KafkaBus) -> Result<Found, Failure> {
        let own: BTreeSet<String> = self.services.iter().map(|service| format!("{service}.events")).collect();
        let inboxes: BTreeSet<String> = self.services.iter().map(|service| format!("{service}.commands")).collect();
        let mut found = Found::default();
        for topic in bus.topics().await? {
            if !own.contains(&topic) && !topic.ends_with(".commands") {
                continue;
            }
            let is_own = own.contains(&topic);
            let since = self.known_ends(&topic);
            let Some(mut contents) = bus.contents_since(&topic, &since).await? else { continue };
            found.topics += 1;
            found.begin(&topic, &contents, &since, inboxes.contains(&topic));
            let before = found.positions.len();
            let bar = progress::topic_bar("read", &contents);
            while let Some(delivery) = contents.next().await? {
                bar.inc(1);
                self.take(delivery, is_own, &mut found)?;
            }
            bar.finish_and_clear();
            if is_own || !since.is_empty() || found.positions.len() > before {
                let ends = contents.held().iter().map(|held| held.end);
                (0..).zip(ends).for_each(|(number, end)| found.ends.set(&topic, number, end));
            }
        }
        found.positions.sort_unstable();
        found.positions.dedup();
        Ok(found)
    }

    /// Returns the recorded end of each partition whose end all relays have recorded, and the lowest of the recorded
    /// ends if they differ. Any other partition is read from its beginning.
    fn known_ends(&self, topic: &str) -> Ends {
        let mut known = Ends::default();
        let mut relays = self.services.iter().map(|service| self.relayed.get(service).map(RelayProgress::taken));
        let Some(Some(first)) = relays.next() else { return known };
        first.partitions(topic).for_each(|(partition, next)| known.set(topic, partition, next));
        for relay in relays {
            let mut both = Ends::default();
            for (partition, next) in known.partitions(topic) {
                if let Some(other) = relay.and_then(|ends| ends.of(topic, partition)) {
                    both.set(topic, partition, next.min(other));
                }
            }
            known = both;
        }
        known
    }

    fn take(&self, delivery: Delivery, is_own: bool, found: &mut Found) -> Result<(), Failure> {
        let Ok(message) = &delivery.message else { return Ok(()) };
        if !self.services.contains(&*message.source) || message.position.0 <= 0 {
            return Ok(());
        }
        let position = message.position;
        let log = message.lane.as_deref().and_then(log_of);
        let is_passed = |log| self.names.passes_over(log);
        if log.is_some_and(is_passed) || self.names.may_have_lost(position) {
            return Ok(());
        }
        if let Some(log) = log {
            let known = found.logs.entry(log.to_owned()).or_insert((position.0, position.0));
            *known = (known.0.min(position.0), known.1.max(position.0));
            let lane = message.lane.as_deref().and_then(|lane| lane.split_once('@')?.0.parse().ok()).unwrap_or(0);
            let window = found.windows.entry((message.source.to_string(), lane)).or_default();
            window.insert(position.0);
            if window.len() > WINDOW {
                window.pop_first();
            }
        } else if !is_own {
            // The message of a redriven event has no lane, but in the service's own topic the sender is certain anyway.
            // The sender of any other message without a lane is uncertain.
            return Ok(());
        }
        found.positions.push(position.0);
        let event = is_event(message, is_own).then(|| event(message));
        if event.is_some() {
            let time = message.time.timestamp_micros();
            let known = found.together.entry(time).or_insert((position.0, position.0));
            *known = (known.0.min(position.0), known.1.max(position.0));
        }
        let place = format!("{}[{}] offset {}", delivery.partition.topic, delivery.partition.number, delivery.offset);
        found.sent.push(SentMessage {
            position: position.0,
            id: message.id,
            causation: message.metadata.causation_id,
            event: event.map(|event| annals::archive::Stored::from(&event).into_owned()),
            place,
        })
    }
}

impl Found {
    fn begin(&mut self, topic: &str, contents: &Contents, since: &Ends, is_inbox: bool) {
        for (number, (read, held)) in contents.partitions().iter().zip(contents.held()).enumerate() {
            let number = number as u32;
            if is_inbox && !held.is_empty() {
                self.inboxes.set(topic, number, held.end);
            }
            let known = since.of(topic, number).unwrap_or(0);
            if read.start > known {
                self.removed.push(format!(
                    "{topic}[{number}]: retention removed offsets {known} to {}; their messages cannot be taken back",
                    read.start - 1
                ));
            }
        }
    }

    /// Returns the last position found.
    pub fn last(&self) -> i64 {
        self.positions.last().copied().unwrap_or(0)
    }

    /// Returns whether the topics hold all events that were committed together with `event`, given that the log holds
    /// all events up to `held_to`. This is certain only if the topics hold every position from the first to the last
    /// event of the commit, and also the positions directly before and after the commit.
    pub fn is_whole(&self, event: &annals::archive::Stored<'_>, held_to: i64) -> bool {
        let time = event.recorded_at.timestamp_micros();
        let Some((first, last)) = self.together.get(&time).copied() else { return false };
        let first = (first - 1).max(held_to + 1);
        let last = last + 1;
        let known = self.positions.partition_point(|position| *position <= last)
            - self.positions.partition_point(|position| *position < first);
        known as i64 == last - first + 1
    }

    /// Returns the position before which the brokers have certainly accepted all messages of a service. All lanes
    /// count, because the number of lanes, and with it the lane of each stream, may have changed since the backup.
    pub fn all_taken_before(&self, service: &str) -> Option<i64> {
        let of_service = self.windows.iter().filter(|((of, _), _)| of == service);
        let firsts = of_service.map(|(_, window)| window.first().copied().filter(|_| window.len() == WINDOW));
        firsts.collect::<Option<Vec<_>>>()?.into_iter().min()
    }
}

/// Returns whether a message carries an event as the log stores it: a published event, or an answer to a saga.
fn is_event(message: &Message, is_own: bool) -> bool {
    message.version.0 > 0 && (is_own || message.subject.starts_with("step."))
}

fn event(message: &Message) -> Recorded {
    Recorded {
        position: message.position,
        stream: StreamId::from_stored(&message.subject),
        version: message.version,
        id: message.id,
        type_name: Arc::clone(&message.type_name),
        schema_version: message.schema_version,
        data: Arc::clone(&message.data),
        metadata: message.metadata.clone(),
        recorded_at: message.time,
    }
}
