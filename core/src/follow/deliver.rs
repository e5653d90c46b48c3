//! The batch loop of every subscription and consumer. The loop calls the handler, commits the effects together with the
//! checkpoint, and parks messages that fail.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    base::{backoff::Backoff, panic::caught},
    bus::Message,
    commit::{COMMIT_ROWS_MAX, CommitError},
    decide::work::{Stale, Work},
    follow::{
        checkpoint::{Item, Lane},
        parking::{PARKED_MAX, ParkedKeys, collection},
        worker::{Stop, Worker, put},
    },
    handler::{HandlerError, Remedy},
    health::notice::Notice,
    store::StoreError,
};

/// A batch ends once its commit has this many rows. The number is half the limit of a commit, so that one more large
/// message fits.
const ROWS_PER_COMMIT: usize = COMMIT_ROWS_MAX / 2;
/// A batch ends once its handlers have taken this long. Until the commit, timers and other writers can change what the
/// handlers have read, and then the whole batch is handled again.
const TIME_PER_COMMIT: Duration = Duration::from_secs(1);
/// The number of consecutive conflicts after which a batch is reduced to a single message.
const CONFLICTS_BEFORE_SINGLE: u32 = 3;
/// Whether the store has refused the work of the first message, which was alone in its commit.
#[derive(Clone)]
enum Refused {
    Not,
    /// The store has refused the work once. The handler may now stage other effects in its place.
    Once(String),
    /// The store has refused the replacement as well.
    Again(String),
}

impl Refused {
    fn next(self, reason: String) -> Self {
        match self {
            Self::Not => Self::Once(reason),
            Self::Once(_) | Self::Again(_) => Self::Again(reason),
        }
    }
}

enum Attempt {
    Handled(usize),
    AwaitStore(String),
    TooLarge(String),
    /// `prepare` failed for the batch. Smaller batches show which message is at fault.
    Smaller,
}

impl Worker {
    /// Handles all items, in as many commits as their size requires. Returns early only when the worker must stop.
    pub async fn deliver(&mut self, items: &[Item]) -> Result<(), Stop> {
        if items.iter().any(|item| self.parked.awaits_build(&item.key)) {
            // Another instance may have handled parked messages that this build could not handle. If so, new messages
            // do not have to wait behind the parked messages.
            self.load_parked().await?;
        }
        let mut done = 0;
        while done < items.len() {
            done += self.deliver_some(&items[done..]).await?;
        }
        Ok(())
    }

    /// Handles as many of the first items as fit into one commit, and returns how many items were handled.
    async fn deliver_some(&mut self, items: &[Item]) -> Result<usize, Stop> {
        let mut stale = Stale::Nothing;
        let mut conflicts = 0;
        let mut refused = Refused::Not;
        let mut limit = items.len();
        let mut racing = Backoff::short();
        let mut waiting = Backoff::long();
        loop {
            self.await_room(&mut waiting).await?;
            let batch = &items[..if matches!(refused, Refused::Not) { limit } else { 1 }];
            let mut work = Work::new(self.store.clone(), stale.clone());
            let mut parked = self.parked.clone();
            let attempt = self.attempt(batch, &mut work, &mut parked, &refused).await;
            self.reporter.hands_free();
            let count = match attempt {
                Attempt::Handled(count) => count,
                Attempt::AwaitStore(reason) => {
                    self.await_store(reason, &mut waiting).await;
                    continue;
                }
                Attempt::TooLarge(reason) => {
                    refused = refused.next(reason);
                    continue;
                }
                Attempt::Smaller => {
                    limit = limit.div_ceil(2);
                    continue;
                }
            };
            let after = self.stage_checkpoints(&batch[..count], &mut work);
            let notices = work.take_notices();
            let error = match work.commit().await {
                Ok(_) => {
                    self.committed(after, parked, &notices);
                    return Ok(count);
                }
                Err(error) => error,
            };
            match &error {
                CommitError::DocumentConflict { key, .. } if after.values().any(|lane| lane.key == *key) => {
                    return Err(Stop::Fenced(key.clone()));
                }
                CommitError::DocumentConflict { key, .. } if key.collection == collection(&self.name) => {
                    racing.wait().await;
                    self.load_parked().await?;
                }
                CommitError::Conflict { .. } | CommitError::DocumentConflict { .. } => {
                    conflicts += 1;
                    stale = stale.after(&error);
                    if conflicts >= CONFLICTS_BEFORE_SINGLE {
                        limit = 1;
                    }
                    racing.wait().await;
                }
                CommitError::Unknown(reason) => {
                    self.await_store(reason.clone(), &mut waiting).await;
                    if self.was_committed(&after).await? {
                        self.committed(after, parked, &notices);
                        self.load_parked().await?;
                        return Ok(count);
                    }
                    stale = Stale::Everything;
                }
                // A message is parked because of a refusal only if it was alone in its commit.
                CommitError::Invalid(_) if count > 1 => limit = count / 2,
                CommitError::Invalid(reason) => {
                    if matches!(refused, Refused::Again(_)) {
                        self.stand_still(&batch[0], reason);
                        waiting.wait().await;
                    }
                    refused = refused.next(reason.clone());
                }
                CommitError::Unavailable(reason) => self.await_store(reason.clone(), &mut waiting).await,
            }
        }
    }

