//! Reads, from several topics at once, the messages that a service has sent after the offsets that it recorded last.

use std::{collections::HashMap, sync::Arc, time::Duration};

use annals::{
    BusError,
    bus::{Delivery, Ends, Partition},
};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
};

use crate::{
    cloud_event,
    consumer::Place,
    contents::UntilEnd,
    settings::{Settings, misconfigured},
};

/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long brokers may stay silent before the read fails.
const SILENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(200);
/// The number of messages to inspect at the end of a partition if the service has not recorded an end of that
/// partition. The last message of the service is among them, unless other services have sent this many messages to the
/// partition since then.
const LAST: i64 = 1_000;
/// The maximum number of messages to inspect in a partition if the service has recorded an end of that partition. Other
/// services may have sent many messages while this service was down.
const SINCE_MAX: i64 = 10_000;
/// The maximum number of messages returned. The caller needs no more than the first message that is missing from the
/// log.
const GIVEN_MAX: usize = 20_000;

/// Returns the messages that a service has sent after `ends`, in order per partition.
pub(crate) async fn since(
    settings: &Settings,
    cluster: Arc<str>,
    service: Arc<str>,
    ends: Ends,
) -> Result<Vec<Delivery>, BusError> {
    let mut config = settings.consumer();
    config.set("queued.max.messages.kbytes", "4096").set("auto.offset.reset", "earliest");
    let fixed = [("enable.partition.eof", "true"), ("enable.auto.commit", "false"), ("group.id", "annals-contents")];
    let consumer: BaseConsumer<UntilEnd> =
        settings.finish(config, &fixed)?.create_with_context(UntilEnd).map_err(misconfigured)?;
    let looked = tokio::task::spawn_blocking(move || {
        let open = begin(&consumer, &ends).map_err(|error| unavailable(&error))?;
        read(&consumer, open, &cluster, &service)
    });
    looked.await.map_err(|error| BusError::Unavailable(error.to_string()))?
}

/// Assigns the partitions that have messages after `ends`, and returns the present end of each of these partitions.
fn begin(consumer: &BaseConsumer<UntilEnd>, ends: &Ends) -> Result<HashMap<Place, i64>, KafkaError> {
    let mut places = Vec::new();
    for topic in ends.topics() {
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
        let partitions = metadata.topics().iter().flat_map(|found| found.partitions());
        places.extend(partitions.map(|partition| (topic.to_string(), partition.id())));
    }
    if places.is_empty() {
        return Ok(HashMap::new());
    }
    let firsts = offsets(consumer, &places, Offset::Beginning)?;
    let nexts = offsets(consumer, &places, Offset::End)?;
    let mut list = TopicPartitionList::new();
    let mut open = HashMap::new();
    for place in places {
        let Some((first, next)) = firsts.get(&place).copied().zip(nexts.get(&place).copied()) else { continue };
        let known = ends.of(&place.0, place.1.cast_unsigned());
        let from = match known {
            Some(known) if known <= next => known.max(next - SINCE_MAX),
            // Either the topic was created again, or the service has recorded no end of this partition.
            _ => next - LAST,
        };
        let from = from.max(first);
        if from < next {
            list.add_partition_offset(&place.0, place.1, Offset::Offset(from))?;
            open.insert(place, next);
        }
    }
    consumer.assign(&list)?;
    Ok(open)
}

/// Returns the first or the next offset of each partition, with one request per broker.
fn offsets(
    consumer: &BaseConsumer<UntilEnd>,
    places: &[Place],
    which: Offset,
) -> Result<HashMap<Place, i64>, KafkaError> {
    let mut asked = TopicPartitionList::new();
    for (topic, partition) in places {
        asked.add_partition_offset(topic, *partition, which)?;
    }
    let found = consumer.offsets_for_times(asked, PATIENCE)?;
    let mut offsets = HashMap::new();
    for element in found.elements() {
        element.error()?;
        if let Offset::Offset(offset) = element.offset() {
            offsets.insert((element.topic().to_owned(), element.partition()), offset);
        }
    }
    Ok(offsets)
}

fn read(
    consumer: &BaseConsumer<UntilEnd>,
    mut open: HashMap<Place, i64>,
    cluster: &Arc<str>,
    service: &Arc<str>,
) -> Result<Vec<Delivery>, BusError> {
    let mut found = Vec::new();
    let mut silent = Duration::ZERO;
    while !open.is_empty() && found.len() < GIVEN_MAX {
        let record = match consumer.poll(LOOK) {
            Some(Ok(record)) => record,
            // This event reports the end even if the last offsets hold no message, as after a transaction.
            Some(Err(KafkaError::PartitionEOF(_))) => {
                at_their_ends(consumer, &mut open).map_err(|error| unavailable(&error))?;
                continue;
            }
            // The client retries by itself. If the retries fail, the client stays silent, and the read fails after
            // `SILENCE`.
            Some(Err(error)) => {
                tracing::warn!(%error, "reading the end of the topic failed; trying again");
                continue;
            }
            None => {
                silent += LOOK;
                if silent > SILENCE {
                    let seconds = SILENCE.as_secs();
                    return Err(BusError::Unavailable(format!("the brokers sent nothing for {seconds} s")));
                }
                continue;
            }
        };
        silent = Duration::ZERO;
        let place = (record.topic().to_owned(), record.partition());
        let Some(next) = open.get(&place).copied() else { continue };
        if record.offset() < next {
            let message = cloud_event::decode(&record);
            if message.as_ref().is_ok_and(|message| message.source == *service) {
                let number = record.partition().cast_unsigned();
                let partition = Partition { topic: record.topic().into(), number, incarnation: cluster.clone() };
                found.push(Delivery { partition, offset: record.offset(), message });
            }
        }
        if record.offset() + 1 >= next {
            open.remove(&place);
        }
    }
    Ok(found)
}

/// Closes the partitions that the client has read to the end. The end-of-partition event names the partition but not
/// the topic.
fn at_their_ends(consumer: &BaseConsumer<UntilEnd>, open: &mut HashMap<Place, i64>) -> Result<(), KafkaError> {
    for element in consumer.position()?.elements() {
        let place = (element.topic().to_owned(), element.partition());
        if let (Offset::Offset(at), Some(next)) = (element.offset(), open.get(&place).copied())
            && at >= next
        {
            open.remove(&place);
        }
    }
    Ok(())
}

fn unavailable(error: &KafkaError) -> BusError {
    BusError::Unavailable(format!("reading the end of the topic: {error}"))
}
