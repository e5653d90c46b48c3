//! Opening the file: whose it is, which schema version it has, and how its connections are set up.

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

/// "Anls": what `PRAGMA application_id` of every file of ours says, and `file(1)` can tell.
pub const APPLICATION_ID: u32 = 0x416e_6c73;

/// In order; `PRAGMA user_version` counts how many of them a file has had.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_log_and_documents.sql"),
    include_str!("migrations/0002_inserts_without_a_trigger.sql"),
];

/// A hot page is written to the file once a checkpoint, however many commits touched it since; at 4 KiB a page, 32 MiB of log
/// between checkpoints spares most of those writes and still recovers in a fraction of a second. (SQLite's own: 1,000.)
const CHECKPOINT_PAGES: u32 = 8_000;
/// A log that grew beyond this behind a long reader is cut back to it afterwards.
const JOURNAL_BYTES_MAX: u64 = 64 << 20;
/// Pages that the writer keeps in memory, in KiB: the upper levels of both indexes of a log of some tens of GiB.
const WRITER_CACHE_KIB: u32 = 32 << 10;
/// Rows that a reader's thread may be ahead of the task that takes them: a page of the log without a wait in between.
const ROWS_AHEAD_MAX: usize = 512;
/// How long a read waits for one of the connections before it gives up.
const ACQUIRE_SECONDS_MAX: u64 = 30;

/// How to open a store, where the defaults do not do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long a commit waits for another process that holds the write lock, before it is refused as unavailable.
    pub busy_timeout: Duration,
    /// How many connections serve reads, each with a thread of its own.
    pub readers: u32,
    /// How often [`wait`](annals::EventStore::wait) looks for commits of other processes.
    pub poll_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { busy_timeout: Duration::from_secs(5), readers: 4, poll_interval: Duration::from_millis(200) }
    }
}

/// Where the file is and how to connect to it.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pub(crate) path: PathBuf,
    pub(crate) settings: Settings,
    /// Whether a store is made where there is none, or none of the newest version.
    pub(crate) create: bool,
}

impl Database {
    /// Looks at the file without SQLite, which would leave traces beside it: what is not ours is never opened at all.
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
                return Err(OpenError::Unwritable { path, reason: "it is not a regular file".into() });
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

    /// Creates the file or brings it to the newest schema; gives the connection that will write to it, and the last position.
    pub(crate) async fn prepare(&self) -> Result<(SqliteConnection, Position), OpenError> {
        let mut connection = self.writer().await.map_err(|error| open_error(&self.path, &error))?;
        match self.prepare_with(&mut connection).await {
            Ok(head) => Ok((connection, head)),
            Err(error) => {
                // Not just dropped, which would let go of the file some time later. There is an error to report already.
                connection.close().await.ok();
                Err(error)
            }
        }
    }

    async fn prepare_with(&self, connection: &mut SqliteConnection) -> Result<Position, OpenError> {
        let failed = |error: sqlx::Error| open_error(&self.path, &error);
        // Before the change to WAL: so the header of the file itself, and not a log beside it, says whose it is.
        self.migrate(connection).await?;
        self.use_wal(connection).await.map_err(failed)?;
        let head = sqlx::query_scalar(include_str!("sql/head.sql")).fetch_one(connection).await.map_err(failed)?;
        Ok(Position(head))
    }

    /// A connection for the writer.
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

    /// Connections for reads. They cannot write, and are not asked for a sign of life before each use: they live in here.
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
        // Most openings find nothing to do, and need no lock to see it.
        let found = self.schema_version(connection).await?;
        if found == known {
            return Ok(());
        }
        if !self.create {
            let (path, found, known) = (self.path.clone(), found as i64, known as i64);
            return Err(OpenError::Outdated { path, found, known });
        }
        // Two processes may open a new file at once: the second finds the work done.
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

    /// The change needs the file for itself for a moment, and SQLite does not wait for that by itself.
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

/// Its schema version, or `None` for an empty file. Whose a file is, by its header (<https://www.sqlite.org/fileformat2.html#the_database_header>). An empty one is for the
/// taking: that is what a crash before the first commit leaves, and what `touch` makes.
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
        let (found, known) = (i64::from(user_version), MIGRATIONS.len() as i64);
        return Err(OpenError::TooNew { path: path.to_owned(), found, known });
    }
    Ok(Some(user_version))
}
