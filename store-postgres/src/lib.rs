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
//! # What it keeps
//!
//! A commit that was acknowledged was committed by PostgreSQL, and is as durable as `synchronous_commit` says there. Any number
//! of processes may use one schema, and write at the same time. The database refuses `UPDATE`, `DELETE` and `TRUNCATE` of
//! events, whoever asks. Positions rise in the order in which a process commits; between processes they rise, too, but become
//! visible in any order, and those of failed transactions remain empty. A reader never passes one that may still be filled
//! (the module `log` says how it knows).
//!
//! # What a commit costs
//!
//! A commit that comes alone is written at once. Where several are under way, those that wait are taken as one group, and make
//! one round trip and one transaction. A conflict fails its own commit only. A group takes a
//! second round trip where a commit in it expects a version that is not there.
//!
//! A commit that relies on a stream without writing to it keeps others from writing there until it holds, in whichever process
//! they are. Nothing waits longer than half a second for a lock: then the commits that somebody's open transaction is in the
//! way of are unavailable, and the others of their group go through. Rows that are inserted by hand take no part in this; call
//! the function `append` of the schema instead.
//!
//! # Who may do what
//!
//! Whoever connects first must be allowed to create the schema, and owns it. Other roles get what they need from its function
//! `grant_access`, as the owner:
//!
//! ```sql
//! SELECT annals.grant_access('shop', 'writer');       -- a service: appends events, changes documents, reads everything
//! SELECT annals.grant_access('oncall', 'operator');   -- repairs, and records that; reads everything
//! SELECT annals.grant_access('reports', 'reader');    -- reads everything
//! ```
//!
//! None of them may change or delete an event, set the sequence of positions back, or change the schema.
//!
//! # Behind a connection pooler
//!
//! In transaction mode a session is somebody else's after each transaction, and most poolers do not let by what a connection
//! starts with. Say `pooled=true` in the URL, and nothing is left in a session, nor expected there. No setting of the pooler
//! is needed for it, nor that it knows prepared statements.
//!
//! - Settings are those of a transaction, and statements are not kept prepared. A group of commits takes four round trips to the
//!   pooler and not one, a read three.
//! - Other processes are not heard, because `LISTEN` belongs to a session. Their events are noticed by looking, ten times a
//!   second. Those of the same process are told as before.
//! - A [`PostgresStore::replay`] keeps a session until it has ended; a lane of an [`SqlHandler`], while it has a batch in hand.
//! - `options` in the URL are refused by most poolers: set for the role what is to be set.
//! - A health check that says which session a reader waits for gives the session's `pid`; whose it is, the pooler knows.
//!
//! Without `pooled=true`, a store refuses to open where it notices that its settings do not come through.

mod alone;
mod append;
mod archive;
mod copied;
mod error;
mod group;
mod history;
mod log;
mod news;
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

use self::{
    alone::Alone,
    group::Prepared,
    log::{Ahead, Log},
    news::News,
    open::Database,
    queue::{QUEUE_COMMITS_MAX, Queue, Submission, Traffic},
    read::is_text,
    readers::Readers,
    statements::Statements,
    streams::Streams,
    writer::Writer,
};
pub use self::{
    error::OpenError,
    open::Settings,
    replay::{Replay, ReplayError, Replayed},
    sql_store::{SqlHandler, SqlStore},
};

/// How long a reader waits before it looks for what nobody told it of, doubling between these: rows written by hand, and
/// commits whose process could not tell.
const LOOK_MS_MIN: u64 = 50;
const LOOK_MS_MAX: u64 = 1_000;
/// Likewise while other processes cannot be heard.
const DEAF_LOOK_MS_MAX: u64 = 100;
/// Likewise at a gap: the end of a transaction is not announced.
const GAP_LOOK_MS_MIN: u64 = 1;
const GAP_LOOK_MS_MAX: u64 = 50;

/// An event store in one schema of a PostgreSQL database. Clones share it; when the last is gone, what was handed over is
/// still written.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    database: Arc<Database>,
    /// `None` once closed.
    queue: RwLock<Option<mpsc::Sender<Submission>>>,
    traffic: Arc<Traffic>,
    alone: Alone,
    /// How the writer ended.
    ended: watch::Receiver<Option<Result<(), String>>>,
    readers: Readers,
    streams: Streams,
    log: Log,
    news: News,
    /// What tells other processes, and listens to them.
    spreading: AbortHandle,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.spreading.abort();
    }
}

impl PostgresStore {
    /// Connects, and creates the schema or brings it to the newest version.
    pub async fn connect(url: &str, settings: Settings) -> Result<Self, OpenError> {
        Self::start(url, settings, true).await
    }

