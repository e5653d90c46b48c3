//! `recover`: repairs a store whose database was restored from a backup that is older than its Kafka topics.

mod checkpoint;
mod found;
mod owed;
mod restorer;
mod sorter;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use annals::{
    Archive, Document, DocumentKey, Position, StreamId, Version,
    archive::{Contents, Stored},
    bus::Ends,
    checkpoint::CHECKPOINTS,
    operator::OperatorEvent,
    pages,
    recovery::{self, Recovery},
    relay::{LogNames, RelayProgress, Segment},
};
use annals_kafka::{KafkaBus, Settings};
use clap::Args;
use futures::TryStreamExt;
use serde::Serialize;
use serde_json::{Value, json};

use self::{
    checkpoint::checkpoint,
    found::{Found, Search},
    restorer::{Counts, Restorer},
};
use crate::{
    confirm::ActionArgs,
    failure::{Failure, Verdict},
    output::{Output, grouped},
    resume_command::ResumeCommand,
    stop::Stop,
    store::{Store, restore},
};

/// The number of positions that stay unused after the last position in the topics. The lost database may have assigned
/// positions that its relay had not yet sent, and HTTP clients may remember those positions.
const MARGIN: i64 = 1_000_000;
/// The id of the operator stream that records actions on the log itself.
const LOG: &str = "log";

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  annals recover --bus kafka://broker:9092 --reason \"disk lost, restored from 03:00\" --dry-run
      print which events would be taken back, and which messages are lost
  annals recover --bus kafka://broker:9092 --reason \"disk lost, restored from 03:00\" --yes
      take the events back; after an interruption at any moment, the same command continues
  annals recover --service order --anew --bus kafka://broker:9092 --reason \"new database\" --yes
      start a new store after the positions that another log has used in the topics

The command takes back events that the services published, and their answers to sagas, unchanged: ids, versions, positions, times,
bytes. The command lists messages that cannot be taken back, and the exit code is 1. Sagas of the lost time start again from the
events that started them, and their participants give the same answers. The log gets a new name, and positions after all
positions that were ever sent, so that consumers can tell old messages from new messages.

Stop all instances of the services first, and start the services after this command. docs/postgresql.md has the whole procedure.")]
pub(crate) struct RecoverArgs {
    /// The Kafka of the services: `kafka://host:port[,host:port][?name=value&…]`.
    #[arg(long, value_name = "URL")]
    bus: Settings,
    /// The services on the store [default: those whose relays have run on it].
    #[arg(long, value_name = "NAME")]
    service: Vec<String>,
    /// Start after the contents of the topics, and take no event back.
    #[arg(long)]
    anew: bool,
    /// Only print what the command would do.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    act: ActionArgs,
}

/// The result of a recovery or of a dry run.
#[derive(Serialize)]
struct Recovered<'a> {
    services: &'a BTreeSet<String>,
    topics: usize,
    /// The new name of the log.
    log: &'a str,
    restored_to: i64,
    /// The first position of the new segment.
    first: i64,
    #[serde(flatten)]
    counts: &'a Counts,
    dry_run: bool,
}

/// The state from which a recovery starts.
struct Plan {
    services: BTreeSet<String>,
    relayed: BTreeMap<String, RelayProgress>,
    names: LogNames,
    names_version: i64,
    recovery: Recovery,
    recovery_version: i64,
    resumes: bool,
    head: i64,
}

pub(crate) async fn run(
    arguments: RecoverArgs,
    store: &Store,
    resume: &ResumeCommand,
    output: &mut Output,
) -> Result<Verdict, Failure> {
    let by = arguments.act.by()?;
    let archive = store.port();
    let stop = Stop::on_ctrl_c();
    let plan = Plan::of(&arguments, &archive).await?;
    if !arguments.dry_run {
        no_instance_runs(&archive).await?;
    }
    let bus = KafkaBus::connect(arguments.bus.clone()).await?;
    let search = Search { services: &plan.services, relayed: &plan.relayed, names: &plan.names };
    let Some(found) = stop.unless(search.run(&bus)).await else {
        eprintln!("stopped while the topics were read; nothing was changed");
        return Ok(Verdict::Stopped);
    };
    let mut recovering = Recovering { plan, arguments, by, bus };
    if let Some(verdict) = recovering.run(found?, store, &stop, output).await? {
        return Ok(verdict);
    }
    eprintln!("stopped; to continue, run: {}", resume.command(words(&recovering.arguments)));
    Ok(Verdict::Stopped)
}

