//! The shop as it is deployed: four processes over Kafka and PostgreSQL, and one process on PostgreSQL alone; beside what its
//! rows and its messages cost by themselves.

mod bare;
pub mod processes;

use std::path::PathBuf;

use uuid::Uuid;

use self::processes::{Broker, Processes};
use crate::{
    Failure,
    postgres::{Bench, report, server::Server},
};

/// The orders that are timed,
const SEED: u64 = 7;
/// and those before.
const WARM_UP_SEED: u64 = 8;
/// Of each topic: as many as the payment service has members. Each has a checkpoint of its own, in every commit that moves it.
const PARTITIONS: u32 = 4;
const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];

/// Measures the shop over HTTP.
///
/// The binary `sample-shop` must stand beside this one, and KAFKA_JARS name the folder of Kafka's jars: each round has a broker
/// of its own. The database is that of DATABASE_URL, or one of its own.
#[derive(clap::Args)]
pub struct Arguments {
    /// Orders with many in flight: so many that the first and the last, who are alone with fewer, do not count.
    #[arg(long, default_value_t = 20_000)]
    orders: usize,
    /// Orders one at a time.
    #[arg(long, default_value_t = 500)]
    alone: usize,
    /// How many are under way at once. With fewer, the servers wait for customers.
    #[arg(long, default_value_t = 768)]
    concurrency: usize,
    /// Orders before those that are timed: of the time of a broker that has just started, half goes into its compiler.
    #[arg(long, default_value_t = 10_000)]
    warm_up: usize,
    /// Where the servers have their data: the disk that is measured.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// How often each figure is taken, side by side; the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only the one process, without Kafka.
    #[arg(long)]
    without_kafka: bool,
    /// One JSON object a figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs all of it, or until it is interrupted; then, too, the servers are stopped.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &Arguments, server: &Server) -> Result<(), Failure> {
    let mut bench = Bench::new(server);
    let Arguments { orders, alone, concurrency, warm_up, .. } = *arguments;
    for _ in 0..arguments.rounds.max(1) {
        for (count, at_once) in [(orders, concurrency), (alone, 1)] {
            // What they have left behind is of both.
            let (many, sagas) = (at_once > 1, warm_up + count);
            let workload = |what: &str| format!("sagas, {what}, {at_once} in flight");
            if !arguments.without_kafka {
                let broker = Broker::start(&arguments.directory)?;
                let (run, what) = (Uuid::new_v4().simple().to_string(), workload("four processes"));
                let bus = format!("kafka://{}?partitions={PARTITIONS}", broker.address());
                let apart = || Processes::apart(&server.url, &run, &bus);
                apart().await?.sell(warm_up, concurrency, WARM_UP_SEED).await?;
                let ours = async { apart().await?.sell(count, at_once, SEED).await };
                let ours = bench.measure(&what, "annals", ours).await?;
                if many {
                    let schemas = ROLES.map(|role| processes::schema(role, &run));
                    let rows = bare::events(&server.url, &schemas).await?;
                    let limit =
                        bench.measure(&what, "its events by unnest", bare::unnest(&server.url, rows, sagas)).await?;
                    bench.rate(ours, limit, "unnest", "≥ 1,000/s");
                    let records = bare::records(&broker.address())?;
                    bench.note(bare::told(&records, sagas));
                    bench.measure(&what, "its messages", bare::produce(&broker.address(), records, sagas)).await?;
                } else {
                    bench.goal(ours, "p50 ≤ 40 ms");
                }
            }
            let (run, what) = (Uuid::new_v4().simple().to_string(), workload("one process"));
            let together = || Processes::together(&server.url, &run);
            together().await?.sell(warm_up, concurrency, WARM_UP_SEED).await?;
            let ours = async { together().await?.sell(count, at_once, SEED).await };
            let ours = bench.measure(&what, "annals", ours).await?;
            if many {
                let rows = bare::events(&server.url, &[processes::schema("all", &run)]).await?;
                let limit =
                    bench.measure(&what, "its events by unnest", bare::unnest(&server.url, rows, sagas)).await?;
                bench.rate(ours, limit, "unnest", "≥ 2,500/s");
            } else {
                bench.goal(ours, "p50 ≤ 8 ms");
            }
        }
    }
    report(&bench, arguments.json);
    Ok(())
}
