//! The views that operators read with plain SQL, after a run of the shop and while messages are parked.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use annals::{DeadLetters, EventStore, Handler, HandlerError, Health, LocalBus, Message, Subscription, Terminal, Work};
use annals_tests::tally::eventually;
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use sample_shop::run::{self, Places};
use shop_driver::{card::Chances, input::Source, run::Settings};
use tokio_util::sync::CancellationToken;

use self::postgres::{Schema, append};

#[tokio::test(flavor = "multi_thread")]
async fn run_of_the_shop_shows_in_the_views() {
    const ORDERS: u64 = 150;
    let schema = Schema::new();
    let store = schema.store().await;
    let run = async |orders: u64| {
        let source = Source::generated(orders, 7);
        let stock = source.stock("1.5".parse().unwrap()).unwrap();
        let settings = Settings {
            concurrency: 30,
            chances: Chances { seed: 7, decline_rate: 0.2, cancel_rate: 0.1 },
            scarce: false,
            input: "orders".into(),
            stop: CancellationToken::new(),
        };
        let places = Places { store: Arc::new(store.clone()), bus: Arc::new(LocalBus::default()), shared_as: None };
        run::run(places, stock, &mut source.invoices().unwrap(), settings, |_| {}).await.unwrap()
    };
    let outcome = run(ORDERS).await;
    // A stopped service lags behind the events that others wrote later. A second run lets the service catch up.
    run(0).await;

    let mut outside = schema.connection().await;
    let sql = "SELECT status, count(*) FROM annals.sagas WHERE saga = 'checkout' GROUP BY status";
    let sagas: Vec<(String, i64)> = sqlx::query_as(schema.sql(sql)).fetch_all(&mut outside).await.unwrap();
    let sagas: BTreeMap<_, _> = sagas.into_iter().collect();
    let cancelled: u64 = outcome.totals.cancelled.values().sum();
    assert!(cancelled > 0);
    let expected = [("completed", outcome.totals.confirmed as i64), ("compensated", cancelled as i64)];
    assert_eq!(sagas, expected.map(|(status, count)| (status.to_owned(), count)).into());

    // Each saga in the view is in the log, and no saga ended before it began.
    let sql = "SELECT count(*) FROM annals.sagas AS s
                WHERE s.ended_at >= s.started_at AND s.attempts >= 0 AND length(s.definition_hash) > 0
                  AND EXISTS (SELECT FROM annals.events AS e WHERE e.stream_id = 'saga.' || s.saga || '-' || s.saga_id)
                  AND (s.last_error IS NOT NULL OR s.status = 'completed')";
    let sound: i64 = sqlx::query_scalar(schema.sql(sql)).fetch_one(&mut outside).await.unwrap();
    assert_eq!(sound, ORDERS as i64);

    let sql = "SELECT subscription, lane, position, lag, updated_at FROM annals.checkpoints";
    type Row = (String, String, i64, Option<i64>, DateTime<Utc>);
    let checkpoints: Vec<Row> = sqlx::query_as(schema.sql(sql)).fetch_all(&mut outside).await.unwrap();
    let (of_log, of_topics): (Vec<_>, Vec<_>) = checkpoints.iter().partition(|row| row.3.is_some());
    assert!(of_log.len() >= 4 && of_topics.len() >= 4, "{checkpoints:#?}");
    for (subscription, lane, position, lag, updated_at) in &checkpoints {
        assert!(lane.parse::<u32>().is_ok() && *position >= 0, "{subscription} {lane}");
        assert!(lag.is_none_or(|lag| lag == 0), "{subscription}/{lane} lags {lag:?}");
        assert!((Utc::now() - updated_at).num_minutes() < 5);
    }
    let letters: i64 = sqlx::query_scalar(schema.sql("SELECT count(*) FROM annals.dead_letters"))
        .fetch_one(&mut outside)
        .await
        .unwrap();
    assert_eq!(letters, 0);
}

/// Handles all messages except the messages of these streams.
struct Picky;

#[async_trait]
impl Handler for Picky {
    async fn handle(&self, message: &Message, _: &mut Work) -> Result<(), HandlerError> {
        match message.subject.starts_with("bad-") {
            true => Err("it's 100% \"bad\"").terminal(),
            false => Ok(()),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn views_show_parked_messages_and_lag() {
    let schema = Schema::new();
    let store = schema.store().await;
    let port: Arc<dyn EventStore> = Arc::new(store.clone());
    let subscription = || Subscription::new("picky", Picky).lanes(2);
    for (stream, events) in [("bad-1", 3), ("good-1", 2), ("bad-2#0 #1", 1)] {
        let name = annals::StreamId::from_stored(stream);
        let mut commit = append("bad-1", 0, events);
        commit.appends[0].stream = name;
        store.commit(commit).await.unwrap();
    }
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(subscription().run(port.clone(), Health::default(), shutdown.clone()));
    let letters = DeadLetters::new(port.clone());
    let listed = eventually("two keys are parked, one with two behind it", async || {
        let listed = letters.list("picky").await.unwrap();
        (listed.len() == 2 && listed.iter().map(|letter| letter.behind).sum::<usize>() == 2).then_some(listed)
    })
    .await;
    let mut outside = schema.connection().await;
    let sql = "SELECT id, subscription, key, reason, attempts, behind, message ->> 'subject' FROM annals.dead_letters ORDER BY id";
    type Row = (String, String, String, String, i32, i64, Option<String>);
    let seen: Vec<Row> = sqlx::query_as(schema.sql(sql)).fetch_all(&mut outside).await.unwrap();
    let expected = listed.iter().map(|letter| {
        let parked = &letter.parked;
        let subject = parked.message().map(|message| message.subject.to_string());
        let key = parked.key.to_string();
        let reason = parked.reason.clone();
        (letter.id.to_string(), "picky".to_owned(), key, reason, parked.attempts as i32, letter.behind as i64, subject)
    });
    assert_eq!(seen, expected.collect::<Vec<_>>());
    assert!(seen[0].3.contains("100%"), "{seen:?}");

    // The subscription has stopped, so new events count as lag.
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(20), running).await.unwrap().unwrap().unwrap();
    let lag = async || {
        let sql = "SELECT sum(lag)::bigint FROM annals.checkpoints WHERE subscription = 'picky'";
        sqlx::query_scalar::<_, i64>(schema.sql(sql)).fetch_one(&mut schema.connection().await).await.unwrap()
    };
    assert_eq!(lag().await, 0);
    store.commit(append("good-2", 0, 5)).await.unwrap();
    assert_eq!(lag().await, 10, "two lanes, each five events behind");
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(subscription().run(port, Health::default(), shutdown.clone()));
    eventually("the lag is gone", async || (lag().await == 0).then_some(())).await;
    shutdown.cancel();
    running.await.unwrap().unwrap();
}
