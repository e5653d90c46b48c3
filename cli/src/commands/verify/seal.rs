//! Seals are documents that record the log, event by event, at the time of sealing. Each seal contains the hash of the
//! previous seal. One more document records the state of each stream's hash chain.
//!
//! Seals reveal that somebody has changed the log, unless that person knows about seals and can write documents. Anyone
//! who can write both log and documents can create new seals. To detect that too, the operator keeps the hash of a seal
//! elsewhere, and a later run checks that this hash is still there.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use annals::{Archive, Commit, DocumentKey, Put, Scan};
use serde::{Deserialize, Serialize};

use super::{
    event::{CheckedEvent, Digest, at},
    faults::Faults,
    order::Chained,
};
use crate::failure::Failure;

/// The collection of all seals. The id of a seal is its last position, with leading zeros.
const SEALS: &str = "seal";
/// The maximum number of events per seal, which makes a document of about 60 KB.
const EVENTS_MAX: usize = 1_000;
/// The maximum number of events held in memory until their seal ends. Without this limit, a forged seal with a huge
/// range could fill the memory.
const HELD_MAX: usize = 10 * EVENTS_MAX;
/// The number of seals per read or write.
const PAGE: usize = 16;
/// The maximum number of consecutive missing events that are reported one by one. A longer sequence of missing events
/// is reported as one fault.
const GONE_LISTED_MAX: usize = 10;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Seal {
    /// The hash of the previous seal; empty for the first seal.
    previous: String,
    /// The hash of `previous` and of the hashes of all events.
    hash: String,
    /// The streams of the events, each listed once.
    streams: Vec<String>,
    events: Vec<Sealed>,
}

/// A sealed event: its position, the index of its stream in `streams`, its version, and the start of its hash.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Sealed(i64, usize, i64, u64);

impl Seal {
    fn over(previous: &str, events: &[CheckedEvent]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(previous.as_bytes());
        events.iter().for_each(|event| _ = hasher.update(&event.digest));
        let mut streams = Vec::new();
        let mut numbers = HashMap::new();
        let mut sealed = Vec::with_capacity(events.len());
        for event in events {
            let number = *numbers.entry(&*event.stream).or_insert_with(|| {
                streams.push(event.stream.to_string());
                streams.len() - 1
            });
            sealed.push(Sealed(event.position, number, event.version, kept(&event.digest)));
        }
        let hash = hasher.finalize().to_hex().to_string();
        Self { previous: previous.to_owned(), hash, streams, events: sealed }
    }

    fn last(&self) -> i64 {
        self.events.last().map_or(0, |Sealed(position, ..)| *position)
    }

    fn place(&self, Sealed(position, stream, version, _): &Sealed) -> String {
        at(*position, self.streams.get(*stream).map_or("?", String::as_str), *version)
    }
}

pub(super) struct Seals {
    archive: Arc<dyn Archive>,
    /// Whether to seal the events that are not sealed yet.
    adds: bool,
    expected: Vec<String>,
    /// The state of the streams' chains, and the version of its document.
    chained: (Option<Chained>, i64),
    /// The seals that come next, each with the id of its document.
    ahead: VecDeque<(Arc<str>, Seal)>,
    read: Arc<str>,
    all_read: bool,
    /// The last position and the hash of the last seal seen.
    last: Option<(i64, String)>,
    /// The events after the last seal seen.
    events: Vec<CheckedEvent>,
    /// The seals that this run will write.
    added: Vec<Put>,
    broken: bool,
}

impl Seals {
    pub async fn open(
        archive: Arc<dyn Archive>,
        adds: bool,
        expected: Vec<String>,
        faults: &mut Faults<'_>,
    ) -> Result<Self, Failure> {
        let found = archive.documents(&[chains_key()]).await?.into_iter().next().flatten();
        let version = found.as_ref().map_or(0, |document| document.version);
        let chained = found.as_ref().and_then(|document| serde_json::from_str(&document.body).ok());
        let broken = found.is_some() && chained.is_none();
        if broken {
            faults.add(format!("document {}", chains_key()), "the document cannot be read")?;
        }
        let mut seals = Self {
            archive,
            adds,
            expected,
            chained: (chained, version),
            ahead: VecDeque::new(),
            read: "".into(),
            all_read: false,
            last: None,
            events: Vec::new(),
            added: Vec::new(),
            broken,
        };
        seals.read_ahead(faults).await?;
        Ok(seals)
    }

