//! Tests services that change while they run. Running sagas move to other plans, and two builds run side by side
//! although neither understands everything that the other writes.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{sync::Arc, time::Duration};

use annals::{
    Answer, DeadLetters, Event, EventStore, Handler, HandlerError, LocalBus, MemoryStore, Message, Participant,
    Runtime, Saga, Service, StartError, StepError, Subscription, Work,
    health::State,
    saga::{OperatorAction, Progress, Runner, SagaStatus, Status, StepRef, StepRequest},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    tally::{Tally, TallyCommand, document, documents, eventually},
    trip::{Clerk, Play, Trip, World, ask, starts, take_back, tallies},
};
use async_trait::async_trait;
use uuid::Uuid;

const ALL: [&str; 3] = ["shop", "hotel", "bank"];
const DRAIN: Duration = Duration::from_secs(60);
/// Longer than any test, so that progress cannot come from a timer.
const PATIENT: Duration = Duration::from_secs(120);

type Plan = Saga<Trip>;

/// A plan with these steps. Steps such as `book` and `charge` can be undone, `confirm` is the pivot, and steps after
/// the pivot are retried.
macro_rules! plan {
    ($timeout:expr, $attempts:expr; $($step:literal @ $service:literal),*; $($after:literal @ $other:literal),*) => {
        Saga::<Trip>::named("trip")
            $(.compensatable($step, |trip| ask($service, $step, trip))
                .undo(|trip| take_back($service, $step, trip))
                .timeout($timeout)
                .attempts($attempts))*
            .pivot("confirm", |trip| ask("shop", "confirm", trip))
            .timeout($timeout)
            .attempts($attempts)
            $(.retriable($after, |trip| ask($other, $after, trip)).timeout($timeout).attempts($attempts))*
            .build()
    };
}

fn services(world: &World, store: &Arc<dyn EventStore>, runner: Runner<Trip>, names: &[&str]) -> Vec<Service> {
    let service = |name: &&str| {
        let service = Service::new(name, store.clone()).participant(Clerk(world.script.clone()));
        if *name == "shop" { service.saga(runner.clone()) } else { service }
    };
    names.iter().map(service).collect()
}

fn runner(plan: Plan) -> Runner<Trip> {
    Runner::new(plan, tallies(), starts)
}

async fn start(world: &World, runner: Runner<Trip>, names: &[&str]) -> Runtime {
    let mut runtime = Runtime::new();
    runtime.start(services(world, &world.store, runner, names), world.bus.clone()).await.unwrap();
    runtime
}

