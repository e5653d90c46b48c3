//! Tests brokers that authenticate their clients, and that prove their own identity with a certificate.
#![allow(clippy::unwrap_used)]

mod post;

use std::time::{Duration, Instant};

use annals::BusError;
use annals_kafka::{KafkaBus, Settings};
use annals_tests::kafka::{Broker, PASSWORD, USER};

/// How long a refusal may take to be reported.
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

/// Sends a message and receives it.
async fn is_let_in(settings: Settings) {
    let bus = KafkaBus::connect(settings).await.unwrap();
    let mut consumer = post::reader(&bus, TOPIC).await;
    let sent = post::send(&bus, TOPIC).await;
    let received = tokio::time::timeout(Duration::from_secs(30), post::receive(&mut *consumer)).await;
    assert_eq!(received.unwrap(), sent);
}

/// Expects a refusal within seconds, with an error that contains these words but not the password.
async fn is_refused(settings: Settings, words: &[&str]) {
    let asked_at = Instant::now();
    let error = KafkaBus::connect(settings).await.err().unwrap();
    assert!(asked_at.elapsed() < SECONDS, "{:?}: {error}", asked_at.elapsed());
    assert!(matches!(error, BusError::Misconfigured(_)), "{error}");
    let shown = error.to_string();
    for word in words {
        assert!(shown.contains(word), "{word} is not in: {shown}");
    }
    assert!(!shown.contains(PASSWORD), "{shown}");
}

#[tokio::test]
async fn login_succeeds_only_with_the_right_password() {
    let broker = Broker::secured("SASL_PLAINTEXT");
    is_let_in(sasl(&broker, "SASL_PLAINTEXT", PASSWORD)).await;
    let wrong = sasl(&broker, "SASL_PLAINTEXT", &format!("{PASSWORD}!"));
    is_refused(wrong, &[&broker.address(), "Authentication", "Invalid username or password"]).await;
}

#[tokio::test]
async fn broker_is_verified_by_its_certificate() {
    let broker = Broker::secured("SASL_SSL");
    let certificate = broker.certificate();
    let trusting = |password| sasl(&broker, "SASL_SSL", password).set("ssl.ca.location", certificate.to_str().unwrap());
    is_let_in(trusting(PASSWORD)).await;
    is_refused(trusting("guessed"), &[&broker.address(), "Invalid username or password"]).await;
    // Without the certificate authority, the broker is not trusted.
    is_refused(sasl(&broker, "SASL_SSL", PASSWORD), &[&broker.address(), "certificate"]).await;
}
