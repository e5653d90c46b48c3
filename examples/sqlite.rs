//! Step 2 of 8. The events are in an SQLite file, so the next run continues where this run ends.
//!
//!     cargo run -p annals-examples --example sqlite -- visits.db

use std::{convert::Infallible, env, error::Error, sync::Arc};

use annals::{Aggregate, Event, EventStore, LogQuery, Position, Repository};
use annals_sqlite::SqliteStore;
use uuid::Uuid;

#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "page")]
enum PageEvent {
    Visited { by: String },
}

/// A web page that counts its visits.
#[derive(Clone, Default)]
struct Page {
    visits: u64,
}

impl Aggregate for Page {
    const CATEGORY: &'static str = "page";
    type Command = String;
    type Event = PageEvent;
    type Refusal = Infallible;

    fn decide(&self, by: &String) -> Result<Vec<PageEvent>, Infallible> {
        Ok(vec![PageEvent::Visited { by: by.clone() }])
    }

    fn evolve(&mut self, _: &PageEvent) {
        self.visits += 1;
    }
}

// ANCHOR: run
#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args().nth(1).unwrap_or_else(|| "visits.db".to_owned());
    let store = SqliteStore::open(&path).await?;
    let pages = Repository::<Page>::new(Arc::new(store.clone()));

    pages.execute("home", "ada".to_owned(), Uuid::new_v4()).await?;
    println!("{} visits in {path}", pages.state("home").await?.visits);

    let log = store.read_log(&LogQuery::all(), Position::START, 100).await?;
    for event in log.events {
        println!("{} {} v{} {} {}", event.position.0, event.stream, event.version.0, event.type_name, event.data);
    }
    // Waits until every accepted commit is in the file.
    store.close().await?;
    Ok(())
}
// ANCHOR_END: run
