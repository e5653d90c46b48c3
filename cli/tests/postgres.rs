//! The command on PostgreSQL. Run by `./test`, which starts a server.
#![allow(clippy::unwrap_used)]

mod travel;

use std::sync::Arc;

use annals_postgres::{PostgresStore, Settings};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use travel::{Ended, TRIPS, command, ended, travel};

/// A schema of its own, gone after the test.
struct Schema(String);

impl Schema {
    fn new() -> Self {
        Self(format!("cli_{}", Uuid::new_v4().simple()))
    }

    fn url() -> String {
        std::env::var("DATABASE_URL").expect(
            "DATABASE_URL is not set: run the tests with `./test`, which starts a PostgreSQL of its own, or name a \
             database that they may create schemas in",
        )
    }

    async fn store(&self) -> PostgresStore {
        let settings = Settings { schema: self.0.clone(), connections: 4 };
        PostgresStore::connect(&Self::url(), settings).await.unwrap()
    }

    /// The command on this schema.
    fn annals(&self, words: &[&str]) -> Ended {
        let mut command = command(words);
        command.env("ANNALS_STORE", Self::url()).env("ANNALS_SCHEMA", &self.0);
        ended(command)
    }

    async fn sql(&self, sql: &str) {
        let mut connection = PgConnection::connect(&Self::url()).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql.replace("annals.", &format!("{}.", self.0))))
            .execute(&mut connection)
            .await
            .unwrap();
    }

    async fn drop(self) {
        self.sql(&format!("DROP SCHEMA IF EXISTS {} CASCADE", self.0)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_is_created_when_that_is_asked_for_and_looked_at() {
    let schema = Schema::new();
    let missing = schema.annals(&["streams"]).refused();
    assert!(missing.contains(&format!("schema {} of postgres", schema.0)), "{missing}");
    assert!(missing.contains("there is no such store; `migrate` creates one"), "{missing}");
    assert!(schema.annals(&["migrate"]).fine().ends_with(": created\n"));
    assert!(schema.annals(&["migrate"]).fine().ends_with(": up to date\n"));

    let store = schema.store().await;
    travel(Arc::new(store.clone()), &TRIPS).await;
    let streams = schema.annals(&["streams", "--category", "trip", "--json"]).json();
    let names: Vec<_> = streams.iter().map(|stream| stream["stream"].as_str().unwrap()).collect();
    assert_eq!(names, TRIPS.map(|trip| format!("trip-{trip}")));
    let every = schema.annals(&["streams", "--json"]).json();
    let events: i64 = every.iter().map(|stream| stream["events"].as_i64().unwrap()).sum();
    assert_eq!(
        schema.annals(&["tail", "--from", "0", "--count", &events.to_string(), "--json"]).json().len() as i64,
        events
    );
    assert_eq!(schema.annals(&["sagas", "--status", "stuck", "--json"]).json()[0]["saga_id"], "lost-1");
    assert!(schema.annals(&["saga", "poor-1"]).fine().contains("← charge card refused: the card is declined"));
    assert_eq!(schema.annals(&["trace", "trip-poor-1", "--json"]).json()[3]["type"], "step.replied");
    let followers = schema.annals(&["subscriptions", "--json"]).json();
    assert!(followers.iter().any(|follower| follower["subscription"] == "brochure" && follower["lag"] == 0));
    store.close().await.unwrap();

    schema.sql("INSERT INTO annals.migrations (version) VALUES (99)").await;
    let newer = schema.annals(&["streams"]).refused();
    assert!(newer.contains("has version 99; this build knows versions up to 1: use a newer build"), "{newer}");
    schema.drop().await;
}

#[tokio::test]
async fn a_database_that_refuses_is_told_apart_from_one_that_is_away() {
    let url = Schema::url();
    let (before, host) =
        url.split_once("://").map(|(scheme, rest)| (scheme, rest.rsplit('@').next().unwrap())).unwrap();
    let nobody = format!("{before}://nobody:secret@{host}");
    let refused = ended(command(&["streams", "--store", &nobody])).refused();
    assert!(refused.contains("the database refuses: ") && !refused.contains("secret"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_moves_from_sqlite_to_postgresql_and_back() {
    let (place, schema) = (travel::Place::with_trips().await, Schema::new());
    let export = |name: &str| place.file(name).to_str().unwrap().to_owned();
    place.annals(&["export", &export("first.ndjson.zst")]).fine();
    schema.annals(&["migrate"]).fine();
    schema.annals(&["import", &export("first.ndjson.zst")]).fine();
    schema.annals(&["export", &export("second.ndjson")]).fine();
    let back = |words: &[&str]| {
        let mut command = command(words);
        command.env("ANNALS_STORE", travel::url(&place.file("back.db")));
        ended(command)
    };
    back(&["migrate"]).fine();
    back(&["import", &export("second.ndjson")]).fine();
    let first = place.annals(&["replay"]).fine();
    assert!(first.lines().count() > 20);
    assert_eq!(schema.annals(&["replay"]).fine(), first);
    assert_eq!(back(&["replay"]).fine(), first);
    back(&["export", &export("third.ndjson")]).fine();
    let documents = |name: &str| {
        let text = std::fs::read_to_string(export(name)).unwrap();
        text.lines().filter(|line| line.starts_with("{\"document\"")).map(str::to_owned).collect::<Vec<_>>()
    };
    place.annals(&["export", &export("plain.ndjson")]).fine();
    assert_eq!(documents("third.ndjson"), documents("plain.ndjson"));
    assert_eq!(documents("second.ndjson"), documents("plain.ndjson"));

    // A service goes on with it, behind the last position.
    let store = schema.store().await;
    let events: Arc<dyn annals::EventStore> = Arc::new(store.clone());
    let running = travel::agency(&events, true).await;
    assert!(
        schema.annals(&["saga", "lost-1", "retry", "--reason", "moved", "--wait", "60s"]).fine().contains("running")
    );
    travel::until("it completes", async || travel::sagas(&events).await.iter().all(|saga| saga.ended_at.is_some()))
        .await;
    running.drain(std::time::Duration::from_secs(30)).await.unwrap();
    store.close().await.unwrap();
    schema.drop().await;
}
