//! Consumers of a bus. The effects of each polled batch are stored together with the offsets of the batch, usually in
//! one commit.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    base::{backoff::Backoff, name},
    bus::{Bus, BusError, Consumer, Partition, Polled},
    commit::{Commit, DocumentKey, Put},
    follow::{
        checkpoint::{CHECKPOINTS, Item, Lane},
        parking::{Lost, parking_key},
        worker::{BATCH_MAX, PARKED_TICK, RetryPolicy, Stop, Worker},
    },
    handler::Handler,
    health::{Health, State},
    store::{EventStore, Scan},
};

/// If no messages arrive, a consumer counts as healthy again after this time without a failure. The wait is needed
/// because a bus may take a while to report a failure.
const CALM: Duration = Duration::from_secs(3);

/// How long a group waits for the very first message of a topic before the health report names the topic.
const SILENT_MAX: Duration = Duration::from_secs(30);
/// The interval at which the group then checks whether such a topic has a first message.
const SILENT_LOOK: Duration = Duration::from_secs(1);

/// A handler that consumes topics as a group. The offsets of the group are documents in the store, and are committed
/// together with the effects.
pub struct Group {
    name: Arc<str>,
    topics: Vec<String>,
    handler: Arc<dyn Handler>,
    members: u32,
    retry: RetryPolicy,
    instance: Option<Arc<str>>,
    heard: Heard,
}

debug_fields!(Group { name, topics, members });

/// The topics from which the group has received at least one message, in this process or an earlier one.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<BTreeSet<Arc<str>>>>);

