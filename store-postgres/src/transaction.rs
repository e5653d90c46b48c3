//! The transaction in which a user's handler writes. The store's commit ends the transaction. Only this kind of
//! transaction stays open while a user's code runs.
//!
//! The transaction has a connection of its own, which is dropped after any problem, such as a cancelled future or an
//! unexpected error. The server rolls back the transaction when the connection ends. A connection from a pool would
//! instead return to the pool with the transaction still open.

use std::{sync::Arc, time::Duration};

use annals::{CommitError, Committed};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    append::append,
    error::{Fault, end_error, fault, write_error},
    group::{GroupPlan, Prepared},
    history::Seen,
    open::{Database, Purpose},
    writer::ANSWER_SECONDS_MAX,
};

/// The number of savepoints that are kept before they are merged into one.
const SAVEPOINTS_MAX: u64 = 32;
/// How many races against other processes a commit may lose. The limit is low, because the rows that the user's SQL has
/// changed stay locked during the retries.
const RACES_MAX: u32 = 4;

/// The settings for the user's SQL. These settings let the server plan the user's SQL as usual, whereas the store's own
/// SQL uses only index seeks. The settings also limit the duration of a statement, the wait for a lock, and the time
/// for which the server keeps an idle transaction, for example while a batch waits for an unavailable store.
const SETTINGS_OF_USER: &str = "SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; \
     SET LOCAL enable_hashjoin = on; SET LOCAL enable_mergejoin = on; SET LOCAL plan_cache_mode = auto; \
     SET LOCAL statement_timeout = '30s'; SET LOCAL lock_timeout = '10s'; \
     SET LOCAL idle_in_transaction_session_timeout = '60s'";
/// Restores the settings for the store's own statement, for the rest of the transaction.
const SETTINGS_OF_STORE: &str = "SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off; \
     SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; SET LOCAL plan_cache_mode = force_generic_plan; \
     SET LOCAL lock_timeout = '500ms'";

/// A connection without an open transaction, with the number of the history to which the connection writes.
pub(crate) struct Idle(u64, PgConnection);

/// An open transaction, with a savepoint after the SQL of each message.
pub(crate) struct OpenTransaction {
    connection: PgConnection,
    /// The number of the history in which the transaction began.
    history: u64,
    id: Uuid,
    /// The last event written in the transaction.
    last: Option<Seen>,
    /// The number of messages whose SQL is in the transaction.
    handled: u64,
    /// The number of messages before the savepoint `annals_0`.
    merged: u64,
    /// Whether the session may serve another client afterwards. If so, statements that the user's SQL has prepared must
    /// be deallocated.
    pooled: bool,
}

impl Idle {
    async fn connect(database: &Database) -> Result<Self, sqlx::Error> {
        let (history, mut connection) = database.connect(Purpose::Write).await?;
        // From here on, sqlx always counts one transaction as open, so that a user's `begin` creates a savepoint within
        // the store's transaction. The store begins and ends its own transactions with raw SQL, so sqlx does not count
        // them.
        std::mem::forget(connection.begin().await?);
        sqlx::raw_sql("ROLLBACK").execute(&mut connection).await?;
        Ok(Self(history, connection))
    }
}

impl OpenTransaction {
    /// Begins a transaction. Uses the idle connection if there is one that still works.
    pub(crate) async fn begin(database: &Database, idle: Option<Idle>) -> Result<Self, sqlx::Error> {
        if let Some(idle) = idle.filter(|Idle(history, _)| *history == database.history.number())
            && let Ok(open) = Self::begin_on(idle, database).await
        {
            return Ok(open);
        }
        Self::begin_on(Idle::connect(database).await?, database).await
    }

    async fn begin_on(Idle(mut history, mut connection): Idle, database: &Database) -> Result<Self, sqlx::Error> {
        let begin = format!("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; {SETTINGS_OF_USER}; SAVEPOINT annals_0");
        if database.pooled {
            history = database.begin_with(&mut connection, &begin, Purpose::Write).await?;
        } else {
            sqlx::raw_sql(AssertSqlSafe(begin)).execute(&mut connection).await?;
        }
        let id = Uuid::new_v4();
        Ok(Self { connection, history, id, last: None, handled: 0, merged: 0, pooled: database.pooled })
    }

    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    pub(crate) fn handled(&self) -> u64 {
        self.handled
    }

    pub(crate) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// Prepares the transaction for another message, and keeps the SQL of the first `handled` messages.
    pub(crate) async fn resume(&mut self, handled: u64) -> Result<(), sqlx::Error> {
        if handled != self.handled {
            self.rewind(handled).await?;
        }
        if self.handled - self.merged + 1 >= SAVEPOINTS_MAX {
            let merge = "RELEASE SAVEPOINT annals_0; SAVEPOINT annals_0";
            sqlx::raw_sql(merge).execute(&mut self.connection).await?;
            self.merged = self.handled;
        }
        Ok(())
    }

