//! A transaction in another session has drawn a position and is slow, while other writers commit and readers follow.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{EventStore, Health, LogQuery, Subscription};
use annals_tests::tally::{Copier, add, copies, eventually};
use sqlx::PgConnection;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use self::postgres::{Schema, load::Load, url};

/// The duration of the slow transaction. `ANNALS_SLOW_WRITER_SECONDS=30` sets the longest duration that should ever
/// occur.
fn patience() -> Duration {
    let seconds = std::env::var("ANNALS_SLOW_WRITER_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(3))
}

async fn execute(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(connection).await.unwrap();
}

/// Appends within the open transaction.
async fn add_by_hand(connection: &mut PgConnection, schema: &Schema, stream: &str, amount: i64) {
    let sql = "SELECT positions[1] IS NOT NULL FROM annals.append(
        ARRAY[$1], ARRAY[NULL]::bigint[], '{f}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
        '{1}', '{1}', ARRAY[$1], '{1}', ARRAY[gen_random_uuid()], '{tally.added}', '{1}', ARRAY[$2], '{\"{}\"}')";
    let query = sqlx::query_scalar::<_, bool>(schema.sql(sql)).bind(stream).bind(format!(r#"{{"amount":{amount}}}"#));
    assert!(query.fetch_one(connection).await.unwrap());
}

/// Two readers miss no event. One of them opens its store again and again.
#[tokio::test(flavor = "multi_thread")]
async fn readers_miss_no_commit_of_a_slow_writer() {
    for ending in ["COMMIT", "ROLLBACK"] {
        let schema = Schema::new();
        let store = schema.store().await;
        let settings = schema.settings();
        let load = Load::start(&store, &url(), &settings, 8);
        load.goes_on(50).await;
        let mut slow = schema.connection().await;
        execute(&mut slow, "BEGIN").await;
        add_by_hand(&mut slow, &schema, "slow-1", 1).await;
        // Other writers keep committing during that time.
        let before = load.acknowledged();
        tokio::time::sleep(patience()).await;
        assert!(load.acknowledged() > before + 50, "{} commits", load.acknowledged() - before);
        assert!(store.status().await.unwrap().waits_for.is_some());
        execute(&mut slow, ending).await;
        load.goes_on(50).await;
        load.ends_well(&mut schema.connection().await, |sql| schema.sql(sql)).await;
    }
}

struct Following(CancellationToken, JoinHandle<Result<(), annals::NameError>>);

impl Following {
    /// Starts a subscription on its own store, which looks like another process to the database.
    async fn start(schema: &Schema) -> Self {
        let store: Arc<dyn EventStore> = Arc::new(schema.store().await);
        let shutdown = CancellationToken::new();
        let copier = Subscription::new("copier", Copier::new(store.clone())).query(LogQuery::categories(["tally"]));
        Self(shutdown.clone(), tokio::spawn(copier.run(store, Health::default(), shutdown)))
    }

    /// Aborts the subscription at any point of its work.
    async fn kill(self) {
        self.1.abort();
        self.1.await.ok();
    }

    async fn stop(self) {
        self.0.cancel();
        self.1.await.unwrap().unwrap();
    }
}

/// A subscription is killed and restarted while the slow transaction runs. Each effect happens once, in order.
#[tokio::test(flavor = "multi_thread")]
async fn subscription_restarted_during_a_slow_commit_has_each_effect_once() {
    for ending in ["COMMIT", "ROLLBACK"] {
        let schema = Schema::new();
        let store: Arc<dyn EventStore> = Arc::new(schema.store().await);
        let mut following = Following::start(&schema).await;
        add(&store, "before", 1..=5).await;
        let mut slow = schema.connection().await;
        execute(&mut slow, "BEGIN").await;
        add_by_hand(&mut slow, &schema, "tally-slow", 77).await;
        let adding = {
            let store = store.clone();
            tokio::spawn(async move { add(&store, "during", 1..=60).await })
        };
        for _ in 0..4 {
            tokio::time::sleep(patience() / 4).await;
            following.kill().await;
            following = Following::start(&schema).await;
        }
        adding.await.unwrap();
        assert!(copies(&store, "during").await.0.len() < 60, "no reader may pass the open transaction");
        execute(&mut slow, ending).await;
        add(&store, "after", 1..=5).await;
        let wanted =
            [("before", (1..=5).collect::<Vec<i64>>()), ("during", (1..=60).collect()), ("after", (1..=5).collect())];
        let slow_one = if ending == "COMMIT" { vec![77] } else { vec![] };
        for (id, amounts) in wanted.into_iter().chain([("slow", slow_one)]) {
            eventually(&format!("{id} is copied"), async || (copies(&store, id).await.0 == amounts).then_some(()))
                .await;
            assert_eq!(copies(&store, id).await, (amounts.clone(), amounts));
        }
        following.stop().await;
        let lag: i64 =
            sqlx::query_scalar(schema.sql("SELECT lag FROM annals.checkpoints WHERE subscription = 'copier'"))
                .fetch_one(&mut schema.connection().await)
                .await
                .unwrap();
        assert_eq!(lag, 0);
    }
}

/// Each rolled-back commit has drawn a position that stays empty.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_rolled_back_commits_delay_no_reader() {
    const WRITERS: usize = 10;
    const ROLLBACKS: usize = 1_000;
    let schema = Schema::new();
    let store = schema.store().await;
    let settings = schema.settings();
    let load = Load::start(&store, &url(), &settings, 8);
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let schema = schema.clone();
        writers.spawn(async move {
            let mut connection = schema.connection().await;
            for round in 0..ROLLBACKS {
                execute(&mut connection, "BEGIN").await;
                add_by_hand(&mut connection, &schema, &format!("burnt-{writer}.{round}"), 1).await;
                execute(&mut connection, "ROLLBACK").await;
            }
        });
    }
    writers.join_all().await;
    let mut outside = schema.connection().await;
    load.ends_well(&mut outside, |sql| schema.sql(sql)).await;
    let sql = "SELECT max(position) - count(*) FROM annals.events";
    let empty: i64 = sqlx::query_scalar(schema.sql(sql)).fetch_one(&mut outside).await.unwrap();
    assert!(empty > (WRITERS * ROLLBACKS / 2) as i64, "only {empty} positions lie empty: this tested nothing");
    assert_eq!(store.status().await.unwrap().waits_for, None);
}
