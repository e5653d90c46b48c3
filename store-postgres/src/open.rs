//! Opens connections: parses the URL, prepares the schema, and sets up each connection.

use std::str::FromStr;

use annals::{Clock, secret};
use chrono::{DateTime, Utc};
use percent_encoding::percent_decode_str;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, Postgres,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions},
};

use crate::{
    error::{OpenError, begin_error, is_protocol_violation, open_error},
    history::{Asked, History},
    statements::{SCHEMA_DEFAULT, Statements, in_schema, is_schema_name},
};

/// The migrations in order. The table `migrations` records how many of them were applied to a schema.
const MIGRATIONS: &[&str] = &[
    include_str!("migrations/0001_log_and_documents.sql"),
    include_str!("migrations/0002_operators_record_acts.sql"),
    include_str!("migrations/0003_few_rows_one_by_one.sql"),
    include_str!("migrations/0004_streams_stand_at_an_event.sql"),
    include_str!("migrations/0005_absence_counts.sql"),
];

/// How long the server works on one group of commits before the server gives up, for example because the whole table is
/// locked. A statement timeout is a definite failure; a lost connection leaves the outcome unknown.
const GROUP_SECONDS_MAX: u64 = 30;
/// How long a group of commits waits for a lock. Transactions of other processes of the store end much sooner, so a
/// longer wait means that another client keeps a transaction open. With this limit, commits of the group that the
/// transaction does not block need not wait long.
const LOCK_MS_MAX: u64 = 500;
/// The maximum number of statements that each connection keeps prepared. This is enough for all statements of a store.
const STATEMENTS_MAX: usize = 64;
/// The settings of every connection. With these settings, every statement of a store takes only a few index seeks, even
/// on a new table, for which the planner has no statistics and would prefer a sequential scan. The settings also turn
/// off just-in-time compilation, which does not pay off for such short statements. Statements always use a generic
/// plan, because a plan for the actual arguments is never better.
const SETTINGS: [(&str, &str); 6] = [
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("jit", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Read,
    Write,
    /// The connection notifies other processes, without a sync to disk for each notification.
    Notify,
}

impl Purpose {
    /// Returns the settings of the purpose, in addition to [`SETTINGS`].
    fn settings(self) -> Vec<(&'static str, String)> {
        match self {
            Self::Read => vec![("default_transaction_read_only", "on".into())],
            Self::Write => vec![
                ("statement_timeout", format!("{GROUP_SECONDS_MAX}s")),
                ("lock_timeout", format!("{LOCK_MS_MAX}ms")),
                ("default_transaction_isolation", "read committed".into()),
            ],
            Self::Notify => vec![("synchronous_commit", "off".into())],
        }
    }
}

/// The settings of a store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The schema that contains the tables. The name consists of lower-case letters, digits and `_`. The store creates
    /// the schema if it is missing. The parameter `?schema=NAME` in the URL takes precedence over this setting.
    pub schema: String,
    /// The maximum number of connections that serve reads. Up to three more connections write, and one notifies other
    /// processes and receives their notifications. Behind a pooler, one connection notifies other processes, and
    /// another connection polls for their events.
    pub connections: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { schema: SCHEMA_DEFAULT.into(), connections: 8 }
    }
}

/// Removes one of the store's own parameters from a URL that [`check_parameters`] has accepted, and returns its value.
fn take_parameter(url: &mut String, name: &str) -> Option<String> {
    let (rest, query) = url.split_once('?')?;
    let (ours, others): (Vec<_>, Vec<_>) =
        query.split('&').partition(|pair| pair.split_once('=').is_some_and(|(of, _)| of == name));
    let value = ours.last()?[name.len() + 1..].to_owned();
    *url = if others.is_empty() { rest.to_owned() } else { format!("{rest}?{}", others.join("&")) };
    Some(value)
}

/// Returns the password to which `?password_file=PATH` or `?password_env=VARIABLE` refers.
fn password(url: &mut String) -> Result<Option<String>, OpenError> {
    let wrong = |reason: String| OpenError::Url { reason };
    let file = take_parameter(url, "password_file");
    let variable = take_parameter(url, "password_env");
    if file.is_none() && variable.is_none() {
        return Ok(None);
    }
    let (place, query) = url.split_once('?').unwrap_or((url, ""));
    let in_url =
        place.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@')).is_some_and(|(user, _)| user.contains(':'))
            || query.split('&').any(|pair| pair.starts_with("password="));
    match (file, variable) {
        (Some(file), None) if !in_url => {
            let path = percent_decode_str(&file).decode_utf8_lossy();
            secret::from_file(&path).map(Some).map_err(|reason| wrong(format!("password_file {reason}")))
        }
        (None, Some(variable)) if !in_url => {
            secret::from_env(&variable).map(Some).map_err(|reason| wrong(format!("password_env: {reason}")))
        }
        _ => Err(wrong(
            "the URL names more than one password: use one of password_file, password_env and the URL itself".into(),
        )),
    }
}

