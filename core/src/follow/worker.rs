//! The worker of every subscription and consumer: calls the handler, moves checkpoints, and parks messages that fail.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use tokio::time::Instant;

use crate::{
    base::{backoff::Backoff, panic::caught, reason},
    bus::Message,
    commit::{CommitError, DocumentKey},
    decide::work::{Stale, Work},
    follow::{
        checkpoint::{Item, Lane},
        parking::{Lost, Parked, ParkedKeys, ParkedPlace, collection},
    },
    handler::{Handler, HandlerError, Remedy},
    health::{
        Reporter,
        notice::{FailedMessage, Notice},
    },
    store::{EventStore, StoreError},
};

/// The maximum number of messages that are handled in one commit.
pub(crate) const BATCH_MAX: usize = 512;
/// How often parked keys are checked for messages that are due.
pub(crate) const PARKED_TICK: Duration = Duration::from_millis(200);

/// How often a worker checks the lanes of other workers for messages that wait for a build like its own.
pub(crate) const BUILD_LOOK: Duration = Duration::from_millis(500);
/// The maximum delay before a message that waits for another build is retried. The delay is short because a try costs
/// little. In addition, every worker retries all these messages when it starts.
pub(crate) const BUILD_LOOK_MAX: Duration = Duration::from_secs(10);

/// How long a parked message waits for its next retry if the store was unavailable during a retry.
const STORE_AWAITED: Duration = Duration::from_secs(1);

/// Returns the reason why a message is parked, as shown to operators.
pub(crate) fn parked_reason(reason: &str, remedy: Remedy) -> String {
    match remedy {
        Remedy::AwaitBuild => reason::storable(&format!("waits for a newer build: {reason}")),
        Remedy::RetryMessage | Remedy::Park | Remedy::AwaitStore => reason::storable(reason),
    }
}

/// When and how often a failed message is retried.
#[derive(Clone, Debug)]
pub struct RetryPolicy {
    /// The maximum number of tries. If the last try fails too, the message stays parked until an operator redrives it.
    pub attempts_max: u32,
    /// The delay before the second try. The delay doubles before each further try. The actual delay is a random value
    /// between half of this delay and the full delay.
    pub delay_min: Duration,
    /// The maximum delay.
    pub delay_max: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts_max: 8, delay_min: Duration::from_millis(200), delay_max: Duration::from_secs(60) }
    }
}

impl RetryPolicy {
    pub(crate) fn delay_after(&self, attempts: u32) -> Option<Duration> {
        let doubled = self.delay_min.saturating_mul(2u32.saturating_pow(attempts.saturating_sub(1).min(20)));
        (attempts < self.attempts_max).then(|| Backoff::between(doubled.min(self.delay_max), self.delay_max).next())
    }
}

