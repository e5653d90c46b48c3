//! Actions of operators take effect on running services. The log records each action with its operator and reason.
#![allow(clippy::unwrap_used)]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use annals::{
    Append, Commit, DocumentKey, Event, EventStore, Expected, Handler, HandlerError, Health, LogQuery, MemoryStore,
    Message, NewEvent, Operator, Position, Put, StreamId, Subscription, Version, Work,
    health::State,
    operator::{OperatorError, OperatorEvent},
    saga::{OperatorAction, Outcome, Reply, SagaEvent, Status},
};
use annals_conformance::bus::within;
use annals_tests::{
    tally::{TallyEvent, add, documents, eventually},
    trip::{Play, World, trip},
};
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The amounts that were handled, in order.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<i64>>>);

#[async_trait]
impl Handler for Seen {
    async fn handle(&self, message: &Message, _: &mut Work) -> Result<(), HandlerError> {
        if let Some(TallyEvent::Added { amount }) = message.decode()? {
            self.0.lock().unwrap().push(amount);
        }
        Ok(())
    }
}

impl Seen {
    async fn is(&self, amounts: &[i64]) {
        eventually(&format!("{amounts:?} are seen"), async || (*self.0.lock().unwrap() == amounts).then_some(())).await;
    }
}

/// Returns the actions on a subscription: type, operator, reason.
async fn acts(store: &Arc<dyn EventStore>, subscription: &str) -> Vec<(String, String, String)> {
    let stream = StreamId::new(annals::operator::CATEGORY, subscription).unwrap();
    let events = store.read_stream(&stream, Version::START, 100).await.unwrap();
    let of = |data: &str| {
        let data: serde_json::Value = serde_json::from_str(data).unwrap();
        (data["by"].as_str().unwrap().to_owned(), data["reason"].as_str().unwrap().to_owned())
    };
    let recorded = events.iter().map(|event| (event.type_name.to_string(), of(&event.data)));
    recorded.map(|(type_name, (by, reason))| (type_name, by, reason)).collect()
}

#[tokio::test]
async fn a_subscription_is_paused_resumed_and_reset_while_it_runs() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let seen = Seen::default();
    let health = Health::default();
    let shutdown = CancellationToken::new();
    let subscription = Subscription::new("seen", seen.clone()).query(LogQuery::categories(["tally"])).lanes(2);
    let running = tokio::spawn(subscription.run(store.clone(), health.clone(), shutdown.clone()));
    add(&store, "a", [1, 2]).await;
    seen.is(&[1, 2]).await;
    let both = async || (documents(&store, "checkpoint").await.len() == 2).then_some(());
    eventually("the lane without events has a checkpoint as well", both).await;

    let operator = Operator::new(store.clone(), "ann");
    operator.pause("seen", true, "the map is being redrawn").await.unwrap();
    for lane in ["seen/0", "seen/1"] {
        let paused = State::Elsewhere("an operator has paused the subscription".into());
        eventually("the lanes stop", async || (health.parts().get(lane) == Some(&paused)).then_some(())).await;
    }
    add(&store, "a", [3]).await;
    let error = operator.pause("seen", true, "again").await;
    assert!(matches!(error, Err(OperatorError::Illegal(_))), "{error:?}");
    assert_eq!(*seen.0.lock().unwrap(), [1, 2]);
    operator.pause("seen", false, "it is drawn").await.unwrap();
    seen.is(&[1, 2, 3]).await;

    operator.reset("seen", Position(1), "the second one was wrong").await.unwrap();
    seen.is(&[1, 2, 3, 2, 3]).await;
    let error = operator.reset("seen", Position(1_000), "beyond").await;
    assert!(matches!(error, Err(OperatorError::Illegal(_))), "{error:?}");
    let error = operator.reset("unseen", Position(0), "nobody").await;
    assert!(matches!(error, Err(OperatorError::Illegal(_))), "{error:?}");
    let expected = [
        ("operator.paused", "ann", "the map is being redrawn"),
        ("operator.resumed", "ann", "it is drawn"),
        ("operator.reset", "ann", "the second one was wrong"),
    ];
    let recorded = acts(&store, "seen").await;
    let recorded: Vec<_> = recorded.iter().map(|(kind, by, reason)| (&**kind, &**by, &**reason)).collect();
    assert_eq!(recorded, expected);
    let stream = StreamId::new(annals::operator::CATEGORY, "seen").unwrap();
    let reset = store.read_stream(&stream, Version(2), 1).await.unwrap().remove(0);
    let Ok(Some(OperatorEvent::Reset { from, to, .. })) = reset.decode() else { panic!("{reset:?}") };
    assert_eq!((to, from.keys().map(String::as_str).collect::<Vec<_>>()), (Position(1), vec!["seen/0", "seen/1"]));
    shutdown.cancel();
    within("stop", running).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_paused_subscription_ends_with_its_service_and_stays_paused() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let start = || {
        let seen = Seen::default();
        let shutdown = CancellationToken::new();
        let health = Health::default();
        let running = Subscription::new("seen", seen.clone()).run(store.clone(), health.clone(), shutdown.clone());
        (seen, health, shutdown, tokio::spawn(running))
    };
    let (seen, _, shutdown, running) = start();
    add(&store, "a", [1]).await;
    seen.is(&[1]).await;
    shutdown.cancel();
    within("stop", running).await.unwrap().unwrap();
    Operator::new(store.clone(), "ann").pause("seen", true, "not today").await.unwrap();
    add(&store, "a", [2]).await;
    let (seen, health, shutdown, running) = start();
    let paused = State::Elsewhere("an operator has paused the subscription".into());
    eventually("the subscription is paused", async || (health.parts().get("seen/0") == Some(&paused)).then_some(()))
        .await;
    shutdown.cancel();
    within("stop", running).await.unwrap().unwrap();
    assert_eq!(*seen.0.lock().unwrap(), [0; 0]);
}

