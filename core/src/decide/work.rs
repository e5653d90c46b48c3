//! The unit of work: decisions on several aggregates and documents that are staged in memory and committed together.

use std::{any::Any, collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    base::json::to_json,
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Put},
    decide::{
        aggregate::Aggregate,
        fold::{FoldError, Folded, Folds},
        remembered::{REMEMBERED_COMMANDS, command_id},
        unsettled::{self, Unsettled},
    },
    event::{
        DecodeError, Event, EventError, Metadata, NewEvent, Position, StreamId, StreamIdError, Version, derived_id,
        encode_all,
    },
    health::notice::Notice,
    store::{EventStore, StoreError},
};

pub(crate) use crate::decide::fold::Stale;

/// A unit of work: all changes that a message, a request, or a batch of messages or requests causes.
///
/// Nothing is written before the framework commits the whole work. The commit checks the version of every stream that
/// was read, and of every document that was first read and then written. If a decision was based on outdated state, it
/// is therefore not stored, but made again. A document that is only read is not checked. If the decision depends on
/// such a document, write the document back unchanged. Code that stages work may therefore run more than once and must
/// have no other effects.
pub struct Work {
    store: Arc<dyn EventStore>,
    /// The history number of the store when the work began. If the number changes, further reads may contradict earlier
    /// reads.
    history: u64,
    cause: Cause,
    streams: HashMap<StreamId, Box<dyn Staged>>,
    touched: Vec<StreamId>,
    documents: HashMap<DocumentKey, StagedDocument>,
    undo: Vec<(DocumentKey, Option<StagedDocument>)>,
    stale: Stale,
    searches: bool,
    rows: usize,
    rows_at_begin: usize,
    notices: Vec<Box<dyn Notice>>,
    notices_at_begin: usize,
}

debug_fields!(Work { cause, rows });

/// The message or command that causes the staged work. The ids of staged events are derived from `id`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cause {
    pub id: Uuid,
    pub metadata: Metadata,
    pub calls: u64,
}

/// Why work could not be staged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError<R: std::error::Error + 'static> {
    /// The aggregate refused the command.
    #[error("refused: {0}")]
    Refused(#[source] R),
    /// The id of the aggregate is not valid as part of a stream id.
    #[error(transparent)]
    Id(#[from] StreamIdError),
    /// The stream holds an event that this build cannot read.
    #[error("{0}")]
    Undecodable(#[from] DecodeError),
    /// The stream does not have the version that the command expects.
    #[error("stream {stream} is at version {found}, not at the expected version {expected}")]
    OtherVersion {
        /// The stream of the aggregate.
        stream: StreamId,
        /// The expected version.
        expected: Version,
        /// The version of the stream.
        found: Version,
    },
    /// A document does not parse as the requested type, or a value has no JSON form.
    #[error("{0}")]
    Unencodable(String),
    /// The store failed to answer.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl<R: std::error::Error> From<EventError> for WorkError<R> {
    fn from(error: EventError) -> Self {
        Self::Unencodable(error.to_string())
    }
}

impl<R: std::error::Error> From<FoldError> for WorkError<R> {
    fn from(error: FoldError) -> Self {
        match error {
            FoldError::Undecodable(error) => Self::Undecodable(error),
            FoldError::Store(error) => Self::Store(error),
        }
    }
}

/// What the sender of a command expects of the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum StreamExpectation {
    /// The command is decided on whatever the stream contains.
    Any,
    /// The stream probably does not exist yet, so it need not be read. A wrong expectation costs another attempt.
    ProbablyNew,
    /// The command is decided only at this version.
    At(Version),
}

impl StreamExpectation {
    fn is_new(self) -> bool {
        matches!(self, Self::ProbablyNew | Self::At(Version::START))
    }
}

/// The result of a staged command.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided<E> {
    /// The events of the command. If the command is repeated, these are the events of its first execution. Empty if the
    /// command had nothing to do.
    pub events: Vec<E>,
    /// Whether the same command had already been executed before.
    pub repeated: bool,
    /// The version of the stream after the command. If the command is repeated, the version after its first execution.
    pub version: Version,
    /// The position of the last event in the commit that stored the events. `None` if the command had nothing to do, or
    /// if the work that staged the command is not committed yet. A read model that has reached this position shows the
    /// effects of the command; see [`Views::wait_for`](crate::Views::wait_for).
    pub position: Option<Position>,
}

