//! A user's SQL in the transaction that moves the checkpoint: the table and the checkpoint never part, whatever happens.
#![allow(clippy::unwrap_used)]

mod postgres;

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
    commit::COMMIT_ROWS_MAX, health::State, worker::RetryPolicy,
};
use annals_postgres::{PostgresStore, SqlHandler, SqlStore};
use annals_tests::tally::{Tally, TallyCommand, TallyEvent, add, eventually};
use async_trait::async_trait;
use sqlx::{Connection, PgConnection};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use self::postgres::{PROMPTLY, Schema, append, url};

/// What goes wrong with an amount, after its row was written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    Error,
    Panic,
    /// A statement fails, and the handler does as if nothing was.
    SwallowedError,
    /// A constraint that is checked at the very end.
    Deferred,
    /// It stages more documents than fit into a commit with those of others.
    Large(usize),
    /// It writes in a nested transaction, and rolls it back.
    NestedRollback,
    NestedCommit,
    /// Its own session is ended under it, once.
    KillOnce,
}

/// Writes a row for each amount.
#[derive(Clone)]
struct Rows {
    schema: Schema,
    troubles: Arc<Mutex<HashMap<i64, Trouble>>>,
    /// How long it takes over a row, at most.
    micros_max: u64,
    handled: Arc<AtomicU64>,
    /// Counts amounts here too, by the log.
    copies: Option<Repository<Tally>>,
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

struct Bed {
    schema: Schema,
    plain: PostgresStore,
    store: SqlStore,
    rows: Rows,
}

struct Running(JoinHandle<Result<(), String>>, CancellationToken);

impl Running {
    async fn kill(self) {
        self.0.abort();
        _ = self.0.await;
    }

