//! Runs the shop in four processes with a distant broker, and measures the duration of a saga in round trips.

#[path = "../../tests/src/distance.rs"]
mod proxy;

use std::{path::PathBuf, time::Duration};

use self::proxy::Distance;
use crate::{
    Failure,
    postgres::{Bench, report, server::Server},
    shop::processes::{self, Broker, Processes},
};

const SEED: u64 = 7;
/// The number of partitions per topic.
const PARTITIONS: u32 = 8;

/// Measures the shop with network delays between the services and the broker.
///
/// The binary `sample-shop` must be in the folder of this program, and KAFKA_JARS must name the folder of Kafka's jars.
/// The database is the one that DATABASE_URL names, or a temporary one. The connection to the database has no delay.
#[derive(clap::Args)]
pub struct DistanceArguments {
    /// The delay of all bytes to and from the broker in milliseconds, each way.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 5, 20])]
    one_way_ms: Vec<u64>,
    /// The number of orders that are timed.
    #[arg(long, default_value_t = 400)]
    orders: usize,
    /// The numbers of concurrent orders to measure.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32])]
    concurrency: Vec<usize>,
    /// Folder for the data of the servers.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark until it ends or is interrupted, and then stops the servers.
pub async fn run(arguments: DistanceArguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &DistanceArguments, server: &Server) -> Result<(), Failure> {
    let mut bench = Bench::new(server);
    for one_way_ms in &arguments.one_way_ms {
        for at_once in &arguments.concurrency {
            // Each run has stores of its own, and a store refuses topics that another store has filled.
            let port = processes::free_port()?;
            let distance = Distance::to(port, Duration::from_millis(*one_way_ms)).await?;
            let start = || Broker::start_at(&arguments.directory, port, distance.port());
            let broker = tokio::task::block_in_place(start)?;
            let run = uuid::Uuid::new_v4().simple().to_string();
            let bus = format!("kafka://{}?partitions={PARTITIONS}", broker.address());
            let apart = || Processes::apart(&server.url, &run, &bus);
            // The first orders warm up clients, topics and just-in-time compilers.
            apart().await?.sell(arguments.orders / 2, *at_once, SEED + 1).await?;
            let ours = async { apart().await?.sell(arguments.orders, *at_once, SEED).await };
            let what = format!("sagas, broker at {one_way_ms} ms each way, {at_once} in flight");
            let ours = bench.measure(&what, "annals", ours).await?;
            if *one_way_ms > 0 {
                bench.goal(ours, "p50 ≤ 25 round trips");
            }
            let connections = distance.accepted();
            bench.note(format!("{what}: {connections} connections in 2 runs"));
        }
    }
    report(&bench, arguments.json);
    Ok(())
}
