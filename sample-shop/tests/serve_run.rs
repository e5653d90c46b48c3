//! `run --http` against `serve` gives the same result as a run in one process, even if the server is killed or
//! restarted during the run.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod december;
mod serving;
mod summary;

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::{Value, json};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, SqliteConnection, postgres::PgConnectOptions,
    sqlite::SqliteConnectOptions,
};
use uuid::Uuid;

use self::{december::every_order_confirmed, serving::Serving, summary::business};

const UNLUCKY: [&str; 10] =
    ["--generate", "400", "--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7", "--stock-factor", "0.7"];

fn embedded(arguments: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    business(&command.args(["run", "--json", "--quiet", "--store", "memory:"]).args(arguments).output().unwrap())
}

fn sqlite(folder: &Path) -> String {
    format!("sqlite:{}", folder.join("shop.db").display())
}

fn december() -> [String; 6] {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs next to the checkout", orders.display());
    ["--stock-factor", "1.5", "--decline-rate", "0", "--orders", orders.to_str().unwrap()].map(str::to_owned)
}

#[test]
fn declines_and_cancellations_equal_those_of_one_process() {
    let expected = embedded(&UNLUCKY);
    let cancelled = &expected["cancelled"];
    for reason in ["out_of_stock", "declined", "by_customer"] {
        assert!(cancelled[reason].as_u64() > Some(0), "{expected}");
    }
    let shop = Serving::all("memory:");
    assert_eq!(business(&shop.buy(&UNLUCKY)), expected);
    // A second run finds all of its orders in the shop.
    let again = shop.buy(&UNLUCKY);
    assert_eq!(business(&again), expected);
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(said.contains("400 orders and returns were in the store already"), "{said}");
    // The shop refuses the same orders with another opening stock.
    let other = [&UNLUCKY[..8], &["--stock-factor", "0.9"]].concat();
    let refused = shop.buy(&other);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && said.contains("was run on this store before"), "{said}");
}

#[test]
fn december_through_one_process_on_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let shop = Serving::all(&sqlite(folder.path()));
    assert_eq!(business(&shop.buy(&december().each_ref().map(String::as_str))), every_order_confirmed());
}

/// Reads the file with SQL, without any code of this project.
async fn look_from_outside(file: &Path) -> Value {
    let options = SqliteConnectOptions::new().filename(file).read_only(true);
    let mut file = SqliteConnection::connect_with(&options).await.unwrap();
    let mut ask =
        async |sql: String| -> i64 { sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut file).await.unwrap() };
    let gaps =
        "SELECT count(*) FROM (SELECT max(version) - count(*) AS gaps FROM events GROUP BY stream_id) WHERE gaps <> 0";
    assert_eq!(ask(gaps.into()).await, 0, "a stream has a gap");
    assert_eq!(
        ask("SELECT count(*) - count(DISTINCT event_id) FROM events".into()).await,
        0,
        "an event happened twice"
    );
    let open =
        "SELECT count(*) FROM documents WHERE collection LIKE 'saga.%' AND json_extract(body, '$.ended_at') IS NULL";
    assert_eq!(ask(open.into()).await, 0, "a saga has not ended");
    let mut found = serde_json::Map::new();
    for kind in ["order.placed", "order.confirmed", "order.cancelled", "payment.charged", "payment.refunded"] {
        found.insert(kind.into(), ask(format!("SELECT count(*) FROM events WHERE type = '{kind}'")).await.into());
    }
    for kind in ["received", "reserved", "released", "shipped"] {
        let sum = format!(
            "SELECT coalesce(sum(json_extract(data, '$.quantity')), 0) FROM events WHERE type = 'stock.{kind}'"
        );
        found.insert(kind.into(), ask(sum).await.into());
    }
    Value::Object(found)
}

