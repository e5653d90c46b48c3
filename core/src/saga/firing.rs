//! Finds the documents of sagas that are due, because of a timer or of an operator's request, and passes the timer or
//! the request to the saga.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, TimeDelta, Utc};
use futures::future::join_all;
use serde::Deserialize;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    definition::SagaState,
    index::{STUCK, SagaStatus},
    instance::SagaInput,
    progress::{SagaEvent, Status},
    request::SagaRequest,
    runner::Sagas,
};
use crate::{
    base::{backoff::Backoff, panic::caught},
    commit::{Commit, CommitError, Document, DocumentKey, Put},
    decide::work::{Stale, Work, WorkError},
    event::{Metadata, StreamId, Version},
    follow::relay_progress::RelayProgress,
    health::{Health, State},
    store::{Scan, StoreError},
};

/// How often this process checks the timers that it remembers. This interval is the precision of every timeout and
/// delay.
pub const TIMER_TICK: Duration = Duration::from_millis(100);
/// How often the store is checked when no timer is known to be due. This check finds timers that were set by processes
/// that have ended.
pub const TIMER_LOOK: Duration = Duration::from_secs(1);
/// How long a timer is postponed if its saga accepts no input, for example because this build lacks the saga's
/// definition.
const REFUSED_TIMER: Duration = Duration::from_secs(30);
/// How long a saga's timer may be overdue before the saga's document says that this build lacks the saga's definition.
/// If another instance has the definition, it fires the timer within a second.
const UNKNOWN_TIMER: TimeDelta = TimeDelta::seconds(5);
/// How long a timer is postponed if the bus has not yet accepted the commands of the timer's saga. Timers are postponed
/// only when there are many such sagas.
const UNHEARD_TIMER: Duration = Duration::from_secs(5);
/// How long a timer is postponed if its saga has changed in the meantime. After this time, the index has recorded the
/// new state.
const MOVED_TIMER: Duration = Duration::from_secs(2);
/// The maximum number of timers fired in one commit. Each round makes at most two such commits. A commit takes well
/// under a tenth of a second, so a round does not delay other work.
const DUE_PAGE: usize = 128;
/// How often a process looks for stuck sagas.
const STUCK_LOOK: Duration = Duration::from_secs(2);
/// The maximum number of stuck sagas that are counted, and the maximum number that are named in the report.
const STUCK_MAX: usize = 1_000;
const STUCK_NAMED_MAX: usize = 3;
/// How long this process keeps an overdue timer that the saga's document does not show yet. After this time, the index
/// has recorded the timer.
const OVERDUE: TimeDelta = TimeDelta::seconds(2);
/// How long this process keeps an overdue timer of a saga that has no document yet.
const UNWRITTEN: TimeDelta = TimeDelta::seconds(60);
/// The maximum number of attempts to commit timers when other writers change the same sagas.
const RACES_MAX: u32 = 8;

/// The timers that are due, in two parts that are fired one after the other.
#[derive(Default)]
struct Due {
    /// The timers that this process remembers, the latest first.
    fresh: Vec<Document>,
    /// The timers in the store that have been due longest.
    first: Vec<Document>,
    /// Whether the store has more timers that are due.
    more: bool,
}

/// The stream of a saga to wake, and the metadata of the request to which the saga belongs.
type Origin = (StreamId, Metadata);

