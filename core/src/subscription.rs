//! Following the log: catch up, then live, with the checkpoint in the same commit as the effects.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    bus::Message,
    checkpoint::Lane,
    claim::{Claim, Turn},
    event::Position,
    handler::Handler,
    health::Health,
    instance::Instance,
    parking::ParkedKeys,
    store::{EventStore, LogQuery},
    worker::{BATCH_MAX, Item, PARKED_TICK, RetryPolicy, Stop, Worker},
};

/// How often the checkpoint of a lane that only skips events is moved.
pub(crate) const IDLE_CHECKPOINT: Duration = Duration::from_secs(1);

/// Messages in one batch of a subscription that lingers.
const LINGERING_BATCH_MAX: usize = 16_384;
/// How much longer it lingers where there is much to do.
const LINGER_UNDER_LOAD: u32 = 4;

/// A handler that follows the log of its own service.
///
/// Each lane has a checkpoint and a worker; the lane of an event is a hash of its stream id, so order is kept per stream.
pub struct Subscription {
    name: Arc<str>,
    handler: Arc<dyn Handler>,
    query: LogQuery,
    lanes: u32,
    start: Start,
    retry: RetryPolicy,
    linger: Duration,
    instance: Option<Instance>,
}

/// Where a subscription without a checkpoint begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// With the first event of the log.
    Beginning,
    /// With what is recorded from now on.
    Now,
    /// After this position.
    After(Position),
}

impl Subscription {
    /// A subscription under this name, which its checkpoints are stored by: never reuse it for another handler.
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
        }
    }

    /// Only these events; the default is all.
    pub fn query(mut self, query: LogQuery) -> Self {
        self.query = query;
        self
    }

    /// How many lanes to handle side by side; 1 by default. A number that has once been stored must stay.
    pub fn lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// Where to begin without a checkpoint; with the first event by default.
    pub fn start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// When failed messages are tried again.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Waits at least this long between batches once it has caught up, four times as long after one of more than 512 messages, and
    /// takes larger ones: for a handler that writes only the last state of each key, and that nobody waits for. Not at all by
    /// default.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Shares the lanes with other instances that follow the same log under the same name. Without one, this process takes
    /// all of them.
    pub(crate) fn shared(mut self, instance: Option<Instance>) -> Self {
        self.instance = instance;
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Follows the log until `shutdown`, then handles what is recorded by then. All lanes take turns in the calling task; a
    /// [`Runtime`](crate::Runtime) gives each a task of its own.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), String> {
        join_all(self.workers(&store, &health, &shutdown)).await;
        Ok(())
    }

    /// What follows the lanes, one for each.
    pub(crate) fn workers(
        self,
        store: &Arc<dyn EventStore>,
        health: &Health,
        shutdown: &CancellationToken,
    ) -> impl Iterator<Item = impl Future<Output = ()> + use<>> {
        let this = Arc::new(self);
        (0..this.lanes).map(move |lane| this.clone().follow(lane, store.clone(), health.clone(), shutdown.clone()))
    }

    async fn follow(
        self: Arc<Self>,
        lane: u32,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) {
        let reporter = health.reporter(&format!("{}/{lane}", self.name), &shutdown);
        let mut worker = Worker {
            name: self.name.clone(),
            store,
            handler: self.handler.clone(),
            retry: self.retry.clone(),
            lanes: vec![Lane::new(&format!("{}/{lane}", self.name), None)],
            history: 0,
            parked: ParkedKeys::new(self.name.clone()),
            reconciled_at: Instant::now(),
            reporter,
        };
        let claim = Claim::new(self.instance.as_ref(), &self.name, lane);
        let mut backoff = Backoff::long();
        while !shutdown.is_cancelled() {
            if let Err(stop) = self.follow_lane(lane, &claim, &mut worker, &shutdown).await {
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
        health.set(&format!("{}/{lane}", self.name), crate::health::State::Stopped);
    }

    async fn follow_lane(
        &self,
        lane: u32,
        claim: &Claim,
        worker: &mut Worker,
        shutdown: &CancellationToken,
    ) -> Result<(), Stop> {
        let Turn::Came(checkpoint) = claim.turn(worker, shutdown).await? else { return Ok(()) };
        let mut cursor = match checkpoint {
            Some(next) => Position(next),
            None => match self.start {
                Start::Beginning => Position::START,
                Start::After(position) => position,
                Start::Now => {
                    let head = worker.store.status().await?.head;
                    worker.checkpoint(head.0).await?;
                    head
                }
            },
        };
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
                // What is recorded by now is still handled, so that a drained service leaves nothing behind.
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
            let mut items: Vec<Item> = page
                .events
                .iter()
                .filter(|event| self.lanes == 1 || lane_of(event.stream.as_str(), self.lanes) == lane)
                .map(|event| Item {
                    lane: 0,
                    next: event.position.0,
                    key: event.stream.shared(),
                    message: Ok(Message::of(event, &source)),
                })
                .collect();
            if let Some(last) = items.last_mut() {
                last.next = page.next.0;
                worker.deliver(&items).await?;
                moved_at = Instant::now();
                // Who is behind has its large batches without waiting for them.
                if !self.linger.is_zero() && !page.more {
                    let load = if items.len() > BATCH_MAX { LINGER_UNDER_LOAD } else { 1 };
                    tokio::select! {
                        () = sleep(self.linger.saturating_mul(load)) => {}
                        () = shutdown.cancelled() => {}
                    }
                }
            }
            // If there is more after all, a wait for it is over at once.
            let caught_up = !page.more;
            cursor = page.next;
            if !caught_up && worker.parked.is_empty() {
                skip(worker, cursor, &mut moved_at).await?;
                continue;
            }
            let store = worker.store.clone();
            let mut more = store.wait(cursor);
            loop {
                tokio::select! {
                    woken = &mut more, if caught_up => break woken?,
                    () = std::future::ready(()), if !caught_up => break,
                    _ = tick.tick() => {
                        worker.redrive_due().await?;
                        skip(worker, cursor, &mut moved_at).await?;
                    }
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

/// Moves the checkpoint now and then past what was not for this lane.
async fn skip(worker: &mut Worker, cursor: Position, moved_at: &mut Instant) -> Result<(), Stop> {
    if worker.lanes[0].next < cursor.0 && moved_at.elapsed() > IDLE_CHECKPOINT {
        worker.checkpoint(cursor.0).await?;
        *moved_at = Instant::now();
    }
    Ok(())
}

/// The lane of a stream: a hash that must never change, because checkpoints are stored by it (FNV-1a, 32 bits).
pub(crate) fn lane_of(key: &str, lanes: u32) -> u32 {
    let hash = key.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash % lanes
}
