//! A read model whose type only the service's own binary knows.

use std::sync::Arc;

use annals::{EventStore, Projection, ReadModel, read_model::Rebuild};
use async_trait::async_trait;

/// A read model of any type.
#[async_trait]
pub(crate) trait Model: Send + Sync {
    async fn begin(&self, store: Arc<dyn EventStore>) -> Result<Rebuild, String>;
}

#[async_trait]
impl<R: ReadModel> Model for Projection<R> {
    async fn begin(&self, store: Arc<dyn EventStore>) -> Result<Rebuild, String> {
        Self::begin(self, store).await
    }
}
