//! A process that is killed at any moment loses no acknowledged commit, and leaves no commit half applied.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{HashMap, HashSet},
    env,
    hash::{BuildHasher, RandomState},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use annals::{Append, Commit, DocumentKey, EventStore, Expected, Metadata, NewEvent, Put, StreamId, Version};
use annals_sqlite::SqliteStore;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};
use uuid::Uuid;

const WRITERS: usize = 8;
const KILLS: u64 = 20;
/// The longest delay between an acknowledgement and the kill: about the time that the writer needs for a few groups of
/// commits.
const LATER_MICROSECONDS_MAX: u64 = 3_000;
/// The environment variable that names the file of the process to kill. The process writes to that file until it is
/// killed.
const FILE: &str = "ANNALS_SQLITE_KILL_FILE";

/// The work of the killed process. When run directly, the test checks that the commits succeed at all.
#[test]
fn commits_under_load() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match env::var_os(FILE) {
        Some(file) => runtime.block_on(load(&PathBuf::from(file), i64::MAX, acknowledge)),
        None => {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("annals.db");
            runtime.block_on(load(&file, 20, |_, _, _| {}));
            assert_eq!(runtime.block_on(found_by_sql(&file)).rounds, [20; WRITERS]);
        }
    }
}

/// Prints with a single write, so that the reader receives whole lines.
fn acknowledge(writer: usize, round: i64, position: i64) {
    let line = format!("committed {writer} {round} {position}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
}

async fn load(file: &Path, rounds: i64, acknowledge: fn(usize, i64, i64)) {
    let store = Arc::new(SqliteStore::open(file).await.unwrap());
    let writers = (0..WRITERS).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            let first = rounds_by_store(&store, writer).await;
            for round in first..first.saturating_add(rounds) {
                let committed = store.commit(commit(writer, round)).await.unwrap();
                acknowledge(writer, round, committed.position.0);
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    store.close().await.unwrap();
}

/// Returns a commit with two events in the writer's own stream, one event in the shared stream, a counter, and a flag
/// that one round puts and the next round removes.
fn commit(writer: usize, round: i64) -> Commit {
    let event = || NewEvent {
        id: Uuid::new_v4(),
        type_name: "round.done".into(),
        schema_version: 1,
        data: format!(r#"{{"writer":{writer},"round":{round},"filler":"{}"}}"#, "x".repeat(300)),
        metadata: Metadata::of_request(Uuid::new_v4()),
    };
    let stream = |name: &str| StreamId::parse(name).unwrap();
    let own = Append {
        stream: stream(&format!("writer-{writer}")),
        expected: Expected::Version(Version(round * 2)),
        events: vec![event(), event()],
    };
    let shared = Append { stream: stream("shared-1"), expected: Expected::Any, events: vec![event()] };
    let count = Put {
        key: DocumentKey::new("count", writer.to_string()),
        expected: Some(round),
        body: Some((round + 1).to_string().into()),
        due: None,
    };
    let flag = Put {
        key: DocumentKey::new("flag", writer.to_string()),
        expected: Some(round % 2),
        body: (round % 2 == 0).then(|| "true".into()),
        due: None,
    };
    Commit { appends: vec![own, shared], puts: vec![count, flag] }
}

#[test]
fn killed_process_loses_no_acknowledged_commit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("annals.db");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut acknowledged = Vec::new();
    for kill in 0..KILLS {
        // The first process is killed at any moment of its start, and the other processes at any moment of their work.
        let after = if kill == 0 { 0 } else { RandomState::new().hash_one(kill) % 400 };
        let before = acknowledged.len();
        acknowledged.extend(run_and_kill(&file, after));
        let case = format!("kill {kill} after {after} lines, {} acknowledged", acknowledged.len() - before);

        // The first process that opens the file also recovers it, and plain SQL must be able to recover the file too.
        let by_store = async || {
            let store = SqliteStore::open(&file).await.unwrap();
            let mut rounds = Vec::new();
            for writer in 0..WRITERS {
                rounds.push(rounds_by_store(&store, writer).await);
            }
            store.close().await.unwrap();
            rounds
        };
        let found = runtime.block_on(async {
            let early = if kill % 2 == 1 { Some(by_store().await) } else { None };
            let found = found_by_sql(&file).await;
            let rounds = if let Some(rounds) = early { rounds } else { by_store().await };
            assert_eq!(found.rounds, rounds, "{case}");
            found
        });
        for (writer, round, position) in &acknowledged {
            assert!(*round < found.rounds[*writer], "{case}: writer {writer} lost round {round}");
            assert_eq!(
                found.own.get(&(*writer, *round)),
                Some(&(position - 1)),
                "{case}: writer {writer}, round {round}"
            );
            assert!(found.shared.contains(position), "{case}: writer {writer}, round {round}");
        }
    }
    assert!(acknowledged.len() > 100, "{} acknowledged commits prove nothing", acknowledged.len());
}

fn run_and_kill(file: &Path, after: u64) -> Vec<(usize, i64, i64)> {
    let mut child: Child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "commits_under_load", "--nocapture"])
        .env(FILE, file)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut acknowledged = Vec::new();
    let mut read = |line: String| {
        let mut words = line.strip_prefix("committed ")?.split(' ').map(|word| word.parse::<i64>().unwrap());
        let writer = words.next()?;
        let round = words.next()?;
        let position = words.next()?;
        acknowledged.push((writer as usize, round, position));
        Some(())
    };
    let seen = lines.by_ref().filter_map(&mut read).take(after as usize).count();
    assert_eq!(seen as u64, after, "the process ended by itself");
    // Without this delay, the process would always die at the same place: at the start of the group after an
    // acknowledged group.
    let later = Duration::from_micros(RandomState::new().hash_one(after) % LATER_MICROSECONDS_MAX);
    let seen_at = Instant::now();
    while seen_at.elapsed() < later {
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    // Lines that the process wrote before it died count as well, even if the test has not read them yet.
    let _rest = lines.filter_map(&mut read).count();
    child.wait().unwrap();
    acknowledged
}

/// Returns the number of rounds that a writer has finished. Reads the number through the store, from events and from
/// documents.
async fn rounds_by_store(store: &SqliteStore, writer: usize) -> i64 {
    let keys = ["count", "flag"].map(|collection| DocumentKey::new(collection, writer.to_string()));
    let found = store.documents(&keys).await.unwrap();
    let rounds = found[0].as_ref().map_or(0, |count| count.body.parse().unwrap());
    assert_eq!(found[0].as_ref().map_or(0, |count| count.version), rounds);
    assert_eq!(found[1].is_some(), rounds % 2 == 1);
    let stream = StreamId::parse(&format!("writer-{writer}")).unwrap();
    let events = store.read_stream(&stream, Version::START, usize::MAX).await.unwrap();
    assert_eq!(events.len() as i64, rounds * 2);
    rounds
}

/// The state that plain SQL finds.
#[derive(Default)]
struct Found {
    /// The number of rounds that each writer has finished.
    rounds: Vec<i64>,
    /// The position in the log of the last event of each round.
    own: HashMap<(usize, i64), i64>,
    /// The positions of the events in the shared stream.
    shared: HashSet<i64>,
}

/// Returns the same state through plain SQL, and checks that the whole file is intact.
async fn found_by_sql(file: &Path) -> Found {
    let mut connection = connect(file).await;
    let sound: String = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(&mut connection).await.unwrap();
    assert_eq!(sound, "ok");
    let mut found = Found { rounds: vec![0; WRITERS], ..Found::default() };
    if scalar(&mut connection, "SELECT count(*) FROM sqlite_schema WHERE name = 'events'").await == 0 {
        return found;
    }
    let uneven = "SELECT count(*) FROM (SELECT 1 FROM events GROUP BY stream_id
                                        HAVING min(version) <> 1 OR max(version) <> count(*))";
    assert_eq!(scalar(&mut connection, uneven).await, 0, "versions are dense");
    let gaps = "SELECT coalesce(max(position), 0) - count(*) FROM events";
    assert_eq!(scalar(&mut connection, gaps).await, 0, "positions are dense");
    for (writer, rounds) in found.rounds.iter_mut().enumerate() {
        let sql = "SELECT (SELECT count(*) FROM events WHERE stream_id = 'writer-' || ?1),
                          (SELECT coalesce(max(CAST(body AS INTEGER)), 0) FROM documents
                            WHERE collection = 'count' AND id = ?1),
                          (SELECT count(*) FROM documents WHERE collection = 'flag' AND id = ?1)";
        let query = sqlx::query_as(sql).bind(writer.to_string());
        let (events, counted, flags): (i64, i64, i64) = query.fetch_one(&mut connection).await.unwrap();
        assert_eq!((events, flags), (counted * 2, counted % 2), "writer {writer}");
        *rounds = counted;
    }
    let events: Vec<(String, i64, i64)> =
        sqlx::query_as("SELECT stream_id, version, position FROM events").fetch_all(&mut connection).await.unwrap();
    for (stream, version, position) in events {
        match stream.strip_prefix("writer-") {
            None => assert!(found.shared.insert(position)),
            Some(writer) if version % 2 == 0 => {
                found.own.insert((writer.parse().unwrap(), version / 2 - 1), position);
            }
            Some(_) => {}
        }
    }
    assert_eq!(found.shared.len() as i64, found.rounds.iter().sum::<i64>());
    connection.close().await.unwrap();
    found
}

async fn connect(file: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
    SqliteConnection::connect_with(&options).await.unwrap()
}

async fn scalar(connection: &mut SqliteConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(connection).await.unwrap()
}
