//! A small domain for tests of the engine: a tally is a sum of amounts, and a handler copies tallies.

use std::{sync::Arc, time::Duration};

use annals::{
    Aggregate, Commit, DocumentKey, Event, EventStore, Handler, HandlerError, LogQuery, Message, Position, Repository,
    Scan, Work,
};
use async_trait::async_trait;
use uuid::Uuid;

/// What happens to a tally.
#[derive(Event, Clone, Debug, PartialEq)]
#[event(prefix = "tally")]
pub enum TallyEvent {
    /// An amount was added.
    Added {
        /// The amount that was added.
        amount: i64,
    },
    /// The tally was closed, and accepts no more amounts.
    Closed,
}

/// The commands for a tally.
#[derive(Clone, Debug, serde::Deserialize, utoipa::ToSchema)]
pub enum TallyCommand {
    /// Adds this amount.
    Add(i64),
    /// Adds one, this many times.
    AddOnes(usize),
    /// Closes the tally, which then accepts no more amounts.
    Close,
    /// Panics while deciding.
    Panic,
    /// Does nothing.
    Nothing,
}

/// The tally is closed.
#[derive(Debug, Clone, PartialEq, serde::Serialize, thiserror::Error)]
#[error("the tally is closed at {0}")]
pub struct Closed(pub i64);

/// A sum and the amounts that it consists of.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Tally {
    /// All amounts, in order.
    pub amounts: Vec<i64>,
    /// Whether the tally is closed.
    pub closed: bool,
}

impl Tally {
    /// The sum of the amounts.
    pub fn sum(&self) -> i64 {
        self.amounts.iter().sum()
    }
}

impl Aggregate for Tally {
    const CATEGORY: &'static str = "tally";
    type Command = TallyCommand;
    type Event = TallyEvent;
    type Refusal = Closed;

    fn decide(&self, command: &TallyCommand) -> Result<Vec<TallyEvent>, Closed> {
        match command {
            _ if self.closed => Err(Closed(self.sum())),
            TallyCommand::Add(amount) => Ok(vec![TallyEvent::Added { amount: *amount }]),
            TallyCommand::AddOnes(times) => Ok(vec![TallyEvent::Added { amount: 1 }; *times]),
            TallyCommand::Close => Ok(vec![TallyEvent::Closed]),
            TallyCommand::Panic => panic!("decided to panic"),
            TallyCommand::Nothing => Ok(vec![]),
        }
    }

    fn evolve(&mut self, event: &TallyEvent) {
        match event {
            TallyEvent::Added { amount } => self.amounts.push(*amount),
            TallyEvent::Closed => self.closed = true,
        }
    }
}

/// The document in which a [`Copier`] records the amounts that it has seen.
pub fn copied(id: &str) -> DocumentKey {
    DocumentKey::new("copied", id)
}

/// A handler that writes both documents and events: it appends each amount to a list in a document, and adds the amount
/// to the tally `copy.<id>` of category `copy`.
pub struct Copier {
    copies: Repository<Tally>,
}

impl Copier {
    /// Creates a copier that caches the tallies it writes.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { copies: Repository::with(store, "copy", 1_000) }
    }
}

#[async_trait]
impl Handler for Copier {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(TallyEvent::Added { amount }) = message.decode()? else { return Ok(()) };
        let id = message.subject.split_once('-').map_or("", |(_, id)| id);
        let mut seen: Vec<i64> = work.document(&copied(id)).await?.unwrap_or_default();
        seen.push(amount);
        work.put(&copied(id), &seen)?;
        work.execute(&self.copies, id, &TallyCommand::Add(amount)).await?;
        Ok(())
    }
}

/// Adds amounts to the tally with this id, one event per amount.
pub async fn add(store: &Arc<dyn EventStore>, id: &str, amounts: impl IntoIterator<Item = i64>) {
    let tallies = Repository::<Tally>::new(store.clone());
    for amount in amounts {
        let added = tallies.execute(id, TallyCommand::Add(amount), Uuid::new_v4()).await;
        added.unwrap_or_else(|error| panic!("adding {amount} to {id}: {error}"));
    }
}

/// Returns what the [`Copier`] has written for a tally: the list in the document, and the amounts of the copied tally.
pub async fn copies(store: &Arc<dyn EventStore>, id: &str) -> (Vec<i64>, Vec<i64>) {
    let found = document(store, &copied(id)).await;
    let copies = Repository::<Tally>::with(store.clone(), "copy", 1);
    let copy = copies.state(id).await.unwrap_or_else(|error| panic!("copy of {id}: {error}"));
    (found.map(|body| serde_json::from_str(&body).unwrap_or_default()).unwrap_or_default(), copy.amounts)
}

/// Returns the body of a document.
pub async fn document(store: &Arc<dyn EventStore>, key: &DocumentKey) -> Option<Arc<str>> {
    let found = store.documents(std::slice::from_ref(key)).await;
    let found = found.unwrap_or_else(|error| panic!("document {key}: {error}"));
    found.into_iter().next().flatten().map(|document| document.body)
}

/// Returns the ids and bodies of all documents in a collection.
pub async fn documents(store: &Arc<dyn EventStore>, collection: &str) -> Vec<(Arc<str>, Arc<str>)> {
    let found = store.scan(collection, &Scan::After("".into()), 10_000).await;
    let found = found.unwrap_or_else(|error| panic!("collection {collection}: {error}"));
    found.into_iter().map(|document| (document.key.id, document.body)).collect()
}

/// Returns the whole log.
pub async fn log(store: &Arc<dyn EventStore>) -> Vec<annals::Recorded> {
    let mut all = Vec::new();
    let mut after = Position::START;
    loop {
        let page = store.read_log(&LogQuery::all(), after, 1_000).await;
        let page = page.unwrap_or_else(|error| panic!("the log: {error}"));
        if page.next == after {
            return all;
        }
        after = page.next;
        all.extend(page.events.iter().map(|event| annals::Recorded::clone(event)));
    }
}

/// Polls `look` until it returns a value.
///
/// The work of the engine is visible only in its store, and documents do not announce their changes. Therefore this
/// function polls every few milliseconds, and fails after two minutes: on a busy machine, a step takes seconds.
pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = tokio::time::timeout(Duration::from_secs(120), async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    });
    found.await.unwrap_or_else(|_| panic!("never came about: {what}"))
}

/// Waits until every part is fine. Right after a start or a hand-over, a part may still be starting.
pub async fn becomes_fine(health: &annals::Health) {
    for _ in 0..3_000 {
        if health.is_fine() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not fine: {:?}", health.parts());
}

/// Returns whether a commit writes a document of this collection.
pub fn touches(commit: &Commit, collection: &str) -> bool {
    commit.puts.iter().any(|put| &*put.key.collection == collection)
}
