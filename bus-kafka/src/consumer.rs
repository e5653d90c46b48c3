//! From Kafka to here: a member of a consumer group, which starts where our own commit says.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{
    BusError, Consumer,
    bus::{Bookmark, Delivery, Partition, Polled},
};
use async_trait::async_trait;
use rdkafka::{
    ClientContext, Message as _, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::BorrowedMessage,
    types::RDKafkaRespErr,
};
use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    cloud_event,
    settings::{Settings, misconfigured},
};

/// What our offsets hang on.
const FIXED: [(&str, &str); 5] = [
    ("enable.auto.offset.store", "false"),
    // The end of a partition is no trouble.
    ("enable.partition.eof", "false"),
    // An offset that is gone shows in the offset of what comes instead.
    ("auto.offset.reset", "earliest"),
    // Others go on while some partitions move.
    ("partition.assignment.strategy", "cooperative-sticky"),
    ("group.protocol", "classic"),
];
/// How often the client is looked at although it did not call: it must be, or the group takes this member for dead.
const LOOK: Duration = Duration::from_secs(1);

type Place = (String, i32);

enum Rebalance {
    Assigned(Vec<Place>),
    Revoked(Vec<Place>),
}

struct Context {
    settings: Settings,
    rebalances: Mutex<VecDeque<Rebalance>>,
    news: Arc<Notify>,
    closing: AtomicBool,
    /// Whether a poll told something to this context. It then says that there is nothing, though messages may be waiting, and
    /// no news of them will come.
    told: AtomicBool,
    /// Whether the client has lost all brokers, since when it says nothing any more.
    lost: AtomicBool,
}

impl Context {
    fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            rebalances: Mutex::default(),
            news: Arc::default(),
            closing: AtomicBool::default(),
            told: AtomicBool::default(),
            lost: AtomicBool::default(),
        }
    }

    fn rebalances(&self) -> std::sync::MutexGuard<'_, VecDeque<Rebalance>> {
        self.rebalances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.told.store(true, Ordering::Release);
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        self.tell();
        let message = self.settings.without_secrets(message);
        if self.closing.load(Ordering::Acquire) {
            return tracing::debug!(target: "librdkafka", fac, "closing: {message}");
        }
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                tracing::error!(target: "librdkafka", fac, "{message}")
            }
            RDKafkaLogLevel::Warning => tracing::warn!(target: "librdkafka", fac, "{message}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => tracing::info!(target: "librdkafka", fac, "{message}"),
            RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", fac, "{message}"),
        }
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.tell();
        tracing::info!(target: "librdkafka", statistics = %String::from_utf8_lossy(statistics), "statistics");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.tell();
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) {
            self.lost.store(true, Ordering::Release);
        }
        tracing::warn!(%error, reason = self.settings.without_secrets(reason), "Kafka consumer");
    }
}

impl ConsumerContext for Context {
    fn commit_callback(&self, committed: KafkaResult<()>, _: &TopicPartitionList) {
        self.tell();
        if let Err(error) = committed {
            // What counts is in the store.
            tracing::debug!(%error, "offsets for the broker");
        }
    }

    /// Runs within a poll, when nothing is under way: what the rebalance asks for is told by that poll, and done by the next.
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.tell();
        let places = list.elements().iter().map(|found| (found.topic().to_owned(), found.partition())).collect();
        let assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::Acquire) {
            let given_up = match consumer.rebalance_protocol() {
                RebalanceProtocol::Cooperative if assigned => consumer.incremental_assign(&TopicPartitionList::new()),
                RebalanceProtocol::Cooperative => {
                    consumer.assignment().and_then(|all| consumer.incremental_unassign(&all))
                }
                _ => consumer.unassign(),
            };
            if let Err(error) = given_up {
                tracing::debug!(%error, "leaving the group");
            }
            return;
        }
        self.rebalances().push_back(if assigned { Rebalance::Assigned(places) } else { Rebalance::Revoked(places) });
    }
}

