//! A database that was restored to an earlier moment, under a bus that was not: found when a service starts, and brought back
//! by `annals recover`.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    bus::{Bus, Delivery, Ends},
    checkpoint::{CHECKPOINTS, Checkpoint},
    commit::{Commit, Document, DocumentKey, Put},
    event::{Position, Recorded},
    instance::{HEARTBEAT, INSTANCES},
    log_names::{LogNames, log_of},
    relayed::Relayed,
    service::StartError,
    store::{EventStore, LogQuery, Scan, StoreError},
};

/// Events read at once.
const PAGE: usize = 500;
/// How often the timers of a recovered service look whether its inbox was read.
const INBOX_LOOK: Duration = Duration::from_secs(1);
/// How often a recovered service looks whether its sagas were begun again.
const SAGAS_LOOK: Duration = Duration::from_millis(200);
/// How long it waits for that at most: a consumer that does not poll for five minutes is taken for dead.
const SAGAS_WAIT_MAX: Duration = Duration::from_secs(240);
/// How often a running service looks whether its store may have lost events.
const HISTORY_LOOK: Duration = Duration::from_millis(200);
/// How long timers wait for that at most: messages may be removed by retention before they are read, and offsets never get there.
const INBOX_WAIT_MAX: Duration = Duration::from_secs(600);

/// How far a recovery is: a document that the command writes first, and completes in its last commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// Whether all that the topics hold was taken back. Before that no service starts.
    pub complete: bool,
    /// The name of the segment that it adds.
    pub log: Arc<str>,
    /// Where the log ended before.
    pub restored_to: Position,
    /// Where the topics ended that the services consume: answers up to there may be for sagas that the log has lost.
    pub inboxes: Ends,
}

impl Recovery {
    /// The key of its document.
    pub fn key() -> DocumentKey {
        DocumentKey::new("recovery", "progress")
    }

    /// The last recovery of a store, with the version of its document.
    pub async fn of(store: &dyn EventStore) -> Result<Option<(Self, i64)>, StoreError> {
        let Some(found) = store.document(&Self::key()).await? else { return Ok(None) };
        let recovery = serde_json::from_str(&found.body)
            .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", found.key)))?;
        Ok(Some((recovery, found.version)))
    }

    /// Its document.
    pub fn document(&self, version: i64) -> Document {
        Document { key: Self::key(), version, body: serde_json::to_string(self).unwrap_or_default().into(), due: None }
    }
}

/// A message of a service that its log does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The service, which sent the message at an earlier time.
    pub service: String,
    /// Where the message is.
    pub topic: Arc<str>,
    /// In which partition.
    pub partition: u32,
    /// At which offset.
    pub offset: i64,
    /// The name of the log that the message came from.
    pub log: String,
    /// The position of its event in that log.
    pub position: Position,
    /// The id of the message.
    pub id: Uuid,
    /// Whether that log is this one at a later time; otherwise nothing is known of it.
    pub is_this_log: bool,
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { service, topic, partition, offset, log, position, id, is_this_log } = self;
        write!(
            f,
            "service {service}: topic {topic} is ahead of the log. Message {id}, at offset {offset} of partition {partition}, was sent from position {position} of log {log}, "
        )?;
        f.write_str(match is_this_log {
            true => "which is this log, and the log holds no such event any more: its database was restored to an earlier moment. ",
            false => "which this store does not know: it is a new store, or was restored from before the log had that name. ",
        })?;
        write!(
            f,
            "Stop all instances and run `annals recover --store URL --bus URL --service {service}`, which takes back what the \
             topics hold. To begin without that history, add `--anew`, or delete the topics of all services"
        )
    }
}

/// The instances that show on a store that they are alive. Takes as long as three of their heartbeats.
pub async fn alive(store: &dyn EventStore) -> Result<Vec<Arc<str>>, StoreError> {
    let before = store.scan(INSTANCES, &Scan::After("".into()), PAGE).await?;
    if before.is_empty() {
        return Ok(Vec::new());
    }
    tokio::time::sleep(3 * HEARTBEAT).await;
    let after = store.scan(INSTANCES, &Scan::After("".into()), PAGE).await?;
    let beats = after.into_iter().filter(|document| !before.contains(document));
    Ok(beats.map(|document| document.key.id).collect())
}

