//! The four services in processes of their own, each with a schema of its own, over a real Kafka: the result of the run in
//! one process, whoever is killed meanwhile.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

#[path = "../../tests/tests/postgres/server.rs"]
#[allow(dead_code)]
mod server;
mod serving;
mod summary;
#[path = "../../tests/tests/kafka/topic.rs"]
#[allow(dead_code)]
mod topic;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    path::PathBuf,
    process::{Child, Command},
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use self::{
    server::Server,
    serving::{PATIENCE, Serving},
    summary::business,
};

const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];
/// What the topic of each service has of its log.
const PUBLISHED: [(&str, &str); 4] = [
    ("order", "^(order|return)-"),
    ("inventory", "^stock-"),
    ("payment", "^payment-"),
    ("notification", "^notification-"),
];
/// How long faults last, in seconds. SHOP_FAULT_SECONDS says otherwise: two minutes before a release.
const FAULT_SECONDS: u64 = 18;
/// Orders for each of these seconds: more than are done meanwhile, here.
const ORDERS_PER_SECOND: u64 = 65;
/// Past the session that brokers give up a silent member after, which is three seconds here, and past the five or six that the other
/// instances take to give up one that does not show that it lives.
const STOPPED: Duration = Duration::from_secs(8);
/// How many orders are under way at once.
const AT_ONCE: &str = "32";

/// Where the services keep what they know.
struct Schemas {
    run: String,
    server: String,
}

impl Schemas {
    fn new() -> Self {
        let server = std::env::var("DATABASE_URL");
        Self::at(server.expect("run the tests with `./test`, which starts a PostgreSQL of its own"))
    }

    fn at(server: String) -> Self {
        Self { run: Uuid::new_v4().simple().to_string(), server }
    }

    fn name(&self, role: &str) -> String {
        format!("{role}_{}", self.run)
    }

    fn url(&self, role: &str) -> String {
        let server = &self.server;
        let and = if server.contains('?') { '&' } else { '?' };
        format!("{server}{and}schema={}", self.name(role))
    }

    async fn connection(&self) -> PgConnection {
        PgConnection::connect(&self.server).await.unwrap()
    }

