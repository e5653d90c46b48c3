//! Replays to topics, and comparisons of topics with the log. A plain Kafka client checks the results. Run by `./test`.
#![allow(clippy::unwrap_used)]

mod topic;
mod travel;

use std::{sync::Arc, time::Duration};

use annals::{
    Append, Commit, DocumentKey, EventStore, Expected, Group, Handler, HandlerError, Message, Metadata, NewEvent,
    Publisher, Runtime, Service, StreamId, Work, bus::Outgoing, relay::RelayProgress,
};
use annals_kafka::{KafkaBus, Settings};
use annals_postgres::PostgresStore;
use annals_sqlite::SqliteStore;
use annals_tests::kafka::{Broker, brokers};
use async_trait::async_trait;
use sqlx::{Connection, PgConnection, SqliteConnection, sqlite::SqliteConnectOptions};
use uuid::Uuid;

use topic::Record;
use travel::{Ended, Place, TRIPS, command, ended, travel_on, until, url};

const DRAIN: Duration = Duration::from_secs(60);

async fn bus(brokers: &str) -> Arc<KafkaBus> {
    Arc::new(KafkaBus::connect(Settings::new(brokers).partitions(3)).await.unwrap())
}

/// Returns the messages without their offsets and without the attributes that only the relay adds.
fn without_lane(records: &[Record]) -> Vec<Record> {
    let mut records = records.to_vec();
    records.iter_mut().for_each(|record| {
        record.headers.remove("ce_lane");
        record.offset = 0;
    });
    records.sort();
    records
}

/// Counts the calls for each event.
struct Counting;

#[async_trait]
impl Handler for Counting {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let key = DocumentKey::new("seen", &*message.subject);
        let seen: u64 = work.document(&key).await?.unwrap_or(0);
        Ok(work.put(&key, &(seen + 1))?)
    }
}

/// Returns the number of offsets that the store's checkpoints have passed.
async fn passed(store: &dyn EventStore) -> i64 {
    let found = store.scan("checkpoint", &annals::Scan::After("".into()), 100).await.unwrap();
    let next = |body: &str| serde_json::from_str::<serde_json::Value>(body).unwrap()["next"].as_i64().unwrap();
    let of_topic = found.iter().filter(|document| document.key.id.contains("agency.events"));
    of_topic.map(|document| next(&document.body)).sum()
}

