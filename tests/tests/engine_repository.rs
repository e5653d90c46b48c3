//! Repositories execute every command once and in order, no matter what other writers and the store do.
#![allow(clippy::unwrap_used)]

use std::{convert::Infallible, sync::Arc};

use annals::{
    Aggregate, Append, Commit, DocumentKey, Event, EventStore, ExecuteError, Expected, MemoryStore, Metadata, NewEvent,
    Put, Repository, Snapshot, StreamId, WorkError,
};
use annals_conformance::bus::within;
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{Closed, Tally, TallyCommand, TallyEvent, document, log},
};
use futures::{FutureExt, future::join_all};
use uuid::Uuid;

fn memory() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

fn tallies(store: &Arc<dyn EventStore>) -> Repository<Tally> {
    Repository::new(store.clone())
}

async fn sixty_four_tasks(store: Arc<dyn EventStore>, each: i64) {
    let one = tallies(&store);
    let two = tallies(&store);
    let tasks = (0..64).map(|task| {
        // Most tasks share one repository, and some write through another repository.
        let tallies = if task % 8 == 0 { two.clone() } else { one.clone() };
        tokio::spawn(async move {
            for step in 0..each {
                let added =
                    tallies.execute("hot", TallyCommand::Add(task * 1_000 + step), Uuid::new_v4()).await.unwrap();
                assert_eq!(added.events, [TallyEvent::Added { amount: task * 1_000 + step }]);
                assert!(!added.repeated);
            }
        })
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
    let amounts = one.state("hot").await.unwrap().amounts;
    assert_eq!(amounts.len() as i64, 64 * each);
    for task in 0..64 {
        let of_task: Vec<i64> = amounts.iter().copied().filter(|amount| amount / 1_000 == task).collect();
        assert_eq!(of_task, (0..each).map(|step| task * 1_000 + step).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_tasks_count_exactly_on_one_aggregate() {
    sixty_four_tasks(memory(), 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_tasks_count_exactly_on_one_aggregate_in_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("annals.db")).await.unwrap();
    sixty_four_tasks(Arc::new(store.clone()), 10).await;
    store.close().await.unwrap();
}

#[tokio::test]
async fn repeated_command_returns_its_first_outcome() {
    let store = memory();
    let first = tallies(&store);
    let id = Uuid::new_v4();
    let done = first.execute("a", TallyCommand::AddOnes(3), id).await.unwrap();
    first.execute("a", TallyCommand::Add(7), Uuid::new_v4()).await.unwrap();
    for tallies in [first, tallies(&store)] {
        // A command with the same id returns the first result, even if the command itself has changed.
        let again = tallies.execute("a", TallyCommand::Add(99), id).await.unwrap();
        assert_eq!((again.events, again.repeated), (done.events.clone(), true));
    }
    assert_eq!(tallies(&store).state("a").await.unwrap().amounts, [1, 1, 1, 7]);
    // The first result is returned even if the command would be refused now.
    tallies(&store).execute("a", TallyCommand::Close, Uuid::new_v4()).await.unwrap();
    assert!(tallies(&store).execute("a", TallyCommand::Add(1), id).await.unwrap().repeated);
}

#[tokio::test]
async fn repeated_command_returns_all_of_its_events() {
    // The number of events is lower than the number of commands that are remembered per stream, but higher than the
    // number of events that one read returns.
    let store = memory();
    let id = Uuid::new_v4();
    tallies(&store).execute("a", TallyCommand::AddOnes(1_010), id).await.unwrap();
    let again = tallies(&store).execute("a", TallyCommand::Nothing, id).await.unwrap();
    assert_eq!((again.events.len(), again.repeated), (1_010, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_sent_many_times_at_once_is_executed_once() {
    let store = memory();
    let one = tallies(&store);
    let two = tallies(&store);
    for round in 0..50 {
        let id = Uuid::new_v4();
        let sent = (0..8).map(|task| {
            let tallies = if task % 2 == 0 { one.clone() } else { two.clone() };
            tokio::spawn(async move { tallies.execute("a", TallyCommand::Add(round), id).await.unwrap() })
        });
        let outcomes: Vec<_> = join_all(sent).await.into_iter().map(Result::unwrap).collect();
        assert!(outcomes.iter().all(|outcome| outcome.events == [TallyEvent::Added { amount: round }]));
        assert_eq!(outcomes.iter().filter(|outcome| !outcome.repeated).count(), 1);
    }
    assert_eq!(one.state("a").await.unwrap().amounts, (0..50).collect::<Vec<_>>());
}

#[tokio::test]
async fn refusal_never_rests_on_outdated_state() {
    let store = memory();
    let one = tallies(&store);
    let two = tallies(&store);
    one.execute("a", TallyCommand::Add(1), Uuid::new_v4()).await.unwrap();
    two.execute("a", TallyCommand::Add(2), Uuid::new_v4()).await.unwrap();
    two.execute("a", TallyCommand::Close, Uuid::new_v4()).await.unwrap();
    // `one` still has the tally cached as open, with a sum of 1.
    let refused = one.execute("a", TallyCommand::Add(4), Uuid::new_v4()).await;
    assert!(matches!(refused, Err(ExecuteError::Refused(Closed(3)))), "{refused:?}");
    // The opposite case: `three` has cached the tally in the state that refuses the command, and the refusal must name
    // the current state.
    let three = tallies(&store);
    assert!(three.execute("a", TallyCommand::Add(4), Uuid::new_v4()).await.is_err());
    let events = vec![NewEvent {
        id: Uuid::new_v4(),
        type_name: "tally.added".into(),
        schema_version: 1,
        data: r#"{"amount":10}"#.into(),
        metadata: Metadata::default(),
    }];
    let append = Append { stream: one.stream("a").unwrap(), expected: Expected::Any, events };
    store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    let refused = three.execute("a", TallyCommand::Add(4), Uuid::new_v4()).await;
    assert!(matches!(refused, Err(ExecuteError::Refused(Closed(13)))), "{refused:?}");
}

/// Sends these commands at once while the first commit is held, so that the other commands share the next commit.
async fn together(faulty: &FaultyStore, commands: Vec<TallyCommand>) -> Vec<Result<usize, ExecuteError<Closed>>> {
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    let gate = Gate::new();
    faulty.at(faulty.commits() + 1, Fault::Hold(gate.clone()));
    let send = |command| {
        let tallies = tallies.clone();
        tokio::spawn(async move { tallies.execute("a", command, Uuid::new_v4()).await.map(|done| done.events.len()) })
    };
    let first = send(TallyCommand::Add(0));
    within("the first commit", gate.reached()).await;
    let rest: Vec<_> = commands.into_iter().map(send).collect();
    // All commands share one thread, so each command runs until it has to wait.
    for _ in 0..rest.len() {
        tokio::task::yield_now().await;
    }
    gate.open();
    within("first", first).await.unwrap().unwrap();
    within("all", join_all(rest)).await.into_iter().map(Result::unwrap).collect()
}

#[tokio::test]
async fn waiting_commands_share_a_commit() {
    let faulty = FaultyStore::new(memory());
    let outcomes = together(&faulty, vec![TallyCommand::Add(1); 100]).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(1))), "{outcomes:?}");
    assert_eq!(faulty.commits(), 2);
}

#[tokio::test]
async fn command_too_large_for_a_commit_fails_alone() {
    let faulty = FaultyStore::new(memory());
    let mut commands = vec![TallyCommand::Add(1); 40];
    commands[17] = TallyCommand::AddOnes(10_001);
    let outcomes = together(&faulty, commands).await;
    for (index, outcome) in outcomes.iter().enumerate() {
        match index {
            17 => assert!(matches!(outcome, Err(ExecuteError::Invalid(_))), "{outcome:?}"),
            _ => assert!(matches!(outcome, Ok(1)), "{index}: {outcome:?}"),
        }
    }
    let store: Arc<dyn EventStore> = Arc::new(faulty);
    assert_eq!(tallies(&store).state("a").await.unwrap().sum(), 39);
}

#[tokio::test]
async fn commands_too_large_for_one_commit_are_all_executed() {
    let faulty = FaultyStore::new(memory());
    let outcomes = together(&faulty, vec![TallyCommand::AddOnes(40); 500]).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(40))), "{:?}", outcomes.iter().find(|o| o.is_err()));
    let store: Arc<dyn EventStore> = Arc::new(faulty);
    assert_eq!(tallies(&store).state("a").await.unwrap().sum(), 20_000);
}

#[tokio::test]
async fn panicking_command_is_answered_and_blocks_no_other() {
    let faulty = FaultyStore::new(memory());
    let mut commands = vec![TallyCommand::Add(1); 5];
    commands[2] = TallyCommand::Panic;
    let outcomes = together(&faulty, commands).await;
    assert!(matches!(&outcomes[2], Err(ExecuteError::Invalid(reason)) if reason.contains("decided to panic")));
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 4);
    let store: Arc<dyn EventStore> = Arc::new(faulty);
    tallies(&store).execute("a", TallyCommand::Panic, Uuid::new_v4()).await.unwrap_err();
    tallies(&store).execute("a", TallyCommand::Add(1), Uuid::new_v4()).await.unwrap();
}

#[tokio::test]
async fn dropped_futures_revoke_no_command_and_block_no_other() {
    let faulty = FaultyStore::new(memory());
    let gate = Gate::new();
    faulty.at(1, Fault::Hold(gate.clone()));
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    for amount in 1..=3 {
        // Polls each command once, then drops it.
        assert!(tallies.execute("a", TallyCommand::Add(amount), Uuid::new_v4()).now_or_never().is_none());
    }
    within("the first commit", gate.reached()).await;
    gate.open();
    within("a later one", tallies.execute("a", TallyCommand::Add(4), Uuid::new_v4())).await.unwrap();
    assert_eq!(tallies.state("a").await.unwrap().amounts, [1, 2, 3, 4]);
}

#[tokio::test]
async fn caller_that_does_not_poll_blocks_no_other() {
    let faulty = FaultyStore::new(memory());
    let gate = Gate::new();
    faulty.at(1, Fault::Hold(gate.clone()));
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    let mut first = Box::pin(tallies.execute("a", TallyCommand::Add(1), Uuid::new_v4()));
    assert!((&mut first).now_or_never().is_none());
    gate.open();
    // The first future is not polled while the other commands are executed. One of those commands was sent before the
    // commit of the first command was done.
    for amount in 2..=3 {
        within("a later one", tallies.execute("a", TallyCommand::Add(amount), Uuid::new_v4())).await.unwrap();
    }
    assert_eq!(within("the first", first).await.unwrap().events, [TallyEvent::Added { amount: 1 }]);
    assert_eq!(tallies.state("a").await.unwrap().amounts, [1, 2, 3]);
}

#[test]
fn ended_runtime_leaves_no_queue_behind() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let ending = runtime();
    let lasting = runtime();
    let faulty = FaultyStore::new(memory());
    let gate = Gate::new();
    faulty.at(1, Fault::Hold(gate.clone()));
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    let send = |runtime: &tokio::runtime::Runtime, amount| {
        let tallies = tallies.clone();
        runtime.spawn(async move { tallies.execute("a", TallyCommand::Add(amount), Uuid::new_v4()).await.map(drop) })
    };
    let first = send(&ending, 1);
    lasting.block_on(within("the first commit", gate.reached()));
    let second = send(&lasting, 2);
    ending.shutdown_timeout(std::time::Duration::from_secs(10));
    lasting.block_on(async {
        assert!(within("the first", first).await.unwrap_err().is_cancelled());
        // The second command either waited behind the first or was sent after it. In both cases, the second command
        // must get an answer.
        let second = within("the second", second).await.unwrap();
        assert!(matches!(second, Ok(()) | Err(ExecuteError::Unavailable(_))), "{second:?}");
        within("the third", tallies.execute("a", TallyCommand::Add(3), Uuid::new_v4())).await.unwrap();
        let amounts = tallies.state("a").await.unwrap().amounts;
        assert!(amounts == [2, 3] && second.is_ok() || amounts == [3] && second.is_err(), "{amounts:?}, {second:?}");
    });
}

