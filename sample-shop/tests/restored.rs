//! Some databases are restored to a moment before the end of their Kafka topics, and some are new under topics that
//! another log has filled. A service reports this when it starts, and one command repairs it, even if that command is
//! killed at any moment.
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
    collections::BTreeMap,
    fs,
    io::Write,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use rust_decimal::Decimal;
use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions, sqlite::SqliteConnectOptions};
use tokio::task::spawn_blocking;

use self::{
    schemas::{ROLES, Schemas, bus},
    serving::{PATIENCE, Serving},
    summary::business,
};

/// The number of orders in each load during which databases are dumped and services are killed. SHOP_RESTORED_ORDERS
/// overrides it.
const ORDERS: u64 = 150;
/// How many times each recovery is killed. Each attempt runs longer than the one before.
const KILLED: u64 = 4;
/// The time by which each attempt runs longer.
const KILLED_AFTER: Duration = Duration::from_millis(350);

/// The longest time until the sagas of recovered orders have ended. `LOOK` is the interval between checks.
const SAGAS_END: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(500);

fn orders() -> u64 {
    std::env::var("SHOP_RESTORED_ORDERS").map_or(ORDERS, |orders| orders.parse().unwrap())
}

/// Returns the arguments of a customer. The same seed gives the same orders with the same keys.
fn load(seed: &str, orders: u64) -> Vec<String> {
    let unlucky = ["--decline-rate", "0.1", "--cancel-rate", "0.05", "--stock-factor", "0.8", "--concurrency", "16"];
    let named = ["--seed", seed, "--generate", &orders.to_string()].map(str::to_owned);
    named.into_iter().chain(unlucky.map(str::to_owned)).collect()
}

fn words(load: &[String]) -> Vec<&str> {
    load.iter().map(String::as_str).collect()
}

