//! Tests a server that dies, that runs out of disk space, or that is replaced by another server restored from a dump.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};

use annals::{CommitError, EventStore, LogQuery, Position};
use annals_postgres::{PostgresStore, Settings};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;

use self::postgres::{
    append,
    load::Load,
    numbers,
    server::{self, Server},
    whole_log,
};

fn as_it_is(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_server_loses_no_acknowledged_commit() {
    const KILLS: usize = 3;
    let mut server = Server::start().await;
    let settings = Settings { connections: 4, ..Settings::default() };
    let store = PostgresStore::connect(&server.url(), settings.clone()).await.unwrap();
    let load = Load::start(&store, &server.url(), &settings, 16);
    for _ in 0..KILLS {
        load.goes_on(200).await;
        server.kill();
        server.resume().await;
    }
    load.goes_on(200).await;
    let mut outside = PgConnection::connect(&server.url()).await.unwrap();
    let summary = load.ends_well(&mut outside, as_it_is).await;
    assert!(summary.unknown > 0, "{summary:?}: no commit was under way, so this tested nothing");
}

/// A small file system for one test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(megabytes: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).status();
        assert!(mounted.unwrap().success(), "a file system cannot be mounted here");
        Self(folder)
    }

    /// Fills all free space.
    fn fill(&self) {
        let error = std::io::copy(&mut std::io::repeat(1), &mut fs::File::create(self.ballast()).unwrap()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }

    fn ballast(&self) -> std::path::PathBuf {
        self.0.path().join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(self.0.path()).status().ok();
    }
}

/// Only root may mount a file system. For other users, the test prints a message and does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn full_disk_refuses_commits_until_space_is_freed() {
    if !server::is_root() {
        eprintln!("NOT TESTED: a full disk needs a file system of its own, which only root can mount");
        return;
    }
    let disk = SmallDisk::new(120);
    let server = Server::start_in(tempfile::tempdir().unwrap(), disk.0.path().join("data"), Vec::new()).await;
    let settings = Settings { connections: 4, ..Settings::default() };
    let store = PostgresStore::connect(&server.url(), settings.clone()).await.unwrap();
    let load = Load::start(&store, &server.url(), &settings, 8);
    load.goes_on(100).await;
    disk.fill();
    // Small commits succeed while the tables still have free pages; a large commit does not.
    let mut large = append("large-1", 0, 40);
    for event in &mut large.appends[0].events {
        // This text is hard to compress.
        let ids: String = (0..3_000).map(|_| Uuid::new_v4().simple().to_string()).collect();
        event.data = format!("\"{ids}\"");
    }
    let outcome = store.commit(large.clone()).await;
    assert!(matches!(outcome, Err(CommitError::Unavailable(_))), "{outcome:?}");
    // Reads keep working.
    assert!(!store.read_log(&LogQuery::all(), Position::START, 10).await.unwrap().events.is_empty());
    disk.free();
    store.commit(large).await.unwrap();
    load.goes_on(100).await;
    let mut outside = PgConnection::connect(&server.url()).await.unwrap();
    load.ends_well(&mut outside, as_it_is).await;
    drop(store);
    drop(server);
}

/// If the write-ahead log has no space left, the server itself goes down, and does not start again until space is
/// freed.
#[tokio::test(flavor = "multi_thread")]
async fn server_crash_on_a_full_disk_loses_nothing() {
    if !server::is_root() {
        eprintln!("NOT TESTED: a full disk needs a file system of its own, which only root can mount");
        return;
    }
    let disk = SmallDisk::new(160);
    let folder = tempfile::tempdir_in(disk.0.path()).unwrap();
    let data = folder.path().join("data");
    fs::set_permissions(disk.0.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    // The server must not keep old segments for reuse, because old segments would leave space on a full disk.
    let settings = ["wal_recycle=off", "min_wal_size=32MB"].map(str::to_owned);
    let mut server = Server::start_in(folder, data, settings.to_vec()).await;
    let settings = Settings { connections: 4, ..Settings::default() };
    let store = PostgresStore::connect(&server.url(), settings.clone()).await.unwrap();
    let load = Load::start(&store, &server.url(), &settings, 8);
    load.goes_on(100).await;
    disk.fill();
    // The load fills the rest of the current segment at its own pace, which is slow on a busy machine.
    let down = async {
        while let Ok(mut writing) = PgConnection::connect(&server.url()).await {
            let message = "SELECT pg_logical_emit_message(false, 'annals', repeat('x', 1000000))";
            while sqlx::query(message).execute(&mut writing).await.is_ok() {}
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), down).await.expect("the disk still has room");
    disk.free();
    server.kill();
    server.resume().await;
    load.goes_on(100).await;
    let mut outside = PgConnection::connect(&server.url()).await.unwrap();
    load.ends_well(&mut outside, as_it_is).await;
    drop(store);
    drop(server);
}

/// Dumps with `pg_dump` and restores with `psql`. Positions, versions and the detection of writers at gaps must not
/// depend on the old cluster.
#[tokio::test(flavor = "multi_thread")]
async fn dump_restored_elsewhere_continues() {
    let schema = postgres::Schema::new();
    let store = schema.store().await;
    for round in 0..20 {
        store.commit(append("a-1", round, 1)).await.unwrap();
        store.commit(append(&format!("b-{round}"), 0, 2)).await.unwrap();
    }
    // These used-up positions remain gaps after the restore.
    let sql = schema.sql("SELECT nextval('annals.events_position') FROM generate_series(1, 100)");
    sqlx::query(sql).execute(&mut schema.connection().await).await.unwrap();
    store.commit(append("a-1", 20, 1)).await.unwrap();
    let before = whole_log(&store).await;

    let dump = server::program("pg_dump").arg("--schema").arg(schema.name()).arg(postgres::url()).output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let server = Server::start().await;
    let mut psql = server::program("psql");
    psql.args(["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", &server.url()]).stdin(Stdio::piped());
    let mut restoring = psql.stdout(Stdio::null()).spawn().unwrap();
    restoring.stdin.take().unwrap().write_all(&dump.stdout).unwrap();
    assert!(restoring.wait().unwrap().success());

    let elsewhere = PostgresStore::connect(&server.url(), schema.settings()).await.unwrap();
    assert_eq!(whole_log(&elsewhere).await, before);
    assert_eq!(elsewhere.status().await.unwrap(), store.status().await.unwrap());
    let outcome = elsewhere.commit(append("a-1", 20, 1)).await;
    assert!(matches!(outcome, Err(CommitError::Conflict { .. })), "{outcome:?}");
    let committed = elsewhere.commit(append("a-1", 21, 2)).await.unwrap();
    let log = whole_log(&elsewhere).await;
    assert_eq!(log.len(), before.len() + 2);
    assert!(numbers(&log).is_sorted_by(|one, next| one < next));
    assert_eq!(log.last().unwrap().position, committed.position);
    for sql in ["UPDATE annals.events SET version = 1", "DELETE FROM annals.events", "TRUNCATE annals.events"] {
        let mut outside = PgConnection::connect(&server.url()).await.unwrap();
        sqlx::raw_sql(schema.sql(sql)).execute(&mut outside).await.unwrap_err();
    }
    let settings = schema.settings();
    let load = Load::start(&elsewhere, &server.url(), &settings, 4);
    load.goes_on(100).await;
    let mut outside = PgConnection::connect(&server.url()).await.unwrap();
    load.ends_well(&mut outside, |sql| schema.sql(sql)).await;
}
