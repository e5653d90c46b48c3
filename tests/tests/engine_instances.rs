//! Several instances on one store share lanes, hand lanes over and take lanes over. An instance that has lost its lanes
//! changes nothing.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use annals::{
    EventStore, Handler, HandlerError, LocalBus, LogQuery, MemoryStore, Message, Runtime, Service, Subscription, Work,
    checkpoint::{CHECKPOINTS, Checkpoint},
    health::State,
    saga::Status,
};
use annals_conformance::bus::within;
use annals_tests::{
    tally::{Copier, TallyEvent, add, becomes_fine, copies, documents, eventually},
    trip::{World, trip},
};
use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;

const LANES: u32 = 8;
const DRAIN: Duration = Duration::from_secs(60);

/// Starts an instance that copies tallies.
async fn copier(store: &Arc<dyn EventStore>, instance: &str) -> Runtime {
    start(store, instance, Copier::new(store.clone())).await
}

async fn start(store: &Arc<dyn EventStore>, instance: &str, handler: impl Handler) -> Runtime {
    let tallies = LogQuery::categories(["tally"]);
    let subscription = Subscription::new("copier", handler).query(tallies).lanes(LANES);
    let mut runtime = Runtime::shared(instance);
    let service = Service::new("shop", store.clone()).subscribe(subscription);
    runtime.start(vec![service], Arc::new(LocalBus::default())).await.unwrap();
    runtime
}

/// Returns the holders of the subscription's lanes.
async fn holders(store: &Arc<dyn EventStore>) -> Vec<Option<Arc<str>>> {
    let checkpoints = documents(store, CHECKPOINTS).await;
    let lanes = checkpoints.iter().filter(|(id, _)| id.starts_with("copier/"));
    lanes.map(|(_, body)| serde_json::from_str::<Checkpoint>(body).unwrap().holder).collect()
}

/// Returns the number of lanes that each instance holds.
async fn shares(store: &Arc<dyn EventStore>) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for holder in holders(store).await.into_iter().flatten() {
        *shares.entry(holder.to_string()).or_default() += 1;
    }
    shares
}

async fn becomes(store: &Arc<dyn EventStore>, expected: &[(&str, usize)]) {
    let expected: BTreeMap<_, _> = expected.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    let what = format!("{expected:?} hold the lanes");
    eventually(&what, async || (shares(store).await == expected).then_some(())).await;
}

/// Waits until each amount of the twenty tallies has been copied once, in order.
async fn all_is_copied(store: &Arc<dyn EventStore>, upto: i64) {
    for tally in 0..20 {
        let amounts: Vec<i64> = (1..=upto).collect();
        let id = tally.to_string();
        eventually("all amounts are copied", async || {
            (copies(store, &id).await.0.len() >= amounts.len()).then_some(())
        })
        .await;
        assert_eq!(copies(store, &id).await, (amounts.clone(), amounts));
    }
}

async fn add_to_all(store: &Arc<dyn EventStore>, amounts: std::ops::RangeInclusive<i64>) {
    for tally in 0..20 {
        add(store, &tally.to_string(), amounts.clone()).await;
    }
}

#[tokio::test]
async fn lanes_are_redistributed_when_instances_join_and_drain() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let one = copier(&store, "one").await;
    becomes(&store, &[("one", 8)]).await;
    add_to_all(&store, 1..=20).await;
    let two = copier(&store, "two").await;
    add_to_all(&store, 21..=40).await;
    becomes(&store, &[("one", 4), ("two", 4)]).await;
    let three = copier(&store, "three").await;
    add_to_all(&store, 41..=60).await;
    let spread = async || {
        let shares = shares(&store).await;
        (shares.len() == 3 && shares.values().all(|count| [2, 3].contains(count))).then_some(())
    };
    eventually("three share the lanes", spread).await;
    all_is_copied(&store, 60).await;
    becomes_fine(&two.health()).await;
    let elsewhere = two.health().parts().values().filter(|state| matches!(state, State::Elsewhere(_))).count();
    assert!(elsewhere >= 5, "{:?}", two.health().parts());

    one.drain(DRAIN).await.unwrap();
    add_to_all(&store, 61..=80).await;
    becomes(&store, &[("three", 4), ("two", 4)]).await;
    all_is_copied(&store, 80).await;
    two.drain(DRAIN).await.unwrap();
    three.drain(DRAIN).await.unwrap();
    assert_eq!(holders(&store).await, vec![None; LANES as usize], "every instance has released its lanes");
    assert_eq!(documents(&store, "instance").await, []);
}

