//! The same workloads with Annals: repositories, the store, replay and subscription.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use annals::{
    Aggregate, Event, EventStore, Handler, HandlerError, Health, LogQuery, Message, Position, Repository, Start,
    Subscription, Work,
};
use annals_postgres::{PostgresStore, Replay, Settings};
use async_trait::async_trait;
use futures::TryStreamExt;
use sample_shop::order::{Order, OrderEvent};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    Failure, clients,
    postgres::{Measured, histogram, rows},
};

/// The number of instances that write to one aggregate.
pub const INSTANCES: usize = 4;

/// An aggregate that counts its events. Each command says how many events to write.
#[derive(Clone, Default)]
pub struct Counter(u64);

#[derive(Event)]
#[event(prefix = "counter")]
pub enum CounterEvent {
    Counted { n: u64 },
}

#[derive(Debug, thiserror::Error)]
#[error("never")]
pub struct Never;

impl Aggregate for Counter {
    const CATEGORY: &'static str = "counter";
    /// The number of events to write.
    type Command = u64;
    type Event = CounterEvent;
    type Refusal = Never;

    fn decide(&self, count: &u64) -> Result<Vec<CounterEvent>, Never> {
        Ok((1..=*count).map(|n| CounterEvent::Counted { n: self.0 + n }).collect())
    }

    fn evolve(&mut self, CounterEvent::Counted { n }: &CounterEvent) {
        self.0 = *n;
    }
}

async fn open(url: &str) -> Result<PostgresStore, Failure> {
    Ok(PostgresStore::connect(url, Settings::default()).await?)
}

/// Runs commands with this number in flight, each on its own task, as in a server.
async fn all<A: Aggregate>(
    commands: Vec<(String, A::Command)>,
    repository: &Repository<A>,
    in_flight: usize,
    new: bool,
) -> Result<Measured, Failure>
where
    A::Command: Send,
{
    let count = commands.len();
    let mut latency = histogram()?;
    let repository = repository.clone();
    let (took, elapsed) = clients::all(commands, in_flight, move |(id, command)| {
        let repository = repository.clone();
        async move {
            let request = Uuid::new_v4();
            let done = if new {
                repository.create(&id, command, request).await
            } else {
                repository.execute(&id, command, request).await
            };
            done.map(drop).map_err(|error| error.to_string())
        }
    })
    .await?;
    for one in took {
        latency.record(u64::try_from(one.as_micros())?)?;
    }
    Ok(Measured { count, seconds: elapsed.as_secs_f64(), latency: Some(latency) })
}

/// Places orders, each on its own aggregate.
pub async fn place(url: &str, run: &str, count: usize, in_flight: usize) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let repository = Repository::<Order>::new(Arc::new(store.clone()));
    let measured = all(rows::orders(run, count), &repository, in_flight, true).await?;
    store.close().await?;
    Ok(measured)
}

/// Loads aggregates, decides and appends, with 64 commands in flight, and `times` commands for each aggregate. `warm`:
/// whether the folded aggregates are cached.
pub async fn again(url: &str, run: &str, aggregates: usize, times: usize, warm: bool) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let cached = if warm { 2 * aggregates } else { 1 };
    let repository = Repository::<Counter>::with(Arc::new(store.clone()), Counter::CATEGORY, cached);
    let each = || (0..aggregates).map(|n| (format!("{run}.{n:06}"), 1));
    all(each().collect(), &repository, 1_024, true).await?;
    // Warms up the sessions. A new session maps the server's memory page by page, which would take longer than the
    // measured work.
    all(each().collect(), &repository, 64, false).await?;
    let commands = (0..times).flat_map(|_| each()).collect();
    let measured = all(commands, &repository, 64, false).await?;
    store.close().await?;
    Ok(measured)
}

/// Runs commands from 64 tasks on one aggregate.
pub async fn contended(url: &str, run: &str, count: usize) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let repository = Repository::<Counter>::new(Arc::new(store.clone()));
    let measured = all(vec![(run.to_owned(), 1); count], &repository, 64, false).await?;
    store.close().await?;
    Ok(measured)
}