#[tokio::test]
async fn unknown_outcomes_execute_a_command_once() {
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    for (round, fault) in [Fault::AppliedUnknown, Fault::LostUnknown].into_iter().cycle().take(10).enumerate() {
        faulty.at(faulty.commits() + 1, fault);
        tallies.execute("a", TallyCommand::Add(round as i64), Uuid::new_v4()).await.unwrap();
    }
    assert_eq!(tallies.state("a").await.unwrap().amounts, (0..10).collect::<Vec<_>>());
    for number in 1..=40 {
        faulty.at(faulty.commits() + number, Fault::LostUnknown);
    }
    let outcome = tallies.execute("a", TallyCommand::Add(10), Uuid::new_v4()).await;
    assert!(matches!(outcome, Err(ExecuteError::Unavailable(_))), "{outcome:?}");
}

#[tokio::test]
async fn unavailable_store_is_reported() {
    let faulty = FaultyStore::new(memory());
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let tallies = tallies(&store);
    let id = Uuid::new_v4();
    faulty.away(true);
    let outcome = tallies.execute("a", TallyCommand::Add(1), id).await;
    assert!(matches!(outcome, Err(ExecuteError::Unavailable(_))), "{outcome:?}");
    faulty.away(false);
    assert!(!tallies.execute("a", TallyCommand::Add(1), id).await.unwrap().repeated);
}

