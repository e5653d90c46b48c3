//! A command is executed once, no matter how many events it has, and even if the answer to its commit is lost.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{collections::HashSet, sync::Arc};

use annals::{
    Aggregate, CommitError, DocumentKey, EventStore, MemoryStore, Metadata, Repository, Request, Snapshot, StreamId,
    Transaction, Version,
};
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{Closed, Tally, TallyCommand, TallyEvent},
};
use futures::future::join_all;
use uuid::Uuid;

use self::postgres::on_each_store;

/// The number of commands that `annals::repository` remembers.
const REMEMBERED_COMMANDS: usize = 1_024;

/// Returns the ids of a stream's events.
async fn ids(store: &Arc<dyn EventStore>, stream: &str) -> Vec<Uuid> {
    let events = store.read_stream(&StreamId::parse(stream).unwrap(), Version::START, 100_000).await.unwrap();
    events.into_iter().map(|event| event.id).collect()
}

/// Asserts that each event is in the stream once.
async fn assert_once(store: &Arc<dyn EventStore>, stream: &str, events: usize) {
    let ids = ids(store, stream).await;
    assert_eq!((ids.len(), ids.iter().collect::<HashSet<_>>().len()), (events, events), "{stream}");
}

#[tokio::test]
async fn repeated_command_is_found_for_any_number_of_events() {
    on_each_store(async |store| {
        for events in [1_000, 1_024, 1_025, 2_000, 9_999] {
            // Also runs a command whose `causation_id` is not the command's own id. The events of such a command do not
            // show that they belong together.
            for cause in [None, Some(Uuid::new_v4())] {
                let id = Uuid::new_v4();
                let name = Uuid::new_v4().to_string();
                let metadata = Metadata { causation_id: cause.unwrap_or(id), ..Metadata::of_request(id) };
                let request = Request::new(id, metadata);
                let writer = Repository::<Tally>::new(store.clone());
                let done = writer.execute(&name, TallyCommand::AddOnes(events), request.clone()).await.unwrap();
                assert!(!done.repeated);
                let restarted = Repository::<Tally>::new(store.clone());
                for repository in [writer, restarted] {
                    let again = repository.execute(&name, TallyCommand::AddOnes(events), request.clone()).await;
                    let again = again.unwrap();
                    assert_eq!((again.events.len(), again.repeated), (events, true), "{events} {cause:?}");
                }
                assert_once(&store, &format!("tally-{name}"), events).await;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn repeated_command_is_found_among_the_last_thousand_others() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let writer = Repository::<Tally>::new(store.clone());
    let first = Uuid::new_v4();
    writer.execute("a", TallyCommand::AddOnes(3), first).await.unwrap();
    for _ in 1..REMEMBERED_COMMANDS {
        writer.execute("a", TallyCommand::AddOnes(3), Uuid::new_v4()).await.unwrap();
    }
    for repository in [writer, Repository::new(store.clone())] {
        assert!(repository.execute("a", TallyCommand::AddOnes(3), first).await.unwrap().repeated);
    }
    assert_once(&store, "tally-a", 3 * REMEMBERED_COMMANDS).await;
}

/// A tally with snapshots.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Snapped(Tally);

impl Aggregate for Snapped {
    const CATEGORY: &'static str = "snapped";
    const SNAPSHOT: Option<Snapshot<Self>> = Some(Snapshot::every(10, 1));
    type Command = TallyCommand;
    type Event = TallyEvent;
    type Refusal = Closed;

    fn decide(&self, command: &TallyCommand) -> Result<Vec<TallyEvent>, Closed> {
        self.0.decide(command)
    }

    fn evolve(&mut self, event: &TallyEvent) {
        self.0.evolve(event);
    }
}

#[tokio::test]
async fn repeated_command_is_found_through_a_snapshot() {
    on_each_store(async |store| {
        let id = Uuid::new_v4();
        let snapped = Repository::<Snapped>::new(store.clone());
        snapped.execute("a", TallyCommand::AddOnes(3_000), id).await.unwrap();
        snapped.execute("a", TallyCommand::AddOnes(3_000), Uuid::new_v4()).await.unwrap();
        let found = store.documents(&[DocumentKey::new("snapshot.snapped", "a")]).await.unwrap();
        assert!(found[0].is_some(), "there must be a snapshot to start from");
        let restarted = Repository::<Snapped>::new(store.clone());
        assert!(restarted.execute("a", TallyCommand::AddOnes(3_000), id).await.unwrap().repeated);
        assert_once(&store, "snapped-a", 6_000).await;
    })
    .await;
}

#[tokio::test]
async fn large_command_with_a_lost_answer_is_executed_once() {
    on_each_store(async |store| {
        for faults in [
            &[Fault::AppliedUnknown][..],
            &[Fault::LostUnknown, Fault::AppliedUnknown],
            &[Fault::LostUnknown, Fault::LostUnknown, Fault::AppliedUnknown],
        ] {
            let faulty = FaultyStore::new(store.clone());
            for (number, fault) in (1..).zip(faults) {
                faulty.at(number, fault.clone());
            }
            let tallies = Repository::<Tally>::new(Arc::new(faulty.clone()));
            let name = Uuid::new_v4().to_string();
            let done = tallies.execute(&name, TallyCommand::AddOnes(2_000), Uuid::new_v4()).await.unwrap();
            assert_eq!((done.events.len(), done.repeated), (2_000, true));
            assert_eq!(faulty.commits(), faults.len() as u64, "a successful command is not committed again");
            assert_eq!(tallies.state(&name).await.unwrap().sum(), 2_000);
            assert_once(&store, &format!("tally-{name}"), 2_000).await;
        }
    })
    .await;
}

#[tokio::test]
async fn commands_in_a_commit_with_a_lost_answer_are_executed_once() {
    on_each_store(async |store| {
        let faulty = FaultyStore::new(store.clone());
        let gate = Gate::new();
        faulty.at(1, Fault::Hold(gate.clone()));
        faulty.when(|commit| commit.rows() > 1_024, Fault::AppliedUnknown);
        let tallies = Repository::<Tally>::new(Arc::new(faulty.clone()));
        let commands = (0..600).map(|_| {
            let tallies = tallies.clone();
            async move { tallies.execute("a", TallyCommand::AddOnes(4), Uuid::new_v4()).await }
        });
        let all = tokio::spawn(join_all(commands.collect::<Vec<_>>()));
        gate.reached().await;
        gate.open();
        for done in all.await.unwrap() {
            assert_eq!(done.unwrap().events.len(), 4);
        }
        assert_once(&store, "tally-a", 2_400).await;
    })
    .await;
}

/// The server is still busy with the first attempt when the second attempt starts, and other writers commit after both
/// attempts.
#[tokio::test]
async fn commit_that_succeeds_late_is_found_at_its_staged_version() {
    on_each_store(async |store| {
        let faulty = FaultyStore::new(store.clone());
        let [first, second] = [Gate::new(), Gate::new()];
        faulty.at(1, Fault::AppliedLater(first.clone())).at(2, Fault::Hold(second.clone()));
        let tallies = Repository::<Tally>::new(Arc::new(faulty.clone()));
        let done = tokio::spawn(async move { tallies.execute("a", TallyCommand::AddOnes(5), Uuid::new_v4()).await });
        second.reached().await;
        first.open();
        assert!(first.applied().await);
        let others = Repository::<Tally>::new(store.clone());
        let many = (0..2 * REMEMBERED_COMMANDS).map(|_| others.execute("a", TallyCommand::Add(1), Uuid::new_v4()));
        assert!(join_all(many).await.iter().all(Result::is_ok));
        second.open();
        let done = done.await.unwrap().unwrap();
        assert_eq!(done.events.len(), 5);
        assert_once(&store, "tally-a", 5 + 2 * REMEMBERED_COMMANDS).await;
    })
    .await;
}

/// Adds to two tallies in one transaction, as the documentation of transactions recommends.
async fn add_to_both(store: Arc<dyn EventStore>, id: Uuid) -> Result<u32, CommitError> {
    let tallies = Repository::<Tally>::new(store.clone());
    let mut transaction = Transaction::new(store, id);
    let mut attempts = 0;
    loop {
        attempts += 1;
        let mut work = transaction.begin();
        for name in ["left", "right"] {
            work.execute(&tallies, name, &TallyCommand::AddOnes(1_500)).await.unwrap();
        }
        if transaction.commit(work).await?.is_some() {
            return Ok(attempts);
        }
    }
}

#[tokio::test]
async fn transaction_with_a_lost_answer_is_executed_once() {
    on_each_store(async |store| {
        let faulty = FaultyStore::new(store.clone());
        faulty.at(1, Fault::AppliedUnknown).at(2, Fault::LostUnknown).at(3, Fault::AppliedUnknown);
        let port: Arc<dyn EventStore> = Arc::new(faulty.clone());
        let id = Uuid::new_v4();
        assert_eq!(add_to_both(port.clone(), id).await.unwrap(), 2);
        assert_eq!(add_to_both(port.clone(), Uuid::new_v4()).await.unwrap(), 3);
        // The caller repeats the whole transaction.
        add_to_both(port, id).await.unwrap();
        for stream in ["tally-left", "tally-right"] {
            assert_once(&store, stream, 3_000).await;
        }
    })
    .await;
}

/// Every attempt starts with an empty cache, like a process that was restarted.
#[tokio::test]
async fn repeated_transaction_with_several_large_commands_is_found_after_a_restart() {
    on_each_store(async |store| {
        let ids = [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()];
        for repeated in [false, true] {
            for id in ids {
                let tallies = Repository::<Tally>::new(store.clone());
                let mut transaction = Transaction::new(store.clone(), id);
                let mut work = transaction.begin();
                for name in ["a", "b", "a"] {
                    let done = work.execute(&tallies, name, &TallyCommand::AddOnes(2_500)).await.unwrap();
                    assert_eq!(done.repeated, repeated, "{name}");
                }
                assert!(transaction.commit(work).await.unwrap().is_some());
            }
        }
        assert_once(&store, "tally-a", 15_000).await;
        assert_once(&store, "tally-b", 7_500).await;
    })
    .await;
}

#[tokio::test]
async fn transaction_that_succeeds_late_is_found_at_its_staged_version() {
    on_each_store(async |store| {
        let faulty = FaultyStore::new(store.clone());
        let [first, second] = [Gate::new(), Gate::new()];
        faulty.at(1, Fault::AppliedLater(first.clone())).at(2, Fault::Hold(second.clone()));
        let added = tokio::spawn(add_to_both(Arc::new(faulty.clone()), Uuid::new_v4()));
        second.reached().await;
        first.open();
        assert!(first.applied().await);
        let others = Repository::<Tally>::new(store.clone());
        let many = (0..2 * REMEMBERED_COMMANDS).map(|_| others.execute("left", TallyCommand::Add(1), Uuid::new_v4()));
        assert!(join_all(many).await.iter().all(Result::is_ok));
        second.open();
        assert_eq!(added.await.unwrap().unwrap(), 3);
        assert_once(&store, "tally-right", 1_500).await;
        assert_once(&store, "tally-left", 1_500 + 2 * REMEMBERED_COMMANDS).await;
    })
    .await;
}

#[tokio::test]
async fn transaction_of_only_documents_reports_an_unknown_outcome() {
    let faulty = FaultyStore::new(Arc::new(MemoryStore::new()));
    faulty.at(1, Fault::AppliedUnknown);
    let mut transaction = Transaction::new(Arc::new(faulty), Uuid::new_v4());
    let mut work = transaction.begin();
    work.put(&DocumentKey::new("counter", "visits"), &1).unwrap();
    assert!(matches!(transaction.commit(work).await, Err(CommitError::Unknown(_))));
}

/// A commit with several commands is lost. One of its commands was also sent to another process, whose commit happens
/// to have the same version as the lost commit.
#[tokio::test]
async fn command_repeated_elsewhere_does_not_confirm_the_rest_of_a_lost_commit() {
    on_each_store(async |store| {
        let faulty = FaultyStore::new(store.clone());
        let [first, second] = [Gate::new(), Gate::new()];
        // The second commit contains two commands and is lost.
        faulty.at(1, Fault::Hold(first.clone())).at(2, Fault::LostUnknown).at(3, Fault::Hold(second.clone()));
        let tallies = Repository::<Tally>::new(Arc::new(faulty.clone()));
        let send = |amount: i64, id: Uuid| {
            let tallies = tallies.clone();
            tokio::spawn(async move { tallies.execute("a", TallyCommand::Add(amount), id).await })
        };
        let opening = send(1, Uuid::new_v4());
        first.reached().await;
        let twice = Uuid::new_v4();
        let [lost, also_elsewhere] = [send(2, Uuid::new_v4()), send(3, twice)];
        // Both commands enter the queue of the aggregate before the queue continues.
        tokio::task::yield_now().await;
        first.open();
        opening.await.unwrap().unwrap();
        faulty.committed(2).await;
        let elsewhere = Repository::<Tally>::new(store.clone());
        elsewhere.execute("a", TallyCommand::Add(4), Uuid::new_v4()).await.unwrap();
        elsewhere.execute("a", TallyCommand::Add(3), twice).await.unwrap();
        second.open();
        for done in [lost, also_elsewhere] {
            done.await.unwrap().unwrap();
        }
        let mut amounts = Repository::<Tally>::new(store.clone()).state("a").await.unwrap().amounts;
        amounts.sort_unstable();
        assert_eq!(amounts, [1, 2, 3, 4]);
    })
    .await;
}
