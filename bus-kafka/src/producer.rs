//! From here to Kafka: in order per key, pipelined, and with nothing passing what failed before it.

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

/// The largest message the client sends, in bytes; a topic may take less.
pub(crate) const MESSAGE_BYTES_MAX: usize = 10_000_000;
/// The largest batch, in bytes, as long as no topic takes less.
const BATCH_BYTES_MAX: usize = 1_000_000;
/// How long a broker that has acknowledged a message surely knows the producer. It forgets one that is silent for a day, or,
/// in older versions, one whose messages were all removed by retention, which runs every few minutes.
const KNOWN_MS: u64 = 10_000;
/// How often a full queue is looked at although nothing was delivered.
const FULL_TICK: Duration = Duration::from_millis(100);

/// What the order of messages hangs on.
const FIXED: [(&str, &str); 9] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    // The same under another name, as are others below.
    ("request.required.acks", "all"),
    // As many as an idempotent producer may have. Each request has messages of one partition: with one under way, messages
    // to all partitions take as many round trips. What keeps the order is `Gate`.
    ("max.in.flight.requests.per.connection", "5"),
    ("max.in.flight", "5"),
    // As clients in Java place keys, and as `partition_of` says.
    ("partitioner", "murmur2_random"),
    // What follows a message that failed is not sent either: it would come before it in the end.
    ("enable.gapless.guarantee", "true"),
    // Nor is a message given up for time alone. A broker that is away costs lag, and nothing else.
    ("message.timeout.ms", "0"),
    ("delivery.timeout.ms", "0"),
];

/// One batch under way.
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
            // Nobody waits for a receipt that was dropped.
            _ = done.send(failed.map_or(Ok(()), Err));
        }
    }
}

struct Delivered {
    batch: Arc<Batch>,
    index: usize,
    passage: Passage,
}

/// Lets messages pass to a partition.
///
/// A broker that knows nothing of a producer takes any batch for its first one: the second of two under way, when a new topic
/// or a new leader was not ready for the first. The client then counts the first as sent too, and it is lost. A broker that
/// has acknowledged a message of this producer knows the number of the next one, and takes no other. So a message passes if
/// no other is under way to its partition, or if the partition has acknowledged one of late.
#[derive(Default)]
struct Gate {
    under_way: AtomicUsize,
    /// Milliseconds from the start of the producer to the last acknowledgement; 0 if there is none.
    acknowledged_ms: AtomicU64,
}

impl Gate {
    /// Lets a message pass, or not yet. What was acknowledged before the client met an error counts no more.
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

/// A message that a gate has let pass; dropped, it is not under way any more, also where its sender gave up half-way.
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
    /// Held by all who hand over messages or wait for a receipt.
    waiting: Arc<()>,
    /// A batch was too large for its topic, and may have had more than one message.
    too_large: AtomicBool,
    batch_bytes_max: usize,
    room: Notify,
    /// Up to where brokers have acknowledged messages; shared with the producers before and after.
    taken: Arc<Mutex<Ends>>,
    started_at: Instant,
    /// Milliseconds from the start to the last error of the client, such as a connection that was lost: a broker that comes back
    /// may have been emptied.
    erred_ms: AtomicU64,
    gates: Mutex<HashMap<Arc<str>, Gates>>,
}

impl Context {
    fn now_ms(&self) -> u64 {
        self.started_at.elapsed().as_millis() as u64
    }

    /// The gate of a partition.
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
            // A batch is refused as a whole. Only a message that fills one is known to have been alone.
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
        // Only now: where it failed, nothing may pass before `broken` says so.
        drop(delivered);
        self.room.notify_waiters();
    }
}

/// What the broker says of a message by itself; all else is the broker's trouble.
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

/// A producer, and another one once it has failed: after a failure nothing more leaves the first, so that what is
/// published again comes after all it has sent.
pub(crate) struct Producer {
    settings: Settings,
    /// No batch is larger: what a topic takes is one batch at most, not one message.
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

    /// Up to where brokers have acknowledged messages.
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
            // Long enough for what is handed over in one go. With requests under way, what comes meanwhile goes together
            // anyway; a message alone waits for this at each hop.
            .set("linger.ms", "0.1")
            .set("compression.type", "lz4")
            // The topic was there before anything is sent: one that is not any more was deleted, and is made again.
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

    /// The producer, if it is sound; else a new one and whether it is new. That there is none before everybody has seen how
    /// the old one failed: whoever has not would send the next page, which would come before those that failed.
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
        // Its end waits for the connections.
        tokio::task::spawn_blocking(move || drop(broken));
        Ok((current.clone(), true))
    }

    /// Whether what was known of the topics may have changed.
    pub fn mend(&self) -> Result<bool, BusError> {
        self.sound().map(|(_, is_new)| is_new)
    }

    /// From the next batch on, none is larger than what a topic takes. What is under way is published again.
    pub fn fit(&self, topic_bytes_max: usize) {
        if self.batch_bytes_max.fetch_min(topic_bytes_max, Ordering::AcqRel) > topic_bytes_max {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.client().context().broken.store(true, Ordering::Release);
        }
    }

    /// Sends messages that the topics take, each to its partition.
    pub async fn send(&self, messages: Vec<Outgoing>, partitions: &[u32]) -> Result<Receipt, BusError> {
        let (producer, _) = self.sound()?;
        let context = producer.client().context().clone();
        let waiting = context.waiting.clone();
        let (done, receipt) = oneshot::channel();
        let batch = Arc::new(Batch {
            // One more for what is not handed over yet.
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
                // What is behind a message that is held is held as well; those of other partitions go on.
                if closed.iter().any(|closed| Arc::ptr_eq(closed, &gate)) {
                    held.push(index);
                    // Read anew for each: a full client may have kept the one before waiting for minutes.
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

/// Hands a message over to the client, once it has room.
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

/// Settles, at its end, what was never handed over.
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
        // What was not acknowledged is published again by whoever waited for the receipt.
        current.purge(PurgeConfig::default().queue().inflight().non_blocking());
    }
}
