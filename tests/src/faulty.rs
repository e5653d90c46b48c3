//! Wraps a store, and makes the store fail at the commits that a test chooses.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use annals::{
    Clock, Commit, CommitError, Committed, Document, DocumentKey, EventStore, LogPage, LogQuery, Position, Recorded,
    Scan, StoreError, StoreStatus, StreamId, Version,
};
use async_trait::async_trait;
use tokio::sync::watch;

/// The fault of one commit.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The commit is not applied. The call returns [`CommitError::Unavailable`].
    Unavailable,
    /// The commit is not applied. The call returns [`CommitError::Unknown`], so the caller does not learn the outcome.
    LostUnknown,
    /// The commit is applied. The call returns [`CommitError::Unknown`], so the caller does not learn the outcome.
    AppliedUnknown,
    /// The commit returns [`CommitError::Unknown`] at once and is applied later, when the gate opens. The delay
    /// simulates a server that is still busy.
    AppliedLater(Gate),
    /// The commit is not applied. The call returns [`CommitError::Unknown`], and the store is [away](FaultyStore::away)
    /// from then on.
    LostAndAway,
    /// The process dies before the commit is applied: this call and all later calls fail.
    CrashBefore,
    /// The process dies after the commit is applied: this call and all later calls fail.
    CrashAfter,
    /// The commit waits at the gate, and is applied when the test opens the gate.
    Hold(Gate),
}

/// A gate holds a commit until the test opens it. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Signals>);

type Signals = (watch::Sender<bool>, watch::Sender<bool>, watch::Sender<Option<bool>>);

impl Gate {
    /// Creates a closed gate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Resolves once a commit waits at the gate.
    pub async fn reached(&self) {
        wait_for(&self.0.0).await;
    }

    /// Lets through all waiting and later commits.
    pub fn open(&self) {
        self.0.1.send_replace(true);
    }

    /// Resolves once a commit with [`Fault::AppliedLater`] has passed the gate. Returns whether the commit succeeded.
    pub async fn applied(&self) -> bool {
        let mut applied = self.0.2.subscribe();
        // The sender outlives this wait, so the wait cannot fail.
        applied.wait_for(Option::is_some).await.is_ok_and(|held| *held == Some(true))
    }

    fn passed(&self, held: bool) {
        self.0.2.send_replace(Some(held));
    }

    async fn pass(&self) {
        self.0.0.send_replace(true);
        wait_for(&self.0.1).await;
    }
}

async fn wait_for(flag: &watch::Sender<bool>) {
    // The sender outlives this wait, so the wait cannot fail.
    _ = flag.subscribe().wait_for(|set| *set).await;
}

type Matches = Box<dyn Fn(&Commit) -> bool + Send + Sync>;

/// A store with planned faults. Commits are counted from 1; clones share the count and the faults.
///
/// ```
/// # use std::sync::Arc;
/// # use annals::{Commit, CommitError, DocumentKey, EventStore, MemoryStore, Put};
/// # use annals_tests::faulty::{Fault, FaultyStore};
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// let store = FaultyStore::new(Arc::new(MemoryStore::new()));
/// store.at(1, Fault::AppliedUnknown);
/// let put = Put { key: DocumentKey::new("notes", "1"), expected: Some(0), body: Some("1".into()), due: None };
/// let commit = Commit { appends: Vec::new(), puts: vec![put] };
/// assert!(matches!(store.commit(commit.clone()).await, Err(CommitError::Unknown(_))));
/// assert!(matches!(store.commit(commit).await, Err(CommitError::DocumentConflict { actual: 1, .. })));
/// # }
/// ```
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn EventStore>,
    shared: Arc<Shared>,
}

struct Shared {
    planned: Mutex<PlannedFaults>,
    crashed: watch::Sender<bool>,
    away: watch::Sender<bool>,
    /// The number of calls that failed because the store was away.
    refused: watch::Sender<u64>,
    commits: watch::Sender<u64>,
    /// The number of events that reads of the log have returned.
    events_read: watch::Sender<u64>,
}

#[derive(Default)]
struct PlannedFaults {
    by_number: HashMap<u64, Fault>,
    by_content: Vec<(Matches, Fault)>,
}

impl FaultyStore {
    /// Wraps a store. The new store has no faults.
    pub fn new(inner: Arc<dyn EventStore>) -> Self {
        let shared = Shared {
            planned: Mutex::default(),
            crashed: watch::Sender::new(false),
            away: watch::Sender::new(false),
            refused: watch::Sender::new(0),
            commits: watch::Sender::new(0),
            events_read: watch::Sender::new(0),
        };
        Self { inner, shared: Arc::new(shared) }
    }

    /// Sets the fault of commit number `number`.
    pub fn at(&self, number: u64, fault: Fault) -> &Self {
        self.planned().by_number.insert(number, fault);
        self
    }

    /// Sets a fault for the next commit that matches. The fault occurs once.
    pub fn when(&self, matches: impl Fn(&Commit) -> bool + Send + Sync + 'static, fault: Fault) -> &Self {
        self.planned().by_content.push((Box::new(matches), fault));
        self
    }

