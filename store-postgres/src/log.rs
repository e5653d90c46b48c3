//! Reads the log without losing events.
//!
//! A transaction draws positions from a sequence before it commits, so an event may appear at a lower position than an
//! event that is visible already. A reader therefore stops at a gap. An event that is missing in the gap may still
//! appear, or it will never exist because its transaction failed. These steps show which is the case:
//!
//! 1. Read the last *visible* event. The event is durable, so even after a crash no writer draws the event's
//!    position, or a lower one, again. (A position that was drawn but not committed is not durable: after a crash the
//!    position may be drawn again.)
//! 2. Then list the holders of the table lock that every writer of events takes *before* it draws a position, and keeps
//!    until the writer's transaction has ended. (`annals.append` takes the lock with a separate statement; an `INSERT`
//!    takes the lock before it evaluates its defaults.)
//! 3. Every writer that drew a position below the event of step 1 and has not ended yet is among these holders. Once
//!    all of them have ended, every event that will ever exist up to that position is visible. Later holders do not
//!    matter.
//!
//! The log up to that event is then *settled*: no further event can appear in it. A crash between two of these steps
//! only ends transactions, and prepared transactions survive the crash with their locks. The proof is void only if the
//! log itself changes: if the event of step 1 is gone (after a failover to a standby that lagged, a restore, or a crash
//! without `synchronous_commit`), the module `history` notices on the first session that sees the other log, and
//! discards the proof. The proof does not depend on transaction ids, so a log that was restored on another server can
//! be read as before.

use std::{collections::HashSet, sync::Arc, time::Duration};

use annals::{LogPage, LogQuery, OpenWriter, Position, StoreError, StoreStatus};
use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use sqlx::{Postgres, postgres::PgArguments, query::Query};
use tokio::{sync::Mutex, time::sleep};
use uuid::Uuid;

use crate::{
    history::{History, Seen},
    open::Database,
    read::{bound, is_text, read, recorded},
    readers::{Reader, Readers},
};

/// The maximum number of events that one page examines. This takes some tens of milliseconds.
const PAGE_EVENTS_MAX: usize = 10_000;
/// A page of the log ends after this many bytes of payload, regardless of the limit on events.
const PAGE_BYTES_MAX: usize = 16 << 20;
/// How many times `status` checks whether the writers in flight have ended, before it reports that a reader waits for
/// them.
const STATUS_LOOKS_MAX: u32 = 20;
const STATUS_LOOK_MS: u64 = 2;
/// The maximum number of pages in which `status` searches for the first gap. It searches if the log could not be
/// settled up to its last event.
const STATUS_PAGES_MAX: usize = 200;

/// The log, and how far it is known to be settled.
#[derive(Debug)]
pub(crate) struct Log {
    database: Arc<Database>,
    readers: Readers,
    proof: Mutex<Option<Proof>>,
}

/// The last visible event, and the writers that may have drawn a position below that event and had not ended at the
/// last check.
#[derive(Debug)]
struct Proof {
    /// The number of the history in which the event and the writers were read.
    history: u64,
    visible: i64,
    holders: HashSet<String>,
}

/// The result of a query for events after a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// There are events to read.
    Events,
    /// There are events, but they are behind a gap that a transaction may still fill.
    Gap,
    /// There are no events.
    Nothing,
}

impl Log {
    pub(crate) fn new(database: Arc<Database>, readers: Readers) -> Self {
        Self { database, readers, proof: Mutex::default() }
    }

    fn history(&self) -> &History {
        &self.database.history
    }

