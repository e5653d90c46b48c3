//! `create` and `load_new` expect a new stream. If many of these hints are wrong at once, as after a kill, they cost
//! one more attempt in total, not one each.
#![allow(clippy::unwrap_used)]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use annals::{
    EventStore, Handler, HandlerError, Health, LogQuery, MemoryStore, Message, Repository, Subscription, Work,
};
use annals_tests::{
    bus::within,
    tally::{Tally, TallyCommand, add, eventually},
};
use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Messages of one batch.
const MESSAGES: usize = 100;
/// The first attempt with its wrong hints, one that reads the existing streams, and one to spare.
const ATTEMPTS_MAX: usize = 3;

fn marks(store: &Arc<dyn EventStore>) -> Repository<Tally> {
    Repository::with(store.clone(), "mark", 1_000)
}

/// The way in which a handler loads a stream that it believes to be new.
#[derive(Clone, Copy)]
enum Hint {
    Create,
    LoadNew,
}

/// Marks each tally, and counts its calls.
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

/// `wrong` of the streams exist already, spread over the batch.
async fn mark_all(hint: Hint, wrong: usize) {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let exists = |message: usize| message * wrong / MESSAGES != (message + 1) * wrong / MESSAGES;
    for message in 0..MESSAGES {
        add(&store, &message.to_string(), [1]).await;
        if exists(message) {
            marks(&store).execute(&message.to_string(), TallyCommand::Add(10), Uuid::new_v4()).await.unwrap();
        }
    }
    let (asked, shutdown) = (Arc::<AtomicUsize>::default(), CancellationToken::new());
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
async fn creating_what_exists_costs_one_more_attempt() {
    for wrong in [1, 7, 50, MESSAGES] {
        mark_all(Hint::Create, wrong).await;
    }
}

#[tokio::test]
async fn loading_as_new_what_exists_costs_one_more_attempt() {
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