#[tokio::test]
async fn saga_executes_operator_requests_or_gives_the_reason() {
    let world = World::new(Arc::new(MemoryStore::new()), trip(Duration::from_secs(20), 2));
    let runtime = world.start(&["shop", "hotel", "bank"]).await;
    world.script.play("announce", Play::Fail, 2);
    world.request("t", Uuid::new_v4(), None).await;
    world.becomes("t", Status::Stuck).await;

    let operator = Operator::new(world.store.clone(), "ann");
    let stream = StreamId::from_stored("saga.trip-t");
    let declined = world.act("t", OperatorAction::Compensate, "let us go home").await;
    let SagaEvent::Declined { verb, by, why, .. } = declined else { panic!("{declined:?}") };
    assert_eq!((verb, &*by), (OperatorAction::Compensate, "ann"));
    assert!(why.contains("only goes forward"), "{why}");

    let operated = world.act("t", OperatorAction::Retry, "the phone works again").await;
    let SagaEvent::Operated { verb, by, reason, .. } = operated else { panic!("{operated:?}") };
    assert_eq!((verb, &*by, &*reason), (OperatorAction::Retry, "ann", "the phone works again"));
    world.becomes("t", Status::Completed).await;
    let error = operator.ask(&stream, OperatorAction::Retry, "once more").await;
    assert!(matches!(error, Err(OperatorError::Illegal(_))), "{error:?}");
    let error = operator.ask(&StreamId::from_stored("saga.trip-none"), OperatorAction::Retry, "who").await;
    assert!(matches!(error, Err(OperatorError::Illegal(_))), "{error:?}");
    runtime.drain(Duration::from_secs(20)).await.unwrap();
}

/// Returns a world in which saga `t` is stuck at the step "announce" and no service runs.
async fn stuck_and_stopped() -> World {
    let world = World::new(Arc::new(MemoryStore::new()), trip(Duration::from_secs(20), 1));
    let runtime = world.start(&["shop", "hotel", "bank"]).await;
    world.script.play("announce", Play::Fail, 1);
    world.request("t", Uuid::new_v4(), None).await;
    world.becomes("t", Status::Stuck).await;
    runtime.drain(Duration::from_secs(20)).await.unwrap();
    world
}

