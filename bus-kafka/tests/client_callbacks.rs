//! Tests a client that calls back for logs and statistics between messages.
#![allow(clippy::unwrap_used)]

mod post;

use std::time::Duration;

use annals_kafka::{KafkaBus, Settings};
use annals_tests::kafka::brokers;
use tokio::time::{sleep, timeout};
use tracing_subscriber::filter::LevelFilter;
use uuid::Uuid;

const LETTERS: usize = 20;
/// Half of the time that the test would take if each letter waited for the regular poll, which runs once a second.
const SECONDS: Duration = Duration::from_secs(LETTERS as u64 / 2);

/// Sends messages (letters) one by one, and waits before each of them, so that the client has time to call back.
async fn keeps_no_letter_waiting(settings: Settings) {
    let bus = KafkaBus::connect(settings.partitions(1)).await.unwrap();
    let topic = format!("letters-{}", Uuid::new_v4().simple());
    let mut consumer = post::reader(&bus, &topic).await;
    let first = async {
        let sent = post::send(&bus, &topic).await;
        assert_eq!(post::receive(&mut *consumer).await, sent);
    };
    // Joining the group takes a moment.
    timeout(3 * SECONDS, first).await.expect("the first letter was kept waiting");
    let there_and_back = async {
        for _ in 0..LETTERS {
            sleep(Duration::from_millis(50)).await;
            let sent = post::send(&bus, &topic).await;
            assert_eq!(post::receive(&mut *consumer).await, sent);
        }
    };
    timeout(SECONDS, there_and_back).await.expect("letters were kept waiting");
}

fn settings() -> Settings {
    Settings::new(&brokers())
}

#[tokio::test]
async fn log_callbacks_delay_no_message() {
    // The client checks, when it is created, whether anybody subscribes to its log output.
    tracing_subscriber::fmt().with_max_level(LevelFilter::DEBUG).with_writer(std::io::sink).init();
    keeps_no_letter_waiting(settings().set("debug", "consumer,cgrp,topic,fetch")).await;
}

#[tokio::test]
async fn statistics_callbacks_delay_no_message() {
    keeps_no_letter_waiting(settings().set("statistics.interval.ms", "20")).await;
}
