//! The unit of work: decisions on several aggregates and documents, staged in memory and committed as one value.

use std::{any::Any, collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    aggregate::Aggregate,
    commit::{Append, Commit, CommitError, Committed, Document, DocumentKey, Put},
    event::{
        DecodeError, Event, EventError, Metadata, NewEvent, StreamId, StreamIdError, Version, derived_id, encode_all,
    },
    json::to_json,
    notice::Notice,
    repository::{Folded, Repository},
    store::{EventStore, StoreError},
    unsettled::{self, Unsettled},
};

pub(crate) use crate::stale::Stale;

/// What one message or request, or a batch of them, wants to become durable.
///
/// Nothing is written before the framework commits the whole; every stream that was looked at, and every document that is
/// written after it was read, is checked then, so a decision on state that has moved on is taken again rather than stored. A
/// document that is only read is not checked: write it again where the decision rests on it. Code that stages work may therefore
/// run more than once and must have no other effects.
pub struct Work {
    store: Arc<dyn EventStore>,
    /// The number of the store's history when it began: what is read under another one may contradict what was read before.
    history: u64,
    cause: Cause,
    streams: HashMap<StreamId, Box<dyn Staged>>,
    touched: Vec<StreamId>,
    documents: HashMap<DocumentKey, StagedDocument>,
    undo: Vec<(DocumentKey, Option<StagedDocument>)>,
    stale: Stale,
    rows: usize,
    rows_at_begin: usize,
    notices: Vec<Notice>,
    notices_at_begin: usize,
}

/// Who asks: ids of what is staged derive from `id`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cause {
    pub id: Uuid,
    pub metadata: Metadata,
    pub calls: u64,
}

