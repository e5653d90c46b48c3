//! A topic's retention removes messages before they are read. This fault is reported, and an operator can repair it.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{
    DeadLetters, EventStore, Group, Handler, HandlerError, MemoryStore, Message, Metadata, Operator, Position,
    Publisher, Runtime, Saga, Service, StreamId, Version, Work,
    bus::Outgoing,
    health::State,
    parking::{DeadLetter, Lost},
    saga::{OperatorAction, Status},
};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::{
    kafka::brokers,
    tally::becomes_fine,
    trip::{Trip, World, ask},
};
use async_trait::async_trait;
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(20);
const DRAIN: Duration = Duration::from_secs(60);

/// The positions that were handled, in order. While `shut` is set, the handler waits.
#[derive(Clone, Default)]
struct Seen {
    positions: Arc<Mutex<Vec<i64>>>,
    shut: Arc<AtomicBool>,
    opened: Arc<Notify>,
}

#[async_trait]
impl Handler for Seen {
    async fn handle(&self, message: &Message, _: &mut Work) -> Result<(), HandlerError> {
        self.positions.lock().unwrap().push(message.position.0);
        while self.shut.load(Ordering::SeqCst) {
            self.opened.notified().await;
        }
        Ok(())
    }
}

impl Seen {
    fn positions(&self) -> Vec<i64> {
        self.positions.lock().unwrap().clone()
    }
}

/// A topic with one partition, and a group that reads the topic.
struct Setting {
    topic: Arc<str>,
    store: Arc<dyn EventStore>,
    settings: Settings,
    bus: KafkaBus,
    seen: Seen,
}

impl Setting {
    async fn new(settings: Settings) -> Self {
        let topic: Arc<str> = format!("kept{}.events", Uuid::new_v4().simple()).into();
        let bus = KafkaBus::connect(settings.clone()).await.unwrap();
        Self { topic, store: Arc::new(MemoryStore::new()), settings, bus, seen: Seen::default() }
    }

    /// Sends messages as the relay of this log would.
    async fn send(&self, positions: impl IntoIterator<Item = i64>, bytes: usize) {
        let message = |position: i64| {
            let id = Uuid::from_u128(position as u128 + 1);
            Message {
                id,
                type_name: "kept".into(),
                schema_version: 1,
                source: "sender".into(),
                subject: format!("kept-{position}").into(),
                key: format!("kept-{position}").into(),
                // The data must not be compressible.
                data: format!(
                    "\"{}\"",
                    (0..bytes.div_ceil(32)).map(|_| Uuid::new_v4().simple().to_string()).collect::<String>()
                )
                .into(),
                metadata: Metadata::of_request(id),
                time: chrono::DateTime::UNIX_EPOCH,
                position: Position(position),
                version: Version(1),
                lane: Some("0@0123456789abcdef".into()),
                extensions: BTreeMap::new(),
            }
        };
        let outgoing = |position| Outgoing { topic: self.topic.clone(), message: message(position) };
        self.bus.publish(positions.into_iter().map(outgoing).collect()).await.unwrap().await.unwrap();
    }

    async fn trim(&self) -> i64 {
        trim(&self.topic).await
    }

    async fn start(&self) -> Runtime {
        let mut runtime = Runtime::new();
        let group = Group::new(&self.group(), &[&self.topic], self.seen.clone());
        let service = Service::new(&self.group(), self.store.clone()).consume(group);
        let bus = KafkaBus::connect(self.settings.clone()).await.unwrap();
        runtime.start(vec![service], Arc::new(bus)).await.unwrap();
        runtime
    }

    fn group(&self) -> String {
        format!("group-{}", self.topic)
    }

    async fn lost(&self) -> Vec<Lost> {
        let letters = DeadLetters::new(self.store.clone()).list(&self.group()).await.unwrap();
        let lost = |letter: &DeadLetter| letter.parked.lost().unwrap_or_else(|| panic!("{letter:?}"));
        letters.iter().map(lost).collect()
    }

    /// Returns the health of the group's member.
    fn state(&self, runtime: &Runtime) -> State {
        runtime.health().parts()[&format!("{}#0", self.group())].clone()
    }
}

/// Returns the offset after the last message of a topic with one partition, or 0 if the topic does not exist yet.
async fn end(topic: &str) -> i64 {
    let topic = topic.to_owned();
    let end = tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
        consumer.fetch_watermarks(&topic, 0, PATIENCE).map_or(0, |(_, end)| end)
    });
    end.await.unwrap()
}

