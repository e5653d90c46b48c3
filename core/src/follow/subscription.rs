//! Subscriptions. A subscription catches up with the log and then follows the log live. Each commit contains both the
//! effects of the handler and the new checkpoint.

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use tokio::{
    sync::OnceCell,
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{
        backoff::Backoff,
        name::{self, NameError},
    },
    bus::Message,
    event::{Position, Recorded},
    follow::{
        checkpoint::{Item, Lane, lane_of},
        lanes::{self, LANES_MAX, LOOK_AGAIN, Lanes},
        lease::{LaneLease, Turn},
        log_wait::LogWait,
        peer::Peer,
        worker::{BATCH_MAX, PARKED_TICK, RetryPolicy, Stop, Worker},
    },
    handler::Handler,
    health::{Health, Reporter},
    store::{EventStore, LogQuery},
};

pub use crate::follow::lanes::Start;

/// How often the checkpoint moves forward on a lane that only skips events.
pub(crate) const IDLE_CHECKPOINT: Duration = Duration::from_secs(1);

/// The maximum number of messages in one batch of a subscription with a linger time.
const LINGERING_BATCH_MAX: usize = 16_384;
/// The factor by which the linger time is multiplied after a batch of more than `BATCH_MAX` messages.
const LINGER_UNDER_LOAD: u32 = 4;

/// A handler that follows the log of its own service.
///
/// Each lane has its own checkpoint and worker. A hash of an event's stream id selects the lane of the event, so the
/// events of one stream are handled in order.
///
/// In this example, `counters` is a [`Repository`](crate::Repository) of an aggregate with the category `counter`.
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
/// use annals::{
///     EventStore, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Runtime, Service, Subscription, Work,
/// };
/// use async_trait::async_trait;
/// use tokio::sync::mpsc;
///
/// /// Passes the ids of the streams on.
/// struct PassOn(mpsc::Sender<String>);
///
/// #[async_trait]
/// impl Handler for PassOn {
///     async fn handle(&self, message: &Message, _work: &mut Work) -> Result<(), HandlerError> {
///         self.0.send(message.subject.to_string()).await?;
///         Ok(())
///     }
/// }
///
/// let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
/// # let counters = annals::Repository::<Counter>::new(store.clone());
/// let (sender, mut receiver) = mpsc::channel(16);
/// let changed = Subscription::new("counters.changed", PassOn(sender))
///     .query(LogQuery::categories(["counter"]))
///     .lanes(4);
/// let mut runtime = Runtime::new();
/// let service = Service::new("counters", store).subscribe(changed);
/// runtime.start(vec![service], Arc::new(LocalBus::default())).await?;
///
/// counters.execute("visits", 1, uuid::Uuid::new_v4()).await?;
/// assert_eq!(receiver.recv().await.as_deref(), Some("counter-visits"));
/// runtime.drain(Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
pub struct Subscription {
    name: Arc<str>,
    handler: Arc<dyn Handler>,
    query: LogQuery,
    lanes: u32,
    start: Start,
    retry: RetryPolicy,
    linger: Duration,
    instance: Option<Peer>,
    /// The read model whose views the subscription maintains, and the version of the read model's code.
    model: Option<(Arc<str>, u32)>,
    /// Whether the store has recorded the number of lanes.
    settled: OnceCell<()>,
}

debug_fields!(Subscription { name, query, lanes, start });

impl Subscription {
    /// Creates a subscription with this name. Checkpoints are stored under the name, so never reuse a name for another
    /// handler. A name has at most 150 bytes, contains no `/`, no `@` and no control characters, and does not end in
    /// `.relay`. A subscription with any other name fails to start.
    pub fn new(name: &str, handler: impl Handler) -> Self {
        Self {
            name: name.into(),
            handler: Arc::new(handler),
            query: LogQuery::all(),
            lanes: 1,
            start: Start::Beginning,
            retry: RetryPolicy::default(),
            linger: Duration::ZERO,
            instance: None,
            model: None,
            settled: OnceCell::new(),
        }
    }

