//! Runs a relay or a consumer as a separate process that a test can kill or stop.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use annals::{
    Bus, BusError, Consumer, EventStore, Publisher,
    bus::{Bookmark, Outgoing, Partition, Polled, Receipt},
};
use annals_kafka::KafkaBus;
use annals_tests::faulty::{Fault, FaultyStore, Gate};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::Pair;

/// The environment variable that holds the task of the process.
const TASK: &str = "ANNALS_KAFKA_PROCESS";

/// The part of the pair that runs in the process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Role {
    Relay,
    Consumer,
}

/// The point at which the process reports that it has arrived, and then waits to be killed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Point {
    /// The process waits at no point.
    Nowhere,
    /// The relay has read a page, but has not sent it yet.
    Read,
    /// Same as `Read`, but the process continues after a moment. A SIGSTOP makes that moment longer.
    ReadThenOn,
    /// The relay has sent a page, but the page is not acknowledged yet.
    Sent,
    /// The page is acknowledged, but the checkpoint is still before it.
    Acknowledged,
    /// The consumer has committed a batch, but the bus does not know the new offset.
    Offset,
    /// The commit that moves a checkpoint was requested, but is held back.
    BeforeCommit,
    /// The commit is in progress.
    InCommit,
    /// The commit succeeded, but its caller does not know that yet.
    AfterCommit,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    pub pair: Pair,
    pub role: Role,
    /// The instance name under which the process shares its store.
    pub instance: Option<String>,
    pub lanes: u32,
    pub point: Point,
    /// How many times the process passes the point before it stops there.
    pub passes: u32,
}

/// Runs the task of the child process. Each test file has a test that calls this function; in the parent process, that
/// test does nothing.
pub fn run() {
    let Some(task) = env::var_os(TASK) else { return };
    let task: Task = serde_json::from_str(task.to_str().unwrap()).unwrap();
    // The process ends together with the test, no matter how the test ends.
    std::thread::spawn(|| {
        _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(1);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(task.run());
}

fn say(word: &str) {
    // Prints with a single write, so that the reader receives whole lines.
    std::io::stdout().lock().write_all(format!("{word}\n").as_bytes()).unwrap();
}

impl Task {
    async fn run(self) {
        let point = Arc::new(Reached { point: self.point, left: AtomicU32::new(self.passes) });
        let pair = &self.pair;
        let lanes = self.lanes;
        let store = match self.role {
            Role::Relay => pair.source_store().await,
            Role::Consumer => pair.sink_store().await,
        };
        let store = point.clone().watch(store, pair, self.role);
        let bus = Arc::new(Watched { inner: Arc::new(pair.bus().await), point });
        let instance = self.instance.as_deref();
        let _runtime = match self.role {
            Role::Relay => pair.start_relay(store, bus, lanes, instance).await,
            Role::Consumer => pair.start_consumer(store, bus, instance).await,
        };
        say("started");
        std::future::pending::<()>().await;
    }

    /// Starts the process.
    pub fn start(self) -> Process {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "process", "--nocapture"])
            .env(TASK, serde_json::to_string(&self).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Process { child, lines: Some(lines) }
    }
}

/// A process that was started. Dropping the value kills the process.
pub struct Process {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Process {
    /// Waits until the process prints this word.
    pub async fn says(&mut self, word: &'static str) {
        let mut lines = self.lines.take().unwrap();
        let heard = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            while line.trim_end() != word {
                line.clear();
                assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the process has ended");
            }
            lines
        });
        let heard = tokio::time::timeout(Duration::from_secs(60), heard).await;
        self.lines = Some(heard.unwrap_or_else(|_| panic!("the process never says {word:?}")).unwrap());
    }

    pub async fn started(&mut self) {
        self.says("started").await;
    }

    /// Waits until the process has reached its point.
    pub async fn reached(&mut self) {
        self.says("reached").await;
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "the process has ended by itself");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops the whole process with SIGSTOP until [`wake`](Self::wake) is called.
    pub fn stop(&self) {
        self.signal("-STOP");
    }

    pub fn wake(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap().success());
    }
}

