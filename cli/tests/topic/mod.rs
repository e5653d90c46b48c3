//! Reads and changes topics as an outsider does: with a plain client, without any code of this project.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaResult,
    message::{Header, Headers, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};

const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub key: String,
    pub payload: String,
    pub headers: BTreeMap<String, String>,
}

fn client(brokers: &str) -> BaseConsumer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", "plain").set("enable.auto.commit", "false");
    config.set("allow.auto.create.topics", "false").create().unwrap()
}

/// Returns the first offset and the end offset of each partition.
fn ranges(consumer: &BaseConsumer, topic: &str) -> KafkaResult<Vec<(i64, i64)>> {
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
    let partitions = metadata.topics()[0].partitions().len() as i32;
    (0..partitions).map(|partition| consumer.fetch_watermarks(topic, partition, PATIENCE)).collect()
}

/// Returns the number of messages. Returns 0 if the topic does not exist yet or its partitions have no leaders yet.
pub fn size(brokers: &str, topic: &str) -> i64 {
    ranges(&client(brokers), topic).map_or(0, |ranges| ranges.iter().map(|(low, high)| high - low).sum())
}

/// Returns all messages of a topic, by partition and offset.
pub fn all(brokers: &str, topic: &str) -> Vec<Record> {
    let consumer = client(brokers);
    let mut list = TopicPartitionList::new();
    let mut left = 0;
    for (partition, (low, high)) in ranges(&consumer, topic).unwrap().into_iter().enumerate() {
        list.add_partition_offset(topic, partition as i32, Offset::Offset(low)).unwrap();
        left += high - low;
    }
    consumer.assign(&list).unwrap();
    let text = |bytes: Option<&[u8]>| String::from_utf8(bytes.unwrap_or_default().to_vec()).unwrap();
    let mut records = Vec::new();
    while left > 0 {
        let record = consumer.poll(PATIENCE).unwrap().unwrap();
        let headers = record.headers().into_iter().flat_map(Headers::iter);
        let headers = headers.map(|header| (header.key.to_owned(), text(header.value))).collect();
        records.push(Record {
            partition: record.partition(),
            offset: record.offset(),
            key: text(record.key()),
            payload: text(record.payload()),
            headers,
        });
        left -= 1;
    }
    records.sort();
    records
}

/// Sends one message.
pub fn send(brokers: &str, topic: &str, key: &str, payload: &str, headers: &[(&str, &str)]) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let all =
        headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(*value) }));
    producer.send(BaseRecord::to(topic).key(key).payload(payload).headers(all)).map_err(|(error, _)| error).unwrap();
    producer.flush(PATIENCE).unwrap();
}

/// Removes the messages before an offset, as retention does.
pub async fn cut(brokers: &str, topic: &str, partition: i32, before: i64) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, partition, Offset::Offset(before)).unwrap();
    admin.delete_records(&list, &AdminOptions::new()).await.unwrap();
}

/// Compacts a topic with one partition, so that brokers keep only the last message of each key.
pub async fn make_compacted(brokers: &str, topic: &str) {
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers).create().unwrap();
    let new = NewTopic::new(topic, 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact,delete");
    admin.create_topics([&new], &AdminOptions::new()).await.unwrap().remove(0).unwrap();
}
