//! The reference store, which implements the whole contract of [`EventStore`] in memory, for tests and experiments.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use chrono::{DateTime, SubsecRound, Utc};
use tokio::sync::watch;

use crate::{
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Put},
    event::{Position, Recorded, StreamId, Version},
    store::{EventStore, LogPage, LogQuery, Scan, StoreError, StoreStatus, clock::Clock},
};

/// The maximum number of events that one page of [`EventStore::read_log`] examines. If a query excludes most events,
/// this maximum limits how long the lock is held.
const PAGE_EVENTS_MAX: usize = 10_000;

/// A store in memory. Clones share one log. The contents are lost when the last clone is dropped.
///
/// The store is unbounded: it holds every event and document ever put into it.
///
/// ```
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// use annals::{Commit, DocumentKey, EventStore, MemoryStore, Put};
///
/// let store = MemoryStore::new();
/// let key = DocumentKey::new("greeting", "1");
/// let put = Put { key: key.clone(), expected: Some(0), body: Some("\"hello\"".into()), due: None };
/// store.commit(Commit { appends: vec![], puts: vec![put] }).await?;
///
/// let found = store.documents(&[key]).await?;
/// assert_eq!(found[0].as_ref().map(|document| (document.version, &*document.body)), Some((1, "\"hello\"")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// # })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    shared: Arc<SharedStore>,
}

#[derive(Debug, Default)]
struct SharedStore {
    held: Mutex<Records>,
    clock: Clock,
    head: watch::Sender<Position>,
}

#[derive(Debug, Default)]
struct Records {
    /// The events in log order. The event at position `p` is at index `p - 1`.
    log: Vec<Arc<Recorded>>,
    streams: HashMap<StreamId, Vec<Arc<Recorded>>>,
    documents: BTreeMap<DocumentKey, Document>,
    /// The index for [`Scan::Due`]: collection, due time and id.
    due: BTreeSet<(Arc<str>, DateTime<Utc>, Arc<str>)>,
    last_recorded_at: DateTime<Utc>,
}

impl MemoryStore {
    /// Creates an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an empty store that uses this clock, for tests that move the clock by hand.
    pub fn with_clock(clock: Clock) -> Self {
        Self { shared: Arc::new(SharedStore { clock, ..SharedStore::default() }) }
    }

    /// Locks the contents. A poisoned lock can be used: no panic leaves a commit half applied, because everything is
    /// checked before anything is changed.
    fn held(&self) -> MutexGuard<'_, Records> {
        self.shared.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl EventStore for MemoryStore {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        commit.validate()?;
        let mut held = self.held();
        held.check(&commit)?;
        let committed = held.apply(commit, self.shared.clock.now());
        // The head is sent while the lock is held, so that the head never moves backwards.
        if committed.position > Position::START {
            self.shared.head.send_replace(committed.position);
        }
        Ok(committed)
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        let held = self.held();
        let events = held.streams.get(stream).map_or(&[][..], Vec::as_slice);
        Ok(events.iter().skip(index_after(after.0)).take(limit).map(|event| Recorded::clone(event)).collect())
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        let held = self.held();
        let mut page = LogPage { next: after, ..LogPage::default() };
        if limit == 0 {
            return Ok(page);
        }
        for (looked_at, event) in held.log.iter().skip(index_after(after.0)).enumerate() {
            if page.events.len() == limit || looked_at == PAGE_EVENTS_MAX {
                page.more = true;
                break;
            }
            if query.matches(event) {
                page.events.push(event.clone());
            }
            page.next = event.position;
        }
        Ok(page)
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        let held = self.held();
        Ok(keys.iter().map(|key| held.documents.get(key).cloned()).collect())
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        let held = self.held();
        Ok(match scan {
            Scan::After(id) => {
                let start = DocumentKey::new(collection, id.clone());
                let from_there = held.documents.range((Bound::Excluded(start), Bound::Unbounded));
                from_there
                    .take_while(|(key, _)| *key.collection == *collection)
                    .take(limit)
                    .map(|(_, document)| document.clone())
                    .collect()
            }
            Scan::Due(by) => {
                let first = (Arc::from(collection), DateTime::<Utc>::MIN_UTC, Arc::from(""));
                held.due
                    .range(first..)
                    .take_while(|(of, due, _)| **of == *collection && due <= by)
                    .take(limit)
                    .filter_map(|(of, _, id)| held.documents.get(&DocumentKey::new(of.clone(), id.clone())).cloned())
                    .collect()
            }
        })
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        let mut head = self.shared.head.subscribe();
        // The sender is part of `self`, so the wait can only end with a head beyond `after`.
        head.wait_for(|head| *head > after).await.map(drop).map_err(|error| StoreError::Unavailable(error.to_string()))
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        Ok(StoreStatus { head: *self.shared.head.borrow(), ..StoreStatus::default() })
    }