/// A recovery that has found something to do, or that may still find something when it compares the log with the
/// topics.
struct Recovering {
    plan: Plan,
    arguments: RecoverArgs,
    by: String,
    bus: KafkaBus,
}

/// What the topics contained, and what the recovery did with their messages.
struct Outcome<'a> {
    found: &'a Found,
    unknown: Vec<(String, i64)>,
    first: Position,
    counts: &'a Counts,
}

impl Recovering {
    /// Returns `None` if the user stopped the recovery.
    async fn run(
        &mut self,
        mut found: Found,
        store: &Store,
        stop: &Stop,
        output: &mut Output,
    ) -> Result<Option<Verdict>, Failure> {
        let archive = store.port();
        let is_behind = self.plan.is_behind(&found);
        let dry_run = self.arguments.dry_run;
        let unknown = self.plan.unknown_logs(&found, self.arguments.anew)?;
        self.plan.recovery.inboxes = found.inboxes.clone();
        if is_behind && !dry_run {
            if !self.is_confirmed(store, stop).await? {
                return Ok(None);
            }
            self.plan.begin(&archive).await?;
        }
        let restored_to = self.plan.recovery.restored_to.0;
        let mut restorer = Restorer::new(store, self.plan.head, restored_to, is_behind && !dry_run, output).await?;
        if !self.arguments.anew {
            let Some(restored) = stop.unless(self.restore(&mut restorer, &mut found, &archive)).await else {
                return Ok(None);
            };
            restored?;
        }
        let counts = restorer.counts.clone();
        let first_other = restorer.first_other;
        if !is_behind && first_other.is_none() {
            output.line("the topics hold nothing that the log lacks: there is nothing to recover")?;
            return Ok(Some(Verdict::Fine));
        }
        if let Some(other) = first_other {
            self.plan.recovery.restored_to = Position(restored_to.min(other - 1));
        }
        let first = found.last().max(archive.status().await?.head.0) + MARGIN;
        if !dry_run {
            if !is_behind && !self.is_confirmed(store, stop).await? {
                return Ok(None);
            }
            let outcome = Outcome { found: &found, unknown, first: Position(first), counts: &counts };
            self.complete(&archive, outcome).await?;
        }
        let recovered = Recovered {
            services: &self.plan.services,
            topics: found.topics,
            log: &self.plan.recovery.log,
            restored_to: self.plan.recovery.restored_to.0,
            first,
            counts: &counts,
            dry_run,
        };
        recovered.print(output)?;
        Ok(Some(if counts.lost == 0 { Verdict::Fine } else { Verdict::Fault }))
    }

    /// Asks the operator to confirm the recovery. Returns `false` if the user stopped the recovery instead.
    async fn is_confirmed(&self, store: &Store, stop: &Stop) -> Result<bool, Failure> {
        let question = format!("Recover {} from the topics?", store.url);
        let confirmed = self.arguments.act.confirm_unless(stop, &question).await.transpose()?;
        Ok(confirmed.is_some())
    }

    /// Writes the events of the topics into the log again, and the work that participants have to do again.
    async fn restore(
        &self,
        restorer: &mut Restorer<'_>,
        found: &mut Found,
        archive: &Arc<dyn Archive>,
    ) -> Result<(), Failure> {
        restorer.run(found).await?;
        if restorer.writes {
            let owed = std::mem::take(&mut restorer.owed);
            for step in owed.write(&self.plan.services, archive, &self.bus).await? {
                restorer.lost(
                    &step,
                    "the step was answered, its work may be lost, and its command is no longer in any topic",
                )?;
            }
        }
        Ok(())
    }

