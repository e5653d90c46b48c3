//! A fault of one message stops only the messages with the same key. A fault that needs an operator is logged once and
//! counted, and health reports the fault for as long as it lasts.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use annals::{
    Clock, Commit, CommitError, Committed, DeadLetters, Document, DocumentKey, EventStore, Handler, HandlerError,
    Health, LocalBus, LogPage, LogQuery, MemoryStore, Message, Operator, Position, Recorded, Runtime, Saga, Scan,
    Service, StoreError, StoreStatus, StreamId, Subscription, Terminal, Version, Work,
    health::{Counter, State},
    saga::{OperatorAction, Status},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    tally::{add, documents, eventually},
    trip::{Play, Trip, World, ask, starts, tallies, trip},
};
use async_trait::async_trait;
use postgres::Schema;
use tokio::sync::Notify;
use uuid::Uuid;

const DRAIN: Duration = Duration::from_secs(60);
const PATIENT: Duration = Duration::from_secs(60);
const QUICK: Duration = Duration::from_millis(150);

/// The log output of this process.
static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Logged;

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOGGED.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing_subscriber::fmt().with_writer(|| Logged).with_ansi(false).init());
}

/// Returns the log lines that contain all of `parts`.
fn lines(parts: &[&str]) -> Vec<String> {
    let logged = String::from_utf8_lossy(&LOGGED.lock().unwrap()).into_owned();
    let has_all = |line: &&str| parts.iter().all(|part| line.contains(part));
    logged.lines().filter(has_all).map(str::to_owned).collect()
}

fn counted(health: &Health, name: &str) -> u64 {
    health.counters().iter().filter(|(counter, _)| counter.name == name).map(|(_, count)| count).sum()
}

fn attention(health: &Health, part: &str) -> Option<String> {
    match health.parts().remove(part) {
        Some(State::NeedsAttention(reason)) => Some(reason),
        _ => None,
    }
}

/// Returns a store of each kind, each with a value that must stay alive as long as the store.
async fn stores() -> Vec<(&'static str, Arc<dyn EventStore>, Box<dyn std::any::Any>)> {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    let schema = Schema::new();
    let postgres = schema.store().await;
    vec![
        ("memory", Arc::new(MemoryStore::new()), Box::new(())),
        ("sqlite", Arc::new(sqlite), Box::new(folder)),
        ("postgres", Arc::new(postgres), Box::new(schema)),
    ]
}

async fn start(store: &Arc<dyn EventStore>, subscription: Subscription) -> Runtime {
    let mut runtime = Runtime::new();
    let service = Service::new("source", store.clone()).subscribe(subscription.query(tallies()));
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

/// Fails at the tally `bad` until `healed` is set.
#[derive(Clone, Default)]
struct Fails {
    healed: Arc<AtomicBool>,
}

#[async_trait]
impl Handler for Fails {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if message.subject.ends_with("-bad") && !self.healed.load(Ordering::SeqCst) {
            return Err("it does not add up".to_owned()).terminal();
        }
        work.put(&DocumentKey::new("handled", &*message.subject), &message.version.0)?;
        Ok(())
    }
}

