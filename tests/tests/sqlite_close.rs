//! A store is closed or dropped while commits are in progress.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use annals::{
    Append, Commit, CommitError, EventStore, Expected, LogQuery, Metadata, NewEvent, Position, StoreError, StreamId,
    Version,
};
use annals_sqlite::SqliteStore;
use tokio::task::JoinSet;
use uuid::Uuid;

fn commit(number: usize) -> Commit {
    let event = NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: Metadata::default(),
    };
    let stream = StreamId::new("a", &number.to_string()).unwrap();
    let append = Append { stream, expected: Expected::Version(Version(0)), events: vec![event] };
    Commit { appends: vec![append], puts: Vec::new() }
}

async fn count(file: &Path) -> usize {
    let store = SqliteStore::open(file).await.unwrap();
    let count = store.read_log(&LogQuery::all(), Position::START, usize::MAX).await.unwrap().events.len();
    store.close().await.unwrap();
    count
}

/// A commit in progress succeeds or is rejected. No outcome stays unknown, and the file holds exactly the successful
/// commits.
#[tokio::test(flavor = "multi_thread")]
async fn close_writes_waiting_commits() {
    const COMMITS: usize = 4_000;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let store = SqliteStore::open(&file).await.unwrap();
    let mut commits = JoinSet::new();
    for number in 0..COMMITS {
        let store = store.clone();
        commits.spawn(async move { store.commit(commit(number)).await });
    }
    // Once the first commit is done, the other commits are in progress.
    let mut held = usize::from(commits.join_next().await.unwrap().unwrap().is_ok());
    assert_eq!(held, 1);
    store.close().await.unwrap();
    let beside = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(beside, 1, "no other file is left next to the store");
    for outcome in commits.join_all().await {
        match outcome {
            Ok(_) => held += 1,
            Err(CommitError::Unavailable(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(count(&file).await, held);
}

#[tokio::test]
async fn closed_store_reports_that_it_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    store.commit(commit(1)).await.unwrap();
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.wait(Position(1)).await }
    });
    tokio::task::yield_now().await;
    store.close().await.unwrap();
    store.close().await.unwrap();
    assert!(matches!(waiting.await.unwrap(), Err(StoreError::Unavailable(_))), "no caller waits forever");
    assert!(matches!(store.wait(Position(1)).await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.commit(commit(2)).await, Err(CommitError::Unavailable(_))));
    assert!(matches!(store.status().await, Err(StoreError::Unavailable(_))));
    let page = store.read_log(&LogQuery::all(), Position::START, 1).await;
    assert!(matches!(page, Err(StoreError::Unavailable(_))));
}

/// The runtime that opened the store ends while commits are in progress. Commits that were already submitted are
/// written, and so are later commits.
#[test]
fn store_outlives_its_runtime() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ended = runtime();
    let store = ended.block_on(async {
        let store = SqliteStore::open(&file).await.unwrap();
        store.commit(commit(0)).await.unwrap();
        for number in 1..500 {
            let store = store.clone();
            tokio::spawn(async move { store.commit(commit(number)).await });
        }
        store
    });
    drop(ended);
    runtime().block_on(async {
        store.commit(commit(1_000)).await.unwrap();
        store.close().await.unwrap();
        let count = count(&file).await;
        assert!((2..=501).contains(&count), "{count}");
    });
}
