//! The wait for the next events of a log.

use std::pin::pin;

use futures::future::BoxFuture;

use crate::{
    event::Position,
    store::{EventStore, StoreError},
};

/// A wait for events after a position.
///
/// A wait that is polled once and then not polled again may hold a session of the store, or a lock that every other
/// wait needs. If several lanes stop polling their waits to do other work, and that work needs a session too, all lanes
/// get stuck. Therefore, other work is done with [`alongside`](Self::alongside).
pub(crate) struct LogWait<'a> {
    /// `None` once the wait is over.
    wait: Option<BoxFuture<'a, Result<(), StoreError>>>,
    /// The result of the wait, if the wait ended during other work.
    woken: Option<Result<(), StoreError>>,
}

impl<'a> LogWait<'a> {
    pub fn after(store: &'a dyn EventStore, position: Position) -> Self {
        Self { wait: Some(store.wait(position)), woken: None }
    }

    /// Resolves when the log has events after the position. After one call has resolved, further calls never resolve.
    pub async fn woken(&mut self) -> Result<(), StoreError> {
        if let Some(woken) = self.woken.take() {
            return woken;
        }
        let Some(wait) = &mut self.wait else { return std::future::pending().await };
        let woken = wait.await;
        self.wait = None;
        woken
    }

    /// Does other work while the wait makes progress.
    pub async fn alongside<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                woken = self.woken(), if self.woken.is_none() => self.woken = Some(woken),
            }
        }
    }
}
