//! The number of lanes of a subscription or relay, as recorded in the store, and changes of that number.
//!
//! The checkpoint of each lane records the number. If there are several lanes, one commit creates all their
//! checkpoints. A single lane uses the same document as the first of several lanes, and the first commit of that single
//! lane may create the document. If the checkpoint of a lane is missing or records another number, the lane was
//! therefore replaced, and no worker follows it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::TryStreamExt;

use crate::{
    bus::Ends,
    commit::{COMMIT_ROWS_MAX, Commit, CommitError, Document, DocumentKey, Put},
    event::Position,
    follow::{
        checkpoint::{CHECKPOINTS, Checkpoint, Lane},
        parking::{self, DeadLetters},
        peer::Peer,
        worker::{Stop, Worker},
    },
    store::{EventStore, StoreError, pages},
};

/// The pause before a retry, after another process has moved a lane.
const RACED: Duration = Duration::from_millis(20);
/// The maximum number of lanes of one subscription. The number is limited because each lane is a task and a document,
/// and because one commit writes all these documents.
pub(crate) const LANES_MAX: u32 = 1_000;
/// How often to check whether another instance still follows the old lanes.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Where a subscription without a checkpoint starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The subscription starts at the first event of the log.
    Beginning,
    /// The subscription starts at the first event that is recorded from now on.
    Now,
    /// The subscription starts after this position.
    After(Position),
}

impl Start {
    /// Returns the position in the current log after which the subscription starts.
    pub(crate) async fn position(self, store: &dyn EventStore) -> Result<Position, StoreError> {
        Ok(match self {
            Self::Beginning => Position::START,
            Self::After(position) => position,
            Self::Now => store.status().await?.head,
        })
    }
}

/// The lanes of one subscription or relay.
pub(crate) struct Lanes<'a> {
    pub store: &'a Arc<dyn EventStore>,
    pub name: &'a str,
    /// The number of lanes that the program requests.
    pub wanted: u32,
    /// Where lanes without a checkpoint start.
    pub start: Start,
}

/// A lane as stored.
struct StoredLane {
    index: u32,
    document: Document,
    checkpoint: Checkpoint,
}

/// The existing lanes, if their number differs from the requested number. Each of these lanes has a checkpoint.
pub(crate) struct OldLanes(Vec<StoredLane>);

impl OldLanes {
    pub fn count(&self) -> u32 {
        self.0.len() as u32
    }

    /// Returns the position of the lane that is furthest ahead.
    pub fn furthest(&self) -> Position {
        Position(self.0.iter().map(|lane| lane.checkpoint.next).max().unwrap_or_default())
    }

    /// Returns the reason why these lanes cannot be finished yet, or `None` if they can be finished now.
    pub fn waits_for(&self, instance: Option<&Peer>, name: &str) -> Option<String> {
        let count = self.count();
        if self.0.iter().any(|lane| lane.checkpoint.paused) {
            return Some(format!("an operator has paused the subscription, which had {count} lanes until now"));
        }
        let instance = instance?;
        let mut holders = self.0.iter().filter_map(|lane| lane.checkpoint.holder.as_ref());
        let holder = holders.find(|holder| *holder != instance.name() && instance.is_alive(holder)).cloned();
        // During a handover between two instances, a lane has no holder.
        let other = holder.or_else(|| instance.other_follower(name))?;
        Some(format!(
            "instance {other} runs {count} lanes, and this build has another number: this build takes over when \
             {other} ends"
        ))
    }
}

/// Claims a lane at its checkpoint and fences the worker that followed the lane before.
pub(crate) async fn take(worker: &mut Worker, instance: Option<&Peer>) -> Result<Position, Stop> {
    worker.history = worker.store.history();
    let lane = &mut worker.lanes[0];
    let Some(next) = lane.load(&*worker.store).await? else { return Err(Stop::Gone(lane.key.clone())) };
    lane.holder = instance.map(|instance| instance.name().clone());
    lane.epoch += 1;
    worker.put_checkpoint(next).await?;
    worker.load_parked().await?;
    Ok(Position(next))
}

