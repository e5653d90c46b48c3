//! The one place where SQLSTATEs and names of constraints are told apart. Message text is for people and is never looked into.

use annals::{CommitError, StoreError};
use sqlx::{error::DatabaseError, postgres::PgDatabaseError, postgres::PgSeverity};

/// Why a store could not be opened. Whatever was there is as it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The text is no `postgres://` URL. It is not repeated here: it may hold a password.
    #[error("the store URL is not one of PostgreSQL ({reason}); write `postgres://user@host/database`")]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// No schema may have this name.
    #[error(
        "{schema:?} is no name for a schema: lower-case letters, digits and `_`, not starting with a digit or `pg_`, at most 50"
    )]
    Schema {
        /// What was given.
        schema: String,
    },
    /// The schema was written by a newer build.
    #[error("schema {schema} has version {found}; this build knows versions up to {known}: use a newer build")]
    TooNew {
        /// The schema.
        schema: String,
        /// The version it has.
        found: i32,
        /// The newest version known.
        known: i32,
    },
    /// There is no store to open, and none was to be created.
    #[error("there is no store in schema {schema} of that database")]
    Missing {
        /// The schema.
        schema: String,
    },
    /// The schema was written by an older build, and was to be left as it is.
    #[error("schema {schema} has version {found}; this build needs {known}: migrate it")]
    Outdated {
        /// The schema.
        schema: String,
        /// The version it has.
        found: i32,
        /// The version needed.
        known: i32,
    },
    /// The functions of the schema write to another one: it was renamed, or restored under another name.
    #[error(
        "the functions of schema {schema} use schema {found}: it was renamed; open it once with `migrate`, as its owner, and \
         they are made anew"
    )]
    Renamed {
        /// The schema.
        schema: String,
        /// The schema that its functions name.
        found: String,
    },
    /// The server refuses this user: a wrong password, no such database, or no permission.
    #[error("the database refuses: {reason}; check user, password, database and permissions")]
    Refused {
        /// What the server says.
        reason: String,
    },
    /// The server follows another one, so it cannot write, and does not know who else writes.
    #[error("the server is a standby; name the primary")]
    Standby,
    /// The connection is not as secure as the URL asks for: the server offers no TLS, its certificate does not hold, or this
    /// build has no TLS.
    #[error(
        "no TLS as asked for: {reason}; check sslmode and sslrootcert, and that the certificate names the URL's host"
    )]
    Tls {
        /// What was wrong.
        reason: String,
    },
    /// Something stands before the server that does not let by what a connection starts with, or takes it for an error.
    #[error(
        "{reason}: behind a connection pooler in transaction mode, add `pooled=true` to the store URL; see the documentation"
    )]
    Pooler {
        /// What was noticed.
        reason: String,
    },
    /// The server cannot be reached now, or is short of something; try again.
    #[error("the database cannot be used now: {reason}; try again")]
    Unavailable {
        /// What the system or the server says.
        reason: String,
    },
}

/// What a failed statement means for those who wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Another process was faster, or this one was chosen to end a deadlock. Nothing was written; look again.
    Race,
    /// Somebody keeps a lock for longer than a group is worth waiting for. Nothing was written.
    Held,
    /// A position is taken already: the sequence is behind the table.
    PositionTaken,
    /// The server does not take a value. Nothing was written.
    Refused,
    /// The user may not, or the database is not there.
    Forbidden,
    /// The session is on a standby or a read-only server: it stays of no use, even when the address leads to the primary again.
    /// Nothing was written.
    NotPrimary,
    /// The server cannot do it now, or its schema is not ours. Nothing was written.
    Unavailable,
    /// The connection ended: what was under way holds, or does not.
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
/// What a standby says to a transaction that is to write.
const FEATURE_NOT_SUPPORTED: &str = "0A000";
/// Raised by our own function: a document was put between the look and the write.
const DOCUMENT_RACE: &str = "AN001";
/// What a pooler says of everything: above all, that it has lost its server, with whatever was under way there.
const PROTOCOL_VIOLATION: &str = "08P01";
const CLASS_CONNECTION: &str = "08";
const CLASS_DATA: &str = "22";
const CLASS_CONSTRAINT: &str = "23";
const CLASS_AUTHORIZATION: &str = "28";

const POSITION_KEY: &str = "events_position_key";
const RACED_KEYS: [&str; 2] = ["events_stream_version", "documents_key"];

/// Why a session cannot be used: what `session.sql` said.
#[derive(Debug, thiserror::Error)]
#[error("{0}; connecting again until the address leads to the writable primary")]
struct NotPrimary(String);

/// The session is not on the server that it must be on.
pub(crate) fn not_primary(reason: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Configuration(Box::new(NotPrimary(reason.into())))
}

/// What the failure to begin a transaction means: nothing else that begins one is unsupported anywhere.
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

/// What an error says, for people.
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
            // Before anything was sent.
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
        // Of shared memory, which means that all locks the server has are taken: half as many may do.
        LOCK_NOT_AVAILABLE | OUT_OF_MEMORY => Fault::Held,
        // A number that somebody wrote by hand stands at its end.
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

/// Whether the connection ended, and with it whatever was under way.
pub(crate) fn is_lost(error: &sqlx::Error) -> bool {
    fault(error) == Fault::Lost
}

/// Whether a server that did not let us in may do so in a moment: it restarts, or has no session to spare.
pub(crate) fn is_for_a_moment(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| [TOO_MANY_CONNECTIONS, CANNOT_CONNECT_NOW].contains(&&*code))
        }
        _ => false,
    }
}

/// What goes wrong within the handshake comes as invalid data.
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
        // Not the absence of the store: the same question would fail again.
        error if fault(&error) == Fault::Refused => StoreError::Refused(error.to_string()),
        error => StoreError::Unavailable(text(&error)),
    }
}

/// A statement failed, and with it everything that it was to write.
pub(crate) fn write_error(error: &sqlx::Error) -> CommitError {
    match fault(error) {
        Fault::Refused => CommitError::Invalid(error.to_string()),
        Fault::Lost => CommitError::Unknown(error.to_string()),
        Fault::Race => CommitError::Unavailable(format!("other processes were faster each time: {error}")),
        Fault::Held => CommitError::Unavailable(format!("another transaction stays in the way: {error}")),
        _ => CommitError::Unavailable(text(error)),
    }
}

/// Something failed before anything was written.
pub(crate) fn not_written(error: &sqlx::Error) -> CommitError {
    CommitError::Unavailable(text(error))
}

/// The end of a transaction failed that has SQL of the user's in it: a constraint of theirs may be checked only then.
pub(crate) fn end_error(error: &sqlx::Error) -> CommitError {
    let code = error.as_database_error().and_then(DatabaseError::code);
    match code {
        Some(code) if code.starts_with(CLASS_CONSTRAINT) => CommitError::Invalid(error.to_string()),
        _ => write_error(error),
    }
}
