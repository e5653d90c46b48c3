//! Messages that could not be handled: parked by key, so that the world goes on and the key keeps its order.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    bus::{Message, Undecodable},
    commit::{Commit, CommitError, DOCUMENT_BYTES_MAX, DOCUMENT_ID_BYTES_MAX, Document, DocumentKey, Put, check_json},
    event::{Position, named_id},
    store::{EventStore, Scan, StoreError},
    subscription::lane_of,
};

/// How many messages one worker may have parked before it stops taking in more.
pub const PARKED_MAX: usize = 100_000;
const PAGE: usize = 500;
/// A longer key is parked under a short form of it: the sequence and the lane are in the document's name too.
const KEY_BYTES_MAX: usize = DOCUMENT_ID_BYTES_MAX - 64;
/// How the keys of what was lost begin. A message whose key begins like this is parked under another one.
const LOST_KEY: &str = "lost messages of ";
/// A message that is larger as JSON is parked as the start of its bytes: a document that no store takes would be tried for
/// ever.
const PAYLOAD_BYTES_MAX: usize = DOCUMENT_BYTES_MAX - 100_000;

/// A parked message, as its document holds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parked {
    /// Who could not handle it.
    pub subscription: Arc<str>,
    /// The lane or partition it came by: the document id of its checkpoint.
    pub lane: Arc<str>,
    /// Its key: later messages with the same key wait behind it.
    pub key: Arc<str>,
    /// What went wrong last; empty for one that only waits behind another.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
    /// Whether it waits for a build that knows what the one which parked it did not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_build: bool,
    /// Since when it is parked.
    pub parked_at: DateTime<Utc>,
    /// The position of an event, by which one that is read again is known to be parked already.
    #[serde(default)]
    pub position: i64,
    /// The message; for bytes that were none, an object with `raw` in hexadecimal.
    pub message: Box<RawValue>,
}

/// Messages that a bus removed before they were read, as a dead letter says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lost {
    /// The topic that they were in.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: u32,
    /// The offset of the first of them.
    pub from: i64,
    /// The offset after the last of them.
    pub to: i64,
}

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { topic, partition, from, to } = self;
        write!(
            f,
            "offsets {from} to {} of {topic}, partition {partition}, were removed before they were read: set back what sent \
             them, then drop this dead letter",
            to - 1
        )
    }
}

impl Lost {
    /// The key that it is parked by. No message is to wait behind it.
    pub(crate) fn key(&self) -> Arc<str> {
        format!("{LOST_KEY}{}/{}", self.topic, self.partition).into()
    }
}

impl Parked {
    /// What was lost, if this stands for that.
    pub fn lost(&self) -> Option<Lost> {
        #[derive(Deserialize)]
        struct Message {
            lost: Lost,
        }
        self.key
            .starts_with(LOST_KEY)
            .then(|| serde_json::from_str::<Message>(self.message.get()).ok())?
            .map(|of| of.lost)
    }

