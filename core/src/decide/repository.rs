//! Repositories, which load aggregates by id, cache the folded states, and execute commands from one queue per
//! aggregate.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::oneshot;
use uuid::Uuid;

pub use crate::decide::remembered::REMEMBERED_COMMANDS;
use crate::{
    base::{backoff::Backoff, panic::caught},
    commit::CommitError,
    decide::{
        aggregate::Aggregate,
        categories,
        command_queue::CommandQueue,
        fold::Folds,
        unsettled::Unsettled,
        work::{Decided, Stale, StreamExpectation, Work, WorkError},
    },
    event::{DecodeError, Metadata, Position, StreamId, StreamIdError, Version},
    store::{EventStore, StoreError},
};

/// How many folded aggregates a repository keeps by default.
pub const CACHED_AGGREGATES: usize = 50_000;
/// The maximum number of attempts to decide and commit a command. Another attempt is needed if another writer commits
/// first or if an outcome is unknown.
pub const DECISIONS_MAX: u32 = 32;
/// How many commands may wait for one aggregate. Further commands fail with [`ExecuteError::Overloaded`].
pub const WAITING_COMMANDS_MAX: usize = 10_000;
/// The maximum number of waiting commands of one aggregate that share a commit.
const COMMANDS_PER_COMMIT: usize = 512;

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
    folds: Arc<Folds<A>>,
    queues: Arc<Mutex<HashMap<StreamId, CommandQueue<Waiting<A>>>>>,
}

debug_fields!([A: Aggregate] Repository<A> {});

impl<A: Aggregate> Clone for Repository<A> {
    fn clone(&self) -> Self {
        Self { folds: self.folds.clone(), queues: self.queues.clone() }
    }
}

/// The id of a command, and the metadata that describes its cause.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The id of the command. A command is executed only once, however often it is sent with the same id.
    pub command_id: Uuid,
    /// What caused the command.
    pub metadata: Metadata,
    /// The version that the stream must have when the command is decided; `None` accepts any version. A repeated command
    /// returns the outcome of its first execution, whatever the version is by then.
    pub expected_version: Option<Version>,
}

impl Request {
    /// Creates a request that accepts any version of the stream.
    pub fn new(command_id: Uuid, metadata: Metadata) -> Self {
        Self { command_id, metadata, expected_version: None }
    }

    /// Requires this version of the stream: a client that has read the aggregate at this version changes nothing that
    /// the client has not seen. With version 0, the aggregate must not exist yet.
    #[must_use]
    pub fn at(self, version: Version) -> Self {
        Self { expected_version: Some(version), ..self }
    }
}

impl From<Uuid> for Request {
    fn from(command_id: Uuid) -> Self {
        Self::new(command_id, Metadata::of_request(command_id))
    }
}

/// Why a command was not executed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError<R: std::error::Error> {
    /// The aggregate refused the command.
    #[error("refused: {0}")]
    Refused(R),
    /// The stream does not have the version that the request expects; see [`Request::at`]. Nothing was done: read the
    /// aggregate again, and decide whether the command still makes sense.
    #[error("stream {stream} is at version {found}, not at the expected version {expected}")]
    OtherVersion {
        /// The stream of the aggregate.
        stream: StreamId,
        /// The expected version.
        expected: Version,
        /// The version of the stream.
        found: Version,
    },
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

type CommandResult<A> = Result<Decided<<A as Aggregate>::Event>, ExecuteError<<A as Aggregate>::Refusal>>;