/// Returns a world in which a saga with the plan `old` waits at `charge`: the bank is away, and the bus holds the
/// messages to the bank.
async fn waits_at_charge(store: Arc<dyn EventStore>, old: fn() -> Plan) -> World {
    let world = World::new(store, old());
    start(&world, runner(old()), &["bank"]).await.drain(DRAIN).await.unwrap();
    let runtime = start(&world, runner(old()), &["shop", "hotel"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    eventually("the saga waits at charge", async || world.status("a").await.filter(|status| status.step == "charge"))
        .await;
    // No member receives the messages to the bank, so draining would not end. Therefore the test drops the runtime.
    drop(runtime);
    world
}

fn first() -> Plan {
    plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; "announce" @ "hotel")
}

fn to(progress: &Progress, step: usize) -> Progress {
    Progress { at: StepRef::Forward(step), ..progress.clone() }
}

/// Sagas move to plans in which steps were added (before, after and between others), removed or moved, provided that
/// the sagas have not yet requested those steps.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_adds_removes_and_moves_unrequested_steps() {
    type Case = (&'static str, fn() -> Plan, fn(&Progress) -> Progress, &'static [&'static str]);
    let cases: [Case; 4] = [
        (
            "one in front",
            || plan!(PATIENT, 3; "check" @ "hotel", "book" @ "hotel", "charge" @ "bank"; "announce" @ "hotel"),
            |progress| to(progress, 2),
            &["book", "charge", "confirm", "announce"],
        ),
        (
            "between and behind",
            || plan!(PATIENT, 3; "book" @ "hotel", "check" @ "bank", "charge" @ "bank", "insure" @ "bank"; "thank" @ "hotel", "announce" @ "hotel"),
            |progress| to(progress, 2),
            &["book", "charge", "insure", "confirm", "thank", "announce"],
        ),
        (
            "the order of those before changes, and the last is removed",
            || plan!(PATIENT, 3; "charge" @ "bank", "insure" @ "bank"; ),
            |progress| Progress { at: StepRef::Forward(0), ..progress.clone() },
            &[],
        ),
        (
            "one removed",
            || plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; ),
            |progress| progress.clone(),
            &["book", "charge", "confirm"],
        ),
    ];
    for (case, plan, migrate, ledger) in cases {
        for refused in [false, true] {
            for folder in [None, Some(tempfile::tempdir().unwrap())] {
                let store: Arc<dyn EventStore> = match &folder {
                    None => Arc::new(MemoryStore::new()),
                    Some(folder) => Arc::new(SqliteStore::open(folder.path().join("annals.db")).await.unwrap()),
                };
                let world = waits_at_charge(store, first).await;
                if refused && !ledger.is_empty() {
                    world.script.play("confirm", Play::Refuse, 1);
                }
                let runtime = start(&world, runner(plan()).migrate(first().hash(), migrate), &ALL).await;
                if ledger.is_empty() {
                    // The booking was requested and done. A saga that moved to a plan without the booking could never
                    // compensate it.
                    let error = refusal(&world, "a", runtime).await;
                    assert!(
                        error.contains("step \"book\" was requested, but the plan does not have the step"),
                        "{error}"
                    );
                    continue;
                }
                let end = if refused { Status::Compensated } else { Status::Completed };
                world.becomes("a", end).await;
                let done = world.ledger("a").await;
                if refused {
                    let stands = |step: &str| {
                        let count = |name: &str| done.iter().filter(|done| *done == name).count();
                        (count(step), count(&format!("undo {step}")))
                    };
                    assert_eq!((stands("book"), stands("charge")), ((1, 1), (1, 1)), "{case}: {done:?}");
                    assert_eq!(stands("check"), (0, 0), "{case}: what was never done is never undone: {done:?}");
                    assert_eq!(stands("insure").0, stands("insure").1, "{case}: {done:?}");
                } else {
                    assert_eq!(done, ledger, "{case}");
                }
                for service in ALL {
                    assert_eq!(documents(&world.store, &format!("parked.{service}.commands")).await, [], "{case}");
                }
                runtime.drain(DRAIN).await.unwrap();
            }
        }
    }
}

/// Returns the error that an operator reads about a saga whose migration is rejected, while another saga continues.
/// Drains the runtime.
async fn refusal(world: &World, id: &str, runtime: Runtime) -> String {
    let is_refused = async || world.status(id).await?.last_error.filter(|error| error.contains("cannot be moved"));
    let parked = async || {
        let letters = DeadLetters::new(world.store.clone()).list("shop.commands").await.unwrap();
        letters.into_iter().map(|letter| letter.parked.reason).find(|reason| reason.contains("cannot be moved"))
    };
    let error = eventually("an operator sees it", async || parked().await.or(is_refused().await)).await;
    assert_ne!(world.status(id).await.unwrap().status, Status::Completed);
    world.request("another", Uuid::new_v4(), None).await;
    world.becomes("another", Status::Completed).await;
    runtime.drain(DRAIN).await.unwrap();
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_migration_is_refused_for_that_saga_alone() {
    type Case = (fn() -> Plan, fn(&Progress) -> Progress, &'static str);
    let cases: [Case; 7] = [
        (
            || plan!(PATIENT, 3; "charge" @ "bank", "book" @ "hotel"; ),
            |progress| to(progress, 0),
            "step \"book\" is done, and would be requested again",
        ),
        (
            || plan!(PATIENT, 3; "book" @ "hotel"; ),
            Progress::clone,
            "the saga waits at step \"charge\", but forward.1 of the plan is step \"confirm\"",
        ),
        (|| plan!(PATIENT, 3; "charge" @ "bank"; ), |progress| to(progress, 7), "the plan has no step at forward.7"),
        (
            || plan!(PATIENT, 3; "charge" @ "bank", "hire" @ "bank"; ),
            |progress| to(progress, 0),
            "step \"book\" was requested, but the plan does not have the step",
        ),
        (
            || plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; ),
            |_| panic!("no idea"),
            "the migration panicked: no idea",
        ),
        (
            || plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; ),
            |progress| Progress { calls: Vec::new(), ..progress.clone() },
            "step \"charge\" was requested from 1 participants",
        ),
        (
            || plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; ),
            |progress| Progress { status: Status::Completed, ..progress.clone() },
            "a migration cannot change the saga to Completed",
        ),
    ];
    for (plan, migrate, why) in cases {
        let world = waits_at_charge(Arc::new(MemoryStore::new()), first).await;
        let runtime = start(&world, runner(plan()).migrate(first().hash(), migrate), &ALL).await;
        let error = refusal(&world, "a", runtime).await;
        assert!(error.contains(why), "{error}");
        // The repaired build keeps the old plan for the saga, and handles the waiting messages at once.
        let runtime = start(&world, runner(plan()).older(first()), &ALL).await;
        world.becomes("a", Status::Completed).await;
        assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce"], "{why}");
        assert_eq!(documents(&world.store, "parked.shop.commands").await, [], "{why}");
        runtime.drain(DRAIN).await.unwrap();
    }
}

