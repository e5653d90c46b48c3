//! Rows that were written with plain SQL: no reader stops at them, and no statement can rewrite the log.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use annals::{
    Append, Commit, CommitError, EventStore, Expected, LogQuery, Metadata, NewEvent, Position, StreamId, Version,
};
use annals_sqlite::{APPLICATION_ID, SqliteStore};
use sqlx::{Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};
use uuid::Uuid;

async fn connect(file: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(file)).await.unwrap()
}

fn commit(stream: &str, count: usize) -> Commit {
    let event = || NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: Metadata::default(),
    };
    let events = (0..count).map(|_| event()).collect();
    let append = Append { stream: StreamId::parse(stream).unwrap(), expected: Expected::Any, events };
    Commit { appends: vec![append], puts: Vec::new() }
}

/// Reads everything from the start, page by page, until the end of the log.
async fn read_all(store: &SqliteStore, query: &LogQuery) -> (Vec<i64>, Position) {
    let mut positions = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(query, after, 2).await.unwrap();
        if page.next == after {
            return (positions, after);
        }
        after = page.next;
        positions.extend(page.events.iter().map(|event| event.position.0));
    }
}

#[tokio::test]
async fn odd_rows_block_no_reader() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    store.commit(commit("a-1", 3)).await.unwrap();

    let long = format!("a-{}", "x".repeat(6_000));
    let mut connection = connect(&file).await;
    sqlx::query(
        "INSERT INTO events VALUES
            (1000, ?1, 1, 'no uuid', '', -1, 'no json', 'no json', 0),
            (1001, 'no dash', 5, '', 'x', 9999999999, '', '{\"correlation_id\":7}', 9223372036854775807),
            (1002, CAST(x'612dff' AS TEXT), 1, CAST(x'ff' AS TEXT), 'x', 1, CAST(x'22ff22' AS TEXT), '[]', -9223372036854775808),
            (9223372036854775807, 'a-1', 9223372036854775807, '', 'x', 1, '{}', '{}', 0)",
    )
    .bind(&long)
    .execute(&mut connection)
    .await
    .unwrap();

    let head = Position(i64::MAX);
    let all = [1, 2, 3, 1000, 1001, 1002, i64::MAX];
    assert_eq!(read_all(&store, &LogQuery::all()).await, (all.to_vec(), head));
    assert_eq!(read_all(&store, &LogQuery::categories(["a"])).await, (vec![1, 2, 3, 1000, 1002, i64::MAX], head));
    assert_eq!(read_all(&store, &LogQuery::categories(["nothing"])).await, (vec![], head));
    assert_eq!(store.status().await.unwrap().head, head);
    store.wait(Position(1002)).await.unwrap();

    let by_name = store.read_stream(&StreamId::from_stored(&long), Version::START, 10).await.unwrap();
    assert_eq!((by_name.len(), &*by_name[0].data, by_name[0].metadata.clone()), (1, "no json", Metadata::default()));
    let odd = store.read_log(&LogQuery::all(), Position(1001), 1).await.unwrap().events.remove(0);
    assert_eq!((odd.stream.as_str(), &*odd.data), ("a-\u{fffd}", "\"\u{fffd}\""));
    let ids = store.read_log(&LogQuery::all(), Position(3), 2).await.unwrap().events;
    assert_ne!(ids[0].id, ids[1].id, "events without an id of the library still differ");
    let stream = StreamId::parse("a-1").unwrap();
    let versions = store.read_stream(&stream, Version(3), 10).await.unwrap();
    assert_eq!(versions.iter().map(|event| event.version.0).collect::<Vec<_>>(), [i64::MAX]);
    assert!(store.read_stream(&stream, Version(i64::MAX), 10).await.unwrap().is_empty());

    // No position is left for a new event. A commit with events fails, and a commit without events still succeeds.
    let refused = store.commit(commit("b-1", 1)).await;
    assert!(matches!(refused, Err(CommitError::Unavailable(_))), "{refused:?}");
    let refused = store.commit(commit("b-1", 1)).await;
    assert!(matches!(refused, Err(CommitError::Unavailable(_))), "{refused:?}");
    store.commit(commit("b-1", 0)).await.unwrap();
    store.close().await.unwrap();
}

/// A row with a date in the far future must not affect the dates of later rows.
#[tokio::test]
async fn a_row_dated_ahead_does_not_move_the_clock() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    let mut connection = connect(&file).await;
    let row = "INSERT INTO events VALUES (7, 'a-1', 1, '', 'x', 1, '{}', '{}', 9000000000000000)";
    connection.execute(row).await.unwrap();
    let committed = store.commit(commit("a-1", 1)).await.unwrap();
    assert_eq!((committed.position, committed.versions), (Position(8), vec![Version(2)]));
    let event = store.read_log(&LogQuery::all(), Position(7), 1).await.unwrap().events.remove(0);
    assert!((event.recorded_at - chrono::Utc::now()).num_hours().abs() < 1, "{}", event.recorded_at);
    store.close().await.unwrap();
}

