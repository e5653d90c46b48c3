//! The number of lanes of a subscription or a relay changes while lanes are behind, on every store.
#![allow(clippy::unwrap_used)]

mod postgres;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use annals::{
    Commit, DocumentKey, EventStore, Group, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Operator,
    Put, Runtime, Service, Subscription, Terminal, Work,
    checkpoint::{CHECKPOINTS, Checkpoint},
    health::State,
};
use annals_conformance::bus::within;
use annals_sqlite::SqliteStore;
use annals_tests::{
    faulty::{Fault, FaultyStore},
    tally::{Copier, add, becomes_fine, copied, copies, document, documents, eventually},
};
use async_trait::async_trait;

const PATIENCE: Duration = Duration::from_secs(120);
const TALLIES: i64 = 20;

async fn on_each_store(test: impl AsyncFn(Arc<dyn EventStore>)) {
    eprintln!("in memory");
    test(Arc::new(MemoryStore::new())).await;
    eprintln!("on SQLite");
    let folder = tempfile::tempdir().unwrap();
    test(Arc::new(SqliteStore::open(folder.path().join("annals.db")).await.unwrap())).await;
    eprintln!("on PostgreSQL");
    let schema = postgres::Schema::new();
    test(Arc::new(schema.store().await)).await;
}

/// Copies tallies. The handler never finishes an event of the tally `stuck`, and fails at each event whose version in
/// its stream is `broken`.
#[derive(Clone)]
struct Copies {
    copier: Arc<Copier>,
    stuck: Option<&'static str>,
    broken: Arc<Mutex<Option<i64>>>,
    reached: Arc<AtomicBool>,
}

impl Copies {
    fn into(store: &Arc<dyn EventStore>) -> Self {
        Self {
            copier: Arc::new(Copier::new(store.clone())),
            stuck: None,
            broken: Arc::default(),
            reached: Arc::default(),
        }
    }
}

