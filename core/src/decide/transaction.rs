//! One atomic change across several aggregates and documents, for code outside of handlers.

use std::sync::Arc;

use crate::{
    base::backoff::Backoff,
    commit::{CommitError, Committed},
    decide::{
        repository::{DECISIONS_MAX, Request},
        unsettled::Unsettled,
        work::{Stale, Work},
    },
    store::EventStore,
};

/// Stages work on several streams and documents, and commits the work either completely or not at all. If another
/// writer commits first, the caller can retry. A `Transaction` does not hold a database transaction open. Instead, the
/// commit checks the versions that were read.
///
/// ```
/// # use std::sync::Arc;
/// # use annals::{MemoryStore, DocumentKey, transaction::Transaction};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = DocumentKey::new("counter", "visits");
/// let mut transaction = Transaction::new(Arc::new(MemoryStore::new()), uuid::Uuid::new_v4());
/// let committed = loop {
///     let mut work = transaction.begin();
///     let visits: u64 = work.document(&key).await?.unwrap_or(0);
///     work.put(&key, &(visits + 1))?;
///     if let Some(committed) = transaction.commit(work).await? {
///         break committed;
///     }
/// };
/// # Ok(()) }
/// ```
pub struct Transaction {
    store: Arc<dyn EventStore>,
    request: Request,
    attempts: u32,
    backoff: Backoff,
    /// An attempt that may still turn out to be committed.
    unsettled: Option<Box<Unsettled>>,
}

impl Transaction {
    /// Creates a transaction with a command id. Its commands to aggregates are executed only once, however often the
    /// transaction runs.
    pub fn new(store: Arc<dyn EventStore>, request: impl Into<Request>) -> Self {
        Self { store, request: request.into(), attempts: 0, backoff: Backoff::short(), unsettled: None }
    }

    /// Begins an attempt. Each attempt reads everything again, so that a refusal is never based on outdated state.
    pub fn begin(&mut self) -> Work {
        self.attempts += 1;
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(self.request.command_id, self.request.metadata.clone());
        work
    }

    /// Commits an attempt. `None` means that another writer committed first, or that the outcome is unknown. In both
    /// cases, begin another attempt. If the first attempt was committed after all, the next attempt finds its events
    /// and reports that with [`Decided::repeated`](crate::work::Decided). Nothing more is committed then, whatever the
    /// size of the attempt and whatever other writers do.
    ///
    /// # Errors
    /// Fails if another attempt cannot help. After too many attempts, fails with the error of the last attempt. An
    /// unknown outcome of work without events is an error too: a document does not show which commit wrote it, so only
    /// the caller can find out.
    pub async fn commit(&mut self, work: Work) -> Result<Option<Committed>, CommitError> {
        if let Some(committed) = self.settled().await {
            return Ok(Some(committed));
        }
        let history = work.history();
        let failed = match work.attempt().await {
            Ok(committed) => return Ok(Some(committed)),
            Err(failed) => failed,
        };
        match failed.error {
            error @ CommitError::Unknown(_) if failed.unsettled.is_none() => Err(error),
            // Nothing was stored, because the events behind the decision may be gone.
            CommitError::Unavailable(_) if self.store.history() != history && self.attempts < DECISIONS_MAX => Ok(None),
            CommitError::Conflict { .. } | CommitError::DocumentConflict { .. } | CommitError::Unknown(_)
                if self.attempts < DECISIONS_MAX =>
            {
                self.unsettled = failed.unsettled.or(self.unsettled.take());
                self.backoff.wait().await;
                Ok(None)
            }
            error => Err(error),
        }
    }

    async fn settled(&self) -> Option<Committed> {
        self.unsettled.as_ref()?.find(&*self.store).await.ok().flatten()
    }
}
