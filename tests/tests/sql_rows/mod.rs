//! A handler that writes a row for each event, a subscription with that handler, and the invariants of the rows.
#![allow(dead_code)]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use annals::{
    DeadLetters, DocumentKey, EventStore, HandlerError, Health, LogQuery, Message, Repository, Subscription, Work,
    worker::RetryPolicy,
};
use annals_postgres::{PostgresStore, SqlHandler, SqlStore};
use annals_tests::tally::{Tally, TallyCommand, TallyEvent, add, eventually};
use async_trait::async_trait;
use sqlx::{Connection, PgConnection};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::postgres::{PROMPTLY, Schema, url};

/// What goes wrong with an amount after its row has been written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trouble {
    Error,
    Panic,
    /// A statement fails, and the handler ignores the error.
    SwallowedError,
    /// A deferred constraint fails at the end of the transaction.
    Deferred,
    /// The handler stages so many documents that they do not fit into one commit with the documents of other messages.
    Large(usize),
    /// The handler writes in a nested transaction and rolls that transaction back.
    NestedRollback,
    NestedCommit,
    /// The handler's own session is terminated once, while the handler runs.
    KillOnce,
}

/// Writes a row for each amount.
#[derive(Clone)]
pub struct Rows {
    pub schema: Schema,
    pub troubles: Arc<Mutex<HashMap<i64, Trouble>>>,
    /// The longest time in microseconds that the handler takes for a row.
    pub micros_max: u64,
    pub handled: Arc<AtomicU64>,
    /// If set, the handler also copies the amounts through the log.
    pub copies: Option<Repository<Tally>>,
}

#[async_trait]
impl SqlHandler for Rows {
    async fn handle(
        &self,
        message: &Message,
        transaction: &mut PgConnection,
        work: &mut Work,
    ) -> Result<(), HandlerError> {
        let Some(TallyEvent::Added { amount }) = message.decode()? else { return Ok(()) };
        self.handled.fetch_add(1, Ordering::SeqCst);
        let row = |position: i64| {
            let insert = self.schema.sql("INSERT INTO annals.seen (position, stream, amount) VALUES ($1, $2, $3)");
            sqlx::query(insert).bind(position).bind(&*message.subject).bind(amount)
        };
        if let Some(copies) = &self.copies {
            work.execute(copies, "all", &TallyCommand::Add(amount)).await?;
        }
        let trouble = self.troubles.lock().unwrap().get(&amount).copied();
        if let Some(Trouble::NestedCommit | Trouble::NestedRollback) = trouble {
            let mut nested = transaction.begin().await?;
            row(-1).execute(&mut *nested).await?;
            drop(nested);
            let mut nested = transaction.begin().await?;
            row(message.position.0).execute(&mut *nested).await?;
            if trouble == Some(Trouble::NestedCommit) {
                nested.commit().await?;
                return Ok(());
            }
            nested.rollback().await?;
        }
        row(message.position.0).execute(&mut *transaction).await?;
        if self.micros_max > 0 {
            sleep(Duration::from_micros(amount.unsigned_abs() * 7_919 % self.micros_max)).await;
        }
        match trouble {
            Some(Trouble::Error) => Err(format!("{amount} does not please"))?,
            Some(Trouble::Panic) => panic!("{amount} is too much"),
            Some(Trouble::SwallowedError) => {
                sqlx::query("SELECT 1 / 0").execute(transaction).await.unwrap_err();
            }
            Some(Trouble::Deferred) => {
                let insert = self.schema.sql("INSERT INTO annals.deferred VALUES (1)");
                sqlx::query(insert).execute(transaction).await?;
            }
            Some(Trouble::Large(rows)) => {
                for row in 0..rows {
                    work.put(&DocumentKey::new("large", format!("{amount}.{row}")), &row)?;
                }
            }
            Some(Trouble::KillOnce) => {
                self.troubles.lock().unwrap().remove(&amount);
                sqlx::query("SELECT pg_terminate_backend(pg_backend_pid())").execute(transaction).await?;
            }
            Some(Trouble::NestedRollback | Trouble::NestedCommit) | None => {}
        }
        Ok(())
    }
}

pub struct Bed {
    pub schema: Schema,
    pub plain: PostgresStore,
    pub store: SqlStore,
    pub rows: Rows,
}

pub struct Running(JoinHandle<Result<(), annals::NameError>>, CancellationToken);

impl Running {
    pub async fn kill(self) {
        self.0.abort();
        _ = self.0.await;
    }

    pub async fn stop(self) {
        self.1.cancel();
        tokio::time::timeout(PROMPTLY, self.0).await.expect("it stops").unwrap().unwrap();
    }
}

impl Bed {
    pub async fn new() -> Self {
        Self::at(&url()).await
    }

