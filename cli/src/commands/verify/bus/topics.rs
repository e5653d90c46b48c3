//! The topics that are held against the log, each as it was when it was first met.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use annals::{Message, relay::Relayed};
use annals_kafka::{Contents, KafkaBus, partition_of};

use super::sides::Sides;
use crate::{failure::Failure, progress, stop::Stop};

pub(super) struct Topics {
    bus: KafkaBus,
    stop: Stop,
    known: HashMap<Arc<str>, usize>,
    topics: Vec<Topic>,
    /// By topic, partition, service and lane: the position that the first message still there is of.
    firsts: HashMap<(usize, u32, Arc<str>, Arc<str>), i64>,
    /// Messages of other logs and senders.
    pub others: u64,
}

struct Topic {
    name: Arc<str>,
    /// Of each partition, the first offset that is still there; `None` if there is no such topic.
    begins: Option<Vec<i64>>,
    is_compacted: bool,
    contents: Option<Contents>,
}

impl Topics {
    pub fn of(bus: KafkaBus, stop: Stop) -> Self {
        Self { bus, stop, known: HashMap::new(), topics: Vec::new(), firsts: HashMap::new(), others: 0 }
    }

    /// The number of a topic. From its first mention on, it is as it was then.
    pub async fn open(&mut self, name: &str) -> Result<usize, Failure> {
        if let Some(known) = self.known.get(name) {
            return Ok(*known);
        }
        let contents = self.bus.contents(name).await.map_err(|error| Failure::new(error.to_string()))?;
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

    /// Whether brokers remove messages from the middle of it.
    pub fn is_compacted(&self, topic: usize) -> bool {
        self.topics[topic].is_compacted
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.topics.iter().filter(|topic| topic.begins.is_some()).count()
    }

    /// Those that were not read yet.
    pub fn unread(&self) -> Vec<usize> {
        (0..self.topics.len()).filter(|topic| self.topics[*topic].contents.is_some()).collect()
    }

    /// Where our producer puts a key.
    pub fn partition_of(&self, topic: usize, key: &str) -> u32 {
        self.topics[topic].begins.as_ref().map_or(0, |begins| partition_of(key, begins.len() as u32))
    }

    /// Whether retention may have removed a message of this position from a partition: what is still there of its lane
    /// begins later.
    pub fn removed(&self, topic: usize, partition: u32, service: &Arc<str>, lane: &Arc<str>, position: i64) -> bool {
        let begins = self.topics[topic].begins.as_ref().and_then(|begins| begins.get(partition as usize));
        let first = self.firsts.get(&(topic, partition, service.clone(), lane.clone()));
        begins.is_some_and(|begins| *begins > 0) && first.is_none_or(|first| position < *first)
    }

    /// Takes down all that is in a topic and came from this log, up to a position of it; `false` if it was stopped.
    pub async fn read(
        &mut self,
        topic: usize,
        services: &BTreeMap<String, Relayed>,
        head: i64,
        sides: &mut Sides,
        mut each: impl FnMut(&Message),
    ) -> Result<bool, Failure> {
        let Some(mut contents) = self.topics[topic].contents.take() else { return Ok(true) };
        let total: i64 = contents.partitions().iter().map(|range| range.end - range.start).sum();
        let bar = progress::bar("found", total.unsigned_abs());
        loop {
            let next = tokio::select! {
                next = contents.next() => next,
                () = self.stop.asked() => return Ok(false),
            };
            let Some(delivery) = next.map_err(|error| Failure::new(error.to_string()))? else { break };
            bar.inc(1);
            let Ok(message) = delivery.message else {
                self.others += 1;
                continue;
            };
            let is_ours = match &message.lane {
                Some(lane) => services.values().any(|relayed| relayed.is_of_this_log(lane)),
                // Redriven: they carry no lane.
                None => message.position.0 > 0 && services.contains_key(&*message.source),
            };
            if !is_ours {
                self.others += 1;
                continue;
            }
            let (partition, position) = (delivery.partition.number, message.position.0);
            if let Some(lane) = &message.lane {
                let place = (topic, partition, message.source.clone(), lane.clone());
                self.firsts.entry(place).or_insert(position);
            }
            // What is newer than the log was read to, is looked at by the next run.
            if position <= head {
                each(&message);
                sides.found(&message, topic, partition, delivery.offset)?;
            }
        }
        bar.finish_and_clear();
        Ok(true)
    }
}
