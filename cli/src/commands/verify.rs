//! `verify`: checks a store in one pass over the log and one pass over the documents.

mod bus;
mod documents;
mod histories;
mod order;
mod seal;
mod sorter;

use annals::{LogQuery, Recorded, archive::Stored};
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

pub(crate) use self::order::stream_key;
use self::{
    bus::{OfTopics, OnBus},
    histories::Histories,
    order::Order,
    seal::{Digest, Seals, digest},
};
use crate::{
    failure::{Failure, Verdict},
    output::{Output, grouped, shown},
    progress,
    stop::Stop,
    store::Store,
};

/// The maximum number of faults to print. Further faults are only counted.
const TOLD_MAX: u64 = 1_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals verify
      dense versions, unique ids, payloads, histories of sagas, checkpoints; a line a fault, exit code 1 if there is one
  annals verify --seal
      also seals what was not sealed yet: later runs find what was changed, deleted, moved or cut off since
  annals verify --expect 5b1c0e…
      also that a seal is there whose hash you noted elsewhere: whoever changes the log may change the seals as well

  annals verify --bus kafka://broker:9092
      also that the topics hold what the relays say they have sent

With --bus, every event and command up to the relay's checkpoint has to be in its topic, with the same bytes, key and attributes, in
the order of its stream; a message that says it comes from this log, and does not, is one fault, as is one that is missing. What
retention has removed is counted, and no fault: where the beginning of a partition is gone, nothing before the first message that
is left of a relay can be looked at. In a topic that is compacted any message may be gone: that is one fault of the topic, with how many
are. Messages sent twice are counted too. What a relay has parked is not expected; what was dropped
from there is missing. Topics that no relay of this store writes to are not looked at.

All faults of the store are told, up to 1,000; what a service writes meanwhile is looked at by the next run.")]
pub(crate) struct Arguments {
    /// Also seal the events that are not sealed yet.
    #[arg(long)]
    seal: bool,
    /// The hash that an earlier run printed at its end.
    #[arg(long, value_name = "HASH")]
    expect: Vec<String>,
    #[command(flatten)]
    on_bus: OnBus,
}

/// A fault, and its place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Fault {
    #[serde(rename = "where")]
    pub place: String,
    pub what: String,
}

/// Prints faults as they are found.
pub(crate) struct Faults<'a> {
    output: &'a mut Output,
    count: u64,
}

impl Faults<'_> {
    pub fn add(&mut self, place: impl Into<String>, what: impl Into<String>) -> Result<(), Failure> {
        self.count += 1;
        if self.count > TOLD_MAX {
            return Ok(());
        }
        let fault = Fault { place: place.into(), what: what.into() };
        if self.output.json {
            return self.output.value(&fault);
        }
        self.output.line(&shown(&format!("{}: {}", fault.place, fault.what)).replace('\n', " "))
    }
}

/// The result of the verification.
#[derive(Serialize)]
struct Verified {
    events: i64,
    sagas: usize,
    documents: u64,
    /// The events up to this position are sealed.
    sealed_until: i64,
    /// The hash of the last seal.
    seal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    topics: Option<OfTopics>,
    faults: u64,
}

pub(crate) async fn run(arguments: Arguments, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let mut faults = Faults { output, count: 0 };
    match verify(arguments, store, &mut faults).await {
        // The reader that closed the output early has already seen a fault, or would have seen one.
        Err(Failure::OutputClosed) if faults.count > 0 => Ok(Verdict::Fault),
        verified => verified,
    }
}

