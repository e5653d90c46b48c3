//! From here to Kafka: in order per key, pipelined, and with nothing passing what failed before it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use annals::{
    BusError,
    bus::{Outgoing, Receipt},
};
use rdkafka::{
    ClientContext,
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
/// How often a full queue is looked at although nothing was delivered.
const FULL_TICK: std::time::Duration = std::time::Duration::from_millis(100);

/// What the order of messages hangs on.
const FIXED: [(&str, &str); 8] = [
    ("enable.idempotence", "true"),
    ("acks", "all"),
    // The same under another name, as are others below.
    ("request.required.acks", "all"),
    // A broker that knows nothing of a producer takes any batch for its first one: the second of two under way, when a new
    // topic or a new leader was not ready for the first. The client then counts the first as sent too, and it is lost.
    ("max.in.flight.requests.per.connection", "1"),
    ("max.in.flight", "1"),
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
}

struct Context {
    settings: Settings,
    broken: AtomicBool,
    /// Held by all who hand over messages or wait for a receipt.
    waiting: Arc<()>,
    /// A batch was too large for its topic, and may have had more than one message.
    too_large: AtomicBool,
    batch_bytes_max: usize,
    room: Notify,
}

impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        if matches!(error, KafkaError::Global(RDKafkaErrorCode::Fatal)) {
            self.broken.store(true, Ordering::Release);
        }
        tracing::warn!(%error, reason = self.settings.without_secrets(reason), "Kafka producer");
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Delivered>;

    fn delivery(&self, result: &DeliveryResult<'_>, delivered: Box<Delivered>) {
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
        delivered.batch.settle(1, failed);
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
}

impl Producer {
    pub fn new(settings: &Settings) -> Result<Self, BusError> {
        let current = Mutex::new(Self::start(settings, BATCH_BYTES_MAX)?);
        Ok(Self { settings: settings.clone(), batch_bytes_max: AtomicUsize::new(BATCH_BYTES_MAX), current })
    }

    fn start(settings: &Settings, batch_bytes_max: usize) -> Result<Arc<ThreadedProducer<Context>>, BusError> {
        let mut config = settings.client();
        config
            // Long enough for what is handed over in one go. With one request under way, what comes meanwhile goes together
            // anyway; a message alone waits for this at each hop.
            .set("linger.ms", "0.1")
            .set("compression.type", "lz4")
            // The topic was there before anything is sent: one that is not any more was deleted, and is made again.
            .set("topic.metadata.propagation.max.ms", "5000")
            // As clients in Java place keys.
            .set("partitioner", "murmur2_random")
            .set("message.max.bytes", MESSAGE_BYTES_MAX.to_string())
            .set("batch.size", batch_bytes_max.to_string())
            .set("queue.buffering.max.messages", "100000")
            .set("queue.buffering.max.kbytes", "65536");
        let config = settings.finish(config, &FIXED)?;
        let (broken, too_large, room) = (AtomicBool::new(false), AtomicBool::new(false), Notify::new());
        let (settings, waiting) = (settings.clone(), Arc::default());
        let context = Context { settings, broken, waiting, too_large, batch_bytes_max, room };
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
        let broken = std::mem::replace(&mut *current, Self::start(&self.settings, batch_bytes_max)?);
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

    /// Sends messages that the topics take.
    pub async fn send(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
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
        for (index, Outgoing { topic, message }) in messages.iter().enumerate() {
            let mut record = BaseRecord::with_opaque_to(topic, Box::new(Delivered { batch: batch.clone(), index }))
                .key(&*message.key)
                .payload(&*message.data)
                .headers(cloud_event::headers(message));
            loop {
                if context.broken.load(Ordering::Acquire) {
                    return Err(failed());
                }
                let room = context.room.notified();
                match producer.send(record) {
                    Ok(()) => break,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => record = back,
                    Err((error, _)) => {
                        let refusal = refusal(&error, index);
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
            unsent.count -= 1;
        }
        drop(unsent);
        Ok(Box::pin(async move {
            let _waiting = waiting;
            receipt.await.unwrap_or_else(|_| Err(BusError::Unavailable("the producer has ended".into())))
        }))
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
