//! The event store of [annals] on PostgreSQL.
//!
//! ```no_run
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! use annals::{EventStore, LogQuery, Position};
//! use annals_postgres::{PostgresStore, Settings};
//!
//! let store = PostgresStore::connect("postgres://shop@localhost/shop", Settings::default()).await?;
//! let page = store.read_log(&LogQuery::all(), Position::START, 100).await?;
//! for event in page.events {
//!     println!("{} {}", event.position, event.type_name);
//! }
//! store.close().await?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Guarantees
//!
//! Once a commit is acknowledged, PostgreSQL has committed it; how durable the commit is depends on
//! `synchronous_commit`. Any number of processes may use one schema and write at the same time. The database refuses
//! `UPDATE`, `DELETE` and `TRUNCATE` of events to every role. The positions of one process rise in the order of its
//! commits. Events of different processes may become visible in a different order than their positions, and the
//! positions of failed transactions remain empty. A reader never passes a position at which an event may still appear;
//! the module `log` explains how the reader knows.
//!
//! # Cost of a commit
//!
//! A single commit is written at once. When several commits are in flight, the waiting commits form a group, which
//! takes one round trip and one transaction. A commit that meets a conflict fails alone. A group takes a second round
//! trip if a commit in the group expects a version other than the current version.
//!
//! A commit that relies on a stream without writing to that stream blocks the writes of all processes to the stream
//! until the commit is done. No commit waits longer than half a second for a lock. After that, the commits that are
//! blocked by another open transaction fail as unavailable, and the other commits of the group succeed. Rows that are
//! inserted by hand bypass this locking; call the function `append` of the schema instead.
//!
//! # Permissions
//!
//! The first role to connect needs permission to create the schema, and becomes its owner. The owner grants permissions
//! to other roles with the function `grant_access` of the schema:
//!
//! ```sql
//! SELECT annals.grant_access('shop', 'writer');       -- a service: appends events, changes documents, reads everything
//! SELECT annals.grant_access('oncall', 'operator');   -- repairs, and records that; reads everything
//! SELECT annals.grant_access('reports', 'reader');    -- reads everything
//! ```
//!
//! None of these roles can change or delete an event, reset the sequence of positions, or change the schema.
//!
//! # Behind a connection pooler
//!
//! In transaction mode, a session may serve another client after each transaction, and most poolers drop the startup
//! settings of a connection. With `pooled=true` in the URL, the store does not rely on any state of a session. The
//! pooler needs no special setting, and need not support prepared statements.
//!
//! - Settings apply per transaction, and statements are not kept prepared. A group of commits takes four round trips
//!   to the pooler instead of one; a read takes three.
//! - The store receives no notifications from other processes, because `LISTEN` belongs to a session. Instead, the
//!   store polls for the events of other processes ten times a second. The pooler does not affect notifications within
//!   the same process.
//! - A [`PostgresStore::replay`] keeps a session until the replay has ended. Each lane of an [`SqlHandler`] keeps a
//!   session while the lane handles a batch.
//! - Most poolers refuse the parameter `options` in the URL. Configure such options on the role instead.
//! - If a reader waits for another session, a health check names that session by its `pid`. Only the pooler knows which
//!   client uses the session.
//!
//! Without `pooled=true`, a store refuses to open if it detects that its startup settings are lost.

#![warn(missing_debug_implementations)]

mod append;
mod archive;
mod copied;
mod error;
mod group;
mod history;
mod inline;
mod log;
mod notifications;
mod open;
mod queue;
mod read;
mod readers;
mod replay;
mod sql_store;
mod statements;
mod streams;
mod transaction;
mod writer;

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use annals::{
    Clock, Commit, CommitError, Committed, Document, DocumentKey, EventStore, LogPage, LogQuery, Position, Recorded,
    Scan, StoreError, StoreStatus, StreamId, Version,
};
use async_trait::async_trait;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::AbortHandle,
    time::timeout,
};

