//! Tests the store behind PgBouncer in transaction mode. Each transaction may run in another server session, and other
//! clients use each session in between.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod postgres;
mod sql_rows;

use std::{sync::Arc, time::Duration};

use annals::{
    EventStore, LogQuery, Position,
    archive::{Archive, Contents, Stored},
};
use annals_conformance::store::{Durable, StoreUnderTest, suite};
use annals_postgres::{OpenError, PostgresStore, Replay};
use futures::TryStreamExt;
use sqlx::{Connection, PgConnection};
use tokio::time::{sleep, timeout};

use self::{
    postgres::{PROMPTLY, Schema, append, load::Load, numbers, pooler::Pooler, whole_log},
    sql_rows::Bed,
};

/// Fewer sessions than the connections of one store.
const SESSIONS: u32 = 3;

struct Pooled {
    store: PostgresStore,
    schema: Schema,
    pooler: Arc<Pooler>,
}

impl Pooled {
    async fn connect(schema: Schema, pooler: Arc<Pooler>) -> Self {
        let store = PostgresStore::connect(&pooler.url(), schema.settings()).await.unwrap();
        Self { store, schema, pooler }
    }
}

impl StoreUnderTest for Pooled {
    async fn fresh() -> Self {
        Self::connect(Schema::new(), Arc::new(Pooler::start(SESSIONS, "").await)).await
    }

    fn store(&self) -> Arc<dyn EventStore> {
        Arc::new(self.store.clone())
    }
}

impl Durable for Pooled {
    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        Self::connect(self.schema, self.pooler).await
    }
}

suite!(Pooled, durable);

