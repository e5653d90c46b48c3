//! Trying parked messages again, in the order of their key.

use std::{sync::Arc, time::Duration};

use crate::{
    commit::{CommitError, Document},
    handler::Remedy,
    parking::{Parked, collection},
    store::Scan,
    work::{Stale, Work},
    worker::{Stop, Worker},
};

/// How often the places of parked messages are read anew: an operator drops some, and a worker that lost its lane may have
/// redriven some before it knew.
const RECONCILE: Duration = Duration::from_secs(10);
/// Parked keys looked at in one tick.
const DUE_PAGE: usize = 64;

impl Worker {
    /// Tries parked keys again whose time has come, each in order until one of its messages fails.
    pub async fn redrive_due(&mut self) -> Result<(), Stop> {
        self.is_of_this_log()?;
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
            // Those in front may be of lanes that nobody follows at present.
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

    /// Tries the first message of a parked key again; whether it is handled, and another one waits behind it.
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
        let handled = match parked.message() {
            None => Err((parked.reason.clone(), Remedy::Park)),
            Some(message) => {
                work.begin(message.id, message.effects());
                match self.handle(&message, &mut work).await {
                    Err(error) if error.remedy() == Remedy::AwaitStore => return Ok(false),
                    handled => handled.map_err(|error| (error.to_string(), error.remedy())),
                }
            }
        };
        let failure = match handled {
            Ok(()) => {
                work.put_expecting(&document_key, document.version, None, None);
                match work.commit().await {
                    Ok(_) => {
                        self.parked.release_first(key);
                        return Ok(self.parked.has(key));
                    }
                    Err(CommitError::Invalid(reason)) => {
                        if self.redrive_refused(&parked, &reason, &document).await {
                            self.parked.release_first(key);
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
        let attempts = parked.attempts + 1;
        let delay = (remedy == Remedy::RetryMessage).then(|| self.retry.delay_after(attempts)).flatten();
        let tried = Parked { attempts, reason: crate::reason::storable(&reason), ..parked };
        let due = delay.and_then(|delay| work.due_in(delay));
        let body = serde_json::to_string(&tried).unwrap_or_default();
        work.put_expecting(&document_key, document.version, Some(body.into()), due);
        match work.commit().await {
            Ok(_) => {
                self.parked.tried_first(key);
                Ok(false)
            }
            Err(error) => self.redrive_later(key, &error).await,
        }
    }

    /// Commits what the handler stages in place of what the store refuses; whether that holds.
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

    /// The document is still due, or free: the next tick tries again.
    async fn redrive_later(&mut self, key: &str, error: &CommitError) -> Result<bool, Stop> {
        tracing::warn!(subscription = %self.name, %key, %error, "redrive did not commit");
        self.load_parked().await?;
        Ok(false)
    }
}
