//! The runtime starts and drains all parts together, and reports every failure of a part.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use annals::{
    Append, Bus, Commit, EventStore, Expected, Group, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message,
    Metadata, NewEvent, Projection, Publisher, ReadModel, Runtime, Service, StreamId, Subscription, Work,
    bus::Outgoing, health::State,
};
use annals_conformance::bus::within;
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{Copier, TallyEvent, add, copies, eventually},
};

const PATIENCE: Duration = Duration::from_secs(120);

struct Bed {
    inner: Arc<dyn EventStore>,
    faulty: FaultyStore,
    runtime: Runtime,
}

struct Sums;

impl ReadModel for Sums {
    const NAME: &'static str = "sums";
    type Event = TallyEvent;
    type View = i64;

    fn keys(&self, _: &TallyEvent, message: &Message) -> Vec<String> {
        vec![message.subject.to_string()]
    }

    fn apply(&self, _: &str, sum: &mut i64, event: &TallyEvent, _: &Message) {
        if let TallyEvent::Added { amount } = event {
            *sum += amount;
        }
    }
}

async fn bed() -> Bed {
    let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let faulty = FaultyStore::new(inner.clone());
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let copier =
        Subscription::new("copier", Copier::new(store.clone())).query(LogQuery::categories(["tally"])).lanes(2);
    let mut runtime = Runtime::new();
    let service = Service::new("source", store).subscribe(copier).publish(&["tally"]);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    Bed { inner, faulty, runtime }
}

#[tokio::test]
async fn health_moves_through_all_states() {
    let Bed { inner, faulty, runtime } = bed().await;
    let health = runtime.health();
    assert!(!health.is_fine());
    eventually("fine", async || health.is_fine().then_some(())).await;
    assert_eq!(health.parts().keys().collect::<Vec<_>>(), ["copier/0", "copier/1", "source.relay/0"]);
    faulty.away(true);
    add(&inner, "a", [1]).await;
    let troubled = async || health.parts().values().all(|state| matches!(state, State::Trouble(_))).then_some(());
    eventually("all parts are in trouble", troubled).await;
    faulty.away(false);
    eventually("fine again", async || health.is_fine().then_some(())).await;
    runtime.drain(PATIENCE).await.unwrap();
    assert!(health.parts().values().all(|state| *state == State::Stopped), "{:?}", health.parts());
}

/// Counts the messages of all its subscriptions.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

#[async_trait::async_trait]
impl Handler for Counter {
    async fn handle(&self, _: &Message, _: &mut Work) -> Result<(), HandlerError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::test]
