//! Messages travel from one service's log over a bus to another service's store, in order, and each message affects an
//! aggregate exactly once.
#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use annals::{
    Bus, BusError, Consumer, DeadLetters, DocumentKey, EventStore, Group, Handler, HandlerError, Health, LocalBus,
    MemoryStore, Message, Operator, Publisher, Runtime, Service, Work,
    bus::{Bookmark, Delivery, Outgoing, Partition, Polled, Receipt, Undecodable},
    checkpoint::{CHECKPOINTS, Checkpoint},
    health::State,
    worker::RetryPolicy,
};
use annals_conformance::bus::{message, within};
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{Copier, add, copies, document, documents, eventually, log},
};
use async_trait::async_trait;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

fn memory() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

fn source(store: &Arc<dyn EventStore>) -> Service {
    Service::new("source", store.clone()).publish(&["tally"])
}

fn sink(store: &Arc<dyn EventStore>) -> Service {
    let tallies = Group::new("sink.tallies", &["source.events"], Copier::new(store.clone()));
    Service::new("sink", store.clone()).consume(tallies)
}

async fn start<B: Bus>(services: Vec<Service>, bus: &Arc<B>) -> Runtime {
    let mut runtime = Runtime::new();
    runtime.start(services, bus.clone()).await.unwrap();
    runtime
}

async fn copied(store: &Arc<dyn EventStore>, id: &str, amounts: Vec<i64>) {
    eventually("all amounts are copied", async || (copies(store, id).await.1.len() >= amounts.len()).then_some(()))
        .await;
    assert_eq!(copies(store, id).await.1, amounts);
}

#[tokio::test]
async fn events_keep_their_order_per_key_end_to_end() {
    let here = memory();
    let there = memory();
    let bus = Arc::new(LocalBus::new(4));
    let runtime = start(vec![sink(&there), source(&here)], &bus).await;
    for round in 0..40 {
        for id in 0..25 {
            add(&here, &id.to_string(), [round]).await;
        }
    }
    for id in 0..25 {
        copied(&there, &id.to_string(), (0..40).collect()).await;
        assert_eq!(copies(&there, &id.to_string()).await.0, (0..40).collect::<Vec<_>>());
    }
    runtime.drain(std::time::Duration::from_secs(10)).await.unwrap();
}

#[tokio::test]
async fn relay_crash_at_its_checkpoint_causes_no_second_effect() {
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let inner = memory();
        let there = memory();
        let bus = Arc::new(LocalBus::new(2));
        let faulty = FaultyStore::new(inner.clone());
        faulty.when_checkpoint("source.relay", fault.clone());
        let here: Arc<dyn EventStore> = Arc::new(faulty.clone());
        let consumer = start(vec![sink(&there)], &bus).await;
        let relay = start(vec![source(&here)], &bus).await;
        add(&inner, "a", 1..=30).await;
        within("crash", faulty.crashed()).await;
        drop(relay);
        let relay = start(vec![source(&inner)], &bus).await;
        add(&inner, "a", 31..=40).await;
        copied(&there, "a", (1..=40).collect()).await;
        // The document must hold each amount once too, although no command id protects the document.
        assert_eq!(copies(&there, "a").await.0, (1..=40).collect::<Vec<_>>());
        let sent = async || {
            let checkpoints = documents(&there, CHECKPOINTS).await;
            let offset = |body: &str| serde_json::from_str::<Checkpoint>(body).unwrap().next;
            checkpoints.iter().map(|(_, body)| offset(body)).max().filter(|offset| *offset > 40)
        };
        if let Fault::CrashBefore = fault {
            eventually("repeated messages are skipped", sent).await;
        }
        drop((relay, consumer));
    }
}

