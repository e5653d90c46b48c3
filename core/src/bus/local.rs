//! A bus inside one process, for tests, for examples, and for services that all run in a single process.
//!
//! The bus holds messages only in memory, but a crash loses no message. A [receipt](crate::bus::Receipt) resolves once
//! every group has acknowledged the messages, and a consumer acknowledges messages after its own durable commit. A
//! relay moves its checkpoint only after the receipt. Messages that are lost in a crash are therefore still after the
//! relay's checkpoint, and the relay publishes them again.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use tokio::{
    sync::{Notify, oneshot},
    task::coop::consume_budget,
};

pub use self::state::HELD_MAX;
use self::state::{BusState, Freed, Next, Placed, Seat, Taken, Wakes};
use crate::bus::{
    Bookmark, Bus, BusError, Consumer, Delivery, Message, Outgoing, Partition, Polled, Publisher, Receipt,
};

mod state;

/// The default number of partitions per topic. This is enough for a few handlers in parallel; within one process, more
/// partitions bring no benefit.
const PARTITIONS_DEFAULT: u32 = 4;

/// A bus inside one process. Clones are handles to the same bus. The bus closes when the last handle is dropped.
///
/// - A message for a topic that no group has joined is dropped, and its receipt resolves at once, because no consumer
///   could acknowledge the message. Therefore join a topic before you publish to it.
/// - A group that joins a topic later starts at the oldest message that the topic still holds.
/// - A group continues to exist after all its members have left. The bus holds messages for the group until a member
///   joins again.
/// - [`Consumer::seek`] to an offset acknowledges all messages below the offset, because the offset comes from a commit
///   of the group.
/// - After a poll has returned [`Polled::Revoked`], the member releases the partition with its next poll. Only then is
///   the partition assigned to another member. A consumer that no longer polls must be dropped.
///
/// ```
/// use annals::{Bus, Consumer, LocalBus, bus::Polled};
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let bus = LocalBus::new(2);
/// let mut consumer = bus.join("payment", &["payment.commands"]).await?;
/// let Polled::Assigned(partitions) = consumer.poll(100).await? else { unreachable!() };
/// assert_eq!(partitions.len(), 2);
/// # Ok::<(), annals::BusError>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct LocalBus {
    handle: Arc<Handle>,
    prefix: Prefix,
}

/// A handle that a user of the bus holds. The bus closes when the last handle is dropped; consumers do not keep the bus
/// open.
struct Handle(Arc<SharedBus>);

struct SharedBus {
    state: Mutex<BusState>,
    /// Wakes waiting publishers after messages were removed.
    room: Notify,
}

struct LocalConsumer {
    shared: Arc<SharedBus>,
    prefix: Prefix,
    seat: Seat,
    wake: Arc<Notify>,
}

/// The prefix that topics and groups have on the bus; empty for none. Users of the bus see names without the prefix.
#[derive(Clone, Default)]
struct Prefix(Arc<str>);

impl Prefix {
    /// Returns the name that a topic or group has on the bus.
    fn on_bus(&self, name: &str) -> Arc<str> {
        format!("{}{name}", self.0).into()
    }

    /// Converts a partition from the form that the user sees, without the prefix in the topic, to the form on the bus.
    fn partition_on_bus(&self, known: &Partition) -> Partition {
        let mut partition = known.clone();
        if !self.0.is_empty() {
            let incarnation = known.incarnation.strip_suffix(&*self.0).and_then(|id| id.strip_suffix('/'));
            partition.incarnation = incarnation.unwrap_or(&known.incarnation).into();
            partition.topic = self.on_bus(&known.topic);
        }
        partition
    }

    /// Converts a partition from the form on the bus to the form that the user sees. In the latter form, the
    /// incarnation includes the prefix, because an offset under one prefix is meaningless under another.
    fn known(&self, mut partition: Partition) -> Partition {
        if !self.0.is_empty() {
            partition.topic = partition.topic.strip_prefix(&*self.0).unwrap_or(&partition.topic).into();
            partition.incarnation = format!("{}/{}", partition.incarnation, self.0).into();
        }
        partition
    }
}

impl LocalBus {
    /// Creates a bus whose topics each have this number of partitions. Zero counts as one.
    pub fn new(partitions: u32) -> Self {
        let shared = SharedBus { state: Mutex::new(BusState::new(partitions)), room: Notify::new() };
        Self { handle: Arc::new(Handle(Arc::new(shared))), prefix: Prefix::default() }
    }

    /// Sets a prefix for the names of all topics and consumer groups of this handle, so that several installations can
    /// share one bus. The default is no prefix. The prefix exists only on the bus: names in calls and in deliveries
    /// have no prefix. The bus on Kafka has the same setting.
    ///
    /// ```
    /// use annals::{Bus, LocalBus};
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// let bus = LocalBus::default();
    /// let staging = bus.clone().prefix("staging.");
    /// let _consumer = staging.join("payment", &["payment.commands"]).await?;
    /// // Without the prefix, the same topic is named `staging.payment.commands`.
    /// let _observer = bus.join("observer", &["staging.payment.commands"]).await?;
    /// # Ok::<(), annals::BusError>(()) }).unwrap();
    /// ```
    pub fn prefix(self, prefix: &str) -> Self {
        Self { prefix: Prefix(prefix.into()), ..self }
    }