fn shop(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Asserts that a service refuses to start because its store does not match the topics. The service ends with exit code
/// 1, and its error names the problem and the remedy.
fn is_refused(role: &str, store: &str, bus: &str, parts: &[&str]) {
    let mut serving = shop(&["serve", role, "--store", store, "--bus", bus, "--http", "127.0.0.1:0"]).spawn().unwrap();
    let started = Instant::now();
    while serving.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            serving.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = serving.wait_with_output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in ["topic ", "is ahead of the log", "annals recover", "position"].iter().chain(parts) {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
}

fn recover(store: &str, bus: &str, more: &[&str]) -> Command {
    let words = ["ops", "recover", "--store", store, "--bus", bus, "--by", "test", "--reason", "restored", "--yes"];
    shop(&[&words, more].concat())
}

/// Kills the recovery several times, each time later, and then lets it finish.
fn recovered(store: &str, bus: &str, more: &[&str]) -> Value {
    let dry = recover(store, bus, &[more, &["--dry-run", "--json"]].concat()).output().unwrap();
    assert_eq!(dry.status.code(), Some(0), "{}", text(&dry));
    for after in 1..=KILLED {
        let mut killed = recover(store, bus, more).spawn().unwrap();
        // The moment of the kill is what this test varies, so there is no condition to wait for.
        std::thread::sleep(KILLED_AFTER * after as u32);
        _ = killed.kill();
        killed.wait().unwrap();
    }
    let output = recover(store, bus, &[more, &["--json"]].concat()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let again = recover(store, bus, more).output().unwrap();
    assert_eq!(again.status.code(), Some(0), "{}", text(&again));
    assert!(text(&again).contains("nothing to recover"), "{}", text(&again));
    println!("{}{}", text(&dry), text(&output));
    serde_json::from_slice(&dry.stdout).unwrap()
}

/// Asserts that the topics match the log.
fn are_verified(store: &str, bus: &str) {
    let verified = shop(&["ops", "verify", "--store", store, "--bus", bus]).output().unwrap();
    assert_eq!(verified.status.code(), Some(0), "{}", text(&verified));
}

impl Schemas {
    fn dump(&self, role: &str) -> Vec<u8> {
        let dump = server::program("pg_dump").arg("--schema").arg(self.name(role)).arg(&self.server).output().unwrap();
        assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
        dump.stdout
    }

    /// Replaces the schema with the content of the dump.
    async fn restore(&self, role: &str, dump: &[u8]) {
        let sql = format!("DROP SCHEMA {} CASCADE", self.name(role));
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connection().await).await.unwrap();
        let mut psql = server::program("psql");
        psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", &self.server]).stdin(Stdio::piped());
        let mut restoring = psql.stdout(Stdio::null()).spawn().unwrap();
        restoring.stdin.take().unwrap().write_all(dump).unwrap();
        assert!(restoring.wait().unwrap().success());
    }

    async fn placed(&self) -> i64 {
        self.ask("order", "SELECT count(*) FROM annals.events WHERE type = 'order.placed'").await
    }

    async fn until_placed(&self, placed: i64) {
        let started = Instant::now();
        while self.placed().await < placed {
            assert!(started.elapsed() < PATIENCE, "{placed} orders were never placed");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Checks that every confirmed order was paid once, and that no other order was paid.
    async fn money_is_conserved(&self) {
        let mut paid: BTreeMap<String, Decimal> = BTreeMap::new();
        let moved = "SELECT data->>'order_id', type, data->>'amount' FROM annals.events
                      WHERE type IN ('payment.charged', 'payment.refunded') AND data->>'order_id' IS NOT NULL";
        let moved: Vec<(String, String, String)> =
            sqlx::query_as(self.sql("payment", moved)).fetch_all(&mut self.connection().await).await.unwrap();
        for (order, kind, amount) in moved {
            let amount: Decimal = amount.parse().unwrap();
            *paid.entry(order).or_default() += if kind == "payment.charged" { amount } else { -amount };
        }
        let ended =
            "SELECT data->>'order_id', type FROM annals.events WHERE type IN ('order.confirmed', 'order.cancelled')";
        let ended: Vec<(String, String)> =
            sqlx::query_as(self.sql("order", ended)).fetch_all(&mut self.connection().await).await.unwrap();
        for (order, kind) in ended {
            let paid = paid.remove(&order).unwrap_or_default();
            assert_eq!(paid > Decimal::ZERO, kind == "order.confirmed", "{kind} of {order}: {paid} was paid");
        }
        assert!(paid.values().all(|left| *left == Decimal::ZERO), "paid for orders that did not end: {paid:?}");
    }
}

/// Runs the services, dumps the databases of `restored` while customers buy, and kills all services during a later
/// sale. Then restores those databases.
async fn are_restored(restored: &[&str]) {
    let (broker, schemas) = (Broker::start(), Schemas::new());
    let bus = bus(&broker);
    let start = || ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus));
    let mut shop = start();
    let (before, meanwhile, killed) = (load("1", 40), load("2", orders()), load("3", orders()));
    business(&shop[0].buy(&words(&before)));
    // Each dump is taken at a different moment.
    let mut dumps = Vec::new();
    let customer = shop[0].customer(&words(&meanwhile)).spawn().unwrap();
    for (number, role) in restored.iter().enumerate() {
        schemas.until_placed(40 + 20 * (number as i64 + 1)).await;
        dumps.push((*role, schemas.dump(role)));
    }
    let sold = spawn_blocking(|| customer.wait_with_output().unwrap()).await.unwrap();
    business(&sold);
    let placed = schemas.placed().await;
    let customer: Child = shop[0].customer(&words(&killed)).spawn().unwrap();
    schemas.until_placed(placed + orders() as i64 / 2).await;
    shop.iter_mut().for_each(|service| service.signal("KILL"));
    drop(shop);
    drop(spawn_blocking(|| customer.wait_with_output().unwrap()).await.unwrap());
    for (role, dump) in &dumps {
        schemas.restore(role, dump).await;
        is_refused(role, &schemas.url(role), &bus, &["which is this log"]);
        let recovered = recovered(&schemas.url(role), &bus, &[]);
        assert!(recovered["taken_back"].as_i64() > Some(0), "{recovered}");
    }
    let shop = start();
    for load in [&meanwhile, &killed, &load("4", 40)] {
        business(&bought(&shop[0], load));
    }
    let running = recover(&schemas.url(restored[0]), &bus, &[]).output().unwrap();
    assert_eq!(running.status.code(), Some(2), "{}", text(&running));
    assert!(text(&running).contains("instances of services run on the store"), "{}", text(&running));
    schemas.are_whole(&broker).await;
    schemas.money_is_conserved().await;
    ROLES.iter().for_each(|role| are_verified(&schemas.url(role), &bus));
    schemas::end(shop);
    schemas.drop().await;
}

#[tokio::test]
async fn restored_participant_ends_consistent() {
    are_restored(&["inventory"]).await;
}

#[tokio::test]
async fn restored_saga_service_ends_consistent() {
    are_restored(&["order"]).await;
}

#[tokio::test]
async fn four_services_restored_to_different_moments_end_consistent() {
    are_restored(&["payment", "order", "notification", "inventory"]).await;
}

#[tokio::test]
async fn new_databases_under_used_topics_are_detected_and_begin_anew() {
    let (broker, before, schemas) = (Broker::start(), Schemas::new(), Schemas::new());
    let bus = bus(&broker);
    let shop = ROLES.map(|role| Serving::start(role, &before.url(role), &bus));
    business(&shop[0].buy(&words(&load("1", 40))));
    schemas::end(shop);
    before.drop().await;
    for role in ROLES {
        let store = schemas.url(role);
        is_refused(role, &store, &bus, &["which this store does not know", "--anew", &format!("--service {role}")]);
        recovered(&store, &bus, &["--service", role, "--anew"]);
    }
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus));
    business(&shop[0].buy(&words(&load("1", 40))));
    schemas.hold_together().await;
    schemas.money_is_conserved().await;
    ROLES.iter().for_each(|role| are_verified(&schemas.url(role), &bus));
    schemas::end(shop);
    schemas.drop().await;
}