#[tokio::test]
async fn tiny_cache_gives_correct_results() {
    for cached in [0, 1, 3] {
        let store = memory();
        let tallies = Repository::<Tally>::with(store.clone(), "tally", cached);
        let ids: Vec<String> = (0..10).map(|number| number.to_string()).collect();
        let command = Uuid::new_v4();
        for amount in 0..20 {
            for id in &ids {
                tallies.execute(id, TallyCommand::Add(amount), Uuid::new_v5(&command, &[amount as u8])).await.unwrap();
            }
        }
        for id in &ids {
            assert!(tallies.execute(id, TallyCommand::Add(0), Uuid::new_v5(&command, &[7])).await.unwrap().repeated);
            assert_eq!(tallies.state(id).await.unwrap().amounts, (0..20).collect::<Vec<_>>(), "{cached}");
        }
    }
}

#[tokio::test]
async fn unknown_event_type_is_named_with_its_place() {
    let store = memory();
    let tallies = tallies(&store);
    tallies.execute("a", TallyCommand::Add(1), Uuid::new_v4()).await.unwrap();
    let odd = NewEvent {
        id: Uuid::new_v4(),
        type_name: "tally.multiplied".into(),
        schema_version: 1,
        data: "{}".into(),
        metadata: Metadata::default(),
    };
    let append = Append { stream: StreamId::new("tally", "a").unwrap(), expected: Expected::Any, events: vec![odd] };
    store.commit(Commit { appends: vec![append], puts: Vec::new() }).await.unwrap();
    let Err(ExecuteError::Undecodable(error)) = tallies.execute("a", TallyCommand::Add(1), Uuid::new_v4()).await else {
        panic!("the command was executed")
    };
    assert_eq!((error.stream.as_str(), error.version.0), ("tally-a", 2));
    assert!(error.to_string().contains("tally.multiplied"), "{error}");
    assert!(matches!(tallies.state("a").await, Err(WorkError::Undecodable(_))));
    // Other streams are not affected.
    tallies.execute("b", TallyCommand::Add(1), Uuid::new_v4()).await.unwrap();
}

