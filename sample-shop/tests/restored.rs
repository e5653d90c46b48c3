//! Some databases are restored to a moment before the end of their Kafka topics, and some are empty although another
//! log has filled their topics. A service reports such a mismatch when it starts, and one command repairs the mismatch,
//! even if that command is killed at any moment.
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
#[path = "../../tests/tests/postgres/virtual_address.rs"]
mod virtual_address;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use futures::future::join_all;
use rust_decimal::Decimal;
use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, sqlite::SqliteConnectOptions};
use tokio::{task::spawn_blocking, time::sleep};

use self::{
    schemas::{ROLES, Schemas, bus},
    server::Server,
    serving::{PATIENCE, Serving},
    summary::business,
    virtual_address::VirtualAddress,
};

/// The number of orders in each load during which databases are dumped and services are killed. The variable
/// SHOP_RESTORED_ORDERS sets another number.
const ORDERS: u64 = 150;

/// The interval between checks for the sign that a recovery has reached a certain moment.
const SIGN: Duration = Duration::from_millis(5);
/// The time limit for the sagas of recovered orders to end. `LOOK` is the interval between checks.
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

/// Runs a command to its end, while other tasks of the test continue.
async fn output(mut command: Command) -> Output {
    spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

/// Asserts that a service refuses to start because its store does not match the topics. The service ends with exit code
/// 1, and its error names the problem and the remedy.
async fn is_refused(role: &str, store: &str, bus: &str, parts: &[&str]) {
    let mut serving = shop(&["serve", role, "--store", store, "--bus", bus, "--http", "127.0.0.1:0"]).spawn().unwrap();
    let started = Instant::now();
    while serving.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            serving.kill().unwrap();
        }
        sleep(Duration::from_millis(20)).await;
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

/// A moment at which a recovery is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    /// The recovery has begun, and is about to write the events.
    BeforeTaking,
    /// The events are written, but the work to repeat is not recorded yet.
    AfterTaking,
    /// Only the last commit is missing.
    BeforeTheEnd,
}

const ALL_MOMENTS: [Moment; 3] = [Moment::BeforeTaking, Moment::AfterTaking, Moment::BeforeTheEnd];

/// Lets a killed recovery finish. Returns the result of the dry run that precedes it.
async fn finished(dry: Output, store: &str, bus: &str, more: &[&str]) -> Value {
    let finished = output(recover(store, bus, &[more, &["--json"]].concat())).await;
    assert_eq!(finished.status.code(), Some(0), "{}", text(&finished));
    let again = output(recover(store, bus, more)).await;
    assert_eq!(again.status.code(), Some(0), "{}", text(&again));
    assert!(text(&again).contains("nothing to recover"), "{}", text(&again));
    println!("{}{}", text(&dry), text(&finished));
    serde_json::from_slice(&dry.stdout).unwrap()
}

async fn dry_run(store: &str, bus: &str, more: &[&str]) -> Output {
    let dry = output(recover(store, bus, &[more, &["--dry-run", "--json"]].concat())).await;
    assert_eq!(dry.status.code(), Some(0), "{}", text(&dry));
    dry
}

/// Asserts that the topics match the log.
fn are_verified(store: &str, bus: &str) {
    let verified = shop(&["ops", "verify", "--store", store, "--bus", bus]).output().unwrap();
    assert_eq!(verified.status.code(), Some(0), "{}", text(&verified));
}

/// A recovery on PostgreSQL that the test kills at exact moments. To stop the recovery at such a moment, the test locks
/// the tables that the recovery is about to write.
impl Schemas {
    /// Kills the recovery at each of these moments, and then lets it finish.
    async fn recovered(&self, role: &str, bus: &str, more: &[&str], moments: &[Moment]) -> Value {
        let store = self.url(role);
        let dry = dry_run(&store, bus, more).await;
        for moment in moments {
            let before = self.events(role).await;
            // A wait for a lock has a time limit, so the recovery may end by itself before the kill.
            while !self.is_killed(role, || recover(&store, bus, more).spawn().unwrap(), *moment).await {}
            let begun = "SELECT count(*) FROM annals.documents
                          WHERE collection = 'recovery' AND id = 'progress' AND body->>'complete' = 'false'";
            assert_eq!(self.ask(role, begun).await, 1, "{role}, {moment:?}: the recovery is not half done");
            let taken = self.events(role).await - before;
            assert_eq!(taken > 0, *moment == Moment::AfterTaking, "{role}, {moment:?}: {taken} events");
        }
        if !more.contains(&"--anew") {
            let refused = output(recover(&store, bus, &[more, &["--anew"]].concat())).await;
            assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
            assert!(text(&refused).contains("a recovery without --anew has begun"), "{}", text(&refused));
        }
        finished(dry, &store, bus, more).await
    }

