//! Starts sagas, and passes replies to them.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use uuid::Uuid;

use super::{
    barrier::StepEvent,
    definition::{Saga, SagaState},
    index::Index,
    instance::{Definitions, SagaCommand, SagaInput, SagaInstance, SagaRefusal},
    progress::{Outcome, Progress, Reply},
    timers::Timers,
};
use crate::{
    bus::Message,
    decide::{
        repository::{CACHED_AGGREGATES, Repository},
        work::{Work, WorkError},
    },
    event::named_id,
    handler::{Handler, HandlerError, Terminal},
    store::{EventStore, LogQuery, StoreError},
};

/// Decides whether a message starts a saga, and returns the saga's id and initial data.
pub type Starts<C> = fn(&Message) -> Result<Option<(String, C)>, HandlerError>;

/// Runs the sagas of one definition.
///
/// In this example, each event of the category `counter` starts a trip. The trip's only step asks the participant
/// `Hotel` of the same service, which answers [`Answer::DONE`](super::Answer::DONE).
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
/// # #[derive(annals::Event)]
/// # #[event(prefix = "hotel")]
/// # enum HotelCommand { Hold {} }
/// # struct Hotel;
/// # #[async_trait::async_trait]
/// # impl annals::Participant for Hotel {
/// #     type Command = HotelCommand;
/// #     async fn perform(&self, _: HotelCommand, _: &mut annals::Work) -> Result<annals::Answer, annals::StepError> {
/// #         Ok(annals::Answer::DONE)
/// #     }
/// # }
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{sync::Arc, time::Duration};
///
/// use annals::{
///     EventStore, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Runtime, Saga, SagaState, Service,
///     saga::{Runner, Status, StepRequest},
/// };
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Clone, Serialize, Deserialize)]
/// struct Trip;
/// impl SagaState for Trip {}
///
/// /// Returns the id and the data of the saga that a message starts.
/// fn starts(message: &Message) -> Result<Option<(String, Trip)>, HandlerError> {
///     Ok(Some((message.subject.replace("counter-", ""), Trip)))
/// }
///
/// let plan = Saga::named("trip").retriable("hold room", |_: &Trip| StepRequest::to("travel", &HotelCommand::Hold {})).build();
/// let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
/// let runner = Runner::new(plan, LogQuery::categories(["counter"]), starts);
/// let trips = runner.on(store.clone());
/// let service = Service::new("travel", store.clone()).saga(runner).participant(Hotel);
/// let mut runtime = Runtime::new();
/// runtime.start(vec![service], Arc::new(LocalBus::default())).await?;
///
/// # let counters = annals::Repository::<Counter>::new(store);
/// counters.execute("7", 1, uuid::Uuid::new_v4()).await?;
/// let ended = trips.wait_for_end("7", Duration::from_secs(5)).await?;
/// assert_eq!(ended.status, Status::Completed);
/// runtime.drain(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
pub struct Runner<C: SagaState> {
    pub(super) definitions: Arc<Definitions<C>>,
    starts: Starts<C>,
    query: LogQuery,
    fault: Option<String>,
}

debug_fields!([C: SagaState] Runner<C> { definitions, query });

impl<C: SagaState> Clone for Runner<C> {
    fn clone(&self) -> Self {
        Self {
            definitions: self.definitions.clone(),
            starts: self.starts,
            query: self.query.clone(),
            fault: self.fault.clone(),
        }
    }
}

impl<C: SagaState> Runner<C> {
    /// Creates a runner for `saga`. An event that matches `query` starts a saga if `starts` returns an id for the
    /// event.
    ///
    /// The sagas live in the store of the service that the runner is added to.
    pub fn new(saga: Saga<C>, query: LogQuery, starts: Starts<C>) -> Self {
        let definitions = Definitions { current: Arc::new(saga), older: HashMap::new(), migrations: HashMap::new() };
        Self { definitions: Arc::new(definitions), starts, query, fault: None }
    }

