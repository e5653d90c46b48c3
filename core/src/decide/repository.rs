//! Repositories, which load aggregates by id, cache the folded states, and execute commands from one queue per
//! aggregate.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::oneshot;
use uuid::Uuid;

pub use crate::decide::remembered::REMEMBERED_COMMANDS;
use crate::{
    base::{
        backoff::Backoff,
        panic::{caught, caught_now},
    },
    commit::{Commit, CommitError, DocumentKey, Expected, Put},
    decide::{
        aggregate::Aggregate,
        categories,
        command_queue::Line,
        remembered::{First, Remembered},
        unsettled::Unsettled,
        work::{Decided, StagedStream, Stale, Work, WorkError},
    },
    event::{DecodeError, Metadata, StreamId, StreamIdError, Version, derived_id},
    store::{EventStore, StoreError},
};

/// How many folded aggregates a repository keeps by default.
pub const CACHED_AGGREGATES: usize = 50_000;
/// The maximum number of times that a command is decided, if other writers commit first or if outcomes are unknown.
pub const DECISIONS_MAX: u32 = 32;
/// How many commands may wait for one aggregate. Further commands fail with [`ExecuteError::Overloaded`].
pub const WAITING_COMMANDS_MAX: usize = 10_000;
/// The maximum number of waiting commands of one aggregate that share a commit.
const COMMANDS_PER_COMMIT: usize = 512;
/// The number of events read per page while folding.
const FOLD_PAGE: usize = 1_000;

/// The aggregates of one type in a store. Clones of a repository share one cache.
///
/// Commands to one aggregate are decided one after another. No lock is held during a commit: commands that arrive in
/// the meantime are then decided as one batch, which shares the next commit.
///
/// In this example, `Counter` is an [`Aggregate`] with commands of type `u64`.
///
/// ```
/// # #[derive(annals::Event, Clone, Debug)]
/// # #[event(prefix = "counter")]
/// # enum CounterEvent { Raised { by: u64 } }
/// # #[derive(Clone, Default)]
/// # struct Counter { value: u64 }
/// # impl annals::Aggregate for Counter {
/// #     const CATEGORY: &'static str = "counter";
/// #     type Command = u64;
/// #     type Event = CounterEvent;
/// #     type Refusal = std::convert::Infallible;
/// #     fn decide(&self, by: &u64) -> Result<Vec<CounterEvent>, std::convert::Infallible> {
/// #         Ok(vec![CounterEvent::Raised { by: *by }])
/// #     }
/// #     fn evolve(&mut self, event: &CounterEvent) {
/// #         let CounterEvent::Raised { by } = event;
/// #         self.value += by;
/// #     }
/// # }
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
///
/// use annals::{MemoryStore, Repository};
/// use uuid::Uuid;
///
/// let counters = Repository::<Counter>::new(Arc::new(MemoryStore::new()));
/// let request = Uuid::new_v4();
/// counters.execute("visits", 2, request).await?;
/// // A client that got no answer sends the same request again, and the command is not executed twice.
/// assert!(counters.execute("visits", 2, request).await?.repeated);
/// assert_eq!(counters.state("visits").await?.value, 2);
/// # Ok(())
/// # }
/// ```
pub struct Repository<A: Aggregate> {
    inner: Arc<Inner<A>>,
}

struct Inner<A: Aggregate> {
    store: Arc<dyn EventStore>,
    category: String,
    cache: quick_cache::sync::Cache<StreamId, Arc<Folded<A>>>,
    /// The history number of the store for which the cache is valid.
    history: AtomicU64,
    /// The initial state of every aggregate.
    new: Arc<Folded<A>>,
    lines: Mutex<HashMap<StreamId, Line<Waiting<A>>>>,
}

impl<A: Aggregate> Clone for Repository<A> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

/// The id of a command, and the metadata that describes its cause.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The id of the command. A command is executed only once, however often it is sent with the same id.
    pub command_id: Uuid,
    /// What caused the command.
    pub metadata: Metadata,
}

impl From<Uuid> for Request {
    fn from(command_id: Uuid) -> Self {
        Self { command_id, metadata: Metadata::of_request(command_id) }
    }
}

/// Why a command was not executed.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError<R: std::error::Error> {
    /// The aggregate refused the command.
    #[error("refused: {0}")]
    Refused(R),
    /// The id or an event is invalid, or the commit is too large. A retry can never succeed.
    #[error("{0}")]
    Invalid(String),
    /// The stream holds an event that this build cannot read.
    #[error(transparent)]
    Undecodable(DecodeError),
    /// Other writers committed first on every attempt. Retry with the same command id.
    #[error(
        "other writers changed stream {stream} during each of {DECISIONS_MAX} attempts: retry with the same command id"
    )]
    Contended {
        /// The stream of the aggregate.
        stream: StreamId,
    },
    /// Too many commands wait for this aggregate. Nothing was done; retry later.
    #[error("{WAITING_COMMANDS_MAX} commands already wait for stream {stream}: retry later")]
    Overloaded {
        /// The stream of the aggregate.
        stream: StreamId,
    },
    /// The store is unavailable, or the outcome is unknown. Retry with the same command id.
    #[error("{0}")]
    Unavailable(String),
}