/// A plan whose first step asks two services.
fn paired() -> Plan {
    Saga::<Trip>::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("hotel", "book", trip))
        .and(|trip| ask("shop", "reserve", trip))
        .undo(|trip| take_back("shop", "reserve", trip))
        .timeout(PATIENT)
        .compensatable("charge", |trip| ask("bank", "charge", trip))
        .undo(|trip| take_back("bank", "charge", trip))
        .timeout(PATIENT)
        .pivot("confirm", |trip| ask("shop", "confirm", trip))
        .timeout(PATIENT)
        .build()
}

/// The booking at the second service could never be undone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_that_drops_a_participant_of_a_done_step_is_refused() {
    let world = waits_at_charge(Arc::new(MemoryStore::new()), paired).await;
    let runtime = start(&world, runner(first()).migrate(paired().hash(), Progress::clone), &ALL).await;
    let error = refusal(&world, "a", runtime).await;
    assert!(error.contains("step \"book\" was requested from 2 participants, but has 1 in the plan"), "{error}");
    world.script.play("confirm", Play::Refuse, u32::MAX);
    let runtime = start(&world, runner(first()).older(paired()), &ALL).await;
    world.becomes("a", Status::Compensated).await;
    let done = world.ledger("a").await;
    for undone in ["undo book", "undo reserve", "undo charge"] {
        assert_eq!(done.iter().filter(|name| *name == undone).count(), 1, "{undone}: {done:?}");
    }
    runtime.drain(DRAIN).await.unwrap();
}

/// A participant that the plan adds to a done step was never asked, so there is nothing to undo at this participant.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_may_add_a_participant_to_a_done_step() {
    let world = waits_at_charge(Arc::new(MemoryStore::new()), first).await;
    world.script.play("confirm", Play::Refuse, u32::MAX);
    let runtime = start(&world, runner(paired()).migrate(first().hash(), Progress::clone), &ALL).await;
    world.becomes("a", Status::Compensated).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "undo charge", "undo book"]);
    runtime.drain(DRAIN).await.unwrap();
}

/// The saga is going back, and waits for the undo of the charge. In the new plan, the booking is the pivot, which has
/// no undo.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_that_makes_a_done_step_the_pivot_is_refused_on_the_way_back() {
    fn pivot_last() -> Plan {
        Saga::<Trip>::named("trip")
            .compensatable("charge", |trip| ask("bank", "charge", trip))
            .undo(|trip| take_back("bank", "charge", trip))
            .timeout(PATIENT)
            .pivot("book", |trip| ask("hotel", "book", trip))
            .timeout(PATIENT)
            .build()
    }
    // The timeout is short, so that a timer is due soon, whatever the saga waits for when the first process ends.
    let old = || plan!(Duration::from_secs(1), 1_000; "book" @ "hotel", "charge" @ "bank"; );
    let world = World::new(Arc::new(MemoryStore::new()), old());
    world.script.play("confirm", Play::Refuse, u32::MAX).play("undo charge", Play::Fail, u32::MAX);
    let runtime = start(&world, runner(old()), &ALL).await;
    world.request("a", Uuid::new_v4(), None).await;
    world.script.asked_for("undo charge", 2).await;
    // Without this wait, a task that still runs could undo the charge.
    runtime.drain(DRAIN).await.unwrap();
    world.script.behave();
    let migrate = |progress: &Progress| Progress { at: StepRef::Undo(0), ..progress.clone() };
    let runtime = start(&world, runner(pivot_last()).migrate(old().hash(), migrate), &ALL).await;
    let health = runtime.health();
    let named = async || match health.parts().remove("trip.timers")? {
        State::NeedsAttention(reason) => Some(reason).filter(|reason| reason.contains("such as a: ")),
        _ => None,
    };
    let reason = eventually("health names the saga", named).await;
    assert!(reason.contains("step \"book\" was requested, but the plan has no undo of the step"), "{reason}");
    let error = refusal(&world, "a", runtime).await;
    assert!(error.contains("the plan has no undo of the step"), "{error}");
    assert!(!world.ledger("a").await.contains(&"undo charge".to_owned()), "the saga stays where it is");
}