/// What a partition is doing.
struct Assigned {
    partition: Partition,
    /// Whether the client fetches it: from `seek` on.
    fetching: bool,
    /// The bookmark that the first message is compared to.
    check: Option<Bookmark>,
    /// After the last message that came.
    next: i64,
    /// Everything below is acknowledged.
    acknowledged: Option<i64>,
}

pub(crate) struct Member {
    consumer: Option<Arc<BaseConsumer<Context>>>,
    news: Arc<Notify>,
    cluster: Arc<str>,
    assigned: BTreeMap<Place, Assigned>,
    /// What the last poll said is lost: let go of by the next.
    leaving: Option<Vec<Place>>,
    /// What is not what it was at its bookmark, and nobody knows yet.
    wiped: Vec<Partition>,
    topic: String,
    /// Asks the brokers that were lost.
    asking: Option<JoinHandle<Result<(), KafkaError>>>,
}

impl Member {
    pub fn join(settings: &Settings, cluster: Arc<str>, group: &str, topics: &[&str]) -> Result<Self, BusError> {
        let mut config = settings.consumer();
        config
            // A member that died is replaced within these; the client itself beats, so a long batch does not count.
            .set("session.timeout.ms", "10000")
            .set("heartbeat.interval.ms", "500")
            .set("max.poll.interval.ms", "300000")
            .set("auto.commit.interval.ms", "1000")
            // Read ahead for a batch or two, in bounds.
            .set("queued.min.messages", "2000")
            .set("queued.max.messages.kbytes", "16384")
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.error.backoff.ms", "100")
            .set("topic.metadata.refresh.interval.ms", "10000");
        let fixed: Vec<_> = FIXED.into_iter().chain([("group.id", group)]).collect();
        let config = settings.finish(config, &fixed)?;
        let context = Context::new(settings);
        let news = context.news.clone();
        let mut consumer: BaseConsumer<Context> = config.create_with_context(context).map_err(misconfigured)?;
        let woken = news.clone();
        consumer.set_nonempty_callback(move || woken.notify_one());
        consumer.subscribe(topics).map_err(unavailable)?;
        let (assigned, leaving, wiped) = (BTreeMap::new(), None, Vec::new());
        let (consumer, topic, asking) =
            (Some(Arc::new(consumer)), topics.first().map_or_else(String::new, |topic| (*topic).to_owned()), None);
        Ok(Self { consumer, news, cluster, assigned, leaving, wiped, topic, asking })
    }

    fn consumer(&self) -> Result<&Arc<BaseConsumer<Context>>, BusError> {
        self.consumer.as_ref().ok_or_else(|| BusError::Unavailable("the consumer has ended".into()))
    }

    /// Whether a broker answers again, if all were lost: the client itself says nothing until there is a message.
    async fn find_brokers(&mut self) -> Result<(), BusError> {
        let consumer = self.consumer()?.clone();
        if !consumer.context().lost.load(Ordering::Acquire) {
            return Ok(());
        }
        // Kept where it is, when the poll is given up meanwhile.
        let topic = self.topic.clone();
        let asked = move || consumer.fetch_metadata(Some(&topic), LOOK).map(drop);
        let asking = self.asking.get_or_insert_with(|| tokio::task::spawn_blocking(asked));
        let answered = asking.await;
        self.asking = None;
        answered.map_err(|error| BusError::Unavailable(error.to_string()))?.map_err(unavailable)?;
        self.consumer()?.context().lost.store(false, Ordering::Release);
        Ok(())
    }

    /// What was revoked by the last poll is another member's from here on.
    async fn let_go(&mut self) -> Result<(), BusError> {
        let Some(places) = self.leaving.take() else { return Ok(()) };
        let (mut list, mut offsets) = (TopicPartitionList::new(), TopicPartitionList::new());
        for place in &places {
            let Some(assigned) = self.assigned.remove(place) else { continue };
            if assigned.fetching {
                list.add_partition(&place.0, place.1);
            }
            if let Some(next) = assigned.acknowledged {
                offsets.add_partition_offset(&place.0, place.1, Offset::Offset(next)).map_err(unavailable)?;
            }
        }
        let consumer = self.consumer()?.clone();
        // Waits for a broker.
        let let_go = tokio::task::spawn_blocking(move || {
            if offsets.count() > 0
                && !consumer.assignment_lost()
                && let Err(error) = consumer.commit(&offsets, CommitMode::Sync)
            {
                // Not ours any more, or no broker: what counts is in the store.
                tracing::debug!(%error, "offsets of revoked partitions");
            }
            consumer.incremental_unassign(&list)
        });
        let_go.await.map_err(|error| BusError::Unavailable(error.to_string()))?.map_err(unavailable)
    }

