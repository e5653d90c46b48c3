//! Consumers that are killed, stopped, or come and go: each message has its effect once, in order.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use annals::Runtime;
use kafka::{
    DRAIN, Load, Pair,
    process::{self, Point, Role, Task},
    shows,
};
use tokio::time::{Instant, interval, sleep};

const KILLS: u64 = 10;
const PAUSE: Duration = Duration::from_millis(10);
/// A member that is gone without a word holds its partitions for so long.
const SHORT_SESSION_MS: &str = "1500";
/// The group has given a stopped member up, by the usual settings.
const PAST_THE_SESSION: Duration = Duration::from_secs(12);
const MEMBERS: usize = 8;
const COMING_AND_GOING: Duration = Duration::from_secs(30);

/// What the processes run.
#[test]
fn process() {
    process::run();
}

fn consumer(pair: &Pair) -> Task {
    let (pair, role) = (pair.clone(), Role::Consumer);
    Task { pair, role, instance: None, lanes: 1, point: Point::Nowhere, passes: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_between_its_commit_and_its_offset() {
    let pair = Pair::new().await.set("session.timeout.ms", SHORT_SESSION_MS);
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    for point in [Point::Offset, Point::BeforeCommit, Point::InCommit, Point::AfterCommit] {
        let mut process = Task { point, passes: 3, ..consumer(&pair) }.start();
        process.reached().await;
        process.kill();
    }
    load.end().await;
    let last = pair.consumer().await;
    pair.agrees().await;
    last.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment() {
    let pair = Pair::new().await.set("session.timeout.ms", SHORT_SESSION_MS);
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    let mut sql = pair.sql().await;
    for kill in 0..KILLS {
        let before = sql.copies().await;
        let mut process = consumer(&pair).start();
        process.started().await;
        // Every second one at its start, before the group has given it anything; the others while they work.
        while kill % 2 == 1 && sql.copies().await == before {
            sleep(Duration::from_millis(1)).await;
        }
        sleep(Duration::from_micros(RandomState::new().hash_one(kill) % 100_000)).await;
        process.kill();
    }
    load.end().await;
    let last = pair.consumer().await;
    pair.agrees().await;
    last.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_past_its_session_it_changes_nothing() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    let load = Load::start(pair.source_store().await, PAUSE);
    // It stops with a batch in hand that it has not committed.
    let mut zombie = Task { point: Point::InCommit, passes: 20, ..consumer(&pair) }.start();
    zombie.reached().await;
    zombie.stop();
    let stopped_at = Instant::now();
    let other = pair.consumer().await;
    let mut sql = pair.sql().await;
    let before = sql.copies().await;
    sleep(PAST_THE_SESSION.saturating_sub(stopped_at.elapsed())).await;
    while sql.copies().await == before {
        assert!(stopped_at.elapsed() < kafka::RECOVERY, "nobody has taken over");
        sleep(Duration::from_millis(20)).await;
    }
    zombie.wake();
    // It takes its share again.
    sleep(Duration::from_secs(1)).await;
    load.end().await;
    pair.agrees().await;
    zombie.kill();
    other.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_members_come_and_go() {
    let pair = Pair::new().await.set("partitions", "12");
    let relay = pair.relay().await;
    let mut members: [Option<Runtime>; MEMBERS] = Default::default();
    for member in &mut members {
        *member = Some(pair.consumer().await);
    }
    let load = Load::start(pair.source_store().await, PAUSE);
    let started_at = Instant::now();
    let mut turn = interval(Duration::from_secs(2));
    let mut slots = (0..MEMBERS).cycle();
    while started_at.elapsed() < COMING_AND_GOING {
        turn.tick().await;
        for _ in 0..2 {
            let (leaving, coming) = (slots.next().unwrap(), slots.clone().nth(MEMBERS / 2).unwrap());
            match members[leaving].take() {
                Some(member) if leaving % 2 == 0 => member.drain(DRAIN).await.unwrap(),
                // In the middle of what it does.
                member => drop(member),
            }
            if members[coming].is_none() {
                members[coming] = Some(pair.consumer().await);
            }
        }
    }
    load.end().await;
    pair.agrees().await;
    for member in members.into_iter().flatten() {
        shows(&member, "fine", |parts| !kafka::in_trouble(parts)).await;
        member.drain(DRAIN).await.unwrap();
    }
    relay.drain(DRAIN).await.unwrap();
}