struct Waiting<A: Aggregate> {
    command: A::Command,
    request: Request,
    expect_new: bool,
    answer: oneshot::Sender<CommandResult<A>>,
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
        Self { folds: Arc::new(Folds::new(store, category, cached)), queues: Arc::default() }
    }

    /// Returns the stream of the aggregate with this id.
    pub fn stream(&self, id: &str) -> Result<StreamId, StreamIdError> {
        self.folds.stream(id)
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

    async fn ask(&self, id: &str, command: A::Command, request: Request, expect_new: bool) -> CommandResult<A> {
        let stream = self.stream(id).map_err(|error| ExecuteError::Invalid(error.to_string()))?;
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { command, request, expect_new, answer };
        let (driver, began) = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            match queues.get_mut(&stream) {
                Some(queue) if queue.waiting.len() >= WAITING_COMMANDS_MAX => {
                    return Err(ExecuteError::Overloaded { stream });
                }
                Some(queue) => (queue.join(waiting), false),
                None => {
                    let worker = QueueWorker { repository: self.clone(), stream: stream.clone(), whole: false };
                    let (queue, driver) = CommandQueue::begin(waiting, worker.run());
                    queues.insert(stream, queue);
                    (driver, true)
                }
            }
        };
        let answer = if began {
            driver.until(answered).await
        } else {
            driver.leave();
            answered.await
        };
        answer.unwrap_or_else(|_| {
            Err(ExecuteError::Unavailable("the runtime shut down before the command finished".into()))
        })
    }

    /// Returns the current stored state of an aggregate.
    pub async fn state(&self, id: &str) -> Result<A, WorkError<A::Refusal>> {
        Ok(self.state_and_version(id).await?.0)
    }

    /// Returns the current stored state of an aggregate, with its version. Version 0 means that the aggregate does not
    /// exist.
    pub async fn state_and_version(&self, id: &str) -> Result<(A, Version), WorkError<A::Refusal>> {
        let stream = self.stream(id)?;
        let folded = self.folds.folded(&*self.folds.store, &stream, true, false).await?;
        Ok((folded.state.clone(), folded.version))
    }

    /// Updates the cached state of an aggregate, unless this event is the last event of the cached state.
    pub(crate) async fn update(&self, id: &str, last_event: Uuid) -> Result<(), WorkError<A::Refusal>> {
        let stream = self.stream(id)?;
        let cached = self.folds.folded(&*self.folds.store, &stream, false, false).await?;
        if cached.last_event != Some(last_event) {
            self.folds.folded(&*self.folds.store, &stream, true, false).await?;
        }
        Ok(())
    }

    /// Loads an aggregate into the cache.
    pub(crate) async fn load(&self, stream: &StreamId) -> Result<(), WorkError<A::Refusal>> {
        self.folds.folded(&*self.folds.store, stream, false, false).await?;
        Ok(())
    }

    async fn carry_out(&self, stream: &StreamId, mut batch: Vec<Waiting<A>>) {
        let mut stale = Stale::Nothing;
        let mut backoff = Backoff::short();
        let mut unknown = None;
        // The last attempt whose outcome is unknown, with its decisions. Only the last attempt must be checked: its
        // events would have the same versions as the events of the previous attempt, so at most one of the attempts can
        // be stored.
        let mut unsettled: Option<(Box<Unsettled>, Vec<CommandResult<A>>)> = None;
        for _ in 0..DECISIONS_MAX {
            if let Some((attempt, _)) = &unsettled
                && let Ok(Some(committed)) = attempt.find(&*self.folds.store).await
            {
                let results = unsettled.map(|(_, results)| results).unwrap_or_default();
                return give_out(batch, results.into_iter().map(|result| result.map(found)), committed.position);
            }
            let history = self.folds.store.history();
            let mut work = Work::new(self.folds.store.clone(), stale.clone());
            let results = self.stage_all(&mut work, stream, &batch).await;
            // Every commit checks at least the stream's version, even if all commands were refused. A refusal that was
            // based on outdated state is therefore never returned.
            let failed = match work.attempt().await {
                Ok(committed) => return give_out(batch, results, committed.position),
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
                    // Either one command is invalid, or the batch is too large. After the batch is split, each command
                    // gets its own answer.
                    let rest = batch.split_off(batch.len() / 2);
                    Box::pin(self.carry_out(stream, batch)).await;
                    return Box::pin(self.carry_out(stream, rest)).await;
                }
                CommitError::Invalid(reason) => {
                    return answer_all(batch, || ExecuteError::Invalid(reason.clone()));
                }
                // The log may have lost events on which the decision was based, so nothing was stored. The loop decides
                // again.
                CommitError::Unavailable(_) if self.folds.store.history() != history => {}
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

    async fn stage_all(&self, work: &mut Work, stream: &StreamId, batch: &[Waiting<A>]) -> Vec<CommandResult<A>> {
        let mut results = Vec::with_capacity(batch.len());
        for waiting in batch {
            work.begin(waiting.request.command_id, waiting.request.metadata.clone());
            let expects = match waiting.request.expected_version {
                Some(version) => StreamExpectation::At(version),
                None if waiting.expect_new => StreamExpectation::ProbablyNew,
                None => StreamExpectation::Any,
            };
            let decided = caught(work.stage(&self.folds, stream, &waiting.command, expects)).await;
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
}

/// The methods of a unit of work that decide on aggregates.
impl Work {
    /// Returns the current state of the aggregate, including everything staged in this work.
    pub async fn load<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<A, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(&repository.folds, &stream, false).await?.current().state.clone())
    }

    /// Like [`load`](Self::load), for a stream that is expected not to exist yet; see [`create`](Self::create).
    pub async fn load_new<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<A, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(&repository.folds, &stream, true).await?.current().state.clone())
    }

    /// Decides on a command and stages its events. If the stream already contains the events of this command, returns
    /// those events.
    pub async fn execute<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
        command: &A::Command,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        self.stage(&repository.folds, &stream, command, StreamExpectation::Any).await
    }

    /// Like [`execute`](Self::execute), for a stream that is expected not to exist yet; this call saves a read. If the
    /// stream exists after all, the work still succeeds but takes longer: the commit fails its version check, and the
    /// work is staged again after a read.
    pub async fn create<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
        command: &A::Command,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        self.stage(&repository.folds, &stream, command, StreamExpectation::ProbablyNew).await
    }

    /// Like [`execute`](Self::execute), under the given command id.
    pub(crate) async fn execute_as<A: Aggregate>(
        &mut self,
        command_id: Uuid,
        repository: &Repository<A>,
        stream: &StreamId,
        command: &A::Command,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        self.stage_as(command_id, &repository.folds, stream, command, StreamExpectation::Any).await
    }

    /// Returns whether the stream contains the events of this command. The answer covers only the recent commands that
    /// the folded aggregate remembers.
    pub(crate) async fn has_executed<A: Aggregate>(
        &mut self,
        command_id: Uuid,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<bool, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(&repository.folds, &stream, false).await?.current().remembered.version_of(command_id).is_some())
    }
}

