//! The consumer: a member of a consumer group that starts from the offset that the service has committed in its store.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use annals::{
    BusError, Consumer,
    bus::{Bookmark, Delivery, Partition, Polled},
    event::named_id,
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
use tokio::{sync::Notify, task::JoinHandle, time::Instant};
use uuid::Uuid;

use crate::{
    cloud_event,
    settings::{Settings, misconfigured},
};

/// Settings on which the handling of offsets depends.
const FIXED: [(&str, &str); 5] = [
    ("enable.auto.offset.store", "false"),
    // Reaching the end of a partition is not an error.
    ("enable.partition.eof", "false"),
    // The client reports a missing offset as an error; see `find_ranges`.
    ("auto.offset.reset", "error"),
    // With this strategy, a rebalance does not interrupt partitions that stay with their member.
    ("partition.assignment.strategy", "cooperative-sticky"),
    ("group.protocol", "classic"),
];
/// The interval at which the client is polled even if nothing wakes the member. Without polls, the group would consider
/// this member dead.
const LOOK: Duration = Duration::from_secs(1);

/// The minimum time between the start of a client and the start of the client that replaces it after a fatal error. If
/// one client after another fails at once, this limit protects the brokers from a flood of connections.
const REPLACE_AFTER: Duration = Duration::from_secs(1);
/// A member that brokers fence joins again, because a fence does not prove that another process uses the same name.
/// Brokers also fence a member that joins again after its session has timed out, if the answer to that join is lost.
/// Two processes with the same name fence each other again and again, every second or two. A member that is fenced
/// `FENCES_MAX` times within `FENCES_WITHIN` therefore stops with an error.
const FENCES_MAX: usize = 5;
const FENCES_WITHIN: Duration = Duration::from_secs(25);
/// How long a broker may take to report its offsets.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a stopping member waits until it has joined the group, and until it has given up its partitions. By default,
/// brokers let the first members of a group join after three seconds.
const LEAVE: Duration = Duration::from_secs(4);
/// How long a stopping member that has given up its partitions waits for its leave request to be sent: long enough for
/// a few round trips to a distant broker.
const LEAVE_SENT: Duration = Duration::from_millis(500);
/// How long a process waits for its members to leave the group. A few seconds are enough if the broker answers.
const CLOSE: Duration = Duration::from_secs(5);
/// The longest `group.instance.id` that brokers accept.
const INSTANCE_ID_MAX: usize = 249;

/// A topic and the number of a partition, as the client names them.
pub(crate) type Place = (String, i32);

enum Rebalance {
    Assigned(Vec<Place>),
    Revoked(Vec<Place>),
}

struct MemberContext {
    settings: Settings,
    rebalances: Mutex<VecDeque<Rebalance>>,
    closing: AtomicBool,
    /// Whether the group has assigned partitions to this member, possibly none.
    joined: AtomicBool,
    /// Whether the client has called a method of this context during a poll. Such a poll returns nothing although
    /// messages may be waiting, and no wake-up follows for these messages.
    notified: AtomicBool,
    /// Whether the client has lost all brokers. A client without brokers reports nothing.
    lost: AtomicBool,
    /// Whether the client had a fatal error. Such a client reports nothing and must be replaced.
    fatal: AtomicBool,
}

impl MemberContext {
    fn new(settings: &Settings) -> Self {
        Self {
            settings: settings.clone(),
            rebalances: Mutex::default(),
            closing: AtomicBool::default(),
            joined: AtomicBool::default(),
            notified: AtomicBool::default(),
            lost: AtomicBool::default(),
            fatal: AtomicBool::default(),
        }
    }

    fn rebalances(&self) -> std::sync::MutexGuard<'_, VecDeque<Rebalance>> {
        self.rebalances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        self.notified.store(true, Ordering::Release);
    }
}

impl ClientContext for MemberContext {
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
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => self.lost.store(true, Ordering::Release),
            Some(RDKafkaErrorCode::Fatal) => self.fatal.store(true, Ordering::Release),
            // `find_ranges` finds out which offsets are missing, and reports them.
            Some(RDKafkaErrorCode::AutoOffsetReset) => return,
            _ => {}
        }
        if self.closing.load(Ordering::Acquire) {
            return tracing::debug!(%error, "closing");
        }
        tracing::warn!(%error, reason = self.settings.without_secrets(reason), "Kafka consumer");
    }
}

