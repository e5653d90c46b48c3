//! Checks out generated orders with four services in one process. One card in ten is declined, and two orders in a
//! hundred are cancelled.

use std::{path::Path, sync::Arc};

use annals::{EventStore, LocalBus, MemoryStore};
use annals_sqlite::SqliteStore;
use sample_shop::run::{self, Places};
use shop_driver::{card::Chances, input::Source, run::Settings};

use crate::{Failure, Figure, counting::Counting};

pub async fn memory(count: usize) -> Result<Figure, Failure> {
    check_out(Arc::new(MemoryStore::new()), "memory", count, 512).await
}

pub async fn sqlite(path: &Path, count: usize, concurrency: usize) -> Result<Figure, Failure> {
    let store = Arc::new(SqliteStore::open(path).await?);
    let figure = check_out(store.clone(), "sqlite", count, concurrency).await?;
    store.close().await?;
    Ok(figure)
}

async fn check_out(
    store: Arc<dyn EventStore>,
    name: &'static str,
    count: usize,
    concurrency: usize,
) -> Result<Figure, Failure> {
    let counting = Counting::new(store);
    let settings = Settings {
        concurrency,
        chances: Chances { seed: 7, decline_rate: 0.1, cancel_rate: 0.02 },
        scarce: false,
        input: "bench".to_owned(),
        stop: Default::default(),
    };
    let source = Source::generated(count as u64, 7);
    let places = Places { store: Arc::new(counting.clone()), bus: Arc::new(LocalBus::new(4)), shared_as: None };
    let outcome = run::run(places, source.demand()?, &mut source.invoices()?, settings, |_| {}).await?;
    let seconds = outcome.elapsed.as_secs_f64();
    let (commits, rows) = counting.counts();
    let sagas = outcome.sagas as f64;
    Ok(Figure {
        workload: if concurrency == 1 { "sagas, one at a time".to_owned() } else { "sagas".to_owned() },
        store: name,
        per_second: sagas / seconds,
        rows_per_second: rows as f64 / seconds,
        p50_ms: Some(outcome.latency_us.value_at_quantile(0.5) as f64 / 1_000.0),
        p99_ms: Some(outcome.latency_us.value_at_quantile(0.99) as f64 / 1_000.0),
        commits_per_op: Some(commits as f64 / sagas),
        rows_per_op: Some(rows as f64 / sagas),
    })
}
