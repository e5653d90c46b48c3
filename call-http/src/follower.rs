//! Follows the log on behalf of requests that wait for a saga. For each request, the follower keeps the events of the
//! saga and of its subject (the order, return, supply or closing), and signals the end of the saga.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use annals::{
    EventStore, LogQuery, Recorded, StoreError, StreamId, Version,
    pages::PAGE,
    saga::{Glimpse, Progress, Status},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// The delay before a failed read of the log is retried.
const READ_AGAIN: Duration = Duration::from_millis(200);
/// The maximum number of payload bytes kept for one request: far more than an ordinary order and its saga have. Above
/// the limit, no events are kept, and the request reads the store instead.
const KEPT_BYTES_MAX: usize = 32_000;

/// The waiting requests, by the streams for which they wait.
type Waiting = HashMap<StreamId, Vec<Arc<Watcher>>>;

/// All waiting requests. Clones share the same requests.
#[derive(Clone, Debug, Default)]
pub struct Follower {
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Debug, Default)]
struct Watcher {
    kept: Mutex<KeptEvents>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct KeptEvents {
    events: Vec<Arc<Recorded>>,
    /// The payload bytes of all events seen, including events that are no longer kept.
    bytes: usize,
}

impl KeptEvents {
    fn push(&mut self, event: &Arc<Recorded>) {
        self.bytes = self.bytes.saturating_add(event.data.len() + size_of::<Recorded>());
        if self.bytes <= KEPT_BYTES_MAX {
            self.events.push(event.clone());
        } else {
            self.events = Vec::new();
        }
    }
}

/// A saga and its subject, followed from the moment at which a request starts to wait. Dropping this value ends the wait.
#[derive(Debug)]
pub struct Followed {
    /// The stream of the saga.
    pub saga: StreamId,
    subject: StreamId,
    follower: Follower,
    seen: Arc<Watcher>,
}

/// All events of a saga and of its subject at one moment.
#[derive(Debug)]
pub struct Whole {
    /// The events of the saga.
    pub saga: Vec<Arc<Recorded>>,
    /// The events of the subject.
    pub subject: Vec<Arc<Recorded>>,
}

impl Follower {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows both streams from now on.
    pub fn follow(&self, saga: StreamId, subject: StreamId) -> Followed {
        let seen = Arc::<Watcher>::default();
        let mut waiting = self.waiting();
        for stream in [&saga, &subject] {
            waiting.entry(stream.clone()).or_default().push(seen.clone());
        }
        Followed { saga, subject, follower: self.clone(), seen }
    }

    /// Follows the log from now on, including the events of all other instances, until `shutdown`. `categories` are the
    /// categories of the sagas and of their subjects. A service runs this future as a part of its runtime.
    ///
    /// # Errors
    /// Fails if the store does not answer at the start.
    pub async fn read(
        self,
        store: Arc<dyn EventStore>,
        categories: Vec<&'static str>,
        metrics: Arc<Metrics>,
        shutdown: CancellationToken,
    ) -> Result<(), StoreError> {
        let query = LogQuery::categories(categories);
        let mut position = store.status().await?.head;
        let mut caught_up = true;
        let mut history = store.history();
        while !shutdown.is_cancelled() {
            let read = async {
                if store.history() != history {
                    // After a restore, the log may be shorter than before, so the starting position must not lie beyond
                    // the head.
                    let now = store.history();
                    position = position.min(store.status().await?.head);
                    history = now;
                }
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
                // The other parts of the service report the error.
                tokio::time::sleep(READ_AGAIN).await;
                continue;
            };
            for event in &page.events {
                self.take(event, &metrics);
            }
            // If the log has grown since this page, the next wait returns at once.
            caught_up = !page.more;
            position = page.next;
        }
        Ok(())
    }

    fn take(&self, event: &Arc<Recorded>, metrics: &Metrics) {
        let category = event.stream.category();
        // An unreadable event is ignored here, because the saga's runner reports it.
        let glimpse = category.starts_with("saga.").then(|| Glimpse::<Progress>::of(&event.data));
        let settled = match glimpse {
            Some(Ok(Glimpse { progress, .. })) if progress.ended.is_some() || progress.status == Status::Stuck => {
                metrics.saga_ended(category, progress.status);
                true
            }
            _ => false,
        };
        for seen in self.waiting().get(&event.stream).into_iter().flatten() {
            seen.kept.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            if settled {
                seen.ended.notify_one();
            }
        }
    }
}

impl Followed {
    /// Waits until the saga ends or gets stuck. An end before the request started to wait, or before the previous call
    /// returned, does not count.
    pub async fn ended(&self) {
        self.seen.ended.notified().await;
    }

    /// Returns all events if the wait began before the first event. Otherwise the caller has to read the store.
    pub fn whole(&self) -> Option<Whole> {
        let events = self.seen.kept.lock().unwrap_or_else(PoisonError::into_inner).events.clone();
        let (saga, subject): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event.stream == self.saga);
        let begins =
            |events: &[Arc<Recorded>]| events.first().is_some_and(|first| first.version == Version::START.next());
        (begins(&saga) && begins(&subject)).then_some(Whole { saga, subject })
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        let mut waiting = self.follower.waiting();
        for stream in [&self.saga, &self.subject] {
            let Some(all) = waiting.get_mut(stream) else { continue };
            all.retain(|seen| !Arc::ptr_eq(seen, &self.seen));
            if all.is_empty() {
                waiting.remove(stream);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use annals::{Metadata, Position};
    use uuid::Uuid;

    use super::*;

    fn stream(text: &str) -> StreamId {
        StreamId::parse(text).expect("a stream")
    }

    fn event(stream_id: &str, version: i64, data: &str) -> Arc<Recorded> {
        Arc::new(Recorded {
            position: Position(version),
            stream: stream(stream_id),
            version: Version(version),
            id: Uuid::nil(),
            type_name: "thing.happened".into(),
            schema_version: 1,
            data: data.into(),
            metadata: Metadata::of_request(Uuid::nil()),
            recorded_at: chrono::DateTime::UNIX_EPOCH,
        })
    }

    #[tokio::test]
    async fn only_a_follower_from_the_beginning_has_every_event() {
        let follower = Follower::default();
        let metrics = Metrics::new().expect("metrics");
        let follow = || follower.follow(stream("saga.checkout-1"), stream("order-1"));
        let early = follow();
        follower.take(&event("order-1", 1, "{}"), &metrics);
        follower.take(&event("order-2", 1, "{}"), &metrics);
        let late = follow();
        for version in 1..=3 {
            follower.take(&event("saga.checkout-1", version, "{}"), &metrics);
        }
        let whole = early.whole().expect("the follower was there from the beginning");
        assert_eq!((whole.subject.len(), whole.saga.len()), (1, 3));
        assert!(late.whole().is_none());

        // An event over the limit is not kept, and no later event is kept either.
        follower.take(&event("order-1", 2, &format!("{:KEPT_BYTES_MAX$}", "{}")), &metrics);
        follower.take(&event("order-1", 3, "{}"), &metrics);
        assert!(early.whole().is_none());
        assert!(early.seen.kept.lock().expect("a lock").events.is_empty());
        drop((early, late));
        assert!(follower.waiting().is_empty());
    }
}
