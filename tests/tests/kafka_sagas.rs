//! Sagas wait while brokers are away.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{MemoryStore, saga::Status};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::{
    kafka::Broker,
    trip::{World, trip},
};
use tokio::time::sleep;
use uuid::Uuid;

const ALL: [&str; 3] = ["shop", "hotel", "bank"];
/// How long a step waits for its reply. All attempts together take long enough for consumers to find a broker that has
/// come back.
const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPTS: u32 = 12;
/// Longer than all attempts together.
const AWAY: Duration = Duration::from_secs(30);
const DRAIN: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_broker_outage_uses_up_no_attempts() {
    let mut broker = Broker::start();
    let world = World::new(Arc::new(MemoryStore::new()), trip(TIMEOUT, ATTEMPTS));
    let bus = KafkaBus::connect(Settings::new(&broker.address()).partitions(1)).await.unwrap();
    let runtime = world.start_over(Arc::new(bus), &ALL).await;
    world.request("before", Uuid::new_v4(), None).await;
    world.becomes("before", Status::Completed).await;
    broker.kill();
    world.request("meanwhile", Uuid::new_v4(), None).await;
    // During this time, nothing may happen.
    sleep(AWAY).await;
    let status = world.status("meanwhile").await.unwrap();
    assert_eq!((status.status, status.attempts), (Status::Running, 1), "{status:?}");
    broker.resume();
    world.becomes("meanwhile", Status::Completed).await;
    assert_eq!(world.ledger("meanwhile").await, ["book", "charge", "confirm", "announce"]);
    runtime.drain(DRAIN).await.unwrap();
}
