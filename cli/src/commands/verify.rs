//! `verify`: checks a store in one pass over the log and one pass over the documents.

mod bus;
mod documents;
mod event;
mod faults;
mod histories;
mod order;
mod seal;
mod sorter;

use annals::{LogQuery, archive::Stored};
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;

use self::{
    bus::{BusArgs, TopicCounts},
    event::CheckedEvent,
    faults::Faults,
    histories::Histories,
    order::Order,
    seal::Seals,
};
use crate::{
    failure::{Failure, Verdict},
    output::{Output, grouped},
    progress,
    stop::Stop,
    store::Store,
};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals verify
      check versions, ids, payloads, histories of sagas, and checkpoints; print one line per fault; exit code 1 if there is any
  annals verify --seal
      also seal new events: later runs find sealed events that were changed, deleted, moved or cut off
  annals verify --expect 5b1c0e…
      also check that the seal with this hash exists; note the hash elsewhere, because a person who can change the log may also
      be able to change the seals
  annals verify --bus kafka://broker:9092
      also check that the topics hold the messages that the relays recorded as sent

With --bus, every event and command up to the checkpoint of its relay must be in its topic, with the same bytes, key and attributes,
and in the order of its stream. Each missing message is a fault, and so is each message that claims to come from this log and does
not. Messages that retention removed are counted, and are not faults: if the beginning of a partition is gone, the messages of a
relay before its first remaining message are not checked. In a compacted topic, any message may be gone: such a topic is one
fault, with the number of missing messages. Messages that were sent twice are counted. Messages that a relay has parked are not
expected; messages that were dropped from there are missing. Topics to which no relay of this store writes are not checked.

The command prints up to 1,000 faults. Events written during the run are checked by the next run.")]
pub(crate) struct VerifyArgs {
    /// Also seal the events that are not sealed yet.
    #[arg(long)]
    seal: bool,
    /// The hash that an earlier run printed at its end.
    #[arg(long, value_name = "HASH")]
    expect: Vec<String>,
    #[command(flatten)]
    bus: BusArgs,
}

/// The result of the verification.
#[derive(Serialize)]
struct VerifySummary {
    events: i64,
    sagas: usize,
    documents: u64,
    /// The events up to this position are sealed.
    sealed_until: i64,
    /// The hash of the last seal.
    seal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    topics: Option<TopicCounts>,
    faults: u64,
}

pub(crate) async fn run(arguments: VerifyArgs, store: &Store, output: &mut Output) -> Result<Verdict, Failure> {
    let mut faults = Faults::new(output);
    match verify(arguments, store, &mut faults).await {
        // If the reader of the output closes it early, faults that were already found still decide the verdict.
        Err(Failure::OutputClosed) if faults.count() > 0 => Ok(Verdict::Fault),
        verified => verified,
    }
}

async fn verify(arguments: VerifyArgs, store: &Store, faults: &mut Faults<'_>) -> Result<Verdict, Failure> {
    let archive = store.port();
    let until = archive.status().await?.head.0;
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("verified", until.unsigned_abs(), &stop);
    let mut order = Order::new()?;
    let mut histories = Histories::default();
    let mut seals = Seals::open(archive.clone(), arguments.seal, arguments.expect, faults).await?;
    let sealed = seals.are_there();
    let look = move |events: &mut Vec<CheckedEvent>, event: Stored<'_>| events.push(CheckedEvent::of(&event, sealed));
    let mut log = store.batches(LogQuery::all(), 1..=until, look).await?;
    let mut events = 0;
    while let Some(batch) = log.try_next().await? {
        for event in batch {
            if stop.is_asked() {
                bar.finish_and_clear();
                eprintln!("stopped at position {}; the rest of the log is not verified", event.position);
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
    let mut topics = None;
    if let Some(settings) = &arguments.bus.bus {
        topics = stop.unless(bus::verify(&arguments.bus, settings, store, faults, &stop)).await.transpose()?;
        if topics.is_none() {
            eprintln!("stopped while the topics were read; the topics are not verified");
            return Ok(Verdict::Stopped);
        }
    }
    let summary = VerifySummary {
        events,
        sagas: histories.len(),
        documents,
        sealed_until: seals.until(),
        seal: seals.hash(),
        topics,
        faults: faults.count(),
    };
    summary.print(faults.end()?)?;
    Ok(if faults.count() == 0 { Verdict::Fine } else { Verdict::Fault })
}

impl VerifySummary {
    fn print(&self, output: &mut Output) -> Result<(), Failure> {
        if output.json {
            return output.value(self);
        }
        let Self { events, sagas, documents, faults, .. } = self;
        let found = if *faults == 1 { "1 fault".to_owned() } else { format!("{} faults", grouped(*faults as i64)) };
        output.line(&format!(
            "{} events, {} sagas and {} documents verified: {found}",
            grouped(*events),
            grouped(*sagas as i64),
            grouped(*documents as i64)
        ))?;
        if let Some(counts) = &self.topics {
            counts.print(output)?;
        }
        if let Some(seal) = &self.seal {
            output.line(&format!("sealed up to position {}: {seal}", grouped(self.sealed_until)))?;
        }
        Ok(())
    }
}
