//! Exports, imports and replays change no event, and can be resumed after an interruption.
#![allow(clippy::unwrap_used)]

mod travel;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use annals::{
    Append, Commit, DocumentKey, EventStore, Expected, Metadata, NewEvent, Put, StreamId, TraceContext, Version,
};
use annals_sqlite::SqliteStore;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use uuid::Uuid;

use travel::{Ended, Place, command, ended, url};

fn annals(store: &Path, words: &[&str]) -> Ended {
    let mut command = command(words);
    command.env("ANNALS_STORE", url(store));
    ended(command)
}

/// Returns the events and documents of a store file, read with SQL.
async fn contents(path: &Path) -> (Vec<String>, Vec<String>) {
    let options = SqliteConnectOptions::new().filename(path);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let events = "SELECT json_array(position, stream_id, version, event_id, type, schema_version, data, metadata, recorded_at) \
                  FROM events ORDER BY position";
    let documents = "SELECT json_array(collection, id, version, body, due) FROM documents WHERE collection <> 'import' \
                     ORDER BY collection, id";
    let events = sqlx::query_scalar(events).fetch_all(&mut connection).await.unwrap();
    (events, sqlx::query_scalar(documents).fetch_all(&mut connection).await.unwrap())
}

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Returns a commit of this many events with payloads of every kind.
fn commit(stream: &str, from: i64, count: i64) -> Commit {
    let payloads = ["{\"a\":1.50, \"a\":\"ü\\u00fc\"}", "{\"a\":\n[ ]}", " null ", "123456789012345678901234567890"];
    let event = |number: i64| NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: payloads[(number % 4) as usize].into(),
        metadata: Metadata {
            trace: TraceContext::parse([TRACEPARENT], ["vendor=\"x\\"]),
            ..Metadata::of_request(Uuid::new_v4())
        },
    };
    let append = Append {
        stream: StreamId::parse(stream).unwrap(),
        expected: Expected::Version(Version(from)),
        events: (from..from + count).map(event).collect(),
    };
    Commit { appends: vec![append], puts: Vec::new() }
}

/// More events than one section holds.
const MANY: i64 = 12_000;

