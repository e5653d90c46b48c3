//! Sagas survive crashes and new versions of their plan.
#![allow(clippy::unwrap_used)]

use std::{sync::Arc, time::Duration};

use annals::{
    DeadLetters, EventStore, MemoryStore, Operator, Runtime, Saga, Service,
    saga::{Progress, Runner, Status, StepRef},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{documents, eventually},
    trip::{Clerk, Play, Trip, World, ask, starts, take_back, tallies, trip},
};
use futures::future::join_all;
use uuid::Uuid;

const ALL: [&str; 3] = ["shop", "hotel", "bank"];
const PATIENT: Duration = Duration::from_secs(60);
/// More commits than the two trips and all checkpoints need together.
const COMMITS_MAX: u64 = 80;
const DRAIN: Duration = Duration::from_secs(60);

/// Runs one trip that is confirmed and one trip that is refused. The process crashes at commit number `number`, and a
/// new process continues. Returns whether the first process reached that commit.
async fn with_crash(inner: Arc<dyn EventStore>, number: u64, fault: Fault) -> bool {
    let mut world = World::new(inner.clone(), trip(PATIENT, 3));
    world.script.play("charge", Play::Fail, 1);
    let faulty = FaultyStore::new(inner.clone());
    faulty.at(number, fault);
    let first = world.start_on(&(Arc::new(faulty.clone()) as Arc<dyn EventStore>), &ALL).await;
    world.request("a", Uuid::new_v4(), None).await;
    let ended = async |world: &World, id: &str| world.status(id).await.is_some_and(|status| status.ended_at.is_some());
    eventually("the first has ended, or the process", async || {
        (faulty.has_crashed() || ended(&world, "a").await).then_some(())
    })
    .await;
    world.script.play("confirm", Play::Refuse, if ended(&world, "a").await { 1 } else { 0 });
    world.request("b", Uuid::new_v4(), None).await;
    eventually("both sagas have ended, or the process has", async || {
        (faulty.has_crashed() || ended(&world, "b").await).then_some(())
    })
    .await;
    let crashed = faulty.has_crashed();
    // The bus ends with the process, and so do all messages that were only on the bus.
    drop(first);
    world = World { bus: Arc::default(), ..world };
    let second = world.start(&ALL).await;
    for id in ["a", "b"] {
        let at_end = async || world.status(id).await.filter(|status| status.ended_at.is_some());
        let status = eventually("it ends", at_end).await.status;
        let ledger = world.ledger(id).await;
        match status {
            Status::Completed => assert_eq!(ledger, ["book", "charge", "confirm", "announce"], "commit {number}"),
            Status::Compensated => {
                assert_eq!(ledger, ["book", "charge", "undo charge", "undo book"], "commit {number}");
            }
            status => panic!("{id} is {status:?} after a crash at commit {number}"),
        }
    }
    for service in ALL {
        assert_eq!(documents(&inner, &format!("parked.{service}.commands")).await, [], "commit {number}");
    }
    drop(second);
    crashed
}

/// Runs all crashes concurrently, each in its own world, because each of them spends most of its time waiting for
/// timers.
async fn at_each_commit(fault: Fault) {
    let crashes = (1..=COMMITS_MAX).map(|number| with_crash(Arc::new(MemoryStore::new()), number, fault.clone()));
    let crashed = join_all(crashes).await.into_iter().filter(|crashed| *crashed).count() as u64;
    assert!((15..COMMITS_MAX).contains(&crashed), "{crashed} commits were tried, which is not all of them");
}

#[tokio::test]
async fn crash_before_each_commit_ends_the_same() {
    at_each_commit(Fault::CrashBefore).await;
}

#[tokio::test]
async fn crash_after_each_commit_ends_the_same() {
    at_each_commit(Fault::CrashAfter).await;
}

#[tokio::test]
async fn unknown_outcomes_end_the_same() {
    for fault in [Fault::AppliedUnknown, Fault::LostUnknown] {
        let runs = (1..=COMMITS_MAX).map(|number| with_crash(Arc::new(MemoryStore::new()), number, fault.clone()));
        join_all(runs).await;
    }
}

#[tokio::test]
async fn crash_on_sqlite_ends_the_same() {
    for number in [4, 9, 14] {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
        assert!(with_crash(Arc::new(store.clone()), number, Fault::CrashAfter).await);
        store.close().await.unwrap();
    }
}

fn first_plan() -> Saga<Trip> {
    trip(PATIENT, 3)
}

/// The same plan with one more step at the end.
fn second_plan() -> Saga<Trip> {
    Saga::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("hotel", "book", trip))
        .compensatable("charge", |trip| ask("bank", "charge", trip))
        .undo(|trip| take_back("bank", "charge", trip))
        .pivot("confirm", |trip| ask("shop", "confirm", trip))
        .retriable("announce", |trip| ask("hotel", "announce", trip))
        .retriable("thank", |trip| ask("hotel", "thank", trip))
        .build()
}

/// Returns a world in which a trip of the first plan waits for the bank, after all processes have ended.
async fn waiting_trip() -> World {
    World { bus: Arc::default(), ..waiting_trip_on_its_bus().await }
}

/// Returns the same world, with the bank's command still on the bus.
async fn waiting_trip_on_its_bus() -> World {
    let world = World::new(Arc::new(MemoryStore::new()), first_plan());
    // From here on, the bus holds the messages to the bank, but no member receives them.
    world.start(&["bank"]).await.drain(DRAIN).await.unwrap();
    let runtime = world.start(&["shop", "hotel"]).await;
    world.request("old", Uuid::new_v4(), None).await;
    let at_charge = async || world.status("old").await.filter(|status| status.step == "charge");
    eventually("the saga waits for the bank", at_charge).await;
    drop(runtime);
    World { plan: second_plan(), ..world }
}

