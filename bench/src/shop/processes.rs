//! Starts the services, a customer and a broker, each as a separate process.

use std::{
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde::Deserialize;
use tempfile::TempDir;

use super::ROLES;
use crate::{
    Failure,
    postgres::{Measured, histogram},
};

/// The longest time that a broker may take to start.
const START: Duration = Duration::from_secs(60);

/// Returns the schema of a service in this run.
pub fn schema(role: &str, run: &str) -> String {
    format!("{role}_{run}")
}

/// The running services.
pub struct Processes {
    running: Vec<Child>,
    /// The URL of the order service.
    url: String,
}

/// The fields that the benchmark needs from the customer's summary.
#[derive(Deserialize)]
struct Summary {
    orders: usize,
    stuck: u64,
    seconds: f64,
    latency_ms: Quantiles,
}

#[derive(Deserialize)]
struct Quantiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

impl Processes {
    /// Starts each service in its own process, with its own schema.
    pub async fn apart(database: &str, run: &str, bus: &str) -> Result<Self, Failure> {
        let mut processes = Self { running: Vec::new(), url: String::new() };
        for role in ROLES {
            processes.serve(role, &format!("{database}?schema={}", schema(role, run)), bus)?;
        }
        Ok(processes)
    }

    /// Starts all services in one process.
    pub async fn together(database: &str, run: &str) -> Result<Self, Failure> {
        let mut processes = Self { running: Vec::new(), url: String::new() };
        processes.serve("all", &format!("{database}?schema={}", schema("all", run)), "local:")?;
        Ok(processes)
    }

    fn serve(&mut self, role: &str, store: &str, bus: &str) -> Result<(), Failure> {
        let mut command = Command::new(sample_shop()?);
        command.args(["serve", role, "--store", store, "--bus", bus, "--http", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        self.running.push(child);
        // Reading the line blocks this thread, and a proxy between the service and its broker must keep running
        // meanwhile.
        let line = tokio::task::block_in_place(|| lines.next()).ok_or_else(|| format!("serve {role} ended"))??;
        let at = line.split(" at ").nth(1).and_then(|rest| rest.split(',').next());
        if role == "order" || role == "all" {
            self.url = at.ok_or_else(|| format!("serve {role}: {line}"))?.to_owned();
        }
        Ok(())
    }

    /// Starts a customer that submits this many orders, `at_once` at a time, and then stops the services. A different
    /// seed gives different orders.
    pub async fn sell(mut self, orders: usize, at_once: usize, seed: u64) -> Result<Measured, Failure> {
        let mut customer = Command::new(sample_shop()?);
        customer.args(["run", "--json", "--quiet", "--http", &self.url, "--generate", &orders.to_string()]);
        customer.args(["--decline-rate", "0.1", "--cancel-rate", "0", "--concurrency", &at_once.to_string()]);
        customer.args(["--seed", &seed.to_string()]);
        customer.stderr(Stdio::inherit());
        let output = tokio::task::spawn_blocking(move || customer.output()).await??;
        let text = String::from_utf8(output.stdout)?;
        let last = text.lines().last().ok_or("the customer said nothing")?;
        let summary: Summary = serde_json::from_str(last).map_err(|error| format!("{last}: {error}"))?;
        // The summary also counts the orders of earlier customers.
        if summary.stuck > 0 || summary.orders < orders {
            return Err(format!("{} of {orders} orders, {} stuck", summary.orders, summary.stuck).into());
        }
        for child in &mut self.running {
            Command::new("kill").args(["-TERM", &child.id().to_string()]).status()?;
        }
        for mut child in self.running.drain(..) {
            child.wait()?;
        }
        // The summary contains only three quantiles of the distribution.
        let mut latency = histogram()?;
        let Quantiles { p50, p95, p99 } = summary.latency_ms;
        for (ms, share) in [(p50, 60), (p95, 38), (p99, 2)] {
            latency.record_n((ms * 1_000.0) as u64, share)?;
        }
        Ok(Measured { count: orders, seconds: summary.seconds, latency: Some(latency) })
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.running {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// Returns the binary in the folder of this program.
fn sample_shop() -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe()?.with_file_name("sample-shop");
    let missing = || {
        format!(
            "{} is missing: build it, with the same profile, by -p sample-shop --features kafka,postgres",
            beside.display()
        )
    };
    if beside.is_file() { Ok(beside) } else { Err(missing().into()) }
}

/// Returns a port such that this port and the next one are free now, and will most likely be free a moment later.
pub fn free_port() -> Result<u16, Failure> {
    let port = (0..100).find_map(|_| {
        let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        TcpListener::bind(("127.0.0.1", port.checked_add(1)?)).ok().map(|_| port)
    });
    port.ok_or_else(|| "no free port".into())
}

/// A broker without topics. With old topics, services on new stores would process the commands of earlier runs.
pub struct Broker {
    running: Child,
    /// The port of the broker for its clients.
    port: u16,
    /// Deleted after the broker has stopped.
    _folder: TempDir,
}

impl Broker {
    pub fn start(directory: &Path) -> Result<Self, Failure> {
        let port = free_port()?;
        Self::start_at(directory, port, port)
    }

    /// Starts a broker that advertises another port to its clients: the port of a proxy.
    pub fn start_at(directory: &Path, port: u16, advertised: u16) -> Result<Self, Failure> {
        let jars =
            std::env::var("KAFKA_JARS").map_err(|_| "KAFKA_JARS is not set: `./test` fetches them into target/")?;
        let folder = tempfile::tempdir_in(directory)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/kafka/broker");
        let log = std::fs::File::create(folder.path().join("log"))?;
        let mut broker = Command::new(script);
        broker.arg(folder.path()).arg(port.to_string()).env("KAFKA_JARS", jars).stdin(Stdio::null());
        broker.env("KAFKA_ADVERTISED", format!("127.0.0.1:{advertised}"));
        let running = broker.stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut broker = Self { running, port: advertised, _folder: folder };
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if broker.running.try_wait()?.is_some() || started.elapsed() > START {
                return Err(std::fs::read_to_string(broker._folder.path().join("log"))?.into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(broker)
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.running.kill().ok();
        self.running.wait().ok();
    }
}