/// The URL parameters that take effect: the store's own, and those of sqlx. sqlx would ignore other parameters of
/// libpq, such as `target_session_attrs`.
const PARAMETERS: [&str; 23] = [
    "schema",
    "pooled",
    "application_name",
    "dbname",
    "host",
    "hostaddr",
    "options",
    "password",
    "password_env",
    "password_file",
    "port",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "ssl-ca",
    "ssl-cert",
    "ssl-key",
    "ssl-mode",
    "ssl-root-cert",
    "statement-cache-capacity",
    "user",
    "options[…]",
];

const CACHE_PARAMETER: &str = "statement-cache-capacity=";
/// The aliases of parameters, each with the parameter for which the alias stands.
const SAME_PARAMETERS: [(&str, &str); 6] = [
    ("ssl-mode", "sslmode"),
    ("ssl-ca", "sslrootcert"),
    ("ssl-root-cert", "sslrootcert"),
    ("ssl-cert", "sslcert"),
    ("ssl-key", "sslkey"),
    ("hostaddr", "host"),
];

/// Refuses parameters that would be ignored, and parameters that are given twice. In both cases, the intended setting
/// would silently not take effect. The errors contain names but no values.
fn check_parameters(url: &str) -> Result<(), OpenError> {
    let refused = |reason: String| Err(OpenError::Url { reason });
    if url.contains('#') {
        return refused("a `#` in the URL, as in a password, must be written `%23`".into());
    }
    let Some((_, query)) = url.split_once('?').filter(|(_, query)| !query.is_empty()) else { return Ok(()) };
    let mut seen = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let Some((name, _)) = pair.split_once('=') else {
            return refused("a parameter in the URL has no `=` and no value".into());
        };
        let is_option = name.starts_with("options[") && name.ends_with(']');
        if !is_option && !PARAMETERS.contains(&name) {
            return refused(annals::config::unknown_parameter(name, &PARAMETERS));
        }
        let same = SAME_PARAMETERS.iter().find(|(other, _)| *other == name).map_or(name, |(_, name)| *name);
        if seen.contains(&same) {
            return refused(format!("the parameter `{same}` is given twice"));
        }
        seen.push(same);
    }
    Ok(())
}

/// The location of the database, and how to connect to it.
#[derive(Debug)]
pub(crate) struct Database {
    options: PgConnectOptions,
    pub(crate) settings: Settings,
    pub(crate) statements: Statements,
    /// Whether a pooler may assign the session to another client after each transaction. The store then leaves no state
    /// in a session: settings apply per transaction, statements have no names, and no session listens.
    pub(crate) pooled: bool,
    /// Whether the role is an operator, which may append only the events of operator actions.
    pub(crate) operates: bool,
    /// The server's time, updated by every query for new events.
    pub(crate) clock: Clock,
    /// The history against which every session is checked.
    pub(crate) history: History,
}

