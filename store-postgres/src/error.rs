//! The only module that classifies SQLSTATEs and constraint names. Error messages are for people and are never
//! parsed.

use annals::{CommitError, StoreError};
use sqlx::{error::DatabaseError, postgres::PgDatabaseError, postgres::PgSeverity};

/// Why a store could not be opened. The attempt changed nothing in the database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The string is not a `postgres://` URL. The error does not repeat the string, which may hold a password.
    #[error("the store URL is not a valid PostgreSQL URL ({reason}); write `postgres://user@host/database`")]
    Url {
        /// What is wrong with the URL.
        reason: String,
    },
    /// The string is not a valid name for a schema.
    #[error(
        "{schema:?} is not a valid schema name: use lower-case letters, digits and `_`, not starting with a digit \
         or `pg_`, at most 50"
    )]
    Schema {
        /// The name that was given.
        schema: String,
    },
    /// The schema was written by a newer build.
    #[error("schema {schema} has version {found}; this build knows versions up to {known}: use a newer build")]
    TooNew {
        /// The schema.
        schema: String,
        /// The version of the schema.
        found: i32,
        /// The newest version that this build knows.
        known: i32,
    },
    /// The store does not exist, and the caller did not ask to create it.
    #[error("there is no store in schema {schema} of that database")]
    Missing {
        /// The schema.
        schema: String,
    },
    /// An older build wrote the schema, and the caller did not ask to migrate it.
    #[error("schema {schema} has version {found}; this build needs {known}: migrate it")]
    Outdated {
        /// The schema.
        schema: String,
        /// The version of the schema.
        found: i32,
        /// The version that this build needs.
        known: i32,
    },
    /// The functions of the schema write to another schema, because this schema was renamed, or restored under another
    /// name.
    #[error(
        "the functions of schema {schema} use schema {found}: the schema was renamed; open it once with `migrate`, \
         as its owner, to create the functions again"
    )]
    Renamed {
        /// The schema.
        schema: String,
        /// The schema to which the functions write.
        found: String,
    },
    /// The server refuses the connection: the password is wrong, the database does not exist, or the user lacks a
    /// permission.
    #[error("access to the database is denied: {reason}; check user, password, database and permissions")]
    Refused {
        /// The server's message.
        reason: String,
    },
    /// The server is a standby. A standby cannot write, and does not know which transactions write on the primary.
    #[error("the server is a standby; use the address of the primary")]
    Standby,
    /// The connection is not as secure as the URL demands: the server offers no TLS, its certificate is not valid, or
    /// this build has no TLS.
    #[error(
        "a TLS connection as requested is not possible: {reason}; check sslmode and sslrootcert, and that the \
         certificate names the URL's host"
    )]
    Tls {
        /// What is wrong.
        reason: String,
    },
    /// A pooler in front of the server drops the startup settings of a connection, or treats them as an error.
    #[error(
        "{reason}: behind a connection pooler in transaction mode, add `pooled=true` to the store URL; see the documentation"
    )]
    Pooler {
        /// The symptom.
        reason: String,
    },
    /// The server is unreachable or short of a resource; try again.
    #[error("the database cannot be used now: {reason}; try again")]
    Unavailable {
        /// The message of the system or the server.
        reason: String,
    },
}

/// What a failed statement means for the callers that wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another process committed first, or the server aborted this transaction to end a deadlock. Nothing was written.
    /// The caller should read again and retry.
    Race,
    /// Another transaction holds a lock for longer than a group should wait. Nothing was written.
    Held,
    /// There is an event at the drawn position already, because the sequence is behind the table.
    PositionTaken,
    /// The server rejects a value. Nothing was written.
    Refused,
    /// The user lacks a permission, or the database does not exist.
    Forbidden,
    /// The session is on a standby or a read-only server. Nothing was written. The session cannot be used any more,
    /// even if the address leads to the primary again.
    NotPrimary,
    /// The server cannot write at the moment, or the schema is not that of a store. Nothing was written.
    Unavailable,
    /// The connection ended. The statement in flight may or may not have taken effect.
    Lost,
}

// https://www.postgresql.org/docs/current/errcodes-appendix.html
const UNIQUE_VIOLATION: &str = "23505";
const CHECK_VIOLATION: &str = "23514";
const SERIALIZATION_FAILURE: &str = "40001";
const DEADLOCK_DETECTED: &str = "40P01";
const LOCK_NOT_AVAILABLE: &str = "55P03";
const OUT_OF_MEMORY: &str = "53200";
const PROGRAM_LIMIT_EXCEEDED: &str = "54000";
const NUMBER_OUT_OF_RANGE: &str = "22003";
const INSUFFICIENT_PRIVILEGE: &str = "42501";
const TOO_MANY_CONNECTIONS: &str = "53300";
const CANNOT_CONNECT_NOW: &str = "57P03";
const NO_SUCH_DATABASE: &str = "3D000";
const READ_ONLY_TRANSACTION: &str = "25006";
/// The code with which a standby refuses to begin a read-write transaction.
const FEATURE_NOT_SUPPORTED: &str = "0A000";
/// The error code of the database function `append_checked` if another transaction wrote a document after the function
/// had checked the document's version.
const DOCUMENT_RACE: &str = "AN001";
/// The code with which a pooler reports every error. Most importantly, the code means that the pooler has lost the
/// server, so the outcome of the statements in flight is unknown.
const PROTOCOL_VIOLATION: &str = "08P01";
const CLASS_CONNECTION: &str = "08";
const CLASS_DATA: &str = "22";
const CLASS_CONSTRAINT: &str = "23";
const CLASS_AUTHORIZATION: &str = "28";

const POSITION_KEY: &str = "events_position_key";
const RACED_KEYS: [&str; 2] = ["events_stream_version", "documents_key"];