async fn handled(store: &Arc<dyn EventStore>, id: &str, version: i64) {
    eventually(&format!("{id} is handled"), async || {
        let found = documents(store, "handled").await;
        found.iter().any(|(key, body)| **key == *id && **body == version.to_string()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn dead_letter_is_logged_once_and_health_recovers_without_it() {
    log();
    for (kind, store, _keep) in stores().await {
        let fails = Fails::default();
        let name = format!("adder.{kind}");
        let subscription = || Subscription::new(&name, fails.clone());
        let runtime = start(&store, subscription()).await;
        let health = runtime.health();
        add(&store, "bad", [1, 2]).await;
        add(&store, "good", [1]).await;
        handled(&store, "tally-good", 1).await;
        let part = format!("{name}/0");
        let reason = eventually("health says so", async || attention(&health, &part)).await;
        assert!(reason.contains("1 keys") && reason.contains("tally-bad"), "{kind}: {reason}");
        assert!(!health.is_fine() && health.is_working());
        let letters = DeadLetters::new(store.clone());
        let letter = letters.list(&name).await.unwrap().remove(0).parked;
        let logged = || lines(&["ERROR", "dead letter", &name, "tally-bad", &letter.message().unwrap().id.to_string()]);
        assert_eq!((logged().len(), counted(&health, "annals_dead_letters_total")), (1, 1), "{kind}: {:?}", logged());
        assert!(logged()[0].contains("it does not add up"), "{:?}", logged());
        // A new process reports the fault as well, and no line is logged twice.
        runtime.drain(DRAIN).await.unwrap();
        let runtime = start(&store, subscription()).await;
        let health = runtime.health();
        eventually("health says so after a restart", async || attention(&health, &part)).await;
        assert_eq!((logged().len(), counted(&health, "annals_dead_letters_total")), (1, 0), "{kind}");
        fails.healed.store(true, Ordering::SeqCst);
        Operator::new(store.clone(), "ada").redrive(&name, "tally-bad", "a test").await.unwrap();
        handled(&store, "tally-bad", 2).await;
        eventually("health is fine again", async || health.is_fine().then_some(())).await;
        // After an operator drops the message, the fault is gone as well.
        fails.healed.store(false, Ordering::SeqCst);
        add(&store, "bad", [3]).await;
        eventually("health says so again", async || attention(&health, &part)).await;
        Operator::new(store.clone(), "ada").drop_first(&name, "tally-bad", "a test").await.unwrap();
        eventually("health is fine without it", async || health.is_fine().then_some(())).await;
        runtime.drain(DRAIN).await.unwrap();
    }
}

/// At the tallies `bad` and `worse`, reads a document whose name cannot be stored. At `worse`, also writes that
/// document.
struct Unstorable;

#[async_trait]
impl Handler for Unstorable {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        for id in ["a\0b".to_owned(), "x".repeat(5_000)] {
            let key = DocumentKey::new("odd", id);
            if message.subject.ends_with("-bad") || message.subject.ends_with("-worse") {
                assert_eq!(work.document::<i64>(&key).await?, None);
            }
            if message.subject.ends_with("-worse") {
                work.put(&key, &1)?;
            }
        }
        work.put(&DocumentKey::new("handled", &*message.subject), &message.version.0)?;
        Ok(())
    }
}

#[tokio::test]
async fn unstorable_name_parks_only_its_message() {
    log();
    for (kind, store, _keep) in stores().await {
        let name = format!("odd.{kind}");
        let runtime = start(&store, Subscription::new(&name, Unstorable)).await;
        for id in ["bad", "worse", "good"] {
            add(&store, id, [1]).await;
        }
        handled(&store, "tally-good", 1).await;
        handled(&store, "tally-bad", 1).await;
        let letters = DeadLetters::new(store.clone());
        let letters = eventually("the message is parked", async || {
            Some(letters.list(&name).await.unwrap()).filter(|all| !all.is_empty())
        });
        let letters = letters.await;
        assert_eq!((letters.len(), &*letters[0].parked.key), (1, "tally-worse"), "{kind}");
        runtime.drain(DRAIN).await.unwrap();
    }
}

/// Does not return from the tally `slow` until the test allows it.
#[derive(Clone, Default)]
struct Hangs(Arc<Notify>);

#[async_trait]
impl Handler for Hangs {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if message.subject.ends_with("-slow") {
            self.0.notified().await;
        }
        work.put(&DocumentKey::new("handled", &*message.subject), &message.version.0)?;
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn hung_handler_is_named_until_it_returns() {
    log();
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let hangs = Hangs::default();
    let runtime = start(&store, Subscription::new("waiter", hangs.clone()).lanes(2)).await;
    let health = runtime.health();
    add(&store, "slow", [1]).await;
    let id =
        store.read_stream(&StreamId::from_stored("tally-slow"), Version::START, 1).await.unwrap()[0].id.to_string();
    let hung = || {
        let parts = health.parts().into_iter();
        parts
            .filter_map(|(part, state)| {
                Some((part, matches!(state, State::Trouble(ref r) if r.contains(&id)).then_some(state)?))
            })
            .next()
    };
    let (part, state) = eventually("health names it", async || hung()).await;
    assert!(part.starts_with("waiter/"), "{part}");
    assert!(format!("{state:?}").contains("tally-slow"), "{state:?}");
    eventually("the hung handler is logged", async || lines(&["ERROR", "does not return", &id]).first().cloned()).await;
    // The other lane continues, no matter which of the two lanes is blocked.
    for number in 0..8 {
        add(&store, &format!("other{number}"), [1]).await;
    }
    eventually("other messages are handled", async || (!documents(&store, "handled").await.is_empty()).then_some(()))
        .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((lines(&["does not return", &id]).len(), counted(&health, "annals_handlers_hung_total")), (1, 1));
    hangs.0.notify_one();
    eventually("the part is fine again", async || health.is_fine().then_some(())).await;
    handled(&store, "tally-slow", 1).await;
    runtime.drain(DRAIN).await.unwrap();
}

/// Blocks its thread without yielding.
struct Blocks(Mutex<mpsc::Receiver<()>>);

#[async_trait]
impl Handler for Blocks {
    async fn handle(&self, _: &Message, _: &mut Work) -> Result<(), HandlerError> {
        self.0.lock().unwrap().recv().ok();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn handler_that_blocks_its_thread_is_named_and_aborted() {
    log();
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (end, blocked) = mpsc::channel();
    let runtime = start(&store, Subscription::new("blocker", Blocks(Mutex::new(blocked)))).await;
    let health = runtime.health();
    add(&store, "a", [1]).await;
    eventually("health names it", async || {
        matches!(health.parts().get("blocker/0"), Some(State::Trouble(reason)) if reason.contains("tally-a"))
            .then_some(())
    })
    .await;
    let error = runtime.drain(Duration::from_secs(5)).await.unwrap_err();
    assert!(error.to_string().contains("aborted: blocker"), "{error}");
    let logged = lines(&["ERROR", "did not stop in time", "blocker", "tally-a"]);
    // Another part may also be cut off, because a blocked thread of the runtime may hold a task that was about to run.
    let counters = health.counters();
    let of_blocker = |counter: &&Counter| counter.labels.iter().any(|(_, part)| part == "blocker");
    let cut_off = counters.keys().filter(|counter| counter.name == "annals_parts_cut_off_total");
    let counted: Vec<_> = cut_off.filter(of_blocker).map(|counter| counters[counter]).collect();
    assert_eq!((logged.len(), counted), (1, vec![1]), "{logged:?}");
    drop(end);
}

/// Rejects commits that park a message.
struct Refusing {
    inner: MemoryStore,
    refused: AtomicU64,
}

#[async_trait]
impl EventStore for Refusing {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
        if commit.puts.iter().any(|put| put.key.collection.starts_with("parked.")) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(CommitError::Invalid("nothing is parked here".into()));
        }
        self.inner.commit(commit).await
    }
    async fn read_stream(&self, stream: &StreamId, after: Version, limit: usize) -> Result<Vec<Recorded>, StoreError> {
        self.inner.read_stream(stream, after, limit).await
    }
    async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        self.inner.read_log(query, after, limit).await
    }
    async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
        self.inner.documents(keys).await
    }
    async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
        self.inner.scan(collection, scan, limit).await
    }
    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        self.inner.wait(after).await
    }
    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.inner.status().await
    }
    fn clock(&self) -> Clock {
        self.inner.clock()
    }
}