impl<E> Decided<E> {
    /// Adds the position of the commit that stored the events, unless the decision already has a position.
    pub(super) fn stored_at(mut self, position: Position) -> Self {
        if !self.events.is_empty() {
            self.position.get_or_insert(position);
        }
        self
    }
}

struct StagedDocument {
    /// The version of the document when it was read; `None` if the document was written without a read.
    read_version: Option<i64>,
    body: Option<Arc<str>>,
    due: Option<DateTime<Utc>>,
    dirty: bool,
}

impl StagedDocument {
    fn copy(&self) -> Self {
        Self { read_version: self.read_version, body: self.body.clone(), due: self.due, dirty: self.dirty }
    }
}

impl Work {
    pub(crate) fn new(store: Arc<dyn EventStore>, stale: Stale) -> Self {
        Self {
            history: store.history(),
            store,
            cause: Cause::default(),
            streams: HashMap::new(),
            touched: Vec::new(),
            documents: HashMap::new(),
            undo: Vec::new(),
            stale,
            searches: false,
            rows: 0,
            rows_at_begin: 0,
            notices: Vec::new(),
            notices_at_begin: 0,
        }
    }

    /// Makes the work recognise every command that was ever executed, not only the recent commands that the folded
    /// aggregate remembers. The work may have to read whole streams for this.
    pub(crate) fn searching(mut self) -> Self {
        self.searches = true;
        self
    }

    /// Starts the part of the work that belongs to one message. [`rollback`](Self::rollback) returns to this point.
    pub(crate) fn begin(&mut self, id: Uuid, metadata: Metadata) {
        self.cause = Cause { id, metadata, calls: 0 };
        for stream in self.touched.drain(..) {
            if let Some(staged) = self.streams.get_mut(&stream) {
                staged.keep();
            }
        }
        self.undo.clear();
        self.rows_at_begin = self.rows;
        self.notices_at_begin = self.notices.len();
    }

    /// Discards everything staged since [`begin`](Self::begin). The commit still checks the streams that were read,
    /// because the reason for the rollback depends on their contents.
    pub(crate) fn rollback(&mut self) {
        for stream in self.touched.drain(..) {
            if let Some(staged) = self.streams.get_mut(&stream) {
                staged.forget();
            }
        }
        for (key, before) in self.undo.drain(..).rev() {
            match before {
                Some(before) => self.documents.insert(key, before),
                None => self.documents.remove(&key),
            };
        }
        self.cause.calls = 0;
        self.rows = self.rows_at_begin;
        self.notices.truncate(self.notices_at_begin);
    }