    /// Writes the last commit, which holds the new name of the log, the checkpoints of the relays, the operator's event
    /// and, with `--anew`, the checkpoints of the consumers.
    async fn complete(&mut self, archive: &Arc<dyn Archive>, outcome: Outcome<'_>) -> Result<(), Failure> {
        let Outcome { found, unknown, first, counts } = outcome;
        let plan = &mut self.plan;
        let anew = self.arguments.anew;
        let mut segment = Segment::new(plan.recovery.log.clone(), first);
        segment.restored_to = Some(plan.recovery.restored_to);
        for (log, first) in unknown {
            if anew {
                segment.passes_over.push(log.into());
            } else {
                let segment = Segment::new(log.into(), Position(first));
                plan.names.push(segment).map_err(|error| Failure::new(error.to_string()))?;
            }
        }
        plan.names.push(segment).map_err(|error| Failure::new(error.to_string()))?;
        plan.recovery.complete = true;
        let mut documents = plan.relays(archive, found).await?;
        if anew {
            documents.extend(inboxes(archive, &self.bus, found).await?);
        }
        documents.push(plan.names.document(plan.names_version + 1));
        documents.push(plan.recovery.document(plan.recovery_version + 1));
        let event = OperatorEvent::Recovered {
            services: plan.services.iter().cloned().collect(),
            log: plan.recovery.log.to_string(),
            restored_to: plan.recovery.restored_to,
            taken_back: counts.taken_back,
            anew,
            by: self.by.clone(),
            reason: self.arguments.act.reason.clone(),
        };
        let stored = recorded(archive, &event, first).await?;
        restore(&**archive, Contents { events: vec![stored], documents }).await
    }
}

/// The arguments that continue an interrupted recovery.
fn words(arguments: &RecoverArgs) -> Vec<String> {
    let mut words = vec!["recover".to_owned(), "--bus".to_owned(), arguments.bus.to_string()];
    for service in &arguments.service {
        words.extend(["--service".to_owned(), service.clone()]);
    }
    if arguments.anew {
        words.push("--anew".to_owned());
    }
    if arguments.dry_run {
        words.push("--dry-run".to_owned());
    }
    words.extend(arguments.act.words());
    words
}

impl Recovered<'_> {
    fn print(&self, output: &mut Output) -> Result<(), Failure> {
        if output.json {
            return output.value(self);
        }
        let number = |count: u64| grouped(count.cast_signed());
        let Recovered { topics, log, restored_to, first, counts, dry_run, .. } = self;
        let Counts { taken_back, done_again, saga_steps, lost } = counts;
        let would = if *dry_run { "would be " } else { "" };
        let again = if *dry_run { "would be" } else { "will be" };
        output.line(&format!(
            "{} events {would}taken back from {topics} topics into a log that ended at position {}; the work of \
             {} answers to sagas, and {} steps of sagas, {again} done again at the next start; {} messages are lost",
            number(*taken_back),
            grouped(*restored_to),
            number(*done_again),
            number(*saga_steps),
            number(*lost),
        ))?;
        if *dry_run {
            return Ok(());
        }
        output.line(&format!(
            "messages from position {} on carry the new log name {log}; the services may start",
            grouped(*first)
        ))
    }
}

/// Fails if an instance of any service appears to be alive.
async fn no_instance_runs(archive: &Arc<dyn Archive>) -> Result<(), Failure> {
    let alive = recovery::alive(&**archive).await?;
    if alive.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "instances of services run on the store: {}. Stop all instances, and run this command again",
        alive.join(", ")
    )))
}

impl Plan {
    async fn of(arguments: &RecoverArgs, archive: &Arc<dyn Archive>) -> Result<Self, Failure> {
        let relayed = RelayProgress::on(&**archive).await?;
        let mut services: BTreeSet<String> = relayed.keys().cloned().collect();
        services.extend(arguments.service.iter().cloned());
        if services.is_empty() {
            return Err(Failure::new(
                "no relay has run on this store: name the services that will use the store, with --service NAME",
            ));
        }
        let (names, names_version) = LogNames::with_version(&**archive).await?;
        let head = archive.status().await?.head;
        let known = Recovery::of(&**archive).await?;
        let recovery_version = known.as_ref().map_or(0, |(_, version)| *version);
        let begun = known.map(|(recovery, _)| recovery).filter(|recovery| !recovery.complete);
        let resumes = begun.is_some();
        if arguments.anew && begun.as_ref().is_some_and(|recovery| recovery.takes_back) {
            return Err(Failure::new(
                "a recovery without --anew has begun on this store, and may have taken events back: finish that recovery with the \
                 same command as before, or restore the database once more and then begin with --anew",
            ));
        }
        let new = || Recovery {
            complete: false,
            log: LogNames::draw(),
            restored_to: head,
            takes_back: false,
            inboxes: Ends::default(),
        };
        let mut recovery = begun.unwrap_or_else(new);
        recovery.takes_back |= !arguments.anew;
        Ok(Self { services, relayed, names, names_version, recovery, recovery_version, resumes, head: head.0 })
    }

