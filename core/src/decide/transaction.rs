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
/// writer commits first, the work is staged again. A `Transaction` does not hold a database transaction open. Instead,
/// the commit checks the versions that were read.
///
/// ```
/// # use std::sync::Arc;
/// # use annals::{MemoryStore, DocumentKey, transaction::Transaction};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let key = DocumentKey::new("counter", "visits");
/// let transaction = Transaction::new(Arc::new(MemoryStore::new()), uuid::Uuid::new_v4());
/// let (visits, committed) = transaction
///     .run(|mut work| async {
///         let visits = work.document::<u64>(&key).await?.unwrap_or(0) + 1;
///         work.put(&key, &visits)?;
///         Ok::<_, Box<dyn std::error::Error>>((work, visits))
///     })
///     .await?;
/// assert_eq!(visits, 1);
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

debug_fields!(Transaction { request, attempts });

/// The outcome of one attempt to commit.
enum CommitAttempt {
    Committed(Committed),
    /// The outcome is unknown. Whether the attempt was committed can be seen later from its events.
    Unknown,
    /// Nothing was stored, because another writer committed first.
    Outrun,
}

impl Transaction {
    /// Creates a transaction with a command id. The commands that the transaction sends to aggregates are executed only
    /// once, however often the transaction runs.
    pub fn new(store: Arc<dyn EventStore>, request: impl Into<Request>) -> Self {
        Self { store, request: request.into(), attempts: 0, backoff: Backoff::short(), unsettled: None }
    }

    /// Stages work with `stage` and commits the work. `stage` receives an empty unit of work, and returns the staged
    /// work and a result. If another writer commits first, `stage` runs again on the current state, and runs at most
    /// [`DECISIONS_MAX`](crate::repository::DECISIONS_MAX) times in total. `stage` must therefore have no other
    /// effects. Returns the result of `stage` for the committed work, together with the positions and versions of the
    /// commit.
    ///
    /// If the outcome of an attempt is unknown, the next attempt first finds out whether the earlier attempt was
    /// committed, so nothing is committed twice.
    ///
    /// # Errors
    /// If `stage` returns an error, this method commits nothing and returns the error immediately. After too many
    /// attempts, fails with the error of the last attempt. Also fails if the outcome is unknown and the work has no
    /// events: a document does not show which commit wrote it, so only the caller can find out whether the work was
    /// committed.
    pub async fn run<T, E, F>(mut self, mut stage: impl FnMut(Work) -> F) -> Result<(T, Committed), E>
    where
        F: Future<Output = Result<(Work, T), E>>,
        E: From<CommitError>,
    {
        // The result of the attempt that may still turn out to be committed.
        let mut unknown: Option<T> = None;
        loop {
            let staged = stage(self.begin()).await;
            if unknown.is_some()
                && let Some(committed) = self.settled().await
                && let Some(value) = unknown.take()
            {
                return Ok((value, committed));
            }
            let (work, value) = staged?;
            match self.attempt(work).await? {
                CommitAttempt::Committed(committed) => return Ok((value, committed)),
                CommitAttempt::Unknown => unknown = Some(value),
                CommitAttempt::Outrun => {}
            }
        }
    }

    /// Begins an attempt. Each attempt reads everything again, so that a refusal is never based on outdated state.
    pub fn begin(&mut self) -> Work {
        self.attempts += 1;
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(self.request.command_id, self.request.metadata.clone());
        work
    }

    /// Commits an attempt. `None` means that another writer committed first, or that the outcome is unknown. In both
    /// cases, begin another attempt. If the first attempt was committed after all, the next attempt finds the events of
    /// the first attempt, and [`Decided::repeated`](crate::work::Decided) is true for its commands. Nothing more is
    /// committed in that case, however large the attempt is, and even if other writers commit in between.
    ///
    /// # Errors
    /// Fails if another attempt cannot help. After too many attempts, fails with the error of the last attempt. Also
    /// fails if the outcome is unknown and the work has no events: a document does not show which commit wrote it, so
    /// only the caller can find out whether the work was committed.
    pub async fn commit(&mut self, work: Work) -> Result<Option<Committed>, CommitError> {
        if let Some(committed) = self.settled().await {
            return Ok(Some(committed));
        }
        match self.attempt(work).await? {
            CommitAttempt::Committed(committed) => Ok(Some(committed)),
            CommitAttempt::Unknown | CommitAttempt::Outrun => Ok(None),
        }
    }

    async fn attempt(&mut self, work: Work) -> Result<CommitAttempt, CommitError> {
        let history = work.history();
        let failed = match work.attempt().await {
            Ok(committed) => return Ok(CommitAttempt::Committed(committed)),
            Err(failed) => failed,
        };
        match failed.error {
            error @ CommitError::Unknown(_) if failed.unsettled.is_none() => Err(error),
            // The log may have lost events on which the decision was based, so nothing was stored.
            CommitError::Unavailable(_) if self.store.history() != history && self.attempts < DECISIONS_MAX => {
                Ok(CommitAttempt::Outrun)
            }
            CommitError::Conflict { .. } | CommitError::DocumentConflict { .. } | CommitError::Unknown(_)
                if self.attempts < DECISIONS_MAX =>
            {
                self.backoff.wait().await;
                match failed.unsettled {
                    Some(unsettled) => {
                        self.unsettled = Some(unsettled);
                        Ok(CommitAttempt::Unknown)
                    }
                    None => Ok(CommitAttempt::Outrun),
                }
            }
            error => Err(error),
        }
    }

    async fn settled(&self) -> Option<Committed> {
        self.unsettled.as_ref()?.find(&*self.store).await.ok().flatten()
    }
}