    /// The current time of the store.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.store.clock().now()
    }

    /// The time after this delay; `None` if that time is beyond the end of the calendar and therefore never comes.
    pub(crate) fn due_in(&self, delay: Duration) -> Option<DateTime<Utc>> {
        self.store.clock().due_in(delay)
    }

    /// Returns whether an earlier attempt to commit this work has failed.
    pub(crate) fn is_repeated(&self) -> bool {
        self.stale != Stale::Nothing
    }

    /// Replaces the cause of the work that is staged from now on, and returns the former cause.
    pub(crate) fn replace_cause(&mut self, cause: Cause) -> Cause {
        std::mem::replace(&mut self.cause, cause)
    }

    /// Queues a notice to send once this work is committed.
    pub(crate) fn notice(&mut self, notice: impl Notice + 'static) {
        self.notices.push(Box::new(notice));
    }

    pub(crate) fn take_notices(&mut self) -> Vec<Box<dyn Notice>> {
        std::mem::take(&mut self.notices)
    }

    /// The number of rows that the commit will write.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The store's history number when the work began.
    pub(crate) fn history(&self) -> u64 {
        self.history
    }

    /// The idempotency key for effects outside the store. The key is the same for each delivery of a message and for
    /// each attempt at a command.
    pub fn cause_id(&self) -> Uuid {
        self.cause.id
    }

    /// The metadata for the events that are being staged. The metadata describes the cause of these events.
    pub fn metadata(&self) -> &Metadata {
        &self.cause.metadata
    }

    /// Decides on a command and stages its events.
    pub(super) async fn stage<A: Aggregate>(
        &mut self,
        folds: &Arc<Folds<A>>,
        stream: &StreamId,
        command: &A::Command,
        expects: StreamExpectation,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let command_id = command_id(self.cause.id, self.cause.calls);
        self.cause.calls += 1;
        self.stage_as(command_id, folds, stream, command, expects).await
    }

    /// Stages a command under the given command id.
    pub(super) async fn stage_as<A: Aggregate>(
        &mut self,
        command_id: Uuid,
        folds: &Arc<Folds<A>>,
        stream: &StreamId,
        command: &A::Command,
        expects: StreamExpectation,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let metadata = self.cause.metadata.clone();
        let store = self.store.clone();
        let searches = self.searches;
        let staged = self.staged(folds, stream, expects.is_new()).await?;
        let first = match staged.current().remembered.version_of(command_id) {
            None if searches && staged.base.version > Version(REMEMBERED_COMMANDS as i64) => {
                folds.first_of(&*store, stream, command_id).await?
            }
            remembered => remembered,
        };
        if let Some(first) = first {
            if first > staged.base.version {
                return Ok(staged.staged_before(command_id)?);
            }
            let (events, version, position) = folds.events_of(&*store, stream, first, command_id).await?;
            return Ok(Decided { events, repeated: true, version, position });
        }
        let found = staged.current().version;
        if let StreamExpectation::At(expected) = expects
            && expected != found
        {
            return Err(WorkError::OtherVersion { stream: stream.clone(), expected, found });
        }
        let events = staged.current().state.decide(command).map_err(WorkError::Refused)?;
        let encoded = encode_all(&events, command_id, 0, &metadata)?;
        staged.add(&events, encoded);
        let version = staged.current().version;
        self.rows += events.len();
        Ok(Decided { events, repeated: false, version, position: None })
    }

    /// Returns the part of the work that belongs to this stream.
    pub(super) async fn staged<A: Aggregate>(
        &mut self,
        folds: &Arc<Folds<A>>,
        stream: &StreamId,
        expect_new: bool,
    ) -> Result<&mut StagedStream<A>, WorkError<A::Refusal>> {
        if !self.streams.contains_key(stream) {
            let stale = self.stale.has(stream);
            // After one conflict, `expect_new` is ignored. When a batch is delivered again after a restart, many of
            // these hints are wrong, and each wrong hint would cost another attempt at the batch.
            let expect_new = expect_new && self.stale == Stale::Nothing;
            let base = folds.folded(&*self.store, stream, stale, expect_new).await?;
            let staged = StagedStream {
                folds: folds.clone(),
                stream: stream.clone(),
                base,
                current: None,
                encoded: Vec::new(),
                kept: 0,
                torn: false,
            };
            self.streams.insert(stream.clone(), Box::new(staged));
        }
        if !self.touched.contains(stream) {
            self.touched.push(stream.clone());
        }
        let any = self.streams.get_mut(stream).map(|staged| staged.as_any());
        any.and_then(|any| any.downcast_mut()).ok_or_else(|| {
            WorkError::Unencodable(format!(
                "stream {stream} is already staged as another type of aggregate in the same transaction"
            ))
        })
    }

    /// Reads a document, including staged changes. Returns `None` if the document does not exist.
    pub async fn document<T: DeserializeOwned>(
        &mut self,
        key: &DocumentKey,
    ) -> Result<Option<T>, WorkError<std::convert::Infallible>> {
        self.prefetch(std::slice::from_ref(key)).await?;
        match self.documents.get(key).and_then(|document| document.body.as_deref()) {
            None => Ok(None),
            Some(body) => serde_json::from_str(body)
                .map(Some)
                .map_err(|error| WorkError::Unencodable(format!("document {key}: {error}"))),
        }
    }

    /// Reads the documents that the work will need, in one round trip.
    pub async fn prefetch(&mut self, keys: &[DocumentKey]) -> Result<(), StoreError> {
        let missing = keys.iter().filter(|key| !self.documents.contains_key(*key)).cloned();
        let (missing, never): (Vec<_>, Vec<_>) = missing.partition(DocumentKey::is_storable);
        // A database may reject even a query for a name that it cannot store.
        for key in never {
            let nothing = StagedDocument { read_version: Some(0), body: None, due: None, dirty: false };
            self.documents.insert(key, nothing);
        }
        if missing.is_empty() {
            return Ok(());
        }
        let found = self.store.documents(&missing).await?;
        for (key, document) in missing.into_iter().zip(found) {
            let Document { version, body, due, .. } = match document {
                Some(document) => document,
                None => {
                    self.documents
                        .insert(key, StagedDocument { read_version: Some(0), body: None, due: None, dirty: false });
                    continue;
                }
            };
            self.documents
                .insert(key, StagedDocument { read_version: Some(version), body: Some(body), due, dirty: false });
        }
        Ok(())
    }

    /// Stages a document. If this work has read the document, the commit fails when another writer has changed the
    /// document since then.
    pub fn put<T: Serialize>(
        &mut self,
        key: &DocumentKey,
        value: &T,
    ) -> Result<(), WorkError<std::convert::Infallible>> {
        let body = to_json(value).map_err(|error| WorkError::Unencodable(format!("document {key}: {error}")))?;
        self.put_json(key, Some(body.into()), None);
        Ok(())
    }

    /// Stages the removal of a document.
    pub fn remove(&mut self, key: &DocumentKey) {
        self.put_json(key, None, None);
    }

    /// Stages a document as JSON text, with the time at which the document is due.
    pub fn put_json(&mut self, key: &DocumentKey, body: Option<Arc<str>>, due: Option<DateTime<Utc>>) {
        let before = self.documents.get(key);
        let read_version = before.and_then(|document| document.read_version);
        self.rows += usize::from(!before.is_some_and(|document| document.dirty));
        self.undo.push((key.clone(), before.map(StagedDocument::copy)));
        self.documents.insert(key.clone(), StagedDocument { read_version, body, due, dirty: true });
    }

    /// Stages a document that must have this version at the time of the commit.
    pub(crate) fn put_expecting(
        &mut self,
        key: &DocumentKey,
        version: i64,
        body: Option<Arc<str>>,
        due: Option<DateTime<Utc>>,
    ) {
        self.put_json(key, body, due);
        if let Some(document) = self.documents.get_mut(key) {
            document.read_version = Some(version);
        }
    }

    /// Commits the staged work and puts the folded states into the caches of their repositories.
    pub(crate) async fn commit(self) -> Result<Committed, CommitError> {
        let store = self.store.clone();
        let failed = match self.attempt().await {
            Ok(committed) => return Ok(committed),
            Err(failed) => failed,
        };
        // If the answer to a commit was lost, the commit counts as successful when its events are stored at the
        // versions for which they were staged.
        let found = match &failed.unsettled {
            Some(unsettled) => unsettled.find(&*store).await.ok().flatten(),
            None => None,
        };
        found.ok_or(failed.error)
    }

    /// Like [`commit`](Self::commit), but leaves it to the caller to resolve an unknown outcome.
    pub(crate) async fn attempt(mut self) -> Result<Committed, FailedCommit> {
        let mut commit = Commit::default();
        for staged in self.streams.values_mut() {
            let (append, snapshot) = staged.append();
            commit.appends.push(append);
            commit.puts.extend(snapshot);
        }
        for (key, document) in self.documents {
            if document.dirty {
                commit.puts.push(Put { key, expected: document.read_version, body: document.body, due: document.due });
            }
        }
        if commit.is_empty() {
            return Ok(Committed::default());
        }
        if self.store.history() != self.history {
            let error = CommitError::Unavailable(
                "the log changed (failover or restore) during the transaction: decide again".into(),
            );
            return Err(FailedCommit { error, unsettled: None });
        }
        let committed = match self.store.commit(commit).await {
            Ok(committed) => committed,
            Err(error @ CommitError::Unknown(_)) => {
                let streams: Vec<_> = self.streams.values().map(|staged| staged.place()).collect();
                let has_events = streams.iter().any(|staged| staged.last > staged.base);
                return Err(FailedCommit { error, unsettled: has_events.then(|| Box::new(Unsettled { streams })) });
            }
            Err(error) => return Err(FailedCommit { error, unsettled: None }),
        };
        for staged in self.streams.into_values() {
            staged.committed(self.history);
        }
        Ok(committed)
    }
}

