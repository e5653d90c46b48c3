//! The actions of operators. Every action is one commit, which also contains an event that records who acted, when and
//! why.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use futures::TryStreamExt;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    Event,
    base::name::RELAY,
    commit::{Append, COMMIT_ROWS_MAX, Commit, CommitError, Document, DocumentKey, Expected, Put},
    event::{EVENT_BYTES_MAX, Metadata, NewEvent, Party, Position, StreamId, Version, derived_id},
    follow::{
        checkpoint::{CHECKPOINTS, Checkpoint},
        parking::{DeadLetters, Parked},
    },
    project::{
        generation,
        read_model::{Rebuild, Rebuilt, SwapError},
    },
    saga::{OperatorAction, SagaEvent, SagaRequest, Status},
    store::{EventStore, StoreError, pages},
};

pub use crate::decide::categories::OPERATOR as CATEGORY;

/// How many times an action is retried if a worker changes the same documents at the same time.
const RACES_MAX: u32 = 10;
/// The maximum number of parked messages that a reset removes. The remaining rows of the commit are reserved for the
/// checkpoints of the lanes and for the event that records the action.
const RESET_PARKED_MAX: usize = COMMIT_ROWS_MAX - 1_000;
/// The maximum size of a parked document that an event records unchanged, in bytes. The rest of the event is reserved
/// for the names and for the reason.
pub const DROPPED_BYTES_MAX: usize = EVENT_BYTES_MAX / 2;

