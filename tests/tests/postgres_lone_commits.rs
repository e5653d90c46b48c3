//! Tests a store that is the only store on its database, and whose commits come one at a time.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::BTreeSet, time::Duration};

use annals::{CommitError, EventStore, Position};
use sqlx::{PgConnection, postgres::PgListener};
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinSet,
    time::{Instant, timeout},
};

use self::postgres::{PROMPTLY, Schema, append, numbers, url, whole_log};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The first runtime's connection ended with that runtime.
#[test]
fn runtimes_commit_one_after_the_other_to_one_store() {
    let schema = Schema::new();
    let first = runtime();
    let store = first.block_on(async {
        let store = schema.store().await;
        store.commit(append("thing-1", 0, 1)).await.unwrap();
        store
    });
    first.shutdown_timeout(Duration::from_secs(5));
    let second = runtime();
    let committed = second.block_on(store.commit(append("thing-1", 1, 1)));
    assert_eq!(committed.unwrap().position, Position(2));
    second.block_on(async { assert_eq!(numbers(&whole_log(&schema.store().await).await), [1, 2]) });
}

/// The caller of a single commit may give up at any moment. The commit succeeds as a whole or not at all, and the next
/// commit succeeds. No session is left with an open transaction.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_lone_commit_leaves_nothing_half_done() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("thing-0", 0, 1)).await.unwrap();
    for n in 1..=200 {
        let commit = store.commit(append(&format!("thing-{n}"), 0, 3));
        timeout(Duration::from_micros(fastrand::u64(0..2_000)), commit).await.ok();
    }
    let last = store.commit(append("thing-201", 0, 1)).await.unwrap();
    // The previous commit may still be in progress.
    store.close().await.unwrap();
    let log = whole_log(&schema.store().await).await;
    assert!(log.iter().any(|event| event.position == last.position && event.stream.id() == "201"));
    for n in 1..=200 {
        let events = log.iter().filter(|event| event.stream.id() == n.to_string()).count();
        assert!(events == 3 || events == 0, "{events} of 3 events");
    }
    assert_eq!(idle_in_transaction(&mut schema.connection().await, &schema).await, 0);
}

async fn idle_in_transaction(connection: &mut PgConnection, schema: &Schema) -> i64 {
    let sql =
        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND query LIKE '%' || $1 || '%'";
    sqlx::query_scalar(sql).bind(schema.name()).fetch_one(connection).await.unwrap()
}

/// Commits come one at a time, then all at once, then one at a time again. Each commit succeeds once, and no position
/// stays empty.
#[tokio::test(flavor = "multi_thread")]
async fn lone_and_grouped_commits_alternate() {
    let schema = Schema::new();
    let store = schema.store().await;
    for round in 0..20 {
        for n in 0..5 {
            store.commit(append("alone-1", round * 5 + n, 1)).await.unwrap();
        }
        let mut crowd = JoinSet::new();
        for n in 0..50 {
            let store = store.clone();
            crowd.spawn(async move { store.commit(append(&format!("crowd-{n}"), round, 1)).await });
        }
        for committed in crowd.join_all().await {
            committed.unwrap();
        }
    }
    let log = whole_log(&store).await;
    assert_eq!(numbers(&log), (1..=20 * 55).collect::<Vec<i64>>());
    let places: BTreeSet<_> = log.iter().map(|event| (&event.stream, event.version)).collect();
    assert_eq!(places.len(), log.len());
}

/// A single commit that expects the wrong version gets a conflict and uses up no position.
#[tokio::test]
async fn lone_conflict_uses_no_position() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("thing-1", 0, 1)).await.unwrap();
    for expected in [0, 2, 7] {
        let outcome = store.commit(append("thing-1", expected, 1)).await;
        assert!(matches!(outcome, Err(CommitError::Conflict { .. })), "{outcome:?}");
    }
    assert_eq!(store.commit(append("thing-1", 1, 1)).await.unwrap().position, Position(2));
}

/// As long as no other store is connected, the store sends no notifications. Once another store announces itself, that
/// store receives notifications.
#[tokio::test(flavor = "multi_thread")]
async fn other_stores_are_notified_as_soon_as_one_listens() {
    let schema = Schema::new();
    let store = schema.store().await;
    let channel = format!("{}.events", schema.name());
    let mut outside = PgListener::connect(&url()).await.unwrap();
    outside.listen(&channel).await.unwrap();
    // Waits until the store has registered as a listener. Before that, the store sends no notifications.
    let attending = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 'annals.events'::regclass AND objid = 1024";
    let mut connection = schema.connection().await;
    let started = Instant::now();
    while sqlx::query_scalar::<_, i64>(schema.sql(attending)).fetch_one(&mut connection).await.unwrap() == 0 {
        assert!(started.elapsed() < PROMPTLY, "the store does not attend");
    }
    for version in 0..10 {
        store.commit(append("thing-1", version, 1)).await.unwrap();
    }
    // PostgreSQL delivers a notification to a session before the answer to a later query.
    tokio::time::sleep(Duration::from_millis(200)).await;
    sqlx::query("SELECT 1").execute(&mut outside).await.unwrap();
    assert!(outside.next_buffered().is_none(), "the other store was notified before it listened");

    let attend = "SELECT pg_advisory_lock_shared('annals.events'::regclass::oid::int, 1024)";
    sqlx::query(schema.sql(attend)).execute(&mut outside).await.unwrap();
    store.commit(append("thing-1", 10, 1)).await.unwrap();
    let notification = timeout(PROMPTLY, outside.recv()).await.expect("the other store was not notified").unwrap();
    assert_eq!(notification.channel(), channel);
}

/// Another store receives a notification of each commit long before its next poll.
#[tokio::test(flavor = "multi_thread")]
async fn other_store_is_notified_of_each_commit() {
    let schema = Schema::new();
    let here = schema.store().await;
    let there = schema.store().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut took = Vec::new();
    for version in 0..4 {
        let after = Position(version);
        let waiting = tokio::spawn({
            let there = there.clone();
            async move { there.wait(after).await.map(|()| Instant::now()) }
        });
        // After this pause, the store has finished its first, frequent polls, and polls only once a second.
        tokio::time::sleep(Duration::from_millis(1_600)).await;
        let asked = Instant::now();
        here.commit(append("thing-1", version, 1)).await.unwrap();
        took.push(timeout(PROMPTLY, waiting).await.unwrap().unwrap().unwrap() - asked);
    }
    took.sort();
    assert!(took[1] < Duration::from_millis(200), "half of them took longer: {took:?}");
}
