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
        // The reader that closed the output early has already seen a fault, or would have seen one.
        Err(Failure::OutputClosed) if faults.count() > 0 => Ok(Verdict::Fault),
        verified => verified,
    }
}

async fn verify(arguments: VerifyArgs, store: &Store, faults: &mut Faults<'_>) -> Result<Verdict, Failure> {
    let archive = store.port();
    let until = archive.status().await?.head.0;
    let stop = Stop::on_ctrl_c();
    let bar = progress::bar("verified", until.unsigned_abs());
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
    let mut topics = None;
    if let Some(settings) = &arguments.bus.bus {
        topics = stop.unless(bus::verify(&arguments.bus, settings, store, faults)).await.transpose()?;
        if topics.is_none() {
            eprintln!("stopped while the topics were read; of these, nothing is verified but what was told");
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
