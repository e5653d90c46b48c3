//! Opening a path or file that is not a store fails. Each kind of failure has its own error, which names the file, and
//! the file stays unchanged.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use annals_sqlite::{APPLICATION_ID, OpenError, SqliteStore};
use sqlx::{ConnectOptions, Connection, Executor, SqliteConnection, sqlite::SqliteConnectOptions};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

async fn connect(file: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(file).create_if_missing(true).connect().await.unwrap()
}

/// Creates a SQLite file with these statements, without companion files.
async fn sqlite_file(file: &Path, sql: &'static str) {
    let mut connection = connect(file).await;
    connection.execute(sql).await.unwrap();
    connection.close().await.unwrap();
}

/// Returns all files of a folder with their bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(&path).ok()))
        .collect()
}

/// Tries to open a path that must not open. Asserts that the folder around it did not change, and that the error names
/// the file.
async fn refused(path: &Path) -> OpenError {
    let parent = path.parent().filter(|parent| parent.is_dir());
    let before = parent.map(contents);
    let error = SqliteStore::open(path).await.expect_err("the store must not open");
    assert!(parent.map(contents) == before, "the folder is not as it was: {error}");
    let name = path.file_name().unwrap().to_str().unwrap();
    assert!(error.to_string().contains(name), "{error}");
    error
}

#[tokio::test]
async fn text_file_is_refused() {
    let folder = folder();
    for text in ["a", "SQLite format", "once upon a time\n", &"once upon a time\n".repeat(1_000)] {
        let path = folder.path().join("story.txt");
        fs::write(&path, text).unwrap();
        assert_eq!(refused(&path).await, OpenError::NotSqlite { path });
    }
}

#[tokio::test]
async fn database_of_another_application_is_refused() {
    let folder = folder();
    let plain = folder.path().join("plain.db");
    sqlite_file(&plain, "CREATE TABLE events (a); INSERT INTO events VALUES (1)").await;
    assert_eq!(refused(&plain).await, OpenError::Foreign { path: plain, application_id: 0 });

    let named = folder.path().join("named.db");
    sqlite_file(&named, "PRAGMA application_id = 7; PRAGMA journal_mode = WAL; CREATE TABLE t (a)").await;
    assert_eq!(refused(&named).await, OpenError::Foreign { path: named, application_id: 7 });
}

#[tokio::test]
async fn database_open_in_another_application_is_refused() {
    let folder = folder();
    let path = folder.path().join("busy.db");
    let mut connection = connect(&path).await;
    connection.execute("PRAGMA journal_mode = WAL; CREATE TABLE t (a); INSERT INTO t VALUES (1)").await.unwrap();
    assert!(matches!(refused(&path).await, OpenError::Foreign { .. }));
    connection.close().await.unwrap();
}

#[tokio::test]
async fn store_of_a_newer_build_is_refused() {
    let folder = folder();
    let path = folder.path().join("annals.db");
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
    let mut connection = connect(&path).await;
    let known: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    sqlite_file(&path, "PRAGMA user_version = 99; PRAGMA wal_checkpoint").await;
    assert_eq!(refused(&path).await, OpenError::TooNew { path: path.clone(), found: 99, known });
}

/// A newer build was killed while it had the file open. Only that newer build may recover the log next to the file.
#[tokio::test]
async fn store_that_a_newer_build_left_uncleanly_is_refused() {
    let copies = folder();
    let folder = folder();
    let path = folder.path().join("annals.db");
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
    let mut connection = connect(&path).await;
    let sql = "PRAGMA user_version = 99; PRAGMA wal_checkpoint; CREATE TABLE newer (a); INSERT INTO newer VALUES (1)";
    connection.execute(sql).await.unwrap();
    for name in ["annals.db", "annals.db-wal"] {
        fs::copy(folder.path().join(name), copies.path().join(name)).unwrap();
    }
    connection.close().await.unwrap();
    let error = refused(&copies.path().join("annals.db")).await;
    assert!(matches!(error, OpenError::TooNew { found: 99, .. }), "{error}");
}