/// The task that serves the queue of one aggregate. If the task is dropped early, the queue is dropped too. Waiting
/// callers then get an error, and the next command starts a new queue.
struct QueueWorker<A: Aggregate> {
    repository: Repository<A>,
    stream: StreamId,
    whole: bool,
}

impl<A: Aggregate> QueueWorker<A> {
    async fn run(mut self) {
        while let Some(batch) = self.next() {
            self.repository.carry_out(&self.stream, batch).await;
        }
    }

    fn next(&mut self) -> Option<Vec<Waiting<A>>> {
        let mut queues = self.repository.queues.lock().unwrap_or_else(PoisonError::into_inner);
        match queues.get_mut(&self.stream).map(|queue| &mut queue.waiting).filter(|waiting| !waiting.is_empty()) {
            Some(waiting) => {
                let rest = waiting.split_off(waiting.len().min(COMMANDS_PER_COMMIT));
                Some(std::mem::replace(waiting, rest).into())
            }
            None => {
                queues.remove(&self.stream);
                self.whole = true;
                None
            }
        }
    }
}

impl<A: Aggregate> Drop for QueueWorker<A> {
    fn drop(&mut self) {
        if !self.whole {
            self.repository.queues.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.stream);
        }
    }
}

/// Marks a decision as repeated, because the attempt that made this decision turned out to be committed.
fn found<E>(decided: Decided<E>) -> Decided<E> {
    Decided { repeated: decided.repeated || !decided.events.is_empty(), ..decided }
}

fn give_out<A: Aggregate>(
    batch: Vec<Waiting<A>>,
    results: impl IntoIterator<Item = CommandResult<A>>,
    position: Position,
) {
    for (waiting, result) in batch.into_iter().zip(results) {
        _ = waiting.answer.send(result.map(|decided| decided.stored_at(position)));
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
            WorkError::OtherVersion { stream, expected, found } => Self::OtherVersion { stream, expected, found },
            other @ (WorkError::Id(_) | WorkError::Unencodable(_) | WorkError::Store(_)) => {
                Self::Invalid(other.to_string())
            }
        }
    }
}