/// Why work could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum WorkError<R: std::error::Error + 'static> {
    /// The aggregate said no.
    #[error("refused: {0}")]
    Refused(#[source] R),
    /// The id cannot be one.
    #[error(transparent)]
    Id(#[from] StreamIdError),
    /// The stream holds an event that this build cannot read.
    #[error("{0}")]
    Undecodable(#[from] DecodeError),
    /// A document does not read as what was asked for, or a value has no JSON form.
    #[error("{0}")]
    Unencodable(String),
    /// The store did not answer; try again.
    #[error("{0}")]
    Store(#[from] StoreError),
}

impl<R: std::error::Error> From<EventError> for WorkError<R> {
    fn from(error: EventError) -> Self {
        Self::Unencodable(error.to_string())
    }
}

/// What a staged command came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Decided<E> {
    /// The events it gave, now or when it was first carried out. None: there was nothing to do.
    pub events: Vec<E>,
    /// Whether an earlier delivery of the same command had already been carried out.
    pub repeated: bool,
}

struct StagedDocument {
    /// The version it had when it was read; `None` if it was written unread.
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
            rows: 0,
            rows_at_begin: 0,
            notices: Vec::new(),
            notices_at_begin: 0,
        }
    }

    /// Starts the part of one message: [`rollback`](Self::rollback) comes back to here.
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

    /// Forgets what was staged since [`begin`](Self::begin); what was looked at is still checked by the commit, because
    /// the reason to roll back was found there.
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

    /// The time of the store.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.store.clock().now()
    }

    /// When something is due after this delay; `None` if that is beyond the calendar, and so never.
    pub(crate) fn due_in(&self, delay: Duration) -> Option<DateTime<Utc>> {
        self.store.clock().due_in(delay)
    }

    /// What is to be told once this is committed.
    pub(crate) fn notice(&mut self, notice: Notice) {
        self.notices.push(notice);
    }

    pub(crate) fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// How many rows the commit will write.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The number of the store's history when it began.
    pub(crate) fn history(&self) -> u64 {
        self.history
    }

    /// The id that effects outside the store should carry as their idempotency key: the same on each delivery of the
    /// message and on each attempt at the command.
    pub fn cause_id(&self) -> Uuid {
        self.cause.id
    }

    /// Who caused what is staged now.
    pub fn metadata(&self) -> &Metadata {
        &self.cause.metadata
    }

    /// The aggregate as it stands, with all that is staged.
    pub async fn load<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<A, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(repository, &stream, false).await?.current().state.clone())
    }

    /// Like [`load`](Self::load) on a stream that is expected not to exist yet; see [`create`](Self::create).
    pub async fn load_new<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<A, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(repository, &stream, true).await?.current().state.clone())
    }

    /// Decides on a command and stages its events. A command whose events the stream already has gives them again.
    pub async fn execute<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
        command: &A::Command,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        self.stage(repository, &stream, command, false).await
    }

    /// Like [`execute`](Self::execute) on a stream that is expected not to exist yet, which saves reading it. If it does
    /// exist, nothing is lost but time: the commit fails its check and the work is done again with reading.
    pub async fn create<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        id: &str,
        command: &A::Command,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        self.stage(repository, &stream, command, true).await
    }

    pub(crate) async fn stage<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        stream: &StreamId,
        command: &A::Command,
        expect_new: bool,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        // Two commands of one message to one stream must not meet as twins, so each has an id of its own.
        let command_id = match self.cause.calls {
            0 => self.cause.id,
            calls => derived_id(self.cause.id, u64::MAX - calls),
        };
        self.cause.calls += 1;
        self.stage_as(command_id, repository, stream, command, expect_new).await
    }

    /// Stages a command under an id of its own.
    pub(crate) async fn stage_as<A: Aggregate>(
        &mut self,
        command_id: Uuid,
        repository: &Repository<A>,
        stream: &StreamId,
        command: &A::Command,
        expect_new: bool,
    ) -> Result<Decided<A::Event>, WorkError<A::Refusal>> {
        let metadata = self.cause.metadata.clone();
        let store = self.store.clone();
        let staged = self.staged(repository, stream, expect_new).await?;
        if let Some(first) = staged.current().remembered.version_of(command_id) {
            let events = repository.events_of(&*store, stream, first, command_id, staged).await?;
            return Ok(Decided { events, repeated: true });
        }
        let events = staged.current().state.decide(command).map_err(WorkError::Refused)?;
        let encoded = encode_all(&events, command_id, 0, &metadata)?;
        staged.add(&events, encoded);
        self.rows += events.len();
        Ok(Decided { events, repeated: false })
    }

    /// Whether the stream has what this command gave, as far as this work knows it.
    pub(crate) async fn has_executed<A: Aggregate>(
        &mut self,
        command_id: Uuid,
        repository: &Repository<A>,
        id: &str,
    ) -> Result<bool, WorkError<A::Refusal>> {
        let stream = repository.stream(id)?;
        Ok(self.staged(repository, &stream, false).await?.current().remembered.version_of(command_id).is_some())
    }

    async fn staged<A: Aggregate>(
        &mut self,
        repository: &Repository<A>,
        stream: &StreamId,
        expect_new: bool,
    ) -> Result<&mut StagedStream<A>, WorkError<A::Refusal>> {
        if !self.streams.contains_key(stream) {
            let stale = self.stale.has(stream);
            // After one conflict no hint is believed: a batch that comes again after a restart has many that are wrong, and
            // finding them out one by one would stage it once for each.
            let expect_new = expect_new && self.stale == Stale::Nothing;
            let base = repository.folded(&*self.store, stream, stale, expect_new).await?;
            let staged = StagedStream {
                repository: repository.clone(),
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
            WorkError::Unencodable(format!("stream {stream} is staged as another kind of aggregate in the same work"))
        })
    }

    /// Reads a document, as staged. `None` if there is none.
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

    /// Reads documents that the work will want, in one round trip.
    pub async fn prefetch(&mut self, keys: &[DocumentKey]) -> Result<(), StoreError> {
        let missing = keys.iter().filter(|key| !self.documents.contains_key(*key)).cloned();
        let (missing, never): (Vec<_>, Vec<_>) = missing.partition(DocumentKey::is_storable);
        // A database may take the question itself for an error.
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

    /// Stages a document. One that was read before is only written over what was read.
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

    /// Stages a document as JSON text, with the time at which it wants attention.
    pub fn put_json(&mut self, key: &DocumentKey, body: Option<Arc<str>>, due: Option<DateTime<Utc>>) {
        let before = self.documents.get(key);
        let read_version = before.and_then(|document| document.read_version);
        self.rows += usize::from(!before.is_some_and(|document| document.dirty));
        self.undo.push((key.clone(), before.map(StagedDocument::copy)));
        self.documents.insert(key.clone(), StagedDocument { read_version, body, due, dirty: true });
    }

    /// Stages a document that must stand at this version now.
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

    /// Commits what is staged, and gives the folded states to the caches of their repositories.
    pub(crate) async fn commit(self) -> Result<Committed, CommitError> {
        let store = self.store.clone();
        let failed = match self.attempt().await {
            Ok(committed) => return Ok(committed),
            Err(failed) => failed,
        };
        // A commit whose answer was lost counts as answered, if its events stand where they were staged.
        let found = match &failed.unsettled {
            Some(unsettled) => unsettled.find(&*store).await.ok().flatten(),
            None => None,
        };
        found.ok_or(failed.error)
    }

    /// As [`commit`](Self::commit), for a caller that looks for a commit of unknown outcome itself.
    pub(crate) async fn attempt(mut self) -> Result<Committed, Failed> {
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
            let error =
                CommitError::Unavailable("the log changed (failover or restore) meanwhile: decide again".into());
            return Err(Failed { error, unsettled: None });
        }
        let committed = match self.store.commit(commit).await {
            Ok(committed) => committed,
            Err(error @ CommitError::Unknown(_)) => {
                let streams: Vec<_> = self.streams.values().map(|staged| staged.place()).collect();
                let has_events = streams.iter().any(|staged| staged.last > staged.base);
                return Err(Failed { error, unsettled: has_events.then(|| Box::new(Unsettled { streams })) });
            }
            Err(error) => return Err(Failed { error, unsettled: None }),
        };
        for staged in self.streams.into_values() {
            staged.committed(self.history);
        }
        Ok(committed)
    }
}