#[tokio::test]
async fn lanes_of_a_crashed_instance_are_taken_over() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let one = copier(&store, "one").await;
    let two = copier(&store, "two").await;
    becomes(&store, &[("one", 4), ("two", 4)]).await;
    // Drops the instance before it can release its lanes.
    drop(one);
    add_to_all(&store, 1..=20).await;
    let crashed = std::time::Instant::now();
    all_is_copied(&store, 20).await;
    becomes(&store, &[("two", 8)]).await;
    assert!(crashed.elapsed() > Duration::from_secs(3), "the instance had time to send a heartbeat");
    // An instance that restarts under its own name gets its lanes back at once.
    drop(two);
    let started = std::time::Instant::now();
    let two = copier(&store, "two").await;
    add_to_all(&store, 21..=30).await;
    becomes(&store, &[("two", 8)]).await;
    assert!(started.elapsed() < Duration::from_secs(3));
    all_is_copied(&store, 30).await;
    two.drain(DRAIN).await.unwrap();
}

/// A handler that copies tallies, but can stop in the middle of a message, as after SIGSTOP.
struct Stopping {
    copier: Copier,
    stopped: watch::Receiver<bool>,
    is_stopped: watch::Sender<bool>,
}

#[async_trait]
impl Handler for Stopping {
    async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        let Some(TallyEvent::Added { .. }) = message.decode()? else { return Ok(()) };
        self.copier.handle(message, work).await?;
        if *self.stopped.borrow() {
            self.is_stopped.send_replace(true);
            _ = self.stopped.clone().wait_for(|stopped| !stopped).await;
        }
        Ok(())
    }
}

#[tokio::test]
async fn instance_stopped_past_its_lease_changes_nothing_when_resumed() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let (stop, stopped) = watch::channel(true);
    let (is_stopped, mut seen) = watch::channel(false);
    // Only the handler stops, so the heartbeat continues. The other instance uses the same name, so that this instance
    // looks dead.
    let zombie = start(&store, "one", Stopping { copier: Copier::new(store.clone()), stopped, is_stopped }).await;
    becomes(&store, &[("one", 8)]).await;
    add_to_all(&store, 1..=10).await;
    within("it stops", seen.wait_for(|stopped| *stopped)).await.unwrap();
    let heir = copier(&store, "one").await;
    all_is_copied(&store, 10).await;
    let before = epochs(&store).await;
    stop.send_replace(false);
    add_to_all(&store, 11..=20).await;
    // No effect happens twice, no matter which instance holds a lane by now.
    all_is_copied(&store, 20).await;
    let after = epochs(&store).await;
    assert!(before.iter().all(|(lane, epoch)| after[lane] >= *epoch && *epoch >= 2), "{before:?} {after:?}");
    drop(zombie);
    heir.drain(DRAIN).await.unwrap();
}

async fn epochs(store: &Arc<dyn EventStore>) -> HashMap<Arc<str>, i64> {
    let checkpoints = documents(store, CHECKPOINTS).await;
    let lanes = checkpoints.into_iter().filter(|(id, _)| id.starts_with("copier/"));
    lanes.map(|(id, body)| (id, serde_json::from_str::<Checkpoint>(&body).unwrap().epoch)).collect()
}

#[tokio::test]
async fn sagas_progress_over_several_processes_with_separate_buses() {
    let first = World::new(Arc::new(MemoryStore::new()), trip(Duration::from_secs(60), 3));
    let second = World {
        bus: Arc::new(LocalBus::default()),
        plan: first.plan.clone(),
        ..World::new(first.store.clone(), first.plan.clone())
    };
    // The relay of each instance sends the messages of its lanes over the bus of that instance.
    let start = async |world: &World, instance: &str| {
        let services = ["shop", "hotel", "bank"].map(|name| world.service(name, &world.store).relay_lanes(4));
        let mut runtime = Runtime::shared(instance);
        runtime.start(services.into(), world.bus.clone()).await.unwrap();
        runtime
    };
    let one = start(&first, "one").await;
    let two = start(&second, "two").await;
    let both_hold = async || {
        let checkpoints = documents(&first.store, CHECKPOINTS).await;
        let held = |name: &str| checkpoints.iter().any(|(_, body)| body.contains(&format!("\"holder\":\"{name}\"")));
        (held("one") && held("two")).then_some(())
    };
    eventually("both instances hold lanes", both_hold).await;
    let run = async |trips: std::ops::Range<u32>, one: Option<Runtime>| {
        for trip in trips.clone() {
            first.request(&trip.to_string(), Uuid::new_v4(), None).await;
        }
        // Drops the instance in the middle of the trips.
        drop(one);
        for trip in trips {
            first.becomes(&trip.to_string(), Status::Completed).await;
            assert_eq!(first.ledger(&trip.to_string()).await, ["book", "charge", "confirm", "announce"]);
        }
    };
    run(0..20, None).await;
    let took = async |instance: &str| {
        let checkpoints = documents(&first.store, CHECKPOINTS).await;
        checkpoints.iter().any(|(id, _)| id.contains(&format!(".commands@{instance}/")))
    };
    assert!(took("one").await && took("two").await, "both instances handled messages");
    run(20..60, Some(one)).await;
    two.drain(DRAIN).await.unwrap();
    assert!(!took("two").await, "the offsets are of no use to other instances");
}