impl Lanes<'_> {
    /// Records the requested number of lanes, unless existing lanes have to change first. No lane has to change if no
    /// lane has been followed yet, or if an earlier release followed the same number of lanes. If lanes have to change,
    /// returns the existing lanes.
    pub async fn settle(&self) -> Result<Option<OldLanes>, Stop> {
        loop {
            let stored = self.stored().await?;
            match self.known(&stored)? {
                Some(known) if known != self.wanted => return Ok(Some(OldLanes(stored))),
                Some(_) if stored.iter().all(|lane| lane.checkpoint.lanes.is_some()) => return Ok(None),
                // The first commit of the lane records the number.
                None if self.wanted == 1 && stored.is_empty() => return Ok(None),
                _ => {}
            }
            let start = self.start.position(&**self.store).await?;
            let now = self.store.clock().now();
            let noted = |index: u32| match stored.iter().find(|lane| lane.index == index) {
                Some(lane) => self.put(index, lane.document.version, Some(lane.checkpoint.clone())),
                None => self.put(index, 0, Some(Lane::new("", None).checkpoint(start, now))),
            };
            if self.commit((0..self.wanted).map(noted).collect()).await? {
                return Ok(None);
            }
            // The commit failed, because another process has committed first or follows the lanes now.
            tokio::time::sleep(RACED).await;
        }
    }

    /// Returns the recorded number of lanes; `None` if there is no lane yet, or if an earlier release followed as many
    /// lanes as are now requested.
    fn known(&self, stored: &[StoredLane]) -> Result<Option<u32>, Stop> {
        let found = stored.last().map_or(0, |lane| lane.index + 1);
        let numbers: BTreeSet<u32> = stored.iter().filter_map(|lane| lane.checkpoint.lanes).collect();
        match (numbers.first(), numbers.len()) {
            (Some(known), 1) if *known == found && stored.len() == found as usize => Ok(Some(*known)),
            (Some(known), _) => Err(self.refused(&format!(
                "only {} of {known} checkpoints exist, with {} different numbers of lanes: checkpoints were removed \
                 or changed by hand",
                stored.len(),
                numbers.len()
            ))),
            (None, _) if found == 0 || found == self.wanted => Ok(None),
            // If a process was killed within the first second of a lane, the lane has no checkpoint, so the number of
            // lanes is unknown.
            (None, _) => Err(self.refused(&format!(
                "an earlier release ran {found} lanes without recording their number, and this build has {}: start \
                 this build once with lanes({found}), then change the number",
                self.wanted
            ))),
        }
    }

    /// Changes the number of lanes if all existing lanes are at this position. One commit removes the old checkpoints,
    /// creates the new checkpoints at this position, and moves parked messages to the new lane of their key. Returns
    /// whether the commit succeeded.
    pub async fn change(&self, upto: Position) -> Result<bool, Stop> {
        let stored = self.stored().await?;
        if stored.iter().any(|lane| lane.checkpoint.next != upto.0 || lane.checkpoint.paused) {
            return Ok(false);
        }
        let epoch = stored.iter().map(|lane| lane.checkpoint.epoch).max().unwrap_or_default();
        let event = stored.iter().filter_map(|lane| lane.checkpoint.event).max_by_key(|given| given.position);
        let mut taken = Ends::default();
        stored.iter().for_each(|lane| taken.reach(&lane.checkpoint.taken));
        let now = self.store.clock().now();
        let changed = |index: u32| {
            let version = stored.get(index as usize).map_or(0, |lane| lane.document.version);
            let lane = Checkpoint { epoch, event, taken: taken.clone(), ..Lane::new("", None).checkpoint(upto, now) };
            self.put(index, version, (index < self.wanted).then_some(lane))
        };
        let mut puts: Vec<Put> = (0..self.wanted.max(stored.len() as u32)).map(changed).collect();
        for document in DeadLetters::new(self.store.clone()).documents(self.name).await? {
            puts.extend(parking::moved(document, self.name, self.wanted));
        }
        if puts.len() > COMMIT_ROWS_MAX {
            return Err(self.refused(&format!(
                "changing the number of lanes from {} to {} takes {} documents in one commit, and the limit is \
                 {COMMIT_ROWS_MAX}: redrive or drop parked messages first",
                stored.len(),
                self.wanted,
                puts.len()
            )));
        }
        self.commit(puts).await
    }

    fn refused(&self, reason: &str) -> Stop {
        Stop::Lanes(format!("{}: {reason}", self.name))
    }

    /// Returns the checkpoints of the lanes, in the order of the lanes.
    async fn stored(&self) -> Result<Vec<StoredLane>, Stop> {
        let prefix = format!("{}/", self.name);
        let mut stored = Vec::new();
        let mut checkpoints = pages::collection(&**self.store, CHECKPOINTS, &prefix);
        while let Some(document) = checkpoints.try_next().await? {
            let Some(lane) = document.key.id.strip_prefix(&prefix) else { break };
            let Ok(index) = lane.parse() else { continue };
            let checkpoint: Checkpoint = serde_json::from_str(&document.body)
                .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", document.key)))?;
            stored.push(StoredLane { index, document, checkpoint });
        }
        stored.sort_unstable_by_key(|lane| lane.index);
        Ok(stored)
    }

    fn put(&self, index: u32, version: i64, checkpoint: Option<Checkpoint>) -> Put {
        let noted = checkpoint.map(|checkpoint| Checkpoint { lanes: Some(self.wanted), ..checkpoint });
        let body = noted.map(|noted| serde_json::to_string(&noted).unwrap_or_default().into());
        let key = DocumentKey::new(CHECKPOINTS, format!("{}/{index}", self.name));
        Put { key, expected: Some(version), body, due: None }
    }

    /// Returns whether the commit succeeded. Returns false if a lane has moved. An unknown outcome is an error; the
    /// next read shows the actual result.
    async fn commit(&self, puts: Vec<Put>) -> Result<bool, Stop> {
        match self.store.commit(Commit { appends: Vec::new(), puts }).await {
            Ok(_) => Ok(true),
            Err(CommitError::DocumentConflict { .. }) => Ok(false),
            Err(error) => Err(StoreError::Unavailable(error.to_string()).into()),
        }
    }
}