    pub(crate) async fn page(&self, query: &LogQuery, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        let nothing = LogPage { next: after, ..LogPage::default() };
        if limit == 0 {
            return Ok(nothing);
        }
        loop {
            let history = self.history().number();
            let page = if *query == LogQuery::all() {
                self.every_event(after, limit.min(PAGE_EVENTS_MAX)).await?
            } else {
                self.some_events(query, after, limit.min(PAGE_EVENTS_MAX)).await?
            };
            match page {
                // The log changed during the read, so the page may contain events of both logs.
                _ if self.history().number() != history => sleep(Duration::from_millis(STATUS_LOOK_MS)).await,
                Ok(page) => return Ok(page),
                // An event is visible behind a gap that may still be filled.
                Err(visible) if !self.settle(visible).await? => return Ok(nothing),
                Err(_) => {}
            }
        }
    }

    /// Reads a page of all events. If the page would begin with a gap, returns the position of the event behind the
    /// gap instead.
    async fn every_event(&self, after: Position, limit: usize) -> Result<Result<LogPage, i64>, StoreError> {
        // The settled position is taken before the statement runs, so that all settled events are visible to the
        // statement.
        let (history, settled) = self.history().settled();
        let mut page = self.fetch(after, limit).await?;
        let mut last = after.0.max(0);
        let dense = page.events.iter().take_while(|event| {
            let fits = event.position.0 <= settled || event.position.0 == last.saturating_add(1);
            last = event.position.0;
            fits
        });
        let dense = dense.count();
        if dense == 0 && !page.events.is_empty() {
            return Ok(Err(page.events[0].position.0));
        }
        // If the page ends before a gap, there are no more events to read for now.
        page.more = dense == page.events.len() && (page.more || dense >= limit);
        page.events.truncate(dense);
        page.next = page.events.last().map_or(after, |event| event.position);
        if let Some(last) = page.events.last() {
            self.history().saw(history, (last.position.0, last.id));
        }
        Ok(Ok(page))
    }

    async fn fetch(&self, after: Position, limit: usize) -> Result<LogPage, StoreError> {
        let query = || self.database.statements.read_log.query().bind(after.0).bind(bound(limit));
        self.rows(query, after).await
    }

