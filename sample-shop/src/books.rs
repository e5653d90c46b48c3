//! The totals of a service, computed by folding the events of the service. The shop calls them the books of the service.

use std::{marker::PhantomData, sync::Arc};

use annals::{Answer, DocumentKey, EventStore, LogQuery, Position, Recorded, StepError, Work, event::DecodeError};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The number of events per read.
const PAGE: usize = 2_000;

/// The totals of one service. Each service counts its own events.
pub trait Books: Default + Serialize + DeserializeOwned + Send + Sync {
    /// Adds one event. Events of other categories change nothing.
    fn book(&mut self, event: &Recorded) -> Result<(), DecodeError>;
}

/// Keeps the books of one service, from that service's own log. The books are updated only on request.
pub struct Bookkeeper<B> {
    store: Arc<dyn EventStore>,
    key: DocumentKey,
    query: LogQuery,
    books: PhantomData<fn() -> B>,
}

/// The books up to a position, as they are stored.
#[derive(Default, Serialize, Deserialize)]
struct BooksUpTo<B> {
    position: i64,
    books: B,
}

impl<B: Books> Bookkeeper<B> {
    /// Returns the bookkeeper of the service with this name, whose events belong to these categories.
    pub fn new(service: &str, categories: &[&str], store: Arc<dyn EventStore>) -> Self {
        let query = LogQuery::categories(categories.iter().copied());
        Self { store, key: DocumentKey::new("books", service), query, books: PhantomData }
    }

    /// Returns the books, including every event that was committed before the call.
    pub async fn books(&self, work: &mut Work) -> Result<B, StepError> {
        let mut kept: BooksUpTo<B> = work.document(&self.key).await?.unwrap_or_default();
        loop {
            let page =
                self.store.read_log(&self.query, Position(kept.position), PAGE).await.map_err(StepError::Store)?;
            for event in &page.events {
                kept.books.book(event).map_err(|error| StepError::Failed(error.to_string()))?;
            }
            if page.next.0 > kept.position {
                kept.position = page.next.0;
                continue;
            }
            // A committed event stays invisible while another writer still holds an earlier position.
            let status = self.store.status().await.map_err(StepError::Store)?;
            if let Some(reason) = status.waits_for {
                return Err(StepError::Failed(format!("the log cannot be read to its end: {reason}")));
            }
            if status.head.0 <= kept.position {
                break;
            }
        }
        work.put(&self.key, &kept)?;
        Ok(kept.books)
    }

    /// Returns these books as the answer to a saga's step.
    pub async fn count(&self, work: &mut Work) -> Result<Answer, StepError> {
        let books = self.books(work).await?;
        let counted = serde_json::to_value(books).map_err(|error| StepError::Failed(error.to_string()))?;
        Ok(Answer::Done(counted))
    }
}