#[tokio::test]
async fn unavailable_stores_lose_and_duplicate_nothing() {
    let inner_here = memory();
    let inner_there = memory();
    let bus = Arc::new(LocalBus::new(2));
    let faulty_here = FaultyStore::new(inner_here.clone());
    let faulty_there = FaultyStore::new(inner_there.clone());
    let here: Arc<dyn EventStore> = Arc::new(faulty_here.clone());
    let there: Arc<dyn EventStore> = Arc::new(faulty_there.clone());
    let runtime = start(vec![source(&here), sink(&there)], &bus).await;
    for round in 0..4 {
        faulty_here.away(round % 2 == 0);
        faulty_there.away(round % 2 == 1);
        add(&inner_here, "a", round * 10..round * 10 + 10).await;
        if round % 2 == 0 {
            faulty_here.refused(round as u64 + 1).await;
        } else {
            faulty_there.refused(round as u64).await;
            assert!(!runtime.health().is_fine());
        }
        faulty_here.away(false);
        faulty_there.away(false);
        copied(&inner_there, "a", (0..round * 10 + 10).collect()).await;
    }
    assert_eq!(documents(&inner_there, "parked.sink.tallies").await, []);
    runtime.drain(std::time::Duration::from_secs(10)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn relay_skips_unpublished_events() {
    let here = memory();
    let bus = Arc::new(LocalBus::new(2));
    let runtime = start(vec![Service::new("source", here.clone()).publish(&["order"])], &bus).await;
    add(&here, "a", 1..=5).await;
    let key = DocumentKey::new(CHECKPOINTS, "source.relay/0");
    let place = async || Some(serde_json::from_str::<Checkpoint>(&document(&here, &key).await?).unwrap().next);
    eventually("the checkpoint has moved", async || (place().await == Some(5)).then_some(())).await;
    drop(runtime);
}

/// A bus with one partition whose messages the test scripts.
#[derive(Default)]
struct Scripted {
    messages: Mutex<Vec<Result<Message, Undecodable>>>,
    more: Notify,
    failing_acknowledgements: AtomicU32,
    /// Publishing a message with this key fails.
    refuses: Mutex<Option<Arc<str>>>,
    published: Mutex<Vec<(Arc<str>, i64)>>,
}

struct ScriptedConsumer {
    bus: Arc<Scripted>,
    next: Option<i64>,
    reported: bool,
}

fn partition() -> Partition {
    Partition { topic: "source.events".into(), number: 0, incarnation: "first".into() }
}

struct Handle(Arc<Scripted>);

#[async_trait]
impl Publisher for Handle {
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        let refuses = self.0.refuses.lock().unwrap().clone();
        let refused = messages.iter().position(|outgoing| Some(&outgoing.message.key) == refuses.as_ref());
        let mut published = self.0.published.lock().unwrap();
        published.extend(
            messages
                .iter()
                .take(refused.unwrap_or(messages.len()))
                .map(|outgoing| (outgoing.message.key.clone(), outgoing.message.position.0)),
        );
        Ok(Box::pin(std::future::ready(match refused {
            Some(index) => Err(BusError::Refused { index, reason: "against the policy".into() }),
            None => Ok(()),
        })))
    }
}

#[async_trait]
impl Bus for Handle {
    async fn join(&self, _group: &str, _topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        Ok(Box::new(ScriptedConsumer { bus: self.0.clone(), next: None, reported: false }))
    }
}

#[async_trait]
impl Consumer for ScriptedConsumer {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        if !std::mem::replace(&mut self.reported, true) {
            return Ok(Polled::Assigned(vec![partition()]));
        }
        loop {
            let more = self.bus.more.notified();
            if let Some(next) = &mut self.next {
                let messages = self.bus.messages.lock().unwrap();
                let from = *next as usize;
                let to = messages.len().min(from + max);
                if from < to {
                    *next = to as i64;
                    let deliver = |(message, offset): (&Result<Message, Undecodable>, i64)| Delivery {
                        partition: partition(),
                        offset,
                        message: message.clone(),
                    };
                    return Ok(Polled::Messages(messages[from..to].iter().zip(from as i64..).map(deliver).collect()));
                }
            }
            more.await;
        }
    }

    async fn seek(&mut self, _partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError> {
        self.next = Some(from.map_or(0, |bookmark| bookmark.next));
        Ok(())
    }

    async fn acknowledge(&mut self, _partition: &Partition, _next: i64) -> Result<(), BusError> {
        let fails =
            self.bus.failing_acknowledgements.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        fails.map_or(Ok(()), |_| Err(BusError::Unavailable("no acknowledgement".into())))
    }
}

impl Scripted {
    fn add(&self, messages: impl IntoIterator<Item = Result<Message, Undecodable>>) {
        self.messages.lock().unwrap().extend(messages);
        self.more.notify_waiters();
    }
}

/// Records each message in one document per key. Fails at messages whose version is in `bad`.
#[derive(Clone, Default)]
struct Notes {
    bad: Arc<Mutex<Vec<i64>>>,
}

#[async_trait]
impl Handler for Notes {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if self.bad.lock().unwrap().contains(&message.version.0) {
            return Err(format!("{} is bad", message.version).into());
        }
        let short: String = message.key.chars().filter(|character| *character != '\0').take(100).collect();
        let key = DocumentKey::new("notes", short);
        let mut seen: Vec<i64> = work.document(&key).await?.unwrap_or_default();
        seen.push(message.version.0);
        work.put(&key, &seen)?;
        Ok(())
    }
}

