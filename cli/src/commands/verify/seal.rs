//! Seals: documents that say what the log was when it was sealed, event by event, each bound to the one before.
//!
//! A seal finds what was done to the log by somebody who did not know of seals, or could not write documents. Whoever can write
//! both can make new seals; against that, the hash of a seal is noted elsewhere, and expected by a later run.

use std::{collections::VecDeque, sync::Arc};

use annals::{Archive, Commit, DocumentKey, Put, Recorded, Scan};
use serde::{Deserialize, Serialize};

use super::Faults;
use crate::failure::Failure;

/// The collection of all seals; their ids are their last positions, with leading zeros.
const SEALS: &str = "seal";
/// Events under one seal: some 30 KB of document.
const EVENTS_MAX: usize = 1_000;
/// Seals read at once.
const PAGE: usize = 50;
/// What of an event's hash is kept, to tell which one was changed; the whole of it goes into that of the seal.
const KEPT_BYTES: usize = 8;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Seal {
    /// Of the seal before; empty for the first.
    previous: String,
    /// Of `previous` and the hashes of all events.
    hash: String,
    /// Where the events stand.
    positions: Vec<i64>,
    /// The start of the hash of each.
    digests: Vec<String>,
}

impl Seal {
    fn over(previous: &str, events: &[(i64, blake3::Hash)]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(previous.as_bytes());
        events.iter().for_each(|(_, hash)| _ = hasher.update(hash.as_bytes()));
        Self {
            previous: previous.to_owned(),
            hash: hasher.finalize().to_hex().to_string(),
            positions: events.iter().map(|(position, _)| *position).collect(),
            digests: events.iter().map(|(_, hash)| kept(hash)).collect(),
        }
    }

    fn last(&self) -> i64 {
        self.positions.last().copied().unwrap_or_default()
    }
}

pub(super) struct Seals {
    archive: Arc<dyn Archive>,
    /// Whether to seal what is not.
    adds: bool,
    expected: Vec<String>,
    /// The next ones, and the document that was read last.
    ahead: VecDeque<(Arc<str>, Seal)>,
    read: Arc<str>,
    all_read: bool,
    /// The last one that was met.
    last: Option<Seal>,
    /// Events since then.
    events: Vec<(i64, blake3::Hash)>,
    broken: bool,
}

impl Seals {
    pub fn new(archive: Arc<dyn Archive>, adds: bool, expected: Vec<String>) -> Self {
        let (ahead, read) = (VecDeque::new(), "".into());
        Self { archive, adds, expected, ahead, read, all_read: false, last: None, events: Vec::new(), broken: false }
    }

    /// Up to this position, events are under seals.
    pub fn until(&self) -> i64 {
        self.last.as_ref().map_or(0, Seal::last)
    }

    /// Of the last seal.
    pub fn hash(&self) -> Option<String> {
        self.last.as_ref().map(|seal| seal.hash.clone())
    }

    pub async fn event(&mut self, event: &Recorded, faults: &mut Faults<'_>) -> Result<(), Failure> {
        while self.next_ends_before(event.position.0, faults).await? {
            self.check(faults)?;
        }
        // Without a seal to be checked or made, nothing need be kept.
        if self.adds || !self.ahead.is_empty() {
            self.events.push((event.position.0, digest(event)));
        }
        if self.ahead.is_empty() && self.events.len() >= EVENTS_MAX {
            self.add().await?;
        }
        Ok(())
    }

    pub async fn end(&mut self, faults: &mut Faults<'_>) -> Result<(), Failure> {
        while self.next_ends_before(i64::MAX, faults).await? {
            self.check(faults)?;
        }
        if !self.events.is_empty() {
            self.add().await?;
        }
        for hash in &self.expected {
            faults.add("seals", format!("there is none with the expected hash {hash}"))?;
        }
        Ok(())
    }

    async fn next_ends_before(&mut self, position: i64, faults: &mut Faults<'_>) -> Result<bool, Failure> {
        while self.ahead.is_empty() && !self.all_read {
            let page = self.archive.scan(SEALS, &Scan::After(self.read.clone()), PAGE).await?;
            self.all_read = page.is_empty();
            for document in page {
                self.read = document.key.id.clone();
                match serde_json::from_str(&document.body) {
                    Ok(seal) => self.ahead.push_back((document.key.id, seal)),
                    Err(error) => {
                        self.broken = true;
                        faults.add(format!("seal {}", document.key.id), format!("it cannot be read: {error}"))?;
                    }
                }
            }
        }
        Ok(self.ahead.front().is_some_and(|(_, seal)| seal.last() < position))
    }