/// An action of an operator, recorded in the stream `operator-<subscription>`. Actions on a saga are recorded in the
/// stream of the saga.
#[derive(Event, Clone, Debug)]
#[event(prefix = "operator")]
pub enum OperatorEvent {
    /// The operator redrove parked messages.
    Redriven {
        /// The subscription of the messages.
        subscription: String,
        /// The key of the messages, or the id of one of them.
        key: String,
        /// How many messages wait for the redrive.
        waiting: usize,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator dropped a parked message permanently.
    Dropped {
        /// The subscription of the message.
        subscription: String,
        /// The key of the message, or its id.
        key: String,
        /// The parked document, unchanged. If the document has more than [`DROPPED_BYTES_MAX`] bytes, its message is
        /// replaced by the size of the document in bytes.
        parked: Box<RawValue>,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator reset a subscription to another position.
    Reset {
        /// The name of the subscription.
        subscription: String,
        /// The position after which the subscription continues.
        to: Position,
        /// The positions of the subscription's lanes before the reset.
        from: BTreeMap<String, i64>,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator paused a subscription. No worker follows the subscription until an operator resumes it.
    Paused {
        /// The name of the subscription.
        subscription: String,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator resumed a subscription. The subscription continues at the position where it was paused.
    Resumed {
        /// The name of the subscription.
        subscription: String,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator brought the log of a restored database up to date with the bus; see
    /// [`Recovery`](crate::recovery::Recovery).
    Recovered {
        /// The services whose topics were read.
        services: Vec<String>,
        /// The log name that messages carry from this event on.
        log: String,
        /// The end of the log before the recovery.
        restored_to: Position,
        /// How many events were recovered from topics.
        taken_back: u64,
        /// Whether the service starts without the history that its topics hold.
        anew: bool,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
    /// The operator swapped in rebuilt views of a read model.
    Swapped {
        /// The name of the read model.
        read_model: String,
        /// The name of the operator.
        by: String,
        /// The operator's reason.
        reason: String,
    },
}

impl OperatorEvent {
    /// Returns the event in the form that a store appends, with an id derived from `id`.
    pub fn recorded(&self, id: Uuid) -> Result<NewEvent, OperatorError> {
        new_event(self, id, Metadata::of_request(id))
    }
}

/// Why an action failed. Nothing was changed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// The action is not possible. The string gives the reason.
    #[error("{0}")]
    Illegal(String),
    /// The name belongs to a group that consumes topics of the bus. Such a group has no position in the log that could
    /// be reset. To pause the group, pause the relay that sends the messages.
    #[error("{group} consumes {} and does not follow the log", topics.join(", "))]
    OfBus {
        /// The name of the group.
        group: String,
        /// The topics in which the group has offsets.
        topics: Vec<String>,
    },
    /// The rebuilt views were not swapped in.
    #[error(transparent)]
    NotSwapped(#[from] SwapError),
    /// The store refused the commit, or its outcome is unknown.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The store could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The operator's access to a store. Every action is recorded under the name of the operator.
#[derive(Clone)]
pub struct Operator {
    store: Arc<dyn EventStore>,
    by: String,
}

debug_fields!(Operator { by });

/// Returns the parked document in a form that an operator event can record. A dead letter can be too large for an
/// event, but an operator must be able to drop such a dead letter too.
fn recordable(body: &str) -> Box<RawValue> {
    let size = || RawValue::from_string(format!(r#"{{"bytes":{}}}"#, body.len())).unwrap_or_default();
    if body.len() <= DROPPED_BYTES_MAX {
        return RawValue::from_string(body.to_owned()).unwrap_or_else(|_| size());
    }
    let Ok(parked) = serde_json::from_str::<Parked>(body) else { return size() };
    serde_json::value::to_raw_value(&Parked { message: size(), ..parked }).unwrap_or_else(|_| size())
}

impl Operator {
    /// Creates an operator with this name.
    pub fn new(store: Arc<dyn EventStore>, by: &str) -> Self {
        Self { store, by: by.to_owned() }
    }

    /// Requests a redrive of all parked messages of a key, in order, or of the single message with this id. The worker
    /// that owns the key handles the messages again, at once or as soon as the worker runs. Returns how many messages
    /// wait, or 0 if nothing is parked under the key or id.
    pub async fn redrive(&self, subscription: &str, key: &str, reason: &str) -> Result<usize, OperatorError> {
        let letters = DeadLetters::new(self.store.clone());
        self.again(async || {
            let (puts, waiting) = letters.to_redrive(subscription, key).await?;
            if puts.is_empty() {
                return Ok(0);
            }
            let by = self.by.clone();
            let reason = reason.to_owned();
            let of = subscription.to_owned();
            let key = key.to_owned();
            let event = OperatorEvent::Redriven { subscription: of, key, waiting, by, reason };
            self.record(subscription, &event, puts).await.map(|()| waiting)
        })
        .await
    }

    /// Permanently drops the first parked message of a key, or the message with this id. The parked messages after the
    /// dropped message are then retried. Returns `None` if nothing is parked under the key or id.
    pub async fn drop_first(
        &self,
        subscription: &str,
        key: &str,
        reason: &str,
    ) -> Result<Option<Parked>, OperatorError> {
        let letters = DeadLetters::new(self.store.clone());
        self.again(async || {
            let Some((puts, dropped)) = letters.to_drop(subscription, key).await? else { return Ok(None) };
            let parked = recordable(&dropped.body);
            let by = self.by.clone();
            let reason = reason.to_owned();
            let of = subscription.to_owned();
            let key = key.to_owned();
            let event = OperatorEvent::Dropped { subscription: of, key, parked, by, reason };
            self.record(subscription, &event, puts).await?;
            Ok(serde_json::from_str(&dropped.body).ok())
        })
        .await
    }

    /// Resets all lanes of a subscription so that they continue after this position, even while a worker follows them.
    /// The earlier effects of the subscription are kept, and its handler receives the events after the position again.
    /// Parked messages are included: the parked messages after the position are removed in the same commit, and are
    /// delivered again in order within each key.
    ///
    /// # Errors
    /// Fails if the position is not in the log, if no subscription of the log has this name, if more messages are
    /// parked after the position than one commit can remove, or if the name belongs to a read model, because a reset
    /// would apply events to the views twice. In these cases, nothing is changed.
    pub async fn reset(&self, subscription: &str, to: Position, reason: &str) -> Result<(), OperatorError> {
        let head = self.store.status().await?.head;
        if to < Position::START {
            return Err(OperatorError::Illegal(format!("position {to} does not exist: the log begins at 0")));
        }
        if to > head {
            return Err(OperatorError::Illegal(format!("position {to} is after the end of the log, {head}")));
        }
        if let Some(model) = self.read_model(subscription).await? {
            return Err(OperatorError::Illegal(format!(
                "{subscription} maintains the views of read model {model}, and a reset would apply events twice: \
                 rebuild the views with `read-model {model} rebuild`"
            )));
        }
        self.again(async || {
            let lanes = self.lanes(subscription).await?;
            let now = self.store.clock().now();
            let mut puts = self.coming_again(subscription, to).await?;
            let from = lanes.iter().map(|(document, lane)| (document.key.id.to_string(), lane.next)).collect();
            let by = self.by.clone();
            let reason = reason.to_owned();
            let event = OperatorEvent::Reset { subscription: subscription.to_owned(), to, from, by, reason };
            puts.extend(moved(lanes, |lane| Checkpoint { next: to.0, event: None, at: now, ..lane }));
            self.record(subscription, &event, puts).await
        })
        .await
    }

    /// Pauses or resumes a subscription. The workers of a paused subscription stop before their next commit. Only lanes
    /// with a checkpoint are affected. A lane has its first checkpoint at most one second after its start.
    pub async fn pause(&self, subscription: &str, paused: bool, reason: &str) -> Result<(), OperatorError> {
        self.again(async || {
            let lanes = self.lanes(subscription).await?;
            let now = self.store.clock().now();
            if lanes.iter().all(|(_, lane)| lane.paused == paused) {
                let state = if paused { "is already paused" } else { "is not paused" };
                return Err(OperatorError::Illegal(format!("subscription {subscription} {state}")));
            }
            let of = subscription.to_owned();
            let by = self.by.clone();
            let reason = reason.to_owned();
            let event = match paused {
                true => OperatorEvent::Paused { subscription: of, by, reason },
                false => OperatorEvent::Resumed { subscription: of, by, reason },
            };
            let moved = moved(lanes, |lane| Checkpoint { paused, holder: None, at: now, ..lane });
            self.record(subscription, &event, moved).await
        })
        .await
    }

    /// Replaces the live views with the rebuilt views.
    pub async fn swap(&self, rebuild: Rebuild, reason: &str) -> Result<Rebuilt, OperatorError> {
        let read_model = rebuild.model().to_owned();
        let by = self.by.clone();
        let reason = reason.to_owned();
        let append = recorded(rebuild.model(), &OperatorEvent::Swapped { read_model, by, reason })?;
        Ok(rebuild.swap_with(vec![append]).await?)
    }

    /// Requests an action on a stuck saga. The service that runs the saga carries out the action or declines the
    /// request, at once or at the next start of the service. The answer is the first [`SagaEvent::Operated`] or
    /// [`SagaEvent::Declined`] in the stream of the saga after the version that this method returns.
    pub async fn ask(&self, saga: &StreamId, verb: OperatorAction, reason: &str) -> Result<Version, OperatorError> {
        self.again(async || {
            let illegal = |why: String| OperatorError::Illegal(why);
            let mut first = None;
            let mut last = None;
            let mut waiting = None;
            let mut events = pages::history(&*self.store, saga, Version::START);
            while let Some(event) = events.try_next().await? {
                if SagaRequest::concerns(&event.type_name) {
                    let decoded = event.decode::<SagaEvent>().map_err(|error| illegal(error.to_string()))?;
                    waiting = decoded.and_then(|decoded| SagaRequest::after(&decoded, waiting));
                }
                first.get_or_insert_with(|| event.metadata.clone());
                last = Some(event);
            }
            let Some((metadata, last)) = first.zip(last) else {
                return Err(illegal(format!("there is no saga {saga}")));
            };
            let version = last.version;
            let last = last.decode::<SagaEvent>().map_err(|error| illegal(error.to_string()))?;
            let progress = last.as_ref().map(SagaEvent::progress);
            let progress = match progress {
                Some(progress) if progress.status == Status::Stuck && progress.ended.is_none() => progress.clone(),
                Some(progress) => {
                    let state = if progress.ended.is_some() { "has ended" } else { "is not stuck" };
                    return Err(illegal(format!("saga {} {state}: {verb:?} does not apply", saga.id())));
                }
                None => return Err(illegal(format!("{saga} is not a saga"))),
            };
            if let Some(SagaRequest { verb, by, .. }) = waiting {
                return Err(illegal(format!(
                    "{by} has already requested {verb:?}, and no service has handled the request yet"
                )));
            }
            let request = SagaRequest { verb, by: self.by.clone(), reason: reason.to_owned() };
            let event = request.recorded(progress, self.store.clock().now().timestamp_millis());
            let id = Uuid::new_v4();
            let metadata = Metadata { actor: Party::new(&self.by).ok(), ..metadata.caused_by(id) };
            let events = vec![new_event(&event, id, metadata)?];
            let append = Append { stream: saga.clone(), expected: Expected::Version(version), events };
            self.store.commit(Commit { appends: vec![append], puts: Vec::new() }).await?;
            Ok(version.next())
        })
        .await
    }

    /// Waits until the service of a saga has answered the request that is recorded at this version, and returns the
    /// answer: [`SagaEvent::Operated`] or [`SagaEvent::Declined`]. The method waits without a limit, because the
    /// service may not be running.
    pub async fn answer(&self, saga: &StreamId, request: Version) -> Result<SagaEvent, OperatorError> {
        let mut after = request;
        loop {
            // The head is read before the stream, so that no event between the two reads is missed.
            let head = self.store.status().await?.head;
            let mut events = pages::history(&*self.store, saga, after);
            while let Some(event) = events.try_next().await? {
                let decoded = event.decode::<SagaEvent>();
                let decoded = decoded.map_err(|error| OperatorError::Illegal(error.to_string()))?;
                if let Some(answer @ (SagaEvent::Operated { .. } | SagaEvent::Declined { .. })) = decoded {
                    return Ok(answer);
                }
                after = event.version;
            }
            self.store.wait(head).await?;
        }
    }

    /// Returns the puts that remove the parked messages which are delivered again after a reset. The parked messages of
    /// a relay are not removed. Receivers ignore messages at or before the last position that they have received, so
    /// these messages would be lost if they were published normally instead of redriven.
    async fn coming_again(&self, subscription: &str, to: Position) -> Result<Vec<Put>, OperatorError> {
        if subscription.ends_with(RELAY) {
            return Ok(Vec::new());
        }
        let parked = DeadLetters::new(self.store.clone()).after(subscription, to).await?;
        if parked.len() > RESET_PARKED_MAX {
            return Err(OperatorError::Illegal(format!(
                "{} messages of {subscription} are parked after position {to}, and a reset removes at most \
                 {RESET_PARKED_MAX}: redrive or drop some with `dead-letters`, then reset",
                parked.len()
            )));
        }
        let removal = |Document { key, version, .. }| Put { key, expected: Some(version), body: None, due: None };
        Ok(parked.into_iter().map(removal).collect())
    }

    /// Returns the read model that a name refers to. The name is either the name of the read model or
    /// `NAME@GENERATION`.
    async fn read_model<'a>(&self, name: &'a str) -> Result<Option<&'a str>, OperatorError> {
        if let Some((model, generation)) = name.split_once('@') {
            return Ok(generation.parse::<u32>().is_ok().then_some(model));
        }
        let keys = [generation::pointer_key(name), DocumentKey::new(CHECKPOINTS, format!("{name}/0"))];
        let found = self.store.documents(&keys).await?;
        Ok(matches!(&*found, [Some(_), None]).then_some(name))
    }

    /// Returns the checkpoints of a subscription, or of the live generation of a read model.
    async fn lanes(&self, name: &str) -> Result<Vec<(Document, Checkpoint)>, OperatorError> {
        if name.contains('@') || self.read_model(name).await?.is_none() {
            return self.lanes_of(name).await;
        }
        let (pointer, _) = generation::load(&*self.store, name).await?;
        self.lanes_of(&generation::name(name, pointer.live)).await
    }

    async fn lanes_of(&self, subscription: &str) -> Result<Vec<(Document, Checkpoint)>, OperatorError> {
        let mut lanes = Vec::new();
        let mut topics = BTreeSet::new();
        let prefix = format!("{subscription}/");
        let mut documents = pages::collection(&*self.store, CHECKPOINTS, &prefix);
        while let Some(document) = documents.try_next().await? {
            let Some(of) = document.key.id.strip_prefix(&prefix) else { break };
            let checkpoint: Checkpoint = serde_json::from_str(&document.body)
                .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
            if checkpoint.incarnation.is_some() {
                topics.insert(of.split_once('/').map_or(of, |(topic, _)| topic).to_owned());
            } else if of.parse::<u32>().is_ok() {
                // The id of a lane's checkpoint ends in a number. Any other document with this prefix belongs to
                // another name.
                lanes.push((document, checkpoint));
            }
        }
        if !topics.is_empty() {
            let topics = topics.into_iter().collect();
            return Err(OperatorError::OfBus { group: subscription.to_owned(), topics });
        }
        if lanes.is_empty() {
            return Err(OperatorError::Illegal(format!("there is no subscription {subscription}")));
        }
        Ok(lanes)
    }

    async fn record(&self, subscription: &str, event: &OperatorEvent, puts: Vec<Put>) -> Result<(), OperatorError> {
        self.store.commit(Commit { appends: vec![recorded(subscription, event)?], puts }).await?;
        Ok(())
    }

    /// Repeats an action if another writer committed first.
    async fn again<T>(&self, act: impl AsyncFn() -> Result<T, OperatorError>) -> Result<T, OperatorError> {
        let mut races = 0;
        loop {
            match act().await {
                Err(OperatorError::Commit(CommitError::Conflict { .. } | CommitError::DocumentConflict { .. }))
                    if races < RACES_MAX =>
                {
                    races += 1;
                }
                outcome => return outcome,
            }
        }
    }
}

/// Returns the append that records the event of an action in the stream of the affected subscription.
fn recorded(about: &str, event: &OperatorEvent) -> Result<Append, OperatorError> {
    let stream = StreamId::new(CATEGORY, about).map_err(|error| OperatorError::Illegal(error.to_string()))?;
    let id = Uuid::new_v4();
    let events = vec![event.recorded(id)?];
    Ok(Append { stream, expected: Expected::Any, events })
}

fn new_event<E: Event>(event: &E, cause: Uuid, metadata: Metadata) -> Result<NewEvent, OperatorError> {
    Ok(NewEvent {
        id: derived_id(cause, 1),
        type_name: event.type_name().into(),
        schema_version: event.schema_version(),
        data: event.encode().map_err(|error| OperatorError::Illegal(error.to_string()))?,
        metadata,
    })
}

fn moved(lanes: Vec<(Document, Checkpoint)>, change: impl Fn(Checkpoint) -> Checkpoint) -> Vec<Put> {
    let put = |(document, lane): (Document, Checkpoint)| {
        let body = serde_json::to_string(&change(lane)).unwrap_or_default();
        Put { key: document.key, expected: Some(document.version), body: Some(body.into()), due: None }
    };
    lanes.into_iter().map(put).collect()
}
