//! Many concurrent stream reads share sessions and statements, and each reader receives its own events.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{EventStore, StreamId, Version};
use annals_postgres::{PostgresStore, Settings};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use self::postgres::{PROMPTLY, Schema, append, url};

const STREAMS: usize = 300;

/// The number of events in stream number `number`.
fn length(number: usize) -> usize {
    1 + number % 7
}

/// Returns a store with one session for reads, and with streams of different lengths.
async fn filled(schema: &Schema, url: &str) -> PostgresStore {
    let settings = Settings { connections: 1, ..schema.settings() };
    let store = PostgresStore::connect(url, settings).await.unwrap();
    let mut written = JoinSet::new();
    for number in 0..STREAMS {
        let store = store.clone();
        written.spawn(async move { store.commit(append(&format!("thing-{number}"), 0, length(number))).await });
    }
    for committed in written.join_all().await {
        committed.unwrap();
    }
    store
}

/// Reads some events from a version within the stream.
async fn read(store: &PostgresStore, number: usize) {
    let after = number % 3;
    let limit = 1 + number % 4;
    let stream = StreamId::parse(&format!("thing-{number}")).unwrap();
    let events = store.read_stream(&stream, Version(after as i64), limit).await.unwrap();
    let expected: Vec<_> = (after + 1..=length(number)).take(limit).map(|version| version as i64).collect();
    assert_eq!(events.iter().map(|event| event.version.0).collect::<Vec<_>>(), expected, "{stream}");
    assert!(events.iter().all(|event| event.stream == stream), "{stream}: {events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reader_gets_its_own_stream() {
    let schema = Schema::new();
    let store = filled(&schema, &url()).await;
    let mut readers = JoinSet::new();
    for round in 0..5 {
        for number in 0..STREAMS {
            let store = store.clone();
            // Some of the requested streams do not exist.
            let missing = StreamId::parse(&format!("nothing-{round}-{number}")).unwrap();
            readers.spawn(async move {
                read(&store, number).await;
                assert!(store.read_stream(&missing, Version::START, 10).await.unwrap().is_empty());
            });
        }
    }
    timeout(6 * PROMPTLY, readers.join_all()).await.expect("some reads were never answered");
}

/// Reads share a statement. The other readers still get their answers if the reader that runs the statement for all of
/// them gives up midway.
#[tokio::test(flavor = "multi_thread")]
async fn cancelled_read_does_not_cancel_others() {
    let schema = Schema::new();
    let store = filled(&schema, &url()).await;
    let mut outside = schema.connection().await;
    sqlx::raw_sql(schema.sql("BEGIN; LOCK TABLE annals.events IN ACCESS EXCLUSIVE MODE"))
        .execute(&mut outside)
        .await
        .unwrap();
    let reading = |number| {
        let store = store.clone();
        tokio::spawn(async move { read(&store, number).await })
    };
    // The statement of the first reader waits for the lock, in the only session.
    let first = reading(1);
    let mut connection = schema.connection().await;
    let waits = "SELECT count(*) FROM pg_locks WHERE relation = 'annals.events'::regclass AND NOT granted";
    let started = Instant::now();
    while sqlx::query_scalar::<_, i64>(schema.sql(waits)).fetch_one(&mut connection).await.unwrap() == 0 {
        assert!(started.elapsed() < PROMPTLY, "the read does not wait");
    }
    // The other readers wait for the session. When the session becomes free, the first of these readers reads for all
    // of them; but at this point the session is still busy.
    let mut others = Vec::new();
    for number in 2..8 {
        others.push(reading(number));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    first.abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    others.remove(0).abort();
    tokio::time::sleep(Duration::from_millis(300)).await;
    sqlx::raw_sql("ROLLBACK").execute(&mut outside).await.unwrap();
    for other in others {
        timeout(PROMPTLY, other).await.expect("the read was never answered").unwrap();
    }
}

/// The readers also get their answers if the server terminates the session again and again.
#[tokio::test(flavor = "multi_thread")]
async fn session_that_ends_during_reads_is_replaced() {
    let schema = Schema::new();
    let separator = if url().contains('?') { '&' } else { '?' };
    let store = filled(&schema, &format!("{}{separator}application_name={}", url(), schema.name())).await;
    let done = Arc::new(AtomicBool::new(false));
    let ending = tokio::spawn({
        let schema = schema.clone();
        let done = done.clone();
        async move {
            let mut connection = schema.connection().await;
            let mut ended = 0;
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1 \
                       AND query LIKE '%of_stream%'";
            while !done.load(Ordering::Relaxed) {
                let query = sqlx::query_scalar::<_, i64>(sql).bind(schema.name());
                ended += query.fetch_one(&mut connection).await.unwrap();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            ended
        }
    });
    for _ in 0..5 {
        let mut readers = JoinSet::new();
        for number in 0..STREAMS {
            let store = store.clone();
            readers.spawn(async move { read(&store, number).await });
        }
        timeout(6 * PROMPTLY, readers.join_all()).await.expect("some reads were never answered");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    done.store(true, Ordering::Relaxed);
    assert!(ending.await.unwrap() > 0, "no session was ended");
}

/// Each check of the log costs a round trip. Directly after a commit of the same process, there is usually nothing new
/// to see.
#[tokio::test(flavor = "multi_thread")]
async fn reader_woken_by_a_local_commit_does_not_poll() {
    const COMMITS: i64 = 100;
    let schema = Schema::new();
    let store = PostgresStore::connect(&url(), schema.settings()).await.unwrap();
    for number in 0..COMMITS {
        let committed = store.commit(append(&format!("thing-{number}"), 0, 1)).await.unwrap();
        assert!(timeout(Duration::from_millis(5), store.wait(committed.position)).await.is_err(), "there is no more");
    }
    // A session reports its counts when it ends.
    store.close().await.unwrap();
    let looks = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelid = 'annals.events_position_key'::regclass";
    let mut connection = schema.connection().await;
    let started = Instant::now();
    let mut seen = 0;
    while seen < COMMITS && started.elapsed() < PROMPTLY {
        seen = sqlx::query_scalar(schema.sql(looks)).fetch_one(&mut connection).await.unwrap();
    }
    // Each commit looks up the time of the last event, and this counts as a check.
    assert!((COMMITS..COMMITS + COMMITS / 2).contains(&seen), "{seen} looks for {COMMITS} commits");
}