#[async_trait]
impl Handler for Copies {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        if self.stuck.is_some_and(|id| *message.key == format!("tally-{id}")) {
            self.reached.store(true, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        let broken = *self.broken.lock().unwrap();
        if broken.is_some_and(|version| message.version.0 == version) {
            return Err::<(), _>("broken".to_owned()).terminal();
        }
        self.copier.handle(message, work).await
    }
}

async fn start(mut runtime: Runtime, store: &Arc<dyn EventStore>, handler: &Copies, lanes: u32) -> Runtime {
    let copier = Subscription::new("copier", handler.clone()).query(LogQuery::categories(["tally"])).lanes(lanes);
    let service = Service::new("shop", store.clone()).subscribe(copier);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

async fn add_to_all(store: &Arc<dyn EventStore>, amounts: std::ops::RangeInclusive<i64>) {
    for tally in 0..TALLIES {
        add(store, &tally.to_string(), amounts.clone()).await;
    }
}

/// Waits until each amount has been copied once and in order.
async fn all_is_copied(store: &Arc<dyn EventStore>, upto: i64) {
    for tally in 0..TALLIES {
        let id = tally.to_string();
        eventually("all amounts are copied", async || (copies(store, &id).await.0.len() as i64 >= upto).then_some(()))
            .await;
        let amounts: Vec<i64> = (1..=upto).collect();
        assert_eq!(copies(store, &id).await, (amounts.clone(), amounts), "{id}");
    }
}

async fn lanes(store: &Arc<dyn EventStore>) -> Vec<(String, Option<u32>)> {
    let found = documents(store, CHECKPOINTS).await;
    let of_copier = found.into_iter().filter(|(id, _)| id.starts_with("copier/"));
    of_copier.map(|(id, body)| (id.to_string(), serde_json::from_str::<Checkpoint>(&body).unwrap().lanes)).collect()
}

/// Returns the position of each lane that has a checkpoint.
async fn positions(store: &Arc<dyn EventStore>) -> Vec<i64> {
    let found = documents(store, CHECKPOINTS).await;
    let of_copier = found.into_iter().filter(|(id, _)| id.starts_with("copier/"));
    of_copier.map(|(_, body)| serde_json::from_str::<Checkpoint>(&body).unwrap().next).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn changed_number_of_lanes_handles_each_event_once_and_in_order() {
    on_each_store(async |store| {
        let mut upto = 0;
        // Each round is killed while the lane of one tally does not move. The next round starts with another number of
        // lanes.
        for (number, stuck) in [(1, "1"), (4, "2"), (1, "3"), (3, "4"), (7, "5"), (2, "6")] {
            add_to_all(&store, upto + 1..=upto + 2).await;
            upto += 2;
            let last = store.status().await.unwrap().head;
            let faulty = FaultyStore::new(store.clone());
            let process: Arc<dyn EventStore> = Arc::new(faulty.clone());
            let handler = Copies { stuck: Some(stuck), ..Copies::into(&process) };
            let runtime = start(Runtime::new(), &process, &handler, number).await;
            eventually("one lane stands still", async || handler.reached.load(Ordering::SeqCst).then_some(())).await;
            // All other lanes reach the end of the log, for two reasons. First, the lanes must be at different positions.
            // Second, the next round begins by finishing each lane that is behind, so the tally that is stuck in the
            // next round must not be in such a lane.
            let others = async || {
                let moved = positions(&store).await.into_iter().filter(|next| *next >= last.0).count();
                (moved >= number as usize - 1).then_some(())
            };
            eventually("all other lanes continue", others).await;
            faulty.crash();
            drop(runtime);
        }
        let runtime = start(Runtime::new(), &store, &Copies::into(&store), 5).await;
        all_is_copied(&store, upto).await;
        add_to_all(&store, upto + 1..=upto + 1).await;
        all_is_copied(&store, upto + 1).await;
        assert_eq!(lanes(&store).await, (0..5).map(|lane| (format!("copier/{lane}"), Some(5))).collect::<Vec<_>>());
        becomes_fine(&runtime.health()).await;
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parked_messages_move_with_the_lanes() {
    on_each_store(async |store| {
        let handler = Copies::into(&store);
        *handler.broken.lock().unwrap() = Some(2);
        add_to_all(&store, 1..=4).await;
        for number in [4, 1, 3] {
            let runtime = start(Runtime::new(), &store, &handler, number).await;
            let parked =
                async || (documents(&store, "parked.copier").await.len() == 3 * TALLIES as usize).then_some(());
            eventually("the second of each, and those behind it, are parked", parked).await;
            let settled = async || (lanes(&store).await.len() == number as usize).then_some(());
            eventually("the number is changed", settled).await;
            runtime.drain(PATIENCE).await.unwrap();
        }
        *handler.broken.lock().unwrap() = None;
        let runtime = start(Runtime::new(), &store, &handler, 2).await;
        add_to_all(&store, 5..=5).await;
        eventually("the number is changed", async || (lanes(&store).await.len() == 2).then_some(())).await;
        let operator = Operator::new(store.clone(), "ann");
        for tally in 0..TALLIES {
            assert!(operator.redrive("copier", &format!("tally-{tally}"), "mended").await.unwrap() >= 3);
        }
        all_is_copied(&store, 5).await;
        assert_eq!(documents(&store, "parked.copier").await, []);
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_with_another_number_of_lanes_waits_until_the_others_end() {
    on_each_store(async |store| {
        let handler = Copies::into(&store);
        let older = start(Runtime::shared("older"), &store, &handler, 2).await;
        add_to_all(&store, 1..=2).await;
        all_is_copied(&store, 2).await;
        let newer = start(Runtime::shared("newer"), &store, &handler, 4).await;
        let waits = async || {
            let parts = newer.health().parts();
            let reason = parts.iter().find_map(|(part, state)| match state {
                State::Elsewhere(reason) if part.starts_with("copier/") => Some(reason.clone()),
                _ => None,
            });
            reason.filter(|reason| reason.contains("instance older runs 2 lanes"))
        };
        eventually("health names the instance to wait for", waits).await;
        add_to_all(&store, 3..=3).await;
        all_is_copied(&store, 3).await;
        assert_eq!(lanes(&store).await.len(), 2);
        older.drain(PATIENCE).await.unwrap();
        add_to_all(&store, 4..=4).await;
        all_is_copied(&store, 4).await;
        assert_eq!(lanes(&store).await.len(), 4);
        eventually("every part is fine", async || newer.health().is_fine().then_some(())).await;
        newer.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn process_stops_when_its_number_of_lanes_was_changed() {
    on_each_store(async |store| {
        let handler = Copies::into(&store);
        let before = start(Runtime::new(), &store, &handler, 3).await;
        add_to_all(&store, 1..=2).await;
        all_is_copied(&store, 2).await;
        let after = start(Runtime::new(), &store, &handler, 2).await;
        eventually("the number is changed", async || (lanes(&store).await.len() == 2).then_some(())).await;
        add_to_all(&store, 3..=4).await;
        all_is_copied(&store, 4).await;
        let stopped = async || {
            let parts = before.health().parts();
            let of_copier = parts.iter().filter(|(part, _)| part.starts_with("copier/"));
            let stopped =
                |state: &State| matches!(state, State::Trouble(reason) if reason.contains("another number of lanes"));
            of_copier.clone().all(|(_, state)| stopped(state)).then_some(())
        };
        eventually("each lane reports it", stopped).await;
        becomes_fine(&after.health()).await;
        drop(before);
        after.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_relay_restarts_with_another_number_of_lanes() {
    on_each_store(async |store| {
        let there: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let bus = Arc::new(LocalBus::new(2));
        let mut consumer = Runtime::new();
        let group = Group::new("sink.tallies", &["source.events"], Copier::new(there.clone()));
        consumer.start(vec![Service::new("sink", there.clone()).consume(group)], bus.clone()).await.unwrap();
        let mut upto = 0;
        for number in [4, 1, 3, 2] {
            let faulty = FaultyStore::new(store.clone());
            let mut relay = Runtime::new();
            let here: Arc<dyn EventStore> = Arc::new(faulty.clone());
            let service = Service::new("source", here).publish(&["tally"]).relay_lanes(number);
            relay.start(vec![service], bus.clone()).await.unwrap();
            // The process crashes when lane 0 has sent messages and is about to move its checkpoint. The positions of
            // the other lanes do not matter.
            let moved = async || {
                let found = documents(&store, CHECKPOINTS).await;
                let of_relay = found.iter().filter(|(id, _)| id.starts_with("source.relay/")).count();
                (of_relay == number as usize).then_some(())
            };
            add_to_all(&store, upto + 1..=upto + 1).await;
            eventually("the number is changed", moved).await;
            faulty.when_checkpoint("source.relay/0", Fault::CrashBefore);
            add_to_all(&store, upto + 2..=upto + 3).await;
            within("crash", faulty.crashed()).await;
            drop(relay);
            upto += 3;
        }
        let mut relay = Runtime::new();
        let service = Service::new("source", store.clone()).publish(&["tally"]).relay_lanes(5);
        relay.start(vec![service], bus.clone()).await.unwrap();
        for tally in 0..TALLIES {
            let id = tally.to_string();
            let key = copied(&id);
            let seen = async || {
                let seen: Vec<i64> = serde_json::from_str(&document(&there, &key).await?).unwrap();
                (seen.len() as i64 >= upto).then_some(seen)
            };
            assert_eq!(eventually("all amounts are copied", seen).await, (1..=upto).collect::<Vec<_>>(), "{id}");
        }
        relay.drain(PATIENCE).await.unwrap();
        consumer.drain(PATIENCE).await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_of_earlier_releases_are_adopted_or_refused() {
    on_each_store(async |store| {
        add_to_all(&store, 1..=2).await;
        let half = TALLIES;
        let put = |lane: u32| Put {
            key: DocumentKey::new(CHECKPOINTS, format!("copier/{lane}")),
            expected: None,
            body: Some(
                format!(r#"{{"next":{},"at":"2026-01-01T00:00:00Z"}}"#, if lane == 1 { half } else { 2 * half }).into(),
            ),
            due: None,
        };
        store.commit(Commit { appends: Vec::new(), puts: vec![put(0), put(1)] }).await.unwrap();
        let before = documents(&store, CHECKPOINTS).await;
        let handler = Copies::into(&store);
        for number in [1, 3] {
            let refused = start(Runtime::new(), &store, &handler, number).await;
            let reason = eventually("the change is refused", async || {
                let parts = refused.health().parts();
                parts.into_iter().find_map(|(part, state)| match state {
                    State::Trouble(reason) if part.starts_with("copier/") => Some(reason),
                    _ => None,
                })
            });
            assert!(reason.await.contains("start this build once with lanes(2)"));
            let now: Vec<_> = documents(&store, CHECKPOINTS).await;
            let now: Vec<_> = now.into_iter().filter(|(id, _)| id.starts_with("copier/")).collect();
            assert_eq!(now, before);
            drop(refused);
        }
        let runtime = start(Runtime::new(), &store, &handler, 2).await;
        let noted = [("copier/0".to_owned(), Some(2)), ("copier/1".to_owned(), Some(2))];
        eventually("the number is noted", async || (lanes(&store).await == noted).then_some(())).await;
        add_to_all(&store, 3..=3).await;
        for tally in 0..TALLIES {
            let id = tally.to_string();
            eventually("all amounts are copied", async || {
                let seen = copies(&store, &id).await.0;
                (seen.last() == Some(&3)).then_some(())
            })
            .await;
        }
        runtime.drain(PATIENCE).await.unwrap();
    })
    .await;
}