#[tokio::test]
async fn unused_plan_is_refused_at_the_start() {
    fn other() -> Plan {
        Saga::<Trip>::named("trip")
            .compensatable("book", |trip| ask("hotel", "book", trip))
            .undo(|trip| take_back("hotel", "another book", trip))
            .compensatable("charge", |trip| ask("bank", "charge", trip))
            .undo(|trip| take_back("bank", "charge", trip))
            .pivot("confirm", |trip| ask("shop", "confirm", trip))
            .retriable("announce", |trip| ask("hotel", "announce", trip))
            .build()
    }
    let world = World::new(Arc::new(MemoryStore::new()), first());
    let runner = || runner(other());
    let wrong = [
        runner().older(first()),
        runner().migrate(first().hash(), Progress::clone),
        runner().older(plan!(PATIENT, 3; "book" @ "hotel"; )).older(plan!(PATIENT, 1; "book" @ "hotel"; )),
    ];
    for runner in wrong {
        let started = Runtime::new().start(services(&world, &world.store, runner, &ALL), world.bus.clone()).await;
        let error = started.unwrap_err();
        assert!(matches!(&error, StartError::Definitions { service, .. } if service == "shop"), "{error}");
        assert!(error.to_string().contains("revision"), "{error}");
    }
    assert_ne!(first().hash(), {
        let revised =
            Saga::<Trip>::named("trip").revision(1).pivot("confirm", |trip| ask("shop", "confirm", trip)).build();
        revised.hash().to_owned()
    });
}

fn second() -> Plan {
    plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; "announce" @ "hotel", "thank" @ "hotel")
}

/// Two builds run on one store, each with its own bus. The builds share the lanes of the log, so each build receives
/// events that the other wrote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_forward_and_back_strands_no_saga() {
    let schema = postgres::Schema::new();
    for (name, [old, new], stores) in [
        (
            "PostgreSQL",
            ["a", "b"],
            [Arc::new(schema.store().await) as Arc<dyn EventStore>, Arc::new(schema.store().await)],
        ),
        ("memory", ["b", "a"], {
            let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
            [store.clone(), store]
        }),
    ] {
        let world = World::new(stores[0].clone(), first());
        let instance = async |instance: &str, store: &Arc<dyn EventStore>, runner: Runner<Trip>| {
            let mut runtime = Runtime::shared(instance);
            runtime.start(services(&world, store, runner, &ALL), Arc::new(LocalBus::default())).await.unwrap();
            runtime
        };
        let old_build = || runner(first());
        let new_build = || runner(second()).older(first());
        let request = async |from: usize| {
            for id in from..from + 20 {
                world.request(&id.to_string(), Uuid::new_v4(), None).await;
                tokio::task::yield_now().await;
            }
        };
        let alone = instance(old, &stores[0], old_build()).await;
        request(0).await;
        let both = instance(new, &stores[1], new_build()).await;
        request(20).await;
        all_end(&world, 0..40, name).await;
        // The rollback: the new build stops while sagas with its plan are running, and comes back later.
        world.script.play("thank", Play::Fail, 3);
        request(40).await;
        both.drain(DRAIN).await.unwrap();
        request(60).await;
        let again = instance(new, &stores[1], new_build()).await;
        alone.drain(DRAIN).await.unwrap();
        request(80).await;
        all_end(&world, 0..100, name).await;
        // The old build may have parked a second copy of a reply. The new build handles it soon, so the test waits.
        for service in ALL {
            let parked = async || documents(&world.store, &format!("parked.{service}.commands")).await;
            eventually("nothing waits", async || parked().await.is_empty().then_some(())).await;
        }
        again.drain(DRAIN).await.unwrap();
    }
}

