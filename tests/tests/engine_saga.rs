//! Tests sagas over several services from start to end. The sagas are completed, compensated, retried or stuck.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use annals::{
    Clock, Commit, Event, EventStore, LogQuery, MemoryStore, Message, Metadata, Operator, Position, Publisher,
    Recorded, Saga, StreamId, Version,
    bus::Outgoing,
    operator::OperatorError,
    saga::{BY_ITSELF, OperatorAction, Outcome, Reply, SagaEvent, Status, StepEvent, StepRef, wait_for_end},
};
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{becomes_fine, documents, eventually},
    trip::{Play, Trip, World, ask, take_back, trip},
};
use uuid::Uuid;

const ALL: [&str; 3] = ["shop", "hotel", "bank"];
/// Longer than any test, so that no step times out and is retried.
const PATIENT: Duration = Duration::from_secs(60);
const QUICK: Duration = Duration::from_millis(150);
const DRAIN: Duration = Duration::from_secs(60);

fn world(timeout: Duration, attempts: u32) -> World {
    World::new(Arc::new(MemoryStore::new()), trip(timeout, attempts))
}

async fn no_message_is_parked(world: &World) {
    for service in ALL {
        assert_eq!(documents(&world.store, &format!("parked.{service}.commands")).await, [], "{service}");
    }
}

#[tokio::test]
async fn saga_runs_to_completion() {
    let world = world(PATIENT, 3);
    let runtime = world.start(&ALL).await;
    for trip in 0..50 {
        world.request(&trip.to_string(), Uuid::new_v4(), None).await;
    }
    for trip in 0..50 {
        let status = world.becomes(&trip.to_string(), Status::Completed).await;
        assert_eq!((status.last_error, status.ended_at.is_some()), (None, true));
        assert_eq!(world.ledger(&trip.to_string()).await, ["book", "charge", "confirm", "announce"]);
    }
    let known = world.sagas().saga("7").await.unwrap().unwrap();
    assert_eq!(known.context().unwrap().heard, ["book done", "charge done", "confirm done", "announce done"]);
    no_message_is_parked(&world).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn saga_runs_to_completion_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    let world = World::new(Arc::new(store.clone()), trip(PATIENT, 3));
    let runtime = world.start(&ALL).await;
    world.script.play("charge", Play::Fail, 1);
    for trip in ["a", "b", "c"] {
        world.request(trip, Uuid::new_v4(), None).await;
    }
    for trip in ["a", "b", "c"] {
        world.becomes(trip, Status::Completed).await;
        assert_eq!(world.ledger(trip).await, ["book", "charge", "confirm", "announce"]);
    }
    runtime.drain(DRAIN).await.unwrap();
    store.close().await.unwrap();
}

/// Returns, for each answer of a participant, whether the commit of the step passed the answer to the saga.
async fn passed(world: &World) -> Vec<bool> {
    let log = world.store.read_log(&LogQuery::all(), Position::START, 1_000).await.unwrap().events;
    let answers = log.iter().filter(|event| *event.type_name == *"step.replied");
    let passed = |answer: &Arc<Recorded>| match answer.decode().unwrap() {
        Some(StepEvent::Replied { passed, .. }) => passed,
        other => panic!("{other:?}"),
    };
    answers.map(passed).collect()
}

/// In one runtime and on one store, the commit of a step also passes the reply to the saga. Otherwise, the relay sends
/// the reply over the bus. The saga records the same events in both cases.
#[tokio::test]
async fn reply_in_the_commit_of_its_step_has_the_effects_of_a_reply_over_the_bus() {
    let request = Uuid::new_v4();
    let mut histories = Vec::new();
    for parts in [vec![&ALL[..]], vec![&["hotel"], &["bank"], &["shop"]]] {
        let world = world(PATIENT, 3);
        world.script.play("confirm", Play::Refuse, 1);
        let mut runtimes = Vec::new();
        for services in &parts {
            runtimes.push(world.start(services).await);
        }
        world.request("a", request, None).await;
        world.becomes("a", Status::Compensated).await;
        assert_eq!(world.ledger("a").await, ["book", "charge", "undo charge", "undo book"]);
        for runtime in runtimes {
            runtime.drain(DRAIN).await.unwrap();
        }
        // Of the five answers, the shop itself gives one, because it also takes part in its own saga.
        let expected = if parts.len() == 1 { [true; 5] } else { [false, false, true, false, false] };
        assert_eq!(passed(&world).await, expected);
        let history = world.history("a").await;
        histories.push(history.iter().map(|event| (event.id, event.metadata.causation_id)).collect::<Vec<_>>());
    }
    assert_eq!(histories[0], histories[1]);
}

