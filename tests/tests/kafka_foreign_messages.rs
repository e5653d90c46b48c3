//! Tests messages from other senders: repeated messages, CloudEvents in the sender's own form, and records that are not
//! messages at all.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{collections::BTreeMap, time::Duration};

use annals::{Append, Commit, Operator};
use kafka::{DRAIN, DeadLetter, Pair, Sql, TALLIES, add, append, topic, topic::Record, until, wire};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
};
use tokio::{task::spawn_blocking, time::sleep};
use uuid::Uuid;

const GOOD: usize = 30;
const TOPIC_BYTES_MAX: &str = "20000";
const ENOUGH: &str = "100000";

async fn send(pair: &Pair, records: Vec<Record>) {
    let brokers = pair.brokers.clone();
    let topic = pair.topic();
    spawn_blocking(move || topic::send(&brokers, &topic, &records)).await.unwrap();
}

/// An amount for a tally, as a service without this library would send it.
fn event(tally: &str, amount: i64) -> Record {
    let headers = [
        ("ce_specversion", "1.0"),
        ("ce_id", &*format!("no uuid {}", Uuid::new_v4())),
        ("ce_source", "/strangers/till"),
        ("ce_type", "tally.added"),
        ("ce_subject", &*format!("tally-{tally}")),
        ("ce_time", "2026-01-02T03:04:05+02:00"),
        ("content-type", "application/json; charset=utf-8"),
    ];
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), Some(value.as_bytes().to_vec())));
    Record {
        key: Some(format!("tally-{tally}").into_bytes()),
        value: Some(format!(r#"{{"amount":{amount}}}"#).into_bytes()),
        headers: headers.collect(),
        ..Record::default()
    }
}

impl Record {
    fn with(mut self, name: &str, value: &[u8]) -> Self {
        self.headers.retain(|(key, _)| key != name);
        self.headers.push((name.into(), Some(value.to_vec())));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(key, _)| key != name);
        self
    }

    fn valued(self, value: &[u8]) -> Self {
        Self { value: Some(value.to_vec()), ..self }
    }
}

