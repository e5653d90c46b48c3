//! The PostgreSQL store beside its limits: plain sqlx on the same table, before it and after it in the same run.

mod counters;
mod ours;
mod raw;
mod rows;
mod server;

use std::path::PathBuf;

use annals_postgres::{PostgresStore, Settings};
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use hdrhistogram::Histogram;

use self::{
    counters::{Costs, Counters},
    server::Server,
};
use crate::Failure;

/// Measures the PostgreSQL store.
///
/// It starts a server of its own, unless `DATABASE_URL` names one; then it writes to the schema `annals` there, and the
/// server should have nothing else to do.
#[derive(clap::Args)]
pub struct Arguments {
    /// Commands of each workload.
    #[arg(long, default_value_t = 50_000)]
    commands: usize,
    /// Events in the log before the first workload.
    #[arg(long, default_value_t = 100_000)]
    events: i64,
    /// Events in the log for the second round of rates; 0 leaves it out. 10,000,000 are meant.
    #[arg(long, default_value_t = 0)]
    events_many: i64,
    /// Events to replay; 0 leaves it out.
    #[arg(long, default_value_t = 1_000_000)]
    replay: i64,
    /// Aggregates that are loaded, four times each.
    #[arg(long, default_value_t = 5_000)]
    aggregates: usize,
    /// Where the server has its data: the disk that is measured.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// One JSON object a figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// What came of one side of a workload.
pub struct Measured {
    count: usize,
    seconds: f64,
    /// In microseconds.
    latency: Option<Histogram<u64>>,
}

fn histogram() -> Result<Histogram<u64>, Failure> {
    Ok(Histogram::new(3)?)
}

/// One line of the report.
#[derive(serde::Serialize)]
struct Figure {
    workload: String,
    side: &'static str,
    per_second: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// Of what stands under `of`, by operations per second, or by p50 where that is what counts.
    ratio: Option<f64>,
    of: &'static str,
    goal: &'static str,
    per_thousand: Costs,
}

/// The figures so far.
struct Bench<'s> {
    server: &'s Server,
    figures: Vec<Figure>,
    runs: usize,
}

impl Bench<'_> {
    /// A name that no aggregate had yet. They rise, as those of a real service do.
    fn run(&mut self) -> String {
        self.runs += 1;
        format!("r{:04}", self.runs)
    }

    /// Measures one side, and gives its index.
    async fn measure(
        &mut self,
        workload: &str,
        side: &'static str,
        running: impl Future<Output = Result<Measured, Failure>>,
    ) -> Result<usize, Failure> {
        eprintln!("{workload}, {side}");
        let before = Counters::now(self.server).await?;
        let measured = running.await?;
        let per_thousand = Counters::now(self.server).await?.since(&before, measured.count);
        let quantile = |q| measured.latency.as_ref().map(|latency| latency.value_at_quantile(q) as f64 / 1_000.0);
        self.figures.push(Figure {
            workload: workload.to_owned(),
            side,
            per_second: measured.count as f64 / measured.seconds,
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            ratio: None,
            of: "",
            goal: "",
            per_thousand,
        });
        Ok(self.figures.len() - 1)
    }

    fn rate(&mut self, ours: usize, limit: usize, of: &'static str, goal: &'static str) {
        let ratio = self.figures[ours].per_second / self.figures[limit].per_second;
        let figure = &mut self.figures[ours];
        (figure.ratio, figure.of, figure.goal) = (Some(ratio), of, goal);
    }

    fn goal(&mut self, ours: usize, goal: &'static str) {
        self.figures[ours].goal = goal;
    }

    /// The workloads that are repeated on a larger table: gives where the three of ours stand.
    async fn rates(&mut self, arguments: &Arguments, events: &str) -> Result<[usize; 3], Failure> {
        let url = &self.server.url;
        let count = arguments.commands;
        let few = (count / 25).max(100);
        let named = |workload: &str| format!("{workload}{events}");

        let (workload, run) = (named("commands, 1,024 in flight"), self.run());
        let of_many = self.measure(&workload, "annals", ours::place(url, &run, count, 1_024)).await?;
        let rows = rows::rows(&self.run(), count)?;
        let unnest = self.measure(&workload, "unnest, 2 connections", raw::unnest(url, rows, 2)).await?;
        self.rate(of_many, unnest, "unnest", "≥ 0.8");

        let (workload, run) = (named("commands, 64 in flight"), self.run());
        let of_64 = self.measure(&workload, "annals", ours::place(url, &run, count, 64)).await?;
        let rows = rows::rows(&self.run(), count / 4)?;
        let limit = self.measure(&workload, "INSERT, 64 connections", raw::one_by_one(url, rows, 64)).await?;
        self.rate(of_64, limit, "INSERT", "≥ 6, p99 < its p50");

        let (workload, run) = (named("commands, one at a time"), self.run());
        let alone = self.measure(&workload, "annals", ours::place(url, &run, few, 1)).await?;
        let rows = rows::rows(&self.run(), few)?;
        let limit = self.measure(&workload, "INSERT, 1 connection", raw::one_by_one(url, rows, 1)).await?;
        let p50 = |index: usize| self.figures[index].p50_ms.unwrap_or_default();
        let ratio = p50(alone) / p50(limit);
        let figure = &mut self.figures[alone];
        (figure.ratio, figure.of, figure.goal) = (Some(ratio), "p50 of INSERT", "≤ 1.1");
        Ok([of_many, of_64, alone])
    }

    async fn others(&mut self, arguments: &Arguments, of_64: usize) -> Result<(), Failure> {
        let url = &self.server.url;
        let (aggregates, count) = (arguments.aggregates, arguments.commands);
        for (workload, warm, goal) in
            [("load, decide, append: warm", true, "≥ 0.8"), ("load, decide, append: cold", false, "≥ 0.3")]
        {
            let run = self.run();
            let again = self.measure(workload, "annals", ours::again(url, &run, aggregates, 4, warm)).await?;
            self.rate(again, of_64, "64 in flight", goal);
        }
        let run = self.run();
        let contended =
            self.measure("64 tasks, one aggregate", "annals", ours::contended(url, &run, count / 2)).await?;
        self.goal(contended, "≥ 5,000/s");

        let (workload, run) = ("100 events a commit", self.run());
        let hundreds = self.measure(workload, "annals", ours::hundreds(url, &run, count * 2)).await?;
        // The same rows in another category.
        let rows = rows::counted(&self.run(), count * 2);
        let limit = self.measure(workload, "unnest, 2 connections", raw::unnest(url, rows, 2)).await?;
        self.rate(hundreds, limit, "unnest", "≥ 0.7");

        for (workload, far) in [("commit to subscriber, 1,000/s", false), ("the same, another store", true)] {
            let run = self.run();
            let heard = self.measure(workload, "annals", ours::heard(url, &run, (count / 10).max(1_000), far)).await?;
            self.goal(heard, "p50 ≤ 3, p99 ≤ 15 ms");
        }
        Ok(())
    }

    /// On a log of nothing but orders.
    async fn replay(&mut self, events: i64) -> Result<(), Failure> {
        let url = &self.server.url;
        rows::empty(url).await?;
        rows::fill(url, events).await?;
        // Each of them once before, so that both find the log in memory.
        raw::copy(url).await?;
        let replay = self.measure("typed replay", "annals", ours::replay(url)).await?;
        let limit = self.measure("typed replay", "COPY BINARY and serde", raw::copy(url)).await?;
        self.rate(replay, limit, "COPY", "≥ 0.8");
        Ok(())
    }
}

