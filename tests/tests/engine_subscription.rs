//! Subscriptions catch up and restart, and every effect happens exactly once, no matter what the store does.
#![allow(clippy::unwrap_used)]

use std::{collections::HashMap, sync::Arc, time::Duration};

use annals::{
    DocumentKey, EventStore, Handler, HandlerError, Health, LogQuery, MemoryStore, Message, Position, Repository,
    Start, Subscription, Tail, Work, checkpoint::Checkpoint, parking::DeadLetters,
};
use annals_conformance::bus::within;
use annals_tests::{
    faulty::{Fault, FaultyStore, Gate},
    tally::{Copier, Tally, TallyCommand, add, becomes_fine, copies, document, documents, eventually, log},
};
use async_trait::async_trait;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

struct Running {
    task: JoinHandle<Result<(), annals::NameError>>,
    shutdown: CancellationToken,
    health: Health,
}

impl Running {
    fn start(subscription: Subscription, store: &Arc<dyn EventStore>) -> Self {
        let shutdown = CancellationToken::new();
        let health = Health::default();
        let task = tokio::spawn(subscription.run(store.clone(), health.clone(), shutdown.clone()));
        Self { task, shutdown, health }
    }

    /// Ends the task abruptly, as a kill ends a process. The task does not finish its work in progress.
    async fn kill(self) {
        self.task.abort();
        _ = self.task.await;
    }

    async fn stop(self) {
        self.shutdown.cancel();
        within("stop", self.task).await.unwrap().unwrap();
    }
}

fn memory() -> Arc<dyn EventStore> {
    Arc::new(MemoryStore::new())
}

fn copier(store: &Arc<dyn EventStore>) -> Subscription {
    let tallies = LogQuery::categories(["tally"]);
    Subscription::new("copier", Copier::new(store.clone())).query(tallies)
}

async fn copied(store: &Arc<dyn EventStore>, id: &str, amounts: Vec<i64>) {
    eventually("all amounts are copied", async || (copies(store, id).await.0.len() >= amounts.len()).then_some(()))
        .await;
    assert_eq!(copies(store, id).await, (amounts.clone(), amounts));
}

async fn checkpoint(store: &Arc<dyn EventStore>, id: &str) -> Option<i64> {
    let body = document(store, &DocumentKey::new(annals::checkpoint::CHECKPOINTS, id)).await?;
    Some(serde_json::from_str::<Checkpoint>(&body).unwrap().next)
}

#[tokio::test]
async fn subscription_catches_up_and_then_follows() {
    let store = memory();
    add(&store, "a", 1..=1_200).await;
    let running = Running::start(copier(&store), &store);
    copied(&store, "a", (1..=1_200).collect()).await;
    add(&store, "a", 1_201..=1_210).await;
    copied(&store, "a", (1..=1_210).collect()).await;
    becomes_fine(&running.health).await;
    running.stop().await;
}

#[tokio::test]
async fn several_subscriptions_share_one_tail() {
    let store: Arc<dyn EventStore> = Arc::new(Tail::follow(memory()).await.unwrap());
    add(&store, "a", 1..=700).await;
    let one = Running::start(copier(&store), &store);
    let count = Subscription::new("second", Seen { name: "second" }).query(LogQuery::categories(["tally"])).lanes(2);
    let two = Running::start(count, &store);
    add(&store, "a", 701..=1_500).await;
    copied(&store, "a", (1..=1_500).collect()).await;
    eventually("the second has seen all", async || (seen(&store, "second").await.len() == 1_500).then_some(())).await;
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn subscription_continues_from_its_checkpoint() {
    let store = memory();
    add(&store, "a", 1..=10).await;
    let running = Running::start(copier(&store), &store);
    copied(&store, "a", (1..=10).collect()).await;
    running.stop().await;
    assert_eq!(checkpoint(&store, "copier/0").await, Some(log(&store).await.len() as i64));
    add(&store, "a", 11..=20).await;
    let running = Running::start(copier(&store), &store);
    copied(&store, "a", (1..=20).collect()).await;
    running.stop().await;
}

/// Records the position of each event in a separate document.
struct Seen {
    name: &'static str,
}

#[async_trait]
impl Handler for Seen {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let key = DocumentKey::new(format!("seen.{}", self.name), format!("{:06}", message.position.0));
        let times: u32 = work.document(&key).await?.unwrap_or(0);
        work.put(&key, &(times + 1))?;
        Ok(())
    }
}

/// Returns the recorded positions, and asserts that each event was seen once.
async fn seen(store: &Arc<dyn EventStore>, name: &str) -> Vec<i64> {
    let found = documents(store, &format!("seen.{name}")).await;
    assert!(found.iter().all(|(_, times)| &**times == "1"), "{name} has seen something twice: {found:?}");
    found.into_iter().map(|(position, _)| position.parse().unwrap()).collect()
}

/// Takes its time for each event.
struct Slow(Seen);

#[async_trait]
impl Handler for Slow {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        tokio::time::sleep(Duration::from_millis(400)).await;
        self.0.handle(message, work).await
    }
}

