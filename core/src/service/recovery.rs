//! Recovery of a database that was restored to an earlier moment while the bus still holds later messages. A service
//! detects this state when it starts, and `annals recover` repairs it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    bus::{Bus, Delivery, Ends},
    commit::{Commit, CommitError, Document, DocumentKey, Put},
    event::{Position, Recorded},
    follow::{
        checkpoint::{CHECKPOINTS, Checkpoint},
        peer::{HEARTBEAT, INSTANCES},
        relay_progress::RelayProgress,
    },
    service::start_error::StartError,
    store::{
        EventStore, LogQuery, StoreError,
        names::{LogNames, log_of},
        pages::{self, PAGE},
    },
};

pub use crate::service::start_error::Ahead;

/// How often the timers of a recovered service check whether its inbox was read.
const INBOX_LOOK: Duration = Duration::from_secs(1);
/// How often a recovered service checks whether its sagas were started again.
const SAGAS_LOOK: Duration = Duration::from_millis(200);
/// The maximum time that a recovered service waits for its sagas. The limit is below five minutes, because a bus
/// considers a consumer dead if the consumer does not poll for that long.
const SAGAS_WAIT_MAX: Duration = Duration::from_secs(240);
/// How often a running service checks whether its store may have lost events.
const HISTORY_LOOK: Duration = Duration::from_millis(200);
/// The maximum time that timers wait for the inbox to be read. Without a limit, timers could wait forever: retention
/// may remove messages before they are read, and then the checkpoint never reaches the recorded end.
const INBOX_WAIT_MAX: Duration = Duration::from_secs(600);

/// The progress of a recovery. The command `annals recover` writes this document first, and sets `complete` in its last
/// commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recovery {
    /// Whether all events in the topics were copied back into the log. Until then, no service starts.
    pub complete: bool,
    /// The name of the log segment that the recovery adds.
    pub log: Arc<str>,
    /// The position at which the log ended before the recovery.
    pub restored_to: Position,
    /// Whether the recovery copies events from the topics back into the log. If so, a run with `--anew` must not finish
    /// the recovery.
    #[serde(default)]
    pub takes_back: bool,
    /// The ends of the services' inbox topics at the time of the recovery. Replies before these ends may belong to
    /// sagas that the log has lost.
    pub inboxes: Ends,
}

impl Recovery {
    /// The key of the document that holds the progress of a recovery.
    pub fn key() -> DocumentKey {
        DocumentKey::new("recovery", "progress")
    }

    /// Returns the last recovery of a store, together with the version of its document.
    pub async fn of(store: &dyn EventStore) -> Result<Option<(Self, i64)>, StoreError> {
        let Some(found) = store.document(&Self::key()).await? else { return Ok(None) };
        let recovery = serde_json::from_str(&found.body)
            .map_err(|error| StoreError::Corrupt(format!("document {}: {error}", found.key)))?;
        Ok(Some((recovery, found.version)))
    }

    /// Returns the document that holds this progress, with the given version.
    pub fn document(&self, version: i64) -> Document {
        Document { key: Self::key(), version, body: serde_json::to_string(self).unwrap_or_default().into(), due: None }
    }
}

/// Returns the names of the instances that are alive on a store. The call watches for heartbeats, and takes as long as
/// three heartbeat intervals.
pub async fn alive(store: &dyn EventStore) -> Result<Vec<Arc<str>>, StoreError> {
    let before: Vec<Document> = pages::collection(store, INSTANCES, "").try_collect().await?;
    if before.is_empty() {
        return Ok(Vec::new());
    }
    tokio::time::sleep(3 * HEARTBEAT).await;
    let after: Vec<Document> = pages::collection(store, INSTANCES, "").try_collect().await?;
    let beats = after.into_iter().filter(|document| !before.contains(document));
    Ok(beats.map(|document| document.key.id).collect())
}

