//! Read models. A read model follows the log and keeps views up to date. A rebuild fills new views next to the live
//! views, and the new views then replace the live views.

use std::{marker::PhantomData, sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{
        backoff::Backoff,
        json::to_json_exact,
        name::{self, NameError},
    },
    bus::Message,
    commit::{Document, DocumentKey},
    decide::work::Work,
    event::{Event, Position},
    follow::{peer::Peer, subscription::Subscription, worker::RetryPolicy},
    handler::{Handler, HandlerError, Terminal},
    health::{Health, Reporter, State},
    project::generation::{self, Pointer, collection},
    store::{EventStore, LogQuery, Scan, StoreError, WaitError, end_before},
};

pub use crate::project::rebuild::{Compared, Difference, Rebuild, RebuildError, Rebuilt, SwapError};

/// How often a running projection checks whether another generation has become live.
const SWAP_TICK: Duration = Duration::from_millis(500);
/// How long the live views of a later version may stay unchanged before health reports that no process maintains them.
const NEGLECTED: Duration = Duration::from_secs(10);
/// How long a service waits after a failed build before it builds the views of its version again. The wait is long
/// because a build reads the whole log, and because a build that failed usually fails again.
const BUILD_AGAIN: Duration = Duration::from_secs(60);

/// The shortest and the longest interval at which a caller that waits for a position reads the checkpoint of the views.
/// The first interval is short, because a projection often applies new events within a few milliseconds.
const WAIT_LOOK_MIN: Duration = Duration::from_millis(2);
const WAIT_LOOK_MAX: Duration = Duration::from_millis(50);

/// Folds events into views. Each view is a document with a key. The methods must be pure functions, so that the views
/// can be rebuilt at any time.
///
/// In this example, `counters` is a [`Repository`](crate::Repository) whose aggregate records `CounterEvent`s.
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
/// use std::{sync::Arc, time::Duration};
///
/// use annals::{EventStore, LocalBus, LogQuery, MemoryStore, Message, Projection, ReadModel, Runtime, Service, Views};
///
/// /// The sum of all counters with the same first letter.
/// struct Sums;
///
/// impl ReadModel for Sums {
///     const NAME: &'static str = "sums";
///     type Event = CounterEvent;
///     type View = u64;
///
///     fn keys(&self, _event: &CounterEvent, message: &Message) -> Vec<String> {
///         message.subject.trim_start_matches("counter-").chars().take(1).map(String::from).collect()
///     }
///
///     fn apply(&self, _key: &str, sum: &mut u64, event: &CounterEvent, _message: &Message) {
///         let CounterEvent::Raised { by } = event;
///         *sum += by;
///     }
/// }
///
/// let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
/// # let counters = annals::Repository::<Counter>::new(store.clone());
/// let sums = Projection::new(Sums, LogQuery::categories(["counter"]));
/// let mut runtime = Runtime::new();
/// let service = Service::new("counters", store.clone()).project(sums);
/// runtime.start(vec![service], Arc::new(LocalBus::default())).await?;
///
/// counters.execute("apples", 2, uuid::Uuid::new_v4()).await?;
/// counters.execute("avocados", 3, uuid::Uuid::new_v4()).await?;
/// // The views follow the log after a short delay.
/// let views = Views::<Sums>::new(store);
/// while views.get("a").await? != Some(5) {
///     tokio::time::sleep(Duration::from_millis(5)).await;
/// }
/// runtime.drain(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
pub trait ReadModel: Send + Sync + 'static {
    /// The name of the read model. The name is stored: never rename it. A name has at most 150 bytes and contains no
    /// `/`, no `@` and no control characters.
    const NAME: &'static str;
    /// The version of the views. Raise the version with each change to the views, or to the way in which events change
    /// the views. A service with a higher version than the live views builds its own views next to the live views, and
    /// then swaps them in. A service with a lower version does not touch the live views, and waits.
    const VERSION: u32 = 1;
    /// The events of the read model. Declare `#[event(unknown = "skip")]` on this enum to skip the other events that
    /// match the query.
    type Event: Event;
    /// The type of one view, stored as a document.
    type View: Default + Serialize + DeserializeOwned + Send;

    /// Returns the keys of the views that an event changes.
    fn keys(&self, event: &Self::Event, message: &Message) -> Vec<String>;
    /// Applies an event to one of the views that the event changes.
    fn apply(&self, key: &str, view: &mut Self::View, event: &Self::Event, message: &Message);
}

