//! The conformance suite for the memory store.

use std::sync::Arc;

use annals::{EventStore, MemoryStore};
use annals_conformance::store::{StoreUnderTest, suite};

struct Memory(MemoryStore);

impl StoreUnderTest for Memory {
    async fn fresh() -> Self {
        Self(MemoryStore::new())
    }
    fn store(&self) -> Arc<dyn EventStore> {
        Arc::new(self.0.clone())
    }
}

suite!(Memory);
