//! The baselines: write the logs and topics of a run once more, without any other work.

use std::time::{Duration, Instant};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::OwnedMessage,
    producer::{BaseRecord, Producer, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use super::ROLES;
use crate::{
    Failure,
    kafka::bare::{Taken, producer},
    postgres::Measured,
};

/// The number of rows per statement.
const UNNEST_ROWS: usize = 500;
/// The longest wait for an answer from the broker.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Row {
    stream_id: String,
    version: i64,
    event_id: Uuid,
    type_name: String,
    data: String,
    metadata: String,
}

/// Returns all events of these schemas.
pub async fn events(url: &str, schemas: &[String]) -> Result<Vec<Row>, Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let mut rows = Vec::new();
    for schema in schemas {
        let sql = format!(
            "SELECT stream_id, version, event_id, type, data::text, metadata::text FROM {schema}.events ORDER BY position"
        );
        let found: Vec<(String, i64, Uuid, String, String, String)> =
            sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut connection).await?;
        let row = |(stream_id, version, event_id, type_name, data, metadata)| Row {
            stream_id,
            version,
            event_id,
            type_name,
            data,
            metadata,
        };
        rows.extend(found.into_iter().map(row));
    }
    connection.close().await?;
    Ok(rows)
}

/// Writes the rows to one table with the same indexes, 500 rows per statement, and one statement at a time.
pub async fn unnest(url: &str, rows: Vec<Row>, sagas: usize) -> Result<Measured, Failure> {
    let settings = annals_postgres::Settings { schema: schema(), ..annals_postgres::Settings::default() };
    let into = settings.schema.clone();
    annals_postgres::PostgresStore::connect(url, settings).await?.close().await?;
    let mut connection = PgConnection::connect(url).await?;
    let sql = format!(
        "INSERT INTO {into}.events (stream_id, version, event_id, type, schema_version, data, metadata)
         SELECT w.stream_id, w.version, w.event_id, w.type, 1, w.data::json, w.metadata::json
           FROM unnest($1::text[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::text[])
                AS w (stream_id, version, event_id, type, data, metadata)"
    );
    let started = Instant::now();
    for chunk in rows.chunks(UNNEST_ROWS) {
        let column = |of: fn(&Row) -> &str| chunk.iter().map(of).collect::<Vec<_>>();
        sqlx::query(AssertSqlSafe(sql.clone()))
            .bind(column(|row| &row.stream_id))
            .bind(chunk.iter().map(|row| row.version).collect::<Vec<_>>())
            .bind(chunk.iter().map(|row| row.event_id).collect::<Vec<_>>())
            .bind(column(|row| &row.type_name))
            .bind(column(|row| &row.data))
            .bind(column(|row| &row.metadata))
            .execute(&mut connection)
            .await?;
    }
    let seconds = started.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(Measured { count: sagas, seconds, latency: None })
}

fn schema() -> String {
    format!("bare_{}", Uuid::new_v4().simple())
}

/// Returns all messages in the topics of the services.
pub fn records(brokers: &str) -> Result<Vec<OwnedMessage>, Failure> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers).set("group.id", "bare").set("enable.auto.commit", "false");
    let consumer: BaseConsumer = config.create()?;
    let mut list = TopicPartitionList::new();
    let mut left = 0;
    for topic in ROLES.iter().flat_map(|role| ["events", "commands"].map(|kind| format!("{role}.{kind}"))) {
        let metadata = consumer.fetch_metadata(Some(&topic), PATIENCE)?;
        for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
            let (first, next) = consumer.fetch_watermarks(&topic, partition.id(), PATIENCE)?;
            left += next - first;
            list.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
        }
    }
    consumer.assign(&list)?;
    let mut records = Vec::new();
    while (records.len() as i64) < left {
        records.push(consumer.poll(PATIENCE).ok_or("a topic ends too early")??.detach());
    }
    Ok(records)
}

/// Describes the number and the size of the messages per saga.
pub fn messages_note(records: &[OwnedMessage], sagas: usize) -> String {
    use rdkafka::message::Headers;
    let bytes = |record: &OwnedMessage| {
        let headers = record.headers().into_iter().flat_map(Headers::iter);
        let headers: usize = headers.map(|header| header.key.len() + header.value.map_or(0, <[u8]>::len)).sum();
        record.key().map_or(0, <[u8]>::len) + record.payload().map_or(0, <[u8]>::len) + headers
    };
    let count = records.len() as f64;
    let bytes = records.iter().map(bytes).sum::<usize>() as f64;
    let sagas = sagas as f64;
    format!("a saga over four processes: {:.1} messages, {:.1} kB uncompressed", count / sagas, bytes / sagas / 1_024.0)
}

/// Sends the messages to a topic, with the bus's producer settings.
pub async fn produce(brokers: &str, records: Vec<OwnedMessage>, sagas: usize) -> Result<Measured, Failure> {
    let taken = Taken::default();
    let producer: ThreadedProducer<Taken> = producer(brokers, &taken)?;
    let topic = schema();
    annals::Bus::join(
        &annals_kafka::KafkaBus::connect(annals_kafka::Settings::new(brokers)).await?,
        "bench",
        &[&topic],
    )
    .await?;
    let started = Instant::now();
    for record in &records {
        let mut sent = BaseRecord::<[u8], [u8]>::to(&topic).headers(record.headers().cloned().unwrap_or_default());
        (sent.key, sent.payload) = (record.key(), record.payload());
        while let Err((error, back)) = producer.send(sent) {
            let full = rdkafka::error::RDKafkaErrorCode::QueueFull;
            if error.rdkafka_error_code() != Some(full) {
                return Err(error.into());
            }
            sent = back;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    producer.flush(PATIENCE)?;
    let seconds = started.elapsed().as_secs_f64();
    tokio::task::spawn_blocking(move || drop(producer)).await?;
    Ok(Measured { count: sagas, seconds, latency: None })
}
