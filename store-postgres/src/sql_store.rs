//! Runs a user's SQL in the transaction that moves the checkpoint.
//!
//! The writes that a handler stages are committed later, and nothing connects that commit with the handler. The handler
//! therefore stages a *mark* along with its SQL: a document that contains the name of the transaction, and the number
//! of messages whose SQL is in the transaction so far. If the message is rolled back, so is the mark. The store removes
//! the mark from the commit, writes the commit in the transaction that the mark names, and ends that transaction. If
//! the transaction of a mark is gone, the store refuses the commit, and the batch is handled again.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use annals::{
    Clock, Commit, CommitError, Committed, Document, DocumentKey, EventStore, Handler, HandlerError, LogPage, LogQuery,
    Message, Position, Recorded, Scan, StoreError, StoreStatus, StreamId, Version, Work,
};
use async_trait::async_trait;
use futures::FutureExt;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    PostgresStore,
    group::Prepared,
    open::Database,
    transaction::{Idle, OpenTransaction},
};

/// A handler that writes its own tables in the database of the store, atomically with the checkpoint.
///
/// Such a handler works like a [`Handler`], with one addition: its writes through `transaction` are committed together
/// with its writes in `work` and with the checkpoint, all or nothing. Each event therefore affects the tables exactly
/// once.
///
/// - The handler runs within an open transaction (read committed) that all messages of the batch share. Rows that the
///   handler has changed stay locked until the batch is done, so the handler must not wait for anything slow. A
///   transaction that the handler begins on the connection becomes a savepoint within the open transaction. The handler
///   must not end the open transaction.
/// - A failed statement fails the message, unless the handler undoes the statement with a savepoint. Without a
///   savepoint, return the error: the message then leaves nothing behind and is parked, and the other messages of the
///   batch are not affected.
/// - A statement may take 30 seconds, and may wait 10 seconds for a lock. If the handler changes settings, it should
///   use `SET LOCAL`, because the connection is reused.
/// - The handler runs again if the commit meets a conflict or the connection is lost. Its earlier writes are rolled
///   back first.
#[async_trait]
pub trait SqlHandler: Send + Sync + 'static {
    /// Writes and stages the effects of the message.
    async fn handle(
        &self,
        message: &Message,
        transaction: &mut PgConnection,
        work: &mut Work,
    ) -> Result<(), HandlerError>;
}

/// A [`PostgresStore`] whose subscriptions may write the user's own tables. In all other respects, this store behaves
/// like the wrapped store.
///
/// ```no_run
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// use std::sync::Arc;
///
/// use annals::{HandlerError, Message, Service, Subscription, Work};
/// use annals_postgres::{PostgresStore, Settings, SqlHandler, SqlStore};
/// use sqlx::PgConnection;
///
/// /// How many events there were of each type: `CREATE TABLE report (type text PRIMARY KEY, events bigint)`.
/// struct Report;
///
/// #[async_trait::async_trait]
/// impl SqlHandler for Report {
///     async fn handle(
///         &self,
///         message: &Message,
///         transaction: &mut PgConnection,
///         _work: &mut Work,
///     ) -> Result<(), HandlerError> {
///         sqlx::query(
///             "INSERT INTO report AS r VALUES ($1, 1) ON CONFLICT (type) DO UPDATE SET events = r.events + 1",
///         )
///         .bind(&*message.type_name)
///         .execute(transaction)
///         .await?;
///         Ok(())
///     }
/// }
///
/// let store = SqlStore::new(PostgresStore::connect("postgres://shop@localhost/shop", Settings::default()).await?);
/// let report = Subscription::new("report", store.handler(Report));
/// let service = Service::new("reports", Arc::new(store)).subscribe(report);
/// # drop(service);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Each lane of such a subscription uses a connection of its own while the lane handles a batch, in addition to the
/// connections in [`Settings`](crate::Settings).
#[derive(Clone)]
pub struct SqlStore {
    store: PostgresStore,
    /// The transactions of the handlers of this store. Each handler owns its transactions, so that they end when the
    /// handler is dropped.
    transactions: Arc<Mutex<Vec<Weak<Transactions>>>>,
}