/// Runs commands on one aggregate through four repositories that share no queue, as in four processes. Each repository
/// has `callers` commands in flight.
pub async fn four_instances(url: &str, run: &str, count: usize, callers: usize) -> Result<Measured, Failure> {
    let mut stores = Vec::new();
    for _ in 0..INSTANCES {
        stores.push(open(url).await?);
    }
    let instances = stores.iter().map(|store| {
        let repository = Repository::<Counter>::new(Arc::new(store.clone()));
        async move { all(vec![(run.to_owned(), 1); count / INSTANCES], &repository, callers, false).await }
    });
    let mut total = Measured { count: 0, seconds: 0.0, latency: Some(histogram()?) };
    for measured in futures::future::try_join_all(instances).await? {
        total.count += measured.count;
        total.seconds = total.seconds.max(measured.seconds);
        if let (Some(total), Some(latency)) = (&mut total.latency, measured.latency) {
            total.add(latency)?;
        }
    }
    for store in stores {
        store.close().await?;
    }
    Ok(total)
}

/// Runs commands of 100 events each. The result counts events, not commands.
pub async fn hundreds(url: &str, run: &str, events: usize) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let repository = Repository::<Counter>::new(Arc::new(store.clone()));
    let commands = (0..events / 100).map(|n| (format!("{run}.{n:06}"), 100)).collect();
    let measured = all(commands, &repository, 64, true).await?;
    store.close().await?;
    Ok(Measured { count: measured.count * 100, ..measured })
}

/// Replays the whole log as typed events.
pub async fn replay(url: &str) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let mut count = 0;
    let started = Instant::now();
    let mut replayed = store.replay_as::<OrderEvent>(Replay::all());
    while let Some(event) = replayed.try_next().await? {
        std::hint::black_box(event);
        count += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    drop(replayed);
    store.close().await?;
    Ok(Measured { count, seconds, latency: None })
}

/// Reads the same events page by page through the store's trait, and decodes them in the reader's task.
pub async fn paged(url: &str) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let mut count = 0;
    let mut after = Position::START;
    let started = Instant::now();
    loop {
        let page = store.read_log(&LogQuery::all(), after, 10_000).await?;
        if page.next == after {
            break;
        }
        after = page.next;
        for event in page.events {
            std::hint::black_box(event.decode::<OrderEvent>()?);
            count += 1;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    store.close().await?;
    Ok(Measured { count, seconds, latency: None })
}

/// The time at which each event was handled.
struct Heard(Arc<Vec<OnceLock<Instant>>>);

#[async_trait]
impl Handler for Heard {
    async fn handle(&self, message: &Message, _work: &mut Work) -> Result<(), HandlerError> {
        let heard = usize::try_from(message.version.0).ok().and_then(|version| self.0.get(version - 1));
        if let Some(heard) = heard {
            heard.get_or_init(Instant::now);
        }
        Ok(())
    }
}

/// Measures the time from the call of `commit` to the handler of a subscription, at 1,000 events per second. `far`:
/// whether the subscription uses a store of its own, as in another process.
pub async fn heard(url: &str, run: &str, count: usize, far: bool) -> Result<Measured, Failure> {
    let store = open(url).await?;
    let listening = if far { open(url).await? } else { store.clone() };
    let heard = Arc::new(Vec::from_iter((0..count).map(|_| OnceLock::new())));
    let health = Health::default();
    let shutdown = CancellationToken::new();
    let subscription = Subscription::new(&format!("heard.{run}"), Heard(heard.clone()))
        .query(LogQuery::categories([Counter::CATEGORY]))
        .start(Start::Now);
    let follows: Arc<dyn EventStore> = Arc::new(listening.clone());
    let following = tokio::spawn(subscription.run(follows, health.clone(), shutdown.clone()));
    while !health.is_fine() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Waits until notifications from other stores work.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let repository = Repository::<Counter>::new(Arc::new(store.clone()));
    let mut tick = interval(Duration::from_millis(1));
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let started = Instant::now();
    let mut asked = Vec::with_capacity(count);
    let mut commands = Vec::with_capacity(count);
    for _ in 0..count {
        tick.tick().await;
        asked.push(Instant::now());
        let repository = repository.clone();
        let run = run.to_owned();
        commands.push(tokio::spawn(async move { repository.execute(&run, 1, Uuid::new_v4()).await.map(drop) }));
    }
    for command in commands {
        command.await??;
    }
    let seconds = started.elapsed().as_secs_f64();
    let mut latency = histogram()?;
    for (asked, heard) in asked.iter().zip(&*heard) {
        let heard = loop {
            match heard.get() {
                Some(heard) => break *heard,
                None if started.elapsed().as_secs_f64() > seconds + 10.0 => return Err("an event was not heard".into()),
                None => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        latency.record(u64::try_from(heard.saturating_duration_since(*asked).as_micros())?)?;
    }
    shutdown.cancel();
    following.await??;
    listening.close().await?;
    store.close().await?;
    Ok(Measured { count, seconds, latency: Some(latency) })
}