async fn seen(store: &dyn EventStore) -> Vec<(String, String)> {
    let found = store.scan("seen", &annals::Scan::After("".into()), 100).await.unwrap();
    found.iter().map(|document| (document.key.id.to_string(), document.body.to_string())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_to_topic_sends_relay_messages_and_consumers_skip_duplicates() {
    let place = Place::empty();
    let broker = Broker::start();
    let kafka = format!("kafka://{}", broker.address());
    let store = SqliteStore::open(place.file("travel.db")).await.unwrap();
    travel_on(Arc::new(store.clone()), &TRIPS, bus(&broker.address()).await).await;
    store.close().await.unwrap();
    let sent = topic::all(&broker.address(), "agency.events");
    assert_eq!(sent.len(), TRIPS.len());

    // A service with a consumer of this library handles all messages.
    let watcher: Arc<dyn EventStore> = Arc::new(SqliteStore::open(place.file("watcher.db")).await.unwrap());
    let mut runtime = Runtime::new();
    let service = Service::new("watcher", watcher.clone()).consume(Group::new("watcher", &["agency.events"], Counting));
    runtime.start(vec![service], bus(&broker.address()).await).await.unwrap();
    until("it has seen all trips", || async { seen(&*watcher).await.len() == TRIPS.len() }).await;

    let replay = ["replay", "--category", "trip", "--bus", &kafka, "--service", "agency"];
    let with = |words: &[&str]| place.annals(&[&replay[..], words].concat());
    assert!(with(&["--dry-run"]).fine().starts_with("5 events would be replayed"));
    assert!(with(&["--topic", "trips.again"]).fine().starts_with("5 events replayed"));
    let again = topic::all(&broker.address(), "trips.again");
    assert!(again.iter().all(|record| !record.headers.contains_key("ce_lane")), "{again:#?}");
    let unplaced = |records: &[Record]| {
        let mut records = without_lane(records);
        records.iter_mut().for_each(|record| record.partition = 0);
        records.sort();
        records
    };
    assert_eq!(unplaced(&again), unplaced(&sent), "another topic may have more partitions, and nothing else differs");

    assert!(with(&[]).fine().starts_with("5 events replayed"));
    let both = topic::all(&broker.address(), "agency.events");
    assert_eq!(both.len(), 2 * TRIPS.len());
    let (mut first, mut second): (Vec<_>, Vec<_>) =
        both.iter().cloned().partition(|record| sent.iter().any(|known| known == record));
    first.iter_mut().chain(&mut second).for_each(|record| record.offset = 0);
    first.sort();
    second.sort();
    assert_eq!(second, first, "its lane included");

    // The consumer passes the repeated messages without counting any of them again.
    until("it has passed the replayed ones", || async { passed(&*watcher).await == both.len() as i64 }).await;
    runtime.drain(DRAIN).await.unwrap();
    let seen = seen(&*watcher).await;
    assert!(seen.iter().all(|(_, count)| count == "1"), "{seen:?}");

    let refused = |words: &[&str]| place.annals(words).refused();
    let bare = ["replay", "--bus", &kafka, "--service", "agency"];
    assert!(refused(&bare).contains("name the categories that agency publishes, with --category"));
    let sagas = refused(&[&bare[..], &["--category", "saga.journey"]].concat());
    assert!(sagas.contains("are not replayed: their effects would happen again"), "{sagas}");
    let nobody = refused(&["replay", "--category", "trip", "--bus", &kafka, "--service", "nobody"]);
    assert!(nobody.contains("no relay of service nobody has run on this store"), "{nobody}");
    let nowhere = "kafka://127.0.0.1:1?sasl.password=hunter2";
    let silent = refused(&["replay", "--category", "trip", "--bus", nowhere, "--service", "agency"]);
    assert!(silent.contains("no broker of kafka://127.0.0.1:1 answered") && !silent.contains("hunter2"), "{silent}");
    let wrong =
        refused(&["replay", "--category", "trip", "--bus", "kafka://a?sasl.password=hunter2", "--service", "agency"]);
    assert!(!wrong.contains("hunter2"), "{wrong}");
}

/// Creates a store with one stream that has this many events.
async fn things(place: &Place, count: i64) -> std::path::PathBuf {
    let path = place.file("things.db");
    let store = SqliteStore::open(&path).await.unwrap();
    for from in (0..count).step_by(1_000) {
        let event = |number: i64| NewEvent {
            id: Uuid::new_v4(),
            type_name: "thing.happened".into(),
            schema_version: 1,
            data: format!("{{\"number\": {number}}}"),
            metadata: Metadata::of_request(Uuid::new_v4()),
        };
        let events = (from..count.min(from + 1_000)).map(event).collect();
        let append = Append { stream: StreamId::parse("thing-1").unwrap(), expected: Expected::Any, events };
        store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    }
    store.close().await.unwrap();
    path
}

fn annals(store: &std::path::Path, words: &[&str]) -> Ended {
    let mut command = command(words);
    command.env("ANNALS_STORE", url(store));
    ended(command)
}

async fn sql(path: &std::path::Path, sql: &str) {
    let options = SqliteConnectOptions::new().filename(path);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn positions(records: &[Record]) -> Vec<i64> {
    records.iter().map(|record| record.headers["ce_position"].parse().unwrap()).collect()
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_stops_replay_at_acknowledged_messages_and_printed_command_continues() {
    const MANY: i64 = 5_000;
    let place = Place::empty();
    let path = things(&place, MANY).await;
    // All events have nearly the same time, so one more event with a much later time delays the replay.
    let later = "INSERT INTO events SELECT position + 1, 'thing-late', 1, lower(hex(randomblob(16))), type, schema_version, data, \
                 metadata, recorded_at + 3600000000 FROM events ORDER BY position DESC LIMIT 1";
    sql(&path, later).await;
    let topic = format!("again-{}", Uuid::new_v4().simple());
    let kafka = format!("kafka://{}", brokers());
    let words =
        ["replay", "--category", "thing", "--speed", "1x", "--bus", &kafka, "--service", "it", "--topic", &topic];
    let mut slow = command(&words);
    let running = slow.env("ANNALS_STORE", url(&path)).stderr(std::process::Stdio::piped()).spawn().unwrap();
    until("it has sent all but the last", || async { topic::size(&brokers(), &topic) >= MANY }).await;
    let sent = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let stopped = Ended::from(running.wait_with_output().unwrap());
    assert_eq!(stopped.code, 130, "{stopped:?}");
    let said = format!("stopped: 5,000 events replayed, up to position {MANY}; to continue, run: annals ");
    let again = stopped.err.trim().strip_prefix(&said).unwrap_or_else(|| panic!("{}", stopped.err));
    annals(&path, &again.split(' ').collect::<Vec<_>>()).fine();
    let records = topic::all(&brokers(), &topic);
    let mut found = positions(&records);
    found.sort_unstable();
    assert_eq!(found, (1..=MANY + 1).collect::<Vec<_>>());
    let in_order = |partition: i32| {
        let of_it: Vec<_> = records.iter().filter(|record| record.partition == partition).cloned().collect();
        positions(&of_it).is_sorted()
    };
    assert!((0..8).all(in_order));
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_broker_delays_replay_and_loses_no_message() {
    const MANY: i64 = 60_000;
    let place = Place::empty();
    let mut broker = Broker::start();
    let path = things(&place, MANY).await;
    let kafka = format!("kafka://{}?partitions=1", broker.address());
    let mut command =
        command(&["replay", "--category", "thing", "--bus", &kafka, "--service", "it", "--topic", "again"]);
    let running = command.env("ANNALS_STORE", url(&path)).stderr(std::process::Stdio::piped()).spawn().unwrap();
    until("it sends something", || async { topic::size(&broker.address(), "again") >= 1 }).await;
    broker.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    broker.resume();
    let ended = Ended::from(running.wait_with_output().unwrap());
    assert_eq!(ended.code, 0, "{ended:?}");
    // The topic may contain some messages twice, but every message must come after the first copy of each earlier
    // message.
    let mut next = 1;
    let mut found = positions(&topic::all(&broker.address(), "again"));
    for position in found.drain(..) {
        assert!(position <= next, "{position} came before {next}");
        next = next.max(position + 1);
    }
    assert_eq!(next, MANY + 1);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_during_broker_outage_continues_at_last_acknowledged_message() {
    const MANY: i64 = 150_000;
    let place = Place::empty();
    let mut broker = Broker::start();
    let path = things(&place, MANY).await;
    let kafka = format!("kafka://{}", broker.address());
    let mut command =
        command(&["replay", "--category", "thing", "--bus", &kafka, "--service", "it", "--topic", "again"]);
    let running = command.env("ANNALS_STORE", url(&path)).stderr(std::process::Stdio::piped()).spawn().unwrap();
    until("it sends something", || async { topic::size(&broker.address(), "again") >= 1 }).await;
    broker.kill();
    let sent = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let stopped = Ended::from(running.wait_with_output().unwrap());
    assert_eq!(stopped.code, 130, "{stopped:?}");
    broker.resume();
    let before = positions(&topic::all(&broker.address(), "again")).into_iter().max().unwrap();
    let (_, again) = stopped.err.trim().split_once("to continue, run: annals ").unwrap();
    let (_, from) = again.split_once("--from ").unwrap();
    let from: i64 = from.split(' ').next().unwrap().parse().unwrap();
    assert!((1..=before + 1).contains(&from) && from <= MANY, "the topic ends at {before}, and it goes on at {from}");
    annals(&path, &again.split(' ').collect::<Vec<_>>()).fine();
    let mut found = positions(&topic::all(&broker.address(), "again"));
    found.sort_unstable();
    found.dedup();
    assert_eq!(found, (1..=MANY).collect::<Vec<_>>());
}

/// Writes a checkpoint according to which a relay has sent all events.
async fn relayed(path: &std::path::Path, service: &str, to: i64) {
    let checkpoint = format!("{{\"next\":{to},\"at\":\"2026-11-21T00:00:00Z\"}}");
    sql(path, &format!(
        "INSERT INTO documents (collection, id, version, body) VALUES ('checkpoint', '{service}.relay/0', 1, '{checkpoint}'), \
         ('log', 'name', 1, '\"0123456789abcdef\"')"
    ))
    .await;
}

/// Returns the messages of the events in the store, as the relay sends them.
async fn messages(path: &std::path::Path, service: &str) -> Vec<Outgoing> {
    let store = SqliteStore::open(path).await.unwrap();
    let relayed = RelayProgress::on(&store).await.unwrap().remove(service).unwrap();
    let page = store.read_log(&annals::LogQuery::all(), annals::Position(0), 100).await.unwrap();
    let message = |event: &Arc<annals::Recorded>| {
        let message =
            Message { lane: Some(relayed.label(&event.stream, event.position)), ..Message::of(event, &service.into()) };
        Outgoing { topic: format!("{service}.events").into(), message }
    };
    let made = page.events.iter().map(message).collect();
    store.close().await.unwrap();
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_accepts_topics_of_a_relay_and_finds_a_changed_command() {
    let place = Place::empty();
    let broker = Broker::start();
    let kafka = format!("kafka://{}", broker.address());
    let store = SqliteStore::open(place.file("travel.db")).await.unwrap();
    let bus = bus(&broker.address()).await;
    travel_on(Arc::new(store.clone()), &TRIPS, bus.clone()).await;
    store.close().await.unwrap();
    let verified = place.annals(&["verify", "--bus", &kafka, "--json"]).json();
    let sent =
        topic::all(&broker.address(), "agency.events").len() + topic::all(&broker.address(), "agency.commands").len();
    assert_eq!(verified.len(), 1, "{verified:?}");
    assert_eq!(verified[0]["topics"]["messages"], sent, "{verified:?}");
    assert!(sent > 3 * TRIPS.len() && verified[0]["topics"]["topics"] == 2, "{verified:?}");

    // A message from another sender is not checked.
    topic::send(&broker.address(), "agency.commands", "x", "no event at all", &[]);
    let verified = place.annals(&["verify", "--bus", &kafka]).fine();
    assert!(
        verified
            .contains("in 2 topics compared with the log; 0 sent again, 0 removed by retention, 1 from other senders"),
        "{verified}"
    );

    // One command was changed on its way, and another was never sent.
    let mut commands = topic::all(&broker.address(), "agency.commands");
    let command = commands.iter_mut().find(|record| record.payload.contains("poor-1")).unwrap();
    let headers: Vec<(&str, &str)> = command.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    let payload = command.payload.replace("poor-1", "rich-1");
    topic::send(&broker.address(), "agency.commands", &command.key, &payload, &headers);
    let found = place.annals(&["verify", "--bus", &kafka]);
    assert_eq!(found.code, 1, "{found:?}");
    let lines: Vec<_> = found.out.lines().collect();
    assert!(
        lines[0].starts_with("agency.commands[") && lines[0].contains("the payload differs from the log at position"),
        "{lines:?}"
    );
    assert!(lines[1].contains(": 1 fault"), "{lines:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_reports_each_missing_added_changed_or_reordered_message() {
    let place = Place::empty();
    let service = format!("s{}", Uuid::new_v4().simple());
    let path = things(&place, 6).await;
    relayed(&path, &service, 6).await;
    let kafka = format!("kafka://{}", brokers());
    let words = ["verify", "--bus", &kafka, "--publish", &format!("{service}=thing")];
    let none = annals(&path, &words);
    assert_eq!(none.code, 1, "{none:?}");
    let said = format!("topic {service}.events: the topic does not exist, and 6 messages should be there\n");
    assert!(none.out.starts_with(&said), "{none:?}");

    let bus = bus(&brokers()).await;
    let made = messages(&path, &service).await;
    let publish = async |which: &[usize]| {
        for one in which {
            bus.publish(vec![made[*one - 1].clone()]).await.unwrap().await.unwrap();
        }
    };
    // Messages 1 to 3 are sent twice, as after a crash; 5 is sent before 4, and 6 is never sent.
    publish(&[1, 2, 3, 1, 2, 3, 5, 4]).await;
    let mut stranger = made[0].clone();
    stranger.message.id = Uuid::new_v4();
    let mut changed = made[1].clone();
    changed.message.type_name = "thing.else".into();
    bus.publish(vec![stranger, changed]).await.unwrap().await.unwrap();
    let found = annals(&path, &words);
    assert_eq!(found.code, 1, "{found:?}");
    let mut lines: Vec<_> = found.out.lines().collect();
    let told = lines.split_off(4);
    lines.sort_unstable();
    let partition = topic::all(&brokers(), &format!("{service}.events"))[0].partition;
    let at = |offset: i64| format!("{service}.events[{partition}] offset {offset}");
    let mut expected = [
        format!("position 6 (thing-1 v6): the message is missing in topic {service}.events"),
        format!("{}: the message claims to come from this log, which has no such message at position 1", at(8)),
        format!("{}: an attribute or the key differs from the log at position 2 (thing-1 v2)", at(9)),
        format!(
            "{}, position 5 (thing-1 v5): the message came before position 4 of its stream, which is at offset 7",
            at(6)
        ),
    ];
    expected.sort();
    assert_eq!(lines, expected);
    assert!(told[0].ends_with("documents verified: 4 faults"), "{told:?}");
    assert_eq!(
        told[1],
        "5 messages in 1 topics compared with the log; 4 sent again, 0 removed by retention, 0 from other senders"
    );
    // Without --publish, the command expects the categories of the events in the topic.
    let inferred = annals(&path, &words[..3]);
    assert_eq!((inferred.code, inferred.out), (1, found.out));
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_counts_messages_removed_by_retention() {
    let place = Place::empty();
    let service = format!("s{}", Uuid::new_v4().simple());
    let path = things(&place, 6).await;
    relayed(&path, &service, 6).await;
    let bus = bus(&brokers()).await;
    let made = messages(&path, &service).await;
    bus.publish(made.clone()).await.unwrap().await.unwrap();
    let topic = format!("{service}.events");
    let partition = topic::all(&brokers(), &topic)[0].partition;
    let kafka = format!("kafka://{}", brokers());
    let words = ["verify", "--bus", &kafka, "--publish", &format!("{service}=thing")];
    topic::cut(&brokers(), &topic, partition, 3).await;
    let cut = annals(&path, &words).fine();
    assert!(
        cut.contains("3 messages in 1 topics compared with the log; 0 sent again, 3 removed by retention"),
        "{cut}"
    );
    // All messages are sent again from the beginning. The repeats of the messages that are still there come late, but
    // nothing counts as out of order.
    bus.publish(made.clone()).await.unwrap().await.unwrap();
    let again = annals(&path, &words).fine();
    assert!(again.contains("6 messages in 1 topics compared with the log; 3 sent again, 0 removed"), "{again}");
    // Removes all messages.
    topic::cut(&brokers(), &topic, partition, 12).await;
    let gone = annals(&path, &words).fine();
    assert!(
        gone.contains("0 messages in 1 topics compared with the log; 0 sent again, 6 removed by retention"),
        "{gone}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_reports_a_compacted_topic_as_one_fault() {
    let place = Place::empty();
    let service = format!("s{}", Uuid::new_v4().simple());
    let path = things(&place, 6).await;
    relayed(&path, &service, 6).await;
    let topic = format!("{service}.events");
    topic::make_compacted(&brokers(), &topic).await;
    let made = messages(&path, &service).await;
    // The topic was compacted, so it holds only the last messages of the stream.
    bus(&brokers()).await.publish(made[4..].to_vec()).await.unwrap().await.unwrap();
    let kafka = format!("kafka://{}", brokers());
    let found = annals(&path, &["verify", "--bus", &kafka]);
    assert_eq!(found.code, 1, "{found:?}");
    let lines: Vec<_> = found.out.lines().collect();
    let said = format!(
        "topic {topic}: the topic is compacted, so brokers remove all but the last message of each key: 4 sent messages are gone"
    );
    assert!(lines[0].starts_with(&said) && lines[1].ends_with(": 1 fault"), "{lines:#?}");
    assert!(lines[2].starts_with("2 messages in 1 topics compared with the log"), "{lines:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_store_is_replayed_to_a_topic_and_compared_with_the_topic() {
    let schema = format!("cli_{}", Uuid::new_v4().simple());
    let broker = Broker::start();
    let database = std::env::var("DATABASE_URL").expect("DATABASE_URL is not set: run the tests by ./test");
    let kafka = format!("kafka://{}", broker.address());
    let settings = annals_postgres::Settings { schema: schema.clone(), connections: 6 };
    let store = PostgresStore::connect(&database, settings).await.unwrap();
    travel_on(Arc::new(store.clone()), &TRIPS, bus(&broker.address()).await).await;
    store.close().await.unwrap();
    let annals = |words: &[&str]| {
        let mut command = command(words);
        command.env("ANNALS_STORE", &database).env("ANNALS_SCHEMA", &schema);
        ended(command)
    };
    let held = || annals(&["verify", "--bus", &kafka, "--json"]).json().remove(0)["topics"].clone();
    let sent = topic::all(&broker.address(), "agency.events");
    let commands = topic::all(&broker.address(), "agency.commands").len();
    assert_eq!((held()["messages"].clone(), sent.len()), ((sent.len() + commands).into(), TRIPS.len()));

    let replay = ["replay", "--category", "trip", "--bus", &kafka, "--service", "agency"];
    assert!(annals(&[&replay[..], &["--dry-run"]].concat()).fine().starts_with("5 events would be replayed"));
    assert!(annals(&replay).fine().starts_with("5 events replayed"));
    let both = topic::all(&broker.address(), "agency.events");
    let twice: Vec<_> = sent.iter().chain(&sent).map(|record| Record { offset: 0, ..record.clone() }).collect();
    let sorted = |mut records: Vec<Record>| {
        records.iter_mut().for_each(|record| record.offset = 0);
        records.sort();
        records
    };
    assert_eq!(sorted(both), sorted(twice), "the same ids, keys, bytes and headers, its lane included");
    assert_eq!(held()["repeated"], 5);
    assert!(annals(&[&replay[..], &["--topic", "trips.again"]].concat()).fine().starts_with("5 events replayed"));
    assert_eq!(topic::size(&broker.address(), "trips.again"), 5);

    // A database user with all permissions changes events that have been sent.
    let mut connection = PgConnection::connect(&database).await.unwrap();
    let change = format!(
        "ALTER TABLE {schema}.events DISABLE TRIGGER ALL; \
         UPDATE {schema}.events SET data = '{{\"Ordered\":null}}' WHERE stream_id = 'trip-fine-1'"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(change)).execute(&mut connection).await.unwrap();
    let found = annals(&["verify", "--bus", &kafka]);
    assert_eq!(found.code, 1, "{found:?}");
    let changed = found.out.lines().filter(|line| line.contains("the payload differs from the log at position"));
    assert_eq!(changed.count(), 2, "the message and its repetition: {found:?}");
    let drop = format!("DROP SCHEMA {schema} CASCADE");
    sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&mut connection).await.unwrap();
}