    /// Returns how many messages of a topic are not yet acknowledged by all groups. The number is at most [`HELD_MAX`].
    pub fn held(&self, topic: &str) -> usize {
        let topic = self.prefix.on_bus(topic);
        self.handle.0.with(|state, _| state.held(&topic)).unwrap_or(0)
    }

    /// Drops all messages of the bus, whatever their prefix. From now on, every call and every receipt, including those
    /// already waiting, fails with [`BusError::Unavailable`].
    pub fn close(&self) {
        self.handle.0.close();
    }
}

impl Default for LocalBus {
    fn default() -> Self {
        Self::new(PARTITIONS_DEFAULT)
    }
}

impl fmt::Debug for LocalBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBus").field("prefix", &self.prefix.0).finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[async_trait]
impl Publisher for LocalBus {
    async fn publish(&self, mut messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        let shared = &self.handle.0;
        if !self.prefix.0.is_empty() {
            messages.iter_mut().for_each(|outgoing| outgoing.topic = self.prefix.on_bus(&outgoing.topic));
        }
        let mut rest: VecDeque<Placed> = messages.into_iter().map(Placed::new).collect();
        let (done, receipt) = oneshot::channel();
        let done = Arc::new(done);
        loop {
            consume_budget().await;
            // The publisher registers for the notification before it checks for room, so that no notification in
            // between is missed.
            let room = shared.room.notified();
            match shared.with(|state, wakes| state.take(&mut rest, &done, wakes))? {
                Taken::All => break,
                Taken::Stride => {}
                Taken::Full => room.await,
            }
        }
        // If the bus no longer holds any of the messages of this call, the receipt resolves immediately.
        shared.release(Freed { messages: Vec::new(), receipts: Arc::into_inner(done).into_iter().collect() });
        Ok(Box::pin(async move { receipt.await.map_err(|_| closed()) }))
    }
}

#[async_trait]
impl Bus for LocalBus {
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        if topics.is_empty() {
            return Err(BusError::Misconfigured(format!("group {group} subscribes to no topic")));
        }
        let shared = self.handle.0.clone();
        let prefix = self.prefix.clone();
        let group = prefix.on_bus(group);
        let topics: Vec<Arc<str>> = topics.iter().map(|topic| prefix.on_bus(topic)).collect();
        let (seat, wake) = shared.with(|state, wakes| state.join(&group, &topics, wakes))?;
        Ok(Box::new(LocalConsumer { shared, prefix, seat, wake }))
    }

    fn is_local(&self) -> bool {
        true
    }
}

#[async_trait]
impl Consumer for LocalConsumer {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        let prefix = self.prefix.clone();
        let known = |partitions: Vec<Partition>| partitions.into_iter().map(|found| prefix.known(found)).collect();
        loop {
            consume_budget().await;
            // There is no other await between this line and the return, so a dropped future never loses messages.
            match self.shared.with(|state, wakes| state.next(&mut self.seat, max.max(1), wakes))? {
                Next::Nothing => self.wake.notified().await,
                Next::Assigned(partitions) => return Ok(Polled::Assigned(known(partitions))),
                Next::Revoked(partitions) => return Ok(Polled::Revoked(known(partitions))),
                Next::Messages(taken) => {
                    let deliver = |(partition, offset, message): (Partition, i64, Arc<Message>)| Delivery {
                        partition: prefix.known(partition),
                        offset,
                        message: Ok(Message::clone(&message)),
                    };
                    return Ok(Polled::Messages(taken.into_iter().map(deliver).collect()));
                }
            }
        }
    }

    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError> {
        let next = from.map(|bookmark| bookmark.next);
        let partition = self.prefix.partition_on_bus(partition);
        let freed = self.shared.with(|state, _| state.seek(&self.seat, &partition, next))??;
        self.shared.release(freed);
        Ok(())
    }

    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError> {
        let partition = self.prefix.partition_on_bus(partition);
        let freed = self.shared.with(|state, _| state.acknowledge(&self.seat, &partition, next))??;
        self.shared.release(freed);
        Ok(())
    }
}

impl Drop for LocalConsumer {
    fn drop(&mut self) {
        // A closed bus has no members to remove.
        let _ = self.shared.with(|state, wakes| state.leave(&self.seat, wakes));
    }
}

impl SharedBus {
    /// Runs `act` on the state under a short lock, then wakes the tasks that the change affects.
    fn with<T>(&self, act: impl FnOnce(&mut BusState, &mut Wakes) -> T) -> Result<T, BusError> {
        let mut wakes = Wakes::new();
        let done = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return Err(closed());
            }
            act(&mut state, &mut wakes)
        };
        wakes.iter().for_each(|wake| wake.notify_one());
        Ok(done)
    }

    fn release(&self, freed: Freed) {
        if !freed.messages.is_empty() {
            self.room.notify_waiters();
        }
        for receipt in freed.receipts {
            // A dropped receipt has no waiter.
            let _ = receipt.send(());
        }
    }

    fn close(&self) {
        // The messages of the old state are dropped at the end of this statement, outside the lock.
        if self.with(BusState::close).is_ok() {
            self.room.notify_waiters();
        }
    }
}

fn closed() -> BusError {
    BusError::Unavailable("the local bus is closed".into())
}