    fn clock(&self) -> Clock {
        self.shared.clock.clone()
    }
}

impl Records {
    fn version(&self, stream: &StreamId) -> Version {
        Version(self.streams.get(stream).map_or(0, |events| events.len() as i64))
    }

    fn document_version(&self, key: &DocumentKey) -> i64 {
        self.documents.get(key).map_or(0, |document| document.version)
    }

    fn check(&self, commit: &Commit) -> Result<(), CommitError> {
        for Append { stream, expected, .. } in &commit.appends {
            let last = self.streams.get(stream).and_then(|events| events.last());
            expected.check(stream, self.version(stream), last.map(|event| event.id))?;
        }
        for put in &commit.puts {
            put.check(self.document_version(&put.key))?;
        }
        Ok(())
    }

    fn apply(&mut self, commit: Commit, now: DateTime<Utc>) -> Committed {
        // The time is rounded down to microseconds, as in a database, and never decreases, even if the clock moves
        // backwards.
        self.last_recorded_at = now.trunc_subsecs(6).max(self.last_recorded_at);
        let mut committed = Committed::default();
        for append in commit.appends {
            if !append.events.is_empty() {
                committed.position = self.append(&append);
            }
            committed.versions.push(self.version(&append.stream));
        }
        for put in commit.puts {
            self.put(put);
        }
        committed.recorded_at = (committed.position > Position::START).then_some(self.last_recorded_at);
        committed
    }

    fn append(&mut self, append: &Append) -> Position {
        let stream = self.streams.entry(append.stream.clone()).or_default();
        for event in &append.events {
            let recorded = Arc::new(Recorded {
                position: Position(self.log.len() as i64 + 1),
                stream: append.stream.clone(),
                version: Version(stream.len() as i64 + 1),
                id: event.id,
                type_name: Arc::from(&*event.type_name),
                schema_version: event.schema_version,
                data: Arc::from(&*event.data),
                metadata: event.metadata.clone(),
                recorded_at: self.last_recorded_at,
            });
            stream.push(recorded.clone());
            self.log.push(recorded);
        }
        Position(self.log.len() as i64)
    }

    fn put(&mut self, put: Put) {
        let version = self.document_version(&put.key) + 1;
        if let Some(Document { key, due: Some(due), .. }) = self.documents.remove(&put.key) {
            self.due.remove(&(key.collection, due, key.id));
        }
        let Some(body) = put.body else { return };
        // The due time is rounded as in a database. Every time that chrono supports can be expressed in microseconds.
        let due = put.due.map(|due| DateTime::from_timestamp_micros(due.timestamp_micros()).unwrap_or(due));
        if let Some(due) = due {
            self.due.insert((put.key.collection.clone(), due, put.key.id.clone()));
        }
        self.documents.insert(put.key.clone(), Document { key: put.key, version, body, due });
    }
}

/// Returns the index of the item after this version or position. Versions and positions have no gaps and start at 1, so
/// the index equals the number.
fn index_after(number: i64) -> usize {
    usize::try_from(number).unwrap_or(0)
}