/// The reason why a session cannot be used, as `session.sql` reports it.
#[derive(Debug, thiserror::Error)]
#[error("{0}; connecting again until the address leads to the writable primary")]
struct NotPrimary(String);

/// Returns the error for a session on the wrong server.
pub(crate) fn not_primary(reason: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Configuration(Box::new(NotPrimary(reason.into())))
}

/// Classifies a failure to begin a transaction. If the server reports an unsupported feature here, the server is a
/// standby, because nothing else in the statement can be unsupported.
pub(crate) fn begin_error(error: sqlx::Error) -> sqlx::Error {
    let code = error.as_database_error().and_then(DatabaseError::code);
    if code.is_some_and(|code| code == FEATURE_NOT_SUPPORTED) {
        return not_primary(format!("the server is a standby ({error})"));
    }
    error
}

fn is_not_primary(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Configuration(reason) if reason.is::<NotPrimary>())
}

/// Returns the message of an error, for people.
fn text(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Configuration(reason) => reason.to_string(),
        error => error.to_string(),
    }
}

pub(crate) fn fault(error: &sqlx::Error) -> Fault {
    if is_not_primary(error) {
        return Fault::NotPrimary;
    }
    let Some(error) = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>()) else {
        return match error {
            // No statement has been sent.
            sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed => Fault::Unavailable,
            sqlx::Error::Encode(_) => Fault::Refused,
            _ => Fault::Lost,
        };
    };
    if matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic) {
        return match error.code() {
            code if code.starts_with(CLASS_AUTHORIZATION) || code == NO_SUCH_DATABASE => Fault::Forbidden,
            _ => Fault::Lost,
        };
    }
    match error.code() {
        UNIQUE_VIOLATION if error.constraint() == Some(POSITION_KEY) => Fault::PositionTaken,
        UNIQUE_VIOLATION if error.constraint().is_some_and(|name| RACED_KEYS.contains(&name)) => Fault::Race,
        SERIALIZATION_FAILURE | DEADLOCK_DETECTED | DOCUMENT_RACE => Fault::Race,
        // `OUT_OF_MEMORY` means that all locks of the server are in use. A group of half the size may succeed.
        LOCK_NOT_AVAILABLE | OUT_OF_MEMORY => Fault::Held,
        // A number is at its maximum, which happens only if it was written by hand.
        NUMBER_OUT_OF_RANGE => Fault::Unavailable,
        CHECK_VIOLATION | PROGRAM_LIMIT_EXCEEDED => Fault::Refused,
        code if code.starts_with(CLASS_DATA) => Fault::Refused,
        INSUFFICIENT_PRIVILEGE => Fault::Forbidden,
        READ_ONLY_TRANSACTION => Fault::NotPrimary,
        code if code.starts_with(CLASS_CONNECTION) => Fault::Lost,
        code if code.starts_with(CLASS_AUTHORIZATION) => Fault::Forbidden,
        _ => Fault::Unavailable,
    }
}

/// Returns whether the connection ended, so that the outcome of statements in flight is unknown.
pub(crate) fn is_lost(error: &sqlx::Error) -> bool {
    fault(error) == Fault::Lost
}

/// Returns whether a server that refused a connection may soon accept one, because the server is restarting or has no
/// free session.
pub(crate) fn is_for_a_moment(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| [TOO_MANY_CONNECTIONS, CANNOT_CONNECT_NOW].contains(&&*code))
        }
        _ => false,
    }
}

/// Returns whether TLS failed. sqlx reports errors within the handshake as invalid data.
fn is_tls(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Tls(_) => true,
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::InvalidData,
        _ => false,
    }
}

pub(crate) fn is_protocol_violation(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(DatabaseError::code).is_some_and(|code| code == PROTOCOL_VIOLATION)
}

pub(crate) fn open_error(error: &sqlx::Error) -> OpenError {
    let reason = error.to_string();
    let read_only =
        error.as_database_error().and_then(DatabaseError::code).is_some_and(|code| code == READ_ONLY_TRANSACTION);
    match fault(error) {
        _ if is_tls(error) => OpenError::Tls { reason },
        _ if read_only || fault(error) == Fault::NotPrimary => OpenError::Standby,
        Fault::Forbidden => OpenError::Refused { reason },
        _ => OpenError::Unavailable { reason },
    }
}

pub(crate) fn read_error(error: sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } => StoreError::Corrupt(error.to_string()),
        // The store is reachable, but the same query would fail again.
        error if fault(&error) == Fault::Refused => StoreError::Refused(error.to_string()),
        error => StoreError::Unavailable(text(&error)),
    }
}

/// Classifies a failed statement, which has written nothing unless its outcome is unknown.
pub(crate) fn write_error(error: &sqlx::Error) -> CommitError {
    match fault(error) {
        Fault::Refused => CommitError::Invalid(error.to_string()),
        Fault::Lost => CommitError::Unknown(error.to_string()),
        Fault::Race => CommitError::Unavailable(format!("other processes committed first on every attempt: {error}")),
        Fault::Held => CommitError::Unavailable(format!("another transaction holds a conflicting lock: {error}")),
        _ => CommitError::Unavailable(text(error)),
    }
}

/// Classifies a failure that happened before anything was written.
pub(crate) fn not_written(error: &sqlx::Error) -> CommitError {
    CommitError::Unavailable(text(error))
}

/// Classifies a failure to commit a transaction that contains a user's SQL. The server checks deferred constraints only
/// at the commit.
pub(crate) fn end_error(error: &sqlx::Error) -> CommitError {
    let code = error.as_database_error().and_then(DatabaseError::code);
    match code {
        Some(code) if code.starts_with(CLASS_CONSTRAINT) => CommitError::Invalid(error.to_string()),
        _ => write_error(error),
    }
}