/// Maintains the views of a read model.
pub struct Projection<R> {
    model: Arc<R>,
    query: LogQuery,
    linger: Duration,
    instance: Option<Peer>,
}

debug_fields!([R] Projection<R> { query, linger });

impl<R> Clone for Projection<R> {
    fn clone(&self) -> Self {
        let model = self.model.clone();
        let query = self.query.clone();
        let instance = self.instance.clone();
        Self { model, query, linger: self.linger, instance }
    }
}

impl<R: ReadModel> Projection<R> {
    /// Creates a projection that applies the events that match `query`.
    pub fn new(model: R, query: LogQuery) -> Self {
        Self { model: Arc::new(model), query, linger: Duration::ZERO, instance: None }
    }

    /// Lets the views lag behind the log by about this time, and by four times as much under load. This saves writes if
    /// the same views change often; see [`Subscription::linger`].
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Shares the live views with other instances. One instance at a time maintains the views; see
    /// [`Subscription::shared`].
    pub(crate) fn shared(mut self, instance: Option<Peer>) -> Self {
        self.instance = instance;
        self
    }

    /// Keeps the live views up to date until `shutdown` is cancelled. After each swap, continues with the new live
    /// views. If the store is unavailable, the projection retries and health reports the failure.
    ///
    /// # Errors
    /// Fails if the name of the read model is not valid.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), NameError> {
        name::check("read model", R::NAME)?;
        let mut reporter = health.reporter(R::NAME, &shutdown);
        let mut backoff = Backoff::long();
        while !shutdown.is_cancelled() {
            match self.keep(&store, &health, &mut reporter, &shutdown).await {
                Ok(()) => backoff.reset(),
                Err(error) => {
                    reporter.trouble(error);
                    tokio::select! {
                        () = backoff.wait() => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
        }
        health.set(R::NAME, State::Stopped);
        Ok(())
    }

    /// Maintains the live views, rebuilds them or waits, depending on the versions of the live views and of this build.
    /// Returns when another generation becomes live, or when `shutdown` is cancelled.
    async fn keep(
        &self,
        store: &Arc<dyn EventStore>,
        health: &Health,
        reporter: &mut Reporter,
        shutdown: &CancellationToken,
    ) -> Result<(), String> {
        let pointer = generation::adopt(&**store, R::NAME, R::VERSION).await.map_err(|error| error.to_string())?;
        if !pointer.retired.is_empty() {
            generation::remove_retired(&**store, R::NAME).await.map_err(|error| error.to_string())?;
        }
        let of_live = pointer.version.unwrap_or(R::VERSION);
        if of_live < R::VERSION {
            return self.renew(store, &pointer, reporter, shutdown).await;
        }
        let keeps = async {
            match of_live == R::VERSION {
                true => self.follow(store, health, pointer.live, shutdown).await,
                false => stand_by(&**store, R::NAME, &pointer, R::VERSION, reporter, shutdown).await,
            }
        };
        tokio::select! {
            kept = keeps => kept,
            // The task that writes the old generation may be dropped at any point, because its commits are fenced.
            () = swapped(&**store, R::NAME, pointer.live) => Ok(()),
        }
    }

    /// Keeps a generation of views up to date until `shutdown` is cancelled or the generation is removed.
    async fn follow(
        &self,
        store: &Arc<dyn EventStore>,
        health: &Health,
        live: u32,
        shutdown: &CancellationToken,
    ) -> Result<(), String> {
        let subscription = self.subscription(live).views_of(R::NAME, R::VERSION).shared(self.instance.clone());
        let run = subscription.run(store.clone(), health.clone(), shutdown.clone());
        run.await.map_err(|error| error.to_string())
    }

    /// Builds the views of this version next to the live views of an earlier version, and swaps them in.
    async fn renew(
        &self,
        store: &Arc<dyn EventStore>,
        pointer: &Pointer,
        reporter: &mut Reporter,
        shutdown: &CancellationToken,
    ) -> Result<(), String> {
        let name = R::NAME;
        let version = R::VERSION;
        if pointer.builds.iter().any(|build| build.version == version && build.is_alive(store.clock().now())) {
            reporter.elsewhere(&format!("another process builds version {version} of {name}"));
            pause(SWAP_TICK, shutdown).await;
            return Ok(());
        }
        reporter.elsewhere(&format!("building version {version} of {name}; the live views are of an earlier version"));
        let build = self.begin(store.clone()).await.map_err(|error| error.to_string())?;
        let caught_up = tokio::select! {
            caught_up = build.catch_up(|_| {}) => Some(caught_up),
            () = shutdown.cancelled() => None,
        };
        let failed = match caught_up {
            Some(Ok(())) => match build.swap().await {
                Ok(_) | Err(SwapError::Outrun { .. }) => return Ok(()),
                Err(error) => error,
            },
            None => return build.discard().await.map_err(|error| error.to_string()),
            Some(Err(error)) => {
                _ = build.discard().await;
                error
            }
        };
        reporter.trouble(format!("version {version} of {name} is not built: {failed}"));
        pause(BUILD_AGAIN, shutdown).await;
        Ok(())
    }

    /// Rebuilds all views from the first event, next to the live views. Once the new views have caught up with the log,
    /// they replace the live views. Until then, readers see the old views.
    ///
    /// # Errors
    /// Fails if the store is unavailable, if another rebuild finished first, or if events could not be applied: see
    /// [`SwapError`]. In these cases, the live views stay as they were.
    pub async fn rebuild(&self, store: Arc<dyn EventStore>) -> Result<Rebuilt, RebuildError> {
        let build = self.build(store, |_| {}).await?;
        build.swap().await.map_err(|source| RebuildError::NotSwapped { model: R::NAME, source })
    }

    /// Rebuilds all views next to the live views, and returns once the new views have caught up with the log. The
    /// caller compares the result with the live views, and then swaps or discards it. During the build, `on_progress`
    /// is called with each position that the build reaches.
    ///
    /// # Errors
    /// Fails if the store is unavailable, or if more events fail than a build may park.
    pub async fn build(
        &self,
        store: Arc<dyn EventStore>,
        on_progress: impl FnMut(Position),
    ) -> Result<Rebuild, RebuildError> {
        let build = self.begin(store).await?;
        match build.catch_up(on_progress).await {
            Ok(()) => Ok(build),
            Err(error) => {
                // If `discard` fails too, the next build removes the remaining views of this build.
                _ = build.discard().await;
                Err(RebuildError::NotBuilt { model: R::NAME, source: error })
            }
        }
    }

    /// Starts to rebuild all views, in a generation that belongs only to this build. [`Rebuild::catch_up`] waits until
    /// the new views have caught up with the log.
    ///
    /// # Errors
    /// Fails if the store is unavailable, or if too many builds of this read model are running.
    pub async fn begin(&self, store: Arc<dyn EventStore>) -> Result<Rebuild, RebuildError> {
        name::check("read model", R::NAME)?;
        // A pure function that fails once fails every time, so one attempt is enough.
        let once = RetryPolicy { attempts_max: 1, ..RetryPolicy::default() };
        let subscription = |generation| self.subscription(generation).views_of(R::NAME, R::VERSION).retry(once);
        let begun = Rebuild::begin(store, R::NAME, R::VERSION, subscription).await;
        begun.map_err(|error| RebuildError::NotBuilt { model: R::NAME, source: error.into() })
    }

    fn subscription(&self, generation: u32) -> Subscription {
        let handler = Project { model: self.model.clone(), collection: collection(R::NAME, generation).into() };
        let name = generation::name(R::NAME, generation);
        Subscription::new(&name, handler).query(self.query.clone()).linger(self.linger)
    }
}

/// Returns the name of the collection that holds the live views, whichever version of the code maintains them.
pub async fn live_collection(store: &dyn EventStore, model: &str) -> Result<String, StoreError> {
    Ok(collection(model, live(store, model).await?))
}

/// Returns the number of the live generation.
async fn live(store: &dyn EventStore, model: &str) -> Result<u32, StoreError> {
    Ok(generation::load(store, model).await?.0.live)
}

/// Resolves once a generation other than this one is live.
async fn swapped(store: &dyn EventStore, model: &str, generation: u32) {
    loop {
        tokio::time::sleep(SWAP_TICK).await;
        if live(store, model).await.is_ok_and(|live| live != generation) {
            return;
        }
    }
}

/// Waits while the live views belong to a later version, and reports this state in health.
async fn stand_by(
    store: &dyn EventStore,
    model: &str,
    pointer: &Pointer,
    version: u32,
    reporter: &mut Reporter,
    shutdown: &CancellationToken,
) -> Result<(), String> {
    let of_live = pointer.version.unwrap_or(version);
    let kept = format!("the live views of {model} are of version {of_live}, and this build has version {version}");
    let mut stood_at = None;
    let mut since = Instant::now();
    while !shutdown.is_cancelled() {
        let head = store.status().await.map_err(|error| error.to_string())?.head;
        let at = generation::reached(store, model, pointer.live).await.map_err(|error| error.to_string())?;
        if stood_at != Some(at) || at >= head {
            (stood_at, since) = (Some(at), Instant::now());
        }
        if since.elapsed() < NEGLECTED {
            reporter.elsewhere(&format!("{kept}: this build leaves the views alone"));
        } else {
            reporter.trouble(format!(
                "{kept}, and no process maintains the views: start the later build, or go back with `read-model \
                 {model} rebuild --accept-older`"
            ));
        }
        pause(NEGLECTED / 2, shutdown).await;
    }
    Ok(())
}

async fn pause(time: Duration, shutdown: &CancellationToken) {
    tokio::select! {
        () = tokio::time::sleep(time) => {}
        () = shutdown.cancelled() => {}
    }
}

struct Project<R> {
    model: Arc<R>,
    collection: Arc<str>,
}

#[async_trait]
impl<R: ReadModel> Handler for Project<R> {
    async fn prepare(&self, messages: &[&Message], work: &mut Work) -> Result<(), HandlerError> {
        let decoded = messages.iter().filter_map(|message| Some((message, message.decode::<R::Event>().ok()??)));
        let keys: Vec<DocumentKey> = decoded
            .flat_map(|(message, event)| self.model.keys(&event, message))
            .map(|key| DocumentKey::new(self.collection.clone(), key))
            .collect();
        Ok(work.prefetch(&keys).await?)
    }

    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(event) = message.decode::<R::Event>()? else { return Ok(()) };
        for id in self.model.keys(&event, message) {
            let key = DocumentKey::new(self.collection.clone(), id.as_str());
            let mut view: R::View = work.document(&key).await?.unwrap_or_default();
            self.model.apply(&id, &mut view, &event, message);
            // The same event produces the same view again, so a retry would not help.
            let body = to_json_exact(&view).map_err(|error| format!("view {key}: {error}")).terminal()?;
            work.put_json(&key, Some(body.into()), None);
        }
        Ok(())
    }
}

/// Reads the live views of a read model.
pub struct Views<R> {
    store: Arc<dyn EventStore>,
    model: PhantomData<fn() -> R>,
}

impl<R> Clone for Views<R> {
    fn clone(&self) -> Self {
        Self { store: self.store.clone(), model: PhantomData }
    }
}

debug_fields!([R] Views<R> {});

impl<R: ReadModel> Views<R> {
    /// Creates a reader of the views in this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store, model: PhantomData }
    }

