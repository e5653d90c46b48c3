//! The bus of [Annals](annals) on Kafka. Events and commands are sent as CloudEvents, stay in order per key, and are
//! never lost.
//!
//! ```no_run
//! # async fn f(services: Vec<annals::Service>) -> Result<(), annals::StartError> {
//! use std::sync::Arc;
//!
//! let bus = annals_kafka::KafkaBus::connect(annals_kafka::Settings::new("localhost:9092")).await?;
//! annals::Runtime::new().start(services, Arc::new(bus)).await
//! # }
//! ```
//!
//! Producers are idempotent and wait for all replicas. Consumers are members of a consumer group and start from the
//! offset that their service has committed in its store; the offsets that consumers commit to Kafka serve only to
//! monitor the lag. Missing topics are created with the number of partitions in [`Settings`]. The bus writes
//! CloudEvents 1.0 in binary mode, which any client can read, and also reads structured mode.
//!
//! A [prefix](Settings::prefix) is part of the names that topics and groups have on the cluster. The methods of
//! [`KafkaBus`], deliveries, and the checkpoints of services use the names without the prefix.

#![warn(missing_debug_implementations)]

mod cloud_event;
mod consumer;
mod contents;
mod placing;
mod producer;
mod sent;
mod settings;
mod topics;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use annals::{
    Bus, BusError, Consumer, Publisher,
    bus::{Delivery, Ends, Outgoing, Receipt},
};
use async_trait::async_trait;

use self::{consumer::Member, producer::Producer, topics::Topics};
pub use self::{contents::Contents, placing::partition_of, settings::Settings};

/// A [`Bus`] on a Kafka cluster.
pub struct KafkaBus {
    settings: Settings,
    /// The incarnation of the topics: the id of the cluster, and the prefix if there is one.
    cluster: Arc<str>,
    topics: Topics,
    producer: Producer,
    /// For each group, the number of members that have joined.
    members: Mutex<HashMap<String, u32>>,
}

impl std::fmt::Debug for KafkaBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaBus")
            .field("settings", &self.settings)
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

impl KafkaBus {
    /// Connects to the cluster.
    ///
    /// # Errors
    /// Returns [`BusError::Misconfigured`] for settings that the client rejects; [`BusError::Unavailable`] if no broker
    /// answers within ten seconds.
    pub async fn connect(settings: Settings) -> Result<Self, BusError> {
        settings.check_prefix()?;
        let topics = Topics::new(&settings)?;
        let mut cluster = topics.cluster().await?;
        let producer = Producer::new(&settings, topics.round_trip().await?)?;
        if settings.has_prefix() {
            cluster = format!("{cluster}/{}", settings.on_cluster("")).into();
        }
        Ok(Self { settings, cluster, topics, producer, members: Mutex::default() })
    }

    /// Reads the messages that a topic holds at this moment. Returns `None` if the topic does not exist. This method
    /// creates no topic and commits no offset.
    ///
    /// # Errors
    /// Returns an error if no broker answers, or the caller may not read the topic.
    pub async fn contents(&self, topic: &str) -> Result<Option<Contents>, BusError> {
        self.contents_since(topic, &Ends::default()).await
    }

    /// Reads a topic like [`contents`](Self::contents), but skips the messages before the offsets in `ends`.
    ///
    /// # Errors
    /// Returns an error if no broker answers, or the caller may not read the topic.
    pub async fn contents_since(&self, topic: &str, ends: &Ends) -> Result<Option<Contents>, BusError> {
        let topic: Arc<str> = topic.into();
        let on_cluster: Arc<str> = self.settings.on_cluster(&topic).into();
        if !self.topics.exists(&on_cluster).await? {
            return Ok(None);
        }
        let is_compacted = self.topics.is_compacted(&on_cluster).await;
        Contents::of(&self.settings, self.cluster.clone(), topic, is_compacted, ends.clone()).await.map(Some)
    }

    /// Returns the names of all topics that the caller may see, except the cluster's internal topics, and except the
    /// topics without the prefix.
    ///
    /// # Errors
    /// Returns an error if no broker answers.
    pub async fn topics(&self) -> Result<Vec<String>, BusError> {
        let names = self.topics.names().await?;
        Ok(names.iter().filter_map(|name| self.settings.without_prefix(name)).map(str::to_owned).collect())
    }

