//! One atomic change across several aggregates and documents, for code outside of handlers.

use std::sync::Arc;

use crate::{
    backoff::Backoff,
    commit::{CommitError, Committed},
    repository::{DECISIONS_MAX, Request},
    store::EventStore,
    unsettled::Unsettled,
    work::{Stale, Work},
};

/// Stages work on several streams and documents, commits it as a whole or not at all, and lets the caller retry when
/// another writer was first. A `Transaction` holds no database transaction: the commit checks what was read.
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
    /// A transaction under a command id: its commands to aggregates are executed once, however often the transaction
    /// runs.
    pub fn new(store: Arc<dyn EventStore>, request: impl Into<Request>) -> Self {
        Self { store, request: request.into(), attempts: 0, backoff: Backoff::short(), unsettled: None }
    }

    /// Begins an attempt. Each attempt reads everything again, so that a refusal never rests on outdated state.
    pub fn begin(&mut self) -> Work {
        self.attempts += 1;
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(self.request.command_id, self.request.metadata.clone());
        work
    }

    /// Commits an attempt. `None` means that another writer was first, or that the outcome is unknown: begin another
    /// attempt. If the first attempt was committed after all, the next one finds its events and reports that with
    /// [`Decided::repeated`](crate::work::Decided). Nothing more is committed then, independent of the size of the
    /// attempt and of other writers.
    ///
    /// # Errors
    /// If another attempt cannot help, or after too many attempts, with the error of the last one. An unknown outcome
    /// of work without events is an error too: documents do not show which commit wrote them, so only the caller can
    /// find out.
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
            // Nothing was stored, because the state behind the decision may be gone.
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