impl<C: SagaState> Sagas<C> {
    /// Waits for `begin`, and then passes due timers and requests to their sagas until `shutdown` is cancelled.
    /// `relayed_by` names the service whose relay publishes the commands. If `relayed_by` is given, a timer does not
    /// fire before the bus has accepted the commands to which the saga awaits a reply.
    pub(crate) async fn timers(
        self,
        relayed_by: Option<String>,
        begin: impl Future<Output = ()> + Send,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), String> {
        let part = format!("{}.timers", self.runner.name());
        let mut reporter = health.reporter(&part, &shutdown);
        let mut backoff = Backoff::long();
        let mut tick = interval(TIMER_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked = None::<Instant>;
        let mut more = false;
        let mut counted = None::<Instant>;
        begin.await;
        while !shutdown.is_cancelled() {
            tokio::select! {
                _ = tick.tick(), if !more => {}
                () = std::future::ready(()), if more => {}
                () = shutdown.cancelled() => break,
            }
            if counted.is_none_or(|counted| counted.elapsed() >= STUCK_LOOK) {
                counted = Some(Instant::now());
                if let Ok(attention) = self.attention().await {
                    reporter.attention(attention);
                }
            }
            let now = self.store.clock().now();
            let fresh = self.timers.take_due(now, DUE_PAGE);
            let looks = more || self.timers.is_ahead(now) || looked.is_none_or(|looked| looked.elapsed() >= TIMER_LOOK);
            if fresh.is_empty() && !looks {
                continue;
            }
            if looks {
                looked = Some(Instant::now());
            }
            let trouble = match self.due(now, fresh, looks, relayed_by.as_deref()).await {
                Ok(due) => {
                    more = due.more;
                    let fresh = self.fire(due.fresh).await;
                    fresh.or(self.fire(due.first).await)
                }
                Err(error) => Some(error.to_string()),
            };
            match trouble {
                Some(trouble) => {
                    reporter.trouble(trouble);
                    more = false;
                    tokio::select! {
                        () = backoff.wait() => {}
                        () = shutdown.cancelled() => {}
                    }
                }
                None => {
                    reporter.fine();
                    backoff.reset();
                }
            }
        }
        health.set(&part, State::Stopped);
        Ok(())
    }

    /// Returns a message that says why an operator is needed. The message names stuck sagas, services that do not
    /// answer, and sagas that accept no input.
    async fn attention(&self) -> Result<Option<String>, StoreError> {
        let collection = format!("{STUCK}{}", self.runner.category());
        let stuck = self.store.scan(&collection, &Scan::After("".into()), STUCK_MAX).await?;
        let named: Vec<_> = stuck.iter().take(STUCK_NAMED_MAX).map(|document| &*document.key.id).collect();
        let count = if stuck.len() < STUCK_MAX { stuck.len().to_string() } else { format!("{STUCK_MAX} or more") };
        let stuck = (!stuck.is_empty()).then(|| {
            let named = named.join(", ");
            format!(
                "{count} {} sagas are stuck, such as {named}: retry, skip the step, compensate or abandon them",
                self.runner.name()
            )
        });
        let refused = self.refused().await?;
        let all: Vec<_> = stuck.into_iter().chain(self.timers.silence()).chain(refused).collect();
        Ok((!all.is_empty()).then(|| all.join("; ")))
    }

    /// Returns a message that names a saga that has refused its timer, for example because its migration is wrong. The
    /// document of such a saga gives the reason until the saga continues, in this process or in another one.
    async fn refused(&self) -> Result<Option<String>, StoreError> {
        let refused = self.timers.refused();
        if refused.is_empty() {
            return Ok(None);
        }
        let category = self.runner.category();
        let keys: Vec<_> = refused.iter().map(|(id, _)| DocumentKey::new(&*category, id.clone())).collect();
        let found = self.store.documents(&keys).await?;
        let mut waiting = Vec::new();
        for ((id, reason), document) in refused.into_iter().zip(found) {
            let status = document.and_then(|document| serde_json::from_str::<SagaStatus>(&document.body).ok());
            match status.is_some_and(|status| status.last_error.as_ref() == Some(&reason)) {
                true => waiting.push((id, reason)),
                false => self.timers.accept(&id),
            }
        }
        Ok(waiting.first().map(|(id, reason)| {
            format!("{} {} sagas accept no input, such as {id}: {reason}", waiting.len(), self.runner.name())
        }))
    }

    /// Returns the documents of the sagas whose timers fire now.
    async fn due(
        &self,
        now: DateTime<Utc>,
        known: Vec<(DateTime<Utc>, Arc<str>)>,
        looks: bool,
        relayed_by: Option<&str>,
    ) -> Result<Due, StoreError> {
        let is_due = |document: &Document| document.due.is_some_and(|due| due <= now);
        let mut due = Due::default();
        if !known.is_empty() {
            let category = self.runner.category();
            let keys: Vec<_> = known.iter().map(|(_, id)| DocumentKey::new(&*category, id.clone())).collect();
            for ((time, id), found) in known.into_iter().zip(self.store.documents(&keys).await?) {
                match found {
                    Some(document) if is_due(&document) => due.fresh.push(document),
                    // The index has not recorded the timer yet; if the index is behind, the saga may have no document
                    // yet.
                    Some(_) if time + OVERDUE > now => self.timers.set(&id, Some(time)),
                    None if time + UNWRITTEN > now => self.timers.set(&id, Some(time)),
                    Some(_) | None => {}
                }
            }
        }
        if looks {
            // Queries two intervals ahead, so that a timer fires on time even if another process set it, or if this
            // process set it long ago and no longer remembers it.
            let soon = Scan::Due(now + 2 * TIMER_LOOK);
            let mut soon = self.store.scan(&self.runner.category(), &soon, DUE_PAGE).await?;
            let later = soon.split_off(soon.iter().take_while(|document| is_due(document)).count());
            self.timers.look_again_at(later.first().and_then(|document| document.due));
            due.more = soon.len() == DUE_PAGE;
            let fresh: HashSet<_> = due.fresh.iter().map(|document| document.key.id.clone()).collect();
            soon.retain(|document| !fresh.contains(&document.key.id));
            due.first = soon;
        }
        due.fresh = self.known(due.fresh, now).await;
        due.first = self.known(due.first, now).await;
        let Some(service) = relayed_by.filter(|_| !due.fresh.is_empty() || !due.first.is_empty()) else {
            return Ok(due);
        };
        let relayed = RelayProgress::on(&*self.store).await?.remove(service);
        due.fresh = self.heard(due.fresh, relayed.as_ref()).await;
        due.first = self.heard(due.first, relayed.as_ref()).await;
        Ok(due)
    }

    /// Returns the timers of the sagas whose definition this build has. Another instance may have the other
    /// definitions. If no instance has these definitions, the documents of the sagas show that the sagas wait.
    async fn known(&self, due: Vec<Document>, now: DateTime<Utc>) -> Vec<Document> {
        let is_known = |document: &Document| {
            let status = serde_json::from_str::<SagaStatus>(&document.body);
            status.is_ok_and(|status| self.runner.definitions.knows(&status.definition_hash))
        };
        let (known, unknown): (Vec<_>, Vec<_>) = due.into_iter().partition(is_known);
        let crowd = unknown.len() > DUE_PAGE / 2;
        let is_overdue = |document: &Document| document.due.is_some_and(|due| due + UNKNOWN_TIMER < now);
        let due = self.store.clock().due_in(REFUSED_TIMER);
        let waits = unknown.into_iter().filter(|document| crowd || is_overdue(document)).map(|document| {
            let body = waiting(&document.body, "waits for a build that has its definition");
            Put { key: document.key, expected: Some(document.version), body: Some(body), due }
        });
        join_all(waits.map(|put| self.store.commit(Commit { appends: Vec::new(), puts: vec![put] }))).await;
        known
    }

    /// Returns the timers of the sagas whose commands the bus has accepted.
    async fn heard(&self, due: Vec<Document>, relayed: Option<&RelayProgress>) -> Vec<Document> {
        let is_heard = |document: &Document| {
            let status = serde_json::from_str::<SagaStatus>(&document.body);
            let (Ok(status), Ok(stream)) = (status, self.instances.stream(&document.key.id)) else { return true };
            relayed.is_some_and(|relayed| status.position <= relayed.up_to(&stream))
        };
        let (heard, unheard): (Vec<_>, Vec<_>) = due.into_iter().partition(is_heard);
        // Each query returns a limited number of timers, so many waiting timers are postponed to make room for others.
        if unheard.len() > DUE_PAGE / 2 {
            let due = self.store.clock().due_in(UNHEARD_TIMER);
            let postponed =
                |Document { key, version, body, .. }| Put { key, expected: Some(version), body: Some(body), due };
            let puts = unheard.into_iter().map(postponed);
            // A put fails if the saga has changed or if the store is unavailable. Either way, the next query shows the
            // current state.
            join_all(puts.map(|put| self.store.commit(Commit { appends: Vec::new(), puts: vec![put] }))).await;
        }
        heard
    }

    /// Passes the due timers to these sagas in one commit. The same commit sets their timers to a later time, so that
    /// no query finds the timers again before the index has recorded the new states. Returns a description of the
    /// failure if the store failed. A saga that accepts no input does not keep other sagas from continuing, so that
    /// saga is reported separately; see [`refused`](Self::refused).
    async fn fire(&self, mut due: Vec<Document>) -> Option<String> {
        let origins = self.origins(&due).await;
        let mut stale = Stale::Nothing;
        let mut racing = Backoff::short();
        for _ in 0..RACES_MAX {
            if due.is_empty() {
                return None;
            }
            let mut work = Work::new(self.store.clone(), stale.clone());
            for document in &due {
                match self.wake(document, origins.get(&document.key.id), &mut work).await {
                    Ok(()) => self.timers.accept(&document.key.id),
                    Err(WakeError::OfStore(error)) => return Some(error),
                    Err(WakeError::OfSaga(why)) => self.report_refused(&document.key.id, &why),
                }
            }
            let Err(error) = work.commit().await else { return None };
            match &error {
                // Another writer has changed the saga.
                CommitError::DocumentConflict { key, .. } => {
                    due.retain(|document| document.key != *key);
                    racing.wait().await;
                }
                CommitError::Conflict { .. } => {
                    stale = stale.after(&error);
                    racing.wait().await;
                }
                CommitError::Invalid(_) if due.len() > 1 => {
                    let rest = due.split_off(due.len() / 2);
                    let first = Box::pin(self.fire(due)).await;
                    return first.or(Box::pin(self.fire(rest)).await);
                }
                CommitError::Invalid(reason) => {
                    let Document { key, version, body, .. } = due.remove(0);
                    self.report_refused(&key.id, reason);
                    let body = waiting(&body, reason);
                    let due = self.store.clock().due_in(REFUSED_TIMER);
                    let put = Put { key, expected: Some(version), body: Some(body), due };
                    // If this commit fails, the next query finds the timer again.
                    _ = self.store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await;
                    return None;
                }
                CommitError::Unknown(_) | CommitError::Unavailable(_) => return Some(error.to_string()),
            }
        }
        None
    }

    fn report_refused(&self, saga: &str, reason: &str) {
        if self.timers.refuse(saga, reason) {
            tracing::warn!(name = self.runner.name(), saga, reason, "a saga accepts no input");
        }
    }

    /// Reads the data needed to wake the sagas, concurrently.
    async fn origins(&self, due: &[Document]) -> HashMap<Arc<str>, Result<Origin, WakeError>> {
        let read = due.iter().map(async |document| {
            let id = document.key.id.clone();
            let origin = caught(self.origin(&id)).await;
            (id, origin.unwrap_or_else(|panic| Err(WakeError::OfSaga(panic.to_string()))))
        });
        join_all(read).await.into_iter().collect()
    }

    async fn origin(&self, id: &str) -> Result<Origin, WakeError> {
        let stream = self.instances.stream(id).map_err(|error| WakeError::OfSaga(error.to_string()))?;
        let first = self.store.read_stream(&stream, Version::START, 1).await;
        let first = first.map_err(|error| WakeError::OfStore(error.to_string()))?;
        // The sagas are loaded into the cache concurrently, because loading them one by one would take one round trip
        // per saga.
        self.instances.load(&stream).await?;
        let metadata = first.first().map(|event| event.metadata.clone());
        Ok((stream, metadata.unwrap_or_default()))
    }

    async fn wake(
        &self,
        document: &Document,
        origin: Option<&Result<Origin, WakeError>>,
        work: &mut Work,
    ) -> Result<(), WakeError> {
        let id = Uuid::new_v4();
        let staged = match origin {
            Some(Ok((stream, metadata))) => {
                work.begin(id, metadata.caused_by(id));
                let ask = self.ask(&document.key.id, input_of(document));
                let staged = caught(work.execute_as(id, &self.instances, stream, &ask)).await;
                match staged {
                    Ok(staged) => staged.map_err(WakeError::from),
                    Err(panic) => Err(WakeError::OfSaga(format!("the command handler {panic}"))),
                }
            }
            Some(Err(fault)) => Err(fault.clone()),
            None => return Ok(()),
        };
        let mut body = document.body.clone();
        let (due, outcome) = match staged {
            Ok(decided) => {
                let wakes = decided.events.last().map(|event: &SagaEvent| event.progress().wakes());
                match wakes {
                    Some(wakes) => (wakes.and_then(DateTime::from_timestamp_millis), Ok(())),
                    None => (work.due_in(MOVED_TIMER), Ok(())),
                }
            }
            Err(fault @ WakeError::OfStore(_)) => return Err(fault),
            Err(fault) => {
                work.rollback();
                if let WakeError::OfSaga(why) = &fault {
                    body = waiting(&body, why);
                }
                (work.due_in(REFUSED_TIMER), Err(fault))
            }
        };
        work.put_expecting(&document.key, document.version, Some(body), due);
        outcome
    }
}

/// Returns the input that a due document stands for.
fn input_of<C>(document: &Document) -> SagaInput<C> {
    let status = serde_json::from_str::<StatusOnly>(&document.body);
    match status {
        Ok(StatusOnly { status }) if SagaRequest::makes_due(status) => SagaInput::Request,
        Ok(_) | Err(_) => SagaInput::Due,
    }
}

/// The field of a saga's document that says whether the document is due because of a timer or of a request.
#[derive(Deserialize)]
struct StatusOnly {
    status: Status,
}

/// Adds the reason why a saga accepts no input to the saga's document, where operators can read it. The saga's next
/// event overwrites the document.
fn waiting(body: &Arc<str>, why: &str) -> Arc<str> {
    let Ok(mut status) = serde_json::from_str::<SagaStatus>(body) else { return body.clone() };
    status.last_error = Some(why.to_owned());
    serde_json::to_string(&status).map_or_else(|_| body.clone(), Arc::from)
}

/// Why the timer of a saga was not fired.
#[derive(Clone, Debug)]
enum WakeError {
    /// The store is unavailable; nothing is wrong with the saga.
    OfStore(String),
    /// The saga accepts no input.
    OfSaga(String),
}

impl<R: std::error::Error> From<WorkError<R>> for WakeError {
    fn from(error: WorkError<R>) -> Self {
        match error {
            WorkError::Store(StoreError::Unavailable(reason)) => Self::OfStore(reason),
            error => Self::OfSaga(error.to_string()),
        }
    }
}
