//! The limits for comparison: bare loops over rdkafka and sqlx with the same settings, headers and rows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{DeliveryResult, Header, Headers, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
};
use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use crate::{
    Failure,
    postgres::{Measured, histogram},
};

/// The number of rows per statement.
const UNNEST_ROWS: usize = 500;

/// Counts the messages that the brokers have acknowledged.
#[derive(Clone, Default)]
pub struct Taken(Arc<AtomicUsize>);

impl ClientContext for Taken {}

impl ProducerContext for Taken {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if result.is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Returns a producer with the settings of the bus.
pub fn producer(brokers: &str, taken: &Taken) -> Result<ThreadedProducer<Taken>, Failure> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("socket.nagle.disable", "true")
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("max.in.flight.requests.per.connection", "5")
        .set("enable.gapless.guarantee", "true")
        .set("message.timeout.ms", "0")
        .set("linger.ms", "0.1")
        .set("compression.type", "lz4")
        .set("batch.size", "1000000")
        .set("queue.buffering.max.messages", "100000")
        .set("queue.buffering.max.kbytes", "65536")
        .set("partitioner", "murmur2_random");
    Ok(config.create_with_context(taken.clone())?)
}

fn headers(row: &sqlx::postgres::PgRow, source: &str) -> Result<OwnedHeaders, Failure> {
    let recorded_at: chrono::DateTime<chrono::Utc> = row.try_get("recorded_at")?;
    let metadata: annals::Metadata = serde_json::from_str(row.try_get("metadata")?)?;
    let time = recorded_at.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let id = row.try_get::<Uuid, _>("event_id")?.to_string();
    let correlation = metadata.correlation_id.to_string();
    let causation = metadata.causation_id.to_string();
    let position = row.try_get::<i64, _>("position")?.to_string();
    let version = row.try_get::<i64, _>("version")?.to_string();
    let pairs = [
        ("ce_specversion", "1.0"),
        ("ce_id", &id),
        ("ce_source", source),
        ("ce_type", row.try_get("type")?),
        ("ce_subject", row.try_get("stream_id")?),
        ("ce_time", &time),
        ("content-type", "application/json"),
        ("ce_correlationid", &correlation),
        ("ce_causationid", &causation),
        ("ce_schemaversion", "1"),
        ("ce_position", &position),
        ("ce_streamversion", &version),
        ("ce_lane", "0"),
    ];
    let new = OwnedHeaders::new_with_capacity(pairs.len());
    Ok(pairs.into_iter().fold(new, |headers, (key, value)| headers.insert(Header { key, value: Some(value) })))
}