#[tokio::test]
async fn batch_of_a_slow_handler_is_committed_after_a_second() {
    let store = memory();
    add(&store, "a", 1..=8).await;
    let slow = Subscription::new("slow", Slow(Seen { name: "slow" })).query(LogQuery::categories(["tally"]));
    let running = Running::start(slow, &store);
    let first = async || Some(seen(&store, "slow").await.len()).filter(|seen| *seen > 0);
    assert!(eventually("the first commit", first).await < 8);
    eventually("all events are handled", async || (seen(&store, "slow").await.len() == 8).then_some(())).await;
    running.stop().await;
}

#[tokio::test]
async fn subscription_starts_at_the_given_position() {
    let store = memory();
    add(&store, "a", 1..=10).await;
    for (name, start) in [("all", Start::Beginning), ("later", Start::After(Position(7))), ("new", Start::Now)] {
        let running = Running::start(Subscription::new(name, Seen { name }).start(start), &store);
        eventually("it works", async || running.health.is_fine().then_some(())).await;
        running.stop().await;
    }
    add(&store, "a", 11..=12).await;
    for (name, start, first) in
        [("all", Start::Beginning, 1), ("later", Start::After(Position(7)), 8), ("new", Start::Now, 11)]
    {
        let running = Running::start(Subscription::new(name, Seen { name }).start(start), &store);
        let expected: Vec<i64> = (first..=12).collect();
        eventually(name, async || (seen(&store, name).await.last() == Some(&12)).then_some(())).await;
        assert_eq!(seen(&store, name).await, expected, "{name}");
        running.stop().await;
    }
}

#[tokio::test]
async fn start_now_on_an_empty_log_is_remembered() {
    let store = memory();
    let new = || Subscription::new("new", Seen { name: "new" }).start(Start::Now);
    let running = Running::start(new(), &store);
    eventually("it works", async || running.health.is_fine().then_some(())).await;
    running.kill().await;
    add(&store, "a", 1..=3).await;
    let running = Running::start(new(), &store);
    eventually("all since", async || (seen(&store, "new").await == [1, 2, 3]).then_some(())).await;
    running.stop().await;
}

/// Runs the copier over a few small batches on a store with this fault at commit number `number`. Restarts the copier
/// after a crash. Returns the number of commits.
async fn with_fault(number: u64, fault: Fault) -> u64 {
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    faulty.at(number, fault);
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    let running = Running::start(copier(&store), &store);
    let mut restarted = None;
    for round in 0..4 {
        add(&inner, "a", round * 3 + 1..=round * 3 + 3).await;
        // Each round must be a separate batch; otherwise the test could not tell the commits apart.
        let all = (round as usize + 1) * 3;
        eventually("the round is copied", async || {
            if faulty.has_crashed() && restarted.is_none() {
                restarted = Some(Running::start(copier(&inner), &inner));
            }
            if faulty.is_away() {
                faulty.refused(1).await;
                faulty.away(false);
            }
            (copies(&inner, "a").await.0.len() >= all).then_some(())
        })
        .await;
    }
    copied(&inner, "a", (1..=12).collect()).await;
    assert_eq!(DeadLetters::new(inner.clone()).list("copier").await.unwrap().len(), 0);
    running.kill().await;
    if let Some(restarted) = restarted {
        restarted.stop().await;
    }
    faulty.commits()
}

#[tokio::test]
async fn crash_at_each_commit_leaves_every_effect_once() {
    let mut number = 0;
    loop {
        number += 1;
        let asked = with_fault(number, Fault::CrashBefore).await;
        with_fault(number, Fault::CrashAfter).await;
        if asked < number {
            break;
        }
    }
    assert!(number > 4, "only {number} commits were tried");
}

#[tokio::test]
async fn unknown_outcome_at_each_commit_leaves_every_effect_once() {
    for number in 1..=4 {
        with_fault(number, Fault::AppliedUnknown).await;
        with_fault(number, Fault::LostUnknown).await;
        with_fault(number, Fault::LostAndAway).await;
    }
}

#[tokio::test]
async fn unavailable_store_parks_nothing() {
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    add(&inner, "a", 1..=5).await;
    faulty.at(1, Fault::Unavailable).at(2, Fault::Unavailable);
    let running = Running::start(copier(&store), &store);
    copied(&inner, "a", (1..=5).collect()).await;
    faulty.away(true);
    add(&inner, "a", 6..=10).await;
    faulty.refused(2).await;
    let parts = running.health.parts();
    assert!(!running.health.is_fine(), "{parts:?}");
    faulty.away(false);
    copied(&inner, "a", (1..=10).collect()).await;
    assert_eq!(documents(&inner, "parked.copier").await, []);
    eventually("health says so", async || running.health.is_fine().then_some(())).await;
    running.stop().await;
}

