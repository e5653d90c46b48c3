//! Opens an existing store by its URL. Opening never creates a store, and never migrates one to a newer version.

use std::{fmt, ops::RangeInclusive, path::PathBuf, str::FromStr, sync::Arc};

use annals::{
    Archive, EventStore, LogQuery, Position, Recorded, StoreError,
    archive::{Contents, Stored},
};
use annals_postgres::{PostgresStore, Replay};
use annals_sqlite::SqliteStore;
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use tokio::sync::mpsc;

use crate::{
    failure::Failure,
    quoted::{is_scheme, without_password},
};

/// The number of events per page, and the number of pages that are read ahead.
const PAGE: usize = 1_000;
const PAGES_AHEAD: usize = 2;

/// The URL of a store.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum StoreUrl {
    Sqlite(PathBuf),
    /// The whole URL, with its password.
    Postgres(String),
}

/// Why a store URL is invalid. Quotes only the scheme of the URL, since the rest may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreUrlError {
    #[error("unknown store scheme {0:?}: use sqlite:PATH or postgres://…")]
    Scheme(String),
    #[error("the URL has no scheme: use sqlite:PATH or postgres://…")]
    NoScheme,
    #[error("a memory store ends with its process: use sqlite:PATH or postgres://…")]
    Memory,
    #[error("sqlite: needs the path of a file, such as sqlite:shop.db")]
    Path,
    #[error("sqlite: takes no parameters, and the path must not contain `?`")]
    Parameters,
    #[error("postgres: needs a host, such as postgres://user@host/database")]
    Host,
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let (scheme, rest) = text.split_once(':').ok_or(StoreUrlError::NoScheme)?;
        let path = rest.strip_prefix("//").unwrap_or(rest);
        match scheme {
            "memory" => Err(StoreUrlError::Memory),
            "sqlite" if path.is_empty() => Err(StoreUrlError::Path),
            "sqlite" if path == ":memory:" => Err(StoreUrlError::Memory),
            "sqlite" if path.contains('?') => Err(StoreUrlError::Parameters),
            "sqlite" => Ok(Self::Sqlite(path.into())),
            "postgres" | "postgresql" if path.is_empty() || path == rest => Err(StoreUrlError::Host),
            "postgres" | "postgresql" => Ok(Self::Postgres(text.to_owned())),
            other if is_scheme(other) => Err(StoreUrlError::Scheme(other.to_owned())),
            _ => Err(StoreUrlError::NoScheme),
        }
    }
}

/// Prints the URL without its password.
impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
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

/// Whether opening creates a missing store and migrates an older one to the newest version.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Open {
    Existing,
    Migrate,
}

/// An open store.
#[derive(Clone)]
pub(crate) struct Store {
    pub url: StoreUrl,
    driver: Driver,
}

#[derive(Clone)]
enum Driver {
    Sqlite(SqliteStore),
    Postgres(PostgresStore),
}

/// Why a store was not opened.
pub(crate) enum OpenError {
    Missing,
    Outdated,
    /// The schema was renamed to this name.
    Renamed(String),
    Other(String),
}

impl Store {
    pub async fn open(url: &StoreUrl, schema: &str, open: Open) -> Result<Self, OpenError> {
        let driver = match url {
            StoreUrl::Sqlite(path) => {
                let opened = match open {
                    Open::Existing => SqliteStore::open_existing(path, annals_sqlite::Settings::default()).await,
                    Open::Migrate => SqliteStore::open(path).await,
                };
                opened.map(Driver::Sqlite).map_err(|error| match error {
                    annals_sqlite::OpenError::Missing { .. } => OpenError::Missing,
                    annals_sqlite::OpenError::Outdated { .. } => OpenError::Outdated,
                    other => OpenError::Other(other.to_string()),
                })
            }
            StoreUrl::Postgres(text) => {
                let settings = annals_postgres::Settings { schema: schema.to_owned(), connections: 3 };
                let opened = match open {
                    Open::Existing => PostgresStore::connect_existing(text, settings).await,
                    Open::Migrate => PostgresStore::connect(text, settings).await,
                };
                opened.map(Driver::Postgres).map_err(|error| match error {
                    annals_postgres::OpenError::Missing { .. } => OpenError::Missing,
                    annals_postgres::OpenError::Outdated { .. } => OpenError::Outdated,
                    renamed @ annals_postgres::OpenError::Renamed { .. } => {
                        OpenError::Renamed(format!("{url}: {renamed}"))
                    }
                    other => OpenError::Other(format!("{url}: {other}")),
                })
            }
        }?;
        Ok(Self { url: url.clone(), driver })
    }

    pub fn port(&self) -> Arc<dyn Archive> {
        match &self.driver {
            Driver::Sqlite(store) => Arc::new(store.clone()),
            Driver::Postgres(store) => Arc::new(store.clone()),
        }
    }

