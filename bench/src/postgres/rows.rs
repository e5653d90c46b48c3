//! The data of the workloads: orders, and the rows that placing them writes.

use annals::{Aggregate, Metadata, event::encode_all};
use sample_shop::order::{Line, Order, OrderCommand};
use shop_driver::input::{self, Invoice, generate};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::Failure;

/// A row of the log, without the columns that the database fills in.
#[derive(Clone)]
pub struct EventRow {
    pub stream: String,
    pub id: Uuid,
    pub type_name: String,
    pub data: String,
    pub metadata: String,
}

/// Returns commands, each of which places a new order.
pub fn orders(run: &str, count: usize) -> Vec<(String, OrderCommand)> {
    let placed = generate(count as u64, 1).filter_map(|invoice| match invoice {
        Invoice::Order { id, customer, lines } => {
            let line = |line: input::Line| Line { sku: line.sku, quantity: line.quantity, unit_price: line.unit_price };
            let order_id = format!("{run}.{id}");
            let lines = lines.into_iter().map(line).collect();
            Some((order_id.clone(), OrderCommand::Place { order_id, customer, lines, card: Default::default() }))
        }
        Invoice::Return { .. } | Invoice::Adjustment { .. } => None,
    });
    placed.collect()
}

/// Returns the rows that these commands would write.
pub fn rows(run: &str, count: usize) -> Result<Vec<EventRow>, Failure> {
    let mut rows = Vec::with_capacity(count);
    for (id, command) in orders(run, count) {
        let request = Uuid::new_v4();
        let metadata = Metadata::of_request(request);
        for event in encode_all(&Order::default().decide(&command)?, request, 0, &metadata)? {
            rows.push(EventRow {
                stream: format!("order-{id}"),
                id: event.id,
                type_name: event.type_name.into_owned(),
                data: event.data,
                metadata: metadata.to_json(),
            });
        }
    }
    Ok(rows)
}

/// Returns the rows of commands with 100 events each.
pub fn counted(run: &str, count: usize) -> Vec<EventRow> {
    let row = |n: usize| EventRow {
        stream: format!("counter-{run}.{n:09}"),
        id: Uuid::new_v4(),
        type_name: "counter.counted".to_owned(),
        data: format!(r#"{{"n":{}}}"#, n % 100),
        metadata: Metadata::of_request(Uuid::new_v4()).to_json(),
    };
    (0..count).map(row).collect()
}

/// Empties the log. To do so, disables the triggers that protect the log from deletion.
pub async fn empty(url: &str) -> Result<(), Failure> {
    let mut connection = PgConnection::connect(url).await?;
    sqlx::raw_sql(
        "ALTER TABLE annals.events DISABLE TRIGGER USER; TRUNCATE annals.events, annals.documents RESTART IDENTITY;
         ALTER TABLE annals.events ENABLE ALWAYS TRIGGER events_never_change;
         ALTER TABLE annals.events ENABLE ALWAYS TRIGGER event_never_changes",
    )
    .execute(&mut connection)
    .await?;
    Ok(connection.close().await?)
}

/// Adds rows until the log has this number of rows.
pub async fn fill(url: &str, events: i64) -> Result<(), Failure> {
    let mut connection = PgConnection::connect(url).await?;
    let held: i64 = sqlx::query_scalar("SELECT count(*) FROM annals.events").fetch_one(&mut connection).await?;
    let pattern = rows("fill", 1)?.pop().ok_or("no pattern")?;
    // Fills the log in steps, because a single statement of 10 million rows would show no progress for a long time.
    for from in (held..events).step_by(1_000_000) {
        eprintln!("  {from} events in the log");
        sqlx::query(
            "INSERT INTO annals.events (stream_id, version, event_id, type, schema_version, data, metadata)
             SELECT 'order-0fill.' || lpad(n::text, 12, '0'), 1, gen_random_uuid(), $3, 1, $4::json, $5::json
               FROM generate_series($1, $2) AS n",
        )
        .bind(from)
        .bind(events.min(from + 1_000_000) - 1)
        .bind(&pattern.type_name)
        .bind(&pattern.data)
        .bind(&pattern.metadata)
        .execute(&mut connection)
        .await?;
    }
    // Cleans up now, so that the measurement does not include the cleanup.
    for sql in ["VACUUM (ANALYZE) annals.events", "CHECKPOINT"] {
        sqlx::raw_sql(sql).execute(&mut connection).await?;
    }
    Ok(connection.close().await?)
}
