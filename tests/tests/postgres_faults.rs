//! What must hold while several stores write at once, and while sessions are ended under them.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::collections::BTreeMap;

use annals::{CommitError, EventStore, StreamId, Version};
use annals_postgres::{OpenError, PostgresStore};
use tokio::task::JoinSet;

use self::postgres::{Schema, append, url, whole_log};

#[tokio::test(flavor = "multi_thread")]
async fn of_many_writers_in_several_stores_one_wins() {
    let schema = Schema::new();
    let stores = futures::future::join_all((0..5).map(|_| schema.store())).await;
    for round in 0..10 {
        let mut writers = JoinSet::new();
        for writer in 0..50 {
            let store = stores[writer % stores.len()].clone();
            writers.spawn(async move { store.commit(append("contended-1", round, 1)).await });
        }
        let (won, lost): (Vec<_>, Vec<_>) = writers.join_all().await.into_iter().partition(Result::is_ok);
        assert_eq!(won.len(), 1);
        for outcome in lost {
            match outcome {
                Err(CommitError::Conflict { expected, actual, .. }) => {
                    assert_eq!((expected, actual), (Version(round), Version(round + 1)));
                }
                other => panic!("a conflict was due, not {other:?}"),
            }
        }
    }
    assert_eq!(whole_log(&stores[0]).await.len(), 10);
}

/// Streams that several stores take in different orders: whoever loses decides again, and nobody waits for a deadlock.
#[tokio::test(flavor = "multi_thread")]
async fn stores_that_contend_for_many_streams_lose_nothing() {
    const STREAMS: usize = 8;
    const ROUNDS: usize = 20;
    let schema = Schema::new();
    let mut writers = JoinSet::new();
    for writer in 0..4 {
        let store = schema.store().await;
        for task in 0..4 {
            let store = store.clone();
            writers.spawn(async move {
                for round in 0..ROUNDS {
                    let names: Vec<String> =
                        (0..3).map(|n| format!("shared-{}", (writer + task + n * (round + 1)) % STREAMS)).collect();
                    loop {
                        let mut commit = annals::Commit::default();
                        for name in names.iter().collect::<std::collections::BTreeSet<_>>().into_iter().rev() {
                            let stream = StreamId::parse(name).unwrap();
                            let standing = store.read_stream(&stream, Version::START, 10_000).await.unwrap().len();
                            commit.appends.extend(append(name, standing as i64, 1).appends);
                        }
                        match store.commit(commit).await {
                            Ok(_) => break,
                            Err(CommitError::Conflict { .. }) => {}
                            Err(other) => panic!("{other}"),
                        }
                    }
                }
            });
        }
    }
    writers.join_all().await;
    assert_dense(&schema.store().await).await;
}

async fn assert_dense(store: &PostgresStore) -> BTreeMap<String, i64> {
    let mut streams: BTreeMap<String, i64> = BTreeMap::new();
    for event in whole_log(store).await {
        let last = streams.entry(event.stream.to_string()).or_default();
        *last += 1;
        assert_eq!(event.version.0, *last, "{}", event.stream);
    }
    streams
}

