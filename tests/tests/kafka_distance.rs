//! If brokers are distant, a saga or a page of messages costs a number of round trips that does not depend on the
//! number of partitions.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{
    Health, MemoryStore, Message, Metadata, Position, Publisher, Runtime, Version, bus::Outgoing, health::State,
    saga::Status,
};
use annals_kafka::{KafkaBus, Settings, partition_of};
use annals_tests::{
    kafka::Broker,
    trip::{World, trip},
};
use tokio::time::sleep;
use uuid::Uuid;

/// The maximum number of round trips per saga.
const ROUND_TRIPS_MAX: u32 = 25;
const LOOK: Duration = Duration::from_millis(2);
const DRAIN: Duration = Duration::from_secs(60);
const TIMEOUT: Duration = Duration::from_secs(60);

fn message(topic: &Arc<str>, key: &str, number: i64) -> Outgoing {
    let id = Uuid::new_v4();
    let message = Message {
        id,
        type_name: "tally.added".into(),
        schema_version: 1,
        source: "near".into(),
        subject: key.into(),
        key: key.into(),
        data: format!(r#"{{"amount":{number}}}"#).into(),
        metadata: Metadata::of_request(id),
        time: chrono::DateTime::UNIX_EPOCH,
        position: Position(number),
        version: Version(1),
        lane: None,
        extensions: BTreeMap::new(),
    };
    Outgoing { topic: topic.clone(), message }
}

/// Returns a key for each partition.
fn keys(partitions: u32) -> Vec<String> {
    let key_of = |partition| {
        let of = |number: &u32| partition_of(&format!("tally-{number}"), partitions) == partition;
        format!("tally-{}", (0..).find(of).unwrap())
    };
    (0..partitions).map(key_of).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_to_forty_partitions_take_few_round_trips() {
    let one_way = Duration::from_millis(25);
    let broker = Broker::at_distance(one_way).await;
    let bus = KafkaBus::connect(Settings::new(&broker.address()).partitions(40)).await.unwrap();
    let topic: Arc<str> = "far.events".into();
    let keys = keys(40);
    let page = |each: i64| -> Vec<Outgoing> {
        let messages = (0..each).flat_map(|number| keys.iter().map(move |key| (key, number)));
        messages.map(|(key, number)| message(&topic, key, number)).collect()
    };
    // The first message of each partition is sent alone, and the messages behind it wait. Partitions do not wait for
    // each other.
    bus.publish(page(3)).await.unwrap().await.unwrap();
    let mut least = u32::MAX;
    for _ in 0..3 {
        let sent_at = Instant::now();
        bus.publish(page(1)).await.unwrap().await.unwrap();
        least = least.min((sent_at.elapsed().as_micros() / (2 * one_way).as_micros()) as u32);
    }
    assert!(least <= 5, "{least} round trips");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn burst_and_outage_open_few_connections() {
    let mut broker = Broker::at_distance(Duration::ZERO).await;
    let bus = Arc::new(KafkaBus::connect(Settings::new(&broker.address()).partitions(8)).await.unwrap());
    let topic: Arc<str> = "burst.events".into();
    let keys = keys(8);
    let warm = keys.iter().map(|key| message(&topic, key, 1)).collect();
    bus.publish(warm).await.unwrap().await.unwrap();
    let before = broker.accepted();
    let burst = (0..200).map(|number| {
        let bus = bus.clone();
        let message = message(&topic, &keys[number % 8], number as i64);
        tokio::spawn(async move { bus.publish(vec![message]).await.unwrap().await.unwrap() })
    });
    for published in burst.collect::<Vec<_>>() {
        published.await.unwrap();
    }
    assert_eq!(broker.accepted(), before, "a burst opened connections");
    // Each client reconnects each connection at most once a second, after a few quick attempts.
    let away = Duration::from_secs(5);
    broker.kill();
    sleep(away).await;
    let tried = broker.accepted() - before;
    assert!(tried <= before * 12, "{tried} tries within {away:?} by {before} connections");
    broker.resume();
    bus.publish(vec![message(&topic, &keys[0], 1)]).await.unwrap().await.unwrap();
}

/// Waits until all parts are healthy, and then until one of them gets into trouble. Returns that part and its state.
fn watch(healths: Vec<Health>) -> tokio::task::JoinHandle<String> {
    tokio::spawn(async move {
        while !healths.iter().all(Health::is_fine) {
            sleep(LOOK).await;
        }
        loop {
            for (part, state) in healths.iter().flat_map(Health::parts) {
                if matches!(state, State::Trouble(_) | State::Failed(_)) {
                    return format!("{part}: {state:?}");
                }
            }
            sleep(LOOK).await;
        }
    })
}

/// Runs this many sagas at once over three services, each with its own bus, and measures them. Returns the median
/// duration of a saga, in round trips. Only the best round counts, because a busy machine delays whole rounds.
async fn sagas(one_way: Duration, at_once: usize, rounds: usize) -> u32 {
    let broker = Broker::at_distance(one_way).await;
    let world = World::new(Arc::new(MemoryStore::new()), trip(TIMEOUT, 3));
    let mut runtimes: Vec<Runtime> = Vec::new();
    for service in ["shop", "hotel", "bank"] {
        let bus = KafkaBus::connect(Settings::new(&broker.address()).partitions(8)).await.unwrap();
        runtimes.push(world.start_over(Arc::new(bus), &[service]).await);
    }
    let watched = watch(runtimes.iter().map(Runtime::health).collect());
    let mut least = Duration::MAX;
    // The first round warms up clients and topics.
    for round in 0..=rounds {
        let asked_at = Instant::now();
        let ids: Vec<String> = (0..at_once).map(|number| format!("r{round}n{number}")).collect();
        for id in &ids {
            world.request(id, Uuid::new_v4(), None).await;
        }
        let mut running = ids;
        let mut times = Vec::new();
        while !running.is_empty() {
            sleep(LOOK).await;
            let mut still = Vec::new();
            for id in running {
                match world.status(&id).await {
                    Some(status) if status.status == Status::Completed => times.push(asked_at.elapsed()),
                    _ => still.push(id),
                }
            }
            running = still;
            assert!(asked_at.elapsed() < TIMEOUT, "{} of {at_once} have not ended", running.len());
        }
        if round > 0 {
            least = least.min(times[times.len() / 2]);
        }
    }
    if watched.is_finished() {
        panic!("health flapped: {}", watched.await.unwrap());
    }
    for runtime in runtimes {
        runtime.drain(DRAIN).await.unwrap();
    }
    (least.as_micros() / (2 * one_way).as_micros()) as u32
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saga_takes_few_round_trips() {
    for (one_way, at_once, rounds) in [(20, 1, 5), (20, 40, 6)] {
        let taken = sagas(Duration::from_millis(one_way), at_once, rounds).await;
        assert!(taken <= ROUND_TRIPS_MAX, "{taken} round trips of {} ms, {at_once} at once", 2 * one_way);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_steady_at_a_distance_of_100_ms() {
    let taken = sagas(Duration::from_millis(100), 100, 1).await;
    assert!(taken <= 2 * ROUND_TRIPS_MAX, "{taken} round trips");
}