/// A newer build still has the file open. The new schema version is only in the log next to the file.
#[tokio::test]
async fn store_open_in_a_newer_build_is_refused() {
    let folder = folder();
    let path = folder.path().join("annals.db");
    let store = SqliteStore::open(&path).await.unwrap();
    let mut connection = connect(&path).await;
    connection.execute("PRAGMA user_version = 99").await.unwrap();
    let error = SqliteStore::open(&path).await.err().unwrap();
    assert!(matches!(error, OpenError::TooNew { found: 99, .. }), "{error}");
    connection.close().await.unwrap();
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_directory() {
    let folder = folder();
    let path = folder.path().join("shop");
    fs::create_dir(&path).unwrap();
    assert_eq!(refused(&path).await, OpenError::Directory { path });
}

#[tokio::test]
async fn missing_folder_is_refused() {
    let folder = folder();
    let missing = folder.path().join("data");
    let path = missing.join("annals.db");
    assert_eq!(refused(&path).await, OpenError::NoFolder { path, folder: missing.clone() });
    assert!(!missing.exists());

    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let path = file.join("annals.db");
    assert_eq!(refused(&path).await, OpenError::NoFolder { path, folder: file });
}

/// Permissions do not restrict root, who may run the tests. The obstacles in this test stop root as well.
#[tokio::test]
async fn unwritable_path_is_refused() {
    let folder = folder();
    let long = folder.path().join("x".repeat(300));
    assert!(matches!(refused(&long).await, OpenError::Unwritable { .. }));

    // A folder has the name that the journal file would need.
    let blocked = folder.path().join("blocked.db");
    fs::create_dir_all(folder.path().join("blocked.db-journal/in the way")).unwrap();
    let error = SqliteStore::open(&blocked).await.err().unwrap();
    assert!(matches!(error, OpenError::Unwritable { .. }), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_device() {
    let error = SqliteStore::open("/dev/null").await.err().unwrap();
    assert!(matches!(error, OpenError::Unwritable { .. }), "{error}");
}

#[tokio::test]
async fn damaged_store_is_refused() {
    let folder = folder();
    let path = folder.path().join("annals.db");
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[100..4096].fill(0xff);
    fs::write(&path, &bytes).unwrap();
    let error = SqliteStore::open(&path).await.err().unwrap();
    assert!(matches!(error, OpenError::Damaged { .. }), "{error}");
    assert!(fs::read(&path).unwrap() == bytes, "recoverable data must not be touched");
}

#[tokio::test]
async fn url_of_another_scheme_is_refused() {
    for url in ["shop.db", "sqlite:", "sqlite://", "sqlite::memory:", ""] {
        let error = SqliteStore::open_url(url).await.err().unwrap();
        assert_eq!(error, OpenError::Url { url: url.into() });
    }
    // The error does not repeat a string that may hold a password.
    for url in ["postgres://shop:secret@localhost", "postgres://shop:secret", "postgres://db?password=secret"] {
        let error = SqliteStore::open_url(url).await.err().unwrap();
        assert_eq!(error, OpenError::Url { url: "postgres:…".into() });
    }
    let error = SqliteStore::open_url("secret@localhost").await.err().unwrap();
    assert!(!error.to_string().contains("secret"), "{error}");
}

/// An empty file is accepted: `touch` creates such a file, and a crash before the first write leaves such a file.
#[tokio::test]
async fn empty_file_becomes_a_store() {
    let folder = folder();
    let path = folder.path().join("annals.db");
    fs::write(&path, "").unwrap();
    SqliteStore::open_url(&format!("sqlite:{}", path.display())).await.unwrap().close().await.unwrap();
    let header = fs::read(&path).unwrap();
    assert_eq!(header[68..72], APPLICATION_ID.to_be_bytes(), "the file itself says whose it is");
    let beside = contents(folder.path()).into_keys().collect::<Vec<_>>();
    assert_eq!(beside, [path], "no file is left next to a closed store");
}

#[tokio::test]
async fn many_processes_can_open_a_new_file_at_once() {
    let folder = folder();
    let path = folder.path().join("annals.db");
    let opening = (0..8).map(|_| SqliteStore::open(&path));
    for store in futures::future::join_all(opening).await {
        store.unwrap().close().await.unwrap();
    }
}

#[cfg(unix)]
#[tokio::test]
async fn file_with_two_names_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.db");
    let other = folder.path().join("b.db");
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
    std::fs::hard_link(&path, &other).unwrap();
    for name in [&path, &other] {
        assert_eq!(refused(name).await, OpenError::HardLinks { path: name.clone(), names: 2 });
    }
    std::fs::remove_file(&other).unwrap();
    SqliteStore::open(&path).await.unwrap().close().await.unwrap();
}