impl ConsumerContext for MemberContext {
    fn commit_callback(&self, committed: KafkaResult<()>, _: &TopicPartitionList) {
        self.tell();
        if let Err(error) = committed {
            // Only the offsets in the store determine where the service continues.
            tracing::debug!(%error, "the offsets were not committed to the broker");
        }
    }

    /// Handles a rebalance; librdkafka calls this method within a poll. Unless the member is closing, the rebalance is
    /// only recorded: that poll reports the rebalance, and the next poll performs it.
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.tell();
        let places = list.elements().iter().map(|found| (found.topic().to_owned(), found.partition())).collect();
        let assigned = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        self.joined.fetch_or(assigned, Ordering::AcqRel);
        if self.closing.load(Ordering::Acquire) {
            let given_up = match consumer.rebalance_protocol() {
                RebalanceProtocol::Cooperative if assigned => consumer.incremental_assign(&TopicPartitionList::new()),
                RebalanceProtocol::Cooperative => {
                    consumer.assignment().and_then(|all| consumer.incremental_unassign(&all))
                }
                _ => consumer.unassign(),
            };
            if let Err(error) = given_up {
                tracing::debug!(%error, "leaving the group failed");
            }
            return;
        }
        self.rebalances().push_back(if assigned { Rebalance::Assigned(places) } else { Rebalance::Revoked(places) });
    }
}

/// The state of an assigned partition.
struct Assigned {
    partition: Partition,
    /// Whether the client fetches the partition. Fetching starts with `seek`.
    fetching: bool,
    /// The bookmark to compare with the first message.
    check: Option<Bookmark>,
    /// The offset to continue from; `None` means the first offset that the partition has.
    next: Option<i64>,
    /// All offsets below this offset are acknowledged.
    acknowledged: Option<i64>,
}

impl Assigned {
    /// Returns the offset from which the client was asked to fetch.
    fn position(&self) -> Option<i64> {
        self.next.map(|next| if self.check.is_some() { next - 1 } else { next })
    }
}

/// For each partition, the first offset and the offset after the last message.
type OffsetRanges = Vec<(Place, (i64, i64))>;

pub(crate) struct Member {
    settings: Settings,
    group: String,
    topics: Vec<String>,
    /// The id of this member, made from the name of its instance, so that a restarted process keeps its partitions.
    name: Option<String>,
    /// The id under which brokers know the client of this member.
    instance_id: String,
    /// The client; `None` after a fatal error, until the client is replaced.
    consumer: Option<Arc<BaseConsumer<MemberContext>>>,
    started_at: Instant,
    /// The times at which brokers last fenced this member.
    fences: VecDeque<Instant>,
    /// Whether another process has taken over this member's instance id.
    fenced: bool,
    news: Arc<Notify>,
    cluster: Arc<str>,
    assigned: BTreeMap<Place, Assigned>,
    /// The partitions that a client held when it ended. The next poll reports them as revoked.
    gone: Vec<Partition>,
    /// The partitions that the last poll reported as revoked. The next poll releases them.
    leaving: Option<Vec<Place>>,
    /// The partitions whose topic was wiped, so that they no longer match their [`Bookmark`]. The next poll reports
    /// them.
    wiped: Vec<Partition>,
    /// The offsets that were removed before this member read them. Each poll reports one range.
    lost: Vec<(Partition, Range<i64>)>,
    /// Whether the client asked some partition for an offset that does not exist.
    out_of_range: bool,
    /// The request in flight, if any, that checks whether the lost brokers answer again.
    asking: Option<JoinHandle<Result<(), KafkaError>>>,
    /// The request in flight, if any, that asks which offsets exist.
    ranging: Option<JoinHandle<Result<OffsetRanges, KafkaError>>>,
}

impl Member {
    /// Joins a group. If `instance` is given, it must be unique to this member. A member that joins again with the same
    /// `instance`, for example after a restart, counts as the same member.
    pub fn join(
        settings: &Settings,
        cluster: Arc<str>,
        group: String,
        topics: Vec<String>,
        instance: Option<&str>,
    ) -> Result<Self, BusError> {
        let mut member = Self {
            settings: settings.clone(),
            group,
            topics,
            name: instance.map(instance_id),
            instance_id: String::new(),
            consumer: None,
            started_at: Instant::now(),
            fences: VecDeque::new(),
            fenced: false,
            news: Arc::default(),
            cluster,
            assigned: BTreeMap::new(),
            gone: Vec::new(),
            leaving: None,
            wiped: Vec::new(),
            lost: Vec::new(),
            out_of_range: false,
            asking: None,
            ranging: None,
        };
        member.start()?;
        Ok(member)
    }

