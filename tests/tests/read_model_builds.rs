//! Each generation of a read model belongs to one build. In these tests, builds run side by side, faults hit a build or
//! the store, swaps happen under a running service, and services have two versions. The tests run on every store.
#![allow(clippy::unwrap_used, missing_docs)]

mod postgres;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use annals::{
    Append, Commit, CommitError, Committed, DeadLetters, Document, DocumentKey, Event, EventStore, Expected, LocalBus,
    LogPage, LogQuery, MemoryStore, Message, Metadata, NewEvent, Operator, Position, Put, Recorded, Runtime, Scan,
    Service, StoreError, StoreStatus, StreamId, Version,
    health::State,
    operator::OperatorError,
    read_model::{Projection, ReadModel, SwapError, Views},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{becomes_fine, documents, eventually},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "account")]
enum Moved {
    Deposited { owner: String, amount: u64 },
}

#[derive(Clone, Default, Serialize, Deserialize, Debug, PartialEq)]
struct Total {
    amount: u64,
    deposits: u64,
    #[serde(default)]
    largest: u64,
}

/// Totals by owner. Events of the owner `broken` make this build panic. `calls` counts the events that were applied.
#[derive(Clone, Default)]
struct Totals<const VERSION: u32> {
    broken: Arc<Mutex<Option<&'static str>>>,
    calls: Arc<AtomicU64>,
}

impl<const V: u32> ReadModel for Totals<V> {
    const NAME: &'static str = "totals";
    const VERSION: u32 = V;
    type Event = Moved;
    type View = Total;
    fn keys(&self, Moved::Deposited { owner, .. }: &Moved, _: &Message) -> Vec<String> {
        vec![owner.clone()]
    }
    fn apply(&self, key: &str, total: &mut Total, Moved::Deposited { amount, .. }: &Moved, _: &Message) {
        let broken = *self.broken.lock().unwrap();
        assert_ne!(broken, Some(key), "a fault in apply");
        self.calls.fetch_add(1, Ordering::SeqCst);
        total.amount += amount;
        total.deposits += 1;
        if V > 1 {
            total.largest = total.largest.max(*amount);
        }
    }
}

fn totals() -> Projection<Totals<1>> {
    projection(&Totals::default())
}

fn projection<const V: u32>(totals: &Totals<V>) -> Projection<Totals<V>> {
    Projection::new(totals.clone(), LogQuery::categories(["account"]))
}

fn broken(owner: &'static str) -> Projection<Totals<1>> {
    let totals = Totals::default();
    *totals.broken.lock().unwrap() = Some(owner);
    projection(&totals)
}

/// Runs a test on each kind of store, starting with an empty store each time.
async fn on_each_store(test: impl AsyncFn(Arc<dyn EventStore>)) {
    eprintln!("in memory");
    test(Arc::new(MemoryStore::new())).await;
    eprintln!("on SQLite");
    let folder = tempfile::tempdir().unwrap();
    test(Arc::new(SqliteStore::open(folder.path().join("annals.db")).await.unwrap())).await;
    eprintln!("on PostgreSQL");
    let schema = postgres::Schema::new();
    test(Arc::new(schema.store().await)).await;
}

async fn deposits(store: &Arc<dyn EventStore>, stream: &str, owners: &[String], amount: u64) {
    let event = |owner: &String| {
        let event = Moved::Deposited { owner: owner.clone(), amount };
        NewEvent {
            id: Uuid::new_v4(),
            type_name: event.type_name().into(),
            schema_version: 1,
            data: event.encode().unwrap(),
            metadata: Metadata::default(),
        }
    };
    let stream = StreamId::new("account", stream).unwrap();
    let append = Append { stream, expected: Expected::Any, events: owners.iter().map(event).collect() };
    store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
}

async fn deposit(store: &Arc<dyn EventStore>, owner: &str, amount: u64) {
    deposits(store, owner, &[owner.to_owned()], amount).await;
}

