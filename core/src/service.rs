//! Services and the runtime. A service publishes events, executes steps of sagas, and runs sagas of its own. The
//! runtime runs the tasks of all services.

pub mod recovery;
mod start_error;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use tokio::{sync::OnceCell, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    archive::is_half_imported,
    base::{
        name::{self, NameError, Names, SERVICE_BYTES_MAX, is_service_name},
        panic::caught,
    },
    bus::{Bus, Message, Publisher},
    decide::{categories, work::Work},
    event::StreamId,
    follow::{consumer::Group, peer::Peer, relay_progress::relay_of, subscription::Subscription},
    handler::{Handler, HandlerError, Terminal},
    health::{Health, Held, State},
    project::read_model::{Projection, ReadModel},
    relay::{Relay, Routes},
    saga::{self, Desk, NearSagas, Participant, Replies, Runner, SagaState, Starter, StepEvent, StepHandler},
    store::{EventStore, LogQuery, StoreError, tail::Tail},
};

pub use self::start_error::StartError;

/// How long the index of sagas may lag under low load. A saga timer may fire late by the same amount.
const INDEX_PAUSE: Duration = Duration::from_millis(200);
/// How often a process checks for handlers that do not return.
const WATCH: Duration = Duration::from_secs(1);
/// How long aborted parts may take to end. Each aborted part ends at its next await.
const CUT_OFF: Duration = Duration::from_secs(1);

/// The definition of a service that has not been started yet.
///
/// Services communicate only through the bus. Several services in one process may share a store, because each service
/// reads and writes only its own categories.
///
/// In this example, the service `shop` publishes the events of its orders, and the service `mail` handles them.
///
/// ```
/// use std::sync::Arc;
///
/// use annals::{EventStore, Group, Handler, HandlerError, MemoryStore, Message, Service, Work};
/// use async_trait::async_trait;
///
/// struct Greet;
///
/// #[async_trait]
/// impl Handler for Greet {
///     async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
///         // An outside effect happens at least once, so the mail provider gets a key for repeated requests.
///         println!("greet the customer of {}, once for the key {}", message.subject, work.cause_id());
///         Ok(())
///     }
/// }
///
/// /// Each service has its own store.
/// fn services(of_shop: Arc<dyn EventStore>, of_mail: Arc<dyn EventStore>) -> Vec<Service> {
///     let orders = Group::new("mail.orders", &["shop.events"], Greet);
///     vec![Service::new("shop", of_shop).publish(&["order"]), Service::new("mail", of_mail).consume(orders)]
/// }
///
/// let services = services(Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
/// assert_eq!(services.len(), 2);
/// ```
///
/// A [`Runtime`] starts the services.
pub struct Service {
    name: String,
    store: Arc<dyn EventStore>,
    routes: Routes,
    relay_lanes: u32,
    desk: Option<Arc<dyn Desk>>,
    members: u32,
    replies: Vec<Arc<dyn Replies>>,
    subscriptions: Vec<Subscription>,
    /// The names of the subscriptions that start sagas.
    starters: Vec<String>,
    groups: Vec<Group>,
    read_models: Vec<&'static str>,
    parts: Vec<Part>,
    fault: Option<String>,
}

debug_fields!(Service { name, read_models, members });

type Part = Box<dyn FnOnce(ServiceContext) -> BoxFuture<'static, Result<(), String>> + Send>;

/// The context that a part runs in.
struct ServiceContext {
    /// The tail of the service's store.
    store: Arc<dyn EventStore>,
    instance: Option<Peer>,
    bus_is_local: bool,
    health: Health,
    shutdown: CancellationToken,
}

impl Service {
    /// Creates a service with this name and store. The service publishes its events to the topic `<name>.events` and
    /// receives its commands from `<name>.commands`.
    pub fn new(name: &str, store: Arc<dyn EventStore>) -> Self {
        Self {
            name: name.to_owned(),
            store,
            routes: Routes::of(name),
            relay_lanes: 1,
            desk: None,
            members: 1,
            replies: Vec::new(),
            subscriptions: Vec::new(),
            starters: Vec::new(),
            groups: Vec::new(),
            read_models: Vec::new(),
            parts: Vec::new(),
            fault: None,
        }
    }

