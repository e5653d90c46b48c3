//! A PostgreSQL server for tests. Each test has its own schema, which is dropped after the test.
#![allow(dead_code)]

pub mod load;
#[cfg(target_os = "linux")]
pub mod pooler;
#[cfg(target_os = "linux")]
pub mod server;
#[cfg(target_os = "linux")]
pub mod virtual_address;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{
    Append, Commit, EventStore, Expected, LogQuery, MemoryStore, Metadata, NewEvent, Position, Recorded, StreamId,
    Version,
};
use annals_postgres::{PostgresStore, Settings};
use annals_sqlite::SqliteStore;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::sleep;
use uuid::Uuid;

/// Returns the URL of the server.
pub fn url() -> String {
    std::env::var("DATABASE_URL").expect(
        "DATABASE_URL is not set: run the tests with `./test`, which starts a PostgreSQL of its own, \
         or name a database that they may create schemas in",
    )
}

/// A schema that is dropped together with its last clone.
#[derive(Clone)]
pub struct Schema(Arc<Owned>);

struct Owned(String);

impl Drop for Owned {
    fn drop(&mut self) {
        let name = self.0.clone();
        let drop = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect(&url()).await?;
                // A prepared transaction that a failed test left behind would hold its locks indefinitely.
                let prepared: Vec<String> =
                    sqlx::query_scalar("SELECT gid FROM pg_prepared_xacts WHERE starts_with(gid, $1 || '-')")
                        .bind(&name)
                        .fetch_all(&mut connection)
                        .await?;
                for id in prepared {
                    sqlx::raw_sql(AssertSqlSafe(format!("ROLLBACK PREPARED '{id}'"))).execute(&mut connection).await?;
                }
                // An open transaction of a failed test must not block the other tests.
                sqlx::raw_sql("SET lock_timeout = '2s'").execute(&mut connection).await?;
                let sql = format!("DROP SCHEMA IF EXISTS {name} CASCADE");
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
                let roles: Vec<String> =
                    sqlx::query_scalar("SELECT rolname::text FROM pg_roles WHERE starts_with(rolname, $1 || '_')")
                        .bind(&name)
                        .fetch_all(&mut connection)
                        .await?;
                for role in roles {
                    sqlx::raw_sql(AssertSqlSafe(format!("DROP ROLE {role}"))).execute(&mut connection).await?;
                }
                connection.close().await
            })
        });
        // If a schema cannot be dropped, it stays behind, and the outcome of the test does not change.
        drop.join().ok();
    }
}

impl Schema {
    pub fn new() -> Self {
        // Fails here if the URL is missing.
        url();
        Self(Arc::new(Owned(format!("test_{}", Uuid::new_v4().simple()))))
    }

    pub fn name(&self) -> &str {
        &self.0.0
    }

    pub fn settings(&self) -> Settings {
        Settings { schema: self.name().into(), connections: 4 }
    }

    pub async fn store(&self) -> PostgresStore {
        PostgresStore::connect(&url(), self.settings()).await.unwrap()
    }

    /// Returns a name for a prepared transaction, which is rolled back after the test if it still exists.
    pub fn prepared(&self) -> String {
        format!("{}-{}", self.name(), Uuid::new_v4().simple())
    }

    /// Returns a name for a role, which is dropped after the test.
    pub fn role(&self, name: &str) -> String {
        format!("{}_{name}", self.name())
    }

    /// Returns a new connection, independent of the store.
    pub async fn connection(&self) -> PgConnection {
        PgConnection::connect(&url()).await.unwrap()
    }

    /// Returns the statement for this schema. The statement is written for the schema `annals`.
    pub fn sql(&self, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("annals.", &format!("{}.", self.name())))
    }
}

/// Runs the test on each kind of store, starting with an empty store each time.
pub async fn on_each_store(property: impl AsyncFn(Arc<dyn EventStore>)) {
    property(Arc::new(MemoryStore::new())).await;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    property(Arc::new(sqlite.clone())).await;
    sqlite.close().await.unwrap();
    let schema = Schema::new();
    property(Arc::new(schema.store().await)).await;
}

/// The limit for a step that should happen at once.
pub const PROMPTLY: Duration = Duration::from_secs(30);

/// Returns a commit with this many events for a stream.
pub fn append(stream: &str, expected: i64, count: usize) -> Commit {
    let event = || NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: Metadata::of_request(Uuid::new_v4()),
    };
    let append = Append {
        stream: StreamId::parse(stream).unwrap(),
        expected: Expected::Version(Version(expected)),
        events: (0..count).map(|_| event()).collect(),
    };
    Commit { appends: vec![append], puts: Vec::new() }
}

/// Returns the whole log. A failed statement reports its error before its transaction has ended. Until the transaction
/// ends, readers do not pass the gap that it leaves. Therefore this function first waits until no writer is in flight.
pub async fn whole_log(store: &PostgresStore) -> Vec<Arc<Recorded>> {
    let deadline = Instant::now() + PROMPTLY;
    while store.status().await.unwrap().waits_for.is_some() {
        assert!(Instant::now() < deadline, "a writer is still in flight");
        sleep(Duration::from_millis(5)).await;
    }
    readable_log(store).await
}

/// Returns the log up to the first gap that a writer may still fill.
pub async fn readable_log(store: &PostgresStore) -> Vec<Arc<Recorded>> {
    let mut all = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(&LogQuery::all(), after, 100).await.unwrap();
        if page.next == after {
            return all;
        }
        after = page.next;
        all.extend(page.events);
    }
}

/// Returns the positions of the events.
pub fn numbers(events: &[Arc<Recorded>]) -> Vec<i64> {
    events.iter().map(|event| event.position.0).collect()
}
