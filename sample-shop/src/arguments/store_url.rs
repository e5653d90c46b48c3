use std::{fmt, path::PathBuf, str::FromStr};

use annals_cli::quoted::is_scheme;
#[cfg(feature = "postgres")]
use annals_cli::quoted::without_password;

/// The store of the events.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// In the memory of this process. The events are lost when the process ends.
    Memory,
    /// In a SQLite file.
    Sqlite(PathBuf),
    /// In a PostgreSQL database. Holds the whole URL, with its password.
    #[cfg(feature = "postgres")]
    Postgres(String),
}

/// What is wrong with a store URL. Quotes only the scheme of the URL, since the rest may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// The scheme belongs to no store.
    #[error("no store has the scheme {0:?}; known are memory:, sqlite:PATH, postgres://…")]
    Scheme(String),
    /// The string has no scheme.
    #[error("the URL has no scheme; known are memory:, sqlite:PATH, postgres://…")]
    NoScheme,
    /// The URL has text after `memory:`.
    #[error("nothing may follow memory:")]
    Memory,
    /// The URL has no path after `sqlite:`.
    #[error("sqlite: needs the path of a file, such as sqlite:shop.db")]
    Path,
    /// The URL is `sqlite::memory:`, SQLite's own name for a database in memory. Here, `:memory:` would be the name of
    /// a file.
    #[error("a store in memory is memory:, without sqlite in front")]
    SqliteInMemory,
    /// The path contains a `?`. Other programs read parameters after the `?`; here, those would become part of the file
    /// name.
    #[error("sqlite: takes no parameters, and the path must not contain `?`")]
    SqliteParameters,
    /// The URL has no host after `postgres:`.
    #[error("postgres: needs a host, such as postgres://user@host/database")]
    Host,
    /// The store needs a feature that this build does not have.
    #[cfg(not(feature = "postgres"))]
    #[error(
        "this sample-shop was built without PostgreSQL; build it with the feature: cargo run --release -p sample-shop \
         --features postgres -- …"
    )]
    NoPostgres,
}

impl StoreUrl {
    /// Returns whether several processes may share the store.
    pub fn is_shared(&self) -> bool {
        !matches!(self, Self::Memory | Self::Sqlite(_))
    }

    /// The scheme: `memory`, `sqlite` or `postgres`.
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Sqlite(_) => "sqlite",
            #[cfg(feature = "postgres")]
            Self::Postgres(_) => "postgres",
        }
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once(':').ok_or(StoreUrlError::NoScheme)?;
        match scheme {
            "memory" if rest.is_empty() => Ok(Self::Memory),
            "memory" => Err(StoreUrlError::Memory),
            "sqlite" => match rest.strip_prefix("//").unwrap_or(rest) {
                "" => Err(StoreUrlError::Path),
                ":memory:" => Err(StoreUrlError::SqliteInMemory),
                path if path.contains('?') => Err(StoreUrlError::SqliteParameters),
                path => Ok(Self::Sqlite(path.into())),
            },
            "postgres" | "postgresql" => match rest.strip_prefix("//") {
                None | Some("") => Err(StoreUrlError::Host),
                #[cfg(feature = "postgres")]
                Some(_) => Ok(Self::Postgres(text.to_owned())),
                #[cfg(not(feature = "postgres"))]
                Some(_) => Err(StoreUrlError::NoPostgres),
            },
            other if is_scheme(other) => Err(StoreUrlError::Scheme(other.to_owned())),
            _ => Err(StoreUrlError::NoScheme),
        }
    }
}

/// Prints the URL without its password.
impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory:"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            #[cfg(feature = "postgres")]
            Self::Postgres(url) => f.write_str(&without_password(url)),
        }
    }
}

/// Same as [`Display`](fmt::Display), because debug output is often logged.
impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
