//! The command line of the sample shop.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use annals::StartError;
use rust_decimal::Decimal;
use sample_shop::{
    Failure,
    arguments::{Arguments, Command, Connection, HttpUrl, Output, StoreUrl},
    bus,
    claim::Claim,
    input::{Demand, Invoices, Source, Tally},
    remote::{self, RemoteOutcome},
    report::{self, Cancelled, Progress, Summary},
    run::{self, Outcome, Settings},
    serve,
    stop::Stop,
    store::Store,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The maximum number of rejected invoices, and of parked messages, that a run lists one by one.
const SHOWN_MAX: usize = 10;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    // `run` lists the parked messages at its end, while `serve` logs each of them at once.
    let told = if matches!(arguments.command, Command::Serve(_)) { "error,annals=warn" } else { "error" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| told.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // `ops` handles Ctrl-C itself.
    if let Command::Ops { words } = arguments.command {
        return sample_shop::shop::ops().run(words).await;
    }
    // Runs the command on a worker thread of the runtime. Tasks that the main thread spawns would wait in a queue that
    // busy workers seldom check.
    match tokio::spawn(carry_out(arguments.command)).await.unwrap_or_else(|panic| Err(panic.into())) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sample-shop: {error}");
            ExitCode::from(if needs_a_person(&error) { 1 } else { 2 })
        }
    }
}

/// Returns whether an operator has to act before the store can be served.
fn needs_a_person(error: &Failure) -> bool {
    let refused = error.downcast_ref::<StartError>();
    error.is::<serve::Ended>()
        || refused.is_some_and(|error| matches!(error, StartError::Ahead(_) | StartError::HalfRecovered { .. }))
}

async fn carry_out(command: Command) -> Result<ExitCode, Failure> {
    let stop = Stop::on_signals()?;
    match command {
        Command::Ops { .. } => Err("`ops` is carried out by `main`".into()),
        Command::Run(arguments) => {
            let source = arguments.source()?;
            let stock = source.stock(arguments.stock_factor)?;
            let settings = Settings {
                concurrency: arguments.concurrency as usize,
                decline_rate: arguments.decline_rate(),
                cancel_rate: arguments.cancel_rate(),
                seed: arguments.seed,
                scarce: arguments.stock_factor.of(1_000_000) < 1_000_000,
                input: name_of(&arguments.orders, arguments.seed, source.len()),
                stop: stop.asked.clone(),
                shared_as: arguments.connection.shared_as(),
            };
            match &arguments.http {
                Some(url) => buy(url, &arguments.output, source, stock, settings, &stop).await,
                None => run_shop(&arguments.connection, &arguments.output, source, stock, settings, &stop).await,
            }
        }
        Command::Drain(arguments) => {
            if let StoreUrl::Sqlite(path) = &arguments.connection.store
                && !path.exists()
            {
                return Err(format!("{}: there is no such store to drain", path.display()).into());
            }
            let source = Source::generated(0, 0);
            let settings = Settings {
                concurrency: 1,
                decline_rate: 0.0,
                cancel_rate: 0.0,
                seed: 0,
                scarce: false,
                input: "drain".into(),
                stop: stop.asked.clone(),
                shared_as: arguments.connection.shared_as(),
            };
            run_shop(&arguments.connection, &arguments.output, source, Demand::new(), settings, &stop).await
        }
        Command::Serve(arguments) => {
            serve::serve(arguments, stop.asked.clone()).await?;
            Ok(stop.exit_code())
        }
    }
}

/// Returns the name of the input. Stock is opened once per name: once per file name, or once per number of orders and
/// seed.
fn name_of(orders: &Option<std::path::PathBuf>, seed: u64, count: u64) -> String {
    match orders.as_ref().and_then(|path| path.file_name()) {
        Some(file) => file.to_string_lossy().chars().filter(|c| !c.is_control()).take(100).collect(),
        None => format!("{count} orders of seed {seed}"),
    }
}

