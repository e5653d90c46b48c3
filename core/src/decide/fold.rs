//! Folds aggregates: reads the events of a stream, applies them to the state of the aggregate, caches the folded
//! states, and takes snapshots.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use futures::TryStreamExt;
use uuid::Uuid;

use crate::{
    base::panic::caught_now,
    commit::{Commit, CommitError, DocumentKey, Expected, Put},
    decide::{
        aggregate::Aggregate,
        remembered::{First, Remembered},
    },
    event::{DecodeError, Position, StreamId, StreamIdError, Version, derived_id},
    store::{EventStore, StoreError, pages},
};

/// The number of events read per page while folding.
const FOLD_PAGE: usize = 1_000;

/// The folded aggregates of one type in a store.
pub(crate) struct Folds<A: Aggregate> {
    pub store: Arc<dyn EventStore>,
    category: String,
    cache: quick_cache::sync::Cache<StreamId, Arc<Folded<A>>>,
    /// The cache is valid only while the store has this history number.
    history: AtomicU64,
    /// The initial state of every aggregate.
    new: Arc<Folded<A>>,
}

/// Why an aggregate could not be folded.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FoldError {
    /// The stream holds an event that this build cannot read.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    /// The store failed to answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The cached states that turned out to be outdated in an earlier attempt.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Stale {
    #[default]
    Nothing,
    Streams(Vec<StreamId>),
    Everything,
}

impl Stale {
    pub fn has(&self, stream: &StreamId) -> bool {
        match self {
            Self::Nothing => false,
            Self::Streams(streams) => streams.contains(stream),
            Self::Everything => true,
        }
    }

    /// Returns the cached states that the next attempt must not use after this error. Each of the first four conflicts
    /// adds only the stream that the error names. After a fifth conflict, or after any other error, no cached state is
    /// used.
    pub fn after(self, error: &CommitError) -> Self {
        match (self, error) {
            (Self::Nothing, CommitError::Conflict { stream, .. }) => Self::Streams(vec![stream.clone()]),
            (Self::Streams(mut streams), CommitError::Conflict { stream, .. }) if streams.len() < 4 => {
                streams.push(stream.clone());
                Self::Streams(streams)
            }
            _ => Self::Everything,
        }
    }
}

impl<A: Aggregate> Folds<A> {
    /// `cached` is the maximum number of folded aggregates in memory.
    pub fn new(store: Arc<dyn EventStore>, category: &str, cached: usize) -> Self {
        let cache = quick_cache::sync::Cache::new(cached);
        let history = AtomicU64::new(store.history());
        Self { store, category: category.to_owned(), cache, history, new: Arc::default() }
    }

    /// Returns the stream of the aggregate with this id.
    pub fn stream(&self, id: &str) -> Result<StreamId, StreamIdError> {
        StreamId::new(&self.category, id)
    }

    /// Returns the folded aggregate, from the cache if possible. If the state is not in the cache, or if `stale` is
    /// true, the missing events are read and applied first. With `expect_new`, a state that is not in the cache counts
    /// as the initial state, unless `stale` is true.
    pub(crate) async fn folded(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        stale: bool,
        expect_new: bool,
    ) -> Result<Arc<Folded<A>>, FoldError> {
        let history = self.renew();
        let known = match self.cache.get(stream) {
            Some(folded) if !stale => return Ok(folded),
            Some(folded) => (*folded).clone(),
            None if expect_new && !stale => return Ok(self.new.clone()),
            None => self.load_snapshot(store, stream).await?,
        };
        let folded = match self.caught_up(store, stream, known).await? {
            Some(folded) => folded,
            // The last event of the cached state is no longer in this stream, so the log has lost its most recent
            // events. The snapshot may be intact, or may depend on a lost event too.
            None => {
                self.cache.remove(stream);
                let known = self.load_snapshot(store, stream).await?;
                let of_snapshot = self.caught_up(store, stream, known).await?;
                let anew = match of_snapshot {
                    Some(folded) => Some(folded),
                    None => self.caught_up(store, stream, Folded::default()).await?,
                };
                anew.ok_or_else(|| StoreError::Unavailable(format!("stream {stream} changed while it was read")))?
            }
        };
        let folded = Arc::new(folded);
        self.remember(stream.clone(), folded.clone(), history);
        Ok(folded)
    }

    /// Reads the events after the known state and applies them. Returns `None` if the stream lacks the last event of
    /// the known state.
    async fn caught_up(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        mut folded: Folded<A>,
    ) -> Result<Option<Folded<A>>, FoldError> {
        // The last known event is read again, because its version may belong to another event by now.
        let mut known = folded.last_event;
        loop {
            let after = Version(folded.version.0 - i64::from(known.is_some()));
            let page = store.read_stream(stream, after, FOLD_PAGE).await?;
            let last = page.len() < FOLD_PAGE;
            let mut page = page.into_iter();
            if let Some(id) = known.take()
                && page.next().is_none_or(|event| event.id != id)
            {
                return Ok(None);
            }
            for event in page {
                folded.remembered.read(event.id, folded.version.next(), event.metadata.causation_id);
                folded.apply(event.decode::<A::Event>()?.as_ref(), event.id);
            }
            if last {
                folded.remembered.end_of_run();
                return Ok(Some(folded));
            }
        }
    }

    /// Clears the cache if the log may have lost events since the cached states were read. Returns the current history
    /// number.
    fn renew(&self) -> u64 {
        let history = self.store.history();
        if self.history.swap(history, Ordering::AcqRel) != history {
            self.cache.clear();
        }
        history
    }

