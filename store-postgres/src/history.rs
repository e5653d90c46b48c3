//! Which log this process reads: the last event that it has seen of it, and the server that keeps it.
//!
//! A visible event is durable on its server, and yet it can be gone a moment later: a standby that lagged becomes the primary,
//! or the database is restored to an earlier moment. Nothing that happens on a session shows that, because every session ends
//! with its server. So each new session (behind a pooler: each transaction) is held against what is known here before it is
//! used for anything else. Where the log is another one, the *history* gets a new number, and everything that was read
//! under an older number counts no more: proofs that a gap is settled, positions, caches, commits that wait.

use std::sync::{Mutex, MutexGuard, PoisonError};

use annals::{LostEnd, Position};
use chrono::Utc;
use sqlx::{Row, postgres::PgRow};
use tokio::sync::watch;
use uuid::Uuid;

use crate::{error::not_primary, open::Purpose};

/// The position and the id of an event.
pub(crate) type Seen = (i64, Uuid);
/// The event that a session is asked for, if any was seen, with the number of the history that it was seen under.
pub(crate) type Asked = (u64, Option<Seen>);

/// What is known of the log; shared by all sessions of a store.
#[derive(Debug)]
pub(crate) struct History {
    number: watch::Sender<u64>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The last event that was shown or committed.
    last: Option<Seen>,
    /// Up to here, no event comes in any more. Never beyond `last`.
    settled: i64,
    /// The server, its timeline and the table; `None` before the first session.
    log: Option<String>,
    lost: Option<LostEnd>,
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

    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.number.subscribe()
    }

    pub(crate) fn lost_end(&self) -> Option<LostEnd> {
        self.known().lost.clone()
    }

    pub(crate) fn last(&self) -> Option<Seen> {
        self.known().last
    }

    /// What the next session is asked for.
    pub(crate) fn asked(&self) -> Asked {
        let known = self.known();
        (self.number(), known.last)
    }

    /// The number of the history, and how far its log is settled.
    pub(crate) fn settled(&self) -> (u64, i64) {
        let known = self.known();
        (self.number(), known.settled)
    }

    /// The log is settled up to an event that was seen, as was proven under this number.
    pub(crate) fn settle(&self, number: u64, position: i64) {
        let mut known = self.known();
        if number == self.number() {
            known.settled = known.settled.max(position);
        }
    }

    /// An event was shown or committed, under this number.
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

    /// Holds what a session said (see `session.sql`) against what is known, and gives the number of the history that it reads.
    /// `asked` is the event that it was asked for.
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
                "the database has another primary, or was restored; nothing of the log is known to be lost: caches and \
                 checkpoints are read again"
            );
            self.change(&mut known);
        }
        Ok(self.number())
    }

    /// The same for an event alone. `found` is the id that stands at its position.
    pub(crate) fn compare(&self, asked: Asked, found: Option<Uuid>) {
        self.compare_known(&mut self.known(), asked, found);
    }

    /// Whether the log has turned out to lack the event.
    fn compare_known(&self, known: &mut Known, (number, asked): Asked, found: Option<Uuid>) -> bool {
        let Some(asked) = asked.filter(|(_, id)| found != Some(*id)) else { return false };
        // Else somebody has noticed meanwhile.
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
