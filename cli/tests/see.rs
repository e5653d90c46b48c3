//! An operator inspects a store.
#![allow(clippy::unwrap_used)]

mod travel;

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::Stdio,
};

use annals::EventStore;
use annals::{Repository, StreamId, Version};
use serde_json::Value;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use uuid::Uuid;

use travel::{Place, TRIPS, Trip, TripEvent, command, ended, url};

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_listed_by_category_size_and_age() {
    let place = Place::with_trips().await;
    let streams = place.annals(&["streams", "--category", "trip", "--json"]).json();
    let names: Vec<_> = streams.iter().map(|stream| stream["stream"].as_str().unwrap()).collect();
    assert_eq!(names, TRIPS.map(|trip| format!("trip-{trip}")));
    assert!(streams.iter().all(|stream| stream["events"] == 1));
    let table = place.annals(&["streams", "--category", "saga.journey", "--min-events", "5"]).fine();
    let lost = table.lines().find(|line| line.contains("lost-1")).unwrap();
    assert!(table.starts_with("STREAM ") && lost.starts_with("saga.journey-lost-1 "), "{table}");
    assert!(!table.contains("fine-1"), "a saga in which all goes well has four events: {table}");
    assert_eq!(place.annals(&["streams", "--quiet-for", "1h"]).fine().lines().count(), 1);
    let limited = place.annals(&["streams", "--limit", "2"]);
    assert_eq!((limited.code, limited.out.lines().count()), (0, 3));
    assert!(limited.err.contains("there are more streams"));
}

