//! A process that runs out of space gets an error, and every commit that was acknowledged before stays stored.
//!
//! The test uses `ulimit -f` instead of a full disk, because a full disk would have to be a separate disk. The write
//! fails in the same way.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use annals::{
    Append, Commit, CommitError, Committed, EventStore, Expected, Metadata, NewEvent, Position, StreamId, Version,
};
use annals_sqlite::SqliteStore;
use uuid::Uuid;

/// The environment variable that names the file of the limited process.
const FILE: &str = "ANNALS_SQLITE_NO_SPACE_FILE";
/// The limit in blocks of 512 or 1,024 bytes, depending on the shell.
const BLOCKS: u32 = 1_000;

fn commit(number: i64) -> Commit {
    let event = || NewEvent {
        id: Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: format!("\"{}\"", "x".repeat(20_000)),
        metadata: Metadata::default(),
    };
    let append = |name: String, expected| Append {
        stream: StreamId::new("a", &name).unwrap(),
        expected,
        events: vec![event(), event()],
    };
    let own = append(number.to_string(), Expected::Version(Version::START));
    Commit { appends: vec![own, append("shared".into(), Expected::Any)], puts: Vec::new() }
}

async fn lengths(store: &SqliteStore, number: i64) -> usize {
    let stream = StreamId::new("a", &number.to_string()).unwrap();
    store.read_stream(&stream, Version::START, 10).await.unwrap().len()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The work of the process with the limit. When run directly, the test checks that the commits succeed if there is
/// space.
#[test]
fn commits_until_it_may_not() {
    match env::var_os(FILE) {
        Some(file) => runtime().block_on(until_no_space(&PathBuf::from(file))),
        None => runtime().block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
            for number in 0..100 {
                store.commit(commit(number)).await.unwrap();
            }
            store.close().await.unwrap();
        }),
    }
}

async fn until_no_space(file: &Path) {
    let store = SqliteStore::open(file).await.unwrap();
    let mut held = 0;
    let mut failures_in_a_row = 0;
    // A failure may free some space, because the log next to the file is truncated. In the end, nothing is left to
    // free.
    while failures_in_a_row < 5 {
        match store.commit(commit(held)).await {
            Ok(Committed { versions, .. }) => {
                assert_eq!(versions[1], Version(held * 2 + 2));
                (held, failures_in_a_row) = (held + 1, 0);
            }
            Err(CommitError::Unavailable(_) | CommitError::Unknown(_)) => {
                assert_eq!(lengths(&store, held).await, 0, "failed commits leave no events");
                failures_in_a_row += 1;
            }
            Err(other) => panic!("{other}"),
        }
        assert!(held < 10_000, "the limit does not bind");
    }
    assert!(held > 0);
    for number in 0..held {
        assert_eq!(lengths(&store, number).await, 2, "reading goes on");
    }
    assert_eq!(store.status().await.unwrap().head, Position(held * 4));
    // Closing may fail as well, if there is no space to move the log into the file.
    store.close().await.ok();
    println!("held {held}");
}

#[test]
fn process_without_disk_space_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let limited = Command::new("sh")
        .args(["-c", &format!("trap '' XFSZ; ulimit -f {BLOCKS}; exec \"$0\" \"$@\"")])
        .arg(env::current_exe().unwrap())
        .args(["--exact", "commits_until_it_may_not", "--nocapture"])
        .env(FILE, &file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&limited.stdout);
    assert!(limited.status.success(), "{said}{}", String::from_utf8_lossy(&limited.stderr));
    let held: i64 = said.lines().find_map(|line| line.strip_prefix("held ")).unwrap().parse().unwrap();

    runtime().block_on(async {
        let store = SqliteStore::open(&file).await.unwrap();
        for number in 0..held {
            assert_eq!(lengths(&store, number).await, 2);
        }
        // Once there is space again, the store continues where it stopped, without a gap.
        let committed = store.commit(commit(held)).await.unwrap();
        assert_eq!((committed.position, committed.versions[1]), (Position(held * 4 + 4), Version(held * 2 + 2)));
        store.close().await.unwrap();
    });
}
