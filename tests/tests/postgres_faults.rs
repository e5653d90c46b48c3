//! Checks invariants that hold while several stores write at once and while their sessions are terminated.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use annals::{
    CommitError, DocumentKey, EventStore, ExecuteError, LogQuery, Position, Put, Repository, StreamId, Version,
};
use annals_postgres::{OpenError, PostgresStore};
use annals_tests::tally::{Tally, TallyCommand};
use tokio::{task::JoinSet, time::timeout};
use uuid::Uuid;

use self::postgres::{Schema, append, load::Load, url, whole_log};

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_writers_in_several_stores_wins() {
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

/// Several stores lock the same streams in different orders. A store that loses the race decides its command again, and
/// no store waits until a deadlock is detected.
#[tokio::test(flavor = "multi_thread")]
async fn stores_contending_for_many_streams_lose_nothing() {
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

async fn assert_dense(store: &PostgresStore) {
    let mut streams: BTreeMap<String, i64> = BTreeMap::new();
    for event in whole_log(store).await {
        let last = streams.entry(event.stream.to_string()).or_default();
        *last += 1;
        assert_eq!(event.version.0, *last, "{}", event.stream);
    }
}

/// Returns a URL whose sessions carry a name that identifies the test.
fn named(schema: &Schema) -> String {
    let separator = if url().contains('?') { '&' } else { '?' };
    format!("{}{separator}application_name={}", url(), schema.name())
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_sessions_every_50_ms_loses_no_acknowledged_commit() {
    const ROUNDS: u32 = 60;
    let schema = Schema::new();
    let url = named(&schema);
    let settings = schema.settings();
    let store = PostgresStore::connect(&url, settings.clone()).await.unwrap();
    let load = Load::start(&store, &url, &settings, 32);
    load.goes_on(10).await;
    let before = load.acknowledged();
    let mut outside = schema.connection().await;
    let mut every = tokio::time::interval(Duration::from_millis(50));
    let mut ended = 0;
    for _ in 0..ROUNDS {
        every.tick().await;
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
        let of_round: i64 = sqlx::query_scalar(sql).bind(schema.name()).fetch_one(&mut outside).await.unwrap();
        ended += of_round;
    }
    assert!(load.acknowledged() > before, "nothing got through between the ends");
    let summary = load.ends_well(&mut outside, |sql| schema.sql(sql)).await;
    assert!(
        ended > i64::from(ROUNDS) && summary.unknown > 0,
        "{ended} sessions ended, {summary:?}: this tested nothing"
    );
}

/// Callers drop their futures. Each commit is applied as a whole or not at all, and no transaction stays open.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_dropped_futures_leave_nothing_half_done() {
    const TASKS: usize = 50;
    const COMMITS: usize = 200;
    let schema = Schema::new();
    let store = PostgresStore::connect(&named(&schema), schema.settings()).await.unwrap();
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let store = store.clone();
        tasks.spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0..COMMITS {
                let name = format!("dropped-{task}.{number}");
                let mut commit = append(&name, 0, 2);
                let key = DocumentKey::new("dropped", &*name);
                commit.puts.push(Put { key: key.clone(), expected: Some(0), body: Some("{}".into()), due: None });
                let asked = timeout(Duration::from_millis(1), store.commit(commit)).await;
                if asked.is_ok_and(|outcome| outcome.is_ok()) {
                    acknowledged.push(name);
                }
                // Readers give up as well.
                timeout(Duration::from_micros(300), store.documents(&[key])).await.ok();
                timeout(Duration::from_micros(300), store.read_log(&LogQuery::all(), Position::START, 50)).await.ok();
            }
            acknowledged
        });
    }
    let acknowledged = tasks.join_all().await.concat();
    // Everything that was queued before this commit is done by now.
    store.commit(append("last-1", 0, 1)).await.unwrap();
    let mut outside = schema.connection().await;
    let sql = "SELECT stream_id, count(*), (SELECT count(*) FROM annals.documents WHERE collection = 'dropped' AND id = stream_id)
                 FROM annals.events WHERE stream_id LIKE 'dropped-%' GROUP BY stream_id";
    let found: Vec<(String, i64, i64)> = sqlx::query_as(schema.sql(sql)).fetch_all(&mut outside).await.unwrap();
    assert!(found.iter().all(|(_, events, documents)| (*events, *documents) == (2, 1)), "half a commit");
    let found: BTreeSet<_> = found.into_iter().map(|(name, ..)| name).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|name| !found.contains(*name)).collect();
    assert!(lost.is_empty(), "acknowledged and not there: {lost:?}");
    assert!(acknowledged.len() < TASKS * COMMITS, "no future was dropped: this tested nothing");
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state LIKE 'idle in transaction%'";
    let open: i64 = sqlx::query_scalar(sql).bind(schema.name()).fetch_one(&mut outside).await.unwrap();
    assert_eq!(open, 0, "transactions left open");
    assert_eq!(store.status().await.unwrap().waits_for, None);
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
async fn instances_can_start_at_once() {
    let schema = Schema::new();
    let stores = futures::future::join_all((0..12).map(|_| schema.store())).await;
    for (number, store) in stores.iter().enumerate() {
        store.commit(append(&format!("a-{number}"), 0, 1)).await.unwrap();
    }
    assert_eq!(whole_log(&stores[0]).await.len(), 12);
}

