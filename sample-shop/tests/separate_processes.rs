//! Runs the four services in separate processes, each with its own schema, over a real Kafka. The result equals the
//! result of a run in one process, no matter which process is killed.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod schemas;
#[path = "../../tests/tests/postgres/server.rs"]
#[allow(dead_code)]
mod server;
mod serving;
mod summary;
#[path = "../../tests/tests/kafka/topic.rs"]
#[allow(dead_code)]
mod topic;

use std::{
    ops::Range,
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use serde_json::Value;
use tokio::task::spawn_blocking;

use self::{
    schemas::{ROLES, Schemas, bus, end},
    server::Server,
    serving::Serving,
    summary::business,
};

/// The time during which faults occur, in seconds. The variable SHOP_FAULT_SECONDS sets another time; a release is
/// tested with two minutes.
const FAULT_SECONDS: u64 = 18;
/// The number of orders to submit for each second of that time: more than the machine of the tests can complete in one
/// second.
const ORDERS_PER_SECOND: u64 = 65;
/// How long a process stays stopped: longer than a Kafka session (three seconds here), after which brokers remove a
/// silent member, and longer than the five or six seconds after which other instances take over from an instance
/// without a heartbeat.
const STOPPED: Duration = Duration::from_secs(8);
/// The number of concurrent orders.
const AT_ONCE: &str = "32";

fn without_bus(mut line: Value) -> Value {
    line.as_object_mut().unwrap().remove("bus");
    line
}

fn embedded(arguments: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    without_bus(business(
        &command.args(["run", "--json", "--quiet", "--store", "memory:"]).args(arguments).output().unwrap(),
    ))
}

#[tokio::test]
async fn december_in_four_processes_equals_december_in_one() {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs next to the checkout", orders.display());
    let arguments = ["--stock-factor", "1.5", "--decline-rate", "0", "--orders", orders.to_str().unwrap()];
    let broker = Broker::start();
    let schemas = Schemas::new();
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus(&broker)));
    assert_eq!(without_bus(business(&shop[0].buy(&arguments))), embedded(&arguments));
    schemas.are_whole(&broker).await;
    end(shop);
    schemas.drop().await;
}

/// The time during which faults occur, and the number of orders for that time.
struct Storm {
    lasts: Duration,
    orders: Vec<String>,
}

impl Storm {
    fn new(orders_per_second: u64) -> Self {
        let seconds = std::env::var("SHOP_FAULT_SECONDS").map_or(FAULT_SECONDS, |seconds| seconds.parse().unwrap());
        let generate = (seconds * orders_per_second).to_string();
        let unlucky = ["--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7", "--stock-factor", "0.7"];
        let orders = ["--generate", &*generate].into_iter().chain(unlucky).map(str::to_owned).collect();
        Self { lasts: Duration::from_secs(seconds), orders }
    }

    fn orders(&self) -> Vec<&str> {
        self.orders.iter().map(String::as_str).collect()
    }

    fn customer(&self, at: &Serving) -> Child {
        at.customer(&[&self.orders()[..], &["--concurrency", AT_ONCE]].concat()).spawn().unwrap()
    }

    /// While the customer buys, causes faults at random intervals from the range `every`, in milliseconds. Then asserts
    /// that the customer's summary equals that of a run in one process.
    async fn rages(&self, mut customer: Child, every: Range<u64>, mut fault: impl AsyncFnMut(usize)) {
        let started = Instant::now();
        let mut faults = 0;
        let mut in_time = 0;
        while started.elapsed() < self.lasts {
            // This sleep is not a wait for a condition: it makes the moment of the fault random.
            tokio::time::sleep(Duration::from_millis(fastrand::u64(every.clone()))).await;
            in_time += usize::from(customer.try_wait().unwrap().is_none());
            fault(faults).await;
            faults += 1;
        }
        println!("{faults} faults in {:?}, {in_time} of them while customers bought", started.elapsed());
        assert!(in_time > faults / 2, "the customer was done before most of the faults: little was tested");
        let line = business(&spawn_blocking(|| customer.wait_with_output().unwrap()).await.unwrap());
        println!("all sagas had ended after {:?}", started.elapsed());
        assert_eq!(without_bus(line), embedded(&self.orders()), "after {faults} faults");
    }
}

#[tokio::test]
async fn killed_services_conserve_money_and_units() {
    // The faults hit random processes and the broker, so half as many orders are enough to keep the shop busy.
    let storm = Storm::new(ORDERS_PER_SECOND / 2);
    let mut broker = Broker::start();
    let schemas = Schemas::new();
    // Two instances of each service share the work. A fault in one instance must not affect the other instance.
    let start = |role: &&str| Serving::start(role, &schemas.url(role), &bus(&broker));
    let mut shop: Vec<Option<Serving>> = ROLES.iter().chain(&ROLES).map(start).map(Some).collect();
    // The customer talks to the first instance of the order service, which the test also kills.
    let customer = storm.customer(shop[0].as_ref().unwrap());
    storm
        .rages(customer, 1_000..4_000, async |number| {
            if number % 16 == 5 {
                broker.kill();
                broker.resume();
                return;
            }
            let victim = &mut shop[fastrand::usize(..ROLES.len() * 2)];
            *victim = victim.take().map(Serving::kill_and_restart);
        })
        .await;
    schemas.are_whole(&broker).await;
    drop(shop);
    schemas.drop().await;
}

/// When a stopped process continues, it still believes that it owns the work in progress, its partitions and its lanes.
#[tokio::test]
async fn services_stopped_for_long_change_nothing_when_resumed() {
    let storm = Storm::new(ORDERS_PER_SECOND / 2);
    let broker = Broker::start();
    let schemas = Schemas::new();
    let start = |role: &&str| Serving::start(role, &schemas.url(role), &bus(&broker));
    let shop: Vec<Serving> = ROLES.iter().chain(&ROLES).map(start).collect();
    storm
        .rages(storm.customer(&shop[0]), 200..1_000, async |number| {
            // Stops one instance of each service, while the other instance does the work.
            let stopped = &shop[number % 2 * ROLES.len()..][..ROLES.len()];
            stopped.iter().for_each(|service| service.signal("STOP"));
            tokio::time::sleep(STOPPED).await;
            stopped.iter().for_each(|service| service.signal("CONT"));
        })
        .await;
    schemas.are_whole(&broker).await;
    end(shop);
    schemas.drop().await;
}

#[tokio::test]
async fn killed_database_causes_only_a_pause() {
    let storm = Storm::new(ORDERS_PER_SECOND);
    let broker = Broker::start();
    let mut server = Server::start().await;
    let schemas = Schemas::at(server.url());
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus(&broker)));
    storm
        .rages(storm.customer(&shop[0]), 1_000..4_000, async |_| {
            server.kill();
            server.resume().await;
        })
        .await;
    schemas.are_whole(&broker).await;
    // No process was restarted: each process recovered without help.
    end(shop);
}
