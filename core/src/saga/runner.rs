//! Starts sagas, feeds them replies and timers, and lets operators act on them.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    definition::{Saga, SagaState},
    index::{Index, SagaStatus},
    instance::{Ask, Definitions, Instance, SagaRefusal, What},
    participant::StepEvent,
    progress::Progress,
    timers::Timers,
    transition::Verb,
};
use crate::{
    backoff::Backoff,
    bus::Message,
    commit::{Commit, Document, Put},
    event::{Metadata, Version, named_id},
    handler::{Handler, HandlerError, Terminal},
    health::Health,
    relayed::Relayed,
    repository::{CACHED_AGGREGATES, ExecuteError, Repository, Request},
    store::{EventStore, LogQuery, Scan, StoreError},
    work::Work,
};

/// How often the timers are looked at when one is due: the precision of every timeout and delay.
pub const TIMER_TICK: Duration = Duration::from_millis(100);
/// How often they are looked at when none is known to be: for those that a process set which is no more.
pub const TIMER_LOOK: Duration = Duration::from_secs(1);
/// How long a timer is left alone whose saga takes no input, such as one of a definition that this build lacks.
const REFUSED_TIMER: Duration = Duration::from_secs(30);
/// The same where the bus has not yet taken what its saga asked for, and there are many of them.
const UNHEARD_TIMER: Duration = Duration::from_secs(5);
/// Timers fired in one go.
const DUE_PAGE: usize = 256;

/// Tells which messages start a saga: its id, and what it is given.
pub type Starts<C> = fn(&Message) -> Result<Option<(String, C)>, HandlerError>;

/// Runs the sagas of one definition.
pub struct Runner<C: SagaState> {
    definitions: Arc<Definitions<C>>,
    instances: Repository<Instance<C>>,
    store: Arc<dyn EventStore>,
    starts: Starts<C>,
    query: LogQuery,
    timers: Timers,
}

impl<C: SagaState> Clone for Runner<C> {
    fn clone(&self) -> Self {
        Self {
            definitions: self.definitions.clone(),
            instances: self.instances.clone(),
            store: self.store.clone(),
            starts: self.starts,
            query: self.query.clone(),
            timers: self.timers.clone(),
        }
    }
}

impl<C: SagaState> Runner<C> {
    /// Runs `saga`; it starts with those events of `query` that `starts` gives an id for.
    pub fn new(store: Arc<dyn EventStore>, saga: Saga<C>, query: LogQuery, starts: Starts<C>) -> Self {
        let instances = Repository::with(store.clone(), &saga.category(), CACHED_AGGREGATES);
        let definitions = Definitions { current: Arc::new(saga), older: HashMap::new(), migrations: HashMap::new() };
        Self { definitions: Arc::new(definitions), instances, store, starts, query, timers: Timers::default() }
    }

    fn with(mut self, change: impl FnOnce(&mut Definitions<C>)) -> Self {
        let known = &self.definitions;
        let mut definitions = Definitions {
            current: known.current.clone(),
            older: known.older.clone(),
            migrations: known.migrations.clone(),
        };
        change(&mut definitions);
        self.definitions = Arc::new(definitions);
        self
    }

    /// Lets sagas that were started under an earlier definition keep to it.
    pub fn older(self, saga: Saga<C>) -> Self {
        self.with(|definitions| _ = definitions.older.insert(saga.hash.clone(), Arc::new(saga)))
    }

    /// Moves sagas that were started under the definition with this hash to the current one, each when it next wants
    /// attention. `migrate` says where in the current plan they stand.
    pub fn migrate(self, from: &str, migrate: fn(&Progress) -> Progress) -> Self {
        self.with(|definitions| _ = definitions.migrations.insert(from.to_owned(), migrate))
    }