    async fn events(&self, role: &str) -> i64 {
        self.ask(role, "SELECT count(*) FROM annals.events").await
    }

    /// Starts a recovery, and kills it at the given moment. Returns `false` if the recovery gave up before that moment.
    async fn is_killed(&self, role: &str, start: impl Fn() -> Child, moment: Moment) -> bool {
        let events = self.locked(role, "events").await;
        let mut recovery = start();
        let mut is_there = self.waits(role, "events", &mut recovery).await;
        if is_there && moment == Moment::AfterTaking {
            let documents = self.locked(role, "documents").await;
            events.close().await.unwrap();
            is_there = self.waits(role, "documents", &mut recovery).await;
            recovery.kill().unwrap();
            documents.close().await.unwrap();
        } else {
            recovery.kill().unwrap();
            events.close().await.unwrap();
        }
        let ended = recovery.wait_with_output().unwrap();
        assert!(!is_there || ended.status.code().is_none_or(|code| code == 2), "{role}: {}", text(&ended));
        // The server ends the session of the killed process a moment later.
        while self.locks(role).await > 0 {
            sleep(SIGN).await;
        }
        is_there && ended.status.code().is_none()
    }

    /// Takes a lock on a table that allows other sessions to read the table but not to write to it.
    async fn locked(&self, role: &str, table: &str) -> PgConnection {
        let mut session = self.connection().await;
        let lock = format!("BEGIN; LOCK TABLE annals.{table} IN SHARE MODE");
        sqlx::raw_sql(self.sql(role, &lock)).execute(&mut session).await.unwrap();
        session
    }

    /// Resolves once the recovery waits for the lock on a table. Returns `false` if the recovery ends first.
    async fn waits(&self, role: &str, table: &str, recovery: &mut Child) -> bool {
        let waiting =
            format!("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'annals.{table}'::regclass");
        while self.ask(role, &waiting).await == 0 {
            if recovery.try_wait().unwrap().is_some() {
                return false;
            }
            sleep(SIGN).await;
        }
        true
    }

    /// Returns the number of locks on the tables, including locks that a session still waits for.
    async fn locks(&self, role: &str) -> i64 {
        let locks =
            "SELECT count(*) FROM pg_locks WHERE relation IN ('annals.events'::regclass, 'annals.documents'::regclass)";
        self.ask(role, locks).await
    }
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
    let broker = Broker::start();
    let schemas = Schemas::new();
    let bus = bus(&broker);
    let start = || ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus));
    let mut shop = start();
    let before = load("1", 40);
    let meanwhile = load("2", orders());
    let killed = load("3", orders());
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
    join_all(dumps.iter().map(async |(role, dump)| {
        schemas.restore(role, dump).await;
        is_refused(role, &schemas.url(role), &bus, &["which is this log"]).await;
        let recovered = schemas.recovered(role, &bus, &[], &ALL_MOMENTS).await;
        assert!(recovered["taken_back"].as_i64() > Some(0), "{recovered}");
    }))
    .await;
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

/// Restores only a participant, only the service with the sagas, or all four services to different moments.
#[tokio::test]
async fn restored_services_end_consistent() {
    let cases: [&[&str]; 3] = [&["payment", "order", "notification", "inventory"], &["inventory"], &["order"]];
    for restored in cases {
        are_restored(restored).await;
    }
}

/// The database fails over to a standby that lacks the last commits, while services run and customers buy.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn services_end_at_a_lossy_failover_and_recovery_is_consistent() {
    let broker = Broker::start();
    let mut primary = Server::start().await;
    let address = VirtualAddress::of(&primary).await;
    let schemas = Schemas::at(address.url());
    let bus = bus(&broker);
    let start = || ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus));
    let mut shop = start();
    let sold = load("2", orders());
    business(&shop[0].buy(&words(&load("1", 40))));
    let mut standby = primary.standby().await;
    standby.catch_up(&primary).await;
    standby.kill();
    let mut customer = shop[0].customer(&words(&sold)).spawn().unwrap();
    schemas.until_placed(40 + orders() as i64 / 2).await;
    primary.kill();
    standby.resume().await;
    standby.promote().await;
    address.lead_to(&standby);
    address.cut();
    for service in &mut shop {
        assert_eq!(service.code(), Some(1), "{}", service.said());
        let said = service.said();
        assert!(said.contains("is ahead of the log") && said.contains("annals recover"), "{said}");
    }
    customer.kill().unwrap();
    customer.wait().unwrap();
    join_all(ROLES.map(async |role| {
        is_refused(role, &schemas.url(role), &bus, &["which is this log"]).await;
        let recovered = schemas.recovered(role, &bus, &[], &[Moment::AfterTaking]).await;
        assert!(recovered["taken_back"].as_i64() > Some(0), "{recovered}");
    }))
    .await;
    let shop = start();
    for load in [&sold, &load("4", 40)] {
        business(&bought(&shop[0], load));
    }
    schemas.are_whole(&broker).await;
    schemas.money_is_conserved().await;
    ROLES.iter().for_each(|role| are_verified(&schemas.url(role), &bus));
    schemas::end(shop);
}

