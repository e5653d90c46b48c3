//! Tells those who wait for a saga that it has ended.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use annals::{
    EventStore, LogQuery,
    saga::{Progress, Status},
};
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::metrics::Metrics;

/// Before the log is read again that could not be read.
const READ_AGAIN: Duration = Duration::from_millis(200);
/// Events read in one go.
const PAGE: usize = 1_000;

/// Who waits for which saga, by its stream. Clones share it.
#[derive(Clone, Default)]
pub struct Endings {
    waiting: Arc<Mutex<HashMap<Arc<str>, watch::Sender<()>>>>,
}

/// The part of a saga's event that tells whether it has ended.
#[derive(Deserialize)]
struct Glimpse {
    progress: Progress,
}

impl Endings {
    /// Resolves when the saga ends, or is stuck, after this was called. Look whether it has before you wait.
    pub fn of(&self, saga: &str) -> watch::Receiver<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting.get(saga) {
            Some(ends) => ends.subscribe(),
            None => {
                let (ends, ended) = watch::channel(());
                waiting.insert(saga.into(), ends);
                ended
            }
        }
    }

    /// Forgets a saga that nobody waits for any more.
    pub fn leave(&self, saga: &str, ended: watch::Receiver<()>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        drop(ended);
        if waiting.get(saga).is_some_and(|ends| ends.receiver_count() == 0) {
            waiting.remove(saga);
        }
    }

    /// Follows the sagas in the log from now on, whichever instance runs them.
    pub async fn follow(
        self,
        store: Arc<dyn EventStore>,
        sagas: Vec<&'static str>,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) -> Result<(), String> {
        let query = LogQuery::categories(sagas);
        let mut position = store.status().await.map_err(|error| error.to_string())?.head;
        let mut caught_up = true;
        while !shutdown.is_cancelled() {
            let read = async {
                if caught_up {
                    store.wait(position).await?;
                }
                store.read_log(&query, position, PAGE).await
            };
            let page = tokio::select! {
                page = read => page,
                () = shutdown.cancelled() => break,
            };
            let Ok(page) = page else {
                // The parts of the services tell of it.
                tokio::time::sleep(READ_AGAIN).await;
                continue;
            };
            for event in &page.events {
                // Whoever runs the saga tells of one that cannot be read.
                let Ok(Glimpse { progress }) = serde_json::from_str(&event.data) else { continue };
                if progress.ended.is_some() || progress.status == Status::Stuck {
                    metrics.saga_ended(event.stream.category(), progress.status);
                    let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    waiting.remove(event.stream.as_str());
                }
            }
            // If there is more after all, a wait for it is over at once.
            caught_up = !page.more;
            position = page.next;
        }
        Ok(())
    }
}
