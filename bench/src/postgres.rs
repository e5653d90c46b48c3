//! Compares the PostgreSQL store with its limits. The baselines are plain sqlx on the same table, in the same run as
//! the store.

pub mod counters;
pub mod ours;
mod raw;
pub mod rows;
pub mod server;

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
/// Starts its own server unless `DATABASE_URL` names one. On a server that `DATABASE_URL` names, the benchmark writes
/// to the schema `annals`, and the server should have no other load.
#[derive(clap::Args)]
pub struct PostgresArguments {
    /// The number of commands of each workload.
    #[arg(long, default_value_t = 50_000)]
    commands: usize,
    /// The number of events in the log before the first workload.
    #[arg(long, default_value_t = 100_000)]
    events: i64,
    /// The number of events in the log for the second round of rates; 0 skips the round. The intended value is
    /// 10,000,000.
    #[arg(long, default_value_t = 0)]
    events_many: i64,
    /// The number of events to replay; 0 skips the replay.
    #[arg(long, default_value_t = 1_000_000)]
    replay: i64,
    /// The number of aggregates to load. Each aggregate is loaded four times.
    #[arg(long, default_value_t = 5_000)]
    aggregates: usize,
    /// Folder for the data of the server. The benchmark measures the disk that holds this folder.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// The number of rounds. All figures are measured once per round, and the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

/// One measurement of one side of a workload. The sides of a workload are Annals and the baselines.
pub struct Measured {
    pub count: usize,
    pub seconds: f64,
    /// The latency of each operation, in microseconds.
    pub latency: Option<Histogram<u64>>,
}

pub fn histogram() -> Result<Histogram<u64>, Failure> {
    Ok(Histogram::new(3)?)
}

/// All measurements of one side of a workload.
pub struct Side {
    workload: String,
    name: &'static str,
    samples: Vec<Sample>,
    against: Option<Against>,
    goal: &'static str,
}

#[derive(Clone, Copy)]
struct Sample {
    per_second: f64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    costs: Costs,
}

/// The side to compare with, and the figure to compare.
#[derive(Clone, Copy)]
struct Against {
    side: usize,
    by: fn(&Sample) -> f64,
    what: &'static str,
}

/// The figures measured so far.
pub struct Bench<'s> {
    server: &'s Server,
    pub sides: Vec<Side>,
    /// Further results, printed below the table.
    notes: Vec<String>,
    runs: usize,
}

impl Side {
    /// Returns the median round, ordered by operations per second.
    fn median(&self) -> Sample {
        let mut samples = self.samples.clone();
        samples.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
        samples[samples.len() / 2]
    }
}

impl<'s> Bench<'s> {
    pub fn new(server: &'s Server) -> Self {
        Self { server, sides: Vec::new(), notes: Vec::new(), runs: 0 }
    }

    /// Returns a name that no aggregate has yet. The names are in ascending order, as in a real service.
    fn run(&mut self) -> String {
        self.runs += 1;
        format!("r{:04}", self.runs)
    }

    /// Measures one side one more time. Returns the index of the side.
    pub async fn measure(
        &mut self,
        workload: &str,
        name: &'static str,
        running: impl Future<Output = Result<Measured, Failure>>,
    ) -> Result<usize, Failure> {
        eprintln!("{workload}, {name}");
        let before = Counters::now(self.server).await?;
        let measured = running.await?;
        let costs = Counters::now(self.server).await?.since(&before, measured.count);
        let quantile = |q| measured.latency.as_ref().map(|latency| latency.value_at_quantile(q) as f64 / 1_000.0);
        let per_second = measured.count as f64 / measured.seconds;
        let sample = Sample { per_second, p50_ms: quantile(0.5), p99_ms: quantile(0.99), costs };
        let index = match self.sides.iter().position(|side| side.workload == workload && side.name == name) {
            Some(index) => index,
            None => {
                let workload = workload.to_owned();
                let samples = Vec::new();
                self.sides.push(Side { workload, name, samples, against: None, goal: "" });
                self.sides.len() - 1
            }
        };
        self.sides[index].samples.push(sample);
        Ok(index)
    }