    /// Reports why the store cannot be used, and waits before the next attempt.
    async fn await_store(&mut self, reason: String, waiting: &mut Backoff) {
        self.reporter.trouble(reason);
        waiting.wait().await;
    }

    /// Waits while the number of parked messages is at its limit. Stops if the history of the log has changed.
    async fn await_room(&mut self, waiting: &mut Backoff) -> Result<(), Stop> {
        while self.parked.len() >= PARKED_MAX {
            self.reporter.trouble(format!("{PARKED_MAX} messages are parked: redrive or drop some"));
            waiting.wait().await;
            self.load_parked().await?;
            self.redrive_due().await?;
        }
        self.is_of_this_log()
    }

    fn committed(&mut self, after: HashMap<usize, Lane>, parked: ParkedKeys, notices: &[Box<dyn Notice>]) {
        self.moved(after, parked);
        self.tell(notices);
    }

    /// Reports that the store has refused even the dead letter of a message. The lane makes no progress until an
    /// operator has removed the cause.
    fn stand_still(&mut self, item: &Item, reason: &str) {
        let id = item.id();
        let key = &item.key;
        let trouble = format!("the store refuses message {id} (key {key}) even as a dead letter: {reason}");
        self.reporter.trouble(trouble);
    }

    /// Stages the items one by one. If the store refused the work of the first item alone, the handler stages something
    /// else, or the item is parked.
    async fn attempt(&self, items: &[Item], work: &mut Work, parked: &mut ParkedKeys, refused: &Refused) -> Attempt {
        let messages: Vec<&Message> = items.iter().filter_map(|item| item.message.as_ref().ok()).collect();
        let mut unprepared = None;
        if let Some(first) = messages.first() {
            self.reporter.take_in_hand(first);
        }
        let prepared = caught(async { self.handler.prepare(&messages, work).await }).await;
        if let Err(error) = prepared.unwrap_or_else(|panic| Err(panic.into())) {
            if error.remedy() == Remedy::AwaitStore {
                return Attempt::AwaitStore(format!("preparing a batch: {}", error.text()));
            }
            if items.len() > 1 {
                return Attempt::Smaller;
            }
            unprepared = Some(error);
        }
        let began_at = Instant::now();
        for (index, item) in items.iter().enumerate() {
            if parked.has(&item.key) {
                work.begin(uuid::Uuid::nil(), Default::default());
                self.park(item, work, parked, None);
            } else {
                // Each message begins a new part of the work, so that a rollback undoes only the work of that message.
                match &item.message {
                    Ok(message) => work.begin(message.id, message.effects()),
                    Err(_) => work.begin(uuid::Uuid::nil(), Default::default()),
                }
                let outcome = match (&item.message, refused) {
                    (_, Refused::Again(reason)) => Err(HandlerError::from(reason.as_str())),
                    (Err(undecodable), _) => Err(HandlerError::from(undecodable.clone())),
                    (Ok(message), Refused::Once(reason)) => self.refused(message, reason, work).await,
                    (Ok(message), Refused::Not) => match unprepared.take() {
                        Some(error) => Err(error),
                        None => self.handle(message, work).await,
                    },
                };
                if let Err(error) = outcome {
                    let hopeless = matches!(refused, Refused::Again(_)) || item.message.is_err();
                    let remedy = if hopeless { Remedy::Park } else { error.remedy() };
                    if remedy == Remedy::AwaitStore {
                        return Attempt::AwaitStore(error.text());
                    }
                    work.rollback();
                    self.park(item, work, parked, Some((error.text(), remedy)));
                }
            }
            if work.rows() > COMMIT_ROWS_MAX - self.lanes.len() && index == 0 {
                return Attempt::TooLarge(format!(
                    "the effects of the message take {} rows; the limit of a commit is {COMMIT_ROWS_MAX}",
                    work.rows()
                ));
            }
            if work.rows() > ROWS_PER_COMMIT && index + 1 < items.len() {
                if work.rows() > COMMIT_ROWS_MAX - self.lanes.len() {
                    // The last message made the commit too large, so it is left to the next commit.
                    work.rollback();
                    return Attempt::Handled(index);
                }
                return Attempt::Handled(index + 1);
            }
            if began_at.elapsed() > TIME_PER_COMMIT {
                return Attempt::Handled(index + 1);
            }
        }
        Attempt::Handled(items.len())
    }

    /// Moves the checkpoint of each lane past its last item.
    fn stage_checkpoints(&self, items: &[Item], work: &mut Work) -> HashMap<usize, Lane> {
        let mut after = HashMap::new();
        for item in items {
            after.entry(item.lane).or_insert_with(|| self.lanes[item.lane].clone()).pass(item);
        }
        work.begin(uuid::Uuid::nil(), Default::default());
        put(&after, work);
        after
    }

    /// After an unknown outcome, returns whether the stored checkpoints are exactly the checkpoints that this commit
    /// would have written.
    async fn was_committed(&self, after: &HashMap<usize, Lane>) -> Result<bool, StoreError> {
        for (index, after) in after {
            let mut lane = self.lanes[*index].clone();
            let found = lane.load(&*self.store).await?;
            if found != Some(after.next) || lane.version != self.lanes[*index].version + 1 {
                return Ok(false);
            }
        }
        Ok(!after.is_empty())
    }
}
