//! The command line of the sample shop.

use std::{ffi::OsString, io::IsTerminal, path::PathBuf, process::ExitCode};

use annals::StartError;
use shop_driver::{
    card::Chances,
    input::{Demand, Source},
    over_http::{self, HttpUrl, RemoteOutcome},
    report::{self, Progress},
    run::Settings,
};

use crate::{
    Failure,
    arguments::{Arguments, Command, Connection, Drain, Output, Run, StoreUrl},
    bus,
    claim::Claim,
    run::{self, Places},
    serve,
    stop::Stop,
    store::Store,
};

/// Carries out the command line of this process. The function is part of the library because code of an async function
/// is compiled in the crate that runs its future: in the binary, most of the library would be compiled a second time.
#[tokio::main]
pub async fn main() -> ExitCode {
    let arguments = Arguments::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    // `run` lists the parked messages at its end, while `serve` logs each of them at once.
    let default = if matches!(arguments.command, Command::Serve(_)) { "error,annals=warn" } else { "error" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    // `ops` handles Ctrl-C itself.
    if let Command::Ops { words } = arguments.command {
        return ops(words).await;
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

#[cfg(feature = "ops")]
async fn ops(words: Vec<OsString>) -> ExitCode {
    crate::ops::ops().run(words).await
}

#[cfg(not(feature = "ops"))]
async fn ops(_: Vec<OsString>) -> ExitCode {
    eprintln!(
        "sample-shop: this sample-shop was built without the `annals` command; build it with the feature: cargo run --release \
         -p sample-shop --features ops -- ops …"
    );
    ExitCode::from(2)
}

async fn carry_out(command: Command) -> Result<ExitCode, Failure> {
    let stop = Stop::on_signals()?;
    match command {
        Command::Ops { .. } => Err("`ops` is carried out by `main`".into()),
        Command::Run(arguments) => run(arguments, &stop).await,
        Command::Drain(arguments) => drain(arguments, &stop).await,
        Command::Serve(arguments) => {
            serve::serve(arguments, stop.asked.clone()).await?;
            Ok(stop.exit_code())
        }
    }
}

async fn run(arguments: Run, stop: &Stop) -> Result<ExitCode, Failure> {
    let source = arguments.source()?;
    let stock = source.stock(arguments.stock_factor)?;
    let settings = Settings {
        concurrency: arguments.concurrency as usize,
        chances: Chances {
            seed: arguments.seed,
            decline_rate: arguments.decline_rate(),
            cancel_rate: arguments.cancel_rate(),
        },
        scarce: arguments.stock_factor.of(1_000_000) < 1_000_000,
        input: name_of(&arguments.orders, arguments.seed, source.len()),
        stop: stop.asked.clone(),
    };
    match &arguments.http {
        Some(url) => run_over_http(url, &arguments.output, source, stock, settings, stop).await,
        None => run_shop(&arguments.connection, &arguments.output, source, stock, settings, stop).await,
    }
}

async fn drain(arguments: Drain, stop: &Stop) -> Result<ExitCode, Failure> {
    if let StoreUrl::Sqlite(path) = &arguments.connection.store
        && !path.exists()
    {
        return Err(format!("{}: there is no such store to drain", path.display()).into());
    }
    let settings = Settings {
        concurrency: 1,
        chances: Chances { seed: 0, decline_rate: 0.0, cancel_rate: 0.0 },
        scarce: false,
        input: "drain".into(),
        stop: stop.asked.clone(),
    };
    let source = Source::generated(0, 0);
    run_shop(&arguments.connection, &arguments.output, source, Demand::new(), settings, stop).await
}

/// Returns the name of the input: the file name, or the number of orders with the seed. Stock is opened once per name.
fn name_of(orders: &Option<PathBuf>, seed: u64, count: u64) -> String {
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
    let places = Places { store: store.port(), bus, shared_as: connection.shared_as() };
    let outcome = run::run(places, stock, &mut invoices, settings, |_| progress.inc(1)).await;
    progress.finish();
    store.close().await?;
    let outcome = outcome?;
    if stop.asked.is_cancelled() {
        eprintln!("{}", report::stopped(outcome.unfinished, kept_in(&connection.store).as_deref()));
        return Ok(stop.exit_code());
    }
    let store = connection.store.to_string();
    let bus = connection.bus.to_string();
    exit_code(report::show(outcome, &invoices, store, bus, output.json))
}

/// Returns the store from which the next run can continue the work of this run; `None` for a store in memory.
fn kept_in(store: &StoreUrl) -> Option<String> {
    (*store != StoreUrl::Memory).then(|| store.to_string())
}

/// Submits the invoices to a shop in another process.
async fn run_over_http(
    url: &HttpUrl,
    output: &Output,
    source: Source,
    stock: Demand,
    settings: Settings,
    stop: &Stop,
) -> Result<ExitCode, Failure> {
    let mut invoices = source.invoices()?;
    let progress = Progress::new(source.len(), output.quiet || output.json);
    let ended = over_http::run(url, stock, &mut invoices, settings, |_| progress.inc(1)).await;
    progress.finish();
    match ended? {
        Ok(RemoteOutcome { outcome, store, bus }) => {
            exit_code(report::show(outcome, &invoices, store, bus, output.json))
        }
        Err(unfinished) => {
            eprintln!("{}", report::stopped_there(unfinished, &url.to_string()));
            Ok(stop.exit_code())
        }
    }
}

fn exit_code(shown: std::io::Result<bool>) -> Result<ExitCode, Failure> {
    match shown {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => Err(format!("the summary could not be written: {error}").into()),
    }
}