    pub fn rate(&mut self, ours: usize, limit: usize, what: &'static str, goal: &'static str) {
        self.sides[ours].against = Some(Against { side: limit, by: |sample| sample.per_second, what });
        self.goal(ours, goal);
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    pub fn goal(&mut self, ours: usize, goal: &'static str) {
        self.sides[ours].goal = goal;
    }

    /// Measures the workloads that are repeated on a larger table. Returns the indexes of the three sides that run
    /// Annals.
    async fn rates(&mut self, arguments: &PostgresArguments, events: &str) -> Result<[usize; 3], Failure> {
        let url = &self.server.url;
        let count = arguments.commands;
        let few = (count / 25).max(100);
        let named = |workload: &str| format!("{workload}{events}");

        let workload = named("commands, 1,024 in flight");
        let run = self.run();
        let of_many = self.measure(&workload, "annals", ours::place(url, &run, count, 1_024)).await?;
        let rows = rows::rows(&self.run(), count)?;
        let unnest = self.measure(&workload, "unnest, 2 connections", raw::unnest(url, rows, 2)).await?;
        self.rate(of_many, unnest, "unnest", "≥ 0.8");

        let workload = named("commands, 64 in flight");
        let run = self.run();
        let of_64 = self.measure(&workload, "annals", ours::place(url, &run, count, 64)).await?;
        let rows = rows::rows(&self.run(), count / 4)?;
        let limit = self.measure(&workload, "INSERT, 64 connections", raw::one_by_one(url, rows, 64)).await?;
        self.rate(of_64, limit, "INSERT", "≥ 6, p99 < its p50");

        let workload = named("commands, one at a time");
        let run = self.run();
        let alone = self.measure(&workload, "annals", ours::place(url, &run, few, 1)).await?;
        let rows = rows::rows(&self.run(), few)?;
        let limit = self.measure(&workload, "INSERT, 1 connection", raw::one_by_one(url, rows, 1)).await?;
        let p50 = |sample: &Sample| sample.p50_ms.unwrap_or_default();
        self.sides[alone].against = Some(Against { side: limit, by: p50, what: "p50 of INSERT" });
        self.goal(alone, "≤ 1.1");
        Ok([of_many, of_64, alone])
    }

    async fn others(&mut self, arguments: &PostgresArguments, of_64: usize) -> Result<(), Failure> {
        let url = &self.server.url;
        let aggregates = arguments.aggregates;
        let count = arguments.commands;
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

        for (workload, callers) in [("one aggregate, 4 instances", 1), ("the same, 4 callers in each", 4)] {
            let run = self.run();
            let running = ours::four_instances(url, &run, count / 10, callers);
            let contended = self.measure(workload, "annals", running).await?;
            let stream = format!("counter-{}", self.run());
            let running = raw::retry_loops(url, &stream, count / 10, callers);
            let limit = self.measure(workload, "retry loops", running).await?;
            self.rate(contended, limit, "retry loops", "≥ 2");
        }

        let workload = "100 events a commit";
        let run = self.run();
        let hundreds = self.measure(workload, "annals", ours::hundreds(url, &run, count * 2)).await?;
        // The same rows as before, in another category.
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

    /// Measures replays of a log that contains only orders.
    async fn replay(&mut self, events: i64, rounds: usize) -> Result<(), Failure> {
        let url = &self.server.url;
        rows::empty(url).await?;
        rows::fill(url, events).await?;
        // The first copy warms up the caches, so that both sides find the log in memory.
        raw::copy(url).await?;
        for _ in 0..rounds {
            let replay = self.measure("typed replay", "annals", ours::replay(url)).await?;
            let limit = self.measure("typed replay", "COPY BINARY and serde", raw::copy(url)).await?;
            let paged = self.measure("typed replay", "annals, read_log", ours::paged(url)).await?;
            self.rate(paged, limit, "COPY", "");
            self.rate(replay, limit, "COPY", "≥ 0.8");
        }
        Ok(())
    }
}

/// Runs the benchmark until it ends or is interrupted, and then stops the server.
pub async fn run(arguments: PostgresArguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &PostgresArguments, server: &Server) -> Result<(), Failure> {
    // Creates the tables.
    PostgresStore::connect(&server.url, Settings::default()).await?.close().await?;
    let mut bench = Bench::new(server);
    let rounds = arguments.rounds.max(1);
    if arguments.replay > 0 {
        bench.replay(arguments.replay, rounds).await?;
        rows::empty(&server.url).await?;
    }
    rows::fill(&server.url, arguments.events).await?;
    let mut few = [0; 3];
    for _ in 0..rounds {
        few = bench.rates(arguments, "").await?;
        bench.others(arguments, few[1]).await?;
    }
    if arguments.events_many > 0 {
        rows::fill(&server.url, arguments.events_many).await?;
        let mut many = [0; 3];
        for _ in 0..rounds {
            many = bench.rates(arguments, "; many events").await?;
        }
        for (many, few) in many.into_iter().zip(few) {
            let ratio = bench.sides[many].median().per_second / bench.sides[few].median().per_second;
            bench.sides[many].workload += &format!(" ({ratio:.2} of few, ≥ 0.9)");
        }
    }
    report(&bench, arguments.json);
    Ok(())
}

pub fn report(bench: &Bench<'_>, json: bool) {
    let sides = &bench.sides;
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
        "CPU ms",
    ]);
    for side in sides {
        let Sample { per_second, p50_ms, p99_ms, costs } = side.median();
        let Costs { round_trips, commits, wal_kilobytes, cpu_ms } = costs;
        let ratio =
            side.against.map(|against| (against.by)(&side.median()) / (against.by)(&sides[against.side].median()));
        let of = side.against.map_or("", |against| against.what);
        if json {
            let figure = serde_json::json!({
                "workload": side.workload, "side": side.name, "per_second": per_second, "ratio": ratio, "of": of,
                "goal": side.goal, "p50_ms": p50_ms, "p99_ms": p99_ms, "per_thousand": costs,
            });
            println!("{figure}");
            continue;
        }
        let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.2}"));
        table.add_row([
            side.workload.clone(),
            side.name.to_owned(),
            format!("{per_second:.0}"),
            optional(ratio),
            of.to_owned(),
            side.goal.to_owned(),
            optional(p50_ms),
            optional(p99_ms),
            format!("{round_trips:.0}"),
            format!("{commits:.0}"),
            format!("{wal_kilobytes:.0}"),
            format!("{cpu_ms:.1}"),
        ]);
    }
    if !json {
        println!("{table}");
        bench.notes.iter().for_each(|note| println!("{note}"));
        println!(
            "trips, commits, WAL and CPU are per 1,000 operations; CPU is of both sides of the connection, and of no broker"
        );
        println!("a commit is a transaction that has a number of its own: those that only notify others have one too");
    }
}