#[tokio::test(flavor = "multi_thread")]
async fn store_does_not_open_behind_an_undeclared_pooler() {
    let schema = Schema::new();
    // The pooler either rejects the startup parameters of a connection or silently ignores them.
    for configuration in ["", "ignore_startup_parameters = options"] {
        let pooler = Pooler::start(SESSIONS, configuration).await;
        let error = PostgresStore::connect(&pooler.plain_url(), schema.settings()).await.unwrap_err();
        assert!(matches!(error, OpenError::Pooler { .. }), "{error}");
        assert!(error.to_string().contains("pooled=true"), "{error}");
    }
    let error = PostgresStore::connect("postgres://localhost/x?pooled=yes", schema.settings()).await.unwrap_err();
    assert!(matches!(error, OpenError::Url { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn several_instances_start_at_once_and_follow_each_other() {
    let schema = Schema::new();
    let pooler = Pooler::start(SESSIONS, "").await;
    let url = pooler.url();
    let opened = (0..8).map(|_| PostgresStore::connect(&url, schema.settings()));
    let stores = futures::future::try_join_all(opened).await.unwrap();
    for round in 0..5 {
        let writer = &stores[round % 8];
        let reader = &stores[(round + 1) % 8];
        let before = Position(round as i64);
        let waiting = reader.wait(before);
        writer.commit(append(&format!("a-{round}"), 0, 1)).await.unwrap();
        timeout(PROMPTLY, waiting).await.expect("the store polls, because it cannot listen").unwrap();
        let page = reader.read_log(&LogQuery::all(), before, 10).await.unwrap();
        assert_eq!(numbers(&page.events), [before.0 + 1]);
    }
}

/// Other clients use the sessions in between. Therefore a store must leave no state in a session, and must not rely on
/// any state of a session.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_keep_no_state() {
    let pooler = Pooler::start(1, "ignore_startup_parameters = extra_float_digits").await;
    let bed = Bed::at(&pooler.url()).await;
    bed.add("a", 1..=20).await;
    let running = bed.start(1);
    bed.exactly_once(20).await;
    running.stop().await;
    whole_log(&bed.plain).await;
    let mut other = PgConnection::connect(&pooler.plain_url()).await.unwrap();
    let sql = "SELECT (SELECT count(*)::text FROM pg_prepared_statements)
               UNION ALL SELECT (SELECT count(*)::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid())
               UNION ALL SELECT (SELECT count(*)::text FROM pg_listening_channels())
               UNION ALL SELECT current_setting(unnest(ARRAY['enable_seqscan', 'jit', 'lock_timeout', 'statement_timeout',
                                                            'plan_cache_mode', 'synchronous_commit', 'transaction_read_only']))";
    let rows = sqlx::raw_sql(sql).fetch_all(&mut other).await.unwrap();
    let found: Vec<String> = rows.iter().map(|row| sqlx::Row::get(row, 0)).collect();
    assert_eq!(found, ["0", "0", "0", "on", "on", "0", "0", "auto", "on", "off"]);
    // The opposite case: settings that other clients leave in a session must not affect the store.
    sqlx::raw_sql("SET default_transaction_isolation = 'repeatable read'; SET default_transaction_read_only = on")
        .execute(&mut other)
        .await
        .unwrap();
    bed.add("b", [21]).await;
    assert_eq!(whole_log(&bed.plain).await.iter().filter(|event| &*event.type_name == "tally.added").count(), 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn ending_sessions_and_the_pooler_under_load_loses_nothing() {
    const KILLS: usize = 3;
    const ROUNDS: u32 = 20;
    let schema = Schema::new();
    let mut pooler = Pooler::start(SESSIONS, "").await;
    let url = format!("{}&application_name={}", pooler.url(), schema.name());
    let settings = schema.settings();
    let store = PostgresStore::connect(&url, settings.clone()).await.unwrap();
    let load = Load::start(&store, &url, &settings, 16);
    let mut outside = schema.connection().await;
    let mut ended = 0;
    for _ in 0..KILLS {
        load.goes_on(50).await;
        for _ in 0..ROUNDS {
            sleep(Duration::from_millis(50)).await;
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
            let of_round: i64 = sqlx::query_scalar(sql).bind(schema.name()).fetch_one(&mut outside).await.unwrap();
            ended += of_round;
        }
        load.goes_on(50).await;
        pooler.kill();
        pooler.resume().await;
    }
    load.goes_on(50).await;
    let summary = load.ends_well(&mut outside, |sql| schema.sql(sql)).await;
    assert!(ended > 0 && summary.unknown > 0, "{ended} sessions ended, {summary:?}: this tested nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn replays_and_restores_work_through_a_pooler() {
    let schema = Schema::new();
    let pooler = Pooler::start(SESSIONS, "").await;
    let store = PostgresStore::connect(&pooler.url(), schema.settings()).await.unwrap();
    for number in 0..50 {
        store.commit(append(&format!("a-{number}"), 0, 20)).await.unwrap();
    }
    let log = whole_log(&store).await;
    for replay in [Replay::all(), Replay::all().categories(["a"])] {
        let replayed: Vec<_> = store.replay(replay).try_collect().await.unwrap();
        assert!(replayed.iter().eq(log.iter().map(|event| &**event)), "{} events", replayed.len());
    }
    let elsewhere = Schema::new();
    let other = PostgresStore::connect(&pooler.url(), elsewhere.settings()).await.unwrap();
    let events = log.iter().map(|event| Stored::from(&**event).into_owned()).collect();
    other.restore(Contents { events, documents: Vec::new() }).await.unwrap();
    assert_eq!(whole_log(&other).await, log);
    assert_eq!(other.streams("", 100).await.unwrap().len(), 50);
}

/// The user's own statements are prepared under names, in a session that the user does not own.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_handler_and_its_checkpoint_commit_together() {
    let pooler = Pooler::start(SESSIONS, "").await;
    let beds = [Bed::at(&pooler.url()).await, Bed::at(&pooler.url()).await];
    let running = beds.each_ref().map(|bed| bed.start(2));
    for bed in &beds {
        for key in ["a", "b", "c"] {
            bed.add(key, 1..=40).await;
        }
    }
    for bed in &beds {
        bed.exactly_once(120).await;
    }
    for running in running {
        running.stop().await;
    }
}