async fn verify(arguments: Arguments, store: &Store, faults: &mut Faults<'_>) -> Result<Verdict, Failure> {
    let archive = store.port();
    let until = archive.status().await?.head.0;
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("verified", until.unsigned_abs());
    let (mut order, mut histories) = (Order::new()?, Histories::default());
    let mut seals = Seals::open(archive.clone(), arguments.seal, arguments.expect, faults).await?;
    let sealed = seals.are_there();
    let look = move |events: &mut Vec<Event>, event: Stored<'_>| events.push(Event::of(&event, sealed));
    let mut log = store.batches(LogQuery::all(), 1..=until, look).await?;
    let mut events = 0;
    while let Some(batch) = log.try_next().await? {
        for event in batch {
            if stop.is_asked() {
                bar.finish_and_clear();
                eprintln!("stopped at position {}; nothing is verified but what was told", event.position);
                return Ok(Verdict::Stopped);
            }
            events += 1;
            order.event(&event)?;
            if let Some(wrong) = &event.unreadable {
                faults.add(event.place(), format!("the payload cannot be read: {wrong}"))?;
            }
            if let Some(of_saga) = &event.of_saga {
                histories.event(of_saga, faults)?;
            }
            bar.set_position(event.position.unsigned_abs());
            if sealed {
                seals.event(event, faults).await?;
            }
        }
    }
    bar.finish_and_clear();
    seals.end(faults).await?;
    let chains = order.end(&*archive, faults, (seals.chained_until(), seals.until())).await?;
    seals.chains(chains, faults).await?;
    let documents = documents::verify(&*archive, &histories, faults).await?;
    let topics = match &arguments.on_bus.bus {
        None => None,
        Some(settings) => match bus::verify(&arguments.on_bus, settings, store, &stop, faults).await? {
            None => {
                eprintln!("stopped while the topics were read; of these, nothing is verified but what was told");
                return Ok(Verdict::Stopped);
            }
            found => found,
        },
    };
    let verified = Verified {
        events,
        sagas: histories.len(),
        documents,
        sealed_until: seals.until(),
        seal: seals.hash(),
        topics,
        faults: faults.count,
    };
    tell(&verified, faults.output)
}

/// Prints the result.
fn tell(verified: &Verified, output: &mut Output) -> Result<Verdict, Failure> {
    if output.json {
        output.value(verified)?;
        return Ok(if verified.faults == 0 { Verdict::Fine } else { Verdict::Fault });
    }
    if verified.faults > TOLD_MAX {
        output.line(&format!("and {} more", grouped((verified.faults - TOLD_MAX) as i64)))?;
    }
    let Verified { events, sagas, documents, faults, .. } = verified;
    let (events, sagas, documents) = (grouped(*events), grouped(*sagas as i64), grouped(*documents as i64));
    let found = if *faults == 1 { "1 fault".to_owned() } else { format!("{} faults", grouped(*faults as i64)) };
    output.line(&format!("{events} events, {sagas} sagas and {documents} documents verified: {found}"))?;
    if let Some(of_topics) = &verified.topics {
        of_topics.tell(output)?;
    }
    if let Some(seal) = &verified.seal {
        output.line(&format!("sealed up to position {}: {seal}", grouped(verified.sealed_until)))?;
    }
    Ok(if verified.faults == 0 { Verdict::Fine } else { Verdict::Fault })
}

/// The parts of an event that are verified, prepared in parallel with the pass over the log.
struct Event {
    position: i64,
    stream: Box<str>,
    version: i64,
    id: Uuid,
    /// See [`stream_key`].
    key: u128,
    /// The hash of the event; zero if there are no seals.
    digest: Digest,
    unreadable: Option<String>,
    /// The whole event, if it belongs to a saga's stream.
    of_saga: Option<Box<Recorded>>,
}

impl Event {
    fn of(event: &Stored<'_>, sealed: bool) -> Self {
        let is_of_saga = event.stream.starts_with("saga.");
        Self {
            position: event.position.0,
            stream: event.stream.as_ref().into(),
            version: event.version.0,
            id: event.id,
            key: stream_key(&event.stream),
            digest: if sealed { digest(event) } else { Digest::default() },
            unreadable: serde_json::from_str::<&RawValue>(&event.data).err().map(|error| error.to_string()),
            of_saga: is_of_saga.then(|| Box::new(event.recorded())),
        }
    }

    fn place(&self) -> String {
        at(self.position, &self.stream, self.version)
    }
}

/// Describes where an event is.
fn place(event: &Recorded) -> String {
    at(event.position.0, event.stream.as_str(), event.version.0)
}

fn at(position: i64, stream: &str, version: i64) -> String {
    format!("position {position} ({stream} v{version})")
}