    /// Returns the events that match a query within a range of positions, in log order, up to the end of the log at the
    /// time of the call. Memory use is constant, whatever the number of events. The stream ends after an error.
    pub async fn log(
        &self,
        query: LogQuery,
        positions: RangeInclusive<i64>,
    ) -> Result<BoxStream<'static, Result<Arc<Recorded>, StoreError>>, StoreError> {
        let take = |events: &mut Vec<Arc<Recorded>>, event: Stored<'_>| events.push(Arc::new(event.recorded()));
        let batches = self.batches(query, positions, take).await?;
        Ok(batches.map_ok(|events| stream::iter(events).map(Ok)).try_flatten().boxed())
    }

    /// Returns the same events byte for byte, in batches that `take` fills. `take` runs concurrently with the consumer.
    pub async fn batches<B: Default + Send + 'static>(
        &self,
        query: LogQuery,
        positions: RangeInclusive<i64>,
        take: impl Fn(&mut B, Stored<'_>) + Send + Sync + 'static,
    ) -> Result<BoxStream<'static, Result<B, StoreError>>, StoreError> {
        let (first, last) = positions.into_inner();
        match &self.driver {
            Driver::Postgres(store) => {
                let replay = Replay::all().categories(query.categories).types(query.types);
                let replay = replay.positions(Position(first)..=Position(last));
                Ok(store.replay_stored(replay, take).boxed())
            }
            Driver::Sqlite(store) => {
                let last = last.min(store.status().await?.head.0);
                let start = Position(first.saturating_sub(1).max(0));
                Ok(pages(store.clone(), query, start, last, take))
            }
        }
    }

    /// Returns whether payloads and metadata are always JSON because the types of their columns accept nothing else.
    pub fn has_json_only(&self) -> bool {
        matches!(self.driver, Driver::Postgres(_))
    }

    pub async fn close(&self) -> Result<(), StoreError> {
        match &self.driver {
            Driver::Sqlite(store) => store.close().await,
            Driver::Postgres(store) => store.close().await,
        }
    }
}

/// Reads some pages ahead of the consumer.
fn pages<B: Default + Send + 'static>(
    store: SqliteStore,
    query: LogQuery,
    start: Position,
    last: i64,
    take: impl Fn(&mut B, Stored<'_>) + Send + Sync + 'static,
) -> BoxStream<'static, Result<B, StoreError>> {
    let (pages, taken) = mpsc::channel(PAGES_AHEAD);
    tokio::spawn(async move {
        let mut after = start;
        while after.0 < last {
            let mut batch = B::default();
            let within = |event: Stored<'_>| {
                if event.position.0 <= last {
                    take(&mut batch, event);
                }
            };
            let read = store.read_stored(&query, after, PAGE, within).await;
            let (page, goes_on) = match read {
                Ok(next) => (Ok(batch), next > std::mem::replace(&mut after, next)),
                Err(error) => (Err(error), false),
            };
            // The send fails once the consumer has dropped the stream.
            if pages.send(page).await.is_err() || !goes_on {
                break;
            }
        }
    });
    stream::unfold(taken, |mut taken| async move { taken.recv().await.map(|page| (page, taken)) }).boxed()
}

/// Writes events and documents unchanged, in one commit.
pub(crate) async fn restore(archive: &dyn Archive, contents: Contents) -> Result<(), Failure> {
    archive.restore(contents).await.map_err(|error| {
        Failure::new(format!(
            "the store rejected the data: {error}. If another process writes to the store, stop that process and run this \
             command again"
        ))
    })
}

impl OpenError {
    /// Returns the failure to print, with its remedy.
    pub fn into_failure(self, url: &StoreUrl, schema: &str) -> Failure {
        let place = match url {
            StoreUrl::Sqlite(_) => url.to_string(),
            StoreUrl::Postgres(_) => format!("schema {schema} of {url}"),
        };
        Failure::new(match self {
            Self::Missing => format!("{place}: there is no such store; `migrate` creates one"),
            Self::Outdated => format!("{place} has the schema of an older version; `migrate` upgrades the schema"),
            Self::Renamed(reason) | Self::Other(reason) => reason,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_password_is_shown() {
        for (url, shown) in [
            ("postgres://shop:secret@db:5432/shop?sslmode=require", "postgres://shop@db:5432/shop"),
            ("postgres://shop:se@cret@db/shop", "postgres://shop@db/shop"),
            ("postgres://shop@db/shop?password=secret", "postgres://shop@db/shop"),
            (
                "postgres://db/shop?password_file=/run/pg&password=secret&schema=shop",
                "postgres://db/shop?password_file=/run/pg&schema=shop",
            ),
            ("postgres://shop:a?schema=secret@db/shop", "postgres://…"),
            ("postgres://shop:a@b?schema=secret@db/shop", "postgres://…"),
            ("postgres://shop:secret", "postgres://…"),
        ] {
            let parsed: StoreUrl = url.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((parsed.to_string(), format!("{parsed:?}")), (shown.to_owned(), shown.to_owned()));
        }
        for url in ["postgre://shop:secret@db", "shop:secret@db", "postgres:secret"] {
            let error = url.parse::<StoreUrl>().map(drop).map_err(|error| error.to_string());
            assert!(error.is_err_and(|error| !error.contains("secret")), "{url}");
        }
    }
}