/// Waits until the consumer has reached the end of the topic.
async fn consumed(pair: &Pair, sql: &mut Sql) {
    let brokers = pair.brokers.clone();
    let topic = pair.topic();
    let ends = spawn_blocking(move || topic::ends(&brokers, &topic)).await.unwrap();
    let waited = tokio::time::timeout(kafka::RECOVERY, async {
        let place = format!("{}/{}", pair.group(), pair.topic());
        loop {
            let offsets = sql.offsets(&place).await;
            if ends.iter().all(|(partition, (_, next))| offsets.get(&partition.to_string()).unwrap_or(&0) == next) {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never at {ends:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeating_the_whole_topic_changes_nothing() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    add(&pair.source_store().await, 0..20).await;
    pair.agrees().await;
    let records = pair.records().await;
    for _ in 0..2 {
        send(&pair, records.clone()).await;
    }
    add(&pair.source_store().await, 20..21).await;
    let repeated = pair.agrees().await;
    assert_eq!(repeated, 2 * records.len());
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}

/// A record that the consumer parks, for a tally of its own. `reason` is a part of the reason that the dead letter gives.
struct Poison {
    tally: &'static str,
    record: Record,
    reason: &'static str,
}

fn poison() -> Vec<Poison> {
    let nested = [vec![b'['; 300], vec![b']'; 300]].concat();
    let of = |tally: &str| event(tally, 2);
    let poison = [
        ("headers", Record { headers: Vec::new(), ..of("headers") }, "attribute specversion is missing"),
        ("id", of("id").without("ce_id"), "attribute id is missing"),
        ("version", of("version").with("ce_specversion", b"0.3"), "\"0.3\" is not supported"),
        ("json", of("json").valued(br#"{"amount":"#), "not JSON"),
        ("value", of("value").valued(b"\xff\xfe{}"), "value is not UTF-8"),
        ("header", of("header").with("ce_source", b"\xc3\x28"), "header ce_source is not UTF-8"),
        ("null", Record { value: None, ..of("null") }, ""),
        ("empty", of("empty").valued(b""), ""),
        ("time", of("time").with("ce_time", b"yesterday"), "attribute time"),
        ("large", of("large").valued(&vec![b'x'; 900_000]), "not JSON"),
        ("nested", of("nested").valued(&nested), ""),
        ("nul", of("nul").valued(br#"{"amount":"\u0000"}"#), ""),
        (
            "structured",
            of("structured").with("content-type", b"application/cloudevents+json"),
            "attribute specversion is missing",
        ),
        (
            "batch",
            of("batch").with("content-type", b"application/cloudevents-batch+json").valued(b"[{"),
            "is a batch of CloudEvents",
        ),
    ];
    poison.into_iter().map(|(tally, record, reason)| Poison { tally, record, reason }).collect()
}

/// Returns each poison record between two good records of its tally, with records of other tallies before them.
fn among_good_records(poison: &[Poison]) -> Vec<Record> {
    let mut records = Vec::new();
    for Poison { tally, record, .. } in poison {
        records.extend((0..GOOD).map(|good| event(&format!("good{good}"), records.len() as i64)).collect::<Vec<_>>());
        records.extend([event(tally, 1), record.clone(), event(tally, 3)]);
    }
    records
}

/// Checks that each poison record is parked unchanged, with the record that follows in its tally.
fn assert_parked(poison: &[Poison], parked: &[DeadLetter]) {
    for Poison { tally, record, reason } in poison {
        let letter = parked.iter().find(|letter| letter.key == format!("tally-{tally}")).unwrap();
        assert!(letter.reason.contains(reason), "{tally}: {}", letter.reason);
        assert_eq!((letter.attempts, letter.behind), (1, 1), "{tally}: {}", letter.reason);
        let message: serde_json::Value = serde_json::from_str(&letter.message).unwrap();
        let bytes = record.value.as_deref().unwrap_or_default();
        match message["raw"].as_str() {
            Some(raw) => assert_eq!(raw, bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), "{tally}"),
            // The record is a message that the handler cannot decode.
            None => {
                let data = record.value.as_deref().filter(|value| !value.is_empty()).unwrap_or(b"null");
                assert_eq!(message["data"].as_str().unwrap().as_bytes(), data, "{tally}");
            }
        }
    }
}

/// Checks that the amounts of the good tallies are copied in the order in which they were sent.
fn assert_good_tallies_are_copied(copied: &BTreeMap<String, Vec<i64>>, records: &[Record]) {
    for good in 0..GOOD {
        let tally = format!("good{good}");
        let key = format!("tally-{tally}").into_bytes();
        let sent = records.iter().filter(|record| record.key.as_ref() == Some(&key));
        let amount = |record: &Record| -> serde_json::Value {
            serde_json::from_slice::<serde_json::Value>(record.value.as_ref().unwrap()).unwrap()["amount"].clone()
        };
        let sent: Vec<i64> = sent.map(|record| amount(record).as_i64().unwrap()).collect();
        assert_eq!(copied[&tally], sent, "{tally}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_messages_are_parked_among_good_ones() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let poison = poison();
    let mut records = among_good_records(&poison);
    records.push(Record { key: Some(b"\xff\xfe".to_vec()), ..event("key", 2) });
    records.push(Record { key: None, headers: Vec::new(), ..event("none", 2) });
    send(&pair, records.clone()).await;
    let brokers = pair.brokers.clone();
    let topic = pair.topic();
    spawn_blocking(move || wire::send(&brokers, &topic, b"tally-name", b"{}", b"ce_\xff")).await.unwrap();
    let mut sql = pair.sql().await;
    consumed(&pair, &mut sql).await;
    let parked = sql.dead_letters().await;
    assert_eq!(parked.len(), poison.len() + 2, "{:?}", parked.iter().map(|letter| &letter.key).collect::<Vec<_>>());
    assert_parked(&poison, &parked);
    for key in ["", "tally-name"] {
        assert!(parked.iter().any(|letter| letter.key == key), "the key {key:?}");
    }
    let copied = sql.copied().await;
    assert_eq!(copied["key"], [2], "a key may be any bytes");
    assert_good_tallies_are_copied(&copied, &records);
    let operator = Operator::new(pair.sink_store().await, "ann");
    for Poison { tally, .. } in &poison {
        assert_eq!(copied[*tally], [1], "{tally}");
        let key = format!("tally-{tally}");
        assert_eq!(operator.redrive(&pair.group(), &key, "a test").await.unwrap(), 2);
    }
    // After a redrive, the messages fail as before. After a drop, the messages behind the dropped messages are handled.
    let tried = |parked: Vec<DeadLetter>| parked.iter().filter(|letter| letter.attempts == 2).count();
    until("all poison messages are retried", async || tried(sql.dead_letters().await) == poison.len()).await;
    for Poison { tally, .. } in &poison {
        operator.drop_first(&pair.group(), &format!("tally-{tally}"), "a test").await.unwrap().unwrap();
    }
    until("no message waits any more", async || sql.dead_letters().await.len() == 2).await;
    let copied = sql.copied().await;
    for Poison { tally, .. } in &poison {
        assert_eq!(copied[*tally], [1, 3], "{tally}");
    }
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_of_any_codec_are_read() {
    for codec in ["gzip", "snappy", "lz4", "zstd"] {
        // The topic's setting makes the broker compress the messages of the relay. The other messages come from another
        // producer.
        let pair = Pair::new().await;
        let name = pair.topic();
        let topic = NewTopic::new(&name, 4, TopicReplication::Fixed(1)).set("compression.type", codec);
        admin(&pair).create_topics([&topic], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let relay = pair.relay().await;
        let consumer = pair.consumer().await;
        add(&pair.source_store().await, 0..20).await;
        pair.agrees().await;
        let records: Vec<_> = (0..GOOD as i64).map(|amount| event("compressed", amount)).collect();
        let brokers = pair.brokers.clone();
        let topic = pair.topic();
        spawn_blocking(move || topic::send_compressed(&brokers, &topic, &records, codec)).await.unwrap();
        let mut sql = pair.sql().await;
        consumed(&pair, &mut sql).await;
        assert_eq!(sql.copied().await["compressed"], (0..GOOD as i64).collect::<Vec<_>>(), "{codec}");
        relay.drain(DRAIN).await.unwrap();
        consumer.drain(DRAIN).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_attributes_with_our_names_are_ignored() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let places = [("fast", "7"), ("fast", "3"), ("7", "5"), ("0@0123456789abcdef", "2"), ("0@0123456789abcdef", "1")];
    let records = places.iter().zip(0..).map(|((lane, position), amount)| {
        let own = event("own", amount).with("ce_lane", lane.as_bytes()).with("ce_position", position.as_bytes());
        // The version attribute of another sender is not the version of our schema.
        own.with("ce_schemaversion", b"9").with("ce_streamversion", b"1")
    });
    let records: Vec<_> = records.collect();
    let sent = records.len() as i64;
    send(&pair, records).await;
    let mut sql = pair.sql().await;
    consumed(&pair, &mut sql).await;
    assert_eq!(sql.dead_letters().await, []);
    assert_eq!(sql.copied().await["own"], (0..sent).collect::<Vec<_>>());
    consumer.drain(DRAIN).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_events_are_handled() {
    let pair = Pair::new().await;
    let consumer = pair.consumer().await;
    let structured = |amount: i64| {
        let body = serde_json::json!({
            "specversion": "1.0", "id": format!("A-{amount}"), "source": "urn:till", "type": "tally.added",
            "subject": "tally-structured", "time": "2026-01-02T03:04:05Z", "count": 7, "urgent": true,
            "data": {"amount": amount},
        });
        let headers =
            vec![("Content-Type".to_lowercase(), Some(b"application/cloudevents+json; charset=UTF-8".to_vec()))];
        Record { key: None, value: Some(body.to_string().into_bytes()), headers, ..Record::default() }
    };
    let records = vec![
        event("binary", 1),
        event("binary", 2).without("ce_time").without("content-type"),
        // These attributes of another sender happen to have the names of our attributes.
        event("binary", 3).with("ce_position", b"48.1,11.5").with("ce_lane", b"left"),
        event("binary", 4).with("ce_correlationid", b"c-1").with("ce_schemaversion", b"draft").with("x", b"\xff"),
        event("binary", 5).with("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        structured(1),
        structured(2),
    ];
    send(&pair, records).await;
    // If a record has no key, the subject becomes the key of the message. The record itself may be in any partition.
    let mut sql = pair.sql().await;
    consumed(&pair, &mut sql).await;
    assert_eq!(sql.dead_letters().await, []);
    let mut copied = sql.copied().await;
    copied.get_mut("structured").unwrap().sort_unstable();
    assert_eq!(copied["binary"], [1, 2, 3, 4, 5]);
    assert_eq!(copied["structured"], [1, 2]);
    consumer.drain(DRAIN).await.unwrap();
}

fn admin(pair: &Pair) -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", &pair.brokers).create().unwrap()
}

fn large(stream: &str, amount: i64) -> Append {
    let mut append = append(stream, amount);
    append.events[0].data = format!(r#"{{"amount":{amount},"filler":"{}"}}"#, "x".repeat(30_000));
    append
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn message_too_large_for_the_topic_is_parked() {
    let pair = Pair::new().await;
    let admin = admin(&pair);
    let options = AdminOptions::new();
    let name = pair.topic();
    let topic = NewTopic::new(&name, 4, TopicReplication::Fixed(1)).set("max.message.bytes", TOPIC_BYTES_MAX);
    admin.create_topics([&topic], &options).await.unwrap()[0].as_ref().unwrap();
    let store = pair.source_store().await;
    // All of these messages are in one page, and the producer counts them as one batch.
    let commit = |appends| Commit { appends, puts: Vec::new() };
    add(&store, 0..20).await;
    store.commit(commit(vec![large("tally-3", 20)])).await.unwrap();
    add(&store, 20..40).await;
    store.commit(commit(vec![large("tally-5", 40), large("tally-3", 41)])).await.unwrap();
    add(&store, 40..42).await;
    let relay = pair.relay().await;
    let consumer = pair.consumer().await;
    let mut sql = pair.sql().await;
    let others = (TALLIES as i64 - 2) * 42 + 20 + 40;
    until("the others are handled", async || sql.copies().await >= others).await;
    pair.relay_is_at_the_end(&mut sql).await;
    let parked = sql.dead_letters().await;
    let parked: Vec<_> = parked.iter().map(|letter| (&*letter.key, letter.behind, &*letter.reason)).collect();
    assert!(
        matches!(parked[..], [("tally-3", 23, first), ("tally-5", 2, second)]
        if first.contains("is 20000") && second.contains("is 20000")),
        "{parked:?}"
    );
    assert_eq!(sql.copies().await, others, "nothing passes what is parked");

    // After its checkpoint is moved back, the relay again sends the messages that precede the parked messages, but no
    // message that waits behind them.
    sql.set_back().await;
    add(&store, 42..43).await;
    until("the relay has started over", async || pair.sent().await >= 2 * others).await;
    pair.relay_is_at_the_end(&mut sql).await;
    let behind: Vec<_> = sql.dead_letters().await.into_iter().map(|letter| letter.behind).collect();
    assert_eq!(behind, [24, 3]);

    let alter = AlterConfig::new(ResourceSpecifier::Topic(&name)).set("max.message.bytes", ENOUGH);
    admin.alter_configs([&alter], &options).await.unwrap()[0].as_ref().unwrap();
    let operator = Operator::new(store, "ann");
    for key in ["tally-3", "tally-5"] {
        assert!(operator.redrive(&format!("{}.relay", pair.service), key, "a test").await.unwrap() > 0);
    }
    pair.agrees().await;
    relay.drain(DRAIN).await.unwrap();
    consumer.drain(DRAIN).await.unwrap();
}
