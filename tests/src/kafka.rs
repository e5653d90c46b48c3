//! Finds the Kafka brokers for the tests, and starts brokers that a single test can kill, stop and wipe.

use std::{
    env, fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::distance::Distance;

/// The user who may connect to a broker with SASL.
pub const USER: &str = "shop";
/// The password of that user.
pub const PASSWORD: &str = "correct-horse";
/// The longest time that a broker may take to start, including a start after a crash.
const START: Duration = Duration::from_secs(180);
/// The interval between checks of a starting broker.
const LOOK: Duration = Duration::from_millis(20);

/// Returns the shared brokers of the tests. `./test` starts a broker unless KAFKA_BROKERS names brokers.
pub fn brokers() -> String {
    env::var("KAFKA_BROKERS").unwrap_or_else(|_| panic!("KAFKA_BROKERS is not set: run the tests by ./test"))
}

/// Returns the folder of Kafka's jars, which `./test` fetches.
pub fn jars() -> String {
    env::var("KAFKA_JARS").unwrap_or_else(|_| panic!("KAFKA_JARS is not set: run the tests by ./test"))
}

/// The message that a broker prints if its port is taken.
const PORT_TAKEN: &str = "Address already in use";

/// A broker of a cluster that belongs to one test. The process is a child of the test, so that Ctrl-C ends both.
pub struct Broker {
    folder: TempDir,
    /// The ports of all brokers in the cluster.
    ports: Vec<u16>,
    /// The number of the broker, from 1.
    node: usize,
    /// The security protocol for clients.
    protocol: String,
    /// Whether the broker obeys access control lists.
    has_acls: bool,
    running: Option<Child>,
    /// The proxy between the broker and its clients.
    distance: Option<Distance>,
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Broker {
    /// Starts a cluster of one broker.
    pub fn start() -> Self {
        Self::cluster(1).remove(0)
    }

    /// Starts a cluster of one broker that accepts only clients with this protocol, such as `SASL_SSL`, as the user
    /// [`USER`] with the password [`PASSWORD`].
    pub fn secured(protocol: &str) -> Self {
        Self::by_protocol(1, protocol).remove(0)
    }

    /// Starts a cluster of one broker that obeys access control lists.
    pub fn with_acls() -> Self {
        let mut broker = Self::laid_out(1, "PLAINTEXT").remove(0);
        broker.has_acls = true;
        broker.launch();
        broker.settle();
        broker
    }

    /// Changes the access control lists of a topic with Kafka's own tool: `change` is `add` or `remove`, and `effect`
    /// is `allow` or `deny`.
    pub fn change_acl(&self, change: &str, effect: &str, operation: &str, topic: &str) {
        let mut acls = Command::new("java");
        acls.args(["-XX:TieredStopAtLevel=1", "-cp", &format!("{}/*", jars()), "org.apache.kafka.tools.AclCommand"]);
        acls.args(["--bootstrap-server", &self.address(), &format!("--{change}")]);
        acls.args([&format!("--{effect}-principal"), "User:*", "--operation", operation, "--topic", topic]);
        if change == "remove" {
            acls.arg("--force");
        }
        let output = acls.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Starts a cluster of this many brokers.
    pub fn cluster(brokers: usize) -> Vec<Self> {
        Self::by_protocol(brokers, "PLAINTEXT")
    }

    /// Starts a cluster of one broker. All bytes to and from clients arrive after the delay `one_way`.
    pub async fn at_distance(one_way: Duration) -> Self {
        let mut broker = Self::laid_out(1, "PLAINTEXT").remove(0);
        broker.distance = Some(Distance::to(broker.port(), one_way).await.unwrap());
        broker.launch();
        broker.settle();
        broker
    }

    fn by_protocol(brokers: usize, protocol: &str) -> Vec<Self> {
        let mut tries_left = 3;
        loop {
            let mut cluster = Self::laid_out(brokers, protocol);
            // Each broker waits for the others.
            cluster.iter_mut().for_each(Self::launch);
            match cluster.iter_mut().try_for_each(Self::listens) {
                Ok(()) => return cluster,
                Err(log) if tries_left > 0 && log.contains(PORT_TAKEN) => tries_left -= 1,
                Err(log) => panic!("{log}"),
            }
        }
    }

    fn laid_out(brokers: usize, protocol: &str) -> Vec<Self> {
        let ports = free_ports(brokers);
        let broker = |node| {
            let folder = tempfile::tempdir().unwrap();
            let ports = ports.clone();
            let protocol = protocol.to_owned();
            Self { folder, ports, node, protocol, has_acls: false, running: None, distance: None }
        };
        (1..=brokers).map(broker).collect()
    }

    /// Starts the broker again with its data and on its old port.
    pub fn resume(&mut self) {
        self.launch();
        self.settle();
    }

    /// Starts the broker without waiting until it accepts connections.
    pub fn launch(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log")).unwrap();
        let ports: Vec<_> = self.ports.iter().map(u16::to_string).collect();
        let mut broker = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("kafka/broker"));
        broker.arg(self.folder.path()).arg(ports.join(",")).arg(self.node.to_string());
        // The tests start many brokers, and each lives for seconds only.
        broker.env("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1").env("KAFKA_HEAP", "256m");
        broker.env("KAFKA_PROTOCOL", &self.protocol).env("KAFKA_PASSWORD", PASSWORD);
        if self.has_acls {
            broker.env("KAFKA_ACLS", "yes");
        }
        if let Some(distance) = &self.distance {
            broker.env("KAFKA_ADVERTISED", format!("127.0.0.1:{}", distance.port()));
        }
        broker.env("KAFKA_JARS", jars()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.running = Some(broker.spawn().unwrap());
    }

    /// Waits until the broker accepts connections.
    pub fn settle(&mut self) {
        self.listens().unwrap_or_else(|log| panic!("{log}"));
    }

    /// Waits until the broker accepts connections. The error is the broker's log.
    fn listens(&mut self) -> Result<(), String> {
        let started_at = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port())).is_err() {
            let ended = self.running.as_mut().is_some_and(|running| running.try_wait().unwrap().is_some());
            if ended || started_at.elapsed() > START {
                return Err(fs::read_to_string(self.folder.path().join("log")).unwrap());
            }
            sleep(LOOK);
        }
        Ok(())
    }

    /// Kills the broker with SIGKILL.
    pub fn kill(&mut self) {
        let Some(mut broker) = self.running.take() else { return };
        let id = broker.id();
        // During its setup, the broker is a script with a child process.
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        broker.kill().ok();
        broker.wait().ok();
        for child in children.split_whitespace() {
            Command::new("kill").args(["-9", child]).stderr(Stdio::null()).status().ok();
        }
    }

    /// Removes all data of the broker, which must have been killed.
    pub fn wipe(&mut self) {
        assert!(self.running.is_none(), "the old broker would continue to write");
        fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }

    /// The address at which clients find the broker.
    pub fn address(&self) -> String {
        let port = self.distance.as_ref().map_or_else(|| self.port(), Distance::port);
        format!("127.0.0.1:{port}")
    }

    /// The number of connections to the broker that the proxy has accepted, if there is a proxy.
    pub fn accepted(&self) -> usize {
        self.distance.as_ref().map_or(0, Distance::accepted)
    }

    /// The certificate that clients must trust, if the broker has a certificate.
    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join("broker.pem")
    }

    /// The number of the broker in the cluster, from 1.
    pub fn node(&self) -> i32 {
        self.node as i32
    }

    fn port(&self) -> u16 {
        self.ports[self.node - 1]
    }
}

/// Returns free ports whose next-higher ports are free too. Another process may still take one of them.
fn free_ports(count: usize) -> Vec<u16> {
    let mut ports = Vec::new();
    let mut held = Vec::new();
    while ports.len() < count {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if let Some(second) = port.checked_add(1).and_then(|next| TcpListener::bind(("127.0.0.1", next)).ok()) {
            ports.push(port);
            held.push(second);
        }
        held.push(first);
    }
    ports
}