    /// Waits until the live views show all events up to a position, such as [`Decided::position`] of a command. The
    /// caller can then read its own writes. An event that failed and waits as a dead letter counts as shown.
    ///
    /// The views show an event once the commit of its batch is stored. If the query of the read model does not match
    /// the event, the checkpoint of the views moves past the event within about a second.
    ///
    /// # Errors
    /// Fails with [`WaitError::BeyondEnd`] if the log does not reach to the position, and with [`WaitError::TimedOut`] if
    /// the views are further behind than `limit`, for example because no process runs the projection.
    ///
    /// ```
    /// use std::{sync::Arc, time::Duration};
    ///
    /// use annals::{Event, LogQuery, Message, Position, Projection, ReadModel, Repository, Runtime, Service, Views};
    /// # use annals::{Aggregate, EventStore, LocalBus, MemoryStore};
    /// # use std::convert::Infallible;
    /// #
    /// # #[derive(Event, Clone)]
    /// # #[event(prefix = "account")]
    /// # enum AccountEvent { Credited { pence: u64 } }
    /// # #[derive(Clone, Default)]
    /// # struct Account;
    /// # impl Aggregate for Account {
    /// #     const CATEGORY: &'static str = "account";
    /// #     type Command = u64;
    /// #     type Event = AccountEvent;
    /// #     type Refusal = Infallible;
    /// #     fn decide(&self, pence: &u64) -> Result<Vec<AccountEvent>, Infallible> {
    /// #         Ok(vec![AccountEvent::Credited { pence: *pence }])
    /// #     }
    /// #     fn evolve(&mut self, _: &AccountEvent) {}
    /// # }
    /// struct Balances;
    ///
    /// impl ReadModel for Balances {
    ///     const NAME: &'static str = "balances";
    ///     type Event = AccountEvent;
    ///     type View = u64;
    ///
    ///     fn keys(&self, _: &AccountEvent, message: &Message) -> Vec<String> {
    ///         vec![message.key.to_string()]
    ///     }
    ///
    ///     fn apply(&self, _: &str, pence: &mut u64, event: &AccountEvent, _: &Message) {
    ///         let AccountEvent::Credited { pence: credited } = event;
    ///         *pence += credited;
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    /// let bank = Service::new("bank", store.clone()).project(Projection::new(Balances, LogQuery::all()));
    /// # let mut runtime = Runtime::new();
    /// runtime.start(vec![bank], Arc::new(LocalBus::default())).await?;
    ///
    /// let accounts = Repository::<Account>::new(store.clone());
    /// let credited = accounts.execute("alice", 250, uuid::Uuid::new_v4()).await?;
    /// let balances = Views::<Balances>::new(store);
    /// balances.wait_for(credited.position.unwrap_or(Position::START), Duration::from_secs(5)).await?;
    /// assert_eq!(balances.get("account-alice").await?, Some(250));
    /// # runtime.drain(Duration::from_secs(5)).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// [`Decided::position`]: crate::work::Decided::position
    pub async fn wait_for(&self, position: Position, limit: Duration) -> Result<(), WaitError> {
        let deadline = Instant::now() + limit;
        let mut look = WAIT_LOOK_MIN;
        // Whether the log is known to reach to the position.
        let mut exists = false;
        loop {
            let generation = live(&*self.store, R::NAME).await?;
            let reached = generation::reached(&*self.store, R::NAME, generation).await?;
            if reached >= position {
                return Ok(());
            }
            if !exists {
                let status = self.store.status().await?;
                if let Some(head) = end_before(&*self.store, &status, position).await? {
                    return Err(WaitError::BeyondEnd { position, head });
                }
                exists = true;
            }
            if Instant::now() >= deadline {
                let awaited = format!("read model {} to reach position {position}", R::NAME);
                let state = format!("it has reached position {reached}; does the service that keeps it run?");
                return Err(WaitError::TimedOut { awaited, limit, state });
            }
            sleep_until(deadline.min(Instant::now() + look)).await;
            look = (2 * look).min(WAIT_LOOK_MAX);
        }
    }

