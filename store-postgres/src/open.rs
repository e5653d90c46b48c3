//! Connecting: which database, which schema, and how its connections are set up.

use std::{str::FromStr, time::Duration};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions},
};

use crate::{
    error::{OpenError, open_error},
    statements::{SCHEMA_DEFAULT, Statements, in_schema, is_schema_name},
};

/// In order; the table `migrations` counts how many of them a schema has had.
const MIGRATIONS: &[&str] =
    &[include_str!("migrations/0001_log_and_documents.sql"), include_str!("migrations/0002_operators_record_acts.sql")];

/// How long a read waits for one of the connections before it gives up.
const ACQUIRE_SECONDS_MAX: u64 = 30;
/// How long the server works on one group before it gives up: as behind somebody's lock on the whole table. The end of a
/// statement by this is an answer; that of a connection is none.
const GROUP_SECONDS_MAX: u64 = 30;
/// How long a group waits for a lock. The transactions of other processes end much sooner; what takes longer is somebody's open
/// transaction, and then those commits of the group that are not in its way must not wait with the one that is.
const LOCK_MS_MAX: u64 = 500;
/// Statements that each connection keeps prepared: all there are.
const STATEMENTS_MAX: usize = 64;

/// How to open a store, where the defaults do not do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The schema that holds the tables: lower-case letters, digits and `_`. It is created if it is missing. `?schema=NAME` in
    /// the URL says so too, and comes first.
    pub schema: String,
    /// How many connections serve reads. Three more write, tell other processes, and listen to them.
    pub connections: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { schema: SCHEMA_DEFAULT.into(), connections: 8 }
    }
}

/// The URL without its parameter `schema`, and that.
fn without_schema(url: &str) -> (String, Option<String>) {
    let Some((rest, query)) = url.split_once('?') else { return (url.to_owned(), None) };
    let (of_schema, others): (Vec<_>, Vec<_>) = query.split('&').partition(|pair| pair.starts_with("schema="));
    let schema = of_schema.last().map(|pair| pair["schema=".len()..].to_owned());
    let others = others.join("&");
    (if others.is_empty() { rest.to_owned() } else { format!("{rest}?{others}") }, schema)
}

/// Where the database is and how to connect to it.
#[derive(Debug)]
pub(crate) struct Database {
    options: PgConnectOptions,
    pub(crate) settings: Settings,
    pub(crate) statements: Statements,
    /// Whether the role is one of an operator, who may append nothing but acts.
    pub(crate) operates: bool,
}