    /// Publishes the events of these categories.
    pub fn publish(mut self, categories: &[&str]) -> Self {
        categories.iter().for_each(|category| self.routes.publish(category));
        self
    }

    /// Lets the service execute steps of its own sagas and of the sagas of other services. A service has at most one
    /// participant, with one enum of commands.
    ///
    /// # Panics
    /// Panics if the service already has a participant, because the commands of the first participant would never be
    /// executed.
    pub fn participant(mut self, participant: impl Participant) -> Self {
        assert!(
            self.desk.is_none(),
            "service {} already has a participant: put the commands of both in one enum",
            self.name
        );
        self.desk = Some(Arc::new(StepHandler::new(&self.name, self.store.clone(), participant)));
        self
    }

    /// Sets how many members of the service's consumer group handle commands in parallel; see [`Group::members`].
    pub fn members(mut self, members: u32) -> Self {
        self.members = members;
        self
    }

    /// Sets the number of lanes that the relay publishes in; see [`Relay::lanes`].
    pub fn relay_lanes(mut self, lanes: u32) -> Self {
        self.relay_lanes = lanes;
        self
    }

    /// Runs the sagas of this runner's definition in the store of the service.
    pub fn saga<C: SagaState>(mut self, runner: Runner<C>) -> Self {
        let name = format!("{}.{}", self.name, runner.name());
        self.fault = self.fault.or_else(|| runner.fault().map(str::to_owned));
        self.routes.saga(&runner.category());
        let sagas = runner.on(self.store.clone());
        let starter = Subscription::new(&format!("{name}.start"), Starter(sagas.clone())).query(runner.query().clone());
        self.starters.push(format!("{name}.start"));
        let of_saga = LogQuery::categories([runner.category()]);
        // The index has a linger time so that a saga that ends within this time is written to the index only once.
        let index = Subscription::new(&format!("{name}.index"), sagas.index()).query(of_saga).linger(INDEX_PAUSE);
        self.subscriptions.extend([starter, index]);
        self.replies.push(Arc::new(sagas.clone()));
        let service = self.name.clone();
        self.parts.push(Box::new(|ServiceContext { store, bus_is_local, health, shutdown, .. }| {
            // On a local bus, a message counts as sent only once the receiver has handled it. If timers waited for the
            // relay, they would also wait for a slow participant, although a timeout must detect exactly such a
            // participant.
            let relayed_by = (!bus_is_local).then_some(service.clone());
            let ends = shutdown.clone();
            let inbox_read = async move {
                if !bus_is_local {
                    recovery::inbox_read(&*store, &service, &ends).await;
                }
            };
            Box::pin(sagas.timers(relayed_by, inbox_read, health, shutdown))
        }));
        self
    }

    /// Follows the service's own log.
    pub fn subscribe(mut self, subscription: Subscription) -> Self {
        self.subscriptions.push(subscription);
        self
    }

    /// Maintains the views of a read model.
    pub fn project<R: ReadModel>(mut self, projection: Projection<R>) -> Self {
        self.read_models.push(R::NAME);
        self.parts.push(Box::new(|ServiceContext { store, instance, health, shutdown, .. }| {
            Box::pin(projection.shared(instance).run(store, health, shutdown).map_err(|error| error.to_string()))
        }));
        self
    }

    /// Adds a group, which consumes the topics of other services.
    pub fn consume(mut self, group: Group) -> Self {
        self.groups.push(group);
        self
    }

    /// Reserves the names of all parts that store documents.
    fn take_names(&self, names: &mut Names) -> Result<(), NameError> {
        name::check("service", &self.name)?;
        names.take("relay", &relay_of(&self.name))?;
        if self.desk.is_some() || !self.replies.is_empty() {
            names.take("group", &self.inbox())?;
        }
        self.subscriptions.iter().try_for_each(|subscription| names.take("subscription", subscription.name()))?;
        self.groups.iter().try_for_each(|group| names.take("group", group.name()))?;
        self.read_models.iter().try_for_each(|model| names.take("read model", model))
    }

