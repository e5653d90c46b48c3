//! The producer: in order per key, pipelined, and no message overtakes a message that failed before it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
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

/// The largest message that the client sends, in bytes; a topic may accept less.
pub(crate) const MESSAGE_BYTES_MAX: usize = 10_000_000;
/// The largest batch, in bytes, unless a topic accepts less.
const BATCH_BYTES_MAX: usize = 1_000_000;
/// How long after an acknowledgement a broker certainly still knows the producer. A broker forgets a producer that is
/// silent for a day; older versions also forget a producer once retention, which runs every few minutes, has removed
/// all its messages.
const KNOWN_MS: u64 = 10_000;
/// How often a full queue is checked even if nothing was delivered.
const FULL_TICK: Duration = Duration::from_millis(100);

/// Settings that the order of messages depends on.
const FIXED: [(&str, &str); 9] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    // An alias of the setting above; others below have aliases too.
    ("request.required.acks", "all"),
    // The maximum for an idempotent producer. Each request carries messages of one partition: with one request in
    // flight, messages to all partitions would take as many round trips as there are partitions. `Gate` keeps the
    // order.
    ("max.in.flight.requests.per.connection", "5"),
    ("max.in.flight", "5"),
    // The partitioner of Java clients, which `partition_of` reproduces.
    ("partitioner", "murmur2_random"),
    // Messages after a failed message fail too: otherwise they would precede it in the topic.
    ("enable.gapless.guarantee", "true"),
    // No message expires. An unreachable broker costs lag and nothing else.
    ("message.timeout.ms", "0"),
    ("delivery.timeout.ms", "0"),
];

/// One batch in flight.
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
    passage: Passage,
}

/// Decides when a message may be sent to a partition.
///
/// A broker that does not know a producer accepts any batch as its first one. With two batches in flight to a new
/// topic or a new leader that was not ready for the first, the broker accepts the second; the client then counts the
/// first as sent too, and the first is lost. A broker that has acknowledged a message of this producer knows the next
/// sequence number and accepts no other. So a message passes if no other is in flight to its partition, or if the
/// partition has acknowledged one recently.
#[derive(Default)]
struct Gate {
    under_way: AtomicUsize,
    /// Milliseconds from the start of the producer to the last acknowledgement; 0 if there was none.
    acknowledged_ms: AtomicU64,
}

impl Gate {
    /// Returns whether a message may pass now. Acknowledgements from before the client's last error do not count.
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

/// A message that a gate let pass. Dropping the guard ends the flight, even if the sender gave up half-way.
struct Passage(Arc<Gate>);

impl Drop for Passage {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The gates of all partitions of a topic.
type Gates = Vec<Arc<Gate>>;

struct Context {
    settings: Settings,
    broken: AtomicBool,
    /// Held by every task that hands over messages or waits for a receipt.
    waiting: Arc<()>,
    /// Whether a batch was too large for its topic and may have held more than one message.
    too_large: AtomicBool,
    batch_bytes_max: usize,
    room: Notify,
    /// The offsets up to which brokers have acknowledged messages; shared with the previous and next producers.
    taken: Arc<Mutex<Ends>>,
    started_at: Instant,
    /// Milliseconds from the start to the client's last error, such as a lost connection: a broker that comes back may
    /// have lost its data.
    erred_ms: AtomicU64,
    gates: Mutex<HashMap<Arc<str>, Gates>>,
}

impl Context {
    fn now_ms(&self) -> u64 {
        self.started_at.elapsed().as_millis() as u64
    }