/// A step times out while its commit, which also changes the saga, is on the way to the store. The commit fails, and the
/// participant commits the step again, without the saga.
#[tokio::test]
async fn saga_that_changes_during_the_commit_of_a_step_gets_the_reply_over_the_bus() {
    let clock = Clock::by_hand("2026-11-30T12:00:00Z".parse().unwrap());
    let store = FaultyStore::new(Arc::new(MemoryStore::with_clock(clock.clone())));
    let gate = Gate::new();
    let of_bank = |commit: &Commit| commit.appends.iter().any(|append| append.stream.category() == "step.bank");
    store.when(of_bank, Fault::Hold(gate.clone()));
    let world = World::new(Arc::new(store), trip(PATIENT, 3));
    let runtime = world.start(&ALL).await;
    world.request("a", Uuid::new_v4(), None).await;
    gate.reached().await;
    clock.advance(PATIENT);
    let timed_out =
        async || world.history("a").await.iter().any(|event| *event.type_name == *"saga.timed").then_some(());
    eventually("the step times out", timed_out).await;
    gate.open();
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce"]);
    let asked = world.script.asked();
    assert_eq!(asked.iter().filter(|(name, _)| name == "charge").count(), 2, "once more after the failed commit");
    runtime.drain(DRAIN).await.unwrap();
    assert!(passed(&world).await.contains(&false));
}

#[tokio::test]
async fn caller_waits_for_the_end_of_a_saga() {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    let stores: [Arc<dyn EventStore>; 2] = [Arc::new(MemoryStore::new()), Arc::new(sqlite.clone())];
    for store in stores {
        let world = World::new(store, trip(PATIENT, 1));
        let sagas = world.sagas();
        let late = sagas.wait_for_end("a", QUICK).await.unwrap_err().to_string();
        assert!(late.contains("saga.trip-a") && late.contains("it has not started"), "{late}");
        world.script.play("confirm", Play::Refuse, 1);
        // The bank starts and stops once, so the bus holds later messages to the bank.
        world.start(&["bank"]).await.drain(DRAIN).await.unwrap();
        let runtime = world.start(&["shop", "hotel"]).await;
        world.request("a", Uuid::new_v4(), None).await;
        world.script.asked_for("book", 1).await;
        // The bank does not run yet.
        let late = sagas.wait_for_end("a", QUICK).await.unwrap_err().to_string();
        assert!(late.contains("it is Running at step"), "{late}");
        let waiting = tokio::spawn({
            let sagas = sagas.clone();
            async move { sagas.wait_for_end("a", PATIENT).await }
        });
        let bank = world.start(&["bank"]).await;
        let ended = waiting.await.unwrap().unwrap();
        assert_eq!(ended.status, Status::Compensated);
        world.request("b", Uuid::new_v4(), None).await;
        let stream = annals::StreamId::new("saga.trip", "b").unwrap();
        assert_eq!(wait_for_end(&*world.store, &stream, PATIENT).await.unwrap().status, Status::Completed);
        // The end of a saga is found at once, no matter how long ago the saga ended.
        assert_eq!(sagas.wait_for_end("a", Duration::ZERO).await.unwrap().status, Status::Compensated);
        runtime.drain(DRAIN).await.unwrap();
        bank.drain(DRAIN).await.unwrap();
    }
    sqlite.close().await.unwrap();
}

