//! Lets callers outside of a saga wait until the saga ends.

use std::time::Duration;

use futures::TryStreamExt;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    definition::SagaState,
    progress::{Progress, SagaEvent},
    runner::Sagas,
};
use crate::{
    event::{StreamId, Version},
    store::{EventStore, WaitError, pages},
};

/// The shortest and the longest pause between two reads of the saga's stream. The function waits for new events of the
/// log before each read. On a busy log, most of these events belong to other sagas, so the pauses limit the load.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Waits until the saga with this stream has ended, and returns the saga's final progress. If the saga has not started
/// yet, the function also waits for the start. A stuck saga has not ended: the function keeps waiting until an operator
/// acts or the limit is reached.
///
/// The function reads the saga's stream again only after the log has received new events.
///
/// # Errors
/// Fails with [`WaitError::TimedOut`] if the saga has not ended within `limit`. The saga itself is not affected.
pub async fn wait_for_end(store: &dyn EventStore, saga: &StreamId, limit: Duration) -> Result<Progress, WaitError> {
    let deadline = Instant::now() + limit;
    let mut progress: Option<Progress> = None;
    let mut read_up_to = Version::START;
    let mut pause = PAUSE_MIN;
    loop {
        // The head is read before the stream, so that no event between the two reads is missed.
        let head = store.status().await?.head;
        let last = pages::history(store, saga, read_up_to).try_fold(None, async |_, event| Ok(Some(event))).await?;
        if let Some(last) = last {
            read_up_to = last.version;
            if let Some(event) = last.decode::<SagaEvent>()? {
                progress = Some(event.progress().clone());
            }
        }
        if let Some(progress) = progress.take_if(|progress| progress.ended.is_some()) {
            return Ok(progress);
        }
        match timeout_at(deadline, store.wait(head)).await {
            Ok(woken) => woken?,
            Err(_) => {
                let state = match &progress {
                    Some(progress) => format!("it is {:?} at step {}", progress.status, progress.step),
                    None => "it has not started".to_owned(),
                };
                return Err(WaitError::TimedOut { awaited: format!("the end of saga {saga}"), limit, state });
            }
        }
        sleep_until(deadline.min(Instant::now() + pause)).await;
        pause = (2 * pause).min(PAUSE_MAX);
    }
}

impl<C: SagaState> Sagas<C> {
    /// Waits until the saga with this id has ended, and returns its final progress; see [`wait_for_end`].
    ///
    /// # Errors
    /// Fails with [`WaitError::TimedOut`] if the saga has not ended within `limit`. The saga itself is not affected.
    pub async fn wait_for_end(&self, id: &str, limit: Duration) -> Result<Progress, WaitError> {
        wait_for_end(&*self.store, &self.instances.stream(id)?, limit).await
    }
}