async fn many(place: &Place) -> std::path::PathBuf {
    let path = place.file("many.db");
    let store = SqliteStore::open(&path).await.unwrap();
    for from in (0..MANY).step_by(4_000) {
        store.commit(commit("thing-ü 1", from, 4_000)).await.unwrap();
    }
    let put = |id: &str, body: &str| Put {
        key: DocumentKey::new("read.things", id),
        expected: None,
        body: Some(body.into()),
        due: chrono::DateTime::from_timestamp_micros(1_700_000_000_000_001),
    };
    for _ in 0..3 {
        let puts = vec![put("a", "{\"x\":\n1}"), put("b \"", "[]")];
        store.commit(Commit { appends: Vec::new(), puts }).await.unwrap();
    }
    store.close().await.unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn export_and_import_keep_every_event_and_document() {
    let place = Place::with_trips().await;
    let original = contents(&place.file("travel.db")).await;
    for name in ["plain.ndjson", "packed.ndjson.zst"] {
        let file = place.file(name);
        let exported = annals(&place.file("travel.db"), &["export", file.to_str().unwrap(), "--json"]).json();
        assert_eq!(exported[0]["events"], original.0.len());
        assert_eq!(exported[0]["documents"], original.1.len());
        let target = place.file(&format!("{name}.db"));
        let refused = annals(&target, &["import", file.to_str().unwrap()]).refused();
        assert!(refused.contains("there is no such store"), "{refused}");
        annals(&target, &["migrate"]).fine();
        annals(&target, &["import", file.to_str().unwrap()]).fine();
        assert_eq!(contents(&target).await, original, "{name}");
        let again = annals(&target, &["import", file.to_str().unwrap()]);
        assert!(again.code == 0 && again.err.contains("was imported before"), "{again:?}");
        let refused = annals(&place.file("travel.db"), &["export", file.to_str().unwrap()]).refused();
        assert!(refused.contains("exists already"), "{refused}");
        let refused = annals(&place.file("travel.db"), &["export", file.to_str().unwrap(), "--resume"]).refused();
        assert!(refused.contains("is complete"), "{refused}");
        let refused = annals(&place.file("travel.db"), &["import", file.to_str().unwrap()]).refused();
        assert!(refused.contains("the store is not empty"), "{refused}");
    }
    // A service can continue on the imported store.
    let target = SqliteStore::open(place.file("plain.ndjson.db")).await.unwrap();
    let store: std::sync::Arc<dyn EventStore> = std::sync::Arc::new(target.clone());
    let sagas = travel::sagas(&store).await.len();
    assert_eq!(sagas, travel::TRIPS.len());
    let committed = target.commit(commit("thing-new", 0, 1)).await.unwrap();
    assert_eq!(committed.position.0, original.0.len() as i64 + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_export_and_import_resume_from_any_point() {
    let place = Place::empty();
    let source = many(&place).await;
    let original = contents(&source).await;
    for name in ["plain.ndjson", "packed.ndjson.zst"] {
        let whole = place.file(name);
        annals(&source, &["export", whole.to_str().unwrap()]).fine();
        let bytes = fs::read(&whole).unwrap();
        let target = place.file(&format!("{name}.db"));
        annals(&target, &["migrate"]).fine();
        for (number, share) in [5, 40, 60, 95].into_iter().enumerate() {
            let part = place.file(&format!("{number}.{name}"));
            fs::write(&part, &bytes[..bytes.len() * share / 100]).unwrap();
            let part = part.to_str().unwrap();
            // The first import writes the complete sections, and a later import writes the rest.
            let incomplete = annals(&target, &["import", part]);
            assert_eq!(incomplete.code, 2, "{incomplete:?}");
            annals(&source, &["export", part, "--resume"]).fine();
            let other = place.file(&format!("{number}.{name}.db"));
            annals(&other, &["migrate"]).fine();
            annals(&other, &["import", part]).fine();
            assert_eq!(contents(&other).await, original, "{name} from {share} %");
        }
        annals(&target, &["import", whole.to_str().unwrap()]).fine();
        assert_eq!(contents(&target).await, original, "{name}");
        let stranger = place.file(&format!("stranger.{name}"));
        annals(&source, &["export", stranger.to_str().unwrap()]).fine();
        let refused = annals(&target, &["import", stranger.to_str().unwrap()]).refused();
        assert!(refused.contains("was filled from another export"), "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn import_writes_nothing_of_a_changed_section() {
    let place = Place::empty();
    let source = many(&place).await;
    let file = place.file("many.ndjson");
    annals(&source, &["export", file.to_str().unwrap()]).fine();
    let text = fs::read_to_string(&file).unwrap();
    let changed = text.replacen("\"version\":7000,", "\"version\":7001,", 1);
    let removed: String =
        text.lines().filter(|line| !line.starts_with("{\"position\":7000,")).map(|line| format!("{line}\n")).collect();
    for (name, text) in [("changed", changed), ("removed", removed)] {
        let file = place.file(name);
        fs::write(&file, text).unwrap();
        let target = place.file(&format!("{name}.db"));
        annals(&target, &["migrate"]).fine();
        let refused = annals(&target, &["import", file.to_str().unwrap()]).refused();
        assert!(refused.contains("the checksum is wrong"), "{refused}");
        assert_eq!(contents(&target).await.0.len(), 5_000, "{name}: the first section and no more");
    }
    for (name, text, said) in [
        ("newer", text.replacen("\"annals_export\":1", "\"annals_export\":2", 1), "has format 2; this build reads 1"),
        ("other", "{}\n".to_owned(), "is not an export"),
    ] {
        let file = place.file(name);
        fs::write(&file, text).unwrap();
        let target = place.file(&format!("{name}.db"));
        annals(&target, &["migrate"]).fine();
        assert!(annals(&target, &["import", file.to_str().unwrap()]).refused().contains(said));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_writes_a_range_to_a_file_or_counts_events() {
    let place = Place::with_trips().await;
    let lines = |words: &[&str]| place.annals(words).fine().lines().count();
    assert_eq!(lines(&["replay", "--category", "trip"]), 5);
    assert_eq!(lines(&["replay", "--stream", "trip-odd-1,trip-poor-1"]), 2);
    assert_eq!(lines(&["replay", "--from", "2", "--to", "4"]), 3);
    assert_eq!(lines(&["replay", "--since", "1h", "--until", "30m"]), 0);
    assert_eq!(lines(&["replay", "--type", "trip.ordered", "--where", "$.trip_id", "--speed", "1000x"]), 5);
    let counted = place.annals(&["replay", "--type", "trip.ordered", "--dry-run"]).fine();
    assert!(counted.starts_with("5 events would be replayed"), "{counted}");
    let file = place.file("trips.ndjson");
    let to_file = ["replay", "--category", "trip", "--output", file.to_str().unwrap()];
    assert!(place.annals(&to_file).fine().starts_with("5 events replayed"));
    assert!(place.annals(&to_file).refused().contains("exists already"));
    place.annals(&[&to_file[..], &["--append"]].concat()).fine();
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 10);
    let line = place.annals(&["replay", "--stream", "trip-odd-1"]).fine();
    assert_eq!(line, place.annals(&["read", "trip-odd-1", "--json"]).fine());
    assert!(place.annals(&["replay", "--speed", "0"]).refused().contains("a number above 0"));
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_stops_replay_to_a_file_and_printed_command_continues() {
    let place = Place::empty();
    let source = many(&place).await;
    let file = place.file("slow.ndjson");
    let mut slow = command(&["replay", "--speed", "1x", "--output", file.to_str().unwrap()]);
    // All events have nearly the same time, so one more event with a much later time delays the replay.
    let options = SqliteConnectOptions::new().filename(&source);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let later = "INSERT INTO events SELECT position + 1, 'thing-late', 1, lower(hex(randomblob(16))), type, schema_version, data, \
                 metadata, recorded_at + 3600000000 FROM events ORDER BY position DESC LIMIT 1";
    sqlx::raw_sql(later).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let running = slow.env("ANNALS_STORE", url(&source)).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while fs::metadata(&file).map_or(0, |found| found.len()) < 1 << 20 {
        assert!(started.elapsed() < Duration::from_secs(60), "it writes nothing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let sent = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let stopped = Ended::from(running.wait_with_output().unwrap());
    assert_eq!(stopped.code, 130, "{stopped:?}");
    let (_, go_on) = stopped.err.trim().split_once("to continue, run: ").unwrap();
    // The resumed replay keeps the old speed. At that speed, the late event would take an hour.
    assert!(go_on.contains("--speed 1x"), "{go_on}");
    let go_on = go_on.replace("--speed 1x", "--speed 1000000x");
    let words: Vec<_> = go_on.split(' ').collect();
    assert_eq!(words[..2], ["annals", "replay"]);
    annals(&source, &words[1..]).fine();
    let text = fs::read_to_string(&file).unwrap();
    let positions: Vec<_> = text
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["position"].as_i64().unwrap())
        .collect();
    assert_eq!(positions, (1..=MANY + 1).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_streams_are_archived_and_read_from_the_file() {
    let place = Place::with_trips().await;
    let file = place.file("journeys.ndjson.zst");
    let file = file.to_str().unwrap();
    let archive = ["archive", file, "--category", "saga.journey,trip", "--quiet-for", "0s"];
    let done = &place.annals(&[&archive[..], &["--json"]].concat()).json()[0];
    // The archive leaves out the stuck saga, because the saga has not ended. A trip counts as finished by its age
    // alone.
    assert_eq!(done["streams"], (travel::TRIPS.len() - 1) + travel::TRIPS.len());
    assert!(place.annals(&archive).refused().contains("exists already"));
    for stream in ["saga.journey-fine-1", "saga.journey-poor-1", "trip-odd-1"] {
        let words = ["read", stream, "--archive", file, "--json"];
        // With `--archive`, the command does not open the store.
        let read = annals(&place.file("nowhere.db"), &words).fine();
        assert_eq!(read, place.annals(&["read", stream, "--json"]).fine());
    }
    let part = place.annals(&["read", "saga.journey-fine-1", "--archive", file, "--from", "2", "--to", "3", "--json"]);
    assert_eq!(part.json().len(), 2);
    let missing = place.annals(&["read", "saga.journey-lost-1", "--archive", file]).refused();
    assert!(missing.contains("there is no stream saga.journey-lost-1 in "), "{missing}");
    let target = place.file("target.db");
    annals(&target, &["migrate"]).fine();
    assert!(annals(&target, &["import", file]).refused().contains("is an archive of some streams"));
    let nothing = place.file("nothing.ndjson");
    let said = place.annals(&["archive", nothing.to_str().unwrap(), "--category", "trip", "--quiet-for", "1h"]).fine();
    assert!(said.contains("nothing was archived") && !nothing.exists(), "{said}");

    // A file that was changed is rejected.
    let plain = place.file("trips.ndjson");
    place.annals(&["archive", plain.to_str().unwrap(), "--category", "trip", "--quiet-for", "0s"]).fine();
    let text = fs::read_to_string(&plain).unwrap();
    fs::write(&plain, text.replacen("\"price\":100", "\"price\":101", 1)).unwrap();
    let refused = place.annals(&["read", "trip-fine-1", "--archive", plain.to_str().unwrap()]).refused();
    assert!(refused.contains("the checksum is wrong"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_archive_resumes_with_the_same_streams() {
    let place = Place::empty();
    let source = many(&place).await;
    let store = SqliteStore::open(&source).await.unwrap();
    store.commit(commit("thing-other", 0, 7_000)).await.unwrap();
    store.close().await.unwrap();
    let read = |file: &Path| {
        let words = ["read", "thing-other", "--archive", file.to_str().unwrap(), "--json"];
        annals(&place.file("nowhere.db"), &words).fine()
    };
    for name in ["plain.ndjson", "packed.ndjson.zst"] {
        let whole = place.file(name);
        let file = whole.to_str().unwrap();
        annals(&source, &["archive", file, "--category", "thing", "--quiet-for", "0s"]).fine();
        assert!(annals(&source, &["archive", file, "--resume"]).refused().contains("is complete"));
        assert!(
            annals(&source, &["archive", file, "--resume", "--category", "thing"]).refused().contains("cannot be used")
        );
        let bytes = fs::read(&whole).unwrap();
        for share in [1, 30, 60, 99] {
            let part = place.file(&format!("{share}.{name}"));
            fs::write(&part, &bytes[..bytes.len() * share / 100]).unwrap();
            let done = &annals(&source, &["archive", part.to_str().unwrap(), "--resume", "--json"]).json()[0];
            assert_eq!((&done["events"], &done["streams"]), (&(MANY + 7_000).into(), &2.into()), "{share} % of {name}");
            assert_eq!(read(&part), read(&whole));
        }
        fs::write(place.file(&format!("half.{name}")), &bytes[..bytes.len() / 2]).unwrap();
    }
    let half = place.file("half.plain.ndjson");
    let go_on = ["archive", half.to_str().unwrap(), "--resume"];
    let export = annals(&source, &["export", half.to_str().unwrap(), "--resume"]).refused();
    assert!(export.contains("is an archive, not an export: continue the file with `archive --resume`"), "{export}");
    // An archived stream gets another event, so a resumed archive would lack the end of this stream.
    let store = SqliteStore::open(&source).await.unwrap();
    store.commit(commit("thing-other", 7_000, 1)).await.unwrap();
    store.close().await.unwrap();
    let refused = annals(&source, &go_on).refused();
    assert!(
        refused.contains("was started with 2 finished streams, and some of these streams have changed since"),
        "{refused}"
    );
}

/// The printed command that continues an interrupted command is complete: it contains the store that was given on the
/// command line.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn printed_command_to_continue_names_the_store() {
    let place = Place::empty();
    let source = many(&place).await;
    let file = place.file("it's slow.ndjson");
    // Two events, an hour apart.
    let options = SqliteConnectOptions::new().filename(&source);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let later = "INSERT INTO events SELECT position + 1, 'thing-late', 1, lower(hex(randomblob(16))), type, schema_version, data, \
                 metadata, recorded_at + 3600000000 FROM events ORDER BY position DESC LIMIT 1";
    sqlx::raw_sql(later).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let mut slow = command(&["replay", "--speed", "1x", "--from", "12000", "--output", file.to_str().unwrap()]);
    let running = slow.args(["--store", &url(&source)]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    travel::until("it has begun", async || file.exists()).await;
    let sent = std::process::Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let stopped = Ended::from(running.wait_with_output().unwrap());
    let (_, go_on) =
        stopped.err.trim().split_once("to continue, run: annals ").unwrap_or_else(|| panic!("{stopped:?}"));
    // The test runs the printed command in a shell.
    let script = format!("{} {}", env!("CARGO_BIN_EXE_annals"), go_on.replace("--speed 1x", "--speed 1000000x"));
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &script]).env_remove("ANNALS_STORE");
    ended(shell).fine();
    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(text.lines().count(), 2, "{stopped:?}: {text}");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn replay_to_a_full_disk_leaves_whole_lines_and_resumes() {
    let place = Place::empty();
    let source = many(&place).await;
    let file = place.file("full.ndjson");
    let annals_command = env!("CARGO_BIN_EXE_annals");
    let run = |limit: &str, words: &str| {
        let mut shell = std::process::Command::new("sh");
        // A limit on the file size has the same effect as a full disk.
        shell.args(["-c", &format!("{limit} {annals_command} {words}")]).env("ANNALS_STORE", url(&source));
        ended(shell)
    };
    let words = format!("replay --output {}", file.display());
    let full = run("trap '' XFSZ; ulimit -f 2000;", &words);
    assert_eq!(full.code, 2, "{full:?}");
    let written = fs::read_to_string(&file).unwrap();
    assert!(written.ends_with('\n') && written.lines().count() > 100, "{} bytes", written.len());
    let (said, go_on) = full.err.trim().split_once("to continue, run: annals ").unwrap_or_else(|| panic!("{full:?}"));
    assert!(said.contains("cannot be written: ") && said.contains(" events replayed, up to position "), "{said}");
    run("", go_on).fine();
    assert!(
        fs::read_to_string(&file).unwrap() == annals(&source, &["replay"]).fine(),
        "it did not go on where it ended"
    );
}