async fn all_end(world: &World, ids: std::ops::Range<usize>, name: &str) {
    for id in ids {
        let ended = async || world.status(&id.to_string()).await.filter(|status| status.ended_at.is_some());
        let status: SagaStatus = eventually(&format!("saga {id} ends on {name}"), ended).await;
        assert_eq!(status.status, Status::Completed, "{id} on {name}: {:?}", status.last_error);
        let ledger = world.ledger(&id.to_string()).await;
        assert_eq!(ledger[..4], ["book", "charge", "confirm", "announce"], "{id} on {name}");
    }
}

/// A saga waits if no running build has its plan, and operators can see that it waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn saga_of_an_unknown_plan_waits_visibly_for_a_build_with_it() {
    fn quick() -> Plan {
        plan!(Duration::from_millis(200), 1_000; "book" @ "hotel", "charge" @ "bank"; "announce" @ "hotel", "thank" @ "hotel")
    }
    let world = waits_at_charge(Arc::new(MemoryStore::new()), quick).await;
    let runtime = start(&world, runner(first()), &ALL).await;
    let waits = async || world.status("a").await?.last_error.filter(|error| error.contains("waits for a build"));
    eventually("the status shows that the saga waits", waits).await;
    let letters = DeadLetters::new(world.store.clone()).list("shop.commands").await.unwrap();
    assert!(letters[0].parked.reason.starts_with("waits for a newer build"), "{}", letters[0].parked.reason);
    assert!(letters[0].parked.awaits_build && letters[0].retries_at.is_some());
    runtime.drain(DRAIN).await.unwrap();
    let runtime = start(&world, runner(quick()), &ALL).await;
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce", "thank"]);
    assert_eq!(documents(&world.store, "parked.shop.commands").await, []);
    runtime.drain(DRAIN).await.unwrap();
}

/// The older build receives the reply to a saga with the newer plan and parks that reply. The newer build handles the
/// reply without waiting for the older build to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reply_parked_by_an_older_build_is_handled_by_a_newer_build_at_once() {
    fn newer() -> Plan {
        plan!(PATIENT, 3; "book" @ "hotel", "charge" @ "bank"; "announce" @ "hotel", "thank" @ "hotel")
    }
    let world = waits_at_charge(Arc::new(MemoryStore::new()), newer).await;
    let build = async |instance: &str, plan: Plan, bus: Arc<LocalBus>, names: &[&str]| {
        let mut runtime = Runtime::shared(instance);
        let services = services(&world, &world.store, runner(plan), names);
        runtime.start(services, bus).await.unwrap();
        runtime
    };
    // The newer build has its own bus and no bank, so every reply of the bank goes to the older build.
    let newer_build = build("newer", newer(), Arc::default(), &["shop"]).await;
    let older_build = build("older", first(), world.bus.clone(), &ALL).await;
    let moved = async || world.status("a").await.filter(|status| status.step != "charge").map(drop);
    eventually("the newer build takes the reply", moved).await;
    let works = async || older_build.health().is_working().then_some(());
    eventually("the older build works", works).await;
    drop((newer_build, older_build));
}

/// The tally events of the next build.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "tally")]
enum NewerTally {
    Added { amount: i64 },
    Rounded {},
}

/// Follows tallies with the event enum `E` of one build, and records what it has read.
struct Follower<E>(std::marker::PhantomData<fn() -> E>);