#[tokio::test]
async fn dead_letter_refused_by_the_store_is_named_without_spinning() {
    log();
    let refusing = Arc::new(Refusing { inner: MemoryStore::new(), refused: AtomicU64::new(0) });
    let store: Arc<dyn EventStore> = refusing.clone();
    let runtime = start(&store, Subscription::new("refused", Fails::default())).await;
    let health = runtime.health();
    add(&store, "bad", [1]).await;
    eventually("health names it", async || {
        let parts = health.parts();
        let Some(State::Trouble(reason)) = parts.get("refused/0") else { return None };
        (reason.contains("tally-bad") && reason.contains("nothing is parked here")).then_some(())
    })
    .await;
    let before = refusing.refused.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let attempts = refusing.refused.load(Ordering::SeqCst) - before;
    assert!(attempts < 20, "{attempts} attempts a second");
    drop(runtime);
}

/// An error that panics when it is displayed.
#[derive(Debug)]
struct Unspeakable;

impl fmt::Display for Unspeakable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("no words")
    }
}

impl std::error::Error for Unspeakable {}

struct Speechless;

#[async_trait]
impl Handler for Speechless {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if message.subject.ends_with("-bad") {
            return Err(Unspeakable).terminal();
        }
        work.put(&DocumentKey::new("handled", &*message.subject), &message.version.0)?;
        Ok(())
    }
}

