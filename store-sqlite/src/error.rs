//! The only module that classifies SQLite's result codes. Error messages are for people and are never parsed.

use std::path::{Path, PathBuf};

use annals::{CommitError, StoreError};

/// Why a file could not be opened as a store. The attempt changed nothing in the file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The string is not `sqlite:PATH`.
    #[error("{url:?} is not a SQLite store URL; write `sqlite:PATH`, such as `sqlite:shop.db`")]
    Url {
        /// The given string, or only its scheme if the string is a URL of another kind, which may contain a
        /// password.
        url: String,
    },
    /// The path is a directory.
    #[error("{} is a directory; name a file in it, such as {}", path.display(), path.join("annals.db").display())]
    Directory {
        /// The path that was given.
        path: PathBuf,
    },
    /// The store does not exist, and the caller did not ask to create it.
    #[error("there is no store {}", path.display())]
    Missing {
        /// The path that was given.
        path: PathBuf,
    },
    /// An older build wrote the file, and the caller did not ask to migrate it.
    #[error("{} has schema version {found}; this build needs {known}: migrate it", path.display())]
    Outdated {
        /// The path that was given.
        path: PathBuf,
        /// The version of the file.
        found: i64,
        /// The version that this build needs.
        known: i64,
    },
    /// The folder of the file does not exist.
    #[error("there is no folder {}; create it, or name another path than {}", folder.display(), path.display())]
    NoFolder {
        /// The path that was given.
        path: PathBuf,
        /// The missing folder.
        folder: PathBuf,
    },
    /// The file has other names (hard links). SQLite keeps a separate write-ahead log for each name, so opening the
    /// file under another name would lose writes or damage the file.
    #[error(
        "{} has {names} names (hard links), and SQLite would keep a log for each; make a copy, or remove the other names",
        path.display()
    )]
    HardLinks {
        /// The path that was given.
        path: PathBuf,
        /// The number of names.
        names: u64,
    },
    /// The file is not a SQLite database.
    #[error("{} is not a SQLite database; name another path, or move that file away", path.display())]
    NotSqlite {
        /// The path that was given.
        path: PathBuf,
    },
    /// The database belongs to another application.
    #[error(
        "{} is a SQLite database of another application (application id {application_id:#010x}); a store needs its \
         own file: name another path",
        path.display()
    )]
    Foreign {
        /// The path that was given.
        path: PathBuf,
        /// The application id of the file; 0 if its application set none.
        application_id: u32,
    },
    /// The database was written by a newer build.
    #[error("{} has schema version {found}; this build knows versions up to {known}: use a newer build", path.display())]
    TooNew {
        /// The path that was given.
        path: PathBuf,
        /// The version of the file.
        found: i64,
        /// The newest version that this build knows.
        known: i64,
    },
    /// The file cannot be created, read or written here.
    #[error("{} cannot be opened for writing: {reason}; check permissions of the file and its folder", path.display())]
    Unwritable {
        /// The path that was given.
        path: PathBuf,
        /// The message of the system.
        reason: String,
    },
    /// The file is a store, but damaged.
    #[error("{} is damaged: {reason}; restore it from a copy, or see `.recover` of the sqlite3 shell", path.display())]
    Damaged {
        /// The path that was given.
        path: PathBuf,
        /// SQLite's message.
        reason: String,
    },
    /// Another process has locked the file, or the system is short of a resource. Try again.
    #[error("{} cannot be opened now: {reason}; try again", path.display())]
    Unavailable {
        /// The path that was given.
        path: PathBuf,
        /// SQLite's message.
        reason: String,
    },
}

impl OpenError {
    pub(crate) fn without_password(url: &str) -> String {
        match url.split_once(':') {
            Some((scheme, _)) if scheme != "sqlite" => format!("{scheme}:…"),
            None if url.contains('@') => "…".into(),
            _ => url.into(),
        }
    }
}

/// What a failed statement means for the callers that wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another connection has held the lock for longer than the busy timeout.
    Busy,
    /// No disk space is left.
    Full,
    /// The file cannot be opened or written: permissions, a missing folder, a read-only file system.
    Unwritable,
    /// The file is not a database, or the database is inconsistent.
    Damaged,
    /// A value is too large, whatever the state of the file.
    Refused,
    /// Any other failure.
    Other,
}

// https://www.sqlite.org/rescode.html: the primary result code is the low byte of the extended one.
const SQLITE_PERM: i32 = 3;
const SQLITE_BUSY: i32 = 5;
const SQLITE_LOCKED: i32 = 6;
const SQLITE_READONLY: i32 = 8;
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_CANTOPEN: i32 = 14;
const SQLITE_TOOBIG: i32 = 18;
const SQLITE_AUTH: i32 = 23;
const SQLITE_RANGE: i32 = 25;
const SQLITE_NOTADB: i32 = 26;

pub(crate) fn fault(error: &sqlx::Error) -> Fault {
    let code = error.as_database_error().and_then(|error| error.code()).and_then(|code| code.parse::<i32>().ok());
    match code.map(|code| code & 0xff) {
        Some(SQLITE_BUSY | SQLITE_LOCKED) => Fault::Busy,
        Some(SQLITE_FULL) => Fault::Full,
        Some(SQLITE_PERM | SQLITE_READONLY | SQLITE_CANTOPEN | SQLITE_AUTH) => Fault::Unwritable,
        Some(SQLITE_CORRUPT | SQLITE_NOTADB) => Fault::Damaged,
        Some(SQLITE_TOOBIG | SQLITE_RANGE) => Fault::Refused,
        _ => Fault::Other,
    }
}

pub(crate) fn open_error(path: &Path, error: &sqlx::Error) -> OpenError {
    let path = path.to_owned();
    let reason = error.to_string();
    match fault(error) {
        Fault::Unwritable => OpenError::Unwritable { path, reason },
        Fault::Damaged => OpenError::Damaged { path, reason },
        Fault::Busy | Fault::Full | Fault::Refused | Fault::Other => OpenError::Unavailable { path, reason },
    }
}

pub(crate) fn read_error(error: sqlx::Error) -> StoreError {
    match fault(&error) {
        Fault::Damaged => StoreError::Corrupt(error.to_string()),
        Fault::Refused => StoreError::Refused(error.to_string()),
        _ => StoreError::Unavailable(error.to_string()),
    }
}

/// Classifies the failure of a statement before COMMIT. The transaction is rolled back, so nothing was stored.
pub(crate) fn write_error(error: &sqlx::Error) -> CommitError {
    match fault(error) {
        Fault::Refused => CommitError::Invalid(error.to_string()),
        Fault::Busy => CommitError::Unavailable(format!("another process holds the write lock: {error}")),
        Fault::Full => CommitError::Unavailable(format!("no space left: {error}")),
        _ => CommitError::Unavailable(error.to_string()),
    }
}

/// Classifies the failure of COMMIT itself. If there was no space, or if the lock was not free, the last frame of the
/// commit cannot have been written. After any other failure, for example if the sync of the file fails, the next
/// process that opens the file may find the commit in it.
pub(crate) fn commit_error(error: &sqlx::Error) -> CommitError {
    match fault(error) {
        Fault::Busy | Fault::Full => write_error(error),
        _ => CommitError::Unknown(error.to_string()),
    }
}