    /// Returns the gate of a partition.
    fn gate(&self, topic: &Arc<str>, partition: u32) -> Arc<Gate> {
        let (mut gates, number) = (self.gates.lock().unwrap_or_else(PoisonError::into_inner), partition as usize);
        let of_topic = gates.entry(topic.clone()).or_default();
        if of_topic.len() <= number {
            of_topic.resize_with(number + 1, Arc::default);
        }
        of_topic[number].clone()
    }
}

impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        self.erred_ms.store(self.now_ms(), Ordering::Release);
        if matches!(error, KafkaError::Global(RDKafkaErrorCode::Fatal)) {
            self.broken.store(true, Ordering::Release);
        }
        tracing::warn!(%error, reason = self.settings.without_secrets(reason), "Kafka producer");
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Delivered>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivered: Box<Delivered>) {
        if result.is_ok() {
            delivered.passage.0.acknowledged(self.now_ms());
        }
        let failed = result.as_ref().err().map(|(error, message)| {
            // A broker refuses a batch as a whole. Only a message that fills a batch was certainly alone in it.
            let fills = message.payload_len() + message.key_len() >= self.batch_bytes_max;
            if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) && !fills {
                self.too_large.store(true, Ordering::Release);
                self.broken.store(true, Ordering::Release);
                return BusError::Unavailable("a batch was too large for its topic: trying smaller ones".into());
            }
            self.broken.store(true, Ordering::Release);
            refusal(error, delivered.index)
        });
        if let Ok(message) = result {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.set(message.topic(), message.partition().cast_unsigned(), message.offset() + 1);
        }
        delivered.batch.settle(1, failed);
        // Drops the passage last: after a failure, nothing may pass before `broken` is set.
        drop(delivered);
        self.room.notify_waiters();
    }
}

/// Classifies an error: a verdict on the message itself is a refusal; any other error is a problem of the broker.
fn refusal(error: &KafkaError, index: usize) -> BusError {
    use RDKafkaErrorCode as Code;
    match error.rdkafka_error_code() {
        Some(code @ (Code::MessageSizeTooLarge | Code::InvalidMessage | Code::InvalidRecord)) => {
            BusError::Refused { index, reason: code.to_string() }
        }
        Some(code @ (Code::TopicAuthorizationFailed | Code::PolicyViolation)) => {
            BusError::Unavailable(format!("the cluster does not let us write: {code}"))
        }
        _ => BusError::Unavailable(error.to_string()),
    }
}

fn failed() -> BusError {
    BusError::Unavailable("what was under way has failed".into())
}

/// A producer, replaced by a new one once it has failed: a failed producer sends nothing more, so that messages
/// published again follow everything it has sent.
pub(crate) struct Producer {
    settings: Settings,
    /// The largest batch, in bytes. The limit of a topic applies to a batch, not to a message.
    batch_bytes_max: AtomicUsize,
    current: Mutex<Arc<ThreadedProducer<Context>>>,
    taken: Arc<Mutex<Ends>>,
}

impl Producer {
    pub fn new(settings: &Settings) -> Result<Self, BusError> {
        let taken = Arc::default();
        let current = Mutex::new(Self::start(settings, BATCH_BYTES_MAX, &taken)?);
        Ok(Self { settings: settings.clone(), batch_bytes_max: AtomicUsize::new(BATCH_BYTES_MAX), current, taken })
    }

    /// Returns the offsets up to which brokers have acknowledged messages.
    pub fn taken(&self) -> Ends {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start(
        settings: &Settings,
        batch_bytes_max: usize,
        taken: &Arc<Mutex<Ends>>,
    ) -> Result<Arc<ThreadedProducer<Context>>, BusError> {
        let mut config = settings.client();
        config
            // Long enough to batch the messages of one call. While requests are in flight, messages that arrive
            // meanwhile are batched anyway; a single message waits this long at each hop.
            .set("linger.ms", "0.1")
            .set("compression.type", "lz4")
            // The topic existed before the first message: a topic that is unknown now was deleted, and is created
            // again.
            .set("topic.metadata.propagation.max.ms", "5000")
            .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
            .set("batch.size", batch_bytes_max.to_string())
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", "65536");
        let config = settings.finish(config, &FIXED)?;
        let (broken, too_large, room) = (AtomicBool::new(false), AtomicBool::new(false), Notify::new());
        let (settings, waiting, taken) = (settings.clone(), Arc::default(), taken.clone());
        let (started_at, erred_ms, gates) = (Instant::now(), AtomicU64::new(0), Mutex::default());
        let context =
            Context { settings, broken, waiting, too_large, batch_bytes_max, room, taken, started_at, erred_ms, gates };
        Ok(Arc::new(config.create_with_context(context).map_err(misconfigured)?))
    }

    /// Returns the producer if it is sound, otherwise a new one, and whether it is new. Fails until every caller has
    /// seen the old producer fail: a caller that has not would send its next page ahead of the failed messages.
    fn sound(&self) -> Result<(Arc<ThreadedProducer<Context>>, bool), BusError> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if !current.client().context().broken.load(Ordering::Acquire) {
            return Ok((current.clone(), false));
        }
        current.purge(PurgeConfig::default().queue().inflight().non_blocking());
        let context = current.client().context();
        if Arc::strong_count(&context.waiting) > 1 {
            return Err(failed());
        }
        if context.too_large.load(Ordering::Acquire) {
            self.batch_bytes_max.fetch_min((context.batch_bytes_max / 2).max(1), Ordering::AcqRel);
        }
        let batch_bytes_max = self.batch_bytes_max.load(Ordering::Acquire);
        let broken = std::mem::replace(&mut *current, Self::start(&self.settings, batch_bytes_max, &self.taken)?);
        // Dropping the client blocks on its connections.
        tokio::task::spawn_blocking(move || drop(broken));
        Ok((current.clone(), true))
    }

