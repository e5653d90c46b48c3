//! `create` and `load_new` carry the hint that the stream is new. After a kill, many of these hints can be wrong at
//! once. All wrong hints together cost one extra attempt, not one extra attempt each.
#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use annals::{
    EventStore, Handler, HandlerError, Health, LogQuery, MemoryStore, Message, Repository, Subscription, Work,
};
use annals_conformance::bus::within;
use annals_tests::tally::{Tally, TallyCommand, add, eventually};
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The number of messages in one batch.
const MESSAGES: usize = 100;
/// One attempt with wrong hints, one attempt that reads the existing streams, and one in reserve.
const ATTEMPTS_MAX: usize = 3;

fn marks(store: &Arc<dyn EventStore>) -> Repository<Tally> {
    Repository::with(store.clone(), "mark", 1_000)
}

/// The method with which a handler uses a stream that it believes to be new.
#[derive(Clone, Copy)]
enum Hint {
    Create,
    LoadNew,
}

/// Adds a mark to each tally, and counts its own calls.
struct Marker {
    marks: Repository<Tally>,
    hint: Hint,
    asked: Arc<AtomicUsize>,
}

#[async_trait]
impl Handler for Marker {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let id = message.subject.split_once('-').map_or("", |(_, id)| id);
        let mark = TallyCommand::Add(1);
        match self.hint {
            Hint::Create => _ = work.create(&self.marks, id, &mark).await?,
            Hint::LoadNew => {
                work.load_new(&self.marks, id).await?;
                work.execute(&self.marks, id, &mark).await?;
            }
        }
        Ok(())
    }
}

/// Marks all tallies. For `wrong` of them, spread over the batch, the stream exists already, so the hint that the stream
/// is new is wrong.
async fn mark_all(hint: Hint, wrong: usize) {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let exists = |message: usize| message * wrong / MESSAGES != (message + 1) * wrong / MESSAGES;
    for message in 0..MESSAGES {
        add(&store, &message.to_string(), [1]).await;
        if exists(message) {
            marks(&store).execute(&message.to_string(), TallyCommand::Add(10), Uuid::new_v4()).await.unwrap();
        }
    }
    let asked = Arc::<AtomicUsize>::default();
    let shutdown = CancellationToken::new();
    let marker = Marker { marks: marks(&store), hint, asked: asked.clone() };
    let marker = Subscription::new("marker", marker).query(LogQuery::categories(["tally"]));
    let task = tokio::spawn(marker.run(store.clone(), Health::default(), shutdown.clone()));
    for message in 0..MESSAGES {
        let marked = async || (marks(&store).state(&message.to_string()).await.unwrap().sum() % 10 == 1).then_some(());
        eventually("it is marked", marked).await;
        let expected = if exists(message) { vec![10, 1] } else { vec![1] };
        assert_eq!(marks(&store).state(&message.to_string()).await.unwrap().amounts, expected);
    }
    shutdown.cancel();
    within("stop", task).await.unwrap().unwrap();
    let asked = asked.load(Ordering::SeqCst);
    assert!(asked <= ATTEMPTS_MAX * MESSAGES, "{wrong} wrong hints in {MESSAGES} messages: it was asked {asked} times");
}

#[tokio::test]
async fn wrong_create_hint_costs_one_more_attempt() {
    for wrong in [1, 7, 50, MESSAGES] {
        mark_all(Hint::Create, wrong).await;
    }
}

#[tokio::test]
async fn wrong_load_new_hint_costs_one_more_attempt() {
    for wrong in [1, 7, 50, MESSAGES] {
        mark_all(Hint::LoadNew, wrong).await;
    }
}

#[tokio::test]
async fn right_hints_cost_nothing() {
    for hint in [Hint::Create, Hint::LoadNew] {
        mark_all(hint, 0).await;
    }
}