async fn noted(store: &Arc<dyn EventStore>, key: &str, numbers: &[i64]) {
    let key = DocumentKey::new("notes", key);
    let expected = serde_json::to_string(numbers).unwrap();
    let found = async || document(store, &key).await.filter(|body| body.len() >= expected.len());
    assert_eq!(*eventually(&format!("{key} is {expected}"), found).await, *expected);
}

struct Consuming {
    store: Arc<dyn EventStore>,
    health: Health,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<Result<(), annals::BusError>>,
}

async fn consume(bus: &dyn Bus, topics: &[&str], members: u32, notes: &Notes, store: Arc<dyn EventStore>) -> Consuming {
    let retry = RetryPolicy { attempts_max: 1, ..RetryPolicy::default() };
    let group = Group::new("notes", topics, notes.clone()).members(members).retry(retry);
    let health = Health::default();
    let shutdown = CancellationToken::new();
    let joined = group.join(bus).await.unwrap();
    let task = tokio::spawn(joined.run(store.clone(), health.clone(), shutdown.clone()));
    Consuming { store, health, shutdown, task }
}

impl Consuming {
    async fn stop(self) {
        self.shutdown.cancel();
        within("stop", self.task).await.unwrap().unwrap();
        assert!(self.health.parts().values().all(|state| *state == State::Stopped));
    }
}

#[tokio::test]
async fn error_between_commit_and_acknowledgement_duplicates_nothing() {
    let bus = Arc::new(Scripted { failing_acknowledgements: AtomicU32::new(3), ..Scripted::default() });
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &Notes::default(), memory()).await;
    for number in 1..=6 {
        bus.add([Ok(message("a", number))]);
        noted(&consuming.store, "a", &(1..=number).collect::<Vec<_>>()).await;
    }
    eventually("health says so", async || consuming.health.is_fine().then_some(())).await;
    consuming.stop().await;
}

#[tokio::test]
async fn message_sent_twice_by_a_relay_is_handled_once() {
    let bus = Arc::new(Scripted::default());
    let store = memory();
    let notes = Notes::default();
    let sent = |key: &str, lane, position| {
        let message = message(key, position);
        Ok(Message { lane: Some(format!("{lane}").into()), position: annals::Position(position), ..message })
    };
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &notes, store.clone()).await;
    bus.add([sent("a", 0, 1), sent("b", 0, 2), sent("c", 1, 1), sent("a", 0, 1), sent("a", 0, 3), sent("b", 0, 2)]);
    noted(&store, "a", &[1, 3]).await;
    consuming.stop().await;
    // A relay restarts from an old position. The consumer can know this only from its checkpoint, since no other
    // messages come.
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &notes, store.clone()).await;
    bus.add([sent("a", 0, 1), sent("b", 0, 2), sent("a", 0, 3), sent("c", 1, 1), sent("c", 1, 2), sent("a", 0, 3)]);
    noted(&store, "c", &[1, 2]).await;
    let key = DocumentKey::new(CHECKPOINTS, "notes/source.events/0");
    let place = async || Some(serde_json::from_str::<Checkpoint>(&document(&store, &key).await?).unwrap().next);
    eventually("passed over all", async || (place().await == Some(12)).then_some(())).await;
    noted(&store, "a", &[1, 3]).await;
    noted(&store, "b", &[2]).await;
    consuming.stop().await;
}

#[tokio::test]
async fn lost_commit_and_failed_rewind_lose_nothing() {
    let bus = Arc::new(Scripted::default());
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    faulty.when_checkpoint("notes", Fault::LostAndAway);
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &Notes::default(), store).await;
    bus.add([Ok(message("a", 1))]);
    // Two reads are refused: the read that checks the outcome of the commit, and the read that rewinds the consumer.
    within("two refused reads", faulty.refused(2)).await;
    bus.add([Ok(message("a", 2))]);
    faulty.away(false);
    noted(&inner, "a", &[1, 2]).await;
    consuming.stop().await;
}

#[tokio::test]
async fn undecodable_bytes_are_parked_unchanged() {
    let bus = Arc::new(Scripted::default());
    let store = memory();
    let notes = Notes::default();
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &notes, store.clone()).await;
    let bytes = Undecodable { reason: "no ce_id\0".into(), key: "odd".into(), raw: "00ff17".into() };
    bus.add([Ok(message("a", 1)), Err(bytes), Ok(message("odd", 2)), Ok(message("a", 3))]);
    noted(&store, "a", &[1, 3]).await;
    let letters = DeadLetters::new(store.clone());
    let letter = letters.list("notes").await.unwrap().remove(0);
    assert_eq!((&*letter.parked.key, letter.behind, letter.retries_at), ("odd", 1, None));
    assert_eq!(letter.parked.message.get(), r#"{"raw":"00ff17"}"#);
    assert!(letter.parked.reason.contains("no ce_id") && letter.parked.message().is_none());
    // The redrive fails, and the reason is kept.
    Operator::new(store.clone(), "ann").redrive("notes", "odd", "a test").await.unwrap();
    let twice = async || letters.list("notes").await.unwrap().pop().filter(|letter| letter.parked.attempts == 2);
    assert!(eventually("a second try", twice).await.parked.reason.contains("no ce_id"));
    Operator::new(store.clone(), "ann").drop_first("notes", "odd", "a test").await.unwrap();
    noted(&store, "odd", &[2]).await;
    consuming.stop().await;
}

