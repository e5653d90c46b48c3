//! The state of the bus, and the changes to that state. This module has no tasks, no locks and no waiting.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use crate::bus::{BusError, Message, Outgoing, Partition};

/// How many messages a topic holds before publishers must wait. A busy topic fills this space in a few seconds. With
/// about 1 kB per message, the messages take no more than 64 MB of memory.
pub const HELD_MAX: usize = 65_536;
/// The maximum number of messages that are accepted before the lock is released. With this limit, a large batch does
/// not block consumers.
const STRIDE: usize = 1_024;

pub(super) struct BusState {
    pub(super) closed: bool,
    partitions: u32,
    /// The incarnation of all topics, which is unique for each bus. A consumer therefore cannot seek to an offset of
    /// messages that were lost when an earlier process ended.
    incarnation: Arc<str>,
    topics: Vec<Topic>,
    topic_names: HashMap<Arc<str>, usize>,
    groups: Vec<GroupState>,
    group_names: HashMap<Box<str>, usize>,
    members_ever: u64,
}

struct Topic {
    logs: Vec<Log>,
    /// The number of messages held in all logs of the topic.
    held: usize,
}

/// One partition.
struct Log {
    partition: Partition,
    /// The offset of the first message held.
    base: i64,
    /// The messages held. Deliveries in progress share them, so that no message is copied under the lock.
    messages: VecDeque<Arc<Message>>,
    /// Receipts in the order of their offsets. A receipt waits until all messages up to its offset are removed, and
    /// resolves when the last reference to the receipt is dropped.
    receipts: VecDeque<(i64, Arc<oneshot::Sender<()>>)>,
    /// The cursors of all groups that ever joined the topic, by the index of the group.
    cursors: BTreeMap<usize, Cursor>,
}

/// The progress of a group in a partition.
struct Cursor {
    /// The offset below which the group has committed all messages.
    acknowledged: i64,
    /// The next offset to deliver, while the holder is at [`Stage::Delivering`].
    next: i64,
    /// The member that should hold the partition.
    target: Option<u64>,
    /// The member that holds the partition now. A member holds a revoked partition until its next poll.
    holder: Option<Holder>,
}

struct Holder {
    member: u64,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// The member has received the assignment, but has not called `seek` yet.
    Assigned,
    Delivering,
    /// The member has received the revocation, but may still work on the partition until its next poll.
    Revoked,
}

#[derive(Default)]
struct GroupState {
    members: BTreeMap<u64, MemberState>,
}

struct MemberState {
    topics: Vec<usize>,
    wake: Arc<Notify>,
}

/// The tasks to wake after the lock is released.
pub(super) type Wakes = Vec<Arc<Notify>>;

/// A message with the hash of its key. The hash is computed before the lock is acquired.
pub(super) struct Placed {
    topic: Arc<str>,
    hash: u64,
    message: Arc<Message>,
}

pub(super) enum Taken {
    All,
    Stride,
    Full,
}

/// Messages and receipts that an acknowledgement has released. After the lock is released, the messages are dropped and
/// the receipts are resolved.
#[derive(Default)]
pub(super) struct Freed {
    pub(super) messages: Vec<Arc<Message>>,
    pub(super) receipts: Vec<oneshot::Sender<()>>,
}

pub(super) enum Next {
    Nothing,
    Assigned(Vec<Partition>),
    Revoked(Vec<Partition>),
    Messages(Vec<(Partition, i64, Arc<Message>)>),
}

/// The identity of a consumer.
pub(super) struct Seat {
    group: usize,
    member: u64,
    topics: Vec<usize>,
    /// The partition from which the next poll takes messages first. Each poll moves on to the next partition, so that a
    /// busy partition does not starve the others.
    turn: usize,
}

impl Placed {
    pub(super) fn new(Outgoing { topic, message }: Outgoing) -> Self {
        // FNV-1a gives the same result in every build. The hasher of the standard library does not promise that.
        let hash = message
            .key
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self { topic, hash: hash ^ (hash >> 32), message: Arc::new(message) }
    }
}

