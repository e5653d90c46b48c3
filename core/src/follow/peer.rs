//! Instances. An instance is one of several processes that share a store. This module writes and watches heartbeats,
//! and assigns each lane to a living instance.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    commit::{COMMIT_ROWS_MAX, Commit, CommitError, Document, DocumentKey, Put},
    follow::checkpoint::{CHECKPOINTS, Checkpoint},
    health::Health,
    store::{EventStore, Scan},
};

/// The collection of the instances' heartbeat documents.
pub(crate) const INSTANCES: &str = "instance";
/// How often an instance writes its heartbeat.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);
/// How many consecutive heartbeats an instance may miss before its lanes are assigned to other instances.
const MISSED_MAX: u32 = 5;
/// The number of missed heartbeats after which the documents of the instance are removed.
const FORGOTTEN: u32 = 600;
/// The maximum number of instances on one store.
const INSTANCES_MAX: usize = 1_000;
/// The maximum number of checkpoints that are examined for offsets of a removed instance.
const CHECKPOINTS_MAX: usize = 10_000;

/// One process among several that follow the same log.
///
/// Each instance writes a heartbeat once a second, in its own document. An instance counts as alive as long as its
/// document changes, so clocks of different machines are never compared. The lanes of a subscription are spread over
/// the living instances that follow the subscription. This assignment is only a hint. If an instance is suspended,
/// another instance may claim its lane. When the suspended instance resumes, its commits fail, because the claim has
/// changed the version of the lane's checkpoint.
#[derive(Clone)]
pub(crate) struct Peer {
    name: Arc<str>,
    follows: Arc<Mutex<BTreeSet<Arc<str>>>>,
    changed: Arc<Notify>,
    alive: watch::Sender<Alive>,
}

/// The living instances and the subscriptions that each of them follows; `None` before the documents were read for the
/// first time.
type Alive = Option<Arc<BTreeMap<Arc<str>, BTreeSet<Arc<str>>>>>;

/// The body of a heartbeat document.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Heartbeat {
    follows: BTreeSet<Arc<str>>,
    at: chrono::DateTime<chrono::Utc>,
}

/// The last known heartbeat of an instance.
struct Seen {
    version: i64,
    missed: u32,
    follows: BTreeSet<Arc<str>>,
}