impl std::fmt::Debug for SqlStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqlStore").field("store", &self.store).finish_non_exhaustive()
    }
}

impl SqlStore {
    /// Wraps a store. Clones of a wrapper share their handlers; separate wrappers of the same store do not.
    pub fn new(store: PostgresStore) -> Self {
        Self { store, transactions: Arc::default() }
    }

    /// Returns the wrapped store.
    pub fn store(&self) -> &PostgresStore {
        &self.store
    }

    /// Creates a handler for a subscription or a group that runs on this store. On another store, every message fails
    /// as unavailable.
    pub fn handler<H: SqlHandler>(&self, handler: H) -> impl Handler + use<H> {
        let database = self.store.shared.database.clone();
        let transactions = Arc::new(Transactions { database, open: Mutex::default(), idle: Mutex::default() });
        let mut all = self.lock();
        all.retain(|of_handler| of_handler.strong_count() > 0);
        all.push(Arc::downgrade(&transactions));
        WithSql { handler, transactions }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Transactions>>> {
        self.transactions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the transaction of a mark, and returns it together with the transactions of the same handler.
    fn take(&self, mark: Mark) -> Option<(Arc<Transactions>, OpenTransaction)> {
        let all: Vec<_> = self.lock().iter().filter_map(Weak::upgrade).collect();
        all.into_iter().find_map(|transactions| {
            let open = transactions.take(mark.transaction)?;
            Some((transactions, open.transaction))
        })
    }
}

/// The mark that the handler leaves for the commit.
#[derive(Clone, Copy)]
struct Mark {
    transaction: Uuid,
    /// The number of messages whose SQL belongs to the commit.
    handled: u64,
}

impl Mark {
    /// Returns the key of the mark. No document with this key is ever stored.
    fn key() -> DocumentKey {
        DocumentKey::new("sql.transaction", "open")
    }

    fn body(self) -> Arc<str> {
        format!("\"{} {}\"", self.transaction, self.handled).into()
    }

    fn read(text: &str) -> Option<Self> {
        let (transaction, handled) = text.trim_matches('"').split_once(' ')?;
        Some(Self { transaction: transaction.parse().ok()?, handled: handled.parse().ok()? })
    }
}

/// The body that the store returns for the mark's key before any SQL has run. A handler recognizes a `SqlStore` by this
/// body.
const NO_MARK: &str = "\"\"";

/// The transactions of one handler: one for each lane that is handling a batch.
struct Transactions {
    database: Arc<Database>,
    open: Mutex<HashMap<Uuid, Waiting>>,
    idle: Mutex<Vec<Idle>>,
}

/// A transaction that waits for its next message, or for its commit.
struct Waiting {
    transaction: OpenTransaction,
    /// The bodies of the transaction's last two marks. As long as a batch can continue this transaction, the batch's
    /// work or its commit keeps one of these bodies alive.
    marks: [Option<Weak<str>>; 2],
}

impl Transactions {
    fn open(&self) -> MutexGuard<'_, HashMap<Uuid, Waiting>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, id: Uuid) -> Option<Waiting> {
        self.open().remove(&id)
    }

    /// Drops the transactions whose batches were given up.
    fn sweep(&self) {
        self.open().retain(|_, waiting| waiting.marks.iter().flatten().any(|mark| mark.strong_count() > 0));
    }

    async fn begin(&self) -> Result<Waiting, HandlerError> {
        self.sweep();
        let idle = self.idle().pop();
        let transaction = OpenTransaction::begin(&self.database, idle).await.map_err(unavailable)?;
        Ok(Waiting { transaction, marks: Default::default() })
    }

    async fn resume(&self, mark: Mark) -> Result<Waiting, HandlerError> {
        let mut waiting =
            self.take(mark.transaction).ok_or_else(|| unavailable("the transaction of the message has ended"))?;
        waiting.transaction.resume(mark.handled).await.map_err(unavailable)?;
        Ok(waiting)
    }

    /// Undoes the SQL of a message that failed.
    async fn leave_out(&self, mut waiting: Waiting, before: Option<Mark>) -> Result<(), HandlerError> {
        match before {
            Some(mark) => {
                waiting.transaction.rewind(mark.handled).await.map_err(unavailable)?;
                self.open().insert(mark.transaction, waiting);
            }
            // This was the first message, so no commit refers to this transaction.
            None => {
                let idle = waiting.transaction.give_up().await.map_err(unavailable)?;
                self.idle().push(idle);
            }
        }
        Ok(())
    }
}

/// Reports an outage instead of a failure of the message. The batch then waits for the database, and is handled again.
fn unavailable(error: impl std::fmt::Display) -> HandlerError {
    StoreError::Unavailable(format!("the transaction of the batch: {error}")).into()
}

struct WithSql<H> {
    handler: H,
    transactions: Arc<Transactions>,
}

#[async_trait]
impl<H: SqlHandler> Handler for WithSql<H> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let key = Mark::key();
        let before: Option<String> = work.document(&key).await?;
        let before = before
            .ok_or_else(|| StoreError::Unavailable("a handler made by a SqlStore runs only on that store".into()))?;
        let before = Mark::read(&before);
        // From here on this future owns the connection, so that the connection closes if the future is dropped.
        let mut waiting = match before {
            None => self.transactions.begin().await?,
            Some(mark) => self.transactions.resume(mark).await?,
        };
        let handled = self.handler.handle(message, waiting.transaction.connection(), work);
        let outcome = match AssertUnwindSafe(handled).catch_unwind().await {
            Ok(Ok(())) => waiting.transaction.keep().await.map_err(HandlerError::from),
            Ok(Err(error)) => Err(error),
            Err(panic) => {
                // The writes of the batch's other messages are kept when one message panics.
                self.transactions.leave_out(waiting, before).await?;
                std::panic::resume_unwind(panic);
            }
        };
        if let Err(error) = outcome {
            self.transactions.leave_out(waiting, before).await?;
            return Err(error);
        }
        let mark = Mark { transaction: waiting.transaction.id(), handled: waiting.transaction.handled() };
        let body = mark.body();
        waiting.marks.rotate_right(1);
        waiting.marks[0] = Some(Arc::downgrade(&body));
        work.put_json(&key, Some(body), None);
        self.transactions.open().insert(mark.transaction, waiting);
        Ok(())
    }
}