    /// Replaces a failed producer. Returns whether the cached knowledge of topics may be outdated.
    pub fn mend(&self) -> Result<bool, BusError> {
        self.sound().map(|(_, is_new)| is_new)
    }

    /// Limits all following batches to the size that a topic accepts. Messages in flight are published again.
    pub fn fit(&self, topic_bytes_max: usize) {
        if self.batch_bytes_max.fetch_min(topic_bytes_max, Ordering::AcqRel) > topic_bytes_max {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.client().context().broken.store(true, Ordering::Release);
        }
    }

    /// Sends messages that fit their topics, each to its partition.
    pub async fn send(&self, messages: Vec<Outgoing>, partitions: &[u32]) -> Result<Receipt, BusError> {
        let (producer, _) = self.sound()?;
        let context = producer.client().context().clone();
        let waiting = context.waiting.clone();
        let (done, receipt) = oneshot::channel();
        let batch = Arc::new(Batch {
            // One extra, for the messages that are not handed over yet.
            left: AtomicUsize::new(messages.len() + 1),
            failed: Mutex::default(),
            done: Mutex::new(Some(done)),
        });
        let mut unsent = Unsent { batch: &batch, count: messages.len() + 1 };
        let mut next: Vec<usize> = (0..messages.len()).collect();
        while !next.is_empty() {
            let settled = context.room.notified();
            let (mut held, mut closed) = (Vec::new(), Vec::<Arc<Gate>>::new());
            for index in next {
                let Outgoing { topic, message } = &messages[index];
                let gate = context.gate(topic, partitions[index]);
                // A message behind a held message of its partition is held too; other partitions proceed.
                if closed.iter().any(|closed| Arc::ptr_eq(closed, &gate)) {
                    held.push(index);
                    // Reads the time for each message: a full client may have blocked the previous message for minutes.
                } else if gate.pass(context.now_ms(), context.erred_ms.load(Ordering::Acquire)) {
                    let delivered = Box::new(Delivered { batch: batch.clone(), index, passage: Passage(gate) });
                    let record = BaseRecord::with_opaque_to(topic, delivered)
                        .partition(partitions[index] as i32)
                        .key(&*message.key)
                        .payload(&*message.data)
                        .headers(cloud_event::headers(message));
                    hand_over(&producer, &context, record).await?;
                    unsent.count -= 1;
                } else {
                    closed.push(gate);
                    held.push(index);
                }
            }
            if !held.is_empty() {
                if context.broken.load(Ordering::Acquire) {
                    return Err(failed());
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

/// Hands a message to the client, as soon as the client has room.
async fn hand_over(
    producer: &ThreadedProducer<Context>,
    context: &Context,
    mut record: Record<'_>,
) -> Result<(), BusError> {
    loop {
        let room = context.room.notified();
        let result = if context.broken.load(Ordering::Acquire) {
            Err((None, record))
        } else {
            producer.send(record).map_err(|(error, back)| (Some(error), back))
        };
        match result {
            Ok(()) => return Ok(()),
            Err((Some(KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)), back)) => record = back,
            Err((error, back)) => {
                let Some(error) = error else { return Err(failed()) };
                let refusal = refusal(&error, back.delivery_opaque.index);
                if let BusError::Unavailable(_) = refusal {
                    context.broken.store(true, Ordering::Release);
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

/// Settles the messages that were never handed over, on drop.
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
        current.purge(PurgeConfig::default().queue().inflight().non_blocking());
    }
}