#[tokio::test]
async fn error_with_a_panicking_display_parks_its_message() {
    log();
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let runtime = start(&store, Subscription::new("speechless", Speechless)).await;
    add(&store, "bad", [1]).await;
    add(&store, "good", [1]).await;
    handled(&store, "tally-good", 1).await;
    let letters = DeadLetters::new(store.clone()).list("speechless").await.unwrap();
    assert!(letters[0].parked.reason.contains("no words"), "{}", letters[0].parked.reason);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn stuck_saga_is_logged_once_and_health_recovers_after_a_retry() {
    log();
    for (kind, store, _keep) in stores().await {
        let world = World::new(store.clone(), trip(PATIENT, 2));
        let runtime = world.start(&["shop", "hotel", "bank"]).await;
        let health = runtime.health();
        let id = format!("stuck.{kind}");
        world.script.play("announce", Play::Fail, u32::MAX);
        world.request(&id, Uuid::new_v4(), None).await;
        world.becomes(&id, Status::Stuck).await;
        let reason = eventually("health says so", async || attention(&health, "trip.timers")).await;
        assert!(reason.contains(&id), "{kind}: {reason}");
        let stuck = lines(&["ERROR", "a saga is stuck", &id]);
        assert_eq!(stuck.len(), 1, "{kind}: {stuck:?}");
        assert!(
            ["announce", "attempt=2", "announce does not work", "trip"].iter().all(|part| stuck[0].contains(part)),
            "{stuck:?}"
        );
        let failed = lines(&["WARN", "a step failed", &id]);
        assert_eq!((failed.len(), failed[0].contains("attempt=1")), (1, true), "{kind}: {failed:?}");
        assert_eq!(counted(&health, "annals_sagas_stuck_total"), 1);
        assert_eq!(counted(&health, "annals_saga_steps_failed_total"), 1);
        world.script.behave();
        world.act(&id, OperatorAction::Retry, "a test").await;
        world.becomes(&id, Status::Completed).await;
        eventually("health is fine again", async || health.is_fine().then_some(())).await;
        runtime.drain(DRAIN).await.unwrap();
    }
}

#[tokio::test]
async fn absent_service_is_named_until_it_answers() {
    log();
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let world = World::new(store.clone(), trip(QUICK, 1_000));
    let runtime = world.start(&["shop", "hotel"]).await;
    let health = runtime.health();
    world.request("unanswered", Uuid::new_v4(), None).await;
    let reason = eventually("health says so", async || attention(&health, "trip.timers")).await;
    assert!(reason.contains("no answer from \"bank\""), "{reason}");
    let logged = lines(&["WARN", "a step timed out", "unanswered", "charge", "attempt=1 "]);
    assert_eq!(logged.len(), 1, "{logged:?}");
    assert!(counted(&health, "annals_saga_steps_timed_out_total") >= 1);
    let bank = world.start(&["bank"]).await;
    world.becomes("unanswered", Status::Completed).await;
    eventually("health is fine again", async || health.is_fine().then_some(())).await;
    bank.drain(DRAIN).await.unwrap();
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn step_for_a_service_without_a_participant_is_a_dead_letter() {
    log();
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let plan =
        Saga::named("lonely").pivot("confirm", |trip: &Trip| ask("desk", "confirm", trip)).timeout(QUICK).build();
    let runner = annals::saga::Runner::new(plan, tallies(), starts);
    let mut runtime = Runtime::new();
    let service = Service::new("desk", store.clone()).saga(runner);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    add(&store, "a", [1]).await;
    let letter = eventually("the message is parked", async || {
        DeadLetters::new(store.clone()).list("desk.commands").await.unwrap().pop()
    })
    .await;
    assert!(letter.parked.reason.contains("carries out no steps"), "{}", letter.parked.reason);
    let health = runtime.health();
    eventually("health says so", async || attention(&health, "desk.commands#0")).await;
    runtime.drain(DRAIN).await.unwrap();
}
