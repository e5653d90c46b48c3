//! Reading the log without losing events.
//!
//! Positions are drawn before their transactions commit, so an event may appear below one that is visible already. A reader
//! therefore stops at a gap. What lies in it is either still to come or never was, and this is how to tell:
//!
//! 1. Read the last event that is *visible*. It is durable, so no crash lets anybody draw its position, or one below it, again.
//!    The last position that was only drawn is not durable: after a crash it may be drawn once more.
//! 2. Then ask who holds the lock that every writer of events takes *before* it draws (`annals.append` takes it by a statement
//!    of its own; an `INSERT` takes it before it evaluates its defaults), and keeps until it has ended.
//! 3. Whoever drew a position below that event, and has not ended by now, is among them. Once exactly those have ended, and
//!    whoever came later does not matter, all that will ever be there up to that event is visible.
//!
//! That is then *settled* for good. A crash between two of these steps ends transactions, and nothing else; those that are
//! prepared survive it with their locks. What may not change is the log itself: if the event of step 1 is gone (a failover to a
//! standby that lagged, a restore, a crash without `synchronous_commit`), the module `history` notices on the first session
//! that sees the other log, and the proof is discarded. Nothing here depends on transaction ids, so a log that was restored
//! elsewhere is read as before.

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

/// The most events that one page looks at: some tens of milliseconds of reading.
const PAGE_EVENTS_MAX: usize = 10_000;
/// A page of the log ends after this many bytes of payload, however many events were asked for.
const PAGE_BYTES_MAX: usize = 16 << 20;
/// How often `status` looks whether the writers in flight have ended, before it says that it waits for them.
const STATUS_LOOKS_MAX: u32 = 20;
const STATUS_LOOK_MS: u64 = 2;
/// How many pages `status` looks through for the first gap, while it cannot tell in another way how far the log is settled.
const STATUS_PAGES_MAX: usize = 200;

/// The log, and how far it is known to be settled.
#[derive(Debug)]
pub(crate) struct Log {
    database: Arc<Database>,
    readers: Readers,
    proof: Mutex<Option<Proof>>,
}

/// The last event that was visible, and who might have drawn a position below it and has not ended since.
#[derive(Debug)]
struct Proof {
    /// The number of the history that all of it was read under.
    history: u64,
    visible: i64,
    holders: HashSet<String>,
}

