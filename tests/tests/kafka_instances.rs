//! Group members are named after the instance of their process. After a crash, a member is back at once under its name,
//! or is replaced within seconds. Only one member can use a name.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{Runtime, health::State};
use kafka::{
    DRAIN, Pair, Sql, add,
    process::{self, Point, Role, Task},
    shows, until,
};
use tokio::time::Instant;

/// Less than the time after which the group gives the partitions of a silent member to others.
const AT_ONCE: Duration = Duration::from_secs(4);
/// The maximum time for a takeover from a killed member. This time is longer than the time after which the group gives
/// the partitions of a silent member to others.
const TAKEN_OVER: Duration = Duration::from_secs(9);

/// The task of the child processes.
#[test]
fn process() {
    process::run();
}

fn consumer(pair: &Pair, instance: &str) -> Task {
    let pair = pair.clone();
    let role = Role::Consumer;
    let instance = Some(instance.to_owned());
    Task { pair, role, instance, lanes: 1, point: Point::Nowhere, passes: 0 }
}

async fn named(pair: &Pair, instance: &str) -> Runtime {
    pair.start_consumer(pair.sink_store().await, Arc::new(pair.bus().await), Some(instance)).await
}

/// Returns the time until these rounds are handled.
async fn handled(pair: &Pair, sql: &mut Sql, rounds: std::ops::Range<i64>) -> Duration {
    let asked_at = Instant::now();
    add(&pair.source_store().await, rounds).await;
    pair.handled(sql).await;
    asked_at.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_member_rejoins_at_once_under_its_name() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let mut one = consumer(&pair, "one").start();
    let mut other = consumer(&pair, "other").start();
    one.started().await;
    other.started().await;
    handled(&pair, &mut sql, 0..5).await;
    for round in [5, 10] {
        one.kill();
        one = consumer(&pair, "one").start();
        one.started().await;
        let taken = handled(&pair, &mut sql, round..round + 5).await;
        assert!(taken < AT_ONCE, "{taken:?}");
    }
    // The killed instance does not come back, and the other instance takes over.
    one.kill();
    let taken = handled(&pair, &mut sql, 15..20).await;
    assert!(taken < TAKEN_OVER, "{taken:?}");
    pair.agrees().await;
    other.kill();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_member_is_replaced_at_once() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let one = named(&pair, "one").await;
    let other = named(&pair, "other").await;
    handled(&pair, &mut sql, 0..5).await;
    one.drain(DRAIN).await.unwrap();
    let taken = handled(&pair, &mut sql, 5..10).await;
    assert!(taken < AT_ONCE, "{taken:?}");
    pair.agrees().await;
    other.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_of_two_members_with_one_name_reports_its_end() {
    // On one store, the two instances would detect each other by their heartbeats. With this setting, they can notice
    // each other only in the Kafka group.
    let pair = Pair::new().await.set("group.instance.id", "the only one");
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let first = pair.consumer().await;
    handled(&pair, &mut sql, 0..5).await;
    let second = pair.consumer().await;
    shows(&first, "failed", |parts| {
        let reason = |state: &State| matches!(state, State::Failed(reason) if reason.contains("another process runs under instance name"));
        parts.values().any(reason)
    })
    .await;
    assert!(!first.health().is_fine());
    until("the second handles all", async || {
        handled(&pair, &mut sql, 5..6).await;
        true
    })
    .await;
    shows(&second, "fine", |parts| !kafka::in_trouble(parts)).await;
    let error = first.drain(DRAIN).await.unwrap_err();
    assert!(error.to_string().contains("another process runs under instance name"), "{error}");
    second.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}

/// If a member was stopped for longer than a session lasts, its own earlier session may still hold its name. A broker
/// fences this member too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fenced_member_that_is_alone_under_its_name_continues() {
    let pair = Pair::new().await.set("group.instance.id", "the only one");
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let mut one = consumer(&pair, "one").start();
    one.started().await;
    handled(&pair, &mut sql, 0..5).await;
    for round in [5, 10] {
        let mut passing = consumer(&pair, "passing").start();
        passing.started().await;
        handled(&pair, &mut sql, round..round + 3).await;
        passing.kill();
        handled(&pair, &mut sql, round + 3..round + 5).await;
    }
    pair.agrees().await;
    one.kill();
    relay.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_one_process_do_not_fence_each_other() {
    let pair = Pair::new().await.set("group.instance.id", "node 1/größe");
    let relay = pair.relay().await;
    let mut sql = pair.sql().await;
    let mut runtime = Runtime::new();
    let store = pair.sink_store().await;
    let copier = annals::Group::new(&pair.group(), &[&pair.topic()], annals_tests::tally::Copier::new(store.clone()));
    let service = annals::Service::new(&pair.group(), store).consume(copier.members(3));
    runtime.start(vec![service], Arc::new(pair.bus().await)).await.unwrap();
    handled(&pair, &mut sql, 0..5).await;
    pair.agrees().await;
    shows(&runtime, "fine", |parts| !kafka::in_trouble(parts)).await;
    assert_eq!(runtime.health().parts().keys().filter(|part| part.contains('#')).count(), 3);
    runtime.drain(DRAIN).await.unwrap();
    relay.drain(DRAIN).await.unwrap();
}