    /// Connects to a schema that holds a store of this version: it is neither created nor brought to a newer version.
    pub async fn connect_existing(url: &str, settings: Settings) -> Result<Self, OpenError> {
        Self::start(url, settings, false).await
    }

    async fn start(url: &str, settings: Settings, create: bool) -> Result<Self, OpenError> {
        let mut database = Database::locate(url, settings)?;
        database.prepare(create).await?;
        let database = Arc::new(database);
        let (readers, streams, news) = (Readers::new(database.clone()), Streams::default(), News::new());
        let (queue, submissions) = mpsc::channel(QUEUE_COMMITS_MAX);
        let traffic = Arc::new(Traffic::default());
        let writer = || Writer::new(&database, &news);
        let alone = Alone::new(writer());
        let (end, ended) = watch::channel(None);
        writer::start([writer(), writer()], Queue::new(submissions, traffic.clone()), end)
            .map_err(|error| error::open_error(&sqlx::Error::Io(error)))?;
        let spreading = tokio::spawn(news.clone().spread(database.clone())).abort_handle();
        let log = Log::new(database.clone(), readers.clone());
        let queue = RwLock::new(Some(queue));
        Ok(Self {
            shared: Arc::new(Shared { database, queue, traffic, alone, ended, readers, streams, log, news, spreading }),
        })
    }

    /// Writes what was handed over and lets go of all connections. Later calls of other methods are refused as unavailable;
    /// closing twice is fine.
    pub async fn close(&self) -> Result<(), StoreError> {
        drop(self.shared.queue.write().unwrap_or_else(PoisonError::into_inner).take());
        let mut ended = self.shared.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
        self.shared.alone.close().await;
        self.shared.spreading.abort();
        self.shared.readers.close().await;
        match ended {
            Ok(Some(Err(reason))) => Err(StoreError::Unavailable(reason)),
            Ok(_) => Ok(()),
            Err(_) => Err(StoreError::Unavailable("the runtime that it was opened in has ended".into())),
        }
    }

    /// Why there is no writer to take a commit.
    fn stopped(&self) -> CommitError {
        CommitError::Unavailable(match &*self.shared.ended.borrow() {
            Some(Err(reason)) => format!("its writer has failed: {reason}"),
            Some(Ok(())) => "it is closed".into(),
            None => "it is closing".into(),
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
        let commit = Prepared::new(commit, self.history());
        let (mut passage, is_alone) = self.shared.traffic.enter();
        if is_alone && let Some(turn) = self.shared.alone.turn() {
            return turn.write(commit, passage).await;
        }
        let queue = self.shared.queue.read().unwrap_or_else(PoisonError::into_inner).clone();
        passage.wait(commit.rows);
        let (answer, answered) = oneshot::channel();
        let submission = Submission { commit, answer, passage };
        queue.ok_or_else(|| self.stopped())?.send(submission).await.map_err(|_| self.stopped())?;
        answered.await.unwrap_or_else(|_| Err(CommitError::Unknown("its writer ended while it had the commit".into())))
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
        let Shared { database, log, news, .. } = &*self.shared;
        let mut told = news.subscribe();
        let mut changes = database.history.subscribe();
        let history = *changes.borrow_and_update();
        let (mut look, mut gap_look, mut first) = (LOOK_MS_MIN, GAP_LOOK_MS_MIN, true);
        loop {
            if database.history.number() != history {
                return Ok(());
            }
            // Before the look, so that what is told during it counts.
            told.mark_unchanged();
            let heard = news.heard();
            // After a commit of this process there is mostly nothing, and a look is a round trip. The next one is soon.
            let is_known = std::mem::take(&mut first) && news.ends_at(history, after, heard);
            match if is_known { Ahead::Nothing } else { log.ahead(after).await? } {
                Ahead::Events => return Ok(()),
                // What is told now is beyond the gap.
                Ahead::Gap => {
                    tokio::time::sleep(Duration::from_millis(gap_look)).await;
                    gap_look = (gap_look * 2).min(GAP_LOOK_MS_MAX);
                }
                Ahead::Nothing => {
                    news.nothing_at(heard);
                    let longest = if news.is_listening() { LOOK_MS_MAX } else { DEAF_LOOK_MS_MAX };
                    // An end of this wait for any reason is one to look again.
                    let woken = async {
                        tokio::select! {
                            told = told.changed() => told,
                            changed = changes.changed() => changed,
                        }
                    };
                    timeout(Duration::from_millis(look.min(longest)), woken).await.ok();
                    // What was written here meanwhile is there. If it stands behind a gap, the reader is back soon, and
                    // looks first.
                    if news.last_written(history) > after {
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
}
