//! The writer: the only thread of a process that writes. It takes the waiting commits as a group, and writes the group
//! in one transaction.

use std::{
    io,
    panic::{self, AssertUnwindSafe},
    thread,
};

use annals::{Clock, CommitError, Committed, DocumentKey, Position, StreamId};
use chrono::DateTime;
use sqlx::{Connection, SqliteConnection};
use tokio::{
    runtime,
    sync::{mpsc, oneshot, watch},
};

use crate::{
    error::{Fault, commit_error, fault, write_error},
    group::{Ledger, Prepared, documents_of, streams_of},
    open::Database,
    rows,
};

/// The maximum number of commits in the queue; further callers wait. This is enough for two groups: one group that is
/// being written, and one group that waits.
pub(crate) const QUEUE_COMMITS_MAX: usize = 2 * GROUP_COMMITS_MAX;
/// The maximum number of commits in a group. In a larger group, the first commit would wait too long for the last one,
/// and hardly any more syncs would be saved. A thousand callers are served faster in two halves: one half of the
/// callers prepares commits while the commits of the other half are written.
const GROUP_COMMITS_MAX: usize = 512;
/// A group takes no further commit once it has this many rows.
const GROUP_ROWS_MAX: usize = 4_096;
/// A group takes no further commit once it has this many bytes of payload.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// If the time of the last event is further in the future than this, it was written by hand, and does not affect the
/// times of new events.
const CLOCK_AHEAD_MICROSECONDS_MAX: i64 = 24 * 3_600 * 1_000_000;

pub(crate) type Outcome = Result<Committed, CommitError>;

/// A commit, and the channel to its caller. The commit is written even if the caller is gone.
pub(crate) struct Submission {
    pub(crate) commit: Prepared,
    pub(crate) answer: oneshot::Sender<Outcome>,
}

pub(crate) struct Writer {
    pub(crate) database: Database,
    /// The connection; `None` after a failure, because a connection in an unclear state is replaced instead of
    /// examined.
    pub(crate) connection: Option<SqliteConnection>,
    pub(crate) queue: mpsc::Receiver<Submission>,
    pub(crate) head: watch::Sender<Position>,
}

impl Writer {
    /// Starts the writer on a separate thread. If the writer were a task on the callers' runtime, it would wait for
    /// hundreds of other tasks at each step while the file is idle. When the writer has ended, this method reports how
    /// it ended, even after a panic.
    pub(crate) fn start(self, end: watch::Sender<Option<Result<(), String>>>) -> io::Result<()> {
        let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
        let run = move || {
            let ran = panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(self.run())));
            let result = match ran {
                Ok(ended) => ended.map_err(|error| error.to_string()),
                Err(_) => Err("it panicked".to_owned()),
            };
            if let Err(reason) = &result {
                tracing::error!(reason, "the writer of a store has failed");
            }
            end.send_replace(Some(result));
        };
        thread::Builder::new().name("annals-sqlite".into()).spawn(run).map(drop)
    }

    /// Writes commits until the last sender is gone and the queue is empty. Then moves the write-ahead log into the
    /// file, so that no log is left next to it.
    async fn run(mut self) -> Result<(), sqlx::Error> {
        while let Some(first) = self.queue.recv().await {
            let group = self.group(first);
            self.write(group).await;
        }
        let Some(mut connection) = self.connection.take() else { return Ok(()) };
        sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut connection).await?;
        connection.close().await
    }

    /// Returns a group of all waiting commits, without waiting for more.
    fn group(&mut self, first: Submission) -> Vec<Submission> {
        let mut rows = first.commit.rows;
        let mut bytes = first.commit.bytes;
        let mut group = vec![first];
        while group.len() < GROUP_COMMITS_MAX && rows < GROUP_ROWS_MAX && bytes < GROUP_BYTES_MAX {
            let Ok(next) = self.queue.try_recv() else { break };
            rows += next.commit.rows;
            bytes += next.commit.bytes;
            group.push(next);
        }
        group
    }

    async fn write(&mut self, group: Vec<Submission>) {
        let (commits, answers): (Vec<_>, Vec<_>) =
            group.into_iter().map(|submission| (submission.commit, submission.answer)).unzip();
        let count = commits.len();
        let outcomes = self.transact(commits).await.unwrap_or_else(|error| {
            tracing::warn!(%error, commits = count, "a group of commits failed");
            vec![Err(error); count]
        });
        for (answer, outcome) in answers.into_iter().zip(outcomes) {
            // A caller that gave up needs no answer.
            drop(answer.send(outcome));
        }
    }

    async fn transact(&mut self, commits: Vec<Prepared>) -> Result<Vec<Outcome>, CommitError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.database.writer().await.map_err(|error| write_error(&error))?,
        };
        if let Err(error) = execute(&mut connection, "BEGIN IMMEDIATE").await {
            if fault(&error) == Fault::Busy {
                self.connection = Some(connection);
            }
            return Err(write_error(&error));
        }
        // From here on, an error drops the connection, which rolls back the transaction.
        let (outcomes, head) = apply(&mut connection, commits).await.map_err(|error| write_error(&error))?;
        execute(&mut connection, "COMMIT").await.map_err(|error| commit_error(&error))?;
        self.connection = Some(connection);
        self.head.send_if_modified(|seen| {
            let further = head > *seen;
            *seen = head.max(*seen);
            further
        });
        Ok(outcomes)
    }
}

