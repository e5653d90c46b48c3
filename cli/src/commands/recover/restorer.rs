//! Copies lost events from the topics back into the log, at their original positions, if those positions are free. The
//! command's output says that such events are "taken back".

use std::{collections::HashMap, sync::Arc};

use annals::{
    Archive, LogQuery, Recorded, StoreError, StreamId, Version,
    archive::{Contents, Stored},
};
use futures::{StreamExt, stream::BoxStream};
use serde::Serialize;
use uuid::Uuid;

use super::{found::Found, owed::OwedAnswers, sorter::SentMessage};
use crate::{
    failure::Failure,
    output::{Output, shown},
    store::{Store, restore},
    stream_key::stream_key,
};

/// The maximum number of events, and of bytes, that one commit writes.
const PART_EVENTS: usize = 20_000;
const PART_BYTES: usize = 16 << 20;
/// The maximum number of lost messages that are listed one by one. Further messages are only counted.
const LISTED_MAX: u64 = 1_000;

/// The number of messages by outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Counts {
    /// Events written to the log.
    pub taken_back: u64,
    /// Answers to sagas that were copied back although other work of the same commit may be lost. The services do that
    /// work again when they start.
    pub done_again: u64,
    /// Steps of sagas whose command is in the topics, but whose event is not. Such a saga starts again, from the event
    /// that started it before.
    pub saga_steps: u64,
    /// Messages whose events cannot be copied back.
    pub lost: u64,
}

/// A message whose event cannot be copied back, and the reason.
#[derive(Serialize)]
struct Lost<'a> {
    #[serde(rename = "where")]
    place: &'a str,
    what: &'a str,
}

/// Writes events from the topics into the log again.
pub(super) struct Restorer<'a> {
    archive: Arc<dyn Archive>,
    log: Log,
    /// The last position that the restored database held.
    restored_to: i64,
    /// `false` for a dry run, which only reads.
    pub writes: bool,
    output: &'a mut Output,
    pub counts: Counts,
    /// The last version of each stream that had an event copied back, or `None` if an event of the stream is missing.
    streams: HashMap<u128, Option<i64>>,
    /// The answers that have work which the services must do again.
    pub owed: OwedAnswers,
    part: Vec<Stored<'static>>,
    bytes: usize,
    /// The first position at which the log does not hold the event that a service sent from this position.
    pub first_other: Option<i64>,
    last: Option<(i64, Uuid)>,
    /// The position of the last saga step that was counted.
    last_step: i64,
}

impl<'a> Restorer<'a> {
    pub async fn new(
        store: &Store,
        head: i64,
        restored_to: i64,
        writes: bool,
        output: &'a mut Output,
    ) -> Result<Self, Failure> {
        // Reads up to the current head. For later positions, `at` returns `None`.
        let log = Log { events: store.log(LogQuery::all(), 1..=head).await?.fuse().boxed(), next: None };
        Ok(Self {
            archive: store.port(),
            log,
            restored_to,
            writes,
            output,
            counts: Counts::default(),
            streams: HashMap::new(),
            owed: OwedAnswers::default(),
            part: Vec::new(),
            bytes: 0,
            first_other: None,
            last: None,
            last_step: 0,
        })
    }

    /// Copies back all events that can be copied back.
    pub async fn run(&mut self, found: &mut Found) -> Result<(), Failure> {
        let mut sent = std::mem::take(&mut found.sent).sorted()?;
        for removed in &found.removed {
            self.lost("retention", removed)?;
        }
        while let Some(sent) = sent.next()? {
            self.take(sent, found).await?;
        }
        self.write().await
    }