impl BusState {
    pub(super) fn new(partitions: u32) -> Self {
        Self {
            closed: false,
            partitions: partitions.max(1),
            incarnation: Uuid::new_v4().to_string().into(),
            topics: Vec::new(),
            topic_names: HashMap::new(),
            groups: Vec::new(),
            group_names: HashMap::new(),
            members_ever: 0,
        }
    }

    /// Closes the bus and returns the previous state. The receipts in that state fail when the state is dropped.
    pub(super) fn close(&mut self, wakes: &mut Wakes) -> Self {
        wakes.extend(self.groups.iter().flat_map(|group| group.members.values()).map(|member| member.wake.clone()));
        std::mem::replace(self, Self { closed: true, ..Self::new(self.partitions) })
    }

    pub(super) fn held(&self, topic: &str) -> usize {
        self.topic_names.get(topic).map_or(0, |&topic| self.topics[topic].held)
    }

    /// Accepts some messages from the front of `rest`.
    pub(super) fn take(
        &mut self,
        rest: &mut VecDeque<Placed>,
        done: &Arc<oneshot::Sender<()>>,
        wakes: &mut Wakes,
    ) -> Taken {
        for _ in 0..STRIDE {
            let Some(placed) = rest.front() else { return Taken::All };
            let joined = self.topic_names.get(&placed.topic).map(|&topic| &mut self.topics[topic]);
            if joined.as_ref().is_some_and(|topic| topic.held >= HELD_MAX) {
                return Taken::Full;
            }
            if let (Some(placed), Some(topic)) = (rest.pop_front(), joined) {
                topic.held += 1;
                let log = (placed.hash % topic.logs.len() as u64) as usize;
                topic.logs[log].push(placed.message, done, &self.groups, wakes);
            }
        }
        Taken::Stride
    }

    pub(super) fn join(&mut self, group: &str, topics: &[Arc<str>], wakes: &mut Wakes) -> (Seat, Arc<Notify>) {
        let group = *self.group_names.entry(group.into()).or_insert_with(|| {
            self.groups.push(GroupState::default());
            self.groups.len() - 1
        });
        let mut joined: Vec<usize> = topics.iter().map(|topic| self.topic(topic)).collect();
        joined.sort_unstable();
        joined.dedup();
        for &topic in &joined {
            for log in &mut self.topics[topic].logs {
                let start = Cursor { acknowledged: log.base, next: log.base, target: None, holder: None };
                log.cursors.entry(group).or_insert(start);
            }
        }
        self.members_ever += 1;
        let member = self.members_ever;
        let wake = Arc::new(Notify::new());
        self.groups[group].members.insert(member, MemberState { topics: joined.clone(), wake: wake.clone() });
        self.rebalance(group, wakes);
        (Seat { group, member, topics: joined, turn: 0 }, wake)
    }

    fn topic(&mut self, name: &Arc<str>) -> usize {
        if let Some(&topic) = self.topic_names.get(name) {
            return topic;
        }
        let log = |number| Log {
            partition: Partition { topic: name.clone(), number, incarnation: self.incarnation.clone() },
            base: 0,
            messages: VecDeque::new(),
            receipts: VecDeque::new(),
            cursors: BTreeMap::new(),
        };
        self.topics.push(Topic { logs: (0..self.partitions).map(log).collect(), held: 0 });
        self.topic_names.insert(name.clone(), self.topics.len() - 1);
        self.topics.len() - 1
    }

    pub(super) fn leave(&mut self, seat: &Seat, wakes: &mut Wakes) {
        self.groups[seat.group].members.remove(&seat.member);
        for (_, cursor) in self.cursors(seat) {
            cursor.holder.take_if(|holder| holder.member == seat.member);
        }
        self.rebalance(seat.group, wakes);
    }

