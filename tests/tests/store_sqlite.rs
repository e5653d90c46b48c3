//! The conformance suite for the SQLite store.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::EventStore;
use annals_conformance::store::{Durable, StoreUnderTest, suite};
use annals_sqlite::SqliteStore;
use tempfile::TempDir;

struct Sqlite {
    store: SqliteStore,
    folder: TempDir,
}

impl Sqlite {
    async fn open(folder: TempDir) -> Self {
        Self { store: SqliteStore::open(folder.path().join("annals.db")).await.unwrap(), folder }
    }
}

impl StoreUnderTest for Sqlite {
    async fn fresh() -> Self {
        Self::open(tempfile::tempdir().unwrap()).await
    }
    fn store(&self) -> Arc<dyn EventStore> {
        Arc::new(self.store.clone())
    }
}

impl Durable for Sqlite {
    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        Self::open(self.folder).await
    }
}

suite!(Sqlite, durable);