/// Why a worker stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Stop {
    /// Another worker moved the checkpoint, so this worker has lost the lane.
    #[error("another worker took over {0}")]
    Fenced(DocumentKey),
    /// The history of the log has changed since the checkpoint was read.
    #[error("the log changed (failover or restore): reading the checkpoint again")]
    Renewed,
    /// The checkpoint was removed, together with the subscription or generation to which it belonged.
    #[error(
        "checkpoint {0} is missing or has another number of lanes: another process changed it; restart this process"
    )]
    Gone(DocumentKey),
    /// The store records another number of lanes, which cannot be changed now.
    #[error("{0}")]
    Lanes(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The data that a worker keeps about the parked messages of other workers, whose builds could not handle these
/// messages.
#[derive(Default)]
pub(crate) struct Others {
    pub looked_at: Option<Instant>,
    /// Messages that this build cannot handle either, by document id and version.
    pub tried: HashSet<(Arc<str>, i64)>,
}

pub(crate) struct Worker {
    pub name: Arc<str>,
    pub store: Arc<dyn EventStore>,
    pub handler: Arc<dyn Handler>,
    pub retry: RetryPolicy,
    pub lanes: Vec<Lane>,
    /// The history number of the store when the lanes were read.
    pub history: u64,
    pub parked: ParkedKeys,
    pub reconciled_at: Instant,
    /// Set if other workers, perhaps with another build, follow the same subscription.
    pub others: Option<Others>,
    pub reporter: Reporter,
}

impl Worker {
    /// Creates a worker for these lanes. The worker has not read anything from the store yet.
    pub fn new(
        name: &Arc<str>,
        store: Arc<dyn EventStore>,
        handler: Arc<dyn Handler>,
        lanes: Vec<Lane>,
        reporter: Reporter,
    ) -> Self {
        Self {
            name: name.clone(),
            history: store.history(),
            store,
            handler,
            retry: RetryPolicy::default(),
            lanes,
            parked: ParkedKeys::new(name.clone()),
            reconciled_at: Instant::now(),
            others: None,
            reporter,
        }
    }

    /// Sets when failed messages are retried.
    pub fn retry(self, retry: RetryPolicy) -> Self {
        Self { retry, ..self }
    }

    /// Sets whether other workers, perhaps with another build, follow the same subscription.
    pub fn among_others(self, are_others: bool) -> Self {
        Self { others: are_others.then(Others::default), ..self }
    }

    /// Returns an error if the lanes of the worker may be based on events that are gone.
    pub fn is_of_this_log(&self) -> Result<(), Stop> {
        if self.store.history() == self.history { Ok(()) } else { Err(Stop::Renewed) }
    }

    pub async fn load_parked(&mut self) -> Result<(), StoreError> {
        let lanes: Vec<_> = self.lanes.iter().map(|lane| lane.place.clone()).collect();
        let parked = self.parked.load(&*self.store, &lanes).await?;
        self.set_parked(parked);
        self.reconciled_at = Instant::now();
        Ok(())
    }

    /// Replaces the known parked keys, and reports whether these keys need an operator.
    pub fn set_parked(&mut self, parked: ParkedKeys) {
        let was = self.parked.dead().map(|(count, _)| count);
        self.parked = parked;
        self.reporter.fault(self.parked.lost());
        self.show_dead(was);
    }

    /// Shows how many keys have dead letters, if the number has changed.
    pub fn show_dead(&mut self, was: Option<usize>) {
        let dead = self.parked.dead();
        if dead.map(|(count, _)| count) != was {
            let shown = dead.map(|(count, key)| {
                format!(
                    "{count} keys of {} wait behind a dead letter, such as {key}: redrive or drop the dead letter",
                    self.name
                )
            });
            self.reporter.attention(shown);
        }
    }

    /// Calls the handler. A panic counts as a failure of this message, and the lane continues.
    pub(crate) async fn handle(&self, message: &Message, work: &mut Work) -> Result<(), HandlerError> {
        self.reporter.take_in_hand(message);
        let handled = caught(async { self.handler.handle(message, work).await }).await;
        handled.unwrap_or_else(|panic| Err(panic.into()))
    }

    /// Calls the handler to stage a replacement for work that the store refused.
    pub(crate) async fn refused(&self, message: &Message, reason: &str, work: &mut Work) -> Result<(), HandlerError> {
        let handled = caught(async { self.handler.refused(message, reason, work).await }).await;
        handled.unwrap_or_else(|panic| Err(panic.into()))
    }

    /// Parks one message in a separate commit, and does not move the checkpoint. An event that is already parked stays
    /// unchanged.
    pub async fn park_message(&mut self, key: Arc<str>, message: Message, reason: String) -> Result<(), Stop> {
        if self.parked.has_event(&key, message.position.0) {
            return Ok(());
        }
        let item = Item { lane: 0, next: self.lanes[0].next, key, message: Ok(message) };
        let mut work = Work::new(self.store.clone(), Stale::Nothing);
        let mut parked = self.parked.clone();
        let failure = (!parked.has(&item.key)).then_some((reason, Remedy::Park));
        self.park(&item, &mut work, &mut parked, failure);
        let notices = work.take_notices();
        work.commit().await.map_err(|error| StoreError::Unavailable(error.to_string()))?;
        self.set_parked(parked);
        self.tell(&notices);
        Ok(())
    }

    pub(super) fn park(
        &self,
        item: &Item,
        work: &mut Work,
        parked: &mut ParkedKeys,
        failure: Option<(String, Remedy)>,
    ) {
        let mut awaits_build = false;
        let (reason, attempts, due) = match failure {
            None => (String::new(), 0, None),
            Some((reason, remedy)) => {
                awaits_build = remedy == Remedy::AwaitBuild;
                let reason = parked_reason(&reason, remedy);
                let due = self.retry_at(remedy, 1);
                work.notice(failed(item, &reason, 1, due.is_some()));
                (reason, 1, due)
            }
        };
        let position = item.message.as_ref().map_or(0, |message| message.position.0);
        let lane = self.lanes[item.lane].place.clone();
        let dead = attempts > 0 && due.is_none();
        let place = ParkedPlace { awaits_build, dead, ..parked.next_place(&item.key, &lane, position) };
        let document = Parked {
            subscription: self.name.clone(),
            lane,
            key: item.key.clone(),
            reason,
            attempts,
            awaits_build,
            parked_at: work.now(),
            position,
            message: Parked::payload(&item.message),
        };
        let body = serde_json::to_string(&document).unwrap_or_default();
        work.put_expecting(&self.parked_document(&place), 0, Some(body.into()), due);
        parked.add(&item.key, place);
    }

    /// Skips messages that were lost. A dead letter and the health of the part report the loss until an operator drops
    /// the dead letter. If lost messages are sent again, they count as new.
    pub async fn lose(&mut self, lane: usize, lost: Lost) -> Result<(), Stop> {
        let mut after = self.lanes[lane].clone();
        (after.next, after.last) = (lost.to, None);
        after.marks.interrupt();
        let key = lost.key();
        let place = after.place.clone();
        let at = ParkedPlace { waits: false, dead: true, ..self.parked.next_place(&key, &place, 0) };
        let mut work = Work::new(self.store.clone(), Stale::Nothing);
        let document = Parked {
            subscription: self.name.clone(),
            lane: place,
            key: key.clone(),
            reason: lost.to_string(),
            attempts: 1,
            awaits_build: false,
            parked_at: work.now(),
            position: 0,
            message: serde_json::value::to_raw_value(&serde_json::json!({ "lost": lost })).unwrap_or_default(),
        };
        let body = serde_json::to_string(&document).unwrap_or_default();
        work.put_expecting(&self.parked_document(&at), 0, Some(body.into()), None);
        let after = HashMap::from([(lane, after)]);
        put(&after, &mut work);
        match work.commit().await {
            Ok(_) => {}
            Err(CommitError::DocumentConflict { key, .. }) => return Err(Stop::Fenced(key)),
            Err(error) => return Err(Stop::Store(StoreError::Unavailable(error.to_string()))),
        }
        tracing::error!(subscription = %self.name, %lost, count = lost.to - lost.from, "messages were lost");
        self.reporter.health().count("annals_dead_letters_total", &[("subscription", &self.name)]);
        let mut parked = self.parked.clone();
        parked.add_lost(&key, at, &lost);
        self.reporter.fault(parked.lost());
        self.moved(after, parked);
        Ok(())
    }

    /// Returns when a failed message is retried; `None` if the message is not retried automatically.
    pub(crate) fn retry_at(&self, remedy: Remedy, attempts: u32) -> Option<DateTime<Utc>> {
        let delay = match remedy {
            Remedy::RetryMessage => self.retry.delay_after(attempts)?,
            Remedy::AwaitBuild => BUILD_LOOK.saturating_mul(2u32.saturating_pow(attempts.min(20))).min(BUILD_LOOK_MAX),
            Remedy::AwaitStore => STORE_AWAITED,
            Remedy::Park => return None,
        };
        self.store.clock().due_in(delay)
    }

    pub(crate) fn parked_document(&self, place: &ParkedPlace) -> DocumentKey {
        DocumentKey::new(collection(&self.name), place.id.clone())
    }

    /// Replaces the lanes in memory with the lanes in `after`, which were committed.
    pub(super) fn moved(&mut self, after: HashMap<usize, Lane>, parked: ParkedKeys) {
        for (index, lane) in after {
            self.lanes[index] = Lane { version: lane.version + 1, ..lane };
        }
        self.set_parked(parked);
        self.reporter.fine();
    }

    /// Sends the notices of work that was committed.
    pub fn tell(&self, notices: &[Box<dyn Notice>]) {
        notices.iter().for_each(|notice| notice.send(&self.name, self.reporter.health()));
    }

    /// Moves the checkpoint of an idle lane to the position up to which the log was read. The reported lag is then
    /// correct, and a restart does not read these events again.
    pub async fn checkpoint(&mut self, next: i64) -> Result<(), Stop> {
        let behind = self.lanes.iter().enumerate().filter(|(_, lane)| lane.is_before(next));
        let after = behind.map(|(index, lane)| (index, Lane { next, ..lane.clone() })).collect();
        self.put_checkpoints(after).await
    }

    /// Writes the checkpoint of the only lane, even if it has not moved.
    pub async fn put_checkpoint(&mut self, next: i64) -> Result<(), Stop> {
        self.put_checkpoints(HashMap::from([(0, Lane { next, ..self.lanes[0].clone() })])).await
    }

    /// Writes the checkpoints of these lanes and nothing else.
    pub async fn put_checkpoints(&mut self, after: HashMap<usize, Lane>) -> Result<(), Stop> {
        self.is_of_this_log()?;
        let mut work = Work::new(self.store.clone(), Stale::Nothing);
        put(&after, &mut work);
        match work.commit().await {
            Ok(_) => self.moved(after, self.parked.clone()),
            Err(CommitError::DocumentConflict { key, .. }) => return Err(Stop::Fenced(key)),
            Err(error) => return Err(Stop::Store(StoreError::Unavailable(error.to_string()))),
        }
        Ok(())
    }
}

fn failed(item: &Item, reason: &str, attempts: u32, retries: bool) -> FailedMessage {
    let message = item.message.as_ref().ok();
    FailedMessage {
        key: item.key.clone(),
        id: item.id(),
        type_name: message.map_or_else(|| "no message".into(), |message| message.type_name.clone()),
        position: message.map_or(item.next - 1, |message| message.position.0),
        attempts,
        reason: reason.to_owned(),
        retries,
    }
}

pub(super) fn put(after: &HashMap<usize, Lane>, work: &mut Work) {
    let now = work.now();
    for lane in after.values() {
        work.put_expecting(&lane.key, lane.version, Some(lane.body(now)), None);
    }
}