/// Counts how many more times the process passes the point before it stops there.
struct Reached {
    point: Point,
    left: AtomicU32,
}

impl Reached {
    fn is_now(&self, point: Point) -> bool {
        point == self.point && self.left.fetch_sub(1, Ordering::AcqRel) == 0
    }

    async fn stay() {
        say("reached");
        std::future::pending().await
    }

    /// Wraps a store so that a commit of the role's checkpoint reaches the point.
    fn watch(self: Arc<Self>, store: Arc<dyn EventStore>, pair: &Pair, role: Role) -> Arc<dyn EventStore> {
        let gate = Gate::new();
        let fault = match self.point {
            Point::BeforeCommit | Point::InCommit => Fault::Hold(gate.clone()),
            Point::AfterCommit => Fault::CrashAfter,
            _ => return store,
        };
        let store = FaultyStore::new(store);
        let place = match role {
            Role::Relay => format!("{}.relay/", pair.service),
            Role::Consumer => format!("{}/", pair.group()),
        };
        let this = self.clone();
        let moves = move |put: &annals::Put| &*put.key.collection == "checkpoint" && put.key.id.starts_with(&place);
        store.when(move |commit| commit.puts.iter().any(&moves) && this.is_now(this.point), fault);
        let watched = store.clone();
        tokio::spawn(async move {
            match self.point {
                Point::AfterCommit => watched.crashed().await,
                _ => gate.reached().await,
            }
            say("reached");
            if self.point == Point::InCommit {
                gate.open();
            }
        });
        Arc::new(store)
    }
}

/// Wraps the bus so that a page of messages reaches the point.
struct Watched {
    inner: Arc<KafkaBus>,
    point: Arc<Reached>,
}

#[async_trait]
impl Publisher for Watched {
    async fn publish(&self, messages: Vec<Outgoing>) -> Result<Receipt, BusError> {
        if self.point.is_now(Point::Read) {
            Reached::stay().await;
        }
        if self.point.is_now(Point::ReadThenOn) {
            say("reached");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let receipt = self.inner.publish(messages).await?;
        let point = self.point.clone();
        let is_sent = point.is_now(Point::Sent);
        Ok(Box::pin(async move {
            if is_sent {
                Reached::stay().await;
            }
            let taken = receipt.await;
            if point.is_now(Point::Acknowledged) {
                Reached::stay().await;
            }
            taken
        }))
    }
}

#[async_trait]
impl Bus for Watched {
    async fn join(&self, group: &str, topics: &[&str]) -> Result<Box<dyn Consumer>, BusError> {
        let inner = self.inner.join(group, topics).await?;
        Ok(Box::new(WatchedConsumer { inner, point: self.point.clone() }))
    }

    async fn join_as(&self, group: &str, topics: &[&str], instance: &str) -> Result<Box<dyn Consumer>, BusError> {
        let inner = self.inner.join_as(group, topics, instance).await?;
        Ok(Box::new(WatchedConsumer { inner, point: self.point.clone() }))
    }
}

struct WatchedConsumer {
    inner: Box<dyn Consumer>,
    point: Arc<Reached>,
}

#[async_trait]
impl Consumer for WatchedConsumer {
    async fn poll(&mut self, max: usize) -> Result<Polled, BusError> {
        self.inner.poll(max).await
    }

    async fn seek(&mut self, partition: &Partition, from: Option<Bookmark>) -> Result<(), BusError> {
        self.inner.seek(partition, from).await
    }

    async fn acknowledge(&mut self, partition: &Partition, next: i64) -> Result<(), BusError> {
        if self.point.is_now(Point::Offset) {
            Reached::stay().await;
        }
        self.inner.acknowledge(partition, next).await
    }
}