/// Fails if the bus holds a message that the service sent but whose event is missing from the log, or if a recovery of
/// the store is not complete.
pub(crate) async fn check(service: &str, store: &dyn EventStore, bus: &dyn Bus) -> Result<(), StartError> {
    if bus.is_local() {
        return Ok(());
    }
    if Recovery::of(store).await?.is_some_and(|(recovery, _)| !recovery.complete) {
        return Err(StartError::HalfRecovered { service: service.to_owned() });
    }
    let mut ends =
        RelayProgress::on(store).await?.remove(service).map(|relayed| relayed.taken().clone()).unwrap_or_default();
    ends.name(&format!("{service}.events"));
    let sent = bus.sent_since(service, &ends).await?;
    // The names are read only after the messages, because another instance of the service may send messages in the
    // meantime.
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

/// Returns whether a message carries this event, or a command that this event caused.
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

/// Until `shutdown` is cancelled, checks the bus again whenever the store may have lost events. The store accepts no
/// commit between such a loss and the end of the check. Otherwise, the service could store a new event at the position
/// of a lost event, and the log could no longer be reconciled with the topics.
///
/// # Errors
/// Fails if the bus holds messages whose events are missing from the log. The service must stop then, because receivers
/// would mistake its new messages for messages that they have already handled.
pub(crate) async fn watch(
    service: String,
    store: Arc<dyn EventStore>,
    bus: Arc<dyn Bus>,
    shutdown: CancellationToken,
) -> Result<(), String> {
    let mut history = store.history();
    store.accept_history(&service, history);
    loop {
        tokio::select! {
            () = tokio::time::sleep(HISTORY_LOOK) => {}
            () = shutdown.cancelled() => {
                store.accept_history(&service, u64::MAX);
                return Ok(());
            }
        }
        let current = store.history();
        if current == history {
            continue;
        }
        match check(&service, &*store, &*bus).await {
            Ok(()) => {
                history = current;
                store.accept_history(&service, history);
            }
            Err(error @ (StartError::Ahead(_) | StartError::HalfRecovered { .. })) => {
                shutdown.cancel();
                return Err(error.to_string());
            }
            Err(error) => {
                tracing::warn!(
                    %service, %error,
                    "the log may have lost events, and comparing the log with the bus failed; trying again"
                )
            }
        }
    }
}

/// Waits until a recovered service has read all messages that its inbox held at the time of the recovery. These
/// messages include replies that the sagas of the service wait for. A timer that fired earlier would treat these
/// replies as missing.
pub(crate) async fn inbox_read(store: &dyn EventStore, service: &str, shutdown: &CancellationToken) {
    let until = Instant::now() + INBOX_WAIT_MAX;
    loop {
        match inbox_is_read(store, service).await {
            Ok(true) => return,
            Ok(false) if Instant::now() < until => {}
            Ok(false) => {
                tracing::warn!(
                    %service,
                    "the messages that the inbox held at the recovery were not all read in time: timers fire from now on"
                );
                return waits_no_more(store, service).await;
            }
            // If the error persists, the timers report it themselves.
            Err(error) => tracing::debug!(%service, %error, "checking whether the inbox was read failed"),
        }
        tokio::select! {
            () = tokio::time::sleep(INBOX_LOOK) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Records that the timers of a service have waited long enough. The messages that were missing from the inbox will not
/// arrive after the next start either.
async fn waits_no_more(store: &dyn EventStore, service: &str) {
    let failed = loop {
        let (mut recovery, version) = match Recovery::of(store).await {
            Ok(None) => return,
            Ok(Some(found)) => found,
            Err(error) => break error.to_string(),
        };
        recovery.inboxes.forget(&inbox(service));
        let Document { key, body, .. } = recovery.document(version + 1);
        let put = Put { key, expected: Some(version), body: Some(body), due: None };
        match store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await {
            Ok(_) => return,
            // Another service on the same store has stopped waiting for its own inbox.
            Err(CommitError::DocumentConflict { .. }) => {}
            Err(error) => break error.to_string(),
        }
    };
    tracing::warn!(%service, error = %failed, "recording that timers fire failed: the next start waits for the inbox again");
}

fn inbox(service: &str) -> String {
    format!("{service}.commands")
}

/// Waits until a recovered service has started again all sagas whose starting events were copied back into the log. The
/// inbox still holds replies to these sagas. Without this wait, a reply could arrive before its saga exists.
pub(crate) async fn sagas_begun(store: &dyn EventStore, starters: &[String], shutdown: &CancellationToken) {
    let until = Instant::now() + SAGAS_WAIT_MAX;
    while !starters.is_empty() && Instant::now() < until {
        match are_begun(store, starters).await {
            Ok(true) => return,
            Ok(false) => {}
            // If the error persists, the consumer reports the error when it reads the store.
            Err(error) => tracing::debug!(%error, "checking whether sagas were started again failed"),
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

/// Returns the position or offset of a checkpoint; 0 if the checkpoint does not exist.
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

    use async_trait::async_trait;

    use super::*;
    use crate::{
        commit::Committed,
        event::{StreamId, Version},
        store::{LogPage, Scan, StoreStatus, memory::MemoryStore},
    };

    /// A store whose reads of documents take a moment, so that two services read the same version of a document.
    struct Slow(MemoryStore);

    #[async_trait]
    impl EventStore for Slow {
        async fn documents(&self, keys: &[DocumentKey]) -> Result<Vec<Option<Document>>, StoreError> {
            let found = self.0.documents(keys).await;
            tokio::task::yield_now().await;
            found
        }

        async fn commit(&self, commit: Commit) -> Result<Committed, CommitError> {
            self.0.commit(commit).await
        }

        async fn read_stream(
            &self,
            stream: &StreamId,
            after: Version,
            max: usize,
        ) -> Result<Vec<Recorded>, StoreError> {
            self.0.read_stream(stream, after, max).await
        }

        async fn read_log(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
            self.0.read_log(query, after, limit).await
        }

        async fn scan(&self, collection: &str, scan: &Scan, limit: usize) -> Result<Vec<Document>, StoreError> {
            self.0.scan(collection, scan, limit).await
        }

        async fn wait(&self, after: Position) -> Result<(), StoreError> {
            self.0.wait(after).await
        }

        async fn status(&self) -> Result<StoreStatus, StoreError> {
            self.0.status().await
        }
    }

    /// Returns a store that was recovered. The inboxes of three services held messages at that time.
    async fn recovered() -> Slow {
        let store = Slow(MemoryStore::new());
        let mut inboxes = Ends::default();
        for service in ["bank", "hotel", "shop"] {
            inboxes.set(&inbox(service), 0, 5);
        }
        let recovery =
            Recovery { complete: true, log: "log".into(), restored_to: Position(1), takes_back: true, inboxes };
        let Document { key, body, .. } = recovery.document(1);
        let put = Put { key, expected: Some(0), body: Some(body), due: None };
        store.commit(Commit { appends: Vec::new(), puts: vec![put] }).await.unwrap();
        store
    }

    /// Asserts that the timers of a service wait for this long.
    async fn timers_wait(store: &Slow, service: &str, waited: Duration) {
        let started = Instant::now();
        inbox_read(store, service, &CancellationToken::new()).await;
        let least_and_most = waited..waited + 2 * INBOX_LOOK;
        assert!(least_and_most.contains(&started.elapsed()), "{service}: {:?}, not {waited:?}", started.elapsed());
    }

    /// Retention may have removed the messages of the inbox. The timers wait for these messages once, and not again at
    /// each start.
    #[tokio::test(start_paused = true)]
    async fn timers_wait_only_once_for_a_missing_inbox() {
        let store = recovered().await;
        for waited in [INBOX_WAIT_MAX, Duration::ZERO] {
            timers_wait(&store, "bank", waited).await;
        }
        let (recovery, _) = Recovery::of(&store).await.unwrap().unwrap();
        assert_eq!(recovery.inboxes.of("hotel.commands", 0), Some(5), "the inbox of another service is waited for");
    }

    #[tokio::test(start_paused = true)]
    async fn timers_of_services_on_one_store_wait_only_once() {
        let store = recovered().await;
        for waited in [INBOX_WAIT_MAX, Duration::ZERO] {
            let bank_and_hotel = [timers_wait(&store, "bank", waited), timers_wait(&store, "hotel", waited)];
            futures::future::join_all(bank_and_hotel).await;
        }
        let (recovery, _) = Recovery::of(&store).await.unwrap().unwrap();
        assert_eq!(recovery.inboxes.of("shop.commands", 0), Some(5), "the inbox of another service is waited for");
    }
}