pub use self::{
    error::OpenError,
    open::Settings,
    replay::{Replay, ReplayError, Replayed},
    sql_store::{SqlHandler, SqlStore},
};
use self::{
    group::Prepared,
    inline::InlineWriter,
    log::{Ahead, Log},
    notifications::Notifications,
    open::Database,
    queue::{InFlight, QUEUE_COMMITS_MAX, Queue, Submission},
    read::is_text,
    readers::Readers,
    statements::Statements,
    streams::Streams,
    writer::Writer,
};

/// The shortest and the longest interval at which a reader polls for events that come without a notification. Such
/// events are rows inserted by hand, and commits whose process could not notify. The interval doubles after each poll.
const LOOK_MS_MIN: u64 = 50;
const LOOK_MS_MAX: u64 = 1_000;
/// The longest polling interval while notifications from other processes cannot be received.
const DEAF_LOOK_MS_MAX: u64 = 100;
/// The shortest and the longest interval at which a reader polls while it waits at a gap. No notification announces the
/// end of the transaction that may fill the gap.
const GAP_LOOK_MS_MIN: u64 = 1;
const GAP_LOOK_MS_MAX: u64 = 50;

/// An event store in one schema of a PostgreSQL database. Clones share the same connections. When the last clone is
/// dropped, commits that were already submitted are still written.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    database: Arc<Database>,
    /// `None` once the store is closed.
    queue: RwLock<Option<mpsc::Sender<Submission>>>,
    in_flight: Arc<InFlight>,
    inline: InlineWriter,
    /// How the writers ended.
    ended: watch::Receiver<Option<Result<(), String>>>,
    readers: Readers,
    streams: Streams,
    log: Log,
    notifications: Notifications,
    /// The task that notifies other processes and listens to them.
    spreading: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.spreading.abort();
    }
}

impl PostgresStore {
    /// Connects to the database, and creates the schema or migrates it to the newest version.
    pub async fn connect(url: &str, settings: Settings) -> Result<Self, OpenError> {
        Self::start(url, settings, true).await
    }

    /// Connects to a schema that contains a store of this version. This method neither creates nor migrates the schema.
    pub async fn connect_existing(url: &str, settings: Settings) -> Result<Self, OpenError> {
        Self::start(url, settings, false).await
    }

    async fn start(url: &str, settings: Settings, create: bool) -> Result<Self, OpenError> {
        let mut database = Database::locate(url, settings)?;
        database.prepare(create).await?;
        let database = Arc::new(database);
        let readers = Readers::new(database.clone());
        let streams = Streams::default();
        let notifications = Notifications::new();
        let (queue, submissions) = mpsc::channel(QUEUE_COMMITS_MAX);
        let in_flight = Arc::new(InFlight::default());
        let writer = || Writer::new(&database, &notifications);
        let inline = InlineWriter::new(writer());
        let (end, ended) = watch::channel(None);
        writer::start([writer(), writer()], Queue::new(submissions, in_flight.clone()), end)
            .map_err(|error| error::open_error(&sqlx::Error::Io(error)))?;
        let spreading = tokio::spawn(notifications.clone().spread(database.clone())).abort_handle();
        let log = Log::new(database.clone(), readers.clone());
        let queue = RwLock::new(Some(queue));
        Ok(Self {
            shared: Arc::new(Shared {
                database,
                queue,
                in_flight,
                inline,
                ended,
                readers,
                streams,
                log,
                notifications,
                spreading,
            }),
        })
    }

