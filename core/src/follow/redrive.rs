//! Retries of parked messages. Messages with the same key are retried in order.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    bus::Message,
    commit::{CommitError, Document},
    decide::work::{Stale, Work},
    follow::{
        parking::{Parked, collection, key_and_lane},
        worker::{BUILD_LOOK, BUILD_LOOK_MAX, Stop, Worker, parked_reason},
    },
    handler::Remedy,
    health::notice::FailedMessage,
    store::Scan,
};

/// How often the list of parked messages is read again. In the meantime, an operator may have dropped messages, or a
/// worker that had lost its lane without noticing may have redriven messages.
const RECONCILE: Duration = Duration::from_secs(10);
/// The maximum number of keys that one tick retries early, before their messages are due. Also the number of due
/// documents that one tick scans at first. More documents are scanned if none of them belongs to this worker.
const DUE_PAGE: usize = 64;

/// The number of documents that are scanned at once for messages that wait for a build. More documents are scanned if
/// many other messages come first.
const AWAITING_PAGE: usize = 64;
const AWAITING_PAGE_MAX: usize = 4_096;
/// The maximum number of failed tries that a worker remembers. Beyond this number, the worker forgets all failed tries
/// and tries these messages again.
const TRIED_MAX: usize = 10_000;

fn failed(tried: &Parked, message: Option<&Message>, retries: bool) -> FailedMessage {
    FailedMessage {
        key: tried.key.clone(),
        id: message.map_or(Uuid::nil(), |message| message.id),
        type_name: message.map_or_else(|| "no message".into(), |message| message.type_name.clone()),
        position: tried.position,
        attempts: tried.attempts,
        reason: tried.reason.clone(),
        retries,
    }
}

fn awaits_build(document: &Document) -> bool {
    serde_json::from_str::<Parked>(&document.body).is_ok_and(|parked| parked.awaits_build)
}

impl Worker {
    /// Handles messages that other workers parked and that wait for a build like this one. Otherwise, the messages
    /// would wait until a worker with this build follows their lane, which may take a long time. Each message is
    /// removed in the same commit that stores its effects, so only one worker's commit succeeds.
    async fn redrive_others(&mut self) -> Result<(), Stop> {
        let Some(others) = &mut self.others else { return Ok(()) };
        if others.looked_at.is_some_and(|at| at.elapsed() < BUILD_LOOK) {
            return Ok(());
        }
        others.looked_at = Some(Instant::now());
        if others.tried.len() > TRIED_MAX {
            others.tried.clear();
        }
        let soon = self.store.clock().now() + BUILD_LOOK_MAX;
        let mut limit = AWAITING_PAGE;
        let heads = loop {
            let due = self.store.scan(&collection(&self.name), &Scan::Due(soon), limit).await?;
            let all = due.len() < limit || limit >= AWAITING_PAGE_MAX;
            let is_theirs = |document: &Document| {
                let key = key_and_lane(&document.key.id).map_or("", |(key, _)| key);
                !self.parked.has(key) && awaits_build(document)
            };
            let heads: Vec<_> = due.into_iter().filter(is_theirs).collect();
            if all || !heads.is_empty() {
                break heads;
            }
            limit *= 4;
        };
        for head in heads {
            let mut next = Some(head);
            while let Some(document) = next.take() {
                if self.redrive_other(&document).await? {
                    next = self.behind(&document).await?;
                }
            }
        }
        Ok(())
    }

    /// Handles a message that another worker has parked, and returns whether that succeeded.
    async fn redrive_other(&mut self, document: &Document) -> Result<bool, Stop> {
        let tried = (document.key.id.clone(), document.version);
        if self.others.as_ref().is_some_and(|others| others.tried.contains(&tried)) {
            return Ok(false);
        }
        let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { return Ok(false) };
        let Some(message) = parked.message() else { return Ok(false) };
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(message.id, message.effects());
        let handled = self.handle(&message, &mut work).await;
        self.reporter.hands_free();
        match handled {
            Ok(()) => {
                work.put_expecting(&document.key, document.version, None, None);
                let notices = work.take_notices();
                match work.commit().await {
                    Ok(_) => {
                        self.tell(&notices);
                        return Ok(true);
                    }
                    Err(CommitError::Invalid(reason)) => {
                        if self.redrive_refused(&parked, &reason, document).await {
                            return Ok(true);
                        }
                        _ = self.others.as_mut().map(|others| others.tried.insert(tried));
                    }
                    // The usual reason is that another worker has committed first. After any other error, the next
                    // check tries again.
                    Err(_) => {}
                }
            }
            Err(error) if error.remedy() == Remedy::AwaitStore => {}
            // The worker that parked the message retries it, and reports the error.
            Err(_) => _ = self.others.as_mut().map(|others| others.tried.insert(tried)),
        }
        Ok(false)
    }

    /// Returns the message that waits directly behind this message, with the same key and lane.
    async fn behind(&self, document: &Document) -> Result<Option<Document>, Stop> {
        let after = Scan::After(document.key.id.clone());
        let next = self.store.scan(&collection(&self.name), &after, 1).await?.pop();
        Ok(next.filter(|next| key_and_lane(&next.key.id) == key_and_lane(&document.key.id)))
    }

