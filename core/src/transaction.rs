//! One atomic change over several aggregates and documents, for code that is not a handler.

use std::sync::Arc;

use crate::{
    backoff::Backoff,
    commit::{CommitError, Committed},
    repository::{DECISIONS_MAX, Request},
    store::EventStore,
    unsettled::Unsettled,
    work::{Stale, Work},
};

/// Stages work on several streams and documents, and commits it whole or not at all, again where another writer was
/// first. It holds no database transaction: what was read is checked by the commit.
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
    /// An attempt that may still turn out to hold.
    unsettled: Option<Box<Unsettled>>,
}

impl Transaction {
    /// A transaction under a command id: what it executes on aggregates is done once, however often it is run.
    pub fn new(store: Arc<dyn EventStore>, request: impl Into<Request>) -> Self {
        Self { store, request: request.into(), attempts: 0, backoff: Backoff::short(), unsettled: None }
    }

    /// An attempt. It reads everything anew, so that a refusal is never for an outdated reason.
    pub fn begin(&mut self) -> Work {
        self.attempts += 1;
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(self.request.command_id, self.request.metadata.clone());
        work
    }

    /// Commits an attempt. `None`: another writer was first, or the outcome is unknown; begin another one, which finds
    /// its own events if this one did hold, and says so with [`Decided::repeated`](crate::work::Decided). Nothing more is
    /// committed then, however large the attempt was, and whatever other writers did meanwhile.
    ///
    /// # Errors
    /// What another attempt cannot mend, or after too many of them the last one's. Also an unknown outcome of work that
    /// appends nothing: documents do not tell who wrote them, so only the caller can.
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
            // Nothing was stored, because what it was decided on may be gone.
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