#[tokio::test]
async fn unstorable_keys_and_messages_are_parked_in_substitute_form() {
    let bus = Arc::new(Scripted::default());
    let store = memory();
    let notes = Notes::default();
    notes.bad.lock().unwrap().push(1);
    let consuming = consume(&Handle(bus.clone()), &["source.events"], 1, &notes, store.clone()).await;
    let long = "x".repeat(5_000);
    let subject = Message { subject: "nul\0".into(), ..message("subject", 1) };
    let large = Message { data: format!("{:?}", "y".repeat(5_000_000)).into(), ..message("large", 1) };
    bus.add([Ok(message(&long, 1)), Ok(message("nul\0", 1)), Ok(subject), Ok(large)]);
    bus.add([Ok(message(&long, 2)), Ok(message("fine", 3))]);
    noted(&store, "fine", &[3]).await;
    let letters = DeadLetters::new(store.clone());
    let parked = letters.list("notes").await.unwrap();
    assert_eq!(parked.iter().map(|letter| 1 + letter.behind).sum::<usize>(), 5, "{}", parked.len());
    notes.bad.lock().unwrap().clear();
    assert_eq!(Operator::new(store.clone(), "ann").redrive("notes", &long, "a test").await.unwrap(), 2);
    noted(&store, &long[..100], &[1, 2]).await;
    consuming.stop().await;
}

#[tokio::test]
async fn members_that_park_one_key_at_once_keep_both_messages() {
    // The bus has one partition per topic, and each topic has one member.
    let bus = LocalBus::new(1);
    let store = memory();
    let notes = Notes::default();
    notes.bad.lock().unwrap().extend([1, 2]);
    let consuming = consume(&bus, &["one", "two"], 2, &notes, store.clone()).await;
    let publish = async |topic: &str, number| {
        let outgoing = Outgoing { topic: topic.into(), message: message("a", number) };
        within("receipt", bus.publish(vec![outgoing]).await.unwrap()).await.unwrap();
    };
    publish("one", 1).await;
    publish("two", 2).await;
    assert_eq!(documents(&store, "parked.notes").await.len(), 2);
    notes.bad.lock().unwrap().clear();
    assert_eq!(Operator::new(store.clone(), "ann").redrive("notes", "a", "a test").await.unwrap(), 2);
    let both = async || document(&store, &DocumentKey::new("notes", "a")).await.filter(|body| body.len() > 3);
    let both: Vec<i64> = serde_json::from_str(&eventually("both bookmarks are recorded", both).await).unwrap();
    assert_eq!(both.iter().sum::<i64>(), 3);
    consuming.stop().await;
}

#[tokio::test]
async fn refused_message_is_parked_once_and_blocks_only_its_key() {
    let here = memory();
    let bus = Arc::new(Scripted::default());
    *bus.refuses.lock().unwrap() = Some("tally-bad".into());
    for id in ["a", "bad", "b", "bad", "c"] {
        add(&here, id, [1]).await;
    }
    let runtime = start(vec![source(&here)], &Arc::new(Handle(bus.clone()))).await;
    let of = |key: &str| {
        let published = bus.published.lock().unwrap();
        published.iter().filter(|(published, _)| **published == *key).map(|(_, position)| *position).collect::<Vec<_>>()
    };
    eventually("the others are published", async || (!of("tally-c").is_empty()).then_some(())).await;
    let letters = DeadLetters::new(here.clone());
    let letter = letters.list("source.relay").await.unwrap().remove(0);
    assert_eq!((&*letter.parked.key, letter.behind, &*letter.parked.reason), ("tally-bad", 1, "against the policy"));
    *bus.refuses.lock().unwrap() = None;
    Operator::new(here.clone(), "ann").redrive("source.relay", "tally-bad", "a test").await.unwrap();
    eventually("nothing is parked", async || documents(&here, "parked.source.relay").await.is_empty().then_some(()))
        .await;
    let positions: HashMap<_, _> = log(&here).await.into_iter().map(|event| (event.position.0, event.stream)).collect();
    assert_eq!(of("tally-bad"), [2, 4]);
    assert_eq!(positions[&2].as_str(), "tally-bad");
    drop(runtime);
}
