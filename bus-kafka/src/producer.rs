//! The producer. Sending is pipelined, messages stay in order per key, and no message overtakes an earlier message that
//! failed.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use annals::{
    BusError,
    bus::{Ends, Outgoing, Receipt},
};
use rdkafka::{
    ClientContext, Message as _,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseRecord, Producer as _, ProducerContext, PurgeConfig, ThreadedProducer},
};
use tokio::sync::{Notify, oneshot};

use crate::{
    cloud_event,
    settings::{Settings, misconfigured},
};

/// The maximum size of a message that the client sends, in bytes; the limit of a topic may be lower.
pub(crate) const MESSAGE_BYTES_MAX: usize = 10_000_000;
/// The maximum size of a batch, in bytes; the limit of a topic may be lower.
const BATCH_BYTES_MAX: usize = 1_000_000;
/// How long after an acknowledgement a broker certainly still knows the producer. A broker forgets a producer that is
/// silent for a day. Older versions of Kafka also forget a producer once retention, which runs every few minutes, has
/// removed all messages of that producer.
const KNOWN_MS: u64 = 10_000;
/// A broker is distant if a request takes longer than this.
const DISTANT: Duration = Duration::from_millis(2);
/// The number of clients of a producer whose brokers are distant. A client has at most five requests in flight to a
/// broker, and each request carries messages of one partition. With a single client, a service that sends to five
/// topics of eight partitions each would therefore wait several round trips. Nearby brokers answer so fast that more
/// clients would only cost threads and connections.
const DISTANT_CLIENTS: usize = 8;
/// The maximum number of messages that wait in the clients of a producer.
const MESSAGES_MAX: usize = 100_000;
/// The maximum size of the messages that wait in the clients of a producer, in kilobytes. If brokers are distant,
/// [`CLIENT_KBYTES_MIN`] doubles this maximum.
const KBYTES_MAX: usize = 65_536;
/// The minimum share that each client gets of [`KBYTES_MAX`]. The largest message must fit into this share.
const CLIENT_KBYTES_MIN: usize = 16_384;
/// The interval at which a full queue is checked even if nothing was delivered.
const FULL_TICK: Duration = Duration::from_millis(100);

/// Settings on which the order of messages depends.
const FIXED: [(&str, &str); 9] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    // This is an alias of the setting above. Some settings below are followed by an alias, too.
    ("request.required.acks", "all"),
    // 5 is the maximum for an idempotent producer. Each request carries messages of one partition, so with only one
    // request in flight, messages to all partitions would take one round trip per partition. `Gate` keeps the order.
    ("max.in.flight.requests.per.connection", "5"),
    ("max.in.flight", "5"),
    // Java clients use this partitioner, and `partition_of` reproduces it.
    ("partitioner", "murmur2_random"),
    // With this setting, messages after a failed message fail as well. Otherwise the later messages would precede the
    // failed message in the topic.
    ("enable.gapless.guarantee", "true"),
    // With 0, messages never expire, so an unreachable broker causes nothing but lag.
    ("message.timeout.ms", "0"),
    ("delivery.timeout.ms", "0"),
];

/// A batch in flight: the messages of one call of [`Producer::send`].
struct Batch {
    left: AtomicUsize,
    failed: Mutex<Option<BusError>>,
    done: Mutex<Option<oneshot::Sender<Result<(), BusError>>>>,
}

impl Batch {
    fn settle(&self, count: usize, failed: Option<BusError>) {
        if let Some(error) = failed {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
        if self.left.fetch_sub(count, Ordering::AcqRel) == count
            && let Some(done) = self.done.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
            // The send fails if the caller has dropped the receipt.
            _ = done.send(failed.map_or(Ok(()), Err));
        }
    }
}

struct Delivered {
    batch: Arc<Batch>,
    index: usize,
    guard: InFlightGuard,
}

