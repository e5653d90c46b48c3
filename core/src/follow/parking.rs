//! Parking of messages that could not be handled. A parked message is stored in a document until a retry succeeds.
//! Later messages with the same key are parked behind it, so that they keep their order. Messages with other keys
//! continue.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    bus::{Message, Undecodable},
    commit::{CommitError, DOCUMENT_BYTES_MAX, DOCUMENT_ID_BYTES_MAX, Document, DocumentKey, Put, check_json},
    event::{Position, named_id},
    follow::checkpoint::lane_of,
    store::{EventStore, StoreError, pages},
};

/// The maximum number of parked messages of one worker. At this limit, the worker handles no more messages.
pub const PARKED_MAX: usize = 100_000;
/// The maximum length of a key in the id of a parked document. A longer key is replaced by a short form, because the id
/// of the document also contains the sequence and the lane.
const KEY_BYTES_MAX: usize = DOCUMENT_ID_BYTES_MAX - 64;
/// The prefix of the keys of lost messages. A message whose own key has this prefix is parked under another key.
const LOST_KEY: &str = "lost messages of ";
/// The maximum size of the JSON of a parked message. Of a larger message, only the first bytes are parked. Otherwise no
/// store would accept the document, and the worker would retry forever.
const PAYLOAD_BYTES_MAX: usize = DOCUMENT_BYTES_MAX - 100_000;

/// The body of a parked message's document.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parked {
    /// The subscription that could not handle the message.
    pub subscription: Arc<str>,
    /// The lane or partition of the message, given as the document id of its checkpoint.
    pub lane: Arc<str>,
    /// The key of the message. Later messages with the same key wait behind this message.
    pub key: Arc<str>,
    /// The reason for the last failure; empty for a message that only waits behind another message.
    pub reason: String,
    /// The number of failed attempts to handle the message; 0 for a message that only waits behind another message. An
    /// attempt during which the store was unavailable does not count, and the count starts again once a build can
    /// handle the message.
    pub attempts: u32,
    /// Whether the message waits for another build, because the build that parked the message cannot handle it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_build: bool,
    /// When the message was parked.
    pub parked_at: DateTime<Utc>,
    /// The position of the event. If a worker reads the event again, the position shows that the event is already
    /// parked.
    #[serde(default)]
    pub position: i64,
    /// The message. For a payload that is not a message, this is an object with the field `raw`, which holds the
    /// payload in hexadecimal.
    pub message: Box<RawValue>,
}

/// A range of messages that a bus removed before they were read, as recorded in a dead letter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// The topic of the messages.
    pub topic: Arc<str>,
    /// The partition of the messages.
    pub partition: u32,
    /// The offset of the first lost message.
    pub from: i64,
    /// The offset after the last lost message.
    pub to: i64,
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { topic, partition, from, to } = self;
        write!(
            f,
            "offsets {from} to {} of {topic}, partition {partition}, were removed before they were read: have the \
             sender send them again, then drop this dead letter",
            to - 1
        )
    }
}

impl Lost {
    /// The key under which the loss is recorded. No message waits behind this key.
    pub(crate) fn key(&self) -> Arc<str> {
        format!("{LOST_KEY}{}/{}", self.topic, self.partition).into()
    }
}

impl Parked {
    /// Returns the range of lost messages, if this dead letter records a loss.
    pub fn lost(&self) -> Option<Lost> {
        #[derive(Deserialize)]
        struct LostBody {
            lost: Lost,
        }
        self.key
            .starts_with(LOST_KEY)
            .then(|| serde_json::from_str::<LostBody>(self.message.get()).ok())?
            .map(|of| of.lost)
    }

    /// Returns the message, or `None` if the payload is not a message.
    pub fn message(&self) -> Option<Message> {
        serde_json::from_str(self.message.get()).ok()
    }

    pub(crate) fn payload(message: &Result<Message, Undecodable>) -> Box<RawValue> {
        let raw = |raw: &str| serde_json::value::to_raw_value(&serde_json::json!({ "raw": raw }));
        let json = match message {
            Ok(message) => serde_json::value::to_raw_value(message),
            Err(undecodable) => raw(&undecodable.raw),
        };
        let json = json.unwrap_or_default();
        if json.get().len() <= PAYLOAD_BYTES_MAX && check_json(json.get()).is_ok() {
            return json;
        }
        let whole = match message {
            Ok(_) => json.get().bytes().map(|byte| format!("{byte:02x}")).collect(),
            Err(undecodable) => undecodable.raw.clone(),
        };
        let kept: String = whole.chars().filter(char::is_ascii_hexdigit).take(PAYLOAD_BYTES_MAX).collect();
        raw(&kept).unwrap_or_default()
    }
}