    /// Creates a test bed whose store uses another URL of the same database.
    pub async fn at(url: &str) -> Self {
        let schema = Schema::new();
        let separator = if url.contains('?') { '&' } else { '?' };
        let named = format!("{url}{separator}application_name={}", schema.name());
        let plain = PostgresStore::connect(&named, schema.settings()).await.unwrap();
        let tables = "CREATE TABLE annals.seen (n bigint GENERATED ALWAYS AS IDENTITY, position bigint, stream text, amount bigint);
            CREATE TABLE annals.referred (id int PRIMARY KEY);
            CREATE TABLE annals.deferred (id int REFERENCES annals.referred DEFERRABLE INITIALLY DEFERRED)";
        sqlx::raw_sql(schema.sql(tables)).execute(&mut schema.connection().await).await.unwrap();
        let rows = Rows {
            schema: schema.clone(),
            troubles: Arc::default(),
            micros_max: 0,
            handled: Arc::default(),
            copies: None,
        };
        Self { store: SqlStore::new(plain.clone()), plain, schema, rows }
    }

    pub fn trouble(&self, amount: i64, trouble: Trouble) {
        self.rows.troubles.lock().unwrap().insert(amount, trouble);
    }

    pub async fn add(&self, id: &str, amounts: impl IntoIterator<Item = i64>) {
        let store: Arc<dyn EventStore> = Arc::new(self.plain.clone());
        add(&store, id, amounts).await;
    }

    pub fn start(&self, lanes: u32) -> Running {
        let shutdown = CancellationToken::new();
        let rows = Subscription::new("rows", self.store.handler(self.rows.clone()))
            .query(LogQuery::categories(["tally"]))
            .lanes(lanes)
            .retry(RetryPolicy { attempts_max: 1, ..RetryPolicy::default() });
        let task = tokio::spawn(rows.run(Arc::new(self.store.clone()), Health::default(), shutdown.clone()));
        Running(task, shutdown)
    }

    /// Returns the amounts in the table, in the order of the log.
    pub async fn seen(&self) -> Vec<i64> {
        let sql = self.schema.sql("SELECT amount FROM annals.seen ORDER BY position, n");
        sqlx::query_scalar(sql).fetch_all(&mut self.schema.connection().await).await.unwrap()
    }

    pub async fn becomes(&self, amounts: &[i64]) {
        eventually(&format!("{amounts:?} were seen"), async || (self.seen().await == amounts).then_some(())).await;
    }

    pub async fn letters(&self) -> Vec<(Arc<str>, String)> {
        let letters = DeadLetters::new(Arc::new(self.plain.clone())).list("rows").await.unwrap();
        letters.into_iter().map(|letter| (letter.parked.key, letter.parked.reason)).collect()
    }

    /// Returns the reasons of the parked messages, once there are this many.
    pub async fn parked(&self, count: usize) -> Vec<(Arc<str>, String)> {
        eventually("the messages are parked", async || Some(self.letters().await).filter(|all| all.len() == count))
            .await
    }

    /// Asserts that each event has its row exactly once, that there are no other rows, and that the rows follow the
    /// order of their streams.
    pub async fn exactly_once(&self, events: i64) {
        let all = "SELECT count(*), count(s.position), count(DISTINCT e.position) FROM annals.seen AS s
                     FULL JOIN (SELECT * FROM annals.events WHERE stream_id LIKE 'tally-%') AS e USING (position)";
        let mut connection = self.schema.connection().await;
        eventually(&format!("each of {events} has its row"), async || {
            let sql = self.schema.sql(all);
            let found: (i64, i64, i64) = sqlx::query_as(sql).fetch_one(&mut connection).await.unwrap();
            assert!(found.1 <= found.2, "rows, and events: {found:?}");
            (found == (events, events, events)).then_some(())
        })
        .await;
        let disorder =
            "SELECT count(*) FROM (SELECT position < lag(position) OVER (PARTITION BY stream ORDER BY n) AS wrong
                          FROM annals.seen) AS s WHERE wrong";
        let wrong: i64 = sqlx::query_scalar(self.schema.sql(disorder)).fetch_one(&mut connection).await.unwrap();
        assert_eq!(wrong, 0);
    }

    /// Checks from another session, with one snapshot per check, that rows and checkpoint agree. Works only for a
    /// subscription with a single lane and without parked messages.
    pub fn watch(&self) -> JoinHandle<()> {
        let schema = self.schema.clone();
        tokio::spawn(async move {
            let mut connection = schema.connection().await;
            let both = "SELECT (SELECT count(*) FROM annals.seen),
                (SELECT count(*) FROM annals.events WHERE stream_id LIKE 'tally-%' AND position <=
                        (SELECT (body ->> 'next')::bigint FROM annals.documents WHERE collection = 'checkpoint'))";
            loop {
                let (rows, events): (i64, i64) =
                    sqlx::query_as(schema.sql(both)).fetch_one(&mut connection).await.unwrap();
                assert_eq!(rows, events, "rows, and events up to the checkpoint");
            }
        })
    }

    /// Counts the sessions of this test that have a transaction open.
    pub async fn open_transactions(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND xact_start IS NOT NULL";
        let count = sqlx::query_scalar(sql).bind(self.schema.name());
        count.fetch_one(&mut self.schema.connection().await).await.unwrap()
    }

    pub async fn nothing_is_open(&self) {
        eventually("no transaction is open", async || (self.open_transactions().await == 0).then_some(())).await;
    }
}
