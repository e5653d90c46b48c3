//! Tests a store with a few events that this build cannot read. No command reads the streams of these events again, but
//! a run reports the events anyway.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::{Command, Output},
};

use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

fn run(store: &Path, verb: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sample-shop"));
    command.args([verb, "--quiet", "--store", &format!("sqlite:{}", store.display())]);
    if verb == "run" {
        command.args(["--generate", "20"]);
    }
    command.output().unwrap()
}

/// Appends an event with SQL, as another program or a newer version of this library would.
async fn append(store: &Path, stream: &str, type_name: &str, schema_version: i32, data: &str) {
    let options = SqliteConnectOptions::new().filename(store);
    let mut file = SqliteConnection::connect_with(&options).await.unwrap();
    let sql = "INSERT INTO events SELECT (SELECT max(position) FROM events) + 1, $1, \
        (SELECT coalesce(max(version), 0) + 1 FROM events WHERE stream_id = $1), \
        'ba5eba11-0000-4000-8000-000000000000', $2, $3, $4, metadata, recorded_at FROM events LIMIT 1";
    let insert = sqlx::query(sql).bind(stream).bind(type_name).bind(schema_version).bind(data);
    insert.execute(&mut file).await.unwrap();
    file.close().await.unwrap();
}

#[tokio::test]
async fn unreadable_shop_events_end_the_run_and_are_named() {
    for (stream, type_name, schema_version, reason) in [
        ("order-other", "order.vanished", 1, "unknown event type"),
        ("order-other", "order.placed", 1, "missing field"),
        ("order-other", "order.placed", 9, "schema version 9"),
        ("payment-other", "payment.vanished", 1, "unknown event type"),
        ("stock-other", "stock.shipped", 1, "missing field"),
        ("notification-other", "notification.vanished", 1, "unknown event type"),
        ("notification-other", "notification.sent", 9, "schema version 9"),
        ("saga.checkout-other", "saga.started", 1, "missing field"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("shop.db");
        assert!(run(&store, "run").status.success());
        append(&store, stream, type_name, schema_version, "{}").await;
        for verb in ["run", "drain"] {
            let output = run(&store, verb);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{stream} {type_name}: {said}");
            for part in [&format!("event 1 of stream {stream} (position "), type_name, reason] {
                assert!(said.contains(part), "{stream} {type_name}: {part:?} is not in {said}");
            }
        }
    }
}

/// The bad event is a reply from which the relay cannot make a message.
#[tokio::test]
async fn parked_unreadable_events_are_reported_and_fail_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("shop.db");
    assert!(run(&store, "run").status.success());
    append(&store, "step.payment-saga.checkout-other", "step.vanished", 1, "{}").await;
    // A run of `drain` may end before the relay reaches the event, so the test repeats the command.
    for _ in 0..100 {
        let options = SqliteConnectOptions::new().filename(&store);
        let mut file = SqliteConnection::connect_with(&options).await.unwrap();
        let parked = sqlx::query_scalar("SELECT count(*) FROM documents WHERE collection = 'parked.payment.relay'");
        let parked: i64 = parked.fetch_one(&mut file).await.unwrap();
        file.close().await.unwrap();
        if parked > 0 {
            break;
        }
        run(&store, "drain");
    }
    // The message stays parked until an operator acts.
    for _ in 0..2 {
        let output = run(&store, "drain");
        let said = String::from_utf8_lossy(&output.stderr);
        let summary = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("parked: payment.relay, step.payment-saga.checkout-other: event 1 of stream "), "{said}");
        assert!(said.contains("step.vanished"), "{said}");
        assert!(summary.contains("\n✗ 1 parked\n"), "{summary}");
    }
}

/// Another application may keep its events in the same store.
#[tokio::test]
async fn events_of_other_applications_are_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("shop.db");
    assert!(run(&store, "run").status.success());
    append(&store, "strange-1", "strange.thing", 9, "[]").await;
    assert!(run(&store, "drain").status.success());
}