    /// A statement of which `annals` is the schema of this role.
    fn sql(&self, role: &str, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("annals.", &format!("{}.", self.name(role))))
    }

    async fn ask(&self, role: &str, sql: &str) -> i64 {
        sqlx::query_scalar(self.sql(role, sql)).fetch_one(&mut self.connection().await).await.unwrap()
    }

    /// What must be so in each of them, by plain SQL.
    async fn hold_together(&self) {
        // What operators see of a saga is a moment behind it.
        let started = Instant::now();
        while self.ask("order", "SELECT count(*) FROM annals.sagas WHERE ended_at IS NULL").await > 0 {
            assert!(started.elapsed() < PATIENCE, "a saga has not ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for role in ROLES {
            for (what, sql) in [
                (
                    "versions with a gap",
                    "SELECT count(*) FROM (SELECT stream_id FROM annals.events GROUP BY stream_id HAVING max(version) <> count(*)) AS gaps",
                ),
                ("events twice", "SELECT count(*) - count(DISTINCT event_id) FROM annals.events"),
                ("messages parked", "SELECT count(*) FROM annals.dead_letters"),
            ] {
                assert_eq!(self.ask(role, sql).await, 0, "{what} in {role}");
            }
        }
        let of = "SELECT count(*) FROM annals.events WHERE type = ";
        let placed = self.ask("order", &format!("{of}'order.placed'")).await;
        let ended = self.ask("order", &format!("{of}'order.confirmed' OR type = 'order.cancelled'")).await;
        assert_eq!(ended, placed, "orders without an end");
        let told = self.ask("notification", &format!("{of}'notification.sent'")).await;
        assert!(told >= placed, "{told} of {placed} customers were told");
        let left = "SELECT coalesce(sum(CASE type WHEN 'stock.reserved' THEN 1 ELSE -1 END * (data->>'quantity')::bigint), 0)::bigint
                      FROM annals.events WHERE type IN ('stock.reserved', 'stock.released', 'stock.shipped')";
        assert_eq!(self.ask("inventory", left).await, 0, "units still reserved");
        let paid_twice = "SELECT count(*) FROM (SELECT stream_id FROM annals.events WHERE type = 'payment.charged'
                           GROUP BY stream_id HAVING count(*) > 1) AS twice";
        assert_eq!(self.ask("payment", paid_twice).await, 0, "charged twice");
    }

    /// What a plain consumer finds in the topics is what the logs hold: every event, under its stream, in order.
    async fn agree_with(&self, broker: &Broker) {
        for (role, published) in PUBLISHED {
            let logged = "SELECT event_id, stream_id, version FROM annals.events WHERE stream_id ~ $1";
            let logged = sqlx::query_as(self.sql(role, logged)).bind(published);
            let logged: BTreeSet<(Uuid, String, i64)> =
                logged.fetch_all(&mut self.connection().await).await.unwrap().into_iter().collect();
            let started = Instant::now();
            loop {
                let (brokers, name) = (broker.address(), format!("{role}.events"));
                let records = spawn_blocking(move || topic::read(&brokers, &name)).await.unwrap();
                let found = in_order(&records);
                // A relay may have something left to send.
                if found.len() >= logged.len() || started.elapsed() > PATIENCE {
                    let (in_topic, in_log) = (found.len(), logged.len());
                    assert!(found == logged, "{role}: {in_topic} in the topic, {in_log} in the log");
                    println!("{role}: {in_log} events, {} of them sent again", records.len() - in_topic);
                    break;
                }
            }
        }
    }

    /// Every command that a saga sent and every reply to one is in its topic: none of them was passed over.
    async fn said_all(&self, broker: &Broker) {
        let commands = "SELECT (command->>'id')::uuid, command->>'to' FROM annals.events, json_array_elements(data->'send') AS command
                         WHERE stream_id LIKE 'saga.%'";
        let replies = "SELECT event_id, data->>'reply_to' FROM annals.events WHERE type = 'step.replied'";
        let mut said: BTreeMap<String, BTreeSet<Uuid>> = BTreeMap::new();
        for (role, sql) in [("order", commands)].into_iter().chain(ROLES.map(|role| (role, replies))) {
            let mut connection = self.connection().await;
            let rows: Vec<(Uuid, String)> =
                sqlx::query_as(self.sql(role, sql)).fetch_all(&mut connection).await.unwrap();
            rows.into_iter().for_each(|(id, to)| _ = said.entry(to).or_default().insert(id));
        }
        for (to, said) in said {
            let (brokers, name) = (broker.address(), format!("{to}.commands"));
            let started = Instant::now();
            loop {
                let (brokers, name) = (brokers.clone(), name.clone());
                let records = spawn_blocking(move || topic::read(&brokers, &name)).await.unwrap();
                let found: BTreeSet<Uuid> = records.iter().map(topic::Record::id).collect();
                let missing: Vec<_> = said.difference(&found).collect();
                if missing.is_empty() {
                    break;
                }
                assert!(
                    started.elapsed() < PATIENCE,
                    "{} of {} never came to {to}: {missing:?}",
                    missing.len(),
                    said.len()
                );
            }
        }
    }

    /// All of that.
    async fn are_whole(&self, broker: &Broker) {
        self.hold_together().await;
        self.agree_with(broker).await;
        self.said_all(broker).await;
    }

    async fn drop(self) {
        for role in ROLES {
            let sql = format!("DROP SCHEMA {} CASCADE", self.name(role));
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.connection().await).await.unwrap();
        }
    }
}

/// Stops all of them, as an operator does.
fn end(shop: impl IntoIterator<Item = Serving>) {
    for mut service in shop {
        service.signal("TERM");
        assert_eq!(service.code(), Some(143));
    }
}

