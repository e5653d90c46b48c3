//! A store that counts commits and rows.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use annals::{
    Clock, Commit, CommitError, Committed, Document, DocumentKey, EventStore, LogPage, LogQuery, Position, Recorded,
    Scan, StoreError, StoreStatus, StreamId, Version,
};
use async_trait::async_trait;

/// Counts commits and rows since the store was created.
#[derive(Clone)]
pub struct Counting {
    store: Arc<dyn EventStore>,
    commits: Arc<AtomicU64>,
    rows: Arc<AtomicU64>,
}

impl Counting {
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store, commits: Arc::default(), rows: Arc::default() }
    }

    /// Returns the number of successful commits, and the number of their rows.
    pub fn counts(&self) -> (u64, u64) {
        (self.commits.load(Relaxed), self.rows.load(Relaxed))
    }
}

#[async_trait]
impl EventStore for Counting {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        let rows = commit.rows() as u64;
        let committed = self.store.commit(commit).await?;
        self.commits.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows, Relaxed);
        Ok(committed)
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        self.store.read_stream(stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        self.store.read_log(query, after, limit).await
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        self.store.documents(keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        self.store.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        self.store.wait(after).await
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