    /// Returns a handle to the sagas in this store, so that code outside of the service can read them.
    pub fn on(&self, store: Arc<dyn EventStore>) -> Sagas<C> {
        let instances = Repository::of_framework(store.clone(), &self.category(), CACHED_AGGREGATES);
        Sagas { runner: self.clone(), instances, store, timers: Timers::default() }
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

    /// Registers an earlier definition. Sagas that were started under the earlier definition keep it. If two
    /// definitions had the same hash, one of them would never be used, so [`Runtime::start`](crate::Runtime::start)
    /// refuses such a service. See [`Plan::revision`](super::Plan::revision).
    pub fn older(mut self, saga: Saga<C>) -> Self {
        self.refuse_known(&saga.hash, "registered as older");
        self.with(|definitions| _ = definitions.older.insert(saga.hash.clone(), Arc::new(saga)))
    }

    fn refuse_known(&mut self, hash: &str, registered: &str) {
        let Definitions { current, older, migrations } = &*self.definitions;
        let known = if *hash == current.hash {
            "the current definition"
        } else if older.contains_key(hash) {
            "an older one"
        } else if migrations.contains_key(hash) {
            "one that sagas are migrated from"
        } else {
            return;
        };
        self.fault = Some(format!(
            "definition {hash} of saga {} is {registered}, and equals {known}: one of the two would never be used; \
             if a step now sends another command, or is undone in another way, give the new plan a `revision`",
            current.name
        ));
    }

    /// Returns the fault in the definitions, if any.
    pub(crate) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Moves sagas that were started under the definition with this hash to the current definition. Each saga moves
    /// when its next input arrives. `migrate` returns the saga's progress in the current plan, at the step with the
    /// same name. Steps that have not been requested yet may be added, removed or moved. A step that has been requested
    /// keeps its number at the participants, even if its place changes. A saga that would repeat a step, or leave a
    /// step without its undo, is not moved, and its input fails with [`SagaRefusal::CannotMigrate`].
    pub fn migrate(mut self, from: &str, migrate: fn(&Progress) -> Progress) -> Self {
        self.refuse_known(from, "to be migrated");
        self.with(|definitions| _ = definitions.migrations.insert(from.to_owned(), migrate))
    }

    /// Returns the name of the saga.
    pub fn name(&self) -> &'static str {
        self.definitions.current.name
    }

    pub(crate) fn category(&self) -> String {
        self.definitions.current.category()
    }

    pub(crate) fn query(&self) -> &LogQuery {
        &self.query
    }
}

/// The sagas of one [`Runner`] in one store.
///
/// A service runs the sagas in its own store. [`Runner::on`] returns a handle that reads the sagas of a store.
pub struct Sagas<C: SagaState> {
    pub(super) runner: Runner<C>,
    pub(super) instances: Repository<SagaInstance<C>>,
    pub(super) store: Arc<dyn EventStore>,
    pub(super) timers: Timers,
}

debug_fields!([C: SagaState] Sagas<C> { runner });

impl<C: SagaState> Clone for Sagas<C> {
    fn clone(&self) -> Self {
        Self {
            runner: self.runner.clone(),
            instances: self.instances.clone(),
            store: self.store.clone(),
            timers: self.timers.clone(),
        }
    }
}

impl<C: SagaState> Sagas<C> {
    /// Returns the index of these sagas.
    pub(crate) fn index(&self) -> Index {
        Index::telling(self.timers.clone())
    }

    /// Returns the current state of one saga from the store, or `None` if the saga never started.
    pub async fn saga(&self, id: &str) -> Result<Option<SagaInstance<C>>, WorkError<SagaRefusal>> {
        let instance = self.instances.state(id).await?;
        Ok(instance.progress.is_some().then_some(instance))
    }

    pub(super) fn ask(&self, id: &str, what: SagaInput<C>) -> SagaCommand<C> {
        let saga_id = named_id(named_id(Uuid::NAMESPACE_OID, &self.runner.category()), id);
        SagaCommand {
            definitions: self.runner.definitions.clone(),
            saga_id,
            now: self.store.clock().now().timestamp_millis(),
            what,
        }
    }

    async fn start(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if let Some((id, context)) = (self.runner.starts)(message)? {
            work.create(&self.instances, &id, &self.ask(&id, SagaInput::Begin(context))).await?;
        }
        Ok(())
    }