/// Creates the first version of the schema, with one event.
async fn first_version(schema: &Schema) {
    let sql = format!(
        "CREATE SCHEMA annals; CREATE TABLE annals.migrations (version int PRIMARY KEY, applied_at timestamptz NOT NULL \
         DEFAULT clock_timestamp()); INSERT INTO annals.migrations (version) VALUES (1); {} INSERT INTO annals.events \
         (stream_id, version, event_id, type, schema_version, data) VALUES ('a-1', 1, gen_random_uuid(), 'old', 1, '{{}}')",
        include_str!("../../store-postgres/src/migrations/0001_log_and_documents.sql"),
    );
    let sql = sql.replace("CREATE SCHEMA annals;", &format!("CREATE SCHEMA {};", schema.name()));
    sqlx::raw_sql(schema.sql(&sql)).execute(&mut schema.connection().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_can_migrate_at_once() {
    let schema = Schema::new();
    first_version(&schema).await;
    let error = PostgresStore::connect_existing(&url(), schema.settings()).await.unwrap_err();
    assert!(matches!(error, OpenError::Outdated { found: 1, .. }), "{error}");
    let stores = futures::future::join_all((0..12).map(|_| schema.store())).await;
    for (number, store) in stores.iter().enumerate() {
        store.commit(append("a-1", 1 + number as i64, 1)).await.unwrap();
    }
    assert_eq!(whole_log(&stores[0]).await.len(), 13);
    let sql = schema.sql("SELECT array_agg(version ORDER BY version) FROM annals.migrations");
    let versions: Vec<i32> = sqlx::query_scalar(sql).fetch_one(&mut schema.connection().await).await.unwrap();
    assert_eq!(versions, [1, 2, 3, 4, 5]);
}

/// A session may end at any statement of a migration. The next store that opens the schema finds either the whole
/// migration or none of it.
#[tokio::test(flavor = "multi_thread")]
async fn interrupted_migration_leaves_nothing_half_done() {
    const ROUNDS: u64 = 30;
    let mut cut = 0;
    for round in 0..ROUNDS {
        let schema = Schema::new();
        if round % 2 == 1 {
            first_version(&schema).await;
        }
        let opening: Vec<_> = (0..3)
            .map(|_| {
                let url = named(&schema);
                let settings = schema.settings();
                tokio::spawn(async move { PostgresStore::connect(&url, settings).await })
            })
            .collect();
        let mut outside = schema.connection().await;
        tokio::time::sleep(Duration::from_millis(round)).await;
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
        let _: i64 = sqlx::query_scalar(sql).bind(schema.name()).fetch_one(&mut outside).await.unwrap();
        for opening in opening {
            match opening.await.unwrap() {
                Ok(_) => {}
                Err(OpenError::Unavailable { .. }) => cut += 1,
                Err(other) => panic!("{other}"),
            }
        }
        let store = schema.store().await;
        store.commit(append("b-1", 0, 1)).await.unwrap();
        assert_eq!(whole_log(&store).await.len() as u64, 1 + round % 2);
    }
    assert!(cut > 0, "no migration was cut off: this tested nothing");
}

/// 64 tasks execute commands on one aggregate. Each command is executed once, one after the other, no matter which
/// sessions are terminated in between.
#[tokio::test(flavor = "multi_thread")]
async fn commands_on_one_aggregate_are_executed_once_while_sessions_end() {
    const TASKS: i64 = 64;
    const COMMANDS: i64 = 25;
    let schema = Schema::new();
    let store = PostgresStore::connect(&named(&schema), schema.settings()).await.unwrap();
    let tallies = Repository::<Tally>::new(Arc::new(store.clone()));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let tallies = tallies.clone();
        tasks.spawn(async move {
            let mut again = 0;
            for number in 0..COMMANDS {
                let command = TallyCommand::Add(task * COMMANDS + number);
                let id = Uuid::new_v4();
                // The only other possible answer is an unknown outcome, and the caller must then ask again.
                while let Err(error) = tallies.execute("one", command.clone(), id).await {
                    assert!(matches!(error, ExecuteError::Unavailable(_)), "{error}");
                    again += 1;
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            again
        });
    }
    let mut outside = schema.connection().await;
    let mut ended = 0;
    let mut again = 0;
    let mut every = tokio::time::interval(Duration::from_millis(50));
    while !tasks.is_empty() {
        every.tick().await;
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
        let of_round: i64 = sqlx::query_scalar(sql).bind(schema.name()).fetch_one(&mut outside).await.unwrap();
        ended += of_round;
        while let Some(done) = tasks.try_join_next() {
            again += done.unwrap();
        }
    }
    let sql = "SELECT count(*), max(version), count(DISTINCT data ->> 'amount') FROM annals.events WHERE stream_id = 'tally-one'";
    let found: (i64, i64, i64) = sqlx::query_as(schema.sql(sql)).fetch_one(&mut outside).await.unwrap();
    assert_eq!(found, (TASKS * COMMANDS, TASKS * COMMANDS, TASKS * COMMANDS), "{ended} ended, {again} asked again");
    assert!(ended > 10, "{ended} sessions ended: this tested nothing");
    println!("{ended} sessions ended, {again} of {} commands were asked again", TASKS * COMMANDS);
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_schema_is_refused_unchanged() {
    let schema = Schema::new();
    schema.store().await.close().await.unwrap();
    let sql = schema.sql("INSERT INTO annals.migrations (version) VALUES (99)");
    sqlx::query(sql).execute(&mut schema.connection().await).await.unwrap();
    let error = PostgresStore::connect(&url(), schema.settings()).await.unwrap_err();
    assert_eq!(error, OpenError::TooNew { schema: schema.name().into(), found: 99, known: 5 });
}

/// The log has exactly two indexes, because each further index would make every commit more expensive.
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
