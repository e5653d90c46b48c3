//! A read model whose type only the service's own binary knows.

use std::sync::Arc;

use annals::{
    EventStore, Projection, ReadModel,
    read_model::{Rebuild, RebuildError},
};
use async_trait::async_trait;

/// A read model of any type.
#[async_trait]
pub(crate) trait Model: Send + Sync {
    async fn begin(&self, store: Arc<dyn EventStore>) -> Result<Rebuild, RebuildError>;
}

#[async_trait]
impl<R: ReadModel> Model for Projection<R> {
    async fn begin(&self, store: Arc<dyn EventStore>) -> Result<Rebuild, RebuildError> {
        Self::begin(self, store).await
    }
}
