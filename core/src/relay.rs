//! The relay, which publishes messages from the log to the bus. The relay is a subscription whose checkpoint moves only
//! after the bus has accepted the messages.

pub(crate) mod routes;

use std::{collections::VecDeque, sync::Arc};

use async_trait::async_trait;
use futures::{FutureExt, future::join_all};
use tokio::{sync::OnceCell, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{
        backoff::Backoff,
        name::{self, NameError},
    },
    bus::{BusError, Message, Outgoing, Publisher, Receipt},
    decide::work::Work,
    event::{Position, Recorded, StreamId},
    follow::{
        checkpoint::{Lane, LastEvent, lane_of},
        lanes::{self, LANES_MAX, LOOK_AGAIN, Lanes, Start},
        lease::{LaneLease, Turn},
        log_wait::LogWait,
        peer::Peer,
        relay_progress::relay_of,
        subscription::IDLE_CHECKPOINT,
        worker::{PARKED_TICK, Stop, Worker},
    },
    handler::{Handler, HandlerError, Terminal},
    health::{Health, Reporter, State},
    store::{EventStore, LogPage, StoreError, names::Labels},
};

pub use crate::{
    follow::relay_progress::RelayProgress,
    relay::routes::Routes,
    store::names::{LogNames, Segment, SegmentError, log_of},
};

/// The number of events that are read and published together.
const PAGE: usize = 1_000;
/// The maximum number of pages that are published but not yet acknowledged. This limits the memory used while the bus
/// is unavailable.
const PAGES_IN_FLIGHT: usize = 16;
/// The maximum number of events per lane whose messages are in flight. If the lane has sent more than this number of
/// events after an event, the bus has accepted all messages of that event.
pub const WINDOW: usize = PAGE * PAGES_IN_FLIGHT;
/// How long the bus may take to accept a redriven message.
const REPUBLISHED: std::time::Duration = std::time::Duration::from_secs(5);
/// How long the relay waits without any acknowledgement from the bus before the relay reports trouble.
const STALLED: std::time::Duration = std::time::Duration::from_secs(3);
/// How often the relay reports this trouble again.
const STALLED_AGAIN: std::time::Duration = std::time::Duration::from_secs(60);
/// How long a checkpoint may lag behind the messages that the bus has accepted. A commit after each page would compete
/// with the commits that the messages cause. After a crash, the messages of this period are published again.
const CHECKPOINT_AFTER: std::time::Duration = std::time::Duration::from_millis(100);
/// How long a relay that is shutting down waits for the next receipt.
const LAST_RECEIPTS: std::time::Duration = std::time::Duration::from_millis(500);

/// Publishes a service's messages from its log to the bus, in log order per key, in batches.
pub struct Relay {
    routes: Routes,
    name: Arc<str>,
    lanes: u32,
    instance: Option<Peer>,
    /// Whether the store has recorded the number of lanes.
    settled: OnceCell<()>,
}

debug_fields!(Relay { name, lanes, routes });

/// A page whose messages have been published, but not yet accepted by the bus.
struct InFlight {
    next: Position,
    receipt: Receipt,
    /// The source event of each message.
    sources: Vec<Arc<Recorded>>,
}

/// A handler that publishes a parked event again.
struct Republish {
    routes: Routes,
    publisher: Arc<dyn Publisher>,
}

#[async_trait]
impl Handler for Republish {
    async fn handle(&self, message: &Message, _work: &mut Work) -> Result<(), HandlerError> {
        let event = Recorded {
            position: message.position,
            stream: StreamId::from_stored(&message.subject),
            version: message.version,
            id: message.id,
            type_name: message.type_name.clone(),
            schema_version: message.schema_version,
            data: message.data.clone(),
            metadata: message.metadata.clone(),
            recorded_at: message.time,
        };
        let messages = self.routes.messages(&event).terminal()?;
        // The timeout is needed because the relay publishes nothing else during a redrive, and a receipt may wait for a
        // consumer that is unavailable.
        tokio::time::timeout(REPUBLISHED, async { self.publisher.publish(messages).await?.await }).await??;
        Ok(())
    }
}

impl Relay {
    /// Creates a relay with the name `<service>.relay`.
    pub fn new(routes: Routes) -> Self {
        Self { name: relay_of(&routes.service), routes, lanes: 1, instance: None, settled: OnceCell::new() }
    }

