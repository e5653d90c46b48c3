//! The SQL statements. Each statement has its own file, and is rewritten for the schema of a store.

use sqlx::{
    AssertSqlSafe, FromRow, Postgres, SqlSafeStr, SqlStr,
    postgres::{PgArguments, PgRow},
    query::{Query, QueryAs, QueryScalar},
};

/// The schema that is named in the SQL files.
pub(crate) const SCHEMA_DEFAULT: &str = "annals";
/// The maximum length of a schema name in bytes: the longest name that PostgreSQL does not truncate, minus room for the
/// suffixes of constraints and channels.
const SCHEMA_BYTES_MAX: usize = 50;

/// Returns whether a store may use a schema with this name. Except for reserved words, allowed names need no quotes, so
/// that any tool accepts them.
pub(crate) fn is_schema_name(schema: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    schema.len() <= SCHEMA_BYTES_MAX
        && schema.bytes().all(plain)
        && schema.bytes().next().is_some_and(|first| !first.is_ascii_digit())
        && !schema.starts_with("pg_")
}

/// Rewrites a statement for this schema. In the SQL files, the name of the schema is always followed by a dot.
pub(crate) fn in_schema(sql: &'static str, schema: &str) -> SqlStr {
    if schema == SCHEMA_DEFAULT {
        return SqlStr::from_static(sql);
    }
    // The statement is safe, because `is_schema_name` has accepted the name.
    AssertSqlSafe(sql.replace("annals.", &format!("\"{schema}\"."))).into_sql_str().clone()
}

/// A statement in the form that is sent to the server.
#[derive(Debug)]
pub(crate) struct Statement {
    sql: SqlStr,
    /// Whether the connection keeps the statement prepared under a name.
    named: bool,
}

impl Statement {
    pub(crate) fn sql(&self) -> SqlStr {
        self.sql.clone()
    }

    pub(crate) fn as_str(&self) -> &str {
        self.sql.as_str()
    }

    pub(crate) fn query<'q>(&self) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(self.sql.clone()).persistent(self.named)
    }

    /// Creates a query for rows of several columns.
    pub(crate) fn rows<'q, R: for<'r> FromRow<'r, PgRow>>(&self) -> QueryAs<'q, Postgres, R, PgArguments> {
        sqlx::query_as(self.sql.clone()).persistent(self.named)
    }

    /// Creates a query for rows of one column.
    pub(crate) fn scalar<'q, T>(&self) -> QueryScalar<'q, Postgres, T, PgArguments>
    where
        (T,): for<'r> FromRow<'r, PgRow>,
    {
        sqlx::query_scalar(self.sql.clone()).persistent(self.named)
    }
}

macro_rules! statements {
    ($($name:ident),* $(,)?) => {
        /// All statements of a store.
        #[derive(Debug)]
        pub(crate) struct Statements {
            $(pub(crate) $name: Statement,)*
        }

        impl Statements {
            /// Creates the statements for a schema. Without `named`, connections do not keep the statements prepared.
            pub(crate) fn new(schema: &str, named: bool) -> Self {
                Self {
                    $($name: Statement {
                        sql: in_schema(include_str!(concat!("sql/", stringify!($name), ".sql")), schema),
                        named,
                    },)*
                }
            }
        }
    };
}
statements!(
    advance,
    append,
    append_events,
    append_one,
    attend,
    collections,
    dense_until,
    documents,
    foreign_schemas,
    has_migrations,
    has_schema,
    holders,
    lock_migrations,
    may_append,
    newest,
    next,
    notify,
    operate,
    read_log,
    read_log_where,
    read_stream,
    read_streams,
    renamed_functions,
    replay,
    restore_documents,
    restore_events,
    scan_after,
    scan_due,
    schema_version,
    server,
    session,
    settled_until,
    streams,
    waits_for,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schema_names_are_plain() {
        for name in ["annals", "shop_2", "_x", "user"] {
            assert!(is_schema_name(name), "{name}");
        }
        for name in ["", "2nd", "Shop", "a-b", "a\"b", "a.b", "pg_temp", "é", &"x".repeat(51)] {
            assert!(!is_schema_name(name), "{name}");
        }
    }

    #[test]
    fn statements_name_their_schema_everywhere() {
        let statements = Statements::new("shop", true);
        assert!(statements.append.as_str().contains("\"shop\".append_checked("));
        assert!(!statements.append.as_str().contains("annals."));
        assert!(Statements::new("annals", true).append.as_str().contains("annals.append_checked("));
    }
}