/// The parked messages of one worker, by key. Only the location of each message is in memory, not the message itself.
/// Clones share this data until one clone changes it.
#[derive(Clone, Default)]
pub(crate) struct ParkedKeys {
    subscription: Arc<str>,
    keys: Arc<HashMap<Arc<str>, VecDeque<ParkedPlace>>>,
    count: usize,
    /// A description of the first loss of messages, if there is one.
    lost: Option<Arc<str>>,
    /// The keys that have a dead letter. A dead letter is a message that is retried only if an operator redrives it.
    dead: Arc<BTreeSet<Arc<str>>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ParkedPlace {
    pub sequence: u64,
    /// The id of the message's document.
    pub id: Arc<str>,
    /// The position of the message in the log that it comes from; 0 if the payload is not a message.
    pub position: i64,
    /// Whether a worker tries the message before it is due. True for a message that only waits behind another message
    /// and was never tried. Also true for a message that waits for another build and was not tried since this entry was
    /// read.
    pub waits: bool,
    /// Whether the message waits for a build that can handle it.
    pub awaits_build: bool,
    /// Whether the message failed and is not retried automatically.
    pub dead: bool,
}

pub(crate) fn collection(subscription: &str) -> Arc<str> {
    format!("parked.{subscription}").into()
}

/// The id of a parked message's document, ordered by key and then by sequence. The id includes the lane, because two
/// lanes may have messages with the same key, and the worker of each lane numbers its messages separately. This happens
/// if a group consumes several topics, or if the number of partitions of a topic was increased.
fn document_id(key: &str, sequence: u64, lane: &str) -> Arc<str> {
    format!("{key} #{sequence:019}.{:08x}", lane_of(lane, u32::MAX)).into()
}

/// Returns the key and the lane of a parked message from its document id: the parts before and after the sequence.
pub(crate) fn key_and_lane(id: &str) -> Option<(&str, &str)> {
    let (key, place) = id.rsplit_once(" #")?;
    Some((key, place.split_once('.')?.1))
}

fn sequence_of(id: &str) -> Option<u64> {
    let (_, place) = id.rsplit_once(" #")?;
    place.split('.').next()?.parse().ok()
}

/// Returns the puts that move a parked message to the lane of its key, if the number of lanes is `lanes`. Returns no
/// puts if the message is already in this lane.
pub(crate) fn moved(document: Document, subscription: &str, lanes: u32) -> Vec<Put> {
    let parked = serde_json::from_str::<Parked>(&document.body).ok();
    let Some((parked, sequence)) = parked.zip(sequence_of(&document.key.id)) else { return Vec::new() };
    let lane: Arc<str> = format!("{subscription}/{}", lane_of(&parked.key, lanes)).into();
    if lane == parked.lane {
        return Vec::new();
    }
    let Document { key, version, due, .. } = document;
    let moved = DocumentKey::new(key.collection.clone(), document_id(&parked.key, sequence, &lane));
    let body = serde_json::to_string(&Parked { lane, ..parked }).unwrap_or_default();
    vec![
        Put { key, expected: Some(version), body: None, due: None },
        Put { key: moved, expected: Some(0), body: Some(body.into()), due },
    ]
}

/// Returns the key under which a message is parked. This is the key of the message itself, unless that key cannot be
/// part of a document id.
pub(crate) fn parking_key(key: &Arc<str>) -> Arc<str> {
    if key.len() <= KEY_BYTES_MAX && !key.contains('\0') && !key.starts_with(LOST_KEY) {
        return key.clone();
    }
    let start: String = key.chars().filter(|character| !character.is_control()).take(100).collect();
    format!("{start}… {}", named_id(Uuid::NAMESPACE_OID, key).simple()).into()
}

impl ParkedKeys {
    pub fn new(subscription: Arc<str>) -> Self {
        Self { subscription, ..Self::default() }
    }

