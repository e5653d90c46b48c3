//! Checkpoints. A checkpoint records the progress of a subscription or a consumer. A subscription divides the log into
//! lanes by a hash of the stream id. There is one checkpoint document per lane of the log, and one per partition of a
//! topic.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    bus::{Bookmark, Ends, Message, Undecodable},
    commit::DocumentKey,
    event::Position,
    follow::deduplication::{Deduplication, is_zero},
    store::{EventStore, LogQuery, StoreError},
};

/// The in-memory checkpoint of a lane of the log or of a partition of a topic.
#[derive(Clone, Debug)]
pub(crate) struct Lane {
    /// The key of the checkpoint document.
    pub key: DocumentKey,
    /// The name under which messages of this lane are parked.
    pub place: Arc<str>,
    pub version: i64,
    pub next: i64,
    pub incarnation: Option<Arc<str>>,
    /// The instance that follows the lane, if several instances share the store.
    pub holder: Option<Arc<str>>,
    /// The instance that a local bus belongs to. Set only for a partition of a local bus in a process that shares its
    /// store.
    pub home: Option<Arc<str>>,
    /// The number of lanes; set only for a lane of the log.
    pub lanes: Option<u32>,
    /// How many times an instance has claimed the lane.
    pub epoch: i64,
    /// Whether an operator has paused the lane.
    pub paused: bool,
    /// The id of the message before `next`; set only for a partition.
    pub last: Option<Uuid>,
    pub marks: Deduplication,
    /// The ends up to which the bus has accepted messages; set only for a relay.
    pub taken: Ends,
    /// The last event delivered to the lane; set only for a lane of the log.
    pub event: Option<LastEvent>,
}

/// The last event delivered to a lane of the log. As long as the log contains this event, the lane is not ahead of the
/// log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastEvent {
    /// The position of the event.
    pub position: Position,
    /// The id of the event.
    pub id: Uuid,
}

impl LastEvent {
    /// Returns whether the log contains the event.
    pub async fn is_in(self, store: &dyn EventStore) -> Result<bool, StoreError> {
        let page = store.read_log(&LogQuery::all(), Position(self.position.0 - 1), 1).await?;
        Ok(page.events.first().is_some_and(|event| event.position == self.position && event.id == self.id))
    }
}

/// The body of a checkpoint document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The position after which the lane continues. For a partition, the offset at which the partition continues.
    pub next: i64,
    /// The incarnation of the topic that the offset belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Arc<str>>,
    /// The instance that follows the lane, if several instances share the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Arc<str>>,
    /// The instance that a local bus belongs to. Set only for a partition of a local bus in a process that shares its
    /// store. The offsets of such a partition are meaningless once that instance is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Arc<str>>,
    /// The number of lanes of the subscription; set only for a lane of the log. Earlier releases did not record the
    /// number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u32>,
    /// How many times an instance has claimed the lane.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub epoch: i64,
    /// Whether an operator has paused the lane. No worker follows a paused lane until an operator resumes it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The id of the message before `next`; set only for a partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Uuid>,
    /// The progress of the messages of each relay, used for deduplication; set only for a partition.
    #[serde(default, skip_serializing_if = "Deduplication::is_empty")]
    pub marks: Deduplication,
    /// The last event delivered to the lane; set only for a lane of the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<LastEvent>,
    /// The ends up to which the bus has accepted messages; set only for a relay.
    #[serde(default, skip_serializing_if = "Ends::is_empty")]
    pub taken: Ends,
    /// When the checkpoint last moved.
    pub at: DateTime<Utc>,
}

/// The collection of all checkpoints.
pub const CHECKPOINTS: &str = "checkpoint";

/// A message with its lane, and with the value of the lane's checkpoint after the message.
pub(crate) struct Item {
    pub lane: usize,
    pub next: i64,
    pub key: Arc<str>,
    pub message: Result<Message, Undecodable>,
}

impl Item {
    pub fn id(&self) -> uuid::Uuid {
        self.message.as_ref().map_or_else(Undecodable::id, |message| message.id)
    }
}

impl Lane {
    pub fn new(id: &str, incarnation: Option<Arc<str>>) -> Self {
        let key = DocumentKey::new(CHECKPOINTS, id);
        let marks = Deduplication::default();
        let place = key.id.clone();
        let version = 0;
        let next = 0;
        let epoch = 0;
        let paused = false;
        Self {
            key,
            place,
            version,
            next,
            incarnation,
            holder: None,
            home: None,
            lanes: None,
            epoch,
            paused,
            last: None,
            marks,
            taken: Ends::default(),
            event: None,
        }
    }

