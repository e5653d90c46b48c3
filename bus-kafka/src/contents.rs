//! Reads a topic from beginning to end, for inspection. The reader joins no group and leaves no trace.

use std::{ops::Range, sync::Arc, time::Duration};

use annals::{
    BusError,
    bus::{Delivery, Ends, Partition},
};
use rdkafka::{
    ClientContext, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
};
use tokio::sync::mpsc;

use crate::{
    cloud_event,
    settings::{Settings, misconfigured},
};

/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long brokers may stay silent before the read fails.
const SILENCE: Duration = Duration::from_secs(30);
/// The interval at which the read checks whether the caller has dropped the receiver.
const LOOK: Duration = Duration::from_millis(200);
/// The maximum number of messages that are read ahead of the caller.
const AHEAD: usize = 1_000;

/// Two ranges for each partition: the offsets that are read, and the offsets that exist.
type TopicRanges = (Vec<Range<i64>>, Vec<Range<i64>>);

/// The messages that a topic held when the read began.
#[derive(Debug)]
pub struct Contents {
    partitions: Vec<Range<i64>>,
    held: Vec<Range<i64>>,
    is_compacted: bool,
    deliveries: mpsc::Receiver<Result<Delivery, BusError>>,
}

impl Contents {
    /// Returns for each partition the offset of the first message that is read, and the offset after the last.
    pub fn partitions(&self) -> &[Range<i64>] {
        &self.partitions
    }

    /// Returns for each partition the offset of the first message that brokers hold, and the offset after the last.
    pub fn held(&self) -> &[Range<i64>] {
        &self.held
    }

    /// Returns whether the topic is compacted: brokers then remove all but the last message of each key.
    pub fn is_compacted(&self) -> bool {
        self.is_compacted
    }

    /// Returns the next message, in order per partition; `None` at the end.
    ///
    /// # Errors
    /// Returns an error if the brokers stay silent for half a minute.
    pub async fn next(&mut self) -> Result<Option<Delivery>, BusError> {
        self.deliveries.recv().await.transpose()
    }

    pub(crate) async fn of(
        settings: &Settings,
        cluster: Arc<str>,
        topic: Arc<str>,
        is_compacted: bool,
        from: Ends,
    ) -> Result<Self, BusError> {
        let mut config = settings.consumer();
        // This limits how much the client reads ahead per partition.
        config.set("queued.max.messages.kbytes", "4096").set("auto.offset.reset", "earliest");
        let fixed =
            [("enable.partition.eof", "true"), ("enable.auto.commit", "false"), ("group.id", "annals-contents")];
        let consumer: BaseConsumer<UntilEnd> =
            settings.finish(config, &fixed)?.create_with_context(UntilEnd).map_err(misconfigured)?;
        let on_cluster = settings.on_cluster(&topic);
        let named = topic.clone();
        let begin = move || begin(&consumer, &on_cluster, &from, &named).map(|ranges| (consumer, ranges));
        let begun = tokio::task::spawn_blocking(begin);
        let begun = begun.await.map_err(|error| BusError::Unavailable(error.to_string()))?;
        let (consumer, (partitions, held)) =
            begun.map_err(|error| BusError::Unavailable(format!("reading topic {topic}: {error}")))?;
        let (sender, deliveries) = mpsc::channel(AHEAD);
        let ranges = partitions.clone();
        tokio::task::spawn_blocking(move || read(&consumer, &ranges, &cluster, &topic, &sender));
        Ok(Self { partitions, held, is_compacted, deliveries })
    }
}

/// The context of a client that reads its partitions to the end. The client reports the end of each partition as an
/// error, which is not logged.
pub(crate) struct UntilEnd;

impl ClientContext for UntilEnd {
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::PartitionEOF) {
            tracing::warn!(%error, reason, "Kafka client");
        }
    }
}

impl ConsumerContext for UntilEnd {}

/// Starts each partition at its offset in `from`, where the name of the topic is `named`. A partition starts at the
/// first offset that still exists if `from` has no offset for the partition, or if that offset is outside the present
/// range.
fn begin(consumer: &BaseConsumer<UntilEnd>, topic: &str, from: &Ends, named: &str) -> Result<TopicRanges, KafkaError> {
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
    let count = metadata.topics().first().map_or(0, |found| found.partitions().len()) as i32;
    let mut ranges = Vec::new();
    let mut held = Vec::new();
    let mut list = TopicPartitionList::new();
    for partition in 0..count {
        let (low, high) = consumer.fetch_watermarks(topic, partition, PATIENCE)?;
        let known = from.of(named, partition.cast_unsigned());
        let from = known.filter(|from| (low..=high).contains(from)).unwrap_or(low);
        if from < high {
            list.add_partition_offset(topic, partition, Offset::Offset(from))?;
        }
        ranges.push(from..high);
        held.push(low..high);
    }
    consumer.assign(&list)?;
    Ok((ranges, held))
}

/// Sends messages to the caller until every partition is read to its end, or the caller has dropped the receiver.
fn read(
    consumer: &BaseConsumer<UntilEnd>,
    ranges: &[Range<i64>],
    cluster: &Arc<str>,
    topic: &Arc<str>,
    sender: &mpsc::Sender<Result<Delivery, BusError>>,
) {
    let mut open: Vec<bool> = ranges.iter().map(|range| !range.is_empty()).collect();
    let mut silent = Duration::ZERO;
    while open.contains(&true) && !sender.is_closed() {
        let record = match consumer.poll(LOOK) {
            None => {
                silent += LOOK;
                if silent > SILENCE {
                    let reason = format!("topic {topic}: the brokers sent nothing for {} s", SILENCE.as_secs());
                    _ = sender.blocking_send(Err(BusError::Unavailable(reason)));
                    return;
                }
                continue;
            }
            // This event reports the end even if the last offsets hold no message, as after a transaction.
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                open[partition as usize] = false;
                continue;
            }
            // The client retries by itself. If the retries fail, the client stays silent, and the read fails after
            // `SILENCE`.
            Some(Err(error)) => {
                tracing::warn!(%error, %topic, "reading a topic");
                continue;
            }
            Some(Ok(record)) => record,
        };
        silent = Duration::ZERO;
        let number = record.partition();
        let offset = record.offset();
        if offset < ranges[number as usize].end {
            let partition = Partition { topic: topic.clone(), number: number as u32, incarnation: cluster.clone() };
            let delivery = Delivery { partition, offset, message: cloud_event::decode(&record) };
            if sender.blocking_send(Ok(delivery)).is_err() {
                return;
            }
        }
        if offset + 1 >= ranges[number as usize].end {
            open[number as usize] = false;
        }
    }
}