    /// Chooses a member for each partition of a group. The partitions are spread evenly over the members that joined
    /// the topic, and only a few partitions move to another member.
    fn rebalance(&mut self, group: usize, wakes: &mut Wakes) {
        let members = &self.groups[group].members;
        let mut loads: BTreeMap<u64, usize> = members.keys().map(|&member| (member, 0)).collect();
        let mut shares: Vec<(usize, &mut Option<u64>)> = Vec::new();
        for (topic, Topic { logs, .. }) in self.topics.iter_mut().enumerate() {
            for cursor in logs.iter_mut().filter_map(|log| log.cursors.get_mut(&group)) {
                cursor.target.take_if(|member| !members.contains_key(member));
                if let Some(load) = cursor.target.and_then(|member| loads.get_mut(&member)) {
                    *load += 1;
                }
                shares.push((topic, &mut cursor.target));
            }
        }
        // Each move makes the loads more even, so the loop terminates.
        let mut moved = true;
        while std::mem::take(&mut moved) {
            for (topic, target) in &mut shares {
                let takers = members.iter().filter(|(_, member)| member.topics.contains(topic));
                let Some((&to, _)) = takers.min_by_key(|(member, _)| loads[*member]) else { continue };
                if target.is_none_or(|from| loads[&from] > loads[&to] + 1) {
                    let from = target.replace(to);
                    from.and_then(|from| loads.get_mut(&from)).into_iter().for_each(|load| *load -= 1);
                    loads.entry(to).and_modify(|load| *load += 1);
                    moved = true;
                }
            }
        }
        wakes.extend(members.values().map(|member| member.wake.clone()));
    }

    pub(super) fn next(&mut self, seat: &mut Seat, max: usize, wakes: &mut Wakes) -> Next {
        let me = seat.member;
        let mut revoked = Vec::new();
        let mut assigned = Vec::new();
        let mut heirs = Vec::new();
        for (partition, cursor) in self.cursors(seat) {
            // With this poll, the member confirms that its work on revoked partitions has ended.
            if cursor.holder.take_if(|holder| holder.member == me && holder.stage == Stage::Revoked).is_some() {
                heirs.extend(cursor.target);
            }
            match &mut cursor.holder {
                Some(holder) if holder.member == me && cursor.target != Some(me) => {
                    holder.stage = Stage::Revoked;
                    revoked.push(partition.clone());
                }
                _ => {}
            }
        }
        let members = &self.groups[seat.group].members;
        wakes.extend(heirs.iter().filter_map(|heir| members.get(heir)).map(|heir| heir.wake.clone()));
        if !revoked.is_empty() {
            return Next::Revoked(revoked);
        }
        for (partition, cursor) in self.cursors(seat) {
            if cursor.holder.is_none() && cursor.target == Some(me) {
                cursor.holder = Some(Holder { member: me, stage: Stage::Assigned });
                assigned.push(partition.clone());
            }
        }
        if !assigned.is_empty() {
            return Next::Assigned(assigned);
        }
        self.messages(seat, max)
    }

    fn messages(&mut self, seat: &mut Seat, max: usize) -> Next {
        let mut taken = Vec::new();
        // All topics of one bus have the same number of partitions.
        let each = self.topics[seat.topics[0]].logs.len();
        let slots = seat.topics.len() * each;
        for slot in (0..slots).map(|step| (seat.turn + step) % slots) {
            let log = &mut self.topics[seat.topics[slot / each]].logs[slot % each];
            let Some(cursor) = log.cursors.get_mut(&seat.group) else { continue };
            let delivers = |holder: &Holder| holder.member == seat.member && holder.stage == Stage::Delivering;
            if !cursor.holder.as_ref().is_some_and(delivers) {
                continue;
            }
            cursor.next = cursor.next.max(log.base);
            let from = (cursor.next - log.base) as usize;
            let to = log.messages.len().min(from + max - taken.len());
            let found = log.messages.range(from..to).zip(cursor.next..);
            taken.extend(found.map(|(message, offset)| (log.partition.clone(), offset, message.clone())));
            cursor.next = log.base + to as i64;
            if taken.len() == max {
                break;
            }
        }
        seat.turn = (seat.turn + 1) % slots;
        if taken.is_empty() { Next::Nothing } else { Next::Messages(taken) }
    }