/// Whatever was acknowledged is there; whatever was not is there whole or not at all.
#[tokio::test(flavor = "multi_thread")]
async fn ended_sessions_lose_no_acknowledged_commit() {
    const WRITERS: usize = 32;
    const KILLS: usize = 30;
    let schema = Schema::new();
    let separator = if url().contains('?') { '&' } else { '?' };
    let named = format!("{}{separator}application_name={}", url(), schema.name());
    let store = PostgresStore::connect(&named, schema.settings()).await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, stopped) = (store.clone(), stopped.clone());
        writers.spawn(async move {
            let (name, mut standing, mut unknown) = (format!("killed-{writer}"), 0, 0);
            while !*stopped.borrow() {
                match store.commit(append(&name, standing, 2)).await {
                    Ok(committed) => standing = committed.versions[0].0,
                    Err(CommitError::Unknown(_)) => unknown += 1,
                    Err(CommitError::Unavailable(_)) => {}
                    // What was not known before is known now.
                    Err(CommitError::Conflict { actual, .. }) => {
                        assert_eq!(actual.0, standing + 2, "{name}");
                        standing = actual.0;
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            (name, standing, unknown)
        });
    }
    let mut killer = schema.connection().await;
    let mut killed = 0;
    for _ in 0..KILLS {
        let ended: i64 = sqlx::query_scalar(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1",
        )
        .bind(schema.name())
        .fetch_one(&mut killer)
        .await
        .unwrap();
        killed += ended;
        // Until it has written again.
        let head = store.status().await.map_or(0, |status| status.head.0);
        let _ = tokio::time::timeout(postgres::PROMPTLY, store.wait(annals::Position(head + 10))).await;
    }
    stop.send_replace(true);
    let mut unknown = 0;
    let acknowledged: Vec<_> = writers.join_all().await;
    let found = assert_dense(&store).await;
    for (name, standing, of_writer) in acknowledged {
        let held = found.get(&name).copied().unwrap_or(0);
        assert!(held == standing || held == standing + 2, "{name} stands at {held}; {standing} was acknowledged");
        unknown += of_writer;
    }
    assert!(
        killed > KILLS as i64 && unknown > 0,
        "{killed} sessions ended, {unknown} outcomes unknown: this tested nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_never_changed_or_deleted() {
    let schema = Schema::new();
    let store = schema.store().await;
    store.commit(append("a-1", 0, 2)).await.unwrap();
    let before = whole_log(&store).await;
    for role in ["origin", "replica"] {
        for sql in [
            "UPDATE annals.events SET data = '[]'",
            "UPDATE annals.events SET data = '[]' WHERE false",
            "DELETE FROM annals.events",
            "DELETE FROM annals.events WHERE position = 1",
            "TRUNCATE annals.events",
            "TRUNCATE annals.events CASCADE",
            "INSERT INTO annals.events SELECT * FROM annals.events ON CONFLICT (position) DO UPDATE SET data = '[]'",
        ] {
            let mut connection = schema.connection().await;
            let set = format!("SET session_replication_role = {role}");
            sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&mut connection).await.unwrap();
            let error = sqlx::raw_sql(schema.sql(sql)).execute(&mut connection).await.unwrap_err();
            let code = error.as_database_error().and_then(|error| error.code()).map(|code| code.into_owned());
            assert_eq!(code.as_deref(), Some("AN002"), "{role}: {sql}: {error}");
        }
    }
    assert_eq!(whole_log(&store).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_may_start_at_once() {
    let schema = Schema::new();
    let stores = futures::future::join_all((0..12).map(|_| schema.store())).await;
    for (number, store) in stores.iter().enumerate() {
        store.commit(append(&format!("a-{number}"), 0, 1)).await.unwrap();
    }
    assert_eq!(whole_log(&stores[0]).await.len(), 12);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_is_left_alone() {
    let schema = Schema::new();
    schema.store().await.close().await.unwrap();
    let sql = schema.sql("INSERT INTO annals.migrations (version) VALUES (99)");
    sqlx::query(sql).execute(&mut schema.connection().await).await.unwrap();
    let error = PostgresStore::connect(&url(), schema.settings()).await.unwrap_err();
    assert_eq!(error, OpenError::TooNew { schema: schema.name().into(), found: 99, known: 1 });
}

/// Two tables, and no index on them but those that are paid for knowingly.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_two_indexes() {
    let schema = Schema::new();
    let _store = schema.store().await;
    let indexes: Vec<String> = sqlx::query_scalar(
        "SELECT indexname::text FROM pg_indexes WHERE schemaname = $1 AND tablename = 'events' ORDER BY indexname",
    )
    .bind(schema.name())
    .fetch_all(&mut schema.connection().await)
    .await
    .unwrap();
    assert_eq!(indexes, ["events_position_key", "events_stream_version"]);
}
