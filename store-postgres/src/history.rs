//! The identity of the log that this process reads: the last event that the process has seen, and the server that
//! holds the log.
//!
//! A visible event is durable on its server, but can still be gone a moment later, when a standby that lagged becomes
//! the primary, or when the database is restored to an earlier moment. An open session never sees such a change,
//! because every session ends with its server. Each new session (behind a pooler, each transaction) is therefore
//! checked against this identity before the session is used for anything else. If the log is a different one, the
//! *history* gets a new number. Everything that began or was read under an older number is then void: proofs that a gap
//! is settled, positions, caches, and waiting commits.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use annals::{CommitError, LostEnd, Position};
use chrono::Utc;
use sqlx::{Row, postgres::PgRow};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{error::not_primary, open::Purpose};

/// The position and the id of an event.
pub(crate) type Seen = (i64, Uuid);
/// The event to look up on a session, if an event was seen, with the number of the history in which it was seen.
pub(crate) type Asked = (u64, Option<Seen>);

/// The facts that are known about the log. All sessions of a store share them.
#[derive(Debug)]
pub(crate) struct History {
    number: watch::Sender<u64>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last event that was read or committed.
    last: Option<Seen>,
    /// The position up to which no further event can appear. This position is never beyond `last`.
    settled: i64,
    /// The server, its timeline and the table; `None` before the first session.
    log: Option<String>,
    lost: Option<LostEnd>,
    /// The number that each service has accepted; see [`annals::EventStore::accept_history`].
    accepted: BTreeMap<String, u64>,
}

impl Default for History {
    fn default() -> Self {
        Self { number: watch::Sender::new(0), known: Mutex::default() }
    }
}

impl History {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn number(&self) -> u64 {
        *self.number.borrow()
    }

    pub(crate) fn accept(&self, by: &str, number: u64) {
        self.known().accepted.insert(by.to_owned(), number);
    }

    /// Returns the number of the history, if all services have accepted it. Otherwise returns the error for a commit.
    /// The first history needs no acceptance.
    pub(crate) fn accepted(&self) -> Result<u64, CommitError> {
        let number = self.number();
        if number == 0 || self.known().accepted.values().all(|accepted| *accepted >= number) {
            return Ok(number);
        }
        Err(CommitError::Unavailable(
            "the database was restored or has another primary: nothing is written before the service has compared the log with the bus"
                .into(),
        ))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.number.subscribe()
    }

    pub(crate) fn lost_end(&self) -> Option<LostEnd> {
        self.known().lost.clone()
    }

    pub(crate) fn last(&self) -> Option<Seen> {
        self.known().last
    }

    /// Returns the event to look up on the next session.
    pub(crate) fn asked(&self) -> Asked {
        let known = self.known();
        (self.number(), known.last)
    }

    /// Returns the number of the history, and the position up to which its log is settled (see the module `log`).
    pub(crate) fn settled(&self) -> (u64, i64) {
        let known = self.known();
        (self.number(), known.settled)
    }

    /// Records that the log is settled up to a known event. The proof belongs to the history with this number.
    pub(crate) fn settle(&self, number: u64, position: i64) {
        let mut known = self.known();
        if number == self.number() {
            known.settled = known.settled.max(position);
        }
    }

    /// Records an event that was read or committed under this number of the history.
    pub(crate) fn saw(&self, number: u64, (position, id): Seen) {
        let mut known = self.known();
        if number != self.number() {
            return;
        }
        match known.last {
            Some((last, _)) if position < last => {}
            Some(last @ (same, other)) if position == same && id != other => self.lose(&mut known, last),
            _ => known.last = Some((position, id)),
        }
    }

    /// Checks a session's answer (see `session.sql`) against the known identity of the log, and returns the number of
    /// the history that the session reads. `asked` is the event that was looked up.
    pub(crate) fn check(&self, asked: Asked, row: &PgRow, purpose: Purpose) -> Result<u64, sqlx::Error> {
        if row.try_get(0)? {
            return Err(not_primary("the server is a standby (in recovery)"));
        }
        if purpose == Purpose::Write && row.try_get(1)? {
            return Err(not_primary("the server is read-only (default_transaction_read_only is on)"));
        }
        let log: String = row.try_get(2)?;
        let found = row.try_get(3)?;
        let mut known = self.known();
        let before = known.log.replace(log);
        let is_other = before.is_some_and(|before| Some(&before) != known.log.as_ref());
        if !self.compare_known(&mut known, asked, found) && is_other {
            tracing::warn!(
                "the database has another primary, or was restored; no event is known to be lost: caches and \
                 checkpoints are read again"
            );
            self.change(&mut known);
        }
        Ok(self.number())
    }

    /// Checks whether the log still has the event that was looked up. `found` is the id of the event that the log has
    /// at the same position now.
    pub(crate) fn compare(&self, asked: Asked, found: Option<Uuid>) {
        self.compare_known(&mut self.known(), asked, found);
    }

    /// Returns whether this check is the first to find that the log has lost the event.
    fn compare_known(&self, known: &mut Known, (number, asked): Asked, found: Option<Uuid>) -> bool {
        let Some(asked) = asked.filter(|(_, id)| found != Some(*id)) else { return false };
        // If the number differs, another session has noticed the loss first.
        let is_news = number == self.number();
        if is_news {
            self.lose(known, asked);
        }
        is_news
    }

    fn lose(&self, known: &mut Known, (position, event_id): Seen) {
        let lost = LostEnd { position: Position(position), event_id, noticed_at: Utc::now() };
        tracing::error!(position, %event_id, "{lost}");
        known.lost = Some(lost);
        known.last = None;
        self.change(known);
    }

    fn change(&self, known: &mut Known) {
        known.settled = 0;
        self.number.send_modify(|number| *number += 1);
    }
}
