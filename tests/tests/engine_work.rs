//! Work and transactions change many streams and documents, either all of them or none.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use annals::{
    CommitError, DocumentKey, EventStore, Handler, HandlerError, Health, LogQuery, MemoryStore, Message, Repository,
    Subscription, Transaction, Work,
};
use annals_conformance::bus::within;
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{Tally, TallyCommand, TallyEvent, add, document, eventually, log},
};
use async_trait::async_trait;
use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

fn memory() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

fn tallies(store: &Arc<dyn EventStore>) -> Repository<Tally> {
    Repository::new(store.clone())
}

const COUNTER: (&str, &str) = ("counter", "one");

fn counter() -> DocumentKey {
    DocumentKey::new(COUNTER.0, COUNTER.1)
}

async fn count_up(store: &Arc<dyn EventStore>) -> Result<(), CommitError> {
    let counted = Transaction::new(store.clone(), Uuid::new_v4()).run(|mut work| async {
        let count: u64 = work.document(&counter()).await.unwrap().unwrap_or(0);
        work.put(&counter(), &(count + 1)).unwrap();
        Ok::<_, CommitError>((work, ()))
    });
    counted.await.map(drop)
}

async fn counts_exactly(store: Arc<dyn EventStore>, tasks: u64, each: u64) {
    let counting = (0..tasks).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < each {
                match count_up(&store).await {
                    Ok(()) => done += 1,
                    // The commit failed after many attempts, so nothing was changed.
                    Err(CommitError::DocumentConflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
    });
    for counted in join_all(counting).await {
        counted.unwrap();
    }
    assert_eq!(*document(&store, &counter()).await.unwrap(), *(tasks * each).to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counter_is_exact_under_contention() {
    counts_exactly(memory(), 16, 50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counter_is_exact_under_contention_in_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    counts_exactly(Arc::new(store.clone()), 8, 10).await;
    store.close().await.unwrap();
}

#[tokio::test]
async fn unknown_outcome_of_only_documents_is_returned_to_the_caller() {
    let faulty = FaultyStore::new(memory());
    faulty.at(1, Fault::AppliedUnknown);
    let store: Arc<dyn EventStore> = Arc::new(faulty);
    assert!(matches!(count_up(&store).await, Err(CommitError::Unknown(_))));
    assert_eq!(*document(&store, &counter()).await.unwrap(), *"1");
}

/// Moves an amount between two tallies, in one transaction.
async fn transfer(store: &Arc<dyn EventStore>, id: Uuid, from: &str, to: &str, amount: i64) -> bool {
    let tallies = tallies(store);
    let moved = Transaction::new(store.clone(), id).run(|mut work| async {
        let taken = work.execute(&tallies, from, &TallyCommand::Add(-amount)).await.unwrap();
        let given = work.execute(&tallies, to, &TallyCommand::Add(amount)).await.unwrap();
        assert_eq!(taken.repeated, given.repeated, "one half was carried out without the other");
        Ok::<_, CommitError>((work, taken.repeated))
    });
    moved.await.unwrap().0
}

/// Moves an amount from tally `a` to tally `b`, and begins each attempt of the transaction itself instead of calling
/// `Transaction::run`. Returns whether the last attempt found the events of an earlier attempt.
async fn transfer_in_attempts(store: &Arc<dyn EventStore>, id: Uuid, amount: i64) -> bool {
    let tallies = tallies(store);
    let mut transaction = Transaction::new(store.clone(), id);
    loop {
        let mut work = transaction.begin();
        let taken = work.execute(&tallies, "a", &TallyCommand::Add(-amount)).await.unwrap();
        let given = work.execute(&tallies, "b", &TallyCommand::Add(amount)).await.unwrap();
        assert_eq!(taken.repeated, given.repeated, "one half was carried out without the other");
        if transaction.commit(work).await.unwrap().is_some() {
            return taken.repeated;
        }
    }
}

#[tokio::test]
async fn outcome_that_became_known_is_that_of_the_committed_attempt() {
    for fault in [Fault::AppliedUnknown, Fault::LostUnknown] {
        let faulty = FaultyStore::new(memory());
        faulty.at(1, fault);
        let store: Arc<dyn EventStore> = Arc::new(faulty);
        let id = Uuid::new_v4();
        assert!(!transfer(&store, id, "a", "b", 5).await);
        assert!(transfer(&store, id, "a", "b", 5).await);
        assert_eq!(tallies(&store).state("a").await.unwrap().amounts, [-5]);
        assert_eq!(tallies(&store).state("b").await.unwrap().amounts, [5]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_one_commit_change_together_under_conflict() {
    let store = memory();
    let moving = (0..6).map(|task: usize| {
        let store = store.clone();
        tokio::spawn(async move {
            let ids = ["a", "b", "c"];
            for step in 0..20 {
                transfer(&store, Uuid::new_v4(), ids[(task + step) % 3], ids[(task + 2 * step + 1) % 3], 5).await;
            }
        })
    });
    for moved in join_all(moving).await {
        moved.unwrap();
    }
    let mut sum = 0;
    for id in ["a", "b", "c"] {
        sum += tallies(&store).state(id).await.unwrap().sum();
    }
    assert_eq!((sum, log(&store).await.len()), (0, 6 * 20 * 2));
}

#[tokio::test]
async fn unknown_outcomes_and_repeats_transfer_once() {
    for fault in [Fault::AppliedUnknown, Fault::LostUnknown] {
        let faulty = FaultyStore::new(memory());
        faulty.at(1, fault.clone());
        let store: Arc<dyn EventStore> = Arc::new(faulty);
        let id = Uuid::new_v4();
        assert_eq!(transfer_in_attempts(&store, id, 5).await, matches!(fault, Fault::AppliedUnknown));
        assert!(transfer_in_attempts(&store, id, 5).await);
        assert!(transfer(&store, id, "a", "b", 5).await);
        assert_eq!(tallies(&store).state("a").await.unwrap().amounts, [-5]);
        assert_eq!(tallies(&store).state("b").await.unwrap().amounts, [5]);
    }
}

/// The first attempt is committed although its answer is lost. By the second attempt, the balance is too low: the
/// transaction must report the first attempt, not the refusal.
#[tokio::test]
async fn transaction_that_was_committed_is_not_refused_by_its_second_attempt() {
    let faulty = FaultyStore::new(memory());
    faulty.at(1, Fault::AppliedUnknown);
    let store: Arc<dyn EventStore> = Arc::new(faulty);
    let tallies = tallies(&store);
    let tallies = &tallies;
    let mut attempts = 0;
    let spent = Transaction::new(store.clone(), Uuid::new_v4()).run(|mut work| {
        attempts += 1;
        let attempt = attempts;
        async move {
            let spent: u64 = work.document(&counter()).await.unwrap().unwrap_or(0);
            if spent > 0 {
                return Err(CommitError::Invalid("it is spent".into()));
            }
            work.put(&counter(), &1).unwrap();
            work.execute(tallies, "a", &TallyCommand::Add(1)).await.unwrap();
            Ok((work, attempt))
        }
    });
    let (attempt, committed) = spent.await.unwrap();
    assert_eq!((attempt, attempts), (1, 2));
    assert_eq!(committed.position, log(&store).await[0].position);
    let refused = Transaction::new(store.clone(), Uuid::new_v4())
        .run(async |_| Err::<(Work, ()), _>(CommitError::Invalid("never".into())));
    assert!(matches!(refused.await, Err(CommitError::Invalid(reason)) if reason == "never"));
}

#[tokio::test]
async fn two_commands_of_one_work_to_one_stream_are_both_executed() {
    let store = memory();
    let tallies = tallies(&store);
    let id = Uuid::new_v4();
    for repeated in [false, true] {
        let mut transaction = Transaction::new(store.clone(), id);
        let mut work = transaction.begin();
        for amount in 1..=3 {
            let added = work.execute(&tallies, "a", &TallyCommand::Add(amount)).await.unwrap();
            assert_eq!((added.events, added.repeated), (vec![TallyEvent::Added { amount }], repeated));
        }
        assert_eq!(work.load(&tallies, "a").await.unwrap().amounts, [1, 2, 3]);
        transaction.commit(work).await.unwrap().unwrap();
    }
    assert_eq!(tallies.state("a").await.unwrap().amounts, [1, 2, 3]);
}

#[tokio::test]
async fn create_on_an_existing_stream_falls_back_to_reading_it() {
    let store = memory();
    add(&store, "a", 1..=3).await;
    let tallies = tallies(&store);
    let mut transaction = Transaction::new(store.clone(), Uuid::new_v4());
    let mut attempts = 0;
    loop {
        attempts += 1;
        let mut work = transaction.begin();
        work.create(&tallies, "a", &TallyCommand::Add(4)).await.unwrap();
        if transaction.commit(work).await.unwrap().is_some() {
            break;
        }
    }
    assert_eq!(tallies.state("a").await.unwrap().amounts, [1, 2, 3, 4]);
    assert!(attempts <= 2, "{attempts}");
}

/// Stages changes to streams and documents, and then fails if the amount is negative.
struct Half(Repository<Tally>);

#[async_trait]
impl Handler for Half {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(TallyEvent::Added { amount }) = message.decode()? else { return Ok(()) };
        let sum: i64 = work.document(&counter()).await?.unwrap_or(0);
        work.put(&counter(), &(sum + amount))?;
        work.put(&DocumentKey::new("unread", "one"), &amount)?;
        work.execute(&self.0, "half", &TallyCommand::Add(amount)).await?;
        if amount < 0 {
            work.remove(&DocumentKey::new("unread", "one"));
            work.execute(&self.0, "half", &TallyCommand::Add(amount * 10)).await?;
            if amount == -3 {
                work.execute(&self.0, "half", &TallyCommand::Panic).await?;
            }
            return Err("half done".into());
        }
        work.execute(&self.0, "other", &TallyCommand::Add(amount)).await?;
        Ok(())
    }
}

#[tokio::test]
async fn failed_message_leaves_no_work_in_the_batch() {
    let store = memory();
    let halves = || Repository::<Tally>::with(store.clone(), "half", 10);
    for (index, amount) in [1, -2, 3, -3, 5, -6, 7].into_iter().enumerate() {
        add(&store, &format!("{index}"), [amount]).await;
    }
    let shutdown = CancellationToken::new();
    let half = Subscription::new("half", Half(halves())).query(LogQuery::categories(["tally"]));
    let task = tokio::spawn(half.run(store.clone(), Health::default(), shutdown.clone()));
    eventually("all messages are handled", async || (halves().state("other").await.unwrap().sum() == 16).then_some(()))
        .await;
    assert_eq!(halves().state("half").await.unwrap().amounts, [1, 3, 5, 7]);
    assert_eq!(*document(&store, &counter()).await.unwrap(), *"16");
    assert_eq!(*document(&store, &DocumentKey::new("unread", "one")).await.unwrap(), *"7");
    shutdown.cancel();
    within("stop", task).await.unwrap().unwrap();
}