#[tokio::test]
async fn killed_and_restarted_service_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let killed = folder.path().join("killed");
    for folder in [&whole, &killed] {
        std::fs::create_dir(folder).unwrap();
    }
    let arguments = [&UNLUCKY[..], &["--concurrency", "16"]].concat();
    let mut shop = Serving::all(&sqlite(&whole));
    let expected = business(&shop.buy(&arguments));
    shop.signal("TERM");
    assert_eq!(shop.code(), Some(143));

    let mut shop = Serving::all(&sqlite(&killed));
    let mut customer = shop.customer(&arguments).spawn().unwrap();
    let mut cut_off = 0;
    for _ in 0..6 {
        // This sleep is not a wait for a condition: it makes the moment of the kill random.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(100..600))).await;
        cut_off += usize::from(customer.try_wait().unwrap().is_none());
        shop = shop.kill_and_restart();
    }
    assert!(cut_off > 0, "the customer was done before the first kill: nothing was tested");
    assert_eq!(business(&customer.wait_with_output().unwrap()), expected, "after {cut_off} kills");
    shop.signal("TERM");
    assert_eq!(shop.code(), Some(143));
    let [whole, killed] = [&whole, &killed].map(|folder| folder.join("shop.db"));
    assert_eq!(look_from_outside(&killed).await, look_from_outside(&whole).await);
}

#[tokio::test]
async fn requests_answered_before_a_stop_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut shop = Serving::all(&sqlite(folder.path()));
    let order = json!({"lines": [{"sku": "a", "quantity": 1, "unit_price": "1"}]});
    let answered: Vec<String> = std::thread::scope(|scope| {
        let shop = &shop;
        let clients: Vec<_> = (0..8)
            .map(|client| {
                let order = &order;
                scope.spawn(move || {
                    let mut answered = Vec::new();
                    for n in 0.. {
                        let id = format!("{client}-{n}");
                        let headers = [("content-type", "application/json"), ("idempotency-key", id.as_str())];
                        // No answer arrives if the server accepts no more connections, or if the server ends in the
                        // middle of an answer.
                        match shop.try_ask("POST", "/orders", &headers, &order.to_string()).map(|answer| answer.status)
                        {
                            Some(201) => answered.push(id),
                            Some(503) => {}
                            Some(other) => panic!("{other}"),
                            None => return answered,
                        }
                    }
                    answered
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        shop.signal("TERM");
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(shop.code(), Some(143));
    assert!(answered.len() > 10, "{}", answered.len());
    let shop = Serving::all(&sqlite(folder.path()));
    for id in &answered {
        assert_eq!(shop.get(&format!("/orders/{id}")).status, 200, "{id} was answered, and is lost");
    }
}

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
        let name = format!("serve_{}", Uuid::new_v4().simple());
        sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut server).await.unwrap();
        Self { options: options.database(&name), name, server }
    }

    fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    async fn drop(mut self) {
        let drop = format!("DROP DATABASE {} WITH (FORCE)", self.name);
        sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut self.server).await.unwrap();
    }
}

#[tokio::test]
async fn december_through_one_process_on_postgres() {
    let database = Database::create().await;
    let shop = Serving::all(&database.url());
    let output = shop.buy(&december().each_ref().map(String::as_str));
    drop(shop);
    database.drop().await;
    assert_eq!(business(&output), every_order_confirmed());
}

/// Two customers submit the same orders, each to its own instance. The concurrency is low, because the two inventory
/// services work on the same SKUs.
#[tokio::test]
async fn two_instances_on_one_postgres_share_the_work() {
    let arguments = ["--generate", "300", "--stock-factor", "1.5", "--concurrency", "8"];
    let expected = embedded(&arguments);
    let database = Database::create().await;
    let shops = [(); 2].map(|()| Serving::all(&database.url()));
    let customers = shops.each_ref().map(|shop| shop.customer(&arguments).spawn().unwrap());
    let lines = customers.map(|customer| business(&customer.wait_with_output().unwrap()));
    assert_eq!(lines, [expected.clone(), expected]);
    for mut shop in shops {
        shop.signal("INT");
        assert_eq!(shop.code(), Some(130));
    }
    database.drop().await;
}

#[test]
fn impossible_services_are_refused() {
    let refused = |arguments: &[&str], part: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_sample-shop")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(part), "{arguments:?}: {said}");
    };
    refused(&["serve", "order", "--store", "memory:", "--bus", "local:"], "`serve all`");
    let folder = tempfile::tempdir().unwrap();
    let store = sqlite(folder.path());
    let shop = Serving::all(&store);
    refused(&["serve", "all", "--store", &store, "--bus", "local:"], "is in use by another sample-shop");
    let taken = shop.at.to_string();
    refused(&["serve", "all", "--store", "memory:", "--bus", "local:", "--grace", "0s", "--http", &taken], "in use");
}