/// Whether the bus holds messages that a service sent and its log does not hold.
pub(crate) async fn check(service: &str, store: &dyn EventStore, bus: &dyn Bus) -> Result<(), StartError> {
    if bus.is_local() {
        return Ok(());
    }
    if Recovery::of(store).await?.is_some_and(|(recovery, _)| !recovery.complete) {
        return Err(StartError::HalfRecovered { service: service.to_owned() });
    }
    let mut ends = Relayed::on(store).await?.remove(service).map(|relayed| relayed.taken().clone()).unwrap_or_default();
    ends.name(&format!("{service}.events"));
    let sent = bus.sent_since(service, &ends).await?;
    // Only now: another instance of the service may be sending meanwhile.
    let names = LogNames::of(store).await?;
    let mut by_position: BTreeMap<Position, Vec<&Delivery>> = BTreeMap::new();
    for delivery in &sent {
        let Ok(message) = &delivery.message else { continue };
        let Some(log) = message.lane.as_deref().and_then(log_of) else { continue };
        if names.passes_over(log) {
            continue;
        }
        if !names.knows(log) {
            return Err(ahead(service, delivery, false));
        }
        if !names.may_have_lost(message.position) {
            by_position.entry(message.position).or_default().push(delivery);
        }
    }
    let mut log = Vec::new();
    for (position, deliveries) in by_position {
        let is_behind = |event: &Arc<Recorded>| event.position >= position;
        if !log.iter().any(is_behind) {
            log = store.read_log(&LogQuery::all(), Position(position.0 - 1), PAGE).await?.events;
        }
        let event = log.iter().find(|event| event.position == position);
        let is_of = |delivery: &&&Delivery| {
            let message = delivery.message.as_ref().ok();
            message
                .zip(event)
                .is_some_and(|(message, event)| comes_of(event, message.id, message.metadata.causation_id))
        };
        if let Some(delivery) = deliveries.iter().find(|delivery| !is_of(delivery)) {
            return Err(ahead(service, delivery, true));
        }
    }
    Ok(())
}

/// Whether a message is an event, or a command that its event caused.
fn comes_of(event: &Recorded, id: Uuid, causation: Uuid) -> bool {
    event.id == id || event.id == causation
}

fn ahead(service: &str, delivery: &Delivery, is_this_log: bool) -> StartError {
    let Delivery { partition, offset, message } = delivery;
    let found = message.as_ref().ok();
    let log = found.and_then(|message| message.lane.as_deref()).and_then(log_of).unwrap_or_default().to_owned();
    StartError::Ahead(Box::new(Ahead {
        service: service.to_owned(),
        topic: partition.topic.clone(),
        partition: partition.number,
        offset: *offset,
        log,
        position: found.map_or(Position::START, |message| message.position),
        id: delivery.id(),
        is_this_log,
    }))
}

