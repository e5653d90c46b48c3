//! Reads a topic as other programs do: with a plain client, without any code of this project.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::{BorrowedMessage, Header, Headers, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
    types::RDKafkaErrorCode,
};
use uuid::Uuid;

/// The longest wait for an answer from the broker.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(50);

/// A record of the topic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Record {
    fn of(message: &BorrowedMessage<'_>) -> Self {
        let headers = message.headers().into_iter().flat_map(Headers::iter);
        Self {
            partition: message.partition(),
            offset: message.offset(),
            key: message.key().map(<[u8]>::to_vec),
            value: message.payload().map(<[u8]>::to_vec),
            headers: headers.map(|header| (header.key.to_owned(), header.value.map(<[u8]>::to_vec))).collect(),
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(key, _)| key == name)?;
        value.as_deref().map(|value| std::str::from_utf8(value).unwrap())
    }

    /// Returns the id of the event.
    pub fn id(&self) -> Uuid {
        self.header("ce_id").unwrap().parse().unwrap()
    }

    pub fn text_key(&self) -> &str {
        std::str::from_utf8(self.key.as_deref().unwrap()).unwrap()
    }
}

fn client(brokers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", "plain").set("enable.auto.commit", "false");
    config.set("enable.partition.eof", "true").set("allow.auto.create.topics", "false");
    config
}

/// Returns the first offset and the end offset of each partition. Returns an empty map if the topic does not exist.
pub fn ends(brokers: &str, topic: &str) -> BTreeMap<i32, (i64, i64)> {
    ends_by(&client(brokers).create().unwrap(), topic)
}

fn ends_by(consumer: &BaseConsumer, topic: &str) -> BTreeMap<i32, (i64, i64)> {
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
    let partitions = metadata.topics()[0].partitions().iter().map(|partition| partition.id());
    partitions.map(|partition| (partition, watermarks(consumer, topic, partition))).collect()
}

/// Returns the offsets of a partition. The partition may have no leader yet, or a new one.
fn watermarks(consumer: &BaseConsumer, topic: &str, partition: i32) -> (i64, i64) {
    let started_at = Instant::now();
    loop {
        match consumer.fetch_watermarks(topic, partition, PATIENCE) {
            Ok(watermarks) => return watermarks,
            Err(error) if started_at.elapsed() > PATIENCE => panic!("partition {partition} of {topic}: {error}"),
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

/// Returns the number of records in the topic.
pub fn count(brokers: &str, topic: &str) -> i64 {
    ends(brokers, topic).values().map(|(first, next)| next - first).sum()
}

/// Returns the broker that leads each partition.
pub fn leaders(brokers: &str, topic: &str) -> BTreeMap<i32, i32> {
    let consumer: BaseConsumer = client(brokers).create().unwrap();
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
    metadata.topics()[0].partitions().iter().map(|partition| (partition.id(), partition.leader())).collect()
}

/// Returns the whole topic, in order per partition.
pub fn read(brokers: &str, topic: &str) -> Vec<Record> {
    let consumer: BaseConsumer = client(brokers).create().unwrap();
    let mut waiting = ends_by(&consumer, topic);
    waiting.retain(|_, (first, next)| first < next);
    let mut list = TopicPartitionList::new();
    for partition in waiting.keys() {
        list.add_partition_offset(topic, *partition, Offset::Beginning).unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut records = Vec::new();
    let started_at = Instant::now();
    while !waiting.is_empty() {
        match consumer.poll(PATIENCE) {
            Some(Ok(message)) => {
                records.push(Record::of(&message));
                if waiting.get(&message.partition()).is_some_and(|(_, next)| message.offset() + 1 >= *next) {
                    waiting.remove(&message.partition());
                }
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => _ = waiting.remove(&partition),
            // One of several brokers is dead, and the client continues with the others.
            Some(Err(KafkaError::MessageConsumption(RDKafkaErrorCode::BrokerTransportFailure)))
                if started_at.elapsed() < PATIENCE => {}
            Some(Err(error)) => panic!("reading {topic}: {error}"),
            None => panic!("nothing came of {waiting:?} of {topic}"),
        }
    }
    records
}

/// Sends records to a topic unchanged, each to the partition of its key.
pub fn send(brokers: &str, topic: &str, records: &[Record]) {
    send_compressed(brokers, topic, records, "none");
}

/// Sends records in compressed batches.
pub fn send_compressed(brokers: &str, topic: &str, records: &[Record], codec: &str) {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("enable.idempotence", "true").set("partitioner", "murmur2_random");
    config.set("compression.type", codec).set("linger.ms", "50");
    let producer: BaseProducer = config.create().unwrap();
    for record in records {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: value.as_deref() });
        }
        let mut sent = BaseRecord::<[u8], [u8]>::to(topic).headers(headers);
        (sent.key, sent.payload) = (record.key.as_deref(), record.value.as_deref());
        producer.send(sent).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
}
