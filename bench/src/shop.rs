//! Measures the shop as it is deployed: with four processes over Kafka and PostgreSQL, and with one process on
//! PostgreSQL only. Compares both with the cost of writing the same rows and messages directly.

mod bare;
pub mod processes;

use std::path::PathBuf;

use uuid::Uuid;

use self::processes::{Broker, Processes};
use crate::{
    Failure,
    postgres::{Bench, report, server::Server},
};

/// The seed of the timed orders.
const SEED: u64 = 7;
/// The seed of the warm-up orders.
const WARM_UP_SEED: u64 = 8;
/// The number of partitions per topic: as many as the payment service has members. Each partition has its own
/// checkpoint, which adds a document to every commit that moves it.
const PARTITIONS: u32 = 4;
const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];

/// Measures the shop over HTTP.
///
/// The binary `sample-shop` must be in the folder of this program, and KAFKA_JARS must name the folder of Kafka's jars,
/// because each round starts its own broker. The database is the one that DATABASE_URL names, or a temporary one.
#[derive(clap::Args)]
pub struct ShopArguments {
    /// The number of orders for the measurement with many in flight. A high number makes the first and last orders,
    /// which run with fewer in flight, negligible.
    #[arg(long, default_value_t = 20_000)]
    orders: usize,
    /// The number of orders for the measurement with one at a time.
    #[arg(long, default_value_t = 500)]
    alone: usize,
    /// The number of concurrent orders. If the number is too low, the servers wait for customers.
    #[arg(long, default_value_t = 768)]
    concurrency: usize,
    /// The number of warm-up orders before the timed orders. A broker that has just started spends half of its time in
    /// its just-in-time compiler.
    #[arg(long, default_value_t = 10_000)]
    warm_up: usize,
    /// Folder for the data of the servers. The benchmark measures the disk that holds this folder.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// The number of rounds. All figures are measured once per round, and the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Measure only the single process, without Kafka.
    #[arg(long)]
    without_kafka: bool,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs the benchmark until it ends or is interrupted, and then stops the servers.
pub async fn run(arguments: ShopArguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &ShopArguments, server: &Server) -> Result<(), Failure> {
    let mut bench = Bench::new(server);
    let ShopArguments { orders, alone, concurrency, warm_up, .. } = *arguments;
    for _ in 0..arguments.rounds.max(1) {
        for (count, at_once) in [(orders, concurrency), (alone, 1)] {
            // The rows and messages that a run leaves behind include the rows and messages of the warm-up.
            let many = at_once > 1;
            let sagas = warm_up + count;
            let workload = |what: &str| format!("sagas, {what}, {at_once} in flight");
            if !arguments.without_kafka {
                let broker = Broker::start(&arguments.directory)?;
                let run = Uuid::new_v4().simple().to_string();
                let what = workload("four processes");
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
                    bench.note(bare::messages_note(&records, sagas));
                    bench.measure(&what, "its messages", bare::produce(&broker.address(), records, sagas)).await?;
                } else {
                    bench.goal(ours, "p50 ≤ 40 ms");
                }
            }
            let run = Uuid::new_v4().simple().to_string();
            let what = workload("one process");
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
