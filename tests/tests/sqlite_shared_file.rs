//! Several processes share one file, or one process locks the file for itself.
#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    time::{Duration, Instant},
};

use annals::{
    Append, Commit, CommitError, DocumentKey, EventStore, Expected, LogQuery, Metadata, NewEvent, Position, Put,
    StreamId, Version,
};
use annals_sqlite::{Settings, SqliteStore};
use sqlx::{Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::time::timeout;
use uuid::Uuid;

async fn connect(file: &Path) -> SqliteConnection {
    SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(file)).await.unwrap()
}

fn commit(stream: &str, expected: Expected) -> Commit {
    let event = NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: Metadata::default(),
    };
    let append = Append { stream: StreamId::parse(stream).unwrap(), expected, events: vec![event] };
    Commit { appends: vec![append], puts: Vec::new() }
}

fn at(version: i64) -> Expected {
    Expected::Version(Version(version))
}

/// Each process has its own writer. Versions and positions have no gaps, no matter which process assigns them.
#[tokio::test(flavor = "multi_thread")]
async fn two_writers_take_turns() {
    const COMMITS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let stores = [SqliteStore::open(&file).await.unwrap(), SqliteStore::open(&file).await.unwrap()];
    let writing = stores.iter().flat_map(|store| {
        (0..4).map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..COMMITS / 8 {
                    store.commit(commit("shared-1", Expected::Any)).await.unwrap();
                }
            })
        })
    });
    for writer in writing.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    for store in &stores {
        let log = store.read_log(&LogQuery::all(), Position::START, usize::MAX).await.unwrap();
        let numbers = log.events.iter().map(|event| (event.position.0, event.version.0)).collect::<Vec<_>>();
        assert_eq!(numbers, (1..=COMMITS as i64).map(|number| (number, number)).collect::<Vec<_>>());
        let conflict = store.commit(commit("shared-1", at(1))).await;
        assert!(matches!(conflict, Err(CommitError::Conflict { .. })), "{conflict:?}");
    }
    for store in stores {
        store.close().await.unwrap();
    }
}

#[tokio::test]
async fn waiting_reader_notices_commits_of_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let reader = SqliteStore::open(&file).await.unwrap();
    let writer = SqliteStore::open(&file).await.unwrap();
    let mut head = Position::START;
    for version in 0..3 {
        let waited = timeout(Duration::from_secs(10), reader.wait(head));
        let (waited, committed) = tokio::join!(waited, writer.commit(commit("a-1", at(version))));
        waited.expect("the reader must not stay asleep").unwrap();
        let page = reader.read_log(&LogQuery::all(), head, 10).await.unwrap();
        head = page.next;
        assert_eq!((page.events.len(), head), (1, committed.unwrap().position));
    }
    reader.close().await.unwrap();
    writer.close().await.unwrap();
}

/// The commit fails with an error within the time limit, and nothing of it is stored. Once the lock is released,
/// commits succeed again.
#[tokio::test]
async fn commit_does_not_wait_forever_for_a_lock() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let settings = Settings { busy_timeout: Duration::from_millis(100), ..Settings::default() };
    let store = SqliteStore::open_with(&file, settings).await.unwrap();
    let mut other = connect(&file).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let started = Instant::now();
    for _ in 0..2 {
        let refused = futures::future::join_all((0..5).map(|_| store.commit(commit("a-1", at(0))))).await;
        assert!(refused.iter().all(|outcome| matches!(outcome, Err(CommitError::Unavailable(_)))), "{refused:?}");
    }
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(store.status().await.unwrap().head, Position::START, "reading goes on meanwhile");
    other.execute("COMMIT").await.unwrap();
    store.commit(commit("a-1", at(0))).await.unwrap();
    store.close().await.unwrap();
}

/// A lock that is released in time only delays the commit.
#[tokio::test]
async fn commit_waits_for_its_turn() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    let mut other = connect(&file).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.commit(commit("a-1", at(0))).await }
    });
    tokio::task::yield_now().await;
    other.execute("COMMIT").await.unwrap();
    waiting.await.unwrap().unwrap();
    store.close().await.unwrap();
}

/// The test uses a trigger to make the statement fail, because no statement fails otherwise. Earlier events in the same
/// group are not stored either, no lock remains, and the next commit succeeds.
#[tokio::test]
async fn commit_that_fails_midway_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    store.commit(commit("a-1", at(0))).await.unwrap();
    let mut other = connect(&file).await;
    other
        .execute("CREATE TRIGGER fault BEFORE INSERT ON documents BEGIN SELECT RAISE(ABORT, 'fault'); END")
        .await
        .unwrap();
    let put = Put { key: DocumentKey::new("note", "1"), expected: None, body: Some("1".into()), due: None };
    let both = || Commit { puts: vec![put.clone()], ..commit("a-1", at(1)) };
    let refused = store.commit(both()).await;
    assert!(matches!(refused, Err(CommitError::Unavailable(_))), "{refused:?}");
    assert_eq!(store.status().await.unwrap().head, Position(1));
    other.execute("DROP TRIGGER fault").await.unwrap();
    store.commit(both()).await.unwrap();
    store.close().await.unwrap();
}
