//! How far a subscription or a consumer has come: a document per lane of the log or partition of a topic.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    bus::{Bookmark, Ends},
    commit::DocumentKey,
    event::Position,
    marks::Marks,
    store::{EventStore, LogQuery, StoreError},
    worker::Item,
};

/// The checkpoint of a lane of the log, or of a partition of a topic.
#[derive(Clone, Debug)]
pub(crate) struct Lane {
    /// Of the checkpoint.
    pub key: DocumentKey,
    /// What messages are parked under.
    pub place: Arc<str>,
    pub version: i64,
    pub next: i64,
    pub incarnation: Option<Arc<str>>,
    /// The instance that follows it, where several share the store.
    pub holder: Option<Arc<str>>,
    /// Of a partition of a bus inside a process that shares the store: the instance whose bus that is.
    pub home: Option<Arc<str>>,
    /// Of a lane of the log: how many lanes there are.
    pub lanes: Option<u32>,
    /// How often it was taken.
    pub epoch: i64,
    /// Whether an operator holds it up.
    pub paused: bool,
    /// Of a partition: the message before `next`.
    pub last: Option<Uuid>,
    pub marks: Marks,
    /// Of a relay: up to where the bus has taken messages.
    pub taken: Ends,
    /// Of a lane of the log: the last event that it was given.
    pub event: Option<Given>,
}

/// The last event that a lane of the log was given: as long as the log has it, the lane is not beyond the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Its position.
    pub position: Position,
    /// Its id.
    pub id: Uuid,
}

impl Given {
    /// Whether the log has it.
    pub async fn is_in(self, store: &dyn EventStore) -> Result<bool, StoreError> {
        let page = store.read_log(&LogQuery::all(), Position(self.position.0 - 1), 1).await?;
        Ok(page.events.first().is_some_and(|event| event.position == self.position && event.id == self.id))
    }
}

/// The body of a checkpoint document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Read on after this position; for a partition, from this offset.
    pub next: i64,
    /// The incarnation of the topic that the offset belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Arc<str>>,
    /// The instance that follows the lane, where several share the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Arc<str>>,
    /// Of a partition of a bus inside a process that shares the store: the instance whose bus that is. Its offsets mean nothing once
    /// that instance has gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub home: Option<Arc<str>>,
    /// Of a lane of the log: how many lanes there are under the name; earlier releases did not note it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u32>,
    /// How often an instance has taken the lane.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub epoch: i64,
    /// Whether an operator holds the lane up: nobody follows it until that is taken back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// Of a partition: the id of the message before `next`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<Uuid>,
    /// Of a partition: how far the messages of each relay have come.
    #[serde(default, skip_serializing_if = "Marks::is_empty")]
    pub marks: Marks,
    /// Of a lane of the log: the last event that it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<Given>,
    /// Of a relay: up to where the bus has taken messages.
    #[serde(default, skip_serializing_if = "Ends::is_empty")]
    pub taken: Ends,
    /// When it was last moved.
    pub at: DateTime<Utc>,
}

pub(crate) fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The collection of all checkpoints.
pub const CHECKPOINTS: &str = "checkpoint";

impl Lane {
    pub fn new(id: &str, incarnation: Option<Arc<str>>) -> Self {
        let key = DocumentKey::new(CHECKPOINTS, id);
        let marks = Marks::default();
        let (place, version, next, epoch, paused) = (key.id.clone(), 0, 0, 0, false);
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

    /// Reads the checkpoint; `None` if there is none, or one of another incarnation or number of lanes.
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
        // What a relay sends again after a topic was wiped has been here all the same.
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
                "the checkpoint stands beyond the end of the log, which was restored without it: what was recorded since the \
                 checkpoint was written is handled; run `annals verify`"
            );
        }
        Ok(Some(self.next))
    }

    /// Whether a lane of so many that was loaded without a checkpoint is not a new one: several are created together, and what a
    /// document without one says is another number.
    pub fn is_replaced(&self, of: u32) -> bool {
        of > 1 || self.version > 0
    }

    /// Whether a number of lanes is another one than this lane's.
    fn is_of_others(&self, lanes: Option<u32>) -> bool {
        lanes.zip(self.lanes).is_some_and(|(stored, own)| stored != own)
    }

    /// Where a consumer of the partition goes on.
    pub fn bookmark(&self) -> Option<Bookmark> {
        (self.version > 0 && self.next > 0).then_some(Bookmark { next: self.next, last: self.last })
    }

    /// The topic was wiped: its offsets start over, and some of what it had may never have come.
    pub fn start_over(&mut self) {
        (self.next, self.last) = (0, None);
        self.marks.interrupt();
    }

    /// Moves behind a message.
    pub fn pass(&mut self, item: &Item) {
        self.next = item.next;
        if self.incarnation.is_some() {
            self.last = Some(item.id());
            if let Ok(message) = &item.message {
                self.marks.pass(message);
            }
        } else if let Ok(message) = &item.message {
            self.event = Some(Given { position: message.position, id: message.id });
        }
    }

    /// A lane without a checkpoint is before any place: "from now on" must mean the same after a restart.
    pub fn is_before(&self, next: i64) -> bool {
        self.next < next || self.version == 0
    }

    /// The body of its document.
    pub fn body(&self, at: DateTime<Utc>) -> Arc<str> {
        serde_json::to_string(&self.checkpoint(Position(self.next), at)).unwrap_or_default().into()
    }

    /// What its document says at a position.
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

/// The last position before this one whose event was recorded by then; the log's times do not fall.
async fn last_before(store: &dyn EventStore, at: DateTime<Utc>, before: Position) -> Result<Position, StoreError> {
    let (mut low, mut high) = (0, before.0 - 1);
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