    /// Returns whether a recovery was started earlier, or whether the topics hold messages that the log lacks. The log
    /// lacks a message if the message names a log that the store does not list, or has a position beyond the end of the
    /// log.
    fn is_behind(&self, found: &Found) -> bool {
        let is_ahead = |(log, (_, last)): (&String, &(i64, i64))| !self.names.knows(log) || *last > self.head;
        self.resumes || found.logs.iter().any(is_ahead)
    }

    /// Returns the logs in the topics that the store does not list, in the order of their first positions.
    fn unknown_logs(&self, found: &Found, anew: bool) -> Result<Vec<(String, i64)>, Failure> {
        let unknown = found.logs.iter().filter(|(log, _)| !self.names.knows(log));
        let mut unknown: Vec<_> = unknown.map(|(log, (first, last))| (log.clone(), *first, *last)).collect();
        unknown.sort_by_key(|(_, first, _)| *first);
        if !anew {
            let mut end = self.recovery.restored_to.0;
            for (log, first, last) in &unknown {
                if *first <= end {
                    return Err(Failure::new(format!(
                        "log {log} of the topics has positions {first} to {last}, and this store has other events up to \
                         position {end}: the events of that log cannot be taken back. Start after that log with --anew, \
                         or restore its database"
                    )));
                }
                end = *last;
            }
        }
        Ok(unknown.into_iter().map(|(log, first, _)| (log, first)).collect())
    }

    /// Records the start of the recovery. From then on, no service starts until the recovery is complete.
    async fn begin(&mut self, archive: &Arc<dyn Archive>) -> Result<(), Failure> {
        self.recovery_version += 1;
        let begun = self.recovery.document(self.recovery_version);
        restore(&**archive, Contents { events: Vec::new(), documents: vec![begun] }).await
    }

    /// Moves each relay to the first position whose message the brokers may lack, so that the relay does not send
    /// all earlier messages again.
    async fn relays(&self, archive: &Arc<dyn Archive>, found: &Found) -> Result<Vec<Document>, Failure> {
        let mut documents = Vec::new();
        for service in &self.services {
            let mut lane = 0;
            while let Some(document) = checkpoint(archive, &format!("{service}.relay/{lane}")).await? {
                let mut relay: Value = serde_json::from_str(&document.body)?;
                let next = relay["next"].as_i64().unwrap_or(0);
                let taken_before = found.all_taken_before(service).map_or(next, |first| next.max(first - 1));
                relay["next"] = taken_before.into();
                relay["taken"] = serde_json::to_value(&found.ends)?;
                documents.push(Document { version: document.version + 1, body: relay.to_string().into(), ..document });
                lane += 1;
            }
        }
        Ok(documents)
    }
}

/// Returns the operator's action as a stored event, which becomes the first event of the new segment.
async fn recorded(
    archive: &Arc<dyn Archive>,
    event: &OperatorEvent,
    first: Position,
) -> Result<Stored<'static>, Failure> {
    let stream = StreamId::new(annals::operator::CATEGORY, LOG).map_err(|error| Failure::new(error.to_string()))?;
    let events = pages::history(&**archive, &stream, Version::START);
    let last = events.try_fold(Version::START, async |_, event| Ok(event.version)).await?;
    let new = event.recorded(uuid::Uuid::new_v4())?;
    Ok(Stored {
        position: first,
        stream: stream.as_str().to_owned().into(),
        version: last.next(),
        id: new.id,
        type_name: new.type_name.to_string().into(),
        schema_version: new.schema_version,
        data: new.data.to_string().into(),
        metadata: new.metadata.to_json().to_string().into(),
        recorded_at: archive.clock().now(),
    })
}

/// For `--anew`: returns checkpoints that make the services consume from the current end of their topics, because the
/// older messages belong to sagas of another log.
async fn inboxes(archive: &Arc<dyn Archive>, bus: &KafkaBus, found: &Found) -> Result<Vec<Document>, Failure> {
    let mut documents = Vec::new();
    for topic in found.inboxes.topics() {
        for (partition, next) in found.inboxes.partitions(topic) {
            let id = format!("{topic}/{topic}/{partition}");
            let version = checkpoint(archive, &id).await?.map_or(0, |document| document.version);
            let body = json!({ "next": next, "incarnation": &**bus.cluster(), "at": archive.clock().now() });
            let key = DocumentKey::new(CHECKPOINTS, id);
            documents.push(Document { key, version: version + 1, body: body.to_string().into(), due: None });
        }
    }
    Ok(documents)
}