    /// Starts a client.
    fn start(&mut self) -> Result<(), BusError> {
        let mut config = self.settings.consumer();
        config
            // If a member dies, the group reassigns its partitions after this time, which is the shortest timeout that
            // brokers allow by default. The client sends heartbeats in the background, so a member that handles a long
            // batch does not count as dead.
            .set("session.timeout.ms", "6000")
            .set("heartbeat.interval.ms", "500")
            .set("max.poll.interval.ms", "300000")
            .set("auto.commit.interval.ms", "1000")
            // With these limits, the client reads one or two batches ahead.
            .set("queued.min.messages", "2000")
            .set("queued.max.messages.kbytes", "16384")
            .set("fetch.queue.backoff.ms", "10")
            .set("fetch.error.backoff.ms", "100")
            .set("topic.metadata.refresh.interval.ms", "10000");
        // A client without an instance id can crash when it is closed during a rebalance
        // (https://github.com/confluentinc/librdkafka/issues/5347), so each client of a member without a name gets an
        // id, too.
        self.instance_id = self.name.clone().unwrap_or_else(|| Uuid::new_v4().to_string());
        let ids = [("group.id", &*self.group), ("group.instance.id", &*self.instance_id)];
        let fixed: Vec<_> = FIXED.into_iter().chain(ids).collect();
        let config = self.settings.finish(config, &fixed)?;
        let context = MemberContext::new(&self.settings);
        let mut consumer: BaseConsumer<MemberContext> = config.create_with_context(context).map_err(misconfigured)?;
        let woken = self.news.clone();
        consumer.set_nonempty_callback(move || woken.notify_one());
        let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(unavailable)?;
        (self.consumer, self.started_at) = (Some(Arc::new(consumer)), Instant::now());
        Ok(())
    }

    fn consumer(&self) -> Result<&Arc<BaseConsumer<MemberContext>>, BusError> {
        self.consumer.as_ref().ok_or_else(|| BusError::Unavailable("the Kafka client has ended".into()))
    }

    /// Ends a client that had a fatal error; the next poll starts another client.
    fn end(&mut self, consumer: &BaseConsumer<MemberContext>) -> BusError {
        let (code, reason) = consumer.client().fatal_error().unwrap_or((RDKafkaErrorCode::Fatal, String::new()));
        let reason = self.settings.without_secrets(&reason).to_owned();
        self.close();
        self.gone = std::mem::take(&mut self.assigned).into_values().map(|assigned| assigned.partition).collect();
        self.wiped.clear();
        self.lost.clear();
        (self.out_of_range, self.asking, self.ranging) = (false, None, None);
        if code == RDKafkaErrorCode::FencedInstanceId && self.name.is_some() {
            self.fences.push_back(Instant::now());
            self.fences.retain(|fenced_at| fenced_at.elapsed() < FENCES_WITHIN);
            self.fenced = self.fences.len() >= FENCES_MAX;
            return self.is_fenced();
        }
        BusError::Unavailable(format!("fatal error of the Kafka client, which will be replaced: {code}: {reason}"))
    }

    fn is_fenced(&self) -> BusError {
        let group = &self.group;
        let id = &self.instance_id;
        if !self.fenced {
            return BusError::Unavailable(format!(
                "fenced in group {group}: another session, possibly an earlier one of this process, took instance \
                 name {id:?}; joining again"
            ));
        }
        BusError::Misconfigured(format!(
            "another process runs under instance name {id:?} in group {group}: give each process its own name"
        ))
    }

    /// Starts a new client if the previous client has ended.
    async fn replace(&mut self) -> Result<(), BusError> {
        if self.consumer.is_none() {
            tokio::time::sleep_until(self.started_at + REPLACE_AFTER).await;
            self.started_at = Instant::now();
            self.start()?;
        }
        Ok(())
    }