#[tokio::test]
async fn request_waits_for_a_service_and_abandoned_saga_has_no_timer() {
    let world = stuck_and_stopped().await;
    let operator = Operator::new(world.store.clone(), "ann");
    let stream = StreamId::from_stored("saga.trip-t");
    operator.ask(&stream, OperatorAction::Abandon, "the guest has died").await.unwrap();
    let twice = operator.ask(&stream, OperatorAction::Retry, "no, wait").await;
    assert!(matches!(twice, Err(OperatorError::Illegal(_))), "{twice:?}");
    let runtime = world.start(&["shop", "hotel", "bank"]).await;
    let ended = async || world.status("t").await.filter(|status| status.ended_at.is_some());
    eventually("the saga is abandoned", ended).await;
    runtime.drain(Duration::from_secs(20)).await.unwrap();
    let key = DocumentKey::new("saga.trip", "t");
    let document = world.store.documents(&[key]).await.unwrap().remove(0).unwrap();
    assert_eq!(document.due, None);
    let types: Vec<_> = world.history("t").await.iter().map(|event| event.type_name.to_string()).collect();
    assert_eq!(types[types.len() - 2..], ["saga.requested", "saga.operated"]);
    let requested = world.history("t").await.into_iter().find(|event| &*event.type_name == "saga.requested").unwrap();
    assert_eq!(requested.metadata.actor.as_ref().map(annals::event::Party::as_str), Some("ann"));
    assert!(SagaEvent::TYPES.iter().any(|known| known.name == "saga.declined"));
}

#[tokio::test]
async fn request_outlives_a_late_reply() {
    let world = stuck_and_stopped().await;
    let operator = Operator::new(world.store.clone(), "ann");
    let stream = StreamId::from_stored("saga.trip-t");
    let request = operator.ask(&stream, OperatorAction::SkipStep, "the guest was informed").await.unwrap();
    // A late reply, as recorded by an instance that does not carry out the request.
    let requested = world.history("t").await.into_iter().next_back().unwrap();
    let progress = requested.decode::<SagaEvent>().unwrap().unwrap().progress().clone();
    let reply = Reply { at: progress.at, call: 0, attempt: 1, outcome: Outcome::Failed("late".to_owned()) };
    let late = SagaEvent::Replied { reply, gave_up: None, fault: None, progress, send: Vec::new() };
    let event = NewEvent {
        id: Uuid::new_v4(),
        type_name: late.type_name().into(),
        schema_version: late.schema_version(),
        data: late.encode().unwrap(),
        metadata: requested.metadata,
    };
    let append = Append { stream: stream.clone(), expected: Expected::Version(request), events: vec![event] };
    world.store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();

    let twice = operator.ask(&stream, OperatorAction::Retry, "no, wait").await;
    assert!(matches!(twice, Err(OperatorError::Illegal(_))), "{twice:?}");
    let runtime = world.start(&["shop", "hotel", "bank"]).await;
    world.becomes("t", Status::Completed).await;
    let answer = operator.answer(&stream, request).await.unwrap();
    assert!(matches!(answer, SagaEvent::Operated { verb: OperatorAction::SkipStep, .. }), "{answer:?}");
    runtime.drain(Duration::from_secs(20)).await.unwrap();
}

/// A dead letter may be larger than an event. The record of the drop then contains the size instead of the message.
#[tokio::test]
async fn dead_letter_larger_than_an_event_is_dropped() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    for (id, bytes) in [("small", 1_000), ("large", 1_500_000)] {
        let body = format!(
            r#"{{"subscription":"tally","lane":"tally/0","key":"{id}","reason":"not JSON","attempts":1,
                "parked_at":"2026-01-01T00:00:00Z","position":1,"message":{{"raw":"{}"}}}}"#,
            "0".repeat(bytes)
        );
        let put = Put { key: DocumentKey::new("parked.tally", id), expected: None, body: Some(body.into()), due: None };
        store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await.unwrap();
    }
    let operator = Operator::new(store.clone(), "ann");
    for id in ["small", "large"] {
        assert_eq!(operator.drop_first("tally", id, "poison").await.unwrap().unwrap().key.as_ref(), id);
        assert_eq!(store.documents(&[DocumentKey::new("parked.tally", id)]).await.unwrap(), [None]);
    }
    let stream = StreamId::new(annals::operator::CATEGORY, "tally").unwrap();
    let events = store.read_stream(&stream, Version::START, 10).await.unwrap();
    let recorded = |event: usize| serde_json::from_str::<serde_json::Value>(&events[event].data).unwrap();
    assert_eq!(recorded(0)["parked"]["message"]["raw"].as_str().unwrap().len(), 1_000);
    assert!(recorded(1)["parked"]["message"]["bytes"].as_u64() > Some(1_500_000), "{}", recorded(1));
    assert_eq!(recorded(1)["parked"]["reason"], "not JSON");
}