    /// The message, unless what came was none.
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

/// The parked messages of one worker, by key: only their places are in memory. Clones share them until one is changed.
#[derive(Clone, Default)]
pub(crate) struct ParkedKeys {
    subscription: Arc<str>,
    keys: Arc<HashMap<Arc<str>, VecDeque<Place>>>,
    count: usize,
    /// What was lost, the first of it.
    lost: Option<Arc<str>>,
    /// Keys with a dead letter: a message that only a person has tried again.
    dead: Arc<BTreeSet<Arc<str>>>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub sequence: u64,
    /// The id of its document.
    pub id: Arc<str>,
    /// The event's position, if it is one.
    pub position: i64,
    /// Whether a worker tries it whatever its time: it only waits behind another and was never tried itself, or waits for
    /// another build and was not tried since its place was read.
    pub waits: bool,
    /// Whether it waits for a build that knows more.
    pub awaits_build: bool,
    /// Whether it was tried in vain, and is not tried again by itself.
    pub dead: bool,
}

pub(crate) fn collection(subscription: &str) -> Arc<str> {
    format!("parked.{subscription}").into()
}

/// The id of a parked message's document: by key, then in order. The lane is part of it, because two lanes may have
/// messages of one key (the topics of a group, a topic that was given more partitions), each numbered by its own worker.
fn document_id(key: &str, sequence: u64, lane: &str) -> Arc<str> {
    format!("{key} #{sequence:019}.{:08x}", lane_of(lane, u32::MAX)).into()
}

/// The key and the lane of a parked message, out of the id of its document: all that comes before and after its sequence.
pub(crate) fn key_and_lane(id: &str) -> Option<(&str, &str)> {
    let (key, place) = id.rsplit_once(" #")?;
    Some((key, place.split_once('.')?.1))
}

fn sequence_of(id: &str) -> Option<u64> {
    let (_, place) = id.rsplit_once(" #")?;
    place.split('.').next()?.parse().ok()
}

/// What moves a parked message to the lane that its key has among so many; nothing if it is there.
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

/// The key that a message is parked by: its own, unless no document can be named by that.
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