/// Looks at the bus again whenever the store may have lost events under a running service, until `shutdown`.
///
/// # Errors
/// If the bus holds messages of events that are gone: what the service did from here on would be taken for what it has done.
pub(crate) async fn watch(
    service: String,
    store: Arc<dyn EventStore>,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> Result<(), String> {
    let mut history = store.history();
    loop {
        tokio::select! {
            () = tokio::time::sleep(HISTORY_LOOK) => {}
            () = shutdown.cancelled() => return Ok(()),
        }
        let current = store.history();
        if current == history {
            continue;
        }
        match check(&service, &*store, &*bus).await {
            Ok(()) => history = current,
            Err(error @ (StartError::Ahead(_) | StartError::HalfRecovered { .. })) => {
                shutdown.cancel();
                return Err(error.to_string());
            }
            Err(error) => tracing::warn!(%service, %error, "the log may have lost events; looking at the bus"),
        }
    }
}

/// Waits until a recovered service has read what its inbox held at the recovery. The answers that its sagas waited for are
/// among it: a timer that fires before would take them for missing.
pub(crate) async fn inbox_read(store: &dyn EventStore, service: &str, shutdown: &CancellationToken) {
    let until = Instant::now() + INBOX_WAIT_MAX;
    loop {
        match inbox_is_read(store, service).await {
            Ok(true) => return,
            Ok(false) if Instant::now() < until => {}
            Ok(false) => {
                tracing::warn!(%service, "the inbox was not read to where it ended at the recovery: timers fire from now on");
                return waits_no_more(store, service).await;
            }
            // The timers say so themselves, if it lasts.
            Err(error) => tracing::debug!(%service, %error, "looking whether the inbox was read"),
        }
        tokio::select! {
            () = tokio::time::sleep(INBOX_LOOK) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Notes that the timers of a service have waited for long enough: what its inbox lacks does not come at the next start either.
async fn waits_no_more(store: &dyn EventStore, service: &str) {
    let failed = match Recovery::of(store).await {
        Ok(None) => return,
        Ok(Some((mut recovery, version))) => {
            recovery.inboxes.forget(&inbox(service));
            let Document { key, body, .. } = recovery.document(version + 1);
            let put = Put { key, expected: Some(version), body: Some(body), due: None };
            let noted = store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await;
            noted.err().map(|error| error.to_string())
        }
        Err(error) => Some(error.to_string()),
    };
    if let Some(error) = failed {
        tracing::warn!(%service, %error, "noting that timers fire: the next start waits for the inbox once more");
    }
}

fn inbox(service: &str) -> String {
    format!("{service}.commands")
}

/// Waits until the sagas of a recovered service were begun again that the events taken back start. Answers to them, which the
/// inbox still holds, would find no saga before.
pub(crate) async fn sagas_begun(store: &dyn EventStore, starters: &[String], shutdown: &CancellationToken) {
    let until = Instant::now() + SAGAS_WAIT_MAX;
    while !starters.is_empty() && Instant::now() < until {
        match are_begun(store, starters).await {
            Ok(true) => return,
            Ok(false) => {}
            // The consumer says so itself, if it lasts.
            Err(error) => tracing::debug!(%error, "looking whether sagas were begun again"),
        }
        tokio::select! {
            () = tokio::time::sleep(SAGAS_LOOK) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

async fn are_begun(store: &dyn EventStore, starters: &[String]) -> Result<bool, StoreError> {
    if Recovery::of(store).await?.is_none() {
        return Ok(true);
    }
    let names = LogNames::of(store).await?;
    let first = names.segments().last().map_or(Position::START, |segment| segment.first);
    for starter in starters {
        let key = DocumentKey::new(CHECKPOINTS, format!("{starter}/0"));
        if next_of(store, &key).await? < first.0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where a checkpoint stands.
async fn next_of(store: &dyn EventStore, key: &DocumentKey) -> Result<i64, StoreError> {
    let Some(found) = store.document(key).await? else { return Ok(0) };
    let checkpoint: Checkpoint =
        serde_json::from_str(&found.body).map_err(|error| StoreError::Corrupt(format!("document {key}: {error}")))?;
    Ok(checkpoint.next)
}

async fn inbox_is_read(store: &dyn EventStore, service: &str) -> Result<bool, StoreError> {
    let Some((recovery, _)) = Recovery::of(store).await? else { return Ok(true) };
    let topic = inbox(service);
    for (partition, end) in recovery.inboxes.partitions(&topic) {
        let key = DocumentKey::new(CHECKPOINTS, format!("{topic}/{topic}/{partition}"));
        if next_of(store, &key).await? < end {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::memory::MemoryStore;

    /// Retention may have removed what the inbox held. That is waited for once, and not at each start.
    #[tokio::test(start_paused = true)]
    async fn timers_wait_once_for_an_inbox_that_is_gone() {
        let store = MemoryStore::new();
        let mut inboxes = Ends::default();
        inboxes.set("bank.commands", 0, 5);
        inboxes.set("hotel.commands", 0, 5);
        let recovery = Recovery { complete: true, log: "log".into(), restored_to: Position(1), inboxes };
        let Document { key, body, .. } = recovery.document(1);
        let put = Put { key, expected: Some(0), body: Some(body), due: None };
        store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await.unwrap();
        for waited in [INBOX_WAIT_MAX, Duration::ZERO] {
            let started = Instant::now();
            inbox_read(&store, "bank", &CancellationToken::new()).await;
            let (least, most) = (waited, waited + 2 * INBOX_LOOK);
            assert!((least..most).contains(&started.elapsed()), "{:?}, not {waited:?}", started.elapsed());
        }
        let (recovery, _) = Recovery::of(&store).await.unwrap().unwrap();
        assert_eq!(recovery.inboxes.of("hotel.commands", 0), Some(5), "the inbox of another service is waited for");
    }
}
