//! Opens the file: checks its owner and schema version, and sets up its connections.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use annals::Position;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteSynchronous},
};

use crate::error::{Fault, OpenError, fault, open_error};

/// The `PRAGMA application_id` of every store file: the letters "Anls". The command `file(1)` can show this id.
pub const APPLICATION_ID: u32 = 0x416e_6c73;

/// The migrations in order. `PRAGMA user_version` records how many of them were applied to a file.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_log_and_documents.sql"),
    include_str!("migrations/0002_inserts_without_a_trigger.sql"),
];

/// The number of pages in the write-ahead log after which a checkpoint moves the pages to the file. A checkpoint writes
/// each page only once, however many commits have changed the page since the last checkpoint. With 32 MiB between
/// checkpoints (8,000 pages of 4 KiB), most repeated writes are avoided, and recovery still takes only a fraction of a
/// second. (SQLite's default is 1,000 pages.)
const CHECKPOINT_PAGES: u32 = 8_000;
/// If the write-ahead log grows beyond this size during a long read, the log is truncated to this size afterwards.
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
/// The size of the writer's page cache, in KiB. The cache has room for the upper levels of both indexes of a log of
/// some tens of GiB.
const WRITER_CACHE_KIB: u32 = 32 << 10;
/// The maximum number of rows by which a reader's thread may be ahead of the task that receives the rows. With this
/// number, the thread can read a whole page of the log without waiting.
const ROWS_AHEAD_MAX: usize = 512;
/// How long a read waits for a connection before it gives up.
const ACQUIRE_SECONDS_MAX: u64 = 30;

/// The settings of a store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a commit waits for another process that holds the write lock before the commit fails as unavailable.
    pub busy_timeout: Duration,
    /// The maximum number of connections that serve reads. Each connection has a thread of its own.
    pub readers: u32,
    /// How often [`wait`](annals::EventStore::wait) checks for commits of other processes.
    pub poll_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { busy_timeout: Duration::from_secs(5), readers: 4, poll_interval: Duration::from_millis(200) }
    }
}

/// The location of the file, and how to connect to it.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pub(crate) path: PathBuf,
    pub(crate) settings: Settings,
    /// Whether to create a missing store, or migrate an older one.
    pub(crate) create: bool,
}