async fn start(world: &World, runner: Runner<Trip>) -> Runtime {
    let shop = Service::new("shop", world.store.clone()).participant(Clerk(world.script.clone())).saga(runner);
    let services = vec![shop, world.service("hotel", &world.store), world.service("bank", &world.store)];
    let mut runtime = Runtime::new();
    runtime.start(services, world.bus.clone()).await.unwrap();
    runtime
}

const OLD: [&str; 4] = ["book", "charge", "confirm", "announce"];
const NEW: [&str; 5] = ["book", "charge", "confirm", "announce", "thank"];

#[tokio::test]
async fn running_saga_keeps_its_older_plan() {
    let world = waiting_trip().await;
    let runtime = start(&world, world.runner().older(first_plan())).await;
    world.request("new", Uuid::new_v4(), None).await;
    assert_eq!(world.becomes("old", Status::Completed).await.definition_hash, first_plan().hash());
    assert_eq!(world.becomes("new", Status::Completed).await.definition_hash, second_plan().hash());
    assert_eq!(
        (world.ledger("old").await, world.ledger("new").await),
        (OLD.map(String::from).into(), NEW.map(String::from).into())
    );
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn reply_to_a_saga_of_an_unknown_plan_waits_for_it() {
    let world = waiting_trip().await;
    let runtime = start(&world, world.runner()).await;
    world.request("new", Uuid::new_v4(), None).await;
    world.becomes("new", Status::Completed).await;
    let letters = DeadLetters::new(world.store.clone());
    let letter = eventually("the reply is parked", async || letters.list("shop.commands").await.unwrap().pop()).await;
    let reason = &letter.parked.reason;
    assert!(
        reason.contains(first_plan().hash()) && reason.contains("register the definition as an older one"),
        "{reason}"
    );
    assert_eq!(&*letter.parked.key, "saga.trip-old");
    assert!(letter.retries_at.is_some(), "the reply waits for a build that knows the plan");
    let health = format!("{:?}", runtime.health().parts());
    assert!(!health.contains("Failed"), "{health}");
    drop(runtime);
    let world = World { bus: Arc::default(), ..world };
    let runtime = start(&world, world.runner().older(first_plan())).await;
    // This build knows the plan, so the reply is handled without a redrive by an operator.
    world.becomes("old", Status::Completed).await;
    assert_eq!(world.ledger("old").await, OLD);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn replies_to_a_removed_saga_are_kept() {
    let world = waiting_trip_on_its_bus().await;
    let bank = world.start(&["bank"]).await;
    eventually("the bank has replied", async || (world.bus.held("shop.commands") == 1).then_some(())).await;
    drop(bank);
    // In this build, the shop runs the saga `tour` and no longer the saga `trip`; in trips, the shop is a participant.
    let other = Saga::named("tour").retriable("announce", |trip: &Trip| ask("hotel", "announce", trip)).build();
    let runner = Runner::new(other, annals::LogQuery::categories(["nothing"]), starts);
    let runtime = start(&world, runner).await;
    let letters = DeadLetters::new(world.store.clone());
    let letter = eventually("the reply is parked", async || letters.list("shop.commands").await.unwrap().pop()).await;
    assert!(letter.parked.reason.contains("does not run saga.trip"), "{}", letter.parked.reason);
    drop(runtime);
    let world = World { bus: Arc::default(), ..world };
    let runtime = start(&world, world.runner().older(first_plan())).await;
    Operator::new(world.store.clone(), "ann").redrive("shop.commands", "saga.trip-old", "a test").await.unwrap();
    world.becomes("old", Status::Completed).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn migrated_saga_continues_under_the_new_plan() {
    fn same_place(progress: &Progress) -> Progress {
        assert_eq!(progress.at, StepRef::Forward(1));
        progress.clone()
    }
    let world = waiting_trip().await;
    let runner = world.runner().migrate(first_plan().hash(), same_place);
    let runtime = start(&world, runner).await;
    let status = world.becomes("old", Status::Completed).await;
    assert_eq!(status.definition_hash, second_plan().hash());
    assert_eq!(world.ledger("old").await, NEW);
    let migrated = world.history("old").await.into_iter().filter(|event| &*event.type_name == "saga.migrated");
    assert_eq!(migrated.count(), 1);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn timers_of_unknown_plans_block_no_other() {
    let timeout = Duration::from_millis(50);
    let old = World::new(Arc::new(MemoryStore::new()), trip(timeout, u32::MAX));
    let runtime = old.start(&["shop"]).await;
    // There are more sagas than one read returns.
    for number in 0..300 {
        old.request(&format!("old {number}"), Uuid::new_v4(), None).await;
    }
    let indexed = async || (documents(&old.store, "saga.trip").await.len() == 300).then_some(());
    eventually("all sagas are waiting", indexed).await;
    drop(runtime);
    let plan = Saga::named("trip")
        .retriable("announce", |trip| ask("hotel", "announce", trip))
        .timeout(timeout)
        .attempts(2)
        .build();
    let world = World { bus: Arc::default(), plan, script: old.script.clone(), store: old.store.clone() };
    let runner = Runner::new(world.plan.clone(), tallies(), starts);
    let mut runtime = Runtime::new();
    let shop = Service::new("shop", world.store.clone()).participant(Clerk(world.script.clone())).saga(runner);
    runtime.start(vec![shop], world.bus.clone()).await.unwrap();
    world.request("new", Uuid::new_v4(), None).await;
    // The new saga needs two timers of its own to get stuck.
    world.becomes("new", Status::Stuck).await;
    runtime.drain(DRAIN).await.unwrap();
}
