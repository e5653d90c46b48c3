//! One atomic change over several aggregates, for code that is not a handler.

use std::sync::Arc;

use crate::{
    backoff::Backoff,
    commit::{CommitError, Committed},
    repository::{DECISIONS_MAX, Request},
    store::EventStore,
    work::{Stale, Work},
};

/// Why a transaction did not happen. Nothing of it is stored, except where it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum TransactError<E> {
    /// The work itself said no.
    #[error("{0}")]
    Work(E),
    /// The commit does not hold. After [`CommitError::Unknown`], run it again with the same request: it is done once.
    #[error(transparent)]
    Commit(CommitError),
}

/// Stages work on several streams and documents, and commits it whole or not at all.
///
/// `stage` runs again when another writer was first; it must have no effects but on its [`Work`]. The same command id is
/// carried out once.
///
/// ```
/// # use std::sync::Arc;
/// # use annals::{MemoryStore, DocumentKey, transact};
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let store = Arc::new(MemoryStore::new());
/// let key = DocumentKey::new("settings", "greeting");
/// transact(store, uuid::Uuid::new_v4(), async |work| work.put(&key, &"hello")).await.unwrap();
/// # }
/// ```
pub async fn transact<T, E>(
    store: Arc<dyn EventStore>,
    request: impl Into<Request>,
    stage: impl AsyncFn(&mut Work) -> Result<T, E>,
) -> Result<(T, Committed), TransactError<E>> {
    let (request, mut stale, mut backoff) = (request.into(), Stale::Nothing, Backoff::short());
    let mut attempt = 1;
    loop {
        let mut work = Work::new(store.clone(), stale.clone());
        work.begin(request.command_id, request.metadata.clone());
        let staged = stage(&mut work).await;
        if staged.is_err() {
            // The reason to say no may be outdated: the commit checks what was looked at.
            work.rollback();
        }
        match (work.commit().await, staged) {
            (Ok(committed), Ok(value)) => return Ok((value, committed)),
            (Ok(_), Err(error)) => return Err(TransactError::Work(error)),
            (Err(error), _) => match error {
                CommitError::Conflict { .. } | CommitError::DocumentConflict { .. } | CommitError::Unknown(_)
                    if attempt < DECISIONS_MAX =>
                {
                    attempt += 1;
                    stale = stale.after(&error);
                    backoff.wait().await;
                }
                error => return Err(TransactError::Commit(error)),
            },
        }
    }
}