    /// Retries the parked keys that are due. The messages of each key are retried in order until one of them fails.
    pub async fn redrive_due(&mut self) -> Result<(), Stop> {
        self.is_of_this_log()?;
        self.redrive_others().await?;
        if self.parked.is_empty() {
            return Ok(());
        }
        if self.reconciled_at.elapsed() > RECONCILE {
            self.load_parked().await?;
        }
        let mut keys: Vec<Arc<str>> = self.parked.freed().take(DUE_PAGE).cloned().collect();
        let mut limit = DUE_PAGE;
        loop {
            let due = self.store.scan(&collection(&self.name), &Scan::Due(self.store.clock().now()), limit).await?;
            let all = due.len() < limit;
            let of_key = due.iter().filter_map(|document| document.key.id.rsplit_once(" #"));
            let mine = of_key.map(|(key, _)| Arc::<str>::from(key)).filter(|key| self.parked.has(key));
            keys.extend(mine);
            // The first due messages may belong to lanes that no worker follows at present.
            if all || !keys.is_empty() {
                break;
            }
            limit *= 4;
        }
        for key in keys {
            while self.redrive_first(&key).await? {}
        }
        Ok(())
    }

    /// Retries the first message of a parked key. Returns whether the message was handled and another message waits
    /// behind it.
    async fn redrive_first(&mut self, key: &Arc<str>) -> Result<bool, Stop> {
        let Some(document_key) = self.parked.first(key).map(|place| self.parked_document(place)) else {
            return Ok(false);
        };
        let found = self.store.document(&document_key).await?;
        let Some(document) = found else {
            self.load_parked().await?;
            return Ok(false);
        };
        let Ok(parked) = serde_json::from_str::<Parked>(&document.body) else { return Ok(false) };
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        let message = parked.message();
        let handled = match &message {
            None => Err((parked.reason.clone(), Remedy::Park)),
            Some(message) => {
                work.begin(message.id, message.effects());
                let handled = self.handle(message, &mut work).await;
                self.reporter.hands_free();
                handled.map_err(|error| (error.text(), error.remedy()))
            }
        };
        let failure = match handled {
            Ok(()) => {
                work.put_expecting(&document_key, document.version, None, None);
                let notices = work.take_notices();
                match work.commit().await {
                    Ok(_) => {
                        let was = self.parked.dead().map(|(count, _)| count);
                        self.parked.release_first(key);
                        self.show_dead(was);
                        self.tell(&notices);
                        return Ok(self.parked.has(key));
                    }
                    Err(CommitError::Invalid(reason)) => {
                        if self.redrive_refused(&parked, &reason, &document).await {
                            let was = self.parked.dead().map(|(count, _)| count);
                            self.parked.release_first(key);
                            self.show_dead(was);
                            return Ok(self.parked.has(key));
                        }
                        work = Work::new(self.store.clone(), Stale::Everything);
                        (reason, Remedy::Park)
                    }
                    Err(error) => return self.redrive_later(key, &error).await,
                }
            }
            Err(failure) => {
                work.rollback();
                failure
            }
        };
        let (reason, remedy) = failure;
        let attempts = match remedy {
            // An unavailable store is not the message's fault and does not count as an attempt, but the message still
            // waits before the next retry.
            Remedy::AwaitStore => parked.attempts,
            // This is the first attempt that counts, because earlier attempts were made by builds that could not handle
            // the message.
            Remedy::RetryMessage | Remedy::Park if parked.awaits_build => 1,
            Remedy::RetryMessage | Remedy::Park | Remedy::AwaitBuild => parked.attempts + 1,
        };
        let awaits_build = remedy == Remedy::AwaitBuild || (remedy == Remedy::AwaitStore && parked.awaits_build);
        let due = self.retry_at(remedy, attempts);
        let tried = Parked { attempts, awaits_build, reason: parked_reason(&reason, remedy), ..parked };
        let failed = failed(&tried, message.as_ref(), due.is_some());
        let body = serde_json::to_string(&tried).unwrap_or_default();
        work.put_expecting(&document_key, document.version, Some(body.into()), due);
        match work.commit().await {
            Ok(_) => {
                let was = self.parked.dead().map(|(count, _)| count);
                self.parked.tried_first(key, awaits_build, due.is_none());
                self.show_dead(was);
                self.tell(&[Box::new(failed)]);
                Ok(false)
            }
            Err(error) => self.redrive_later(key, &error).await,
        }
    }

    /// Commits the work that the handler stages in place of the refused work. Returns whether the commit succeeded.
    async fn redrive_refused(&self, parked: &Parked, reason: &str, document: &Document) -> bool {
        let Some(message) = parked.message() else { return false };
        let mut work = Work::new(self.store.clone(), Stale::Everything);
        work.begin(message.id, message.effects());
        if self.refused(&message, reason, &mut work).await.is_err() {
            return false;
        }
        work.put_expecting(&document.key, document.version, None, None);
        work.commit().await.is_ok()
    }

    /// Leaves the retry to the next tick. The document is then still due, or still waits to be tried.
    async fn redrive_later(&mut self, key: &str, error: &CommitError) -> Result<bool, Stop> {
        tracing::warn!(subscription = %self.name, %key, %error, "redrive did not commit");
        self.load_parked().await?;
        Ok(false)
    }
}