    /// Sets a fault for the next commit that moves a checkpoint whose id starts with `id`. The fault occurs once.
    pub fn when_checkpoint(&self, id: &str, fault: Fault) -> &Self {
        let id = id.to_owned();
        let moves = move |put: &annals::Put| {
            &*put.key.collection == annals::checkpoint::CHECKPOINTS && put.key.id.starts_with(&id)
        };
        self.when(move |commit| commit.puts.iter().any(&moves), fault)
    }

    /// Makes every call fail from now on, including calls that are waiting, as if the process had died.
    pub fn crash(&self) {
        self.shared.crashed.send_replace(true);
    }

    /// Resolves once the store has crashed.
    pub async fn crashed(&self) {
        wait_for(&self.shared.crashed).await;
    }

    /// Returns whether the store has crashed.
    pub fn has_crashed(&self) -> bool {
        *self.shared.crashed.borrow()
    }

    /// Takes the store away, or brings it back. While the store is away, every call fails as unavailable.
    pub fn away(&self, away: bool) {
        self.shared.away.send_replace(away);
    }

    /// Returns whether the store is away.
    pub fn is_away(&self) -> bool {
        *self.shared.away.borrow()
    }

    /// Resolves once this many calls have failed because the store was away.
    pub async fn refused(&self, calls: u64) {
        _ = self.shared.refused.subscribe().wait_for(|refused| *refused >= calls).await;
    }

    /// Returns the number of commits requested so far.
    pub fn commits(&self) -> u64 {
        *self.shared.commits.borrow()
    }

    /// Returns the number of events that reads of the log have returned. An event that was read twice counts twice.
    pub fn events_read(&self) -> u64 {
        *self.shared.events_read.borrow()
    }

    /// Resolves once this many commits have been requested.
    pub async fn committed(&self, commits: u64) {
        _ = self.shared.commits.subscribe().wait_for(|asked| *asked >= commits).await;
    }

    fn planned(&self) -> std::sync::MutexGuard<'_, PlannedFaults> {
        self.shared.planned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self, number: u64, commit: &Commit) -> Option<Fault> {
        let mut planned = self.planned();
        if let Some(fault) = planned.by_number.remove(&number) {
            return Some(fault);
        }
        let index = planned.by_content.iter().position(|(matches, _)| matches(commit))?;
        Some(planned.by_content.remove(index).1)
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.has_crashed() {
            return Err(StoreError::Unavailable("this process has crashed".into()));
        }
        if *self.shared.away.borrow() {
            self.shared.refused.send_modify(|refused| *refused += 1);
            return Err(StoreError::Unavailable("the store is away".into()));
        }
        Ok(())
    }
}

fn unavailable(error: StoreError) -> CommitError {
    CommitError::Unavailable(error.to_string())
}

#[async_trait]
impl EventStore for FaultyStore {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        self.check().map_err(unavailable)?;
        let mut number = 0;
        self.shared.commits.send_modify(|commits| {
            *commits += 1;
            number = *commits;
        });
        match self.fault(number, &commit) {
            None => self.inner.commit(commit).await,
            Some(Fault::Unavailable) => Err(CommitError::Unavailable("scripted".into())),
            Some(Fault::LostUnknown) => Err(CommitError::Unknown("scripted".into())),
            Some(Fault::LostAndAway) => {
                self.away(true);
                Err(CommitError::Unknown("scripted".into()))
            }
            Some(Fault::AppliedUnknown) => {
                self.inner.commit(commit).await?;
                Err(CommitError::Unknown("scripted".into()))
            }
            Some(Fault::AppliedLater(gate)) => {
                let inner = self.inner.clone();
                tokio::spawn(async move {
                    gate.pass().await;
                    let applied = inner.commit(commit).await;
                    gate.passed(applied.is_ok());
                });
                Err(CommitError::Unknown("scripted".into()))
            }
            Some(Fault::CrashBefore) => {
                self.crash();
                self.check().map_err(unavailable)?;
                Err(CommitError::Unknown("crashed".into()))
            }
            Some(Fault::CrashAfter) => {
                let committed = self.inner.commit(commit).await;
                self.crash();
                self.check().map_err(unavailable)?;
                committed
            }
            Some(Fault::Hold(gate)) => {
                gate.pass().await;
                self.check().map_err(unavailable)?;
                self.inner.commit(commit).await
            }
        }
    }

    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        self.check()?;
        self.inner.read_stream(stream, after, limit).await
    }

    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        self.check()?;
        let page = self.inner.read_log(query, after, limit).await?;
        self.shared.events_read.send_modify(|read| *read += page.events.len() as u64);
        Ok(page)
    }

    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        self.check()?;
        self.inner.documents(keys).await
    }

    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        self.check()?;
        self.inner.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        self.check()?;
        // Taking the store away also ends waiting calls, as a dropped connection does.
        tokio::select! {
            woken = self.inner.wait(after) => woken,
            () = wait_for(&self.shared.crashed) => self.check(),
            () = wait_for(&self.shared.away) => self.check(),
        }
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.check()?;
        self.inner.status().await
    }

    fn history(&self) -> u64 {
        self.inner.history()
    }

    fn accept_history(&self, by: &str, history: u64) {
        self.inner.accept_history(by, history);
    }

    fn clock(&self) -> Clock {
        self.inner.clock()
    }
}