    /// Writes the submitted commits and closes all connections. Later calls of other methods fail as unavailable. A
    /// second call of this method has no effect.
    pub async fn close(&self) -> Result<(), StoreError> {
        drop(self.shared.queue.write().unwrap_or_else(PoisonError::into_inner).take());
        let mut ended = self.shared.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        self.shared.inline.close().await;
        self.shared.spreading.abort();
        self.shared.readers.close().await;
        match ended {
            Ok(Some(Err(reason))) => Err(StoreError::Unavailable(reason)),
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::Unavailable("the runtime that opened the store has ended".into())),
        }
    }

    /// Returns the error that says why there is no writer for a commit.
    fn stopped(&self) -> CommitError {
        CommitError::Unavailable(match &*self.shared.ended.borrow() {
            Some(Err(reason)) => format!("the writer of the store has failed: {reason}"),
            Some(Ok(())) => "the store is closed".into(),
            None => "the store is closing".into(),
        })
    }

    fn is_closed(&self) -> bool {
        self.shared.queue.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    fn reading(&self) -> (&Readers, &Statements) {
        (&self.shared.readers, &self.shared.database.statements)
    }
}

#[async_trait]
impl EventStore for PostgresStore {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        commit.validate()?;
        if commit.is_empty() {
            return Ok(Committed::default());
        }
        let commit = Prepared::new(commit, self.shared.database.history.accepted()?);
        let (mut guard, is_only_one) = self.shared.in_flight.enter();
        if is_only_one && let Some(reserved) = self.shared.inline.reserve() {
            return reserved.write(commit, guard).await;
        }
        let queue = self.shared.queue.read().unwrap_or_else(PoisonError::into_inner).clone();
        guard.wait(commit.rows);
        let (answer, answered) = oneshot::channel();
        let submission = Submission { commit, answer, guard };
        queue.ok_or_else(|| self.stopped())?.send(submission).await.map_err(|_| self.stopped())?;
        answered.await.unwrap_or_else(|_| {
            Err(CommitError::Unknown("the writer of the store ended while it held the commit".into()))
        })
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        if !is_text(stream.as_str()) {
            return Ok(Vec::new());
        }
        self.shared.streams.read(self.reading(), stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        self.shared.log.page(query, after, limit).await
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        read::documents(self.reading(), keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        read::scan(self.reading(), collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        let Shared { database, log, notifications, .. } = &*self.shared;
        let mut signals = notifications.subscribe();
        let mut changes = database.history.subscribe();
        let history = *changes.borrow_and_update();
        let mut look = LOOK_MS_MIN;
        let mut gap_look = GAP_LOOK_MS_MIN;
        let mut first = true;
        loop {
            if database.history.number() != history {
                return Ok(());
            }
            // Notifications are marked as seen before the query, so that a notification during the query counts.
            signals.mark_unchanged();
            let heard = notifications.heard();
            // After a commit of this process there is usually nothing new, so the first query, which would cost a round
            // trip, is skipped. The next query follows soon.
            let is_known = std::mem::take(&mut first) && notifications.ends_at(history, after, heard);
            match if is_known { Ahead::Nothing } else { log.ahead(after).await? } {
                Ahead::Events => return Ok(()),
                // Notifications are ignored here, because they can only announce events beyond the gap.
                Ahead::Gap => {
                    tokio::time::sleep(Duration::from_millis(gap_look)).await;
                    gap_look = (gap_look * 2).min(GAP_LOOK_MS_MAX);
                }
                Ahead::Nothing => {
                    notifications.nothing_at(heard);
                    let longest = if notifications.is_listening() { LOOK_MS_MAX } else { DEAF_LOOK_MS_MAX };
                    // Whatever ends the wait, the store is queried again.
                    let woken = async {
                        tokio::select! {
                            signal = signals.changed() => signal,
                            changed = changes.changed() => changed,
                        }
                    };
                    timeout(Duration::from_millis(look.min(longest)), woken).await.ok();
                    // Events that this process wrote during the wait are visible. If a gap precedes these events, the
                    // reader notices the gap and soon calls this method again.
                    if notifications.last_written(history) > after {
                        return Ok(());
                    }
                    look = (look * 2).min(LOOK_MS_MAX);
                }
            }
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.shared.log.status().await
    }

    fn clock(&self) -> Clock {
        self.shared.database.clock.clone()
    }

    fn history(&self) -> u64 {
        self.shared.database.history.number()
    }

    fn accept_history(&self, by: &str, history: u64) {
        self.shared.database.history.accept(by, history);
    }
}