impl Peer {
    pub fn named(name: &str) -> Self {
        let follows = Arc::default();
        let changed = Arc::default();
        let alive = watch::Sender::new(None);
        Self { name: name.into(), follows, changed, alive }
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Announces that this instance follows a subscription. The announcement is part of the next heartbeat, which is
    /// written at once.
    pub(crate) fn follow(&self, subscription: &Arc<str>) {
        self.follows().insert(subscription.clone());
        self.changed.notify_one();
    }

    fn follows(&self) -> std::sync::MutexGuard<'_, BTreeSet<Arc<str>>> {
        self.follows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_alive(&self, name: &str) -> bool {
        self.alive.borrow().as_ref().is_none_or(|alive| alive.contains_key(name))
    }

    /// Returns another living instance that follows a subscription, if there is one.
    pub(crate) fn other_follower(&self, subscription: &str) -> Option<Arc<str>> {
        let alive = self.alive.borrow();
        let mut others = alive.as_ref()?.iter().filter(|(name, _)| **name != self.name);
        others.find(|(_, follows)| follows.contains(subscription)).map(|(name, _)| name.clone())
    }

    /// Returns whether a lane is assigned to this instance.
    pub(crate) fn has_turn(&self, subscription: &str, lane: u32) -> bool {
        let alive = self.alive.borrow();
        let Some(alive) = &*alive else { return false };
        turn(alive, subscription, lane).is_some_and(|name| *name == self.name)
    }

    /// If `has_turn` is true, resolves once the lane is assigned to this instance. If `has_turn` is false, resolves
    /// once the lane is no longer assigned to this instance.
    pub(crate) async fn turns(&self, subscription: &str, lane: u32, has_turn: bool) {
        let mut alive = self.alive.subscribe();
        while self.has_turn(subscription, lane) != has_turn {
            if alive.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Writes heartbeats and watches the other instances until `stop` is cancelled, then removes the document of this
    /// instance.
    pub(crate) async fn run(
        self,
        store: Arc<dyn EventStore>,
        health: Health,
        shutdown: CancellationToken,
        stop: CancellationToken,
    ) {
        let mut reporter = health.reporter(&format!("instance {}", self.name), &shutdown);
        let mut own = None;
        let mut seen = BTreeMap::new();
        let mut history = store.history();
        let mut counted_at = Instant::now();
        loop {
            // If this heartbeat was written early, the other instances have not had time for their own heartbeats.
            // In that case, missed heartbeats are not counted.
            let counts = counted_at.elapsed() >= HEARTBEAT;
            if counts {
                counted_at = Instant::now();
            }
            if store.history() != history {
                // After a restore, the document of this instance may have an older version than the version known here.
                (history, own) = (store.history(), None);
            }
            // An instance that is stopping asks for no more lanes. Its workers release the lanes that they hold.
            let follows = if shutdown.is_cancelled() { BTreeSet::new() } else { self.follows().clone() };
            match self.beat(&*store, &follows, &mut own, &mut seen, counts).await {
                Ok(()) => reporter.fine(),
                Err(trouble) => reporter.trouble(trouble),
            }
            tokio::select! {
                () = tokio::time::sleep(HEARTBEAT) => {}
                () = self.changed.notified() => {}
                () = shutdown.cancelled(), if !shutdown.is_cancelled() => {}
                () = stop.cancelled() => break,
            }
        }
        let leave = Put { key: self.key(), expected: None, body: None, due: None };
        // If this commit fails, the other instances notice the missing heartbeats, as after a crash.
        _ = store.commit(Commit { appends: Vec::new(), puts: vec![leave] }).await;
        health.set(&format!("instance {}", self.name), crate::health::State::Stopped);
    }

    fn key(&self) -> DocumentKey {
        DocumentKey::new(INSTANCES, self.name.clone())
    }

    async fn beat(
        &self,
        store: &dyn EventStore,
        follows: &BTreeSet<Arc<str>>,
        own: &mut Option<i64>,
        seen: &mut BTreeMap<Arc<str>, Seen>,
        counts: bool,
    ) -> Result<(), String> {
        let heartbeat = Heartbeat { follows: follows.clone(), at: store.clock().now() };
        let body = serde_json::to_string(&heartbeat).map_err(|error| error.to_string())?;
        let put = Put { key: self.key(), expected: *own, body: Some(body.into()), due: None };
        let put = store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await;
        let known = own.take();
        match put {
            Ok(_) => *own = known.map(|version| version + 1),
            Err(CommitError::DocumentConflict { .. }) => {
                return Err(format!(
                    "another process runs as instance {:?}: give each instance its own name",
                    self.name
                ));
            }
            Err(error) => return Err(error.to_string()),
        }
        let found = store.scan(INSTANCES, &Scan::After("".into()), INSTANCES_MAX).await;
        let found = found.map_err(|error| error.to_string())?;
        let forgotten = look(&found, seen, counts);
        *own = found.iter().find(|document| document.key.id == self.name).map(|document| document.version);
        let living = seen.iter().filter(|(name, seen)| seen.missed < MISSED_MAX || **name == self.name);
        let alive: BTreeMap<_, _> = living.map(|(name, seen)| (name.clone(), seen.follows.clone())).collect();
        self.alive.send_replace(Some(Arc::new(alive)));
        if !forgotten.is_empty() {
            // If one of these instances turns out to be alive, the commit fails and removes nothing. A later heartbeat
            // tries again.
            forget(store, forgotten).await.map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Removes the documents of dead instances, and the offsets of the local buses inside these instances.
async fn forget(store: &dyn EventStore, mut forgotten: Vec<Put>) -> Result<(), CommitError> {
    let checkpoints = store.scan(CHECKPOINTS, &Scan::After("".into()), CHECKPOINTS_MAX).await;
    let checkpoints = checkpoints.map_err(|error| CommitError::Unavailable(error.to_string()))?;
    // A checkpoint is matched by its contents and never by its name, because the name of an instance may look like a
    // generation of a read model.
    let of_forgotten = |found: &Document| {
        let checkpoint = serde_json::from_str::<Checkpoint>(&found.body).ok();
        let home = checkpoint.and_then(|checkpoint| checkpoint.home);
        home.is_some_and(|home| forgotten.iter().any(|put| put.key.id == home))
    };
    let remove = |found: Document| Put { key: found.key, expected: Some(found.version), body: None, due: None };
    let left = checkpoints.into_iter().filter(of_forgotten).take(COMMIT_ROWS_MAX - INSTANCES_MAX).map(remove);
    let left: Vec<_> = left.collect();
    forgotten.extend(left);
    store.commit(Commit { appends: Vec::new(), puts: forgotten }).await.map(drop)
}

/// Records the heartbeats that were found. Returns the puts that remove instances which have sent no heartbeat for a
/// long time.
fn look(found: &[Document], seen: &mut BTreeMap<Arc<str>, Seen>, counts: bool) -> Vec<Put> {
    seen.retain(|name, _| found.iter().any(|document| document.key.id == *name));
    let mut forgotten = Vec::new();
    for document in found {
        let entry = seen.entry(document.key.id.clone());
        let entry = entry.or_insert_with(|| Seen { version: 0, missed: 0, follows: BTreeSet::new() });
        if entry.version == document.version {
            entry.missed = entry.missed.saturating_add(u32::from(counts));
        } else {
            // If the document of an instance does not parse, this build assumes that the instance follows no
            // subscription.
            let heartbeat: Result<Heartbeat, _> = serde_json::from_str(&document.body);
            let follows = heartbeat.map(|heartbeat| heartbeat.follows).unwrap_or_default();
            *entry = Seen { version: document.version, missed: 0, follows };
        }
        if entry.missed >= FORGOTTEN {
            let key = document.key.clone();
            let expected = Some(document.version);
            forgotten.push(Put { key, expected, body: None, due: None });
        }
    }
    forgotten
}

/// Returns the instance to which a lane is assigned. The assignment starts at a different instance for each
/// subscription, so that subscriptions with a single lane are spread over the instances too.
fn turn<'a>(alive: &'a BTreeMap<Arc<str>, BTreeSet<Arc<str>>>, subscription: &str, lane: u32) -> Option<&'a Arc<str>> {
    let members: Vec<_> =
        alive.iter().filter(|(_, follows)| follows.contains(subscription)).map(|(name, _)| name).collect();
    let all: BTreeSet<_> = alive.values().flatten().collect();
    let first = all.iter().position(|known| ***known == *subscription)?;
    members.get((first + lane as usize) % members.len().max(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alive(names: &[&str]) -> BTreeMap<Arc<str>, BTreeSet<Arc<str>>> {
        names.iter().map(|name| (Arc::from(*name), BTreeSet::from([Arc::from("report")]))).collect()
    }

    #[test]
    fn lanes_are_spread_evenly_over_instances() {
        let mut three = alive(&["a", "b", "c"]);
        three.insert("idle".into(), BTreeSet::new());
        let mut counts = BTreeMap::new();
        for lane in 0..8 {
            *counts.entry(turn(&three, "report", lane).unwrap_or_else(|| panic!("lane {lane}"))).or_insert(0) += 1;
        }
        let mut shares: Vec<_> = counts.into_values().collect();
        shares.sort_unstable();
        assert_eq!(shares, [2, 3, 3]);
        assert_eq!(turn(&alive(&[]), "report", 0), None);
        let relays = || ["order.relay", "payment.relay", "stock.relay"].map(Arc::from);
        let two = BTreeMap::from(["a", "b"].map(|name| (Arc::from(name), BTreeSet::from(relays()))));
        assert_eq!(relays().map(|relay| turn(&two, &relay, 0).cloned()), ["a", "b", "a"].map(|name| Some(name.into())));
    }

    #[test]
    fn silent_instance_is_given_up_and_later_forgotten() {
        let document = |version| Document {
            key: DocumentKey::new(INSTANCES, "a"),
            version,
            body: r#"{"follows":["report"],"at":"2026-01-01T00:00:00Z"}"#.into(),
            due: None,
        };
        let mut seen = BTreeMap::new();
        for _ in 0..=FORGOTTEN {
            assert!(seen.get("a").is_none_or(|seen: &Seen| seen.missed < FORGOTTEN));
            let forgotten = look(&[document(1)], &mut seen, true);
            assert_eq!(forgotten.len(), usize::from(seen["a"].missed == FORGOTTEN));
        }
        look(&[document(2)], &mut seen, true);
        look(&[document(2)], &mut seen, false);
        assert_eq!(seen["a"].missed, 0);
    }
}