/// Removes all messages from a topic with one partition, as retention does. Returns the offset after the last message.
async fn trim(topic: &str) -> i64 {
    let end = end(topic).await;
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Offset(end)).unwrap();
    admin.delete_records(&list, &AdminOptions::new()).await.unwrap();
    end
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !is_so().await {
            sleep(LOOK).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_removed_while_the_consumer_runs_are_reported() {
    // The consumer must not be able to read all messages ahead.
    let settings = Settings::new(&brokers()).partitions(1);
    let settings = settings.set("queued.max.messages.kbytes", "512").set("fetch.max.bytes", "100000");
    let setting = Setting::new(settings.set("message.max.bytes", "100000")).await;
    let seen = &setting.seen;
    seen.shut.store(true, Ordering::SeqCst);
    let runtime = setting.start().await;
    setting.send(1..=300, 20_000).await;
    until("the first is there", async || !seen.positions().is_empty()).await;
    let end = setting.trim().await;
    setting.send([1_000], 10).await;
    seen.shut.store(false, Ordering::SeqCst);
    seen.opened.notify_waiters();
    seen.opened.notify_one();
    until("new messages are handled", async || seen.positions().contains(&1_000)).await;
    let lost = setting.lost().await;
    let handled = seen.positions().len() as i64 - 1;
    assert!(handled < 300, "all messages were read ahead");
    assert_eq!((lost.len(), lost[0].from, lost[0].to), (1, handled, end), "{lost:?}");
    let state = setting.state(&runtime);
    assert!(matches!(&state, State::Trouble(reason) if reason.contains("removed before they were read")), "{state:?}");
    assert!(!runtime.health().is_fine());
    // No message waits behind the fault, and dropping the fault clears it.
    setting.send([1_001], 10).await;
    until("the next is handled", async || seen.positions().contains(&1_001)).await;
    let letters = DeadLetters::new(setting.store.clone());
    let key = letters.list(&setting.group()).await.unwrap()[0].parked.key.clone();
    Operator::new(setting.store.clone(), "ann").drop_first(&setting.group(), &key, "a test").await.unwrap().unwrap();
    until("fine again", async || setting.state(&runtime) == State::Fine).await;
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_removed_while_the_consumer_is_down_can_be_sent_again() {
    let setting = Setting::new(Settings::new(&brokers()).partitions(1)).await;
    let seen = &setting.seen;
    setting.send([1, 2], 10).await;
    let runtime = setting.start().await;
    until("the first are handled", async || seen.positions() == [1, 2]).await;
    runtime.drain(DRAIN).await.unwrap();
    setting.send([3, 4], 10).await;
    setting.trim().await;
    setting.send([5], 10).await;
    let runtime = setting.start().await;
    until("the remaining messages are handled", async || seen.positions() == [1, 2, 5]).await;
    let lost = |from, to| Lost { topic: setting.topic.clone(), partition: 0, from, to };
    assert_eq!(setting.lost().await, [lost(2, 4)]);
    assert!(matches!(setting.state(&runtime), State::Trouble(_)));
    // The relay is moved back twice.
    setting.send(1..=5, 10).await;
    setting.send(1..=6, 10).await;
    until("lost messages are handled", async || seen.positions() == [1, 2, 5, 3, 4, 6]).await;
    runtime.drain(DRAIN).await.unwrap();
    // The fault outlives the process. A restart reports no further fault.
    let runtime = setting.start().await;
    until("the lost message is known", async || matches!(setting.state(&runtime), State::Trouble(_))).await;
    assert_eq!(setting.lost().await, [lost(2, 4)]);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_removed_after_reading_are_not_a_fault() {
    let setting = Setting::new(Settings::new(&brokers()).partitions(1)).await;
    let seen = &setting.seen;
    setting.send([1, 2], 10).await;
    let runtime = setting.start().await;
    until("all messages are handled", async || seen.positions() == [1, 2]).await;
    runtime.drain(DRAIN).await.unwrap();
    // The message directly before the checkpoint is gone as well.
    setting.trim().await;
    let runtime = setting.start().await;
    setting.send([3], 10).await;
    until("the next is handled", async || seen.positions() == [1, 2, 3]).await;
    assert_eq!(setting.lost().await, []);
    assert_eq!(setting.state(&runtime), State::Fine);
    runtime.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_lost_before_the_first_of_their_lane_can_be_sent_again() {
    let setting = Setting::new(Settings::new(&brokers()).partitions(1)).await;
    let seen = &setting.seen;
    // The message that the partition's checkpoint remembers is from another sender.
    let topic = setting.topic.to_string();
    let stranger = tokio::task::spawn_blocking(move || {
        use rdkafka::{
            message::{Header, OwnedHeaders},
            producer::{BaseProducer, BaseRecord, Producer},
        };
        let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
        let headers = [("ce_specversion", "1.0"), ("ce_id", "1"), ("ce_source", "other"), ("ce_type", "kept")];
        let headers = headers
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(*value) }));
        producer.send(BaseRecord::to(&topic).key("other").payload("1").headers(headers)).map_err(drop).unwrap();
        producer.flush(PATIENCE).unwrap();
    });
    // Starting the service creates the topic.
    let runtime = setting.start().await;
    stranger.await.unwrap();
    until("the other's is handled", async || seen.positions() == [0]).await;
    runtime.drain(DRAIN).await.unwrap();
    setting.send([3, 4], 10).await;
    setting.trim().await;
    setting.send([5], 10).await;
    let runtime = setting.start().await;
    until("the remaining messages are handled", async || seen.positions() == [0, 5]).await;
    for _ in 0..2 {
        setting.send(3..=5, 10).await;
    }
    setting.send([6], 10).await;
    until("lost messages are handled once", async || seen.positions() == [0, 5, 3, 4, 6]).await;
    runtime.drain(DRAIN).await.unwrap();
}

/// A saga is stuck because the reply of its participant was removed from the topic before it was read. An operator's
/// retry makes the participant send the recorded answer again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_reply_is_sent_again_on_an_operators_retry() {
    let plan = Saga::<Trip>::named("trip")
        .pivot("confirm", |trip| ask("bank", "confirm", trip))
        .timeout(Duration::from_secs(1))
        .attempts(1)
        .retriable("announce", |trip| ask("bank", "announce", trip))
        .timeout(PATIENCE)
        .build();
    let world = World::new(Arc::new(MemoryStore::new()), plan);
    let prefix = format!("reply{}.", Uuid::new_v4().simple());
    let settings = Settings::new(&brokers()).partitions(1).prefix(&prefix);
    let start = async |name| {
        let bus = KafkaBus::connect(settings.clone()).await.unwrap();
        world.start_over(Arc::new(bus), &[name]).await
    };
    let commands = format!("{prefix}bank.commands");
    let replies = format!("{prefix}shop.commands");
    let bank = start("bank").await;
    let shop = start("shop").await;
    // If the bank does not answer in time, the saga gets stuck, and goes on when the answer arrives.
    world.request("before", Uuid::new_v4(), None).await;
    world.becomes("before", Status::Completed).await;
    bank.drain(DRAIN).await.unwrap();

    let sent = end(&commands).await;
    world.request("a", Uuid::new_v4(), None).await;
    until("the command is sent", async || end(&commands).await > sent).await;
    shop.drain(DRAIN).await.unwrap();
    let answered = end(&replies).await;
    let bank = start("bank").await;
    until("the answer is sent", async || end(&replies).await > answered).await;
    trim(&replies).await;
    let shop = start("shop").await;
    world.becomes("a", Status::Stuck).await;
    assert_eq!(world.ledger("a").await, ["confirm"]);
    let letters = DeadLetters::new(world.store.clone());
    until("the loss is reported", async || !letters.list("shop.commands").await.unwrap().is_empty()).await;
    let lost = letters.list("shop.commands").await.unwrap().remove(0).parked;
    assert_eq!(lost.lost().map(|lost| lost.to), Some(answered + 1), "{lost:?}");

    let operator = Operator::new(world.store.clone(), "ann");
    let saga = StreamId::from_stored("saga.trip-a");
    operator.ask(&saga, OperatorAction::Retry, "the reply is gone").await.unwrap();
    world.becomes("a", Status::Completed).await;
    assert_eq!(world.ledger("a").await, ["confirm", "announce"]);
    let confirmed = world.script.asked().into_iter().filter(|(step, _)| step == "confirm").count();
    assert_eq!(confirmed, 2, "each of the two trips is confirmed once");
    operator.drop_first("shop.commands", &lost.key, "a test").await.unwrap().unwrap();
    becomes_fine(&shop.health()).await;
    shop.drain(DRAIN).await.unwrap();
    bank.drain(DRAIN).await.unwrap();
}