    /// Returns the view with this key, if there is one.
    pub async fn get(&self, key: &str) -> Result<Option<R::View>, StoreError> {
        loop {
            let generation = live(&*self.store, R::NAME).await?;
            let key = DocumentKey::new(collection(R::NAME, generation), key);
            match self.store.document(&key).await? {
                Some(document) => return view::<R>(&document).map(Some),
                // The view may have been removed by a swap during the read.
                None if live(&*self.store, R::NAME).await? == generation => return Ok(None),
                None => {}
            }
        }
    }

    /// Returns up to `limit` views with keys above `after`, in the order of their keys.
    pub async fn list(&self, after: &str, limit: usize) -> Result<Vec<(Arc<str>, R::View)>, StoreError> {
        let page = loop {
            let generation = live(&*self.store, R::NAME).await?;
            let page = self.store.scan(&collection(R::NAME, generation), &Scan::After(after.into()), limit).await?;
            // Some views may have been removed by a swap during the read.
            if live(&*self.store, R::NAME).await? == generation {
                break page;
            }
        };
        page.iter().map(|document| Ok((document.key.id.clone(), view::<R>(document)?))).collect()
    }
}

fn view<R: ReadModel>(document: &Document) -> Result<R::View, StoreError> {
    serde_json::from_str(&document.body).map_err(|error| StoreError::Corrupt(format!("{}: {error}", document.key)))
}