#[tokio::test]
async fn refusal_compensates_in_reverse_order_and_once() {
    for (refused, done) in [
        ("book", vec![]),
        ("charge", vec!["book", "undo book"]),
        ("confirm", vec!["book", "charge", "undo charge", "undo book"]),
    ] {
        let world = world(PATIENT, 3);
        let runtime = world.start(&ALL).await;
        world.script.play(refused, Play::Refuse, 1);
        world.request("a", Uuid::new_v4(), None).await;
        let status = world.becomes("a", Status::Compensated).await;
        assert_eq!(status.last_error.unwrap(), format!("{refused}: no {refused} today"));
        assert_eq!(world.ledger("a").await, done, "{refused}");
        no_message_is_parked(&world).await;
        runtime.drain(DRAIN).await.unwrap();
    }
}

#[tokio::test]
async fn failed_steps_are_retried_under_one_id() {
    let world = world(PATIENT, 4);
    let runtime = world.start(&ALL).await;
    world.script.play("charge", Play::Fail, 2).play("announce", Play::Panic, 2).play("confirm", Play::Fail, 1);
    world.request("a", Uuid::new_v4(), None).await;
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce"]);
    let asked = world.script.asked();
    for (step, times) in [("book", 1), ("charge", 3), ("confirm", 2), ("announce", 3)] {
        let ids: Vec<Uuid> = asked.iter().filter(|(asked, _)| asked == step).map(|(_, id)| *id).collect();
        assert_eq!((ids.len(), ids.iter().collect::<HashSet<_>>().len()), (times, 1), "{step}");
    }
    no_message_is_parked(&world).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn step_that_keeps_failing_is_compensated() {
    let world = world(PATIENT, 2);
    let runtime = world.start(&ALL).await;
    world.script.play("charge", Play::Panic, u32::MAX);
    world.request("a", Uuid::new_v4(), None).await;
    let status = world.becomes("a", Status::Compensated).await;
    assert_eq!(status.last_error.unwrap(), "charge: panicked: charge is too much");
    // The charge may have happened before the panic.
    assert_eq!(world.ledger("a").await, ["book", "undo charge", "undo book"]);
    world.script.play("charge", Play::Fail, u32::MAX);
    world.request("b", Uuid::new_v4(), None).await;
    world.becomes("b", Status::Compensated).await;
    assert_eq!(world.ledger("b").await, ["book", "undo book"]);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn unavailable_participant_is_retried_until_it_answers() {
    let world = world(QUICK, 100);
    let runtime = world.start(&["shop", "hotel"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    eventually("the participant was asked three times", async || {
        world.status("a").await.filter(|status| status.step == "charge" && status.attempts >= 3)
    })
    .await;
    let bank = world.start(&["bank"]).await;
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce"]);
    bank.drain(DRAIN).await.unwrap();
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn step_that_arrives_after_its_undo_is_refused() {
    let world = world(QUICK, 2);
    // From here on, the bus holds the messages to the bank, but no member receives them.
    let bank = world.start(&["bank"]).await;
    bank.drain(DRAIN).await.unwrap();
    let runtime = world.start(&["shop", "hotel"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    eventually("the charge is given up", async || {
        world.status("a").await.filter(|status| status.status == Status::Compensating)
    })
    .await;
    // The bank now receives both attempts, and then the compensation.
    let bank = world.start(&["bank"]).await;
    world.becomes("a", Status::Compensated).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "undo charge", "undo book"]);
    bank.drain(DRAIN).await.unwrap();
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn deadline_compensates_and_ends_at_the_pivot() {
    let plan = |deadline| {
        Saga::named("trip")
            .deadline(deadline)
            .compensatable("book", |trip| ask("hotel", "book", trip))
            .undo(|trip| take_back("hotel", "book", trip))
            .compensatable("charge", |trip| ask("bank", "charge", trip))
            .undo(|trip| take_back("bank", "charge", trip))
            .attempts(100)
            .pivot("confirm", |trip| ask("shop", "confirm", trip))
            .retriable("announce", |trip| ask("hotel", "announce", trip))
            .attempts(100)
            .build()
    };
    let world = World::new(Arc::new(MemoryStore::new()), plan(Duration::from_millis(700)));
    let runtime = world.start(&ALL).await;
    world.script.play("charge", Play::Fail, u32::MAX);
    world.request("late", Uuid::new_v4(), None).await;
    let status = world.becomes("late", Status::Compensated).await;
    assert_eq!(status.last_error.unwrap(), "charge: deadline");
    assert_eq!(world.ledger("late").await, ["book", "undo book"]);
    world.script.behave();
    world.script.play("announce", Play::Fail, 3);
    world.request("in time", Uuid::new_v4(), None).await;
    world.becomes("in time", Status::Completed).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn silent_participant_is_named() {
    let world = world(Duration::from_millis(50), u32::MAX);
    let runtime = world.start(&["shop", "hotel"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    let error = async || world.status("a").await.and_then(|status| status.last_error);
    let error = eventually("the status shows the timeout during the retries", error).await;
    assert_eq!(error, "charge: timeout: no answer from bank within 50ms");
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn failing_undo_makes_the_saga_visibly_stuck() {
    let world = world(PATIENT, 2);
    let runtime = world.start(&ALL).await;
    world.script.play("confirm", Play::Refuse, 1).play("undo charge", Play::Fail, 2);
    world.request("a", Uuid::new_v4(), None).await;
    let status = world.becomes("a", Status::Stuck).await;
    assert_eq!((&*status.step, status.ended_at), ("charge", None));
    let both = "charge: undo charge does not work; the saga goes back because of confirm: no confirm today";
    assert_eq!(status.last_error.unwrap(), both);
    let declined = world.act("a", OperatorAction::Compensate, "it cannot").await;
    assert!(matches!(declined, SagaEvent::Declined { .. }), "{declined:?}");
    world.act("a", OperatorAction::Retry, "the bank is back").await;
    let status = world.becomes("a", Status::Compensated).await;
    assert_eq!(status.last_error.unwrap(), "confirm: no confirm today");
    assert_eq!(world.ledger("a").await, ["book", "charge", "undo charge", "undo book"]);
    let operated = world.history("a").await.into_iter().find(|event| &*event.type_name == "saga.operated").unwrap();
    assert!(operated.data.contains("ann") && operated.data.contains("the bank is back"));
    let operator = Operator::new(world.store.clone(), "ann");
    let again = operator.ask(&StreamId::from_stored("saga.trip-a"), OperatorAction::Retry, "again").await;
    assert!(matches!(again, Err(OperatorError::Illegal(_))), "{again:?}");
    runtime.drain(DRAIN).await.unwrap();
}

/// A plan in which the pivot waits for the bank, which is silent.
fn silent_pivot() -> Saga<Trip> {
    Saga::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("hotel", "book", trip))
        .timeout(PATIENT)
        .pivot("confirm", |trip| ask("bank", "confirm", trip))
        .timeout(Duration::from_millis(50))
        .attempts(2)
        .retriable("announce", |trip| ask("hotel", "announce", trip))
        .timeout(PATIENT)
        .build()
}

/// A plan in which an undo waits for the bank, which is silent.
fn silent_undo() -> Saga<Trip> {
    Saga::named("trip")
        .compensatable("book", |trip| ask("hotel", "book", trip))
        .undo(|trip| take_back("bank", "book", trip))
        .timeout(Duration::from_millis(500))
        .attempts(2)
        .pivot("confirm", |trip| ask("hotel", "confirm", trip))
        .timeout(PATIENT)
        .build()
}

/// Sends an answer to the saga as the relay of the bank would.
async fn answer_late(world: &World, at: StepRef, outcome: Outcome) {
    let saga = "saga.trip-a";
    let reply = Reply { at, call: 0, attempt: 2, outcome };
    let replied = StepEvent::Replied { saga: saga.into(), reply_to: "shop".into(), reply, passed: false };
    let message = Message {
        id: Uuid::new_v4(),
        type_name: replied.type_name().into(),
        schema_version: replied.schema_version(),
        source: "bank".into(),
        subject: format!("step.bank-{saga}").into(),
        key: saga.into(),
        data: replied.encode().unwrap().into(),
        metadata: Metadata::of_request(Uuid::new_v4()),
        time: chrono::Utc::now(),
        position: Position(1),
        version: Version(1),
        lane: None,
        extensions: BTreeMap::new(),
    };
    let receipt = world.bus.publish(vec![Outgoing { topic: "shop.commands".into(), message }]).await.unwrap();
    receipt.await.unwrap();
}

#[tokio::test]
async fn late_answer_frees_a_stuck_saga() {
    type Case = (fn() -> Saga<Trip>, StepRef, Outcome, Status, &'static [&'static str]);
    let done = || Outcome::Done(serde_json::Value::Null);
    let cases: [Case; 3] = [
        (silent_pivot, StepRef::Forward(1), done(), Status::Completed, &["book", "announce"]),
        (silent_pivot, StepRef::Forward(1), Outcome::Refused("no".into()), Status::Compensated, &["book", "undo book"]),
        (silent_undo, StepRef::Undo(0), done(), Status::Compensated, &["book"]),
    ];
    for (number, (plan, at, outcome, end, ledger)) in cases.into_iter().enumerate() {
        let world = World::new(Arc::new(MemoryStore::new()), plan());
        let runtime = world.start(&["shop", "hotel"]).await;
        let health = runtime.health();
        if let StepRef::Undo(_) = at {
            world.script.play("confirm", Play::Refuse, 1);
        }
        world.request("a", Uuid::new_v4(), None).await;
        let stuck = world.becomes("a", Status::Stuck).await;
        assert_eq!((stuck.attempts, stuck.ended_at), (2, None), "{at}");
        // Health looks for stuck sagas only every two seconds, so only the first case waits for health.
        if number == 0 {
            eventually("health says so", async || (!health.is_fine()).then_some(())).await;
        }
        answer_late(&world, at, outcome).await;
        let status = world.becomes("a", end).await;
        assert!(status.ended_at.is_some(), "{at}: {status:?}");
        assert_eq!(world.ledger("a").await, ledger, "{at}");
        let history = world.history("a").await;
        let mut operated = history.iter().filter(|event| &*event.type_name == "saga.operated");
        assert!(operated.next().is_some_and(|event| event.data.contains(BY_ITSELF)), "{at}");
        assert!(operated.next().is_none(), "{at}");
        if number == 0 {
            becomes_fine(&health).await;
        }
        no_message_is_parked(&world).await;
        runtime.drain(DRAIN).await.unwrap();
    }
}

/// An operator's request and the late answer wait together until the service starts. Both take effect.
#[tokio::test]
async fn late_answer_does_not_hide_an_operators_request() {
    for verb in [OperatorAction::Retry, OperatorAction::SkipStep] {
        let world = World::new(Arc::new(MemoryStore::new()), silent_pivot());
        let runtime = world.start(&["shop", "hotel"]).await;
        world.request("a", Uuid::new_v4(), None).await;
        world.becomes("a", Status::Stuck).await;
        runtime.drain(DRAIN).await.unwrap();
        let operator = Operator::new(world.store.clone(), "ann");
        let saga = StreamId::from_stored("saga.trip-a");
        operator.ask(&saga, verb, "the bank has called").await.unwrap();
        let answered = tokio::spawn({
            let world = World { bus: world.bus.clone(), ..World::new(world.store.clone(), silent_pivot()) };
            async move { answer_late(&world, StepRef::Forward(1), Outcome::Done(serde_json::Value::Null)).await }
        });
        let runtime = world.start(&["shop", "hotel"]).await;
        world.becomes("a", Status::Completed).await;
        answered.await.unwrap();
        assert_eq!(world.ledger("a").await, ["book", "announce"], "{verb:?}");
        let history = world.history("a").await;
        let mut operated = history.iter().filter(|event| &*event.type_name == "saga.operated");
        assert!(operated.any(|event| event.data.contains("ann")), "{verb:?}");
        runtime.drain(DRAIN).await.unwrap();
    }
}

#[tokio::test]
async fn late_failure_leaves_a_saga_stuck() {
    let world = World::new(Arc::new(MemoryStore::new()), silent_pivot());
    let runtime = world.start(&["shop", "hotel"]).await;
    world.request("a", Uuid::new_v4(), None).await;
    world.becomes("a", Status::Stuck).await;
    answer_late(&world, StepRef::Forward(1), Outcome::Failed("no line".into())).await;
    let history = world.history("a").await;
    let last = history.last().unwrap();
    assert!(&*last.type_name == "saga.replied" && last.data.contains("\"stuck\""), "{last:?}");
    world.act("a", OperatorAction::SkipStep, "done by hand").await;
    world.becomes("a", Status::Completed).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn stuck_saga_blocks_no_other() {
    let world = world(PATIENT, 1);
    let runtime = world.start(&ALL).await;
    world.script.play("announce", Play::Fail, 1);
    world.request("a", Uuid::new_v4(), None).await;
    world.becomes("a", Status::Stuck).await;
    world.request("b", Uuid::new_v4(), None).await;
    world.becomes("b", Status::Completed).await;
    world.act("a", OperatorAction::SkipStep, "the guest was informed").await;
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm"]);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn correlation_and_trace_reach_the_last_event() {
    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let request = Uuid::new_v4();
    // Even on a busy machine, this is long enough to see the second attempt before the third one fails.
    let world = world(Duration::from_secs(2), 3);
    let runtime = world.start(&["shop", "hotel"]).await;
    world.script.play("announce", Play::Fail, 3);
    world.request("a", request, Some(traceparent)).await;
    // The trace must survive a timeout, a retry, and an operator's action.
    eventually("a timer fired", async || world.status("a").await.filter(|status| status.attempts >= 2)).await;
    let bank = world.start(&["bank"]).await;
    world.becomes("a", Status::Stuck).await;
    world.act("a", OperatorAction::Retry, "once more").await;
    world.becomes("a", Status::Completed).await;
    let history = world.history("a").await;
    assert!(history.iter().any(|event| &*event.type_name == "saga.timed"));
    let ids: HashSet<Uuid> = history.iter().map(|event| event.id).collect();
    assert_eq!(ids.len(), history.len());
    for event in annals_tests::tally::log(&world.store).await {
        let metadata = &event.metadata;
        assert_eq!(metadata.correlation_id, request, "{} of {}", event.type_name, event.stream);
        assert_eq!(
            metadata.trace.as_ref().map(|trace| trace.traceparent()),
            Some(traceparent),
            "{} of {}",
            event.type_name,
            event.stream
        );
    }
    bank.drain(DRAIN).await.unwrap();
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn repeated_request_starts_one_saga() {
    let world = world(PATIENT, 3);
    let runtime = world.start(&ALL).await;
    let request = Uuid::new_v4();
    world.request("a", request, None).await;
    world.request("a", request, None).await;
    // A second request with the same saga id finds the existing saga.
    world.request("a", Uuid::new_v4(), None).await;
    world.becomes("a", Status::Completed).await;
    world.request("a", Uuid::new_v4(), None).await;
    world.request("b", Uuid::new_v4(), None).await;
    world.becomes("b", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["book", "charge", "confirm", "announce"]);
    let started = world.history("a").await.into_iter().filter(|event| &*event.type_name == "saga.started");
    assert_eq!(started.count(), 1);
    let store: Arc<dyn EventStore> = world.store.clone();
    assert_eq!(documents(&store, "parked.shop.trip.start").await, []);
    runtime.drain(DRAIN).await.unwrap();
}
