//! The four services in processes of their own, each with a schema of its own, over a real Kafka: the result of the run in
//! one process, whoever is killed meanwhile.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod serving;
mod summary;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use annals_tests::kafka::Broker;
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use self::{
    serving::{PATIENCE, Serving},
    summary::business,
};

const ROLES: [&str; 4] = ["order", "inventory", "payment", "notification"];
const UNLUCKY: [&str; 10] =
    ["--generate", "1200", "--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7", "--stock-factor", "0.7"];
/// How many times somebody is killed before the orders may end.
const KILLS: usize = 12;

/// Where the services keep what they know.
struct Schemas {
    run: String,
    server: PgConnection,
}

impl Schemas {
    async fn new() -> Self {
        let server = PgConnection::connect(&Self::server()).await.unwrap();
        Self { run: Uuid::new_v4().simple().to_string(), server }
    }

    fn server() -> String {
        std::env::var("DATABASE_URL").expect("run the tests with `./test`, which starts a PostgreSQL of its own")
    }

    fn name(&self, role: &str) -> String {
        format!("{role}_{}", self.run)
    }

    fn url(&self, role: &str) -> String {
        let server = Self::server();
        let and = if server.contains('?') { '&' } else { '?' };
        format!("{server}{and}schema={}", self.name(role))
    }

    async fn ask(&mut self, role: &str, sql: &str) -> i64 {
        let sql = sql.replace("annals.", &format!("{}.", self.name(role)));
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut self.server).await.unwrap()
    }

    /// What must be so in each of them, by plain SQL.
    async fn hold_together(&mut self) {
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

    async fn drop(mut self) {
        for role in ROLES {
            let sql = format!("DROP SCHEMA {} CASCADE", self.name(role));
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.server).await.unwrap();
        }
    }
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

fn bus(broker: &Broker) -> String {
    format!("kafka://{}?partitions=4", broker.address())
}

#[tokio::test]
async fn december_through_four_processes_is_that_of_one() {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs beside the checkout", orders.display());
    let arguments = ["--stock-factor", "1.5", "--decline-rate", "0", "--orders", orders.to_str().unwrap()];
    let (broker, mut schemas) = (Broker::start(), Schemas::new().await);
    let shop = ROLES.map(|role| Serving::start(role, &schemas.url(role), &bus(&broker)));
    assert_eq!(without_bus(business(&shop[0].buy(&arguments))), embedded(&arguments));
    schemas.hold_together().await;
    for mut service in shop {
        service.signal("TERM");
        assert_eq!(service.code(), Some(143));
    }
    schemas.drop().await;
}

#[tokio::test]
async fn whoever_is_killed_money_and_units_are_conserved() {
    let expected = embedded(&UNLUCKY);
    let (mut broker, mut schemas) = (Broker::start(), Schemas::new().await);
    // Two of each share the work; what hits one must not hurt the other.
    let start = |role: &&str| Serving::start(role, &schemas.url(role), &bus(&broker));
    let mut shop: Vec<Option<Serving>> = ROLES.iter().chain(&ROLES).map(start).map(Some).collect();
    // The first instance of the order service is the one that the customer knows; it is killed too.
    let arguments = [&UNLUCKY[..], &["--concurrency", "32"]].concat();
    let mut customer = shop[0].as_ref().unwrap().customer(&arguments).spawn().unwrap();
    let mut cut_off = 0;
    for kill in 0..KILLS {
        // Not a wait for something to happen: the moment of the kill is what is drawn.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(500..2_500))).await;
        cut_off += usize::from(customer.try_wait().unwrap().is_none());
        if kill == KILLS / 2 {
            broker.kill();
            broker.resume();
            continue;
        }
        let victim = &mut shop[fastrand::usize(..ROLES.len() * 2)];
        *victim = victim.take().map(Serving::kill_and_restart);
    }
    assert!(cut_off > KILLS / 2, "the customer was done before most of the kills: little was tested");
    assert_eq!(without_bus(business(&customer.wait_with_output().unwrap())), expected, "after {cut_off} kills");
    schemas.hold_together().await;
    drop(shop);
    schemas.drop().await;
}
