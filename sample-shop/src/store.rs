//! Opens the store that a URL names.

use std::sync::Arc;

use annals::{EventStore, MemoryStore};
#[cfg(feature = "postgres")]
use annals_postgres::PostgresStore;
use annals_sqlite::SqliteStore;

use crate::{Failure, arguments::StoreUrl};

/// An open store.
pub enum Store {
    Memory(Arc<MemoryStore>),
    Sqlite(SqliteStore),
    #[cfg(feature = "postgres")]
    Postgres(PostgresStore),
}

impl Store {
    /// Opens the store, and creates it if it does not exist.
    pub async fn open(url: &StoreUrl) -> Result<Self, Failure> {
        Ok(match url {
            StoreUrl::Memory => Self::Memory(Arc::new(MemoryStore::new())),
            StoreUrl::Sqlite(path) => Self::Sqlite(SqliteStore::open(path).await?),
            #[cfg(feature = "postgres")]
            StoreUrl::Postgres(url) => {
                Self::Postgres(PostgresStore::connect(url, annals_postgres::Settings::default()).await?)
            }
        })
    }

    /// Returns the store as an [`EventStore`].
    pub fn port(&self) -> Arc<dyn EventStore> {
        match self {
            Self::Memory(store) => store.clone(),
            Self::Sqlite(store) => Arc::new(store.clone()),
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => Arc::new(store.clone()),
        }
    }

    /// Closes the store.
    pub async fn close(&self) -> Result<(), Failure> {
        match self {
            Self::Memory(_) => {}
            Self::Sqlite(store) => store.close().await?,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.close().await?,
        }
        Ok(())
    }
}