impl Database {
    /// Examines the file without SQLite, because SQLite would leave other files next to it. A file that is not a store
    /// is never opened with SQLite.
    pub(crate) fn locate(path: &Path, settings: Settings, create: bool) -> Result<Self, OpenError> {
        let given = path.to_owned();
        let unwritable =
            |error: std::io::Error| OpenError::Unwritable { path: given.clone(), reason: error.to_string() };
        let path = std::path::absolute(path).map_err(unwritable)?;
        if path.to_str().is_none() {
            return Err(OpenError::Unwritable { path, reason: "the path is not UTF-8".into() });
        }
        let folder = path.parent().unwrap_or(&path).to_owned();
        match fs::metadata(&path) {
            Ok(found) if found.is_dir() => return Err(OpenError::Directory { path }),
            Ok(found) if !found.is_file() => {
                return Err(OpenError::Unwritable { path, reason: "the path is not a regular file".into() });
            }
            Ok(found) => {
                one_name(&path, &found)?;
                if identify(&path)?.is_none() && !create {
                    return Err(OpenError::Missing { path });
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound && !create => return Err(OpenError::Missing { path }),
            Err(_) if !folder.is_dir() => return Err(OpenError::NoFolder { path, folder }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(unwritable(error)),
        }
        Ok(Self { path, settings, create })
    }

    /// Creates the file or migrates it to the newest schema. Returns the connection for the writer, and the last
    /// position of the log.
    pub(crate) async fn prepare(&self) -> Result<(SqliteConnection, Position), OpenError> {
        let mut connection = self.writer().await.map_err(|error| open_error(&self.path, &error))?;
        match self.prepare_with(&mut connection).await {
            Ok(head) => Ok((connection, head)),
            Err(error) => {
                // The file is closed explicitly, because a drop would close it only some time later. A second error
                // does not matter, because there is an error to report already.
                connection.close().await.ok();
                Err(error)
            }
        }
    }

    async fn prepare_with(&self, connection: &mut SqliteConnection) -> Result<Position, OpenError> {
        let failed = |error: sqlx::Error| open_error(&self.path, &error);
        // The migrations run before the switch to WAL, so that the header that identifies the store is in the file
        // itself and not in a log next to it.
        self.migrate(connection).await?;
        self.use_wal(connection).await.map_err(failed)?;
        let head = sqlx::query_scalar(include_str!("sql/head.sql")).fetch_one(connection).await.map_err(failed)?;
        Ok(Position(head))
    }

    /// Opens a connection for the writer.
    pub(crate) async fn writer(&self) -> Result<SqliteConnection, sqlx::Error> {
        self.connection()
            .create_if_missing(self.create)
            .synchronous(SqliteSynchronous::Full)
            .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
            .pragma("journal_size_limit", JOURNAL_BYTES_MAX.to_string())
            .pragma("cache_size", format!("-{WRITER_CACHE_KIB}"))
            .connect()
            .await
    }

    /// Creates the connections for reads, which cannot write. They are not pinged before each use, because SQLite runs
    /// within this process.
    pub(crate) fn readers(&self) -> SqlitePool {
        SqlitePoolOptions::new()
            .max_connections(self.settings.readers.max(1))
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .acquire_timeout(Duration::from_secs(ACQUIRE_SECONDS_MAX))
            .connect_lazy_with(self.connection().read_only(true).row_buffer_size(ROWS_AHEAD_MAX))
    }

    fn connection(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new()
            .filename(&self.path)
            .busy_timeout(self.settings.busy_timeout)
            .thread_name(|_| "annals-sqlite".into())
            .disable_statement_logging()
    }

    async fn migrate(&self, connection: &mut SqliteConnection) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&self.path, &error);
        let known = MIGRATIONS.len();
        // Usually there is nothing to migrate. This check needs no lock.
        let found = self.schema_version(connection).await?;
        if found == known {
            return Ok(());
        }
        if !self.create {
            let path = self.path.clone();
            let found = found as i64;
            let known = known as i64;
            return Err(OpenError::Outdated { path, found, known });
        }
        // The version is read again within the transaction, because another process may have migrated the file since
        // the first read.
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        let found = self.schema_version(&mut transaction).await?;
        for (sql, version) in MIGRATIONS.iter().zip(1..).skip(found) {
            sqlx::raw_sql(*sql).execute(&mut *transaction).await.map_err(failed)?;
            let mark = format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version}");
            sqlx::raw_sql(AssertSqlSafe(mark)).execute(&mut *transaction).await.map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    async fn schema_version(&self, connection: &mut SqliteConnection) -> Result<usize, OpenError> {
        let found: i64 = sqlx::query_scalar("PRAGMA user_version")
            .fetch_one(connection)
            .await
            .map_err(|error| open_error(&self.path, &error))?;
        let known = MIGRATIONS.len();
        match usize::try_from(found) {
            Ok(version) if version <= known => Ok(version),
            _ => Err(OpenError::TooNew { path: self.path.clone(), found, known: known as i64 }),
        }
    }

    /// Switches to WAL. The switch needs exclusive access to the file for a moment, and SQLite does not wait for this
    /// access by itself.
    async fn use_wal(&self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        const PAUSE: Duration = Duration::from_millis(10);
        let pauses_max = self.settings.busy_timeout.as_millis() / PAUSE.as_millis();
        for _ in 0..pauses_max {
            match sqlx::query("PRAGMA journal_mode = WAL").execute(&mut *connection).await {
                Err(error) if fault(&error) == Fault::Busy => tokio::time::sleep(PAUSE).await,
                done => return done.map(drop),
            }
        }
        sqlx::query("PRAGMA journal_mode = WAL").execute(connection).await.map(drop)
    }
}

#[cfg(unix)]
fn one_name(path: &Path, found: &fs::Metadata) -> Result<(), OpenError> {
    match std::os::unix::fs::MetadataExt::nlink(found) {
        names @ 2.. => Err(OpenError::HardLinks { path: path.to_owned(), names }),
        _ => Ok(()),
    }
}

#[cfg(not(unix))]
fn one_name(_: &Path, _: &fs::Metadata) -> Result<(), OpenError> {
    Ok(())
}

/// Returns the schema version of a file, or `None` for an empty file. The header of a file shows to which application
/// the file belongs (<https://www.sqlite.org/fileformat2.html#the_database_header>). A store may use an empty file,
/// because a crash before the first commit leaves an empty file, and so does `touch`.
fn identify(path: &Path) -> Result<Option<u32>, OpenError> {
    const MAGIC: &[u8] = b"SQLite format 3\0";
    let unwritable = |error: std::io::Error| OpenError::Unwritable { path: path.to_owned(), reason: error.to_string() };
    let mut header = Vec::with_capacity(100);
    File::open(path).map_err(unwritable)?.take(100).read_to_end(&mut header).map_err(unwritable)?;
    if header.is_empty() {
        return Ok(None);
    }
    let number = |at: usize| header.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
    let (true, Some(user_version), Some(application_id)) = (header.starts_with(MAGIC), number(60), number(68)) else {
        return Err(OpenError::NotSqlite { path: path.to_owned() });
    };
    if application_id != APPLICATION_ID {
        return Err(OpenError::Foreign { path: path.to_owned(), application_id });
    }
    if user_version as usize > MIGRATIONS.len() {
        let found = i64::from(user_version);
        let known = MIGRATIONS.len() as i64;
        return Err(OpenError::TooNew { path: path.to_owned(), found, known });
    }
    Ok(Some(user_version))
}