impl Database {
    pub(crate) fn locate(url: &str, mut settings: Settings) -> Result<Self, OpenError> {
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(OpenError::Url { reason: "the URL does not start with postgres://".into() });
        }
        check_parameters(url)?;
        let mut url = url.to_owned();
        settings.schema = take_parameter(&mut url, "schema").unwrap_or(settings.schema);
        let pooled = match take_parameter(&mut url, "pooled").as_deref() {
            None | Some("false") => false,
            Some("true") => true,
            Some(_) => return Err(OpenError::Url { reason: "`pooled` is `true` or `false`".into() }),
        };
        let password = password(&mut url)?;
        // These errors name the wrong part without repeating it.
        let options = PgConnectOptions::from_str(&url).map_err(|error| OpenError::Url { reason: error.to_string() })?;
        let options = match password {
            Some(password) => options.password(&password),
            None => options,
        };
        if !is_schema_name(&settings.schema) {
            return Err(OpenError::Schema { schema: settings.schema });
        }
        let statements = Statements::new(&settings.schema, !pooled);
        let options = match (pooled, url.contains(CACHE_PARAMETER)) {
            (true, _) => options.statement_cache_capacity(0),
            (false, true) => options,
            (false, false) => options.statement_cache_capacity(STATEMENTS_MAX),
        };
        let options = options
            // A pooler may refuse this setting, and the store does not need it, because none of its columns is a
            // floating-point number.
            .extra_float_digits(None)
            .disable_statement_logging();
        let options = if pooled { options } else { options.options(SETTINGS) };
        let clock = Clock::of_the_machine();
        let history = History::default();
        Ok(Self { options, settings, statements, pooled, operates: false, clock, history })
    }

    /// Creates the schema or migrates it to the newest version.
    ///
    /// Without `create`, this method only checks that the schema has the newest version.
    pub(crate) async fn prepare(&mut self, create: bool) -> Result<(), OpenError> {
        let connected = self.options.connect().await;
        let mut connection = connected.map_err(|error| match open_error(&error) {
            OpenError::Unavailable { reason } if !self.pooled && is_protocol_violation(&error) => {
                OpenError::Pooler { reason }
            }
            error => error,
        })?;
        let prepared = self.prepare_with(&mut connection, create).await;
        // The session is closed explicitly, because a drop would close it only some time later. An error here does not
        // matter, because the outcome is known already.
        connection.close().await.ok();
        prepared
    }

    async fn prepare_with(&mut self, connection: &mut PgConnection, create: bool) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        // The connection is used for nothing else, so closing the connection ends the transaction in any case.
        let mut transaction = connection.begin().await.map_err(failed)?;
        let connection = &mut *transaction;
        let asked = self.clock.ask();
        let (standby, set_up, now): (bool, bool, DateTime<Utc>) =
            self.statements.server.rows().fetch_one(&mut *connection).await.map_err(failed)?;
        self.clock.answered(asked, now);
        if standby {
            return Err(OpenError::Standby);
        }
        if !set_up && !self.pooled {
            return Err(OpenError::Pooler {
                reason: "startup parameters of a connection do not reach the server".into(),
            });
        }
        // Usually there is nothing to migrate. This check needs no lock and only read permission.
        let schema = || self.settings.schema.clone();
        match self.schema_version(connection).await? {
            found if found == MIGRATIONS.len() => {}
            _ if create => self.migrate(connection).await?,
            0 => return Err(OpenError::Missing { schema: schema() }),
            found => {
                let found = found as i32;
                let known = MIGRATIONS.len() as i32;
                return Err(OpenError::Outdated { schema: schema(), found, known });
            }
        }
        self.check_functions(connection, create).await?;
        let may_append: bool = self.statements.may_append.scalar().fetch_one(&mut *connection).await.map_err(failed)?;
        self.operates = !may_append;
        self.statements.advance.query().execute(connection).await.map_err(failed)?;
        transaction.commit().await.map_err(failed)
    }

    async fn migrate(&self, connection: &mut PgConnection) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let schema = &self.settings.schema;
        // The version is read again, because another instance may have migrated the schema while this one waited for
        // the lock.
        let lock = self.statements.lock_migrations.query().bind(schema);
        lock.execute(&mut *connection).await.map_err(failed)?;
        let found = self.schema_version(connection).await?;
        if found == 0 {
            let exists = self.statements.has_schema.scalar().bind(schema);
            let exists: bool = exists.fetch_one(&mut *connection).await.map_err(failed)?;
            // IF NOT EXISTS is avoided, because it demands permission to create schemas even when there is nothing to
            // do. The name is safe in SQL, because `is_schema_name` has accepted it.
            let create = if exists { String::new() } else { format!("CREATE SCHEMA \"{schema}\";") }
                + &format!(
                    "CREATE TABLE IF NOT EXISTS \"{schema}\".migrations \
                     (version int PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
                );
            sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *connection).await.map_err(failed)?;
        }
        for (sql, version) in MIGRATIONS.iter().zip(1..).skip(found) {
            sqlx::raw_sql(in_schema(sql, schema)).execute(&mut *connection).await.map_err(failed)?;
            let mark = format!("INSERT INTO \"{schema}\".migrations (version) VALUES ({version})");
            sqlx::raw_sql(AssertSqlSafe(mark)).execute(&mut *connection).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Finds functions that still use the schema's former name, which may belong to another store by now. With
    /// `create`, this method rewrites these functions. Without `create`, or without permission, this method refuses the
    /// schema before anything is written.
    async fn check_functions(&self, connection: &mut PgConnection, create: bool) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let schema = &self.settings.schema;
        let foreign = self.statements.foreign_schemas.scalar().bind(schema);
        let foreign: Vec<String> = foreign.fetch_all(&mut *connection).await.map_err(failed)?;
        let Some(found) = foreign.first().cloned() else { return Ok(()) };
        let renamed = || OpenError::Renamed { schema: schema.clone(), found: found.clone() };
        if !create {
            return Err(renamed());
        }
        let lock = self.statements.lock_migrations.query().bind(schema);
        lock.execute(&mut *connection).await.map_err(failed)?;
        for named in &foreign {
            let definitions = self.statements.renamed_functions.scalar().bind(schema).bind(named);
            let definitions: Vec<String> = definitions.fetch_all(&mut *connection).await.map_err(failed)?;
            for definition in definitions {
                // The definition is safe to execute, because it comes from the server's catalogue, for a function of
                // the store.
                let made = sqlx::raw_sql(AssertSqlSafe(definition)).execute(&mut *connection).await;
                made.map_err(|error| match open_error(&error) {
                    OpenError::Refused { .. } => renamed(),
                    error => error,
                })?;
            }
        }
        tracing::warn!(schema, found, "the schema was renamed: its functions were created again under the new name");
        Ok(())
    }

    /// Returns the number of migrations that were applied to the schema, or 0 if there is no schema.
    async fn schema_version(&self, connection: &mut PgConnection) -> Result<usize, OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let schema = &self.settings.schema;
        let exists = self.statements.has_migrations.scalar().bind(schema);
        let exists: bool = exists.fetch_one(&mut *connection).await.map_err(failed)?;
        if !exists {
            return Ok(0);
        }
        let found: i32 = self.statements.schema_version.scalar().fetch_one(connection).await.map_err(failed)?;
        match usize::try_from(found) {
            Ok(version) if version <= MIGRATIONS.len() => Ok(version),
            _ => Err(OpenError::TooNew { schema: schema.clone(), found, known: MIGRATIONS.len() as i32 }),
        }
    }

    fn options_for(&self, purpose: Purpose) -> PgConnectOptions {
        if self.pooled { self.options.clone() } else { self.options.clone().options(purpose.settings()) }
    }

    /// Opens a session, and returns it with the number of the history that the session reads. Behind a pooler, each
    /// transaction is checked against the history instead of the session; see [`begin`](Self::begin).
    pub(crate) async fn connect(&self, purpose: Purpose) -> Result<(u64, PgConnection), sqlx::Error> {
        let mut connection = self.options_for(purpose).connect().await?;
        let history = match self.pooled {
            true => self.history.number(),
            false => self.check(&mut connection, purpose).await?,
        };
        Ok((history, connection))
    }

    /// Checks a session against the known history.
    pub(crate) async fn check(
        &self,
        session: impl Executor<'_, Database = Postgres>,
        purpose: Purpose,
    ) -> Result<u64, sqlx::Error> {
        let (asked, sql) = self.question();
        let row = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(session).await?;
        self.history.check(asked, &row, purpose)
    }

    /// Returns the event to look for in a session's log, and the statement that identifies the log and looks for the
    /// event.
    fn question(&self) -> (Asked, String) {
        let asked = self.history.asked();
        let last = asked.1.map_or("NULL".to_owned(), |(position, _)| position.to_string());
        (asked, self.statements.session.as_str().replace("{last}", &last))
    }

    /// Begins a transaction. Behind a pooler, this method also applies the settings that sessions without a pooler have
    /// from the start, and checks that the server still has the log that this process knows (see `history.rs`). The
    /// caller ends the transaction with `COMMIT`, or drops the connection.
    pub(crate) async fn begin(&self, connection: &mut PgConnection, purpose: Purpose) -> Result<(), sqlx::Error> {
        if !self.pooled {
            return sqlx::raw_sql("BEGIN").execute(connection).await.map(drop);
        }
        let mut begin = match purpose {
            Purpose::Read => "BEGIN READ ONLY".to_owned(),
            Purpose::Write | Purpose::Notify => "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE".to_owned(),
        };
        let settings = SETTINGS.iter().map(|(name, value)| (*name, (*value).to_owned())).chain(purpose.settings());
        for (name, value) in settings.filter(|(name, _)| !name.starts_with("default_transaction_")) {
            begin += &format!("; SET LOCAL {name} = '{value}'");
        }
        self.begin_with(connection, &begin, purpose).await.map(drop)
    }

    /// Begins a transaction with the given statements, and checks the server against the history. Returns the number of
    /// the history.
    pub(crate) async fn begin_with(
        &self,
        connection: &mut PgConnection,
        begin: &str,
        purpose: Purpose,
    ) -> Result<u64, sqlx::Error> {
        let (asked, question) = self.question();
        // The text is safe, because no part of it comes from outside. All statements are sent in one message, so the
        // check costs no extra round trip.
        let begin = AssertSqlSafe(format!("{begin}; {question}"));
        let rows = sqlx::raw_sql(begin).fetch_all(&mut *connection).await.map_err(begin_error)?;
        self.history.check(asked, rows.last().ok_or(sqlx::Error::RowNotFound)?, purpose)
    }

    /// Returns a pool with the single connection that notifies other processes and receives their notifications. sqlx's
    /// listener requires a pool.
    pub(crate) fn listener(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(self.options_for(Purpose::Notify))
    }

    /// Returns the number of connections that serve reads.
    pub(crate) fn connections(&self) -> usize {
        self.settings.connections.max(1) as usize
    }

    /// Returns the channel on which commits are announced.
    pub(crate) fn channel(&self) -> String {
        format!("{}.events", self.settings.schema)
    }
}
