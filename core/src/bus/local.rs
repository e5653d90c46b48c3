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
pub struct LocalBus(Arc<Handle>);

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
    seat: Seat,
    wake: Arc<Notify>,
}

impl LocalBus {
    /// Creates a bus whose topics each have this number of partitions. Zero counts as one.
    pub fn new(partitions: u32) -> Self {
        Self(Arc::new(Handle(Arc::new(SharedBus {
            state: Mutex::new(BusState::new(partitions)),
            room: Notify::new(),
        }))))
    }

    /// Returns how many messages of a topic are not yet acknowledged by all groups. The number is at most [`HELD_MAX`].
    pub fn held(&self, topic: &str) -> usize {
        self.0.0.with(|state, _| state.held(topic)).unwrap_or(0)
    }

    /// Drops all messages. From now on, every call and every receipt, including those already waiting, fails with
    /// [`BusError::Unavailable`].
    pub fn close(&self) {
        self.0.0.close();
    }
}

impl Default for LocalBus {
    fn default() -> Self {
        Self::new(PARTITIONS_DEFAULT)
    }
}

impl fmt::Debug for LocalBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalBus").finish_non_exhaustive()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[async_trait]
impl Publisher for LocalBus {
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        let shared = &self.0.0;
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
        let shared = self.0.0.clone();
        let (seat, wake) = shared.with(|state, wakes| state.join(group, topics, wakes))?;
        Ok(Box::new(LocalConsumer { shared, seat, wake }))
    }

    fn is_local(&self) -> bool {
        true
    }
}

#[async_trait]
impl Consumer for LocalConsumer {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        loop {
            consume_budget().await;
            // There is no other await between this line and the return, so a dropped future never loses messages.
            match self.shared.with(|state, wakes| state.next(&mut self.seat, max.max(1), wakes))? {
                Next::Nothing => self.wake.notified().await,
                Next::Assigned(partitions) => return Ok(Polled::Assigned(partitions)),
                Next::Revoked(partitions) => return Ok(Polled::Revoked(partitions)),
                Next::Messages(taken) => {
                    let deliver = |(partition, offset, message): (Partition, i64, Arc<Message>)| Delivery {
                        partition,
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
        let freed = self.shared.with(|state, _| state.seek(&self.seat, partition, next))??;
        self.shared.release(freed);
        Ok(())
    }

    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError> {
        let freed = self.shared.with(|state, _| state.acknowledge(&self.seat, partition, next))??;
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
