//! The publishers and group members with which the suite checks its properties.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    sync::Arc,
    time::Duration,
};

use annals::{
    Bus, BusError, Consumer, Message, Metadata, Position, Version,
    bus::{Bookmark, Delivery, Outgoing, Partition, Polled, Receipt},
};
use chrono::DateTime;
use tokio::{
    sync::{oneshot, watch},
    task::yield_now,
};
use uuid::Uuid;

/// How long a test may wait before it counts as hanging and fails. The limit is long enough for a broker on a busy
/// machine, where a group takes seconds to assign its partitions.
const GUARD: Duration = Duration::from_secs(90);
/// Returns message number `number` of a key, counted from 1.
pub fn message(key: &str, number: i64) -> Message {
    Message {
        id: annals::event::named_id(Uuid::NAMESPACE_OID, &format!("{key} {number}")),
        type_name: "suite.counted".into(),
        schema_version: 1,
        source: "suite".into(),
        subject: key.into(),
        key: key.into(),
        data: format!(r#"{{"number":{number}}}"#).into(),
        metadata: Metadata::default(),
        time: DateTime::from_timestamp_micros(1_700_000_000_000_000 + number).unwrap(),
        position: Position(number),
        version: Version(number),
        lane: None,
        extensions: BTreeMap::new(),
    }
}

/// Publishes to one topic.
pub async fn publish(bus: &dyn Bus, topic: &str, messages: impl IntoIterator<Item = Message>) -> Receipt {
    let topic: Arc<str> = topic.into();
    let outgoing = messages.into_iter().map(|message| Outgoing { topic: topic.clone(), message }).collect();
    within("publish", bus.publish(outgoing)).await.unwrap()
}

/// Awaits a future, and panics if it hangs.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(GUARD, future).await.unwrap_or_else(|_| panic!("{what}: nothing for {GUARD:?}"))
}

/// A member of a group that accepts the partitions assigned to it.
pub struct Member {
    /// The consumer of the bus.
    pub consumer: Box<dyn Consumer>,
    /// The start offset of each partition.
    pub starts: HashMap<Partition, i64>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("starts", &self.starts).finish_non_exhaustive()
    }
}

impl Member {
    /// Joins a group on one topic. The name of the group starts with `group`.
    pub async fn join(bus: &dyn Bus, group: &str, topic: &str) -> Self {
        // A broker remembers groups for a long time, so the name of the group must be as unique as the name of the
        // topic.
        let group = format!("{group}-{topic}");
        let consumer = within("join", bus.join(&group, &[topic])).await.unwrap();
        Self { consumer, starts: HashMap::new() }
    }

    /// Handles the result of a poll, and returns the messages in it, if any.
    pub async fn take(&mut self, polled: Result<Polled, BusError>) -> Vec<Delivery> {
        match polled.unwrap() {
            Polled::Messages(deliveries) => return deliveries,
            Polled::Assigned(partitions) => {
                for partition in partitions {
                    let start = self.starts.get(&partition).map(|next| Bookmark { next: *next, last: None });
                    within("seek", self.consumer.seek(&partition, start)).await.unwrap();
                }
            }
            Polled::Revoked(_) => {}
            Polled::Wiped(partitions) => panic!("partitions were unexpectedly wiped: {partitions:?}"),
            Polled::Lost { partition, offsets } => {
                panic!("offsets {offsets:?} of {partition:?} were unexpectedly removed")
            }
        }
        Vec::new()
    }

    /// Returns the first `count` distinct messages.
    pub async fn collect(&mut self, count: usize) -> Vec<Delivery> {
        let mut ids = BTreeSet::new();
        let mut all = Vec::new();
        while all.len() < count {
            let polled = within("poll", self.consumer.poll(count - all.len())).await;
            all.extend(self.take(polled).await.into_iter().filter(|delivery| ids.insert(read(delivery).id)));
        }
        all
    }

    /// Polls until the ledger has `count` messages, and acknowledges the messages as they come.
    pub async fn fill(&mut self, ledger: &mut Ledger, count: i64, max: usize) {
        while ledger.count < count {
            let polled = within("poll", self.consumer.poll(max)).await;
            let deliveries = self.take(polled).await;
            assert!(deliveries.len() <= max, "{} messages where {max} were asked for", deliveries.len());
            ledger.enter(&deliveries).unwrap();
            self.acknowledge(&deliveries).await;
        }
    }

    /// Acknowledges all of these deliveries.
    pub async fn acknowledge(&mut self, deliveries: &[Delivery]) {
        let nexts: BTreeMap<_, _> = deliveries.iter().map(|d| (&d.partition, d.offset + 1)).collect();
        for (partition, next) in nexts {
            within("acknowledge", self.consumer.acknowledge(partition, next)).await.unwrap();
        }
    }
}

