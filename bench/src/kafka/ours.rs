//! The same workloads with Annals: the relay, the consumer group, and a command that passes through both.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{
    Bus, DocumentKey, EventStore, Group, Handler, HandlerError, Health, LogQuery, Message, Position, Publisher,
    Repository, Runtime, Service, Tail, Work,
    checkpoint::{CHECKPOINTS, Checkpoint},
    relay::{Relay, Routes},
};
use annals_kafka::{KafkaBus, Settings};
use annals_postgres::PostgresStore;
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Failure,
    postgres::{Measured, histogram, ours::Counter},
};

/// The interval between checks of whether the workload has ended. The interval is so long that the cost of the checks
/// is negligible.
const LOOK: Duration = Duration::from_millis(20);

pub async fn bus(brokers: &str, partitions: u32) -> Result<Arc<KafkaBus>, Failure> {
    Ok(Arc::new(KafkaBus::connect(Settings::new(brokers).partitions(partitions)).await?))
}

async fn store(url: &str, schema: &str) -> Result<PostgresStore, Failure> {
    let settings = annals_postgres::Settings { schema: schema.into(), ..annals_postgres::Settings::default() };
    Ok(PostgresStore::connect(url, settings).await?)
}

/// Returns the sum of the positions or offsets in these checkpoints.
async fn checkpoints(store: &dyn EventStore, ids: impl Iterator<Item = String>) -> Result<i64, Failure> {
    let keys: Vec<_> = ids.map(|id| DocumentKey::new(CHECKPOINTS, id)).collect();
    let mut sum = 0;
    for document in store.documents(&keys).await?.into_iter().flatten() {
        sum += serde_json::from_str::<Checkpoint>(&document.body)?.next;
    }
    Ok(sum)
}

/// Relays the whole log to `<service>.events`.
pub async fn relay(url: &str, bus: Arc<KafkaBus>, service: &str) -> Result<Measured, Failure> {
    let store = store(url, "annals").await?;
    let count: i64 = store.status().await?.head.0;
    let mut routes = Routes::of(service);
    routes.publish("order");
    let shutdown = CancellationToken::new();
    let port: Arc<dyn EventStore> = Arc::new(store.clone());
    let publisher: Arc<dyn Publisher> = bus;
    let started = Instant::now();
    let relay = tokio::spawn(Relay::new(routes).run(port, publisher, Health::default(), shutdown.clone()));
    while checkpoints(&store, std::iter::once(format!("{service}.relay/0"))).await? < count {
        tokio::time::sleep(LOOK).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    shutdown.cancel();
    relay.await??;
    store.close().await?;
    Ok(Measured { count: usize::try_from(count)?, seconds, latency: None })
}

/// Writes an event for each message, each to a stream of its own.
struct Effect {
    counters: Repository<Counter>,
    run: String,
}

#[async_trait]
impl Handler for Effect {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let id = format!("{}.{}", self.run, message.key);
        work.create(&self.counters, &id, &1).await?;
        Ok(())
    }
}

impl Effect {
    fn new(store: &Arc<dyn EventStore>) -> Self {
        Self { counters: Repository::new(store.clone()), run: Uuid::now_v7().simple().to_string() }
    }
}

/// Consumes this many messages, each of which writes an event.
pub async fn consume(
    url: &str,
    bus: Arc<KafkaBus>,
    topic: &str,
    partitions: u32,
    count: usize,
) -> Result<Measured, Failure> {
    let store = store(url, "annals").await?;
    let port: Arc<dyn EventStore> = Arc::new(store.clone());
    let name = format!("bench-{}", Uuid::new_v4().simple());
    let group = Group::new(&name, &[topic], Effect::new(&port));
    let shutdown = CancellationToken::new();
    let started = Instant::now();
    let joined = group.join(&*bus).await?;
    let running = tokio::spawn(joined.run(port, Health::default(), shutdown.clone()));
    let place = |number| format!("{name}/{topic}/{number}");
    while checkpoints(&store, (0..partitions).map(place)).await? < i64::try_from(count)? {
        tokio::time::sleep(LOOK).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    shutdown.cancel();
    running.await??;
    store.close().await?;
    Ok(Measured { count, seconds, latency: None })
}

/// Measures the time from a command in one service until its effect is committed in another service, one command at a
/// time.
pub async fn hop(url: &str, bus: Arc<KafkaBus>, service: &str, count: usize) -> Result<Measured, Failure> {
    let here = store(url, "annals_here").await?;
    let there = store(url, "annals_there").await?;
    // Uses a tail, as services do, so that the service does not read its own commits from the store.
    let from: Arc<dyn EventStore> = Arc::new(Tail::follow(Arc::new(here.clone())).await?);
    let to: Arc<dyn EventStore> = Arc::new(Tail::follow(Arc::new(there.clone())).await?);
    let topic = format!("{service}.events");
    let group = Group::new(&format!("{service}.sink"), &[&topic], Effect::new(&to));
    let services = vec![
        Service::new(service, from.clone()).publish(&["counter"]),
        Service::new(&format!("{service}-sink"), to.clone()).consume(group),
    ];
    let mut runtime = Runtime::new();
    let port: Arc<dyn Bus> = bus;
    runtime.start(services, port).await?;
    let counters = Repository::<Counter>::new(from);
    let mut after = there.status().await?.head;
    let mut latency = histogram()?;
    let mut started = Instant::now();
    // The first commands warm up connections and topics.
    let cold = 20;
    for number in 0..cold + count {
        let asked = Instant::now();
        if number == cold {
            started = asked;
        }
        counters.create(&Uuid::now_v7().simple().to_string(), 1, Uuid::new_v4()).await?;
        after = next_event(&*to, after).await?;
        if number >= cold {
            latency.record(u64::try_from(asked.elapsed().as_micros())?)?;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    runtime.drain(Duration::from_secs(10)).await?;
    here.close().await?;
    there.close().await?;
    Ok(Measured { count, seconds, latency: Some(latency) })
}

async fn next_event(store: &dyn EventStore, after: Position) -> Result<Position, Failure> {
    loop {
        let page = store.read_log(&LogQuery::categories(["counter"]), after, 10).await?;
        if !page.events.is_empty() {
            return Ok(page.next);
        }
        store.wait(page.next).await?;
    }
}