/// Decides and writes a group within the open transaction. Returns the outcomes and the position of the last event.
async fn apply(
    connection: &mut SqliteConnection,
    commits: Vec<Prepared>,
) -> Result<(Vec<Outcome>, Position), sqlx::Error> {
    let mut ledger = Ledger::default();
    let streams = streams_of(&commits);
    let mut last_recorded_at = 0;
    if !streams.is_empty() {
        (ledger.head, last_recorded_at) = load_streams(connection, streams, &mut ledger).await?;
    }
    let documents = documents_of(&commits);
    if !documents.is_empty() {
        load_documents(connection, documents, &mut ledger).await?;
    }
    let recorded_at = recorded_at(last_recorded_at);
    let recorded = DateTime::from_timestamp_micros(recorded_at);
    // One writer assigns the positions, so the positions of a commit are consecutive.
    let decide = |commit| ledger.decide(commit).map(|committed| Committed { recorded_at: recorded, ..committed });
    let outcomes = commits.into_iter().map(decide).collect();

    rows::append_events(connection, ledger.events.into_iter().map(|event| (event, recorded_at)).collect()).await?;
    let (removed, put): (Vec<_>, Vec<_>) = ledger.rows.into_iter().partition(|(_, row)| row.body.is_none());
    rows::put_documents(connection, put).await?;
    if !removed.is_empty() {
        let keys = keys_json(removed.iter().map(|(key, _)| key));
        sqlx::query(include_str!("sql/remove_documents.sql")).bind(keys).execute(connection).await?;
    }
    Ok((outcomes, Position(ledger.head)))
}

async fn load_streams(
    connection: &mut SqliteConnection,
    streams: Vec<StreamId>,
    ledger: &mut Ledger,
) -> Result<(i64, i64), sqlx::Error> {
    let names = streams.iter().map(StreamId::as_str).collect::<Vec<_>>();
    let (head, recorded_at, versions): (i64, i64, String) = sqlx::query_as(include_str!("sql/versions.sql"))
        .bind(serde_json::json!(names).to_string())
        .fetch_one(connection)
        .await?;
    let versions: Vec<String> = serde_json::from_str(&versions).map_err(|error| sqlx::Error::Decode(error.into()))?;
    for (stream, standing) in streams.into_iter().zip(versions) {
        let (version, event) = standing.split_once(' ').unwrap_or((&standing, ""));
        let version = version.parse().map_err(|error: std::num::ParseIntError| sqlx::Error::Decode(error.into()))?;
        // An id that was written by hand may not be a UUID.
        ledger.streams.insert(stream, (version, event.parse().ok()));
    }
    Ok((head, recorded_at))
}

async fn load_documents(
    connection: &mut SqliteConnection,
    documents: Vec<DocumentKey>,
    ledger: &mut Ledger,
) -> Result<(), sqlx::Error> {
    let versions: String = sqlx::query_scalar(include_str!("sql/document_versions.sql"))
        .bind(keys_json(documents.iter()))
        .fetch_one(connection)
        .await?;
    ledger.documents = documents.into_iter().zip(numbers(&versions)?).collect();
    Ok(())
}

/// Returns document keys as JSON, in the form that the statements expect.
pub(crate) fn keys_json<'a>(keys: impl Iterator<Item = &'a DocumentKey>) -> String {
    keys.map(|key| serde_json::json!([&*key.collection, &*key.id])).collect::<serde_json::Value>().to_string()
}

fn numbers(json: &str) -> Result<Vec<i64>, sqlx::Error> {
    serde_json::from_str(json).map_err(|error| sqlx::Error::Decode(error.into()))
}

/// Returns the time of recording: the time of this machine, but not before the time of the last event.
fn recorded_at(last: i64) -> i64 {
    let now = Clock::machine().now().timestamp_micros();
    if last > now.saturating_add(CLOCK_AHEAD_MICROSECONDS_MAX) { now } else { now.max(last) }
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> Result<(), sqlx::Error> {
    sqlx::query(sql).execute(connection).await.map(drop)
}