#[tokio::test]
async fn invalid_ids_are_refused_without_effect() {
    let store = memory();
    let tallies = tallies(&store);
    for id in ["two\nlines", "", &"x".repeat(10_000), "nul\0"] {
        let outcome = tallies.execute(id, TallyCommand::Add(1), Uuid::new_v4()).await;
        assert!(matches!(outcome, Err(ExecuteError::Invalid(_))), "{outcome:?}");
        assert!(matches!(tallies.state(id).await, Err(WorkError::Id(_))));
    }
    assert_eq!(log(&store).await.len(), 0);
}

/// A tally with snapshots. The field `loaded` shows whether the state comes from a snapshot.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Snapped<const VERSION: i32> {
    tally: Tally,
    #[serde(skip)]
    loaded: bool,
}

impl<const VERSION: i32> Aggregate for Snapped<VERSION> {
    const CATEGORY: &'static str = "snapped";
    const SNAPSHOT: Option<Snapshot<Self>> = Some(Snapshot {
        load: |text| serde_json::from_str(text).map(|snapped: Self| Self { loaded: true, ..snapped }),
        ..Snapshot::every(10, VERSION)
    });
    type Command = TallyCommand;
    type Event = TallyEvent;
    type Refusal = Closed;

    fn decide(&self, command: &TallyCommand) -> Result<Vec<TallyEvent>, Closed> {
        self.tally.decide(command)
    }

