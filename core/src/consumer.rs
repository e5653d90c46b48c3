//! Following a bus: a whole polled batch becomes one commit, together with the offsets.

use std::{collections::HashMap, sync::Arc};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    bus::{Bus, BusError, Consumer, Partition, Polled},
    handler::Handler,
    health::{Health, State},
    parking::ParkedKeys,
    store::EventStore,
    worker::{BATCH_MAX, Item, Lane, PARKED_TICK, RetryPolicy, Stop, Worker},
};

/// A handler that consumes topics as a group. Its offsets are documents in the store, committed with the effects.
pub struct Group {
    name: Arc<str>,
    topics: Vec<String>,
    handler: Arc<dyn Handler>,
    members: u32,
    retry: RetryPolicy,
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
    /// A consumer group under this name, which its offsets are stored by.
    pub fn new(name: &str, topics: &[&str], handler: impl Handler) -> Self {
        Self {
            name: name.into(),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            handler: Arc::new(handler),
            members: 1,
            retry: RetryPolicy::default(),
        }
    }

    /// How many members to run in this process; each handles its partitions on its own. One suits handlers whose work
    /// meets in the same aggregates; more suit handlers that wait for something outside.
    pub fn members(mut self, members: u32) -> Self {
        self.members = members.max(1);
        self
    }

    /// When failed messages are tried again.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Joins the bus; from then on the group misses nothing.
    pub async fn join(self, bus: &dyn Bus) -> Result<Joined, BusError> {
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        let mut consumers = Vec::new();
        for _ in 0..self.members {
            consumers.push(bus.join(&self.name, &topics).await?);
        }
        Ok(Joined { group: self, consumers })
    }
}

/// A group that has joined its topics.
pub struct Joined {
    group: Group,
    consumers: Vec<Box<dyn Consumer>>,
}

impl Joined {
    /// Consumes until `shutdown`, then finishes the batch in hand.
    pub async fn run(self, store: Arc<dyn EventStore>, health: Health, shutdown: CancellationToken) -> Result<(), String> {
        let mut members = tokio::task::JoinSet::new();
        let group = Arc::new(self.group);
        for (number, consumer) in self.consumers.into_iter().enumerate() {
            let part = format!("{}#{number}", group.name);
            let worker = Worker {
                name: group.name.clone(),
                store: store.clone(),
                handler: group.handler.clone(),
                retry: group.retry.clone(),
                lanes: Vec::new(),
                parked: ParkedKeys::new(group.name.clone()),
                reporter: health.reporter(&part),
            };
            let member = Member { worker, consumer, lane_of: HashMap::new() };
            members.spawn(member.consume(part, health.clone(), shutdown.clone()));
        }
        while let Some(ended) = members.join_next().await {
            if let Err(panic) = ended {
                shutdown.cancel();
                return Err(format!("group {} ended: {panic}", group.name));
            }
        }
        Ok(())
    }
}

struct Member {
    worker: Worker,
    consumer: Box<dyn Consumer>,
    lane_of: HashMap<Partition, usize>,
}

impl Member {
    async fn consume(mut self, part: String, health: Health, shutdown: CancellationToken) {
        let mut backoff = Backoff::long();
        let mut tick = interval(PARKED_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !shutdown.is_cancelled() {
            let ended = tokio::select! {
                polled = self.consumer.poll(BATCH_MAX) => match polled {
                    Ok(polled) => self.take(polled).await,
                    Err(error) => Err(error.into()),
                },
                _ = tick.tick() => self.worker.redrive_due().await.map_err(Ended::from),
                () = shutdown.cancelled() => Ok(()),
            };
            let Err(ended) = ended else {
                backoff.reset();
                continue;
            };
            self.worker.reporter.trouble(ended.to_string());
            tokio::select! {
                () = backoff.wait() => {}
                () = shutdown.cancelled() => {}
            }
            // What was polled but not committed is polled again from the offset in the store.
            let partitions: Vec<Partition> = self.lane_of.keys().cloned().collect();
            if let Err(error) = self.assign(partitions, true).await {
                self.worker.reporter.trouble(error.to_string());
            }
        }
        health.set(&part, State::Stopped);
    }

    async fn take(&mut self, polled: Polled) -> Result<(), Ended> {
        match polled {
            Polled::Assigned(partitions) => {
                let all = self.lane_of.keys().cloned().chain(partitions).collect();
                self.assign(all, false).await?;
                self.worker.reporter.fine();
            }
            Polled::Revoked(partitions) => {
                let kept = self.lane_of.keys().filter(|partition| !partitions.contains(partition)).cloned().collect();
                self.assign(kept, false).await?;
            }
            Polled::Messages(deliveries) => {
                let mut nexts = HashMap::new();
                let mut items = Vec::with_capacity(deliveries.len());
                for delivery in deliveries {
                    // A message of a partition that was revoked meanwhile is its new owner's.
                    let Some(lane) = self.lane_of.get(&delivery.partition).copied() else { continue };
                    let next = delivery.offset + 1;
                    let key = match &delivery.message {
                        Ok(message) => message.key.clone(),
                        Err(undecodable) => undecodable.key.clone(),
                    };
                    if delivery.offset >= self.worker.lanes[lane].next {
                        items.push(Item { lane, next, key, message: delivery.message });
                    }
                    nexts.insert(delivery.partition, next);
                }
                self.worker.deliver(&items).await?;
                for (partition, next) in nexts {
                    self.consumer.acknowledge(&partition, next).await?;
                }
            }
        }
        Ok(())
    }

    /// Takes exactly these partitions. New ones, and with `rewind` all, are delivered from the offset in the store.
    async fn assign(&mut self, partitions: Vec<Partition>, rewind: bool) -> Result<(), Ended> {
        let known = std::mem::take(&mut self.lane_of);
        let lanes = std::mem::take(&mut self.worker.lanes);
        for partition in partitions {
            let id = format!("{}/{}/{}", self.worker.name, partition.topic, partition.number);
            let mut lane = Lane::new(&id, Some(partition.incarnation.clone()));
            let next = lane.load(&*self.worker.store).await?;
            let same = known.get(&partition).is_some_and(|index| lanes[*index].version == lane.version);
            if rewind || !same {
                self.consumer.seek(&partition, next).await?;
            }
            self.lane_of.insert(partition, self.worker.lanes.len());
            self.worker.lanes.push(lane);
        }
        self.worker.load_parked().await?;
        Ok(())
    }
}