/// The last event was written by a process whose clock was ahead.
#[tokio::test]
async fn recorded_time_never_precedes_the_last_event() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    let ahead = (chrono::Utc::now() + chrono::TimeDelta::hours(1)).timestamp_micros();
    let mut connection = connect(&file).await;
    let row = sqlx::query("INSERT INTO events VALUES (1, 'a-1', 1, '', 'x', 1, '{}', '{}', ?1)").bind(ahead);
    row.execute(&mut connection).await.unwrap();
    store.commit(commit("a-1", 1)).await.unwrap();
    let events = store.read_log(&LogQuery::all(), Position::START, 2).await.unwrap().events;
    assert!(events[1].recorded_at >= events[0].recorded_at, "{} {}", events[0].recorded_at, events[1].recorded_at);
    store.close().await.unwrap();
}

#[tokio::test]
async fn file_refuses_changes_to_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    store.commit(commit("a-1", 3)).await.unwrap();
    let mut connection = connect(&file).await;
    let attempts = [
        "UPDATE events SET data = 'changed'",
        "UPDATE events SET position = 9 WHERE position = 3",
        "DELETE FROM events",
        "DELETE FROM events WHERE position = 3",
        "INSERT INTO events VALUES (3, 'b-1', 1, '', 'x', 1, 'changed', '{}', 0)",
        "INSERT INTO events VALUES (3, 'a-1', 3, '', 'x', 1, 'changed', '{}', 0)
             ON CONFLICT (position) DO UPDATE SET data = 'changed'",
        "INSERT INTO events VALUES (4, 'a-1', 3, '', 'x', 1, 'changed', '{}', 0)",
        "INSERT INTO events VALUES ('four', 'b-1', 1, '', 'x', 1, '{}', '{}', 0)",
        "INSERT INTO events VALUES (0, 'b-1', 1, '', 'x', 1, '{}', '{}', 0)",
        "INSERT INTO events VALUES (4, 'b-1', 0, '', 'x', 1, '{}', '{}', 0)",
    ];
    for sql in attempts {
        assert!(connection.execute(sql).await.is_err(), "{sql}");
    }
    // When REPLACE removes a row, the delete triggers fire only in sessions that set this pragma.
    connection.execute("PRAGMA recursive_triggers = ON").await.unwrap();
    let replacing = [
        "INSERT OR REPLACE INTO events VALUES (3, 'b-1', 1, '', 'x', 1, 'changed', '{}', 0)",
        "INSERT OR REPLACE INTO events VALUES (4, 'a-1', 3, '', 'x', 1, 'changed', '{}', 0)",
        "UPDATE OR REPLACE events SET position = 3 WHERE position = 2",
    ];
    for sql in replacing {
        assert!(connection.execute(sql).await.is_err(), "{sql}");
    }
    let events = store.read_log(&LogQuery::all(), Position::START, 10).await.unwrap().events;
    assert_eq!(events.iter().map(|event| &*event.data).collect::<Vec<_>>(), ["{}", "{}", "{}"]);
    store.close().await.unwrap();
}

/// A file as the earliest builds created it.
#[tokio::test]
async fn file_of_an_older_build_opens_and_continues() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let options = SqliteConnectOptions::new().filename(&file).create_if_missing(true);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let first = include_str!("../../store-sqlite/src/migrations/0001_log_and_documents.sql");
    connection.execute(first).await.unwrap();
    let mark = format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 1");
    connection.execute(sqlx::AssertSqlSafe(mark)).await.unwrap();
    let event =
        "INSERT INTO events VALUES (1, 'a-1', 1, 'bf1cd6a4-c3e1-4b6f-8e4c-4f2b8b4bb0aa', 'x', 1, '{}', '{}', 0)";
    connection.execute(event).await.unwrap();
    connection.close().await.unwrap();
    for _ in 0..2 {
        let store = SqliteStore::open(&file).await.unwrap();
        store.commit(commit("b-1", 300)).await.unwrap();
        store.close().await.unwrap();
    }
    let store = SqliteStore::open(&file).await.unwrap();
    assert_eq!(read_all(&store, &LogQuery::all()).await.1, Position(601));
    store.close().await.unwrap();
    let mut connection = connect(&file).await;
    let triggers = "SELECT group_concat(name, ' ' ORDER BY name) FROM sqlite_schema WHERE type = 'trigger'";
    let triggers: String = sqlx::query_scalar(triggers).fetch_one(&mut connection).await.unwrap();
    assert_eq!(triggers, "events_never_change events_never_go");
}