/// A commit that failed or whose outcome is unknown.
pub(crate) struct FailedCommit {
    pub error: CommitError,
    /// The data with which to resolve an unknown outcome later. `None` if the outcome is known, or if the commit has no
    /// events, because a document does not show which commit wrote it.
    pub unsettled: Option<Box<Unsettled>>,
}

/// The part of the work that belongs to one stream, independent of the type of its aggregate.
trait Staged: Send + Sync {
    fn as_any(&mut self) -> &mut dyn Any;
    fn keep(&mut self);
    fn forget(&mut self);
    /// The versions and commands of the staged events, which are needed if the outcome of the commit is unknown.
    fn place(&self) -> unsettled::UnsettledStream;
    fn append(&mut self) -> (Append, Option<Put>);
    fn committed(self: Box<Self>, history: u64);
}

pub(crate) struct StagedStream<A: Aggregate> {
    folds: Arc<Folds<A>>,
    stream: StreamId,
    base: Arc<Folded<A>>,
    current: Option<Folded<A>>,
    encoded: Vec<NewEvent>,
    kept: usize,
    /// Whether a command is only half applied, because `evolve` panicked on one of its events.
    torn: bool,
}

impl<A: Aggregate> StagedStream<A> {
    pub fn current(&self) -> &Folded<A> {
        self.current.as_ref().unwrap_or(&self.base)
    }

