//! All processes on a store share one clock, times beyond the calendar cause no failure, and a backlog of timers delays
//! no other timer.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    collections::HashMap,
    env,
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{
    Append, Clock, Commit, Event, EventStore, Expected, Handler, HandlerError, LogQuery, MemoryStore, Message,
    Metadata, NewEvent, Position, Runtime, Saga, Scan, StreamId, Subscription, Work,
    saga::{SagaEvent, Status, begin},
    worker::RetryPolicy,
};
use annals_postgres::{PostgresStore, Settings};
use annals_sqlite::SqliteStore;
use annals_tests::{
    tally::{add, documents, eventually},
    trip::{Trip, World, ask, take_back},
};
use async_trait::async_trait;
use chrono::{DateTime, Utc};
use postgres::{Schema, server::Server};
use sqlx::{Connection, PgConnection};
use tempfile::TempDir;
use uuid::Uuid;

const DRAIN: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3_600);

/// A trip with two steps: it is booked at the hotel, which does not run in most of these tests, and then confirmed.
fn short(timeout: Duration, deadline: Option<Duration>) -> Saga<Trip> {
    let plan = Saga::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("hotel", "book", trip))
        .timeout(timeout)
        .attempts(1)
        .pivot("confirm", |trip| ask("shop", "confirm", trip))
        .timeout(timeout);
    match deadline {
        Some(deadline) => plan.deadline(deadline).build(),
        None => plan.build(),
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

#[tokio::test]
async fn moving_a_clock_tests_a_deadline_of_three_days() {
    let clock = Clock::by_hand("2026-02-28T12:00:00Z".parse().unwrap());
    let store = MemoryStore::with_clock(clock.clone());
    let world = World::new(Arc::new(store), short(30 * DAY, Some(3 * DAY)));
    let began = Instant::now();
    let runtime = world.start(&["shop"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    world.becomes("a", Status::Running).await;
    clock.advance(3 * DAY - Duration::from_secs(1));
    world.request("b", Uuid::new_v4(), None).await;
    let second = world.becomes("b", Status::Running).await;
    assert_eq!(second.started_at.to_rfc3339(), "2026-03-03T11:59:59+00:00");
    clock.advance(Duration::from_secs(1));
    let first = world.becomes("a", Status::Compensating).await;
    assert_eq!(first.last_error.as_deref(), Some("book: deadline"));
    assert_eq!(world.status("b").await.unwrap().status, Status::Running);
    // The store's clock moved by three days, while the test took only a moment.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    runtime.drain(DRAIN).await.unwrap();
}

/// Fails at the first message of each stream whose id ends with `-bad`.
struct Fails;

#[async_trait]
impl Handler for Fails {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if message.version.0 == 1 && message.subject.ends_with("-bad") {
            return Err("not today".into());
        }
        work.put(&annals::DocumentKey::new("handled", &*message.subject), &message.version.0)?;
        Ok(())
    }
}

#[tokio::test]
async fn waits_beyond_the_calendar_never_end() {
    for longest in [Duration::MAX, Duration::from_secs(u64::MAX / 1_000), 20_000 * 366 * DAY] {
        for (kind, store, _keep) in stores().await {
            let world = World::new(store.clone(), short(longest, Some(longest)));
            let retry = RetryPolicy { delay_min: longest, delay_max: longest, ..RetryPolicy::default() };
            let fails = Subscription::new("fails", Fails).query(LogQuery::categories(["tally"])).retry(retry);
            let mut runtime = Runtime::new();
            let shop = world.service("shop", &store).subscribe(fails);
            runtime.start(vec![shop], world.bus.clone()).await.unwrap();
            world.request("a", Uuid::new_v4(), None).await;
            world.becomes("a", Status::Running).await;
            add(&store, "bad", [1]).await;
            add(&store, "good", [1]).await;
            eventually("the lane goes on", async || {
                documents(&store, "handled").await.iter().any(|(id, _)| &**id == "tally-good").then_some(())
            })
            .await;
            let far = Scan::Due("9999-12-31T23:59:59Z".parse().unwrap());
            for collection in ["saga.trip", "parked.fails"] {
                eventually(&format!("{kind}: {collection}"), async || {
                    (!documents(&store, collection).await.is_empty()).then_some(())
                })
                .await;
                let due = store.scan(collection, &far, 10).await.unwrap();
                assert!(due.is_empty(), "{kind}, {longest:?}: {due:?}");
            }
            let hotel = world.start(&["hotel"]).await;
            // The hotel's first command is lost: it was sent before the hotel ran, so the local bus dropped it.
            world.request("b", Uuid::new_v4(), None).await;
            world.becomes("b", Status::Completed).await;
            assert_eq!(world.status("a").await.unwrap().status, Status::Running, "{kind}, {longest:?}");
            hotel.drain(DRAIN).await.unwrap();
            runtime.drain(DRAIN).await.unwrap();
        }
    }
}

/// The number of timers that become due at once.
const HERD: usize = 10_000;

/// Creates sagas that started an hour ago, each with a step that waited for three seconds.
async fn herd(world: &World, store: &Arc<dyn EventStore>) {
    let hour_ago = store.clock().now().timestamp_millis() - 3_600_000;
    let started = |number: usize| {
        let id = format!("h{number}");
        let context = Trip { id: id.clone(), heard: Vec::new() };
        let moved = begin(&world.plan, Uuid::new_v4(), context.clone(), hour_ago).unwrap();
        let event = SagaEvent::Started {
            saga: "trip".into(),
            context: serde_json::to_value(context).unwrap(),
            progress: moved.progress,
            send: moved.send,
        };
        let event = NewEvent {
            id: Uuid::new_v4(),
            type_name: event.type_name().into(),
            schema_version: event.schema_version(),
            data: event.encode().unwrap(),
            metadata: Metadata::of_request(Uuid::new_v4()),
        };
        Append { stream: StreamId::new("saga.trip", &id).unwrap(), expected: Expected::Any, events: vec![event] }
    };
    for page in (0..HERD).collect::<Vec<_>>().chunks(1_000) {
        let appends = page.iter().map(|number| started(*number)).collect();
        store.commit(Commit { appends, puts: Vec::new() }).await.unwrap();
    }
}

/// Returns the time at which each saga gave up on its step, in order.
async fn given_up(store: &Arc<dyn EventStore>) -> Vec<(String, DateTime<Utc>)> {
    let mut found = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(&LogQuery::types(["saga.timed"]), after, 1_000).await.unwrap();
        if page.next == after {
            return found;
        }
        after = page.next;
        for event in page.events {
            if let Some(SagaEvent::Timed { gave_up: Some(_), .. }) = event.decode().unwrap() {
                found.push((event.stream.id().to_owned(), event.recorded_at));
            }
        }
    }
}

async fn backlog_delays_no_other(store: Arc<dyn EventStore>) {
    let world = World::new(store.clone(), short(Duration::from_secs(3), None));
    herd(&world, &store).await;
    let runtime = world.start(&["shop"]).await;
    world.request("fresh", Uuid::new_v4(), None).await;
    let all = tokio::time::timeout(Duration::from_secs(240), async {
        while given_up(&store).await.len() <= HERD {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
    all.await.unwrap();
    let fired = given_up(&store).await;
    let times: HashMap<_, _> = fired.iter().map(|(id, _)| (id, 1)).collect();
    assert_eq!((times.len(), fired.len()), (HERD + 1, HERD + 1), "each once");
    let started = world.history("fresh").await[0].recorded_at;
    let (_, fresh) = fired.iter().find(|(id, _)| id == "fresh").unwrap();
    let last = fired.last().unwrap().1 - started;
    let waited = *fresh - started;
    println!("the fresh one after {waited}, the last one after {last}");
    // On a slow machine, all timers take longer. If the new timer had to wait for the backlog, it would be one of the
    // last timers to fire.
    let most = last.num_milliseconds() / 2;
    assert!(
        waited.num_milliseconds() < most.max(5_000),
        "due after 3 s, fired after {waited}; the last one after {last}"
    );
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_due_timers_delay_no_other_in_memory() {
    backlog_delays_no_other(Arc::new(MemoryStore::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_due_timers_delay_no_other_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    backlog_delays_no_other(Arc::new(SqliteStore::open(folder.path().join("annals.db")).await.unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_due_timers_delay_no_other_on_postgres() {
    let schema = Schema::new();
    backlog_delays_no_other(Arc::new(schema.store().await)).await;
}

/// A different clock for one process, provided by a library that is loaded before the library of the system.
struct OtherClock {
    _folder: TempDir,
    library: PathBuf,
}

impl OtherClock {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // The server runs as another user, who must be able to read the folder.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let library = folder.path().join("clock.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/time/clock.c");
        let compiled =
            Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).args([source, "-ldl"]).status();
        assert!(compiled.unwrap().success(), "a C compiler is needed");
        Self { _folder: folder, library }
    }

    fn environment(&self, ahead_seconds: i64) -> [(String, String); 2] {
        let library = self.library.to_str().unwrap().to_owned();
        [("LD_PRELOAD".into(), library), ("CLOCK_AHEAD_S".into(), ahead_seconds.to_string())]
    }
}

/// The environment variable that names the store that the two processes share.
const SHARED_STORE: &str = "ANNALS_TIME_STORE";
/// The line that the process prints once all its parts are working.
const UP: &str = "an instance with another clock is up";

fn patient() -> Saga<Trip> {
    short(10 * DAY, Some(Duration::from_secs(30)))
}

/// Runs the second process, whose clock differs. Without the environment variable, this test does nothing.
#[test]
fn instance_with_another_clock() {
    let Ok(location) = env::var(SHARED_STORE) else { return };
    // The process ends together with the test, no matter how the test ends.
    std::thread::spawn(|| {
        _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let store: Arc<dyn EventStore> = match location.split_once('#') {
            Some((url, schema)) => {
                let settings = Settings { schema: schema.into(), connections: 4 };
                Arc::new(PostgresStore::connect(url, settings).await.unwrap())
            }
            None => Arc::new(SqliteStore::open(&location).await.unwrap()),
        };
        let world = World::new(store, patient());
        let runtime = world.start_shared("other", &["shop"]).await;
        eventually("it works", async || runtime.health().is_fine().then_some(())).await;
        println!("{UP} at {}", Utc::now());
        std::future::pending::<()>().await;
    });
}

struct Instance(Child);

impl Drop for Instance {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts the other process. Returns the process, and the number of seconds by which its clock is ahead.
fn start(clock: &OtherClock, ahead_seconds: i64, location: &str) -> (Instance, i64) {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "instance_with_another_clock", "--nocapture"]);
    command.env(SHARED_STORE, location).envs(clock.environment(ahead_seconds));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let instance = Instance(child);
    let up = output.lines().map_while(Result::ok).find_map(|line| {
        let (_, time) = line.split_once(UP)?;
        time.trim().strip_prefix("at ")?.parse::<DateTime<Utc>>().ok()
    });
    (instance, (up.expect("the other process ended") - Utc::now()).num_seconds())
}

async fn clocks_apart(store: Arc<dyn EventStore>, location: &str) {
    let clock = OtherClock::new();
    for (ahead, other_starts_them) in [(3_600, false), (-3_600, true), (60, false), (-60, true)] {
        let world = World::new(store.clone(), patient());
        let id = format!("t{ahead}");
        let runs = async |id: &str| {
            world.request(id, Uuid::new_v4(), None).await;
            world.becomes(id, Status::Running).await;
        };
        let (other, runtime);
        if other_starts_them {
            other = start(&clock, ahead, location);
            runs(&id).await;
            runtime = world.start_shared("right", &["shop"]).await;
        } else {
            runtime = world.start_shared("right", &["shop"]).await;
            runs(&id).await;
            other = start(&clock, ahead, location);
        }
        assert!((other.1 - ahead).abs() < 20, "the clock is ahead by {} s, not {ahead}", other.1);
        // By then, both processes have checked the timers twice. The test has to sleep, because nothing signals that an
        // event does not happen.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let events: Vec<_> = world.history(&id).await.into_iter().map(|event| event.type_name.to_string()).collect();
        assert_eq!(events, ["saga.started"], "ahead by {ahead} s");
        drop(other);
        runtime.drain(DRAIN).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_differ_change_nothing_on_postgres() {
    let schema = Schema::new();
    let location = format!("{}#{}", postgres::url(), schema.name());
    clocks_apart(Arc::new(schema.store().await), &location).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_that_differ_change_nothing_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("annals.db");
    clocks_apart(Arc::new(SqliteStore::open(&path).await.unwrap()), path.to_str().unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn timers_follow_the_clock_of_the_server() {
    let clock = OtherClock::new();
    for ahead in [3_600, -60] {
        let server = Server::start_with_environment(clock.environment(ahead).to_vec()).await;
        let store = PostgresStore::connect(&server.url(), Settings::default()).await.unwrap();
        let mut connection = PgConnection::connect(&server.url()).await.unwrap();
        let of_server: DateTime<Utc> =
            sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&mut connection).await.unwrap();
        assert!(((of_server - Utc::now()).num_seconds() - ahead).abs() < 20, "the server has another clock");
        assert!((store.clock().now() - of_server).num_milliseconds().abs() < 5_000, "{:?}, {of_server}", store.clock());
        let world = World::new(Arc::new(store.clone()), short(DAY, Some(Duration::from_secs(2))));
        let runtime = world.start(&["shop"]).await;
        world.request("a", Uuid::new_v4(), None).await;
        world.becomes("a", Status::Compensating).await;
        let history = world.history("a").await;
        let waited = history[1].recorded_at - history[0].recorded_at;
        assert!((1_900..10_000).contains(&waited.num_milliseconds()), "a deadline of 2 s fired after {waited}");
        let started = world.status("a").await.unwrap().started_at;
        assert!((started - history[0].recorded_at).num_seconds().abs() < 5, "{started}");
        runtime.drain(DRAIN).await.unwrap();
        store.close().await.unwrap();
        connection.close().await.ok();
    }
}