    /// The topic of the service's commands, which is also the name of the group that consumes it.
    fn inbox(&self) -> String {
        format!("{}.commands", self.name)
    }

    /// The group that consumes the topic of the service's commands; `None` if the service neither carries out steps nor
    /// runs sagas. Replies to those sagas in `near` that are on the service's store are not sent over the bus.
    fn inbox_group(&self, near: &[(Arc<dyn EventStore>, NearSagas)]) -> Option<Group> {
        if self.desk.is_none() && self.replies.is_empty() {
            return None;
        }
        let on_store = near.iter().filter(|(store, _)| Arc::ptr_eq(store, &self.store));
        let near = on_store.map(|(_, near)| near.clone()).collect();
        let inbox = Inbox { replies: self.replies.clone(), desk: self.desk.clone(), near };
        let topic = self.inbox();
        Some(Group::new(&topic, &[&topic], inbox).members(self.members))
    }
}

impl Service {
    /// Returns why the name of the service is not valid.
    fn name_fault(&self) -> Option<String> {
        let name = &self.name;
        if !is_service_name(name) {
            return Some(format!(
                "the name is part of topic names, so it may have only letters, digits, `.`, `_` and `-`, at most \
                 {SERVICE_BYTES_MAX} of them"
            ));
        }
        // The step streams of the service have this category.
        let checked = self.desk.as_ref().map(|_| categories::check(&format!("step.{name}")));
        Some(format!("the service carries out steps, so the name is part of a category: {}", checked?.err()?))
    }

    /// The categories that the service publishes or follows.
    fn categories(&self) -> Vec<Arc<str>> {
        let followed = self.subscriptions.iter().flat_map(Subscription::categories);
        self.routes.published().iter().chain(followed).cloned().collect()
    }
}

/// The work to do before the first message of a group, if the store was recovered.
struct Recovered {
    service: String,
    store: Arc<dyn EventStore>,
    starters: Vec<String>,
    desk: Option<Arc<dyn Desk>>,
}

impl Recovered {
    async fn settle(&self, health: &Health, shutdown: &CancellationToken) {
        let Self { service, store, starters, desk } = self;
        if let Some(desk) = desk {
            saga::settle(service, store, &**desk, health, shutdown).await;
        }
        recovery::sagas_begun(&**store, starters, shutdown).await;
    }
}

/// The handler for the topic `<service>.commands`, which carries replies to the service's sagas, and steps that the
/// service must execute.
struct Inbox {
    replies: Vec<Arc<dyn Replies>>,
    desk: Option<Arc<dyn Desk>>,
    /// The sagas to which the service's own replies are passed without the bus.
    near: Vec<NearSagas>,
}

impl Inbox {
    /// Returns the runner and the stream of the saga to which a reply is addressed; `None` for a message that is not a
    /// reply.
    fn runs(&self, message: &Message) -> Result<Option<(&dyn Replies, StreamId)>, HandlerError> {
        let is_reply = <StepEvent as crate::Event>::TYPES.iter().any(|known| *known.name == *message.type_name);
        if !is_reply {
            return Ok(None);
        }
        let saga = StreamId::from_stored(&message.key);
        let runs_it = self.replies.iter().find(|replies| replies.category() == saga.category());
        let unknown = || HandlerError::await_build(format!("this build does not run {}", saga.category()));
        let replies = runs_it.ok_or_else(unknown)?;
        Ok(Some((&**replies, saga)))
    }
}

/// Returns the sagas that get the replies of steps without the bus, each with its store. On a bus between processes, a
/// reply must be in a topic, because the log can be restored only from the topics.
fn near(services: &[Service], bus: &dyn Bus) -> Vec<(Arc<dyn EventStore>, NearSagas)> {
    let services = services.iter().filter(|_| bus.is_local());
    let sagas_of = |service: &Service| {
        let name: Arc<str> = Arc::from(&*service.name);
        let store = service.store.clone();
        let near =
            move |sagas: &Arc<dyn Replies>| (store.clone(), NearSagas { service: name.clone(), sagas: sagas.clone() });
        service.replies.iter().map(near).collect::<Vec<_>>()
    };
    services.flat_map(sagas_of).collect()
}