async fn run_shop(
    connection: &Connection,
    output: &Output,
    source: Source,
    stock: Demand,
    settings: Settings,
    stop: &Stop,
) -> Result<ExitCode, Failure> {
    let bus = bus::open(&connection.bus).await?;
    let store = Store::open(&connection.store).await?;
    let _claim = Claim::on(&connection.store)?;
    let mut invoices = source.invoices()?;
    let progress = Progress::new(source.len(), output.quiet || output.json);
    let outcome = run::run(store.port(), bus, stock, &mut invoices, settings, |_| progress.inc(1)).await;
    progress.finish();
    store.close().await?;
    let outcome = outcome?;
    if stop.asked.is_cancelled() {
        eprintln!("{}", report::stopped(outcome.unfinished, kept_in(&connection.store).as_deref()));
        return Ok(stop.exit_code());
    }
    Ok(show(connection.store.to_string(), connection.bus.to_string(), output, &invoices, outcome))
}

/// Returns the store that holds the work of this run for the next run; `None` for a store in memory.
fn kept_in(store: &StoreUrl) -> Option<String> {
    (*store != StoreUrl::Memory).then(|| store.to_string())
}

/// Hands in the invoices to a shop in another process.
async fn buy(
    url: &HttpUrl,
    output: &Output,
    source: Source,
    stock: Demand,
    settings: Settings,
    stop: &Stop,
) -> Result<ExitCode, Failure> {
    let mut invoices = source.invoices()?;
    let progress = Progress::new(source.len(), output.quiet || output.json);
    let ended = remote::run(url, stock, &mut invoices, settings, |_| progress.inc(1)).await;
    progress.finish();
    match ended? {
        Ok(RemoteOutcome { outcome, store, bus }) => Ok(show(store, bus, output, &invoices, outcome)),
        Err(unfinished) => {
            eprintln!("{}", report::stopped_there(unfinished, &url.to_string()));
            Ok(stop.exit_code())
        }
    }
}

fn show(store: String, bus: String, output: &Output, invoices: &Invoices, outcome: Outcome) -> ExitCode {
    let rows = invoices.rows();
    if rows.malformed > 0 || matches!(invoices, Invoices::File(_)) {
        eprintln!("{}", report::rows(rows));
    }
    if outcome.repeated > 0 {
        eprintln!("{}", report::repeated(outcome.repeated));
    }
    list("rejected", &outcome.rejected);
    list("parked", &outcome.parked);
    let left_out = rows.all_left_out();
    let useless = rows.malformed > 0 && rows.invoices() == 0;
    if useless {
        eprintln!("sample-shop: no order, return or adjustment could be made of any row");
    }
    let books = &outcome.books;
    let told = ["out_of_stock", "declined", "by_customer"];
    let cancelled = |reason: &str| books.cancelled.get(reason).copied().unwrap_or(0);
    let summary = Summary {
        orders: books.orders,
        confirmed: books.confirmed,
        cancelled: Cancelled {
            out_of_stock: cancelled("out_of_stock"),
            declined: cancelled("declined"),
            by_customer: cancelled("by_customer"),
            other: books.cancelled.values().sum::<u64>() - told.map(cancelled).iter().sum::<u64>(),
        },
        returns: books.returns,
        adjustments: books.adjustments,
        stuck: outcome.stuck,
        parked: outcome.parked.len() as u64,
        charged: books.charged,
        refunded: books.refunded,
        units: books.units,
        elapsed: outcome.elapsed,
        sagas: outcome.sagas,
        latency_us: outcome.latency_us,
        store,
        bus,
        left_out,
        rejected: outcome.rejected.len() as u64,
    };
    let text = if output.json { summary.json() } else { summary.human() };
    if let Err(error) = writeln!(std::io::stdout(), "{text}") {
        eprintln!("sample-shop: the summary could not be written: {error}");
        return ExitCode::from(2);
    }
    let sound = left_out == Tally::default()
        && outcome.rejected.is_empty()
        && summary.stuck == 0
        && summary.parked == 0
        && summary.units.conserved()
        && books.charged >= Decimal::ZERO;
    if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn list(what: &str, reasons: &[String]) {
    for reason in reasons.iter().take(SHOWN_MAX) {
        eprintln!("{what}: {reason}");
    }
    if reasons.len() > SHOWN_MAX {
        eprintln!("and {} more {what}", report::grouped((reasons.len() - SHOWN_MAX) as u64));
    }
}
