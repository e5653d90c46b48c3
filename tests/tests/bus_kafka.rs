//! The conformance suite for the bus on Kafka, run on the broker that KAFKA_BROKERS names.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::Bus;
use annals_conformance::bus::Subject;
use annals_kafka::{KafkaBus, Settings};
use annals_tests::kafka::brokers;

struct Kafka;

#[async_trait::async_trait]
impl Subject for Kafka {
    const PARTITIONS: u32 = 4;
    const RECEIPT_AFTER_CONSUMPTION: bool = false;
    const RESUMES_AT_ACKNOWLEDGED: bool = false;

    async fn bus() -> Arc<dyn Bus> {
        let settings = Settings::new(&brokers()).partitions(Self::PARTITIONS);
        Arc::new(KafkaBus::connect(settings).await.unwrap())
    }
}

annals_conformance::bus_suite!(Kafka);