/// Decides when a message may be sent to a partition.
///
/// A broker that does not know a producer accepts any batch as that producer's first batch. Suppose that two batches
/// are in flight to a new topic or a new leader, and that the broker was not yet ready for the first batch. The broker
/// then accepts the second batch, the client counts the first batch as sent as well, and the first batch is lost. A
/// broker that has acknowledged a message of this producer expects the next sequence number and accepts no other
/// number. The gate therefore lets a message pass if no other message is in flight to the partition, or if the
/// partition has acknowledged a message recently.
struct Gate {
    /// The client that sends to the partition.
    client: usize,
    under_way: AtomicUsize,
    /// The time of the last acknowledgement, in milliseconds since the start of the producer; 0 if there was none.
    acknowledged_ms: AtomicU64,
}

impl Gate {
    fn of_client(client: usize) -> Arc<Self> {
        Arc::new(Self { client, under_way: AtomicUsize::new(0), acknowledged_ms: AtomicU64::new(0) })
    }

    /// Returns whether a message may be sent now. Acknowledgements from before the last error of any client do not
    /// count.
    fn pass(&self, now_ms: u64, erred_ms: u64) -> bool {
        let acknowledged_ms = self.acknowledged_ms.load(Ordering::Acquire);
        if acknowledged_ms > erred_ms && now_ms.saturating_sub(acknowledged_ms) < KNOWN_MS {
            self.under_way.fetch_add(1, Ordering::AcqRel);
            return true;
        }
        self.under_way.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn acknowledged(&self, now_ms: u64) {
        self.acknowledged_ms.store(now_ms.max(1), Ordering::Release);
    }
}

/// Counts a message as in flight from the moment at which its gate lets the message pass until this guard is dropped.
/// The count is therefore right even if the sender gives up half-way.
struct InFlightGuard(Arc<Gate>);

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The gates of all partitions of a topic.
type Gates = Vec<Arc<Gate>>;

/// The state that all clients of a producer share. If one client fails, all clients are replaced.
struct SendContext {
    settings: Settings,
    /// Why the clients send nothing more, once one of them has failed.
    broken: OnceLock<String>,
    /// Every task that hands messages to the client or waits for a receipt holds a clone, so the number of clones shows
    /// whether such a task exists.
    waiting: Arc<()>,
    /// Whether a batch was too large for its topic and may have contained more than one message.
    too_large: AtomicBool,
    batch_bytes_max: usize,
    clients: usize,
    room: Notify,
    /// The offsets up to which brokers have acknowledged messages. A producer shares these offsets with its
    /// predecessors and successors.
    taken: Arc<Mutex<Ends>>,
    started_at: Instant,
    /// The time of the last error of any client, such as a lost connection, in milliseconds since the start. A broker
    /// that comes back after an error may have lost its data.
    erred_ms: AtomicU64,
    gates: Mutex<HashMap<Arc<str>, Gates>>,
}

impl SendContext {
    fn now_ms(&self) -> u64 {
        self.started_at.elapsed().as_millis() as u64
    }

    /// Returns the gate of a partition.
    fn gate(&self, topic: &Arc<str>, partition: u32) -> Arc<Gate> {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        let number = partition as usize;
        let of_topic = gates.entry(topic.clone()).or_default();
        if of_topic.len() <= number {
            let offset = topic.bytes().map(usize::from).sum::<usize>();
            let known = of_topic.len();
            of_topic.extend((known..=number).map(|number| Gate::of_client((offset + number) % self.clients)));
        }
        of_topic[number].clone()
    }
}

/// The callbacks of a client, which update the shared state.
struct Callbacks(Arc<SendContext>);

impl ClientContext for Callbacks {
    fn error(&self, error: KafkaError, reason: &str) {
        self.0.erred(error, reason);
    }
}

impl ProducerContext for Callbacks {
    type DeliveryOpaque = Box<Delivered>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivered: Box<Delivered>) {
        self.0.delivered(result, delivered);
    }
}

