//! A bus inside one process: for tests, for examples and for a service that is one process anyway.
//!
//! It holds messages in memory only, and still nothing is lost: a [receipt](crate::bus::Receipt) resolves once every group
//! has acknowledged, which a consumer does after its own durable commit. A relay moves its checkpoint after the receipt,
//! so what a crash takes from here is still ahead of that checkpoint and is published again.

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

use self::state::{Freed, Next, Placed, Seat, State, Taken, Wakes};
use crate::bus::{
    Bookmark, Bus, BusError, Consumer, Delivery, Message, Outgoing, Partition, Polled, Publisher, Receipt,
};

mod state;

/// How many messages a topic holds before publishers wait: some seconds of a busy topic, and at about 1 kB each not more
/// than 64 MB of a process that has other things to do.
pub const HELD_MAX: usize = 65_536;
/// Enough for some handlers side by side; in one process, more partitions buy nothing.
const PARTITIONS_DEFAULT: u32 = 4;

/// A bus inside one process. Clones are handles to the same bus; it closes with the last of them.
///
/// - A message for a topic that no group has joined is dropped and its receipt resolves: there is nobody to tell.
///   Therefore join first, publish second.
/// - A group that joins later starts at the oldest message still held.
/// - A group whose members have all left stays, and messages are held for it until a member returns.
/// - [`Consumer::seek`] to an offset acknowledges all below it, since that offset comes from a commit of the group.
/// - A member gives up a partition on the poll after the one that said [`Polled::Revoked`], and only then is it assigned
///   to another; a member that polls no more must be dropped.
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

/// Counts the handles that users have, which consumers do not.
struct Handle(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Tells waiting publishers that messages were freed.
    room: Notify,
}

struct LocalConsumer {
    shared: Arc<Shared>,
    seat: Seat,
    wake: Arc<Notify>,
}

impl LocalBus {
    /// A bus whose topics have this many partitions, at least one.
    pub fn new(partitions: u32) -> Self {
        Self(Arc::new(Handle(Arc::new(Shared { state: Mutex::new(State::new(partitions)), room: Notify::new() }))))
    }

    /// How many messages of a topic some group has yet to acknowledge, at most [`HELD_MAX`].
    pub fn held(&self, topic: &str) -> usize {
        self.0.0.with(|state, _| state.held(topic)).unwrap_or(0)
    }

    /// Lets go of all messages. From now on, and for all who wait, every call and every receipt says
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
            // Listens before it looks, so that room made in between is not missed.
            let room = shared.room.notified();
            match shared.with(|state, wakes| state.take(&mut rest, &done, wakes))? {
                Taken::All => break,
                Taken::Stride => {}
                Taken::Full => room.await,
            }
        }
        // The last share, unless some message is still held.
        shared.release(Freed { messages: Vec::new(), receipts: Arc::into_inner(done).into_iter().collect() });
        Ok(Box::pin(async move { receipt.await.map_err(|_| closed()) }))
    }
}

#[async_trait]
impl Bus for LocalBus {
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        if topics.is_empty() {
            return Err(BusError::Misconfigured(format!("group {group} joins no topic")));
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
            // From here to the return there is no other await: what was taken is never dropped half-way.
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
        // On a closed bus there is nothing to leave.
        let _ = self.shared.with(|state, wakes| state.leave(&self.seat, wakes));
    }
}

impl Shared {
    /// Everything that touches the state, in short holds of the lock; who must know of it is woken afterwards.
    fn with<T>(&self, act: impl FnOnce(&mut State, &mut Wakes) -> T) -> Result<T, BusError> {
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
            // Nobody waits for a receipt that was dropped.
            let _ = receipt.send(());
        }
    }

    fn close(&self) {
        // What the state held is dropped here, outside the lock.
        if self.with(State::close).is_ok() {
            self.room.notify_waiters();
        }
    }
}

fn closed() -> BusError {
    BusError::Unavailable("the local bus is closed".into())
}