async fn parts_on_one_store_read_the_end_of_the_log_once() {
    const EVENTS: u64 = 100;
    const READERS: u64 = 8;
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()));
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let handled = Counter::default();
    let reader = |number| Subscription::new(&format!("reader-{number}"), handled.clone());
    let services = [("even", 0), ("odd", 1)].map(|(name, first)| {
        let readers = (first..READERS).step_by(2).map(reader);
        readers.fold(Service::new(name, store.clone()).publish(&["tally"]), Service::subscribe)
    });
    let mut runtime = Runtime::new();
    runtime.start(Vec::from(services), Arc::new(LocalBus::default())).await.unwrap();
    add(&store, "a", 1..=EVENTS as i64).await;
    let all = async || (handled.0.load(Ordering::Relaxed) >= EVENTS * READERS).then_some(());
    eventually("every reader has handled every event", all).await;
    let read = faulty.events_read();
    assert!((EVENTS..2 * EVENTS).contains(&read), "{read} events were read for {READERS} readers of {EVENTS} events");
    runtime.drain(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn drain_waits_for_the_current_batch() {
    let Bed { inner, faulty, runtime } = bed().await;
    let gate = Gate::new();
    faulty.when_checkpoint("copier", Fault::Hold(gate.clone()));
    add(&inner, "a", 1..=3).await;
    within("a batch is in hand", gate.reached()).await;
    let drained = tokio::spawn(runtime.drain(PATIENCE));
    tokio::task::yield_now().await;
    assert!(!drained.is_finished());
    gate.open();
    within("drain", drained).await.unwrap().unwrap();
    assert_eq!(copies(&inner, "a").await, (vec![1, 2, 3], vec![1, 2, 3]));
}

#[tokio::test]
async fn drain_timeout_is_reported_and_aborts_parts() {
    let Bed { inner, faulty, runtime } = bed().await;
    let gate = Gate::new();
    faulty.when_checkpoint("copier", Fault::Hold(gate.clone()));
    add(&inner, "a", [1]).await;
    within("a batch is in hand", gate.reached()).await;
    let error = within("drain", runtime.drain(Duration::from_millis(20))).await.unwrap_err();
    assert!(error.to_string().contains("aborted"), "{error}");
}

/// Records and publishes an event for all parts without yielding, so that no part can run in between.
async fn wake(store: &dyn EventStore, bus: &LocalBus) {
    let event = NewEvent {
        id: uuid::Uuid::new_v4(),
        type_name: "tally.added".into(),
        schema_version: 1,
        data: r#"{"amount":1}"#.into(),
        metadata: Metadata::default(),
    };
    let append = Append { stream: StreamId::new("tally", "a").unwrap(), expected: Expected::Any, events: vec![event] };
    store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    let page = store.read_log(&LogQuery::all(), annals::Position::START, 1).await.unwrap();
    let message = Message::of(&page.events[0], &"other".into());
    drop(bus.publish(vec![Outgoing { topic: "other.events".into(), message }]).await.unwrap());
}

#[tokio::test]
async fn dropped_runtime_does_nothing_more() {
    for parts in ["lanes", "members", "a projection"] {
        let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let bus = LocalBus::default();
        let faulty = FaultyStore::new(inner.clone());
        let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
        let copier = Copier::new(store.clone());
        let tallies = LogQuery::categories(["tally"]);
        let service = Service::new("source", store.clone());
        let service = match parts {
            "lanes" => service.subscribe(Subscription::new("copier", copier).query(tallies).lanes(2)),
            "members" => service.consume(Group::new("copier", &["other.events"], copier).members(2)),
            _ => service.project(Projection::new(Sums, tallies)),
        };
        let mut runtime = Runtime::new();
        runtime.start(vec![service], Arc::new(bus.clone())).await.unwrap();
        let health = runtime.health();
        eventually("fine", async || health.is_fine().then_some(())).await;
        let commits = faulty.commits();
        wake(&*inner, &bus).await;
        drop(runtime);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(faulty.commits(), commits, "{parts} went on");
    }
}

#[tokio::test(start_paused = true)]
async fn drain_does_not_wait_for_ended_consumers() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let bus = LocalBus::default();
    // The group still exists, and the bus holds messages for it.
    drop(bus.join("gone", &["source.events"]).await.unwrap());
    let mut runtime = Runtime::new();
    let source = Service::new("source", store.clone()).publish(&["tally"]);
    runtime.start(vec![source], Arc::new(bus.clone())).await.unwrap();
    add(&store, "a", 1..=3).await;
    eventually("the message is on the bus", async || (bus.held("source.events") == 3).then_some(())).await;
    let began = tokio::time::Instant::now();
    runtime.drain(PATIENCE).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test]
async fn first_error_is_returned_and_health_names_the_part() {
    let Bed { inner, mut runtime, .. } = bed().await;
    let health = runtime.health();
    let shutdown = runtime.shutdown();
    runtime.spawn("mailer", async { Err("no such host".into()) });
    runtime.spawn("clock", async move {
        shutdown.cancelled().await;
        Ok(())
    });
    let failed = async || health.parts().get("mailer").cloned();
    assert_eq!(eventually("the part has failed", failed).await, State::Failed("no such host".into()));
    assert!(!health.is_fine());
    // The other parts continue.
    add(&inner, "a", [1]).await;
    eventually("copied", async || (copies(&inner, "a").await.0 == [1]).then_some(())).await;
    assert_eq!(runtime.drain(PATIENCE).await.unwrap_err().to_string(), "mailer: no such host");
}

#[tokio::test]
async fn panic_of_a_part_shows_at_once_and_is_returned() {
    let Bed { mut runtime, .. } = bed().await;
    let health = runtime.health();
    runtime.spawn("mailer", async { panic!("out of paper") });
    let failed = async || health.parts().get("mailer").cloned();
    assert_eq!(eventually("the part has failed", failed).await, State::Failed("panicked: out of paper".into()));
    assert_eq!(runtime.drain(PATIENCE).await.unwrap_err().to_string(), "mailer: panicked: out of paper");
}

#[tokio::test]
async fn drain_works_before_and_right_after_the_start() {
    Runtime::new().drain(PATIENCE).await.unwrap();
    bed().await.runtime.drain(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn nothing_starts_on_a_closed_bus() {
    let store = Arc::new(MemoryStore::new());
    let bus = LocalBus::default();
    bus.close();
    let mut runtime = Runtime::new();
    let group = annals::Group::new("late", &["source.events"], Copier::new(store.clone()));
    let outcome = runtime.start(vec![Service::new("late", store).consume(group)], Arc::new(bus)).await;
    assert!(outcome.is_err());
    assert_eq!(runtime.health().parts().len(), 0);
    runtime.drain(PATIENCE).await.unwrap();
}
