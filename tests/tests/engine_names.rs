//! Names whose documents would collide are rejected, and a name never matches a longer name that begins with it. Also
//! tests resets with parked messages.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{
    Commit, DocumentKey, EventStore, Group, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message, NameError,
    Operator, Position, Put, Runtime, Service, StartError, Subscription, Terminal, Work, operator::OperatorError,
};
use annals_sqlite::SqliteStore;
use annals_tests::tally::{add, documents, eventually};
use async_trait::async_trait;

const PATIENCE: Duration = Duration::from_secs(120);

/// While `broken` is set, fails at the third event of a stream, and handles every other event.
#[derive(Clone, Default)]
struct Seen {
    versions: Arc<Mutex<Vec<i64>>>,
    broken: Arc<AtomicBool>,
}

#[async_trait]
impl Handler for Seen {
    async fn handle(&self, message: &Message, _: &mut Work) -> Result<(), HandlerError> {
        if message.version.0 == 3 && self.broken.load(Ordering::SeqCst) {
            return Err::<(), _>("no".to_owned()).terminal();
        }
        self.versions.lock().unwrap().push(message.version.0);
        Ok(())
    }
}

fn subscription(name: &str) -> Subscription {
    Subscription::new(name, Seen::default()).query(LogQuery::categories(["tally"]))
}

async fn started(runtime: &mut Runtime, services: Vec<Service>) -> Result<(), StartError> {
    runtime.start(services, Arc::new(LocalBus::default())).await
}

#[tokio::test]
async fn duplicate_names_of_parts_are_refused_before_anything_is_written() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let service = || Service::new("bank", store.clone());
    let group = |name: &str| Group::new(name, &["other.events"], Seen::default());
    let twice = [
        (vec![service().subscribe(subscription("mailer")).subscribe(subscription("mailer"))], "mailer"),
        (vec![service().subscribe(subscription("mailer")).consume(group("mailer"))], "mailer"),
        (vec![service().consume(group("mailer")).consume(group("mailer"))], "mailer"),
        (vec![service(), service()], "bank"),
    ];
    for (services, expected) in twice {
        let mut runtime = Runtime::new();
        let refused = started(&mut runtime, services).await;
        let Err(StartError::Name(NameError::Taken { name, .. })) = &refused else { panic!("{refused:?}") };
        assert_eq!(name, expected);
        runtime.drain(PATIENCE).await.unwrap();
    }
    // A later start in the same runtime is also rejected.
    let mut runtime = Runtime::new();
    started(&mut runtime, vec![service().subscribe(subscription("mailer"))]).await.unwrap();
    let late = Service::new("post", store.clone()).subscribe(subscription("mailer"));
    assert!(matches!(started(&mut runtime, vec![late]).await, Err(StartError::Name(NameError::Taken { .. }))));
    runtime.drain(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn colliding_names_are_refused_before_anything_is_written() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    for name in ["", "a/b", "totals@1", "a\u{0}", "mail.relay", &"x".repeat(151)] {
        let service = || Service::new("bank", store.clone());
        let group = Group::new(name, &["other.events"], Seen::default());
        let services = [service().subscribe(subscription(name)), service().consume(group)];
        for service in services {
            let mut runtime = Runtime::new();
            let refused = started(&mut runtime, vec![service]).await;
            assert!(matches!(refused, Err(StartError::Name(NameError::Malformed { .. }))), "{name:?}: {refused:?}");
        }
        let alone = subscription(name).run(store.clone(), Default::default(), Default::default()).await;
        assert!(alone.is_err(), "{name:?}");
        if name != "mail.relay" {
            let refused = started(&mut Runtime::shared(name), vec![service()]).await;
            assert!(matches!(refused, Err(StartError::Name(NameError::Malformed { .. }))), "{name:?}: {refused:?}");
        }
    }
    for collection in ["checkpoint", "instance", "read-model"] {
        assert_eq!(documents(&store, collection).await, []);
    }
}

/// Some names are prefixes of others. Each action affects only the subscription with exactly that name.
#[tokio::test]
async fn operator_acts_only_on_the_named_subscription() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let mut runtime = Runtime::new();
    let names = ["mail", "mail.er", "mailer", "mailer2", "a.mailer"];
    let service =
        names.iter().fold(Service::new("bank", store.clone()), |service, name| service.subscribe(subscription(name)));
    started(&mut runtime, vec![service]).await.unwrap();
    add(&store, "a", 1..=3).await;
    let paused = async || {
        let found = documents(&store, "checkpoint").await;
        let paused = found.iter().filter(|(_, body)| body.contains("\"paused\":true"));
        paused.map(|(id, _)| id.to_string()).collect::<Vec<_>>()
    };
    eventually("each part has a checkpoint", async || (documents(&store, "checkpoint").await.len() >= 5).then_some(()))
        .await;
    Operator::new(store.clone(), "ann").pause("mailer", true, "wait").await.unwrap();
    assert_eq!(paused().await, ["mailer/0"]);
    runtime.drain(PATIENCE).await.unwrap();
}