    /// Returns whether there are seals to check, or events to seal.
    pub fn are_there(&self) -> bool {
        self.adds || !self.ahead.is_empty() || self.chained.0.is_some()
    }

    /// The position up to which events are sealed.
    pub fn until(&self) -> i64 {
        self.last.as_ref().map_or(0, |(until, _)| *until)
    }

    /// The hash of the last seal.
    pub fn hash(&self) -> Option<String> {
        self.last.as_ref().map(|(_, hash)| hash.clone())
    }

    /// The position up to which the chains of the streams are stored.
    pub fn chained_until(&self) -> i64 {
        self.chained.0.as_ref().map_or(0, |chained| chained.until)
    }

    pub async fn event(&mut self, event: CheckedEvent, faults: &mut Faults<'_>) -> Result<(), Failure> {
        while self.next_ends_before(event.position, faults).await? {
            self.check(faults)?;
        }
        if !self.ahead.is_empty() && self.events.len() >= HELD_MAX {
            self.check(faults)?;
        }
        // Keeps events only if a seal covers them, or if this run seals them.
        if self.adds || !self.ahead.is_empty() {
            self.events.push(event);
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
        self.write().await?;
        for hash in &self.expected {
            faults.add("seals", format!("no seal has the expected hash {hash}"))?;
        }
        Ok(())
    }

    /// Compares the stored chains of all streams with `before`, the chains computed from the log up to the same
    /// position. Then stores `now`, the chains up to the last seal.
    pub async fn chains(&mut self, [before, now]: [Chained; 2], faults: &mut Faults<'_>) -> Result<(), Failure> {
        let (chained, version) = &self.chained;
        match chained {
            // If an event was changed, the check of its seal has already reported that event. This fault reports the
            // chains.
            Some(chained) if *chained != before => {
                self.broken = true;
                faults.add(
                    format!("streams up to position {}", before.until),
                    "the hash chains differ from the sealed hash chains",
                )?;
            }
            None if *version == 0 && self.last.is_some() && !self.adds => {
                faults.add(
                    format!("document {}", chains_key()),
                    "the document is missing: there are seals, and no hash chains of streams",
                )?;
            }
            _ => {}
        }
        if self.adds && !self.broken && chained.as_ref() != Some(&now) {
            let body = serde_json::to_string(&now)?;
            let put = Put { key: chains_key(), expected: Some(*version), body: Some(body.into()), due: None };
            self.archive.commit(Commit { appends: Vec::new(), puts: vec![put] }).await?;
        }
        Ok(())
    }

    async fn next_ends_before(&mut self, position: i64, faults: &mut Faults<'_>) -> Result<bool, Failure> {
        if self.ahead.is_empty() {
            self.read_ahead(faults).await?;
        }
        Ok(self.ahead.front().is_some_and(|(_, seal)| seal.last() < position))
    }

    async fn read_ahead(&mut self, faults: &mut Faults<'_>) -> Result<(), Failure> {
        while self.ahead.is_empty() && !self.all_read {
            let page = self.archive.scan(SEALS, &Scan::After(self.read.clone()), PAGE).await?;
            self.all_read = page.is_empty();
            for document in page {
                self.read = document.key.id.clone();
                match serde_json::from_str(&document.body) {
                    Ok(seal) => self.ahead.push_back((document.key.id, seal)),
                    Err(error) => {
                        self.broken = true;
                        faults.add(format!("seal {}", document.key.id), format!("the seal cannot be read: {error}"))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares the next seal with the events that it covers.
    fn check(&mut self, faults: &mut Faults<'_>) -> Result<(), Failure> {
        let Some((id, seal)) = self.ahead.pop_front() else { return Ok(()) };
        let of_it = self.events.partition_point(|event| event.position <= seal.last());
        let found: Vec<_> = self.events.drain(..of_it).collect();
        let before = self.last.as_ref().map_or("", |(_, hash)| hash);
        let name = format!("seal {id}");
        let faulty = faults.count();
        if seal.previous != before {
            faults.add(&*name, "the seal does not follow the previous seal: a seal was changed or removed")?;
        }
        compare(&seal, &found, faults)?;
        if faults.count() == faulty && Seal::over(&seal.previous, &found) != seal {
            faults.add(&*name, "the seal was changed: its hash does not match its contents")?;
        }
        self.broken |= faults.count() > faulty;
        self.passed(&seal);
        Ok(())
    }

    fn passed(&mut self, seal: &Seal) {
        self.expected.retain(|expected| *expected != seal.hash);
        self.last = Some((seal.last(), seal.hash.clone()));
    }

    /// Seals the events that are not sealed yet, unless a seal is broken.
    async fn add(&mut self) -> Result<(), Failure> {
        let events = std::mem::take(&mut self.events);
        if !self.adds || self.broken {
            return Ok(());
        }
        let seal = Seal::over(self.last.as_ref().map_or("", |(_, hash)| hash), &events);
        let key = DocumentKey::new(SEALS, format!("{:019}", seal.last()));
        let body = serde_json::to_string(&seal)?;
        self.added.push(Put { key, expected: Some(0), body: Some(body.into()), due: None });
        self.passed(&seal);
        if self.added.len() >= PAGE { self.write().await } else { Ok(()) }
    }

    async fn write(&mut self) -> Result<(), Failure> {
        let puts = std::mem::take(&mut self.added);
        if !puts.is_empty() {
            self.archive.commit(Commit { appends: Vec::new(), puts }).await?;
        }
        Ok(())
    }
}

/// The key of the one document that holds the state of the streams' chains.
fn chains_key() -> DocumentKey {
    DocumentKey::new("seal.streams", "chains")
}

/// Reports how the events under a seal have changed.
fn compare(seal: &Seal, found: &[CheckedEvent], faults: &mut Faults<'_>) -> Result<(), Failure> {
    let mut found = found.iter().peekable();
    let mut gone: Vec<&Sealed> = Vec::new();
    for sealed in &seal.events {
        let Sealed(position, _, _, digest) = sealed;
        while let Some(extra) = found.next_if(|event| event.position < *position) {
            faults.add(extra.place(), "the event was added after this part of the log was sealed")?;
        }
        let Some(event) = found.next_if(|event| event.position == *position) else {
            gone.push(sealed);
            continue;
        };
        report_gone(seal, &std::mem::take(&mut gone), faults)?;
        if kept(&event.digest) != *digest {
            let what = match (seal.place(sealed), event.place()) {
                (before, now) if before == now => "the event was changed after it was sealed".to_owned(),
                _ => {
                    format!(
                        "the event was changed after it was sealed: the event is now {} v{}",
                        event.stream, event.version
                    )
                }
            };
            faults.add(seal.place(sealed), what)?;
        }
    }
    report_gone(seal, &gone, faults)
}

/// Reports missing events. If the end of the log was cut off, many consecutive events are missing.
fn report_gone(seal: &Seal, gone: &[&Sealed], faults: &mut Faults<'_>) -> Result<(), Failure> {
    let Some((first, last)) = gone.first().zip(gone.last()) else { return Ok(()) };
    if gone.len() <= GONE_LISTED_MAX {
        return gone.iter().try_for_each(|sealed| faults.add(seal.place(sealed), "the sealed event is missing"));
    }
    faults.add(
        format!("positions {} to {}", first.0, last.0),
        format!("{} sealed events are missing, from {} to {}", gone.len(), seal.place(first), seal.place(last)),
    )
}

/// Returns the part of an event's hash that a seal keeps to show which event was changed. The seal's own hash covers
/// the whole hash of the event.
fn kept(digest: &Digest) -> u64 {
    digest[..8].iter().fold(0, |kept, byte| kept << 8 | u64::from(*byte))
}