    async fn take(&mut self, sent: SentMessage, found: &Found) -> Result<(), Failure> {
        if self.last == Some((sent.position, sent.id)) {
            return Ok(());
        }
        let has_same_position = self.last.is_some_and(|(position, _)| position == sent.position);
        self.last = Some((sent.position, sent.id));
        let held = self.log.at(sent.position).await?;
        let is_held = held.is_some_and(|id| id == sent.id || id == sent.causation);
        let SentMessage { position, event, place, .. } = sent;
        if is_held {
            // An earlier, interrupted run of this recovery had copied the event back, but had not yet recorded which
            // work must be done again.
            if let Some(event) = event.filter(|_| position > self.restored_to) {
                self.owe(&event, found);
            }
            return Ok(());
        }
        if held.is_some() || (position <= self.restored_to && event.is_some()) {
            self.first_other = self.first_other.or(Some(position));
            let what = format!(
                "the log holds another event at position {position}, or no event: the store was changed after the restore"
            );
            return self.lost(&place, &what);
        }
        let Some(event) = event else {
            self.counts.saga_steps += u64::from(std::mem::replace(&mut self.last_step, position) != position);
            return Ok(());
        };
        if has_same_position {
            return self.lost(&place, &format!("another event with position {position} was sent before"));
        }
        let key = stream_key(&event.stream);
        let version = event.version.0;
        let stands_at = match self.streams.get(&key) {
            Some(known) => *known,
            None => self.stands_at(&event).await?,
        };
        if stands_at != Some(version - 1) {
            self.streams.insert(key, None);
            let reason = match stands_at {
                Some(stands_at) if stands_at >= version => format!("the stream is already at version {stands_at}"),
                _ => format!("no topic holds version {}", version - 1),
            };
            return self.lost(&place, &format!("{} v{version}: {reason}", event.stream));
        }
        self.owe(&event, found);
        self.streams.insert(key, Some(version));
        self.counts.taken_back += 1;
        self.bytes += event.data.len();
        self.part.push(event);
        if self.part.len() >= PART_EVENTS || self.bytes >= PART_BYTES {
            self.write().await?;
        }
        Ok(())
    }

    /// If other events of the commit that contains an answer may be lost, records that the work of that answer must be
    /// done again.
    fn owe(&mut self, event: &Stored<'_>, found: &Found) {
        if event.stream.starts_with("step.") {
            self.owed.note(event, found.is_whole(event, self.restored_to));
            self.counts.done_again = self.owed.len() as u64;
        }
    }

    /// Returns the last version of the event's stream in the log, if that version is close enough to decide whether
    /// `event` comes next.
    async fn stands_at(&self, event: &Stored<'_>) -> Result<Option<i64>, StoreError> {
        let stream = StreamId::from_stored(&event.stream);
        let after = Version((event.version.0 - 2).max(0));
        let found = self.archive.read_stream(&stream, after, 2).await?;
        Ok(match found.last() {
            Some(last) => Some(last.version.0),
            None if event.version.0 == 1 => Some(0),
            None => None,
        })
    }

    async fn write(&mut self) -> Result<(), Failure> {
        let events = std::mem::take(&mut self.part);
        self.bytes = 0;
        if !self.writes || events.is_empty() {
            return Ok(());
        }
        restore(&*self.archive, Contents { events, documents: Vec::new() }).await
    }

    pub fn lost(&mut self, place: &str, what: &str) -> Result<(), Failure> {
        self.counts.lost += 1;
        if self.counts.lost > LISTED_MAX {
            return Ok(());
        }
        if self.output.json {
            return self.output.value(&Lost { place, what });
        }
        self.output.line(&shown(&format!("{place}: {what}")).replace('\n', " "))
    }
}

/// A cursor over the log that moves in step with the events to be copied back.
struct Log {
    events: BoxStream<'static, Result<Arc<Recorded>, StoreError>>,
    next: Option<Arc<Recorded>>,
}

impl Log {
    /// Returns the id of the event at a position. Positions must not decrease from call to call.
    async fn at(&mut self, position: i64) -> Result<Option<Uuid>, StoreError> {
        while self.next.as_ref().is_none_or(|event| event.position.0 < position) {
            let Some(event) = self.events.next().await else { return Ok(None) };
            self.next = Some(event?);
        }
        Ok(self.next.as_ref().filter(|event| event.position.0 == position).map(|event| event.id))
    }
}
