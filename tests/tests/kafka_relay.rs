//! A relay that is killed or stopped at any moment skips no message. Messages that the relay sends twice are handled
//! once.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use kafka::{
    DRAIN, Load, Pair,
    process::{self, Point, Role, Task},
};
use tokio::time::sleep;

/// The number of kills, at random moments.
const KILLS: u64 = 10;
/// After this time, a stopped instance has lost its lanes.
const PAST_THE_LEASE: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(5);

/// Runs the task of a child process. In the parent process, this test does nothing.
#[test]
fn process() {
    process::run();
}

fn relay(pair: &Pair) -> Task {
    let pair = pair.clone();
    let role = Role::Relay;
    Task { pair, role, instance: None, lanes: 1, point: Point::Nowhere, passes: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relay_killed_at_each_point_loses_nothing() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let points =
        [Point::Read, Point::Sent, Point::Acknowledged, Point::BeforeCommit, Point::InCommit, Point::AfterCommit];
    for point in points {
        for passes in [0, 2] {
            let sent = pair.sent().await;
            let mut process = Task { point, passes, ..relay(&pair) }.start();
            process.reached().await;
            if point == Point::Sent {
                // Waits until part of the page has arrived. If `passes` is above zero, that part may belong to an
                // earlier page.
                while pair.sent().await == sent {}
            }
            process.kill();
        }
    }
    load.end().await;
    let last = pair.relay().await;
    let repeated = pair.agrees().await;
    assert!(repeated > 0, "no page was sent twice: the kills came at the wrong moments");
    last.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    for kill in 0..KILLS {
        let mut process = relay(&pair).start();
        if kill > 0 {
            process.started().await;
        }
        sleep(Duration::from_micros(RandomState::new().hash_one(kill) % 400_000)).await;
        process.kill();
    }
    load.end().await;
    let last = pair.relay().await;
    pair.agrees().await;
    last.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_relay_hands_its_lanes_to_the_other() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let shared = |name: &str| Task { instance: Some(name.into()), lanes: 4, ..relay(&pair) };
    let mut one = shared("one").start();
    let mut other = shared("other").start();
    one.started().await;
    other.started().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    held_by_each_of(&pair, ["one", "other"]).await;
    one.kill();
    held_by_each_of(&pair, ["other", "other"]).await;
    load.end().await;
    pair.agrees().await;
    other.kill();
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relay_stopped_past_its_lease_sends_only_old_pages() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let shared = |name: &str, point| Task { instance: Some(name.into()), lanes: 4, point, passes: 20, ..relay(&pair) };
    let mut zombie = shared("one", Point::ReadThenOn).start();
    let mut other = shared("other", Point::Nowhere).start();
    zombie.started().await;
    other.started().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    zombie.reached().await;
    zombie.stop();
    let stopped = tokio::time::Instant::now();
    held_by_each_of(&pair, ["other", "other"]).await;
    sleep(PAST_THE_LEASE.saturating_sub(stopped.elapsed())).await;
    let mut sql = pair.sql().await;
    let before = (sql.events().await, pair.sent().await);
    zombie.wake();
    // The woken relay sends the page that it had read, and is fenced when it tries to move its checkpoint. After that,
    // the relay takes its share of the lanes again.
    held_by_each_of(&pair, ["one", "other"]).await;
    load.end().await;
    let repeated = pair.agrees().await;
    assert!(repeated > 0, "the zombie sent nothing; before it woke: {before:?}");
    zombie.kill();
    other.kill();
    consumer.drain(DRAIN).await.unwrap();
}

/// Waits until all four lanes are held by these instances, and each of them holds at least one.
async fn held_by_each_of(pair: &Pair, names: [&str; 2]) {
    let mut sql = pair.sql().await;
    let statement = "SELECT body ->> 'holder' FROM annals.documents
                      WHERE collection = 'checkpoint' AND id LIKE '%.relay/%' AND body ->> 'holder' IS NOT NULL";
    let held = tokio::time::timeout(kafka::RECOVERY, async {
        loop {
            let holders: Vec<String> =
                sqlx::query_scalar(sql.source.sql(statement)).fetch_all(&mut sql.connection).await.unwrap();
            let all_are_named = holders.iter().all(|holder| names.contains(&&**holder));
            let all_hold = names.iter().all(|name| holders.iter().any(|holder| holder == name));
            if holders.len() == 4 && all_are_named && all_hold {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    held.await.unwrap_or_else(|_| panic!("never held by {names:?}"));
}
