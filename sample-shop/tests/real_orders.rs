//! The main job on the real orders of December 2010.
#![allow(clippy::unwrap_used)]

mod december;
mod summary;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use uuid::Uuid;

use self::{december::every_order_confirmed, summary::business};

/// There is enough stock and no card is declined, so every order must complete.
const PLENTY: [&str; 4] = ["--stock-factor", "1.5", "--decline-rate", "0"];

fn real_file() -> PathBuf {
    let orders = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail-2010-12.csv");
    assert!(orders.is_file(), "{} is missing: the data belongs next to the checkout", orders.display());
    orders
}

fn shop(store: &str, arguments: &[&str]) -> Output {
    shop_of(&real_file(), store, arguments)
}

fn shop_of(orders: &Path, store: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json", "--store", store, "--orders"]).arg(orders).args(arguments);
    command.output().unwrap()
}

fn run_on_sqlite(arguments: &[&str]) -> Value {
    let directory = tempfile::tempdir().unwrap();
    business(&shop(&format!("sqlite:{}", directory.path().join("shop.db").display()), arguments))
}

/// Runs the shop in a new database, because the shop uses the default schema.
async fn run_on_postgres(arguments: &[&str]) -> Value {
    let url = std::env::var("DATABASE_URL").expect("run the tests with `./test`, which starts a PostgreSQL of its own");
    let options: PgConnectOptions = url.parse().unwrap();
    let mut server = PgConnection::connect_with(&options).await.unwrap();
    let name = format!("shop_{}", Uuid::new_v4().simple());
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut server).await.unwrap();
    let output = shop(options.database(&name).to_url_lossy().as_str(), arguments);
    // Drops the database before checking the result, so that a failed check does not leave the database behind.
    let drop = format!("DROP DATABASE {name} WITH (FORCE)");
    sqlx::raw_sql(AssertSqlSafe(drop)).execute(&mut server).await.unwrap();
    business(&output)
}

#[test]
fn with_plenty_of_stock_every_order_is_confirmed() {
    assert_eq!(run_on_sqlite(&PLENTY), every_order_confirmed());
}

/// The file as the authors of the data set published it: dates with the month first, Latin-1, CRLF, and empty rows at
/// the end.
#[test]
fn published_format_of_the_real_orders_gives_the_same_result() {
    let text = std::fs::read_to_string(real_file()).unwrap();
    let published = text.lines().map(|line| match line.find(",2010-").or_else(|| line.find(",2011-")) {
        Some(at) => {
            let (date, rest) = line[at + 1..].split_at("2010-12-01T08:26".len());
            let plain = |text: &str| text.parse::<u32>().unwrap();
            let [year, month, day, hour] = [&date[..4], &date[5..7], &date[8..10], &date[11..13]].map(plain);
            format!("{},{month}/{day}/{year} {hour}:{}{rest}\r\n", &line[..at], &date[14..])
        }
        None => format!("{line}\r\n"),
    });
    let published = published.collect::<String>() + ",,,,,,,\r\n,,,,,,,\r\n";
    assert!(published.contains(",12/1/2010 8:26,") && !published.contains("T08:26"));
    let latin_1: Vec<u8> = published.chars().map(|c| u8::try_from(c).unwrap()).collect();
    assert!(std::str::from_utf8(&latin_1).is_err());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("Online Retail.csv");
    std::fs::write(&file, latin_1).unwrap();
    let output = shop_of(&file, &format!("sqlite:{}", folder.path().join("shop.db").display()), &PLENTY);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("43,665 rows read") && said.contains("read as Windows-1252"), "{said}");
    assert_eq!(business(&output), every_order_confirmed());
}

#[tokio::test]
async fn result_is_the_same_on_postgres() {
    assert_eq!(run_on_postgres(&PLENTY).await, every_order_confirmed());
}

#[test]
fn with_too_little_stock_a_seed_gives_the_same_business_twice() {
    let arguments = ["--stock-factor", "0.7", "--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7"];
    let first = run_on_sqlite(&arguments);
    let cancelled =
        ["out_of_stock", "declined", "by_customer"].map(|reason| first["cancelled"][reason].as_u64().unwrap());
    assert!(cancelled.iter().all(|count| *count > 0), "{first}");
    assert_eq!(first["confirmed"].as_u64().unwrap() + cancelled.iter().sum::<u64>(), 1595, "{first}");
    let units = |name: &str| first["units"][name].as_i64().unwrap();
    assert_eq!((first["stuck"].as_u64(), units("reserved")), (Some(0), 0), "{first}");
    assert_eq!(units("initial") - units("sold") + units("returned") + units("adjusted"), units("remaining"), "{first}");
    assert_eq!(run_on_sqlite(&arguments), first);
}