    /// Reads the locations of the messages that are parked on these lanes.
    pub async fn load(&self, store: &dyn EventStore, lanes: &[Arc<str>]) -> Result<Self, StoreError> {
        let mut found = Self::new(self.subscription.clone());
        let collection = collection(&self.subscription);
        let mut documents = pages::collection(store, &collection, "");
        while let Some(document) = documents.try_next().await? {
            let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { continue };
            if let Some(sequence) = sequence_of(&document.key.id).filter(|_| lanes.contains(&parked.lane)) {
                let awaits_build = parked.awaits_build;
                let waits = parked.attempts == 0 || awaits_build;
                if let Some(lost) = parked.lost().filter(|_| found.lost.is_none()) {
                    found.lost = Some(lost.to_string().into());
                }
                let dead = !waits && document.due.is_none();
                let position = parked.position;
                let id = document.key.id;
                found.add(&parked.key, ParkedPlace { sequence, id, position, waits, awaits_build, dead });
            }
        }
        Ok(found)
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn len(&self) -> usize {
        self.count
    }

    /// Returns a description of the first loss of messages that no operator has dealt with yet.
    pub fn lost(&self) -> Option<Arc<str>> {
        self.lost.clone()
    }

    /// Adds the dead letter that records a loss of messages.
    pub fn add_lost(&mut self, key: &Arc<str>, place: ParkedPlace, lost: &Lost) {
        self.add(key, place);
        self.lost.get_or_insert_with(|| lost.to_string().into());
    }

    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    pub fn first(&self, key: &str) -> Option<&ParkedPlace> {
        self.keys.get(key).and_then(|places| places.front())
    }

    /// Returns whether this event is parked.
    pub fn has_event(&self, key: &str, position: i64) -> bool {
        let places = self.keys.get(key).filter(|places| places.back().is_some_and(|last| last.position >= position));
        places.is_some_and(|places| places.iter().any(|place| place.position == position))
    }

    /// Returns the location of the next message to park under this key.
    pub fn next_place(&self, key: &str, lane: &str, position: i64) -> ParkedPlace {
        let last = self.keys.get(key).and_then(|places| places.back());
        let sequence = last.map_or(0, |place| place.sequence + 1);
        let id = document_id(key, sequence, lane);
        let waits = last.is_some();
        ParkedPlace { sequence, id, position, waits, awaits_build: false, dead: false }
    }

    /// Returns whether messages with this key wait for another build. That build may have handled the messages in the
    /// meantime.
    pub fn awaits_build(&self, key: &str) -> bool {
        self.first(key).is_some_and(|first| first.awaits_build)
    }

    /// Returns each key whose first message can be tried at once, because no worker waits until that message is due.
    pub fn freed(&self) -> impl Iterator<Item = &Arc<str>> {
        self.keys.iter().filter(|(_, places)| places.front().is_some_and(|first| first.waits)).map(|(key, _)| key)
    }

    pub fn add(&mut self, key: &Arc<str>, place: ParkedPlace) {
        if place.dead {
            Arc::make_mut(&mut self.dead).insert(key.clone());
        }
        Arc::make_mut(&mut self.keys).entry(key.clone()).or_default().push_back(place);
        self.count += 1;
    }

    /// Removes the first message of the key after the message was handled.
    pub fn release_first(&mut self, key: &str) {
        let keys = Arc::make_mut(&mut self.keys);
        if let Some(places) = keys.get_mut(key) {
            self.count -= usize::from(places.pop_front().is_some());
            if places.is_empty() {
                keys.remove(key);
            }
        }
        self.find_dead(key);
    }

    /// Returns how many keys have a dead letter, and one of these keys.
    pub fn dead(&self) -> Option<(usize, &Arc<str>)> {
        Some((self.dead.len(), self.dead.first()?))
    }

    fn find_dead(&mut self, key: &str) {
        let is_dead = self.keys.get_key_value(key).filter(|(_, places)| places.iter().any(|place| place.dead));
        match is_dead.map(|(key, _)| key.clone()) {
            Some(key) => _ = Arc::make_mut(&mut self.dead).insert(key),
            None if self.dead.contains(key) => _ = Arc::make_mut(&mut self.dead).remove(key),
            None => {}
        }
    }

    /// Records that a retry of the first message of the key failed. If `dead` is true, the message is no longer retried
    /// automatically.
    pub fn tried_first(&mut self, key: &str, awaits_build: bool, dead: bool) {
        let places = Arc::make_mut(&mut self.keys).get_mut(key);
        if let Some(first) = places.and_then(|places| places.front_mut()) {
            first.waits = false;
            first.awaits_build = awaits_build;
            first.dead = dead;
        }
        self.find_dead(key);
    }
}

/// The parked messages of a store, as an operator sees them.
#[derive(Clone)]
pub struct DeadLetters {
    store: Arc<dyn EventStore>,
}

debug_fields!(DeadLetters {});

/// The first message of a parked key.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// The id of the message's document.
    pub id: Arc<str>,
    /// The message and its last failure.
    pub parked: Parked,
    /// When the message is retried automatically; `None` if only a redrive retries it.
    pub retries_at: Option<DateTime<Utc>>,
    /// How many messages with the same key wait behind this message.
    pub behind: usize,
}

impl DeadLetters {
    /// Creates a view of the dead letters of this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store }
    }

