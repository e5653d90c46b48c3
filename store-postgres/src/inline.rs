//! Writes a single commit on the caller's own runtime. Two switches between threads (to the writer's thread and back)
//! would take longer than all other work that the process does for the commit.

use std::sync::Arc;

use annals::CommitError;
use tokio::{
    runtime::{Handle, Id},
    sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard},
};

use crate::{
    group::Prepared,
    queue::{InFlightGuard, Outcome},
    writer::Writer,
};

/// The writer for single commits; `None` once the store is closed.
#[derive(Debug)]
pub(crate) struct InlineWriter(Arc<Mutex<Option<BoundWriter>>>);

/// A writer, and the runtime to which its connection belongs.
#[derive(Debug)]
struct BoundWriter {
    writer: Writer,
    runtime: Option<Id>,
}

/// Exclusive access to the writer, for one commit.
pub(crate) struct ReservedWriter {
    bound: OwnedMappedMutexGuard<Option<BoundWriter>, BoundWriter>,
    runtime: Handle,
}

impl InlineWriter {
    pub(crate) fn new(writer: Writer) -> Self {
        Self(Arc::new(Mutex::new(Some(BoundWriter { writer, runtime: None }))))
    }

    /// Reserves the writer. Returns `None` if the writer is busy or closed.
    pub(crate) fn reserve(&self) -> Option<ReservedWriter> {
        let free = self.0.clone().try_lock_owned().ok()?;
        let runtime = Handle::try_current().ok()?;
        let bound = OwnedMutexGuard::try_map(free, Option::as_mut).ok()?;
        Some(ReservedWriter { bound, runtime })
    }

    pub(crate) async fn close(&self) {
        if let Some(bound) = self.0.lock().await.take() {
            // The connection has no open transaction, so an error does not matter.
            bound.writer.close().await.ok();
        }
    }
}

impl ReservedWriter {
    /// Writes the commit in a separate task, so that the commit completes even if the caller is cancelled.
    pub(crate) async fn write(self, commit: Prepared, guard: InFlightGuard) -> Outcome {
        let Self { mut bound, runtime } = self;
        let task = runtime.clone().spawn(async move {
            let outcome = bound.write(commit, runtime.id()).await;
            drop((bound, guard));
            outcome
        });
        let outcome = task.await.map_err(|ended| CommitError::Unknown(format!("during the commit, {ended}")))?;
        outcome.unwrap_or_else(|| Err(CommitError::Unavailable("the commit has no outcome".into())))
    }
}

impl BoundWriter {
    async fn write(&mut self, commit: Prepared, runtime: Id) -> Option<Outcome> {
        if self.runtime.replace(runtime) != Some(runtime) {
            self.writer.disconnect();
        }
        self.writer.write(&[commit]).await.pop()
    }
}
