//! wip
use std::sync::Arc;
use sample_shop::{input::{Source}, run};
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[tokio::main] async fn main() {
  tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).with_writer(std::io::stderr).init();
  let a: Vec<String> = std::env::args().collect();
  let which = a.get(2).cloned().unwrap_or("memory".into());
  let conc: usize = a.get(3).map(|s| s.parse().unwrap()).unwrap_or(256);
  let factor = a.get(4).cloned().unwrap_or("1".into());
  let decline: f64 = a.get(5).map(|s| s.parse().unwrap()).unwrap_or(0.1);
  let cancel: f64 = a.get(6).map(|s| s.parse().unwrap()).unwrap_or(0.02);
  let store: Arc<dyn annals::EventStore> = if which=="memory" { Arc::new(annals::MemoryStore::new()) } else { Arc::new(annals_sqlite::SqliteStore::open(&which).await.unwrap()) };
  let source = match a[1].parse::<u64>() { Ok(n) => Source::generated(n, 7), Err(_) => Source::file(&a[1]).unwrap() };
  let stock = source.stock(factor.parse().unwrap()).unwrap();
  let mut inv = source.invoices().unwrap();
  let o = run::run(store, stock, &mut inv, run::Settings{concurrency:conc, decline_rate:decline, cancel_rate:cancel, seed:7, scarce: factor.parse::<f64>().unwrap()<1.0, input:a[1].clone()}, |_|{}).await.unwrap();
  let mut b = o.books.clone(); let adj = b.adjustments.len(); b.adjustments.clear();
  println!("{:?} adj {adj}\n sagas {} in {:?} = {:.0}/s p50 {}us p99 {}us stuck {} repeated {} rejected {:?}", b, o.sagas, o.elapsed, o.sagas as f64/o.elapsed.as_secs_f64(), o.latency_us.value_at_quantile(0.5), o.latency_us.value_at_quantile(0.99), o.stuck, o.repeated, o.rejected.len());
}
