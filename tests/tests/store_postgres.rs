//! The conformance suite for the PostgreSQL store.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::sync::Arc;

use annals::EventStore;
use annals_conformance::store::{Durable, StoreUnderTest, suite};
use annals_postgres::PostgresStore;

use self::postgres::Schema;

struct Postgres {
    store: PostgresStore,
    schema: Schema,
}

impl Postgres {
    async fn connect(schema: Schema) -> Self {
        Self { store: schema.store().await, schema }
    }
}

impl StoreUnderTest for Postgres {
    async fn fresh() -> Self {
        Self::connect(Schema::new()).await
    }

    fn store(&self) -> Arc<dyn EventStore> {
        Arc::new(self.store.clone())
    }
}

impl Durable for Postgres {
    async fn reopen(self) -> Self {
        self.store.close().await.unwrap();
        Self::connect(self.schema).await
    }
}

suite!(Postgres, durable);