/// A process that ran as instance "1" has died. Ten minutes later, another process cleans up after it.
#[tokio::test(start_paused = true)]
async fn ended_instance_removes_no_similarly_named_documents() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let at = r#""at":"2026-01-01T00:00:00Z""#;
    let put = |collection: &str, id: &str, body: String| Put {
        key: DocumentKey::new(collection, id),
        expected: None,
        body: Some(body.into()),
        due: None,
    };
    let puts = vec![
        put("instance", "1", format!(r#"{{"follows":[],{at}}}"#)),
        put("checkpoint", "totals@1/0", format!(r#"{{"next":0,{at}}}"#)),
        put("checkpoint", "group@1/topic/0", format!(r#"{{"next":7,"incarnation":"i","home":"1",{at}}}"#)),
        put("checkpoint", "group@2/topic/0", format!(r#"{{"next":7,"incarnation":"i","home":"2",{at}}}"#)),
        put("checkpoint", "elsewhere@1/topic/0", format!(r#"{{"next":7,"incarnation":"kafka",{at}}}"#)),
    ];
    store.commit(Commit { appends: Vec::new(), puts }).await.unwrap();
    let mut runtime = Runtime::shared("2");
    started(&mut runtime, vec![Service::new("bank", store.clone()).subscribe(subscription("copies"))]).await.unwrap();
    let mut waited = 0;
    while documents(&store, "instance").await.iter().any(|(id, _)| &**id == "1") {
        tokio::time::sleep(Duration::from_secs(1)).await;
        waited += 1;
        assert!(waited < 1_000, "the ended instance is never forgotten");
    }
    let left: Vec<_> = documents(&store, "checkpoint").await.into_iter().map(|(id, _)| id.to_string()).collect();
    for kept in ["totals@1/0", "group@2/topic/0", "elsewhere@1/topic/0"] {
        assert!(left.iter().any(|id| id == kept), "{kept} is gone: {left:?}");
    }
    assert!(!left.iter().any(|id| id == "group@1/topic/0"), "{left:?}");
    runtime.drain(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reset_handles_parked_messages_once_and_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let schema = postgres::Schema::new();
    let stores: [Arc<dyn EventStore>; 3] = [
        Arc::new(MemoryStore::new()),
        Arc::new(SqliteStore::open(folder.path().join("annals.db")).await.unwrap()),
        Arc::new(schema.store().await),
    ];
    for store in stores {
        let seen = Seen::default();
        let operator = Operator::new(store.clone(), "ann");
        seen.broken.store(true, Ordering::SeqCst);
        add(&store, "a", 1..=5).await;
        let mailer = Subscription::new("mailer", seen.clone()).query(LogQuery::categories(["tally"])).lanes(2);
        let mut runtime = Runtime::new();
        started(&mut runtime, vec![Service::new("bank", store.clone()).subscribe(mailer)]).await.unwrap();
        let parked = async |count: usize| {
            let found = async || (documents(&store, "parked.mailer").await.len() == count).then_some(());
            eventually("so many are parked", found).await;
        };
        let handled = async |expected: &[i64]| {
            let found = async || (seen.versions.lock().unwrap().len() >= expected.len()).then_some(());
            eventually("the messages are handled", found).await;
            assert_eq!(*seen.versions.lock().unwrap(), expected);
        };
        parked(3).await;
        seen.broken.store(false, Ordering::SeqCst);
        // The reset goes to a position after the first parked message. That message stays parked, and redelivered
        // messages wait behind it.
        operator.reset("mailer", Position(3), "again").await.unwrap();
        parked(3).await;
        operator.reset("mailer", Position::START, "again").await.unwrap();
        handled(&[1, 2, 1, 2, 3, 4, 5]).await;
        parked(0).await;
        add(&store, "a", [6]).await;
        handled(&[1, 2, 1, 2, 3, 4, 5, 6]).await;
        let nobody = operator.reset("mail", Position::START, "again").await;
        assert!(matches!(nobody, Err(OperatorError::Illegal(_))), "{nobody:?}");
        runtime.drain(PATIENCE).await.unwrap();
    }
}
