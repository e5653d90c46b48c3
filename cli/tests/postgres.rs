//! Tests of the command on PostgreSQL. `./test` starts a server and runs them.
#![allow(clippy::unwrap_used)]

#[cfg(unix)]
#[allow(dead_code)]
#[path = "../../tests/tests/postgres/server.rs"]
mod server;
mod travel;

use std::sync::Arc;

use annals_postgres::{PostgresStore, Settings};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use travel::{Ended, TRIPS, command, ended, travel};

/// A schema for one test, which is dropped after the test.
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

    /// Runs the command on this schema.
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
async fn only_migrate_creates_a_schema_and_every_command_reads_its_store() {
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
    assert!(newer.contains("has version 99; this build knows versions up to 5: use a newer build"), "{newer}");
    schema.drop().await;
}

#[tokio::test]
async fn failed_login_differs_from_unreachable_database() {
    let url = Schema::url();
    let (before, host) =
        url.split_once("://").map(|(scheme, rest)| (scheme, rest.rsplit('@').next().unwrap())).unwrap();
    let nobody = format!("{before}://nobody:secret@{host}");
    let refused = ended(command(&["streams", "--store", &nobody])).refused();
    assert!(refused.contains("access to the database is denied: ") && !refused.contains("secret"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn store_moves_from_sqlite_to_postgresql_and_back() {
    let place = travel::Place::with_trips().await;
    let schema = Schema::new();
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

    // A service continues on the store after the last position.
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

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_changes_of_a_superuser_to_a_sealed_log() {
    let schema = Schema::new();
    let store = schema.store().await;
    travel(Arc::new(store.clone()), &TRIPS).await;
    store.close().await.unwrap();
    let sealed = schema.annals(&["verify", "--seal", "--json"]).json().remove(0);
    let until = sealed["sealed_until"].as_i64().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("sealed.ndjson").to_str().unwrap().to_owned();
    schema.annals(&["export", &file]).fine();
    let places: Vec<(i64, String)> = sqlx::query_as(AssertSqlSafe(format!(
        "SELECT position, 'position ' || position || ' (' || stream_id || ' v' || version || ')' FROM {}.events ORDER BY position",
        schema.0
    )))
    .fetch_all(&mut PgConnection::connect(&Schema::url()).await.unwrap())
    .await
    .unwrap();
    let at = |position: i64| places.iter().find(|(at, _)| *at == position).unwrap().1.clone();
    schema.drop().await;
    let changed = "the event was changed after it was sealed";
    for (sql, expected) in [
        ("SELECT 1".to_owned(), Vec::new()),
        (
            "UPDATE annals.events SET data = '{\"trip_id\":\"x\"}' WHERE position = 5".into(),
            vec![format!("{}: {changed}", at(5))],
        ),
        // Even an added blank is found.
        (
            "UPDATE annals.events SET data = (data::text || ' ')::json WHERE position = 5".into(),
            vec![format!("{}: {changed}", at(5))],
        ),
        (
            "UPDATE annals.events SET metadata = (metadata::jsonb || '{\"note\":1}')::json WHERE position = 5".into(),
            vec![format!("{}: {changed}", at(5))],
        ),
        (
            "UPDATE annals.events SET recorded_at = 'infinity' WHERE position = 5".into(),
            vec![format!("{}: {changed}", at(5))],
        ),
        (
            "DELETE FROM annals.events WHERE position = 5".into(),
            vec![format!("{}: the sealed event is missing", at(5))],
        ),
        (
            "UPDATE annals.events SET position = position + 1000 WHERE position IN (5, 6);
             UPDATE annals.events SET position = 1011 - position WHERE position > 1000"
                .into(),
            vec![
                format!("{}: {changed}: the event is now ", at(5)),
                format!("{}: {changed}: the event is now ", at(6)),
            ],
        ),
        (
            format!("DELETE FROM annals.events WHERE position > {until} - 2"),
            vec![
                format!("{}: the sealed event is missing", at(until - 1)),
                format!("{}: the sealed event is missing", at(until)),
            ],
        ),
    ] {
        let copy = Schema::new();
        copy.annals(&["migrate"]).fine();
        copy.annals(&["import", &file]).fine();
        copy.sql(&format!("ALTER TABLE annals.events DISABLE TRIGGER ALL; {sql}")).await;
        let found = copy.annals(&["verify"]);
        assert_eq!(found.code, i32::from(!expected.is_empty()), "{sql}: {}", found.out);
        for line in expected {
            assert!(found.out.lines().any(|found| found.starts_with(&line)), "{sql}: {line} is not in {}", found.out);
        }
        copy.drop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operator_role_suffices_for_repairs() {
    let schema = Schema::new();
    let store = schema.store().await;
    travel(Arc::new(store.clone()), &TRIPS).await;
    let role = format!("{}_oncall", schema.0);
    schema.sql(&format!("CREATE ROLE {role}; SELECT annals.grant_access('{role}', 'operator')")).await;
    let as_operator = |words: &[&str]| {
        let url = Schema::url();
        let mut command = command(words);
        let separator = if url.contains('?') { '&' } else { '?' };
        command
            .env("ANNALS_STORE", format!("{url}{separator}options=-c%20role%3D{role}"))
            .env("ANNALS_SCHEMA", &schema.0);
        ended(command)
    };
    let events: Arc<dyn annals::EventStore> = Arc::new(store.clone());
    let running = travel::agency(&events, true).await;
    as_operator(&["dead-letters", "redrive", "brochure", "trip-odd-1", "--reason", "the map is new"]).fine();
    as_operator(&["saga", "lost-1", "retry", "--reason", "they answer now", "--wait", "60s"]).fine();
    as_operator(&["subscription", "brochure", "pause", "--reason", "a look"]).fine();
    as_operator(&["subscription", "brochure", "resume", "--reason", "enough"]).fine();
    let acts = as_operator(&["read", "operator-brochure", "--json"]).json();
    let types: Vec<_> = acts.iter().map(|act| act["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["operator.redriven", "operator.paused", "operator.resumed"]);
    running.drain(std::time::Duration::from_secs(30)).await.unwrap();
    store.close().await.unwrap();
    schema.sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    schema.drop().await;
}

#[cfg(unix)]
async fn order(database: &str, trip: &str) {
    let store = PostgresStore::connect(database, Settings::default()).await.unwrap();
    let trips = annals::Repository::<travel::Trip>::new(Arc::new(store.clone()));
    let ordered = travel::TripEvent::Ordered { trip_id: trip.to_owned(), price: 1 };
    trips.execute(trip, ordered, Uuid::new_v4()).await.unwrap();
    store.close().await.unwrap();
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn tail_continues_after_a_server_outage() {
    use std::io::{BufRead, BufReader};

    let mut server = server::Server::start().await;
    order(&server.url(), "before").await;
    let mut tail = command(&["tail", "--from", "0", "--count", "3", "--json"]);
    tail.env("ANNALS_STORE", server.url()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut tail = tail.spawn().unwrap();
    let mut shown = BufReader::new(tail.stdout.take().unwrap()).lines();
    let mut said = BufReader::new(tail.stderr.take().unwrap()).lines();
    let mut next = || shown.next().unwrap().unwrap();
    assert!(next().contains("\"stream\":\"trip-before\""));
    server.kill();
    let away = std::time::Instant::now();
    let trouble = said.next().unwrap().unwrap();
    assert!(trouble.ends_with("; trying again"), "{trouble}");
    // The command waits for a restarting server for half a minute in total, not for half a minute in each of ten
    // retries.
    assert!(away.elapsed().as_secs() < 120, "{:?}", away.elapsed());
    server.resume().await;
    order(&server.url(), "after-1").await;
    order(&server.url(), "after-2").await;
    assert!(next().contains("\"stream\":\"trip-after-1\"") && next().contains("\"stream\":\"trip-after-2\""));
    assert!(tail.wait().unwrap().success());
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_reason_without_the_password() {
    let server = server::Server::start().await;
    let mut connection = PgConnection::connect(&server.url()).await.unwrap();
    let hba: String = sqlx::query_scalar("SHOW hba_file").fetch_one(&mut connection).await.unwrap();
    std::fs::write(hba, "host all postgres all trust\nhost all all all scram-sha-256\n").unwrap();
    let role = "CREATE ROLE shop LOGIN SUPERUSER PASSWORD 'right'; SELECT pg_reload_conf()";
    sqlx::raw_sql(role).execute(&mut connection).await.unwrap();
    let (_, host) = server.url().rsplit_once('@').map(|(before, host)| (before.to_owned(), host.to_owned())).unwrap();
    let annals = |password: &str, host: &str, words: &[&str]| {
        let url = format!("postgres://shop:{password}@{host}");
        ended(command(&[words, &["--store", &url]].concat()))
    };
    travel::until("the server asks for passwords", async || annals("wrong", &host, &["migrate"]).code == 2).await;
    let made = annals("right", &host, &["migrate"]).fine();
    assert!(made.ends_with(": created\n") && !made.contains("right"), "{made}");
    for (password, host, words, said) in [
        ("wrong-one", &*host, &["streams"][..], "password authentication failed for user"),
        ("right", &*host.replace("/postgres", "/nowhere"), &["streams"], "database \"nowhere\" does not exist"),
        ("right", "127.0.0.1:1/postgres", &["streams"], "the database cannot"),
        ("right", &*host, &["streams", "--schema", "nowhere"], "there is no such store; `migrate` creates one"),
        ("right", &*host, &["read", "trip-nowhere"], "there is no stream trip-nowhere"),
        ("right", &*host, &["saga", "nobody"], "this store has no sagas"),
        ("right", &*host, &["export", "/nowhere/file"], "/nowhere/file cannot be written"),
        ("right", &*host, &["import", "/nowhere/file"], "/nowhere/file cannot be read"),
    ] {
        let refused = annals(password, host, words).refused();
        assert!(refused.contains(said) && !refused.contains(&format!(":{password}")), "{words:?}: {refused}");
    }
}
