//! wip
use std::{collections::BTreeMap, sync::Arc};
use sample_shop::{input, run};
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;
#[tokio::main] async fn main() {
  tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).with_writer(std::io::stderr).init();
  let n: usize = std::env::args().nth(1).map(|s| s.parse().unwrap()).unwrap_or(2000);
  let which = std::env::args().nth(2).unwrap_or("memory".into());
  let conc: usize = std::env::args().nth(3).map(|s| s.parse().unwrap()).unwrap_or(256);
  let store: Arc<dyn annals::EventStore> = if which=="memory" { Arc::new(annals::MemoryStore::new()) } else { Arc::new(annals_sqlite::SqliteStore::open(&which).await.unwrap()) };
  let inv = input::generate(n, 7);
  let mut stock: BTreeMap<String,u64> = BTreeMap::new();
  for i in &inv { if let input::Invoice::Order{lines,..}=i { for l in lines { *stock.entry(l.sku.clone()).or_default() += l.quantity as u64; } } }
  let o = run::run(store, stock, inv.into_iter().map(Ok), run::Settings{concurrency:conc, decline_rate:0.1, cancel_rate:0.02, seed:7, scarce:false, input:format!("g7-{n}")}, |_|{}).await.unwrap();
  println!("{:?}\n sagas {} in {:?} = {:.0}/s p50 {}us p99 {}us stuck {} rejected {:?}", o.books, o.sagas, o.elapsed, o.sagas as f64/o.elapsed.as_secs_f64(), o.latency_us.value_at_quantile(0.5), o.latency_us.value_at_quantile(0.99), o.stuck, o.rejected.len());
}