/// A commit that does not hold, as far as is known.
pub(crate) struct Failed {
    pub error: CommitError,
    /// How to find out later, where the outcome is unknown. `None` if the commit has no events: documents do not tell which
    /// commit wrote them.
    pub unsettled: Option<Box<Unsettled>>,
}

/// One stream's part of the work, whatever its aggregate.
trait Staged: Send + Sync {
    fn as_any(&mut self) -> &mut dyn Any;
    fn keep(&mut self);
    fn forget(&mut self);
    /// Where its events are, once they are handed to the store.
    fn place(&self) -> unsettled::Staged;
    fn append(&mut self) -> (Append, Option<Put>);
    fn committed(self: Box<Self>, history: u64);
}

pub(crate) struct StagedStream<A: Aggregate> {
    repository: Repository<A>,
    stream: StreamId,
    base: Arc<Folded<A>>,
    current: Option<Folded<A>>,
    encoded: Vec<NewEvent>,
    kept: usize,
    /// Whether a command is half folded in: `evolve` panicked on one of its events.
    torn: bool,
}

impl<A: Aggregate> StagedStream<A> {
    fn current(&self) -> &Folded<A> {
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

    /// Events of a command that was staged in this very work, and so is in no store yet.
    pub(crate) fn staged_events(&self, command_id: Uuid) -> Result<Vec<A::Event>, EventError> {
        let start = derived_id(command_id, 0);
        let from = self.encoded.iter().position(|event| event.id == start).unwrap_or(self.encoded.len());
        let of_command =
            self.encoded[from..].iter().zip(0..).take_while(|(event, i)| event.id == derived_id(command_id, *i));
        of_command.filter_map(|(event, _)| decode::<A>(event).transpose()).collect()
    }

    pub(crate) fn base_version(&self) -> Version {
        self.base.version
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
            // It was encoded from a value a moment ago; an enum that cannot read its own writing is caught by the first
            // reader of the stream, with the place.
            folded.apply(decode::<A>(event).ok().flatten().as_ref(), event.id);
        }
        folded.remembered.end_of_run();
        self.current = (!self.encoded.is_empty()).then_some(folded);
    }

    fn place(&self) -> unsettled::Staged {
        let Folded { version: last, remembered, .. } = self.current();
        let commands = remembered.since(self.base.version).collect();
        unsettled::Staged { stream: self.stream.clone(), base: self.base.version, last: *last, commands }
    }

    fn append(&mut self) -> (Append, Option<Put>) {
        let snapshot = self.current.as_mut().and_then(|folded| self.repository.snapshot(&self.stream, folded));
        let expected = self.base.expected();
        (Append { stream: self.stream.clone(), expected, events: std::mem::take(&mut self.encoded) }, snapshot)
    }

    fn committed(self: Box<Self>, history: u64) {
        let folded = self.current.map_or(self.base, Arc::new);
        self.repository.remember(self.stream, folded, history);
    }
}
