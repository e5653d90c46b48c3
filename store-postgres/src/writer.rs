//! What writes: takes the commits that are waiting as a group, and makes one round trip of them.

use std::{
    io,
    panic::{self, AssertUnwindSafe},
    sync::Arc,
    thread,
    time::Duration,
};

use annals::{CommitError, Position};
use sqlx::{Connection, PgConnection};
use tokio::{
    runtime,
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    append::{advance, append_alone},
    error::{Fault, fault, not_written, write_error},
    group::{Decision, Prepared, Written},
    history::Seen,
    news::News,
    open::{Database, Purpose},
    queue::{Outcome, Queue},
};

/// How often a group is tried as a whole while other processes are faster, before it is tried in halves.
const RACES_MAX: u32 = 4;
/// How often a single commit is tried while other processes are faster: it loses one of these only to somebody who won.
const RACES_ALONE_MAX: u32 = 50;
/// How often a single commit is tried while somebody keeps a lock; a group is halved at once.
const WAITS_ALONE_MAX: u32 = 3;
/// An answer that takes longer than this will not come: the server gives up on a group after half of it.
pub(crate) const ANSWER_SECONDS_MAX: u64 = 60;
/// How long to wait after connecting failed: doubling between these.
const RECONNECT_MS_MIN: u64 = 20;
const RECONNECT_MS_MAX: u64 = 1_000;

#[derive(Debug)]
pub(crate) struct Writer {
    database: Arc<Database>,
    /// `None` after a failure: what state it left a connection in is not worth finding out. With the number of the history that
    /// it writes.
    connection: Option<(u64, PgConnection)>,
    news: News,
    reconnect: Reconnect,
}

/// When to connect again.
#[derive(Debug)]
pub(crate) struct Reconnect {
    not_before: Instant,
    delay: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Self { not_before: Instant::now(), delay: Duration::from_millis(RECONNECT_MS_MIN) }
    }
}

impl Reconnect {
    pub(crate) async fn wait(&self) {
        sleep_until(self.not_before).await;
    }

    pub(crate) fn not_before(&self) -> Instant {
        self.not_before
    }

    /// Others that tried at the same time do not double the delay once more.
    pub(crate) fn failed(&mut self) {
        if self.not_before > Instant::now() {
            return;
        }
        self.not_before = Instant::now() + self.delay;
        self.delay = (self.delay * 2).min(Duration::from_millis(RECONNECT_MS_MAX));
    }

    pub(crate) fn succeeded(&mut self) {
        *self = Self::default();
    }
}

/// What trying a group came to, where it was not written.
enum Failure {
    /// Another process was faster each time, or the server refuses something in it: a part of the group may do better.
    OfSome(CommitError),
    /// Whatever is in it.
    OfAll(CommitError),
}

/// Two that serve the queue, on a thread of their own: as tasks among those of the callers they would wait behind hundreds of
/// them at each step, with the server idle meanwhile. At the end it says how they ended, even if that was a panic.
pub(crate) fn start(
    writers: [Writer; 2],
    queue: Queue,
    end: watch::Sender<Option<Result<(), String>>>,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let run = move || {
        let [first, second] = writers;
        let both = async { tokio::try_join!(first.serve(&queue, false), second.serve(&queue, true)) };
        let result = match panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(both))) {
            Ok(ended) => ended.map(drop).map_err(|error| error.to_string()),
            Err(_) => Err("it panicked".to_owned()),
        };
        if let Err(reason) = &result {
            tracing::error!(reason, "the writer of a store has failed");
        }
        end.send_replace(Some(result));
    };
    thread::Builder::new().name("annals-postgres".into()).spawn(run).map(drop)
}

impl Writer {
    pub(crate) fn new(database: &Arc<Database>, news: &News) -> Self {
        let (database, news) = (database.clone(), news.clone());
        Self { database, connection: None, news, reconnect: Reconnect::default() }
    }

    /// Writes what the queue holds until the last sender is gone and it is empty. `second`: only what another writer leaves.
    async fn serve(mut self, queue: &Queue, second: bool) -> Result<(), sqlx::Error> {
        while let Some(group) = if second { queue.overflow().await } else { queue.next().await } {
            let (commits, answers): (Vec<_>, Vec<_>) = group
                .into_iter()
                .map(|submission| (submission.commit, (submission.answer, submission.passage)))
                .unzip();
            for ((answer, passage), outcome) in answers.into_iter().zip(self.write(&commits).await) {
                drop(passage);
                // A caller that gave up needs no answer.
                drop(answer.send(outcome));
            }
            // Callers that were just answered often have the next commit at hand. Without this turn for them, the next group
            // would be those who queued during this one, and two halves would take turns for twice as many round trips.
            tokio::task::yield_now().await;
        }
        self.close().await
    }

    /// Connects anew for the next group.
    pub(crate) fn disconnect(&mut self) {
        self.connection = None;
    }

    pub(crate) async fn close(self) -> Result<(), sqlx::Error> {
        match self.connection {
            Some((_, connection)) => connection.close().await,
            None => Ok(()),
        }
    }