type Answer<A> = Result<Decided<<A as Aggregate>::Event>, ExecuteError<<A as Aggregate>::Refusal>>;

struct Waiting<A: Aggregate> {
    command: A::Command,
    request: Request,
    expect_new: bool,
    answer: oneshot::Sender<Answer<A>>,
}

impl<A: Aggregate> Repository<A> {
    /// Creates a repository of the aggregates of this type in `store`.
    ///
    /// # Panics
    /// See [`with`](Self::with).
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self::with(store, A::CATEGORY, CACHED_AGGREGATES)
    }

    /// Like [`new`](Self::new), under another category, and with at most `cached` folded aggregates in memory.
    ///
    /// # Panics
    /// Panics on a programming error, before anything is written: if the category violates the grammar of [`StreamId`],
    /// if the framework reserves the category, or if another aggregate type already uses the category and the two types
    /// share no event type.
    pub fn with(store: Arc<dyn EventStore>, category: &str, cached: usize) -> Self {
        let checked = categories::check_own(category).and_then(|()| categories::register::<A>(&store, category));
        if let Err(reason) = checked {
            panic!("{reason}");
        }
        Self::of_framework(store, category, cached)
    }

    /// Creates a repository under a category that the framework reserves.
    pub(crate) fn of_framework(store: Arc<dyn EventStore>, category: &str, cached: usize) -> Self {
        let cache = quick_cache::sync::Cache::new(cached);
        let history = AtomicU64::new(store.history());
        let (category, new, lines) = (category.to_owned(), Arc::default(), Mutex::default());
        Self { inner: Arc::new(Inner { store, category, cache, history, new, lines }) }
    }

    /// Returns the stream of the aggregate with this id.
    pub fn stream(&self, id: &str) -> Result<StreamId, StreamIdError> {
        StreamId::new(&self.inner.category, id)
    }

    /// Loads the aggregate, decides on the command, and commits the events. If a command with the same id was executed
    /// before, this call changes nothing and returns the outcome of the first execution. A refused command stores
    /// nothing and may be sent again.
    ///
    /// Dropping the future does not cancel the command.
    pub async fn execute(
        &self,
        id: &str,
        command: A::Command,
        request: impl Into<Request>,
    ) -> Result<Decided<A::Event>, ExecuteError<A::Refusal>> {
        self.ask(id, command, request.into(), false).await
    }

    /// Like [`execute`](Self::execute), for an aggregate that is expected not to exist yet; this call saves a read. If
    /// the aggregate exists after all, the call still succeeds but takes longer: the commit fails its version check,
    /// and the command is decided again after a read.
    pub async fn create(
        &self,
        id: &str,
        command: A::Command,
        request: impl Into<Request>,
    ) -> Result<Decided<A::Event>, ExecuteError<A::Refusal>> {
        self.ask(id, command, request.into(), true).await
    }

    async fn ask(&self, id: &str, command: A::Command, request: Request, expect_new: bool) -> Answer<A> {
        let stream = self.stream(id).map_err(|error| ExecuteError::Invalid(error.to_string()))?;
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { command, request, expect_new, answer };
        let (carrier, began) = {
            let mut lines = self.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
            match lines.get_mut(&stream) {
                Some(line) if line.waiting.len() >= WAITING_COMMANDS_MAX => {
                    return Err(ExecuteError::Overloaded { stream });
                }
                Some(line) => (line.join(waiting), false),
                None => {
                    let service = Service { repository: self.clone(), stream: stream.clone(), whole: false };
                    let (line, carrier) = Line::begin(waiting, service.run());
                    lines.insert(stream, line);
                    (carrier, true)
                }
            }
        };
        let answer = if began {
            carrier.until(answered).await
        } else {
            carrier.leave();
            answered.await
        };
        answer.unwrap_or_else(|_| {
            Err(ExecuteError::Unavailable("the runtime shut down before the command finished".into()))
        })
    }

    /// Returns the current stored state of an aggregate.
    pub async fn state(&self, id: &str) -> Result<A, WorkError<A::Refusal>> {
        let stream = self.stream(id)?;
        Ok(self.folded(&*self.inner.store, &stream, true, false).await?.state.clone())
    }

    async fn carry_out(&self, stream: &StreamId, mut batch: Vec<Waiting<A>>) {
        let mut stale = Stale::Nothing;
        let mut backoff = Backoff::short();
        let mut unknown = None;
        // The last attempt whose outcome is unknown, with its decisions. Only the last attempt can still turn out to be
        // committed: each attempt was staged at the version at which the previous attempt would have been stored.
        let mut unsettled: Option<(Box<Unsettled>, Vec<Answer<A>>)> = None;
        for _ in 0..DECISIONS_MAX {
            if let Some((attempt, _)) = &unsettled
                && let Ok(Some(_)) = attempt.find(&*self.inner.store).await
            {
                let results = unsettled.map(|(_, results)| results).unwrap_or_default();
                return give_out(batch, results.into_iter().map(|result| result.map(found)).collect());
            }
            let history = self.inner.store.history();
            let mut work = Work::new(self.inner.store.clone(), stale.clone());
            let results = self.stage_all(&mut work, stream, &batch).await;
            // Every commit checks at least the version, so a refusal that was decided on outdated state is never
            // returned.
            let failed = match work.attempt().await {
                Ok(_) => return give_out(batch, results),
                Err(failed) => failed,
            };
            if let Some(attempt) = failed.unsettled {
                unsettled = Some((attempt, results));
            }
            let error = failed.error;
            unknown = matches!(error, CommitError::Unknown(_)).then(|| error.to_string());
            match &error {
                CommitError::Conflict { .. } | CommitError::DocumentConflict { .. } | CommitError::Unknown(_) => {
                    stale = stale.after(&error);
                    backoff.wait().await;
                }
                CommitError::Invalid(_) if batch.len() > 1 => {
                    // Either one command is invalid, or the batch is too large. Splitting the batch gives each command
                    // its own answer.
                    let rest = batch.split_off(batch.len() / 2);
                    Box::pin(self.carry_out(stream, batch)).await;
                    return Box::pin(self.carry_out(stream, rest)).await;
                }
                CommitError::Invalid(reason) => {
                    return answer_all(batch, || ExecuteError::Invalid(reason.clone()));
                }
                // Nothing was stored, because the events behind the decision may be gone. The loop decides again.
                CommitError::Unavailable(_) if self.inner.store.history() != history => {}
                CommitError::Unavailable(reason) => {
                    return answer_all(batch, || ExecuteError::Unavailable(reason.clone()));
                }
            }
        }
        answer_all(batch, || match &unknown {
            Some(reason) => ExecuteError::Unavailable(reason.clone()),
            None => ExecuteError::Contended { stream: stream.clone() },
        });
    }

    async fn stage_all(&self, work: &mut Work, stream: &StreamId, batch: &[Waiting<A>]) -> Vec<Answer<A>> {
        let mut results = Vec::with_capacity(batch.len());
        for waiting in batch {
            work.begin(waiting.request.command_id, waiting.request.metadata.clone());
            let decided = caught(work.stage(self, stream, &waiting.command, waiting.expect_new)).await;
            results.push(decided.map_or_else(
                |panic| {
                    work.rollback();
                    Err(ExecuteError::Invalid(format!("the command handler {panic}")))
                },
                |decided| decided.map_err(ExecuteError::from),
            ));
        }
        results
    }

    /// Returns the folded aggregate from the cache. If the cached state is known to be outdated, first reads the events
    /// that it lacks.
    pub(crate) async fn folded(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        stale: bool,
        expect_new: bool,
    ) -> Result<Arc<Folded<A>>, WorkError<A::Refusal>> {
        let history = self.renew();
        let known = match self.inner.cache.get(stream) {
            Some(folded) if !stale => return Ok(folded),
            Some(folded) => (*folded).clone(),
            None if expect_new && !stale => return Ok(self.inner.new.clone()),
            None => self.load_snapshot(store, stream).await?,
        };
        let folded = match self.caught_up(store, stream, known).await? {
            Some(folded) => folded,
            // The last event of the cached state is no longer in this stream, so the log has lost its most recent
            // events. The snapshot may be intact, or may depend on a lost event too.
            None => {
                self.inner.cache.remove(stream);
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
    ) -> Result<Option<Folded<A>>, WorkError<A::Refusal>> {
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
        let history = self.inner.store.history();
        if self.inner.history.swap(history, Ordering::AcqRel) != history {
            self.inner.cache.clear();
        }
        history
    }

    /// Caches a state that was read or committed under this history number.
    pub(crate) fn remember(&self, stream: StreamId, folded: Arc<Folded<A>>, history: u64) {
        if self.renew() != history {
            return;
        }
        // A more recent state from another task must not be replaced.
        if self.inner.cache.peek(&stream).is_none_or(|known| known.version <= folded.version) {
            self.inner.cache.insert(stream, folded);
        }
    }

    /// Returns the events that the stream already contains for this command.
    pub(crate) async fn events_of(
        &self,
        store: &dyn EventStore,
        stream: &StreamId,
        first: Version,
        command_id: Uuid,
        staged: &StagedStream<A>,
    ) -> Result<Vec<A::Event>, WorkError<A::Refusal>> {
        if first > staged.base_version() {
            return Ok(staged.staged_events(command_id)?);
        }
        let (mut events, mut index, mut after) = (Vec::new(), 0, Version(first.0 - 1));
        loop {
            let page = store.read_stream(stream, after, FOLD_PAGE).await?;
            let last = page.len() < FOLD_PAGE;
            for event in page {
                if event.id != derived_id(command_id, index) {
                    return Ok(events);
                }
                (index, after) = (index + 1, event.version);
                events.extend(event.decode::<A::Event>()?);
            }
            if last {
                return Ok(events);
            }
        }
    }

    fn snapshot_key(&self, stream: &StreamId) -> DocumentKey {
        DocumentKey::new(format!("snapshot.{}", self.inner.category), stream.id())
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
        // If the state is not valid as a document, the aggregate is folded from its events instead. Commands must not
        // fail for that reason.
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

/// The task that serves the queue of one aggregate. If the task is dropped early, the queue is dropped too. Waiting
/// callers then get an error, and the next command starts a new queue.
struct Service<A: Aggregate> {
    repository: Repository<A>,
    stream: StreamId,
    whole: bool,
}

impl<A: Aggregate> Service<A> {
    async fn run(mut self) {
        while let Some(batch) = self.next() {
            self.repository.carry_out(&self.stream, batch).await;
        }
    }

    fn next(&mut self) -> Option<Vec<Waiting<A>>> {
        let mut lines = self.repository.inner.lines.lock().unwrap_or_else(PoisonError::into_inner);
        match lines.get_mut(&self.stream).map(|line| &mut line.waiting).filter(|waiting| !waiting.is_empty()) {
            Some(waiting) => {
                let rest = waiting.split_off(waiting.len().min(COMMANDS_PER_COMMIT));
                Some(std::mem::replace(waiting, rest).into())
            }
            None => {
                lines.remove(&self.stream);
                self.whole = true;
                None
            }
        }
    }
}

impl<A: Aggregate> Drop for Service<A> {
    fn drop(&mut self) {
        if !self.whole {
            self.repository.inner.lines.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.stream);
        }
    }
}

/// Marks a decision as repeated, because the attempt that made this decision turned out to be committed.
fn found<E>(decided: Decided<E>) -> Decided<E> {
    Decided { repeated: decided.repeated || !decided.events.is_empty(), ..decided }
}

fn give_out<A: Aggregate>(batch: Vec<Waiting<A>>, results: Vec<Answer<A>>) {
    for (waiting, result) in batch.into_iter().zip(results) {
        _ = waiting.answer.send(result);
    }
}

fn answer_all<A: Aggregate>(batch: Vec<Waiting<A>>, error: impl Fn() -> ExecuteError<A::Refusal>) {
    for waiting in batch {
        _ = waiting.answer.send(Err(error()));
    }
}

impl<R: std::error::Error> From<WorkError<R>> for ExecuteError<R> {
    fn from(error: WorkError<R>) -> Self {
        match error {
            WorkError::Refused(refusal) => Self::Refused(refusal),
            WorkError::Undecodable(error) => Self::Undecodable(error),
            WorkError::Store(StoreError::Unavailable(reason)) => Self::Unavailable(reason),
            other @ (WorkError::Id(_) | WorkError::Unencodable(_) | WorkError::Store(_)) => {
                Self::Invalid(other.to_string())
            }
        }
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct StoredSnapshot {
    version: Version,
    schema: i32,
    /// The ids of the last events, in snapshots of older builds, which recognised repeated commands by event ids. Such
    /// a build cannot parse a snapshot without this field, and folds the stream instead.
    #[serde(default, skip_serializing)]
    ids: Vec<Uuid>,
    /// The id of the event at `version`.
    #[serde(default)]
    last_event: Option<Uuid>,
    #[serde(default)]
    commands: Vec<First>,
    state: Box<serde_json::value::RawValue>,
}

/// An aggregate folded from its stream, together with its recent commands. These commands serve to recognise a repeated
/// command.
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

    /// The state that the stream must have for a commit based on this state to succeed.
    pub fn expected(&self) -> Expected {
        match self.last_event {
            Some(id) => Expected::Event { version: self.version, id },
            None => Expected::Version(self.version),
        }
    }
}