    /// The name of the saga.
    pub fn name(&self) -> &'static str {
        self.definitions.current.name
    }

    pub(crate) fn category(&self) -> String {
        self.definitions.current.category()
    }

    pub(crate) fn query(&self) -> &LogQuery {
        &self.query
    }

    /// The index of these sagas.
    pub(crate) fn index(&self) -> Index {
        Index::telling(self.timers.clone())
    }

    /// One saga as the store has it now; `None` if it never started.
    pub async fn saga(&self, id: &str) -> Result<Option<Instance<C>>, String> {
        let instance = self.instances.state(id).await.map_err(|error| error.to_string())?;
        Ok(instance.progress.is_some().then_some(instance))
    }

    /// Acts on a stuck saga. The act is an event in its stream, with who and why.
    pub async fn operate(&self, id: &str, verb: Verb, by: &str, reason: &str) -> Result<(), ExecuteError<SagaRefusal>> {
        let what = What::Operate { verb, by: by.to_owned(), reason: reason.to_owned() };
        self.put_in(id, what).await
    }

    /// An input that no message brings. What follows from it still belongs to the request that the saga began with.
    async fn put_in(&self, id: &str, what: What<C>) -> Result<(), ExecuteError<SagaRefusal>> {
        let command_id = Uuid::new_v4();
        let stream = self.instances.stream(id).map_err(|error| ExecuteError::Invalid(error.to_string()))?;
        let first = self.store.read_stream(&stream, Version::START, 1).await;
        let first = first.map_err(|error| ExecuteError::Unavailable(error.to_string()))?;
        let metadata = first.first().map(|event| event.metadata.caused_by(command_id));
        let metadata = metadata.unwrap_or_else(|| Metadata::of_request(command_id));
        self.instances.execute(id, self.ask(id, what), Request { command_id, metadata }).await?;
        Ok(())
    }

    fn ask(&self, id: &str, what: What<C>) -> Ask<C> {
        let saga_id = named_id(named_id(Uuid::NAMESPACE_OID, &self.category()), id);
        Ask { definitions: self.definitions.clone(), saga_id, now: Utc::now().timestamp_millis(), what }
    }

    async fn start(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if let Some((id, context)) = (self.starts)(message)? {
            work.create(&self.instances, &id, &self.ask(&id, What::Begin(context))).await?;
        }
        Ok(())
    }

    async fn reply(&self, saga_id: &str, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(StepEvent::Replied { reply, .. }) = message.decode()? else { return Ok(()) };
        let ask = self.ask(saga_id, What::Reply(reply));
        work.execute(&self.instances, saga_id, &ask).await.terminal()?;
        Ok(())
    }

    /// Fires timers until `shutdown`. With the name of the service whose relay carries the commands, a saga is not held to
    /// have waited for an answer while the bus has not even taken the question.
    pub(crate) async fn timers(
        self,
        relayed_by: Option<String>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), String> {
        let mut reporter = health.reporter(&format!("{}.timers", self.name()));
        let mut backoff = Backoff::long();
        let mut tick = tokio::time::interval(TIMER_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked = None::<Instant>;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => break,
            }
            let now = Utc::now();
            if !self.timers.are_due(now) && looked.is_some_and(|looked| looked.elapsed() < TIMER_LOOK) {
                continue;
            }
            looked = Some(Instant::now());
            let due = match self.due(now, relayed_by.as_deref()).await {
                Ok(due) => due,
                Err(error) => {
                    reporter.trouble(error.to_string());
                    tokio::select! {
                        () = backoff.wait() => {}
                        () = shutdown.cancelled() => {}
                    }
                    continue;
                }
            };
            let fired = due.into_iter().map(async |document| {
                let error = self.put_in(&document.key.id, What::Due).await.err()?;
                let trouble = format!("timer of saga {}: {error}", document.key.id);
                if matches!(error, ExecuteError::Refused(_) | ExecuteError::Invalid(_) | ExecuteError::Undecodable(_)) {
                    self.postpone(document, REFUSED_TIMER).await;
                }
                Some(trouble)
            });
            let trouble = join_all(fired).await.into_iter().flatten().next();
            match trouble {
                Some(trouble) => {
                    reporter.trouble(trouble);
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
        health.set(&format!("{}.timers", self.name()), crate::health::State::Stopped);
        Ok(())
    }
}

impl<C: SagaState> Runner<C> {
    /// The sagas whose timers are to fire now.
    async fn due(&self, now: DateTime<Utc>, relayed_by: Option<&str>) -> Result<Vec<Document>, StoreError> {
        // Until the look after next, so that those which another process has set, or this one long ago, are on time.
        let mut soon = self.store.scan(&self.category(), &Scan::Due(now + 2 * TIMER_LOOK), DUE_PAGE).await?;
        let due = soon.iter().take_while(|document| document.due.is_none_or(|due| due <= now)).count();
        if let Some(next) = soon.drain(due..).find_map(|document| document.due) {
            self.timers.set(next, now);
        }
        let Some(service) = relayed_by.filter(|_| !soon.is_empty()) else { return Ok(soon) };
        let relayed = Relayed::on(&*self.store).await?.remove(service);
        let is_heard = |document: &Document| {
            let status = serde_json::from_str::<SagaStatus>(&document.body);
            let (Ok(status), Ok(stream)) = (status, self.instances.stream(&document.key.id)) else { return true };
            relayed.as_ref().is_some_and(|relayed| status.position <= relayed.up_to(&stream))
        };
        let (heard, unheard): (Vec<_>, Vec<_>) = soon.into_iter().partition(is_heard);
        if unheard.len() > DUE_PAGE / 2 {
            join_all(unheard.into_iter().map(|document| self.postpone(document, UNHEARD_TIMER))).await;
        }
        Ok(heard)
    }

    /// A timer that is not to fire now makes room for those of others, of which only so many are looked at together.
    async fn postpone(&self, document: Document, delay: Duration) {
        let due = Some(Utc::now() + delay);
        let put = Put { key: document.key, expected: Some(document.version), body: Some(document.body), due };
        // If it does not hold, the saga has moved or the store is away: the next tick sees.
        _ = self.store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await;
    }
}

/// Starts sagas from the log.
pub(crate) struct Starter<C: SagaState>(pub Runner<C>);

#[async_trait]
impl<C: SagaState> Handler for Starter<C> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        self.0.start(message, work).await
    }
}

/// Takes the replies to one kind of saga, whatever it knows.
#[async_trait]
pub(crate) trait Replies: Send + Sync {
    fn category(&self) -> String;
    async fn reply(&self, saga_id: &str, message: &Message, work: &mut Work) -> Result<(), HandlerError>;
}

#[async_trait]
impl<C: SagaState> Replies for Runner<C> {
    fn category(&self) -> String {
        Runner::category(self)
    }

    async fn reply(&self, saga_id: &str, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        Runner::reply(self, saga_id, message, work).await
    }
}