fn no_participant(message: &Message) -> String {
    format!(
        "this service carries out no steps, so no participant handles {}: give the service a participant",
        message.type_name
    )
}

#[async_trait]
impl Handler for Inbox {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        match (self.runs(message)?, &self.desk) {
            (Some((replies, saga)), _) => replies.reply(saga.id(), message, None, work).await,
            (None, Some(desk)) => desk.take(message, None, &self.near, work).await,
            (None, None) => Err(no_participant(message)).terminal(),
        }
    }

    async fn refused(&self, message: &Message, reason: &str, work: &mut Work) -> Result<(), HandlerError> {
        match (self.runs(message)?, &self.desk) {
            (Some((replies, saga)), _) => replies.reply(saga.id(), message, Some(reason), work).await,
            (None, Some(desk)) => desk.take(message, Some(reason), &self.near, work).await,
            (None, None) => Err(no_participant(message)).terminal(),
        }
    }
}

/// The error type of the user's own parts. The `?` operator converts any error into this type.
pub type PartError = Box<dyn std::error::Error + Send + Sync>;

/// Why a runtime did not stop cleanly. All parts have ended or were aborted, and no data is lost.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DrainError {
    /// A part had failed or panicked. If several parts failed, this is the first of them.
    #[error("{part}: {reason}")]
    Failed {
        /// The name of the part.
        part: String,
        /// The error or the panic.
        reason: String,
    },
    /// Parts did not stop in time and were aborted.
    #[error(
        "{}parts that did not stop within {patience:?} were aborted: {}",
        failed.as_ref().map(|failed| format!("{failed}; ")).unwrap_or_default(),
        parts.join(", ")
    )]
    CutOff {
        /// The names of the parts.
        parts: Vec<String>,
        /// The time that the parts had to stop.
        patience: Duration,
        /// The part that had failed, if any.
        failed: Option<Box<DrainError>>,
    },
}

#[derive(Default)]
struct Kept {
    services: Vec<String>,
    sagas: Vec<(Arc<dyn EventStore>, String)>,
    watches: Vec<BoxFuture<'static, ()>>,
}

/// All running services and parts of a process. A part is a named task, and its state appears in [`Health`]. Services
/// and parts are started and stopped together.
///
/// In this example, `Counter` is an [`Aggregate`](crate::Aggregate), and `Greet` is a [`Handler`] that sends
/// the type of each message to a channel.
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
/// # struct Greet(tokio::sync::mpsc::Sender<String>);
/// # #[async_trait::async_trait]
/// # impl annals::Handler for Greet {
/// #     async fn handle(&self, message: &annals::Message, _: &mut annals::Work) -> Result<(), annals::HandlerError> {
/// #         Ok(self.0.send(message.type_name.to_string()).await?)
/// #     }
/// # }
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::{sync::Arc, time::Duration};
///
/// use annals::{EventStore, Group, LocalBus, MemoryStore, Repository, Runtime, Service};
///
/// let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
/// let counters = Repository::<Counter>::new(store.clone());
/// let (sender, mut receiver) = tokio::sync::mpsc::channel(16);
/// let counting = Service::new("counting", store).publish(&["counter"]);
/// let greeting = Service::new("greeting", Arc::new(MemoryStore::new()))
///     .consume(Group::new("greeting.counters", &["counting.events"], Greet(sender)));
///
/// let mut runtime = Runtime::new();
/// runtime.start(vec![counting, greeting], Arc::new(LocalBus::default())).await?;
/// counters.execute("visits", 1, uuid::Uuid::new_v4()).await?;
/// assert_eq!(receiver.recv().await.as_deref(), Some("counter.raised"));
/// assert!(runtime.health().is_fine());
/// // On SIGTERM, a service gives its parts some time to finish their work.
/// runtime.drain(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
pub struct Runtime {
    tasks: JoinSet<(String, Result<(), String>)>,
    /// The name of the part that each task belongs to.
    task_names: HashMap<tokio::task::Id, String>,
    /// The tasks that watch the other parts. The task that logs messages whose handlers do not return is started with
    /// the first service.
    watch: JoinSet<()>,
    watches: bool,
    services: BTreeSet<String>,
    /// The category of each saga definition that the runtime runs, with the store of its service.
    sagas: Vec<(Arc<dyn EventStore>, String)>,
    shutdown: CancellationToken,
    health: Health,
    /// The names of all started parts.
    names: Names,
    /// The instance name under which the runtime shares its stores with other processes.
    shared_as: Option<String>,
    /// The stores of the services, each with the tail through which all parts on that store follow the log.
    tails: Vec<(Arc<dyn EventStore>, Arc<dyn EventStore>)>,
    /// The runtime's instance on each store.
    instances: Vec<(Arc<dyn EventStore>, Peer)>,
    heartbeats: JoinSet<()>,
    /// Stops the heartbeats once the runtime holds no more lanes.
    leave: CancellationToken,
}