    /// Caches a state that was read or committed under this history number.
    pub(crate) fn remember(&self, stream: StreamId, folded: Arc<Folded<A>>, history: u64) {
        if self.renew() != history {
            return;
        }
        // A more recent state from another task must not be replaced.
        if self.cache.peek(&stream).is_none_or(|known| known.version <= folded.version) {
            self.cache.insert(stream, folded);
        }
    }

    /// Searches the whole stream for the first event of the command, and returns the version of that event.
    pub(crate) async fn first_of(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        command_id: Uuid,
    ) -> Result<Option<Version>, StoreError> {
        let id = derived_id(command_id, 0);
        let mut events = pages::history(store, stream, Version::START);
        while let Some(event) = events.try_next().await? {
            if event.id == id {
                return Ok(Some(event.version));
            }
        }
        Ok(None)
    }

    /// Returns the events that the store already holds for this command, together with the version and the position of
    /// the last event. `first` is the version of the first event.
    pub(crate) async fn events_of(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        first: Version,
        command_id: Uuid,
    ) -> Result<(Vec<A::Event>, Version, Option<Position>), FoldError> {
        let mut events = Vec::new();
        let mut index = 0;
        let mut after = Version(first.0 - 1);
        let mut position = None;
        let mut stored = pages::history(store, stream, after);
        while let Some(event) = stored.try_next().await?
            && event.id == derived_id(command_id, index)
        {
            index += 1;
            after = event.version;
            position = Some(event.position);
            events.extend(event.decode::<A::Event>()?);
        }
        Ok((events, after, position))
    }

    fn snapshot_key(&self, stream: &StreamId) -> DocumentKey {
        DocumentKey::new(format!("snapshot.{}", self.category), stream.id())
    }

    /// Returns the snapshot to store with this commit, or `None` if fewer events than
    /// [`Snapshot::every`](crate::aggregate::Snapshot) have passed since the last snapshot.
    pub(crate) fn snapshot(&self, stream: &StreamId, folded: &mut Folded<A>) -> Option<Put> {
        let policy = A::SNAPSHOT?;
        if folded.version.0 - folded.snapshot.0 < policy.every {
            return None;
        }
        // A panic in the user's serializer must not stop the commit of a decision.
        let state = caught_now(|| (policy.save)(&folded.state)).ok()?.ok()?;
        let stored = StoredSnapshot {
            version: folded.version,
            schema: policy.version,
            ids: Vec::new(),
            last_event: folded.last_event,
            commands: folded.remembered.to_stored(),
            state: serde_json::value::RawValue::from_string(state).ok()?,
        };
        folded.snapshot = folded.version;
        let body = serde_json::to_string(&stored).ok()?;
        let put = Put { key: self.snapshot_key(stream), expected: None, body: Some(body.into()), due: None };
        // A state that is not valid as a document must not make a command fail. The aggregate then has no snapshot, and
        // is folded from its events.
        let alone = Commit { appends: Vec::new(), puts: vec![put] };
        alone.validate().ok()?;
        alone.puts.into_iter().next()
    }

    async fn load_snapshot(&self, store: &dyn EventStore, stream: &StreamId) -> Result<Folded<A>, StoreError> {
        let Some(policy) = A::SNAPSHOT else { return Ok(Folded::default()) };
        let found = store.document(&self.snapshot_key(stream)).await?;
        let stored = found.and_then(|document| serde_json::from_str::<StoredSnapshot>(&document.body).ok());
        let Some(stored) = stored.filter(|stored| stored.schema == policy.version) else {
            return Ok(Folded::default());
        };
        let Ok(state) = (policy.load)(stored.state.get()) else { return Ok(Folded::default()) };
        let remembered = match &stored.ids[..] {
            [] => Remembered::from_stored(stored.commands),
            ids => Remembered::from_ids(ids, stored.version),
        };
        let last_event = stored.last_event.or(stored.ids.last().copied());
        Ok(Folded { version: stored.version, snapshot: stored.version, last_event, remembered, state })
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct StoredSnapshot {
    version: Version,
    schema: i32,
    /// The ids of the last events. Only older builds write this field, because they recognised repeated commands by
    /// event ids. An older build cannot parse a snapshot without this field, and folds the stream instead.
    #[serde(default, skip_serializing)]
    ids: Vec<Uuid>,
    /// The id of the event at `version`.
    #[serde(default)]
    last_event: Option<Uuid>,
    #[serde(default)]
    commands: Vec<First>,
    state: Box<serde_json::value::RawValue>,
}

/// The folded state of an aggregate, together with its recent commands, which are kept so that a repeated command is
/// recognised.
#[derive(Clone)]
pub(crate) struct Folded<A> {
    pub version: Version,
    /// The id of the event at `version`.
    pub last_event: Option<Uuid>,
    pub state: A,
    pub remembered: Remembered,
    snapshot: Version,
}

impl<A: Default> Default for Folded<A> {
    fn default() -> Self {
        Self {
            version: Version::START,
            last_event: None,
            state: A::default(),
            remembered: Remembered::default(),
            snapshot: Version::START,
        }
    }
}

impl<A: Aggregate> Folded<A> {
    /// Applies the next event. `None` stands for an event of a type that the aggregate skips.
    pub fn apply(&mut self, event: Option<&A::Event>, id: Uuid) {
        if let Some(event) = event {
            self.state.evolve(event);
        }
        self.version = self.version.next();
        self.last_event = Some(id);
    }

    /// Returns the expectation with which a commit that is based on this state appends to the stream.
    pub fn expected(&self) -> Expected {
        match self.last_event {
            Some(id) => Expected::Event { version: self.version, id },
            None => Expected::Version(self.version),
        }
    }
}