    fn add(&mut self, events: &[A::Event], mut encoded: Vec<NewEvent>) {
        if events.is_empty() {
            return;
        }
        self.torn = true;
        let current = self.current.get_or_insert_with(|| (*self.base).clone());
        if let Some(first) = encoded.first() {
            current.remembered.begin(first.id, current.version.next());
        }
        for (event, encoded) in events.iter().zip(&encoded) {
            current.apply(Some(event), encoded.id);
        }
        match self.encoded.is_empty() {
            true => self.encoded = encoded,
            false => self.encoded.append(&mut encoded),
        }
        self.torn = false;
    }

    /// Returns the decision on a command that was staged earlier in this work and is therefore not stored yet.
    fn staged_before(&self, command_id: Uuid) -> Result<Decided<A::Event>, EventError> {
        let start = derived_id(command_id, 0);
        let from = self.encoded.iter().position(|event| event.id == start).unwrap_or(self.encoded.len());
        let is_of_command = |(event, index): &(&NewEvent, u64)| event.id == derived_id(command_id, *index);
        let of_command: Vec<_> = self.encoded[from..].iter().zip(0..).take_while(is_of_command).collect();
        let version = Version(self.base.version.0 + (from + of_command.len()) as i64);
        let events = of_command.into_iter().filter_map(|(event, _)| decode::<A>(event).transpose());
        Ok(Decided { events: events.collect::<Result<_, _>>()?, repeated: true, version, position: None })
    }
}

fn decode<A: Aggregate>(event: &NewEvent) -> Result<Option<A::Event>, EventError> {
    A::Event::decode(&event.type_name, event.schema_version, &event.data)
}

impl<A: Aggregate> Staged for StagedStream<A> {
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }

    fn keep(&mut self) {
        self.kept = self.encoded.len();
    }

    fn forget(&mut self) {
        if self.encoded.len() == self.kept && !self.torn {
            return;
        }
        self.torn = false;
        self.encoded.truncate(self.kept);
        let mut folded = (*self.base).clone();
        for event in &self.encoded {
            folded.remembered.read(event.id, folded.version.next(), event.metadata.causation_id);
            // The event was encoded a moment ago, so an error here means that the enum cannot decode its own encoding.
            // The first reader of the stream reports that error together with the position of the event.
            folded.apply(decode::<A>(event).ok().flatten().as_ref(), event.id);
        }
        folded.remembered.end_of_run();
        self.current = (!self.encoded.is_empty()).then_some(folded);
    }

    fn place(&self) -> unsettled::UnsettledStream {
        let Folded { version: last, remembered, .. } = self.current();
        let commands = remembered.since(self.base.version).collect();
        unsettled::UnsettledStream { stream: self.stream.clone(), base: self.base.version, last: *last, commands }
    }

    fn append(&mut self) -> (Append, Option<Put>) {
        let snapshot = self.current.as_mut().and_then(|folded| self.folds.snapshot(&self.stream, folded));
        let expected = self.base.expected();
        (Append { stream: self.stream.clone(), expected, events: std::mem::take(&mut self.encoded) }, snapshot)
    }

    fn committed(self: Box<Self>, history: u64) {
        let folded = self.current.map_or(self.base, Arc::new);
        self.folds.remember(self.stream, folded, history);
    }
}