/// What is known of the events after a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ahead {
    /// There are some to read.
    Events,
    /// There are some, behind a gap that a transaction may still fill.
    Gap,
    /// There are none.
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
                // It may be a mixture of two logs.
                _ if self.history().number() != history => sleep(Duration::from_millis(STATUS_LOOK_MS)).await,
                Ok(page) => return Ok(page),
                // Something is visible behind a gap.
                Err(visible) if !self.settle(visible).await? => return Ok(nothing),
                Err(_) => {}
            }
        }
    }

    /// A page, or the position of the event behind the gap that it would begin with.
    async fn every_event(&self, after: Position, limit: usize) -> Result<Result<LogPage, i64>, StoreError> {
        // Before the statement: what is settled by now is visible to it.
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
        // Before a gap there is nothing more for now.
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

    /// The events of a statement, up to what a page may hold.
    async fn rows<'q>(
        &self,
        query: impl Fn() -> Query<'q, Postgres, PgArguments>,
        after: Position,
    ) -> Result<LogPage, StoreError> {
        read!(self.readers, |reader| rows(query(), after, &mut reader))
    }

    /// As [`every_event`](Log::every_event), for a query that leaves some out.
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
            // What is beyond, the next page finds out.
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
        // Neither full nor cut for its bytes.
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

    /// The first event after a position; looks also whether the log has lost its end.
    async fn next(&self, after: i64) -> Result<Option<i64>, StoreError> {
        let asked_for = self.history().asked();
        let last = asked_for.1;
        let (statement, clock) = (&self.database.statements.next, &self.database.clock);
        let (next, found, now, asked) = read!(self.readers, |reader| async {
            let asked = clock.ask();
            let query = statement.rows().bind(after).bind(last.map(|(position, _)| position));
            let row: (Option<i64>, Option<Uuid>, DateTime<Utc>) = query.fetch_one(reader.connection()?).await?;
            Ok::<_, sqlx::Error>((row.0, row.1, row.2, asked))
        })?;
        clock.told(asked, now);
        self.history().compare(asked_for, found);
        Ok(next)
    }

    /// The last event that is visible.
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

    /// Tries to settle the log up to a visible event; says whether it is.
    async fn settle(&self, visible: i64) -> Result<bool, StoreError> {
        let mut proof = self.proof.lock().await;
        // An older proof may end short of the event; one that begins now does not, unless the log changes.
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
                // In this order: who draws later than this look at the log is not waited for.
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

    /// The last event that a reader can get to, and what keeps it from going further.
    pub(crate) async fn status(&self) -> Result<StoreStatus, StoreError> {
        let history = self.history().number();
        let status =
            |head, waits_for| StoreStatus { head: Position(head), waits_for, lost_end: self.history().lost_end() };
        let Some(top) = self.newest(history).await? else { return Ok(status(0, None)) };
        for look in 0..STATUS_LOOKS_MAX {
            if self.settle(top).await? {
                return Ok(status(self.history().settled().1, None));
            }
            // Most writers are done in a moment.
            if look + 1 < STATUS_LOOKS_MAX {
                sleep(Duration::from_millis(STATUS_LOOK_MS)).await;
            }
        }
        let mut head = self.history().settled().1;
        for _ in 0..STATUS_PAGES_MAX {
            let Some(until) = self.dense_until(history, head).await?.0 else { break };
            head = until;
            // No gap up to there, so nothing can come in.
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
        // The oldest first.
        let Some(&(pid, seconds, _)) = found.first() else { return Ok(None) };
        let described: Vec<String> = found
            .iter()
            .map(|(pid, seconds, name)| match pid {
                0 => format!("prepared transaction {name:?} of {seconds:.1} s ago"),
                _ => format!("pid {pid} ({name}), in a transaction for {seconds:.1} s"),
            })
            .collect();
        let age = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let description = format!("writers of events that have not ended: {}", described.join("; "));
        Ok(Some(OpenWriter { pid: (pid != 0).then_some(pid), age, description }))
    }
}

async fn rows(
    query: Query<'_, Postgres, PgArguments>,
    after: Position,
    reader: &mut Reader,
) -> Result<LogPage, sqlx::Error> {
    let (mut page, mut bytes) = (LogPage { next: after, ..LogPage::default() }, 0);
    let mut rows = query.fetch(reader.connection()?);
    while let Some(row) = rows.try_next().await? {
        let event = recorded(&row)?;
        bytes += event.data.len();
        page.next = event.position;
        page.events.push(Arc::new(event));
        if bytes >= PAGE_BYTES_MAX {
            drop(rows);
            // The server goes on sending what nobody wants any more.
            reader.give_up();
            page.more = true;
            break;
        }
    }
    Ok(page)
}

/// Who of those is still there. A transaction that is prepared may change its name to that of its transaction id (see
/// `holders.sql`): so where one went away, all that have such a name count as what it may have become.
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
    fn who_came_later_is_not_waited_for() {
        let mut holders = set(&["3/1", "4/1"]);
        still_holding(&mut holders, set(&["3/1", "4/2", "5/1"]));
        assert_eq!(holders, set(&["3/1"]));
        still_holding(&mut holders, set(&["3/2", "5/1"]));
        assert_eq!(holders, set(&[]));
    }

    #[test]
    fn a_transaction_that_is_prepared_is_still_the_same() {
        let mut holders = set(&["3/1"]);
        still_holding(&mut holders, set(&["3/1", "-1/700"]));
        assert_eq!(holders, set(&["3/1"]), "another one was prepared");
        still_holding(&mut holders, set(&["-1/701", "3/2"]));
        assert_eq!(holders, set(&["-1/701"]));
        still_holding(&mut holders, set(&[]));
        assert_eq!(holders, set(&[]));
    }
}
