//! Measures each figure together with its baseline and its limit in the same run. Machines differ and are noisy, so
//! only ratios are meaningful.

mod baseline;
mod cli;
mod clients;
mod commands;
mod counting;
mod distance;
mod idle;
mod kafka;
mod postgres;
mod sagas;
mod shop;

use std::path::PathBuf;

use clap::Parser;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the embedded stores. With a subcommand, measures another part instead.
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    store: Option<Store>,
    /// The number of commands to execute at each concurrency.
    #[arg(long, default_value_t = 20_000)]
    commands: usize,
    /// The numbers of concurrent commands to measure. At 1, only a twentieth of the commands are executed.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 1_024])]
    in_flight: Vec<usize>,
    /// The number of orders to check out.
    #[arg(long, default_value_t = 20_000)]
    sagas: usize,
    /// How often each figure is measured. The median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Run only this workload.
    #[arg(long)]
    only: Option<Workload>,
    /// Folder for the database files. The benchmark measures the disk that holds this folder.
    #[arg(long, default_value = ".")]
    directory: PathBuf,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Store {
    Postgres(postgres::PostgresArguments),
    Kafka(kafka::KafkaArguments),
    Shop(shop::ShopArguments),
    Cli(cli::CliArguments),
    Idle(idle::IdleArguments),
    Distance(distance::DistanceArguments),
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Workload {
    Commands,
    Sagas,
}

/// A line of the report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Figure {
    workload: String,
    store: &'static str,
    /// The number of operations per second: commands, sagas, or, for a baseline, rows.
    per_second: f64,
    /// The number of events and documents per second.
    rows_per_second: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// The number of calls of `EventStore::commit` per operation.
    commits_per_op: Option<f64>,
    rows_per_op: Option<f64>,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    match arguments.store {
        Some(Store::Postgres(arguments)) => return tokio::spawn(postgres::run(arguments)).await?,
        Some(Store::Kafka(arguments)) => return tokio::spawn(kafka::run(arguments)).await?,
        Some(Store::Shop(arguments)) => return tokio::spawn(shop::run(arguments)).await?,
        Some(Store::Cli(arguments)) => return tokio::spawn(cli::run(arguments)).await?,
        Some(Store::Idle(arguments)) => return tokio::spawn(idle::run(arguments)).await?,
        Some(Store::Distance(arguments)) => return tokio::spawn(distance::run(arguments)).await?,
        None => {}
    }
    // Runs the benchmark on a worker thread of the runtime. Tasks that the main thread spawns would wait in a queue
    // that busy workers seldom check.
    tokio::spawn(embedded(arguments)).await?
}

async fn embedded(arguments: Arguments) -> Result<(), Failure> {
    let mut figures: Vec<Vec<Figure>> = Vec::new();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        let mut round = Vec::new();
        let directory = tempfile::tempdir_in(&arguments.directory)?;
        let wanted = |workload| arguments.only.is_none_or(|only| only == workload);
        for &in_flight in arguments.in_flight.iter().filter(|_| wanted(Workload::Commands)) {
            let count = if in_flight == 1 { arguments.commands / 20 } else { arguments.commands };
            round.push(commands::memory(count, in_flight).await?);
            let path = directory.path().join(format!("commands-{in_flight}.db"));
            round.push(commands::sqlite(&path, count, in_flight).await?);
            if in_flight != 1 {
                round.push(baseline::rewrite(&path, &format!("commands, {in_flight} in flight")).await?);
            }
        }
        if wanted(Workload::Sagas) {
            round.push(sagas::memory(arguments.sagas).await?);
            let path = directory.path().join("sagas.db");
            round.push(sagas::sqlite(&path, arguments.sagas, 512).await?);
            round.push(baseline::rewrite(&path, "sagas").await?);
            round.push(sagas::sqlite(&directory.path().join("saga.db"), arguments.sagas / 100, 1).await?);
        }
        figures.push(round);
    }
    report(&figures, arguments.json);
    Ok(())
}

fn report(rounds: &[Vec<Figure>], json: bool) {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "workload",
        "store",
        "per second",
        "rows/s",
        "of baseline",
        "p50 ms",
        "p99 ms",
        "commits/op",
        "rows/op",
    ]);
    let Some(first) = rounds.first() else { return };
    let medians: Vec<Figure> = (0..first.len()).map(|index| median(rounds, index)).collect();
    for figure in &medians {
        if json {
            println!("{}", serde_json::to_string(figure).unwrap_or_default());
            continue;
        }
        let limit = medians.iter().find(|limit| limit.store == "plain sqlx" && limit.workload == figure.workload);
        let ratio =
            limit.filter(|_| figure.store == "sqlite").map(|limit| figure.rows_per_second / limit.rows_per_second);
        let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
        table.add_row([
            figure.workload.clone(),
            figure.store.to_owned(),
            format!("{:.0}", figure.per_second),
            format!("{:.0}", figure.rows_per_second),
            optional(ratio),
            optional(figure.p50_ms),
            optional(figure.p99_ms),
            optional(figure.commits_per_op),
            optional(figure.rows_per_op),
        ]);
    }
    if !json {
        println!("{table}");
    }
}

/// Returns the figure of the median round, ordered by operations per second.
fn median(rounds: &[Vec<Figure>], index: usize) -> Figure {
    let mut of_figure: Vec<&Figure> = rounds.iter().map(|round| &round[index]).collect();
    of_figure.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    of_figure[of_figure.len() / 2].clone()
}
