//! One reader at the end of the log for all subscriptions of a process.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    commit::{Commit, CommitError, Committed, Document, DocumentKey},
    event::{Position, Recorded, StreamId, Version},
    store::{EventStore, LogPage, LogQuery, Scan, StoreError, StoreStatus},
};

/// The most events held: what the slowest of several subscriptions may lag behind before it reads for itself.
const EVENTS_MAX: usize = 20_000;
/// The most payload bytes held.
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// Events read from the store in one go.
const PAGE: usize = 2_000;

/// A store that reads the end of the log once for all who follow it. Whoever is far behind reads the store directly.
pub struct Tail {
    store: Arc<dyn EventStore>,
    recent: Mutex<Recent>,
    fetch: tokio::sync::Mutex<()>,
}

/// All events in `(after, last]`.
#[derive(Default)]
struct Recent {
    after: Position,
    last: Position,
    events: VecDeque<Arc<Recorded>>,
    bytes: usize,
}

impl Tail {
    /// Follows `store` from its present end.
    pub async fn follow(store: Arc<dyn EventStore>) -> Result<Self, StoreError> {
        let head = store.status().await?.head;
        let recent = Recent { after: head, last: head, ..Recent::default() };
        Ok(Self { store, recent: Mutex::new(recent), fetch: tokio::sync::Mutex::default() })
    }

    /// The page after `after`, if it is held; `None` if the store must be asked.
    fn held(&self, query: &LogQuery, after: Position, limit: usize) -> Option<LogPage> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if after < recent.after || after >= recent.last {
            return None;
        }
        let start = recent.events.partition_point(|event| event.position <= after);
        let mut page = LogPage { events: Vec::new(), next: after };
        for event in recent.events.range(start..) {
            if page.events.len() == limit {
                return Some(page);
            }
            page.next = event.position;
            if query.matches(event) {
                page.events.push(event.clone());
            }
        }
        page.next = recent.last;
        Some(page)
    }

    fn hold(&self, page: LogPage) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.last = recent.last.max(page.next);
        for event in page.events {
            recent.bytes += event.data.len();
            recent.events.push_back(event);
        }
        while recent.events.len() > EVENTS_MAX || recent.bytes > BYTES_MAX {
            let Some(oldest) = recent.events.pop_front() else { break };
            recent.bytes -= oldest.data.len();
            recent.after = oldest.position;
        }
    }

    fn ends_at(&self) -> Position {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).last
    }
}

#[async_trait]
impl EventStore for Tail {
    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        if let Some(page) = self.held(query, after, limit) {
            return Ok(page);
        }
        if after != self.ends_at() {
            return self.store.read_log(query, after, limit).await;
        }
        let _one_fetches = self.fetch.lock().await;
        if let Some(page) = self.held(query, after, limit) {
            return Ok(page);
        }
        if after == self.ends_at() {
            let page = self.store.read_log(&LogQuery::all(), after, PAGE).await?;
            self.hold(page);
        }
        Ok(self.held(query, after, limit).unwrap_or(LogPage { events: Vec::new(), next: after }))
    }

    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        self.store.commit(commit).await
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
        if self.ends_at() > after {
            return Ok(());
        }
        self.store.wait(after).await
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.store.status().await
    }
}