impl SendContext {
    /// Makes all clients stop. Later messages fail with the reason for the first failure.
    fn fail(&self, reason: &str) {
        self.broken.get_or_init(|| reason.to_owned());
    }

    fn fail_with(&self, error: &BusError) {
        match error {
            BusError::Unavailable(reason) => self.fail(reason),
            other => self.fail(&other.to_string()),
        }
    }

    fn is_broken(&self) -> bool {
        self.broken.get().is_some()
    }

    fn failed(&self) -> BusError {
        let reason = self.broken.get().map_or("the producer is stopping", String::as_str);
        BusError::Unavailable(format!("the batch in flight has failed: {reason}"))
    }

    fn erred(&self, error: KafkaError, reason: &str) {
        self.erred_ms.store(self.now_ms(), Ordering::Release);
        if matches!(error, KafkaError::Global(RDKafkaErrorCode::Fatal)) {
            self.fail(self.settings.without_secrets(reason));
        }
        tracing::warn!(%error, reason = self.settings.without_secrets(reason), "Kafka producer");
    }

    fn delivered(&self, result: &DeliveryResult<'_>, delivered: Box<Delivered>) {
        if result.is_ok() {
            delivered.guard.0.acknowledged(self.now_ms());
        }
        let failed = result.as_ref().err().map(|(error, message)| {
            // A broker refuses a batch as a whole. Only a message that fills a batch was certainly alone in its batch.
            let fills = message.payload_len() + message.key_len() >= self.batch_bytes_max;
            if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) && !fills {
                self.too_large.store(true, Ordering::Release);
                let reason = "a batch was too large for its topic; retrying with smaller batches";
                self.fail(reason);
                return BusError::Unavailable(reason.into());
            }
            let refusal = refusal(error, delivered.index);
            self.fail_with(&refusal);
            refusal
        });
        if let Ok(message) = result {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let topic = self.settings.without_prefix(message.topic()).unwrap_or(message.topic());
            taken.set(topic, message.partition().cast_unsigned(), message.offset() + 1);
        }
        delivered.batch.settle(1, failed);
        // The guard is dropped last, because after a failure no message may pass the gate before `broken` is set.
        drop(delivered);
        self.room.notify_waiters();
    }
}

/// Classifies an error. An error caused by the message itself becomes `Refused`; any other error becomes `Unavailable`.
fn refusal(error: &KafkaError, index: usize) -> BusError {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(code @ (Code::MessageSizeTooLarge | Code::InvalidMessage | Code::InvalidRecord)) => {
            BusError::Refused { index, reason: code.to_string() }
        }
        Some(code @ (Code::TopicAuthorizationFailed | Code::PolicyViolation)) => {
            BusError::Unavailable(format!("authorization to write failed: {code}; check the ACLs of the topic"))
        }
        _ => BusError::Unavailable(error.to_string()),
    }
}

/// The current producer, which is replaced by a new producer after a failure. A failed producer sends nothing more.
/// Messages that are published again therefore follow everything that the failed producer has sent.
pub(crate) struct Producer {
    settings: Settings,
    /// The maximum size of a batch, in bytes. A topic's limit applies to a batch, not to a message.
    batch_bytes_max: AtomicUsize,
    current: Mutex<Arc<Clients>>,
    taken: Arc<Mutex<Ends>>,
}

/// The clients that send the messages of one producer.
struct Clients {
    context: Arc<SendContext>,
    clients: Vec<ThreadedProducer<Callbacks>>,
}