impl Heard {
    fn topics(&self) -> MutexGuard<'_, BTreeSet<Arc<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, topic: &Arc<str>) {
        let mut topics = self.topics();
        if !topics.contains(topic) {
            topics.insert(topic.clone());
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Stop(#[from] Stop),
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl From<crate::store::StoreError> for Ended {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Stop(error.into())
    }
}

impl Group {
    /// Creates a consumer group with this name. The store keeps the group's offsets under this name. The rules for
    /// names are those of [`Subscription::new`](crate::Subscription::new).
    pub fn new(name: &str, topics: &[&str], handler: impl Handler) -> Self {
        Self {
            name: name.into(),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            handler: Arc::new(handler),
            members: 1,
            retry: RetryPolicy::default(),
            instance: None,
            heard: Heard::default(),
        }
    }

    /// Sets how many members of the group run in this process. Each member handles its own partitions, independently of
    /// the other members. Use one member if the messages affect the same aggregates, and several members if the handler
    /// waits for external systems.
    pub fn members(mut self, members: u32) -> Self {
        self.members = members.max(1);
        self
    }

    /// Sets when failed messages are retried.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets the instance name that identifies this process if several processes share the store.
    pub(crate) fn shared(mut self, instance: Option<Arc<str>>) -> Self {
        self.instance = instance;
        self
    }

    /// Reports each topic that has never had a message, until its first message arrives. The report reveals misspelt
    /// topic names, which cause no other error, because joining a topic creates the topic.
    pub(crate) fn watch(&self, store: Arc<dyn EventStore>, health: Health) -> impl Future<Output = ()> + Send + use<> {
        let name = self.name.clone();
        let heard = self.heard.clone();
        let mut silent: Vec<Arc<str>> = self.topics.iter().map(|topic| topic.as_str().into()).collect();
        async move {
            let part = format!("{name}.topics");
            let mut reported = false;
            tokio::time::sleep(SILENT_MAX).await;
            loop {
                let known = heard.topics().clone();
                silent.retain(|topic| !known.contains(topic));
                for topic in &silent {
                    // The store is checked too, because another instance may receive all messages of the topic.
                    let prefix = format!("{name}/{topic}/");
                    let found =
                        store.scan(CHECKPOINTS, &Scan::After(prefix.as_str().into()), 1).await.unwrap_or_default();
                    if found.first().is_some_and(|found| found.key.id.starts_with(&prefix)) {
                        heard.add(topic);
                    }
                }
                let known = heard.topics().clone();
                silent.retain(|topic| !known.contains(topic));
                if silent.is_empty() {
                    if reported {
                        health.remove(&part);
                    }
                    return;
                }
                let reason = format!(
                    "group {name} has never received a message from {}: check the name, and that the service publishes",
                    silent.join(", ")
                );
                if !std::mem::replace(&mut reported, true) {
                    tracing::warn!(group = %name, topics = silent.join(", "), "a topic has never delivered a message");
                }
                health.set(&part, State::NeedsAttention(reason));
                tokio::time::sleep(SILENT_LOOK).await;
            }
        }
    }

    /// The name of the group.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Joins the topics on the bus. From then on, the group misses no message.
    pub async fn join(self, bus: &dyn Bus) -> Result<Joined, BusError> {
        name::check("group", &self.name).map_err(|error| BusError::Unavailable(error.to_string()))?;
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        let mut consumers = Vec::new();
        for number in 0..self.members {
            // Each member has its own name, which stays the same after a restart.
            let instance = self.instance.as_ref().map(|name| format!("{name}.{number}"));
            consumers.push(match instance {
                Some(instance) => bus.join_as(&self.name, &topics, &instance).await?,
                None => bus.join(&self.name, &topics).await?,
            });
        }
        Ok(Joined { group: self, consumers, is_local: bus.is_local() })
    }
}

/// A group that has joined its topics.
pub struct Joined {
    group: Group,
    consumers: Vec<Box<dyn Consumer>>,
    is_local: bool,
}

debug_fields!(Joined { group, is_local });

impl Joined {
    /// Consumes messages until `shutdown` is cancelled, then finishes the current batch. All members run in the calling
    /// task; a [`Runtime`](crate::Runtime) gives each member its own task.
    ///
    /// # Errors
    /// Fails with [`BusError::Misconfigured`] if the bus refuses the group permanently. All other errors are retried,
    /// and health reports them.
    pub async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), BusError> {
        join_all(self.members(&store, &health, &shutdown)).await.into_iter().collect()
    }

    /// Returns one future per member. Each future consumes messages.
    pub(crate) fn members(
        self,
        store: &Arc<dyn EventStore>,
        health: &Health,
        shutdown: &CancellationToken,
    ) -> impl Iterator<Item = impl Future<Output = Result<(), BusError>> + use<>> {
        let group = self.group;
        let is_local = self.is_local;
        self.consumers.into_iter().enumerate().map(move |(number, consumer)| {
            let part = format!("{}#{number}", group.name);
            let reporter = health.reporter(&part, shutdown);
            let worker = Worker::new(&group.name, store.clone(), group.handler.clone(), Vec::new(), reporter)
                .retry(group.retry.clone())
                .among_others(!is_local || group.instance.is_some());
            // Offsets of a local bus are meaningless in other processes, so each process stores its own offsets.
            let home = group.instance.clone().filter(|_| is_local);
            let member = Member {
                worker,
                consumer,
                home,
                heard: group.heard.clone(),
                is_local,
                assigned: Vec::new(),
                lane_of: HashMap::new(),
                unsettled: false,
                ahead: None,
            };
            member.consume(part, health.clone(), shutdown.clone())
        })
    }
}

struct Member {
    worker: Worker,
    consumer: Box<dyn Consumer>,
    home: Option<Arc<str>>,
    heard: Heard,
    /// Whether the bus exists only inside this process. On such a bus, a relay counts a message as sent only after the
    /// message was handled.
    is_local: bool,
    /// The partitions that the bus has assigned.
    assigned: Vec<Partition>,
    /// The lane of each assigned partition whose offset was loaded.
    lane_of: HashMap<Partition, usize>,
    /// Whether the positions in the assigned partitions must be set again, because something has failed since they were
    /// set.
    unsettled: bool,
    /// The result of a poll that ran while the previous batch was handled.
    ahead: Option<Result<Polled, BusError>>,
}

impl Member {
    async fn consume(mut self, part: String, health: Health, shutdown: CancellationToken) -> Result<(), BusError> {
        let mut backoff = Backoff::long();
        let mut tick = interval(PARKED_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calm_from = Instant::now() + CALM;
        while !shutdown.is_cancelled() {
            if self.unsettled {
                // Messages that were polled but not committed are polled again from the offset in the store. No new
                // message may be handled before that, because the offset of the new message would skip the uncommitted
                // messages.
                if let Err(error) = self.assign(true).await {
                    self.pause(&error, &mut backoff, &shutdown).await;
                    continue;
                }
                calm_from = Instant::now() + CALM;
            }
            let ended = tokio::select! {
                polled = next(&mut self.ahead, &mut *self.consumer) => match polled {
                    Ok(polled) => self.take(polled).await,
                    Err(error) => Err(error.into()),
                },
                _ = tick.tick() => {
                    if Instant::now() > calm_from {
                        self.worker.reporter.fine();
                    }
                    self.worker.redrive_due().await.map_err(Ended::from)
                }
                () = shutdown.cancelled() => Ok(()),
            };
            match ended {
                Ok(()) => backoff.reset(),
                Err(Ended::Bus(error @ BusError::Misconfigured(_))) => {
                    health.set(&part, State::Failed(error.to_string()));
                    return Err(error);
                }
                Err(error) => {
                    self.unsettled = true;
                    match self.ahead.take() {
                        Some(Ok(Polled::Assigned(partitions))) => self.assigned.extend(partitions),
                        Some(Ok(Polled::Revoked(partitions))) => self.let_go(&partitions),
                        // Messages that were polled ahead are also polled again from the offset in the store.
                        Some(_) | None => {}
                    }
                    if matches!(error, Ended::Stop(Stop::Renewed)) {
                        self.worker.reporter.trouble(error.to_string());
                        continue;
                    }
                    self.pause(&error, &mut backoff, &shutdown).await;
                }
            }
        }
        if self.home.is_some() {
            let lanes = self.worker.lanes.iter().filter(|lane| lane.version > 0);
            let forget = |lane: &Lane| Put { key: lane.key.clone(), expected: None, body: None, due: None };
            let puts = lanes.map(forget).collect();
            // If this commit fails, other instances remove the checkpoints some time after they consider this instance
            // dead.
            _ = self.worker.store.commit(Commit { appends: Vec::new(), puts }).await;
        }
        health.set(&part, State::Stopped);
        Ok(())
    }

    async fn pause(&mut self, ended: &Ended, backoff: &mut Backoff, shutdown: &CancellationToken) {
        self.worker.reporter.trouble(ended.to_string());
        tokio::select! {
            () = backoff.wait() => {}
            () = shutdown.cancelled() => {}
        }
    }

    async fn take(&mut self, polled: Polled) -> Result<(), Ended> {
        match polled {
            Polled::Assigned(partitions) => {
                self.assigned.extend(partitions);
                self.assign(false).await?;
                self.worker.reporter.fine();
            }
            Polled::Revoked(partitions) => {
                self.let_go(&partitions);
                self.assign(false).await?;
            }
            Polled::Wiped(partitions) => {
                for partition in partitions {
                    let Some(lane) = self.lane_of.get(&partition).copied() else { continue };
                    tracing::warn!(
                        group = %self.worker.name, ?partition,
                        "the topic was emptied: reading from its beginning"
                    );
                    self.worker.lanes[lane].start_over();
                    self.consumer.seek(&partition, None).await?;
                }
            }
            Polled::Lost { partition, offsets } => {
                let Some(lane) = self.lane_of.get(&partition).copied() else { return Ok(()) };
                let topic = partition.topic.clone();
                let number = partition.number;
                let lost = Lost { topic, partition: number, from: offsets.start, to: offsets.end };
                self.worker.lose(lane, lost).await?;
                self.consumer.seek(&partition, self.worker.lanes[lane].bookmark()).await?;
            }
            Polled::Messages(deliveries) => {
                let is_behind = deliveries.len() >= BATCH_MAX;
                let mut nexts = HashMap::new();
                let mut ahead = HashMap::new();
                let mut items = Vec::with_capacity(deliveries.len());
                for delivery in deliveries {
                    // If the partition was revoked in the meantime, the message belongs to the new owner of the
                    // partition.
                    let Some(lane) = self.lane_of.get(&delivery.partition).copied() else { continue };
                    let next = delivery.offset + 1;
                    let id = delivery.id();
                    if next <= self.worker.lanes[lane].next {
                        continue;
                    }
                    let marks = ahead.entry(lane).or_insert_with(|| self.worker.lanes[lane].marks.clone());
                    let is_new = delivery.message.as_ref().map_or(true, |message| marks.pass(message));
                    let key = match &delivery.message {
                        Ok(message) => parking_key(&message.key),
                        Err(undecodable) => parking_key(&undecodable.key),
                    };
                    if is_new {
                        items.push(Item { lane, next, key, message: delivery.message });
                    }
                    nexts.insert(delivery.partition, (lane, next, id));
                }
                self.deliver(&items, is_behind).await?;
                let lanes = &self.worker.lanes;
                let behind = nexts.values().filter(|(lane, next, _)| lanes[*lane].next < *next);
                let after =
                    |&(lane, next, id): &(usize, i64, _)| (lane, Lane { next, last: Some(id), ..lanes[lane].clone() });
                let after: HashMap<_, _> = behind.map(after).collect();
                if !after.is_empty() {
                    self.worker.put_checkpoints(after).await?;
                }
                for (partition, (_, next, _)) in nexts {
                    self.heard.add(&partition.topic);
                    self.consumer.acknowledge(&partition, next).await?;
                }
            }
        }
        Ok(())
    }

    fn let_go(&mut self, partitions: &[Partition]) {
        self.assigned.retain(|partition| !partitions.contains(partition));
    }

    /// Handles the items. If the consumer is behind, polls the next batch while the current batch is committed.
    /// Otherwise, a poll after the commit is better, because it returns more messages.
    async fn deliver(&mut self, items: &[Item], is_behind: bool) -> Result<(), Stop> {
        let Self { worker, consumer, ahead, .. } = self;
        let mut delivering = std::pin::pin!(worker.deliver(items));
        loop {
            tokio::select! {
                biased;
                delivered = &mut delivering => return delivered,
                polled = consumer.poll(BATCH_MAX), if is_behind && ahead.is_none() => *ahead = Some(polled),
            }
        }
    }

    /// Makes the lanes of the worker match the assigned partitions. Delivery of new partitions starts at the offset in
    /// the store. With `rewind`, delivery of all other partitions restarts at the offset in the store too.
    async fn assign(&mut self, rewind: bool) -> Result<(), Ended> {
        let mut lane_of = HashMap::new();
        let mut lanes = Vec::new();
        let mut seeks = Vec::new();
        // For partitions that remain assigned, the lanes in memory are valid only as long as the log has the history
        // under which they were read.
        let history = self.worker.store.history();
        let rewind = rewind || history != self.worker.history;
        for partition in &self.assigned {
            let id = format!("{}/{}/{}", self.worker.name, partition.topic, partition.number);
            let mut lane = Lane::new(&id, Some(partition.incarnation.clone()));
            if let Some(home) = &self.home {
                let id = format!("{}@{home}/{}/{}", self.worker.name, partition.topic, partition.number);
                lane.key = DocumentKey::new(CHECKPOINTS, id);
                lane.home = Some(home.clone());
            }
            let found = lane.load(&*self.worker.store).await?;
            if found.is_some_and(|next| next > 0) {
                self.heard.add(&partition.topic);
            }
            if found.is_none() && lane.version > 0 && !self.is_local {
                lane.marks.interrupt();
            }
            let known = self.lane_of.get(partition).map(|index| &self.worker.lanes[*index]);
            match known.filter(|known| !rewind && known.version == lane.version) {
                // The lane in memory is more reliable than its checkpoint: if the topic was wiped after the checkpoint
                // was written, the checkpoint no longer shows the position of the lane.
                Some(known) => lane = known.clone(),
                None => seeks.push((partition, lane.bookmark())),
            }
            lane_of.insert(partition.clone(), lanes.len());
            lanes.push(lane);
        }
        // The parked messages are read before any message is delivered, because a message may have to wait behind them.
        let ids: Vec<_> = lanes.iter().map(|lane| lane.place.clone()).collect();
        let parked = self.worker.parked.load(&*self.worker.store, &ids).await?;
        self.worker.set_parked(parked);
        (self.lane_of, self.worker.lanes) = (lane_of, lanes);
        self.worker.history = history;
        for (partition, from) in seeks {
            self.consumer.seek(partition, from).await?;
        }
        self.unsettled = false;
        Ok(())
    }
}

/// Returns the result of the poll that ran while the previous batch was handled, if there is one. Otherwise, polls now.
/// No message is lost if the future is dropped.
async fn next(ahead: &mut Option<Result<Polled, BusError>>, consumer: &mut dyn Consumer) -> Result<Polled, BusError> {
    match ahead.take() {
        Some(polled) => polled,
        None => consumer.poll(BATCH_MAX).await,
    }
}