    /// Returns the parked keys of a subscription, each represented by its first message.
    pub async fn list(&self, subscription: &str) -> Result<Vec<DeadLetter>, StoreError> {
        let mut letters: Vec<DeadLetter> = Vec::new();
        for document in self.documents(subscription).await? {
            let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { continue };
            let of_key = letters.iter_mut().rev().take_while(|head| head.parked.key == parked.key);
            match of_key.into_iter().find(|head| head.parked.lane == parked.lane) {
                Some(head) => head.behind += 1,
                None => letters.push(DeadLetter { id: document.key.id, parked, retries_at: document.due, behind: 0 }),
            }
        }
        Ok(letters)
    }

    /// Returns the puts that redrive a key, or the one message with this id. Also returns the number of messages that
    /// wait.
    pub(crate) async fn to_redrive(&self, subscription: &str, key: &str) -> Result<(Vec<Put>, usize), CommitError> {
        let documents = self.of_key(subscription, key).await?;
        Ok((heads(&documents).map(|head| due_now(head.clone())).collect(), documents.len()))
    }

    /// Returns the puts that remove the first message of a key, or the message with this id. Also returns the removed
    /// message.
    pub(crate) async fn to_drop(
        &self,
        subscription: &str,
        key: &str,
    ) -> Result<Option<(Vec<Put>, Document)>, CommitError> {
        let mut documents = self.of_key(subscription, key).await?;
        if documents.is_empty() {
            return Ok(None);
        }
        let dropped = documents.remove(0);
        let mut puts: Vec<Put> = heads(&documents).map(|head| due_now(head.clone())).collect();
        puts.push(Put { key: dropped.key.clone(), expected: Some(dropped.version), body: None, due: None });
        Ok(Some((puts, dropped)))
    }

    async fn of_key(&self, subscription: &str, key: &str) -> Result<Vec<Document>, CommitError> {
        let documents = self.documents(subscription).await.map_err(unavailable)?;
        // Lost messages are parked under a key that no message can have.
        let short = parking_key(&key.into());
        let is_of_key = |found: &str| found == key || found == &*short;
        let wanted = |document: &Document| *document.key.id == *key || key_of(document).is_some_and(is_of_key);
        Ok(documents.into_iter().filter(wanted).collect())
    }

    /// Returns the parked messages of a subscription whose events are after this position of the log.
    pub(crate) async fn after(&self, subscription: &str, position: Position) -> Result<Vec<Document>, StoreError> {
        let is_after = |document: &Document| {
            serde_json::from_str::<Parked>(&document.body).is_ok_and(|parked| parked.position > position.0)
        };
        Ok(self.documents(subscription).await?.into_iter().filter(is_after).collect())
    }

    /// Returns everything parked under a subscription's name.
    pub(crate) async fn documents(&self, subscription: &str) -> Result<Vec<Document>, StoreError> {
        let collection = collection(subscription);
        pages::collection(&*self.store, &collection, "").take(PARKED_MAX).try_collect().await
    }
}

fn key_of(document: &Document) -> Option<&str> {
    document.key.id.rsplit_once(" #").map(|(key, _)| key)
}

/// Returns the first document of each lane, among the documents of one key.
fn heads(documents: &[Document]) -> impl Iterator<Item = &Document> {
    let lane = |document: &Document| document.key.id.rsplit_once('.').map(|(_, lane)| lane.to_owned());
    let mut seen = Vec::new();
    documents.iter().filter(move |document| {
        let lane = lane(document);
        let first = !seen.contains(&lane);
        seen.push(lane);
        first
    })
}

fn due_now(document: Document) -> Put {
    let Document { key, version, body, .. } = document;
    Put { key, expected: Some(version), body: Some(body), due: Some(DateTime::UNIX_EPOCH) }
}

fn unavailable(error: StoreError) -> CommitError {
    CommitError::Unavailable(error.to_string())
}