/// The events of a topic, without repeats: id, stream and version. What is sent again comes after what it repeats.
fn in_order(records: &[topic::Record]) -> BTreeSet<(Uuid, String, i64)> {
    let (mut found, mut last) = (BTreeSet::new(), HashMap::new());
    for record in records {
        let (stream, version) = (record.text_key(), record.header("ce_streamversion").unwrap().parse().unwrap());
        if found.insert((record.id(), stream.to_owned(), version)) {
            let before = last.insert(stream, (record.partition, version)).unwrap_or((record.partition, 0));
            assert_eq!((record.partition, version - 1), before, "{stream} is out of order");
        }
    }
    found
}

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

/// Who is killed keeps his partitions until his session is over. Longer, and there would be no time between faults for orders.
fn bus(broker: &Broker) -> String {
    format!("kafka://{}?partitions=4&session.timeout.ms=3000", broker.address())
}

#[tokio::test]
async fn december_through_four_processes_is_that_of_one() {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs beside the checkout", orders.display());
    let arguments = ["--stock-factor", "1.5", "--decline-rate", "0", "--orders", orders.to_str().unwrap()];
    let (broker, schemas) = (Broker::start(), Schemas::new());
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus(&broker)));
    assert_eq!(without_bus(business(&shop[0].buy(&arguments))), embedded(&arguments));
    schemas.are_whole(&broker).await;
    end(shop);
    schemas.drop().await;
}

/// How long faults last, and what is ordered meanwhile.
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

    /// A fault every so many milliseconds while the customer buys; then his summary is that of one process.
    async fn rages(&self, mut customer: Child, every: Range<u64>, mut fault: impl AsyncFnMut(usize)) {
        let (started, mut faults, mut in_time) = (Instant::now(), 0, 0);
        while started.elapsed() < self.lasts {
            // Not a wait for something to happen: the moment of the fault is what is drawn.
            tokio::time::sleep(Duration::from_millis(fastrand::u64(every.clone()))).await;
            in_time += usize::from(customer.try_wait().unwrap().is_none());
            fault(faults).await;
            faults += 1;
        }
        println!("{faults} faults in {:?}, {in_time} of them while somebody bought", started.elapsed());
        assert!(in_time > faults / 2, "the customer was done before most of the faults: little was tested");
        let line = business(&spawn_blocking(|| customer.wait_with_output().unwrap()).await.unwrap());
        println!("all had ended after {:?}", started.elapsed());
        assert_eq!(without_bus(line), embedded(&self.orders()), "after {faults} faults");
    }
}

#[tokio::test]
async fn whoever_is_killed_money_and_units_are_conserved() {
    // With all of them killed in turns, half as many keep it busy.
    let storm = Storm::new(ORDERS_PER_SECOND / 2);
    let (mut broker, schemas) = (Broker::start(), Schemas::new());
    // Two of each share the work; what hits one must not hurt the other.
    let start = |role: &&str| Serving::start(role, &schemas.url(role), &bus(&broker));
    let mut shop: Vec<Option<Serving>> = ROLES.iter().chain(&ROLES).map(start).map(Some).collect();
    // The first instance of the order service is the one that the customer knows; it is killed too.
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

/// Who is stopped believes, when it goes on, that all is still its own: what it had in hand, its partitions and its lanes.
#[tokio::test]
async fn whoever_is_stopped_for_long_and_goes_on_changes_nothing() {
    let storm = Storm::new(ORDERS_PER_SECOND / 2);
    let (broker, schemas) = (Broker::start(), Schemas::new());
    let start = |role: &&str| Serving::start(role, &schemas.url(role), &bus(&broker));
    let shop: Vec<Serving> = ROLES.iter().chain(&ROLES).map(start).collect();
    storm
        .rages(storm.customer(&shop[0]), 200..1_000, async |number| {
            // One of each service; the other ones do its work.
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
async fn a_database_that_is_killed_costs_a_pause() {
    let storm = Storm::new(ORDERS_PER_SECOND);
    let (broker, mut server) = (Broker::start(), Server::start().await);
    let schemas = Schemas::at(server.url());
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus(&broker)));
    storm
        .rages(storm.customer(&shop[0]), 1_000..4_000, async |_| {
            server.kill();
            server.resume().await;
        })
        .await;
    schemas.are_whole(&broker).await;
    // None of them was started again: each found its way back by itself.
    end(shop);
}
