//! Several shop processes on one PostgreSQL share the work. If a process is killed or stopped, no work is lost.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use uuid::Uuid;

/// Longer than the time after which a process without a heartbeat counts as dead.
const PAST_ITS_LEASE: Duration = Duration::from_secs(8);

struct Database {
    name: String,
    server: PgConnection,
    options: PgConnectOptions,
}

impl Database {
    async fn create() -> Self {
        let url =
            std::env::var("DATABASE_URL").expect("run the tests with `./test`, which starts a PostgreSQL of its own");
        let options: PgConnectOptions = url.parse().unwrap();
        let mut server = PgConnection::connect_with(&options).await.unwrap();
        let name = format!("shops_{}", Uuid::new_v4().simple());
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut server).await.unwrap();
        Self { options: options.database(&name), name, server }
    }

    async fn drop(mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut self.server).await.unwrap();
    }

    async fn scalar(&self, sql: &'static str) -> i64 {
        let mut connection = PgConnection::connect_with(&self.options).await.unwrap();
        sqlx::query_scalar(sql).fetch_one(&mut connection).await.unwrap()
    }

    async fn until(&self, what: &str, sql: &'static str) {
        for _ in 0..600 {
            let mut connection = PgConnection::connect_with(&self.options).await.unwrap();
            // The first shop creates the tables.
            if let Ok(true) = sqlx::query_scalar::<_, bool>(sql).fetch_one(&mut connection).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("never: {what}");
    }

    fn shop(&self, instance: &str) -> Child {
        let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
        let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
        command.args([
            "run",
            "--json",
            "--quiet",
            "--stock-factor",
            "1.5",
            "--decline-rate",
            "0",
            "--concurrency",
            "16",
        ]);
        command.args(["--instance", instance, "--store", self.options.to_url_lossy().as_str(), "--orders"]).arg(orders);
        command.stdout(Stdio::piped()).spawn().unwrap()
    }
}

fn signal(child: &Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "kill {signal}");
}

fn business(child: Child) -> Value {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let line: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let wanted = ["orders", "confirmed", "returns", "adjustments", "stuck", "charged", "refunded", "units"];
    wanted.iter().map(|name| ((*name).to_owned(), line[name].clone())).collect::<serde_json::Map<_, _>>().into()
}

#[tokio::test]
async fn instances_share_work_and_survive_a_kill_and_a_pause() {
    let database = Database::create().await;
    let [stays, mut dies, sleeps] = ["stays", "dies", "sleeps"].map(|name| database.shop(name));
    let held =
        "SELECT count(DISTINCT body::jsonb ->> 'holder') = 3 FROM annals.documents WHERE collection = 'checkpoint'";
    database.until("each instance holds a lane", held).await;
    signal(&sleeps, "-STOP");
    let woken = tokio::time::Instant::now() + PAST_ITS_LEASE;
    tokio::time::sleep(Duration::from_secs(1)).await;
    signal(&dies, "-KILL");
    dies.wait().unwrap();
    let taken = "SELECT count(DISTINCT body::jsonb ->> 'holder') = 1 AND bool_and(coalesce(body::jsonb ->> 'holder', 'stays') = 'stays') \
                 FROM annals.documents WHERE collection = 'checkpoint'";
    database.until("the one that is left has everything", taken).await;
    tokio::time::sleep_until(woken).await;
    signal(&sleeps, "-CONT");

    let stays = business(stays);
    let sleeps = business(sleeps);
    let expected = json!({
        "orders": 1595, "confirmed": 1595, "returns": 333, "adjustments": 154, "stuck": 0,
        "charged": "839772.22", "refunded": "75864.72",
        "units": {"initial": 559_756, "sold": 368_150, "returned": 16_274, "adjusted": -1_709, "remaining": 206_171, "reserved": 0},
    });
    assert_eq!((&stays, &sleeps), (&expected, &expected));
    let gaps = "SELECT count(*) FROM (SELECT max(version) - count(*) AS missing FROM annals.events GROUP BY stream_id) AS streams \
                WHERE missing <> 0";
    assert_eq!(database.scalar(gaps).await, 0, "versions are dense");
    let twice = "SELECT count(*) - count(DISTINCT event_id) FROM annals.events";
    assert_eq!(database.scalar(twice).await, 0, "no event is there twice");
    let held = "SELECT count(*) FROM annals.documents WHERE collection = 'checkpoint' AND body::jsonb ->> 'holder' IS NOT NULL";
    assert_eq!(database.scalar(held).await, 0, "an ended process releases its lanes");
    database.drop().await;
}
