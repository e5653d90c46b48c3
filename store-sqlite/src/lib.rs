//! The embedded store of [annals]. It consists of one SQLite file, and there is no server to install or run.
//!
//! ```
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! # let folder = tempfile::tempdir()?;
//! use annals::{EventStore, LogQuery, Position};
//! use annals_sqlite::SqliteStore;
//!
//! let store = SqliteStore::open(folder.path().join("shop.db")).await?;
//! let page = store.read_log(&LogQuery::all(), Position::START, 100).await?;
//! assert!(page.events.is_empty());
//! store.close().await?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Guarantees
//!
//! An acknowledged commit is in the file and synced (write-ahead log, `synchronous = FULL`). The commit survives even
//! if the process is killed at any moment or the machine loses power. Several processes may use one file: each process
//! has a writer of its own, and one writer at a time holds SQLite's write lock. Positions are dense, start at 1, and
//! rise in the order of the commits. The file refuses `UPDATE` and `DELETE` on events.
//!
//! # Cost of a commit
//!
//! In each process, one task writes. The task takes all waiting commits as one group, and writes the group in one
//! transaction with one sync; a single commit is written at once. A commit that meets a conflict fails alone. The
//! number of statements for a group does not depend on the number of commits:
//!
//! | statements | purpose |
//! |---|---|
//! | 2 | `BEGIN IMMEDIATE`, `COMMIT` |
//! | 1 | read the versions of the streams in the group, if there are any |
//! | 1 | read the versions of the documents in the group, if there are any |
//! | 1 per 256 events | write the events |
//! | 1 per 256 documents | write the documents |
//! | 1 | remove documents, if the group removes any |

#![warn(missing_debug_implementations)]

mod archive;
mod error;
mod group;
mod open;
mod read;
mod rows;
mod writer;

use std::{
    path::Path,
    sync::{Arc, PoisonError, RwLock},
};

use annals::{
    Commit, CommitError, Committed, Document, DocumentKey, EventStore, LogPage, LogQuery, Position, Recorded, Scan,
    StoreError, StoreStatus, StreamId, Version, archive::Stored,
};
use async_trait::async_trait;
use sqlx::sqlite::SqlitePool;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

pub use self::{
    error::OpenError,
    open::{APPLICATION_ID, Settings},
};
use self::{
    error::open_error,
    group::Prepared,
    open::Database,
    writer::{QUEUE_COMMITS_MAX, Submission, Writer},
};

/// An event store in one SQLite file. Clones share the same connections. When the last clone is dropped, commits that
/// were already submitted are still written.
#[derive(Clone, Debug)]
pub struct SqliteStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    database: Database,
    /// `None` once the store is closed.
    queue: RwLock<Option<mpsc::Sender<Submission>>>,
    /// The last position that this process has written. The writer updates this value.
    head: watch::Receiver<Position>,
    /// How the writer ended.
    ended: watch::Receiver<Option<Result<(), String>>>,
    readers: SqlitePool,
}

impl SqliteStore {
    /// Opens a file. Creates the file if it is missing, and migrates a file that an older build wrote.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::open_with(path, Settings::default()).await
    }

    /// Opens the file of a store URL (`sqlite:PATH`), as [`open`](Self::open) does.
    pub async fn open_url(url: &str) -> Result<Self, OpenError> {
        let path = url.strip_prefix("sqlite:").map(|path| path.strip_prefix("//").unwrap_or(path));
        match path {
            Some(path) if !path.is_empty() && path != ":memory:" => Self::open(path).await,
            _ => Err(OpenError::Url { url: OpenError::without_password(url) }),
        }
    }

    /// Opens a file with these settings, as [`open`](Self::open) does.
    pub async fn open_with(path: impl AsRef<Path>, settings: Settings) -> Result<Self, OpenError> {
        Self::start(Database::locate(path.as_ref(), settings, true)?).await
    }

    /// Opens a file that contains a store of this version. This method neither creates nor migrates the file.
    pub async fn open_existing(path: impl AsRef<Path>, settings: Settings) -> Result<Self, OpenError> {
        Self::start(Database::locate(path.as_ref(), settings, false)?).await
    }

    async fn start(database: Database) -> Result<Self, OpenError> {
        let (connection, head) = database.prepare().await?;
        let readers = database.readers();
        let (head, head_seen) = watch::channel(head);
        let (queue, submissions) = mpsc::channel(QUEUE_COMMITS_MAX);
        let (end, ended) = watch::channel(None);
        let writer = Writer { database: database.clone(), connection: Some(connection), queue: submissions, head };
        writer.start(end).map_err(|error| open_error(&database.path, &sqlx::Error::Io(error)))?;
        let queue = RwLock::new(Some(queue));
        Ok(Self { shared: Arc::new(Shared { database, queue, head: head_seen, ended, readers }) })
    }

    /// Writes the submitted commits, moves the write-ahead log into the file, and closes the file. Later calls of other
    /// methods fail as unavailable. A second call of this method has no effect.
    pub async fn close(&self) -> Result<(), StoreError> {
        drop(self.shared.queue.write().unwrap_or_else(PoisonError::into_inner).take());
        self.shared.readers.close().await;
        let mut ended = self.shared.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map(|ended| ended.clone());
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
}

#[async_trait]
impl EventStore for SqliteStore {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        commit.validate()?;
        if commit.is_empty() {
            return Ok(Committed::default());
        }
        let queue = self.shared.queue.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (answer, answered) = oneshot::channel();
        let submission = Submission { commit: Prepared::from(commit), answer };
        queue.ok_or_else(|| self.stopped())?.send(submission).await.map_err(|_| self.stopped())?;
        answered.await.unwrap_or_else(|_| {
            Err(CommitError::Unknown("the writer of the store ended while it held the commit".into()))
        })
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        read::stream(&self.shared.readers, stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        let mut events = Vec::new();
        let take = |event: Stored<'_>| events.push(Arc::new(event.recorded()));
        let (next, more) = read::log(&self.shared.readers, query, after, limit, take).await?;
        Ok(LogPage { events, next, more })
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        read::documents(&self.shared.readers, keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        read::scan(&self.shared.readers, collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        let mut head = self.shared.head.clone();
        loop {
            // Only commits of this process are announced here. Commits of other processes are found by reading the
            // file.
            let announced = head.wait_for(|head| *head > after);
            let announced =
                timeout(self.shared.database.settings.poll_interval, announced).await.map(|head| head.is_ok());
            match announced {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(StoreError::Unavailable("the store is closed".into())),
                Err(_) if read::head(&self.shared.readers).await? > after => return Ok(()),
                Err(_) => {}
            }
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        Ok(StoreStatus { head: read::head(&self.shared.readers).await?, ..StoreStatus::default() })
    }
}