    /// Reads what is parked on these lanes.
    pub async fn load(&self, store: &dyn EventStore, lanes: &[Arc<str>]) -> Result<Self, StoreError> {
        let mut found = Self::new(self.subscription.clone());
        let mut after: Arc<str> = "".into();
        loop {
            let page = store.scan(&collection(&self.subscription), &Scan::After(after), PAGE).await?;
            let Some(last) = page.last() else { return Ok(found) };
            after = last.key.id.clone();
            for document in page {
                let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { continue };
                if let Some(sequence) = sequence_of(&document.key.id).filter(|_| lanes.contains(&parked.lane)) {
                    let awaits_build = parked.awaits_build;
                    let (id, waits) = (document.key.id, parked.attempts == 0 || awaits_build);
                    if let Some(lost) = parked.lost().filter(|_| found.lost.is_none()) {
                        found.lost = Some(lost.to_string().into());
                    }
                    let dead = !waits && document.due.is_none();
                    let position = parked.position;
                    found.add(&parked.key, Place { sequence, id, position, waits, awaits_build, dead });
                }
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn len(&self) -> usize {
        self.count
    }

    /// What was lost and is not repaired yet.
    pub fn lost(&self) -> Option<Arc<str>> {
        self.lost.clone()
    }

    /// Notes what was lost, at its place.
    pub fn add_lost(&mut self, key: &Arc<str>, place: Place, lost: &Lost) {
        self.add(key, place);
        self.lost.get_or_insert_with(|| lost.to_string().into());
    }

    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    pub fn first(&self, key: &str) -> Option<&Place> {
        self.keys.get(key).and_then(|places| places.front())
    }

    /// Whether this event is parked.
    pub fn has_event(&self, key: &str, position: i64) -> bool {
        let places = self.keys.get(key).filter(|places| places.back().is_some_and(|last| last.position >= position));
        places.is_some_and(|places| places.iter().any(|place| place.position == position))
    }

    /// The place of the next message of this key.
    pub fn next_place(&self, key: &str, lane: &str, position: i64) -> Place {
        let last = self.keys.get(key).and_then(|places| places.back());
        let sequence = last.map_or(0, |place| place.sequence + 1);
        let (id, waits) = (document_id(key, sequence, lane), last.is_some());
        Place { sequence, id, position, waits, awaits_build: false, dead: false }
    }

    /// Whether messages of this key wait for another build, which may have taken them meanwhile.
    pub fn awaits_build(&self, key: &str) -> bool {
        self.first(key).is_some_and(|first| first.awaits_build)
    }

    /// Keys whose first message a worker tries whatever its time.
    pub fn freed(&self) -> impl Iterator<Item = &Arc<str>> {
        self.keys.iter().filter(|(_, places)| places.front().is_some_and(|first| first.waits)).map(|(key, _)| key)
    }

    pub fn add(&mut self, key: &Arc<str>, place: Place) {
        if place.dead {
            Arc::make_mut(&mut self.dead).insert(key.clone());
        }
        Arc::make_mut(&mut self.keys).entry(key.clone()).or_default().push_back(place);
        self.count += 1;
    }

    /// The first message of the key is handled.
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

    /// How many keys have a dead letter, and one of them.
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

    /// The first message of the key was tried in vain; `dead`: it is not tried again by itself.
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

/// Operators' view of what is parked.
#[derive(Clone)]
pub struct DeadLetters {
    store: Arc<dyn EventStore>,
}

/// The head of a parked key.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    /// The id of its document.
    pub id: Arc<str>,
    /// The message and what went wrong.
    pub parked: Parked,
    /// When it is tried again by itself; `None`: only when somebody redrives it.
    pub retries_at: Option<DateTime<Utc>>,
    /// How many messages of the same key wait behind it.
    pub behind: usize,
}

impl DeadLetters {
    /// Of this store.
    pub fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store }
    }

    /// The parked keys of a subscription, each by its first message.
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

    /// Has a key's messages tried again now, in order, by the worker that owns it. Returns how many wait; 0 if the key is
    /// not parked.
    pub async fn redrive(&self, subscription: &str, key: &str) -> Result<usize, CommitError> {
        let (puts, waiting) = self.to_redrive(subscription, key).await?;
        if !puts.is_empty() {
            self.store.commit(Commit { appends: Vec::new(), puts }).await?;
        }
        Ok(waiting)
    }

    /// What has a key, or the one message with this id, tried again; and how many messages wait.
    pub(crate) async fn to_redrive(&self, subscription: &str, key: &str) -> Result<(Vec<Put>, usize), CommitError> {
        let documents = self.of_key(subscription, key).await?;
        Ok((heads(&documents).map(|head| due_now(head.clone())).collect(), documents.len()))
    }

    /// Gives up the first message of a key for good; those behind it are tried then.
    pub async fn drop_first(&self, subscription: &str, key: &str) -> Result<Option<Parked>, CommitError> {
        let Some((puts, dropped)) = self.to_drop(subscription, key).await? else { return Ok(None) };
        self.store.commit(Commit { appends: Vec::new(), puts }).await?;
        Ok(serde_json::from_str(&dropped.body).ok())
    }

    /// What removes the first message of a key, or the one with this id; and that message.
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
        // What was lost is parked by a key that a message cannot have.
        let short = parking_key(&key.into());
        let is_of_key = |found: &str| found == key || found == &*short;
        let wanted = |document: &Document| *document.key.id == *key || key_of(document).is_some_and(is_of_key);
        Ok(documents.into_iter().filter(wanted).collect())
    }

    /// The parked messages of a subscription whose events come after a position of the log.
    pub(crate) async fn after(&self, subscription: &str, position: Position) -> Result<Vec<Document>, StoreError> {
        let is_after = |document: &Document| {
            serde_json::from_str::<Parked>(&document.body).is_ok_and(|parked| parked.position > position.0)
        };
        Ok(self.documents(subscription).await?.into_iter().filter(is_after).collect())
    }

    /// All that is parked under a name.
    pub(crate) async fn documents(&self, subscription: &str) -> Result<Vec<Document>, StoreError> {
        let (mut all, collection) = (Vec::new(), collection(subscription));
        loop {
            let after = all.last().map_or("".into(), |document: &Document| document.key.id.clone());
            let page = self.store.scan(&collection, &Scan::After(after), PAGE).await?;
            if page.is_empty() || all.len() >= PARKED_MAX {
                return Ok(all);
            }
            all.extend(page);
        }
    }
}

fn key_of(document: &Document) -> Option<&str> {
    document.key.id.rsplit_once(" #").map(|(key, _)| key)
}

/// The first of each lane, of one key's documents.
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