#[tokio::test(flavor = "multi_thread")]
async fn read_shows_a_range_of_versions_and_reports_a_missing_stream() {
    let place = Place::with_trips().await;
    let event = &place.annals(&["read", "trip-fine-1", "--json"]).json()[0];
    assert_eq!((&event["type"], &event["version"]), (&Value::from("trip.ordered"), &Value::from(1)));
    assert_eq!(event["data"], serde_json::json!({"trip_id": "fine-1", "price": 100}));
    let text = place.annals(&["read", "saga.journey-fine-1", "--from", "2", "--to", "3"]).fine();
    let versions: Vec<_> = text.lines().filter(|line| line.contains("saga.journey-fine-1 v")).collect();
    assert_eq!(versions.len(), 2, "{text}");
    assert!(versions[0].contains(" v2 ") && versions[1].contains(" v3 "), "{text}");
    assert_eq!(place.annals(&["read", "trip-fine-1", "--at", "1h"]).fine(), "", "an hour ago there was nothing");
    let missing = place.annals(&["read", "trip-nowhere"]).refused();
    assert!(missing.contains("there is no stream trip-nowhere; `streams --category trip`"), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_show_lane_lag_and_parked_messages() {
    let place = Place::with_trips().await;
    let followers = place.annals(&["subscriptions", "--sample", "0s", "--json"]).json();
    let brochure = followers.iter().find(|follower| follower["subscription"] == "brochure").unwrap();
    assert_eq!((&brochure["lag"], &brochure["lane"]), (&Value::from(0), &Value::from("0")));
    assert_eq!(brochure["waits_for"], "1 parked: see dead-letters");
    assert!(followers.iter().any(|follower| follower["lane"] == "agency.commands/0" && follower["lag"].is_null()));
}

#[tokio::test(flavor = "multi_thread")]
async fn sagas_are_listed_by_status() {
    let place = Place::with_trips().await;
    let stuck = place.annals(&["sagas", "--status", "stuck", "--json"]).json();
    assert_eq!(stuck.len(), 1, "{stuck:?}");
    assert_eq!((&stuck[0]["saga_id"], &stuck[0]["step"]), (&Value::from("lost-1"), &Value::from("announce guest")));
    let others = place.annals(&["sagas", "--status", "completed,compensated", "--json"]).json();
    assert_eq!(others.len(), 4);
    assert!(place.annals(&["sagas", "--saga", "nothing", "--json"]).json().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn saga_shows_history_and_diagram() {
    let place = Place::with_trips().await;
    let text = place.annals(&["saga", "poor-1"]).fine();
    for line in [
        "saga.journey-poor-1  compensated",
        "→ agency: agency.book for book room",
        "← charge card refused: the card is declined",
        "= compensating at undo book room, because of charge card: the card is declined",
        "→ agency: agency.cancel for undo book room",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    let text = place.annals(&["saga", "saga.journey-lost-1"]).fine();
    assert!(text.contains("← announce guest (attempt 2) failed: nobody answers the phone"), "{text}");
    assert!(
        text.trim_end().ends_with("waits at announce guest for an operator: retry, skip-step, compensate or abandon")
    );
    let drawing = place.annals(&["saga", "poor-1", "--diagram"]).fine();
    let expected = "flowchart LR\n    start((\" \")) --> n0[\"book room\"]\n    n0 --> n1[\"charge card\"]\n    \
                    n1 -. refused .-> n2[\"undo book room\"]\n    n2 -.-> compensated([\"compensated\"])\n";
    assert_eq!(drawing, expected);
    let picture = place.annals(&["saga", "poor-1", "--diagram=svg"]).fine();
    let drawn = [
        "<svg ",
        "saga.journey-poor-1<",
        ">book room<",
        ">charge card<",
        ">refused<",
        ">undo book room<",
        ">compensated<",
    ];
    let places: Vec<_> = drawn.iter().map(|part| picture.find(part)).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}: {picture}");
    assert!(place.annals(&["saga", "nobody"]).refused().contains("this store has sagas named: journey"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_shows_each_effect_below_its_cause() {
    let place = Place::with_trips().await;
    let nodes = place.annals(&["trace", "trip-poor-1", "--json"]).json();
    let correlation = place.annals(&["read", "trip-poor-1", "--json"]).json()[0]["metadata"]["correlation_id"].clone();
    let by_id = place.annals(&["trace", correlation.as_str().unwrap(), "--json"]).json();
    assert_eq!(nodes, by_id);
    let kinds: Vec<_> = nodes.iter().take(4).map(|node| (node["depth"].as_u64(), node["type"].as_str())).collect();
    let expected = [
        (Some(1), Some("trip.ordered")),
        (Some(2), Some("saga.started")),
        (Some(3), Some("agency.book")),
        (Some(4), Some("step.replied")),
    ];
    assert_eq!(kinds, expected);
    assert!(place.annals(&["trace", "trip-poor-1"]).fine().contains("   └─ saga.started  saga.journey-poor-1 v1"));
    assert!(place.annals(&["trace", &Uuid::nil().to_string()]).refused().contains("no event has the correlation id"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tail_shows_old_and_new_events() {
    let place = Place::with_trips().await;
    let old = place.annals(&["tail", "--from", "0", "--type", "trip.ordered", "--count", "5", "--json"]).json();
    assert_eq!(old.len(), 5);
    let one =
        place.annals(&["tail", "--from", "0", "--where", "$[?@.trip_id=='odd-1']", "--count", "1", "--json"]).json();
    assert_eq!(one[0]["stream"], "trip-odd-1");

    let store = place.open().await;
    let mut command = place.command(&["tail", "--category", "trip", "--count", "1", "--from"]);
    command.arg(store.status().await.unwrap().head.to_string()).stdout(Stdio::piped());
    let mut tail = command.spawn().unwrap();
    let order = TripEvent::Ordered { trip_id: "late".into(), price: 1 };
    let trips = Repository::<Trip>::new(std::sync::Arc::new(store.clone()));
    trips.execute("late", order, Uuid::new_v4()).await.unwrap();
    let line = BufReader::new(tail.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    assert!(line.contains("trip.ordered  trip-late v1"), "{line}");
    assert!(tail.wait().unwrap().success());
    assert_eq!(place.annals(&["tail", "--count", "0"]).fine(), "", "it waits for nothing");
    assert!(place.annals(&["tail", "--where", "$[?"]).refused().contains("not a JSONPath"));
}

#[tokio::test(flavor = "multi_thread")]
async fn unusual_stream_names_are_printed_on_one_line_and_read_back() {
    let place = Place::with_trips().await;
    let store = std::sync::Arc::new(place.open().await);
    let trips = Repository::<Trip>::new(store.clone());
    let names = ["it's \"quoted\"", "new\nline v9", "🚂", "a'b; DROP TABLE events"];
    for name in names.iter().filter(|name| !name.contains('\n')) {
        let order = TripEvent::Ordered { trip_id: "x".into(), price: 1 };
        trips.execute(name, order, Uuid::new_v4()).await.unwrap();
    }
    // A store rejects line breaks, but a person can insert them with SQL.
    let options = SqliteConnectOptions::new().filename(place.file("travel.db"));
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let broken = "INSERT INTO events SELECT (SELECT max(position) + 1 FROM events), 'trip-new' || char(10) || 'line v9', 1, \
                  lower(hex(randomblob(16))), type, 1, data, metadata, recorded_at FROM events WHERE position = 1";
    sqlx::raw_sql(broken).execute(&mut connection).await.unwrap();
    let table = place.annals(&["streams", "--category", "trip"]).fine();
    assert_eq!(table.lines().count(), 1 + TRIPS.len() + names.len(), "{table}");
    for name in names {
        let stream = format!("trip-{name}");
        assert_eq!(place.annals(&["read", &stream, "--json"]).json()[0]["stream"], *stream);
        let text = place.annals(&["read", &stream]).fine();
        assert!(text.lines().next().unwrap().contains(" v1  position "), "{text}");
        assert_eq!(place.annals(&["replay", "--stream", &stream]).fine().lines().count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_creates_no_store_and_rejects_foreign_files() {
    let place = Place::empty();
    let missing = place.annals(&["streams"]).refused();
    assert!(missing.contains("there is no such store; `migrate` creates one"), "{missing}");
    assert!(!place.file("travel.db").exists(), "a look created a store");
    std::fs::write(place.file("empty.db"), "").unwrap();
    let empty = ended(command(&["streams", "--store", &url(&place.file("empty.db"))])).refused();
    assert!(empty.contains("there is no such store"), "{empty}");
    std::fs::write(place.file("text.db"), "no database at all, but long enough to be looked at".repeat(10)).unwrap();
    let text = ended(command(&["streams", "--store", &url(&place.file("text.db"))])).refused();
    assert!(text.contains("is not a SQLite database"), "{text}");

    assert!(place.annals(&["migrate"]).fine().ends_with(": created\n"));
    assert!(place.annals(&["migrate"]).fine().ends_with(": up to date\n"));
    assert_eq!(place.annals(&["streams", "--json"]).fine(), "");
    assert_eq!(place.annals(&["sagas", "--json"]).fine(), "");

    let mut bytes = std::fs::read(place.file("travel.db")).unwrap();
    // These bytes hold the version of the schema: https://www.sqlite.org/fileformat2.html#the_database_header
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    std::fs::write(place.file("newer.db"), bytes).unwrap();
    let newer = ended(command(&["streams", "--store", &url(&place.file("newer.db"))])).refused();
    assert!(newer.contains("has schema version 99; this build knows versions up to 2: use a newer build"), "{newer}");
}

#[test]
fn usage_errors_and_help_show_no_password() {
    for (words, said) in [
        (&["streams"][..], "no store is named: pass --store URL, or set ANNALS_STORE"),
        (&["streams", "--store", "postgre://u:secret@h/d"], "unknown store scheme"),
        (&["streams", "--store", "u:secret@h/d"], "invalid value '…' for '--store <URL>': unknown store scheme"),
        (&["streams", "--stroe", "postgres://u:secret@h/d"], "unexpected argument '--stroe'"),
        (&["postgres://u:secret@h/d"], "unrecognized subcommand"),
        (
            &["streams", "--store", "postgres://u:secret@127.0.0.1:1/d"],
            "postgres://u@127.0.0.1:1/d: the database cannot",
        ),
        (&["streams", "--quiet-for", "soon"], "not a duration: write a number with a unit"),
        (&["read", "x-1", "--at", "yesterday"], "not a time: write 2026"),
        (&["tail", "--store", "memory:"], "a memory store ends with its process"),
    ] {
        let refused = ended(command(words)).refused();
        assert!(refused.contains(said), "{words:?}: {refused}");
        assert!(!refused.contains("secret"), "{words:?}: {refused}");
    }
    let help = ended(command(&["--help"])).fine();
    assert!(help.contains("Examples:") && help.contains("Exit codes:"), "{help}");
    for name in ["streams", "read", "tail", "subscriptions", "sagas", "saga", "trace", "migrate", "completions"] {
        let help = ended(command(&[name, "--help"])).fine();
        assert!(help.contains("Example"), "{name} has no example: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(ended(command(&["completions", shell])).fine().contains("subscriptions"), "{shell}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_output_is_no_error() {
    let place = Place::with_trips().await;
    let mut command = place.command(&["tail", "--from", "0", "--json"]);
    let mut tail = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(tail.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("{\"position\":1,"), "{line}");
    // The command writes the next event to a closed pipe.
    let store = place.open().await;
    let trips = Repository::<Trip>::new(std::sync::Arc::new(store.clone()));
    let order = TripEvent::Ordered { trip_id: "late".into(), price: 1 };
    trips.execute("late", order, Uuid::new_v4()).await.unwrap();
    let output = tail.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
    let late = StreamId::parse("trip-late").unwrap();
    assert_eq!(store.read_stream(&late, Version::START, 9).await.unwrap().len(), 1);
}

/// A server that asks for a password and accepts none. Implements only the part of the protocol that the test needs
/// (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).
fn server_that_takes_no_password() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut message = [0; 4_096];
            let startup = connection.read(&mut message).unwrap();
            assert!(startup > 8);
            connection.write_all(b"R\0\0\0\x08\0\0\0\x03").unwrap();
            let password = connection.read(&mut message).unwrap();
            assert!(message[..password].windows(6).any(|part| part == b"secret"));
            let said = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user \"shop\"\0\0";
            let length = u32::try_from(said.len() + 4).unwrap().to_be_bytes();
            connection.write_all(&[b"E", &length[..], said].concat()).unwrap();
        }
    });
    port
}

#[test]
fn wrong_password_is_reported_and_not_shown() {
    let url = format!("postgres://shop:secret@127.0.0.1:{}/shop?sslmode=disable", server_that_takes_no_password());
    let refused = ended(command(&["streams", "--store", &url])).refused();
    assert!(
        refused.contains("access to the database is denied") && refused.contains("password authentication failed"),
        "{refused}"
    );
    assert!(!refused.contains("secret"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn narrow_terminal_shows_one_cell_per_line() {
    let place = Place::with_trips().await;
    let annals = env!("CARGO_BIN_EXE_annals");
    let mut script = std::process::Command::new("script");
    let session = format!("stty cols 50; {annals} sagas --store {}", url(&place.file("travel.db")));
    script.args(["--quiet", "--return", "--command", &session, "/dev/null"]).stdin(Stdio::null());
    let narrow = ended(script).fine();
    let poor = narrow.replace('\r', "").split("\n\n").find(|record| record.contains("poor-1")).unwrap().to_owned();
    let lines: Vec<_> = poor.lines().filter(|line| !line.starts_with("STARTED") && !line.starts_with("TOOK")).collect();
    let expected = [
        "SAGA        journey",
        "ID          poor-1",
        "STATUS      compensated",
        "STEP        book room",
        "ATTEMPTS    1",
        "LAST ERROR  charge card: the card is declined",
    ];
    assert_eq!(lines, expected);
    let whole = place.annals(&["sagas"]).fine();
    assert_eq!(whole.lines().count(), 1 + TRIPS.len(), "{whole}");
    let widest = whole.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest > 80, "{whole}");
}