    /// Leaves the group, and ends the client without waiting for it.
    fn close(&mut self) {
        let Some(consumer) = self.consumer.take() else { return };
        consumer.context().closing.store(true, Ordering::Release);
        let mut unanswered: Vec<_> = consumer.context().rebalances().drain(..).collect();
        unanswered.extend(self.leaving.take().map(Rebalance::Revoked));
        let close = move || {
            // An unanswered rebalance would block the group, and would keep this client from ending.
            for rebalance in unanswered {
                let answered = match rebalance {
                    Rebalance::Assigned(_) => consumer.incremental_assign(&TopicPartitionList::new()),
                    Rebalance::Revoked(_) => consumer.assignment().and_then(|all| consumer.incremental_unassign(&all)),
                };
                if let Err(error) = answered {
                    tracing::debug!(%error, "leaving the group failed");
                }
            }
            leave(&consumer);
            drop(consumer);
        };
        // A client that closes waits for a broker, possibly for ever. When the Tokio runtime shuts down, the runtime
        // waits for the client too, but for at most `CLOSE`.
        let (ends, ended) = mpsc::channel::<()>();
        let closing = std::thread::Builder::new().name("kafka-close".to_owned()).spawn(move || {
            close();
            drop(ends);
        });
        let wait = move || _ = ended.recv_timeout(CLOSE);
        match (closing, tokio::runtime::Handle::try_current()) {
            (Err(error), _) => {
                tracing::warn!(%error, "cannot leave the group in an orderly way; the session will time out")
            }
            (Ok(_), Ok(runtime)) => drop(runtime.spawn_blocking(wait)),
            (Ok(_), Err(_)) => wait(),
        }
    }

    /// If all brokers were lost, checks whether a broker answers again. The client itself reports nothing until there
    /// is a message.
    async fn find_brokers(&mut self) -> Result<(), BusError> {
        let consumer = self.consumer()?.clone();
        if !consumer.context().lost.load(Ordering::Acquire) {
            return Ok(());
        }
        // The request survives if the poll is cancelled.
        let topic = self.topics.first().cloned();
        let asked = move || consumer.fetch_metadata(topic.as_deref(), LOOK).map(drop);
        let asking = self.asking.get_or_insert_with(|| tokio::task::spawn_blocking(asked));
        let answered = asking.await;
        self.asking = None;
        answered.map_err(|error| BusError::Unavailable(error.to_string()))?.map_err(unavailable)?;
        self.consumer()?.context().lost.store(false, Ordering::Release);
        Ok(())
    }

    /// Finds out why offsets are missing, once the client has reported missing offsets. Either the offsets were removed
    /// before they were read, or the topic was wiped and has not reached these offsets again. The client's report names
    /// neither the partition nor the offsets that exist.
    async fn find_ranges(&mut self) -> Result<(), BusError> {
        if !self.out_of_range {
            return Ok(());
        }
        let consumer = self.consumer()?.clone();
        let fetching = self.assigned.iter().filter(|(_, assigned)| assigned.fetching);
        let places: Vec<Place> = fetching.map(|(place, _)| place.clone()).collect();
        let asked = move || {
            let range_of = |place: Place| {
                let range = consumer.fetch_watermarks(&place.0, place.1, PATIENCE)?;
                Ok((place, range))
            };
            places.into_iter().map(range_of).collect::<Result<OffsetRanges, KafkaError>>()
        };
        // The request survives if the poll is cancelled.
        let answered = self.ranging.get_or_insert_with(|| tokio::task::spawn_blocking(asked)).await;
        self.ranging = None;
        let ranges = answered.map_err(|error| BusError::Unavailable(error.to_string()))?.map_err(unavailable)?;
        self.out_of_range = false;
        for (place, (first, end)) in ranges {
            self.check_range(&place, first, end)?;
        }
        Ok(())
    }

    fn check_range(&mut self, place: &Place, first: i64, end: i64) -> Result<(), BusError> {
        let Some(assigned) = self.assigned.get(place).filter(|assigned| assigned.fetching) else { return Ok(()) };
        let partition = assigned.partition.clone();
        let check = assigned.check;
        let (Some(next), Some(position)) = (assigned.next, assigned.position()) else {
            return self.fetch(place, Offset::Beginning, None);
        };
        if next < first {
            self.lost.push((partition, next..first));
            return self.stop_fetching(place);
        }
        if position > end {
            self.wiped.push(partition);
            return self.stop_fetching(place);
        }
        if position < first {
            // Nothing is lost: only the message just before the bookmark is gone. That message has been handled, and
            // only the check would have used it.
            return self.fetch(place, Offset::Offset(next), None);
        }
        // The client may have stopped fetching this partition, because a new leader may not know the latest
        // offsets yet.
        self.fetch(place, Offset::Offset(position), check)
    }

