//! `verify` finds changes that were made to a store without the library, and reports where they are.
#![allow(clippy::unwrap_used)]

mod travel;

use std::{fs, path::Path};

use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use travel::{Ended, Place, command, ended, url};

fn verify(store: &Path, words: &[&str]) -> Ended {
    let mut command = command(&[&["verify"], words].concat());
    command.env("ANNALS_STORE", url(store));
    ended(command)
}

/// Changes a copy of the store as a superuser could. Neither triggers nor permissions stop a superuser.
async fn tampered(place: &Place, name: &str, sql: &'static str) -> std::path::PathBuf {
    let path = place.file(name);
    fs::copy(place.file("travel.db"), &path).unwrap();
    let options = SqliteConnectOptions::new().filename(&path);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let allowed = "DROP TRIGGER events_never_change; DROP TRIGGER events_never_go;";
    sqlx::raw_sql(allowed).execute(&mut connection).await.unwrap();
    let changed = sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
    assert!(changed.rows_affected() > 0, "{name}: {sql}");
    connection.close().await.unwrap();
    path
}

/// Returns the faults found, as `where: what`.
fn faults(store: &Path, words: &[&str]) -> Vec<String> {
    let ended = verify(store, &[words, &["--json"]].concat());
    assert_eq!((ended.code, &*ended.err), (1, ""), "{}", ended.out);
    let lines: Vec<serde_json::Value> = ended.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (summary, faults) = lines.split_last().unwrap();
    assert_eq!(summary["faults"], faults.len());
    let told = |fault: &serde_json::Value| {
        format!("{}: {}", fault["where"].as_str().unwrap(), fault["what"].as_str().unwrap())
    };
    faults.iter().map(told).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sound_store_has_no_fault() {
    let place = Place::with_trips().await;
    let text = verify(&place.file("travel.db"), &[]).fine();
    assert!(text.ends_with(" documents verified: 0 faults\n"), "{text}");
    assert!(text.contains("5 sagas"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_faults_without_seals() {
    let place = Place::with_trips().await;
    for (name, sql, expected) in [
        (
            "deleted",
            "DELETE FROM events WHERE stream_id = 'saga.journey-fine-1' AND version = 2",
            "(saga.journey-fine-1 v3): version 2 of the stream is missing before this event",
        ),
        (
            "twice",
            "UPDATE events SET event_id = (SELECT event_id FROM events WHERE position = 1) WHERE position = 3",
            "position 3 (",
        ),
        ("payload", "UPDATE events SET data = '{' WHERE position = 2", ": the payload cannot be read: "),
        (
            "beyond",
            "UPDATE documents SET body = json_set(body, '$.next', 999999) WHERE collection = 'checkpoint' AND id = 'brochure/0'",
            "document checkpoint/brochure/0: the checkpoint is at position 999999, and the log ends at ",
        ),
        (
            "lost event",
            "UPDATE documents SET body = json_set(body, '$.event.id', '00000000-0000-0000-0000-000000000001')
              WHERE collection = 'checkpoint' AND id = 'brochure/0'",
            "document checkpoint/brochure/0: the checkpoint is after event 00000000-0000-0000-0000-000000000001 at position ",
        ),
        (
            "snapshot",
            r#"INSERT INTO documents (collection, id, version, body) VALUES ('snapshot.trip', 'fine-1', 1,
               '{"version":99,"schema":1,"ids":["00000000-0000-0000-0000-000000000001"],"state":{}}')"#,
            "document snapshot.trip/fine-1: the snapshot ends with event 00000000-0000-0000-0000-000000000001 at version 99 of trip-fine-1",
        ),
        (
            "parked",
            r#"INSERT INTO documents (collection, id, version, body) VALUES ('parked.brochure', 'trip-lost #1', 1,
               '{"subscription":"brochure","lane":"brochure/0","key":"trip-lost","reason":"x","attempts":1,
                 "parked_at":"2026-01-01T00:00:00Z","position":999999,"message":{}}')"#,
            "document parked.brochure/trip-lost #1: the parked event has position 999999, and the log ends at ",
        ),
        (
            "unreadable",
            "UPDATE documents SET body = '{}' WHERE collection = 'checkpoint' AND id = 'brochure/0'",
            "document checkpoint/brochure/0: the document cannot be read: missing field `next`",
        ),
        (
            "revived",
            "UPDATE events SET data = json_set(data, '$.progress.status', 'running', '$.progress.ended', NULL)
              WHERE stream_id = 'saga.journey-poor-1' AND version = (SELECT max(version) FROM events
              WHERE stream_id = 'saga.journey-poor-1')",
            "(saga.journey-poor-1 v4): the status changed from Compensating to Running",
        ),
        (
            "forged",
            "UPDATE documents SET body = json_set(body, '$.ended_at', '2026-01-01T00:00:00Z')
              WHERE collection = 'saga.journey' AND id = 'lost-1'",
            "document saga.journey/lost-1: the document says that the saga has ended, and the log does not",
        ),
    ] {
        let store = tampered(&place, name, sql).await;
        let found = faults(&store, &[]);
        assert!(found.iter().any(|fault| fault.contains(expected)), "{name}: {found:#?}");
    }
    let swapped = tampered(
        &place,
        "swapped",
        "UPDATE events SET version = version + 1000 WHERE stream_id = 'saga.journey-fine-1' AND version IN (2, 3);
         UPDATE events SET version = 1005 - version WHERE stream_id = 'saga.journey-fine-1' AND version > 1000",
    )
    .await;
    let found = faults(&swapped, &[]);
    assert!(
        found.iter().any(|fault| fault.contains("(saga.journey-fine-1 v3): version 2 of the stream is missing")),
        "{found:#?}"
    );
    assert!(
        found.iter().any(|fault| fault.contains("(saga.journey-fine-1 v2): the stream is already at version 3")),
        "{found:#?}"
    );
}

/// Seals the whole store. Returns the hash of the last seal, and the last position.
fn sealed(place: &Place) -> (String, i64) {
    let sealed = verify(&place.file("travel.db"), &["--seal", "--json"]).json().remove(0);
    let until = sealed["sealed_until"].as_i64().unwrap();
    assert_eq!(until, sealed["events"].as_i64().unwrap());
    (sealed["seal"].as_str().unwrap().to_owned(), until)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_seal_without_new_events_changes_nothing() {
    let place = Place::with_trips().await;
    let travel = place.file("travel.db");
    let (hash, _) = sealed(&place);
    verify(&travel, &["--expect", &hash]).fine();
    assert_eq!(
        verify(&travel, &["--seal", "--json"]).json()[0]["seal"],
        hash.as_str(),
        "there was nothing new to seal"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_changes_to_sealed_events() {
    let place = Place::with_trips().await;
    let (_, until) = sealed(&place);
    let second = place_of(&place, 2).await;
    let last = place_of(&place, until).await;
    let before = place_of(&place, until - 1).await;
    for (name, sql, expected) in [
        (
            "price",
            "UPDATE events SET data = json_set(data, '$.price', 1) WHERE stream_id = 'trip-fine-1'",
            "the event was changed after it was sealed".to_owned(),
        ),
        (
            "time",
            "UPDATE events SET recorded_at = recorded_at - 1 WHERE position = 2",
            format!("{second}: the event was changed after it was sealed"),
        ),
        (
            "metadata",
            "UPDATE events SET metadata = json_set(metadata, '$.note', 'x') WHERE position = 2",
            format!("{second}: the event was changed after it was sealed"),
        ),
        (
            "tail",
            "DELETE FROM documents WHERE collection = 'checkpoint';
             DELETE FROM events WHERE position > (SELECT max(position) - 2 FROM events)",
            format!("{last}: the sealed event is missing"),
        ),
        (
            "tail but one",
            "DELETE FROM documents WHERE collection = 'checkpoint';
             DELETE FROM events WHERE position > (SELECT max(position) - 2 FROM events)",
            format!("{before}: the sealed event is missing"),
        ),
        (
            "long tail",
            "DELETE FROM documents WHERE collection = 'checkpoint';
             DELETE FROM events WHERE position > (SELECT max(position) - 11 FROM events)",
            format!("positions {} to {until}: 11 sealed events are missing, from position {0} (", until - 10),
        ),
        (
            "places",
            "UPDATE events SET position = position + 1000 WHERE position IN (3, 4);
             UPDATE events SET position = 1007 - position WHERE position > 1000",
            "after it was sealed: the event is now ".to_owned(),
        ),
        (
            "added",
            "INSERT INTO events SELECT position + 1000, 'trip-forged', 1, lower(hex(randomblob(16))), type, 1, data, metadata, 0
               FROM events WHERE position = 1;
             UPDATE events SET position = position + 2000 WHERE position > 5 AND position < 1000;
             UPDATE events SET position = 6 WHERE position = 1001;
             UPDATE events SET position = position - 1999 WHERE position > 2000",
            "position 6 (".to_owned(),
        ),
        (
            "stream",
            "DELETE FROM documents WHERE id LIKE '%poor-1'; DELETE FROM events WHERE stream_id LIKE '%-poor-1'",
            ": the sealed event is missing".to_owned(),
        ),
    ] {
        let store = tampered(&place, name, sql).await;
        let found = faults(&store, &[]);
        assert!(found.iter().any(|fault| fault.contains(&expected)), "{name}: {found:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn verify_finds_changes_to_seals() {
    let place = Place::with_trips().await;
    let (hash, until) = sealed(&place);
    for (name, sql, expected) in [
        (
            "chains",
            "UPDATE documents SET body = json_set(body, '$.hash', 'ab') WHERE collection = 'seal.streams'",
            format!("streams up to position {until}: the hash chains differ from the sealed hash chains"),
        ),
        (
            "no chains",
            "DELETE FROM documents WHERE collection = 'seal.streams'",
            "document seal.streams/chains: the document is missing".to_owned(),
        ),
        (
            "seal",
            "UPDATE documents SET body = json_set(body, '$.hash', 'ab') WHERE collection = 'seal'",
            "the seal was changed: its hash does not match its contents".to_owned(),
        ),
    ] {
        let store = tampered(&place, name, sql).await;
        let found = faults(&store, &[]);
        assert!(found.iter().any(|fault| fault.contains(&expected)), "{name}: {found:#?}");
    }
    // If the seals are removed too, only a hash that the operator noted elsewhere exposes the change.
    let removed = tampered(&place, "removed", "DELETE FROM documents WHERE collection LIKE 'seal%'").await;
    verify(&removed, &[]).fine();
    assert_eq!(faults(&removed, &["--expect", &hash]), [format!("seals: no seal has the expected hash {hash}")]);
}

/// Returns the place of an event in the words that faults use for it.
async fn place_of(place: &Place, position: i64) -> String {
    let options = SqliteConnectOptions::new().filename(place.file("travel.db"));
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let sql =
        "SELECT 'position ' || position || ' (' || stream_id || ' v' || version || ')' FROM events WHERE position = ?";
    sqlx::query_scalar(sql).bind(position).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_seal_follows_the_previous_seal() {
    let place = Place::with_trips().await;
    let first = verify(&place.file("travel.db"), &["--seal", "--json"]).json().remove(0);
    let store = place.open().await;
    travel::travel(std::sync::Arc::new(store.clone()), &["fine-3", "fine-4"]).await;
    store.close().await.unwrap();
    let second = verify(&place.file("travel.db"), &["--seal", "--json"]).json().remove(0);
    assert!(second["sealed_until"].as_i64() > first["sealed_until"].as_i64());
    verify(&place.file("travel.db"), &["--expect", first["seal"].as_str().unwrap()]).fine();
    let one = tampered(
        &place,
        "one",
        "DELETE FROM documents WHERE collection = 'seal' AND id = (SELECT min(id) FROM documents WHERE collection = 'seal')",
    )
    .await;
    let found = faults(&one, &[]);
    assert!(
        found
            .iter()
            .any(|fault| fault.contains("the seal does not follow the previous seal: a seal was changed or removed")),
        "{found:#?}"
    );
    // An export and an import keep the seals.
    let file = place.file("moved.ndjson.zst");
    place.annals(&["export", file.to_str().unwrap()]).fine();
    let target = place.file("moved.db");
    let moved = |words: &[&str]| {
        let mut command = command(words);
        command.env("ANNALS_STORE", url(&target));
        ended(command)
    };
    moved(&["migrate"]).fine();
    moved(&["import", file.to_str().unwrap()]).fine();
    let verified = moved(&["verify", "--expect", second["seal"].as_str().unwrap(), "--json"]).json().remove(0);
    assert_eq!((&verified["seal"], &verified["events"]), (&second["seal"], &second["events"]));
}

/// Tests a reader that closes the pipe early, as in `annals verify | head`. The exit code still reports the fault.
#[tokio::test(flavor = "multi_thread")]
async fn closed_output_keeps_the_exit_code_of_a_fault() {
    let place = Place::with_trips().await;
    let sound = place.file("travel.db");
    let broken = tampered(&place, "broken.db", "UPDATE events SET data = '{' WHERE position < 10").await;
    for (store, code) in [(sound, 0), (broken, 1)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = command(&["verify"]);
        let status = command.env("ANNALS_STORE", url(&store)).stdout(writer).status().unwrap();
        assert_eq!(status.code(), Some(code), "{}", store.display());
    }
}