    /// Keeps the SQL of one more message. Returns an error if one of the message's statements failed, even if the
    /// handler ignored that failure.
    pub(crate) async fn keep(&mut self) -> Result<(), sqlx::Error> {
        let savepoint = format!("SAVEPOINT annals_{}", self.handled + 1 - self.merged);
        sqlx::raw_sql(AssertSqlSafe(savepoint)).execute(&mut self.connection).await?;
        self.handled += 1;
        Ok(())
    }

    /// Undoes the SQL of all messages after the first `handled`.
    pub(crate) async fn rewind(&mut self, handled: u64) -> Result<(), sqlx::Error> {
        let rewind = self.rewind_to(handled)?;
        sqlx::raw_sql(AssertSqlSafe(rewind)).execute(&mut self.connection).await?;
        self.handled = handled;
        Ok(())
    }

    fn rewind_to(&self, handled: u64) -> Result<String, sqlx::Error> {
        match handled.checked_sub(self.merged) {
            Some(number) if handled <= self.handled => Ok(format!("ROLLBACK TO SAVEPOINT annals_{number}")),
            _ => Err(sqlx::Error::Protocol(format!("the savepoint after {handled} messages no longer exists"))),
        }
    }

    /// Rolls back the transaction and returns the connection.
    pub(crate) async fn give_up(mut self) -> Result<Idle, sqlx::Error> {
        let end = if self.pooled { "ROLLBACK; DEALLOCATE ALL" } else { "ROLLBACK" };
        sqlx::raw_sql(end).execute(&mut self.connection).await?;
        Ok(Idle(self.history, self.connection))
    }

    /// Writes a commit in the transaction, keeps the SQL of the first `handled` messages, and ends the transaction.
    pub(crate) async fn commit(
        mut self,
        database: &Database,
        commit: Prepared,
        handled: u64,
    ) -> (Result<Committed, CommitError>, Option<Idle>) {
        let answer = Duration::from_secs(ANSWER_SECONDS_MAX);
        let unwritten = |reason: String| CommitError::Unavailable(format!("nothing was committed: {reason}"));
        if commit.history != self.history || self.history != database.history.number() {
            return (Err(unwritten("the log changed (failover or restore) during the transaction".into())), None);
        }
        let written = timeout(answer, self.write(database, &commit, handled)).await;
        match written.unwrap_or_else(|elapsed| Err(unwritten(elapsed.to_string()))) {
            Err(error @ (CommitError::Conflict { .. } | CommitError::DocumentConflict { .. })) => {
                (Err(error), self.give_up().await.ok())
            }
            // COMMIT has not been sent, so nothing was committed.
            Err(CommitError::Unknown(reason)) => (Err(unwritten(reason)), None),
            Err(error) => (Err(error), None),
            Ok(committed) => {
                let end = if self.pooled { "DEALLOCATE ALL; COMMIT" } else { "COMMIT" };
                match timeout(answer, sqlx::raw_sql(end).execute(&mut self.connection)).await {
                    Ok(Ok(_)) => {
                        if let Some(last) = self.last {
                            database.history.saw(self.history, last);
                        }
                        (Ok(committed), Some(Idle(self.history, self.connection)))
                    }
                    Ok(Err(error)) => (Err(end_error(&error)), None),
                    Err(elapsed) => (Err(CommitError::Unknown(elapsed.to_string())), None),
                }
            }
        }
    }

    async fn write(&mut self, database: &Database, commit: &Prepared, handled: u64) -> Result<Committed, CommitError> {
        let error = |error: sqlx::Error| write_error(&error);
        let commits = std::slice::from_ref(commit);
        let ready: Arc<str> = format!("{}; {SETTINGS_OF_STORE}", self.rewind_to(handled).map_err(error)?).into();
        let mut known = None;
        let mut races = 0;
        let mut rewound = false;
        loop {
            if !rewound {
                sqlx::raw_sql(AssertSqlSafe(&*ready)).execute(&mut self.connection).await.map_err(error)?;
                rewound = true;
            }
            let plan = GroupPlan::new(commits, known.as_ref());
            match append(database, &mut self.connection, &plan).await {
                Ok((Some(written), versions)) => {
                    self.last = written.positions.last().copied().zip(plan.last_event());
                    let outcome = plan.outcomes(&written, &versions).pop();
                    return outcome
                        .unwrap_or_else(|| Err(CommitError::Unavailable("the commit has no outcome".into())));
                }
                // A guess was wrong; nothing was written.
                Ok((None, versions)) => {
                    races += u32::from(known.is_some());
                    known = Some(versions);
                }
                Err(failed) => {
                    let fault = fault(&failed);
                    if !matches!(fault, Fault::Race | Fault::PositionTaken) || races >= RACES_MAX {
                        return Err(write_error(&failed));
                    }
                    (known, races, rewound) = (None, races + 1, false);
                    if fault == Fault::PositionTaken {
                        sqlx::raw_sql(AssertSqlSafe(&*ready)).execute(&mut self.connection).await.map_err(error)?;
                        database.statements.advance.query().execute(&mut self.connection).await.map_err(error)?;
                    }
                }
            }
            if races > RACES_MAX {
                return Err(CommitError::Unavailable("other processes committed first on every attempt".into()));
            }
        }
    }
}