/// Hands in the orders repeatedly until the totals are correct. The shop recognises the restored orders immediately,
/// but their sagas may need more time.
fn bought(shop: &Serving, load: &[String]) -> Output {
    let until = Instant::now() + SAGAS_END;
    loop {
        let bought = shop.buy(&words(load));
        if bought.status.success() || Instant::now() > until {
            return bought;
        }
        std::thread::sleep(LOOK);
    }
}

/// All services share one SQLite file. After the file is lost, a copy replaces it in the first round, and an empty
/// store in the second.
#[tokio::test]
async fn restored_or_lost_file_ends_consistent() {
    let (broker, folder) = (Broker::start(), tempfile::tempdir().unwrap());
    let bus = bus(&broker);
    let (live, copy) = (folder.path().join("shop.db"), folder.path().join("copy.db"));
    let store = format!("sqlite:{}", live.display());
    let mut shop = Serving::start("all", &store, &bus);
    business(&shop.buy(&words(&load("1", 40))));
    let mut connection = SqliteConnectOptions::new().filename(&live).connect().await.unwrap();
    sqlx::query("VACUUM INTO $1").bind(copy.to_str().unwrap()).execute(&mut connection).await.unwrap();
    drop(connection);
    business(&shop.buy(&words(&load("2", 40))));
    for is_lost in [false, true] {
        shop.signal("KILL");
        drop(shop);
        for file in ["", "-wal", "-shm"] {
            _ = fs::remove_file(format!("{}{file}", live.display()));
        }
        let services: Vec<&str> = ROLES.iter().flat_map(|role| ["--service", role]).collect();
        let (named, more): (_, &[&str]) = match is_lost {
            true => ("which this store does not know", &services),
            false => ("which is this log", &[]),
        };
        if !is_lost {
            fs::copy(&copy, &live).unwrap();
        }
        is_refused("all", &store, &bus, &[named]);
        let back = recovered(&store, &bus, more);
        assert!(back["taken_back"].as_i64() > Some(0), "{back}");
        shop = Serving::start("all", &store, &bus);
        for seed in ["1", "2", "3"] {
            business(&bought(&shop, &load(seed, 40)));
        }
        are_verified(&store, &bus);
    }
}