    fn evolve(&mut self, event: &TallyEvent) {
        self.tally.evolve(event);
    }
}

#[tokio::test]
async fn snapshots_change_no_result() {
    let store = memory();
    let command = Uuid::new_v4();
    let number = |number: i64| Uuid::new_v5(&command, &number.to_be_bytes());
    let snapped = Repository::<Snapped<1>>::new(store.clone());
    for amount in 1..=25 {
        snapped.execute("a", TallyCommand::Add(amount), number(amount)).await.unwrap();
    }
    let key = DocumentKey::new("snapshot.snapped", "a");
    let body = document(&store, &key).await.unwrap();
    assert!(body.contains(r#""version":20"#), "{body}");
    let all: Vec<i64> = (1..=25).collect();
    let fresh = Repository::<Snapped<1>>::new(store.clone()).state("a").await.unwrap();
    assert_eq!((fresh.loaded, fresh.tally.amounts), (true, all.clone()));
    // The store remembers command ids from before and after the snapshot.
    for amount in [3, 23] {
        let again =
            Repository::<Snapped<1>>::new(store.clone()).execute("a", TallyCommand::Add(0), number(amount)).await;
        assert_eq!(again.unwrap().events, [TallyEvent::Added { amount }]);
    }
    // A snapshot of another version is ignored, and so is an unreadable snapshot.
    let other = Repository::<Snapped<2>>::new(store.clone()).state("a").await.unwrap();
    assert_eq!((other.loaded, other.tally.amounts), (false, all.clone()));
    for corrupt in ["{}", "[]", r#"{"version":20,"schema":1,"ids":[],"state":{"tally":7}}"#] {
        let put = Put { key: key.clone(), expected: None, body: Some(corrupt.into()), due: None };
        store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await.unwrap();
        let repository = Repository::<Snapped<1>>::new(store.clone());
        let state = repository.state("a").await.unwrap();
        assert_eq!((state.loaded, state.tally.amounts), (false, all.clone()), "{corrupt}");
    }
    Repository::<Snapped<1>>::new(store.clone()).execute("a", TallyCommand::Add(26), number(26)).await.unwrap();
    assert!(Repository::<Snapped<1>>::new(store.clone()).state("a").await.unwrap().loaded);
}

/// A state that can exceed the maximum size of a document.
#[derive(Clone, Default, serde::Serialize, serde::Deserialize)]
struct Bulky(String);

#[derive(Event, Clone, Debug)]
#[event(prefix = "bulky")]
enum BulkyEvent {
    Grew { text: String },
}

impl Aggregate for Bulky {
    const CATEGORY: &'static str = "bulky";
    const SNAPSHOT: Option<Snapshot<Self>> = Some(Snapshot::every(1, 1));
    type Command = usize;
    type Event = BulkyEvent;
    type Refusal = Infallible;

    fn decide(&self, bytes: &usize) -> Result<Vec<BulkyEvent>, Infallible> {
        Ok(vec![BulkyEvent::Grew { text: "x".repeat(*bytes) }])
    }

    fn evolve(&mut self, BulkyEvent::Grew { text }: &BulkyEvent) {
        self.0 += text;
    }
}

#[tokio::test]
async fn oversized_state_is_kept_without_snapshot() {
    let store = memory();
    let bulky = Repository::<Bulky>::new(store.clone());
    for _ in 0..6 {
        bulky.execute("a", 800_000, Uuid::new_v4()).await.unwrap();
    }
    assert_eq!(Repository::<Bulky>::new(store.clone()).state("a").await.unwrap().0.len(), 4_800_000);
}