    /// Returns the id of the cluster, with the prefix if there is one. The checkpoint of each partition contains this
    /// id as the incarnation.
    pub fn cluster(&self) -> &Arc<str> {
        &self.cluster
    }
}

#[async_trait]
impl Publisher for KafkaBus {
    async fn publish(&self, mut messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        if self.producer.mend()? {
            self.topics.forget();
        }
        self.add_prefix(&mut messages);
        // All messages are checked before any of them is sent, because no message may overtake an earlier message that
        // is refused.
        let mut last: Option<&Arc<str>> = None;
        let mut bytes_max = 0;
        let mut count = 0;
        let mut partitions = Vec::with_capacity(messages.len());
        for (index, Outgoing { topic, message }) in messages.iter().enumerate() {
            if last != Some(topic) {
                let known = self.topics.ensure(topic).await?;
                (last, bytes_max, count) = (Some(topic), known.bytes_max, known.partitions);
                self.producer.fit(bytes_max);
            }
            partitions.push(partition_of(&message.key, count));
            let size = cloud_event::size(message);
            if size > bytes_max {
                // The limit of the topic may have been raised since the limit was cached.
                bytes_max = self.topics.look_again(topic).await;
            }
            let bytes_max = bytes_max.min(producer::MESSAGE_BYTES_MAX);
            if size > bytes_max {
                let reason = format!("the message has {size} bytes; the limit of topic {topic} is {bytes_max}");
                return Err(BusError::Refused { index, reason });
            }
        }
        self.producer.send(messages, &partitions).await
    }

    fn taken(&self) -> Ends {
        self.producer.taken()
    }
}

impl KafkaBus {
    /// Adds the prefix to the topics of messages. Consecutive messages with the same topic share one copy of the
    /// topic's name.
    fn add_prefix(&self, messages: &mut [Outgoing]) {
        if !self.settings.has_prefix() {
            return;
        }
        let mut last: Option<(Arc<str>, Arc<str>)> = None;
        for Outgoing { topic, .. } in messages {
            let on_cluster = match &last {
                Some((name, on_cluster)) if name == topic => on_cluster.clone(),
                _ => self.settings.on_cluster(topic).into(),
            };
            last = Some((std::mem::replace(topic, on_cluster.clone()), on_cluster));
        }
    }

    async fn member(
        &self,
        group: &str,
        topics: &[&str],
        instance: Option<&str>,
    ) -> Result<Box<dyn Consumer>, BusError> {
        if topics.is_empty() {
            return Err(BusError::Misconfigured(format!("group {group} subscribes to no topic")));
        }
        let topics: Vec<String> = topics.iter().map(|topic| self.settings.on_cluster(topic)).collect();
        for topic in &topics {
            self.topics.ensure(&Arc::from(&**topic)).await?;
        }
        // The instance name in the settings identifies the process. A number distinguishes the process's members of
        // one group.
        let instance = match &self.settings.instance {
            Some(name) => {
                let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
                let number = members.entry(group.to_owned()).or_insert(0);
                *number += 1;
                Some(format!("{name}.{}", *number - 1))
            }
            None => instance.map(str::to_owned),
        };
        let group = self.settings.on_cluster(group);
        Ok(Box::new(Member::join(&self.settings, self.cluster.clone(), group, topics, instance.as_deref())?))
    }
}

#[async_trait]
impl Bus for KafkaBus {
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        self.member(group, topics, None).await
    }

    async fn join_as(&self, group: &str, topics: &[&str], instance: &str) -> Result<Box<dyn Consumer>, BusError> {
        self.member(group, topics, Some(instance)).await
    }

    async fn sent_since(&self, service: &str, ends: &Ends) -> Result<Vec<Delivery>, BusError> {
        let mut on_cluster = Ends::default();
        for topic in ends.topics() {
            let name = self.settings.on_cluster(topic);
            on_cluster.name(&name);
            ends.partitions(topic).for_each(|(partition, next)| on_cluster.set(&name, partition, next));
        }
        let mut sent = sent::since(&self.settings, self.cluster.clone(), service.into(), on_cluster).await?;
        if self.settings.has_prefix() {
            for Delivery { partition, .. } in &mut sent {
                partition.topic = self.settings.without_prefix(&partition.topic).unwrap_or(&partition.topic).into();
            }
        }
        Ok(sent)
    }
}
