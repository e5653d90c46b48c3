//! Reads the checkpoints of relays and groups.

use std::sync::Arc;

use annals::{Archive, Document, DocumentKey, checkpoint::CHECKPOINTS};

use crate::failure::Failure;

/// Returns the document of a checkpoint.
pub(super) async fn checkpoint(archive: &Arc<dyn Archive>, id: &str) -> Result<Option<Document>, Failure> {
    let key = DocumentKey::new(CHECKPOINTS, id);
    Ok(archive.documents(&[key]).await?.into_iter().next().flatten())
}