    /// Sets the number of lanes that are published in parallel: 1 by default, at most 1,000. Each lane has its own
    /// checkpoint. The store records the number. When the number changes, the old lanes first publish all events
    /// recorded so far, because receivers recognise a repeated message by its lane. With several instances, the change
    /// begins once the last instance with the old number has stopped.
    pub fn lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes.clamp(1, LANES_MAX);
        self
    }

    /// Shares the lanes with the relays of other instances.
    pub(crate) fn shared(mut self, instance: Option<Peer>) -> Self {
        self.instance = instance;
        self
    }

    /// Publishes messages until `shutdown` is cancelled, then waits until the bus has accepted the messages in flight.
    /// All lanes run in the calling task; a [`Runtime`](crate::Runtime) gives each lane its own task.
    ///
    /// # Errors
    /// Fails if the name of the relay is not valid. All other errors are retried, and health reports them.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        publisher: Arc<dyn Publisher>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), NameError> {
        name::check("relay", &self.name)?;
        join_all(self.carriers(&store, &publisher, &health, &shutdown)).await;
        Ok(())
    }

    /// Returns one future per lane. Each future publishes the messages of its lane.
    pub(crate) fn carriers(
        self,
        store: &Arc<dyn EventStore>,
        publisher: &Arc<dyn Publisher>,
        health: &Health,
        shutdown: &CancellationToken,
    ) -> impl Iterator<Item = impl Future<Output = ()> + use<>> {
        let this = Arc::new(self);
        let store = store.clone();
        let publisher = publisher.clone();
        let health = health.clone();
        let shutdown = shutdown.clone();
        (0..this.lanes).map(move |lane| {
            this.clone().carry_lane(lane, store.clone(), publisher.clone(), health.clone(), shutdown.clone())
        })
    }

    async fn carry_lane(
        self: Arc<Self>,
        lane: u32,
        store: Arc<dyn EventStore>,
        publisher: Arc<dyn Publisher>,
        health: Health,
        shutdown: CancellationToken,
    ) {
        let part = format!("{}/{lane}", self.name);
        let mut worker = self.worker(lane, self.lanes, store, &publisher, health.reporter(&part, &shutdown));
        // A lane is claimed only after the number of lanes is settled. Until then, the instance is not counted when
        // lanes are divided among instances.
        let mut claim = None;
        let mut backoff = Backoff::long();
        while !shutdown.is_cancelled() {
            let carried = match self.settled.get_or_try_init(|| self.settle(&worker, &publisher, &shutdown)).await {
                Ok(()) => {
                    let claim = claim.get_or_insert_with(|| LaneLease::new(self.instance.as_ref(), &self.name, lane));
                    self.carry(lane, claim, &mut worker, &publisher, &shutdown, &mut backoff).await
                }
                Err(trouble) => Err(trouble),
            };
            if let Err(trouble) = carried {
                worker.reporter.trouble(trouble.to_string());
                if matches!(trouble, Trouble::Stop(Stop::Renewed)) {
                    continue;
                }
                tokio::select! {
                    () = backoff.wait() => {}
                    () = shutdown.cancelled() => {}
                }
            }
        }
        health.set(&part, State::Stopped);
    }

    fn worker(
        &self,
        lane: u32,
        of: u32,
        store: Arc<dyn EventStore>,
        publisher: &Arc<dyn Publisher>,
        reporter: Reporter,
    ) -> Worker {
        let lane = Lane { lanes: Some(of), ..Lane::new(&format!("{}/{lane}", self.name), None) };
        let republish = Republish { routes: self.routes.clone(), publisher: publisher.clone() };
        Worker::new(&self.name, store, Arc::new(republish), vec![lane], reporter)
    }

    /// Records the number of lanes in the store, with a checkpoint for each lane. If the recorded number is different,
    /// the old lanes first publish all events recorded by now. A relay that was killed may already have sent any of
    /// these events without moving its checkpoint, and receivers recognise a repeated message only in the lane in which
    /// it first arrived.
    async fn settle(
        &self,
        worker: &Worker,
        publisher: &Arc<dyn Publisher>,
        shutdown: &CancellationToken,
    ) -> Result<(), Trouble> {
        let store = &worker.store;
        let mut reporter = worker.reporter.clone();
        let lanes = Lanes { store, name: &self.name, wanted: self.lanes, start: Start::Beginning };
        while let Some(others) = lanes.settle().await? {
            if let Some(reason) = others.waits_for(self.instance.as_ref(), &self.name) {
                reporter.elsewhere(&reason);
                tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => continue,
                    () = shutdown.cancelled() => return Err(Stop::Lanes(reason).into()),
                }
            }
            tracing::info!(
                relay = %self.name, from = others.count(), to = self.lanes,
                "the number of lanes is being changed"
            );
            let before = Self::new(self.routes.clone()).lanes(others.count());
            let upto = store.status().await?.head.max(others.furthest());
            for lane in 0..others.count() {
                let mut worker = before.worker(lane, others.count(), store.clone(), publisher, reporter.clone());
                lanes::take(&mut worker, self.instance.as_ref()).await?;
                tokio::select! {
                    finished = before.finish(lane, publisher, &mut worker, upto) => finished?,
                    () = shutdown.cancelled() => {
                        return Err(Stop::Lanes("stopped before its lanes were changed".into()).into());
                    }
                }
            }
            lanes.change(upto).await?;
        }
        Ok(())
    }

    /// Publishes the messages of a lane up to a position, and then stops.
    async fn finish(
        &self,
        lane: u32,
        publisher: &Arc<dyn Publisher>,
        worker: &mut Worker,
        upto: Position,
    ) -> Result<(), Trouble> {
        let labels = LogNames::drawn(&*worker.store).await?.labels(lane);
        let mut cursor = Position(worker.lanes[0].next);
        while cursor < upto {
            let page = worker.store.read_log(&self.routes.query(), cursor, PAGE).await?;
            worker.is_of_this_log()?;
            let is_over = page.next == cursor && !page.more;
            cursor = page.next.min(upto);
            let before = page.events.into_iter().take_while(|event| event.position <= upto);
            let (messages, sources) = self.messages(lane, &labels, worker, &before.collect::<Vec<_>>()).await?;
            let taken = async { publisher.publish(messages).await?.await };
            if !sources.is_empty()
                && let Err(error) = taken.await
            {
                return Err(self.refused(worker, &sources, error).await);
            }
            if let Some(last) = sources.last() {
                worker.lanes[0].event = Some(LastEvent { position: last.position, id: last.id });
            }
            if is_over {
                break;
            }
        }
        Ok(note(worker, &**publisher, upto.0).await?)
    }

    /// Publishes messages, starting at the checkpoint. After an error, all messages since the checkpoint are published
    /// again.
    async fn carry(
        &self,
        lane: u32,
        claim: &LaneLease,
        worker: &mut Worker,
        publisher: &Arc<dyn Publisher>,
        shutdown: &CancellationToken,
        backoff: &mut Backoff,
    ) -> Result<(), Trouble> {
        let Turn::Acquired(checkpoint) = claim.turn(worker, shutdown).await? else { return Ok(()) };
        if checkpoint.is_none() && worker.lanes[0].is_replaced(self.lanes) {
            return Err(Stop::Gone(worker.lanes[0].key.clone()).into());
        }
        let cursor = Position(checkpoint.unwrap_or(0));
        claim.hold(worker, cursor.0).await?;
        worker.load_parked().await?;
        let labels = LogNames::drawn(&*worker.store).await?.labels(lane);
        worker.reporter.fine();
        let now = Instant::now();
        let publication = Publication {
            relay: self,
            lane,
            labels,
            claim,
            worker,
            publisher,
            shutdown,
            backoff,
            cursor,
            is_more: true,
            ahead: JoinSet::new(),
            in_flight: VecDeque::new(),
            taken_up_to: cursor.0,
            follows_at: None,
            moved_at: now,
            patient_until: now + LAST_RECEIPTS,
            stalls_at: now + STALLED,
        };
        publication.run().await
    }

    /// Returns the messages for those events that belong to this lane, together with the event of each message. An
    /// event for which no valid message can be made is parked, and later events with the same key are parked behind it.
    async fn messages(
        &self,
        lane: u32,
        labels: &Labels,
        worker: &mut Worker,
        events: &[Arc<Recorded>],
    ) -> Result<(Vec<Outgoing>, Vec<Arc<Recorded>>), Stop> {
        let mut messages = Vec::with_capacity(events.len());
        let mut sources = Vec::with_capacity(events.len());
        let is_mine = |event: &&Arc<Recorded>| self.lanes == 1 || lane_of(event.stream.as_str(), self.lanes) == lane;
        for event in events.iter().filter(is_mine) {
            // If the checkpoint was reset to an earlier position, events before a parked event are read again. These
            // events do not wait behind the parked event.
            let first_parked = worker.parked.first(event.stream.as_str()).map(|place| place.position);
            let waits = first_parked.is_some_and(|position| position <= event.position.0);
            let made = match self.routes.messages(event) {
                Ok(_) if waits => Err("waits behind a parked message".to_owned()),
                made => made.map_err(|error| error.to_string()),
            };
            match made {
                Ok(mut made) => {
                    let label = labels.of(event.position);
                    made.iter_mut().for_each(|outgoing| outgoing.message.lane = label.cloned());
                    sources.extend(made.iter().map(|_| event.clone()));
                    messages.extend(made);
                }
                Err(reason) => self.park(worker, event, reason).await?,
            }
        }
        Ok((messages, sources))
    }

    /// Parks the event of a message that the bus will never accept. All messages since the checkpoint are then
    /// published again, without the refused message.
    async fn refused(&self, worker: &mut Worker, sources: &[Arc<Recorded>], error: BusError) -> Trouble {
        if let BusError::Refused { index, reason } = &error
            && let Some(event) = sources.get(*index)
            && let Err(stop) = self.park(worker, event, reason.clone()).await
        {
            return stop.into();
        }
        error.into()
    }

    async fn park(&self, worker: &mut Worker, event: &Recorded, reason: String) -> Result<(), Stop> {
        let message = Message::of(event, &self.routes.service);
        // The checkpoint does not move, because messages published before this event are not acknowledged yet.
        worker.park_message(event.stream.shared(), message, reason).await
    }
}