/// Runs all of it.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    // Makes the tables.
    PostgresStore::connect(&server.url, Settings::default()).await?.close().await?;
    let mut bench = Bench { server: &server, figures: Vec::new(), runs: 0 };
    if arguments.replay > 0 {
        bench.replay(arguments.replay).await?;
        rows::empty(&server.url).await?;
    }
    rows::fill(&server.url, arguments.events).await?;
    let few = bench.rates(&arguments, "").await?;
    bench.others(&arguments, few[1]).await?;
    if arguments.events_many > 0 {
        rows::fill(&server.url, arguments.events_many).await?;
        let many = bench.rates(&arguments, &format!("; {} events", arguments.events_many)).await?;
        for (many, few) in many.into_iter().zip(few) {
            let ratio = bench.figures[many].per_second / bench.figures[few].per_second;
            bench.figures[many].workload += &format!(" ({ratio:.2} of before, ≥ 0.9)");
        }
    }
    report(&bench.figures, arguments.json);
    Ok(())
}

fn report(figures: &[Figure], json: bool) {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "workload",
        "side",
        "per second",
        "ratio",
        "of",
        "goal",
        "p50 ms",
        "p99 ms",
        "trips",
        "commits",
        "WAL kB",
        "CPU s",
    ]);
    for figure in figures {
        if json {
            println!("{}", serde_json::to_string(figure).unwrap_or_default());
            continue;
        }
        let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
        let Costs { round_trips, commits, wal_kilobytes, cpu_seconds } = figure.per_thousand;
        table.add_row([
            figure.workload.clone(),
            figure.side.to_owned(),
            format!("{:.0}", figure.per_second),
            optional(figure.ratio),
            figure.of.to_owned(),
            figure.goal.to_owned(),
            optional(figure.p50_ms),
            optional(figure.p99_ms),
            format!("{round_trips:.0}"),
            format!("{commits:.0}"),
            format!("{wal_kilobytes:.0}"),
            format!("{cpu_seconds:.3}"),
        ]);
    }
    if !json {
        println!("{table}");
        println!("trips, commits, WAL and CPU are per 1,000 operations; CPU is of both sides of the connection");
    }
}