impl Clients {
    fn start(
        settings: &Settings,
        clients: usize,
        batch_bytes_max: usize,
        taken: &Arc<Mutex<Ends>>,
    ) -> Result<Arc<Self>, BusError> {
        let mut config = settings.client();
        config
            // This delay is long enough to batch the messages of one call. Messages that arrive while requests are in
            // flight are batched anyway. A message that is sent alone waits this long. In a chain of services, each
            // service adds this delay.
            .set("linger.ms", "0.1")
            .set("compression.type", "lz4")
            // Every topic exists before the first message is sent. If a topic is unknown to brokers for longer than
            // this, the topic was deleted, and the bus creates it again.
            .set("topic.metadata.propagation.max.ms", "5000")
            .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
            .set("batch.size", batch_bytes_max.to_string())
            .set("queue.buffering.max.messages", (MESSAGES_MAX / clients).to_string())
            .set("queue.buffering.max.kbytes", (KBYTES_MAX / clients).max(CLIENT_KBYTES_MIN).to_string());
        let config = settings.finish(config, &FIXED)?;
        let context = Arc::new(SendContext {
            settings: settings.clone(),
            broken: OnceLock::new(),
            waiting: Arc::default(),
            too_large: AtomicBool::new(false),
            batch_bytes_max,
            clients,
            room: Notify::new(),
            taken: taken.clone(),
            started_at: Instant::now(),
            erred_ms: AtomicU64::new(0),
            gates: Mutex::default(),
        });
        let client = |_| config.create_with_context(Callbacks(context.clone())).map_err(misconfigured);
        let clients = (0..clients).map(client).collect::<Result<_, _>>()?;
        Ok(Arc::new(Self { context, clients }))
    }

    /// Drops all messages that no broker has acknowledged. The receipts of these messages report an error.
    fn purge(&self) {
        for client in &self.clients {
            client.purge(PurgeConfig::default().queue().inflight().non_blocking());
        }
    }
}

impl Producer {
    /// Creates a producer. `round_trip` is the duration of a request to a broker.
    pub fn new(settings: &Settings, round_trip: Duration) -> Result<Self, BusError> {
        let clients = if round_trip > DISTANT { DISTANT_CLIENTS } else { 1 };
        let taken = Arc::default();
        let current = Mutex::new(Clients::start(settings, clients, BATCH_BYTES_MAX, &taken)?);
        Ok(Self { settings: settings.clone(), batch_bytes_max: AtomicUsize::new(BATCH_BYTES_MAX), current, taken })
    }

    /// Returns the offsets up to which brokers have acknowledged messages.
    pub fn taken(&self) -> Ends {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the current producer, or a new producer if the current one has failed, and whether the producer is new.
    /// Returns an error until every caller has seen the old producer fail. A caller that has not seen the failure would
    /// send its next page ahead of the failed messages.
    fn sound(&self) -> Result<(Arc<Clients>, bool), BusError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !current.context.is_broken() {
            return Ok((current.clone(), false));
        }
        current.purge();
        let context = &current.context;
        if Arc::strong_count(&context.waiting) > 1 {
            return Err(context.failed());
        }
        if context.too_large.load(Ordering::Acquire) {
            self.batch_bytes_max.fetch_min((context.batch_bytes_max / 2).max(1), Ordering::AcqRel);
        }
        let batch_bytes_max = self.batch_bytes_max.load(Ordering::Acquire);
        let successor = Clients::start(&self.settings, context.clients, batch_bytes_max, &self.taken)?;
        let broken = std::mem::replace(&mut *current, successor);
        // Dropping the client blocks on its connections.
        tokio::task::spawn_blocking(move || drop(broken));
        Ok((current.clone(), true))
    }

    /// Replaces a failed producer. Returns whether the cached facts about topics may be outdated.
    pub fn mend(&self) -> Result<bool, BusError> {
        self.sound().map(|(_, is_new)| is_new)
    }

    /// Limits all following batches to the size that a topic accepts. If this lowers the limit, callers have to publish
    /// the messages in flight again.
    pub fn fit(&self, topic_bytes_max: usize) {
        if self.batch_bytes_max.fetch_min(topic_bytes_max, Ordering::AcqRel) > topic_bytes_max {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.context.fail("its batches are larger than a topic accepts; retrying with smaller batches");
        }
    }