    /// Takes note of a rebalance; what to say of it, if anything.
    fn rebalanced(&mut self, rebalance: Rebalance) -> Result<Option<Polled>, BusError> {
        match rebalance {
            Rebalance::Assigned(places) => {
                // Nothing is fetched before it is known from where.
                self.consumer()?.incremental_assign(&TopicPartitionList::new()).map_err(unavailable)?;
                let mut partitions = Vec::new();
                for place in places {
                    let (topic, number) = (place.0.as_str().into(), place.1 as u32);
                    let partition = Partition { topic, number, incarnation: self.cluster.clone() };
                    partitions.push(partition.clone());
                    let new = Assigned { partition, fetching: false, check: None, next: 0, acknowledged: None };
                    self.assigned.insert(place, new);
                }
                Ok((!partitions.is_empty()).then_some(Polled::Assigned(partitions)))
            }
            Rebalance::Revoked(places) => {
                let known = places.iter().filter_map(|place| self.assigned.get(place));
                let partitions: Vec<_> = known.map(|assigned| assigned.partition.clone()).collect();
                self.leaving = Some(places);
                Ok(Some(Polled::Revoked(partitions)))
            }
        }
    }

    /// Starts over from `offset`; what was read ahead is dropped.
    fn fetch(&mut self, place: &Place, offset: Offset, check: Option<Bookmark>) -> Result<(), BusError> {
        self.stop_fetching(place)?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&place.0, place.1, offset).map_err(unavailable)?;
        self.consumer()?.incremental_assign(&list).map_err(unavailable)?;
        if let Some(assigned) = self.assigned.get_mut(place) {
            (assigned.fetching, assigned.check, assigned.next) = (true, check, 0);
        }
        Ok(())
    }

    fn stop_fetching(&mut self, place: &Place) -> Result<(), BusError> {
        let Some(assigned) = self.assigned.get_mut(place).filter(|assigned| assigned.fetching) else { return Ok(()) };
        assigned.fetching = false;
        let mut list = TopicPartitionList::new();
        list.add_partition(&place.0, place.1);
        self.consumer()?.incremental_unassign(&list).map_err(unavailable)
    }

    fn place(&self, partition: &Partition) -> Option<Place> {
        let place = (partition.topic.to_string(), partition.number as i32);
        self.assigned.get(&place).is_some_and(|assigned| assigned.partition == *partition).then_some(place)
    }
}

/// What the first message after a seek tells about the bookmark.
enum Found {
    /// It is the message before the bookmark, which was handled.
    Before,
    New,
    Wiped,
}

fn compare(check: Bookmark, delivery: &Delivery) -> Found {
    let before = check.next - 1;
    if delivery.offset < before || (delivery.offset == before && check.last.is_some_and(|last| last != delivery.id())) {
        return Found::Wiped;
    }
    if delivery.offset == before {
        return Found::Before;
    }
    if delivery.offset > check.next {
        let Partition { topic, number, .. } = &delivery.partition;
        let missed = delivery.offset - check.next;
        tracing::error!(%topic, number, missed, next = check.next, "offsets are gone before they were read");
    }
    Found::New
}

fn delivery(partition: &Partition, record: &BorrowedMessage<'_>) -> Delivery {
    Delivery { partition: partition.clone(), offset: record.offset(), message: cloud_event::decode(record) }
}