#[tokio::test]
async fn fenced_worker_changes_nothing() {
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    let gate = Gate::new();
    faulty.at(1, Fault::Hold(gate.clone()));
    let held: Arc<dyn EventStore> = Arc::new(faulty.clone());
    add(&inner, "a", 1..=5).await;
    let zombie = Running::start(copier(&held), &held);
    within("the first holds a batch", gate.reached()).await;
    let heir = Running::start(copier(&inner), &inner);
    copied(&inner, "a", (1..=5).collect()).await;
    gate.open();
    eventually("the first is fenced", async || {
        let parts = zombie.health.parts();
        parts.values().any(|state| format!("{state:?}").contains("took over")).then_some(())
    })
    .await;
    assert_eq!(copies(&inner, "a").await.0, [1, 2, 3, 4, 5]);
    heir.stop().await;
    // After the other process has ended, the subscription works again.
    add(&inner, "a", 6..=9).await;
    copied(&inner, "a", (1..=9).collect()).await;
    zombie.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_share_a_subscription_without_duplicates() {
    let store = memory();
    let lanes = || copier(&store).lanes(3);
    let one = Running::start(lanes(), &store);
    let two = Running::start(lanes(), &store);
    for round in 0..30 {
        for id in ["a", "b", "c", "d", "e"] {
            add(&store, id, [round]).await;
        }
    }
    for id in ["a", "b", "c", "d", "e"] {
        copied(&store, id, (0..30).collect()).await;
    }
    one.stop().await;
    two.stop().await;
    for id in ["a", "b", "c", "d", "e"] {
        copied(&store, id, (0..30).collect()).await;
    }
}

#[tokio::test]
async fn lanes_keep_the_order_of_a_stream_and_handle_each_event_once() {
    let store = memory();
    let ids: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    for round in 0..10 {
        for id in &ids {
            add(&store, id, [round]).await;
        }
    }
    let running = Running::start(copier(&store).lanes(4), &store);
    for id in &ids {
        copied(&store, id, (0..10).collect()).await;
    }
    running.stop().await;
    // Each lane must receive some of the events; otherwise the test proves nothing.
    let mut of_lane = HashMap::new();
    for lane in 0..4 {
        of_lane.insert(lane, checkpoint(&store, &format!("copier/{lane}")).await.unwrap());
    }
    assert!(of_lane.values().all(|next| *next > 0), "{of_lane:?}");
}

#[tokio::test(start_paused = true)]
async fn idle_lane_moves_its_checkpoint() {
    let store = memory();
    let nothing = LogQuery::categories(["order"]);
    let running = Running::start(Subscription::new("idle", Seen { name: "idle" }).query(nothing), &store);
    for amount in 1..=5 {
        add(&store, "a", [amount]).await;
        tokio::time::advance(Duration::from_millis(400)).await;
    }
    eventually("the checkpoint has moved", async || (checkpoint(&store, "idle/0").await == Some(5)).then_some(()))
        .await;
    running.kill().await;
    assert_eq!(seen(&store, "idle").await, Vec::<i64>::new());
}

#[tokio::test]
async fn drain_handles_events_recorded_before_it() {
    let inner = memory();
    let faulty = FaultyStore::new(inner.clone());
    let gate = Gate::new();
    faulty.at(1, Fault::Hold(gate.clone()));
    let store: Arc<dyn EventStore> = Arc::new(faulty.clone());
    add(&inner, "a", 1..=3).await;
    let running = Running::start(copier(&store), &store);
    within("a batch is in hand", gate.reached()).await;
    add(&inner, "a", 4..=6).await;
    running.shutdown.cancel();
    tokio::task::yield_now().await;
    assert!(!running.task.is_finished());
    gate.open();
    running.stop().await;
    copied(&inner, "a", (1..=6).collect()).await;
}

#[tokio::test]
async fn effects_on_a_hot_aggregate_are_exact_under_other_writers() {
    let store = memory();
    let running = Running::start(copier(&store).lanes(2), &store);
    // Another writer writes to the streams that the handler writes to.
    let other = Repository::<Tally>::with(store.clone(), "copy", 10);
    for amount in 1..=200 {
        add(&store, "a", [amount]).await;
        other.execute("a", TallyCommand::Add(-amount), Uuid::new_v4()).await.unwrap();
    }
    eventually("all amounts are copied", async || (copies(&store, "a").await.1.len() == 400).then_some(())).await;
    let amounts = copies(&store, "a").await.1;
    let positive: Vec<i64> = amounts.iter().copied().filter(|amount| *amount > 0).collect();
    assert_eq!(positive, (1..=200).collect::<Vec<_>>());
    running.stop().await;
}

#[tokio::test]
async fn lingering_subscription_does_not_linger_while_behind() {
    let store = memory();
    let tallies = Repository::<Tally>::new(store.clone());
    for tally in 0..10 {
        let ones = TallyCommand::AddOnes(1_000);
        tallies.execute(&tally.to_string(), ones, Uuid::new_v4()).await.unwrap();
    }
    let seen_all = Subscription::new("lingering", Seen { name: "lingering" });
    let running = Running::start(seen_all.linger(Duration::from_secs(3_600)), &store);
    // A pause would last an hour, so all events must be handled before the first pause.
    let all = async || (seen(&store, "lingering").await.len() == 10_000).then_some(());
    eventually("all events are seen without a pause", all).await;
    running.kill().await;
}