    /// Sends messages that fit their topics, each to its partition.
    pub async fn send(&self, messages: Vec<Outgoing>, partitions: &[u32]) -> Result<Receipt, BusError> {
        let (clients, _) = self.sound()?;
        let context = &clients.context;
        let waiting = context.waiting.clone();
        let (done, receipt) = oneshot::channel();
        let batch = Arc::new(Batch {
            // The extra 1 keeps the batch open until all messages have been handed over.
            left: AtomicUsize::new(messages.len() + 1),
            failed: Mutex::default(),
            done: Mutex::new(Some(done)),
        });
        let mut unsent = Unsent { batch: &batch, count: messages.len() + 1 };
        let mut next: Vec<usize> = (0..messages.len()).collect();
        while !next.is_empty() {
            let settled = context.room.notified();
            let mut held = Vec::new();
            let mut closed = Vec::<Arc<Gate>>::new();
            for index in next {
                let Outgoing { topic, message } = &messages[index];
                let gate = context.gate(topic, partitions[index]);
                // A message must also wait if an earlier message to the same partition is waiting. Messages to other
                // partitions need not wait.
                if closed.iter().any(|closed| Arc::ptr_eq(closed, &gate)) {
                    held.push(index);
                    // The time is read for each message, because a full client may have blocked the previous message
                    // for minutes.
                } else if gate.pass(context.now_ms(), context.erred_ms.load(Ordering::Acquire)) {
                    let client = &clients.clients[gate.client];
                    let delivered = Box::new(Delivered { batch: batch.clone(), index, guard: InFlightGuard(gate) });
                    let record = BaseRecord::with_opaque_to(topic, delivered)
                        .partition(partitions[index] as i32)
                        .key(&*message.key)
                        .payload(&*message.data)
                        .headers(cloud_event::headers(message));
                    hand_over(client, context, record).await?;
                    unsent.count -= 1;
                } else {
                    closed.push(gate);
                    held.push(index);
                }
            }
            if !held.is_empty() {
                if context.is_broken() {
                    return Err(context.failed());
                }
                tokio::select! {
                    () = settled => {}
                    () = tokio::time::sleep(FULL_TICK) => {}
                }
            }
            next = held;
        }
        drop(unsent);
        Ok(Box::pin(async move {
            let _waiting = waiting;
            receipt.await.unwrap_or_else(|_| Err(BusError::Unavailable("the producer has ended".into())))
        }))
    }
}

type Record<'m> = BaseRecord<'m, str, str, Box<Delivered>>;

/// Hands a message to the client as soon as the client has room.
async fn hand_over(
    client: &ThreadedProducer<Callbacks>,
    context: &SendContext,
    mut record: Record<'_>,
) -> Result<(), BusError> {
    loop {
        let room = context.room.notified();
        let result = if context.is_broken() {
            Err((None, record))
        } else {
            client.send(record).map_err(|(error, back)| (Some(error), back))
        };
        match result {
            Ok(()) => return Ok(()),
            Err((Some(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)), back)) => record = back,
            Err((error, back)) => {
                let Some(error) = error else { return Err(context.failed()) };
                let refusal = refusal(&error, back.delivery_opaque.index);
                if let BusError::Unavailable(_) = refusal {
                    context.fail_with(&refusal);
                }
                return Err(refusal);
            }
        }
        tokio::select! {
            () = room => {}
            () = tokio::time::sleep(FULL_TICK) => {}
        }
    }
}

/// The number of messages of a batch that were not handed to the client. When this guard is dropped, they no longer
/// count as open.
struct Unsent<'a> {
    batch: &'a Batch,
    count: usize,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.batch.settle(self.count, None);
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        let current = self.current.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Callers that wait for a receipt publish unacknowledged messages again.
        current.purge();
    }
}