/// A lane that this instance holds, and whose messages are being published.
struct Publication<'a> {
    relay: &'a Relay,
    lane: u32,
    labels: Labels,
    claim: &'a LaneLease,
    worker: &'a mut Worker,
    publisher: &'a Arc<dyn Publisher>,
    shutdown: &'a CancellationToken,
    backoff: &'a mut Backoff,
    /// The position up to which the log was read.
    cursor: Position,
    /// Whether the log may have events after the cursor.
    is_more: bool,
    /// The page after the current one, read on another thread while the current one is published.
    ahead: JoinSet<Result<LogPage, StoreError>>,
    in_flight: VecDeque<InFlight>,
    /// The position up to which the bus has accepted messages.
    taken_up_to: i64,
    /// The time by which the checkpoint must move to `taken_up_to`.
    follows_at: Option<Instant>,
    /// The time at which the checkpoint last moved.
    moved_at: Instant,
    /// The time at which a stopping relay no longer waits for the next receipt.
    patient_until: Instant,
    /// The time at which the relay reports that the bus acknowledges nothing.
    stalls_at: Instant,
}

impl Publication<'_> {
    /// Publishes until the lane is assigned to another instance or the relay is shut down.
    async fn run(mut self) -> Result<(), Trouble> {
        let store = self.worker.store.clone();
        let mut more = LogWait::after(&*store, self.cursor);
        let mut tick = tokio::time::interval(PARKED_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.worker.is_of_this_log()?;
            let stopping = self.shutdown.is_cancelled() || self.claim.has_ended();
            if stopping && self.in_flight.is_empty() {
                // Moves the checkpoint past events that have no messages, so that health shows no lag when all work is
                // done.
                if self.worker.lanes[0].next < self.cursor.0 {
                    more.alongside(self.note(self.cursor.0)).await?;
                }
                break;
            }
            if !stopping {
                self.patient_until = Instant::now() + LAST_RECEIPTS;
            }
            if self.follows_at.is_some_and(|at| at <= Instant::now()) {
                more.alongside(self.note(self.taken_up_to)).await?;
                self.moved_at = Instant::now();
                self.follows_at = None;
            }
            let room = self.in_flight.len() < PAGES_IN_FLIGHT && !stopping;
            if room && self.is_more {
                let events = more.alongside(self.read()).await?;
                more = LogWait::after(&*store, self.cursor);
                if !self.publish(&events).await? {
                    break;
                }
            }
            let waits = !self.in_flight.is_empty();
            tokio::select! {
                biased;
                taken = first_receipt(&mut self.in_flight) => more.alongside(self.taken(taken)).await?,
                () = tokio::time::sleep_until(self.follows_at.unwrap_or(self.patient_until)), if self.follows_at.is_some() => {}
                woken = more.woken(), if !stopping && !self.is_more => {
                    woken?;
                    self.is_more = true;
                }
                _ = tick.tick() => more.alongside(self.tick()).await?,
                // A long run of events without messages must not block the tick, which moves the checkpoint.
                () = std::future::ready(()), if room && self.is_more => {}
                () = tokio::time::sleep_until(self.stalls_at), if waits => self.stalls_at = stall(self.worker),
                () = self.shutdown.cancelled(), if !stopping => {}
                () = self.claim.ends(), if !stopping => {}
                // Consumers in this process stop too, so a receipt may never arrive. Messages that no consumer has
                // handled by then are published again after the next start.
                () = tokio::time::sleep_until(self.patient_until), if stopping => break,
            }
        }
        if self.worker.lanes[0].next < self.taken_up_to {
            self.note(self.taken_up_to).await?;
        }
        let next = self.worker.lanes[0].next;
        Ok(self.claim.release(self.worker, next).await?)
    }

    /// Reads the next page of the log, and starts to read the page after it.
    async fn read(&mut self) -> Result<Vec<Arc<Recorded>>, Trouble> {
        let store = self.worker.store.clone();
        let query = self.relay.routes.query();
        let page = match self.ahead.join_next().await {
            Some(read) => read.map_err(|error| StoreError::Unavailable(error.to_string()))??,
            None => store.read_log(&query, self.cursor, PAGE).await?,
        };
        self.worker.is_of_this_log()?;
        // If the log has more events after all, `wait` resolves at once.
        self.is_more = page.more;
        self.cursor = page.next;
        if self.is_more {
            let cursor = self.cursor;
            self.ahead.spawn(async move { store.read_log(&query, cursor, PAGE).await });
        }
        Ok(page.events)
    }

    /// Publishes the messages of these events. Returns `false` if the lane has to stop first.
    async fn publish(&mut self, events: &[Arc<Recorded>]) -> Result<bool, Trouble> {
        let (messages, sources) = self.relay.messages(self.lane, &self.labels, self.worker, events).await?;
        if messages.is_empty() {
            return Ok(true);
        }
        if self.in_flight.is_empty() {
            self.stalls_at = Instant::now() + STALLED;
        }
        let mut publishing = self.publisher.publish(messages);
        let published = loop {
            tokio::select! {
                biased;
                published = &mut publishing => break published,
                // While the publisher waits for room in its buffer, the relay may have to stop. Messages that are
                // already in the buffer are then published again later.
                () = self.shutdown.cancelled() => return Ok(false),
                () = self.claim.ends() => return Ok(false),
                () = tokio::time::sleep_until(self.stalls_at) => self.stalls_at = stall(self.worker),
            }
        };
        match published {
            Ok(receipt) => self.in_flight.push_back(InFlight { next: self.cursor, receipt, sources }),
            Err(error) => return Err(self.relay.refused(self.worker, &sources, error).await),
        }
        Ok(true)
    }

    /// Handles the receipt of the first page in flight, and then the receipts of further pages if these have arrived
    /// too.
    async fn taken(&mut self, first: Result<(), BusError>) -> Result<(), Trouble> {
        let mut outcome = Some(first);
        while let Some(taken) = outcome.take() {
            let Some(page) = self.in_flight.pop_front() else { break };
            if let Err(error) = taken {
                return Err(self.relay.refused(self.worker, &page.sources, error).await);
            }
            self.taken_up_to = page.next.0;
            if let Some(source) = page.sources.last() {
                self.worker.lanes[0].event = Some(LastEvent { position: source.position, id: source.id });
            }
            outcome = self.in_flight.front_mut().and_then(|page| (&mut page.receipt).now_or_never());
        }
        let now = Instant::now();
        self.follows_at.get_or_insert(now + CHECKPOINT_AFTER);
        self.patient_until = now + LAST_RECEIPTS;
        self.stalls_at = now + STALLED;
        self.worker.reporter.fine();
        self.backoff.reset();
        Ok(())
    }

    /// Retries parked events, and moves the checkpoint past events that have no messages.
    async fn tick(&mut self) -> Result<(), Trouble> {
        self.worker.redrive_due().await?;
        let is_behind = self.worker.lanes[0].next < self.cursor.0;
        if self.in_flight.is_empty() && is_behind && self.moved_at.elapsed() > IDLE_CHECKPOINT {
            self.note(self.cursor.0).await?;
            self.moved_at = Instant::now();
        }
        Ok(())
    }

    async fn note(&mut self, next: i64) -> Result<(), Stop> {
        note(self.worker, &**self.publisher, next).await
    }
}

/// Waits for the receipt of the first page in flight.
async fn first_receipt(in_flight: &mut VecDeque<InFlight>) -> Result<(), BusError> {
    match in_flight.front_mut() {
        Some(first) => (&mut first.receipt).await,
        None => std::future::pending().await,
    }
}

/// Moves the checkpoint, and stores in the checkpoint the ends up to which the bus has accepted messages. Any message
/// after these ends was sent later.
async fn note(worker: &mut Worker, publisher: &dyn Publisher, next: i64) -> Result<(), Stop> {
    worker.lanes[0].taken.update(&publisher.taken());
    worker.checkpoint(next).await
}

/// Reports that the bus accepts no messages, and returns the time of the next report.
fn stall(worker: &mut Worker) -> Instant {
    worker.reporter.trouble(format!("the bus has acknowledged nothing for {} s", STALLED.as_secs()));
    Instant::now() + STALLED_AGAIN
}

#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Stop(#[from] Stop),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Bus(#[from] BusError),
}