    /// Compares the next seal with the events up to its end.
    fn check(&mut self, faults: &mut Faults<'_>) -> Result<(), Failure> {
        let Some((id, seal)) = self.ahead.pop_front() else { return Ok(()) };
        let of_it = self.events.partition_point(|(position, _)| *position <= seal.last());
        let found: Vec<_> = self.events.drain(..of_it).collect();
        let before = self.last.as_ref().map_or("", |last| &last.hash);
        let name = format!("seal {id}");
        let faulty = faults.count;
        if seal.previous != before {
            faults.add(&*name, "it does not follow the one before: a seal was changed or removed")?;
        }
        compare(&seal, &found, faults)?;
        if faults.count == faulty && Seal::over(&seal.previous, &found).hash != seal.hash {
            faults.add(&*name, "its hash is not that of what it says was sealed: it was changed")?;
        }
        self.broken |= faults.count > faulty;
        self.expected.retain(|expected| *expected != seal.hash);
        self.last = Some(seal);
        Ok(())
    }

    /// Seals the events at hand; not behind a seal that is broken.
    async fn add(&mut self) -> Result<(), Failure> {
        let events = std::mem::take(&mut self.events);
        if !self.adds || self.broken {
            return Ok(());
        }
        let seal = Seal::over(self.last.as_ref().map_or("", |last| &last.hash), &events);
        let key = DocumentKey::new(SEALS, format!("{:019}", seal.last()));
        let body = serde_json::to_string(&seal)?;
        let put = Put { key, expected: Some(0), body: Some(body.into()), due: None };
        self.archive.commit(Commit { appends: Vec::new(), puts: vec![put] }).await?;
        self.expected.retain(|expected| *expected != seal.hash);
        self.last = Some(seal);
        Ok(())
    }
}

/// Tells what became of the events under a seal. What is gone is told by runs: a tail that was cut off is one.
fn compare(seal: &Seal, found: &[(i64, blake3::Hash)], faults: &mut Faults<'_>) -> Result<(), Failure> {
    let mut found = found.iter().peekable();
    let mut gone: Vec<i64> = Vec::new();
    let told = |gone: &mut Vec<i64>, faults: &mut Faults<'_>| match std::mem::take(gone).as_slice() {
        [] => Ok(()),
        [one] => faults.add(format!("position {one}"), "the event that was sealed is gone"),
        [first, .., last] => {
            let count = last - first + 1;
            faults.add(format!("positions {first} to {last}"), format!("{count} events that were sealed are gone"))
        }
    };
    for (position, digest) in seal.positions.iter().zip(&seal.digests) {
        while let Some((extra, _)) = found.next_if(|(at, _)| at < position) {
            faults.add(format!("position {extra}"), "the event was not there when this part of the log was sealed")?;
        }
        match found.next_if(|(at, _)| at == position) {
            None => {
                if gone.last().is_some_and(|last| last + 1 != *position) {
                    told(&mut gone, faults)?;
                }
                gone.push(*position);
                continue;
            }
            Some((_, hash)) if kept(hash) != *digest => {
                faults.add(format!("position {position}"), "the event was changed after it was sealed")?;
            }
            Some(_) => {}
        }
        told(&mut gone, faults)?;
    }
    told(&mut gone, faults)
}

fn kept(hash: &blake3::Hash) -> String {
    hash.to_hex()[..KEPT_BYTES * 2].to_owned()
}

/// The hash of everything that a store keeps of an event. Each text has its length in front, so that none can lend bytes to
/// the next.
fn digest(event: &Recorded) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for number in
        [event.position.0, event.version.0, i64::from(event.schema_version), event.recorded_at.timestamp_micros()]
    {
        hasher.update(&number.to_be_bytes());
    }
    hasher.update(event.id.as_bytes());
    for text in [event.stream.as_str(), &event.type_name, &event.data, &event.metadata.to_json()] {
        hasher.update(&(text.len() as u64).to_be_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize()
}
