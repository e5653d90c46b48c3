//! The baselines: plain sqlx on the same table and indexes, without decisions or checks.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use futures::{FutureExt, TryFutureExt, TryStreamExt, future::BoxFuture};
use sample_shop::order::Line;
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;

use crate::{
    Failure,
    postgres::{Measured, histogram, ours::INSTANCES, rows::EventRow},
};

/// The number of rows per statement.
const UNNEST_ROWS: usize = 500;

/// Runs `INSERT … SELECT FROM unnest` on this number of connections.
pub async fn unnest(url: &str, rows: Vec<EventRow>, connections: usize) -> Result<Measured, Failure> {
    let count = rows.len();
    let chunks: Vec<Vec<EventRow>> = rows.chunks(UNNEST_ROWS).map(<[EventRow]>::to_vec).collect();
    drain(url, chunks, connections, count, |connection, chunk| {
        let column = |of: fn(&EventRow) -> &str| chunk.iter().map(of).collect::<Vec<_>>();
        sqlx::query(
            "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
             SELECT w.stream_id, 1, w.event_id, w.type, 1, w.data::json, w.metadata::json
               FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[])
                    AS w (stream_id, event_id, type, data, metadata)",
        )
        .bind(column(|row| &row.stream))
        .bind(chunk.iter().map(|row| row.id).collect::<Vec<_>>())
        .bind(column(|row| &row.type_name))
        .bind(column(|row| &row.data))
        .bind(column(|row| &row.metadata))
        .execute(connection)
        .map_ok(drop)
        .boxed()
    })
    .await
}

/// Runs one statement and one commit per row, on this number of open connections.
pub async fn one_by_one(url: &str, rows: Vec<EventRow>, connections: usize) -> Result<Measured, Failure> {
    let count = rows.len();
    drain(url, rows, connections, count, |connection, row| {
        sqlx::query(
            "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
             VALUES ($1, 1, $2, $3, 1, $4::json, $5::json)",
        )
        .bind(&row.stream)
        .bind(row.id)
        .bind(&row.type_name)
        .bind(&row.data)
        .bind(&row.metadata)
        .execute(connection)
        .map_ok(drop)
        .boxed()
    })
    .await
}

/// Appends to one stream over four connections, each with this number of callers. Each caller reads the version, and
/// tries again if another caller has written first.
pub async fn retry_loops(url: &str, stream: &str, count: usize, callers: usize) -> Result<Measured, Failure> {
    let left = Arc::new(AtomicUsize::new(count));
    let mut tasks = JoinSet::new();
    let started = Instant::now();
    for _ in 0..INSTANCES {
        let connection = Arc::new(tokio::sync::Mutex::new(PgConnection::connect(url).await?));
        for _ in 0..callers {
            let connection = connection.clone();
            let left = left.clone();
            let stream = stream.to_owned();
            tasks.spawn(async move {
                let mut latency = histogram()?;
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let asked = Instant::now();
                    while !append_next(&mut *connection.lock().await, &stream).await? {}
                    latency.record(u64::try_from(asked.elapsed().as_micros())?)?;
                }
                Ok::<_, Failure>(latency)
            });
        }
    }
    let mut latency = histogram()?;
    while let Some(ended) = tasks.join_next().await {
        latency.add(ended??)?;
    }
    Ok(Measured { count, seconds: started.elapsed().as_secs_f64(), latency: Some(latency) })
}

/// Appends the next event of a stream. Returns `false` if another writer was first.
async fn append_next(connection: &mut PgConnection, stream: &str) -> Result<bool, Failure> {
    let version: i64 = sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM annals.events WHERE stream_id = $1")
        .bind(stream)
        .fetch_one(&mut *connection)
        .await?;
    let appended = sqlx::query(
        "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
         VALUES ($1, $2, $3, 'counter.counted', 1, '{\"n\":1}', '{}') ON CONFLICT DO NOTHING",
    )
    .bind(stream)
    .bind(version + 1)
    .bind(uuid::Uuid::new_v4())
    .execute(connection)
    .await?;
    Ok(appended.rows_affected() == 1)
}

type Statement<T> = for<'a> fn(&'a mut PgConnection, &'a T) -> BoxFuture<'a, Result<(), sqlx::Error>>;

/// Runs the statement for each piece of work, on at most this number of connections at a time.
async fn drain<T: Send + 'static>(
    url: &str,
    work: Vec<T>,
    connections: usize,
    count: usize,
    statement: Statement<T>,
) -> Result<Measured, Failure> {
    let work = Arc::new(Mutex::new(work.into_iter()));
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(PgConnection::connect(url).await?);
    }
    let mut workers = JoinSet::new();
    let started = Instant::now();
    for mut connection in open {
        let work = work.clone();
        workers.spawn(async move {
            let mut latency = histogram()?;
            loop {
                let next = work.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(piece) = next else { return Ok::<_, Failure>((connection, latency)) };
                let asked = Instant::now();
                statement(&mut connection, &piece).await?;
                latency.record(u64::try_from(asked.elapsed().as_micros())?)?;
            }
        });
    }
    let mut latency = histogram()?;
    let mut open = Vec::new();
    while let Some(worker) = workers.join_next().await {
        let (connection, of_worker) = worker??;
        latency.add(of_worker)?;
        open.push(connection);
    }
    let seconds = started.elapsed().as_secs_f64();
    for connection in open {
        connection.close().await?;
    }
    Ok(Measured { count, seconds, latency: Some(latency) })
}

/// The fields of an order, read with serde and without the event types of the shop.
#[derive(serde::Deserialize)]
#[allow(dead_code)]
struct Placed {
    order_id: String,
    customer: Option<String>,
    lines: Vec<Line>,
    total: String,
    currency: String,
}

/// Runs `COPY … BINARY` of the whole log, and decodes each payload with serde.
pub async fn copy(url: &str) -> Result<Measured, Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let mut count = 0;
    let started = Instant::now();
    let mut copied = connection
        .copy_out_raw(
            "COPY (SELECT position, stream_id, version, type, schema_version, data, recorded_at
                     FROM annals.events ORDER BY position) TO STDOUT (FORMAT binary)",
        )
        .await?;
    let mut header = 19;
    while let Some(message) = copied.try_next().await? {
        let mut rest = &message[std::mem::take(&mut header)..];
        if rest.len() == 2 {
            continue;
        }
        rest = &rest[2..];
        for column in 0..7 {
            let (length, after) = rest.split_first_chunk().ok_or("a row is cut")?;
            let (field, after) = after.split_at(usize::try_from(i32::from_be_bytes(*length))?);
            rest = after;
            if column == 5 {
                std::hint::black_box(serde_json::from_slice::<Placed>(field)?);
                count += 1;
            }
        }
    }
    drop(copied);
    let seconds = started.elapsed().as_secs_f64();
    connection.close().await?;
    Ok(Measured { count, seconds, latency: None })
}
