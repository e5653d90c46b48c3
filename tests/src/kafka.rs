//! Where the tests find a Kafka.

/// The brokers that the tests use: `./test` starts one, unless KAFKA_BROKERS names some.
pub fn brokers() -> String {
    std::env::var("KAFKA_BROKERS").unwrap_or_else(|_| panic!("KAFKA_BROKERS is not set: run the tests by ./test"))
}