    pub(super) fn seek(&mut self, seat: &Seat, partition: &Partition, next: Option<i64>) -> Result<Freed, BusError> {
        let freed = match next {
            Some(next) => self.acknowledge(seat, partition, next)?,
            None => Freed::default(),
        };
        let (_, log) = self.find(partition)?;
        if let Some(cursor) = log.cursors.get_mut(&seat.group)
            && let Some(holder) = &mut cursor.holder
            && holder.member == seat.member
            && holder.stage != Stage::Revoked
        {
            holder.stage = Stage::Delivering;
            cursor.next = next.unwrap_or(cursor.acknowledged);
        }
        Ok(freed)
    }

    /// Records that a group has committed all messages below `next`. The call has no effect if the member no longer
    /// holds the partition, because then only the commits of the next holder count.
    pub(super) fn acknowledge(&mut self, seat: &Seat, partition: &Partition, next: i64) -> Result<Freed, BusError> {
        let (held, log) = self.find(partition)?;
        if next > log.end() {
            let reason = format!("offset {next} of {partition:?} is past the end of the partition, {}", log.end());
            return Err(BusError::Misconfigured(reason));
        }
        match log.cursors.get_mut(&seat.group) {
            Some(cursor) if cursor.holder.as_ref().is_some_and(|holder| holder.member == seat.member) => {
                cursor.acknowledged = cursor.acknowledged.max(next);
            }
            _ => return Ok(Freed::default()),
        }
        let freed = log.free();
        *held -= freed.messages.len();
        Ok(freed)
    }

    /// Returns the log of this partition, together with the number of messages that the topic holds.
    fn find(&mut self, partition: &Partition) -> Result<(&mut usize, &mut Log), BusError> {
        let topic = self.topic_names.get(&partition.topic).map(|&topic| &mut self.topics[topic]);
        topic
            .and_then(|Topic { logs, held }| Some((held, logs.get_mut(partition.number as usize)?)))
            .filter(|(_, log)| log.partition.incarnation == partition.incarnation)
            .ok_or_else(|| BusError::Misconfigured(format!("the bus has no {partition:?}")))
    }

    /// Returns the cursors of the member's group in the member's topics.
    fn cursors(&mut self, seat: &Seat) -> impl Iterator<Item = (&Partition, &mut Cursor)> {
        let mine = self.topics.iter_mut().enumerate().filter(|(topic, _)| seat.topics.contains(topic));
        mine.flat_map(|(_, topic)| &mut topic.logs)
            .filter_map(|log| Some((&log.partition, log.cursors.get_mut(&seat.group)?)))
    }
}

impl Log {
    /// The offset of the next message.
    fn end(&self) -> i64 {
        self.base + self.messages.len() as i64
    }

    fn push(
        &mut self,
        message: Arc<Message>,
        done: &Arc<oneshot::Sender<()>>,
        groups: &[GroupState],
        wakes: &mut Wakes,
    ) {
        let offset = self.end();
        // Only a consumer that waits at this offset must be woken. A consumer that is behind checks for messages again
        // before it waits.
        for (&group, cursor) in self.cursors.iter().filter(|(_, cursor)| cursor.next == offset) {
            let holder = cursor.holder.as_ref().and_then(|holder| groups[group].members.get(&holder.member));
            wakes.extend(holder.map(|member| member.wake.clone()));
        }
        self.messages.push_back(message);
        match self.receipts.back_mut() {
            Some((last, receipt)) if Arc::ptr_eq(receipt, done) => *last = offset,
            _ => self.receipts.push_back((offset, done.clone())),
        }
    }

    /// Removes the messages that every group has acknowledged.
    fn free(&mut self) -> Freed {
        let base = self.cursors.values().map(|cursor| cursor.acknowledged).min().unwrap_or(self.base);
        let messages = self.messages.drain(..(base - self.base) as usize).collect();
        self.base = base;
        let past = self.receipts.partition_point(|(last, _)| *last < base);
        Freed {
            messages,
            receipts: self.receipts.drain(..past).filter_map(|(_, done)| Arc::into_inner(done)).collect(),
        }
    }
}
