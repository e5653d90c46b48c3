//! Brokers that ask who is there, and by which certificate they are known.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use annals::{
    Bus, BusError, Message, Metadata, Position, Publisher, Version,
    bus::{Outgoing, Polled},
};
use annals_kafka::{KafkaBus, Settings};
use annals_tests::kafka::{Broker, PASSWORD, USER};
use uuid::Uuid;

/// How long a refusal may take to be told.
const SECONDS: Duration = Duration::from_secs(8);
const TOPIC: &str = "letters";

fn sasl(broker: &Broker, protocol: &str, password: &str) -> Settings {
    Settings::new(&broker.address())
        .partitions(1)
        .set("security.protocol", protocol)
        .set("sasl.mechanisms", "PLAIN")
        .set("sasl.username", USER)
        .set("sasl.password", password)
}

fn letter(id: Uuid) -> Message {
    Message {
        id,
        type_name: "letter.sent".into(),
        schema_version: 1,
        source: "post".into(),
        subject: "letter-1".into(),
        key: "letter-1".into(),
        data: "{}".into(),
        metadata: Metadata::of_request(id),
        time: chrono::DateTime::UNIX_EPOCH,
        position: Position(1),
        version: Version(1),
        lane: None,
        extensions: Default::default(),
    }
}

/// A message there and back.
async fn is_let_in(settings: Settings) {
    let bus = KafkaBus::connect(settings).await.unwrap();
    let mut consumer = bus.join("reader", &[TOPIC]).await.unwrap();
    let id = Uuid::new_v4();
    bus.publish(vec![Outgoing { topic: TOPIC.into(), message: letter(id) }]).await.unwrap().await.unwrap();
    let found = async {
        loop {
            match consumer.poll(10).await.unwrap() {
                Polled::Assigned(partitions) => consumer.seek(&partitions[0], None).await.unwrap(),
                Polled::Messages(messages) => return messages[0].message.as_ref().unwrap().id,
                other => panic!("{other:?}"),
            }
        }
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(30), found).await.unwrap(), id);
}

/// Refused within seconds, with these words and without the password.
async fn is_refused(settings: Settings, words: &[&str]) {
    let asked_at = Instant::now();
    let error = KafkaBus::connect(settings).await.err().unwrap();
    assert!(asked_at.elapsed() < SECONDS, "{:?}: {error}", asked_at.elapsed());
    assert!(matches!(error, BusError::Misconfigured(_)), "{error}");
    let told = error.to_string();
    for word in words {
        assert!(told.contains(word), "{word} is not in: {told}");
    }
    assert!(!told.contains(PASSWORD), "{told}");
}

#[tokio::test]
async fn who_has_the_password_is_let_in_and_nobody_else() {
    let broker = Broker::secured("SASL_PLAINTEXT");
    is_let_in(sasl(&broker, "SASL_PLAINTEXT", PASSWORD)).await;
    let wrong = sasl(&broker, "SASL_PLAINTEXT", &format!("{PASSWORD}!"));
    is_refused(wrong, &[&broker.address(), "Authentication", "Invalid username or password"]).await;
}

#[tokio::test]
async fn a_broker_is_known_by_its_certificate() {
    let broker = Broker::secured("SASL_SSL");
    let certificate = broker.certificate();
    let trusting = |password| sasl(&broker, "SASL_SSL", password).set("ssl.ca.location", certificate.to_str().unwrap());
    is_let_in(trusting(PASSWORD)).await;
    is_refused(trusting("guessed"), &[&broker.address(), "Invalid username or password"]).await;
    // One that nobody has vouched for.
    is_refused(sasl(&broker, "SASL_SSL", PASSWORD), &[&broker.address(), "certificate"]).await;
}