    /// Releases the partitions that the last poll reported as revoked. After that, another member may own them.
    async fn let_go(&mut self) -> Result<(), BusError> {
        let Some(places) = self.leaving.take() else { return Ok(()) };
        let mut list = TopicPartitionList::new();
        let mut offsets = TopicPartitionList::new();
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
        // The commit blocks until a broker answers.
        let let_go = tokio::task::spawn_blocking(move || {
            if offsets.count() > 0
                && !consumer.assignment_lost()
                && let Err(error) = consumer.commit(&offsets, CommitMode::Sync)
            {
                // Either the partitions belong to another member, or no broker answers. Neither matters, because only
                // the offsets in the store determine where the service continues.
                tracing::debug!(%error, "the offsets of revoked partitions were not committed to the broker");
            }
            consumer.incremental_unassign(&list)
        });
        let_go.await.map_err(|error| BusError::Unavailable(error.to_string()))?.map_err(unavailable)
    }

    /// Records a rebalance and returns what to report, if anything.
    fn rebalanced(&mut self, rebalance: Rebalance) -> Result<Option<Polled>, BusError> {
        match rebalance {
            Rebalance::Assigned(places) => {
                // Nothing is fetched before the service seeks to an offset.
                self.consumer()?.incremental_assign(&TopicPartitionList::new()).map_err(unavailable)?;
                let mut partitions = Vec::new();
                for place in places {
                    let topic = self.settings.without_prefix(&place.0).unwrap_or(&place.0).into();
                    let partition = Partition { topic, number: place.1 as u32, incarnation: self.cluster.clone() };
                    partitions.push(partition.clone());
                    let new = Assigned { partition, fetching: false, check: None, next: None, acknowledged: None };
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

    /// Restarts fetching at `offset`, and drops the messages that were read ahead.
    fn fetch(&mut self, place: &Place, offset: Offset, check: Option<Bookmark>) -> Result<(), BusError> {
        self.stop_fetching(place)?;
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&place.0, place.1, offset).map_err(unavailable)?;
        self.consumer()?.incremental_assign(&list).map_err(unavailable)?;
        let next = match (check, offset) {
            (Some(check), _) => Some(check.next),
            (None, Offset::Offset(offset)) => Some(offset),
            (None, _) => None,
        };
        if let Some(assigned) = self.assigned.get_mut(place) {
            (assigned.fetching, assigned.check, assigned.next) = (true, check, next);
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
        let place = (self.settings.on_cluster(&partition.topic), partition.number as i32);
        self.assigned.get(&place).is_some_and(|assigned| assigned.partition == *partition).then_some(place)
    }
}

/// How the first message after a seek compares with the bookmark.
enum Found {
    /// The message just before the bookmark, which has already been handled.
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
    // The offsets in between may hold no message: control records and compacted messages leave gaps.
    Found::New
}

fn delivery(partition: &Partition, record: &BorrowedMessage<'_>) -> Delivery {
    Delivery { partition: partition.clone(), offset: record.offset(), message: cloud_event::decode(record) }
}

impl Member {
    /// Returns the messages or the error that the client has at this moment, if any. This method has no await, so that
    /// a cancelled poll cannot drop a message half-way.
    fn take(&mut self, max: usize) -> Result<Option<Polled>, BusError> {
        let consumer = self.consumer()?.clone();
        let context = consumer.context();
        let mut deliveries = Vec::new();
        while deliveries.len() < max.max(1) {
            if !deliveries.is_empty() && !context.rebalances().is_empty() {
                break;
            }
            if let Some(rebalance) = context.rebalances().pop_front() {
                match self.rebalanced(rebalance)? {
                    Some(polled) => return Ok(Some(polled)),
                    None => continue,
                }
            }
            let Some(polled) = consumer.poll(Duration::ZERO) else {
                if context.notified.swap(false, Ordering::AcqRel) {
                    continue;
                }
                break;
            };
            let record = match polled {
                Ok(record) => record,
                // The client reports a fatal error only once, so the error must be handled even if this poll has
                // already taken messages.
                Err(error) if consumer.client().fatal_error().is_some() => {
                    tracing::debug!(%error, "fatal");
                    context.fatal.store(true, Ordering::Release);
                    break;
                }
                Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) => {
                    self.out_of_range = true;
                    continue;
                }
                // The brokers may be reachable again by now; only a request can find out.
                Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) => continue,
                // The client repeats this error as long as the cause lasts, so messages that were already taken are
                // returned first.
                Err(error) if deliveries.is_empty() => return Err(unavailable(error)),
                Err(_) => break,
            };
            deliveries.extend(self.delivered(&record)?);
        }
        if !deliveries.is_empty() {
            return Ok(Some(Polled::Messages(deliveries)));
        }
        if context.fatal.load(Ordering::Acquire) {
            return Err(self.end(&consumer));
        }
        Ok(None)
    }

    /// Returns the delivery for a record. Returns `None` if the partition is not being fetched, or if the record only
    /// served to check the bookmark.
    fn delivered(&mut self, record: &BorrowedMessage<'_>) -> Result<Option<Delivery>, BusError> {
        let place = (record.topic().to_owned(), record.partition());
        let Some(assigned) = self.assigned.get_mut(&place).filter(|assigned| assigned.fetching) else {
            return Ok(None);
        };
        let delivery = delivery(&assigned.partition, record);
        let found = assigned.check.take().map_or(Found::New, |check| compare(check, &delivery));
        assigned.next = Some(delivery.offset + 1);
        match found {
            Found::Before => Ok(None),
            Found::New => Ok(Some(delivery)),
            Found::Wiped => {
                self.wiped.push(assigned.partition.clone());
                self.stop_fetching(&place)?;
                Ok(None)
            }
        }
    }
}

#[async_trait]
impl Consumer for Member {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        if self.fenced {
            return Err(self.is_fenced());
        }
        if !self.gone.is_empty() {
            return Ok(Polled::Revoked(std::mem::take(&mut self.gone)));
        }
        self.replace().await?;
        self.let_go().await?;
        let news = self.news.clone();
        loop {
            self.find_brokers().await?;
            self.find_ranges().await?;
            let woken = news.notified();
            if let Some((partition, offsets)) = self.lost.pop() {
                return Ok(Polled::Lost { partition, offsets });
            }
            if !self.wiped.is_empty() {
                return Ok(Polled::Wiped(std::mem::take(&mut self.wiped)));
            }
            if let Some(polled) = self.take(max)? {
                return Ok(polled);
            }
            if self.out_of_range || !self.wiped.is_empty() {
                continue;
            }
            if !self.consumer()?.context().lost.load(Ordering::Acquire) {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        }
    }

    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError> {
        // If the partition has been revoked, the next poll reports the revocation.
        let Some(place) = self.place(partition) else { return Ok(()) };
        match from {
            None => self.fetch(&place, Offset::Beginning, None),
            // Fetching starts one offset earlier, to check that the topic is still the same.
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
        // The client commits this offset within a second. The service does not use this offset: it continues from the
        // offset in its store.
        if let Err(error) = self.consumer()?.store_offset(&place.0, place.1, next - 1) {
            tracing::debug!(%error, topic = %place.0, partition = place.1, "the offset was not stored for the broker");
        }
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.close();
    }
}

/// Notifies the group that this member leaves, so that other members take over its partitions at once. Without this
/// notification, the group keeps a member with an instance id until its session times out, in case the process comes
/// back.
fn leave(consumer: &BaseConsumer<MemberContext>) {
    let context = consumer.context();
    let has_joined = || context.joined.load(Ordering::Acquire) || context.lost.load(Ordering::Acquire);
    // A client that has not joined yet cannot leave: the group adds it as a member after its end. The poll handles each
    // rebalance.
    poll(consumer, Instant::now() + LEAVE, has_joined);
    consumer.unsubscribe();
    let has_let_go = || consumer.assignment().is_ok_and(|assigned| assigned.count() == 0);
    if poll(consumer, Instant::now() + LEAVE, has_let_go) {
        // The client next sends the offsets and the leave request, but does not report when it has sent them.
        poll(consumer, Instant::now() + LEAVE_SENT, || false);
    }
}

/// Polls a client that is ending until a condition holds. Returns whether the condition holds.
fn poll(consumer: &BaseConsumer<MemberContext>, until: Instant, mut is: impl FnMut() -> bool) -> bool {
    while !is() {
        if Instant::now() >= until || consumer.client().fatal_error().is_some() {
            return false;
        }
        _ = consumer.poll(Duration::from_millis(10));
    }
    true
}

/// Returns the id under which brokers know a member: its name, reduced to the characters that brokers allow.
fn instance_id(name: &str) -> String {
    let is_allowed = |character: char| character.is_ascii_alphanumeric() || matches!(character, '.' | '_' | '-');
    if !name.is_empty() && name.len() <= INSTANCE_ID_MAX && name.chars().all(is_allowed) {
        return name.to_owned();
    }
    let readable: String = name.chars().filter(|character| is_allowed(*character)).take(100).collect();
    format!("{readable}-{}", named_id(Uuid::NAMESPACE_OID, name).simple())
}

fn unavailable(error: KafkaError) -> BusError {
    BusError::Unavailable(error.to_string())
}
