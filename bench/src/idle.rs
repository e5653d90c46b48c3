//! Measures what an instance on PostgreSQL costs while it has nothing to do.

use std::{path::PathBuf, sync::Arc, time::Duration};

use annals::{EventStore, Handler, HandlerError, LocalBus, Message, Runtime, Service, Subscription, Work};
use annals_postgres::{PostgresStore, Settings};
use async_trait::async_trait;
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use tokio::time::sleep;

use crate::{
    Failure,
    postgres::{counters::cpu_seconds, rows, server::Server},
};

/// The time between the start of an instance and the measurement, in which the instance becomes idle.
const REST: Duration = Duration::from_secs(5);

/// Measures an idle instance with several subscriptions: the CPU time of its process and of its database server.
///
/// Starts its own server unless `DATABASE_URL` names one. The CPU time of a server that `DATABASE_URL` names is
/// unknown.
#[derive(clap::Args)]
pub struct IdleArguments {
    /// The number of seconds to measure, during which no event is recorded.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// The number of subscriptions.
    #[arg(long, default_value_t = 4)]
    subscriptions: u32,
    /// The number of lanes per subscription.
    #[arg(long, default_value_t = 4)]
    lanes: u32,
    /// The number of events in the log.
    #[arg(long, default_value_t = 10_000)]
    events: i64,
    /// Run as if behind a connection pooler, without notifications from other processes.
    #[arg(long)]
    pooled: bool,
    /// Folder for the data of the server.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Print one JSON object per figure, instead of a table.
    #[arg(long)]
    json: bool,
}

struct Nothing;

#[async_trait]
impl Handler for Nothing {
    async fn handle(&self, _: &Message, _: &mut Work) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Runs the benchmark until it ends or is interrupted, and then stops the server.
pub async fn run(arguments: IdleArguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &IdleArguments, server: &Server) -> Result<(), Failure> {
    let IdleArguments { seconds, subscriptions, lanes, .. } = *arguments;
    let separator = if server.url.contains('?') { '&' } else { '?' };
    let url = format!("{}{separator}pooled={}", server.url, arguments.pooled);
    let store = PostgresStore::connect(&url, Settings::default()).await?;
    rows::fill(&server.url, arguments.events).await?;
    let of_store: Arc<dyn EventStore> = Arc::new(store.clone());
    let service = (0..subscriptions).fold(Service::new("idle", of_store.clone()), |service, number| {
        service.subscribe(Subscription::new(&format!("idle.{number}"), Nothing).lanes(lanes))
    });
    let mut runtime = Runtime::shared("idle");
    runtime.start(vec![service], Arc::new(LocalBus::default())).await?;
    let head = store.status().await?.head;
    eprintln!("{subscriptions} subscriptions of {lanes} lanes, on a log of {head} events");
    sleep(REST).await;
    // Returns the CPU seconds of this process alone, and of this process together with its server.
    let now = || (cpu_seconds(None), cpu_seconds(server.pid()));
    let before = now();
    sleep(Duration::from_secs(seconds)).await;
    let after = now();
    runtime.drain(REST).await?;
    store.close().await?;
    let percent = |used: f64| used * 100.0 / seconds as f64;
    let own = percent(after.0 - before.0);
    let of_server = server.pid().map(|_| percent(after.1 - before.1) - own);
    if arguments.json {
        let figure = serde_json::json!({
            "workload": "idle", "subscriptions": subscriptions, "lanes": lanes, "pooled": arguments.pooled, "seconds": seconds,
            "cpu_percent": own, "cpu_percent_server": of_server, "goal": "< 1",
        });
        println!("{figure}");
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(["idle for", "subscriptions", "lanes of each", "CPU % of the process", "of its server", "goal"]);
    table.add_row([
        format!("{seconds} s"),
        subscriptions.to_string(),
        lanes.to_string(),
        format!("{own:.2}"),
        of_server.map_or("not known".into(), |of_server| format!("{of_server:.2}")),
        "< 1 each".into(),
    ]);
    println!("{table}");
    println!("of one processor; its clock counts hundredths of a second");
    Ok(())
}
