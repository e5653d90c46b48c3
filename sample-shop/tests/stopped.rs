//! Ctrl-C and SIGTERM stop the shop in good order. The next run continues, and has the same result as a run that was
//! never stopped.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod summary;

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::{Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};

use self::summary::business;

const ORDERS: u32 = 1_500;
/// The time limit for each step. On an idle machine, no step takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(120);

fn shop(verb: &str, store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args([verb, "--json", "--quiet", "--store", &format!("sqlite:{}", store.display())]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(store: &Path, concurrency: &str) -> Command {
    let mut command = shop("run", store);
    command.args(["--generate", &ORDERS.to_string(), "--concurrency", concurrency, "--stock-factor", "1.5"]);
    command
}

/// Waits, up to a time limit, for a shop to end.
fn end_of(mut child: Child) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("the run makes no progress");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status().unwrap();
    assert!(sent.success(), "the process had ended before {name} was sent");
}

async fn connect(store: &Path) -> Result<SqliteConnection, sqlx::Error> {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(store).create_if_missing(false)).await
}

async fn count(store: &Path, type_name: &str) -> i64 {
    let Ok(mut file) = connect(store).await else { return 0 };
    let count = sqlx::query_scalar("SELECT count(*) FROM events WHERE type = $1").bind(type_name);
    count.fetch_one(&mut file).await.unwrap_or(0)
}

/// Waits until the store has at least `least` events of this type. A file does not announce its changes, so the test
/// polls the file.
async fn until(store: &Path, type_name: &str, least: i64) {
    let started = Instant::now();
    while count(store, type_name).await < least {
        assert!(started.elapsed() < PATIENCE, "there are never {least} {type_name}");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

/// Returns the number of unfinished orders and returns that the shop reports.
fn unfinished(output: &Output, code: i32) -> i64 {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty(), "there is no result yet");
    let line = said.lines().find_map(|line| line.strip_prefix("stopped: ")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("run the same command again to continue from there"), "{line}");
    line.split(' ').next().unwrap().replace(',', "").parse().unwrap()
}

#[tokio::test]
async fn interrupted_run_ends_the_same_when_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole.db");
    let stopped = folder.path().join("stopped.db");
    let expected = business(&end_of(run(&whole, "256").spawn().unwrap()));
    assert_eq!(expected["orders"], ORDERS);
    // Stops the run three times: once when the first order is confirmed, and twice in the middle.
    for (name, code, confirmed) in [("INT", 130, 1), ("TERM", 143, 300), ("INT", 130, 700)] {
        let child = run(&stopped, "256").spawn().unwrap();
        until(&stopped, "order.confirmed", confirmed).await;
        signal(&child, name);
        let asked = Instant::now();
        let left = unfinished(&end_of(child), code);
        assert!(asked.elapsed() < Duration::from_secs(20), "the run waited for a message that never arrived");
        let placed = count(&stopped, "order.placed").await;
        assert!(placed < i64::from(ORDERS), "the run accepted all orders in spite of {name}");
        assert!(left > 0 && left <= placed, "{left} of {placed} orders are unfinished");
        let ended = count(&stopped, "notification.sent").await;
        assert!(placed - ended <= left, "{placed} were placed, {ended} notified of, {left} unfinished");
    }
    assert_eq!(business(&end_of(run(&stopped, "256").spawn().unwrap())), expected);
}

#[tokio::test]
async fn interrupted_drain_ends_every_saga_when_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("shop.db");
    let all = ORDERS.to_string();
    let child = run(&store, &all).spawn().unwrap();
    until(&store, "order.placed", i64::from(ORDERS) - 300).await;
    signal(&child, "TERM");
    let left = unfinished(&end_of(child), 143);
    let before = count(&store, "notification.sent").await;
    let child = shop("drain", &store).spawn().unwrap();
    until(&store, "notification.sent", before + 200).await;
    signal(&child, "INT");
    let left_by_drain = unfinished(&end_of(child), 130);
    assert!(left_by_drain > 0 && left_by_drain < left, "{left_by_drain} of {left}");
    let drained = business(&end_of(shop("drain", &store).spawn().unwrap()));
    assert_eq!(drained["orders"].as_i64(), Some(count(&store, "order.placed").await));
    let ends = [&drained["confirmed"], &drained["cancelled"]["declined"], &drained["cancelled"]["by_customer"]];
    assert_eq!(ends.into_iter().filter_map(Value::as_i64).sum::<i64>(), drained["orders"].as_i64().unwrap());
    assert_eq!(drained["units"]["reserved"], 0);
}

/// The shop cannot finish after the first signal, because another process holds the write lock of the file.
#[tokio::test]
async fn second_signal_ends_the_process_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("shop.db");
    let mut child = run(&store, "256").spawn().unwrap();
    until(&store, "order.placed", 100).await;
    let mut other = connect(&store).await.unwrap();
    other.execute("PRAGMA busy_timeout = 60000; BEGIN IMMEDIATE").await.unwrap();
    signal(&child, "INT");
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    said.find(|line| line.as_ref().unwrap().contains("a second signal ends the process at once")).unwrap().unwrap();
    signal(&child, "INT");
    let asked = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(business(&end_of(run(&store, "256").spawn().unwrap()))["orders"], ORDERS);
}