    /// Writes a group, in halves where it does not go as a whole.
    pub(crate) async fn write(&mut self, commits: &[Prepared]) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(commits.len());
        let whole = 0..commits.len();
        let mut parts = Vec::from([whole]);
        while let Some(part) = parts.pop() {
            match self.attempt(&commits[part.clone()]).await {
                Ok(written) => outcomes.extend(written),
                Err(Failure::OfSome(_)) if part.len() > 1 => {
                    let middle = part.start + part.len() / 2;
                    parts.extend([middle..part.end, part.start..middle]);
                }
                Err(Failure::OfSome(error) | Failure::OfAll(error)) => {
                    tracing::warn!(%error, commits = part.len(), "a group of commits failed");
                    outcomes.extend(std::iter::repeat_n(Err(error), part.len()));
                }
            }
        }
        outcomes
    }

    async fn attempt(&mut self, commits: &[Prepared]) -> Result<Vec<Outcome>, Failure> {
        let (mut known, mut races, mut waits) = (None, 0, 0);
        loop {
            let decision = Decision::new(commits, known.as_ref());
            let (history, mut connection) = self.connect().await.map_err(Failure::OfAll)?;
            if let Err(failure) = are_of(commits, history) {
                self.connection = Some((history, connection));
                return Err(failure);
            }
            let seen = self.database.history.last();
            let appended = timeout(
                Duration::from_secs(ANSWER_SECONDS_MAX),
                append_alone(&self.database, &mut connection, &decision, history),
            )
            .await;
            let appended = appended.unwrap_or_else(|elapsed| Err(sqlx::Error::Io(elapsed.into())));
            let error = match appended {
                Ok((written, standings)) => {
                    if let Some(written) = &written {
                        self.wrote(&mut connection, history, seen, written, &decision).await;
                    }
                    self.connection = Some((history, connection));
                    let Some(written) = written else {
                        // A guess was wrong. Where it was no guess, somebody else has just moved on.
                        races += u32::from(known.is_some());
                        if races > RACES_ALONE_MAX {
                            return Err(Failure::OfSome(CommitError::Unavailable(
                                "other processes were faster each time".into(),
                            )));
                        }
                        known = Some(standings);
                        continue;
                    };
                    return Ok(decision.outcomes(&written, &standings));
                }
                Err(error) => error,
            };
            let fault = fault(&error);
            if !matches!(fault, Fault::Lost | Fault::NotPrimary) {
                self.connection = Some((history, connection));
            }
            match fault {
                Fault::Refused => return Err(Failure::OfSome(write_error(&error))),
                Fault::Race | Fault::PositionTaken => {
                    races += 1;
                    let most = if commits.len() > 1 { RACES_MAX } else { RACES_ALONE_MAX };
                    if races > most {
                        return Err(Failure::OfSome(write_error(&error)));
                    }
                    if fault == Fault::PositionTaken {
                        self.advance().await.map_err(Failure::OfAll)?;
                    }
                    // Not in step with whoever it was.
                    sleep(Duration::from_micros(fastrand::u64(0..500 << races.min(6)))).await;
                    known = None;
                }
                Fault::Held => {
                    waits += 1;
                    if commits.len() > 1 || waits > WAITS_ALONE_MAX {
                        return Err(Failure::OfSome(write_error(&error)));
                    }
                }
                Fault::Forbidden | Fault::Unavailable | Fault::NotPrimary | Fault::Lost => {
                    return Err(Failure::OfAll(write_error(&error)));
                }
            }
        }
    }

    /// Takes note of what was written. A position is drawn after its statement was sent, so it is above all that was seen before,
    /// unless the log has lost its end on this very server.
    async fn wrote(
        &self,
        connection: &mut PgConnection,
        history: u64,
        seen: Option<Seen>,
        written: &Written,
        decision: &Decision<'_>,
    ) {
        let Some((first, last)) = written.positions.first().zip(written.positions.last()) else { return };
        if seen.is_some_and(|(seen, _)| *first <= seen) {
            // If it fails, whoever reads or writes next finds out.
            self.database.check(connection, Purpose::Write).await.ok();
        }
        if let Some(id) = decision.last_event() {
            self.database.history.saw(history, (*last, id));
        }
        self.news.written(history, Position(*last));
    }

    async fn connect(&mut self) -> Result<(u64, PgConnection), CommitError> {
        if let Some((history, connection)) = self.connection.take() {
            let number = self.database.history.number();
            if history == number {
                return Ok((history, connection));
            }
            if self.database.pooled {
                // The session behind it is checked by each transaction.
                return Ok((number, connection));
            }
        }
        self.reconnect.wait().await;
        match self.database.connect(Purpose::Write).await {
            Ok(session) => {
                self.reconnect.succeeded();
                Ok(session)
            }
            Err(error) => {
                self.reconnect.failed();
                Err(not_written(&error))
            }
        }
    }

    async fn advance(&mut self) -> Result<(), CommitError> {
        let (history, mut connection) = self.connect().await?;
        advance(&self.database, &mut connection).await.map_err(|error| not_written(&error))?;
        self.connection = Some((history, connection));
        Ok(())
    }
}

/// Whether the commits were handed over under this number of the history. What was decided before may rest on events that are
/// gone.
fn are_of(commits: &[Prepared], history: u64) -> Result<(), Failure> {
    let older = commits.iter().filter(|commit| commit.history != history).count();
    let error = || {
        CommitError::Unavailable("the log changed (failover or restore) before this was written: decide again".into())
    };
    match older {
        0 => Ok(()),
        older if older == commits.len() => Err(Failure::OfAll(error())),
        _ => Err(Failure::OfSome(error())),
    }
}
