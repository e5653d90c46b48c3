//! Places orders on distinct aggregates, with a fixed number of orders in flight. Each order is decided and appended.

use std::{path::Path, sync::Arc};

use annals::{EventStore, MemoryStore, Repository};
use annals_sqlite::SqliteStore;
use hdrhistogram::Histogram;
use sample_shop::order::{Line, Order, OrderCommand};
use shop_driver::input::{self, Invoice, generate};
use uuid::Uuid;

use crate::{Failure, Figure, clients, counting::Counting};

pub async fn memory(count: usize, in_flight: usize) -> Result<Figure, Failure> {
    place(Arc::new(MemoryStore::new()), "memory", count, in_flight).await
}

pub async fn sqlite(path: &Path, count: usize, in_flight: usize) -> Result<Figure, Failure> {
    let store = Arc::new(SqliteStore::open(path).await?);
    let figure = place(store.clone(), "sqlite", count, in_flight).await?;
    store.close().await?;
    Ok(figure)
}

async fn place(
    store: Arc<dyn EventStore>,
    name: &'static str,
    count: usize,
    in_flight: usize,
) -> Result<Figure, Failure> {
    let counting = Counting::new(store);
    let orders = Repository::<Order>::new(Arc::new(counting.clone()));
    let mut latency = Histogram::<u64>::new(3)?;
    let commands: Vec<_> = generate(count as u64, 1)
        .filter_map(|invoice| match invoice {
            Invoice::Order { id, customer, lines } => {
                let line =
                    |line: input::Line| Line { sku: line.sku, quantity: line.quantity, unit_price: line.unit_price };
                let lines = lines.into_iter().map(line).collect();
                Some((id.clone(), OrderCommand::Place { order_id: id, customer, lines, card: Default::default() }))
            }
            Invoice::Return { .. } | Invoice::Adjustment { .. } => None,
        })
        .collect();
    let (took, elapsed) = clients::all(commands, in_flight, move |(id, command)| {
        let orders = orders.clone();
        async move {
            let created = orders.create(&id, command, Uuid::new_v4()).await;
            created.map(drop).map_err(|error| error.to_string())
        }
    })
    .await?;
    for one in took {
        latency.record(u64::try_from(one.as_micros())?)?;
    }
    let seconds = elapsed.as_secs_f64();
    let (commits, rows) = counting.counts();
    Ok(Figure {
        workload: format!("commands, {in_flight} in flight"),
        store: name,
        per_second: count as f64 / seconds,
        rows_per_second: rows as f64 / seconds,
        p50_ms: Some(latency.value_at_quantile(0.5) as f64 / 1_000.0),
        p99_ms: Some(latency.value_at_quantile(0.99) as f64 / 1_000.0),
        commits_per_op: Some(commits as f64 / count as f64),
        rows_per_op: Some(rows as f64 / count as f64),
    })
}
