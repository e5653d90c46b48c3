//! A shared reader of the tail of the log, which serves all subscriptions of a process.

use std::{
    any::Any,
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{
    commit::{Commit, CommitError, Committed, Document, DocumentKey},
    event::{NewEvent, Position, Recorded, StreamId, Version},
    store::{EventStore, LogPage, LogQuery, Scan, StoreError, StoreStatus, clock::Clock},
};

/// The maximum number of events held in memory. A subscription that lags further behind reads the store itself.
const EVENTS_MAX: usize = 65_536;
/// The maximum number of payload bytes held in memory.
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// The maximum number of commits that are held while earlier events are still missing.
const COMMITS_AHEAD_MAX: usize = 4_096;
/// How long a reader waits for this process to add a commit to the events in memory. The reader waits this long before
/// it waits for the store, and again before it reads new events from the store.
const SHOWN_SOON: Duration = Duration::from_millis(2);
/// The number of events read from the store per page.
const PAGE: usize = 2_000;

/// A store that reads the tail of the log once for all subscriptions. Events that are committed through the tail are
/// served from memory, without a read of the store. Readers that are far behind read the store directly.
///
/// A [`Runtime`](crate::Runtime) puts a tail around each store, and its services commit through this tail. Commits of
/// other code in the process, such as the commands of an HTTP server, go through the handle of that code. A process
/// that gives the same tail to its repositories and to its services never reads these commits back.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
///
/// use annals::{EventStore, MemoryStore, Tail};
///
/// let store: Arc<dyn EventStore> = Arc::new(Tail::follow(Arc::new(MemoryStore::new())).await?);
/// # Ok(())
/// # }
/// ```
pub struct Tail {
    store: Arc<dyn EventStore>,
    recent: Mutex<Recent>,
    fetch: tokio::sync::Mutex<()>,
    /// The lock of the caller that waits for the store on behalf of all callers.
    waits: tokio::sync::Mutex<()>,
    /// The history number of the store, and the position of the last event in memory.
    last: watch::Sender<(u64, Position)>,
    /// How many commits of this process have not been answered by the store yet.
    committing: AtomicUsize,
}

debug_fields!(Tail { last });

/// All events after the position `after`, up to and including the position `last`.
#[derive(Default)]
struct Recent {
    /// The store's history number when these events were read.
    history: u64,
    after: Position,
    last: Position,
    events: VecDeque<Arc<Recorded>>,
    bytes: usize,
    /// Whether the store has more events after these events, because one page could not hold them all.
    more: bool,
    /// Commits of this process for which earlier events are still missing, by their first position.
    ahead: BTreeMap<Position, Vec<Arc<Recorded>>>,
}

impl Recent {
    /// Adds events in log order. The events must be complete up to `next`.
    fn extend(&mut self, events: impl IntoIterator<Item = Arc<Recorded>>, next: Position) {
        for event in events.into_iter().filter(|event| event.position > self.last).collect::<Vec<_>>() {
            self.bytes += event.data.len();
            self.events.push_back(event);
        }
        self.last = self.last.max(next);
    }

    /// Moves commits from `ahead` to the held events once all earlier events are known. Then drops the oldest events if
    /// the limits are exceeded.
    fn settle(&mut self) {
        while let Some(entry) = self.ahead.first_entry() {
            if *entry.key() > self.last.next() {
                break;
            }
            let events = entry.remove();
            let next = events.last().map_or(self.last, |event| event.position);
            self.extend(events, next);
        }
        if self.ahead.len() > COMMITS_AHEAD_MAX {
            // Events of another writer, which precede these commits, are still missing. The next read of the store
            // returns all these events.
            self.ahead.clear();
        }
        while self.events.len() > EVENTS_MAX || self.bytes > BYTES_MAX {
            let Some(oldest) = self.events.pop_front() else { break };
            self.bytes -= oldest.data.len();
            self.after = oldest.position;
        }
    }
}

/// The events of a commit by stream, as they will appear in the log.
type Appended = Vec<(StreamId, Vec<NewEvent>)>;

impl Tail {
    /// Follows the log of `store` from its current end.
    pub async fn follow(store: Arc<dyn EventStore>) -> Result<Self, StoreError> {
        let history = store.history();
        let head = store.status().await?.head;
        let recent = Mutex::new(Recent { history, after: head, last: head, ..Recent::default() });
        let last = watch::Sender::new((history, head));
        let committing = AtomicUsize::new(0);
        let (fetch, waits) = Default::default();
        Ok(Self { store, recent, fetch, waits, last, committing })
    }

    /// Returns the store itself if it is a tail, and otherwise a tail that follows the store.
    pub(crate) async fn over(store: &Arc<dyn EventStore>) -> Result<Arc<dyn EventStore>, StoreError> {
        let any: &dyn Any = &**store;
        if any.is::<Self>() {
            return Ok(store.clone());
        }
        Ok(Arc::new(Self::follow(store.clone()).await?))
    }

    /// Changes the events in memory, unless they belong to another history of the log.
    fn change(&self, history: u64, change: impl FnOnce(&mut Recent)) {
        let last = {
            let mut recent = self.recent();
            if recent.history != history {
                return;
            }
            change(&mut recent);
            recent.settle();
            recent.last
        };
        self.last.send_if_modified(|(of, known)| *of == history && std::mem::replace(known, last.max(*known)) < last);
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// If the log may have lost events since the last call, discards the events in memory and continues at the current
    /// end of the log. Returns the history number and the position of the last event in memory.
    async fn renewed(&self) -> Result<(u64, Position), StoreError> {
        let known = *self.last.borrow();
        if self.store.history() == known.0 {
            return Ok(known);
        }
        let _one_fetches = self.fetch.lock().await;
        let history = self.store.history();
        if history != self.last.borrow().0 {
            let head = self.store.status().await?.head;
            *self.recent() = Recent { history, after: head, last: head, ..Recent::default() };
            // Every waiting caller must check again, no matter in which direction the end has moved.
            self.last.send_replace((history, head));
        }
        Ok(*self.last.borrow())
    }

    /// Returns the page after `after` from memory; `None` if the store must be read.
    fn held(&self, query: &LogQuery, after: Position, limit: usize) -> Option<LogPage> {
        let recent = self.recent();
        if after < recent.after || after >= recent.last {
            return None;
        }
        let start = recent.events.partition_point(|event| event.position <= after);
        let mut page = LogPage { next: after, ..LogPage::default() };
        for event in recent.events.range(start..) {
            if page.events.len() == limit {
                page.more = true;
                return Some(page);
            }
            page.next = event.position;
            if query.matches(event) {
                page.events.push(event.clone());
            }
        }
        (page.next, page.more) = (recent.last, recent.more);
        Some(page)
    }

    /// Reads the next page after the end, unless another caller has moved the end in the meantime.
    async fn fetch_after(&self, (history, end): (u64, Position)) -> Result<(), StoreError> {
        let _one_fetches = self.fetch.lock().await;
        if (history, end) == *self.last.borrow() {
            let page = self.store.read_log(&LogQuery::all(), end, PAGE).await?;
            if self.store.history() == history {
                self.change(history, |recent| {
                    recent.extend(page.events, page.next);
                    recent.more = page.more;
                });
            }
        }
        Ok(())
    }

    /// Follows the store until an error occurs. Only one caller at a time does this, on behalf of all callers. The
    /// other callers wait for a change of `last`.
    async fn follow_on(&self) -> StoreError {
        loop {
            let _one_waits = self.waits.lock().await;
            // This process often commits again soon after a commit. In that case, the store does not have to be read at
            // all.
            tokio::time::sleep(SHOWN_SOON).await;
            let end = *self.last.borrow();
            if let Err(error) = self.store.wait(end.1).await {
                return error;
            }
            // The store has more events. If a commit of this process wrote these events, they are about to be added
            // from memory and do not have to be read.
            if self.committing.load(Ordering::Acquire) > 0 {
                _ = tokio::time::timeout(SHOWN_SOON, self.last.subscribe().wait_for(|last| *last > end)).await;
            }
            if let Err(error) = self.renewed().await {
                return error;
            }
            if let Err(error) = self.fetch_after(end).await {
                return error;
            }
        }
    }

    /// Adds a commit of this process, if the store reported the positions of its events.
    fn show(&self, history: u64, appended: Appended, committed: &Committed) {
        let count = appended.iter().map(|(_, events)| events.len() as i64).sum::<i64>();
        let Some(recorded_at) = committed.recorded_at.filter(|_| count > 0) else { return };
        let first = Position(committed.position.0 - count + 1);
        let mut position = first;
        let mut shown = Vec::with_capacity(appended.iter().map(|(_, events)| events.len()).sum());
        for ((stream, events), version) in appended.into_iter().zip(&committed.versions) {
            let mut version = Version(version.0 - events.len() as i64);
            for event in events {
                version = version.next();
                shown.push(Arc::new(Recorded {
                    position,
                    stream: stream.clone(),
                    version,
                    id: event.id,
                    type_name: event.type_name.into(),
                    schema_version: event.schema_version,
                    data: event.data.into(),
                    metadata: event.metadata,
                    recorded_at,
                }));
                position = position.next();
            }
        }
        if self.store.history() == history {
            self.change(history, |recent| _ = recent.ahead.insert(first, shown));
        }
    }
}

#[async_trait]
impl EventStore for Tail {
    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        if limit == 0 {
            return Ok(LogPage { next: after, ..LogPage::default() });
        }
        let (history, end) = self.renewed().await?;
        if let Some(page) = self.held(query, after, limit) {
            return Ok(page);
        }
        if after != end {
            return self.store.read_log(query, after, limit).await;
        }
        self.fetch_after((history, after)).await?;
        Ok(self.held(query, after, limit).unwrap_or(LogPage { next: after, ..LogPage::default() }))
    }

    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        let appended = commit.appends.iter().map(|append| (append.stream.clone(), append.events.clone())).collect();
        self.committing.fetch_add(1, Ordering::AcqRel);
        // If the caller drops the future, a later read of the store returns the events.
        let done = Done(&self.committing);
        let history = self.store.history();
        let committed = self.store.commit(commit).await?;
        self.show(history, appended, &committed);
        drop(done);
        Ok(committed)
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        self.store.read_stream(stream, after, limit).await
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        self.store.documents(keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        self.store.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        let mut last = self.last.subscribe();
        let (history, _) = self.renewed().await?;
        tokio::select! {
            biased;
            _ = last.wait_for(|(of, last)| *of != history || *last > after) => Ok(()),
            error = self.follow_on() => Err(error),
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.store.status().await
    }

    fn history(&self) -> u64 {
        self.store.history()
    }

    fn accept_history(&self, by: &str, history: u64) {
        self.store.accept_history(by, history);
    }

    fn clock(&self) -> Clock {
        self.store.clock()
    }
}

/// Counts a commit as answered when this guard is dropped, even if the caller has dropped the future of the commit.
struct Done<'a>(&'a AtomicUsize);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    #[tokio::test]
    async fn no_tail_is_put_around_another_tail() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let tail = Tail::over(&store).await.unwrap();
        assert!(!Arc::ptr_eq(&store, &tail));
        assert!(Arc::ptr_eq(&tail, &Tail::over(&tail).await.unwrap()));
    }
}