    /// Restricts the subscription to events that match the query. By default, a subscription follows all events.
    pub fn query(mut self, query: LogQuery) -> Self {
        self.query = query;
        self
    }

    /// Sets the number of lanes that are handled in parallel: 1 by default, at most 1,000. The store records the
    /// number. When the number changes, all old lanes first catch up with the old lane that is furthest ahead. No event
    /// is then skipped or handled twice, and the order within each stream is kept. With several instances, the change
    /// begins once the last instance with the old number has stopped.
    pub fn lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes.clamp(1, LANES_MAX);
        self
    }

    /// Sets where the subscription starts if it has no checkpoint. The default is the first event.
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Sets when failed messages are retried.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets the minimum wait between two batches once the subscription has caught up. After a batch of more than 512
    /// messages, the wait is four times as long. A subscription with a linger time also handles larger batches. The
    /// setting is meant for handlers that write only the last state of each key and whose results may be late. The
    /// default is zero.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Shares the lanes with the other instances that run the same subscription. Without an instance, this process
    /// follows all lanes.
    pub(crate) fn shared(mut self, instance: Option<Peer>) -> Self {
        self.instance = instance;
        self
    }

    /// The categories of the query. An empty list means that the query does not filter by category.
    pub(crate) fn categories(&self) -> &[Arc<str>] {
        &self.query.categories
    }

    /// Makes the subscription maintain the views of a read model. The health report then shows the name of the read
    /// model without the generation. Among the instances that run the same version of the code, only one at a time
    /// maintains the views. The checkpoint is created and removed together with the generation of the views, so the
    /// subscription ends when its checkpoint is gone.
    pub(crate) fn views_of(mut self, model: &str, version: u32) -> Self {
        self.model = Some((model.into(), version));
        self
    }

    /// The name of the subscription.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Follows the log until `shutdown` is cancelled, then handles the events that were recorded by that moment and
    /// returns. All lanes run in the calling task; a [`Runtime`](crate::Runtime) gives each lane its own task.
    ///
    /// # Errors
    /// Fails if the name of the subscription is not valid. All other errors are retried, and health reports them.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), NameError> {
        if self.model.is_none() {
            name::check("subscription", &self.name)?;
        }
        join_all(self.workers(&store, &health, &shutdown)).await;
        Ok(())
    }

    /// Returns one future per lane. Each future follows its own lane.
    pub(crate) fn workers(
        self,
        store: &Arc<dyn EventStore>,
        health: &Health,
        shutdown: &CancellationToken,
    ) -> impl Iterator<Item = impl Future<Output = ()> + use<>> {
        let this = Arc::new(self);
        (0..this.lanes).map(move |lane| this.clone().worker_of(lane, store.clone(), health.clone(), shutdown.clone()))
    }

    /// Returns the future that follows a lane, in a box, so that the engine is compiled in this crate and not again for
    /// every read model of a service.
    fn worker_of(
        self: Arc<Self>,
        lane: u32,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> BoxFuture<'static, ()> {
        self.follow(lane, store, health, shutdown).boxed()
    }

    async fn follow(
        self: Arc<Self>,
        lane: u32,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) {
        let (part, claimed_as) = match &self.model {
            Some((model, version)) => (model.to_string(), format!("{model}@version-{version}").into()),
            None => (format!("{}/{lane}", self.name), self.name.clone()),
        };
        let mut worker = self.worker(lane, self.lanes, store, health.reporter(&part, &shutdown));
        // An instance claims a lane only after the number of lanes is settled. Until then, the instance is not counted
        // when lanes are divided among instances.
        let mut claim = None;
        let mut backoff = Backoff::long();
        while !shutdown.is_cancelled() {
            let followed = match self.settled.get_or_try_init(|| self.settle(&worker, &shutdown)).await {
                Ok(()) => {
                    let claim = claim.get_or_insert_with(|| LaneLease::new(self.instance.as_ref(), &claimed_as, lane));
                    self.follow_lane(lane, claim, &mut worker, &shutdown).await
                }
                Err(stop) => Err(stop),
            };
            if let Err(stop) = followed {
                if self.model.is_some() && matches!(stop, Stop::Gone(_)) {
                    return;
                }
                worker.reporter.trouble(stop.to_string());
                if matches!(stop, Stop::Renewed) {
                    continue;
                }
                tokio::select! {
                    () = backoff.wait() => {}
                    () = shutdown.cancelled() => {}
                }
            }
        }
        health.set(&part, crate::health::State::Stopped);
    }

    fn worker(&self, lane: u32, of: u32, store: Arc<dyn EventStore>, reporter: Reporter) -> Worker {
        let lane = Lane { lanes: Some(of), ..Lane::new(&format!("{}/{lane}", self.name), None) };
        Worker::new(&self.name, store, self.handler.clone(), vec![lane], reporter)
            .retry(self.retry.clone())
            .among_others(self.instance.is_some())
    }

    /// Records the number of lanes in the store, with a checkpoint for each lane. If the recorded number is different,
    /// the old lanes are finished first. A read model is skipped here, because its checkpoint is created together with
    /// its generation.
    async fn settle(&self, worker: &Worker, shutdown: &CancellationToken) -> Result<(), Stop> {
        if self.model.is_some() {
            return Ok(());
        }
        let store = &worker.store;
        let mut reporter = worker.reporter.clone();
        let lanes = Lanes { store, name: &self.name, wanted: self.lanes, start: self.start };
        while let Some(others) = lanes.settle().await? {
            if let Some(reason) = others.waits_for(self.instance.as_ref(), &self.name) {
                reporter.elsewhere(&reason);
                tokio::select! {
                    () = sleep(LOOK_AGAIN) => continue,
                    () = shutdown.cancelled() => return Err(Stop::Lanes(reason)),
                }
            }
            tracing::info!(
                subscription = %self.name, from = others.count(), to = self.lanes,
                "the number of lanes is being changed"
            );
            for lane in 0..others.count() {
                let worker = self.worker(lane, others.count(), store.clone(), reporter.clone());
                tokio::select! {
                    finished = self.finish(lane, others.count(), others.furthest(), worker) => finished?,
                    () = shutdown.cancelled() => return Err(Stop::Lanes("stopped before its lanes were changed".into())),
                }
            }
            lanes.change(others.furthest()).await?;
        }
        Ok(())
    }

    /// Returns the position after which a lane continues or starts.
    async fn begin(&self, checkpoint: Option<i64>, worker: &mut Worker) -> Result<Position, Stop> {
        if let Some(next) = checkpoint {
            return Ok(Position(next));
        }
        let lane = &worker.lanes[0];
        if lane.is_replaced(self.lanes) || self.model.is_some() {
            return Err(Stop::Gone(lane.key.clone()));
        }
        let start = self.start.position(&*worker.store).await?;
        if self.start == Start::Now {
            worker.checkpoint(start.0).await?;
        }
        Ok(start)
    }

    /// Follows an old lane up to a position, and then stops. The number of lanes is about to change, and new lanes will
    /// replace the old ones.
    async fn finish(&self, lane: u32, of: u32, upto: Position, mut worker: Worker) -> Result<(), Stop> {
        let mut cursor = lanes::take(&mut worker, self.instance.as_ref()).await?;
        while cursor < upto {
            let page = worker.store.read_log(&self.query, cursor, BATCH_MAX).await?;
            worker.is_of_this_log()?;
            let is_over = page.next == cursor && !page.more;
            cursor = page.next.min(upto);
            let before = page.events.iter().filter(|event| event.position <= upto);
            let mut items = items(before, lane, of, &worker.name);
            if let Some(last) = items.last_mut() {
                last.next = cursor.0;
                worker.deliver(&items).await?;
            }
            if is_over {
                break;
            }
        }
        worker.checkpoint(upto.0).await
    }

    async fn follow_lane(
        &self,
        lane: u32,
        claim: &LaneLease,
        worker: &mut Worker,
        shutdown: &CancellationToken,
    ) -> Result<(), Stop> {
        let Turn::Acquired(checkpoint) = claim.turn(worker, shutdown).await? else { return Ok(()) };
        let mut cursor = self.begin(checkpoint, worker).await?;
        claim.hold(worker, cursor.0).await?;
        worker.load_parked().await?;
        worker.reporter.fine();
        let source: Arc<str> = worker.name.clone();
        let mut tick = interval(PARKED_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut moved_at = Instant::now();
        let page_size = if self.linger.is_zero() { BATCH_MAX } else { LINGERING_BATCH_MAX };
        let mut last = None;
        loop {
            worker.is_of_this_log()?;
            if claim.has_ended() && !shutdown.is_cancelled() {
                break;
            }
            if shutdown.is_cancelled() {
                // Before the subscription stops, it handles all events that are already recorded, so that a drained
                // service leaves no event unhandled.
                let last = match last {
                    Some(last) => last,
                    None => *last.insert(worker.store.status().await?.head),
                };
                if cursor >= last {
                    break;
                }
            }
            let page = worker.store.read_log(&self.query, cursor, page_size).await?;
            worker.is_of_this_log()?;
            let mut items = items(page.events.iter(), lane, self.lanes, &source);
            if let Some(last) = items.last_mut() {
                last.next = page.next.0;
                worker.deliver(&items).await?;
                moved_at = Instant::now();
                // A subscription that is still catching up has large batches anyway, so it does not linger.
                if !self.linger.is_zero() && !page.more {
                    let load = if items.len() > BATCH_MAX { LINGER_UNDER_LOAD } else { 1 };
                    tokio::select! {
                        () = sleep(self.linger.saturating_mul(load)) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
            // If the log has more events after all, `wait` resolves at once.
            let caught_up = !page.more;
            cursor = page.next;
            if !caught_up && worker.parked.is_empty() {
                skip(worker, cursor, &mut moved_at).await?;
                continue;
            }
            let store = worker.store.clone();
            let mut more = LogWait::after(&*store, cursor);
            loop {
                tokio::select! {
                    woken = more.woken(), if caught_up => break woken?,
                    () = std::future::ready(()), if !caught_up => break,
                    _ = tick.tick() => more.alongside(redrive(worker, cursor, &mut moved_at)).await?,
                    () = shutdown.cancelled() => break,
                    () = claim.ends(), if !shutdown.is_cancelled() => break,
                }
            }
        }
        if worker.lanes[0].next < cursor.0 {
            worker.checkpoint(cursor.0).await?;
        }
        let next = worker.lanes[0].next;
        claim.release(worker, next).await
    }
}

/// Returns the events of a lane, converted to items for the worker.
fn items<'a>(events: impl Iterator<Item = &'a Arc<Recorded>>, lane: u32, of: u32, source: &Arc<str>) -> Vec<Item> {
    let of_lane = events.filter(|event| of == 1 || lane_of(event.stream.as_str(), of) == lane);
    let item = |event: &Arc<Recorded>| Item {
        lane: 0,
        next: event.position.0,
        key: event.stream.shared(),
        message: Ok(Message::of(event, source)),
    };
    of_lane.map(item).collect()
}

async fn redrive(worker: &mut Worker, cursor: Position, moved_at: &mut Instant) -> Result<(), Stop> {
    worker.redrive_due().await?;
    skip(worker, cursor, moved_at).await
}

/// Moves the checkpoint, at intervals, past events that belong to other lanes or do not match the query.
async fn skip(worker: &mut Worker, cursor: Position, moved_at: &mut Instant) -> Result<(), Stop> {
    if worker.lanes[0].next < cursor.0 && moved_at.elapsed() > IDLE_CHECKPOINT {
        worker.checkpoint(cursor.0).await?;
        *moved_at = Instant::now();
    }
    Ok(())
}