#[async_trait]
impl<E: Event + std::fmt::Debug> Handler for Follower<E> {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(event) = message.decode::<E>()? else { return Ok(()) };
        let key = annals::DocumentKey::new("followed", &*message.subject);
        let mut all: Vec<String> = work.document(&key).await?.unwrap_or_default();
        all.push(format!("{event:?}"));
        work.put(&key, &all)?;
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_event_waits_for_a_build_that_knows_it() {
    use annals_tests::tally::TallyEvent;
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let old = || Subscription::new("follower", Follower::<TallyEvent>(std::marker::PhantomData)).query(tallies());
    let new = || Subscription::new("follower", Follower::<NewerTally>(std::marker::PhantomData)).query(tallies());
    let run = async |subscription: Subscription| {
        let mut runtime = Runtime::new();
        let service = Service::new("shop", store.clone()).subscribe(subscription);
        runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
        runtime
    };
    let runtime = run(old()).await;
    let tallies = annals::Repository::<Tally>::new(store.clone());
    let add = async |id: &str, amount| {
        tallies.execute(id, TallyCommand::Add(amount), Uuid::new_v4()).await.unwrap();
    };
    add("x", 1).await;
    append(&store, "tally-x", 1, &NewerTally::Rounded {}).await;
    let letters = async || DeadLetters::new(store.clone()).list("follower").await.unwrap();
    let letter = eventually("the message waits", async || letters().await.pop()).await;
    assert!(letter.parked.reason.starts_with("waits for a newer build: "), "{}", letter.parked.reason);
    assert!(letter.retries_at.is_some());
    // A command on the stream of tally `x` fails with an error, and nothing is written.
    let outdated = annals::Repository::<Tally>::new(store.clone());
    let refused = outdated.execute("x", TallyCommand::Add(2), Uuid::new_v4()).await;
    assert!(matches!(refused, Err(annals::ExecuteError::Undecodable(_))), "{refused:?}");
    // Messages of another key are handled. A later message of the same key waits behind the parked message.
    append(&store, "tally-x", 2, &NewerTally::Added { amount: 3 }).await;
    add("y", 1).await;
    let followed = async |id: &str| {
        let body = document(&store, &annals::DocumentKey::new("followed", id)).await?;
        serde_json::from_str::<Vec<String>>(&body).ok()
    };
    eventually("the other key goes on", async || followed("tally-y").await).await;
    assert_eq!(followed("tally-x").await.unwrap().len(), 1);
    runtime.drain(DRAIN).await.unwrap();
    let runtime = run(new()).await;
    let all = eventually("all events are read", async || followed("tally-x").await.filter(|all| all.len() == 3)).await;
    assert_eq!(all, ["Added { amount: 1 }", "Rounded", "Added { amount: 3 }"]);
    eventually("nothing waits", async || letters().await.is_empty().then_some(())).await;
    runtime.drain(DRAIN).await.unwrap();
}

async fn append(store: &Arc<dyn EventStore>, stream: &str, expected: i64, event: &NewerTally) {
    let event = annals::NewEvent {
        id: Uuid::new_v4(),
        type_name: event.type_name().into(),
        schema_version: 1,
        data: event.encode().unwrap(),
        metadata: annals::Metadata::default(),
    };
    let stream = annals::StreamId::parse(stream).unwrap();
    let append =
        annals::Append { stream, expected: annals::Expected::Version(annals::Version(expected)), events: vec![event] };
    store.commit(annals::Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
}

/// A saga waits for a command that only the next build of the bank can handle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_of_the_next_build_runs_after_its_deployment() {
    #[derive(Event, Clone, Debug, PartialEq)]
    #[event(prefix = "act")]
    enum Newer {
        Insure { trip: String },
    }
    struct NewBank;
    #[async_trait]
    impl Participant for NewBank {
        type Command = Newer;
        async fn perform(&self, _: Newer, _: &mut Work) -> Result<Answer, StepError> {
            Ok(Answer::DONE)
        }
    }
    fn plan() -> Plan {
        Saga::<Trip>::named("trip")
            .compensatable("book", |trip| ask("hotel", "book", trip))
            .undo(|trip| take_back("hotel", "book", trip))
            .pivot("insure", |trip| StepRequest::to("bank", &Newer::Insure { trip: trip.id.clone() }))
            .attempts(2)
            .build()
    }
    let world = World::new(Arc::new(MemoryStore::new()), plan());
    let runtime = start(&world, runner(plan()), &ALL).await;
    world.request("a", Uuid::new_v4(), None).await;
    let status = world.becomes("a", Status::Stuck).await;
    assert!(status.last_error.unwrap().contains("deploy a build of bank that knows it"));
    runtime.drain(DRAIN).await.unwrap();
    let mut services = services(&world, &world.store, runner(plan()), &["shop", "hotel"]);
    services.push(Service::new("bank", world.store.clone()).participant(NewBank));
    let mut runtime = Runtime::new();
    runtime.start(services, world.bus.clone()).await.unwrap();
    world.act("a", OperatorAction::Retry, "deployed").await;
    world.becomes("a", Status::Completed).await;
    runtime.drain(DRAIN).await.unwrap();
}
