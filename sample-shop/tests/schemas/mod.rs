//! The stores of the four services, each in its own schema, with one Kafka for all. Also checks the invariants that
//! hold across all four stores.
#![allow(clippy::unwrap_used, dead_code)]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use crate::{
    serving::{PATIENCE, Serving},
    topic,
};

pub const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];
/// For each service, a pattern for the streams whose events are in its topic.
const PUBLISHED: [(&str, &str); 4] = [
    ("order", "^(order|return)-"),
    ("inventory", "^stock-"),
    ("payment", "^payment-"),
    ("notification", "^notification-"),
];
/// The schemas of the services.
pub struct Schemas {
    run: String,
    pub server: String,
}

impl Schemas {
    pub fn new() -> Self {
        let server = std::env::var("DATABASE_URL");
        Self::at(server.expect("run the tests with `./test`, which starts a PostgreSQL of its own"))
    }

    pub fn at(server: String) -> Self {
        Self { run: Uuid::new_v4().simple().to_string(), server }
    }

    pub fn name(&self, role: &str) -> String {
        format!("{role}_{}", self.run)
    }

    pub fn url(&self, role: &str) -> String {
        let server = &self.server;
        let and = if server.contains('?') { '&' } else { '?' };
        format!("{server}{and}schema={}", self.name(role))
    }

    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.server).await.unwrap()
    }

    /// Returns the statement with the schema of this role in place of `annals`.
    pub fn sql(&self, role: &str, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("annals.", &format!("{}.", self.name(role))))
    }

    pub async fn ask(&self, role: &str, sql: &str) -> i64 {
        sqlx::query_scalar(self.sql(role, sql)).fetch_one(&mut self.connection().await).await.unwrap()
    }

    /// Checks the invariants of each schema with plain SQL.
    pub async fn hold_together(&self) {
        // The view of sagas is updated a moment after the sagas.
        let started = Instant::now();
        while self.ask("order", "SELECT count(*) FROM annals.sagas WHERE ended_at IS NULL").await > 0 {
            assert!(started.elapsed() < PATIENCE, "a saga has not ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for role in ROLES {
            for (what, sql) in [
                (
                    "versions with a gap",
                    "SELECT count(*) FROM (SELECT stream_id FROM annals.events GROUP BY stream_id HAVING max(version) <> count(*)) AS gaps",
                ),
                ("events twice", "SELECT count(*) - count(DISTINCT event_id) FROM annals.events"),
                ("messages parked", "SELECT count(*) FROM annals.dead_letters"),
            ] {
                assert_eq!(self.ask(role, sql).await, 0, "{what} in {role}");
            }
        }
        let of = "SELECT count(*) FROM annals.events WHERE type = ";
        let placed = self.ask("order", &format!("{of}'order.placed'")).await;
        let ended = self.ask("order", &format!("{of}'order.confirmed' OR type = 'order.cancelled'")).await;
        assert_eq!(ended, placed, "orders without an end");
        let notified = self.ask("notification", &format!("{of}'notification.sent'")).await;
        assert!(notified >= placed, "{notified} of {placed} customers were notified");
        let left = "SELECT coalesce(sum(CASE type WHEN 'stock.reserved' THEN 1 ELSE -1 END * (data->>'quantity')::bigint), 0)::bigint
                      FROM annals.events WHERE type IN ('stock.reserved', 'stock.released', 'stock.shipped')";
        assert_eq!(self.ask("inventory", left).await, 0, "units still reserved");
        let paid_twice = "SELECT count(*) FROM (SELECT stream_id FROM annals.events WHERE type = 'payment.charged'
                           GROUP BY stream_id HAVING count(*) > 1) AS twice";
        assert_eq!(self.ask("payment", paid_twice).await, 0, "charged twice");
    }

    /// Checks with a plain consumer that the topics hold what the logs hold: every event, under its stream, in order.
    pub async fn agree_with(&self, broker: &Broker) {
        for (role, published) in PUBLISHED {
            let logged = "SELECT event_id, stream_id, version FROM annals.events WHERE stream_id ~ $1";
            let logged = sqlx::query_as(self.sql(role, logged)).bind(published);
            let logged: BTreeSet<(Uuid, String, i64)> =
                logged.fetch_all(&mut self.connection().await).await.unwrap().into_iter().collect();
            let started = Instant::now();
            loop {
                let brokers = broker.address();
                let name = format!("{role}.events");
                let records = spawn_blocking(move || topic::read(&brokers, &name)).await.unwrap();
                let found = in_order(&records);
                // The relay may not have sent all messages yet.
                if found.len() >= logged.len() || started.elapsed() > PATIENCE {
                    let in_topic = found.len();
                    let in_log = logged.len();
                    assert!(found == logged, "{role}: {in_topic} in the topic, {in_log} in the log");
                    println!("{role}: {in_log} events, {} of them sent again", records.len() - in_topic);
                    break;
                }
            }
        }
    }

    /// Checks that each saga command and each reply is in its topic, which means that none was skipped.
    pub async fn said_all(&self, broker: &Broker) {
        let commands = "SELECT (command->>'id')::uuid, command->>'to' FROM annals.events, json_array_elements(data->'send') AS command
                         WHERE stream_id LIKE 'saga.%'";
        let replies = "SELECT event_id, data->>'reply_to' FROM annals.events WHERE type = 'step.replied'";
        let mut said: BTreeMap<String, BTreeSet<Uuid>> = BTreeMap::new();
        for (role, sql) in [("order", commands)].into_iter().chain(ROLES.map(|role| (role, replies))) {
            let mut connection = self.connection().await;
            let rows: Vec<(Uuid, String)> =
                sqlx::query_as(self.sql(role, sql)).fetch_all(&mut connection).await.unwrap();
            rows.into_iter().for_each(|(id, to)| _ = said.entry(to).or_default().insert(id));
        }
        for (to, said) in said {
            let brokers = broker.address();
            let name = format!("{to}.commands");
            let started = Instant::now();
            loop {
                let brokers = brokers.clone();
                let name = name.clone();
                let records = spawn_blocking(move || topic::read(&brokers, &name)).await.unwrap();
                let found: BTreeSet<Uuid> = records.iter().map(topic::Record::id).collect();
                let missing: Vec<_> = said.difference(&found).collect();
                if missing.is_empty() {
                    break;
                }
                assert!(
                    started.elapsed() < PATIENCE,
                    "{} of {} never came to {to}: {missing:?}",
                    missing.len(),
                    said.len()
                );
            }
        }
    }

    /// Checks all of these invariants.
    pub async fn are_whole(&self, broker: &Broker) {
        self.hold_together().await;
        self.agree_with(broker).await;
        self.said_all(broker).await;
    }

    pub async fn drop(self) {
        for role in ROLES {
            let sql = format!("DROP SCHEMA {} CASCADE", self.name(role));
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connection().await).await.unwrap();
        }
    }
}

/// Stops all services, as an operator does.
pub fn end(shop: impl IntoIterator<Item = Serving>) {
    for mut service in shop {
        service.signal("TERM");
        assert_eq!(service.code(), Some(143));
    }
}

/// Returns the id, stream and version of each event in a topic, without repeats. Asserts that the first copies of each
/// stream's events are in one partition and in order.
fn in_order(records: &[topic::Record]) -> BTreeSet<(Uuid, String, i64)> {
    let mut found = BTreeSet::new();
    let mut last = HashMap::new();
    for record in records {
        let stream = record.text_key();
        let version = record.header("ce_streamversion").unwrap().parse().unwrap();
        if found.insert((record.id(), stream.to_owned(), version)) {
            let before = last.insert(stream, (record.partition, version)).unwrap_or((record.partition, 0));
            assert_eq!((record.partition, version - 1), before, "{stream} is out of order");
        }
    }
    found
}

/// Returns the URL of the bus, with short sessions. A killed member keeps its partitions until its session ends, so
/// with longer sessions no time would be left for orders between faults.
pub fn bus(broker: &Broker) -> String {
    format!("kafka://{}?partitions=4&session.timeout.ms=3000", broker.address())
}
