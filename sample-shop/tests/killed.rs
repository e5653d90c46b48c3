//! The shop is killed with SIGKILL at random moments and started again. The final result is the same, to the penny and
//! the unit.
#![allow(clippy::unwrap_used)]

mod summary;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use self::summary::business;

const ORDERS: u64 = 400;
const KILLS: usize = 10;

fn shop(store: &Path, factor: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args(["run", "--json", "--quiet", "--generate", &ORDERS.to_string(), "--stock-factor", factor]);
    command.args(["--decline-rate", "0.1", "--cancel-rate", "0.05", "--seed", "7", "--store"]);
    command.arg(format!("sqlite:{}", store.display()));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Reads the file with SQL, without any code of this project.
async fn look_from_outside(store: &Path) -> Value {
    let mut file =
        SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(store).read_only(true)).await.unwrap();
    let mut ask = async |sql: &'static str| -> i64 { sqlx::query_scalar(sql).fetch_one(&mut file).await.unwrap() };
    let gaps = ask(
        "SELECT count(*) FROM (SELECT max(version) - count(*) AS gaps FROM events GROUP BY stream_id) WHERE gaps <> 0",
    )
    .await;
    assert_eq!(gaps, 0, "a stream has a gap");
    assert_eq!(ask("SELECT count(*) - count(DISTINCT event_id) FROM events").await, 0, "an event happened twice");
    let twice =
        "SELECT count(*) FROM (SELECT 1 FROM events WHERE type = 'payment.charged' GROUP BY data HAVING count(*) > 1)";
    assert_eq!(ask(twice).await, 0, "a card was charged twice");
    let open =
        "SELECT count(*) FROM documents WHERE collection LIKE 'saga.%' AND json_extract(body, '$.ended_at') IS NULL";
    assert_eq!(ask(open).await, 0, "a saga has not ended");
    assert_eq!(ask("SELECT count(*) FROM documents WHERE collection LIKE 'parked.%'").await, 0, "a message is parked");
    let mut units = serde_json::Map::new();
    let mut pence = 0;
    for kind in ["received", "reserved", "released", "shipped"] {
        let sql = format!(
            "SELECT coalesce(sum(json_extract(data, '$.quantity')), 0) FROM events WHERE type = 'stock.{kind}'"
        );
        let sum: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut file).await.unwrap();
        units.insert(kind.into(), sum.into());
    }
    for (kind, sign) in [("charged", 1), ("refunded", -1)] {
        let sql = format!(
            "SELECT coalesce(sum(CAST(round(100 * json_extract(data, '$.amount')) AS INTEGER)), 0) FROM events WHERE type = 'payment.{kind}'"
        );
        let sum: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut file).await.unwrap();
        pence += sign * sum;
    }
    assert_eq!(units["reserved"].as_i64(), units["released"].as_i64().map(|n| n + units["shipped"].as_i64().unwrap()));
    // All charges minus all refunds are exactly the price of the confirmed orders.
    let confirmed = "SELECT coalesce(sum(CAST(round(100 * json_extract(placed.data, '$.total')) AS INTEGER)), 0) FROM events AS placed \
         JOIN events AS confirmed USING (stream_id) WHERE placed.type = 'order.placed' AND confirmed.type = 'order.confirmed'";
    let price: i64 = sqlx::query_scalar(confirmed).fetch_one(&mut file).await.unwrap();
    assert_eq!(pence, price, "money was lost or made");
    Value::Object(units)
}

async fn ends_the_same(factor: &str) {
    let directory = tempfile::tempdir().unwrap();
    let whole = directory.path().join("whole.db");
    let killed = directory.path().join("killed.db");
    let expected = business(&shop(&whole, factor).output().unwrap());
    assert_eq!(expected["orders"], ORDERS);
    let mut cut_off = 0;
    for round in 0..KILLS {
        let mut child = shop(&killed, factor).spawn().unwrap();
        // This sleep is not a wait for a condition: it makes the moment of the kill random.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..700))).await;
        cut_off += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        eprintln!("kill {round}: {} bytes in the file", std::fs::metadata(&killed).map_or(0, |file| file.len()));
    }
    assert!(cut_off >= 1, "every run was over before it was killed: nothing was tested");
    let actual = business(&shop(&killed, factor).output().unwrap());
    assert_eq!(actual, expected, "after {cut_off} kills");
    assert_eq!(look_from_outside(&killed).await, look_from_outside(&whole).await);
}

#[tokio::test]
async fn run_killed_ten_times_with_plenty_of_stock_ends_the_same() {
    ends_the_same("1.5").await;
}

#[tokio::test]
async fn run_killed_ten_times_with_too_little_stock_ends_the_same() {
    ends_the_same("0.7").await;
}