debug_fields!(Runtime { services, shared_as });

impl Default for Runtime {
    fn default() -> Self {
        Self::new()
    }
}

impl Runtime {
    /// Creates an empty runtime.
    pub fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            task_names: HashMap::new(),
            watch: JoinSet::new(),
            watches: false,
            services: BTreeSet::new(),
            sagas: Vec::new(),
            shutdown: CancellationToken::new(),
            health: Health::default(),
            names: Names::default(),
            shared_as: None,
            tails: Vec::new(),
            instances: Vec::new(),
            heartbeats: JoinSet::new(),
            leave: CancellationToken::new(),
        }
    }

    /// Creates an empty runtime for one of several processes that use the same store. The processes share the lanes of
    /// the log. By contrast, a runtime that is created with [`new`](Self::new) follows all lanes itself, and fences any
    /// process that followed the lanes before. `instance` is a name that no other process uses at the same time. A
    /// process that restarts with the same name after a crash gets its lanes and its partitions back at once. Other
    /// processes get the lanes after the crashed process has sent no heartbeat for five seconds. Other processes get
    /// the partitions after the bus has noticed the crash.
    pub fn shared(instance: &str) -> Self {
        Self { shared_as: Some(instance.to_owned()), ..Self::new() }
    }

    /// The health of all parts.
    pub fn health(&self) -> Health {
        self.health.clone()
    }

    /// The token that is cancelled when the runtime drains. The user's own parts use the token to end in time.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts services on a bus. All services join the bus before any service publishes, so that no message is missed.
    /// The services on one store read the end of the log together, through one [`Tail`].
    ///
    /// # Errors
    /// Fails if a name is not valid or is used twice, if the bus cannot be joined, if a store is incomplete, or for
    /// another reason that [`StartError`] lists. In these cases, nothing is started.
    pub async fn start(&mut self, services: Vec<Service>, bus: Arc<dyn Bus>) -> Result<(), StartError> {
        self.start_boxed(services, bus).await
    }

    /// Starts services, as a boxed future. The compiler generates the code of an async function in the crate that polls
    /// its future. This future is boxed, so its code is generated in this crate, and the engine is not compiled again
    /// in every program that starts a runtime.
    fn start_boxed(&mut self, services: Vec<Service>, bus: Arc<dyn Bus>) -> BoxFuture<'_, Result<(), StartError>> {
        self.start_all(services, bus).boxed()
    }

    async fn start_all(&mut self, services: Vec<Service>, bus: Arc<dyn Bus>) -> Result<(), StartError> {
        self.check_names(&services)?;
        let mut names = self.names.clone();
        services.iter().try_for_each(|service| service.take_names(&mut names))?;
        let mut stores: Vec<_> = services.iter().map(|service| (service.name.clone(), service.store.clone())).collect();
        for (service, store) in &stores {
            recovery::check(service, &**store, &*bus).await?;
        }
        stores.dedup_by(|(_, next), (_, store)| Arc::ptr_eq(next, store));
        for (service, store) in stores {
            if is_half_imported(&*store).await? {
                return Err(StartError::HalfImported { service });
            }
        }
        self.start_watch();
        let kept = self.kept(&services);
        let mut joined = Vec::new();
        let near = near(&services, &*bus);
        let instance: Option<Arc<str>> = self.shared_as.as_deref().map(Arc::from);
        for service in services {
            let mut groups = Vec::new();
            if let Some(group) = service.inbox_group(&near) {
                let name = group.name().to_owned();
                let group = group.shared(instance.clone()).join(&*bus).await?;
                groups.push((name, group, service.starters, service.desk));
            }
            for group in service.groups {
                let name = group.name().to_owned();
                groups.push((name, group.shared(instance.clone()).join(&*bus).await?, Vec::new(), None));
            }
            let relay = Relay::new(service.routes).lanes(service.relay_lanes);
            let tail = self.tail_of(&service.store).await?;
            joined.push((service.name, service.store, tail, relay, groups, service.subscriptions, service.parts));
        }
        self.names = names;
        self.keep(kept);
        for (name, store, tail, relay, groups, subscriptions, parts) in joined {
            let health = self.health();
            let shutdown = self.shutdown();
            let instance = self.instance_on(&store);
            for (group_name, group, starters, desk) in groups {
                let recovered = Recovered { service: name.clone(), store: store.clone(), starters, desk };
                let recovered = Arc::new(recovered);
                let settled = Arc::new(OnceCell::new());
                for member in group.members(&tail, &health, &shutdown) {
                    let recovered = recovered.clone();
                    let settled = settled.clone();
                    let health = health.clone();
                    let shutdown = shutdown.clone();
                    self.spawn_worker(&group_name, async move {
                        settled.get_or_init(|| recovered.settle(&health, &shutdown)).await;
                        member.await.map_err(|error| error.to_string())
                    });
                }
            }
            for subscription in subscriptions {
                let part = subscription.name().to_owned();
                let subscription = subscription.shared(instance.clone());
                subscription.workers(&tail, &health, &shutdown).for_each(|lane| self.spawn_worker(&part, lane.map(Ok)));
            }
            for part in parts {
                let surroundings = ServiceContext {
                    store: tail.clone(),
                    instance: instance.clone(),
                    bus_is_local: bus.is_local(),
                    health: health.clone(),
                    shutdown: shutdown.clone(),
                };
                self.spawn_as(name.clone(), part(surroundings));
            }
            if !bus.is_local() {
                let watch = recovery::watch(name.clone(), store.clone(), bus.clone(), shutdown.clone());
                self.spawn(format!("{name}.history"), watch.err_into());
            }
            let publisher: Arc<dyn Publisher> = bus.clone();
            let carriers = relay.shared(instance).carriers(&tail, &publisher, &health, &shutdown);
            carriers.for_each(|lane| self.spawn_worker(&format!("{name}.relay"), lane.map(Ok)));
        }
        Ok(())
    }

    /// Returns the tail of a store. All services on this store share the tail, so that they read the end of the log
    /// once.
    async fn tail_of(&mut self, store: &Arc<dyn EventStore>) -> Result<Arc<dyn EventStore>, StoreError> {
        if let Some((_, tail)) = self.tails.iter().find(|(known, _)| Arc::ptr_eq(known, store)) {
            return Ok(tail.clone());
        }
        let tail = Tail::over(store).await?;
        self.tails.push((store.clone(), tail.clone()));
        Ok(tail)
    }

    /// Returns the instance of this process on a store. The first call starts the heartbeat of the instance on this
    /// store.
    fn instance_on(&mut self, store: &Arc<dyn EventStore>) -> Option<Peer> {
        let name = self.shared_as.as_ref()?;
        if let Some((_, instance)) = self.instances.iter().find(|(known, _)| Arc::ptr_eq(known, store)) {
            return Some(instance.clone());
        }
        let instance = Peer::named(name);
        self.heartbeats.spawn(instance.clone().run(store.clone(), self.health(), self.shutdown(), self.leave.clone()));
        self.instances.push((store.clone(), instance.clone()));
        Some(instance)
    }

    /// Starts one of the user's own parts. The part should end when [`shutdown`](Self::shutdown) is cancelled. An error
    /// or panic of the part appears in [`health`](Self::health) immediately, and is returned by [`drain`](Self::drain).
    pub fn spawn(
        &mut self,
        part: impl Into<String>,
        task: impl Future<Output = Result<(), PartError>> + Send + 'static,
    ) {
        let part = self.own_name(part.into());
        self.spawn_as(part, task.map_err(|error| error.to_string()));
    }

    /// Returns a name that no other part of the runtime has. Otherwise, the health report would show two parts with the
    /// same name as one.
    fn own_name(&self, part: String) -> String {
        let taken = |name: &String| self.task_names.values().any(|known| known == name);
        if !taken(&part) {
            return part;
        }
        let mut numbered = (2_u32..).map(|number| format!("{part}#{number}"));
        numbered.find(|name| !taken(name)).unwrap_or(part)
    }

    fn spawn_as(&mut self, part: String, task: impl Future<Output = Result<(), String>> + Send + 'static) {
        let health = self.health();
        let name = part.clone();
        let spawned = self.tasks.spawn(async move {
            let ended = caught(task).await.unwrap_or_else(|panic| Err(panic.to_string()));
            if let Err(error) = &ended {
                tracing::error!(%part, %error, "ended");
                health.set(&part, State::Failed(error.clone()));
            }
            (part, ended)
        });
        self.task_names.insert(spawned.id(), name);
    }

    /// Runs a worker directly in a task of the runtime, not in a subtask, so that a worker that is dropped or aborted
    /// does nothing more. Panics of handlers are caught inside the worker; a panic of the engine itself shuts the
    /// runtime down.
    fn spawn_worker(&mut self, part: &str, worker: impl Future<Output = Result<(), String>> + Send + 'static) {
        let shutdown = self.shutdown();
        self.spawn_as(part.to_owned(), async move {
            caught(worker).await.unwrap_or_else(|panic| {
                shutdown.cancel();
                Err(panic.to_string())
            })
        });
    }

    /// Checks the names of services before anything starts. Otherwise, a bad name would be noticed only later, because
    /// some messages would reach no service, or two services.
    fn check_names(&self, services: &[Service]) -> Result<(), StartError> {
        self.shared_as.iter().try_for_each(|instance| name::check("instance", instance))?;
        for Service { name, fault, .. } in services {
            if let Some(reason) = fault.clone() {
                return Err(StartError::Definitions { service: name.clone(), reason });
            }
        }
        let mut names = self.services.clone();
        let mut sagas = self.sagas.clone();
        let twice = |kind, name: String| StartError::from(NameError::Taken { name, first: kind, second: kind });
        for service in services {
            let unusable = |kind, name: &str, reason| NameError::Malformed { kind, name: name.to_owned(), reason };
            if let Some(reason) = service.name_fault() {
                return Err(unusable("service", &service.name, reason).into());
            }
            for category in service.routes.published() {
                categories::check_own(category).map_err(|reason| unusable("published category", category, reason))?;
            }
            for category in service.subscriptions.iter().flat_map(Subscription::categories) {
                let checked = categories::check(category).map_err(|error| error.to_string());
                checked.map_err(|reason| unusable("followed category", category, reason))?;
            }
            if !names.insert(service.name.clone()) {
                return Err(twice("service", service.name.clone()));
            }
            for replies in &service.replies {
                let store = &service.store;
                let category = replies.category();
                if sagas.iter().any(|(known, of)| Arc::ptr_eq(known, store) && *of == category) {
                    let name = category.trim_start_matches("saga.").to_owned();
                    return Err(twice("saga", name));
                }
                sagas.push((store.clone(), category));
            }
        }
        Ok(())
    }

    /// Returns the names that the runtime remembers after these services have started, and the tasks that watch the
    /// categories and topics of the services.
    fn kept(&self, services: &[Service]) -> Kept {
        let mut kept = Kept::default();
        for service in services {
            kept.services.push(service.name.clone());
            let sagas = service.replies.iter().map(|replies| (service.store.clone(), replies.category()));
            kept.sagas.extend(sagas);
            let own = service.categories().into_iter().filter(|category| categories::check_own(category).is_ok());
            let name = service.name.clone();
            let store = service.store.clone();
            kept.watches.push(Box::pin(categories::watch(name, store, own.collect(), self.health())));
            for group in &service.groups {
                kept.watches.push(Box::pin(group.watch(service.store.clone(), self.health())));
            }
        }
        kept
    }

    fn keep(&mut self, kept: Kept) {
        self.services.extend(kept.services);
        self.sagas.extend(kept.sagas);
        for watch in kept.watches {
            self.watch.spawn(watch);
        }
    }

    /// Aborts the remaining parts and returns their names. A part that blocks its thread cannot be aborted and is left
    /// running.
    async fn cut_off(&mut self) -> Vec<String> {
        let mut left: BTreeMap<String, u32> = BTreeMap::new();
        self.task_names.values().for_each(|name| *left.entry(name.clone()).or_default() += 1);
        let held = self.health.held();
        for part in left.keys() {
            let message = held.iter().find(|held| held.part.starts_with(part.as_str()));
            let message = message.map(|held| format!("{} ({}, key {})", held.id, held.type_name, held.key));
            let message = message.unwrap_or_else(|| "none".into());
            tracing::error!(%part, %message, "a part did not stop in time and was aborted");
            self.health.count("annals_parts_cut_off_total", &[("part", part)]);
        }
        self.tasks.abort_all();
        let joined = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(CUT_OFF, joined).await.is_err() {
            self.tasks.detach_all();
        }
        left.into_keys().collect()
    }

    /// Logs each message whose handler does not return, once per message.
    fn start_watch(&mut self) {
        if std::mem::replace(&mut self.watches, true) {
            return;
        }
        let health = self.health();
        self.watch.spawn(async move {
            let mut reported: BTreeMap<String, tokio::time::Instant> = BTreeMap::new();
            loop {
                tokio::time::sleep(WATCH).await;
                let held = health.held();
                reported.retain(|part, since| held.iter().any(|held| held.part == *part && held.since == *since));
                for Held { part, id, key, type_name, position, since } in held {
                    if reported.insert(part.clone(), since).is_none() {
                        let seconds = since.elapsed().as_secs();
                        health.count("annals_handlers_hung_total", &[("part", &part)]);
                        tracing::error!(%part, message = %id, %key, %type_name, position, seconds, "a handler does not return");
                    }
                }
            }
        });
    }

    /// Stops the runtime. Once this method is called, no part accepts new work, and every part has at most `patience`
    /// to finish its current work. Returns once all parts have ended or were aborted.
    ///
    /// # Errors
    /// Returns the first error or panic of a part, and the names of the parts that did not end in time. Those parts are
    /// aborted, which loses no data.
    pub async fn drain(mut self, patience: Duration) -> Result<(), DrainError> {
        self.shutdown.cancel();
        let mut failed: Option<DrainError> = None;
        let joined = tokio::time::timeout(patience, async {
            while let Some(ended) = self.tasks.join_next_with_id().await {
                let (id, reason) = match ended {
                    Ok((id, (_, Ok(())))) => (id, None),
                    Ok((id, (_, Err(error)))) => (id, Some(error)),
                    Err(panic) => (panic.id(), Some(panic.to_string())),
                };
                let part = self.task_names.remove(&id).unwrap_or_default();
                let Some(reason) = reason else { continue };
                failed.get_or_insert(DrainError::Failed { part, reason });
            }
        });
        let in_time = joined.await.is_ok();
        let left = self.cut_off().await;
        // The heartbeats end only now, because the process holds its lanes until this point.
        self.leave.cancel();
        _ = tokio::time::timeout(patience, self.heartbeats.join_all()).await;
        if !in_time {
            return Err(DrainError::CutOff { parts: left, patience, failed: failed.map(Box::new) });
        }
        failed.map_or(Ok(()), Err)
    }
}
