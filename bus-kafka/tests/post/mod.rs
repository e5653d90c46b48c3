//! Sends and reads letters, the messages of these tests.

use annals::{
    Bus, Consumer, Message, Metadata, Position, Publisher, Version,
    bus::{Outgoing, Polled},
};
use annals_kafka::KafkaBus;
use uuid::Uuid;

fn letter(id: Uuid) -> Message {
    Message {
        id,
        type_name: "letter.sent".into(),
        schema_version: 1,
        source: "post".into(),
        subject: "letter-1".into(),
        key: "letter-1".into(),
        data: "{}".into(),
        metadata: Metadata::of_request(id),
        time: chrono::DateTime::UNIX_EPOCH,
        position: Position(1),
        version: Version(1),
        lane: None,
        extensions: Default::default(),
    }
}

/// Sends a letter, and waits until the brokers have acknowledged it.
pub async fn send(bus: &KafkaBus, topic: &str) -> Uuid {
    let id = Uuid::new_v4();
    bus.publish(vec![Outgoing { topic: topic.into(), message: letter(id) }]).await.unwrap().await.unwrap();
    id
}

/// Returns the next letter. The first call starts at the beginning of the topic.
pub async fn receive(consumer: &mut dyn Consumer) -> Uuid {
    loop {
        match consumer.poll(1).await.unwrap() {
            Polled::Assigned(partitions) => consumer.seek(&partitions[0], None).await.unwrap(),
            Polled::Messages(messages) => {
                let [letter] = &*messages else { panic!("one message at a time was requested: {messages:?}") };
                consumer.acknowledge(&letter.partition, letter.offset + 1).await.unwrap();
                return letter.id();
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Joins a group that reads the topic.
pub async fn reader(bus: &KafkaBus, topic: &str) -> Box<dyn Consumer> {
    bus.join(&format!("reader-of-{topic}"), &[topic]).await.unwrap()
}
