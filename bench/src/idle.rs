//! What an instance on PostgreSQL costs while there is nothing to do.

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

/// How long an instance has to come to rest.
const REST: Duration = Duration::from_secs(5);

/// Measures an instance with several subscriptions while nothing happens: the CPU of its process, and of its server.
///
/// It starts a server of its own, unless `DATABASE_URL` names one: then that one's CPU is not known.
#[derive(clap::Args)]
pub struct Arguments {
    /// How long nothing happens.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Subscriptions.
    #[arg(long, default_value_t = 4)]
    subscriptions: u32,
    /// Lanes of each.
    #[arg(long, default_value_t = 4)]
    lanes: u32,
    /// Events in the log.
    #[arg(long, default_value_t = 10_000)]
    events: i64,
    /// As behind a connection pooler, where other processes are not heard.
    #[arg(long)]
    pooled: bool,
    /// Where the server has its data.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// One JSON object a figure, instead of a table.
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

/// Runs it, or until it is interrupted; then, too, the server is stopped.
pub async fn run(arguments: Arguments) -> Result<(), Failure> {
    let server = Server::start(&arguments.directory)?;
    Server::until_interrupted(measure(&arguments, &server)).await
}

async fn measure(arguments: &Arguments, server: &Server) -> Result<(), Failure> {
    let Arguments { seconds, subscriptions, lanes, .. } = *arguments;
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
    // Of this process alone, and of both.
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