    /// Runs a statement, and returns its events up to the size limit of a page.
    async fn rows<'q>(
        &self,
        query: impl Fn() -> Query<'q, Postgres, PgArguments>,
        after: Position,
    ) -> Result<LogPage, StoreError> {
        read!(self.readers, |reader| rows(query(), after, &mut reader))
    }

    /// Reads a page like [`every_event`](Log::every_event), but for a query that leaves events out.
    async fn some_events(
        &self,
        query: &LogQuery,
        after: Position,
        limit: usize,
    ) -> Result<Result<LogPage, i64>, StoreError> {
        let statements = &self.database.statements;
        let start = after.0.max(0);
        let (history, settled) = self.history().settled();
        let (until, is_end) = if start < settled {
            let until: Option<i64> = read!(self.readers, |reader| statements
                .settled_until
                .scalar()
                .bind(start)
                .bind(settled)
                .bind(bound(PAGE_EVENTS_MAX))
                .fetch_one(reader.connection()?))?;
            // The next page examines the events after this position.
            (until.unwrap_or(settled), false)
        } else {
            let (until, any) = self.dense_until(history, start).await?;
            match until {
                Some(until) => (until, until - start < bound(PAGE_EVENTS_MAX)),
                None if any => return Ok(Err(self.next(start).await?.unwrap_or(start))),
                None => return Ok(Ok(LogPage { next: after, ..LogPage::default() })),
            }
        };
        let names = |names: &[Arc<str>]| {
            let texts = || names.iter().filter(|name| is_text(name)).map(|name| name.to_string()).collect::<Vec<_>>();
            (!names.is_empty()).then(texts)
        };
        let statement = || {
            let bounded = statements.read_log_where.query().bind(after.0).bind(until);
            bounded.bind(names(&query.categories)).bind(names(&query.types)).bind(bound(limit))
        };
        let mut page = self.rows(statement, after).await?;
        // The page has reached neither its limit on events nor its limit on bytes.
        if page.events.len() < limit && !page.more {
            page.next = Position(until);
        }
        page.more |= page.next.0 < until || !is_end;
        Ok(Ok(page))
    }

    async fn dense_until(&self, history: u64, start: i64) -> Result<(Option<i64>, bool), StoreError> {
        let (until, id, any): (Option<i64>, Option<Uuid>, bool) = read!(self.readers, |reader| self
            .database
            .statements
            .dense_until
            .rows()
            .bind(start)
            .bind(bound(PAGE_EVENTS_MAX))
            .fetch_one(reader.connection()?))?;
        if let Some(last) = until.zip(id) {
            self.history().saw(history, last);
        }
        Ok((until, any))
    }

    /// Returns the position of the first event after a position, and checks whether the log has lost its last events.
    async fn next(&self, after: i64) -> Result<Option<i64>, StoreError> {
        let asked_for = self.history().asked();
        let last = asked_for.1;
        let statement = &self.database.statements.next;
        let clock = &self.database.clock;
        let (next, found, now, asked) = read!(self.readers, |reader| async {
            let asked = clock.ask();
            let query = statement.rows().bind(after).bind(last.map(|(position, _)| position));
            let row: (Option<i64>, Option<Uuid>, DateTime<Utc>) = query.fetch_one(reader.connection()?).await?;
            Ok::<_, sqlx::Error>((row.0, row.1, row.2, asked))
        })?;
        clock.answered(asked, now);
        self.history().compare(asked_for, found);
        Ok(next)
    }

    /// Returns the position of the last visible event.
    async fn newest(&self, history: u64) -> Result<Option<i64>, StoreError> {
        let newest: Option<Seen> =
            read!(self.readers, |reader| self.database.statements.newest.rows().fetch_optional(reader.connection()?))?;
        if let Some(newest) = newest {
            self.history().saw(history, newest);
        }
        Ok(newest.map(|(position, _)| position))
    }

    async fn holders(&self) -> Result<HashSet<String>, StoreError> {
        let holders: Vec<String> =
            read!(self.readers, |reader| self.database.statements.holders.scalar().fetch_all(reader.connection()?))?;
        Ok(holders.into_iter().collect())
    }

    /// Tries to settle the log up to a visible event; returns whether the log is settled.
    async fn settle(&self, visible: i64) -> Result<bool, StoreError> {
        let mut proof = self.proof.lock().await;
        // A proof that began earlier may end before the visible event. A proof that begins now includes this event,
        // unless a failover or a restore replaces the log, so a second attempt is enough.
        for _ in 0..2 {
            let (history, settled) = self.history().settled();
            if visible <= settled {
                return Ok(true);
            }
            let pending = match proof.take().filter(|pending| pending.history == history) {
                Some(mut pending) => {
                    still_holding(&mut pending.holders, self.holders().await?);
                    pending
                }
                // The order matters: the newest event is read before the holders. A writer that draws a position after
                // that read does not matter for the proof.
                None => {
                    let Some(visible) = self.newest(history).await? else { return Ok(false) };
                    Proof { history, visible, holders: self.holders().await? }
                }
            };
            if !pending.holders.is_empty() {
                *proof = Some(pending);
                return Ok(false);
            }
            self.history().settle(history, pending.visible);
        }
        Ok(visible <= self.history().settled().1)
    }

    pub(crate) async fn ahead(&self, after: Position) -> Result<Ahead, StoreError> {
        let start = after.0.max(0);
        Ok(match self.next(start).await? {
            None => Ahead::Nothing,
            Some(next) if next == start.saturating_add(1) => Ahead::Events,
            Some(next) if self.settle(next).await? => Ahead::Events,
            Some(_) => Ahead::Gap,
        })
    }

    /// Returns the last event that a reader can reach, and what blocks the reader there.
    pub(crate) async fn status(&self) -> Result<StoreStatus, StoreError> {
        let history = self.history().number();
        let status =
            |head, waits_for| StoreStatus { head: Position(head), waits_for, lost_end: self.history().lost_end() };
        let Some(top) = self.newest(history).await? else { return Ok(status(0, None)) };
        for look in 0..STATUS_LOOKS_MAX {
            if self.settle(top).await? {
                return Ok(status(self.history().settled().1, None));
            }
            // Most writers end within milliseconds.
            if look + 1 < STATUS_LOOKS_MAX {
                sleep(Duration::from_millis(STATUS_LOOK_MS)).await;
            }
        }
        let mut head = self.history().settled().1;
        for _ in 0..STATUS_PAGES_MAX {
            let Some(until) = self.dense_until(history, head).await?.0 else { break };
            head = until;
            // There is no gap up to `head`, so no further event can appear below it.
            self.history().settle(history, head);
        }
        let waits_for = if head < top { self.waits_for().await? } else { None };
        Ok(status(head, waits_for))
    }

    async fn waits_for(&self) -> Result<Option<OpenWriter>, StoreError> {
        let holders: Vec<String> = match &*self.proof.lock().await {
            Some(proof) => proof.holders.iter().cloned().collect(),
            None => return Ok(None),
        };
        let found: Vec<(i32, f64, String)> = read!(self.readers, |reader| self
            .database
            .statements
            .waits_for
            .rows()
            .bind(&holders)
            .fetch_all(reader.connection()?))?;
        // The query returns the oldest writer first.
        let Some(&(pid, seconds, _)) = found.first() else { return Ok(None) };
        let described: Vec<String> = found
            .iter()
            .map(|(pid, seconds, name)| match pid {
                0 => format!("prepared transaction {name:?} of {seconds:.1} s ago"),
                _ => format!("pid {pid} ({name}), in a transaction for {seconds:.1} s"),
            })
            .collect();
        let age = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let description = format!("unfinished transactions that write events: {}", described.join("; "));
        Ok(Some(OpenWriter { pid: (pid != 0).then_some(pid), age, description }))
    }
}