pub(super) fn read(delivery: &Delivery) -> &Message {
    delivery.message.as_ref().unwrap()
}

pub(super) fn numbers(deliveries: &[Delivery]) -> Vec<i64> {
    deliveries.iter().map(|delivery| read(delivery).version.0).collect()
}

/// The messages that were delivered. The messages of a key arrive as 1, 2, 3, …; earlier messages may be repeated.
#[derive(Debug, Default)]
pub struct Ledger {
    latest: HashMap<Arc<str>, i64>,
    /// The number of distinct messages.
    pub count: i64,
}

impl Ledger {
    /// Records deliveries. Returns an error if a message is neither the next message of its key nor a repeat.
    pub fn enter(&mut self, deliveries: &[Delivery]) -> Result<(), String> {
        for message in deliveries.iter().map(read) {
            let number = message.version.0;
            let latest = self.latest.entry(message.key.clone()).or_default();
            if number > *latest + 1 {
                return Err(format!("message {number} of key {} came after {latest}", message.key));
            }
            if number == *latest + 1 {
                *latest = number;
                self.count += 1;
            }
        }
        Ok(())
    }
}

/// The members of a group, as an outside observer sees them.
#[derive(Default)]
pub(super) struct Roll {
    pub(super) owners: BTreeMap<Partition, usize>,
    pub(super) ledger: Ledger,
    /// The members that have delivered messages so far.
    pub(super) active: BTreeSet<usize>,
    fault: Option<String>,
}

impl Roll {
    fn claim(&mut self, member: usize, partition: &Partition) {
        if let Some(owner) = self.owners.insert(partition.clone(), member) {
            self.fault = Some(format!("{partition:?} went to {member} while {owner} had it"));
        }
    }

    fn enter(&mut self, member: usize, deliveries: &[Delivery]) {
        for Delivery { partition, .. } in deliveries {
            if self.owners.get(partition) != Some(&member) {
                self.fault = Some(format!("{member} was given messages of {partition:?}, which it has not"));
            }
        }
        self.active.insert(member);
        self.fault = self.fault.take().or(self.ledger.enter(deliveries).err());
    }

    pub(super) fn owners(&self) -> BTreeSet<usize> {
        self.owners.values().copied().collect()
    }
}

/// A group whose members run as tasks.
pub(super) struct Crew {
    pub(super) bus: Arc<dyn Bus>,
    pub(super) topic: String,
    pub(super) roll: watch::Sender<Roll>,
}

impl Crew {
    pub(super) async fn start(&self, member: usize) -> impl AsyncFnOnce() {
        let Member { mut consumer, .. } = Member::join(&*self.bus, "crew", &self.topic).await;
        let roll = self.roll.clone();
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                let polled = tokio::select! {
                    polled = consumer.poll(50) => polled.unwrap(),
                    _ = &mut stopped => break,
                };
                match polled {
                    Polled::Assigned(partitions) => {
                        roll.send_modify(|roll| partitions.iter().for_each(|partition| roll.claim(member, partition)));
                        for partition in &partitions {
                            consumer.seek(partition, None).await.unwrap();
                        }
                    }
                    Polled::Revoked(partitions) => {
                        // A real member needs time to finish its messages. Until its next poll, the member still owns
                        // the partitions.
                        for _ in 0..1_000 {
                            yield_now().await;
                        }
                        roll.send_modify(|roll| roll.owners.retain(|partition, _| !partitions.contains(partition)));
                    }
                    Polled::Wiped(partitions) => panic!("partitions were unexpectedly wiped: {partitions:?}"),
                    Polled::Lost { partition, offsets } => {
                        panic!("offsets {offsets:?} of {partition:?} were unexpectedly removed")
                    }
                    Polled::Messages(deliveries) => {
                        roll.send_modify(|roll| roll.enter(member, &deliveries));
                        for Delivery { partition, offset, .. } in &deliveries {
                            consumer.acknowledge(partition, offset + 1).await.unwrap();
                        }
                    }
                }
            }
            roll.send_modify(|roll| roll.owners.retain(|_, owner| *owner != member));
        });
        async move || {
            // If the task has failed, sending fails too, and the result of the task shows the reason.
            let _ = stop.send(());
            within("stop", task).await.unwrap();
        }
    }

    pub(super) async fn until(&self, what: &str, reached: impl Fn(&Roll) -> bool) {
        let mut roll = self.roll.subscribe();
        let roll = within(what, roll.wait_for(|roll| roll.fault.is_some() || reached(roll))).await.unwrap();
        assert_eq!(roll.fault, None);
    }

    pub(super) async fn publish_round(&self, round: i64) {
        let messages = (0..200).map(|key| message(&format!("order-{key}"), round));
        drop(publish(&*self.bus, &self.topic, messages).await);
    }
}