#[async_trait]
impl Consumer for Member {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        self.let_go().await?;
        let news = self.news.clone();
        loop {
            self.find_brokers().await?;
            let woken = news.notified();
            let consumer = self.consumer()?.clone();
            let mut deliveries = Vec::new();
            // From here to the return there is no await: what was taken is never dropped half-way.
            while deliveries.len() < max.max(1) {
                if !deliveries.is_empty() && !consumer.context().rebalances().is_empty() {
                    break;
                }
                if let Some(rebalance) = consumer.context().rebalances().pop_front() {
                    match self.rebalanced(rebalance)? {
                        Some(polled) => return Ok(polled),
                        None => continue,
                    }
                }
                let Some(polled) = consumer.poll(Duration::ZERO) else {
                    if consumer.context().told.swap(false, Ordering::AcqRel) {
                        continue;
                    }
                    break;
                };
                let record = match polled {
                    Ok(record) => record,
                    // By now they may be back, which only asking them tells.
                    Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) => continue,
                    // Told again and again while it lasts; what was taken comes first.
                    Err(error) if deliveries.is_empty() => return Err(unavailable(error)),
                    Err(_) => break,
                };
                let place = (record.topic().to_owned(), record.partition());
                let Some(assigned) = self.assigned.get_mut(&place).filter(|assigned| assigned.fetching) else {
                    continue;
                };
                let delivery = delivery(&assigned.partition, &record);
                let found = match assigned.check.take() {
                    Some(check) => compare(check, &delivery),
                    // The client went back to the beginning by itself: what it was to go on with is gone.
                    None if delivery.offset < assigned.next => Found::Wiped,
                    None => Found::New,
                };
                assigned.next = delivery.offset + 1;
                match found {
                    Found::Before => {}
                    Found::New => deliveries.push(delivery),
                    Found::Wiped => {
                        self.wiped.push(assigned.partition.clone());
                        self.stop_fetching(&place)?;
                    }
                }
            }
            if !deliveries.is_empty() {
                return Ok(Polled::Messages(deliveries));
            }
            if !self.wiped.is_empty() {
                return Ok(Polled::Wiped(std::mem::take(&mut self.wiped)));
            }
            if !consumer.context().lost.load(Ordering::Acquire) {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        }
    }

    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError> {
        // Revoked meanwhile: the next poll says so.
        let Some(place) = self.place(partition) else { return Ok(()) };
        match from {
            None => self.fetch(&place, Offset::Beginning, None),
            // One earlier, to see that it is the same topic still.
            Some(from) if from.next > 0 && from.last.is_some() => {
                self.fetch(&place, Offset::Offset(from.next - 1), Some(from))
            }
            Some(from) => self.fetch(&place, Offset::Offset(from.next), None),
        }
    }

    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError> {
        let Some(place) = self.place(partition) else { return Ok(()) };
        if let Some(assigned) = self.assigned.get_mut(&place) {
            assigned.acknowledged = Some(next);
        }
        // The client commits it within a second. It has no bearing on where we go on.
        if let Err(error) = self.consumer()?.store_offset(&place.0, place.1, next - 1) {
            tracing::debug!(%error, topic = %place.0, partition = place.1, "offset for the broker");
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let Some(consumer) = self.consumer.take() else { return };
        consumer.context().closing.store(true, Ordering::Release);
        let mut unanswered: Vec<_> = consumer.context().rebalances().drain(..).collect();
        unanswered.extend(self.leaving.take().map(Rebalance::Revoked));
        let leave = move || {
            // A rebalance that was never answered would keep the group waiting, and the end of this as well.
            for rebalance in unanswered {
                let answered = match rebalance {
                    Rebalance::Assigned(_) => consumer.incremental_assign(&TopicPartitionList::new()),
                    Rebalance::Revoked(_) => consumer.assignment().and_then(|all| consumer.incremental_unassign(&all)),
                };
                if let Err(error) = answered {
                    tracing::debug!(%error, "leaving the group");
                }
            }
            drop(consumer);
        };
        // Waits for a broker.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(leave)),
            Err(_) => leave(),
        }
    }
}

fn unavailable(error: KafkaError) -> BusError {
    BusError::Unavailable(error.to_string())
}