/// Streams the log from PostgreSQL to a producer.
pub async fn relay(url: &str, brokers: &str, topic: &str) -> Result<Measured, Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let taken = Taken::default();
    let producer = producer(brokers, &taken)?;
    let mut count = 0;
    let started = Instant::now();
    {
        let mut rows = sqlx::query(
            "SELECT position, stream_id, version, event_id, type, data::text, metadata::text, recorded_at
               FROM annals.events ORDER BY position",
        )
        .fetch(&mut connection);
        while let Some(row) = rows.try_next().await? {
            let mut record = BaseRecord::to(topic)
                .key(row.try_get::<&str, _>("stream_id")?)
                .payload(row.try_get::<&str, _>("data")?)
                .headers(headers(&row, "bare")?);
            loop {
                match producer.send(record) {
                    Ok(()) => break,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => record = back,
                    Err((error, _)) => return Err(error.into()),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            count += 1;
        }
    }
    while taken.0.load(Ordering::Relaxed) < count {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    connection.close().await?;
    tokio::task::spawn_blocking(move || drop(producer)).await?;
    Ok(Measured { count, seconds, latency: None })
}

/// Returns a consumer of all partitions that starts at this offset.
fn consumer(brokers: &str, topic: &str, partitions: u32, offset: Offset) -> Result<BaseConsumer, Failure> {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers)
        .set("socket.nagle.disable", "true")
        .set("group.id", "bare")
        .set("enable.auto.commit", "false");
    let consumer: BaseConsumer = config.create()?;
    let mut list = TopicPartitionList::new();
    for number in 0..partitions {
        list.add_partition_offset(topic, number as i32, offset)?;
    }
    consumer.assign(&list)?;
    Ok(consumer)
}

/// Consumes this many messages, and inserts one row per message, 500 rows per statement.
pub async fn consume(
    url: &str,
    brokers: &str,
    topic: &str,
    partitions: u32,
    count: usize,
) -> Result<Measured, Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let consumer = consumer(brokers, topic, partitions, Offset::Beginning)?;
    let run = Uuid::new_v4().simple().to_string();
    let mut done = 0;
    let started = Instant::now();
    while done < count {
        let mut streams = Vec::new();
        let mut ids = Vec::new();
        let mut data = Vec::new();
        while streams.len() < UNNEST_ROWS.min(count - done) {
            // Blocking is fine here, because the thread has nothing else to do.
            let Some(record) = consumer.poll(Duration::from_secs(10)) else { return Err("no more messages".into()) };
            let record = record?;
            let id = record.headers().and_then(|all| all.iter().find(|header| header.key == "ce_id")?.value);
            ids.push(Uuid::try_parse_ascii(id.unwrap_or_default())?);
            let key = record.key_view::<str>().ok_or("no key")??;
            streams.push(format!("bare-{run}.{key}"));
            data.push(record.payload_view::<str>().ok_or("no value")??.to_owned());
        }
        done += streams.len();
        sqlx::query(
            r#"INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
               SELECT w.stream_id, 1, w.event_id, 'bare.seen', 1, w.data::json, '{}'::json
                 FROM unnest($1::text[], $2::uuid[], $3::text[]) AS w (stream_id, event_id, data)"#,
        )
        .bind(&streams)
        .bind(&ids)
        .bind(&data)
        .execute(&mut connection)
        .await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    connection.close().await?;
    tokio::task::spawn_blocking(move || drop(consumer)).await?;
    Ok(Measured { count, seconds, latency: None })
}

/// Inserts a row, sends a message, and inserts another row when the message arrives. Repeats these steps, one message
/// at a time.
pub async fn hop(url: &str, brokers: &str, topic: &str, partitions: u32, count: usize) -> Result<Measured, Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let consumer = consumer(brokers, topic, partitions, Offset::End)?;
    let producer = producer(brokers, &Taken::default())?;
    let insert = "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
                  VALUES ($1, 1, gen_random_uuid(), 'bare.seen', 1, '{}', '{}')";
    // Once the consumer receives a message that was sent just now, it has reached the end of each partition.
    let mut there = false;
    while !there {
        let sent = producer.send(BaseRecord::to(topic).key("warm").payload("{}"));
        sent.map_err(|(error, _)| error)?;
        there = consumer.poll(Duration::from_millis(500)).transpose()?.is_some();
    }
    while consumer.poll(Duration::from_millis(500)).transpose()?.is_some() {}
    let mut latency = histogram()?;
    let started = Instant::now();
    for _ in 0..count {
        let asked = Instant::now();
        let stream = |side| format!("{side}-{}", Uuid::now_v7().simple());
        sqlx::query(insert).bind(stream("here")).execute(&mut connection).await?;
        let id = stream("message");
        producer.send(BaseRecord::to(topic).key(&id).payload("{}")).map_err(|(error, _)| error)?;
        consumer.poll(Duration::from_secs(10)).ok_or("no message")??;
        sqlx::query(insert).bind(stream("there")).execute(&mut connection).await?;
        latency.record(u64::try_from(asked.elapsed().as_micros())?)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    connection.close().await?;
    producer.flush(Duration::from_secs(10))?;
    tokio::task::spawn_blocking(move || drop((producer, consumer))).await?;
    Ok(Measured { count, seconds, latency: Some(latency) })
}
