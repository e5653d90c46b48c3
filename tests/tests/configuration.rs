//! A mistake in a name is detected when the name is given or when the services start, before anything is written. Other
//! mistakes are reported after a while, in a message that contains the name.
#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use annals::{
    Aggregate, Event, EventStore, Group, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message, NameError,
    Position, Publisher, Repository, Runtime, Saga, Service, StartError, Subscription, Work, bus::Outgoing,
    health::State, saga::Runner,
};
use annals_conformance::bus::message;
use annals_tests::{
    tally::{Tally, TallyEvent, add, documents, eventually},
    trip::{Clerk, Script, Trip, ask, starts, tallies},
};
use async_trait::async_trait;

const DRAIN: Duration = Duration::from_secs(60);

fn store() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

/// Returns the message of a panic.
fn panics<T>(code: impl FnOnce() -> T) -> String {
    let panic = std::panic::catch_unwind(AssertUnwindSafe(code)).err().expect("the call did not panic");
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

fn plan(name: &'static str) -> Saga<Trip> {
    Saga::named(name).pivot("confirm", |trip: &Trip| ask("shop", "confirm", trip)).build()
}

#[test]
fn invalid_saga_names_are_refused_when_the_plan_is_built() {
    for name in ["", "Check Out", "check-out", "übergabe", "a\0b"] {
        let reason = panics(|| plan(name));
        assert!(reason.contains(&format!("saga {name:?} cannot have this name")), "{reason}");
    }
    for name in ["checkout", "check_out.2"] {
        assert_eq!(plan(name).name(), name);
    }
}

#[test]
fn repository_refuses_invalid_and_reserved_categories() {
    for category in ["", "Order", "order-line", "1st", "a b", "saga.checkout", "step.bank", "operator"] {
        let reason = panics(|| Repository::<Tally>::with(store(), category, 10));
        assert!(reason.contains("category") || reason.contains("stream id"), "{category:?}: {reason}");
    }
}

#[derive(Event, Clone, Debug)]
#[event(prefix = "other")]
enum OtherEvent {
    Happened {},
}

#[derive(Clone, Default)]
struct Other;

impl Aggregate for Other {
    const CATEGORY: &'static str = "tally";
    type Command = ();
    type Event = OtherEvent;
    type Refusal = Infallible;
    fn decide(&self, (): &()) -> Result<Vec<OtherEvent>, Infallible> {
        Ok(vec![OtherEvent::Happened {}])
    }
    fn evolve(&mut self, _: &OtherEvent) {}
}

/// The tally of a later build.
#[derive(Clone, Default)]
struct NextTally;

impl Aggregate for NextTally {
    const CATEGORY: &'static str = "tally";
    type Command = ();
    type Event = TallyEvent;
    type Refusal = Infallible;
    fn decide(&self, (): &()) -> Result<Vec<TallyEvent>, Infallible> {
        Ok(Vec::new())
    }
    fn evolve(&mut self, _: &TallyEvent) {}
}

#[test]
fn repository_refuses_two_aggregates_but_not_two_builds_in_one_category() {
    let store = store();
    _ = Repository::<Tally>::new(store.clone());
    _ = Repository::<NextTally>::new(store.clone());
    let reason = panics(|| Repository::<Other>::new(store.clone()));
    assert!(reason.contains("Tally") && reason.contains("Other") && reason.contains("\"tally\""), "{reason}");
    // On another store, the name may be used.
    _ = Repository::<Other>::new(self::store());
}

struct Nothing;

#[async_trait]
impl Handler for Nothing {
    async fn handle(&self, _: &Message, _: &mut Work) -> Result<(), HandlerError> {
        Ok(())
    }
}

async fn refused(store: &Arc<dyn EventStore>, services: Vec<Service>) -> StartError {
    let mut runtime = Runtime::new();
    let error = runtime.start(services, Arc::new(LocalBus::default())).await.expect_err("it started");
    assert_eq!(documents(store, "checkpoint").await, []);
    assert_eq!(store.status().await.unwrap().head, Position::START);
    error
}

#[tokio::test]
async fn invalid_names_of_services_and_categories_are_refused_at_the_start() {
    let store = store();
    let service = |name: &str| Service::new(name, store.clone());
    for name in ["", "order service", "café", "a/b"] {
        let error = refused(&store, vec![service(name)]).await;
        assert!(
            matches!(&error, StartError::Name(NameError::Malformed { kind: "service", name: found, .. }) if found == name),
            "{error}"
        );
    }
    let error = refused(&store, vec![service("Order").participant(Clerk(Script::default()))]).await;
    assert!(matches!(error, StartError::Name(NameError::Malformed { kind: "service", .. })), "{error}");
    for category in ["Order", "order-line", "saga.checkout", "step.bank", "operator", ""] {
        let error = refused(&store, vec![service("order").publish(&[category])]).await;
        assert!(
            matches!(&error, StartError::Name(NameError::Malformed { kind: "published category", name, .. }) if name == category),
            "{error}"
        );
    }
    let follows = Subscription::new("follows", Nothing).query(LogQuery::categories(["Order"]));
    let error = refused(&store, vec![service("order").subscribe(follows)]).await;
    assert!(matches!(error, StartError::Name(NameError::Malformed { kind: "followed category", .. })), "{error}");
}

#[tokio::test]
async fn duplicate_names_of_services_and_sagas_are_refused_at_the_start() {
    let store = store();
    let service = |name: &str| Service::new(name, store.clone());
    let error = refused(&store, vec![service("order"), service("order")]).await;
    assert!(
        matches!(&error, StartError::Name(NameError::Taken { first: "service", name, .. }) if name == "order"),
        "{error}"
    );
    let runner = || Runner::new(plan("checkout"), tallies(), starts);
    let error = refused(&store, vec![service("a").saga(runner()), service("b").saga(runner())]).await;
    assert!(
        matches!(&error, StartError::Name(NameError::Taken { first: "saga", name, .. }) if name == "checkout"),
        "{error}"
    );
    // The conflict is also detected if the services are started one after the other.
    let mut runtime = Runtime::new();
    let bus = Arc::new(LocalBus::default());
    runtime.start(vec![service("order")], bus.clone()).await.unwrap();
    let error = runtime.start(vec![service("order")], bus).await.err().unwrap();
    assert!(matches!(error, StartError::Name(NameError::Taken { .. })), "{error}");
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn step_to_an_impossible_service_fails_with_its_name() {
    let store = store();
    let plan = Saga::named("lost").pivot("confirm", |trip: &Trip| ask("the desk", "confirm", trip)).attempts(1).build();
    let runner = Runner::new(plan, tallies(), starts);
    let mut runtime = Runtime::new();
    runtime.start(vec![Service::new("desk", store.clone()).saga(runner)], Arc::new(LocalBus::default())).await.unwrap();
    add(&store, "a", [1]).await;
    let stuck = eventually("the saga is stuck", async || documents(&store, "stuck.saga.lost").await.pop()).await;
    assert!(stuck.1.contains("the desk") && stuck.1.contains("cannot be the name of a service"), "{}", stuck.1);
    let stuck =
        async || runtime.health().counters().into_keys().find(|counter| counter.name == "annals_sagas_stuck_total");
    eventually("the failure is counted", stuck).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test]
async fn parts_with_one_name_have_separate_health() {
    let mut runtime = Runtime::new();
    let health = runtime.health();
    runtime.spawn("mailer", async { Err("no such host".into()) });
    runtime.spawn("mailer", async { Err("no such user".into()) });
    eventually("both steps have failed", async || {
        let parts = health.parts();
        let failed = |part: &str, reason: &str| parts.get(part) == Some(&State::Failed(reason.to_owned()));
        (failed("mailer", "no such host") && failed("mailer#2", "no such user")).then_some(())
    })
    .await;
    runtime.drain(DRAIN).await.unwrap_err();
}

fn attention(runtime: &Runtime, part: &str) -> Option<String> {
    match runtime.health().parts().remove(part) {
        Some(State::NeedsAttention(reason)) => Some(reason),
        _ => None,
    }
}

#[tokio::test(start_paused = true)]
async fn unknown_category_is_named_until_it_exists() {
    let store = store();
    let follows = Subscription::new("follows", Nothing).query(LogQuery::categories(["tolly"]));
    let mut runtime = Runtime::new();
    let service = Service::new("sums", store.clone()).publish(&["sum", "talley"]).subscribe(follows);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    let reason = eventually("health names them", async || attention(&runtime, "sums.categories")).await;
    assert!(reason.contains("\"sum\", \"talley\", \"tolly\""), "{reason}");
    assert!(runtime.health().is_working());
    let named = Repository::<Tally>::with(store.clone(), "sum", 10);
    Repository::<Tally>::with(store.clone(), "tolly", 10);
    eventually("one category is left", async || {
        attention(&runtime, "sums.categories")
            .filter(|reason| !reason.contains("\"sum\"") && !reason.contains("\"tolly\""))
    })
    .await;
    drop(named);
    // An event written by another process would have the same effect.
    Repository::<Tally>::with(store.clone(), "talley", 10);
    eventually("fine", async || runtime.health().is_fine().then_some(())).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn category_that_only_the_log_has_is_not_reported() {
    let store = store();
    add(&store, "a", [1]).await;
    let events = store.read_log(&LogQuery::all(), Position::START, 10).await.unwrap().events;
    let moved = annals::Append {
        stream: annals::StreamId::new("elsewhere", "a").unwrap(),
        expected: annals::Expected::Any,
        events: vec![annals::NewEvent {
            id: events[0].id,
            type_name: "elsewhere.happened".into(),
            schema_version: 1,
            data: "{}".into(),
            metadata: Default::default(),
        }],
    };
    store.commit(annals::Commit { appends: vec![moved], puts: Vec::new() }).await.unwrap();
    let mut runtime = Runtime::new();
    let service = Service::new("sums", store.clone()).publish(&["elsewhere"]);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(runtime.health().is_fine(), "{:?}", runtime.health().parts());
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn topic_without_messages_is_named_until_it_has_one() {
    let store = store();
    let bus = Arc::new(LocalBus::default());
    let mut runtime = Runtime::new();
    let service = Service::new("sums", store.clone()).consume(Group::new("readers", &["ordr.events"], Nothing));
    runtime.start(vec![service], bus.clone()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(31)).await;
    let reason = eventually("health names it", async || attention(&runtime, "readers.topics")).await;
    assert!(reason.contains("ordr.events"), "{reason}");
    let outgoing = Outgoing { topic: "ordr.events".into(), message: message("a", 1) };
    bus.publish(vec![outgoing]).await.unwrap().await.unwrap();
    eventually("fine", async || runtime.health().is_fine().then_some(())).await;
    runtime.drain(DRAIN).await.unwrap();
}
