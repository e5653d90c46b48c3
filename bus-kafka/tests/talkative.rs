//! A client that has a lot to tell beside the messages.
#![allow(clippy::unwrap_used)]

mod post;

use std::time::Duration;

use annals_kafka::{KafkaBus, Settings};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

/// Seconds for what takes milliseconds. Were only one thing told at each look at the client, it would be minutes.
const SECONDS: Duration = Duration::from_secs(20);

#[tokio::test]
async fn what_the_client_tells_keeps_no_message_waiting() {
    let brokers = std::env::var("KAFKA_BROKERS").expect("KAFKA_BROKERS: run this with ./test");
    let settings = Settings::new(&brokers).partitions(1);
    let settings = settings.set("debug", "consumer,cgrp,topic,fetch").set("statistics.interval.ms", "20");
    let bus = KafkaBus::connect(settings).await.unwrap();
    let topic = format!("letters-{}", Uuid::new_v4().simple());
    let mut consumer = post::reader(&bus, &topic).await;
    let there_and_back = async {
        for _ in 0..20 {
            let sent = post::send(&bus, &topic).await;
            assert_eq!(post::receive(&mut *consumer).await, sent);
            // In between, there is something to tell, and nobody who asks.
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(SECONDS, there_and_back).await.expect("a letter was kept waiting");
}
