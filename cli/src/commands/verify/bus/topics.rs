//! The topics that are compared with the log. Each topic is read up to the end that it had when it was first opened.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use annals::{Message, relay::RelayProgress};
use annals_kafka::{Contents, KafkaBus, partition_of};

use crate::{failure::Failure, progress};

pub(super) struct Topics {
    bus: KafkaBus,
    known: HashMap<Arc<str>, usize>,
    topics: Vec<Topic>,
    /// By topic, partition, service and lane: the position of the first message that is still there.
    firsts: HashMap<(usize, u32, Arc<str>, Arc<str>), i64>,
    /// The number of messages from other logs and senders.
    pub others: u64,
}

struct Topic {
    name: Arc<str>,
    /// The first offset that is still in each partition; `None` if the topic does not exist.
    begins: Option<Vec<i64>>,
    is_compacted: bool,
    contents: Option<Contents>,
}

impl Topics {
    pub fn of(bus: KafkaBus) -> Self {
        Self { bus, known: HashMap::new(), topics: Vec::new(), firsts: HashMap::new(), others: 0 }
    }

    /// Returns the index of a topic. The first call for a topic also records the end of the topic.
    pub async fn open(&mut self, name: &str) -> Result<usize, Failure> {
        if let Some(known) = self.known.get(name) {
            return Ok(*known);
        }
        let contents = self.bus.contents(name).await?;
        let begins = contents.as_ref().map(|contents| contents.partitions().iter().map(|range| range.start).collect());
        let is_compacted = contents.as_ref().is_some_and(Contents::is_compacted);
        let name: Arc<str> = name.into();
        self.known.insert(name.clone(), self.topics.len());
        self.topics.push(Topic { name, begins, is_compacted, contents });
        Ok(self.topics.len() - 1)
    }

    pub fn name(&self, topic: usize) -> &str {
        &self.topics[topic].name
    }

    pub fn exists(&self, topic: usize) -> bool {
        self.topics[topic].begins.is_some()
    }

    /// Returns whether brokers remove messages from the middle of the topic.
    pub fn is_compacted(&self, topic: usize) -> bool {
        self.topics[topic].is_compacted
    }

    /// The number of topics that exist.
    pub fn count(&self) -> usize {
        self.topics.iter().filter(|topic| topic.begins.is_some()).count()
    }

    /// The topics that have not been read yet.
    pub fn unread(&self) -> Vec<usize> {
        (0..self.topics.len()).filter(|topic| self.topics[*topic].contents.is_some()).collect()
    }

    /// The partition to which the relay's producer sends a key.
    pub fn partition_of(&self, topic: usize, key: &str) -> u32 {
        self.topics[topic].begins.as_ref().map_or(0, |begins| partition_of(key, begins.len() as u32))
    }

    /// Returns whether retention may have removed the message with this position from a partition. That is the case if
    /// the remaining messages of the lane begin at a later position.
    pub fn removed(&self, topic: usize, partition: u32, service: &Arc<str>, lane: &Arc<str>, position: i64) -> bool {
        let begins = self.topics[topic].begins.as_ref().and_then(|begins| begins.get(partition as usize));
        let first = self.firsts.get(&(topic, partition, service.clone(), lane.clone()));
        begins.is_some_and(|begins| *begins > 0) && first.is_none_or(|first| position < *first)
    }

    /// Calls `each` for each message in a topic that came from this log, up to the position `head`. The arguments are
    /// the message, its partition and its offset.
    pub async fn read(
        &mut self,
        topic: usize,
        services: &BTreeMap<String, RelayProgress>,
        head: i64,
        mut each: impl FnMut(&Message, u32, i64) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(mut contents) = self.topics[topic].contents.take() else { return Ok(()) };
        let bar = progress::topic_bar("found", &contents);
        while let Some(delivery) = contents.next().await? {
            bar.inc(1);
            let Ok(message) = delivery.message else {
                self.others += 1;
                continue;
            };
            let is_ours = match &message.lane {
                Some(lane) => services.values().any(|relayed| relayed.is_of_this_log(lane)),
                // Redriven messages carry no lane.
                None => message.position.0 > 0 && services.contains_key(&*message.source),
            };
            if !is_ours {
                self.others += 1;
                continue;
            }
            let partition = delivery.partition.number;
            let position = message.position.0;
            if let Some(lane) = &message.lane {
                let place = (topic, partition, message.source.clone(), lane.clone());
                self.firsts.entry(place).or_insert(position);
            }
            // The next run checks the messages of events after `head`.
            if position <= head {
                each(&message, partition, delivery.offset)?;
            }
        }
        bar.finish_and_clear();
        Ok(())
    }
}