    async fn stop(self) {
        self.1.cancel();
        tokio::time::timeout(PROMPTLY, self.0).await.expect("it stops").unwrap().unwrap();
    }
}

impl Bed {
    async fn new() -> Self {
        let schema = Schema::new();
        let separator = if url().contains('?') { '&' } else { '?' };
        let named = format!("{}{separator}application_name={}", url(), schema.name());
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

    fn trouble(&self, amount: i64, trouble: Trouble) {
        self.rows.troubles.lock().unwrap().insert(amount, trouble);
    }

    async fn add(&self, id: &str, amounts: impl IntoIterator<Item = i64>) {
        let store: Arc<dyn EventStore> = Arc::new(self.plain.clone());
        add(&store, id, amounts).await;
    }

    fn start(&self, lanes: u32) -> Running {
        let shutdown = CancellationToken::new();
        let rows = Subscription::new("rows", self.store.handler(self.rows.clone()))
            .query(LogQuery::categories(["tally"]))
            .lanes(lanes)
            .retry(RetryPolicy { attempts_max: 1, ..RetryPolicy::default() });
        let task = tokio::spawn(rows.run(Arc::new(self.store.clone()), Health::default(), shutdown.clone()));
        Running(task, shutdown)
    }

    /// The amounts in the table, in the order of the log.
    async fn seen(&self) -> Vec<i64> {
        let sql = self.schema.sql("SELECT amount FROM annals.seen ORDER BY position, n");
        sqlx::query_scalar(sql).fetch_all(&mut self.schema.connection().await).await.unwrap()
    }

    async fn becomes(&self, amounts: &[i64]) {
        eventually(&format!("{amounts:?} were seen"), async || (self.seen().await == amounts).then_some(())).await;
    }

    async fn letters(&self) -> Vec<(Arc<str>, String)> {
        let letters = DeadLetters::new(Arc::new(self.plain.clone())).list("rows").await.unwrap();
        letters.into_iter().map(|letter| (letter.parked.key, letter.parked.reason)).collect()
    }

    /// What they were parked for, once there are so many.
    async fn parked(&self, count: usize) -> Vec<(Arc<str>, String)> {
        eventually("they are parked", async || Some(self.letters().await).filter(|all| all.len() == count)).await
    }

    /// Each event has its row, once, and nothing else has; in the order of its stream.
    async fn exactly_once(&self, events: i64) {
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

    /// Watches, from outside and as of one moment each, that rows and checkpoint do not part. For one lane that parks nothing.
    fn watch(&self) -> JoinHandle<()> {
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

    /// Sessions of this test that have a transaction open.
    async fn open_transactions(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND xact_start IS NOT NULL";
        let count = sqlx::query_scalar(sql).bind(self.schema.name());
        count.fetch_one(&mut self.schema.connection().await).await.unwrap()
    }

    async fn nothing_is_open(&self) {
        eventually("no transaction is open", async || (self.open_transactions().await == 0).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_and_checkpoint_move_together() {
    let bed = Bed::new().await;
    let watch = bed.watch();
    bed.add("a", 1..=100).await;
    let running = bed.start(1);
    bed.add("b", 101..=200).await;
    bed.exactly_once(200).await;
    bed.becomes(&Vec::from_iter(1..=200)).await;
    running.stop().await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    bed.nothing_is_open().await;
    // Of what passes between handler and store, nothing is left.
    let sql = bed.schema.sql("SELECT DISTINCT collection FROM annals.documents");
    let left: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut bed.schema.connection().await).await.unwrap();
    assert_eq!(left, ["checkpoint"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_message_leaves_nothing_and_works_later() {
    for trouble in [Trouble::Error, Trouble::Panic, Trouble::SwallowedError, Trouble::Deferred] {
        // The first of the batch, one amid, the last.
        for failing in [1, 3, 5] {
            let bed = Bed::new().await;
            bed.trouble(failing, trouble);
            for amount in 1..=5 {
                bed.add(&amount.to_string(), [amount]).await;
            }
            bed.add(&failing.to_string(), [6]).await;
            let others: Vec<i64> = (1..=5).filter(|amount| *amount != failing).collect();
            let running = bed.start(1);
            let letters = bed.parked(1).await;
            assert_eq!(*letters[0].0, *format!("tally-{failing}"));
            let reason = match trouble {
                Trouble::Error => "does not please",
                Trouble::Panic => "is too much",
                Trouble::SwallowedError => "current transaction is aborted",
                _ => "violates foreign key constraint",
            };
            assert!(letters[0].1.contains(reason), "{letters:?}");
            bed.becomes(&others).await;
            bed.nothing_is_open().await;
            // In vain first; then it works.
            let redrive = DeadLetters::new(Arc::new(bed.plain.clone()));
            redrive.redrive("rows", &letters[0].0).await.unwrap();
            let tries = bed.rows.handled.load(Ordering::SeqCst);
            let again = async || (bed.rows.handled.load(Ordering::SeqCst) > tries).then_some(());
            eventually("it is tried again", again).await;
            bed.nothing_is_open().await;
            assert_eq!(bed.seen().await, others, "{trouble:?}");
            bed.rows.troubles.lock().unwrap().clear();
            eventually("it is redriven", async || {
                redrive.redrive("rows", &letters[0].0).await.ok();
                sleep(Duration::from_millis(50)).await;
                bed.letters().await.is_empty().then_some(())
            })
            .await;
            bed.exactly_once(6).await;
            running.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_left_to_the_next_commit_has_its_row_there() {
    let bed = Bed::new().await;
    // The second makes the commit too large, so that the worker takes it out again.
    bed.trouble(1, Trouble::Large(COMMIT_ROWS_MAX / 2 - 100));
    bed.trouble(2, Trouble::Large(COMMIT_ROWS_MAX / 2 + 200));
    // Too large even by itself.
    bed.trouble(5, Trouble::Large(COMMIT_ROWS_MAX + 1));
    let watch = bed.watch();
    bed.add("a", 1..=4).await;
    let running = bed.start(1);
    bed.exactly_once(4).await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    bed.add("b", [5]).await;
    bed.add("c", [6]).await;
    let letters = bed.parked(1).await;
    assert!(letters[0].1.contains("rows; a commit takes"), "{letters:?}");
    bed.becomes(&[1, 2, 3, 4, 6]).await;
    running.stop().await;
    bed.nothing_is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_within_is_a_savepoint() {
    let bed = Bed::new().await;
    bed.trouble(1, Trouble::NestedCommit);
    bed.trouble(3, Trouble::NestedRollback);
    bed.trouble(4, Trouble::NestedCommit);
    let watch = bed.watch();
    bed.add("a", 1..=5).await;
    let running = bed.start(1);
    bed.exactly_once(5).await;
    running.stop().await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
}

/// What is staged and what is written by SQL hold together also where others write to the same stream.
#[tokio::test(flavor = "multi_thread")]
async fn conflicts_roll_the_rows_back() {
    let mut bed = Bed::new().await;
    bed.rows.copies = Some(Repository::with(Arc::new(bed.store.clone()), "copy", 10));
    bed.add("a", 1..=200).await;
    let running = bed.start(1);
    let rival: Repository<Tally> = Repository::with(Arc::new(bed.schema.store().await), "copy", 10);
    let mut rivals = 0;
    while bed.seen().await.len() < 200 {
        rivals += 1;
        rival.execute("all", TallyCommand::Add(1_000), uuid::Uuid::new_v4()).await.unwrap();
    }
    bed.exactly_once(200).await;
    let copy = rival.state("all").await.unwrap();
    assert_eq!(copy.sum(), 200 * 201 / 2 + 1_000 * rivals);
    assert_eq!(bed.letters().await, []);
    running.stop().await;
    bed.nothing_is_open().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_whose_session_ends_is_not_at_fault() {
    let bed = Bed::new().await;
    bed.trouble(2, Trouble::KillOnce);
    bed.add("a", 1..=3).await;
    let running = bed.start(1);
    bed.exactly_once(3).await;
    assert_eq!(bed.letters().await, []);
    running.stop().await;
}

/// All sessions, again and again, at any point: within a handler, between two messages, within the commit.
#[tokio::test(flavor = "multi_thread")]
async fn ended_sessions_lose_and_double_nothing() {
    const KEYS: usize = 8;
    const KILLS: usize = 60;
    for lanes in [1, 3] {
        let mut bed = Bed::new().await;
        bed.rows.micros_max = 700;
        let watch = (lanes == 1).then(|| bed.watch());
        let running = bed.start(lanes);
        let (mut killer, mut killed, mut added) = (bed.schema.connection().await, 0, 0);
        for kill in 0..KILLS {
            let mut writers = JoinSet::new();
            let other = bed.schema.store().await;
            for key in 0..KEYS {
                let (other, before) = (other.clone(), added / KEYS as i64);
                let mut commit = append(&format!("tally-{key}"), before, 3);
                for (event, amount) in commit.appends[0].events.iter_mut().zip(before..) {
                    (event.type_name, event.data) = ("tally.added".into(), format!(r#"{{"amount":{amount}}}"#));
                }
                writers.spawn(async move { other.commit(commit).await.unwrap() });
            }
            writers.join_all().await;
            other.close().await.unwrap();
            added += 3 * KEYS as i64;
            sleep(Duration::from_millis(kill as u64 % 7 * 3)).await;
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                        WHERE application_name = $1 AND xact_start IS NOT NULL";
            let ended: i64 = sqlx::query_scalar(sql).bind(bed.schema.name()).fetch_one(&mut killer).await.unwrap();
            killed += ended;
        }
        bed.exactly_once(added).await;
        assert_eq!(bed.letters().await, []);
        assert!(killed > 5, "{killed} sessions ended: this tested nothing");
        if let Some(watch) = watch {
            assert!(!watch.is_finished(), "{:?}", watch.await);
            watch.abort();
        }
        running.stop().await;
        bed.nothing_is_open().await;
    }
}

/// As a process that dies: the tasks of the subscription are dropped wherever they are.
#[tokio::test(flavor = "multi_thread")]
async fn dropped_tasks_lose_and_double_nothing() {
    let mut bed = Bed::new().await;
    bed.rows.micros_max = 2_000;
    let watch = bed.watch();
    let mut amidst = 0;
    for life in 0..40 {
        bed.add("a", life * 10..life * 10 + 10).await;
        let running = bed.start(1);
        sleep(Duration::from_micros(life.unsigned_abs() * 3_571 % 30_000)).await;
        amidst += bed.open_transactions().await;
        running.kill().await;
        bed.nothing_is_open().await;
    }
    assert!(amidst > 5, "only {amidst} transactions were open: this tested nothing");
    let running = bed.start(1);
    bed.exactly_once(400).await;
    assert!(!watch.is_finished(), "{:?}", watch.await);
    watch.abort();
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_another_store_it_does_nothing() {
    let bed = Bed::new().await;
    bed.add("a", [1]).await;
    let (shutdown, health) = (CancellationToken::new(), Health::default());
    let astray = Subscription::new("rows", bed.store.handler(bed.rows.clone()));
    let task = tokio::spawn(astray.run(Arc::new(bed.plain.clone()), health.clone(), shutdown));
    let reason = eventually("it says so", async || match health.parts().get("rows/0") {
        Some(State::Trouble(reason)) => Some(reason.clone()),
        _ => None,
    });
    assert!(reason.await.contains("runs on that store only"));
    assert_eq!((bed.seen().await, bed.letters().await), (vec![], vec![]));
    task.abort();
}