impl Database {
    pub(crate) fn locate(url: &str, mut settings: Settings) -> Result<Self, OpenError> {
        let (url, schema) = without_schema(url);
        let url = url.as_str();
        settings.schema = schema.unwrap_or(settings.schema);
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(OpenError::Url { reason: "it does not start with postgres://".into() });
        }
        // The errors of this say which part is wrong, and repeat none of it.
        let options = PgConnectOptions::from_str(url).map_err(|error| OpenError::Url { reason: error.to_string() })?;
        if !is_schema_name(&settings.schema) {
            return Err(OpenError::Schema { schema: settings.schema });
        }
        let statements = Statements::new(&settings.schema);
        let options = options
            .statement_cache_capacity(STATEMENTS_MAX)
            // Every statement here is a few seeks in an index, also where a table is so new that the planner knows nothing of
            // it and would rather read it whole; and none is worth compiling.
            .options([
                ("enable_seqscan", "off"),
                ("enable_bitmapscan", "off"),
                ("enable_hashjoin", "off"),
                ("enable_mergejoin", "off"),
                ("jit", "off"),
            ])
            .disable_statement_logging();
        Ok(Self { options, settings, statements, operates: false })
    }

    /// Creates the schema or brings it to the newest version.
    ///
    /// Not without `create`: then there must be one of the newest version.
    pub(crate) async fn prepare(&mut self, create: bool) -> Result<(), OpenError> {
        let mut connection = self.options.connect().await.map_err(|error| open_error(&error))?;
        let prepared = self.prepare_with(&mut connection, create).await;
        // Not just dropped, which would let go of the session some time later. The outcome is known already.
        connection.close().await.ok();
        prepared
    }

    async fn prepare_with(&mut self, connection: &mut PgConnection, create: bool) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let standby: bool =
            sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut *connection).await.map_err(failed)?;
        if standby {
            return Err(OpenError::Standby);
        }
        // Most openings find nothing to do, and need neither a lock nor permission to see it.
        let schema = || self.settings.schema.clone();
        match self.schema_version(connection).await? {
            found if found == MIGRATIONS.len() => {}
            _ if create => self.migrate(connection).await?,
            0 => return Err(OpenError::Missing { schema: schema() }),
            found => {
                let (found, known) = (found as i32, MIGRATIONS.len() as i32);
                return Err(OpenError::Outdated { schema: schema(), found, known });
            }
        }
        let may_append: bool =
            sqlx::query_scalar(self.statements.may_append.clone()).fetch_one(&mut *connection).await.map_err(failed)?;
        self.operates = !may_append;
        sqlx::query(self.statements.advance.clone()).execute(connection).await.map(drop).map_err(failed)
    }

    async fn migrate(&self, connection: &mut PgConnection) -> Result<(), OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let schema = &self.settings.schema;
        // This connection is used for nothing else: whatever happens, its end is the end of the transaction.
        let mut transaction = connection.begin().await.map_err(failed)?;
        // Instances that start at once take turns: the second finds the work done.
        sqlx::query("SELECT pg_advisory_xact_lock(hashtextextended('annals: migrations of ' || $1, 0))")
            .bind(schema)
            .execute(&mut *transaction)
            .await
            .map_err(failed)?;
        let found = self.schema_version(&mut transaction).await?;
        if found == 0 {
            let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)")
                .bind(schema)
                .fetch_one(&mut *transaction)
                .await
                .map_err(failed)?;
            // Not with IF NOT EXISTS, which asks for permission to create schemas even where there is nothing to do. The name
            // is one that `is_schema_name` took.
            let create = if exists { String::new() } else { format!("CREATE SCHEMA \"{schema}\";") }
                + &format!(
                    "CREATE TABLE IF NOT EXISTS \"{schema}\".migrations \
                     (version int PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT clock_timestamp())"
                );
            sqlx::raw_sql(AssertSqlSafe(create)).execute(&mut *transaction).await.map_err(failed)?;
        }
        for (sql, version) in MIGRATIONS.iter().zip(1..).skip(found) {
            sqlx::raw_sql(in_schema(sql, schema)).execute(&mut *transaction).await.map_err(failed)?;
            let mark = format!("INSERT INTO \"{schema}\".migrations (version) VALUES ({version})");
            sqlx::raw_sql(AssertSqlSafe(mark)).execute(&mut *transaction).await.map_err(failed)?;
        }
        transaction.commit().await.map_err(failed)
    }

    /// How many migrations the schema has had; 0 where there is none.
    async fn schema_version(&self, connection: &mut PgConnection) -> Result<usize, OpenError> {
        let failed = |error: sqlx::Error| open_error(&error);
        let schema = &self.settings.schema;
        let exists: bool = sqlx::query_scalar(include_str!("sql/has_migrations.sql"))
            .bind(schema)
            .fetch_one(&mut *connection)
            .await
            .map_err(failed)?;
        if !exists {
            return Ok(0);
        }
        let found: i32 =
            sqlx::query_scalar(self.statements.schema_version.clone()).fetch_one(connection).await.map_err(failed)?;
        match usize::try_from(found) {
            Ok(version) if version <= MIGRATIONS.len() => Ok(version),
            _ => Err(OpenError::TooNew { schema: schema.clone(), found, known: MIGRATIONS.len() as i32 }),
        }
    }

    /// A connection for the writer.
    pub(crate) async fn writer(&self) -> Result<PgConnection, sqlx::Error> {
        let (statement, lock) = (format!("{GROUP_SECONDS_MAX}s"), format!("{LOCK_MS_MAX}ms"));
        let options = self.options.clone().options([
            ("statement_timeout", &*statement),
            ("lock_timeout", &*lock),
            ("default_transaction_isolation", "read committed"),
            ("plan_cache_mode", "force_generic_plan"),
        ]);
        options.connect().await
    }

    /// A connection that tells other processes. What it says is not worth a sync.
    pub(crate) async fn notifier(&self) -> Result<PgConnection, sqlx::Error> {
        self.options.clone().options([("synchronous_commit", "off")]).connect().await
    }

    /// The connection that listens to them; a pool because it reconnects by it.
    pub(crate) fn listener(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(self.options.clone())
    }

    /// Connections for reads. They are not asked for a sign of life before each use: a read that meets a dead one is repeated.
    pub(crate) fn readers(&self) -> PgPool {
        PgPoolOptions::new()
            .max_connections(self.settings.connections.max(1))
            .test_before_acquire(false)
            .acquire_timeout(Duration::from_secs(ACQUIRE_SECONDS_MAX))
            .connect_lazy_with(self.options.clone().options([("default_transaction_read_only", "on")]))
    }

    /// What commits are announced on.
    pub(crate) fn channel(&self) -> String {
        format!("{}.events", self.settings.schema)
    }
}