#[tokio::test]
async fn new_databases_under_used_topics_are_detected_and_begin_anew() {
    let broker = Broker::start();
    let before = Schemas::new();
    let schemas = Schemas::new();
    let bus = bus(&broker);
    let shop = ROLES.map(|role| Serving::start(role, &before.url(role), &bus));
    business(&shop[0].buy(&words(&load("1", 40))));
    schemas::end(shop);
    before.drop().await;
    join_all(ROLES.map(async |role| {
        let store = schemas.url(role);
        let service = format!("--service {role}");
        is_refused(role, &store, &bus, &["which this store does not know", "--anew", &service]).await;
        schemas.recovered(role, &bus, &["--service", role, "--anew"], &[Moment::BeforeTheEnd]).await;
    }))
    .await;
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus));
    business(&shop[0].buy(&words(&load("1", 40))));
    schemas.hold_together().await;
    schemas.money_is_conserved().await;
    ROLES.iter().for_each(|role| are_verified(&schemas.url(role), &bus));
    schemas::end(shop);
    schemas.drop().await;
}

/// Submits the orders repeatedly until the totals are correct. The shop recognises the restored orders immediately, but
/// their sagas may need more time.
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

/// All services share one SQLite file. In the first round, a copy replaces the lost file. In the second round, an empty
/// store replaces the file.
#[tokio::test]
async fn restored_or_lost_file_ends_consistent() {
    let broker = Broker::start();
    let folder = tempfile::tempdir().unwrap();
    let bus = bus(&broker);
    let live = folder.path().join("shop.db");
    let copy = folder.path().join("copy.db");
    let store = format!("sqlite:{}", live.display());
    let mut shop = Serving::start("all", &store, &bus);
    business(&shop.buy(&words(&load("1", 40))));
    let mut connection = SqliteConnectOptions::new().filename(&live).connect().await.unwrap();
    sqlx::query("VACUUM INTO $1").bind(copy.to_str().unwrap()).execute(&mut connection).await.unwrap();
    drop(connection);
    business(&shop.buy(&words(&load("2", 40))));
    let mut kills = 0;
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
        is_refused("all", &store, &bus, &[named]).await;
        let dry = dry_run(&store, &bus, more).await;
        for moment in [Moment::BeforeTaking, Moment::AfterTaking] {
            kills += usize::from(is_killed_on(&live, recover(&store, &bus, more), moment).await);
        }
        let back = finished(dry, &store, &bus, more).await;
        assert!(back["taken_back"].as_i64() > Some(0), "{back}");
        shop = Serving::start("all", &store, &bus);
        for seed in ["1", "2", "3"] {
            business(&bought(&shop, &load(seed, 40)));
        }
        are_verified(&store, &bus);
    }
    assert!(kills > 0, "each recovery had ended before it was killed: nothing was tested");
}

/// Kills the recovery of a file once it has reached this moment. A lock on the file stops the recovery until then.
/// Returns whether the killed recovery was still incomplete.
async fn is_killed_on(live: &Path, mut recover: Command, moment: Moment) -> bool {
    let mut recovery = recover.spawn().unwrap();
    let begun = "SELECT count(*) FROM documents WHERE collection = 'recovery' AND NOT json_extract(body, '$.complete')";
    let taken = format!("{begun} AND json_extract(body, '$.restored_to') < (SELECT max(position) FROM events)");
    let sign = if moment == Moment::BeforeTaking { begun } else { &*taken };
    let options = SqliteConnectOptions::new().filename(live).busy_timeout(PATIENCE);
    while recovery.try_wait().unwrap().is_none() {
        // If the file is lost, the recovery first has to create it.
        let Ok(mut file) = options.connect().await else {
            sleep(SIGN).await;
            continue;
        };
        while recovery.try_wait().unwrap().is_none() {
            let seen: Result<i64, _> = sqlx::query_scalar(AssertSqlSafe(sign)).fetch_one(&mut file).await;
            if seen.unwrap_or(0) == 0 {
                continue;
            }
            sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut file).await.unwrap();
            recovery.kill().unwrap();
            recovery.wait().unwrap();
            let left: i64 = sqlx::query_scalar(begun).fetch_one(&mut file).await.unwrap();
            return left > 0;
        }
    }
    false
}