    /// Reads the checkpoint. Returns `None` if the checkpoint does not exist, or if it belongs to another incarnation
    /// of the topic or to another number of lanes.
    pub async fn load(&mut self, store: &dyn EventStore) -> Result<Option<i64>, StoreError> {
        let found = store.document(&self.key).await?;
        let Some(document) = found else {
            (self.version, self.holder, self.paused) = (0, None, false);
            return Ok(None);
        };
        let checkpoint: Checkpoint = serde_json::from_str(&document.body)
            .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", self.key)))?;
        (self.version, self.holder, self.epoch) = (document.version, checkpoint.holder, checkpoint.epoch);
        self.paused = checkpoint.paused;
        // The deduplication marks are kept even if the topic was wiped, because a relay may send messages again that
        // were already handled.
        self.marks = checkpoint.marks;
        self.taken = checkpoint.taken;
        if checkpoint.incarnation != self.incarnation || self.is_of_others(checkpoint.lanes) {
            return Ok(None);
        }
        (self.next, self.last) = (checkpoint.next, checkpoint.last);
        self.event = checkpoint.event;
        let Some(given) = self.event.filter(|given| given.position.0 <= checkpoint.next) else {
            return Ok(Some(checkpoint.next));
        };
        if !given.is_in(store).await? {
            self.next = last_before(store, checkpoint.at, given.position).await?.0;
            self.event = None;
            tracing::error!(
                checkpoint = %self.key, position = checkpoint.next, event = %given.id, goes_on_after = self.next,
                "the checkpoint is beyond the end of the log, because the log was restored to an earlier moment: \
                 events recorded since then will be handled; run `annals verify`"
            );
        }
        Ok(Some(self.next))
    }

    /// Call this method if [`load`](Self::load) found no checkpoint. Returns true if the lane was replaced, and false
    /// if the lane is new. `of` is the number of lanes. If there are several lanes, all their checkpoints are created
    /// together, so a missing checkpoint means that the lane was replaced. If the document exists, the lane was
    /// replaced too, because the document records another number of lanes.
    pub fn is_replaced(&self, of: u32) -> bool {
        of > 1 || self.version > 0
    }

    /// Returns whether the stored number of lanes differs from the number that this lane expects.
    fn is_of_others(&self, lanes: Option<u32>) -> bool {
        lanes.zip(self.lanes).is_some_and(|(stored, own)| stored != own)
    }

    /// Returns the bookmark from which a consumer of the partition continues.
    pub fn bookmark(&self) -> Option<Bookmark> {
        (self.version > 0 && self.next > 0).then_some(Bookmark { next: self.next, last: self.last })
    }

    /// Restarts the offsets after the topic was wiped. Also marks a gap, because some of the removed messages may never
    /// have arrived.
    pub fn start_over(&mut self) {
        (self.next, self.last) = (0, None);
        self.marks.interrupt();
    }

    /// Moves the checkpoint past a message.
    pub fn pass(&mut self, item: &Item) {
        self.next = item.next;
        if self.incarnation.is_some() {
            self.last = Some(item.id());
            if let Ok(message) = &item.message {
                self.marks.pass(message);
            }
        } else if let Ok(message) = &item.message {
            self.event = Some(LastEvent { position: message.position, id: message.id });
        }
    }

    /// Returns whether the checkpoint lies before `next`. If the lane has no stored checkpoint, the result is always
    /// true, so that the first position is stored, and `Start::Now` means the same position after a restart.
    pub fn is_before(&self, next: i64) -> bool {
        self.next < next || self.version == 0
    }

    /// Returns the body of the checkpoint document.
    pub fn body(&self, at: DateTime<Utc>) -> Arc<str> {
        serde_json::to_string(&self.checkpoint(Position(self.next), at)).unwrap_or_default().into()
    }

    /// Returns the contents of the checkpoint document at a position.
    pub fn checkpoint(&self, next: Position, at: DateTime<Utc>) -> Checkpoint {
        Checkpoint {
            next: next.0,
            incarnation: self.incarnation.clone(),
            holder: self.holder.clone(),
            home: self.home.clone(),
            lanes: self.lanes,
            epoch: self.epoch,
            paused: self.paused,
            last: self.last,
            marks: self.marks.clone(),
            taken: self.taken.clone(),
            event: self.event,
            at,
        }
    }
}

/// Returns the last position before `before` whose event was recorded no later than `at`. The times of the events never
/// decrease along the log.
async fn last_before(store: &dyn EventStore, at: DateTime<Utc>, before: Position) -> Result<Position, StoreError> {
    let mut low = 0;
    let mut high = before.0 - 1;
    while low < high {
        let middle = low + (high - low) / 2;
        let page = store.read_log(&LogQuery::all(), Position(middle), 1).await?;
        match page.events.first() {
            Some(event) if event.recorded_at <= at && event.position < before => low = event.position.0.max(middle + 1),
            _ => high = middle,
        }
    }
    Ok(Position(low.min(high)))
}

/// Returns the lane of a stream. The lane is computed with a hash (FNV-1a, 32 bits) that must never change, because
/// checkpoints depend on the result.
pub(crate) fn lane_of(key: &str, lanes: u32) -> u32 {
    let hash = key.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash % lanes
}
