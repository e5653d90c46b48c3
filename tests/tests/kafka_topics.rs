//! Topics are created as declared, or rejected with a reason. Kafka's own tools can read the topics. Secrets never
//! appear in errors or logs.
#![allow(clippy::unwrap_used)]

mod kafka;
mod postgres;

use std::{
    collections::HashMap,
    process::Command,
    time::{Duration, Instant},
};

use annals::{Bus, BusError, Publisher, bus::Ends};
use annals_conformance::bus::{Member, message, publish};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::{
    kafka::{brokers, jars},
    log_output::LogOutput,
};
use kafka::{DRAIN, Pair, TALLIES, add};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
};
use uuid::Uuid;

const RETENTION: Duration = Duration::from_secs(3_600);
const SECRET: &str = "hunter2";
/// The longest time until a wrong address is reported.
const SECONDS: Duration = Duration::from_secs(15);

fn admin() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap()
}

fn topic() -> String {
    format!("made-{}", Uuid::new_v4().simple())
}

#[tokio::test]
async fn topics_are_created_as_declared() {
    let topic = topic();
    let settings = Settings::new(&brokers()).partitions(3).replication(1).retention(RETENTION);
    let bus = KafkaBus::connect(settings).await.unwrap();
    drop(bus.join("watcher", &[&topic]).await.unwrap());
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers()).create().unwrap();
    let metadata = consumer.fetch_metadata(Some(&topic), SECONDS).unwrap();
    let partitions = metadata.topics()[0].partitions();
    assert_eq!(partitions.len(), 3);
    assert!(partitions.iter().all(|partition| partition.replicas().len() == 1));
    let described = admin().describe_configs([&ResourceSpecifier::Topic(&topic)], &AdminOptions::new()).await.unwrap();
    let described = described.into_iter().next().unwrap().unwrap();
    let retention = described.get("retention.ms").unwrap().value.as_ref().unwrap().clone();
    assert_eq!(retention, RETENTION.as_millis().to_string());
}