#[async_trait]
impl EventStore for SqlStore {
    async fn commit(&self, mut commit: Commit) -> Result<Committed, CommitError> {
        let key = Mark::key();
        let Some(index) = commit.puts.iter().position(|put| put.key == key) else {
            return self.store.commit(commit).await;
        };
        let put = commit.puts.swap_remove(index);
        let found = put.body.as_deref().and_then(Mark::read).and_then(|mark| Some((mark, self.take(mark)?)));
        let Some((mark, (transactions, open))) = found else {
            return Err(CommitError::Unavailable("the transaction with the SQL of this batch has ended".into()));
        };
        commit.validate()?;
        if self.store.is_closed() {
            return Err(self.store.stopped());
        }
        let history = transactions.database.history.accepted()?;
        let commit = Prepared::new(commit, history);
        let (outcome, idle) = open.commit(&transactions.database, commit, mark.handled).await;
        transactions.idle().extend(idle);
        if let Ok(Committed { position, .. }) = &outcome
            && *position != Position::START
        {
            self.store.shared.notifications.written(history, *position);
        }
        outcome
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        self.store.read_stream(stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        self.store.read_log(query, after, limit).await
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        match keys {
            [key] if *key == Mark::key() => {
                Ok(vec![Some(Document { key: key.clone(), version: 1, body: NO_MARK.into(), due: None })])
            }
            _ => self.store.documents(keys).await,
        }
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        self.store.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        self.store.wait(after).await
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.store.status().await
    }

    fn history(&self) -> u64 {
        self.store.history()
    }

    fn accept_history(&self, by: &str, history: u64) {
        self.store.accept_history(by, history);
    }

    fn clock(&self) -> Clock {
        self.store.clock()
    }
}
