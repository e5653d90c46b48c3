//! Compares the bus on Kafka with its limits in the same run. The limits are bare loops over rdkafka and sqlx.

pub mod bare;
mod ours;

use std::path::PathBuf;

use annals_postgres::{PostgresStore, Settings};
use uuid::Uuid;

use crate::{
    Failure,
    postgres::{Bench, report, rows, server::Server},
};

/// Measures the relay and the consumers on Kafka.
///
/// KAFKA_BROKERS names the cluster. The database is the one that DATABASE_URL names, or a temporary one.
#[derive(clap::Args)]
pub struct KafkaArguments {
    /// The number of events to relay and to consume.
    #[arg(long, default_value_t = 200_000)]
    events: i64,
    /// The number of commands from one service to another, sent one at a time.
    #[arg(long, default_value_t = 1_000)]
    hops: usize,
    /// The number of partitions per topic.
    #[arg(long, default_value_t = 8)]
    partitions: u32,
    /// Folder for the data of the database server. The benchmark measures the disk that holds this folder.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// The number of rounds. All figures are measured once per round, and the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark until it ends or is interrupted, and then stops the server.
pub async fn run(arguments: KafkaArguments) -> Result<(), Failure> {
    let brokers = std::env::var("KAFKA_BROKERS").map_err(|_| "KAFKA_BROKERS is not set: which Kafka is measured?")?;
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server, &brokers)).await
}

async fn measure(arguments: &KafkaArguments, server: &Server, brokers: &str) -> Result<(), Failure> {
    let url = &server.url;
    let partitions = arguments.partitions;
    let count = usize::try_from(arguments.events)?;
    for schema in ["annals", "annals_here", "annals_there"] {
        let settings = Settings { schema: schema.into(), ..Settings::default() };
        PostgresStore::connect(url, settings).await?.close().await?;
    }
    let mut bench = Bench::new(server);
    let bus = ours::bus(brokers, partitions).await?;
    for _ in 0..arguments.rounds.max(1) {
        rows::empty(url).await?;
        rows::fill(url, arguments.events).await?;
        let ours = format!("o{}", Uuid::new_v4().simple());
        let bare = format!("b{}.events", Uuid::new_v4().simple());
        let topic = format!("{ours}.events");
        for topic in [&topic, &bare] {
            // Creates the topic.
            drop(annals::Bus::join(&*bus, "bench", &[topic]).await?);
        }
        let relay = bench.measure("relay", "annals", ours::relay(url, bus.clone(), &ours)).await?;
        let limit = bench.measure("relay", "bare loop", bare::relay(url, brokers, &bare)).await?;
        bench.rate(relay, limit, "bare loop", "≥ 0.7");

        let consumed = ours::consume(url, bus.clone(), &topic, partitions, count);
        let consumed = bench.measure("consume, an effect each", "annals", consumed).await?;
        let limit = bare::consume(url, brokers, &topic, partitions, count);
        let limit = bench.measure("consume, an effect each", "bare, 500 rows a statement", limit).await?;
        bench.rate(consumed, limit, "bare", "≥ 0.5");

        let service = format!("h{}", Uuid::new_v4().simple());
        let hop = ours::hop(url, bus.clone(), &service, arguments.hops);
        let hop = bench.measure("commit here to commit there", "annals", hop).await?;
        bench.goal(hop, "p50 ≤ 10, p99 ≤ 40 ms");
        let bare = bare::hop(url, brokers, &bare, partitions, arguments.hops);
        bench.measure("commit here to commit there", "2 INSERTs and a message", bare).await?;
    }
    report(&bench, arguments.json);
    Ok(())
}