async fn rows(
    query: Query<'_, Postgres, PgArguments>,
    after: Position,
    reader: &mut Reader,
) -> Result<LogPage, sqlx::Error> {
    let mut page = LogPage { next: after, ..LogPage::default() };
    let mut bytes = 0;
    let mut rows = query.fetch(reader.connection()?);
    while let Some(row) = rows.try_next().await? {
        let event = recorded(&row)?;
        bytes += event.data.len();
        page.next = event.position;
        page.events.push(Arc::new(event));
        if bytes >= PAGE_BYTES_MAX {
            drop(rows);
            // The session is discarded, because the server would go on sending the remaining rows.
            reader.give_up();
            page.more = true;
            break;
        }
    }
    Ok(page)
}

/// Keeps the holders that still exist. When a transaction is prepared, its name may change to its transaction id (see
/// `holders.sql`). So when a holder disappears, every present holder with such a name is kept as well, because it may
/// be the missing holder under its new name.
fn still_holding(holders: &mut HashSet<String>, now: HashSet<String>) {
    let before = holders.len();
    holders.retain(|holder| now.contains(holder));
    if holders.len() < before {
        holders.extend(now.into_iter().filter(|holder| holder.starts_with("-1/")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> HashSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn later_transactions_are_not_waited_for() {
        let mut holders = set(&["3/1", "4/1"]);
        still_holding(&mut holders, set(&["3/1", "4/2", "5/1"]));
        assert_eq!(holders, set(&["3/1"]));
        still_holding(&mut holders, set(&["3/2", "5/1"]));
        assert_eq!(holders, set(&[]));
    }

    #[test]
    fn prepared_transaction_counts_as_the_same_transaction() {
        let mut holders = set(&["3/1"]);
        still_holding(&mut holders, set(&["3/1", "-1/700"]));
        assert_eq!(holders, set(&["3/1"]), "another one was prepared");
        still_holding(&mut holders, set(&["-1/701", "3/2"]));
        assert_eq!(holders, set(&["-1/701"]));
        still_holding(&mut holders, set(&[]));
        assert_eq!(holders, set(&[]));
    }
}