    /// Passes a reply to a saga in the same work that carries out the step. Returns `false` if the reply must be sent
    /// over the bus. This is so for a step with several participants, whose replies would compete for the stream of the
    /// saga, and for a reply that the saga cannot handle, which is then parked in the inbox of the saga's service.
    ///
    /// If an attempt to commit fails, the reason may be that the saga has changed. The next attempt therefore leaves
    /// the saga alone, so that the participant does not carry out the step again and again.
    async fn pass(&self, saga_id: &str, reply: &Reply, work: &mut Work) -> Result<bool, StoreError> {
        if work.is_repeated() {
            return Ok(false);
        }
        let passed = async {
            let saga = work.load(&self.instances, saga_id).await?;
            if saga.progress.is_none_or(|progress| progress.calls.len() != 1) {
                return Ok(false);
            }
            let ask = self.ask(saga_id, SagaInput::Reply(reply.clone()));
            work.execute(&self.instances, saga_id, &ask).await.map(|_| true)
        };
        match passed.await {
            Err(WorkError::Store(error @ StoreError::Unavailable(_))) => Err(error),
            passed => Ok(passed.unwrap_or(false)),
        }
    }

    /// Handles a reply. `not_stored` is set if the store has refused the effects that an earlier attempt to handle this
    /// reply staged; the step that the reply answers then counts as failed.
    async fn reply(
        &self,
        saga_id: &str,
        message: &Message,
        not_stored: Option<&str>,
        work: &mut Work,
    ) -> Result<(), HandlerError> {
        let Some(StepEvent::Replied { mut reply, .. }) = message.decode()? else { return Ok(()) };
        if let Some(reason) = not_stored {
            reply.outcome = Outcome::Failed(format!("the answer cannot be recorded: {reason}"));
        }
        reply.outcome = reply.outcome.cleaned();
        let ask = self.ask(saga_id, SagaInput::Reply(reply));
        match work.execute(&self.instances, saga_id, &ask).await {
            Ok(_) => Ok(()),
            // The log lost the saga when its database was restored. When the saga starts again, it sends its commands
            // again and gets new replies.
            Err(WorkError::Refused(SagaRefusal::NotStarted)) => {
                tracing::warn!(
                    saga = %message.key, id = %message.id,
                    "ignoring an answer to a saga that the log does not hold"
                );
                Ok(())
            }
            Err(WorkError::Refused(refusal)) if refusal.awaits_build() => Err(HandlerError::await_build(refusal)),
            refused => refused.map(drop).terminal(),
        }
    }
}

/// Starts sagas from the log.
pub(crate) struct Starter<C: SagaState>(pub Sagas<C>);

#[async_trait]
impl<C: SagaState> Handler for Starter<C> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        self.0.start(message, work).await
    }
}

/// Handles the replies to the sagas of one definition. The trait hides the type of the sagas' data.
#[async_trait]
pub(crate) trait Replies: Send + Sync {
    fn category(&self) -> String;
    /// Makes the state of a saga in memory include the event that sent a command. The command may arrive before the
    /// process has seen that its own commit succeeded; if the state in memory lacked the event, the next commit would
    /// fail.
    async fn meet(&self, saga_id: &str, event: Uuid) -> Result<(), StoreError>;
    async fn pass(&self, saga_id: &str, reply: &Reply, work: &mut Work) -> Result<bool, StoreError>;
    async fn reply(
        &self,
        saga_id: &str,
        message: &Message,
        not_stored: Option<&str>,
        work: &mut Work,
    ) -> Result<(), HandlerError>;
}

#[async_trait]
impl<C: SagaState> Replies for Sagas<C> {
    fn category(&self) -> String {
        self.runner.category()
    }

    async fn meet(&self, saga_id: &str, event: Uuid) -> Result<(), StoreError> {
        match self.instances.update(saga_id, event).await {
            Err(WorkError::Store(error @ StoreError::Unavailable(_))) => Err(error),
            // The reply is sent over the bus, and the inbox of the saga's service reports the error.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    async fn pass(&self, saga_id: &str, reply: &Reply, work: &mut Work) -> Result<bool, StoreError> {
        Sagas::pass(self, saga_id, reply, work).await
    }

    async fn reply(
        &self,
        saga_id: &str,
        message: &Message,
        not_stored: Option<&str>,
        work: &mut Work,
    ) -> Result<(), HandlerError> {
        Sagas::reply(self, saga_id, message, not_stored, work).await
    }
}