#[tokio::test]
async fn topic_that_the_cluster_rejects_is_refused_with_a_reason() {
    let topic = topic();
    let bus = KafkaBus::connect(Settings::new(&brokers()).replication(7)).await.unwrap();
    let error = bus.join("watcher", &[&topic]).await.err().unwrap();
    assert!(matches!(error, BusError::Misconfigured(_)), "{error}");
    let shown = error.to_string();
    for part in [&*topic, "replication 7", "InvalidReplicationFactor", "create the topic by hand"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let error = bus.join("watcher", &["no/name"]).await.err().unwrap().to_string();
    assert!(error.contains("no/name"), "{error}");
}

#[tokio::test]
async fn wrong_address_is_reported_within_seconds() {
    let asked_at = Instant::now();
    let nobody = Settings::new("127.0.0.1:1");
    let error = KafkaBus::connect(nobody).await.err().unwrap();
    assert!(asked_at.elapsed() < SECONDS, "{:?}", asked_at.elapsed());
    assert!(matches!(error, BusError::Unavailable(_)), "{error}");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
}

#[tokio::test]
async fn secrets_are_never_shown() {
    let log = LogOutput::default();
    let written = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::TRACE);
    // The subscriber applies to all threads of this process, because the Kafka client logs from its own threads.
    subscriber.with_writer(move || written.clone()).init();
    let mut shown = Vec::new();
    // The broker has no SASL, and other settings have wrong names or values.
    let sasl = Settings::new(&brokers())
        .set("security.protocol", "SASL_PLAINTEXT")
        .set("sasl.mechanisms", "PLAIN")
        .set("sasl.username", "shop")
        .set("sasl.password", SECRET)
        .set("debug", "security,broker,conf");
    shown.push(format!("{sasl:?} {sasl}"));
    shown.push(KafkaBus::connect(sasl).await.err().unwrap().to_string());
    for name in ["sasl.pasword", "security.protocol", "session.timeout.ms", "acks", "enable.idempotence", "partitioner"]
    {
        let wrong = Settings::new(&brokers()).set(name, SECRET);
        let error = match KafkaBus::connect(wrong).await {
            Err(error) => error,
            Ok(bus) => bus.join("watcher", &[&topic()]).await.err().unwrap(),
        };
        let error = error.to_string();
        assert!(error.contains(name), "{name} is not named: {error}");
        shown.push(error);
    }
    shown.push(format!("kafka://a:1?sasl.password={SECRET}%zz&x").parse::<Settings>().unwrap_err().to_string());
    let log = log.text();
    assert!(log.contains("rdkafka"), "nothing was logged: {log}");
    for shown in shown.iter().map(String::as_str).chain(log.lines()) {
        assert!(!shown.contains(SECRET), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn console_consumer_reads_our_messages() {
    let pair = Pair::new().await;
    let relay = pair.relay().await;
    add(&pair.source_store().await, 0..1).await;
    let mut sql = pair.sql().await;
    let mut events: HashMap<_, _> =
        sql.stored().await.into_iter().map(|event| (event.event_id.to_string(), event)).collect();
    let mut console = Command::new("java");
    console.args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", &format!("{}/*", jars())]);
    console.args(["org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", &pair.brokers]);
    console.args(["--topic", &pair.topic(), "--from-beginning", "--max-messages", &TALLIES.to_string()]);
    console.args(["--timeout-ms", "30000", "--property", "print.key=true"]);
    console.args(["--property", "print.headers=true"]);
    let output = tokio::task::spawn_blocking(move || console.output().unwrap()).await.unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = shown.lines().filter(|line| line.contains('\t')).collect();
    assert_eq!(lines.len(), TALLIES, "{shown}{}", String::from_utf8_lossy(&output.stderr));
    for line in lines {
        let [headers, key, value] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let headers: HashMap<_, _> = headers.split(',').map(|header| header.split_once(':').unwrap()).collect();
        let event = events.remove(headers["ce_id"]).unwrap();
        assert_eq!((key, value), (&*event.stream_id, &*format!(r#"{{"amount":{}}}"#, event.amount)));
        for (name, expected) in [
            ("ce_specversion", "1.0"),
            ("ce_source", &*pair.service),
            ("ce_type", "tally.added"),
            ("ce_subject", &event.stream_id),
            ("content-type", "application/json"),
            ("ce_position", &event.position.to_string()),
            ("ce_streamversion", "1"),
        ] {
            assert_eq!(headers[name], expected, "{name} of {line}");
        }
        for name in ["ce_correlationid", "ce_causationid"] {
            headers[name].parse::<Uuid>().unwrap();
        }
        headers["ce_time"].parse::<chrono::DateTime<chrono::Utc>>().unwrap();
    }
    relay.drain(DRAIN).await.unwrap();
}

/// All installations on the cluster use the same names of topics and groups; only the prefixes differ.
#[tokio::test]
async fn installations_with_prefixes_share_a_cluster() {
    let topic = topic();
    let connect = async |prefix: &str| KafkaBus::connect(Settings::new(&brokers()).prefix(prefix)).await.unwrap();
    let [plain, blue, green] = [connect("").await, connect("blue.").await, connect("green_").await];
    let mut members = Vec::new();
    for (number, bus) in [&plain, &blue, &green].into_iter().enumerate() {
        members.push(Member::join(bus, "watcher", &topic).await);
        let sent = message("order-1", number as i64 + 1);
        publish(bus, &topic, [sent]).await.await.unwrap();
    }
    for (number, (member, bus)) in members.iter_mut().zip([&plain, &blue, &green]).enumerate() {
        let [delivery] = &member.collect(1).await[..] else { panic!("one message was sent to each") };
        let received = delivery.message.as_ref().unwrap();
        assert_eq!((&*delivery.partition.topic, received.version.0), (&*topic, number as i64 + 1));
        assert_eq!(delivery.partition.incarnation, *bus.cluster());
        assert_eq!(bus.taken().of(&topic, delivery.partition.number), Some(delivery.offset + 1));
        let mut ends = Ends::default();
        ends.name(&topic);
        let sent = bus.sent_since(&received.source, &ends).await.unwrap();
        assert_eq!(
            sent.iter().map(|sent| (&sent.partition, sent.id())).collect::<Vec<_>>(),
            [(&delivery.partition, received.id)]
        );
        let mut contents = bus.contents(&topic).await.unwrap().unwrap();
        assert_eq!(contents.next().await.unwrap().unwrap().id(), received.id);
        assert!(contents.next().await.unwrap().is_none());
        member.acknowledge(std::slice::from_ref(delivery)).await;
    }
    assert!(blue.topics().await.unwrap().contains(&topic));
    let all = plain.topics().await.unwrap();
    for name in [topic.clone(), format!("blue.{topic}"), format!("green_{topic}")] {
        assert!(all.contains(&name), "{name} is not on the cluster");
    }
    let error = KafkaBus::connect(Settings::new(&brokers()).prefix("a/b")).await.err().unwrap().to_string();
    assert!(error.contains("prefix \"a/b\""), "{error}");
}