/// Makes `count` deposits of 1, distributed over these owners in turn.
async fn many(store: &Arc<dyn EventStore>, owners: usize, count: usize) {
    for page in 0..count.div_ceil(2_000) {
        let these = (page * 2_000..count.min((page + 1) * 2_000)).map(|n| format!("owner{:04}", n % owners));
        deposits(store, &format!("bulk{page}"), &these.collect::<Vec<_>>(), 1).await;
    }
}

async fn service<const V: u32>(runtime: Runtime, store: &Arc<dyn EventStore>, of: &Totals<V>) -> Runtime {
    let mut runtime = runtime;
    let service = Service::new("bank", store.clone()).project(projection(of));
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

async fn all(store: &Arc<dyn EventStore>) -> BTreeMap<String, Total> {
    let views = Views::<Totals<1>>::new(store.clone()).list("", 100_000).await.unwrap();
    views.into_iter().map(|(key, view)| (key.to_string(), view)).collect()
}

/// Waits until the views hold `each` deposits per owner, then checks that the views are correct.
async fn right(store: &Arc<dyn EventStore>, owners: usize, each: u64) {
    let sum = |views: &BTreeMap<String, Total>| views.values().map(|total| total.deposits).sum::<u64>();
    let views = eventually("all deposits are in the views", async || {
        let views = all(store).await;
        (sum(&views) >= owners as u64 * each).then_some(views)
    });
    let views = views.await;
    assert_eq!(views.len(), owners);
    let wrong: Vec<_> = views.iter().filter(|(_, total)| total.deposits != each).take(3).collect();
    assert!(wrong.is_empty(), "of {each} deposits for each owner: {wrong:?}");
}

/// Returns the numbers of views, of parked messages and of checkpoints that the store holds for a generation.
async fn left(store: &Arc<dyn EventStore>, generation: u32) -> [usize; 3] {
    let of = format!("totals@{generation}");
    let checkpoints = documents(store, "checkpoint").await;
    let views = documents(store, &format!("read.{of}")).await.len();
    let parked = documents(store, &format!("parked.{of}")).await.len();
    [views, parked, checkpoints.iter().filter(|(id, _)| **id == format!("{of}/0")).count()]
}

async fn live(store: &Arc<dyn EventStore>) -> u32 {
    let collection = annals::read_model::live_collection(&**store, "totals").await.unwrap();
    collection.strip_prefix("read.totals@").unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn ended_build_leaves_the_views_of_another_build() {
    on_each_store(async |store| {
        many(&store, 50, 100).await;
        let mut given_up = Vec::new();
        for alone in [true, false] {
            let runtime = match alone {
                true => Runtime::new(),
                false => service(Runtime::new(), &store, &Totals::<1>::default()).await,
            };
            let compared = totals().build(store.clone(), |_| {}).await.unwrap();
            let rebuilt = totals().rebuild(store.clone()).await.unwrap();
            assert_eq!((rebuilt.views, rebuilt.parked), (50, 0));
            let found = compared.compare(|_| {}).await.unwrap();
            assert_eq!((found.live, found.rebuilt, found.differences), (50, 50, 0));
            compared.discard().await.unwrap();
            right(&store, 50, 2).await;
            // A build that is dropped does not remove the views of another build either. The views of the dropped build
            // stay until that build counts as dead.
            given_up.push(rebuilt.generation + 1);
            let dropped = totals().build(store.clone(), |_| {}).await.unwrap();
            totals().rebuild(store.clone()).await.unwrap();
            drop(dropped);
            // A swap is rejected if another build was swapped in before.
            let late = totals().build(store.clone(), |_| {}).await.unwrap();
            let generation = totals().rebuild(store.clone()).await.unwrap().generation;
            let refused = late.swap().await;
            assert!(matches!(refused, Err(SwapError::Outrun { live, .. }) if live == generation), "{refused:?}");
            assert_eq!(live(&store).await, generation);
            right(&store, 50, 2).await;
            for gone in (1..generation).filter(|gone| !given_up.contains(gone)) {
                assert_eq!(left(&store, gone).await[..2], [0, 0], "of generation {gone}");
            }
            runtime.drain(PATIENCE).await.unwrap();
        }
        deposit(&store, "last", 1).await;
        let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
        eventually("it goes on", async || all(&store).await.contains_key("last").then_some(())).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_builds_leave_correct_views() {
    on_each_store(async |store| {
        many(&store, 500, 5_000).await;
        for round in 0..4 {
            let rebuilds = (0..3).map(|build| {
                let store = store.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(build * round * 40)).await;
                    totals().rebuild(store).await
                })
            });
            let done = futures::future::join_all(rebuilds.collect::<Vec<_>>()).await;
            let done: Vec<_> = done.into_iter().map(Result::unwrap).collect();
            let swapped: Vec<_> = done.iter().flatten().map(|rebuilt| rebuilt.generation).collect();
            assert!(swapped.contains(&live(&store).await), "{done:?}");
            assert!(done.iter().flatten().all(|rebuilt| rebuilt.views == 500), "{done:?}");
            right(&store, 500, 10).await;
        }
        let pointer = documents(&store, "read-model").await;
        assert!(!pointer[0].1.contains("builds") && !pointer[0].1.contains("retired"), "{pointer:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inapplicable_events_are_counted_for_their_build() {
    on_each_store(async |store| {
        for amount in [10, 11, 12] {
            deposit(&store, "ada", amount).await;
            deposit(&store, "bob", amount).await;
        }
        let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
        right(&store, 2, 3).await;

        let given_up = broken("ada").build(store.clone(), |_| {}).await.unwrap();
        let compared = given_up.compare(|_| {}).await.unwrap();
        assert_eq!((compared.parked, compared.differences), (3, 1));
        given_up.discard().await.unwrap();
        let refused = broken("ada").build(store.clone(), |_| {}).await.unwrap().swap().await;
        let Err(SwapError::Parked { parked, first, .. }) = refused else { panic!("{refused:?}") };
        assert!(parked == 3 && first.contains("account-ada") && first.contains("a fault in apply"), "{first}");
        assert_eq!((live(&store).await, left(&store, 2).await, left(&store, 3).await), (1, [0; 3], [0; 3]));
        let error = broken("ada").rebuild(store.clone()).await.unwrap_err();
        assert!(error.to_string().contains("3 events could not be applied"), "{error}");
        right(&store, 2, 3).await;

        // The broken builds leave nothing behind. The repaired build applies each event once, now and later.
        assert_eq!(totals().rebuild(store.clone()).await.unwrap().views, 2);
        deposit(&store, "ada", 13).await;
        deposit(&store, "bob", 13).await;
        right(&store, 2, 4).await;
        assert_eq!(all(&store).await["ada"].amount, 46);

        // After the operator accepts them, the parked events wait as dead letters of the generation that is then live.
        let accepted = broken("ada").build(store.clone(), |_| {}).await.unwrap().accept_parked().swap().await.unwrap();
        assert_eq!((accepted.views, accepted.views_before, accepted.parked), (1, 2, 4));
        let of = format!("totals@{}", accepted.generation);
        let letters = DeadLetters::new(store.clone()).list(&of).await.unwrap();
        assert!(letters.len() == 1 && letters[0].behind == 3, "{letters:?}");
        // The running service has no fault. When an operator redrives the events, the service applies them once and in
        // order.
        eventually("the service keeps the new generation", async || {
            let redriven = Operator::new(store.clone(), "ann").redrive(&of, "account-ada", "mended").await;
            (redriven.unwrap() == 0).then_some(())
        })
        .await;
        right(&store, 2, 4).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_continues_with_the_new_views_and_reads_nothing_again() {
    const BEFORE: u64 = 20_000;
    on_each_store(async |store| {
        many(&store, 1_000, BEFORE as usize).await;
        let model = Totals::<1>::default();
        let written = AtomicU64::new(0);
        let runtimes = [
            service(Runtime::shared("one"), &store, &model).await,
            service(Runtime::shared("two"), &store, &model).await,
        ];
        right(&store, 1_000, BEFORE / 1_000).await;
        assert_eq!(model.calls.load(Ordering::SeqCst), BEFORE);
        let stop = AtomicBool::new(false);
        let writes = async {
            while !stop.load(Ordering::SeqCst) {
                deposit(&store, "hot", 1).await;
                written.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let operates = async {
            for _ in 0..2 {
                totals().rebuild(store.clone()).await.unwrap();
                let swapped = Instant::now();
                let upto = written.load(Ordering::SeqCst);
                eventually("the new views go on", async || {
                    let hot = all(&store).await.get("hot").map_or(0, |hot| hot.deposits);
                    (hot > upto).then_some(())
                })
                .await;
                // The promise is one second. A machine that is busy with other tests may need more, but the time must
                // not grow with the log.
                assert!(swapped.elapsed() < Duration::from_secs(5), "{:?}", swapped.elapsed());
                tokio::time::sleep(Duration::from_millis(700)).await;
            }
            stop.store(true, Ordering::SeqCst);
        };
        tokio::join!(writes, operates);
        let written = written.load(Ordering::SeqCst);
        eventually("all deposits are in the views", async || {
            (all(&store).await["hot"].deposits >= written).then_some(())
        })
        .await;
        assert_eq!(all(&store).await["hot"].deposits, written);
        let calls = model.calls.load(Ordering::SeqCst);
        assert!(calls < BEFORE + 2 * written, "{calls} events were applied for {BEFORE} and {written} more");
        for runtime in runtimes {
            becomes_fine(&runtime.health()).await;
            runtime.drain(PATIENCE).await.unwrap();
        }
        let generations: Vec<_> = futures::future::join_all((1..=2).map(|gone| left(&store, gone))).await;
        assert_eq!(generations, [[0; 3]; 2]);
    })
    .await;
}

/// The old service is in the middle of a commit when its generation is swapped and removed.
#[tokio::test(flavor = "multi_thread")]
async fn commit_in_flight_restores_no_removed_view() {
    on_each_store(async |inner| {
        let faulty = FaultyStore::new(inner.clone());
        let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
        deposit(&inner, "ada", 1).await;
        let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
        right(&inner, 1, 1).await;
        let gate = Gate::new();
        faulty.when_checkpoint("totals@1/0", Fault::Hold(gate.clone()));
        deposit(&inner, "ada", 1).await;
        gate.reached().await;
        totals().rebuild(inner.clone()).await.unwrap();
        gate.open();
        deposit(&inner, "ada", 1).await;
        right(&inner, 1, 3).await;
        assert_eq!(left(&inner, 1).await, [0; 3]);
        eventually("every part is fine", async || runtime.health().is_fine().then_some(())).await;
        runtime.drain(PATIENCE).await.unwrap();
        assert_eq!(left(&inner, 1).await, [0; 3]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_two_versions_write_separate_views() {
    on_each_store(async |store| {
        deposit(&store, "ada", 100).await;
        let old = Totals::<1>::default();
        let new = Totals::<2>::default();
        let older = service(Runtime::shared("older"), &store, &old).await;
        right(&store, 1, 1).await;
        // The newer service builds its views next to the live views and then swaps them in by itself. From then on, the
        // older service no longer changes the live views.
        let newer = service(Runtime::shared("newer"), &store, &new).await;
        eventually("the views of the new build", async || (all(&store).await["ada"].largest == 100).then_some(()))
            .await;
        deposit(&store, "ada", 7).await;
        right(&store, 1, 2).await;
        assert_eq!(all(&store).await["ada"], Total { amount: 107, deposits: 2, largest: 100 });
        let waits = eventually("the older one says so", async || match older.health().parts().get("totals").cloned() {
            Some(State::Elsewhere(reason)) => Some(reason),
            _ => None,
        });
        assert!(waits.await.contains("are of version 2, and this build has version 1"));
        becomes_fine(&older.health()).await;
        becomes_fine(&newer.health()).await;
        let calls = old.calls.load(Ordering::SeqCst);

        // A rebuild by the older build is rejected unless the operator accepts it.
        let refused = totals().build(store.clone(), |_| {}).await.unwrap().swap().await;
        assert!(matches!(refused, Err(SwapError::Older { live: 2, version: 1, .. })), "{refused:?}");
        newer.drain(PATIENCE).await.unwrap();
        deposit(&store, "ada", 3).await;
        let back = totals().build(store.clone(), |_| {}).await.unwrap().accept_older().swap().await.unwrap();
        assert_eq!(back.views, 1);
        deposit(&store, "ada", 4).await;
        right(&store, 1, 4).await;
        assert!(old.calls.load(Ordering::SeqCst) > calls, "the older service goes on");
        older.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unmaintained_views_of_a_later_version_show_in_health() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    deposit(&store, "ada", 1).await;
    projection(&Totals::<2>::default()).rebuild(store.clone()).await.unwrap();
    let older = service(Runtime::new(), &store, &Totals::<1>::default()).await;
    deposit(&store, "ada", 1).await;
    let trouble = eventually("health says that no process maintains the views", async || {
        match older.health().parts().get("totals") {
            Some(State::Trouble(reason)) => Some(reason.clone()),
            _ => None,
        }
    });
    assert!(trouble.await.contains("no process maintains the views"));
    assert_eq!(all(&store).await["ada"].deposits, 1);
    older.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn projection_survives_an_outage_that_health_shows() {
    on_each_store(async |inner| {
        let faulty = FaultyStore::new(inner.clone());
        let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
        deposit(&inner, "ada", 1).await;
        totals().rebuild(inner.clone()).await.unwrap();
        let mut runtime = Runtime::new();
        // The store is unavailable from the very first read.
        let model = projection(&Totals::<1>::default());
        let shutdown = runtime.shutdown();
        let health = runtime.health();
        let kept = store.clone();
        faulty.away(true);
        runtime.spawn("views", async move { Ok(model.run(kept, health, shutdown).await?) });
        let health = runtime.health();
        let troubled = async || matches!(health.parts().get("totals"), Some(State::Trouble(_))).then_some(());
        eventually("the part is in trouble", troubled).await;
        faulty.away(false);
        deposit(&inner, "ada", 1).await;
        right(&inner, 1, 2).await;
        eventually("the part is fine again", async || health.is_fine().then_some(())).await;
        // The store is unavailable while the generation is swapped and removed.
        faulty.away(true);
        deposit(&inner, "ada", 1).await;
        eventually("the part is in trouble", troubled).await;
        totals().rebuild(inner.clone()).await.unwrap();
        deposit(&inner, "ada", 1).await;
        faulty.away(false);
        right(&inner, 1, 4).await;
        eventually("the part is fine again", async || health.is_fine().then_some(())).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

/// No matter what happens to one commit of a rebuild, the live views are correct, and so are the views of the next
/// rebuild.
#[tokio::test(flavor = "multi_thread")]
async fn fault_at_any_commit_of_a_rebuild_leaves_correct_views() {
    let faults = [Fault::Unavailable, Fault::LostUnknown, Fault::AppliedUnknown, Fault::CrashBefore, Fault::CrashAfter];
    for fault in faults {
        for number in 1.. {
            let inner: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
            many(&inner, 20, 40).await;
            totals().rebuild(inner.clone()).await.unwrap();
            let faulty = FaultyStore::new(inner.clone());
            faulty.at(number, fault.clone());
            let model = totals();
            // A crashed process does nothing more.
            let outcome = tokio::select! {
                biased;
                () = faulty.crashed() => Err("crashed".to_owned()),
                outcome = model.rebuild(Arc::new(faulty.clone())) => outcome.map_err(|error| error.to_string()),
            };
            right(&inner, 20, 2).await;
            // A lost answer by itself must not make the rebuild fail.
            let is_unknown = matches!(fault, Fault::LostUnknown | Fault::AppliedUnknown);
            assert!(outcome.is_ok() || !is_unknown, "{fault:?} at {number}: {outcome:?}");
            if let Ok(rebuilt) = &outcome {
                assert_eq!((rebuilt.views, live(&inner).await), (20, rebuilt.generation), "{fault:?} at {number}");
            }
            let next = totals().rebuild(inner.clone()).await.unwrap();
            assert_eq!((next.views, live(&inner).await), (20, next.generation), "{fault:?} at {number}");
            right(&inner, 20, 2).await;
            if faulty.commits() < number {
                assert!(number > 4, "a rebuild of {} commits", faulty.commits());
                break;
            }
        }
    }
}

/// The test does not wait for time to pass: it writes a build that died long ago into the pointer document.
#[tokio::test(flavor = "multi_thread")]
async fn dead_build_is_removed_by_the_next_one() {
    on_each_store(async |store| {
        many(&store, 10, 20).await;
        let rebuilt = totals().rebuild(store.clone()).await.unwrap();
        let dead = broken("owner0001").build(store.clone(), |_| {}).await.unwrap();
        let generation = rebuilt.generation + 1;
        // All events are in one stream, so the events after the first failed event wait behind it.
        assert_eq!(left(&store, generation).await, [1, 19, 1]);
        drop(dead);
        let (id, body) = documents(&store, "read-model").await.remove(0);
        let (before, beat) = body.split_once(r#""beat":""#).unwrap();
        let body = format!(r#"{before}"beat":"2026-01-01T00:00:00Z{}"#, &beat[beat.find('"').unwrap()..]);
        let put = Put { key: DocumentKey::new("read-model", id), expected: None, body: Some(body.into()), due: None };
        store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await.unwrap();
        assert_eq!(totals().rebuild(store.clone()).await.unwrap().generation, generation + 1);
        assert_eq!(left(&store, generation).await, [0; 3]);
        right(&store, 10, 2).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn list_is_complete_while_views_are_swapped() {
    on_each_store(async |store| {
        many(&store, 300, 300).await;
        totals().rebuild(store.clone()).await.unwrap();
        let swapping = tokio::spawn({
            let store = store.clone();
            async move {
                for _ in 0..8 {
                    totals().rebuild(store.clone()).await.unwrap();
                }
            }
        });
        let views = Views::<Totals<1>>::new(store.clone());
        let mut lists = 0;
        while !swapping.is_finished() {
            let mut keys = Vec::new();
            let mut after = String::new();
            loop {
                let page = views.list(&after, 70).await.unwrap();
                let Some((last, _)) = page.last() else { break };
                after = last.to_string();
                keys.extend(page.into_iter().map(|(key, _)| key));
            }
            assert_eq!(keys.len(), 300);
            lists += 1;
        }
        swapping.await.unwrap();
        assert!(lists > 1);
    })
    .await;
}

/// Swaps and removes the views while a reader reads a page of these views.
struct SwapsInScan {
    inner: Arc<dyn EventStore>,
    swapped: AtomicBool,
}

#[async_trait]
impl EventStore for SwapsInScan {
    async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
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
        if collection.starts_with("read.totals@") && !self.swapped.swap(true, Ordering::SeqCst) {
            totals().rebuild(self.inner.clone()).await.unwrap();
        }
        self.inner.scan(collection, scan, limit).await
    }

    async fn wait(&self, after: Position) -> Result<(), StoreError> {
        self.inner.wait(after).await
    }

    async fn status(&self) -> Result<StoreStatus, StoreError> {
        self.inner.status().await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn list_that_meets_a_swap_is_complete() {
    on_each_store(async |inner| {
        many(&inner, 300, 300).await;
        totals().rebuild(inner.clone()).await.unwrap();
        let store = Arc::new(SwapsInScan { inner, swapped: AtomicBool::new(false) });
        assert_eq!(Views::<Totals<1>>::new(store.clone()).list("", 1_000).await.unwrap().len(), 300);
        assert!(store.swapped.load(Ordering::SeqCst));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_model_is_never_reset_and_stays_paused_across_a_swap() {
    on_each_store(async |store| {
        deposit(&store, "ada", 1).await;
        let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
        right(&store, 1, 1).await;
        let operator = Operator::new(store.clone(), "ann");
        for name in ["totals", "totals@1", "totals@2"] {
            let refused = operator.reset(name, annals::Position::START, "again").await;
            let Err(OperatorError::Illegal(reason)) = refused else { panic!("{name}: {refused:?}") };
            assert!(reason.contains("read-model totals rebuild"), "{reason}");
        }
        operator.pause("totals", true, "the disk is full").await.unwrap();
        let paused = State::Elsewhere("an operator has paused the subscription".into());
        let health = runtime.health();
        deposit(&store, "ada", 1).await;
        eventually("the subscription is paused", async || {
            (health.parts().get("totals") == Some(&paused)).then_some(())
        })
        .await;
        totals().rebuild(store.clone()).await.unwrap();
        deposit(&store, "ada", 1).await;
        eventually("the subscription is paused", async || {
            (health.parts().get("totals") == Some(&paused)).then_some(())
        })
        .await;
        assert_eq!(all(&store).await["ada"].deposits, 2);
        operator.pause("totals", false, "there is room").await.unwrap();
        right(&store, 1, 3).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

/// The stored state of a release that did not reserve generations: a checkpoint, and either a pointer with only a
/// number or no pointer.
#[tokio::test(flavor = "multi_thread")]
async fn stores_of_earlier_releases_continue() {
    on_each_store(async |store| {
        deposit(&store, "ada", 5).await;
        let put = |collection: &str, id: &str, body: &str| Put {
            key: DocumentKey::new(collection, id),
            expected: None,
            body: Some(body.into()),
            due: None,
        };
        let puts = vec![
            put("read-model", "totals", r#"{"live":3}"#),
            put("checkpoint", "totals@3/0", r#"{"next":1,"at":"2026-01-01T00:00:00Z"}"#),
            put("read.totals@3", "ada", r#"{"amount":5,"deposits":1}"#),
            // These documents remain from an interrupted rebuild.
            put("checkpoint", "totals@4/0", r#"{"next":1,"at":"2026-01-01T00:00:00Z"}"#),
            put("read.totals@4", "ada", r#"{"amount":50,"deposits":10}"#),
        ];
        store.commit(Commit { appends: Vec::new(), puts }).await.unwrap();
        let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
        deposit(&store, "ada", 5).await;
        right(&store, 1, 2).await;
        let rebuilt = totals().rebuild(store.clone()).await.unwrap();
        assert_eq!((rebuilt.generation, rebuilt.views, rebuilt.views_before), (4, 1, 1));
        deposit(&store, "ada", 5).await;
        right(&store, 1, 3).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

/// The server stops and starts while a service runs and in the middle of a rebuild.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn server_restart_loses_no_view() {
    let mut server = postgres::server::Server::start().await;
    let settings = annals_postgres::Settings { connections: 4, ..Default::default() };
    let store = annals_postgres::PostgresStore::connect(&server.url(), settings).await.unwrap();
    let store: Arc<dyn EventStore> = Arc::new(store);
    many(&store, 500, 10_000).await;
    let runtime = service(Runtime::new(), &store, &Totals::<1>::default()).await;
    right(&store, 500, 20).await;
    let rebuilding = tokio::spawn({
        let store = store.clone();
        async move { totals().rebuild(store).await }
    });
    eventually("the rebuild has begun", async || (left(&store, 2).await[0] > 0).then_some(())).await;
    server.kill();
    let health = runtime.health();
    server.resume().await;
    // The rebuild may have succeeded, or failed with a reason. In either case, the views are correct.
    let outcome = rebuilding.await.unwrap();
    eprintln!("the rebuild under the outage: {outcome:?}");
    many(&store, 500, 500).await;
    right(&store, 500, 21).await;
    eventually("every part is fine", async || health.is_fine().then_some(())).await;
    totals().rebuild(store.clone()).await.unwrap();
    right(&store, 500, 21).await;
    runtime.drain(PATIENCE).await.unwrap();
}
