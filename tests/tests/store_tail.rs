//! The conformance suite for a store behind a tail, and tests of events that other processes write to that store.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::{EventStore, LogQuery, MemoryStore, Position, Tail};
use annals_conformance::store::{StoreUnderTest, suite};

struct Tailed(Arc<Tail>);

impl StoreUnderTest for Tailed {
    async fn fresh() -> Self {
        Self(Arc::new(Tail::follow(Arc::new(MemoryStore::new())).await.unwrap()))
    }
    fn store(&self) -> Arc<dyn EventStore> {
        self.0.clone()
    }
}

suite!(Tailed);

/// The tail reads a limited number of events at once. If a reader mistook the last of these events for the end of the
/// log, the reader would wait although the log has more events.
#[tokio::test]
async fn tail_reports_foreign_commits_before_reading_them() {
    const EVENTS: usize = 5_000;
    let store = Arc::new(MemoryStore::new());
    let tail = Tail::follow(store.clone()).await.unwrap();
    let event = |n: usize| annals::NewEvent {
        id: uuid::Uuid::new_v4(),
        type_name: "thing.happened".into(),
        schema_version: 1,
        data: n.to_string(),
        metadata: annals::Metadata::default(),
    };
    let append = annals::Append {
        stream: annals::StreamId::parse("thing-1").unwrap(),
        expected: annals::Expected::Any,
        events: (0..EVENTS).map(event).collect(),
    };
    store.commit(annals::Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    let mut seen = 0;
    let mut after = Position::START;
    loop {
        let page = tail.read_log(&LogQuery::all(), after, 2 * EVENTS).await.unwrap();
        (seen, after) = (seen + page.events.len(), page.next);
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, EVENTS);
}
