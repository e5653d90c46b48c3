//! Messages that could not be handled: parked by key, so that the world goes on and the key keeps its order.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{
    bus::{Message, Undecodable},
    commit::{Commit, CommitError, Document, DocumentKey, Put},
    store::{EventStore, Scan, StoreError},
};

/// How many messages one worker may have parked before it stops taking in more.
pub const PARKED_MAX: usize = 100_000;
const PAGE: usize = 500;

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
    /// Since when it is parked.
    pub parked_at: DateTime<Utc>,
    /// The message; for bytes that were none, an object with `raw` in hexadecimal.
    pub message: Box<RawValue>,
}

impl Parked {
    /// The message, unless what came was none.
    pub fn message(&self) -> Option<Message> {
        serde_json::from_str(self.message.get()).ok()
    }

    pub(crate) fn payload(message: &Result<Message, Undecodable>) -> Box<RawValue> {
        let json = match message {
            Ok(message) => serde_json::value::to_raw_value(message),
            Err(undecodable) => serde_json::value::to_raw_value(&serde_json::json!({ "raw": undecodable.raw })),
        };
        json.unwrap_or_default()
    }
}

/// The parked messages of one worker, by key: only their places are in memory.
#[derive(Clone, Default)]
pub(crate) struct ParkedKeys {
    subscription: Arc<str>,
    keys: HashMap<Arc<str>, VecDeque<Place>>,
    count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Place {
    pub sequence: u64,
    pub version: i64,
}

pub(crate) fn collection(subscription: &str) -> Arc<str> {
    format!("parked.{subscription}").into()
}

pub(crate) fn document_id(key: &str, sequence: u64) -> String {
    format!("{key} #{sequence:019}")
}

impl ParkedKeys {
    pub fn new(subscription: Arc<str>) -> Self {
        Self { subscription, ..Self::default() }
    }

    /// Reads what is parked on these lanes.
    pub async fn load(&mut self, store: &dyn EventStore, lanes: &[Arc<str>]) -> Result<(), StoreError> {
        self.keys.clear();
        self.count = 0;
        let mut after: Arc<str> = "".into();
        loop {
            let page = store.scan(&collection(&self.subscription), &Scan::After(after), PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.key.id.clone();
            for document in page {
                let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { continue };
                let sequence = document.key.id.rsplit_once(" #").and_then(|(_, sequence)| sequence.parse().ok());
                if let Some(sequence) = sequence.filter(|_| lanes.contains(&parked.lane)) {
                    self.add(&parked.key, Place { sequence, version: document.version });
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

    pub fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    pub fn next_sequence(&self, key: &str) -> u64 {
        self.keys.get(key).and_then(|places| places.back()).map_or(0, |place| place.sequence + 1)
    }

    pub fn places(&self, key: &str) -> Vec<Place> {
        self.keys.get(key).map(|places| places.iter().copied().collect()).unwrap_or_default()
    }

    pub fn add(&mut self, key: &Arc<str>, place: Place) {
        self.keys.entry(key.clone()).or_default().push_back(place);
        self.count += 1;
    }

    /// The first message of the key is handled.
    pub fn release_first(&mut self, key: &str) {
        if let Some(places) = self.keys.get_mut(key) {
            self.count -= usize::from(places.pop_front().is_some());
            if places.is_empty() {
                self.keys.remove(key);
            }
        }
    }

    /// The first message of the key was tried again in vain.
    pub fn touch_first(&mut self, key: &str) {
        if let Some(place) = self.keys.get_mut(key).and_then(|places| places.front_mut()) {
            place.version += 1;
        }
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
            match letters.last_mut() {
                Some(head) if head.parked.key == parked.key => head.behind += 1,
                _ => letters.push(DeadLetter { id: document.key.id, parked, retries_at: document.due, behind: 0 }),
            }
        }
        Ok(letters)
    }

    /// Has a key's messages tried again now, in order, by the worker that owns it. Returns how many wait; 0 if the key is
    /// not parked.
    pub async fn redrive(&self, subscription: &str, key: &str) -> Result<usize, CommitError> {
        let documents = self.documents(subscription).await.map_err(unavailable)?;
        let of_key: Vec<_> = documents.into_iter().filter(|document| key_of(document) == Some(key)).collect();
        if let Some(head) = of_key.first() {
            let put = Put {
                key: head.key.clone(),
                expected: Some(head.version),
                body: Some(head.body.clone()),
                due: Some(DateTime::UNIX_EPOCH),
            };
            self.store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await?;
        }
        Ok(of_key.len())
    }

    /// Gives up the first message of a key for good; those behind it are tried then.
    pub async fn drop_first(&self, subscription: &str, key: &str) -> Result<Option<Parked>, CommitError> {
        let documents = self.documents(subscription).await.map_err(unavailable)?;
        let mut of_key = documents.into_iter().filter(|document| key_of(document) == Some(key));
        let Some(head) = of_key.next() else { return Ok(None) };
        let mut puts = vec![Put { key: head.key.clone(), expected: Some(head.version), body: None, due: None }];
        puts.extend(of_key.next().map(|next| Put {
            key: next.key,
            expected: Some(next.version),
            body: Some(next.body),
            due: Some(DateTime::UNIX_EPOCH),
        }));
        self.store.commit(Commit { appends: Vec::new(), puts }).await?;
        Ok(serde_json::from_str(&head.body).ok())
    }

    async fn documents(&self, subscription: &str) -> Result<Vec<Document>, StoreError> {
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

fn unavailable(error: StoreError) -> CommitError {
    CommitError::Unavailable(error.to_string())
}

/// The document of one parked message.
pub(crate) fn key(subscription: &str, key: &str, sequence: u64) -> DocumentKey {
    DocumentKey::new(collection(subscription), document_id(key, sequence))
}
