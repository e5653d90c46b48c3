//! Whole streams and whole collections, which are read page by page.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream, stream::BoxStream};

use crate::{
    commit::Document,
    event::{Recorded, StreamId, Version},
    store::{EventStore, Scan, StoreError},
};

/// The number of events or documents per page, where nothing requires another number.
pub const PAGE: usize = 500;

/// Reads the events of a stream with versions above `after`, in order. Holds one page in memory.
///
/// ```
/// use annals::{EventStore, MemoryStore, StreamId, Version, pages};
/// use futures::TryStreamExt;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MemoryStore::new();
/// let stream = StreamId::new("order", "1")?;
/// let mut events = pages::history(&store, &stream, Version::START);
/// while let Some(event) = events.try_next().await? {
///     println!("{} {}", event.version, event.type_name);
/// }
/// # Ok(()) }
/// ```
pub fn history<'a>(
    store: &'a dyn EventStore,
    stream: &'a StreamId,
    after: Version,
) -> BoxStream<'a, Result<Recorded, StoreError>> {
    let pages = stream::try_unfold(Some(after), move |after| async move {
        let Some(after) = after else { return Ok(None) };
        let page = store.read_stream(stream, after, PAGE).await?;
        let next = page.last().filter(|_| page.len() == PAGE).map(|event| event.version);
        Ok(Some((stream::iter(page.into_iter().map(Ok)), next)))
    });
    pages.try_flatten().boxed()
}

/// Reads the documents of a collection with ids above `after`, in byte order. Start with `""`. Holds one page in
/// memory.
pub fn collection<'a>(
    store: &'a dyn EventStore,
    collection: &'a str,
    after: &str,
) -> BoxStream<'a, Result<Document, StoreError>> {
    let pages = stream::try_unfold(Arc::<str>::from(after), move |after| async move {
        let page = store.scan(collection, &Scan::After(after), PAGE).await?;
        let Some(last) = page.last() else { return Ok(None) };
        let next = last.key.id.clone();
        Ok(Some((stream::iter(page.into_iter().map(Ok)), next)))
    });
    pages.try_flatten().boxed()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use uuid::Uuid;

    use super::*;
    use crate::{
        commit::{Append, Commit, DocumentKey, Expected, Put},
        event::{Metadata, NewEvent},
        store::memory::MemoryStore,
    };

    fn event() -> NewEvent {
        let id = Uuid::new_v4();
        let data = "{}".into();
        NewEvent { id, type_name: "tally.added".into(), schema_version: 1, data, metadata: Metadata::of_request(id) }
    }

    fn put(number: usize) -> Put {
        let key = DocumentKey::new("numbers", format!("{number:04}"));
        Put { key, expected: Some(0), body: Some("{}".into()), due: None }
    }

    #[tokio::test]
    async fn all_pages_are_read_once_each() {
        for count in [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE] {
            let store = MemoryStore::new();
            let stream = StreamId::new("tally", "1").unwrap();
            let events = (0..count).map(|_| event()).collect();
            let append = Append { stream: stream.clone(), expected: Expected::Any, events };
            store.commit(Commit { appends: vec![append], puts: (0..count).map(put).collect() }).await.unwrap();
            let versions = history(&store, &stream, Version::START).map_ok(|event| event.version.0);
            assert_eq!(versions.try_collect::<Vec<_>>().await.unwrap(), (1..=count as i64).collect::<Vec<_>>());
            let ids = collection(&store, "numbers", "").map_ok(|document| document.key.id.parse::<usize>().unwrap());
            assert_eq!(ids.try_collect::<Vec<_>>().await.unwrap(), (0..count).collect::<Vec<_>>());
        }
    }
}
